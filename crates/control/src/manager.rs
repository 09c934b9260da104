//! The manager, without a socket and without a clock: allocates, keeps the tables, and sends them to who asked for them.
//!
//! One turn: hand in what came ([`Manager::handle_hello`], [`Manager::handle_message`] …), then [`Manager::finish_turn`], make
//! what [`Manager::take_writes`] gives durable, and only then send what [`Manager::poll_output`] gives: nothing is told that a
//! crash could take back. `now` is the time since any fixed moment.
//!
//! Whoever calls has checked that the authority signed the certificate and that the host holds its key. Liveness is a mask: a
//! host that falls silent is hidden from floods and loses nothing.

mod addresses;
mod calls;
mod catch_up;
mod endpoints;
mod hosts;
mod ingress;
mod journal;
mod leases;
mod limits;
mod members;
mod networks;
mod port;
mod ports;
pub(crate) mod repair;
mod services;
mod standby;
mod state;
mod streams;
mod subnets;
#[cfg(test)]
mod testing;
mod traits;
mod trust;
mod verify;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use vtep::Vni;

use crate::agent::SILENCE;
use crate::events::Action;
use crate::host::HostId;
use crate::message::{ToAgent, ToManager};
use crate::pki::{Certificate, Role};
use crate::request::Request;
use crate::service::Service;
use crate::store::Write;
use crate::subnet::AddressPool;
use calls::HeldCall;
use journal::Journal;
use limits::Budget;
use members::Confirmation;
pub(crate) use standby::Rank;
use state::State;
pub use state::StateError;
pub use trust::{Lasts, Refusal};
use verify::Verifications;

/// How often agents send heartbeats: five in the silence that masks a host.
pub const HEARTBEAT: Duration = Duration::from_millis(500);
/// After its own start, and after it finds that its store is old, a manager gives hosts this long to come back.
pub const GRACE: Duration = Duration::from_secs(10);
/// A connection that says nothing for this long is closed.
const IDLE: Duration = Duration::from_secs(10);
/// Hosts or names in one message, below 500 bytes each.
const ITEMS_PER_MESSAGE: usize = 1024;
/// Endpoints in one message, below 2,000 bytes each.
const ENDPOINTS_PER_MESSAGE: usize = 256;
/// Networks that one host may follow.
const SUBSCRIPTIONS_MAX: usize = 4096;

/// Names one connection; never used twice by one server.
pub type Connection = u64;

/// What the driver must do.
#[derive(Debug)]
pub enum Output {
    /// Send this to each of these.
    Send {
        /// To whom.
        to: Vec<Connection>,
        /// What.
        message: ToAgent,
    },
    /// Close a connection, after what was sent to it before.
    Close(Connection),
    /// Sign a host's key, then answer the call with the certificate.
    Sign {
        /// Who asked.
        connection: Connection,
        /// The call's id.
        call: u64,
        /// Whose certificate.
        host: HostId,
        /// For what.
        role: Role,
        /// The key (PKCS #10, DER).
        request: Vec<u8>,
    },
    /// Answer the call with the authority, certificate and key: the asker may run the manager.
    Authority {
        /// Who asked.
        connection: Connection,
        /// The call's id.
        call: u64,
    },
    /// Expect or send probes, then answer the call.
    Probe {
        /// Who asked.
        connection: Connection,
        /// The call's id.
        call: u64,
        /// [`Request::ProbeExpect`] or [`Request::ProbeReply`].
        request: Request,
    },
}

/// What a manager is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The host that runs it.
    pub host: HostId,
    /// The cluster's name.
    pub cluster: String,
    /// Random: network ids and the first epoch follow from it.
    pub seed: u64,
    /// The time since 1970-01-01 UTC when `now` was zero.
    pub unix_at_zero: Duration,
    /// Where subnets come from that nobody asks for by number; empty: [`AddressPool::standard`].
    pub pools: Vec<AddressPool>,
}

/// The state machine.
#[derive(Debug)]
pub struct Manager {
    settings: Settings,
    started: Duration,
    state: State,
    /// Where this manager listens, once the driver has told.
    listen: Option<SocketAddr>,
    /// The time of day, as the driver last told it.
    unix: Duration,
    /// Certificates of connections that have not said hello yet.
    admitted: HashMap<Connection, Certificate>,
    // In an order, so that the same inputs have the same outputs: here, and in `by_host`.
    connections: BTreeMap<Connection, Peer>,
    by_host: BTreeMap<HostId, Connection>,
    liveness: BTreeMap<HostId, Liveness>,
    /// Until then the store is known to be older than what agents have seen.
    unsettled_until: Option<Duration>,
    /// Hosts that have told of epochs which the store had lost.
    told_of_loss: BTreeSet<HostId>,
    /// How many changes of the whole cluster each host may still ask for.
    changes: HashMap<HostId, Budget>,
    /// Hosts that the store knew at the start: a majority of them must be back before anything is handed out, because one
    /// of them may know that the store is old.
    known_at_start: usize,
    held: VecDeque<HeldCall>,
    verifications: Verifications,
    confirmations: Vec<Confirmation>,
    journal: Journal,
    /// When blocks last grew.
    grown: Duration,
    /// What was just refused waits for hosts to give addresses back.
    recalled: bool,
    /// Hosts that came, changed or went in this turn.
    changed_hosts: BTreeSet<HostId>,
    /// Connections that were welcomed in this turn.
    newcomers: BTreeSet<Connection>,
    outputs: VecDeque<Output>,
}

