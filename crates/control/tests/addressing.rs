//! Which subnets, addresses and MAC addresses a manager gives, asked as agents ask it: no socket, no clock.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use control::manager::{Connection, GRACE, Manager, Output, Settings};
use control::message::{ToAgent, ToManager};
use control::service::ServiceSpec;
use control::{
    AddressPool, Addressing, Endpoint, EndpointState, Epoch, HostId, MacMode, MemoryStore, Network,
    NetworkDetails, NetworkSpec, Request, Response, Store,
};
use vtep::MacAddr;

/// A manager with hosts h1, h2 … connected.
struct Bench {
    manager: Manager,
    store: MemoryStore,
    pools: Vec<AddressPool>,
    hosts: u8,
    /// The last epoch that the manager told, as agents remember it.
    seen: Epoch,
    now: Duration,
}

impl Bench {
    fn start(hosts: u8, pools: &str) -> Self {
        let pools: Vec<AddressPool> = pools
            .split_whitespace()
            .map(|pool| pool.parse().unwrap())
            .collect();
        let mut store = MemoryStore::default();
        let mut bench = Self {
            manager: manager(&mut store, &pools, Duration::ZERO),
            store,
            pools,
            hosts,
            seen: Epoch::ZERO,
            now: Duration::ZERO,
        };
        bench.connect();
        bench
    }

    /// The manager dies and another reads its store.
    fn restart(&mut self) {
        self.now += Duration::from_secs(1);
        self.manager = manager(&mut self.store, &self.pools, self.now);
        self.now += GRACE;
        self.connect();
    }

    fn connect(&mut self) {
        for host in 1..=self.hosts {
            let vtep = IpAddr::from([192, 0, 2, host]);
            let info =
                control::testing::host_info(HostId::from_bytes([host; 16]), host.into(), vtep);
            self.manager
                .handle_hello(host.into(), vtep, info, self.seen, self.now)
                .unwrap();
        }
        self.turn();
    }

    /// Makes a turn durable, and returns the answers in it and whether anything was written but where a search goes on.
    fn turn(&mut self) -> (Vec<(Connection, Vec<u8>)>, bool) {
        self.manager.finish_turn(self.now);
        let writes = self.manager.take_writes();
        self.store.commit(&writes).unwrap();
        let mut replies = Vec::new();
        while let Some(output) = self.manager.poll_output() {
            let Output::Send { to, message } = output else {
                continue;
            };
            match message {
                ToAgent::Reply { part, .. } => replies.push((to[0], part.to_vec())),
                ToAgent::Welcome { last_epoch, .. } => self.seen = last_epoch,
                _ => {}
            }
        }
        let wrote = writes.iter().any(|write| !write.key.starts_with("cursor/"));
        (replies, wrote)
    }

    fn say(&mut self, host: u8, message: ToManager) -> (Vec<(Connection, Vec<u8>)>, bool) {
        self.manager.handle_message(host.into(), message, self.now);
        self.turn()
    }

    fn ask(&mut self, host: u8, request: Request) -> Result<Response, String> {
        let (replies, wrote) = self.say(host, ToManager::Call { id: 1, request });
        let [(_, reply)] = &replies[..] else {
            panic!("{} replies", replies.len())
        };
        let answer: Result<Response, String> = serde_json::from_slice(reply).unwrap();
        assert!(answer.is_ok() || !wrote, "a refusal changed something");
        answer
    }

    fn create(&mut self, spec: NetworkSpec) -> Result<Network, String> {
        let routes_in_use = vec!["192.0.2.0/24".parse().unwrap()];
        let request = Request::CreateNetwork {
            spec,
            routes_in_use,
        };
        match self.ask(1, request)? {
            Response::Network(network) => Ok(network),
            other => panic!("{other:?}"),
        }
    }

    fn allocate(&mut self, host: u8, container: &str) -> Result<Endpoint, String> {
        self.allocate_as(host, container, &[], None)
    }

    fn allocate_as(
        &mut self,
        host: u8,
        container: &str,
        ips: &[&str],
        mac: Option<MacAddr>,
    ) -> Result<Endpoint, String> {
        let request = Request::Allocate {
            network: "net1".to_owned(),
            container: container.to_owned(),
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            mac,
            service: None,
            weight: None,
        };
        match self.ask(host, request)? {
            Response::Endpoint(endpoint) => {
                let publish = ToManager::Publish {
                    endpoint: endpoint.clone(),
                    owner_seq: 1,
                    state: EndpointState::Up,
                };
                self.say(host, publish);
                Ok(endpoint)
            }
            other => panic!("{other:?}"),
        }
    }

    fn free(&mut self, host: u8, endpoint: &Endpoint) {
        let (vni, epoch) = (endpoint.vni, endpoint.epoch);
        self.ask(host, Request::Free { vni, epoch }).unwrap();
    }

