//! Networks: made, removed, described. A refusal is one line for the user, in Docker's words where Docker has them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use vtep::Vni;
use vtep::vxlan::{self, Protection};

use super::Manager;
use super::ingress::INGRESS;
use super::subnets::overlap;
use crate::allocator;
use crate::events::Action;
use crate::host::HostId;
use crate::network::{
    Addressing, DNS_TTL_MAX, Endpoint, MacMode, Network, NetworkSpec, is_valid_name, quote,
};
use crate::request::{EndpointView, NetworkDetails, Response};
use crate::row::State as RowState;
use crate::subnet::Subnet;
use crate::table::MemberState;

/// Names that mean something else to a user of Docker, or will here.
const PREDEFINED: [&str; 4] = ["bridge", "host", "none", INGRESS];
/// IPv6 needs it on every link (RFC 8200 §5).
const MTU_MIN_V6: u16 = 1280;
/// Every IPv4 host takes datagrams of this size (RFC 791).
const MTU_MIN_V4: u16 = 576;
/// The longest rest of a freed address, in seconds: a day.
const REST_MAX: u32 = 24 * 60 * 60;
/// Bytes of all labels and options of one network: its description goes out as one message.
const LABELS_MAX: usize = 64 * 1024;
/// Names in one line of refusal.
const NAMES_SHOWN: usize = 5;

impl Manager {
    pub(super) fn create_network(
        &mut self,
        spec: NetworkSpec,
        routes_in_use: &[IpNet],
        asking: HostId,
        now: Duration,
    ) -> Result<Response, String> {
        self.check_name(&spec.name, spec.ingress)?;
        if let Some(vni) = self.state.ingress().filter(|_| spec.ingress) {
            let Network { name, id, .. } = &self.state.networks[&vni].network;
            return Err(format!(
                "ingress network {name} ({id}) is already present: a cluster has one"
            ));
        }
        check_size([&spec.labels, &spec.options])?;
        check_addressing(&spec)?;
        check_kind(&spec)?;
        let subnets = self.choose_subnets(&spec, routes_in_use, asking)?;
        let has_v6 = subnets
            .iter()
            .any(|subnet| matches!(subnet.net, IpNet::V6(_)));
        let mtu = self.choose_mtu(spec.mtu, has_v6)?;
        if let Some(vni) = spec.vni
            && let Some(taken) = self.state.networks.get(&vni)
        {
            return Err(format!(
                "VNI {vni} is used by network {}: choose another",
                taken.network.name
            ));
        }
        // Nothing was changed up to here.
        let vni = match spec.vni {
            Some(vni) => vni,
            None => self
                .state
                .draw_vni()
                .ok_or("every VNI from 4096 is taken: remove a network first")?,
        };
        let network = Network {
            id: self.random_id(),
            name: spec.name,
            vni,
            subnets,
            gateway_mac: allocator::gateway_mac(vni),
            mtu,
            settings: spec.settings,
            addressing: spec.addressing,
            ingress: spec.ingress,
            internal: spec.internal,
            attachable: spec.attachable,
            dns_ttl: spec.dns_ttl,
            labels: spec.labels,
            options: spec.options,
            created: self.unix_seconds(now),
            epoch: self.state.draw(),
        };
        // Refused here, a VNI and an epoch were drawn for nothing, which does no harm.
        self.check_network(&network)?;
        self.state.put_network(network.clone());
        self.note_network(Action::Create, &network);
        self.tell_network(vni);
        if network.ingress {
            self.tell_ingress();
        }
        Ok(Response::Network(network))
    }

