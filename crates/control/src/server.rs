//! The manager's threads: one takes connections and reads them, the other owns the state machine and the store.
//!
//! The state machine's thread takes what has come as one turn, writes what changed in one commit, and only then sends: many
//! changes at once cost one fsync. Connections come in through `door.rs`; what one can make this program hold is bounded before
//! it is known whose it is (connections, bytes and seconds) and after (its queue, its subscriptions); its messages wait their
//! turn fairly with others'.

mod door;
mod peers;

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{Notify, mpsc};

use crate::epoch::Epoch;
use crate::host::{HostId, HostInfo, random_bytes};
use crate::manager::{Connection, Manager, Output, Rank, Refusal, Settings, StateError};
use crate::message::{ToAgent, ToManager};
use crate::pki::{Authority, Certificate, PkiError, Role, WallClock};
use crate::request::{Request, Response};
use crate::store::{Store, StoreError};
use crate::subnet::AddressPool;
use crate::token::{Secret, SecretText};
use crate::transport::Outbox;
use door::Door;
use peers::Peers;

/// How often the state machine is told the time.
const TICK: Duration = Duration::from_millis(100);
/// Messages that wait for the state machine; their senders wait too.
const INPUTS_MAX: usize = 1024;
/// Messages handled before changes are made durable and sent.
const TURN_MAX: usize = 256;
/// Probes under way.
const PROBES_MAX: usize = 32;
/// The wait before a store that failed is read again.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// Sends and expects probes on the manager's own VTEP.
pub trait Prober: Send + Sync {
    /// From now on, note probes that carry this nonce.
    fn expect(&self, nonce: [u8; 16]);

    /// Sends probes of these sizes to a host, with another nonce, and answers which sizes of the expected ones have arrived.
    /// May take a second.
    fn reply(
        &self,
        nonce: [u8; 16],
        to: SocketAddr,
        back_nonce: [u8; 16],
        sizes: &[u16],
    ) -> Vec<u16>;
}

/// What a manager is made of.
pub struct ManagerConfig {
    /// Where to listen: the VTEP address, and by default the VXLAN port's number.
    pub listen: SocketAddr,
    /// The host that runs it.
    pub host: HostId,
    /// Where it keeps what it must not forget.
    pub store: Box<dyn Store>,
    /// The cluster's authority.
    pub authority: Arc<Authority>,
    /// How long certificates that it signs are good for.
    pub lifetime: Duration,
    /// The VTEP that probes.
    pub prober: Arc<dyn Prober>,
    /// Where subnets come from that nobody asks for by number; empty: [`AddressPool::standard`].
    pub pools: Vec<AddressPool>,
    /// What dates are made and measured by.
    pub clock: WallClock,
    /// With an empty store: the highest epoch seen of the manager whose place this one takes.
    pub succeeds: Option<Epoch>,
}

