//! What a hostile container can send through its own port, with CAP_NET_RAW and vnet headers of its choice, and what
//! becomes of it.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use towline_tests::frames::{Udp, arp, cut_to, icmpv6, solicitation, tagged, unfinished_tcp};
use towline_tests::packet::PacketSocket;
use towline_tests::raw::{PATIENCE, Rig, VNI};
use towline_tests::wire::{Endpoint, Outer, Setup};
use towline_tests::{wait_until, wire_tests};
use vtep::edge::Offload;
use vtep::stats::DropReason;

wire_tests!(
    thousands_of_new_macs_leave_the_tables_alone,
    impossible_vnet_headers_harm_nobody,
    anothers_addresses_are_dropped_at_the_port,
    claims_about_others_are_dropped_at_the_port,
    what_is_nobodys_passes_where_it_must,
);

const BROADCAST: [u8; 6] = [0xff; 6];

fn v4(endpoint: &Endpoint) -> Ipv4Addr {
    match endpoint.ip() {
        IpAddr::V4(ip) => ip,
        IpAddr::V6(ip) => panic!("{ip} is no IPv4 address"),
    }
}

fn v6(endpoint: &Endpoint) -> Ipv6Addr {
    match endpoint.ip6() {
        IpAddr::V6(ip) => ip,
        IpAddr::V4(ip) => panic!("{ip} is no IPv6 address"),
    }
}

/// RFC 4291 appendix A: the EUI-64 of a MAC, with its local bit turned.
fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let words = [[a ^ 2, b], [c, 0xff], [0xfe, d], [e, f]].map(u16::from_be_bytes);
    Ipv6Addr::new(0xfe80, 0, 0, 0, words[0], words[1], words[2], words[3])
}

/// Conformance H5, from a container.
fn thousands_of_new_macs_leave_the_tables_alone(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    rig.learns_nothing(0xcc, DropReason::GuardMac, |source| {
        let udp = Udp {
            source,
            ..Udp::between(&rig.ours, &rig.theirs)
        };
        rig.inside.send(&udp.build()).unwrap();
    });
}

