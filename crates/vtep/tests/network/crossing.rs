//! What crosses from container to container, and how it looks on the wire.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU8;
use std::slice;
use std::time::Duration;

use etherparse::PacketBuilder;
use vtep::MacAddr;
use vtep::announce::Announcement;
use vtep::arp::Arp;
use vtep::edge::{Offload, OuterFields};
use vtep::ethernet::Frame;
use vtep::fdb::{Change, Port, PortId};
use vtep::misdelivery::Misdelivered;
use vtep::settings::{Dscp, WireSettings};
use vtep::stats::{Counters, DropReason};
use vtep::tap::Backend;
use vtep::testing::{Faults, MemoryTap, Seen};

use crate::cluster::{Cluster, MTU, VNI, encapsulated, flow, ip, mac, port, udp, vni};

#[test]
fn a_frame_crosses_unchanged_with_one_header() {
    // Conformance V1, V6.
    for port in [4789, 8472] {
        let mut cluster = Cluster::with_underlay(Backend::Offload, |number| {
            SocketAddr::from(([192, 0, 2, number], port))
        });
        let frame = udp(1, 2, b"hello");
        cluster.host(1).container.send(&frame);
        cluster.run();
        assert_eq!(cluster.taken(2), slice::from_ref(&frame));
        assert!(cluster.taken(3).is_empty());
        let seen = cluster.wire.take_seen();
        assert_eq!(seen.len(), 1);
        assert_eq!(seen[0].payload[..8], [0x08, 0, 0, 0, 0, 0x10, 0, 0]);
        assert_eq!(
            (&seen[0].payload[8..], seen[0].to.port()),
            (&frame[..], port)
        );
        for host in 1..=3 {
            cluster.assert_drops(host, &[]);
        }
        let sum = Counters::sum([&cluster.host(2).counters]);
        assert_eq!(
            (sum.datagrams_in, sum.frames_out, sum.datagram_bytes_in),
            (1, 1, 8 + frame.len() as u64)
        );
    }
}

#[test]
fn ipv6_underlay() {
    let mut cluster = Cluster::with_underlay(Backend::Offload, |number| {
        SocketAddr::new(
            IpAddr::from([0x2001, 0xdb8, 2, 0, 0, 0, 0, number.into()]),
            4789,
        )
    });
    let frame = udp(1, 3, b"hello");
    cluster.host(1).container.send(&frame);
    cluster.run();
    assert_eq!(cluster.taken(3), [frame]);
}

#[test]
fn flows_spread_over_ports_and_keep_theirs() {
    // Conformance V7 and V8, on the wire.
    let mut cluster = Cluster::new(Backend::Offload);
    for _ in 0..2 {
        for source_port in 0..100 {
            cluster
                .host(1)
                .container
                .send(&flow(1, mac(2), source_port, b"x"));
        }
    }
    cluster.run();
    // Frames of different flows may overtake each other.
    let mut by_flow = HashMap::new();
    for Seen { from, payload, .. } in cluster.wire.take_seen() {
        assert!(from.port() >= 49_152);
        assert_eq!(*by_flow.entry(payload).or_insert(from.port()), from.port());
    }
    assert_eq!(by_flow.len(), 100);
    let distinct: HashSet<_> = by_flow.values().collect();
    assert!(distinct.len() > 32, "{} source ports", distinct.len());
}

#[test]
fn a_broadcast_reaches_every_host_once_and_stops_there() {
    // Conformance V16 and V17.
    let mut cluster = Cluster::new(Backend::Offload);
    let frame = flow(1, MacAddr::BROADCAST, 1000, b"all");
    cluster.host(1).container.send(&frame);
    cluster.run();
    assert_eq!(cluster.taken(2), slice::from_ref(&frame));
    assert_eq!(cluster.taken(3), [frame]);
    assert!(cluster.taken(1).is_empty());
    assert_eq!(cluster.wire.take_seen().len(), 2);
}

#[test]
fn arp_is_answered_without_a_datagram() {
    // Conformance V21.
    let mut cluster = Cluster::new(Backend::Offload);
    let mut request = Vec::new();
    Arp {
        is_request: true,
        sender_mac: mac(1),
        sender_ip: [10, 0, 9, 2].into(),
        target_mac: MacAddr::ZERO,
        target_ip: [10, 0, 9, 3].into(),
    }
    .emit(MacAddr::BROADCAST, &mut request);
    cluster.host(1).container.send(&request);
    cluster.run();
    let answers = cluster.taken(1);
    let reply = Arp::parse(&Frame::parse(&answers[0]).unwrap())
        .unwrap()
        .unwrap();
    assert_eq!(
        (
            reply.sender_mac,
            answers.len(),
            cluster.wire.take_seen().len()
        ),
        (mac(2), 1, 0)
    );
}

