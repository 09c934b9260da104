//! What others can make a manager hold, and for how long: every bound of the control port in one place.
//!
//! ```text
//!  TCP ──▶ pending ──hello──▶ conversing ──messages──▶ inputs ──▶ state machine ──▶ outboxes ──▶ TCP
//!          per address,       per address,             bytes of one,               bytes of one,
//!          strangers, known   all                      of all                      of all
//! ```
//!
//! Where a bound is reached on the way in, who waits longest without having shown a certificate goes first, and a known host's
//! messages wait their turn. On the way out nothing grows either: news that a slow reader can't take are left out, and what it
//! has missed is made up from the tables once it reads again (`server/behind.rs`). What a manager can hold at most follows from
//! the sums below; the bounds of the data model (networks a host follows, addresses of a network) are beside the model.

use std::time::Duration;

/// The longest message, in bytes.
pub(crate) const FRAME_MAX: usize = 1 << 20;
/// The longest message before its sender is known, in bytes.
pub(crate) const HELLO_MAX: usize = 4096;
/// How long a connection may take to show whose it is, and how long an answer to a stranger may take.
pub(crate) const HELLO_PATIENCE: Duration = Duration::from_secs(5);

/// Connections of one address that nobody is known to be behind yet. Above, the oldest of them is closed.
pub(crate) const PENDING_PER_ADDRESS: usize = 16;
/// The same of all addresses that are no known host's. Above, the oldest of them is closed.
pub(crate) const PENDING_STRANGERS: usize = 512;
/// The same of all known hosts' addresses, which strangers cannot crowd out.
pub(crate) const PENDING_KNOWN: usize = 4096;
/// Lines about refused connections that the log gets within [`REFUSALS_WINDOW`]; the rest are counted.
pub(crate) const REFUSALS_LOGGED: u32 = 60;
/// See [`REFUSALS_LOGGED`].
pub(crate) const REFUSALS_WINDOW: Duration = Duration::from_secs(60);
/// Connections of hosts, and of one address: an old one may still be closing when its host is back.
pub(crate) const CONNECTIONS_MAX: usize = 20_000;
/// See [`CONNECTIONS_MAX`].
pub(crate) const CONNECTIONS_PER_ADDRESS: usize = 8;
/// Connections that the kernel keeps until they are taken: all hosts of a large cluster may come back at once.
pub(crate) const BACKLOG: i32 = 4096;

/// Messages that wait for the state machine; their senders wait too.
pub(crate) const INPUTS_MAX: usize = 1024;
/// Bytes of those messages, all together.
pub(crate) const INPUT_BYTES_MAX: usize = 64 << 20;
/// Bytes of those messages that are one connection's: one of the longest, or thousands of heartbeats.
pub(crate) const INPUT_BYTES_OF_ONE: usize = FRAME_MAX + MESSAGE_OVERHEAD;
/// What a message costs in memory besides its bytes.
pub(crate) const MESSAGE_OVERHEAD: usize = 64;
/// Messages handled before changes are made durable and sent.
pub(crate) const TURN_MAX: usize = 256;
/// A turn that has made this many messages handles no more of what came.
pub(crate) const TURN_OUTPUTS_MAX: usize = 1024;
/// Probes under way.
pub(crate) const PROBES_MAX: usize = 32;

/// Bytes of one connection that the kernel takes before they can be sent; what is under way is bounded by the path.
pub(crate) const UNSENT_MAX: u32 = 128 << 10;
/// Bytes waiting for one reader above which news are left out for it.
pub(crate) const OUTBOX_BEHIND: usize = 1 << 20;
/// Bytes waiting for all readers together above which news are left out for everyone that anything waits for.
pub(crate) const OUTBOXES_BEHIND: usize = 256 << 20;
/// Bytes waiting for one reader above which its connection ends: more than the snapshot of a network with a million rows.
pub(crate) const OUTBOX_MAX: usize = 128 << 20;
/// A write that makes no progress for this long ends the connection.
pub(crate) const WRITE_PATIENCE: Duration = Duration::from_secs(10);