/// Conformance H7. The kernel refuses some of it at the raw socket, cuts some itself, and hands some to the datapath,
/// depending on its version; whatever it does, nothing larger than the MTU and nothing damaged leaves, and others notice nothing.
fn impossible_vnet_headers_harm_nobody(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let local = Endpoint {
        mtu: rig.ours.mtu,
        ..Endpoint::new(VNI, 7)
    };
    let (_container, beside) = rig.neighbor(&local);
    let hostile = PacketSocket::with_vnet_header(&rig.container, "eth0");
    let tso = cut_to(1396);
    let partial = Offload::partial(34, 16);
    let tcp = |payload| unfinished_tcp(&rig.ours, &rig.theirs, &vec![0x2e; payload]);
    let large = || tcp(60_000);
    let small = || tcp(100);
    let cases: Vec<(&str, Offload, Vec<u8>)> = vec![
        ("64 KiB on a port of 1450", Offload::default(), large()),
        ("64 KiB to sum and not to cut", partial, large()),
        ("gso_size 0", Offload { gso_size: 0, ..tso }, large()),
        ("gso_size 1", Offload { gso_size: 1, ..tso }, tcp(40_000)),
        ("gso_size 8", Offload { gso_size: 8, ..tso }, large()),
        (
            "segments above the MTU",
            Offload {
                gso_size: 1411,
                ..tso
            },
            large(),
        ),
        (
            "segments far above the MTU",
            Offload {
                gso_size: 30_000,
                ..tso
            },
            large(),
        ),
        (
            "gso_size 65535",
            Offload {
                gso_size: 0xffff,
                ..tso
            },
            large(),
        ),
        (
            "segments larger than the frame",
            Offload {
                gso_size: 1396,
                ..tso
            },
            small(),
        ),
        (
            "to cut and not to sum",
            Offload { flags: 0, ..tso },
            large(),
        ),
        (
            "no type of segmentation",
            Offload { gso_type: 9, ..tso },
            large(),
        ),
        (
            "every bit of the type",
            Offload {
                gso_type: 0xff,
                ..tso
            },
            large(),
        ),
        (
            "TCP over IPv6 that is IPv4",
            Offload {
                gso_type: Offload::GSO_TCPV6,
                ..tso
            },
            large(),
        ),
        (
            "UDP that is TCP",
            Offload {
                gso_type: Offload::GSO_UDP_L4,
                csum_offset: 6,
                ..tso
            },
            large(),
        ),
        (
            "fragments, as UFO once was",
            Offload { gso_type: 3, ..tso },
            large(),
        ),
        (
            "headers longer than the frame",
            Offload {
                hdr_len: 0xffff,
                ..tso
            },
            large(),
        ),
        (
            "headers of no length",
            Offload { hdr_len: 0, ..tso },
            large(),
        ),
        (
            "a sum that starts past the end",
            Offload {
                csum_start: 0xfff0,
                ..partial
            },
            small(),
        ),
        (
            "a sum stored past the end",
            Offload {
                csum_offset: 0xfff0,
                ..partial
            },
            small(),
        ),
        (
            "a sum stored in the last byte",
            Offload {
                csum_start: 34,
                csum_offset: 119,
                ..partial
            },
            small(),
        ),
        (
            "a sum in the Ethernet header",
            Offload {
                csum_start: 0,
                csum_offset: 6,
                ..partial
            },
            small(),
        ),
        (
            "a sum over the IP addresses",
            Offload {
                csum_start: 14,
                csum_offset: 12,
                ..partial
            },
            small(),
        ),
        (
            "a sum in the payload",
            Offload {
                csum_start: 54,
                csum_offset: 16,
                ..partial
            },
            small(),
        ),
        (
            "every flag",
            Offload {
                flags: 0xff,
                ..partial
            },
            small(),
        ),
    ];
    let (mut refused, mut taken) = (0, 0);
    for (what, offload, frame) in &cases {
        let sent = hostile.send_offloaded(*offload, frame);
        eprintln!("{what}: {:?}, {:?}", sent.as_ref().err(), rig.drops());
        if sent.is_err() {
            refused += 1;
        } else {
            taken += 1;
        }
        // Another container on this host, and a host far away, in the same moment; then the container itself, again and again
        // while its queue is full of the segments that the kernel made of its wish.
        let beside_it = Udp::between(&local, &rig.theirs).build();
        let own = Udp::between(&rig.ours, &rig.theirs).build();
        beside.send(&beside_it).unwrap();
        let (mut seen_beside, mut seen_own) = (false, false);
        wait_until("the neighbour's frame and its own leave", PATIENCE, || {
            rig.inside.send(&own).unwrap();
            for datagram in rig.wire_drain() {
                assert!(datagram.frame.len() <= 14 + 1500, "{what}");
                assert!(datagram.checksum_is_right, "{what}");
                // Whatever left names the container that sent it.
                let source = &datagram.inner()[6..12];
                assert!(
                    source == &own[6..12] || source == &beside_it[6..12],
                    "{what}"
                );
                seen_beside |= datagram.inner() == beside_it;
                seen_own |= datagram.inner() == own;
            }
            seen_beside && seen_own
        });
        let back = Udp::between(&rig.theirs, &local).build();
        rig.from_host(&rig.carry(&back));
        assert_eq!(beside.recv(PATIENCE), Some(back), "{what}");
    }
    assert!(refused > 0 && taken > 0, "{refused} refused, {taken} taken");
    // What the datapath refused itself has a name of its own; any other name would be a header that was believed.
    let named = [
        DropReason::BadOffload,
        DropReason::Oversize,
        DropReason::Malformed,
    ];
    let counters = rig.datapath.counters();
    let total: u64 = named.iter().map(|reason| counters.drops.get(*reason)).sum();
    assert!(total > 0, "the kernel kept all of it: {:?}", rig.drops());
    let back = Udp::between(&rig.theirs, &rig.ours).build();
    assert_eq!(rig.delivered(&rig.carry(&back)), back);
}

/// Conformance H8: MAC, IPv4 and IPv6 of another, of nobody, and of the gateway; behind a tag, too.
fn anothers_addresses_are_dropped_at_the_port(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let own = Udp::between(&rig.ours, &rig.theirs);
    let gateway = [0x02, 0, 10, 0, 9, 1];
    for source in [rig.theirs.mac().octets(), gateway, [0x02, 1, 2, 3, 4, 5]] {
        let frame = Udp {
            source,
            ..own.clone()
        }
        .build();
        rig.dropped(DropReason::GuardMac, 1, || rig.inside.send(&frame).unwrap());
    }
    let ips4 = [
        "10.0.9.3",
        "10.0.9.1",
        "10.0.9.77",
        "127.0.0.1",
        "0.0.0.0",
        "255.255.255.255",
        "224.0.0.1",
    ];
    let theirs_local = link_local(rig.theirs.mac().octets()).to_string();
    let ips6 = [
        "fd09::3",
        "fd09::1",
        "2001:db8::1",
        "::1",
        "::",
        "ff02::1",
        theirs_local.as_str(),
    ];
    let mut spoofed = Vec::new();
    for (ips, to) in [(ips4, rig.theirs.ip()), (ips6, rig.theirs.ip6())] {
        for ip in ips {
            let ip: IpAddr = ip.parse().unwrap();
            let from = SocketAddr::new(ip, 4000);
            let to = SocketAddr::new(to, 7777);
            spoofed.push(
                Udp {
                    from,
                    to,
                    ..own.clone()
                }
                .build(),
            );
        }
    }
    for frame in &spoofed {
        rig.dropped(DropReason::GuardIp, 1, || rig.inside.send(frame).unwrap());
    }
    rig.pass_tags();
    for frame in &spoofed {
        for depth in 1..=2 {
            let frame = (0..depth).fold(frame.clone(), |frame, _| tagged(frame, 0x8100, 0));
            rig.dropped(DropReason::GuardIp, 1, || rig.inside.send(&frame).unwrap());
        }
    }
    rig.still_works();
}

