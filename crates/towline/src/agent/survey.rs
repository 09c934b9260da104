//! Measures what the path to each remote VTEP carries, by probes that it answers itself: when it becomes a member of a network here, from
//! time to time, and when something was said about it that may not be true.
//!
//! A router that drops large packets and says nothing is found only so (RFC 8899). No manager is needed for it.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use control::HostId;
use vtep::datapath::{Datapath, ProbeWatch};

use super::Member;

/// How often the thread looks for what is due.
const EVERY: Duration = Duration::from_millis(500);
/// Between two measurements of one path: before what was found ages out ([`vtep::paths::AGE`]), and no sooner than RFC 1191 §6.3 has a
/// larger size tried again, five minutes.
const AGAIN: Duration = Duration::from_secs(540);
/// After a path that could not be measured; doubled each time, up to [`AGAIN`].
const RETRY: Duration = Duration::from_secs(2);
/// Between two measurements that doubtful reports cause.
const DOUBTS: Duration = Duration::from_secs(10);
/// Remotes measured at once.
const AT_ONCE: usize = 32;
/// A lost probe is no proof: what did not arrive is tried this often.
const ROUNDS: usize = 3;
const PATIENCE: Duration = Duration::from_millis(400);
/// Sizes tried besides the link's own MTU, in bytes of IP packet: what common links and tunnels carry, and steps between.
const SIZES: [u16; 22] = [
    8950, 4000, 1500, 1492, 1480, 1476, 1460, 1450, 1440, 1420, 1400, 1380, 1360, 1340, 1320, 1300,
    1280, 1200, 1024, 800, 650, 576,
];

/// Starts measuring, for as long as the host is a member of its cluster.
///
/// # Errors
/// When no thread can be made.
pub(super) fn start(member: &Arc<Member>) -> anyhow::Result<()> {
    // Not the member itself: the thread must not keep alive what ends it.
    let member = Arc::downgrade(member);
    thread::Builder::new()
        .name("survey".into())
        .spawn(move || survey(&member))
        .context("cannot start a thread")?;
    Ok(())
}

/// Looks and measures until the member is gone.
fn survey(member: &Weak<Member>) -> Option<()> {
    let mut schedule = Schedule::default();
    loop {
        thread::sleep(EVERY);
        let (due, link_mtu) = with(member, |member| {
            let tables = member.datapath.tables();
            let remotes = tables.remotes();
            let remotes = remotes.filter_map(|(addr, _)| tables.remote(addr));
            let suspects = member.datapath.paths().take_suspects();
            let due = schedule.due(remotes.collect(), &suspects, Instant::now());
            (due, member.settled.link_mtu)
        })?;
        if due.is_empty() {
            continue;
        }
        let found = measure(member, &due, link_mtu)?;
        with(member, |member| {
            let now = Instant::now();
            for remote in &due {
                let largest = found.get(&remote.ip()).copied();
                schedule.done(remote.ip(), largest.is_some(), now);
                if let Some(largest) = largest {
                    let narrow = Some(largest).filter(|&largest| largest < link_mtu);
                    member.datapath.paths().measured(remote.ip(), narrow, now);
                }
            }
        })?;
    }
}

/// Lets `work` look at the member, if it is still there.
fn with<T>(member: &Weak<Member>, work: impl FnOnce(&Member) -> T) -> Option<T> {
    member.upgrade().map(|member| work(&member))
}

/// The largest packet that arrives at each remote; nothing of one that answers none. `None` when the member is gone.
fn measure(
    member: &Weak<Member>,
    remotes: &[SocketAddr],
    link_mtu: u16,
) -> Option<HashMap<IpAddr, u16>> {
    // A host id is 16 bytes of the kernel's randomness, as a nonce must be.
    let nonce = *HostId::random().as_bytes();
    let watch = with(member, |member| member.datapath.expect_probe(nonce))?;
    let mut found = HashMap::new();
    for round in 0..=ROUNDS {
        let open = remotes
            .iter()
            .filter(|remote| found.get(&remote.ip()) != Some(&link_mtu));
        let open: Vec<_> = open.copied().collect();
        if open.is_empty() {
            break;
        }
        with(member, |member| {
            for remote in &open {
                let known = found.get(&remote.ip()).copied();
                let told = member.datapath.paths().mtu(remote.ip(), Instant::now());
                // Nearly every path carries what the link does: the first round asks no more.
                let sizes = sizes(link_mtu, told, known.unwrap_or(0));
                for size in sizes
                    .into_iter()
                    .take(if round == 0 { 1 } else { usize::MAX })
                {
                    send(&*member.datapath, *remote, nonce, size);
                }
            }
        })?;
        gather(&watch, &open, link_mtu, &mut found);
    }
    Some(found)
}

/// What to try, the largest first: all above `known` that the link takes.
fn sizes(link_mtu: u16, told: Option<u16>, known: u16) -> Vec<u16> {
    let mut sizes: Vec<u16> = SIZES.into_iter().chain(told).collect();
    sizes.retain(|&size| size < link_mtu && size > known);
    sizes.push(link_mtu);
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    sizes.dedup();
    sizes
}

fn send(datapath: &dyn Datapath, to: SocketAddr, nonce: [u8; 16], size: u16) {
    // Larger than the link carries by now: that is what is being found out.
    if let Err(error) = datapath.send_probe(to, nonce, size) {
        tracing::debug!("a probe of {size} bytes to {to} was not sent: {error}");
    }
}

