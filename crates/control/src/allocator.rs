//! Which address and which MAC address comes next: pure functions over a network's table.
//!
//! Addresses go in order, round the subnet, with a rest before one is used again, so that an address seldom comes back while
//! anybody remembers its last holder. And a reused address gets a new MAC address, so that whoever does remember it misses.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::IpNet;
use vtep::{MacAddr, Vni};

use crate::epoch::Epoch;
use crate::network::Subnet;
use crate::row::State;
use crate::table::Table;

/// How long a freed address rests before it is handed out again unasked.
pub const REST: Duration = Duration::from_secs(10);

/// Where the search in one subnet goes on, and what rests.
#[derive(Debug, Default)]
pub struct Pool {
    /// The last address handed out unasked, for each subnet.
    cursors: HashMap<IpNet, IpAddr>,
    /// When freed addresses may be used again.
    resting: HashMap<IpAddr, Duration>,
}

/// No address is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exhausted {
    /// Addresses that endpoints hold.
    pub in_use: u128,
    /// Addresses that rest after being freed.
    pub resting: u128,
    /// Addresses that endpoints may hold at all.
    pub capacity: u128,
}

impl Pool {
    /// Goes on after `ip`, as before a restart.
    pub fn resume(&mut self, net: IpNet, ip: IpAddr) {
        self.cursors.insert(net, ip);
    }

    /// An address was freed at `now`.
    pub fn free(&mut self, ip: IpAddr, now: Duration) {
        self.resting.insert(ip, now + REST);
    }

    /// The next address of a subnet: the first after the last one handed out that nobody holds and that does not rest.
    pub fn next(
        &mut self,
        subnet: &Subnet,
        table: &Table,
        now: Duration,
    ) -> Result<IpAddr, Exhausted> {
        self.resting.retain(|_, until| *until > now);
        let (first, last) = range(subnet.net);
        let capacity = last.saturating_sub(first).saturating_add(1);
        let start = match self.cursors.get(&subnet.net).map(|&ip| number(ip)) {
            Some(cursor) if (first..last).contains(&cursor) => cursor + 1,
            _ => first,
        };
        // Among `table.len() + 1` candidates one was never used, so the search is bounded by what is used, not by the subnet.
        let tries = capacity.min(table.len() as u128 + 1);
        let mut candidate = start;
        for _ in 0..tries {
            let ip = address(subnet.net, candidate);
            let held = table.row(ip).is_some_and(|row| row.state != State::Free);
            if !held && !self.resting.contains_key(&ip) {
                self.cursors.insert(subnet.net, ip);
                return Ok(ip);
            }
            candidate = if candidate >= last {
                first
            } else {
                candidate + 1
            };
        }
        let in_subnet = |ip: &IpAddr| subnet.net.contains(ip);
        let in_use = table
            .rows()
            .filter(|row| row.state != State::Free && in_subnet(&row.ip))
            .count() as u128;
        let resting = self.resting.keys().filter(|ip| in_subnet(ip)).count() as u128;
        Err(Exhausted {
            in_use,
            resting,
            capacity,
        })
    }
}

/// The first address of a prefix, which is the gateway's.
#[must_use]
pub fn gateway(net: IpNet) -> IpAddr {
    address(net, range(net).0 - 1)
}

/// Whether an endpoint may hold this address of the prefix: not the network's, the gateway's or the broadcast address.
#[must_use]
pub fn is_assignable(net: IpNet, ip: IpAddr) -> bool {
    let (first, last) = range(net);
    net.contains(&ip) && (first..=last).contains(&number(ip))
}

