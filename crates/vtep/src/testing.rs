//! Twins in memory of both edges, so that a whole network of VTEPs runs in one test.
//!
//! A [`Wire`] joins any number of [`MemoryUnderlay`]s. It loses, delays, reorders and repeats datagrams as [`Faults`] say, by
//! chance that a seed determines, and its clock moves only when told to: a test that fails once fails every time. A
//! [`MemoryTap`] is a container's interface; the [`Container`] on its other end holds what was delivered. [`RepeatingTap`] and
//! [`RepeatingUnderlay`] only keep a worker busy.

mod repeat;
mod tap;

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::edge::{Datagram, OuterFields, Refusal, SendReport, Underlay};
use crate::flow;
use crate::frame::{DatagramBuf, MAX_PAYLOAD};
use crate::paths::{PathListener, PathReport};
use crate::traffic_class;

pub use repeat::{Merged, RepeatingTap, RepeatingUnderlay};
pub use tap::{Container, MemoryTap};

/// What the wire does to datagrams. The default is a perfect wire.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Faults {
    /// The share of datagrams that get lost, 0 to 1.
    pub loss: f64,
    /// The share of datagrams that arrive twice, 0 to 1.
    pub duplication: f64,
    /// How long every datagram takes.
    pub delay: Duration,
    /// How much longer a datagram may take, each by chance: what reorders them.
    pub jitter: Duration,
    /// Marks every datagram as having met congestion (ECN field 3).
    pub congested: bool,
    /// The largest IP packet that the link carries, in bytes: a larger one is refused where it is sent.
    pub mtu: u16,
    /// A router on the way carries no more than this: a larger packet is lost there.
    pub path_mtu: Option<u16>,
    /// The router says so (RFC 1191 §4), quoting what RFC 1812 §4.3.2.3 has it quote.
    pub icmp: bool,
    /// The receiver finds datagrams that follow each other from one sender, of one size, in one buffer, as with `UDP_GRO`.
    pub merge: bool,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            loss: 0.0,
            duplication: 0.0,
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            congested: false,
            mtu: 1500,
            path_mtu: None,
            icmp: false,
            merge: false,
        }
    }
}

/// Datagrams that `UDP_GRO` puts into one buffer, at most.
const MERGED_MAX: usize = 64;

/// An underlay network in memory. Clones are the same wire.
#[derive(Clone)]
pub struct Wire {
    state: Arc<Mutex<WireState>>,
}

struct WireState {
    faults: Faults,
    random: u64,
    now: Instant,
    /// Counts datagrams, so that two due at once arrive in the order they were sent.
    sequence: u64,
    inboxes: HashMap<SocketAddr, Vec<InFlight>>,
    seen: Vec<Seen>,
}

struct InFlight {
    due: Instant,
    sequence: u64,
    from: SocketAddr,
    outer: OuterFields,
    payload: Vec<u8>,
}

/// A datagram that was put on the wire, whatever became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The sender, with the source port that the flow chose.
    pub from: SocketAddr,
    /// The receiver.
    pub to: SocketAddr,
    /// What the outer header says.
    pub outer: OuterFields,
    /// The UDP payload.
    pub payload: Vec<u8>,
}

