//! Which address and which MAC address comes next: pure functions over a network's table.
//!
//! Addresses go in order, round the subnet, with a rest before one is used again, so that an address seldom comes back while
//! anybody remembers its last holder. And a reused address gets a new MAC address, so that whoever does remember it misses.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use ipnet::IpNet;
use vtep::{MacAddr, Vni};

use crate::epoch::Epoch;
use crate::row::{Row, State};
use crate::subnet::{Subnet, number};
use crate::table::Table;

/// How long a freed address rests before it is handed out again unasked, unless a network says otherwise.
pub const REST: Duration = Duration::from_secs(10);

/// Where the search in one subnet goes on, what rests, and what is set aside.
#[derive(Debug, Default)]
pub struct Pool {
    /// The last address handed out unasked, for each subnet.
    cursors: HashMap<IpNet, IpAddr>,
    /// When freed addresses may be used again.
    resting: HashMap<IpAddr, Duration>,
    /// The same in the order of their ends, with some that were freed again since.
    ends: VecDeque<(Duration, IpAddr)>,
    /// Addresses that are promised to a host.
    set_aside: HashSet<IpAddr>,
}

/// How full a subnet is, of the addresses that can be handed out unasked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Addresses that endpoints hold.
    pub in_use: u128,
    /// Addresses that rest after being freed.
    pub resting: u128,
    /// When the first of these may be used again, from now.
    pub next_free: Option<Duration>,
    /// Addresses that are promised to hosts.
    pub set_aside: u128,
    /// All addresses.
    pub capacity: u128,
}

impl Usage {
    /// Addresses that could be handed out now.
    #[must_use]
    pub fn free(&self) -> u128 {
        let taken = self.in_use + self.resting + self.set_aside;
        self.capacity.saturating_sub(taken)
    }
}

impl Pool {
    /// Goes on after `ip`, as before a restart.
    pub fn resume(&mut self, net: IpNet, ip: IpAddr) {
        self.cursors.insert(net, ip);
    }

    /// An address was freed, and rests until then. Ends come in order, because all addresses of a network rest equally long.
    pub fn free(&mut self, ip: IpAddr, until: Duration) {
        self.resting.insert(ip, until);
        self.ends.push_back((until, ip));
    }

    /// The next address of a subnet: the first after the last one handed out that nobody holds and that does not rest. Where
    /// there is none, how the subnet is used.
    pub fn next(&mut self, subnet: &Subnet, table: &Table, now: Duration) -> Result<IpAddr, Usage> {
        self.wake(now);
        let (first, last) = subnet.bounds();
        let start = match self.cursors.get(&subnet.net).map(|&ip| number(ip)) {
            Some(cursor) if (first..last).contains(&cursor) => cursor + 1,
            _ => first,
        };
        let mut candidate = start;
        for _ in 0..self.tries(subnet, table) {
            let ip = subnet.address(candidate);
            if self.is_free(subnet, table, ip) {
                self.cursors.insert(subnet.net, ip);
                return Ok(ip);
            }
            candidate = if candidate >= last {
                first
            } else {
                candidate + 1
            };
        }
        Err(self.usage(subnet, table, now))
    }

    /// Sets up to `count` addresses aside, from the end of what is handed out downwards, where [`Pool::next`] comes last.
    pub fn set_aside(
        &mut self,
        subnet: &Subnet,
        table: &Table,
        count: usize,
        now: Duration,
    ) -> Vec<IpAddr> {
        self.wake(now);
        let (first, last) = subnet.bounds();
        let mut taken = Vec::new();
        let tries = self.tries(subnet, table).saturating_add(count as u128);
        for candidate in (first..=last).rev() {
            if taken.len() == count || last - candidate >= tries {
                break;
            }
            let ip = subnet.address(candidate);
            if self.is_free(subnet, table, ip) {
                taken.push(ip);
            }
        }
        self.set_aside.extend(&taken);
        taken
    }

