//! From a port to other hosts and to other ports: what a container left to a network card is done here, as late as can be.
//!
//! A checksum is completed, and a super-frame cut, only where the frame leaves the host or meets a port that can't take it as it
//! is: between two containers of one host nothing is summed or cut.

use std::io::{self, IoSlice};
use std::time::Instant;

use super::delivery::{PortQueue, deliver_all, deliver_cut, hand_over};
use super::sends::{NOTHING, Outgoing};
use super::{Sends, Worker};
use crate::capture::Place;
use crate::ecn;
use crate::edge::{Datagram, Offload, TapFrame, Underlay};
use crate::engine::Verdict;
use crate::fdb::PortId;
use crate::flow;
use crate::frame::FrameBuf;
use crate::offload::coalesce::Span;
use crate::offload::segment::SuperFrame;
use crate::offload::{self, checksum};
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
        let captures = self.config.captures();
        let seen = captures.zip(Some(&**tables));
        let counters = &*self.counters;
        let mtu = self.ports[origin].mtu;
        for index in 0..count {
            let frame = &mut self.frames[index];
            counters.frames_in(1);
            counters.frame_bytes_in(frame.frame().len() as u64);
            if let Some(captures) = captures
                && let Some(port) = tables.port(id)
            {
                captures.offer(Place::FromPort(id), port.vni, frame.frame());
            }
            if let Err(reason) = admit(frame, mtu) {
                counters.drops(reason, 1);
                continue;
            }
            let verdict = self.engine.handle_frame(&tables, id, frame.frame(), now);
            let (ports, remotes) = match &verdict {
                Verdict::Deliver { port } => (std::slice::from_ref(port), None),
                Verdict::Send { vni, remote } => {
                    (&[][..], Some((*vni, std::slice::from_ref(remote))))
                }
                Verdict::Flood {
                    vni,
                    ports,
                    remotes,
                } => {
                    counters.floods(1);
                    (*ports, Some((*vni, *remotes)))
                }
                Verdict::Answer { .. } => {
                    counters.answers(1);
                    let slices = [IoSlice::new(self.engine.answer())];
                    let answer = TapFrame {
                        slices: &slices,
                        offload: Offload::default(),
                    };
                    hand_over(&mut self.ports[origin], &[answer], counters);
                    continue;
                }
                Verdict::Drop(reason) => {
                    counters.drops(*reason, 1);
                    continue;
                }
            };
            if let Some((vni, remotes)) = remotes {
                let flow = flow::hash(frame.frame());
                if frame.offload.is_gso() {
                    self.sends
                        .flush(&mut self.underlay, &self.frames, counters, captures);
                    let frame = &self.frames[index];
                    send_super(
                        &mut self.sends,
                        &mut self.underlay,
                        frame,
                        (vni, remotes, flow, mtu),
                        counters,
                    );
                    if let Some(captures) = captures {
                        for &to in remotes {
                            captures.offer(Place::ToRemote(to), vni, frame.frame());
                        }
                    }
                } else {
                    if !complete(frame) {
                        counters.drops(DropReason::BadOffload, 1);
                        continue;
                    }
                    frame.set_header(&Header::emit(vni));
                    for &to in remotes {
                        self.sends.push(Outgoing {
                            frame: index,
                            vni,
                            to,
                            flow,
                        });
                    }
                    if self.sends.is_full() {
                        self.sends
                            .flush(&mut self.underlay, &self.frames, counters, captures);
                    }
                }
            }
            for port in ports.iter().filter(|port| **port != id) {
                let Some(&place) = self.places.get(port) else {
                    counters.drops(DropReason::NoQueue, 1);
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
                    counters.drops(DropReason::BadOffload, 1);
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
                    deliver_all(&mut self.ports, deliveries, counters, seen, buffer);
                }
                if offload.is_gso() && (plain || udp && !features.udp) {
                    deliver_all(&mut self.ports, deliveries, counters, seen, buffer);
                    match SuperFrame::requested(frame.frame(), &offload, mtu) {
                        Ok(cut) => {
                            deliver_cut(&mut self.ports[place], &cut, frame.frame(), counters, seen)
                        }
                        Err(reason) => counters.drops(reason, 1),
                    }
                } else if offload.needs_checksum() && !offload.is_gso() {
                    deliveries.push(place, span, frame.frame(), offload, features);
                } else {
                    deliveries.push_whole(place, span, frame.frame(), offload);
                }
            }
        }
        self.sends
            .flush(&mut self.underlay, &self.frames, counters, captures);
        let frames = &self.frames;
        deliver_all(
            &mut self.ports,
            &mut self.deliveries,
            counters,
            seen,
            |index| frames[index].frame(),
        );
        Ok(true)
    }
}

/// Cuts a super-frame and sends it to all of `remotes`.
fn send_super<U: Underlay>(
    sends: &mut Sends,
    underlay: &mut U,
    frame: &FrameBuf,
    (vni, remotes, flow, mtu): (crate::Vni, &[std::net::SocketAddr], u32, u16),
    counters: &crate::stats::WorkerCounters,
) {
    match SuperFrame::requested(frame.frame(), &frame.offload, mtu) {
        Ok(super_frame) => {
            let like = Datagram {
                flow,
                ecn: ecn::of_frame(frame.frame()),
                ..NOTHING
            };
            sends.send_super(underlay, &super_frame, &like, (vni, remotes), counters);
        }
        Err(reason) => counters.drops(reason, 1),
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
