//! Which addresses and which MAC address an endpoint gets, and why it gets none.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use vtep::{MacAddr, Vni};

use super::Manager;
use crate::allocator::{self, Usage};
use crate::epoch::Epoch;
use crate::host::HostId;
use crate::network::{MacMode, Network};
use crate::row::State as RowState;
use crate::subnet::Subnet;

/// Hosts in one line of refusal.
const HOSTS_SHOWN: usize = 5;

impl Manager {
    /// Addresses that were asked for by number: one a family, inside, and free.
    pub(super) fn check_wanted(
        &self,
        network: &Network,
        ips: &[IpAddr],
    ) -> Result<Vec<IpAddr>, String> {
        let mut taken: Vec<IpAddr> = Vec::new();
        for &ip in ips {
            let Some(subnet) = network
                .subnets
                .iter()
                .find(|subnet| subnet.net.contains(&ip))
            else {
                return Err(format!(
                    "invalid address {ip}: It does not belong to any of this network's subnets ({})",
                    join(network.subnets.iter().map(|subnet| subnet.net))
                ));
            };
            if let Some(reserved) = subnet.reserved(ip) {
                return Err(format!("invalid address {ip}: it {reserved}"));
            }
            if taken.iter().any(|other| other.is_ipv4() == ip.is_ipv4()) {
                return Err(format!(
                    "invalid address {ip}: a container has one address of each family"
                ));
            }
            let state = &self.state.networks[&network.vni];
            if let Some(row) = state
                .table
                .row(ip)
                .filter(|row| row.state != RowState::Free)
            {
                if let Some(service) = self.state.services.get(&row.epoch) {
                    return Err(format!(
                        "Address already in use: {ip} is the virtual address of service {}",
                        service.spec.name
                    ));
                }
                let holder = state
                    .endpoints
                    .get(&row.epoch)
                    .map_or("?", |held| held.endpoint.container.as_str());
                return Err(format!(
                    "Address already in use: {ip} is container {holder}'s on host {}",
                    self.host_name(row.owner)
                ));
            }
            taken.push(ip);
        }
        Ok(taken)
    }

    /// The next free address of a family that the network has and `taken` lacks.
    pub(super) fn draw_family(
        &mut self,
        network: &Network,
        v4: bool,
        taken: &[IpAddr],
        now: Duration,
    ) -> Result<Option<IpAddr>, String> {
        if taken.iter().any(|ip| ip.is_ipv4() == v4) {
            return Ok(None);
        }
        let subnets: Vec<&Subnet> = network
            .subnets
            .iter()
            .filter(|subnet| matches!(subnet.net, IpNet::V4(_)) == v4)
            .collect();
        let mut full: Vec<Usage> = Vec::new();
        for subnet in &subnets {
            let mut drawn = self.state.draw_address(network.vni, subnet, now);
            if matches!(drawn, Some(Err(usage)) if usage.set_aside > 0)
                && self.reclaim(network.vni, now)
            {
                drawn = self.state.draw_address(network.vni, subnet, now);
            }
            match drawn {
                Some(Ok(ip)) => return Ok(Some(ip)),
                Some(Err(usage)) => full.push(usage),
                None => {}
            }
        }
        if full.is_empty() {
            return Ok(None);
        }
        Err(self.exhausted(network, &subnets, &full))
    }

    /// The line that says why there is no address: how many are in use and by whom, and when one is free again.
    fn exhausted(&self, network: &Network, subnets: &[&Subnet], full: &[Usage]) -> String {
        let sum = |part: fn(&Usage) -> u128| {
            full.iter()
                .fold(0u128, |sum, usage| sum.saturating_add(part(usage)))
        };
        let v4 = subnets
            .iter()
            .any(|subnet| matches!(subnet.net, IpNet::V4(_)));
        let (in_use, capacity) = (sum(|usage| usage.in_use), sum(|usage| usage.capacity));
        let mut line = format!(
            "no available {} addresses on this network's address pools: {} ({}): {in_use} of {capacity} in use",
            if v4 { "IPv4" } else { "IPv6" },
            network.name,
            network.id
        );
        let holders = self.holders(network.vni, subnets);
        if !holders.is_empty() {
            line += &format!(" ({holders})");
        }
        let resting = sum(|usage| usage.resting);
        if let Some(next) = full.iter().filter_map(|usage| usage.next_free).min() {
            let seconds = next.as_millis().div_ceil(1000);
            line += &format!(", {resting} resting, the next free in {seconds} s");
        }
        let set_aside = sum(|usage| usage.set_aside);
        if set_aside > 0 {
            line += &format!(", {set_aside} leased to hosts that do not answer");
        }
        line + "; remove containers, or create a network with a larger subnet"
    }

