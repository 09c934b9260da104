//! What comes from the link: which datagrams a VTEP takes, and what of them reaches the container, seen by raw sockets.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::SocketAddr;

use netns::Netns;
use towline_tests::frames::{Checksum, Datagram, Udp, tagged, vxlan};
use towline_tests::raw::{PATIENCE, Rig, VNI};
use towline_tests::wire::{Endpoint, Options, Outer, Setup};
use towline_tests::{wait_until, wire_tests};
use vtep::fdb::PortId;
use vtep::stats::DropReason;

wire_tests!(
    reserved_bits_change_nothing,
    reserved_bits_are_dropped_where_that_is_asked,
    without_the_i_flag_nothing_passes,
    networks_never_meet,
    every_vni_is_told_apart,
    another_port_is_listened_on,
    the_port_changes_under_traffic,
    any_source_port_is_accepted,
    checksums_over_ipv4,
    checksums_over_ipv6,
    tags_stop_at_both_edges,
    tags_pass_where_the_network_says_so,
    congestion_marks_go_out,
    congestion_marks_come_in,
    vxlan_in_vxlan_is_an_ordinary_frame,
);

/// The VXLAN header's reserved bits (RFC 7348 §5), each alone: seven beside the I flag, 24 behind it, eight behind the VNI.
fn reserved_bits() -> Vec<[u8; 8]> {
    let header = u64::from_be_bytes(vxlan(VNI, &[]).try_into().unwrap());
    let reserved = 0xf7ff_ffff_0000_00ffu64;
    let bits = (0..64).map(|bit| 1u64 << bit);
    bits.filter(|bit| reserved & bit != 0)
        .map(|bit| (header | bit).to_be_bytes())
        .collect()
}

fn with_header(header: &[u8; 8], frame: &[u8]) -> Vec<u8> {
    [header.as_slice(), frame].concat()
}

/// Conformance V2: each of the 39 alone, and all of them.
fn reserved_bits_change_nothing(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let frame = Udp::between(&rig.theirs, &rig.ours).build();
    let headers = reserved_bits();
    assert_eq!(headers.len(), 39);
    let [_, _, _, _, high, middle, low, _] = vxlan(VNI, &[]).try_into().unwrap();
    let all = [0xff, 0xff, 0xff, 0xff, high, middle, low, 0xff];
    for header in headers.iter().chain([&all]) {
        let datagram = rig.datagram(with_header(header, &frame));
        assert_eq!(rig.delivered(&datagram), frame, "{header:02x?}");
    }
    assert_eq!(rig.drops(), []);
}

/// Conformance V2: as Linux and Open vSwitch do.
fn reserved_bits_are_dropped_where_that_is_asked(setup: Setup) {
    let options = Options {
        strict_reserved_bits: true,
        ..Options::default()
    };
    let rig = Rig::with(setup, Outer::V4, options);
    let frame = Udp::between(&rig.theirs, &rig.ours).build();
    for header in reserved_bits() {
        let datagram = rig.datagram(with_header(&header, &frame));
        rig.dropped(DropReason::ReservedBits, 1, || rig.from_host(&datagram));
    }
    rig.still_works();
}

/// Conformance V3: any first byte without the flag, whatever else it says.
fn without_the_i_flag_nothing_passes(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let frame = Udp::between(&rig.theirs, &rig.ours).build();
    rig.dropped(DropReason::NoVniFlag, 128, || {
        for first in (0..=255u8).filter(|first| first & 0x08 == 0) {
            let mut payload = vxlan(VNI, &frame);
            payload[0] = first;
            rig.from_host(&rig.datagram(payload));
        }
    });
    rig.still_works();
}

