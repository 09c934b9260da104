//! Why a datapath could not start: each cause by name, with what to do.

use std::io;
use std::net::{IpAddr, SocketAddr};

use netns::{Netns, NetnsError};

use crate::tap::TapError;
use crate::udp::{PortHolder, find_holder};

/// Why a datapath could not start. Nothing on the host was changed.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No TAP can be made here: no `/dev/net/tun`, or no right to use it.
    #[error(transparent)]
    Tap(TapError),
    /// Not root.
    #[error("carrying frames needs CAP_NET_ADMIN: run as root")]
    NotPermitted,
    /// Somebody else has the port.
    #[error("UDP port {port} on {address} is taken by {holder}")]
    PortTaken {
        /// The VTEP's address.
        address: IpAddr,
        /// The port.
        port: u16,
        /// Who has it.
        holder: PortHolder,
    },
    /// The VTEP address is not this host's.
    #[error("{0} is no address of this host: choose one that `ip address` shows")]
    NoSuchAddress(IpAddr),
    /// The host's namespace could not be entered.
    #[error("can't enter the host's network namespace")]
    Namespace(#[source] NetnsError),
    /// The kernel refused the sockets.
    #[error("can't open UDP sockets on {address}")]
    Sockets {
        /// Address and port.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused a thread or what it waits with.
    #[error("can't start the datapath's threads")]
    Threads(#[source] io::Error),
}

impl StartError {
    /// Sorts what the kernel says to opening the sockets.
    pub(super) fn from_sockets(netns: &Netns, address: SocketAddr, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::AddrInUse => {
                let holder = find_holder(netns, address.ip(), address.port());
                Self::PortTaken {
                    address: address.ip(),
                    port: address.port(),
                    holder,
                }
            }
            io::ErrorKind::AddrNotAvailable => Self::NoSuchAddress(address.ip()),
            io::ErrorKind::PermissionDenied => Self::NotPermitted,
            _ => Self::Sockets { address, source },
        }
    }
}
