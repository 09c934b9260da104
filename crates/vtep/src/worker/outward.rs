//! From a port to other hosts and to other ports: what a container left to a network card is done here, as late as can be.
//!
//! A checksum is completed, and a super-frame cut, only where the frame leaves the host or meets a port that can't take it as it
//! is: between two containers of one host nothing is summed or cut.

use std::io::{self, IoSlice};
use std::time::Instant;

use super::Worker;
use super::delivery::{PortQueue, deliver_all, deliver_cut, hand_over};
use super::sends::{NOTHING, Outgoing};
use super::too_big::{Cutter, Teller};
use crate::edge::{Datagram, Offload, TapFrame, Underlay};
use crate::engine::Verdict;
use crate::fdb::PortId;
use crate::flow;
use crate::frame::FrameBuf;
use crate::offload::coalesce::Span;
use crate::offload::segment::SuperFrame;
use crate::offload::{self, checksum};
use crate::settings::WireSettings;
use crate::stats::DropReason;
use crate::tap::Backend;
use crate::vxlan::Header;

impl<U: Underlay> Worker<U> {
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
        let ledger = self.config.ledger(&self.counters, &tables, Some(id));
        let mtu = self.ports[origin].mtu;
        let network = tables.port(id).and_then(|port| tables.network(port.vni));
        let settings = network.map_or_else(WireSettings::default, |one| one.config().settings);
        for index in 0..count {
            let frame = &mut self.frames[index];
            ledger.frame_in(frame.frame().len());
            let verdict = match admit(frame, mtu) {
                Ok(()) => self.engine.handle_frame(&tables, id, frame.frame(), now),
                Err(reason) => Verdict::Drop(reason),
            };
            ledger.frame_decided(frame.frame(), &verdict);
            let (ports, remotes) = match &verdict {
                Verdict::Deliver { port } => (std::slice::from_ref(port), None),
                Verdict::Send { vni, remote } => {
                    (&[][..], Some((*vni, std::slice::from_ref(remote))))
                }
                Verdict::Flood {
                    vni,
                    ports,
                    remotes,
                } => (*ports, Some((*vni, *remotes))),
                Verdict::Answer { .. } => {
                    let slices = [IoSlice::new(self.engine.answer())];
                    let answer = TapFrame {
                        slices: &slices,
                        offload: Offload::default(),
                    };
                    hand_over(&mut self.ports[origin], &[answer], &ledger);
                    continue;
                }
                Verdict::Drop(_) => continue,
            };
            if let Some((vni, remotes)) = remotes {
                let flow = flow::hash(frame.frame());
                let outer = settings.outer(frame.frame());
                if frame.offload.is_gso() {
                    self.sends.flush(&mut self.underlay, &self.frames, &ledger);
                    let mut cutter = Cutter {
                        sends: &mut self.sends,
                        underlay: &mut self.underlay,
                        config: &self.config,
                        ledger: &ledger,
                        now,
                    };
                    let like = Datagram {
                        flow,
                        outer,
                        ..NOTHING
                    };
                    cutter.send((index, &self.frames[index]), (vni, remotes, mtu), &like);
                } else {
                    if !complete(frame) {
                        let drop = Verdict::Drop(DropReason::BadOffload);
                        ledger.frame_decided(frame.frame(), &drop);
                        continue;
                    }
                    frame.set_header(&Header::emit(vni));
                    let flow = flow::hash(frame.frame());
                    for &to in remotes {
                        let outgoing = Outgoing {
                            frame: index,
                            to,
                            flow,
                            outer,
                        };
                        let len = frame.frame().len();
                        if self.config.limit_below(len, to, now).is_none() {
                            self.sends.push(outgoing);
                            continue;
                        }
                        let slices = [IoSlice::new(frame.datagram())];
                        let datagram = Datagram {
                            to,
                            flow,
                            outer,
                            slices: &slices,
                            ..NOTHING
                        };
                        self.sends.refuse(outgoing, &datagram, &ledger);
                    }
                    if self.sends.is_full() {
                        self.sends.flush(&mut self.underlay, &self.frames, &ledger);
                    }
                }
            }
            for port in ports.iter().filter(|port| **port != id) {
                let Some(&place) = self.places.get(port) else {
                    let frame = self.frames[index].frame();
                    ledger.undelivered(*port, frame, DropReason::NoQueue);
                    continue;
                };
                let PortQueue {
                    backend, features, ..
                } = self.ports[place];
                let plain = backend == Backend::Plain;
                // Ports of one network are on one VNI and have one MTU: the origin's.
                if plain
                    && !self.frames[index].offload.is_gso()
                    && !complete(&mut self.frames[index])
                {
                    let frame = self.frames[index].frame();
                    ledger.undelivered(*port, frame, DropReason::BadOffload);
                    continue;
                }
                let (frame, frames) = (&self.frames[index], &self.frames);
                let buffer = |index: usize| frames[index].frame();
                let deliveries = &mut self.deliveries;
                let span = Span {
                    buffer: index,
                    start: 0,
                    len: frame.frame().len(),
                };
                let offload = frame.offload;
                let udp = offload.gso_type == Offload::GSO_UDP_L4;
                if deliveries.is_full() {
                    deliver_all(&mut self.ports, deliveries, &ledger, buffer);
                }
                if offload.is_gso() && (plain || udp && !features.udp) {
                    deliver_all(&mut self.ports, deliveries, &ledger, buffer);
                    match SuperFrame::requested(frame.frame(), &offload, mtu) {
                        Ok(cut) => deliver_cut(&mut self.ports[place], &cut, &ledger),
                        Err(reason) => ledger.undelivered(*port, frame.frame(), reason),
                    }
                } else if offload.needs_checksum() && !offload.is_gso() {
                    deliveries.push(place, span, frame.frame(), offload, features);
                } else {
                    deliveries.push_whole(place, span, frame.frame(), offload);
                }
            }
        }
        self.sends.flush(&mut self.underlay, &self.frames, &ledger);
        let mut teller = Teller {
            engine: &mut self.engine,
            tables: &tables,
            paths: &self.config.paths,
            origin: &mut self.ports[origin],
            frames: &self.frames,
            ledger: &ledger,
        };
        teller.tell(&mut self.sends, now);
        let frames = &self.frames;
        deliver_all(&mut self.ports, &mut self.deliveries, &ledger, |index| {
            frames[index].frame()
        });
        Ok(true)
    }
}

/// Refuses what a container's vnet header can't mean, and leaves in `offload` only what it does.
///
/// TCP's and UDP's checksums stay partial for now; any other is completed here, where nothing else would.
fn admit(frame: &mut FrameBuf, mtu: u16) -> Result<(), DropReason> {
    let offload = frame.offload;
    offload::check(frame.frame(), &offload, mtu)?;
    if offload.is_gso() {
        frame.offload = SuperFrame::requested(frame.frame(), &offload, mtu)?.offload();
        return Ok(());
    }
    if !offload.needs_checksum() {
        frame.offload = Offload::default();
        return Ok(());
    }
    frame.offload = Offload::partial(offload.csum_start, offload.csum_offset);
    if !matches!(offload.csum_offset, 6 | 16) && !complete(frame) {
        return Err(DropReason::BadOffload);
    }
    Ok(())
}

/// Completes the checksum, if there is one to complete. Says whether there was a place for it.
fn complete(frame: &mut FrameBuf) -> bool {
    let offload = frame.offload;
    if !offload.needs_checksum() {
        return true;
    }
    frame.offload = Offload::default();
    checksum::complete(frame.frame_mut(), offload.csum_start, offload.csum_offset)
}
