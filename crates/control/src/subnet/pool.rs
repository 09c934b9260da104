//! Pools that subnets are drawn from when nobody asks for one by number.

use std::fmt;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::{address, check_prefix, number};

/// The narrowest subnet of an IPv4 pool, as in Swarm.
const SIZE_MAX_V4: u8 = 29;
/// The narrowest subnet of an IPv6 pool.
const SIZE_MAX_V6: u8 = 126;
/// Pools of one cluster.
const POOLS_MAX: usize = 64;

/// Where subnets come from that nobody asked for by number: a prefix, and how long the prefixes cut from it are.
///
/// Written as `base=10.20.0.0/16,size=24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddressPool {
    /// What is cut.
    pub base: IpNet,
    /// The length of the pieces' prefixes, in bits.
    pub size: u8,
}

/// Why a pool cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// The text is not `base=PREFIX,size=BITS`.
    #[error("invalid address pool '{0}': it should look like base=10.20.0.0/16,size=24")]
    Syntax(String),
    /// The base is no prefix for containers.
    #[error("address pool {pool}: {cause}")]
    Base {
        /// The pool.
        pool: AddressPool,
        /// What is wrong with its base.
        cause: String,
    },
    /// The pieces are too narrow to be of use.
    #[error("subnet size is out of range: {size}: at most {most}")]
    Size {
        /// The size asked for.
        size: u8,
        /// The largest number allowed.
        most: u8,
    },
    /// The pieces are wider than the pool.
    #[error("invalid CIDR: {base}: Subnet size {size} is too small for pool")]
    TooSmall {
        /// The size asked for.
        size: u8,
        /// The pool's base.
        base: IpNet,
    },
    /// Two pools share addresses.
    #[error("address pools {0} and {1} overlap: give each its own base")]
    Overlap(IpNet, IpNet),
    /// More pools than anybody needs.
    #[error("{0} address pools are too many: at most {POOLS_MAX}")]
    TooMany(usize),
}

impl AddressPool {
    /// What a cluster has that was given none: 10.0.0.0/8 in pieces of /24.
    #[must_use]
    pub fn standard() -> Self {
        Self {
            base: IpNet::V4(Ipv4Net::new_assert([10, 0, 0, 0].into(), 8)),
            size: 24,
        }
    }

    fn check(self) -> Result<(), PoolError> {
        check_prefix(self.base).map_err(|cause| PoolError::Base { pool: self, cause })?;
        let (size, base) = (self.size, self.base);
        check_size(size, matches!(base, IpNet::V4(_)))?;
        if size < base.prefix_len() {
            return Err(PoolError::TooSmall { size, base });
        }
        Ok(())
    }

    /// The first piece of it.
    pub(crate) fn first(self) -> IpNet {
        piece(self.base, number(self.base.network()), self.size)
    }

    /// The first piece of `size` that overlaps nothing of `taken`.
    fn free(self, size: u8, taken: &[IpNet]) -> Option<IpNet> {
        let ends = |net: IpNet| (number(net.network()), number(net.broadcast()));
        let (mut at, last) = ends(self.base);
        let (first, end) = ends(piece(self.base, at, size));
        let width = end - first;
        let in_the_way = taken.iter().filter(|net| overlaps(self.base, **net));
        let mut in_the_way: Vec<(u128, u128)> = in_the_way.map(|net| ends(*net)).collect();
        in_the_way.sort_unstable();
        for (first, end) in in_the_way {
            if first > at + width {
                break;
            }
            if end >= at {
                // The next piece begins at a multiple of its size.
                at = (end | width).saturating_add(1);
            }
            if at > last {
                return None;
            }
        }
        Some(piece(self.base, at, size))
    }
}

impl fmt::Display for AddressPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "base={},size={}", self.base, self.size)
    }
}

impl FromStr for AddressPool {
    type Err = PoolError;

