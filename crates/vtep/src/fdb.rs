//! What is where: networks, forwarding databases, neighbours, members and ports, as immutable snapshots.
//!
//! [`Tables`] is what a worker reads: loaded once per batch, never locked. [`TableWriter`] applies [`Change`]s to its
//! own copy and publishes the result whole, so a reader sees all of a batch of changes or none of it. A snapshot shares
//! with the next all that did not change.
//!
//! Every entry comes from outside through a [`Change`]; nothing is ever learned from a frame (RFC 7348 §4.1 allows other
//! control planes than learning). Entries that come with a local port stand beside those for remotes: while both exist
//! the port's counts, and removing one leaves the other, so the order in which an endpoint's move is told does not matter.

mod places;
mod writer;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use arc_swap::ArcSwap;
use foldhash::fast::RandomState;
use hashbrown::HashMap;
use places::{Fdb, Numbers};
use serde::{Deserialize, Serialize};

use crate::budget::Budget;
use crate::settings::WireSettings;
use crate::sharded::ShardedMap;
use crate::stats::Meter;
use crate::{MacAddr, Vni};

/// Names a port; chosen by whoever attaches it, unique on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PortId(pub u32);

impl std::fmt::Display for PortId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Where one container's interface meets the VTEP, and what it may send as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its name here.
    pub id: PortId,
    /// The network it is on.
    pub vni: Vni,
    /// The only source MAC it may use.
    pub mac: MacAddr,
    /// The only source addresses it may use.
    pub ips: Vec<IpAddr>,
    /// The largest IP packet it takes, in bytes.
    pub mtu: u16,
    /// Whether it may send packets whatever their source address is, as a router does. A port of the host itself may: it hands on
    /// what came from outside. Its MAC, and what it says in ARP and neighbour discovery, are held to its own as any port's.
    pub any_source: bool,
}

/// Where frames for one MAC go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Location {
    /// To a container on this host.
    Local(PortId),
    /// To another host's VTEP.
    Remote(SocketAddr),
}

/// What a network is, beside its entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Its identifier on the wire.
    pub vni: Vni,
    /// The largest IP packet its ports take, in bytes.
    pub mtu: u16,
    /// The MAC that the engine answers with for the gateway's addresses.
    pub gateway_mac: MacAddr,
    /// The addresses that the engine answers ARP, ND and echo requests for.
    pub gateway_ips: Vec<IpAddr>,
    /// Addresses of services: answered as the gateway's are, with its MAC. Connections to them are sent elsewhere before they
    /// leave a container.
    pub service_ips: BTreeSet<IpAddr>,
    /// Which frames it carries, and what their outer headers say.
    pub settings: WireSettings,
}

impl NetworkConfig {
    /// Whether the engine itself answers for an address: the gateway's, or a service's.
    #[must_use]
    pub fn answers_for(&self, ip: IpAddr) -> bool {
        self.gateway_ips.contains(&ip) || self.service_ips.contains(&ip)
    }
}

/// One change to the tables. Removing what is absent changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Adds a network or changes what it is; its entries stay.
    SetNetwork(NetworkConfig),
    /// Removes a network with its entries. Its ports stay attached, without a network.
    RemoveNetwork(Vni),
    /// A MAC is behind a remote VTEP.
    SetFdb {
        /// The network.
        vni: Vni,
        /// The endpoint's MAC.
        mac: MacAddr,
        /// The VTEP's address and UDP port.
        remote: SocketAddr,
    },
    /// A MAC is behind no remote VTEP any more.
    RemoveFdb {
        /// The network.
        vni: Vni,
        /// The endpoint's MAC.
        mac: MacAddr,
    },
    /// An IP address belongs to a MAC: ARP and ND are answered with it.
    SetNeighbor {
        /// The network.
        vni: Vni,
        /// The endpoint's address.
        ip: IpAddr,
        /// The endpoint's MAC.
        mac: MacAddr,
    },
    /// An IP address belongs to no MAC any more.
    RemoveNeighbor {
        /// The network.
        vni: Vni,
        /// The endpoint's address.
        ip: IpAddr,
    },
    /// A host may send into the network, and gets flooded frames if `flood` says so.
    SetMember {
        /// The network.
        vni: Vni,
        /// The VTEP's address and UDP port. Only the address decides who may send (RFC 7348 §5: the source port varies).
        remote: SocketAddr,
        /// Whether it gets flooded frames.
        flood: bool,
    },
    /// A host may not send into the network any more.
    RemoveMember {
        /// The network.
        vni: Vni,
        /// The VTEP's address.
        addr: IpAddr,
    },
    /// A container's port goes live, with the entries for its MAC and addresses. Replaces a port of the same name.
    AddPort(Port),
    /// A port goes, with its entries.
    RemovePort(PortId),
}

