//! Paths that carry less than the link: two whole VTEPs on a wire in memory, with a router on it and a clock moved by hand.

#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use etherparse::{
    Icmpv4Type, Icmpv6Type, PacketBuilder, SlicedPacket, TransportSlice,
    icmpv4::DestUnreachableHeader,
};
use vtep::edge::Offload;
use vtep::fdb::{Change, NetworkConfig, Port, PortId, TableWriter};
use vtep::offload::checksum::{fold, sum};
use vtep::paths::{AGE, PathMonitor, Paths};
use vtep::settings::WireSettings;
use vtep::stats::{Counters, DropReason, WorkerCounters};
use vtep::tap::Backend;
use vtep::testing::{Container, Faults, MemoryTap, MemoryUnderlay, Wire};
use vtep::worker::{Worker, WorkerConfig};
use vtep::{MacAddr, Vni};

const PORT: PortId = PortId(1);
const NARROW: u16 = 1400;

struct Host {
    worker: Worker<MemoryUnderlay>,
    counters: Arc<WorkerCounters>,
    paths: Arc<Paths>,
    container: Container,
}

/// Hosts 1 and 2 with a container each, on one network; its MTU is the link's less the overhead.
struct Pair {
    wire: Wire,
    hosts: [Host; 2],
    mtu: u16,
    outer_v6: bool,
}

fn vni() -> Vni {
    Vni::new(4096).unwrap()
}

fn mac(number: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, number])
}

fn ips(number: u8) -> [IpAddr; 2] {
    [
        IpAddr::from([10, 0, 9, number]),
        IpAddr::from([0xfd09, 0, 0, 0, 0, 0, 0, u16::from(number)]),
    ]
}

impl Pair {
    fn new(backend: Backend, outer_v6: bool) -> Self {
        let addr = |number: u8| match outer_v6 {
            false => SocketAddr::from(([192, 0, 2, number], 4789)),
            true => SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(number)], 4789)),
        };
        let (wire, mtu) = (Wire::new(7), if outer_v6 { 1430 } else { 1450 });
        let hosts = [1, 2].map(|number| {
            let (other, vni) = (3 - number, vni());
            let remote = addr(other);
            let mut writer = TableWriter::new();
            writer.apply(&[
                Change::SetNetwork(NetworkConfig {
                    vni,
                    mtu,
                    gateway_mac: mac(0xfe),
                    service_ips: Default::default(),
                    gateway_ips: Vec::new(),
                    settings: WireSettings::default(),
                }),
                Change::AddPort(Port {
                    id: PORT,
                    vni,
                    mac: mac(number),
                    ips: ips(number).to_vec(),
                    mtu,
                    any_source: false,
                }),
                Change::SetMember {
                    vni,
                    remote,
                    flood: true,
                },
                Change::SetFdb {
                    vni,
                    mac: mac(other),
                    remote,
                },
            ]);
            let paths = Arc::new(Paths::new());
            let mut underlay = wire.underlay(addr(number));
            let monitor = PathMonitor::new(writer.shared(), Arc::clone(&paths));
            underlay.set_listener(Arc::new(monitor));
            let config = WorkerConfig {
                paths: Arc::clone(&paths),
                ..WorkerConfig::new(writer.shared())
            };
            let (tap, container) = MemoryTap::new(1_000);
            let mut worker = Worker::new(underlay, config);
            worker.add_port(PORT, mtu, backend, Box::new(tap));
            Host {
                counters: worker.counters(),
                worker,
                paths,
                container,
            }
        });
        Self {
            wire,
            hosts,
            mtu,
            outer_v6,
        }
    }

    /// From now on a router carries [`NARROW`] bytes and no more, and says so or not.
    fn narrow(&self, icmp: bool) {
        self.wire.set_faults(Faults {
            path_mtu: Some(NARROW),
            icmp,
            ..Faults::default()
        });
    }

    /// What containers can send over the narrow path.
    fn narrow_mtu(&self) -> u16 {
        NARROW - if self.outer_v6 { 70 } else { 50 }
    }

    fn run(&mut self) {
        self.wire.run(|now| {
            let hosts = self.hosts.iter_mut();
            hosts.fold(false, |worked, host| host.worker.run_once(now) | worked)
        });
    }

    /// Sends a frame from the first container; says what it got, and what the second did.
    fn send(&mut self, frame: &[u8], offload: Offload) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        self.hosts[0].container.send_with(frame, offload);
        self.run();
        let taken = |host: &Host| {
            let frames = host.container.take().into_iter();
            frames.map(|(frame, _)| frame).collect()
        };
        (taken(&self.hosts[0]), taken(&self.hosts[1]))
    }

    fn counters(&self) -> Counters {
        Counters::sum([&self.hosts[0].counters])
    }

    fn drops(&self) -> Vec<(DropReason, u64)> {
        let drops = self.counters().drops;
        drops.iter().filter(|(_, count)| *count > 0).collect()
    }
}

