//! What the engine decides, frame by frame and line by line of the conformance list.

use std::sync::Arc;
use std::time::Duration;

use etherparse::PacketBuilder;
use proptest::prelude::*;

use super::*;
use crate::arp::Arp;
use crate::fdb::{Change, NetworkConfig, TableWriter};
use crate::nd::tests::solicitation;
use crate::settings::WireSettings;

/// The network under test.
const VNI: u32 = 4096;
/// A second network with the same MACs behind other hosts.
const TWIN: u32 = 4097;
/// A network that does not flood.
const QUIET: u32 = 4098;
/// A network that passes 802.1Q tags.
const TAGGED: u32 = 4099;

const A: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 1]);
const B: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 2]);
const FAR: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 3]);
const FARTHER: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 4]);
const NOBODY: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 9]);
const GATEWAY: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 0xfe]);

const PORT_A: PortId = PortId(1);
const PORT_B: PortId = PortId(2);
const PORT_QUIET: PortId = PortId(3);
const PORT_TAGGED: PortId = PortId(4);

fn vni(number: u32) -> Vni {
    Vni::new(number).unwrap()
}

fn remote(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 4789))
}

/// Host 1 with A and B; FAR on host 2, FARTHER on host 3; host 4 a member without endpoints that is masked.
fn tables() -> Arc<Tables> {
    tables_with([])
}

fn tables_with(more: impl IntoIterator<Item = Change>) -> Arc<Tables> {
    let mut changes = Vec::new();
    for (number, flood) in [(VNI, true), (TWIN, true), (QUIET, false), (TAGGED, true)] {
        let vni = vni(number);
        let gateway_ips = vec!["10.0.9.1".parse().unwrap()];
        changes.push(Change::SetNetwork(NetworkConfig {
            vni,
            mtu: 1450,
            gateway_mac: GATEWAY,
            gateway_ips,
            settings: WireSettings {
                flood,
                vlan: if number == TAGGED {
                    Vlan::Pass
                } else {
                    Vlan::Drop
                },
                ..WireSettings::default()
            },
        }));
        // In the twin network the same MACs are behind the hosts in reverse.
        for (mac, host) in [(FAR, 2), (FARTHER, 3)] {
            let host = if number == TWIN { 5 - host } else { host };
            changes.push(Change::SetFdb {
                vni,
                mac,
                remote: remote(host),
            });
        }
        changes.push(Change::SetMember {
            vni,
            remote: remote(2),
            flood: true,
        });
        changes.push(Change::SetMember {
            vni,
            remote: remote(3),
            flood: true,
        });
        changes.push(Change::SetMember {
            vni,
            remote: remote(4),
            flood: false,
        });
        changes.push(Change::SetNeighbor {
            vni,
            ip: "10.0.9.4".parse().unwrap(),
            mac: FAR,
        });
    }
    for (id, number, mac, ip) in [
        (PORT_A, VNI, A, "10.0.9.2"),
        (PORT_B, VNI, B, "10.0.9.3"),
        (PORT_QUIET, QUIET, A, "10.0.9.2"),
        (PORT_TAGGED, TAGGED, A, "10.0.9.2"),
    ] {
        let ips = vec![
            ip.parse().unwrap(),
            format!("fd00::{}", mac.octets()[5]).parse().unwrap(),
        ];
        changes.push(Change::AddPort(Port {
            id,
            vni: vni(number),
            mac,
            ips,
            mtu: 1450,
        }));
    }
    changes.extend(more);
    let mut writer = TableWriter::new();
    writer.apply(&changes);
    writer.shared().load_full()
}

fn udp(source: MacAddr, destination: MacAddr) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(source.octets(), destination.octets())
        .ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
        .udp(1, 2)
        .write(&mut frame, b"payload")
        .unwrap();
    frame
}

fn tagged(mut frame: Vec<u8>) -> Vec<u8> {
    frame.splice(12..12, [0x81, 0, 0, 5]);
    frame
}

fn encapsulated(number: u32, frame: &[u8]) -> Vec<u8> {
    [&Header::emit(vni(number))[..], frame].concat()
}

fn sent(port: PortId, frame: &[u8]) -> Verdict<'static> {
    // Leaked, so that a verdict may be compared without keeping its tables in every test.
    let tables = Box::leak(Box::new(tables()));
    Engine::new(Settings::default()).handle_frame(tables, port, frame, Instant::now())
}