    pub(super) fn remove_network(&mut self, wanted: &str) -> Result<Response, String> {
        let vni = self.find_network(wanted)?;
        self.check_unused(vni)?;
        let state = &self.state.networks[&vni];
        // Hosts' own endpoints on the network of published ports go with it.
        let containers = || {
            let endpoints = state.endpoints.values();
            endpoints.filter(|held| is_valid_name(&held.endpoint.container))
        };
        let count = containers().count();
        if count > 0 {
            let shown = containers().take(NAMES_SHOWN);
            let mut names: Vec<String> = shown
                .map(|held| {
                    format!(
                        "name:{} id:\"{}\"",
                        quote(&held.endpoint.container),
                        held.endpoint.epoch
                    )
                })
                .collect();
            if count > NAMES_SHOWN {
                names.push(format!("and {} more", count - NAMES_SHOWN));
            }
            return Err(format!(
                "network {} has active endpoints ({}): remove these containers first",
                state.network.name,
                names.join(", ")
            ));
        }
        let network = self
            .state
            .remove_network(vni)
            .ok_or("the network is gone")?;
        self.note_network(Action::Remove, &network);
        self.tell_network_removed(vni);
        if network.ingress {
            self.tell_ingress();
        }
        Ok(Response::Network(network))
    }

    pub(super) fn networks(&self) -> Response {
        let mut networks: Vec<Network> = self
            .state
            .networks
            .values()
            .map(|state| state.network.clone())
            .collect();
        networks.sort_by(|a, b| a.name.cmp(&b.name));
        Response::Networks(networks)
    }

    pub(super) fn network_details(&self, wanted: &str, now: Duration) -> Result<Response, String> {
        let state = &self.state.networks[&self.find_network(wanted)?];
        let mut endpoints: Vec<EndpointView> = state
            .endpoints
            .values()
            .map(|held| {
                let row = state.row_of(&held.endpoint);
                EndpointView {
                    endpoint: Endpoint {
                        member: row.and_then(|row| row.member),
                        names: row.and_then(|row| row.names.clone()),
                        ..held.endpoint.clone()
                    },
                    host: self.host_name(held.owner),
                    host_id: held.owner,
                    state: row.map_or(RowState::Free, |row| row.state),
                }
            })
            .collect();
        endpoints.sort_by(|a, b| a.endpoint.ips.cmp(&b.endpoint.ips));
        let members = self
            .state
            .hosts
            .keys()
            .filter(|id| state.table.member(**id) != MemberState::Absent);
        let peers = members.filter_map(|id| self.view(*id, now)).collect();
        Ok(Response::Details(NetworkDetails {
            network: state.network.clone(),
            endpoints,
            peers,
            usage: state.usage(now),
        }))
    }

    /// The network of this name, id, or unique start of an id.
    pub(super) fn find_network(&self, wanted: &str) -> Result<Vni, String> {
        let networks = || self.state.networks.values().map(|state| &state.network);
        if let Some(network) =
            networks().find(|network| network.name == wanted || network.id == wanted)
        {
            return Ok(network.vni);
        }
        let mut starts =
            networks().filter(|network| !wanted.is_empty() && network.id.starts_with(wanted));
        match (starts.next(), starts.next()) {
            (Some(network), None) => Ok(network.vni),
            (Some(_), Some(_)) => Err(format!(
                "network id {} is ambiguous: give more of it",
                quote(wanted)
            )),
            (None, _) => Err(format!(
                "network {} not found: `towline network ls` shows what exists",
                quote(wanted)
            )),
        }
    }

    /// Whether a network that an agent remembers may be taken back into a store that lost it.
    pub(super) fn may_adopt_network(&self, network: &Network) -> bool {
        let floor = self.state.floors.get(&network.vni);
        network.epoch <= self.state.last()
            && floor.is_none_or(|floor| network.epoch > *floor)
            && is_valid_name(&network.name)
            && !(network.ingress && self.state.ingress().is_some())
            && check_size([&network.labels, &network.options]).is_ok()
            && self.check_network(network).is_ok()
            && network.addressing.rest_seconds <= REST_MAX
            && network.dns_ttl <= DNS_TTL_MAX
            && !network.subnets.is_empty()
            && network.subnets.iter().all(Subnet::is_valid)
            && self.state.networks.values().all(|known| {
                known.network.name != network.name
                    && known.network.vni != network.vni
                    && known.network.id != network.id
                    && !overlap(
                        &known.network,
                        network.subnets.iter().map(|subnet| subnet.net),
                    )
            })
    }

