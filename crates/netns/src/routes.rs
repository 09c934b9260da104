//! Routes of the main table.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteScope, RouteType, RouteVia,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use crate::{Netlink, NetlinkError};

/// A route of the main table. One with neither `via` nor `dev` is `unreachable`: packets to it are refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where to; `0.0.0.0/0` and `::/0` are the default routes.
    pub dst: IpNet,
    /// The next hop's address; `None` on-link.
    pub via: Option<IpAddr>,
    /// The interface out.
    pub dev: Option<String>,
    /// Its priority; lower wins. `None` is the kernel's default: 0 for IPv4, 1024 for IPv6.
    pub metric: Option<u32>,
}

impl Netlink {
    /// The main table of both families, connected routes included. A route with several next hops is listed once for each.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn routes(&self) -> Result<Vec<Route>, NetlinkError> {
        let names = self.names()?;
        let messages = self.dump_routes(|| "list routes".to_owned())?;
        Ok(messages
            .into_iter()
            .flat_map(|message| routes_of(message, &names))
            .collect())
    }

    /// Adds a route to the main table, in the place of one to the same destination with the same metric.
    ///
    /// # Errors
    /// When the interface is not there or down, the next hop is on no link, or without root.
    pub fn add_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let operation = || format!("add {route}");
        let message = self.route_message(operation, route)?;
        self.put_route(operation, message)
    }

    /// Removes a route; one that is not there is fine.
    ///
    /// # Errors
    /// When the interface is not there, or without root.
    pub fn del_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let operation = || format!("remove {route}");
        let message = self.route_message(operation, route)?;
        self.take_route(operation, message)
    }

    /// Routes of all tables and both families, as the kernel tells them.
    pub(crate) fn dump_routes(
        &self,
        operation: impl Fn() -> String,
    ) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers = self.dump(&operation, RouteNetlinkMessage::GetRoute(message))?;
            routes.extend(answers.into_iter().filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRoute(message) => Some(message),
                _ => None,
            }));
        }
        Ok(routes)
    }

    /// Adds a route, in the place of one to the same destination.
    pub(crate) fn put_route(
        &self,
        operation: impl Fn() -> String,
        message: RouteMessage,
    ) -> Result<(), NetlinkError> {
        self.change(
            operation,
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Removes a route; one that is not there is fine.
    pub(crate) fn take_route(
        &self,
        operation: impl Fn() -> String,
        message: RouteMessage,
    ) -> Result<(), NetlinkError> {
        match self.change(operation, RouteNetlinkMessage::DelRoute(message), 0) {
            Err(error) if error.is(Errno::SRCH) => Ok(()),
            done => done,
        }
    }

    fn route_message(
        &self,
        operation: impl Fn() -> String,
        route: &Route,
    ) -> Result<RouteMessage, NetlinkError> {
        let index = route
            .dev
            .as_ref()
            .map(|dev| self.index(&operation, dev))
            .transpose()?;
        let mut message = match route.dst {
            IpNet::V4(dst) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(dst.network(), dst.prefix_len())
                .build(),
            IpNet::V6(dst) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(dst.network(), dst.prefix_len())
                .build(),
        };
        match (route.via, route.dst) {
            (Some(IpAddr::V6(via)), IpNet::V4(_)) => {
                message
                    .attributes
                    .push(RouteAttribute::Via(RouteVia::Inet6(via)));
            }
            (Some(via), _) => message.attributes.push(RouteAttribute::Gateway(via.into())),
            (None, IpNet::V4(_)) if index.is_some() => message.header.scope = RouteScope::Link,
            (None, _) if index.is_none() => message.header.kind = RouteType::Unreachable,
            (None, _) => {}
        }
        message.attributes.extend(index.map(RouteAttribute::Oif));
        message
            .attributes
            .extend(route.metric.map(RouteAttribute::Priority));
        Ok(message)
    }
}

impl std::fmt::Display for Route {
    /// As `ip route` writes it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.dst.prefix_len() {
            0 => f.write_str("route default")?,
            _ => write!(f, "route {}", self.dst)?,
        }
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        match (&self.dev, self.via) {
            (Some(dev), _) => write!(f, " dev {dev}"),
            (None, None) => f.write_str(" unreachable"),
            (None, Some(_)) => Ok(()),
        }
    }
}

fn routes_of(message: RouteMessage, names: &HashMap<u32, String>) -> Vec<Route> {
    let mut table = u32::from(message.header.table);
    let mut dst = None;
    let mut metric = None;
    let mut hops = Vec::new();
    let own_hop = hop_of(&message.attributes);
    let mut own_index = None;
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = number,
            RouteAttribute::Destination(address) => dst = ip_of(&address),
            RouteAttribute::Priority(priority) => metric = Some(priority),
            RouteAttribute::Oif(index) => own_index = Some(index),
            RouteAttribute::MultiPath(list) => {
                hops.extend(
                    list.iter()
                        .map(|hop| (hop_of(&hop.attributes), Some(hop.interface_index))),
                );
            }
            _ => {}
        }
    }
    let ours = table == u32::from(RouteHeader::RT_TABLE_MAIN)
        && matches!(
            message.header.kind,
            RouteType::Unicast
                | RouteType::Unreachable
                | RouteType::BlackHole
                | RouteType::Prohibit
        );
    let any = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let Ok(dst) = IpNet::new(dst.unwrap_or(any), message.header.destination_prefix_length) else {
        return Vec::new();
    };
    if !ours {
        return Vec::new();
    }
    // The kernel lists an IPv6 `unreachable` route with `lo` as its interface; it leads nowhere all the same.
    let refuses = message.header.kind != RouteType::Unicast;
    if hops.is_empty() {
        hops.push((own_hop, own_index.filter(|_| !refuses)));
    }
    hops.into_iter()
        .map(|(via, index)| Route {
            dst,
            via,
            dev: index.and_then(|index| names.get(&index).cloned()),
            metric,
        })
        .collect()
}

pub(crate) fn hop_of(attributes: &[RouteAttribute]) -> Option<IpAddr> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => ip_of(address),
        RouteAttribute::Via(RouteVia::Inet(address)) => Some((*address).into()),
        RouteAttribute::Via(RouteVia::Inet6(address)) => Some((*address).into()),
        _ => None,
    })
}

pub(crate) fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_read_as_in_ip_route() {
        let route = |dst: &str, via: Option<&str>, dev: Option<&str>| Route {
            dst: dst.parse().expect("a prefix"),
            via: via.map(|via| via.parse().expect("an address")),
            dev: dev.map(str::to_owned),
            metric: None,
        };
        assert_eq!(
            route("0.0.0.0/0", Some("192.0.2.1"), None).to_string(),
            "route default via 192.0.2.1"
        );
        assert_eq!(
            route("10.0.9.0/24", None, Some("eth0")).to_string(),
            "route 10.0.9.0/24 dev eth0"
        );
        assert_eq!(
            route("fd00::/64", None, None).to_string(),
            "route fd00::/64 unreachable"
        );
    }
}
