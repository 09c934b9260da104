//! Hosts: who is let in, who is masked, who is forgotten.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use super::limits::Budget;
use super::{
    Connection, ENDPOINTS_PER_MESSAGE, GRACE, HEARTBEAT, ITEMS_PER_MESSAGE, Liveness, Manager,
    Output, Peer, Refusal,
};
use crate::agent::{SILENCE, millis};
use crate::epoch::Epoch;
use crate::events::Action;
use crate::host::{HostId, HostInfo, HostView};
use crate::message::ToAgent;
use crate::network::{is_valid_name, quote};
use crate::pki::Role;
use crate::request::Response;

/// The least IPv4 MTU that every host takes (RFC 791), and the overhead over IPv6.
const LINK_MTU_MIN: u16 = 576 + 70;
/// Hosts in one message: each may have labels of some kilobytes.
const HOSTS_PER_MESSAGE: usize = 64;

impl Manager {
    /// A host said hello, from this address. [`Manager::admit`] has seen its certificate; without that it is a worker.
    pub fn handle_hello(
        &mut self,
        connection: Connection,
        from: IpAddr,
        info: HostInfo,
        last_epoch: Epoch,
        now: Duration,
    ) -> Result<(), Refusal> {
        let id = info.id;
        self.check_revoked(id)?;
        self.check_host(&info, from, now)?;
        let known = self.state.last();
        if self.has_lost(id, last_epoch) {
            tracing::warn!(
                host = %info.name, seen = %last_epoch, %known,
                "the store is older than what this host has seen; learning from hosts what runs"
            );
            self.unsettled_until = Some(now + GRACE);
        }
        if let Some(old) = self.by_host.insert(id, connection) {
            self.connections.remove(&old);
            self.outputs.push_back(Output::Close(old));
        }
        let known = self.state.hosts.contains_key(&id);
        let changed = self.state.hosts.get(&id) != Some(&info);
        let warnings = self.mtu_warnings(info.vtep, info.link_mtu);
        if changed {
            self.state.put_host(info);
        }
        let was_up = self
            .liveness
            .insert(
                id,
                Liveness {
                    seen: now,
                    up: true,
                    port_problem: None,
                },
            )
            .is_some_and(|known| known.up);
        if changed || !was_up {
            self.changed_hosts.insert(id);
        }
        if !known {
            self.note_host(Action::Join, id);
        } else if !was_up {
            self.note_host(Action::Up, id);
        }
        let certificate = self.admitted.remove(&connection);
        let role = certificate
            .as_ref()
            .map_or(Role::Worker, |certificate| certificate.role);
        if let Some(certificate) = certificate {
            self.state.put_certificate(id, certificate.serial);
        }
        self.connections.insert(
            connection,
            Peer {
                host: id,
                role,
                heard: now,
                subscriptions: BTreeSet::new(),
                repairs: Budget::new(now),
                applied: HashMap::new(),
                blocks_told: BTreeSet::new(),
            },
        );
        self.welcome(connection, id, warnings);
        Ok(())
    }

    pub(super) fn check_host(
        &self,
        info: &HostInfo,
        from: IpAddr,
        now: Duration,
    ) -> Result<(), String> {
        let HostInfo {
            id,
            name,
            vtep,
            port,
            link_mtu,
            ..
        } = info;
        if !is_valid_name(name) {
            return Err(format!(
                "invalid host name {}: it must match [a-z0-9][a-z0-9_.-]{{0,62}}",
                quote(name)
            ));
        }
        if *port == 0 {
            return Err(format!("host {name} names port 0 for VXLAN"));
        }
        if *link_mtu < LINK_MTU_MIN {
            return Err(format!(
                "the link of host {name} carries {link_mtu} bytes: an overlay needs {LINK_MTU_MIN}"
            ));
        }
        // Frames of the host come from its VTEP address; so must its news, or one host could draw another's traffic.
        if from.to_canonical() != *vtep {
            return Err(format!(
                "host {name} names {vtep} as its underlay address but connects from {from}: \
                 start its agent with the address that reaches the manager"
            ));
        }
        let others = || self.state.hosts.values().filter(|other| other.id != *id);
        if let Some(other) = others().find(|other| other.name == *name) {
            let state = if self.is_up(other.id) { "up" } else { "down" };
            return Err(format!(
                "host name {name} is taken by the host at {} (id {}, {state}): \
                 choose another with --name, or remove that host first",
                other.vtep, other.id
            ));
        }
        if let Some(other) = others().find(|other| other.vtep == *vtep) {
            return Err(format!(
                "underlay address {vtep} is taken by host {} (id {}): remove that host first",
                other.name, other.id
            ));
        }
        if let Some(other) = others().find(|other| other.vtep.is_ipv4() != vtep.is_ipv4()) {
            return Err(format!(
                "the cluster's underlay is the family of {}, host {}; {vtep} is of the other",
                other.vtep, other.name
            ));
        }
        let known = self.state.hosts.get(id).filter(|known| known.vtep != *vtep);
        let live = self
            .by_host
            .get(id)
            .and_then(|connection| self.connections.get(connection));
        if let (Some(known), Some(live)) = (known, live)
            && now.saturating_sub(live.heard) < SILENCE
        {
            return Err(format!(
                "host id {id} is connected from {}: two hosts have one state folder",
                known.vtep
            ));
        }
        Ok(())
    }

