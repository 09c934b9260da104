//! The gateway bridge of a host: its containers' way out.
//!
//! ```text
//!   container netns                    host netns
//!  ┌───────────────┐        ┌──────────────────────────────────────────┐
//!  │ eth0  overlay │        │        towline_gwbr 172.31.0.1/16, ULA   │
//!  │ eth1 ─────────┼─ veth ─┼─ port (isolated) ──┘                     │
//!  │ default route │        │   routed, filtered and masqueraded ── eth0 ── outside
//!  └───────────────┘        └──────────────────────────────────────────┘
//! ```
//!
//! [`Gateway::ensure`] makes the bridge or adopts the one that stands there, [`Gateway::attach`] joins a container,
//! [`Gateway::publish`] leads ports of this host to it, [`Gateway::repair`] puts back what others took away,
//! [`Gateway::remove`] leaves the host as it was.
//!
//! - `plan.rs` is pure: what exists and what is wanted → steps. `apply.rs` runs steps, each one request to the kernel,
//!   and takes back what it did when one fails.
//! - `nat.rs` is our own nftables table `inet towline`: all our filtering and address translation stands there, written
//!   over netlink. `publish.rs` says, purely, what published ports are in it; `ports.rs` opens and closes them.
//! - `foreign.rs` deals with other people's filters. An accept in our table cannot overrule a drop in theirs, so accept
//!   rules with the comment `towline` that match only our interfaces' names go into the chain that Docker keeps for its
//!   users, `DOCKER-USER`. No foreign rule is changed or removed. `ruleset.rs` works out, purely, whether a foreign
//!   ruleset lets our packets through.
//!
//! What must be remembered stands in the kernel: the addresses on the bridge, the settings changed for it in the bridge's
//! alias, who is ours in rules' comments and interfaces' aliases. So nothing is lost with the process.
//!
//! What this crate does NOT do: it knows nothing of overlays, tables or managers, keeps no file, and starts no thread.
//! Packets meet only the kernel here.

mod addresses;
mod apply;
mod error;
mod foreign;
mod gateway;
mod nat;
mod plan;
mod ports;
mod program;
mod publish;
mod ruleset;
mod xtables;

pub use error::{BridgeError, BridgeErrors};
pub use foreign::{Foreign, State};
pub use gateway::{Attached, Attachment, Gateway, Repair, Settings, Status};
pub use publish::{HostPort, On};

/// The bridge's name. Interface names have at most 15 bytes, one less than [`BRIDGE_ALTERNATIVE_NAME`].
pub const BRIDGE_NAME: &str = "towline_gwbr";
/// The name it also answers to, as in `ip link show towline_gwbridge`. Filters know only [`BRIDGE_NAME`].
pub const BRIDGE_ALTERNATIVE_NAME: &str = "towline_gwbridge";
/// The interface by which a host hands on what comes in at published ports of services. Not made here; but foreign filters
/// that drop what is forwarded must let it pass, too.
pub const INGRESS_NAME: &str = "towline_ingress";
