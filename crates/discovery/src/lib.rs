//! Services: which member a connection goes to, and the rules in the kernel that lead it there.
//!
//! ```text
//!   control ──definitions, members──▶ Services ──plans──▶ Installed… ──one transaction──▶ nftables of a namespace
//!                                     (pure)              (what stands there)             (routes, conntrack)
//! ```
//!
//! - [`publish`] reads `--publish`; [`slots`] decides who is next; [`Services`] knows all, and says what each place needs ([`plan`]).
//! - [`InstalledEntry`] is a host that accepts published ports, [`InstalledClient`] a namespace that calls services by their
//!   virtual addresses, [`InstalledMember`] one that is reached through the ingress network. Each brings the kernel from what it
//!   put there before to what a plan says, and sends nothing where nothing changed.
//! - [`Inspector`] reads back what stands there, and says what is otherwise than a plan says.
//! - [`health`] asks a member whether it is well.
//!
//! Connections are led by the kernel alone (nftables and conntrack): they go on while nobody of ours runs.
//!
//! What this crate does not do: it makes no interface and gives no address, it knows no manager and no container, and it does not
//! publish what it finds out about health.

mod client;
mod content;
mod entry;
mod error;
mod flows;
pub mod health;
mod member;
pub mod names;
pub mod plan;
pub mod publish;
mod services;
pub mod slots;
mod verify;

pub use client::InstalledClient;
pub use entry::InstalledEntry;
pub use error::ApplyError;
pub use member::InstalledMember;
pub use services::{EntryHost, MemberNetwork, Place, Services};
pub use verify::{Inspector, Wrong};
