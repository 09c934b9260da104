//! Where a worker writes down what became of a batch: the counters always, copies while somebody captures.
//!
//! Each frame and datagram is written down once where it comes in, with its verdict, and once at each place where it goes out,
//! with what the edge said. The worker knows verdicts; what is counted where is known here alone.

use std::cell::Cell;
use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr};

use crate::Vni;
use crate::capture::{CaptureHub, Fate};
use crate::edge::{Datagram, Refusal, SendReport, TapFrame};
use crate::engine::Verdict;
use crate::fdb::{PortId, Tables};
use crate::stats::{DropReason, MeterCell, WorkerCounters};

/// The books of one batch.
pub(super) struct Ledger<'a> {
    counters: &'a WorkerCounters,
    tables: &'a Tables,
    /// Which cell of a meter is this worker's.
    worker: usize,
    captures: Option<&'a CaptureHub>,
    /// Whose frames the batch has; none when it has datagrams.
    origin: Option<(PortId, Option<&'a MeterCell>)>,
    /// The remote last met: batches come in runs.
    remote: Cell<Option<(IpAddr, Option<&'a MeterCell>)>>,
}

impl<'a> Ledger<'a> {
    /// For a batch of frames from the port `origin`, or of datagrams.
    pub(super) fn new(
        counters: &'a WorkerCounters,
        tables: &'a Tables,
        worker: usize,
        captures: Option<&'a CaptureHub>,
        origin: Option<PortId>,
    ) -> Self {
        let mut ledger = Self {
            counters,
            tables,
            worker,
            captures,
            origin: None,
            remote: Cell::new(None),
        };
        ledger.origin = origin.map(|id| (id, ledger.port(id)));
        ledger
    }

    /// A container's frame came.
    #[inline]
    pub(super) fn frame_in(&self, len: usize) {
        self.counters.frames_in(1);
        self.counters.frame_bytes_in(len as u64);
        if let Some((_, Some(cell))) = self.origin {
            cell.received(1, len as u64);
        }
    }

    /// What was decided about a container's frame.
    #[inline]
    pub(super) fn frame_decided(&self, frame: &[u8], verdict: &Verdict<'_>) {
        match verdict {
            Verdict::Drop(reason) => {
                self.counters.drops(*reason, 1);
                if let Some((_, Some(cell))) = self.origin {
                    cell.drops(*reason, 1);
                }
            }
            Verdict::Flood { .. } => self.counters.floods(1),
            Verdict::Answer { .. } => self.counters.answers(1),
            Verdict::Deliver { .. } | Verdict::Send { .. } => {}
        }
        if let (Some(captures), Some((id, _))) = (self.captures, self.origin) {
            captures.from_port(id, self.vni(id), frame, verdict);
        }
    }

    /// The container was told that a frame was too big for its path.
    pub(super) fn told_too_big(&self) {
        self.counters.too_big_answers(1);
    }

    /// A container was told that an address has another MAC.
    pub(super) fn announced(&self) {
        self.counters.announcements(1);
    }

    /// A remote's datagrams came, in number and in bytes of payload.
    #[inline]
    pub(super) fn datagrams_in(&self, from: SocketAddr, count: u64, bytes: u64) {
        self.counters.datagrams_in(count);
        self.counters.datagram_bytes_in(bytes);
        if let Some(cell) = self.remote(from.ip()) {
            cell.received(count, bytes);
        }
    }

    /// What was decided about a remote's datagram; `ports` are those it is for.
    #[inline]
    pub(super) fn datagram_decided(
        &self,
        from: SocketAddr,
        class: u8,
        payload: &[u8],
        fate: Fate,
        ports: &[PortId],
    ) {
        match fate {
            Fate::Drop(reason) => {
                self.counters.drops(reason, 1);
                if let Some(cell) = self.remote(from.ip()) {
                    cell.drops(reason, 1);
                }
            }
            Fate::Flood { .. } => self.counters.floods(1),
            _ => {}
        }
        if let Some(captures) = self.captures {
            captures.from_remote(from, class, payload, fate, ports);
        }
    }

    /// A frame was for a port and never got as far as its queue.
    pub(super) fn undelivered(&self, id: PortId, frame: &[u8], reason: DropReason) {
        self.counters.drops(reason, 1);
        if let Some(cell) = self.port(id) {
            cell.drops(reason, 1);
        }
        if let Some(captures) = self.captures {
            let slices = [IoSlice::new(frame)];
            captures.to_port(id, self.vni(id), &slices, Some(reason));
        }
    }

    /// What became of frames handed to a port, at most 64.
    pub(super) fn handed_over(&self, id: PortId, frames: &[TapFrame<'_>], report: &SendReport) {
        let cell = self.port(id);
        let mut bytes = 0;
        for (index, frame) in frames.iter().enumerate() {
            let drop = report.refusal(index).map(port_reason);
            match (drop, cell) {
                (None, _) => bytes += total(frame.slices),
                (Some(reason), Some(cell)) => cell.drops(reason, 1),
                (Some(_), None) => {}
            }
            if let Some(captures) = self.captures {
                captures.to_port(id, self.vni(id), frame.slices, drop);
            }
        }
        self.counters.frames_out(report.sent as u64);
        self.counters.frame_bytes_out(bytes);
        self.count_drops(report, port_reason);
        if let Some(cell) = cell {
            cell.sent(report.sent as u64, bytes);
        }
    }

    /// What became of datagrams for remotes, at most 64. Of one that is to be cut, a remote's own numbers have all or nothing.
    pub(super) fn datagrams_sent(&self, datagrams: &[Datagram<'_>], report: &SendReport) {
        // Pieces and bytes of what was taken whole, and of what was refused, perhaps in part.
        let (mut whole, mut part) = ((0, 0), (0, 0));
        for (index, datagram) in datagrams.iter().enumerate() {
            let (count, bytes) = (datagram.count() as u64, datagram.len() as u64);
            let drop = report.refusal(index).map(underlay_reason);
            let sum = if drop.is_none() {
                &mut whole
            } else {
                &mut part
            };
            *sum = (sum.0 + count, sum.1 + bytes);
            match (drop, self.remote(datagram.to.ip())) {
                (None, Some(cell)) => cell.sent(count, bytes),
                (Some(reason), Some(cell)) => cell.drops(reason, count),
                (_, None) => {}
            }
            if let Some(captures) = self.captures {
                self.capture_sent(captures, datagram, drop);
            }
        }
        let sent = report.sent as u64;
        self.counters.datagrams_out(sent);
        let share = part.1 * sent.saturating_sub(whole.0) / part.0.max(1);
        self.counters.datagram_bytes_out(whole.1 + share);
        self.count_drops(report, underlay_reason);
    }

    /// Copies each datagram that the kernel cuts the message into.
    fn capture_sent(
        &self,
        captures: &CaptureHub,
        datagram: &Datagram<'_>,
        drop: Option<DropReason>,
    ) {
        let origin = self.origin.map(|(id, _)| id);
        let outer = (datagram.to, datagram.outer, datagram.flow);
        let Some(size) = datagram.segment_size else {
            return captures.to_remote(origin, outer, datagram.slices, drop);
        };
        let mut whole = Vec::new();
        let slices = datagram.slices.iter();
        slices.for_each(|slice| whole.extend_from_slice(slice));
        for segment in whole.chunks(usize::from(size).max(1)) {
            captures.to_remote(origin, outer, &[IoSlice::new(segment)], drop);
        }
    }

    fn count_drops(&self, report: &SendReport, reason: impl Fn(Refusal) -> DropReason) {
        if report.dropped() > 0 {
            for (refusal, count) in [
                (Refusal::TooBig, report.too_big),
                (Refusal::Full, report.full),
                (Refusal::Failed, report.failed),
            ] {
                self.counters.drops(reason(refusal), count as u64);
            }
        }
    }

    fn vni(&self, id: PortId) -> Option<Vni> {
        self.tables.port(id).map(|port| port.vni)
    }

    fn port(&self, id: PortId) -> Option<&'a MeterCell> {
        match self.origin {
            Some((origin, cell)) if origin == id => cell,
            _ => self.tables.port_meter(id)?.cell(self.worker),
        }
    }

    #[inline]
    fn remote(&self, addr: IpAddr) -> Option<&'a MeterCell> {
        match self.remote.get() {
            Some((last, cell)) if last == addr => cell,
            _ => {
                let meter = self.tables.remote_meter(addr);
                let cell = meter.and_then(|meter| meter.cell(self.worker));
                self.remote.set(Some((addr, cell)));
                cell
            }
        }
    }
}

fn total(slices: &[IoSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

const fn port_reason(refusal: Refusal) -> DropReason {
    match refusal {
        Refusal::TooBig => DropReason::Oversize,
        Refusal::Full => DropReason::PortFull,
        Refusal::Failed => DropReason::PortFailed,
    }
}

const fn underlay_reason(refusal: Refusal) -> DropReason {
    match refusal {
        Refusal::TooBig => DropReason::PathTooSmall,
        Refusal::Full => DropReason::UnderlayFull,
        Refusal::Failed => DropReason::UnderlayFailed,
    }
}
