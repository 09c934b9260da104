//! Networks: how one is made, and what is said of it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use control::Addressing;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use vtep::settings::WireSettings;

/// A network to create.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NetworkCreate {
    /// Its name.
    pub(crate) name: String,
    /// Its subnets; none: the next free one of the cluster's address pools.
    pub(crate) subnets: Vec<IpNet>,
    /// Where addresses come from that nobody asks for by number.
    pub(crate) ip_ranges: Vec<IpNet>,
    /// Gateways.
    pub(crate) gateways: Vec<IpAddr>,
    /// Addresses that no container gets, by name.
    pub(crate) aux_addresses: Vec<(String, IpAddr)>,
    /// Whether an IPv6 subnet comes from the pools where none is given.
    pub(crate) ipv6: bool,
    /// How addresses are given.
    pub(crate) addressing: Addressing,
    /// Whether it carries published ports.
    #[serde(default)]
    pub(crate) ingress: bool,
    /// Whether it leads nowhere else.
    pub(crate) internal: bool,
    /// Whether containers may join that are members of no service.
    pub(crate) attachable: bool,
    /// How long an answer with a name of it may be kept, in seconds.
    pub(crate) dns_ttl: u32,
    /// Its VNI; none: the next free one from 4096.
    pub(crate) vni: Option<u32>,
    /// Its MTU in bytes; none: as large as the hosts' links allow.
    pub(crate) mtu: Option<u16>,
    /// Which frames it carries, and what their outer headers say.
    pub(crate) settings: WireSettings,
    /// Labels.
    pub(crate) labels: BTreeMap<String, String>,
}

/// A network as `network ls` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NetworkSummary {
    /// Its id.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
    /// `overlay`.
    pub(crate) driver: String,
    /// `cluster`: the same on every host.
    pub(crate) scope: String,
    /// Its VNI.
    pub(crate) vni: u32,
    /// Its MTU in bytes.
    pub(crate) mtu: u16,
    /// Its subnets.
    pub(crate) subnets: Vec<IpNet>,
    /// Whether it has an IPv4 subnet.
    pub(crate) ipv4: bool,
    /// Whether it has an IPv6 subnet.
    pub(crate) ipv6: bool,
    /// Whether it leads nowhere else.
    pub(crate) internal: bool,
    /// Whether containers may join that are members of no service.
    pub(crate) attachable: bool,
    /// Whether it carries published ports.
    pub(crate) ingress: bool,
    /// Labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// Seconds since 1970.
    pub(crate) created: u64,
}

/// A network as `network inspect` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Network {
    /// Its id.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
    /// `overlay`.
    pub(crate) driver: String,
    /// `cluster`.
    pub(crate) scope: String,
    /// Its VNI.
    pub(crate) vni: u32,
    /// Its MTU in bytes.
    pub(crate) mtu: u16,
    /// Its subnets.
    pub(crate) subnets: Vec<Subnet>,
    /// How MAC addresses are made, and how long a freed address rests.
    pub(crate) addressing: Addressing,
    /// Which frames it carries, and what their outer headers say.
    #[serde(flatten)]
    pub(crate) settings: WireSettings,
    /// Whether it has an IPv4 subnet.
    pub(crate) ipv4: bool,
    /// Whether it has an IPv6 subnet.
    pub(crate) ipv6: bool,
    /// Whether it leads nowhere else.
    pub(crate) internal: bool,
    /// Whether containers may join that are members of no service.
    pub(crate) attachable: bool,
    /// Whether it carries published ports.
    pub(crate) ingress: bool,
    /// How long an answer with a name of it may be kept, in seconds.
    pub(crate) dns_ttl: u32,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// Labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// Containers on it, on all hosts.
    pub(crate) endpoints: Vec<Endpoint>,
    /// Hosts that have containers on it.
    pub(crate) peers: Vec<Peer>,
}

/// One subnet of a network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Subnet {
    /// The prefix.
    pub(crate) subnet: IpNet,
    /// The address that answers for the network itself.
    pub(crate) gateway: IpAddr,
    /// Where addresses come from that nobody asks for by number; none: from all of it.
    pub(crate) ip_range: Option<IpNet>,
    /// Addresses that no container gets, by name.
    pub(crate) aux_addresses: BTreeMap<String, IpAddr>,
    /// How full it is.
    pub(crate) usage: Option<Usage>,
}

/// How full a subnet is, of the addresses that can be handed out unasked.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Usage {
    /// Held by containers.
    pub(crate) in_use: u64,
    /// Freed a short while ago.
    pub(crate) resting: u64,
    /// Promised to hosts.
    pub(crate) set_aside: u64,
    /// To be had now.
    pub(crate) free: u64,
}

/// One container's place in a network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Endpoint {
    /// Its number: which allocation it is.
    pub(crate) id: String,
    /// The container's name.
    pub(crate) container: String,
    /// Its host's name.
    pub(crate) host: String,
    /// Its MAC address.
    pub(crate) mac: String,
    /// Its addresses, one per subnet.
    pub(crate) ips: Vec<IpAddr>,
    /// `up` or `down`.
    pub(crate) state: String,
}

/// A host that takes part in a network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Peer {
    /// Its name.
    pub(crate) host: String,
    /// Its VTEP address.
    pub(crate) vtep: IpAddr,
}
