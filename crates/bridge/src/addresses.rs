//! Addresses for containers on the gateway bridge, handed out in order, round the subnet.
//!
//! One pool serves both families: a container's IPv6 address has the host number of its IPv4 address, so the pair is
//! unique when one of them is. The first address is the gateway's.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::BridgeError;

/// The gateway's host number.
const GATEWAY: u32 = 1;

#[derive(Debug)]
pub(crate) struct Pool {
    ipv4: Ipv4Net,
    ipv6: Ipv6Net,
    used: BTreeSet<u32>,
    /// Where the search for the next one begins: an address rests a whole round before it is given again.
    next: u32,
}

impl Pool {
    /// A pool over checked subnets: [`check`] has accepted them.
    pub(crate) fn new(ipv4: Ipv4Net, ipv6: Ipv6Net) -> Self {
        Self {
            ipv4: ipv4.trunc(),
            ipv6: ipv6.trunc(),
            used: BTreeSet::new(),
            next: GATEWAY + 1,
        }
    }

    pub(crate) fn subnets(&self) -> (Ipv4Net, Ipv6Net) {
        (self.ipv4, self.ipv6)
    }

    pub(crate) fn gateways(&self) -> (Ipv4Addr, Ipv6Addr) {
        self.pair(GATEWAY)
    }

    /// The next free pair.
    pub(crate) fn allocate(&mut self) -> Result<(Ipv4Addr, Ipv6Addr), BridgeError> {
        let last = self.last();
        let free = (self.next..=last)
            .chain(GATEWAY + 1..self.next)
            .find(|number| !self.used.contains(number));
        let Some(number) = free else {
            return Err(BridgeError::Exhausted {
                subnet: self.ipv4.into(),
                in_use: self.used.len(),
            });
        };
        self.take(number);
        Ok(self.pair(number))
    }

    /// Takes a pair that a container had before.
    pub(crate) fn reserve(
        &mut self,
        host_ifname: &str,
        pair: (Ipv4Addr, Ipv6Addr),
    ) -> Result<(), BridgeError> {
        let unavailable = |address, reason| BridgeError::Unavailable {
            address,
            host_ifname: host_ifname.to_owned(),
            reason,
        };
        let outside = "outside the gateway bridge's subnet";
        let number = self
            .number(pair.0)
            .ok_or_else(|| unavailable(pair.0.into(), outside))?;
        if self.pair(number).1 != pair.1 {
            return Err(unavailable(pair.1.into(), outside));
        }
        if self.used.contains(&number) {
            return Err(unavailable(pair.0.into(), "held by another container"));
        }
        self.take(number);
        Ok(())
    }

    /// Gives a pair back; one that nobody holds is fine.
    pub(crate) fn release(&mut self, ipv4: Ipv4Addr) {
        if let Some(number) = self.number(ipv4) {
            self.used.remove(&number);
        }
    }

    fn take(&mut self, number: u32) {
        self.used.insert(number);
        self.next = if number == self.last() {
            GATEWAY + 1
        } else {
            number + 1
        };
    }

    /// The highest number a container may have: the one above it is the broadcast address.
    fn last(&self) -> u32 {
        u32::from(self.ipv4.broadcast()) - u32::from(self.ipv4.network()) - 1
    }

    fn pair(&self, number: u32) -> (Ipv4Addr, Ipv6Addr) {
        // `check` made sure that the number fits both host parts.
        let ipv4 = Ipv4Addr::from(u32::from(self.ipv4.network()) | number);
        let ipv6 = Ipv6Addr::from(u128::from(self.ipv6.network()) | u128::from(number));
        (ipv4, ipv6)
    }

    fn number(&self, ipv4: Ipv4Addr) -> Option<u32> {
        let number = u32::from(ipv4).checked_sub(u32::from(self.ipv4.network()))?;
        (GATEWAY < number && number <= self.last()).then_some(number)
    }
}

