//! Follows the manager's news on a thread of its own, for as long as the
//! connection's events come.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use control::{Event, TableChange};
use crossbeam_channel::Receiver;
use vtep::Vni;

use super::{
    Agent, Member, announce, container, installed, manager, misdelivery, network, placement, port,
    services,
};

/// How long changes of tables that follow each other closely are gathered, so that the datapath gets them as one.
const GATHERED_AT_MOST: Duration = Duration::from_millis(2);

/// Starts following; ends when control does.
///
/// # Errors
/// When no thread can be made.
pub(super) fn start(agent: &Arc<Agent>, member: &Arc<Member>) -> anyhow::Result<()> {
    services::start(agent, member)?;
    let events = member.control.events().clone();
    // Not the member itself: the thread must not keep alive what ends it.
    let (agent, followed) = (Arc::clone(agent), Arc::downgrade(member));
    thread::Builder::new()
        .name("news".into())
        .spawn(move || {
            let mut next = None;
            while let Some(event) = next.take().or_else(|| events.recv().ok()) {
                let Some(member) = followed.upgrade() else {
                    break;
                };
                if let Event::Table { vni, changes } = event {
                    let mut news = vec![(vni, changes)];
                    next = gather(&events, &mut news);
                    tables(&member, &news);
                } else {
                    handle(&agent, &member, event);
                }
            }
        })
        .context("cannot start a thread")?;
    announce::start(member)?;
    misdelivery::start(member)
}

/// Takes the changes of tables that are there already, without waiting for any; returns the other event that ended them.
fn gather(events: &Receiver<Event>, news: &mut Vec<(Vni, Vec<TableChange>)>) -> Option<Event> {
    let start = Instant::now();
    while start.elapsed() < GATHERED_AT_MOST {
        match events.try_recv() {
            Ok(Event::Table { vni, changes }) => news.push((vni, changes)),
            other => return other.ok(),
        }
    }
    None
}

/// The datapath first: what a rule sends somewhere must find its way.
fn tables(member: &Member, news: &[(Vni, Vec<TableChange>)]) {
    member.follower.tables(news);
    for (vni, changes) in news {
        member.services.table(*vni, changes);
        member.names.table(*vni, changes);
    }
}

fn handle(agent: &Arc<Agent>, member: &Arc<Member>, event: Event) {
    match event {
        // Control logs its connections itself.
        Event::Connected { cluster, .. } => {
            member.port.connected();
            if cluster.ingress.is_none() {
                network::make_ingress(agent, member);
            }
            for warning in cluster.warnings {
                tracing::warn!("{warning}");
            }
            placement::tell(agent, member);
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
        Event::Table { vni, changes } => tables(member, &[(vni, changes)]),
        Event::NetworkChanged(network) => {
            member.names.network(&network);
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
            member.names.forget(vni);
        }
        Event::IdentityRenewed(identity) => {
            if let Err(error) = member.renew(agent, identity) {
                tracing::warn!("cannot keep the renewed certificate: {error:#}");
            }
        }
        Event::Inspect(inspection) => installed::report(member, inspection),
        Event::RowLost { vni, epoch } => container::lost(agent, vni, epoch),
        Event::Services { vni, services } => {
            member.names.services(vni, services.clone());
            member.services.services(vni, services);
        }
        Event::Ingress(vni) => member.services.ingress(vni),
        Event::Reached {
            vni,
            generation,
            revision,
        } => member.services.reached(vni, generation, revision),
        Event::CaughtUp(vni) => member.services.caught_up(vni),
        Event::Owned(owned) => container::owned(agent, &owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_that_wait_are_taken_together_and_nothing_overtakes() {
        let (send, events) = crossbeam_channel::unbounded();
        let table = |number: u32| {
            let vni = Vni::new(number).unwrap();
            Event::Table {
                vni,
                changes: Vec::new(),
            }
        };
        let vnis = |news: &[(Vni, Vec<TableChange>)]| {
            news.iter().map(|(vni, _)| vni.get()).collect::<Vec<_>>()
        };
        let removed = Event::NetworkRemoved(Vni::new(5000).unwrap());
        for event in [table(4097), removed, table(4098)] {
            send.send(event).unwrap();
        }
        let mut news = vec![(Vni::new(4096).unwrap(), Vec::new())];
        let next = gather(&events, &mut news);
        assert_eq!(vnis(&news), [4096, 4097]);
        assert!(matches!(next, Some(Event::NetworkRemoved(_))));
        assert!(gather(&events, &mut news).is_none(), "nobody is waited for");
        assert_eq!(vnis(&news), [4096, 4097, 4098]);
    }
}
