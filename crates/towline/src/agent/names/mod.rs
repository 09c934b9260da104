//! Names: answers at 127.0.0.11 in every container.
//!
//! ```text
//!  container ──▶ 127.0.0.11:53 ──redirect──▶ a socket of ours in its namespace ──▶ zones ──▶ answer
//!                                                                                  └──▶ upstream, from the same namespace
//! ```
//!
//! One small tokio runtime serves all containers of the host. The sockets are bound to the loopback interface of the container's
//! namespace, so nobody outside can ask, and they are closed when the container goes: an open one would keep the namespace alive.
//! What is answered is `discovery::names`; this is its edge. Nothing of it is on the path of a packet. While no agent runs, nobody
//! answers; the next one opens the sockets again.

mod files;
mod redirect;
mod resolve;
mod server;
mod upstream;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use anyhow::Context as _;
use control::service::Service;
use control::{Network, TableChange};
use discovery::names::Zones;
use discovery::plan::MEMBER_INTERFACE;
use netns::Netns;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use vtep::Vni;

use super::Agent;
use crate::api::names::Status;
use crate::shim::dns::Dns;
use crate::shim::folder::Spec;

pub(super) use files::{follow, mounts};
pub(super) use resolve::resolve;

/// Where containers ask.
pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// Questions that a container may wait for at a time, above which more are refused.
const IN_FLIGHT: usize = 1024;
/// Those that it may wait for while half of [`IN_FLIGHT_OF_ALL`] are waited for: so that a few that ask for what nobody answers take
/// nothing from all others.
const IN_FLIGHT_CROWDED: usize = 64;
/// The same of all containers together: each holds a socket.
const IN_FLIGHT_OF_ALL: usize = 4096;
/// Bytes that wait to be read: thousands of questions, while others have the processor.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Threads that open sockets in namespaces.
const OPENERS: usize = 4;

/// What this host does for names.
#[derive(Debug)]
pub(crate) struct Names {
    shared: Arc<Shared>,
    /// Made for the first container.
    runtime: Mutex<Option<Runtime>>,
    containers: Mutex<HashMap<String, Serving>>,
}

/// What all containers' servers look at.
#[derive(Debug)]
struct Shared {
    zones: RwLock<Zones>,
    counters: Counters,
    /// The host's namespace.
    host: Netns,
    upstreams: upstream::HostServers,
    in_flight: Arc<Semaphore>,
}

/// What became of questions.
#[derive(Debug, Default)]
struct Counters {
    queries: AtomicU64,
    answered: AtomicU64,
    forwarded: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
}

/// One container that asks.
#[derive(Debug)]
struct Asker {
    netns: Netns,
    /// Its networks, in the order of its interfaces.
    networks: RwLock<Vec<Vni>>,
    /// It has a way out, by the gateway bridge.
    gateway: std::sync::atomic::AtomicBool,
    dns: Dns,
    in_flight: Arc<Semaphore>,
}

