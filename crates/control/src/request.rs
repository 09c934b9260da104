//! What the program asks of the control plane, what it answers, and what it tells unasked.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use vtep::{MacAddr, Vni};

use crate::epoch::Epoch;
use crate::events::{self, Told};
use crate::host::{HostId, HostView, Platform};
use crate::installed::{Digest, Verified};
use crate::manager::Lasts;
use crate::network::{Endpoint, Network, NetworkSpec};
use crate::pki::{Identity, Role};
use crate::row::State;
use crate::service::{Membership, Service, ServiceSpec};
use crate::table::TableChange;
use crate::token::{Secret, SecretText};

/// A question or order to the manager.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Make a network. Answer: [`Response::Network`].
    CreateNetwork {
        /// What is wanted.
        spec: NetworkSpec,
        /// Prefixes that the asking host routes; no subnet may overlap one. Default routes do not count.
        routes_in_use: Vec<IpNet>,
    },
    /// Remove a network without endpoints, by name, id or unique start of an id. Answer: [`Response::Network`].
    RemoveNetwork(String),
    /// All networks, by name. Answer: [`Response::Networks`].
    Networks,
    /// One network with its endpoints and hosts. Answer: [`Response::Details`].
    Network(String),
    /// Take a container name for this host; again by the same host is fine. Answer: [`Response::Done`].
    ClaimName(String),
    /// Give a container name back; a name this host does not hold is fine. Answer: [`Response::Done`].
    ReleaseName(String),
    /// Take addresses for one container in one network. The rows start [`State::Down`]. Answer: [`Response::Endpoint`].
    ///
    /// Asked again for a container whose endpoint is still down, the same endpoint is answered: a lost answer leaks nothing.
    Allocate {
        /// The network's name, id or unique start of an id.
        network: String,
        /// The container's name.
        container: String,
        /// Addresses wanted; a family without one gets the next free address.
        ips: Vec<IpAddr>,
        /// The MAC address wanted.
        mac: Option<MacAddr>,
        /// The service that it is to be a member of, by name, id or unique start of an id: on this network, or on the ingress
        /// network if the service has ports there. It does not serve until its owner says so.
        #[serde(default)]
        service: Option<String>,
        /// Its weight in that service; `None`: 1.
        #[serde(default)]
        weight: Option<u16>,
    },
    /// Make the network of published ports, unless this cluster has or had one. Answer: [`Response::Done`].
    MakeIngress {
        /// Prefixes that the asking host routes, as in [`Request::CreateNetwork`].
        routes_in_use: Vec<IpNet>,
    },
    /// Make a service. Answer: [`Response::Service`].
    CreateService(ServiceSpec),
    /// Make a service be like this. Its name, network, mode and virtual addresses stay. Answer: [`Response::Service`].
    UpdateService {
        /// The version that the new specification was made of: another in between is not overwritten.
        version: Epoch,
        /// Its name, id or unique start of an id.
        service: String,
        /// What it is to be, in full.
        spec: ServiceSpec,
    },
    /// Remove a service, by name, id or unique start of an id. Its members run on. Answer: [`Response::Service`].
    RemoveService(String),
    /// All services with their members, by name. Answer: [`Response::Services`].
    Services,
    /// One service with its members. Answer: [`Response::ServiceDetails`].
    Service(String),
    /// Which hosts do not yet act on this edit of the asking host's endpoint. Answered as soon as all do, with who does not after a
    /// second: [`Response::Confirmed`]. [`AgentHandle::confirmed`](crate::AgentHandle::confirmed) knows the edit.
    Confirmed {
        /// The network.
        vni: Vni,
        /// The endpoint's epoch.
        epoch: Epoch,
        /// The edit.
        owner_seq: u32,
    },
    /// Give an endpoint's addresses back; an unknown endpoint is fine. Answer: [`Response::Done`].
    Free {
        /// The network.
        vni: Vni,
        /// The endpoint's epoch.
        epoch: Epoch,
    },
    /// All hosts, by name. Answer: [`Response::Hosts`].
    Hosts,
    /// Have every host receive VXLAN on this UDP port, those that are away as soon as they are back. Answer: [`Response::Done`].
    SetVxlanPort(u16),
    /// The asking host receives VXLAN on this UDP port now, and why not on the one that is wanted. Answer: [`Response::Done`].
    TellPort {
        /// Where it receives.
        port: u16,
        /// What keeps it from the port that is wanted.
        problem: Option<String>,
    },
    /// Give a host labels, and take some from it. Answer: [`Response::Done`].
    LabelHost {
        /// Its name or id.
        host: String,
        /// To be added, or to get another value.
        add: BTreeMap<String, String>,
        /// Keys of those to be taken away.
        remove: Vec<String>,
    },
    /// What the asking host runs on, and the labels of its own configuration. Answer: [`Response::Done`].
    TellTraits {
        /// What it runs on.
        platform: Platform,
        /// Its own labels.
        labels: BTreeMap<String, String>,
    },
    /// Forget a host for good: its addresses and names are freed, and no certificate of its is taken again. Answer:
    /// [`Response::Done`].
    RemoveHost {
        /// Its name or id.
        host: String,
        /// Also when it is connected.
        force: bool,
    },
    /// Show a join token, or change it. Answer: [`Response::Token`], to managers' hosts alone.
    Token {
        /// Of which kind of host.
        role: Role,
        /// Make a new one; the present one is good no more.
        rotate: bool,
        /// For how long it is to be good from now on.
        lasts: Option<Lasts>,
    },
    /// Stand by as a manager that listens here when it is promoted. Answer: [`Response::Authority`], to hosts that joined as
    /// managers alone.
    StandBy {
        /// Where.
        listen: SocketAddr,
    },
    /// Sign a new key of the asking host. Answer: [`Response::Certificate`].
    Renew {
        /// The key (PKCS #10, DER).
        request: Vec<u8>,
    },
    /// What happened in the cluster. The answer waits a few seconds for something to tell: [`Response::Events`].
    Events(events::From),
    /// Compare what hosts' datapaths hold with what they should, in one network or in all. Answer: [`Response::Verified`].
    Verify(Option<String>),
    /// Forget the asking host. Its agent does not connect again. Answer: [`Response::Done`].
    Leave,
    /// Expect a probe with this nonce at the manager's VTEP, for the next few seconds. Answer: [`Response::Done`].
    ProbeExpect {
        /// What the probe carries.
        nonce: [u8; 16],
    },
    /// Have the manager's VTEP send probes to the asking host. Answer: [`Response::ProbeSizes`].
    ProbeReply {
        /// The nonce that was announced by [`Request::ProbeExpect`].
        nonce: [u8; 16],
        /// Where to: must be the asking host's own VTEP address.
        to: SocketAddr,
        /// What the probes sent back carry.
        back_nonce: [u8; 16],
        /// Their sizes, in bytes of IP packet on the link; at most 16.
        sizes: Vec<u16>,
    },
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// Done, nothing to tell.
    Done,
    /// A network, made or removed.
    Network(Network),
    /// All networks.
    Networks(Vec<Network>),
    /// One network with all that is in it.
    Details(NetworkDetails),
    /// An endpoint.
    Endpoint(Endpoint),
    /// A service, made, changed or removed.
    Service(Box<Service>),
    /// All services.
    Services(Vec<ServiceDetails>),
    /// One service with its members.
    ServiceDetails(Box<ServiceDetails>),
    /// Who does not act on an edit yet.
    Confirmed {
        /// Names of hosts.
        waiting: Vec<String>,
    },
    /// All hosts.
    Hosts(Vec<HostView>),
    /// A join token's secret.
    Token {
        /// What opens the door.
        secret: Secret,
        /// Seconds until it does no more, 0 when it has; `None`: it always will.
        expires_in: Option<u64>,
    },
    /// The authority with its key, as [`Authority::to_pem`](crate::Authority::to_pem) writes it.
    Authority(SecretText),
    /// A certificate, in DER.
    Certificate(Vec<u8>),
    /// What happened.
    Events(Told),
    /// What was found, by network and host.
    Verified(Vec<Verified>),
    /// The sizes of announced probes that arrived at the manager, in bytes of IP packet.
    ProbeSizes(Vec<u16>),
}

