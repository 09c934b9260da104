//! Endpoints and names: who gets which address, and what the owner, and nobody else, may change of it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use vtep::{MacAddr, Vni};

use super::state::Held;
use super::{Connection, Manager};
use crate::epoch::Epoch;
use crate::host::HostId;
use crate::message::{OwnedEndpoint, ToAgent};
use crate::names::Names;
use crate::network::{Endpoint, is_valid_name, not_attachable, quote};
use crate::request::{EndpointState, Response};
use crate::row::{Row, State as RowState};
use crate::service::Membership;

/// What is asked for a container in one network.
#[derive(Clone, Debug)]
pub(super) struct Wish<'a> {
    /// The network's name, id or unique start of an id.
    pub(super) network: &'a str,
    pub(super) container: String,
    pub(super) ips: &'a [IpAddr],
    pub(super) mac: Option<MacAddr>,
    /// The service that it is to be a member of, and its weight there.
    pub(super) joining: Option<(&'a str, u16)>,
}

impl Manager {
    pub(super) fn claim_name(&mut self, name: &str, host: HostId) -> Result<Response, String> {
        if !is_valid_name(name) {
            return Err(format!(
                "invalid container name {}: it must match [a-z0-9][a-z0-9_.-]{{0,62}}",
                quote(name)
            ));
        }
        self.check_holder_of_name(name, host)?;
        if !self.state.names.contains_key(name) {
            self.check_names(host)?;
            self.state.put_name(name, host);
        }
        Ok(Response::Done)
    }

    /// A name goes after what carries it: while an endpoint has it, it can't become another host's.
    pub(super) fn release_name(&mut self, name: &str, host: HostId) -> Result<Response, String> {
        if self.state.names.get(name) != Some(&host) {
            return Ok(Response::Done);
        }
        let mut networks = self.state.networks.values();
        let carrying = networks.find(|state| {
            let mut held = state.endpoints.values();
            held.any(|held| held.owner == host && held.endpoint.container == name)
        });
        if let Some(state) = carrying {
            return Err(format!(
                "container {name} of host {} still has its place on network {}: its name is freed after its addresses",
                self.host_name(host),
                state.network.name
            ));
        }
        self.state.remove_name(name);
        Ok(Response::Done)
    }

    pub(super) fn allocate(
        &mut self,
        wish: Wish<'_>,
        host: HostId,
        now: Duration,
    ) -> Result<Response, String> {
        let Wish {
            network,
            container,
            ips,
            mac,
            joining,
        } = wish;
        let vni = self.find_network(network)?;
        let member = joining
            .map(|joining| self.join_service(vni, joining))
            .transpose()?;
        let state = &self.state.networks[&vni];
        self.check_holder(&state.network, &container, host)?;
        if state.network.ingress && member.is_none() && is_valid_name(&container) {
            return Err(format!(
                "network {} carries published ports and takes no containers: choose another network",
                state.network.name
            ));
        }
        if !state.network.attachable && member.is_none() && is_valid_name(&container) {
            return Err(not_attachable(&state.network));
        }
        self.check_holder_of_name(&container, host)?;
        let network = state.network.clone();
        if let Some(held) = state
            .endpoints
            .values()
            .find(|held| held.endpoint.container == container)
        {
            let row = state.row_of(&held.endpoint);
            let down = row.is_some_and(|row| row.state == RowState::Down);
            let had = row.and_then(|row| row.member);
            let same = ips.iter().all(|ip| held.endpoint.ips.contains(ip))
                && mac.is_none_or(|m| m == held.endpoint.mac)
                && had.map(|had| (had.service, had.weight))
                    == member.map(|member| (member.service, member.weight));
            // The answer to the first asking was lost.
            if held.owner == host && down && same {
                return Ok(Response::Endpoint(Endpoint {
                    member,
                    ..held.endpoint.clone()
                }));
            }
            return Err(format!(
                "container {container} is already attached to network {} on host {}",
                network.name,
                self.host_name(held.owner)
            ));
        }
        self.check_endpoints(host)?;
        let mut taken = self.check_wanted(&network, ips)?;
        self.clear_leases(&network, &taken, host, now)?;
        if let Some(mac) = mac {
            self.check_mac(&network, mac)?;
        }
        // What can refuse from here on leaves a cursor that moved for nothing, which does no harm.
        for v4 in [true, false] {
            if let Some(ip) = self.draw_family(&network, v4, &taken, now)? {
                taken.push(ip);
            }
        }
        taken.sort_by_key(IpAddr::is_ipv6);
        let mac = match mac {
            None => self.mac_of_address(&network, &taken)?,
            given => given,
        };
        let (epoch, mac) = match mac {
            Some(mac) => (self.state.draw(), mac),
            None => self.draw_mac(vni, &taken),
        };
        let endpoint = Endpoint {
            vni,
            container,
            mac,
            ips: taken,
            epoch,
            member,
            names: None,
        };
        // Who did not ask for the name has it with the first address: no other host may claim it now.
        if is_valid_name(&endpoint.container) {
            self.claim_name(&endpoint.container, host)?;
        }
        self.put_rows(&endpoint, host, 0, RowState::Down, now);
        self.state.put_endpoint(Held::new(&endpoint, host));
        self.shrink(vni);
        Ok(Response::Endpoint(endpoint))
    }