#[derive(Debug)]
struct Peer {
    host: HostId,
    role: Role,
    heard: Duration,
    subscriptions: BTreeSet<Vni>,
    repairs: Budget,
    /// How far this host acts on the news of networks with services.
    applied: HashMap<Vni, (u16, u64)>,
    /// Networks of whose blocks this connection has told.
    blocks_told: BTreeSet<Vni>,
}

#[derive(Debug)]
struct Liveness {
    seen: Duration,
    up: bool,
    /// Why it does not receive VXLAN where it should.
    port_problem: Option<String>,
}

impl Manager {
    /// The manager of what a store holds.
    pub fn new(
        settings: Settings,
        stored: &BTreeMap<String, String>,
        now: Duration,
    ) -> Result<Self, StateError> {
        let mut settings = settings;
        if settings.pools.is_empty() {
            settings.pools.push(AddressPool::standard());
        }
        let journal = Journal::new(settings.seed);
        let state = State::load(
            &settings.cluster,
            stored,
            now,
            settings.unix_at_zero + now,
            settings.seed,
        )?;
        let known_at_start = state.hosts.len();
        let liveness = state
            .hosts
            .keys()
            .map(|id| {
                (
                    *id,
                    Liveness {
                        seen: now,
                        up: true,
                        port_problem: None,
                    },
                )
            })
            .collect();
        Ok(Self {
            listen: None,
            unix: settings.unix_at_zero + now,
            admitted: HashMap::new(),
            settings,
            started: now,
            state,
            connections: BTreeMap::new(),
            by_host: BTreeMap::new(),
            liveness,
            unsettled_until: None,
            told_of_loss: BTreeSet::new(),
            changes: HashMap::new(),
            known_at_start,
            held: VecDeque::new(),
            verifications: Verifications::default(),
            confirmations: Vec::new(),
            journal,
            grown: now,
            recalled: false,
            changed_hosts: BTreeSet::new(),
            newcomers: BTreeSet::new(),
            outputs: VecDeque::new(),
        })
    }

    /// A message of a host that was welcomed. Others are ignored: their connection is being closed.
    pub fn handle_message(&mut self, connection: Connection, message: ToManager, now: Duration) {
        let Some(peer) = self.connections.get_mut(&connection) else {
            return;
        };
        peer.heard = now;
        let host = peer.host;
        self.seen(host, now);
        match message {
            ToManager::Hello { .. } | ToManager::Join { .. } | ToManager::Peer { .. } => {
                let reason = "a second hello on one connection".to_owned();
                let removed = false;
                self.send(connection, ToAgent::Reject { reason, removed });
                self.drop_connection(connection);
            }
            ToManager::Heartbeat => self.send(connection, ToAgent::Heartbeat),
            ToManager::Subscribe {
                vni,
                generation,
                revision,
                network,
            } => {
                self.subscribe(connection, vni, (generation, revision), network);
            }
            ToManager::Unsubscribe { vni } => {
                let Some(peer) = self.connections.get_mut(&connection) else {
                    return;
                };
                peer.subscriptions.remove(&vni);
                peer.applied.remove(&vni);
                if peer.blocks_told.contains(&vni) {
                    self.give_up_lease(vni, host);
                } else {
                    self.end_lease(vni, host, now);
                }
            }
            ToManager::Lease { vni, held } => self.lease(connection, host, vni, &held, now),
            ToManager::Offer { vni, services } => self.offered(connection, vni, services, now),
            ToManager::Applied {
                vni,
                generation,
                revision,
            } => self.applied(connection, vni, (generation, revision)),
            ToManager::Publish {
                endpoint,
                owner_seq,
                state,
            } => {
                self.publish(connection, host, endpoint, owner_seq, state, now);
            }
            ToManager::Misdelivered { vni, mac, from } => {
                self.misdelivered(connection, vni, mac, from, now);
            }
            ToManager::Confirm { vni, mac, ips } => self.confirm(connection, vni, mac, &ips, now),
            ToManager::Installed {
                id,
                vni,
                same,
                entries,
                rules,
                last,
            } => {
                let answer = verify::InstalledPart {
                    same,
                    entries,
                    rules,
                    last,
                };
                self.installed(id, (vni, host), answer, now);
            }
            ToManager::Call { id, request } => {
                let call = HeldCall {
                    connection,
                    host,
                    id,
                    request,
                    asked: now,
                };
                self.call(call, now);
            }
        }
    }

