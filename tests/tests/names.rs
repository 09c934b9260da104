//! Names on whole hosts: what containers are answered at 127.0.0.11, and what nobody is.
//!
//! ```text
//!   container ──▶ 127.0.0.11:53 ──▶ its host's agent ──▶ 192.0.2.254, the switch: a server for the rest of the world
//! ```
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use netns::Netns;
use towline_tests::cluster::{Cluster, Host};
use towline_tests::dns::{Dig, SERVER, Upstream, dig, load, question};
use towline_tests::{sh, try_sh, wait_until};

const LIMIT: Duration = Duration::from_secs(30);
/// Where the server for the rest of the world is.
const WORLD: &str = "192.0.2.254";

/// Three hosts with networks `blue`, of both families, and `my.green`, and containers that ask the switch for the rest.
struct Named {
    cluster: Cluster,
}

impl Named {
    fn new() -> Self {
        let cluster = Cluster::joined(3, &[]);
        let manager = &cluster.hosts[0];
        manager.ok("network create --subnet 10.0.9.0/24 --subnet fd00:9::/64 blue");
        manager.ok("network create --subnet 10.0.8.0/24 --opt dns-ttl=60 my.green");
        Self { cluster }
    }

    /// Starts a container that sleeps; its name and namespace.
    fn run(&self, host: usize, name: &str, options: &str) -> (String, Netns) {
        let name = self.cluster.container(name);
        self.cluster.hosts[host].ok(&format!(
            "run -d --name {name} --dns {WORLD} {options} -- sleep infinity"
        ));
        let netns = Netns::open(&name).unwrap();
        (name, netns)
    }

    fn world(&self) -> Upstream {
        Upstream::start(&self.cluster.switch, WORLD.parse().unwrap())
    }

    /// The addresses of a container, IPv4 first.
    fn ips(&self, host: usize, name: &str, network: &str) -> Vec<String> {
        let found = self
            .host(host)
            .json(&format!("resolve {name} --network {network} --json"));
        let records = found["records"].as_array().unwrap().iter();
        records
            .map(|record| record["address"].as_str().unwrap().to_owned())
            .collect()
    }

    fn host(&self, host: usize) -> &Host {
        &self.cluster.hosts[host]
    }
}

/// Waits until a name has exactly these addresses, asked as that container asks.
fn wait_for(netns: &Netns, question: &str, expected: &[&str]) {
    let what = format!("{question} is {expected:?} in {netns}");
    let mut expected: Vec<String> = expected.iter().map(|&ip| ip.to_owned()).collect();
    expected.sort();
    wait_until(&what, LIMIT, || dig(netns, question).answers == expected);
}

fn ok(found: &Dig) -> &[String] {
    assert_eq!(found.status, "NOERROR", "{}", found.text);
    &found.answers
}

