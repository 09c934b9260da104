//! The agent: joins datapath, control and gateway bridge on one host.
//!
//! Threads: one per client of the API socket; one that carries the manager's
//! news into the datapath (`news.rs`); one that looks after what others may
//! break (`upkeep.rs`); the datapath's workers and control's transport have
//! their own. None of them is on the path of a frame but the workers.
//!
//! A container does not depend on the agent: its interface persists, its shim
//! is no child of the agent. A new agent takes up again what it finds.

mod announce;
mod capture;
pub(crate) mod container;
mod control_source;
mod dispatch;
mod fdb;
mod host;
mod ingress;
mod installed;
mod join;
mod keys;
mod locks;
mod manager;
mod membership;
mod misdelivery;
mod names;
mod neighbors;
mod network;
mod news;
mod path;
mod placement;
mod port;
mod server;
mod service;
mod services;
pub(crate) mod state;
mod static_mode;
mod status;
mod survey;
mod tables;
mod traffic;
mod trust;
mod underlay;
mod upkeep;
mod volumes;

use std::fs::File;
use std::io::{ErrorKind, IsTerminal};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use netns::Netns;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

pub(crate) use membership::Member;

use crate::config::Config;
use keys::Keys;
use membership::Parts;
use server::Server;
use state::{Membership, StateFile};

/// Abstract Unix sockets belong to a network namespace, so this name is taken
/// exactly when another agent runs in ours.
const ONE_PER_NAMESPACE: &str = "towline-agent";

/// How long a killed agent may take to let go of sockets and files.
const PREDECESSOR_LIMIT: Duration = Duration::from_secs(2);
/// How long requests under way may take to end.
const STOP_LIMIT: Duration = Duration::from_secs(12);

/// The agent of this host.
pub(crate) struct Agent {
    /// What it was told.
    pub(crate) config: Config,
    /// The host's network namespace.
    pub(crate) netns: Netns,
    /// What it remembers.
    pub(crate) state: StateFile,
    /// Its containers.
    pub(crate) containers: container::Containers,
    /// Volumes of this host.
    pub(crate) volumes: volumes::Volumes,
    /// Its place in a cluster.
    member: RwLock<Option<Arc<Member>>>,
    /// Held by whoever changes the membership or the set of containers, so that
    /// `leave` and `run` cannot cross. Never held while waiting for a container.
    changing: Mutex<()>,
}

impl Agent {
    /// This host's place in its cluster.
    ///
    /// # Errors
    /// Before `init` and `join`: says so.
    pub(crate) fn member(&self) -> anyhow::Result<Arc<Member>> {
        self.member
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .context(
                "this host is in no cluster: run 'towline init' for a new one, \
             or 'towline join' as 'towline token' on the manager prints it",
            )
    }

    /// Where a manager keeps its store.
    fn store_dir(&self) -> PathBuf {
        self.config.state_dir.join("manager")
    }

    /// Where the tables are kept for a start without a manager.
    fn tables_file(&self) -> PathBuf {
        self.config.state_dir.join("tables")
    }

