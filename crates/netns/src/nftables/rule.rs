//! Rules, built from left to right as `nft` writes them.
//!
//! The kernel runs a rule's expressions over twenty 32-bit registers; which one holds what is decided here.

use ipnet::IpNet;

use crate::netfilter::attributes::Writer;

use super::field::{Field, LOCAL, write};
use super::set::{Data, Element, Type};
use super::uapi::expression;
use super::value::{Protocol, Value, Verdict};

mod rewrite;
mod translate;

/// The first 32-bit register (`NFT_REG32_00`); the four 128-bit ones lie over the same bytes.
const FIRST: u32 = 8;
/// Where what is worked out stands: behind what it is worked out from, which takes up to 128 bits.
const SECOND: u32 = FIRST + 4;
/// The register of the verdict.
const VERDICT: u32 = 0;
/// `enum nft_cmp_ops`.
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;

/// Bits of [`Field::State`] (`NF_CT_STATE_BIT`).
pub mod state {
    /// Belongs to no connection that could be.
    pub const INVALID: u32 = 1;
    /// Of a connection that was answered.
    pub const ESTABLISHED: u32 = 2;
    /// Of a connection that another one brought, as an error's message is.
    pub const RELATED: u32 = 4;
    /// The first of a connection.
    pub const NEW: u32 = 8;
}

/// Bits of [`Field::Status`] (`enum ip_conntrack_status`).
pub mod status {
    /// It was answered.
    pub const SEEN_REPLY: u32 = 2;
    /// Its source is translated.
    pub const SNAT: u32 = 0x10;
    /// Its destination is translated.
    pub const DNAT: u32 = 0x20;
}

/// How a packet is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reject {
    /// TCP alone: a reset.
    TcpReset,
    /// An ICMP or ICMPv6 message that the port is unreachable.
    PortUnreachable,
    /// An ICMP or ICMPv6 message that this is forbidden.
    AdminProhibited,
}

/// One rule: what it matches and does, with a comment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    pub(crate) comment: String,
    pub(crate) parts: Vec<Part>,
    family: Option<u8>,
}

/// A run of expressions, or the look-up in a map of the rule's own, whose number only the transaction knows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    Expressions(Writer),
    OwnMap(OwnMap),
}

/// A map that belongs to one rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct OwnMap {
    pub(crate) key: Vec<Type>,
    pub(crate) data: Data,
    pub(crate) elements: Vec<Element>,
    source: u32,
    target: u32,
}

impl OwnMap {
    /// The expression that looks up in it.
    pub(crate) fn write_lookup(&self, list: &mut Writer, name: &str, id: u32) {
        lookup(list, name, Some(id), self.source, self.target);
    }
}

impl Rule {
    /// A rule that matches every packet and does nothing yet. The comment is for people, at most 127 bytes; what is longer
    /// is cut.
    pub fn new(comment: impl Into<String>) -> Self {
        let mut comment = comment.into();
        while comment.len() > 127 {
            comment.pop();
        }
        Self {
            comment,
            parts: Vec::new(),
            family: None,
        }
    }

    /// Its comment.
    pub fn comment(&self) -> &str {
        &self.comment
    }

    /// Matches IPv4.
    #[must_use]
    pub fn ipv4(self) -> Self {
        self.of_family(2)
    }

    /// Matches IPv6.
    #[must_use]
    pub fn ipv6(self) -> Self {
        self.of_family(10)
    }

    /// Matches one transport protocol.
    #[must_use]
    pub fn protocol(self, protocol: Protocol) -> Self {
        self.is(Field::Protocol, protocol)
    }

    /// Matches what came in by an interface.
    #[must_use]
    pub fn input(self, name: &str) -> Self {
        self.is(Field::InputName, Value::interface(name))
    }

    /// Matches what goes out by an interface.
    #[must_use]
    pub fn output(self, name: &str) -> Self {
        self.is(Field::OutputName, Value::interface(name))
    }

    /// Matches what is addressed to this host.
    #[must_use]
    pub fn to_this_host(self) -> Self {
        self.is(Field::DestinationKind, Value::number(LOCAL))
    }

    /// Matches a field that has that value.
    #[must_use]
    pub fn is(self, field: Field, value: impl Into<Value>) -> Self {
        self.compared(field, EQUAL, &value.into())
    }

