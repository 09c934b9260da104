//! The Internet checksum (RFC 1071) of what a frame carries: told apart whole, partial or wrong, and completed.
//!
//! A kernel on a veth or virtio link does not compute the TCP and UDP checksums of what it sends: it leaves the sum of the
//! pseudo-header in the field for a card that never comes. Read from a UDP socket, such a frame looks broken, and TCP
//! through it never connects although ping works. [`inspect`] recognises it; the receiver then either passes the work on
//! (`NEEDS_CSUM`) or does it ([`complete`]).

mod sum;

use crate::ethernet::Frame;
use crate::ip::{Fragment, Packet, protocol, pseudo_header_sum};
pub use sum::{fold, sum};

/// The state of a frame's TCP or UDP checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L4 {
    /// There is none: another protocol, a fragment, UDP over IPv4 without one, or nothing that can be read.
    None,
    /// It is right.
    Valid,
    /// It holds only the pseudo-header's sum, and is to be completed.
    Partial {
        /// Where the sum's range starts, in bytes from the start of the frame.
        start: u16,
        /// Where the field is, in bytes from `start`.
        offset: u16,
    },
    /// It is wrong.
    Bad,
}

/// Looks at a frame's TCP or UDP checksum. One that is partial and right at once, as one in 65,535 is, counts as right.
#[must_use]
pub fn inspect(frame: &[u8]) -> L4 {
    let Some(field) = Field::find(frame) else {
        return L4::None;
    };
    if fold(field.pseudo + sum(field.body)) == 0xffff {
        L4::Valid
    } else if field.is_partial() {
        field.partial()
    } else {
        L4::Bad
    }
}

/// Looks at the checksum of a frame that is too large to have crossed a wire: [`inspect`], but what is partial and right at once counts
/// as partial, which is what a frame that waits to be cut has.
#[must_use]
pub fn inspect_super(frame: &[u8]) -> L4 {
    match Field::find(frame) {
        Some(field) if field.is_partial() => field.partial(),
        _ => inspect(frame),
    }
}

/// A TCP or UDP checksum, and what it is the sum of.
struct Field<'a> {
    pseudo: u64,
    body: &'a [u8],
    value: u16,
    start: u16,
    offset: u16,
}

impl<'a> Field<'a> {
    fn find(frame: &'a [u8]) -> Option<Self> {
        let frame = Frame::parse(frame)?;
        let packet = Packet::parse(&frame).ok()??;
        if packet.fragment != Fragment::Whole {
            return None;
        }
        let (offset, header_len) = match packet.protocol {
            protocol::TCP => (16, 20),
            protocol::UDP => (6, 8),
            _ => return None,
        };
        if packet.body.len() < header_len {
            return None;
        }
        let at = usize::from(offset);
        let value = u16::from_be_bytes([packet.body[at], packet.body[at + 1]]);
        if packet.protocol == protocol::UDP && value == 0 && packet.source.is_ipv4() {
            return None;
        }
        let pseudo = pseudo_header_sum(
            packet.source,
            packet.destination,
            packet.protocol,
            packet.body.len(),
        );
        let start = u16::try_from(frame.payload_offset() + packet.body_offset).ok()?;
        Some(Self {
            pseudo,
            body: packet.body,
            value,
            start,
            offset,
        })
    }

    fn is_partial(&self) -> bool {
        fold(self.pseudo) == self.value
    }

    const fn partial(&self) -> L4 {
        L4::Partial {
            start: self.start,
            offset: self.offset,
        }
    }
}

