//! Places on the network of published ports: this host's own, and those of members here.
//!
//! The host's own port is a TAP in the host's namespace, `towline_ingress`, by which it hands on what clients send to published
//! ports. A member has an interface `ingress`. Both are ordinary ports of the datapath, and stay while no agent runs.

use std::sync::Arc;

use anyhow::Context as _;
use control::service::Membership;
use control::{Endpoint, EndpointState, Epoch, Network, Request, Response};
use discovery::InstalledEntry;
use discovery::plan::{HOST_INTERFACE, MEMBER_INTERFACE};
use netns::{Netns, sysctl};
use vtep::Vni;
use vtep::fdb::PortId;

use super::network::{self, unexpected};
use super::state::EndpointRecord;
use super::{Agent, Member, container};

/// What this host is called among the network's containers: none of those can have such a name.
fn own_name(member: &Member) -> String {
    format!("host:{}", member.host.name)
}

/// Whether a record is the host's own.
pub(super) fn is_host(record: &EndpointRecord) -> bool {
    record.ifname == HOST_INTERFACE && record.container.starts_with("host:")
}

fn record(agent: &Agent) -> Option<EndpointRecord> {
    agent.state.read(|state| {
        state
            .endpoints
            .iter()
            .find(|record| is_host(record))
            .cloned()
    })
}

/// Whether this host has its port on this network.
pub(super) fn is_attached(agent: &Agent, vni: Vni) -> bool {
    record(agent).is_some_and(|record| record.vni == vni)
}

/// Sees to it that this host has its port on the network of published ports, and on no other. Returns at once: the manager's
/// answers are awaited elsewhere.
pub(super) fn look_after(agent: &Arc<Agent>, wanted: Option<Vni>) {
    if record(agent).map(|record| record.vni) == wanted {
        return;
    }
    let agent = Arc::clone(agent);
    container::in_background("ingress", move || {
        // `leave` can't come between.
        let _changing = agent.changing();
        let Ok(member) = agent.member() else { return };
        if let Err(error) = settle(&agent, &member) {
            tracing::warn!("published ports are not served by this host yet: {error:#}");
        }
    });
}

/// Has the manager make the network of published ports, if this cluster never had one.
///
/// # Errors
/// When the manager can't be asked, or can't make it.
pub(super) fn make_network(agent: &Agent, member: &Member) -> anyhow::Result<()> {
    let routes_in_use = network::routes_in_use(agent)?;
    let request = Request::MakeIngress { routes_in_use };
    member.control.request(request)?;
    Ok(())
}

fn settle(agent: &Agent, member: &Member) -> anyhow::Result<()> {
    let wanted = member.services.ingress_network();
    let record = record(agent);
    if let Some(record) = record.filter(|record| Some(record.vni) != wanted) {
        detach(agent, member, &record)?;
    } else if record_is(agent, wanted) {
        return Ok(());
    }
    if wanted.is_none() || member.control.status().connected_to.is_none() {
        return Ok(());
    }
    let network = ingress_network(agent, member)?;
    let request = Request::Allocate {
        network: network.name.clone(),
        container: own_name(member),
        ips: Vec::new(),
        mac: None,
        service: None,
        weight: None,
    };
    let Response::Endpoint(endpoint) = member.control.request(request)? else {
        return Err(unexpected());
    };
    let record = keep(agent, endpoint, HOST_INTERFACE, &network)?;
    attach_host(agent, member, &record, &network)?;
    member.control.publish(record.endpoint(), EndpointState::Up);
    member.services.host_changed();
    Ok(())
}

fn record_is(agent: &Agent, wanted: Option<Vni>) -> bool {
    wanted.is_some_and(|vni| is_attached(agent, vni))
}

/// The network, followed from now on.
fn ingress_network(agent: &Agent, member: &Member) -> anyhow::Result<Network> {
    let Response::Networks(networks) = member.control.request(Request::Networks)? else {
        return Err(unexpected());
    };
    let network = networks.into_iter().find(|network| network.ingress);
    let network = network.context("this cluster has no network of published ports any more")?;
    member.enter_network(agent, &network)?;
    Ok(network)
}

fn keep(
    agent: &Agent,
    endpoint: Endpoint,
    ifname: &str,
    network: &Network,
) -> anyhow::Result<EndpointRecord> {
    agent.state.update(|state| {
        let backend = agent.config.backend;
        let record = state.new_endpoint(endpoint, ifname.to_owned(), network.mtu, backend);
        state.endpoints.push(record.clone());
        record
    })
}

