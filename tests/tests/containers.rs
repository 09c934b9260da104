//! Containers as real processes: exit codes, output, signals, names, interfaces.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use netns::{Netlink, Netns};
use serde_json::Value;
use towline_tests::cluster::Cluster;
use towline_tests::container::{
    LIMIT, assert_gone, code, container, holders, host_interfaces, is_alive, one_host, output, pid,
    script, signal, spawn, stat,
};
use towline_tests::{sh, wait_until};

#[test]
fn exit_codes_are_dockers() {
    let cluster = one_host();
    let host = &cluster.hosts[0];
    let name = cluster.container("c");
    for (script_text, expected) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -9 $$", 137),
        ("kill -TERM $$", 143),
    ] {
        let ran = output(
            host,
            script(
                host,
                &format!("run --rm --name {name} --network myoverlay"),
                script_text,
            ),
        );
        assert_eq!(
            ran.status.code(),
            Some(expected),
            "{script_text}: {}",
            String::from_utf8_lossy(&ran.stderr)
        );
        // `--rm` is done when `run` returns.
        assert!(!Netns::exists(&name) && container(host, &name).is_none());
    }
    host.refused(
        &format!("run --name {name} --network myoverlay -- no-such-command"),
        127,
        &["no-such-command"],
    );
    host.refused(
        &format!("run -d --name {name} -- no-such-command"),
        127,
        &["no-such-command"],
    );
    host.refused(
        &format!("run --name {name} -- /etc/passwd"),
        126,
        &["/etc/passwd"],
    );
    host.refused(
        &format!("run --name {name} --network nowhere -- true"),
        125,
        &["nowhere"],
    );
    assert_gone(host, "myoverlay", &name);

    host.ok(&format!("run --name {name} --network myoverlay -- true"));
    let ended = container(host, &name).expect("kept until it is removed");
    assert_eq!(
        (&ended["state"], &ended["exit_code"]),
        (&Value::from("exited"), &Value::from(0))
    );
    assert!(!Netns::exists(&name) && host_interfaces(host).is_empty());
    assert!(
        !holders(host, "myoverlay").contains(&name),
        "its address is free"
    );
    host.refused(
        &format!("run --name {name} -- true"),
        125,
        &[&name, "towline rm"],
    );
    host.ok(&format!("rm {name}"));
    assert_gone(host, "myoverlay", &name);
}

#[test]
fn in_the_foreground_it_has_the_callers_input_and_output() {
    let cluster = one_host();
    let host = &cluster.hosts[0];
    let name = cluster.container("c");
    let mut running = spawn(
        host,
        script(
            host,
            &format!("run --name {name}"),
            "cat; echo wrong >&2; exit 3",
        ),
    );
    let mut input = running.stdin.take().unwrap();
    input.write_all(b"in and out\n").unwrap();
    drop(input);
    let ran = running.wait_with_output().unwrap();
    assert_eq!(ran.status.code(), Some(3));
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "in and out\n");
    assert_eq!(String::from_utf8_lossy(&ran.stderr), "wrong\n");
    let log = host.ok(&format!("logs {name}"));
    assert!(
        log.contains("in and out\n") && log.contains("wrong\n"),
        "{log}"
    );
    host.ok(&format!("rm {name}"));

    // More than all pipes on the way hold, to a reader that starts late.
    let many = script(host, "run --rm", "head -c 3000000 /dev/zero");
    assert_eq!(output(host, many).stdout.len(), 3_000_000);
}

#[test]
fn signals_reach_the_command_and_only_it() {
    let cluster = one_host();
    let host = &cluster.hosts[0];
    let name = cluster.container("c");
    let text = "trap 'echo usr; exit 42' USR1; trap 'echo int' INT; echo ready; while :; do sleep 0.02; done";
    let mut client = spawn(host, script(host, &format!("run --rm --name {name}"), text));
    let mut said = BufReader::new(client.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "ready");
    signal("INT", client.id());
    assert_eq!(said.next().unwrap().unwrap(), "int");
    signal("USR1", client.id());
    assert_eq!(said.next().unwrap().unwrap(), "usr");
    assert_eq!(client.wait().unwrap().code(), Some(42));
    assert_gone(host, "myoverlay", &name);
}

