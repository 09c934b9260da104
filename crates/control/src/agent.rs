//! The agent's side of the control plane, without a socket and without a clock.
//!
//! Whoever drives it hands in messages, connections and the time ([`Agent::handle_message`], [`Agent::handle_timeout`] …) and
//! takes out what is to be sent ([`Agent::poll_message`]) and told ([`Agent::poll_output`]). `now` is the time since any fixed
//! moment. Without a manager everything known stays in force, for ever. After a reconnection each stream resumes after the last
//! change it has, and every endpoint that this host runs is published again where the manager's view of it differs.

mod block;
mod calls;
mod hosts;
mod own;
mod restore;
pub(crate) mod services;
mod stream;
#[cfg(test)]
mod testing;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::BytesMut;
use vtep::{MacAddr, Vni};

use crate::epoch::Epoch;
use crate::host::{HostId, HostInfo, HostView};
use crate::installed::{DIFFERENCES_MAX, Digest, Entry, RuleDifference};
use crate::manager::repair::CONFIRM_MAX;
use crate::message::{OwnedEndpoint, ToAgent, ToManager, VERSION};
use crate::network::Endpoint;
use crate::request::{
    ClusterInfo, ControlStatus, EndpointState, Event, Inspection, Request, RequestError, Response,
};
use stream::Stream;

/// How long a request may take, from the asking to the answer.
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// A manager that says nothing for this long is taken for dead: a little under the 3 s in which a healed host must be seen.
pub const SILENCE: Duration = Duration::from_millis(2500);
/// Table entries in one message, below 100 bytes each.
const ENTRIES_PER_MESSAGE: usize = 4096;

/// What the driver must pass on.
#[derive(Debug)]
pub enum Output {
    /// News for the program.
    Event(Event),
    /// The end of a request.
    Answer {
        /// The request's id.
        id: u64,
        /// Its answer.
        result: Result<Response, RequestError>,
    },
}

/// The state machine.
#[derive(Debug)]
pub struct Agent {
    host: HostInfo,
    cluster: String,
    managers: Vec<SocketAddr>,
    link: Link,
    /// When the link last came or went.
    link_changed: Option<Duration>,
    last_error: Option<String>,
    /// Since when every attempt has failed; `None`: none has yet, or a manager answers.
    failing_since: Option<Duration>,
    /// What the last manager that answered said no with.
    rejected: Option<String>,
    left: bool,
    streams: BTreeMap<Vni, Stream>,
    hosts: BTreeMap<HostId, HostView>,
    /// This host's endpoints, as the program published them.
    endpoints: BTreeMap<(Vni, Epoch), (Endpoint, EndpointState)>,
    /// The last edit of each of this host's allocations, as far as known.
    owner_seqs: HashMap<(Vni, Epoch), u32>,
    last_epoch: Epoch,
    /// The network of published ports; `None`: not known.
    ingress: Option<Option<Vni>>,
    /// The host of the last manager that took this one in.
    last_manager: Option<HostId>,
    calls: BTreeMap<u64, Call>,
    /// Allocations that were given up and whose answer may still come, on this connection.
    given_up: BTreeSet<u64>,
    messages: VecDeque<ToManager>,
    outputs: VecDeque<Output>,
}

#[derive(Debug)]
enum Link {
    Down,
    /// The hello is sent.
    Greeting {
        manager: SocketAddr,
        heard: Duration,
    },
    Up {
        manager: SocketAddr,
        heard: Duration,
        heartbeat: Duration,
        heartbeat_due: Duration,
        owned: Option<PartialOwned>,
    },
}

/// What the manager holds for this host, until the last part is here.
#[derive(Debug, Default)]
struct PartialOwned {
    endpoints: Vec<OwnedEndpoint>,
    names: Vec<String>,
}

#[derive(Debug)]
struct Call {
    request: Request,
    asked: Duration,
    sent: bool,
    reply: BytesMut,
}

impl Agent {
    /// An agent that knows nothing yet but its cluster's name.
    #[must_use]
    pub fn new(host: HostInfo, cluster: String, managers: Vec<SocketAddr>) -> Self {
        Self {
            host,
            cluster,
            managers,
            link: Link::Down,
            link_changed: None,
            last_error: None,
            failing_since: None,
            rejected: None,
            left: false,
            streams: BTreeMap::new(),
            hosts: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            owner_seqs: HashMap::new(),
            last_epoch: Epoch::ZERO,
            ingress: None,
            last_manager: None,
            calls: BTreeMap::new(),
            given_up: BTreeSet::new(),
            messages: VecDeque::new(),
            outputs: VecDeque::new(),
        }
    }

