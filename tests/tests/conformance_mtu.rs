//! Paths that carry less than the link: raw ICMP errors from a router that is not there, and what the container is told.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use etherparse::{NetSlice, SlicedPacket};
use towline_tests::frames::{
    Seen, Udp, arp, complete_ipv4, cut_to, ether_of, icmpv6, ones_complement_sum, unfinished_tcp,
};
use towline_tests::packet::PacketSocket;
use towline_tests::raw::{PATIENCE, Rig};
use towline_tests::wire::{Outer, Setup};
use towline_tests::{wait_until, wire_tests};
use vtep::datapath::Backend;
use vtep::stats::DropReason;

wire_tests!(
    a_full_packet_fills_the_link_exactly,
    too_big_is_said_to_the_sender,
    what_is_no_packet_of_ours_is_not_believed,
    nobody_may_say_less_than_every_path_carries,
    large_tcp_frames_are_cut_smaller,
);

/// What a router on the way carries.
const NARROW: u16 = 1400;

/// An ICMP error of a router on the link about a datagram: "too big", `mtu` would pass. It quotes what RFC 1812 §4.3.2.3 has
/// it quote.
fn from_router(rig: &Rig, about: &[u8], mtu: u16) {
    let router = rig.outer.vtep(254);
    let quoted = &about[14..about.len().min(14 + 500)];
    match (router, rig.outer.vtep(1)) {
        (IpAddr::V4(router), IpAddr::V4(host)) => {
            let mut icmp = vec![3, 4, 0, 0, 0, 0];
            icmp.extend(mtu.to_be_bytes());
            icmp.extend(quoted);
            let sum = !ones_complement_sum(&icmp);
            icmp[2..4].copy_from_slice(&sum.to_be_bytes());
            let length = u16::try_from(20 + icmp.len()).unwrap();
            let mut packet = vec![0x45, 0];
            packet.extend(length.to_be_bytes());
            packet.extend([0, 0, 0, 0, 64, 1, 0, 0]);
            packet.extend(router.octets());
            packet.extend(host.octets());
            complete_ipv4(&mut packet);
            packet.extend(icmp);
            rig.on_link(0x0800, &packet);
        }
        (IpAddr::V6(router), IpAddr::V6(host)) => {
            let mut body = u32::from(mtu).to_be_bytes().to_vec();
            body.extend(quoted);
            let frame = icmpv6(([0; 6], [0; 6]), (router, host), 2, &body);
            rig.on_link(
                ether_of(SocketAddr::new(rig.outer.vtep(1), 0)),
                &frame[14..],
            );
        }
        _ => unreachable!("both are of the underlay's family"),
    }
}

fn sized(udp: Udp, packet: u16) -> Vec<u8> {
    let headers = if udp.from.is_ipv4() { 28 } else { 48 };
    Udp {
        payload: vec![0x3d; usize::from(packet) - headers],
        ..udp
    }
    .build()
}

/// Sends `frame` again and again until the container is told that it is too big, and returns what it is told.
fn told(rig: &Rig, frame: &[u8]) -> Vec<u8> {
    let mut answer = None;
    wait_until("the container is told", PATIENCE, || {
        rig.inside.send(frame).unwrap();
        answer = rig.inside.recv(Duration::from_millis(50));
        answer.is_some()
    });
    answer.unwrap()
}

/// Conformance V14: the network's MTU is the link's minus 50 over IPv4 and 70 over IPv6, to the byte.
fn a_full_packet_fills_the_link_exactly(setup: Setup) {
    for (outer, mtu) in [(Outer::V4, 1450), (Outer::V6, 1430)] {
        let rig = Rig::new(setup, outer);
        assert_eq!(rig.ours.mtu, mtu);
        for udp in [Udp::between, Udp::between6] {
            let full = sized(udp(&rig.ours, &rig.theirs), mtu);
            let seen = rig.sent(&full);
            assert_eq!(
                (seen.frame.len(), seen.inner()),
                (14 + 1500, full.as_slice())
            );
        }
        // One byte more is no packet of this port's: its own kernel refuses it.
        let over = sized(Udp::between(&rig.ours, &rig.theirs), mtu + 5);
        assert!(rig.inside.send(&over).is_err());
    }
}

