//! Merging against cutting, and against etherparse.

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;
use crate::offload::checksum::{L4, inspect};
use crate::offload::segment::SuperFrame;

/// One flow's segments: what differs between them is only what must.
#[derive(Clone, Copy, Debug)]
struct Sender {
    v6: bool,
    tcp: bool,
    port: u16,
    sequence: u32,
}

impl Sender {
    fn frame(&mut self, psh: bool, payload: &[u8]) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let builder = if self.v6 {
            builder.ipv6([1; 16], [2; 16], 64)
        } else {
            builder.ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
        };
        let mut frame = Vec::new();
        if self.tcp {
            let mut tcp = builder
                .tcp(self.port, 2, self.sequence, 4)
                .ack(5)
                .options_raw(&[1; 12])
                .unwrap();
            if psh {
                tcp = tcp.psh();
            }
            tcp.write(&mut frame, payload).unwrap();
            let len = u32::try_from(payload.len()).unwrap();
            self.sequence = self.sequence.wrapping_add(len);
        } else {
            builder
                .udp(self.port, 2)
                .write(&mut frame, payload)
                .unwrap();
        }
        frame
    }
}

const TCP: Sender = Sender {
    v6: false,
    tcp: true,
    port: 1,
    sequence: u32::MAX - 5000,
};
const UDP: Sender = Sender { tcp: false, ..TCP };

/// Merges frames, all of port 7, and gives what comes out as bytes.
fn merge(frames: &[Vec<u8>], features: TapFeatures) -> Vec<(Vec<u8>, Offload)> {
    let mut coalescer = Coalescer::new();
    for (buffer, frame) in frames.iter().enumerate() {
        let span = Span {
            buffer,
            start: 0,
            len: frame.len(),
        };
        let offload = Offload {
            flags: Offload::DATA_VALID,
            ..Offload::default()
        };
        coalescer.push(7, span, frame, offload, features);
    }
    let count = coalescer.len();
    let merged: Vec<_> = coalescer
        .finish()
        .map(|merged| {
            assert_eq!(merged.port, 7);
            let offload = merged.offload;
            let mut bytes = merged.headers.to_vec();
            for Span { buffer, start, len } in merged {
                bytes.extend(&frames[buffer][start..start + len]);
            }
            (bytes, offload)
        })
        .collect();
    assert_eq!(merged.len(), count);
    merged
}

/// Cuts what was merged again, as the container's kernel would; frames that were not stay as they are.
fn cut(merged: &[(Vec<u8>, Offload)]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for (frame, offload) in merged {
        if !offload.is_gso() {
            frames.push(frame.clone());
            continue;
        }
        let super_frame = SuperFrame::requested(frame, offload, u16::MAX).unwrap();
        assert_eq!(super_frame.offload(), *offload);
        for index in 0..super_frame.count() {
            let mut segment = vec![0; super_frame.headers_len()];
            let payload = super_frame.write_headers(index, &mut segment);
            segment.extend(payload);
            frames.push(segment);
        }
    }
    frames
}

/// IPv4 identifications are counted on when a packet is cut, so they alone may differ.
fn without_id(mut frame: Vec<u8>) -> Vec<u8> {
    if frame[12] == 8 {
        frame[18..20].fill(0);
        frame[24..26].fill(0);
    }
    frame
}

fn sizes(frames: &[Vec<u8>]) -> Vec<usize> {
    merge(frames, TapFeatures::ALL)
        .iter()
        .map(|(frame, _)| frame.len())
        .collect()
}

