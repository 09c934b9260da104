//! What the engine decides, frame by frame and line by line of the conformance list.

mod floods;
mod hostile;

use std::sync::Arc;
use std::time::Duration;

use etherparse::PacketBuilder;

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
            service_ips: Default::default(),
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
            any_source: false,
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
