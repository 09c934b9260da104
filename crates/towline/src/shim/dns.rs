//! Whom a container asks for names that are none of the cluster's, in the words of resolv.conf(5).

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Where programs look for them, in a container and on a host.
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Servers, search list and options.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Dns {
    /// Servers, in the order in which they are asked; of a container none: the host's.
    #[serde(default)]
    pub(crate) servers: Vec<IpAddr>,
    /// Domains that are tried behind a name; of a container none: the host's, and `.` alone: none at all.
    #[serde(default)]
    pub(crate) search: Vec<String>,
    /// Options of the resolver; of a container none: the host's.
    #[serde(default)]
    pub(crate) options: Vec<String>,
}

impl Dns {
    /// Whether a name without a dot is to be asked for nowhere else, because `ndots` says that names of other servers have more
    /// of them; `None`: nothing is said.
    pub(crate) fn keeps_single(&self) -> Option<bool> {
        let dots = self.options.iter().rev();
        let mut dots = dots.filter_map(|option| option.strip_prefix("ndots:"));
        dots.next()
            .map(|dots| dots.parse::<u8>().is_ok_and(|dots| dots > 0))
    }
}
