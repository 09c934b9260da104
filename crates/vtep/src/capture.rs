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

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: PortId = PortId(1);

    fn vni(number: u32) -> Vni {
        Vni::new(number).unwrap()
    }

    fn remote(host: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, host], 4789))
    }

    fn datagram(number: u32) -> Vec<u8> {
        [&Header::emit(vni(number))[..], b"frame"].concat()
    }

    /// Places of what waits.
    fn places(capture: &Capture) -> Vec<Place> {
        capture.waiting().map(|copy| copy.place).collect()
    }

    /// A frame from port 1 on network 7 that is sent to host 2, one flooded from port 2, one delivered to port 1 from
    /// host 2, and one from port 3 on network 8 that is dropped.
    fn traffic(hub: &CaptureHub) {
        let to_remote = Verdict::Send {
            vni: vni(7),
            remote: remote(2),
        };
        hub.from_port(PORT, Some(vni(7)), b"a", &to_remote);
        hub.to_remote(
            Some(PORT),
            (remote(2), OuterFields::default(), 0),
            &[IoSlice::new(&datagram(7))],
            None,
        );
        let flood = Verdict::Flood {
            vni: vni(7),
            ports: &[PORT, PortId(2)],
            remotes: &[remote(3)],
        };
        hub.from_port(PortId(2), Some(vni(7)), b"b", &flood);
        hub.from_remote(remote(2), 0, &datagram(7), Fate::Deliver(PORT), &[PORT]);
        hub.to_port(
            PORT,
            Some(vni(7)),
            &[IoSlice::new(b"c")],
            Some(DropReason::PortFull),
        );
        let drop = Verdict::Drop(DropReason::GuardMac);
        hub.from_port(PortId(3), Some(vni(8)), b"d", &drop);
        hub.from_remote(remote(3), 0, b"x", Fate::Drop(DropReason::NoVniFlag), &[]);
    }

    #[test]
    fn filters_by_network_port_and_remote() {
        use Place::{FromPort, FromRemote, ToPort, ToRemote};
        let hub = Arc::new(CaptureHub::default());
        let start = |filter| hub.start(filter);
        let none = CaptureFilter::default;
        let captures = [
            start(none()),
            start(CaptureFilter {
                vni: Some(vni(8)),
                ..none()
            }),
            start(CaptureFilter {
                ports: vec![PORT, PortId(9)],
                ..none()
            }),
            start(CaptureFilter {
                remote: Some(remote(3).ip()),
                ..none()
            }),
            start(CaptureFilter {
                vni: Some(vni(7)),
                ports: vec![PortId(2)],
                remote: Some(remote(3).ip()),
            }),
        ];
        traffic(&hub);
        let seen = captures.each_ref().map(places);
        assert_eq!(seen[0].len(), 7);
        assert_eq!(seen[1], [FromPort(PortId(3))]);
        let (out, back) = (ToRemote(remote(2)), FromRemote(remote(2)));
        let flooded = FromPort(PortId(2));
        assert_eq!(seen[2], [FromPort(PORT), out, flooded, back, ToPort(PORT)]);
        assert_eq!(seen[3], [flooded, FromRemote(remote(3))]);
        assert_eq!(seen[4], [flooded]);
    }

    #[test]
    fn a_copy_says_what_became_of_it_and_how_it_was_addressed() {
        let listen = remote(1);
        let hub = Arc::new(CaptureHub::default());
        hub.set_own(listen, (50_000..50_064).collect());
        let capture = hub.start(CaptureFilter::default());
        traffic(&hub);
        let copies: Vec<_> = capture.waiting().collect();
        let fates: Vec<_> = copies.iter().map(|copy| copy.fate).collect();
        let flood = Fate::Flood {
            ports: 1,
            remotes: 1,
        };
        assert_eq!(
            fates,
            [
                Fate::Send(remote(2)),
                Fate::Passed,
                flood,
                Fate::Deliver(PORT),
                Fate::Drop(DropReason::PortFull),
                Fate::Drop(DropReason::GuardMac),
                Fate::Drop(DropReason::NoVniFlag),
            ]
        );
        let out = copies[1].outer.unwrap();
        assert_eq!((out.from.port(), out.to), (50_000, remote(2)));
        assert_eq!(copies[3].outer.unwrap().to, listen);
        assert_eq!(
            (copies[1].frame(), copies[0].frame()),
            (&b"frame"[..], &b"a"[..])
        );
        assert_eq!((copies[6].vni, copies[6].frame()), (None, &[][..]));
    }

    #[test]
    fn a_slow_reader_loses_frames_and_stops_nobody() {
        let hub = Arc::new(CaptureHub::default());
        let slow = hub.start(CaptureFilter::default());
        for _ in 0..QUEUE_COPIES + 3 {
            hub.to_port(PORT, None, &[IoSlice::new(b"x")], None);
        }
        assert_eq!((slow.waiting().count(), slow.missed()), (QUEUE_COPIES, 3));
        // Bytes count as well, and come free again.
        let large = vec![0; 65_000];
        let fit = QUEUE_BYTES / large.len();
        for round in 1..=2 {
            for _ in 0..fit + 2 {
                hub.to_port(PORT, None, &[IoSlice::new(&large)], None);
            }
            assert_eq!(
                (slow.waiting().count(), slow.missed()),
                (fit, 3 + 2 * round)
            );
        }
    }

    #[test]
    fn the_last_reader_switches_it_off() {
        let hub = Arc::new(CaptureHub::default());
        assert!(!hub.is_active());
        let (one, two) = (
            hub.start(CaptureFilter::default()),
            hub.start(CaptureFilter::default()),
        );
        drop(one);
        assert!(hub.is_active());
        drop(two);
        assert!(!hub.is_active());
    }
}
