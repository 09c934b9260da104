//! What a VTEP does as a switch: whom a frame reaches, what is answered on the spot, and what moves a table, with raw
//! frames at both edges.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use etherparse::{Icmpv6Slice, NetSlice, SlicedPacket, TransportSlice};
use towline_tests::frames::{Udp, arp, ethernet, icmpv6, solicitation};
use towline_tests::raw::{PATIENCE, Rig};
use towline_tests::wire::{Endpoint, Outer, Setup};
use towline_tests::wire_tests;
use vtep::fdb::Change;
use vtep::stats::DropReason;

wire_tests!(
    a_flood_goes_once_to_each_host_with_an_endpoint,
    without_floods_only_the_table_answers,
    what_comes_from_a_host_goes_to_no_host,
    no_frame_moves_an_entry,
    arp_is_answered_from_the_table,
    solicitations_are_answered_from_the_table,
    control_frames_and_impossible_sources_are_dropped,
    a_moved_endpoint_is_reached_at_once,
);

const BROADCAST: [u8; 6] = [0xff; 6];
const NOBODY: [u8; 6] = [0x02, 0, 10, 0, 9, 99];

fn octets(ip: IpAddr) -> Ipv4Addr {
    match ip {
        IpAddr::V4(ip) => ip,
        IpAddr::V6(ip) => panic!("{ip} is no IPv4 address"),
    }
}

fn groups(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V6(ip) => ip,
        IpAddr::V4(ip) => panic!("{ip} is no IPv6 address"),
    }
}

/// Conformance V16: broadcast, multicast of both families, and a MAC that nobody has.
fn a_flood_goes_once_to_each_host_with_an_endpoint(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    for number in [4, 5] {
        let _ = rig.further(number);
    }
    // A member without an endpoint may send, and gets nothing.
    rig.add_host(6);
    rig.datapath.apply(&[Change::SetMember {
        vni: rig.ours.vni,
        remote: rig.outer.remote(6),
        flood: false,
    }]);
    let local = Endpoint {
        mtu: rig.ours.mtu,
        ..Endpoint::new(rig.ours.vni.get(), 7)
    };
    let (_container, beside) = rig.neighbor(&local);
    for destination in [
        BROADCAST,
        [0x01, 0x00, 0x5e, 0, 0, 0xfb],
        [0x33, 0x33, 0, 0, 0, 0xfb],
        NOBODY,
    ] {
        let frame = Udp {
            destination,
            ..Udp::between(&rig.ours, &rig.theirs)
        }
        .build();
        rig.inside.send(&frame).unwrap();
        assert_eq!(beside.recv(PATIENCE), Some(frame.clone()));
        let mut copies = HashMap::new();
        for _ in 0..3 {
            let seen = rig.on_wire();
            assert_eq!(seen.inner(), frame);
            *copies.entry(seen.to).or_insert(0) += 1;
        }
        let expected = [2, 4, 5].map(|number| (rig.outer.remote(number), 1));
        assert_eq!(copies, HashMap::from(expected));
        // Behind the copies of its own flow nothing more comes, nor back to its sender.
        assert_eq!(
            rig.sent(&Udp::between(&rig.ours, &rig.theirs).build()).to,
            rig.outer.remote(2)
        );
        assert!(beside.drain().is_empty() && rig.inside.drain().is_empty());
    }
}

/// Conformance V16: `flood = false`.
fn without_floods_only_the_table_answers(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    rig.stop_floods();
    let ours = (rig.ours.mac().octets(), octets(rig.ours.ip()));
    let unknown = ([0; 6], Ipv4Addr::new(10, 0, 9, 200));
    let outward = [
        Udp::broadcast(&rig.ours).build(),
        Udp {
            destination: NOBODY,
            ..Udp::between(&rig.ours, &rig.theirs)
        }
        .build(),
        arp(BROADCAST, 1, ours, unknown),
    ];
    for frame in outward {
        rig.dropped(DropReason::FloodOff, 1, || rig.inside.send(&frame).unwrap());
    }
    let inward = Udp::broadcast(&rig.theirs).build();
    rig.dropped(DropReason::FloodOff, 1, || {
        rig.from_host(&rig.carry(&inward))
    });
    rig.inside
        .send(&arp(BROADCAST, 1, ours, ([0; 6], octets(rig.theirs.ip()))))
        .unwrap();
    assert_eq!(rig.at_container()[6..12], rig.theirs.mac().octets());
    rig.still_works();
}

