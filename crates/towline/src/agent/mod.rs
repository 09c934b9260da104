//! The agent: joins datapath, control and gateway bridge on one host.
//!
//! Threads: one per client of the API socket; one that carries the manager's
//! news into the datapath (`tables.rs`); one that looks after what others may
//! break (`upkeep.rs`); the datapath's workers and control's transport have
//! their own. None of them is on the path of a frame but the workers.
//!
//! A container does not depend on the agent: its interface persists, its shim
//! is no child of the agent. `start` takes up again what it finds.

pub(crate) mod container;
mod dispatch;
mod fdb;
mod host;
mod join;
mod membership;
mod network;
mod server;
pub(crate) mod state;
mod status;
mod tables;
mod upkeep;

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use anyhow::Context as _;
use netns::Netns;

pub(crate) use membership::Member;

use crate::config::Config;
use state::StateFile;

/// Abstract Unix sockets belong to a network namespace, so this name is taken
/// exactly when another agent runs in ours.
const ONE_PER_NAMESPACE: &str = "towline-agent";

/// The agent of this host.
pub(crate) struct Agent {
    /// What it was told.
    pub(crate) config: Config,
    /// The host's network namespace.
    pub(crate) netns: Netns,
    /// What it remembers.
    pub(crate) state: StateFile,
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
        self.member.read().unwrap_or_else(PoisonError::into_inner).clone().context(
            "this host is in no cluster: run 'towline init' for a new one, \
             or 'towline join' as 'towline status' on the manager prints it",
        )
    }

    /// Where containers' files live.
    pub(crate) fn containers_dir(&self) -> PathBuf {
        self.config.state_dir.join("containers")
    }

    /// The right to change the membership or the set of containers.
    pub(crate) fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_member(&self, member: Option<Arc<Member>>) -> Option<Arc<Member>> {
        let mut slot = self.member.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *slot, member)
    }
}
