//! Networks as people list, look at and prune them.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use serde_json::Value;
use towline_tests::cluster::Cluster;

const FAILED: i32 = 1;
const USAGE: i32 = 2;

#[test]
fn lists_are_filtered_and_shown_as_people_are_used_to() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    let id = host.ok("network create --label tier=back --label disk one");
    let id = id.trim();
    host.ok("network create --internal --label tier=front inner");
    host.ok("network create --attachable=false closed");
    let table = host.ok("network ls");
    let heading: Vec<&str> = table.lines().next().unwrap().split("  ").collect();
    let heading: Vec<&str> = heading
        .iter()
        .map(|word| word.trim())
        .filter(|word| !word.is_empty())
        .collect();
    assert_eq!(heading, ["NETWORK ID", "NAME", "DRIVER", "SCOPE"]);
    assert!(table.contains(&id[..12]) && !table.contains(id), "{table}");
    let names = |filters: &str| {
        let listed = host.ok(&format!("network ls --format {{{{.Name}}}} {filters}"));
        listed
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    for (filters, expected) in [
        ("", &["closed", "ingress", "inner", "one"][..]),
        ("--filter label=tier", &["inner", "one"]),
        ("--filter label=tier=back", &["one"]),
        ("--filter label=tier --filter label=disk", &["one"]),
        ("--filter name=in", &["ingress", "inner"]),
        ("--filter name=one --filter name=clo", &["closed", "one"]),
        ("--filter driver=overlay --filter name=one", &["one"]),
        ("--filter driver=bridge", &[]),
        (
            "--filter scope=cluster --filter type=custom --filter name=inner",
            &["inner"],
        ),
        ("--filter type=builtin", &[]),
        (&format!("--filter id={}", &id[..12]), &["one"]),
    ] {
        assert_eq!(names(filters), expected, "{filters}");
    }
    assert_eq!(
        host.ok("network ls -q --no-trunc --filter name=one").trim(),
        id
    );
    let shown = host.ok("network ls --filter name=inner --format {{.Internal}}/{{.Labels}}");
    assert_eq!(shown, "true/tier=front\n");
    for (args, code, word) in [
        (
            "network ls --filter colour=red",
            FAILED,
            "invalid filter 'colour'",
        ),
        ("network ls --filter name", FAILED, "invalid filter 'name'"),
        ("network ls --filter type=other", FAILED, "'type'='other'"),
        (
            "network ls --format {{.Colour}}",
            FAILED,
            "no field 'Colour'",
        ),
        ("network ls --format {{.Name", FAILED, "has no '}}'"),
        ("network prune -f --filter until=soon", FAILED, "until=soon"),
        (
            "network create --opt dns-ttl=9999 x",
            FAILED,
            "at most 3600 s",
        ),
        (
            "network create --ingress --internal x",
            FAILED,
            "is already present",
        ),
        (
            "network connect --gw-priority 1 one c1",
            USAGE,
            "not built yet",
        ),
        (
            "network connect one nobody",
            FAILED,
            "no container \"nobody\"",
        ),
        (
            "network disconnect one nobody",
            FAILED,
            "no container \"nobody\"",
        ),
    ] {
        host.refused(args, code, &[word]);
    }

    // What is used is not pruned, whoever uses it.
    let c1 = cluster.container("c1");
    host.ok(&format!(
        "run -d --name {c1} --network inner -- sleep infinity"
    ));
    host.refused(
        &format!("network connect inner {c1}"),
        FAILED,
        &["endpoint with name", "already exists in network inner"],
    );
    host.refused(
        &format!("network connect nowhere {c1}"),
        FAILED,
        &["nowhere", "not found"],
    );
    host.refused(
        &format!("network connect ingress {c1}"),
        FAILED,
        &["carries published ports"],
    );
    host.refused(
        &format!("network connect closed {c1}"),
        FAILED,
        &["network closed not manually attachable"],
    );
    host.refused(
        &format!("network connect --ip 10.99.0.1 one {c1}"),
        FAILED,
        &["10.99.0.1"],
    );
    host.refused(
        &format!("network disconnect one {c1}"),
        FAILED,
        &["is not connected to network"],
    );
    host.refused(
        &format!("network disconnect nowhere {c1}"),
        FAILED,
        &["not found"],
    );
    host.refused(
        "network rm inner",
        FAILED,
        &["network inner has active endpoints (name:", "id:"],
    );
    host.ok("service create --name web --network closed");
    host.refused(
        "run --network closed -- true",
        125,
        &["network closed not manually attachable"],
    );
    let serving = cluster.container("serving");
    host.ok(&format!(
        "run -d --name {serving} --service web -- sleep infinity"
    ));
    host.ok(&format!("rm -f {serving}"));
    host.refused(
        "network rm closed",
        FAILED,
        &["network closed is in use by service web"],
    );
    let ended = cluster.container("ended");
    host.ok(&format!("run --name {ended} --network one -- true"));
    for change in ["connect", "disconnect"] {
        let change = format!("network {change} one {ended}");
        host.refused(&change, FAILED, &["does not run", "has ended"]);
    }
    let kept = host.json("network prune -f --filter label!=disk --json");
    assert_eq!(kept, Value::Array(Vec::new()));
    let pruned = host.ok("network prune -f");
    assert_eq!(pruned, "Deleted Networks:\none\n");
    assert_eq!(names(""), ["closed", "ingress", "inner"]);
    assert_eq!(host.ok("network prune -f"), "");
    // Nobody to ask is a no.
    host.ok("network create two");
    host.ok("network prune");
    assert_eq!(names("--filter name=two"), ["two"]);
}
