//! Nothing is allocated per packet: a worker that has warmed up handles every kind of frame and datagram without asking
//! the allocator for anything.

// A global allocator is unsafe by its trait; it counts and passes on.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use vtep::arp::Arp;
use vtep::edge::Offload;
use vtep::fdb::{Change, NetworkConfig, Port, PortId, TableWriter};
use vtep::settings::WireSettings;
use vtep::stats::{Counters, DropReason};
use vtep::tap::Backend;
use vtep::testing::{RepeatingTap, RepeatingUnderlay};
use vtep::vxlan::Header;
use vtep::worker::{Worker, WorkerConfig};
use vtep::{MacAddr, Vni};

struct Counting;

thread_local! {
    /// Allocations of this thread; other threads of the test harness may do as they like.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator with the arguments unchanged; the counter is a plain `Cell` that is initialised
// at compile time and has no destructor, so touching it neither allocates nor runs into a dying thread. No safe code can
// stand in for the global allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract, which is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System` through this allocator, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: as for `dealloc`; the caller keeps the contract for `size`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The size of each datagram where several were merged.
const SEGMENT: u16 = 8 + 42 + 1_000;

const OWN: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 1]);
const NEIGHBOR: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 2]);
const FAR: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 3]);
const GATEWAY: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 0xfe]);

fn udp(source: MacAddr, destination: MacAddr, from: u8) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(source.octets(), destination.octets())
        .ipv4([10, 0, 9, from], [10, 0, 9, 9], 64)
        .udp(1, 2)
        .write(&mut frame, &[7; 1_000])
        .unwrap();
    frame
}

fn super_frame(to: MacAddr, tcp: bool) -> (Vec<u8>, Offload) {
    let builder =
        PacketBuilder::ethernet2(OWN.octets(), to.octets()).ipv4([10, 0, 9, 2], [10, 0, 9, 9], 64);
    let mut frame = Vec::new();
    let (gso_type, csum_offset) = if tcp {
        builder
            .tcp(1, 2, 3, 4)
            .ack(5)
            .write(&mut frame, &[7; 60_000])
    } else {
        builder.udp(1, 2).write(&mut frame, &[7; 60_000])
    }
    .map(|()| {
        if tcp {
            (Offload::GSO_TCPV4, 16)
        } else {
            (Offload::GSO_UDP_L4, 6)
        }
    })
    .unwrap();
    let offload = Offload {
        gso_type,
        gso_size: 1_000,
        ..Offload::partial(34, csum_offset)
    };
    (frame, offload)
}

fn from_container() -> Vec<(Vec<u8>, Offload)> {
    let mut echo = Vec::new();
    PacketBuilder::ethernet2(OWN.octets(), GATEWAY.octets())
        .ipv4([10, 0, 9, 2], [10, 0, 9, 1], 64)
        .icmpv4_echo_request(1, 1)
        .write(&mut echo, &[1; 1_400])
        .unwrap();
    let mut arp = Vec::new();
    let (sender_ip, target_ip) = ([10, 0, 9, 2].into(), [10, 0, 9, 4].into());
    Arp {
        is_request: true,
        sender_mac: OWN,
        sender_ip,
        target_mac: MacAddr::ZERO,
        target_ip,
    }
    .emit(MacAddr::BROADCAST, &mut arp);
    let partial = Offload {
        flags: Offload::NEEDS_CSUM,
        csum_start: 34,
        csum_offset: 6,
        ..Offload::default()
    };
    let mut frames: Vec<_> = [
        udp(OWN, FAR, 2),
        udp(OWN, NEIGHBOR, 2),
        udp(OWN, MacAddr::BROADCAST, 2),
        udp(OWN, FAR, 66),
        udp(FAR, OWN, 2),
        echo,
        arp,
        vec![1, 2, 3],
    ]
    .map(|frame| (frame, Offload::default()))
    .into();
    frames.push((udp(OWN, FAR, 2), partial));
    // Super-frames: to a remote, to a port here that takes none, to everybody.
    for (to, tcp) in [
        (FAR, true),
        (FAR, false),
        (NEIGHBOR, true),
        (MacAddr::BROADCAST, false),
    ] {
        frames.push(super_frame(to, tcp));
    }
    frames.push((
        udp(OWN, FAR, 2),
        Offload {
            csum_start: 60_000,
            ..partial
        },
    ));
    frames
}

