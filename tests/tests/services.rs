//! Services on whole hosts: the ways of connections to members, what members see, and what is left when it is over.
//!
//! ```text
//!   client (192.0.2.254, the switch) ──▶ any host:8080 ──▶ any member, on any host
//! ```
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::net::IpAddr;
use std::time::Duration;

use netns::Netns;
use serde_json::Value;
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
    drop(servers);
    idle_connections_last(&web, &inside);
}

/// The kernel's own clock of each connection on its way: set, and set anew by what is sent.
fn idle_connections_last(web: &Web, client: &Netns) {
    use netns::NetfilterSocket;
    use netns::conntrack::Filter;
    let mut open = web.connect(&web.ports_of(&[0]));
    let mut by_vip = connect(client, &web.vips());
    for asking in open.iter_mut().chain(&mut by_vip) {
        asking.ask().unwrap();
    }
    let entry = &web.cluster.hosts[0].netns;
    for (netns, asking) in [(&**entry, &mut open), (client, &mut by_vip)]
        .into_iter()
        .flat_map(|(netns, askings)| askings.iter_mut().map(move |asking| (netns, asking)))
    {
        let local = asking.local();
        let timeout = || {
            let mut socket = NetfilterSocket::open(netns).unwrap();
            let filter = Filter::new().original_source(local.ip().to_canonical());
            let found = socket.connections(&filter).unwrap();
            let own = found
                .into_iter()
                .find(|connection| connection.original.source_port == local.port());
            (
                socket,
                own.unwrap_or_else(|| panic!("{local} is unknown in {netns}")),
            )
        };
        let hour = Duration::from_secs(3600);
        // Only once the answer is acknowledged: until then the kernel gives it no more than five minutes.
        let is_set = || (hour - LIMIT..=hour).contains(&timeout().1.timeout);
        wait_until("set", LIMIT, is_set);
        // As if nearly the hour had passed.
        let (mut socket, connection) = timeout();
        socket.set_timeout(&connection, LIMIT).unwrap();
        asking.ask().unwrap();
        wait_until("set anew", LIMIT, is_set);
    }
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
    web.cluster.hosts[1].ok("service rm web");
    for (host, name) in names.iter().enumerate() {
        let member = &web.members[name].netns;
        wait_until("the rules are gone", LIMIT, || {
            traces(&web.cluster.hosts[host].netns).is_empty()
                && of_services(member) == 0
                && !sh(member, "ip rule").contains("4789")
        });
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
        ] {
            let left = sh(&host.netns, command);
            assert!(!left.contains(word), "{command}: {left}");
        }
    }
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
