//! The manager's threads: one takes connections and reads them, the other owns the state machine and the store.
//!
//! The state machine's thread takes what has come as one turn, writes what changed in one commit, and only then sends: many
//! changes at once cost one fsync. What a connection can make this program hold is bounded before its token was seen
//! (connections, bytes and seconds) and after (its queue, its subscriptions); its messages wait their turn fairly with others'.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::time::timeout;

use crate::epoch::Epoch;
use crate::host::{HostId, HostInfo, random_bytes};
use crate::manager::{Connection, Manager, Output, Settings, StateError};
use crate::message::{MessageError, ToAgent, ToManager, VERSION};
use crate::request::{Request, Response};
use crate::store::{Store, StoreError};
use crate::subnet::AddressPool;
use crate::token::Token;
use crate::transport::{FRAME_MAX, HELLO_MAX, Outbox, read_frame, write_frame};

/// How often the state machine is told the time.
const TICK: Duration = Duration::from_millis(100);
/// How long a connection may take to show its token.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);
/// Connections that have not shown a token yet, of one address and of all.
const PENDING_MAX: (usize, usize) = (16, 512);
/// Connections that have.
const CONNECTIONS_MAX: usize = 20_000;
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
    /// The cluster's token.
    pub token: Token,
    /// The VTEP that probes.
    pub prober: Arc<dyn Prober>,
    /// Where subnets come from that nobody asks for by number; empty: [`AddressPool::standard`].
    pub pools: Vec<AddressPool>,
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
            token,
            prober,
            pools,
        } = config;
        let clock = Clock::start();
        let mut keeper = Keeper {
            store,
            host,
            cluster: token.cluster(),
            clock,
            pools,
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
        }));
        let stop = Arc::new(Notify::new());
        let (inputs, received) = mpsc::channel(INPUTS_MAX);
        let door = Arc::new(Door {
            token,
            inputs,
            pending: Mutex::new(HashMap::new()),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        });
        let stopped = Arc::clone(&stop);
        let serve = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = stopped.notified() => {}
                    () = accept(listener, &door) => {}
                    () = tick(&door) => {}
                }
            });
            // Ends every connection; with the last sender of inputs gone, the other thread ends too.
        };
        let turns = Turns {
            manager: Ok(manager),
            keeper,
            outboxes: HashMap::new(),
            prober,
            probing: Arc::new(AtomicUsize::new(0)),
            status: Arc::clone(&status),
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

enum Input {
    Hello {
        connection: Connection,
        from: IpAddr,
        host: HostInfo,
        last_epoch: Epoch,
        outbox: Outbox,
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
    clock: Clock,
    pools: Vec<AddressPool>,
}

#[derive(Clone, Copy)]
struct Clock {
    started: Instant,
    unix: Duration,
}

impl Clock {
    fn start() -> Self {
        // A clock before 1970 shows 1970 as the making of a network, and nothing else.
        let unix = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            started: Instant::now(),
            unix,
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Keeper {
    fn load(&mut self) -> Result<Manager, ManagerError> {
        let stored = self.store.load()?;
        let settings = Settings {
            host: self.host,
            cluster: self.cluster.clone(),
            seed: u64::from_be_bytes(random_bytes()),
            unix_at_zero: self.clock.unix,
            pools: self.pools.clone(),
        };
        Ok(Manager::new(settings, &stored, self.clock.now())?)
    }
}

/// The thread that owns the state machine.
struct Turns {
    /// Or why there is none, and when to try again.
    manager: Result<Manager, (String, Duration)>,
    keeper: Keeper,
    outboxes: HashMap<Connection, Outbox>,
    prober: Arc<dyn Prober>,
    probing: Arc<AtomicUsize>,
    status: Arc<Mutex<ManagerStatus>>,
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
        let now = self.keeper.clock.now();
        if let Err((_, retry_at)) = &self.manager
            && now >= *retry_at
        {
            self.manager = self
                .keeper
                .load()
                .map_err(|error| (error.to_string(), now + STORE_RETRY));
        }
        match (&mut self.manager, input) {
            (
                Ok(manager),
                Input::Hello {
                    connection,
                    from,
                    host,
                    last_epoch,
                    outbox,
                },
            ) => {
                let name = host.name.clone();
                match manager.handle_hello(connection, from, host, last_epoch, now) {
                    Ok(()) => {
                        self.outboxes.insert(connection, outbox);
                    }
                    Err(reason) => {
                        tracing::warn!(host = %name, %from, %reason, "refused a host");
                        outbox.send(ToAgent::Reject { reason }.encode());
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
            (Ok(manager), Input::Disconnected { connection }) => {
                manager.handle_disconnected(connection);
                self.outboxes.remove(&connection);
            }
            (Ok(manager), Input::Tick) => manager.handle_timeout(now),
            (Err((cause, _)), Input::Hello { outbox, .. }) => {
                let reason = format!("the manager cannot use its store: {cause}");
                outbox.send(ToAgent::Reject { reason }.encode());
            }
            (Err(_), Input::Message { .. } | Input::Disconnected { .. } | Input::Tick) => {}
        }
    }

    /// Makes the turn's changes durable, then sends what follows from them.
    fn finish(&mut self) {
        let Ok(manager) = &mut self.manager else {
            return;
        };
        manager.finish_turn();
        let writes = manager.take_writes();
        if !writes.is_empty()
            && let Err(error) = self.keeper.store.commit(&writes)
        {
            // What was not made durable did not happen: forget it, and begin again from what is.
            tracing::error!(%error, "failed to write the store; every agent connects anew");
            lock(&self.status).store_error = Some(error.to_string());
            self.manager = Err((error.to_string(), self.keeper.clock.now() + STORE_RETRY));
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
        let (connected, hosts) = manager.counts();
        let mut status = lock(&self.status);
        (status.connected, status.hosts) = (connected, hosts);
        status.store_error = None;
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

/// Where connections come in.
struct Door {
    token: Token,
    inputs: mpsc::Sender<Input>,
    /// Connections without a token yet, by address.
    pending: Mutex<HashMap<IpAddr, usize>>,
    connections: Arc<Semaphore>,
}

/// One connection without a token yet; dropping it makes room.
struct Pending<'d>(&'d Door, IpAddr);

impl Door {
    fn pend(&self, from: IpAddr) -> Option<Pending<'_>> {
        let mut pending = lock(&self.pending);
        let all: usize = pending.values().sum();
        let own = pending.get(&from).copied().unwrap_or_default();
        if all >= PENDING_MAX.1 || own >= PENDING_MAX.0 {
            return None;
        }
        pending.insert(from, own + 1);
        Some(Pending(self, from))
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let mut pending = lock(&self.0.pending);
        if let Some(own) = pending.get_mut(&self.1) {
            *own -= 1;
            if *own == 0 {
                pending.remove(&self.1);
            }
        }
    }
}

async fn tick(door: &Door) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if door.inputs.send(Input::Tick).await.is_err() {
            return;
        }
    }
}

async fn accept(listener: std::net::TcpListener, door: &Arc<Door>) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "failed to listen");
            return;
        }
    };
    for connection in 0.. {
        match listener.accept().await {
            Ok((stream, from)) => {
                // Heartbeats and single rows must not wait for more.
                let _ = stream.set_nodelay(true);
                let door = Arc::clone(door);
                tokio::spawn(async move { serve(stream, connection, from.ip(), &door).await });
            }
            Err(error) => {
                tracing::error!(%error, "failed to accept a connection");
                tokio::time::sleep(TICK).await;
            }
        }
    }
}

/// One connection, from its first byte to its last. Any stream will do.
async fn serve<S: AsyncRead + AsyncWrite + Send + 'static>(
    stream: S,
    connection: Connection,
    from: IpAddr,
    door: &Door,
) {
    let Some(pending) = door.pend(from) else {
        return;
    };
    let (mut reader, mut writer) = tokio::io::split(stream);
    let greeted = timeout(HELLO_PATIENCE, read_frame(&mut reader, HELLO_MAX)).await;
    let Ok(Ok(frame)) = greeted else { return };
    let (host, last_epoch) = match check_hello(&frame, &door.token) {
        Ok(hello) => hello,
        Err(reason) => {
            tracing::warn!(%from, %reason, "refused a connection");
            let reject = ToAgent::Reject {
                reason: reason.to_owned(),
            }
            .encode();
            // A peer that is wrong may also be gone.
            let _ = timeout(HELLO_PATIENCE, write_frame(&mut writer, &reject)).await;
            return;
        }
    };
    let Ok(_place) = door.connections.try_acquire() else {
        return;
    };
    drop(pending);
    let name = host.name.clone();
    let (outbox, closed) = Outbox::new(writer);
    if door
        .inputs
        .send(Input::Hello {
            connection,
            from,
            host,
            last_epoch,
            outbox,
        })
        .await
        .is_err()
    {
        return;
    }
    loop {
        let frame = tokio::select! {
            frame = read_frame(&mut reader, FRAME_MAX) => frame,
            () = closed.notified() => break,
        };
        let Ok(frame) = frame else { break };
        match ToManager::decode(&frame) {
            Ok(message) => {
                if door
                    .inputs
                    .send(Input::Message {
                        connection,
                        message,
                    })
                    .await
                    .is_err()
                {
                    break;
                }
            }
            // From a newer agent; what it says besides is still right.
            Err(MessageError::Kind) => {}
            Err(error) => {
                tracing::warn!(host = %name, %from, %error, "closed a connection");
                break;
            }
        }
    }
    // Where the state machine is gone, so is its view of this connection.
    let _ = door.inputs.send(Input::Disconnected { connection }).await;
}

/// Whether a first message opens the door. A refusal tells nothing of the token or the cluster.
fn check_hello(frame: &[u8], token: &Token) -> Result<(HostInfo, Epoch), &'static str> {
    match ToManager::decode(frame) {
        Ok(ToManager::Hello { version, .. }) if version != VERSION => Err(
            "another version of the control protocol: run the same release of towline on every host",
        ),
        Ok(ToManager::Hello {
            token: shown,
            host,
            last_epoch,
            ..
        }) if shown == *token => Ok((host, last_epoch)),
        Ok(ToManager::Hello { .. }) => {
            Err("wrong token: use the one that `towline init` printed on the manager's host")
        }
        Ok(_) | Err(_) => Err("no hello"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