#[test]
fn another_mac_is_announced_to_the_ports_here_and_to_nobody_else() {
    for backend in [Backend::Offload, Backend::Plain] {
        let mut cluster = Cluster::new(backend);
        let reused = Announcement {
            vni: vni(VNI),
            ip: ip(2),
            mac: mac(3),
        };
        let own = Announcement {
            ip: ip(1),
            mac: mac(1),
            ..reused
        };
        let host = cluster.host(1);
        // Not what the tables say.
        host.worker.announce(&reused);
        host.writer.apply(&[Change::SetNeighbor {
            vni: vni(VNI),
            ip: ip(2),
            mac: mac(3),
        }]);
        host.worker.announce(&reused);
        // Its owner is not told.
        host.worker.announce(&own);
        // No network of this host.
        let elsewhere = Announcement {
            vni: vni(VNI + 1),
            ..reused
        };
        host.worker.announce(&elsewhere);
        cluster.run();
        let mut expected = Vec::new();
        reused.emit(&mut expected);
        assert_eq!(cluster.taken(1), [expected]);
        assert!(cluster.wire.take_seen().is_empty());
        let sum = Counters::sum([&cluster.host(1).counters]);
        assert_eq!((sum.announcements, sum.frames_out), (1, 1));
        cluster.assert_drops(1, &[]);
    }
}

#[test]
fn loss_reordering_and_duplication_change_no_frame() {
    let mut cluster = Cluster::new(Backend::Offload);
    let (delay, jitter) = (Duration::from_millis(3), Duration::from_millis(20));
    cluster.wire.set_faults(Faults {
        loss: 0.1,
        duplication: 0.1,
        delay,
        jitter,
        ..Faults::default()
    });
    let frames: Vec<_> = (0..500_u16)
        .map(|number| udp(1, 2, &number.to_be_bytes()))
        .collect();
    for frame in &frames {
        cluster.host(1).container.send(frame);
    }
    cluster.run();
    let taken = cluster.taken(2);
    assert!(taken.iter().all(|frame| frames.contains(frame)));
    let arrived = frames.iter().filter(|frame| taken.contains(frame)).count();
    assert!(
        (400..500).contains(&arrived) && taken.len() > arrived,
        "{arrived} of 500, {} in all",
        taken.len()
    );
    cluster.assert_drops(2, &[]);
}

#[test]
fn a_moved_endpoint_is_reached_at_once() {
    // Conformance V24.
    let mut cluster = Cluster::new(Backend::Offload);
    let new_home = cluster.host(3).addr;
    cluster.host(1).writer.apply(&[Change::SetFdb {
        vni: vni(VNI),
        mac: mac(2),
        remote: new_home,
    }]);
    let moved = Port {
        id: PortId(2),
        ..port(2)
    };
    cluster.host(3).writer.apply(&[
        Change::AddPort(moved),
        Change::RemoveFdb {
            vni: vni(VNI),
            mac: mac(2),
        },
    ]);
    let (tap, container) = MemoryTap::new(10);
    cluster
        .host(3)
        .worker
        .add_port(PortId(2), MTU, Backend::Offload, Box::new(tap));
    cluster.host(1).container.send(&udp(1, 2, b"moved"));
    cluster.run();
    assert_eq!(container.take().len(), 1);
    assert!(cluster.taken(2).is_empty());
}

/// A sender whose table is old, or which asks everybody, is noted where the container is not.
#[test]
fn a_frame_that_came_to_the_wrong_host_is_noted() {
    let mut cluster = Cluster::new(Backend::Offload);
    let remote = cluster.host(2).addr;
    // Host 1 believes container 3 to be on host 2.
    cluster.host(1).writer.apply(&[Change::SetFdb {
        vni: vni(VNI),
        mac: mac(3),
        remote,
    }]);
    let unknown = flow(1, mac(77), 5000, b"who has it?");
    for frame in [udp(1, 3, b"stale"), unknown, udp(1, 2, b"fine")] {
        cluster.host(1).container.send(&frame);
    }
    cluster.run();
    let from = cluster.host(1).addr.ip();
    let noted = |mac| Misdelivered {
        vni: vni(VNI),
        mac,
        from,
    };
    let notes = |cluster: &mut Cluster, host| {
        let receiver = cluster.host(host).misdeliveries.receiver();
        receiver.try_iter().collect::<Vec<_>>()
    };
    assert_eq!(notes(&mut cluster, 2), [noted(mac(3)), noted(mac(77))]);
    assert_eq!(notes(&mut cluster, 3), [noted(mac(77))]);
    assert_eq!(notes(&mut cluster, 1), []);
    cluster.assert_drops(2, &[(DropReason::SplitHorizon, 1)]);
}

#[test]
fn nothing_too_large_for_the_path_leaves_in_pieces() {
    // Conformance V12: a datagram is whole or not at all; it is counted.
    let mut cluster = Cluster::new(Backend::Offload);
    cluster.wire.set_faults(Faults {
        mtu: 1400,
        ..Faults::default()
    });
    cluster.host(1).container.send(&udp(1, 2, &[0; 1422]));
    cluster.host(1).container.send(&udp(1, 2, b"small"));
    cluster.run();
    assert_eq!(cluster.taken(2).len(), 1);
    assert_eq!(cluster.wire.take_seen().len(), 1);
    cluster.assert_drops(1, &[(DropReason::PathTooSmall, 1)]);
}

