//! Rules that translate addresses: of a connection's first packet, and with it of all the others.

use std::net::IpAddr;

use crate::netfilter::attributes::Writer;

use super::super::field::{Field, write};
use super::super::set::{Data, Element, Type};
use super::super::value::Value;
use super::{FIRST, Rule, immediate, lookup};

/// `enum nft_nat_types`.
const SNAT: u32 = 0;
const DNAT: u32 = 1;

fn nat(list: &mut Writer, kind: u32, family: u8, port: Option<u32>) {
    write(list, "nat", |data| {
        data.u32(1, kind);
        data.u32(2, u32::from(family));
        data.u32(3, FIRST);
        if let Some(port) = port {
            data.u32(5, port);
        }
    });
}

/// A port stands behind the address in the registers.
fn port_register(family: u8) -> u32 {
    FIRST + if family == 2 { 1 } else { 4 }
}

impl Rule {
    /// Gives a connection the address of the interface it goes out by as its source.
    #[must_use]
    pub fn masquerade(self) -> Self {
        self.expression("masq", |_| {})
    }

    /// Gives a connection a source address.
    #[must_use]
    pub fn snat(self, address: IpAddr) -> Self {
        let family = family_of(address);
        self.of_family(family).expressions(|list| {
            immediate(list, FIRST, Value::from(address).bytes());
            nat(list, SNAT, family, None);
        })
    }

    /// Leads a connection to an address, and to a port if one is named; name the protocol before.
    #[must_use]
    pub fn dnat(self, address: IpAddr, port: Option<u16>) -> Self {
        let family = family_of(address);
        self.of_family(family).expressions(|list| {
            immediate(list, FIRST, Value::from(address).bytes());
            if let Some(port) = port {
                immediate(list, port_register(family), Value::from(port).bytes());
            }
            nat(list, DNAT, family, port.map(|_| port_register(family)));
        })
    }

    /// Leads each new connection to the next of these addresses, in turn, and to a port if one is named; all are of one
    /// family. The kernel counts for each rule, from 0 on when the rule is new. No addresses: the rule matches nothing.
    #[must_use]
    pub fn dnat_in_turn(self, targets: &[IpAddr], port: Option<u16>) -> Self {
        let slots = u32::try_from(targets.len()).unwrap_or(u32::MAX);
        self.choosing(targets, port, |rule| {
            rule.expression("numgen", |data| {
                data.u32(1, FIRST);
                data.u32(2, slots);
                data.u32(3, 0);
            })
        })
    }

    /// Leads each new connection to the address at `hash(fields, seed) mod targets.len()`: equal fields, equal address.
    #[must_use]
    pub fn dnat_by_hash(
        self,
        fields: &[Field],
        seed: u32,
        targets: &[IpAddr],
        port: Option<u16>,
    ) -> Self {
        let slots = u32::try_from(targets.len()).unwrap_or(u32::MAX);
        self.choosing(targets, port, |rule| {
            let length = fields
                .iter()
                .map(|field| field.length().next_multiple_of(4))
                .sum();
            rule.loaded(fields).expressions(|list| {
                write(list, "hash", |data| {
                    data.u32(1, FIRST);
                    data.u32(2, FIRST);
                    data.u32(3, length);
                    data.u32(4, slots);
                    data.u32(5, seed);
                    data.u32(7, 0);
                });
            })
        })
    }

    /// Leads a connection to what a named map of `address . port` has for these fields; goes on where it has none.
    #[must_use]
    pub fn dnat_from(self, map: &str, key: &[Field], ipv6: bool) -> Self {
        let family = if ipv6 { 10 } else { 2 };
        self.of_family(family).loaded(key).expressions(|list| {
            lookup(list, map, None, FIRST, FIRST);
            nat(list, DNAT, family, Some(port_register(family)));
        })
    }

    /// Leads a connection to a port of this host; name the protocol before.
    #[must_use]
    pub fn redirect(self, port: u16) -> Self {
        self.expressions(|list| {
            immediate(list, FIRST, Value::from(port).bytes());
            write(list, "redir", |data| {
                data.u32(1, FIRST);
                // NF_NAT_RANGE_PROTO_SPECIFIED.
                data.u32(3, 2);
            });
        })
    }

    fn choosing(
        self,
        targets: &[IpAddr],
        port: Option<u16>,
        choose: impl FnOnce(Self) -> Self,
    ) -> Self {
        let Some(first) = targets.first() else {
            // A protocol that no packet has.
            return self.verdict_from_own(&[(Field::Protocol, Type::Protocol)], []);
        };
        let family = family_of(*first);
        let address = match first {
            IpAddr::V4(_) => Type::Ipv4,
            IpAddr::V6(_) => Type::Ipv6,
        };
        let elements = (0..)
            .zip(targets)
            .map(|(slot, address)| Element::values([Value::number(slot)], [Value::from(*address)]));
        let data = Data::Values(vec![address]);
        choose(self.of_family(family))
            .own_map(vec![Type::Number], data, elements, FIRST, FIRST)
            .expressions(|list| {
                if let Some(port) = port {
                    immediate(list, port_register(family), Value::from(port).bytes());
                }
                nat(list, DNAT, family, port.map(|_| port_register(family)));
            })
    }
}

fn family_of(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 2,
        IpAddr::V6(_) => 10,
    }
}
