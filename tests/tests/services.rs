//! Services on whole hosts: the ways of connections to members, what members see, and what is left when it is over.
//!
//! ```text
//!   client (192.0.2.254, the switch) ──▶ any host:8080 ──▶ any member, on any host
//! ```
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use netns::conntrack::{Connection, Filter};
use netns::{NetfilterSocket, Netns};
use serde_json::Value;
use towline_tests::packet::PacketSocket;
use towline_tests::service::{ANSWER_LIMIT, Asking, Server, ask, ask_udp, shares};
use towline_tests::web::{CHECKED, CLIENT, LIMIT, Web, connect};
use towline_tests::{sh, try_sh, wait_until};

#[test]
fn every_host_hands_connections_to_all_members_evenly_and_they_see_the_client() {
    const COUNT: usize = 3000;
    let mut web = Web::new(3, &[], CHECKED);
    let names: Vec<String> = (0..6)
        .map(|index| web.add(index % 3, &format!("m{index}")))
        .collect();
    web.wait_serving(&[0, 1, 2], 6);
    for host in 0..3 {
        for (port, client) in web.ports(host).into_iter().zip(CLIENT) {
            let (shares, clients) = shares(web.client(), port, COUNT, 8);
            let even = COUNT / 8 * 8 / 6;
            for name in &names {
                let share = shares.get(name).copied().unwrap_or(0);
                assert!(
                    share.abs_diff(even) <= even / 50,
                    "{port}: {name} got {share} of {COUNT}: {shares:?}"
                );
            }
            assert_eq!(clients, [client.parse::<IpAddr>().unwrap()], "{port}");
        }
    }
}

#[test]
fn one_client_port_may_reach_a_member_through_several_hosts_at_once() {
    let mut web = Web::new(3, &[], "--publish 8053:53/udp");
    let name = web.add(1, "m1");
    let ips = web.ingress_of(&name);
    let member = Netns::open(&name).unwrap();
    let _udp = Server::udp(&member, &name, &ips, 53);
    web.wait_serving(&[0, 1, 2], 1);
    for (family, expected) in CLIENT.into_iter().enumerate() {
        let targets = [0, 1, 2].map(|host| web.ports(host)[family]);
        let first = web.connect(&targets[..1]).remove(0);
        let port = first.local().port();
        let connect = |&target| Asking::connect_from(port, target, ANSWER_LIMIT).unwrap();
        let others = || targets[1..].iter().map(connect).collect::<Vec<_>>();
        let mut open = web.client().run(others).unwrap();
        open.insert(0, first);
        for asking in open.iter_mut().rev() {
            assert_eq!(asking.local().port(), port);
            let answer = asking.ask().unwrap();
            assert_eq!(answer.member, name);
            assert_eq!(answer.client.to_string(), expected);
        }
        drop(open);
        // One after the other, while what was closed has not ended at the member.
        let one_by_one = || {
            let mut port = 0;
            for target in targets {
                let mut asking = Asking::connect_from(port, target, ANSWER_LIMIT).unwrap();
                asking.ask().unwrap();
                port = asking.local().port();
            }
        };
        for _ in 0..20 {
            web.client().run(one_by_one).unwrap();
        }
        let answers = web.client().run(|| {
            let socket = std::net::UdpSocket::bind((CLIENT[family], 0)).unwrap();
            socket.set_read_timeout(Some(ANSWER_LIMIT)).unwrap();
            for target in targets {
                socket.send_to(b"?\n", (target.ip(), 8053)).unwrap();
            }
            let mut buffer = [0; 256];
            targets.map(|_| socket.recv_from(&mut buffer).unwrap().1.ip())
        });
        let mut answered = answers.unwrap();
        answered.sort();
        assert_eq!(answered, targets.map(|target| target.ip()));
    }
}

