//! Encapsulates and decapsulates Ethernet frames in VXLAN over UDP, and decides where each goes.
//!
//! A VTEP is a switch: its ports are containers' interfaces on one side and tunnels on the other.
//!
//! ```text
//! out   tap.recv ─► engine.handle_frame ─► verdict ─► header in the headroom ─► underlay.send
//! in    underlay.recv ─► engine.handle_datagram ─► verdict ─► tap.send
//! ```
//!
//! - [`engine`] decides: a frame or a datagram in, a [`engine::Verdict`] out; no socket, no clock, nothing learned.
//! - [`fdb`] holds what it decides by: immutable [`fdb::Tables`], replaced whole by one [`fdb::TableWriter`].
//! - [`edge`] has the two seams, [`edge::Tap`] and [`edge::Underlay`]; [`tap`] and [`udp`] are the only files that
//!   call the kernel for packets, and `testing` has a twin in memory for each.
//! - [`worker`] joins an engine with its edges on one thread; [`datapath`] starts the workers and creates ports.
//! - [`paths`] knows what the way to each host carries where that is less than the link does; [`too_big`] tells containers.
//! - [`stats`] names every reason to drop and counts it.
//!
//! This crate does not know managers, containers, Docker, NAT or names: whoever uses it hands it tables.

pub mod announce;
pub mod arp;
pub mod budget;
pub mod capture;
pub mod datapath;
pub mod edge;
pub mod engine;
pub mod ethernet;
pub mod fdb;
pub mod flow;
pub mod frame;
pub mod guard;
mod icmp;
pub mod ip;
mod mac;
pub mod misdelivery;
pub mod nd;
pub mod neighbor;
pub mod offload;
pub mod paths;
pub mod probe;
pub mod settings;
mod sharded;
pub mod stats;
pub mod tap;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod too_big;
pub mod traffic_class;
pub mod udp;
mod vni;
pub mod vxlan;
pub mod worker;

pub use mac::{MacAddr, MacAddrError};
pub use vni::{Vni, VniError};
