//! The way of a request through a service and back, over a real datapath, without agents: plans made by hand, put in place by
//! the code that hosts use.
//!
//! ```text
//!            client 198.51.100.2 ─── w0 ┐
//!                                   host a: towline_ingress 10.0.9.2 ──┐           ┌── 10.0.9.3 towline_ingress :host b
//!   member near: ingress 10.0.9.12 ─────────── datapath a ── u0 ═══ veth ═══ u0 ── datapath b ──── ingress 10.0.9.11 :member far
//! ```
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use control::service::{Balance, Protocol, Publish, PublishMode, PublishOn, Service, ServiceSpec};
use control::{Backend, Epoch, HostId, TableChange};
use discovery::plan::{HOST_INTERFACE, MEMBER_INTERFACE};
use discovery::slots::mix;
use discovery::{
    EntryHost, InstalledClient, InstalledEntry, InstalledMember, MemberNetwork, Services,
};
use netns::{Netns, sysctl};
use towline_tests::wire::{Endpoint, Outer, Pair, Setup};
use towline_tests::{TestNetns, sh, try_sh, wire_tests};
use vtep::datapath::{Datapath, PortSpec};

wire_tests!(
    published_ports_reach_every_member_with_the_client_s_address,
    a_service_s_own_settings_hold,
    a_host_s_table_is_the_same_whatever_it_was_before,
    loopback_addresses_are_the_host_s_alone,
    the_ingress_network_is_no_way_to_anything_else,
    members_that_leave_get_no_new_connections_and_lose_none,
    virtual_addresses_are_balanced_where_the_client_is,
    what_nobody_serves_is_refused_and_what_is_removed_leaves_nothing,
);

const PATIENCE: Duration = Duration::from_secs(30);
const VNI: u32 = 4097;
const GATEWAY_MAC: [u8; 6] = [0x02, 0, 10, 0, 9, 1];
const CLIENT: [&str; 2] = ["198.51.100.2", "2001:db8:9::2"];
const HOST_A: [&str; 2] = ["198.51.100.1", "2001:db8:9::1"];

/// Two hosts with a member each, and a client outside.
struct Mesh {
    near: TestNetns,
    far: TestNetns,
    /// A container on host a that serves nothing.
    user: TestNetns,
    client: TestNetns,
    services: Services,
    entry: InstalledEntry,
    members: [InstalledMember; 2],
    // Before the namespaces go.
    _datapaths: [Box<dyn Datapath>; 2],
    pair: Pair,
}