/// Conformance V4: unknown networks, and one MAC in two.
fn networks_never_meet(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let frame = Udp::between(&rig.theirs, &rig.ours).build();
    let unknown = [
        0,
        1,
        VNI - 1,
        VNI + 1,
        VNI >> 8,
        VNI << 8 & 0xff_ffff,
        0xff_ffff,
    ];
    rig.dropped(DropReason::UnknownVni, unknown.len() as u64, || {
        for vni in unknown {
            rig.from_host(&rig.datagram(vxlan(vni, &frame)));
        }
    });
    let twin = |number| Endpoint {
        port: PortId(100),
        ..Endpoint::new(VNI + 1, number)
    };
    let (ours, theirs) = (twin(2), twin(3));
    rig.datapath.apply(&[ours.network()]);
    let (_container, inside) = rig.neighbor(&ours);
    // The far MAC is an entry of the first network alone.
    rig.dropped(DropReason::NotAMember, 1, || {
        rig.from_host(&rig.datagram(vxlan(VNI + 1, &frame)));
    });
    rig.datapath.apply(&theirs.at(rig.outer.remote(2)));
    for _ in 0..10 {
        rig.from_host(&rig.datagram(vxlan(VNI + 1, &frame)));
        assert_eq!(inside.recv(PATIENCE), Some(frame.clone()));
    }
    assert!(rig.inside.drain().is_empty());
    for _ in 0..10 {
        assert_eq!(rig.delivered(&rig.carry(&frame)), frame);
    }
    assert!(inside.drain().is_empty());
    // Out, too.
    let there = Udp::between(&ours, &theirs).build();
    inside.send(&there).unwrap();
    assert_eq!(rig.on_wire().payload, vxlan(VNI + 1, &there));
    assert_eq!(rig.sent(&there).payload, vxlan(VNI, &there));
}

/// Conformance V5.
fn every_vni_is_told_apart(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    for (port, vni) in [(100, 0), (101, 1), (102, 0x80_0000), (103, 0xff_ffff)] {
        let (ours, theirs, _container, inside) = rig.further_network(PortId(port), vni);
        let frame = Udp::between(&theirs, &ours).build();
        rig.from_host(&rig.datagram(vxlan(vni, &frame)));
        assert_eq!(inside.recv(PATIENCE), Some(frame), "VNI {vni}");
    }
    assert!(rig.inside.drain().is_empty());
}

/// Conformance V6.
fn another_port_is_listened_on(setup: Setup) {
    let options = Options {
        port: 8472,
        ..Options::default()
    };
    let rig = Rig::with(setup, Outer::V4, options);
    let frame = Udp::between(&rig.theirs, &rig.ours).build();
    let mut datagram = rig.carry(&frame);
    // To the usual port: nobody is there, and the kernel says so.
    rig.from_host(&datagram);
    datagram.to.set_port(8472);
    let marked = Udp {
        payload: b"to the other port".to_vec(),
        ..Udp::between(&rig.theirs, &rig.ours)
    }
    .build();
    datagram.payload = vxlan(VNI, &marked);
    assert_eq!(rig.delivered(&datagram), marked);
    assert_eq!(rig.datapath.counters().datagrams_in, 1);
}

/// Conformance V6: changed while it runs, there and back; the old port is let go of each time.
fn the_port_changes_under_traffic(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let frame = Udp::between(&rig.theirs, &rig.ours).build();
    for (port, other) in [(8472, 4789), (4789, 8472), (20_001, 4789)] {
        rig.datapath.listen_on(port).unwrap();
        // A moment later: workers close their sockets by themselves, and a process that is just being started has copies.
        wait_until("the other port is free", PATIENCE, || {
            let bind = || std::net::UdpSocket::bind((rig.outer.vtep(1), other));
            rig.pair.a.run(bind).unwrap().is_ok()
        });
        let before = rig.datapath.counters();
        let mut datagram = rig.carry(&frame);
        datagram.to.set_port(other);
        rig.from_host(&datagram);
        datagram.to.set_port(port);
        assert_eq!(rig.delivered(&datagram), frame, "port {port}");
        let counted = rig.datapath.counters().datagrams_in - before.datagrams_in;
        assert_eq!(counted, 1, "port {other} was listened on beside {port}");
    }
}

/// Conformance V9.
fn any_source_port_is_accepted(setup: Setup) {
    for outer in [Outer::V4, Outer::V6] {
        let rig = Rig::new(setup, outer);
        for port in [0, 1, 53, 1023, 4789, 8472, 32_768, 49_151, 49_152, 65_535] {
            let frame = Udp {
                payload: format!("from port {port}").into_bytes(),
                ..Udp::between(&rig.theirs, &rig.ours)
            }
            .build();
            let mut datagram = rig.carry(&frame);
            datagram.from.set_port(port);
            assert_eq!(rig.delivered(&datagram), frame, "from port {port}");
        }
        assert_eq!(rig.drops(), []);
    }
}

