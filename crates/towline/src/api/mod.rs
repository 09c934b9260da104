//! What a client asks the agent and what it answers: one JSON value a line.
//!
//! The answers are also what `--json` prints, so their shape is stable and
//! written down in `docs/json.md`. Addresses, MACs and ids are strings.

pub(crate) mod capture;
mod cluster;
pub(crate) mod container;
pub(crate) mod mount;
pub(crate) mod names;
mod network;
pub(crate) mod service;
mod status;
pub(crate) mod volume;

use std::collections::BTreeMap;
use std::path::PathBuf;

use control::events;
use control::installed::Verified;
use serde::{Deserialize, Serialize};

pub(crate) use cluster::{
    CaExported, Host, Init, Initialized, Join, JoinToken, Joined, TokenWanted, Update,
};
pub(crate) use network::{Endpoint, Network, NetworkCreate, NetworkSummary, Peer, Subnet, Usage};
pub(crate) use status::{
    ClusterStatus, FdbEntry, Passed, PortTraffic, RemoteTraffic, StaticSource, Status,
};

/// What a client asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// `towline status`.
    Status,
    /// `towline init`.
    Init(Init),
    /// `towline join`.
    Join(Join),
    /// `towline leave`.
    Leave {
        /// Also when containers run or other hosts depend on this manager.
        force: bool,
    },
    /// `towline network create`.
    NetworkCreate(NetworkCreate),
    /// `towline network ls`.
    NetworkList,
    /// `towline network inspect`: by name or id.
    NetworkInspect(String),
    /// `towline network rm`.
    NetworkRemove {
        /// Its name or id.
        name: String,
        /// An unknown network is no error.
        force: bool,
    },
    /// `towline network prune`: those of these ids that nobody uses.
    NetworkPrune(Vec<String>),
    /// `towline host ls`.
    HostList,
    /// `towline host update`.
    HostUpdate {
        /// Its name or id.
        host: String,
        /// Labels to be added, or to get another value.
        add: BTreeMap<String, String>,
        /// Keys of labels to be taken away.
        remove: Vec<String>,
    },
    /// `towline host rm`.
    HostRemove {
        /// Its name or id.
        host: String,
        /// Also when it is connected.
        force: bool,
    },
    /// `towline promote`.
    Promote,
    /// `towline token`.
    Token(TokenWanted),
    /// `towline ca export`: to this file.
    CaExport(PathBuf),
    /// `towline update`.
    Update(Update),
    /// `towline fdb`.
    Fdb {
        /// Only this network, by name or id.
        network: Option<String>,
    },
    /// `towline resolve`.
    Resolve(names::Resolve),
    /// `towline events`: what happened from there on. The answer waits a few seconds for something to tell.
    Events(events::From),
    /// `towline verify`.
    Verify {
        /// Only this network, by name or id.
        network: Option<String>,
    },
    /// `towline capture`: the answer is [`Response::Capturing`] and a stream.
    Capture(capture::Capture),
    /// All that concerns services.
    Service(service::Request),
    /// All that concerns volumes.
    Volume(volume::Request),
    /// All that concerns containers.
    Container(container::Request),
}

/// The line sent back.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// Done.
    Ok(Response),
    /// Not done; one line for a person.
    Error(String),
}

/// What the agent answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Response {
    /// Done, nothing to say.
    Done,
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Init`].
    Initialized(Initialized),
    /// To [`Request::Join`].
    Joined(Joined),
    /// To [`Request::Token`].
    Token(JoinToken),
    /// To [`Request::CaExport`].
    CaExported(CaExported),
    /// To [`Request::NetworkCreate`] and [`Request::NetworkInspect`].
    Network(Box<Network>),
    /// To [`Request::NetworkList`].
    Networks(Vec<NetworkSummary>),
    /// To [`Request::NetworkPrune`]: names of those that were removed.
    Pruned(Vec<String>),
    /// To [`Request::HostList`], and to [`Request::Update`] as far as the hosts have followed.
    Hosts(Vec<Host>),
    /// To [`Request::Fdb`].
    Fdb(Vec<FdbEntry>),
    /// To [`Request::Resolve`].
    Resolved(names::Resolved),
    /// To [`Request::Events`].
    Events(events::Told),
    /// To [`Request::Verify`].
    Verified(Vec<Verified>),
    /// To [`Request::Capture`]; [`capture::Event`]s follow.
    Capturing,
    /// To [`Request::Service`].
    Service(service::Response),
    /// To [`Request::Volume`].
    Volume(volume::Response),
    /// To [`Request::Container`].
    Container(container::Response),
}
