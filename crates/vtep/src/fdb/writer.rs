//! Applies changes to the tables and publishes them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use std::collections::HashMap;

use arc_swap::ArcSwap;

use super::{
    Change, Location, Member, Network, NetworkConfig, Numbers, Port, PortEntry, PortId,
    RemoteEntry, SharedTables, Tables,
};
use crate::Vni;
use crate::stats::Meter;

/// Applies changes and publishes the result. One thread owns it.
pub struct TableWriter {
    tables: Tables,
    shared: SharedTables,
    /// Of each network, which numbers its places have.
    numbers: HashMap<Vni, Numbers>,
    /// Snapshots that some reader still holds. This thread drops them, which takes time in large tables: no reader is to be the last.
    retired: Vec<Arc<Tables>>,
    workers: usize,
}

impl TableWriter {
    /// Empty tables for one worker.
    #[must_use]
    pub fn new() -> Self {
        Self::for_workers(1)
    }

    /// Empty tables, whose ports and members are metered for this many workers.
    #[must_use]
    pub fn for_workers(workers: usize) -> Self {
        let tables = Tables::new();
        Self {
            shared: Arc::new(ArcSwap::from_pointee(tables.clone())),
            tables,
            numbers: HashMap::new(),
            retired: Vec::new(),
            workers,
        }
    }

    /// Where readers find what is published.
    #[must_use]
    pub fn shared(&self) -> SharedTables {
        Arc::clone(&self.shared)
    }

    /// Applies the changes in order and publishes them together. A change for a network that does not exist is ignored.
    pub fn apply(&mut self, changes: &[Change]) {
        let mut members_changed = Vec::new();
        for change in changes {
            self.apply_one(change);
            if let Change::SetMember { vni, .. } | Change::RemoveMember { vni, .. } = change {
                members_changed.push(*vni);
            }
        }
        // Once per batch: a list of 10,000 members is not sorted 10,000 times.
        members_changed.sort_unstable();
        members_changed.dedup();
        for vni in members_changed {
            self.change_network(vni, |network, _| network.derive_flood_remotes());
        }
        let old = self.shared.swap(Arc::new(self.tables.clone()));
        self.retired.push(old);
        // Nobody can come to hold what isn't published any more.
        self.retired.retain(|tables| Arc::strong_count(tables) > 1);
    }

    fn apply_one(&mut self, change: &Change) {
        match change {
            Change::SetNetwork(config) => self.set_network(config),
            Change::RemoveNetwork(vni) => {
                let gone = Arc::make_mut(&mut self.tables.networks).remove(vni);
                self.numbers.remove(vni);
                for addr in gone.iter().flat_map(|network| network.members.keys()) {
                    self.remove_membership(*addr);
                }
            }
            Change::SetFdb { vni, mac, remote } => {
                self.change_network(*vni, |network, numbers| {
                    network.fdb.set(numbers, *mac, Location::Remote(*remote));
                });
            }
            Change::RemoveFdb { vni, mac } => {
                self.change_network(*vni, |network, numbers| {
                    network.fdb.remove_remote(numbers, *mac);
                });
            }
            Change::SetNeighbor { vni, ip, mac } => {
                self.change_network(*vni, |network, _| {
                    network.change_neighbor(*ip, |entry| entry.row = Some(*mac))
                });
            }
            Change::RemoveNeighbor { vni, ip } => {
                self.change_network(*vni, |network, _| {
                    network.change_neighbor(*ip, |entry| entry.row = None)
                });
            }
            Change::SetMember { vni, remote, flood } => {
                let member = Member {
                    remote: *remote,
                    flood: *flood,
                };
                let mut new = false;
                self.change_network(*vni, |network, _| {
                    new = Arc::make_mut(&mut network.members)
                        .insert(remote.ip(), member)
                        .is_none();
                });
                self.add_membership(*remote, new);
            }
            Change::RemoveMember { vni, addr } => {
                let mut gone = false;
                self.change_network(*vni, |network, _| {
                    gone = Arc::make_mut(&mut network.members).remove(addr).is_some();
                });
                if gone {
                    self.remove_membership(*addr);
                }
            }
            Change::AddPort(port) => self.add_port(port),
            Change::RemovePort(id) => self.remove_port(*id),
        }
    }

