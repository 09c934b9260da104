//! The agent's side of the control plane, without a socket and without a clock.
//!
//! Whoever drives it hands in messages, connections and the time ([`Agent::handle_message`], [`Agent::handle_timeout`] …) and
//! takes out what is to be sent ([`Agent::poll_message`]) and told ([`Agent::poll_output`]). `now` is the time since any fixed
//! moment. Without a manager everything known stays in force, for ever. After a reconnection each stream resumes after the last
//! change it has, and every endpoint that this host runs is published again where the manager's view of it differs.

mod block;
mod restore;
mod stream;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::BytesMut;
use vtep::{MacAddr, Vni};

use crate::epoch::Epoch;
use crate::host::{HostId, HostInfo, HostView};
use crate::installed::{Digest, Entry};
use crate::manager::repair::CONFIRM_MAX;
use crate::message::{OwnedEndpoint, ToAgent, ToManager, VERSION};
use crate::network::Endpoint;
use crate::request::{
    ClusterInfo, ControlStatus, EndpointState, Event, Inspection, Owned, Request, RequestError,
    Response,
};
use crate::row::Row;
use stream::Stream;

/// How long a request may take, from the asking to the answer.
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// How long a request waits for a manager before it fails.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// A manager that says nothing for this long is taken for dead: a little under the 3 s in which a healed host must be seen.
pub const SILENCE: Duration = Duration::from_millis(2500);
/// Table entries in one message, below 100 bytes each.
const ENTRIES_PER_MESSAGE: usize = 4096;
/// The longest answer put together from its parts.
const REPLY_MAX: usize = 64 << 20;

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
                    warnings,
                };
                self.last_epoch = self.last_epoch.max(last_epoch);
                self.last_manager = Some(manager);
                self.welcome(cluster, heartbeat, now);
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
                let rows_of = match &message {
                    ToAgent::Rows(rows) => Some(rows.vni),
                    _ => None,
                };
                self.learn(message, now);
                let stream = rows_of.and_then(|vni| self.streams.get_mut(&vni));
                self.messages
                    .extend(stream.and_then(|stream| stream.poll_resync(now)));
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

    /// This host's endpoint is up or down. Remembered, and published again on every connection where the manager differs,
    /// until the endpoint is freed or lost.
    pub fn publish(&mut self, endpoint: Endpoint, state: EndpointState) {
        let key = (endpoint.vni, endpoint.epoch);
        self.last_epoch = self.last_epoch.max(endpoint.epoch);
        if !self.is_up() {
            self.announce_own(&endpoint, state == EndpointState::Up);
        }
        self.endpoints.insert(key, (endpoint, state));
        // Before the manager's list is here, the edit's number is not known; that list's arrival publishes everything.
        if matches!(self.link, Link::Up { owned: None, .. }) {
            self.send_publish(key);
        }
    }

    /// A frame came here from the VTEP `from` for a MAC address that is not here.
    pub fn misdelivered(&mut self, vni: Vni, mac: MacAddr, from: IpAddr) {
        if matches!(self.link, Link::Up { .. }) {
            self.messages
                .push_back(ToManager::Misdelivered { vni, mac, from });
        }
    }

    /// Tells the manager what this host's datapath holds of a network.
    pub fn report(&mut self, inspection: Inspection, installed: &BTreeSet<Entry>) {
        if !matches!(self.link, Link::Up { .. }) {
            return;
        }
        let Inspection { id, vni, digest } = inspection;
        let part = |same, entries, last| ToManager::Installed {
            id,
            vni,
            same,
            entries,
            last,
        };
        if installed.iter().collect::<Digest>() == digest {
            self.messages.push_back(part(true, Vec::new(), true));
            return;
        }
        let entries: Vec<Entry> = installed.iter().copied().collect();
        let chunks = entries.chunks(ENTRIES_PER_MESSAGE);
        self.messages
            .extend(chunks.map(|entries| part(false, entries.to_vec(), false)));
        self.messages.push_back(part(false, Vec::new(), true));
    }

    /// This host receives VXLAN on another UDP port from now on: every later hello says so.
    pub fn set_port(&mut self, port: u16) {
        self.host.port = port;
    }

    /// Ask the manager. The answer comes as [`Output::Answer`] with this id.
    pub fn call(&mut self, id: u64, request: Request, now: Duration) {
        if let Request::Free { vni, epoch } = request {
            // Freed by its owner: not to be published again, and no loss when the news comes round.
            let freed = self.endpoints.remove(&(vni, epoch));
            self.owner_seqs.remove(&(vni, epoch));
            if let Some((endpoint, _)) = freed.filter(|_| !self.is_up()) {
                self.announce_own(&endpoint, false);
            }
        }
        let sent = matches!(self.link, Link::Up { .. });
        if sent {
            self.messages.push_back(ToManager::Call {
                id,
                request: request.clone(),
            });
        }
        self.calls.insert(
            id,
            Call {
                request,
                asked: now,
                sent,
                reply: BytesMut::new(),
            },
        );
        // Nobody has answered for as long as anybody would wait now.
        if !sent
            && self
                .failing_since
                .is_some_and(|at| now.saturating_sub(at) >= CONNECT_PATIENCE)
        {
            let cause = self.last_error.as_deref().unwrap_or("no connection");
            let error = self.not_connected(cause, now);
            self.answer(id, Err(error));
        }
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

    /// The error of a request that finds no manager.
    #[must_use]
    pub fn not_connected(&self, cause: &str, now: Duration) -> RequestError {
        let managers: Vec<String> = self.managers.iter().map(ToString::to_string).collect();
        RequestError::NotConnected {
            managers: managers.join(", "),
            cause: cause.to_owned(),
            age_ms: self.link_changed.map(|at| millis(now.saturating_sub(at))),
        }
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

    fn update_hosts(&mut self, full: bool, hosts: Vec<HostView>, removed: &[HostId]) {
        let before = if full {
            std::mem::take(&mut self.hosts)
        } else {
            BTreeMap::new()
        };
        // Of most hosts nothing has changed that a table shows.
        let mut masks: BTreeMap<HostId, bool> = before
            .iter()
            .filter(|(_, view)| !view.up)
            .map(|(id, _)| (*id, false))
            .collect();
        for view in hosts {
            let (id, up) = (view.info.id, view.up);
            let known = self.hosts.insert(id, view);
            let was_up = known
                .as_ref()
                .or(before.get(&id))
                .is_none_or(|view| view.up);
            if up != was_up {
                masks.insert(id, !up);
            } else {
                masks.remove(&id);
            }
        }
        for id in removed {
            self.hosts.remove(id);
            masks.insert(*id, false);
        }
        self.learn_managers();
        self.outputs.push_back(Output::Event(Event::Hosts(
            self.hosts.values().cloned().collect(),
        )));
        for (id, masked) in masks {
            for stream in self.streams.values_mut() {
                stream.set_masked(id, masked, &mut self.outputs);
            }
        }
    }

    /// Managers are hosts: the one that answers first, then those that stand by for it.
    fn learn_managers(&mut self) {
        let listening = |manager: bool| {
            let hosts = self
                .hosts
                .values()
                .filter(move |view| view.manager == manager);
            hosts.filter_map(|view| view.control)
        };
        let managers: Vec<SocketAddr> = listening(true).chain(listening(false)).collect();
        if !managers.is_empty() {
            self.managers = managers;
        }
    }

    fn owned(&mut self, endpoints: Vec<OwnedEndpoint>, names: Vec<String>, last: bool) {
        let Link::Up {
            owned: partial @ Some(_),
            ..
        } = &mut self.link
        else {
            return;
        };
        let whole = partial.get_or_insert_default();
        whole.endpoints.extend(endpoints);
        whole.names.extend(names);
        if !last {
            return;
        }
        let PartialOwned { endpoints, names } = std::mem::take(whole);
        *partial = None;
        // As this host last said it: the state, and by the last of this host's edits that anybody may have heard of.
        let mut current: BTreeSet<(Vni, Epoch)> = BTreeSet::new();
        for owned in &endpoints {
            let key = (owned.endpoint.vni, owned.endpoint.epoch);
            let seq = self.owner_seqs.entry(key).or_default();
            let said = self.endpoints.get(&key).map(|(_, state)| *state);
            if said == Some(owned.state) && *seq <= owned.owner_seq {
                current.insert(key);
            }
            *seq = (*seq).max(owned.owner_seq);
        }
        let all = self.endpoints.keys().copied();
        let differing: Vec<(Vni, Epoch)> = all.filter(|key| !current.contains(key)).collect();
        for key in differing {
            self.send_publish(key);
        }
        self.tell_blocks();
        let endpoints = endpoints.into_iter().map(|owned| owned.endpoint).collect();
        self.outputs
            .push_back(Output::Event(Event::Owned(Owned { endpoints, names })));
    }

    fn send_publish(&mut self, key: (Vni, Epoch)) {
        if let Some((endpoint, state)) = self.endpoints.get(&key) {
            let seq = self.owner_seqs.entry(key).or_default();
            *seq = seq.saturating_add(1);
            self.messages.push_back(ToManager::Publish {
                endpoint: endpoint.clone(),
                owner_seq: *seq,
                state: *state,
            });
        }
    }

    /// Learns from rows that pass by: the highest epoch, the numbers of this host's edits, and what it has lost.
    fn watch_own(&mut self, rows: &[Row], vni: Vni) {
        let mut lost = Vec::new();
        for row in rows {
            self.last_epoch = self.last_epoch.max(row.epoch);
            let key = (vni, row.epoch);
            if row.owner == self.host.id && self.endpoints.contains_key(&key) {
                let seq = self.owner_seqs.entry(key).or_default();
                *seq = (*seq).max(row.owner_seq);
            }
            let older = self
                .endpoints
                .range((vni, Epoch::ZERO)..key)
                .filter(|(_, (e, _))| e.ips.contains(&row.ip));
            lost.extend(older.map(|((_, epoch), _)| *epoch));
        }
        for epoch in lost {
            self.lose(vni, epoch);
        }
    }

    fn lose(&mut self, vni: Vni, epoch: Epoch) {
        self.owner_seqs.remove(&(vni, epoch));
        if let Some((endpoint, _)) = self.endpoints.remove(&(vni, epoch)) {
            // What was announced without a manager, no table takes back.
            self.announce_own(&endpoint, false);
            self.outputs
                .push_back(Output::Event(Event::RowLost { vni, epoch }));
        }
    }

    /// An operator removed this host: what it held is others' now, and it is not to come back.
    fn removed(&mut self) {
        self.left = true;
        let own: Vec<(Vni, Epoch)> = self.endpoints.keys().copied().collect();
        for (vni, epoch) in own {
            self.lose(vni, epoch);
        }
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

    fn reply(&mut self, id: u64, part: &[u8], last: bool) {
        let Some(call) = self.calls.get_mut(&id) else {
            self.late_reply(id, part);
            return;
        };
        if call.reply.len() + part.len() > REPLY_MAX {
            self.answer(
                id,
                Err(RequestError::Refused(
                    "the manager's answer is longer than 64 MiB".to_owned(),
                )),
            );
            return;
        }
        call.reply.extend_from_slice(part);
        if !last {
            return;
        }
        let result = match serde_json::from_slice::<Result<Response, String>>(&call.reply) {
            Ok(answer) => answer.map_err(RequestError::Refused),
            Err(error) => Err(RequestError::Refused(format!(
                "the manager's answer is not understood: {error}"
            ))),
        };
        if let (Request::Leave, Ok(_)) = (&call.request, &result) {
            self.left = true;
        }
        self.answer(id, result);
    }

    /// The answer to an allocation that nobody waits for any more: it is given back, or it would be held until the next
    /// connection. Not where the same is asked again and the manager answers with the same.
    fn late_reply(&mut self, id: u64, part: &[u8]) {
        if !self.given_up.remove(&id) {
            return;
        }
        let Ok(Ok(Response::Endpoint(endpoint))) =
            serde_json::from_slice::<Result<Response, String>>(part)
        else {
            return;
        };
        let asked_again = self.calls.values().any(|call| {
            matches!(&call.request, Request::Allocate { container, .. } if *container == endpoint.container)
        });
        let (vni, epoch) = (endpoint.vni, endpoint.epoch);
        if !asked_again && !self.endpoints.contains_key(&(vni, epoch)) {
            let request = Request::Free { vni, epoch };
            self.messages.push_back(ToManager::Call { id, request });
        }
    }

    fn answer(&mut self, id: u64, result: Result<Response, RequestError>) {
        if self.calls.remove(&id).is_some() {
            self.outputs.push_back(Output::Answer { id, result });
        }
    }

    fn expire_calls(&mut self, now: Duration) {
        let expired = self.calls.iter().filter(|(_, call)| {
            let patience = if call.sent {
                REQUEST_DEADLINE
            } else {
                CONNECT_PATIENCE
            };
            now.saturating_sub(call.asked) >= patience
        });
        let expired: Vec<u64> = expired.map(|(id, _)| *id).collect();
        for id in expired {
            let given_up = &self.calls[&id];
            if given_up.sent && matches!(given_up.request, Request::Allocate { .. }) {
                self.given_up.insert(id);
            }
            let error = match self.link {
                Link::Up { manager, .. } => RequestError::Timeout {
                    manager,
                    seconds: REQUEST_DEADLINE.as_secs(),
                },
                Link::Down | Link::Greeting { .. } => self.not_connected(
                    self.last_error.as_deref().unwrap_or("no connection yet"),
                    now,
                ),
            };
            self.answer(id, Err(error));
        }
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
