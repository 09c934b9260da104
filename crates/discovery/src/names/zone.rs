//! Which names there are on each network, and what is behind them.
//!
//! On one network a name means, the first that holds:
//!
//! 1. a service: its virtual addresses, or in mode dnsrr its members that serve;
//! 2. `tasks.` and a service: its members that serve;
//! 3. a container's name;
//! 4. an alias, or the short id, of one container or several.
//!
//! `name` is looked for on the asker's networks in their order, then `name.network`, with the longest name first: both may have dots.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use control::service::{EndpointMode, Protocol, Service};
use control::{Backend, Epoch, Names, Network, TableChange};
use ipnet::IpNet;
use vtep::Vni;

use super::found::{Answer, Found, Ips, Kind, Records};

/// The names of all networks that this host follows.
#[derive(Debug, Default)]
pub struct Zones {
    networks: HashMap<Vni, Zone>,
    /// Whose turn it is.
    turn: AtomicUsize,
}

/// The names of one network.
#[derive(Debug, Default)]
pub(super) struct Zone {
    /// Its name, once known.
    name: String,
    ttl: u32,
    subnets: Vec<IpNet>,
    services: BTreeMap<String, Known>,
    /// Members by their service's epoch: those that serve.
    members: HashMap<Epoch, Ips>,
    backends: HashMap<IpAddr, Backend>,
    endpoints: HashMap<IpAddr, Arc<Names>>,
    containers: HashMap<String, Ips>,
    /// Aliases and short ids.
    aliases: HashMap<String, Ips>,
}

/// A service, and its virtual addresses by family.
#[derive(Debug)]
struct Known {
    service: Service,
    vips: Ips,
}

impl Zones {
    /// A network is known, or has changed.
    pub fn network(&mut self, network: &Network) {
        let zone = self.networks.entry(network.vni).or_default();
        zone.name.clone_from(&network.name);
        zone.ttl = network.dns_ttl;
        zone.subnets = network.subnets.iter().map(|subnet| subnet.net).collect();
    }

    /// All services of a network.
    pub fn services(&mut self, vni: Vni, services: Vec<Service>) {
        // News that were under way when the network was left.
        let Some(zone) = self.networks.get_mut(&vni) else {
            return;
        };
        // Those of other networks are told on the network of published ports.
        let own = services.into_iter().filter(|service| service.vni == vni);
        zone.services = own
            .map(|service| {
                let vips = service.vips.iter().copied().collect();
                (service.spec.name.clone(), Known { service, vips })
            })
            .collect();
    }

    /// Changes of a network's rows.
    pub fn table(&mut self, vni: Vni, changes: &[TableChange]) {
        let Some(zone) = self.networks.get_mut(&vni) else {
            return;
        };
        for change in changes {
            match change {
                TableChange::Names { ip, names } => zone.named(*ip, names.clone()),
                TableChange::Backend { ip, backend } => zone.serves(*ip, *backend),
                TableChange::Neighbor { .. }
                | TableChange::Mac { .. }
                | TableChange::Member { .. } => {}
            }
        }
    }

    /// A network is gone, or followed no more.
    pub fn forget(&mut self, vni: Vni) {
        self.networks.remove(&vni);
    }

    /// What is behind a name for who has ports on these networks, in that order; `None`: it is no name of theirs. The name is as it
    /// was asked for, without the dot at its end.
    #[must_use]
    pub fn lookup(&self, networks: &[Vni], name: &str, kind: Kind) -> Option<Found<'_>> {
        let name = name.to_ascii_lowercase();
        let zones = || networks.iter().filter_map(|vni| self.networks.get(vni));
        if let Some(ip) = reverse(&name) {
            return zones().find_map(|zone| zone.name_of(ip, kind));
        }
        let mut found = zones().find_map(|zone| zone.lookup(&name, kind));
        if found.is_none() {
            let mut within: Vec<(&str, &Zone)> = zones()
                .filter_map(|zone| {
                    let inner = name.strip_suffix(&zone.name)?.strip_suffix('.')?;
                    (!inner.is_empty() && !zone.name.is_empty()).then_some((inner, zone))
                })
                .collect();
            within.sort_by_key(|(inner, _)| std::cmp::Reverse(inner.len()));
            found = within
                .into_iter()
                .find_map(|(inner, zone)| zone.lookup(inner, kind));
        }
        let mut found = found?;
        let count = found.count();
        if count > 1 {
            found.first = self.turn.fetch_add(1, Ordering::Relaxed) % count;
        }
        Some(found)
    }
}

