//! One thread: an engine joined to its edges.
//!
//! ```text
//! poll_port      tap.recv ─► engine.handle_frame ─┐               ┌► underlay.send
//!                                                 ├► two lists ───┤
//! poll_underlay  underlay.recv ─► handle_datagram ┘               └► tap.send
//! ```
//!
//! A batch is read, each frame of it gets its verdict, and what the verdicts ask for is collected and then sent as batches.
//! The tables are loaded once a batch. All buffers are made at the start; nothing is allocated or locked for a frame.
//!
//! The worker itself never waits and never asks for the time: [`Worker::run_once`] drives it in tests with edges in
//! memory, and a thread of the datapath with the kernel's events.

mod inward;
mod outbox;
mod thread;
mod wait;

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Instant;

use foldhash::fast::RandomState;
use hashbrown::HashMap;

use crate::capture::{CaptureHub, Place};
use crate::ecn;
use crate::edge::{Offload, Tap, TapFrame, Underlay};
use crate::engine::{Arrival, Engine, Settings, Verdict};
use crate::fdb::{PortId, SharedTables};
use crate::flow;
use crate::frame::{DatagramBuf, FrameBuf};
use crate::offload::{self, checksum};
use crate::probe::ProbeRegistry;
use crate::stats::{DropReason, WorkerCounters};
use crate::tap::Backend;
use crate::vxlan::{self, Class, HEADER_LEN, Header};

use inward::Handover;
use outbox::{Delivery, Outgoing, PortQueue, deliver_all, deliver_cut, hand_over, send_all};
pub(crate) use thread::{Command, WorkerThread};

/// Frames or datagrams taken from an edge, and handed to one, at once.
const BATCH: usize = 64;
/// Datagrams collected before they are sent although the batch goes on: a flood to many hosts must not pile up.
const SENDS_MAX: usize = 1024;

/// What a worker shares with the rest of its datapath.
pub struct WorkerConfig {
    /// What decides where frames go.
    pub tables: SharedTables,
    /// Who wants copies of frames.
    pub captures: Arc<CaptureHub>,
    /// Which probes are expected.
    pub probes: Arc<ProbeRegistry>,
    /// What can be set in the engine.
    pub settings: Settings,
}

