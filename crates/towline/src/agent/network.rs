//! Networks: what a client asks becomes a request to the manager, and back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use control::{NetworkDetails, NetworkSpec, Request, RequestError, Response, State, SubnetUsage};
use ipnet::IpNet;
use netns::Netlink;
use vtep::Vni;

use super::{Agent, Member};
use crate::api::{Endpoint, Network, NetworkCreate, NetworkSummary, Peer, Subnet, Usage};
use crate::config::check_name;

const DRIVER: &str = "overlay";
const SCOPE: &str = "cluster";
/// Times that a manager is asked for the network of published ports: it lets each wait for 3 s while it may give nothing away, 10 s at most.
const INGRESS_TRIES: usize = 4;

/// Creates a network that overlaps neither another nor what this host routes.
pub(super) fn create(agent: &Agent, wanted: NetworkCreate) -> anyhow::Result<Network> {
    check_name("network name", &wanted.name)?;
    let vni = wanted.vni.map(Vni::new).transpose()?;
    let member = agent.member()?;
    let spec = NetworkSpec {
        name: wanted.name,
        subnets: wanted.subnets,
        ip_ranges: wanted.ip_ranges,
        gateways: wanted.gateways,
        aux_addresses: wanted.aux_addresses,
        ipv6: wanted.ipv6,
        addressing: wanted.addressing,
        ingress: wanted.ingress,
        internal: wanted.internal,
        attachable: wanted.attachable,
        dns_ttl: wanted.dns_ttl,
        vni,
        mtu: wanted.mtu,
        settings: wanted.settings,
        labels: wanted.labels,
        options: BTreeMap::new(),
    };
    let request = Request::CreateNetwork {
        spec,
        routes_in_use: routes_in_use(agent)?,
    };
    match member.control.request(request)? {
        Response::Network(network) => Ok(shown(NetworkDetails {
            network,
            endpoints: Vec::new(),
            peers: Vec::new(),
            usage: Vec::new(),
        })),
        _ => Err(unexpected()),
    }
}

/// All networks of the cluster.
pub(super) fn list(agent: &Agent) -> anyhow::Result<Vec<NetworkSummary>> {
    let Response::Networks(networks) = agent.member()?.control.request(Request::Networks)? else {
        return Err(unexpected());
    };
    Ok(networks.into_iter().map(summary).collect())
}

fn summary(network: control::Network) -> NetworkSummary {
    let (ipv4, ipv6) = families(&network);
    NetworkSummary {
        id: network.id,
        name: network.name,
        driver: DRIVER.to_owned(),
        scope: SCOPE.to_owned(),
        vni: network.vni.get(),
        mtu: network.mtu,
        subnets: network.subnets.iter().map(|subnet| subnet.net).collect(),
        ipv4,
        ipv6,
        internal: network.internal,
        attachable: network.attachable,
        ingress: network.ingress,
        labels: network.labels,
        created: network.created,
    }
}

/// Whether a network has IPv4 subnets, and IPv6 ones.
fn families(network: &control::Network) -> (bool, bool) {
    let has = |v4| {
        let mut subnets = network.subnets.iter();
        subnets.any(|subnet| subnet.net.addr().is_ipv4() == v4)
    };
    (has(true), has(false))
}

/// One network with all that is in it.
pub(super) fn inspect(agent: &Agent, name: String) -> anyhow::Result<Network> {
    match agent.member()?.control.request(Request::Network(name))? {
        Response::Details(details) => Ok(shown(details)),
        _ => Err(unexpected()),
    }
}

/// Removes a network without endpoints.
pub(super) fn remove(agent: &Agent, name: String, force: bool) -> anyhow::Result<()> {
    let member = agent.member()?;
    if force {
        let Response::Networks(networks) = member.control.request(Request::Networks)? else {
            return Err(unexpected());
        };
        let known = |id: &str| id == name || id.starts_with(&name);
        if !networks
            .iter()
            .any(|network| network.name == name || known(&network.id))
        {
            return Ok(());
        }
    }
    member.control.request(Request::RemoveNetwork(name))?;
    Ok(())
}

