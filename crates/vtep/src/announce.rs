//! Announcements: what tells the containers of this host that an address has another MAC now.
//!
//! A container that spoke to the address before remembers the MAC it had, and would send there until its kernel doubts it. A gratuitous
//! ARP request (RFC 5227 §3) or an unsolicited neighbour advertisement with the override flag (RFC 4861 §7.2.6) has it
//! use the new one from its next packet on; who never spoke to the address ignores it.
//!
//! What is announced is what the tables say, only to ports of this host, never to the port that owns the address, and nothing of it
//! crosses the underlay: every host tells its own. What this module does *not* do: decide when, and how often. Whoever changes the
//! tables does.

use std::net::{IpAddr, Ipv6Addr};

use crate::arp::Arp;
use crate::nd;
use crate::{MacAddr, Vni};

/// An address has another MAC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Announcement {
    /// The network.
    pub vni: Vni,
    /// The address.
    pub ip: IpAddr,
    /// The MAC it has now.
    pub mac: MacAddr,
}

impl Announcement {
    /// Appends the frame that tells all who hear it.
    pub fn emit(&self, out: &mut Vec<u8>) {
        match self.ip {
            IpAddr::V4(ip) => Arp {
                is_request: true,
                sender_mac: self.mac,
                sender_ip: ip,
                target_mac: MacAddr::ZERO,
                target_ip: ip,
            }
            .emit(MacAddr::BROADCAST, out),
            // To nobody in particular, hence to all nodes and without the solicited flag.
            IpAddr::V6(ip) => {
                nd::emit_advertisement(ip, self.mac, Ipv6Addr::UNSPECIFIED, MacAddr::ZERO, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ethernet::Frame;
    use crate::guard::Contents;
    use crate::nd::{ALL_NODES, Message};

    const MAC: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 7]);

    fn frame(ip: &str) -> Vec<u8> {
        let mut out = Vec::new();
        let announcement = Announcement {
            vni: Vni::MAX,
            ip: ip.parse().unwrap(),
            mac: MAC,
        };
        announcement.emit(&mut out);
        out
    }

    #[test]
    fn ipv4_is_announced_by_a_gratuitous_request() {
        let bytes = frame("10.0.9.3");
        let frame = Frame::parse(&bytes).unwrap();
        assert_eq!(
            (frame.destination(), frame.source()),
            (MacAddr::BROADCAST, MAC)
        );
        let arp = Arp::parse(&frame).unwrap().unwrap();
        assert!(arp.is_request);
        assert_eq!((arp.sender_ip, arp.sender_mac), (arp.target_ip, MAC));
    }

    #[test]
    fn ipv6_is_announced_to_all_nodes_with_override_and_unsolicited() {
        let bytes = frame("fd00::3");
        let frame = Frame::parse(&bytes).unwrap();
        assert_eq!(
            frame.destination().octets(),
            [0x33, 0x33, 0, 0, 0, 1],
            "the group of all nodes"
        );
        // The reader checks length, hop limit and checksum.
        let Contents::Nd(packet, message) = Contents::parse(&frame).unwrap() else {
            panic!("no neighbour discovery")
        };
        assert_eq!(packet.destination, IpAddr::from(ALL_NODES));
        let target = "fd00::3".parse().unwrap();
        assert_eq!(
            message,
            Message::Advertisement {
                target,
                target_mac: Some(MAC)
            }
        );
        // Router, solicited, override: only the last.
        assert_eq!(bytes[14 + 40 + 4], 0x20);
    }
}