/// Conformance V17.
fn what_comes_from_a_host_goes_to_no_host(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let farther = rig.further(4);
    for destination in [BROADCAST, [0x33, 0x33, 0, 0, 0, 1], NOBODY] {
        let frame = Udp {
            destination,
            ..Udp::between(&rig.theirs, &rig.ours)
        }
        .build();
        assert_eq!(rig.delivered(&rig.carry(&frame)), frame);
    }
    let passing = Udp::between(&rig.theirs, &farther).build();
    rig.dropped(DropReason::SplitHorizon, 1, || {
        rig.from_host(&rig.carry(&passing));
    });
    assert_eq!(rig.datapath.counters().datagrams_out, 0);
}

/// Conformance V18.
fn no_frame_moves_an_entry(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let farther = rig.further(4);
    let before = rig.datapath.tables();
    let by = |source: &Endpoint| Udp::broadcast(source).build();
    rig.dropped(DropReason::SourceElsewhere, 2, || {
        rig.from_host(&rig.carry(&by(&farther)));
        rig.from_host(&rig.carry(&by(&rig.ours)));
    });
    let unheard = Udp {
        source: NOBODY,
        ..Udp::broadcast(&rig.theirs)
    }
    .build();
    rig.dropped(DropReason::UnknownSource, 1, || {
        rig.from_host(&rig.carry(&unheard));
    });
    // An ARP reply that says the farther one is here: it may reach the container it is for, and changes no answer of ours.
    let claim = arp(
        rig.ours.mac().octets(),
        2,
        (rig.theirs.mac().octets(), octets(farther.ip())),
        (rig.ours.mac().octets(), octets(rig.ours.ip())),
    );
    assert_eq!(rig.delivered(&rig.carry(&claim)), claim);
    assert!(Arc::ptr_eq(&before, &rig.datapath.tables()));
    assert_eq!(
        rig.sent(&Udp::between(&rig.ours, &farther).build()).to,
        rig.outer.remote(4)
    );
    rig.inside
        .send(&arp(
            BROADCAST,
            1,
            (rig.ours.mac().octets(), octets(rig.ours.ip())),
            ([0; 6], octets(farther.ip())),
        ))
        .unwrap();
    assert_eq!(rig.at_container()[22..28], farther.mac().octets());
    // A MAC that was heard of is still nobody's: a frame for it goes to every host.
    let to_unheard = Udp {
        destination: NOBODY,
        ..Udp::between(&rig.ours, &rig.theirs)
    }
    .build();
    rig.inside.send(&to_unheard).unwrap();
    let mut reached = [rig.on_wire().to, rig.on_wire().to];
    reached.sort();
    assert_eq!(reached, [rig.outer.remote(2), rig.outer.remote(4)]);
}

/// Conformance V21: ARP.
fn arp_is_answered_from_the_table(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let local = Endpoint {
        mtu: rig.ours.mtu,
        ..Endpoint::new(rig.ours.vni.get(), 7)
    };
    let (_container, beside) = rig.neighbor(&local);
    let us = (rig.ours.mac().octets(), octets(rig.ours.ip()));
    let nobody = ([0; 6], Ipv4Addr::UNSPECIFIED);
    let own_mac = rig.ours.mac().octets();
    for known in [&rig.theirs, &local] {
        let them = (known.mac().octets(), octets(known.ip()));
        // To all, to the one it is about, and as a probe before an address is taken (RFC 5227 §2.1.1).
        for (destination, sender) in [
            (BROADCAST, us),
            (them.0, us),
            (BROADCAST, (own_mac, nobody.1)),
        ] {
            rig.inside
                .send(&arp(destination, 1, sender, ([0; 6], them.1)))
                .unwrap();
            let expected = arp(own_mac, 2, them, sender);
            let answer = rig.at_container();
            assert_eq!(answer[..expected.len()], expected);
        }
    }
    // Its own address is never answered: a probe, an announcement (RFC 5227 §3), and one to the network.
    for (sender, target) in [((own_mac, nobody.1), us), (us, us), (us, (own_mac, us.1))] {
        rig.dropped(DropReason::OwnAddress, 1, || {
            let question = arp(BROADCAST, 1, sender, ([0; 6], target.1));
            rig.inside.send(&question).unwrap();
        });
    }
    // Nothing of it crossed the underlay, or reached who was asked about.
    assert_eq!(rig.datapath.counters().datagrams_out, 0);
    assert!(beside.drain().is_empty());
    // One that the tables don't know does cross.
    let unknown = arp(BROADCAST, 1, us, ([0; 6], Ipv4Addr::new(10, 0, 9, 200)));
    assert_eq!(rig.sent(&unknown).inner(), unknown);
}

