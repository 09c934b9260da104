//! Networks that change while containers run, on whole hosts: interfaces, default routes and connections of containers that are
//! connected and disconnected, the gateway bridge, and what people may ask of it.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use netns::Netns;
use serde_json::Value;
use towline_tests::cluster::{Cluster, Host};
use towline_tests::service::{ANSWER_LIMIT, Asking, Load, Server, ask, none_failed};
use towline_tests::{sh, try_sh, wait_until};

const LIMIT: Duration = Duration::from_secs(30);
/// The outside: the router's address.
const OUTSIDE: &str = "192.0.2.254";
const FAILED: i32 = 1;

/// Three hosts, two networks that lead outside and one that does not.
fn cluster() -> Cluster {
    let cluster = Cluster::joined(3, &[]);
    let manager = &cluster.hosts[0];
    manager.ok("network create --subnet 10.0.9.0/24 --subnet fd00:9::/64 one");
    manager.ok("network create --subnet 10.0.8.0/24 --label tier=back two");
    manager.ok("network create --subnet 10.0.7.0/24 --internal inside");
    cluster
}

fn run(cluster: &Cluster, host: usize, name: &str, options: &str) -> (String, Netns) {
    let name = cluster.container(name);
    cluster.hosts[host].ok(&format!("run -d --name {name} {options} -- sleep infinity"));
    let netns = Netns::open(&name).unwrap();
    (name, netns)
}

/// A container's interfaces, each with its IPv4 network: `eth0=10.0.9`, `eth1=gw`.
fn interfaces(netns: &Netns) -> Vec<String> {
    let links = sh(netns, "ip -4 -o addr show");
    let mut found: Vec<String> = links
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let (name, _, address) = (words.next()?, words.next()?, words.next()?);
            let net = address.rsplit_once('.')?.0;
            let net = if net.starts_with("172.") { "gw" } else { net };
            (name != "lo").then(|| format!("{name}={net}"))
        })
        .collect();
    found.sort();
    found
}

/// The interfaces of the default routes, IPv4 and IPv6.
fn default_routes(netns: &Netns) -> [String; 2] {
    ["-4", "-6"].map(|family| {
        let routes = sh(netns, &format!("ip {family} route show default"));
        let dev = routes.split(" dev ").nth(1).unwrap_or_default();
        dev.split_whitespace().next().unwrap_or_default().to_owned()
    })
}

/// What a host says of its connection to a manager.
fn control(host: &Host) -> Value {
    host.json("status --json")["cluster"]["control"].clone()
}

fn address(host: &Host, container: &str, network: &str) -> IpAddr {
    let all = host.json("ps --json");
    let found = all
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["name"] == container);
    let places = found.unwrap()["endpoints"].as_array().unwrap().clone();
    let place = places.into_iter().find(|place| place["network"] == network);
    place.unwrap()["ips"][0].as_str().unwrap().parse().unwrap()
}

fn reaches(netns: &Netns, to: impl std::fmt::Display) -> bool {
    try_sh(netns, &format!("ping -n -c 1 -W 1 {to}"))
        .status
        .success()
}

fn wait_reaches(netns: &Netns, to: impl std::fmt::Display) {
    let what = format!("{to} is reached");
    wait_until(&what, LIMIT, || reaches(netns, &to));
}

