//! One captured frame or datagram as one line for people.
//!
//! ```text
//! 19:31:05.123456Z blue from c1 10.0.9.2 > 10.0.9.3 ICMP echo request, 98 B: send to h2 (192.0.2.2:4789)
//! ```

use std::net::IpAddr;

use etherparse::{
    ArpOperation, Icmpv4Type, Icmpv6Type, IpNumber, NetSlice, SlicedPacket, TransportSlice,
};
use vtep::MacAddr;

use crate::api::capture::{Place, Seen};

/// The whole line, without its end. Times are UTC.
pub(super) fn line(seen: &Seen, bytes: &[u8]) -> String {
    let mut parts = vec![time(seen.time_ns)];
    parts.push(seen.network.clone().unwrap_or_else(|| "-".to_owned()));
    let direction = match seen.place {
        Place::FromPort | Place::FromRemote => "from",
        Place::ToPort | Place::ToRemote => "to",
    };
    parts.push(format!("{direction} {}", seen.peer));
    if seen.place.is_outer() {
        parts.push(match seen.vni {
            Some(vni) => format!("[{} vni {vni}]", outer(bytes)),
            None => format!("[{}]", outer(bytes)),
        });
    }
    if let Some(frame) = seen.frame_at.and_then(|at| bytes.get(at..)) {
        parts.push(frame_summary(frame));
    }
    format!("{}, {} B: {}", parts.join(" "), seen.length, seen.verdict)
}

/// The time of day.
fn time(ns: u64) -> String {
    let (seconds, micros) = (ns / 1_000_000_000, ns / 1_000 % 1_000_000);
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}.{micros:06}Z", seconds % 60)
}

/// Addresses and ports of an outer packet.
fn outer(packet: &[u8]) -> String {
    let Ok(sliced) = SlicedPacket::from_ip(packet) else {
        return "?".to_owned();
    };
    let ports = match &sliced.transport {
        Some(TransportSlice::Udp(udp)) => Some((udp.source_port(), udp.destination_port())),
        _ => None,
    };
    match (addresses(&sliced), ports) {
        (Some((from, to)), Some(ports)) => format!(
            "{} > {}",
            std::net::SocketAddr::new(from, ports.0),
            std::net::SocketAddr::new(to, ports.1)
        ),
        (Some((from, to)), None) => format!("{from} > {to}"),
        (None, _) => "?".to_owned(),
    }
}

/// Who to whom, and what, of an inner frame. MACs only where there is nothing better.
fn frame_summary(frame: &[u8]) -> String {
    let mac = |at: usize| {
        let octets: Option<[u8; 6]> = frame.get(at..at + 6)?.try_into().ok();
        octets.map(|octets| MacAddr::new(octets).to_string())
    };
    let (Some(to), Some(from)) = (mac(0), mac(6)) else {
        return "no whole frame".to_owned();
    };
    // A frame that was dropped as malformed is described as far as it goes.
    let Ok(sliced) = SlicedPacket::from_ethernet(frame) else {
        return format!("{from} > {to} malformed");
    };
    if let Some(NetSlice::Arp(arp)) = &sliced.net {
        return format!("{from} > {to} {}", arp_summary(arp));
    }
    let Some((source, destination)) = addresses(&sliced) else {
        let ethertype = frame.get(12..14).unwrap_or(&[0; 2]);
        let ethertype = u16::from_be_bytes([ethertype[0], ethertype[1]]);
        return format!("{from} > {to} ethertype {ethertype:#06x}");
    };
    let protocol = match &sliced.transport {
        Some(TransportSlice::Udp(udp)) => {
            format!("UDP {} > {}", udp.source_port(), udp.destination_port())
        }
        Some(TransportSlice::Tcp(tcp)) => {
            let flags = [
                (tcp.syn(), 'S'),
                (tcp.fin(), 'F'),
                (tcp.rst(), 'R'),
                (tcp.psh(), 'P'),
                (tcp.ack(), '.'),
            ];
            let flags: String = flags
                .iter()
                .filter_map(|(set, letter)| set.then_some(*letter))
                .collect();
            format!(
                "TCP {} > {} [{flags}]",
                tcp.source_port(),
                tcp.destination_port()
            )
        }
        Some(TransportSlice::Icmpv4(icmp)) => format!("ICMP {}", icmpv4(&icmp.icmp_type())),
        Some(TransportSlice::Icmpv6(icmp)) => {
            format!("ICMPv6 {}", icmpv6(&icmp.icmp_type(), icmp.type_u8()))
        }
        Some(TransportSlice::Igmp(_)) => "IGMP".to_owned(),
        None => match ip_protocol(&sliced) {
            Some(protocol) => format!("IP protocol {}", protocol.0),
            None => "IP".to_owned(),
        },
    };
    format!("{source} > {destination} {protocol}")
}

fn addresses(sliced: &SlicedPacket<'_>) -> Option<(IpAddr, IpAddr)> {
    match sliced.net.as_ref()? {
        NetSlice::Ipv4(ip) => Some((
            ip.header().source_addr().into(),
            ip.header().destination_addr().into(),
        )),
        NetSlice::Ipv6(ip) => Some((
            ip.header().source_addr().into(),
            ip.header().destination_addr().into(),
        )),
        NetSlice::Arp(_) => None,
    }
}

