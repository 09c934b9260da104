//! The cluster's manager on this host: run here, stood by for, taken over, handed on.

use std::fs;
use std::io::ErrorKind;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use control::{
    Authority, Epoch, ManagerConfig, ManagerHandle, RedbStore, Request, Response, Role, WallClock,
};
use vtep::datapath::Datapath;

use super::keys::Keys;
use super::network::unexpected;
use super::path::DatapathProber;
use super::state::{Membership, make_dir};
use super::{Agent, Member};

/// A manager that was heard so lately may be back in a moment.
const QUIET_MS: u64 = 3000;

/// Starts the manager on this host. With an empty store it succeeds the manager whose highest epoch is given.
///
/// # Errors
/// Without the authority, when the port is taken, or when the store cannot be used.
pub(super) fn start(
    agent: &Agent,
    settled: &Membership,
    keys: &Keys,
    datapath: &Arc<dyn Datapath>,
    succeeds: Option<Epoch>,
) -> anyhow::Result<ManagerHandle> {
    make_dir(&agent.store_dir())?;
    let authority = keys.authority.clone().context(
        "this host is the manager, but its authority.pem is gone: put it back into the state folder, or begin \
         again with 'towline leave --force' and 'towline init --ca' with a copy",
    )?;
    Ok(ManagerHandle::start(ManagerConfig {
        listen: settled.control_address(),
        host: keys.identity.certificate().host,
        store: Box::new(RedbStore::open(&agent.store_dir())?),
        authority,
        lifetime: agent.config.cert_expiry,
        prober: Arc::new(DatapathProber::new(Arc::clone(datapath))),
        pools: if settled.pools.is_empty() {
            agent.config.pools.clone()
        } else {
            settled.pools.clone()
        },
        clock: WallClock::default(),
        succeeds,
    })?)
}

/// Tells a manager that this host stands by for it, and keeps the authority. Nothing for a worker, or where the manager runs.
///
/// # Errors
/// What the manager refused, or a file that cannot be written.
pub(super) fn stand_by(agent: &Agent, member: &Member) -> anyhow::Result<()> {
    let Ok(keys) = member.keys() else {
        // Static mode: there is none to stand by for.
        return Ok(());
    };
    if keys.identity.certificate().role != Role::Manager || member.runs_manager() {
        return Ok(());
    }
    let listen = member.settled.control_address();
    let Response::Authority(pem) = member.control.request(Request::StandBy { listen })? else {
        return Err(unexpected());
    };
    let authority = Authority::from_pem(&pem.0)?;
    if authority.digest() != keys.identity.digest() {
        bail!("the manager sent the authority of another cluster");
    }
    if keys.authority.is_none() {
        member.keep_authority(agent, Arc::new(authority))?;
        tracing::info!(
            "this host stands by: 'towline promote' makes it the manager should that be lost"
        );
    }
    Ok(())
}

/// Makes this host the manager in the place of one that is gone.
///
/// # Errors
/// While a manager answers, on a host that joined as a worker, and as [`start`].
pub(super) fn promote(agent: &Agent) -> anyhow::Result<()> {
    let _changing = agent.changing();
    let member = agent.member()?;
    if member.runs_manager() {
        bail!("this host is the manager already");
    }
    let keys = member.keys()?;
    if keys.authority.is_none() {
        bail!(
            "this host does not stand by as a manager: only hosts that joined with a token of 'towline token manager' can be promoted"
        );
    }
    let control = member.control.status();
    if let Some(manager) = control.connected_to {
        bail!(
            "the manager at {manager} answers, and a cluster has one: run 'towline leave' there first"
        );
    }
    if control.since_ms.is_some_and(|since| since < QUIET_MS) {
        bail!("the manager was heard a moment ago: try again in 3 s, should it not come back");
    }
    // What an earlier time as manager left is older than what the cluster has become.
    remove_store(agent)?;
    let succeeds = Some(member.control.last_epoch());
    let manager = start(agent, &member.settled, &keys, &member.datapath, succeeds)?;
    member.set_manager(Some(manager));
    agent.state.update(|state| {
        if let Some(membership) = &mut state.membership {
            membership.manager = true;
        }
    })
}

/// Hands on, where another host has become the manager meanwhile: this one stands by again.
pub(super) fn look(agent: &Agent) {
    let _changing = agent.changing();
    let Ok(member) = agent.member() else { return };
    let Some(reason) = member.manager_stood_down() else {
        return;
    };
    tracing::warn!("this host is the manager no more: {reason}");
    member.set_manager(None);
    let done = agent
        .state
        .update(|state| {
            if let Some(membership) = &mut state.membership {
                membership.manager = false;
            }
        })
        .and_then(|()| remove_store(agent));
    if let Err(error) = done {
        tracing::warn!("cannot forget that this host was the manager: {error:#}");
    }
    // Where the other manager has taken this host in before the line above; else it is told when it does.
    if let Err(error) = stand_by(agent, &member) {
        tracing::debug!("this host does not stand by yet: {error:#}");
    }
}

/// Keeps for the next start where managers listen.
pub(super) fn keep_managers(agent: &Agent, member: &Member) {
    let managers = member.control.status().managers;
    let known = agent.state.read(|state| {
        let membership = state.membership.as_ref();
        membership.is_none_or(|membership| membership.managers == managers)
    });
    if known {
        return;
    }
    let kept = agent.state.update(|state| {
        if let Some(membership) = &mut state.membership {
            membership.managers = managers;
        }
    });
    if let Err(error) = kept {
        tracing::warn!("cannot remember where managers listen: {error:#}");
    }
}

/// How this host takes part: `manager`, `standby`, `member`, or `static` where a file is in a manager's place.
pub(super) fn role(member: &Member) -> &'static str {
    if member.runs_manager() {
        return "manager";
    }
    match member.keys() {
        Err(_) => "static",
        Ok(keys) if keys.authority.is_some() => "standby",
        Ok(_) => "member",
    }
}

/// The host with this id, as it is listed: `manager`, `standby` or `member`.
pub(super) fn role_of(view: &control::HostView) -> &'static str {
    match (view.manager, view.control) {
        (true, _) => "manager",
        (false, Some(_)) => "standby",
        (false, None) => "member",
    }
}

/// The manager's store goes with the manager.
///
/// # Errors
/// When the folder cannot be removed.
pub(super) fn remove_store(agent: &Agent) -> anyhow::Result<()> {
    let dir = agent.store_dir();
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
