//! Services on whole hosts: members that come, go and turn unhealthy, and hosts and managers that are lost.
//!
//! ```text
//!   client (192.0.2.254, the switch) ──▶ any host:8080 ──▶ any member, on any host
//! ```
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use netns::Netns;
use towline_tests::cluster::{Cluster, Host};
use towline_tests::service::{ANSWER_LIMIT, Asked, Asking, Load, Server, ask, none_failed};
use towline_tests::web::{
    CHECKED, LIMIT, QUESTION_LIMIT, Web, at, connect, promised, stopped_after, tell_last_failure,
};
use towline_tests::{sh, wait_until};

#[test]
fn a_member_that_is_killed_or_unhealthy_gets_no_new_connections() {
    let mut web = Web::new(3, &[], CHECKED);
    let [killed, unhealthy, living] =
        [(0, "killed"), (1, "unhealthy"), (2, "living")].map(|(host, name)| web.add(host, name));
    web.wait_serving(&[0, 1, 2], 3);
    let targets = web.ports_of(&[0, 1, 2]);
    let mut open = web.connect(&[targets.clone(), targets.clone(), targets.clone()].concat());
    let answered: Vec<String> = open
        .iter_mut()
        .map(|asking| asking.ask().unwrap().member)
        .collect();
    let load = Load::start(web.client(), &targets, QUESTION_LIMIT);

    let host = &web.cluster.hosts[0];
    let listed = host.json("ps --json");
    let pid = listed.as_array().unwrap()[0]["pid"].clone();
    let killed_at = Instant::now();
    sh(&host.netns, &format!("kill -9 {pid}"));
    web.members.remove(&killed);
    web.wait_serving(&[0, 1, 2], 2);
    let from = promised(killed_at, Duration::from_secs(1));
    let asked = stopped_after(load, from);
    tell_last_failure(&asked, killed_at, "a member was killed");
    none_failed(&asked, from, "a member was killed");

    let load = Load::start(web.client(), &targets, QUESTION_LIMIT);
    web.members.get_mut(&unhealthy).unwrap().server = None;
    let unwell_at = Instant::now();
    web.wait_serving(&[0, 1, 2], 1);
    // A check finds out within its interval, and everybody within a second of that.
    let from = promised(unwell_at, Duration::from_millis(1100));
    let asked = stopped_after(load, from);
    tell_last_failure(&asked, unwell_at, "a member turned unhealthy");
    none_failed(&asked, from, "a member is unhealthy");
    let members = |asked: &Asked| asked.result.clone().unwrap().member;
    let mut since = asked.iter().filter(|asked| asked.at >= from);
    assert!(since.all(|asked| members(asked) == living));
    let shown = web.cluster.hosts[1].json("ps --json");
    let health = shown[0]["service"]["health"].as_str().unwrap();
    assert!(health.starts_with("unhealthy"), "{health}");

    // Those that were open to a healthy member are still.
    let mut went_on = 0;
    for (asking, member) in open.iter_mut().zip(&answered) {
        if *member == living {
            assert_eq!(asking.ask().unwrap().member, living);
            went_on += 1;
        }
    }
    assert!(went_on > 0, "{answered:?}");
    // It comes back by itself when it is well again.
    let netns = web.members[&unhealthy].netns.clone();
    web.members.get_mut(&unhealthy).unwrap().server = Some(Server::tcp(&netns, &unhealthy, 80));
    web.wait_serving(&[0, 1, 2], 2);
}

#[test]
fn a_host_that_is_lost_takes_nobodys_connections() {
    let started = Instant::now();
    let mut web = Web::new(3, &[], "");
    let [_, _, lost] = [0, 1, 2].map(|host| web.add(host, &format!("m{host}")));
    web.wait_serving(&[0, 1], 3);
    // Hosts are given ten seconds to come back to a manager that has just started.
    std::thread::sleep(Duration::from_secs(11).saturating_sub(started.elapsed()));
    let targets = web.ports_of(&[0, 1]);
    // Each in turn: every target's connections reach all members.
    let mut open = web.connect(&[targets.clone(), targets.clone(), targets.clone()].concat());
    let answered: Vec<String> = open
        .iter_mut()
        .map(|asking| asking.ask().unwrap().member)
        .collect();
    let load = Load::start(web.client(), &targets, QUESTION_LIMIT);
    // As if its power were cut.
    let lost_at = Instant::now();
    sh(&web.cluster.switch, "ip link set p3 down");
    web.wait_serving(&[0, 1], 2);
    let from = promised(lost_at, Duration::from_secs(4));
    let asked = stopped_after(load, from);
    tell_last_failure(&asked, lost_at, "a host was lost");
    none_failed(&asked, from, "a host was lost");
    // Those that were open to the members elsewhere are still.
    for (asking, member) in open.iter_mut().zip(&answered) {
        if *member != lost {
            assert_eq!(asking.ask().unwrap().member, *member);
        }
    }
    let went_on: BTreeSet<&String> = answered.iter().filter(|name| **name != lost).collect();
    assert_eq!(went_on.len(), 2, "{answered:?}");
    sh(&web.cluster.switch, "ip link set p3 up");
    web.wait_serving(&[0, 1], 3);
}

