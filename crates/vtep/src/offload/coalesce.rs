//! Segments of one flow, merged to super-frames: the reverse of [`super::segment`].
//!
//! ```text
//! in    a1 | b1 | a2 | b2 | a3 | x | a4          a, b flows; x of flow a, and nothing that can be merged
//! out   a1 a2 a3 | b1 b2 | x | a4                the order within each flow stays
//! ```
//!
//! A container's stack takes one super-frame with the work of one frame. Frames are merged within one batch only, so nothing
//! ever waits for what has not come. What may be merged is what a kernel would merge:
//!
//! - TCP in sequence, with equal addresses, ports, ACK, window, options, TOS and TTL, and no flag but ACK; PSH ends it.
//! - UDP of one flow.
//! - All of one length; a shorter one ends it.
//!
//! The caller has verified each frame's checksum: a merged frame says that its own is to be completed, so a wrong one must not
//! come here. The IPv4 header's is verified here, because merging writes it anew.
//!
//! Nothing is copied but the first frame's headers, and nothing is allocated after [`Coalescer::new`].

use crate::edge::{Offload, TapFeatures};
use crate::ethernet::HEADER_LEN as ETHERNET_LEN;
use crate::flow;
use crate::ip::{protocol, pseudo_header_sum};
use crate::offload::checksum::{fold, sum};

/// Segments merged into one frame, at most.
pub const PARTS_MAX: usize = 128;

/// UDP segments merged into one frame, at most: what kernels before 6.9 take.
const UDP_PARTS_MAX: usize = 64;
/// Frames that come out of one batch, at most.
const GROUPS: usize = 256;
/// Frames that go into one batch, at most.
const PARTS: usize = 1024;
/// Flows that can be open at once; two that share a slot end each other's merging, and are delivered all the same.
const SLOTS: usize = 256;
/// Ethernet without tags, IPv6 without extensions, and the longest TCP header: 114.
const HEADERS_MAX: usize = 128;
/// The longest IP packet.
const PACKET_MAX: usize = 65_535;

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;

/// Where a frame, or its payload, lies in the caller's buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Which buffer.
    pub buffer: usize,
    /// Where in it, in bytes.
    pub start: usize,
    /// How long, in bytes.
    pub len: usize,
}

/// What comes out for one frame of a container.
#[derive(Debug)]
pub struct Merged<'c> {
    /// Whose it is, as the caller said.
    pub port: usize,
    /// What the container's kernel is to do.
    pub offload: Offload,
    /// The headers, when frames were merged; empty for a frame that stays as it was.
    pub headers: &'c [u8],
    parts: &'c [Part],
    next: usize,
    left: usize,
}

/// The payloads behind [`Merged::headers`], in order; or the one whole frame.
impl Iterator for Merged<'_> {
    type Item = Span;

    fn next(&mut self) -> Option<Span> {
        self.left = self.left.checked_sub(1)?;
        let part = self.parts[self.next];
        self.next = part.next;
        let Span { buffer, start, len } = part.span;
        let headers = self.headers.len();
        Some(Span {
            buffer,
            start: start + headers,
            len: len - headers,
        })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Merged<'_> {}

/// One frame that was put in, and the one that follows it in its group.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    span: Span,
    next: usize,
}

/// Frames that come out as one.
#[derive(Clone, Debug)]
struct Group {
    port: usize,
    first: usize,
    last: usize,
    count: usize,
    /// Whether more may be merged.
    open: bool,
    /// Of all parts together.
    payload_len: usize,
    shape: Shape,
    /// What a single frame needs.
    offload: Offload,
    /// A copy of the first frame's, `shape.headers_len` of them.
    headers: [u8; HEADERS_MAX],
}

/// A small table of flows over one batch.
pub struct Coalescer {
    groups: Vec<Group>,
    used: usize,
    parts: Vec<Part>,
    /// For each slot the group that is open there, or [`EMPTY`].
    slots: [u16; SLOTS],
}

