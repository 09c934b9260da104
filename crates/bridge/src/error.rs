//! What can go wrong, in words for the operator.

use std::fmt;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use netns::{NetfilterError, NetlinkError, NetnsError};

use crate::BRIDGE_NAME;

/// Why something could not be done with the gateway bridge.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// The kernel refused a change of links, addresses or routes.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The kernel refused a change of our packet filter or of connections.
    #[error(transparent)]
    Netfilter(#[from] NetfilterError),
    /// A namespace or a setting in it cannot be reached.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A program that is needed is not installed.
    #[error("the program {program} is missing: install the {package} package")]
    MissingProgram {
        /// The program.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A program could not be started.
    #[error("cannot run {program}: {cause}")]
    Run {
        /// The program with its arguments.
        program: String,
        /// Why not.
        cause: io::Error,
    },
    /// A program said no.
    #[error("{program} failed: {said}")]
    Failed {
        /// The program with its arguments.
        program: String,
        /// What it wrote, in one line.
        said: String,
    },
    /// An interface of our name is somebody else's.
    #[error("the interface {0} exists and is not ours: rename or remove it (`ip link delete {0}`)")]
    NotOurs(String),
    /// The bridge stands with another subnet than the one asked for.
    #[error(
        "{BRIDGE_NAME} stands with {standing}, not with {wanted}, and containers are joined to it: \
         remove them, then start the agent with the other subnet"
    )]
    OtherSubnet {
        /// Its address now.
        standing: IpNet,
        /// The subnet asked for.
        wanted: IpNet,
    },
    /// The subnet asked for overlaps a route of the host.
    #[error(
        "the gateway subnet {wanted} overlaps this host's route to {route}: choose another subnet"
    )]
    Overlap {
        /// The subnet asked for.
        wanted: IpNet,
        /// The route.
        route: IpNet,
    },
    /// The subnet asked for cannot serve.
    #[error("the gateway subnet {wanted} cannot be used: {reason}")]
    BadSubnet {
        /// The subnet asked for.
        wanted: IpNet,
        /// Why not, and what would do.
        reason: &'static str,
    },
    /// Each /16 of 172.16.0.0/12 overlaps a route of the host.
    #[error(
        "no /16 of 172.16.0.0/12 is free of this host's routes: set the gateway bridge's subnet"
    )]
    NoFreeSubnet,
    /// No address is left for one more container.
    #[error(
        "all {in_use} addresses of the gateway subnet {subnet} are in use: remove containers, or choose a larger subnet"
    )]
    Exhausted {
        /// The subnet.
        subnet: IpNet,
        /// How many containers hold an address.
        in_use: usize,
    },
    /// An address that a container had before is held by another, or outside the subnet.
    #[error("the address {address} cannot be given to {host_ifname}: it is {reason}")]
    Unavailable {
        /// The address.
        address: IpAddr,
        /// The port it was asked for.
        host_ifname: String,
        /// Taken, or outside the subnet.
        reason: &'static str,
    },
    /// A port of this host leads to another container already.
    #[error(
        "Bind for {port} failed: port is already allocated (to {holder}): choose another host port, or remove that container"
    )]
    PortTaken {
        /// The port, with where it was to be open.
        port: String,
        /// Whose it is.
        holder: String,
    },
    /// A port was to be open on ::1.
    #[error("cannot publish {0}: answers to ::1 find no way back from a container; use 127.0.0.1")]
    Localhost(String),
    /// A port was published for a container that is not joined.
    #[error("cannot publish ports for {0}: it is not joined to {BRIDGE_NAME}")]
    NotAttached(String),
    /// Random bytes for an IPv6 subnet could not be read.
    #[error("cannot read random bytes for an IPv6 subnet: {0}")]
    Random(io::Error),
}

/// Everything that went wrong while all else was done.
#[derive(Debug)]
pub struct BridgeErrors(pub Vec<BridgeError>);

impl BridgeErrors {
    /// `Ok` when nothing went wrong.
    pub(crate) fn none_or(errors: Vec<BridgeError>) -> Result<(), Self> {
        if errors.is_empty() {
            Ok(())
        } else {
            Err(Self(errors))
        }
    }
}

impl fmt::Display for BridgeErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if index == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl std::error::Error for BridgeErrors {}