/// What the kernel of a namespace has counted: the first line of `file` that has both words holds the names, or the name
/// and the number.
fn kernel_counter(netns: &Netns, file: &str, prefix: &str, name: &str) -> u64 {
    // Of this thread: `/proc/net` is the namespace of the process's first thread.
    let text = netns
        .run(|| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")))
        .unwrap()
        .unwrap();
    let number = if file == "snmp" {
        let mut lines = text.lines().filter(|line| line.starts_with(prefix));
        let (names, numbers) = (lines.next().unwrap(), lines.next().unwrap());
        let place = names.split_whitespace().position(|word| word == name);
        numbers.split_whitespace().nth(place.unwrap())
    } else {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.split_whitespace().next())
    };
    number.unwrap().parse().unwrap()
}

fn checksum_errors(rig: &Rig) -> u64 {
    match rig.outer {
        Outer::V4 => kernel_counter(&rig.pair.a, "snmp", "Udp:", "InCsumErrors"),
        Outer::V6 => kernel_counter(&rig.pair.a, "snmp6", "", "Udp6InCsumErrors"),
    }
}

fn checksums(setup: Setup, outer: Outer, accepted: &[Checksum], refused: &[Checksum]) {
    let rig = Rig::new(setup, outer);
    let say = |word: &str| {
        Udp {
            payload: word.as_bytes().to_vec(),
            ..Udp::between(&rig.theirs, &rig.ours)
        }
        .build()
    };
    for checksum in accepted {
        let frame = say(&format!("{checksum:?}"));
        let datagram = Datagram {
            checksum: *checksum,
            ..rig.carry(&frame)
        };
        assert_eq!(rig.delivered(&datagram), frame, "{checksum:?}");
    }
    let (before, counted) = (checksum_errors(&rig), rig.datapath.counters());
    for checksum in refused {
        for _ in 0..5 {
            rig.from_host(&Datagram {
                checksum: *checksum,
                ..rig.carry(&say("refused"))
            });
        }
        // From the same port, so by the same socket and behind them.
        let after = say("afterwards");
        assert_eq!(rig.delivered(&rig.carry(&after)), after, "{checksum:?}");
    }
    let refused = refused.len() as u64;
    assert_eq!(checksum_errors(&rig) - before, 5 * refused);
    assert_eq!(
        rig.datapath.counters().datagrams_in - counted.datagrams_in,
        refused
    );
}

/// Conformance V10.
fn checksums_over_ipv4(setup: Setup) {
    checksums(
        setup,
        Outer::V4,
        &[Checksum::Right, Checksum::Zero],
        &[Checksum::Wrong],
    );
}

/// Conformance V11: zero is no checksum over IPv6 (RFC 8200 §8.1), unless it is switched on.
fn checksums_over_ipv6(setup: Setup) {
    checksums(
        setup,
        Outer::V6,
        &[Checksum::Right],
        &[Checksum::Wrong, Checksum::Zero],
    );
}

/// Tags that are refused by default: 802.1Q, priority alone, 802.1ad, and one in the other.
fn all_tagged(frame: &[u8]) -> Vec<Vec<u8>> {
    let frame = || frame.to_vec();
    vec![
        tagged(frame(), 0x8100, 5),
        tagged(frame(), 0x8100, 0),
        tagged(frame(), 0x8100, 0xe000),
        tagged(frame(), 0x88a8, 5),
        tagged(tagged(frame(), 0x8100, 6), 0x88a8, 5),
        tagged(tagged(frame(), 0x8100, 6), 0x8100, 5),
    ]
}

/// Conformance V15.
fn tags_stop_at_both_edges(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    for frame in all_tagged(&Udp::between(&rig.theirs, &rig.ours).build()) {
        rig.dropped(DropReason::VlanTag, 1, || rig.from_host(&rig.carry(&frame)));
    }
    for frame in all_tagged(&Udp::between(&rig.ours, &rig.theirs).build()) {
        rig.dropped(DropReason::VlanTag, 1, || rig.inside.send(&frame).unwrap());
    }
    for frame in all_tagged(&Udp::broadcast(&rig.ours).build()) {
        rig.dropped(DropReason::VlanTag, 1, || rig.inside.send(&frame).unwrap());
    }
    rig.still_works();
}

