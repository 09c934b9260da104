//! Ports over their life: attached, released and adopted under traffic, detached without a trace; and what stands in the
//! way of a datapath.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use netns::{Netns, Vxlan};
use towline_tests::wire::{
    Endpoint, Outer, Pair, Setup, bulk_both_ways, connect, netlink, ping, transfer,
};
use towline_tests::{TestNetns, unique, wait_until, wire_tests};
use vtep::datapath::{Datapath, DatapathError, PortSpec, StartError};
use vtep::fdb::{Change, PortId};
use vtep::tap::TapError;
use vtep::vxlan::DEFAULT_PORT;

wire_tests!(
    two_networks_with_the_same_addresses_never_meet,
    a_restart_loses_no_connection,
    ports_beyond_the_256th_share_a_queue,
    detach_leaves_nothing,
    attach_and_adopt_say_what_is_wrong,
    an_interface_changed_by_hand_harms_nobody,
    a_failed_attach_leaves_nothing,
    a_port_held_by_a_program_is_named,
    a_port_held_by_the_kernel_is_named,
    an_address_of_another_host_is_named,
    probes_measure_the_path,
);

fn start(setup: Setup, pair: &Pair, host: u8) -> Box<dyn Datapath> {
    let netns = if host == 1 { &pair.a } else { &pair.b };
    (setup.start)((**netns).clone(), Outer::V4.vtep(host)).unwrap()
}

/// Answers every datagram with `word`, until the socket's read fails.
fn answer_with(netns: &Netns, ip: IpAddr, word: &'static [u8]) -> SocketAddr {
    let socket = netns.run(|| UdpSocket::bind((ip, 7000))).unwrap().unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut question = [0; 16];
        while let Ok((_, from)) = socket.recv_from(&mut question) {
            if socket.send_to(word, from).is_err() {
                break;
            }
        }
    });
    address
}

fn ask(netns: &Netns, address: SocketAddr) -> Vec<u8> {
    let socket = netns
        .run(|| UdpSocket::bind(("0.0.0.0", 0)))
        .unwrap()
        .unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    socket.send_to(b"who?", address).unwrap();
    let mut answer = [0; 16];
    let length = socket.recv(&mut answer).unwrap();
    answer[..length].to_vec()
}

/// Conformance V4.
fn two_networks_with_the_same_addresses_never_meet(setup: Setup) {
    let pair = Pair::new();
    let (on_a, on_b) = (start(setup, &pair, 1), start(setup, &pair, 2));
    let mut asked = Vec::new();
    for (index, (vni, word)) in [(4097, b"red"), (4098, b"blu")].into_iter().enumerate() {
        let place = u32::try_from(index).unwrap();
        let client = Endpoint {
            port: PortId(place),
            ..Endpoint::new(vni, 2)
        };
        let server = Endpoint {
            port: PortId(place),
            ..Endpoint::new(vni, 3)
        };
        let (c, s) = (
            pair.container(&format!("c{index}")),
            pair.container(&format!("s{index}")),
        );
        client.attach(&*on_a, &c, setup.backend);
        server.attach(&*on_b, &s, setup.backend);
        on_a.apply(&server.at(Outer::V4.remote(2)));
        on_b.apply(&client.at(Outer::V4.remote(1)));
        let address = answer_with(&s, server.ip(), word);
        asked.push((c, s, address, word, client));
    }
    for _ in 0..20 {
        for (client, _, address, word, _) in &asked {
            assert_eq!(ask(client, *address), *word);
        }
    }
    // Without its own network's entry a container reaches nobody, although the other network has that very address.
    let (client, _, address, _, endpoint) = &asked[0];
    on_a.apply(&[
        Change::RemoveMember {
            vni: endpoint.vni,
            addr: Outer::V4.vtep(2),
        },
        Change::RemoveFdb {
            vni: endpoint.vni,
            mac: Endpoint::new(4097, 3).mac(),
        },
    ]);
    let socket = client
        .run(|| UdpSocket::bind(("0.0.0.0", 0)))
        .unwrap()
        .unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    socket.send_to(b"who?", address).unwrap();
    assert!(socket.recv(&mut [0; 16]).is_err());
    assert_eq!(ask(&asked[1].0, asked[1].2), asked[1].3);
}

