//! "Too big": what a container is told whose packet the path to its peer does not carry.
//!
//! It is told as a router on the way would (RFC 1191 §4, RFC 4443 §3.2), except that the error comes from the packet's own
//! destination: an overlay has no router that could send it. It is told whether or not DF is set, since nobody here fragments.

use std::net::{IpAddr, Ipv4Addr};

use crate::MacAddr;
use crate::ethernet::{Frame, HEADER_LEN};
use crate::icmp;
use crate::ip::{Fragment, Packet, protocol};

/// TTL and hop limit of the error.
const HOP_LIMIT: u8 = 64;
/// ICMP destination unreachable, and its code for fragmentation needed and DF set (RFC 792).
const UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
/// ICMPv6 packet too big (RFC 4443 §3.2).
const PACKET_TOO_BIG: u8 = 2;
/// How long the error may be as an IP packet: RFC 1812 §4.3.2.3 and RFC 4443 §2.4 (c).
const ERROR_V4_MAX: usize = 576;
const ERROR_V6_MAX: usize = 1280;

/// Appends the frame that tells the sender of `frame`, at `to`, that its way carries no more than `mtu` bytes of IP packet.
///
/// `quoted` is what did not fit, from its Ethernet header on: the frame itself, or, of a super-frame, the headers and the payload of
/// its first segment. Says whether there is anything to tell: not about what is not IP, has a tag, went to a group, is itself an
/// ICMP error, or is no datagram's start (RFC 1122 §3.2.2, RFC 4443 §2.4 (e)).
pub fn answer(frame: &[u8], quoted: [&[u8]; 2], mtu: u16, to: MacAddr, out: &mut Vec<u8>) -> bool {
    let Some(view) = Frame::parse(frame) else {
        return false;
    };
    let Ok(Some(packet)) = Packet::parse(&view) else {
        return false;
    };
    let group = view.destination().is_multicast();
    if view.is_tagged() || group || packet.fragment == Fragment::Later || is_error(&packet) {
        return false;
    }
    let mut header = [0; 8];
    let [first, second] = quoted;
    let first = first.get(HEADER_LEN..).unwrap_or_default();
    // RFC 1191 §4 has the MTU in the last two of its bytes, RFC 4443 §3.2 in all four.
    header[6..8].copy_from_slice(&mtu.to_be_bytes());
    let body = |room: usize| {
        let first = &first[..first.len().min(room)];
        (first, &second[..second.len().min(room - first.len())])
    };
    match (packet.source, packet.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination))
            if is_host(source) && is_host(destination) =>
        {
            header[1] = FRAGMENTATION_NEEDED;
            let (first, second) = body(ERROR_V4_MAX - 20 - header.len());
            icmp::emit_v4(
                (destination, view.destination()),
                (source, to),
                HOP_LIMIT,
                UNREACHABLE,
                &[&header, first, second],
                out,
            )
        }
        (IpAddr::V6(source), IpAddr::V6(destination))
            if !source.is_unspecified()
                && !source.is_multicast()
                && !destination.is_multicast() =>
        {
            let (first, second) = body(ERROR_V6_MAX - 40 - header.len());
            icmp::emit_v6(
                (destination, view.destination()),
                (source, to),
                HOP_LIMIT,
                PACKET_TOO_BIG,
                &[&header, first, second],
                out,
            )
        }
        _ => false,
    }
}

const fn is_host(ip: Ipv4Addr) -> bool {
    !(ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() || ip.is_loopback())
}

