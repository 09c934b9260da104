//! Subnets: how what a user asks for becomes subnets, what may be handed out of one, and the pools that they are drawn from.
//!
//! Refusals are in the words of `docker network create` where it has any. Nothing here knows which address is in use: that is
//! `allocator.rs`.

mod pool;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::network::quote;
pub use pool::{AddressPool, PoolError, check_pools};
pub(crate) use pool::{draw, overlaps};

/// Subnets of one network.
const SUBNETS_MAX: usize = 64;
/// Auxiliary addresses of one network.
const AUX_MAX: usize = 1024;
/// Bytes of an auxiliary address's name.
const AUX_NAME_MAX: usize = 63;

/// One subnet of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// The prefix, host bits zero.
    pub net: IpNet,
    /// The address that the engine itself answers for; the first one unless another was asked for.
    pub gateway: IpAddr,
    /// Where addresses come from that nobody asked for by number; `None`: from all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip_range: Option<IpNet>,
    /// Addresses kept for something else on the network, by name: no container gets one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub aux_addresses: BTreeMap<String, IpAddr>,
}

impl Subnet {
    /// All of a prefix, the first address being the gateway's.
    #[must_use]
    pub fn new(net: IpNet) -> Self {
        Self {
            net,
            gateway: address(net, ends(net).0),
            ip_range: None,
            aux_addresses: BTreeMap::new(),
        }
    }

    /// Why no container may hold this address of the subnet; `None`: one may.
    #[must_use]
    pub fn reserved(&self, ip: IpAddr) -> Option<String> {
        let (first, last) = ends(self.net);
        if !self.net.contains(&ip) || !(first..=last).contains(&number(ip)) {
            return Some(format!("is the first or the last of {}", self.net));
        }
        if ip == self.gateway {
            return Some(format!("is the gateway of {}", self.net));
        }
        let aux = self.aux_addresses.iter().find(|(_, kept)| **kept == ip);
        aux.map(|(name, _)| format!("is kept as auxiliary address {name}"))
    }

    /// Whether a container may hold this address.
    #[must_use]
    pub fn is_assignable(&self, ip: IpAddr) -> bool {
        self.reserved(ip).is_none()
    }

    /// The first and last number that may be handed out unasked, gateway and auxiliary addresses between them included; the
    /// first above the last when there is none.
    pub(crate) fn bounds(&self) -> (u128, u128) {
        let (first, last) = ends(self.net);
        match self.ip_range {
            Some(range) => (
                first.max(number(range.network())),
                last.min(number(range.broadcast())),
            ),
            None => (first, last),
        }
    }

    /// Whether an address lies where addresses are handed out unasked.
    pub(crate) fn in_bounds(&self, ip: IpAddr) -> bool {
        let (first, last) = self.bounds();
        self.net.contains(&ip) && (first..=last).contains(&number(ip))
    }

    /// Addresses between the bounds that are handed out to nobody.
    pub(crate) fn kept(&self) -> usize {
        let kept = std::iter::once(&self.gateway).chain(self.aux_addresses.values());
        kept.filter(|ip| self.in_bounds(**ip)).count()
    }

    /// How many addresses can be handed out unasked.
    pub(crate) fn capacity(&self) -> u128 {
        let (first, last) = self.bounds();
        (last.saturating_add(1))
            .saturating_sub(first)
            .saturating_sub(self.kept() as u128)
    }

    /// The address of a number in this subnet's family.
    pub(crate) fn address(&self, number: u128) -> IpAddr {
        address(self.net, number)
    }

    /// Whether this is a subnet that [`plan`] could have made.
    pub(crate) fn is_valid(&self) -> bool {
        let range: Vec<IpNet> = self.ip_range.into_iter().collect();
        let aux: Vec<(String, IpAddr)> = self.aux_addresses.clone().into_iter().collect();
        plan(&[self.net], &range, &[self.gateway], &aux)
            .is_ok_and(|planned| planned == [self.clone()])
    }
}

