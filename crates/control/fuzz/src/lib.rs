//! Messages of every kind from a fuzzer's bytes, with few different values, so that they meet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use control::events::From as Since;
use control::installed::{Digest, Entry};
use control::message::{OwnedEndpoint, Rows, ToAgent, ToManager};
use control::{
    Endpoint, EndpointMode, EndpointState, Epoch, HostId, HostInfo, HostTraits, HostView, Lasts,
    Leased, Membership, Names, Network, NetworkSpec, Platform, Protocol, Publish, PublishMode,
    PublishOn, Request, Role, Row, Secret, Service, ServiceSpec, State, Subnet,
};
use vtep::{MacAddr, Vni};

/// What is left of the fuzzer's bytes; zeros when nothing is.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u8) -> u8 {
        self.byte() % end
    }

    pub fn bytes(&mut self) -> &'a [u8] {
        let length = usize::from(self.byte()).min(self.0.len());
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }

    /// The bytes with some of them changed, or cut.
    pub fn damage(&mut self, mut bytes: Vec<u8>) -> Vec<u8> {
        for _ in 0..self.below(4) {
            let place = usize::from(self.byte()) * 256 + usize::from(self.byte());
            if let Some(end) = bytes.len().checked_sub(1) {
                bytes[place % (end + 1)] = self.byte();
            }
        }
        if self.below(8) == 0 {
            bytes.truncate(usize::from(self.byte()));
        }
        bytes
    }

    pub fn vni(&mut self) -> Vni {
        Vni::new(4096 + u32::from(self.below(3))).expect("24 bits")
    }

    pub fn host_id(&mut self) -> HostId {
        HostId::from_bytes([self.below(4) + 1; 16])
    }

    pub fn epoch(&mut self) -> Epoch {
        match self.below(8) {
            0 => Epoch::from_bits(u64::MAX),
            1 => Epoch::ZERO,
            // About where a manager of these targets begins.
            n => Epoch::new(u16::from(n / 4), 1_000_000_000 + u64::from(self.byte())),
        }
    }

    fn name(&mut self) -> String {
        ["a", "b", "net0", "net1", "../x", ""][usize::from(self.below(6))].to_owned()
    }

    /// An address, of few.
    pub fn ip(&mut self) -> IpAddr {
        match self.below(16) {
            0 => Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(self.byte())).into(),
            1 => Ipv4Addr::BROADCAST.into(),
            n => Ipv4Addr::new(10, 1, 0, n).into(),
        }
    }

    fn mac(&mut self) -> MacAddr {
        MacAddr::new([self.below(4), 0, 0, 0, 0, self.below(8)])
    }

    fn state(&mut self) -> EndpointState {
        [EndpointState::Up, EndpointState::Down][usize::from(self.below(2))]
    }

    fn many<T>(&mut self, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(5)).map(|_| one(self)).collect()
    }

    pub fn host(&mut self) -> HostInfo {
        let n = self.below(4) + 1;
        HostInfo {
            id: HostId::from_bytes([n; 16]),
            name: if self.below(16) == 0 {
                self.name()
            } else {
                format!("h{n}")
            },
            vtep: [192, 0, 2, n].into(),
            port: u16::from(self.below(16)) * 300,
            link_mtu: 1500 - u16::from(self.below(2)) * 1000,
            incarnation: u64::from(self.byte()),
        }
    }

    pub fn endpoint(&mut self) -> Endpoint {
        Endpoint {
            vni: self.vni(),
            container: self.name(),
            mac: self.mac(),
            ips: self.many(Self::ip),
            epoch: self.epoch(),
            member: self.member(),
            names: self.names(),
        }
    }

    fn network(&mut self) -> Network {
        let subnet = |input: &mut Self| Subnet {
            net: ["10.1.0.0/28", "fd00::/64", "0.0.0.0/0", "10.2.0.0/24"]
                [usize::from(input.below(4))]
            .parse()
            .expect("a prefix"),
            gateway: input.ip(),
            ip_range: None,
            aux_addresses: Default::default(),
        };
        Network {
            id: self.name(),
            name: self.name(),
            vni: self.vni(),
            subnets: self.many(subnet),
            gateway_mac: self.mac(),
            mtu: 1450,
            settings: Default::default(),
            addressing: Default::default(),
            ingress: self.below(8) == 0,
            internal: self.below(8) == 0,
            attachable: self.below(8) != 0,
            dns_ttl: u32::from(self.below(8)) * 1000,
            labels: Default::default(),
            options: Default::default(),
            created: 0,
            epoch: self.epoch(),
        }
    }

    fn spec(&mut self) -> NetworkSpec {
        let net = |input: &mut Self| {
            ["10.1.0.0/28", "fd00:1::/126", "10.1.0.0/16", "0.0.0.0/0"][usize::from(input.below(4))]
                .parse()
                .expect("a prefix")
        };
        let name = self.name();
        NetworkSpec {
            subnets: self.many(net),
            ip_ranges: if self.below(4) == 0 {
                self.many(net)
            } else {
                Vec::new()
            },
            gateways: if self.below(4) == 0 {
                self.many(Self::ip)
            } else {
                Vec::new()
            },
            ipv6: self.below(4) == 0,
            vni: (self.below(2) == 0).then(|| self.vni()),
            mtu: (self.below(4) == 0).then(|| u16::from(self.byte()) * 256),
            ..NetworkSpec::named(&name)
        }
    }

    pub fn request(&mut self) -> Request {
        match self.below(28) {
            0 => Request::CreateNetwork {
                spec: self.spec(),
                routes_in_use: Vec::new(),
            },
            1 => Request::RemoveNetwork(self.name()),
            2 => Request::Networks,
            3 => Request::Network(self.name()),
            4 => Request::ClaimName(self.name()),
            5 => Request::ReleaseName(self.name()),
            6 => Request::Free {
                vni: self.vni(),
                epoch: self.epoch(),
            },
            7 => Request::Hosts,
            8 => Request::RemoveHost {
                host: format!("h{}", self.below(5)),
                force: self.below(2) == 0,
            },
            9 => Request::Leave,
            10 => Request::ProbeExpect { nonce: [1; 16] },
            11 => Request::ProbeReply {
                nonce: [1; 16],
                to: ([192, 0, 2, self.below(4)], 4789).into(),
                back_nonce: [2; 16],
                sizes: vec![1500; usize::from(self.byte())],
            },
            12 => Request::SetVxlanPort(u16::from(self.byte()) * 256),
            13 => Request::TellPort {
                port: u16::from(self.byte()) * 20,
                problem: (self.below(2) == 0).then(|| self.name()),
            },
            14 => Request::Token {
                role: Role::Worker,
                rotate: self.below(2) == 0,
                lasts: (self.below(2) == 0).then_some(Lasts::Forever),
            },
            15 => Request::StandBy {
                listen: ([192, 0, 2, self.below(4)], 4789).into(),
            },
            16 => Request::Events(
                [Since::Now, Since::Time(u64::from(self.byte()))][usize::from(self.below(2))],
            ),
            18 => Request::MakeIngress {
                routes_in_use: Vec::new(),
            },
            19 | 20 => Request::CreateService(self.service_spec()),
            21 => Request::UpdateService {
                version: self.epoch(),
                service: self.name(),
                spec: self.service_spec(),
            },
            22 => match self.below(3) {
                0 => Request::Services,
                1 => Request::Service(self.name()),
                _ => Request::RemoveService(self.name()),
            },
            23 => Request::Confirmed {
                vni: self.vni(),
                epoch: self.epoch(),
                owner_seq: u32::from(self.below(4)),
            },
            24 => Request::LabelHost {
                host: format!("h{}", self.below(5)),
                add: [(self.name(), self.name())].into(),
                remove: self.many(Self::name),
            },
            25 => Request::TellTraits {
                platform: Platform::here(),
                labels: [(self.name(), self.name())].into(),
            },
            17 => Request::Verify((self.below(2) == 0).then(|| self.name())),
            _ => Request::Allocate {
                network: self.name(),
                container: self.name(),
                ips: self.many(Self::ip),
                mac: (self.below(4) == 0).then(|| self.mac()),
                service: (self.below(4) == 0).then(|| self.name()),
                weight: (self.below(4) == 0).then(|| u16::from(self.byte()) * 2),
            },
        }
    }

    /// What a host may say, but for its hello.
    pub fn to_manager(&mut self) -> ToManager {
        match self.below(16) {
            14 => ToManager::Offer {
                vni: self.vni(),
                services: self.many(Self::service),
            },
            15 => ToManager::Applied {
                vni: self.vni(),
                generation: u16::from(self.below(3)),
                revision: 1_000_000_000 + u64::from(self.byte()),
            },
            0 => ToManager::Heartbeat,
            1 => ToManager::Subscribe {
                vni: self.vni(),
                generation: u16::from(self.below(3)),
                revision: 1_000_000_000 + u64::from(self.byte()),
                network: (self.below(2) == 0).then(|| self.network()),
            },
            2 => ToManager::Unsubscribe { vni: self.vni() },
            3 | 4 => ToManager::Publish {
                endpoint: self.endpoint(),
                owner_seq: u32::from(self.below(4)),
                state: self.state(),
            },
            5 => ToManager::Installed {
                id: u64::from(self.below(4)),
                vni: self.vni(),
                same: self.below(2) == 0,
                entries: self.many(Self::entry),
                rules: Vec::new(),
                last: self.below(2) == 0,
            },
            6 => ToManager::Misdelivered {
                vni: self.vni(),
                mac: self.mac(),
                from: [192, 0, 2, self.below(5)].into(),
            },
            7 => ToManager::Confirm {
                vni: self.vni(),
                mac: self.mac(),
                ips: self.many(Self::ip),
            },
            8 => ToManager::Lease {
                vni: self.vni(),
                held: self.many(Self::epoch),
            },
            9 => match self.below(3) {
                0 => ToManager::Hello {
                    version: 1,
                    host: self.host(),
                    last_epoch: self.epoch(),
                },
                1 => ToManager::Join {
                    version: 1,
                    secret: Secret::random(),
                    request: vec![self.byte()],
                },
                _ => ToManager::Peer {
                    version: 1,
                    generation: u16::from(self.byte()),
                    manager: self.host_id(),
                },
            },
            _ => ToManager::Call {
                id: u64::from(self.below(4)),
                request: self.request(),
            },
        }
    }

    fn entry(&mut self) -> Entry {
        let vtep = [192, 0, 2, self.below(4)].into();
        match self.below(3) {
            0 => Entry::Mac {
                mac: self.mac(),
                vtep,
            },
            1 => Entry::Neighbor {
                ip: self.ip(),
                mac: self.mac(),
            },
            _ => Entry::Member {
                vtep,
                flood: self.below(2) == 0,
            },
        }
    }

    fn row(&mut self) -> Row {
        Row {
            ip: self.ip(),
            epoch: self.epoch(),
            owner: self.host_id(),
            owner_seq: u32::from(self.below(3)),
            state: [State::Up, State::Down, State::Free][usize::from(self.below(3))],
            mac: self.mac(),
            member: self.member(),
            names: self.names(),
        }
    }

    fn service_spec(&mut self) -> ServiceSpec {
        let publish = |input: &mut Self| Publish {
            target: u16::from(input.below(3)) * 80,
            published: (input.below(2) == 0).then(|| u16::from(input.below(4)) * 8000),
            protocol: [Protocol::Tcp, Protocol::Udp][usize::from(input.below(2))],
            mode: [PublishMode::Ingress, PublishMode::Host][usize::from(input.below(2))],
            on: (input.below(4) == 0).then(|| PublishOn::Address(input.ip())),
        };
        let (name, network) = (self.name(), self.name());
        ServiceSpec {
            mode: [EndpointMode::Vip, EndpointMode::Dnsrr][usize::from(self.below(4) / 3)],
            vips: if self.below(4) == 0 {
                self.many(Self::ip)
            } else {
                Vec::new()
            },
            publish: self.many(publish),
            ..ServiceSpec::named(&name, &network)
        }
    }

    fn service(&mut self) -> Service {
        Service {
            id: self.name(),
            epoch: self.epoch(),
            version: self.epoch(),
            vni: self.vni(),
            spec: self.service_spec(),
            vips: self.many(Self::ip),
            created: 0,
        }
    }

    fn member(&mut self) -> Option<Membership> {
        (self.below(4) == 0).then(|| Membership {
            service: self.epoch(),
            weight: u16::from(self.byte()) * 2,
            serving: self.below(2) == 0,
        })
    }

    pub fn names(&mut self) -> Option<Arc<Names>> {
        (self.below(4) == 0).then(|| {
            Arc::new(Names {
                container: format!("c{}", self.below(4)),
                id: "0123456789ab".to_owned(),
                aliases: self.many(|input| format!("a{}", input.below(4))),
            })
        })
    }

    /// What a manager may say.
    pub fn to_agent(&mut self, cluster: &str) -> ToAgent {
        match self.below(25) {
            22 => ToAgent::Ingress((self.below(2) == 0).then(|| self.vni())),
            23 | 24 => ToAgent::Services {
                vni: self.vni(),
                full: self.below(2) == 0,
                services: self.many(Self::service),
                removed: self.many(Self::epoch),
                last: self.below(4) > 0,
            },
            0 | 1 => ToAgent::Welcome {
                cluster: cluster.to_owned(),
                manager: self.host_id(),
                heartbeat: Duration::from_millis(u64::from(self.byte()) * 10),
                last_epoch: self.epoch(),
                ingress: (self.below(2) == 0).then(|| self.vni()),
                warnings: Vec::new(),
            },
            2 => ToAgent::Reject {
                reason: self.name(),
                removed: self.below(4) == 0,
            },
            3 => ToAgent::Heartbeat,
            4 => ToAgent::Hosts {
                full: self.below(2) == 0,
                hosts: self.many(|input| HostView {
                    info: input.host(),
                    up: input.below(2) == 0,
                    last_seen_ms_ago: 0,
                    manager: false,
                    wanted_port: None,
                    port_problem: None,
                    control: None,
                    traits: HostTraits::default(),
                }),
                removed: self.many(Self::host_id),
            },
            5 => ToAgent::Owned {
                endpoints: self.many(|input| OwnedEndpoint {
                    endpoint: input.endpoint(),
                    owner_seq: u32::from(input.below(4)),
                    state: input.state(),
                }),
                names: self.many(Self::name),
                last: self.below(2) == 0,
            },
            6 | 7 => ToAgent::Network(self.network()),
            8 => ToAgent::NetworkRemoved { vni: self.vni() },
            9 => ToAgent::RowLost {
                vni: self.vni(),
                epoch: self.epoch(),
            },
            10 => ToAgent::Reply {
                id: u64::from(self.below(4)),
                part: [&b"{\"Ok\":\"done\"}"[..], b"{", b""][usize::from(self.below(3))]
                    .to_vec()
                    .into(),
                last: self.below(2) == 0,
            },
            11 => ToAgent::Inspect {
                id: 1,
                vni: self.vni(),
                digest: Digest::from_bytes([self.byte(); 16]),
            },
            12 => ToAgent::Misdelivered {
                vni: self.vni(),
                mac: self.mac(),
            },
            13 => ToAgent::Corrections {
                vni: self.vni(),
                rows: self.many(Self::row),
            },
            14 | 15 => ToAgent::Lease {
                vni: self.vni(),
                block: self.many(|input| Leased {
                    epoch: input.epoch(),
                    mac: input.mac(),
                    ips: input.many(Self::ip),
                }),
            },
            16 => match self.below(2) {
                0 => ToAgent::Joined {
                    certificate: vec![self.byte()],
                    ca: vec![self.byte()],
                },
                _ => ToAgent::Peer {
                    generation: u16::from(self.byte()),
                    manager: self.host_id(),
                },
            },
            _ => ToAgent::Rows(Rows {
                vni: self.vni(),
                generation: u16::from(self.below(3)),
                from: [0, 1_000_000_000 + u64::from(self.byte())][usize::from(self.below(2))],
                to: 1_000_000_000 + u64::from(self.byte()),
                part: u32::from(self.below(3)),
                last: self.below(2) == 0,
                settled: self.below(2) == 0,
                rows: self.many(Self::row),
            }),
        }
    }
}
