//! Ends of containers: what is left when any of the processes involved is killed at any moment.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::io::{BufRead, BufReader, Read};
use std::process::Command;
use std::time::Duration;

use netns::{Netlink, Netns};
use towline_tests::cluster::Cluster;
use towline_tests::container::{
    LIMIT, assert_gone, container, holders, host_interfaces, is_alive, one_host, pid, script,
    signal, spawn, stat,
};
use towline_tests::wait_until;

#[test]
fn a_killed_shim_takes_its_command_along() {
    let mut cluster = one_host();
    let name = cluster.container("c");
    let host = &mut cluster.hosts[0];
    for agent_is_down in [false, true] {
        host.ok(&format!(
            "run -d --name {name} --network myoverlay -- sleep infinity"
        ));
        let command = pid(host, &name);
        if agent_is_down {
            host.kill_agent();
        }
        signal("KILL", stat(command, 4));
        wait_until("the command dies with its shim", LIMIT, || {
            !is_alive(command)
        });
        if agent_is_down {
            host.start_agent();
        }
        wait_until("the end is noticed", LIMIT, || {
            container(host, &name).is_some_and(|container| container["exit_code"] == 137)
        });
        assert!(!Netns::exists(&name) && host_interfaces(host).is_empty());
        host.ok(&format!("rm {name}"));
        assert_gone(host, "myoverlay", &name);
    }
}

#[test]
fn what_a_command_leaves_behind_is_killed() {
    let cluster = one_host();
    let host = &cluster.hosts[0];
    let name = cluster.container("c");
    // A daemon in a session of its own, and one that has left the namespace too.
    let text = "setsid sleep 86341 & setsid unshare -n sleep 86342 & \
                until [ -e /sys/class/net/probe ]; do sleep 0.05; done; echo done";
    let mut client = spawn(
        host,
        script(
            host,
            &format!("run --rm --name {name} --network myoverlay"),
            text,
        ),
    );
    // Its name is there a moment before it is.
    wait_until("the namespace is there", LIMIT, || {
        Netns::open(&name).is_ok()
    });
    // Gone with the namespace, and not only with its name.
    let switch = Netlink::open(&cluster.switch).unwrap();
    switch
        .add_veth("probe", "probe", &Netns::open(&name).unwrap())
        .unwrap();
    assert_eq!(client.wait().unwrap().code(), Some(0));
    let mut said = String::new();
    client
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(said, "done\n");
    let left = Command::new("ps").args(["-eo", "args"]).output().unwrap();
    let left = String::from_utf8_lossy(&left.stdout).into_owned();
    assert!(
        !left.contains("sleep 86341") && !left.contains("sleep 86342"),
        "{left}"
    );
    wait_until("the namespace is gone", LIMIT, || {
        switch.link("probe").unwrap().is_none()
    });
    assert_gone(host, "myoverlay", &name);
}

#[test]
fn a_client_killed_at_any_moment_leaves_nothing_half_made() {
    let cluster = one_host();
    let host = &cluster.hosts[0];
    let name = cluster.container("c");
    for delay in (0..120).step_by(8) {
        let run = format!("run -d --name {name} --network myoverlay -- sleep infinity");
        let mut client = spawn(host, host.command(&run));
        std::thread::sleep(Duration::from_millis(delay));
        let _ = client.kill();
        client.wait().unwrap();
        // Started, or gone without a trace: nothing between.
        wait_until(&format!("after {delay} ms: all or nothing"), LIMIT, || {
            container(host, &name).map_or(!Netns::exists(&name), |container| {
                container["state"] == "running"
            })
        });
        host.ok(&format!("rm -f {name}"));
        assert_gone(host, "myoverlay", &name);
    }
}