/// Conformance V13, V12: with the right MTU, from the packet's own destination, whether or not DF is set, counted; and what fits
/// goes on.
fn too_big_is_said_to_the_sender(setup: Setup) {
    for outer in [Outer::V4, Outer::V6] {
        let rig = Rig::new(setup, outer);
        let mtu = rig.ours.mtu;
        let full4 = sized(Udp::between(&rig.ours, &rig.theirs), mtu);
        let full6 = sized(Udp::between6(&rig.ours, &rig.theirs), mtu);
        let seen = rig.sent(&full4);
        from_router(&rig, &seen.frame, NARROW);
        let left = NARROW - (1500 - mtu);

        let mut without_df = full4.clone();
        without_df[20] = 0;
        complete_ipv4(&mut without_df[14..]);
        let (own, their) = (rig.ours.mac().octets(), rig.theirs.mac().octets());
        for frame in [&full4, &without_df] {
            let answer = told(&rig, frame);
            assert_eq!((&answer[..6], &answer[6..12]), (&own[..], &their[..]));
            let sliced = SlicedPacket::from_ethernet(&answer).unwrap();
            let Some(NetSlice::Ipv4(ip)) = &sliced.net else {
                panic!("no IPv4: {answer:02x?}");
            };
            let header = ip.header();
            let ends = (header.source_addr(), header.destination_addr());
            assert_eq!(
                (IpAddr::V4(ends.0), IpAddr::V4(ends.1)),
                (rig.theirs.ip(), rig.ours.ip())
            );
            let icmp = ip.payload().payload;
            assert_eq!((icmp[0], icmp[1]), (3, 4), "fragmentation needed");
            assert_eq!(icmp[6..8], left.to_be_bytes(), "RFC 1191 §4");
            assert_eq!(ones_complement_sum(icmp), 0xffff);
            // RFC 792: the packet's header and at least eight bytes of what it carries.
            assert_eq!(icmp[8..36], frame[14..42]);
        }
        let answer = told(&rig, &full6);
        let sliced = SlicedPacket::from_ethernet(&answer).unwrap();
        let Some(NetSlice::Ipv6(ip)) = &sliced.net else {
            panic!("no IPv6: {answer:02x?}");
        };
        let header = ip.header();
        let ends = (header.source_addr(), header.destination_addr());
        assert_eq!(
            (IpAddr::V6(ends.0), IpAddr::V6(ends.1)),
            (rig.theirs.ip6(), rig.ours.ip6())
        );
        let icmp = ip.payload().payload;
        assert_eq!((icmp[0], icmp[1]), (2, 0), "packet too big");
        assert_eq!(icmp[4..8], u32::from(left).to_be_bytes(), "RFC 4443 §3.2");
        assert_eq!(icmp[8..56], full6[14..62]);

        // What is no IP packet has nobody to tell.
        let _ = rig.inside.drain();
        let mut foreign = full4.clone();
        foreign[12..14].copy_from_slice(&[0x88, 0xb5]);
        let counted = || rig.datapath.counters().drops.get(DropReason::PathTooSmall);
        let before = counted();
        assert!(before >= 3, "{:?}", rig.drops());
        rig.inside.send(&foreign).unwrap();
        wait_until("it is counted", PATIENCE, || counted() > before);
        assert_eq!(rig.inside.drain(), Vec::<Vec<u8>>::new());

        // The largest that fits, and everything smaller, goes as before; not one large one has left meanwhile.
        let _ = rig.wire_drain();
        for packet in [left, left - 1, 100] {
            let frame = sized(Udp::between(&rig.ours, &rig.theirs), packet);
            assert_eq!(rig.sent(&frame).inner(), frame);
        }
        rig.still_works();
    }
}

