//! Ports in namespaces that somebody else made: attached where the namespace is, let go where it is not, removed when the file says so.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use control::{Endpoint, Epoch, Network};
use netns::Netns;
use vtep::Vni;
use vtep::datapath::DatapathError;
use vtep::fdb::PortId;
use vtep::tap::TapError;

use super::file::Place;
use super::{Agent, Member, StaticTables};
use crate::agent::container::{attach, port_spec};
use crate::agent::state::EndpointRecord;

/// What this process serves, and what it could not.
#[derive(Debug, Default)]
pub(super) struct Served {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By port: the namespace it is in.
    ports: HashMap<u32, (u64, u64)>,
    /// By endpoint: why it is not served.
    problems: BTreeMap<(Vni, Epoch), String>,
}

impl Served {
    /// What is not as the file says, a line for each.
    pub(super) fn problems(&self) -> Vec<String> {
        self.lock().problems.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes what the file wants and is not there, and removes what it does not want. Cheap when nothing has changed.
pub(super) fn settle(agent: &Agent, member: &Member, tables: &StaticTables) {
    let plan = Arc::clone(&tables.lock().plan);
    let placed: HashMap<(Vni, Epoch), _> = plan
        .placed()
        .map(|(planned, endpoint)| {
            (
                (planned.network.vni, endpoint.endpoint.epoch),
                (planned, endpoint),
            )
        })
        .collect();
    let mut kept = HashMap::new();
    let recorded = records(agent);
    tables.ports.lock().problems.retain(|key, _| {
        placed.contains_key(key)
            || recorded
                .iter()
                .any(|known| (known.vni, known.epoch) == *key)
    });
    for record in recorded {
        let key = (record.vni, record.epoch);
        let wanted = placed.get(&key);
        if wanted.is_some_and(|(planned, endpoint)| endpoint.is(&record, planned.network.mtu)) {
            kept.insert(key, record);
            continue;
        }
        let removed = remove(agent, member, tables, &record);
        let problem = removed.err().map(|error| {
            format!(
                "the port of {} can't be removed: {error:#}",
                record.container
            )
        });
        note(tables, key, problem);
    }
    for (key, (planned, endpoint)) in placed {
        let Some(place) = &endpoint.place else {
            continue;
        };
        let network = &planned.network;
        let record = kept.remove(&key);
        let served = serve(
            agent,
            member,
            tables,
            &endpoint.endpoint,
            place,
            network,
            record,
        );
        let problem = served.err().map(|error| {
            format!(
                "{} of the namespace {} is not on network {}: {error:#}",
                place.ifname, place.netns, network.name
            )
        });
        note(tables, key, problem);
    }
}

/// Takes all of them away.
///
/// # Errors
/// Names the first that could not be removed; the others are.
pub(super) fn remove_all(
    agent: &Agent,
    member: &Member,
    tables: &StaticTables,
) -> anyhow::Result<()> {
    let mut failed = Ok(());
    for record in records(agent) {
        let removed = remove(agent, member, tables, &record);
        failed = failed.and(removed.with_context(|| {
            format!(
                "can't remove {} of the namespace {}",
                record.ifname, record.container
            )
        }));
    }
    failed
}

/// Attaches one endpoint, or takes it up, or lets it go where its namespace is gone.
fn serve(
    agent: &Agent,
    member: &Member,
    tables: &StaticTables,
    endpoint: &Endpoint,
    place: &Place,
    network: &Network,
    record: Option<EndpointRecord>,
) -> anyhow::Result<()> {
    let served = record
        .as_ref()
        .and_then(|record| tables.ports.lock().ports.get(&record.port).copied());
    let netns = match Netns::open(&place.netns) {
        Ok(netns) => netns,
        Err(error) => {
            // A queue that is kept open would keep the namespace alive.
            release(member, tables, record.as_ref());
            return Err(error).context("it is attached once the namespace is there");
        }
    };
    if served == Some(netns.id()) {
        return Ok(());
    }
    release(member, tables, record.as_ref());
    member.enter_network(agent, network)?;
    let adopted = match &record {
        Some(record) => adopt(member, &netns, record)?,
        None => false,
    };
    let record = match record {
        Some(record) => record,
        None => new_record(agent, endpoint, place, network)?,
    };
    if !adopted && let Err(error) = attach(member, &netns, &record, network) {
        // What was begun goes; the next look tries again.
        member.datapath.detach(PortId(record.port))?;
        forget(agent, &record)?;
        return Err(error);
    }
    tables.ports.lock().ports.insert(record.port, netns.id());
    let verb = if adopted { "took up" } else { "attached" };
    tracing::info!("{verb} {} of the namespace {}", record.ifname, place.netns);
    Ok(())
}

/// Takes up an interface that an agent before has made; false when it is not there.
fn adopt(member: &Member, netns: &Netns, record: &EndpointRecord) -> anyhow::Result<bool> {
    match member.datapath.adopt(&port_spec(netns, record)) {
        Ok(()) => Ok(true),
        Err(DatapathError::Tap {
            source: TapError::Missing(_),
            ..
        }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Lets go of a port's namespace.
fn release(member: &Member, tables: &StaticTables, record: Option<&EndpointRecord>) {
    let Some(record) = record else { return };
    if tables.ports.lock().ports.remove(&record.port).is_some()
        && let Err(error) = member.datapath.release(PortId(record.port))
    {
        tracing::warn!("port {} is not let go of: {error}", record.port);
    }
}

/// Removes a port, its interface and its record.
fn remove(
    agent: &Agent,
    member: &Member,
    tables: &StaticTables,
    record: &EndpointRecord,
) -> anyhow::Result<()> {
    let served = tables.ports.lock().ports.remove(&record.port).is_some();
    if !served && let Ok(netns) = Netns::open(&record.container) {
        // Made by an agent before: it stays until somebody who holds it lets it go. Another's interface of that name is left alone.
        if let Err(error) = adopt(member, &netns, record) {
            tracing::warn!(
                "{} of the namespace {} stays: {error:#}",
                record.ifname,
                record.container
            );
        }
    }
    member.datapath.detach(PortId(record.port))?;
    forget(agent, record)?;
    member.leave_idle_network(agent, record.vni)?;
    tracing::info!(
        "removed {} of the namespace {}",
        record.ifname,
        record.container
    );
    Ok(())
}

fn forget(agent: &Agent, record: &EndpointRecord) -> anyhow::Result<()> {
    agent
        .state
        .update(|state| state.endpoints.retain(|known| known.port != record.port))
}

fn new_record(
    agent: &Agent,
    endpoint: &Endpoint,
    place: &Place,
    network: &Network,
) -> anyhow::Result<EndpointRecord> {
    agent.state.update(|state| {
        let record = EndpointRecord {
            netns: Some(place.netns.clone()),
            ..state.new_endpoint(
                endpoint.clone(),
                place.ifname.clone(),
                network.mtu,
                agent.config.backend,
            )
        };
        state.endpoints.push(record.clone());
        record
    })
}

/// Ports of this kind that are recorded.
fn records(agent: &Agent) -> Vec<EndpointRecord> {
    agent.state.read(|state| {
        let records = state.endpoints.iter();
        records
            .filter(|record| record.netns.is_some())
            .cloned()
            .collect()
    })
}

/// Keeps what is wrong with an endpoint; said in the log when it is new.
fn note(tables: &StaticTables, key: (Vni, Epoch), problem: Option<String>) {
    let mut state = tables.ports.lock();
    match problem {
        None => drop(state.problems.remove(&key)),
        Some(problem) => {
            if state.problems.get(&key) != Some(&problem) {
                tracing::warn!("{problem}");
                state.problems.insert(key, problem);
            }
        }
    }
}
