//! The way of Docker Swarm's overlay driver, in the same virtual time and under the same steps, to prove that they find its
//! fault: [moby#52661](https://github.com/moby/moby/issues/52661), forwarding entries that point at the wrong host for hours.
//!
//! Rows are keyed by endpoint and merged rightly: the newer of an endpoint wins, and every 30 s two hosts compare all they
//! have. But what frames follow is derived from the *events*: a row that comes writes its address's entry unless there is one
//! (`EEXIST`), and a row that goes removes whatever stands there. An address that is used again is two endpoints, whose events
//! come from two hosts in any order.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use control::HostId;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};
use vtep::Vni;

use crate::net::{Net, Way, Weather};
use crate::plane::{Hardness, Owners, Plane, Step, check_views, step};
use crate::world::World;

const HOSTS: usize = 5;
/// As many as the subnet of the other plane has.
const ADDRESSES: u8 = 13;
/// How often a host compares all it has with another.
const SYNC: Duration = Duration::from_secs(30);

/// An endpoint's row.
#[derive(Clone, Debug)]
struct Row {
    endpoint: u64,
    ip: IpAddr,
    host: usize,
    /// Orders the events of one endpoint.
    time: u64,
    deleted: bool,
}

#[derive(Clone, Debug)]
enum Happens {
    Arrives { at: usize, row: Row },
    Sync { host: usize },
    Heal { host: usize },
}

#[derive(Debug, Default)]
struct Host {
    rows: BTreeMap<u64, Row>,
    /// What frames follow.
    entries: BTreeMap<IpAddr, usize>,
}

struct OldWay {
    net: Net<Happens>,
    hosts: Vec<Host>,
    /// The allocator: who has which address. It makes no mistakes.
    held: BTreeMap<IpAddr, (u64, usize)>,
    freed: Option<IpAddr>,
    endpoints: u64,
    vni: Vni,
}

impl OldWay {
    fn start(&mut self, host: usize, wanted: Option<IpAddr>) {
        let all = (0..ADDRESSES).map(|n| IpAddr::V4(Ipv4Addr::new(10, 0, 9, 2 + n)));
        let free = wanted
            .into_iter()
            .chain(all)
            .find(|ip| !self.held.contains_key(ip));
        let Some(ip) = free else { return };
        self.endpoints += 1;
        self.held.insert(ip, (self.endpoints, host));
        self.tell(Row {
            endpoint: self.endpoints,
            ip,
            host,
            time: 1,
            deleted: false,
        });
    }

    fn stop(&mut self, which: usize) -> Option<IpAddr> {
        let ip = *self.held.keys().nth(which.checked_rem(self.held.len())?)?;
        let (endpoint, host) = self.held.remove(&ip)?;
        self.freed = Some(ip);
        self.tell(Row {
            endpoint,
            ip,
            host,
            time: 2,
            deleted: true,
        });
        Some(ip)
    }

    /// A host's own news: done here at once, and sent to all others.
    fn tell(&mut self, row: Row) {
        self.hosts[row.host].take(row.clone());
        for at in (0..self.hosts.len()).filter(|at| *at != row.host) {
            self.send(row.host, at, row.clone());
        }
    }

    fn send(&mut self, from: usize, at: usize, row: Row) {
        if !self.net.is_parted(from) && !self.net.is_parted(at) {
            self.net.send(at, Way::ToHost, Happens::Arrives { at, row });
        }
    }

    fn run(&mut self, how_long: Duration) {
        let end = self.net.now() + how_long;
        while let Some(event) = self.net.pop(end) {
            match event {
                Happens::Arrives { at, row } => self.hosts[at].take(row),
                Happens::Sync { host } => {
                    let other = usize::try_from(self.net.random.below(HOSTS as u64)).unwrap();
                    for (from, to) in [(host, other), (other, host)] {
                        let rows: Vec<Row> = self.hosts[from].rows.values().cloned().collect();
                        rows.into_iter().for_each(|row| self.send(from, to, row));
                    }
                    self.net.after(SYNC, Happens::Sync { host });
                }
                Happens::Heal { host } => self.net.heal(host),
            }
        }
    }
}