impl WorkerConfig {
    /// Only tables: nobody captures or probes.
    #[must_use]
    pub fn new(tables: SharedTables) -> Self {
        Self {
            tables,
            captures: Arc::default(),
            probes: Arc::default(),
            settings: Settings::default(),
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
    sends: Vec<Outgoing>,
    deliveries: Vec<Delivery>,
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
            frames: std::iter::repeat_with(FrameBuf::new).take(BATCH).collect(),
            datagrams: std::iter::repeat_with(DatagramBuf::new)
                .take(BATCH)
                .collect(),
            sends: Vec::with_capacity(SENDS_MAX),
            deliveries: Vec::with_capacity(SENDS_MAX),
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
        worked | self.poll_underlay().unwrap_or(false)
    }

    /// Takes one batch of frames from a port. Says whether there was one.
    ///
    /// # Errors
    /// When the port's interface is gone.
    pub fn poll_port(&mut self, id: PortId, now: Instant) -> io::Result<bool> {
        let Some(&origin) = self.places.get(&id) else {
            return Ok(false);
        };
        let count = self.ports[origin].tap.recv(&mut self.frames)?;
        if count == 0 {
            return Ok(false);
        }
        let tables = self.config.tables.load();
        let captures = self.config.captures();
        let counters = &*self.counters;
        for index in 0..count {
            let frame = &mut self.frames[index];
            counters.frames_in(1);
            counters.frame_bytes_in(frame.frame().len() as u64);
            if let Some(captures) = captures
                && let Some(port) = tables.port(id)
            {
                captures.offer(Place::FromPort(id), port.vni, frame.frame());
            }
            if let Err(reason) = finish(frame, self.ports[origin].mtu) {
                counters.drops(reason, 1);
                continue;
            }
            match self.engine.handle_frame(&tables, id, frame.frame(), now) {
                Verdict::Deliver { port } => match self.places.get(&port) {
                    // Ports of one network are on one VNI: the origin's.
                    Some(&place) => self.deliveries.push(Delivery {
                        frame: index,
                        place,
                        offload: Offload::default(),
                    }),
                    None => counters.drops(DropReason::NoQueue, 1),
                },
                Verdict::Send { vni, remote } => {
                    frame.set_header(&Header::emit(vni));
                    let flow = flow::hash(frame.frame());
                    self.sends.push(Outgoing {
                        frame: index,
                        vni,
                        to: remote,
                        flow,
                    });
                }
                Verdict::Flood {
                    vni,
                    ports,
                    remotes,
                } => {
                    counters.floods(1);
                    frame.set_header(&Header::emit(vni));
                    let flow = flow::hash(frame.frame());
                    self.sends.extend(remotes.iter().map(|&to| Outgoing {
                        frame: index,
                        vni,
                        to,
                        flow,
                    }));
                    for port in ports.iter().filter(|port| **port != id) {
                        match self.places.get(port) {
                            Some(&place) => {
                                self.deliveries.push(Delivery {
                                    frame: index,
                                    place,
                                    offload: Offload::default(),
                                });
                            }
                            None => counters.drops(DropReason::NoQueue, 1),
                        }
                    }
                }
                Verdict::Answer { .. } => {
                    counters.answers(1);
                    let slices = [IoSlice::new(self.engine.answer())];
                    let answer = TapFrame {
                        slices: &slices,
                        offload: Offload::default(),
                    };
                    hand_over(&mut self.ports[origin], &[answer], counters);
                }
                Verdict::Drop(reason) => counters.drops(reason, 1),
            }
            if self.sends.len() >= SENDS_MAX {
                send_all(
                    &mut self.underlay,
                    &self.frames,
                    &mut self.sends,
                    counters,
                    captures,
                );
            }
        }
        send_all(
            &mut self.underlay,
            &self.frames,
            &mut self.sends,
            counters,
            captures,
        );
        let frames = &self.frames;
        deliver_all(
            &mut self.ports,
            &mut self.deliveries,
            counters,
            captures.zip(Some(&*tables)),
            |index| frames[index].frame(),
        );
        Ok(true)
    }

    /// Takes one batch of datagrams from the underlay. Says whether there was one.
    ///
    /// # Errors
    /// When the socket is broken.
    pub fn poll_underlay(&mut self) -> io::Result<bool> {
        let count = self.underlay.recv(&mut self.datagrams)?;
        if count == 0 {
            return Ok(false);
        }
        let tables = self.config.tables.load();
        let captures = self.config.captures();
        let counters = &*self.counters;
        for index in 0..count {
            let datagram = &mut self.datagrams[index];
            let from = datagram.from;
            counters.datagrams_in(1);
            counters.datagram_bytes_in(datagram.payload().len() as u64);
            match vxlan::classify(datagram.payload()) {
                Class::Vxlan => {}
                Class::Probe if self.config.probes.handle(from, datagram.payload()) => continue,
                Class::Probe => {
                    counters.drops(DropReason::UnexpectedProbe, 1);
                    continue;
                }
                Class::Unknown => {
                    counters.drops(DropReason::NoVniFlag, 1);
                    continue;
                }
            }
            let Arrival {
                verdict,
                vni,
                frame,
            } = self
                .engine
                .handle_datagram(&tables, from, datagram.payload());
            if let (Some(captures), Some(vni)) = (captures, vni) {
                captures.offer(Place::FromRemote(from), vni, frame);
            }
            // One port may have its kernel do the rest; for several it is done once, here.
            let (ports, several) = match &verdict {
                Verdict::Deliver { port } => (std::slice::from_ref(port), false),
                Verdict::Flood { ports, .. } => {
                    counters.floods(1);
                    (*ports, true)
                }
                Verdict::Drop(reason) => {
                    counters.drops(*reason, 1);
                    continue;
                }
                Verdict::Send { .. } | Verdict::Answer { .. } => {
                    // Split horizon, and nothing that a remote sends is answered: the engine never says this.
                    counters.drops(DropReason::SplitHorizon, 1);
                    continue;
                }
            };
            let mark = datagram.ecn;
            if let Err(reason) = ecn::decapsulate(&mut datagram.payload_mut()[HEADER_LEN..], mark) {
                counters.drops(reason, 1);
                continue;
            }
            for port in ports {
                let Some(&place) = self.places.get(port) else {
                    counters.drops(DropReason::NoQueue, 1);
                    continue;
                };
                let PortQueue { backend, mtu, .. } = self.ports[place];
                let backend = if several { Backend::Plain } else { backend };
                let frame = &mut self.datagrams[index].payload_mut()[HEADER_LEN..];
                match inward::prepare(frame, backend, mtu) {
                    Ok(Handover::Whole(offload)) => self.deliveries.push(Delivery {
                        frame: index,
                        place,
                        offload,
                    }),
                    Ok(Handover::Cut) => {
                        // What came before it goes before it.
                        let datagrams = &self.datagrams;
                        let inner = |index: usize| &datagrams[index].payload()[HEADER_LEN..];
                        let seen = captures.zip(Some(&**tables));
                        deliver_all(&mut self.ports, &mut self.deliveries, counters, seen, inner);
                        deliver_cut(&mut self.ports[place], inner(index), counters, seen);
                    }
                    Err(reason) => counters.drops(reason, 1),
                }
            }
        }
        let datagrams = &self.datagrams;
        deliver_all(
            &mut self.ports,
            &mut self.deliveries,
            counters,
            captures.zip(Some(&*tables)),
            |index| &datagrams[index].payload()[HEADER_LEN..],
        );
        Ok(true)
    }
}

impl WorkerConfig {
    /// Where copies go, while anybody wants some.
    fn captures(&self) -> Option<&CaptureHub> {
        self.captures.is_active().then_some(&*self.captures)
    }
}

/// Does what a container left to a network card: refuses what is impossible, and completes the checksum.
fn finish(frame: &mut FrameBuf, mtu: u16) -> Result<(), DropReason> {
    let offload = frame.offload;
    offload::check(frame.frame(), &offload, mtu)?;
    // Segmentation is not offered to containers, so none may ask for it.
    if offload.is_gso() {
        return Err(DropReason::BadOffload);
    }
    if offload.needs_checksum() {
        if !checksum::complete(frame.frame_mut(), offload.csum_start, offload.csum_offset) {
            return Err(DropReason::BadOffload);
        }
        frame.offload = Offload::default();
    }
    Ok(())
}
