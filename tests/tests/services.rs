//! Services on whole hosts: published ports, virtual addresses, members that come, go and turn unhealthy.
//!
//! ```text
//!   client (192.0.2.254, the switch) ──▶ any host:8080 ──▶ any member, on any host
//! ```
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use netns::Netns;
use serde_json::Value;
use towline_tests::cluster::{Cluster, Host};
use towline_tests::service::{
    ANSWER_LIMIT, Asked, Asking, Load, Server, ask, ask_udp, none_failed, shares,
};
use towline_tests::{sh, try_sh, wait_until};

const LIMIT: Duration = Duration::from_secs(30);
/// How long a question may take while members go: a packet that is lost is sent again after a second, and a busy machine stands still
/// for as long.
const QUESTION_LIMIT: Duration = Duration::from_secs(3);
/// The client's addresses.
const CLIENT: [&str; 2] = ["192.0.2.254", "2001:db8:2::fe"];
/// A check that finds out soon.
const CHECKED: &str =
    "--health-tcp 80 --health-interval 100ms --health-timeout 2s --health-retries 1";

/// A service `web` on a network of both families, published on port 8080 of every host.
struct Web {
    members: BTreeMap<String, Member>,
    cluster: Cluster,
}

struct Member {
    host: usize,
    netns: Netns,
    server: Option<Server>,
}

impl Web {
    fn new(hosts: u8, agent_options: &[&str], service_options: &str) -> Self {
        let cluster = Cluster::joined(hosts, agent_options);
        let manager = &cluster.hosts[0];
        manager.ok("network create --subnet 10.0.9.0/24 --subnet fd00:9::/64 myoverlay");
        manager.ok(&format!(
            "service create --name web --network myoverlay --publish 8080:80 {service_options}"
        ));
        Self {
            members: BTreeMap::new(),
            cluster,
        }
    }

    /// Starts a member; it serves soon.
    fn add(&mut self, host: usize, name: &str) -> String {
        let name = self.cluster.container(name);
        self.cluster.hosts[host].ok(&format!(
            "run -d --name {name} --service web -- sleep infinity"
        ));
        let netns = Netns::open(&name).unwrap();
        let server = Some(Server::tcp(&netns, &name, 80));
        let member = Member {
            host,
            netns,
            server,
        };
        self.members.insert(name.clone(), member);
        name
    }

    /// Waits until these hosts all send connections to `count` members.
    fn wait_serving(&self, hosts: &[usize], count: usize) {
        for &host in hosts {
            let host = &self.cluster.hosts[host];
            let serving = || seen(host)["serving"] == count;
            let what = format!("{}: {count} members serve", host.name);
            wait_until(&what, LIMIT, serving);
        }
    }

    /// Where a host's published port is, in both families.
    fn ports(&self, host: usize) -> [SocketAddr; 2] {
        let host = &self.cluster.hosts[host];
        let last = host.address.octets()[3];
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, last.into());
        [(host.address, 8080).into(), (v6, 8080).into()]
    }

    fn ports_of(&self, hosts: &[usize]) -> Vec<SocketAddr> {
        hosts.iter().flat_map(|&host| self.ports(host)).collect()
    }

    /// Takes a member away as a person does, with its server when it is gone.
    fn remove(&mut self, name: &str) {
        let host = self.members[name].host;
        self.cluster.hosts[host].ok(&format!("rm -f {name}"));
        self.members.remove(name);
    }

    fn client(&self) -> &Netns {
        &self.cluster.switch
    }

    /// A connection from outside to each of `targets`.
    fn connect(&self, targets: &[SocketAddr]) -> Vec<Asking> {
        let connect = |&target| Asking::connect(target, ANSWER_LIMIT).unwrap();
        self.client()
            .run(|| targets.iter().map(connect).collect())
            .unwrap()
    }
}

/// What a host's `status` says of the service `web`.
fn seen(host: &Host) -> Value {
    let status = host.json("status --json");
    let services = status["cluster"]["services"].as_array().unwrap().clone();
    services
        .into_iter()
        .find(|service| service["name"] == "web")
        .unwrap_or_default()
}

