//! The table of one network: rows merged in, and what a datapath must be told of each merge.
//!
//! There are no MAC rows. Where a MAC address is follows from the rows that are up, the highest epoch winning; which hosts are
//! members follows from who owns one. Merging is commutative and idempotent: after the same rows in any order, any number of
//! times, the table is the same. Rows leave only when a whole network goes or a manager's store was replaced.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use vtep::MacAddr;

use crate::epoch::Epoch;
use crate::host::HostId;
use crate::names::Names;
use crate::row::{Row, State};
use crate::service::Membership;

/// How a host takes part in a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemberState {
    /// It has no endpoint that is up: nothing may come from it.
    Absent,
    /// It has endpoints and its heartbeats are missing: no floods go to it, all else stays.
    Masked,
    /// It has endpoints.
    Up,
}

/// An endpoint that is up and a member of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Backend {
    /// The service's epoch.
    pub service: Epoch,
    /// The host that has it.
    pub host: HostId,
    /// Its weight.
    pub weight: u16,
    /// New connections may go there: its owner says so, and its host is not masked.
    pub serving: bool,
}

/// One step that brings a datapath in line with the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableChange {
    /// Who answers for an address; `None`: nobody.
    Neighbor {
        /// The address.
        ip: IpAddr,
        /// Its MAC address.
        mac: Option<MacAddr>,
    },
    /// Where a MAC address is; `None`: nowhere.
    Mac {
        /// The MAC address.
        mac: MacAddr,
        /// The host that has it.
        host: Option<HostId>,
    },
    /// How a host takes part.
    Member {
        /// The host.
        host: HostId,
        /// How.
        state: MemberState,
    },
    /// Which service an address is a member of; `None`: of none any more, and its connections are at an end.
    Backend {
        /// The address.
        ip: IpAddr,
        /// The member.
        backend: Option<Backend>,
    },
    /// What the container with an address is called; `None`: it is gone, nameless, or on a host that is masked.
    Names {
        /// The address.
        ip: IpAddr,
        /// Its names.
        names: Option<Arc<Names>>,
    },
}

/// The rows of one network and what follows from them.
#[derive(Clone, Debug, Default)]
pub struct Table {
    rows: HashMap<IpAddr, Row>,
    /// Addresses of all rows that are not free, by MAC address. Rarely more than two: an endpoint's IPv4 and IPv6.
    by_mac: HashMap<MacAddr, Vec<IpAddr>>,
    /// How many rows of each host are up; no entry for none.
    up_rows: HashMap<HostId, usize>,
    /// Addresses of each host's rows that are up and that a mask hides: members of a service, or with names. No entry for none.
    maskable: HashMap<HostId, BTreeSet<IpAddr>>,
    masked: HashSet<HostId>,
}

impl Table {
    /// Merges a row. `false`: what is known is as new or newer, and nothing changed.
    ///
    /// What a datapath must do is added to `changes`: for an endpoint that comes up, its member first, then its MAC, then its
    /// addresses, so that nothing is steered to a place that is not ready.
    pub fn apply(&mut self, row: Row, changes: &mut Vec<TableChange>) -> bool {
        if self
            .rows
            .get(&row.ip)
            .is_some_and(|known| !row.supersedes(known))
        {
            return false;
        }
        self.replace(row.ip, Some(row), changes);
        true
    }

    /// Forgets every row that `keep` refuses. Only for a snapshot of a newer generation: within one, rows are never forgotten.
    pub fn retain(&mut self, keep: impl Fn(&Row) -> bool, changes: &mut Vec<TableChange>) {
        let gone: Vec<IpAddr> = self
            .rows
            .values()
            .filter(|row| !keep(row))
            .map(|row| row.ip)
            .collect();
        for ip in gone {
            self.replace(ip, None, changes);
        }
    }

    /// Masks or unmasks a host.
    pub fn set_masked(&mut self, host: HostId, masked: bool, changes: &mut Vec<TableChange>) {
        let changed = if masked {
            self.masked.insert(host)
        } else {
            self.masked.remove(&host)
        };
        if changed && self.up_rows.contains_key(&host) {
            changes.push(TableChange::Member {
                host,
                state: self.member(host),
            });
            for &ip in self.maskable.get(&host).into_iter().flatten() {
                let row = self.rows.get(&ip);
                // What does not serve anyway has not changed.
                if row.is_some_and(|row| row.member.is_some_and(|member| member.serving)) {
                    let backend = self.backend(ip);
                    changes.push(TableChange::Backend { ip, backend });
                }
                if row.is_some_and(|row| row.names.is_some()) {
                    let names = self.names(ip).cloned();
                    changes.push(TableChange::Names { ip, names });
                }
            }
        }
    }

