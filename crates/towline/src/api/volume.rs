//! Requests and answers that concern volumes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a client asks about volumes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// `towline volume create`; one that exists already is no error.
    Create {
        /// Its name; none: a random one.
        name: Option<String>,
        /// Its labels.
        labels: BTreeMap<String, String>,
    },
    /// `towline volume ls`, `inspect` and `prune`.
    List,
    /// `towline volume rm`.
    Remove {
        /// Its name.
        name: String,
        /// One that does not exist is no error.
        force: bool,
    },
}

/// What the agent answers about volumes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Response {
    /// To [`Request::Create`]: its name.
    Created(String),
    /// To [`Request::List`], by name.
    List(Vec<Volume>),
    /// To [`Request::Remove`]: whether there was one.
    Removed(bool),
}

/// A volume as `volume inspect` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Volume {
    /// Its name.
    pub(crate) name: String,
    /// `local`: a folder of this host.
    pub(crate) driver: String,
    /// `local`: other hosts have no part in it.
    pub(crate) scope: String,
    /// Where its content is on this host.
    pub(crate) mountpoint: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// Its labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// It was made for a container that asked for none by name.
    pub(crate) anonymous: bool,
    /// The containers that have it, ended ones too.
    pub(crate) containers: Vec<User>,
}

/// A container that has a volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct User {
    /// Its id.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
}
