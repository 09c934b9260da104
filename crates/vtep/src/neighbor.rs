//! Answers for neighbours, for the gateway and for services, made from the tables where the question enters the overlay.
//!
//! A question for a known address never crosses the underlay. It is answered as its owner would, except to the owner itself:
//! its probes, its duplicate address detection and its announcements must find nobody else. What the tables do not know
//! is left to the engine, which treats it as any other frame.

use std::net::IpAddr;

use crate::MacAddr;
use crate::arp::Arp;
use crate::fdb::{Network, Port};
use crate::guard::{Contents, is_own};
use crate::icmp;
use crate::ip::{Fragment, Packet, link_local, protocol};
use crate::nd::{self, Message};
use crate::offload::checksum::{fold, sum};
use crate::stats::DropReason;

/// TTL and hop limit of an echo reply.
const HOP_LIMIT: u8 = 64;
/// ICMP's type of an echo reply (RFC 792).
const ECHO_REPLY: u8 = 0;

/// What becomes of a frame that may be a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The answer has been written.
    Answered,
    /// It ends here, unanswered.
    Dropped(DropReason),
    /// It is no question, or one that the tables cannot answer.
    NotMine,
}

/// Answers an ARP request or a neighbour solicitation from `port`, into the empty `out`.
pub fn answer(
    network: &Network,
    port: &Port,
    contents: &Contents<'_>,
    out: &mut Vec<u8>,
) -> Outcome {
    let target = match contents {
        Contents::Arp(arp) if arp.is_request => IpAddr::V4(arp.target_ip),
        Contents::Nd(_, Message::Solicitation { target, .. }) => IpAddr::V6(*target),
        _ => return Outcome::NotMine,
    };
    if is_own(port, target) {
        return Outcome::Dropped(DropReason::OwnAddress);
    }
    let Some(mac) = mac_of(network, target) else {
        return Outcome::NotMine;
    };
    match (contents, target) {
        (Contents::Arp(request), IpAddr::V4(target)) => Arp {
            is_request: false,
            sender_mac: mac,
            sender_ip: target,
            target_mac: port.mac,
            target_ip: request.sender_ip,
        }
        .emit(port.mac, out),
        (
            Contents::Nd(
                Packet {
                    source: IpAddr::V6(source),
                    ..
                },
                _,
            ),
            IpAddr::V6(target),
        ) => {
            nd::emit_advertisement(target, mac, *source, port.mac, out);
        }
        _ => return Outcome::NotMine,
    }
    Outcome::Answered
}

/// Answers an echo request for one of the gateway's or a service's addresses, into the empty `out`; drops all else that is for
/// the gateway's MAC.
pub fn answer_for_gateway(
    network: &Network,
    port: &Port,
    contents: &Contents<'_>,
    out: &mut Vec<u8>,
) -> Outcome {
    const NOT_FOR_ME: Outcome = Outcome::Dropped(DropReason::ToGateway);
    let Contents::Ip(packet) = contents else {
        return NOT_FOR_ME;
    };
    let config = network.config();
    if packet.fragment != Fragment::Whole || !config.answers_for(packet.destination) {
        return NOT_FOR_ME;
    }
    match (
        packet.source,
        packet.destination,
        packet.protocol,
        packet.body,
    ) {
        (IpAddr::V4(source), IpAddr::V4(gateway), protocol::ICMP, [8, 0, _, _, ..]) => {
            if fold(sum(packet.body)) != 0xffff {
                return Outcome::Dropped(DropReason::Malformed);
            }
            let (from, to) = ((gateway, config.gateway_mac), (source, port.mac));
            if !icmp::emit_v4(from, to, HOP_LIMIT, ECHO_REPLY, &[packet.body], out) {
                return NOT_FOR_ME;
            }
            Outcome::Answered
        }
        (IpAddr::V6(source), IpAddr::V6(gateway), protocol::ICMPV6, [128, 0, _, _, ..]) => {
            if nd::emit_echo_reply(
                (gateway, config.gateway_mac),
                (source, port.mac),
                HOP_LIMIT,
                packet,
                out,
            ) {
                Outcome::Answered
            } else {
                Outcome::Dropped(DropReason::Malformed)
            }
        }
        _ => NOT_FOR_ME,
    }
}