/// What is asked for, as subnets: each range, gateway and auxiliary address goes to the subnet that it lies in.
pub(crate) fn plan(
    nets: &[IpNet],
    ip_ranges: &[IpNet],
    gateways: &[IpAddr],
    aux_addresses: &[(String, IpAddr)],
) -> Result<Vec<Subnet>, String> {
    check_count(nets.len())?;
    for (i, net) in nets.iter().enumerate() {
        check_prefix(*net)?;
        if nets[..i].iter().any(|other| overlaps(*net, *other)) {
            return Err(format!(
                "multiple overlapping subnet configuration is not supported ({net})"
            ));
        }
    }
    let mut subnets: Vec<Subnet> = nets.iter().map(|net| Subnet::new(*net)).collect();
    place_ranges(&mut subnets, ip_ranges)?;
    place_gateways(&mut subnets, gateways)?;
    place_aux(&mut subnets, aux_addresses)?;
    if let Some(full) = subnets.iter().find(|subnet| subnet.capacity() == 0) {
        let (what, net) = match full.ip_range {
            Some(range) => ("ip-range", range),
            None => ("subnet", full.net),
        };
        return Err(format!(
            "invalid {what} {net}: it has no room for a container"
        ));
    }
    Ok(subnets)
}

/// Whether a network may have so many subnets.
pub(crate) fn check_count(subnets: usize) -> Result<(), String> {
    if subnets > SUBNETS_MAX {
        return Err(format!(
            "{subnets} subnets are too many: at most {SUBNETS_MAX}"
        ));
    }
    Ok(())
}

fn place_ranges(subnets: &mut [Subnet], ranges: &[IpNet]) -> Result<(), String> {
    for range in ranges {
        if *range != range.trunc() {
            return Err(format!(
                "invalid ip-range {range}: it should be {}",
                range.trunc()
            ));
        }
        if let Some(narrower) = subnets
            .iter()
            .find(|subnet| range.contains(&subnet.net) && *range != subnet.net)
        {
            return Err(format!(
                "invalid ip-range {range}: parent subnet {} doesn't contain ip-range",
                narrower.net
            ));
        }
        let Some(subnet) = subnets.iter_mut().find(|subnet| subnet.net.contains(range)) else {
            return Err(format!("no matching subnet for range {range}"));
        };
        if let Some(first) = subnet.ip_range.replace(*range) {
            return Err(format!(
                "cannot configure multiple ranges ({range}, {first}) on the same subnet ({})",
                subnet.net
            ));
        }
    }
    Ok(())
}

fn place_gateways(subnets: &mut [Subnet], gateways: &[IpAddr]) -> Result<(), String> {
    for (i, gateway) in gateways.iter().enumerate() {
        let Some(subnet) = holding(subnets, *gateway) else {
            return Err(format!("no matching subnet for gateway {gateway}"));
        };
        if let Some(first) = gateways[..i].iter().find(|ip| subnet.net.contains(*ip)) {
            return Err(format!(
                "cannot configure multiple gateways ({gateway}, {first}) for the same subnet ({})",
                subnet.net
            ));
        }
        let (first, last) = ends(subnet.net);
        if !(first..=last).contains(&number(*gateway)) {
            return Err(format!(
                "invalid gateway {gateway}: it is the first or the last of {}",
                subnet.net
            ));
        }
        subnet.gateway = *gateway;
    }
    Ok(())
}

fn place_aux(subnets: &mut [Subnet], aux: &[(String, IpAddr)]) -> Result<(), String> {
    if aux.len() > AUX_MAX {
        return Err(format!(
            "{} auxiliary addresses are too many: at most {AUX_MAX}",
            aux.len()
        ));
    }
    for (i, (name, ip)) in aux.iter().enumerate() {
        if name.is_empty() || name.len() > AUX_NAME_MAX || name.chars().any(char::is_control) {
            return Err(format!(
                "invalid aux-address name {}: it has 1 to {AUX_NAME_MAX} bytes and no control characters",
                quote(name)
            ));
        }
        if aux[..i].iter().any(|(other, _)| other == name) {
            return Err(format!("aux-address {} was given twice", quote(name)));
        }
        let Some(subnet) = holding(subnets, *ip) else {
            return Err(format!("no matching subnet for aux-address {ip}"));
        };
        if let Some(reserved) = subnet.reserved(*ip) {
            return Err(format!(
                "failed to allocate secondary ip address ({name}:{ip}): Address already in use: it {reserved}"
            ));
        }
        subnet.aux_addresses.insert(name.clone(), *ip);
    }
    Ok(())
}

fn holding(subnets: &mut [Subnet], ip: IpAddr) -> Option<&mut Subnet> {
    subnets.iter_mut().find(|subnet| subnet.net.contains(&ip))
}