proptest! {
    #[test]
    fn cutting_what_was_merged_gives_the_same_frames(
        steps in prop::collection::vec((0..4usize, any::<bool>(), 0..4usize), 1..200),
    ) {
        // Four flows in any mixture, with payloads of few different lengths.
        let mut senders = [
            TCP,
            Sender { v6: true, ..TCP },
            UDP,
            Sender { v6: true, ..UDP },
        ];
        let mut frames = Vec::new();
        let mut of_flow = [const { Vec::new() }; 4];
        for (number, (sender, psh, length)) in steps.into_iter().enumerate() {
            let payload = vec![u8::try_from(number % 251).unwrap(); [1, 700, 1400, 0][length]];
            let frame = senders[sender].frame(psh, &payload);
            of_flow[sender].push(without_id(frame.clone()));
            frames.push(frame);
        }
        let merged = merge(&frames, TapFeatures::ALL);
        prop_assert!(merged.len() <= frames.len());
        let mut again = [const { Vec::new() }; 4];
        for frame in cut(&merged) {
            prop_assert_eq!(inspect(&frame), L4::Valid);
            let flow = usize::from(frame[12] == 0x86) + 2 * usize::from(frame[if frame[12] == 8 { 23 } else { 20 }] == 17);
            again[flow].push(without_id(frame));
        }
        prop_assert_eq!(again, of_flow);
    }

    #[test]
    fn headers_of_merged_frames_are_right(v6: bool, tcp: bool, count in 2usize..40, len in 1usize..1400, rest in 0usize..1400) {
        let mut sender = Sender { v6, tcp, ..TCP };
        let mut frames: Vec<_> = (0..count).map(|_| sender.frame(false, &vec![9; len])).collect();
        frames.push(sender.frame(true, &vec![8; rest.clamp(1, len)]));
        let merged = merge(&frames, TapFeatures::ALL);
        prop_assert_eq!(merged.len(), 1);
        let (frame, offload) = &merged[0];
        prop_assert_eq!(usize::from(offload.gso_size), len);
        let sliced = SlicedPacket::from_ethernet(frame).unwrap();
        let total = count * len + rest.clamp(1, len);
        match (&sliced.net, &sliced.transport) {
            (Some(etherparse::NetSlice::Ipv4(ip)), _) => {
                let header = ip.header();
                prop_assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            }
            (net, _) => prop_assert!(net.is_some()),
        }
        match sliced.transport {
            Some(TransportSlice::Tcp(tcp)) => {
                prop_assert_eq!((tcp.payload().len(), tcp.psh()), (total, true));
            }
            Some(TransportSlice::Udp(udp)) => prop_assert_eq!(udp.payload().len(), total),
            _ => prop_assert!(false, "the upper layer is gone"),
        }
        // Only the pseudo-header's sum, which completing makes right.
        let mut frame = frame.clone();
        let at = offload.csum_start;
        prop_assert!(crate::offload::checksum::complete(&mut frame, at, offload.csum_offset));
        prop_assert_eq!(inspect(&frame), L4::Valid);
    }

    #[test]
    fn anything_comes_out_as_it_went_in(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..50), keep in 0..60usize) {
        let mut sender = TCP;
        let frames: Vec<_> = frames.into_iter().map(|noise| {
            // Much of it is right, so that it gets far.
            let mut frame = sender.frame(false, &noise);
            let keep = keep.min(noise.len());
            frame.truncate(frame.len() - keep);
            frame.splice(frame.len() - frame.len().min(keep).., noise.iter().copied());
            frame
        }).collect();
        let merged = merge(&frames, TapFeatures::ALL);
        let total: usize = merged.iter().map(|(frame, _)| frame.len()).sum();
        prop_assert!(total <= frames.iter().map(Vec::len).sum());
    }
}

#[test]
fn flows_are_merged_side_by_side_and_by_port() {
    let (mut one, mut other) = (TCP, UDP);
    let frames: Vec<_> = (0..10)
        .flat_map(|_| [one.frame(false, &[1; 100]), other.frame(false, &[2; 50])])
        .collect();
    assert_eq!(sizes(&frames), [66 + 1000, 42 + 500]);
    let mut coalescer = Coalescer::new();
    for (buffer, frame) in [UDP, UDP]
        .map(|mut udp| udp.frame(false, b"x"))
        .iter()
        .enumerate()
    {
        let span = Span {
            buffer,
            start: 0,
            len: frame.len(),
        };
        coalescer.push(buffer, span, frame, Offload::default(), TapFeatures::ALL);
    }
    assert_eq!(coalescer.len(), 2);
}

