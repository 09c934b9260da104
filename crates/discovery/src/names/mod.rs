//! Names: what a container that asks 127.0.0.11 is answered, as pure functions of what the control plane told.
//!
//! ```text
//!  Event::NetworkChanged, ::Services, ::Table ──▶ Zones ──lookup(asker's networks, question)──▶ Found
//!                                 query's bytes ──▶ answer ──▶ Reply: an answer's bytes, or to be forwarded, or nothing
//! ```
//!
//! - `zone.rs`: which names there are on which network, and what is behind each; `found.rs`: what is behind one, as far as it is looked at.
//! - `answer.rs`: a query's bytes to an answer's bytes, with `hickory-proto` as the codec; the checks that an upstream's answer
//!   must pass.
//!
//! What it does NOT do: sockets, time, and whom to forward to. Names are looked up on the asker's networks alone, never on the
//! network that carries published ports.

mod answer;
mod found;
mod zone;

pub use answer::{Reply, Transport, answer, answers, failure, is_last_word, truncated};
pub use found::{Answer, Found, Kind};
pub use hickory_proto::op::ResponseCode;
pub use zone::Zones;