    /// The row of an address.
    #[must_use]
    pub fn row(&self, ip: IpAddr) -> Option<&Row> {
        self.rows.get(&ip)
    }

    /// All rows, free ones included, in no order.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.values()
    }

    /// How many rows there are, free ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether no address was ever used.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows that are not free and hold this MAC address.
    pub fn holders(&self, mac: MacAddr) -> impl Iterator<Item = &Row> {
        self.by_mac
            .get(&mac)
            .into_iter()
            .flatten()
            .filter_map(|ip| self.rows.get(ip))
    }

    /// The host that has this MAC address: the owner of the highest epoch among the rows that are up.
    #[must_use]
    pub fn mac_host(&self, mac: MacAddr) -> Option<HostId> {
        let up = self.holders(mac).filter(|row| row.state == State::Up);
        // The owner breaks a tie that only a broken allocator could make: every view must decide it alike.
        up.max_by_key(|row| (row.epoch, row.owner))
            .map(|row| row.owner)
    }

    /// What an address is to services.
    #[must_use]
    pub fn backend(&self, ip: IpAddr) -> Option<Backend> {
        let row = self.rows.get(&ip)?;
        let member = membership(row)?;
        Some(Backend {
            service: member.service,
            host: row.owner,
            weight: member.weight,
            serving: member.serving && !self.masked.contains(&row.owner),
        })
    }

    /// What the container with an address is called, while it is up and its host not masked.
    #[must_use]
    pub fn names(&self, ip: IpAddr) -> Option<&Arc<Names>> {
        let row = self.rows.get(&ip)?;
        let visible = row.state == State::Up && !self.masked.contains(&row.owner);
        row.names.as_ref().filter(|_| visible)
    }

    /// How a host takes part.
    #[must_use]
    pub fn member(&self, host: HostId) -> MemberState {
        match (
            self.up_rows.contains_key(&host),
            self.masked.contains(&host),
        ) {
            (false, _) => MemberState::Absent,
            (true, true) => MemberState::Masked,
            (true, false) => MemberState::Up,
        }
    }

    /// The hosts that are members, masked ones included, in no order.
    pub fn members(&self) -> impl Iterator<Item = HostId> {
        self.up_rows.keys().copied()
    }

    /// What brings an empty datapath in line with this table.
    #[must_use]
    pub fn as_changes(&self) -> Vec<TableChange> {
        let members = self.members().map(|host| TableChange::Member {
            host,
            state: self.member(host),
        });
        let macs = self.by_mac.keys().filter_map(|&mac| {
            let host = self.mac_host(mac)?;
            Some(TableChange::Mac {
                mac,
                host: Some(host),
            })
        });
        let up = self.rows.values().filter(|row| row.state == State::Up);
        let neighbors = up.map(|row| TableChange::Neighbor {
            ip: row.ip,
            mac: Some(row.mac),
        });
        let maskable = || self.maskable.values().flatten();
        let backends = maskable().filter_map(|&ip| {
            let backend = Some(self.backend(ip)?);
            Some(TableChange::Backend { ip, backend })
        });
        let names = maskable().filter_map(|&ip| {
            let names = Some(Arc::clone(self.names(ip)?));
            Some(TableChange::Names { ip, names })
        });
        members
            .chain(macs)
            .chain(neighbors)
            .chain(backends)
            .chain(names)
            .collect()
    }

    /// Puts `row` (or nothing) in an address's place and tells what followed.
    fn replace(&mut self, ip: IpAddr, row: Option<Row>, changes: &mut Vec<TableChange>) {
        let old = self.rows.get(&ip).cloned();
        let mut macs: Vec<MacAddr> = [&old, &row]
            .into_iter()
            .flatten()
            .map(|row| row.mac)
            .collect();
        macs.dedup();
        let mut hosts: Vec<HostId> = [&old, &row]
            .into_iter()
            .flatten()
            .map(|row| row.owner)
            .collect();
        hosts.dedup();
        let macs_before: Vec<_> = macs.iter().map(|&mac| self.mac_host(mac)).collect();
        let hosts_before: Vec<_> = hosts.iter().map(|&host| self.member(host)).collect();
        let neighbor_before = neighbor(old.as_ref());
        let neighbor_after = neighbor(row.as_ref());
        let backend_before = self.backend(ip);
        let names_before = self.names(ip).cloned();

        if let Some(old) = &old {
            self.unindex(old);
        }
        match row {
            Some(row) => {
                self.index(&row);
                self.rows.insert(ip, row);
            }
            None => {
                self.rows.remove(&ip);
            }
        }

        let members = hosts
            .iter()
            .zip(hosts_before)
            .filter_map(|(&host, before)| {
                let state = self.member(host);
                (state != before).then_some(TableChange::Member { host, state })
            });
        let macs = macs.iter().zip(macs_before).filter_map(|(&mac, before)| {
            let host = self.mac_host(mac);
            (host != before).then_some(TableChange::Mac { mac, host })
        });
        let mut news: Vec<TableChange> = members.chain(macs).collect();
        if neighbor_before != neighbor_after {
            news.push(TableChange::Neighbor {
                ip,
                mac: neighbor_after,
            });
        }
        let backend = self.backend(ip);
        if backend != backend_before {
            news.push(TableChange::Backend { ip, backend });
        }
        let names = self.names(ip);
        if names != names_before.as_ref() {
            let names = names.cloned();
            news.push(TableChange::Names { ip, names });
        }
        // What goes is undone in the opposite order of what comes.
        if neighbor_after.is_none() {
            news.reverse();
        }
        changes.append(&mut news);
    }

    fn index(&mut self, row: &Row) {
        if row.state == State::Up {
            *self.up_rows.entry(row.owner).or_default() += 1;
        }
        if is_maskable(row) {
            self.maskable.entry(row.owner).or_default().insert(row.ip);
        }
        if row.state != State::Free {
            self.by_mac.entry(row.mac).or_default().push(row.ip);
        }
    }

    fn unindex(&mut self, row: &Row) {
        if row.state == State::Up
            && let Some(count) = self.up_rows.get_mut(&row.owner)
        {
            *count -= 1;
            if *count == 0 {
                self.up_rows.remove(&row.owner);
            }
        }
        if is_maskable(row)
            && let Some(ips) = self.maskable.get_mut(&row.owner)
        {
            ips.remove(&row.ip);
            if ips.is_empty() {
                self.maskable.remove(&row.owner);
            }
        }
        if row.state != State::Free
            && let Some(ips) = self.by_mac.get_mut(&row.mac)
        {
            ips.retain(|ip| *ip != row.ip);
            if ips.is_empty() {
                self.by_mac.remove(&row.mac);
            }
        }
    }
}

