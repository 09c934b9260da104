//! The two seams between the engine and the world: [`Tap`] towards containers, [`Underlay`] towards other hosts.
//!
//! Both take and give batches, and what they send is a list of slices, so that a frame can be cut into datagrams or
//! merged from them without copying its payload. The real edges are in [`crate::tap`] and [`crate::udp`], their twins in
//! memory in `testing`. Nothing here calls the kernel.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::RawFd;

use serde::Serialize;

use crate::frame::{DatagramBuf, FrameBuf};
use crate::settings::DEFAULT_TTL;

/// What a frame still needs, or is known about it: the fields of Linux's `struct virtio_net_hdr` (include/uapi/linux/virtio_net.h).
///
/// The default asks for nothing: a whole frame with whole checksums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Bits `VIRTIO_NET_HDR_F_*`.
    pub flags: u8,
    /// One of `VIRTIO_NET_HDR_GSO_*`, perhaps with the ECN bit.
    pub gso_type: u8,
    /// Length of all headers, Ethernet to L4, in bytes; a hint.
    pub hdr_len: u16,
    /// Payload bytes of each segment the frame is to be cut into.
    pub gso_size: u16,
    /// Where the checksum's range starts, in bytes from the start of the frame.
    pub csum_start: u16,
    /// Where the checksum is stored, in bytes from `csum_start`.
    pub csum_offset: u16,
}

impl Offload {
    /// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum holds only the pseudo-header's sum.
    pub const NEEDS_CSUM: u8 = 1;
    /// `VIRTIO_NET_HDR_F_DATA_VALID`: the checksum has been verified.
    pub const DATA_VALID: u8 = 2;
    /// `VIRTIO_NET_HDR_GSO_NONE`.
    pub const GSO_NONE: u8 = 0;
    /// `VIRTIO_NET_HDR_GSO_TCPV4`.
    pub const GSO_TCPV4: u8 = 1;
    /// `VIRTIO_NET_HDR_GSO_TCPV6`.
    pub const GSO_TCPV6: u8 = 4;
    /// `VIRTIO_NET_HDR_GSO_UDP_L4`.
    pub const GSO_UDP_L4: u8 = 5;
    /// `VIRTIO_NET_HDR_GSO_ECN`: TCP with CWR set on its first segment; goes beside another type.
    pub const GSO_ECN: u8 = 0x80;

    /// A frame whose checksum holds only the pseudo-header's sum: its range starts at `start`, it is stored `offset` behind that.
    #[must_use]
    pub const fn partial(start: u16, offset: u16) -> Self {
        Self {
            flags: Self::NEEDS_CSUM,
            gso_type: Self::GSO_NONE,
            hdr_len: 0,
            gso_size: 0,
            csum_start: start,
            csum_offset: offset,
        }
    }

    /// Whether the checksum is still to be completed.
    #[must_use]
    pub const fn needs_checksum(&self) -> bool {
        self.flags & Self::NEEDS_CSUM != 0
    }

    /// Whether the frame is to be cut into segments.
    #[must_use]
    pub const fn is_gso(&self) -> bool {
        self.gso_type & !Self::GSO_ECN != Self::GSO_NONE
    }
}

/// Which work an interface's kernel and its worker leave to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TapFeatures {
    /// Checksums may be left unfinished, both ways.
    pub checksum: bool,
    /// TCP over IPv4 comes, and may be handed over, as super-frames.
    pub tcp4: bool,
    /// TCP over IPv6, too.
    pub tcp6: bool,
    /// TCP that uses ECN comes as super-frames, too.
    pub tcp_ecn: bool,
    /// UDP (over both) comes as super-frames where a program sends it so, and may be handed over merged.
    pub udp: bool,
}

impl TapFeatures {
    /// Everything.
    pub const ALL: Self = Self {
        checksum: true,
        tcp4: true,
        tcp6: true,
        tcp_ecn: true,
        udp: true,
    };

    /// What both have.
    #[must_use]
    pub const fn common(self, other: Self) -> Self {
        Self {
            checksum: self.checksum && other.checksum,
            tcp4: self.tcp4 && other.tcp4,
            tcp6: self.tcp6 && other.tcp6,
            tcp_ecn: self.tcp_ecn && other.tcp_ecn,
            udp: self.udp && other.udp,
        }
    }
}

/// A frame on its way to a container.
#[derive(Clone, Copy, Debug)]
pub struct TapFrame<'a> {
    /// The frame's bytes, in order.
    pub slices: &'a [IoSlice<'a>],
    /// What the container's kernel is still to do.
    pub offload: Offload,
}

/// What is chosen of a datagram's outer headers, beside addresses and ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OuterFields {
    /// The traffic class (IPv4's TOS): DSCP and ECN.
    pub class: u8,
    /// TTL or hop limit, not 0.
    pub ttl: u8,
    /// Whether the UDP checksum is computed; if not, it is sent as 0.
    pub checksum: bool,
}

impl Default for OuterFields {
    fn default() -> Self {
        Self {
            class: 0,
            ttl: DEFAULT_TTL.get(),
            checksum: true,
        }
    }
}

impl OuterFields {
    /// The default, with this traffic class.
    #[must_use]
    pub fn with_class(class: u8) -> Self {
        Self {
            class,
            ..Self::default()
        }
    }
}

