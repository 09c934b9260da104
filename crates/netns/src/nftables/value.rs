//! Values that packets are compared with and that maps hold, as the bytes of the kernel's registers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::netfilter::attributes::Writer;

use super::uapi::expression;

/// A transport protocol, by its IANA number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// 1.
    Icmp,
    /// 6.
    Tcp,
    /// 17.
    Udp,
    /// 58.
    Icmpv6,
}

impl Protocol {
    /// Its IANA number.
    pub fn number(self) -> u8 {
        match self {
            Self::Icmp => 1,
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Icmpv6 => 58,
        }
    }
}

/// One value, of one of the kinds that [`super::Type`] names.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(Vec<u8>);

impl Value {
    /// A number in the machine's byte order: a mark, a slot of a numbered choice, a state's bits.
    pub fn number(number: u32) -> Self {
        Self(number.to_ne_bytes().to_vec())
    }

    /// The name of an interface; what is behind 15 bytes is cut off, as no interface has a longer one.
    pub fn interface(name: &str) -> Self {
        let mut bytes = vec![0; 16];
        let length = name.len().min(15);
        bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
        Self(bytes)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

impl From<Ipv4Addr> for Value {
    fn from(address: Ipv4Addr) -> Self {
        Self(address.octets().to_vec())
    }
}

impl From<Ipv6Addr> for Value {
    fn from(address: Ipv6Addr) -> Self {
        Self(address.octets().to_vec())
    }
}

impl From<IpAddr> for Value {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => address.into(),
        }
    }
}

/// A port.
impl From<u16> for Value {
    fn from(port: u16) -> Self {
        Self(port.to_be_bytes().to_vec())
    }
}

impl From<Protocol> for Value {
    fn from(protocol: Protocol) -> Self {
        Self(vec![protocol.number()])
    }
}

/// A MAC address.
impl From<[u8; 6]> for Value {
    fn from(mac: [u8; 6]) -> Self {
        Self(mac.to_vec())
    }
}

/// A connection's label.
impl From<[u8; 16]> for Value {
    fn from(label: [u8; 16]) -> Self {
        Self(label.to_vec())
    }
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// It passes this base chain.
    Accept,
    /// It is gone.
    Drop,
    /// Back to the chain that jumped here.
    Return,
    /// On to that chain, and back at its end.
    Jump(String),
    /// On to that chain, and not back here.
    Goto(String),
}

impl Verdict {
    /// `NFTA_VERDICT_*` inside `NFTA_DATA_VERDICT`.
    pub(crate) fn write(&self, data: &mut Writer) {
        // NF_DROP, NF_ACCEPT, NFT_JUMP, NFT_GOTO, NFT_RETURN: negative ones as the kernel's 32 bits.
        let (code, chain) = match self {
            Self::Drop => (0_i32, None),
            Self::Accept => (1, None),
            Self::Jump(chain) => (-3, Some(chain)),
            Self::Goto(chain) => (-4, Some(chain)),
            Self::Return => (-5, None),
        };
        data.nest(expression::VERDICT, |verdict| {
            verdict.bytes(expression::VERDICT_CODE, &code.to_be_bytes());
            if let Some(chain) = chain {
                verdict.text(expression::VERDICT_CHAIN, chain);
            }
        });
    }
}

/// The values of a key or of a map's data, each in whole 32-bit registers.
pub(crate) fn concatenate(values: &[Value]) -> Vec<u8> {
    match values {
        [value] => value.0.clone(),
        values => {
            let mut bytes = Vec::new();
            for value in values {
                bytes.extend_from_slice(&value.0);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
            }
            bytes
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_key_begin_at_whole_registers() {
        let key = [Value::from(Protocol::Tcp), Value::from(8080)];
        assert_eq!(concatenate(&key), [6, 0, 0, 0, 0x1f, 0x90, 0, 0]);
        assert_eq!(concatenate(&[Value::from(8080)]), [0x1f, 0x90]);
    }

    #[test]
    fn an_interface_s_name_fills_its_field() {
        assert_eq!(
            Value::interface("lo").bytes(),
            b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
        );
        assert_eq!(Value::interface(&"x".repeat(40)).bytes().len(), 16);
    }
}