#[test]
fn every_kind_of_name_has_its_answer_and_other_networks_have_none() {
    let named = Named::new();
    let world = named.world();
    let manager = named.host(0);
    manager.ok("service create --name web --network blue --publish 8080:80");
    manager.ok("service create --name rr --network blue --endpoint-mode dnsrr");
    let (c1, asker) = named.run(0, "c1", "--network blue --network-alias db --alias API.v1");
    let (c2, _) = named.run(1, "c2", "--network blue --network-alias db");
    let (m1, _) = named.run(1, "m1", "--service web");
    let (m2, _) = named.run(2, "m2", "--service web");
    let (r1, _) = named.run(1, "r1", "--service rr");
    let (r2, _) = named.run(2, "r2", "--service rr");
    let (c3, green) = named.run(2, "c3", "--network my.green");
    let (both, on_both) = named.run(0, "both", "--network my.green --network blue");
    let vips: Vec<String> = manager.json("service inspect web")[0]["vips"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vip| vip.as_str().unwrap().to_owned())
        .collect();
    let [vip, vip6] = vips.as_slice() else {
        panic!("an address of each family: {vips:?}");
    };
    // Sees all that comes below.
    let ip = |name: &str, network: &str| named.ips(0, name, network);
    for name in [&c2, &m1, &m2, &r1, &r2] {
        wait_until("the container's name", LIMIT, || {
            ok_or_empty(&asker, name).len() == 1
        });
    }
    wait_until("two members serve", LIMIT, || {
        dig(&asker, "tasks.web A").answers.len() == 2
    });
    wait_until("two members serve", LIMIT, || {
        dig(&asker, "tasks.rr A").answers.len() == 2
    });
    let [c1_v4, c1_v6] = ip(&c1, "blue").try_into().unwrap();
    let [c2_v4, _] = ip(&c2, "blue").try_into().unwrap();
    let members: Vec<String> = [&m1, &m2]
        .iter()
        .map(|name| ip(name, "blue")[0].clone())
        .collect();
    let mut of_rr: Vec<String> = [&r1, &r2]
        .iter()
        .map(|name| ip(name, "blue")[0].clone())
        .collect();
    of_rr.sort();
    let mut of_db = vec![c1_v4.clone(), c2_v4];
    of_db.sort();
    let mut tasks = members.clone();
    tasks.sort();

    let id = manager.json("ps --json");
    let id = id
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["name"] == c1.as_str())
        .unwrap()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let upper = c1.to_uppercase();
    for (asked, expected) in [
        (format!("{c1} A"), vec![c1_v4.clone()]),
        (format!("{upper} A"), vec![c1_v4.clone()]),
        (format!("{c1} AAAA"), vec![c1_v6.clone()]),
        (format!("{c1}.blue A"), vec![c1_v4.clone()]),
        (format!("{id} A"), vec![c1_v4.clone()]),
        (format!("{id}.BLUE A"), vec![c1_v4.clone()]),
        ("db A".to_owned(), of_db),
        ("api.v1 A".to_owned(), vec![c1_v4.clone()]),
        ("api.v1.blue. AAAA".to_owned(), vec![c1_v6.clone()]),
        ("web A".to_owned(), vec![vip.clone()]),
        ("web.blue AAAA".to_owned(), vec![vip6.clone()]),
        ("tasks.web A".to_owned(), tasks.clone()),
        ("tasks.web.blue A".to_owned(), tasks),
        ("rr A".to_owned(), of_rr.clone()),
        ("tasks.rr A".to_owned(), of_rr),
        (format!("-x {c1_v4}"), vec![format!("{c1}.blue.")]),
        (format!("-x {c1_v6}"), vec![format!("{c1}.blue.")]),
        (format!("-x {vip}"), vec!["web.blue.".to_owned()]),
        // Known names without a record of that kind.
        (format!("{c1} MX"), vec![]),
        ("web TXT".to_owned(), vec![]),
        ("web SRV".to_owned(), vec![]),
        ("_81._tcp.web SRV".to_owned(), vec![]),
    ] {
        for transport in ["", "+tcp ", "+noedns "] {
            let found = dig(&asker, &format!("{transport}{asked}"));
            assert_eq!(ok(&found), expected, "{transport}{asked}: {}", found.text);
            assert!(
                found.flags.contains("qr") && found.flags.contains("ra"),
                "{}",
                found.text
            );
        }
    }
    for port in ["_80._tcp.web", "_8080._tcp.web.blue"] {
        let mut expected = [&m1, &m2].map(|name| format!("0 1 80 {name}.blue."));
        expected.sort();
        let found = dig(&asker, &format!("{port} SRV"));
        assert_eq!(ok(&found), expected, "{}", found.text);
        for member in &members {
            assert!(
                found.text.contains(member.as_str()),
                "its address is added: {}",
                found.text
            );
        }
    }
    assert_eq!(dig(&asker, &format!("{c1} A")).ttl, Some(5));
    let turns: std::collections::BTreeSet<String> = (0..8)
        .map(|_| {
            let found = try_sh(&asker, "dig +short @127.0.0.11 rr A").stdout;
            String::from_utf8_lossy(&found)
                .lines()
                .next()
                .unwrap()
                .to_owned()
        })
        .collect();
    assert_eq!(turns.len(), 2, "both members come first at some time");
    for (asked, code, said) in [
        (format!("{c1} @127.0.0.11 A"), "NOERROR", c1_v4.as_str()),
        (format!("-t {c1} @127.0.0.11 AAAA"), "NOERROR", &c1_v6),
        (format!("-x {c1_v4} @127.0.0.11"), "NOERROR", &c1),
        (
            "_80._tcp.web @127.0.0.11 SRV".to_owned(),
            "NOERROR",
            "blue.",
        ),
        ("web @127.0.0.11 TXT".to_owned(), "NOERROR", "ANSWER: 0"),
        (
            "nobody.example @127.0.0.11 A".to_owned(),
            "NXDOMAIN",
            "ANSWER: 0",
        ),
    ] {
        let drill = sh(&asker, &format!("drill {asked}"));
        assert!(
            drill.contains(&format!("rcode: {code}")) && drill.contains(said),
            "{asked}: {drill}"
        );
    }

    // Names of other networks are asked for elsewhere, and nowhere is anybody who knows them.
    for asked in [
        format!("{c3} A"),
        format!("{c3}.my.green A"),
        "nobody A".to_owned(),
    ] {
        let found = dig(&asker, &asked);
        assert_eq!(found.status, "NXDOMAIN", "{}", found.text);
    }
    assert_eq!(dig(&green, "web A").status, "NXDOMAIN");
    assert!(world.asked().contains(&"nobody".to_owned()));
    let [c3_v4] = named.ips(2, &c3, "my.green").try_into().unwrap();
    let found = dig(&on_both, &format!("{c3} A"));
    assert_eq!(
        (ok(&found), found.ttl),
        ([c3_v4.clone()].as_slice(), Some(60))
    );
    let own = dig(&on_both, &format!("{both} A"));
    assert!(
        ok(&own)[0].starts_with("10.0.8."),
        "the first network's: {}",
        own.text
    );
    let own = dig(&on_both, &format!("{both}.blue A"));
    assert!(ok(&own)[0].starts_with("10.0.9."), "{}", own.text);
    let unused = dig(&asker, "-x 10.0.9.250");
    assert_eq!(unused.status, "NXDOMAIN");
    assert!(
        !world
            .asked()
            .iter()
            .any(|name| name.starts_with("250.9.0.10")),
        "{:?}",
        world.asked()
    );

    // A host asks too, on networks of its containers and on others.
    assert_eq!(named.ips(1, &c3, "my.green"), [c3_v4.as_str()]);
    assert_eq!(
        named
            .host(2)
            .ok(&format!("resolve {c3_v4} --network my.green"))
            .trim(),
        format!("{c3}.my.green")
    );
    let srv = named
        .host(1)
        .json("resolve _80._tcp.web --network blue --json");
    assert_eq!(srv["records"].as_array().unwrap().len(), 2, "{srv}");
    assert_eq!(
        named
            .host(0)
            .ok("resolve web --network blue --type aaaa")
            .trim(),
        *vip6
    );
    named.host(0).refused(
        "resolve nobody --network blue",
        1,
        &["nobody", "blue", "network inspect"],
    );
    named
        .host(0)
        .refused("resolve web --network red", 1, &["red"]);
}

