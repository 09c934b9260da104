//! `UDP_SEGMENT`: how much one message may hold, and to whom it does not work.
//!
//! Limits (Linux 6.18, `udp_send_skb`): 128 segments, 64 before 6.9; 65,507 bytes of payload, headers of one datagram included; each
//! segment fits the route's MTU. A device without checksum offload refuses with EIO, a path grown smaller with EMSGSIZE or
//! EINVAL: then that remote gets single datagrams from there on, as wireguard-go does for its whole socket.
#![allow(unsafe_code)]

use std::collections::HashSet;
use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use socket2::{SockAddr, Socket};

use super::message::Envelope;
use crate::edge::{Datagram, OuterFields};

/// The largest payload of one message: what IPv4 leaves of 65,535 bytes. IPv6 would leave 20 more.
const BYTES_MAX: usize = 65_507;
/// Numbers of segments to try, the most first.
const SEGMENTS: [usize; 2] = [128, 64];

/// What the kernel can cut, and the remotes that must be spared.
pub(super) struct Segmentation {
    segments_max: usize,
    spared_any: AtomicBool,
    spared: ArcSwap<HashSet<IpAddr>>,
}

impl Segmentation {
    /// Finds out what the kernel takes, by sending empty words from a socket to itself, which filters them out.
    pub(super) fn probe(socket: &Socket) -> Self {
        let segments_max = match socket.local_addr() {
            Ok(own) => SEGMENTS
                .into_iter()
                .find(|segments| try_segments(socket, &own, *segments))
                .unwrap_or(1),
            Err(_) => 1,
        };
        tracing::debug!(segments_max, "datagrams the kernel cuts from one message");
        Self::at_most(segments_max)
    }

    /// Nothing is cut.
    pub(super) fn none() -> Self {
        Self::at_most(1)
    }

    fn at_most(segments_max: usize) -> Self {
        Self {
            segments_max,
            spared_any: AtomicBool::new(false),
            spared: ArcSwap::default(),
        }
    }

    pub(super) const fn segments_max(&self) -> usize {
        self.segments_max
    }

    /// How many segments a message to `remote` may have.
    pub(super) fn segments_for(&self, remote: IpAddr) -> usize {
        if self.spared_any.load(Ordering::Relaxed) && self.spared.load().contains(&remote) {
            1
        } else {
            self.segments_max
        }
    }

    /// Has `remote` get single datagrams from now on. Says so once.
    pub(super) fn give_up(&self, remote: IpAddr, error: &io::Error) {
        if self.spared.load().contains(&remote) {
            return;
        }
        tracing::warn!(%remote, %error, "the kernel can't segment what goes to this host: it gets single datagrams from now on");
        self.spared.rcu(|spared| {
            let mut spared = HashSet::clone(spared);
            spared.insert(remote);
            Arc::new(spared)
        });
        self.spared_any.store(true, Ordering::Relaxed);
    }
}

/// Errors that say that a message can't be cut, though its datagrams may be sent.
pub(super) const fn is_refusal(errno: i32) -> bool {
    matches!(errno, libc::EIO | libc::EINVAL | libc::EMSGSIZE)
}

fn try_segments(socket: &Socket, to: &SockAddr, segments: usize) -> bool {
    use std::os::fd::AsRawFd;
    let Some(to) = to.as_socket() else {
        return false;
    };
    let bytes = [0; 128];
    let slices = [IoSlice::new(&bytes[..segments])];
    let envelope = Envelope::new(to, OuterFields::default(), Some(1));
    let message = envelope.message(&slices);
    // SAFETY: the message points to the envelope and the slices above, which outlive the call; the kernel only reads them.
    // socket2 can't send control messages of options it doesn't know.
    let result = unsafe {
        libc::sendmsg(
            socket.as_raw_fd(),
            &raw const message.msg_hdr,
            libc::MSG_DONTWAIT,
        )
    };
    if result >= 0 {
        return true;
    }
    // What comes for other reasons (a loopback that is down) says nothing about segments: the least that any kernel
    // with UDP_SEGMENT takes will do.
    let error = io::Error::last_os_error();
    !matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EIO | libc::ENOPROTOOPT | libc::EMSGSIZE)
    ) && segments == SEGMENTS[SEGMENTS.len() - 1]
}

