//! The kernel's connection table of a namespace: who speaks with whom, through which translation, and for how long yet.
//!
//! What it does NOT do: it makes no entries and follows no events.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use crate::netfilter::attributes::{Attributes, Message, MessageHeader, Writer};
use crate::netfilter::{ACK, DUMP, NetfilterError, NetfilterSocket, REQUEST};
use crate::nftables::Protocol;

/// `linux/netfilter/nfnetlink_conntrack.h`. `NFNL_SUBSYS_CTNETLINK` and its messages.
const SUBSYSTEM: u16 = 1;
const NEW: u16 = 0;
const GET: u16 = 1;
const DELETE: u16 = 2;
/// `enum ctattr_type`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const TIMEOUT: u16 = 7;
const MARK: u16 = 8;
const ID: u16 = 12;
const ZONE: u16 = 18;
const LABELS: u16 = 22;
/// `enum ctattr_tuple`.
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const TUPLE_ZONE: u16 = 3;
/// `enum ctattr_ip`.
const SOURCE4: u16 = 1;
const DESTINATION4: u16 = 2;
const SOURCE6: u16 = 3;
const DESTINATION6: u16 = 4;
/// `enum ctattr_l4proto`.
const PROTOCOL: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;

/// One direction of a connection, as its packets bear it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Who sends.
    pub source: IpAddr,
    /// To whom.
    pub destination: IpAddr,
    /// From which port; 0 where the protocol has none.
    pub source_port: u16,
    /// To which port; 0 where the protocol has none.
    pub destination_port: u16,
}

/// One entry of the connection table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The transport protocol's number.
    pub protocol: u8,
    /// As the first packet was before any translation.
    pub original: Tuple,
    /// As answers come in: its source is where a translated connection was led.
    pub reply: Tuple,
    /// How long it stays if nothing more is sent.
    pub timeout: Duration,
    /// Its mark.
    pub mark: u32,
    /// Its label; `None` where it has no room for one or it is all zero.
    pub label: Option<[u8; 16]>,
    /// `enum ip_conntrack_status`.
    pub status: u32,
    /// The kernel's number of it, so that none is deleted in another's place.
    id: Option<u32>,
    /// Its zone in both directions, in the kernel's bytes.
    zone: Option<[u8; 2]>,
    /// The zone in which its first packets are looked up, if that is another than answers have.
    original_zone: Option<[u8; 2]>,
}

/// Which connections are meant; a new one means all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    protocol: Option<u8>,
    original_source: Option<IpAddr>,
    original_destination: Option<IpAddr>,
    original_destination_port: Option<u16>,
    reply_source: Option<IpAddr>,
    reply_source_port: Option<u16>,
}

impl Filter {
    /// All connections.
    pub fn new() -> Self {
        Self::default()
    }

    /// Those of a transport protocol.
    #[must_use]
    pub fn protocol(self, protocol: Protocol) -> Self {
        Self {
            protocol: Some(protocol.number()),
            ..self
        }
    }

    /// Those that this address opened.
    #[must_use]
    pub fn original_source(self, address: IpAddr) -> Self {
        Self {
            original_source: Some(address),
            ..self
        }
    }

    /// Those opened to this address, before any translation.
    #[must_use]
    pub fn original_destination(self, address: IpAddr) -> Self {
        Self {
            original_destination: Some(address),
            ..self
        }
    }

    /// Those opened to this port, before any translation.
    #[must_use]
    pub fn original_destination_port(self, port: u16) -> Self {
        Self {
            original_destination_port: Some(port),
            ..self
        }
    }

    /// Those that this address answers, whatever address they were opened to.
    #[must_use]
    pub fn reply_source(self, address: IpAddr) -> Self {
        Self {
            reply_source: Some(address),
            ..self
        }
    }

    /// Those that are answered from this port.
    #[must_use]
    pub fn reply_source_port(self, port: u16) -> Self {
        Self {
            reply_source_port: Some(port),
            ..self
        }
    }

    /// Whether a connection is meant.
    pub fn fits(&self, connection: &Connection) -> bool {
        fn is<T: PartialEq>(wanted: Option<T>, found: T) -> bool {
            wanted.is_none_or(|wanted| wanted == found)
        }
        let (original, reply) = (&connection.original, &connection.reply);
        is(self.protocol, connection.protocol)
            && is(self.original_source, original.source)
            && is(self.original_destination, original.destination)
            && is(self.original_destination_port, original.destination_port)
            && is(self.reply_source, reply.source)
            && is(self.reply_source_port, reply.source_port)
    }

    /// The one family that fits, for the kernel to list no other: `NFPROTO_*`, 0 for both.
    fn family(&self) -> u8 {
        [
            self.original_source,
            self.original_destination,
            self.reply_source,
        ]
        .into_iter()
        .flatten()
        .next()
        .map_or(0, family_of)
    }
}

