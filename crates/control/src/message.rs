//! Messages between an agent and a manager, and their bytes.
//!
//! Protocol buffers, declared here by hand: a field that a reader does not know is skipped, so either side may be newer. What
//! is sent often (rows, heartbeats) is typed field by field; what is sent seldom (requests, host and network descriptions)
//! travels as the JSON that the program's own API uses. Decoding checks every value once: what comes out of
//! [`ToManager::decode`] and [`ToAgent::decode`] needs no second look. It never panics and never allocates more than a small
//! multiple of its input. Framing and limits of size are in `transport.rs`.

use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use vtep::{MacAddr, Vni};

use crate::epoch::Epoch;
use crate::host::{HostId, HostInfo, HostView};
use crate::network::{Endpoint, Network};
use crate::request::{EndpointState, Request};
use crate::row::{Row, State};
use crate::token::Token;

mod wire;

/// The protocol's version. A manager refuses a hello with another one, in words.
pub const VERSION: u32 = 1;

/// From an agent to its manager.
#[derive(Clone, Debug, PartialEq)]
pub enum ToManager {
    /// First on every connection.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// The right to be here.
        token: Token,
        /// Who is here.
        host: HostInfo,
        /// The highest epoch that this agent has ever seen: a manager whose store is older learns it by this.
        last_epoch: Epoch,
    },
    /// Still here.
    Heartbeat,
    /// Send this network's rows from here on.
    Subscribe {
        /// The network.
        vni: Vni,
        /// The generation of what the agent has; 0 for nothing.
        generation: u16,
        /// The last change that it has.
        revision: u64,
        /// The network as the agent knows it, for a manager that lost it.
        network: Option<Network>,
    },
    /// No more of this network.
    Unsubscribe {
        /// The network.
        vni: Vni,
    },
    /// The sender's own endpoint changed.
    Publish {
        /// The endpoint.
        endpoint: Endpoint,
        /// Orders the owner's edits.
        owner_seq: u32,
        /// What it is now.
        state: EndpointState,
    },
    /// A question.
    Call {
        /// Names the answer.
        id: u64,
        /// The question.
        request: Request,
    },
}

/// From a manager to an agent.
#[derive(Clone, Debug, PartialEq)]
pub enum ToAgent {
    /// The answer to a hello.
    Welcome {
        /// The cluster.
        cluster: String,
        /// The manager's host.
        manager: HostId,
        /// How often to send a heartbeat.
        heartbeat: Duration,
        /// The last epoch that the manager issued: what the agent saw before is dealt with.
        last_epoch: Epoch,
        /// For people.
        warnings: Vec<String>,
    },
    /// No: the connection ends.
    Reject {
        /// Why, for people.
        reason: String,
    },
    /// Still here.
    Heartbeat,
    /// Hosts that came or changed, and that went.
    Hosts {
        /// Forget every host that is not in this message.
        full: bool,
        /// Came or changed.
        hosts: Vec<HostView>,
        /// Went.
        removed: Vec<HostId>,
    },
    /// What the manager holds for the agent's host, in parts.
    Owned {
        /// Endpoints.
        endpoints: Vec<OwnedEndpoint>,
        /// Container names.
        names: Vec<String>,
        /// No part follows.
        last: bool,
    },
    /// A subscribed network is, or became, this.
    Network(Network),
    /// A subscribed network does not exist any more.
    NetworkRemoved {
        /// Which.
        vni: Vni,
    },
    /// Rows of a network.
    Rows(Rows),
    /// An endpoint of the agent's host is not its own any more.
    RowLost {
        /// The network.
        vni: Vni,
        /// The endpoint's epoch.
        epoch: Epoch,
    },
    /// A part of an answer: the JSON of `Result<Response, String>`.
    Reply {
        /// The call's id.
        id: u64,
        /// The bytes.
        part: Bytes,
        /// No part follows.
        last: bool,
    },
}

/// Every change after revision `from`, up to and including revision `to`, in one or more parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// The network.
    pub vni: Vni,
    /// The life of the manager's store in which revisions count.
    pub generation: u16,
    /// Changes after this one; 0: a snapshot.
    pub from: u64,
    /// Up to this one.
    pub to: u64,
    /// Which part this is, from 0.
    pub part: u32,
    /// No part follows.
    pub last: bool,
    /// Rows absent from a snapshot do not exist. Unset while a manager is still learning what it lost.
    pub settled: bool,
    /// The rows.
    pub rows: Vec<Row>,
}

