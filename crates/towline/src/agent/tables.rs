//! Carries the manager's news into the datapath's tables.
//!
//! The manager speaks of hosts by id, the datapath of VTEP addresses; here the
//! one becomes the other. This host's own rows stay out: local entries come with
//! the ports themselves. [`Translator`] is pure; [`Follower`] is its shared shell.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use control::{HostId, HostView, MemberState, Network, TableChange};
use vtep::datapath::{Announcement, Datapath};
use vtep::fdb::{Change, NetworkConfig};
use vtep::{MacAddr, Vni};

use super::announce::Announcements;

/// What the datapath must know of a network. `service_ips`: the addresses of its services.
pub(super) fn network_config(network: &Network, service_ips: BTreeSet<IpAddr>) -> NetworkConfig {
    NetworkConfig {
        vni: network.vni,
        mtu: network.mtu,
        gateway_mac: network.gateway_mac,
        gateway_ips: network
            .subnets
            .iter()
            .map(|subnet| subnet.gateway)
            .collect(),
        settings: network.settings,
        service_ips,
    }
}

/// One network as the manager's news describe it.
#[derive(Debug, Default)]
struct Table {
    macs: HashMap<MacAddr, HostId>,
    neighbors: HashMap<IpAddr, Neighbor>,
    members: HashMap<HostId, MemberState>,
}

/// Who answers for an address.
#[derive(Debug)]
struct Neighbor {
    /// Its MAC; the last one it had while it is not `up`, because containers may still remember that.
    mac: MacAddr,
    up: bool,
}

/// Turns news into table changes.
#[derive(Debug)]
struct Translator {
    own: HostId,
    hosts: HashMap<HostId, HostView>,
    tables: HashMap<Vni, Table>,
    /// Addresses that came up with another MAC than the last, until somebody takes them.
    moved: Vec<Announcement>,
}

impl Translator {
    fn new(own: HostId) -> Self {
        Self {
            own,
            hosts: HashMap::new(),
            tables: HashMap::new(),
            moved: Vec::new(),
        }
    }

    /// The VTEP of another host; none for this host and for one not known yet.
    fn remote(&self, host: HostId) -> Option<SocketAddr> {
        if host == self.own {
            return None;
        }
        self.hosts
            .get(&host)
            .map(|view| SocketAddr::new(view.info.vtep, view.info.port))
    }

    /// The list of hosts has changed: what was said of hosts that are new, or have
    /// another address now, is said again.
    fn hosts(&mut self, views: Vec<HostView>) -> Vec<Change> {
        let before: HashMap<HostId, SocketAddr> = self
            .hosts
            .keys()
            .filter_map(|&id| Some((id, self.remote(id)?)))
            .collect();
        self.hosts = views.into_iter().map(|view| (view.info.id, view)).collect();
        let moved = |host: &HostId| before.get(host).copied() != self.remote(*host);
        let mut changes = Vec::new();
        for (&vni, table) in &self.tables {
            let members = || table.members.iter().filter(|(host, _)| moved(host));
            // All that goes before all that comes: one host may take another's address.
            changes.extend(
                members()
                    .filter_map(|(host, _)| Some((before.get(host)?.ip(), self.remote(*host))))
                    // One that only has another port stays, and keeps its counters.
                    .filter(|(old, new)| new.is_none_or(|new| new.ip() != *old))
                    .map(|(addr, _)| Change::RemoveMember { vni, addr }),
            );
            changes.extend(members().filter_map(|(&host, &state)| self.member(vni, host, state)));
            let macs = table.macs.iter().filter(|(_, host)| moved(host));
            changes.extend(macs.map(|(&mac, &host)| self.fdb(vni, mac, host)));
        }
        changes
    }