/// Whether a prefix has room for a gateway and one endpoint.
#[must_use]
pub fn is_roomy(net: IpNet) -> bool {
    match net {
        IpNet::V4(net) => net.prefix_len() <= 30,
        IpNet::V6(net) => net.prefix_len() <= 126,
    }
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

/// The first and last address that endpoints may hold, as numbers.
fn range(net: IpNet) -> (u128, u128) {
    let (network, broadcast) = (number(net.network()), number(net.broadcast()));
    // An IPv6 subnet has no broadcast address; its last one is left out all the same, to treat both families alike.
    (network + 2, broadcast.saturating_sub(1).max(network + 1))
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

fn address(net: IpNet, number: u128) -> IpAddr {
    match net {
        IpNet::V4(_) => Ipv4Addr::from_bits(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        IpNet::V6(_) => Ipv6Addr::from_bits(number).into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::host::HostId;
    use crate::row::Row;

    fn subnet(net: &str) -> Subnet {
        let net: IpNet = net.parse().unwrap();
        Subnet {
            net,
            gateway: gateway(net),
        }
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
        };
        assert!(table.apply(row, &mut Vec::new()));
    }

    #[test]
    fn addresses_go_in_order_round_the_subnet_with_a_rest() {
        let subnet = subnet("10.0.9.0/29");
        assert_eq!(subnet.gateway.to_string(), "10.0.9.1");
        let (mut pool, mut table, mut epoch) = (Pool::default(), Table::default(), 0);
        let mut now = Duration::ZERO;
        for last in 2..=6 {
            let ip = pool.next(&subnet, &table, now).unwrap();
            assert_eq!(ip, IpAddr::from([10, 0, 9, last]));
            set(&mut table, &mut epoch, ip, State::Down);
        }
        assert_eq!(
            pool.next(&subnet, &table, now),
            Err(Exhausted {
                in_use: 5,
                resting: 0,
                capacity: 5
            })
        );
        let freed = IpAddr::from([10, 0, 9, 3]);
        set(&mut table, &mut epoch, freed, State::Free);
        pool.free(freed, now);
        now += REST - Duration::from_millis(1);
        assert_eq!(
            pool.next(&subnet, &table, now),
            Err(Exhausted {
                in_use: 4,
                resting: 1,
                capacity: 5
            })
        );
        now += Duration::from_millis(1);
        assert_eq!(pool.next(&subnet, &table, now), Ok(freed));
    }

    #[test]
    fn a_freed_address_comes_after_the_unused_ones() {
        let subnet = subnet("10.0.9.0/24");
        let (mut pool, mut table, mut epoch) = (Pool::default(), Table::default(), 0);
        let ip = pool.next(&subnet, &table, Duration::ZERO).unwrap();
        set(&mut table, &mut epoch, ip, State::Free);
        assert_eq!(
            pool.next(&subnet, &table, REST * 2),
            Ok([10, 0, 9, 3].into())
        );
        let mut restarted = Pool::default();
        restarted.resume(subnet.net, [10, 0, 9, 254].into());
        assert_eq!(
            restarted.next(&subnet, &table, REST * 2),
            Ok([10, 0, 9, 2].into())
        );
    }

    #[test]
    fn edges_of_prefixes() {
        let four: IpNet = "10.0.9.0/30".parse().unwrap();
        assert!(is_roomy(four) && is_assignable(four, [10, 0, 9, 2].into()));
        for last in [0, 1, 3, 4] {
            assert!(!is_assignable(four, [10, 0, 9, last].into()), "{last}");
        }
        for narrow in ["10.0.9.0/31", "10.0.9.1/32", "fd00::/127", "fd00::1/128"] {
            assert!(!is_roomy(narrow.parse().unwrap()), "{narrow}");
        }
        let six = subnet("fd00::/64");
        assert_eq!(six.gateway.to_string(), "fd00::1");
        let ip = Pool::default()
            .next(&six, &Table::default(), Duration::ZERO)
            .unwrap();
        assert_eq!(ip.to_string(), "fd00::2");
        let all = subnet("::/0");
        assert!(
            Pool::default()
                .next(&all, &Table::default(), Duration::ZERO)
                .is_ok()
        );
    }

    #[test]
    fn a_reused_address_gets_another_mac() {
        let ip = [IpAddr::from([10, 0, 9, 2])];
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
                            prop_assert!(!held.contains(&ip) && is_assignable(subnet.net, ip));
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
                    pool.free(ip, now);
                    freed_at.insert(ip, now);
                }
            }
        }
    }
}
