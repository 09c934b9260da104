//! What stands around a frame on the link: VXLAN, UDP and IP headers of datagrams that leave, seen by a raw socket.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::collections::HashSet;
use std::net::SocketAddr;

use towline_tests::frames::{Seen, Udp, complete_ipv4};
use towline_tests::raw::{PATIENCE, Rig};
use towline_tests::wire::{Endpoint, Outer, Setup};
use towline_tests::wire_tests;
use vtep::fdb::PortId;
use vtep::vxlan::DEFAULT_PORT;

wire_tests!(
    headers_over_ipv4,
    headers_over_ipv6,
    the_smallest_and_the_largest_vni_go_out,
    each_remote_has_its_own_port,
    many_flows_use_many_source_ports,
    what_belongs_to_one_flow_has_one_source_port,
    no_packet_leaves_in_pieces,
);

/// Flows enough to see most of 64 source ports.
const FLOWS: u16 = 400;

fn headers(setup: Setup, outer: Outer) {
    let rig = Rig::new(setup, outer);
    for length in [0, 1, 2, 63, 64, 512, 1350] {
        for inner in [Udp::between, Udp::between6] {
            let udp = Udp {
                payload: vec![0xa5; length],
                ..inner(&rig.ours, &rig.theirs)
            };
            let frame = udp.build();
            let seen = rig.sent(&frame);
            // V1: I flag set, the VNI, all else zero; then the frame as it was sent.
            assert_eq!(seen.vxlan(), [0x08, 0, 0, 0, 0x12, 0x34, 0x56, 0]);
            assert_eq!(seen.inner(), frame);
            // V6, and who talks to whom.
            assert_eq!(seen.to, outer.remote(2));
            assert_eq!(seen.from.ip(), outer.vtep(1));
            // V7: within the range that RFC 6335 has for ports of passage.
            assert!(seen.from.port() >= 49_152, "{}", seen.from);
            // V10, V11: there, and right.
            assert_ne!(seen.checksum, 0);
            assert!(seen.checksum_is_right, "{:#06x}", seen.checksum);
            // V12, V19.
            assert!(seen.dont_fragment);
            assert_eq!((seen.ttl, seen.tos), (64, 0));
        }
    }
}

/// Conformance V1, V6, V7, V10, V12, V19.
fn headers_over_ipv4(setup: Setup) {
    headers(setup, Outer::V4);
}

/// Conformance V1, V6, V7, V11, V12, V19.
fn headers_over_ipv6(setup: Setup) {
    headers(setup, Outer::V6);
}

/// Conformance V5.
fn the_smallest_and_the_largest_vni_go_out(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    for (port, vni, bytes) in [
        (100, 0, [0, 0, 0]),
        (101, 0xff_ffff, [0xff, 0xff, 0xff]),
        (102, 1, [0, 0, 1]),
        (103, 0x80_0000, [0x80, 0, 0]),
    ] {
        let (ours, theirs, _container, inside) = rig.further_network(PortId(port), vni);
        inside.send(&Udp::between(&ours, &theirs).build()).unwrap();
        let [high, middle, low] = bytes;
        assert_eq!(
            rig.on_wire().vxlan(),
            [0x08, 0, 0, 0, high, middle, low, 0],
            "VNI {vni}"
        );
    }
}

/// Conformance V6: the port that a remote has said, for frames of one remote and for floods to many.
fn each_remote_has_its_own_port(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    rig.add_host(4);
    let farther = Endpoint {
        mtu: rig.ours.mtu,
        ..Endpoint::new(rig.ours.vni.get(), 4)
    };
    let odd = SocketAddr::new(rig.outer.vtep(4), 8472);
    rig.datapath.apply(&farther.at(odd));
    let mut unicast = HashSet::new();
    for to in [&rig.theirs, &farther] {
        unicast.insert(rig.sent(&Udp::between(&rig.ours, to).build()).to);
    }
    rig.inside.send(&Udp::broadcast(&rig.ours).build()).unwrap();
    let flooded = HashSet::from([rig.on_wire().to, rig.on_wire().to]);
    let expected = HashSet::from([SocketAddr::new(rig.outer.vtep(2), DEFAULT_PORT), odd]);
    assert_eq!((unicast, flooded), (expected.clone(), expected));
}