    fn table(&mut self, vni: Vni, news: &[TableChange]) -> Vec<Change> {
        let mut changes = Vec::new();
        for change in news {
            // News that were under way when the network was left.
            let Some(table) = self.tables.get_mut(&vni) else {
                return changes;
            };
            match *change {
                TableChange::Neighbor { ip, mac: Some(mac) } => {
                    let before = table.neighbors.insert(ip, Neighbor { mac, up: true });
                    if before.is_some_and(|before| before.mac != mac) {
                        self.moved.push(Announcement { vni, ip, mac });
                    }
                    changes.push(Change::SetNeighbor { vni, ip, mac });
                }
                TableChange::Neighbor { ip, mac: None } => {
                    if let Some(neighbor) = table.neighbors.get_mut(&ip) {
                        neighbor.up = false;
                    }
                    changes.push(Change::RemoveNeighbor { vni, ip });
                }
                TableChange::Mac {
                    mac,
                    host: Some(host),
                } => {
                    table.macs.insert(mac, host);
                    changes.push(self.fdb(vni, mac, host));
                }
                TableChange::Mac { mac, host: None } => {
                    table.macs.remove(&mac);
                    changes.push(Change::RemoveFdb { vni, mac });
                }
                TableChange::Member {
                    host,
                    state: MemberState::Absent,
                } => {
                    table.members.remove(&host);
                    changes.extend(self.absent(vni, host));
                }
                TableChange::Member { host, state } => {
                    table.members.insert(host, state);
                    changes.extend(self.member(vni, host, state));
                }
                // A datapath knows no services.
                TableChange::Backend { .. } | TableChange::Names { .. } => {}
            }
        }
        changes
    }

    fn clear(&mut self, vni: Vni) -> Vec<Change> {
        let table = self.tables.remove(&vni).unwrap_or_default();
        let macs = table
            .macs
            .into_keys()
            .map(|mac| Change::RemoveFdb { vni, mac });
        let ips = table
            .neighbors
            .into_iter()
            .filter(|(_, neighbor)| neighbor.up)
            .map(|(ip, _)| Change::RemoveNeighbor { vni, ip });
        let members = table
            .members
            .into_keys()
            .filter_map(|host| self.remote(host));
        let members = members.map(|remote| Change::RemoveMember {
            vni,
            addr: remote.ip(),
        });
        macs.chain(ips).chain(members).collect()
    }

    /// A MAC on this host, or on a host without a known address, has no remote entry.
    fn fdb(&self, vni: Vni, mac: MacAddr, host: HostId) -> Change {
        match self.remote(host) {
            Some(remote) => Change::SetFdb { vni, mac, remote },
            None => Change::RemoveFdb { vni, mac },
        }
    }

    /// A member is known to the datapath by its address, which another member may have taken over.
    fn absent(&self, vni: Vni, host: HostId) -> Option<Change> {
        let addr = self.remote(host)?.ip();
        let members = &self.tables.get(&vni)?.members;
        let taken = members
            .keys()
            .any(|&other| self.remote(other).is_some_and(|at| at.ip() == addr));
        (!taken).then_some(Change::RemoveMember { vni, addr })
    }

    /// A masked host may still send and be sent to; it only gets no floods.
    fn member(&self, vni: Vni, host: HostId, state: MemberState) -> Option<Change> {
        let remote = self.remote(host)?;
        Some(Change::SetMember {
            vni,
            remote,
            flood: state == MemberState::Up,
        })
    }
}

/// The translator, shared by the thread that follows the news and the requests that look.
pub(super) struct Follower {
    datapath: Arc<dyn Datapath>,
    translator: Mutex<Translator>,
    announcements: Announcements,
}

impl Follower {
    pub(super) fn new(own: HostId, datapath: Arc<dyn Datapath>) -> Self {
        Self {
            datapath,
            translator: Mutex::new(Translator::new(own)),
            announcements: Announcements::default(),
        }
    }

    /// All hosts of the cluster have come as a new list.
    pub(super) fn hosts(&self, views: Vec<HostView>) {
        let mut translator = self.lock();
        let changes = translator.hosts(views);
        // Applied under the lock: two news must not overtake each other.
        self.datapath.apply(&changes);
    }

    /// News of networks' tables, in the order they came; the datapath gets them as one.
    pub(super) fn tables(&self, news: &[(Vni, Vec<TableChange>)]) {
        let mut translator = self.lock();
        let mut changes = Vec::new();
        for (vni, news) in news {
            changes.extend(translator.table(*vni, news));
        }
        self.datapath.apply(&changes);
        // Behind the tables: a container that asks back must hear the same.
        for moved in translator.moved.drain(..) {
            self.announcements.push(moved);
        }
    }