    pub(super) fn welcome(&mut self, connection: Connection, host: HostId, warnings: Vec<String>) {
        self.send(
            connection,
            ToAgent::Welcome {
                cluster: self.settings.cluster.clone(),
                manager: self.settings.host,
                heartbeat: HEARTBEAT,
                last_epoch: self.state.last(),
                ingress: self.state.ingress(),
                warnings,
            },
        );
        self.newcomers.insert(connection);
        let (endpoints, names) = self.owned(host);
        for part in endpoints.chunks(ENDPOINTS_PER_MESSAGE) {
            self.send(
                connection,
                ToAgent::Owned {
                    endpoints: part.to_vec(),
                    names: Vec::new(),
                    last: false,
                },
            );
        }
        for part in names.chunks(ITEMS_PER_MESSAGE) {
            self.send(
                connection,
                ToAgent::Owned {
                    endpoints: Vec::new(),
                    names: part.to_vec(),
                    last: false,
                },
            );
        }
        self.send(
            connection,
            ToAgent::Owned {
                endpoints: Vec::new(),
                names: Vec::new(),
                last: true,
            },
        );
    }

    pub(super) fn seen(&mut self, host: HostId, now: Duration) {
        let Some(liveness) = self.liveness.get_mut(&host) else {
            return;
        };
        liveness.seen = now;
        if !liveness.up {
            liveness.up = true;
            tracing::info!(host = %self.host_name(host), "is back");
            self.changed_hosts.insert(host);
            self.note_host(Action::Up, host);
        }
    }

    pub(super) fn remove_host(
        &mut self,
        asker: Connection,
        wanted: &str,
        force: bool,
        now: Duration,
    ) -> Result<Response, String> {
        let found = self
            .state
            .hosts
            .values()
            .find(|info| info.name == wanted || info.id.to_string() == wanted);
        let Some(info) = found else {
            return self.shut_out(asker, wanted);
        };
        let (id, name) = (info.id, info.name.clone());
        if id == self.settings.host {
            return Err(format!(
                "host {name} runs this manager: run `towline leave` there"
            ));
        }
        if self.by_host.contains_key(&id) && !force {
            return Err(format!(
                "host {name} is connected: run `towline leave` there, or `towline host rm --force {name}` \
                 to cut its containers off"
            ));
        }
        tracing::info!(host = %name, %id, "removed; no certificate of its is taken again");
        self.forget_host(id, now);
        self.dismiss(id);
        Ok(Response::Done)
    }

    pub(super) fn forget_host(&mut self, id: HostId, now: Duration) {
        self.free_all(id, now);
        self.note_host(Action::Remove, id);
        self.end_leases(id, now);
        self.state.remove_host(id, self.unix);
        self.liveness.remove(&id);
        self.told_of_loss.remove(&id);
        self.changes.remove(&id);
        self.changed_hosts.insert(id);
    }

    /// The whole list of hosts, to each of these connections.
    pub(super) fn tell_all_hosts(&mut self, to: &[Connection], now: Duration) {
        let mut full = true;
        for hosts in self.views(now).chunks(HOSTS_PER_MESSAGE) {
            let (hosts, removed) = (hosts.to_vec(), Vec::new());
            self.tell(
                to,
                ToAgent::Hosts {
                    full,
                    hosts,
                    removed,
                },
            );
            full = false;
        }
    }

    /// Tells newcomers of all hosts, and everybody else of those that changed in this turn: when a thousand come back at once,
    /// that is one piece of news, and one list for all of them.
    pub(super) fn tell_hosts(&mut self, now: Duration) {
        let changed: Vec<HostId> = std::mem::take(&mut self.changed_hosts)
            .into_iter()
            .collect();
        let newcomers = std::mem::take(&mut self.newcomers);
        let here = self.connections.keys().copied();
        let (new, known): (Vec<Connection>, Vec<Connection>) =
            here.partition(|connection| newcomers.contains(connection));
        if !new.is_empty() {
            self.tell_all_hosts(&new, now);
        }
        for ids in changed.chunks(HOSTS_PER_MESSAGE) {
            let gone = |id: &&HostId| !self.state.hosts.contains_key(*id);
            let hosts = ids.iter().filter_map(|id| self.view(*id, now)).collect();
            let removed = ids.iter().filter(gone).copied().collect();
            let full = false;
            self.tell(
                &known,
                ToAgent::Hosts {
                    full,
                    hosts,
                    removed,
                },
            );
        }
    }

    fn tell(&mut self, to: &[Connection], message: ToAgent) {
        let to = to.to_vec();
        self.outputs.push_back(Output::Send { to, message });
    }

    pub(super) fn views(&self, now: Duration) -> Vec<HostView> {
        let mut views: Vec<HostView> = self
            .state
            .hosts
            .keys()
            .filter_map(|id| self.view(*id, now))
            .collect();
        views.sort_by(|a, b| a.info.name.cmp(&b.info.name));
        views
    }

    pub(super) fn view(&self, id: HostId, now: Duration) -> Option<HostView> {
        let info = self.state.hosts.get(&id)?.clone();
        let liveness = self.liveness.get(&id)?;
        let last_seen_ms_ago = millis(now.saturating_sub(liveness.seen));
        Some(HostView {
            info,
            up: liveness.up,
            last_seen_ms_ago,
            manager: id == self.settings.host,
            wanted_port: self.state.vxlan_port(),
            port_problem: liveness.port_problem.clone(),
            control: self.control_of(id),
            traits: self.state.traits(id),
        })
    }

    pub(super) fn is_up(&self, id: HostId) -> bool {
        self.liveness.get(&id).is_some_and(|liveness| liveness.up)
    }

    /// A host's name, or its id where the name is not known any more.
    pub(super) fn host_name(&self, id: HostId) -> String {
        self.state
            .hosts
            .get(&id)
            .map_or_else(|| id.to_string(), |info| info.name.clone())
    }
}
