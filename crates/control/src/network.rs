//! Networks and endpoints: what is asked for and what the manager made of it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use vtep::settings::WireSettings;
use vtep::{MacAddr, Vni};

use crate::epoch::Epoch;
use crate::names::Names;
use crate::service::Membership;
use crate::subnet::Subnet;

/// What a user asks of a new network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Its name, unique in the cluster.
    pub name: String,
    /// Its subnets; empty: one from the cluster's address pools. An unspecified address (`0.0.0.0/27`) asks for any free prefix
    /// of that length from the pools.
    pub subnets: Vec<IpNet>,
    /// Where addresses come from that nobody asks for by number: at most one in each subnet.
    #[serde(default)]
    pub ip_ranges: Vec<IpNet>,
    /// Gateways: at most one in each subnet; a subnet without one has its first address.
    #[serde(default)]
    pub gateways: Vec<IpAddr>,
    /// Addresses that no container gets, by name.
    #[serde(default)]
    pub aux_addresses: Vec<(String, IpAddr)>,
    /// Whether a network without an IPv6 subnet gets one from the cluster's address pools.
    #[serde(default)]
    pub ipv6: bool,
    /// How addresses are given.
    #[serde(default)]
    pub addressing: Addressing,
    /// Whether it carries published ports between hosts: one network of a cluster does.
    #[serde(default)]
    pub ingress: bool,
    /// Whether it leads nowhere else: containers on such networks alone have no place on the gateway bridge.
    #[serde(default)]
    pub internal: bool,
    /// Whether containers may join that are members of no service.
    #[serde(default = "attachable")]
    pub attachable: bool,
    /// How long whoever asks for a name of it may keep the answer, in seconds (the TTL of RFC 1035 §3.2.1).
    #[serde(default = "dns_ttl")]
    pub dns_ttl: u32,
    /// Its VNI; `None`: the next free one from 4096.
    pub vni: Option<Vni>,
    /// Its MTU in bytes; `None`: the smallest link MTU of all hosts less the overhead.
    pub mtu: Option<u16>,
    /// Which frames it carries, and what their outer headers say.
    #[serde(flatten)]
    pub settings: WireSettings,
    /// Labels of the user, kept and shown.
    pub labels: BTreeMap<String, String>,
    /// Driver options, kept and shown.
    pub options: BTreeMap<String, String>,
}

impl NetworkSpec {
    /// A network of this name with all else as it comes.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            subnets: Vec::new(),
            ip_ranges: Vec::new(),
            gateways: Vec::new(),
            aux_addresses: Vec::new(),
            ipv6: false,
            addressing: Addressing::default(),
            ingress: false,
            internal: false,
            attachable: attachable(),
            dns_ttl: dns_ttl(),
            vni: None,
            mtu: None,
            settings: WireSettings::default(),
            labels: BTreeMap::new(),
            options: BTreeMap::new(),
        }
    }
}

/// The longest time an answer with a name may be kept, in seconds.
pub(crate) const DNS_TTL_MAX: u32 = 3600;

/// What a network is where nobody has said: also one of a store that knew nothing of it.
fn attachable() -> bool {
    true
}

/// The time an answer with a name may be kept where nobody has said, in seconds.
#[must_use]
pub fn dns_ttl() -> u32 {
    5
}

/// How a network's endpoints get their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addressing {
    /// What an endpoint's MAC address is made of.
    pub mac: MacMode,
    /// How long a freed address rests before it is handed out again unasked, in seconds.
    pub rest_seconds: u32,
}

impl Addressing {
    /// How long a freed address rests.
    #[must_use]
    pub fn rest(&self) -> Duration {
        Duration::from_secs(self.rest_seconds.into())
    }
}

impl Default for Addressing {
    fn default() -> Self {
        Self {
            mac: MacMode::Epoch,
            rest_seconds: 10,
        }
    }
}

/// What the MAC address of an endpoint is made of that asked for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MacMode {
    /// Of the allocation and the IPv4 address: an address that is used again has another MAC address.
    Epoch,
    /// Of the IPv4 address alone, `02:42` and the address, as Docker does.
    Docker,
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
    /// Which frames it carries, and what their outer headers say.
    #[serde(flatten)]
    pub settings: WireSettings,
    /// How addresses are given.
    #[serde(default)]
    pub addressing: Addressing,
    /// Whether it carries published ports between hosts.
    #[serde(default)]
    pub ingress: bool,
    /// Whether it leads nowhere else: containers on such networks alone have no place on the gateway bridge.
    #[serde(default)]
    pub internal: bool,
    /// Whether containers may join that are members of no service.
    #[serde(default = "attachable")]
    pub attachable: bool,
    /// How long whoever asks for a name of it may keep the answer, in seconds.
    #[serde(default = "dns_ttl")]
    pub dns_ttl: u32,
    /// Labels of the user.
    pub labels: BTreeMap<String, String>,
    /// Driver options.
    pub options: BTreeMap<String, String>,
    /// When it was made, in seconds since 1970-01-01 UTC.
    pub created: u64,
    /// The epoch of its making: orders it against a later network with the same VNI.
    pub epoch: Epoch,
}

/// Why a container that is a member of no service has no place on a network that is not attachable, in Docker's words.
#[must_use]
pub fn not_attachable(network: &Network) -> String {
    format!(
        "network {} not manually attachable: only members of services may join it ('towline run --service'), \
         or make it anew without --attachable=false",
        network.name
    )
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
    /// Which service it is a member of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<Membership>,
    /// What its container is called.
    #[serde(
        default,
        with = "crate::names::shared",
        skip_serializing_if = "Option::is_none"
    )]
    pub names: Option<Arc<Names>>,
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
