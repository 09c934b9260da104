//! TCP packets larger than the MTU ("super-frames"), cut to segments as a network card with TSO would.
//!
//! ```text
//! super-frame   | Ethernet | IP | TCP | payload ………………………………… |
//! segment i     | copy, lengths, id, sequence, flags, checksums | payload[i·size .. (i+1)·size] |
//! ```
//!
//! Only headers are written, into a buffer of the caller's; the payload is lent from the super-frame. A peer on a veth
//! or virtio link hands such frames over because it believes that a card will cut them.

use crate::edge::Offload;
use crate::ethernet::Frame;
use crate::ip::{Packet, protocol, pseudo_header_sum};
use crate::offload::checksum::{fold, sum};
use crate::stats::DropReason;

/// The longest headers that are cut: Ethernet with two tags, IP with options or extensions, and the longest TCP header.
pub const MAX_HEADERS: usize = 256;

/// TCP's flags in the 14th byte of its header (RFC 9293 §3.1).
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// A TCP packet to be cut, its headers checked.
#[derive(Clone, Copy, Debug)]
pub struct SuperFrame<'a> {
    headers: &'a [u8],
    payload: &'a [u8],
    packet: Packet<'a>,
    ip_at: usize,
    tcp_at: usize,
    segment_len: usize,
}

impl<'a> SuperFrame<'a> {
    /// Looks at a frame that is too large for `mtu`.
    ///
    /// # Errors
    /// [`DropReason::Oversize`] when it is not TCP, which alone is merged without being asked for; [`DropReason::Malformed`]
    /// when its headers lie; [`DropReason::SuperFrame`] when they leave no room for payload.
    pub fn parse(frame: &'a [u8], mtu: u16) -> Result<Self, DropReason> {
        let view = Frame::parse(frame).ok_or(DropReason::Malformed)?;
        let packet = Packet::parse(&view)
            .ok()
            .flatten()
            .ok_or(DropReason::Malformed)?;
        if packet.protocol != protocol::TCP {
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
        let ip_at = view.payload_offset();
        let tcp_at = ip_at + packet.body_offset;
        let headers = &frame[..tcp_at + tcp_len];
        let room = usize::from(mtu).saturating_sub(packet.body_offset + tcp_len);
        if room == 0 || headers.len() > MAX_HEADERS {
            return Err(DropReason::SuperFrame);
        }
        let payload = &packet.body[tcp_len..];
        Ok(Self {
            headers,
            payload,
            packet,
            ip_at,
            tcp_at,
            segment_len: room,
        })
    }

    /// Has a kernel cut it. `partial` says where the checksum is.
    #[must_use]
    pub fn offload(&self, partial: Offload) -> Offload {
        // RFC 3168 §6.1.2: CWR stands on the first segment only, which the ECN bit asks for.
        let congestion = if self.flags() & CWR == 0 {
            0
        } else {
            Offload::GSO_ECN
        };
        let family = if self.is_v4() {
            Offload::GSO_TCPV4
        } else {
            Offload::GSO_TCPV6
        };
        let short = |length: usize| {
            u16::try_from(length).expect("invariant: parse held it below an MTU or MAX_HEADERS")
        };
        Offload {
            gso_type: family | congestion,
            gso_size: short(self.segment_len),
            hdr_len: short(self.headers.len()),
            ..partial
        }
    }

    /// How many segments there are.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.payload.len().div_ceil(self.segment_len)
    }

    /// Writes the headers of segment `index` into `space`, and returns them with the segment's payload.
    ///
    /// # Panics
    /// When `index` is not below [`Self::count`].
    pub fn segment<'s>(
        &self,
        index: usize,
        space: &'s mut [u8; MAX_HEADERS],
    ) -> (&'s [u8], &'a [u8]) {
        let start = index * self.segment_len;
        let end = self.payload.len().min(start + self.segment_len);
        let payload = &self.payload[start..end];
        let headers = &mut space[..self.headers.len()];
        headers.copy_from_slice(self.headers);
        self.write_ip(&mut headers[self.ip_at..self.tcp_at], index, payload.len());
        self.write_tcp(&mut headers[self.tcp_at..], start, payload);
        (headers, payload)
    }

    fn write_ip(&self, ip: &mut [u8], index: usize, payload_len: usize) {
        let tcp_len = self.headers.len() - self.tcp_at;
        let put = |bytes: &mut [u8], at: usize, value: u16| {
            bytes[at..at + 2].copy_from_slice(&value.to_be_bytes())
        };
        let short = |length: usize| {
            u16::try_from(length).expect("invariant: a segment is shorter than its packet")
        };
        if self.is_v4() {
            let total = short(ip.len() + tcp_len + payload_len);
            put(ip, 2, total);
            // Each segment is a packet of its own, and counts on from the first (as tcp_gso_segment does).
            let id = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(short(index));
            put(ip, 4, id);
            put(ip, 10, 0);
            let checksum = !fold(sum(ip));
            put(ip, 10, checksum);
        } else {
            // RFC 8200 §3: the length of all that follows the fixed header of 40 bytes.
            let length = short(ip.len() - 40 + tcp_len + payload_len);
            put(ip, 4, length);
        }
    }

    fn write_tcp(&self, tcp: &mut [u8], start: usize, payload: &[u8]) {
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let offset = u32::try_from(start).expect("invariant: a packet is shorter than 64 KiB");
        tcp[4..8].copy_from_slice(&sequence.wrapping_add(offset).to_be_bytes());
        if start > 0 {
            tcp[13] &= !CWR;
        }
        if start + payload.len() < self.payload.len() {
            tcp[13] &= !(FIN | PSH);
        }
        tcp[16..18].fill(0);
        let Packet {
            source,
            destination,
            protocol,
            ..
        } = self.packet;
        let pseudo = pseudo_header_sum(source, destination, protocol, tcp.len() + payload.len());
        let checksum = !fold(pseudo + sum(tcp) + sum(payload));
        tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
    }

    const fn is_v4(&self) -> bool {
        self.packet.source.is_ipv4()
    }

    fn flags(&self) -> u8 {
        self.headers[self.tcp_at + 13]
    }
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
            let cut = SuperFrame::parse(&frame, mtu).unwrap();
            let mut together = Vec::new();
            for index in 0..cut.count() {
                let mut space = [0; MAX_HEADERS];
                let (headers, part) = cut.segment(index, &mut space);
                let segment = [headers, part].concat();
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
            if let Ok(cut) = SuperFrame::parse(&frame, mtu) {
                for index in 0..cut.count() {
                    cut.segment(index, &mut [0; MAX_HEADERS]);
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
            let offload = SuperFrame::parse(&frame, 1450)
                .unwrap()
                .offload(Offload::default());
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
                SuperFrame::parse(&frame, 1450).unwrap_err(),
                DropReason::Malformed,
                "{offset:#x}"
            );
        }
        let frame = super_frame(false, true, &[0; 2000]);
        assert_eq!(
            SuperFrame::parse(&frame, 52).unwrap_err(),
            DropReason::SuperFrame
        );
        let mut udp = Vec::new();
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
            .udp(1, 2);
        builder.write(&mut udp, &[0; 2000]).unwrap();
        assert_eq!(
            SuperFrame::parse(&udp, 1450).unwrap_err(),
            DropReason::Oversize
        );
    }
}