    /// What the containers here are still to be told.
    pub(super) const fn announcements(&self) -> &Announcements {
        &self.announcements
    }

    /// A network is followed from now on; a second time is harmless.
    pub(super) fn follow(&self, vni: Vni) {
        self.lock().tables.entry(vni).or_default();
    }

    /// A network is not followed any more; the datapath forgets it as a whole.
    pub(super) fn forget(&self, vni: Vni) {
        self.lock().tables.remove(&vni);
    }

    /// A network is gone while ports of it are still here: nothing leads out of the host.
    pub(super) fn clear(&self, vni: Vni) {
        let mut translator = self.lock();
        let changes = translator.clear(vni);
        self.datapath.apply(&changes);
    }

    /// All hosts of the cluster, as they were last told.
    pub(super) fn views(&self) -> Vec<HostView> {
        self.lock().hosts.values().cloned().collect()
    }

    /// The names of hosts by their VTEPs.
    pub(super) fn host_names(&self) -> HashMap<SocketAddr, String> {
        let translator = self.lock();
        let views = translator.hosts.values();
        views
            .map(|view| {
                (
                    SocketAddr::new(view.info.vtep, view.info.port),
                    view.info.name.clone(),
                )
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Translator> {
        self.translator
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use control::HostInfo;

    fn id(n: u8) -> HostId {
        HostId::from_bytes([n; 16])
    }

    fn view(n: u8, vtep: u8) -> HostView {
        let info = HostInfo {
            id: id(n),
            name: format!("h{n}"),
            vtep: [192, 0, 2, vtep].into(),
            port: 4789,
            link_mtu: 1500,
            incarnation: 1,
        };
        HostView {
            info,
            up: true,
            last_seen_ms_ago: 0,
            manager: n == 1,
            wanted_port: None,
            port_problem: None,
            control: None,
            traits: control::HostTraits::default(),
        }
    }

    fn at(vtep: u8) -> SocketAddr {
        ([192, 0, 2, vtep], 4789).into()
    }

    fn vni() -> Vni {
        Vni::new(4096).expect("24 bits")
    }

    fn mac(n: u8) -> MacAddr {
        MacAddr::new([2, 0, 0, 0, 0, n])
    }

    /// A host's first endpoint.
    fn came(n: u8) -> [TableChange; 2] {
        let host = id(n);
        [
            TableChange::Member {
                host,
                state: MemberState::Up,
            },
            TableChange::Mac {
                mac: mac(n),
                host: Some(host),
            },
        ]
    }

    fn following() -> Translator {
        let mut translator = Translator::new(id(1));
        translator.tables.insert(vni(), Table::default());
        translator
    }

    #[test]
    fn news_of_a_network_that_was_left_change_nothing() {
        let mut translator = following();
        translator.hosts(vec![view(2, 2)]);
        translator.tables.remove(&vni());
        let news = [TableChange::Mac {
            mac: mac(2),
            host: Some(id(2)),
        }];
        assert_eq!(translator.table(vni(), &news), []);
        assert_eq!(translator.hosts(vec![view(2, 3)]), []);
    }

    #[test]
    fn rows_of_other_hosts_become_remote_entries_and_own_rows_do_not() {
        let mut translator = following();
        translator.hosts(vec![view(1, 1), view(2, 2)]);
        let changes = translator.table(
            vni(),
            &[
                TableChange::Member {
                    host: id(1),
                    state: MemberState::Up,
                },
                TableChange::Member {
                    host: id(2),
                    state: MemberState::Masked,
                },
                TableChange::Mac {
                    mac: mac(1),
                    host: Some(id(1)),
                },
                TableChange::Mac {
                    mac: mac(2),
                    host: Some(id(2)),
                },
            ],
        );
        assert_eq!(
            changes,
            [
                Change::SetMember {
                    vni: vni(),
                    remote: at(2),
                    flood: false
                },
                Change::RemoveFdb {
                    vni: vni(),
                    mac: mac(1)
                },
                Change::SetFdb {
                    vni: vni(),
                    mac: mac(2),
                    remote: at(2)
                },
            ]
        );
    }

    #[test]
    fn a_host_known_late_gets_its_entries_then() {
        let mut translator = following();
        let news = came(2);
        assert_eq!(
            translator.table(vni(), &news),
            [Change::RemoveFdb {
                vni: vni(),
                mac: mac(2)
            }]
        );
        assert_eq!(
            translator.hosts(vec![view(2, 2)]),
            [
                Change::SetMember {
                    vni: vni(),
                    remote: at(2),
                    flood: true
                },
                Change::SetFdb {
                    vni: vni(),
                    mac: mac(2),
                    remote: at(2)
                },
            ]
        );
        assert_eq!(
            translator.hosts(vec![view(2, 2)]),
            [],
            "nothing new, nothing said"
        );
    }

    #[test]
    fn an_address_that_has_another_mac_is_announced_once() {
        let mut translator = following();
        let ip = IpAddr::from([10, 0, 9, 2]);
        let mut tell = |mac: Option<u8>| {
            let mac = mac.map(self::mac);
            translator.table(vni(), &[TableChange::Neighbor { ip, mac }]);
            std::mem::take(&mut translator.moved)
        };
        let announced = |n| {
            let (vni, mac) = (vni(), mac(n));
            [Announcement { vni, ip, mac }]
        };
        assert_eq!(tell(Some(1)), [], "nobody can remember another");
        assert_eq!(tell(Some(2)), announced(2));
        assert_eq!(tell(None), []);
        assert_eq!(tell(Some(2)), [], "what is remembered is right");
        assert_eq!(tell(None), []);
        assert_eq!(
            tell(Some(3)),
            announced(3),
            "freed and given away: remembered"
        );
        assert_eq!(tell(Some(3)), []);
    }

    #[test]
    fn a_host_with_another_port_stays_a_member() {
        let mut translator = following();
        translator.hosts(vec![view(2, 2)]);
        let news = came(2);
        translator.table(vni(), &news);
        let mut moved = view(2, 2);
        moved.info.port = 5000;
        let remote = SocketAddr::new(at(2).ip(), 5000);
        assert_eq!(
            translator.hosts(vec![moved]),
            [
                Change::SetMember {
                    vni: vni(),
                    remote,
                    flood: true
                },
                Change::SetFdb {
                    vni: vni(),
                    mac: mac(2),
                    remote
                },
            ]
        );
    }

    #[test]
    fn hosts_that_swap_addresses_both_stay_members() {
        let mut translator = following();
        translator.hosts(vec![view(2, 2), view(3, 3)]);
        let up = |n| TableChange::Member {
            host: id(n),
            state: MemberState::Up,
        };
        translator.table(vni(), &[up(2), up(3)]);
        let changes = translator.hosts(vec![view(2, 3), view(3, 2)]);
        let mut members: Vec<IpAddr> = vec![];
        for change in changes {
            match change {
                Change::SetMember { remote, .. } => members.push(remote.ip()),
                Change::RemoveMember { addr, .. } => members.retain(|&member| member != addr),
                other => panic!("{other:?}"),
            }
        }
        members.sort_unstable();
        assert_eq!(members, [at(2).ip(), at(3).ip()]);
    }

    #[test]
    fn a_host_that_left_does_not_take_its_heir_along() {
        let mut translator = following();
        translator.hosts(vec![view(2, 2), view(3, 2)]);
        let up = |n| TableChange::Member {
            host: id(n),
            state: MemberState::Up,
        };
        translator.table(vni(), &[up(2), up(3)]);
        let gone = |n| TableChange::Member {
            host: id(n),
            state: MemberState::Absent,
        };
        assert_eq!(translator.table(vni(), &[gone(2)]), []);
        assert_eq!(
            translator.table(vni(), &[gone(3)]),
            [Change::RemoveMember {
                vni: vni(),
                addr: at(2).ip()
            }]
        );
    }
}