/// An endpoint with what only its owner needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedEndpoint {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The owner's last edit.
    pub owner_seq: u32,
    /// What it is.
    pub state: EndpointState,
}

/// Bytes that are no message.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// No protocol buffer of ours.
    #[error("undecodable message")]
    Bytes(#[from] prost::DecodeError),
    /// A kind of message that this version does not know.
    #[error("message of an unknown kind")]
    Kind,
    /// A field holds a value it cannot have.
    #[error("message with an invalid {0}")]
    Field(&'static str),
    /// A description in JSON is wrong.
    #[error("message with an invalid {what}")]
    Json {
        /// Which description.
        what: &'static str,
        /// The cause.
        source: serde_json::Error,
    },
}

impl ToManager {
    /// The message's bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        use wire::to_manager::Kind;
        let kind = match self {
            Self::Hello {
                version,
                token,
                host,
                last_epoch,
            } => Kind::Hello(wire::Hello {
                version: *version,
                token: token.to_string(),
                host: json(host),
                last_epoch: last_epoch.get(),
            }),
            Self::Heartbeat => Kind::Heartbeat(wire::Empty {}),
            Self::Subscribe {
                vni,
                generation,
                revision,
                network,
            } => Kind::Subscribe(wire::Subscribe {
                vni: vni.get(),
                generation: u32::from(*generation),
                revision: *revision,
                network: network.as_ref().map(json),
            }),
            Self::Unsubscribe { vni } => Kind::Unsubscribe(wire::Network { vni: vni.get() }),
            Self::Publish {
                endpoint,
                owner_seq,
                state,
            } => Kind::Publish(wire::Publish {
                endpoint: json(endpoint),
                owner_seq: *owner_seq,
                up: *state == EndpointState::Up,
            }),
            Self::Call { id, request } => Kind::Call(wire::Call {
                id: *id,
                request: json(request),
            }),
        };
        wire::ToManager { kind: Some(kind) }.encode_to_vec().into()
    }

    /// The message of these bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        use wire::to_manager::Kind;
        Ok(
            match wire::ToManager::decode(bytes)?
                .kind
                .ok_or(MessageError::Kind)?
            {
                Kind::Hello(hello) => Self::Hello {
                    version: hello.version,
                    token: hello
                        .token
                        .parse()
                        .map_err(|_| MessageError::Field("token"))?,
                    host: parse("host", &hello.host)?,
                    last_epoch: Epoch::from_bits(hello.last_epoch),
                },
                Kind::Heartbeat(wire::Empty {}) => Self::Heartbeat,
                Kind::Subscribe(subscribe) => Self::Subscribe {
                    vni: vni(subscribe.vni)?,
                    generation: generation(subscribe.generation)?,
                    revision: subscribe.revision,
                    network: subscribe
                        .network
                        .map(|network| parse("network", &network))
                        .transpose()?,
                },
                Kind::Unsubscribe(network) => Self::Unsubscribe {
                    vni: vni(network.vni)?,
                },
                Kind::Publish(publish) => Self::Publish {
                    endpoint: parse("endpoint", &publish.endpoint)?,
                    owner_seq: publish.owner_seq,
                    state: if publish.up {
                        EndpointState::Up
                    } else {
                        EndpointState::Down
                    },
                },
                Kind::Call(call) => Self::Call {
                    id: call.id,
                    request: parse("request", &call.request)?,
                },
            },
        )
    }
}

