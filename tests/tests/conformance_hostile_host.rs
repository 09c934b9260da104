//! What a hostile machine on the underlay can send, byte by byte, and what becomes of it.
//!
//! Each case ends in a named drop, or in the kernel's own refusal, and in two frames that still cross.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::{IpAddr, SocketAddr};

use towline_tests::frames::{Datagram, Udp, complete_ipv4, ether_of, ethernet, tagged, vxlan};
use towline_tests::raw::{PATIENCE, Rig, VNI};
use towline_tests::wire::{Endpoint, Outer, Setup};
use towline_tests::{wait_until, wire_tests};
use vtep::fdb::{Change, PortId};
use vtep::stats::DropReason;

wire_tests!(
    only_members_of_a_network_may_send_into_it,
    a_mac_comes_only_from_its_own_host,
    a_local_containers_mac_stays_local,
    thousands_of_new_macs_leave_the_tables_alone,
    cut_off_datagrams_are_dropped,
    lying_headers_are_dropped,
    lengths_that_lie_outside_are_the_kernels,
    fragments_are_whole_again_or_nothing,
    noise_reaches_nobody,
);

/// Conformance H1: strangers, and members of other networks only.
fn only_members_of_a_network_may_send_into_it(setup: Setup) {
    for outer in [Outer::V4, Outer::V6] {
        let rig = Rig::new(setup, outer);
        let other_vni = Endpoint {
            port: PortId(100),
            ..Endpoint::new(VNI + 1, 5)
        };
        rig.datapath.apply(&[other_vni.network()]);
        rig.datapath.apply(&other_vni.at(outer.remote(5)));
        let frames = [
            Udp::between(&rig.theirs, &rig.ours).build(),
            Udp::broadcast(&rig.theirs).build(),
        ];
        let strangers: Vec<_> = (5..=99u8).map(|number| outer.vtep(number)).collect();
        let count = (strangers.len() * frames.len()) as u64;
        rig.dropped(DropReason::NotAMember, count, || {
            for ip in &strangers {
                for frame in &frames {
                    rig.from_host(&Datagram {
                        from: SocketAddr::new(*ip, 50_000),
                        ..rig.carry(frame)
                    });
                }
            }
        });
        rig.still_works();
        // One that was a member and is none any more.
        rig.datapath.apply(&[Change::RemoveMember {
            vni: rig.ours.vni,
            addr: outer.vtep(2),
        }]);
        rig.dropped(DropReason::NotAMember, 1, || {
            rig.from_host(&rig.carry(&frames[0]));
        });
    }
}

/// Conformance H2.
fn a_mac_comes_only_from_its_own_host(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let farther = rig.further(4);
    let frame = Udp::between(&farther, &rig.ours).build();
    let broadcast = Udp::broadcast(&farther).build();
    rig.dropped(DropReason::SourceElsewhere, 2, || {
        rig.from_host(&rig.carry(&frame));
        rig.from_host(&rig.carry(&broadcast));
    });
    let from_its_own = Datagram {
        from: SocketAddr::new(rig.outer.vtep(4), 50_000),
        ..rig.carry(&frame)
    };
    assert_eq!(rig.delivered(&from_its_own), frame);
    rig.still_works();
}

/// Conformance H3: Swarm's tables move, and five of five pings are lost.
fn a_local_containers_mac_stays_local(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let local = Endpoint {
        mtu: rig.ours.mtu,
        ..Endpoint::new(VNI, 7)
    };
    let (_container, beside) = rig.neighbor(&local);
    let gateway = [0x02, 0, 10, 0, 9, 1];
    let claims: Vec<_> = [local.mac().octets(), rig.ours.mac().octets(), gateway]
        .into_iter()
        .map(|source| {
            Udp {
                source,
                ..Udp::broadcast(&local)
            }
            .build()
        })
        .collect();
    let there = Udp::between(&rig.ours, &local).build();
    for _ in 0..5 {
        rig.dropped(DropReason::SourceElsewhere, 3, || {
            for claim in &claims {
                rig.from_host(&rig.carry(claim));
            }
        });
        rig.inside.send(&there).unwrap();
        assert_eq!(beside.recv(PATIENCE), Some(there.clone()));
    }
    assert_eq!(rig.datapath.counters().datagrams_out, 0);
}

