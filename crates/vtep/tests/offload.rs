//! Super-frames through whole VTEPs in memory: cut where they leave a host, merged where they arrive, left alone between ports of
//! one host.
//!
//! Container N has MAC 02:…:0N and address 10.0.9.N or fd00::N. Hosts 1 and 2 have containers 1 and 2; container 3 is on host 1, too.

#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use vtep::edge::{Offload, TapFeatures};
use vtep::fdb::{Change, NetworkConfig, Port, PortId, TableWriter};
use vtep::offload::checksum::{L4, inspect};
use vtep::settings::WireSettings;
use vtep::stats::{Counters, DropReason, WorkerCounters};
use vtep::tap::Backend;
use vtep::testing::{Container, Faults, MemoryTap, MemoryUnderlay, Wire};
use vtep::worker::{Worker, WorkerConfig};
use vtep::{MacAddr, Vni};

const MTU: u16 = 1450;

struct Host {
    worker: Worker<MemoryUnderlay>,
    counters: Arc<WorkerCounters>,
}

struct Cluster {
    wire: Wire,
    hosts: Vec<Host>,
    containers: Vec<Container>,
}

fn vni() -> Vni {
    Vni::new(4096).unwrap()
}

fn mac(number: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, number])
}

fn ips(number: u8) -> Vec<IpAddr> {
    let mut v6 = [0; 16];
    (v6[0], v6[15]) = (0xfd, number);
    vec![[10, 0, 9, number].into(), v6.into()]
}

fn addr(host: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, host], 4789))
}

impl Cluster {
    /// Container 1 has a port with all offloads, the others one of `backend`.
    fn new(backend: Backend) -> Self {
        let wire = Wire::new(7);
        wire.set_faults(Faults {
            merge: true,
            ..Faults::default()
        });
        let mut containers: Vec<Option<Container>> = vec![None, None, None];
        let mut host = |number: u8, here: &[u8], there: &[u8]| {
            let other = addr(3 - number);
            let mut changes = vec![
                Change::SetNetwork(NetworkConfig {
                    vni: vni(),
                    mtu: MTU,
                    gateway_mac: mac(0xfe),
                    service_ips: Default::default(),
                    gateway_ips: vec![IpAddr::from([10, 0, 9, 254])],
                    settings: WireSettings::default(),
                }),
                Change::SetMember {
                    vni: vni(),
                    remote: other,
                    flood: true,
                },
            ];
            changes.extend(there.iter().map(|&number| Change::SetFdb {
                vni: vni(),
                mac: mac(number),
                remote: other,
            }));
            changes.extend(here.iter().map(|&number| {
                Change::AddPort(Port {
                    id: PortId(u32::from(number)),
                    vni: vni(),
                    mac: mac(number),
                    ips: ips(number),
                    mtu: MTU,
                    any_source: false,
                })
            }));
            let mut writer = TableWriter::new();
            writer.apply(&changes);
            let mut worker = Worker::new(
                wire.underlay(addr(number)),
                WorkerConfig::new(writer.shared()),
            );
            for &number in here {
                let (tap, container) = MemoryTap::new(1_000);
                let backend = if number == 1 {
                    Backend::Offload
                } else {
                    backend
                };
                if backend == Backend::Offload {
                    container.set_features(TapFeatures::ALL);
                }
                worker.add_port(PortId(u32::from(number)), MTU, backend, Box::new(tap));
                containers[usize::from(number) - 1] = Some(container);
            }
            Host {
                counters: worker.counters(),
                worker,
            }
        };
        let hosts = vec![host(1, &[1, 3], &[2]), host(2, &[2], &[1, 3])];
        let containers = containers.into_iter().map(Option::unwrap).collect();
        Self {
            wire,
            hosts,
            containers,
        }
    }

    fn container(&self, number: usize) -> &Container {
        &self.containers[number - 1]
    }

    fn run(&mut self) {
        self.wire.run(|now| {
            self.hosts
                .iter_mut()
                .fold(false, |worked, host| host.worker.run_once(now) | worked)
        });
    }

    fn counters(&self, host: usize) -> Counters {
        Counters::sum([&self.hosts[host - 1].counters])
    }
}

#[derive(Clone, Copy, Debug)]
struct Kind {
    v6: bool,
    tcp: bool,
}

const KINDS: [Kind; 4] = [
    Kind {
        v6: false,
        tcp: true,
    },
    Kind {
        v6: true,
        tcp: true,
    },
    Kind {
        v6: false,
        tcp: false,
    },
    Kind {
        v6: true,
        tcp: false,
    },
];

