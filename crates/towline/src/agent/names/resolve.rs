//! `towline resolve`: what a container on a network would be answered.

use std::net::IpAddr;

use anyhow::{Context as _, bail};
use control::{Backend, Request, Response, State, TableChange};
use discovery::names::{Answer, Found, Kind, Zones};
use vtep::Vni;

use crate::agent::{Agent, Member, network};
use crate::api::names::{RecordType, Resolve, Resolved, ResolvedRecord};

/// Answers from this host's own tables where it takes part in the network, from the manager's where it does not.
///
/// # Errors
/// When there is no such network, or no such name on it.
pub(crate) fn resolve(agent: &Agent, request: &Resolve) -> anyhow::Result<Resolved> {
    let member = agent.member()?;
    if member.control.static_tables().is_some() {
        bail!("static mode has no names: reach containers by their addresses");
    }
    let wanted = &request.network;
    let followed = agent.state.read(|state| {
        let mut networks = state.networks.iter();
        let found = networks.find(|network| network.name == *wanted || network.id == *wanted);
        found.map(|network| (network.vni, network.name.clone()))
    });
    let (found, name) = match followed {
        Some((vni, name)) => (look_up(&member.names.shared.zones(), vni, request), name),
        None => {
            let (zones, vni, name) = of_manager(&member, wanted)?;
            (look_up(&zones, vni, request), name)
        }
    };
    let (records, ttl) = found.with_context(|| {
        format!(
            "nothing on the network {name} has the name {}: 'towline network inspect {name}' lists its containers, \
             'towline service ls' services",
            control::quote(&request.name)
        )
    })?;
    Ok(Resolved {
        name: request.name.clone(),
        network: name,
        ttl,
        records,
    })
}

/// Records and how long they may be kept; `None`: there is no such name.
fn look_up(zones: &Zones, vni: Vni, request: &Resolve) -> Option<(Vec<ResolvedRecord>, u32)> {
    let address: Option<IpAddr> = request.name.parse().ok();
    let name = match address {
        Some(ip) => reverse(ip),
        None => request
            .name
            .strip_suffix('.')
            .unwrap_or(&request.name)
            .to_owned(),
    };
    let kinds = match request.kind {
        Some(RecordType::A) => vec![Kind::A],
        Some(RecordType::Aaaa) => vec![Kind::Aaaa],
        Some(RecordType::Ptr) => vec![Kind::Ptr],
        Some(RecordType::Srv) => vec![Kind::Srv],
        None if address.is_some() || name.ends_with(".arpa") => vec![Kind::Ptr],
        None if name.starts_with('_') => vec![Kind::Srv],
        None => vec![Kind::A, Kind::Aaaa],
    };
    let found = kinds
        .into_iter()
        .map(|kind| zones.lookup(&[vni], &name, kind));
    let found: Option<Vec<Found<'_>>> = found.collect();
    let found = found.filter(|found| found.iter().all(|found| !found.absent))?;
    let ttl = found.first().map_or(0, |found| found.ttl);
    let records = found.iter().flat_map(Found::answers);
    Some((records.map(record).collect(), ttl))
}

fn record(answer: Answer) -> ResolvedRecord {
    match answer {
        Answer::Address(ip) => ResolvedRecord::Address { address: ip },
        Answer::Name(name) => ResolvedRecord::Name { name },
        Answer::Service {
            weight,
            port,
            target,
            ips,
        } => ResolvedRecord::Service {
            weight,
            port,
            target,
            addresses: ips,
        },
    }
}

/// The name of an address: RFC 1035 §3.5, RFC 3596 §2.5.
fn reverse(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(ip) => {
            let octets = ip.octets().into_iter().rev();
            let digits = octets.flat_map(|octet| [octet & 0xf, octet >> 4]);
            let labels: String = digits.map(|digit| format!("{digit:x}.")).collect();
            format!("{labels}ip6.arpa")
        }
    }
}

/// The names of a network that this host takes no part in.
fn of_manager(member: &Member, wanted: &str) -> anyhow::Result<(Zones, Vni, String)> {
    let Response::Details(details) = member
        .control
        .request(Request::Network(wanted.to_owned()))?
    else {
        return Err(network::unexpected());
    };
    let Response::Services(services) = member.control.request(Request::Services)? else {
        return Err(network::unexpected());
    };
    let vni = details.network.vni;
    let mut zones = Zones::default();
    zones.network(&details.network);
    let services = services.into_iter().map(|details| details.service);
    zones.services(vni, services.filter(|service| service.vni == vni).collect());
    let mut changes = Vec::new();
    for view in details.endpoints {
        let mut peers = details.peers.iter();
        let masked = peers.any(|peer| peer.info.id == view.host_id && !peer.up);
        if view.state != State::Up || masked {
            continue;
        }
        for ip in view.endpoint.ips {
            let names = view.endpoint.names.clone();
            changes.push(TableChange::Names { ip, names });
            let backend = view.endpoint.member.map(|member| Backend {
                service: member.service,
                host: view.host_id,
                weight: member.weight,
                serving: member.serving,
            });
            changes.push(TableChange::Backend { ip, backend });
        }
    }
    zones.table(vni, &changes);
    Ok((zones, vni, details.network.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_backwards() {
        let name = |ip: &str| reverse(ip.parse().unwrap());
        assert_eq!(name("10.0.9.2"), "2.9.0.10.in-addr.arpa");
        assert_eq!(
            name("fd00::12"),
            "2.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa"
        );
    }
}
