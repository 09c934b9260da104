//! Copies of frames and datagrams as they pass, with what became of them, for whoever looks.
//!
//! ```text
//! container ──FromPort──► verdict ──ToRemote──► underlay        each place hands in its own copy,
//! container ◄──ToPort──── verdict ◄──FromRemote── underlay      once what becomes of it is known
//! ```
//!
//! A capture is lossy by design: workers never wait for a reader, and while nobody captures they pay one relaxed load
//! a batch. Each reader has its own queue, bounded in number and in bytes; what does not fit is counted and gone. A
//! worker asks for the time of day here, and only while somebody captures.
//!
//! Of a datagram the payload is copied. Its outer headers are the kernel's: [`Outer::packet`] makes them anew.

mod outer;
#[cfg(test)]
mod tests;

use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::Vni;
use crate::edge::OuterFields;
use crate::engine::Verdict;
use crate::fdb::PortId;
use crate::flow::{SOURCE_PORTS, source_port_index};
use crate::stats::DropReason;
use crate::vxlan::{HEADER_LEN, Header};

pub use outer::Outer;

/// Copies a reader may lag behind.
const QUEUE_COPIES: usize = 4096;
/// Bytes of frames a reader may lag behind: super-frames are large. It bounds what one capture takes of the memory.
const QUEUE_BYTES: usize = 16 << 20;

/// Where a copy was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A container sent it.
    FromPort(PortId),
    /// For a container.
    ToPort(PortId),
    /// A remote VTEP sent it.
    FromRemote(SocketAddr),
    /// For a remote VTEP.
    ToRemote(SocketAddr),
}

/// What became of it at that place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Goes to a port.
    Deliver(PortId),
    /// Goes to a remote VTEP.
    Send(SocketAddr),
    /// Goes to several places.
    Flood {
        /// Ports that get a copy.
        ports: usize,
        /// Remote VTEPs that get a copy.
        remotes: usize,
    },
    /// Was answered here.
    Answer,
    /// A reachability probe that was expected.
    Probe,
    /// Taken by the kernel, which carries it on.
    Passed,
    /// Dropped.
    Drop(DropReason),
}

/// One copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// When it was taken.
    pub time: SystemTime,
    /// Where it was taken.
    pub place: Place,
    /// Its network; `None` when it has no valid VXLAN header, or came from a port that no table has.
    pub vni: Option<Vni>,
    /// What became of it.
    pub fate: Fate,
    /// The outer headers, of a datagram.
    pub outer: Option<Outer>,
    /// At a port the Ethernet frame, at a remote the UDP payload. A checksum in a frame may be partial: a container leaves it to its
    /// interface, and a remote on the same machine to a network card. A super-frame is one copy until it is cut. A mark
    /// of the underlay's congestion is in the inner header already.
    pub bytes: Vec<u8>,
}

impl Captured {
    /// The inner Ethernet frame; empty when there is none.
    #[must_use]
    pub fn frame(&self) -> &[u8] {
        match (self.place, self.vni) {
            (Place::FromPort(_) | Place::ToPort(_), _) => &self.bytes,
            (_, Some(_)) => self.bytes.get(HEADER_LEN..).unwrap_or_default(),
            (_, None) => &[],
        }
    }
}

/// What a capture wants to see: what fits all that is set; the default is everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaptureFilter {
    /// Only this network.
    pub vni: Option<Vni>,
    /// Only frames from and to one of these ports, the datagrams those leave in, and datagrams delivered to them; when
    /// empty, any.
    pub ports: Vec<PortId>,
    /// Only datagrams from and to the VTEP with this address, and containers' frames that are sent to it.
    pub remote: Option<IpAddr>,
}

/// What a filter is asked about.
#[derive(Clone, Copy)]
struct Concern<'a> {
    vni: Option<Vni>,
    /// Ports at either end; several of a flood.
    ports: [&'a [PortId]; 2],
    /// Remotes at either end; several of a flood.
    remotes: &'a [SocketAddr],
}

impl CaptureFilter {
    fn wants(&self, concern: &Concern<'_>) -> bool {
        let has_port = |id| concern.ports.iter().any(|ports| ports.contains(id));
        self.vni.is_none_or(|vni| concern.vni == Some(vni))
            && (self.ports.is_empty() || self.ports.iter().any(has_port))
            && self
                .remote
                .is_none_or(|addr| concern.remotes.iter().any(|remote| remote.ip() == addr))
    }
}