fn received(settings: Settings, from: SocketAddr, payload: &[u8]) -> Verdict<'static> {
    let tables = Box::leak(Box::new(tables()));
    Engine::new(settings)
        .handle_datagram(tables, from, payload, Instant::now())
        .verdict
}

fn arrived(from: SocketAddr, frame: &[u8]) -> Verdict<'static> {
    received(Settings::default(), from, &encapsulated(VNI, frame))
}

#[test]
fn unicast_goes_to_the_one_place_it_is_for() {
    assert_eq!(sent(PORT_A, &udp(A, B)), Verdict::Deliver { port: PORT_B });
    assert_eq!(
        sent(PORT_A, &udp(A, FAR)),
        Verdict::Send {
            vni: vni(VNI),
            remote: remote(2)
        }
    );
    assert_eq!(
        arrived(remote(2), &udp(FAR, A)),
        Verdict::Deliver { port: PORT_A }
    );
    assert_eq!(
        sent(PORT_A, &udp(A, A)),
        Verdict::Drop(DropReason::ToItself)
    );
}

#[test]
fn an_arrival_says_its_network_and_its_frame() {
    let tables = tables();
    let frame = udp(FAR, A);
    let payload = encapsulated(VNI, &frame);
    let arrival = Engine::new(Settings::default()).handle_datagram(
        &tables,
        remote(2),
        &payload,
        Instant::now(),
    );
    assert_eq!((arrival.vni, arrival.frame), (Some(vni(VNI)), &frame[..]));
}

#[test]
fn reserved_bits_are_ignored_unless_asked_for() {
    // Conformance V2.
    let strict = Settings {
        strict_reserved_bits: true,
        ..Settings::default()
    };
    for bit in (0..64).filter(|bit| *bit != 4 && !(32..56).contains(bit)) {
        let mut payload = encapsulated(VNI, &udp(FAR, A));
        payload[bit / 8] |= 0x80 >> (bit % 8);
        assert_eq!(
            received(Settings::default(), remote(2), &payload),
            Verdict::Deliver { port: PORT_A },
            "bit {bit}"
        );
        assert_eq!(
            received(strict, remote(2), &payload),
            Verdict::Drop(DropReason::ReservedBits),
            "bit {bit}"
        );
    }
}

#[test]
fn without_the_i_flag_nothing_passes() {
    // Conformance V3.
    let mut payload = encapsulated(VNI, &udp(FAR, A));
    payload[0] = 0;
    assert_eq!(
        received(Settings::default(), remote(2), &payload),
        Verdict::Drop(DropReason::NoVniFlag)
    );
}

#[test]
fn networks_do_not_meet() {
    // Conformance V4: an unknown VNI, and the same MAC in two networks.
    let unknown = encapsulated(1, &udp(FAR, A));
    assert_eq!(
        received(Settings::default(), remote(2), &unknown),
        Verdict::Drop(DropReason::UnknownVni)
    );
    // In the twin network FAR is on host 3, and no port is here: nothing reaches the port with MAC A of the first.
    let twin = encapsulated(TWIN, &udp(FAR, A));
    assert_eq!(
        received(Settings::default(), remote(2), &twin),
        Verdict::Drop(DropReason::SourceElsewhere)
    );
    let Verdict::Flood { ports, remotes, .. } = received(Settings::default(), remote(3), &twin)
    else {
        panic!("no flood")
    };
    assert!(ports.is_empty() && remotes.is_empty());
}

#[test]
fn any_source_port_is_accepted() {
    // Conformance V9.
    for port in [1, 4789, 49_152, 65_535] {
        let from = SocketAddr::new(remote(2).ip(), port);
        assert_eq!(
            arrived(from, &udp(FAR, A)),
            Verdict::Deliver { port: PORT_A },
            "port {port}"
        );
    }
}

#[test]
fn tags_are_dropped_both_ways_unless_the_network_passes_them() {
    // Conformance V15.
    assert_eq!(
        sent(PORT_A, &tagged(udp(A, FAR))),
        Verdict::Drop(DropReason::VlanTag)
    );
    assert_eq!(
        arrived(remote(2), &tagged(udp(FAR, A))),
        Verdict::Drop(DropReason::VlanTag)
    );
    assert_eq!(
        sent(PORT_TAGGED, &tagged(udp(A, FAR))),
        Verdict::Send {
            vni: vni(TAGGED),
            remote: remote(2)
        }
    );
    let payload = encapsulated(TAGGED, &tagged(udp(FAR, A)));
    assert_eq!(
        received(Settings::default(), remote(2), &payload),
        Verdict::Deliver { port: PORT_TAGGED }
    );
}