    /// Matches a field that has not that value.
    #[must_use]
    pub fn is_not(self, field: Field, value: impl Into<Value>) -> Self {
        self.compared(field, NOT_EQUAL, &value.into())
    }

    /// Matches a field that has one of these bits, as [`state::ESTABLISHED`].
    #[must_use]
    pub fn has_any(self, field: Field, bits: u32) -> Self {
        let mask = bits.to_ne_bytes();
        self.masked(field, &mask, NOT_EQUAL, &[0; 4])
    }

    /// Matches a source address in a subnet.
    #[must_use]
    pub fn from(self, subnet: IpNet) -> Self {
        self.in_subnet(source_of(subnet), subnet, EQUAL)
    }

    /// Matches a source address outside a subnet, of the subnet's family.
    #[must_use]
    pub fn not_from(self, subnet: IpNet) -> Self {
        self.in_subnet(source_of(subnet), subnet, NOT_EQUAL)
    }

    /// Matches a destination address in a subnet.
    #[must_use]
    pub fn to(self, subnet: IpNet) -> Self {
        self.in_subnet(destination_of(subnet), subnet, EQUAL)
    }

    /// Matches a destination address outside a subnet, of the subnet's family.
    #[must_use]
    pub fn not_to(self, subnet: IpNet) -> Self {
        self.in_subnet(destination_of(subnet), subnet, NOT_EQUAL)
    }

    /// Counts packets and bytes.
    #[must_use]
    pub fn counter(self) -> Self {
        self.expression("counter", |data| {
            data.u64(1, 0);
            data.u64(2, 0);
        })
    }

    /// Ends with a verdict.
    #[must_use]
    pub fn verdict(self, verdict: Verdict) -> Self {
        self.expression("immediate", |data| {
            data.u32(1, VERDICT);
            data.nest(2, |data| verdict.write(data));
        })
    }

    /// Ends with the verdict that a named map has for these fields; goes on where it has none.
    #[must_use]
    pub fn verdict_from(self, map: &str, key: &[Field]) -> Self {
        self.loaded(key)
            .expressions(|list| lookup(list, map, None, FIRST, VERDICT))
    }

    /// Ends with the verdict that a map of its own has for these fields.
    #[must_use]
    pub fn verdict_from_own(
        self,
        key: &[(Field, Type)],
        elements: impl IntoIterator<Item = Element>,
    ) -> Self {
        let fields: Vec<Field> = key.iter().map(|(field, _)| *field).collect();
        let types = key.iter().map(|(_, kind)| *kind).collect();
        self.loaded(&fields)
            .own_map(types, Data::Verdict, elements, FIRST, VERDICT)
    }

    /// Matches only where a named set holds these fields.
    #[must_use]
    pub fn in_set(self, set: &str, key: &[Field]) -> Self {
        self.loaded(key).expressions(|list| {
            write(list, "lookup", |data| {
                data.text(1, set);
                data.u32(2, FIRST);
            });
        })
    }

    /// Sets a field to a value.
    #[must_use]
    pub fn set(self, field: Field, value: impl Into<Value>) -> Self {
        let value = value.into();
        self.expressions(|list| {
            immediate(list, FIRST, value.bytes());
            field.store(list, FIRST);
        })
    }

    /// Sets a field from another; where the source is shorter, the rest is zero.
    #[must_use]
    pub fn copy(self, from: Field, to: Field) -> Self {
        self.copy_part(from, 0, to)
    }

    /// Sets a field from what stands in another from its `word`th 4 bytes on.
    #[must_use]
    pub fn copy_part(self, from: Field, word: u32, to: Field) -> Self {
        self.in_family(from).expressions(|list| {
            if from.length() < 4 * word + to.length() {
                // The kernel wants every register written that it reads.
                immediate(list, FIRST, &[0; 16]);
                immediate(list, SECOND, &[0; 16]);
            }
            from.load(list, FIRST);
            to.store(list, FIRST + word);
        })
    }

    /// Gives new connections the time limits of that object: see [`super::Batch::add_timeout`].
    #[must_use]
    pub fn timeout(self, name: &str) -> Self {
        self.expression("objref", |data| {
            data.u32(1, super::uapi::object::CT_TIMEOUT);
            data.text(2, name);
        })
    }