    /// The hosts that hold addresses of these subnets with how many each, most first.
    fn holders(&self, vni: Vni, subnets: &[&Subnet]) -> String {
        let mut counts: BTreeMap<HostId, usize> = BTreeMap::new();
        let held = self.state.networks[&vni].table.rows().filter(|row| {
            row.state != RowState::Free && subnets.iter().any(|subnet| subnet.in_bounds(row.ip))
        });
        for row in held {
            *counts.entry(row.owner).or_default() += 1;
        }
        let mut counts: Vec<(String, usize)> = counts
            .into_iter()
            .map(|(host, count)| match host {
                HostId::NOBODY => ("services".to_owned(), count),
                host => (self.host_name(host), count),
            })
            .collect();
        counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        let more = counts.len().saturating_sub(HOSTS_SHOWN);
        let shown = counts
            .iter()
            .take(HOSTS_SHOWN)
            .map(|(host, count)| format!("{count} on {host}"));
        let more = (more > 0).then(|| format!("the rest on {more} more hosts"));
        join(shown.chain(more))
    }

    /// The MAC address of an endpoint with these addresses, where the network makes it of them.
    pub(super) fn mac_of_address(
        &self,
        network: &Network,
        ips: &[IpAddr],
    ) -> Result<Option<MacAddr>, String> {
        let v4 = ips.iter().find_map(|ip| match ip {
            IpAddr::V4(ip) => Some(*ip),
            IpAddr::V6(_) => None,
        });
        match (network.addressing.mac, v4) {
            (MacMode::Docker, Some(ip)) => {
                let mac = allocator::docker_mac(ip);
                self.check_mac(network, mac)?;
                Ok(Some(mac))
            }
            _ => Ok(None),
        }
    }

    /// An epoch and the MAC address that follows from it, held by nobody, and not the one that the address had before.
    pub(super) fn draw_mac(&mut self, vni: Vni, ips: &[IpAddr]) -> (Epoch, MacAddr) {
        let mut tries = 0..256;
        loop {
            let epoch = self.state.draw();
            // An address has 256 MACs of its own. Where endpoints that chose theirs hold them all, the epoch alone makes one.
            let mac = allocator::mac(epoch, if tries.next().is_some() { ips } else { &[] });
            let table = &self.state.networks[&vni].table;
            let reused = ips
                .iter()
                .filter_map(|ip| table.row(*ip))
                .any(|row| row.mac == mac);
            if !reused && table.holders(mac).next().is_none() {
                return (epoch, mac);
            }
        }
    }

    pub(super) fn check_mac(&self, network: &Network, mac: MacAddr) -> Result<(), String> {
        if mac.is_multicast() || mac.is_zero() {
            return Err(format!(
                "invalid MAC address {mac}: it must be a unicast address"
            ));
        }
        if mac == network.gateway_mac {
            return Err(format!(
                "invalid MAC address {mac}: it is the gateway's of network {}",
                network.name
            ));
        }
        match self.state.networks[&network.vni].table.holders(mac).next() {
            Some(row) => Err(format!(
                "MAC address {mac} is already in use by {} on host {}: choose another",
                row.ip,
                self.host_name(row.owner)
            )),
            None => Ok(()),
        }
    }
}

fn join<T: ToString>(items: impl Iterator<Item = T>) -> String {
    items
        .map(|item| item.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}