#[test]
fn a_virtual_address_a_members_own_service_and_localhost() {
    let mut web = Web::new(
        2,
        &[],
        &format!("{CHECKED} --publish 8080:80/udp --idle-timeout 1h"),
    );
    let names = [0, 1].map(|host| web.add(host, &format!("m{host}")));
    web.wait_serving(&[0, 1], 2);
    let inside = web.add_client(1, "client");
    for vip in web.vips() {
        sh(&inside, &format!("ping -c 1 -W 10 {}", vip.ip()));
        let (answered, clients) = shares(&inside, vip, 200, 4);
        for name in &names {
            assert_eq!(answered.get(name), Some(&100), "{vip}: {answered:?}");
        }
        let own = sh(&inside, "ip -o address show dev eth0 scope global");
        assert!(own.contains(&clients[0].to_string()), "{clients:?}: {own}");
        // A member calls its own service, and sometimes itself.
        let member = &web.members[&names[0]].netns;
        let (answered, _) = shares(member, vip, 40, 2);
        assert_eq!(answered.len(), 2, "{vip}: {answered:?}");
    }
    // A host's own port, by its own address and by `localhost`; a container's by its host's.
    for (host, name) in names.iter().enumerate() {
        let own = web.ports(host);
        let localhost = ["127.0.0.1:8080", "[::1]:8080"].map(|at| at.parse().unwrap());
        for target in own.into_iter().chain(localhost) {
            let answer = web.cluster.hosts[host]
                .netns
                .run(|| ask(target, ANSWER_LIMIT))
                .unwrap();
            assert!(answer.is_ok(), "{target} on host {host}: {answer:?}");
            if !target.ip().is_loopback() {
                let member = &web.members[name].netns;
                let answer = member.run(|| ask(target, ANSWER_LIMIT)).unwrap();
                assert!(answer.is_ok(), "{target} from a member: {answer:?}");
            }
        }
    }
    // A datagram's flow stays with its member.
    let servers: Vec<Server> = names
        .iter()
        .map(|name| {
            let ips = web.ingress_of(name);
            assert_eq!(ips.len(), 2, "{name}: {ips:?}");
            Server::udp(&web.members[name].netns, name, &ips, 80)
        })
        .collect();
    for (port, client) in web.ports(0).into_iter().zip(CLIENT) {
        let answers: Vec<_> = (0..4)
            .map(|_| {
                web.client()
                    .run(|| ask_udp(port, ANSWER_LIMIT))
                    .unwrap()
                    .unwrap()
            })
            .collect();
        for name in &names {
            let share = answers
                .iter()
                .filter(|answer| answer.member == *name)
                .count();
            assert_eq!(share, 2, "{port}: {answers:?}");
        }
        assert!(
            answers
                .iter()
                .all(|answer| answer.client.to_string() == client)
        );
    }
    nothing_else_comes_to_the_client(&web);
    drop(servers);
    idle_connections_last(&web, &inside);
}

/// A capture at the client: what comes to it while it asks comes from whom it asked, and from nobody else.
fn nothing_else_comes_to_the_client(web: &Web) {
    let capture = PacketSocket::open(web.client(), "br0");
    let targets = web.ports_of(&[0, 1]);
    for &target in &targets {
        for _ in 0..4 {
            let asks = || (ask(target, ANSWER_LIMIT), ask_udp(target, ANSWER_LIMIT));
            let (tcp, udp) = web.client().run(asks).unwrap();
            assert!(tcp.is_ok() && udp.is_ok(), "{target}: {tcp:?}, {udp:?}");
        }
    }
    let mut answers: BTreeMap<SocketAddr, usize> = BTreeMap::new();
    // What goes astray comes no later than the answer it should have been.
    while let Some(frame) = capture.recv(Duration::from_millis(300)) {
        match sender(&frame) {
            Sender::Neighbor(ip) => assert!(is_of_the_underlay(ip), "{ip} is a neighbour"),
            Sender::Answer(from) => *answers.entry(from).or_default() += 1,
            Sender::Stray(what) => panic!("the client got {what}"),
        }
    }
    for target in &targets {
        // The handshake, the answer and the end of each connection, and the answer of each datagram.
        let count = answers.remove(target).unwrap_or_default();
        assert!(count >= 4 * 4, "{count} packets from {target}");
    }
    assert!(answers.is_empty(), "nobody asked {answers:?}");
}