/// A TCP frame whose checksum field holds only the pseudo-header's sum, as a kernel on a veth leaves it.
fn partial_tcp(from: u8, to: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(mac(from).octets(), mac(to).octets())
        .ipv4([10, 0, 9, 1 + from], [10, 0, 9, 1 + to], 64)
        .tcp(1, 2, 3, 4)
        .write(&mut frame, payload)
        .unwrap();
    let pseudo =
        u64::from(6_u16) + (frame.len() - 34) as u64 + vtep::offload::checksum::sum(&frame[26..34]);
    frame[50..52].copy_from_slice(&vtep::offload::checksum::fold(pseudo).to_be_bytes());
    frame
}

#[test]
fn partial_checksums_from_a_peer_are_passed_on_or_completed() {
    for backend in [Backend::Offload, Backend::Plain] {
        let mut cluster = Cluster::new(backend);
        let (from, to) = (cluster.host(2).addr, cluster.host(1).addr);
        let frame = partial_tcp(2, 1, b"payload");
        cluster.wire.inject(from, to, &encapsulated(&frame));
        cluster.run();
        let taken = cluster.host(1).container.take();
        assert_eq!(taken.len(), 1);
        match backend {
            Backend::Offload => {
                assert_eq!(taken[0].0, frame);
                assert_eq!(
                    (
                        taken[0].1.needs_checksum(),
                        taken[0].1.csum_start,
                        taken[0].1.csum_offset
                    ),
                    (true, 34, 16)
                );
            }
            Backend::Plain => {
                assert_eq!(
                    vtep::offload::checksum::inspect(&taken[0].0),
                    vtep::offload::checksum::L4::Valid
                );
                assert_eq!(taken[0].1, Offload::default());
            }
        }
    }
}

#[test]
fn partial_checksums_from_a_container_leave_completed() {
    let mut cluster = Cluster::new(Backend::Offload);
    let offload = Offload {
        flags: Offload::NEEDS_CSUM,
        csum_start: 34,
        csum_offset: 16,
        ..Offload::default()
    };
    cluster
        .host(1)
        .container
        .send_with(&partial_tcp(1, 2, b"payload"), offload);
    cluster.run();
    let seen = cluster.wire.take_seen();
    assert_eq!(
        vtep::offload::checksum::inspect(&seen[0].payload[8..]),
        vtep::offload::checksum::L4::Valid
    );
}

#[test]
fn congestion_marks_cross_both_ways() {
    // Conformance V20: the inner field goes out on the outer header, and a mark of the underlay comes in.
    let mut cluster = Cluster::new(Backend::Offload);
    let mut frame = udp(1, 2, b"ect");
    frame[15] = 0b10;
    frame[24..26].fill(0);
    let checksum = !vtep::offload::checksum::fold(vtep::offload::checksum::sum(&frame[14..34]));
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    cluster.host(1).container.send(&frame);
    cluster.run();
    assert_eq!(cluster.wire.take_seen()[0].outer.class, 0b10);
    assert_eq!(cluster.taken(2), slice::from_ref(&frame));
    cluster.wire.set_faults(Faults {
        congested: true,
        ..Faults::default()
    });
    cluster.host(1).container.send(&frame);
    cluster.host(1).container.send(&udp(1, 2, b"not ect"));
    cluster.run();
    let taken = cluster.taken(2);
    assert_eq!((taken.len(), taken[0][15]), (1, 0b11));
    assert_eq!(
        vtep::offload::checksum::fold(vtep::offload::checksum::sum(&taken[0][14..34])),
        0xffff
    );
    cluster.assert_drops(2, &[(DropReason::CongestionMark, 1)]);
}

#[test]
fn frames_of_one_batch_keep_their_own_outer_fields() {
    // Conformance V19: what goes as one message to the kernel has one traffic class.
    let mut cluster = Cluster::new(Backend::Plain);
    let settings = WireSettings {
        dscp: Dscp::UNIFORM,
        ttl: NonZeroU8::new(9).unwrap(),
        udp_checksum: false,
        ..WireSettings::default()
    };
    for host in &mut cluster.hosts {
        let mut config = host
            .writer
            .shared()
            .load()
            .network(vni(VNI))
            .unwrap()
            .config()
            .clone();
        config.settings = settings;
        host.writer.apply(&[Change::SetNetwork(config)]);
    }
    let with_class = |class: u8| {
        let mut frame = udp(1, 2, b"all of one length");
        frame[15] = class;
        frame[24..26].fill(0);
        let checksum = !vtep::offload::checksum::fold(vtep::offload::checksum::sum(&frame[14..34]));
        frame[24..26].copy_from_slice(&checksum.to_be_bytes());
        frame
    };
    let classes = [0xb8, 0, 0x88, 0x88, 0xba];
    let frames = classes.map(with_class);
    for frame in &frames {
        cluster.host(1).container.send(frame);
    }
    cluster.run();
    let seen = cluster.wire.take_seen();
    let outer = |class| OuterFields {
        class,
        ttl: 9,
        checksum: false,
    };
    assert_eq!(
        seen.iter().map(|seen| seen.outer).collect::<Vec<_>>(),
        classes.map(outer)
    );
    assert_eq!(cluster.taken(2), frames);
}
