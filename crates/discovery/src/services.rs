//! What is known of services, network by network, and the plans that follow from it. No kernel, no clock.
//!
//! Fed by control: the definitions of each network ([`Services::services`]) and who is a member, from the network's rows
//! ([`Services::table`]). A service with published ports is told for two networks: its own, and the ingress network; its
//! members have a row in each.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use control::service::{Protocol, PublishMode, PublishOn, Service};
use control::{Backend, Epoch, TableChange};
use ipnet::IpNet;
use vtep::Vni;

use crate::plan::{ClientPlan, ClientService, EntryPlan, EntryPort, MemberPlan, Pool};
use crate::slots::{mix, slots, words_of};

/// Definitions and members of all networks that this host hears of.
#[derive(Debug, Default)]
pub struct Services {
    networks: BTreeMap<Vni, Network>,
}

/// Where a port is published: its protocol, its number, and on what of the host; none: on all.
pub type Place = (Protocol, u16, Option<PublishOn>);

/// A host that accepts published ports.
#[derive(Clone, Debug, Default)]
pub struct EntryHost {
    /// A number of the host's own, such as one made of its id: where its round robin begins.
    pub salt: u64,
    /// The ingress network's subnets.
    pub subnets: BTreeSet<IpNet>,
    /// Sources that mean nothing to a member elsewhere, such as the gateway bridge's subnets.
    pub local_sources: BTreeSet<IpNet>,
    /// Ports that are left to whoever has them on this host.
    pub excluded: BTreeSet<Place>,
}

/// How a member takes part in the ingress network.
#[derive(Clone, Debug, Default)]
pub struct MemberNetwork {
    /// Its addresses there.
    pub ips: BTreeSet<IpAddr>,
    /// The gateways of the network's subnets.
    pub gateways: BTreeSet<IpAddr>,
    /// Their MAC address.
    pub gateway_mac: [u8; 6],
}

#[derive(Debug, Default)]
struct Network {
    services: BTreeMap<Epoch, Service>,
    backends: BTreeMap<IpAddr, Backend>,
}

impl Services {
    /// Nothing known.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// All services of a network, in the place of what was known of them.
    pub fn services(&mut self, vni: Vni, services: Vec<Service>) {
        let network = self.networks.entry(vni).or_default();
        network.services = services
            .into_iter()
            .map(|service| (service.epoch, service))
            .collect();
    }

    /// Changes of a network's members. Says whether anything of services changed.
    pub fn table(&mut self, vni: Vni, changes: &[TableChange]) -> bool {
        let mut changed = false;
        for change in changes {
            let TableChange::Backend { ip, backend } = change else {
                continue;
            };
            let network = self.networks.entry(vni).or_default();
            changed |= match backend {
                Some(backend) => network.backends.insert(*ip, *backend) != Some(*backend),
                None => network.backends.remove(ip).is_some(),
            };
        }
        changed
    }

    /// A network is no matter of this host any more.
    pub fn forget(&mut self, vni: Vni) {
        self.networks.remove(&vni);
    }

    /// The services of a network, by age.
    pub fn of(&self, vni: Vni) -> impl Iterator<Item = &Service> {
        let network = self.networks.get(&vni);
        network
            .into_iter()
            .flat_map(|network| network.services.values())
    }

    /// The members of a service by their addresses on a network, those that take no new connections too.
    pub fn members(&self, vni: Vni, service: Epoch) -> impl Iterator<Item = (IpAddr, &Backend)> {
        let network = self.networks.get(&vni);
        let backends = network.into_iter().flat_map(|network| &network.backends);
        backends
            .filter(move |(_, backend)| backend.service == service)
            .map(|(ip, backend)| (*ip, backend))
    }

    /// Virtual addresses of the services of a network itself: the datapath answers ARP, neighbour discovery and pings for them.
    #[must_use]
    pub fn vips(&self, vni: Vni) -> BTreeSet<IpAddr> {
        let own = self.of(vni).filter(|service| service.vni == vni);
        own.flat_map(|service| service.vips.iter().copied())
            .collect()
    }

    /// What a host needs to accept the ports that services publish through the ingress network.
    #[must_use]
    pub fn entry_plan(&self, ingress: Vni, host: &EntryHost) -> EntryPlan {
        let mut ports = Vec::new();
        for service in self.of(ingress) {
            for publish in &service.spec.publish {
                let (PublishMode::Ingress, Some(published)) = (publish.mode, publish.published)
                else {
                    continue;
                };
                let place = (publish.protocol, published, publish.on.clone());
                if host.excluded.contains(&place) {
                    continue;
                }
                let salt = mix([host.salt, u64::from(published)]);
                ports.push(EntryPort {
                    service: service.spec.name.clone(),
                    published,
                    protocol: publish.protocol,
                    on: publish.on.clone(),
                    target: publish.target,
                    pool: self.pool(ingress, service, salt),
                    idle_timeout: service.spec.idle_timeout,
                    preserve_client: service.spec.preserve_client,
                });
            }
        }
        // The one that asks for an address or an interface stands before the one that takes any.
        ports.sort_by_key(|port| {
            let rank = port.on.is_none();
            (
                port.published,
                port.protocol == Protocol::Udp,
                rank,
                port.service.clone(),
            )
        });
        if ports.is_empty() {
            return EntryPlan::default();
        }
        EntryPlan {
            ports,
            local_sources: host.local_sources.clone(),
            subnets: host.subnets.clone(),
        }
    }

