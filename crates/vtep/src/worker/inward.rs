//! From the underlay to ports: what each datagram's frame still needs before a container can take it.
//!
//! A peer on a veth or virtio link leaves two kinds of work to a network card that never comes: checksums that hold only
//! the pseudo-header's sum, and TCP packets far larger than the MTU ("super-frames"). A port with a vnet header passes
//! that work on to the container's kernel; for one without, it is done here. What is left are whole frames with verified
//! checksums, which are merged by flow.

use std::io;
use std::time::Instant;

use super::delivery::{PortQueue, deliver_all, deliver_cut};
use super::{Worker, probes};
use crate::capture::Fate;
use crate::edge::{Offload, Underlay};
use crate::engine::{Arrival, Verdict};
use crate::fdb::PortId;
use crate::offload::checksum::{self, L4};
use crate::offload::coalesce::Span;
use crate::offload::fits;
use crate::offload::segment::SuperFrame;
use crate::stats::DropReason;
use crate::tap::Backend;
use crate::traffic_class;
use crate::vxlan::{self, Class, HEADER_LEN};

impl<U: Underlay> Worker<U> {
    /// Takes one batch of datagrams from the underlay. Says whether there was one.
    ///
    /// # Errors
    /// When the socket is broken.
    pub fn poll_underlay(&mut self, now: Instant) -> io::Result<bool> {
        let count = self.underlay.recv(&mut self.datagrams)?;
        if count == 0 {
            return Ok(false);
        }
        let tables = self.config.tables.load();
        let ledger = self.config.ledger(&self.counters, &tables, None);
        for index in 0..count {
            let from = self.datagrams[index].from;
            let class = self.datagrams[index].class;
            let bytes = self.datagrams[index].payload().len();
            let merged = self.datagrams[index].datagrams().count();
            ledger.datagrams_in(from, merged as u64, bytes as u64);
            let decided = |payload: &[u8], fate, ports: &[PortId]| {
                ledger.datagram_decided(from, class, payload, fate, ports);
            };
            // Every datagram of a merged buffer is checked for itself: the kernel knows nothing of what is inside.
            for range in self.datagrams[index].datagrams() {
                let payload = &self.datagrams[index].payload()[range.clone()];
                let other = match vxlan::classify(payload) {
                    Class::Vxlan => None,
                    Class::Probe => {
                        let (edge, came) = (&mut self.underlay, (from, payload));
                        Some(probes::take(&self.config, edge, &tables, came, now))
                    }
                    Class::Unknown => Some(Fate::Drop(DropReason::NoVniFlag)),
                };
                if let Some(fate) = other {
                    decided(payload, fate, &[]);
                    continue;
                }
                let Arrival {
                    verdict,
                    vni,
                    frame,
                    dscp,
                } = self.engine.handle_datagram(&tables, from, payload, now);
                // One port may have its kernel do the rest; for several it is done once, here.
                let (fate, ports, several) = match &verdict {
                    Verdict::Deliver { port } => {
                        (Fate::Deliver(*port), std::slice::from_ref(port), false)
                    }
                    Verdict::Flood { ports, .. } => {
                        self.config.misdeliveries.note(vni, frame, from.ip());
                        let fate = Fate::Flood {
                            ports: ports.len(),
                            remotes: 0,
                        };
                        (fate, *ports, true)
                    }
                    Verdict::Drop(reason) => {
                        if matches!(reason, DropReason::SplitHorizon | DropReason::FloodOff) {
                            self.config.misdeliveries.note(vni, frame, from.ip());
                        }
                        decided(payload, Fate::Drop(*reason), &[]);
                        continue;
                    }
                    Verdict::Send { .. } | Verdict::Answer { .. } => {
                        // Split horizon, and nothing that a remote sends is answered: the engine never says this.
                        decided(payload, Fate::Drop(DropReason::SplitHorizon), &[]);
                        continue;
                    }
                };
                // A sender may have padded it to the length of its neighbours.
                let len = checksum::ip_end(frame).unwrap_or(frame.len());
                let span = Span {
                    buffer: index,
                    start: range.start + HEADER_LEN,
                    len,
                };
                let inner = span.start..span.start + len;
                let frame = &mut self.datagrams[index].payload_mut()[inner.clone()];
                let marked = traffic_class::decapsulate(frame, class, dscp);
                let payload = &self.datagrams[index].payload()[range.clone()];
                if let Err(reason) = marked {
                    decided(payload, Fate::Drop(reason), ports);
                    continue;
                }
                decided(payload, fate, ports);
                for port in ports {
                    let Some(&place) = self.places.get(port) else {
                        let frame = &self.datagrams[index].payload()[inner.clone()];
                        ledger.undelivered(*port, frame, DropReason::NoQueue);
                        continue;
                    };
                    let PortQueue {
                        backend,
                        mtu,
                        features,
                        ..
                    } = self.ports[place];
                    let backend = if several { Backend::Plain } else { backend };
                    let frame = &mut self.datagrams[index].payload_mut()[inner.clone()];
                    let handover = prepare(frame, backend, mtu);
                    let (frame, datagrams) = (
                        &self.datagrams[index].payload()[inner.clone()],
                        &self.datagrams,
                    );
                    let buffer = |index: usize| datagrams[index].payload();
                    let deliveries = &mut self.deliveries;
                    if deliveries.is_full() {
                        deliver_all(&mut self.ports, deliveries, &ledger, buffer);
                    }
                    match handover {
                        Ok(Handover::Merge(offload)) => {
                            deliveries.push(place, span, frame, offload, features);
                        }
                        Ok(Handover::Whole(offload)) => {
                            deliveries.push_whole(place, span, frame, offload);
                        }
                        Ok(Handover::Cut) => {
                            // What came before it goes before it.
                            deliver_all(&mut self.ports, deliveries, &ledger, buffer);
                            match SuperFrame::merged_by_peer(frame, mtu) {
                                Ok(cut) => {
                                    let port = &mut self.ports[place];
                                    deliver_cut(port, &cut, &ledger);
                                }
                                Err(reason) => ledger.undelivered(*port, frame, reason),
                            }
                        }
                        Err(reason) => ledger.undelivered(*port, frame, reason),
                    }
                }
            }
        }
        let datagrams = &self.datagrams;
        deliver_all(&mut self.ports, &mut self.deliveries, &ledger, |index| {
            datagrams[index].payload()
        });
        Ok(true)
    }
}