#[test]
fn an_agent_killed_at_any_moment_of_a_start_leaves_nothing_half_made() {
    let mut cluster = one_host();
    let name = cluster.container("c");
    let host = &mut cluster.hosts[0];
    for delay in (0..120).step_by(8) {
        let run = format!("run -d --name {name} --network myoverlay -- sleep infinity");
        let mut client = spawn(host, host.command(&run));
        std::thread::sleep(Duration::from_millis(delay));
        host.kill_agent();
        client.wait().unwrap();
        host.start_agent();
        wait_until(&format!("after {delay} ms: all or nothing"), LIMIT, || {
            container(host, &name).map_or(!Netns::exists(&name), |container| {
                container["state"] == "running"
            })
        });
        host.ok(&format!("rm -f {name}"));
        assert_gone(host, "myoverlay", &name);
    }
}

#[test]
fn an_agent_killed_at_any_moment_of_an_end_leaves_nothing() {
    let mut cluster = one_host();
    let name = cluster.container("c");
    let host = &mut cluster.hosts[0];
    for delay in (0..60).step_by(6) {
        host.ok(&format!(
            "run -d --rm --name {name} --network myoverlay -- sleep infinity"
        ));
        let command = pid(host, &name);
        signal("KILL", command);
        std::thread::sleep(Duration::from_millis(delay));
        host.kill_agent();
        host.start_agent();
        assert_gone(host, "myoverlay", &name);
    }
}

#[test]
fn a_client_that_dies_in_the_foreground_leaves_the_container_running() {
    let cluster = one_host();
    let host = &cluster.hosts[0];
    let name = cluster.container("c");
    let text = "echo ready; while :; do echo tick; sleep 0.02; done";
    let mut client = spawn(host, script(host, &format!("run --name {name}"), text));
    let mut said = BufReader::new(client.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "ready");
    client.kill().unwrap();
    client.wait().unwrap();
    // Nobody reads its output any more: it must not mind.
    drop(said);
    let before = host.ok(&format!("logs {name}")).len();
    wait_until("it prints on", LIMIT, || {
        host.ok(&format!("logs {name}")).len() > before
    });
    host.ok(&format!("rm -f {name}"));
    assert_gone(host, "myoverlay", &name);
}

#[test]
fn what_ends_while_no_manager_answers_is_free_once_one_does() {
    let mut cluster = Cluster::joined(2, &[]);
    cluster.hosts[0].ok("network create --subnet 10.0.9.0/24 -d overlay myoverlay");
    let names = [cluster.container("c1"), cluster.container("c2")];
    for name in &names {
        cluster.hosts[1].ok(&format!(
            "run -d --name {name} --network myoverlay -- sleep infinity"
        ));
    }
    cluster.hosts[0].kill_agent();
    let [_, host] = &mut cluster.hosts[..] else {
        unreachable!("two were asked for")
    };
    // Cut off, a host still clears away, and an agent that is killed then has not forgotten.
    host.ok(&format!("rm -f {}", names[0]));
    assert!(!Netns::exists(&names[0]));
    signal("KILL", pid(host, &names[1]));
    wait_until("the end is noticed", LIMIT, || !Netns::exists(&names[1]));
    host.kill_agent();
    host.start_agent();
    assert_eq!(container(host, &names[1]).unwrap()["state"], "exited");
    cluster.hosts[0].start_agent();
    let [manager, host] = &cluster.hosts[..] else {
        unreachable!("two were asked for")
    };
    wait_until("the addresses are free", LIMIT, || {
        let holders = holders(manager, "myoverlay");
        !names.iter().any(|name| holders.contains(name.as_str()))
    });
    // The removed one's name too; the ended one keeps its own until it is removed.
    wait_until("the name is free", LIMIT, || {
        manager
            .towline(&format!("run --rm --name {} -- true", names[0]))
            .status
            .success()
    });
    manager.refused(
        &format!("run --name {} -- true", names[1]),
        125,
        &[&names[1], host.name.as_str()],
    );
    host.ok(&format!("rm {}", names[1]));
    manager.ok(&format!("run --rm --name {} -- true", names[1]));
}