    /// What a namespace needs that has ports on these networks. `salt` is a number of the namespace's own.
    #[must_use]
    pub fn client_plan(&self, networks: &BTreeSet<Vni>, salt: u64) -> ClientPlan {
        let mut services = Vec::new();
        for vni in networks {
            for service in self.of(*vni) {
                if service.vni != *vni || service.vips.is_empty() {
                    continue;
                }
                services.push(ClientService {
                    service: service.spec.name.clone(),
                    vni: vni.get(),
                    vips: service.vips.iter().copied().collect(),
                    pool: self.pool(*vni, service, salt),
                    idle_timeout: service.spec.idle_timeout,
                });
            }
        }
        services.sort_by(|a, b| (&a.service, a.vni).cmp(&(&b.service, b.vni)));
        ClientPlan { services }
    }

    /// What a member's namespace needs to be reached through the ingress network, `None`: its service is not known,
    /// or publishes nothing there.
    #[must_use]
    pub fn member_plan(
        &self,
        ingress: Vni,
        service: Epoch,
        network: &MemberNetwork,
    ) -> Option<MemberPlan> {
        let service = self.networks.get(&ingress)?.services.get(&service)?;
        let ports = service.spec.publish.iter();
        let targets: BTreeSet<_> = ports
            .filter(|publish| publish.mode == PublishMode::Ingress)
            .map(|publish| (publish.protocol, publish.target))
            .collect();
        (!targets.is_empty()).then(|| MemberPlan {
            service: service.spec.name.clone(),
            ips: network.ips.clone(),
            gateways: network.gateways.clone(),
            gateway_mac: network.gateway_mac,
            targets,
            idle_timeout: service.spec.idle_timeout,
        })
    }

