//! A cluster: the state machines of one manager and many agents, each agent with a program that runs endpoints, on wires in
//! virtual time. Here is what happens by itself; what is done to it is in `faults.rs`, what must hold in `check.rs`.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use control::manager::{self, Manager, Refusal, Settings};
use control::message::{ToAgent, ToManager};
use control::store::Write;
use control::{Epoch, HostId, MemoryStore, NetworkSpec, Request, RequestError, Response, Store};
use vtep::Vni;

use crate::host::{Host, Line};
use crate::net::{Net, Way};

/// The cluster's name.
pub(crate) const CLUSTER: &str = "0123456789abcdef";
/// How often drivers tell the state machines the time.
const TICK: Duration = Duration::from_millis(100);
/// The wait after a connection failed.
pub(crate) const RETRY: Duration = Duration::from_millis(500);
/// The address that agents reach the manager at.
pub(crate) const MANAGER: ([u8; 4], u16) = ([10, 255, 255, 254], 4789);

/// What is due.
#[derive(Clone, Debug)]
pub(crate) enum Happens {
    ToManager {
        connection: u64,
        message: Arc<ToManager>,
    },
    ToAgent {
        host: usize,
        connection: u64,
        message: Arc<ToAgent>,
    },
    /// The manager hears that the agent closed.
    AgentClosed {
        connection: u64,
    },
    /// The agent hears that the manager closed.
    ManagerClosed {
        host: usize,
        connection: u64,
    },
    AgentTick {
        host: usize,
        life: u64,
    },
    ManagerTick {
        life: u64,
    },
    ManagerTurn {
        life: u64,
    },
    Retry {
        host: usize,
    },
    StartAgent {
        host: usize,
    },
    StartManager,
    Heal {
        host: usize,
    },
    /// A host that stood still goes on, unless it was told to stand still for longer.
    Thaw {
        host: usize,
    },
}

/// The cluster.
pub(crate) struct World {
    pub(crate) net: Net<Happens>,
    pub(crate) store: MemoryStore,
    pub(crate) backup: BTreeMap<String, String>,
    pub(crate) manager: Option<Manager>,
    pub(crate) manager_life: u64,
    /// What has come for the manager's next turn.
    inbox: Vec<(u64, Arc<ToManager>)>,
    turn_due: bool,
    /// A manager's turn, from the first message to the sync of the disk.
    pub(crate) turn: Duration,
    /// Connections that said hello; a second one is a message like others.
    greeted: HashSet<u64>,
    /// The manager's ends of connections.
    pub(crate) accepted: BTreeMap<u64, usize>,
    connections: u64,
    pub(crate) hosts: Vec<Host>,
    pub(crate) networks: Vec<Vni>,
    pub(crate) calls: u64,
    /// The time of day when virtual time was zero, as the manager's host has it.
    pub(crate) clock: Duration,
    /// Epochs that a replaced store had issued and its successor did not know: only from these may a view go back.
    pub(crate) lost: Vec<(Epoch, Epoch)>,
    /// What a host had seen that is promoted: its manager is the next to start.
    pub(crate) succeeds: Option<Epoch>,
    /// Hosts that an operator removed.
    pub(crate) removed: BTreeSet<HostId>,
    /// The last time that anything was done to the manager or its store.
    pub(crate) disturbed: Duration,
    /// The address that was freed last.
    pub(crate) freed: HashMap<Vni, IpAddr>,
    /// Of all that was said so far, by whom and when.
    pub(crate) trace: u64,
    /// Messages get lost within connections: what must hold is looked at after new ones alone.
    pub(crate) harsh: bool,
}

impl World {
    /// A cluster of `hosts`, all connected, with empty networks of these subnets.
    pub(crate) fn with(seed: u64, hosts: usize, subnets: &[&str]) -> Self {
        let mut world = Self::empty(seed, hosts);
        world.run(Duration::from_secs(1));
        world.make_networks(subnets);
        world.backup = world.store.load().unwrap();
        world
    }

    pub(crate) fn make_networks(&mut self, subnets: &[&str]) {
        for (i, subnet) in subnets.iter().enumerate() {
            let vni = Vni::new(4096 + u32::try_from(i).unwrap()).unwrap();
            self.networks.push(vni);
            let request = Request::CreateNetwork {
                spec: spec(i, vni, subnet),
                routes_in_use: Vec::new(),
            };
            let made = self.call(0, request);
            assert!(matches!(made, Ok(Response::Network(_))), "{made:?}");
        }
    }

