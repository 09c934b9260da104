//! A running container's places in networks: one more, or one less.
//!
//! ```text
//! connect:     address ─▶ Coming ─▶ interface ─▶ gateway? ─▶ Whole ─▶ rules, news
//! disconnect:  drained? ─▶ Going ─▶ rules ─▶ gateway? ─▶ interface ─▶ address freed
//! ```
//!
//! What is `Coming` or `Going` stands in the state file, so that an agent that was killed in between takes a half-made place
//! away, and goes on taking away the other. No other interface of the container is touched.

use std::sync::Arc;

use anyhow::{Context as _, bail};
use control::{EndpointState, Network, quote};
use discovery::InstalledMember;
use discovery::plan::MEMBER_INTERFACE;
use netns::{NetfilterSocket, Netlink, Netns};
use vtep::fdb::PortId;

use super::drain::Drain;
use super::{
    Agent, clear, gateway, held, in_background, is_running, locked, name, prepare, reconcile,
};
use crate::agent::state::{EndpointRecord, Standing};
use crate::agent::{Member, names};
use crate::api::container::Connect;
use crate::shim::folder::{Folder, Spec};

/// Gives a running container a place in one more network. Returns what the operator should know.
///
/// # Errors
/// When it does not run here, is there already, or the manager or the kernel refuses: nothing of it is left then.
pub(super) fn connect(agent: &Arc<Agent>, wanted: &Connect) -> anyhow::Result<Vec<String>> {
    // `leave` can't come between.
    let _changing = agent.changing();
    let member = agent.member()?;
    no_file(&member)?;
    let aliases = name::aliases(&wanted.aliases)?;
    let (folder, spec) = agent.containers.find(&wanted.container)?;
    let lock = agent.containers.lock(&spec.name);
    let _held = held(&lock);
    let spec = running(agent, &folder, &spec)?;
    // It has the name: this asks who hands out addresses now.
    let source = prepare::claim(&member, &spec.name)?;
    let network = source.network(agent, &member, &wanted.network)?;
    check(agent, &spec, &network)?;
    gateway::check_subnets(&member, &network)?;
    let ips = wanted.ips.clone();
    let mut endpoint = source.endpoint(&member, &spec, &network, ips, None, None)?;
    endpoint.names = Some(name::names(&spec, aliases));
    let netns = Netns::open(&spec.name)?;
    let ifname = gateway::free_ethernet(agent, &netns, &spec.name)?;
    let record = agent.state.update(|state| {
        let backend = agent.config.backend;
        let mut record = state.new_endpoint(endpoint, ifname, network.mtu, backend);
        record.standing = Standing::Coming;
        // It was started without a network: the gateway bridge stays its own.
        let mut endpoints = state.endpoints.iter();
        if !endpoints.any(|other| other.container == spec.name) {
            let mut attachments = state.attachments.iter_mut();
            if let Some(own) = attachments.find(|own| own.container == spec.name) {
                own.own = true;
            }
        }
        state.endpoints.push(record.clone());
        record
    })?;
    let made = prepare::attach(&member, &netns, &record, &network)
        .and_then(|()| gateway::settle(agent, &member, &netns, &spec))
        .and_then(|()| {
            // Before it counts as whole: nobody would look at the file again.
            names::follow(agent, &folder, &spec, Some(&record));
            stand(agent, &record, Standing::Whole)
        })
        .with_context(|| format!("can't attach {} to the network {}", spec.name, network.name));
    if let Err(error) = made {
        undo(agent, &member, &netns, &spec, &record);
        names::follow(agent, &folder, &spec, None);
        return Err(error);
    }
    let mut warnings = Vec::new();
    warnings.extend(source.warning(&member, std::slice::from_ref(&record)));
    warnings.extend(prepare::late_table(&member, &network));
    // Other hosts send frames from here on.
    member.control.publish(record.endpoint(), EndpointState::Up);
    changed(agent, &member, &spec.name);
    Ok(warnings)
}

