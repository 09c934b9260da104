//! One thread: an engine joined to its edges.
//!
//! ```text
//! poll_port      tap.recv ─► engine.handle_frame ─┐              ┌─ runs of one size, cut super-frames ─► underlay.send
//!                                                 ├─ collected ──┤
//! poll_underlay  underlay.recv ─► handle_datagram ┘              └─ merged by flow ──────────────────────► tap.send
//! ```
//!
//! A batch is read, each frame of it gets its verdict, and what the verdicts ask for is collected and then sent as batches.
//! The tables are loaded once a batch. All buffers are made at the start; nothing is allocated or locked for a frame.
//!
//! A super-frame is one frame to the engine, the counters and captures. It is cut only where it leaves the host or meets a port that
//! can't take it whole, and then its segments are counted and copied.
//!
//! The worker itself never waits and never asks for the time: [`Worker::run_once`] drives it in tests with edges in
//! memory, and a thread of the datapath with the kernel's events.

mod announcing;
mod delivery;
mod inward;
mod ledger;
mod outward;
mod probes;
mod sends;
mod thread;
mod too_big;
mod wait;

use std::sync::Arc;
use std::time::Instant;

use foldhash::fast::RandomState;
use hashbrown::HashMap;

use crate::capture::CaptureHub;
use crate::edge::{Tap, Underlay};
use crate::engine::{Engine, Settings};
use crate::fdb::{PortId, SharedTables, Tables};
use crate::frame::{DatagramBuf, FrameBuf};
use crate::misdelivery::Misdeliveries;
use crate::offload::coalesce::Coalescer;
use crate::paths::Paths;
use crate::probe::ProbeRegistry;
use crate::stats::WorkerCounters;
use crate::tap::Backend;

use delivery::PortQueue;
use ledger::Ledger;
use sends::Sends;
pub(crate) use thread::{Command, WorkerThread};

/// Frames taken from a port at once. Twice what one message carries to a remote: wake-ups on both sides become fewer.
const FRAMES: usize = 128;
/// Frames or datagrams handed to an edge at once.
const BATCH: usize = 64;
/// Buffers of datagrams taken from the underlay at once; each may hold 64 KiB of them.
const DATAGRAM_BUFFERS: usize = 32;

/// What a worker shares with the rest of its datapath.
pub struct WorkerConfig {
    /// What decides where frames go.
    pub tables: SharedTables,
    /// Who wants copies of frames.
    pub captures: Arc<CaptureHub>,
    /// Which probes are expected.
    pub probes: Arc<ProbeRegistry>,
    /// What the paths to other hosts carry.
    pub paths: Arc<Paths>,
    /// Where frames that came to the wrong host are noted.
    pub misdeliveries: Arc<Misdeliveries>,
    /// What can be set in the engine.
    pub settings: Settings,
    /// Which of the datapath's workers it is, from 0: its cell of each [`crate::stats::Meter`].
    pub index: usize,
}

impl WorkerConfig {
    /// Only tables: nobody captures or probes.
    #[must_use]
    pub fn new(tables: SharedTables) -> Self {
        Self {
            tables,
            captures: Arc::default(),
            probes: Arc::default(),
            paths: Arc::default(),
            misdeliveries: Arc::default(),
            settings: Settings::default(),
            index: 0,
        }
    }
}

/// An engine, one way to other hosts, and one queue of each port.
pub struct Worker<U: Underlay> {
    engine: Engine,
    underlay: U,
    ports: Vec<PortQueue>,
    /// Where in `ports` a port is.
    places: Places,
    config: WorkerConfig,
    counters: Arc<WorkerCounters>,
    frames: Vec<FrameBuf>,
    datagrams: Vec<DatagramBuf>,
    sends: Sends,
    /// What goes to ports of this host.
    deliveries: Coalescer,
}

type Places = HashMap<PortId, usize, RandomState>;

impl<U: Underlay> Worker<U> {
    /// A worker without ports. Makes all its buffers.
    #[must_use]
    pub fn new(underlay: U, config: WorkerConfig) -> Self {
        Self {
            engine: Engine::new(config.settings),
            underlay,
            ports: Vec::new(),
            places: HashMap::default(),
            config,
            counters: Arc::default(),
            frames: std::iter::repeat_with(FrameBuf::new).take(FRAMES).collect(),
            datagrams: std::iter::repeat_with(DatagramBuf::new)
                .take(DATAGRAM_BUFFERS)
                .collect(),
            sends: Sends::new(),
            deliveries: Coalescer::new(),
        }
    }

    /// What this worker counts.
    #[must_use]
    pub fn counters(&self) -> Arc<WorkerCounters> {
        Arc::clone(&self.counters)
    }

    /// Its way to other hosts.
    pub const fn underlay(&self) -> &U {
        &self.underlay
    }

    /// Its way to other hosts, to change what a test's wire does.
    pub const fn underlay_mut(&mut self) -> &mut U {
        &mut self.underlay
    }

    /// Takes a queue of a port. One it already has of that port is closed.
    pub fn add_port(&mut self, id: PortId, mtu: u16, backend: Backend, tap: Box<dyn Tap>) {
        drop(self.remove_port(id));
        self.places.insert(id, self.ports.len());
        self.ports.push(PortQueue {
            id,
            mtu,
            backend,
            features: tap.features(),
            tap,
        });
    }

    /// Gives a queue back.
    pub fn remove_port(&mut self, id: PortId) -> Option<Box<dyn Tap>> {
        let place = self.places.remove(&id)?;
        let port = self.ports.swap_remove(place);
        if let Some(moved) = self.ports.get(place) {
            self.places.insert(moved.id, place);
        }
        Some(port.tap)
    }

    /// Takes one batch from each edge. Says whether there was anything. Ports whose interface is gone are skipped.
    pub fn run_once(&mut self, now: Instant) -> bool {
        let mut worked = false;
        for place in 0..self.ports.len() {
            let id = self.ports[place].id;
            worked |= self.poll_port(id, now).unwrap_or(false);
        }
        worked | self.poll_underlay(now).unwrap_or(false)
    }
}

impl WorkerConfig {
    /// The books of one batch: of frames from the port `origin`, or of datagrams.
    fn ledger<'a>(
        &'a self,
        counters: &'a WorkerCounters,
        tables: &'a Tables,
        origin: Option<PortId>,
    ) -> Ledger<'a> {
        let captures = self.captures.is_active().then_some(&*self.captures);
        Ledger::new(counters, tables, self.index, captures, origin)
    }
}
