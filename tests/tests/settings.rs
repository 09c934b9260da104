//! What can be set for a network and for a cluster: on the wire by raw sockets, and through whole agents.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::num::NonZeroU8;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use netns::Netns;
use towline_tests::cluster::{Cluster, Host};
use towline_tests::frames::{Checksum, Seen, Udp};
use towline_tests::raw::{PATIENCE, Rig};
use towline_tests::wire::{Outer, Setup};
use towline_tests::{sh, wait_until, wire_tests};
use vtep::settings::Dscp;
use vtep::stats::DropReason;

wire_tests!(
    the_outer_ttl_and_dscp_are_the_networks,
    a_uniform_network_carries_the_dscp_both_ways,
    checksums_are_zero_where_that_is_asked,
    the_port_changes_while_frames_flow,
);

const OUTERS: [Outer; 2] = [Outer::V4, Outer::V6];
/// A DSCP as it stands in the traffic class, and with ECT(0) beside it.
const AF41: u8 = 34 << 2;
const MARKED: u8 = AF41 | 2;

/// Conformance V19: 64 and 0 by default.
fn the_outer_ttl_and_dscp_are_the_networks(setup: Setup) {
    for outer in OUTERS {
        let rig = Rig::new(setup, outer);
        let frame = Udp {
            tos: MARKED,
            ..Udp::between(&rig.ours, &rig.theirs)
        }
        .build();
        let fields = |seen: &Seen| (seen.tos, seen.ttl, seen.checksum_is_right);
        assert_eq!(fields(&rig.sent(&frame)), (2, 64, true));
        rig.set_network(|config| {
            config.settings.ttl = NonZeroU8::new(7).unwrap();
            config.settings.dscp = Dscp::fixed(46).unwrap();
        });
        let seen = rig.sent(&frame);
        assert_eq!(fields(&seen), (46 << 2 | 2, 7, true));
        assert_eq!(seen.inner(), frame);
        // The pipe model: what the path did to the outer field stays outside.
        let back = Udp {
            tos: MARKED,
            ..Udp::between(&rig.theirs, &rig.ours)
        }
        .build();
        let mut datagram = rig.carry(&back);
        datagram.tos = 10 << 2 | 2;
        assert_eq!(rig.delivered(&datagram), back);
        rig.set_network(|_| {});
        assert_eq!(fields(&rig.sent(&frame)), (2, 64, true));
        assert_eq!(rig.drops(), []);
    }
}

/// Conformance V19, RFC 2983 §3.1: over both families, around and inside both families.
fn a_uniform_network_carries_the_dscp_both_ways(setup: Setup) {
    for outer in OUTERS {
        let rig = Rig::new(setup, outer);
        rig.set_network(|config| config.settings.dscp = Dscp::UNIFORM);
        for between in [Udp::between, Udp::between6] {
            let with = |udp: Udp, tos| Udp { tos, ..udp }.build();
            for tos in [0, MARKED, 0xfc] {
                let frame = with(between(&rig.ours, &rig.theirs), tos);
                assert_eq!(rig.sent(&frame).tos, tos);
            }
            let mut datagram = rig.carry(&with(between(&rig.theirs, &rig.ours), MARKED));
            // The path has made it best effort, and met congestion.
            datagram.tos = 3;
            let got = rig.delivered(&datagram);
            assert_eq!(got, with(between(&rig.theirs, &rig.ours), 3));
        }
        assert_eq!(rig.drops(), []);
    }
}

/// Conformance V11: right by default; zero, and zero taken, only where a network says so (RFC 6935 §5).
fn checksums_are_zero_where_that_is_asked(setup: Setup) {
    for outer in OUTERS {
        let rig = Rig::new(setup, outer);
        let there = Udp::between(&rig.ours, &rig.theirs).build();
        let back = Udp::between(&rig.theirs, &rig.ours).build();
        let mut unsummed = rig.carry(&back);
        unsummed.checksum = Checksum::Zero;
        let seen = rig.sent(&there);
        assert!(seen.checksum != 0 && seen.checksum_is_right, "{seen:?}");
        if outer == Outer::V6 {
            // The kernel drops it; what comes after it says that it has been dropped.
            rig.from_host(&unsummed);
            assert_eq!(rig.delivered(&rig.carry(&back)), back);
            assert!(rig.inside.drain().is_empty());
        }
        rig.set_network(|config| config.settings.udp_checksum = false);
        for _ in 0..3 {
            let seen = rig.sent(&there);
            assert_eq!((seen.checksum, seen.inner()), (0, &there[..]));
            assert!(seen.from.port() >= 49_152, "{}", seen.from);
            assert_eq!(rig.delivered(&unsummed), back);
        }
        // A right one is taken as ever, a wrong one never.
        rig.still_works();
        let mut wrong = rig.carry(&back);
        wrong.checksum = Checksum::Wrong;
        rig.from_host(&wrong);
        assert_eq!(rig.delivered(&unsummed), back);
        assert!(rig.inside.drain().is_empty());
        rig.set_network(|_| {});
        assert!(rig.sent(&there).checksum != 0);
        assert_eq!(rig.drops(), []);
    }
}

