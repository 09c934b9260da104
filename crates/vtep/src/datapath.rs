//! What carries frames, behind one seam: ports are made here and nothing outside knows how.
//!
//! [`UserspaceDatapath`] makes TAPs and carries every frame itself; it is the reference for any other. Which datapath a port
//! has is fixed when it is attached.
//!
//! ```text
//! attach ──► port ──► detach                      the interface is made, and removed
//!             │  ▲
//!      release▼  │adopt                           the interface stays while nobody carries its frames
//!           interface
//! ```
//!
//! What a datapath does *not* do: set addresses, routes or link state in the container, or choose MACs and IPs.

mod start;
mod userspace;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crossbeam_channel::Receiver;
use netns::{NetlinkError, Netns, NetnsError};
use serde::Serialize;

pub use crate::announce::Announcement;
use crate::budget::Limit;
pub use crate::capture::{Capture, CaptureFilter};
pub use crate::edge::TapFeatures;
use crate::fdb::{Change, PortId, Tables};
pub use crate::misdelivery::Misdelivered;
use crate::paths::{Paths, Reports};
pub use crate::probe::{Nonce, ProbeSeen, ProbeWatch};
use crate::stats::Counters;
pub use crate::tap::Backend;
use crate::tap::TapError;
use crate::{MacAddr, Vni};

pub use start::StartError;
pub use userspace::{UserspaceConfig, UserspaceDatapath};

/// What a port is to be.
#[derive(Clone, Debug)]
pub struct PortSpec {
    /// The caller's name for it, unique in this datapath.
    pub id: PortId,
    /// Its network.
    pub vni: Vni,
    /// Where its interface lives. Not kept: a datapath holds the namespace only by the interface's queues.
    pub netns: Netns,
    /// The interface's name there, at most 15 bytes.
    pub ifname: String,
    /// The only MAC it may send with.
    pub mac: MacAddr,
    /// The only addresses it may send with.
    pub ips: Vec<IpAddr>,
    /// The interface's MTU in bytes.
    pub mtu: u16,
    /// Whether it may send others' packets too, as a host that forwards does: see [`Port`](crate::fdb::Port).
    pub any_source: bool,
    /// How a userspace datapath makes the interface.
    pub backend: Backend,
}