    /// The same without networks, and nobody is connected yet.
    pub(crate) fn empty(seed: u64, hosts: usize) -> Self {
        let mut world = Self {
            net: Net::new(seed, hosts),
            store: MemoryStore::default(),
            backup: BTreeMap::new(),
            manager: None,
            manager_life: 0,
            inbox: Vec::new(),
            turn_due: false,
            turn: Duration::from_millis(1),
            greeted: HashSet::new(),
            accepted: BTreeMap::new(),
            connections: 0,
            hosts: (0..hosts).map(Host::new).collect(),
            networks: Vec::new(),
            calls: 0,
            clock: Duration::from_secs(1_000_000),
            lost: Vec::new(),
            succeeds: None,
            removed: BTreeSet::new(),
            disturbed: Duration::ZERO,
            freed: HashMap::new(),
            trace: 0,
            harsh: false,
        };
        world.start_manager();
        for host in 0..hosts {
            world.start_ticking(host);
        }
        world
    }

    pub(crate) fn now(&self) -> Duration {
        self.net.now()
    }

    /// Lets time pass.
    pub(crate) fn run(&mut self, how_long: Duration) {
        let end = self.now() + how_long;
        while let Some(event) = self.net.pop(end) {
            self.happen(event);
        }
    }

    /// Asks on behalf of a host, and lets time pass until the answer is here.
    pub(crate) fn call(&mut self, host: usize, request: Request) -> Result<Response, RequestError> {
        let id = self.next_call();
        let now = self.hosts[host].now(self.now());
        self.hosts[host]
            .agent
            .as_mut()
            .expect("the agent runs")
            .call(id, request, now);
        self.pump(host);
        for _ in 0..400 {
            if let Some(answer) = self.hosts[host].answers.remove(&id) {
                return answer;
            }
            self.run(TICK);
        }
        panic!("request {id} had no end");
    }

    pub(crate) fn next_call(&mut self) -> u64 {
        self.calls += 1;
        self.calls
    }

    /// A manager over what the store holds.
    pub(crate) fn start_manager(&mut self) {
        if self.manager.is_some() {
            return;
        }
        self.manager_life += 1;
        let settings = Settings {
            host: HostId::from_bytes([1; 16]),
            cluster: CLUSTER.to_owned(),
            seed: self.net.random.next(),
            unix_at_zero: self.clock,
            pools: Vec::new(),
        };
        let stored = self.store.load().unwrap();
        let mut manager = Manager::new(settings, &stored, self.now()).unwrap();
        if let Some(seen) = self.succeeds.take() {
            manager.succeed(seen, self.now());
        }
        self.manager = Some(manager);
        self.disturbed = self.now();
        let life = self.manager_life;
        self.net.after(TICK, Happens::ManagerTick { life });
    }

    /// An agent's timer and its first attempt to connect.
    pub(crate) fn start_ticking(&mut self, host: usize) {
        let life = self.hosts[host].life;
        let phase = Duration::from_micros(self.net.random.below(100_000));
        self.net.after(phase, Happens::AgentTick { host, life });
        self.net.after(phase, Happens::Retry { host });
    }

    fn happen(&mut self, event: Happens) {
        let now = self.now();
        let of_agent = match &event {
            Happens::ToAgent { host, .. }
            | Happens::ManagerClosed { host, .. }
            | Happens::AgentTick { host, .. }
            | Happens::Retry { host } => Some(*host),
            _ => None,
        };
        if let Some(host) = of_agent
            && (self.hosts[host].is_frozen(now) || !self.hosts[host].waiting.is_empty())
        {
            self.wait_for_thaw(host, event);
            return;
        }
        match event {
            Happens::ToManager {
                connection,
                message,
            } => self.reach_manager(connection, message),
            Happens::ToAgent {
                host,
                connection,
                message,
            } => {
                if self.hosts[host].line == Line::Open(connection) {
                    let lost = &self.lost;
                    self.hosts[host].take_message(&message, now, |last| was_lost(lost, last));
                    self.pump(host);
                }
            }
            Happens::AgentClosed { connection } => {
                // What came before is handled before.
                self.manager_turn();
                if let (Some(_), Some(manager)) =
                    (self.accepted.remove(&connection), &mut self.manager)
                {
                    manager.handle_disconnected(connection);
                }
            }
            Happens::ManagerClosed { host, connection } => {
                if self.hosts[host].line == Line::Open(connection) {
                    self.hosts[host].closed("the manager closed the connection", now);
                    self.pump(host);
                    self.net.after(RETRY, Happens::Retry { host });
                }
            }
            Happens::AgentTick { host, life } => {
                if self.hosts[host].life == life {
                    self.hosts[host].tick(now);
                    self.pump(host);
                    self.net.after(TICK, Happens::AgentTick { host, life });
                }
            }
            Happens::ManagerTick { life } => {
                if life == self.manager_life
                    && let Some(manager) = &mut self.manager
                {
                    manager.handle_timeout(now);
                    self.manager_turn();
                    self.net.after(TICK, Happens::ManagerTick { life });
                }
            }
            Happens::ManagerTurn { life } => {
                if life == self.manager_life {
                    self.manager_turn();
                }
            }
            Happens::Retry { host } => self.connect(host),
            Happens::StartAgent { host } => self.start_agent(host),
            Happens::StartManager => self.start_manager(),
            Happens::Heal { host } => self.heal(host),
            Happens::Thaw { host } => self.thaw(host),
        }
    }

