//! One host: its agent's state machine, its driver's end of the connection, and a program that runs endpoints as `towline`
//! does, with a state file that outlives the agent and a datapath that is told of changes alone.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use control::agent::{Agent, Output};
use control::message::{ToAgent, ToManager};
use control::{
    Endpoint, EndpointState, Epoch, Event, HostId, HostInfo, Membership, Names, Request,
    RequestError, Response, Service,
};
use vtep::Vni;

use crate::world::{Answers, CLUSTER, Happens, MANAGER};
use control::testing::Installed;

/// The driver's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Down,
    Open(u64),
}

/// A host.
pub(crate) struct Host {
    pub(crate) info: HostInfo,
    /// `None`: killed.
    pub(crate) agent: Option<Agent>,
    /// Counts its agents.
    pub(crate) life: u64,
    pub(crate) line: Line,
    /// It stands still until then.
    pub(crate) frozen_until: Duration,
    /// What came meanwhile, in its order.
    pub(crate) waiting: Vec<Happens>,
    /// How far the host's own clock is ahead.
    pub(crate) ahead: Duration,
    /// The last time that anything was done to this host or its wire.
    pub(crate) disturbed: Duration,
    /// What runs here, as what it was published: the state file.
    pub(crate) runs: Vec<(Endpoint, EndpointState)>,
    /// Networks followed.
    pub(crate) follows: BTreeSet<Vni>,
    pub(crate) installed: BTreeMap<Vni, Installed>,
    /// Services of the networks followed, as the program was last told.
    pub(crate) services: BTreeMap<Vni, Vec<Service>>,
    /// Allocations under way: the answer starts an endpoint.
    pub(crate) starting: HashMap<u64, Wanted>,
    /// Calls whose answers somebody waits for.
    pub(crate) answers: Answers,
    /// What was taken out of blocks, while no manager answered.
    pub(crate) leased: BTreeSet<(Vni, Epoch)>,
    /// An endpoint that was taken away and not explained yet.
    pub(crate) taken_away: Option<Endpoint>,
    /// The last epoch seen of each address.
    last: HashMap<(Vni, IpAddr), Epoch>,
    /// What an earlier agent knew, as its cache file has it.
    cache: Vec<ToAgent>,
    /// And the blocks in it: these are in the file before anything else happens.
    blocks: BTreeMap<Vni, ToAgent>,
}

/// An endpoint that was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) vni: Vni,
    pub(crate) container: String,
    pub(crate) ips: Vec<IpAddr>,
}

impl Host {
    pub(crate) fn new(n: usize) -> Self {
        let number = u16::try_from(n + 1).unwrap();
        let mut id = [0; 16];
        id[..2].copy_from_slice(&number.to_le_bytes());
        if n == 0 {
            id = [1; 16];
        }
        let [high, low] = number.to_be_bytes();
        let info =
            control::testing::host_info(HostId::from_bytes(id), number, [10, 255, high, low]);
        Self {
            agent: Some(new_agent(&info)),
            info,
            life: 1,
            line: Line::Down,
            frozen_until: Duration::ZERO,
            waiting: Vec::new(),
            ahead: Duration::ZERO,
            disturbed: Duration::ZERO,
            runs: Vec::new(),
            follows: BTreeSet::new(),
            installed: BTreeMap::new(),
            services: BTreeMap::new(),
            starting: HashMap::new(),
            answers: HashMap::new(),
            leased: BTreeSet::new(),
            taken_away: None,
            last: HashMap::new(),
            cache: Vec::new(),
            blocks: BTreeMap::new(),
        }
    }

    /// The time on this host.
    pub(crate) fn now(&self, now: Duration) -> Duration {
        now + self.ahead
    }

    /// Whether it stands still.
    pub(crate) fn is_frozen(&self, now: Duration) -> bool {
        self.frozen_until > now
    }

    pub(crate) fn opened(&mut self, connection: u64, now: Duration) {
        let now = self.now(now);
        if let Some(agent) = &mut self.agent {
            self.line = Line::Open(connection);
            agent.handle_connected(MANAGER.into(), now);
        }
    }

    pub(crate) fn closed(&mut self, reason: &str, now: Duration) {
        let now = self.now(now);
        self.line = Line::Down;
        if let Some(agent) = &mut self.agent {
            agent.handle_disconnected(reason, now);
        }
    }

    pub(crate) fn tick(&mut self, now: Duration) {
        let now = self.now(now);
        if let Some(agent) = &mut self.agent {
            agent.handle_timeout(now);
        }
    }

