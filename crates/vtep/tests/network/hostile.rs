//! What hosts and containers do that mean harm or have failed, and that nobody else notices.

use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use vtep::MacAddr;
use vtep::edge::Offload;
use vtep::ethernet;
use vtep::fdb::{Change, Port, PortId, TableWriter};
use vtep::stats::{Counters, DropReason};
use vtep::tap::Backend;
use vtep::testing::{MemoryTap, Wire};
use vtep::vxlan::Header;
use vtep::worker::{Worker, WorkerConfig};

use crate::cluster::{Cluster, MTU, encapsulated, flow, ip, mac, port, udp, vni};

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
