//! The network of published ports: one a cluster, made once, removed and made anew by an operator alone.

use std::net::Ipv6Addr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use sha2::{Digest as _, Sha256};
use vtep::Vni;

use super::{Connection, Manager, Output};
use crate::host::HostId;
use crate::message::ToAgent;
use crate::network::{Network, NetworkSpec, is_valid_name, quote};
use crate::request::Response;

/// Its name, unless an operator gives it another.
pub(super) const INGRESS: &str = "ingress";
/// Its VNI, if that is free: the last below those that are handed out.
const INGRESS_VNI: u32 = 4095;

impl Manager {
    /// Makes the network of published ports, unless this cluster has or had one.
    pub(super) fn make_ingress(
        &mut self,
        routes_in_use: &[IpNet],
        asking: HostId,
        now: Duration,
    ) -> Result<Response, String> {
        if self.state.had_ingress() {
            return Ok(Response::Done);
        }
        let free = |vni: &Vni| !self.state.networks.contains_key(vni);
        let v4 = NetworkSpec {
            ingress: true,
            vni: Vni::new(INGRESS_VNI).ok().filter(free),
            ..NetworkSpec::named(INGRESS)
        };
        let mut spec = v4.clone();
        let v6 = self.pools().iter().any(|pool| pool.base.addr().is_ipv6());
        if v6 {
            spec.ipv6 = true;
        } else if let Some(pool) = self.pools().first() {
            let any = Ipv4Net::new_assert([0; 4].into(), pool.size);
            spec.subnets = vec![any.into(), self.own_prefix()];
        }
        let made = self.create_network(spec, routes_in_use, asking, now);
        let Err(both) = made else {
            return Ok(Response::Done);
        };
        // A link may be too narrow for IPv6 (RFC 8200 §5), or its prefix taken.
        tracing::warn!("published ports have no IPv6: {both}");
        self.create_network(v4, routes_in_use, asking, now)?;
        Ok(Response::Done)
    }

    /// A unique local prefix (RFC 4193 §3.2.2) that follows from the cluster's name.
    fn own_prefix(&self) -> IpNet {
        let hash = Sha256::digest(format!("towline {INGRESS} {}", self.settings.cluster));
        let mut octets = [0; 16];
        octets[0] = 0xfd;
        octets[1..6].copy_from_slice(&hash[..5]);
        Ipv6Net::new_assert(Ipv6Addr::from(octets), 64).into()
    }

    /// Tells everybody which network carries published ports.
    pub(super) fn tell_ingress(&mut self) {
        let to: Vec<Connection> = self.connections.keys().copied().collect();
        let message = ToAgent::Ingress(self.state.ingress());
        self.outputs.push_back(Output::Send { to, message });
    }

    /// Whether an endpoint on a network may have this name: a container's, or on the network of published ports the asking host's own,
    /// `host:NAME`, which no container can have.
    pub(super) fn check_holder(
        &self,
        network: &Network,
        name: &str,
        host: HostId,
    ) -> Result<(), String> {
        let own = || network.ingress && *name == format!("host:{}", self.host_name(host));
        if is_valid_name(name) || own() {
            return Ok(());
        }
        Err(format!("invalid container name {}", quote(name)))
    }

    /// Whether no service needs a network.
    pub(super) fn check_unused(&self, vni: Vni) -> Result<(), String> {
        let ingress = self.state.ingress();
        let services = self.state.services.values();
        let mut users =
            services.filter(|service| service.networks(ingress).any(|network| network == vni));
        let Some(service) = users.next() else {
            return Ok(());
        };
        let name = &service.spec.name;
        Err(if ingress == Some(vni) {
            format!("ingress network cannot be removed because service {name} depends on it")
        } else {
            let network = &self.state.networks[&vni].network.name;
            format!("network {network} is in use by service {name}")
        })
    }
}
