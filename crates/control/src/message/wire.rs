//! The declarations, as a `.proto` file would hold them. Tags are never used twice.

use bytes::Bytes;
use prost::{Message, Oneof};

#[derive(Clone, PartialEq, Message)]
pub(super) struct ToManager {
    #[prost(
        oneof = "to_manager::Kind",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 40, 48, 49"
    )]
    pub(super) kind: Option<to_manager::Kind>,
}

pub(super) mod to_manager {
    #[derive(Clone, PartialEq, super::Oneof)]
    pub(crate) enum Kind {
        #[prost(message, tag = "1")]
        Hello(super::Hello),
        #[prost(message, tag = "2")]
        Heartbeat(super::Empty),
        #[prost(message, tag = "3")]
        Subscribe(super::Subscribe),
        #[prost(message, tag = "4")]
        Unsubscribe(super::Network),
        #[prost(message, tag = "5")]
        Publish(super::Publish),
        #[prost(message, tag = "6")]
        Call(super::Call),
        #[prost(message, tag = "7")]
        Installed(super::Installed),
        #[prost(message, tag = "8")]
        Misdelivered(super::Misdelivered),
        #[prost(message, tag = "9")]
        Confirm(super::Confirm),
        #[prost(message, tag = "16")]
        Join(super::Join),
        #[prost(message, tag = "17")]
        Peer(super::Peer),
        #[prost(message, tag = "40")]
        Lease(super::Held),
        #[prost(message, tag = "48")]
        Applied(super::Applied),
        #[prost(message, tag = "49")]
        Offer(super::Offer),
    }
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ToAgent {
    #[prost(
        oneof = "to_agent::Kind",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 40, 48, 49"
    )]
    pub(super) kind: Option<to_agent::Kind>,
}

pub(super) mod to_agent {
    #[derive(Clone, PartialEq, super::Oneof)]
    pub(crate) enum Kind {
        #[prost(message, tag = "1")]
        Welcome(super::Welcome),
        #[prost(message, tag = "2")]
        Reject(super::Reject),
        #[prost(message, tag = "3")]
        Heartbeat(super::Empty),
        #[prost(message, tag = "4")]
        Hosts(super::Hosts),
        #[prost(message, tag = "5")]
        Owned(super::Owned),
        #[prost(message, tag = "6")]
        Network(super::Json),
        #[prost(message, tag = "7")]
        NetworkRemoved(super::Network),
        #[prost(message, tag = "8")]
        Rows(super::Rows),
        #[prost(message, tag = "9")]
        RowLost(super::RowLost),
        #[prost(message, tag = "10")]
        Reply(super::Reply),
        #[prost(message, tag = "11")]
        Inspect(super::Inspect),
        #[prost(message, tag = "12")]
        Misdelivered(super::Misdelivered),
        #[prost(message, tag = "13")]
        Corrections(super::Corrections),
        #[prost(message, tag = "16")]
        Joined(super::Joined),
        #[prost(message, tag = "17")]
        Peer(super::Peer),
        #[prost(message, tag = "40")]
        Lease(super::Block),
        #[prost(message, tag = "48")]
        Services(super::Services),
        #[prost(message, tag = "49")]
        Ingress(super::Ingress),
    }
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Empty {}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Hello {
    #[prost(uint32, tag = "1")]
    pub(super) version: u32,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) host: Vec<u8>,
    #[prost(fixed64, tag = "4")]
    pub(super) last_epoch: u64,
}

/// No `Debug`: it would show the secret.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub(crate) struct Join {
    #[prost(uint32, tag = "1")]
    pub(super) version: u32,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) secret: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) request: Vec<u8>,
}

