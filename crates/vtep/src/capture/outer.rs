//! The outer headers of a datagram, made anew.
//!
//! The kernel writes them, so no worker ever sees them. What is known of them is the same as on the wire: addresses, ports,
//! traffic class, lengths and checksums, and of a datagram that is sent the TTL. What is not known is what Linux writes for these
//! sockets: DF set and identification 0, and for datagrams that came in a TTL of 64.

use std::net::SocketAddr;

use etherparse::{IpDscp, IpEcn, IpFragOffset, IpNumber, Ipv4Header, Ipv6Header, UdpHeader};

use crate::edge::OuterFields;
use crate::traffic_class;

/// How a datagram was addressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outer {
    /// The sender, with the source port that the flow chose.
    pub from: SocketAddr,
    /// The receiver.
    pub to: SocketAddr,
    /// What else they say.
    pub fields: OuterFields,
}

impl Outer {
    /// The whole IP packet with this payload. `None` when the addresses are of two families, or the payload is larger than any
    /// packet's.
    #[must_use]
    pub fn packet(&self, payload: &[u8]) -> Option<Vec<u8>> {
        let (from, to) = (self.from.port(), self.to.port());
        let OuterFields {
            class,
            ttl,
            checksum,
        } = self.fields;
        let length = u16::try_from(UdpHeader::LEN + payload.len()).ok()?;
        let mut packet = Vec::with_capacity(Ipv6Header::LEN + usize::from(length));
        let mut udp = match (self.from, self.to) {
            (SocketAddr::V4(source), SocketAddr::V4(destination)) => {
                let (source, destination) = (source.ip().octets(), destination.ip().octets());
                let mut ip =
                    Ipv4Header::new(length, ttl, IpNumber::UDP, source, destination).ok()?;
                ip.dont_fragment = true;
                ip.fragment_offset = IpFragOffset::ZERO;
                ip.dscp = IpDscp::try_new(class >> 2).ok()?;
                ip.ecn = IpEcn::try_new(class & traffic_class::ECN).ok()?;
                ip.header_checksum = ip.calc_header_checksum();
                packet.extend_from_slice(&ip.to_bytes());
                UdpHeader::with_ipv4_checksum(from, to, &ip, payload).ok()?
            }
            (SocketAddr::V6(source), SocketAddr::V6(destination)) => {
                let ip = Ipv6Header {
                    traffic_class: class,
                    payload_length: length,
                    next_header: IpNumber::UDP,
                    hop_limit: ttl,
                    source: source.ip().octets(),
                    destination: destination.ip().octets(),
                    ..Ipv6Header::default()
                };
                packet.extend_from_slice(&ip.to_bytes());
                UdpHeader::with_ipv6_checksum(from, to, &ip, payload).ok()?
            }
            _ => return None,
        };
        if !checksum {
            udp.checksum = 0;
        }
        packet.extend_from_slice(&udp.to_bytes());
        packet.extend_from_slice(payload);
        Some(packet)
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    use super::*;

    #[test]
    fn packets_are_whole_in_both_families() {
        for (from, to) in [
            ("192.0.2.1:50000", "192.0.2.2:4789"),
            ("[2001:db8::1]:50000", "[2001:db8::2]:4789"),
        ] {
            let outer = Outer {
                from: from.parse().unwrap(),
                to: to.parse().unwrap(),
                fields: OuterFields::with_class(46 << 2 | 2),
            };
            let packet = outer.packet(b"payload").unwrap();
            let sliced = SlicedPacket::from_ip(&packet).unwrap();
            let Some(TransportSlice::Udp(udp)) = &sliced.transport else {
                panic!("no UDP: {sliced:?}")
            };
            assert_eq!((udp.source_port(), udp.destination_port()), (50_000, 4789));
            assert_eq!(udp.payload(), b"payload");
            let header = udp.to_header();
            match sliced.net.unwrap() {
                NetSlice::Ipv4(ip) => {
                    let ip = ip.header().to_header();
                    assert_eq!((ip.ecn.value(), ip.dont_fragment), (2, true));
                    assert_eq!((ip.dscp.value(), ip.time_to_live), (46, 64));
                    assert_eq!(ip.header_checksum, ip.calc_header_checksum());
                    let sum = header.calc_checksum_ipv4(&ip, b"payload").unwrap();
                    assert_eq!(header.checksum, sum);
                }
                NetSlice::Ipv6(ip) => {
                    let ip = ip.header().to_header();
                    assert_eq!((ip.traffic_class, ip.hop_limit), (46 << 2 | 2, 64));
                    let sum = header.calc_checksum_ipv6(&ip, b"payload").unwrap();
                    assert_eq!(header.checksum, sum);
                }
                other => panic!("not IP: {other:?}"),
            }
        }
    }

    #[test]
    fn what_no_packet_can_be_is_none() {
        let outer = |to: &str| Outer {
            from: "192.0.2.1:1".parse().unwrap(),
            to: to.parse().unwrap(),
            fields: OuterFields::default(),
        };
        assert_eq!(outer("[::1]:1").packet(b""), None);
        assert_eq!(outer("192.0.2.2:1").packet(&vec![0; 65_600]), None);
        assert!(outer("192.0.2.2:1").packet(&vec![0; 65_507]).is_some());
    }
}