    fn details(&mut self) -> NetworkDetails {
        match self.ask(1, Request::Network("net1".to_owned())).unwrap() {
            Response::Details(details) => details,
            other => panic!("{other:?}"),
        }
    }
}

fn manager(store: &mut MemoryStore, pools: &[AddressPool], now: Duration) -> Manager {
    let settings = Settings {
        host: HostId::from_bytes([1; 16]),
        cluster: "cluster".to_owned(),
        seed: 1,
        unix_at_zero: Duration::from_secs(1_000_000),
        pools: pools.to_vec(),
    };
    Manager::new(settings, &store.load().unwrap(), now).unwrap()
}

fn spec(subnets: &str) -> NetworkSpec {
    NetworkSpec {
        subnets: subnets
            .split_whitespace()
            .map(|net| net.parse().unwrap())
            .collect(),
        ..NetworkSpec::named("net1")
    }
}

fn ips(endpoint: &Endpoint) -> String {
    let ips: Vec<String> = endpoint.ips.iter().map(IpAddr::to_string).collect();
    ips.join(" ")
}

#[test]
fn addresses_come_from_the_range_in_order_across_hosts_and_restarts() {
    let mut bench = Bench::start(3, "");
    let wanted = NetworkSpec {
        ip_ranges: vec![
            "10.9.0.16/29".parse().unwrap(),
            "fd00:9::100/120".parse().unwrap(),
        ],
        gateways: vec!["10.9.0.254".parse().unwrap()],
        aux_addresses: vec![
            ("router".to_owned(), "10.9.0.18".parse().unwrap()),
            ("dns".to_owned(), "fd00:9::101".parse().unwrap()),
        ],
        ..spec("10.9.0.0/24 fd00:9::/64")
    };
    let network = bench.create(wanted).unwrap();
    assert_eq!(network.subnets[0].gateway.to_string(), "10.9.0.254");
    assert_eq!(network.subnets[1].gateway.to_string(), "fd00:9::1");
    let one = bench.allocate(1, "c1").unwrap();
    assert_eq!(ips(&one), "10.9.0.16 fd00:9::100");
    let two = bench.allocate(2, "c2").unwrap();
    assert_eq!(ips(&two), "10.9.0.17 fd00:9::102");
    bench.restart();
    let three = bench.allocate(3, "c3").unwrap();
    assert_eq!(ips(&three), "10.9.0.19 fd00:9::103");
    // By number, all of the subnet may be had but what is kept.
    let asked = bench
        .allocate_as(1, "c4", &["10.9.0.200", "fd00:9::dead"], None)
        .unwrap();
    assert_eq!(ips(&asked), "10.9.0.200 fd00:9::dead");
    for (ip, said) in [
        ("10.9.0.18", "is kept as auxiliary address router"),
        ("10.9.0.254", "is the gateway of 10.9.0.0/24"),
        ("10.9.0.0", "is the first or the last"),
        (
            "10.9.0.17",
            "Address already in use: 10.9.0.17 is container c2's on host h2",
        ),
        (
            "10.9.1.17",
            "does not belong to any of this network's subnets (10.9.0.0/24, fd00:9::/64)",
        ),
    ] {
        let refused = bench.allocate_as(1, "c5", &[ip], None).unwrap_err();
        assert!(refused.contains(said), "{refused}");
    }
    // The first of the old gateway's range is a container's to have.
    let first = bench.allocate_as(1, "c5", &["10.9.0.1"], None).unwrap();
    assert_eq!(ips(&first), "10.9.0.1 fd00:9::104");
    let usage = bench.details().usage;
    assert_eq!((usage[0].in_use, usage[0].free), (3, 4));
    assert_eq!((usage[1].in_use, usage[1].free), (4, 251));
}

#[test]
fn a_full_network_says_who_holds_it_and_when_one_is_free() {
    let mut bench = Bench::start(2, "");
    let network = bench.create(spec("10.9.0.0/29")).unwrap();
    let held: Vec<Endpoint> = (1..=5)
        .map(|n| bench.allocate(1 + n % 2, &format!("c{n}")).unwrap())
        .collect();
    let refused = bench.allocate(1, "c6").unwrap_err();
    let line = format!(
        "no available IPv4 addresses on this network's address pools: net1 ({}): 5 of 5 in use \
         (3 on h2, 2 on h1); remove containers, or create a network with a larger subnet",
        network.id
    );
    assert_eq!(refused, line);
    bench.free(2, &held[0]);
    bench.now += Duration::from_millis(3500);
    bench.free(1, &held[1]);
    let refused = bench.allocate(1, "c6").unwrap_err();
    let part = "3 of 5 in use (2 on h2, 1 on h1), 2 resting, the next free in 7 s;";
    assert!(refused.contains(part), "{refused}");
    bench.now += Duration::from_millis(6500);
    let reused = bench.allocate(1, "c6").unwrap();
    assert_eq!(reused.ips, held[0].ips);
    assert_ne!(reused.mac, held[0].mac);
}