/// One network with its endpoints and the hosts that hold them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkDetails {
    /// The network.
    pub network: Network,
    /// Its endpoints, by address.
    pub endpoints: Vec<EndpointView>,
    /// The hosts that have an endpoint that is up.
    pub peers: Vec<HostView>,
    /// How full each subnet is, in their order.
    #[serde(default)]
    pub usage: Vec<SubnetUsage>,
}

/// How full a subnet is, of the addresses that can be handed out unasked. A number past 64 bits is shown as the largest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetUsage {
    /// The subnet.
    pub net: IpNet,
    /// Addresses that endpoints hold.
    pub in_use: u64,
    /// Addresses that rest after they were freed.
    pub resting: u64,
    /// Addresses that are promised to hosts.
    pub set_aside: u64,
    /// Addresses that could be handed out now.
    pub free: u64,
}

/// An endpoint as `network inspect` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointView {
    /// The endpoint.
    #[serde(flatten)]
    pub endpoint: Endpoint,
    /// The name of the host that has it.
    pub host: String,
    /// That host's id.
    pub host_id: HostId,
    /// What it is.
    pub state: State,
}

/// A service with its members.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceDetails {
    /// The service.
    #[serde(flatten)]
    pub service: Service,
    /// Its members, by container name.
    pub members: Vec<MemberView>,
}

/// A member as `service ps` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberView {
    /// The container.
    pub container: String,
    /// The name of the host that has it.
    pub host: String,
    /// That host's id.
    pub host_id: HostId,
    /// Its addresses on the service's network.
    pub ips: Vec<IpAddr>,
    /// Its addresses on the ingress network.
    pub ingress: Vec<IpAddr>,
    /// What its endpoint on the service's network is.
    pub state: State,
    /// Its part, as its owner says.
    pub member: Membership,
    /// Its host is masked: it gets no new connections.
    pub masked: bool,
}

