//! What goes to other hosts: ordinary frames in runs, super-frames cut to segments.
//!
//! ```text
//! run           | VXLAN frame | VXLAN frame, padding | …            one message for one remote, source port and outer fields
//! super-frame   | VXLAN headers 0 | payload 0 | VXLAN headers 1 | payload 1 | …
//! ```
//!
//! Datagrams of a run are of one length, the last may be shorter; the underlay sends it as one message (`UDP_SEGMENT`). IP frames
//! of a run that are shorter are padded, as Ethernet frames may be: every receiver cuts an IP packet to its own length. A message
//! costs far more than some bytes, as long as packets are small, so padding is bounded by a share of the run ([`PADDED_MAX`]).
//!
//! Payload is never copied: it lies in the buffers that the batch was read into. Headers of segments are written into one buffer.

use std::io::IoSlice;
use std::net::SocketAddr;

use super::BATCH;
use super::ledger::Ledger;
use crate::Vni;
use crate::edge::{Datagram, OuterFields, Refusal, SendReport, Underlay};
use crate::flow::source_port_index;
use crate::frame::FrameBuf;
use crate::offload::segment::{MAX_HEADERS, SuperFrame};
use crate::settings::DEFAULT_TTL;
use crate::vxlan::{HEADER_LEN, Header};

/// Datagrams collected before they are sent although the batch goes on: a flood to many hosts must not pile up.
const SENDS_MAX: usize = 1024;
/// Segments whose headers are written at once: all of a 64 KiB frame at an MTU of 1,450 or more.
const SEGMENTS: usize = 64;

/// How many bytes a padded run may take for each 100 of its frames.
const PADDED_MAX: usize = 150;
/// What is put behind frames.
static PADDING: [u8; 1_500] = [0; 1_500];

/// A frame of the batch that goes to a remote.
#[derive(Clone, Copy)]
pub(super) struct Outgoing {
    pub(super) frame: usize,
    pub(super) to: SocketAddr,
    pub(super) flow: u32,
    pub(super) outer: OuterFields,
}

/// What has been collected for other hosts.
pub(super) struct Sends {
    list: Vec<Outgoing>,
    headers: Box<[u8]>,
    /// What the path does not carry; of a batch that has more only the first are kept.
    too_big: Vec<Outgoing>,
}

impl Sends {
    pub(super) fn new() -> Self {
        Self {
            list: Vec::with_capacity(SENDS_MAX),
            headers: vec![0; SEGMENTS * (HEADER_LEN + MAX_HEADERS)].into_boxed_slice(),
            too_big: Vec::with_capacity(BATCH),
        }
    }

    /// Whether [`Self::flush`] is due.
    pub(super) const fn is_full(&self) -> bool {
        self.list.len() >= SENDS_MAX
    }

    /// Collects a frame whose VXLAN header has been written.
    pub(super) fn push(&mut self, outgoing: Outgoing) {
        self.list.push(outgoing);
    }

    /// Writes down that the path does not carry `datagram`, which is the frame of `outgoing` or the segments of it.
    pub(super) fn refuse(
        &mut self,
        outgoing: Outgoing,
        datagram: &Datagram<'_>,
        ledger: &Ledger<'_>,
    ) {
        let mut report = SendReport::default();
        report.refuse(0, datagram.count(), Refusal::TooBig);
        ledger.datagrams_sent(&[*datagram], &report);
        self.note_too_big(outgoing);
    }

    /// Remembers a frame whose sender should be told.
    pub(super) fn note_too_big(&mut self, outgoing: Outgoing) {
        if self.too_big.len() < self.too_big.capacity() {
            self.too_big.push(outgoing);
        }
    }

    /// Takes one of the frames whose senders should be told.
    pub(super) fn take_too_big(&mut self) -> Option<Outgoing> {
        self.too_big.pop()
    }