/// A neighbour advertisement, taken apart.
#[derive(Debug, PartialEq)]
struct Advertisement {
    macs: ([u8; 6], [u8; 6]),
    ips: (Ipv6Addr, Ipv6Addr),
    hop_limit: u8,
    solicited: bool,
    target: Ipv6Addr,
    target_mac: [u8; 6],
}

fn advertisement(frame: &[u8]) -> Advertisement {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let (Some(NetSlice::Ipv6(ip)), Some(TransportSlice::Icmpv6(icmp))) =
        (&sliced.net, &sliced.transport)
    else {
        panic!("no ICMPv6: {frame:02x?}");
    };
    let header = ip.header();
    let ips = (header.source_addr(), header.destination_addr());
    assert!(
        Icmpv6Slice::is_checksum_valid(icmp, ips.0.octets(), ips.1.octets()),
        "{frame:02x?}"
    );
    let bytes = icmp.slice();
    assert_eq!(bytes[..2], [136, 0], "RFC 4861 §4.4");
    // The target link-layer address option (RFC 4861 §4.6.1).
    assert_eq!(bytes[24..26], [2, 1]);
    let target: [u8; 16] = bytes[8..24].try_into().unwrap();
    Advertisement {
        macs: (
            frame[6..12].try_into().unwrap(),
            frame[..6].try_into().unwrap(),
        ),
        ips,
        hop_limit: header.hop_limit(),
        solicited: bytes[4] & 0x40 != 0,
        target: target.into(),
        target_mac: bytes[26..32].try_into().unwrap(),
    }
}

/// Conformance V21: neighbour discovery.
fn solicitations_are_answered_from_the_table(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let local = Endpoint {
        mtu: rig.ours.mtu,
        ..Endpoint::new(rig.ours.vni.get(), 7)
    };
    let (_container, beside) = rig.neighbor(&local);
    let us = (rig.ours.mac().octets(), groups(rig.ours.ip6()));
    for known in [&rig.theirs, &local] {
        let (mac, ip) = (known.mac().octets(), groups(known.ip6()));
        rig.inside.send(&solicitation(us, ip)).unwrap();
        let answer = Advertisement {
            macs: (mac, us.0),
            ips: (ip, us.1),
            hop_limit: 255,
            solicited: true,
            target: ip,
            target_mac: mac,
        };
        assert_eq!(advertisement(&rig.at_container()), answer);
        // Duplicate address detection: the one who asks has no address yet.
        rig.inside
            .send(&solicitation((us.0, Ipv6Addr::UNSPECIFIED), ip))
            .unwrap();
        let to_all = Advertisement {
            macs: (mac, [0x33, 0x33, 0, 0, 0, 1]),
            ips: (ip, "ff02::1".parse().unwrap()),
            solicited: false,
            ..answer
        };
        assert_eq!(advertisement(&rig.at_container()), to_all);
    }
    for source in [us.1, Ipv6Addr::UNSPECIFIED] {
        rig.dropped(DropReason::OwnAddress, 1, || {
            rig.inside
                .send(&solicitation((us.0, source), us.1))
                .unwrap();
        });
    }
    // RFC 4861 §7.1.1: one that came through a router is none, and is not answered.
    let mut routed = solicitation(us, groups(rig.theirs.ip6()));
    routed[21] = 254;
    rig.dropped(DropReason::Malformed, 1, || {
        rig.inside.send(&routed).unwrap()
    });
    assert_eq!(rig.datapath.counters().datagrams_out, 0);
    assert!(beside.drain().is_empty());
    let unknown = solicitation(us, "fd09::dead".parse().unwrap());
    assert_eq!(rig.sent(&unknown).inner(), unknown);
}