    pub(super) fn free(
        &mut self,
        vni: Vni,
        epoch: Epoch,
        host: HostId,
        now: Duration,
    ) -> Result<Response, String> {
        let held = self
            .state
            .networks
            .get(&vni)
            .and_then(|state| state.endpoints.get(&epoch));
        let Some(held) = held else {
            return Ok(Response::Done);
        };
        if held.owner != host {
            let (asking, owner) = (self.host_name(host), self.host_name(held.owner));
            tracing::warn!(%asking, %owner, vni = vni.get(), %epoch, "refused to free another host's endpoint");
            return Err(format!(
                "endpoint {epoch} belongs to host {owner}, not to {asking}"
            ));
        }
        self.free_endpoint(vni, epoch, now);
        Ok(Response::Done)
    }

    /// Frees an endpoint for good, under an epoch above its own.
    fn free_endpoint(&mut self, vni: Vni, epoch: Epoch, now: Duration) {
        if let Some(Held { endpoint, owner }) = self.state.remove_endpoint(vni, epoch) {
            let freed = Endpoint {
                epoch: self.state.draw(),
                ..endpoint
            };
            self.put_rows(&freed, owner, 0, RowState::Free, now);
        }
    }

    /// The owner's edit of its own endpoint.
    pub(super) fn publish(
        &mut self,
        connection: Connection,
        host: HostId,
        endpoint: Endpoint,
        owner_seq: u32,
        published: EndpointState,
        now: Duration,
    ) {
        let (vni, epoch) = (endpoint.vni, endpoint.epoch);
        let endpoint = Endpoint {
            member: endpoint.member.map(Membership::clamped),
            names: self.checked_names(&endpoint, host),
            ..endpoint
        };
        let state = match published {
            EndpointState::Up => RowState::Up,
            EndpointState::Down => RowState::Down,
        };
        let known = self.state.networks.get(&vni).and_then(|network| {
            let held = network.endpoints.get(&epoch)?;
            let row = network.row_of(&held.endpoint)?;
            Some((held.clone(), row.owner_seq, serves(row.state, row.member)))
        });
        match known {
            Some((held, ..)) if held.owner != host => {
                let (sender, owner) = (self.host_name(host), self.host_name(held.owner));
                tracing::warn!(%sender, %owner, vni = vni.get(), %epoch, "refused news of another host's endpoint");
            }
            // The owner's word on the state counts; what the endpoint is, the manager knows.
            Some((held, seq, served)) if owner_seq > seq => {
                let edited = Endpoint {
                    member: endpoint.member,
                    // Those of another container would be asked for in vain at that one.
                    names: endpoint
                        .names
                        .filter(|names| names.container == held.endpoint.container),
                    ..held.endpoint
                };
                self.put_rows(&edited, host, owner_seq, state, now);
                let serves = serves(state, edited.member);
                if serves != served {
                    self.note_member(serves, &edited, host);
                }
            }
            Some(_) => {}
            None if self.may_adopt(&endpoint, host) => {
                let (owner, container) = (self.host_name(host), &endpoint.container);
                tracing::info!(%owner, %container, %epoch, "took in an endpoint that was started from a block, or that the store had lost");
                self.unlease(&endpoint);
                self.put_rows(&endpoint, host, owner_seq, state, now);
                match self.state.names.get(&endpoint.container) {
                    // A host's own endpoint has no name that a container could have.
                    None if !is_valid_name(&endpoint.container) => {}
                    None => self.state.put_name(&endpoint.container, host),
                    Some(holder) if *holder != host => {
                        let holder = self.host_name(*holder);
                        tracing::warn!(%owner, %holder, %container, "two hosts have a container of this name; the name is the holder's");
                    }
                    Some(_) => {}
                }
                self.state.put_endpoint(Held::new(&endpoint, host));
                self.shrink(vni);
            }
            // A network never heard of may be one that the store lost and nobody has told yet: not a reason to stop anybody.
            None if !self.state.networks.contains_key(&vni)
                && !self.state.floors.contains_key(&vni) =>
            {
                let host = self.host_name(host);
                tracing::warn!(%host, vni = vni.get(), "an endpoint of an unknown network was published");
            }
            None => self.send(connection, ToAgent::RowLost { vni, epoch }),
        }
    }