#[test]
fn without_a_manager_all_goes_on() {
    // The manager's own host has no member, and is asked for nothing.
    let mut web = Web::new(3, &[], CHECKED);
    for host in [1, 2] {
        web.add(host, &format!("m{host}"));
    }
    web.wait_serving(&[1, 2], 2);
    let targets = web.ports_of(&[1, 2]);
    let mut open = web.connect(&targets);
    let load = Load::start(web.client(), &targets, Duration::from_secs(5));
    let from = Instant::now();
    web.cluster.hosts[0].kill_agent();
    wait_until("the manager is missed", LIMIT, || {
        let status = web.cluster.hosts[1].json("status --json");
        status["cluster"]["warnings"]
            .to_string()
            .contains("services are as they were")
    });
    std::thread::sleep(Duration::from_millis(500));
    // An agent that starts now knows what the one before knew, and changes nothing that stands.
    none_failed(&load.stop(), from, "the manager was killed");
    for asking in &mut open {
        asking.ask().unwrap();
    }
    web.cluster.hosts[2].kill_agent();
    web.cluster.hosts[2].start_agent();
    web.wait_serving(&[1, 2], 2);
    let load = Load::start(web.client(), &targets, Duration::from_secs(5));
    let from = Instant::now();
    std::thread::sleep(Duration::from_millis(500));
    none_failed(&load.stop(), from, "an agent started without a manager");
    for asking in &mut open {
        asking.ask().unwrap();
    }
    web.cluster.hosts[0].start_agent();
    web.wait_serving(&[0, 1, 2], 2);
}

#[test]
fn open_connections_of_a_member_that_is_removed_come_to_their_end() {
    let mut web = Web::new(
        2,
        &[],
        &format!("{CHECKED} --drain-timeout 60s --publish published=9080,target=80,mode=host"),
    );
    web.add(0, "stays");
    let goes = web.add(1, "goes");
    web.wait_serving(&[0, 1], 2);
    let client = web.add_client(0, "client");
    let ways = ways(&web, &client);
    // By its own host's port, which leads to nobody else.
    let own = at(&web.cluster.hosts[1], 9080);

    let mut open = web.connect(&own);
    open.extend(by_each_way(&ways, &goes));
    let removed_at = Instant::now();
    let mut removing = Running::start(&web.cluster.hosts[1], &format!("rm -f {goes}"));
    web.wait_serving(&[0, 1], 1);
    // All the while they are asked, and whoever comes now is led to the other.
    while removed_at.elapsed() < Duration::from_secs(1) {
        for asking in &mut open {
            assert_eq!(asking.ask().unwrap().member, goes);
        }
        for (netns, target) in &ways {
            let answer = netns.run(|| ask(*target, ANSWER_LIMIT)).unwrap().unwrap();
            assert_ne!(answer.member, goes, "{target}");
        }
        for target in own {
            let asks = || ask(target, Duration::from_millis(100));
            assert!(web.client().run(asks).unwrap().is_err(), "{target}");
        }
        assert!(!removing.is_over(), "its connections are open");
    }
    // One is as good as all, and those that no rule of a service knows count too.
    for left in [own.len(), 1] {
        open.truncate(left);
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(open[0].ask().unwrap().member, goes);
        assert!(!removing.is_over(), "{left} connections are open");
    }
    drop(open);
    let closed_at = Instant::now();
    removing.wait();
    assert!(
        closed_at.elapsed() < LIMIT,
        "not by its timeout, which is a minute"
    );
    web.members.remove(&goes);

    // No longer than it is given; here by published ports alone.
    let goes = web.add(1, "late");
    web.wait_serving(&[0, 1], 2);
    let mut open = by_each_way(&ways[..4], &goes);
    let removed_at = Instant::now();
    let mut removing = Running::start(
        &web.cluster.hosts[1],
        &format!("rm -f --drain-timeout 1s {goes}"),
    );
    removing.wait();
    let lasted = removed_at.elapsed();
    assert!(
        (Duration::from_secs(1)..LIMIT).contains(&lasted),
        "{lasted:?}"
    );
    web.members.remove(&goes);
    for asking in &mut open {
        asking.give_up_after(Duration::from_millis(200));
        assert!(asking.ask().is_err(), "it is gone");
    }
}