impl Mesh {
    fn new(setup: Setup) -> Self {
        let pair = Pair::new();
        let (near, far, user, client) = (
            pair.container("near"),
            pair.container("far"),
            pair.container("user"),
            pair.container("client"),
        );
        let start =
            |netns: &Netns, host| (setup.start)(netns.clone(), Outer::V4.vtep(host)).unwrap();
        let (on_a, on_b) = (start(&pair.a, 1), start(&pair.b, 2));
        let ports = [
            (&*on_a, 2, &*pair.a, HOST_INTERFACE, 1),
            (&*on_b, 3, &*pair.b, HOST_INTERFACE, 2),
            (&*on_a, 12, &*near, MEMBER_INTERFACE, 1),
            (&*on_b, 11, &*far, MEMBER_INTERFACE, 2),
            (&*on_a, 13, &*user, "eth0", 1),
        ];
        for (datapath, number, netns, ifname, host) in ports {
            let endpoint = Endpoint::new(VNI, number);
            datapath.apply(&[endpoint.network()]);
            let spec = PortSpec {
                ifname: ifname.to_owned(),
                any_source: ifname == HOST_INTERFACE,
                ..endpoint.spec(netns, setup.backend)
            };
            datapath.attach(&spec).unwrap();
            // Strict filters: the worst that a host or container may have.
            sysctl::set(netns, &format!("net/ipv4/conf/{ifname}/rp_filter"), "1").unwrap();
            sysctl::set(netns, &format!("net/ipv6/conf/{ifname}/accept_dad"), "0").unwrap();
            endpoint.configure(netns, ifname);
            sh(netns, "ip link set lo up");
            let other = if host == 1 { &*on_b } else { &*on_a };
            other.apply(&[endpoint.network()]);
            other.apply(&endpoint.at(Outer::V4.remote(host)));
        }
        towline_tests::wire::netlink(&pair.a)
            .add_veth("w0", "w0", &client)
            .unwrap();
        for (netns, ips) in [(&*pair.a, HOST_A), (&*client, CLIENT)] {
            sysctl::set(netns, "net/ipv6/conf/w0/accept_dad", "0").unwrap();
            sh(netns, &format!("ip addr add {}/24 dev w0", ips[0]));
            sh(netns, &format!("ip addr add {}/64 dev w0", ips[1]));
            sh(netns, "ip link set w0 up");
        }
        for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            sysctl::set(&pair.a, key, "1").unwrap();
        }
        // A way out that answers must not take. The other member has none, as on an internal network.
        for command in [
            "link add eth1 type veth peer name nobody",
            "link set nobody up",
            "addr add 172.20.0.2/24 dev eth1",
            "link set eth1 up",
            "route add default via 172.20.0.1",
            "-6 route add default dev eth1",
        ] {
            sh(&near, &format!("ip {command}"));
        }
        serve(&near, "near");
        serve(&far, "far");
        Self {
            near,
            far,
            user,
            client,
            services: Services::new(),
            entry: InstalledEntry::default(),
            members: Default::default(),
            _datapaths: [on_a, on_b],
            pair,
        }
    }

    /// One service, with these published ports; both members serve it.
    fn define(&mut self, service: Service) {
        let vni = vtep::Vni::new(VNI).unwrap();
        self.services.services(vni, vec![service]);
        self.member(12, Some(true));
        self.member(11, Some(true));
    }

    fn member(&mut self, number: u8, serving: Option<bool>) {
        self.backend(number, serving, 1);
    }

    fn weigh(&mut self, number: u8, weight: u16) {
        self.backend(number, Some(true), weight);
    }

    fn backend(&mut self, number: u8, serving: Option<bool>, weight: u16) {
        let endpoint = Endpoint::new(VNI, number);
        let backend = serving.map(|serving| Backend {
            service: Epoch::new(1, 7),
            host: HostId::NOBODY,
            weight,
            serving,
        });
        let changes =
            [endpoint.ip(), endpoint.ip6()].map(|ip| TableChange::Backend { ip, backend });
        self.services.table(vtep::Vni::new(VNI).unwrap(), &changes);
    }

    /// Puts the plans in place, on host a and in both members.
    fn apply(&mut self) {
        let vni = vtep::Vni::new(VNI).unwrap();
        let plan = self.services.entry_plan(vni, &entry_host());
        self.entry.apply(&self.pair.a, &plan).unwrap();
        let namespaces = [(12, &self.near), (11, &self.far)];
        for ((number, netns), installed) in namespaces.into_iter().zip(&mut self.members) {
            let endpoint = Endpoint::new(VNI, number);
            let network = MemberNetwork {
                ips: [endpoint.ip(), endpoint.ip6()].into(),
                gateways: ["10.0.9.1", "fd09::1"].map(|ip| ip.parse().unwrap()).into(),
                gateway_mac: GATEWAY_MAC,
            };
            let plan = self
                .services
                .member_plan(vni, Epoch::new(1, 7), &network)
                .unwrap();
            installed.apply(netns, &plan).unwrap();
        }
    }
}

fn entry_host() -> EntryHost {
    EntryHost {
        subnets: ["10.0.9.0/24", "fd09::/64"]
            .map(|net| net.parse().unwrap())
            .into(),
        ..EntryHost::default()
    }
}

fn service(publish: Vec<Publish>) -> Service {
    Service {
        id: "service".to_owned(),
        epoch: Epoch::new(1, 7),
        version: Epoch::new(1, 7),
        vni: vtep::Vni::new(VNI).unwrap(),
        spec: ServiceSpec {
            publish,
            idle_timeout: Some(7200),
            ..ServiceSpec::named("web", "net")
        },
        vips: ["10.0.9.77", "fd09::77"]
            .map(|ip| ip.parse().unwrap())
            .into(),
        created: 0,
    }
}

fn published(protocol: Protocol, published: u16, target: u16) -> Publish {
    Publish {
        target,
        published: Some(published),
        protocol,
        mode: PublishMode::Ingress,
        on: None,
    }
}