    /// Sets this address aside, as before a restart.
    pub fn keep_aside(&mut self, ip: IpAddr) {
        self.set_aside.insert(ip);
    }

    /// An address set aside is as any other again.
    pub fn put_back(&mut self, ip: IpAddr) {
        self.set_aside.remove(&ip);
    }

    /// Whether an address is promised to a host.
    #[must_use]
    pub fn is_set_aside(&self, ip: IpAddr) -> bool {
        self.set_aside.contains(&ip)
    }

    /// How full a subnet is.
    #[must_use]
    pub fn usage(&self, subnet: &Subnet, table: &Table, now: Duration) -> Usage {
        let held = |row: &&Row| row.state != State::Free && subnet.in_bounds(row.ip);
        let resting = || {
            let resting = self.resting.iter().filter(|(_, until)| **until > now);
            resting.filter(|(ip, _)| subnet.in_bounds(**ip) && !is_held(table, **ip))
        };
        let aside = self.set_aside.iter();
        Usage {
            in_use: table.rows().filter(held).count() as u128,
            resting: resting().count() as u128,
            next_free: resting().map(|(_, until)| until.saturating_sub(now)).min(),
            set_aside: aside
                .filter(|ip| subnet.in_bounds(**ip) && !is_held(table, **ip))
                .count() as u128,
            capacity: subnet.capacity(),
        }
    }

    /// Among so many candidates one was never used and is kept for nobody: the search is bounded by what is used, not by the
    /// subnet.
    fn tries(&self, subnet: &Subnet, table: &Table) -> u128 {
        // What rests has a row, but where it was leased and came back unused.
        let used = table.len() + subnet.kept() + self.set_aside.len() + self.resting.len() + 1;
        let (first, last) = subnet.bounds();
        last.saturating_add(1)
            .saturating_sub(first)
            .min(used as u128)
    }

    fn is_free(&self, subnet: &Subnet, table: &Table, ip: IpAddr) -> bool {
        !is_held(table, ip)
            && !self.resting.contains_key(&ip)
            && !self.set_aside.contains(&ip)
            && subnet.is_assignable(ip)
    }

    /// Forgets what has rested long enough.
    fn wake(&mut self, now: Duration) {
        while let Some(&(until, ip)) = self.ends.front()
            && until <= now
        {
            self.ends.pop_front();
            if self.resting.get(&ip) == Some(&until) {
                self.resting.remove(&ip);
            }
        }
    }
}

fn is_held(table: &Table, ip: IpAddr) -> bool {
    table.row(ip).is_some_and(|row| row.state != State::Free)
}

/// The MAC address of an allocation: `02`, the low byte of the epoch, the IPv4 address. Without IPv4: `02` and the low 40 bits
/// of the epoch. The caller draws another epoch where the result is taken.
#[must_use]
pub fn mac(epoch: Epoch, ips: &[IpAddr]) -> MacAddr {
    let [.., e4, e3, e2, e1, e0] = epoch.get().to_be_bytes();
    let v4 = ips.iter().find_map(|ip| match ip {
        IpAddr::V4(ip) => Some(ip.octets()),
        IpAddr::V6(_) => None,
    });
    match v4 {
        Some([a, b, c, d]) => MacAddr::new([2, e0, a, b, c, d]),
        None => MacAddr::new([2, e4, e3, e2, e1, e0]),
    }
}

/// The MAC address behind a network's gateways: locally administered, in a range that [`mac`] never uses.
#[must_use]
pub fn gateway_mac(vni: Vni) -> MacAddr {
    let [_, a, b, c] = vni.get().to_be_bytes();
    MacAddr::new([0x06, b't', b'l', a, b, c])
}

