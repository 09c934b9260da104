//! What a worker writes down: on the books of which port and which remote, and in a capture with which fate.

#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use etherparse::PacketBuilder;
use vtep::capture::{Capture, CaptureFilter, CaptureHub, Captured, Fate, Place};
use vtep::fdb::{Change, NetworkConfig, Port, PortId, SharedTables, TableWriter};
use vtep::settings::WireSettings;
use vtep::stats::{Counters, DropReason, Reading};
use vtep::tap::Backend;
use vtep::testing::{Container, Faults, MemoryTap, MemoryUnderlay, Wire};
use vtep::vxlan::Header;
use vtep::worker::{Worker, WorkerConfig};
use vtep::{MacAddr, Vni};

/// Has a queue here; its container takes one frame.
const PORT: PortId = PortId(1);
/// In the tables, and without a queue.
const QUEUELESS: PortId = PortId(2);

struct Host {
    wire: Wire,
    worker: Worker<MemoryUnderlay>,
    tables: SharedTables,
    container: Container,
    capture: Capture,
}

fn vni() -> Vni {
    Vni::new(4096).unwrap()
}

fn mac(number: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, number])
}

fn vtep(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 4789))
}

/// MACs 1 and 2 are ports of this host, 12 is behind VTEP 2, and 13 behind VTEP 3.
fn host(index: usize) -> Host {
    let port = |id: PortId, number| {
        Change::AddPort(Port {
            id,
            vni: vni(),
            mac: mac(number),
            ips: vec![IpAddr::from([10, 0, 9, number])],
            mtu: 1450,
            any_source: false,
        })
    };
    let mut changes = vec![
        Change::SetNetwork(NetworkConfig {
            vni: vni(),
            mtu: 1450,
            gateway_mac: mac(0xfe),
            service_ips: Default::default(),
            gateway_ips: vec![IpAddr::from([10, 0, 9, 254])],
            settings: WireSettings::default(),
        }),
        port(PORT, 1),
        port(QUEUELESS, 2),
    ];
    for number in [2, 3] {
        changes.push(Change::SetMember {
            vni: vni(),
            remote: vtep(number),
            flood: true,
        });
        changes.push(Change::SetFdb {
            vni: vni(),
            mac: mac(10 + number),
            remote: vtep(number),
        });
    }
    let mut writer = TableWriter::for_workers(2);
    writer.apply(&changes);
    let wire = Wire::new(1);
    let captures = Arc::new(CaptureHub::default());
    captures.set_own(vtep(1), (49_152..49_216).collect());
    let capture = captures.start(CaptureFilter::default());
    let config = WorkerConfig {
        captures,
        index,
        ..WorkerConfig::new(writer.shared())
    };
    let mut worker = Worker::new(wire.underlay(vtep(1)), config);
    let (tap, container) = MemoryTap::new(1);
    worker.add_port(PORT, 1450, Backend::Plain, Box::new(tap));
    Host {
        wire,
        worker,
        tables: writer.shared(),
        container,
        capture,
    }
}

impl Host {
    fn run(&mut self) -> Vec<Captured> {
        while self.worker.run_once(self.wire.now()) {}
        self.capture.waiting().collect()
    }

    fn port(&self, id: PortId) -> Reading {
        self.tables.load().port_meter(id).unwrap().read()
    }

    fn remote(&self, number: u8) -> Reading {
        let tables = self.tables.load();
        tables.remote_meter(vtep(number).ip()).unwrap().read()
    }
}

