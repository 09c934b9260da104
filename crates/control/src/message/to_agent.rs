//! What a manager says.

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use vtep::{MacAddr, Vni};

use super::rows::{Rows, row_from_wire, row_to_wire};
use super::{
    MessageError, OwnedEndpoint, VERSION, generation, host_id, json, mac, parse, vni, wire,
};
use crate::epoch::Epoch;
use crate::host::{HostId, HostView};
use crate::installed::Digest;
use crate::lease::Leased;
use crate::network::Network;
use crate::row::Row;
use crate::service::Service;

/// From a manager to an agent.
#[derive(Clone, Debug, PartialEq)]
pub enum ToAgent {
    /// The answer to [`super::ToManager::Join`], and the connection's end.
    Joined {
        /// The host's certificate, in DER.
        certificate: Vec<u8>,
        /// The certificate of the authority that signed it, in DER.
        ca: Vec<u8>,
    },
    /// The answer to [`super::ToManager::Peer`], and the connection's end.
    Peer {
        /// The generation that the manager issues epochs in.
        generation: u16,
        /// Its host.
        manager: HostId,
    },
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
        /// The network of published ports.
        ingress: Option<Vni>,
        /// For people.
        warnings: Vec<String>,
    },
    /// No: the connection ends.
    Reject {
        /// Why, for people.
        reason: String,
        /// The host was a member and was removed: it takes its ports down and does not come back.
        removed: bool,
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
    /// The network of published ports came, or went.
    Ingress(Option<Vni>),
    /// Services on a subscribed network that came or changed, and that went, in parts. In order with its rows.
    Services {
        /// The network.
        vni: Vni,
        /// A service of it that is in none of the parts does not exist here: to be offered, if it is known.
        full: bool,
        /// Came or changed.
        services: Vec<Service>,
        /// Went.
        removed: Vec<Epoch>,
        /// No part follows.
        last: bool,
    },
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
    /// Say whether the datapath holds exactly what this digest is of, and if not, what it holds.
    Inspect {
        /// Names the answer.
        id: u64,
        /// The network.
        vni: Vni,
        /// Of what it should hold.
        digest: Digest,
    },
    /// A frame of this host's for this MAC address came to a host that does not have it: ask, with `Confirm`.
    Misdelivered {
        /// The network.
        vni: Vni,
        /// The MAC address.
        mac: MacAddr,
    },
    /// Rows outside the network's order, after a `Confirm`: to be merged, and no place in the stream.
    Corrections {
        /// The network.
        vni: Vni,
        /// The rows.
        rows: Vec<Row>,
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
    /// What the agent's host may use of a network while no manager answers, and nothing else.
    Lease {
        /// The network.
        vni: Vni,
        /// The block.
        block: Vec<Leased>,
    },
}

impl ToAgent {
    /// The message's bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        use wire::to_agent::Kind;
        let kind = match self {
            Self::Joined { certificate, ca } => Kind::Joined(wire::Joined {
                certificate: certificate.clone(),
                ca: ca.clone(),
            }),
            Self::Peer {
                generation,
                manager,
            } => Kind::Peer(wire::Peer {
                version: VERSION,
                generation: u32::from(*generation),
                manager: manager.as_bytes().to_vec(),
            }),
            Self::Welcome {
                cluster,
                manager,
                heartbeat,
                last_epoch,
                ingress,
                warnings,
            } => Kind::Welcome(wire::Welcome {
                cluster: cluster.clone(),
                manager: manager.as_bytes().to_vec(),
                heartbeat_ms: u32::try_from(heartbeat.as_millis()).unwrap_or(u32::MAX),
                warnings: warnings.clone(),
                last_epoch: last_epoch.get(),
                ingress: ingress.map(Vni::get),
            }),
            Self::Reject { reason, removed } => Kind::Reject(wire::Reject {
                reason: reason.clone(),
                removed: *removed,
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
            Self::Ingress(ingress) => Kind::Ingress(wire::Ingress {
                vni: ingress.map(Vni::get),
            }),
            Self::Services {
                vni,
                full,
                services,
                removed,
                last,
            } => Kind::Services(wire::Services {
                vni: vni.get(),
                full: *full,
                services: services.iter().map(json).collect(),
                removed: removed.iter().map(|epoch| epoch.get()).collect(),
                last: *last,
            }),
            Self::NetworkRemoved { vni } => Kind::NetworkRemoved(wire::Network { vni: vni.get() }),
            Self::Rows(rows) => Kind::Rows(rows.to_wire()),
            Self::RowLost { vni, epoch } => Kind::RowLost(wire::RowLost {
                vni: vni.get(),
                epoch: epoch.get(),
            }),
            Self::Inspect { id, vni, digest } => Kind::Inspect(wire::Inspect {
                id: *id,
                vni: vni.get(),
                digest: digest.to_bytes().to_vec(),
            }),
            Self::Misdelivered { vni, mac } => Kind::Misdelivered(wire::Misdelivered {
                vni: vni.get(),
                mac: mac.octets().to_vec(),
                from: Vec::new(),
            }),
            Self::Corrections { vni, rows } => Kind::Corrections(wire::Corrections {
                vni: vni.get(),
                rows: rows.iter().map(row_to_wire).collect(),
            }),
            Self::Reply { id, part, last } => Kind::Reply(wire::Reply {
                id: *id,
                part: part.clone(),
                last: *last,
            }),
            Self::Lease { vni, block } => Kind::Lease(wire::Block {
                vni: vni.get(),
                leased: block.iter().map(json).collect(),
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
                Kind::Joined(joined) => Self::Joined {
                    certificate: joined.certificate,
                    ca: joined.ca,
                },
                Kind::Peer(peer) => Self::Peer {
                    generation: generation(peer.generation)?,
                    manager: host_id(&peer.manager)?,
                },
                Kind::Welcome(welcome) => Self::Welcome {
                    cluster: welcome.cluster,
                    manager: host_id(&welcome.manager)?,
                    heartbeat: Duration::from_millis(u64::from(welcome.heartbeat_ms)),
                    last_epoch: Epoch::from_bits(welcome.last_epoch),
                    ingress: welcome.ingress.map(vni).transpose()?,
                    warnings: welcome.warnings,
                },
                Kind::Reject(reject) => Self::Reject {
                    reason: reject.reason,
                    removed: reject.removed,
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
                Kind::Ingress(ingress) => Self::Ingress(ingress.vni.map(vni).transpose()?),
                Kind::Services(told) => Self::Services {
                    vni: vni(told.vni)?,
                    full: told.full,
                    services: told
                        .services
                        .iter()
                        .map(|service| parse("service", service))
                        .collect::<Result<_, _>>()?,
                    removed: told.removed.into_iter().map(Epoch::from_bits).collect(),
                    last: told.last,
                },
                Kind::NetworkRemoved(network) => Self::NetworkRemoved {
                    vni: vni(network.vni)?,
                },
                Kind::Rows(rows) => Self::Rows(Rows::from_wire(rows)?),
                Kind::RowLost(lost) => Self::RowLost {
                    vni: vni(lost.vni)?,
                    epoch: Epoch::from_bits(lost.epoch),
                },
                Kind::Inspect(inspect) => Self::Inspect {
                    id: inspect.id,
                    vni: vni(inspect.vni)?,
                    digest: <[u8; 16]>::try_from(inspect.digest.as_slice())
                        .map(Digest::from_bytes)
                        .map_err(|_| MessageError::Field("digest"))?,
                },
                Kind::Misdelivered(told) => Self::Misdelivered {
                    vni: vni(told.vni)?,
                    mac: mac(&told.mac)?,
                },
                Kind::Corrections(corrections) => Self::Corrections {
                    vni: vni(corrections.vni)?,
                    rows: corrections
                        .rows
                        .into_iter()
                        .map(row_from_wire)
                        .collect::<Result<_, _>>()?,
                },
                Kind::Reply(reply) => Self::Reply {
                    id: reply.id,
                    part: reply.part,
                    last: reply.last,
                },
                Kind::Lease(lease) => Self::Lease {
                    vni: vni(lease.vni)?,
                    block: lease
                        .leased
                        .iter()
                        .map(|leased| parse("lease", leased))
                        .collect::<Result<_, _>>()?,
                },
            },
        )
    }
}