#[test]
fn what_differs_is_not_merged() {
    let mut sender = TCP;
    let first = sender.frame(false, &[1; 100]);
    let next = sender.frame(false, &[1; 100]);
    assert_eq!(sizes(&[first.clone(), next.clone()]), [66 + 200]);
    // Ethernet, TOS, TTL, addresses, ports, sequence, ACK, flags, window, urgent, options.
    for at in [0, 6, 15, 22, 26, 30, 34, 37, 38, 42, 47, 48, 52, 54] {
        let mut changed = next.clone();
        changed[at] ^= if at == 47 { 0x01 } else { 0x04 };
        // The header's checksum is right again: it is not what keeps them apart.
        changed[24..26].fill(0);
        let checksum = !fold(sum(&changed[14..34]));
        put(&mut changed, 24, checksum);
        assert_eq!(sizes(&[first.clone(), changed]), [166, 166], "byte {at}");
    }
    let mut damaged = next.clone();
    damaged[24] ^= 1;
    assert_eq!(
        sizes(&[first.clone(), damaged]),
        [166, 166],
        "IPv4 checksum"
    );
    let mut padded = next.clone();
    padded.push(0);
    assert_eq!(sizes(&[first.clone(), padded]), [166, 167], "padding");
    let mut fragment = next.clone();
    fragment[20] = 0x20;
    assert_eq!(sizes(&[first.clone(), fragment, next.clone()]), [166; 3]);
    let ack = { TCP }.frame(false, &[]);
    assert_eq!(sizes(&[ack.clone(), ack]), [66, 66]);
    let mut unsummed = { UDP }.frame(false, b"x");
    unsummed[40..42].fill(0);
    assert_eq!(sizes(&[unsummed.clone(), unsummed]), [43, 43]);
}

#[test]
fn a_shorter_segment_or_psh_ends_it_and_a_longer_one_begins_anew() {
    let mut udp = UDP;
    let frames = [100, 100, 40, 40, 100, 100].map(|len| udp.frame(false, &vec![0; len]));
    assert_eq!(sizes(&frames), [42 + 240, 42 + 40, 42 + 200]);
    let mut tcp = TCP;
    let frames = [false, true, false, false].map(|psh| tcp.frame(psh, &[0; 10]));
    assert_eq!(sizes(&frames), [66 + 20, 66 + 20]);
}

#[test]
fn limits_hold() {
    let mut tcp = TCP;
    let frames: Vec<_> = (0..100).map(|_| tcp.frame(false, &[0; 1000])).collect();
    assert_eq!(sizes(&frames), [66 + 65_000, 66 + 35_000]);
    let frames: Vec<_> = (0..200).map(|_| tcp.frame(false, &[0; 10])).collect();
    assert_eq!(sizes(&frames), [66 + 1280, 66 + 720]);
    let frames: Vec<_> = (0..100).map(|_| { UDP }.frame(false, &[0; 10])).collect();
    assert_eq!(sizes(&frames), [42 + 640, 42 + 360]);
}

#[test]
fn a_port_gets_only_what_it_takes() {
    for (sender, features) in [
        (
            UDP,
            TapFeatures {
                udp: false,
                ..TapFeatures::ALL
            },
        ),
        (
            TCP,
            TapFeatures {
                tcp4: false,
                ..TapFeatures::ALL
            },
        ),
        (
            Sender { v6: true, ..TCP },
            TapFeatures {
                tcp6: false,
                ..TapFeatures::ALL
            },
        ),
    ] {
        let mut sender = sender;
        let frames = [sender.frame(false, b"a"), sender.frame(false, b"b")];
        assert_eq!(merge(&frames, features).len(), 2);
        assert_eq!(merge(&frames, TapFeatures::ALL).len(), 1);
    }
}

#[test]
fn a_whole_frame_keeps_its_place_in_its_flow() {
    let mut sender = TCP;
    let frames = [0; 3].map(|_| sender.frame(false, b"x"));
    let mut coalescer = Coalescer::new();
    for (buffer, frame) in frames.iter().enumerate() {
        let span = Span {
            buffer,
            start: 0,
            len: frame.len(),
        };
        if buffer == 1 {
            coalescer.push_whole(7, span, frame, Offload::default());
        } else {
            coalescer.push(7, span, frame, Offload::default(), TapFeatures::ALL);
        }
    }
    let order: Vec<_> = coalescer
        .finish()
        .map(|merged| merged.map(|span| span.buffer).collect::<Vec<_>>())
        .collect();
    assert_eq!(order, [[0], [1], [2]]);
}
