//! Which table a packet's route is looked up in, and the routes of tables besides the main one.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, Nla};
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteFlags, RouteMessage, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use rtnetlink::packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};
use rustix::io::Errno;

use crate::nftables::Protocol;
use crate::routes::{hop_of, ip_of};
use crate::{Netlink, NetlinkError};

/// `FRA_SPORT_MASK` (`linux/fib_rules.h`), two bytes.
const SOURCE_PORT_MASK: u16 = 28;

/// A rule as `ip rule` has it: packets that fit are looked up in a table; one without a route there goes on to the next rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rule {
    /// Its place: lower is earlier. The main table's is 32766.
    pub priority: u32,
    /// Whose packets: those from these addresses. One of `from` and `to` is named; they say the family, with a prefix of
    /// length 0 nothing else.
    pub from: Option<IpNet>,
    /// Those to these addresses.
    pub to: Option<IpNet>,
    /// Those that came in by this interface.
    pub input: Option<String>,
    /// Those of this protocol, sent from this port.
    pub source_port: Option<(Protocol, u16)>,
    /// A default route that is found in the table does not count: the next rule is asked then.
    pub not_by_default: bool,
    /// The table.
    pub table: u32,
}

/// Where a route of a table leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hop {
    /// To the destination itself, on the interface's link.
    Link,
    /// To this address, which is taken to be on the interface's link (`onlink`) whatever the main table says.
    Gateway(IpAddr),
    /// To this host itself: the destination counts as its own address on that interface.
    Local,
}

/// A route of a table besides the main one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableRoute {
    /// The table.
    pub table: u32,
    /// Where to.
    pub dst: IpNet,
    /// Where it leads.
    pub hop: Hop,
    /// The interface.
    pub dev: String,
}

impl Netlink {
    /// The rules of both families that look a table up, in the order of their priority, but for the kernel's own three
    /// and those with conditions that [`Rule`] does not know.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn rules(&self) -> Result<Vec<Rule>, NetlinkError> {
        let mut rules = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RuleMessage::default();
            message.header.family = family;
            let answers = self.dump(
                || "list rules of routing".to_owned(),
                RouteNetlinkMessage::GetRule(message),
            )?;
            rules.extend(answers.into_iter().filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRule(message) => rule_of(&message),
                _ => None,
            }));
        }
        rules.sort();
        Ok(rules)
    }

    /// Adds a rule; the same one standing there already is fine.
    ///
    /// # Errors
    /// When neither `from` nor `to` is named, or the kernel refuses.
    pub fn add_rule(&self, rule: &Rule) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::NewRule(rule.message());
        match self.change(|| format!("add {rule}"), message, NLM_F_CREATE | NLM_F_EXCL) {
            Err(error) if error.is(Errno::EXIST) => Ok(()),
            done => done,
        }
    }

    /// Removes a rule; one that is not there is fine.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn del_rule(&self, rule: &Rule) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::DelRule(rule.message());
        match self.change(|| format!("remove {rule}"), message, 0) {
            Err(error) if error.is(Errno::NOENT) => Ok(()),
            done => done,
        }
    }

    /// The routes of a table, of both families.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn table_routes(&self, table: u32) -> Result<Vec<TableRoute>, NetlinkError> {
        let names = self.names()?;
        let messages = self.dump_routes(|| format!("list routes of table {table}"))?;
        let mut routes: Vec<_> = messages
            .iter()
            .filter_map(|message| route_of(message, &names))
            .collect();
        routes.retain(|route| route.table == table);
        routes.sort();
        Ok(routes)
    }

    /// Adds a route to a table, in the place of one to the same destination.
    ///
    /// # Errors
    /// When the interface is not there or down, or the kernel refuses.
    pub fn add_table_route(&self, route: &TableRoute) -> Result<(), NetlinkError> {
        let operation = || format!("add {route}");
        let message = self.table_route_message(operation, route)?;
        self.put_route(operation, message)
    }

    /// Removes a route from a table; one that is not there is fine.
    ///
    /// # Errors
    /// When the interface is not there, or the kernel refuses.
    pub fn del_table_route(&self, route: &TableRoute) -> Result<(), NetlinkError> {
        let operation = || format!("remove {route}");
        let message = self.table_route_message(operation, route)?;
        self.take_route(operation, message)
    }

    fn table_route_message(
        &self,
        operation: impl Fn() -> String,
        route: &TableRoute,
    ) -> Result<RouteMessage, NetlinkError> {
        let index = self.index(&operation, &route.dev)?;
        let mut message = match route.dst {
            IpNet::V4(dst) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(dst.network(), dst.prefix_len())
                .table_id(route.table)
                .output_interface(index)
                .build(),
            IpNet::V6(dst) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(dst.network(), dst.prefix_len())
                .table_id(route.table)
                .output_interface(index)
                .build(),
        };
        match route.hop {
            Hop::Link => message.header.scope = RouteScope::Link,
            Hop::Local => {
                message.header.kind = RouteType::Local;
                message.header.scope = RouteScope::Host;
            }
            Hop::Gateway(gateway) => {
                message.header.flags |= RouteFlags::Onlink;
                let gateway = RouteAttribute::Gateway(gateway.into());
                message.attributes.push(gateway);
            }
        }
        Ok(message)
    }
}

