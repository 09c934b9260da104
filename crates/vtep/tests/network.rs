//! Whole VTEPs on a wire in memory: tables, engine, worker and edges together, with a clock moved by hand.
//!
//! Hosts 1 to 3 have one container each, with MAC 02:…:0N and address 10.0.9.(1+N), on one network; a test changes what it
//! needs. Each test says which drop counters moved and requires the rest still.

#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU8;
use std::slice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use vtep::announce::Announcement;
use vtep::arp::Arp;
use vtep::edge::{Offload, OuterFields};
use vtep::ethernet::{self, Frame};
use vtep::fdb::{Change, NetworkConfig, Port, PortId, TableWriter};
use vtep::misdelivery::{Misdelivered, Misdeliveries};
use vtep::settings::{Dscp, WireSettings};
use vtep::stats::{Counters, DropReason, WorkerCounters};
use vtep::tap::Backend;
use vtep::testing::{Container, Faults, MemoryTap, MemoryUnderlay, Seen, Wire};
use vtep::vxlan::Header;
use vtep::worker::{Worker, WorkerConfig};
use vtep::{MacAddr, Vni};

const VNI: u32 = 4096;
const MTU: u16 = 1450;
const PORT: PortId = PortId(1);

struct Host {
    addr: SocketAddr,
    writer: TableWriter,
    worker: Worker<MemoryUnderlay>,
    counters: Arc<WorkerCounters>,
    misdeliveries: Arc<Misdeliveries>,
    container: Container,
}

struct Cluster {
    wire: Wire,
    hosts: Vec<Host>,
}

fn vni(number: u32) -> Vni {
    Vni::new(number).unwrap()
}

fn mac(number: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, number])
}

fn ip(number: u8) -> IpAddr {
    IpAddr::from([10, 0, 9, 1 + number])
}

fn port(number: u8) -> Port {
    Port {
        id: PORT,
        vni: vni(VNI),
        mac: mac(number),
        ips: vec![ip(number)],
        mtu: MTU,
        any_source: false,
    }
}

impl Cluster {
    fn new(backend: Backend) -> Self {
        Self::with_underlay(backend, |number| {
            SocketAddr::from(([192, 0, 2, number], 4789))
        })
    }

    fn with_underlay(backend: Backend, addr: impl Fn(u8) -> SocketAddr) -> Self {
        let wire = Wire::new(7);
        let host = |number| {
            let network = NetworkConfig {
                vni: vni(VNI),
                mtu: MTU,
                gateway_mac: mac(0xfe),
                service_ips: Default::default(),
                gateway_ips: vec![IpAddr::from([10, 0, 9, 1])],
                settings: WireSettings::default(),
            };
            let mut changes = vec![Change::SetNetwork(network), Change::AddPort(port(number))];
            for other in (1..=3).filter(|other| *other != number) {
                let remote = addr(other);
                changes.push(Change::SetMember {
                    vni: vni(VNI),
                    remote,
                    flood: true,
                });
                changes.push(Change::SetFdb {
                    vni: vni(VNI),
                    mac: mac(other),
                    remote,
                });
                changes.push(Change::SetNeighbor {
                    vni: vni(VNI),
                    ip: ip(other),
                    mac: mac(other),
                });
            }
            let mut writer = TableWriter::new();
            writer.apply(&changes);
            let (tap, container) = MemoryTap::new(1_000);
            let config = WorkerConfig::new(writer.shared());
            let misdeliveries = Arc::clone(&config.misdeliveries);
            let mut worker = Worker::new(wire.underlay(addr(number)), config);
            worker.add_port(PORT, MTU, backend, Box::new(tap));
            Host {
                addr: addr(number),
                counters: worker.counters(),
                misdeliveries,
                writer,
                worker,
                container,
            }
        };
        let hosts = (1..=3).map(host).collect();
        Self { wire, hosts }
    }

    /// Host by its number, from 1.
    fn host(&mut self, number: usize) -> &mut Host {
        &mut self.hosts[number - 1]
    }

    /// Lets all hosts work until nothing moves, with the clock moving past all delays.
    fn run(&mut self) {
        self.wire.run(|now| {
            self.hosts
                .iter_mut()
                .fold(false, |worked, host| host.worker.run_once(now) | worked)
        });
    }

    /// The frames that a host's container got.
    fn taken(&mut self, number: usize) -> Vec<Vec<u8>> {
        self.host(number)
            .container
            .take()
            .into_iter()
            .map(|(frame, _)| frame)
            .collect()
    }

