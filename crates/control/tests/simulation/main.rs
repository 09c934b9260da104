//! Control planes in virtual time: the state machines of a manager and of many agents, with messages delayed, lost, doubled and
//! reordered between them, hosts cut off, agents and managers killed, the manager's store lost or put back to an older state,
//! and clocks that jump.
//!
//! | file | what |
//! |---|---|
//! | `net.rs` | virtual time, and wires that do to messages what wires do |
//! | `plane.rs` | the steps that are done to a control plane, and what every one must hold when all is quiet |
//! | `world.rs`, `host.rs` | Towline's: a manager, agents, and programs that run endpoints |
//! | `faults.rs`, `check.rs` | the steps done to it; what must hold of it at every moment and in the end |
//! | `random.rs` | random steps, as many as are asked for |
//! | `cases.rs`, `networkdb.rs` | scenarios by name |
//! | `old_way.rs` | Docker Swarm's: the same steps find its fault |
//! | `scale.rs` | thousands of hosts |

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod cases;
mod check;
mod faults;
mod host;
mod net;
mod networkdb;
mod old_way;
mod plane;
mod random;
mod scale;
mod world;