    /// Ends with a refusal that the sender is told of.
    #[must_use]
    pub fn reject(self, how: Reject) -> Self {
        // NFT_REJECT_TCP_RST, NFT_REJECT_ICMPX_UNREACH; NFT_REJECT_ICMPX_PORT_UNREACH, ..._ADMIN_PROHIBITED.
        let (kind, code) = match how {
            Reject::TcpReset => (1, 0),
            Reject::PortUnreachable => (2, 1),
            Reject::AdminProhibited => (2, 3),
        };
        self.expression("reject", |data| {
            data.u32(1, kind);
            data.u8(2, code);
        })
    }

    fn own_map(
        mut self,
        key: Vec<Type>,
        data: Data,
        elements: impl IntoIterator<Item = Element>,
        source: u32,
        target: u32,
    ) -> Self {
        self.parts.push(Part::OwnMap(OwnMap {
            key,
            data,
            elements: elements.into_iter().collect(),
            source,
            target,
        }));
        self
    }

    fn of_family(mut self, family: u8) -> Self {
        if self.family == Some(family) {
            return self;
        }
        self.family = Some(family);
        self.compared(Field::PacketFamily, EQUAL, &Value::from_bytes(&[family]))
    }

    fn in_family(self, field: Field) -> Self {
        match field.family() {
            Some(family) => self.of_family(family),
            None => self,
        }
    }

    /// Puts fields side by side into the registers.
    fn loaded(mut self, fields: &[Field]) -> Self {
        for field in fields {
            self = self.in_family(*field);
        }
        self.expressions(|list| {
            let mut register = FIRST;
            for field in fields {
                field.load(list, register);
                register += field.length().div_ceil(4);
            }
        })
    }

    fn compared(self, field: Field, operator: u32, value: &Value) -> Self {
        self.in_family(field).expressions(|list| {
            field.load(list, FIRST);
            compare(list, operator, value.bytes());
        })
    }

    fn masked(self, field: Field, mask: &[u8], operator: u32, value: &[u8]) -> Self {
        self.in_family(field).expressions(|list| {
            field.load(list, FIRST);
            write(list, "bitwise", |data| {
                data.u32(1, FIRST);
                data.u32(2, FIRST);
                data.u32(3, field.length());
                data.nest(4, |data| data.bytes(expression::VALUE, mask));
                data.nest(5, |data| {
                    data.bytes(expression::VALUE, &vec![0; mask.len()])
                });
            });
            compare(list, operator, value);
        })
    }

    fn in_subnet(self, field: Field, subnet: IpNet, operator: u32) -> Self {
        let address = Value::from(subnet.network());
        match subnet.prefix_len() == subnet.max_prefix_len() {
            true => self.compared(field, operator, &address),
            false => {
                let mask = Value::from(subnet.netmask());
                self.masked(field, mask.bytes(), operator, address.bytes())
            }
        }
    }

    fn expression(self, name: &str, inside: impl FnOnce(&mut Writer)) -> Self {
        self.expressions(|list| write(list, name, inside))
    }

    fn expressions(mut self, add: impl FnOnce(&mut Writer)) -> Self {
        if let Some(Part::Expressions(list)) = self.parts.last_mut() {
            add(list);
        } else {
            let mut list = Writer::default();
            add(&mut list);
            self.parts.push(Part::Expressions(list));
        }
        self
    }
}

fn lookup(list: &mut Writer, set: &str, id: Option<u32>, source: u32, target: u32) {
    write(list, "lookup", |data| {
        data.text(1, set);
        data.u32(2, source);
        data.u32(3, target);
        if let Some(id) = id {
            data.u32(4, id);
        }
    });
}

fn immediate(list: &mut Writer, register: u32, value: &[u8]) {
    write(list, "immediate", |data| {
        data.u32(1, register);
        data.nest(2, |data| data.bytes(expression::VALUE, value));
    });
}

fn compare(list: &mut Writer, operator: u32, value: &[u8]) {
    write(list, "cmp", |data| {
        data.u32(1, FIRST);
        data.u32(2, operator);
        data.nest(3, |data| data.bytes(expression::VALUE, value));
    });
}

fn source_of(subnet: IpNet) -> Field {
    match subnet {
        IpNet::V4(_) => Field::Source4,
        IpNet::V6(_) => Field::Source6,
    }
}

fn destination_of(subnet: IpNet) -> Field {
    match subnet {
        IpNet::V4(_) => Field::Destination4,
        IpNet::V6(_) => Field::Destination6,
    }
}
