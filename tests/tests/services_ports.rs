//! Published ports on whole hosts: those that are refused, those of one host alone, and beside other rules of the host.
//!
//! ```text
//!   client (192.0.2.254, the switch) ──▶ any host:8080 ──▶ any member, on any host
//! ```
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use netns::Netns;
use towline_tests::cluster::Cluster;
use towline_tests::service::{ANSWER_LIMIT, Server, ask, shares};
use towline_tests::web::{CHECKED, CLIENT, LIMIT, Web, at};
use towline_tests::{sh, wait_until};

#[test]
fn ports_that_cannot_be_published_and_what_is_published_to_this_host_alone() {
    // Conformance H19.
    let mut web = Web::new(2, &[], CHECKED);
    let [manager, other] = &web.cluster.hosts[..] else {
        unreachable!("two hosts")
    };
    let create = "service create --network myoverlay --name";
    manager.refused(
        &format!("{create} two --publish 8080:80"),
        1,
        &["port '8080' is already in use by service 'web'"],
    );
    other.refused(
        &format!("{create} two --publish 0:80"),
        1,
        &["invalid hostPort: 0: ports are 1 to 65535"],
    );
    manager.refused(
        &format!("{create} two --publish 8081:80/sctp"),
        1,
        &["sctp"],
    );
    manager.refused(
        &format!("{create} two --publish 8081:80 --publish 8081:81"),
        1,
        &["duplicate published ports"],
    );
    manager.refused(
        &format!("{create} two --replicas 2"),
        2,
        &["does not schedule"],
    );
    manager.refused("network rm myoverlay", 1, &["in use by service web"]);
    manager.refused("network rm ingress", 1, &["cannot be removed", "web"]);
    manager.refused("run --network ingress -- true", 125, &["ingress"]);
    // A program of this host has it.
    let taken = manager
        .netns
        .run(|| std::net::TcpListener::bind(("0.0.0.0", 8090)))
        .unwrap()
        .unwrap();
    manager.refused(
        &format!("{create} two --publish 8090:80"),
        1,
        &["8090", "another program"],
    );
    let id = other.ok(&format!("{create} two --publish 8090:80"));
    wait_until("the manager's host says so", LIMIT, || {
        let status = manager.json("status --json");
        status["cluster"]["warnings"]
            .to_string()
            .contains("port 8090/tcp is published")
    });
    drop(taken);
    other.ok(&format!("service rm {}", id.trim()));
    // A container has it for its own.
    let own = web.cluster.container("own");
    let [manager, other] = &web.cluster.hosts[..] else {
        unreachable!("two hosts")
    };
    manager.ok(&format!(
        "run -d --name {own} --publish 8090:80 -- sleep infinity"
    ));
    let refused = format!("{create} two --publish 8090:80");
    manager.refused(&refused, 1, &["port '8090' is already in use by", &own]);
    let id = other.ok(&refused);
    let warned = || {
        let status = manager.json("status --json");
        status["cluster"]["warnings"]
            .to_string()
            .contains(&format!("container {own} has it"))
    };
    wait_until("the manager's host says so", LIMIT, warned);
    manager.ok(&format!("rm -f {own}"));
    wait_until("it is the service's now", LIMIT, || !warned());
    other.ok(&format!("service rm {}", id.trim()));
    // To this host alone.
    manager.ok("service update web --publish-add 127.0.0.1:9090:80 --publish-add [::1]:9090:80");
    web.add(1, "m1");
    web.wait_serving(&[0, 1], 1);
    let host = web.cluster.hosts[0].address;
    for at in ["127.0.0.1:9090", "[::1]:9090"] {
        let target: SocketAddr = at.parse().unwrap();
        wait_until("localhost answers", LIMIT, || {
            let netns = &web.cluster.hosts[0].netns;
            netns.run(|| ask(target, ANSWER_LIMIT)).unwrap().is_ok()
        });
    }
    // Each is this host's, though their number is one.
    let entry = &web.cluster.hosts[0].netns;
    for at in ["127.0.0.1:9090", "[::1]:9090"] {
        let bound = entry.run(|| std::net::TcpListener::bind(at)).unwrap();
        assert!(bound.is_err(), "{at} is published");
    }
    let from_outside = |target: SocketAddr| {
        let answer = web
            .client()
            .run(|| ask(target, Duration::from_millis(500)))
            .unwrap();
        assert!(answer.is_err(), "{target}: {answer:?}");
    };
    for target in web.ports(0) {
        from_outside(SocketAddr::new(target.ip(), 9090));
    }
    // Also not for a neighbour that routes 127.0.0.0/8 to the host.
    netns::sysctl::set(web.client(), "net/ipv4/conf/all/route_localnet", "1").unwrap();
    for command in [
        "ip address del 127.0.0.1/8 dev lo".to_owned(),
        format!("ip route add 127.0.0.1 via {host} dev br0 src 192.0.2.254"),
    ] {
        sh(web.client(), &command);
    }
    sh(web.client(), "ip route flush table local 127.0.0.0/8");
    from_outside("127.0.0.1:9090".parse().unwrap());
}

