//! Ports of one host that members have by their service, as it comes to publish them and no more.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::net::SocketAddr;
use std::time::Duration;

use towline_tests::service::{Server, ask};
use towline_tests::wait_until;
use towline_tests::web::{LIMIT, Web};

/// Whether a member on this host answers at this port of the host, in both families or in none.
fn answers(web: &Web, host: usize, port: u16) -> bool {
    let ask = |at: SocketAddr| {
        let target = SocketAddr::new(at.ip(), port);
        let answer = web.client().run(|| ask(target, Duration::from_secs(1)));
        answer.unwrap().is_ok()
    };
    let [v4, v6] = web.ports(host).map(ask);
    v4 && v6
}

fn warned(web: &Web, host: usize, words: &[&str]) -> bool {
    let status = web.cluster.hosts[host].json("status --json");
    let warnings = status["cluster"]["warnings"].as_array().unwrap().clone();
    warnings.iter().any(|warning| {
        let text = warning.as_str().unwrap();
        words.iter().all(|word| text.contains(word))
    })
}

#[test]
fn members_that_run_get_and_lose_ports_of_their_hosts() {
    let mut web = Web::new(2, &[], "");
    let member = web.add(1, "m1");
    let own = web.cluster.container("own");
    let _other = Server::tcp(&web.members[&member].netns, &member, 81);
    web.wait_serving(&[0, 1], 1);
    web.cluster.hosts[1].ok(&format!(
        "run -d --name {own} --publish 8089:80 -- sleep infinity"
    ));
    let update = |port: u16, target: u16| {
        format!("service update web --publish-add published={port},target={target},mode=host")
    };

    // What a container of this host has is refused here, by name, and said of elsewhere.
    web.cluster.hosts[1].refused(
        &update(8089, 80),
        1,
        &["port 8089/tcp is already in use by container", &own],
    );
    web.cluster.hosts[0].ok(&update(8088, 81));
    web.cluster.hosts[0].ok(&update(8089, 80));
    wait_until("the free port is open", LIMIT, || answers(&web, 1, 8088));
    assert!(!answers(&web, 0, 8088), "there is no member");
    wait_until("the other is said", LIMIT, || {
        warned(&web, 1, &[&member, "8089/tcp", &own])
    });
    let ports = |web: &Web| {
        let listed = web.cluster.hosts[1].json("ps --json");
        let mut listed = listed.as_array().unwrap().iter();
        let found = listed.find(|container| container["name"] == member.as_str());
        found.unwrap()["ports"].clone()
    };
    assert_eq!(ports(&web).as_array().unwrap().len(), 1, "{}", ports(&web));
    web.cluster.hosts[1].ok(&format!("rm -f {own}"));
    wait_until("it is to be had now", LIMIT, || answers(&web, 1, 8089));
    assert!(!warned(&web, 1, &["8089"]));

    // What is published no more while no agent runs, the next one closes; all else stands.
    web.cluster.hosts[1].kill_agent();
    web.cluster.hosts[0].ok("service update web --publish-rm 81");
    web.cluster.hosts[1].start_agent();
    wait_until("it is closed", LIMIT, || !answers(&web, 1, 8088));
    wait_until("the other stands", LIMIT, || answers(&web, 1, 8089));
    web.cluster.hosts[1].kill_agent();
    web.cluster.hosts[1].start_agent();
    wait_until("still", LIMIT, || answers(&web, 1, 8089));
    assert_eq!(ports(&web).as_array().unwrap().len(), 1, "{}", ports(&web));

    // A port that a service had here is free for others when the service is gone.
    web.cluster.hosts[0].ok("service rm web");
    wait_until("closed with the service", LIMIT, || !answers(&web, 1, 8089));
    web.cluster.hosts[1].ok(&format!(
        "run -d --name {own} --publish 8089:80 -- sleep infinity"
    ));
}
