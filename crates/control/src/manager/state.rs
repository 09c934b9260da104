//! What a manager must not forget, in memory, with every change noted for the store.
//!
//! Keys of the store: `meta`, `host/ID`, `certificate/ID`, `revoked/ID`, `token/ROLE`, `standby/ID`, `traits/ID`, `name/NAME`, `floor/VNI`, `network/VNI`, `row/VNI/IP`, `endpoint/VNI/EPOCH`,
//! `cursor/VNI/SUBNET`, `lease/VNI/HOST`, `service/EPOCH`, `gone/SERVICE`. One counter orders everything: epochs and revisions are drawn from it.

mod services;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vtep::Vni;

use super::trust::Ticket;
use crate::allocator::{Pool, Usage};
use crate::epoch::Epoch;
use crate::host::{HostId, HostInfo, HostTraits};
use crate::lease::Leased;
use crate::network::{Endpoint, Network};
use crate::pki::Role;
use crate::request::SubnetUsage;
use crate::row::{Row, State as RowState};
use crate::service::Service;
use crate::store::Write;
use crate::subnet::Subnet;
use crate::table::Table;

use super::leases::Leases;

/// What was loaded makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A value of the store is not what this version wrote.
    #[error("the store's entry {key} is not understood ({cause}): restore it from a backup")]
    Entry {
        /// Its key.
        key: String,
        /// Why.
        cause: String,
    },
    /// The store is another cluster's.
    #[error(
        "the store belongs to cluster {stored}, this host to cluster {cluster}: name another state folder"
    )]
    Cluster {
        /// The store's cluster.
        stored: String,
        /// The host's cluster.
        cluster: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    cluster: String,
    last: Epoch,
    next_vni: u32,
    gaps: Vec<(Epoch, Epoch)>,
    #[serde(default)]
    vxlan_port: Option<u16>,
    /// Whether there ever was a network of published ports: one that was removed is not made again.
    #[serde(default)]
    had_ingress: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct StoredRow {
    #[serde(flatten)]
    row: Row,
    revision: Epoch,
}

/// An endpoint and its host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Held {
    pub(super) endpoint: Endpoint,
    pub(super) owner: HostId,
}

impl Held {
    /// What an endpoint is a member of and what it is called, its rows say.
    pub(super) fn new(endpoint: &Endpoint, owner: HostId) -> Self {
        let endpoint = Endpoint {
            member: None,
            names: None,
            ..endpoint.clone()
        };
        Self { endpoint, owner }
    }
}

/// One network and all that is in it.
#[derive(Debug)]
pub(super) struct NetworkState {
    pub(super) network: Network,
    pub(super) table: Table,
    pub(super) endpoints: BTreeMap<Epoch, Held>,
    pub(super) leases: Leases,
    pool: Pool,
    /// Every row by its last change: what a stream resumes from. Rows are never forgotten, so neither are changes.
    /// By generation, too: the counter begins anew with each.
    changes: BTreeMap<Epoch, IpAddr>,
    revisions: HashMap<IpAddr, Epoch>,
}

impl NetworkState {
    fn new(network: Network) -> Self {
        Self {
            network,
            table: Table::default(),
            endpoints: BTreeMap::new(),
            leases: Leases::default(),
            pool: Pool::default(),
            changes: BTreeMap::new(),
            revisions: HashMap::new(),
        }
    }

    /// A freed address is not handed out for a while.
    fn rest(&mut self, ip: IpAddr, now: Duration) {
        let rest = self.network.addressing.rest();
        if !rest.is_zero() {
            self.pool.free(ip, now + rest);
        }
    }

    /// How full each subnet is.
    pub(super) fn usage(&self, now: Duration) -> Vec<SubnetUsage> {
        let subnets = self.network.subnets.iter();
        let number = |addresses: u128| u64::try_from(addresses).unwrap_or(u64::MAX);
        subnets
            .map(|subnet| {
                let usage = self.pool.usage(subnet, &self.table, now);
                SubnetUsage {
                    net: subnet.net,
                    in_use: number(usage.in_use),
                    resting: number(usage.resting),
                    set_aside: number(usage.set_aside),
                    free: number(usage.free()),
                }
            })
            .collect()
    }

    /// The last change of this generation; the network's own making before any. Zero where that is of an earlier one: whoever
    /// follows this network needs all of it.
    fn revision(&self, generation: u16) -> u64 {
        let last = self.changes.last_key_value();
        let last = last.map_or(self.network.epoch, |(revision, _)| *revision);
        if last.generation() == generation {
            last.counter()
        } else {
            0
        }
    }