/// Conformance V7, V8.
fn many_flows_use_many_source_ports(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    for inner in [Udp::between, Udp::between6] {
        let mut used = HashSet::new();
        for flow in 0..FLOWS {
            let mut udp = inner(&rig.ours, &rig.theirs);
            udp.from.set_port(1024 + flow);
            let port = rig.sent(&udp.build()).from.port();
            // Again, in another size: the flow's hash is of its addresses and ports.
            udp.payload = vec![0; 600];
            assert_eq!(rig.sent(&udp.build()).from.port(), port, "flow {flow}");
            assert!(port >= 49_152);
            used.insert(port);
        }
        assert!(
            used.len() >= 48,
            "{FLOWS} flows use {} source ports",
            used.len()
        );
    }
}

/// Conformance V8: a datagram in fragments is one flow, and so is what says nothing of ports.
fn what_belongs_to_one_flow_has_one_source_port(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let mut frame = Udp {
        payload: vec![0x77; 64],
        ..Udp::between(&rig.ours, &rig.theirs)
    }
    .build();
    // Fragments of one datagram: MF set at first, then an offset and no port in sight.
    let mut ports = HashSet::new();
    for (flags, first_word) in [
        (0x2000u16, None),
        (0x2008, Some(0x1111u16)),
        (0x0010, Some(0x9999)),
    ] {
        frame[20..22].copy_from_slice(&flags.to_be_bytes());
        if let Some(word) = first_word {
            frame[34..36].copy_from_slice(&word.to_be_bytes());
        }
        complete_ipv4(&mut frame[14..]);
        ports.insert(rig.sent(&frame).from.port());
    }
    assert_eq!(ports.len(), 1, "fragments of one datagram: {ports:?}");

    // Neither IP nor ARP: one pair of MACs is one flow.
    let ports: HashSet<_> = (0..32u8)
        .map(|byte| {
            let frame = towline_tests::frames::ethernet(
                rig.theirs.mac().octets(),
                rig.ours.mac().octets(),
                0x88b5,
                &[byte; 46],
            );
            rig.sent(&frame).from.port()
        })
        .collect();
    assert_eq!(ports.len(), 1, "one pair of MACs: {ports:?}");
}

/// Conformance V12: what became too large for the link leaves neither whole nor in pieces.
fn no_packet_leaves_in_pieces(setup: Setup) {
    for outer in [Outer::V4, Outer::V6] {
        let rig = Rig::new(setup, outer);
        let payload = usize::from(outer.mtu()) - 28;
        let large = Udp {
            payload: vec![0x3c; payload],
            ..Udp::between(&rig.ours, &rig.theirs)
        }
        .build();
        let seen = rig.sent(&large);
        assert_eq!(seen.frame.len(), 1500 + 14);
        assert_eq!(seen.inner(), large);

        towline_tests::wire::netlink(&rig.pair.a)
            .set_mtu("u0", 1400)
            .unwrap();
        rig.inside.send(&large).unwrap();
        let small = Udp::between(&rig.ours, &rig.theirs).build();
        // Right behind it, perhaps in one message with it: the small one is not refused with the large one.
        rig.inside.send(&small).unwrap();
        // All that is on the link, whether it is a whole datagram or not.
        loop {
            let frame = rig
                .outside
                .recv(PATIENCE)
                .unwrap_or_else(|| panic!("{outer:?}, no small one: {:?}", rig.drops()));
            let fragment = match etherparse::SlicedPacket::from_ethernet(&frame).unwrap().net {
                Some(etherparse::NetSlice::Ipv4(ip)) => ip.header().is_fragmenting_payload(),
                Some(etherparse::NetSlice::Ipv6(ip)) => ip.is_payload_fragmented(),
                _ => false,
            };
            assert!(!fragment, "a fragment of {} bytes", frame.len());
            if let Some(seen) = Seen::parse(&frame) {
                assert_eq!(seen.inner(), small);
                break;
            }
        }
    }
}