/// A UDP frame whose IP packet has `len` bytes.
fn udp(v6: bool, len: u16) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac(1).octets(), mac(2).octets());
    let (builder, headers) = match (ips(1), ips(2)) {
        ([_, IpAddr::V6(from)], [_, IpAddr::V6(to)]) if v6 => {
            (builder.ipv6(from.octets(), to.octets(), 64), 48)
        }
        ([IpAddr::V4(from), _], [IpAddr::V4(to), _]) => {
            (builder.ipv4(from.octets(), to.octets(), 64), 28)
        }
        _ => unreachable!("one address of each family"),
    };
    let mut frame = Vec::new();
    let payload = vec![7; usize::from(len) - headers];
    builder.udp(1, 2).write(&mut frame, &payload).unwrap();
    frame
}

/// A TCP super-frame with so many bytes of payload, each telling its place, to be cut at `mtu`.
fn tcp(payload: usize, mtu: u16) -> (Vec<u8>, Offload) {
    let mut frame = Vec::new();
    let bytes: Vec<u8> = (0..=250).cycle().take(payload).collect();
    PacketBuilder::ethernet2(mac(1).octets(), mac(2).octets())
        .ipv4([10, 0, 9, 1], [10, 0, 9, 2], 64)
        .tcp(1, 2, 3, 4)
        .write(&mut frame, &bytes)
        .unwrap();
    super_frame(frame, 6, Offload::GSO_TCPV4, mtu - 40, 16)
}

/// Leaves the checksum to a card, and the cutting.
fn super_frame(
    mut frame: Vec<u8>,
    protocol: u64,
    gso_type: u8,
    gso_size: u16,
    at: u16,
) -> (Vec<u8>, Offload) {
    let pseudo = protocol + (frame.len() - 34) as u64 + sum(&frame[26..34]);
    let field = 34 + usize::from(at);
    frame[field..field + 2].copy_from_slice(&fold(pseudo).to_be_bytes());
    let offload = Offload {
        gso_type,
        gso_size,
        ..Offload::partial(34, at)
    };
    (frame, offload)
}

/// The MTU that an ICMP error of either family tells, and from which address, as a reader that is not ours sees it.
fn told(frame: &[u8]) -> (u32, IpAddr) {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let from = match sliced.net.unwrap() {
        etherparse::NetSlice::Ipv4(ip) => IpAddr::V4(ip.header().source_addr()),
        etherparse::NetSlice::Ipv6(ip) => IpAddr::V6(ip.header().source_addr()),
        etherparse::NetSlice::Arp(_) => panic!("ARP"),
    };
    let mtu = match sliced.transport {
        Some(TransportSlice::Icmpv4(icmp)) => match icmp.icmp_type() {
            Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                next_hop_mtu,
            }) => u32::from(next_hop_mtu),
            other => panic!("{other:?}"),
        },
        Some(TransportSlice::Icmpv6(icmp)) => match icmp.icmp_type() {
            Icmpv6Type::PacketTooBig { mtu } => mtu,
            other => panic!("{other:?}"),
        },
        _ => panic!("no ICMP"),
    };
    (mtu, from)
}

#[test]
fn a_router_is_heard_and_containers_are_told() {
    // Conformance V13, both families inside and outside; DF is not set in these packets.
    for outer_v6 in [false, true] {
        for v6 in [false, true] {
            let mut pair = Pair::new(Backend::Offload, outer_v6);
            pair.narrow(true);
            let full = udp(v6, pair.mtu);
            // The first is lost at the router, which says so; who sends another is told.
            let (told_1, got_1) = pair.send(&full, Offload::default());
            assert_eq!((told_1.len(), got_1.len()), (0, 0));
            let (told_2, got_2) = pair.send(&full, Offload::default());
            assert_eq!(got_2.len(), 0);
            let mtu = u32::from(pair.narrow_mtu());
            assert_eq!(told(&told_2[0]), (mtu, ips(2)[usize::from(v6)]));
            assert_eq!(pair.drops(), [(DropReason::PathTooSmall, 1)]);
            assert_eq!(pair.counters().too_big_answers, 1);
            // What fits passes, to the byte; one byte more does not.
            let (none, got) = pair.send(&udp(v6, pair.narrow_mtu()), Offload::default());
            assert_eq!((none.len(), got), (0, vec![udp(v6, pair.narrow_mtu())]));
            let (again, none) = pair.send(&udp(v6, pair.narrow_mtu() + 1), Offload::default());
            assert_eq!((again.len(), none.len()), (1, 0));
        }
    }
}