/// Whether a prefix may be a subnet at all.
fn check_prefix(net: IpNet) -> Result<(), String> {
    if net != net.trunc() {
        return Err(format!(
            "invalid subnet {net}: it should be {}",
            net.trunc()
        ));
    }
    let (widest, narrowest, unusable): (u8, u8, &[&str]) = match net {
        IpNet::V4(_) => (
            8,
            30,
            &["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"],
        ),
        IpNet::V6(_) => (32, 126, &["::/8", "fe80::/10", "ff00::/8"]),
    };
    if net.prefix_len() > narrowest {
        return Err(format!(
            "invalid subnet {net}: it has no room for a gateway and a container"
        ));
    }
    if net.prefix_len() < widest {
        return Err(format!(
            "invalid subnet {net}: it must be /{widest} or narrower"
        ));
    }
    let reserved = unusable
        .iter()
        .filter_map(|text| text.parse::<IpNet>().ok())
        .find(|range| overlaps(*range, net));
    match reserved {
        Some(range) => Err(format!(
            "invalid subnet {net}: {range} is not for containers"
        )),
        None => Ok(()),
    }
}

/// The numbers of the first and last address that anybody may hold.
fn ends(net: IpNet) -> (u128, u128) {
    // An IPv6 subnet has no broadcast address; its last one is left out all the same, to treat both families alike.
    (
        number(net.network()).saturating_add(1),
        number(net.broadcast()).saturating_sub(1),
    )
}

