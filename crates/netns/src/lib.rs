//! Network namespaces and what stands in them: links, addresses, routes and their rules,
//! neighbours, packet filters, connections, sysctls.
//!
//! - [`Netns`] names, makes and removes namespaces as `ip netns` does, and runs a closure inside one on a thread of its
//!   own, so that the caller can never be left in the wrong one.
//! - [`Netlink`] is a blocking rtnetlink socket bound to the namespace it was opened in.
//! - [`NetfilterSocket`] is the same for the packet filter and the connection table: [`nftables`], [`conntrack`].
//! - [`TcpSockets`] are the TCP sockets of a namespace.
//! - [`sysctl`] reads and writes `/proc/sys` of a namespace.
//!
//! What this crate does NOT do: it knows nothing of overlays, bridges' purposes or containers, runs no program (no `ip`,
//! no `nft`), and decides about no packet. It keeps no state: whatever it made is found again by name.
//!
//! A [`Netns`], a [`Netlink`] and a [`NetfilterSocket`] are open files of a namespace, and an open file keeps its namespace alive: drop them
//! when the namespace's owner ends.

mod addresses;
pub mod conntrack;
mod links;
mod namespace;
mod neighbors;
mod netfilter;
mod netlink;
pub mod nftables;
mod routes;
mod rules;
mod sockets;
pub mod sysctl;

pub use addresses::Address;
pub use links::{Link, Vxlan};
pub use namespace::{Netns, NetnsError};
pub use netfilter::{NetfilterError, NetfilterSocket};
pub use netlink::{Netlink, NetlinkError};
pub use routes::Route;
pub use rules::{Hop, Rule, TableRoute};
pub use sockets::{TcpConnection, TcpSockets};