/// Whose an address is: the gateway's (which answers for services, too), an endpoint's, or, for a link-local address, that of the endpoint whose MAC it follows from.
fn mac_of(network: &Network, ip: IpAddr) -> Option<MacAddr> {
    if network.config().answers_for(ip) {
        return Some(network.config().gateway_mac);
    }
    network.neighbor(ip).or_else(|| {
        let IpAddr::V6(ip) = ip else { return None };
        let [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a, b, c, 0xff, 0xfe, d, e, f] = ip.octets() else {
            return None;
        };
        let mac = MacAddr::new([a ^ 2, b, c, d, e, f]);
        debug_assert_eq!(link_local(mac), ip);
        network.lookup(mac).map(|_| mac)
    })
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};

    use super::*;
    use crate::Vni;
    use crate::ethernet::Frame;
    use crate::fdb::{Change, NetworkConfig, PortId, TableWriter};
    use crate::nd::tests::solicitation;
    use crate::settings::WireSettings;

    const OWN: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 1]);
    const OTHER: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 2]);
    const GATEWAY: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 0xfe]);

    /// Asks, from the port 10.0.9.2 and fd00::2, on a network where 10.0.9.3 and fd00::3 are on another host.
    fn ask(
        frame: &[u8],
        answer: fn(&Network, &Port, &Contents<'_>, &mut Vec<u8>) -> Outcome,
    ) -> (Outcome, Vec<u8>) {
        let vni = Vni::new(1).unwrap();
        let ips = vec!["10.0.9.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        let port = Port {
            id: PortId(1),
            vni,
            mac: OWN,
            ips,
            mtu: 1450,
            any_source: false,
        };
        let gateway_ips = vec!["10.0.9.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let mut writer = TableWriter::new();
        writer.apply(&[
            Change::SetNetwork(NetworkConfig {
                vni,
                mtu: 1450,
                gateway_mac: GATEWAY,
                service_ips: ["10.0.9.7", "fd00::7"].map(|ip| ip.parse().unwrap()).into(),
                gateway_ips,
                settings: WireSettings::default(),
            }),
            Change::AddPort(port.clone()),
            Change::SetFdb {
                vni,
                mac: OTHER,
                remote: "192.0.2.2:4789".parse().unwrap(),
            },
            Change::SetNeighbor {
                vni,
                ip: "10.0.9.3".parse().unwrap(),
                mac: OTHER,
            },
            Change::SetNeighbor {
                vni,
                ip: "fd00::3".parse().unwrap(),
                mac: OTHER,
            },
        ]);
        let tables = writer.shared().load_full();
        let contents = Contents::parse(&Frame::parse(frame).unwrap()).unwrap();
        let mut out = Vec::new();
        let outcome = answer(tables.network(vni).unwrap(), &port, &contents, &mut out);
        (outcome, out)
    }

    fn arp(sender_ip: [u8; 4], target_ip: [u8; 4]) -> Vec<u8> {
        let mut out = Vec::new();
        Arp {
            is_request: true,
            sender_mac: OWN,
            sender_ip: sender_ip.into(),
            target_mac: MacAddr::ZERO,
            target_ip: target_ip.into(),
        }
        .emit(MacAddr::BROADCAST, &mut out);
        out
    }

    fn ip6(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }

    #[test]
    fn arp_is_answered_as_the_owner_would() {
        // Conformance V21.
        for (target, mac) in [
            ([10, 0, 9, 3], OTHER),
            ([10, 0, 9, 1], GATEWAY),
            ([10, 0, 9, 7], GATEWAY),
        ] {
            let (outcome, out) = ask(&arp([10, 0, 9, 2], target), answer);
            assert_eq!(outcome, Outcome::Answered);
            let frame = Frame::parse(&out).unwrap();
            assert_eq!((frame.destination(), frame.source()), (OWN, mac));
            let reply = Arp::parse(&frame).unwrap().unwrap();
            let expected = Arp {
                is_request: false,
                sender_mac: mac,
                sender_ip: target.into(),
                target_mac: OWN,
                target_ip: [10, 0, 9, 2].into(),
            };
            assert_eq!(reply, expected);
        }
    }

    #[test]
    fn an_arp_probe_for_anothers_address_is_answered() {
        // Conformance V21: RFC 5227 §2.1.1, the sender address is 0.0.0.0.
        let (outcome, out) = ask(&arp([0; 4], [10, 0, 9, 3]), answer);
        assert_eq!(outcome, Outcome::Answered);
        assert_eq!(
            Arp::parse(&Frame::parse(&out).unwrap())
                .unwrap()
                .unwrap()
                .target_ip,
            Ipv4Addr::UNSPECIFIED
        );
    }

    #[test]
    fn the_owner_is_never_answered() {
        // Conformance V21: probe, announcement, DAD for an address and for the link-local address.
        for sender in [[0; 4], [10, 0, 9, 2]] {
            assert_eq!(
                ask(&arp(sender, [10, 0, 9, 2]), answer).0,
                Outcome::Dropped(DropReason::OwnAddress)
            );
        }
        for own in ["fd00::2", "fe80::ff:fe00:1"] {
            let frame = solicitation(Ipv6Addr::UNSPECIFIED, OWN, ip6(own), None);
            assert_eq!(
                ask(&frame, answer),
                (Outcome::Dropped(DropReason::OwnAddress), Vec::new()),
                "{own}"
            );
        }
    }

    #[test]
    fn solicitations_are_answered_with_hop_limit_255() {
        // Conformance V21; a link-local address is answered by the MAC it follows from.
        for (target, mac) in [
            ("fd00::3", OTHER),
            ("fd00::1", GATEWAY),
            ("fd00::7", GATEWAY),
            ("fe80::ff:fe00:2", OTHER),
        ] {
            let frame = solicitation(ip6("fd00::2"), OWN, ip6(target), Some(OWN));
            let (outcome, out) = ask(&frame, answer);
            assert_eq!(outcome, Outcome::Answered, "{target}");
            let frame = Frame::parse(&out).unwrap();
            assert_eq!((frame.destination(), frame.source()), (OWN, mac));
            let Contents::Nd(packet, message) = Contents::parse(&frame).unwrap() else {
                panic!("no ND")
            };
            assert_eq!(
                message,
                Message::Advertisement {
                    target: ip6(target),
                    target_mac: Some(mac)
                }
            );
            assert_eq!(
                (packet.hop_limit, packet.source, packet.destination),
                (255, ip6(target).into(), ip6("fd00::2").into())
            );
        }
    }

    #[test]
    fn duplicate_address_detection_finds_the_other() {
        // Conformance V21: answered to ff02::1.
        let (outcome, out) = ask(
            &solicitation(Ipv6Addr::UNSPECIFIED, OWN, ip6("fd00::3"), None),
            answer,
        );
        assert_eq!(outcome, Outcome::Answered);
        assert_eq!(&out[..6], [0x33, 0x33, 0, 0, 0, 1]);
    }

    #[test]
    fn what_nobody_has_is_left_alone() {
        assert_eq!(
            ask(&arp([10, 0, 9, 2], [10, 0, 9, 4]), answer).0,
            Outcome::NotMine
        );
        for target in ["fd00::4", "fe80::ff:fe00:9", "fe80::1"] {
            assert_eq!(
                ask(
                    &solicitation(ip6("fd00::2"), OWN, ip6(target), Some(OWN)),
                    answer
                )
                .0,
                Outcome::NotMine
            );
        }
    }

    #[test]
    fn the_gateway_answers_echo_and_an_independent_reader_agrees() {
        let mut v4 = Vec::new();
        let builder = PacketBuilder::ethernet2(OWN.octets(), GATEWAY.octets());
        builder
            .ipv4([10, 0, 9, 2], [10, 0, 9, 1], 3)
            .icmpv4_echo_request(7, 9)
            .write(&mut v4, b"payload")
            .unwrap();
        let (outcome, out) = ask(&v4, answer_for_gateway);
        assert_eq!((outcome, out.len()), (Outcome::Answered, v4.len()));
        let sliced = SlicedPacket::from_ethernet(&out).unwrap();
        let Some(TransportSlice::Icmpv4(icmp)) = sliced.transport else {
            panic!("no ICMP")
        };
        assert_eq!(
            icmp.icmp_type(),
            etherparse::Icmpv4Type::EchoReply(etherparse::IcmpEchoHeader { id: 7, seq: 9 })
        );
        assert_eq!(
            (icmp.payload(), fold(sum(icmp.slice()))),
            (&b"payload"[..], 0xffff)
        );
        assert_eq!(fold(sum(&out[14..34])), 0xffff, "IPv4 header checksum");
        assert_eq!(&out[26..34], [10, 0, 9, 1, 10, 0, 9, 2]);

        let mut v6 = Vec::new();
        let builder = PacketBuilder::ethernet2(OWN.octets(), GATEWAY.octets());
        builder
            .ipv6(ip6("fd00::2").octets(), ip6("fd00::1").octets(), 3)
            .icmpv6_echo_request(7, 9)
            .write(&mut v6, b"payload")
            .unwrap();
        let (outcome, out) = ask(&v6, answer_for_gateway);
        assert_eq!((outcome, out.len()), (Outcome::Answered, v6.len()));
        let sliced = SlicedPacket::from_ethernet(&out).unwrap();
        let Some(TransportSlice::Icmpv6(icmp)) = sliced.transport else {
            panic!("no ICMPv6")
        };
        assert_eq!(
            icmp.icmp_type(),
            etherparse::Icmpv6Type::EchoReply(etherparse::IcmpEchoHeader { id: 7, seq: 9 })
        );
        assert!(icmp.is_checksum_valid(ip6("fd00::1").octets(), ip6("fd00::2").octets()));
    }

    fn echo(to: [u8; 4]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let builder = PacketBuilder::ethernet2(OWN.octets(), GATEWAY.octets());
        builder
            .ipv4([10, 0, 9, 2], to, 64)
            .icmpv4_echo_request(7, 9)
            .write(&mut bytes, b"x")
            .unwrap();
        bytes
    }

    #[test]
    fn a_services_address_answers_echo_as_itself() {
        let (outcome, out) = ask(&echo([10, 0, 9, 7]), answer_for_gateway);
        assert_eq!(outcome, Outcome::Answered);
        let frame = Frame::parse(&out).unwrap();
        assert_eq!((frame.destination(), frame.source()), (OWN, GATEWAY));
        assert_eq!(&out[26..34], [10, 0, 9, 7, 10, 0, 9, 2]);
    }

    #[test]
    fn the_gateway_takes_nothing_else() {
        assert_eq!(
            ask(&echo([10, 0, 9, 3]), answer_for_gateway).0,
            Outcome::Dropped(DropReason::ToGateway)
        );
        let mut wrong_checksum = echo([10, 0, 9, 1]);
        wrong_checksum[36] ^= 1;
        assert_eq!(
            ask(&wrong_checksum, answer_for_gateway).0,
            Outcome::Dropped(DropReason::Malformed)
        );
        let mut fragment = echo([10, 0, 9, 1]);
        fragment[20] = 0x20;
        assert_eq!(
            ask(&fragment, answer_for_gateway).0,
            Outcome::Dropped(DropReason::ToGateway)
        );
    }
}