/// Whether a packet is an ICMP error or a redirect, of which nothing is ever told.
fn is_error(packet: &Packet<'_>) -> bool {
    match (packet.protocol, packet.body.first()) {
        // Unreachable, source quench, redirect, time exceeded, parameter problem (RFC 1122 §3.2.2).
        (protocol::ICMP, Some(kind)) => {
            packet.source.is_ipv4() && matches!(kind, 3 | 4 | 5 | 11 | 12)
        }
        (protocol::ICMPV6, Some(kind)) => packet.source.is_ipv6() && (*kind < 128 || *kind == 137),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{
        Icmpv4Type, Icmpv6Type, PacketBuilder, SlicedPacket, TransportSlice,
        icmpv4::DestUnreachableHeader,
    };

    use super::*;
    use crate::offload::checksum::{fold, sum};

    const OWN: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 1]);
    const OTHER: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 2]);

    fn v4(payload: usize) -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(OWN.octets(), OTHER.octets())
            .ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
            .udp(1, 2)
            .write(&mut frame, &vec![7; payload])
            .unwrap();
        frame
    }

    fn v6(payload: usize) -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(OWN.octets(), OTHER.octets())
            .ipv6([1; 16], [2; 16], 64)
            .udp(1, 2)
            .write(&mut frame, &vec![7; payload])
            .unwrap();
        frame
    }

    fn told(frame: &[u8], mtu: u16) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        answer(frame, [frame, &[]], mtu, OWN, &mut out).then_some(out)
    }

    #[test]
    fn ipv4_is_told_the_mtu_from_its_destination_whatever_df_says() {
        // Conformance V13; the reader is not ours.
        for dont_fragment in [false, true] {
            let mut frame = v4(1422);
            frame[20] = if dont_fragment { 0x40 } else { 0 };
            let out = told(&frame, 1350).unwrap();
            let sliced = SlicedPacket::from_ethernet(&out).unwrap();
            let Some(TransportSlice::Icmpv4(icmp)) = sliced.transport else {
                panic!("no ICMP")
            };
            let needed = DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1350 };
            assert_eq!(icmp.icmp_type(), Icmpv4Type::DestinationUnreachable(needed));
            assert_eq!(fold(sum(icmp.slice())), 0xffff);
            assert_eq!(fold(sum(&out[14..34])), 0xffff, "IPv4 header checksum");
            assert_eq!(
                (&out[..6], &out[6..12]),
                (&OWN.octets()[..], &OTHER.octets()[..])
            );
            assert_eq!(out[26..34], [10, 0, 9, 3, 10, 0, 9, 2]);
            assert_eq!(out.len(), 14 + 576);
            assert_eq!(icmp.payload(), &frame[14..14 + 548]);
        }
    }

    #[test]
    fn ipv6_is_told_packet_too_big() {
        // Conformance V13.
        let frame = v6(1402);
        let out = told(&frame, 1330).unwrap();
        let sliced = SlicedPacket::from_ethernet(&out).unwrap();
        let Some(TransportSlice::Icmpv6(icmp)) = sliced.transport else {
            panic!("no ICMPv6")
        };
        assert_eq!(icmp.icmp_type(), Icmpv6Type::PacketTooBig { mtu: 1330 });
        assert!(icmp.is_checksum_valid([2; 16], [1; 16]));
        assert_eq!(out.len(), 14 + 1280);
        assert_eq!(icmp.payload(), &frame[14..14 + 1280 - 48]);
    }

    #[test]
    fn a_segment_is_quoted_from_two_parts() {
        let frame = v4(100);
        let (headers, payload) = frame.split_at(14 + 28);
        let mut out = Vec::new();
        assert!(answer(&frame, [headers, payload], 600, OWN, &mut out));
        assert_eq!(&out[14 + 28..], &frame[14..]);
        let long = vec![7; 2000];
        out.clear();
        assert!(answer(&frame, [headers, &long], 600, OWN, &mut out));
        assert_eq!(out.len(), 14 + 576);
    }

    #[test]
    fn what_must_not_be_answered_is_not() {
        let mut error = Vec::new();
        PacketBuilder::ethernet2(OWN.octets(), OTHER.octets())
            .ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
            .icmpv4(Icmpv4Type::DestinationUnreachable(
                DestUnreachableHeader::Port,
            ))
            .write(&mut error, &[0; 1400])
            .unwrap();
        let mut error6 = Vec::new();
        PacketBuilder::ethernet2(OWN.octets(), OTHER.octets())
            .ipv6([1; 16], [2; 16], 64)
            .icmpv6(Icmpv6Type::PacketTooBig { mtu: 1300 })
            .write(&mut error6, &[0; 1200])
            .unwrap();
        let mut later = v4(1422);
        later[21] = 100;
        let mut to_a_group = v4(1422);
        to_a_group[0] = 1;
        let mut group_address = v4(1422);
        group_address[30] = 224;
        let mut no_ip = v4(1422);
        no_ip[12] = 0x99;
        let mut tagged = v4(1422);
        tagged.splice(12..12, [0x81, 0, 0, 5]);
        for (what, frame) in [
            ("an ICMP error", error),
            ("an ICMPv6 error", error6),
            ("a later fragment", later),
            ("to a group's MAC", to_a_group),
            ("to a group", group_address),
            ("no IP", no_ip),
            ("tagged", tagged),
            ("cut off", v4(1422)[..20].to_vec()),
        ] {
            assert_eq!(told(&frame, 1350), None, "{what}");
        }
        // An echo request is no error, and a first fragment is a start.
        let mut first = v4(1422);
        first[20] = 0x20;
        assert!(told(&first, 1350).is_some());
    }
}
