//! Labels of hosts, and containers that run only where they may.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::time::Duration;

use towline_tests::cluster::{Cluster, Host};
use towline_tests::wait_until;

const LIMIT: Duration = Duration::from_secs(30);

/// The names of the hosts that `host ls ARGS` lists.
fn listed(host: &Host, args: &str) -> Vec<String> {
    let hosts = host.json(&format!("host ls --json {args}"));
    let hosts = hosts.as_array().unwrap().iter();
    hosts
        .map(|host| host["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_container_runs_where_its_constraints_hold_and_is_told_where_that_is() {
    let cluster = Cluster::joined(3, &[]);
    let [one, two, three] = &cluster.hosts[..] else {
        panic!("three hosts")
    };
    let ssd = "--constraint node.labels.disk==ssd";
    one.refused(
        &format!("run --rm {ssd} -- true"),
        125,
        &[
            "no suitable node (scheduling constraints not satisfied on 3 nodes)",
            "node.labels.disk==ssd",
            "it has none",
            "host update --label-add",
        ],
    );
    // Any host may ask.
    two.ok(&format!(
        "host update --label-add disk=ssd --label-add zone=a {}",
        two.name
    ));
    one.ok(&format!("host update --label-add disk=SSD {}", three.name));
    one.ok(&format!("host update --label-add disk=hdd {}", one.name));
    one.refused(
        &format!("run --rm {ssd} -- true"),
        125,
        &[
            "constraint node.labels.disk==ssd does not hold on this host",
            "it has 'hdd'",
            &format!("run it on {}, {}", two.name, three.name),
        ],
    );
    two.ok(&format!("run --rm {ssd} -- true"));
    three.ok(&format!("run --rm {ssd} -- true"));
    one.refused(
        &format!("run --rm {ssd} --constraint node.labels.zone!=a -- true"),
        125,
        &[&format!("run it on {}", three.name)],
    );
    assert_eq!(listed(one, "--filter label=disk=ssd"), [&*two.name]);
    assert_eq!(listed(one, "--filter label=disk").len(), 3);
    assert_eq!(listed(one, "--filter role=manager"), [&*one.name]);
    let shown = three.json(&format!("host inspect {} {}", two.name, one.name));
    assert_eq!(shown[0]["labels"]["zone"], "a");
    assert_eq!(shown[1]["platform"]["os"], "linux");

    // Every key, as this host is.
    let id = shown[0]["id"].as_str().unwrap();
    for holds in [
        &format!("node.id=={id}"),
        &format!("node.hostname=={}", two.name),
        &format!("node.ip=={}", two.address),
        "node.ip==192.0.2.0/24",
        "node.ip!=198.51.100.0/24",
        "node.role==worker",
        "node.role!=manager",
        "node.platform.os==linux",
        &format!("node.platform.arch=={}", std::env::consts::ARCH),
        "engine.labels.gpu!=yes",
    ] {
        two.ok(&format!("run --rm --constraint {holds} -- true"));
    }
    two.refused(
        "run --constraint node.colour==red -- true",
        125,
        &["nobody knows that key"],
    );
    two.refused(
        "run --constraint node.labels.disk=ssd -- true",
        125,
        &["expected one operator from ==, !="],
    );
    two.refused(
        "run --constraint 1==2 -- true",
        125,
        &["key '1' is invalid"],
    );

    one.ok(&format!("host update --label-rm zone {}", two.name));
    assert_eq!(listed(one, "--filter label=zone"), Vec::<String>::new());
    for (wrong, words) in [
        (format!("host update {}", one.name), "nothing to change"),
        (
            "host update --label-add a=b nobody".to_owned(),
            "no host \"nobody\"",
        ),
        (
            format!("host update --label-rm none {}", one.name),
            "no label \"none\"",
        ),
        (
            format!("host update --label-add a/b=c {}", one.name),
            "invalid label \"a/b\"",
        ),
        (
            format!("host update --label-add =c {}", one.name),
            "its key is empty",
        ),
        (
            format!("host update --label-add k={} {}", "x".repeat(300), one.name),
            "at most 256 bytes",
        ),
        ("host inspect nobody".to_owned(), "no host 'nobody'"),
        (
            "host ls --filter colour=red".to_owned(),
            "invalid filter 'colour'",
        ),
    ] {
        let output = one.towline(&wrong);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && error.contains(words),
            "{wrong}: {error}"
        );
    }
    one.refused(
        &format!("host update --role manager {}", two.name),
        2,
        &["not built yet"],
    );
    one.refused(
        &format!("host update --availability drain {}", two.name),
        2,
        &["not built yet"],
    );
}

#[test]
fn labels_outlive_the_manager_and_are_known_while_it_is_away() {
    let mut cluster = Cluster::joined(2, &["--label", "gpu=yes"]);
    let [manager, host] = &mut cluster.hosts[..] else {
        panic!("two hosts")
    };
    manager.ok(&format!("host update --label-add disk=ssd {}", host.name));
    wait_until("the host has said what it is", LIMIT, || {
        manager.json(&format!("host inspect {}", host.name))[0]["own_labels"]["gpu"] == "yes"
    });
    // The news of its label comes to the host by itself.
    host.ok(
        "run --rm --constraint node.labels.disk==ssd --constraint engine.labels.gpu==yes -- true",
    );
    manager.kill_agent();
    let mut command = host.command("run --rm --constraint node.labels.disk==ssd -- true");
    let output = host.netns.run(|| command.output()).unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("last heard of"),
        "{said}"
    );
    host.refused(
        "run --constraint node.labels.disk==hdd -- true",
        125,
        &["it has 'ssd'"],
    );
    manager.start_agent();
    wait_until("the manager answers", LIMIT, || {
        host.towline("host ls").status.success()
    });
    let shown = host.json(&format!("host inspect {}", host.name));
    assert_eq!(shown[0]["labels"]["disk"], "ssd");
}
