//! Probes that arrive: told to whoever expects them, answered when a member asks.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::time::Instant;

use super::WorkerConfig;
use super::sends::NOTHING;
use crate::budget::Limit;
use crate::capture::Fate;
use crate::edge::{Datagram, Underlay};
use crate::fdb::Tables;
use crate::flow;
use crate::probe::Arrived;
use crate::stats::DropReason;

/// Probes of one member that are answered: it sends some twenty at a time, and seldom.
const PROBES: Limit = Limit {
    rate: 100,
    burst: 200,
};

/// Takes a payload that begins as a probe, and says what became of it.
pub(super) fn take<U: Underlay>(
    config: &WorkerConfig,
    underlay: &mut U,
    tables: &Tables,
    (from, payload): (SocketAddr, &[u8]),
    now: Instant,
) -> Fate {
    match config.probes.handle(from, payload) {
        Arrived::Expected => Fate::Probe,
        Arrived::Asks(answer) => {
            // To where the tables say that the member receives: its probes come from a port that takes nothing.
            // An answer is never longer than the probe; still, whose it is may be forged.
            let budget = tables.remote_probes(from.ip());
            let allowed = budget.is_some_and(|budget| budget.take(1, PROBES, now));
            let Some(to) = tables.remote(from.ip()).filter(|_| allowed) else {
                return Fate::Drop(DropReason::UnexpectedProbe);
            };
            let slices = [IoSlice::new(&answer)];
            let datagram = Datagram {
                to,
                flow: flow::hash(&answer),
                slices: &slices,
                ..NOTHING
            };
            if let Err(error) = underlay.send(&[datagram]) {
                tracing::debug!(%error, "can't answer a probe");
            }
            Fate::Probe
        }
        Arrived::Unexpected => Fate::Drop(DropReason::UnexpectedProbe),
    }
}