#[test]
fn group_and_unknown_frames_go_once_to_every_host_with_an_endpoint() {
    // Conformance V16; host 4 is a member that gets no floods.
    for destination in [
        MacAddr::BROADCAST,
        MacAddr::new([0x33, 0x33, 0, 0, 0, 1]),
        NOBODY,
    ] {
        let Verdict::Flood {
            vni: of,
            ports,
            remotes,
        } = sent(PORT_A, &udp(A, destination))
        else {
            panic!("no flood")
        };
        assert_eq!(
            (of, ports, remotes),
            (vni(VNI), &[PORT_A, PORT_B][..], &[remote(2), remote(3)][..])
        );
    }
}

#[test]
fn without_flooding_only_the_table_answers() {
    // Conformance V16: `flood = false`.
    assert_eq!(
        sent(PORT_QUIET, &udp(A, MacAddr::BROADCAST)),
        Verdict::Drop(DropReason::FloodOff)
    );
    assert_eq!(
        sent(PORT_QUIET, &udp(A, NOBODY)),
        Verdict::Drop(DropReason::FloodOff)
    );
    assert_eq!(
        sent(PORT_QUIET, &arp([10, 0, 9, 4])),
        Verdict::Answer { len: 42 }
    );
    assert_eq!(
        sent(PORT_QUIET, &arp([10, 0, 9, 5])),
        Verdict::Drop(DropReason::FloodOff)
    );
    let payload = encapsulated(QUIET, &udp(FAR, MacAddr::BROADCAST));
    assert_eq!(
        received(Settings::default(), remote(2), &payload),
        Verdict::Drop(DropReason::FloodOff)
    );
}

