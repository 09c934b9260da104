//! Containers' life on this host: what the agent makes before a command starts
//! and takes away after it has ended.
//!
//! ```text
//! run ─▶ prepare: name, addresses, namespace, ports, gateway ─▶ Ready ─▶ shim and command
//!                                                                          │ pidfd, or found at a start
//!                                        Exited, or gone ◀── clear ◀───────┘
//! ```
//!
//! The agent is nobody's parent here. Each step is on disk before the next one
//! starts, so that an agent that was killed at any point finds what to clear
//! away. Does NOT start commands: that is the shim's.

mod clear;
mod drain;
mod gateway;
mod list;
mod lost_mounts;
mod mount_points;
mod mounts;
mod name;
mod places;
mod prepare;
pub(super) mod publish;
mod reconcile;
mod source;
mod watch;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::Agent;
use super::locks::Locks;
use crate::api::container::{Request, Response};
use crate::shim::folder::{Folder, Phase, Spec};

pub(crate) use clear::{release_endpoint, remove_all};
use drain::Drain;
pub(crate) use list::names;
pub(crate) use mount_points::mounted;
pub(crate) use places::leave_ingress;
pub(crate) use prepare::{attach, port_spec};
pub(crate) use reconcile::{in_background, lost, owned, reconcile, start};

/// What the agent holds in memory about containers. All else is in their folders and the state file.
#[derive(Debug)]
pub(crate) struct Containers {
    dir: PathBuf,
    watcher: watch::Watcher,
    /// One at a time changes a container.
    locks: Locks,
    /// Containers whose interfaces this process serves.
    served: Mutex<HashSet<String>>,
    /// What the manager could not be told yet.
    unsent: Mutex<Vec<control::Request>>,
    /// One at a time makes or removes mount points on the host.
    mount_points: Mutex<()>,
    /// Where their mounts stand.
    lost_mounts: lost_mounts::Places,
}

impl Containers {
    /// The containers whose folders are below `dir`.
    ///
    /// # Errors
    /// When the folder can't be made.
    pub(crate) fn new(dir: PathBuf) -> anyhow::Result<Self> {
        super::state::make_dir(&dir)?;
        Ok(Self {
            dir,
            watcher: watch::Watcher::new().context("can't watch processes")?,
            locks: Locks::default(),
            served: Mutex::default(),
            unsent: Mutex::default(),
            mount_points: Mutex::default(),
            lost_mounts: lost_mounts::Places::new(),
        })
    }

    /// Forgets what a manager could not be told: this host leaves its cluster.
    pub(super) fn forget_unsent(&self) {
        held(&self.unsent).clear();
    }

    /// The folder of the container `name`, whether it exists or not.
    fn folder(&self, name: &str) -> anyhow::Result<Folder> {
        name::check(name)?;
        Ok(Folder::at(self.dir.join(name)))
    }

    /// What serialises changes of the container `name`.
    fn lock(&self, name: &str) -> Arc<Mutex<()>> {
        self.locks.of(name)
    }

    /// All containers. A folder that can't be read is left alone and reported.
    pub(crate) fn all(&self) -> anyhow::Result<Vec<(Folder, Spec)>> {
        let mut found = Vec::new();
        for name in self.folders()? {
            let folder = self.folder(&name)?;
            match folder.spec() {
                Ok(Some(spec)) => found.push((folder, spec)),
                Ok(None) => {}
                Err(error) => tracing::warn!("container {name} is left alone: {error}"),
            }
        }
        found.sort_by(|(_, one), (_, other)| {
            (other.created, &other.name).cmp(&(one.created, &one.name))
        });
        Ok(found)
    }

    /// Names of folders that may be containers'.
    fn folders(&self) -> anyhow::Result<Vec<String>> {
        let unreadable = || format!("can't read the folder {}", self.dir.display());
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.dir).with_context(unreadable)? {
            if let Ok(name) = entry.with_context(unreadable)?.file_name().into_string()
                && control::is_valid_name(&name)
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// The container of this name, or the only one whose id begins so; an error when there is none.
    fn find(&self, name: &str) -> anyhow::Result<(Folder, Spec)> {
        self.look_up(name)?.with_context(|| {
            format!(
                "no container {} on this host: 'towline ps -a' lists them",
                control::quote(name)
            )
        })
    }

    /// As [`Self::find`], where none is no error.
    fn look_up(&self, name: &str) -> anyhow::Result<Option<(Folder, Spec)>> {
        let mut by_id = Vec::new();
        for (folder, spec) in self.all()? {
            if spec.name == name {
                return Ok(Some((folder, spec)));
            }
            if !name.is_empty() && spec.id.starts_with(name) {
                by_id.push((folder, spec));
            }
        }
        if by_id.len() > 1 {
            bail!(
                "{} containers have an id that begins with {name}: give more of it",
                by_id.len()
            );
        }
        Ok(by_id.pop())
    }
}

/// Answers a client or a shim.
///
/// # Errors
/// One line for the person who asked.
pub(crate) fn handle(agent: &Arc<Agent>, request: Request) -> anyhow::Result<Response> {
    Ok(match request {
        Request::Prepare(request) => Response::Prepared(prepare::prepare(agent, *request)?),
        Request::Started { name } => {
            reconcile::look(agent, &name)?;
            Response::Done
        }
        Request::Ended { name } => {
            clear::ended(agent, &name)?;
            Response::Done
        }
        Request::Abort { name, id } => {
            clear::aborted(agent, &name, &id)?;
            Response::Done
        }
        Request::Locate { name } => Response::Located(list::locate(agent, &name)?),
        Request::List { all } => Response::List(list::list(agent, all)?),
        Request::Remove {
            name,
            force,
            volumes,
            drain_timeout,
        } => {
            let drain = Drain::Within(drain_timeout);
            match clear::remove(agent, &name, force, volumes, drain)? {
                Some(name) => Response::Removed(name),
                None => Response::Done,
            }
        }
        Request::Stop {
            name,
            grace,
            drain_timeout,
        } => {
            let (grace, drain) = (Duration::from_secs(grace.into()), drain_timeout);
            let name = clear::stop(agent, &name, grace, Drain::Within(drain))?;
            Response::Stopped(name)
        }
        Request::Connect(connect) => Response::Changed(places::connect(agent, &connect)?),
        Request::Disconnect {
            container,
            network,
            force,
        } => Response::Changed(places::disconnect(agent, &container, &network, force)?),
    })
}

/// Does `work` while nobody else changes the container `name`; nothing when there is none.
///
/// # Errors
/// Those of `work`, and a state folder that can't be read.
pub(crate) fn locked(
    agent: &Agent,
    name: &str,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let lock = agent.containers.lock(name);
    let _held = held(&lock);
    let spec = agent.containers.folder(name)?.spec()?;
    match spec.filter(|spec| spec.phase == Phase::Ready) {
        Some(_) => work(),
        None => Ok(()),
    }
}

/// The host's end of a container's place on the gateway bridge: at most 15 characters (IFNAMSIZ - 1).
fn host_interface(spec: &Spec) -> String {
    format!("tl{}", spec.id)
}

/// Whether its shim lives. One that can't be looked at counts as living.
fn is_running(folder: &Folder, spec: &Spec) -> bool {
    spec.phase == Phase::Ready
        && folder.running().map_or(true, |running| {
            running.is_some_and(|running| running.shim.is_running())
        })
}

pub(crate) fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each use changes one entry at a time, so a panic elsewhere leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
