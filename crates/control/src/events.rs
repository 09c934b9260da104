//! What happened in the cluster, as `towline events` tells it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use vtep::{MacAddr, Vni};

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterEvent {
    /// When, in milliseconds since 1970-01-01 UTC, by the manager's clock.
    pub time_ms: u64,
    /// What happened to it.
    pub action: Action,
    /// What it happened to.
    #[serde(flatten)]
    pub subject: Subject,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// A host became a member for the first time.
    Join,
    /// A network, a service or an endpoint was made.
    Create,
    /// It is another than before.
    Update,
    /// An endpoint takes frames; a member serves; a host's heartbeats are back.
    Up,
    /// An endpoint takes none; a member serves no more; a host fell silent and is masked.
    Down,
    /// It is gone for good.
    Remove,
}

/// What something happened to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "object", rename_all = "lowercase")]
pub enum Subject {
    /// A host.
    Host {
        /// Its name.
        host: String,
        /// Its underlay address.
        vtep: IpAddr,
    },
    /// A network.
    Network {
        /// Its name.
        network: String,
        /// Its VNI.
        vni: Vni,
    },
    /// A container's place in a network.
    Endpoint {
        /// The network's name.
        network: String,
        /// Its VNI.
        vni: Vni,
        /// The container's name.
        container: String,
        /// The host's name.
        host: String,
        /// The MAC address.
        mac: MacAddr,
        /// The addresses.
        ips: Vec<IpAddr>,
    },
    /// A service.
    Service {
        /// Its name.
        service: String,
        /// Its network's name.
        network: String,
        /// Its network's VNI.
        vni: Vni,
    },
    /// A container's part in a service.
    Member {
        /// The service's name.
        service: String,
        /// The name of the network that it is on.
        network: String,
        /// That network's VNI.
        vni: Vni,
        /// The container's name.
        container: String,
        /// The host's name.
        host: String,
    },
}

impl Subject {
    /// The name of the network that it is, or is in.
    #[must_use]
    pub fn network(&self) -> Option<&str> {
        match self {
            Self::Host { .. } => None,
            Self::Network { network, .. }
            | Self::Endpoint { network, .. }
            | Self::Service { network, .. }
            | Self::Member { network, .. } => Some(network),
        }
    }
}

/// How far a follower has come in a manager's events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The manager's life: another one has events of its own.
    pub life: u64,
    /// The next event.
    pub next: u64,
}

/// Where to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum From {
    /// With what happens from now on.
    Now,
    /// With what happened at this time, in milliseconds since 1970-01-01 UTC, as far back as the manager remembers.
    Time(u64),
    /// Where the last answer ended.
    Position(Position),
}

/// Events that a manager told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// The events, in order.
    pub events: Vec<ClusterEvent>,
    /// Events that came before them and are forgotten.
    pub missed: u64,
    /// Where the next ones begin.
    pub position: Position,
}
