//! Addresses leased ahead: what a host may start endpoints from while no manager answers.
//!
//! A manager gives every host that follows a network a small block of it: addresses from the top of the range, each with its
//! epoch already issued. While a manager answers nobody uses them, and the manager takes back what it needs; cut off, a host takes
//! one for each endpoint it starts, once, and publishes it when a manager is back.
//!
//! Nobody else has an address of a block for [`LEASE_TIME`] after its host was last heard. Later a manager that runs out of others
//! hands it out again, under a higher epoch. Should the host have used it meanwhile, the higher epoch wins: what it started
//! loses its interface when a manager tells it.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vtep::MacAddr;

use crate::epoch::Epoch;
use crate::network::quote;

/// The most addresses of one network that one host is leased.
pub(crate) const BLOCK_MAX: usize = 16;
/// Of what is free, all blocks together are this part at most: one in four.
pub(crate) const BLOCKS_PART: u128 = 4;
/// How long after its host's last word a block is nobody else's.
pub const LEASE_TIME: Duration = Duration::from_secs(15);

/// One endpoint's worth of a block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leased {
    /// The allocation that it becomes.
    pub epoch: Epoch,
    /// Its MAC address.
    pub mac: MacAddr,
    /// Its addresses, one for each family of the network.
    pub ips: Vec<IpAddr>,
}

/// Why no address of a block can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// There is no need to.
    #[error("a manager answers: ask it")]
    ManagerAnswers,
    /// The network's table is not followed here.
    #[error("this host does not take part in the network with VNI {0}")]
    NotFollowed(vtep::Vni),
    /// Nothing is left.
    #[error(
        "no manager answers, and none of the addresses of network {network} that were leased to this host is left: \
         try again when a manager answers ('towline status')"
    )]
    Empty {
        /// The network's name.
        network: String,
    },
    /// What is wanted is not in the block.
    #[error(
        "no manager answers, and {ip} was not leased to this host: give another address of network {network} \
         ({}), or try again when a manager answers", list(.left)
    )]
    NotLeased {
        /// What was wanted.
        ip: IpAddr,
        /// The network's name.
        network: String,
        /// What is left.
        left: Vec<IpAddr>,
    },
}

impl LeaseError {
    pub(crate) fn empty(network: &str) -> Self {
        Self::Empty {
            network: quote(network),
        }
    }
}

fn list(ips: &[IpAddr]) -> String {
    let ips: Vec<String> = ips.iter().map(ToString::to_string).collect();
    ips.join(", ")
}