    /// Rows changed after `from`, in the order of their changes.
    pub(super) fn rows_after(&self, from: Epoch) -> impl Iterator<Item = &Row> {
        self.changes
            .range(from.next()..)
            .filter_map(|(_, ip)| self.table.row(*ip))
    }

    /// What an endpoint's rows say of it: its state and its owner's last edit.
    pub(super) fn row_of(&self, endpoint: &Endpoint) -> Option<&Row> {
        endpoint
            .ips
            .first()
            .and_then(|ip| self.table.row(*ip))
            .filter(|row| row.epoch == endpoint.epoch)
    }

    fn put_row(&mut self, row: Row, revision: Epoch) {
        let ip = row.ip;
        if self.table.apply(row, &mut Vec::new()) {
            if let Some(old) = self.revisions.insert(ip, revision) {
                self.changes.remove(&old);
            }
            self.changes.insert(revision, ip);
        }
    }
}

/// Everything durable.
#[derive(Debug)]
pub(super) struct State {
    cluster: String,
    last: Epoch,
    /// What no life of this store has issued: between the two of each pair. Each life begins at the clock's milliseconds and
    /// tells them before it issues anything, so whoever has seen an epoch of a gap has it from a life that this store lost.
    gaps: Vec<(Epoch, Epoch)>,
    vxlan_port: Option<u16>,
    pub(super) next_vni: u32,
    pub(super) hosts: BTreeMap<HostId, HostInfo>,
    /// The serial number of the certificate that each host last came with.
    certificates: BTreeMap<HostId, String>,
    /// Hosts that were removed, and when, in seconds since 1970.
    revoked: BTreeMap<HostId, u64>,
    /// Where hosts that stand by as managers would listen.
    standbys: BTreeMap<HostId, SocketAddr>,
    /// What hosts are beyond their place in the network, where that is known.
    traits: BTreeMap<HostId, HostTraits>,
    /// Join tokens.
    tickets: BTreeMap<Role, Ticket>,
    pub(super) names: BTreeMap<String, HostId>,
    pub(super) networks: BTreeMap<Vni, NetworkState>,
    /// When a removed network's VNI was given up: nothing of it from before comes back.
    pub(super) floors: BTreeMap<Vni, Epoch>,
    pub(super) services: BTreeMap<Epoch, Service>,
    service_bytes: usize,
    /// When a removed service's name was given up: nothing of it from before comes back.
    service_floors: BTreeMap<String, Epoch>,
    /// Services with changes not yet sent, by network.
    service_news: BTreeMap<Vni, BTreeSet<Epoch>>,
    ingress: Option<Vni>,
    had_ingress: bool,
    writes: Vec<Write>,
    meta_changed: bool,
    /// Networks with changes not yet sent, and the revision that their subscribers have.
    dirty: BTreeMap<Vni, u64>,
}

impl State {
    /// The state of these entries. `now` starts the rest of every free address anew; `unix` is the time since 1970; `seed` is
    /// random.
    pub(super) fn load(
        cluster: &str,
        entries: &BTreeMap<String, String>,
        now: Duration,
        unix: Duration,
        seed: u64,
    ) -> Result<Self, StateError> {
        let mut state = Self {
            cluster: cluster.to_owned(),
            last: Epoch::new(1, 0),
            gaps: Vec::new(),
            vxlan_port: None,
            next_vni: FIRST_VNI,
            hosts: BTreeMap::new(),
            certificates: BTreeMap::new(),
            revoked: BTreeMap::new(),
            standbys: BTreeMap::new(),
            traits: BTreeMap::new(),
            tickets: BTreeMap::new(),
            names: BTreeMap::new(),
            networks: BTreeMap::new(),
            floors: BTreeMap::new(),
            services: BTreeMap::new(),
            service_bytes: 0,
            service_floors: BTreeMap::new(),
            service_news: BTreeMap::new(),
            ingress: None,
            had_ingress: false,
            writes: Vec::new(),
            meta_changed: entries.is_empty(),
            dirty: BTreeMap::new(),
        };
        // Networks first: their rows, endpoints and cursors need them.
        for (key, value) in entries
            .iter()
            .filter(|(key, _)| key.starts_with("network/"))
        {
            let network: Network = parse(key, value)?;
            if network.ingress {
                state.ingress = Some(network.vni);
            }
            state
                .networks
                .insert(network.vni, NetworkState::new(network));
        }
        for (key, value) in entries {
            state.load_entry(key, value, now)?;
        }
        for role in [Role::Worker, Role::Manager] {
            if state.ticket(role).is_none() {
                state.put_ticket(role, Ticket::random());
            }
        }
        state.begin(unix, seed);
        Ok(state)
    }