/// Conformance H5, from the wire: Swarm learns all of them.
fn thousands_of_new_macs_leave_the_tables_alone(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    rig.learns_nothing(0xbb, DropReason::UnknownSource, |source| {
        let udp = Udp {
            source,
            ..Udp::between(&rig.theirs, &rig.ours)
        };
        rig.from_host(&rig.carry(&udp.build()));
    });
}

/// Conformance H6: every length below a VXLAN header and an Ethernet header.
fn cut_off_datagrams_are_dropped(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let whole = vxlan(VNI, &Udp::between(&rig.theirs, &rig.ours).build());
    rig.dropped(DropReason::NoVniFlag, 1, || {
        rig.from_host(&rig.datagram(Vec::new()));
    });
    for length in 1..8 + 14 {
        rig.dropped(DropReason::Truncated, 1, || {
            rig.from_host(&rig.datagram(whole[..length].to_vec()));
        });
    }
    // Within the IP header it is the IP header that lies.
    for length in 8 + 14..whole.len() {
        rig.dropped(DropReason::Malformed, 1, || {
            rig.from_host(&rig.datagram(whole[..length].to_vec()));
        });
    }
    // Tags without end, as far as they reach.
    for tags in [5, 50, 300] {
        let mut frame = Udp::between(&rig.theirs, &rig.ours).build();
        for _ in 0..tags {
            frame = tagged(frame, 0x8100, 1);
        }
        rig.dropped(DropReason::Truncated, 1, || {
            rig.from_host(&rig.carry(&frame))
        });
    }
    rig.still_works();
}

/// Conformance H6: inner IP headers that contradict themselves or the frame.
fn lying_headers_are_dropped(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let good4 = Udp::between(&rig.theirs, &rig.ours).build();
    let good6 = Udp::between6(&rig.theirs, &rig.ours).build();
    let mut lies = Vec::new();
    let mut lie = |good: &[u8], what: &str, changes: &[(usize, u8)]| {
        let mut frame = good.to_vec();
        for (at, byte) in changes {
            frame[14 + at] = *byte;
        }
        lies.push((what.to_owned(), frame));
    };
    for length in 0..5 {
        lie(&good4, &format!("IHL {length}"), &[(0, 0x40 | length)]);
    }
    lie(&good4, "IHL 15, beyond the packet", &[(0, 0x4f)]);
    for version in [0, 5, 6, 15] {
        lie(
            &good4,
            &format!("version {version}"),
            &[(0, version << 4 | 5)],
        );
    }
    lie(&good4, "total length 0", &[(2, 0), (3, 0)]);
    lie(&good4, "total length 19", &[(2, 0), (3, 19)]);
    lie(&good4, "total length 65535", &[(2, 0xff), (3, 0xff)]);
    for version in [0, 4, 15] {
        lie(
            &good6,
            &format!("version {version} for 6"),
            &[(0, version << 4)],
        );
    }
    lie(&good6, "payload length 65535", &[(4, 0xff), (5, 0xff)]);
    lie(
        &good6,
        "hop-by-hop options without end",
        &[(6, 0), (41, 0xff)],
    );
    for (next, name) in [(43, "routing"), (60, "destination"), (51, "authentication")] {
        let what = format!("{name} header beyond the packet");
        lie(&good6, &what, &[(6, next), (41, 0xff)]);
    }
    for (what, frame) in &lies {
        eprintln!("{what}");
        rig.dropped(DropReason::Malformed, 1, || {
            rig.from_host(&rig.carry(frame))
        });
    }

    // A hundred extension headers, each right.
    let mut packet = good6[14..54].to_vec();
    packet[6] = 60;
    packet.extend([60, 0, 1, 4, 0, 0, 0, 0].repeat(100));
    let length = u16::try_from(packet.len() - 40).unwrap();
    packet[4..6].copy_from_slice(&length.to_be_bytes());
    let chain = ethernet(
        rig.ours.mac().octets(),
        rig.theirs.mac().octets(),
        0x86dd,
        &packet,
    );
    rig.dropped(DropReason::Malformed, 1, || {
        rig.from_host(&rig.carry(&chain))
    });
    rig.still_works();
}