    /// Sends what was collected, each flow in its order, and forgets it.
    pub(super) fn flush<U: Underlay>(
        &mut self,
        underlay: &mut U,
        frames: &[FrameBuf],
        ledger: &Ledger<'_>,
    ) {
        // Brings together what can be a run; one flow's frames have one source port and one remote.
        self.list.sort_unstable_by_key(|outgoing| {
            (
                source_port_index(outgoing.flow),
                outgoing.to,
                outgoing.frame,
            )
        });
        let cuts = underlay.cuts_messages();
        for batch in self.list.chunks(BATCH) {
            let mut slices = [IoSlice::new(&[]); 2 * BATCH];
            // Of each run: the first frame, where its slices end, and the length of its datagrams.
            let mut runs = [(0, 0, 0); BATCH];
            let (mut runs_used, mut slices_used, mut start) = (0, 0, 0);
            while start < batch.len() {
                let (end, size) = if cuts && batch[start].outer.checksum {
                    run(frames, batch, start)
                } else {
                    (start + 1, 0)
                };
                for (index, outgoing) in (start..end).zip(&batch[start..end]) {
                    let payload = frames[outgoing.frame].datagram();
                    slices[slices_used] = IoSlice::new(payload);
                    slices_used += 1;
                    if payload.len() < size && index + 1 < end {
                        let padding = &PADDING[..size - payload.len()];
                        slices[slices_used] = IoSlice::new(padding);
                        slices_used += 1;
                    }
                }
                let segment_size = if end - start > 1 { size } else { 0 };
                runs[runs_used] = (start, slices_used, segment_size);
                runs_used += 1;
                start = end;
            }
            let mut datagrams = [NOTHING; BATCH];
            let mut from = 0;
            for (datagram, &(first, end, size)) in datagrams.iter_mut().zip(&runs[..runs_used]) {
                let first = &batch[first];
                *datagram = Datagram {
                    to: first.to,
                    flow: first.flow,
                    outer: first.outer,
                    segment_size: u16::try_from(size).ok().filter(|size| *size > 0),
                    slices: &slices[from..end],
                };
                from = end;
            }
            let report = send(underlay, &datagrams[..runs_used], ledger);
            if report.too_big > 0 {
                let starts = runs[..runs_used].iter().map(|run| run.0);
                let ends = starts.clone().skip(1).chain([batch.len()]);
                for (index, (start, end)) in starts.zip(ends).enumerate() {
                    if report.refusal(index) == Some(Refusal::TooBig) {
                        let room = self.too_big.capacity() - self.too_big.len();
                        self.too_big.extend(batch[start..end].iter().take(room));
                    }
                }
            }
        }
        self.list.clear();
    }

    /// Cuts a super-frame and sends the segments to all of `remotes`. What was collected before must have been sent. Says whether
    /// the kernel refused any as too large for a path.
    pub(super) fn send_super<U: Underlay>(
        &mut self,
        underlay: &mut U,
        super_frame: &SuperFrame<'_>,
        like: &Datagram<'_>,
        (vni, remotes): (Vni, &[SocketAddr]),
        ledger: &Ledger<'_>,
    ) -> bool {
        let mut too_big = false;
        let headers_len = HEADER_LEN + super_frame.headers_len();
        let segment_size = u16::try_from(headers_len + super_frame.segment_len()).ok();
        let count = super_frame.count();
        for start in (0..count).step_by(SEGMENTS) {
            let segments = SEGMENTS.min(count - start);
            let mut payloads = [&[][..]; SEGMENTS];
            for (index, space) in self
                .headers
                .chunks_exact_mut(headers_len)
                .take(segments)
                .enumerate()
            {
                let (header, rest) = space.split_at_mut(HEADER_LEN);
                header.copy_from_slice(&Header::emit(vni));
                payloads[index] = super_frame.write_headers(start + index, rest);
            }
            let mut slices = [IoSlice::new(&[]); 2 * SEGMENTS];
            for ((pair, headers), payload) in slices
                .chunks_exact_mut(2)
                .zip(self.headers.chunks_exact(headers_len))
                .zip(&payloads[..segments])
            {
                pair.copy_from_slice(&[IoSlice::new(headers), IoSlice::new(payload)]);
            }
            for &to in remotes {
                let datagram = Datagram {
                    to,
                    segment_size: segment_size.filter(|_| segments > 1),
                    slices: &slices[..2 * segments],
                    ..*like
                };
                too_big |= send(underlay, &[datagram], ledger).too_big > 0;
            }
        }
        too_big
    }
}

/// A datagram to fill arrays with.
pub(super) const NOTHING: Datagram<'static> = Datagram {
    to: SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0),
    flow: 0,
    outer: OuterFields {
        class: 0,
        ttl: DEFAULT_TTL.get(),
        checksum: true,
    },
    segment_size: None,
    slices: &[],
};