impl Rule {
    fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = match self.from.or(self.to) {
            Some(IpNet::V6(_)) => AddressFamily::Inet6,
            _ => AddressFamily::Inet,
        };
        message.header.action = RuleAction::ToTable;
        // Tables above 255 have their number in an attribute alone.
        message.header.table = u8::try_from(self.table).unwrap_or_default();
        let attributes = &mut message.attributes;
        if let Some(from) = self.from.filter(|from| from.prefix_len() > 0) {
            message.header.src_len = from.prefix_len();
            attributes.push(RuleAttribute::Source(from.network()));
        }
        if let Some(to) = self.to.filter(|to| to.prefix_len() > 0) {
            message.header.dst_len = to.prefix_len();
            attributes.push(RuleAttribute::Destination(to.network()));
        }
        attributes.extend(self.input.clone().map(RuleAttribute::Iifname));
        if let Some((protocol, port)) = self.source_port {
            let protocol = IpProtocol::from(i32::from(protocol.number()));
            attributes.push(RuleAttribute::IpProtocol(protocol));
            let (start, end) = (port, port);
            attributes.push(RuleAttribute::SourcePortRange(RulePortRange { start, end }));
        }
        if self.not_by_default {
            attributes.push(RuleAttribute::SuppressPrefixLen(0));
        }
        attributes.push(RuleAttribute::Table(self.table));
        attributes.push(RuleAttribute::Priority(self.priority));
        message
    }
}

impl fmt::Display for Rule {
    /// As `ip rule` writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("rule")?;
        if let Some(from) = self.from {
            write!(f, " from {from}")?;
        }
        if let Some(to) = self.to {
            write!(f, " to {to}")?;
        }
        if let Some(input) = &self.input {
            write!(f, " iif {input}")?;
        }
        if let Some((protocol, port)) = self.source_port {
            write!(f, " ipproto {} sport {port}", protocol.number())?;
        }
        write!(f, " lookup {}", self.table)?;
        if self.not_by_default {
            f.write_str(" suppress_prefixlength 0")?;
        }
        write!(f, " priority {}", self.priority)
    }
}

impl fmt::Display for TableRoute {
    /// As `ip route` writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let local = if self.hop == Hop::Local { "local " } else { "" };
        write!(f, "route {local}{}", self.dst)?;
        if let Hop::Gateway(gateway) = self.hop {
            write!(f, " via {gateway} onlink")?;
        }
        write!(f, " dev {} table {}", self.dev, self.table)
    }
}