impl std::fmt::Debug for Join {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Join")
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Peer {
    #[prost(uint32, tag = "1")]
    pub(super) version: u32,
    #[prost(uint32, tag = "2")]
    pub(super) generation: u32,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) manager: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Joined {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) certificate: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) ca: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Subscribe {
    #[prost(uint32, tag = "1")]
    pub(super) vni: u32,
    #[prost(uint32, tag = "2")]
    pub(super) generation: u32,
    #[prost(uint64, tag = "3")]
    pub(super) revision: u64,
    #[prost(bytes = "vec", optional, tag = "4")]
    pub(super) network: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Network {
    #[prost(uint32, tag = "1")]
    pub(super) vni: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Publish {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) endpoint: Vec<u8>,
    #[prost(uint32, tag = "2")]
    pub(super) owner_seq: u32,
    #[prost(bool, tag = "3")]
    pub(super) up: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Call {
    #[prost(uint64, tag = "1")]
    pub(super) id: u64,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) request: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Welcome {
    #[prost(string, tag = "1")]
    pub(super) cluster: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) manager: Vec<u8>,
    #[prost(uint32, tag = "3")]
    pub(super) heartbeat_ms: u32,
    #[prost(string, repeated, tag = "4")]
    pub(super) warnings: Vec<String>,
    #[prost(fixed64, tag = "5")]
    pub(super) last_epoch: u64,
    #[prost(uint32, optional, tag = "6")]
    pub(super) ingress: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Held {
    #[prost(uint32, tag = "1")]
    pub(super) vni: u32,
    #[prost(fixed64, repeated, tag = "2")]
    pub(super) epochs: Vec<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Block {
    #[prost(uint32, tag = "1")]
    pub(super) vni: u32,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(super) leased: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Reject {
    #[prost(string, tag = "1")]
    pub(super) reason: String,
    #[prost(bool, tag = "2")]
    pub(super) removed: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Hosts {
    #[prost(bool, tag = "1")]
    pub(super) full: bool,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(super) hosts: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub(super) removed: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Owned {
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub(super) endpoints: Vec<Vec<u8>>,
    #[prost(string, repeated, tag = "2")]
    pub(super) names: Vec<String>,
    #[prost(bool, tag = "3")]
    pub(super) last: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Json {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) json: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Rows {
    #[prost(uint32, tag = "1")]
    pub(super) vni: u32,
    #[prost(uint32, tag = "2")]
    pub(super) generation: u32,
    #[prost(uint64, tag = "3")]
    pub(super) from: u64,
    #[prost(uint64, tag = "4")]
    pub(super) to: u64,
    #[prost(uint32, tag = "5")]
    pub(super) part: u32,
    #[prost(bool, tag = "6")]
    pub(super) last: bool,
    #[prost(bool, tag = "7")]
    pub(super) settled: bool,
    #[prost(message, repeated, tag = "8")]
    pub(super) rows: Vec<Row>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Row {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) ip: Vec<u8>,
    #[prost(fixed64, tag = "2")]
    pub(super) epoch: u64,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) owner: Vec<u8>,
    #[prost(uint32, tag = "4")]
    pub(super) owner_seq: u32,
    #[prost(uint32, tag = "5")]
    pub(super) state: u32,
    #[prost(bytes = "vec", tag = "6")]
    pub(super) mac: Vec<u8>,
    #[prost(message, optional, tag = "7")]
    pub(super) member: Option<Member>,
    #[prost(message, optional, tag = "8")]
    pub(super) names: Option<Names>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Names {
    #[prost(string, tag = "1")]
    pub(super) container: String,
    #[prost(string, tag = "2")]
    pub(super) id: String,
    #[prost(string, repeated, tag = "3")]
    pub(super) aliases: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Member {
    #[prost(fixed64, tag = "1")]
    pub(super) service: u64,
    #[prost(uint32, tag = "2")]
    pub(super) weight: u32,
    #[prost(bool, tag = "3")]
    pub(super) serving: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct RowLost {
    #[prost(uint32, tag = "1")]
    pub(super) vni: u32,
    #[prost(fixed64, tag = "2")]
    pub(super) epoch: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Reply {
    #[prost(uint64, tag = "1")]
    pub(super) id: u64,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) part: Bytes,
    #[prost(bool, tag = "3")]
    pub(super) last: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Inspect {
    #[prost(uint64, tag = "1")]
    pub(super) id: u64,
    #[prost(uint32, tag = "2")]
    pub(super) vni: u32,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) digest: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Installed {
    #[prost(uint64, tag = "1")]
    pub(super) id: u64,
    #[prost(uint32, tag = "2")]
    pub(super) vni: u32,
    #[prost(bool, tag = "3")]
    pub(super) same: bool,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) entries: Vec<u8>,
    #[prost(bool, tag = "5")]
    pub(super) last: bool,
    #[prost(bytes = "vec", tag = "6")]
    pub(super) rules: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Misdelivered {
    #[prost(uint32, tag = "1")]
    pub(super) vni: u32,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) mac: Vec<u8>,
    /// Empty towards an agent: it is the sender itself.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) from: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Confirm {
    #[prost(uint32, tag = "1")]
    pub(super) vni: u32,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) mac: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub(super) ips: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Corrections {
    #[prost(uint32, tag = "1")]
    pub(super) vni: u32,
    #[prost(message, repeated, tag = "2")]
    pub(super) rows: Vec<Row>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Services {
    #[prost(uint32, tag = "1")]
    pub(super) vni: u32,
    #[prost(bool, tag = "2")]
    pub(super) full: bool,
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub(super) services: Vec<Vec<u8>>,
    #[prost(fixed64, repeated, tag = "4")]
    pub(super) removed: Vec<u64>,
    #[prost(bool, tag = "5")]
    pub(super) last: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Offer {
    #[prost(uint32, tag = "1")]
    pub(super) vni: u32,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(super) services: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Ingress {
    #[prost(uint32, optional, tag = "1")]
    pub(super) vni: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Applied {
    #[prost(uint32, tag = "1")]
    pub(super) vni: u32,
    #[prost(uint32, tag = "2")]
    pub(super) generation: u32,
    #[prost(uint64, tag = "3")]
    pub(super) revision: u64,
}
