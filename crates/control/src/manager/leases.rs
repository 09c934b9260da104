//! The blocks of addresses that hosts are leased ahead: granted, taken back, and turned into endpoints.
//!
//! A block shrinks in two steps: its host is told a shorter one, and what it lacks is free once the host says that it does not
//! have it any more. A host that says nothing keeps all of its block for [`LEASE_TIME`], and then what nobody else needs.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use vtep::Vni;

use super::{Connection, Manager};
use crate::epoch::Epoch;
use crate::host::HostId;
use crate::lease::{BLOCK_MAX, BLOCKS_PART, LEASE_TIME, Leased};
use crate::message::ToAgent;
use crate::network::{Endpoint, Network};
use crate::subnet::Subnet;

/// How often blocks that could be larger are made so.
const GROW_EVERY: Duration = Duration::from_secs(10);

/// The blocks of one network.
#[derive(Debug, Default)]
pub(super) struct Leases {
    pub(super) blocks: BTreeMap<HostId, Vec<Leased>>,
    /// No host was told that it may have more.
    limit: usize,
}

impl Leases {
    /// Whose block has this address, and since which epoch.
    pub(super) fn holder(&self, ip: IpAddr) -> Option<(HostId, Epoch)> {
        self.blocks.iter().find_map(|(host, block)| {
            let leased = block.iter().find(|leased| leased.ips.contains(&ip))?;
            Some((*host, leased.epoch))
        })
    }
}

impl Manager {
    /// A host says which addresses of its block it still has. What it has not is free; what it may have more is granted.
    pub(super) fn lease(
        &mut self,
        connection: Connection,
        host: HostId,
        vni: Vni,
        held: &[Epoch],
        now: Duration,
    ) {
        let Some(peer) = self
            .connections
            .get_mut(&connection)
            .filter(|peer| peer.subscriptions.contains(&vni))
        else {
            return;
        };
        let first = peer.blocks_told.insert(vni);
        if !self.state.networks.contains_key(&vni) {
            return;
        }
        let kept: Vec<Leased> = self
            .block(vni, host)
            .iter()
            .filter(|leased| held.contains(&leased.epoch))
            .cloned()
            .collect();
        if first {
            // What it does not have any more it may have used while it was away: that rests.
            self.state.put_block(vni, host, kept, now);
        } else {
            self.state.set_block(vni, host, kept);
        }
        // Before anything is granted anew, or what was given back for somebody would be gone.
        self.release_held(now);
        self.fill(vni, host, now);
        let quota = self.quota(vni);
        let mut block = self.block(vni, host).to_vec();
        block.truncate(quota);
        let epochs: Vec<Epoch> = block.iter().map(|leased| leased.epoch).collect();
        if epochs != held {
            self.send(connection, ToAgent::Lease { vni, block });
        }
    }

    /// A host does not follow this network any more, and said on this connection what it had: nothing of that was used since,
    /// because a manager answered. So it need not rest.
    pub(super) fn give_up_lease(&mut self, vni: Vni, host: HostId) {
        self.state.drop_block(vni, host);
    }

    /// A host has none of this network's addresses any more, and may have used them.
    pub(super) fn end_lease(&mut self, vni: Vni, host: HostId, now: Duration) {
        self.state.put_block(vni, host, Vec::new(), now);
    }

    /// Nothing of a forgotten host's blocks is its own.
    pub(super) fn end_leases(&mut self, host: HostId, now: Duration) {
        let all: Vec<Vni> = self.state.networks.keys().copied().collect();
        for vni in all {
            self.end_lease(vni, host, now);
        }
    }

    /// Blocks became too large, because addresses were taken or hosts came: their hosts are told smaller ones.
    pub(super) fn shrink(&mut self, vni: Vni) {
        let quota = self.quota(vni);
        if let Some(state) = self.state.networks.get_mut(&vni)
            && quota < state.leases.limit
        {
            state.leases.limit = quota;
            self.recall(vni, |block| block.truncate(quota));
        }
    }

    /// Blocks that could be larger grow, now and then.
    pub(super) fn grow(&mut self, now: Duration) {
        if now.saturating_sub(self.grown) < GROW_EVERY {
            return;
        }
        self.grown = now;
        let all: Vec<Vni> = self.state.networks.keys().copied().collect();
        for vni in all {
            for connection in self.subscribers(vni) {
                let Some(host) = self.connections.get(&connection).map(|peer| peer.host) else {
                    continue;
                };
                if self.fill(vni, host, now) {
                    let block = self.block(vni, host).to_vec();
                    self.send(connection, ToAgent::Lease { vni, block });
                }
            }
        }
    }

    /// Makes way for an endpoint of `host` that wants these addresses by number. Asked to wait, the caller tries again.
    pub(super) fn clear_leases(
        &mut self,
        network: &Network,
        wanted: &[IpAddr],
        host: HostId,
        now: Duration,
    ) -> Result<(), String> {
        for &ip in wanted {
            let vni = network.vni;
            let Some((holder, epoch)) = self.state.networks[&vni].leases.holder(ip) else {
                continue;
            };
            let without = |block: &mut Vec<Leased>| block.retain(|leased| leased.epoch != epoch);
            // Its own host asks, so it has not used it; and one that was silent for so long has lost it.
            if holder == host || self.lease_ended(holder, now) {
                self.recall_of(vni, holder, without);
                let mut block = self.block(vni, holder).to_vec();
                without(&mut block);
                self.state.put_block(vni, holder, block, now);
                continue;
            }
            let name = self.host_name(holder);
            if self.recall_of(vni, holder, without) {
                self.recalled = true;
                return Err(format!(
                    "Address already in use: {ip} is leased to host {name}, which does not give it back: try again"
                ));
            }
            return Err(format!(
                "Address already in use: {ip} is leased to host {name}, which fell silent: \
                 try again in {} s, or choose another",
                LEASE_TIME.as_secs()
            ));
        }
        Ok(())
    }