/// Removes those of these networks that neither a container nor a service uses; the names of those that went.
pub(super) fn prune(agent: &Agent, wanted: Vec<String>) -> anyhow::Result<Vec<String>> {
    let member = agent.member()?;
    let Response::Services(services) = member.control.request(Request::Services)? else {
        return Err(unexpected());
    };
    let of_services: BTreeSet<Vni> = services.iter().map(|known| known.service.vni).collect();
    let mut removed = Vec::new();
    for id in wanted {
        let found = member.control.request(Request::Network(id.clone()));
        let network = match found {
            Ok(Response::Details(details)) if details.endpoints.is_empty() => details.network,
            Ok(_) | Err(RequestError::Refused(_)) => continue,
            Err(error) => return Err(error.into()),
        };
        if network.ingress || of_services.contains(&network.vni) {
            continue;
        }
        match member.control.request(Request::RemoveNetwork(id)) {
            Ok(_) => removed.push(network.name),
            // Somebody has come to use it meanwhile, or has removed it.
            Err(RequestError::Refused(refusal)) => tracing::debug!("{refusal}"),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(removed)
}

/// Has the manager make the network of published ports, unless the cluster has or had one: an agent asks, because the manager cannot
/// know which prefixes its host routes. In a thread of its own, for a manager that has just started lets it wait.
pub(super) fn make_ingress(agent: &Arc<Agent>, member: &Arc<Member>) {
    let (agent, member) = (Arc::clone(agent), Arc::downgrade(member));
    let ask = move || {
        let routes_in_use = routes_in_use(&agent)?;
        // Each of these waits for as long as the manager holds it back.
        let mut last = None;
        for _ in 0..INGRESS_TRIES {
            let Some(member) = member.upgrade() else {
                return Ok(());
            };
            let routes_in_use = routes_in_use.clone();
            match member
                .control
                .request(Request::MakeIngress { routes_in_use })
            {
                Ok(_) => return Ok(()),
                Err(error) => last = Some(error),
            }
        }
        last.map_or(Ok(()), |error| Err(error.into()))
    };
    let body = move || {
        let asked: anyhow::Result<()> = ask();
        if let Err(error) = asked {
            tracing::warn!("there is no network of published ports: {error:#}");
        }
    };
    let thread = std::thread::Builder::new().name("make-ingress".to_owned());
    if let Err(error) = thread.spawn(body) {
        tracing::warn!("cannot start a thread: {error}");
    }
}

/// The manager answered a request with another request's answer.
pub(super) fn unexpected() -> anyhow::Error {
    anyhow::anyhow!("the manager answered something else than was asked: is it of another version?")
}

/// What this host routes, in all of its interfaces; a default route is no obstacle.
pub(super) fn routes_in_use(agent: &Agent) -> anyhow::Result<Vec<IpNet>> {
    let routes = Netlink::open(&agent.netns)
        .and_then(|netlink| netlink.routes())
        .context("cannot list this host's routes")?;
    let mut prefixes: Vec<IpNet> = routes
        .into_iter()
        .map(|route| route.dst.trunc())
        .filter(|net| net.prefix_len() > 0)
        .collect();
    prefixes.sort_unstable();
    prefixes.dedup();
    Ok(prefixes)
}

fn shown(details: NetworkDetails) -> Network {
    let network = details.network;
    let (ipv4, ipv6) = families(&network);
    Network {
        id: network.id,
        name: network.name,
        driver: DRIVER.to_owned(),
        scope: SCOPE.to_owned(),
        vni: network.vni.get(),
        mtu: network.mtu,
        subnets: network
            .subnets
            .into_iter()
            .map(|subnet| Subnet {
                usage: details
                    .usage
                    .iter()
                    .find(|usage| usage.net == subnet.net)
                    .map(usage_shown),
                subnet: subnet.net,
                gateway: subnet.gateway,
                ip_range: subnet.ip_range,
                aux_addresses: subnet.aux_addresses,
            })
            .collect(),
        addressing: network.addressing,
        settings: network.settings,
        ipv4,
        ipv6,
        internal: network.internal,
        attachable: network.attachable,
        ingress: network.ingress,
        dns_ttl: network.dns_ttl,
        created: network.created,
        labels: network.labels,
        endpoints: details
            .endpoints
            .into_iter()
            .map(|view| Endpoint {
                id: view.endpoint.epoch.to_string(),
                container: view.endpoint.container,
                host: view.host,
                mac: view.endpoint.mac.to_string(),
                ips: view.endpoint.ips,
                state: if view.state == State::Up {
                    "up"
                } else {
                    "down"
                }
                .to_owned(),
            })
            .collect(),
        peers: details
            .peers
            .into_iter()
            .map(|peer| Peer {
                host: peer.info.name,
                vtep: peer.info.vtep,
            })
            .collect(),
    }
}

fn usage_shown(usage: &SubnetUsage) -> Usage {
    let SubnetUsage {
        in_use,
        resting,
        set_aside,
        free,
        ..
    } = *usage;
    Usage {
        in_use,
        resting,
        set_aside,
        free,
    }
}

/// A network of this host's state by name or id, for what must work while no manager answers.
pub(super) fn known(agent: &Agent, name: &str) -> anyhow::Result<control::Network> {
    let found = agent.state.read(|state| {
        state
            .networks
            .iter()
            .find(|network| network.name == name || network.id == name)
            .cloned()
    });
    let Some(network) = found else {
        bail!(
            "no container of this host is on a network {}: 'towline network ls' lists all networks",
            control::quote(name)
        );
    };
    Ok(network)
}
