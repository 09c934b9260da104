//! Requests and answers that concern containers.

use std::net::IpAddr;
use std::path::PathBuf;

use control::service::Publish;
use serde::{Deserialize, Serialize};

use super::mount::MountWanted;
use crate::shim::dns::Dns;
use crate::shim::process::ProcessId;

/// What a client or a shim asks about containers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// `towline run`, first half: make all that the command will find.
    Prepare(Box<Prepare>),
    /// The client could not start the command: undo [`Request::Prepare`].
    Abort {
        /// The container's name.
        name: String,
        /// Its id: the name may be another's by now.
        id: String,
    },
    /// From the shim: the command runs.
    Started {
        /// The container's name.
        name: String,
    },
    /// From the shim: the command has ended. Answered when all is cleared away.
    Ended {
        /// The container's name.
        name: String,
    },
    /// `towline exec` and `towline logs`: where a container is.
    Locate {
        /// The container's name, or the beginning of its id.
        name: String,
    },
    /// `towline ps`.
    List {
        /// Also containers that have ended.
        all: bool,
    },
    /// `towline rm`.
    Remove {
        /// The container's name, or the beginning of its id.
        name: String,
        /// Also when it runs: it is killed.
        force: bool,
        /// Its volumes without a name go too.
        #[serde(default)]
        volumes: bool,
        /// Seconds that a member's open connections are given; none: as its service says.
        #[serde(default)]
        drain_timeout: Option<u32>,
    },
    /// `towline stop`.
    Stop {
        /// The container's name, or the beginning of its id.
        name: String,
        /// Seconds that its command has to end by itself.
        grace: u32,
        /// Seconds that a member's open connections are given; none: as its service says.
        drain_timeout: Option<u32>,
    },
    /// `towline network connect`.
    Connect(Connect),
    /// `towline network disconnect`.
    Disconnect {
        /// The container's name, or the beginning of its id.
        container: String,
        /// The network's name, its id, or the beginning of it.
        network: String,
        /// Also out of a service on it.
        force: bool,
    },
}

/// A place in one more network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Connect {
    /// The container's name, or the beginning of its id.
    pub(crate) container: String,
    /// The network's name, its id, or the beginning of it.
    pub(crate) network: String,
    /// The addresses wanted there.
    pub(crate) ips: Vec<IpAddr>,
    /// Other names that it is to have there.
    pub(crate) aliases: Vec<String>,
}

/// A container to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Prepare {
    /// Its name; none: a random one.
    pub(crate) name: Option<String>,
    /// The networks it is attached to, by name or id, in the order of its interfaces.
    pub(crate) networks: Vec<String>,
    /// The service it is to be a member of.
    #[serde(default)]
    pub(crate) service: Option<ServiceWanted>,
    /// Ports of this host that are to be its own.
    #[serde(default)]
    pub(crate) publish: Vec<Publish>,
    /// The addresses wanted on the first network.
    pub(crate) ips: Vec<IpAddr>,
    /// The MAC address wanted on the first network.
    pub(crate) mac: Option<vtep::MacAddr>,
    /// Whether it goes when its command ends.
    pub(crate) remove: bool,
    /// Other names that it has on each of its networks.
    #[serde(default)]
    pub(crate) aliases: Vec<String>,
    /// Whom it asks for names that are none of the cluster's.
    #[serde(default)]
    pub(crate) dns: Dns,
    /// What it finds at places of its own.
    #[serde(default)]
    pub(crate) mounts: Vec<MountWanted>,
    /// What must hold for the host.
    #[serde(default)]
    pub(crate) constraints: Vec<String>,
    /// The command and its arguments, to show.
    pub(crate) command: Vec<String>,
    /// Process id of the client: when it dies before the start, all is undone.
    pub(crate) client: u32,
}

/// A service to be a member of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ServiceWanted {
    /// Its name or id.
    pub(crate) name: String,
    /// How many times as many connections as a member of weight 1.
    pub(crate) weight: u16,
}

/// What the agent answers about containers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Response {
    /// Done, nothing to say.
    Done,
    /// To [`Request::Prepare`].
    Prepared(Prepared),
    /// To [`Request::Locate`].
    Located(Located),
    /// To [`Request::List`].
    List(Vec<Container>),
    /// To [`Request::Remove`]: the name of what was removed.
    Removed(String),
    /// To [`Request::Stop`]: the name of what has ended.
    Stopped(String),
    /// To [`Request::Connect`] and [`Request::Disconnect`]: what the operator should know, one sentence each.
    Changed(Vec<String>),
}

/// A container that waits for its command.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Prepared {
    /// Its id.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
    /// Where its files are.
    pub(crate) folder: PathBuf,
    /// What the operator should know: one sentence each.
    pub(crate) warnings: Vec<String>,
}

/// Where a container is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Located {
    /// Its name.
    pub(crate) name: String,
    /// Where its files are.
    pub(crate) folder: PathBuf,
    /// Its first process while it runs.
    pub(crate) process: Option<ProcessId>,
}

/// A container as `ps` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Container {
    /// Its id.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
    /// Its command and arguments.
    pub(crate) command: Vec<String>,
    /// `created` before its command starts, `running`, `ending` while it is cleared away, or `exited`.
    pub(crate) state: String,
    /// Process id of its first process while it runs.
    pub(crate) pid: Option<u32>,
    /// Exit code of an ended one.
    pub(crate) exit_code: Option<u8>,
    /// Seconds since 1970 when it was made.
    pub(crate) created: u64,
    /// Seconds since 1970 when it ended.
    pub(crate) finished: Option<u64>,
    /// Its places in networks.
    pub(crate) endpoints: Vec<Place>,
    /// Its place on the gateway bridge.
    pub(crate) gwbridge: Option<GatewayPlace>,
    /// The service it is a member of.
    pub(crate) service: Option<Part>,
    /// Ports of this host that are its own, as `run --publish` asked.
    pub(crate) ports: Vec<Publish>,
    /// What of this host it finds at places of its own.
    #[serde(default)]
    pub(crate) mounts: Vec<MountPlace>,
}

/// Something that a container finds at a place of its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MountPlace {
    /// `bind`, `volume` or `tmpfs`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// The volume's name.
    pub(crate) name: Option<String>,
    /// Where it is on this host; memory is nowhere.
    pub(crate) source: Option<String>,
    /// Where the container finds it.
    pub(crate) target: String,
    /// Whether the container can't write there.
    pub(crate) readonly: bool,
}

/// A container's part in a service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Part {
    /// The service's name; its number while this host does not know it.
    pub(crate) service: String,
    /// How many times as many connections as a member of weight 1.
    pub(crate) weight: u16,
    /// New connections come to it.
    pub(crate) serving: bool,
    /// `starting`, `healthy`, or `unhealthy` and why; none: it is not checked.
    pub(crate) health: Option<String>,
}

/// A container's place in one network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Place {
    /// The network's name.
    pub(crate) network: String,
    /// The interface inside the container.
    pub(crate) interface: String,
    /// The MAC address.
    pub(crate) mac: String,
    /// The addresses.
    pub(crate) ips: Vec<IpAddr>,
}

/// A container's place on the gateway bridge of its host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct GatewayPlace {
    /// The interface inside the container.
    pub(crate) interface: String,
    /// The interface on the host.
    pub(crate) host_interface: String,
    /// The addresses.
    pub(crate) ips: Vec<IpAddr>,
}