impl Zone {
    fn named(&mut self, ip: IpAddr, names: Option<Arc<Names>>) {
        let before = match &names {
            Some(names) => self.endpoints.insert(ip, Arc::clone(names)),
            None => self.endpoints.remove(&ip),
        };
        if let Some(before) = before {
            leave(&mut self.containers, &before.container, ip);
            for other in before.aliases.iter().chain([&before.id]) {
                leave(&mut self.aliases, other, ip);
            }
        }
        if let Some(names) = names {
            enter(&mut self.containers, &names.container, ip);
            for other in names.aliases.iter().chain([&names.id]) {
                enter(&mut self.aliases, other, ip);
            }
        }
    }

    fn serves(&mut self, ip: IpAddr, backend: Option<Backend>) {
        let before = match backend {
            Some(backend) => self.backends.insert(ip, backend),
            None => self.backends.remove(&ip),
        };
        if let Some(before) = before {
            leave(&mut self.members, &before.service, ip);
        }
        if let Some(backend) = backend.filter(|backend| backend.serving) {
            enter(&mut self.members, &backend.service, ip);
        }
    }

    fn lookup(&self, name: &str, kind: Kind) -> Option<Found<'_>> {
        if let Some((port, service)) = port_of(name) {
            let service = &self.services.get(service)?.service;
            return Some(self.found(match kind {
                Kind::Srv => self.ports(service, port),
                _ => Records::None,
            }));
        }
        let members = |known: &Known| self.members.get(&known.service.epoch);
        let ips = if let Some(known) = self.services.get(name) {
            match known.service.spec.mode {
                EndpointMode::Vip => Some(&known.vips),
                EndpointMode::Dnsrr => members(known),
            }
        } else if let Some(known) = name
            .strip_prefix("tasks.")
            .and_then(|service| self.services.get(service))
        {
            members(known)
        } else {
            let ips = self.containers.get(name);
            Some(ips.or_else(|| self.aliases.get(name))?)
        };
        Some(self.found(ips.map_or(Records::None, |ips| Records::Addresses(ips.of(kind)))))
    }

    /// The members of a service that serve, by the port that it names: as members have it, or as hosts do.
    fn ports(&self, service: &Service, (port, protocol): (u16, Protocol)) -> Records<'_> {
        let published = || {
            service
                .spec
                .publish
                .iter()
                .filter(|publish| publish.protocol == protocol)
        };
        let target = published()
            .find(|publish| publish.target == port)
            .or_else(|| published().find(|publish| publish.published == Some(port)))
            .map(|publish| publish.target);
        match (target, self.members.get(&service.epoch)) {
            (Some(port), Some(members)) => Records::Ports {
                zone: self,
                members,
                port,
            },
            _ => Records::None,
        }
    }

    /// Where a port is at a member, of which this is one address; told at its first address alone.
    pub(super) fn port_of_member(&self, members: &Ips, ip: IpAddr, port: u16) -> Option<Answer> {
        let container = &self.endpoints.get(&ip)?.container;
        let all = self.containers.get(container)?.iter();
        let ips: Vec<IpAddr> = all.filter(|ip| members.contains(*ip)).collect();
        let weight = self.backends.get(&ip)?.weight;
        (ips.first() == Some(&ip)).then(|| Answer::Service {
            weight,
            port,
            target: self.full(container),
            ips,
        })
    }

    /// The name of an address of this network; of an address that nobody has there is none, wherever else one asked.
    fn name_of(&self, ip: IpAddr, kind: Kind) -> Option<Found<'_>> {
        let service = || self.services.values().find(|known| known.vips.contains(ip));
        let name = match self.endpoints.get(&ip) {
            Some(names) => Some(names.container.as_str()),
            None => service().map(|known| known.service.spec.name.as_str()),
        };
        if name.is_none() && !self.subnets.iter().any(|subnet| subnet.contains(&ip)) {
            return None;
        }
        let records = match name {
            Some(name) if kind == Kind::Ptr => Records::Name { zone: self, name },
            _ => Records::None,
        };
        Some(Found {
            absent: name.is_none(),
            ..self.found(records)
        })
    }

    pub(super) fn full(&self, name: &str) -> String {
        format!("{name}.{}", self.name)
    }

    fn found<'a>(&self, records: Records<'a>) -> Found<'a> {
        Found {
            ttl: self.ttl,
            absent: false,
            records,
            first: 0,
        }
    }
}

fn enter<K: Clone + Eq + std::hash::Hash>(map: &mut HashMap<K, Ips>, key: &K, ip: IpAddr) {
    map.entry(key.clone()).or_default().insert(ip);
}

