//! What a frame from a remote still needs before a container can take it.
//!
//! A peer on a veth or virtio link leaves two kinds of work to a network card that never comes: checksums that hold only
//! the pseudo-header's sum, and TCP packets far larger than the MTU ("super-frames"). A port with a vnet header passes
//! that work on to the container's kernel; for one without, it is done here.

use crate::edge::Offload;
use crate::offload::checksum::{self, L4};
use crate::offload::fits;
use crate::offload::segment::SuperFrame;
use crate::stats::DropReason;
use crate::tap::Backend;

/// How a container can take a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handover {
    /// As it is; its kernel does what is asked.
    Whole(Offload),
    /// Cut to segments by us.
    Cut,
}

/// Says how a port can take `frame`. Completes a partial checksum in place where the container's kernel can't.
///
/// # Errors
/// See [`SuperFrame::parse`]; also [`DropReason::Oversize`] for what is too large and has no partial checksum: it did not come
/// from a stack that counts on segmentation.
pub(super) fn prepare(
    frame: &mut [u8],
    backend: Backend,
    mtu: u16,
) -> Result<Handover, DropReason> {
    let checksum = checksum::inspect(frame);
    match (checksum, fits(frame, mtu), backend) {
        (L4::Partial { start, offset }, true, Backend::Offload) => {
            Ok(Handover::Whole(partial(start, offset)))
        }
        (L4::Partial { start, offset }, false, Backend::Offload) => {
            let super_frame = SuperFrame::parse(frame, mtu)?;
            Ok(Handover::Whole(super_frame.offload(partial(start, offset))))
        }
        (L4::Partial { start, offset }, true, Backend::Plain) => {
            let completed = checksum::complete(frame, start, offset);
            debug_assert!(completed, "its place was found in this very frame");
            Ok(Handover::Whole(Offload::default()))
        }
        (L4::Partial { .. }, false, Backend::Plain) => {
            SuperFrame::parse(frame, mtu)?;
            Ok(Handover::Cut)
        }
        (_, false, _) => Err(DropReason::Oversize),
        // Verified here, so the container's kernel need not sum it again.
        (L4::Valid, true, Backend::Offload) => {
            let flags = Offload::DATA_VALID;
            Ok(Handover::Whole(Offload {
                flags,
                ..Offload::default()
            }))
        }
        // A wrong one is the container's to see, as it would be on a wire.
        (L4::None | L4::Valid | L4::Bad, true, _) => Ok(Handover::Whole(Offload::default())),
    }
}

fn partial(start: u16, offset: u16) -> Offload {
    Offload {
        flags: Offload::NEEDS_CSUM,
        csum_start: start,
        csum_offset: offset,
        ..Offload::default()
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;
    use crate::ethernet::Frame;
    use crate::ip::{Packet, pseudo_header_sum};
    use crate::offload::checksum::fold;

    /// A TCP frame as a veth peer sends it: the checksum holds the pseudo-header's sum.
    fn partial_frame(v6: bool, payload: usize) -> Vec<u8> {
        let mut frame = whole(v6, payload);
        let view = Frame::parse(&frame).unwrap();
        let packet = Packet::parse(&view).unwrap().unwrap();
        let sum = pseudo_header_sum(
            packet.source,
            packet.destination,
            packet.protocol,
            packet.body.len(),
        );
        let field = view.payload_offset() + packet.body_offset + 16;
        frame[field..field + 2].copy_from_slice(&fold(sum).to_be_bytes());
        frame
    }

    fn whole(v6: bool, payload: usize) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let builder = if v6 {
            builder.ipv6([1; 16], [2; 16], 64)
        } else {
            builder.ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
        };
        let mut frame = Vec::new();
        builder
            .tcp(1, 2, 3, 4)
            .ack(5)
            .write(&mut frame, &vec![7; payload])
            .unwrap();
        frame
    }

    #[test]
    fn partial_checksums_are_passed_on_or_completed() {
        for (v6, start) in [(false, 34), (true, 54)] {
            let mut frame = partial_frame(v6, 100);
            let handover = prepare(&mut frame, Backend::Offload, 1450);
            assert_eq!(handover, Ok(Handover::Whole(partial(start, 16))));
            assert_eq!(frame, partial_frame(v6, 100));
            let handover = prepare(&mut frame, Backend::Plain, 1450);
            assert_eq!(handover, Ok(Handover::Whole(Offload::default())));
            assert_eq!(frame, whole(v6, 100));
        }
    }

    #[test]
    fn a_super_frame_is_cut_by_the_container_kernel_or_by_us() {
        for (v6, gso_type, headers) in [
            (false, Offload::GSO_TCPV4, 40),
            (true, Offload::GSO_TCPV6, 60),
        ] {
            let mut frame = partial_frame(v6, 60_000);
            let Ok(Handover::Whole(offload)) = prepare(&mut frame, Backend::Offload, 1450) else {
                panic!("it can be passed on");
            };
            assert_eq!(
                (offload.gso_type, offload.gso_size),
                (gso_type, 1450 - headers)
            );
            assert_eq!(
                (offload.flags, offload.csum_offset),
                (Offload::NEEDS_CSUM, 16)
            );
            assert_eq!(prepare(&mut frame, Backend::Plain, 1450), Ok(Handover::Cut));
            assert_eq!(frame, partial_frame(v6, 60_000));
        }
    }

    #[test]
    fn what_is_too_large_for_other_reasons_is_dropped() {
        let mut frame = whole(false, 1500);
        for backend in [Backend::Offload, Backend::Plain] {
            assert_eq!(
                prepare(&mut frame, backend, 1450),
                Err(DropReason::Oversize)
            );
        }
    }

    #[test]
    fn verified_checksums_are_said_to_be() {
        let mut frame = whole(true, 9);
        let valid = Offload {
            flags: Offload::DATA_VALID,
            ..Offload::default()
        };
        assert_eq!(
            prepare(&mut frame, Backend::Offload, 1450),
            Ok(Handover::Whole(valid))
        );
        frame[60] ^= 1;
        let unchecked = Ok(Handover::Whole(Offload::default()));
        assert_eq!(prepare(&mut frame, Backend::Offload, 1450), unchecked);
        assert_eq!(prepare(&mut frame, Backend::Plain, 1450), unchecked);
    }
}
