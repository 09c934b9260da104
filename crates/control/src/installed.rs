//! What a host's datapath must hold of a network, what it does hold, and how the two differ.
//!
//! A manager computes the first from its rows, a host reads the second from its datapath; `towline verify` compares. First only
//! digests are compared: the digest of a set is the sum of its entries' hashes, so it needs no order, and what hosts of one
//! network must hold differs in a single entry, the host itself.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use vtep::MacAddr;

use crate::host::HostId;
use crate::row::State;
use crate::table::{MemberState, Table};

/// One thing that a datapath holds of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Entry {
    /// Frames for this MAC address go to this VTEP; the host's own where the container is here.
    Mac {
        /// The MAC address.
        mac: MacAddr,
        /// The VTEP.
        vtep: IpAddr,
    },
    /// Questions for this address are answered with this MAC address.
    Neighbor {
        /// The address.
        ip: IpAddr,
        /// The MAC address.
        mac: MacAddr,
    },
    /// This other host takes part.
    Member {
        /// Its VTEP.
        vtep: IpAddr,
        /// Whether it gets floods.
        flood: bool,
    },
}

/// The sum of entries' hashes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest(u128);

impl Digest {
    /// Counts one entry in.
    pub fn add(&mut self, entry: &Entry) {
        self.0 = self.0.wrapping_add(entry.hash());
    }

    /// The digest of these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(bytes))
    }

    /// The digest's bytes.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// Counts one entry out.
    pub fn remove(&mut self, entry: &Entry) {
        self.0 = self.0.wrapping_sub(entry.hash());
    }
}

impl<'e> FromIterator<&'e Entry> for Digest {
    fn from_iter<I: IntoIterator<Item = &'e Entry>>(entries: I) -> Self {
        let mut digest = Self::default();
        for entry in entries {
            digest.add(entry);
        }
        digest
    }
}

impl Entry {
    /// The same on every machine and in every version: a digest travels.
    fn hash(&self) -> u128 {
        let mut hash = Sha256::new();
        let mut ip = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => hash.update(ip.to_ipv6_mapped().octets()),
            IpAddr::V6(ip) => hash.update(ip.octets()),
        };
        let (kind, rest) = match self {
            Self::Mac { mac, vtep } => {
                ip(*vtep);
                (1, mac.octets().to_vec())
            }
            Self::Neighbor { ip: address, mac } => {
                ip(*address);
                (2, mac.octets().to_vec())
            }
            Self::Member { vtep, flood } => {
                ip(*vtep);
                (3, vec![u8::from(*flood)])
            }
        };
        hash.update([kind]);
        hash.update(rest);
        let hash = hash.finalize();
        let (half, _) = hash
            .split_first_chunk()
            .expect("SHA-256 has 32 bytes, half of them are 16");
        u128::from_be_bytes(*half)
    }
}

/// What every host of a network must hold, but for its own [`Entry::Member`].
#[must_use]
pub fn expected(table: &Table, vtep: impl Fn(HostId) -> Option<IpAddr>) -> BTreeSet<Entry> {
    let mut entries = BTreeSet::new();
    for row in table.rows().filter(|row| row.state == State::Up) {
        entries.insert(Entry::Neighbor {
            ip: row.ip,
            mac: row.mac,
        });
        if let Some(vtep) = table.mac_host(row.mac).and_then(&vtep) {
            entries.insert(Entry::Mac { mac: row.mac, vtep });
        }
    }
    entries.extend(table.members().filter_map(|host| {
        Some(Entry::Member {
            vtep: vtep(host)?,
            flood: table.member(host) == MemberState::Up,
        })
    }));
    entries
}

/// How a host's tables differ from what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fault {
    /// The entry should be there and is not.
    Missing,
    /// The entry is there and should not be.
    Extra,
}

/// One difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Difference {
    /// Which entry.
    #[serde(flatten)]
    pub entry: Entry,
    /// What is wrong with it.
    pub fault: Fault,
}

/// A rule for services that stands otherwise in a host's kernel than the table says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RuleDifference {
    /// The container in whose namespace it is; `None`: in the host's own.
    pub container: Option<String>,
    /// The service that it is for; `None`: all, or one that is not known.
    pub service: Option<String>,
    /// Which, in words.
    pub rule: String,
    /// What is wrong with it.
    pub fault: Fault,
}