/// From when on no new connection may fail, `within` after what happened at `since`: a slow machine shows it late, and is given
/// until all hosts show it, unless `TOWLINE_STRICT_TIMES` is set, as `scripts/soak` does.
fn promised(since: Instant, within: Duration) -> Instant {
    if std::env::var_os("TOWLINE_STRICT_TIMES").is_some_and(|value| !value.is_empty()) {
        since + within
    } else {
        Instant::now().max(since + within)
    }
}

/// For people who measure (`--nocapture`).
fn tell_last_failure(asked: &[Asked], since: Instant, what: &str) {
    let failed = asked.iter().filter(|asked| asked.result.is_err());
    match failed.map(|asked| asked.at).max() {
        Some(at) => eprintln!(
            "{what}: the last new connection that failed began {:?} after it",
            at.saturating_duration_since(since)
        ),
        None => eprintln!("{what}: no new connection failed"),
    }
}

/// What a load asked, half a second of it after `from`.
fn stopped_after(load: Load, from: Instant) -> Vec<Asked> {
    std::thread::sleep(from.saturating_duration_since(Instant::now()) + Duration::from_millis(500));
    load.stop()
}

#[test]
fn every_host_hands_connections_to_all_members_evenly_and_they_see_the_client() {
    const COUNT: usize = 3000;
    let mut web = Web::new(3, &[], CHECKED);
    let names: Vec<String> = (0..6)
        .map(|index| web.add(index % 3, &format!("m{index}")))
        .collect();
    web.wait_serving(&[0, 1, 2], 6);
    for host in 0..3 {
        for (port, client) in web.ports(host).into_iter().zip(CLIENT) {
            let (shares, clients) = shares(web.client(), port, COUNT, 8);
            let even = COUNT / 8 * 8 / 6;
            for name in &names {
                let share = shares.get(name).copied().unwrap_or(0);
                assert!(
                    share.abs_diff(even) <= even / 50,
                    "{port}: {name} got {share} of {COUNT}: {shares:?}"
                );
            }
            assert_eq!(clients, [client.parse::<IpAddr>().unwrap()], "{port}");
        }
    }
}

#[test]
fn one_client_port_may_reach_a_member_through_several_hosts_at_once() {
    let mut web = Web::new(3, &[], "--publish 8053:53/udp");
    let name = web.add(1, "m1");
    let status = web.cluster.hosts[1].json("ps --json");
    let ips: Vec<IpAddr> = status[0]["endpoints"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|place| place["network"] == "ingress")
        .flat_map(|place| place["ips"].as_array().unwrap())
        .map(|ip| ip.as_str().unwrap().parse().unwrap())
        .collect();
    let member = Netns::open(&name).unwrap();
    let _udp = Server::udp(&member, &name, &ips, 53);
    web.wait_serving(&[0, 1, 2], 1);
    for (family, expected) in CLIENT.into_iter().enumerate() {
        let targets = [0, 1, 2].map(|host| web.ports(host)[family]);
        let first = web.connect(&targets[..1]).remove(0);
        let port = first.local().port();
        let connect = |&target| Asking::connect_from(port, target, ANSWER_LIMIT).unwrap();
        let others = || targets[1..].iter().map(connect).collect::<Vec<_>>();
        let mut open = web.client().run(others).unwrap();
        open.insert(0, first);
        for asking in open.iter_mut().rev() {
            assert_eq!(asking.local().port(), port);
            let answer = asking.ask().unwrap();
            assert_eq!(answer.member, name);
            assert_eq!(answer.client.to_string(), expected);
        }
        drop(open);
        // One after the other, while what was closed has not ended at the member.
        let one_by_one = || {
            let mut port = 0;
            for target in targets {
                let mut asking = Asking::connect_from(port, target, ANSWER_LIMIT).unwrap();
                asking.ask().unwrap();
                port = asking.local().port();
            }
        };
        for _ in 0..20 {
            web.client().run(one_by_one).unwrap();
        }
        let answers = web.client().run(|| {
            let socket = std::net::UdpSocket::bind((CLIENT[family], 0)).unwrap();
            socket.set_read_timeout(Some(ANSWER_LIMIT)).unwrap();
            for target in targets {
                socket.send_to(b"?\n", (target.ip(), 8053)).unwrap();
            }
            let mut buffer = [0; 256];
            targets.map(|_| socket.recv_from(&mut buffer).unwrap().1.ip())
        });
        let mut answered = answers.unwrap();
        answered.sort();
        assert_eq!(answered, targets.map(|target| target.ip()));
    }
}

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