#[test]
fn the_command_has_a_shim_of_its_own_for_a_parent() {
    let mut cluster = one_host();
    let name = cluster.container("c");
    let host = &mut cluster.hosts[0];
    assert_eq!(
        host.ok(&format!(
            "run -d --name {name} --network myoverlay -- sleep infinity"
        ))
        .trim(),
        name
    );
    let command = pid(host, &name);
    let (shim, session) = (stat(command, 4), stat(command, 6));
    let line = std::fs::read_to_string(format!("/proc/{shim}/cmdline")).unwrap();
    assert!(line.starts_with("towline\0shim\0"), "{line}");
    assert_eq!(session, command, "the command leads a session");
    assert_eq!(stat(shim, 6), shim, "and so does the shim");

    // It works on while no agent runs, and the next one knows it.
    host.kill_agent();
    assert!(is_alive(command));
    host.start_agent();
    assert_eq!(pid(host, &name), command);
    host.ok(&format!("exec {name} -- ping -c 1 -W 5 10.0.9.1"));
    host.ok(&format!("rm -f {name}"));
    assert!(!is_alive(command) && !is_alive(shim));
    assert_gone(host, "myoverlay", &name);
}

#[test]
fn exec_is_inside_and_ends_with_the_container() {
    let cluster = one_host();
    let host = &cluster.hosts[0];
    let name = cluster.container("c");
    host.ok(&format!(
        "run -d --name {name} --network myoverlay -- sleep infinity"
    ));
    let links = host.ok(&format!("exec {name} -- ls /sys/class/net"));
    assert_eq!(
        links.split_whitespace().collect::<Vec<_>>(),
        ["eth0", "eth1", "lo"],
        "its own /sys"
    );
    assert_eq!(
        output(host, script(host, &format!("exec {name}"), "exit 5"))
            .status
            .code(),
        Some(5)
    );
    host.refused(
        &format!("exec {name} -- no-such-command"),
        127,
        &["no-such-command"],
    );
    host.refused(
        &format!("exec {name} -- /etc/passwd"),
        126,
        &["/etc/passwd"],
    );
    assert_eq!(
        code(host, &format!("exec {name} ls -l /")),
        0,
        "the command's own option"
    );
    host.refused("exec nobody -- true", 125, &["nobody", "towline ps"]);

    let mut inside = spawn(
        host,
        script(
            host,
            &format!("exec {name}"),
            "echo in; exec sleep infinity",
        ),
    );
    let mut said = String::new();
    BufReader::new(inside.stdout.as_mut().unwrap())
        .read_line(&mut said)
        .unwrap();
    assert_eq!(said, "in\n");
    host.refused(&format!("rm {name}"), 1, &[&name, "running", "rm -f"]);
    host.ok(&format!("rm -f {name}"));
    assert_eq!(inside.wait().unwrap().signal(), Some(9));
    assert_gone(host, "myoverlay", &name);
    assert_eq!(
        code(host, &format!("rm -f {name}")),
        0,
        "a second time is harmless"
    );
    host.refused(&format!("rm {name}"), 1, &[&name, "towline ps"]);
}

#[test]
fn logs_follow_to_the_end() {
    let cluster = one_host();
    let host = &cluster.hosts[0];
    let name = cluster.container("c");
    let fifo = host.state_dir().join("go");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let text = format!("echo one; cat {} >&2; echo three", fifo.display());
    let started = output(host, script(host, &format!("run -d --name {name}"), &text));
    assert_eq!(
        started.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&started.stderr)
    );
    let mut following = spawn(host, host.command(&format!("logs -f {name}")));
    let mut said = BufReader::new(following.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "one");
    std::fs::write(&fifo, "two\n").unwrap();
    assert_eq!(said.next().unwrap().unwrap(), "two");
    assert_eq!(said.next().unwrap().unwrap(), "three");
    assert!(said.next().is_none(), "it ends with the container");
    assert!(following.wait().unwrap().success());
    wait_until("it is cleared away", LIMIT, || !Netns::exists(&name));
    assert_eq!(host.ok(&format!("logs {name}")), "one\ntwo\nthree\n");
    host.ok(&format!("rm {name}"));
    assert!(!host.ok("ps -a").contains(&name));
}

#[test]
fn without_a_network_it_has_the_gateway_bridge_alone() {
    let cluster = one_host();
    let host = &cluster.hosts[0];
    let name = host.ok("run -d -- sleep infinity").trim().to_owned();
    let netns = Netns::open(&name).unwrap();
    let routes = sh(&netns, "ip route show default");
    assert!(routes.contains("dev eth0"), "{routes}");
    assert!(
        Netlink::open(&netns)
            .unwrap()
            .link("eth1")
            .unwrap()
            .is_none()
    );
    let shown = container(host, &name).unwrap();
    assert_eq!(shown["gwbridge"]["interface"], "eth0");
    let interface = shown["gwbridge"]["host_interface"].as_str().unwrap();
    let link = Netlink::open(&host.netns)
        .unwrap()
        .link(interface)
        .unwrap()
        .expect("its other end is on the host");
    assert_eq!(link.alias, Some(format!("towline container {name}")));
    let id = shown["id"].as_str().unwrap();
    host.ok(&format!("rm -f {}", &id[..6]));
    assert_gone(host, "myoverlay", &name);
}

