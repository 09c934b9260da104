//! A row: one address of one network, as a register that only newer news overwrites.

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vtep::MacAddr;

use crate::epoch::Epoch;
use crate::host::HostId;
use crate::names::Names;
use crate::service::Membership;

/// What stands behind an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The endpoint takes frames.
    Up,
    /// The endpoint is allocated and takes none, yet or any more.
    Down,
    /// Nobody has the address. Kept as long as the network, so that no older news can bring its last holder back.
    Free,
}

/// One address of a network. The key is (network, [`Row::ip`]); the network is known from where the row stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The address.
    pub ip: IpAddr,
    /// Which allocation (or release) this is: a higher one always wins.
    pub epoch: Epoch,
    /// The host whose endpoint it is, or was.
    pub owner: HostId,
    /// Orders the owner's own edits within one epoch.
    pub owner_seq: u32,
    /// What stands behind the address.
    pub state: State,
    /// The endpoint's MAC address.
    pub mac: MacAddr,
    /// Which service the endpoint is a member of, by its owner's word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<Membership>,
    /// What the endpoint's container is called, by its owner's word.
    #[serde(
        default,
        with = "crate::names::shared",
        skip_serializing_if = "Option::is_none"
    )]
    pub names: Option<Arc<Names>>,
}

impl Row {
    /// Whether this row must replace `other`: by epoch only, then by the order of edits of the same owner.
    #[must_use]
    pub fn supersedes(&self, other: &Self) -> bool {
        self.epoch > other.epoch
            || self.epoch == other.epoch
                && self.owner == other.owner
                && self.owner_seq > other.owner_seq
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(epoch: u64, owner: u8, owner_seq: u32) -> Row {
        Row {
            ip: [10, 0, 9, 2].into(),
            epoch: Epoch::new(1, epoch),
            owner: HostId::from_bytes([owner; 16]),
            owner_seq,
            state: State::Up,
            mac: MacAddr::new([2, 0, 10, 0, 9, 2]),
            member: None,
            names: None,
        }
    }

    #[test]
    fn epoch_decides_then_the_owners_own_order() {
        assert!(row(2, 1, 0).supersedes(&row(1, 2, 9)));
        assert!(!row(1, 1, 9).supersedes(&row(2, 1, 0)));
        assert!(row(1, 1, 2).supersedes(&row(1, 1, 1)));
        assert!(!row(1, 1, 1).supersedes(&row(1, 1, 1)));
        // Nobody but the owner edits a row of its epoch.
        assert!(!row(1, 2, 9).supersedes(&row(1, 1, 1)));
    }
}
