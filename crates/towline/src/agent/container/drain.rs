//! Takes a member out of its service before it ends: no host sends it new connections, and the open ones come to their end.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use netns::conntrack::Filter;
use netns::{NetfilterSocket, Netns};

use super::Agent;
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
        for record in &records {
            confirm(&member, name, record, deadline);
        }
        if let Err(error) = wait_for_connections(name, &records, deadline) {
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

/// Waits until nobody has a connection to these addresses.
fn wait_for_connections(
    name: &str,
    records: &[EndpointRecord],
    deadline: Instant,
) -> anyhow::Result<()> {
    loop {
        // Not kept: an open socket would keep the namespace.
        let mut socket = NetfilterSocket::open(&Netns::open(name)?)?;
        let mut open = 0;
        for ip in records.iter().flat_map(|record| &record.ips) {
            let connections = socket
                .connections(&Filter::new().original_destination(*ip))
                .context("can't list connections")?;
            open += connections
                .iter()
                .filter(|connection| connection.is_open())
                .count();
        }
        drop(socket);
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
