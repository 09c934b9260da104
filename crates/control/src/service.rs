//! Services: a name with a virtual address, published ports and members.
//!
//! A service is defined once, by a [`ServiceSpec`], and lives on one network. Who its members are stands in the rows of that
//! network: an endpoint's row carries a [`Membership`], edited by the endpoint's owner like its state. So a member that comes,
//! turns unhealthy or goes is news like any other row's, in order with it.
//!
//! A service with ports published by the ingress mesh is told on the ingress network too, where its members hold an endpoint each.

mod check;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use vtep::Vni;

use crate::epoch::Epoch;

pub use check::{
    AUTO_PORTS, COMMAND_MAX, PORTS_MAX, TIMEOUT_MAX_MS, WEIGHT_MAX, check_spec, overlaps,
};

/// What a user asks of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSpec {
    /// Its name, unique in the cluster.
    pub name: String,
    /// The network that its members are on: a name, an id, or a unique start of an id. In a [`Service`] it is the name.
    pub network: String,
    /// How clients find the members.
    #[serde(default)]
    pub mode: EndpointMode,
    /// Which member a new connection goes to.
    #[serde(default)]
    pub balance: Balance,
    /// Virtual addresses asked for by number, at most one a family; a family without one gets the next free address.
    #[serde(default)]
    pub vips: Vec<IpAddr>,
    /// Published ports, one each.
    #[serde(default)]
    pub publish: Vec<Publish>,
    /// How a member shows that it serves; `None`: by running.
    #[serde(default)]
    pub health: Option<HealthCheck>,
    /// How long a connection may be idle, in seconds; `None`: as long as the kernel says.
    #[serde(default)]
    pub idle_timeout: Option<u32>,
    /// How long a member that leaves waits for its open connections, in seconds.
    #[serde(default = "default_drain_timeout")]
    pub drain_timeout: u32,
    /// Whether members see the address of a client that comes through a published port.
    #[serde(default = "default_preserve_client")]
    pub preserve_client: bool,
    /// Labels of the user, kept and shown.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl ServiceSpec {
    /// A service of this name on this network with all else as it comes.
    #[must_use]
    pub fn named(name: &str, network: &str) -> Self {
        Self {
            name: name.to_owned(),
            network: network.to_owned(),
            mode: EndpointMode::default(),
            balance: Balance::default(),
            vips: Vec::new(),
            publish: Vec::new(),
            health: None,
            idle_timeout: None,
            drain_timeout: default_drain_timeout(),
            preserve_client: default_preserve_client(),
            labels: BTreeMap::new(),
        }
    }

    /// Whether the ingress mesh carries any of its ports.
    #[must_use]
    pub fn uses_ingress(&self) -> bool {
        self.publish
            .iter()
            .any(|publish| publish.mode == PublishMode::Ingress)
    }
}

const fn default_drain_timeout() -> u32 {
    10
}

const fn default_preserve_client() -> bool {
    true
}

/// How clients find a service's members.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointMode {
    /// By one virtual address a family.
    #[default]
    Vip,
    /// By the members' own addresses, from the name.
    Dnsrr,
}

impl fmt::Display for EndpointMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vip => "vip",
            Self::Dnsrr => "dnsrr",
        })
    }
}

/// Which member a new connection goes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Balance {
    /// To each in turn.
    #[default]
    #[serde(rename = "rr")]
    RoundRobin,
    /// To each as often as its weight says.
    Weighted,
    /// To the same for the same client address.
    Source,
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RoundRobin => "rr",
            Self::Weighted => "weighted",
            Self::Source => "source",
        })
    }
}

/// One published port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Publish {
    /// The members' port.
    pub target: u16,
    /// The hosts' port; `None`: one that is free.
    #[serde(default)]
    pub published: Option<u16>,
    /// Of which protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// On which hosts.
    #[serde(default)]
    pub mode: PublishMode,
    /// Where on a host; `None`: everywhere.
    #[serde(default)]
    pub on: Option<PublishOn>,
}

impl fmt::Display for Publish {
    /// As Docker shows it: `*:8080->80/tcp`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.on {
            None => f.write_str("*")?,
            Some(on) => on.fmt(f)?,
        }
        match self.published {
            Some(port) => write!(f, ":{port}")?,
            None => f.write_str(":?")?,
        }
        write!(f, "->{}/{}", self.target, self.protocol)
    }
}

/// A protocol with ports that can be published.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// On which hosts a port is published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PublishMode {
    /// On every host, for any member.
    #[default]
    Ingress,
    /// On each member's own host, for that member.
    Host,
}

impl fmt::Display for PublishMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Host => "host",
        })
    }
}

/// Where on a host a port is published.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PublishOn {
    /// On this address of the host.
    Address(IpAddr),
    /// On what arrives through this interface.
    Interface(String),
}

impl fmt::Display for PublishOn {
    /// As in `--publish`: an IPv6 address in brackets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Self::Address(ip) => ip.fmt(f),
            Self::Interface(name) => f.write_str(name),
        }
    }
}

/// How a member shows that it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// What is tried.
    pub test: HealthTest,
    /// From the end of one try to the start of the next, in milliseconds.
    pub interval: u32,
    /// After which a try has failed, in milliseconds.
    pub timeout: u32,
    /// Tries that fail one after another before the member is unhealthy.
    pub retries: u32,
    /// How long after a member's start failures do not count, in milliseconds.
    pub start_period: u32,
}

/// What a health check tries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthTest {
    /// A command in the container that must end with 0.
    Command(Vec<String>),
    /// A TCP connection to the container.
    Tcp {
        /// To this port.
        port: u16,
    },
    /// A GET that must be answered with a status from 200 to 399.
    Http {
        /// To this port.
        port: u16,
        /// Of this path.
        path: String,
    },
}

/// One service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// 25 characters of base 36, never used again.
    pub id: String,
    /// The epoch of its making: what memberships name.
    pub epoch: Epoch,
    /// The epoch of its last change: the higher one is the newer.
    pub version: Epoch,
    /// Its network.
    pub vni: Vni,
    /// What was asked, with every published port filled in.
    pub spec: ServiceSpec,
    /// Its virtual addresses: at most one IPv4, at most one IPv6; none in mode dnsrr.
    pub vips: Vec<IpAddr>,
    /// When it was made, in seconds since 1970-01-01 UTC.
    pub created: u64,
}

impl Service {
    /// Bytes of its description.
    #[must_use]
    pub fn size(&self) -> usize {
        serde_json::to_vec(self).map_or(0, |description| description.len())
    }

    /// The networks that it is told on: its own, and the ingress network if it has ports there.
    pub fn networks(&self, ingress: Option<Vni>) -> impl Iterator<Item = Vni> {
        let ingress = ingress.filter(|vni| self.spec.uses_ingress() && *vni != self.vni);
        std::iter::once(self.vni).chain(ingress)
    }
}

/// That an endpoint is a member of a service, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Membership {
    /// The service's epoch.
    pub service: Epoch,
    /// How many times as many connections as one of weight 1, at most [`WEIGHT_MAX`].
    pub weight: u16,
    /// New connections may come. An endpoint starts without.
    pub serving: bool,
}

impl Membership {
    /// With a weight that may be.
    pub(crate) fn clamped(self) -> Self {
        let weight = self.weight.clamp(1, WEIGHT_MAX);
        Self { weight, ..self }
    }
}
