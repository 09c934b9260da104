//! The manager's threads: one takes connections and reads them, the other owns the state machine and the store.
//!
//! The state machine's thread takes what has come as one turn, writes what changed in one commit, and only then sends: many
//! changes at once cost one fsync (`server/turns.rs`). Connections come in through `server/door.rs`; what one can make this program
//! hold is bounded before it is known whose it is (`server/pending.rs`) and after: its messages wait their turn fairly with
//! others', and news that it does not read are left out and made up later (`server/behind.rs`). The bounds are in `limits.rs`.

mod behind;
mod door;
mod peers;
mod pending;
mod probing;
mod refusals;
mod turns;

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use socket2::{Domain, Socket, Type};
use tokio::sync::{Notify, mpsc};

use crate::epoch::Epoch;
use crate::host::{HostId, random_bytes};
use crate::limits::{BACKLOG, INPUTS_MAX};
use crate::manager::{Manager, Settings, StateError};
use crate::pki::{Authority, PkiError, Role, WallClock};
use crate::store::{Store, StoreError};
use crate::subnet::AddressPool;
use crate::transport::Backlog;
use door::Door;
use peers::Peers;
use pending::PendingRoom;
use turns::{Input, Parts, Turns};

/// How often the state machine is told the time.
const TICK: Duration = Duration::from_millis(100);
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
    /// Connections that have not shown yet whose they are.
    pub pending: usize,
    /// Bytes of messages that wait for agents to read them.
    pub queued_bytes: usize,
    /// Agents that read too slowly for the news; they get what they missed once they read again.
    pub behind: usize,
    /// Hosts known.
    pub hosts: usize,
    /// Why nothing can be changed now.
    pub store_error: Option<String>,
    /// Why it has ended by itself: another manager is the cluster's.
    pub stood_down: Option<String>,
}

impl ManagerStatus {
    /// Nobody has come yet.
    const fn at_start(listen: SocketAddr) -> Self {
        Self {
            listen,
            connected: 0,
            pending: 0,
            queued_bytes: 0,
            behind: 0,
            hosts: 0,
            store_error: None,
            stood_down: None,
        }
    }
}

/// A running manager.
#[derive(Debug)]
pub struct ManagerHandle {
    status: Arc<Mutex<ManagerStatus>>,
    pending: Arc<PendingRoom>,
    backlog: Backlog,
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
        let listener = listener(listen).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => ManagerError::PortTaken { listen },
            _ => ManagerError::Listen { listen, source },
        })?;
        let listen = listener.local_addr().unwrap_or(listen);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = runtime.map_err(ManagerError::Thread)?;

        let status = Arc::new(Mutex::new(ManagerStatus::at_start(listen)));
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
        let backlog = Backlog::default();
        let pending = Arc::new(PendingRoom::new(Arc::clone(&members)));
        let door = Arc::new(Door::new(
            host,
            signer.clone(),
            inputs,
            Arc::clone(&pending),
            backlog.clone(),
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
        let turns = Turns::new(Parts {
            manager,
            keeper,
            signer,
            prober,
            status: Arc::clone(&status),
            standbys,
            members,
            stop: Arc::clone(&stop),
        });
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(body)
                .map_err(ManagerError::Thread)
        };
        let mut handle = Self {
            status,
            pending,
            backlog,
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
        ManagerStatus {
            pending: self.pending.count(),
            queued_bytes: self.backlog.bytes(),
            ..lock(&self.status).clone()
        }
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

/// Listens with room for a whole cluster that comes back at once.
fn listener(at: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, None)?;
    // A manager that was just stopped leaves connections behind that still end.
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
