//! Ethernet addresses.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A 48-bit Ethernet address (IEEE 802-2014 §8), written `02:42:0a:00:09:02`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct MacAddr([u8; 6]);

/// Text that is no Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no MAC address: write six hexadecimal bytes, such as 02:42:0a:00:09:02")]
pub struct MacAddrError {
    text: String,
}

impl MacAddr {
    /// The address of every station: `ff:ff:ff:ff:ff:ff`.
    pub const BROADCAST: Self = Self([0xff; 6]);
    /// The address of none: `00:00:00:00:00:00`.
    pub const ZERO: Self = Self([0; 6]);

    /// The address with these bytes, in the order they stand on the wire.
    #[must_use]
    pub const fn new(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// The bytes, in the order they stand on the wire.
    #[must_use]
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// Whether the group bit is set: multicast, broadcast included.
    #[must_use]
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether this is [`Self::BROADCAST`].
    #[must_use]
    pub fn is_broadcast(self) -> bool {
        self == Self::BROADCAST
    }

    /// Whether this is [`Self::ZERO`].
    #[must_use]
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }

    /// Whether this is one of `01:80:c2:00:00:00` to `…:0f`, which no bridge forwards (IEEE 802.1Q-2018 table 8-1).
    #[must_use]
    pub const fn is_link_local_control(self) -> bool {
        matches!(self.0, [0x01, 0x80, 0xc2, 0x00, 0x00, last] if last & 0xf0 == 0)
    }

    /// The bytes as a number below 2^48.
    const fn to_u64(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }
}

// The derived hash of an array feeds its length and a slice of bytes; one word is several times faster to hash.
impl Hash for MacAddr {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.to_u64());
    }
}

impl From<[u8; 6]> for MacAddr {
    fn from(octets: [u8; 6]) -> Self {
        Self(octets)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = MacAddrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || MacAddrError {
            text: text.chars().take(64).collect(),
        };
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or_else(wrong)?;
            // `from_str_radix` would also take a sign.
            if part.len() != 2 || !part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            Err(wrong())
        } else {
            Ok(Self(octets))
        }
    }
}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl de::Visitor<'_> for Text {
            type Value = MacAddr;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a MAC address such as 02:42:0a:00:09:02")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<MacAddr, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_and_kinds() {
        let mac: MacAddr = "02:42:0a:00:09:02".parse().unwrap();
        assert_eq!(mac.octets(), [0x02, 0x42, 0x0a, 0, 9, 2]);
        assert!(!mac.is_multicast() && !mac.is_zero() && !mac.is_broadcast());
        assert!(MacAddr::BROADCAST.is_multicast() && MacAddr::BROADCAST.is_broadcast());
        assert_eq!("02:42:0A:00:09:02".parse::<MacAddr>().unwrap(), mac);
        for wrong in [
            "",
            "02",
            "02:42:0a:00:09",
            "02:42:0a:00:09:02:03",
            "+2:42:0a:00:09:02",
            "02:42:0a:00:09:g2",
            "02-42-0a-00-09-02",
        ] {
            let error = wrong.parse::<MacAddr>().unwrap_err().to_string();
            assert!(error.contains(&format!("{wrong:?}")), "{error}");
        }
    }

    #[test]
    fn link_local_control_is_sixteen_addresses() {
        assert!(MacAddr::new([0x01, 0x80, 0xc2, 0, 0, 0x00]).is_link_local_control());
        assert!(MacAddr::new([0x01, 0x80, 0xc2, 0, 0, 0x0f]).is_link_local_control());
        assert!(!MacAddr::new([0x01, 0x80, 0xc2, 0, 0, 0x10]).is_link_local_control());
        assert!(!MacAddr::new([0x01, 0x80, 0xc2, 0, 1, 0x00]).is_link_local_control());
    }

    proptest! {
        #[test]
        fn text_round_trip(octets: [u8; 6]) {
            let mac = MacAddr::new(octets);
            prop_assert_eq!(mac.to_string().parse::<MacAddr>().unwrap(), mac);
        }
    }
}