    /// What comes to a host that stands still keeps its order, however often the end of that is put off.
    fn wait_for_thaw(&mut self, host: usize, event: Happens) {
        let waiting = &mut self.hosts[host].waiting;
        waiting.push(event);
        if waiting.len() == 1 {
            let until = self.hosts[host].frozen_until;
            let wait = until.saturating_sub(self.now());
            self.net.after(wait, Happens::Thaw { host });
        }
    }

    fn thaw(&mut self, host: usize) {
        let now = self.now();
        if self.hosts[host].is_frozen(now) {
            let wait = self.hosts[host].frozen_until - now;
            self.net.after(wait, Happens::Thaw { host });
            return;
        }
        for event in std::mem::take(&mut self.hosts[host].waiting) {
            self.happen(event);
        }
    }

    fn connect(&mut self, host: usize) {
        let now = self.now();
        if self.hosts[host].agent.is_none() || self.hosts[host].line != Line::Down {
            return;
        }
        if self.manager.is_none() || self.net.is_parted(host) {
            self.hosts[host].closed("no answer", now);
            self.pump(host);
            self.net.after(RETRY, Happens::Retry { host });
            return;
        }
        self.connections += 1;
        let connection = self.connections;
        self.accepted.insert(connection, host);
        self.hosts[host].opened(connection, now);
        self.pump(host);
    }

    fn reach_manager(&mut self, connection: u64, message: Arc<ToManager>) {
        if self.manager.is_none() || !self.accepted.contains_key(&connection) {
            return;
        }
        self.inbox.push((connection, message));
        if !self.turn_due {
            self.turn_due = true;
            let life = self.manager_life;
            self.net.after(self.turn, Happens::ManagerTurn { life });
        }
    }

    /// One turn: what came, then the disk, then what follows from it.
    pub(crate) fn manager_turn(&mut self) {
        let writes = self.decide();
        self.commit(&writes);
        self.send_outputs();
    }

    /// What the manager makes of all that came.
    pub(crate) fn decide(&mut self) -> Vec<Write> {
        self.turn_due = false;
        let now = self.now();
        let Some(manager) = &mut self.manager else {
            self.inbox.clear();
            return Vec::new();
        };
        let mut refused = Vec::new();
        for (connection, message) in self.inbox.drain(..) {
            match (*message).clone() {
                ToManager::Hello {
                    host, last_epoch, ..
                } if self.greeted.insert(connection) => {
                    let Some(&from) = self.accepted.get(&connection) else {
                        continue;
                    };
                    let from = self.hosts[from].info.vtep;
                    if let Err(Refusal { reason, removed }) =
                        manager.handle_hello(connection, from, host, last_epoch, now)
                    {
                        refused.push((connection, ToAgent::Reject { reason, removed }));
                    }
                }
                message => manager.handle_message(connection, message, now),
            }
        }
        manager.finish_turn(now);
        let writes = manager.take_writes();
        for (connection, refusal) in refused {
            self.tell(&[connection], refusal);
            self.close_accepted(connection);
        }
        writes
    }

    pub(crate) fn commit(&mut self, writes: &[Write]) {
        self.store.commit(writes).unwrap();
    }