/// Conformance H6: outer lengths that lie end at the kernel's IP or UDP.
fn lengths_that_lie_outside_are_the_kernels(setup: Setup) {
    for outer in [Outer::V4, Outer::V6] {
        let rig = Rig::new(setup, outer);
        let datagram = rig.carry(&Udp::between(&rig.theirs, &rig.ours).build());
        let ether_type = ether_of(datagram.from);
        let good = datagram.packet();
        let (ip_length, udp) = if outer == Outer::V4 { (2, 20) } else { (4, 40) };
        let mut bad = Vec::new();
        for (at, value) in [
            (ip_length, 0xffffu16),
            (ip_length, 4),
            (udp + 4, 0xffff),
            (udp + 4, 0),
            (udp + 4, 7),
        ] {
            let mut packet = good.clone();
            packet[at..at + 2].copy_from_slice(&value.to_be_bytes());
            if outer == Outer::V4 {
                complete_ipv4(&mut packet);
            }
            bad.push(packet);
        }
        if outer == Outer::V4 {
            for ihl in [0, 4, 15] {
                let mut packet = good.clone();
                packet[0] = 0x40 | ihl;
                bad.push(packet);
            }
            let mut packet = good.clone();
            packet[10] ^= 0xff;
            bad.push(packet);
        }
        for packet in &bad {
            rig.on_link(ether_type, packet);
        }
        // Behind them, by the same way.
        rig.on_link(ether_type, &good);
        assert_eq!(rig.at_container(), datagram.payload[8..]);
        assert_eq!(rig.datapath.counters().datagrams_in, 1);
        assert!(rig.inside.drain().is_empty());
        rig.still_works();
    }
}

/// Cuts an IPv4 packet of 20 bytes of header into fragments whose payloads have `size` bytes.
fn fragments(packet: &[u8], id: u16, size: usize) -> Vec<Vec<u8>> {
    assert_eq!(size % 8, 0, "offsets count in eights");
    let (header, payload) = packet.split_at(20);
    let last = (payload.len() - 1) / size;
    payload
        .chunks(size)
        .enumerate()
        .map(|(index, chunk)| {
            let mut fragment = header.to_vec();
            let length = u16::try_from(20 + chunk.len()).unwrap();
            let offset = u16::try_from(index * size / 8).unwrap();
            let more = if index < last { 0x2000 } else { 0 };
            fragment[2..4].copy_from_slice(&length.to_be_bytes());
            fragment[4..6].copy_from_slice(&id.to_be_bytes());
            fragment[6..8].copy_from_slice(&(more | offset).to_be_bytes());
            complete_ipv4(&mut fragment);
            fragment.extend(chunk);
            fragment
        })
        .collect()
}

