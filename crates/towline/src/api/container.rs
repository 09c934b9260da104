//! Requests and answers that concern containers.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// What a client or a shim asks about containers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// `towline ps`.
    List {
        /// Also containers that have ended.
        all: bool,
    },
    /// `towline rm`.
    Remove {
        /// The container's name.
        name: String,
        /// Also when it runs: it is killed.
        force: bool,
    },
}

/// What the agent answers about containers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// Done, nothing to say.
    Done,
    /// To [`Request::List`].
    List(Vec<Container>),
}

/// A container as `ps` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its command and arguments.
    pub command: Vec<String>,
    /// `running` or `exited`.
    pub state: String,
    /// Process id of its first process while it runs.
    pub pid: Option<u32>,
    /// Exit code of an ended one.
    pub exit_code: Option<i32>,
    /// Seconds since 1970 when it was started.
    pub created: u64,
    /// Its places in networks.
    pub endpoints: Vec<Place>,
}

/// A container's place in one network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Place {
    /// The network's name.
    pub network: String,
    /// The interface inside the container.
    pub interface: String,
    /// The MAC address.
    pub mac: String,
    /// The addresses.
    pub ips: Vec<IpAddr>,
}
