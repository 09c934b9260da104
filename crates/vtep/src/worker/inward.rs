//! What a frame from a remote still needs before a container can take it.
//!
//! A peer on a veth or virtio link leaves two kinds of work to a network card that never comes: checksums that hold only
//! the pseudo-header's sum, and TCP packets far larger than the MTU ("super-frames"). A port with a vnet header passes
//! that work on to the container's kernel; one without gets checksums completed here, and no super-frames.

use crate::edge::Offload;
use crate::ethernet::Frame;
use crate::ip::{Packet, protocol};
use crate::offload::checksum::{self, L4};
use crate::offload::fits;
use crate::stats::DropReason;
use crate::tap::Backend;

/// Says what the container's kernel is to do with `frame`; completes the checksum in place where it can't.
///
/// # Errors
/// [`DropReason::Oversize`] or [`DropReason::SuperFrame`] when the port can't take it.
pub(super) fn prepare(frame: &mut [u8], backend: Backend, mtu: u16) -> Result<Offload, DropReason> {
    let checksum = checksum::inspect(frame);
    let whole = fits(frame, mtu);
    match (checksum, backend) {
        (L4::Partial { start, offset }, Backend::Offload) => {
            let partial = Offload {
                flags: Offload::NEEDS_CSUM,
                csum_start: start,
                csum_offset: offset,
                ..Offload::default()
            };
            if whole {
                Ok(partial)
            } else {
                segments(frame, partial, mtu)
            }
        }
        (L4::Partial { .. }, Backend::Plain) if !whole => Err(DropReason::SuperFrame),
        _ if !whole => Err(DropReason::Oversize),
        (L4::Partial { start, offset }, Backend::Plain) => {
            let completed = checksum::complete(frame, start, offset);
            debug_assert!(
                completed,
                "the checksum's place was found in this very frame"
            );
            Ok(Offload::default())
        }
        // Verified here, so the container's kernel need not sum it again.
        (L4::Valid, Backend::Offload) => Ok(Offload {
            flags: Offload::DATA_VALID,
            ..Offload::default()
        }),
        // A wrong one is the container's to see, as it would be on a wire.
        (L4::None | L4::Valid | L4::Bad, _) => Ok(Offload::default()),
    }
}

/// Has the container's kernel take a super-frame as TCP segments that fit `mtu`.
fn segments(frame: &[u8], partial: Offload, mtu: u16) -> Result<Offload, DropReason> {
    let view = Frame::parse(frame).ok_or(DropReason::Malformed)?;
    let packet = Packet::parse(&view)
        .ok()
        .flatten()
        .ok_or(DropReason::Malformed)?;
    if packet.protocol != protocol::TCP {
        // Nobody merges UDP without being asked, so this is no super-frame but one too large.
        return Err(DropReason::Oversize);
    }
    // RFC 9293 §3.1: the data offset counts 32-bit words, at least five.
    let tcp_len = packet
        .body
        .get(12)
        .map_or(0, |byte| usize::from(byte >> 4) * 4);
    if tcp_len < 20 || tcp_len > packet.body.len() {
        return Err(DropReason::Malformed);
    }
    let ip_headers = packet.body_offset + tcp_len;
    let size = usize::from(mtu).saturating_sub(ip_headers);
    let (Ok(gso_size), Ok(hdr_len)) = (
        u16::try_from(size),
        u16::try_from(view.payload_offset() + ip_headers),
    ) else {
        return Err(DropReason::Malformed);
    };
    if gso_size == 0 {
        return Err(DropReason::SuperFrame);
    }
    // CWR must stay on the first segment only, which the ECN bit asks for (RFC 3168 §6.1.2).
    let congestion = if packet.body[13] & 0x80 == 0 {
        0
    } else {
        Offload::GSO_ECN
    };
    let family = if packet.source.is_ipv4() {
        Offload::GSO_TCPV4
    } else {
        Offload::GSO_TCPV6
    };
    Ok(Offload {
        gso_type: family | congestion,
        gso_size,
        hdr_len,
        ..partial
    })
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;
    use crate::ip::pseudo_header_sum;
    use crate::offload::checksum::{complete, fold, inspect};

    /// A TCP frame as a veth peer sends it: the checksum holds the pseudo-header's sum.
    fn partial(v6: bool, payload: usize) -> Vec<u8> {
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
            let mut frame = partial(v6, 100);
            let offload = prepare(&mut frame, Backend::Offload, 1450).unwrap();
            assert_eq!(
                (offload.flags, offload.csum_start, offload.csum_offset),
                (Offload::NEEDS_CSUM, start, 16)
            );
            assert_eq!(frame, partial(v6, 100));
            assert_eq!(
                prepare(&mut frame, Backend::Plain, 1450),
                Ok(Offload::default())
            );
            assert_eq!(frame, whole(v6, 100));
        }
    }

    #[test]
    fn a_super_frame_is_cut_by_the_container_kernel() {
        for (v6, gso_type, headers) in [
            (false, Offload::GSO_TCPV4, 40),
            (true, Offload::GSO_TCPV6, 60),
        ] {
            let mut frame = partial(v6, 60_000);
            let offload = prepare(&mut frame, Backend::Offload, 1450).unwrap();
            assert_eq!(offload.gso_type, gso_type);
            assert_eq!(offload.gso_size, 1450 - headers);
            assert_eq!(offload.hdr_len, 14 + headers);
            assert_eq!(
                prepare(&mut frame, Backend::Plain, 1450),
                Err(DropReason::SuperFrame)
            );
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
    fn lying_tcp_headers_are_no_super_frame() {
        // Conformance H6: a data offset beyond the packet, or below the least.
        for offset in [0x00, 0x40] {
            let mut frame = partial(false, 2000);
            frame[14 + 20 + 12] = offset;
            assert_eq!(
                prepare(&mut frame, Backend::Offload, 1450),
                Err(DropReason::Malformed),
                "{offset:#x}"
            );
        }
    }

    #[test]
    fn verified_checksums_are_said_to_be() {
        let mut frame = whole(true, 9);
        assert_eq!(
            prepare(&mut frame, Backend::Offload, 1450).unwrap().flags,
            Offload::DATA_VALID
        );
        frame[60] ^= 1;
        assert_eq!(
            prepare(&mut frame, Backend::Offload, 1450),
            Ok(Offload::default())
        );
        assert_eq!(inspect(&frame), L4::Bad);
        assert!(!complete(&mut frame, u16::MAX, 0));
    }
}