/// A client container on the service's network, with the service's virtual addresses.
fn vips(web: &Web) -> [SocketAddr; 2] {
    let service = &web.cluster.hosts[0].json("service inspect web")[0];
    let mut vips: Vec<IpAddr> = service["vips"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vip| vip.as_str().unwrap().parse().unwrap())
        .collect();
    vips.sort();
    [(vips[0], 80).into(), (vips[1], 80).into()]
}

#[test]
fn a_virtual_address_a_members_own_service_and_localhost() {
    let mut web = Web::new(
        2,
        &[],
        &format!("{CHECKED} --publish 8080:80/udp --idle-timeout 1h"),
    );
    let names = [0, 1].map(|host| web.add(host, &format!("m{host}")));
    web.wait_serving(&[0, 1], 2);
    let client = web.cluster.container("client");
    web.cluster.hosts[1].ok(&format!(
        "run -d --name {client} --network myoverlay -- sleep infinity"
    ));
    let inside = Netns::open(&client).unwrap();
    for vip in vips(&web) {
        sh(&inside, &format!("ping -c 1 -W 10 {}", vip.ip()));
        let (shares, clients) = shares(&inside, vip, 200, 4);
        for name in &names {
            assert_eq!(shares.get(name), Some(&100), "{vip}: {shares:?}");
        }
        let own = sh(&inside, "ip -o address show dev eth0 scope global");
        assert!(own.contains(&clients[0].to_string()), "{clients:?}: {own}");
        // A member calls its own service, and sometimes itself.
        let member = &web.members[&names[0]].netns;
        let (shares, _) = towline_tests::service::shares(member, vip, 40, 2);
        assert_eq!(shares.len(), 2, "{vip}: {shares:?}");
    }
    // A host's own port, by its own address and by `localhost`; a container's by its host's.
    for (host, name) in names.iter().enumerate() {
        let own = web.ports(host);
        let localhost = ["127.0.0.1:8080", "[::1]:8080"].map(|at| at.parse().unwrap());
        for target in own.into_iter().chain(localhost) {
            let answer = web.cluster.hosts[host]
                .netns
                .run(|| ask(target, ANSWER_LIMIT))
                .unwrap();
            assert!(answer.is_ok(), "{target} on host {host}: {answer:?}");
            if !target.ip().is_loopback() {
                let member = &web.members[name].netns;
                let answer = member.run(|| ask(target, ANSWER_LIMIT)).unwrap();
                assert!(answer.is_ok(), "{target} from a member: {answer:?}");
            }
        }
    }
    // A datagram's flow stays with its member.
    let servers: Vec<Server> = names
        .iter()
        .map(|name| {
            let listed = &web.cluster.hosts[web.members[name].host].json("ps --json");
            let listed = listed.as_array().unwrap().iter();
            let own = listed
                .clone()
                .find(|container| container["name"] == name.as_str());
            let places = own.unwrap()["endpoints"].as_array().unwrap().iter();
            let ips: Vec<IpAddr> = places
                .filter(|place| place["network"] == "ingress")
                .flat_map(|place| place["ips"].as_array().unwrap())
                .map(|ip| ip.as_str().unwrap().parse().unwrap())
                .collect();
            assert_eq!(ips.len(), 2, "{name}: {ips:?}");
            Server::udp(&web.members[name].netns, name, &ips, 80)
        })
        .collect();
    for (port, client) in web.ports(0).into_iter().zip(CLIENT) {
        let answers: Vec<_> = (0..4)
            .map(|_| {
                web.client()
                    .run(|| ask_udp(port, ANSWER_LIMIT))
                    .unwrap()
                    .unwrap()
            })
            .collect();
        for name in &names {
            let share = answers
                .iter()
                .filter(|answer| answer.member == *name)
                .count();
            assert_eq!(share, 2, "{port}: {answers:?}");
        }
        assert!(
            answers
                .iter()
                .all(|answer| answer.client.to_string() == client)
        );
    }
    drop(servers);
    idle_connections_last(&web, &inside);
}