impl ToAgent {
    /// The message's bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        use wire::to_agent::Kind;
        let kind = match self {
            Self::Welcome {
                cluster,
                manager,
                heartbeat,
                last_epoch,
                warnings,
            } => Kind::Welcome(wire::Welcome {
                cluster: cluster.clone(),
                manager: manager.as_bytes().to_vec(),
                heartbeat_ms: u32::try_from(heartbeat.as_millis()).unwrap_or(u32::MAX),
                warnings: warnings.clone(),
                last_epoch: last_epoch.get(),
            }),
            Self::Reject { reason } => Kind::Reject(wire::Reject {
                reason: reason.clone(),
            }),
            Self::Heartbeat => Kind::Heartbeat(wire::Empty {}),
            Self::Hosts {
                full,
                hosts,
                removed,
            } => Kind::Hosts(wire::Hosts {
                full: *full,
                hosts: hosts.iter().map(json).collect(),
                removed: removed.iter().map(|id| id.as_bytes().to_vec()).collect(),
            }),
            Self::Owned {
                endpoints,
                names,
                last,
            } => Kind::Owned(wire::Owned {
                endpoints: endpoints.iter().map(json).collect(),
                names: names.clone(),
                last: *last,
            }),
            Self::Network(network) => Kind::Network(wire::Json {
                json: json(network),
            }),
            Self::NetworkRemoved { vni } => Kind::NetworkRemoved(wire::Network { vni: vni.get() }),
            Self::Rows(rows) => Kind::Rows(rows.to_wire()),
            Self::RowLost { vni, epoch } => Kind::RowLost(wire::RowLost {
                vni: vni.get(),
                epoch: epoch.get(),
            }),
            Self::Reply { id, part, last } => Kind::Reply(wire::Reply {
                id: *id,
                part: part.clone(),
                last: *last,
            }),
        };
        wire::ToAgent { kind: Some(kind) }.encode_to_vec().into()
    }

    /// The message of these bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        use wire::to_agent::Kind;
        Ok(
            match wire::ToAgent::decode(bytes)?
                .kind
                .ok_or(MessageError::Kind)?
            {
                Kind::Welcome(welcome) => Self::Welcome {
                    cluster: welcome.cluster,
                    manager: host_id(&welcome.manager)?,
                    heartbeat: Duration::from_millis(u64::from(welcome.heartbeat_ms)),
                    last_epoch: Epoch::from_bits(welcome.last_epoch),
                    warnings: welcome.warnings,
                },
                Kind::Reject(reject) => Self::Reject {
                    reason: reject.reason,
                },
                Kind::Heartbeat(wire::Empty {}) => Self::Heartbeat,
                Kind::Hosts(hosts) => Self::Hosts {
                    full: hosts.full,
                    hosts: hosts
                        .hosts
                        .iter()
                        .map(|host| parse("host", host))
                        .collect::<Result<_, _>>()?,
                    removed: hosts
                        .removed
                        .iter()
                        .map(|id| host_id(id))
                        .collect::<Result<_, _>>()?,
                },
                Kind::Owned(owned) => Self::Owned {
                    endpoints: owned
                        .endpoints
                        .iter()
                        .map(|e| parse("endpoint", e))
                        .collect::<Result<_, _>>()?,
                    names: owned.names,
                    last: owned.last,
                },
                Kind::Network(network) => Self::Network(parse("network", &network.json)?),
                Kind::NetworkRemoved(network) => Self::NetworkRemoved {
                    vni: vni(network.vni)?,
                },
                Kind::Rows(rows) => Self::Rows(Rows::from_wire(rows)?),
                Kind::RowLost(lost) => Self::RowLost {
                    vni: vni(lost.vni)?,
                    epoch: Epoch::from_bits(lost.epoch),
                },
                Kind::Reply(reply) => Self::Reply {
                    id: reply.id,
                    part: reply.part,
                    last: reply.last,
                },
            },
        )
    }
}

impl Rows {
    fn to_wire(&self) -> wire::Rows {
        wire::Rows {
            vni: self.vni.get(),
            generation: u32::from(self.generation),
            from: self.from,
            to: self.to,
            part: self.part,
            last: self.last,
            settled: self.settled,
            rows: self.rows.iter().map(row_to_wire).collect(),
        }
    }

    fn from_wire(rows: wire::Rows) -> Result<Self, MessageError> {
        Ok(Self {
            vni: vni(rows.vni)?,
            generation: generation(rows.generation)?,
            from: rows.from,
            to: rows.to,
            part: rows.part,
            last: rows.last,
            settled: rows.settled,
            rows: rows
                .rows
                .into_iter()
                .map(row_from_wire)
                .collect::<Result<_, _>>()?,
        })
    }
}

fn row_to_wire(row: &Row) -> wire::Row {
    wire::Row {
        ip: match row.ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        },
        epoch: row.epoch.get(),
        owner: row.owner.as_bytes().to_vec(),
        owner_seq: row.owner_seq,
        state: match row.state {
            State::Up => 1,
            State::Down => 2,
            State::Free => 3,
        },
        mac: row.mac.octets().to_vec(),
    }
}

