//! Pure functions over frames for what a network card would do: checksums, and the checks of what a container asks for.

pub mod checksum;
pub mod coalesce;
pub mod segment;

use crate::edge::Offload;
use crate::ethernet::{Frame, HEADER_LEN};
use crate::stats::DropReason;

/// Checks what a container's kernel (or the container itself, through a packet socket) says about a frame.
///
/// A checksum must lie inside the frame and behind its Ethernet header. A frame that is not to be cut must fit the port's
/// `mtu`; one that is must have a size to be cut to that fits.
///
/// # Errors
/// [`DropReason::BadOffload`] or [`DropReason::Oversize`].
pub fn check(frame: &[u8], offload: &Offload, mtu: u16) -> Result<(), DropReason> {
    if offload.needs_checksum() {
        let start = usize::from(offload.csum_start);
        let field_end = start + usize::from(offload.csum_offset) + 2;
        if start < HEADER_LEN || field_end > frame.len() {
            return Err(DropReason::BadOffload);
        }
    }
    if offload.is_gso() {
        let known = matches!(
            offload.gso_type & !Offload::GSO_ECN,
            Offload::GSO_TCPV4 | Offload::GSO_TCPV6 | Offload::GSO_UDP_L4
        );
        if !known || offload.gso_size == 0 || offload.gso_size > mtu || !offload.needs_checksum() {
            return Err(DropReason::BadOffload);
        }
        return Ok(());
    }
    if fits(frame, mtu) {
        Ok(())
    } else {
        Err(DropReason::Oversize)
    }
}

/// Whether what follows the Ethernet header and its tags fits `mtu` bytes.
#[must_use]
pub fn fits(frame: &[u8], mtu: u16) -> bool {
    let most = usize::from(mtu);
    // The common case needs no look at the tags.
    frame.len() <= HEADER_LEN + most
        || Frame::parse(frame).is_some_and(|frame| frame.payload().len() <= most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_vnet_headers_are_refused() {
        // Conformance H7.
        let frame = [0; 1464];
        let partial = Offload {
            flags: Offload::NEEDS_CSUM,
            csum_start: 34,
            csum_offset: 16,
            ..Offload::default()
        };
        let tso = Offload {
            gso_type: Offload::GSO_TCPV4,
            gso_size: 1400,
            ..partial
        };
        assert_eq!(check(&frame, &Offload::default(), 1450), Ok(()));
        assert_eq!(check(&frame, &partial, 1450), Ok(()));
        assert_eq!(check(&[0; 60_000], &tso, 1450), Ok(()));
        for (bad, why) in [
            (
                Offload {
                    csum_start: 1463,
                    ..partial
                },
                "checksum past the end",
            ),
            (
                Offload {
                    csum_start: u16::MAX,
                    csum_offset: u16::MAX,
                    ..partial
                },
                "far past the end",
            ),
            (
                Offload {
                    csum_start: 13,
                    ..partial
                },
                "checksum in the Ethernet header",
            ),
            (Offload { gso_size: 0, ..tso }, "gso_size 0"),
            (
                Offload {
                    gso_size: 1451,
                    ..tso
                },
                "segments above the MTU",
            ),
            (Offload { gso_type: 9, ..tso }, "unknown type"),
            (Offload { flags: 0, ..tso }, "segments without checksums"),
        ] {
            assert_eq!(
                check(&frame, &bad, 1450),
                Err(DropReason::BadOffload),
                "{why}"
            );
        }
        assert_eq!(
            check(&[0; 65_536], &Offload::default(), 1450),
            Err(DropReason::Oversize)
        );
        assert_eq!(
            check(&[0; 1465], &Offload::default(), 1450),
            Err(DropReason::Oversize)
        );
    }

    #[test]
    fn a_tag_does_not_count() {
        let mut frame = [0; 1468];
        frame[12] = 0x81;
        assert_eq!(check(&frame, &Offload::default(), 1450), Ok(()));
        assert_eq!(
            check(&frame, &Offload::default(), 1449),
            Err(DropReason::Oversize)
        );
    }
}
