//! Ports of this host that lead to a container, as data: which would collide, and which elements of our maps they are.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netns::nftables::{Field, Protocol, Type, Value};

/// A port of this host that leads to a port of a container.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// This host's port.
    pub published: u16,
    /// The container's port.
    pub target: u16,
    /// Where it is open; `None`: on each of this host's addresses of both families, localhost among them.
    pub on: Option<On>,
}

/// Where a published port is open.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum On {
    /// On this address of this host, for instance 127.0.0.1: then for this host alone. 0.0.0.0 and `::` are all of a family.
    Address(IpAddr),
    /// For what comes in by this interface.
    Interface(String),
}

impl HostPort {
    /// Whether both cannot be: a packet might be meant for either.
    pub fn collides(&self, other: &Self) -> bool {
        let apart = match (&self.on, &other.on) {
            (Some(On::Address(one)), Some(On::Address(other))) => {
                let all = one.is_unspecified() || other.is_unspecified();
                one.is_ipv4() != other.is_ipv4() || (one != other && !all)
            }
            (Some(On::Interface(one)), Some(On::Interface(other))) => one != other,
            _ => false,
        };
        (self.protocol, self.published) == (other.protocol, other.published) && !apart
    }
}

impl fmt::Display for HostPort {
    /// `192.0.2.1:8080/tcp`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.on {
            None => f.write_str("0.0.0.0")?,
            Some(On::Address(IpAddr::V6(address))) => write!(f, "[{address}]")?,
            Some(On::Address(address)) => write!(f, "{address}")?,
            Some(On::Interface(name)) => f.write_str(name)?,
        }
        let protocol = match self.protocol {
            Protocol::Udp => "udp",
            _ => "tcp",
        };
        write!(f, ":{}/{protocol}", self.published)
    }
}

/// A map of our table: what besides protocol and port it asks for, and whether it is IPv6's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Map {
    Address4,
    Address6,
    Interface4,
    Interface6,
    Any4,
    Any6,
}

pub(crate) const MAPS: [Map; 6] = [
    Map::Address4,
    Map::Address6,
    Map::Interface4,
    Map::Interface6,
    Map::Any4,
    Map::Any6,
];

impl Map {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Address4 => "published-on-address4",
            Self::Address6 => "published-on-address6",
            Self::Interface4 => "published-on-interface4",
            Self::Interface6 => "published-on-interface6",
            Self::Any4 => "published4",
            Self::Any6 => "published6",
        }
    }

    pub(crate) fn is_ipv6(self) -> bool {
        matches!(self, Self::Address6 | Self::Interface6 | Self::Any6)
    }

    /// What of a packet its keys begin with.
    pub(crate) fn field(self) -> Option<Field> {
        match self {
            Self::Address4 => Some(Field::Destination4),
            Self::Address6 => Some(Field::Destination6),
            Self::Interface4 | Self::Interface6 => Some(Field::InputName),
            Self::Any4 | Self::Any6 => None,
        }
    }

    pub(crate) fn key_types(self) -> Vec<Type> {
        match self {
            Self::Address4 => vec![Type::Ipv4],
            Self::Address6 => vec![Type::Ipv6],
            Self::Interface4 | Self::Interface6 => vec![Type::Interface],
            Self::Any4 | Self::Any6 => Vec::new(),
        }
    }
}

/// One element of one map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leads {
    pub(crate) map: Map,
    pub(crate) key: Vec<Value>,
    pub(crate) to: Vec<Value>,
}

/// What a port is in our maps.
pub(crate) fn leads(port: &HostPort, (ipv4, ipv6): (Ipv4Addr, Ipv6Addr)) -> Vec<Leads> {
    let (maps, first): (&[Map], Option<Value>) = match &port.on {
        None => (&[Map::Any4, Map::Any6], None),
        Some(On::Address(IpAddr::V4(Ipv4Addr::UNSPECIFIED))) => (&[Map::Any4], None),
        Some(On::Address(IpAddr::V6(Ipv6Addr::UNSPECIFIED))) => (&[Map::Any6], None),
        Some(On::Address(IpAddr::V4(address))) => (&[Map::Address4], Some((*address).into())),
        Some(On::Address(IpAddr::V6(address))) => (&[Map::Address6], Some((*address).into())),
        Some(On::Interface(name)) => (
            &[Map::Interface4, Map::Interface6],
            Some(Value::interface(name)),
        ),
    };
    let key: Vec<Value> = first
        .into_iter()
        .chain([port.protocol.into(), port.published.into()])
        .collect();
    maps.iter()
        .map(|map| Leads {
            map: *map,
            key: key.clone(),
            to: match map.is_ipv6() {
                true => vec![ipv6.into(), port.target.into()],
                false => vec![ipv4.into(), port.target.into()],
            },
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(on: Option<On>) -> HostPort {
        HostPort {
            protocol: Protocol::Tcp,
            published: 8080,
            target: 80,
            on,
        }
    }

    fn at(text: &str) -> Option<On> {
        Some(On::Address(text.parse().expect("an address")))
    }

    #[test]
    fn ports_collide_where_a_packet_could_be_meant_for_both() {
        let eth0 = Some(On::Interface("eth0".to_owned()));
        for (one, other, collide) in [
            (None, None, true),
            (None, at("192.0.2.1"), true),
            (at("192.0.2.1"), at("192.0.2.1"), true),
            (at("192.0.2.1"), at("127.0.0.1"), false),
            (at("192.0.2.1"), at("0.0.0.0"), true),
            (at("192.0.2.1"), at("::"), false),
            (eth0.clone(), Some(On::Interface("eth1".to_owned())), false),
            (eth0.clone(), at("127.0.0.1"), true),
        ] {
            let (one, other) = (port(one), port(other));
            assert_eq!(one.collides(&other), collide, "{one} {other}");
            assert_eq!(other.collides(&one), collide, "{other} {one}");
            let udp = HostPort {
                protocol: Protocol::Udp,
                ..other.clone()
            };
            assert!(!one.collides(&udp));
            let next = HostPort {
                published: 8081,
                ..other
            };
            assert!(!one.collides(&next));
        }
    }

    #[test]
    fn a_port_leads_where_its_family_can() {
        let container = (
            Ipv4Addr::new(172, 31, 0, 2),
            "fd00::2".parse().expect("one"),
        );
        let maps = |on| -> Vec<Map> {
            leads(&port(on), container)
                .iter()
                .map(|leads| leads.map)
                .collect()
        };
        assert_eq!(maps(None), [Map::Any4, Map::Any6]);
        assert_eq!(maps(at("192.0.2.1")), [Map::Address4]);
        assert_eq!(maps(at("2001:db8::1")), [Map::Address6]);
        assert_eq!(maps(at("0.0.0.0")), [Map::Any4]);
        let on_link = leads(&port(Some(On::Interface("eth0".to_owned()))), container);
        assert_eq!(on_link[1].map, Map::Interface6);
        assert_eq!(on_link[0].key.len(), 3);
        assert_eq!(on_link[0].to, [container.0.into(), Value::from(80)]);
    }

    #[test]
    fn ports_read_as_docker_writes_them() {
        assert_eq!(port(None).to_string(), "0.0.0.0:8080/tcp");
        assert_eq!(port(at("::1")).to_string(), "[::1]:8080/tcp");
    }
}
