//! What stands on the wire, byte by byte: raw sockets on the other host see each datagram with its outer headers.
//!
//! The link's offloads are off, so that checksums are there as a card would send them.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use towline_tests::wire::{Endpoint, Outer, Pair, Setup};
use towline_tests::{wait_until, wire_tests};
use vtep::datapath::Datapath;
use vtep::stats::DropReason;
use vtep::vxlan::DEFAULT_PORT;

wire_tests!(
    outer_headers_over_ipv4,
    outer_headers_over_ipv6,
    too_large_for_the_path_is_never_cut
);

const FLOWS: u16 = 400;
const REPEATS: u16 = 3;
/// The inner UDP port that tells our datagrams from ARP, ND and MLD.
const MARK: u16 = 7777;

/// One datagram as the other host's network layer saw it.
struct Seen {
    /// The IPv4 header; empty over IPv6, whose raw sockets don't show it.
    ip: Vec<u8>,
    udp: Vec<u8>,
}

impl Seen {
    fn source_port(&self) -> u16 {
        short(&self.udp, 0)
    }
}

fn short(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// RFC 1071, the plain way.
fn ones_complement_sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

struct Wire {
    pair: Pair,
    outer: Outer,
    raw: Socket,
    // Takes the port on the other host, so that no ICMP answers.
    _port: UdpSocket,
    datapath: Box<dyn Datapath>,
    container: towline_tests::TestNetns,
    theirs: Endpoint,
}

impl Wire {
    fn new(setup: Setup, outer: Outer) -> Self {
        let pair = Pair::new().without_offloads();
        let (raw, port) = pair
            .b
            .run(|| {
                let domain = if outer == Outer::V4 {
                    Domain::IPV4
                } else {
                    Domain::IPV6
                };
                let raw = Socket::new(domain, Type::RAW, Some(Protocol::UDP)).unwrap();
                raw.set_recv_buffer_size(8 << 20).unwrap();
                raw.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                (raw, UdpSocket::bind(outer.remote(2)).unwrap())
            })
            .unwrap();
        let (ours, theirs) = (Endpoint::new(0x12_3456, 2), Endpoint::new(0x12_3456, 3));
        let ours = Endpoint {
            mtu: outer.mtu(),
            ..ours
        };
        let container = pair.container("c");
        let datapath = (setup.start)((*pair.a).clone(), outer.vtep(1)).unwrap();
        ours.attach(&*datapath, &container, setup.backend);
        datapath.apply(&theirs.at(outer.remote(2)));
        Self {
            pair,
            outer,
            raw,
            _port: port,
            datapath,
            container,
            theirs,
        }
    }

    fn socket(&self) -> UdpSocket {
        self.container
            .run(|| UdpSocket::bind(("0.0.0.0", 0)))
            .unwrap()
            .unwrap()
    }

    /// The next datagram that carries one of ours.
    fn next(&self) -> Seen {
        loop {
            let mut buffer = vec![0; 65_536];
            let length = (&self.raw).read(&mut buffer).expect("a datagram in time");
            buffer.truncate(length);
            let ip_len = if self.outer == Outer::V4 {
                usize::from(buffer[0] & 0x0f) * 4
            } else {
                0
            };
            let udp = buffer.split_off(ip_len);
            // UDP 8, VXLAN 8, Ethernet 14, IPv4 20, then the inner ports.
            let inner = udp
                .get(16 + 12..)
                .is_some_and(|rest| rest.starts_with(&[0x08, 0x00]));
            if inner && udp.len() >= 54 && short(&udp, 52) == MARK {
                return Seen { ip: buffer, udp };
            }
        }
    }
}

fn outer_headers(setup: Setup, outer: Outer) {
    let wire = Wire::new(setup, outer);
    let to = SocketAddr::new(wire.theirs.ip(), MARK);
    let sockets: Vec<_> = (0..FLOWS).map(|_| wire.socket()).collect();
    let mut ports = HashMap::new();
    for round in 0..REPEATS {
        for (flow, socket) in sockets.iter().enumerate() {
            let payload = vec![0x5a; 1 + flow + usize::from(round)];
            socket.send_to(&payload, to).unwrap();
            let seen = wire.next();
            // V1: I flag set, the VNI, all else zero.
            assert_eq!(seen.udp[8..16], [0x08, 0, 0, 0, 0x12, 0x34, 0x56, 0]);
            assert_eq!(short(&seen.udp, 2), DEFAULT_PORT);
            // V7 and V8.
            assert!(seen.source_port() >= 49_152, "{}", seen.source_port());
            assert_eq!(
                *ports.entry(flow).or_insert(seen.source_port()),
                seen.source_port(),
                "flow {flow}"
            );
            // V10 and V11: never zero, and right.
            let length = u32::try_from(seen.udp.len()).unwrap().to_be_bytes();
            let (source, destination) = (wire.outer.vtep(1), wire.outer.vtep(2));
            let pseudo = [
                octets(source),
                octets(destination),
                length.to_vec(),
                vec![0, 0, 0, 17],
            ]
            .concat();
            assert_ne!(short(&seen.udp, 6), 0);
            assert_eq!(
                ones_complement_sum(&[pseudo, seen.udp.clone()].concat()),
                0xffff
            );
            if outer == Outer::V4 {
                // V12: DF set, no fragment. V19: TTL 64, DSCP 0.
                assert_eq!(short(&seen.ip, 6), 0x4000);
                assert_eq!((seen.ip[8], seen.ip[1] >> 2), (64, 0));
            }
            // The inner frame is what the container sent, its checksum complete.
            let inner = &seen.udp[16..];
            assert_eq!(inner[..6], wire.theirs.mac().octets());
            assert!(inner.ends_with(&payload));
            let inner_pseudo = [&inner[26..34], &[0, 17], &inner[38..40]].concat();
            assert_eq!(
                ones_complement_sum(&[inner_pseudo.as_slice(), &inner[34..]].concat()),
                0xffff
            );
        }
    }
    let distinct: HashSet<_> = ports.values().collect();
    assert!(
        distinct.len() >= 48,
        "{FLOWS} flows use {} source ports",
        distinct.len()
    );
}

fn octets(ip: std::net::IpAddr) -> Vec<u8> {
    match ip {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn outer_headers_over_ipv4(setup: Setup) {
    outer_headers(setup, Outer::V4);
}

fn outer_headers_over_ipv6(setup: Setup) {
    outer_headers(setup, Outer::V6);
}

/// Conformance V12: a link that became too small gets nothing at all, and the drop has a name.
fn too_large_for_the_path_is_never_cut(setup: Setup) {
    let wire = Wire::new(setup, Outer::V4);
    let to = SocketAddr::new(wire.theirs.ip(), MARK);
    let socket = wire.socket();
    let full = vec![1; usize::from(wire.outer.mtu()) - 28];
    socket.send_to(&full, to).unwrap();
    assert_eq!(wire.next().udp.len(), 8 + 8 + 14 + 28 + full.len());
    towline_tests::wire::netlink(&wire.pair.a)
        .set_mtu("u0", 1400)
        .unwrap();
    socket.send_to(&full, to).unwrap();
    socket.send_to(b"small", to).unwrap();
    let next = wire.next();
    assert!(
        next.udp.ends_with(b"small"),
        "the large one came, {} bytes of it",
        next.udp.len()
    );
    // Counted after the batch has left, so a moment later than the wire shows it.
    wait_until("the large one is counted", Duration::from_secs(5), || {
        wire.datapath.counters().drops.get(DropReason::PathTooSmall) == 1
    });
}