/// Where a frame says that it comes from.
enum Sender {
    /// ARP, and what else neighbours say to each other.
    Neighbor(IpAddr),
    /// TCP and UDP to one address.
    Answer(SocketAddr),
    /// None of these.
    Stray(String),
}

fn sender(frame: &[u8]) -> Sender {
    let stray = || Sender::Stray(format!("{frame:02x?}"));
    let Ok(sliced) = SlicedPacket::from_ethernet(frame) else {
        return stray();
    };
    let (source, destination): (IpAddr, IpAddr) = match &sliced.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
            )
        }
        Some(NetSlice::Ipv6(ip)) => {
            let header = ip.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
            )
        }
        // RFC 826: the sender's address stands at byte 14 of the packet.
        Some(NetSlice::Arp(_)) => match frame[28..].first_chunk::<4>() {
            Some(octets) => return Sender::Neighbor((*octets).into()),
            None => return stray(),
        },
        None => return stray(),
    };
    match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => Sender::Answer((source, tcp.source_port()).into()),
        Some(TransportSlice::Udp(udp)) => Sender::Answer((source, udp.source_port()).into()),
        // Neighbour discovery (RFC 4861).
        Some(TransportSlice::Icmpv6(icmp)) if (133..=137).contains(&icmp.type_u8()) => {
            Sender::Neighbor(source)
        }
        // Who listens to which group.
        _ if destination.is_multicast() => Sender::Neighbor(source),
        _ => stray(),
    }
}

/// Whether an address is one that hosts have on the link to the client.
fn is_of_the_underlay(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets().starts_with(&[192, 0, 2]),
        IpAddr::V6(ip) => {
            ip.is_unspecified()
                || ip.is_unicast_link_local()
                || ip.segments().starts_with(&[0x2001, 0xdb8, 2, 0])
        }
    }
}

/// The kernel's own clock of each connection on its way, wherever it is remembered: set, and set anew by what is sent.
fn idle_connections_last(web: &Web, client: &Netns) {
    let entry = &web.cluster.hosts[0].netns;
    for mut asking in web.connect(&web.ports_of(&[0])) {
        let member = asking.ask().unwrap().member;
        clock_is_set(entry, &mut asking, |_| true);
        // It has another connection table, in which the client's address is that of the first packet too.
        let ingress = web.ingress_of(&member);
        clock_is_set(&web.members[&member].netns, &mut asking, |connection| {
            ingress.contains(&connection.original.destination)
        });
    }
    for mut asking in connect(client, &web.vips()) {
        asking.ask().unwrap();
        clock_is_set(client, &mut asking, |_| true);
    }
}

/// A connection stays for an hour in the table of `netns`, from each question on.
fn clock_is_set(netns: &Netns, asking: &mut Asking, is_meant: impl Fn(&Connection) -> bool) {
    let local = asking.local();
    let found = || {
        let mut socket = NetfilterSocket::open(netns).unwrap();
        let filter = Filter::new().original_source(local.ip().to_canonical());
        let found = socket.connections(&filter).unwrap();
        let mut own = found.into_iter().filter(|connection| {
            connection.original.source_port == local.port() && is_meant(connection)
        });
        let own = own.next();
        (
            socket,
            own.unwrap_or_else(|| panic!("{local} is unknown in {netns}")),
        )
    };
    let hour = Duration::from_secs(3600);
    // Only once the answer is acknowledged: until then the kernel gives it no more than five minutes.
    let is_set = || (hour - LIMIT..=hour).contains(&found().1.timeout);
    wait_until("set", LIMIT, is_set);
    // As if nearly the hour had passed.
    let (mut socket, connection) = found();
    socket.set_timeout(&connection, LIMIT).unwrap();
    asking.ask().unwrap();
    wait_until("set anew", LIMIT, is_set);
}

