//! A manager and agents over real sockets on loopback addresses: no root, no namespaces.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod common;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use control::{
    AgentConfig, AgentHandle, Authority, Endpoint, EndpointState, Event, HostId, ManagerConfig,
    ManagerError, ManagerHandle, MemberState, Membership, MemoryStore, NetworkSpec, Prober,
    RedbStore, Request, RequestError, Response, Role, ServiceSpec, Store, TableChange, WallClock,
    pki,
};

use common::await_event;

const PATIENCE: Duration = Duration::from_secs(20);

/// Remembers what it was asked.
#[derive(Default)]
struct Probes(Mutex<Vec<(SocketAddr, Vec<u16>)>>);

impl Prober for Probes {
    fn expect(&self, _: [u8; 16]) {}

    fn reply(&self, _: [u8; 16], to: SocketAddr, _: [u8; 16], sizes: &[u16]) -> Vec<u16> {
        self.0.lock().unwrap().push((to, sizes.to_vec()));
        sizes.to_vec()
    }
}

struct Cluster {
    authority: Arc<Authority>,
    manager_host: HostId,
    manager: SocketAddr,
    probes: Arc<Probes>,
}

impl Cluster {
    /// A cluster and its running manager. Each test has its own 127.N.0.0/16, so that all may run at once.
    fn start(net: u8, store: Box<dyn Store>) -> (Self, ManagerHandle) {
        let cluster = Self {
            authority: Arc::new(Authority::create(WallClock::default().unix()).unwrap()),
            manager_host: HostId::from_bytes([1; 16]),
            manager: SocketAddr::new([127, net, 0, 1].into(), 4789),
            probes: Arc::default(),
        };
        let manager = cluster.run_manager(store).unwrap();
        (cluster, manager)
    }

    fn run_manager(&self, store: Box<dyn Store>) -> Result<ManagerHandle, ManagerError> {
        ManagerHandle::start(ManagerConfig {
            listen: self.manager,
            host: self.manager_host,
            store,
            authority: Arc::clone(&self.authority),
            lifetime: pki::LIFETIME,
            prober: Arc::clone(&self.probes) as Arc<dyn Prober>,
            pools: Vec::new(),
            clock: WallClock::default(),
            succeeds: None,
        })
    }

    fn address(&self, host: u8) -> IpAddr {
        let IpAddr::V4(manager) = self.manager.ip() else {
            panic!("tests run over IPv4")
        };
        let [a, b, c, _] = manager.octets();
        [a, b, c, host].into()
    }

    fn config(&self, host: u8) -> AgentConfig {
        let vtep = self.address(host);
        let id = HostId::from_bytes([host; 16]);
        let now = WallClock::default().unix();
        let identity = self.authority.issue(id, Role::Worker, now, pki::LIFETIME);
        AgentConfig {
            host: control::testing::host_info(id, host.into(), vtep),
            managers: vec![self.manager],
            identity: Arc::new(identity.unwrap()),
            bind: vtep,
            endpoints: Vec::new(),
            cache: None,
            clock: WallClock::default(),
        }
    }

    fn join(&self, host: u8) -> AgentHandle {
        let agent = AgentHandle::start(self.config(host)).unwrap();
        agent.wait_connected(PATIENCE).unwrap();
        agent
    }
}

fn spec(name: &str) -> NetworkSpec {
    NetworkSpec::named(name)
}

fn create(agent: &AgentHandle, spec: NetworkSpec) -> Result<control::Network, RequestError> {
    match agent.request(Request::CreateNetwork {
        spec,
        routes_in_use: Vec::new(),
    })? {
        Response::Network(network) => Ok(network),
        other => panic!("{other:?}"),
    }
}

fn allocate(agent: &AgentHandle, container: &str) -> Endpoint {
    let (network, container) = ("net1".to_owned(), container.to_owned());
    match agent
        .request(Request::Allocate {
            network,
            container,
            ips: Vec::new(),
            mac: None,
            service: None,
            weight: None,
        })
        .unwrap()
    {
        Response::Endpoint(endpoint) => endpoint,
        other => panic!("{other:?}"),
    }
}

/// Takes events until an address has, or has no, MAC address.
fn await_neighbor(agent: &AgentHandle, endpoint: &Endpoint, there: bool) {
    let wanted = TableChange::Neighbor {
        ip: endpoint.ips[0],
        mac: there.then_some(endpoint.mac),
    };
    await_event(agent, PATIENCE, "neighbour", |event| match event {
        Event::Table { changes, .. } => changes.contains(&wanted).then_some(()),
        _ => None,
    });
}