/// Where the run that starts at `start` ends, and the length of its datagrams: frames for one remote by one source port with equal
/// outer fields.
fn run(frames: &[FrameBuf], batch: &[Outgoing], start: usize) -> (usize, usize) {
    let buf = |outgoing: &Outgoing| &frames[outgoing.frame];
    let first = &batch[start];
    let mut size = buf(first).datagram().len();
    // Of all frames; the shortest of those that have been taken; whether all of them may be padded.
    let (mut bytes, mut least, mut paddable) = (size, size, can_be_padded(buf(first).frame()));
    let mut end = start + 1;
    while let Some(next) = batch.get(end)
        && next.to == first.to
        && source_port_index(next.flow) == source_port_index(first.flow)
        && next.outer == first.outer
    {
        let len = buf(next).datagram().len();
        let longest = size.max(len);
        // All before this one become as long as the longest; this one may stay shorter, if it is the last.
        let even = least == longest;
        let few = longest * (end - start + 1) * 100 <= (bytes + len) * PADDED_MAX;
        let padded = paddable && few && longest - least <= PADDING.len();
        if !(even || padded) {
            break;
        }
        paddable &= can_be_padded(buf(next).frame());
        (size, bytes, least) = (longest, bytes + len, least.min(len));
        end += 1;
    }
    (end, size)
}

/// Whether its receiver finds the end of what is in a frame, whatever follows: an IP packet says how long it is.
fn can_be_padded(frame: &[u8]) -> bool {
    matches!(frame.get(12..14), Some([0x08, 0x00] | [0x86, 0xdd]))
}