/// In `slots`: nothing is open there.
const EMPTY: u16 = u16::MAX;

impl Coalescer {
    /// An empty table. Allocates all that it will ever need.
    #[must_use]
    pub fn new() -> Self {
        let group = Group {
            port: 0,
            first: 0,
            last: 0,
            count: 0,
            open: false,
            payload_len: 0,
            shape: Shape::default(),
            offload: Offload::default(),
            headers: [0; HEADERS_MAX],
        };
        Self {
            groups: vec![group; GROUPS],
            used: 0,
            parts: Vec::with_capacity(PARTS),
            slots: [EMPTY; SLOTS],
        }
    }

    /// Whether nothing was put in.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Whether [`Self::clear`] must come before anything more is put in.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.used == GROUPS || self.parts.len() == PARTS
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.used = 0;
        self.parts.clear();
        self.slots.fill(EMPTY);
    }

    /// Puts in a frame that stays as it is, with what its container's kernel is to do. It ends its flow's merging.
    ///
    /// # Panics
    /// When [`Self::is_full`].
    pub fn push_whole(&mut self, port: usize, span: Span, frame: &[u8], offload: Offload) {
        match Flow::read(frame) {
            Some(flow) => self.slots[flow.slot(port)] = EMPTY,
            // Which flow it is of can't be seen, so it ends all.
            None => self.slots.fill(EMPTY),
        }
        self.start_group(port, span, offload);
    }

    /// Puts in a frame whose checksum is right, or is a partial one, to be merged with others if it can be. Alone it needs
    /// `offload`; `features` is what the port takes.
    ///
    /// # Panics
    /// When [`Self::is_full`].
    pub fn push(
        &mut self,
        port: usize,
        span: Span,
        frame: &[u8],
        offload: Offload,
        features: TapFeatures,
    ) {
        let Some((flow, shape)) =
            Flow::read(frame).and_then(|flow| Some((flow, Shape::read(frame, flow, features)?)))
        else {
            return self.push_whole(port, span, frame, offload);
        };
        let slot = flow.slot(port);
        if let Some(group) = self.groups[..self.used].get_mut(usize::from(self.slots[slot]))
            && group.takes(port, frame, &shape)
        {
            self.parts[group.last].next = self.parts.len();
            group.last = self.parts.len();
            group.add(frame, &shape);
            self.parts.push(Part { span, next: 0 });
            return;
        }
        self.slots[slot] = u16::try_from(self.used).unwrap_or(EMPTY);
        let group = self.start_group(port, span, offload);
        group.headers[..shape.headers_len].copy_from_slice(&frame[..shape.headers_len]);
        group.payload_len = shape.payload_len;
        group.open = !shape.last;
        group.shape = shape;
    }

    fn start_group(&mut self, port: usize, span: Span, offload: Offload) -> &mut Group {
        let part = self.parts.len();
        assert!(!self.is_full(), "the caller clears a full table first");
        self.parts.push(Part { span, next: 0 });
        let group = &mut self.groups[self.used];
        self.used += 1;
        group.port = port;
        group.first = part;
        group.last = part;
        group.count = 1;
        group.open = false;
        group.offload = offload;
        group
    }

    /// How many frames come out.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.used
    }

    /// Writes the headers of what was merged, and gives all frames, each flow's in its order.
    pub fn finish(&mut self) -> impl Iterator<Item = Merged<'_>> {
        let parts = &self.parts[..];
        self.groups[..self.used].iter_mut().map(move |group| {
            let (port, next, left) = (group.port, group.first, group.count);
            let (headers, offload) = if left == 1 {
                (&[][..], group.offload)
            } else {
                group.finish()
            };
            Merged {
                port,
                offload,
                headers,
                parts,
                next,
                left,
            }
        })
    }
}

impl Default for Coalescer {
    fn default() -> Self {
        Self::new()
    }
}