/// Conformance H6: outer fragments. The kernel puts them together or forgets them; what it hands over is looked at like any
/// datagram, however large.
fn fragments_are_whole_again_or_nothing(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let large = |payload: usize| {
        let udp = Udp {
            payload: vec![0x55; payload],
            ..Udp::between(&rig.theirs, &rig.ours)
        };
        udp.build()
    };
    // Whole again, in order and against it.
    for (id, backwards) in [(1, false), (2, true)] {
        let frame = large(1400);
        let mut pieces = fragments(&rig.carry(&frame).packet(), id, 512);
        assert_eq!(pieces.len(), 3);
        if backwards {
            pieces.reverse();
        }
        for piece in &pieces {
            rig.on_link(0x0800, piece);
        }
        assert_eq!(rig.at_container(), frame);
    }
    // Larger than any port takes.
    for (id, payload) in [(3, 1423), (4, 9000), (5, 65_000)] {
        let pieces = fragments(&rig.carry(&large(payload)).packet(), id, 1480);
        rig.dropped(DropReason::Oversize, 1, || {
            for piece in &pieces {
                rig.on_link(0x0800, piece);
            }
        });
    }
    // First pieces that are never followed, and last ones whose first never came.
    let before = rig.datapath.counters();
    for id in 100..2100 {
        let pieces = fragments(&rig.carry(&large(1400)).packet(), id, 512);
        let lonely = if id % 2 == 0 { &pieces[0] } else { &pieces[2] };
        rig.on_link(0x0800, lonely);
    }
    // One that lies over another (RFC 5722's attack, here over IPv4): the kernel gives the whole datagram up.
    let pieces = fragments(&rig.carry(&large(1400)).packet(), 3000, 512);
    let mut over = pieces[1].clone();
    over[6..8].copy_from_slice(&(0x2000 | ((512 - 64) / 8u16)).to_be_bytes());
    complete_ipv4(&mut over);
    for piece in [&pieces[0], &over, &pieces[1], &pieces[2]] {
        rig.on_link(0x0800, piece);
    }
    rig.still_works();
    // Nothing came of all these but the one frame of the line above.
    assert_eq!(
        rig.datapath.counters().datagrams_in - before.datagrams_in,
        1
    );
}

/// A sequence that looks like chance and is the same in every run (xorshift64).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        let words = std::iter::repeat_with(|| self.next().to_le_bytes());
        words.flatten().take(length).collect()
    }
}

/// Conformance H6: bytes of any kind behind headers that are ever more right; and H1 to H3 in all their mixtures.
fn noise_reaches_nobody(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let before = rig.datapath.counters();
    let mut noise = Noise(0x5eed);
    let good = Udp::between(&rig.theirs, &rig.ours).build();
    let mut sent = 0;
    for round in 0..2000u64 {
        let length = usize::try_from(noise.next() % 1400).unwrap();
        let random = noise.bytes(length);
        let payload = match round % 4 {
            0 => random,
            1 => vxlan(VNI, &random),
            // A known sender, an unknown receiver's chance of one in 2^48, and any type.
            2 => vxlan(
                VNI,
                &[&rig.ours.mac().octets()[..], &noise.bytes(6), &random].concat(),
            ),
            _ => {
                // A right frame with one byte wrong, its source MAC among them.
                let mut frame = good.clone();
                let at = usize::try_from(noise.next()).unwrap() % 34;
                frame[at] ^= u8::try_from(1 + noise.next() % 255).unwrap();
                vxlan(VNI, &frame)
            }
        };
        let mut datagram = rig.datagram(payload);
        if round % 7 == 0 {
            datagram.from.set_ip(IpAddr::from([192, 0, 2, 77]));
        }
        rig.from_host(&datagram);
        sent += 1;
        if round % 200 == 199 {
            rig.wait_for_datagrams(&before, sent);
        }
    }
    wait_until("all is decided", PATIENCE, || {
        let after = rig.datapath.counters();
        after.datagrams_in - before.datagrams_in == sent
    });
    // What came through is no more than right frames with a byte changed that nobody checks on the way.
    for frame in rig.inside.drain() {
        assert_eq!(frame.len(), good.len());
        let changed = frame.iter().zip(&good).filter(|(a, b)| a != b).count();
        assert!(changed <= 1 && frame[6..12] == good[6..12], "{frame:02x?}");
    }
    assert!(rig.wire_drain().is_empty());
    rig.still_works();
}