/// Conformance V6: the datapath's part.
fn the_port_changes_while_frames_flow(setup: Setup) {
    for outer in OUTERS {
        let rig = Rig::new(setup, outer);
        let back = Udp::between(&rig.theirs, &rig.ours).build();
        let at = |port| {
            let mut datagram = rig.carry(&back);
            datagram.to.set_port(port);
            datagram
        };
        assert_eq!(rig.delivered(&at(4789)), back);
        rig.datapath.listen_on(5000).unwrap();
        assert_eq!(rig.delivered(&at(5000)), back);
        assert_eq!(rig.datapath.status().listen.port(), 5000);
        // The port before is free: another may have it.
        let vtep = outer.vtep(1);
        let other = rig.pair.a.run(|| UdpSocket::bind((vtep, 4789))).unwrap();
        let error = rig.datapath.listen_on(4789).unwrap_err().to_string();
        assert!(
            error.contains("4789") && error.contains(&std::process::id().to_string()),
            "{error}"
        );
        assert_eq!(rig.delivered(&at(5000)), back);
        drop(other);
        // The kernel lets go of a socket a moment after it was closed.
        wait_until("the port is free", PATIENCE, || {
            rig.datapath.listen_on(4789).is_ok()
        });
        rig.datapath.listen_on(4789).unwrap();
        rig.still_works();
        assert_eq!(rig.datapath.counters().drops.get(DropReason::NotAMember), 0);
    }
}

/// Conformance V2, per host: the configuration file's `strict-reserved-bits`, through a whole agent.
#[test]
fn a_host_is_strict_where_its_file_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("towline.toml");
    std::fs::write(&file, "strict-reserved-bits = true\n").unwrap();
    let cluster = Cluster::joined(2, &["--config", file.to_str().unwrap()]);
    let [one, two] = &cluster.hosts[..] else {
        panic!("two hosts");
    };
    let from = two.netns.run(|| UdpSocket::bind("192.0.2.2:0"));
    let mut header = towline_tests::frames::vxlan(4096, &[0; 60]);
    header[7] = 1;
    from.unwrap()
        .unwrap()
        .send_to(&header, "192.0.2.1:4789")
        .unwrap();
    wait_until(
        "the datagram is dropped for its reserved bits",
        PATIENCE,
        || one.json("status --json")["cluster"]["drops"]["reserved-bits"] == 1,
    );
}

/// A network's settings as `network inspect` shows them.
fn settings(host: &Host, network: &str) -> serde_json::Value {
    let shown = host.json(&format!("network inspect {network}"));
    let keys = ["flood", "vlan", "dscp", "ttl", "udp_checksum"];
    keys.map(|key| shown[0][key].clone()).to_vec().into()
}