#[test]
fn a_network_chooses_its_rest() {
    for (rest_seconds, early) in [(0, None), (30, Some(29))] {
        let mut bench = Bench::start(1, "");
        let addressing = Addressing {
            rest_seconds,
            ..Addressing::default()
        };
        let wanted = NetworkSpec {
            addressing,
            ..spec("10.9.0.0/30")
        };
        assert_eq!(bench.create(wanted).unwrap().addressing, addressing);
        let one = bench.allocate(1, "c1").unwrap();
        bench.free(1, &one);
        if let Some(early) = early {
            bench.now += Duration::from_secs(early);
            let refused = bench.allocate(1, "c2").unwrap_err();
            assert!(refused.contains("the next free in 1 s"), "{refused}");
            bench.now += Duration::from_secs(1);
        }
        assert_eq!(bench.allocate(1, "c2").unwrap().ips, one.ips);
    }
}

#[test]
fn a_rest_begins_anew_with_a_restart_and_goes_on_after_it() {
    let mut bench = Bench::start(1, "");
    bench.create(spec("10.9.0.0/30")).unwrap();
    let one = bench.allocate(1, "c1").unwrap();
    bench.free(1, &one);
    bench.restart();
    bench.now -= Duration::from_secs(1);
    assert!(bench.allocate(1, "c2").is_err());
    bench.now += Duration::from_secs(1);
    assert!(bench.allocate(1, "c2").is_ok());
}

#[test]
fn docker_mac_addresses_are_made_of_the_ipv4_address() {
    let mut bench = Bench::start(1, "");
    let addressing = Addressing {
        mac: MacMode::Docker,
        rest_seconds: 0,
    };
    let wanted = |subnets| NetworkSpec {
        addressing,
        ..spec(subnets)
    };
    let refused = bench.create(wanted("fd00:9::/64")).unwrap_err();
    assert!(refused.contains("give an IPv4 --subnet too"), "{refused}");
    bench.create(wanted("10.9.0.0/29 fd00:9::/64")).unwrap();
    let docker = |last| MacAddr::new([0x02, 0x42, 10, 9, 0, last]);
    let one = bench.allocate(1, "c1").unwrap();
    assert_eq!(one.mac, docker(2));
    let chosen = bench
        .allocate_as(1, "c2", &["10.9.0.5"], Some(docker(3)))
        .unwrap();
    assert_eq!(chosen.mac, docker(3));
    let refused = bench.allocate(1, "c3").unwrap_err();
    assert!(
        refused.contains("02:42:0a:09:00:03 is already in use by 10.9.0.5 on host h1"),
        "{refused}"
    );
    // The next turn is another address's.
    assert_eq!(bench.allocate(1, "c3").unwrap().mac, docker(4));
    bench.free(1, &one);
    let again = bench.allocate_as(1, "c4", &["10.9.0.2"], None).unwrap();
    assert_eq!(again.mac, one.mac);
}

#[test]
fn subnets_come_from_the_pools_of_the_cluster() {
    let mut bench = Bench::start(
        1,
        "base=10.20.0.0/22,size=24 base=192.0.2.0/24,size=28 base=fd00:1::/48,size=64",
    );
    let named = |name: &str| NetworkSpec::named(name);
    let subnets = |network: Network| -> Vec<String> {
        network.subnets.iter().map(|s| s.net.to_string()).collect()
    };
    // The first subnet is kept for ingress; 192.0.2.0/24 is the underlay's, as the asking host routes it.
    assert_eq!(subnets(bench.create(named("a")).unwrap()), ["10.20.1.0/24"]);
    let asked = NetworkSpec {
        name: "b".to_owned(),
        ..spec("0.0.0.0/27")
    };
    assert_eq!(subnets(bench.create(asked).unwrap()), ["10.20.2.0/27"]);
    let both = NetworkSpec {
        ipv6: true,
        ..named("c")
    };
    assert_eq!(
        subnets(bench.create(both).unwrap()),
        ["10.20.3.0/24", "fd00:1::/64"]
    );
    let refused = bench.create(named("d")).unwrap_err();
    let line = "all predefined address pools have been fully subnetted \
                (10.20.0.0/22 as /24, 192.0.2.0/24 as /28): give a --subnet";
    assert_eq!(refused, line);
    let kept = NetworkSpec {
        name: "e".to_owned(),
        ..spec("10.20.0.0/24")
    };
    let refused = bench.create(kept).unwrap_err();
    assert!(
        refused.contains("kept for the network ingress"),
        "{refused}"
    );
    // Without pools of its own a cluster has 10.0.0.0/8 as /24.
    let mut standard = Bench::start(1, "");
    assert_eq!(
        subnets(standard.create(named("a")).unwrap()),
        ["10.0.1.0/24"]
    );
    let both = NetworkSpec {
        ipv6: true,
        ..named("b")
    };
    let refused = standard.create(both).unwrap_err();
    assert!(refused.contains("no IPv6 address pool"), "{refused}");
}

