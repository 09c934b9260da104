//! Why frames are dropped, and counters for that and for all that passes.
//!
//! A drop is no error: it has a [`DropReason`] and one counter. Each worker owns one [`WorkerCounters`] and is the only
//! one to write it, without a lock and without an atomic read-modify-write; whoever reads sums over the workers. What passed
//! one port or one remote is counted beside that, in its [`Meter`].

mod meter;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

pub use meter::{Meter, MeterCell, Reading};

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// Why a frame or datagram was not passed on.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl DropReason {
            /// All reasons, in the order of their counters.
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$variant),+];

            /// The name that commands and documents use, such as `not-a-member`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// One line that says what happened.
            #[must_use]
            pub fn description(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+).trim()),+ }
            }
        }
    };
}

drop_reasons! {
    /// Shorter than its own headers say, or than any frame can be.
    Truncated = "truncated",
    /// Headers that contradict themselves.
    Malformed = "malformed",
    /// The VXLAN I flag is not set.
    NoVniFlag = "no-vni-flag",
    /// A reachability probe of a stranger, a damaged one, one of too many, or an answer to none.
    UnexpectedProbe = "unexpected-probe",
    /// Reserved bits of the VXLAN header are set and `strict_reserved_bits` is on.
    ReservedBits = "reserved-bits",
    /// No network here has this VNI.
    UnknownVni = "unknown-vni",
    /// The frame came from a port that the tables do not have (yet, or any more).
    UnknownPort = "unknown-port",
    /// The sender is no member of the network.
    NotAMember = "not-a-member",
    /// The frame's source MAC is multicast, broadcast or zero.
    InvalidSource = "invalid-source",
    /// A remote VTEP sent a source MAC that belongs to another host, to this one, or to the gateway.
    SourceElsewhere = "source-elsewhere",
    /// A remote VTEP sent a source MAC that no table entry gives it.
    UnknownSource = "unknown-source",
    /// A container sent with a MAC that is not its port's.
    GuardMac = "guard-mac",
    /// A container sent with an IP address that is not its port's.
    GuardIp = "guard-ip",
    /// A container claimed a neighbour's address in ARP or ND, or posed as a router.
    GuardNeighbor = "guard-neighbor",
    /// To a link-local control address (01:80:c2:00:00:0x), which no bridge forwards.
    LinkLocalControl = "link-local-control",
    /// An 802.1Q tag on a network that does not pass tags.
    VlanTag = "vlan-tag",
    /// A neighbour question for the port's own address: a probe, duplicate detection, or an announcement.
    OwnAddress = "own-address",
    /// For the gateway, and neither ARP, ND nor an echo request to one of its addresses.
    ToGateway = "to-gateway",
    /// To the very port it came from.
    ToItself = "to-itself",
    /// From a remote VTEP and for a remote VTEP.
    SplitHorizon = "split-horizon",
    /// To an unknown or group address on a network that does not flood.
    FloodOff = "flood-off",
    /// Above the port's limit for flooded frames.
    FloodLimit = "flood-limit",
    /// A container handed over an impossible vnet header.
    BadOffload = "bad-offload",
    /// Larger than the port's MTU.
    Oversize = "oversize",
    /// A merged TCP frame from a peer, for a port that cannot take it.
    SuperFrame = "super-frame",
    /// Marked by the underlay as having met congestion, on a frame whose packet cannot say so (RFC 6040 §4.2).
    CongestionMark = "congestion-mark",
    /// Larger than the link or the path to the remote carries.
    PathTooSmall = "path-too-small",
    /// No room in the underlay socket's send buffer.
    UnderlayFull = "underlay-full",
    /// The kernel refused to send the datagram.
    UnderlayFailed = "underlay-failed",
    /// No room in the container's queue.
    PortFull = "port-full",
    /// The kernel refused the frame for the container.
    PortFailed = "port-failed",
    /// For a port that has no queue here.
    NoQueue = "no-queue",
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $field:ident,)+) => {
        /// What one worker has seen. Only its worker writes it; anyone may read.
        // 128 bytes: adjacent-line prefetch makes pairs of 64-byte lines the unit that two cores fight over.
        #[derive(Debug)]
        #[repr(align(128))]
        pub struct WorkerCounters {
            $($field: AtomicU64,)+
            drops: [AtomicU64; DropReason::ALL.len()],
        }

        impl WorkerCounters {
            /// All zero.
            #[must_use]
            pub fn new() -> Self {
                Self { $($field: AtomicU64::new(0),)+ drops: [const { AtomicU64::new(0) }; DropReason::ALL.len()] }
            }

            $(
                $(#[doc = $doc])+ ///
                /// Adds to it; only the owning worker may.
                #[inline]
                pub fn $field(&self, count: u64) {
                    add(&self.$field, count);
                }
            )+
        }

        /// The sum over all workers at one moment, as it can be read without stopping them.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct Counters {
            $($(#[doc = $doc])+ pub $field: u64,)+
            /// Frames dropped, by reason.
            pub drops: Drops,
        }

        impl Counters {
            /// Sums what the workers have counted.
            pub fn sum<'a>(workers: impl IntoIterator<Item = &'a Arc<WorkerCounters>>) -> Self {
                let mut sum = Self::default();
                for worker in workers {
                    $(sum.$field += worker.$field.load(Ordering::Relaxed);)+
                    for (total, counter) in sum.drops.0.iter_mut().zip(&worker.drops) {
                        *total += counter.load(Ordering::Relaxed);
                    }
                }
                sum
            }
        }
    };
}