/// Conformance V23.
fn control_frames_and_impossible_sources_are_dropped(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let with = |udp: Udp, destination, source| Udp {
        destination,
        source,
        ..udp
    };
    let outward = || Udp::between(&rig.ours, &rig.theirs);
    let inward = || Udp::between(&rig.theirs, &rig.ours);
    let control = |low| [0x01, 0x80, 0xc2, 0, 0, low];
    rig.dropped(DropReason::LinkLocalControl, 16, || {
        for low in 0..16 {
            let frame = with(outward(), control(low), rig.ours.mac().octets()).build();
            rig.inside.send(&frame).unwrap();
        }
    });
    rig.dropped(DropReason::LinkLocalControl, 16, || {
        for low in 0..16 {
            let frame = with(inward(), control(low), rig.theirs.mac().octets()).build();
            rig.from_host(&rig.carry(&frame));
        }
    });
    // A spanning tree's own, as bridges send it: 802.3 with a length where the type would be.
    let bpdu = ethernet(control(0), rig.ours.mac().octets(), 38, &[0x42; 46]);
    rig.dropped(DropReason::LinkLocalControl, 1, || {
        rig.inside.send(&bpdu).unwrap();
    });
    // The next address is an ordinary group.
    let group = with(outward(), control(0x10), rig.ours.mac().octets()).build();
    assert_eq!(rig.sent(&group).inner(), group);

    let sources = [
        [0; 6],
        BROADCAST,
        [0x01, 0, 0x5e, 0, 0, 1],
        [0x33, 0x33, 0, 0, 0, 1],
    ];
    rig.dropped(DropReason::InvalidSource, 4, || {
        for source in sources {
            let frame = with(outward(), rig.theirs.mac().octets(), source).build();
            rig.inside.send(&frame).unwrap();
        }
    });
    rig.dropped(DropReason::InvalidSource, 4, || {
        for source in sources {
            let frame = with(inward(), rig.ours.mac().octets(), source).build();
            rig.from_host(&rig.carry(&frame));
        }
    });
    rig.still_works();
}

/// Conformance V24: the tables' part of it. A frame right after the change goes to the new place, and only who is there now
/// may send as the one that moved.
fn a_moved_endpoint_is_reached_at_once(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let _ = rig.further(4);
    let there = Udp::between(&rig.ours, &rig.theirs).build();
    let back = Udp::between(&rig.theirs, &rig.ours).build();
    for place in [4, 2, 4, 2, 4] {
        let other = 6 - place;
        rig.datapath.apply(&[Change::SetFdb {
            vni: rig.ours.vni,
            mac: rig.theirs.mac(),
            remote: rig.outer.remote(place),
        }]);
        assert_eq!(rig.sent(&there).to, rig.outer.remote(place));
        let mut datagram = rig.carry(&back);
        datagram.from.set_ip(rig.outer.vtep(place));
        assert_eq!(rig.delivered(&datagram), back);
        datagram.from.set_ip(rig.outer.vtep(other));
        rig.dropped(DropReason::SourceElsewhere, 1, || rig.from_host(&datagram));
    }
    // An unsolicited advertisement of who lost the address moves nothing.
    let claim = icmpv6(
        (rig.theirs.mac().octets(), BROADCAST),
        (groups(rig.theirs.ip6()), "ff02::1".parse().unwrap()),
        136,
        &[&[0x20, 0, 0, 0], &groups(rig.theirs.ip6()).octets()[..]].concat(),
    );
    let mut late = rig.carry(&claim);
    late.from.set_ip(rig.outer.vtep(2));
    rig.dropped(DropReason::SourceElsewhere, 1, || rig.from_host(&late));
    assert_eq!(rig.sent(&there).to, rig.outer.remote(4));
}