/// Whether subnets can serve: room for a gateway and a container, and as many IPv6 host bits as IPv4 ones.
pub(crate) fn check(ipv4: Ipv4Net, ipv6: Ipv6Net) -> Result<(), BridgeError> {
    let bad = |wanted, reason| Err(BridgeError::BadSubnet { wanted, reason });
    if ipv4.trunc() != ipv4 {
        return bad(
            ipv4.into(),
            "it has host bits set; give the subnet's first address",
        );
    }
    if ipv6.trunc() != ipv6 {
        return bad(
            ipv6.into(),
            "it has host bits set; give the subnet's first address",
        );
    }
    if ipv4.prefix_len() > 30 || ipv4.prefix_len() < 8 {
        return bad(ipv4.into(), "its prefix length is not between 8 and 30");
    }
    if 128 - ipv6.prefix_len() < 32 - ipv4.prefix_len() {
        return bad(
            ipv6.into(),
            "it has fewer host bits than the IPv4 subnet; a /64 always does",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(ipv4: &str, ipv6: &str) -> Pool {
        let (ipv4, ipv6) = (
            ipv4.parse().expect("a subnet"),
            ipv6.parse().expect("a subnet"),
        );
        check(ipv4, ipv6).expect("subnets that can serve");
        Pool::new(ipv4, ipv6)
    }

    fn pair(ipv4: &str, ipv6: &str) -> (Ipv4Addr, Ipv6Addr) {
        (
            ipv4.parse().expect("an address"),
            ipv6.parse().expect("an address"),
        )
    }

    #[test]
    fn addresses_go_round_the_subnet_before_one_comes_again() {
        let mut pool = pool("172.31.0.0/29", "fd00::/64");
        assert_eq!(pool.gateways(), pair("172.31.0.1", "fd00::1"));
        let first = pool.allocate().expect("free");
        assert_eq!(first, pair("172.31.0.2", "fd00::2"));
        pool.release(first.0);
        let rest: Vec<_> = (0..5)
            .map(|_| pool.allocate().expect("free").0.octets()[3])
            .collect();
        assert_eq!(rest, [3, 4, 5, 6, 2], "the released one last");
        let error = pool
            .allocate()
            .expect_err("the broadcast address is nobody's");
        assert!(
            matches!(error, BridgeError::Exhausted { in_use: 5, .. }),
            "{error}"
        );
    }

    #[test]
    fn a_reserved_pair_is_given_to_nobody_else() {
        let mut pool = pool("172.31.0.0/29", "fd00::/64");
        pool.reserve("a", pair("172.31.0.2", "fd00::2"))
            .expect("free");
        for (ipv4, ipv6) in [
            ("172.31.0.2", "fd00::2"),
            ("172.31.0.1", "fd00::1"),
            ("172.31.0.0", "fd00::"),
            ("172.31.0.7", "fd00::7"),
            ("172.30.255.255", "fd00::3"),
            ("172.31.0.3", "fd00::4"),
            ("172.31.0.3", "fd01::3"),
        ] {
            assert!(
                pool.reserve("b", pair(ipv4, ipv6)).is_err(),
                "{ipv4} {ipv6}"
            );
        }
        assert_eq!(
            pool.allocate().expect("free"),
            pair("172.31.0.3", "fd00::3")
        );
    }

    #[test]
    fn large_numbers_stay_inside_both_subnets() {
        let mut pool = pool("172.31.0.0/16", "fd12:3456:789a:0:ffff::/112");
        pool.reserve("a", pair("172.31.255.254", "fd12:3456:789a:0:ffff::fffe"))
            .expect("the last one");
        assert_eq!(
            pool.allocate().expect("free").0,
            Ipv4Addr::new(172, 31, 0, 2),
            "round again"
        );
    }

    #[test]
    fn subnets_that_cannot_serve_are_refused() {
        for (ipv4, ipv6) in [
            ("172.31.0.0/31", "fd00::/64"),
            ("172.31.0.1/16", "fd00::/64"),
            ("172.31.0.0/16", "fd00::1/64"),
            ("172.31.0.0/16", "fd00::/113"),
            ("0.0.0.0/0", "fd00::/64"),
        ] {
            let checked = check(
                ipv4.parse().expect("a subnet"),
                ipv6.parse().expect("a subnet"),
            );
            assert!(checked.is_err(), "{ipv4} {ipv6}");
        }
    }
}