counters! {
    /// Frames from containers.
    frames_in,
    /// Bytes of frames from containers.
    frame_bytes_in,
    /// Frames handed to containers.
    frames_out,
    /// Bytes of frames handed to containers.
    frame_bytes_out,
    /// Datagrams from other hosts.
    datagrams_in,
    /// UDP payload bytes from other hosts.
    datagram_bytes_in,
    /// Datagrams sent to other hosts.
    datagrams_out,
    /// UDP payload bytes sent to other hosts.
    datagram_bytes_out,
    /// Frames that went to several places.
    floods,
    /// ARP, ND and echo answers made here.
    answers,
    /// Containers told that a packet is too big for its path.
    too_big_answers,
    /// Containers told that an address has another MAC.
    announcements,
}

impl WorkerCounters {
    /// Counts drops for one reason; only the owning worker may.
    #[inline]
    pub fn drops(&self, reason: DropReason, count: u64) {
        add(&self.drops[reason as usize], count);
    }
}

impl Default for WorkerCounters {
    fn default() -> Self {
        Self::new()
    }
}

/// With one writer a load and a store lose nothing, and cost no locked instruction.
#[inline]
fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Ordering::Relaxed) + count, Ordering::Relaxed);
}

/// One number for each [`DropReason`]. Serialised as a map from name to number, all names present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drops([u64; DropReason::ALL.len()]);

impl Drops {
    /// The number for one reason.
    #[must_use]
    pub const fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// All reasons with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL
            .into_iter()
            .map(|reason| (reason, self.get(reason)))
    }

    /// Drops for any reason.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

impl Default for Drops {
    fn default() -> Self {
        Self([0; DropReason::ALL.len()])
    }
}

impl Serialize for Drops {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter().map(|(reason, count)| (reason.name(), count)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn reasons_have_distinct_kebab_case_names_and_their_own_counter() {
        let names: HashSet<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), DropReason::ALL.len());
        for (index, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
            assert!(
                reason
                    .name()
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte == b'-'),
                "{}",
                reason.name()
            );
            assert!(reason.description().ends_with('.'), "{}", reason.name());
        }
    }

    #[test]
    fn workers_are_summed() {
        let workers = [
            Arc::new(WorkerCounters::new()),
            Arc::new(WorkerCounters::new()),
        ];
        workers[0].frames_in(3);
        workers[1].frames_in(4);
        workers[0].drops(DropReason::UnknownVni, 1);
        workers[1].drops(DropReason::UnknownVni, 2);
        let sum = Counters::sum(&workers);
        assert_eq!(sum.frames_in, 7);
        assert_eq!(sum.drops.get(DropReason::UnknownVni), 3);
        assert_eq!(sum.drops.total(), 3);
    }
}
