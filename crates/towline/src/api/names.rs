//! Requests and answers that concern names.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// `towline resolve`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Resolve {
    /// The name, or an address.
    pub(crate) name: String,
    /// The network that is asked on, by name or id.
    pub(crate) network: String,
    /// What is asked for; none: what fits the name.
    pub(crate) kind: Option<RecordType>,
}

/// A kind of record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "UPPERCASE")]
#[value(rename_all = "UPPER")]
pub(crate) enum RecordType {
    /// IPv4 addresses
    A,
    /// IPv6 addresses
    Aaaa,
    /// The name of an address
    Ptr,
    /// Where the members of a service have a port
    Srv,
}

/// What a name has.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Resolved {
    /// The name, as it was asked for.
    pub(crate) name: String,
    /// The network's name.
    pub(crate) network: String,
    /// How long a container may keep the answer, in seconds.
    pub(crate) ttl: u32,
    /// What is behind the name; none: it has no record of that kind.
    pub(crate) records: Vec<ResolvedRecord>,
}

/// One record.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum ResolvedRecord {
    /// A or AAAA.
    Address {
        /// The address.
        address: IpAddr,
    },
    /// SRV.
    Service {
        /// Its weight.
        weight: u16,
        /// The port.
        port: u16,
        /// The member's name.
        target: String,
        /// Its addresses.
        addresses: Vec<IpAddr>,
    },
    /// PTR.
    Name {
        /// The name.
        name: String,
    },
}

/// Numbers for `towline status`, since the agent's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// Containers that are served.
    pub(crate) containers: usize,
    /// Questions that came.
    pub(crate) queries: u64,
    /// Questions that were answered from the cluster's own names, or had no right to an answer.
    pub(crate) answered: u64,
    /// Questions that were passed on.
    pub(crate) forwarded: u64,
    /// Questions that were refused, because too many wait.
    pub(crate) refused: u64,
    /// Questions passed on that no server answered.
    pub(crate) failed: u64,
}