fn ok_or_empty(netns: &Netns, name: &str) -> Vec<String> {
    let found = dig(netns, &format!("{name} A"));
    if found.status == "NOERROR" {
        found.answers
    } else {
        Vec::new()
    }
}

#[test]
fn names_follow_every_change_on_every_host() {
    let mut named = Named::new();
    let _world = named.world();
    let askers: Vec<(String, Netns)> = (0..3)
        .map(|host| named.run(host, &format!("a{host}"), "--network blue"))
        .collect();
    let mut slowest = Duration::ZERO;
    let mut all_see = |start: Instant, what: &str, expected: &[&str]| {
        for (_, netns) in &askers {
            wait_for(netns, &format!("{what} A"), expected);
        }
        slowest = slowest.max(start.elapsed());
    };
    // Others come and go on the third host all the while.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for turn in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let (other, _) = named.run(2, &format!("o{turn}"), "--network blue");
                named.host(2).ok(&format!("rm -f {other}"));
            }
        });
        // What was started is there once 'run' returns; what is removed goes while 'rm' still waits for the rest.
        for turn in 0..4 {
            let host = turn % 3;
            let (one, _) = named.run(host, "one", "--network blue --network-alias shared");
            let ran = Instant::now();
            let first = named.ips(host, &one, "blue")[0].clone();
            all_see(ran, &one, &[&first]);
            let (two, _) = named.run(
                (host + 1) % 3,
                "two",
                "--network blue --network-alias shared",
            );
            let ran = Instant::now();
            let second = named.ips((host + 1) % 3, &two, "blue")[0].clone();
            all_see(ran, "shared", &[&first, &second]);
            let began = Instant::now();
            named.host(host).ok(&format!("rm -f {one}"));
            all_see(began, &one, &[]);
            all_see(began, "shared", &[&second]);
            let began = Instant::now();
            named.host((host + 1) % 3).ok(&format!("rm -f {two}"));
            all_see(began, "shared", &[]);
        }
        stop.store(true, Ordering::Relaxed);
    });
    // A service comes and goes, and its member.
    let began = Instant::now();
    named
        .host(1)
        .ok("service create --name web --network blue --endpoint-mode dnsrr");
    for (_, netns) in &askers {
        wait_until("a service without members is known", LIMIT, || {
            dig(netns, "tasks.web A").status == "NOERROR"
        });
    }
    all_see(began, "tasks.web", &[]);
    let (member, _) = named.run(2, "m", "--service web");
    let ran = Instant::now();
    let ip = named.ips(2, &member, "blue")[0].clone();
    all_see(ran, "web", &[&ip]);
    let began = Instant::now();
    named.host(2).ok(&format!("rm -f {member}"));
    all_see(began, "web", &[]);
    named.host(1).ok("service rm web");
    for (_, netns) in &askers {
        wait_until("no such name", LIMIT, || {
            dig(netns, "web A").status == "NXDOMAIN"
        });
    }
    println!(
        "the slowest of 23 changes was seen on three hosts after {slowest:?}, dig's own start included"
    );
    if std::env::var_os("TOWLINE_STRICT_TIMES").is_some_and(|value| !value.is_empty()) {
        assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    }

    // Connected while it runs, with an alias there, and taken away again: it asks on that network just as long.
    let (late, on_late) = &askers[0];
    let (other, _) = named.run(2, "green", "--network my.green");
    let there = named.ips(2, &other, "my.green")[0].clone();
    let question = format!("{other} A");
    assert_eq!(dig(on_late, &question).status, "NXDOMAIN");
    named
        .host(0)
        .ok(&format!("network connect --alias late my.green {late}"));
    wait_for(on_late, &question, &[&there]);
    let on_other = Netns::open(&other).unwrap();
    let own = named.ips(0, late, "my.green")[0].clone();
    wait_for(&on_other, "late A", &[&own]);
    named
        .host(0)
        .ok(&format!("network disconnect my.green {late}"));
    wait_for(&on_other, "late A", &[]);
    assert_eq!(dig(on_late, &question).status, "NXDOMAIN");
    wait_for(
        on_late,
        &format!("{late} A"),
        &[&named.ips(0, late, "blue")[0]],
    );

    // A host that is lost is hidden with its names, and back with them; the other hosts' names stay.
    let gone = askers[1].0.clone();
    let ip = named.ips(0, &gone, "blue")[0].clone();
    let watching = &askers[0].1;
    named.cluster.hosts[1].kill_agent();
    wait_for(watching, &format!("{gone} A"), &[]);
    assert_eq!(ok(&dig(watching, &format!("{} A", askers[2].0))).len(), 1);
    named.cluster.hosts[1].start_agent();
    wait_for(watching, &format!("{gone} A"), &[&ip]);
    wait_for(
        &askers[1].1,
        &format!("{} A", askers[0].0),
        &[&named.ips(0, &askers[0].0, "blue")[0]],
    );

    // Without any manager names stay, and a new agent answers from what it knows.
    named.cluster.hosts[0].kill_agent();
    named.cluster.hosts[1].kill_agent();
    named.cluster.hosts[1].start_agent();
    wait_for(&askers[1].1, &format!("{gone} A"), &[&ip]);
    named.cluster.hosts[0].start_agent();
}