/// Serves TCP and UDP on port 80: says its name and whom it sees, then says again what it is told.
fn serve(netns: &Netns, name: &'static str) {
    let (listener, socket) = netns
        .run(|| {
            (
                TcpListener::bind("[::]:80").unwrap(),
                UdpSocket::bind("[::]:80").unwrap(),
            )
        })
        .unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let peer = stream.peer_addr().unwrap().ip().to_canonical();
                let _ = stream.write_all(format!("{name} {peer}\n").as_bytes());
                let mut buffer = [0; 1024];
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..count]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let text = format!("{name} {}", peer.ip().to_canonical());
            let _ = socket.send_to(text.as_bytes(), peer);
        }
    });
}

/// A connection, and what the member said: its name, and whom it sees.
fn connect(from: &Netns, ip: &str, port: u16) -> std::io::Result<(TcpStream, String, IpAddr)> {
    let address = SocketAddr::new(ip.parse().unwrap(), port);
    let stream = from
        .run(|| TcpStream::connect_timeout(&address, PATIENCE))
        .unwrap()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    let (name, seen) = line.trim().split_once(' ').expect("a name and an address");
    Ok((stream, name.to_owned(), seen.parse().unwrap()))
}

/// How often each member answered `count` connections, all of which see `seen`.
fn shares(from: &Netns, ip: &str, port: u16, count: usize, seen: &str) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for _ in 0..count {
        let (_, name, peer) =
            connect(from, ip, port).unwrap_or_else(|error| panic!("{ip}:{port}: {error}"));
        assert_eq!(peer, seen.parse::<IpAddr>().unwrap(), "{ip}:{port}");
        *shares.entry(name).or_default() += 1;
    }
    shares
}

fn halves(count: usize) -> BTreeMap<String, usize> {
    BTreeMap::from([("near".to_owned(), count), ("far".to_owned(), count)])
}

/// A UDP socket that speaks to one address, and who answers.
fn ask(socket: &UdpSocket) -> String {
    let limit = Instant::now() + PATIENCE;
    let mut buffer = [0; 1024];
    socket
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    while Instant::now() < limit {
        // A refusal, or nothing: what was asked may be on its way to one that left.
        if socket.send(b"who").is_err() {
            continue;
        }
        if let Ok(count) = socket.recv(&mut buffer) {
            return String::from_utf8_lossy(&buffer[..count]).into_owned();
        }
    }
    panic!("no answer by UDP");
}

fn udp(from: &Netns, ip: &str, port: u16) -> UdpSocket {
    let to = SocketAddr::new(ip.parse().unwrap(), port);
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = from.run(|| UdpSocket::bind(any)).unwrap().unwrap();
    socket.connect(to).unwrap();
    socket
}

fn published_ports_reach_every_member_with_the_client_s_address(setup: Setup) {
    let mut mesh = Mesh::new(setup);
    let mut hidden = published(Protocol::Tcp, 8081, 80);
    hidden.on = Some(PublishOn::Address(HOST_A[0].parse().unwrap()));
    mesh.define(service(vec![
        published(Protocol::Tcp, 8080, 80),
        published(Protocol::Udp, 8080, 80),
        hidden,
    ]));
    mesh.apply();
    for (host, client) in HOST_A.into_iter().zip(CLIENT) {
        assert_eq!(shares(&mesh.client, host, 8080, 8, client), halves(4));
        // The host itself, by its address.
        assert_eq!(shares(&mesh.pair.a, host, 8080, 4, host), halves(2));
        let answer = ask(&udp(&mesh.client, host, 8080));
        assert!(answer.ends_with(client), "{answer}");
    }
    // On one address alone.
    assert_eq!(
        shares(&mesh.client, HOST_A[0], 8081, 2, CLIENT[0]),
        halves(1)
    );
    assert!(connect(&mesh.client, HOST_A[1], 8081).is_err());
    // Every connection's time limit is the service's.
    let (open, ..) = connect(&mesh.client, HOST_A[0], 8080).unwrap();
    let entries = sh(&mesh.pair.a, "cat /proc/net/nf_conntrack");
    let established = |line: &str| {
        line.contains("ESTABLISHED") && line.contains(" dport=8080 ") && {
            let seconds: u32 = line.split_whitespace().nth(4).unwrap().parse().unwrap();
            (6000..=7200).contains(&seconds)
        }
    };
    assert!(entries.lines().any(established), "{entries}");
    drop(open);
    // A container that has a port on the same network.
    let host = Endpoint::new(VNI, 2);
    for ip in [host.ip(), host.ip6()] {
        let ip = ip.to_string();
        assert_eq!(shares(&mesh.user, &ip, 8080, 4, &ip), halves(2));
    }
    // Other ports of a member are not reached by the ingress network, not even from its hosts.
    let other = mesh.far.run(|| TcpListener::bind("[::]:81")).unwrap();
    assert!(
        try_sh(&mesh.pair.a, "nc -z -w 1 10.0.9.11 81")
            .status
            .code()
            != Some(0)
    );
    drop(other);
}