    /// A connection to a manager stands.
    pub fn handle_connected(&mut self, manager: SocketAddr, now: Duration) {
        self.messages.clear();
        for stream in self.streams.values_mut() {
            stream.connected();
        }
        self.link = Link::Greeting {
            manager,
            heard: now,
        };
        self.messages.push_back(ToManager::Hello {
            version: VERSION,
            host: self.host.clone(),
            last_epoch: self.last_epoch,
        });
    }

    /// The connection ended, or could not be made.
    pub fn handle_disconnected(&mut self, reason: &str, now: Duration) {
        self.messages.clear();
        self.given_up.clear();
        self.last_error = Some(reason.to_owned());
        self.failing_since.get_or_insert(now);
        let was_up = matches!(self.link, Link::Up { .. });
        self.link = Link::Down;
        for stream in self.streams.values_mut() {
            stream.disconnected();
        }
        if was_up {
            self.link_changed = Some(now);
            self.outputs.push_back(Output::Event(Event::Disconnected {
                reason: reason.to_owned(),
            }));
            let sent: Vec<u64> = self
                .calls
                .iter()
                .filter(|(_, call)| call.sent)
                .map(|(id, _)| *id)
                .collect();
            for id in sent {
                let error = self.not_connected("the connection was lost before the answer", now);
                self.answer(id, Err(error));
            }
        }
    }

    /// A message came.
    pub fn handle_message(&mut self, message: ToAgent, now: Duration) {
        match &mut self.link {
            Link::Down => return,
            Link::Greeting { heard, .. } | Link::Up { heard, .. } => *heard = now,
        }
        match (message, &self.link) {
            (
                ToAgent::Welcome {
                    cluster,
                    manager,
                    heartbeat,
                    last_epoch,
                    ingress,
                    warnings,
                },
                &Link::Greeting {
                    manager: address, ..
                },
            ) => {
                if cluster != self.cluster {
                    self.close(
                        format!("the manager at {address} belongs to cluster {cluster}"),
                        now,
                    );
                    return;
                }
                let cluster = ClusterInfo {
                    cluster,
                    manager,
                    address,
                    ingress,
                    warnings,
                };
                self.last_epoch = self.last_epoch.max(last_epoch);
                self.last_manager = Some(manager);
                self.welcome(cluster, heartbeat, now);
                self.learn_ingress(ingress);
            }
            (ToAgent::Reject { reason, removed }, _) => {
                self.rejected = Some(reason.clone());
                self.close(reason, now);
                if removed {
                    self.removed();
                }
            }
            // Nothing else has a meaning before the welcome.
            (_, Link::Greeting { .. } | Link::Down) => {}
            (
                ToAgent::Owned {
                    endpoints,
                    names,
                    last,
                },
                _,
            ) => self.owned(endpoints, names, last),
            (ToAgent::NetworkRemoved { vni }, _) => self.network_removed(vni),
            (ToAgent::Misdelivered { vni, mac }, _) => {
                if let Some(stream) = self.streams.get_mut(&vni) {
                    stream.restate(mac, &mut self.outputs);
                    let holding = stream.table().holders(mac).map(|row| row.ip);
                    let ips = holding.take(CONFIRM_MAX).collect();
                    self.messages
                        .push_back(ToManager::Confirm { vni, mac, ips });
                }
            }
            (ToAgent::Inspect { id, vni, digest }, _) => {
                let inspection = Inspection { id, vni, digest };
                self.outputs
                    .push_back(Output::Event(Event::Inspect(inspection)));
            }
            (ToAgent::Reply { id, part, last }, _) => self.reply(id, &part, last),
            (message, _) => {
                let stream_of = match &message {
                    ToAgent::Rows(rows) => Some(rows.vni),
                    ToAgent::Services { vni, .. } => Some(*vni),
                    _ => None,
                };
                self.learn(message, now);
                if let Some(stream) = stream_of.and_then(|vni| self.streams.get_mut(&vni)) {
                    stream.tell_caught_up(&mut self.outputs);
                    self.messages.extend(stream.poll_resync(now));
                }
            }
        }
    }