#[test]
fn a_container_has_a_port_of_its_own_host() {
    let mut cluster = Cluster::joined(2, &[]);
    let [one, two] = ["one", "two"].map(|name| cluster.container(name));
    let run = |name: &str| format!("run -d --name {name} --publish 8088:80 -- sleep infinity");
    cluster.hosts[1].ok(&run(&one));
    let _server = Server::tcp(&Netns::open(&one).unwrap(), &one, 80);
    let targets = at(&cluster.hosts[1], 8088);
    let answers = |cluster: &Cluster| {
        targets.map(|target| cluster.switch.run(|| ask(target, ANSWER_LIMIT)).unwrap())
    };
    for (answer, client) in answers(&cluster).into_iter().zip(CLIENT) {
        let answer = answer.unwrap();
        assert_eq!(
            (answer.member, answer.client.to_string()),
            (one.clone(), client.to_owned())
        );
    }
    cluster.hosts[1].refused(&run(&two), 125, &["8088", "in use", &one]);
    cluster.hosts[1].kill_agent();
    cluster.hosts[1].start_agent();
    assert!(
        answers(&cluster).iter().all(Result::is_ok),
        "after a restart"
    );
    cluster.hosts[1].ok(&format!("rm -f {one}"));
    assert!(answers(&cluster).iter().all(Result::is_err), "it is gone");
    cluster.hosts[1].ok(&run(&two));
}

#[test]
fn a_service_is_as_its_options_say_and_follows_when_they_change() {
    let mut web = Web::new(
        2,
        &[],
        "--vip 10.0.9.200 --vip fd00:9::c8 --lb weighted --opt preserve-client=false",
    );
    let vips = ["10.0.9.200", "fd00:9::c8"].map(|ip| SocketAddr::new(ip.parse().unwrap(), 80));
    assert_eq!(web.vips(), vips);
    let light = web.add(0, "light");
    let heavy = web.add_with_weight(1, "heavy", 3);
    web.wait_serving(&[0, 1], 2);
    let inside = web.add_client(0, "inside");
    // Members see the host that was asked, by its place on their network; who is on that network itself they see as ever.
    let entry = &*web.cluster.hosts[0].netns;
    let from_outside = web
        .ports(0)
        .map(|port| (web.client(), port, entry, "towline_ingress"));
    let from_inside = vips.map(|vip| (&inside, vip, &inside, "eth0"));
    for (netns, target, seen, ifname) in from_outside.into_iter().chain(from_inside) {
        let (shares, clients) = shares(netns, target, 40, 2);
        assert_eq!(
            (shares[&light], shares[&heavy]),
            (10, 30),
            "{target}: {shares:?}"
        );
        let own = sh(seen, &format!("ip -o address show dev {ifname}"));
        assert_eq!(clients.len(), 1, "{target}: {clients:?}");
        assert!(
            own.contains(&format!(" {}/", clients[0])),
            "{target}: {clients:?}"
        );
    }

    web.cluster.hosts[1].ok("service update web --lb source --opt preserve-client=true");
    for target in web.ports_of(&[0, 1]) {
        let client = CLIENT[usize::from(target.is_ipv6())];
        wait_until("one client, one member", LIMIT, || {
            let (shares, clients) = shares(web.client(), target, 16, 2);
            shares.len() == 1 && clients == [client.parse::<IpAddr>().unwrap()]
        });
    }

    web.cluster.hosts[1].ok("service update web --publish-rm 80/tcp --publish-add 8082:80");
    let answers = |target: SocketAddr| {
        let limit = Duration::from_secs(1);
        web.client().run(|| ask(target, limit)).unwrap().is_ok()
    };
    for host in &web.cluster.hosts {
        for (before, now) in at(host, 8080).into_iter().zip(at(host, 8082)) {
            wait_until("the port is another", LIMIT, || {
                answers(now) && !answers(before)
            });
        }
        // A program of the host can have it again.
        wait_until("the port is free", LIMIT, || {
            let bind = || std::net::TcpListener::bind("[::]:8080").is_ok();
            host.netns.run(bind).unwrap()
        });
    }
    for vip in vips {
        assert!(inside.run(|| ask(vip, ANSWER_LIMIT)).unwrap().is_ok());
    }
}

#[test]
fn beside_dockers_firewall_and_without_iptables() {
    let mut web = Web::new(2, &[], CHECKED);
    let tools = tempfile::tempdir().unwrap();
    let nft = String::from_utf8(
        std::process::Command::new("sh")
            .args(["-c", "command -v nft"])
            .output()
            .unwrap()
            .stdout,
    )
    .unwrap();
    std::os::unix::fs::symlink(nft.trim(), tools.path().join("nft")).unwrap();
    let bare = &mut web.cluster.hosts[1];
    bare.kill_agent();
    bare.set_path(tools.path());
    bare.start_agent();
    for program in ["iptables-nft", "ip6tables-nft"] {
        for rule in [
            "-P FORWARD DROP",
            "-N DOCKER-USER",
            "-A FORWARD -j DOCKER-USER",
            "-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "-A DOCKER-USER -j RETURN",
        ] {
            sh(
                &web.cluster.hosts[0].netns,
                &format!("{program} -w 5 {rule}"),
            );
        }
    }
    for host in 0..2 {
        web.add(host, &format!("m{host}"));
    }
    web.wait_serving(&[0, 1], 2);
    for target in web.ports_of(&[0, 1]) {
        // The accepts in Docker's chain are put back within seconds.
        wait_until("a connection gets through", LIMIT, || {
            web.client()
                .run(|| ask(target, Duration::from_secs(1)))
                .unwrap()
                .is_ok()
        });
        let (shares, _) = shares(web.client(), target, 20, 2);
        assert_eq!(shares.len(), 2, "{target}: {shares:?}");
    }
}
