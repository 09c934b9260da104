//! ARP for IPv4 over Ethernet (RFC 826).
//!
//! ```text
//! | hardware 2 | protocol 2 | 6 | 4 | operation 2 | sender MAC 6 | sender IP 4 | target MAC 6 | target IP 4 |
//! ```

use std::net::Ipv4Addr;

use etherparse::{ArpEthIpv4Packet, ArpHardwareId, ArpOperation, ArpPacketSlice, EtherType};

use crate::MacAddr;
use crate::ethernet::{self, Frame};
use crate::ip::Malformed;

/// An ARP message that has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// Whether it asks; else it answers.
    pub is_request: bool,
    /// Who says it sent the message.
    pub sender_mac: MacAddr,
    /// The address the sender says is its own; 0.0.0.0 in a probe (RFC 5227 §2.1.1).
    pub sender_ip: Ipv4Addr,
    /// In an answer, whom it is for.
    pub target_mac: MacAddr,
    /// The address asked for.
    pub target_ip: Ipv4Addr,
}

impl Arp {
    /// The message in a frame; `None` when the frame carries no ARP.
    ///
    /// # Errors
    /// [`Malformed`] when it is cut off, not for IPv4 over Ethernet, or neither request nor reply.
    pub fn parse(frame: &Frame<'_>) -> Result<Option<Self>, Malformed> {
        if frame.ethertype() != ethernet::TYPE_ARP {
            return Ok(None);
        }
        let slice = ArpPacketSlice::from_slice(frame.payload()).map_err(|_| Malformed)?;
        if slice.hw_addr_type() != ArpHardwareId::ETHERNET
            || slice.proto_addr_type() != EtherType::IPV4
        {
            return Err(Malformed);
        }
        let mac = |bytes: &[u8]| bytes.try_into().map(MacAddr::new).map_err(|_| Malformed);
        let ip = |bytes: &[u8]| {
            <[u8; 4]>::try_from(bytes)
                .map(Ipv4Addr::from)
                .map_err(|_| Malformed)
        };
        Ok(Some(Self {
            is_request: match slice.operation() {
                ArpOperation::REQUEST => true,
                ArpOperation::REPLY => false,
                _ => return Err(Malformed),
            },
            sender_mac: mac(slice.sender_hw_addr())?,
            sender_ip: ip(slice.sender_protocol_addr())?,
            target_mac: mac(slice.target_hw_addr())?,
            target_ip: ip(slice.target_protocol_addr())?,
        }))
    }

    /// Appends the frame that carries this message to `destination`.
    pub fn emit(&self, destination: MacAddr, out: &mut Vec<u8>) {
        let packet = ArpEthIpv4Packet {
            operation: if self.is_request {
                ArpOperation::REQUEST
            } else {
                ArpOperation::REPLY
            },
            sender_mac: self.sender_mac.octets(),
            sender_ipv4: self.sender_ip.octets(),
            target_mac: self.target_mac.octets(),
            target_ipv4: self.target_ip.octets(),
        };
        out.extend_from_slice(&ethernet::emit(
            destination,
            self.sender_mac,
            ethernet::TYPE_ARP,
        ));
        out.extend_from_slice(&packet.to_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: Arp = Arp {
        is_request: true,
        sender_mac: MacAddr::new([2, 0, 0, 0, 0, 1]),
        sender_ip: Ipv4Addr::new(10, 0, 9, 2),
        target_mac: MacAddr::ZERO,
        target_ip: Ipv4Addr::new(10, 0, 9, 3),
    };

    fn emit(arp: Arp) -> Vec<u8> {
        let mut bytes = Vec::new();
        arp.emit(MacAddr::BROADCAST, &mut bytes);
        bytes
    }

    #[test]
    fn bytes_decoded_by_hand() {
        let bytes = emit(REQUEST);
        assert_eq!(&bytes[12..22], [0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 1]);
        assert_eq!(&bytes[22..32], [2, 0, 0, 0, 0, 1, 10, 0, 9, 2]);
        assert_eq!(&bytes[32..], [0, 0, 0, 0, 0, 0, 10, 0, 9, 3]);
    }

    #[test]
    fn round_trip_and_padding() {
        for arp in [
            REQUEST,
            Arp {
                is_request: false,
                ..REQUEST
            },
        ] {
            let mut bytes = emit(arp);
            bytes.resize(60, 0);
            assert_eq!(Arp::parse(&Frame::parse(&bytes).unwrap()), Ok(Some(arp)));
        }
    }

    #[test]
    fn wrong_messages_are_malformed() {
        let bytes = emit(REQUEST);
        for len in 14..bytes.len() {
            assert_eq!(
                Arp::parse(&Frame::parse(&bytes[..len]).unwrap()),
                Err(Malformed),
                "{len} bytes"
            );
        }
        // Hardware type, protocol type, both lengths, operation.
        for (offset, value) in [(15, 6), (16, 9), (18, 5), (19, 16), (21, 3)] {
            let mut bytes = emit(REQUEST);
            bytes[offset] = value;
            bytes.resize(80, 0);
            assert_eq!(
                Arp::parse(&Frame::parse(&bytes).unwrap()),
                Err(Malformed),
                "byte {offset} = {value}"
            );
        }
    }
}