    fn load_entry(&mut self, key: &str, value: &str, now: Duration) -> Result<(), StateError> {
        let mut parts = key.splitn(3, '/');
        let (kind, name, rest) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
        match (kind, name) {
            ("meta", None) => {
                let meta: Meta = parse(key, value)?;
                if meta.cluster != self.cluster {
                    return Err(StateError::Cluster {
                        stored: meta.cluster,
                        cluster: self.cluster.clone(),
                    });
                }
                (self.last, self.next_vni, self.gaps) = (meta.last, meta.next_vni, meta.gaps);
                (self.vxlan_port, self.had_ingress) = (meta.vxlan_port, meta.had_ingress);
            }
            ("host", Some(_)) => {
                let info: HostInfo = parse(key, value)?;
                self.hosts.insert(info.id, info);
            }
            ("certificate", Some(id)) => {
                self.certificates.insert(
                    id.parse().map_err(|_| entry_error(key, "no host id"))?,
                    parse(key, value)?,
                );
            }
            ("revoked", Some(id)) => {
                self.revoked.insert(
                    id.parse().map_err(|_| entry_error(key, "no host id"))?,
                    parse(key, value)?,
                );
            }
            ("standby", Some(id)) => {
                self.standbys.insert(
                    id.parse().map_err(|_| entry_error(key, "no host id"))?,
                    parse(key, value)?,
                );
            }
            ("traits", Some(id)) => {
                self.traits.insert(
                    id.parse().map_err(|_| entry_error(key, "no host id"))?,
                    parse(key, value)?,
                );
            }
            ("token", Some(role)) => {
                let role = parse(key, &format!("\"{role}\""))?;
                // The cause is not repeated: it may hold a part of a secret.
                let ticket = serde_json::from_str(value)
                    .map_err(|_| entry_error(key, "no secret and date"))?;
                self.tickets.insert(role, ticket);
            }
            ("name", Some(name)) => drop(self.names.insert(name.to_owned(), parse(key, value)?)),
            ("floor", Some(vni)) => drop(self.floors.insert(parse(key, vni)?, parse(key, value)?)),
            ("network", Some(_)) => {}
            ("service", Some(_)) => {
                let service: Service = parse(key, value)?;
                if !self.networks.contains_key(&service.vni) {
                    return Err(entry_error(key, "its network is missing"));
                }
                self.enter_service(service);
            }
            ("gone", Some(name)) => {
                let floor = parse(key, value)?;
                self.service_floors.insert(name.to_owned(), floor);
            }
            ("row" | "endpoint" | "cursor" | "lease", Some(vni)) => {
                let network = self.networks.get_mut(&parse::<Vni>(key, vni)?);
                let network = network.ok_or_else(|| entry_error(key, "its network is missing"))?;
                match kind {
                    "row" => {
                        let stored: StoredRow = parse(key, value)?;
                        if stored.row.state == RowState::Free {
                            network.rest(stored.row.ip, now);
                        }
                        let mut revision = stored.revision;
                        if revision.generation() == 0 {
                            // Of a store that was written without the generation.
                            revision = Epoch::new(self.last.generation(), revision.counter());
                        }
                        network.put_row(stored.row, revision);
                    }
                    "endpoint" => {
                        let held: Held = parse(key, value)?;
                        network.endpoints.insert(held.endpoint.epoch, held);
                    }
                    "lease" => {
                        let host = rest
                            .unwrap_or_default()
                            .parse()
                            .map_err(|_| entry_error(key, "no host"))?;
                        let block: Vec<Leased> = parse(key, value)?;
                        for ip in block.iter().flat_map(|leased| &leased.ips) {
                            network.pool.keep_aside(*ip);
                        }
                        network.leases.blocks.insert(host, block);
                    }
                    _ => {
                        let net = rest
                            .unwrap_or_default()
                            .parse()
                            .map_err(|_| entry_error(key, "no subnet"))?;
                        network.pool.resume(net, parse(key, value)?);
                    }
                }
            }
            _ => return Err(entry_error(key, "an unknown kind")),
        }
        Ok(())
    }

