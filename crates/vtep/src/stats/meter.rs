//! What passed one port, or one remote VTEP: a cell for each worker.
//!
//! A meter is made with its port or member and lives in the tables beside it, so that a worker finds its own cell without a
//! lock and writes it without an atomic read-modify-write. Whoever reads sums over the cells.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use super::{DropReason, Drops, add};

/// What passed one port or remote, since it was made.
#[derive(Debug)]
pub struct Meter {
    cells: Box<[MeterCell]>,
}

/// One worker's share of a [`Meter`]. Only its worker writes it; anyone may read.
// 128 bytes: adjacent-line prefetch makes pairs of 64-byte lines the unit that two cores fight over.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct MeterCell {
    received: AtomicU64,
    received_bytes: AtomicU64,
    sent: AtomicU64,
    sent_bytes: AtomicU64,
    drops: DropCells,
}

#[derive(Debug)]
struct DropCells([AtomicU64; DropReason::ALL.len()]);

impl Default for DropCells {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; DropReason::ALL.len()])
    }
}

/// A [`Meter`] as it is read at one moment.
///
/// Of a port: frames that its container sent (received) and was handed (sent). Of a remote: datagrams from it and to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reading {
    /// Came from it, dropped or not.
    pub received: u64,
    /// Bytes of what came from it: of frames, or of UDP payload.
    pub received_bytes: u64,
    /// Went to it.
    pub sent: u64,
    /// Bytes of what went to it: of frames, or of UDP payload.
    pub sent_bytes: u64,
    /// What came from it, or was for it, and was dropped.
    pub drops: Drops,
}

impl Meter {
    /// All zero, with a cell for each of `workers`.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self {
            cells: (0..workers).map(|_| MeterCell::default()).collect(),
        }
    }

    /// The cell of one worker; none beyond the workers the meter was made for.
    #[inline]
    #[must_use]
    pub fn cell(&self, worker: usize) -> Option<&MeterCell> {
        self.cells.get(worker)
    }

    /// The sum over all workers.
    #[must_use]
    pub fn read(&self) -> Reading {
        let mut sum = Reading::default();
        for cell in &self.cells {
            sum.received += cell.received.load(Ordering::Relaxed);
            sum.received_bytes += cell.received_bytes.load(Ordering::Relaxed);
            sum.sent += cell.sent.load(Ordering::Relaxed);
            sum.sent_bytes += cell.sent_bytes.load(Ordering::Relaxed);
            for (total, counter) in sum.drops.0.iter_mut().zip(&cell.drops.0) {
                *total += counter.load(Ordering::Relaxed);
            }
        }
        sum
    }
}

impl MeterCell {
    /// Counts what came; only the owning worker may.
    #[inline]
    pub fn received(&self, count: u64, bytes: u64) {
        add(&self.received, count);
        add(&self.received_bytes, bytes);
    }

    /// Counts what went; only the owning worker may.
    #[inline]
    pub fn sent(&self, count: u64, bytes: u64) {
        add(&self.sent, count);
        add(&self.sent_bytes, bytes);
    }

    /// Counts drops for one reason; only the owning worker may.
    #[inline]
    pub fn drops(&self, reason: DropReason, count: u64) {
        add(&self.drops.0[reason as usize], count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_summed_and_none_is_shared() {
        let meter = Meter::new(2);
        for worker in 0..2 {
            let cell = meter.cell(worker).unwrap();
            cell.received(2, 100);
            cell.sent(1, 60);
            cell.drops(DropReason::GuardMac, 3);
        }
        assert!(meter.cell(2).is_none());
        let reading = meter.read();
        assert_eq!((reading.received, reading.received_bytes), (4, 200));
        assert_eq!((reading.sent, reading.sent_bytes), (2, 120));
        assert_eq!(reading.drops.get(DropReason::GuardMac), 6);
        assert_eq!(reading.drops.total(), 6);
    }
}