#[test]
fn a_healed_path_is_used_again_after_its_age() {
    // Conformance V13: RFC 1191 §6.3, in virtual time.
    let mut pair = Pair::new(Backend::Offload, false);
    pair.narrow(true);
    let full = udp(false, pair.mtu);
    pair.send(&full, Offload::default());
    pair.wire.set_faults(Faults::default());
    pair.wire.advance(AGE - Duration::from_secs(1));
    let (told, got) = pair.send(&full, Offload::default());
    assert_eq!((told.len(), got.len()), (1, 0), "not yet");
    pair.wire.advance(Duration::from_secs(1));
    let (told, got) = pair.send(&full, Offload::default());
    assert_eq!((told.len(), got), (0, vec![full]));
}

#[test]
fn tcp_is_cut_to_fit() {
    // Conformance V13: nobody need be told, the path is known from probes.
    for (backend, outer_v6) in [
        (Backend::Offload, false),
        (Backend::Plain, false),
        (Backend::Offload, true),
    ] {
        let mut pair = Pair::new(backend, outer_v6);
        pair.narrow(false);
        let remote = match outer_v6 {
            false => IpAddr::from([192, 0, 2, 2]),
            true => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 2]),
        };
        let now = pair.wire.now();
        pair.hosts[0].paths.measured(remote, Some(NARROW), now);
        let (frame, offload) = tcp(30_000, pair.mtu);
        let (told, got) = pair.send(&frame, offload);
        assert_eq!(told.len(), 0);
        let bytes: Vec<u8> = got.iter().flat_map(|frame| frame[54..].to_vec()).collect();
        assert_eq!(bytes, frame[54..], "all bytes, in order");
        let longest = pair
            .wire
            .take_seen()
            .iter()
            .map(|seen| seen.payload.len())
            .max();
        let headers = if outer_v6 { 48 } else { 28 };
        assert_eq!(
            longest,
            Some(usize::from(NARROW) - headers),
            "as large as can be"
        );
        assert_eq!(pair.drops(), []);
    }
}

#[test]
fn udp_left_to_be_cut_is_told_with_its_first_segment() {
    // Conformance V13.
    let mut pair = Pair::new(Backend::Offload, false);
    let now = pair.wire.now();
    let remote = IpAddr::from([192, 0, 2, 2]);
    pair.hosts[0].paths.measured(remote, Some(NARROW), now);
    let (frame, offload) = {
        let frame = udp(false, 9_000);
        super_frame(frame, 17, Offload::GSO_UDP_L4, 1422, 6)
    };
    let (answers, got) = pair.send(&frame, offload);
    assert_eq!(got.len(), 0);
    assert_eq!(told(&answers[0]).0, u32::from(pair.narrow_mtu()));
    // The quoted packet has the length of a segment, not that of all.
    assert_eq!(answers[0][14 + 28 + 2..][..2], 1450_u16.to_be_bytes());
    assert_eq!(pair.drops(), [(DropReason::PathTooSmall, 1)]);
    let (small, offload) = super_frame(udp(false, 9_000), 17, Offload::GSO_UDP_L4, 1322, 6);
    assert_eq!(pair.send(&small, offload).1.len(), 7);
}

#[test]
fn the_links_own_refusal_is_told_at_once() {
    // Conformance V12, V13: the link became smaller while it was in use.
    for v6 in [false, true] {
        let mut pair = Pair::new(Backend::Offload, false);
        pair.wire.set_faults(Faults {
            mtu: NARROW,
            ..Faults::default()
        });
        let (answers, got) = pair.send(&udp(v6, pair.mtu), Offload::default());
        assert_eq!(got.len(), 0);
        assert_eq!(told(&answers[0]).0, u32::from(pair.narrow_mtu()));
        assert_eq!(pair.drops(), [(DropReason::PathTooSmall, 1)]);
    }
    // A short frame that leaves in one message with a long one is not the long one's concern.
    let mut pair = Pair::new(Backend::Offload, false);
    pair.wire.set_faults(Faults {
        mtu: NARROW,
        ..Faults::default()
    });
    pair.hosts[0]
        .container
        .send_with(&udp(false, pair.mtu), Offload::default());
    let (answers, got) = pair.send(&udp(false, 60), Offload::default());
    assert_eq!((answers.len(), got), (1, vec![udp(false, 60)]));
    assert_eq!(told(&answers[0]).0, u32::from(pair.narrow_mtu()));
    // A super-frame is cut again, to what the link takes.
    let mut pair = Pair::new(Backend::Offload, false);
    pair.wire.set_faults(Faults {
        mtu: NARROW,
        ..Faults::default()
    });
    let (frame, offload) = tcp(30_000, pair.mtu);
    let (told, got) = pair.send(&frame, offload);
    assert_eq!(told.len(), 0);
    let bytes: Vec<u8> = got.iter().flat_map(|frame| frame[54..].to_vec()).collect();
    // The last segment was short enough at once, and comes again.
    assert!(bytes.ends_with(&frame[54..]), "{} bytes", bytes.len());
}

