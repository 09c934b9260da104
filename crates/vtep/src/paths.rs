//! What the paths to other hosts carry, where that is less than the link does.
//!
//! A path is narrow when a router on it said so (`paths/monitor.rs`), when this host's own kernel did, or when probes found out
//! ([`crate::probe`]). Only narrow paths are kept, so on most hosts nothing is, and a worker asks one atomic whether there is
//! anything to look up. What is known ages out after [`AGE`] (RFC 1191 §6.3, RFC 8201 §4): then the whole size is tried again.
//!
//! Reports come seldom and are written under a lock; workers read a snapshot.

mod monitor;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use serde::Serialize;

use crate::ethernet;
use crate::vxlan::{Family, Protection, overhead};

pub use monitor::{PathListener, PathMonitor, PathReport};

/// How long a path counts as narrow after it was last found to be.
pub const AGE: Duration = Duration::from_secs(600);

/// Narrow paths kept at most: more remotes than a cluster has hosts.
const PATHS_MAX: usize = 16_384;
/// Remotes that wait to be probed, at most.
const SUSPECTS_MAX: usize = 1024;
/// [`Paths::narrowest`] when no path is narrow.
const NONE: u16 = u16::MAX;

/// The least that any path carries, in bytes of IP packet: RFC 1122 §3.3.3 has every host take 576 bytes, RFC 8200 §5 every link
/// 1,280. Whoever claims less is not believed.
#[must_use]
pub const fn least(remote: IpAddr) -> u16 {
    match Family::of(remote) {
        Family::V4 => 576,
        Family::V6 => 1280,
    }
}

/// A narrow path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Narrow {
    /// The largest IP packet it carries, in bytes.
    pub mtu: u16,
    /// When it was last found to be.
    pub since: Instant,
}

/// What is known of the paths to all remotes.
#[derive(Debug)]
pub struct Paths {
    /// The least of all `narrow`, aged ones included.
    narrowest: AtomicU16,
    narrow: ArcSwap<HashMap<IpAddr, Narrow>>,
    /// Held while `narrow` and `narrowest` change together; guards whom to probe.
    suspects: Mutex<HashSet<IpAddr>>,
    believed: AtomicU64,
    doubted: AtomicU64,
}

/// How many reports about paths came, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reports {
    /// Quoted a datagram that this host sent, or came from its own kernel.
    pub believed: u64,
    /// Quoted too little, or what this host never sent: the path is probed instead.
    pub doubted: u64,
}

impl Paths {
    /// No path is narrow.
    #[must_use]
    pub fn new() -> Self {
        Self {
            narrowest: AtomicU16::new(NONE),
            narrow: ArcSwap::default(),
            suspects: Mutex::default(),
            believed: AtomicU64::new(0),
            doubted: AtomicU64::new(0),
        }
    }

    /// A length in bytes up to which every path takes every frame: what is longer must be looked at with [`Self::frame_limit`].
    #[inline]
    #[must_use]
    pub fn any_frame(&self) -> usize {
        match self.narrowest.load(Ordering::Relaxed) {
            NONE => usize::MAX,
            // The larger overhead is on the safe side for both families.
            mtu => frame_len(mtu, Family::V6),
        }
    }

    /// The longest frame that the path to `remote` takes, in bytes; `None` when it takes whatever the link does.
    #[must_use]
    pub fn frame_limit(&self, remote: IpAddr, now: Instant) -> Option<usize> {
        Some(frame_len(self.mtu(remote, now)?, Family::of(remote)))
    }

    /// The largest IP packet that the path to `remote` carries, in bytes; `None` when it is not known to be narrow.
    #[must_use]
    pub fn mtu(&self, remote: IpAddr, now: Instant) -> Option<u16> {
        let narrow = self.narrow.load();
        let path = narrow.get(&remote)?;
        is_fresh(path, now).then_some(path.mtu)
    }

    /// All narrow paths, in no order.
    #[must_use]
    pub fn all(&self, now: Instant) -> Vec<(IpAddr, Narrow)> {
        let narrow = self.narrow.load();
        let fresh = narrow.iter().filter(|(_, path)| is_fresh(path, now));
        fresh.map(|(remote, path)| (*remote, *path)).collect()
    }

    /// How many reports came.
    #[must_use]
    pub fn reports(&self) -> Reports {
        Reports {
            believed: self.believed.load(Ordering::Relaxed),
            doubted: self.doubted.load(Ordering::Relaxed),
        }
    }

    /// The path to `remote` carries no more than `mtu` bytes. Says whether that was news: a report never widens a path, and none
    /// below [`least`] is believed.
    pub fn lower(&self, remote: IpAddr, mtu: u16, now: Instant) -> bool {
        let lock = self.lock();
        let known = self.mtu(remote, now).unwrap_or(NONE);
        let news = (least(remote)..known).contains(&mtu);
        if news {
            self.change(&lock, now, |narrow| {
                narrow.insert(remote, Narrow { mtu, since: now });
            });
        }
        news
    }