/// Conformance V11, V15, V16, V19: set at `network create`, shown by every host, and all hosts go by them.
#[test]
fn a_networks_settings_hold_on_every_host() {
    let cluster = Cluster::joined(2, &[]);
    let [one, two] = &cluster.hosts[..] else {
        panic!("two hosts");
    };
    one.ok("network create --subnet 10.0.9.0/24 usual");
    one.ok(
        "network create --subnet 10.0.10.0/24 --subnet fd00:10::/64 --opt vlan=pass --opt flood=false \
         --opt dscp=uniform --opt ttl=9 --opt udp-checksum=false unusual",
    );
    for host in [one, two] {
        let expected = serde_json::json!([true, "drop", 0, 64, true]);
        assert_eq!(settings(host, "usual"), expected);
        let expected = serde_json::json!([false, "pass", "uniform", 9, false]);
        assert_eq!(settings(host, "unusual"), expected);
    }
    for (option, says) in [
        ("vlan=maybe", &["vlan", "maybe", "'pass' or 'drop'"][..]),
        ("flood=0", &["flood", "'true' or 'false'"]),
        ("dscp=64", &["dscp", "64", "0 to 63"]),
        ("ttl=0", &["ttl", "1 to 255"]),
        ("udp-checksum=zero", &["udp-checksum", "'true' or 'false'"]),
        (
            "vlam=pass",
            &["vlam", "vlan, flood, dscp, ttl, udp-checksum"],
        ),
        ("vlan", &["vlan", "KEY=VALUE"]),
        ("ttl=3 --opt ttl=4", &["ttl", "twice"]),
    ] {
        one.refused(&format!("network create --opt {option} wrong"), 1, says);
    }
    let names = [cluster.container("c1"), cluster.container("c2")];
    for (host, name) in cluster.hosts.iter().zip(&names) {
        host.ok(&format!(
            "run -d --name {name} --network unusual -- sleep infinity"
        ));
    }
    let containers = names.map(|name| Netns::open(&name).unwrap());
    let watch = towline_tests::packet::PacketSocket::open(&two.netns, "eth0");
    for to in ["10.0.10.3", "fd00:10::3"] {
        let said = sh(
            &containers[0],
            &format!("ping -c 3 -i 0.05 -W 10 -Q {AF41} {to}"),
        );
        assert!(said.contains(" 0% packet loss"), "{said}");
    }
    let seen: Vec<Seen> = watch
        .drain()
        .iter()
        .filter_map(|f| Seen::parse(f))
        .collect();
    // Neighbour discovery, where it was not answered on the spot, has a traffic class of its own.
    let ours: Vec<&Seen> = seen.iter().filter(|seen| seen.tos == AF41).collect();
    assert!(ours.len() >= 6, "{} of {}", ours.len(), seen.len());
    for seen in ours {
        assert_eq!((seen.ttl, seen.checksum), (9, 0), "{:?}", seen.from);
    }
    // Bulk, which leaves as super-frames, without segmented messages.
    let target = SocketAddr::new("10.0.10.3".parse().unwrap(), 7000);
    let listener = containers[1]
        .run(|| TcpListener::bind(target))
        .unwrap()
        .unwrap();
    let sender = containers[0]
        .run(|| TcpStream::connect(target))
        .unwrap()
        .unwrap();
    let (receiver, _) = listener.accept().unwrap();
    towline_tests::wire::transfer(sender, receiver, 20_000_000, || {});
}

/// One byte over a connection, there and back, until told to stop; counts the rounds.
fn converse(from: &Netns, to: &Netns, stop: &AtomicBool, rounds: &AtomicU64) {
    let target: SocketAddr = "10.0.9.3:7001".parse().unwrap();
    let listener = to.run(|| TcpListener::bind(target)).unwrap().unwrap();
    let mut near = from.run(|| TcpStream::connect(target)).unwrap().unwrap();
    let (mut far, _) = listener.accept().unwrap();
    for stream in [&near, &far] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
    }
    while !stop.load(Ordering::Relaxed) {
        let mut byte = [7];
        near.write_all(&byte).unwrap();
        far.read_exact(&mut byte).unwrap();
        far.write_all(&byte).unwrap();
        near.read_exact(&mut byte).unwrap();
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

fn port_of(host: &Host, name: &str) -> (u64, Option<String>) {
    let hosts = host.json("host ls --json");
    let found = hosts
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["name"] == name);
    let found = found.unwrap();
    (
        found["port"].as_u64().unwrap(),
        found["port_problem"].as_str().map(str::to_owned),
    )
}