    fn send_outputs(&mut self) {
        while let Some(output) = self.manager.as_mut().and_then(Manager::poll_output) {
            match output {
                manager::Output::Send { to, message } => self.tell(&to, message),
                manager::Output::Close(connection) => self.close_accepted(connection),
                manager::Output::Probe { .. }
                | manager::Output::Sign { .. }
                | manager::Output::Authority { .. } => {
                    panic!("nobody probes, renews or stands by here")
                }
            }
        }
    }

    fn tell(&mut self, to: &[u64], message: ToAgent) {
        // Through bytes, as on the wire.
        let bytes = message.encode();
        self.note(to, &bytes);
        let message = Arc::new(ToAgent::decode(&bytes).unwrap());
        for &connection in to {
            if let Some(&host) = self.accepted.get(&connection) {
                let message = Arc::clone(&message);
                self.net.send(
                    host,
                    Way::ToHost,
                    Happens::ToAgent {
                        host,
                        connection,
                        message,
                    },
                );
            }
        }
    }

    fn note(&mut self, whom: &[impl Hash], message: &[u8]) {
        // Its keys are fixed, unlike those of a map.
        let mut hasher = DefaultHasher::new();
        (self.trace, self.now(), whom, message).hash(&mut hasher);
        self.trace = hasher.finish();
    }

    fn close_accepted(&mut self, connection: u64) {
        if let Some(host) = self.accepted.remove(&connection) {
            self.net.send_surely(
                host,
                Way::ToHost,
                Happens::ManagerClosed { host, connection },
            );
        }
    }

    /// Takes out what an agent has to say, and lets its program act on what it is told.
    pub(crate) fn pump(&mut self, host: usize) {
        let now = self.now();
        loop {
            let first = self.calls + 1;
            let (messages, calls) = self.hosts[host].poll(first, now);
            self.calls += calls;
            for message in messages {
                if let Line::Open(connection) = self.hosts[host].line {
                    let bytes = message.encode();
                    self.note(&[host], &bytes);
                    let message = Arc::new(ToManager::decode(&bytes).unwrap());
                    self.net.send(
                        host,
                        Way::FromHost,
                        Happens::ToManager {
                            connection,
                            message,
                        },
                    );
                }
            }
            if calls == 0 {
                break;
            }
        }
        if let Some(unexplained) = self.hosts[host].taken_away.take()
            && self.lost.is_empty()
        {
            let of = &self.hosts[host];
            // A host that was silent for long may have used what was leased to it and is another's now. And where messages
            // overtake each other, as none of one connection do, the end of a network may come after its successor's beginning.
            let leased = of.leased.contains(&(unexplained.vni, unexplained.epoch));
            assert!(
                leased || self.harsh || self.removed.contains(&of.info.id),
                "{} lost {unexplained:?} for no reason",
                of.info.name
            );
        }
        let agent = self.hosts[host].agent.as_ref();
        if agent.is_some_and(control::agent::Agent::has_left) {
            self.join_again(host);
            return;
        }
        if let Line::Open(connection) = self.hosts[host].line
            && self.hosts[host]
                .agent
                .as_ref()
                .is_some_and(|agent| agent.wants_close())
        {
            self.hosts[host].line = Line::Down;
            self.net
                .send_surely(host, Way::FromHost, Happens::AgentClosed { connection });
            self.net.after(RETRY, Happens::Retry { host });
        }
    }
}

/// Whether an epoch is one that a replaced store had issued.
pub(crate) fn was_lost(lost: &[(Epoch, Epoch)], epoch: Epoch) -> bool {
    lost.iter().any(|(from, to)| *from < epoch && epoch <= *to)
}

/// The last epoch that a store's content knows of.
pub(crate) fn last_issued(entries: &BTreeMap<String, String>) -> Epoch {
    entries.get("meta").map_or(Epoch::ZERO, |meta| {
        let meta: serde_json::Value = serde_json::from_str(meta).unwrap();
        Epoch::from_bits(meta["last"].as_u64().unwrap())
    })
}

/// The name of a network by its place.
pub(crate) fn network_name(i: usize) -> String {
    format!("net{i}")
}

/// Every network keeps its VNI, so that one that was removed comes back under the same.
pub(crate) fn spec(i: usize, vni: Vni, subnet: &str) -> NetworkSpec {
    NetworkSpec {
        subnets: vec![subnet.parse().unwrap()],
        vni: Some(vni),
        ..NetworkSpec::named(&network_name(i))
    }
}

/// Answers that nobody waits for are kept until somebody asks.
pub(crate) type Answers = HashMap<u64, Result<Response, RequestError>>;
