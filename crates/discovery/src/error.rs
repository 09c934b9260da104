//! What can go wrong where a plan is put in place.

use netns::{NetfilterError, NetlinkError, NetnsError};

/// Why the kernel's rules for services could not be changed. What stood before stands as far as it can be told; the next attempt
/// makes all anew.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// nftables or conntrack refused.
    #[error("can't change the rules for services in {place}: {cause}")]
    Netfilter {
        /// The namespace.
        place: String,
        /// What the kernel said.
        #[source]
        cause: NetfilterError,
    },
    /// nftables has no hook for what leaves an interface.
    #[error(
        "{place} can't be a member of a service with published ports: this kernel lacks nf_tables' egress hook (Linux 5.16, \
         CONFIG_NETFILTER_EGRESS); run members on another host: {cause}"
    )]
    NoEgress {
        /// The namespace.
        place: String,
        /// What the kernel said.
        #[source]
        cause: NetfilterError,
    },
    /// Routes, rules of routing or neighbours were refused.
    #[error("can't change the way of services' replies in {place}: {cause}")]
    Netlink {
        /// The namespace.
        place: String,
        /// What the kernel said.
        #[source]
        cause: NetlinkError,
    },
    /// The namespace could not be entered, or a setting of it not be changed.
    #[error("can't set up {place} for services: {cause}")]
    Namespace {
        /// The namespace.
        place: String,
        /// What went wrong.
        #[source]
        cause: NetnsError,
    },
}