#[test]
fn the_rest_of_the_world_is_asked_in_order_and_a_slow_server_costs_only_itself() {
    let named = Named::new();
    let world = named.world();
    let (_, asker) = named.run(0, "c1", "--network blue");
    let found = dig(&asker, "ok.example A");
    assert_eq!(ok(&found), ["192.0.2.77"]);
    for name in ["nobody.example", "single"] {
        assert_eq!(dig(&asker, &format!("{name} A")).status, "NXDOMAIN");
        assert!(world.asked().contains(&name.to_owned()));
    }
    // Wrong answers are no answers.
    assert_eq!(ok(&dig(&asker, "liar.example A")), ["192.0.2.77"]);
    // Truncated by UDP: the client asks by TCP, and so does the agent.
    assert!(dig(&asker, "+ignore big.example A").flags.contains("tc"));
    assert_eq!(ok(&dig(&asker, "big.example A")).len(), 100);
    // Each question from a port of its own.
    for _ in 0..8 {
        let _ = dig(&asker, "ok.ports A");
    }
    assert!(world.ports("ok.ports").len() > 1);

    // Nobody at the first address, a server that fails at the second.
    let switch = &named.cluster.switch;
    for address in ["192.0.2.252/24", "192.0.2.253/24"] {
        sh(switch, &format!("ip addr add {address} dev br0"));
    }
    let second = Upstream::start(switch, "192.0.2.253".parse::<IpAddr>().unwrap());
    let (_, other) = named.run(
        1,
        "c2",
        "--network blue --dns 192.0.2.253 --dns 192.0.2.252",
    );
    // Its first server is WORLD by the helper: it fails these, as the next ones do.
    for name in ["fail.example", "refuse.example"] {
        assert_eq!(dig(&other, &format!("{name} A")).status, "SERVFAIL");
        assert!(
            second.asked().contains(&name.to_owned()),
            "the next is asked"
        );
    }
    // While one question waits for servers that say nothing, others are answered, of the world and of the cluster.
    let silent = other.clone();
    let waiting = std::thread::spawn(move || {
        let start = Instant::now();
        (dig(&silent, "silent.example A"), start.elapsed())
    });
    wait_until("the silent question is on its way", LIMIT, || {
        world.asked().contains(&"silent.example".to_owned())
    });
    assert_eq!(ok(&dig(&other, "ok.example A")), ["192.0.2.77"]);
    let own = named.cluster.container("c1");
    assert_eq!(ok(&dig(&other, &format!("{own} A"))).len(), 1);
    let (found, took) = waiting.join().unwrap();
    assert_eq!(found.status, "SERVFAIL", "{}", found.text);
    assert!(
        took >= Duration::from_secs(8),
        "two servers have four seconds each: {took:?}"
    );
    assert!(second.asked().contains(&"silent.example".to_owned()));

    // With ndots, a name without a dot is no other server's matter.
    let (_, dots) = named.run(2, "c3", "--network blue --dns-option ndots:1");
    assert_eq!(dig(&dots, "lonely A").status, "NXDOMAIN");
    assert_eq!(ok(&dig(&dots, "ok.example A")), ["192.0.2.77"]);
    assert!(!world.asked().contains(&"lonely".to_owned()));

    // One that has no network but the way out asks too.
    let (_, alone) = named.run(0, "c4", "");
    assert_eq!(ok(&dig(&alone, "ok.example A")), ["192.0.2.77"]);
    let names = &named.host(0).json("status --json")["cluster"]["names"];
    assert!(names["forwarded"].as_u64() >= Some(5), "{names}");
    assert_eq!(names["containers"], 2, "{names}");
}