impl NetfilterSocket {
    /// The connections that a filter means.
    ///
    /// # Errors
    /// When the kernel refuses, or has no table of connections.
    pub fn connections(&mut self, filter: &Filter) -> Result<Vec<Connection>, NetfilterError> {
        let ask = |sequence| {
            let header = header(GET, REQUEST | DUMP, sequence, filter.family());
            let mut bytes = Writer::default();
            bytes.message(header, |_| {});
            bytes.as_bytes().to_vec()
        };
        self.dump(ask, |message| {
            connection(message).filter(|connection| filter.fits(connection))
        })
        .map_err(|refusal| refusal.of("list connections".to_owned()))
    }

    /// Forgets the connections that a filter means, and tells how many they were: their next packets are new ones, and are
    /// led as the rules say then. One that ends meanwhile is fine.
    ///
    /// # Errors
    /// When the kernel refuses. Those before are forgotten.
    pub fn delete_connections(&mut self, filter: &Filter) -> Result<usize, NetfilterError> {
        let meant = self.connections(filter)?;
        self.delete_all(&meant)
    }

    /// The same for the connections of which `is_meant` says so: however many conditions there are, the table is read once.
    ///
    /// # Errors
    /// As [`Self::delete_connections`].
    pub fn delete_connections_where(
        &mut self,
        is_meant: impl Fn(&Connection) -> bool,
    ) -> Result<usize, NetfilterError> {
        let mut meant = self.connections(&Filter::new())?;
        meant.retain(is_meant);
        self.delete_all(&meant)
    }

    fn delete_all(&mut self, connections: &[Connection]) -> Result<usize, NetfilterError> {
        for connection in connections {
            match self.about(DELETE, connection, |_| {}, "forget") {
                Err(error) if error.is_absent() => {}
                done => done?,
            }
        }
        Ok(connections.len())
    }

    /// Sets how long a connection stays if nothing more is sent, in whole seconds. Each packet sets it anew.
    ///
    /// # Errors
    /// When it has ended, or the kernel refuses.
    pub fn set_timeout(
        &mut self,
        connection: &Connection,
        timeout: Duration,
    ) -> Result<(), NetfilterError> {
        let seconds = u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX);
        let limit = |message: &mut Writer| message.u32(TIMEOUT, seconds);
        self.about(NEW, connection, limit, "change")
    }

    fn about(
        &mut self,
        kind: u16,
        connection: &Connection,
        more: impl FnOnce(&mut Writer),
        verb: &str,
    ) -> Result<(), NetfilterError> {
        let Tuple {
            source,
            destination,
            ..
        } = connection.original;
        let sequence = self.sequences(1);
        let family = family_of(source);
        let mut bytes = Writer::default();
        bytes.message(header(kind, REQUEST | ACK, sequence, family), |message| {
            message.nest(ORIGINAL, |tuple| {
                write_tuple(tuple, connection.protocol, &connection.original);
                if let Some(zone) = connection.original_zone {
                    tuple.bytes(TUPLE_ZONE, &zone);
                }
            });
            if let Some(id) = connection.id {
                message.u32(ID, id);
            }
            if let Some(zone) = connection.zone {
                message.bytes(ZONE, &zone);
            }
            more(message);
        });
        self.request(bytes.as_bytes(), sequence).map_err(|refusal| {
            refusal.of(format!(
                "{verb} the connection from {source} to {destination}"
            ))
        })
    }
}

fn header(kind: u16, flags: u16, sequence: u32, family: u8) -> MessageHeader {
    MessageHeader {
        kind: SUBSYSTEM << 8 | kind,
        flags,
        sequence,
        family,
        resource: 0,
    }
}

fn family_of(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 2,
        IpAddr::V6(_) => 10,
    }
}

fn write_tuple(message: &mut Writer, protocol: u8, tuple: &Tuple) {
    message.nest(TUPLE_IP, |ip| match (tuple.source, tuple.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            ip.bytes(SOURCE4, &source.octets());
            ip.bytes(DESTINATION4, &destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            ip.bytes(SOURCE6, &source.octets());
            ip.bytes(DESTINATION6, &destination.octets());
        }
        // The kernel knows no such tuple, and refuses one without addresses.
        _ => {}
    });
    message.nest(TUPLE_PROTOCOL, |ports| {
        ports.u8(PROTOCOL, protocol);
        ports.u16(SOURCE_PORT, tuple.source_port);
        ports.u16(DESTINATION_PORT, tuple.destination_port);
    });
}