    fn from_str(text: &str) -> Result<Self, PoolError> {
        let syntax = || PoolError::Syntax(text.chars().take(64).collect());
        let (mut base, mut size) = (None, None);
        for part in text.split(',') {
            match part.split_once('=').ok_or_else(syntax)? {
                ("base", value) if base.is_none() => {
                    base = Some(value.parse().map_err(|_| syntax())?);
                }
                ("size", value) if size.is_none() => {
                    size = Some(value.parse().map_err(|_| syntax())?);
                }
                _ => return Err(syntax()),
            }
        }
        let pool = Self {
            base: base.ok_or_else(syntax)?,
            size: size.ok_or_else(syntax)?,
        };
        pool.check()?;
        Ok(pool)
    }
}

/// Whether these pools can be a cluster's.
pub fn check_pools(pools: &[AddressPool]) -> Result<(), PoolError> {
    if pools.len() > POOLS_MAX {
        return Err(PoolError::TooMany(pools.len()));
    }
    for (i, pool) in pools.iter().enumerate() {
        pool.check()?;
        if let Some(other) = pools[..i]
            .iter()
            .find(|other| overlaps(pool.base, other.base))
        {
            return Err(PoolError::Overlap(other.base, pool.base));
        }
    }
    Ok(())
}

/// Whether a piece of a pool may be so long a prefix.
fn check_size(size: u8, v4: bool) -> Result<(), PoolError> {
    let most = if v4 { SIZE_MAX_V4 } else { SIZE_MAX_V6 };
    if size > most {
        return Err(PoolError::Size { size, most });
    }
    Ok(())
}

/// The first free subnet of a family, from the first pool that has one; of `size` where one was asked for.
pub(crate) fn draw(
    pools: &[AddressPool],
    v4: bool,
    size: Option<u8>,
    taken: &[IpNet],
) -> Result<IpNet, String> {
    if let Some(size) = size {
        check_size(size, v4).map_err(|error| error.to_string())?;
    }
    let family = if v4 { "IPv4" } else { "IPv6" };
    let of_family = || {
        pools
            .iter()
            .filter(|pool| matches!(pool.base, IpNet::V4(_)) == v4)
    };
    if of_family().next().is_none() {
        return Err(format!(
            "this cluster has no {family} address pool: give an {family} --subnet"
        ));
    }
    let wide_enough =
        of_family().filter(|pool| size.is_none_or(|size| size >= pool.base.prefix_len()));
    let mut drawn = wide_enough.filter_map(|pool| pool.free(size.unwrap_or(pool.size), taken));
    drawn.next().ok_or_else(|| {
        let pools: Vec<String> = of_family()
            .map(|pool| format!("{} as /{}", pool.base, size.unwrap_or(pool.size)))
            .collect();
        format!(
            "all predefined address pools have been fully subnetted ({}): give a --subnet",
            pools.join(", ")
        )
    })
}

pub(crate) fn overlaps(a: IpNet, b: IpNet) -> bool {
    a.contains(&b) || b.contains(&a)
}

