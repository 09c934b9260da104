//! Packets larger than the MTU ("super-frames"), cut to segments as a network card with TSO and USO would.
//!
//! ```text
//! super-frame   | Ethernet | IP | TCP or UDP | payload ………………………………… |
//! segment i     | copy, lengths, id, sequence, flags, checksums | payload[i·size .. (i+1)·size] |
//! ```
//!
//! Only headers are written, into a buffer of the caller's; the payload is lent from the super-frame. A container's kernel
//! hands such frames over because it was offered to ([`SuperFrame::requested`]); a peer on a veth or virtio link because it
//! believes that a card will cut them ([`SuperFrame::merged_by_peer`]).

use crate::edge::Offload;
use crate::ethernet::Frame;
use crate::ip::{Fragment, Packet, protocol, pseudo_header_sum};
use crate::offload::checksum::{fold, sum};
use crate::stats::DropReason;

/// The longest headers that are cut: Ethernet with two tags, IP with options or extensions, and the longest TCP header.
pub const MAX_HEADERS: usize = 256;

/// Segments of one TCP packet, at most: a full one at the smallest MSS that Linux uses (`tcp_min_snd_mss`), less options.
const TCP_SEGMENTS_MAX: usize = 65_535 / 32;
/// Segments of one UDP packet, at most (Linux's `UDP_MAX_SEGMENTS`).
const UDP_SEGMENTS_MAX: usize = 128;

/// TCP's flags in the 14th byte of its header (RFC 9293 §3.1).
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// What is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tcp,
    Udp,
}

impl Kind {
    /// Where the checksum's field is in the header.
    const fn checksum_at(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}

/// A packet to be cut, its headers checked.
#[derive(Clone, Copy, Debug)]
pub struct SuperFrame<'a> {
    headers: &'a [u8],
    payload: &'a [u8],
    packet: Packet<'a>,
    kind: Kind,
    ip_at: usize,
    l4_at: usize,
    segment_len: usize,
}

impl<'a> SuperFrame<'a> {
    /// Looks at a frame that a container's kernel wants cut as `offload` says.
    ///
    /// # Errors
    /// [`DropReason::Malformed`] when its headers lie; [`DropReason::BadOffload`] when `offload` doesn't fit them, or the segments don't
    /// fit `mtu`.
    pub fn requested(frame: &'a [u8], offload: &Offload, mtu: u16) -> Result<Self, DropReason> {
        let mut this = Self::read(frame).map_err(|reason| match reason {
            DropReason::Malformed => reason,
            _ => DropReason::BadOffload,
        })?;
        let wanted = match (offload.gso_type & !Offload::GSO_ECN, this.is_v4()) {
            (Offload::GSO_TCPV4, true) | (Offload::GSO_TCPV6, false) => Kind::Tcp,
            (Offload::GSO_UDP_L4, _) => Kind::Udp,
            _ => return Err(DropReason::BadOffload),
        };
        this.segment_len = usize::from(offload.gso_size);
        let fits = this.headers.len() - this.ip_at + this.segment_len <= usize::from(mtu);
        let agrees = this.kind == wanted
            && offload.needs_checksum()
            && usize::from(offload.csum_start) == this.l4_at
            && usize::from(offload.csum_offset) == this.kind.checksum_at();
        // One frame must not become a flood, whatever a container writes into a packet socket.
        let most = match this.kind {
            Kind::Tcp => TCP_SEGMENTS_MAX,
            Kind::Udp => UDP_SEGMENTS_MAX,
        };
        if agrees && fits && this.segment_len > 0 && (1..=most).contains(&this.count()) {
            Ok(this)
        } else {
            Err(DropReason::BadOffload)
        }
    }

    /// Looks at a frame from a remote that is too large for `mtu`.
    ///
    /// # Errors
    /// [`DropReason::Oversize`] when it is not TCP, which alone can be cut anywhere; [`DropReason::Malformed`] when its headers lie;
    /// [`DropReason::SuperFrame`] when they leave no room for payload.
    pub fn merged_by_peer(frame: &'a [u8], mtu: u16) -> Result<Self, DropReason> {
        let mut this = Self::read(frame)?;
        if this.kind != Kind::Tcp {
            return Err(DropReason::Oversize);
        }
        this.segment_len = usize::from(mtu).saturating_sub(this.headers.len() - this.ip_at);
        if this.segment_len == 0 {
            return Err(DropReason::SuperFrame);
        }
        Ok(this)
    }

