//! What a host says of itself: its tables, what passed, and how its parts are.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{names, service};

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