    /// What tables are made of, from a manager or from an earlier life of this agent.
    fn learn(&mut self, message: ToAgent, now: Duration) {
        match message {
            ToAgent::Hosts {
                full,
                hosts,
                removed,
            } => self.update_hosts(full, hosts, &removed),
            ToAgent::Network(network) => {
                self.last_epoch = self.last_epoch.max(network.epoch);
                if let Some(stream) = self.streams.get_mut(&network.vni) {
                    stream.handle_network(network, &mut self.outputs);
                }
            }
            ToAgent::Ingress(ingress) => self.learn_ingress(ingress),
            ToAgent::Services {
                vni,
                full,
                services,
                removed,
                last,
            } => {
                self.learn_services(vni, full, services, &removed, last);
            }
            ToAgent::Rows(rows) => {
                self.watch_own(&rows.rows, rows.vni);
                if let Some(stream) = self.streams.get_mut(&rows.vni) {
                    stream.handle_rows(rows, now, &mut self.outputs);
                }
            }
            ToAgent::RowLost { vni, epoch } => self.lose(vni, epoch),
            ToAgent::Corrections { vni, rows } => {
                self.watch_own(&rows, vni);
                if let Some(stream) = self.streams.get_mut(&vni) {
                    stream.correct(rows, &mut self.outputs);
                }
            }
            ToAgent::Lease { vni, block } => self.lease(vni, block),
            // Of one connection, and without a meaning beside it.
            ToAgent::Joined { .. }
            | ToAgent::Peer { .. }
            | ToAgent::Welcome { .. }
            | ToAgent::Reject { .. }
            | ToAgent::Heartbeat
            | ToAgent::Owned { .. }
            | ToAgent::NetworkRemoved { .. }
            | ToAgent::Misdelivered { .. }
            | ToAgent::Inspect { .. }
            | ToAgent::Reply { .. } => {}
        }
    }

    /// Time has passed. To be called ten times a second or more often.
    pub fn handle_timeout(&mut self, now: Duration) {
        match &mut self.link {
            Link::Up { heard, .. } | Link::Greeting { heard, .. }
                if now.saturating_sub(*heard) >= SILENCE =>
            {
                self.close("the manager fell silent".to_owned(), now);
            }
            Link::Up {
                heartbeat,
                heartbeat_due,
                ..
            } if now >= *heartbeat_due => {
                *heartbeat_due = now + *heartbeat;
                self.messages.push_back(ToManager::Heartbeat);
                for stream in self.streams.values_mut() {
                    self.messages.extend(stream.poll_resync(now));
                }
            }
            Link::Up { .. } | Link::Greeting { .. } | Link::Down => {}
        }
        self.expire_calls(now);
    }

    /// Keep the table of this network from now on.
    pub fn subscribe(&mut self, vni: Vni) {
        if !self.streams.contains_key(&vni) {
            let masked = self
                .hosts
                .values()
                .filter(|view| !view.up)
                .map(|view| view.info.id);
            let stream = Stream::new(vni, masked);
            if matches!(self.link, Link::Up { .. }) {
                self.messages.push_back(stream.subscribe());
            }
            // Else all blocks are told of once the manager's list is here.
            if matches!(self.link, Link::Up { owned: None, .. }) {
                self.messages.push_back(stream.held());
            }
            self.streams.insert(vni, stream);
        }
    }

    /// Forget this network's table, without an event.
    pub fn unsubscribe(&mut self, vni: Vni) {
        if self.streams.remove(&vni).is_some() && matches!(self.link, Link::Up { .. }) {
            self.messages.push_back(ToManager::Unsubscribe { vni });
        }
    }

    /// A frame came here from the VTEP `from` for a MAC address that is not here.
    pub fn misdelivered(&mut self, vni: Vni, mac: MacAddr, from: IpAddr) {
        if matches!(self.link, Link::Up { .. }) {
            self.messages
                .push_back(ToManager::Misdelivered { vni, mac, from });
        }
    }

