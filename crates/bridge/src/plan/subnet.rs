//! Which subnets the bridge gets.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::Existing;
use crate::BridgeError;

/// The subnet for IPv4: the bridge's, else the one asked for, else the first free one.
pub(crate) fn ipv4_subnet(
    existing: &Existing,
    asked: Option<Ipv4Net>,
) -> Result<Ipv4Net, BridgeError> {
    let standing = existing.addresses.iter().find_map(|net| match net {
        IpNet::V4(net) => Some(*net),
        IpNet::V6(_) => None,
    });
    let given = given(
        existing,
        standing.map(|net| (net.into(), net.trunc())),
        asked,
    )?;
    given.map_or_else(|| first_free(existing), Ok)
}

/// The subnet for IPv6: the bridge's, else the one asked for, else the ULA /64 of 40 random bits (RFC 4193 §3.2).
pub(crate) fn ipv6_subnet(
    existing: &Existing,
    asked: Option<Ipv6Net>,
    random: [u8; 5],
) -> Result<Ipv6Net, BridgeError> {
    let standing = existing.addresses.iter().find_map(|net| match net {
        IpNet::V6(net) if !net.addr().is_unicast_link_local() => Some(*net),
        _ => None,
    });
    if let Some(given) = given(
        existing,
        standing.map(|net| (net.into(), net.trunc())),
        asked,
    )? {
        return Ok(given);
    }
    let [a, b, c, d, e] = random;
    let words = [
        u16::from_be_bytes([0xfd, a]),
        u16::from_be_bytes([b, c]),
        u16::from_be_bytes([d, e]),
    ];
    let address = Ipv6Addr::new(words[0], words[1], words[2], 0, 0, 0, 0, 0);
    let net = Ipv6Net::new_assert(address, 64);
    free(existing, net.into()).map(|()| net)
}

/// The subnet that stands (the bridge's address, and its subnet), else the one asked for; none where neither is.
fn given<N: Copy + PartialEq + Into<IpNet>>(
    existing: &Existing,
    standing: Option<(IpNet, N)>,
    asked: Option<N>,
) -> Result<Option<N>, BridgeError> {
    match (standing, asked) {
        (Some((address, subnet)), Some(asked)) if subnet != asked => {
            Err(BridgeError::OtherSubnet {
                standing: address,
                wanted: asked.into(),
            })
        }
        (Some((_, subnet)), _) => Ok(Some(subnet)),
        (None, Some(asked)) => free(existing, asked.into()).map(|()| Some(asked)),
        (None, None) => Ok(None),
    }
}

/// From the top of 172.16.0.0/12, so that it seldom meets what Docker takes from the bottom.
fn first_free(existing: &Existing) -> Result<Ipv4Net, BridgeError> {
    (16..=31)
        .rev()
        .filter_map(|second| Ipv4Net::new(Ipv4Addr::new(172, second, 0, 0), 16).ok())
        .find(|net| free(existing, (*net).into()).is_ok())
        .ok_or(BridgeError::NoFreeSubnet)
}

fn free(existing: &Existing, wanted: IpNet) -> Result<(), BridgeError> {
    let overlaps = |route: &&IpNet| route.contains(&wanted) || wanted.contains(*route);
    match existing.routes.iter().find(overlaps) {
        Some(route) => Err(BridgeError::Overlap {
            wanted,
            route: *route,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Before;
    use super::super::tests::{host, nets, wanted};
    use super::*;

    #[test]
    fn the_default_subnet_is_the_first_free_one_from_the_top() {
        let with = |routes: &[&str]| Existing {
            routes: nets(routes),
            ..Existing::default()
        };
        let chosen = |routes: &[&str]| ipv4_subnet(&with(routes), None).map(|net| net.to_string());
        assert_eq!(chosen(&[]).expect("free"), "172.31.0.0/16");
        assert_eq!(
            chosen(&["172.31.7.0/24", "172.30.0.1/32"]).expect("free"),
            "172.29.0.0/16"
        );
        assert_eq!(chosen(&["172.24.0.0/13"]).expect("free"), "172.23.0.0/16");
        assert!(matches!(
            chosen(&["172.0.0.0/8"]),
            Err(BridgeError::NoFreeSubnet)
        ));
    }

    #[test]
    fn a_subnet_asked_for_must_be_free_and_the_one_that_stands() {
        let asked: Ipv4Net = "10.99.0.0/16".parse().expect("a subnet");
        let busy = Existing {
            routes: nets(&["10.99.4.0/24"]),
            ..Existing::default()
        };
        assert!(matches!(
            ipv4_subnet(&busy, Some(asked)),
            Err(BridgeError::Overlap { .. })
        ));
        let existing = host(&Before::default());
        assert!(matches!(
            ipv4_subnet(&existing, Some(asked)),
            Err(BridgeError::OtherSubnet { .. })
        ));
        assert_eq!(
            ipv4_subnet(&existing, None).expect("it stands"),
            wanted().ipv4
        );
        assert_eq!(
            ipv6_subnet(&existing, None, [9; 5]).expect("it stands"),
            wanted().ipv6,
            "not the link-local one"
        );
    }

    #[test]
    fn the_ipv6_default_is_a_unique_local_subnet() {
        let net =
            ipv6_subnet(&Existing::default(), None, [0x12, 0x34, 0x56, 0x78, 0x9a]).expect("free");
        assert_eq!(net.to_string(), "fd12:3456:789a::/64");
    }
}