/// The MAC address that Docker gives an IPv4 address: `02:42` and the address. One that is used again has it again.
#[must_use]
pub fn docker_mac(ip: Ipv4Addr) -> MacAddr {
    let [a, b, c, d] = ip.octets();
    MacAddr::new([0x02, 0x42, a, b, c, d])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::host::HostId;

    fn subnet(net: &str) -> Subnet {
        Subnet::new(net.parse().unwrap())
    }

    fn four(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 9, last])
    }

    fn set(table: &mut Table, epoch: &mut u64, ip: IpAddr, state: State) {
        *epoch += 1;
        let row = Row {
            ip,
            epoch: Epoch::new(1, *epoch),
            owner: HostId::from_bytes([1; 16]),
            owner_seq: 0,
            state,
            mac: mac(Epoch::new(1, *epoch), &[ip]),
            member: None,
            names: None,
        };
        assert!(table.apply(row, &mut Vec::new()));
    }

    #[test]
    fn addresses_go_in_order_round_the_subnet_with_a_rest() {
        let subnet = subnet("10.0.9.0/29");
        let (mut pool, mut table, mut epoch) = (Pool::default(), Table::default(), 0);
        let mut now = Duration::ZERO;
        for last in 2..=6 {
            let ip = pool.next(&subnet, &table, now).unwrap();
            assert_eq!(ip, four(last));
            set(&mut table, &mut epoch, ip, State::Down);
        }
        let full = Usage {
            in_use: 5,
            resting: 0,
            next_free: None,
            set_aside: 0,
            capacity: 5,
        };
        assert_eq!(pool.next(&subnet, &table, now), Err(full));
        let freed = four(3);
        set(&mut table, &mut epoch, freed, State::Free);
        pool.free(freed, now + REST);
        let millisecond = Duration::from_millis(1);
        now += REST - millisecond;
        let resting = Usage {
            in_use: 4,
            resting: 1,
            next_free: Some(millisecond),
            ..full
        };
        assert_eq!(pool.next(&subnet, &table, now), Err(resting));
        now += millisecond;
        assert_eq!(pool.next(&subnet, &table, now), Ok(freed));
    }

    #[test]
    fn an_address_that_is_freed_again_rests_anew() {
        let subnet = subnet("10.0.9.0/30");
        let (mut pool, mut table, mut epoch) = (Pool::default(), Table::default(), 0);
        set(&mut table, &mut epoch, four(2), State::Free);
        pool.free(four(2), REST);
        pool.free(four(2), REST * 2);
        assert!(pool.next(&subnet, &table, REST).is_err());
        assert_eq!(pool.next(&subnet, &table, REST * 2), Ok(four(2)));
    }

    #[test]
    fn a_freed_address_comes_after_the_unused_ones() {
        let subnet = subnet("10.0.9.0/24");
        let (mut pool, mut table, mut epoch) = (Pool::default(), Table::default(), 0);
        let ip = pool.next(&subnet, &table, Duration::ZERO).unwrap();
        set(&mut table, &mut epoch, ip, State::Free);
        assert_eq!(pool.next(&subnet, &table, REST * 2), Ok(four(3)));
        let mut restarted = Pool::default();
        restarted.resume(subnet.net, four(254));
        assert_eq!(restarted.next(&subnet, &table, REST * 2), Ok(four(2)));
    }

    #[test]
    fn only_the_range_is_handed_out_and_nothing_that_is_kept() {
        let mut subnet = subnet("10.0.9.0/24");
        subnet.ip_range = Some("10.0.9.8/29".parse().unwrap());
        subnet.gateway = four(9);
        subnet.aux_addresses = [("a".to_owned(), four(11)), ("b".to_owned(), four(200))].into();
        let (mut pool, mut table, mut epoch) = (Pool::default(), Table::default(), 0);
        // Held inside the subnet and outside the range: not counted.
        set(&mut table, &mut epoch, four(100), State::Up);
        for last in [8, 10, 12, 13, 14, 15] {
            let ip = pool.next(&subnet, &table, Duration::ZERO).unwrap();
            assert_eq!(ip, four(last));
            set(&mut table, &mut epoch, ip, State::Up);
        }
        let full = pool.next(&subnet, &table, Duration::ZERO).unwrap_err();
        assert_eq!((full.in_use, full.capacity), (6, 6));
    }

    #[test]
    fn addresses_are_set_aside_from_the_end() {
        let subnet = subnet("10.0.9.0/28");
        let (mut pool, mut table, mut epoch) = (Pool::default(), Table::default(), 0);
        set(&mut table, &mut epoch, four(13), State::Up);
        let now = Duration::ZERO;
        let aside = pool.set_aside(&subnet, &table, 3, now);
        assert_eq!(aside, [four(14), four(12), four(11)]);
        assert!(pool.is_set_aside(four(12)) && !pool.is_set_aside(four(13)));
        for last in 2..=10 {
            assert_eq!(pool.next(&subnet, &table, now), Ok(four(last)));
            set(&mut table, &mut epoch, four(last), State::Up);
        }
        let full = pool.next(&subnet, &table, now).unwrap_err();
        assert_eq!((full.in_use, full.set_aside, full.capacity), (10, 3, 13));
        assert!(pool.set_aside(&subnet, &table, 3, now).is_empty());
        pool.put_back(four(12));
        assert_eq!(pool.next(&subnet, &table, now), Ok(four(12)));
        // A wide subnet is not searched to its end.
        let wide = Subnet::new("fd00::/64".parse().unwrap());
        let mut pool = Pool::default();
        assert_eq!(pool.set_aside(&wide, &table, 16, now).len(), 16);
    }

    #[test]
    fn a_reused_address_gets_another_mac() {
        let ip = [four(2)];
        assert_eq!(
            mac(Epoch::new(1, 5), &ip),
            MacAddr::new([2, 5, 10, 0, 9, 2])
        );
        assert_ne!(mac(Epoch::new(1, 5), &ip), mac(Epoch::new(1, 6), &ip));
        let six = ["fd00::2".parse().unwrap()];
        assert_eq!(
            mac(Epoch::new(1, 0x01_0203_0405), &six),
            MacAddr::new([2, 1, 2, 3, 4, 5])
        );
        assert_eq!(
            docker_mac([10, 0, 9, 2].into()),
            MacAddr::new([2, 0x42, 10, 0, 9, 2])
        );
        assert_eq!(
            gateway_mac(Vni::new(0x10_1112).unwrap()),
            MacAddr::new([6, 0x74, 0x6c, 0x10, 0x11, 0x12])
        );
    }

    proptest! {
        #[test]
        fn no_address_is_held_twice_and_none_is_missed(steps in prop::collection::vec((any::<bool>(), 0..8usize, 0..4u64), 1..120)) {
            let subnet = subnet("10.0.9.0/29");
            let (mut pool, mut table, mut epoch) = (Pool::default(), Table::default(), 0);
            let mut now = Duration::ZERO;
            let mut held: Vec<IpAddr> = Vec::new();
            let mut freed_at: HashMap<IpAddr, Duration> = HashMap::new();
            for (take, which, seconds) in steps {
                now += Duration::from_secs(seconds);
                if take {
                    match pool.next(&subnet, &table, now) {
                        Ok(ip) => {
                            prop_assert!(!held.contains(&ip) && subnet.is_assignable(ip));
                            prop_assert!(freed_at.get(&ip).is_none_or(|at| now >= *at + REST));
                            set(&mut table, &mut epoch, ip, State::Up);
                            held.push(ip);
                        }
                        Err(full) => {
                            prop_assert_eq!(full.in_use, held.len() as u128);
                            prop_assert_eq!(full.in_use + full.resting, 5);
                        }
                    }
                } else if which < held.len() {
                    let ip = held.remove(which);
                    set(&mut table, &mut epoch, ip, State::Free);
                    pool.free(ip, now + REST);
                    freed_at.insert(ip, now);
                }
            }
        }
    }
}