    fn set_network(&mut self, config: &NetworkConfig) {
        let networks = Arc::make_mut(&mut self.tables.networks);
        if let Some(network) = networks.get_mut(&config.vni) {
            Arc::make_mut(network).config = config.clone();
            return;
        }
        let mut network = Network::new(config.clone());
        // Ports may have been attached before their network was known.
        let mut ports: Vec<_> = self
            .tables
            .ports
            .values()
            .map(|entry| &entry.port)
            .filter(|port| port.vni == config.vni)
            .collect();
        ports.sort_unstable_by_key(|port| port.id);
        let numbers = self.numbers.entry(config.vni).or_default();
        for port in ports {
            network.add_port(numbers, port);
        }
        networks.insert(config.vni, Arc::new(network));
    }

    fn add_port(&mut self, port: &Port) {
        self.remove_port(port.id);
        let entry = PortEntry {
            port: Arc::new(port.clone()),
            meter: Arc::new(Meter::new(self.workers)),
            floods: Arc::default(),
            errors: Arc::default(),
        };
        Arc::make_mut(&mut self.tables.ports).insert(port.id, entry);
        self.change_network(port.vni, |network, numbers| network.add_port(numbers, port));
    }

    fn remove_port(&mut self, id: PortId) {
        if let Some(PortEntry { port, .. }) = Arc::make_mut(&mut self.tables.ports).remove(&id) {
            self.change_network(port.vni, |network, numbers| {
                network.remove_port(numbers, &port);
            });
        }
    }

    /// A VTEP is a member, of one network more when it is `new` there.
    fn add_membership(&mut self, remote: SocketAddr, new: bool) {
        let workers = self.workers;
        let remotes = Arc::make_mut(&mut self.tables.remotes);
        if new {
            let entry = remotes.entry(remote.ip()).or_insert_with(|| RemoteEntry {
                at: remote,
                meter: Arc::new(Meter::new(workers)),
                floods: Arc::default(),
                probes: Arc::default(),
                networks: 0,
            });
            entry.networks += 1;
        }
        if let Some(entry) = remotes.get_mut(&remote.ip()) {
            entry.at = remote;
        }
    }

    fn remove_membership(&mut self, addr: IpAddr) {
        let remotes = Arc::make_mut(&mut self.tables.remotes);
        if let Some(entry) = remotes.get_mut(&addr) {
            entry.networks -= 1;
            if entry.networks == 0 {
                remotes.remove(&addr);
            }
        }
    }

    fn change_network(&mut self, vni: Vni, change: impl FnOnce(&mut Network, &mut Numbers)) {
        if let Some(network) = Arc::make_mut(&mut self.tables.networks).get_mut(&vni) {
            let numbers = self.numbers.entry(vni).or_default();
            change(Arc::make_mut(network), numbers);
        }
    }
}

impl Default for TableWriter {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::{IpAddr, SocketAddr};

    use proptest::prelude::*;

    use super::*;
    use crate::MacAddr;
    use crate::fdb::Location;
    use crate::settings::WireSettings;

    const VNI: Vni = Vni::from_be_bytes([0, 0, 7]);

    fn network(vni: Vni) -> NetworkConfig {
        NetworkConfig {
            vni,
            mtu: 1450,
            gateway_mac: MacAddr::new([2; 6]),
            service_ips: Default::default(),
            gateway_ips: Vec::new(),
            settings: WireSettings::default(),
        }
    }

    fn mac(number: u8) -> MacAddr {
        MacAddr::new([2, 0, 0, 0, 0, number])
    }