fn a_service_s_own_settings_hold(setup: Setup) {
    let mut mesh = Mesh::new(setup);
    let mut web = service(vec![published(Protocol::Tcp, 8080, 80)]);
    web.spec.preserve_client = false;
    mesh.define(web.clone());
    mesh.apply();
    let host = Endpoint::new(VNI, 2);
    for (ip, seen) in HOST_A.into_iter().zip([host.ip(), host.ip6()]) {
        let seen = seen.to_string();
        assert_eq!(shares(&mesh.client, ip, 8080, 4, &seen), halves(2));
    }
    // By source: whoever it is, it is always the same.
    web.spec.preserve_client = true;
    web.spec.balance = Balance::Source;
    mesh.define(web.clone());
    mesh.apply();
    for (ip, client) in HOST_A.into_iter().zip(CLIENT) {
        let one = shares(&mesh.client, ip, 8080, 6, client);
        assert_eq!(one.into_values().collect::<Vec<_>>(), [6]);
    }
    // By weight.
    web.spec.balance = Balance::Weighted;
    mesh.define(web);
    mesh.weigh(12, 3);
    mesh.apply();
    let three_to_one = BTreeMap::from([("near".to_owned(), 6), ("far".to_owned(), 2)]);
    for (ip, client) in HOST_A.into_iter().zip(CLIENT) {
        assert_eq!(shares(&mesh.client, ip, 8080, 8, client), three_to_one);
    }
    // Somebody loads a firewall anew.
    assert!(!mesh.entry.repair(&mesh.pair.a).unwrap());
    sh(&mesh.pair.a, "nft flush ruleset");
    assert!(connect(&mesh.client, HOST_A[0], 8080).is_err());
    assert!(mesh.entry.repair(&mesh.pair.a).unwrap());
    assert!(!mesh.entry.repair(&mesh.pair.a).unwrap());
    connect(&mesh.client, HOST_A[0], 8080).unwrap();
}

/// What nft shows of a table, chain by chain and set by set, in no order.
fn blocks(netns: &Netns, table: &str) -> BTreeSet<String> {
    let listed = sh(netns, &format!("nft list table {table}"));
    let lines: Vec<_> = listed.lines().collect();
    // Without the table's own first and last line.
    let inside = lines[1..lines.len() - 1].join("\n");
    inside
        .split("\n\n")
        .map(|block| block.trim().to_owned())
        .collect()
}

fn a_host_s_table_is_the_same_whatever_it_was_before(setup: Setup) {
    let mut mesh = Mesh::new(setup);
    let fresh = mesh.pair.container("fresh");
    sh(
        &fresh,
        "ip link add towline_ingress type veth peer name other",
    );
    sh(&fresh, "ip link set towline_ingress up");
    let places = [
        None,
        Some(PublishOn::Address(HOST_A[0].parse().unwrap())),
        Some(PublishOn::Interface("w0".to_owned())),
        Some(PublishOn::Interface("lo".to_owned())),
    ];
    let vni = vtep::Vni::new(VNI).unwrap();
    for step in 0..60 {
        // A number of the step's own for each thing that may differ.
        let draw = |thing: u64, sides: u64| mix([step, thing]) % sides;
        let ports = (0..draw(0, 4)).map(|port| Publish {
            on: places[usize::try_from(draw(10 + port, 4)).unwrap()].clone(),
            protocol: if draw(20 + port, 2) == 0 {
                Protocol::Tcp
            } else {
                Protocol::Udp
            },
            ..published(
                Protocol::Tcp,
                8080 + u16::try_from(draw(30 + port, 3)).unwrap(),
                80,
            )
        });
        let mut web = service(ports.collect());
        web.spec.idle_timeout = [None, Some(60), Some(7200)][usize::try_from(draw(1, 3)).unwrap()];
        web.spec.preserve_client = draw(2, 2) == 0;
        web.spec.balance = [Balance::RoundRobin, Balance::Weighted, Balance::Source]
            [usize::try_from(draw(3, 3)).unwrap()];
        mesh.services.services(vni, vec![web]);
        for number in [11, 12] {
            let serving = [None, Some(true), Some(false)];
            mesh.member(
                number,
                serving[usize::try_from(draw(4 + u64::from(number), 3)).unwrap()],
            );
        }
        let plan = mesh.services.entry_plan(vni, &entry_host());
        mesh.entry.apply(&mesh.pair.a, &plan).unwrap();
        if plan.ports.is_empty() {
            assert_eq!(sh(&mesh.pair.a, "nft list ruleset"), "", "step {step}");
            continue;
        }
        InstalledEntry::default().apply(&fresh, &plan).unwrap();
        let table = "inet towline-ingress";
        assert_eq!(
            blocks(&mesh.pair.a, table),
            blocks(&fresh, table),
            "step {step}: {plan:?}"
        );
    }
}