    /// Tells the manager what this host's datapath holds of a network, and what rules for services stand otherwise than its table says.
    pub fn report(
        &mut self,
        inspection: Inspection,
        installed: &BTreeSet<Entry>,
        mut rules: Vec<RuleDifference>,
    ) {
        rules.truncate(DIFFERENCES_MAX);
        if !matches!(self.link, Link::Up { .. }) {
            return;
        }
        let Inspection { id, vni, digest } = inspection;
        let mut part = |same, entries, last| ToManager::Installed {
            id,
            vni,
            same,
            entries,
            rules: std::mem::take(&mut rules),
            last,
        };
        if installed.iter().collect::<Digest>() == digest {
            let same = part(true, Vec::new(), true);
            self.messages.push_back(same);
            return;
        }
        let entries: Vec<Entry> = installed.iter().copied().collect();
        for entries in entries.chunks(ENTRIES_PER_MESSAGE) {
            let some = part(false, entries.to_vec(), false);
            self.messages.push_back(some);
        }
        let last = part(false, Vec::new(), true);
        self.messages.push_back(last);
    }

    /// This host receives VXLAN on another UDP port from now on: every later hello says so.
    pub fn set_port(&mut self, port: u16) {
        self.host.port = port;
    }

    /// The next message to send.
    pub fn poll_message(&mut self) -> Option<ToManager> {
        self.messages.pop_front()
    }

    /// The next thing to pass on.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Whether the driver must end the connection that it holds.
    #[must_use]
    pub fn wants_close(&self) -> bool {
        matches!(self.link, Link::Down)
    }

    /// Whether a manager has taken this host in and still answers.
    #[must_use]
    pub fn is_up(&self) -> bool {
        matches!(self.link, Link::Up { .. })
    }

    /// Whether this host has left the cluster or was removed from it: no connection is to be made again.
    #[must_use]
    pub fn has_left(&self) -> bool {
        self.left
    }

    /// Why the last attempt or connection failed.
    #[must_use]
    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// The manager's own words, where the last one that answered did not take this host in.
    #[must_use]
    pub fn rejected(&self) -> Option<&str> {
        self.rejected.as_deref()
    }

    /// The highest epoch ever seen.
    #[must_use]
    pub fn last_epoch(&self) -> Epoch {
        self.last_epoch
    }

    /// The managers to try, in order.
    #[must_use]
    pub fn managers(&self) -> &[SocketAddr] {
        &self.managers
    }

    /// The table of a subscribed network.
    #[must_use]
    pub fn table(&self, vni: Vni) -> Option<&crate::table::Table> {
        self.streams.get(&vni).map(Stream::table)
    }

    /// For `towline status`.
    #[must_use]
    pub fn status(&self, now: Duration) -> ControlStatus {
        ControlStatus {
            connected_to: match self.link {
                Link::Up { manager, .. } => Some(manager),
                Link::Down | Link::Greeting { .. } => None,
            },
            since_ms: self.link_changed.map(|at| millis(now.saturating_sub(at))),
            managers: self.managers.clone(),
            last_error: self.last_error.clone(),
            subscriptions: self
                .streams
                .values()
                .map(|stream| stream.status(now))
                .collect(),
            masked: self
                .hosts
                .values()
                .filter(|view| !view.up)
                .map(|view| view.info.name.clone())
                .collect(),
        }
    }

    fn welcome(&mut self, cluster: ClusterInfo, heartbeat: Duration, now: Duration) {
        // A heartbeat of zero would be a loop of nothing else.
        let heartbeat = heartbeat.clamp(Duration::from_millis(50), SILENCE / 2);
        self.link = Link::Up {
            manager: cluster.address,
            heard: now,
            heartbeat,
            heartbeat_due: now + heartbeat,
            owned: Some(PartialOwned::default()),
        };
        self.link_changed = Some(now);
        self.last_error = None;
        self.failing_since = None;
        self.rejected = None;
        self.outputs.push_back(Output::Event(Event::Connected {
            manager: cluster.address,
            cluster,
        }));
        self.messages
            .extend(self.streams.values().map(Stream::subscribe));
        for (id, call) in &mut self.calls {
            call.sent = true;
            self.messages.push_back(ToManager::Call {
                id: *id,
                request: call.request.clone(),
            });
        }
    }

    fn close(&mut self, reason: String, now: Duration) {
        self.handle_disconnected(&reason, now);
    }

    fn network_removed(&mut self, vni: Vni) {
        let own: Vec<Epoch> = self
            .endpoints
            .range((vni, Epoch::ZERO)..=(vni, Epoch::from_bits(u64::MAX)))
            .map(|((_, e), _)| *e)
            .collect();
        for epoch in own {
            self.lose(vni, epoch);
        }
        if self.streams.remove(&vni).is_some() {
            self.outputs
                .push_back(Output::Event(Event::NetworkRemoved(vni)));
        }
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