/// Reads an entry; `None` for one that has no addresses.
fn connection(message: Message<'_>) -> Option<Connection> {
    if message.kind != SUBSYSTEM << 8 | NEW {
        return None;
    }
    let (_, entry) = message.netfilter();
    let (protocol, original) = tuple(entry.inside(ORIGINAL))?;
    let (_, reply) = tuple(entry.inside(REPLY))?;
    let label = entry
        .find(LABELS)
        .and_then(|label| label.try_into().ok())
        .filter(|label| *label != [0; 16]);
    Some(Connection {
        protocol,
        original,
        reply,
        timeout: Duration::from_secs(entry.u32(TIMEOUT).unwrap_or_default().into()),
        mark: entry.u32(MARK).unwrap_or_default(),
        label,
        status: entry.u32(STATUS).unwrap_or_default(),
        id: entry.u32(ID),
        zone: entry.find(ZONE).and_then(|zone| zone.try_into().ok()),
        original_zone: entry
            .inside(ORIGINAL)
            .find(TUPLE_ZONE)
            .and_then(|zone| zone.try_into().ok()),
    })
}

fn tuple(attributes: Attributes<'_>) -> Option<(u8, Tuple)> {
    let ip = attributes.inside(TUPLE_IP);
    let address = |four, six| -> Option<IpAddr> {
        if let Some(bytes) = ip.find(four) {
            let octets: [u8; 4] = bytes.try_into().ok()?;
            return Some(Ipv4Addr::from(octets).into());
        }
        let octets: [u8; 16] = ip.find(six)?.try_into().ok()?;
        Some(Ipv6Addr::from(octets).into())
    };
    let ports = attributes.inside(TUPLE_PROTOCOL);
    let tuple = Tuple {
        source: address(SOURCE4, SOURCE6)?,
        destination: address(DESTINATION4, DESTINATION6)?,
        source_port: ports.u16(SOURCE_PORT).unwrap_or_default(),
        destination_port: ports.u16(DESTINATION_PORT).unwrap_or_default(),
    };
    Some((ports.u8(PROTOCOL)?, tuple))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netfilter::attributes::messages;
    use proptest::prelude::*;

    fn told(connection: &Connection) -> Vec<u8> {
        let mut bytes = Writer::default();
        bytes.message(header(NEW, 0, 1, 2), |message| {
            for (number, tuple) in [(ORIGINAL, connection.original), (REPLY, connection.reply)] {
                message.nest(number, |attributes| {
                    write_tuple(attributes, connection.protocol, &tuple);
                    if let (ORIGINAL, Some(zone)) = (number, connection.original_zone) {
                        attributes.bytes(TUPLE_ZONE, &zone);
                    }
                });
            }
            message.u32(STATUS, connection.status);
            message.u32(TIMEOUT, 30);
            message.bytes(LABELS, &connection.label.unwrap_or_default());
        });
        bytes.as_bytes().to_vec()
    }

    fn example() -> Connection {
        let ip = |text: &str| text.parse().expect("an address");
        Connection {
            protocol: 6,
            original: Tuple {
                source: ip("192.0.2.7"),
                destination: ip("192.0.2.1"),
                source_port: 40_000,
                destination_port: 8080,
            },
            reply: Tuple {
                source: ip("10.0.0.2"),
                destination: ip("192.0.2.7"),
                source_port: 80,
                destination_port: 40_000,
            },
            timeout: Duration::from_secs(30),
            mark: 0,
            label: Some([7; 16]),
            status: 2,
            id: None,
            zone: None,
            original_zone: Some([0, 9]),
        }
    }

    #[test]
    fn an_entry_is_read_as_it_was_told() {
        let wanted = example();
        let bytes = told(&wanted);
        let read: Vec<_> = messages(&bytes).filter_map(connection).collect();
        assert_eq!(read, [wanted]);
    }

    #[test]
    fn a_filter_means_what_has_all_it_names() {
        let connection = example();
        let member = connection.reply.source;
        let filter = Filter::new().protocol(Protocol::Tcp).reply_source(member);
        assert!(filter.fits(&connection));
        assert!(filter.reply_source_port(80).fits(&connection));
        assert!(!filter.reply_source_port(81).fits(&connection));
        assert!(!filter.original_destination(member).fits(&connection));
        assert!(!filter.protocol(Protocol::Udp).fits(&connection));
        assert_eq!((filter.family(), Filter::new().family()), (2, 0));
    }

    proptest! {
        #[test]
        fn whatever_the_kernel_says_is_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let entry = Message { kind: SUBSYSTEM << 8 | NEW, flags: 0, sequence: 0, payload: &bytes };
            let _ = connection(entry);
        }

        #[test]
        fn a_damaged_entry_is_read_without_a_panic(at in 0_usize..150, byte in any::<u8>()) {
            let mut bytes = told(&example());
            if let Some(hit) = bytes.get_mut(at) {
                *hit = byte;
            }
            for message in messages(&bytes) {
                let _ = connection(message);
            }
        }
    }
}