fn loopback_addresses_are_the_host_s_alone(setup: Setup) {
    // Conformance H19: loopback-only publish reached from the LAN.
    let mut mesh = Mesh::new(setup);
    let local = |port, ip: &str| Publish {
        on: Some(PublishOn::Address(ip.parse().unwrap())),
        ..published(Protocol::Tcp, port, 80)
    };
    mesh.define(service(vec![
        published(Protocol::Tcp, 8080, 80),
        local(8081, "127.0.0.1"),
        local(8082, "::1"),
    ]));
    mesh.apply();
    let host = Endpoint::new(VNI, 2);
    let (v4, v6) = (host.ip().to_string(), host.ip6().to_string());
    for (ip, port, seen) in [
        ("127.0.0.1", 8080, &v4),
        ("127.0.0.1", 8081, &v4),
        ("::1", 8080, &v6),
        ("::1", 8082, &v6),
    ] {
        assert_eq!(
            shares(&mesh.pair.a, ip, port, 4, seen),
            halves(2),
            "{ip}:{port}"
        );
    }
    // From the LAN: by the host's own address, and by the loopback address itself, for which a neighbour only needs a route.
    for (ip, port) in [(HOST_A[0], 8081), (HOST_A[1], 8082)] {
        assert!(connect(&mesh.client, ip, port).is_err(), "{ip}:{port}");
    }
    sysctl::set(&mesh.client, "net/ipv4/conf/w0/route_localnet", "1").unwrap();
    sh(
        &mesh.client,
        &format!(
            "ip route add 127.9.0.0/16 via {} src {}",
            HOST_A[0], CLIENT[0]
        ),
    );
    let asked = try_sh(&mesh.client, "nc -z -w 1 127.9.0.1 8080");
    assert_ne!(asked.status.code(), Some(0));
    let entries = sh(&mesh.pair.a, "cat /proc/net/nf_conntrack");
    assert!(!entries.contains("dst=127.9.0.1"), "{entries}");
}

fn the_ingress_network_is_no_way_to_anything_else(setup: Setup) {
    let mut mesh = Mesh::new(setup);
    mesh.define(service(vec![published(Protocol::Tcp, 8080, 80)]));
    mesh.apply();
    let host = Endpoint::new(VNI, 2).ip();
    let _listener = mesh
        .pair
        .a
        .run(|| TcpListener::bind("0.0.0.0:9999"))
        .unwrap();
    let _outside = mesh
        .client
        .run(|| TcpListener::bind("0.0.0.0:9999"))
        .unwrap();
    // Programs of the host: by its address there, and by loopback addresses, which its interface there takes.
    sysctl::set(&mesh.user, "net/ipv4/conf/eth0/route_localnet", "1").unwrap();
    for net in ["127.9.0.0/16", "198.51.100.0/24"] {
        sh(&mesh.user, &format!("ip route add {net} via {host}"));
    }
    // A neighbour of the host that knows the members' addresses.
    sh(
        &mesh.client,
        &format!("ip route add 10.0.9.0/24 via {}", HOST_A[0]),
    );
    let host = host.to_string();
    for (from, ip, port) in [
        (&mesh.user, &*host, 9999),
        (&mesh.user, "127.9.0.1", 9999),
        (&mesh.user, HOST_A[0], 9999),
        (&mesh.user, CLIENT[0], 9999),
        (&mesh.client, "10.0.9.11", 80),
        (&mesh.client, "10.0.9.12", 80),
    ] {
        let asked = try_sh(from, &format!("nc -z -w 1 {ip} {port}"));
        assert_ne!(asked.status.code(), Some(0), "{}: {ip}:{port}", from.name());
    }
    // All of these are there, and what is published goes on.
    connect(&mesh.client, HOST_A[0], 8080).unwrap();
    sh(&mesh.client, &format!("nc -z -w 30 {} 9999", HOST_A[0]));
    sh(&mesh.pair.a, &format!("nc -z -w 30 {} 9999", CLIENT[0]));
    sh(&mesh.user, "nc -z -w 30 10.0.9.11 80");
}

