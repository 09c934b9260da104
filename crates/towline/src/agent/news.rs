//! Follows the manager's news on a thread of its own, for as long as the
//! connection's events come.

use std::collections::HashSet;
use std::sync::Arc;
use std::thread;

use anyhow::Context as _;
use control::{Event, Owned, Request};

use super::{Agent, Member, container};

/// Starts following; ends when control does.
///
/// # Errors
/// When no thread can be made.
pub(super) fn start(agent: &Arc<Agent>, member: &Arc<Member>) -> anyhow::Result<()> {
    let events = member.control.events().clone();
    // Not the member itself: the thread must not keep alive what ends it.
    let (agent, member) = (Arc::clone(agent), Arc::downgrade(member));
    thread::Builder::new()
        .name("news".into())
        .spawn(move || {
            for event in events {
                let Some(member) = member.upgrade() else { break };
                handle(&agent, &member, event);
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

fn handle(agent: &Arc<Agent>, member: &Arc<Member>, event: Event) {
    match event {
        Event::Connected { manager, cluster } => {
            tracing::info!("connected to the manager at {manager}");
            for warning in cluster.warnings {
                tracing::warn!("{warning}");
            }
        }
        Event::Disconnected { reason } => {
            tracing::warn!("no manager: {reason}; containers go on with what is known");
        }
        Event::Hosts(views) => member.follower.hosts(views),
        Event::Table { vni, changes } => member.follower.table(vni, &changes),
        Event::NetworkChanged(network) => {
            let known = agent.state.read(|state| state.networks.iter().any(|known| known.vni == network.vni));
            if known && let Err(error) = member.enter_network(agent, &network) {
                tracing::warn!("cannot remember the change of network {}: {error:#}", network.name);
            }
        }
        Event::NetworkRemoved(vni) => {
            tracing::warn!("the network with VNI {vni} is gone from the cluster");
            member.follower.clear(vni);
        }
        Event::RowLost { vni, epoch } => container::endpoint_lost(agent, vni, epoch),
        Event::Owned(owned) => {
            let (agent, member) = (Arc::clone(agent), Arc::clone(member));
            // Not here: it waits for a `run` that is under way, which waits for news.
            let spawned = thread::Builder::new()
                .name("owned".into())
                .spawn(move || give_back_unknown(&agent, &member, owned));
            if let Err(error) = spawned {
                tracing::warn!("cannot start a thread: {error}");
            }
        }
    }
}

/// What the manager holds for this host and this host does not know was given out
/// in an exchange that a crash cut short.
fn give_back_unknown(agent: &Agent, member: &Member, owned: Owned) {
    let _changing = agent.changing();
    let known: HashSet<_> =
        agent.state.read(|state| state.endpoints.iter().map(|endpoint| (endpoint.vni, endpoint.epoch)).collect());
    let endpoints = owned
        .endpoints
        .into_iter()
        .filter(|endpoint| !known.contains(&(endpoint.vni, endpoint.epoch)))
        .map(|endpoint| Request::Free { vni: endpoint.vni, epoch: endpoint.epoch });
    let names = owned
        .names
        .into_iter()
        .filter(|name| !agent.containers_dir().join(name).exists())
        .map(Request::ReleaseName);
    for request in endpoints.chain(names) {
        if let Err(error) = member.control.request(request.clone()) {
            tracing::warn!("cannot give back what this host does not use ({request:?}): {error}");
        }
    }
}