fn ports_beyond_the_256th_share_a_queue(setup: Setup) {
    let pair = Pair::new();
    let (on_a, on_b) = (start(setup, &pair, 1), start(setup, &pair, 2));
    let idle = pair.container("idle");
    for index in 0..256 {
        let spec = PortSpec {
            id: PortId(1000 + index),
            ifname: format!("t{index}"),
            ..Endpoint::new(4098, 200).spec(&idle, setup.backend)
        };
        on_a.attach(&spec).unwrap();
    }
    let (ours, theirs) = (Endpoint::new(4097, 2), Endpoint::new(4097, 3));
    let (c, s) = (pair.container("c"), pair.container("s"));
    ours.attach(&*on_a, &c, setup.backend);
    theirs.attach(&*on_b, &s, setup.backend);
    on_a.apply(&theirs.at(Outer::V4.remote(2)));
    on_b.apply(&ours.at(Outer::V4.remote(1)));
    // Many flows, so that every worker has frames for the one queue.
    for _ in 0..8 {
        bulk_both_ways((&c, ours.ip()), (&s, theirs.ip()), 1 << 20);
    }
    on_a.detach(ours.port).unwrap();
    assert!(netlink(&c).link("eth0").unwrap().is_none());
}

fn a_restart_loses_no_connection(setup: Setup) {
    let pair = Pair::new();
    let (first, on_b) = (start(setup, &pair, 1), start(setup, &pair, 2));
    let (ours, theirs) = (Endpoint::new(4097, 2), Endpoint::new(4097, 3));
    let (c, s) = (pair.container("c"), pair.container("s"));
    ours.attach(&*first, &c, setup.backend);
    theirs.attach(&*on_b, &s, setup.backend);
    first.apply(&theirs.at(Outer::V4.remote(2)));
    on_b.apply(&ours.at(Outer::V4.remote(1)));
    let network = netlink(&c);
    let before = (
        network.addresses().unwrap(),
        network.link("eth0").unwrap().unwrap(),
    );
    assert!(before.1.up);

    let (client, server) = connect(&c, &s, theirs.ip());
    let mut second = None;
    transfer(client, server, 48 << 20, || {
        // As SIGKILL does: nothing is released, descriptors just close.
        drop(first);
        let restarted = start(setup, &pair, 1);
        restarted.apply(&[ours.network()]);
        restarted.apply(&theirs.at(Outer::V4.remote(2)));
        restarted.adopt(&ours.spec(&c, setup.backend)).unwrap();
        second = Some(restarted);
    });
    let second = second.unwrap();
    let after = (
        network.addresses().unwrap(),
        network.link("eth0").unwrap().unwrap(),
    );
    assert_eq!(before, after);
    assert!(second.counters().frames_in > 0);

    // Released and taken up again by the same datapath, and a second time after an answer from the other side.
    second.release(ours.port).unwrap();
    assert!(second.tables().port(ours.port).is_none());
    second.adopt(&ours.spec(&c, setup.backend)).unwrap();
    ping(&c, theirs.ip(), 2);
    ping(&s, ours.ip(), 2);
}

/// A queue opened inside a namespace keeps that namespace alive, so a detached port must not hold one.
fn detach_leaves_nothing(setup: Setup) {
    let pair = Pair::new();
    let datapath = start(setup, &pair, 1);
    let ours = Endpoint::new(4097, 2);
    for adopted in [false, true] {
        let container = pair.container("c");
        // The canary goes when the namespace of its peer does.
        netlink(&pair.a)
            .add_veth("canary", "canary", &container)
            .unwrap();
        ours.attach(&*datapath, &container, setup.backend);
        if adopted {
            datapath.release(ours.port).unwrap();
            datapath
                .adopt(&ours.spec(&container, setup.backend))
                .unwrap();
        }
        if !adopted {
            datapath.detach(ours.port).unwrap();
            assert_eq!(netlink(&container).link("eth0").unwrap(), None);
            // Again, and one that never was.
            datapath.detach(ours.port).unwrap();
            datapath.detach(PortId(999)).unwrap();
            drop(container);
        } else {
            // The container's name goes first, as when it ends while nobody looks.
            drop(container);
            assert!(
                netlink(&pair.a).link("canary").unwrap().is_some(),
                "the queue should hold the namespace"
            );
            datapath.detach(ours.port).unwrap();
        }
        wait_until(
            "the container's namespace goes",
            Duration::from_secs(10),
            || netlink(&pair.a).link("canary").unwrap().is_none(),
        );
        assert!(datapath.tables().port(ours.port).is_none());
    }
}