fn members_that_leave_get_no_new_connections_and_lose_none(setup: Setup) {
    let mut mesh = Mesh::new(setup);
    mesh.define(service(vec![
        published(Protocol::Tcp, 8080, 80),
        published(Protocol::Udp, 8080, 80),
    ]));
    mesh.apply();
    let mut open: Vec<_> = (0..2)
        .map(|_| connect(&mesh.client, HOST_A[0], 8080).unwrap())
        .collect();
    let sockets: Vec<_> = (0..4).map(|_| udp(&mesh.client, HOST_A[1], 8080)).collect();
    let by_udp: BTreeSet<_> = sockets.iter().map(ask).collect();
    assert_eq!(by_udp.len(), 2, "{by_udp:?}");
    mesh.member(12, Some(false));
    mesh.apply();
    let all = BTreeMap::from([("far".to_owned(), 6)]);
    assert_eq!(shares(&mesh.client, HOST_A[0], 8080, 6, CLIENT[0]), all);
    for (stream, name, _) in &mut open {
        stream.write_all(b"still here").unwrap();
        let mut said = [0; 10];
        stream.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"still here", "{name}");
    }
    assert!(sockets.iter().any(|socket| ask(socket).starts_with("near")));
    // It is gone: what UDP it was sent goes to the other.
    mesh.member(12, None);
    mesh.apply();
    for socket in &sockets {
        let answer = ask(socket);
        assert!(answer.starts_with("far"), "{answer}");
    }
    let entries = sh(&mesh.pair.a, "cat /proc/net/nf_conntrack");
    let near = Endpoint::new(VNI, 12).ip();
    assert!(!entries.contains(&format!("src={near} ")), "{entries}");
}

fn virtual_addresses_are_balanced_where_the_client_is(setup: Setup) {
    let mut mesh = Mesh::new(setup);
    mesh.define(service(vec![published(Protocol::Tcp, 8080, 80)]));
    let vni = vtep::Vni::new(VNI).unwrap();
    let plan = mesh.services.client_plan(&BTreeSet::from([vni]), 5);
    // Members call their own service; the network is the members' own.
    let mut clients: [InstalledClient; 2] = Default::default();
    for (client, netns) in clients.iter_mut().zip([&mesh.near, &mesh.far]) {
        client.apply(netns, &plan).unwrap();
    }
    for (vip, own) in [
        ("10.0.9.77", Endpoint::new(VNI, 12).ip()),
        ("fd09::77", Endpoint::new(VNI, 12).ip6()),
    ] {
        let own = own.to_string();
        assert_eq!(shares(&mesh.near, vip, 80, 8, &own), halves(4));
        let socket = udp(&mesh.near, vip, 80);
        assert!(ask(&socket).ends_with(&own));
        // An entry that somebody made goes on; another life of the program knows nothing of it.
        clients[0] = InstalledClient::default();
        clients[0].apply(&mesh.near, &plan).unwrap();
        assert!(ask(&socket).ends_with(&own));
    }
    // A member that left while nobody of ours ran.
    let sockets: Vec<_> = (0..4).map(|_| udp(&mesh.near, "10.0.9.77", 80)).collect();
    let by_udp: BTreeSet<_> = sockets.iter().map(ask).collect();
    assert_eq!(by_udp.len(), 2, "{by_udp:?}");
    mesh.member(12, None);
    let plan = mesh.services.client_plan(&BTreeSet::from([vni]), 5);
    clients[0] = InstalledClient::default();
    clients[0].apply(&mesh.near, &plan).unwrap();
    let subnets = ["10.0.9.0/24", "fd09::/64"].map(|subnet| subnet.parse().unwrap());
    clients[0]
        .purge_unknown(&mesh.near, &subnets.into())
        .unwrap();
    for socket in &sockets {
        assert!(ask(socket).starts_with("far"));
    }
    // The table is somebody else's to remove, too: the next change makes it anew.
    sh(&mesh.near, "nft delete table inet towline");
    mesh.member(12, Some(true));
    let plan = mesh.services.client_plan(&BTreeSet::from([vni]), 5);
    clients[0].apply(&mesh.near, &plan).unwrap();
    let own = Endpoint::new(VNI, 12).ip().to_string();
    assert_eq!(shares(&mesh.near, "10.0.9.77", 80, 4, &own), halves(2));
}