/// The highest epoch among rows.
pub fn highest_epoch<'r>(rows: impl Iterator<Item = &'r Row>) -> Epoch {
    rows.map(|row| row.epoch).max().unwrap_or(Epoch::ZERO)
}

/// The MAC address that answers for a row's address.
fn neighbor(row: Option<&Row>) -> Option<MacAddr> {
    row.filter(|row| row.state == State::Up).map(|row| row.mac)
}

/// Whether a mask of its host hides more of a row than floods.
fn is_maskable(row: &Row) -> bool {
    row.state == State::Up && (row.member.is_some() || row.names.is_some())
}

/// The membership of a row that counts.
fn membership(row: &Row) -> Option<Membership> {
    row.member.filter(|_| row.state == State::Up)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn host(n: u8) -> HostId {
        HostId::from_bytes([n; 16])
    }

    fn row(ip: u8, epoch: u64, owner: u8, owner_seq: u32, state: State, mac: u8) -> Row {
        Row {
            ip: [10, 0, 9, ip].into(),
            epoch: Epoch::new(1, epoch),
            owner: host(owner),
            owner_seq,
            state,
            mac: MacAddr::new([2, 0, 0, 0, 0, mac]),
            member: None,
            names: None,
        }
    }

    fn called(container: &str) -> Arc<Names> {
        Arc::new(Names {
            container: container.to_owned(),
            id: "0123456789ab".to_owned(),
            aliases: Vec::new(),
        })
    }

    fn apply(table: &mut Table, row: Row) -> Vec<TableChange> {
        let mut changes = Vec::new();
        table.apply(row, &mut changes);
        changes
    }

    #[test]
    fn an_endpoint_comes_member_first_and_goes_member_last() {
        let mut table = Table::default();
        let (mac, ip) = (
            MacAddr::new([2, 0, 0, 0, 0, 7]),
            IpAddr::from([10, 0, 9, 2]),
        );
        assert_eq!(apply(&mut table, row(2, 1, 1, 0, State::Down, 7)), []);
        assert_eq!(
            apply(&mut table, row(2, 1, 1, 1, State::Up, 7)),
            [
                TableChange::Member {
                    host: host(1),
                    state: MemberState::Up
                },
                TableChange::Mac {
                    mac,
                    host: Some(host(1))
                },
                TableChange::Neighbor { ip, mac: Some(mac) },
            ]
        );
        assert_eq!(apply(&mut table, row(2, 1, 1, 1, State::Up, 7)), []);
        assert_eq!(
            apply(&mut table, row(2, 2, 1, 0, State::Free, 7)),
            [
                TableChange::Neighbor { ip, mac: None },
                TableChange::Mac { mac, host: None },
                TableChange::Member {
                    host: host(1),
                    state: MemberState::Absent
                },
            ]
        );
        assert_eq!(
            apply(&mut table, row(2, 1, 1, 9, State::Up, 7)),
            [],
            "the old holder stays gone"
        );
    }

    #[test]
    fn the_highest_epoch_wins_a_mac() {
        let mut table = Table::default();
        let mac = MacAddr::new([2, 0, 0, 0, 0, 7]);
        apply(&mut table, row(2, 5, 1, 0, State::Up, 7));
        apply(&mut table, row(3, 4, 2, 0, State::Up, 7));
        assert_eq!(table.mac_host(mac), Some(host(1)));
        let changes = apply(&mut table, row(2, 6, 1, 0, State::Free, 7));
        assert!(
            changes.contains(&TableChange::Mac {
                mac,
                host: Some(host(2))
            }),
            "{changes:?}"
        );
    }

    #[test]
    fn a_mask_hides_from_floods_and_removes_nothing() {
        let mut table = Table::default();
        let mut changes = Vec::new();
        table.set_masked(host(1), true, &mut changes);
        assert_eq!(changes, [], "a host without endpoints is nobody's member");
        apply(&mut table, row(2, 1, 1, 0, State::Up, 7));
        assert_eq!(table.member(host(1)), MemberState::Masked);
        table.set_masked(host(1), false, &mut changes);
        assert_eq!(
            changes,
            [TableChange::Member {
                host: host(1),
                state: MemberState::Up
            }]
        );
        assert_eq!(
            table.mac_host(MacAddr::new([2, 0, 0, 0, 0, 7])),
            Some(host(1))
        );
    }

    #[test]
    fn a_member_of_a_service_is_hidden_with_its_host_and_gone_with_its_row() {
        let mut table = Table::default();
        let ip = IpAddr::from([10, 0, 9, 2]);
        let member = |serving| Membership {
            service: Epoch::new(1, 9),
            weight: 2,
            serving,
        };
        let member = |seq, state, serving| Row {
            member: Some(member(serving)),
            ..row(2, 1, 1, seq, state, 7)
        };
        let of = |changes: Vec<TableChange>| -> Vec<Option<bool>> {
            let backends = changes.iter().filter_map(|change| match change {
                TableChange::Backend { ip: told, backend } if *told == ip => Some(*backend),
                _ => None,
            });
            backends.map(|backend| backend.map(|b| b.serving)).collect()
        };
        assert_eq!(of(apply(&mut table, member(0, State::Down, false))), []);
        assert_eq!(
            of(apply(&mut table, member(1, State::Up, false))),
            [Some(false)]
        );
        let masked = |table: &mut Table, masked| {
            let mut changes = Vec::new();
            table.set_masked(host(1), masked, &mut changes);
            of(changes)
        };
        assert_eq!(masked(&mut table, true), [], "it got nothing anyway");
        assert_eq!(of(apply(&mut table, member(2, State::Up, true))), []);
        assert_eq!(masked(&mut table, false), [Some(true)]);
        assert_eq!(masked(&mut table, true), [Some(false)]);
        let free = row(2, 2, 1, 0, State::Free, 7);
        let gone = apply(&mut table, free);
        assert_eq!(
            gone.first(),
            Some(&TableChange::Backend { ip, backend: None })
        );
        assert_eq!(masked(&mut table, false), []);
    }

    #[test]
    fn names_are_seen_while_their_endpoint_is_up_and_its_host_not_masked() {
        let mut table = Table::default();
        let ip = IpAddr::from([10, 0, 9, 2]);
        let named = |seq, state, name: &str| Row {
            names: Some(called(name)),
            ..row(2, 1, 1, seq, state, 7)
        };
        let of = |changes: Vec<TableChange>| -> Vec<Option<String>> {
            let names = changes.into_iter().filter_map(|change| match change {
                TableChange::Names { ip: told, names } if told == ip => Some(names),
                _ => None,
            });
            names.map(|names| Some(names?.container.clone())).collect()
        };
        let seen = |name: &str| vec![Some(name.to_owned())];
        assert_eq!(of(apply(&mut table, named(0, State::Down, "a"))), []);
        assert_eq!(of(apply(&mut table, named(1, State::Up, "a"))), seen("a"));
        assert_eq!(of(apply(&mut table, named(2, State::Up, "a"))), []);
        assert_eq!(of(apply(&mut table, named(3, State::Up, "b"))), seen("b"));
        let masked = |table: &mut Table, masked| {
            let mut changes = Vec::new();
            table.set_masked(host(1), masked, &mut changes);
            of(changes)
        };
        assert_eq!(masked(&mut table, true), [None]);
        assert_eq!(of(apply(&mut table, named(4, State::Up, "c"))), []);
        assert_eq!(masked(&mut table, false), seen("c"));
        let free = row(2, 2, 1, 0, State::Free, 7);
        assert_eq!(of(apply(&mut table, free)), [None]);
    }

    /// What a datapath holds after following changes.
    #[derive(Debug, Default, PartialEq, Eq)]
    struct Followed {
        neighbors: BTreeMap<IpAddr, MacAddr>,
        macs: BTreeMap<[u8; 6], HostId>,
        members: BTreeMap<HostId, bool>,
        backends: BTreeMap<IpAddr, Backend>,
        names: BTreeMap<IpAddr, Arc<Names>>,
    }

    impl Followed {
        fn follow(&mut self, changes: Vec<TableChange>) {
            for change in changes {
                match change {
                    TableChange::Neighbor { ip, mac } => set(&mut self.neighbors, ip, mac),
                    TableChange::Mac { mac, host } => set(&mut self.macs, mac.octets(), host),
                    TableChange::Member { host, state } => {
                        let up = state == MemberState::Up;
                        set(
                            &mut self.members,
                            host,
                            (state != MemberState::Absent).then_some(up),
                        );
                    }
                    TableChange::Backend { ip, backend } => set(&mut self.backends, ip, backend),
                    TableChange::Names { ip, names } => set(&mut self.names, ip, names),
                }
            }
        }
    }

    fn set<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) {
        match value {
            Some(value) => map.insert(key, value),
            None => map.remove(&key),
        };
    }

    prop_compose! {
        /// One row for each (ip, epoch, owner_seq): the allocator never issues one epoch twice.
        fn any_row()(ip in 2..6u8, epoch in 1..12u64, seq in 0..3u32) -> Row {
            let owner = u8::try_from(epoch % 3).unwrap();
            let state = [State::Up, State::Down, State::Free][usize::try_from((epoch + u64::from(seq)) % 3).unwrap()];
            let member = epoch.is_multiple_of(2).then(|| Membership {
                service: Epoch::new(1, epoch % 4),
                weight: u16::from(ip),
                serving: seq > 0,
            });
            let names = (epoch + u64::from(seq)).is_multiple_of(2).then(|| called(&format!("c{epoch}")));
            Row { member, names, ..row(ip, epoch, owner, seq, state, ip % 3) }
        }
    }

    proptest! {
        #[test]
        fn any_order_and_duplication_ends_in_the_same_table(
            rows in prop::collection::vec(any_row(), 1..40),
            order in any::<prop::sample::Index>(),
            seed in any::<u64>(),
        ) {
            let mut shuffled: Vec<Row> = rows.iter().chain(&rows).cloned().collect();
            shuffled.rotate_left(order.index(rows.len()));
            let len = shuffled.len();
            for i in 0..len {
                let j = usize::try_from(seed.wrapping_mul(i as u64 + 7) % len as u64).unwrap();
                shuffled.swap(i, j);
            }
            let (mut one, mut other) = (Table::default(), Table::default());
            let (mut followed_one, mut followed_other) = (Followed::default(), Followed::default());
            for row in rows {
                followed_one.follow(apply(&mut one, row));
            }
            for row in shuffled {
                let before = other.row(row.ip).map(|row| row.epoch);
                followed_other.follow(apply(&mut other, row.clone()));
                prop_assert!(other.row(row.ip).map(|row| row.epoch) >= before, "a view took a lower epoch");
            }
            prop_assert_eq!(&one.rows, &other.rows);
            prop_assert_eq!(&followed_one, &followed_other);
            // Following every step ends where reading the whole table ends.
            let mut fresh = Followed::default();
            fresh.follow(one.as_changes());
            prop_assert_eq!(&fresh, &followed_one);
            let mut changes = Vec::new();
            one.retain(|_| false, &mut changes);
            followed_one.follow(changes);
            prop_assert_eq!(followed_one, Followed::default());
        }
    }
}