#[test]
fn wishes_that_contradict_themselves_change_nothing() {
    let mut bench = Bench::start(1, "");
    let range = |subnets, range: &str| NetworkSpec {
        ip_ranges: vec![range.parse().unwrap()],
        ..spec(subnets)
    };
    let gateway = |subnets, gateway: &str| NetworkSpec {
        gateways: vec![gateway.parse().unwrap()],
        ..spec(subnets)
    };
    let addressing = Addressing {
        rest_seconds: 1_000_000,
        ..Addressing::default()
    };
    for (wanted, said) in [
        (
            range("", "10.9.0.0/28"),
            "every ip-range or gateway must have a corresponding subnet",
        ),
        (
            gateway("", "10.9.0.1"),
            "every ip-range or gateway must have a corresponding subnet",
        ),
        (
            range("10.9.0.0/24", "10.8.0.0/28"),
            "no matching subnet for range 10.8.0.0/28",
        ),
        (
            gateway("10.9.0.0/24", "10.8.0.1"),
            "no matching subnet for gateway 10.8.0.1",
        ),
        (
            NetworkSpec {
                addressing,
                ..spec("10.9.0.0/24")
            },
            "a rest of 1000000 s is too long",
        ),
        (
            NetworkSpec {
                dns_ttl: 3601,
                ..spec("10.9.0.0/24")
            },
            "dns-ttl=3601 is too long: at most 3600 s",
        ),
        (
            NetworkSpec {
                ingress: true,
                internal: true,
                ..spec("10.9.0.0/24")
            },
            "the network of published ports can't be internal",
        ),
        (spec("0.0.0.0/31"), "subnet size is out of range: 31"),
        (
            spec("192.0.2.0/25"),
            "overlaps 192.0.2.0/24, which host h1 routes",
        ),
    ] {
        let refused = bench.create(wanted).unwrap_err();
        assert!(refused.contains(said), "{refused}");
    }
    let stored: BTreeMap<String, String> = bench.store.load().unwrap();
    assert!(stored.keys().all(|key| !key.starts_with("network/")));
}

#[test]
fn a_network_that_is_not_attachable_takes_members_of_services_alone() {
    let mut bench = Bench::start(1, "");
    let wanted = NetworkSpec {
        attachable: false,
        ..spec("10.9.0.0/24")
    };
    let network = bench.create(wanted).unwrap();
    let refused = bench.allocate(1, "c1").unwrap_err();
    assert!(
        refused.contains("network net1 not manually attachable"),
        "{refused}"
    );
    // A host that lies gets no further: an endpoint that the store never issued is taken in for a member alone.
    let lie = Endpoint {
        vni: network.vni,
        container: "c1".to_owned(),
        mac: "02:01:0a:09:00:09".parse().unwrap(),
        ips: vec!["10.9.0.9".parse().unwrap()],
        epoch: Epoch::new(network.epoch.generation(), network.epoch.counter() + 1),
        member: None,
        names: None,
    };
    bench
        .ask(1, Request::CreateService(ServiceSpec::named("web", "net1")))
        .unwrap();
    let publish = ToManager::Publish {
        endpoint: lie,
        owner_seq: 1,
        state: EndpointState::Up,
    };
    bench.say(1, publish);
    assert!(bench.details().endpoints.is_empty());
    let member = Request::Allocate {
        network: "net1".to_owned(),
        container: "c1".to_owned(),
        ips: Vec::new(),
        mac: None,
        service: Some("web".to_owned()),
        weight: None,
    };
    assert!(matches!(
        bench.ask(1, member).unwrap(),
        Response::Endpoint(_)
    ));
}

#[test]
fn a_network_of_before_there_were_internal_ones_is_as_it_was() {
    let mut bench = Bench::start(1, "");
    let network = bench.create(spec("10.9.0.0/24")).unwrap();
    let mut old = serde_json::to_value(&network).unwrap();
    let fields = old.as_object_mut().unwrap();
    for new in ["internal", "attachable", "dns_ttl"] {
        fields.remove(new).unwrap();
    }
    let read: Network = serde_json::from_value(old).unwrap();
    assert_eq!(read, network);
    assert!(!read.internal && read.attachable);
    assert_eq!(read.dns_ttl, 5);
}