#[test]
fn names_that_are_taken_or_impossible_are_refused() {
    let cluster = Cluster::joined(2, &[]);
    let [one, other] = &cluster.hosts[..] else {
        unreachable!("two were asked for")
    };
    let name = cluster.container("c");
    one.ok(&format!("run -d --name {name} -- sleep infinity"));
    one.refused(
        &format!("run --name {name} -- true"),
        125,
        &[&name, "--name"],
    );
    // Network namespaces are the machine's here: the other host sees a foreign one.
    other.refused(&format!("run --name {name} -- true"), 125, &[&name]);
    one.ok(&format!("rm -f {name}"));
    other.ok(&format!("run --rm --name {name} -- true"));

    let foreign = towline_tests::TestNetns::new(cluster.container("foreign"));
    one.refused(
        &format!("run --name {} -- true", foreign.name()),
        125,
        &[foreign.name(), "ip netns"],
    );
    assert!(Netns::exists(foreign.name()), "it is not ours to delete");
    // Refusing it left its name to the cluster.
    for bad in ["../c", "a/b", "Upper", "-x", &"x".repeat(300)] {
        one.refused(&format!("run --name={bad} -- true"), 125, &["a-z0-9"]);
    }
    for option in ["--mount=type=cluster,target=/a", "-t", "-P", "--hostname=x"] {
        one.refused(&format!("run {option} -- true"), 2, &["not built yet"]);
    }
    assert_eq!(code(one, "run --no-such-option -- true"), 2);
    assert_eq!(
        code(one, "run --rm echo --no-such-option"),
        0,
        "the command's own option"
    );
    assert!(one.json("ps -a --json").as_array().unwrap().is_empty());
}

#[test]
fn interfaces_come_in_the_order_of_the_networks() {
    let cluster = one_host();
    let host = &cluster.hosts[0];
    host.ok("network create --subnet 10.0.20.0/24 --subnet fd00:20::/64 second");
    let name = cluster.container("c");
    host.ok(&format!(
        "run -d --name {name} --network myoverlay --network second --ip 10.0.9.77 --mac-address 02:00:5e:10:00:77 \
         -- sleep infinity"
    ));
    let netns = Netns::open(&name).unwrap();
    let netlink = Netlink::open(&netns).unwrap();
    let addresses = netlink.addresses().unwrap();
    let has = |interface: &str, net: &str| {
        let net = net.parse::<ipnet::IpNet>().unwrap();
        addresses
            .iter()
            .any(|address| address.ifname == interface && address.net == net)
    };
    assert!(
        has("eth0", "10.0.9.77/24") && has("eth1", "10.0.20.2/24"),
        "{addresses:?}"
    );
    let eth0 = netlink.link("eth0").unwrap().expect("the first network's");
    assert_eq!(
        (eth0.mac, eth0.mtu, eth0.up),
        ([0x02, 0, 0x5e, 0x10, 0, 0x77], 1450, true)
    );
    for family in ["-4", "-6"] {
        let default = sh(&netns, &format!("ip {family} route show default"));
        assert!(default.contains("dev eth2"), "{default}");
        assert_eq!(
            default.lines().count(),
            1,
            "no router advertises another: {default}"
        );
    }
    let tentative = sh(&netns, "ip -6 address show scope global tentative");
    assert_eq!(tentative, "", "addresses can be used at once");
    let shown = container(host, &name).unwrap();
    assert_eq!(shown["endpoints"][0]["ips"][0], "10.0.9.77");
    assert_eq!(shown["endpoints"][1]["network"], "second");

    let other = cluster.container("d");
    for (options, word) in [
        ("--network myoverlay --ip 10.0.9.77", "10.0.9.77"),
        ("--network myoverlay --ip 192.0.2.77", "192.0.2.77"),
        (
            "--network myoverlay --mac-address 02:00:5e:10:00:77",
            "02:00:5e:10:00:77",
        ),
        ("--network myoverlay --network myoverlay", "twice"),
        ("--ip 10.0.9.78", "--network"),
    ] {
        host.refused(
            &format!("run --name {other} {options} -- true"),
            125,
            &[word],
        );
        assert!(
            !Netns::exists(&other) && container(host, &other).is_none(),
            "{options}"
        );
    }
    host.ok(&format!("rm -f {name}"));
    assert_gone(host, "myoverlay", &name);
    assert!(!holders(host, "second").contains(&name));
}