/// Conformance V6: a connection goes on while the port of the whole cluster changes; a host that is away learns it when it is
/// back; one that can't follow is named, keeps its port and is reached there.
#[test]
fn the_vxlan_port_of_a_cluster_changes() {
    let mut cluster = Cluster::joined(3, &[]);
    cluster.hosts[0].ok("network create --subnet 10.0.9.0/24 myoverlay");
    let names: Vec<String> = ["c1", "c2", "c3"]
        .iter()
        .map(|name| cluster.container(name))
        .collect();
    for (host, name) in cluster.hosts.iter().zip(&names) {
        host.ok(&format!(
            "run -d --name {name} --network myoverlay -- sleep infinity"
        ));
    }
    let containers: Vec<Netns> = names
        .iter()
        .map(|name| Netns::open(name).unwrap())
        .collect();
    let ping = |from: usize, to: u8| {
        let address = format!("10.0.9.{to}");
        wait_until("a ping passes", PATIENCE, || {
            let ping = format!("ping -c 1 -W 1 {address}");
            towline_tests::try_sh(&containers[from], &ping)
                .status
                .success()
        });
    };
    let matrix = || {
        for from in 0..3 {
            for to in (0..3).filter(|to| *to != from) {
                ping(from, u8::try_from(to).unwrap() + 2);
            }
        }
    };
    matrix();
    for (wrong, says) in [("0", "1 to 49151"), ("50000", "1 to 49151")] {
        cluster.hosts[0].refused(&format!("update --vxlan-port {wrong}"), 1, &[wrong, says]);
    }

    // Both ways, under a connection.
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let talk = scope.spawn(|| converse(&containers[0], &containers[1], &stop, &rounds));
        for (asking, port) in [(0, 8472), (1, 4789), (2, 5000)] {
            let seen = rounds.load(Ordering::Relaxed);
            let host = &cluster.hosts[asking];
            let said = host.ok(&format!("update --vxlan-port {port}"));
            assert_eq!(said.matches("done").count(), 3, "{said}");
            wait_until("the connection goes on", PATIENCE, || {
                rounds.load(Ordering::Relaxed) > seen + 100 || talk.is_finished()
            });
            let sockets = sh(&host.netns, "ss -Huln");
            assert!(sockets.contains(&format!(":{port} ")), "{sockets}");
            let shown = host.json("status --json")["cluster"]["port"].as_u64();
            assert_eq!(shown, Some(port));
        }
        stop.store(true, Ordering::Relaxed);
        talk.join().unwrap();
    });
    matrix();

    // One host is away, another can't: both are told of, and both are reached.
    cluster.hosts[2].kill_agent();
    let taken = cluster.hosts[1]
        .netns
        .run(|| UdpSocket::bind("192.0.2.2:6000"));
    let taken = taken.unwrap().unwrap();
    wait_until("the lost host is masked", PATIENCE, || {
        let hosts = cluster.hosts[0].json("host ls --json");
        hosts
            .as_array()
            .unwrap()
            .iter()
            .any(|host| host["state"] == "down")
    });
    let second = cluster.hosts[1].name.clone();
    let says = ["6000", second.as_str()];
    let output = cluster.hosts[0].towline("update --vxlan-port 6000");
    let (said, error) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    assert_eq!(output.status.code(), Some(1), "{said}{error}");
    assert!(says.iter().all(|word| error.contains(word)), "{error}");
    assert!(
        said.contains("keeps port 5000: UDP port 6000 is taken by")
            && said.contains("is down: follows"),
        "{said}"
    );
    let status = cluster.hosts[1].json("status --json")["cluster"]["warnings"].to_string();
    assert!(status.contains("6000"), "{status}");
    ping(0, 3);
    ping(1, 2);
    cluster.hosts[2].start_agent();
    let third = cluster.hosts[2].name.clone();
    wait_until("the host that was away follows", PATIENCE, || {
        port_of(&cluster.hosts[0], &third) == (6000, None)
    });
    assert_eq!(port_of(&cluster.hosts[0], &second).0, 5000);
    matrix();
    drop(taken);
    wait_until("the port is free and the host follows", PATIENCE, || {
        port_of(&cluster.hosts[0], &second) == (6000, None)
    });
    matrix();

    // The manager keeps its own port, also over a restart; so does the choice.
    cluster.hosts[0].kill_agent();
    cluster.hosts[0].start_agent();
    wait_until("all are connected again", PATIENCE, || {
        cluster.hosts.iter().all(|host| {
            host.json("status --json")["cluster"]["control"]["connected_to"] == "192.0.2.1:4789"
        })
    });
    let token = cluster.hosts[0].json("token worker --json");
    let joined = token["join_command"].as_str().unwrap();
    assert!(joined.ends_with(" 192.0.2.1"), "{joined}");
    let names: Vec<String> = cluster.hosts.iter().map(|host| host.name.clone()).collect();
    for name in names {
        assert_eq!(port_of(&cluster.hosts[1], &name), (6000, None));
    }
    matrix();
}