/// The messages that a datagram takes: as many segments in each as may be.
pub(super) fn pieces<'a>(
    datagram: &Datagram<'a>,
    segments_max: usize,
) -> impl Iterator<Item = Datagram<'a>> + use<'a> {
    let most = datagram.segment_size.map_or(0, |size| {
        (BYTES_MAX / usize::from(size).max(1)).clamp(1, segments_max)
    });
    split(*datagram, most)
}

/// Each datagram for itself.
pub(super) fn singles<'a>(datagram: &Datagram<'a>) -> impl Iterator<Item = Datagram<'a>> + use<'a> {
    split(*datagram, 1)
}

/// Splits a datagram that is to be cut to parts of at most `most` segments; one that isn't stays whole.
fn split(datagram: Datagram<'_>, most: usize) -> impl Iterator<Item = Datagram<'_>> {
    let mut rest = Some(datagram.slices);
    std::iter::from_fn(move || {
        let slices = rest?;
        let Some(size) = datagram.segment_size.map(usize::from) else {
            rest = None;
            return Some(datagram);
        };
        let (mut segments, mut bytes, mut used) = (0, 0, 0);
        // Each segment starts where a slice does (the promise of `Datagram::segment_size`).
        for slice in slices {
            if bytes >= size {
                (segments, bytes) = (segments + 1, 0);
                if segments == most {
                    break;
                }
            }
            bytes += slice.len();
            used += 1;
        }
        let (piece, behind) = slices.split_at(used);
        rest = (!behind.is_empty()).then_some(behind);
        let whole: usize = piece.iter().map(|slice| slice.len()).sum();
        Some(Datagram {
            segment_size: datagram.segment_size.filter(|_| whole > size),
            slices: piece,
            ..datagram
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(datagram: &Datagram<'_>, most: usize) -> Vec<(usize, Option<u16>)> {
        pieces(datagram, most)
            .map(|piece| (piece.len(), piece.segment_size))
            .collect()
    }

    #[test]
    fn messages_keep_to_both_limits() {
        let bytes = [0; 1500];
        // As a super-frame is sent: headers and payload of each segment, the last one shorter.
        let mut slices = Vec::new();
        for _ in 0..46 {
            slices.extend([IoSlice::new(&bytes[..74]), IoSlice::new(&bytes[..1398])]);
        }
        slices.extend([IoSlice::new(&bytes[..74]), IoSlice::new(&bytes[..10])]);
        let datagram = Datagram {
            to: "192.0.2.1:4789".parse().unwrap(),
            flow: 0,
            outer: OuterFields::default(),
            segment_size: Some(1472),
            slices: &slices,
        };
        assert_eq!(datagram.count(), 47);
        assert_eq!(
            segments(&datagram, 128),
            [(44 * 1472, Some(1472)), (2 * 1472 + 84, Some(1472))]
        );
        assert_eq!(segments(&datagram, 46)[1], (84 + 2 * 1472, Some(1472)));
        let single = segments(&datagram, 1);
        assert_eq!(
            (single.len(), single[0], single[46]),
            (47, (1472, None), (84, None))
        );
        assert_eq!(singles(&datagram).count(), 47);
        let whole = Datagram {
            segment_size: None,
            ..datagram
        };
        assert_eq!(segments(&whole, 1).len(), 1);
    }

    #[test]
    fn a_remote_is_spared_for_good() {
        let segmentation = Segmentation {
            segments_max: 64,
            spared_any: AtomicBool::new(false),
            spared: ArcSwap::default(),
        };
        let (one, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        assert_eq!(segmentation.segments_for(one), 64);
        for _ in 0..2 {
            segmentation.give_up(one, &io::Error::from_raw_os_error(libc::EIO));
        }
        assert_eq!(
            (
                segmentation.segments_for(one),
                segmentation.segments_for(other)
            ),
            (1, 64)
        );
    }
}
