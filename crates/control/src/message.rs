//! Messages between an agent and a manager, and their bytes.
//!
//! Protocol buffers, declared here by hand: a field that a reader does not know is skipped, so either side may be newer. What
//! is sent often (rows, heartbeats) is typed field by field; what is sent seldom (requests, host and network descriptions)
//! travels as the JSON that the program's own API uses. Decoding checks every value once: what comes out of
//! [`ToManager::decode`] and [`ToAgent::decode`] needs no second look. It never panics and never allocates more than a small
//! multiple of its input. Framing and limits of size are in `transport.rs`.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use vtep::{MacAddr, Vni};

use crate::host::HostId;
use crate::network::Endpoint;
use crate::request::EndpointState;

pub(crate) mod rows;
mod to_agent;
mod to_manager;
mod wire;

pub use rows::Rows;
pub use to_agent::ToAgent;
pub use to_manager::ToManager;

/// The protocol's version. A manager refuses a hello with another one, in words.
pub const VERSION: u32 = 1;

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

fn vni(number: u32) -> Result<Vni, MessageError> {
    Vni::new(number).map_err(|_| MessageError::Field("vni"))
}

fn mac(bytes: &[u8]) -> Result<MacAddr, MessageError> {
    let octets = bytes.try_into().map_err(|_| MessageError::Field("mac"))?;
    Ok(MacAddr::new(octets))
}

fn ip(bytes: &[u8]) -> Result<IpAddr, MessageError> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Ok(octets.into());
    }
    <[u8; 16]>::try_from(bytes)
        .map(IpAddr::from)
        .map_err(|_| MessageError::Field("address"))
}

fn ip_to_wire(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
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

    use std::sync::Arc;
    use std::time::Duration;

    use bytes::Bytes;
    use prost::Message as _;

    use super::rows::row_to_wire;
    use super::*;
    use crate::epoch::Epoch;
    use crate::host::HostInfo;
    use crate::installed::{Digest, Entry, Fault, RuleDifference};
    use crate::names::Names;
    use crate::request::Request;
    use crate::row::{Row, State};
    use crate::service::{Membership, Service, ServiceSpec};
    use crate::token::Secret;

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
            member: (n % 5 == 4).then_some(Membership {
                service: Epoch::new(1, n.into()),
                weight: u16::from(n),
                serving: n.is_multiple_of(2),
            }),
            names: (n % 7 == 4).then(|| {
                Arc::new(Names {
                    container: format!("c{n}"),
                    id: "0123456789ab".to_owned(),
                    aliases: vec!["db".to_owned(); usize::from(n % 3)],
                })
            }),
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

    fn service() -> Service {
        Service {
            id: "s".repeat(25),
            epoch: Epoch::new(1, 2),
            version: Epoch::new(1, 3),
            vni: Vni::MAX,
            spec: ServiceSpec::named("web", "blue"),
            vips: vec![[10, 0, 9, 9].into()],
            created: 1,
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
            member: rows(5).rows[4].member,
            names: rows(5).rows[4].names.clone(),
        };
        let vni = Vni::MAX;
        vec![
            ToManager::Join {
                version: VERSION,
                secret: Secret::random(),
                request: vec![0x30; 200],
            },
            ToManager::Peer {
                version: VERSION,
                generation: u16::MAX,
                manager: HostId::random(),
            },
            ToManager::Hello {
                version: VERSION,
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
            ToManager::Installed {
                id: 8,
                vni,
                same: false,
                entries: vec![Entry::Member {
                    vtep: [192, 0, 2, 1].into(),
                    flood: true,
                }],
                rules: vec![RuleDifference {
                    container: Some("c1".to_owned()),
                    service: None,
                    rule: "table inet towline".to_owned(),
                    fault: Fault::Missing,
                }],
                last: true,
            },
            ToManager::Misdelivered {
                vni,
                mac: MacAddr::new([2, 1, 10, 0, 9, 2]),
                from: [192, 0, 2, 1].into(),
            },
            ToManager::Confirm {
                vni,
                mac: MacAddr::new([2, 1, 10, 0, 9, 2]),
                ips: vec![[10, 0, 9, 2].into(), [0xfd; 16].into()],
            },
            ToManager::Call {
                id: 6,
                request: Request::Free {
                    vni,
                    epoch: Epoch::new(1, 2),
                },
            },
            ToManager::Offer {
                vni,
                services: vec![service()],
            },
            ToManager::Applied {
                vni,
                generation: 1,
                revision: 5,
            },
            ToManager::Lease {
                vni,
                held: vec![Epoch::new(1, 2), Epoch::new(u16::MAX, 3)],
            },
        ]
    }

    fn to_agent() -> Vec<ToAgent> {
        let manager = HostId::random();
        vec![
            ToAgent::Joined {
                certificate: vec![1; 500],
                ca: vec![2; 400],
            },
            ToAgent::Peer {
                generation: 3,
                manager,
            },
            ToAgent::Welcome {
                cluster: "0".repeat(16),
                manager,
                heartbeat: Duration::from_millis(500),
                last_epoch: Epoch::new(2, 7),
                ingress: Some(Vni::MAX),
                warnings: vec!["mind the MTU".to_owned()],
            },
            ToAgent::Reject {
                reason: "no".to_owned(),
                removed: true,
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
            ToAgent::Ingress(None),
            ToAgent::Services {
                vni: Vni::MAX,
                full: true,
                services: vec![service()],
                removed: vec![Epoch::new(1, 2)],
                last: true,
            },
            ToAgent::Rows(rows(20)),
            ToAgent::RowLost {
                vni: Vni::MAX,
                epoch: Epoch::new(1, 2),
            },
            ToAgent::Inspect {
                id: 8,
                vni: Vni::MAX,
                digest: Digest::from_bytes([7; 16]),
            },
            ToAgent::Misdelivered {
                vni: Vni::MAX,
                mac: MacAddr::new([2, 1, 10, 0, 9, 2]),
            },
            ToAgent::Corrections {
                vni: Vni::MAX,
                rows: rows(3).rows,
            },
            ToAgent::Reply {
                id: 6,
                part: Bytes::from_static(b"{}"),
                last: false,
            },
            ToAgent::Lease {
                vni: Vni::MAX,
                block: vec![crate::lease::Leased {
                    epoch: Epoch::new(1, 2),
                    mac: MacAddr::new([2, 1, 10, 0, 9, 254]),
                    ips: vec![[10, 0, 9, 254].into()],
                }],
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
        let size = |mut rows: Rows, member| {
            rows.rows.iter_mut().for_each(|row| row.member = member);
            ToAgent::Rows(rows).encode().len()
        };
        let more = |member| size(rows(101), member) - size(rows(1), member);
        assert!(more(None) < 6400, "{}", more(None));
        let member = rows(5).rows[4].member;
        assert!(more(member) < 8000, "a member costs 16 more");
    }

    #[test]
    fn values_that_cannot_be_are_errors() {
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
    fn no_debug_text_shows_a_secret() {
        let join = &to_manager()[0];
        let ToManager::Join { secret, .. } = join else {
            panic!("the first is the join")
        };
        let bytes = format!("{:?}", secret.as_bytes());
        let on_wire = wire::ToManager::decode(&join.encode()[..]).unwrap();
        assert!(!format!("{join:?} {on_wire:?}").contains(bytes.trim_matches(['[', ']'])));
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
