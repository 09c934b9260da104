//! `towline verify` and `towline events`: what hosts hold and what changes, seen from one of them.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::Value;
use towline_tests::cluster::Cluster;
use towline_tests::wait_until;

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn every_host_holds_what_the_manager_says_and_who_does_not_answer_is_named() {
    let mut cluster = Cluster::joined(3, &[]);
    cluster.hosts[0].ok("network create --subnet 10.0.9.0/24 --subnet fd00:9::/64 -d overlay blue");
    let names = ["c1", "c2", "c3"].map(|name| cluster.container(name));
    for (host, name) in cluster.hosts.iter().zip(&names) {
        host.ok(&format!(
            "run -d --name {name} --network blue -- sleep infinity"
        ));
    }
    let shown = cluster.hosts[1].ok("verify --network blue");
    assert_eq!(shown.matches("ok, 11 entries").count(), 3, "{shown}");
    // Addresses come back to other containers; the tables follow.
    for name in &names[..2] {
        let host = usize::from(*name == names[1]);
        cluster.hosts[host].ok(&format!("rm -f {name}"));
    }
    cluster.hosts[2].ok(&format!(
        "run -d --name {} --network blue -- sleep infinity",
        names[0]
    ));
    let found = cluster.hosts[2].json("verify --json");
    let found = found.as_array().unwrap();
    assert!(found.iter().all(|one| one["result"] == "same"), "{found:?}");

    cluster.hosts[2].kill_agent();
    let manager = &cluster.hosts[0];
    manager.ok(&format!(
        "run -d --name {} --network blue -- sleep infinity",
        names[1]
    ));
    let unreachable = |found: &Value| {
        let mut found = found.as_array().unwrap().iter();
        found.any(|one| {
            one["result"] == "unreachable" && one["host"] == cluster.hosts[2].name.as_str()
        })
    };
    wait_until("the manager sees the connection's end", LIMIT, || {
        let output = manager.towline("verify --json");
        unreachable(&serde_json::from_slice(&output.stdout).unwrap())
    });
    let output = manager.towline("verify");
    assert_eq!(output.status.code(), Some(1));
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(shown.contains("not connected to the manager"), "{shown}");
    manager.refused("verify --network none", 1, &["none"]);
}

/// A command that runs until the value goes.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn events_are_followed_from_another_host() {
    let cluster = Cluster::joined(2, &[]);
    let name = cluster.container("c1");
    let mut follower = cluster.hosts[1].command("events --since 1h --json");
    let mut follower = Running(follower.stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(follower.0.stdout.take().unwrap()).lines();
    // Ends at the end of the stream, when a follower that never tells is killed by the test's own limit.
    let mut next = |action: &str, object: &str| loop {
        let line = lines.next().expect("the follower ended").unwrap();
        let event: Value = serde_json::from_str(&line).unwrap();
        if event["action"] == action && event["object"] == object {
            return event;
        }
    };
    assert_eq!(next("join", "host")["host"], cluster.hosts[0].name.as_str());
    assert_eq!(next("join", "host")["host"], cluster.hosts[1].name.as_str());
    let manager = &cluster.hosts[0];
    manager.ok("network create --subnet 10.0.9.0/24 -d overlay blue");
    assert_eq!(next("create", "network")["network"], "blue");
    manager.ok(&format!(
        "run -d --name {name} --network blue -- sleep infinity"
    ));
    assert_eq!(next("create", "endpoint")["container"], name.as_str());
    let up = next("up", "endpoint");
    assert_eq!(
        (&up["host"], &up["network"]),
        (&Value::from(manager.name.as_str()), &"blue".into())
    );
    manager.ok(&format!("rm -f {name}"));
    assert_eq!(next("remove", "endpoint")["ips"][0], "10.0.9.2");
    manager.ok("network rm blue");
    assert_eq!(next("remove", "network")["vni"], up["vni"]);
    cluster.hosts[1].refused("events --since soon", 2, &["soon"]);
}