#[test]
fn snapshot_deltas_and_resume_after_a_manager_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (cluster, manager) = Cluster::start(101, Box::new(RedbStore::open(folder.path()).unwrap()));
    let (one, two) = (cluster.join(1), cluster.join(2));
    let network = create(&one, spec("net1")).unwrap();
    assert_eq!(network.subnets[0].net.to_string(), "10.0.1.0/24");
    assert_eq!(
        (network.vni.get(), network.mtu, network.id.len()),
        (4096, 1450, 25)
    );

    // What is there at the time of subscribing comes as a snapshot.
    let first = allocate(&one, "c1");
    assert_eq!(first.ips, [IpAddr::from([10, 0, 1, 2])]);
    one.publish(first.clone(), EndpointState::Up);
    two.subscribe(network.vni);
    await_event(&two, PATIENCE, "network", |event| {
        matches!(event, Event::NetworkChanged(n) if n == network).then_some(())
    });
    let changes = await_event(&two, PATIENCE, "table", |event| match event {
        Event::Table { changes, .. } => Some(changes),
        _ => None,
    });
    let owner = HostId::from_bytes([1; 16]);
    assert_eq!(
        changes,
        [
            TableChange::Member {
                host: owner,
                state: MemberState::Up
            },
            TableChange::Mac {
                mac: first.mac,
                host: Some(owner)
            },
            TableChange::Neighbor {
                ip: first.ips[0],
                mac: Some(first.mac)
            },
        ]
    );

    // What comes later comes at once, in order across hosts.
    let second = allocate(&two, "c2");
    assert_eq!(second.ips, [IpAddr::from([10, 0, 1, 3])]);
    two.publish(second.clone(), EndpointState::Up);
    await_neighbor(&two, &second, true);
    assert!(matches!(
        one.request(Request::RemoveNetwork("net1".to_owned())),
        Err(RequestError::Refused(reason)) if reason.contains("has active endpoints (name:\"c1\"")
    ));

    // A new manager over the same file goes on where the old one was.
    manager.shutdown();
    await_event(&two, PATIENCE, "disconnection", |event| {
        matches!(event, Event::Disconnected { .. }).then_some(())
    });
    assert!(matches!(
        one.request(Request::Networks),
        Err(RequestError::NotConnected { .. })
    ));
    let _manager = cluster
        .run_manager(Box::new(RedbStore::open(folder.path()).unwrap()))
        .unwrap();
    let owned = await_event(&two, PATIENCE, "what it owns", |event| match event {
        Event::Owned(owned) => Some(owned),
        _ => None,
    });
    assert_eq!(owned.endpoints, std::slice::from_ref(&second));
    one.wait_connected(PATIENCE).unwrap();
    let third = allocate(&one, "c3");
    assert_eq!(third.ips, [IpAddr::from([10, 0, 1, 4])]);
    one.publish(third.clone(), EndpointState::Up);
    // Resumed, not begun again: the first news after the restart is the new endpoint alone.
    let changes = await_event(&two, PATIENCE, "table", |event| match event {
        Event::Table { changes, .. } => Some(changes),
        _ => None,
    });
    assert_eq!(
        changes,
        [
            TableChange::Mac {
                mac: third.mac,
                host: Some(owner)
            },
            TableChange::Neighbor {
                ip: third.ips[0],
                mac: Some(third.mac)
            },
        ]
    );
    one.request(Request::Free {
        vni: network.vni,
        epoch: third.epoch,
    })
    .unwrap();
    await_neighbor(&two, &third, false);

    // What a host held goes with it.
    one.request(Request::Leave).unwrap();
    await_neighbor(&two, &first, false);
    let Response::Hosts(hosts) = two.request(Request::Hosts).unwrap() else {
        panic!("no hosts")
    };
    assert_eq!(
        hosts
            .iter()
            .map(|view| view.info.name.as_str())
            .collect::<Vec<_>>(),
        ["h2"]
    );
    one.shutdown();
    two.shutdown();
}