impl Group {
    /// Whether this frame is the next of what has been merged.
    fn takes(&self, port: usize, frame: &[u8], shape: &Shape) -> bool {
        let Shape {
            kind,
            v4,
            l4_at,
            headers_len,
            ..
        } = self.shape;
        let most = if kind == Kind::Tcp {
            PARTS_MAX
        } else {
            UDP_PARTS_MAX
        };
        let same = |from: usize, to: usize| frame[from..to] == self.headers[from..to];
        self.open
            && self.port == port
            && (shape.kind, shape.v4, shape.headers_len) == (kind, v4, headers_len)
            && shape.payload_len <= self.shape.payload_len
            && self.count < most
            && headers_len - ETHERNET_LEN + self.payload_len + shape.payload_len <= PACKET_MAX
            && if v4 {
                // Ethernet, version and TOS; fragment bits, TTL and protocol; addresses.
                same(0, 16) && same(20, 24) && same(26, 34)
            } else {
                // Ethernet, version, traffic class and flow label; next header, hop limit and addresses.
                same(0, 18) && same(20, 54)
            }
            // Ports.
            && same(l4_at, l4_at + 4)
            && match kind {
                Kind::Udp => true,
                Kind::Tcp => {
                    let expected = u32::try_from(self.payload_len)
                        .map(|len| self.shape.sequence.wrapping_add(len));
                    // Acknowledgement and data offset; window; urgent pointer and options.
                    expected == Ok(shape.sequence)
                        && same(l4_at + 8, l4_at + 13)
                        && same(l4_at + 14, l4_at + 16)
                        && same(l4_at + 18, headers_len)
                }
            }
    }

    fn add(&mut self, frame: &[u8], shape: &Shape) {
        self.count += 1;
        self.payload_len += shape.payload_len;
        self.open = !shape.last && shape.payload_len == self.shape.payload_len;
        if shape.kind == Kind::Tcp {
            let flags = self.shape.l4_at + 13;
            self.headers[flags] |= frame[flags] & PSH;
        }
    }

    /// Writes lengths and checksums for all parts together.
    fn finish(&mut self) -> (&[u8], Offload) {
        let Shape {
            kind,
            v4,
            l4_at,
            headers_len,
            payload_len,
            ..
        } = self.shape;
        let headers = &mut self.headers[..headers_len];
        let body_len = headers_len - l4_at + self.payload_len;
        let short = |length: usize| {
            u16::try_from(length).expect("invariant: no more was taken than fits an IP packet")
        };
        let (source, destination) = if v4 {
            put(headers, 16, short(l4_at - ETHERNET_LEN + body_len));
            put(headers, 24, 0);
            let checksum = !fold(sum(&headers[ETHERNET_LEN..34]));
            put(headers, 24, checksum);
            let [a, b, c, d, e, f, g, h]: [u8; 8] = *headers[26..]
                .first_chunk()
                .expect("invariant: the headers end behind both addresses");
            ([a, b, c, d].into(), [e, f, g, h].into())
        } else {
            put(headers, 18, short(body_len));
            let address = |at: usize| -> [u8; 16] {
                *headers[at..]
                    .first_chunk()
                    .expect("invariant: the headers end behind both addresses")
            };
            (address(22).into(), address(38).into())
        };
        let (number, gso_type, csum_offset) = match (kind, v4) {
            (Kind::Tcp, true) => (protocol::TCP, Offload::GSO_TCPV4, 16),
            (Kind::Tcp, false) => (protocol::TCP, Offload::GSO_TCPV6, 16),
            (Kind::Udp, _) => {
                put(headers, l4_at + 4, short(body_len));
                (protocol::UDP, Offload::GSO_UDP_L4, 6)
            }
        };
        let pseudo = fold(pseudo_header_sum(source, destination, number, body_len));
        put(headers, l4_at + usize::from(csum_offset), pseudo);
        let offload = Offload {
            flags: Offload::NEEDS_CSUM,
            gso_type,
            hdr_len: short(headers_len),
            gso_size: short(payload_len),
            csum_start: short(l4_at),
            csum_offset,
        };
        (headers, offload)
    }
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Tcp,
    Udp,
}