    /// No address is left: takes back what silent hosts had, and asks the others for what they have. `true`: some are free now.
    pub(super) fn reclaim(&mut self, vni: Vni, now: Duration) -> bool {
        let Some(state) = self.state.networks.get_mut(&vni) else {
            return false;
        };
        state.leases.limit = 0;
        let lessees: Vec<HostId> = state.leases.blocks.keys().copied().collect();
        let ended: Vec<HostId> = lessees
            .into_iter()
            .filter(|host| self.lease_ended(*host, now))
            .collect();
        for &host in &ended {
            self.state.drop_block(vni, host);
        }
        if ended.is_empty() {
            self.recalled |= self.recall(vni, Vec::clear);
        }
        !ended.is_empty()
    }

    /// An endpoint exists: its addresses are in nobody's block.
    pub(super) fn unlease(&mut self, endpoint: &Endpoint) {
        let vni = endpoint.vni;
        for &ip in &endpoint.ips {
            let holder = self
                .state
                .networks
                .get(&vni)
                .and_then(|state| state.leases.holder(ip));
            if let Some((holder, epoch)) = holder {
                let mut block = self.block(vni, holder).to_vec();
                block.retain(|leased| leased.epoch != epoch);
                self.state.set_block(vni, holder, block);
            }
        }
    }

    /// Whether an address is in another host's block, by an allocation that is not older than this one.
    pub(super) fn is_leased_to_another(&self, endpoint: &Endpoint, host: HostId) -> bool {
        let state = self.state.networks.get(&endpoint.vni);
        endpoint.ips.iter().any(|ip| {
            let holder = state.and_then(|state| state.leases.holder(*ip));
            holder.is_some_and(|(holder, epoch)| holder != host && epoch >= endpoint.epoch)
        })
    }

    /// What a host may have of a network: of what is free, all blocks together take one part in [`BLOCKS_PART`].
    fn quota(&self, vni: Vni) -> usize {
        let Some(state) = self.state.networks.get(&vni) else {
            return 0;
        };
        let hosts = self.subscribers(vni).len().max(1) as u128;
        let family = |v4: bool| {
            let subnets = state.network.subnets.iter();
            subnets
                .filter(|subnet| matches!(subnet.net, IpNet::V4(_)) == v4)
                .map(Subnet::capacity)
                .reduce(u128::saturating_add)
        };
        let capacity = [true, false].into_iter().filter_map(family).min();
        let free = capacity
            .unwrap_or(0)
            .saturating_sub(state.endpoints.len() as u128);
        usize::try_from(free / (BLOCKS_PART * hosts))
            .map_or(BLOCK_MAX, |quota| quota.min(BLOCK_MAX))
    }

    /// Makes a host's block as large as it may be. `false`: it is, or nothing is to be handed out now, or somebody waits for
    /// addresses.
    fn fill(&mut self, vni: Vni, host: HostId, now: Duration) -> bool {
        let quota = self.quota(vni);
        let mut block = self.block(vni, host).to_vec();
        if block.len() >= quota || !self.held.is_empty() || self.not_ready(now).is_some() {
            return false;
        }
        let before = block.len();
        while block.len() < quota {
            let Some(ips) = self.state.draw_top(vni, now) else {
                break;
            };
            let network = self.state.networks[&vni].network.clone();
            let (epoch, mac) = match self.mac_of_address(&network, &ips) {
                Ok(Some(mac)) => (self.state.draw(), mac),
                // A MAC of its own that somebody has: another does as well.
                Ok(None) | Err(_) => self.draw_mac(vni, &ips),
            };
            block.push(Leased { epoch, mac, ips });
            // Each is kept from the next one's search.
            self.state.set_block(vni, host, block.clone());
        }
        if let Some(state) = self.state.networks.get_mut(&vni) {
            state.leases.limit = state.leases.limit.max(quota);
        }
        block.len() > before
    }

    fn block(&self, vni: Vni, host: HostId) -> &[Leased] {
        let state = self.state.networks.get(&vni);
        state
            .and_then(|state| state.leases.blocks.get(&host))
            .map_or(&[], Vec::as_slice)
    }

    /// Whether a host has been silent for so long that its blocks may be others'.
    fn lease_ended(&self, host: HostId, now: Duration) -> bool {
        !self.by_host.contains_key(&host)
            && self
                .liveness
                .get(&host)
                .is_none_or(|liveness| now.saturating_sub(liveness.seen) >= LEASE_TIME)
    }

    /// Tells every connected host that has a block of this network what is to be left of it. `true`: one was told.
    fn recall(&mut self, vni: Vni, shorten: impl Fn(&mut Vec<Leased>)) -> bool {
        let Some(state) = self.state.networks.get(&vni) else {
            return false;
        };
        let hosts: Vec<HostId> = state.leases.blocks.keys().copied().collect();
        let mut told = false;
        for host in hosts {
            told |= self.recall_of(vni, host, &shorten);
        }
        told
    }

    fn recall_of(&mut self, vni: Vni, host: HostId, shorten: impl Fn(&mut Vec<Leased>)) -> bool {
        let mut block = self.block(vni, host).to_vec();
        let before = block.len();
        shorten(&mut block);
        match self.by_host.get(&host) {
            Some(&connection) if block.len() < before => {
                self.send(connection, ToAgent::Lease { vni, block });
                true
            }
            _ => false,
        }
    }
}