/// A frame from container 1 as its kernel hands it over, to be cut to 1,000 bytes of payload each.
fn super_frame(kind: Kind, to: MacAddr, payload: &[u8]) -> (Vec<u8>, Offload) {
    let builder = PacketBuilder::ethernet2(mac(1).octets(), to.octets());
    let builder = match (kind.v6, ips(1)[1], ips(2)[1]) {
        (true, IpAddr::V6(from), IpAddr::V6(to)) => builder.ipv6(from.octets(), to.octets(), 64),
        _ => builder.ipv4([10, 0, 9, 1], [10, 0, 9, 2], 64),
    };
    let mut frame = Vec::new();
    if kind.tcp {
        let tcp = builder.tcp(5, 6, u32::MAX - 3, 4).ack(5).psh();
        tcp.write(&mut frame, payload).unwrap();
    } else {
        builder.udp(5, 6).write(&mut frame, payload).unwrap();
    }
    let start = if kind.v6 { 54 } else { 34 };
    let (gso_type, offset) = match (kind.tcp, kind.v6) {
        (false, _) => (Offload::GSO_UDP_L4, 6),
        (true, false) => (Offload::GSO_TCPV4, 16),
        (true, true) => (Offload::GSO_TCPV6, 16),
    };
    // What the field holds is not looked at.
    frame[usize::from(start + offset)] ^= 0x55;
    let offload = Offload {
        gso_type,
        gso_size: 1_000,
        ..Offload::partial(start, offset)
    };
    (frame, offload)
}

fn payload(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

/// What TCP or UDP carries, with the whole packet's headers checked by an independent parser.
fn carried(frame: &[u8]) -> Vec<u8> {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    if let Some(NetSlice::Ipv4(ip)) = &packet.net {
        let header = ip.header();
        assert_eq!(
            header.header_checksum(),
            header.to_header().calc_header_checksum()
        );
    }
    match packet.transport {
        Some(TransportSlice::Tcp(tcp)) => tcp.payload().to_vec(),
        Some(TransportSlice::Udp(udp)) => udp.payload().to_vec(),
        other => panic!("neither TCP nor UDP: {other:?}"),
    }
}

#[test]
fn a_super_frame_crosses_in_datagrams_and_arrives_as_one() {
    for kind in KINDS {
        let mut cluster = Cluster::new(Backend::Offload);
        let sent = payload(60_500);
        let (frame, offload) = super_frame(kind, mac(2), &sent);
        cluster.container(1).send_with(&frame, offload);
        cluster.run();
        let seen = cluster.wire.take_seen();
        assert_eq!(seen.len(), 61, "{kind:?}");
        for datagram in &seen {
            assert_eq!(inspect(&datagram.payload[8..]), L4::Valid);
            assert_eq!(datagram.from, seen[0].from, "one flow, one source port");
        }
        let taken = cluster.container(2).take();
        let [(merged, offload)] = &taken[..] else {
            panic!("{} frames for {kind:?}", taken.len())
        };
        assert_eq!(carried(merged), sent);
        assert_eq!(
            (offload.gso_size, offload.flags),
            (1_000, Offload::NEEDS_CSUM)
        );
        // The engine and the counters see it once on the way out, and each datagram on the way in.
        let (one, two) = (cluster.counters(1), cluster.counters(2));
        assert_eq!((one.frames_in, one.datagrams_out), (1, 61));
        assert_eq!((two.datagrams_in, two.frames_out), (61, 1));
        assert_eq!(one.datagram_bytes_out, two.datagram_bytes_in);
        assert_eq!(one.drops.total() + two.drops.total(), 0);
    }
}

#[test]
fn a_plain_port_gets_whole_frames() {
    for kind in KINDS {
        let mut cluster = Cluster::new(Backend::Plain);
        let sent = payload(5_500);
        let (frame, offload) = super_frame(kind, mac(2), &sent);
        cluster.container(1).send_with(&frame, offload);
        cluster.run();
        let mut got = Vec::new();
        for (frame, offload) in cluster.container(2).take() {
            assert_eq!((inspect(&frame), offload), (L4::Valid, Offload::default()));
            got.extend(carried(&frame));
        }
        assert_eq!(got, sent, "{kind:?}");
    }
}

#[test]
fn between_ports_of_one_host_nothing_is_cut_where_it_need_not_be() {
    for kind in KINDS {
        let mut cluster = Cluster::new(Backend::Offload);
        let sent = payload(60_500);
        let (frame, offload) = super_frame(kind, mac(3), &sent);
        cluster.container(1).send_with(&frame, offload);
        cluster.run();
        let taken = cluster.container(3).take();
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].0, frame, "not one byte of it is touched");
        assert_eq!(
            (taken[0].1.gso_type, taken[0].1.gso_size),
            (offload.gso_type, 1_000)
        );

        let mut cluster = Cluster::new(Backend::Plain);
        cluster.container(1).send_with(&frame, offload);
        cluster.run();
        let mut got = Vec::new();
        for (frame, offload) in cluster.container(3).take() {
            assert_eq!((inspect(&frame), offload), (L4::Valid, Offload::default()));
            got.extend(carried(&frame));
        }
        assert_eq!(got, sent, "{kind:?}");
        assert!(cluster.wire.take_seen().is_empty());
    }
}