/// Why a request was not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No manager is connected.
    #[error(
        "no manager answers (tried {managers}; {cause}): check that its agent runs and that TCP to it is open"
    )]
    NotConnected {
        /// The managers tried, separated by commas.
        managers: String,
        /// What failed last.
        cause: String,
        /// Milliseconds since a manager was connected; `None`: never since the start.
        age_ms: Option<u64>,
    },
    /// A manager is connected and did not answer in time.
    #[error(
        "the manager at {manager} did not answer within {seconds} s: see `towline status`, then try again"
    )]
    Timeout {
        /// The manager.
        manager: SocketAddr,
        /// The deadline that passed.
        seconds: u64,
    },
    /// The manager said no, in its own words.
    #[error("{0}")]
    Refused(String),
    /// The agent's control thread has ended.
    #[error("the agent is shutting down")]
    Stopped,
}

/// What an endpoint's owner says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointState {
    /// It takes frames.
    Up,
    /// It takes none, for now.
    Down,
}

/// What the manager holds for this host, told on every connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owned {
    /// Endpoints of this host.
    pub endpoints: Vec<Endpoint>,
    /// Container names of this host.
    pub names: Vec<String>,
}

/// News from the control plane, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A manager took this host in.
    Connected {
        /// Which.
        manager: SocketAddr,
        /// What it said of the cluster.
        cluster: ClusterInfo,
    },
    /// No manager any more. Everything known stays in force.
    Disconnected {
        /// Why, in one line.
        reason: String,
    },
    /// What the manager holds for this host: the program frees endpoints and names that it does not know.
    Owned(Owned),
    /// All hosts, after one has come, changed, been masked or unmasked, or gone.
    Hosts(Vec<HostView>),
    /// A subscribed network is known, or has changed.
    NetworkChanged(Network),
    /// A subscribed network is gone; its table is empty.
    NetworkRemoved(Vni),
    /// Changes of a subscribed network's table, this host's own rows included.
    Table {
        /// The network.
        vni: Vni,
        /// What to apply, in order.
        changes: Vec<TableChange>,
    },
    /// All services of a subscribed network, after any change of one of them; the table's changes that follow are newer.
    Services {
        /// The network.
        vni: Vni,
        /// Its services.
        services: Vec<Service>,
    },
    /// The network of published ports, once known and after a change; `None`: there is none.
    Ingress(Option<Vni>),
    /// The news before this one hold all up to this place, where a member of a service has changed or the stream begins anew: to be
    /// answered with [`AgentHandle::applied`](crate::AgentHandle::applied) once they are in force.
    Reached {
        /// The network.
        vni: Vni,
        /// The life of the manager's store in which revisions count.
        generation: u16,
        /// Up to this one.
        revision: u64,
    },
    /// The news of a network before this one are all that a manager of now holds of its services and rows, and it is not still
    /// learning what it lost. Once for each connection; never for what an earlier agent of this host was told.
    CaughtUp(Vni),
    /// This host has a new certificate for a new key, to be kept for the next start.
    IdentityRenewed(Arc<Identity>),
    /// The manager asks what the datapath holds: to be answered with `AgentHandle::report`, after all events before this one.
    Inspect(Inspection),
    /// This host's endpoint lost its addresses to a newer allocation, or was freed by an operator: take its port down.
    RowLost {
        /// The network.
        vni: Vni,
        /// The endpoint's epoch.
        epoch: Epoch,
    },
}

/// A manager's question whether a datapath holds what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// Names the answer.
    pub id: u64,
    /// The network.
    pub vni: Vni,
    /// Of what it should hold.
    pub digest: Digest,
}

/// What a manager says of the cluster when it takes a host in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// The cluster's name: the start of its authority's digest.
    pub cluster: String,
    /// The manager's host.
    pub manager: HostId,
    /// The address it was reached at.
    pub address: SocketAddr,
    /// The network of published ports.
    #[serde(default)]
    pub ingress: Option<Vni>,
    /// Networks whose MTU does not fit this host's link, as lines for people.
    pub warnings: Vec<String>,
}

/// The agent's side of the control plane, for `towline status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ControlStatus {
    /// The manager connected now.
    pub connected_to: Option<SocketAddr>,
    /// Milliseconds since that connection came, or since the last one went; `None`: never connected.
    pub since_ms: Option<u64>,
    /// The managers tried, in order.
    pub managers: Vec<SocketAddr>,
    /// Why the last attempt or connection failed.
    pub last_error: Option<String>,
    /// Subscribed networks.
    pub subscriptions: Vec<SubscriptionStatus>,
    /// Hosts that the last manager heard nothing of: hidden from floods, and nothing else.
    pub masked: Vec<String>,
}

/// One subscribed network, for `towline status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SubscriptionStatus {
    /// The network.
    pub vni: Vni,
    /// Its name, once known.
    pub name: Option<String>,
    /// Which life of the manager's store the stream belongs to; 0 before the first snapshot.
    pub generation: u16,
    /// The last change applied.
    pub revision: u64,
    /// Rows known.
    pub rows: usize,
    /// Milliseconds since the last news.
    pub age_ms: Option<u64>,
    /// What is left of this host's block: addresses for endpoints that start while no manager answers.
    pub leased: Vec<IpAddr>,
}
