//! Which subnets a new network gets, and what stands in the way of one.

use ipnet::IpNet;

use super::Manager;
use crate::host::HostId;
use crate::network::{Network, NetworkSpec};
use crate::subnet::{self, Subnet, overlaps};

impl Manager {
    /// The subnets of a new network, checked against all that is in use. Changes nothing.
    pub(super) fn choose_subnets(
        &self,
        spec: &NetworkSpec,
        routes_in_use: &[IpNet],
        asking: HostId,
    ) -> Result<Vec<Subnet>, String> {
        let NetworkSpec {
            ip_ranges,
            gateways,
            aux_addresses,
            ..
        } = spec;
        if spec.subnets.is_empty() && !(ip_ranges.is_empty() && gateways.is_empty()) {
            return Err(
                "every ip-range or gateway must have a corresponding subnet: give its --subnet"
                    .to_owned(),
            );
        }
        subnet::check_count(spec.subnets.len())?;
        let mut wanted: Vec<Wanted> = spec.subnets.iter().map(|net| Wanted::of(*net)).collect();
        if wanted.is_empty() {
            wanted.push(Wanted::Any {
                v4: true,
                size: None,
            });
        }
        if spec.ipv6 && !wanted.iter().any(Wanted::is_v6) {
            wanted.push(Wanted::Any {
                v4: false,
                size: None,
            });
        }
        let named: Vec<IpNet> = wanted.iter().filter_map(Wanted::named).collect();
        // What is asked for by number is refused for its own faults before anything is drawn beside it.
        subnet::plan(&named, &[], &[], &[])?;
        for net in &named {
            self.check_free(*net, routes_in_use, asking, spec.ingress)?;
        }
        let mut taken = self.taken(routes_in_use, spec.ingress);
        taken.extend(&named);
        let mut nets = Vec::new();
        for wanted in wanted {
            nets.push(match wanted {
                Wanted::Named(net) => net,
                Wanted::Any { v4, size } => {
                    let net = subnet::draw(self.pools(), v4, size, &taken)?;
                    taken.push(net);
                    net
                }
            });
        }
        subnet::plan(&nets, ip_ranges, gateways, aux_addresses)
    }

    /// Why nobody may have this subnet now.
    fn check_free(
        &self,
        net: IpNet,
        routes_in_use: &[IpNet],
        asking: HostId,
        for_ingress: bool,
    ) -> Result<(), String> {
        let kept = self.kept_for_ingress().filter(|_| !for_ingress);
        if let Some(ingress) = kept.filter(|ingress| overlaps(net, *ingress)) {
            return Err(format!(
                "subnet {net} overlaps {ingress}, which is kept for the network ingress"
            ));
        }
        if let Some(state) = self
            .state
            .networks
            .values()
            .find(|state| overlap(&state.network, [net]))
        {
            return Err(format!(
                "invalid pool request: Pool overlaps with other one on this address space: subnet {net} and network {}",
                state.network.name
            ));
        }
        if let Some(route) = routes_in_use
            .iter()
            .find(|route| route.prefix_len() > 0 && overlaps(net, **route))
        {
            return Err(format!(
                "subnet {net} overlaps {route}, which host {} routes: choose another --subnet",
                self.host_name(asking)
            ));
        }
        if let Some(host) = self
            .state
            .hosts
            .values()
            .find(|host| net.contains(&host.vtep))
        {
            return Err(format!(
                "subnet {net} holds {}, the underlay address of host {}: choose another --subnet",
                host.vtep, host.name
            ));
        }
        Ok(())
    }

    /// All that a drawn subnet must keep clear of.
    fn taken(&self, routes_in_use: &[IpNet], for_ingress: bool) -> Vec<IpNet> {
        let networks = self.state.networks.values();
        let subnets = networks.flat_map(|state| state.network.subnets.iter().map(|s| s.net));
        let hosts = self.state.hosts.values().map(|host| IpNet::from(host.vtep));
        let routes = routes_in_use.iter().filter(|route| route.prefix_len() > 0);
        let ingress = self.kept_for_ingress().filter(|_| !for_ingress);
        subnets
            .chain(hosts)
            .chain(routes.copied())
            .chain(ingress)
            .collect()
    }

    /// The first subnet of the first IPv4 pool, as in Swarm, for the network that carries published ports.
    fn kept_for_ingress(&self) -> Option<IpNet> {
        let mut pools = self.pools().iter();
        let pool = pools.find(|pool| matches!(pool.base, IpNet::V4(_)))?;
        Some(pool.first())
    }
}

/// One subnet of a new network.
enum Wanted {
    /// This one.
    Named(IpNet),
    /// Any free one, of this length where one is given.
    Any { v4: bool, size: Option<u8> },
}

impl Wanted {
    /// As Docker reads it: an unspecified address asks for any prefix of its length.
    fn of(net: IpNet) -> Self {
        if net.addr().is_unspecified() && net.prefix_len() > 0 {
            Self::Any {
                v4: matches!(net, IpNet::V4(_)),
                size: Some(net.prefix_len()),
            }
        } else {
            Self::Named(net)
        }
    }

    fn named(&self) -> Option<IpNet> {
        match self {
            Self::Named(net) => Some(*net),
            Self::Any { .. } => None,
        }
    }

    fn is_v6(&self) -> bool {
        match self {
            Self::Named(net) => matches!(net, IpNet::V6(_)),
            Self::Any { v4, .. } => !v4,
        }
    }
}

pub(super) fn overlap(network: &Network, nets: impl IntoIterator<Item = IpNet>) -> bool {
    nets.into_iter().any(|net| {
        network
            .subnets
            .iter()
            .any(|subnet| overlaps(subnet.net, net))
    })
}