fn ip_protocol(sliced: &SlicedPacket<'_>) -> Option<IpNumber> {
    match sliced.net.as_ref()? {
        NetSlice::Ipv4(ip) => Some(ip.payload().ip_number),
        NetSlice::Ipv6(ip) => Some(ip.payload().ip_number),
        NetSlice::Arp(_) => None,
    }
}

fn arp_summary(arp: &etherparse::ArpPacketSlice<'_>) -> String {
    let address = |bytes: &[u8]| match <[u8; 4]>::try_from(bytes) {
        Ok(octets) => IpAddr::from(octets).to_string(),
        Err(_) => "?".to_owned(),
    };
    let (sender, target) = (
        address(arp.sender_protocol_addr()),
        address(arp.target_protocol_addr()),
    );
    match arp.operation() {
        ArpOperation::REQUEST => format!("ARP who has {target}, tell {sender}"),
        ArpOperation::REPLY => format!("ARP {sender} is here"),
        other => format!("ARP operation {}", other.0),
    }
}

fn icmpv4(kind: &Icmpv4Type) -> String {
    match kind {
        Icmpv4Type::EchoRequest(echo) => format!("echo request {}", echo.seq),
        Icmpv4Type::EchoReply(echo) => format!("echo reply {}", echo.seq),
        Icmpv4Type::DestinationUnreachable(_) => "unreachable".to_owned(),
        Icmpv4Type::TimeExceeded(_) => "time exceeded".to_owned(),
        _ => "of another type".to_owned(),
    }
}

fn icmpv6(kind: &Icmpv6Type, number: u8) -> String {
    match kind {
        Icmpv6Type::EchoRequest(echo) => format!("echo request {}", echo.seq),
        Icmpv6Type::EchoReply(echo) => format!("echo reply {}", echo.seq),
        Icmpv6Type::DestinationUnreachable(_) => "unreachable".to_owned(),
        Icmpv6Type::PacketTooBig { mtu } => format!("too big, MTU {mtu}"),
        Icmpv6Type::TimeExceeded(_) => "time exceeded".to_owned(),
        // RFC 2710 §3.1, RFC 3810 §5.2, RFC 4861 §4.
        _ => match number {
            130 => "listener query".to_owned(),
            131 | 143 => "listener report".to_owned(),
            132 => "listener done".to_owned(),
            133 => "router solicitation".to_owned(),
            134 => "router advertisement".to_owned(),
            135 => "neighbor solicitation".to_owned(),
            136 => "neighbor advertisement".to_owned(),
            _ => format!("type {number}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    fn seen(place: Place, length: usize) -> Seen {
        Seen {
            time_ns: (23 * 3600 + 59 * 60 + 58) * 1_000_000_000 + 123_456_789,
            place,
            interface: "blue/c1".into(),
            peer: "c1".into(),
            network: Some("blue".into()),
            vni: Some(4096),
            verdict: "drop guard-ip: why".into(),
            reason: Some("guard-ip".into()),
            frame_at: Some(0),
            length,
        }
    }

    fn echo() -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
            .ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
            .icmpv4_echo_request(7, 3)
            .write(&mut frame, &[0; 56])
            .expect("a vector takes all");
        frame
    }

    #[test]
    fn a_frame_is_one_line() {
        assert_eq!(
            line(&seen(Place::FromPort, 98), &echo()),
            "23:59:58.123456Z blue from c1 10.0.9.2 > 10.0.9.3 ICMP echo request 3, 98 B: drop guard-ip: why"
        );
    }

    #[test]
    fn a_datagram_shows_both_layers() {
        let payload = [&[8, 0, 0, 0, 0, 16, 0, 0][..], &echo()].concat();
        let mut packet = Vec::new();
        PacketBuilder::ipv4([192, 0, 2, 1], [192, 0, 2, 2], 64)
            .udp(50_000, 4789)
            .write(&mut packet, &payload)
            .expect("a vector takes all");
        let seen = Seen {
            peer: "h2".into(),
            frame_at: Some(36),
            verdict: "sent".into(),
            ..seen(Place::ToRemote, packet.len())
        };
        assert_eq!(
            line(&seen, &packet),
            "23:59:58.123456Z blue to h2 [192.0.2.1:50000 > 192.0.2.2:4789 vni 4096] \
             10.0.9.2 > 10.0.9.3 ICMP echo request 3, 134 B: sent"
        );
    }

    #[test]
    fn any_bytes_are_one_line() {
        let frame = echo();
        for end in 0..frame.len() {
            for place in [Place::ToPort, Place::FromRemote] {
                let text = line(&seen(place, end), &frame[..end]);
                assert!(!text.contains('\n') && text.starts_with("23:59:58"));
            }
        }
        let mut lldp = [0; 60];
        lldp[12..14].copy_from_slice(&[0x88, 0xcc]);
        assert!(frame_summary(&lldp).ends_with("ethertype 0x88cc"));
    }
}