    /// The names of an endpoint as its owner says them, if they may be: none where it says what no honest host does.
    fn checked_names(&self, endpoint: &Endpoint, host: HostId) -> Option<Arc<Names>> {
        let names = endpoint.names.clone()?;
        let anothers = self.other_holder(&names.container, host).is_some();
        if names.is_valid() && names.container == endpoint.container && !anothers {
            return Some(names);
        }
        let host = self.host_name(host);
        tracing::warn!(%host, vni = endpoint.vni.get(), epoch = %endpoint.epoch, "refused names that an endpoint can't have");
        None
    }

    fn check_holder_of_name(&self, name: &str, host: HostId) -> Result<(), String> {
        let Some(holder) = self.other_holder(name, host) else {
            return Ok(());
        };
        Err(format!(
            "container name {name} is already in use on host {}: choose another, or remove it there \
             (`towline rm {name}`)",
            self.host_name(holder)
        ))
    }

    /// The host that has a container's name, if that is not `host`.
    fn other_holder(&self, container: &str, host: HostId) -> Option<HostId> {
        let holder = self.state.names.get(container).copied();
        holder.filter(|holder| *holder != host)
    }

    /// Whether an endpoint that this host runs, and that is not known here, is one of its block, or from a time that the store
    /// lost.
    fn may_adopt(&self, endpoint: &Endpoint, host: HostId) -> bool {
        let Some(state) = self.state.networks.get(&endpoint.vni) else {
            return false;
        };
        let network = &state.network;
        // Whatever this store has issued left its row, and what followed is above it: a row that is below, or missing, is a
        // row that was lost.
        endpoint.epoch <= self.state.last()
            && endpoint.epoch > network.epoch
            && self
                .check_holder(network, &endpoint.container, host)
                .is_ok()
            && (network.attachable
                || endpoint.member.is_some()
                || !is_valid_name(&endpoint.container))
            && (1..=2).contains(&endpoint.ips.len())
            && endpoint.ips.iter().all(|ip| {
                let newer = state.table.row(*ip).is_none_or(|row| {
                    row.epoch < endpoint.epoch && (row.state == RowState::Free || row.owner == host)
                });
                newer
                    && network
                        .subnets
                        .iter()
                        .any(|subnet| subnet.is_assignable(*ip))
            })
            && self.check_mac(network, endpoint.mac).is_ok()
            && !self.is_leased_to_another(endpoint, host)
            && self.check_endpoints(host).is_ok()
            && self.check_names(host).is_ok()
    }

    /// Frees all that a host holds: endpoints and names.
    pub(super) fn free_all(&mut self, host: HostId, now: Duration) {
        let all = self
            .state
            .networks
            .values()
            .flat_map(|state| state.endpoints.values());
        let held: Vec<(Vni, Epoch)> = all
            .filter(|held| held.owner == host)
            .map(|held| (held.endpoint.vni, held.endpoint.epoch))
            .collect();
        for (vni, epoch) in held {
            self.free_endpoint(vni, epoch, now);
        }
        let names = self
            .state
            .names
            .iter()
            .filter(|(_, holder)| **holder == host);
        let names: Vec<String> = names.map(|(name, _)| name.clone()).collect();
        for name in names {
            self.state.remove_name(&name);
        }
    }

    /// What a host holds.
    pub(super) fn owned(&self, host: HostId) -> (Vec<OwnedEndpoint>, Vec<String>) {
        let endpoints = self.state.networks.values().flat_map(|state| {
            state
                .endpoints
                .values()
                .filter(|held| held.owner == host)
                .filter_map(|held| {
                    let row = state.row_of(&held.endpoint)?;
                    let state = if row.state == RowState::Up {
                        EndpointState::Up
                    } else {
                        EndpointState::Down
                    };
                    let endpoint = Endpoint {
                        member: row.member,
                        names: row.names.clone(),
                        ..held.endpoint.clone()
                    };
                    Some(OwnedEndpoint {
                        endpoint,
                        owner_seq: row.owner_seq,
                        state,
                    })
                })
        });
        let names = self
            .state
            .names
            .iter()
            .filter(|(_, holder)| **holder == host);
        (
            endpoints.collect(),
            names.map(|(name, _)| name.clone()).collect(),
        )
    }

