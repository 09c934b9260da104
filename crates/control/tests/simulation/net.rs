//! Virtual time and the wires in it: what is sent arrives later, or never, or twice, or in another order.
//!
//! Everything random comes from one seed, so a run can be repeated. Nothing here knows what is carried.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

/// Which way along a host's wire.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way {
    FromHost,
    ToHost,
}

/// What a wire does to messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Weather {
    /// The longest delay, in milliseconds; the shortest is an eighth of it.
    pub(crate) delay: u16,
    /// Of a hundred messages, how many never arrive.
    pub(crate) lost: u8,
    /// Of a hundred messages, how many arrive twice.
    pub(crate) doubled: u8,
    /// Of a hundred messages, how many may overtake others.
    pub(crate) reordered: u8,
}

impl Weather {
    /// What a good network does: order is kept, all arrives.
    pub(crate) const FAIR: Self = Self {
        delay: 2,
        lost: 0,
        doubled: 0,
        reordered: 0,
    };
}

/// SplitMix64.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not zero.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// True `percent` times of a hundred.
    fn chance(&mut self, percent: u8) -> bool {
        percent > 0 && self.below(100) < u64::from(percent)
    }
}

#[derive(Debug)]
struct Wire<E> {
    weather: Weather,
    /// Nothing passes; a transport keeps what it was given and sends it again later.
    parted: bool,
    held: Vec<(Way, E)>,
    /// When the last ordered message of each way arrives.
    busy: [Duration; 2],
}

#[derive(Debug)]
struct Due<E> {
    at: Duration,
    order: u64,
    event: E,
}

impl<E> PartialEq for Due<E> {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl<E> Eq for Due<E> {}

impl<E> PartialOrd for Due<E> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Due<E> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// The clock, what is due, and one wire for each host.
#[derive(Debug)]
pub(crate) struct Net<E> {
    now: Duration,
    pub(crate) random: Random,
    due: BinaryHeap<Reverse<Due<E>>>,
    order: u64,
    wires: Vec<Wire<E>>,
}

impl<E: Clone> Net<E> {
    pub(crate) fn new(seed: u64, hosts: usize) -> Self {
        let wire = || Wire {
            weather: Weather::FAIR,
            parted: false,
            held: Vec::new(),
            busy: [Duration::ZERO; 2],
        };
        Self {
            now: Duration::ZERO,
            random: Random::new(seed),
            due: BinaryHeap::new(),
            order: 0,
            wires: (0..hosts).map(|_| wire()).collect(),
        }
    }

    pub(crate) fn now(&self) -> Duration {
        self.now
    }

    pub(crate) fn set_weather(&mut self, host: usize, weather: Weather) {
        self.wires[host].weather = weather;
    }

    pub(crate) fn is_parted(&self, host: usize) -> bool {
        self.wires[host].parted
    }

    pub(crate) fn part(&mut self, host: usize) {
        self.wires[host].parted = true;
    }

    /// The wire carries again; what was held goes out as if it were sent now.
    pub(crate) fn heal(&mut self, host: usize) {
        self.wires[host].parted = false;
        for (way, event) in std::mem::take(&mut self.wires[host].held) {
            self.send_surely(host, way, event);
        }
    }

    /// Happens after `delay`, whatever the wires do.
    pub(crate) fn after(&mut self, delay: Duration, event: E) {
        let at = self.now + delay;
        self.schedule(at, event);
    }

    /// Sends along a host's wire, which does to it what its weather does.
    pub(crate) fn send(&mut self, host: usize, way: Way, event: E) {
        let weather = self.wires[host].weather;
        if self.random.chance(weather.lost) {
            return;
        }
        if self.random.chance(weather.doubled) {
            let late = self.delay(host) * 3;
            self.after(late, event.clone());
        }
        if self.random.chance(weather.reordered) && !self.wires[host].parted {
            let late = self.delay(host) * 2;
            self.after(late, event);
        } else {
            self.send_surely(host, way, event);
        }
    }

    /// Sends along a host's wire in order, and not lost: as the end of a connection is.
    pub(crate) fn send_surely(&mut self, host: usize, way: Way, event: E) {
        if self.wires[host].parted {
            self.wires[host].held.push((way, event));
            return;
        }
        let at = self.now + self.delay(host);
        let busy = &mut self.wires[host].busy[way as usize];
        *busy = at.max(*busy);
        let at = *busy;
        self.schedule(at, event);
    }

    /// The next event until `end`; the clock goes on to it, or to `end` where there is none.
    pub(crate) fn pop(&mut self, end: Duration) -> Option<E> {
        if self.due.peek().is_some_and(|Reverse(due)| due.at <= end) {
            let Reverse(due) = self.due.pop()?;
            self.now = due.at;
            return Some(due.event);
        }
        self.now = self.now.max(end);
        None
    }

    fn delay(&mut self, host: usize) -> Duration {
        let longest = u64::from(self.wires[host].weather.delay) * 1000;
        let shortest = longest / 8;
        Duration::from_micros(shortest + self.random.below(longest - shortest + 1))
    }

    fn schedule(&mut self, at: Duration, event: E) {
        self.order += 1;
        let order = self.order;
        self.due.push(Reverse(Due { at, order, event }));
    }
}