/// Why a port could not be attached, adopted, detached or released.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The id is in use.
    #[error("port {0} is already attached: detach it first")]
    AlreadyAttached(PortId),
    /// The interface could not be made or opened.
    #[error("can't prepare port {id}")]
    Tap {
        /// The port.
        id: PortId,
        /// What went wrong.
        source: TapError,
    },
    /// The container's namespace could not be entered.
    #[error("can't reach the namespace of port {id}")]
    Namespace {
        /// The port.
        id: PortId,
        /// What went wrong.
        source: NetnsError,
    },
    /// The interface's MAC or MTU could not be set.
    #[error("can't configure the interface of port {id}")]
    Netlink {
        /// The port.
        id: PortId,
        /// What went wrong.
        source: NetlinkError,
    },
    /// The interface could not be removed, or made to stay.
    #[error("can't {operation} the interface of port {id}")]
    Interface {
        /// The port.
        id: PortId,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Makes ports and carries their frames.
pub trait Datapath: Send + Sync {
    /// Which datapath this is, such as `userspace`.
    fn kind(&self) -> &'static str;

    /// Makes the port's interface in its namespace, persistent, with MAC and MTU set and link down, and carries its frames
    /// from now on.
    ///
    /// # Errors
    /// See [`DatapathError`]; nothing is left behind.
    fn attach(&self, spec: &PortSpec) -> Result<(), DatapathError>;

    /// Takes up a port whose interface is still there from an earlier run. Its link state, addresses, MAC and MTU stay as
    /// they are.
    ///
    /// # Errors
    /// See [`DatapathError`]; the interface stays as it was. [`TapError::Missing`] when it is gone.
    fn adopt(&self, spec: &PortSpec) -> Result<(), DatapathError>;

    /// Removes the port and its interface, and lets go of the namespace. A port or interface that is not there is fine.
    ///
    /// # Errors
    /// When the interface can't be removed; the port is gone all the same.
    fn detach(&self, id: PortId) -> Result<(), DatapathError>;

    /// Lets go of the port and its namespace, and leaves the interface for [`Self::adopt`]. A port that is not there is fine.
    ///
    /// # Errors
    /// When the interface can't be left; the userspace datapath always can.
    fn release(&self, id: PortId) -> Result<(), DatapathError>;

    /// Changes the tables, all of `changes` at once for every reader. Ports come and go by [`Self::attach`] and
    /// [`Self::detach`], not by this.
    fn apply(&self, changes: &[Change]);

    /// Tells the containers here that an address has another MAC than they may remember, if the tables still say so when their turn
    /// comes. Returns how many ports that is for: whoever calls it limits how often.
    fn announce(&self, announcement: Announcement) -> usize;

    /// Receives on this UDP port of the same address from now on, and no longer on the one before.
    ///
    /// # Errors
    /// See [`StartError`]; nothing is changed then.
    fn listen_on(&self, port: u16) -> Result<(), StartError>;

    /// The tables as they are now.
    fn tables(&self) -> Arc<Tables>;

    /// What has passed and what was dropped since the start.
    fn counters(&self) -> Counters;

    /// Frames that members sent here for MAC addresses that are not here. Bounded: what nobody takes is lost.
    fn misdeliveries(&self) -> Receiver<Misdelivered>;

    /// Copies frames and datagrams as they pass, with what became of them, until the capture is dropped.
    fn capture(&self, filter: CaptureFilter) -> Capture;

    /// Sends one probe, `size` bytes long as an IP packet.
    ///
    /// # Errors
    /// `EMSGSIZE` when the link or the known path carries less; `InvalidInput` when `size` is too small for a probe; else
    /// `Other`, when the kernel refused it.
    fn send_probe(&self, to: SocketAddr, nonce: Nonce, size: u16) -> io::Result<()>;

    /// Waits for probes with this nonce, until the watch is dropped.
    fn expect_probe(&self, nonce: Nonce) -> ProbeWatch;

    /// What is known of the paths to other hosts; what is written there counts from the next frame on.
    fn paths(&self) -> &Paths;

    /// How it is set up, for people and programs to read.
    fn status(&self) -> DatapathStatus;
}

/// How a datapath is set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DatapathStatus {
    /// Which datapath: `userspace`.
    pub kind: &'static str,
    /// Where it receives.
    pub listen: SocketAddr,
    /// Threads that carry frames.
    pub workers: usize,
    /// UDP source ports it sends from.
    pub source_ports: usize,
    /// Receive buffer of each worker's socket in bytes, as the kernel granted it.
    pub receive_buffer_bytes: usize,
    /// Datagrams that the kernel cuts from one message (`UDP_SEGMENT`), at most; 1 when it can't.
    pub segments_max: usize,
    /// Whether the kernel merges datagrams on receipt (`UDP_GRO`).
    pub merges_datagrams: bool,
    /// Copies of flooded frames that one port may cause.
    pub port_floods: Limit,
    /// Copies of flooded frames from one remote that may be made for ports here.
    pub remote_floods: Limit,
    /// What was said about the paths to other hosts.
    pub path_reports: Reports,
    /// What its ports can do, by backend.
    pub backends: Vec<BackendStatus>,
}

/// What one backend's ports can do, and how many there are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackendStatus {
    /// Which.
    pub backend: Backend,
    /// Ports attached with it.
    pub ports: usize,
    /// A queue for each worker.
    pub multi_queue: bool,
    /// Frames carry a vnet header.
    pub vnet_header: bool,
    /// What containers leave to the datapath, and take from it: what the kernel granted to the ports there are, all together.
    pub features: TapFeatures,
}
