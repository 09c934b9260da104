//! Answers for neighbours and for the gateway, made from the tables where the question enters the overlay.
//!
//! A question for a known address never crosses the underlay. It is answered as its owner would, except to the owner itself:
//! its probes, its duplicate address detection and its announcements must find nobody else. What the tables do not know
//! is left to the engine, which treats it as any other frame.

use std::net::IpAddr;

use etherparse::{IpNumber, Ipv4Header};

use crate::MacAddr;
use crate::arp::Arp;
use crate::ethernet;
use crate::fdb::{Network, Port};
use crate::guard::{Contents, is_own};
use crate::ip::{Fragment, Packet, link_local, protocol};
use crate::nd::{self, Message};
use crate::offload::checksum::{fold, sum};
use crate::stats::DropReason;

/// TTL and hop limit of an echo reply.
const HOP_LIMIT: u8 = 64;

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

/// Answers an echo request for one of the gateway's addresses, into the empty `out`; drops all else that is for the gateway.
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
    if packet.fragment != Fragment::Whole || !config.gateway_ips.contains(&packet.destination) {
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
            let Ok(len) = u16::try_from(packet.body.len()) else {
                return NOT_FOR_ME;
            };
            let Ok(mut header) = Ipv4Header::new(
                len,
                HOP_LIMIT,
                IpNumber::ICMP,
                gateway.octets(),
                source.octets(),
            ) else {
                return NOT_FOR_ME;
            };
            header.header_checksum = header.calc_header_checksum();
            out.extend_from_slice(&ethernet::emit(
                port.mac,
                config.gateway_mac,
                ethernet::TYPE_IPV4,
            ));
            out.extend_from_slice(&header.to_bytes());
            let at = out.len();
            out.extend_from_slice(packet.body);
            let body = &mut out[at..];
            body[0] = 0;
            body[2..4].fill(0);
            let checksum = !fold(sum(body));
            body[2..4].copy_from_slice(&checksum.to_be_bytes());
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

/// Whose an address is: the gateway's, an endpoint's, or, for a link-local address, that of the endpoint whose MAC it follows from.
fn mac_of(network: &Network, ip: IpAddr) -> Option<MacAddr> {
    if network.config().gateway_ips.contains(&ip) {
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