/// Takes a running container's place in a network away; with `force` also a member's, which is drained first. Returns what the
/// operator should know.
///
/// # Errors
/// When it has no place there, or the kernel refuses: the agent goes on with it then.
pub(super) fn disconnect(
    agent: &Arc<Agent>,
    container: &str,
    network: &str,
    force: bool,
) -> anyhow::Result<Vec<String>> {
    let member = agent.member()?;
    no_file(&member)?;
    let (folder, spec) = agent.containers.find(container)?;
    if !is_running(&folder, &spec) {
        return Err(not_running(&spec));
    }
    let record = place(agent, &member, &spec, network)?;
    if record.ifname == MEMBER_INTERFACE {
        bail!(
            "container {} has its place on this network by its service, which publishes ports: it goes with the service's network",
            spec.name
        );
    }
    if let Some(part) = record.member {
        let service = member.services.by_epoch(part.service);
        let service = service.map_or_else(|| part.service.to_string(), |known| known.spec.name);
        if !force {
            bail!(
                "container {0} is a member of service {service} on this network: 'towline rm -f {0}' drains and removes it, \
                 'towline network disconnect -f' drains it and takes it out of the service",
                spec.name
            );
        }
        // Not under the lock: it lasts as long as open connections may.
        Drain::Within(None).wait(agent, &spec.name);
    }
    // `leave` can't come between.
    let _changing = agent.changing();
    let lock = agent.containers.lock(&spec.name);
    let _held = held(&lock);
    let spec = running(agent, &folder, &spec)?;
    let netns = Netns::open(&spec.name)?;
    let going = agent.state.update(|state| {
        let goes = |other: &EndpointRecord| {
            let same = (other.vni, other.epoch) == (record.vni, record.epoch);
            let by_service = record.member.is_some() && other.ifname == MEMBER_INTERFACE;
            other.container == spec.name && (same || by_service)
        };
        let records = state.endpoints.iter_mut().filter(|other| goes(other));
        records
            .map(|going| {
                going.standing = Standing::Going;
                going.clone()
            })
            .collect::<Vec<_>>()
    })?;
    // The rules first: nothing is led to a place that goes.
    changed(agent, &member, &spec.name);
    names::follow(agent, &folder, &spec, None);
    gateway::settle(agent, &member, &netns, &spec)?;
    // Before what may fail: who has no way out asks nobody outside.
    member.names.refresh(agent, &spec.name);
    for record in &going {
        discard(agent, &member, &netns, record)?;
    }
    for record in &going {
        member.leave_idle_network(agent, record.vni)?;
    }
    // It may have no way out any more.
    member.names.refresh(agent, &spec.name);
    let closed = agent
        .state
        .read(|state| state.closed_ports.contains_key(&spec.name));
    Ok(closed
        .then(|| ports_closed(&spec.name))
        .into_iter()
        .collect())
}

/// Takes a running container's place on the network of published ports away, if it is a member of no service any more. Returns at
/// once; what could not be taken away is the next agent's to finish.
pub(crate) fn leave_ingress(agent: &Arc<Agent>, container: &str) {
    let (agent, container) = (Arc::clone(agent), container.to_owned());
    in_background("ingress-leave", move || {
        let _changing = agent.changing();
        let Ok(member) = agent.member() else { return };
        let left = locked(&agent, &container, || {
            let records = agent.state.read(|state| {
                let records = state.endpoints.iter();
                let own = records.filter(|record| record.container == container);
                own.cloned().collect::<Vec<_>>()
            });
            let (places, others): (Vec<_>, Vec<_>) = records
                .into_iter()
                .partition(|record| record.ifname == MEMBER_INTERFACE);
            if others.iter().any(|record| record.member.is_some()) {
                return Ok(());
            }
            let netns = Netns::open(&container)?;
            for record in &places {
                stand(&agent, record, Standing::Going)?;
                changed(&agent, &member, &container);
                discard(&agent, &member, &netns, record)?;
                member.leave_idle_network(&agent, record.vni)?;
            }
            Ok(())
        });
        if let Err(error) = left {
            tracing::warn!(
                "container {container} still has its place for published ports: {error:#}"
            );
        }
    });
}

/// What an operator should know whose container publishes ports and has no way out.
pub(super) fn ports_closed(container: &str) -> String {
    format!(
        "published ports of {container} are closed: it is on no network that leads outside; \
         they open when it is connected to one"
    )
}

/// Takes away what was half made or half taken away when an agent was killed. The caller holds the container's lock.
///
/// # Errors
/// What the kernel refused.
pub(super) fn finish(
    agent: &Agent,
    member: &Member,
    netns: &Netns,
    spec: &Spec,
) -> anyhow::Result<()> {
    let unfinished: Vec<EndpointRecord> = agent.state.read(|state| {
        let records = state.endpoints.iter();
        records
            .filter(|record| record.container == spec.name && !record.standing.is_whole())
            .cloned()
            .collect()
    });
    if unfinished.is_empty() {
        return Ok(());
    }
    for record in &unfinished {
        stand(agent, record, Standing::Going)?;
    }
    names::follow(agent, &agent.containers.folder(&spec.name)?, spec, None);
    gateway::settle(agent, member, netns, spec)?;
    for record in &unfinished {
        discard(agent, member, netns, record)?;
    }
    tracing::info!(
        "container {}: tidied up after a change of its networks",
        spec.name
    );
    Ok(())
}

/// A container's places are others now: all that follows them is told. Returns when its rules stand, or have taken too long.
pub(super) fn changed(agent: &Agent, member: &Member, container: &str) {
    if member.control.static_tables().is_none() {
        member.names.refresh(agent, container);
        member.services.container(container);
    }
}