fn rule_of(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    let mut rule = Rule {
        priority: 0,
        from: None,
        to: None,
        input: None,
        source_port: None,
        not_by_default: false,
        table: header.table.into(),
    };
    let (mut protocol, mut port) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(ip) => rule.from = IpNet::new(*ip, header.src_len).ok(),
            RuleAttribute::Destination(ip) => rule.to = IpNet::new(*ip, header.dst_len).ok(),
            RuleAttribute::Iifname(name) => rule.input = Some(name.clone()),
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::IpProtocol(number) => {
                let number = i32::from(*number);
                protocol = [Protocol::Tcp, Protocol::Udp]
                    .into_iter()
                    .find(|known| i32::from(known.number()) == number);
            }
            RuleAttribute::SourcePortRange(range) if range.start == range.end => {
                port = Some(range.start);
            }
            RuleAttribute::SuppressPrefixLen(0) => rule.not_by_default = true,
            // Said beside a range of one port since Linux 6.15: all of its bits count.
            RuleAttribute::Other(other) if other.kind() == SOURCE_PORT_MASK => {
                let mut mask = [0; 2];
                if other.value_len() != mask.len() {
                    return None;
                }
                other.emit_value(&mut mask);
                if mask != [0xff; 2] {
                    return None;
                }
            }
            RuleAttribute::Protocol(_) | RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            _ => return None,
        }
    }
    rule.source_port = protocol.zip(port);
    if rule.source_port.is_some() && rule.from.is_none() && rule.to.is_none() {
        let any = match header.family {
            AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        };
        rule.from = IpNet::new(any, 0).ok();
    }
    let is_plain = header.action == RuleAction::ToTable && header.tos == 0;
    let is_whole = rule.source_port.is_some() || (protocol.is_none() && port.is_none());
    let has_family = rule.from.is_some() || rule.to.is_some();
    (is_plain && is_whole && has_family).then_some(rule)
}

fn route_of(message: &RouteMessage, names: &HashMap<u32, String>) -> Option<TableRoute> {
    let mut table = u32::from(message.header.table);
    let mut dst = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let mut dev = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(address) => dst = ip_of(address)?,
            RouteAttribute::Oif(index) => dev = names.get(index).cloned(),
            _ => {}
        }
    }
    let hop = match (message.header.kind, hop_of(&message.attributes)) {
        (RouteType::Local, _) => Hop::Local,
        (RouteType::Unicast, Some(gateway)) => Hop::Gateway(gateway),
        (RouteType::Unicast, None) => Hop::Link,
        _ => return None,
    };
    Some(TableRoute {
        table,
        dst: IpNet::new(dst, message.header.destination_prefix_length).ok()?,
        hop,
        dev: dev?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().expect("a prefix")
    }

    #[test]
    fn a_rule_is_read_as_it_was_asked_for() {
        let rule = Rule {
            priority: 4789,
            from: Some(net("10.0.0.2/32")),
            to: None,
            input: Some("ingress".to_owned()),
            source_port: None,
            not_by_default: false,
            table: 4789,
        };
        assert_eq!(rule_of(&rule.message()), Some(rule.clone()));
        assert_eq!(
            rule.to_string(),
            "rule from 10.0.0.2/32 iif ingress lookup 4789 priority 4789"
        );
        for any in ["0.0.0.0/0", "::/0"] {
            let rule = Rule {
                from: Some(net(any)),
                input: None,
                source_port: Some((Protocol::Udp, 53)),
                not_by_default: true,
                ..rule.clone()
            };
            assert_eq!(rule_of(&rule.message()), Some(rule.clone()));
            assert_eq!(
                rule.to_string(),
                format!(
                    "rule from {any} ipproto 17 sport 53 lookup 4789 suppress_prefixlength 0 priority 4789"
                )
            );
        }
        assert_eq!(rule_of(&RuleMessage::default()), None);
    }

    #[test]
    fn routes_read_as_in_ip_route() {
        let route = |dst, hop| TableRoute {
            table: 4789,
            dst: net(dst),
            hop,
            dev: "ingress".to_owned(),
        };
        let gateway = Hop::Gateway("10.0.0.1".parse().expect("an address"));
        assert_eq!(
            route("0.0.0.0/0", gateway).to_string(),
            "route 0.0.0.0/0 via 10.0.0.1 onlink dev ingress table 4789"
        );
        assert_eq!(
            route("::1/128", Hop::Local).to_string(),
            "route local ::1/128 dev ingress table 4789"
        );
    }
}