#[test]
fn a_member_that_is_stopped_is_drained_and_kept_whatever_its_service_publishes() {
    let cluster = Cluster::joined(2, &[]);
    let [manager, host] = &cluster.hosts[..] else {
        unreachable!("two hosts")
    };
    manager.ok("network create myoverlay");
    // Nothing of it is in anybody's rules.
    manager.ok(
        "service create --name web --network myoverlay --endpoint-mode dnsrr --drain-timeout 60s",
    );
    let [name, client] = ["m", "client"].map(|name| cluster.container(name));
    host.ok(&format!(
        "run -d --name {name} --service web -- sleep infinity"
    ));
    manager.ok(&format!(
        "run -d --name {client} --network myoverlay -- sleep infinity"
    ));
    let server = Server::tcp(&Netns::open(&name).unwrap(), &name, 80);
    let listed = host.json("ps --json");
    let ip = listed[0]["endpoints"][0]["ips"][0].as_str().unwrap();
    let target = SocketAddr::new(ip.parse().unwrap(), 80);
    let mut open = connect(&Netns::open(&client).unwrap(), &[target]);
    assert_eq!(open[0].ask().unwrap().member, name);
    let mut stopping = Running::start(host, &format!("stop -t 1 {name}"));
    let state = || host.json("ps --all --json")[0]["state"].clone();
    wait_until("it serves no more", LIMIT, || {
        host.json("ps --json")[0]["service"]["serving"] == false
    });
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(open[0].ask().unwrap().member, name);
    assert!(!stopping.is_over() && state() == "running");
    drop(open);
    stopping.wait();
    drop(server);
    assert_eq!(state(), "exited");
    host.ok(&format!("rm {name}"));
}

/// Where the service is, and from where: the published port of each host from outside, and the virtual address from a container.
fn ways(web: &Web, client: &Netns) -> Vec<(Netns, SocketAddr)> {
    let ports = web.ports_of(&[0, 1]);
    let from_outside = ports.into_iter().map(|port| (web.client().clone(), port));
    let from_inside = web.vips().map(|vip| (client.clone(), vip));
    from_outside.chain(from_inside).collect()
}

/// A connection to this member by each of these ways.
fn by_each_way(ways: &[(Netns, SocketAddr)], member: &str) -> Vec<Asking> {
    let open = |(netns, target): &(Netns, SocketAddr)| {
        // In turn: one of as many as there are members.
        (0..10)
            .find_map(|_| {
                let mut asking = connect(netns, &[*target]).remove(0);
                (asking.ask().unwrap().member == member).then_some(asking)
            })
            .unwrap_or_else(|| panic!("{target} never leads to {member}"))
    };
    ways.iter().map(open).collect()
}

/// A command of `towline` that goes on meanwhile. It is killed with the value.
struct Running(Child);

impl Running {
    fn start(host: &Host, args: &str) -> Self {
        let mut command = host.command(args);
        command.stdout(Stdio::null());
        Self(host.netns.run(|| command.spawn()).unwrap().unwrap())
    }

