//! A whole cluster in virtual time: the state machines of one manager and several agents, with messages lost, doubled and
//! reordered between them, connections cut, the manager restarted, and its store put back to an older state.
//!
//! Two things must hold. At no time does a view take a lower epoch for an address, unless the manager's store was replaced.
//! And once things are quiet, every view is the allocator's table, in which every endpoint that runs is as its owner said.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use control::agent::{self, Agent};
use control::manager::{self, GRACE, HEARTBEAT, Manager, Refusal, Settings};
use control::message::{ToAgent, ToManager};
use control::{
    Endpoint, EndpointState, Epoch, Event, HostId, HostInfo, MemberState, MemoryStore, NetworkSpec,
    Request, Response, Row, State, Store,
};
use proptest::prelude::*;
use vtep::Vni;

const CLUSTER: &str = "0123456789abcdef";
const HOSTS: u8 = 4;
/// Few addresses, so that they come round.
const SUBNET: &str = "10.0.9.0/28";

struct Sim {
    now: Duration,
    store: MemoryStore,
    checkpoint: BTreeMap<String, String>,
    manager: Manager,
    hosts: Vec<Host>,
    connections: u64,
    calls: u64,
    /// Epochs that a replaced store had issued and its successor did not know: only from these may a view go back.
    lost: Vec<(Epoch, Epoch)>,
    vni: Vni,
}

struct Host {
    info: HostInfo,
    agent: Agent,
    connection: Option<u64>,
    to_manager: VecDeque<ToManager>,
    to_agent: VecDeque<ToAgent>,
    /// What runs here, and as what it was published.
    runs: Vec<(Endpoint, EndpointState)>,
    answers: Vec<(u64, Result<Response, control::RequestError>)>,
    /// The last epoch seen of each address.
    last: HashMap<IpAddr, Epoch>,
}

#[derive(Clone, Debug)]
enum Step {
    Start {
        host: usize,
    },
    Stop {
        which: usize,
    },
    Toggle {
        which: usize,
    },
    Cut {
        host: usize,
    },
    Connect {
        host: usize,
    },
    /// Messages of rows under way to a host are lost, doubled and put in another order.
    Mangle {
        host: usize,
        seed: u64,
    },
    Deliver {
        host: usize,
        count: usize,
    },
    Wait {
        milliseconds: u64,
    },
    RestartManager,
    Checkpoint,
    LoseStore,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let host = 0..usize::from(HOSTS);
    let step = prop_oneof![
        6 => host.clone().prop_map(|host| Step::Start { host }),
        4 => any::<usize>().prop_map(|which| Step::Stop { which }),
        3 => any::<usize>().prop_map(|which| Step::Toggle { which }),
        2 => host.clone().prop_map(|host| Step::Cut { host }),
        3 => host.clone().prop_map(|host| Step::Connect { host }),
        5 => (host.clone(), any::<u64>()).prop_map(|(host, seed)| Step::Mangle { host, seed }),
        8 => (host, 0..6usize).prop_map(|(host, count)| Step::Deliver { host, count }),
        4 => (0..4000u64).prop_map(|milliseconds| Step::Wait { milliseconds }),
        1 => Just(Step::RestartManager),
        1 => Just(Step::Checkpoint),
        1 => Just(Step::LoseStore),
    ];
    prop::collection::vec(step, 1..80)
}