/// A container's server.
#[derive(Debug)]
struct Serving {
    asker: Arc<Asker>,
    task: tokio::task::AbortHandle,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Names {
    /// For the host in this namespace, with its `resolv.conf`. Nothing runs before the first container.
    pub(super) fn new(host: Netns, resolv_conf: PathBuf) -> Self {
        let shared = Shared {
            zones: RwLock::default(),
            counters: Counters::default(),
            host,
            upstreams: upstream::HostServers::new(resolv_conf),
            in_flight: Arc::new(Semaphore::new(IN_FLIGHT_OF_ALL)),
        };
        Self {
            shared: Arc::new(shared),
            runtime: Mutex::default(),
            containers: Mutex::default(),
        }
    }

    /// A network is known, or has changed.
    pub(super) fn network(&self, network: &Network) {
        self.shared.change().network(network);
    }

    /// All services of a network.
    pub(super) fn services(&self, vni: Vni, services: Vec<Service>) {
        self.shared.change().services(vni, services);
    }

    /// Changes of a network's rows; those that are no matter of names are passed over.
    pub(super) fn table(&self, vni: Vni, changes: &[TableChange]) {
        let of_names = |change: &TableChange| {
            matches!(
                change,
                TableChange::Names { .. } | TableChange::Backend { .. }
            )
        };
        if changes.iter().any(of_names) {
            self.shared.change().table(vni, changes);
        }
    }

    /// A network is gone, or followed no more.
    pub(super) fn forget(&self, vni: Vni) {
        self.shared.change().forget(vni);
    }

    /// Serves a container: opens its sockets and leads its questions there. One that is served already asks on its networks as they
    /// are now.
    ///
    /// # Errors
    /// When the namespace can't be entered or the kernel refuses.
    pub(crate) fn container(
        &self,
        agent: &Agent,
        netns: &Netns,
        spec: &Spec,
    ) -> anyhow::Result<()> {
        if self.refresh(agent, &spec.name) {
            return Ok(());
        }
        let (udp, tcp) = open(netns).context("can't open sockets for names")?;
        let (udp_port, tcp_port) = (udp.local_addr()?.port(), tcp.local_addr()?.port());
        let asker = Arc::new(Asker {
            netns: netns.clone(),
            networks: RwLock::default(),
            gateway: false.into(),
            dns: spec.dns.clone(),
            in_flight: Arc::new(Semaphore::new(IN_FLIGHT)),
        });
        asker.look(agent, &spec.name);
        let mut slot = lock(&self.runtime);
        let runtime = match &mut *slot {
            Some(runtime) => runtime,
            none => none.insert(runtime().context("can't start the threads for names")?),
        };
        let serving = server::serve(Arc::clone(&self.shared), Arc::clone(&asker), udp, tcp);
        let task = runtime.spawn(serving).abort_handle();
        drop(slot);
        // Not served before questions come: who looks again tries again.
        let serving = Serving { asker, task };
        redirect::put(netns, udp_port, tcp_port)?;
        lock(&self.containers).insert(spec.name.clone(), serving);
        Ok(())
    }

    /// A container's places may have changed; false: it is not served.
    pub(crate) fn refresh(&self, agent: &Agent, name: &str) -> bool {
        let containers = lock(&self.containers);
        let serving = containers.get(name);
        if let Some(serving) = serving {
            serving.asker.look(agent, name);
        }
        serving.is_some()
    }

    /// A container goes: its sockets are closed, which would keep its namespace alive.
    pub(crate) fn gone(&self, name: &str) {
        lock(&self.containers).remove(name);
    }

    /// Numbers for people.
    pub(super) fn status(&self) -> Status {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Status {
            containers: lock(&self.containers).len(),
            queries: read(&counters.queries),
            answered: read(&counters.answered),
            forwarded: read(&counters.forwarded),
            refused: read(&counters.refused),
            failed: read(&counters.failed),
        }
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        lock(&self.containers).clear();
        if let Some(runtime) = lock(&self.runtime).take() {
            // Nobody waits for a server that does not answer.
            runtime.shutdown_background();
        }
    }
}

impl Shared {
    fn zones(&self) -> RwLockReadGuard<'_, Zones> {
        self.zones.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> RwLockWriteGuard<'_, Zones> {
        self.zones.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Asker {
    /// Takes its places from the state file.
    fn look(&self, agent: &Agent, name: &str) {
        let (networks, gateway) = agent.state.read(|state| {
            // Names are never published on the network of published ports.
            let records = state
                .places(name)
                .filter(|record| record.ifname != MEMBER_INTERFACE);
            let mut networks: Vec<(&str, Vni)> = records
                .map(|record| (record.ifname.as_str(), record.vni))
                .collect();
            networks.sort_by_key(|(ifname, _)| (ifname.len(), *ifname));
            let gateway = state
                .attachments
                .iter()
                .any(|attachment| attachment.container == name);
            let networks: Vec<Vni> = networks.into_iter().map(|(_, vni)| vni).collect();
            (networks, gateway)
        });
        *self
            .networks
            .write()
            .unwrap_or_else(PoisonError::into_inner) = networks;
        self.gateway.store(gateway, Ordering::Relaxed);
    }

    fn networks(&self) -> RwLockReadGuard<'_, Vec<Vni>> {
        self.networks.read().unwrap_or_else(PoisonError::into_inner)
    }
}

fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(OPENERS)
        .thread_name("names")
        .enable_all()
        .build()
}

/// Sockets on free ports of 127.0.0.11, in the container's namespace. Bound to its loopback interface: a packet from elsewhere
/// never reaches them, whatever a container lets its routes do.
fn open(netns: &Netns) -> anyhow::Result<(UdpSocket, TcpListener)> {
    let opened = netns.run(|| {
        let socket = |kind, protocol| {
            let socket = Socket::new(Domain::IPV4, kind, Some(protocol))?;
            socket.bind_device(Some(b"lo"))?;
            socket.bind(&SocketAddr::new(IpAddr::from(ADDRESS), 0).into())?;
            socket.set_nonblocking(true)?;
            Ok::<_, io::Error>(socket)
        };
        let udp = socket(Type::DGRAM, Protocol::UDP)?;
        // Above what the host allows everybody; without the right to it, that must do.
        if rustix::net::sockopt::set_socket_recv_buffer_size_force(&udp, RECEIVE_BUFFER).is_err() {
            udp.set_recv_buffer_size(RECEIVE_BUFFER)?;
            tracing::debug!("names: the receive buffer is what this host allows everybody");
        }
        let tcp = socket(Type::STREAM, Protocol::TCP)?;
        tcp.listen(128)?;
        Ok::<_, io::Error>((udp.into(), tcp.into()))
    })?;
    Ok(opened?)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Maps that are whole between two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
