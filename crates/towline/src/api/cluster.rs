//! A host in a cluster: how it comes in, with what tokens, and who the others are.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use control::AddressPool;
use serde::{Deserialize, Serialize};

/// How to make this host the first of a cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Init {
    /// The VTEP address; without it the address of the default route's interface.
    pub(crate) advertise: Option<IpAddr>,
    /// UDP port of VXLAN and TCP port of control.
    pub(crate) port: Option<u16>,
    /// Where subnets come from that nobody asks for by number; none: as this host's configuration says.
    pub(crate) pools: Vec<AddressPool>,
    /// A file that `towline ca export` wrote: the cluster's authority; none: a new one.
    pub(crate) ca: Option<PathBuf>,
}

/// Which token to show, and what to change of it before.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TokenWanted {
    /// Of which kind of host.
    pub(crate) role: control::Role,
    /// Make a new one.
    pub(crate) rotate: bool,
    /// How long it is good for from now on; none: as it was.
    pub(crate) lasts: Option<control::Lasts>,
}

/// A join token.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct JoinToken {
    /// `worker` or `manager`.
    pub(crate) role: String,
    /// The token.
    pub(crate) token: String,
    /// The whole command to run on another host.
    pub(crate) join_command: String,
    /// Seconds until it expires, 0 when it has; none: it does not.
    pub(crate) expires_in: Option<u64>,
}

/// Where the cluster's authority was written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CaExported {
    /// The file.
    pub(crate) file: String,
    /// The cluster's name.
    pub(crate) cluster: String,
}

/// How to make this host one of an existing cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Join {
    /// What `init` printed.
    pub(crate) token: String,
    /// Managers: an address, or address and port.
    pub(crate) managers: Vec<String>,
    /// The VTEP address; without it the address of the interface that leads to the first manager.
    pub(crate) advertise: Option<IpAddr>,
    /// This host's own UDP port of VXLAN.
    pub(crate) port: Option<u16>,
}

/// What `init` made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Initialized {
    /// This host's id.
    pub(crate) host: String,
    /// What other hosts join with.
    pub(crate) token: String,
    /// Where they find this manager.
    pub(crate) manager: String,
    /// The whole command to run on another host.
    pub(crate) join_command: String,
    /// What the operator should know: one sentence each.
    pub(crate) warnings: Vec<String>,
}

/// What `join` found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Joined {
    /// This host's id.
    pub(crate) host: String,
    /// The manager that answered.
    pub(crate) manager: String,
    /// The largest IP packet that passed the underlay both ways, in bytes.
    pub(crate) path_mtu: u16,
    /// What the operator should know: one sentence each.
    pub(crate) warnings: Vec<String>,
}

/// What to change for the whole cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Update {
    /// The UDP port on which all hosts are to receive VXLAN.
    pub(crate) vxlan_port: u16,
}

/// A host as `host ls` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Host {
    /// Its id.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
    /// Its VTEP address.
    pub(crate) vtep: IpAddr,
    /// Its UDP port of VXLAN.
    pub(crate) port: u16,
    /// The port that the cluster wants it to have; none: nobody has said.
    pub(crate) wanted_port: Option<u16>,
    /// Why it does not have it.
    pub(crate) port_problem: Option<String>,
    /// MTU of its underlay link in bytes.
    pub(crate) link_mtu: u16,
    /// `up`, or `down` when the manager has not heard from it for three seconds; `static` where no manager listens.
    pub(crate) state: String,
    /// Milliseconds since the manager last heard from it.
    pub(crate) last_seen_ms: u64,
    /// Whether it runs the manager.
    pub(crate) manager: bool,
    /// `manager`, `standby` (it can be promoted) or `member`.
    pub(crate) role: String,
    /// Labels that operators gave it.
    #[serde(default)]
    pub(crate) labels: BTreeMap<String, String>,
    /// Labels of its own configuration.
    #[serde(default)]
    pub(crate) own_labels: BTreeMap<String, String>,
    /// What it runs on.
    #[serde(default)]
    pub(crate) platform: control::Platform,
    /// Whether it is the host asked.
    pub(crate) this: bool,
}
