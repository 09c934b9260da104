//! Follows the manager's news on a thread of its own, for as long as the
//! connection's events come.

use std::sync::Arc;
use std::thread;

use anyhow::Context as _;
use control::Event;

use super::{Agent, Member, announce, container, installed, manager, misdelivery, port};

/// Starts following; ends when control does.
///
/// # Errors
/// When no thread can be made.
pub(super) fn start(agent: &Arc<Agent>, member: &Arc<Member>) -> anyhow::Result<()> {
    let events = member.control.events().clone();
    // Not the member itself: the thread must not keep alive what ends it.
    let (agent, followed) = (Arc::clone(agent), Arc::downgrade(member));
    thread::Builder::new()
        .name("news".into())
        .spawn(move || {
            for event in events {
                let Some(member) = followed.upgrade() else {
                    break;
                };
                handle(&agent, &member, event);
            }
        })
        .context("cannot start a thread")?;
    announce::start(member)?;
    misdelivery::start(member)
}

fn handle(agent: &Arc<Agent>, member: &Arc<Member>, event: Event) {
    match event {
        // Control logs its connections itself.
        Event::Connected { cluster, .. } => {
            member.port.connected();
            for warning in cluster.warnings {
                tracing::warn!("{warning}");
            }
            if let Err(error) = manager::stand_by(agent, member) {
                tracing::warn!("this host does not stand by as a manager: {error:#}");
            }
        }
        Event::Disconnected { .. } => {}
        Event::Hosts(views) => {
            manager::keep_managers(agent, member);
            let own = views.iter().find(|view| view.info.id == member.host.id);
            let wanted = own.and_then(|view| view.wanted_port);
            member.follower.hosts(views);
            if member.port.want(wanted) {
                port::follow(agent, member);
            }
        }
        Event::Table { vni, changes } => member.follower.table(vni, &changes),
        Event::NetworkChanged(network) => {
            let known = agent
                .state
                .read(|state| state.networks.iter().any(|known| known.vni == network.vni));
            if known && let Err(error) = member.enter_network(agent, &network) {
                tracing::warn!(
                    "cannot remember the change of network {}: {error:#}",
                    network.name
                );
            }
        }
        Event::NetworkRemoved(vni) => {
            tracing::info!("the network with VNI {vni} is gone from the cluster");
            member.follower.clear(vni);
        }
        Event::IdentityRenewed(identity) => {
            if let Err(error) = member.renew(agent, identity) {
                tracing::warn!("cannot keep the renewed certificate: {error:#}");
            }
        }
        Event::Inspect(inspection) => installed::report(member, inspection),
        Event::RowLost { vni, epoch } => container::lost(agent, vni, epoch),
        Event::Owned(owned) => container::owned(agent, &owned),
    }
}