#[test]
fn the_hosts_own_servers_are_asked_where_a_container_names_none() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("resolv.conf");
    // The first three count: one that nobody has, one of the host's own loopback, one of the network, and one too many.
    let servers = ["192.0.2.252", "127.0.0.53", WORLD, "192.0.2.253"];
    let write = |servers: &[&str]| {
        let lines: Vec<String> = servers
            .iter()
            .map(|server| format!("nameserver {server}\n"))
            .collect();
        std::fs::write(&file, format!("search example\n{}", lines.concat())).unwrap();
    };
    write(&servers[1..2]);
    let cluster = Cluster::joined(1, &["--resolv-conf", file.to_str().unwrap()]);
    let host = &cluster.hosts[0];
    host.ok("network create --subnet 10.0.9.0/24 blue");
    host.ok("network create --subnet 10.0.7.0/24 --internal inner");
    let own = Upstream::start(&host.netns, "127.0.0.53".parse().unwrap());
    let world = Upstream::start(&cluster.switch, WORLD.parse().unwrap());
    for address in ["192.0.2.252/24", "192.0.2.253/24"] {
        sh(&cluster.switch, &format!("ip addr add {address} dev br0"));
    }
    let last = Upstream::start(&cluster.switch, "192.0.2.253".parse().unwrap());
    let started = |name: &str, network: &str| {
        let name = cluster.container(name);
        host.ok(&format!(
            "run -d --name {name} --network {network} -- sleep infinity"
        ));
        Netns::open(&name).unwrap()
    };
    let (outer, inner) = (started("outer", "blue"), started("inner", "inner"));
    let resolv_conf = sh(
        &host.netns,
        &format!(
            "cat {}/containers/{}/resolv.conf",
            host.state_dir().display(),
            cluster.container("outer")
        ),
    );
    assert!(resolv_conf.contains("search example"), "{resolv_conf}");
    assert_eq!(ok(&dig(&outer, "ok.example A")), ["192.0.2.77"]);
    assert!(own.asked().contains(&"ok.example".to_owned()));
    assert!(world.asked().is_empty(), "it is not named yet");
    // Who has no way out does not get one by names.
    assert_eq!(dig(&inner, "inner.example A").status, "SERVFAIL");
    assert!(!own.asked().contains(&"inner.example".to_owned()));
    // The file is looked at again; the third is asked, the fourth never.
    write(&servers);
    wait_until("the file is read again", LIMIT, || {
        let _ = dig(&outer, "fail.example A");
        world.asked().contains(&"fail.example".to_owned())
    });
    assert!(last.asked().is_empty(), "{:?}", last.asked());
}