    /// Begins a life of the store: above what any life that was lost may have issued, as long as the clock is right. A clock
    /// that was ahead once and is put right hides that; the random step keeps two lives that began from one copy apart.
    fn begin(&mut self, unix: Duration, seed: u64) {
        let milliseconds = u64::try_from(unix.as_millis()).unwrap_or(u64::MAX);
        let clock = Epoch::new(self.last.generation(), milliseconds);
        let above = self.last.max(clock).get();
        let start = Epoch::from_bits(above.saturating_add(1 + seed % LIFE_SPREAD));
        self.gaps.push((self.last, start));
        if self.gaps.len() > GAPS_MAX {
            // A wider gap is one snapshot too many, for who was away that long.
            let (from, _) = self.gaps.remove(0);
            self.gaps[0].0 = from;
        }
        self.last = start;
        self.meta_changed = true;
    }

    /// Whether an epoch or a revision of the present generation was issued by a life that this store lost. Where a life begins
    /// it says itself, to whoever it welcomes before it has issued anything.
    pub(super) fn is_lost(&self, epoch: Epoch) -> bool {
        epoch > self.last
            || self
                .gaps
                .iter()
                .any(|(from, to)| *from < epoch && epoch < *to)
    }

    /// What changed since the last call, as one batch.
    pub(super) fn take_writes(&mut self) -> Vec<Write> {
        if std::mem::take(&mut self.meta_changed) {
            let meta = Meta {
                cluster: self.cluster.clone(),
                last: self.last,
                next_vni: self.next_vni,
                gaps: self.gaps.clone(),
                vxlan_port: self.vxlan_port,
                had_ingress: self.had_ingress,
            };
            self.write("meta".to_owned(), &meta);
        }
        std::mem::take(&mut self.writes)
    }

    /// Networks with changes since the last call, and the revision before them.
    pub(super) fn take_dirty(&mut self) -> BTreeMap<Vni, u64> {
        std::mem::take(&mut self.dirty)
    }

    /// The last epoch issued.
    pub(super) fn last(&self) -> Epoch {
        self.last
    }

    /// The UDP port on which hosts are to receive VXLAN; `None`: nobody has said.
    pub(super) fn vxlan_port(&self) -> Option<u16> {
        self.vxlan_port
    }

    pub(super) fn set_vxlan_port(&mut self, port: u16) {
        self.vxlan_port = Some(port);
        self.meta_changed = true;
    }

    /// A new epoch, above all before.
    pub(super) fn draw(&mut self) -> Epoch {
        self.meta_changed = true;
        self.last = self.last.next();
        self.last
    }

    /// Starts a generation above everything up to `seen`.
    pub(super) fn raise_generation(&mut self, seen: Epoch) {
        self.meta_changed = true;
        self.last = Epoch::new(seen.generation().saturating_add(1), 0);
        // What was to be told from a revision on is of an earlier generation.
        self.dirty.values_mut().for_each(|from| *from = 0);
    }

    /// Draws a VNI that no network has; `None`: all are taken.
    pub(super) fn draw_vni(&mut self) -> Option<Vni> {
        let span = Vni::MAX.get() - FIRST_VNI + 1;
        let free = (0..span).find_map(|step| {
            let number = FIRST_VNI + (self.next_vni.max(FIRST_VNI) - FIRST_VNI + step) % span;
            Vni::new(number)
                .ok()
                .filter(|vni| !self.networks.contains_key(vni))
        })?;
        self.next_vni = free.get() + 1;
        self.meta_changed = true;
        Some(free)
    }

    pub(super) fn put_host(&mut self, info: HostInfo) {
        self.write(format!("host/{}", info.id), &info);
        self.hosts.insert(info.id, info);
    }

    /// Removes a host for good: no certificate of its id is ever good again. What is kept of it is a hundred bytes.
    pub(super) fn remove_host(&mut self, id: HostId, unix: Duration) {
        self.hosts.remove(&id);
        self.erase(format!("host/{id}"));
        if self.certificates.remove(&id).is_some() {
            self.erase(format!("certificate/{id}"));
        }
        if self.standbys.remove(&id).is_some() {
            self.erase(format!("standby/{id}"));
        }
        if self.traits.remove(&id).is_some() {
            self.erase(format!("traits/{id}"));
        }
        let since = unix.as_secs();
        self.revoked.insert(id, since);
        self.write(format!("revoked/{id}"), &since);
    }

    pub(super) fn standbys(&self) -> impl Iterator<Item = (HostId, SocketAddr)> {
        self.standbys.iter().map(|(id, listen)| (*id, *listen))
    }

