//! The UDP port of VXLAN while the agent runs: where this host receives, and where the cluster wants it to.
//!
//! The manager's list of hosts says what is wanted ([`PortKeeper::want`]); [`follow`] goes there if it can, tries again when it
//! can't, and tells the manager of both. Until the others have heard, what they send to the old port is lost. The TCP port of
//! control does not change.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use control::{HostView, Request, Response};
use vtep::datapath::StartError;
use vtep::flow::FIRST_SOURCE_PORT;

use super::network::unexpected;
use super::{Agent, Member, host};
use crate::api::{Host, Update};

/// How long connected hosts are given to follow, and how often they are looked at.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Where this host receives, and what is wanted.
#[derive(Debug)]
pub(crate) struct PortKeeper {
    state: Mutex<State>,
    /// Held by whoever changes the port.
    moving: Mutex<()>,
}

#[derive(Clone, Debug)]
struct State {
    current: u16,
    wanted: Option<u16>,
    /// Why this host is not where it should be.
    problem: Option<String>,
    /// What the manager has been told on this connection.
    told: Option<(u16, Option<String>)>,
}

impl PortKeeper {
    pub(super) fn new(current: u16) -> Self {
        Self {
            state: Mutex::new(State {
                current,
                wanted: None,
                problem: None,
                told: None,
            }),
            moving: Mutex::new(()),
        }
    }

    /// Where this host receives now.
    pub(super) fn current(&self) -> u16 {
        self.state().current
    }

    /// Why it does not receive where it should.
    pub(super) fn problem(&self) -> Option<String> {
        self.state().problem.clone()
    }

    /// The cluster wants this host here; `None`: nobody has said. Says whether that is new.
    pub(super) fn want(&self, port: Option<u16>) -> bool {
        std::mem::replace(&mut self.state().wanted, port) != port
    }

    /// A new connection: its hello has told a port, but perhaps one that was left meanwhile, and no problem.
    pub(super) fn connected(&self) {
        self.state().told = None;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Refuses a port that this host, or another, may send from.
///
/// # Errors
/// Says which ports can be had.
pub(super) fn check(port: u16) -> anyhow::Result<()> {
    if !(1..FIRST_SOURCE_PORT).contains(&port) {
        bail!(
            "invalid port {port}: choose one from 1 to {}, hosts send from the ports above",
            FIRST_SOURCE_PORT - 1
        );
    }
    Ok(())
}

/// Goes where the cluster wants this host, and tells the manager what it does not know.
pub(super) fn follow(agent: &Agent, member: &Member) {
    let keeper = &member.port;
    let _moving = keeper.moving.lock().unwrap_or_else(PoisonError::into_inner);
    let State {
        current, wanted, ..
    } = keeper.state().clone();
    let wanted = wanted.unwrap_or(current);
    let problem = if wanted == current {
        None
    } else {
        move_to(agent, member, wanted).err()
    };
    let now = {
        let mut state = keeper.state();
        if problem.is_none() {
            state.current = wanted;
        } else if problem != state.problem {
            tracing::warn!(
                "cannot receive VXLAN on port {wanted}: {}",
                problem.as_deref().unwrap_or_default()
            );
        }
        state.problem.clone_from(&problem);
        let now = (state.current, problem);
        if state.told.as_ref() == Some(&now) {
            return;
        }
        now
    };
    if member.control.status().connected_to.is_none() {
        return;
    }
    let (port, problem) = now.clone();
    match member.control.request(Request::TellPort { port, problem }) {
        Ok(_) => keeper.state().told = Some(now),
        // The next look says it again.
        Err(error) => tracing::debug!("the manager was not told of port {port}: {error}"),
    }
}

/// Receives on `port` from now on, also after a restart. Nothing is changed when it can't.
fn move_to(agent: &Agent, member: &Member, port: u16) -> Result<(), String> {
    member
        .datapath
        .listen_on(port)
        .map_err(|error| match error {
            StartError::PortTaken { holder, .. } => format!("UDP port {port} is taken by {holder}"),
            other => format!("{:#}", anyhow::Error::new(other)),
        })?;
    tracing::info!("receives VXLAN on UDP port {port} now");
    member.control.set_port(port);
    let saved = agent.state.update(|state| {
        if let Some(membership) = &mut state.membership {
            // The manager stays where it is.
            membership.control_port = membership.control_address().port();
            membership.port = port;
        }
    });
    if let Err(error) = saved {
        tracing::warn!("after a restart this host begins with its old VXLAN port: {error:#}");
    }
    Ok(())
}

/// Has the whole cluster change, and waits for the hosts that are up. All hosts come back, with what each has made of it.
///
/// # Errors
/// When the manager refuses, or can't be asked.
pub(super) fn update(agent: &Arc<Agent>, wanted: &Update) -> anyhow::Result<Vec<Host>> {
    let member = agent.member()?;
    let port = wanted.vxlan_port;
    member.control.request(Request::SetVxlanPort(port))?;
    let deadline = Instant::now() + FOLLOWED_WITHIN;
    loop {
        let Response::Hosts(views) = member.control.request(Request::Hosts)? else {
            return Err(unexpected());
        };
        let waits = views.iter().any(|view| is_under_way(view, port));
        if !waits || Instant::now() >= deadline {
            if views.iter().all(|view| view.wanted_port != Some(port)) {
                bail!("somebody else has just chosen another VXLAN port: see 'towline host ls'");
            }
            return Ok(host::shown(views, member.host.id));
        }
        thread::sleep(LOOK_EVERY);
    }
}

fn is_under_way(view: &HostView, port: u16) -> bool {
    view.up
        && view.wanted_port == Some(port)
        && view.info.port != port
        && view.port_problem.is_none()
}