fn row_from_wire(row: wire::Row) -> Result<Row, MessageError> {
    let ip = if let Ok(octets) = <[u8; 4]>::try_from(row.ip.as_slice()) {
        octets.into()
    } else {
        <[u8; 16]>::try_from(row.ip.as_slice())
            .map_err(|_| MessageError::Field("address"))?
            .into()
    };
    Ok(Row {
        ip,
        epoch: Epoch::from_bits(row.epoch),
        owner: host_id(&row.owner)?,
        owner_seq: row.owner_seq,
        state: match row.state {
            1 => State::Up,
            2 => State::Down,
            3 => State::Free,
            _ => return Err(MessageError::Field("state")),
        },
        mac: MacAddr::new(
            row.mac
                .as_slice()
                .try_into()
                .map_err(|_| MessageError::Field("mac"))?,
        ),
    })
}

fn vni(number: u32) -> Result<Vni, MessageError> {
    Vni::new(number).map_err(|_| MessageError::Field("vni"))
}

fn generation(number: u32) -> Result<u16, MessageError> {
    u16::try_from(number).map_err(|_| MessageError::Field("generation"))
}

fn host_id(bytes: &[u8]) -> Result<HostId, MessageError> {
    Ok(HostId::from_bytes(
        bytes
            .try_into()
            .map_err(|_| MessageError::Field("host id"))?,
    ))
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("our types have string keys and no failing serialiser")
}