    pub(super) fn standby(&self, id: HostId) -> Option<SocketAddr> {
        self.standbys.get(&id).copied()
    }

    /// Whether that is news.
    pub(super) fn put_standby(&mut self, id: HostId, listen: SocketAddr) -> bool {
        let news = self.standbys.insert(id, listen) != Some(listen);
        if news {
            self.write(format!("standby/{id}"), &listen);
        }
        news
    }

    /// What a host is beyond its place in the network.
    pub(super) fn traits(&self, id: HostId) -> HostTraits {
        self.traits.get(&id).cloned().unwrap_or_default()
    }

    /// Whether that is news.
    pub(super) fn put_traits(&mut self, id: HostId, traits: HostTraits) -> bool {
        let news = self.traits.get(&id) != Some(&traits);
        if news {
            self.write(format!("traits/{id}"), &traits);
            self.traits.insert(id, traits);
        }
        news
    }

    pub(super) fn is_revoked(&self, id: HostId) -> bool {
        self.revoked.contains_key(&id)
    }

    /// The serial number of the certificate that a host last came with.
    pub(super) fn certificate(&self, id: HostId) -> Option<&str> {
        self.certificates.get(&id).map(String::as_str)
    }

    pub(super) fn put_certificate(&mut self, id: HostId, serial: String) {
        if self.certificate(id) != Some(&serial) {
            self.write(format!("certificate/{id}"), &serial);
            self.certificates.insert(id, serial);
        }
    }

    pub(super) fn ticket(&self, role: Role) -> Option<&Ticket> {
        self.tickets.get(&role)
    }

    pub(super) fn put_ticket(&mut self, role: Role, ticket: Ticket) {
        self.write(format!("token/{role}"), &ticket);
        self.tickets.insert(role, ticket);
    }

    pub(super) fn put_name(&mut self, name: &str, host: HostId) {
        self.write(format!("name/{name}"), &host);
        self.names.insert(name.to_owned(), host);
    }

    pub(super) fn remove_name(&mut self, name: &str) {
        if self.names.remove(name).is_some() {
            self.erase(format!("name/{name}"));
        }
    }

    pub(super) fn put_network(&mut self, network: Network) {
        self.write(format!("network/{}", network.vni.get()), &network);
        self.enter_ingress(network.vni, network.ingress);
        self.networks
            .insert(network.vni, NetworkState::new(network));
    }

    /// Removes a network with all its rows, and sees to it that none comes back.
    pub(super) fn remove_network(&mut self, vni: Vni) -> Option<Network> {
        let gone = self.networks.remove(&vni)?;
        self.dirty.remove(&vni);
        self.ingress = self.ingress.filter(|ingress| *ingress != vni);
        let floor = self.draw();
        self.floors.insert(vni, floor);
        self.write(format!("floor/{}", vni.get()), &floor);
        let number = vni.get();
        let rows = gone
            .table
            .rows()
            .map(|row| format!("row/{number}/{}", row.ip));
        let endpoints = gone
            .endpoints
            .keys()
            .map(|epoch| format!("endpoint/{number}/{}", epoch.get()));
        let cursors = gone
            .network
            .subnets
            .iter()
            .map(|subnet| format!("cursor/{number}/{}", subnet.net));
        let leases = gone
            .leases
            .blocks
            .keys()
            .map(|host| format!("lease/{number}/{host}"));
        let keys: Vec<String> = rows.chain(endpoints).chain(cursors).chain(leases).collect();
        for key in keys {
            self.erase(key);
        }
        self.erase(format!("network/{number}"));
        Some(gone.network)
    }

    /// The next free address of a subnet.
    pub(super) fn draw_address(
        &mut self,
        vni: Vni,
        subnet: &Subnet,
        now: Duration,
    ) -> Option<Result<IpAddr, Usage>> {
        let network = self.networks.get_mut(&vni)?;
        let drawn = network.pool.next(subnet, &network.table, now);
        if let Ok(ip) = drawn {
            self.write(format!("cursor/{}/{}", vni.get(), subnet.net), &ip);
        }
        Some(drawn)
    }

    /// The highest free address of each family of a network, for a block. `None`: a family has none.
    pub(super) fn draw_top(&mut self, vni: Vni, now: Duration) -> Option<Vec<IpAddr>> {
        let network = self.networks.get_mut(&vni)?;
        let (subnets, pool) = (&network.network.subnets, &mut network.pool);
        let mut ips: Vec<IpAddr> = Vec::new();
        for v4 in [true, false] {
            let mut family = subnets
                .iter()
                .filter(|subnet| subnet.net.addr().is_ipv4() == v4)
                .peekable();
            if family.peek().is_none() {
                continue;
            }
            let top =
                family.find_map(|subnet| pool.set_aside(subnet, &network.table, 1, now).pop());
            let Some(top) = top else {
                ips.iter().for_each(|ip| pool.put_back(*ip));
                return None;
            };
            ips.push(top);
        }
        Some(ips)
    }

