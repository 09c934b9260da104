//! What an agent says.

use std::net::IpAddr;

use bytes::Bytes;
use prost::Message as _;
use vtep::{MacAddr, Vni};

use super::{MessageError, generation, host_id, ip, ip_to_wire, json, mac, parse, vni, wire};
use crate::epoch::Epoch;
use crate::host::{HostId, HostInfo};
use crate::installed::{Entry, RuleDifference};
use crate::network::{Endpoint, Network};
use crate::request::{EndpointState, Request};
use crate::service::Service;
use crate::token::Secret;

/// From an agent to its manager.
#[derive(Clone, Debug, PartialEq)]
pub enum ToManager {
    /// All that a connection may say that has shown no certificate: sign one, please. Answered by [`super::ToAgent::Joined`].
    Join {
        /// [`VERSION`](super::VERSION).
        version: u32,
        /// The right to be a member.
        secret: Secret,
        /// The host's key, to be signed (PKCS #10, DER).
        request: Vec<u8>,
    },
    /// All that a manager says to another. Answered by [`super::ToAgent::Peer`].
    Peer {
        /// [`VERSION`](super::VERSION).
        version: u32,
        /// The generation that it issues epochs in.
        generation: u16,
        /// Its host.
        manager: HostId,
    },
    /// First on every connection that has shown one.
    Hello {
        /// [`VERSION`](super::VERSION).
        version: u32,
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
    /// What the sender's datapath holds of a network, in parts: the answer to [`super::ToAgent::Inspect`].
    Installed {
        /// The inspection's id.
        id: u64,
        /// The network.
        vni: Vni,
        /// The digest was right; no entries follow.
        same: bool,
        /// The entries.
        entries: Vec<Entry>,
        /// Rules for services that stand otherwise than this host's table says.
        rules: Vec<RuleDifference>,
        /// No part follows.
        last: bool,
    },
    /// A frame for a MAC address that is not here came from another host.
    Misdelivered {
        /// The network.
        vni: Vni,
        /// Whom the frame was for.
        mac: MacAddr,
        /// The VTEP that sent it.
        from: IpAddr,
    },
    /// Send what is known of these addresses and of who has this MAC address.
    Confirm {
        /// The network.
        vni: Vni,
        /// The MAC address.
        mac: MacAddr,
        /// The addresses, at most 64.
        ips: Vec<IpAddr>,
    },
    /// A question.
    Call {
        /// Names the answer.
        id: u64,
        /// The question.
        request: Request,
    },
    /// Services that the sender knows and the manager's list lacks, or has in an older form: for a manager that lost them.
    Offer {
        /// The network.
        vni: Vni,
        /// The services, as the sender knows them.
        services: Vec<Service>,
    },
    /// All news of a network up to this place are in force on the sender's host.
    Applied {
        /// The network.
        vni: Vni,
        /// The life of the manager's store in which revisions count.
        generation: u16,
        /// Up to this one.
        revision: u64,
    },
    /// Of this network's block, the sender has these addresses still, unused; what else it used is published.
    Lease {
        /// The network.
        vni: Vni,
        /// Their epochs, in the order in which they were granted.
        held: Vec<Epoch>,
    },
}

impl ToManager {
    /// The message's bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        use wire::to_manager::Kind;
        let kind = match self {
            Self::Join {
                version,
                secret,
                request,
            } => Kind::Join(wire::Join {
                version: *version,
                secret: secret.as_bytes().to_vec(),
                request: request.clone(),
            }),
            Self::Peer {
                version,
                generation,
                manager,
            } => Kind::Peer(wire::Peer {
                version: *version,
                generation: u32::from(*generation),
                manager: manager.as_bytes().to_vec(),
            }),
            Self::Hello {
                version,
                host,
                last_epoch,
            } => Kind::Hello(wire::Hello {
                version: *version,
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
            Self::Installed {
                id,
                vni,
                same,
                entries,
                rules,
                last,
            } => Kind::Installed(wire::Installed {
                id: *id,
                vni: vni.get(),
                same: *same,
                entries: json(entries),
                rules: json(rules),
                last: *last,
            }),
            Self::Misdelivered { vni, mac, from } => Kind::Misdelivered(wire::Misdelivered {
                vni: vni.get(),
                mac: mac.octets().to_vec(),
                from: ip_to_wire(*from),
            }),
            Self::Confirm { vni, mac, ips } => Kind::Confirm(wire::Confirm {
                vni: vni.get(),
                mac: mac.octets().to_vec(),
                ips: ips.iter().copied().map(ip_to_wire).collect(),
            }),
            Self::Call { id, request } => Kind::Call(wire::Call {
                id: *id,
                request: json(request),
            }),
            Self::Offer { vni, services } => Kind::Offer(wire::Offer {
                vni: vni.get(),
                services: services.iter().map(json).collect(),
            }),
            Self::Applied {
                vni,
                generation,
                revision,
            } => Kind::Applied(wire::Applied {
                vni: vni.get(),
                generation: u32::from(*generation),
                revision: *revision,
            }),
            Self::Lease { vni, held } => Kind::Lease(wire::Held {
                vni: vni.get(),
                epochs: held.iter().map(|epoch| epoch.get()).collect(),
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
                Kind::Join(join) => Self::Join {
                    version: join.version,
                    secret: join
                        .secret
                        .try_into()
                        .map(Secret::from_bytes)
                        .map_err(|_| MessageError::Field("secret"))?,
                    request: join.request,
                },
                Kind::Peer(peer) => Self::Peer {
                    version: peer.version,
                    generation: generation(peer.generation)?,
                    manager: host_id(&peer.manager)?,
                },
                Kind::Hello(hello) => Self::Hello {
                    version: hello.version,
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
                Kind::Installed(installed) => Self::Installed {
                    id: installed.id,
                    vni: vni(installed.vni)?,
                    same: installed.same,
                    entries: parse("entry", &installed.entries)?,
                    // An agent that knows nothing of them says nothing.
                    rules: match installed.rules.as_slice() {
                        [] => Vec::new(),
                        rules => parse("rule", rules)?,
                    },
                    last: installed.last,
                },
                Kind::Misdelivered(told) => Self::Misdelivered {
                    vni: vni(told.vni)?,
                    mac: mac(&told.mac)?,
                    from: ip(&told.from)?,
                },
                Kind::Confirm(asked) => Self::Confirm {
                    vni: vni(asked.vni)?,
                    mac: mac(&asked.mac)?,
                    ips: asked
                        .ips
                        .iter()
                        .map(|bytes| ip(bytes))
                        .collect::<Result<_, _>>()?,
                },
                Kind::Call(call) => Self::Call {
                    id: call.id,
                    request: parse("request", &call.request)?,
                },
                Kind::Offer(offer) => Self::Offer {
                    vni: vni(offer.vni)?,
                    services: offer
                        .services
                        .iter()
                        .map(|service| parse("service", service))
                        .collect::<Result<_, _>>()?,
                },
                Kind::Applied(applied) => Self::Applied {
                    vni: vni(applied.vni)?,
                    generation: generation(applied.generation)?,
                    revision: applied.revision,
                },
                Kind::Lease(lease) => Self::Lease {
                    vni: vni(lease.vni)?,
                    held: lease.epochs.into_iter().map(Epoch::from_bits).collect(),
                },
            },
        )
    }
}