impl RuleDifference {
    /// The same without what a terminal would act on: comments and names of rules are whatever somebody in a container wrote.
    #[must_use]
    pub fn printable(self) -> Self {
        let clean = |text: String| text.replace(char::is_control, "\u{fffd}");
        Self {
            container: self.container.map(clean),
            service: self.service.map(clean),
            rule: clean(self.rule),
            fault: self.fault,
        }
    }

    /// Bytes of all its texts.
    pub(crate) fn size(&self) -> usize {
        let names =
            [&self.container, &self.service].map(|name| name.as_ref().map_or(0, String::len));
        names.iter().sum::<usize>() + self.rule.len()
    }
}

/// All differences, an entry's missing and extra forms side by side.
#[must_use]
pub fn differences(expected: &BTreeSet<Entry>, installed: &BTreeSet<Entry>) -> Vec<Difference> {
    let missing = expected.difference(installed).map(|&entry| Difference {
        entry,
        fault: Fault::Missing,
    });
    let extra = installed.difference(expected).map(|&entry| Difference {
        entry,
        fault: Fault::Extra,
    });
    let mut all: Vec<Difference> = missing.chain(extra).collect();
    all.sort_unstable();
    all
}

/// What was found of one host in one network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "lowercase")]
pub enum Finding {
    /// The host holds exactly what it should.
    Same {
        /// How many entries.
        entries: usize,
    },
    /// It does not.
    Differs {
        /// The differences, at most [`DIFFERENCES_MAX`].
        differences: Vec<Difference>,
        /// What rules for services differ, at most as many.
        #[serde(default)]
        rules: Vec<RuleDifference>,
        /// How many there are in all.
        count: usize,
    },
    /// The host is not connected to the manager.
    Unreachable,
    /// The host is connected and did not answer in time.
    Silent,
}

/// Differences of each kind told of one host and network.
pub const DIFFERENCES_MAX: usize = 1000;
/// Bytes of one rule's texts: names of containers and services, and a comment, are far shorter.
pub(crate) const RULE_BYTES_MAX: usize = 1024;

/// One host's tables of one network, compared with the manager's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// The host's name.
    pub host: String,
    /// The host.
    pub host_id: HostId,
    /// The network's name.
    pub network: String,
    /// The network.
    pub vni: vtep::Vni,
    /// What was found.
    #[serde(flatten)]
    pub finding: Finding,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::Epoch;
    use crate::row::Row;

    fn table() -> Table {
        let mut table = Table::default();
        for n in 1..=3 {
            table.apply(
                Row {
                    ip: [10, 0, 9, n].into(),
                    epoch: Epoch::new(1, n.into()),
                    owner: HostId::from_bytes([n % 2; 16]),
                    owner_seq: 0,
                    state: if n == 3 { State::Down } else { State::Up },
                    mac: MacAddr::new([2, 0, 0, 0, 0, n]),
                    member: None,
                    names: None,
                },
                &mut Vec::new(),
            );
        }
        table
    }

    fn vtep(host: HostId) -> Option<IpAddr> {
        Some(IpAddr::from([192, 0, 2, host.as_bytes()[0]]))
    }

    #[test]
    fn what_is_up_is_expected_and_a_mask_shows() {
        let mut table = table();
        let all = expected(&table, vtep);
        assert_eq!(all.len(), 2 + 2 + 2, "{all:?}");
        table.set_masked(HostId::from_bytes([1; 16]), true, &mut Vec::new());
        let masked = expected(&table, vtep);
        let [one, other] = differences(&all, &masked)[..] else {
            panic!("the member's two forms differ")
        };
        assert_eq!((one.fault, other.fault), (Fault::Extra, Fault::Missing));
    }

    #[test]
    fn a_digest_needs_no_order_and_sees_every_field() {
        let all = expected(&table(), vtep);
        let digest: Digest = all.iter().collect();
        assert_eq!(digest, all.iter().rev().collect());
        for entry in &all {
            let mut less = digest;
            less.remove(entry);
            assert_ne!(less, digest);
            less.add(entry);
            assert_eq!(less, digest);
        }
        let mac = MacAddr::new([2, 0, 0, 0, 0, 1]);
        let (ip, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let variants = [
            Entry::Mac { mac, vtep: ip },
            Entry::Mac { mac, vtep: other },
            Entry::Neighbor { ip, mac },
            Entry::Member {
                vtep: ip,
                flood: true,
            },
            Entry::Member {
                vtep: ip,
                flood: false,
            },
        ];
        let hashes: BTreeSet<u128> = variants.iter().map(Entry::hash).collect();
        assert_eq!(hashes.len(), variants.len());
    }
}