    fn remote(number: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, number], 4789))
    }

    fn port(id: u32, number: u8) -> Port {
        Port {
            id: PortId(id),
            vni: VNI,
            mac: mac(number),
            ips: vec![ip(number)],
            mtu: 1450,
            any_source: false,
        }
    }

    fn ip(number: u8) -> IpAddr {
        IpAddr::from([10, 0, 9, number])
    }

    fn written(changes: &[Change]) -> TableWriter {
        let mut writer = TableWriter::new();
        writer.apply(&[Change::SetNetwork(network(VNI))]);
        writer.apply(changes);
        writer
    }

    #[test]
    fn readers_keep_the_snapshot_they_loaded() {
        let mut writer = written(&[Change::SetFdb {
            vni: VNI,
            mac: mac(1),
            remote: remote(1),
        }]);
        let before = writer.shared().load_full();
        writer.apply(&[
            Change::SetFdb {
                vni: VNI,
                mac: mac(1),
                remote: remote(2),
            },
            Change::RemoveNetwork(Vni::MAX),
        ]);
        assert_eq!(
            before.network(VNI).unwrap().lookup(mac(1)),
            Some(Location::Remote(remote(1)))
        );
        let after = writer.shared().load_full();
        assert_eq!(
            after.network(VNI).unwrap().lookup(mac(1)),
            Some(Location::Remote(remote(2)))
        );
    }

    #[test]
    fn a_move_may_be_told_in_any_order() {
        // Conformance V24: a late removal of the old place removes nothing of the new one.
        let away = [
            Change::RemovePort(PortId(1)),
            Change::SetFdb {
                vni: VNI,
                mac: mac(1),
                remote: remote(1),
            },
        ];
        for order in [[0, 1], [1, 0]] {
            let mut writer = written(&[Change::AddPort(port(1, 1))]);
            writer.apply(&order.map(|index: usize| away[index].clone()));
            let tables = writer.shared().load_full();
            assert_eq!(
                tables.network(VNI).unwrap().lookup(mac(1)),
                Some(Location::Remote(remote(1)))
            );
        }
        let home = [
            Change::AddPort(port(2, 1)),
            Change::RemoveFdb {
                vni: VNI,
                mac: mac(1),
            },
        ];
        for order in [[0, 1], [1, 0]] {
            let mut writer = written(&[Change::SetFdb {
                vni: VNI,
                mac: mac(1),
                remote: remote(1),
            }]);
            writer.apply(&order.map(|index: usize| home[index].clone()));
            let tables = writer.shared().load_full();
            assert_eq!(
                tables.network(VNI).unwrap().lookup(mac(1)),
                Some(Location::Local(PortId(2)))
            );
        }
    }

    #[test]
    fn an_older_port_takes_nothing_of_a_newer_one_with_it() {
        let mut writer = written(&[
            Change::AddPort(port(1, 1)),
            Change::AddPort(port(2, 1)),
            Change::RemovePort(PortId(1)),
        ]);
        let tables = writer.shared().load_full();
        let seen = tables.network(VNI).unwrap();
        assert_eq!(
            (seen.lookup(mac(1)), seen.neighbor(ip(1))),
            (Some(Location::Local(PortId(2))), Some(mac(1)))
        );
        assert_eq!(seen.ports(), [PortId(2)]);
        writer.apply(&[Change::RemovePort(PortId(2)), Change::RemovePort(PortId(2))]);
        let tables = writer.shared().load_full();
        assert!(tables.network(VNI).unwrap().is_empty());
        assert_eq!(
            tables.ports().count() + tables.network(VNI).unwrap().neighbors().count(),
            0
        );
    }

    #[test]
    fn a_port_may_come_before_its_network() {
        let mut writer = TableWriter::new();
        writer.apply(&[
            Change::AddPort(port(1, 1)),
            Change::SetNetwork(network(VNI)),
        ]);
        let tables = writer.shared().load_full();
        assert_eq!(
            tables.network(VNI).unwrap().lookup(mac(1)),
            Some(Location::Local(PortId(1)))
        );
        assert_eq!(tables.network(VNI).unwrap().ports(), [PortId(1)]);
    }

    #[test]
    fn a_changed_network_keeps_its_entries() {
        let mut writer = written(&[Change::SetFdb {
            vni: VNI,
            mac: mac(1),
            remote: remote(1),
        }]);
        writer.apply(&[Change::SetNetwork(NetworkConfig {
            settings: WireSettings {
                flood: false,
                ..WireSettings::default()
            },
            ..network(VNI)
        })]);
        let tables = writer.shared().load_full();
        assert!(!tables.network(VNI).unwrap().config().settings.flood);
        assert_eq!(
            tables.entries().collect::<Vec<_>>(),
            [(VNI, mac(1), Location::Remote(remote(1)))]
        );
    }

    #[test]
    fn masked_members_may_send_and_get_no_floods() {
        let mut writer = written(&[
            Change::SetMember {
                vni: VNI,
                remote: remote(2),
                flood: true,
            },
            Change::SetMember {
                vni: VNI,
                remote: remote(1),
                flood: true,
            },
            Change::SetMember {
                vni: VNI,
                remote: remote(3),
                flood: false,
            },
        ]);
        let tables = writer.shared().load_full();
        let seen = tables.network(VNI).unwrap();
        assert_eq!(seen.flood_remotes(), [remote(1), remote(2)]);
        assert!(seen.is_member(remote(3).ip()));
        writer.apply(&[
            Change::SetMember {
                vni: VNI,
                remote: remote(1),
                flood: false,
            },
            Change::RemoveMember {
                vni: VNI,
                addr: remote(2).ip(),
            },
        ]);
        let tables = writer.shared().load_full();
        let seen = tables.network(VNI).unwrap();
        assert!(
            seen.flood_remotes().is_empty()
                && seen.is_member(remote(1).ip())
                && !seen.is_member(remote(2).ip())
        );
    }

    #[test]
    fn a_remote_is_metered_while_it_is_a_member_of_anything() {
        let member = |vni, flood| Change::SetMember {
            vni,
            remote: remote(1),
            flood,
        };
        let addr = remote(1).ip();
        let mut writer = TableWriter::for_workers(2);
        writer.apply(&[
            Change::SetNetwork(network(VNI)),
            Change::SetNetwork(network(Vni::MAX)),
            member(VNI, true),
            member(Vni::MAX, true),
        ]);
        let tables = writer.shared().load_full();
        tables
            .remote_meter(addr)
            .and_then(|meter| meter.cell(1))
            .unwrap()
            .received(5, 50);
        // Leaving one network, and whether it gets floods, changes nothing.
        writer.apply(&[
            member(VNI, false),
            Change::RemoveMember { vni: VNI, addr },
            Change::RemoveMember { vni: VNI, addr },
        ]);
        let tables = writer.shared().load_full();
        assert_eq!(tables.remote_meter(addr).unwrap().read().received, 5);
        writer.apply(&[Change::RemoveNetwork(Vni::MAX)]);
        assert_eq!(writer.shared().load().remotes().count(), 0);
        writer.apply(&[member(VNI, true)]);
        let tables = writer.shared().load_full();
        assert_eq!(tables.remote_meter(addr).unwrap().read().received, 0);
    }

    #[test]
    fn changes_for_unknown_networks_are_ignored() {
        let mut writer = TableWriter::new();
        writer.apply(&[
            Change::SetFdb {
                vni: VNI,
                mac: mac(1),
                remote: remote(1),
            },
            Change::SetMember {
                vni: VNI,
                remote: remote(1),
                flood: true,
            },
        ]);
        assert_eq!(writer.shared().load().networks().count(), 0);
    }

    /// The same tables as plain maps, entry by entry.
    #[derive(Default)]
    struct Model {
        remotes: BTreeMap<(Vni, MacAddr), SocketAddr>,
        ports: Vec<Port>,
    }

    impl Model {
        fn apply(&mut self, change: &Change) {
            match change {
                Change::SetFdb { vni, mac, remote } => {
                    self.remotes.insert((*vni, *mac), *remote);
                }
                Change::RemoveFdb { vni, mac } => {
                    self.remotes.remove(&(*vni, *mac));
                }
                Change::AddPort(port) => {
                    self.ports.retain(|other| other.id != port.id);
                    self.ports.push(port.clone());
                }
                Change::RemovePort(id) => self.ports.retain(|port| port.id != *id),
                _ => unreachable!("not generated"),
            }
        }

        fn entries(&self) -> BTreeMap<(Vni, MacAddr), Location> {
            let remotes = self
                .remotes
                .iter()
                .map(|(key, remote)| (*key, Location::Remote(*remote)));
            let locals = self
                .ports
                .iter()
                .map(|port| ((port.vni, port.mac), Location::Local(port.id)));
            remotes.chain(locals).collect()
        }
    }

    fn change() -> impl Strategy<Value = Change> {
        let vni = prop_oneof![Just(VNI), Just(Vni::MAX)];
        let remotes = (vni.clone(), 0..8_u8, 1..4_u8);
        prop_oneof![
            remotes.clone().prop_map(|(vni, m, r)| Change::SetFdb {
                vni,
                mac: mac(m),
                remote: remote(r)
            }),
            remotes.prop_map(|(vni, m, _)| Change::RemoveFdb { vni, mac: mac(m) }),
            // Each port has a MAC of its own: two ports that share one are another test.
            (vni, 0..8_u8).prop_map(|(vni, m)| Change::AddPort(Port {
                vni,
                ..port(m.into(), m)
            })),
            (0..8_u32).prop_map(|id| Change::RemovePort(PortId(id))),
        ]
    }

    proptest! {
        #[test]
        fn tables_are_those_of_plain_maps(batches in prop::collection::vec(prop::collection::vec(change(), 0..6), 0..20)) {
            // Conformance V4: the same MAC in two networks is two entries.
            let mut writer = TableWriter::new();
            writer.apply(&[Change::SetNetwork(network(VNI)), Change::SetNetwork(network(Vni::MAX))]);
            let mut model = Model::default();
            for batch in batches {
                writer.apply(&batch);
                batch.iter().for_each(|change| model.apply(change));
                let tables = writer.shared().load_full();
                let entries: BTreeMap<_, _> = tables.entries().map(|(vni, mac, location)| ((vni, mac), location)).collect();
                prop_assert_eq!(&entries, &model.entries());
                for ((vni, mac), location) in entries {
                    prop_assert_eq!(tables.network(vni).unwrap().lookup(mac), Some(location));
                }
            }
        }
    }
}
