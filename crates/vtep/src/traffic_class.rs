//! The traffic class through a tunnel: congestion marks (ECN, RFC 6040) that neither end of it loses, and DSCP (RFC 2983).
//!
//! ```text
//! IPv4's TOS, IPv6's traffic class   | DSCP 6 bits | ECN 2 bits |
//! ```
//!
//! ECN, normal mode: the outer header gets a copy of the inner field ([`crate::settings::WireSettings::outer`]); on the way out the
//! two are combined ([`decapsulate`]) as RFC 6040 §4.2 says:
//!
//! ```text
//!                  outer  Not-ECT   ECT(0)    ECT(1)    CE
//! inner  Not-ECT          Not-ECT   Not-ECT   Not-ECT   drop
//!        ECT(0)           ECT(0)    ECT(0)    ECT(1)    CE
//!        ECT(1)           ECT(1)    ECT(1)    ECT(1)    CE
//!        CE               CE        CE        CE        CE
//! ```
//!
//! DSCP: the inner field stays as it is, unless the network is uniform: then it becomes the outer one.
//!
//! A frame without IP has no traffic class: it travels as 0 and ignores what the path says.

use crate::ethernet::{self, Frame};
use crate::offload::checksum::fold;
use crate::settings::Dscp;
use crate::stats::DropReason;

/// The ECN field's bits.
pub const ECN: u8 = 0b11;

const NOT_ECT: u8 = 0b00;
const ECT_1: u8 = 0b01;
const CE: u8 = 0b11;

/// The traffic class of the packet in a frame; 0 when there is none.
#[inline]
#[must_use]
pub fn of_frame(frame: &[u8]) -> u8 {
    Frame::parse(frame)
        .and_then(|frame| of_packet(&frame))
        .unwrap_or(0)
}

/// Brings what the outer header said into the packet in a frame, and its header's checksum with it. `dscp` is the network's.
///
/// # Errors
/// [`DropReason::CongestionMark`] when a packet was marked that cannot say so.
#[inline]
pub fn decapsulate(frame: &mut [u8], outer: u8, dscp: Dscp) -> Result<(), DropReason> {
    let mark = outer & ECN;
    // Nothing else can change anything.
    if mark != CE && mark != ECT_1 && !dscp.is_uniform() {
        return Ok(());
    }
    let Some(view) = Frame::parse(frame) else {
        return Ok(());
    };
    let Some(inner) = of_packet(&view) else {
        return Ok(());
    };
    let ecn = match (inner & ECN, mark) {
        (NOT_ECT, CE) => return Err(DropReason::CongestionMark),
        (ecn @ (NOT_ECT | CE), _) => ecn,
        (_, CE | ECT_1) => mark,
        (ecn, _) => ecn,
    };
    let rest = if dscp.is_uniform() { outer } else { inner };
    let class = rest & !ECN | ecn;
    if class != inner {
        let (ethertype, at) = (view.ethertype(), view.payload_offset());
        set(&mut frame[at..], ethertype, class);
    }
    Ok(())
}

/// The traffic class of the packet in a frame; `None` when there is none, or not enough of it.
fn of_packet(frame: &Frame<'_>) -> Option<u8> {
    match (frame.ethertype(), frame.payload()) {
        (ethernet::TYPE_IPV4, [_, tos, ..]) => Some(*tos),
        // It lies across the first two bytes.
        (ethernet::TYPE_IPV6, [high, low, ..]) => Some(high << 4 | low >> 4),
        _ => None,
    }
}

