//! Explicit congestion notification through a tunnel (RFC 6040), so that neither end of it loses a mark.
//!
//! Normal mode: the outer header gets a copy of the inner field ([`of_frame`]); on the way out the two are combined
//! ([`decapsulate`]) as RFC 6040 §4.2 says:
//!
//! ```text
//!                  outer  Not-ECT   ECT(0)    ECT(1)    CE
//! inner  Not-ECT          Not-ECT   Not-ECT   Not-ECT   drop
//!        ECT(0)           ECT(0)    ECT(0)    ECT(1)    CE
//!        ECT(1)           ECT(1)    ECT(1)    ECT(1)    CE
//!        CE               CE        CE        CE        CE
//! ```
//!
//! A frame without IP has no field: it travels as Not-ECT and ignores what the path says.

use crate::ethernet::{self, Frame};
use crate::offload::checksum::fold;
use crate::stats::DropReason;

const NOT_ECT: u8 = 0b00;
const ECT_1: u8 = 0b01;
const CE: u8 = 0b11;

/// The ECN field of the packet in a frame, 0 to 3; 0 when there is none.
#[inline]
#[must_use]
pub fn of_frame(frame: &[u8]) -> u8 {
    Frame::parse(frame).map_or(NOT_ECT, |frame| of_packet(&frame))
}

/// Brings what the outer header said into the packet in a frame, and its header's checksum with it.
///
/// # Errors
/// [`DropReason::CongestionMark`] when a packet was marked that cannot say so.
#[inline]
pub fn decapsulate(frame: &mut [u8], outer: u8) -> Result<(), DropReason> {
    // Only these two outer values can change anything.
    if outer != CE && outer != ECT_1 {
        return Ok(());
    }
    let Some(view) = Frame::parse(frame) else {
        return Ok(());
    };
    let (inner, ethertype, at) = (of_packet(&view), view.ethertype(), view.payload_offset());
    let combined = match (inner, outer) {
        (NOT_ECT, CE) if has_field(&view) => return Err(DropReason::CongestionMark),
        (NOT_ECT | CE, _) => return Ok(()),
        (_, combined) => combined,
    };
    match ethertype {
        ethernet::TYPE_IPV4 => {
            let Some(header) = frame.get_mut(at..at + 20) else {
                return Ok(());
            };
            let word = |header: &[u8], at: usize| {
                u64::from(u16::from_be_bytes([header[at], header[at + 1]]))
            };
            let (checksum, before) = (word(header, 10), word(header, 0));
            header[1] = header[1] & !CE | combined;
            // RFC 1624 equation 3: a header that was damaged on the way stays visibly so.
            let checksum = !fold((checksum ^ 0xffff) + (before ^ 0xffff) + word(header, 0));
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        // The traffic class lies across the first two bytes; its low two bits are bits 4 and 5 of the second.
        _ => frame[at + 1] = frame[at + 1] & !(CE << 4) | combined << 4,
    }
    Ok(())
}

fn of_packet(frame: &Frame<'_>) -> u8 {
    match (frame.ethertype(), frame.payload()) {
        (ethernet::TYPE_IPV4, [_, tos, ..]) => tos & CE,
        (ethernet::TYPE_IPV6, [_, low, ..]) => low >> 4 & CE,
        _ => NOT_ECT,
    }
}

fn has_field(frame: &Frame<'_>) -> bool {
    matches!(frame.ethertype(), ethernet::TYPE_IPV4 | ethernet::TYPE_IPV6)
        && frame.payload().len() >= 2
}

#[cfg(test)]
mod tests {
    use etherparse::{IpEcn, Ipv4Header, Ipv6Header, PacketBuilder};

    use super::*;

    fn frame(v6: bool, ecn: u8) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let builder = if v6 {
            let traffic_class = 0xa8 | ecn;
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
            header.ecn = IpEcn::try_new(ecn).unwrap();
            header.dscp = 42.try_into().unwrap();
            builder.ip(etherparse::IpHeaders::Ipv4(header, Default::default()))
        };
        let mut frame = Vec::new();
        builder.udp(1, 2).write(&mut frame, b"x").unwrap();
        frame
    }

    #[test]
    fn encapsulation_copies_the_field() {
        // Conformance V20.
        for ecn in 0..4 {
            assert_eq!(
                (of_frame(&frame(false, ecn)), of_frame(&frame(true, ecn))),
                (ecn, ecn)
            );
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
                    let mut bytes = frame(v6, inner);
                    let result = decapsulate(&mut bytes, outer);
                    match expected {
                        // The whole frame is as if it had been sent with that field, checksum and DSCP included.
                        Some(ecn) => assert_eq!(
                            (result, &bytes),
                            (Ok(()), &frame(v6, ecn)),
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
    fn what_has_no_field_ignores_the_path() {
        for mut bytes in [
            vec![2; 60],
            vec![2; 3],
            [&[2; 12][..], &[0x08, 0x00]].concat(),
        ] {
            let before = bytes.clone();
            assert_eq!((decapsulate(&mut bytes, CE), &bytes), (Ok(()), &before));
        }
        // A header that is cut off.
        let mut bytes = frame(false, 2);
        bytes.truncate(14 + 19);
        let before = bytes.clone();
        assert_eq!((decapsulate(&mut bytes, CE), bytes), (Ok(()), before));
    }
}