fn what_nobody_serves_is_refused_and_what_is_removed_leaves_nothing(setup: Setup) {
    let mut mesh = Mesh::new(setup);
    mesh.define(service(vec![
        published(Protocol::Tcp, 8080, 80),
        published(Protocol::Udp, 8080, 80),
    ]));
    mesh.member(11, Some(false));
    mesh.member(12, Some(false));
    mesh.apply();
    let vni = vtep::Vni::new(VNI).unwrap();
    let networks = BTreeSet::from([vni]);
    let mut client = InstalledClient::default();
    let plan = mesh.services.client_plan(&networks, 5);
    client.apply(&mesh.user, &plan).unwrap();
    let refused = |from: &Netns, ip: &str, port| {
        let begun = Instant::now();
        let error = connect(from, ip, port).expect_err("nobody serves it");
        assert_eq!(
            error.kind(),
            std::io::ErrorKind::ConnectionRefused,
            "{ip}:{port}: {error}"
        );
        assert!(begun.elapsed() < PATIENCE / 2, "{ip}:{port}");
        let socket = udp(from, ip, port);
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send(b"who").ok();
        let error = socket.recv(&mut [0; 10]).expect_err("nobody serves it");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{ip}");
    };
    // Even where a program of the host has the port, so as to hold it.
    let holder = mesh.pair.a.run(|| UdpSocket::bind("[::]:8080")).unwrap();
    for ip in HOST_A {
        refused(&mesh.client, ip, 8080);
        refused(&mesh.pair.a, ip, 8080);
    }
    drop(holder);
    for vip in ["10.0.9.77", "fd09::77"] {
        refused(&mesh.user, vip, 80);
    }
    mesh.member(11, Some(true));
    mesh.apply();
    let plan = mesh.services.client_plan(&networks, 5);
    client.apply(&mesh.user, &plan).unwrap();
    let (_open, ..) = connect(&mesh.client, HOST_A[0], 8080).unwrap();
    let (_other, ..) = connect(&mesh.user, "10.0.9.77", 80).unwrap();
    // The service is removed.
    mesh.services.services(vni, Vec::new());
    let plan = mesh.services.entry_plan(vni, &EntryHost::default());
    mesh.entry.apply(&mesh.pair.a, &plan).unwrap();
    client.remove(&mesh.user).unwrap();
    for (netns, installed) in [&mesh.near, &mesh.far].into_iter().zip(&mut mesh.members) {
        installed.remove(netns).unwrap();
    }
    for netns in [&*mesh.pair.a, &*mesh.user, &*mesh.near, &*mesh.far] {
        assert_eq!(sh(netns, "nft list ruleset"), "", "{netns}");
        for family in ["-4", "-6"] {
            let rules = sh(netns, &format!("ip {family} rule"));
            assert!(!rules.contains("4789"), "{netns}: {rules}");
        }
    }
    for (netns, port) in [
        (&*mesh.pair.a, "dport=8080 "),
        (&*mesh.user, "dst=10.0.9.77 "),
    ] {
        let entries = sh(netns, "cat /proc/net/nf_conntrack");
        assert!(!entries.contains(port), "{netns}: {entries}");
    }
    // Removing what is not there is fine.
    InstalledEntry::default().remove(&mesh.pair.a).unwrap();
    InstalledClient::default().remove(&mesh.user).unwrap();
    InstalledMember::default().remove(&mesh.near).unwrap();
}