#[test]
fn floods_are_limited_per_port_and_recover() {
    // Conformance V16 and H9. Two hosts and one other port: three copies a frame.
    let tables = tables();
    let mut engine = Engine::new(Settings {
        port_floods: Limit {
            rate: 30,
            burst: 30,
        },
        ..Settings::default()
    });
    let start = Instant::now();
    let mut flooded = |port, source: MacAddr, at: Duration| {
        let mut frame = udp(source, MacAddr::BROADCAST);
        frame[29] = if source == A { 2 } else { 3 };
        match engine.handle_frame(&tables, port, &frame, start + at) {
            Verdict::Flood { .. } => true,
            Verdict::Drop(DropReason::FloodLimit) => false,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        (0..100)
            .filter(|_| flooded(PORT_A, A, Duration::ZERO))
            .count(),
        10
    );
    assert_eq!(
        (0..100)
            .filter(|_| flooded(PORT_B, B, Duration::ZERO))
            .count(),
        10,
        "another port has its own budget"
    );
    assert_eq!(
        (0..100)
            .filter(|_| flooded(PORT_A, A, Duration::from_millis(500)))
            .count(),
        5
    );
    assert_eq!(
        (0..100)
            .filter(|_| flooded(PORT_A, A, Duration::ZERO))
            .count(),
        0,
        "time going back gives nothing"
    );
    assert_eq!(
        (0..100)
            .filter(|_| flooded(PORT_A, A, Duration::from_secs(100)))
            .count(),
        10,
        "the burst is the most"
    );
}

#[test]
fn a_flood_to_more_hosts_than_the_burst_still_passes_sometimes() {
    let tables = tables();
    let mut engine = Engine::new(Settings {
        port_floods: Limit { rate: 1, burst: 1 },
        ..Settings::default()
    });
    let now = Instant::now();
    let frame = udp(A, MacAddr::BROADCAST);
    assert!(matches!(
        engine.handle_frame(&tables, PORT_A, &frame, now),
        Verdict::Flood { .. }
    ));
    assert_eq!(
        engine.handle_frame(&tables, PORT_A, &frame, now),
        Verdict::Drop(DropReason::FloodLimit)
    );
    assert!(matches!(
        engine.handle_frame(&tables, PORT_A, &frame, now + Duration::from_secs(1)),
        Verdict::Flood { .. }
    ));
}

#[test]
fn all_workers_draw_from_one_budget() {
    // Conformance V16 and H9: rate-limited per port, however many queues its interface has.
    let tables = tables();
    let settings = Settings {
        port_floods: Limit {
            rate: 30,
            burst: 30,
        },
        ..Settings::default()
    };
    let mut engines = [Engine::new(settings), Engine::new(settings)];
    let (now, frame) = (Instant::now(), udp(A, MacAddr::BROADCAST));
    let flooded = (0..100)
        .filter(|round| {
            let verdict = engines[round % 2].handle_frame(&tables, PORT_A, &frame, now);
            matches!(verdict, Verdict::Flood { .. })
        })
        .count();
    assert_eq!(flooded, 10);
}

#[test]
fn floods_of_a_remote_are_limited_where_they_arrive() {
    // Conformance H9: a host that does not limit its containers. Two ports here: two copies a frame.
    let tables = tables();
    let engine = Engine::new(Settings {
        remote_floods: Limit {
            rate: 20,
            burst: 20,
        },
        ..Settings::default()
    });
    let start = Instant::now();
    let flooded = |from: u8, source: MacAddr, at: Duration| {
        let payload = encapsulated(VNI, &udp(source, MacAddr::BROADCAST));
        let arrival = engine.handle_datagram(&tables, remote(from), &payload, start + at);
        match arrival.verdict {
            Verdict::Flood { .. } => true,
            Verdict::Drop(DropReason::FloodLimit) => false,
            other => panic!("{other:?}"),
        }
    };
    let storm = |at| (0..100).filter(|_| flooded(2, FAR, at)).count();
    assert_eq!(storm(Duration::ZERO), 10);
    assert!(
        flooded(3, FARTHER, Duration::ZERO),
        "another remote has its own budget"
    );
    assert_eq!(storm(Duration::from_secs(1)), 10);
    // What is not flooded is not limited.
    let payload = encapsulated(VNI, &udp(FAR, A));
    let verdict = engine
        .handle_datagram(&tables, remote(2), &payload, start + Duration::from_secs(1))
        .verdict;
    assert_eq!(verdict, Verdict::Deliver { port: PORT_A });
}

proptest! {
    /// Conformance H9: whatever a container floods and however many hosts there are, its copies stay within its limit, and another
    /// container's frames, flooded or not, all pass.
    #[test]
    fn a_storm_takes_nothing_from_others(
        hosts in 1u8..120,
        storm in proptest::collection::vec((0u64..5_000, 0usize..400), 1..40),
    ) {
        let limit = Settings::default().port_floods;
        let tables = tables_with((0..hosts).map(|host| Change::SetMember {
            vni: vni(VNI),
            remote: SocketAddr::from(([198, 51, 100, host], 4789)),
            flood: true,
        }));
        let mut engine = Engine::new(Settings::default());
        let start = Instant::now();
        let (mut now, mut copies) = (start, 0);
        let copies_of = |verdict: Verdict<'_>| match verdict {
            Verdict::Flood { ports, remotes, .. } => ports.len() - 1 + remotes.len(),
            Verdict::Drop(DropReason::FloodLimit) => 0,
            other => panic!("{other:?}"),
        };
        let mut quiet = udp(B, MacAddr::BROADCAST);
        quiet[29] = 3;
        let mut unicast = udp(B, A);
        unicast[29] = 3;
        for (millis, frames) in storm {
            // At ten a second and 120 hosts the quiet one is far below its own limit.
            now += Duration::from_millis(100 + millis);
            for _ in 0..frames {
                copies += copies_of(engine.handle_frame(&tables, PORT_A, &udp(A, MacAddr::BROADCAST), now));
            }
            prop_assert_eq!(
                copies_of(engine.handle_frame(&tables, PORT_B, &quiet, now)),
                usize::from(hosts) + 3
            );
            prop_assert_eq!(
                engine.handle_frame(&tables, PORT_B, &unicast, now),
                Verdict::Deliver { port: PORT_A }
            );
            let most = f64::from(limit.burst) + (now - start).as_secs_f64() * f64::from(limit.rate);
            prop_assert!(copies as f64 <= most + 1.0, "{copies} copies, at most {most}");
        }
    }
}

#[test]
fn what_comes_from_a_host_goes_to_no_host() {
    // Conformance V17.
    assert_eq!(
        arrived(remote(2), &udp(FAR, FARTHER)),
        Verdict::Drop(DropReason::SplitHorizon)
    );
    for destination in [MacAddr::BROADCAST, NOBODY] {
        let Verdict::Flood { ports, remotes, .. } = arrived(remote(2), &udp(FAR, destination))
        else {
            panic!("no flood")
        };
        assert_eq!((ports, remotes), (&[PORT_A, PORT_B][..], &[][..]));
    }
}