impl Sim {
    fn new() -> Self {
        let store = MemoryStore::default();
        let hosts = (1..=HOSTS).map(Host::new).collect();
        let manager = load(&store, Duration::ZERO);
        let vni = Vni::new(4096).unwrap();
        let checkpoint = BTreeMap::new();
        let mut sim = Self {
            now: Duration::ZERO,
            store,
            checkpoint,
            manager,
            hosts,
            connections: 0,
            calls: 0,
            lost: Vec::new(),
            vni,
        };
        for host in 0..sim.hosts.len() {
            sim.hosts[host].agent.subscribe(vni);
            sim.connect(host);
        }
        sim.deliver_all();
        let spec = NetworkSpec {
            subnets: vec![SUBNET.parse().unwrap()],
            vni: Some(vni),
            ..NetworkSpec::named("net1")
        };
        let made = sim.call(
            0,
            Request::CreateNetwork {
                spec,
                routes_in_use: Vec::new(),
            },
        );
        assert!(matches!(made, Some(Ok(Response::Network(_)))), "{made:?}");
        sim.checkpoint = sim.store.load().unwrap();
        sim
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Start { host } => self.start(host),
            Step::Stop { which } => self.stop(which),
            Step::Toggle { which } => self.toggle(which),
            Step::Cut { host } => self.cut(host),
            Step::Connect { host } => self.connect(host),
            Step::Mangle { host, seed } => self.hosts[host].mangle(seed),
            Step::Deliver { host, count } => (0..count).for_each(|_| self.deliver(host)),
            Step::Wait { milliseconds } => self.wait(Duration::from_millis(milliseconds)),
            Step::RestartManager => self.restart(),
            Step::Checkpoint => self.checkpoint = self.store.load().unwrap(),
            Step::LoseStore => self.lose_store(),
        }
        self.check_epochs();
    }

    fn start(&mut self, host: usize) {
        let container = format!("c{}", self.calls);
        let request = Request::Allocate {
            network: "net1".to_owned(),
            container,
            ips: Vec::new(),
            mac: None,
        };
        if let Some(Ok(Response::Endpoint(endpoint))) = self.call(host, request) {
            let host = &mut self.hosts[host];
            host.agent.publish(endpoint.clone(), EndpointState::Up);
            host.runs.push((endpoint, EndpointState::Up));
        }
    }

    /// Ends an endpoint. Cut off, its owner frees it later, when the manager tells what it holds.
    fn stop(&mut self, which: usize) {
        let Some((host, i)) = self.pick(which) else {
            return;
        };
        let (endpoint, _) = self.hosts[host].runs.remove(i);
        self.call(
            host,
            Request::Free {
                vni: endpoint.vni,
                epoch: endpoint.epoch,
            },
        );
    }

    fn toggle(&mut self, which: usize) {
        let Some((host, i)) = self.pick(which) else {
            return;
        };
        let host = &mut self.hosts[host];
        let (endpoint, state) = &mut host.runs[i];
        *state = match state {
            EndpointState::Up => EndpointState::Down,
            EndpointState::Down => EndpointState::Up,
        };
        host.agent.publish(endpoint.clone(), *state);
    }

    fn pick(&self, which: usize) -> Option<(usize, usize)> {
        let all = || {
            self.hosts
                .iter()
                .enumerate()
                .flat_map(|(h, host)| (0..host.runs.len()).map(move |i| (h, i)))
        };
        all().nth(which.checked_rem(all().count())?)
    }

    fn connect(&mut self, host: usize) {
        if self.hosts[host].connection.is_some() {
            return;
        }
        self.connections += 1;
        let (connection, now) = (self.connections, self.now);
        let host = &mut self.hosts[host];
        host.connection = Some(connection);
        host.agent
            .handle_connected("192.0.2.1:4789".parse().unwrap(), now);
    }

    fn cut(&mut self, host: usize) {
        let now = self.now;
        let host = &mut self.hosts[host];
        if let Some(connection) = host.connection.take() {
            host.to_agent.clear();
            host.to_manager.clear();
            host.agent.handle_disconnected("cut", now);
            self.manager.handle_disconnected(connection);
        }
    }

    fn restart(&mut self) {
        for host in 0..self.hosts.len() {
            self.cut(host);
        }
        // No restart is faster than the clock's millisecond.
        self.now += Duration::from_secs(1);
        self.manager = load(&self.store, self.now);
    }

    fn lose_store(&mut self) {
        self.lost.push((
            last_issued(&self.checkpoint),
            last_issued(&self.store.load().unwrap()),
        ));
        let old = MemoryStore::default();
        let entries = self.checkpoint.iter();
        let batch: Vec<_> = entries
            .map(|(key, value)| control::store::Write {
                key: key.clone(),
                value: Some(value.clone()),
            })
            .collect();
        old.clone().commit(&batch).unwrap();
        self.store = old;
        self.restart();
    }

    fn wait(&mut self, how_long: Duration) {
        let until = self.now + how_long;
        while self.now < until {
            self.now += Duration::from_millis(100);
            for host in 0..self.hosts.len() {
                let now = self.now;
                self.hosts[host].agent.handle_timeout(now);
                if self.hosts[host].agent.wants_close() {
                    self.cut(host);
                }
                self.turn(host);
            }
            self.manager.handle_timeout(self.now);
            self.flush();
        }
    }

    /// Asks, and lets messages run until the answer is here or cannot come.
    fn call(
        &mut self,
        host: usize,
        request: Request,
    ) -> Option<Result<Response, control::RequestError>> {
        self.calls += 1;
        let (id, now) = (self.calls, self.now);
        self.hosts[host].agent.call(id, request, now);
        for _ in 0..60 {
            for _ in 0..20 {
                self.deliver(host);
            }
            let answers = &mut self.hosts[host].answers;
            if let Some(at) = answers.iter().position(|(answered, _)| *answered == id) {
                return Some(answers.remove(at).1);
            }
            self.wait(Duration::from_millis(100));
        }
        panic!("request {id} had no end");
    }

    /// One message each way.
    fn deliver(&mut self, host: usize) {
        self.turn(host);
        let now = self.now;
        if let Some(message) = self.hosts[host].to_manager.pop_front() {
            // Through bytes, as on the wire.
            let message = ToManager::decode(&message.encode()).unwrap();
            let (connection, from) = (
                self.hosts[host].connection.unwrap(),
                self.hosts[host].info.vtep,
            );
            match message {
                ToManager::Hello {
                    host: info,
                    last_epoch,
                    ..
                } => {
                    let refused = self
                        .manager
                        .handle_hello(connection, from, info, last_epoch, now);
                    if let Err(Refusal { reason, removed }) = refused {
                        assert!(removed, "{reason}");
                        self.hosts[host]
                            .to_agent
                            .push_back(ToAgent::Reject { reason, removed });
                    }
                }
                message => self.manager.handle_message(connection, message, now),
            }
            self.flush();
        }
        if let Some(message) = self.hosts[host].to_agent.pop_front() {
            self.hosts[host]
                .agent
                .handle_message(ToAgent::decode(&message.encode()).unwrap(), now);
            self.turn(host);
        }
    }

    fn deliver_all(&mut self) {
        while self
            .hosts
            .iter()
            .any(|host| !host.to_agent.is_empty() || !host.to_manager.is_empty())
            || self.pump()
        {
            (0..self.hosts.len()).for_each(|host| self.deliver(host));
        }
    }

    fn pump(&mut self) -> bool {
        (0..self.hosts.len()).for_each(|host| self.turn(host));
        self.hosts.iter().any(|host| !host.to_manager.is_empty())
    }

    /// Takes out what an agent has to say.
    fn turn(&mut self, host: usize) {
        let host = &mut self.hosts[host];
        while let Some(message) = host.agent.poll_message() {
            if host.connection.is_some() {
                host.to_manager.push_back(message);
            }
        }
        let mut unknown = Vec::new();
        while let Some(output) = host.agent.poll_output() {
            match output {
                agent::Output::Answer { id, result } => host.answers.push((id, result)),
                agent::Output::Event(Event::RowLost { epoch, .. }) => {
                    host.runs.retain(|(endpoint, _)| endpoint.epoch != epoch);
                }
                agent::Output::Event(Event::Owned(owned)) => {
                    let runs =
                        |e: &Endpoint| host.runs.iter().any(|(known, _)| known.epoch == e.epoch);
                    unknown.extend(
                        owned
                            .endpoints
                            .into_iter()
                            .filter(|endpoint| !runs(endpoint)),
                    );
                }
                agent::Output::Event(_) => {}
            }
        }
        for endpoint in unknown {
            self.calls += 1;
            let free = Request::Free {
                vni: endpoint.vni,
                epoch: endpoint.epoch,
            };
            host.agent.call(self.calls, free, self.now);
        }
    }

    /// The end of the manager's turn: durable first, then sent.
    fn flush(&mut self) {
        self.manager.finish_turn(self.now);
        let writes = self.manager.take_writes();
        self.store.commit(&writes).unwrap();
        while let Some(output) = self.manager.poll_output() {
            match output {
                manager::Output::Send { to, message } => {
                    for host in self
                        .hosts
                        .iter_mut()
                        .filter(|h| h.connection.is_some_and(|c| to.contains(&c)))
                    {
                        host.to_agent.push_back(message.clone());
                    }
                }
                manager::Output::Close(connection) => {
                    if let Some(host) = self
                        .hosts
                        .iter()
                        .position(|host| host.connection == Some(connection))
                    {
                        self.cut(host);
                    }
                }
                manager::Output::Probe { .. }
                | manager::Output::Sign { .. }
                | manager::Output::Authority { .. } => {
                    panic!("nobody probes, renews or stands by here")
                }
            }
        }
    }

    fn check_epochs(&mut self) {
        let (vni, lost) = (self.vni, &self.lost);
        for host in &mut self.hosts {
            let rows = host
                .agent
                .table(vni)
                .into_iter()
                .flat_map(control::table::Table::rows);
            for row in rows {
                let last = host.last.insert(row.ip, row.epoch).unwrap_or_default();
                let went_back =
                    row.epoch < last && !lost.iter().any(|(from, to)| *from < last && last <= *to);
                assert!(
                    !went_back,
                    "a view took a lower epoch for {}: {} after {last}",
                    row.ip, row.epoch
                );
            }
        }
    }

    /// Everybody back, and long enough for every grace to pass.
    fn settle(&mut self) {
        for round in 0..3 {
            for host in 0..self.hosts.len() {
                if round != 1 {
                    self.cut(host);
                }
                self.connect(host);
            }
            for _ in 0..2 * GRACE.as_millis() / HEARTBEAT.as_millis() {
                self.wait(HEARTBEAT);
                self.deliver_all();
            }
        }
    }

    fn check_settled(&self) {
        let table = self.manager.table(self.vni).unwrap();
        let truth = sorted(table.rows());
        // Who was removed is told nothing any more, and runs nothing.
        for host in self.hosts.iter().filter(|host| !host.agent.has_left()) {
            let view = host.agent.table(self.vni).unwrap();
            assert_eq!(sorted(view.rows()), truth, "the view of {}", host.info.name);
            for member in view.members() {
                assert_eq!(view.member(member), MemberState::Up);
            }
        }
        let mut running = 0;
        for host in &self.hosts {
            for (endpoint, state) in &host.runs {
                let row = table.row(endpoint.ips[0]).unwrap();
                let expected = if *state == EndpointState::Up {
                    State::Up
                } else {
                    State::Down
                };
                assert_eq!(
                    (row.epoch, row.owner, row.state),
                    (endpoint.epoch, host.info.id, expected),
                    "{endpoint:?}"
                );
                if row.state == State::Up {
                    assert_eq!(table.mac_host(endpoint.mac), Some(host.info.id));
                }
                running += 1;
            }
        }
        let held = truth.iter().filter(|row| row.state != State::Free).count();
        assert_eq!(held, running, "no address is held for nobody");
    }
}

