//! Names that are none of the cluster's: which servers are asked, in which order, and how long.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::net::IpAddr;
use std::time::{Duration, Instant};

use netns::Netns;
use towline_tests::cluster::Cluster;
use towline_tests::dns::{Upstream, dig};
use towline_tests::named::{LIMIT, Named, WORLD, ok};
use towline_tests::{sh, strict_times, wait_until};

/// How long a server is given.
const PATIENCE: Duration = Duration::from_secs(4);

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
fn a_server_that_nothing_comes_back_from_is_waited_for_and_the_next_one_is_asked() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    host.ok("network create --subnet 10.0.9.0/24 blue");
    let world = Upstream::start(&cluster.switch, WORLD.parse().unwrap());
    // Nobody has this address; and this way ends on the host, without a word.
    let (nobody, hole) = ("192.0.2.99", "198.51.100.1");
    sh(&host.netns, "ip route add blackhole 198.51.100.0/24");
    let start = |name: &str, servers: &[&str]| {
        let name = cluster.container(name);
        let servers: String = servers.iter().map(|ip| format!("--dns {ip} ")).collect();
        host.ok(&format!(
            "run -d --name {name} --network blue {servers} -- sleep infinity"
        ));
        (Netns::open(&name).unwrap(), name)
    };
    let (absent, own) = start("absent", &[nobody, WORLD]);
    let (hidden, _) = start("hidden", &[hole, WORLD]);
    let (lost, _) = start("lost", &[nobody, hole]);
    // A way that ends in the container itself: nothing can be sent.
    let (shut, _) = start("shut", &[hole, WORLD]);
    sh(&shut, "ip route add blackhole 198.51.100.0/24");
    let asked = [
        (absent, "ok.absent"),
        (hidden, "ok.hidden"),
        (lost, "ok.lost"),
        (shut, "ok.shut"),
    ]
    .map(|(netns, name)| {
        std::thread::spawn(move || {
            let start = Instant::now();
            (dig(&netns, &format!("{name} A")), start.elapsed())
        })
    });
    // The cluster's own names wait for nobody.
    let own_name = dig(&Netns::open(&own).unwrap(), &format!("{own} A"));
    assert_eq!(ok(&own_name).len(), 1);
    let [absent, hidden, lost, shut] = asked.map(|asked| asked.join().unwrap());
    for (found, took) in [&absent, &hidden, &shut] {
        assert_eq!(ok(found), ["192.0.2.77"]);
        assert!(
            *took < PATIENCE + Duration::from_secs(1) || !strict_times(),
            "{took:?}: {}",
            found.text
        );
    }
    assert!(hidden.1 >= PATIENCE, "it has its time: {:?}", hidden.1);
    assert_eq!(lost.0.status, "SERVFAIL", "{}", lost.0.text);
    assert!(lost.1 >= PATIENCE, "{:?}", lost.1);
    assert!(!world.asked().contains(&"ok.lost".to_owned()));
}
