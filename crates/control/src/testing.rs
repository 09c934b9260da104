//! For tests and fuzz targets: hosts, a datapath in memory, which shows what becomes of one that is told of changes alone, and the file
//! of cached tables without a file.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use vtep::MacAddr;

use crate::cache;
use crate::host::{HostId, HostInfo};
use crate::message::ToAgent;
use crate::names::Names;
use crate::table::{Backend, MemberState, Table, TableChange};

/// An ordinary host `hN` as it joins: with VXLAN's own port, Ethernet's MTU, for the first time.
#[must_use]
pub fn host_info(id: HostId, number: u16, vtep: impl Into<IpAddr>) -> HostInfo {
    HostInfo {
        id,
        name: format!("h{number}"),
        vtep: vtep.into(),
        port: 4789,
        link_mtu: 1500,
        incarnation: 1,
    }
}

/// One network as a datapath has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// Who answers for an address.
    pub neighbors: BTreeMap<IpAddr, MacAddr>,
    /// Where a MAC address is.
    pub macs: BTreeMap<MacAddr, HostId>,
    /// Hosts that take part, and whether floods go to them.
    pub members: BTreeMap<HostId, bool>,
    /// Members of services.
    pub backends: BTreeMap<IpAddr, Backend>,
    /// What containers are called.
    pub names: BTreeMap<IpAddr, Arc<Names>>,
}

impl Installed {
    /// What a datapath has that is given the whole table at once.
    #[must_use]
    pub fn from_table(table: &Table) -> Self {
        let mut installed = Self::default();
        installed.apply(&table.as_changes());
        installed
    }

    /// Does as it is told.
    pub fn apply(&mut self, changes: &[TableChange]) {
        for change in changes {
            match *change {
                TableChange::Names {
                    ip,
                    names: Some(ref names),
                } => {
                    self.names.insert(ip, Arc::clone(names));
                }
                TableChange::Names { ip, names: None } => {
                    self.names.remove(&ip);
                }
                TableChange::Neighbor { ip, mac: Some(mac) } => {
                    self.neighbors.insert(ip, mac);
                }
                TableChange::Neighbor { ip, mac: None } => {
                    self.neighbors.remove(&ip);
                }
                TableChange::Mac {
                    mac,
                    host: Some(host),
                } => {
                    self.macs.insert(mac, host);
                }
                TableChange::Mac { mac, host: None } => {
                    self.macs.remove(&mac);
                }
                TableChange::Member {
                    host,
                    state: MemberState::Absent,
                } => {
                    self.members.remove(&host);
                }
                TableChange::Member { host, state } => {
                    self.members.insert(host, state == MemberState::Up);
                }
                TableChange::Backend {
                    ip,
                    backend: Some(backend),
                } => {
                    self.backends.insert(ip, backend);
                }
                TableChange::Backend { ip, backend: None } => {
                    self.backends.remove(&ip);
                }
            }
        }
    }
}

/// What a file of cached tables holds that has these messages, each as its bytes.
#[must_use]
pub fn cache_file(messages: Vec<Bytes>) -> Vec<u8> {
    cache::whole(messages.into_iter()).into()
}

/// The messages in a file of cached tables up to the first that is not whole, and where that one begins.
#[must_use]
pub fn cached_messages(file: &[u8]) -> (Vec<ToAgent>, usize) {
    cache::parse(file)
}