    /// A connection ended.
    pub fn handle_disconnected(&mut self, connection: Connection) {
        self.admitted.remove(&connection);
        if let Some(peer) = self.connections.remove(&connection)
            && self.by_host.get(&peer.host) == Some(&connection)
        {
            self.by_host.remove(&peer.host);
        }
    }

    /// Time has passed. To be called ten times a second or so.
    pub fn handle_timeout(&mut self, now: Duration) {
        let idle = self
            .connections
            .iter()
            .filter(|(_, peer)| now.saturating_sub(peer.heard) >= IDLE);
        let idle: Vec<Connection> = idle.map(|(connection, _)| *connection).collect();
        for connection in idle {
            self.drop_connection(connection);
        }
        if now.saturating_sub(self.started) >= GRACE {
            let silent = self
                .liveness
                .iter_mut()
                .filter(|(_, l)| l.up && now.saturating_sub(l.seen) >= SILENCE);
            let masked: Vec<HostId> = silent
                .map(|(id, liveness)| {
                    liveness.up = false;
                    *id
                })
                .collect();
            for id in masked {
                tracing::warn!(host = %self.host_name(id), "fell silent; masked");
                self.changed_hosts.insert(id);
                self.note_host(Action::Down, id);
            }
        }
        if self.unsettled_until.is_some_and(|until| now >= until) {
            self.unsettled_until = None;
            // What was not told again by now does not exist.
            let all: Vec<Vni> = self.state.networks.keys().copied().collect();
            for vni in all {
                for connection in self.subscribers(vni) {
                    self.send_services(connection, vni);
                    self.send_rows(connection, vni, 0);
                }
            }
        }
        self.grow(now);
        self.release_held(now);
        self.advance_verifications(now);
        self.answer_confirmations(Some(now));
        self.tell_followers(Some(now));
    }

    /// Gathers this turn's changes: of hosts into one message, of rows into one for each network.
    pub fn finish_turn(&mut self, now: Duration) {
        self.tell_hosts(now);
        self.tell_services();
        for (vni, from) in self.state.take_dirty() {
            let to = self.subscribers(vni);
            for message in self.rows(vni, from) {
                self.outputs.push_back(Output::Send {
                    to: to.clone(),
                    message,
                });
            }
        }
        // After the turn's rows: what a host is asked about is what it has been told.
        self.send_inspections();
        self.answer_confirmations(None);
        self.tell_followers(None);
    }

    /// What must be durable before anything is sent.
    pub fn take_writes(&mut self) -> Vec<Write> {
        self.state.take_writes()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Connections that were welcomed and hosts that are known.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.connections.len(), self.state.hosts.len())
    }

    /// The table of a network.
    #[must_use]
    pub fn table(&self, vni: Vni) -> Option<&crate::table::Table> {
        self.state.networks.get(&vni).map(|state| &state.table)
    }

    /// The services that are told on a network.
    #[must_use]
    pub fn services_on(&self, vni: Vni) -> Vec<Service> {
        let ingress = self.state.ingress();
        let services = self.state.services.values();
        services
            .filter(|service| service.networks(ingress).any(|on| on == vni))
            .cloned()
            .collect()
    }

    fn drop_connection(&mut self, connection: Connection) {
        self.handle_disconnected(connection);
        self.outputs.push_back(Output::Close(connection));
    }

    fn send(&mut self, connection: Connection, message: ToAgent) {
        self.outputs.push_back(Output::Send {
            to: vec![connection],
            message,
        });
    }

    fn pools(&self) -> &[AddressPool] {
        &self.settings.pools
    }

    fn unix_seconds(&self, now: Duration) -> u64 {
        (self.settings.unix_at_zero + now).as_secs()
    }

    /// 25 characters of base 36, as Swarm's ids.
    fn random_id(&mut self) -> String {
        (0..25)
            .map(|_| {
                // SplitMix64: ids must differ, not be secret.
                self.settings.seed = self.settings.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = self.settings.seed;
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                let digit = (z ^ (z >> 31)) % 36;
                u32::try_from(digit)
                    .ok()
                    .and_then(|digit| char::from_digit(digit, 36))
                    .unwrap_or('0')
            })
            .collect()
    }
}