/// A running capture; dropping it ends it.
#[derive(Debug)]
pub struct Capture {
    copies: Receiver<Captured>,
    lag: Arc<Lag>,
    hub: Arc<CaptureHub>,
}

impl Capture {
    /// The next copy, waited for at most this long.
    #[must_use]
    pub fn next(&self, limit: Duration) -> Option<Captured> {
        match self.copies.recv_timeout(limit) {
            Ok(copy) => {
                self.lag
                    .bytes
                    .fetch_sub(copy.bytes.len(), Ordering::Relaxed);
                Some(copy)
            }
            // The hub keeps the other end as long as this capture is listed.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => None,
        }
    }

    /// The copies that wait now.
    pub fn waiting(&self) -> impl Iterator<Item = Captured> + '_ {
        std::iter::from_fn(|| self.next(Duration::ZERO))
    }

    /// Copies that found the queue full.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.lag.missed.load(Ordering::Relaxed)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.hub.remove(&self.lag);
    }
}

/// How far behind one reader is.
#[derive(Debug, Default)]
struct Lag {
    /// Bytes in its queue.
    bytes: AtomicUsize,
    missed: AtomicU64,
}

#[derive(Clone, Debug)]
struct Reader {
    filter: CaptureFilter,
    copies: Sender<Captured>,
    lag: Arc<Lag>,
}

impl Reader {
    fn take(&self, copy: impl FnOnce() -> Captured, len: usize) {
        // Several workers may pass this check at once, and exceed the limit by a frame each.
        let room = self.lag.bytes.load(Ordering::Relaxed) + len <= QUEUE_BYTES;
        if room && !self.copies.is_full() {
            self.lag.bytes.fetch_add(len, Ordering::Relaxed);
            if self.copies.try_send(copy()).is_ok() {
                return;
            }
            self.lag.bytes.fetch_sub(len, Ordering::Relaxed);
        }
        self.lag.missed.fetch_add(1, Ordering::Relaxed);
    }
}

/// Where workers hand in what they see.
#[derive(Debug, Default)]
pub struct CaptureHub {
    active: AtomicBool,
    readers: ArcSwap<Vec<Reader>>,
    own: ArcSwap<Own>,
}

/// This VTEP's own end of its datagrams.
#[derive(Debug, Default)]
struct Own {
    listen: Option<SocketAddr>,
    source_ports: Vec<u16>,
}

impl Own {
    /// Where a datagram of this flow leaves from.
    fn source(&self, fields: OuterFields, flow: u32) -> Option<SocketAddr> {
        let index = source_port_index(flow);
        let with_checksum = self.source_ports.get(index);
        let source = if fields.checksum {
            with_checksum
        } else {
            let unsummed = self.source_ports.get(SOURCE_PORTS + index);
            unsummed.or(with_checksum)
        };
        Some(SocketAddr::new(self.listen?.ip(), *source?))
    }
}

impl CaptureHub {
    /// Says that this VTEP receives at `listen` and sends from these ports, in the order of
    /// [`crate::udp::SendSockets::source_ports`]. Before this, copies have no outer headers.
    pub fn set_own(&self, listen: SocketAddr, source_ports: Vec<u16>) {
        self.own.store(Arc::new(Own {
            listen: Some(listen),
            source_ports,
        }));
    }

    /// Starts a capture.
    #[must_use]
    pub fn start(self: &Arc<Self>, filter: CaptureFilter) -> Capture {
        let (sender, copies) = bounded(QUEUE_COPIES);
        let lag = Arc::new(Lag::default());
        let reader = Reader {
            filter,
            copies: sender,
            lag: Arc::clone(&lag),
        };
        self.readers.rcu(|readers| {
            let mut readers = Vec::clone(readers);
            readers.push(reader.clone());
            readers
        });
        self.active.store(true, Ordering::Relaxed);
        Capture {
            copies,
            lag,
            hub: Arc::clone(self),
        }
    }