#[test]
fn who_may_not_come_in_is_told_why() {
    let (cluster, manager) = Cluster::start(102, Box::new(MemoryStore::default()));
    let refused = |config: AgentConfig| {
        let agent = AgentHandle::start(config).unwrap();
        match agent.wait_connected(PATIENCE) {
            Err(RequestError::Refused(reason)) => reason,
            other => panic!("{other:?}"),
        }
    };
    let mut elsewhere = cluster.config(2);
    elsewhere.bind = cluster.address(3);
    assert!(refused(elsewhere).contains("connects from 127.102.0.3"));
    let _two = cluster.join(2);
    let mut same_name = cluster.config(4);
    same_name.host.name = "h2".to_owned();
    assert!(refused(same_name).starts_with("host name h2 is taken"));
    assert_eq!(
        manager.status().hosts,
        1,
        "who was refused is not remembered"
    );

    let taken = cluster.run_manager(Box::new(MemoryStore::default()));
    assert!(
        matches!(taken, Err(ManagerError::PortTaken { .. })),
        "{taken:?}"
    );
    manager.shutdown();
    let nobody = AgentHandle::start(cluster.config(5)).unwrap();
    let error = nobody
        .wait_connected(Duration::from_millis(300))
        .unwrap_err();
    assert!(error.to_string().contains("127.102.0.1:4789"), "{error}");
}

#[test]
fn bad_wishes_are_refused_and_change_nothing() {
    let (cluster, _manager) = Cluster::start(103, Box::new(MemoryStore::default()));
    let (one, two) = (cluster.join(1), cluster.join(2));
    create(&one, spec("net1")).unwrap();
    let with = |subnet: &str| NetworkSpec {
        subnets: vec![subnet.parse().unwrap()],
        ..spec("net2")
    };
    for (wish, said) in [
        (spec("net1"), "network with name net1 already exists"),
        (spec("a/b"), "invalid network name"),
        (spec("bridge"), "pre-defined network"),
        (
            with("10.0.9.1/24"),
            "invalid subnet 10.0.9.1/24: it should be 10.0.9.0/24",
        ),
        (
            with("10.0.1.128/25"),
            "Pool overlaps with other one on this address space",
        ),
        (with("10.0.0.0/16"), "kept for the network ingress"),
        (with("10.9.0.0/31"), "no room"),
        (with("127.0.0.0/8"), "not for containers"),
        (
            NetworkSpec {
                mtu: Some(1451),
                ..spec("net2")
            },
            "mtu 1451 is too large",
        ),
        (
            NetworkSpec {
                mtu: Some(100),
                ..spec("net2")
            },
            "mtu 100 is too small",
        ),
    ] {
        match create(&one, wish.clone()) {
            Err(RequestError::Refused(reason)) => assert!(reason.contains(said), "{reason}"),
            other => panic!("{wish:?}: {other:?}"),
        }
    }
    let routed = Request::CreateNetwork {
        spec: with("10.7.0.0/24"),
        routes_in_use: vec!["0.0.0.0/0".parse().unwrap(), "10.7.0.0/16".parse().unwrap()],
    };
    let error = one.request(routed).unwrap_err().to_string();
    assert!(
        error.contains("overlaps 10.7.0.0/16, which host h1 routes"),
        "{error}"
    );
    let Response::Networks(networks) = one.request(Request::Networks).unwrap() else {
        panic!("no networks")
    };
    assert_eq!(networks.len(), 1);

    one.request(Request::ClaimName("c1".to_owned())).unwrap();
    let error = two
        .request(Request::ClaimName("c1".to_owned()))
        .unwrap_err()
        .to_string();
    assert!(error.contains("c1 is already in use on host h1"), "{error}");
    two.request(Request::ReleaseName("c1".to_owned())).unwrap();
    assert!(
        two.request(Request::ClaimName("c1".to_owned())).is_err(),
        "another host cannot release it"
    );

    let mine = allocate(&one, "c1");
    assert_eq!(
        allocate(&one, "c1"),
        mine,
        "asked again before it is up: the same"
    );
    let error = two
        .request(Request::Free {
            vni: mine.vni,
            epoch: mine.epoch,
        })
        .unwrap_err()
        .to_string();
    assert!(error.contains("belongs to host h1, not to h2"), "{error}");
    let wish = |ips: &str, mac: Option<&str>| Request::Allocate {
        network: "net1".to_owned(),
        container: "c2".to_owned(),
        ips: ips
            .split_terminator(',')
            .map(|ip| ip.parse().unwrap())
            .collect(),
        mac: mac.map(|mac| mac.parse().unwrap()),
        service: None,
        weight: None,
    };
    let held = mine.mac.to_string();
    for (wish, said) in [
        (wish("10.0.1.2", None), "Address already in use"),
        (wish("10.0.1.1", None), "gateway"),
        (
            wish("10.0.2.2", None),
            "does not belong to any of this network's subnets",
        ),
        (
            wish("10.0.1.5,10.0.1.6", None),
            "one address of each family",
        ),
        (wish("", Some(held.as_str())), "already in use"),
        (wish("", Some("01:00:5e:00:00:01")), "unicast"),
    ] {
        let error = two.request(wish).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }

    // Probes go to the asking host and to nobody else.
    let probe = |to: IpAddr| Request::ProbeReply {
        nonce: [1; 16],
        to: SocketAddr::new(to, 4789),
        back_nonce: [2; 16],
        sizes: vec![1500],
    };
    assert!(two.request(probe(cluster.address(1))).is_err());
    assert_eq!(
        two.request(probe(cluster.address(2))).unwrap(),
        Response::ProbeSizes(vec![1500])
    );
    assert_eq!(cluster.probes.0.lock().unwrap().len(), 1);
}

