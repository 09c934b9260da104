//! Whole hosts with a router between them that carries less than their links do: what agents find out, and what they tell whom.
//!
//! The hosts are on one switch, and each leads what is for another through the switch's own network layer, which is the router. It
//! carries what its routes say.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::Duration;

use netns::Netns;
use towline_tests::cluster::{Cluster, Host};
use towline_tests::{sh, try_sh, wait_until};

const LIMIT: Duration = Duration::from_secs(30);
const NARROW: u16 = 1400;

/// Two hosts that reach each other through the router alone.
fn routed() -> Cluster {
    let cluster = Cluster::start(2, &[]);
    for link in ["all", "br0"] {
        netns::sysctl::set(
            &cluster.switch,
            &format!("net/ipv4/conf/{link}/send_redirects"),
            "0",
        )
        .unwrap();
    }
    for host in &cluster.hosts {
        for other in cluster.hosts.iter().filter(|other| other.name != host.name) {
            sh(
                &host.netns,
                &format!("ip route add {}/32 via 192.0.2.254", other.address),
            );
        }
    }
    cluster
}

/// From now on the router carries `mtu` bytes; a silent one drops what is larger and tells nobody.
fn carry(cluster: &Cluster, mtu: u16, silent: bool) {
    for host in &cluster.hosts {
        let route = format!("ip route replace {}/32 dev br0 mtu {mtu}", host.address);
        sh(&cluster.switch, &route);
    }
    if silent {
        sh(&cluster.switch, "nft add table ip silent");
        sh(
            &cluster.switch,
            "nft add chain ip silent out { type filter hook output priority 0 ; }",
        );
        sh(
            &cluster.switch,
            "nft add rule ip silent out icmp type destination-unreachable drop",
        );
    }
}

fn join(cluster: &Cluster) -> serde_json::Value {
    let [h1, h2] = &cluster.hosts[..] else {
        unreachable!("two were asked for")
    };
    let token = h1.json("init --json")["token"].as_str().unwrap().to_owned();
    h2.json(&format!("join --json --token {token} {}", h1.address))
}

/// A container on each host, on a network made with these options.
fn containers(cluster: &Cluster, options: &str) -> Vec<Netns> {
    cluster.hosts[0].ok(&format!(
        "network create --subnet 10.0.9.0/24 {options} myoverlay"
    ));
    let names = [cluster.container("c1"), cluster.container("c2")];
    for (host, name) in cluster.hosts.iter().zip(&names) {
        host.ok(&format!(
            "run -d --name {name} --network myoverlay -- sleep infinity"
        ));
    }
    names
        .iter()
        .map(|name| Netns::open(name).unwrap())
        .collect()
}

fn path_mtu(host: &Host) -> serde_json::Value {
    host.json("status --json")["cluster"]["remotes"][0]["path_mtu"].clone()
}

/// Sends a megabyte from one container to the other.
fn megabyte(from: &Netns, to: &Netns, ip: IpAddr) {
    let listener = to.run(|| TcpListener::bind((ip, 0))).unwrap().unwrap();
    let target = listener.local_addr().unwrap();
    let mut client = from
        .run(|| TcpStream::connect_timeout(&target, LIMIT))
        .unwrap()
        .unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(LIMIT)).unwrap();
    let sender = std::thread::spawn(move || client.write_all(&[7; 1_000_000]));
    let mut got = Vec::new();
    server.read_to_end(&mut got).unwrap();
    sender.join().unwrap().unwrap();
    assert_eq!(got, [7; 1_000_000]);
}

