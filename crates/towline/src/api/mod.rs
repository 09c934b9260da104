//! What a client asks the agent and what it answers: one JSON value a line.
//!
//! The answers are also what `--json` prints, so their shape is stable and
//! written down in `docs/json.md`. Addresses, MACs and ids are strings.

pub(crate) mod capture;
pub(crate) mod container;
pub(crate) mod mount;
pub(crate) mod names;
pub(crate) mod service;
pub(crate) mod volume;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use control::events;
use control::installed::Verified;
use control::{AddressPool, Addressing};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use vtep::settings::WireSettings;

/// What a client asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
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
    /// `towline network prune`: those of these ids that nobody uses.
    NetworkPrune(Vec<String>),
    /// `towline host ls`.
    HostList,
    /// `towline host update`.
    HostUpdate {
        /// Its name or id.
        host: String,
        /// Labels to be added, or to get another value.
        add: BTreeMap<String, String>,
        /// Keys of labels to be taken away.
        remove: Vec<String>,
    },
    /// `towline host rm`.
    HostRemove {
        /// Its name or id.
        host: String,
        /// Also when it is connected.
        force: bool,
    },
    /// `towline promote`.
    Promote,
    /// `towline token`.
    Token(TokenWanted),
    /// `towline ca export`: to this file.
    CaExport(PathBuf),
    /// `towline update`.
    Update(Update),
    /// `towline fdb`.
    Fdb {
        /// Only this network, by name or id.
        network: Option<String>,
    },
    /// `towline resolve`.
    Resolve(names::Resolve),
    /// `towline events`: what happened from there on. The answer waits a few seconds for something to tell.
    Events(events::From),
    /// `towline verify`.
    Verify {
        /// Only this network, by name or id.
        network: Option<String>,
    },
    /// `towline capture`: the answer is [`Response::Capturing`] and a stream.
    Capture(capture::Capture),
    /// All that concerns services.
    Service(service::Request),
    /// All that concerns volumes.
    Volume(volume::Request),
    /// All that concerns containers.
    Container(container::Request),
}

/// The line sent back.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// Done.
    Ok(Response),
    /// Not done; one line for a person.
    Error(String),
}