    /// The members of a service on one network, and the slots of those that take new connections.
    fn pool(&self, vni: Vni, service: &Service, salt: u64) -> Pool {
        let members = || self.members(vni, service.epoch);
        let family = |is_v4: bool| {
            let serving: Vec<_> = members()
                .filter(|(ip, backend)| backend.serving && ip.is_ipv4() == is_v4)
                .map(|(ip, backend)| (ip, backend.weight))
                .collect();
            // The kernel counts from the first slot again when the slots change: each set of members begins elsewhere.
            let set = serving.iter().flat_map(|(ip, _)| words_of(*ip));
            let rotation = mix([salt, service.epoch.get()].into_iter().chain(set));
            slots(service.spec.balance, &serving, rotation)
        };
        Pool {
            balance: service.spec.balance,
            v4: family(true),
            v6: family(false),
            members: members().map(|(ip, _)| ip).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use control::HostId;
    use control::service::{Balance, Publish, PublishOn, ServiceSpec};

    use super::*;

    /// The ingress network.
    fn ingress() -> Vni {
        Vni::new(4096).unwrap()
    }

    /// The services' own network.
    fn own() -> Vni {
        Vni::new(4097).unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn publish(published: u16, on: Option<PublishOn>) -> Publish {
        Publish {
            target: 80,
            published: Some(published),
            protocol: Protocol::Tcp,
            mode: PublishMode::Ingress,
            on,
        }
    }

    fn service(number: u64, name: &str, vni: Vni, ports: Vec<Publish>) -> Service {
        Service {
            id: format!("{number:025}"),
            epoch: Epoch::new(1, number),
            version: Epoch::new(1, number),
            vni,
            spec: ServiceSpec {
                publish: ports,
                ..ServiceSpec::named(name, "net")
            },
            vips: vec![ip("10.0.9.7"), ip("fd09::7")],
            created: 0,
        }
    }

    fn member(address: &str, number: u64, serving: bool) -> TableChange {
        TableChange::Backend {
            ip: ip(address),
            backend: Some(Backend {
                service: Epoch::new(1, number),
                host: HostId::NOBODY,
                weight: 1,
                serving,
            }),
        }
    }

    fn gone(address: &str) -> TableChange {
        TableChange::Backend {
            ip: ip(address),
            backend: None,
        }
    }

    fn ips(texts: &[&str]) -> BTreeSet<IpAddr> {
        texts.iter().map(|text| ip(text)).collect()
    }

    #[test]
    fn members_that_do_not_serve_keep_their_connections_and_get_no_new_ones() {
        let mut services = Services::new();
        services.services(own(), vec![service(5, "web", own(), Vec::new())]);
        let first = [member("10.0.9.2", 5, true), member("10.0.9.3", 5, false)];
        assert!(services.table(own(), &first));
        assert!(!services.table(own(), &first), "no news");
        let plan = services.client_plan(&BTreeSet::from([own()]), 1);
        let [web] = &plan.services[..] else {
            panic!("one service: {plan:?}")
        };
        assert_eq!(web.pool.v4, [ip("10.0.9.2")]);
        assert_eq!(web.pool.v6, Vec::<IpAddr>::new());
        assert_eq!(web.pool.members, ips(&["10.0.9.2", "10.0.9.3"]));
        assert!(services.table(own(), &[gone("10.0.9.3")]));
        let plan = services.client_plan(&BTreeSet::from([own()]), 1);
        assert_eq!(plan.services[0].pool.members, ips(&["10.0.9.2"]));
        // Another service's member, and one of a service that is not known.
        services.table(
            own(),
            &[member("10.0.9.4", 6, true), member("fd09::4", 5, true)],
        );
        let plan = services.client_plan(&BTreeSet::from([own()]), 1);
        assert_eq!(plan.services[0].pool.members, ips(&["10.0.9.2", "fd09::4"]));
        assert_eq!(services.vips(own()), ips(&["10.0.9.7", "fd09::7"]));
        services.forget(own());
        let plan = services.client_plan(&BTreeSet::from([own()]), 1);
        assert_eq!(plan, ClientPlan::default());
    }

    #[test]
    fn a_network_s_clients_see_its_own_services_alone() {
        let mut services = Services::new();
        let web = service(5, "web", own(), vec![publish(8080, None)]);
        services.services(own(), vec![web.clone()]);
        services.services(ingress(), vec![web]);
        let on_ingress = services.client_plan(&BTreeSet::from([ingress()]), 1);
        assert_eq!(on_ingress, ClientPlan::default());
        assert!(services.vips(ingress()).is_empty());
        let both = services.client_plan(&BTreeSet::from([ingress(), own()]), 1);
        assert_eq!(both.services.len(), 1);
    }

    #[test]
    fn a_host_accepts_what_is_published_and_not_taken() {
        let mut services = Services::new();
        let loopback = Some(PublishOn::Address(ip("127.0.0.1")));
        let ports = vec![
            publish(8080, None),
            publish(8081, loopback),
            Publish {
                mode: PublishMode::Host,
                ..publish(8082, None)
            },
            publish(8083, Some(PublishOn::Address(ip("127.0.0.1")))),
            publish(8083, Some(PublishOn::Address(ip("::1")))),
        ];
        services.services(ingress(), vec![service(5, "web", own(), ports)]);
        services.table(
            ingress(),
            &[member("10.0.0.9", 5, true), member("fd00::9", 5, true)],
        );
        let host = EntryHost {
            excluded: BTreeSet::from([(
                Protocol::Tcp,
                8083,
                Some(PublishOn::Address(ip("127.0.0.1"))),
            )]),
            ..EntryHost::default()
        };
        let plan = services.entry_plan(ingress(), &host);
        let numbers: Vec<_> = plan.ports.iter().map(|port| port.published).collect();
        assert_eq!(numbers, [8080, 8081, 8083]);
        assert_eq!(plan.ports[2].on, Some(PublishOn::Address(ip("::1"))));
        assert_eq!(plan.ports[0].pool.v4, [ip("10.0.0.9")]);
        assert_eq!(plan.ports[0].pool.v6, [ip("fd00::9")]);
        let network = MemberNetwork {
            ips: ips(&["10.0.0.9"]),
            ..MemberNetwork::default()
        };
        let member = services
            .member_plan(ingress(), Epoch::new(1, 5), &network)
            .expect("it is published");
        assert_eq!(member.targets, BTreeSet::from([(Protocol::Tcp, 80)]));
        let unknown = services.member_plan(ingress(), Epoch::new(1, 6), &network);
        assert_eq!(unknown, None);
    }

    #[test]
    fn clients_begin_at_different_members() {
        let mut services = Services::new();
        services.services(own(), vec![service(5, "web", own(), Vec::new())]);
        let addresses: Vec<_> = (1..=6).map(|n| format!("10.0.9.{n}")).collect();
        let changes: Vec<_> = addresses.iter().map(|ip| member(ip, 5, true)).collect();
        services.table(own(), &changes);
        let mut firsts = BTreeMap::new();
        for salt in 0..600 {
            let plan = services.client_plan(&BTreeSet::from([own()]), salt);
            *firsts.entry(plan.services[0].pool.v4[0]).or_insert(0) += 1;
        }
        // Binomial: 100 of 600, far more than four standard deviations.
        assert!(
            firsts.len() == 6 && firsts.values().all(|count| (60..=140).contains(count)),
            "{firsts:?}"
        );
    }

    #[test]
    fn by_source_every_host_has_the_same_table() {
        let mut services = Services::new();
        let mut web = service(5, "web", own(), vec![publish(8080, None)]);
        web.spec.balance = Balance::Source;
        services.services(ingress(), vec![web]);
        services.table(
            ingress(),
            &[member("10.0.0.9", 5, true), member("10.0.0.10", 5, true)],
        );
        let plan = |salt| {
            let host = EntryHost {
                salt,
                ..EntryHost::default()
            };
            services.entry_plan(ingress(), &host)
        };
        assert_eq!(plan(1), plan(2));
    }
}
