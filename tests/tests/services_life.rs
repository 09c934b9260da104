//! Services on whole hosts: members that come, go and turn unhealthy, and hosts and managers that are lost.
//!
//! ```text
//!   client (192.0.2.254, the switch) ──▶ any host:8080 ──▶ any member, on any host
//! ```
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::time::{Duration, Instant};

use towline_tests::service::{ANSWER_LIMIT, Asked, Load, Server, none_failed};
use towline_tests::web::{
    CHECKED, LIMIT, QUESTION_LIMIT, Web, promised, stopped_after, tell_last_failure,
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

    web.members.get_mut(&unhealthy).unwrap().server = None;
    web.wait_serving(&[0, 1, 2], 1);
    let from = Instant::now();
    let load = Load::start(web.client(), &targets, QUESTION_LIMIT);
    std::thread::sleep(Duration::from_millis(300));
    let asked = load.stop();
    none_failed(&asked, from, "a member is unhealthy");
    let members = |asked: &Asked| asked.result.clone().unwrap().member;
    assert!(asked.iter().all(|asked| members(asked) == living));
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
    for host in 0..3 {
        web.add(host, &format!("m{host}"));
    }
    web.wait_serving(&[0, 1], 3);
    // Hosts are given ten seconds to come back to a manager that has just started.
    std::thread::sleep(Duration::from_secs(11).saturating_sub(started.elapsed()));
    let targets = web.ports_of(&[0, 1]);
    let load = Load::start(web.client(), &targets, QUESTION_LIMIT);
    // As if its power were cut.
    let lost_at = Instant::now();
    sh(&web.cluster.switch, "ip link set p3 down");
    web.wait_serving(&[0, 1], 2);
    let from = promised(lost_at, Duration::from_secs(4));
    let asked = stopped_after(load, from);
    tell_last_failure(&asked, lost_at, "a host was lost");
    none_failed(&asked, from, "a host was lost");
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