/// Conformance V15.
fn tags_pass_where_the_network_says_so(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    rig.pass_tags();
    for frame in all_tagged(&Udp::between(&rig.theirs, &rig.ours).build()) {
        assert_eq!(rig.delivered(&rig.carry(&frame)), frame);
    }
    for frame in all_tagged(&Udp::between(&rig.ours, &rig.theirs).build()) {
        assert_eq!(rig.sent(&frame).inner(), frame);
    }
    rig.still_works();
}

/// Conformance V20: normal mode on encapsulation (RFC 6040 §4.1).
fn congestion_marks_go_out(setup: Setup) {
    for outer in [Outer::V4, Outer::V6] {
        let rig = Rig::new(setup, outer);
        for inner in [Udp::between, Udp::between6] {
            for ecn in 0..4 {
                // The DSCP stays inside.
                let frame = Udp {
                    tos: 0b1011_1000 | ecn,
                    ..inner(&rig.ours, &rig.theirs)
                }
                .build();
                let seen = rig.sent(&frame);
                assert_eq!((seen.tos, seen.inner()), (ecn, frame.as_slice()));
            }
        }
    }
}

/// Conformance V20: all 16 combinations of RFC 6040 §4.2, over and in both families.
fn congestion_marks_come_in(setup: Setup) {
    /// By inner and outer mark: not-ECT, ECT(1), ECT(0), CE; `None` is dropped.
    const TABLE: [[Option<u8>; 4]; 4] = [
        [Some(0), Some(0), Some(0), None],
        [Some(1), Some(1), Some(1), Some(3)],
        [Some(2), Some(1), Some(2), Some(3)],
        [Some(3), Some(3), Some(3), Some(3)],
    ];
    for outer in [Outer::V4, Outer::V6] {
        let rig = Rig::new(setup, outer);
        for inner in [Udp::between, Udp::between6] {
            for (inside, outside) in (0..4u8).flat_map(|i| (0..4u8).map(move |o| (i, o))) {
                let udp = Udp {
                    tos: 0b1011_1000 | inside,
                    ..inner(&rig.theirs, &rig.ours)
                };
                let datagram = Datagram {
                    tos: outside,
                    ..rig.carry(&udp.build())
                };
                let Some(mark) = TABLE[usize::from(inside)][usize::from(outside)] else {
                    rig.dropped(DropReason::CongestionMark, 1, || rig.from_host(&datagram));
                    continue;
                };
                // The frame with that mark, its IP checksum right again.
                let expected = Udp {
                    tos: 0b1011_1000 | mark,
                    ..udp
                }
                .build();
                assert_eq!(
                    rig.delivered(&datagram),
                    expected,
                    "inner {inside}, outer {outside}"
                );
            }
        }
    }
}

/// Conformance V22: our own datagrams inside ours, as deep as the MTU lets them.
fn vxlan_in_vxlan_is_an_ordinary_frame(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let deep = |from: &Endpoint, to: &Endpoint| {
        let mut frame = Udp::between(from, to).build();
        let mut depth = 0;
        loop {
            let mut outer = Udp::between(from, to);
            // A datagram for the very port that this host listens on.
            outer.to = SocketAddr::new(to.ip(), 4789);
            outer.payload = vxlan(VNI, &frame);
            let larger = outer.build();
            if larger.len() > 14 + usize::from(rig.ours.mtu) {
                return (frame, depth);
            }
            (frame, depth) = (larger, depth + 1);
        }
    };
    let (there, depth) = deep(&rig.ours, &rig.theirs);
    assert!(depth > 20, "{depth}");
    assert_eq!(rig.sent(&there).inner(), there);
    let (back, _) = deep(&rig.theirs, &rig.ours);
    assert_eq!(rig.delivered(&rig.carry(&back)), back);
    // One datagram: nothing looked further inside.
    assert_eq!(rig.datapath.counters().datagrams_in, 1);
    // The inner addresses say this host's own VTEP, as a container on it could try.
    let mut own = Udp::between(&rig.ours, &rig.theirs);
    own.to = rig.outer.remote(1);
    own.payload = vxlan(VNI, &there[..64]);
    let own = own.build();
    assert_eq!(rig.sent(&own).inner(), own);
}
