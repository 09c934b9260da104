//! `towline capture`: after the answer, the agent sends one [`Event`] a line.
//!
//! A [`Event::Seen`] is followed by as many bytes as its `length` says, as they are. The client ends the capture by closing
//! its side for writing; the agent then sends what waits no more, and [`Event::End`].

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// What is to be captured: what fits all that is given.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Capture {
    /// A container by name or id, or a port by number.
    pub(crate) port: Option<String>,
    /// A VTEP.
    pub(crate) remote: Option<IpAddr>,
    /// A network, by name or id.
    pub(crate) network: Option<String>,
    /// End after so many.
    pub(crate) count: Option<u64>,
}

/// One line of the stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Event {
    /// A frame or datagram; its bytes follow the line.
    Seen(Box<Seen>),
    /// The last line.
    End(End),
}

/// One captured frame or datagram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// Nanoseconds since 1970.
    pub(crate) time_ns: u64,
    /// Where it passed.
    pub(crate) place: Place,
    /// What it passed: the pcapng interface's name.
    pub(crate) interface: String,
    /// The container or the remote host on the other side.
    pub(crate) peer: String,
    /// The network's name; none without a valid VXLAN header.
    pub(crate) network: Option<String>,
    /// The VNI; none without a valid VXLAN header.
    pub(crate) vni: Option<u32>,
    /// What became of it, for people.
    pub(crate) verdict: String,
    /// The drop reason's name, where it was dropped.
    pub(crate) reason: Option<String>,
    /// Where the inner frame begins in the bytes; none without one.
    pub(crate) frame_at: Option<usize>,
    /// Bytes that follow: at a port the frame, at the underlay the outer IP packet.
    pub(crate) length: usize,
}

/// Where it passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Place {
    /// A container sent it.
    FromPort,
    /// For a container.
    ToPort,
    /// A remote host sent it.
    FromRemote,
    /// For a remote host.
    ToRemote,
}

impl Place {
    /// Whether it is a datagram of the underlay.
    pub(crate) const fn is_outer(self) -> bool {
        matches!(self, Self::FromRemote | Self::ToRemote)
    }

    /// Whether it came in, as the VTEP sees it.
    pub(crate) const fn is_inbound(self) -> bool {
        matches!(self, Self::FromPort | Self::FromRemote)
    }
}

/// How a capture ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct End {
    /// Sent.
    pub(crate) captured: u64,
    /// Not sent, because they came faster than they were read.
    pub(crate) missed: u64,
    /// Whether this host left its cluster, or its agent was stopped.
    pub(crate) left: bool,
}