/// One consistent state of all networks on this host.
#[derive(Clone)]
pub struct Tables {
    networks: Arc<HashMap<Vni, Arc<Network>, RandomState>>,
    ports: Arc<HashMap<PortId, PortEntry, RandomState>>,
    remotes: Arc<HashMap<IpAddr, RemoteEntry, RandomState>>,
}

#[derive(Clone)]
struct PortEntry {
    port: Arc<Port>,
    meter: Arc<Meter>,
    floods: Arc<Budget>,
    errors: Arc<Budget>,
}

/// A VTEP that is a member of some network here.
#[derive(Clone)]
struct RemoteEntry {
    /// Where it receives.
    at: SocketAddr,
    meter: Arc<Meter>,
    floods: Arc<Budget>,
    probes: Arc<Budget>,
    /// Networks it is a member of; with none the entry goes.
    networks: usize,
}

/// One network: its forwarding database, neighbours and members.
#[derive(Clone)]
pub struct Network {
    config: NetworkConfig,
    fdb: Fdb,
    neighbors: ShardedMap<IpAddr, NeighborEntry>,
    // Shared by snapshots: what changes seldom is not copied with what changes often.
    members: Arc<HashMap<IpAddr, Member, RandomState>>,
    /// Derived from `members`, in the order of addresses.
    flood_remotes: Arc<Vec<SocketAddr>>,
    ports: Vec<PortId>,
}

#[derive(Clone, Copy, Default, PartialEq)]
struct NeighborEntry {
    local: Option<(PortId, MacAddr)>,
    row: Option<MacAddr>,
}

#[derive(Clone, Copy)]
struct Member {
    remote: SocketAddr,
    flood: bool,
}

impl Tables {
    fn new() -> Self {
        Self {
            networks: Arc::default(),
            ports: Arc::default(),
            remotes: Arc::default(),
        }
    }

    /// The network with this identifier.
    #[inline]
    #[must_use]
    pub fn network(&self, vni: Vni) -> Option<&Network> {
        self.networks.get(&vni).map(|network| &**network)
    }

    /// The port with this name.
    #[inline]
    #[must_use]
    pub fn port(&self, id: PortId) -> Option<&Port> {
        self.ports.get(&id).map(|entry| &*entry.port)
    }

    /// What passed the port with this name.
    #[inline]
    #[must_use]
    pub fn port_meter(&self, id: PortId) -> Option<&Meter> {
        self.ports.get(&id).map(|entry| &*entry.meter)
    }

    /// What came from and went to the VTEP with this address, on all networks; none of one that is no member of any.
    #[inline]
    #[must_use]
    pub fn remote_meter(&self, addr: IpAddr) -> Option<&Meter> {
        self.remotes.get(&addr).map(|entry| &*entry.meter)
    }

    /// What the port may still flood.
    #[must_use]
    pub fn port_floods(&self, id: PortId) -> Option<&Budget> {
        self.ports.get(&id).map(|entry| &*entry.floods)
    }

    /// What the port may still be told of frames that are too big.
    #[must_use]
    pub fn port_errors(&self, id: PortId) -> Option<&Budget> {
        self.ports.get(&id).map(|entry| &*entry.errors)
    }

    /// What the VTEP with this address may still have flooded here; none of one that is no member of any network.
    #[must_use]
    pub fn remote_floods(&self, addr: IpAddr) -> Option<&Budget> {
        self.remotes.get(&addr).map(|entry| &*entry.floods)
    }

    /// What the VTEP with this address may still be answered of its probes; none of one that is no member of any network.
    #[must_use]
    pub fn remote_probes(&self, addr: IpAddr) -> Option<&Budget> {
        self.remotes.get(&addr).map(|entry| &*entry.probes)
    }

    /// Where the VTEP with this address receives; none of one that is no member of any network here.
    #[must_use]
    pub fn remote(&self, addr: IpAddr) -> Option<SocketAddr> {
        self.remotes.get(&addr).map(|entry| entry.at)
    }