fn parse<'de, T: Deserialize<'de>>(
    what: &'static str,
    bytes: &'de [u8],
) -> Result<T, MessageError> {
    serde_json::from_slice(bytes).map_err(|source| MessageError::Json { what, source })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rows(count: u8) -> Rows {
        let row = |n: u8| Row {
            ip: if n.is_multiple_of(2) {
                [10, 0, 9, n].into()
            } else {
                [0xfd, 0, 0, 0, 0, 0, 0, n.into()].into()
            },
            epoch: Epoch::new(3, u64::from(n) << 40),
            owner: HostId::from_bytes([n; 16]),
            owner_seq: u32::MAX - u32::from(n),
            state: [State::Up, State::Down, State::Free][usize::from(n % 3)],
            mac: MacAddr::new([2, n, 10, 0, 9, n]),
        };
        Rows {
            vni: Vni::MAX,
            generation: u16::MAX,
            from: 1,
            to: u64::MAX,
            part: 7,
            last: true,
            settled: true,
            rows: (0..count).map(row).collect(),
        }
    }

    fn to_manager() -> Vec<ToManager> {
        let host = HostInfo {
            id: HostId::random(),
            name: "h1".to_owned(),
            vtep: [192, 0, 2, 1].into(),
            port: 4789,
            link_mtu: 1500,
            incarnation: 1,
        };
        let endpoint = Endpoint {
            vni: Vni::MAX,
            container: "c1".to_owned(),
            mac: MacAddr::new([2, 1, 10, 0, 9, 2]),
            ips: vec![[10, 0, 9, 2].into()],
            epoch: Epoch::new(1, 2),
        };
        let vni = Vni::MAX;
        vec![
            ToManager::Hello {
                version: VERSION,
                token: Token::random(),
                host,
                last_epoch: Epoch::new(1, 9),
            },
            ToManager::Heartbeat,
            ToManager::Subscribe {
                vni,
                generation: 1,
                revision: 5,
                network: None,
            },
            ToManager::Unsubscribe { vni },
            ToManager::Publish {
                endpoint,
                owner_seq: 4,
                state: EndpointState::Up,
            },
            ToManager::Call {
                id: 6,
                request: Request::Free {
                    vni,
                    epoch: Epoch::new(1, 2),
                },
            },
        ]
    }

    fn to_agent() -> Vec<ToAgent> {
        let manager = HostId::random();
        vec![
            ToAgent::Welcome {
                cluster: "0".repeat(16),
                manager,
                heartbeat: Duration::from_millis(500),
                last_epoch: Epoch::new(2, 7),
                warnings: vec!["mind the MTU".to_owned()],
            },
            ToAgent::Reject {
                reason: "no".to_owned(),
            },
            ToAgent::Heartbeat,
            ToAgent::Hosts {
                full: true,
                hosts: Vec::new(),
                removed: vec![manager],
            },
            ToAgent::Owned {
                endpoints: Vec::new(),
                names: vec!["c1".to_owned()],
                last: true,
            },
            ToAgent::NetworkRemoved { vni: Vni::MAX },
            ToAgent::Rows(rows(20)),
            ToAgent::RowLost {
                vni: Vni::MAX,
                epoch: Epoch::new(1, 2),
            },
            ToAgent::Reply {
                id: 6,
                part: Bytes::from_static(b"{}"),
                last: false,
            },
        ]
    }

    #[test]
    fn every_message_survives_its_bytes() {
        for message in to_manager() {
            assert_eq!(ToManager::decode(&message.encode()).unwrap(), message);
        }
        for message in to_agent() {
            assert_eq!(ToAgent::decode(&message.encode()).unwrap(), message);
        }
    }

    #[test]
    fn a_row_costs_less_than_64_bytes() {
        let more = ToAgent::Rows(rows(101)).encode().len() - ToAgent::Rows(rows(1)).encode().len();
        assert!(more < 6400, "{more}");
    }

    #[test]
    fn values_that_cannot_be_are_errors() {
        use prost::Message;
        let rows = |row: wire::Row| {
            let rows = wire::Rows {
                rows: vec![row],
                ..wire::Rows::default()
            };
            ToAgent::decode(
                &wire::ToAgent {
                    kind: Some(wire::to_agent::Kind::Rows(rows)),
                }
                .encode_to_vec(),
            )
        };
        let good = row_to_wire(&self::rows(1).rows[0]);
        assert!(rows(good.clone()).is_ok());
        for bad in [
            wire::Row {
                ip: vec![10, 0, 9],
                ..good.clone()
            },
            wire::Row {
                owner: vec![0; 15],
                ..good.clone()
            },
            wire::Row {
                state: 0,
                ..good.clone()
            },
            wire::Row {
                state: 4,
                ..good.clone()
            },
            wire::Row {
                mac: vec![0; 7],
                ..good
            },
        ] {
            assert!(
                matches!(rows(bad.clone()), Err(MessageError::Field(_))),
                "{bad:?}"
            );
        }
        let network = wire::Network {
            vni: Vni::MAX.get() + 1,
        };
        let unsubscribe = wire::ToManager {
            kind: Some(wire::to_manager::Kind::Unsubscribe(network)),
        };
        assert!(matches!(
            ToManager::decode(&unsubscribe.encode_to_vec()),
            Err(MessageError::Field("vni"))
        ));
        assert!(
            matches!(ToManager::decode(&[]), Err(MessageError::Kind)),
            "nothing, or a kind from the future"
        );
        let deep = wire::Call {
            id: 1,
            request: "[".repeat(100_000).into_bytes(),
        };
        let deep = wire::ToManager {
            kind: Some(wire::to_manager::Kind::Call(deep)),
        };
        assert!(matches!(
            ToManager::decode(&deep.encode_to_vec()),
            Err(MessageError::Json { .. })
        ));
    }

    #[test]
    fn no_debug_text_shows_a_token() {
        let hello = &to_manager()[0];
        let ToManager::Hello { token, .. } = hello else {
            panic!("the first is the hello")
        };
        let token = token.to_string();
        let secret = token.rsplit('-').next().unwrap();
        let on_wire = wire::ToManager::decode(&hello.encode()[..]).unwrap();
        assert!(!format!("{hello:?} {on_wire:?}").contains(secret));
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_error_or_a_message(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = ToManager::decode(&bytes);
            let _ = ToAgent::decode(&bytes);
        }

        #[test]
        fn damaged_messages_are_an_error_or_a_message(
            which in any::<prop::sample::Index>(),
            cut in any::<prop::sample::Index>(),
            place in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            for mut bytes in [which.get(&to_manager()).encode().to_vec(), which.get(&to_agent()).encode().to_vec()] {
                if bytes.is_empty() {
                    continue;
                }
                let place = place.index(bytes.len());
                bytes[place] = byte;
                bytes.truncate(cut.index(bytes.len()) + 1);
                let _ = ToManager::decode(&bytes);
                let _ = ToAgent::decode(&bytes);
            }
        }
    }
}