/// Conformance H6, V13: an error that quotes what was never sent narrows no path.
fn what_is_no_packet_of_ours_is_not_believed(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let full = sized(Udp::between(&rig.ours, &rig.theirs), rig.ours.mtu);
    let seen = rig.sent(&full);
    let forged = |at: usize, byte: u8| {
        let mut frame = seen.frame.clone();
        frame[at] ^= byte;
        frame
    };
    // Outer Ethernet 14, IPv4 20, UDP 8, VXLAN 8; then the inner frame.
    let inner = 50;
    let lies = [
        ("another network", forged(46, 1)),
        ("no I flag", forged(42, 8)),
        ("a MAC that is not here", forged(inner + 11, 0x40)),
        ("a MAC that is here, not there", forged(inner + 5, 1)),
        ("another VTEP", forged(33, 0x40)),
        ("a packet that would have fitted", forged(inner + 16, 0x05)),
        ("nothing behind UDP", seen.frame[..42].to_vec()),
    ];
    let reports = || rig.datapath.paths().reports();
    for (index, (what, lie)) in lies.iter().enumerate() {
        from_router(&rig, lie, NARROW);
        wait_until(what, PATIENCE, || {
            reports().doubted + reports().believed > index as u64
        });
        assert_eq!(reports().believed, 0, "{what}");
    }
    for _ in 0..20 {
        assert_eq!(rig.sent(&full).inner(), full);
    }
    assert_eq!(rig.inside.drain(), Vec::<Vec<u8>>::new());
}

/// Conformance V13: RFC 1122 §3.3.3 and RFC 8200 §5 say what every path carries, and nobody is believed who says less.
fn nobody_may_say_less_than_every_path_carries(setup: Setup) {
    for (outer, least) in [(Outer::V4, 576), (Outer::V6, 1280)] {
        let rig = Rig::new(setup, outer);
        let full = sized(Udp::between(&rig.ours, &rig.theirs), rig.ours.mtu);
        let seen = rig.sent(&full);
        for mtu in [68, 0, 100, 575] {
            from_router(&rig, &seen.frame, mtu);
        }
        // An ordinary report behind them, so that all are judged.
        from_router(&rig, &seen.frame, NARROW);
        let _ = told(&rig, &full);
        let _ = rig.wire_drain();
        let overhead = 1500 - rig.ours.mtu;
        let fits = sized(Udp::between(&rig.ours, &rig.theirs), least - overhead);
        assert_eq!(rig.sent(&fits).inner(), fits);
    }
}

/// Conformance V13: TCP that comes as one large frame is cut to what the path carries, and loses nothing. Only the offload backend
/// has such frames.
fn large_tcp_frames_are_cut_smaller(setup: Setup) {
    if setup.backend == Backend::Plain {
        return;
    }
    let rig = Rig::new(setup, Outer::V4);
    let full = sized(Udp::between(&rig.ours, &rig.theirs), rig.ours.mtu);
    let seen = rig.sent(&full);
    from_router(&rig, &seen.frame, NARROW);
    let _ = told(&rig, &full);
    let _ = (rig.wire_drain(), rig.inside.drain());

    let payload: Vec<u8> = (0..20_000)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect();
    let frame = unfinished_tcp(&rig.ours, &rig.theirs, &payload);
    PacketSocket::with_vnet_header(&rig.container, "eth0")
        .send_offloaded(cut_to(rig.ours.mtu - 40), &frame)
        .unwrap();
    let mut carried: Vec<(u32, Vec<u8>)> = Vec::new();
    let mut bytes = 0;
    while bytes < payload.len() {
        let Seen { frame, payload, .. } = rig.on_wire();
        assert!(frame.len() <= 14 + usize::from(NARROW), "{}", frame.len());
        // VXLAN 8, Ethernet 14, IPv4 20, TCP 20.
        let sequence = u32::from_be_bytes(payload[46..50].try_into().unwrap());
        let data = payload[62..].to_vec();
        bytes += data.len();
        carried.push((sequence, data));
    }
    carried.sort();
    let joined: Vec<u8> = carried.into_iter().flat_map(|(_, data)| data).collect();
    assert_eq!(joined, payload);
    // An ARP question is still answered: its path is none.
    let (IpAddr::V4(ours), IpAddr::V4(theirs)) = (rig.ours.ip(), rig.theirs.ip()) else {
        panic!("IPv4 addresses");
    };
    let question = arp(
        [0xff; 6],
        1,
        (rig.ours.mac().octets(), ours),
        ([0; 6], theirs),
    );
    rig.inside.send(&question).unwrap();
    assert_eq!(rig.at_container()[12..14], [0x08, 0x06]);
}