#[test]
fn a_warm_worker_allocates_nothing() {
    let vni = Vni::new(4096).unwrap();
    let remote = SocketAddr::from(([192, 0, 2, 2], 4789));
    let stranger = SocketAddr::from(([192, 0, 2, 66], 4789));
    let gateway_ips = vec![IpAddr::from([10, 0, 9, 1])];
    let port = |id, mac, ip| Port {
        id: PortId(id),
        vni,
        mac,
        ips: vec![IpAddr::from([10, 0, 9, ip])],
        mtu: 1450,
        any_source: false,
    };
    let mut changes = vec![
        Change::SetNetwork(NetworkConfig {
            vni,
            mtu: 1450,
            gateway_mac: GATEWAY,
            service_ips: Default::default(),
            gateway_ips,
            settings: WireSettings::default(),
        }),
        Change::AddPort(port(1, OWN, 2)),
        Change::AddPort(port(2, NEIGHBOR, 3)),
        Change::SetFdb {
            vni,
            mac: FAR,
            remote,
        },
        Change::SetNeighbor {
            vni,
            ip: IpAddr::from([10, 0, 9, 4]),
            mac: FAR,
        },
    ];
    // More hosts than fit in one batch, so that floods are sent in several.
    for number in 2..=200 {
        changes.push(Change::SetMember {
            vni,
            remote: SocketAddr::from(([192, 0, 2, number], 4789)),
            flood: number != 66,
        });
    }
    changes.push(Change::RemoveMember {
        vni,
        addr: stranger.ip(),
    });
    let mut writer = TableWriter::new();
    writer.apply(&changes);

    let encapsulated = |frame: &[u8]| [&Header::emit(vni)[..], frame].concat();
    let merged = |to| encapsulated(&udp(FAR, to, 4)).repeat(50);
    let datagrams = vec![
        (remote, encapsulated(&udp(FAR, OWN, 4)), None),
        (remote, encapsulated(&udp(FAR, MacAddr::BROADCAST, 4)), None),
        (stranger, encapsulated(&udp(FAR, OWN, 4)), None),
        (remote, encapsulated(&udp(NEIGHBOR, OWN, 4)), None),
        (remote, vec![8], None),
        (remote, merged(OWN), Some(SEGMENT)),
        (remote, merged(NEIGHBOR), Some(SEGMENT)),
    ];
    let tables = writer.shared();
    let mut worker = Worker::new(
        RepeatingUnderlay::new(datagrams),
        WorkerConfig::new(tables.clone()),
    );
    let frames = from_container();
    for (id, backend) in [(1, Backend::Offload), (2, Backend::Plain)] {
        let frames = if id == 1 { frames.clone() } else { Vec::new() };
        worker.add_port(
            PortId(id),
            1450,
            backend,
            Box::new(RepeatingTap::new(frames)),
        );
    }

    let start = Instant::now();
    for second in 0..20 {
        worker.run_once(start + Duration::from_secs(second));
    }
    let counters = worker.counters();
    let before = Counters::sum([&counters]);
    let allocations = ALLOCATIONS.get();
    for second in 20..1_020 {
        worker.run_once(start + Duration::from_secs(second));
    }
    let allocations = ALLOCATIONS.get() - allocations;
    let after = Counters::sum([&counters]);

    // The rounds did what they are here for: every kind of verdict was reached.
    assert!(after.frames_in - before.frames_in >= 5_000, "{after:?}");
    assert!(after.datagrams_in - before.datagrams_in >= 5_000);
    assert!(after.answers - before.answers >= 1_000 && after.floods - before.floods >= 1_500);
    for reason in [
        DropReason::GuardMac,
        DropReason::GuardIp,
        DropReason::BadOffload,
        DropReason::Truncated,
        DropReason::NotAMember,
        DropReason::SourceElsewhere,
    ] {
        assert!(
            after.drops.get(reason) > before.drops.get(reason),
            "{} was not reached",
            reason.name()
        );
    }
    // What passed is on the books of its port and its remote as well.
    let tables = tables.load();
    let port = tables.port_meter(PortId(1)).unwrap().read();
    assert_eq!(port.received, after.frames_in);
    assert_eq!(
        port.drops.get(DropReason::GuardMac),
        after.drops.get(DropReason::GuardMac)
    );
    let from_remote = tables.remote_meter(remote.ip()).unwrap().read();
    assert_eq!(
        from_remote.received + after.drops.get(DropReason::NotAMember),
        after.datagrams_in
    );
    assert!(tables.remote_meter(stranger.ip()).is_none());
    let sent: u64 = tables.remotes().map(|(_, meter)| meter.read().sent).sum();
    assert_eq!(sent, after.datagrams_out);
    assert_eq!(allocations, 0, "{allocations} allocations in 1,000 rounds");
}