#[test]
fn nothing_is_left_of_a_service_and_of_a_host_that_leaves() {
    let mut web = Web::new(2, &[], "");
    let names = [0, 1].map(|host| web.add(host, &format!("m{host}")));
    web.wait_serving(&[0, 1], 2);
    for target in web.ports_of(&[0, 1]) {
        let (shares, _) = shares(web.client(), target, 10, 1);
        assert_eq!(shares.len(), 2);
    }
    let ingress = [0, 1].map(|host| web.ingress_of(&names[host])).concat();
    assert_eq!(ingress.len(), 4, "{ingress:?}");
    for (host, name) in names.iter().enumerate() {
        let places = [&web.cluster.hosts[host].netns, &web.members[name].netns];
        assert!(places.iter().all(|netns| remembered(netns, &ingress) > 0));
    }
    web.cluster.hosts[1].ok("service rm web");
    for (host, name) in names.iter().enumerate() {
        let member = &web.members[name].netns;
        let left = || {
            let host = &web.cluster.hosts[host].netns;
            let mut left = vec![
                ("the host's rules", !traces(host).is_empty()),
                ("rules", of_services(member) > 0),
                ("the host's connections", remembered(host, &ingress) > 0),
                ("connections", remembered(member, &ingress) > 0),
            ];
            let of_table = [
                ("ip rule", " 4789"),
                ("ip -6 rule", " 4789"),
                ("ip route show table all", " 4789"),
                ("ip -6 route show table all", " 4789"),
                ("ip -o address", " ingress"),
            ];
            left.extend(of_table.map(|(what, word)| (what, sh(member, what).contains(word))));
            left.retain(|(_, is_there)| *is_there);
            left
        };
        wait_until("nothing is left in the kernel", LIMIT, || left().is_empty());
        // They run on.
        wait_until("nobody is a member", LIMIT, || {
            let listed = web.cluster.hosts[host].json("ps --json");
            listed[0]["state"] == "running" && listed[0]["service"] == Value::Null
        });
    }
    let mut servers = std::mem::take(&mut web.members);
    servers.clear();
    for host in [1, 0] {
        let host = &web.cluster.hosts[host];
        host.ok("leave --force");
        for (command, word) in [
            ("nft list ruleset", "towline"),
            ("ip -o link", "towline"),
            ("ip rule", "4789"),
            ("ip -6 rule", "4789"),
            ("ip route show table all", "towline"),
            ("ip -6 route show table all", "towline"),
            ("ip -o address", "towline"),
        ] {
            let left = sh(&host.netns, command);
            assert!(!left.contains(word), "{command}: {left}");
        }
    }
}

/// How many connections a namespace remembers that lead to one of these addresses.
fn remembered(netns: &Netns, members: &[IpAddr]) -> usize {
    let mut socket = NetfilterSocket::open(netns).unwrap();
    let found = socket.connections(&Filter::new()).unwrap();
    let to_members = found
        .iter()
        .filter(|connection| members.contains(&connection.reply.source));
    to_members.count()
}

/// How many tables of services a container has; that of names it has always.
fn of_services(container: &Netns) -> usize {
    let tables = sh(container, "nft list tables");
    let ours = tables.lines().filter(|line| line.contains("towline"));
    ours.filter(|line| !line.ends_with("towline-names")).count()
}

/// What there is of services on a host: its table for published ports, without counters.
fn traces(host: &Netns) -> String {
    let tables = sh(host, "nft list tables");
    tables
        .lines()
        .filter(|line| line.contains("towline-ingress"))
        .map(|_| {
            // It may go meanwhile.
            let table = try_sh(host, "nft list table inet towline-ingress").stdout;
            let table = String::from_utf8_lossy(&table).into_owned();
            table
                .lines()
                .filter(|line| line.contains("publish-"))
                .collect::<String>()
        })
        .collect()
}