    fn check_name(&self, name: &str, ingress: bool) -> Result<(), String> {
        if !is_valid_name(name) {
            return Err(format!(
                "invalid network name {}: it must match [a-z0-9][a-z0-9_.-]{{0,62}}",
                quote(name)
            ));
        }
        if PREDEFINED.contains(&name) && !(ingress && name == INGRESS) {
            return Err(format!(
                "{name} is a pre-defined network and cannot be created: choose another name"
            ));
        }
        if self
            .state
            .networks
            .values()
            .any(|state| state.network.name == name)
        {
            return Err(format!(
                "network with name {name} already exists: choose another, or remove it first"
            ));
        }
        Ok(())
    }

    fn choose_mtu(&self, wanted: Option<u16>, has_v6: bool) -> Result<u16, String> {
        let room = |host: &crate::host::HostInfo| host.link_mtu.saturating_sub(overhead(host.vtep));
        let smallest = self.state.hosts.values().min_by_key(|host| room(host));
        let Some(smallest) = smallest else {
            return Err("no host is known yet: run `towline init` first".to_owned());
        };
        let largest = room(smallest);
        let mtu = wanted.unwrap_or(largest);
        if mtu > largest {
            return Err(format!(
                "mtu {mtu} is too large: the link of host {} carries {} bytes, {} of them are overhead: at most {largest}",
                smallest.name,
                smallest.link_mtu,
                overhead(smallest.vtep)
            ));
        }
        let least = if has_v6 { MTU_MIN_V6 } else { MTU_MIN_V4 };
        if mtu < least {
            let family = if has_v6 { "IPv6" } else { "IPv4" };
            return Err(format!(
                "mtu {mtu} is too small: a network with {family} needs {least} (the link of host {} carries {} bytes)",
                smallest.name, smallest.link_mtu
            ));
        }
        Ok(mtu)
    }

    /// Networks that a host's link cannot carry, as lines for people.
    pub(super) fn mtu_warnings(&self, vtep: IpAddr, link_mtu: u16) -> Vec<String> {
        let room = link_mtu.saturating_sub(overhead(vtep));
        let tight = self
            .state
            .networks
            .values()
            .filter(|state| state.network.mtu > room);
        tight
            .map(|state| {
                let Network { name, mtu, .. } = &state.network;
                let needed = mtu.saturating_add(overhead(vtep));
                format!("network {name} has MTU {mtu}, which needs a link MTU of {needed}; this host's is {link_mtu}")
            })
            .collect()
    }
}

fn overhead(vtep: IpAddr) -> u16 {
    let family = match vtep {
        IpAddr::V4(_) => vxlan::Family::V4,
        IpAddr::V6(_) => vxlan::Family::V6,
    };
    vxlan::overhead(family, Protection::Cleartext)
}

fn check_size(labels: [&BTreeMap<String, String>; 2]) -> Result<(), String> {
    let bytes: usize = labels
        .into_iter()
        .flatten()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    if bytes > LABELS_MAX {
        return Err(format!(
            "labels and options of {bytes} bytes are too long: at most {LABELS_MAX}"
        ));
    }
    Ok(())
}

/// Whether a network like this can give addresses as it is asked to.
fn check_addressing(spec: &NetworkSpec) -> Result<(), String> {
    let Addressing { mac, rest_seconds } = spec.addressing;
    if rest_seconds > REST_MAX {
        return Err(format!(
            "a rest of {rest_seconds} s is too long: at most {REST_MAX} s"
        ));
    }
    let only_v6 =
        !spec.subnets.is_empty() && spec.subnets.iter().all(|net| matches!(net, IpNet::V6(_)));
    if mac == MacMode::Docker && only_v6 {
        return Err(
            "mac=docker makes MAC addresses of IPv4 addresses: give an IPv4 --subnet too"
                .to_owned(),
        );
    }
    Ok(())
}

/// Whether what was asked for goes together.
fn check_kind(spec: &NetworkSpec) -> Result<(), String> {
    if spec.dns_ttl > DNS_TTL_MAX {
        return Err(format!(
            "dns-ttl={} is too long: at most {DNS_TTL_MAX} s",
            spec.dns_ttl
        ));
    }
    if spec.ingress && spec.internal {
        return Err(
            "the network of published ports can't be internal: leave --internal or --ingress out"
                .to_owned(),
        );
    }
    Ok(())
}