#[test]
fn strangers_cannot_crowd_a_host_out() {
    use std::io::{Read as _, Write as _};
    let (cluster, _manager) = Cluster::start(104, Box::new(MemoryStore::default()));
    let one = cluster.join(1);
    // From one address: half-open hellos, and messages too long or of nonsense.
    let mut strangers: Vec<_> = (0..64)
        .map(|_| std::net::TcpStream::connect(cluster.manager).unwrap())
        .collect();
    for (i, stranger) in strangers.iter_mut().enumerate() {
        // Some are closed by now, as they should be.
        let _ = match i % 3 {
            0 => stranger.write_all(&[0, 0]),
            1 => stranger.write_all(&[0xff; 64]),
            _ => stranger.write_all(&[0, 0, 0, 4, 1, 2, 3, 4]),
        };
    }
    let _two = cluster.join(2);
    create(&one, spec("net1")).unwrap();
    for mut stranger in strangers {
        stranger.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut said = Vec::new();
        // Ends by a close or a reset, within the time that a hello may take.
        let _ = stranger.read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(!said.contains(&cluster.authority.cluster()), "{said}");
    }
}

#[test]
fn a_member_of_a_service_is_told_and_confirmed_by_every_host() {
    let folder = tempfile::tempdir().unwrap();
    let (cluster, _manager) =
        Cluster::start(105, Box::new(RedbStore::open(folder.path()).unwrap()));
    let (one, two) = (cluster.join(1), cluster.join(2));
    let network = create(&one, spec("net1")).unwrap();
    one.subscribe(network.vni);
    two.subscribe(network.vni);
    let request = Request::CreateService(ServiceSpec::named("web", "net1"));
    let Ok(Response::Service(web)) = one.request(request) else {
        panic!("no service")
    };
    await_event(&two, PATIENCE, "the service", |event| match event {
        Event::Services { services, .. } => (services == [*web.clone()]).then_some(()),
        _ => None,
    });
    let request = Request::Allocate {
        network: "net1".to_owned(),
        container: "c1".to_owned(),
        ips: Vec::new(),
        mac: None,
        service: Some("web".to_owned()),
        weight: None,
    };
    let Ok(Response::Endpoint(endpoint)) = one.request(request) else {
        panic!("no endpoint")
    };
    let serve = |serving| {
        let member = endpoint
            .member
            .map(|member| Membership { serving, ..member });
        let endpoint = Endpoint {
            member,
            ..endpoint.clone()
        };
        one.publish(endpoint, EndpointState::Up);
    };
    let told = |agent: &AgentHandle, wanted: bool| {
        await_event(agent, PATIENCE, "the member", |event| {
            let Event::Table { changes, .. } = event else {
                return None;
            };
            changes.into_iter().find_map(|change| match change {
                TableChange::Backend { backend, .. } => backend
                    .filter(|backend| backend.serving == wanted)
                    .map(drop),
                _ => None,
            })
        });
        let reached = await_event(agent, PATIENCE, "how far", |event| match event {
            Event::Reached {
                generation,
                revision,
                ..
            } => Some((generation, revision)),
            _ => None,
        });
        agent.applied(network.vni, reached.0, reached.1);
    };
    serve(true);
    told(&one, true);
    told(&two, true);
    serve(false);
    told(&one, false);
    let waiting = one.confirmed(network.vni, endpoint.epoch).unwrap();
    assert_eq!(waiting, ["h2"], "it has not said that it acts on it");
    told(&two, false);
    let waiting = one.confirmed(network.vni, endpoint.epoch).unwrap();
    assert!(waiting.is_empty(), "{waiting:?}");
    let other = two.confirmed(network.vni, endpoint.epoch).unwrap_err();
    assert!(other.to_string().contains("not this host's"), "{other}");
}