/// In static mode the file says who is where.
fn no_file(member: &Member) -> anyhow::Result<()> {
    if member.control.static_tables().is_some() {
        bail!(
            "static mode: the file says which container is on which network; \
             remove the container, change the file, and start it again"
        );
    }
    Ok(())
}

/// The container as it is now; an error unless its command runs. The caller holds its lock.
fn running(agent: &Agent, folder: &Folder, found: &Spec) -> anyhow::Result<Spec> {
    let spec = folder.spec()?.filter(|spec| spec.id == found.id);
    let Some(spec) = spec.filter(|spec| is_running(folder, spec)) else {
        return Err(not_running(found));
    };
    let started = folder
        .running()?
        .is_some_and(|running| running.command.is_some());
    reconcile::serve(agent, &spec, started)?;
    Ok(spec)
}

fn not_running(spec: &Spec) -> anyhow::Error {
    anyhow::anyhow!(
        "container {0} does not run: one that has ended is on no network and starts no more; \
         'towline rm {0}' removes it, 'towline run' starts another",
        spec.name
    )
}

fn check(agent: &Agent, spec: &Spec, network: &Network) -> anyhow::Result<()> {
    if network.ingress {
        bail!(
            "the network {} carries published ports between hosts: members of services get their place on it by themselves",
            network.name
        );
    }
    let known = agent.state.read(|state| {
        let mut records = state.endpoints.iter();
        records.any(|record| record.container == spec.name && record.vni == network.vni)
    });
    if known {
        bail!(
            "endpoint with name {} already exists in network {}",
            spec.name,
            network.name
        );
    }
    Ok(())
}

/// The container's place in the network of this name, id or unique start of an id.
fn place(
    agent: &Agent,
    member: &Member,
    spec: &Spec,
    network: &str,
) -> anyhow::Result<EndpointRecord> {
    let mut found = agent.state.read(|state| {
        let networks = |wanted: &dyn Fn(&Network) -> bool| {
            let matching = state.networks.iter().filter(|network| wanted(network));
            let vnis: Vec<_> = matching.map(|network| network.vni).collect();
            let records = state.endpoints.iter();
            records
                .filter(|record| record.container == spec.name && vnis.contains(&record.vni))
                .cloned()
                .collect::<Vec<_>>()
        };
        let exact = networks(&|known| known.name == network || known.id == network);
        match exact.is_empty() && !network.is_empty() {
            true => networks(&|known| known.id.starts_with(network)),
            false => exact,
        }
    });
    match found.len() {
        0 => {
            // Whether there is such a network at all, its manager knows.
            if let Err(control::RequestError::Refused(refusal)) = member
                .control
                .request(control::Request::Network(network.to_owned()))
            {
                bail!(refusal);
            }
            bail!(
                "container {} is not connected to network {}: 'towline ps' shows where it is",
                spec.name,
                quote(network)
            )
        }
        1 => Ok(found.remove(0)),
        _ => bail!(
            "network id {} is ambiguous: give more of it",
            quote(network)
        ),
    }
}

fn stand(agent: &Agent, record: &EndpointRecord, standing: Standing) -> anyhow::Result<()> {
    agent.state.update(|state| {
        let mut records = state.endpoints.iter_mut();
        let same = records.find(|other| (other.vni, other.epoch) == (record.vni, record.epoch));
        if let Some(same) = same {
            same.standing = standing;
        }
    })
}

/// Takes a place back that could not be made.
fn undo(agent: &Agent, member: &Member, netns: &Netns, spec: &Spec, record: &EndpointRecord) {
    let undone = stand(agent, record, Standing::Going)
        .and_then(|()| gateway::settle(agent, member, netns, spec))
        .and_then(|()| discard(agent, member, netns, record));
    if let Err(error) = undone {
        tracing::warn!(
            "container {}: {} could not be taken back yet: {error:#}",
            spec.name,
            record.ifname
        );
    }
}

/// Takes an interface out of a container that runs on, and gives its addresses back.
fn discard(
    agent: &Agent,
    member: &Member,
    netns: &Netns,
    record: &EndpointRecord,
) -> anyhow::Result<()> {
    if record.ifname == MEMBER_INTERFACE {
        InstalledMember::default().remove(netns)?;
        NetfilterSocket::open(netns)?.delete_connections_where(|connection| {
            record.ips.contains(&connection.original.destination)
        })?;
    }
    member.datapath.detach(PortId(record.port))?;
    let netlink = Netlink::open(netns)?;
    // An agent that was killed held it: this one never took it up. Another's interface of that name is left alone.
    let left = netlink.link(&record.ifname)?;
    if left.is_some_and(|link| link.mac == record.mac.octets()) {
        netlink.delete_link(&record.ifname)?;
    }
    clear::release_endpoint(agent, member, record)
}
