//! What a whole worker carries while it is measured, on the tables of [`Fixture`].

use vtep::MacAddr;
use vtep::edge::Offload;
use vtep::testing::Merged;
use vtep::vxlan::Header;

use crate::fixture::{COUNT, Fixture, OWN};

/// Bytes of payload in the small ones.
const SMALL: usize = 64;
/// Payload of each segment of a super-frame: what an MTU of 1,450 leaves behind IPv4's and TCP's headers.
const SEGMENT: usize = 1_410;
/// Super-frames in one measurement, and segments in each: 62,040 bytes of payload.
pub(crate) const SUPER_FRAMES: usize = 16;
pub(crate) const SEGMENTS: usize = 44;

/// A thousand frames with 64 bytes of payload and a partial checksum, of one flow to one endpoint.
pub(crate) fn small_frames(fixture: &Fixture) -> Vec<(Vec<u8>, Offload)> {
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2(OWN.octets(), fixture.macs[0].octets())
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .udp(1, 2)
        .write(&mut frame, &[7; SMALL])
        .expect("a small frame");
    vec![(frame, Offload::partial(34, 6)); COUNT]
}

/// A thousand datagrams with 64 bytes of inner payload, in the buffers that `UDP_GRO` would give.
pub(crate) fn small_datagrams(fixture: &Fixture) -> Vec<Merged> {
    const MERGED: usize = 50;
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2(fixture.macs[0].octets(), OWN.octets())
        .ipv4([10, 0, 0, 2], [10, 0, 0, 1], 64)
        .udp(1, 2)
        .write(&mut frame, &[7; SMALL])
        .expect("a small frame");
    let payload = [&Header::emit(fixture.vni)[..], &frame].concat();
    let size = u16::try_from(payload.len()).expect("a small datagram");
    let buffer = (fixture.datagrams[0].0, payload.repeat(MERGED), Some(size));
    vec![buffer; COUNT / MERGED]
}

/// TCP super-frames to one endpoint.
pub(crate) fn super_frames(fixture: &Fixture) -> Vec<(Vec<u8>, Offload)> {
    let frame = tcp(OWN, fixture.macs[0], 1, SEGMENT * SEGMENTS);
    let offload = Offload {
        gso_type: Offload::GSO_TCPV4,
        gso_size: u16::try_from(SEGMENT).expect("below an MTU"),
        ..Offload::partial(34, 16)
    };
    vec![(frame, offload); SUPER_FRAMES]
}

/// The segments of such super-frames from that endpoint, each super-frame's in one buffer.
pub(crate) fn super_datagrams(fixture: &Fixture) -> Vec<Merged> {
    let segments: Vec<u8> = (0..SEGMENTS)
        .flat_map(|number| {
            let sequence = u32::try_from(number * SEGMENT).expect("below 64 KiB");
            let frame = tcp(fixture.macs[0], OWN, sequence, SEGMENT);
            [&Header::emit(fixture.vni)[..], &frame].concat()
        })
        .collect();
    let size = u16::try_from(segments.len() / SEGMENTS).expect("below an MTU");
    vec![(fixture.datagrams[0].0, segments, Some(size)); SUPER_FRAMES]
}

fn tcp(source: MacAddr, destination: MacAddr, sequence: u32, payload: usize) -> Vec<u8> {
    let last = |mac: MacAddr| if mac == OWN { 1 } else { 2 };
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2(source.octets(), destination.octets())
        .ipv4([10, 0, 0, last(source)], [10, 0, 0, last(destination)], 64)
        .tcp(1, 2, sequence, 1_000)
        .ack(1)
        .write(&mut frame, &vec![7; payload])
        .expect("a TCP frame");
    frame
}