/// A datagram on its way to another host.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// The remote VTEP.
    pub to: SocketAddr,
    /// The inner flow's hash ([`crate::flow::hash`]), which chooses the source port.
    pub flow: u32,
    /// What the outer header says.
    pub outer: OuterFields,
    /// Cut the payload into datagrams of this many bytes (the last may be shorter), as `UDP_SEGMENT` does. Each of them
    /// starts where a slice starts, so that an underlay can cut where the kernel can't.
    pub segment_size: Option<u16>,
    /// The payload's bytes, in order.
    pub slices: &'a [IoSlice<'a>],
}

impl Datagram<'_> {
    /// How many datagrams it is cut into.
    #[must_use]
    pub fn count(&self) -> usize {
        match self.segment_size {
            Some(size @ 1..) => self.len().div_ceil(usize::from(size)),
            _ => 1,
        }
    }

    /// Bytes of payload, in all datagrams it is cut into.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty datagram is no special case"
    )]
    #[must_use]
    pub fn len(&self) -> usize {
        self.slices.iter().map(|slice| slice.len()).sum()
    }
}

/// What became of a batch, in frames or in datagrams; one that is to be cut counts as the datagrams it is cut into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendReport {
    /// Taken by the kernel.
    pub sent: usize,
    /// Not sent: larger than the link or the path carries (`EMSGSIZE`).
    pub too_big: usize,
    /// Not sent: no room in the queue or the socket's buffer (`EAGAIN`, `ENOBUFS`).
    pub full: usize,
    /// Not sent for any other cause.
    pub failed: usize,
    /// Which of the batch's first 64 were not sent: a bit for each, by [`Refusal`].
    pub refused: [u64; 3],
}

/// Why one of a batch was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// See [`SendReport::too_big`].
    TooBig,
    /// See [`SendReport::full`].
    Full,
    /// See [`SendReport::failed`].
    Failed,
}

impl SendReport {
    /// The whole batch was refused: so many pieces of each of its entries.
    #[must_use]
    pub fn all_failed(counts: impl IntoIterator<Item = usize>) -> Self {
        let mut report = Self::default();
        for (index, count) in counts.into_iter().enumerate() {
            report.refuse(index, count, Refusal::Failed);
        }
        report
    }

    /// Notes that `count` pieces of the batch's entry `index` were not sent.
    pub const fn refuse(&mut self, index: usize, count: usize, why: Refusal) {
        match why {
            Refusal::TooBig => self.too_big += count,
            Refusal::Full => self.full += count,
            Refusal::Failed => self.failed += count,
        }
        if index < 64 {
            self.refused[why as usize] |= 1 << index;
        }
    }

    /// Why the batch's entry `index` was not sent; `None` when it was, or lies beyond the first 64.
    #[must_use]
    pub fn refusal(&self, index: usize) -> Option<Refusal> {
        [Refusal::TooBig, Refusal::Full, Refusal::Failed]
            .into_iter()
            .find(|why| index < 64 && self.refused[*why as usize] & 1 << index != 0)
    }

    /// All that was not sent.
    #[must_use]
    pub const fn dropped(&self) -> usize {
        self.too_big + self.full + self.failed
    }
}

/// One queue of a container's interface.
pub trait Tap: Send {
    /// Fills `bufs` from the front with the frames that wait, and says how many; 0 when none does. Never blocks.
    ///
    /// # Errors
    /// When the interface is gone or broken. Frames read before the error are reported first.
    fn recv(&mut self, bufs: &mut [FrameBuf]) -> io::Result<usize>;

    /// Hands over the frames. One that is refused is counted in the report and does not end the batch. Never blocks.
    ///
    /// # Errors
    /// When the interface is gone or broken as a whole.
    fn send(&mut self, frames: &[TapFrame<'_>]) -> io::Result<SendReport>;

    /// What may be left to whom; nothing, unless an implementation says otherwise.
    fn features(&self) -> TapFeatures {
        TapFeatures::default()
    }

    /// What to wait on until frames come; `None` for a twin in memory.
    fn as_raw_fd(&self) -> Option<RawFd>;
}

/// One worker's way to other hosts.
pub trait Underlay: Send {
    /// Fills `bufs` from the front with the datagrams that wait, and says how many; 0 when none does. Never blocks.
    ///
    /// # Errors
    /// When the socket is broken; what an ICMP error reported about an earlier datagram is none.
    fn recv(&mut self, bufs: &mut [DatagramBuf]) -> io::Result<usize>;

    /// Sends the datagrams. One that is refused is counted in the report and does not end the batch. Never blocks.
    ///
    /// # Errors
    /// When the sockets are broken as a whole.
    fn send(&mut self, datagrams: &[Datagram<'_>]) -> io::Result<SendReport>;

    /// Whether a message that is cut to many datagrams costs less than they would. If not, none is made of ordinary frames.
    fn cuts_messages(&self) -> bool {
        true
    }

    /// What to wait on until datagrams come; `None` for a twin in memory.
    fn as_raw_fd(&self) -> Option<RawFd>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_which_were_refused() {
        let mut report = SendReport::default();
        report.refuse(0, 3, Refusal::Full);
        report.refuse(63, 1, Refusal::TooBig);
        report.refuse(64, 1, Refusal::Failed);
        assert_eq!((report.too_big, report.full, report.failed), (1, 3, 1));
        let refusals = [0, 1, 63, 64].map(|index| report.refusal(index));
        assert_eq!(
            refusals,
            [Some(Refusal::Full), None, Some(Refusal::TooBig), None]
        );
    }
}
