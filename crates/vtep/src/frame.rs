//! Buffers that the edges fill: one frame or one datagram each, made once and used again for ever.
//!
//! ```text
//! FrameBuf      | headroom 64 B | frame, up to 65,557 B | tailroom 32 B |
//!                       ▲ an encapsulation header is written here, so the frame is never moved
//! ```
//!
//! Lengths are checked where a buffer is filled; who reads one need not check again.

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;

use crate::edge::Offload;

/// Bytes free before a frame: the VXLAN header takes 8; the rest is for encapsulations to come.
pub const HEADROOM: usize = 64;
/// Bytes free behind a frame: room for an authentication tag.
pub const TAILROOM: usize = 32;
/// The largest frame a TAP hands over: an IP packet of 65,535 bytes, the Ethernet header and two VLAN tags.
pub const MAX_FRAME: usize = 65_535 + 14 + 2 * 4;
/// The largest payload of a UDP datagram that can arrive, rounded up.
pub const MAX_PAYLOAD: usize = 65_536;

/// One Ethernet frame from a container, with room before and behind it.
pub struct FrameBuf {
    bytes: Box<[u8]>,
    frame_len: usize,
    header_len: usize,
    /// What the frame still needs.
    pub offload: Offload,
}

impl FrameBuf {
    /// An empty buffer. Allocates; the pages cost nothing until they are written.
    #[must_use]
    pub fn new() -> Self {
        let bytes = vec![0; HEADROOM + MAX_FRAME + TAILROOM].into_boxed_slice();
        Self {
            bytes,
            frame_len: 0,
            header_len: 0,
            offload: Offload::default(),
        }
    }

    /// The whole area a frame may take, for an edge to read into before it calls [`Self::set_frame`].
    pub fn space(&mut self) -> &mut [u8] {
        self.space_behind(0)
    }

    /// [`Self::space`] with the last `head` bytes of the headroom before it, for what an edge gives in front of a frame.
    ///
    /// # Panics
    /// When the headroom is shorter than `head`.
    pub fn space_behind(&mut self, head: usize) -> &mut [u8] {
        &mut self.bytes[HEADROOM - head..HEADROOM + MAX_FRAME]
    }

    /// Says that the first `len` bytes of [`Self::space`] are a frame, and forgets the header written for the last one.
    ///
    /// # Panics
    /// When `len` is above [`MAX_FRAME`]: the caller has written past the buffer it was given.
    pub fn set_frame(&mut self, len: usize, offload: Offload) {
        assert!(
            len <= MAX_FRAME,
            "a frame of {len} bytes cannot have been read into {MAX_FRAME}"
        );
        self.frame_len = len;
        self.header_len = 0;
        self.offload = offload;
    }

    /// The frame, from its destination address on.
    #[must_use]
    pub fn frame(&self) -> &[u8] {
        &self.bytes[HEADROOM..HEADROOM + self.frame_len]
    }

    /// The frame, to complete a checksum in it.
    pub fn frame_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[HEADROOM..HEADROOM + self.frame_len]
    }

    /// Writes an encapsulation header directly before the frame, in place of any earlier one.
    ///
    /// # Panics
    /// When `header` is longer than [`HEADROOM`].
    pub fn set_header(&mut self, header: &[u8]) {
        self.bytes[HEADROOM - header.len()..HEADROOM].copy_from_slice(header);
        self.header_len = header.len();
    }

    /// The header last written and the frame behind it, as one slice: the payload of a datagram.
    #[must_use]
    pub fn datagram(&self) -> &[u8] {
        &self.bytes[HEADROOM - self.header_len..HEADROOM + self.frame_len]
    }
}

impl Default for FrameBuf {
    fn default() -> Self {
        Self::new()
    }
}

/// The payload of one UDP datagram from another host, and what came with it.
pub struct DatagramBuf {
    bytes: Box<[u8]>,
    len: usize,
    /// The sender's address and port.
    pub from: SocketAddr,
    /// The traffic class of the outer header: DSCP and ECN.
    pub class: u8,
    /// Several datagrams of this many bytes (the last may be shorter) lie in the buffer, as `UDP_GRO` delivers them.
    pub segment_size: Option<u16>,
}

impl DatagramBuf {
    /// An empty buffer. Allocates; the pages cost nothing until they are written.
    #[must_use]
    pub fn new() -> Self {
        Self {
            bytes: vec![0; MAX_PAYLOAD].into_boxed_slice(),
            len: 0,
            from: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            class: 0,
            segment_size: None,
        }
    }

    /// The whole area a payload may take, for an edge to read into before it calls [`Self::set_payload`].
    pub fn space(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Says that the first `len` bytes of [`Self::space`] are a payload from `from`, with traffic class 0 and not segmented.
    ///
    /// # Panics
    /// When `len` is above [`MAX_PAYLOAD`]: the caller has written past the buffer it was given.
    pub fn set_payload(&mut self, len: usize, from: SocketAddr) {
        assert!(
            len <= MAX_PAYLOAD,
            "a payload of {len} bytes cannot have been read into {MAX_PAYLOAD}"
        );
        self.len = len;
        self.from = from;
        self.class = 0;
        self.segment_size = None;
    }

    /// The payload, from the VXLAN header on.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Each datagram in the buffer, as a range of [`Self::payload`]; an empty one is one, too.
    pub fn datagrams(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let len = self.len;
        let step = self.segment_size.map_or(len, usize::from).max(1);
        (0..len.max(1))
            .step_by(step)
            .map(move |start| start..len.min(start + step))
    }

    /// The payload, to complete an inner checksum in it.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Default for DatagramBuf {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_written_before_the_frame_and_forgotten_with_it() {
        let mut buf = FrameBuf::new();
        buf.space()[..4].copy_from_slice(b"abcd");
        buf.set_frame(4, Offload::default());
        assert_eq!(buf.datagram(), b"abcd");
        buf.set_header(b"12345678");
        buf.set_header(b"87654321");
        assert_eq!(buf.datagram(), b"87654321abcd");
        assert_eq!(buf.frame(), b"abcd");
        buf.set_frame(2, Offload::default());
        assert_eq!(buf.datagram(), b"ab");
    }

    #[test]
    #[should_panic(expected = "cannot have been read")]
    fn an_impossible_length_is_a_bug_in_the_edge() {
        FrameBuf::new().set_frame(MAX_FRAME + 1, Offload::default());
    }

    #[test]
    fn a_new_payload_forgets_what_came_with_the_last() {
        let mut buf = DatagramBuf::new();
        buf.class = 3;
        buf.segment_size = Some(1400);
        buf.set_payload(5, "192.0.2.1:4789".parse().unwrap());
        assert_eq!(
            (buf.payload().len(), buf.class, buf.segment_size),
            (5, 0, None)
        );
    }
}