/// A TCP or UDP packet over plain IP: no tags, options, extensions or fragments, and nothing behind it.
#[derive(Clone, Copy, Debug)]
struct Flow {
    kind: Kind,
    v4: bool,
    l4_at: usize,
    hash: u32,
}

impl Flow {
    fn read(frame: &[u8]) -> Option<Self> {
        let (v4, l4_at, number) = match *frame.get(12..34)? {
            // The fragment field may only say "don't".
            [
                0x08,
                0x00,
                0x45,
                _,
                _,
                _,
                _,
                _,
                0x00 | 0x40,
                0x00,
                _,
                number,
                ..,
            ] => (true, 34, number),
            [0x86, 0xdd, version, _, _, _, _, _, number, ..] if version >> 4 == 6 => {
                (false, 54, number)
            }
            _ => return None,
        };
        let kind = match number {
            protocol::TCP => Kind::Tcp,
            protocol::UDP => Kind::Udp,
            _ => return None,
        };
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(*frame.get(at..)?.first_chunk()?))
        };
        // The ends of both addresses tell most flows apart; `Group::takes` compares everything.
        let (source, destination) = if v4 { (26, 30) } else { (34, 50) };
        let hosts = word(source)? ^ word(destination)?.rotate_left(16);
        let hash = flow::mix_words(hosts, word(l4_at)?, u32::from(number));
        Some(Self {
            kind,
            v4,
            l4_at,
            hash,
        })
    }

    const fn slot(&self, port: usize) -> usize {
        (self.hash as usize ^ port) % SLOTS
    }
}

/// What merging needs to know of one frame.
#[derive(Clone, Copy, Debug, Default)]
struct Shape {
    kind: Kind,
    v4: bool,
    l4_at: usize,
    headers_len: usize,
    payload_len: usize,
    sequence: u32,
    /// Nothing may be merged behind it.
    last: bool,
}

impl Shape {
    /// `None` when the frame can't be merged with any.
    fn read(frame: &[u8], flow: Flow, features: TapFeatures) -> Option<Self> {
        let Flow {
            kind, v4, l4_at, ..
        } = flow;
        let short = |at: usize| {
            frame
                .get(at..)?
                .first_chunk()
                .map(|two| u16::from_be_bytes(*two))
        };
        // Nothing behind the packet, and an intact header.
        let whole = if v4 {
            usize::from(short(16)?) + ETHERNET_LEN == frame.len()
                && fold(sum(&frame[ETHERNET_LEN..34])) == 0xffff
        } else {
            usize::from(short(18)?) + l4_at == frame.len()
        };
        let l4 = frame.get(l4_at..)?;
        let (taken, header_len, sequence, last) = match kind {
            Kind::Tcp => {
                let [_, _, _, _, s1, s2, s3, s4, _, _, _, _, offset, flags, ..] = *l4 else {
                    return None;
                };
                let header_len = usize::from(offset >> 4) * 4;
                let plain = flags & !PSH == ACK && header_len >= 20;
                let taken = plain && if v4 { features.tcp4 } else { features.tcp6 };
                let sequence = u32::from_be_bytes([s1, s2, s3, s4]);
                (taken, header_len, sequence, flags & PSH != 0)
            }
            // A checksum of zero says that there is none, which a merged packet couldn't say.
            Kind::Udp => {
                let intact = usize::from(short(l4_at + 4)?) == l4.len() && short(l4_at + 6)? != 0;
                (intact && features.udp, 8, 0, false)
            }
        };
        let payload_len = l4.len().checked_sub(header_len)?;
        (whole && taken && payload_len > 0).then_some(Self {
            kind,
            v4,
            l4_at,
            headers_len: l4_at + header_len,
            payload_len,
            sequence,
            last,
        })
    }
}

#[cfg(test)]
mod tests;
