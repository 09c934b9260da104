//! Names follow what changes, on every host, and soon.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use netns::Netns;
use towline_tests::dns::dig;
use towline_tests::named::{LIMIT, Named, ok, wait_for};
use towline_tests::service::Server;
use towline_tests::web::CHECKED;
use towline_tests::{strict_times, wait_until};

/// How long after a change a name may be wrong on some host.
const SOON: Duration = Duration::from_secs(1);
/// How long after a member's server ended: the time of a check besides.
const CHECKED_SOON: Duration = Duration::from_millis(1100);
/// How long after a host's agent ended: the silence of a host that is lost besides.
const LOST_SOON: Duration = Duration::from_secs(4);
/// How long after the agent of a host that was lost has started.
const BACK_SOON: Duration = Duration::from_secs(5);

/// Says how long something took that happened at `since`; too long is a failure where times are strict.
fn in_time(what: &str, since: Instant, within: Duration) {
    let took = since.elapsed();
    println!("{what}: seen after {took:?}");
    assert!(
        took < within || !strict_times(),
        "{what}: seen after {took:?}, not within {within:?}"
    );
}

/// Waits until nobody knows of a name any more, the servers for the rest of the world neither.
fn wait_for_none(netns: &Netns, question: &str) {
    wait_until(&format!("{question} is no name in {netns}"), LIMIT, || {
        dig(netns, question).status == "NXDOMAIN"
    });
}

/// A container on `blue` on each host.
fn askers(named: &Named) -> Vec<(String, Netns)> {
    (0..3)
        .map(|host| named.run(host, &format!("a{host}"), "--network blue"))
        .collect()
}

#[test]
fn names_follow_every_change_on_every_host() {
    let named = Named::new();
    let _world = named.world();
    let askers = askers(&named);
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
        wait_for_none(netns, "web A");
    }
    println!(
        "the slowest of 23 changes was seen on three hosts after {slowest:?}, dig's own start included"
    );
    if strict_times() {
        assert!(slowest < SOON, "{slowest:?}");
    }
}

#[test]
fn names_follow_the_networks_of_a_container() {
    let named = Named::new();
    let _world = named.world();
    // It asks on a network just as long as it is connected; others there find it by its name and alias.
    let (late, on_late) = named.run(0, "late", "--network blue");
    let (other, on_other) = named.run(2, "green", "--network my.green");
    let there = named.ips(2, &other, "my.green")[0].clone();
    let question = format!("{other} A");
    for turn in 0..3 {
        assert_eq!(dig(&on_late, &question).status, "NXDOMAIN");
        named
            .host(0)
            .ok(&format!("network connect --alias soon my.green {late}"));
        let since = Instant::now();
        wait_for(&on_late, &question, &[&there]);
        let own = named.ips(0, &late, "my.green")[0].clone();
        for name in [&late, "soon", "soon.my.green"] {
            wait_for(&on_other, &format!("{name} A"), &[&own]);
        }
        in_time(&format!("connected, turn {turn}"), since, SOON);
        let since = Instant::now();
        named
            .host(0)
            .ok(&format!("network disconnect my.green {late}"));
        wait_for_none(&on_other, "soon A");
        wait_for_none(&on_other, &format!("{late} A"));
        wait_for_none(&on_late, &question);
        in_time(&format!("disconnected, turn {turn}"), since, SOON);
        let own = named.ips(0, &late, "blue")[0].clone();
        assert_eq!(ok(&dig(&on_late, &format!("{late} A"))), [own]);
    }
}