/// How a container can take a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Handover {
    /// Merged with others, if it can be; else its kernel does what is asked.
    Merge(Offload),
    /// As it is; its kernel does what is asked.
    Whole(Offload),
    /// Cut to segments by us.
    Cut,
}

/// Says how a port can take `frame`. Completes a partial checksum in place where the container's kernel can't.
///
/// # Errors
/// See [`SuperFrame::merged_by_peer`]; also [`DropReason::Oversize`] for what is too large and has no partial checksum: it did not
/// come from a stack that counts on segmentation.
fn prepare(frame: &mut [u8], backend: Backend, mtu: u16) -> Result<Handover, DropReason> {
    let fits = fits(frame, mtu);
    let checksum = if fits {
        checksum::inspect(frame)
    } else {
        checksum::inspect_super(frame)
    };
    match (checksum, fits, backend) {
        (L4::Partial { start, offset }, true, Backend::Offload) => {
            Ok(Handover::Merge(Offload::partial(start, offset)))
        }
        (L4::Partial { .. }, false, Backend::Offload) => {
            let super_frame = SuperFrame::merged_by_peer(frame, mtu)?;
            Ok(Handover::Whole(super_frame.offload()))
        }
        (L4::Partial { start, offset }, true, Backend::Plain) => {
            let completed = checksum::complete(frame, start, offset);
            debug_assert!(completed, "its place was found in this very frame");
            Ok(Handover::Whole(Offload::default()))
        }
        (L4::Partial { .. }, false, Backend::Plain) => {
            SuperFrame::merged_by_peer(frame, mtu).map(|_| Handover::Cut)
        }
        (_, false, _) => Err(DropReason::Oversize),
        // Verified here, so the container's kernel need not sum it again.
        (L4::Valid, true, Backend::Offload) => Ok(Handover::Merge(Offload {
            flags: Offload::DATA_VALID,
            ..Offload::default()
        })),
        // A wrong one is the container's to see, as it would be on a wire.
        (L4::None | L4::Valid | L4::Bad, true, _) => Ok(Handover::Whole(Offload::default())),
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;
    use crate::ethernet::Frame;
    use crate::ip::{Packet, pseudo_header_sum};
    use crate::offload::checksum::fold;

    /// A TCP frame as a veth peer sends it: the checksum holds the pseudo-header's sum.
    fn partial_frame(v6: bool, payload: usize) -> Vec<u8> {
        let mut frame = whole(v6, payload);
        let view = Frame::parse(&frame).unwrap();
        let packet = Packet::parse(&view).unwrap().unwrap();
        let sum = pseudo_header_sum(
            packet.source,
            packet.destination,
            packet.protocol,
            packet.body.len(),
        );
        let field = view.payload_offset() + packet.body_offset + 16;
        frame[field..field + 2].copy_from_slice(&fold(sum).to_be_bytes());
        frame
    }

    fn whole(v6: bool, payload: usize) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let builder = if v6 {
            builder.ipv6([1; 16], [2; 16], 64)
        } else {
            builder.ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
        };
        let mut frame = Vec::new();
        builder
            .tcp(1, 2, 3, 4)
            .ack(5)
            .write(&mut frame, &vec![7; payload])
            .unwrap();
        frame
    }

    #[test]
    fn partial_checksums_are_passed_on_or_completed() {
        for (v6, start) in [(false, 34), (true, 54)] {
            let mut frame = partial_frame(v6, 100);
            let handover = prepare(&mut frame, Backend::Offload, 1450);
            assert_eq!(handover, Ok(Handover::Merge(Offload::partial(start, 16))));
            assert_eq!(frame, partial_frame(v6, 100));
            let handover = prepare(&mut frame, Backend::Plain, 1450);
            assert_eq!(handover, Ok(Handover::Whole(Offload::default())));
            assert_eq!(frame, whole(v6, 100));
        }
    }

    #[test]
    fn a_super_frame_is_cut_by_the_container_kernel_or_by_us() {
        for (v6, gso_type, headers) in [
            (false, Offload::GSO_TCPV4, 40),
            (true, Offload::GSO_TCPV6, 60),
        ] {
            let mut frame = partial_frame(v6, 60_000);
            let Ok(Handover::Whole(offload)) = prepare(&mut frame, Backend::Offload, 1450) else {
                panic!("it can be passed on");
            };
            assert_eq!(
                (offload.gso_type, offload.gso_size),
                (gso_type, 1450 - headers)
            );
            assert_eq!(
                (offload.flags, offload.csum_offset),
                (Offload::NEEDS_CSUM, 16)
            );
            assert_eq!(prepare(&mut frame, Backend::Plain, 1450), Ok(Handover::Cut));
            assert_eq!(frame, partial_frame(v6, 60_000));
        }
    }

    #[test]
    fn what_is_too_large_for_other_reasons_is_dropped() {
        let mut frame = whole(false, 1500);
        for backend in [Backend::Offload, Backend::Plain] {
            assert_eq!(
                prepare(&mut frame, backend, 1450),
                Err(DropReason::Oversize)
            );
        }
    }

    #[test]
    fn verified_checksums_are_said_to_be() {
        let mut frame = whole(true, 9);
        let valid = Offload {
            flags: Offload::DATA_VALID,
            ..Offload::default()
        };
        assert_eq!(
            prepare(&mut frame, Backend::Offload, 1450),
            Ok(Handover::Merge(valid))
        );
        frame[60] ^= 1;
        let unchecked = Ok(Handover::Whole(Offload::default()));
        assert_eq!(prepare(&mut frame, Backend::Offload, 1450), unchecked);
        assert_eq!(prepare(&mut frame, Backend::Plain, 1450), unchecked);
    }
}