/// Gives datagrams to the underlay and writes down what became of them.
fn send<U: Underlay>(
    underlay: &mut U,
    datagrams: &[Datagram<'_>],
    ledger: &Ledger<'_>,
) -> SendReport {
    let report = underlay.send(datagrams).unwrap_or_else(|error| {
        tracing::debug!(%error, "can't send to the underlay");
        SendReport::all_failed(datagrams.iter().map(Datagram::count))
    });
    ledger.datagrams_sent(datagrams, &report);
    report
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;
    use crate::edge::Offload;
    use crate::testing::{MemoryUnderlay, Wire};

    fn to(host: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, host], 4789))
    }

    fn udp(len: usize) -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
            .udp(1, 2)
            .write(&mut frame, &vec![7; len])
            .unwrap();
        frame
    }

    /// What an underlay is handed: remote, segment size and length of each message.
    #[derive(Default)]
    struct Recorder {
        messages: Vec<(SocketAddr, Option<u16>, usize)>,
        /// Where the slices of each message lie.
        places: Vec<Vec<usize>>,
        cuts: bool,
    }

    impl Underlay for Recorder {
        fn recv(&mut self, _: &mut [crate::frame::DatagramBuf]) -> std::io::Result<usize> {
            Ok(0)
        }

        fn send(&mut self, datagrams: &[Datagram<'_>]) -> std::io::Result<SendReport> {
            self.messages.extend(
                datagrams
                    .iter()
                    .map(|datagram| (datagram.to, datagram.segment_size, datagram.len())),
            );
            let places = datagrams.iter().map(|datagram| {
                let slices = datagram.slices.iter();
                slices.map(|slice| slice.as_ptr().addr()).collect()
            });
            self.places.extend(places);
            Ok(SendReport {
                sent: datagrams.iter().map(Datagram::count).sum(),
                ..SendReport::default()
            })
        }

        fn cuts_messages(&self) -> bool {
            self.cuts
        }

        fn as_raw_fd(&self) -> Option<std::os::fd::RawFd> {
            None
        }
    }

    fn flush<U: Underlay>(underlay: &mut U, list: &[(SocketAddr, Vec<u8>)]) {
        let vni = Vni::new(7).unwrap();
        let mut sends = Sends::new();
        let frames: Vec<_> = list
            .iter()
            .map(|(_, frame)| {
                let mut buf = FrameBuf::new();
                buf.space()[..frame.len()].copy_from_slice(frame);
                buf.set_frame(frame.len(), Offload::default());
                buf.set_header(&Header::emit(vni));
                buf
            })
            .collect();
        for (frame, &(to, _)) in list.iter().enumerate() {
            sends.push(Outgoing {
                frame,
                to,
                flow: 0,
                outer: OuterFields::default(),
            });
        }
        let counters = crate::stats::WorkerCounters::new();
        let tables = crate::fdb::TableWriter::new().shared().load_full();
        let ledger = Ledger::new(&counters, &tables, 0, None, None);
        sends.flush(underlay, &frames, &ledger);
        let sum = crate::stats::Counters::sum([&std::sync::Arc::new(counters)]);
        assert_eq!(sum.datagrams_out, list.len() as u64);
    }

    fn messages(list: &[(SocketAddr, Vec<u8>)]) -> Vec<(SocketAddr, Option<u16>, usize)> {
        let mut recorder = Recorder {
            cuts: true,
            ..Recorder::default()
        };
        flush(&mut recorder, list);
        recorder.messages
    }

    #[test]
    fn without_cutting_each_frame_is_a_message_and_none_is_padded() {
        let mut recorder = Recorder::default();
        let list = [60, 100, 100].map(|len| (to(1), udp(len)));
        flush(&mut recorder, &list);
        let lens = recorder.messages.iter().map(|(_, size, len)| (*size, *len));
        assert_eq!(
            lens.collect::<Vec<_>>(),
            [(None, 110), (None, 150), (None, 150)]
        );
    }

    #[test]
    fn a_flood_is_encoded_once_for_all_remotes() {
        // Conformance V16: head-end replication lends every message the same bytes.
        let vni = Vni::new(7).unwrap();
        let (counters, tables) = (
            crate::stats::WorkerCounters::new(),
            crate::fdb::TableWriter::new().shared().load_full(),
        );
        let ledger = Ledger::new(&counters, &tables, 0, None, None);
        let mut recorder = Recorder::default();
        let mut sends = Sends::new();
        let mut buf = FrameBuf::new();
        let frame = udp(100);
        buf.space()[..frame.len()].copy_from_slice(&frame);
        buf.set_frame(frame.len(), Offload::default());
        buf.set_header(&Header::emit(vni));
        for number in 1..=100 {
            sends.push(Outgoing {
                frame: 0,
                to: to(number),
                flow: 0,
                outer: OuterFields::default(),
            });
        }
        sends.flush(&mut recorder, &[buf], &ledger);
        assert_eq!(recorder.messages.len(), 100);
        recorder.places.dedup();
        assert_eq!(recorder.places.len(), 1, "one frame, in one place");

        // A super-frame's headers are written once, and its payload stays where it is.
        let frame = udp(60 * 1_000);
        let offload = Offload {
            gso_type: Offload::GSO_UDP_L4,
            gso_size: 1_000,
            ..Offload::partial(34, 6)
        };
        let super_frame = SuperFrame::requested(&frame, &offload, 1_450).unwrap();
        let remotes: Vec<_> = (1..=100).map(to).collect();
        let mut recorder = Recorder::default();
        sends.send_super(
            &mut recorder,
            &super_frame,
            &NOTHING,
            (vni, &remotes),
            &ledger,
        );
        assert_eq!(recorder.messages.len(), 100);
        recorder.places.dedup();
        assert_eq!(recorder.places.len(), 1);
    }

    #[test]
    fn equal_frames_for_one_remote_are_one_message() {
        let list: Vec<_> = (0..6).map(|n| (to(1 + n % 2), udp(100))).collect();
        assert_eq!(
            messages(&list),
            [(to(1), Some(150), 450), (to(2), Some(150), 450)]
        );
        assert_eq!(messages(&[(to(1), udp(100))]), [(to(1), None, 150)]);
        let shorter = [(to(1), udp(100)), (to(1), udp(10))];
        assert_eq!(messages(&shorter), [(to(1), Some(150), 210)]);
    }

    #[test]
    fn padding_is_bounded_and_only_for_ip() {
        // 110 + 150 + 130 bytes: the first is padded, the last need not be.
        let near = [60, 100, 80].map(|len| (to(1), udp(len)));
        assert_eq!(messages(&near), [(to(1), Some(150), 430)]);
        // 60 bytes would become 1,000.
        let far = [10, 950].map(|len| (to(1), udp(len)));
        assert_eq!(messages(&far), [(to(1), None, 60), (to(1), None, 1000)]);
        let mut other = udp(60);
        other[12] = 0x99;
        let unknown = [(to(1), other), (to(1), udp(100))];
        assert_eq!(messages(&unknown), [(to(1), None, 110), (to(1), None, 150)]);
    }

    #[test]
    fn padded_frames_keep_their_order_and_their_bytes() {
        let wire = Wire::new(1);
        let mut underlay: MemoryUnderlay = wire.underlay(to(9));
        let lens: Vec<usize> = (0..200).map(|n| 64 + n * 37 % 199).collect();
        let list: Vec<_> = lens.iter().map(|len| (to(1), udp(*len))).collect();
        flush(&mut underlay, &list);
        let seen = wire.take_seen();
        assert_eq!(seen.len(), list.len());
        let (mut sent, mut padded) = (0, 0);
        for (seen, (_, frame)) in seen.iter().zip(&list) {
            let (inner, padding) = seen.payload[HEADER_LEN..].split_at(frame.len());
            assert_eq!(inner, frame);
            assert!(padding.iter().all(|byte| *byte == 0));
            sent += frame.len() + HEADER_LEN;
            padded += seen.payload.len();
        }
        assert!(padded > sent && padded * 100 <= sent * PADDED_MAX);
    }
}