pub(crate) fn number(ip: IpAddr) -> u128 {
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
    use super::*;

    pub(super) fn nets(text: &str) -> Vec<IpNet> {
        text.split_whitespace()
            .map(|net| net.parse().unwrap())
            .collect()
    }

    fn aux(text: &str) -> Vec<(String, IpAddr)> {
        let pairs = text
            .split_whitespace()
            .map(|pair| pair.split_once('=').unwrap());
        pairs
            .map(|(name, ip)| (name.to_owned(), ip.parse().unwrap()))
            .collect()
    }

    /// Subnets, ranges, gateways, auxiliary addresses.
    fn asked(what: [&str; 4]) -> Result<Vec<Subnet>, String> {
        let gateways: Vec<IpAddr> = what[2]
            .split_whitespace()
            .map(|ip| ip.parse().unwrap())
            .collect();
        plan(&nets(what[0]), &nets(what[1]), &gateways, &aux(what[3]))
    }

    #[test]
    fn each_part_goes_to_its_subnet() {
        let subnets = asked([
            "10.0.9.0/24 fd00:9::/64",
            "fd00:9::100/120 10.0.9.128/25",
            "10.0.9.254",
            "router=10.0.9.1 dns=fd00:9::53 printer=10.0.9.130",
        ])
        .unwrap();
        let [four, six] = &subnets[..] else {
            panic!("{subnets:?}")
        };
        assert_eq!(four.gateway, IpAddr::from([10, 0, 9, 254]));
        assert_eq!(four.ip_range, Some("10.0.9.128/25".parse().unwrap()));
        assert_eq!(four.aux_addresses.len(), 2);
        // 128 … 254 are 127; 254 is the gateway's, 130 the printer's.
        assert_eq!((four.kept(), four.capacity()), (2, 125));
        assert_eq!(six.gateway.to_string(), "fd00:9::1");
        assert_eq!((six.kept(), six.capacity()), (0, 256));
        assert!(subnets.iter().all(Subnet::is_valid));
    }

    #[test]
    fn what_nobody_may_hold_is_named() {
        let subnets = asked(["10.0.9.0/24", "", "10.0.9.7", "router=10.0.9.9"]).unwrap();
        let why = |last: u8| subnets[0].reserved([10, 0, 9, last].into());
        for (last, word) in [
            (0, "first or the last"),
            (255, "first or the last"),
            (7, "gateway"),
            (9, "router"),
        ] {
            let why = why(last).unwrap();
            assert!(why.contains(word), "{why}");
        }
        assert!(why(1).is_none() && why(254).is_none());
        assert!(!subnets[0].is_assignable([10, 0, 10, 1].into()));
    }

    #[test]
    fn refusals_in_dockers_words() {
        for (what, words) in [
            (
                ["10.0.9.1/24", "", "", ""],
                "invalid subnet 10.0.9.1/24: it should be 10.0.9.0/24",
            ),
            (
                ["10.0.0.0/16 10.0.9.0/24", "", "", ""],
                "multiple overlapping subnet configuration is not supported",
            ),
            (["10.0.9.0/31", "", "", ""], "no room"),
            (["10.0.0.0/7", "", "", ""], "/8 or narrower"),
            (["127.0.0.0/24", "", "", ""], "not for containers"),
            (["fe80::/64", "", "", ""], "not for containers"),
            (
                ["10.0.9.0/24", "10.0.9.5/28", "", ""],
                "invalid ip-range 10.0.9.5/28: it should be 10.0.9.0/28",
            ),
            (
                ["10.0.9.0/24", "10.0.10.0/28", "", ""],
                "no matching subnet for range 10.0.10.0/28",
            ),
            (
                ["10.0.9.0/24", "10.0.8.0/23", "", ""],
                "invalid ip-range 10.0.8.0/23: parent subnet 10.0.9.0/24 doesn't contain ip-range",
            ),
            (
                ["10.0.9.0/24", "10.0.9.0/28 10.0.9.16/28", "", ""],
                "cannot configure multiple ranges (10.0.9.16/28, 10.0.9.0/28) on the same subnet (10.0.9.0/24)",
            ),
            (
                ["10.0.9.0/24", "10.0.9.1/32", "", ""],
                "invalid ip-range 10.0.9.1/32: it has no room",
            ),
            (
                ["10.0.9.0/24", "10.0.9.255/32", "", ""],
                "invalid ip-range 10.0.9.255/32: it has no room",
            ),
            (
                ["10.0.9.0/24", "", "10.0.10.1", ""],
                "no matching subnet for gateway 10.0.10.1",
            ),
            (
                ["10.0.9.0/24", "", "10.0.9.1 10.0.9.2", ""],
                "cannot configure multiple gateways (10.0.9.2, 10.0.9.1) for the same subnet (10.0.9.0/24)",
            ),
            (
                ["10.0.9.0/24", "", "10.0.9.0", ""],
                "invalid gateway 10.0.9.0",
            ),
            (
                ["10.0.9.0/24", "", "10.0.9.255", ""],
                "invalid gateway 10.0.9.255",
            ),
            (
                ["10.0.9.0/24", "", "", "a=10.0.10.1"],
                "no matching subnet for aux-address 10.0.10.1",
            ),
            (
                ["10.0.9.0/24", "", "", "a=10.0.9.5 b=10.0.9.5"],
                "(b:10.0.9.5): Address already in use: it is kept as auxiliary address a",
            ),
            (
                ["10.0.9.0/24", "", "", "a=10.0.9.5 a=10.0.9.6"],
                "aux-address \"a\" was given twice",
            ),
            (
                ["10.0.9.0/24", "", "10.0.9.5", "a=10.0.9.5"],
                "Address already in use: it is the gateway",
            ),
            (
                ["10.0.9.0/24", "", "", "a=10.0.9.255"],
                "Address already in use",
            ),
            (["10.0.9.0/24", "", "", "=10.0.9.5"], "aux-address name"),
            (
                ["10.0.9.0/30", "", "", "a=10.0.9.2"],
                "invalid subnet 10.0.9.0/30: it has no room",
            ),
        ] {
            let refused = asked(what).expect_err(words);
            assert!(refused.contains(words), "{what:?}: {refused}");
            assert!(!refused.contains('\n') && refused.len() < 300, "{refused}");
        }
        let many: Vec<IpNet> = (0..65)
            .map(|n| format!("10.1.{n}.0/24").parse().unwrap())
            .collect();
        assert!(plan(&many, &[], &[], &[]).unwrap_err().contains("too many"));
    }

    #[test]
    fn edges_of_prefixes() {
        let four = Subnet::new("10.0.9.0/30".parse().unwrap());
        assert_eq!((four.capacity(), four.bounds().1 - four.bounds().0), (1, 1));
        assert!(four.is_assignable([10, 0, 9, 2].into()));
        for last in [0, 1, 3, 4] {
            assert!(!four.is_assignable([10, 0, 9, last].into()), "{last}");
        }
        let six = Subnet::new("fd00::/64".parse().unwrap());
        assert_eq!(six.gateway.to_string(), "fd00::1");
        assert_eq!(six.capacity(), (1 << 64) - 3);
    }

    #[test]
    fn a_subnet_that_no_plan_makes_is_not_valid() {
        let good = Subnet::new("10.0.9.0/24".parse().unwrap());
        assert!(good.is_valid());
        for spoil in [
            (|s| s.gateway = [10, 0, 8, 1].into()) as fn(&mut Subnet),
            |s| s.ip_range = Some("10.0.8.0/24".parse().unwrap()),
            |s| s.net = "10.0.9.1/24".parse().unwrap(),
            |s| s.aux_addresses = [("a".to_owned(), s.gateway)].into(),
        ] {
            let mut bad = good.clone();
            spoil(&mut bad);
            assert!(!bad.is_valid(), "{bad:?}");
        }
    }
}