    /// The right to change the membership or the set of containers.
    pub(crate) fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends this host's part in the cluster, once nobody uses it any more.
    fn stop_member(&self) {
        let Some(mut member) = self.set_member(None) else {
            return;
        };
        let deadline = Instant::now() + STOP_LIMIT;
        loop {
            match Arc::try_unwrap(member) {
                Ok(member) => return member.stop(),
                Err(_) if Instant::now() >= deadline => {
                    return tracing::warn!("a request that is still under way keeps sockets open");
                }
                // A request that began before is still being answered.
                Err(shared) => member = shared,
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn set_member(&self, member: Option<Arc<Member>>) -> Option<Arc<Member>> {
        let mut slot = self.member.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *slot, member)
    }
}

/// Runs the agent until it is told to stop. Containers run on without it.
///
/// # Errors
/// What is missing or in the way; nothing of the host was changed then.
pub(crate) fn run(config: Config) -> anyhow::Result<()> {
    log_to_stderr();
    check_rights()?;
    let netns = Netns::current()?;
    let _one_per_namespace = claim_namespace()?;
    state::make_dir(&config.state_dir)?;
    let _one_per_state_dir = lock_state_dir(&config)?;
    let state = StateFile::open(&config.state_dir)?;
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot watch for signals")?;
    if config.static_tables.is_some() {
        signals
            .add_signal(SIGHUP)
            .context("cannot watch for SIGHUP")?;
    }
    let server = Server::bind(&config.socket)?;
    let agent = Arc::new(Agent {
        containers: container::Containers::new(config.state_dir.join("containers"))?,
        volumes: volumes::Volumes::new(config.state_dir.join("volumes"))?,
        config,
        netns,
        state,
        member: RwLock::new(None),
        changing: Mutex::new(()),
    });
    match &agent.config.static_tables {
        Some(file) => static_mode::start(&agent, file)?,
        None => {
            static_mode::check_no_leftovers(&agent)?;
            agent.resume()?;
        }
    }
    container::start(&agent);
    upkeep::start(&agent)?;
    server.serve(&agent)?;
    tracing::info!(
        "{} is ready at {}",
        agent.config.name,
        agent.config.socket.display()
    );
    for signal in signals.forever() {
        match &agent.config.static_tables {
            Some(file) if signal == SIGHUP => static_mode::reload(&agent, file),
            _ => {
                tracing::info!("stopping on signal {signal}; containers run on");
                break;
            }
        }
    }
    agent.stop_member();
    Ok(())
}

impl Agent {
    /// Takes up the cluster and the networks of the agent before.
    fn resume(self: &Arc<Self>) -> anyhow::Result<()> {
        let (membership, networks) = self
            .state
            .read(|state| (state.membership.clone(), state.networks.clone()));
        let Some(settled) = membership else {
            return Ok(());
        };
        let settled = self.measure_link(settled)?;
        let keys = Keys::load(&self.config)?;
        let parts = retry(|| Parts::start(self, settled.clone(), keys.clone()))?;
        let member = Arc::new(parts.finish(self).map_err(|(_, error)| error)?);
        for network in &networks {
            member.follow(network);
        }
        if let Err(error) = ingress::adopt(self, &member) {
            tracing::warn!("published ports are not served by this host: {error:#}");
        }
        neighbors::raise(self);
        self.set_member(Some(Arc::clone(&member)));
        news::start(self, &member)?;
        survey::start(&member)
    }
}

impl Agent {
    /// The link may carry other packets than when this was settled: the manager is told of what it carries now.
    fn measure_link(&self, mut settled: Membership) -> anyhow::Result<Membership> {
        // Without the address nothing can start, and that says why.
        if let Ok(link_mtu) = underlay::link_mtu(&self.netns, settled.vtep)
            && link_mtu != settled.link_mtu
        {
            tracing::info!(
                "the link of {} takes packets of {link_mtu} bytes now, {} before",
                settled.vtep,
                settled.link_mtu
            );
            settled.link_mtu = link_mtu;
            self.state
                .update(|state| state.membership = Some(settled.clone()))?;
        }
        Ok(settled)
    }
}

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("TOWLINE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

fn check_rights() -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the agent needs root: start it with 'sudo towline agent', or as a systemd service");
    }
    if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
        bail!(
            "cannot open /dev/net/tun ({error}): run 'modprobe tun', or give this container or \
             virtual machine the device"
        );
    }
    Ok(())
}

/// Makes sure that no second agent runs in this network namespace, for as long as
/// the returned socket lives.
fn claim_namespace() -> anyhow::Result<UnixListener> {
    let address = SocketAddr::from_abstract_name(ONE_PER_NAMESPACE)?;
    let claimed = retry(|| match UnixListener::bind_addr(&address) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => Err(error),
        other => Ok(other),
    });
    if let Ok(claimed) = claimed {
        return claimed.context("cannot claim this network namespace");
    }
    let holder = UnixStream::connect_addr(&address)
        .ok()
        .and_then(|stream| rustix::net::sockopt::socket_peercred(&stream).ok())
        .map_or(String::new(), |peer| {
            format!(" as process {}", peer.pid.as_raw_pid())
        });
    bail!(
        "an agent runs in this network namespace already{holder}: \
         stop it first, or use it with --socket"
    )
}

/// An agent that was just killed may still be letting go of what it held.
fn retry<T, E>(mut attempt: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let deadline = Instant::now() + PREDECESSOR_LIMIT;
    loop {
        match attempt() {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            done => return done,
        }
    }
}

fn lock_state_dir(config: &Config) -> anyhow::Result<File> {
    let path = config.state_dir.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    match retry(|| file.try_lock()) {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => bail!(
            "another agent uses the state folder {}: give this one its own with --state-dir",
            config.state_dir.display()
        ),
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}