    /// The same packet, cut to segments whose frames have at most `limit` bytes, for a path that takes no longer ones.
    /// `None` when it is not TCP, which alone can be cut anywhere, or `limit` leaves no room for payload.
    #[must_use]
    pub fn cut_to(&self, limit: usize) -> Option<Self> {
        let room = limit.saturating_sub(self.headers.len());
        (self.kind == Kind::Tcp && room > 0).then_some(Self {
            segment_len: self.segment_len.min(room),
            ..*self
        })
    }

    /// Reads the headers; the segments' length is still to be set.
    fn read(frame: &'a [u8]) -> Result<Self, DropReason> {
        let view = Frame::parse(frame).ok_or(DropReason::Malformed)?;
        let packet = Packet::parse(&view)
            .ok()
            .flatten()
            .ok_or(DropReason::Malformed)?;
        let kind = match (packet.protocol, packet.fragment) {
            (protocol::TCP, Fragment::Whole) => Kind::Tcp,
            (protocol::UDP, Fragment::Whole) => Kind::Udp,
            _ => return Err(DropReason::Oversize),
        };
        let (least, header_len) = match kind {
            // RFC 9293 §3.1: the data offset counts 32-bit words, at least five.
            Kind::Tcp => {
                let offset = packet.body.get(12).map_or(0, |byte| byte >> 4);
                (20, usize::from(offset) * 4)
            }
            Kind::Udp => (8, 8),
        };
        if header_len < least || header_len > packet.body.len() {
            return Err(DropReason::Malformed);
        }
        let ip_at = view.payload_offset();
        let l4_at = ip_at + packet.body_offset;
        let headers = &frame[..l4_at + header_len];
        if headers.len() > MAX_HEADERS {
            return Err(DropReason::SuperFrame);
        }
        Ok(Self {
            headers,
            payload: &packet.body[header_len..],
            packet,
            kind,
            ip_at,
            l4_at,
            segment_len: 0,
        })
    }

    /// Has a kernel cut it: its checksum must be a partial one.
    #[must_use]
    pub fn offload(&self) -> Offload {
        let gso_type = match (self.kind, self.is_v4()) {
            (Kind::Udp, _) => Offload::GSO_UDP_L4,
            (Kind::Tcp, true) => Offload::GSO_TCPV4,
            (Kind::Tcp, false) => Offload::GSO_TCPV6,
        };
        // RFC 3168 §6.1.2: CWR stands on the first segment only, which the ECN bit asks for.
        let congestion = match self.kind {
            Kind::Tcp if self.headers[self.l4_at + 13] & CWR != 0 => Offload::GSO_ECN,
            _ => 0,
        };
        let short = |length: usize| {
            u16::try_from(length)
                .expect("invariant: held below an MTU or MAX_HEADERS when it was read")
        };
        Offload {
            flags: Offload::NEEDS_CSUM,
            gso_type: gso_type | congestion,
            hdr_len: short(self.headers.len()),
            gso_size: short(self.segment_len),
            csum_start: short(self.l4_at),
            csum_offset: short(self.kind.checksum_at()),
        }
    }

    /// How many segments there are.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.payload.len().div_ceil(self.segment_len)
    }

    /// Bytes of headers before each segment's payload.
    #[must_use]
    pub const fn headers_len(&self) -> usize {
        self.headers.len()
    }

    /// Payload bytes of each segment but the last, which may have fewer.
    #[must_use]
    pub const fn segment_len(&self) -> usize {
        self.segment_len
    }

    /// Writes the headers of segment `index` into `space`, and returns the segment's payload.
    ///
    /// # Panics
    /// When `index` is not below [`Self::count`], or `space` is not [`Self::headers_len`] bytes long.
    pub fn write_headers(&self, index: usize, space: &mut [u8]) -> &'a [u8] {
        let start = index * self.segment_len;
        let end = self.payload.len().min(start + self.segment_len);
        let payload = &self.payload[start..end];
        space.copy_from_slice(self.headers);
        let (ip, l4) = space[self.ip_at..].split_at_mut(self.l4_at - self.ip_at);
        self.write_ip(ip, index, l4.len() + payload.len());
        match self.kind {
            Kind::Tcp => self.write_tcp(l4, start, payload.len()),
            Kind::Udp => put(l4, 4, short(l4.len() + payload.len())),
        }
        self.write_checksum(l4, payload);
        payload
    }

    fn write_ip(&self, ip: &mut [u8], index: usize, body_len: usize) {
        if self.is_v4() {
            put(ip, 2, short(ip.len() + body_len));
            // Each segment is a packet of its own, and counts on from the first (as inet_gso_segment does).
            let id = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(short(index));
            put(ip, 4, id);
            put(ip, 10, 0);
            let checksum = !fold(sum(ip));
            put(ip, 10, checksum);
        } else {
            // RFC 8200 §3: the length of all that follows the fixed header of 40 bytes.
            put(ip, 4, short(ip.len() - 40 + body_len));
        }
    }

    fn write_tcp(&self, tcp: &mut [u8], start: usize, payload_len: usize) {
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let offset = u32::from(short(start));
        tcp[4..8].copy_from_slice(&sequence.wrapping_add(offset).to_be_bytes());
        if start > 0 {
            tcp[13] &= !CWR;
        }
        if start + payload_len < self.payload.len() {
            tcp[13] &= !(FIN | PSH);
        }
    }

    fn write_checksum(&self, l4: &mut [u8], payload: &[u8]) {
        let at = self.kind.checksum_at();
        put(l4, at, 0);
        let Packet {
            source,
            destination,
            protocol,
            ..
        } = self.packet;
        let pseudo = pseudo_header_sum(source, destination, protocol, l4.len() + payload.len());
        let checksum = match !fold(pseudo + sum(l4) + sum(payload)) {
            // Zero says "none" in UDP (RFC 768).
            0 if self.kind == Kind::Udp => 0xffff,
            checksum => checksum,
        };
        put(l4, at, checksum);
    }

    const fn is_v4(&self) -> bool {
        self.packet.source.is_ipv4()
    }
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