#[test]
fn a_flooded_super_frame_reaches_every_port_and_host() {
    let mut cluster = Cluster::new(Backend::Offload);
    let group = MacAddr::new([1, 0, 0x5e, 0, 0, 9]);
    let sent = payload(3_000);
    let (frame, offload) = super_frame(KINDS[2], group, &sent);
    cluster.container(1).send_with(&frame, offload);
    cluster.run();
    assert_eq!(cluster.wire.take_seen().len(), 3);
    assert!(cluster.container(1).take().is_empty());
    for number in [2, 3] {
        let frames = cluster.container(number).take();
        let got: Vec<u8> = frames
            .iter()
            .flat_map(|(frame, _)| carried(frame))
            .collect();
        assert_eq!(got, sent, "container {number}");
    }
}

#[test]
fn ordinary_frames_of_one_flow_arrive_merged_and_in_order() {
    let mut cluster = Cluster::new(Backend::Offload);
    for number in 0..50 {
        let (mut frame, _) = super_frame(KINDS[2], mac(2), &[number; 64]);
        frame[40] ^= 0x55;
        cluster.container(1).send(&frame);
    }
    cluster.run();
    let taken = cluster.container(2).take();
    assert_eq!(taken.len(), 1);
    let sent: Vec<u8> = (0..50).flat_map(|number| [number; 64]).collect();
    assert_eq!(carried(&taken[0].0), sent);
}

#[test]
fn frames_padded_on_the_way_arrive_as_they_were() {
    for backend in [Backend::Offload, Backend::Plain] {
        let mut cluster = Cluster::new(backend);
        let sent: Vec<_> = (0..100u8)
            .map(|number| {
                let len = 64 + usize::from(number) * 37 % 199;
                let (mut frame, _) = super_frame(KINDS[2], mac(2), &vec![number; len]);
                frame[40] ^= 0x55;
                frame
            })
            .collect();
        for frame in &sent {
            cluster.container(1).send(frame);
        }
        cluster.run();
        let seen = cluster.wire.take_seen();
        assert!(
            seen.iter()
                .zip(&sent)
                .any(|(seen, frame)| seen.payload.len() > 8 + frame.len())
        );
        let got: Vec<u8> = cluster
            .container(2)
            .take()
            .iter()
            .flat_map(|(frame, _)| carried(frame))
            .collect();
        assert_eq!(
            got,
            sent.iter()
                .flat_map(|frame| carried(frame))
                .collect::<Vec<_>>()
        );
    }
}

#[test]
fn what_the_wire_does_to_segments_never_mixes_bytes() {
    let mut cluster = Cluster::new(Backend::Offload);
    cluster.wire.set_faults(Faults {
        loss: 0.05,
        duplication: 0.05,
        jitter: Duration::from_millis(3),
        merge: true,
        ..Faults::default()
    });
    let sent = payload(60_500);
    for kind in KINDS {
        let (frame, offload) = super_frame(kind, mac(2), &sent);
        cluster.container(1).send_with(&frame, offload);
    }
    cluster.run();
    let frames = cluster.container(2).take();
    assert!(frames.len() > 8, "the wire did nothing");
    for (frame, offload) in frames {
        // Wherever a segment went, its place in the stream is told by TCP, and each UDP payload is whole.
        let got = carried(&frame);
        let size = if offload.is_gso() { 1_000 } else { got.len() };
        let packet = SlicedPacket::from_ethernet(&frame).unwrap();
        if let Some(TransportSlice::Tcp(tcp)) = packet.transport {
            let at = tcp.sequence_number().wrapping_sub(u32::MAX - 3) as usize;
            assert_eq!(got, sent[at..at + got.len()]);
        } else {
            for part in got.chunks(size) {
                assert!(
                    sent.windows(part.len())
                        .step_by(1_000)
                        .any(|place| place == part)
                );
            }
        }
    }
}

#[test]
fn an_impossible_super_frame_is_refused_and_counted() {
    // Conformance H7.
    let mut cluster = Cluster::new(Backend::Offload);
    let (frame, good) = super_frame(KINDS[0], mac(2), &payload(60_000));
    for bad in [
        Offload {
            gso_size: 0,
            ..good
        },
        Offload {
            gso_size: MTU,
            ..good
        },
        Offload {
            gso_type: Offload::GSO_UDP_L4,
            ..good
        },
        Offload {
            gso_type: 77,
            ..good
        },
        Offload {
            csum_start: u16::MAX,
            ..good
        },
        Offload { flags: 0, ..good },
    ] {
        cluster.container(1).send_with(&frame, bad);
    }
    cluster.container(1).send_with(&frame, Offload::default());
    cluster.container(1).send_with(&frame, good);
    cluster.run();
    let drops = cluster.counters(1).drops;
    assert_eq!(drops.get(DropReason::BadOffload), 6);
    assert_eq!(drops.get(DropReason::Oversize), 1);
    assert_eq!(drops.total(), 7);
    assert_eq!(cluster.wire.take_seen().len(), 60);
}