    /// Requires exactly these drops on a host, and no others.
    fn assert_drops(&mut self, number: usize, expected: &[(DropReason, u64)]) {
        let sum = Counters::sum([&self.host(number).counters]);
        let moved: Vec<_> = sum.drops.iter().filter(|(_, count)| *count > 0).collect();
        assert_eq!(moved, expected, "host {number}");
    }
}

fn udp(from: u8, to: u8, payload: &[u8]) -> Vec<u8> {
    flow(from, mac(to), 1000, payload)
}

fn flow(from: u8, to: MacAddr, source_port: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(mac(from).octets(), to.octets())
        .ipv4([10, 0, 9, 1 + from], [10, 0, 9, 99], 64)
        .udp(source_port, 2000)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

fn encapsulated(frame: &[u8]) -> Vec<u8> {
    [&Header::emit(vni(VNI))[..], frame].concat()
}

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
fn hostile_datagrams_reach_nobody_and_stop_no_batch() {
    // Conformance H1, H2, H3, H5, H6, V3, V4: one good frame among them arrives.
    let mut cluster = Cluster::new(Backend::Offload);
    let (one, two, three) = (
        cluster.host(1).addr,
        cluster.host(2).addr,
        cluster.host(3).addr,
    );
    let stranger = SocketAddr::from(([192, 0, 2, 66], 4789));
    let good = udp(2, 1, b"good");
    let mut no_flag = encapsulated(&good);
    no_flag[0] = 0;
    let other_network = [&Header::emit(vni(5))[..], &good].concat();
    let mut bad_ihl = encapsulated(&good);
    bad_ihl[8 + 14] = 0x41;
    cluster.wire.inject(stranger, one, &encapsulated(&good));
    cluster.wire.inject(three, one, &encapsulated(&good));
    cluster
        .wire
        .inject(two, one, &encapsulated(&udp(1, 1, b"mine")));
    cluster.wire.inject(two, one, &no_flag);
    cluster.wire.inject(two, one, &other_network);
    cluster.wire.inject(two, one, &bad_ihl);
    cluster.wire.inject(two, one, &[]);
    cluster.wire.inject(two, one, &[0x08]);
    cluster.wire.inject(two, one, &encapsulated(&good[..13]));
    cluster
        .wire
        .inject(two, one, &encapsulated(&vec![0x02; 65_000]));
    for number in 0..1_000_u16 {
        let [high, low] = number.to_be_bytes();
        let mut frame = good.clone();
        frame[6..12].copy_from_slice(&[2, 9, 9, 9, high, low]);
        cluster.wire.inject(two, one, &encapsulated(&frame));
    }
    cluster.wire.inject(two, one, &encapsulated(&good));
    let before: Vec<_> = cluster.host(1).writer.shared().load().entries().collect();
    cluster.run();
    assert_eq!(cluster.taken(1), [good]);
    cluster.assert_drops(
        1,
        &[
            (DropReason::Truncated, 2),
            (DropReason::Malformed, 1),
            (DropReason::NoVniFlag, 2),
            (DropReason::UnknownVni, 1),
            (DropReason::NotAMember, 1),
            (DropReason::SourceElsewhere, 2),
            (DropReason::UnknownSource, 1_001),
        ],
    );
    // V18: no frame moved a table entry.
    let after: Vec<_> = cluster.host(1).writer.shared().load().entries().collect();
    assert_eq!(before, after);
}

#[test]
fn a_hostile_container_is_stopped_at_its_port() {
    // Conformance H7 and H8; the next frame of the same container passes.
    let mut cluster = Cluster::new(Backend::Offload);
    let good = udp(1, 2, b"good");
    let container = &cluster.host(1).container;
    container.send(&udp(3, 2, b"another's MAC"));
    let mut spoofed = good.clone();
    spoofed[29] = 4;
    container.send(&spoofed);
    container.send_with(
        &good,
        Offload {
            flags: Offload::NEEDS_CSUM,
            csum_start: 60_000,
            csum_offset: 16,
            ..Offload::default()
        },
    );
    container.send_with(
        &good,
        Offload {
            gso_type: Offload::GSO_TCPV4,
            ..Offload::default()
        },
    );
    let mut large = ethernet::emit(mac(2), mac(1), 0x1234).to_vec();
    large.resize(65_536, 0);
    container.send(&large);
    container.send(&[]);
    container.send(&good);
    cluster.run();
    assert_eq!(cluster.taken(2), [good]);
    cluster.assert_drops(
        1,
        &[
            (DropReason::Truncated, 1),
            (DropReason::GuardMac, 1),
            (DropReason::GuardIp, 1),
            (DropReason::BadOffload, 2),
            (DropReason::Oversize, 1),
        ],
    );
}

#[test]
fn a_storm_is_limited_and_others_pass() {
    // Conformance H9, the part that the engine holds: copies on the wire stay within the port's budget.
    let mut cluster = Cluster::new(Backend::Offload);
    for _ in 0..30_000 {
        cluster
            .host(1)
            .container
            .send(&flow(1, MacAddr::BROADCAST, 1000, b"storm"));
    }
    cluster.host(2).container.send(&udp(2, 3, b"calm"));
    cluster.run();
    let storm = cluster
        .wire
        .take_seen()
        .iter()
        .filter(|seen| seen.payload.ends_with(b"storm"))
        .count();
    let limited = Counters::sum([&cluster.host(1).counters])
        .drops
        .get(DropReason::FloodLimit);
    assert!((20_000..40_000).contains(&storm), "{storm} copies");
    assert_eq!(limited, 30_000 - storm as u64 / 2);
    assert!(cluster.taken(3).contains(&udp(2, 3, b"calm")));
}

#[test]
fn a_port_that_is_gone_does_not_stop_the_others() {
    let mut cluster = Cluster::new(Backend::Offload);
    let (tap, container) = MemoryTap::new(10);
    let second = Port {
        id: PortId(2),
        mac: mac(7),
        ips: vec![ip(7)],
        ..port(1)
    };
    cluster.host(1).writer.apply(&[Change::AddPort(second)]);
    cluster
        .host(1)
        .worker
        .add_port(PortId(2), MTU, Backend::Offload, Box::new(tap));
    container.unplug();
    let (from, to) = (cluster.host(2).addr, cluster.host(1).addr);
    cluster
        .wire
        .inject(from, to, &encapsulated(&udp(2, 7, b"to nobody")));
    cluster.host(1).container.send(&udp(1, 2, b"still here"));
    cluster
        .wire
        .inject(from, to, &encapsulated(&udp(2, 1, b"and here")));
    cluster.run();
    assert_eq!(cluster.taken(2), [udp(1, 2, b"still here")]);
    assert_eq!(cluster.taken(1), [udp(2, 1, b"and here")]);
    cluster.assert_drops(1, &[(DropReason::PortFailed, 1)]);
}

#[test]
fn a_full_container_loses_its_own_frames_only() {
    let mut cluster = Cluster::new(Backend::Offload);
    let (tap, container) = MemoryTap::new(3);
    let second = Port {
        id: PortId(2),
        mac: mac(7),
        ips: vec![ip(7)],
        ..port(1)
    };
    cluster.host(1).writer.apply(&[Change::AddPort(second)]);
    cluster
        .host(1)
        .worker
        .add_port(PortId(2), MTU, Backend::Offload, Box::new(tap));
    let (from, to) = (cluster.host(2).addr, cluster.host(1).addr);
    for _ in 0..5 {
        cluster
            .wire
            .inject(from, to, &encapsulated(&udp(2, 7, b"x")));
        cluster
            .wire
            .inject(from, to, &encapsulated(&udp(2, 1, b"y")));
    }
    cluster.run();
    assert_eq!((container.take().len(), cluster.taken(1).len()), (3, 5));
    cluster.assert_drops(1, &[(DropReason::PortFull, 2)]);
}

#[test]
fn a_worker_without_ports_or_tables_is_harmless() -> io::Result<()> {
    let wire = Wire::new(1);
    let addr = SocketAddr::from(([192, 0, 2, 1], 4789));
    let mut worker = Worker::new(
        wire.underlay(addr),
        WorkerConfig::new(TableWriter::new().shared()),
    );
    assert!(!worker.run_once(wire.now()));
    wire.inject(addr, addr, &encapsulated(&udp(1, 2, b"x")));
    assert!(worker.poll_underlay(Instant::now())?);
    let sum = Counters::sum([&worker.counters()]);
    assert_eq!(
        (sum.drops.get(DropReason::UnknownVni), sum.drops.total()),
        (1, 1)
    );
    Ok(())
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
