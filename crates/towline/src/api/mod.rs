//! What a client asks the agent and what it answers: one JSON value a line.
//!
//! The answers are also what `--json` prints, so their shape is stable and
//! written down in `docs/json.md`. Addresses, MACs and ids are strings.

pub mod container;

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// What a client asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// `towline status`.
    Status,
    /// `towline init`.
    Init(Init),
    /// `towline join`.
    Join(Join),
    /// `towline leave`.
    Leave {
        /// Also when containers run or other hosts depend on this manager.
        force: bool,
    },
    /// `towline network create`.
    NetworkCreate(NetworkCreate),
    /// `towline network ls`.
    NetworkList,
    /// `towline network inspect`: by name or id.
    NetworkInspect(String),
    /// `towline network rm`.
    NetworkRemove {
        /// Its name or id.
        name: String,
        /// An unknown network is no error.
        force: bool,
    },
    /// `towline host ls`.
    HostList,
    /// `towline host rm`: by name or id.
    HostRemove(String),
    /// `towline fdb`.
    Fdb {
        /// Only this network, by name or id.
        network: Option<String>,
    },
    /// All that concerns containers.
    Container(container::Request),
}

/// The line sent back.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Done.
    Ok(Response),
    /// Not done; one line for a person.
    Error(String),
}

/// What the agent answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// Done, nothing to say.
    Done,
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Init`].
    Initialized(Initialized),
    /// To [`Request::Join`].
    Joined(Joined),
    /// To [`Request::NetworkCreate`] and [`Request::NetworkInspect`].
    Network(Box<Network>),
    /// To [`Request::NetworkList`].
    Networks(Vec<NetworkSummary>),
    /// To [`Request::HostList`].
    Hosts(Vec<Host>),
    /// To [`Request::Fdb`].
    Fdb(Vec<FdbEntry>),
    /// To [`Request::Container`].
    Container(container::Response),
}

/// How to make this host the first of a cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Init {
    /// The VTEP address; without it the address of the default route's interface.
    pub advertise: Option<IpAddr>,
    /// UDP port of VXLAN and TCP port of control.
    pub port: Option<u16>,
}

/// How to make this host one of an existing cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Join {
    /// What `init` printed.
    pub token: String,
    /// Managers: an address, or address and port.
    pub managers: Vec<String>,
    /// The VTEP address; without it the address of the interface that leads to the first manager.
    pub advertise: Option<IpAddr>,
    /// This host's own UDP port of VXLAN.
    pub port: Option<u16>,
}

/// What `init` made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Initialized {
    /// This host's id.
    pub host: String,
    /// What other hosts join with.
    pub token: String,
    /// Where they find this manager.
    pub manager: String,
    /// The whole command to run on another host.
    pub join_command: String,
    /// What the operator should know: one sentence each.
    pub warnings: Vec<String>,
}

/// What `join` found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Joined {
    /// This host's id.
    pub host: String,
    /// The manager that answered.
    pub manager: String,
    /// The largest IP packet that passed the underlay both ways, in bytes.
    pub path_mtu: u16,
    /// What the operator should know: one sentence each.
    pub warnings: Vec<String>,
}

/// A network to create.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NetworkCreate {
    /// Its name.
    pub name: String,
    /// Its subnets; none: the next free /24 of 10.0.0.0/8.
    pub subnets: Vec<IpNet>,
    /// Its VNI; none: the next free one from 4096.
    pub vni: Option<u32>,
    /// Its MTU in bytes; none: as large as the hosts' links allow.
    pub mtu: Option<u16>,
    /// Whether broadcast and unknown destinations are flooded.
    pub flood: bool,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// A network as `network ls` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NetworkSummary {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// `overlay`.
    pub driver: String,
    /// `cluster`: the same on every host.
    pub scope: String,
    /// Its VNI.
    pub vni: u32,
    /// Its MTU in bytes.
    pub mtu: u16,
    /// Its subnets.
    pub subnets: Vec<IpNet>,
}

/// A network as `network inspect` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Network {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// `overlay`.
    pub driver: String,
    /// `cluster`.
    pub scope: String,
    /// Its VNI.
    pub vni: u32,
    /// Its MTU in bytes.
    pub mtu: u16,
    /// Its subnets.
    pub subnets: Vec<Subnet>,
    /// Whether broadcast and unknown destinations are flooded.
    pub flood: bool,
    /// Seconds since 1970.
    pub created: u64,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Containers on it, on all hosts.
    pub endpoints: Vec<Endpoint>,
    /// Hosts that have containers on it.
    pub peers: Vec<Peer>,
}

/// One subnet of a network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Subnet {
    /// The prefix.
    pub subnet: IpNet,
    /// The address that answers for the network itself.
    pub gateway: IpAddr,
}

/// One container's place in a network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Endpoint {
    /// The container's name.
    pub container: String,
    /// Its host's name.
    pub host: String,
    /// Its MAC address.
    pub mac: String,
    /// Its addresses, one per subnet.
    pub ips: Vec<IpAddr>,
    /// `up` or `down`.
    pub state: String,
}

/// A host that takes part in a network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Peer {
    /// Its name.
    pub host: String,
    /// Its VTEP address.
    pub vtep: IpAddr,
}

/// A host as `host ls` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Host {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its VTEP address.
    pub vtep: IpAddr,
    /// Its UDP port of VXLAN.
    pub port: u16,
    /// MTU of its underlay link in bytes.
    pub link_mtu: u16,
    /// `up`, or `down` when the manager has not heard from it for three seconds.
    pub state: String,
    /// Milliseconds since the manager last heard from it.
    pub last_seen_ms: u64,
    /// Whether it runs a manager.
    pub manager: bool,
    /// Whether it is the host asked.
    pub this: bool,
}

/// One line of `fdb`: where frames for a MAC go.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FdbEntry {
    /// The network's name.
    pub network: String,
    /// Its VNI.
    pub vni: u32,
    /// The MAC address.
    pub mac: String,
    /// `local`, `remote` or `gateway`.
    pub kind: String,
    /// Addresses that resolve to the MAC.
    pub ips: Vec<IpAddr>,
    /// Remote: the VTEP it is behind.
    pub remote: Option<String>,
    /// The host's name, when known.
    pub host: Option<String>,
    /// Local: the container.
    pub container: Option<String>,
}

/// What `status` shows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The program's version.
    pub version: String,
    /// The agent's process id.
    pub pid: u32,
    /// This host's name.
    pub name: String,
    /// Where its state lives.
    pub state_dir: String,
    /// Its place in a cluster; none before `init` or `join`.
    pub cluster: Option<ClusterStatus>,
}

/// A host's place in its cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// This host's id.
    pub host: String,
    /// `manager` or `member`.
    pub role: String,
    /// Its VTEP address.
    pub vtep: IpAddr,
    /// UDP port of VXLAN.
    pub port: u16,
    /// MTU of its underlay link in bytes.
    pub link_mtu: u16,
    /// How others join; only on a manager.
    pub join_command: Option<String>,
    /// The connection to the manager.
    pub control: serde_json::Value,
    /// The data path.
    pub datapath: serde_json::Value,
    /// Frames dropped, by reason; reasons that never happened are left out.
    pub drops: BTreeMap<String, u64>,
    /// Frames and bytes carried.
    pub traffic: BTreeMap<String, u64>,
    /// The gateway bridge.
    pub gateway: serde_json::Value,
    /// How many containers have an endpoint here.
    pub endpoints: usize,
    /// What the operator should know: one sentence each.
    pub warnings: Vec<String>,
}