impl Host {
    fn new(n: u8) -> Self {
        let info = HostInfo {
            id: HostId::from_bytes([n; 16]),
            name: format!("h{n}"),
            vtep: [192, 0, 2, n].into(),
            port: 4789,
            link_mtu: 1500,
            incarnation: 1,
        };
        Self {
            agent: Agent::new(
                info.clone(),
                CLUSTER.to_owned(),
                vec!["192.0.2.1:4789".parse().unwrap()],
            ),
            info,
            connection: None,
            to_manager: VecDeque::new(),
            to_agent: VecDeque::new(),
            runs: Vec::new(),
            answers: Vec::new(),
            last: HashMap::new(),
        }
    }

    fn mangle(&mut self, seed: u64) {
        let is_rows = |message: &ToAgent| matches!(message, ToAgent::Rows(_));
        let places: Vec<usize> = (0..self.to_agent.len())
            .filter(|i| is_rows(&self.to_agent[*i]))
            .collect();
        for (i, &place) in places.iter().enumerate() {
            let random = seed.rotate_left(u32::try_from(i % 64).unwrap() * 5);
            match random % 4 {
                0 => self.to_agent[place] = ToAgent::Heartbeat,
                1 => self.to_agent.push_back(self.to_agent[place].clone()),
                _ => {
                    let other = places[usize::try_from(random / 4 % places.len() as u64).unwrap()];
                    self.to_agent.swap(place, other);
                }
            }
        }
    }
}