fn an_interface_changed_by_hand_harms_nobody(setup: Setup) {
    let pair = Pair::new();
    let (on_a, on_b) = (start(setup, &pair, 1), start(setup, &pair, 2));
    let (ours, theirs) = (Endpoint::new(4097, 2), Endpoint::new(4097, 3));
    let neighbour = Endpoint::new(4097, 4);
    let (c, n, s) = (
        pair.container("c"),
        pair.container("n"),
        pair.container("s"),
    );
    ours.attach(&*on_a, &c, setup.backend);
    neighbour.attach(&*on_a, &n, setup.backend);
    theirs.attach(&*on_b, &s, setup.backend);
    on_a.apply(&theirs.at(Outer::V4.remote(2)));
    on_b.apply(&ours.at(Outer::V4.remote(1)));
    on_b.apply(&neighbour.at(Outer::V4.remote(1)));
    ping(&c, theirs.ip(), 1);
    // Down and up again, renamed: the queues stay with it.
    let network = netlink(&c);
    network.set_down("eth0").unwrap();
    ping(&n, theirs.ip(), 1);
    network.rename("eth0", "other0").unwrap();
    network.set_up("other0").unwrap();
    ping(&c, theirs.ip(), 1);
    // Removed under us: frames for it are counted, the other port goes on, and detach finds nothing left to do.
    assert!(network.delete_link("other0").unwrap());
    ping(&n, theirs.ip(), 2);
    assert!(
        !towline_tests::try_sh(&s, "ping -c 1 -W 1 10.0.9.2")
            .status
            .success()
    );
    ping(&n, theirs.ip(), 2);
    on_a.detach(ours.port).unwrap();
    on_a.detach(neighbour.port).unwrap();
    assert_eq!(netlink(&n).link("eth0").unwrap(), None);
}

fn attach_and_adopt_say_what_is_wrong(setup: Setup) {
    let pair = Pair::new();
    let datapath = start(setup, &pair, 1);
    let container = pair.container("c");
    let ours = Endpoint::new(4097, 2);
    let spec = ours.spec(&container, setup.backend);
    let tap_error = |error: DatapathError| match error {
        DatapathError::Tap { source, .. } => source,
        other => panic!("{other}"),
    };
    let missing = tap_error(datapath.adopt(&spec).unwrap_err());
    assert!(matches!(missing, TapError::Missing(_)), "{missing}");
    ours.attach(&*datapath, &container, setup.backend);
    let twice = datapath.attach(&spec).unwrap_err();
    assert_eq!(
        twice.to_string(),
        "port 2 is already attached: detach it first"
    );
    let other = tap_error(
        datapath
            .attach(
                &Endpoint {
                    port: PortId(3),
                    ..ours
                }
                .spec(&container, setup.backend),
            )
            .unwrap_err(),
    );
    assert_eq!(
        other.to_string(),
        "interface eth0 already exists in this namespace: remove it first"
    );
    // The interface's link and MAC are what was asked for.
    let link = netlink(&container).link("eth0").unwrap().unwrap();
    assert_eq!(
        (link.mac, link.mtu),
        (ours.mac().octets(), u32::from(ours.mtu))
    );
    // No TAP at all.
    netlink(&container).add_bridge("eth9").unwrap();
    datapath.release(ours.port).unwrap();
    let mut dummy = spec.clone();
    dummy.ifname = "eth9".to_owned();
    let mismatch = tap_error(datapath.adopt(&dummy).unwrap_err());
    assert!(matches!(mismatch, TapError::Mismatch { .. }), "{mismatch}");
}

fn a_failed_attach_leaves_nothing(setup: Setup) {
    let pair = Pair::new();
    let datapath = start(setup, &pair, 1);
    let container = pair.container("c");
    let ours = Endpoint::new(4097, 2);
    // The kernel refuses a multicast MAC after the interface was made.
    let mut spec = ours.spec(&container, setup.backend);
    spec.mac = "01:00:5e:00:00:01".parse().unwrap();
    let error = datapath.attach(&spec).unwrap_err();
    assert!(matches!(error, DatapathError::Netlink { .. }), "{error}");
    assert_eq!(netlink(&container).link("eth0").unwrap(), None);
    assert!(datapath.tables().port(ours.port).is_none());
    ours.attach(&*datapath, &container, setup.backend);
}