/// Completes a checksum whose field holds the pseudo-header's sum: sums from `start` to the end of what IP says is there,
/// and stores the result `offset` bytes behind `start`. Says whether the field lay inside the frame; if not, nothing changes.
#[must_use]
pub fn complete(frame: &mut [u8], start: u16, offset: u16) -> bool {
    let start = usize::from(start);
    let field = start + usize::from(offset);
    let end = ip_end(frame).unwrap_or(frame.len());
    if field + 2 > end {
        return false;
    }
    let checksum = match !fold(sum(&frame[start..end])) {
        // A computed zero is sent as all ones, since zero says "none" in UDP (RFC 768); TCP takes either.
        0 => 0xffff,
        checksum => checksum,
    };
    frame[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    true
}

/// Where the IP packet in a frame ends: an Ethernet frame may be padded behind it.
pub(crate) fn ip_end(frame: &[u8]) -> Option<usize> {
    let view = Frame::parse(frame)?;
    let packet = Packet::parse(&view).ok().flatten()?;
    Some(view.payload_offset() + packet.body_offset + packet.body.len())
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    fn frame(v6: bool, tcp: bool, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let builder = if v6 {
            builder.ipv6([0xfd; 16], [0xfe; 16], 64)
        } else {
            builder.ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
        };
        if tcp {
            builder.tcp(1, 2, 3, 4).write(&mut frame, payload).unwrap();
        } else {
            builder.udp(1, 2).write(&mut frame, payload).unwrap();
        }
        frame
    }

    /// Puts the pseudo-header's sum into the field, as a kernel on a veth does.
    fn make_partial(frame: &mut [u8]) -> (u16, u16) {
        let (sum, start, offset) = {
            let view = Frame::parse(frame).unwrap();
            let packet = Packet::parse(&view).unwrap().unwrap();
            let sum = fold(pseudo_header_sum(
                packet.source,
                packet.destination,
                packet.protocol,
                packet.body.len(),
            ));
            (
                sum,
                14 + packet.body_offset,
                if packet.protocol == protocol::TCP {
                    16
                } else {
                    6
                },
            )
        };
        frame[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
        (
            u16::try_from(start).unwrap(),
            u16::try_from(offset).unwrap(),
        )
    }

    #[test]
    fn udp_over_ipv4_may_have_none() {
        let mut frame = frame(false, false, b"x");
        frame[40..42].fill(0);
        assert_eq!(inspect(&frame), L4::None);
    }

    #[test]
    fn what_is_partial_and_right_at_once_is_told_by_its_size() {
        // A super-frame that were called right would be too large for no reason.
        for tcp in [false, true] {
            let mut bytes = frame(false, tcp, &[0, 0]);
            let (start, offset) = make_partial(&mut bytes);
            let field = usize::from(start + offset);
            let partial = u16::from_be_bytes([bytes[field], bytes[field + 1]]);
            let mut completed = bytes.clone();
            assert!(complete(&mut completed, start, offset));
            let sum = !u16::from_be_bytes([completed[field], completed[field + 1]]);
            // Brings the sum to where its complement is what stands in the field already.
            let balance = fold(u64::from(!sum) + u64::from(!partial));
            let len = bytes.len();
            bytes[len - 2..].copy_from_slice(&balance.to_be_bytes());
            assert_eq!(inspect(&bytes), L4::Valid);
            assert_eq!(inspect_super(&bytes), L4::Partial { start, offset });
            let mut completed = bytes.clone();
            assert!(complete(&mut completed, start, offset));
            assert_eq!(completed, bytes, "it is right, too");
        }
    }

    #[test]
    fn fragments_and_other_protocols_have_none() {
        let mut fragment = frame(false, true, b"x");
        fragment[20] = 0x20;
        assert_eq!(inspect(&fragment), L4::None);
        assert_eq!(inspect(&[0; 64]), L4::None);
        assert_eq!(inspect(&[]), L4::None);
    }

    #[test]
    fn a_checksum_of_zero_is_sent_as_all_ones() {
        // RFC 768: zero would say that there is none. The payload is what brings the sum to exactly that.
        let mut bytes = frame(false, false, &[0, 0]);
        let balance = bytes[40..42].to_owned();
        bytes[42..44].copy_from_slice(&balance);
        let (start, offset) = make_partial(&mut bytes);
        assert!(complete(&mut bytes, start, offset));
        assert_eq!(bytes[40..42], [0xff, 0xff]);
        assert_eq!(inspect(&bytes), L4::Valid);
    }

    #[test]
    fn completing_outside_the_frame_changes_nothing() {
        let mut frame = frame(false, true, b"x");
        let before = frame.clone();
        assert!(!complete(&mut frame, 60, 16));
        assert!(!complete(&mut frame, u16::MAX, u16::MAX));
        assert_eq!(frame, before);
    }

    proptest! {
        #[test]
        fn states_are_told_apart_and_partial_completes_to_valid(
            v6: bool, tcp: bool, payload in prop::collection::vec(any::<u8>(), 0..200), padding in 0..30_usize,
        ) {
            let mut bytes = frame(v6, tcp, &payload);
            bytes.extend(vec![0xa5; padding]);
            prop_assert_eq!(inspect(&bytes), L4::Valid);
            let (start, offset) = make_partial(&mut bytes);
            // A payload that sums to nothing makes the partial checksum a right one.
            if inspect(&bytes) != L4::Valid {
                prop_assert_eq!(inspect(&bytes), L4::Partial { start, offset });
            }
            prop_assert!(complete(&mut bytes, start, offset));
            prop_assert_eq!(inspect(&bytes), L4::Valid);
            bytes[usize::from(start + offset)] ^= 0x55;
            prop_assert_ne!(inspect(&bytes), L4::Valid);
        }
    }
}