    /// Sets a host's block. Addresses that leave it rest: the host may have used them.
    pub(super) fn put_block(&mut self, vni: Vni, host: HostId, block: Vec<Leased>, now: Duration) {
        for ip in self.set_block(vni, host, block) {
            if let Some(network) = self.networks.get_mut(&vni) {
                network.rest(ip, now);
            }
        }
    }

    /// A host has no block any more, and has not used it, or not for longer than any address rests.
    pub(super) fn drop_block(&mut self, vni: Vni, host: HostId) {
        self.set_block(vni, host, Vec::new());
    }

    /// Sets a host's block; the addresses that left it.
    pub(super) fn set_block(&mut self, vni: Vni, host: HostId, block: Vec<Leased>) -> Vec<IpAddr> {
        let Some(network) = self.networks.get_mut(&vni) else {
            return Vec::new();
        };
        let before = network.leases.blocks.remove(&host).unwrap_or_default();
        if before == block {
            if !block.is_empty() {
                network.leases.blocks.insert(host, block);
            }
            return Vec::new();
        }
        let ips = |block: &[Leased]| -> Vec<IpAddr> {
            let ips = block.iter().flat_map(|leased| leased.ips.iter().copied());
            ips.collect()
        };
        let (before, after) = (ips(&before), ips(&block));
        for ip in &before {
            network.pool.put_back(*ip);
        }
        for ip in &after {
            network.pool.keep_aside(*ip);
        }
        let key = format!("lease/{}/{host}", vni.get());
        if block.is_empty() {
            self.erase(key);
        } else {
            network.leases.blocks.insert(host, block.clone());
            self.write(key, &block);
        }
        before
            .into_iter()
            .filter(|ip| !after.contains(ip))
            .collect()
    }

    /// Puts a row in its network's table under a new revision.
    pub(super) fn put_row(&mut self, vni: Vni, row: Row, now: Duration) {
        let revision = self.draw();
        let Some(network) = self.networks.get_mut(&vni) else {
            return;
        };
        let generation = revision.generation();
        let known = || network.revision(generation);
        self.dirty.entry(vni).or_insert_with(known);
        if row.state == RowState::Free {
            network.rest(row.ip, now);
        }
        let key = format!("row/{}/{}", vni.get(), row.ip);
        network.put_row(row.clone(), revision);
        self.write(key, &StoredRow { row, revision });
    }

    pub(super) fn put_endpoint(&mut self, held: Held) {
        let (vni, epoch) = (held.endpoint.vni, held.endpoint.epoch);
        self.write(format!("endpoint/{}/{}", vni.get(), epoch.get()), &held);
        if let Some(network) = self.networks.get_mut(&vni) {
            network.endpoints.insert(epoch, held);
        }
    }

    pub(super) fn remove_endpoint(&mut self, vni: Vni, epoch: Epoch) -> Option<Held> {
        let held = self.networks.get_mut(&vni)?.endpoints.remove(&epoch)?;
        self.erase(format!("endpoint/{}/{}", vni.get(), epoch.get()));
        Some(held)
    }

    fn write<T: Serialize>(&mut self, key: String, value: &T) {
        let value = serde_json::to_string(value)
            .expect("our types have string keys and no failing serialiser");
        self.writes.push(Write {
            key,
            value: Some(value),
        });
    }

    fn erase(&mut self, key: String) {
        self.writes.push(Write { key, value: None });
    }
}

/// Lives begin up to this far above the clock's milliseconds: a million of them before a generation is used up.
const LIFE_SPREAD: u64 = 1 << 28;
/// Starts of the manager that are told apart.
const GAPS_MAX: usize = 256;
/// VNIs below are left to networks that name theirs.
const FIRST_VNI: u32 = 4096;

fn parse<T: DeserializeOwned>(key: &str, json: &str) -> Result<T, StateError> {
    serde_json::from_str(json).map_err(|error| entry_error(key, &error.to_string()))
}

fn entry_error(key: &str, cause: &str) -> StateError {
    StateError::Entry {
        key: key.to_owned(),
        cause: cause.to_owned(),
    }
}