fn leave<K: Eq + std::hash::Hash>(map: &mut HashMap<K, Ips>, key: &K, ip: IpAddr) {
    if let Some(ips) = map.get_mut(key) {
        ips.remove(ip);
        if ips.is_empty() {
            map.remove(key);
        }
    }
}

/// The parts of `_80._tcp.web`.
fn port_of(name: &str) -> Option<((u16, Protocol), &str)> {
    let (port, rest) = name.strip_prefix('_')?.split_once('.')?;
    let (protocol, service) = rest.split_once('.')?;
    let protocol = match protocol {
        "_tcp" => Protocol::Tcp,
        "_udp" => Protocol::Udp,
        _ => return None,
    };
    let digits = port.bytes().all(|digit| digit.is_ascii_digit());
    Some(((port.parse().ok().filter(|_| digits)?, protocol), service))
}

/// The address that a name of `in-addr.arpa` (RFC 1035 §3.5) or `ip6.arpa` (RFC 3596 §2.5) stands for.
fn reverse(name: &str) -> Option<IpAddr> {
    if let Some(digits) = name.strip_suffix(".in-addr.arpa") {
        let mut octets = [0; 4];
        let mut labels = digits.split('.');
        for octet in octets.iter_mut().rev() {
            *octet = labels.next()?.parse().ok()?;
        }
        return labels
            .next()
            .is_none()
            .then(|| Ipv4Addr::from(octets).into());
    }
    let digits = name.strip_suffix(".ip6.arpa")?;
    let mut bits = 0u128;
    let mut labels = digits.split('.');
    for place in 0..32 {
        let label = labels.next().filter(|label| label.len() == 1)?;
        bits |= u128::from(u8::from_str_radix(label, 16).ok()?) << (4 * place);
    }
    labels.next().is_none().then(|| Ipv6Addr::from(bits).into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use control::HostId;
    use control::service::{Publish, ServiceSpec};
    use proptest::prelude::*;

    use super::*;

    fn vni(n: u32) -> Vni {
        Vni::new(n).unwrap()
    }

    fn network(n: u32, name: &str, subnets: &[&str]) -> Network {
        let subnets: Vec<_> = subnets
            .iter()
            .map(|net| serde_json::json!({"net": net, "gateway": net.split('/').next()}))
            .collect();
        serde_json::from_value(serde_json::json!({
            "id": name, "name": name, "vni": n, "subnets": subnets, "gateway_mac": "06:74:6c:00:10:00", "mtu": 1450,
            "flood": true, "labels": {}, "options": {}, "created": 0, "epoch": Epoch::new(1, 2), "dns_ttl": n,
        }))
        .unwrap()
    }

    fn names(container: &str, aliases: &[&str]) -> Arc<Names> {
        Arc::new(Names {
            container: container.to_owned(),
            id: format!("{:012x}", container.len()),
            aliases: aliases.iter().map(|&alias| alias.to_owned()).collect(),
        })
    }

    fn named(ip: &str, container: &str, aliases: &[&str]) -> TableChange {
        TableChange::Names {
            ip: ip.parse().unwrap(),
            names: Some(names(container, aliases)),
        }
    }

    fn member(ip: &str, service: u64, serving: bool) -> TableChange {
        TableChange::Backend {
            ip: ip.parse().unwrap(),
            backend: Some(Backend {
                service: Epoch::new(1, service),
                host: HostId::from_bytes([1; 16]),
                weight: 3,
                serving,
            }),
        }
    }

    fn service(epoch: u64, name: &str, mode: EndpointMode, vips: &[&str]) -> Service {
        let publish = |target, published, protocol| Publish {
            target,
            published: Some(published),
            protocol,
            mode: Default::default(),
            on: None,
        };
        Service {
            id: name.to_owned(),
            epoch: Epoch::new(1, epoch),
            version: Epoch::new(1, epoch),
            vni: vni(4096),
            spec: ServiceSpec {
                mode,
                publish: vec![
                    publish(80, 8080, Protocol::Tcp),
                    publish(53, 5353, Protocol::Udp),
                ],
                ..ServiceSpec::named(name, "blue")
            },
            vips: vips.iter().map(|vip| vip.parse().unwrap()).collect(),
            created: 0,
        }
    }

    fn zones() -> Zones {
        let mut zones = Zones::default();
        zones.network(&network(4096, "blue", &["10.0.9.0/24", "fd00::/64"]));
        zones.network(&network(4097, "a.green", &["10.0.8.0/24"]));
        zones.services(
            vni(4096),
            vec![
                service(5, "web", EndpointMode::Vip, &["10.0.9.200", "fd00::200"]),
                service(6, "rr.db", EndpointMode::Dnsrr, &[]),
            ],
        );
        zones.table(
            vni(4096),
            &[
                named("10.0.9.2", "c1", &["db", "api.v1"]),
                named("fd00::2", "c1", &["db", "api.v1"]),
                named("10.0.9.3", "c22", &["db"]),
                named("10.0.9.4", "c333", &["c1", "web"]),
                member("10.0.9.2", 5, true),
                member("fd00::2", 5, true),
                member("10.0.9.3", 5, false),
                member("10.0.9.3", 6, true),
                member("10.0.9.4", 6, true),
            ],
        );
        zones.table(
            vni(4097),
            &[
                named("10.0.8.9", "other", &["c1"]),
                named("10.0.8.8", "x", &[]),
            ],
        );
        zones
    }

    /// Addresses, sorted; `None`: not ours.
    fn ask(zones: &Zones, networks: &[u32], name: &str, kind: Kind) -> Option<Vec<String>> {
        let networks: Vec<Vni> = networks.iter().map(|&n| vni(n)).collect();
        let found = zones.lookup(&networks, name, kind)?;
        let mut answers: Vec<String> = found
            .answers()
            .map(|answer| match answer {
                Answer::Address(ip) => ip.to_string(),
                Answer::Name(name) => name,
                Answer::Service {
                    weight,
                    port,
                    target,
                    ips,
                } => {
                    format!("{weight} {port} {target} {ips:?}")
                }
            })
            .collect();
        answers.sort();
        Some(answers)
    }

    #[test]
    fn every_kind_of_name() {
        let zones = zones();
        let on = [4096];
        for (name, kind, expected) in [
            ("web", Kind::A, Some(vec!["10.0.9.200"])),
            ("WEB", Kind::Aaaa, Some(vec!["fd00::200"])),
            ("web.blue", Kind::A, Some(vec!["10.0.9.200"])),
            ("tasks.web", Kind::A, Some(vec!["10.0.9.2"])),
            ("tasks.web.BLUE", Kind::Aaaa, Some(vec!["fd00::2"])),
            ("rr.db", Kind::A, Some(vec!["10.0.9.3", "10.0.9.4"])),
            (
                "tasks.rr.db.blue",
                Kind::A,
                Some(vec!["10.0.9.3", "10.0.9.4"]),
            ),
            ("rr.db", Kind::Aaaa, Some(vec![])),
            // A container's name before another's alias.
            ("c1", Kind::A, Some(vec!["10.0.9.2"])),
            ("c1", Kind::Aaaa, Some(vec!["fd00::2"])),
            ("c22", Kind::Aaaa, Some(vec![])),
            ("c22", Kind::Other, Some(vec![])),
            ("db", Kind::A, Some(vec!["10.0.9.2", "10.0.9.3"])),
            ("api.v1.blue", Kind::A, Some(vec!["10.0.9.2"])),
            ("000000000003", Kind::A, Some(vec!["10.0.9.3"])),
            ("000000000003.blue", Kind::A, Some(vec!["10.0.9.3"])),
            ("nobody", Kind::A, None),
            ("tasks.nobody", Kind::A, None),
            ("blue", Kind::A, None),
            (".blue", Kind::A, None),
            ("x", Kind::A, None),
            ("c1.a.green", Kind::A, None),
            ("2.9.0.10.in-addr.arpa", Kind::Ptr, Some(vec!["c1.blue"])),
            ("2.9.0.10.in-addr.arpa", Kind::A, Some(vec![])),
            ("200.9.0.10.in-addr.arpa", Kind::Ptr, Some(vec!["web.blue"])),
            ("9.8.0.10.in-addr.arpa", Kind::Ptr, None),
            ("9.9.0.300.in-addr.arpa", Kind::Ptr, None),
            (
                "2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa",
                Kind::Ptr,
                Some(vec!["c1.blue"]),
            ),
            (
                "_80._tcp.web",
                Kind::Srv,
                Some(vec!["3 80 c1.blue [10.0.9.2, fd00::2]"]),
            ),
            (
                "_8080._tcp.web.blue",
                Kind::Srv,
                Some(vec!["3 80 c1.blue [10.0.9.2, fd00::2]"]),
            ),
            ("_80._udp.web", Kind::Srv, Some(vec![])),
            (
                "_5353._udp.web",
                Kind::Srv,
                Some(vec!["3 53 c1.blue [10.0.9.2, fd00::2]"]),
            ),
            ("_80._tcp.web", Kind::A, Some(vec![])),
            ("_80._tcp.nobody", Kind::Srv, None),
            ("_+80._tcp.web", Kind::Srv, None),
            ("web", Kind::Srv, Some(vec![])),
        ] {
            let expected: Option<Vec<String>> =
                expected.map(|all: Vec<&str>| all.into_iter().map(str::to_owned).collect());
            assert_eq!(ask(&zones, &on, name, kind), expected, "{name} {kind:?}");
        }
    }

    #[test]
    fn networks_in_their_order_and_no_others() {
        let zones = zones();
        let c1 = |networks: &[u32]| ask(&zones, networks, "c1", Kind::A).unwrap();
        assert_eq!(c1(&[4096, 4097]), ["10.0.9.2"]);
        assert_eq!(c1(&[4097, 4096]), ["10.0.8.9"]);
        let green = ask(&zones, &[4096, 4097], "c1.a.green", Kind::A);
        assert_eq!(green.unwrap(), ["10.0.8.9"]);
        assert_eq!(ask(&zones, &[], "c1", Kind::A), None);
        assert_eq!(ask(&zones, &[4098], "c1", Kind::A), None);
        let found = zones.lookup(&[vni(4097)], "c1", Kind::A).unwrap();
        assert_eq!(found.ttl, 4097, "each network has its own");
    }

    #[test]
    fn an_address_that_nobody_has_has_no_name_and_nobody_else_is_asked() {
        let zones = zones();
        let found = zones.lookup(&[vni(4096)], "77.9.0.10.in-addr.arpa", Kind::Ptr);
        assert!(found.unwrap().absent);
        let foreign = zones.lookup(&[vni(4096)], "1.1.1.1.in-addr.arpa", Kind::Ptr);
        assert!(foreign.is_none());
    }

    #[test]
    fn members_take_turns() {
        let zones = zones();
        let first = || {
            let found = zones.lookup(&[vni(4096)], "db", Kind::A).unwrap();
            format!("{:?}", found.answers().next())
        };
        let heads: BTreeSet<String> = (0..4).map(|_| first()).collect();
        assert_eq!(heads.len(), 2);
    }

    #[test]
    fn what_goes_leaves_nothing_behind() {
        let mut zones = zones();
        let ips = ["10.0.9.2", "fd00::2", "10.0.9.3", "10.0.9.4"];
        for ip in ips {
            let ip = ip.parse().unwrap();
            zones.table(vni(4096), &[TableChange::Names { ip, names: None }]);
            zones.table(vni(4096), &[TableChange::Backend { ip, backend: None }]);
        }
        assert_eq!(ask(&zones, &[4096], "db", Kind::A), None);
        assert_eq!(ask(&zones, &[4096], "tasks.web", Kind::A), Some(vec![]));
        zones.services(vni(4096), Vec::new());
        assert_eq!(ask(&zones, &[4096], "web", Kind::A), None);
        let zone = &zones.networks[&vni(4096)];
        assert!(zone.containers.is_empty() && zone.aliases.is_empty() && zone.members.is_empty());
        zones.forget(vni(4096));
        assert_eq!(
            ask(&zones, &[4096], "2.9.0.10.in-addr.arpa", Kind::Ptr),
            None
        );
    }

    proptest! {
        /// Following changes ends where a fresh zone of the last state ends.
        #[test]
        fn changes_in_a_row_end_as_the_last_of_each_address(
            steps in prop::collection::vec((2..6u8, prop::option::of((0..4u8, 0..3u8))), 0..40)
        ) {
            let change = |(ip, called): (u8, Option<(u8, u8)>)| TableChange::Names {
                ip: [10, 0, 9, ip].into(),
                names: called.map(|(name, alias)| names(&format!("c{name}"), &[&format!("a{alias}")])),
            };
            let blue = network(4096, "blue", &[]);
            let mut followed = Zones::default();
            followed.network(&blue);
            let mut last = BTreeMap::new();
            for step in steps {
                followed.table(vni(4096), &[change(step)]);
                last.insert(step.0, step.1);
            }
            let mut fresh = Zones::default();
            fresh.network(&blue);
            for step in last {
                fresh.table(vni(4096), &[change(step)]);
            }
            for name in (0..4).flat_map(|n| [format!("c{n}"), format!("a{n}")]) {
                prop_assert_eq!(ask(&followed, &[4096], &name, Kind::A), ask(&fresh, &[4096], &name, Kind::A));
            }
        }
    }
}