#[test]
fn a_silent_router_is_found_by_probes() {
    // Conformance V13.
    let cluster = routed();
    carry(&cluster, NARROW, true);
    let joined = join(&cluster);
    assert_eq!(joined["path_mtu"], NARROW);
    let warnings = joined["warnings"].to_string();
    assert!(warnings.contains("--mtu 1350"), "{warnings}");
    let netns = containers(&cluster, "");
    // Each host measures the way to the other by itself.
    for host in &cluster.hosts {
        wait_until("the path has been measured", LIMIT, || {
            path_mtu(host) == NARROW
        });
        let status = host.json("status --json");
        let warnings = status["cluster"]["warnings"].to_string();
        assert!(
            warnings.contains("carries packets of 1400 bytes"),
            "{warnings}"
        );
        assert!(host.ok("status").contains("PATH MTU"));
    }
    let [one, other]: [IpAddr; 2] = [[10, 0, 9, 2].into(), [10, 0, 9, 3].into()];
    megabyte(&netns[0], &netns[1], other);
    megabyte(&netns[1], &netns[0], one);
    // The very first packet that is too large is answered.
    let said = try_sh(&netns[0], &format!("ping -M do -c 1 -W 5 -s 1400 {other}")).stdout;
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("mtu = 1350"), "{said}");
}

#[test]
fn a_network_fits_the_smallest_link_and_who_does_not_fit_is_told() {
    // Conformance V14.
    let cluster = Cluster::start(3, &[]);
    let [h1, h2, h3] = &cluster.hosts[..] else {
        unreachable!("three were asked for")
    };
    let set_mtu = |host: &Host, mtu: u16| sh(&host.netns, &format!("ip link set eth0 mtu {mtu}"));
    set_mtu(h2, NARROW);
    set_mtu(h3, 1300);
    let token = h1.json("init --json")["token"].as_str().unwrap().to_owned();
    let joining = format!("join --json --token {token} {}", h1.address);
    h2.ok(&joining);
    let netns = containers(&cluster, "");
    let of = |name: &str| h1.json(&format!("network inspect {name}"))[0]["mtu"].clone();
    assert_eq!(of("myoverlay"), 1350);
    for netns in &netns {
        let links = netns::Netlink::open(netns).unwrap().links().unwrap();
        let eth0 = links.iter().find(|link| link.name == "eth0").unwrap();
        assert_eq!(eth0.mtu, 1350, "the same on every port");
    }
    h1.ok("network create --subnet 10.0.10.0/24 --mtu 1200 small");
    assert_eq!(of("small"), 1200);
    h1.refused(
        "network create --subnet 10.0.11.0/24 --mtu 1400 large",
        1,
        &["at most 1350", &h2.name],
    );
    let warnings = h3.json(&joining)["warnings"].to_string();
    for part in ["myoverlay", "1350", "1400", "1300"] {
        assert!(warnings.contains(part), "{part}: {warnings}");
    }
    assert!(!warnings.contains("network small"), "{warnings}");
    let links = h1.json("host ls --json");
    let mut mtus: Vec<_> = links
        .as_array()
        .unwrap()
        .iter()
        .map(|host| host["link_mtu"].as_u64().unwrap())
        .collect();
    mtus.sort_unstable();
    assert_eq!(mtus, [1300, 1400, 1500]);
}

#[test]
fn a_link_that_takes_smaller_packets_is_said_and_reckoned_with_after_a_restart() {
    // Conformance V14.
    let mut cluster = Cluster::joined(1, &[]);
    let host = &mut cluster.hosts[0];
    let warns = |host: &Host| {
        let status = host.json("status --json");
        let warnings = status["cluster"]["warnings"].to_string();
        warnings.contains("192.0.2.1 takes packets of 1400 bytes, 1500 when")
    };
    assert!(!warns(host));
    sh(&host.netns, &format!("ip link set eth0 mtu {NARROW}"));
    assert!(warns(host));
    host.kill_agent();
    host.start_agent();
    assert!(!warns(host));
    wait_until("the manager has been told", LIMIT, || {
        host.json("host ls --json")[0]["link_mtu"] == NARROW
    });
    host.ok("network create --subnet 10.0.9.0/24 myoverlay");
    let network = host.json("network inspect myoverlay");
    assert_eq!(network[0]["mtu"], NARROW - 50);
}
