//! Takes a member out of its service before it ends: no host sends it new connections, and the open ones come to their end.
//!
//! Connections are TCP's, as the sockets in the member's namespace know them: so those by a virtual address, by a port of every host, by a
//! port of this host and to the member's own address are all seen, whatever rules stand. UDP has none to wait for: its flows are
//! led to other members.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use netns::{Netns, TcpSockets};

use super::{Agent, publish};
use crate::agent::Member;
use crate::agent::state::EndpointRecord;

/// How often open connections are counted.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What becomes of a member's open connections.
#[derive(Clone, Copy, Debug)]
pub(super) enum Drain {
    /// They end with it.
    No,
    /// They are given so many seconds; none: as many as the service says.
    Within(Option<u32>),
}

impl Drain {
    /// Waits until the container `name` can end, or its time is up. One that is no member waits for nothing.
    pub(super) fn wait(self, agent: &Agent, name: &str) {
        let Self::Within(given) = self else { return };
        let Ok(member) = agent.member() else { return };
        let records: Vec<EndpointRecord> = agent.state.read(|state| {
            let records = state.endpoints.iter();
            records
                .filter(|record| record.container == name && record.member.is_some())
                .cloned()
                .collect()
        });
        let Some(part) = records.iter().find_map(|record| record.member) else {
            return;
        };
        let service = member.services.by_epoch(part.service);
        let of_service = service.map_or(0, |service| service.spec.drain_timeout);
        let limit = Duration::from_secs(given.unwrap_or(of_service).into());
        let deadline = Instant::now() + limit;
        member.services.drain(name);
        if let Err(error) = publish::drain(agent, &member, name) {
            tracing::warn!("container {name}: its own ports take new connections still: {error:#}");
        }
        for record in &records {
            confirm(&member, name, record, deadline);
        }
        let mut ips: HashSet<IpAddr> = records
            .iter()
            .flat_map(|record| &record.ips)
            .copied()
            .collect();
        ips.extend(gateway(agent, name));
        if let Err(error) = wait_for_connections(name, &ips, deadline) {
            tracing::warn!(
                "container {name} ends at once, its connections cannot be seen: {error:#}"
            );
        }
    }
}

/// Waits until every host that sends connections to a member has stopped doing so.
fn confirm(member: &Member, name: &str, record: &EndpointRecord, deadline: Instant) {
    while Instant::now() < deadline {
        match member.control.confirmed(record.vni, record.epoch) {
            Ok(waiting) if waiting.is_empty() => return,
            Ok(waiting) if Instant::now() >= deadline => {
                tracing::warn!(
                    "container {name} ends, though these hosts may still send it connections: {}",
                    waiting.join(", ")
                );
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!("other hosts do not learn that container {name} ends: {error}");
                return;
            }
        }
    }
}

/// Where connections to this host's own ports of a container arrive.
fn gateway(agent: &Agent, name: &str) -> Vec<IpAddr> {
    agent.state.read(|state| {
        let mut records = state.attachments.iter();
        let record = records.find(|record| record.container == name && !record.publish.is_empty());
        record.map_or_else(Vec::new, |record| {
            vec![record.addresses.0.into(), record.addresses.1.into()]
        })
    })
}

/// Waits until nobody has a connection to these addresses of a container.
fn wait_for_connections(
    name: &str,
    ips: &HashSet<IpAddr>,
    deadline: Instant,
) -> anyhow::Result<()> {
    // One to a port that is listened on was made by a client. A server may stop listening while it is drained.
    let mut served = HashSet::<u16>::new();
    loop {
        // Not kept: an open file of a namespace keeps it.
        let sockets = TcpSockets::of(&Netns::open(name)?)?;
        served.extend(&sockets.listening);
        let open = sockets
            .open
            .iter()
            .filter(|connection| ips.contains(&connection.local.ip()))
            .filter(|connection| served.contains(&connection.local.port()))
            // With itself it needs no time.
            .filter(|connection| !ips.contains(&connection.remote.ip()))
            .count();
        if open == 0 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            tracing::warn!(
                "container {name} ends with {open} open connections: its drain timeout has passed"
            );
            return Ok(());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
