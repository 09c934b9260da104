//! What differs between the table that was told and the one that a file gives. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use control::{HostId, MemberState, TableChange};
use vtep::MacAddr;

use super::file::PlannedNetwork;

/// What has been told of a network.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    macs: BTreeMap<MacAddr, HostId>,
    neighbors: BTreeMap<IpAddr, MacAddr>,
    members: BTreeSet<HostId>,
}

impl Told {
    /// Addresses told of.
    pub(super) fn rows(&self) -> usize {
        self.neighbors.len()
    }

    /// Becomes what the file gives, by these changes: what comes before what goes, so that a frame always has somewhere to go.
    pub(super) fn become_table_of(&mut self, planned: &PlannedNetwork) -> Vec<TableChange> {
        let mut wanted = Self::default();
        for one in &planned.endpoints {
            let mac = one.endpoint.mac;
            wanted.members.insert(one.host);
            wanted.macs.insert(mac, one.host);
            wanted
                .neighbors
                .extend(one.endpoint.ips.iter().map(|&ip| (ip, mac)));
        }
        let member = |&host: &HostId, state| TableChange::Member { host, state };
        let mut changes = Vec::new();
        let joined = wanted.members.difference(&self.members);
        changes.extend(joined.map(|host| member(host, MemberState::Up)));
        let macs = wanted.macs.iter();
        changes.extend(
            macs.filter(|(mac, host)| self.macs.get(mac) != Some(host))
                .map(|(&mac, &host)| TableChange::Mac {
                    mac,
                    host: Some(host),
                }),
        );
        let neighbors = wanted.neighbors.iter();
        let neighbors = neighbors.filter(|(ip, mac)| self.neighbors.get(ip) != Some(mac));
        changes.extend(neighbors.map(|(&ip, &mac)| TableChange::Neighbor { ip, mac: Some(mac) }));
        let gone = self
            .neighbors
            .keys()
            .filter(|ip| !wanted.neighbors.contains_key(ip));
        changes.extend(gone.map(|&ip| TableChange::Neighbor { ip, mac: None }));
        let gone = self
            .macs
            .keys()
            .filter(|mac| !wanted.macs.contains_key(mac));
        changes.extend(gone.map(|&mac| TableChange::Mac { mac, host: None }));
        let left = self.members.difference(&wanted.members);
        changes.extend(left.map(|host| member(host, MemberState::Absent)));
        *self = wanted;
        changes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::agent::static_mode::file::{File, Plan};

    /// A network of endpoints: host, last byte of the MAC address, last byte of the address.
    fn plan(endpoints: &[(u8, u8, u8)]) -> Plan {
        let mut text = "[[networks]]\nname = 'n'\nvni = 7\nsubnets = ['10.0.9.0/24']\ngateways = ['10.0.9.254']\n".to_owned();
        for host in 0..3 {
            text += &format!(
                "[[hosts]]\nname = 'h{host}'\nvtep = '192.0.2.{}'\n",
                host + 1
            );
        }
        for (host, mac, ip) in endpoints {
            text += &format!(
                "[[endpoints]]\nnetwork = 'n'\nhost = 'h{host}'\nmac = '02:00:00:00:00:{mac:02x}'\nips = ['10.0.9.{ip}']\n\
                 container = 'c{mac}'\n"
            );
        }
        let file: File = toml::from_str(&text).expect("TOML");
        file.plan("h0", 1500).expect("distinct addresses fit")
    }

    fn applied(told: &mut Told, changes: &[TableChange]) {
        for change in changes {
            match *change {
                TableChange::Mac { mac, host } => {
                    told.macs.remove(&mac);
                    told.macs.extend(host.map(|host| (mac, host)));
                }
                TableChange::Neighbor { ip, mac } => {
                    told.neighbors.remove(&ip);
                    told.neighbors.extend(mac.map(|mac| (ip, mac)));
                }
                TableChange::Member { host, state } => {
                    told.members.remove(&host);
                    told.members
                        .extend((state != MemberState::Absent).then_some(host));
                }
                TableChange::Backend { .. } | TableChange::Names { .. } => {
                    panic!("static mode has no services and no names")
                }
            }
        }
    }

    fn endpoints() -> impl Strategy<Value = Vec<(u8, u8, u8)>> {
        let one = (0..3u8, 1..20u8, 1..20u8);
        prop::collection::vec(one, 0..12).prop_map(|mut all| {
            let (mut macs, mut ips) = (BTreeSet::new(), BTreeSet::new());
            all.retain(|&(_, mac, ip)| macs.insert(mac) && ips.insert(ip));
            all
        })
    }

    proptest! {
        #[test]
        fn who_applies_the_changes_has_the_files_table(files in prop::collection::vec(endpoints(), 1..6)) {
            let (mut told, mut seen) = (Told::default(), Told::default());
            for endpoints in files {
                let plan = plan(&endpoints);
                let planned = plan.networks.values().next().expect("one network");
                let changes = told.become_table_of(planned);
                applied(&mut seen, &changes);
                prop_assert_eq!(&seen, &told);
                prop_assert_eq!(told.become_table_of(planned), []);
                prop_assert_eq!(told.rows(), endpoints.len());
            }
        }
    }
}