#[test]
fn names_follow_the_health_of_members_and_the_end_of_services() {
    let named = Named::new();
    let _world = named.world();
    let manager = named.host(0);
    manager.ok(&format!(
        "service create --name web --network blue {CHECKED}"
    ));
    manager.ok(&format!(
        "service create --name rr --network blue --endpoint-mode dnsrr {CHECKED}"
    ));
    let vip = manager.json("service inspect web")[0]["vips"][0].clone();
    let vip = vip.as_str().unwrap();
    let askers = askers(&named);
    let all_see = |question: &str, expected: &[&str]| {
        for (_, netns) in &askers {
            wait_for(netns, question, expected);
        }
    };
    let member = |host: usize, name: &str, service: &str| {
        let (name, netns) = named.run(host, name, &format!("--service {service}"));
        let server = Server::tcp(&netns, &name, 80);
        let ip = named.ips(host, &name, "blue")[0].clone();
        (name, netns, Some(server), ip)
    };
    let (name, netns, mut server, ip) = member(1, "m1", "web");
    let (_, _, _first, stays) = member(0, "r0", "rr");
    let (rr_name, rr_netns, mut rr_server, goes) = member(2, "r2", "rr");
    all_see("tasks.web A", &[&ip]);
    all_see("rr A", &[&stays, &goes]);
    for turn in 0..2 {
        drop(server.take());
        let since = Instant::now();
        all_see("tasks.web A", &[]);
        in_time(&format!("unhealthy, turn {turn}"), since, CHECKED_SOON);
        for (_, netns) in &askers {
            // The service is known without anybody who serves: nobody else is asked for it, and its address stays.
            assert_eq!(dig(netns, "tasks.web A").status, "NOERROR");
            assert_eq!(ok(&dig(netns, "web A")), [vip]);
        }
        drop(rr_server.take());
        let since = Instant::now();
        all_see("rr A", &[&stays]);
        all_see("tasks.rr A", &[&stays]);
        in_time(
            &format!("one of two unhealthy, turn {turn}"),
            since,
            CHECKED_SOON,
        );
        // A container that is unhealthy is found by its own name.
        assert_eq!(ok(&dig(&askers[0].1, &format!("{rr_name} A")))[0], goes);

        server = Some(Server::tcp(&netns, &name, 80));
        let since = Instant::now();
        all_see("tasks.web A", &[&ip]);
        in_time(&format!("healthy, turn {turn}"), since, CHECKED_SOON);
        rr_server = Some(Server::tcp(&rr_netns, &rr_name, 80));
        let since = Instant::now();
        all_see("rr A", &[&stays, &goes]);
        in_time(&format!("both healthy, turn {turn}"), since, CHECKED_SOON);
    }
    for service in ["web", "rr"] {
        let since = Instant::now();
        named.host(1).ok(&format!("service rm {service}"));
        for (_, netns) in &askers {
            wait_for_none(netns, &format!("{service} A"));
            wait_for_none(netns, &format!("tasks.{service} A"));
        }
        in_time("service rm", since, SOON);
    }
}

#[test]
fn names_follow_hosts_that_are_lost_and_found() {
    let mut named = Named::new();
    let _world = named.world();
    let askers = askers(&named);
    named
        .host(0)
        .ok("service create --name web --network blue --endpoint-mode dnsrr");
    let members = [1, 2].map(|host| named.run(host, &format!("m{host}"), "--service web"));
    let ips = [1, 2].map(|host| named.ips(host, &members[host - 1].0, "blue")[0].clone());
    let [lost, stays] = &ips;
    let gone = askers[1].0.clone();
    let ip = named.ips(0, &gone, "blue")[0].clone();
    let others = [&askers[0].1, &askers[2].1];
    for netns in others {
        wait_for(netns, "web A", &[lost, stays]);
    }

    // A host that is lost is hidden with its names and members, and back with them; the other hosts' names stay. A manager that has
    // just started hides nobody for ten seconds: the first time says that they are over, the second is measured.
    for measured in [false, true] {
        named.cluster.hosts[1].kill_agent();
        let since = Instant::now();
        for netns in others {
            wait_for_none(netns, &format!("{gone} A"));
            wait_for(netns, "web A", &[stays]);
        }
        if measured {
            in_time("a host that is lost", since, LOST_SOON);
        }
        let other = format!("{} A", askers[2].0);
        assert_eq!(ok(&dig(&askers[0].1, &other)).len(), 1);
        named.cluster.hosts[1].start_agent();
        let since = Instant::now();
        for netns in others {
            wait_for(netns, &format!("{gone} A"), &[&ip]);
            wait_for(netns, "web A", &[lost, stays]);
        }
        in_time("a host that is back", since, BACK_SOON);
    }
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