fn load(store: &MemoryStore, now: Duration) -> Manager {
    let settings = Settings {
        host: HostId::from_bytes([1; 16]),
        cluster: CLUSTER.to_owned(),
        seed: 1,
        unix_at_zero: Duration::from_secs(1_000_000),
        pools: Vec::new(),
    };
    Manager::new(settings, &store.clone().load().unwrap(), now).unwrap()
}

/// The last epoch that a store's content knows of.
fn last_issued(entries: &BTreeMap<String, String>) -> Epoch {
    let meta: serde_json::Value = serde_json::from_str(&entries["meta"]).unwrap();
    Epoch::from_bits(meta["last"].as_u64().unwrap())
}

fn sorted<'r>(rows: impl Iterator<Item = &'r Row>) -> Vec<Row> {
    let mut rows: Vec<Row> = rows.cloned().collect();
    rows.sort_by_key(|row| row.ip);
    rows
}

#[test]
fn a_silent_host_is_masked_and_a_healed_one_unmasked() {
    let mut sim = Sim::new();
    sim.start(1);
    sim.deliver_all();
    let silent = sim.hosts[1].info.id;
    let member = |sim: &Sim| sim.hosts[0].agent.table(sim.vni).unwrap().member(silent);
    let mac = sim.hosts[1].runs[0].0.mac;
    sim.wait(Duration::from_millis(100));
    sim.deliver_all();
    assert_eq!(member(&sim), MemberState::Up);
    let run = |sim: &mut Sim, seconds: u64| {
        for _ in 0..seconds * 10 {
            sim.wait(Duration::from_millis(100));
            for host in [0, 2, 3] {
                (0..8).for_each(|_| sim.deliver(host));
            }
        }
    };
    // Nothing is masked while the manager is young: hosts may still be on their way back.
    run(&mut sim, 9);
    assert_eq!(member(&sim), MemberState::Up);
    run(&mut sim, 3);
    assert_eq!(member(&sim), MemberState::Masked);
    let table = sim.hosts[0].agent.table(sim.vni).unwrap();
    assert_eq!(
        table.mac_host(mac),
        Some(silent),
        "a mask removes no unicast entry"
    );
    sim.connect(1);
    sim.deliver_all();
    assert_eq!(member(&sim), MemberState::Up);
}

