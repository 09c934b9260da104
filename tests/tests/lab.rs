//! `towline lab`: whole labs come up, carry packets, are measured, and go without a trace, whatever happens to them.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use netns::{Netlink, Netns};
use serde_json::Value;
use towline_tests::lab::{Lab, one_line, pairs};
use towline_tests::{sh, towline_bin, wait_until};

const LIMIT: Duration = Duration::from_secs(30);

fn end(mut child: Child) -> Output {
    child.kill().unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn a_lab_comes_up_and_goes_without_a_trace() {
    let lab = Lab::new();
    let up = lab.json("up", "--hosts 3 --containers 2");
    assert_eq!(up, lab.json("status", ""));
    assert_eq!(up["network"], "myoverlay");
    assert_eq!(up["subnet"], "10.0.9.0/24");
    assert_eq!((&up["wire"], &up["underlay"]), (&"mtu".into(), &"4".into()));
    let hosts = up["hosts"].as_array().unwrap();
    assert_eq!(hosts.len(), 3);
    for (index, host) in hosts.iter().enumerate() {
        let number = index + 1;
        assert_eq!(host["name"], lab.part(&format!("h{number}")));
        assert_eq!(host["address"], format!("192.0.2.{number}"));
        assert_eq!(host["agent"], "running");
        assert_eq!(host["manager"], number == 1);
        // Addresses are handed out in order, hosts and containers made in order.
        let expected: Vec<Value> = (1..=2)
            .map(|container| {
                serde_json::json!({
                    "name": lab.part(&format!("h{number}c{container}")),
                    "state": "running",
                    "ips": [format!("10.0.9.{}", 2 * index + container + 1)],
                })
            })
            .collect();
        assert_eq!(host["containers"], Value::from(expected));
    }

    let report = lab.json("ping", "--count 3");
    assert_eq!(report["ok"], true);
    assert_eq!(pairs(&report, "pairs", 3).len(), 30);
    let egress = pairs(&report, "egress", 3);
    assert_eq!(egress.len(), 6);
    assert!(egress.iter().all(|(_, to)| *to == lab.part("out")));
    let gateways = pairs(&report, "gateways", 3);
    assert_eq!(gateways.len(), 6);
    assert!(
        gateways.iter().all(|(_, to)| to.starts_with("172.")),
        "{gateways:?}"
    );
    let matrix = lab.done("ping", "--count 1");
    assert!(matrix.contains("42 of 42 pings answered"), "{matrix}");

    // Egress is translated: the outside sees the host.
    let outside = Netns::open(&lab.part("out")).unwrap();
    sh(&outside, "ping -c 1 -W 2 192.0.2.1");

    let refused = lab.refused("up", "");
    assert!(refused.contains("is there already"), "{refused}");
    lab.done("ping", "--count 1");

    lab.done("down", "");
    lab.assert_gone();
    let here = sh(&Netns::current().unwrap(), "ip -o link");
    assert!(!here.contains("towline"), "{here}");
    lab.done("down", "");
    let refused = lab.refused("ping", "");
    assert!(refused.contains("lab up --name"), "{refused}");
}

#[test]
fn exec_enters_hosts_and_containers_and_keeps_exit_codes() {
    let lab = Lab::up("--hosts 2 --containers 1");
    let exec = |part: &str, words: &[&str]| {
        let mut command = Command::new(towline_bin());
        command.args(["lab", "exec", "--name", &lab.name, &lab.part(part), "--"]);
        command.args(words).output().unwrap()
    };
    let stdout = |output: Output| String::from_utf8(output.stdout).unwrap();
    // `towline` is the one under test, and asks the host it is run on.
    for host in ["h1", "h2"] {
        let status: Value =
            serde_json::from_str(&stdout(exec(host, &["towline", "status", "--json"]))).unwrap();
        assert_eq!(status["name"], lab.part(host));
    }
    let inside = stdout(exec(
        "h2c1",
        &["sh", "-c", "ls /sys/class/net; echo $TOWLINE_SOCKET"],
    ));
    for part in ["eth0", "eth1", "/h2/agent.sock"] {
        assert!(inside.contains(part), "{inside}");
    }
    assert_eq!(exec("h1", &["sh", "-c", "exit 7"]).status.code(), Some(7));
    assert!(one_line(&exec("h1", &["/no/such/program"]), 127).contains("/no/such/program"));
    assert!(one_line(&exec("h1", &["/etc/passwd"]), 126).contains("/etc/passwd"));
    let unknown = one_line(&exec("h9", &["true"]), 1);
    assert!(
        unknown.contains(&lab.part("h9")) && unknown.contains(&lab.part("h2c1")),
        "{unknown}"
    );

    // A container under a name of the user's own is the lab's too.
    let own = format!("own-{}", lab.name);
    let run = [
        "towline",
        "run",
        "-d",
        "--name",
        &own,
        "--network",
        "myoverlay",
        "--",
        "sleep",
        "infinity",
    ];
    assert!(exec("h1", &run).status.success());
    let mut command = lab.command("exec", "");
    let listed = command
        .args([&own, "--", "towline", "ps", "--json"])
        .output()
        .unwrap();
    assert!(stdout(listed).contains(&own));
    assert_eq!(pairs(&lab.json("ping", "--count 1"), "pairs", 1).len(), 6);
    lab.done("down", "");
    lab.assert_gone();
    assert!(!Netns::exists(&own));
}

#[test]
fn down_works_after_a_crash_at_any_moment() {
    let lab = Lab::new();
    // Up to which namespace it comes, and whether the folder is lost as well.
    for (part, folder_lost) in [
        ("sw", false),
        ("h1", true),
        ("h2", false),
        ("h1c1", true),
        ("h2c2", false),
    ] {
        let mut up = lab.command("up", "--hosts 3 --containers 2");
        let up = up
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_until(part, LIMIT, || Netns::exists(&lab.part(part)));
        end(up);
        assert!(!lab.traces().is_empty());
        if folder_lost {
            // The agents of the crashed `up` still write into it.
            wait_until("the lab's folder is gone", LIMIT, || {
                std::fs::remove_dir_all(lab.folder()).is_ok() || !lab.folder().exists()
            });
        } else {
            let refused = lab.refused("ping", "");
            assert!(
                refused.contains("not complete") || refused.contains("no lab"),
                "{refused}"
            );
        }
        lab.done("down", "");
        lab.assert_gone();
    }
}

#[test]
fn an_interrupted_up_takes_back_what_it_made() {
    let lab = Lab::new();
    let mut up = lab.command("up", "--hosts 3 --containers 20");
    let up = up
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("a container", LIMIT, || Netns::exists(&lab.part("h1c1")));
    sh(
        &Netns::current().unwrap(),
        &format!("kill -INT {}", up.id()),
    );
    let line = one_line(&up.wait_with_output().unwrap(), 1);
    assert!(
        line.contains("was not made") && line.contains("interrupted"),
        "{line}"
    );
    lab.assert_gone();
}

#[test]
fn two_labs_live_side_by_side() {
    let first = Lab::up("--hosts 2 --containers 1");
    let second = Lab::up("--hosts 2 --containers 1");
    for lab in [&first, &second] {
        let report = lab.json("ping", "--count 2");
        assert_eq!(pairs(&report, "pairs", 2).len(), 2);
        assert_eq!(pairs(&report, "egress", 2).len(), 2);
    }
    first.done("down", "");
    first.assert_gone();
    assert_eq!(second.json("ping", "--count 2")["ok"], true);
}

#[test]
fn an_ipv6_underlay_carries_it_too() {
    let lab = Lab::up("--hosts 2 --containers 1 --underlay 6");
    let status = lab.json("status", "");
    assert_eq!(status["underlay"], "6");
    assert_eq!(status["hosts"][1]["address"], "2001:db8:2::2");
    assert_eq!(pairs(&lab.json("ping", "--count 2"), "pairs", 2).len(), 2);
    let container = Netns::open(&lab.part("h1c1")).unwrap();
    let link = Netlink::open(&container)
        .unwrap()
        .link("eth0")
        .unwrap()
        .unwrap();
    assert_eq!(link.mtu, 1500 - 70, "70 bytes go to the headers over IPv6");
}

#[test]
fn a_dead_agent_and_a_lost_path_are_shown() {
    let lab = Lab::up("--hosts 2 --containers 1");
    let pid = lab.json("status", "")["hosts"][1]["pid"].as_u64().unwrap();
    sh(&Netns::current().unwrap(), &format!("kill -KILL {pid}"));
    wait_until("the agent's end", LIMIT, || {
        lab.json("status", "")["hosts"][1]["agent"] == "stopped"
    });
    // The container is still there, its way out by the gateway bridge too; only the overlay is gone.
    let output = lab.try_run("ping", "--count 1 --json");
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ok"], false);
    let lost = report["pairs"].as_array().unwrap();
    assert!(
        lost.iter()
            .all(|pair| pair["received"] == 0 && pair["rtt_us"].is_null()),
        "{report}"
    );
    assert_eq!(pairs(&report, "egress", 1).len(), 2);
    let matrix = lab.try_run("ping", "--count 1");
    assert!(String::from_utf8_lossy(&matrix.stdout).contains("LOST 1/1"));
    lab.done("down", "");
    lab.assert_gone();
}

#[test]
fn a_bench_measures_every_load_over_every_path() {
    let lab = Lab::up("--hosts 2 --containers 1");
    let report = lab.json("bench", "--rounds 1 --seconds 1");
    assert_eq!(
        (&report["wire"], &report["rounds"], &report["seconds"]),
        (&"mtu".into(), &1.into(), &1.into())
    );
    assert!(
        report["machine"]["cpus"].as_u64().unwrap() > 0,
        "{}",
        report["machine"]
    );
    let results = report["results"].as_array().unwrap();
    let mut expected = Vec::new();
    for load in ["tcp1", "tcp4", "udp64", "udpmix", "udpmix1372", "rr"] {
        expected.extend(["underlay", "kernel", "towline", "plain"].map(|path| (load, path)));
    }
    let measured: Vec<(&str, &str)> = results
        .iter()
        .map(|row| (row["load"].as_str().unwrap(), row["path"].as_str().unwrap()))
        .collect();
    assert_eq!(measured, expected);
    for row in results {
        let number = |name: &str| {
            row[name]
                .as_f64()
                .unwrap_or_else(|| panic!("{name} in {row}"))
        };
        assert!(number("median") > 0.0 && number("cpu") > 0.0, "{row}");
        assert!(
            number("min") <= number("median") && number("median") <= number("max"),
            "{row}"
        );
        assert_eq!(row["samples"].as_array().unwrap().len(), 1, "{row}");
        assert!(
            number("vs_kernel") > 0.0 && number("vs_underlay") > 0.0,
            "{row}"
        );
        assert_eq!(row["p50_us"].is_number(), row["load"] == "rr", "{row}");
        assert_eq!(row["p99_us"].is_number(), row["load"] == "rr", "{row}");
        let unit = row["unit"].as_str().unwrap();
        assert_eq!(
            row["cpu_unit"],
            match unit {
                "Gbit/s" => "s/GB",
                "packets/s" => "us/packet",
                _ => "us/transaction",
            }
        );
    }
    // What it added is gone; the lab is as it was.
    let names = Netns::list().unwrap();
    for added in ["k1", "k1c1", "k2", "p1", "p1c1", "p2"] {
        assert!(!names.contains(&lab.part(added)), "{added}");
    }
    assert_eq!(lab.json("ping", "--count 1")["ok"], true);
    lab.done("down", "");
    lab.assert_gone();
}

#[test]
fn the_wire_carries_what_was_asked_for() {
    let mean_frame = |wire: &str| {
        let lab = Lab::up(&format!("--hosts 2 --containers 0 --wire {wire}"));
        lab.json(
            "bench",
            "--only tcp1 --paths underlay --rounds 1 --seconds 1",
        );
        let counter = |name: &str| {
            let path = format!("/sys/class/net/h1/statistics/{name}");
            let mut exec = lab.command("exec", "");
            let output = exec
                .args([&lab.part("sw"), "--", "cat", &path])
                .output()
                .unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            text.trim().parse::<u64>().unwrap()
        };
        // What the switch received from the sender, all but the acknowledgements' way.
        counter("rx_bytes") / counter("rx_packets")
    };
    let mtu = mean_frame("mtu");
    assert!((1000..=1514).contains(&mtu), "{mtu} bytes a frame");
    let gso = mean_frame("gso");
    assert!(gso > 2 * 1514, "{gso} bytes a frame");
}

#[test]
fn a_killed_bench_leaves_what_the_next_command_removes() {
    let lab = Lab::up("--hosts 2 --containers 1 --wire gso");
    let mut bench = lab.command("bench", "--only rr --paths kernel,plain --seconds 60");
    let bench = bench
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the bench's own hosts", LIMIT, || {
        Netns::exists(&lab.part("p2c1"))
    });
    let refused = lab.refused("down", "");
    assert!(refused.contains("another 'towline lab'"), "{refused}");
    end(bench);
    let report = lab.json("bench", "--only rr --paths kernel --rounds 2 --seconds 1");
    assert_eq!(report["wire"], "gso");
    assert_eq!(report["results"][0]["samples"].as_array().unwrap().len(), 2);
    assert!(report["results"][0]["vs_underlay"].is_null());
    assert!(!Netns::exists(&lab.part("p1")));
    lab.done("down", "");
    lab.assert_gone();
}

