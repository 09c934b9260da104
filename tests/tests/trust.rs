//! Who may be in a cluster, with real agents: tokens, certificates, removal, and a manager that is lost.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use netns::Netns;
use towline_tests::cluster::{Cluster, Host};
use towline_tests::{try_sh, wait_until};

const LIMIT: Duration = Duration::from_secs(60);
const FAILED: i32 = 1;

fn token(host: &Host, options: &str) -> String {
    host.ok(&format!("token -q {options}")).trim().to_owned()
}

/// Name and role of every host, as this one lists them.
fn roles(host: &Host) -> Vec<(String, String)> {
    let listed = host.towline("host ls --json");
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap_or_default();
    let hosts = listed.as_array().into_iter().flatten();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    hosts
        .map(|host| (text(&host["name"]), text(&host["role"])))
        .collect()
}

fn status(host: &Host) -> serde_json::Value {
    host.json("status --json")["cluster"].clone()
}

fn pings(from: &Netns, to: &str) -> bool {
    try_sh(from, &format!("ping -c 1 -W 1 {to}"))
        .status
        .success()
}

/// Conformance H12: wrong, rotated and expired tokens; and no secret in any log.
#[test]
fn a_token_rotates_and_expires_and_is_in_no_log() {
    let cluster = Cluster::start(2, &[]);
    let [manager, host] = &cluster.hosts[..] else {
        panic!("two hosts")
    };
    manager.ok("init");
    let first = token(manager, "");
    let rotated = token(manager, "--rotate");
    assert_ne!(first, rotated);
    let refused = |token: &str, says: &[&str]| {
        host.refused(&format!("join --token {token} 192.0.2.1"), FAILED, says);
    };
    refused(&first, &["wrong token", "towline token"]);
    let short = token(manager, "--expires 1s");
    assert_eq!(short, rotated, "only its time has changed");
    wait_until("the token has expired", LIMIT, || {
        manager.json("token --json")["expires_in"] == 0
    });
    refused(&short, &["expired", "--rotate"]);
    token(manager, "--expires never");
    host.ok(&format!("join --token {rotated} 192.0.2.1"));
    host.refused("token", FAILED, &["manager's host"]);

    for host in &cluster.hosts {
        for token in [&first, &rotated] {
            let secret = token.rsplit('-').next().unwrap();
            assert!(!host.log().contains(secret), "{}", host.log());
        }
        assert!(!host.log().contains("PRIVATE"));
        for file in fs::read_dir(host.state_dir()).unwrap().flatten() {
            let metadata = file.metadata().unwrap();
            if metadata.is_file() && file.file_name().to_string_lossy().ends_with(".pem") {
                let mode = metadata.permissions().mode() & 0o777;
                assert_eq!(mode, 0o600, "{}", file.path().display());
            }
        }
    }
}

#[test]
fn a_removed_host_is_out_at_once_and_joins_again_only_with_a_token() {
    let mut cluster = Cluster::joined(2, &[]);
    let name = cluster.container("c2");
    let [manager, host] = &mut cluster.hosts[..] else {
        panic!("two hosts")
    };
    manager.ok("network create --subnet 10.0.9.0/24 net1");
    host.ok(&format!(
        "run -d --name {name} --network net1 -- sleep infinity"
    ));
    let id = status(host)["host"].clone();
    let remove = format!("host rm {}", host.name);
    manager.refused(&remove, FAILED, &["is connected", "--force"]);
    manager.ok(&format!("{remove} --force"));
    wait_until("the host knows", LIMIT, || {
        let error = status(host)["control"]["last_error"].to_string();
        error.contains("removed from the cluster")
    });
    assert_eq!(roles(manager).len(), 1);
    // Neither a new connection nor a new agent helps.
    host.kill_agent();
    host.start_agent();
    wait_until("the host knows again", LIMIT, || {
        let error = status(host)["control"]["last_error"].to_string();
        error.contains("removed from the cluster")
    });
    assert_eq!(roles(manager).len(), 1);
    host.ok("leave --force");
    host.ok(&format!("join --token {} 192.0.2.1", token(manager, "")));
    assert_ne!(status(host)["host"], id, "it is a new host");
    assert_eq!(roles(manager).len(), 2);
}