    fn put_rows(
        &mut self,
        endpoint: &Endpoint,
        owner: HostId,
        owner_seq: u32,
        state: RowState,
        now: Duration,
    ) {
        for &ip in &endpoint.ips {
            let row = Row {
                ip,
                epoch: endpoint.epoch,
                owner,
                owner_seq,
                state,
                mac: endpoint.mac,
                member: endpoint.member,
                names: endpoint.names.clone(),
            };
            self.state.put_row(endpoint.vni, row, now);
        }
        self.note_endpoint(endpoint, owner, owner_seq, state);
    }
}

/// Whether new connections may go to an endpoint of this state.
fn serves(state: RowState, member: Option<Membership>) -> bool {
    state == RowState::Up && member.is_some_and(|member| member.serving)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::testing::{Bench, NOW, id};
    use crate::message::ToManager;
    use crate::names::ALIASES_MAX;

    fn names(container: &str, aliases: Vec<String>) -> Option<Arc<Names>> {
        Some(Arc::new(Names {
            container: container.to_owned(),
            id: "0123456789ab".to_owned(),
            aliases,
        }))
    }

    #[test]
    fn a_host_names_its_own_endpoints_and_nothing_else_and_within_bounds() {
        let (mut bench, vni, [mine, others]) = Bench::new();
        let told = |bench: &Bench, endpoint: &Endpoint| {
            let row = bench.manager.state.networks[&vni].row_of(&endpoint.clone());
            row.and_then(|row| row.names.clone())
        };
        let mut seq = 10;
        let mut say = |bench: &mut Bench, endpoint: &Endpoint, names: Option<Arc<Names>>| {
            seq += 1;
            let message = ToManager::Publish {
                endpoint: Endpoint {
                    names,
                    ..endpoint.clone()
                },
                owner_seq: seq,
                state: EndpointState::Up,
            };
            bench.say(1, message);
        };
        let good = names(&mine.container, vec!["db".to_owned()]);
        say(&mut bench, &mine, good.clone());
        assert_eq!(told(&bench, &mine), good);
        let (owned, _) = bench.manager.owned(id(1));
        assert_eq!(owned[0].endpoint.names, good, "a new agent hears of them");
        for lie in [
            names(&others.container, Vec::new()),
            names(&mine.container, vec!["db".to_owned(); ALIASES_MAX + 1]),
            names(&mine.container, vec!["a b".to_owned()]),
        ] {
            say(&mut bench, &mine, lie);
            assert_eq!(told(&bench, &mine), None);
        }
        // What it says of the endpoint's container does not make it another's.
        let other_container = Endpoint {
            container: others.container.clone(),
            ..mine.clone()
        };
        let stolen = names(&others.container, Vec::new());
        say(&mut bench, &other_container, stolen);
        assert_eq!(told(&bench, &mine), None);
        let before = told(&bench, &others);
        say(
            &mut bench,
            &others,
            names(&others.container, vec!["x".to_owned()]),
        );
        assert_eq!(told(&bench, &others), before, "not its endpoint");
        // A name that another host's container has, on whatever network.
        let holders = &mut bench.manager.state.names;
        holders.insert(mine.container.clone(), id(2));
        say(&mut bench, &mine, good);
        assert_eq!(told(&bench, &mine), None);
        let wish = Wish {
            network: "blue",
            container: mine.container,
            ips: &[],
            mac: None,
            joining: None,
        };
        let refused = bench.manager.allocate(wish, id(1), NOW);
        let refused = refused.expect_err("the name is another host's");
        assert!(refused.contains("already in use on host"), "{refused}");
        bench.manager.handle_timeout(NOW);
    }

    #[test]
    fn a_name_is_freed_after_what_carries_it() {
        let (mut bench, vni, [_, theirs]) = Bench::new();
        let manager = &mut bench.manager;
        let name = &theirs.container;
        assert_eq!(
            manager.state.names.get(name),
            Some(&id(2)),
            "an address brings the name with it"
        );
        let refused = manager.release_name(name, id(2)).unwrap_err();
        assert!(
            refused.contains(name) && refused.contains("network blue"),
            "{refused}"
        );
        assert!(manager.claim_name(name, id(1)).is_err());
        assert!(
            manager.release_name(name, id(1)).is_ok(),
            "it is not its own"
        );
        manager.free(vni, theirs.epoch, id(2), NOW).unwrap();
        manager.release_name(name, id(2)).unwrap();
        assert!(manager.claim_name(name, id(1)).is_ok());
    }
}