fn refusal(setup: Setup, netns: &Netns, vtep: IpAddr) -> StartError {
    match (setup.start)(netns.clone(), vtep) {
        Ok(_) => panic!("it should not start"),
        Err(error) => error,
    }
}

fn a_port_held_by_a_program_is_named(setup: Setup) {
    let pair = Pair::new();
    for address in ["0.0.0.0", "192.0.2.1"] {
        let holder = pair
            .a
            .run(|| UdpSocket::bind((address, DEFAULT_PORT)))
            .unwrap()
            .unwrap();
        let error = refusal(setup, &pair.a, Outer::V4.vtep(1)).to_string();
        let process = format!("(pid {})", std::process::id());
        assert!(
            error.starts_with("UDP port 4789 on 192.0.2.1 is taken by ")
                && error.contains(&process),
            "{error}"
        );
        drop(holder);
    }
    let running = start(setup, &pair, 1);
    let error = refusal(setup, &pair.a, Outer::V4.vtep(1));
    assert!(matches!(error, StartError::PortTaken { .. }), "{error}");
    drop(running);
    drop(start(setup, &pair, 1));
}

fn a_port_held_by_the_kernel_is_named(setup: Setup) {
    let pair = Pair::new();
    let host = netlink(&pair.a);
    let spec = Vxlan {
        vni: 1,
        local: Outer::V4.vtep(1),
        port: DEFAULT_PORT,
        learning: false,
        dev: None,
        udp_checksum: true,
    };
    // One on another port is none of our business.
    host.add_vxlan(
        "vx8472",
        &Vxlan {
            port: 8472,
            vni: 2,
            ..spec.clone()
        },
    )
    .unwrap();
    host.set_up("vx8472").unwrap();
    drop(start(setup, &pair, 1));
    host.add_vxlan("vx0", &spec).unwrap();
    host.set_up("vx0").unwrap();
    let error = refusal(setup, &pair.a, Outer::V4.vtep(1)).to_string();
    assert!(error.contains("the kernel's vxlan device vx0"), "{error}");
    // As Swarm has it: the device in another namespace, its socket here.
    let hidden = TestNetns::new(unique("te-"));
    towline_tests::sh(&pair.a, &format!("ip link set vx0 netns {}", hidden.name()));
    towline_tests::sh(&hidden, "ip link set vx0 up");
    let error = refusal(setup, &pair.a, Outer::V4.vtep(1)).to_string();
    assert!(error.contains("is taken by the kernel"), "{error}");
}

fn an_address_of_another_host_is_named(setup: Setup) {
    let pair = Pair::new();
    let error = refusal(setup, &pair.a, Outer::V4.vtep(2)).to_string();
    assert_eq!(
        error,
        "192.0.2.2 is no address of this host: choose one that `ip address` shows"
    );
}

fn probes_measure_the_path(setup: Setup) {
    let pair = Pair::new();
    let (on_a, on_b) = (start(setup, &pair, 1), start(setup, &pair, 2));
    let nonce = [7; 16];
    let watch = on_b.expect_probe(nonce);
    on_a.send_probe(Outer::V4.remote(2), nonce, 1500).unwrap();
    let seen = watch.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!((seen.size, seen.from.ip()), (1500, Outer::V4.vtep(1)));
    // One byte more than the link carries is refused, not cut.
    let error = on_a
        .send_probe(Outer::V4.remote(2), nonce, 1501)
        .unwrap_err();
    assert!(error.to_string().contains("too long"), "{error}");
    // Nobody expects this one, and nobody answers it.
    on_a.send_probe(Outer::V4.remote(2), [8; 16], 200).unwrap();
    wait_until(
        "the unexpected probe is counted",
        Duration::from_secs(5),
        || {
            on_b.counters()
                .drops
                .get(vtep::stats::DropReason::UnexpectedProbe)
                == 1
        },
    );
    assert_eq!(on_b.counters().datagrams_out, 0);
}