#[test]
fn bad_input_is_named_and_changes_nothing() {
    let lab = Lab::new();
    assert!(
        lab.refused("up", "--subnet 10.0.9.1/24")
            .contains("it should be 10.0.9.0/24")
    );
    assert!(
        lab.refused("up", "--subnet 10.0.9.0/30")
            .contains("has room for 1")
    );
    for (command, options) in [
        ("up", "--hosts 0"),
        ("up", "--hosts 201"),
        ("up", "--wire fast"),
        ("up", "--underlay 5"),
        ("ping", "--count 0"),
        ("bench", "--only everything"),
        ("bench", "--rounds 0"),
    ] {
        let output = lab.try_run(command, options);
        assert_eq!(output.status.code(), Some(2), "lab {command} {options}");
    }
    for name in ["a/b", "a b", "", "-", "A", &"x".repeat(300)] {
        let output = Command::new(towline_bin())
            .args(["lab", "up", "--name", name])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "'{name}'");
    }
    lab.assert_gone();

    // A namespace of the lab's names that somebody else made.
    let other = towline_tests::TestNetns::new(lab.part("h1"));
    assert!(lab.refused("up", "").contains(other.name()));
    drop(other);

    let lab = Lab::up("--hosts 1 --containers 1");
    assert!(lab.refused("bench", "").contains("two hosts"));
    drop(lab);
    let lab = Lab::up("--hosts 2 --containers 0");
    assert!(lab.refused("ping", "").contains("no containers"));
    let refused = lab.refused("bench", "--only rr --paths towline");
    assert!(refused.contains("--containers 1"), "{refused}");
    let mut bench = lab.command("bench", "--only tcp1 --paths underlay");
    let refused = one_line(&bench.env("PATH", "/nonexistent").output().unwrap(), 1);
    assert!(
        refused.contains("'iperf3' is missing") && refused.contains("apt-get install iperf3"),
        "{refused}"
    );
    lab.done("down", "");
    lab.assert_gone();
}