#[test]
fn nested_vxlan_is_an_ordinary_frame() {
    // Conformance V22: one header is taken off, whatever is behind it.
    let mut inner = Vec::new();
    PacketBuilder::ethernet2(FAR.octets(), A.octets())
        .ipv4([10, 0, 9, 4], [10, 0, 9, 2], 64)
        .udp(50_000, 4789)
        .write(&mut inner, &encapsulated(VNI, &udp(FAR, B)))
        .unwrap();
    assert_eq!(
        arrived(remote(2), &inner),
        Verdict::Deliver { port: PORT_A }
    );
}

#[test]
fn control_frames_and_invalid_sources_are_dropped() {
    // Conformance V23.
    let control = MacAddr::new([0x01, 0x80, 0xc2, 0, 0, 0x0e]);
    assert_eq!(
        sent(PORT_A, &udp(A, control)),
        Verdict::Drop(DropReason::LinkLocalControl)
    );
    assert_eq!(
        arrived(remote(2), &udp(FAR, control)),
        Verdict::Drop(DropReason::LinkLocalControl)
    );
    for source in [
        MacAddr::ZERO,
        MacAddr::BROADCAST,
        MacAddr::new([3, 0, 0, 0, 0, 1]),
    ] {
        assert_eq!(
            sent(PORT_A, &udp(source, B)),
            Verdict::Drop(DropReason::InvalidSource)
        );
        assert_eq!(
            arrived(remote(2), &udp(source, A)),
            Verdict::Drop(DropReason::InvalidSource)
        );
    }
}

fn arp(target: [u8; 4]) -> Vec<u8> {
    let mut frame = Vec::new();
    Arp {
        is_request: true,
        sender_mac: A,
        sender_ip: [10, 0, 9, 2].into(),
        target_mac: MacAddr::ZERO,
        target_ip: target.into(),
    }
    .emit(MacAddr::BROADCAST, &mut frame);
    frame
}

#[test]
fn questions_are_answered_here_and_cross_nothing() {
    // Conformance V21.
    let tables = tables();
    let mut engine = Engine::new(Settings::default());
    let verdict = engine.handle_frame(&tables, PORT_A, &arp([10, 0, 9, 4]), Instant::now());
    assert_eq!(
        verdict,
        Verdict::Answer {
            len: engine.answer().len()
        }
    );
    assert_eq!(
        (&engine.answer()[..6], &engine.answer()[22..28]),
        (&A.octets()[..], &FAR.octets()[..])
    );
    assert_eq!(
        sent(PORT_A, &arp([10, 0, 9, 2])),
        Verdict::Drop(DropReason::OwnAddress)
    );
    let probe = solicitation(
        std::net::Ipv6Addr::UNSPECIFIED,
        A,
        "fd00::2".parse().unwrap(),
        None,
    );
    assert!(
        matches!(sent(PORT_A, &probe), Verdict::Answer { .. }),
        "B has fd00::2"
    );
    // A question for an address that the tables do not know is a group frame like any other.
    assert!(matches!(
        sent(PORT_A, &arp([10, 0, 9, 77])),
        Verdict::Flood { .. }
    ));
}

#[test]
fn the_gateway_is_nobody_on_the_wire() {
    let mut echo = Vec::new();
    PacketBuilder::ethernet2(A.octets(), GATEWAY.octets())
        .ipv4([10, 0, 9, 2], [10, 0, 9, 1], 64)
        .icmpv4_echo_request(1, 1)
        .write(&mut echo, b"x")
        .unwrap();
    assert_eq!(sent(PORT_A, &echo), Verdict::Answer { len: echo.len() });
    assert_eq!(
        sent(PORT_A, &udp(A, GATEWAY)),
        Verdict::Drop(DropReason::ToGateway)
    );
    assert_eq!(
        arrived(remote(2), &udp(GATEWAY, A)),
        Verdict::Drop(DropReason::SourceElsewhere)
    );
}

#[test]
fn only_members_may_send() {
    // Conformance H1.
    assert_eq!(
        arrived(remote(9), &udp(FAR, A)),
        Verdict::Drop(DropReason::NotAMember)
    );
    let v6 = "[2001:db8::2]:4789".parse().unwrap();
    assert_eq!(
        arrived(v6, &udp(FAR, A)),
        Verdict::Drop(DropReason::NotAMember)
    );
}