/// Writes the traffic class of a packet of which [`of_packet`] has found one. An IPv4 header that is cut off stays as it is.
fn set(packet: &mut [u8], ethertype: u16, class: u8) {
    if ethertype == ethernet::TYPE_IPV6 {
        packet[0] = packet[0] & 0xf0 | class >> 4;
        packet[1] = packet[1] & 0x0f | class << 4;
        return;
    }
    let Some(header) = packet.get_mut(..20) else {
        return;
    };
    let word =
        |header: &[u8], at: usize| u64::from(u16::from_be_bytes([header[at], header[at + 1]]));
    let (checksum, before) = (word(header, 10), word(header, 0));
    header[1] = class;
    // RFC 1624 equation 3: a header that was damaged on the way stays visibly so.
    let checksum = !fold((checksum ^ 0xffff) + (before ^ 0xffff) + word(header, 0));
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use etherparse::{IpEcn, Ipv4Header, Ipv6Header, PacketBuilder};

    use super::*;

    /// A DSCP, as it stands in the traffic class.
    const AF41: u8 = 34 << 2;

    fn frame(v6: bool, traffic_class: u8) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let builder = if v6 {
            builder.ip(etherparse::IpHeaders::Ipv6(
                Ipv6Header {
                    traffic_class,
                    hop_limit: 64,
                    source: [1; 16],
                    destination: [2; 16],
                    ..Default::default()
                },
                Default::default(),
            ))
        } else {
            let mut header = Ipv4Header::new(
                0,
                64,
                etherparse::IpNumber::UDP,
                [10, 0, 9, 2],
                [10, 0, 9, 3],
            )
            .unwrap();
            header.ecn = IpEcn::try_new(traffic_class & ECN).unwrap();
            header.dscp = (traffic_class >> 2).try_into().unwrap();
            builder.ip(etherparse::IpHeaders::Ipv4(header, Default::default()))
        };
        let mut frame = Vec::new();
        builder.udp(1, 2).write(&mut frame, b"x").unwrap();
        frame
    }

    #[test]
    fn encapsulation_copies_the_mark_and_sets_the_dscp() {
        // Conformance V20 and V19.
        for (dscp, expected) in [
            (Dscp::default(), 0),
            (Dscp::fixed(46).unwrap(), 46 << 2),
            (Dscp::UNIFORM, AF41),
        ] {
            for (v6, ecn) in [false, true].into_iter().zip(0..4).cycle().take(8) {
                let inner = of_frame(&frame(v6, AF41 | ecn));
                assert_eq!(inner, AF41 | ecn);
                assert_eq!(dscp.outer_class(inner), expected | ecn, "{dscp}");
            }
        }
        assert_eq!(of_frame(&[0xff; 60]), 0);
        assert_eq!(of_frame(&[]), 0);
    }

    #[test]
    fn decapsulation_has_all_sixteen_combinations() {
        // Conformance V20: rows are the inner field, columns the outer; `None` is a drop.
        let table = [
            [Some(0), Some(0), Some(0), None],
            [Some(1), Some(1), Some(1), Some(3)],
            [Some(2), Some(1), Some(2), Some(3)],
            [Some(3), Some(3), Some(3), Some(3)],
        ];
        for v6 in [false, true] {
            for (inner, row) in (0..).zip(table) {
                for (outer, expected) in (0..).zip(row) {
                    let mut bytes = frame(v6, AF41 | inner);
                    let result = decapsulate(&mut bytes, 46 << 2 | outer, Dscp::default());
                    match expected {
                        // The whole frame is as if it had been sent with that field, checksum and DSCP included.
                        Some(ecn) => assert_eq!(
                            (result, &bytes),
                            (Ok(()), &frame(v6, AF41 | ecn)),
                            "{inner} in {outer}"
                        ),
                        None => assert_eq!(
                            result,
                            Err(DropReason::CongestionMark),
                            "{inner} in {outer}"
                        ),
                    }
                }
            }
        }
    }

    #[test]
    fn a_uniform_network_takes_the_dscp_that_the_path_gave() {
        // Conformance V19, RFC 2983 §3.1; ECN as ever.
        for v6 in [false, true] {
            for (outer, expected) in [
                (46 << 2 | 2, 46 << 2 | 2),
                (0, 2),
                (AF41 | CE, AF41 | CE),
                (0xff, 0xff),
            ] {
                let mut bytes = frame(v6, AF41 | 2);
                assert_eq!(decapsulate(&mut bytes, outer, Dscp::UNIFORM), Ok(()));
                assert_eq!(bytes, frame(v6, expected), "{outer:#x}");
            }
            let mut bytes = frame(v6, AF41);
            let marked = decapsulate(&mut bytes, CE, Dscp::UNIFORM);
            assert_eq!(marked, Err(DropReason::CongestionMark));
        }
        // Behind a tag, too.
        let (mut bytes, mut expected) = (frame(false, 0), frame(false, AF41));
        for bytes in [&mut bytes, &mut expected] {
            bytes.splice(12..12, [0x81, 0, 0, 5]);
        }
        assert_eq!(decapsulate(&mut bytes, AF41, Dscp::UNIFORM), Ok(()));
        assert_eq!(bytes, expected);
    }

    #[test]
    fn what_has_no_field_ignores_the_path() {
        for bytes in [
            vec![2; 60],
            vec![2; 3],
            [&[2; 12][..], &[0x08, 0x00]].concat(),
            [&[2; 12][..], &[0x86, 0xdd, 0x60]].concat(),
        ] {
            for (outer, dscp) in [(CE, Dscp::default()), (0xff, Dscp::UNIFORM)] {
                let mut seen = bytes.clone();
                assert_eq!(decapsulate(&mut seen, outer, dscp), Ok(()));
                assert_eq!(seen, bytes);
            }
        }
        // A header that is cut off.
        let mut bytes = frame(false, 2);
        bytes.truncate(14 + 19);
        let before = bytes.clone();
        let result = decapsulate(&mut bytes, 0xff, Dscp::UNIFORM);
        assert_eq!((result, bytes), (Ok(()), before));
    }
}