impl Host {
    fn take(&mut self, row: Row) {
        let known = self.rows.get(&row.endpoint);
        if known.is_some_and(|known| known.time >= row.time) {
            return;
        }
        if row.deleted {
            // By key, whoever's entry that is.
            if known.is_some() {
                self.entries.remove(&row.ip);
            }
        } else {
            // Exclusive create: what is there stays.
            self.entries.entry(row.ip).or_insert(row.host);
        }
        self.rows.insert(row.endpoint, row);
    }
}

impl Plane for OldWay {
    fn new(seed: u64) -> Self {
        let mut plane = Self {
            net: Net::new(seed, HOSTS),
            hosts: (0..HOSTS).map(|_| Host::default()).collect(),
            held: BTreeMap::new(),
            freed: None,
            endpoints: 0,
            vni: Vni::new(4096).unwrap(),
        };
        (0..HOSTS).for_each(|host| plane.net.after(SYNC, Happens::Sync { host }));
        plane
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Start { host, .. } => self.start(host % HOSTS, None),
            Step::StartAgain { host, .. } => self.start(host % HOSTS, self.freed),
            Step::Stop { which } => drop(self.stop(which)),
            Step::Move { which, to } => {
                if let Some(ip) = self.stop(which) {
                    self.start(to % HOSTS, Some(ip));
                }
            }
            Step::Weather { host, weather } => self.net.set_weather(host % HOSTS, weather),
            Step::Part { host, milliseconds } => {
                self.net.part(host % HOSTS);
                self.net.after(
                    Duration::from_millis(milliseconds.into()),
                    Happens::Heal { host: host % HOSTS },
                );
            }
            Step::Wait { milliseconds } => self.run(Duration::from_millis(milliseconds.into())),
            // It has no connections and no manager, and none of its processes dies.
            _ => {}
        }
    }

    fn settle(&mut self) {
        for host in 0..HOSTS {
            self.net.set_weather(host, Weather::FAIR);
            self.net.heal(host);
        }
        self.run(SYNC * 20);
    }

    fn truth(&self) -> Owners {
        self.held
            .iter()
            .map(|(ip, (_, host))| ((self.vni, *ip), id(*host)))
            .collect()
    }

    fn views(&self) -> Vec<(String, Owners)> {
        let named = self.hosts.iter().enumerate();
        let view = |host: &Host| {
            host.entries
                .iter()
                .map(|(ip, at)| ((self.vni, *ip), id(*at)))
                .collect()
        };
        named
            .map(|(n, host)| (format!("h{n}"), view(host)))
            .collect()
    }

    fn follows(&self, _: usize, _: Vni) -> bool {
        true
    }
}

fn id(host: usize) -> HostId {
    HostId::from_bytes([u8::try_from(host).unwrap(); 16])
}

fn end<P: Plane>(seed: u64, steps: &[Step]) -> Result<(), String> {
    let mut plane = P::new(seed);
    steps.iter().for_each(|step| plane.step(step));
    plane.settle();
    check_views(&plane)
}

/// The simulator finds the old way's fault, with steps that are no harder than a host that is slow, and shows how little it
/// takes. Towline ends the same steps with every view right.
#[test]
fn the_old_way_ends_with_frames_sent_to_the_wrong_host() {
    let config = Config {
        cases: 500,
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..Config::default()
    };
    let steps = prop::collection::vec(step(Hardness::Streams), 1..100);
    let found = TestRunner::new(config).run(&(any::<u64>(), steps), |(seed, steps)| {
        end::<OldWay>(seed, &steps).map_err(TestCaseError::fail)
    });
    let Err(TestError::Fail(why, (seed, steps))) = found else {
        panic!("500 histories and no wrong entry: the simulator is blind ({found:?})")
    };
    println!("{why}, after {steps:?}");
    assert!(steps.len() <= 20, "{steps:?}");
    assert_eq!(end::<World>(seed, &steps), Ok(()));
}

/// Without anything that makes events overtake each other the old way works: what the steps find is that fault, and no other.
#[test]
fn the_old_way_works_while_nothing_goes_wrong() {
    let mut plane = OldWay::new(1);
    for n in 0..200 {
        plane.step(&Step::Start {
            host: n,
            network: 0,
        });
        plane.step(&Step::Wait { milliseconds: 50 });
        if n % 3 != 0 {
            plane.step(&Step::Stop { which: n });
            plane.step(&Step::Wait { milliseconds: 50 });
        }
    }
    plane.settle();
    assert_eq!(check_views(&plane), Ok(()));
}