#[test]
fn a_container_has_files_of_its_own_and_may_serve_port_53_itself() {
    let mut named = Named::new();
    let _world = named.world();
    let (c1, asker) = named.run(
        0,
        "c1",
        "--network blue --dns-search corp.example --dns-option timeout:3",
    );
    let own = |name: &str| {
        let file = named.host(0).ok(&format!("exec {c1} cat {name}"));
        file.lines()
            .filter(|line| !line.starts_with('#'))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        own("/etc/resolv.conf"),
        [
            "nameserver 127.0.0.11",
            "search corp.example",
            "options timeout:3 ndots:0"
        ]
    );
    let ips = named.ips(0, &c1, "blue");
    let hosts = own("/etc/hosts");
    for ip in &ips {
        assert!(
            hosts
                .iter()
                .any(|line| line.starts_with(&format!("{ip}\t{c1} "))),
            "{hosts:?}"
        );
    }
    // The resolver of a program in the container goes that way.
    let (c2, _) = named.run(1, "c2", "--network blue");
    wait_until("the name of the other", LIMIT, || {
        !dig(&asker, &format!("{c2} A")).answers.is_empty()
    });
    let seen = named.host(0).ok(&format!("exec {c1} getent ahostsv4 {c2}"));
    assert!(seen.contains(&named.ips(0, &c2, "blue")[0]), "{seen}");

    // A server of its own, on every address; another container's clients ask it, and its own names go on.
    let server = Upstream::start(&asker, "0.0.0.0".parse().unwrap());
    let other = Netns::open(&c2).unwrap();
    let asked = sh(
        &other,
        &format!("dig +short +tries=1 +time=20 @{} ok.inside A", ips[0]),
    );
    assert_eq!(asked.trim(), "192.0.2.77");
    assert_eq!(server.asked(), ["ok.inside"]);
    assert_eq!(ok(&dig(&asker, &format!("{c1} A"))), [ips[0].clone()]);
    assert_eq!(server.asked().len(), 1);

    // Nothing is tracked for it, and nobody asks from outside: not by its address, not with a route to 127.0.0.11.
    let table = sh(&asker, "nft list table inet towline-names");
    assert_eq!(table.matches("notrack").count(), 4, "{table}");
    drop(server);
    assert_eq!(dig_at(&other, &ips[0]), "", "nobody serves there any more");
    sh(&asker, "sysctl -q -w net.ipv4.conf.all.route_localnet=1");
    sh(&other, "sysctl -q -w net.ipv4.conf.all.route_localnet=1");
    sh(&other, "ip addr del 127.0.0.1/8 dev lo");
    sh(
        &other,
        &format!("ip route replace 127.0.0.11 via {} dev eth0", ips[0]),
    );
    let ports = sh(&asker, "ss -Hlun src 127.0.0.11");
    let port: u16 = ports
        .split_whitespace()
        .find_map(|word| word.strip_prefix("127.0.0.11%lo:"))
        .unwrap()
        .parse()
        .unwrap();
    let stranger = other.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    stranger
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    for port in [53, port] {
        let _ = stranger.send_to(&question(7, &c1, 1), ("127.0.0.11", port));
    }
    assert!(
        stranger.recv(&mut [0; 512]).is_err(),
        "an answer from another's loopback"
    );

    // A killed agent leaves the table; the next one answers again, at other ports, in a table that is whole.
    named.cluster.hosts[0].kill_agent();
    named.cluster.hosts[0].start_agent();
    wait_for(&asker, &format!("{c1} A"), &[&ips[0]]);
    assert_eq!(ok(&dig(&asker, "+tcp ok.example A")), ["192.0.2.77"]);
    let table = sh(&asker, "nft list table inet towline-names");
    assert_eq!(table.matches("notrack").count(), 4, "{table}");

    // The sockets do not keep the namespace alive.
    let inode = asker.id();
    drop(asker);
    named.host(0).ok(&format!("rm -f {c1}"));
    wait_until("the namespace is gone", LIMIT, || !sockets_hold(inode));
    named.host(0).refused(
        "run --rm --network blue --network-alias a..b -- true",
        125,
        &["a..b", "alias"],
    );
    named
        .host(0)
        .refused("run --rm --network-alias a -- true", 125, &["--network"]);
    named
        .host(0)
        .refused("run --rm --dns-option= -- true", 125, &["option"]);
}