fn attach_host(
    agent: &Agent,
    member: &Member,
    record: &EndpointRecord,
    network: &Network,
) -> anyhow::Result<()> {
    // What an agent left that was killed before it wrote so down.
    member.datapath.detach(PortId(record.port))?;
    netns::Netlink::open(&agent.netns)?.delete_link(HOST_INTERFACE)?;
    container::attach(member, &agent.netns, record, network)
        .context("can't attach this host to the network of published ports")?;
    for (key, value) in [
        // Nobody on the network may hand out routes to hosts.
        (format!("net/ipv6/conf/{HOST_INTERFACE}/accept_ra"), "0"),
        // Neighbours are asked with the address that this host has there, also for packets that it sends from another of its own.
        (format!("net/ipv4/conf/{HOST_INTERFACE}/arp_announce"), "2"),
    ] {
        // A kernel without IPv6 has no such key.
        if sysctl::get(&agent.netns, &key).is_ok() {
            sysctl::set(&agent.netns, &key, value)?;
        }
    }
    Ok(())
}

/// Takes up the host's port of an earlier agent, or makes it again where it is gone, as after a restart of the machine.
///
/// # Errors
/// What the datapath or the kernel refused.
pub(super) fn adopt(agent: &Agent, member: &Member) -> anyhow::Result<()> {
    let Some(record) = record(agent) else {
        return Ok(());
    };
    let network = agent.state.read(|state| {
        let mut networks = state.networks.iter();
        networks.find(|network| network.vni == record.vni).cloned()
    });
    let network = network.context("the state file lacks the network of published ports")?;
    if member
        .datapath
        .adopt(&container::port_spec(&agent.netns, &record))
        .is_err()
    {
        attach_host(agent, member, &record, &network)?;
    }
    Ok(())
}

fn detach(agent: &Agent, member: &Member, record: &EndpointRecord) -> anyhow::Result<()> {
    InstalledEntry::default().remove(&agent.netns)?;
    container::release_endpoint(agent, member, record)?;
    member.leave_idle_network(agent, record.vni)
}

/// Takes away all that this host has for published ports. A second time is harmless.
///
/// # Errors
/// What the datapath or the kernel refused.
pub(super) fn remove(agent: &Agent, member: &Member) -> anyhow::Result<()> {
    match record(agent) {
        Some(record) => detach(agent, member, &record),
        None => Ok(InstalledEntry::default().remove(&agent.netns)?),
    }
}

/// Gives a member that runs a place on the network of published ports: its service has come to publish some. Returns at once.
pub(super) fn attach_member(agent: &Arc<Agent>, name: &str, service: Epoch, weight: u16) {
    let (agent, name) = (Arc::clone(agent), name.to_owned());
    container::in_background("ingress-member", move || {
        let _changing = agent.changing();
        let Ok(member) = agent.member() else { return };
        let attached = container::locked(&agent, &name, || {
            let known = agent.state.read(|state| {
                let mut records = state.endpoints.iter();
                records.any(|record| record.container == name && record.ifname == MEMBER_INTERFACE)
            });
            if known {
                return Ok(());
            }
            let netns = Netns::open(&name)?;
            let service = member.services.by_epoch(service);
            let service = service.context("its service is gone")?;
            let (record, network) =
                member_place(&agent, &member, &name, &service.id, service.epoch, weight)?;
            container::attach(&member, &netns, &record, &network)?;
            member.control.publish(record.endpoint(), EndpointState::Up);
            member.services.found(&name, true);
            Ok(())
        });
        if let Err(error) = attached {
            tracing::warn!("container {name} is not reached by published ports yet: {error:#}");
        }
    });
}

/// Addresses for a member on the network of published ports, written down.
///
/// # Errors
/// When the manager refuses, or none answers and no address was leased to this host ahead.
pub(super) fn member_place(
    agent: &Agent,
    member: &Member,
    container: &str,
    service: &str,
    epoch: Epoch,
    weight: u16,
) -> anyhow::Result<(EndpointRecord, Network)> {
    let known = member.services.ingress_network().and_then(|vni| {
        agent.state.read(|state| {
            let mut networks = state.networks.iter();
            networks.find(|network| network.vni == vni).cloned()
        })
    });
    if member.control.status().connected_to.is_none()
        && let Some(network) = known
    {
        let mut endpoint = member.control.take_leased(network.vni, container, &[])?;
        endpoint.member = Some(Membership {
            service: epoch,
            weight,
            serving: false,
        });
        let record = keep(agent, endpoint, MEMBER_INTERFACE, &network)?;
        return Ok((record, network));
    }
    let network = ingress_network(agent, member)?;
    let request = Request::Allocate {
        network: network.name.clone(),
        container: container.to_owned(),
        ips: Vec::new(),
        mac: None,
        service: Some(service.to_owned()),
        weight: Some(weight),
    };
    let Response::Endpoint(endpoint) = member.control.request(request)? else {
        return Err(unexpected());
    };
    let record = keep(agent, endpoint, MEMBER_INTERFACE, &network)?;
    Ok((record, network))
}
