//! What a batch's verdicts ask for, collected and then handed to the edges in batches of slices.
//!
//! Nothing is copied but headers: the slices lie in the buffers that the batch was read into.

use std::io::IoSlice;
use std::net::SocketAddr;

use super::BATCH;
use crate::Vni;
use crate::capture::{CaptureHub, Place};
use crate::ecn;
use crate::edge::{Datagram, Offload, SendReport, Tap, TapFrame, Underlay};
use crate::fdb::{PortId, Tables};
use crate::frame::FrameBuf;
use crate::offload::segment::{MAX_HEADERS, SuperFrame};
use crate::stats::{DropReason, WorkerCounters};
use crate::tap::Backend;

/// A worker's queue of one port.
pub(super) struct PortQueue {
    pub(super) id: PortId,
    pub(super) mtu: u16,
    pub(super) backend: Backend,
    pub(super) tap: Box<dyn Tap>,
}

/// A frame of the batch that goes to a remote.
pub(super) struct Outgoing {
    pub(super) frame: usize,
    pub(super) vni: Vni,
    pub(super) to: SocketAddr,
    pub(super) flow: u32,
}

/// A frame of the batch that goes to a port.
pub(super) struct Delivery {
    pub(super) frame: usize,
    pub(super) place: usize,
    pub(super) offload: Offload,
}

/// Sends what was collected, in its order, and forgets it.
pub(super) fn send_all<U: Underlay>(
    underlay: &mut U,
    frames: &[FrameBuf],
    sends: &mut Vec<Outgoing>,
    counters: &WorkerCounters,
    captures: Option<&CaptureHub>,
) {
    for batch in sends.chunks(BATCH) {
        let mut slices = [IoSlice::new(&[]); BATCH];
        let mut bytes = 0;
        for (slice, outgoing) in slices.iter_mut().zip(batch) {
            let payload = frames[outgoing.frame].datagram();
            *slice = IoSlice::new(payload);
            bytes += payload.len() as u64;
        }
        let unused = Datagram {
            to: batch[0].to,
            flow: 0,
            ecn: 0,
            segment_size: None,
            slices: &[],
        };
        let mut datagrams = [unused; BATCH];
        for (index, (datagram, outgoing)) in datagrams.iter_mut().zip(batch).enumerate() {
            *datagram = Datagram {
                to: outgoing.to,
                flow: outgoing.flow,
                ecn: ecn::of_frame(frames[outgoing.frame].frame()),
                segment_size: None,
                slices: std::slice::from_ref(&slices[index]),
            };
        }
        let report = underlay
            .send(&datagrams[..batch.len()])
            .unwrap_or_else(|error| {
                tracing::debug!(%error, "can't send to the underlay");
                SendReport {
                    failed: batch.len(),
                    ..SendReport::default()
                }
            });
        counters.datagrams_out(report.sent as u64);
        // Which ones failed is not said; where some did, their share is taken off.
        counters.datagram_bytes_out(bytes * report.sent as u64 / batch.len() as u64);
        count_drops(
            counters,
            &report,
            [
                DropReason::PathTooSmall,
                DropReason::UnderlayFull,
                DropReason::UnderlayFailed,
            ],
        );
        if let Some(captures) = captures {
            for Outgoing { frame, vni, to, .. } in batch {
                captures.offer(Place::ToRemote(*to), *vni, frames[*frame].frame());
            }
        }
    }
    sends.clear();
}

/// Hands over what was collected, in its order, and forgets it.
pub(super) fn deliver_all<'b>(
    ports: &mut [PortQueue],
    deliveries: &mut Vec<Delivery>,
    counters: &WorkerCounters,
    captures: Option<(&CaptureHub, &Tables)>,
    frame: impl Fn(usize) -> &'b [u8],
) {
    for run in deliveries.chunk_by(|one, other| one.place == other.place) {
        let port = &mut ports[run[0].place];
        for batch in run.chunks(BATCH) {
            let mut slices = [IoSlice::new(&[]); BATCH];
            for (slice, delivery) in slices.iter_mut().zip(batch) {
                *slice = IoSlice::new(frame(delivery.frame));
            }
            let unused = TapFrame {
                slices: &[],
                offload: Offload::default(),
            };
            let mut frames = [unused; BATCH];
            for (index, (frame, delivery)) in frames.iter_mut().zip(batch).enumerate() {
                let slices = std::slice::from_ref(&slices[index]);
                *frame = TapFrame {
                    slices,
                    offload: delivery.offload,
                };
            }
            hand_over(port, &frames[..batch.len()], counters);
            if let Some((captures, tables)) = captures
                && let Some(vni) = tables.port(port.id).map(|port| port.vni)
            {
                batch.iter().for_each(|delivery| {
                    captures.offer(Place::ToPort(port.id), vni, frame(delivery.frame))
                });
            }
        }
    }
    deliveries.clear();
}

/// Cuts a super-frame and hands over the segments.
pub(super) fn deliver_cut(
    port: &mut PortQueue,
    frame: &[u8],
    counters: &WorkerCounters,
    captures: Option<(&CaptureHub, &Tables)>,
) {
    let super_frame = match SuperFrame::parse(frame, port.mtu) {
        Ok(super_frame) => super_frame,
        Err(reason) => return counters.drops(reason, 1),
    };
    for index in 0..super_frame.count() {
        let mut space = [0; MAX_HEADERS];
        let (headers, payload) = super_frame.segment(index, &mut space);
        let slices = [IoSlice::new(headers), IoSlice::new(payload)];
        let segment = TapFrame {
            slices: &slices,
            offload: Offload::default(),
        };
        hand_over(port, &[segment], counters);
    }
    if let Some((captures, tables)) = captures
        && let Some(vni) = tables.port(port.id).map(|port| port.vni)
    {
        captures.offer(Place::ToPort(port.id), vni, frame);
    }
}

/// Gives frames to a container and counts what became of them.
pub(super) fn hand_over(port: &mut PortQueue, frames: &[TapFrame<'_>], counters: &WorkerCounters) {
    let report = port.tap.send(frames).unwrap_or_else(|error| {
        // Reading from the queue fails, too, and closes it.
        tracing::trace!(port = %port.id, %error, "can't hand frames to a container");
        SendReport {
            failed: frames.len(),
            ..SendReport::default()
        }
    });
    let bytes: usize = frames
        .iter()
        .flat_map(|frame| frame.slices)
        .map(|slice| slice.len())
        .sum();
    counters.frames_out(report.sent as u64);
    counters.frame_bytes_out(bytes as u64 * report.sent as u64 / frames.len() as u64);
    count_drops(
        counters,
        &report,
        [
            DropReason::Oversize,
            DropReason::PortFull,
            DropReason::PortFailed,
        ],
    );
}

fn count_drops(counters: &WorkerCounters, report: &SendReport, reasons: [DropReason; 3]) {
    if report.dropped() > 0 {
        for (reason, count) in reasons
            .into_iter()
            .zip([report.too_big, report.full, report.failed])
        {
            counters.drops(reason, count as u64);
        }
    }
}