/// Why a manager could not start.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// Somebody else listens there.
    #[error(
        "TCP {listen} is taken by another program (`ss -ltnp` shows which): stop it, or choose another --port"
    )]
    PortTaken {
        /// Where.
        listen: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error("failed to listen on TCP {listen}")]
    Listen {
        /// Where.
        listen: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store's content cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The authority cannot be used.
    #[error("failed to make the manager's certificate")]
    Pki(#[from] PkiError),
    /// The certificate cannot be used.
    #[error("failed to set TLS up")]
    Tls(#[from] rustls::Error),
    /// No thread.
    #[error("failed to start the manager's threads")]
    Thread(#[source] io::Error),
}

/// How a manager stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ManagerStatus {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Agents connected.
    pub connected: usize,
    /// Hosts known.
    pub hosts: usize,
    /// Why nothing can be changed now.
    pub store_error: Option<String>,
    /// Why it has ended by itself: another manager is the cluster's.
    pub stood_down: Option<String>,
}

/// A running manager.
#[derive(Debug)]
pub struct ManagerHandle {
    status: Arc<Mutex<ManagerStatus>>,
    stop: Arc<Notify>,
    threads: Vec<JoinHandle<()>>,
}

impl ManagerHandle {
    /// Reads the store, listens, and starts. Its sockets belong to the network namespace of the calling thread.
    pub fn start(config: ManagerConfig) -> Result<Self, ManagerError> {
        let ManagerConfig {
            listen,
            host,
            store,
            authority,
            lifetime,
            prober,
            pools,
            clock: wall,
            succeeds,
        } = config;
        let mut keeper = Keeper {
            store,
            host,
            pools,
            cluster: authority.cluster(),
            wall: wall.clone(),
            started: Instant::now(),
            listen,
            succeeds,
        };
        let manager = keeper.load()?;
        let listener =
            std::net::TcpListener::bind(listen).map_err(|source| match source.kind() {
                io::ErrorKind::AddrInUse => ManagerError::PortTaken { listen },
                _ => ManagerError::Listen { listen, source },
            })?;
        listener
            .set_nonblocking(true)
            .map_err(|source| ManagerError::Listen { listen, source })?;
        let listen = listener.local_addr().unwrap_or(listen);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = runtime.map_err(ManagerError::Thread)?;

        let status = Arc::new(Mutex::new(ManagerStatus {
            listen,
            connected: 0,
            hosts: 0,
            store_error: None,
            stood_down: None,
        }));
        let stop = Arc::new(Notify::new());
        let (inputs, received) = mpsc::channel(INPUTS_MAX);
        let signer = Signer {
            authority,
            lifetime,
            clock: wall,
        };
        let standbys = Arc::new(Mutex::new(manager.standbys()));
        let peers = Peers::new(listen, host, &signer, Arc::clone(&standbys), inputs.clone())?;
        let members: Members = Arc::new(Mutex::new(manager.vteps().collect()));
        let door = Arc::new(Door::new(
            host,
            signer.clone(),
            inputs,
            Arc::clone(&members),
        )?);
        let stopped = Arc::clone(&stop);
        let serve = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = stopped.notified() => {}
                    () = async {
                        // Whoever is the cluster's manager meanwhile is heard before any host is.
                        peers.first_round().await;
                        tokio::join!(peers.watch(), door.open(listener));
                    } => {}
                }
            });
            // Ends every connection; with the last sender of inputs gone, the other thread ends too.
        };
        let turns = Turns {
            manager: Ok(manager),
            keeper,
            signer,
            outboxes: HashMap::new(),
            prober,
            probing: Arc::new(AtomicUsize::new(0)),
            status: Arc::clone(&status),
            standbys,
            members,
            stop: Arc::clone(&stop),
        };
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(body)
                .map_err(ManagerError::Thread)
        };
        let mut handle = Self {
            status,
            stop,
            threads: Vec::new(),
        };
        handle
            .threads
            .push(spawn("control-server", Box::new(serve))?);
        handle.threads.push(spawn(
            "control-manager",
            Box::new(move || turns.run(received)),
        )?);
        Ok(handle)
    }

    /// How it stands.
    #[must_use]
    pub fn status(&self) -> ManagerStatus {
        lock(&self.status).clone()
    }

    /// Closes every connection and ends. The store is free for another when this returns.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.notify_one();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the manager ended by a panic");
            }
        }
    }
}

impl Drop for ManagerHandle {
    fn drop(&mut self) {
        self.end();
    }
}

/// Underlay addresses of hosts: strangers cannot crowd them out.
type Members = Arc<Mutex<HashSet<IpAddr>>>;

enum Input {
    Join {
        from: IpAddr,
        secret: Secret,
        request: Vec<u8>,
        outbox: Outbox,
    },
    Hello {
        connection: Connection,
        certificate: Certificate,
        from: IpAddr,
        host: HostInfo,
        last_epoch: Epoch,
        outbox: Outbox,
    },
    /// Another manager speaks up, and may await an answer.
    Peer {
        rank: Rank,
        at: IpAddr,
        outbox: Option<Outbox>,
    },
    Message {
        connection: Connection,
        message: ToManager,
    },
    Disconnected {
        connection: Connection,
    },
    Tick,
}

/// The store, and how to make a manager from it.
struct Keeper {
    store: Box<dyn Store>,
    host: HostId,
    cluster: String,
    pools: Vec<AddressPool>,
    wall: WallClock,
    started: Instant,
    listen: SocketAddr,
    succeeds: Option<Epoch>,
}

/// Signs certificates.
#[derive(Clone)]
struct Signer {
    authority: Arc<Authority>,
    lifetime: Duration,
    clock: WallClock,
}

impl Signer {
    fn sign(&self, request: &[u8], host: HostId, role: Role) -> Result<Vec<u8>, PkiError> {
        let Self {
            authority,
            lifetime,
            clock,
        } = self;
        authority.sign(request, host, role, clock.unix(), *lifetime)
    }
}