/// Conformance H8: ARP and ND that speak for another, and a router's words.
fn claims_about_others_are_dropped_at_the_port(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let (own, their) = (rig.ours.mac().octets(), rig.theirs.mac().octets());
    let (own4, their4) = (v4(&rig.ours), v4(&rig.theirs));
    let (own6, their6) = (v6(&rig.ours), v6(&rig.theirs));
    let all_nodes: Ipv6Addr = "ff02::1".parse().unwrap();
    let multicast = [0x33, 0x33, 0, 0, 0, 1];
    let with_sender = |mut frame: Vec<u8>| {
        frame[6..12].copy_from_slice(&own);
        frame
    };
    let advertisement = |source: Ipv6Addr, target: Ipv6Addr, mac: [u8; 6]| {
        let mut body = vec![0x20, 0, 0, 0];
        body.extend(target.octets());
        body.extend([2, 1]);
        body.extend(mac);
        icmpv6((own, multicast), (source, all_nodes), 136, &body)
    };
    let claims = [
        // A reply for another, an announcement of another's address, one with another's MAC, a reply from nobody.
        arp(their, 2, (own, their4), (their, own4)),
        arp(BROADCAST, 1, (own, their4), (own, their4)),
        with_sender(arp(BROADCAST, 1, (their, own4), ([0; 6], their4))),
        with_sender(arp(their, 2, (their, their4), (their, own4))),
        arp(their, 2, (own, Ipv4Addr::UNSPECIFIED), (their, own4)),
        // For the gateway.
        arp(BROADCAST, 2, (own, Ipv4Addr::new(10, 0, 9, 1)), (own, own4)),
        advertisement(own6, their6, own),
        advertisement(own6, own6, their),
        with_sender(solicitation((their, own6), their6)),
        // Router solicitation with another's MAC; router advertisement; redirect.
        icmpv6(
            (own, [0x33, 0x33, 0, 0, 0, 2]),
            (link_local(own), "ff02::2".parse().unwrap()),
            133,
            &[&[0; 4], &[1, 1][..], &their].concat(),
        ),
        icmpv6(
            (own, multicast),
            (link_local(own), all_nodes),
            134,
            &[64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        icmpv6(
            (own, their),
            (link_local(own), their6),
            137,
            &[[0; 4], [0; 4], [0; 4]].concat().repeat(3),
        ),
    ];
    for claim in &claims {
        rig.dropped(DropReason::GuardNeighbor, 1, || {
            rig.inside.send(claim).unwrap()
        });
    }
    rig.dropped(DropReason::GuardIp, 1, || {
        rig.inside
            .send(&advertisement(their6, their6, own))
            .unwrap();
    });
    rig.still_works();
}

/// Conformance H8: what comes from no address because there is none yet, and the port's own link-local address.
fn what_is_nobodys_passes_where_it_must(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let own = rig.ours.mac().octets();
    let unspecified = Ipv6Addr::UNSPECIFIED;
    let local = link_local(own);
    let report = |source: Ipv6Addr| {
        let mut report = icmpv6(
            (own, [0x33, 0x33, 0, 0, 0, 0x16]),
            (source, "ff02::16".parse().unwrap()),
            143,
            &[0, 0, 0, 0],
        );
        report[21] = 1;
        report
    };
    let free4 = Ipv4Addr::new(10, 0, 9, 200);
    let free6: Ipv6Addr = "fd09::dead".parse().unwrap();
    for frame in [
        arp(BROADCAST, 1, (own, Ipv4Addr::UNSPECIFIED), ([0; 6], free4)),
        solicitation((own, unspecified), free6),
        solicitation((own, local), free6),
        report(unspecified),
        report(local),
        Udp {
            from: SocketAddr::new(local.into(), 5353),
            to: SocketAddr::new("ff02::fb".parse().unwrap(), 5353),
            destination: [0x33, 0x33, 0, 0, 0, 0xfb],
            ..Udp::between6(&rig.ours, &rig.theirs)
        }
        .build(),
    ] {
        assert_eq!(rig.sent(&frame).inner(), frame);
    }
    assert_eq!(rig.drops(), []);
}