/// What another server answers; empty: nothing.
fn dig_at(netns: &Netns, server: &str) -> String {
    let output = try_sh(
        netns,
        &format!("dig +short +tries=1 +time=1 @{server} ok.inside A"),
    );
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter(|line| !line.starts_with(';')).collect()
}

/// Whether any process is in a namespace.
fn sockets_hold(id: (u64, u64)) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let namespaces =
        processes.filter_map(|process| std::fs::metadata(process.path().join("ns/net")).ok());
    namespaces.into_iter().any(|ns| {
        use std::os::unix::fs::MetadataExt as _;
        (ns.dev(), ns.ino()) == id
    })
}

#[test]
fn hostile_questions_are_bounded() {
    let named = Named::new();
    let world = named.world();
    let (c1, asker) = named.run(0, "c1", "--network blue");
    let many = |first: u8| {
        (first..first + 16)
            .map(|n| format!("--network-alias a{n}-{} ", "x".repeat(40)))
            .collect::<String>()
    };
    let (_, _) = named.run(1, "c2", &format!("--network blue {}", many(0)));
    wait_until("an alias of another host", LIMIT, || {
        !dig(&asker, &format!("a0-{} A", "x".repeat(40)))
            .answers
            .is_empty()
    });
    // All there is: never.
    for transport in ["", "+tcp "] {
        assert_eq!(
            dig(&asker, &format!("{transport}{c1} ANY")).status,
            "NOTIMP"
        );
        assert_eq!(
            dig(&asker, &format!("{transport}{c1} AXFR")).answers,
            Vec::<String>::new()
        );
    }
    assert_eq!(dig(&asker, &format!("-c CH {c1} TXT")).status, "REFUSED");
    assert_eq!(
        dig(&asker, &format!("+edns=1 +noednsneg {c1} A")).status,
        "BADVERS"
    );
    let huge = dig(&asker, &format!("+bufsize=65535 {c1} A"));
    assert_eq!(ok(&huge).len(), 1);
    assert!(huge.text.contains("udp: 4096"), "{}", huge.text);
    assert!(!world.asked().contains(&c1), "{:?}", world.asked());

    let socket = asker
        .run(|| UdpSocket::bind("127.0.0.1:0"))
        .unwrap()
        .unwrap();
    socket.connect(SERVER).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let mut buffer = [0; 4096];
    let good = question(1, &c1, 1);
    let mut answer = |query: &[u8]| {
        socket.send(query).unwrap();
        // What is no question is not answered: the good one behind it is.
        socket.send(&good).unwrap();
        let length = socket.recv(&mut buffer).unwrap();
        let first = buffer[..length].to_vec();
        if first[..2] != good[..2] {
            let _ = socket.recv(&mut buffer).unwrap();
        }
        first
    };
    let mut looped = question(2, "", 1);
    looped.splice(12..13, [0xc0, 12]);
    let mut forward = question(3, "", 1);
    forward.splice(12..13, [0xc0, 40]);
    let mut crowd = question(4, "web", 1);
    crowd[4..6].copy_from_slice(&[0xff, 0xff]);
    let mut records = question(5, "web", 1);
    records[10..12].copy_from_slice(&[0xff, 0xff]);
    for wrong in [&looped, &forward, &crowd, &records] {
        let answer = answer(wrong);
        assert_eq!(
            (answer[..2] == wrong[..2], answer[3] & 0xf),
            (true, 1),
            "FORMERR: {answer:?}"
        );
        assert!(answer.len() <= wrong.len(), "nothing is amplified");
    }
    let mut said = question(6, &c1, 1);
    said[2] |= 0x80;
    for silent in [&said[..], &[0; 11], &[]] {
        let answer = answer(silent);
        assert_eq!(answer[..2], good[..2], "no answer to {silent:?}");
    }

    // A flood of names that nobody knows, and nobody answers for: so many wait, the rest are refused at once; the cluster's own
    // names are answered all the while, in other containers and in this one.
    let flood = asker
        .run(|| UdpSocket::bind("127.0.0.1:0"))
        .unwrap()
        .unwrap();
    flood.connect(SERVER).unwrap();
    for n in 0..2000_u16 {
        let _ = flood.send(&question(n, &format!("silent{n}.example"), 1));
        if n % 50 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert_eq!(ok(&dig(&asker, &format!("{c1} A"))).len(), 1);
    let counters = || named.host(0).json("status --json")["cluster"]["names"].clone();
    wait_until("some are refused", LIMIT, || {
        counters()["refused"].as_u64() > Some(0)
    });
    assert_eq!(ok(&dig(&asker, &format!("{c1} A"))).len(), 1);
    wait_until("the flood is over", LIMIT, || {
        counters()["failed"].as_u64() >= Some(1000)
    });
    assert_eq!(ok(&dig(&asker, "ok.example A")), ["192.0.2.77"]);
}

/// The rate is the machine's matter: `TOWLINE_DNS_RATE` names another.
#[test]
fn no_question_is_lost() {
    let named = Named::new();
    let (_, asker) = named.run(0, "c1", "--network blue");
    let (c2, _) = named.run(1, "c2", "--network blue");
    wait_until("the other's name", LIMIT, || {
        !dig(&asker, &format!("{c2} A")).answers.is_empty()
    });
    let rate = std::env::var("TOWLINE_DNS_RATE").unwrap_or_default();
    let rate = if rate.is_empty() {
        1000
    } else {
        rate.parse().unwrap()
    };
    let start = Instant::now();
    let (sent, answered) = load(&asker, &c2, rate, Duration::from_secs(3));
    println!(
        "{sent} questions at {rate} a second, {answered} answered, {:?}",
        start.elapsed()
    );
    assert_eq!(sent, answered);
}
