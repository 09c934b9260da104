//! Who has which MAC and IP address, on which host: allocation, epochs, distribution.
//!
//! ```text
//!   agent core  ──ToManager──▶  manager core ──writes──▶ store
//!   (agent.rs)  ◀──ToAgent───   (manager/)   ◀──load───  (store.rs)
//!        ▲                          ▲
//!        │ commands, events         │ probes
//!   client.rs (a thread)        server.rs (two threads)      framing in transport.rs
//! ```
//!
//! The data model is in [`epoch`], [`row`] and [`table`]: a row is a register that only a higher epoch can overwrite, so
//! late, doubled or reordered news cannot hurt. The allocator is the only maker of epochs; [`subnet`] says
//! what of a subnet it may hand out, and where subnets come from. Both state machines are pure: they are told the time and the
//! messages, and are asked for what to send; `client.rs` and `server.rs` own clocks and sockets.
//!
//! What this crate does not do: it never touches a packet of a container, it knows no namespace and no datapath (the program
//! turns [`Event`]s into table changes), and it makes no consensus between managers. Its connections are TLS with a certificate
//! on both sides ([`pki`], `tls.rs`); a [`Token`] gets a new host its certificate ([`join()`]).

pub mod agent;
pub mod allocator;
mod cache;
mod client;
pub mod constraint;
mod dial;
pub mod epoch;
pub mod events;
pub mod host;
pub mod installed;
mod join;
mod lease;
mod limits;
pub mod manager;
pub mod message;
pub mod names;
pub mod network;
pub mod pki;
pub mod request;
pub mod row;
mod server;
pub mod service;
pub mod store;
pub mod subnet;
pub mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod tls;
mod token;
mod transport;

pub use client::{AgentConfig, AgentError, AgentHandle, CacheConfig};
pub use constraint::{Constraint, ConstraintError};
pub use epoch::Epoch;
pub use host::{HostId, HostInfo, HostTraits, HostView, Platform, check_labels};
pub use join::{JoinError, join};
pub use lease::{LEASE_TIME, LeaseError, Leased};
pub use manager::Lasts;
pub use names::Names;
pub use network::{
    Addressing, Endpoint, MacMode, Network, NetworkSpec, dns_ttl, is_valid_name, not_attachable,
    quote,
};
pub use pki::{Authority, Identity, Role, WallClock};
pub use request::{
    ClusterInfo, ControlStatus, EndpointState, EndpointView, Event, Inspection, MemberView,
    NetworkDetails, Owned, Request, RequestError, Response, ServiceDetails, SubnetUsage,
    SubscriptionStatus,
};
pub use row::{Row, State};
pub use server::{ManagerConfig, ManagerError, ManagerHandle, ManagerStatus, Prober};
pub use service::{
    Balance, EndpointMode, HealthCheck, HealthTest, Membership, Protocol, Publish, PublishMode,
    PublishOn, Service, ServiceSpec,
};
pub use store::{MemoryStore, RedbStore, Store, StoreError};
pub use subnet::{AddressPool, PoolError, Subnet, check_pools};
pub use table::{Backend, MemberState, TableChange};
pub use token::{Secret, Token, TokenError};