    /// A message comes. No address may go back to a lower epoch, unless that epoch's store is gone.
    pub(crate) fn take_message(
        &mut self,
        message: &ToAgent,
        now: Duration,
        was_lost: impl Fn(Epoch) -> bool,
    ) {
        let now = self.now(now);
        let Some(agent) = &mut self.agent else { return };
        agent.handle_message(message.clone(), now);
        if let ToAgent::Lease { vni, .. } = message
            && agent.is_up()
        {
            self.blocks.insert(*vni, message.clone());
        }
        let ToAgent::Rows(rows) = message else { return };
        let Some(table) = agent.table(rows.vni) else {
            return;
        };
        for row in &rows.rows {
            let Some(taken) = table.row(row.ip) else {
                continue;
            };
            let last = self
                .last
                .insert((rows.vni, row.ip), taken.epoch)
                .unwrap_or_default();
            assert!(
                taken.epoch >= last || was_lost(last),
                "{} took a lower epoch for {}: {} after {last}",
                self.info.name,
                row.ip,
                taken.epoch
            );
        }
    }

    /// What the agent says, and how many calls its program made, numbered from `first`.
    pub(crate) fn poll(&mut self, first: u64, now: Duration) -> (Vec<ToManager>, u64) {
        let now = self.now(now);
        let mut next = first;
        let Some(agent) = &mut self.agent else {
            return (Vec::new(), 0);
        };
        let mut messages = Vec::new();
        let mut outputs = Vec::new();
        messages.extend(std::iter::from_fn(|| agent.poll_message()));
        outputs.extend(std::iter::from_fn(|| agent.poll_output()));
        for output in outputs {
            match output {
                Output::Answer { id, result } => self.answered(id, result),
                Output::Event(event) => next += self.hear(event, next, now),
            }
        }
        if let Some(agent) = &mut self.agent {
            messages.extend(std::iter::from_fn(|| agent.poll_message()));
        }
        (messages, next - first)
    }

    fn answered(&mut self, id: u64, result: Result<Response, RequestError>) {
        let Some(wanted) = self.starting.remove(&id) else {
            self.answers.insert(id, result);
            return;
        };
        let endpoint = match result {
            Ok(Response::Endpoint(endpoint)) => Some(endpoint),
            Err(RequestError::NotConnected { .. }) => self.take_leased(&wanted),
            _ => None,
        };
        match endpoint {
            Some(endpoint) => self.publish(named(endpoint, false), EndpointState::Up),
            None => self.leave_idle(wanted.vni),
        }
    }

    /// An endpoint of what was leased ahead, where there is one.
    fn take_leased(&mut self, wanted: &Wanted) -> Option<Endpoint> {
        let Wanted {
            vni,
            container,
            ips,
        } = wanted;
        let agent = self.agent.as_mut()?;
        let (endpoint, left) = agent.take_leased(*vni, container, ips).ok()?;
        self.blocks.insert(*vni, left);
        self.leased.insert((*vni, endpoint.epoch));
        Some(endpoint)
    }

    pub(crate) fn publish(&mut self, endpoint: Endpoint, state: EndpointState) {
        self.runs
            .retain(|(known, _)| (known.vni, known.epoch) != (endpoint.vni, endpoint.epoch));
        self.runs.push((endpoint.clone(), state));
        if let Some(agent) = &mut self.agent {
            agent.publish(endpoint, state);
        }
    }

    /// News. Answers how many calls were made because of it.
    fn hear(&mut self, event: Event, first: u64, now: Duration) -> u64 {
        match event {
            Event::RowLost { vni, epoch } => {
                let place = self
                    .runs
                    .iter()
                    .position(|(e, _)| (e.vni, e.epoch) == (vni, epoch));
                if let Some(place) = place {
                    self.taken_away = Some(self.runs.remove(place).0);
                }
                self.leave_idle(vni);
            }
            Event::Owned(owned) => {
                let runs: HashSet<(Vni, Epoch)> =
                    self.runs.iter().map(|(e, _)| (e.vni, e.epoch)).collect();
                let strange = owned
                    .endpoints
                    .iter()
                    .filter(|e| !runs.contains(&(e.vni, e.epoch)));
                let mut calls = 0;
                for endpoint in strange {
                    if let Some(agent) = &mut self.agent {
                        agent.call(
                            first + calls,
                            Request::Free {
                                vni: endpoint.vni,
                                epoch: endpoint.epoch,
                            },
                            now,
                        );
                        calls += 1;
                    }
                }
                return calls;
            }
            // What was under way when the network was left is nobody's.
            Event::Table { vni, changes } if self.follows.contains(&vni) => {
                self.installed.entry(vni).or_default().apply(&changes);
            }
            Event::Services { vni, services } if self.follows.contains(&vni) => {
                self.hear_services(vni, services);
            }
            Event::Reached {
                vni,
                generation,
                revision,
            } => {
                if let Some(agent) = &mut self.agent {
                    agent.applied(vni, generation, revision);
                }
            }
            Event::NetworkRemoved(vni) => {
                self.forget(vni);
                if self
                    .agent
                    .as_ref()
                    .is_some_and(|agent| agent.table(vni).is_none())
                {
                    self.follows.remove(&vni);
                }
            }
            _ => {}
        }
        0
    }