    /// All VTEPs that are members of some network, with what came from and went to each, in no order.
    pub fn remotes(&self) -> impl Iterator<Item = (IpAddr, &Meter)> + '_ {
        self.remotes
            .iter()
            .map(|(addr, entry)| (*addr, &*entry.meter))
    }

    /// All networks, in no order.
    pub fn networks(&self) -> impl Iterator<Item = &Network> + '_ {
        self.networks.values().map(|network| &**network)
    }

    /// All ports, in no order.
    pub fn ports(&self) -> impl Iterator<Item = &Port> + '_ {
        self.ports.values().map(|entry| &*entry.port)
    }

    /// All forwarding entries of all networks, in no order.
    pub fn entries(&self) -> impl Iterator<Item = (Vni, MacAddr, Location)> + '_ {
        self.networks().flat_map(|network| {
            network
                .entries()
                .map(|(mac, location)| (network.config.vni, mac, location))
        })
    }
}

impl Network {
    fn new(config: NetworkConfig) -> Self {
        Self {
            config,
            fdb: Fdb::new(),
            neighbors: ShardedMap::new(),
            members: Arc::default(),
            flood_remotes: Arc::default(),
            ports: Vec::new(),
        }
    }

    /// What the network is.
    #[must_use]
    pub const fn config(&self) -> &NetworkConfig {
        &self.config
    }

    /// Where frames for `mac` go.
    #[inline]
    #[must_use]
    pub fn lookup(&self, mac: MacAddr) -> Option<Location> {
        self.fdb.get(mac)
    }

    /// The MAC that `ip` belongs to: a local port's, or a remote endpoint's; not the gateway's.
    #[must_use]
    pub fn neighbor(&self, ip: IpAddr) -> Option<MacAddr> {
        self.neighbors.get(ip).and_then(NeighborEntry::mac)
    }

    /// Whether the host at `addr` may send into the network.
    #[inline]
    #[must_use]
    pub fn is_member(&self, addr: IpAddr) -> bool {
        self.members.contains_key(&addr)
    }

    /// The remotes that get flooded frames, in the order of their addresses.
    #[must_use]
    pub fn flood_remotes(&self) -> &[SocketAddr] {
        &self.flood_remotes
    }

    /// The local ports, in the order they were added.
    #[must_use]
    pub fn ports(&self) -> &[PortId] {
        &self.ports
    }

    /// All forwarding entries, in no order.
    pub fn entries(&self) -> impl Iterator<Item = (MacAddr, Location)> + '_ {
        self.fdb.iter()
    }

    /// All neighbour entries, in no order; not the gateway's.
    pub fn neighbors(&self) -> impl Iterator<Item = (IpAddr, MacAddr)> + '_ {
        self.neighbors
            .iter()
            .filter_map(|(ip, entry)| Some((ip, entry.mac()?)))
    }

    /// All members with whether they get flooded frames, in no order.
    pub fn members(&self) -> impl Iterator<Item = (SocketAddr, bool)> + '_ {
        self.members
            .values()
            .map(|member| (member.remote, member.flood))
    }

    /// Forwarding entries, in number.
    #[must_use]
    pub fn len(&self) -> usize {
        self.fdb.len()
    }

    /// Whether there is no forwarding entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.fdb.len() == 0
    }

    fn change_neighbor(&mut self, ip: IpAddr, change: impl FnOnce(&mut NeighborEntry)) {
        self.neighbors.update(ip, |mut entry| {
            change(&mut entry);
            entry
        });
    }

    fn add_port(&mut self, numbers: &mut Numbers, port: &Port) {
        self.ports.push(port.id);
        self.fdb.set(numbers, port.mac, Location::Local(port.id));
        for ip in &port.ips {
            self.change_neighbor(*ip, |entry| entry.local = Some((port.id, port.mac)));
        }
    }

    fn remove_port(&mut self, numbers: &mut Numbers, port: &Port) {
        self.ports.retain(|id| *id != port.id);
        // Another port may have taken over the MAC or an address meanwhile: only what is still this port's goes.
        self.fdb.remove_local(numbers, port.mac, port.id);
        for ip in &port.ips {
            self.change_neighbor(*ip, |entry| {
                entry.local = entry.local.filter(|(id, _)| *id != port.id)
            });
        }
    }

    fn derive_flood_remotes(&mut self) {
        let flooded = self.members.values().filter(|member| member.flood);
        let mut remotes: Vec<SocketAddr> = flooded.map(|member| member.remote).collect();
        remotes.sort_unstable();
        self.flood_remotes = Arc::new(remotes);
    }
}

impl NeighborEntry {
    fn mac(&self) -> Option<MacAddr> {
        self.local.map(|(_, mac)| mac).or(self.row)
    }
}

pub use writer::TableWriter;

/// Where workers load the newest [`Tables`] from, once per batch.
pub type SharedTables = Arc<ArcSwap<Tables>>;