/// What the agent answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Response {
    /// Done, nothing to say.
    Done,
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Init`].
    Initialized(Initialized),
    /// To [`Request::Join`].
    Joined(Joined),
    /// To [`Request::Token`].
    Token(JoinToken),
    /// To [`Request::CaExport`].
    CaExported(CaExported),
    /// To [`Request::NetworkCreate`] and [`Request::NetworkInspect`].
    Network(Box<Network>),
    /// To [`Request::NetworkList`].
    Networks(Vec<NetworkSummary>),
    /// To [`Request::NetworkPrune`]: names of those that were removed.
    Pruned(Vec<String>),
    /// To [`Request::HostList`], and to [`Request::Update`] as far as the hosts have followed.
    Hosts(Vec<Host>),
    /// To [`Request::Fdb`].
    Fdb(Vec<FdbEntry>),
    /// To [`Request::Resolve`].
    Resolved(names::Resolved),
    /// To [`Request::Events`].
    Events(events::Told),
    /// To [`Request::Verify`].
    Verified(Vec<Verified>),
    /// To [`Request::Capture`]; [`capture::Event`]s follow.
    Capturing,
    /// To [`Request::Service`].
    Service(service::Response),
    /// To [`Request::Volume`].
    Volume(volume::Response),
    /// To [`Request::Container`].
    Container(container::Response),
}

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

/// One line of `fdb`: where frames for a MAC go.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FdbEntry {
    /// The network's name.
    pub(crate) network: String,
    /// Its VNI.
    pub(crate) vni: u32,
    /// The MAC address.
    pub(crate) mac: String,
    /// `local`, `remote` or `gateway`.
    pub(crate) kind: String,
    /// Addresses that resolve to the MAC.
    pub(crate) ips: Vec<IpAddr>,
    /// Remote: the VTEP it is behind.
    pub(crate) remote: Option<String>,
    /// The host's name, when known.
    pub(crate) host: Option<String>,
    /// Local: the container.
    pub(crate) container: Option<String>,
    /// Local: frames of the port. Remote: datagrams of the VTEP, of all MACs behind it. The gateway has none.
    pub(crate) traffic: Option<Passed>,
}

/// What passed a port or a remote VTEP, in frames or in datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Passed {
    /// Came from it, dropped or not.
    #[serde(rename = "in")]
    pub(crate) received: u64,
    /// Went to it.
    #[serde(rename = "out")]
    pub(crate) sent: u64,
    /// Came from it, or was for it, and was dropped.
    pub(crate) dropped: u64,
}

/// What passed one port.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PortTraffic {
    /// Its number.
    pub(crate) port: u32,
    /// The container.
    pub(crate) container: String,
    /// The network's name.
    pub(crate) network: String,
    /// The interface in the container.
    pub(crate) interface: String,
    /// Frames that the container sent, dropped or not.
    pub(crate) frames_in: u64,
    /// Their bytes.
    pub(crate) frame_bytes_in: u64,
    /// Frames that the container was handed.
    pub(crate) frames_out: u64,
    /// Their bytes.
    pub(crate) frame_bytes_out: u64,
    /// Frames from or for the container that were dropped, by reason; reasons that never happened are left out.
    pub(crate) drops: BTreeMap<String, u64>,
}

/// What came from and went to one remote VTEP, on all networks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RemoteTraffic {
    /// Its address.
    pub(crate) remote: IpAddr,
    /// The host's name, when known.
    pub(crate) host: Option<String>,
    /// The largest IP packet that passes to it, in bytes, when that is less than a network needs.
    pub(crate) path_mtu: Option<u16>,
    /// Datagrams from it, dropped or not.
    pub(crate) datagrams_in: u64,
    /// Bytes of their payload.
    pub(crate) datagram_bytes_in: u64,
    /// Datagrams that left for it.
    pub(crate) datagrams_out: u64,
    /// Bytes of their payload.
    pub(crate) datagram_bytes_out: u64,
    /// Datagrams from it that were dropped, by reason; reasons that never happened are left out.
    pub(crate) drops: BTreeMap<String, u64>,
    /// Datagrams for it that did not leave, by reason; reasons that never happened are left out.
    pub(crate) send_failures: BTreeMap<String, u64>,
}

/// What `status` shows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    /// The program's version.
    pub(crate) version: String,
    /// The agent's process id.
    pub(crate) pid: u32,
    /// This host's name.
    pub(crate) name: String,
    /// Where its state lives.
    pub(crate) state_dir: String,
    /// Its place in a cluster; none before `init` or `join`.
    pub(crate) cluster: Option<ClusterStatus>,
}

/// The file that is in a manager's place.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StaticSource {
    /// The file.
    pub(crate) file: String,
    /// Milliseconds since it was read.
    pub(crate) age_ms: u64,
    /// How often it was read and taken since the agent's start.
    pub(crate) reads: u64,
    /// Why the file as it is now is not in force.
    pub(crate) problem: Option<String>,
    /// Endpoints of this host that are not as the file says, a line for each.
    pub(crate) ports: Vec<String>,
}

/// A host's place in its cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ClusterStatus {
    /// This host's id.
    pub(crate) host: String,
    /// `manager`, `standby`, `member`, or `static` where a file is in a manager's place.
    pub(crate) role: String,
    /// In static mode: the file.
    #[serde(rename = "static")]
    pub(crate) source: Option<StaticSource>,
    /// Its VTEP address.
    pub(crate) vtep: IpAddr,
    /// UDP port of VXLAN.
    pub(crate) port: u16,
    /// MTU of its underlay link in bytes.
    pub(crate) link_mtu: u16,
    /// How many neighbours the kernel keeps for the whole machine, by IP version; empty where that can't be seen.
    pub(crate) neighbor_limits: BTreeMap<String, u64>,
    /// The connection to the manager.
    pub(crate) control: serde_json::Value,
    /// The data path.
    pub(crate) datapath: serde_json::Value,
    /// Frames dropped, by reason; reasons that never happened are left out.
    pub(crate) drops: BTreeMap<String, u64>,
    /// Frames and bytes carried.
    pub(crate) traffic: BTreeMap<String, u64>,
    /// The same of each port here, by container.
    pub(crate) ports: Vec<PortTraffic>,
    /// The same of each remote VTEP, by address.
    pub(crate) remotes: Vec<RemoteTraffic>,
    /// The gateway bridge.
    pub(crate) gateway: serde_json::Value,
    /// How many containers have an endpoint here.
    pub(crate) endpoints: usize,
    /// Services that this host acts for, as far as it has heard.
    #[serde(default)]
    pub(crate) services: Vec<service::Summary>,
    /// What containers asked for by name, since the agent's start.
    #[serde(default)]
    pub(crate) names: names::Status,
    /// What the operator should know: one sentence each.
    pub(crate) warnings: Vec<String>,
}