/// The kernel's own clock of each connection on its way: set, and set anew by what is sent.
fn idle_connections_last(web: &Web, client: &Netns) {
    use netns::NetfilterSocket;
    use netns::conntrack::Filter;
    let mut open = web.connect(&web.ports_of(&[0]));
    let mut by_vip = vips(web).map(|vip| {
        client
            .run(|| Asking::connect(vip, ANSWER_LIMIT))
            .unwrap()
            .unwrap()
    });
    for asking in open.iter_mut().chain(&mut by_vip) {
        asking.ask().unwrap();
    }
    let entry = &web.cluster.hosts[0].netns;
    for (netns, asking) in [(&**entry, &mut open), (client, &mut Vec::from(by_vip))]
        .into_iter()
        .flat_map(|(netns, askings)| askings.iter_mut().map(move |asking| (netns, asking)))
    {
        let local = asking.local();
        let timeout = || {
            let mut socket = NetfilterSocket::open(netns).unwrap();
            let filter = Filter::new().original_source(local.ip().to_canonical());
            let found = socket.connections(&filter).unwrap();
            let own = found
                .into_iter()
                .find(|connection| connection.original.source_port == local.port());
            (
                socket,
                own.unwrap_or_else(|| panic!("{local} is unknown in {netns}")),
            )
        };
        let hour = Duration::from_secs(3600);
        // Only once the answer is acknowledged: until then the kernel gives it no more than five minutes.
        let is_set = || (hour - LIMIT..=hour).contains(&timeout().1.timeout);
        wait_until("set", LIMIT, is_set);
        // As if nearly the hour had passed.
        let (mut socket, connection) = timeout();
        socket.set_timeout(&connection, LIMIT).unwrap();
        asking.ask().unwrap();
        wait_until("set anew", LIMIT, is_set);
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
    other.refused(&format!("{create} two --publish 0:80"), 1, &["0"]);
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
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2);
    let targets: [SocketAddr; 2] = [(cluster.hosts[1].address, 8088).into(), (v6, 8088).into()];
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
fn nothing_is_left_of_a_service_and_of_a_host_that_leaves() {
    let mut web = Web::new(2, &[], "");
    let names = [0, 1].map(|host| web.add(host, &format!("m{host}")));
    web.wait_serving(&[0, 1], 2);
    for target in web.ports_of(&[0, 1]) {
        let (shares, _) = shares(web.client(), target, 10, 1);
        assert_eq!(shares.len(), 2);
    }
    web.cluster.hosts[1].ok("service rm web");
    for (host, name) in names.iter().enumerate() {
        let member = &web.members[name].netns;
        wait_until("the rules are gone", LIMIT, || {
            traces(&web.cluster.hosts[host].netns).is_empty()
                && of_services(member) == 0
                && !sh(member, "ip rule").contains("4789")
        });
        // They run on.
        wait_until("nobody is a member", LIMIT, || {
            let listed = web.cluster.hosts[host].json("ps --json");
            listed[0]["state"] == "running" && listed[0]["service"] == Value::Null
        });
    }
    let mut servers = std::mem::take(&mut web.members);
    servers.clear();
    for host in [1, 0] {
        let host = &web.cluster.hosts[host];
        host.ok("leave --force");
        for (command, word) in [
            ("nft list ruleset", "towline"),
            ("ip -o link", "towline"),
            ("ip rule", "4789"),
            ("ip -6 rule", "4789"),
            ("ip route show table all", "towline"),
        ] {
            let left = sh(&host.netns, command);
            assert!(!left.contains(word), "{command}: {left}");
        }
    }
}

/// How many tables of services a container has; that of names it has always.
fn of_services(container: &Netns) -> usize {
    let tables = sh(container, "nft list tables");
    let ours = tables.lines().filter(|line| line.contains("towline"));
    ours.filter(|line| !line.ends_with("towline-names")).count()
}

/// What there is of services on a host: its table for published ports, without counters.
fn traces(host: &Netns) -> String {
    let tables = sh(host, "nft list tables");
    tables
        .lines()
        .filter(|line| line.contains("towline-ingress"))
        .map(|_| {
            // It may go meanwhile.
            let table = try_sh(host, "nft list table inet towline-ingress").stdout;
            let table = String::from_utf8_lossy(&table).into_owned();
            table
                .lines()
                .filter(|line| line.contains("publish-"))
                .collect::<String>()
        })
        .collect()
}
