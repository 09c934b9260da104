//! What goes to other hosts: ordinary frames in runs, super-frames cut to segments.
//!
//! ```text
//! run           | VXLAN frame | VXLAN frame | …                     one message for one remote, source port and ECN mark
//! super-frame   | VXLAN headers 0 | payload 0 | VXLAN headers 1 | payload 1 | …
//! ```
//!
//! Frames of a run are of one length, the last may be shorter; the underlay sends it as one message (`UDP_SEGMENT`). Payload is never
//! copied: it lies in the buffers that the batch was read into. Headers of segments are written into one buffer.

use std::io::IoSlice;
use std::net::SocketAddr;

use super::BATCH;
use super::delivery::count_drops;
use crate::Vni;
use crate::capture::{CaptureHub, Place};
use crate::ecn;
use crate::edge::{Datagram, SendReport, Underlay};
use crate::flow::source_port_index;
use crate::frame::FrameBuf;
use crate::offload::segment::{MAX_HEADERS, SuperFrame};
use crate::stats::{DropReason, WorkerCounters};
use crate::vxlan::{HEADER_LEN, Header};

/// Datagrams collected before they are sent although the batch goes on: a flood to many hosts must not pile up.
const SENDS_MAX: usize = 1024;
/// Segments whose headers are written at once: all of a 64 KiB frame at an MTU of 1,450 or more.
const SEGMENTS: usize = 64;

/// A frame of the batch that goes to a remote.
#[derive(Clone, Copy)]
pub(super) struct Outgoing {
    pub(super) frame: usize,
    pub(super) vni: Vni,
    pub(super) to: SocketAddr,
    pub(super) flow: u32,
}

/// What has been collected for other hosts.
pub(super) struct Sends {
    list: Vec<Outgoing>,
    headers: Box<[u8]>,
}

impl Sends {
    pub(super) fn new() -> Self {
        Self {
            list: Vec::with_capacity(SENDS_MAX),
            headers: vec![0; SEGMENTS * (HEADER_LEN + MAX_HEADERS)].into_boxed_slice(),
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

    /// Sends what was collected, each flow in its order, and forgets it.
    pub(super) fn flush<U: Underlay>(
        &mut self,
        underlay: &mut U,
        frames: &[FrameBuf],
        counters: &WorkerCounters,
        captures: Option<&CaptureHub>,
    ) {
        // Brings together what can be a run; one flow's frames have one source port and one remote.
        self.list.sort_unstable_by_key(|outgoing| {
            (
                source_port_index(outgoing.flow),
                outgoing.to,
                outgoing.frame,
            )
        });
        for batch in self.list.chunks(BATCH) {
            let mut slices = [IoSlice::new(&[]); BATCH];
            let mut bytes = 0;
            for (slice, outgoing) in slices.iter_mut().zip(batch) {
                let payload = frames[outgoing.frame].datagram();
                *slice = IoSlice::new(payload);
                bytes += payload.len();
            }
            let mut datagrams = [NOTHING; BATCH];
            let mut used = 0;
            let mut start = 0;
            while start < batch.len() {
                let first = &batch[start];
                let mark = ecn::of_frame(frames[first.frame].frame());
                let len = slices[start].len();
                let end = end_of_run(frames, batch, start, mark);
                datagrams[used] = Datagram {
                    to: first.to,
                    flow: first.flow,
                    ecn: mark,
                    segment_size: u16::try_from(len).ok().filter(|_| end - start > 1),
                    slices: &slices[start..end],
                };
                used += 1;
                start = end;
            }
            send(underlay, &datagrams[..used], batch.len(), bytes, counters);
            if let Some(captures) = captures {
                for Outgoing { frame, vni, to, .. } in batch {
                    captures.offer(Place::ToRemote(*to), *vni, frames[*frame].frame());
                }
            }
        }
        self.list.clear();
    }

    /// Cuts a super-frame and sends the segments to all of `remotes`. What was collected before must have been sent.
    pub(super) fn send_super<U: Underlay>(
        &mut self,
        underlay: &mut U,
        super_frame: &SuperFrame<'_>,
        like: &Datagram<'_>,
        (vni, remotes): (Vni, &[SocketAddr]),
        counters: &WorkerCounters,
    ) {
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
            let mut bytes = 0;
            for ((pair, headers), payload) in slices
                .chunks_exact_mut(2)
                .zip(self.headers.chunks_exact(headers_len))
                .zip(&payloads[..segments])
            {
                pair.copy_from_slice(&[IoSlice::new(headers), IoSlice::new(payload)]);
                bytes += headers.len() + payload.len();
            }
            for &to in remotes {
                let datagram = Datagram {
                    to,
                    segment_size: segment_size.filter(|_| segments > 1),
                    slices: &slices[..2 * segments],
                    ..*like
                };
                send(underlay, &[datagram], segments, bytes, counters);
            }
        }
    }
}

/// A datagram to fill arrays with.
pub(super) const NOTHING: Datagram<'static> = Datagram {
    to: SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0),
    flow: 0,
    ecn: 0,
    segment_size: None,
    slices: &[],
};

/// Where the run that starts at `start` ends: frames for one remote by one source port with one mark, none longer than the first,
/// and only the last shorter.
fn end_of_run(frames: &[FrameBuf], batch: &[Outgoing], start: usize, mark: u8) -> usize {
    let len = |outgoing: &Outgoing| frames[outgoing.frame].frame().len();
    let first = &batch[start];
    let mut end = start + 1;
    while let Some(next) = batch.get(end)
        && len(&batch[end - 1]) == len(first)
        && len(next) <= len(first)
        && next.to == first.to
        && source_port_index(next.flow) == source_port_index(first.flow)
        && ecn::of_frame(frames[next.frame].frame()) == mark
    {
        end += 1;
    }
    end
}

/// Gives datagrams to the underlay and counts what became of the `count` that they are cut into.
fn send<U: Underlay>(
    underlay: &mut U,
    datagrams: &[Datagram<'_>],
    count: usize,
    bytes: usize,
    counters: &WorkerCounters,
) {
    let report = underlay.send(datagrams).unwrap_or_else(|error| {
        tracing::debug!(%error, "can't send to the underlay");
        SendReport {
            failed: count,
            ..SendReport::default()
        }
    });
    counters.datagrams_out(report.sent as u64);
    // Which ones failed is not said; where some did, their share is taken off.
    counters.datagram_bytes_out(bytes as u64 * report.sent as u64 / count as u64);
    count_drops(
        counters,
        &report,
        [
            DropReason::PathTooSmall,
            DropReason::UnderlayFull,
            DropReason::UnderlayFailed,
        ],
    );
}
