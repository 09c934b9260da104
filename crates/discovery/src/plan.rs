//! What stands in the kernel for services, said without rules: what a host, a client's namespace and a member's namespace need.
//!
//! A plan is made by [`Services`](crate::Services) from what is known, and put in place by
//! [`InstalledEntry`](crate::InstalledEntry) and its like. Plans of the same knowledge are equal.

use std::collections::BTreeSet;
use std::net::IpAddr;

use control::service::{Balance, Protocol, PublishOn};
use ipnet::IpNet;

/// The interface by which a host takes part in the ingress network.
pub const HOST_INTERFACE: &str = "towline_ingress";
/// The interface by which a member of a service with published ports takes part in it.
pub const MEMBER_INTERFACE: &str = "ingress";
/// The routing table for what leaves by the ingress network; VXLAN's port, so that it is recognised. The rules that lead to it have
/// this number and the two after it as their priorities.
pub const ROUTING_TABLE: u32 = 4789;

/// Where new connections of a service go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// How a slot is chosen.
    pub balance: Balance,
    /// IPv4 members that take new connections, slot by slot (see [`slots`](crate::slots::slots)).
    pub v4: Vec<IpAddr>,
    /// The same of IPv6.
    pub v6: Vec<IpAddr>,
    /// Addresses of all members, also of those that take no new connections: theirs go on.
    pub members: BTreeSet<IpAddr>,
}

/// What a host needs to accept published ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EntryPlan {
    /// One for each published port and service; sorted.
    pub ports: Vec<EntryPort>,
    /// Sources that mean nothing to a member elsewhere, beside loopback and link-local addresses: the host speaks for them.
    pub local_sources: BTreeSet<IpNet>,
    /// The ingress network's own subnets: the host speaks for a member too, that might be led to itself.
    pub subnets: BTreeSet<IpNet>,
}

/// One published port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryPort {
    /// The service's name.
    pub service: String,
    /// What clients ask for.
    pub published: u16,
    /// tcp or udp.
    pub protocol: Protocol,
    /// The only address or interface it is accepted on.
    pub on: Option<PublishOn>,
    /// The port in the member.
    pub target: u16,
    /// Who takes it.
    pub pool: Pool,
    /// How long an idle connection is remembered, in seconds; `None`: as long as the kernel's own setting says.
    pub idle_timeout: Option<u32>,
    /// Whether the member sees the client's address, or this host's.
    pub preserve_client: bool,
}

/// What a namespace needs that calls services by their virtual addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientPlan {
    /// Sorted by name.
    pub services: Vec<ClientService>,
}

/// One service as a client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientService {
    /// The service's name.
    pub service: String,
    /// Its network's identifier: names are only unique there.
    pub vni: u32,
    /// Its virtual addresses.
    pub vips: BTreeSet<IpAddr>,
    /// Who answers.
    pub pool: Pool,
    /// How long an idle connection is remembered, in seconds; `None`: as long as the kernel's own setting says.
    pub idle_timeout: Option<u32>,
}

/// What a member's namespace needs to be reached through the ingress network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberPlan {
    /// The service's name.
    pub service: String,
    /// Its addresses on the ingress network.
    pub ips: BTreeSet<IpAddr>,
    /// The gateways of the ingress network's subnets: replies are routed to them, and readdressed to the host that they came by.
    pub gateways: BTreeSet<IpAddr>,
    /// The MAC address of these gateways.
    pub gateway_mac: [u8; 6],
    /// The only ports that may be reached through it.
    pub targets: BTreeSet<(Protocol, u16)>,
    /// How long an idle connection is remembered, in seconds; `None`: as long as the kernel's own setting says.
    pub idle_timeout: Option<u32>,
}