    /// What runs here leaves a service that is gone: control has published that.
    fn hear_services(&mut self, vni: Vni, services: Vec<Service>) {
        let left = |epoch: Epoch| !services.iter().any(|service| service.epoch == epoch);
        let before = self.services.remove(&vni).unwrap_or_default();
        let gone: Vec<Epoch> = before
            .iter()
            .map(|service| service.epoch)
            .filter(|epoch| left(*epoch))
            .collect();
        for (endpoint, _) in &mut self.runs {
            let of_gone = |member: &Membership| gone.contains(&member.service);
            if endpoint.vni == vni && endpoint.member.as_ref().is_some_and(of_gone) {
                endpoint.member = None;
            }
        }
        self.services.insert(vni, services);
    }

    pub(crate) fn follow(&mut self, vni: Vni) {
        self.follows.insert(vni);
        if let Some(agent) = &mut self.agent {
            agent.subscribe(vni);
        }
    }

    /// Stops following a network where nothing of it runs or is about to.
    pub(crate) fn leave_idle(&mut self, vni: Vni) {
        let busy = self.runs.iter().any(|(e, _)| e.vni == vni)
            || self.starting.values().any(|w| w.vni == vni);
        if !busy && self.follows.remove(&vni) {
            if let Some(agent) = &mut self.agent {
                agent.unsubscribe(vni);
            }
            self.forget(vni);
        }
    }

    fn forget(&mut self, vni: Vni) {
        self.installed.remove(&vni);
        self.services.remove(&vni);
        self.last.retain(|(of, _), _| *of != vni);
        self.blocks.remove(&vni);
    }

    /// What is left of this host's block.
    pub(crate) fn leased_ahead(&self, vni: Vni) -> Vec<IpAddr> {
        let status = self.agent.as_ref().map(|agent| agent.status(self.ahead));
        let streams = status.into_iter().flat_map(|status| status.subscriptions);
        let of_network = streams.filter(|stream| stream.vni == vni);
        of_network.flat_map(|stream| stream.leased).collect()
    }

    /// The agent is gone; endpoints run on.
    pub(crate) fn kill(&mut self) {
        // The file is written now and then: sometimes it is of a life before.
        if let Some(agent) = self.agent.take().filter(|_| self.life % 2 == 1) {
            self.cache = agent.snapshot(CLUSTER);
        }
        self.line = Line::Down;
        self.life += 1;
        self.starting.clear();
        self.installed.clear();
        self.services.clear();
    }

    /// A new agent, from the state file.
    pub(crate) fn start(&mut self, now: Duration) {
        let now = self.now(now);
        self.info.incarnation += 1;
        let mut agent = new_agent(&self.info);
        for (endpoint, state) in &self.runs {
            agent.publish(endpoint.clone(), *state);
        }
        self.follows = self.runs.iter().map(|(e, _)| e.vni).collect();
        for &vni in &self.follows {
            agent.subscribe(vni);
        }
        let is_block = |message: &&ToAgent| matches!(message, ToAgent::Lease { .. });
        let tables = self.cache.iter().filter(|message| !is_block(message));
        for message in tables.chain(self.blocks.values()) {
            agent.restore(message.clone(), now);
        }
        self.agent = Some(agent);
    }

    /// The host left the cluster and joins again as another.
    pub(crate) fn reborn(&mut self, id: HostId, now: Duration) {
        self.kill();
        self.runs.clear();
        self.last.clear();
        self.info.id = id;
        self.cache.clear();
        self.blocks.clear();
        self.start(now);
    }
}

fn new_agent(info: &HostInfo) -> Agent {
    Agent::new(info.clone(), CLUSTER.to_owned(), vec![MANAGER.into()])
}

/// An endpoint with its container's names, one of them an alias or none.
pub(crate) fn named(mut endpoint: Endpoint, alias: bool) -> Endpoint {
    endpoint.names = Some(Arc::new(Names {
        container: endpoint.container.clone(),
        id: "0123456789ab".to_owned(),
        aliases: alias.then(|| "db".to_owned()).into_iter().collect(),
    }));
    endpoint
}