#[test]
fn a_reused_address_has_another_mac_and_a_rest() {
    let mut sim = Sim::new();
    let mut last: HashMap<IpAddr, (vtep::MacAddr, Duration)> = HashMap::new();
    for _ in 0..60 {
        sim.start(0);
        let Some((endpoint, _)) = sim.hosts[0].runs.last().cloned() else {
            panic!("nothing started")
        };
        let before = last.insert(endpoint.ips[0], (endpoint.mac, sim.now));
        if let Some((mac, freed)) = before {
            assert_ne!(mac, endpoint.mac);
            assert!(sim.now - freed >= control::allocator::REST);
        }
        sim.stop(0);
        sim.wait(Duration::from_secs(1));
    }
    let leased: usize = sim
        .hosts
        .iter()
        .map(|host| host.agent.status(sim.now).subscriptions[0].leased.len())
        .sum();
    assert_eq!(
        last.len() + leased,
        13,
        "round the whole subnet, but what hosts were leased ahead"
    );
}

#[test]
fn a_host_that_returns_after_its_removal_takes_its_ports_down() {
    let mut sim = Sim::new();
    sim.start(1);
    sim.cut(1);
    let removed = sim.call(
        0,
        Request::RemoveHost {
            host: "h2".to_owned(),
            force: false,
        },
    );
    assert!(matches!(removed, Some(Ok(Response::Done))), "{removed:?}");
    assert_eq!(sim.hosts[1].runs.len(), 1);
    sim.settle();
    assert!(sim.hosts[1].runs.is_empty());
    sim.check_settled();
}

/// Conformance H13: a host publishes an entry for another host.
#[test]
fn nobody_edits_another_hosts_rows() {
    let mut sim = Sim::new();
    sim.start(1);
    sim.deliver_all();
    let (endpoint, _) = sim.hosts[1].runs[0].clone();
    let before = sorted(sim.manager.table(sim.vni).unwrap().rows());
    assert_eq!(before[0].state, State::Up);
    sim.hosts[0]
        .agent
        .publish(endpoint.clone(), EndpointState::Down);
    let forged = Endpoint {
        epoch: Epoch::new(1, endpoint.epoch.counter() + 100),
        ..endpoint
    };
    sim.hosts[0].agent.publish(forged, EndpointState::Up);
    sim.deliver_all();
    assert_eq!(sorted(sim.manager.table(sim.vni).unwrap().rows()), before);
}

proptest! {
    #[test]
    fn every_view_ends_as_the_allocators_table(steps in steps()) {
        let mut sim = Sim::new();
        for step in &steps {
            sim.step(step);
        }
        sim.settle();
        sim.check_epochs();
        sim.check_settled();
    }
}