#[test]
fn interfaces_come_and_go_and_all_other_connections_stay() {
    let cluster = cluster();
    let [one, two, three] = &cluster.hosts[..] else {
        panic!("three hosts")
    };
    let (c1, netns) = run(&cluster, 0, "c1", "--network one");
    let (p1, peer1) = run(&cluster, 1, "p1", "--network one --network two");
    let (p2, peer2) = run(&cluster, 2, "p2", "--network inside");
    assert_eq!(interfaces(&netns), ["eth0=10.0.9", "eth1=gw"]);
    assert_eq!(interfaces(&peer2), ["eth0=10.0.7"], "internal alone");
    assert_eq!(default_routes(&peer2), ["", ""]);
    assert!(!reaches(&peer2, OUTSIDE));
    let _servers = [Server::tcp(&peer1, &p1, 80), Server::tcp(&peer2, &p2, 80)];

    // Under traffic: one connection that stays open, and new ones again and again.
    let on_one = SocketAddr::new(address(two, &p1, "one"), 80);
    wait_reaches(&netns, on_one.ip());
    let mut first = netns
        .run(|| Asking::connect(on_one, ANSWER_LIMIT).unwrap())
        .unwrap();
    let started = Instant::now();
    let load = Load::start(&netns, &[on_one], ANSWER_LIMIT);
    one.ok(&format!("network connect two {c1}"));
    assert_eq!(
        interfaces(&netns),
        ["eth0=10.0.9", "eth1=gw", "eth2=10.0.8"]
    );
    assert_eq!(default_routes(&netns), ["eth1", "eth1"]);
    let on_two = SocketAddr::new(address(two, &p1, "two"), 80);
    wait_reaches(&netns, on_two.ip());
    one.ok(&format!("network connect --ip 10.0.7.77 inside {c1}"));
    assert_eq!(address(one, &c1, "inside").to_string(), "10.0.7.77");
    wait_reaches(&peer2, "10.0.7.77");
    assert_eq!(default_routes(&netns), ["eth1", "eth1"]);
    one.ok(&format!("network disconnect two {c1}"));
    one.ok(&format!("network connect two {c1}"));
    assert_eq!(
        interfaces(&netns),
        ["eth0=10.0.9", "eth1=gw", "eth2=10.0.8", "eth3=10.0.7"],
        "the lowest name that is free"
    );
    assert_eq!(first.ask().unwrap().member, p1);
    none_failed(&load.stop(), started, "while other networks came and went");

    // A connection over the other network, while the first goes.
    wait_reaches(&netns, on_two.ip());
    let mut second = netns
        .run(|| Asking::connect(on_two, ANSWER_LIMIT).unwrap())
        .unwrap();
    one.ok(&format!("network disconnect one {c1}"));
    assert_eq!(
        interfaces(&netns),
        ["eth1=gw", "eth2=10.0.8", "eth3=10.0.7"]
    );
    assert_eq!(default_routes(&netns), ["eth1", "eth1"]);
    assert!(!reaches(&netns, on_one.ip()));
    assert_eq!(second.ask().unwrap().member, p1);

    // With the last network that leads outside goes the way there, and all else stays.
    let inward = SocketAddr::new(address(three, &p2, "inside"), 80);
    wait_reaches(&netns, inward.ip());
    let mut third = netns
        .run(|| Asking::connect(inward, ANSWER_LIMIT).unwrap())
        .unwrap();
    assert!(reaches(&netns, OUTSIDE));
    one.ok(&format!("network disconnect two {c1}"));
    assert_eq!(interfaces(&netns), ["eth3=10.0.7"]);
    assert_eq!(default_routes(&netns), ["", ""]);
    assert!(!reaches(&netns, OUTSIDE));
    assert_eq!(third.ask().unwrap().member, p2);
    one.ok(&format!("network connect one {c1}"));
    assert_eq!(
        interfaces(&netns),
        ["eth0=10.0.9", "eth1=gw", "eth3=10.0.7"]
    );
    assert_eq!(default_routes(&netns), ["eth1", "eth1"]);
    wait_reaches(&netns, OUTSIDE);
    assert_eq!(third.ask().unwrap().member, p2);
    // Every host's tables are as the manager's.
    one.ok("verify");
    // What was disconnected is nobody's any more.
    let details = one.json("network inspect two");
    let held = details[0]["endpoints"].as_array().unwrap();
    assert!(held.iter().all(|held| held["container"] != *c1), "{held:?}");
}

#[test]
fn a_way_out_comes_and_goes_with_the_networks_and_so_do_published_ports() {
    let cluster = cluster();
    let host = &cluster.hosts[0];
    let port = SocketAddr::new(IpAddr::from(host.address), 8081);
    let c1 = cluster.container("c1");
    let started = host.towline(&format!(
        "run -d --name {c1} --network inside -p 8081:80 -- sleep infinity"
    ));
    let said = String::from_utf8_lossy(&started.stderr).into_owned();
    assert!(
        started.status.success() && said.contains("closed"),
        "{said}"
    );
    let netns = Netns::open(&c1).unwrap();
    assert_eq!(interfaces(&netns), ["eth0=10.0.7"]);
    let _server = Server::tcp(&netns, &c1, 80);
    let answers = || {
        let asked = cluster.switch.run(|| ask(port, Duration::from_secs(1)));
        asked.unwrap().is_ok()
    };
    assert!(!answers());
    host.ok(&format!("network connect one {c1}"));
    wait_until("the port opens", LIMIT, answers);
    let disconnected = host.towline(&format!("network disconnect one {c1}"));
    let said = String::from_utf8_lossy(&disconnected.stderr).into_owned();
    assert!(
        disconnected.status.success() && said.contains("closed"),
        "{said}"
    );
    assert!(!answers());
    // Whose way out is its own keeps it: it was started without a network.
    let (c2, netns) = run(&cluster, 0, "c2", "");
    assert_eq!(interfaces(&netns), ["eth0=gw"]);
    host.ok(&format!("network connect inside {c2}"));
    host.ok(&format!("network connect one {c2}"));
    host.ok(&format!("network disconnect one {c2}"));
    assert_eq!(interfaces(&netns), ["eth0=gw", "eth1=10.0.7"]);
    host.ok(&format!("network disconnect inside {c2}"));
    assert_eq!(interfaces(&netns), ["eth0=gw"]);
    assert_eq!(default_routes(&netns), ["eth0", "eth0"]);
}