impl Wire {
    /// A perfect wire; `seed` determines all that its faults will do.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let state = WireState {
            faults: Faults::default(),
            random: seed,
            now: Instant::now(),
            sequence: 0,
            inboxes: HashMap::new(),
            seen: Vec::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Sets what happens to datagrams sent from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    /// The wire's time.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.lock().now
    }

    /// Moves the clock.
    pub fn advance(&self, by: Duration) {
        self.lock().now += by;
    }

    /// Plugs a host in. A datagram sent to `addr` before is lost.
    #[must_use]
    pub fn underlay(&self, addr: SocketAddr) -> MemoryUnderlay {
        self.lock().inboxes.insert(addr, Vec::new());
        MemoryUnderlay {
            wire: self.clone(),
            addr,
            listener: None,
        }
    }

    /// Takes what was put on the wire since the last call, lost datagrams included.
    #[must_use]
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.lock().seen)
    }

    /// Puts a datagram on the wire as if `from` had sent it: for what no engine of ours would send.
    pub fn inject(&self, from: SocketAddr, to: SocketAddr, payload: &[u8]) {
        self.lock().carry(Seen {
            from,
            to,
            outer: OuterFields::default(),
            payload: payload.to_vec(),
        });
    }

    /// Lets `work` (one turn of all that is on the wire; says whether anything moved) run until nothing moves any more, with the
    /// clock moving past all delays.
    ///
    /// # Panics
    /// When frames still run in circles after 10,000 turns.
    pub fn run(&self, mut work: impl FnMut(Instant) -> bool) {
        for _ in 0..10_000 {
            if !work(self.now()) && self.in_flight() == 0 {
                return;
            }
            self.advance(Duration::from_millis(1));
        }
        panic!("frames still run in circles after 10,000 rounds");
    }

    /// Datagrams that have not been taken off the wire, due or not.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.lock().inboxes.values().map(Vec::len).sum()
    }

    fn lock(&self) -> MutexGuard<'_, WireState> {
        // A test that panicked elsewhere has said why already.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WireState {
    fn carry(&mut self, datagram: Seen) {
        self.seen.push(datagram.clone());
        if self.chance() < self.faults.loss {
            return;
        }
        let copies = if self.chance() < self.faults.duplication {
            2
        } else {
            1
        };
        for _ in 0..copies {
            let jitter = self.faults.jitter.mul_f64(self.chance());
            let due = self.now + self.faults.delay + jitter;
            self.sequence += 1;
            let sequence = self.sequence;
            let Seen {
                from,
                to,
                mut outer,
                payload,
            } = datagram.clone();
            if self.faults.congested {
                outer.class |= traffic_class::ECN;
            }
            if let Some(inbox) = self.inboxes.get_mut(&to) {
                inbox.push(InFlight {
                    due,
                    sequence,
                    from,
                    outer,
                    payload,
                });
            }
        }
    }

    /// A number from 0 up to 1: the next of SplitMix64, whose whole state is one word.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit a double exactly")]
    fn chance(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.random;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ (word >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// One host's end of a [`Wire`].
pub struct MemoryUnderlay {
    wire: Wire,
    addr: SocketAddr,
    listener: Option<Arc<dyn PathListener>>,
}

/// What an ICMP error quotes of a UDP payload: 576 bytes less its own headers and those that it quotes.
const QUOTED: usize = 576 - 20 - 8 - 20 - 8;

impl MemoryUnderlay {
    /// Has somebody told what the link and routers say about sizes.
    pub fn set_listener(&mut self, listener: Arc<dyn PathListener>) {
        self.listener = Some(listener);
    }

    fn tell(&self, to: SocketAddr, mtu: u16, local: bool, payload: &[u8], now: Instant) {
        if let Some(listener) = &self.listener {
            let report = PathReport {
                to,
                mtu: mtu.into(),
                local,
                quoted: &payload[..payload.len().min(QUOTED)],
            };
            listener.told(&report, now);
        }
    }

    /// Bytes of IP and UDP headers before a payload to `to`.
    const fn headers(to: SocketAddr) -> usize {
        match to {
            SocketAddr::V4(_) => 28,
            SocketAddr::V6(_) => 48,
        }
    }
}

impl Underlay for MemoryUnderlay {
    fn recv(&mut self, bufs: &mut [DatagramBuf]) -> io::Result<usize> {
        let mut state = self.wire.lock();
        let (now, merge) = (state.now, state.faults.merge);
        let inbox = state
            .inboxes
            .get_mut(&self.addr)
            .ok_or(io::ErrorKind::NotConnected)?;
        inbox.sort_by_key(|datagram| (datagram.due, datagram.sequence));
        let due = inbox.partition_point(|datagram| datagram.due <= now);
        let mut waiting = inbox.drain(..due).collect::<VecDeque<_>>();
        let mut count = 0;
        for buf in bufs {
            let Some(first) = waiting.pop_front() else {
                break;
            };
            let size = first.payload.len();
            let mut payload = first.payload;
            // All of the first one's size; a shorter one ends the buffer.
            while merge
                && payload.len().is_multiple_of(size.max(1))
                && payload.len() / size.max(1) < MERGED_MAX
                && let Some(next) = waiting.front()
                && (next.from, next.outer) == (first.from, first.outer)
                && (1..=size).contains(&next.payload.len())
                && payload.len() + next.payload.len() <= MAX_PAYLOAD
            {
                payload.extend(&next.payload);
                waiting.pop_front();
            }
            buf.space()[..payload.len()].copy_from_slice(&payload);
            buf.set_payload(payload.len(), first.from);
            buf.class = first.outer.class;
            if payload.len() > size {
                buf.segment_size = u16::try_from(size).ok();
            }
            count += 1;
        }
        waiting.append(&mut inbox.drain(..).collect());
        *inbox = waiting.into();
        Ok(count)
    }

    fn send(&mut self, datagrams: &[Datagram<'_>]) -> io::Result<SendReport> {
        let mut report = SendReport::default();
        let mut state = self.wire.lock();
        for (place, datagram) in datagrams.iter().enumerate() {
            let payload = gather(datagram.slices);
            let segment = datagram
                .segment_size
                .map_or(payload.len(), usize::from)
                .max(1);
            let index =
                u16::try_from(flow::source_port_index(datagram.flow)).map_err(io::Error::other)?;
            let from = SocketAddr::new(self.addr.ip(), 49_152 + index);
            // Each is judged for itself, as when the kernel refuses to cut and they are sent one by one.
            for payload in payload.chunks(segment) {
                let (len, faults) = (payload.len() + Self::headers(datagram.to), state.faults);
                if len > usize::from(faults.mtu) {
                    self.tell(datagram.to, faults.mtu, true, &[], state.now);
                    report.refuse(place, 1, Refusal::TooBig);
                    continue;
                }
                report.sent += 1;
                if let Some(mtu) = faults.path_mtu.filter(|mtu| len > usize::from(*mtu)) {
                    if faults.icmp {
                        self.tell(datagram.to, mtu, false, payload, state.now);
                    }
                    continue;
                }
                state.carry(Seen {
                    from,
                    to: datagram.to,
                    outer: datagram.outer,
                    payload: payload.to_vec(),
                });
            }
        }
        Ok(report)
    }

    fn as_raw_fd(&self) -> Option<RawFd> {
        None
    }
}

fn gather(slices: &[IoSlice<'_>]) -> Vec<u8> {
    slices
        .iter()
        .flat_map(|slice| slice.iter().copied())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(number: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, number], 4789))
    }

    fn send(
        from: &mut MemoryUnderlay,
        to: u8,
        payload: &[u8],
        segment_size: Option<u16>,
    ) -> SendReport {
        let slices = [IoSlice::new(payload)];
        from.send(&[Datagram {
            to: addr(to),
            flow: u32::MAX,
            outer: OuterFields::with_class(1),
            segment_size,
            slices: &slices,
        }])
        .unwrap()
    }

    fn received(underlay: &mut MemoryUnderlay) -> Vec<Vec<u8>> {
        let mut bufs: Vec<_> = std::iter::repeat_with(DatagramBuf::new).take(8).collect();
        let mut all = Vec::new();
        loop {
            let count = underlay.recv(&mut bufs).unwrap();
            if count == 0 {
                return all;
            }
            all.extend(bufs[..count].iter().map(|buf| buf.payload().to_vec()));
        }
    }

    #[test]
    fn a_perfect_wire_keeps_order_and_tells_the_flows_port() {
        let wire = Wire::new(1);
        let (mut one, mut two) = (wire.underlay(addr(1)), wire.underlay(addr(2)));
        for number in 0..20 {
            assert_eq!(
                send(&mut one, 2, &[number], None),
                SendReport {
                    sent: 1,
                    ..SendReport::default()
                }
            );
        }
        let mut buf = [DatagramBuf::new()];
        assert_eq!(two.recv(&mut buf).unwrap(), 1);
        assert_eq!(
            (buf[0].from, buf[0].class),
            (SocketAddr::from(([192, 0, 2, 1], 49_152 + 63)), 1)
        );
        assert_eq!(
            received(&mut two),
            (1..20).map(|number| vec![number]).collect::<Vec<_>>()
        );
        assert_eq!(send(&mut one, 9, b"nobody", None).sent, 1);
        assert_eq!(wire.in_flight(), 0);
    }

    #[test]
    fn the_clock_is_moved_by_hand() {
        let wire = Wire::new(1);
        let (mut one, mut two) = (wire.underlay(addr(1)), wire.underlay(addr(2)));
        wire.set_faults(Faults {
            delay: Duration::from_millis(5),
            ..Faults::default()
        });
        send(&mut one, 2, b"x", None);
        wire.advance(Duration::from_millis(4));
        assert!(received(&mut two).is_empty());
        wire.advance(Duration::from_millis(1));
        assert_eq!(received(&mut two), [b"x"]);
    }

    #[test]
    fn faults_happen_and_a_seed_repeats_them() {
        let run = |seed| {
            let wire = Wire::new(seed);
            let (mut one, mut two) = (wire.underlay(addr(1)), wire.underlay(addr(2)));
            wire.set_faults(Faults {
                loss: 0.2,
                duplication: 0.2,
                jitter: Duration::from_millis(9),
                ..Faults::default()
            });
            for number in 0..200 {
                send(&mut one, 2, &[number], None);
            }
            wire.advance(Duration::from_millis(9));
            received(&mut two)
        };
        let first = run(1);
        let distinct = first.iter().collect::<std::collections::HashSet<_>>().len();
        assert!((120..190).contains(&distinct), "{distinct} of 200 arrived");
        assert!(first.len() > distinct, "none arrived twice");
        assert!(!first.is_sorted(), "all in order");
        assert_eq!(run(1), first);
        assert_ne!(run(2), first);
    }

    #[test]
    fn too_large_is_reported_and_segments_are_cut() {
        let wire = Wire::new(1);
        let (mut one, mut two) = (wire.underlay(addr(1)), wire.underlay(addr(2)));
        assert_eq!(
            send(&mut one, 2, &[0; 1473], None),
            SendReport {
                too_big: 1,
                refused: [1, 0, 0],
                ..SendReport::default()
            }
        );
        assert_eq!(send(&mut one, 2, &[0; 3000], Some(1472)).sent, 3);
        assert_eq!(
            received(&mut two).iter().map(Vec::len).collect::<Vec<_>>(),
            [1472, 1472, 56]
        );
    }
}
