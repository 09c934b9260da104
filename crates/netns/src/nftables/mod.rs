//! nftables over netlink: rules, chains, sets and maps, changed in one transaction without running a program.
//!
//! - [`Batch`] gathers changes and commits them: all or none.
//! - [`Rule`] is built as `nft` writes rules, from left to right; `nft list` shows what was meant.
//! - [`crate::NetfilterSocket`]'s `rules`, `chains`, `snapshot`, `listing` and `generation` tell what stands there.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use netns::nftables::{Base, Batch, Chain, Family, Rule, Table, Verdict};
//! use netns::{NetfilterSocket, Netns};
//!
//! let table = Table::new(Family::Inet, "example");
//! let mut batch = Batch::new();
//! batch
//!     .remove_table(&table)
//!     .add_table(&table)
//!     .add_chain(&table, &Chain::base("input", Base::filter_input()))
//!     .add_rule(&table, "input", &Rule::new("no guests").input("eth7").verdict(Verdict::Drop));
//! batch.commit(&mut NetfilterSocket::open(&Netns::open("guests")?)?)?;
//! # Ok(())
//! # }
//! ```
//!
//! What it does NOT do: it knows the expressions that Towline's rules are made of and no others, and shows what others
//! wrote only as names, numbers and comments.

mod batch;
mod describe;
mod field;
mod list;
mod listing;
mod rule;
mod set;
mod uapi;
mod value;

pub use batch::Batch;
pub use field::{Field, LOCAL};
pub use list::{ChainEntry, RuleEntry, Snapshot};
pub use listing::{Difference, Listing, Part};
pub use rule::{Reject, Rule, state, status};
pub use set::{Data, Element, Set, Type};
pub use value::{Protocol, Value, Verdict};

/// What packets a table's chains may meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet,
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
    /// Whatever passes an interface.
    Netdev,
}

impl Family {
    /// `NFPROTO_*`.
    fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Ipv4 => 2,
            Self::Netdev => 5,
            Self::Ipv6 => 10,
        }
    }

    /// nft's name of it.
    pub fn name(self) -> &'static str {
        Self::name_of(self.number())
    }

    fn name_of(number: u8) -> &'static str {
        match number {
            1 => "inet",
            2 => "ip",
            5 => "netdev",
            10 => "ip6",
            _ => "?",
        }
    }
}

/// A table's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Table {
    /// What its chains may meet.
    pub family: Family,
    /// Its name within the family.
    pub name: String,
}

impl Table {
    /// Names a table.
    pub fn new(family: Family, name: impl Into<String>) -> Self {
        Self {
            family,
            name: name.into(),
        }
    }
}

/// A chain: rules in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Chain {
    /// Its name.
    pub name: String,
    /// Where packets enter it; `None` where only other chains lead to it.
    pub base: Option<Base>,
}

impl Chain {
    /// A chain that other chains jump to.
    pub fn regular(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            base: None,
        }
    }

    /// A chain that packets enter by themselves.
    pub fn base(name: impl Into<String>, base: Base) -> Self {
        Self {
            name: name.into(),
            base: Some(base),
        }
    }
}

/// Where and when packets enter a chain, and what becomes of those that no rule decides about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Base {
    /// What its rules may do.
    pub kind: ChainKind,
    /// Where on a packet's way.
    pub hook: Hook,
    /// Lower is earlier: see [`priority`].
    pub priority: i32,
    /// Of the family `netdev`: the interface.
    pub device: Option<String>,
    /// What becomes of a packet at its end.
    pub policy: Policy,
}

impl Base {
    /// A chain of that kind at that hook, whose end accepts.
    pub fn new(kind: ChainKind, hook: Hook, priority: i32) -> Self {
        Self {
            kind,
            hook,
            priority,
            device: None,
            policy: Policy::Accept,
        }
    }

    /// A filter of what is for this host.
    pub fn filter_input() -> Self {
        Self::new(ChainKind::Filter, Hook::Input, priority::FILTER)
    }

    /// A filter of what this host sends.
    pub fn filter_output() -> Self {
        Self::new(ChainKind::Filter, Hook::Output, priority::FILTER)
    }

    /// A filter of what this host passes on.
    pub fn filter_forward() -> Self {
        Self::new(ChainKind::Filter, Hook::Forward, priority::FILTER)
    }

    /// Translation of the destination of what comes in.
    pub fn dnat_prerouting() -> Self {
        Self::new(ChainKind::Nat, Hook::Prerouting, priority::DSTNAT)
    }

    /// Translation of the destination of what this host sends.
    pub fn dnat_output() -> Self {
        Self::new(ChainKind::Nat, Hook::Output, priority::DSTNAT)
    }

    /// Translation of the source of what leaves.
    pub fn snat_postrouting() -> Self {
        Self::new(ChainKind::Nat, Hook::Postrouting, priority::SRCNAT)
    }

    /// A filter of frames on their way out of one interface, in a table of the family [`Family::Netdev`].
    pub fn egress(device: impl Into<String>) -> Self {
        Self {
            device: Some(device.into()),
            ..Self::new(ChainKind::Filter, Hook::Egress, priority::FILTER)
        }
    }
}

/// Priorities of ordinary chains (`linux/netfilter_ipv4.h`).
pub mod priority {
    /// Before connections are looked up.
    pub const RAW: i32 = -300;
    /// Changes of packets.
    pub const MANGLE: i32 = -150;
    /// Translation of destinations.
    pub const DSTNAT: i32 = -100;
    /// Filters.
    pub const FILTER: i32 = 0;
    /// Translation of sources.
    pub const SRCNAT: i32 = 100;
}

/// What the rules of a base chain may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChainKind {
    /// Accept, drop, change.
    Filter,
    /// Translate addresses, of a connection's first packet alone.
    Nat,
    /// As a filter; a packet whose mark it changes is routed anew.
    Route,
}

impl ChainKind {
    fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
            Self::Route => "route",
        }
    }
}

/// Where on a packet's way a chain stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hook {
    /// It came in; where it goes is not decided.
    Prerouting,
    /// It is for this host.
    Input,
    /// It goes on to another.
    Forward,
    /// This host sends it.
    Output,
    /// It leaves.
    Postrouting,
    /// Family `netdev`: the frame came in by the interface.
    Ingress,
    /// Family `netdev`: the frame leaves by the interface (Linux 5.16).
    Egress,
}

impl Hook {
    /// `NF_INET_*`, or `NF_NETDEV_*` in that family.
    fn number(self, family: Family) -> u32 {
        match (self, family) {
            (Self::Prerouting, _) | (Self::Ingress, Family::Netdev) => 0,
            (Self::Input, _) | (Self::Egress, _) => 1,
            (Self::Forward, _) => 2,
            (Self::Output, _) => 3,
            (Self::Postrouting, _) => 4,
            (Self::Ingress, _) => 5,
        }
    }
}

/// What becomes of a packet at the end of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Policy {
    /// It passes.
    Accept,
    /// It is gone.
    Drop,
}

/// A rule's comment as nft keeps it: `0 length text 0` (libnftnl's `udata.h`).
fn comment(text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
    let mut bytes = vec![0, length];
    bytes.extend_from_slice(text.as_bytes());
    bytes.push(0);
    bytes
}

/// The comment within what a rule's maker noted in it.
fn comment_of(mut notes: &[u8]) -> Option<&str> {
    loop {
        let (kind, length) = (*notes.first()?, usize::from(*notes.get(1)?));
        if kind == 0 {
            return crate::netfilter::attributes::text(notes.get(2..2 + length)?);
        }
        notes = notes.get(2 + length..)?;
    }
}