impl Keeper {
    fn load(&mut self) -> Result<Manager, ManagerError> {
        let stored = self.store.load()?;
        let settings = Settings {
            host: self.host,
            cluster: self.cluster.clone(),
            seed: u64::from_be_bytes(random_bytes()),
            unix_at_zero: self.wall.unix().saturating_sub(self.now()),
            pools: self.pools.clone(),
        };
        let mut manager = Manager::new(settings, &stored, self.now())?;
        manager.listens_at(self.listen);
        if let Some(seen) = self.succeeds.filter(|_| stored.is_empty()) {
            manager.succeed(seen, self.now());
        }
        Ok(manager)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

/// The thread that owns the state machine.
struct Turns {
    /// Or why there is none, and when to try again.
    manager: Result<Manager, (String, Duration)>,
    keeper: Keeper,
    signer: Signer,
    outboxes: HashMap<Connection, Outbox>,
    prober: Arc<dyn Prober>,
    probing: Arc<AtomicUsize>,
    status: Arc<Mutex<ManagerStatus>>,
    /// Where other managers would listen, for who asks them.
    standbys: Arc<Mutex<Vec<SocketAddr>>>,
    members: Members,
    stop: Arc<Notify>,
}

impl Turns {
    fn run(mut self, mut inputs: mpsc::Receiver<Input>) {
        while let Some(first) = inputs.blocking_recv() {
            self.handle(first);
            for _ in 1..TURN_MAX {
                let Ok(input) = inputs.try_recv() else { break };
                self.handle(input);
            }
            self.finish();
        }
    }

    fn handle(&mut self, input: Input) {
        if lock(&self.status).stood_down.is_some() {
            return;
        }
        let now = self.keeper.now();
        if let Err((_, retry_at)) = &self.manager
            && now >= *retry_at
        {
            self.manager = self
                .keeper
                .load()
                .map_err(|error| (error.to_string(), now + STORE_RETRY));
        }
        if let Ok(manager) = &mut self.manager {
            manager.set_unix(self.keeper.wall.unix());
        }
        match (&mut self.manager, input) {
            (
                Ok(manager),
                Input::Join {
                    from,
                    secret,
                    request,
                    outbox,
                },
            ) => {
                let answer = manager
                    .redeem(&secret)
                    .and_then(|role| join(&self.signer, from, role, &request));
                outbox.send(
                    answer
                        .unwrap_or_else(|reason| reject(reason, from))
                        .encode(),
                );
            }
            (
                Ok(manager),
                Input::Hello {
                    connection,
                    certificate,
                    from,
                    host,
                    last_epoch,
                    outbox,
                },
            ) => {
                let name = host.name.clone();
                let admitted = manager
                    .admit(connection, certificate, &host)
                    .and_then(|()| manager.handle_hello(connection, from, host, last_epoch, now));
                match admitted {
                    Ok(()) => {
                        self.outboxes.insert(connection, outbox);
                    }
                    Err(Refusal { reason, removed }) => {
                        tracing::warn!(host = %name, %from, %reason, "refused a host");
                        outbox.send(ToAgent::Reject { reason, removed }.encode());
                    }
                }
            }
            (
                Ok(manager),
                Input::Message {
                    connection,
                    message,
                },
            ) => manager.handle_message(connection, message, now),
            (Ok(manager), Input::Peer { rank, at, outbox }) => {
                let (generation, host) = manager.rank();
                if let Some(outbox) = outbox {
                    let peer = ToAgent::Peer {
                        generation,
                        manager: host,
                    };
                    outbox.send(peer.encode());
                }
                if rank.1 != host && rank > (generation, host) {
                    let reason = format!(
                        "host {} at {at} is the cluster's manager in generation {}, after this one's {generation}",
                        rank.1, rank.0
                    );
                    tracing::warn!(%reason, "stood down; this host's agent goes on with the other manager");
                    lock(&self.status).stood_down = Some(reason);
                    self.outboxes.clear();
                    self.stop.notify_one();
                }
            }
            (Ok(manager), Input::Disconnected { connection }) => {
                manager.handle_disconnected(connection);
                self.outboxes.remove(&connection);
            }
            (Ok(manager), Input::Tick) => manager.handle_timeout(now),
            (
                Err((cause, _)),
                Input::Hello { outbox, from, .. } | Input::Join { outbox, from, .. },
            ) => {
                let reason = format!("the manager cannot use its store: {cause}");
                outbox.send(reject(reason, from).encode());
            }
            (
                Err(_),
                Input::Peer { .. }
                | Input::Message { .. }
                | Input::Disconnected { .. }
                | Input::Tick,
            ) => {}
        }
    }

    /// Makes the turn's changes durable, then sends what follows from them.
    fn finish(&mut self) {
        let Ok(manager) = &mut self.manager else {
            return;
        };
        manager.finish_turn(self.keeper.now());
        let writes = manager.take_writes();
        if !writes.is_empty()
            && let Err(error) = self.keeper.store.commit(&writes)
        {
            // What was not made durable did not happen: forget it, and begin again from what is.
            tracing::error!(%error, "failed to write the store; every agent connects anew");
            lock(&self.status).store_error = Some(error.to_string());
            self.manager = Err((error.to_string(), self.keeper.now() + STORE_RETRY));
            self.outboxes.clear();
            return;
        }
        while let Some(output) = manager.poll_output() {
            match output {
                Output::Send { to, message } => {
                    // Encoded once, however many follow the network.
                    let bytes = message.encode();
                    for outbox in to
                        .iter()
                        .filter_map(|connection| self.outboxes.get(connection))
                    {
                        outbox.send(bytes.clone());
                    }
                }
                Output::Close(connection) => drop(self.outboxes.remove(&connection)),
                Output::Sign {
                    connection,
                    call,
                    host,
                    role,
                    request,
                } => {
                    if let Some(outbox) = self.outboxes.get(&connection) {
                        let signed = self.signer.sign(&request, host, role);
                        let answer = signed
                            .map(Response::Certificate)
                            .map_err(|error| error.to_string());
                        for part in Manager::reply(call, &answer) {
                            outbox.send(part.encode());
                        }
                    }
                }
                Output::Authority { connection, call } => {
                    if let Some(outbox) = self.outboxes.get(&connection) {
                        let pem = SecretText(self.signer.authority.to_pem());
                        for part in Manager::reply(call, &Ok(Response::Authority(pem))) {
                            outbox.send(part.encode());
                        }
                    }
                }
                Output::Probe {
                    connection,
                    call,
                    request,
                } => {
                    if let Some(outbox) = self.outboxes.get(&connection) {
                        probe(&self.prober, &self.probing, outbox.clone(), call, request);
                    }
                }
            }
        }
        let standbys = manager.standbys();
        *lock(&self.standbys) = standbys;
        let (connected, hosts) = manager.counts();
        let mut status = lock(&self.status);
        if status.hosts != hosts {
            *lock(&self.members) = manager.vteps().collect();
        }
        (status.connected, status.hosts) = (connected, hosts);
        status.store_error = None;
    }
}

/// A certificate for a new host, under an id that nobody has yet.
fn join(signer: &Signer, from: IpAddr, role: Role, request: &[u8]) -> Result<ToAgent, String> {
    let host = HostId::random();
    let certificate = signer
        .sign(request, host, role)
        .map_err(|error| error.to_string())?;
    tracing::info!(%from, %host, %role, "signed a certificate for a new host");
    Ok(ToAgent::Joined {
        certificate,
        ca: signer.authority.certificate().to_vec(),
    })
}

fn reject(reason: String, from: IpAddr) -> ToAgent {
    tracing::warn!(%from, %reason, "refused a connection");
    ToAgent::Reject {
        reason,
        removed: false,
    }
}

/// Probes on a thread of its own, because it waits, and answers the call.
fn probe(
    prober: &Arc<dyn Prober>,
    probing: &Arc<AtomicUsize>,
    outbox: Outbox,
    call: u64,
    request: Request,
) {
    let answer = move |result: Result<Response, String>| {
        for part in Manager::reply(call, &result) {
            outbox.send(part.encode());
        }
    };
    if probing.fetch_add(1, Ordering::Relaxed) >= PROBES_MAX {
        probing.fetch_sub(1, Ordering::Relaxed);
        answer(Err(format!(
            "the manager sends {PROBES_MAX} probes already: try again in a few seconds"
        )));
        return;
    }
    let (prober, under_way) = (Arc::clone(prober), Arc::clone(probing));
    let body = move || {
        match request {
            Request::ProbeExpect { nonce } => {
                prober.expect(nonce);
                answer(Ok(Response::Done));
            }
            Request::ProbeReply {
                nonce,
                to,
                back_nonce,
                sizes,
            } => {
                answer(Ok(Response::ProbeSizes(
                    prober.reply(nonce, to, back_nonce, &sizes),
                )));
            }
            other => answer(Err(format!("{other:?} is no probe"))),
        }
        under_way.fetch_sub(1, Ordering::Relaxed);
    };
    if let Err(error) = std::thread::Builder::new()
        .name("control-probe".to_owned())
        .spawn(body)
    {
        // The asker's deadline ends its call.
        probing.fetch_sub(1, Ordering::Relaxed);
        tracing::error!(%error, "failed to start a thread for a probe");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