#[test]
fn services_follow_a_container_to_its_networks_and_members_are_drained() {
    let cluster = cluster();
    let [one, two, ..] = &cluster.hosts[..] else {
        panic!("three hosts")
    };
    one.ok("service create --name web --network two --publish 8080:80 --drain-timeout 1s");
    let vip = one.json("service inspect web")[0]["vips"][0]
        .as_str()
        .unwrap()
        .parse()
        .map(|ip: IpAddr| SocketAddr::new(ip, 80))
        .unwrap();
    let (m1, member1) = run(&cluster, 0, "m1", "--service web --network one");
    let (m2, member2) = run(&cluster, 1, "m2", "--service web");
    let _servers = [
        Server::tcp(&member1, &m1, 80),
        Server::tcp(&member2, &m2, 80),
    ];
    let (c1, netns) = run(&cluster, 0, "c1", "--network one");
    let asks = || netns.run(|| ask(vip, Duration::from_secs(1))).unwrap();
    assert!(asks().is_err());
    one.ok(&format!("network connect two {c1}"));
    wait_until("the service answers on its network", LIMIT, || {
        asks().is_ok()
    });
    let rules = |netns: &Netns| sh(netns, "nft list ruleset").contains(&vip.ip().to_string());
    assert!(rules(&netns));
    one.ok(&format!("network disconnect two {c1}"));
    assert!(!rules(&netns), "rules of a network that is gone");

    // A member on an internal network is reached from outside, and reaches nobody there.
    one.ok("service create --name inner --network inside --publish 8090:80");
    let (m3, member3) = run(&cluster, 2, "m3", "--service inner");
    let _inner = Server::tcp(&member3, &m3, 80);
    assert_eq!(default_routes(&member3), ["", ""]);
    let published = SocketAddr::new(IpAddr::from(one.address), 8090);
    wait_until("the internal member answers", LIMIT, || {
        let asked = cluster
            .switch
            .run(|| ask(published, Duration::from_secs(1)));
        asked.unwrap().is_ok()
    });
    assert!(!reaches(&member3, OUTSIDE));

    // A member is not torn out of its service by mistake; asked for, it is drained.
    one.refused(
        &format!("network disconnect two {m1}"),
        FAILED,
        &["is a member of service web", "towline rm", "disconnect -f"],
    );
    one.refused(
        &format!("network disconnect ingress {m1}"),
        FAILED,
        &["by its service"],
    );
    let outside = [one, two].map(|host| SocketAddr::new(IpAddr::from(host.address), 8080));
    let members = |host: &Host| {
        let details = host.json("service inspect web");
        let members = details[0]["members"].as_array().unwrap().clone();
        let names = members
            .iter()
            .map(|member| member["container"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    wait_until("both serve", LIMIT, || {
        let serving = |host: &Host| {
            let status = host.json("status --json");
            let services = status["cluster"]["services"].as_array().unwrap().clone();
            services.iter().any(|service| service["serving"] == 2)
        };
        serving(one) && serving(two)
    });
    let load = Load::start(&cluster.switch, &outside, ANSWER_LIMIT);
    let began = Instant::now();
    one.ok(&format!("network disconnect -f two {m1}"));
    assert_eq!(members(one), [m2.as_str()]);
    none_failed(&load.stop(), began, "while a member was taken out");
    assert_eq!(interfaces(&member1), ["eth1=10.0.9", "eth2=gw"]);
    assert!(!sh(&member1, "ip -o link").contains("ingress"));
    // It runs on, and on its other network it is reached.
    let on_one = SocketAddr::new(address(one, &m1, "one"), 80);
    wait_until("its other network carries on", LIMIT, || {
        netns
            .run(|| ask(on_one, Duration::from_secs(1)))
            .unwrap()
            .is_ok()
    });
}

#[test]
fn networks_change_while_no_manager_answers() {
    let mut cluster = cluster();
    let (p1, peer) = run(&cluster, 2, "p1", "--network one");
    let (c1, netns) = run(&cluster, 1, "c1", "--network two");
    // This host takes part in the network, and so has addresses that it was leased ahead.
    let (other, _) = run(&cluster, 1, "other", "--network one");
    let leased = |host: &Host| {
        let known = control(host)["subscriptions"].as_array().unwrap().clone();
        known
            .iter()
            .any(|known| known["name"] == "one" && !known["leased"].as_array().unwrap().is_empty())
    };
    wait_until("addresses are leased ahead", LIMIT, || {
        leased(&cluster.hosts[1])
    });
    cluster.hosts[0].kill_agent();
    let host = &cluster.hosts[1];
    wait_until("the manager is missed", LIMIT, || {
        control(host)["connected_to"].is_null()
    });
    let connected = host.towline(&format!("network connect one {c1}"));
    let said = String::from_utf8_lossy(&connected.stderr).into_owned();
    assert!(
        connected.status.success() && said.contains("leased"),
        "{said}"
    );
    assert_eq!(
        interfaces(&netns),
        ["eth0=10.0.8", "eth1=gw", "eth2=10.0.9"]
    );
    // Between containers of this host at once; other hosts hear of it from the manager.
    wait_reaches(&netns, address(host, &other, "one"));
    host.ok(&format!("network disconnect two {c1}"));
    assert_eq!(interfaces(&netns), ["eth1=gw", "eth2=10.0.9"]);
    host.refused(
        &format!("network connect inside {c1}"),
        FAILED,
        &[
            "no container of this host is on a network",
            "no manager answers",
        ],
    );
    cluster.hosts[0].start_agent();
    let [one, two, three] = &cluster.hosts[..] else {
        panic!("three hosts")
    };
    wait_until("the manager knows what has changed", LIMIT, || {
        let held = |network: &str| {
            let details = one.json(&format!("network inspect {network}"));
            let endpoints = details[0]["endpoints"].as_array().unwrap().clone();
            endpoints.iter().any(|held| held["container"] == *c1)
        };
        held("one") && !held("two")
    });
    wait_reaches(&peer, address(two, &c1, "one"));
    wait_reaches(&netns, address(three, &p1, "one"));
}

#[test]
fn the_gateway_bridge_has_the_subnets_it_is_given_and_another_only_while_it_is_idle() {
    let subnets = [
        "--gwbridge-subnet",
        "10.55.0.0/24",
        "--gwbridge-subnet-ipv6",
        "fd55::/64",
    ];
    let mut cluster = Cluster::start(1, &["--gwbridge-subnet", "192.0.2.0/25"]);
    let host = &mut cluster.hosts[0];
    host.refused(
        "init",
        FAILED,
        &["192.0.2.0/25", "route to 192.0.2.0/24", "choose another"],
    );
    host.kill_agent();
    host.set_agent_options(&subnets);
    host.start_agent();
    host.ok("init");
    host.ok("network create --subnet 10.0.9.0/24 one");
    // A container could not tell such a network from its way out.
    let pools = sh(&host.netns, "ip -4 route show dev towline_gwbr");
    assert!(pools.contains("10.55.0.0/24"), "{pools}");
    host.refused(
        "network create --subnet 10.55.0.0/25 wrong",
        FAILED,
        &["10.55.0.0/24"],
    );
    let (c1, netns) = run(&cluster, 0, "c1", "--network one");
    let host = &mut cluster.hosts[0];
    let addresses = sh(&netns, "ip -o addr show dev eth1");
    assert!(
        addresses.contains("10.55.0.2/24") && addresses.contains("fd55::2/64"),
        "{addresses}"
    );
    for outside in [OUTSIDE, "2001:db8:2::fe"] {
        wait_reaches(&netns, outside);
    }
    // The outside has no way to those addresses: it answered the host's own.
    for family in ["-4", "-6"] {
        let routes = sh(&cluster.switch, &format!("ip {family} route"));
        assert!(
            !routes.contains("10.55.") && !routes.contains("fd55"),
            "{routes}"
        );
    }

    // Another subnet, while a container is there and once none is.
    host.kill_agent();
    host.set_agent_options(&[]);
    host.start_agent();
    assert!(sh(&host.netns, "ip addr show dev towline_gwbr").contains("10.55.0.1/24"));
    host.ok(&format!("rm -f {c1}"));
    host.kill_agent();
    host.set_agent_options(&["--gwbridge-subnet", "10.56.0.0/24"]);
    host.start_agent();
    let (_, netns) = run(&cluster, 0, "c2", "--network one");
    let addresses = sh(&netns, "ip -o addr show dev eth1");
    // RFC 4193 §3.1: fd, and 40 bits of its own.
    assert!(
        addresses.contains("10.56.0.2/24") && addresses.contains(" fd"),
        "{addresses}"
    );
    for outside in [OUTSIDE, "2001:db8:2::fe"] {
        wait_reaches(&netns, outside);
    }
}
