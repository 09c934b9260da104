//! An agent that is killed at every change that it makes to its files, one after the other: `strace` kills it right at the
//! system call that puts a new file in an old one's place. Nothing may be left behind, and nothing that ran may stop.
//!
//! Conformance H18.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use netns::{Netlink, Netns};
use towline_tests::cluster::{Cluster, Host};
use towline_tests::{sh, wait_until};

const LIMIT: Duration = Duration::from_secs(60);
/// No start or end of a container changes as many files.
const CHANGES_MAX: u32 = 40;

/// Kills the agent at the `nth` file that one of its threads puts in place.
fn kill_at(host: &Host, nth: u32) -> Child {
    let mut strace = Command::new("strace")
        .args(["-f", "-e", "trace=rename"])
        .args(["-e", &format!("inject=rename:signal=SIGKILL:when={nth}")])
        .args(["-p", &host.agent_pid().to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("strace is installed by scripts/setup test");
    let mut said = BufReader::new(strace.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("attached") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "strace ended");
    }
    // It must not wait for a reader.
    std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
    strace
}

/// Runs a command while the agent is about to be killed, and starts another agent. `false`: it was not killed any more.
fn killed_during(host: &mut Host, nth: u32, args: &str) -> bool {
    let mut strace = kill_at(host, nth);
    let mut command = host.command(args);
    let mut client = host
        .netns
        .run(|| command.stdout(Stdio::null()).stderr(Stdio::null()).spawn())
        .unwrap()
        .unwrap();
    client.wait().unwrap();
    let killed = host.agent_has_ended();
    if killed {
        host.reap_agent();
    } else {
        host.kill_agent();
    }
    strace.wait().unwrap();
    host.start_agent();
    killed
}

/// Interfaces, rules and namespaces of containers on this host, the running one's aside.
fn leftovers(host: &Host, names: &[&str]) -> Vec<String> {
    let links = Netlink::open(&host.netns).unwrap().links().unwrap();
    let ports = links.into_iter().filter(|link| link.name.starts_with("tl"));
    let ports = ports.map(|link| link.name);
    let netns = names.iter().filter(|name| Netns::exists(name));
    ports.chain(netns.map(|name| (*name).to_owned())).collect()
}

#[test]
fn an_agent_killed_at_each_change_of_a_file_leaves_nothing_and_stops_nothing() {
    let mut cluster = Cluster::joined(1, &[]);
    let (stays, comes) = (cluster.container("stays"), cluster.container("comes"));
    let host = &mut cluster.hosts[0];
    host.ok("network create --subnet 10.0.9.0/24 -d overlay myoverlay");
    let run = |name: &str| format!("run -d --name {name} --network myoverlay -- sleep infinity");
    host.ok(&run(&stays));
    let stays_netns = Netns::open(&stays).unwrap();
    let before = leftovers(host, &[&comes]);
    assert!(!before.is_empty(), "the running container has a port");
    let rules = |host: &Host| sh(&host.netns, "nft list ruleset").lines().count();
    let rules_before = rules(host);

    let mut points = [0, 0];
    for (which, point) in points.iter_mut().enumerate() {
        for nth in 1..=CHANGES_MAX {
            let args = if which == 0 {
                run(&comes)
            } else {
                host.ok(&run(&comes));
                format!("rm -f {comes}")
            };
            let killed = killed_during(host, nth, &args);
            // All or nothing; then nothing.
            wait_until("the new agent has cleared up", LIMIT, || {
                let all = host.json("ps -a --json");
                let found = all.as_array().unwrap().iter().find(|c| c["name"] == comes);
                found.map_or(!Netns::exists(&comes), |c| c["state"] == "running")
            });
            host.ok(&format!("rm -f {comes}"));
            wait_until("nothing is left of it", LIMIT, || {
                leftovers(host, &[&comes]) == before
                    && !host.ok("network inspect myoverlay").contains(&comes)
            });
            assert_eq!(rules(host), rules_before, "{which} {nth}");
            sh(&stays_netns, "ping -c 1 -W 5 10.0.9.1");
            if !killed {
                break;
            }
            *point = nth;
        }
    }
    println!(
        "killed at {} changes of a start, {} of an end",
        points[0], points[1]
    );
    assert!(
        points.iter().all(|&n| (1..CHANGES_MAX).contains(&n)),
        "{points:?}"
    );
}

#[test]
fn an_agent_killed_while_networks_change_finishes_or_undoes_it_and_stops_no_connection() {
    let mut cluster = Cluster::joined(1, &[]);
    let (c1, peer) = (cluster.container("c1"), cluster.container("peer"));
    let host = &mut cluster.hosts[0];
    host.ok("network create --subnet 10.0.7.0/24 --internal inside");
    host.ok("network create --subnet 10.0.9.0/24 outward");
    host.ok(&format!(
        "run -d --name {peer} --network inside --ip 10.0.7.9 -- sleep infinity"
    ));
    host.ok(&format!(
        "run -d --name {c1} --network inside -p 8081:80 -- sleep infinity"
    ));
    let netns = Netns::open(&c1).unwrap();
    // What a container has: interfaces, lines in its hosts file, default routes, and its port of the host.
    let has = |host: &Host| {
        let links = Netlink::open(&netns).unwrap().links().unwrap();
        let mut names: Vec<String> = links.into_iter().map(|link| link.name).collect();
        names.sort();
        let routes = sh(&netns, "ip route show default");
        let port = sh(&host.netns, "nft list ruleset").contains("8081");
        let places = host.json("ps --json");
        let all = places.as_array().unwrap().clone();
        let own = all.into_iter().find(|found| found["name"] == c1).unwrap();
        let places = own["endpoints"].as_array().unwrap().len();
        let kept = std::fs::read_to_string(host.state_dir().join("agent.json")).unwrap();
        let unfinished = kept.contains("coming") || kept.contains("going");
        let held = host.ok("network inspect outward").contains(&c1);
        let hosts = host.state_dir().join(format!("containers/{c1}/hosts"));
        let hosts = std::fs::read_to_string(hosts).unwrap();
        (
            names,
            hosts.lines().filter(|line| line.contains(&c1)).count(),
            routes.lines().count(),
            port,
            places,
            held,
            unfinished,
        )
    };
    let without = has(host);
    host.ok(&format!("network connect outward {c1}"));
    let with = has(host);
    assert_eq!((without.1, with.1), (1, 2));
    assert_eq!((without.2, with.2, with.3, with.4), (0, 1, true, 2));
    host.ok(&format!("network disconnect outward {c1}"));
    assert_eq!(has(host), without);

    let mut points = [0, 0];
    for (which, point) in points.iter_mut().enumerate() {
        for nth in 1..=CHANGES_MAX {
            let (before, args) = match which {
                0 => ("disconnect", "connect"),
                _ => ("connect", "disconnect"),
            };
            // As it may be already.
            let _ = host.towline(&format!("network {before} outward {c1}"));
            let killed = killed_during(host, nth, &format!("network {args} outward {c1}"));
            wait_until("the new agent has finished or undone it", LIMIT, || {
                let now = has(host);
                now == with || now == without
            });
            sh(&netns, "ping -n -c 1 -W 5 10.0.7.9");
            if !killed {
                break;
            }
            *point = nth;
        }
    }
    println!(
        "killed at {} changes of a connect, {} of a disconnect",
        points[0], points[1]
    );
    assert!(
        points.iter().all(|&n| (1..CHANGES_MAX).contains(&n)),
        "{points:?}"
    );
}
