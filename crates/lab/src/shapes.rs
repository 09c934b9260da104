//! The parts that a lab needs of what `towline … --json` prints; the rest is passed over.

use std::net::IpAddr;

use serde::Deserialize;

/// `towline init --json`.
#[derive(Debug, Deserialize)]
pub(crate) struct Initialized {
    pub(crate) token: String,
}

/// One network of `towline network inspect`.
#[derive(Debug, Deserialize)]
pub(crate) struct Network {
    pub(crate) endpoints: Vec<Endpoint>,
}

/// One container's place in a network.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Endpoint {
    pub(crate) container: String,
    pub(crate) host: String,
    pub(crate) mac: String,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) state: String,
}

/// One line of `towline fdb --json`.
#[derive(Debug, Deserialize)]
pub(crate) struct FdbEntry {
    pub(crate) mac: String,
}

/// One line of `towline ps --json`.
#[derive(Debug, Deserialize)]
pub(crate) struct Container {
    pub(crate) name: String,
    pub(crate) state: String,
    pub(crate) endpoints: Vec<Place>,
}

/// A container's place in one network.
#[derive(Debug, Deserialize)]
pub(crate) struct Place {
    pub(crate) ips: Vec<IpAddr>,
}