    /// Whether anybody looks: asked once a batch.
    #[inline]
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// A container's frame with its verdict.
    pub fn from_port(&self, id: PortId, vni: Option<Vni>, frame: &[u8], verdict: &Verdict<'_>) {
        let (to_port, to_remote);
        let (fate, ports, remotes): (_, &[_], &[_]) = match *verdict {
            Verdict::Deliver { port } => {
                to_port = port;
                (Fate::Deliver(port), std::slice::from_ref(&to_port), &[])
            }
            Verdict::Send { remote, .. } => {
                to_remote = remote;
                (Fate::Send(remote), &[], std::slice::from_ref(&to_remote))
            }
            Verdict::Flood { ports, remotes, .. } => {
                let others = ports.iter().filter(|port| **port != id).count();
                let fate = Fate::Flood {
                    ports: others,
                    remotes: remotes.len(),
                };
                (fate, ports, remotes)
            }
            Verdict::Answer { .. } => (Fate::Answer, &[], &[]),
            Verdict::Drop(reason) => (Fate::Drop(reason), &[], &[]),
        };
        let concern = Concern {
            vni,
            ports: [&[id], ports],
            remotes,
        };
        self.hand_in(
            &concern,
            Place::FromPort(id),
            fate,
            None,
            &[IoSlice::new(frame)],
        );
    }

    /// A frame for a container, with why it was not handed over, where it was not.
    pub fn to_port(
        &self,
        id: PortId,
        vni: Option<Vni>,
        frame: &[IoSlice<'_>],
        drop: Option<DropReason>,
    ) {
        let concern = Concern {
            vni,
            ports: [&[id], &[]],
            remotes: &[],
        };
        let fate = drop.map_or(Fate::Passed, Fate::Drop);
        self.hand_in(&concern, Place::ToPort(id), fate, None, frame);
    }

    /// A remote's datagram with what becomes of it; `ports` are those that it is for.
    pub fn from_remote(
        &self,
        from: SocketAddr,
        class: u8,
        payload: &[u8],
        fate: Fate,
        ports: &[PortId],
    ) {
        let concern = Concern {
            vni: vni_of(payload),
            ports: [ports, &[]],
            remotes: &[from],
        };
        let outer = self.own.load().listen.map(|to| Outer {
            from,
            to,
            fields: OuterFields::with_class(class),
        });
        self.hand_in(
            &concern,
            Place::FromRemote(from),
            fate,
            outer,
            &[IoSlice::new(payload)],
        );
    }

    /// A datagram for a remote, with why it was not sent, where it was not. `origin` is the port whose frame is in it.
    pub fn to_remote(
        &self,
        origin: Option<PortId>,
        (to, fields, flow): (SocketAddr, OuterFields, u32),
        payload: &[IoSlice<'_>],
        drop: Option<DropReason>,
    ) {
        let concern = Concern {
            vni: payload.first().and_then(|first| vni_of(first)),
            ports: [origin.as_slice(), &[]],
            remotes: &[to],
        };
        let own = self.own.load();
        let outer = own
            .source(fields, flow)
            .map(|from| Outer { from, to, fields });
        let fate = drop.map_or(Fate::Passed, Fate::Drop);
        self.hand_in(&concern, Place::ToRemote(to), fate, outer, payload);
    }

    /// Gives every reader that wants it a copy.
    fn hand_in(
        &self,
        concern: &Concern<'_>,
        place: Place,
        fate: Fate,
        outer: Option<Outer>,
        pieces: &[IoSlice<'_>],
    ) {
        let len = pieces.iter().map(|piece| piece.len()).sum();
        let readers = self.readers.load();
        for reader in readers.iter().filter(|one| one.filter.wants(concern)) {
            let copy = || {
                let mut bytes = Vec::with_capacity(len);
                pieces
                    .iter()
                    .for_each(|piece| bytes.extend_from_slice(piece));
                Captured {
                    time: SystemTime::now(),
                    place,
                    vni: concern.vni,
                    fate,
                    outer,
                    bytes,
                }
            };
            reader.take(copy, len);
        }
    }

    fn remove(&self, lag: &Arc<Lag>) {
        self.readers.rcu(|readers| {
            readers
                .iter()
                .filter(|reader| !Arc::ptr_eq(&reader.lag, lag))
                .cloned()
                .collect::<Vec<_>>()
        });
        // A capture that starts between these two lines sets the flag after its reader is listed, so reading the list
        // again after clearing the flag can't lose it.
        self.active.store(false, Ordering::SeqCst);
        if !self.readers.load().is_empty() {
            self.active.store(true, Ordering::SeqCst);
        }
    }
}

/// The VNI of a payload with a valid VXLAN header.
fn vni_of(payload: &[u8]) -> Option<Vni> {
    Header::parse(payload)
        .filter(|(header, _)| header.vni_valid)
        .map(|(header, _)| header.vni)
}