    /// Probes found what the path to `remote` carries: `None` when it is all that the link does.
    pub fn measured(&self, remote: IpAddr, mtu: Option<u16>, now: Instant) {
        let lock = self.lock();
        if mtu.is_none() && !self.narrow.load().contains_key(&remote) {
            return;
        }
        self.change(&lock, now, |narrow| match mtu {
            Some(mtu) => {
                let mtu = mtu.max(least(remote));
                narrow.insert(remote, Narrow { mtu, since: now });
            }
            None => {
                narrow.remove(&remote);
            }
        });
    }

    /// Something may be wrong with the path to `remote`: it should be probed.
    pub fn suspect(&self, remote: IpAddr) {
        let mut suspects = self.lock();
        if suspects.len() < SUSPECTS_MAX {
            suspects.insert(remote);
        }
    }

    /// Takes the remotes that should be probed.
    #[must_use]
    pub fn take_suspects(&self) -> HashSet<IpAddr> {
        std::mem::take(&mut *self.lock())
    }

    fn change(
        &self,
        _writers: &MutexGuard<'_, HashSet<IpAddr>>,
        now: Instant,
        change: impl FnOnce(&mut HashMap<IpAddr, Narrow>),
    ) {
        let mut narrow = HashMap::clone(&self.narrow.load());
        narrow.retain(|_, path| is_fresh(path, now));
        change(&mut narrow);
        // Whoever could fill this has found a way around the check of membership; the paths known go on being respected.
        if narrow.len() > PATHS_MAX {
            return;
        }
        let narrowest = narrow.values().map(|path| path.mtu).min().unwrap_or(NONE);
        self.narrow.store(narrow.into());
        self.narrowest.store(narrowest, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<IpAddr>> {
        // Each statement leaves what it guards whole, so a panic elsewhere spoils nothing.
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Paths {
    fn default() -> Self {
        Self::new()
    }
}

fn is_fresh(path: &Narrow, now: Instant) -> bool {
    now.saturating_duration_since(path.since) < AGE
}

/// The longest frame in an IP packet of `mtu` bytes.
fn frame_len(mtu: u16, family: Family) -> usize {
    usize::from(mtu.saturating_sub(overhead(family, Protection::Cleartext))) + ethernet::HEADER_LEN
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(number: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, number])
    }

    #[test]
    fn only_what_is_longer_than_any_path_takes_is_looked_up() {
        let (paths, now) = (Paths::new(), Instant::now());
        assert_eq!(paths.any_frame(), usize::MAX);
        assert!(paths.lower(v4(1), 1400, now));
        let v6: IpAddr = "2001:db8::1".parse().unwrap();
        assert!(paths.lower(v6, 1300, now));
        assert_eq!(paths.frame_limit(v4(1), now), Some(1400 - 50 + 14));
        assert_eq!(paths.frame_limit(v6, now), Some(1300 - 70 + 14));
        assert_eq!(paths.frame_limit(v4(2), now), None);
        assert_eq!(paths.any_frame(), 1300 - 70 + 14);
        paths.measured(v6, None, now);
        assert!(paths.any_frame() <= 1400 - 50 + 14);
        paths.measured(v4(1), None, now);
        assert_eq!(paths.any_frame(), usize::MAX);
    }

    #[test]
    fn reports_only_narrow_and_never_below_what_every_path_carries() {
        // Conformance V13, H6.
        let (paths, now) = (Paths::new(), Instant::now());
        assert!(!paths.lower(v4(1), 575, now));
        assert!(!paths.lower("2001:db8::1".parse().unwrap(), 1279, now));
        assert_eq!(paths.any_frame(), usize::MAX);
        assert!(paths.lower(v4(1), 1400, now));
        assert!(!paths.lower(v4(1), 1400, now));
        assert!(!paths.lower(v4(1), 1450, now));
        assert_eq!(paths.mtu(v4(1), now), Some(1400));
        assert!(paths.lower(v4(1), 576, now));
        assert_eq!(paths.mtu(v4(1), now), Some(576));
    }

    #[test]
    fn a_narrow_path_ages_out() {
        // Conformance V13: RFC 1191 §6.3.
        let (paths, now) = (Paths::new(), Instant::now());
        paths.lower(v4(1), 1400, now);
        let (before, after) = (now + AGE - Duration::from_millis(1), now + AGE);
        assert_eq!(paths.mtu(v4(1), before), Some(1400));
        assert_eq!(paths.mtu(v4(1), after), None);
        assert_eq!(paths.all(after), []);
        // Whatever is written next forgets it.
        paths.lower(v4(2), 1450, after);
        assert_eq!(paths.any_frame(), 1450 - 70 + 14);
        // What probes confirm stays.
        paths.measured(v4(2), Some(1450), after + AGE / 2);
        assert_eq!(paths.mtu(v4(2), after + AGE), Some(1450));
    }

    #[test]
    fn suspects_are_bounded_and_taken_once() {
        let paths = Paths::new();
        for number in 0..=SUSPECTS_MAX {
            let number = u32::try_from(number).unwrap();
            paths.suspect(IpAddr::from(number.to_be_bytes()));
        }
        assert_eq!(paths.take_suspects().len(), SUSPECTS_MAX);
        assert!(paths.take_suspects().is_empty());
    }
}