fn short(length: usize) -> u16 {
    u16::try_from(length)
        .expect("invariant: IP held the whole packet below 64 KiB, and this is a part of it")
}

#[cfg(test)]
mod tests {
    use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;
    use crate::offload::checksum::{L4, inspect};

    fn super_frame(v6: bool, options: bool, payload: &[u8]) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let builder = if v6 {
            builder.ipv6([1; 16], [2; 16], 64)
        } else {
            builder.ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
        };
        let mut tcp = builder.tcp(1, 2, u32::MAX - 1000, 4).ack(5).psh().fin();
        if options {
            tcp = tcp.options_raw(&[1; 12]).unwrap();
        }
        let mut frame = Vec::new();
        tcp.write(&mut frame, payload).unwrap();
        let flags = if v6 { 14 + 40 } else { 14 + 20 } + 13;
        frame[flags] |= CWR;
        frame
    }

    proptest! {
        #[test]
        fn segments_are_whole_packets_that_make_up_the_super_frame(
            v6: bool, options: bool, mtu in 200u16..1500, len in 2000usize..20_000,
        ) {
            let payload: Vec<u8> = (0..=250).cycle().take(len).collect();
            let frame = super_frame(v6, options, &payload);
            let cut = SuperFrame::merged_by_peer(&frame, mtu).unwrap();
            let mut together = Vec::new();
            for index in 0..cut.count() {
                let mut headers = vec![0; cut.headers_len()];
                let part = cut.write_headers(index, &mut headers);
                let segment = [&headers, part].concat();
                prop_assert!(segment.len() <= 14 + usize::from(mtu));
                prop_assert_eq!(inspect(&segment), L4::Valid);
                let sliced = SlicedPacket::from_ethernet(&segment).unwrap();
                if let Some(etherparse::NetSlice::Ipv4(ip)) = &sliced.net {
                    prop_assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
                    prop_assert_eq!(usize::from(ip.header().identification()), index);
                }
                let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("TCP is gone") };
                prop_assert_eq!(tcp.sequence_number(), (u32::MAX - 1000).wrapping_add(u32::try_from(together.len()).unwrap()));
                let (first, last) = (index == 0, index + 1 == cut.count());
                prop_assert_eq!((tcp.cwr(), tcp.psh(), tcp.fin()), (first, last, last));
                together.extend_from_slice(tcp.payload());
            }
            prop_assert_eq!(together, payload);
        }

        #[test]
        fn hostile_frames_do_not_panic(mut frame in proptest::collection::vec(any::<u8>(), 60..3000), v6: bool, mtu: u16) {
            // Conformance H6: enough of it is right to get far.
            let good = super_frame(v6, false, &[0; 4]);
            frame[..40].copy_from_slice(&good[..40]);
            if let Ok(cut) = SuperFrame::merged_by_peer(&frame, mtu) {
                for index in 0..cut.count() {
                    cut.write_headers(index, &mut [0; MAX_HEADERS][..cut.headers_len()]);
                }
            }
        }
    }

    #[test]
    fn a_kernel_is_told_how_to_cut_it() {
        for (v6, family, headers) in [
            (false, Offload::GSO_TCPV4, 40),
            (true, Offload::GSO_TCPV6, 60),
        ] {
            let frame = super_frame(v6, false, &[0; 5000]);
            let offload = SuperFrame::merged_by_peer(&frame, 1450).unwrap().offload();
            assert_eq!(offload.gso_type, family | Offload::GSO_ECN);
            assert_eq!(
                (offload.gso_size, offload.hdr_len),
                (1450 - headers, 14 + headers)
            );
        }
    }

    #[test]
    fn what_can_not_be_cut_is_told_apart() {
        // Conformance H6: a data offset beyond the packet, or below the least.
        for offset in [0x00, 0x40] {
            let mut frame = super_frame(false, false, &[0; 2000]);
            frame[14 + 20 + 12] = offset;
            assert_eq!(
                SuperFrame::merged_by_peer(&frame, 1450).unwrap_err(),
                DropReason::Malformed,
                "{offset:#x}"
            );
        }
        let frame = super_frame(false, true, &[0; 2000]);
        assert_eq!(
            SuperFrame::merged_by_peer(&frame, 52).unwrap_err(),
            DropReason::SuperFrame
        );
        let mut udp = Vec::new();
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
            .udp(1, 2);
        builder.write(&mut udp, &[0; 2000]).unwrap();
        assert_eq!(
            SuperFrame::merged_by_peer(&udp, 1450).unwrap_err(),
            DropReason::Oversize
        );
    }

    #[test]
    fn udp_is_cut_as_a_container_asks() {
        for (v6, len) in [(false, 3000), (true, 2800), (true, 100)] {
            let payload: Vec<u8> = (0..=250).cycle().take(len).collect();
            let mut frame = Vec::new();
            let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
            let builder = if v6 {
                builder.ipv6([1; 16], [2; 16], 64)
            } else {
                builder.ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
            };
            builder.udp(1, 2).write(&mut frame, &payload).unwrap();
            let l4_at = if v6 { 54 } else { 34 };
            let offload = Offload {
                gso_type: Offload::GSO_UDP_L4,
                gso_size: 1400,
                ..Offload::partial(l4_at, 6)
            };
            let cut = SuperFrame::requested(&frame, &offload, 1450).unwrap();
            assert_eq!(
                (cut.count(), cut.headers_len()),
                (len.div_ceil(1400), usize::from(l4_at) + 8)
            );
            let mut together = Vec::new();
            for index in 0..cut.count() {
                let mut segment = vec![0; cut.headers_len()];
                let part = cut.write_headers(index, &mut segment);
                segment.extend(part);
                assert_eq!(inspect(&segment), L4::Valid);
                let sliced = SlicedPacket::from_ethernet(&segment).unwrap();
                let Some(TransportSlice::Udp(udp)) = sliced.transport else {
                    panic!("UDP is gone")
                };
                assert_eq!(usize::from(udp.length()), 8 + udp.payload().len());
                together.extend_from_slice(udp.payload());
            }
            assert_eq!(together, payload);
        }
    }

    #[test]
    fn a_vnet_header_that_does_not_fit_its_frame_is_refused() {
        // Conformance H7.
        let frame = super_frame(false, false, &[0; 3000]);
        let good = Offload {
            gso_type: Offload::GSO_TCPV4,
            gso_size: 1410,
            ..Offload::partial(34, 16)
        };
        assert!(SuperFrame::requested(&frame, &good, 1450).is_ok());
        for (bad, why) in [
            (
                Offload {
                    gso_type: Offload::GSO_TCPV6,
                    ..good
                },
                "other family",
            ),
            (
                Offload {
                    gso_type: Offload::GSO_UDP_L4,
                    ..good
                },
                "other protocol",
            ),
            (
                Offload {
                    gso_type: 3,
                    ..good
                },
                "a type that was never offered",
            ),
            (
                Offload {
                    gso_size: 0,
                    ..good
                },
                "segments of nothing",
            ),
            (
                Offload {
                    gso_size: 1411,
                    ..good
                },
                "segments above the MTU",
            ),
            (
                Offload {
                    gso_size: 1,
                    ..good
                },
                "a flood of segments",
            ),
            (
                Offload {
                    csum_start: 36,
                    ..good
                },
                "checksum from elsewhere",
            ),
            (
                Offload {
                    csum_offset: 6,
                    ..good
                },
                "checksum to elsewhere",
            ),
            (Offload { flags: 0, ..good }, "no checksum"),
        ] {
            let refused = SuperFrame::requested(&frame, &bad, 1450);
            assert_eq!(refused.unwrap_err(), DropReason::BadOffload, "{why}");
        }
        let empty = super_frame(false, false, &[]);
        let refused = SuperFrame::requested(&empty, &good, 1450);
        assert_eq!(refused.unwrap_err(), DropReason::BadOffload);
    }
}