#[test]
fn a_mac_comes_only_from_its_own_host() {
    // Conformance H2 (another host's), H3 (a local container's), H5 (nobody's), V18 (nothing moves by it).
    assert_eq!(
        arrived(remote(3), &udp(FAR, A)),
        Verdict::Drop(DropReason::SourceElsewhere)
    );
    assert_eq!(
        arrived(remote(2), &udp(B, A)),
        Verdict::Drop(DropReason::SourceElsewhere)
    );
    assert_eq!(
        arrived(remote(2), &udp(NOBODY, A)),
        Verdict::Drop(DropReason::UnknownSource)
    );
    assert_eq!(
        arrived(remote(4), &udp(FAR, A)),
        Verdict::Drop(DropReason::SourceElsewhere)
    );
}

#[test]
fn the_guard_stands_before_everything() {
    // Conformance H8.
    assert_eq!(
        sent(PORT_A, &udp(B, FAR)),
        Verdict::Drop(DropReason::GuardMac)
    );
    let mut spoofed = udp(A, FAR);
    spoofed[29] = 3;
    assert_eq!(sent(PORT_A, &spoofed), Verdict::Drop(DropReason::GuardIp));
}

#[test]
fn unknown_ports_and_short_frames() {
    // Conformance H6.
    assert_eq!(
        sent(PortId(99), &udp(A, B)),
        Verdict::Drop(DropReason::UnknownPort)
    );
    for len in 0..14 {
        assert_eq!(
            sent(PORT_A, &udp(A, B)[..len]),
            Verdict::Drop(DropReason::Truncated),
            "{len} bytes"
        );
        assert_eq!(
            arrived(remote(2), &udp(FAR, A)[..len]),
            Verdict::Drop(DropReason::Truncated),
            "{len} bytes"
        );
    }
    for len in 0..8 {
        let payload = &encapsulated(VNI, &[])[..len];
        assert_eq!(
            received(Settings::default(), remote(2), payload),
            Verdict::Drop(DropReason::Truncated),
            "{len} bytes"
        );
    }
    let mut bad_ihl = udp(A, B);
    bad_ihl[14] = 0x42;
    assert_eq!(sent(PORT_A, &bad_ihl), Verdict::Drop(DropReason::Malformed));
    let mut bad_ihl = udp(FAR, A);
    bad_ihl[14] = 0x42;
    assert_eq!(
        arrived(remote(2), &bad_ihl),
        Verdict::Drop(DropReason::Malformed)
    );
}

/// Bytes that get past the first checks often, and go wrong anywhere behind.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let start = prop_oneof![
        Just(udp(A, B)),
        Just(udp(FAR, A)),
        Just(arp([10, 0, 9, 4])),
        Just(tagged(udp(A, B)))
    ];
    let solicited = solicitation(
        "fd00::1".parse().unwrap(),
        A,
        "fd00::2".parse().unwrap(),
        Some(A),
    );
    let start = prop_oneof![4 => start, 1 => Just(solicited)];
    (
        start,
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        any::<prop::sample::Index>(),
        any::<bool>(),
    )
        .prop_map(|(mut frame, edits, cut, whole)| {
            for (index, value) in edits {
                let index = index.index(frame.len());
                frame[index] = value;
            }
            if !whole {
                frame.truncate(cut.index(frame.len() + 1));
            }
            frame
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn nothing_a_container_sends_passes_with_anothers_mac_or_panics(frame in hostile()) {
        // Conformance H6 and H8.
        let tables = tables();
        let mut engine = Engine::new(Settings::default());
        let verdict = engine.handle_frame(&tables, PORT_A, &frame, Instant::now());
        if !matches!(verdict, Verdict::Drop(_)) {
            prop_assert_eq!(&frame[6..12], A.octets());
        }
    }

    #[test]
    fn nothing_a_host_sends_goes_to_a_host_or_panics(frame in hostile(), from in 1..6_u8, number in VNI..=TAGGED) {
        // Conformance H2, H6, V17.
        let tables = tables();
        let engine = Engine::new(Settings::default());
        let payload = encapsulated(number, &frame);
        let arrival = engine.handle_datagram(&tables, remote(from), &payload, Instant::now());
        match arrival.verdict {
            Verdict::Drop(_) => {}
            Verdict::Deliver { .. } | Verdict::Flood { remotes: [], .. } => {
                let network = tables.network(vni(number)).unwrap();
                let source = Frame::parse(&frame).unwrap().source();
                prop_assert_eq!(network.lookup(source), Some(Location::Remote(remote(from))));
            }
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn no_bytes_at_all_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        // Conformance H6.
        let tables = tables();
        let mut engine = Engine::new(Settings::default());
        let _ = engine.handle_frame(&tables, PORT_A, &bytes, Instant::now());
        let _ = engine.handle_datagram(&tables, remote(2), &bytes, Instant::now());
    }
}