fn piece(base: IpNet, at: u128, size: u8) -> IpNet {
    let net = match address(base, at) {
        std::net::IpAddr::V4(ip) => Ipv4Net::new(ip, size).map(IpNet::V4),
        std::net::IpAddr::V6(ip) => Ipv6Net::new(ip, size).map(IpNet::V6),
    };
    // A size past the family's bits was refused before; the base stands in, and is in its own way.
    net.unwrap_or(base).trunc()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::subnet::tests::nets;

    fn pools(text: &str) -> Vec<AddressPool> {
        text.split_whitespace()
            .map(|pool| pool.parse().unwrap())
            .collect()
    }

    #[test]
    fn pools_as_docker_writes_them() {
        let pool: AddressPool = "base=10.20.0.0/16,size=24".parse().unwrap();
        assert_eq!(
            (pool.base, pool.size),
            ("10.20.0.0/16".parse().unwrap(), 24)
        );
        assert_eq!("size=24,base=10.20.0.0/16".parse(), Ok(pool));
        assert_eq!(pool.to_string().parse(), Ok(pool));
        for (text, word) in [
            ("10.20.0.0/16", "should look like"),
            ("base=10.20.0.0/16", "should look like"),
            ("base=10.20.0.0/16,size=24,size=25", "should look like"),
            ("base=10.20.0.0/16,size=24,mtu=3", "should look like"),
            ("base=10.20.0.0/16,size=300", "should look like"),
            (
                "base=10.20.0.0/16,size=30",
                "subnet size is out of range: 30",
            ),
            (
                "base=fd00::/48,size=127",
                "subnet size is out of range: 127",
            ),
            ("base=10.20.0.0/16,size=12", "too small for pool"),
            ("base=10.20.0.1/16,size=24", "it should be 10.20.0.0/16"),
            ("base=127.0.0.0/8,size=24", "not for containers"),
        ] {
            let error = text.parse::<AddressPool>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        let overlapping = pools("base=10.20.0.0/16,size=24 base=10.20.8.0/24,size=26");
        assert!(matches!(
            check_pools(&overlapping),
            Err(PoolError::Overlap(..))
        ));
        assert!(check_pools(&[AddressPool::standard()]).is_ok());
    }

    #[test]
    fn the_first_free_piece_of_the_first_pool_with_one() {
        let pools =
            pools("base=10.20.0.0/23,size=24 base=10.30.0.0/16,size=20 base=fd00:1::/48,size=64");
        let four = |taken: &str| draw(&pools, true, None, &nets(taken)).map(|net| net.to_string());
        assert_eq!(four(""), Ok("10.20.0.0/24".into()));
        assert_eq!(four("10.20.0.0/24"), Ok("10.20.1.0/24".into()));
        assert_eq!(
            four("10.20.0.128/32 10.20.1.7/32"),
            Ok("10.30.0.0/20".into())
        );
        assert_eq!(
            four("10.20.0.0/16 10.30.0.0/17 10.30.128.1/32"),
            Ok("10.30.144.0/20".into())
        );
        assert!(
            four("10.0.0.0/8")
                .unwrap_err()
                .contains("10.20.0.0/23 as /24, 10.30.0.0/16 as /20")
        );
        let six = draw(&pools, false, None, &nets("fd00:1::/64 10.0.0.0/8")).unwrap();
        assert_eq!(six.to_string(), "fd00:1:0:1::/64");
        let asked = draw(&pools, true, Some(27), &nets("10.20.0.0/27")).unwrap();
        assert_eq!(asked.to_string(), "10.20.0.32/27");
        let wide = draw(&pools, true, Some(18), &[]).unwrap();
        assert_eq!(wide.to_string(), "10.30.0.0/18");
        let narrow = draw(&pools, true, Some(31), &[]).unwrap_err();
        assert!(narrow.contains("out of range: 31"), "{narrow}");
        let none = draw(&[AddressPool::standard()], false, None, &[]).unwrap_err();
        assert!(none.contains("no IPv6 address pool"), "{none}");
    }

    proptest! {
        /// As trying every piece, one by one.
        #[test]
        fn draws_what_a_search_of_all_pieces_finds(taken in prop::collection::vec((0..64u8, 0..=255u8, 22..=32u8), 0..40), size in 24..=28u8) {
            let pool: AddressPool = format!("base=10.20.0.0/18,size={size}").parse().unwrap();
            let taken: Vec<IpNet> = taken
                .into_iter()
                .map(|(c, d, length)| IpNet::V4(Ipv4Net::new_assert([10, 20, c, d].into(), length).trunc()))
                .collect();
            let IpNet::V4(base) = pool.base else { unreachable!("an IPv4 pool") };
            let searched = base
                .subnets(size)
                .unwrap()
                .map(IpNet::V4)
                .find(|net| !taken.iter().any(|other| overlaps(*net, *other)));
            prop_assert_eq!(draw(&[pool], true, None, &taken).ok(), searched);
        }
    }
}