    fn is_over(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    /// Waits until it is over, all well.
    fn wait(&mut self) {
        wait_until("the command ends", LIMIT * 2, || self.is_over());
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn members_are_asked_by_a_command_inside_or_by_http() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    let folder = tempfile::tempdir().unwrap();
    let [well, seen] = ["well", "seen"].map(|name| folder.path().join(name));
    host.ok("network create myoverlay");
    let create = "service create --network myoverlay --health-interval 100ms --health-retries 1 --health-timeout 20s";
    let mut by_command = host.command(&format!("{create} --name command --health-cmd"));
    by_command.arg(format!(
        "readlink /proc/self/ns/net > {}; test -e {}",
        seen.display(),
        well.display()
    ));
    let made = host.netns.run(|| by_command.output()).unwrap().unwrap();
    assert!(made.status.success(), "{made:?}");
    host.ok(&format!("{create} --name http --health-http 80/healthy"));
    let [command, http] = ["command", "http"].map(|service| {
        let name = cluster.container(service);
        host.ok(&format!(
            "run -d --name {name} --service {service} -- sleep infinity"
        ));
        (name.clone(), Netns::open(&name).unwrap())
    });
    // One that lasts longer than it may is ended with all that it started.
    let tries = folder.path().join("tries");
    let sleep = format!("{}", 1_000_000_000 + u64::from(std::process::id()));
    let mut that_hangs = host.command(
        "service create --name hangs --network myoverlay --health-interval 50ms --health-timeout 200ms --health-cmd",
    );
    that_hangs.arg(format!("echo >> {}; sleep {sleep}; true", tries.display()));
    let made = host.netns.run(|| that_hangs.output()).unwrap().unwrap();
    assert!(made.status.success(), "{made:?}");
    let hangs = cluster.container("hangs");
    host.ok(&format!(
        "run -d --name {hangs} --service hangs -- sleep infinity"
    ));
    wait_until("it is tried again and again", LIMIT, || {
        std::fs::read(&tries).is_ok_and(|lines| lines.len() >= 5)
    });
    wait_until("one sleeps at a time", LIMIT, || sleeping(&sleep) <= 1);
    host.ok("service update hangs --no-healthcheck");
    wait_until("nobody sleeps", LIMIT, || sleeping(&sleep) == 0);

    let status = Arc::new(AtomicU16::new(503));
    let _server = Server::http(&http.1, 80, "/healthy", &status);
    let is = |name: &str, serving: bool, health: &str| {
        wait_until(&format!("{name} is {health}"), LIMIT, || {
            let listed = host.json("ps --json");
            let mut listed = listed.as_array().unwrap().iter();
            let own = listed.find(|container| container["name"] == name).unwrap();
            let service = &own["service"];
            let health_now = service["health"].as_str().unwrap_or_default();
            service["serving"] == serving && health_now.starts_with(health)
        });
    };
    // Neither serves before it was found well once.
    wait_until("the command is run", LIMIT, || {
        std::fs::read_to_string(&seen).is_ok_and(|text| text.ends_with('\n'))
    });
    is(&command.0, false, "starting");
    is(&http.0, false, "starting");
    assert_eq!(
        std::fs::read_to_string(&seen).unwrap(),
        sh(&command.1, "readlink /proc/self/ns/net"),
        "the command runs in the member"
    );
    for _ in 0..2 {
        std::fs::write(&well, "").unwrap();
        status.store(204, Ordering::Relaxed);
        is(&command.0, true, "healthy");
        is(&http.0, true, "healthy");
        std::fs::remove_file(&well).unwrap();
        status.store(500, Ordering::Relaxed);
        is(
            &command.0,
            false,
            "unhealthy: the command ended with exit status: 1",
        );
        is(&http.0, false, "unhealthy: ");
    }
    // What is answered elsewhere is no answer.
    status.store(200, Ordering::Relaxed);
    is(&http.0, true, "healthy");
    host.ok("service update http --health-http 80/other");
    is(&http.0, false, "unhealthy: ");
}

/// How many processes `sleep TIME` there are.
fn sleeping(time: &str) -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let wanted = format!("sleep\0{time}\0");
    lines.filter(|line| line == wanted.as_bytes()).count()
}

#[test]
fn members_are_replaced_one_by_one_and_no_request_fails() {
    let mut web = Web::new(3, &[], CHECKED);
    let mut names: Vec<String> = (0..3)
        .map(|host| web.add(host, &format!("old{host}")))
        .collect();
    web.wait_serving(&[0, 1, 2], 3);
    let targets = web.ports_of(&[0, 1, 2]);
    let load = Load::start(web.client(), &targets, ANSWER_LIMIT);
    let from = Instant::now();
    for host in 0..3 {
        web.add(host, &format!("new{host}"));
        web.wait_serving(&[0, 1, 2], 4);
        web.remove(&names.remove(0));
        web.wait_serving(&[0, 1, 2], 3);
    }
    let asked = load.stop();
    none_failed(&asked, from, "members were replaced");
    let of = |word: &str| {
        let answers = asked.iter().filter_map(|asked| asked.result.as_ref().ok());
        answers
            .filter(|answer| answer.member.contains(word))
            .count()
    };
    assert!(of("old") > 0 && of("new") > 0);
}
