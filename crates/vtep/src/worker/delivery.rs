//! What goes to ports of this host, handed over in batches of slices.
//!
//! Nothing is copied but headers of merged frames: all other slices lie in the buffers that the batch was read into.

use std::io::IoSlice;

use super::BATCH;
use super::ledger::Ledger;
use crate::edge::{Offload, SendReport, Tap, TapFeatures, TapFrame};
use crate::fdb::PortId;
use crate::offload::coalesce::{Coalescer, PARTS_MAX};
use crate::offload::segment::{MAX_HEADERS, SuperFrame};
use crate::tap::Backend;

/// Slices handed over at once: more than one merged frame can have.
const SLICES: usize = PARTS_MAX + BATCH;

/// A worker's queue of one port.
pub(super) struct PortQueue {
    pub(super) id: PortId,
    pub(super) mtu: u16,
    pub(super) backend: Backend,
    pub(super) features: TapFeatures,
    pub(super) tap: Box<dyn Tap>,
}

/// Hands over what was collected, each flow in its order, and forgets it. `buffer` lends the buffers that spans lie in.
pub(super) fn deliver_all<'b>(
    ports: &mut [PortQueue],
    deliveries: &mut Coalescer,
    ledger: &Ledger<'_>,
    buffer: impl Fn(usize) -> &'b [u8],
) {
    if deliveries.is_empty() {
        return;
    }
    let mut batch = Batch::new();
    for merged in deliveries.finish() {
        if !batch.has_room(merged.port, merged.len()) {
            batch.hand_over(ports, ledger);
        }
        batch.add(
            merged.port,
            merged.offload,
            merged.headers,
            merged.map(|span| &buffer(span.buffer)[span.start..span.start + span.len]),
        );
    }
    batch.hand_over(ports, ledger);
    deliveries.clear();
}

/// Frames for one port.
struct Batch<'b> {
    port: usize,
    slices: [IoSlice<'b>; SLICES],
    slices_used: usize,
    /// Where each frame's slices end, and what it needs.
    frames: [(usize, Offload); BATCH],
    frames_used: usize,
}

impl<'b> Batch<'b> {
    fn new() -> Self {
        Self {
            port: 0,
            slices: [IoSlice::new(&[]); SLICES],
            slices_used: 0,
            frames: [(0, Offload::default()); BATCH],
            frames_used: 0,
        }
    }

    /// Whether a frame of `parts` parts for `port` can be added.
    fn has_room(&self, port: usize, parts: usize) -> bool {
        self.frames_used == 0
            || (self.port == port
                && self.frames_used < BATCH
                && self.slices_used + 1 + parts <= SLICES)
    }

    fn add(
        &mut self,
        port: usize,
        offload: Offload,
        headers: &'b [u8],
        parts: impl Iterator<Item = &'b [u8]>,
    ) {
        self.port = port;
        let slices = std::iter::once(headers)
            .filter(|headers| !headers.is_empty())
            .chain(parts);
        for slice in slices {
            self.slices[self.slices_used] = IoSlice::new(slice);
            self.slices_used += 1;
        }
        self.frames[self.frames_used] = (self.slices_used, offload);
        self.frames_used += 1;
    }

    fn hand_over(&mut self, ports: &mut [PortQueue], ledger: &Ledger<'_>) {
        let nothing = TapFrame {
            slices: &[],
            offload: Offload::default(),
        };
        let mut frames = [nothing; BATCH];
        let mut start = 0;
        for (frame, &(end, offload)) in frames.iter_mut().zip(&self.frames[..self.frames_used]) {
            *frame = TapFrame {
                slices: &self.slices[start..end],
                offload,
            };
            start = end;
        }
        hand_over(&mut ports[self.port], &frames[..self.frames_used], ledger);
        (self.frames_used, self.slices_used) = (0, 0);
    }
}

/// Cuts a super-frame and hands over the segments.
pub(super) fn deliver_cut(port: &mut PortQueue, super_frame: &SuperFrame<'_>, ledger: &Ledger<'_>) {
    for index in 0..super_frame.count() {
        let mut space = [0; MAX_HEADERS];
        let headers = &mut space[..super_frame.headers_len()];
        let payload = super_frame.write_headers(index, headers);
        let slices = [IoSlice::new(headers), IoSlice::new(payload)];
        let segment = TapFrame {
            slices: &slices,
            offload: Offload::default(),
        };
        hand_over(port, &[segment], ledger);
    }
}

/// Gives at most 64 frames to a container and writes down what became of them.
pub(super) fn hand_over(port: &mut PortQueue, frames: &[TapFrame<'_>], ledger: &Ledger<'_>) {
    if frames.is_empty() {
        return;
    }
    let report = port.tap.send(frames).unwrap_or_else(|error| {
        // Reading from the queue fails, too, and closes it.
        tracing::trace!(port = %port.id, %error, "can't hand frames to a container");
        SendReport::all_failed(frames.iter().map(|_| 1))
    });
    ledger.handed_over(port.id, frames, &report);
}