fn udp(from: u8, to: MacAddr, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(mac(from).octets(), to.octets())
        .ipv4([10, 0, 9, from], [10, 0, 9, 99], 64)
        .udp(1000, 2000)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

fn seen(copies: &[Captured]) -> Vec<(Place, Fate)> {
    copies.iter().map(|copy| (copy.place, copy.fate)).collect()
}

fn dropped(reading: &Reading) -> Vec<(DropReason, u64)> {
    reading
        .drops
        .iter()
        .filter(|(_, count)| *count > 0)
        .collect()
}

#[test]
fn a_send_failure_is_on_the_books_of_its_remote() {
    let mut host = host(1);
    host.wire.set_faults(Faults {
        mtu: 1000,
        ..Faults::default()
    });
    let (large, small) = (udp(1, mac(12), &[0; 1200]), udp(1, mac(13), b"small"));
    host.container.send(&large);
    host.container.send(&small);
    let copies = host.run();
    assert_eq!(
        seen(&copies),
        [
            (Place::FromPort(PORT), Fate::Send(vtep(2))),
            (Place::FromPort(PORT), Fate::Send(vtep(3))),
            (
                Place::ToRemote(vtep(2)),
                Fate::Drop(DropReason::PathTooSmall)
            ),
            (Place::ToRemote(vtep(3)), Fate::Passed),
        ]
    );
    // The copy is what was put on the wire, from the port that it was sent from.
    let wire = host.wire.take_seen();
    let outer = copies[3].outer.unwrap();
    assert_eq!((outer.from, outer.to), (wire[0].from, wire[0].to));
    assert_eq!(
        (&copies[3].bytes, copies[3].frame()),
        (&wire[0].payload, &small[..])
    );
    let bytes = (large.len() + small.len()) as u64;
    let port = host.port(PORT);
    assert_eq!(
        (port.received, port.received_bytes, port.drops.total()),
        (2, bytes, 0)
    );
    assert_eq!(dropped(&host.remote(2)), [(DropReason::PathTooSmall, 1)]);
    assert_eq!((host.remote(2).sent, host.remote(2).sent_bytes), (0, 0));
    let sent = (host.remote(3).sent, host.remote(3).sent_bytes);
    assert_eq!(sent, (1, small.len() as u64 + 8));
    let sum = Counters::sum([&host.worker.counters()]);
    assert_eq!((sum.datagrams_out, sum.datagram_bytes_out), sent);
}

#[test]
fn drops_on_the_way_in_are_on_the_books_of_who_sent_or_who_was_to_get_it() {
    let mut host = host(0);
    let good = [&Header::emit(vni())[..], &udp(12, mac(1), b"good")].concat();
    let queueless = [&Header::emit(vni())[..], &udp(12, mac(2), b"nobody")].concat();
    let foreign = [&Header::emit(vni())[..], &udp(13, mac(1), b"not its own")].concat();
    for payload in [&good, &good, &queueless, &foreign, &vec![0; 9]] {
        host.wire.inject(vtep(2), vtep(1), payload);
    }
    host.wire.inject(vtep(66), vtep(1), &good);
    let copies = host.run();
    let fates = seen(&copies);
    let from = |number, fate| (Place::FromRemote(vtep(number)), fate);
    for expected in [
        from(2, Fate::Deliver(PORT)),
        from(2, Fate::Deliver(QUEUELESS)),
        from(2, Fate::Drop(DropReason::SourceElsewhere)),
        from(2, Fate::Drop(DropReason::NoVniFlag)),
        from(66, Fate::Drop(DropReason::NotAMember)),
        (Place::ToPort(PORT), Fate::Passed),
        (Place::ToPort(PORT), Fate::Drop(DropReason::PortFull)),
        (Place::ToPort(QUEUELESS), Fate::Drop(DropReason::NoQueue)),
    ] {
        assert!(
            fates.contains(&expected),
            "{expected:?} is not in {fates:?}"
        );
    }
    assert_eq!(fates.len(), 9);
    let remote = host.remote(2);
    assert_eq!(remote.received, 5);
    assert_eq!(
        dropped(&remote),
        [(DropReason::NoVniFlag, 1), (DropReason::SourceElsewhere, 1)]
    );
    let port = host.port(PORT);
    assert_eq!(
        (port.sent, dropped(&port)),
        (1, vec![(DropReason::PortFull, 1)])
    );
    assert_eq!(dropped(&host.port(QUEUELESS)), [(DropReason::NoQueue, 1)]);
    // A stranger has no books of its own; the total counts it.
    let sum = Counters::sum([&host.worker.counters()]);
    assert_eq!(
        (sum.datagrams_in, sum.drops.get(DropReason::NotAMember)),
        (6, 1)
    );
}

#[test]
fn a_container_sees_its_own_drops_and_answers() {
    let mut host = host(0);
    host.container.send(&udp(9, mac(12), b"another's MAC"));
    let mut ping = Vec::new();
    PacketBuilder::ethernet2(mac(1).octets(), mac(0xfe).octets())
        .ipv4([10, 0, 9, 1], [10, 0, 9, 254], 64)
        .icmpv4_echo_request(1, 1)
        .write(&mut ping, b"hello")
        .unwrap();
    host.container.send(&ping);
    let fates = seen(&host.run());
    assert_eq!(
        fates,
        [
            (Place::FromPort(PORT), Fate::Drop(DropReason::GuardMac)),
            (Place::FromPort(PORT), Fate::Answer),
            (Place::ToPort(PORT), Fate::Passed),
        ]
    );
    let port = host.port(PORT);
    assert_eq!((port.received, port.sent), (2, 1));
    assert_eq!(dropped(&port), [(DropReason::GuardMac, 1)]);
}