#[test]
fn certificates_renew_themselves_and_serve_the_next_agent() {
    let mut cluster = Cluster::joined(2, &["--cert-expiry", "12s"]);
    let host = &mut cluster.hosts[1];
    let file = host.state_dir().join("identity.pem");
    let first = fs::read(&file).unwrap();
    wait_until("a new certificate", LIMIT, || {
        fs::read(&file).unwrap() != first
    });
    assert!(!status(host)["control"]["connected_to"].is_null());
    host.kill_agent();
    host.start_agent();
    wait_until("the manager took the host in", LIMIT, || {
        !status(host)["control"]["connected_to"].is_null()
    });
}

#[test]
fn a_kept_authority_begins_the_cluster_again() {
    let mut cluster = Cluster::joined(2, &[]);
    let name = cluster.container("c2");
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("ca.pem");
    let [manager, host] = &mut cluster.hosts[..] else {
        panic!("two hosts")
    };
    manager.ok("network create --subnet 10.0.9.0/24 net1");
    host.ok(&format!(
        "run -d --name {name} --network net1 -- sleep infinity"
    ));
    let export = format!("ca export {}", kept.display());
    manager.ok(&export);
    manager.refused(&export, FAILED, &["exists already"]);
    host.refused(
        &format!("ca export {}", folder.path().join("x").display()),
        FAILED,
        &["does not hold", "manager's host"],
    );
    assert_eq!(
        fs::metadata(&kept).unwrap().permissions().mode() & 0o777,
        0o600
    );

    // The manager's machine is lost with all that it knew; another takes its address.
    manager.ok("leave --force");
    manager.refused("init --ca /dev/null", FAILED, &["/dev/null", "ca export"]);
    manager.ok(&format!("init --ca {}", kept.display()));
    wait_until("the host is back", LIMIT, || roles(manager).len() == 2);
    wait_until("its container is back", LIMIT, || {
        manager
            .towline("network inspect net1 --json")
            .stdout
            .windows(name.len())
            .any(|window| window == name.as_bytes())
    });
}

#[test]
fn a_lost_manager_is_replaced_and_stands_down_when_it_returns() {
    let mut cluster = Cluster::start(3, &[]);
    let names: Vec<String> = ["c2", "c3", "c4"]
        .map(|name| cluster.container(name))
        .into();
    let hosts: Vec<String> = cluster.hosts.iter().map(|host| host.name.clone()).collect();
    let [h1, h2, h3] = &mut cluster.hosts[..] else {
        panic!("three hosts")
    };
    h1.ok("init");
    h2.ok(&format!("join --token {} 192.0.2.1", token(h1, "manager")));
    h3.ok(&format!("join --token {} 192.0.2.1", token(h1, "worker")));
    let expected = |roles_of: [&str; 3]| -> Vec<(String, String)> {
        let pairs = hosts.iter().cloned().zip(roles_of);
        pairs.map(|(name, role)| (name, role.to_owned())).collect()
    };
    wait_until("h2 stands by", LIMIT, || {
        roles(h3) == expected(["manager", "standby", "member"])
    });
    h1.ok("network create --subnet 10.0.9.0/24 net1");
    for (host, name) in [&*h2, &*h3].into_iter().zip(&names) {
        host.ok(&format!(
            "run -d --name {name} --network net1 -- sleep infinity"
        ));
    }
    let c2 = Netns::open(&names[0]).unwrap();
    assert!(pings(&c2, "10.0.9.3"));
    h2.refused("promote", FAILED, &["192.0.2.1", "answers"]);
    h3.refused(
        "promote",
        FAILED,
        &["does not stand by", "towline token manager"],
    );

    h1.kill_agent();
    wait_until("h2 takes over", LIMIT, || {
        h2.towline("promote").status.success()
    });
    h2.refused("promote", FAILED, &["manager already"]);
    wait_until("h3 has found the new manager", LIMIT, || {
        roles(h3).contains(&(hosts[1].clone(), "manager".to_owned()))
    });
    assert!(pings(&c2, "10.0.9.3"), "nothing was forgotten");
    let run = format!(
        "run -d --name {} --network net1 -- sleep infinity",
        names[2]
    );
    wait_until("a container starts", LIMIT, || {
        h3.towline(&run).status.success()
    });
    wait_until("it is reached", LIMIT, || pings(&c2, "10.0.9.4"));

    // The old manager comes back with the store that it had.
    h1.start_agent();
    wait_until("the old manager stands by", LIMIT, || {
        roles(h3) == expected(["standby", "manager", "member"])
    });
    assert!(h1.log().contains("stood down"), "{}", h1.log());
    assert_eq!(status(h1)["role"], "standby");
    assert!(pings(&c2, "10.0.9.4"));
}
