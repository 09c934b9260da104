//! Networks and endpoints: what is asked for and what the manager made of it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use vtep::{MacAddr, Vni};

use crate::epoch::Epoch;

/// What a user asks of a new network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Its name, unique in the cluster.
    pub name: String,
    /// Its subnets; empty: the next free /24 of 10.0.0.0/8 (10.0.0.0/24 is kept for `ingress`).
    pub subnets: Vec<IpNet>,
    /// Its VNI; `None`: the next free one from 4096.
    pub vni: Option<Vni>,
    /// Its MTU in bytes; `None`: the smallest link MTU of all hosts less the overhead.
    pub mtu: Option<u16>,
    /// Whether broadcast, multicast and unknown unicast frames are carried to every member.
    pub flood: bool,
    /// Labels of the user, kept and shown.
    pub labels: BTreeMap<String, String>,
    /// Driver options, kept and shown.
    pub options: BTreeMap<String, String>,
}

/// One subnet of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// The prefix, host bits zero.
    pub net: IpNet,
    /// Its first address, which the engine itself answers for.
    pub gateway: IpAddr,
}

/// One overlay network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// 25 characters of base 36, never used again.
    pub id: String,
    /// Its name, unique in the cluster.
    pub name: String,
    /// Its VXLAN network identifier, unique in the cluster.
    pub vni: Vni,
    /// Its subnets, at least one.
    pub subnets: Vec<Subnet>,
    /// The MAC address that stands behind every subnet's gateway.
    pub gateway_mac: MacAddr,
    /// The MTU of every port, in bytes.
    pub mtu: u16,
    /// Whether broadcast, multicast and unknown unicast frames are carried to every member.
    pub flood: bool,
    /// Labels of the user.
    pub labels: BTreeMap<String, String>,
    /// Driver options.
    pub options: BTreeMap<String, String>,
    /// When it was made, in seconds since 1970-01-01 UTC.
    pub created: u64,
    /// The epoch of its making: orders it against a later network with the same VNI.
    pub epoch: Epoch,
}

/// One container's place in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The network.
    pub vni: Vni,
    /// The container's name.
    pub container: String,
    /// Its MAC address.
    pub mac: MacAddr,
    /// Its addresses: at most one IPv4, at most one IPv6, at least one.
    pub ips: Vec<IpAddr>,
    /// Which allocation this is; all its addresses share it.
    pub epoch: Epoch,
}

/// The longest name of a network, container or host.
const NAME_MAX: usize = 63;

/// Whether a name is `[a-z0-9][a-z0-9_.-]{0,62}`: safe as a file name, a namespace's name and a DNS label's relative.
#[must_use]
pub fn is_valid_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    (1..=NAME_MAX).contains(&bytes.len())
        && (bytes[0].is_ascii_lowercase() || bytes[0].is_ascii_digit())
        && bytes
            .iter()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_.-".contains(b))
}

/// A name as an error may repeat it: quoted, control characters escaped, cut at 64 characters.
#[must_use]
pub fn quote(name: &str) -> String {
    let mut quoted: String = name.chars().take(64).flat_map(char::escape_debug).collect();
    if name.chars().nth(64).is_some() {
        quoted.push('…');
    }
    format!("\"{quoted}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for name in ["a", "0", "my_overlay", "lab-h1c1", "a.b", &"x".repeat(63)] {
            assert!(is_valid_name(name), "{name}");
        }
        for name in [
            "",
            "-a",
            ".",
            "..",
            "a/b",
            "a b",
            "A",
            "é",
            "a\n",
            &"x".repeat(64),
        ] {
            assert!(!is_valid_name(name), "{name}");
        }
        assert_eq!(quote("a\nb"), "\"a\\nb\"");
        assert_eq!(quote(&"x".repeat(300)).chars().count(), 64 + 3);
    }
}