/// Notes what arrives until every remote has had the largest or nothing more comes in time.
fn gather(
    watch: &ProbeWatch,
    open: &[SocketAddr],
    link_mtu: u16,
    found: &mut HashMap<IpAddr, u16>,
) {
    let deadline = Instant::now() + PATIENCE;
    let whole = |found: &HashMap<IpAddr, u16>| {
        open.iter()
            .all(|remote| found.get(&remote.ip()) == Some(&link_mtu))
    };
    while !whole(found) {
        let left = deadline.saturating_duration_since(Instant::now());
        let Some(seen) = watch.recv_timeout(left) else {
            return;
        };
        // An answer must come from whom was asked, and say no more than was asked.
        if open.iter().any(|remote| remote.ip() == seen.from.ip()) && seen.size <= link_mtu {
            let largest = found.entry(seen.from.ip()).or_default();
            *largest = seen.size.max(*largest);
        }
    }
}

/// When which path is to be measured.
#[derive(Debug, Default)]
struct Schedule {
    paths: HashMap<IpAddr, Due>,
}

#[derive(Debug)]
struct Due {
    at: Instant,
    /// Since when a doubtful report may bring it forward.
    doubts_from: Instant,
    /// What to wait for after a path that gave no answer.
    retry: Duration,
}

impl Schedule {
    /// The remotes to measure now, the longest due first.
    fn due(
        &mut self,
        remotes: Vec<SocketAddr>,
        suspects: &HashSet<IpAddr>,
        now: Instant,
    ) -> Vec<SocketAddr> {
        let here: HashSet<IpAddr> = remotes.iter().map(SocketAddr::ip).collect();
        self.paths.retain(|addr, _| here.contains(addr));
        for addr in here {
            let due = self.paths.entry(addr).or_insert(Due {
                at: now,
                doubts_from: now,
                retry: RETRY,
            });
            if suspects.contains(&addr) && now >= due.doubts_from {
                due.at = due.at.min(now);
            }
        }
        let at = |remote: &SocketAddr| self.paths.get(&remote.ip()).map(|due| due.at);
        let mut due: Vec<_> = remotes
            .into_iter()
            .filter(|remote| at(remote).is_some_and(|at| at <= now))
            .collect();
        due.sort_by_key(at);
        due.truncate(AT_ONCE);
        due
    }

    /// A path has been measured, or gave no answer to anything.
    fn done(&mut self, addr: IpAddr, answered: bool, now: Instant) {
        let Some(due) = self.paths.get_mut(&addr) else {
            return;
        };
        due.doubts_from = now + DOUBTS;
        if answered {
            (due.at, due.retry) = (now + AGAIN, RETRY);
        } else {
            due.at = now + due.retry;
            due.retry = (due.retry * 2).min(AGAIN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(number: u8) -> SocketAddr {
        ([192, 0, 2, number], 4789).into()
    }

    #[test]
    fn the_link_is_tried_first_and_only_what_is_not_known_to_pass() {
        assert_eq!(sizes(1500, None, 0)[..3], [1500, 1492, 1480]);
        assert_eq!(
            sizes(1500, Some(1397), 1380),
            [1500, 1492, 1480, 1476, 1460, 1450, 1440, 1420, 1400, 1397]
        );
        assert_eq!(sizes(1280, Some(1500), 0)[0], 1280);
        assert_eq!(sizes(1500, None, 1500), [1500]);
    }

    #[test]
    fn a_new_remote_is_measured_at_once_and_again_before_it_ages_out() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let none = HashSet::new();
        assert_eq!(schedule.due(vec![at(1)], &none, now), [at(1)]);
        schedule.done(at(1).ip(), true, now);
        assert_eq!(schedule.due(vec![at(1), at(2)], &none, now), [at(2)]);
        schedule.done(at(2).ip(), true, now);
        let later = now + AGAIN;
        assert!(AGAIN < vtep::paths::AGE && AGAIN >= Duration::from_secs(300));
        assert_eq!(schedule.due(vec![at(1)], &none, later), [at(1)]);
        // One that went and came back is new.
        schedule.due(vec![], &none, now);
        assert_eq!(schedule.due(vec![at(1)], &none, now), [at(1)]);
    }

    #[test]
    fn silence_is_asked_again_less_and_less() {
        let (mut schedule, mut now) = (Schedule::default(), Instant::now());
        let none = HashSet::new();
        let mut waits = Vec::new();
        for _ in 0..12 {
            assert_eq!(schedule.due(vec![at(1)], &none, now), [at(1)]);
            schedule.done(at(1).ip(), false, now);
            let wait = schedule.paths[&at(1).ip()].at - now;
            waits.push(wait);
            now += wait;
        }
        assert_eq!((waits[0], waits[1], waits[11]), (RETRY, RETRY * 2, AGAIN));
    }

    #[test]
    fn doubts_bring_a_measurement_forward_but_seldom() {
        // Conformance H6: forged ICMP errors cause few probes.
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let doubted = HashSet::from([at(1).ip(), at(9).ip()]);
        assert_eq!(schedule.due(vec![at(1)], &doubted, now), [at(1)]);
        schedule.done(at(1).ip(), true, now);
        let soon = now + DOUBTS / 2;
        assert_eq!(schedule.due(vec![at(1)], &doubted, soon), []);
        assert_eq!(schedule.due(vec![at(1)], &doubted, now + DOUBTS), [at(1)]);
    }
}