#[test]
fn what_nobody_can_be_told_of_is_counted() {
    // Conformance V13: no IP, and a group; a narrow path takes nothing from the members beside it.
    let mut pair = Pair::new(Backend::Offload, false);
    let now = pair.wire.now();
    let remote = IpAddr::from([192, 0, 2, 2]);
    pair.hosts[0].paths.measured(remote, Some(NARROW), now);
    let mut other = udp(false, pair.mtu);
    other[12] = 0x99;
    let mut group = udp(false, pair.mtu);
    group[..6].copy_from_slice(&[0xff; 6]);
    for frame in [other, group] {
        let (told, got) = pair.send(&frame, Offload::default());
        assert_eq!((told.len(), got.len()), (0, 0));
    }
    assert_eq!(pair.drops(), [(DropReason::PathTooSmall, 2)]);
    assert_eq!(pair.counters().too_big_answers, 0);
}

#[test]
fn answers_are_limited() {
    // Conformance V13.
    let mut pair = Pair::new(Backend::Offload, false);
    let now = pair.wire.now();
    let remote = IpAddr::from([192, 0, 2, 2]);
    pair.hosts[0].paths.measured(remote, Some(NARROW), now);
    let mut send = |count: usize| {
        for _ in 0..count {
            let full = udp(false, 1450);
            pair.hosts[0].container.send(&full);
        }
        pair.hosts[0].worker.run_once(now);
        for _ in 0..count / 64 {
            pair.hosts[0].worker.run_once(now);
        }
        pair.hosts[0].container.take().len()
    };
    let answered = send(500);
    assert!((100..101).contains(&answered), "{answered}");
    assert_eq!(pair.drops(), [(DropReason::PathTooSmall, 500)]);
    let later = now + Duration::from_millis(100);
    pair.hosts[0].container.send(&udp(false, 1450));
    pair.hosts[0].worker.run_once(later);
    assert_eq!(
        pair.hosts[0].container.take().len(),
        1,
        "ten more a tenth of a second"
    );
}

#[test]
fn a_router_that_lies_changes_nothing() {
    // Conformance H6: see also the monitor's own tests. Less than any path carries is not believed.
    let mut pair = Pair::new(Backend::Offload, false);
    pair.wire.set_faults(Faults {
        path_mtu: Some(500),
        icmp: true,
        ..Faults::default()
    });
    pair.send(&udp(false, 1450), Offload::default());
    assert_eq!(pair.hosts[0].paths.all(Instant::now()), []);
    assert_eq!(pair.hosts[0].paths.reports().doubted, 1);
    assert_eq!(pair.hosts[0].paths.take_suspects().len(), 1);
}

#[test]
fn members_answer_probes_and_strangers_get_nothing() {
    let mut pair = Pair::new(Backend::Offload, false);
    let (member, here) = (
        SocketAddr::from(([192, 0, 2, 2], 50_000)),
        SocketAddr::from(([192, 0, 2, 1], 4789)),
    );
    let stranger = SocketAddr::from(([192, 0, 2, 9], 50_000));
    let probe = vtep::probe::payload(&here, &[9; 16], 1400).unwrap();
    for (from, answers) in [(member, 1), (stranger, 0)] {
        pair.wire.inject(from, here, &probe);
        pair.run();
        let seen = pair.wire.take_seen();
        let answered: Vec<_> = seen.iter().filter(|seen| seen.to != here).collect();
        assert_eq!(answered.len(), answers, "{from}");
        for answer in answered {
            // To the port that the member receives on, and no longer than what came.
            assert_eq!(answer.to, SocketAddr::from(([192, 0, 2, 2], 4789)));
            assert!(answer.payload.len() <= probe.len() && answer.payload.starts_with(b"TLPA"));
        }
    }
    // The member got an answer that it did not ask for; the stranger's probe was dropped here.
    let others = Counters::sum([&pair.hosts[1].counters]);
    assert_eq!(others.drops.get(DropReason::UnexpectedProbe), 1);
    assert_eq!(pair.drops(), [(DropReason::UnexpectedProbe, 1)]);
    // A storm is answered up to a limit.
    for _ in 0..3_000 {
        pair.wire.inject(member, here, &probe);
    }
    let now = pair.wire.now();
    while pair.hosts[0].worker.run_once(now) {}
    let answered = pair
        .wire
        .take_seen()
        .iter()
        .filter(|seen| seen.to != here)
        .count();
    assert!((199..=200).contains(&answered), "{answered}");
}
