//! The cluster's hosts.

use std::collections::BTreeMap;

use anyhow::bail;
use control::{HostView, Request, Response, events};

use super::network::unexpected;
use super::{Agent, manager};
use crate::api::Host;

/// All hosts, as the manager sees them.
pub(super) fn list(agent: &Agent) -> anyhow::Result<Vec<Host>> {
    let member = agent.member()?;
    let Response::Hosts(views) = member.control.request(Request::Hosts)? else {
        return Err(unexpected());
    };
    let mut hosts = shown(views, member.host.id);
    if member.control.static_tables().is_some() {
        // Nobody asks whether they live.
        for host in &mut hosts {
            "static".clone_into(&mut host.state);
        }
    }
    Ok(hosts)
}

/// Hosts as they are shown, on the host `own`.
pub(super) fn shown(views: Vec<HostView>, own: control::HostId) -> Vec<Host> {
    views.into_iter().map(|view| host(view, own)).collect()
}

/// What happened in the cluster from there on.
pub(super) fn events(agent: &Agent, from: events::From) -> anyhow::Result<events::Told> {
    match agent.member()?.control.request(Request::Events(from))? {
        Response::Events(told) => Ok(told),
        _ => Err(unexpected()),
    }
}

/// Gives a host labels, and takes some from it.
pub(super) fn update(
    agent: &Agent,
    host: String,
    add: BTreeMap<String, String>,
    remove: Vec<String>,
) -> anyhow::Result<()> {
    let member = agent.member()?;
    member
        .control
        .request(Request::LabelHost { host, add, remove })?;
    Ok(())
}

/// Has the manager forget a host for good.
pub(super) fn remove(agent: &Agent, name: &str, force: bool) -> anyhow::Result<()> {
    let member = agent.member()?;
    if name == member.host.name || name == member.host.id.to_string() {
        bail!("'{name}' is this host: run 'towline leave' instead");
    }
    member.control.request(Request::RemoveHost {
        host: name.to_owned(),
        force,
    })?;
    Ok(())
}

fn host(view: HostView, own: control::HostId) -> Host {
    let role = manager::role_of(&view).to_owned();
    Host {
        id: view.info.id.to_string(),
        this: view.info.id == own,
        name: view.info.name,
        vtep: view.info.vtep,
        port: view.info.port,
        wanted_port: view.wanted_port,
        port_problem: view.port_problem,
        link_mtu: view.info.link_mtu,
        state: if view.up { "up" } else { "down" }.to_owned(),
        last_seen_ms: view.last_seen_ms_ago,
        manager: view.manager,
        role,
        labels: view.traits.labels,
        own_labels: view.traits.own_labels,
        platform: view.traits.platform,
    }
}
