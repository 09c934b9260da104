//! The hash of a frame's inner flow, which chooses the outer source port (RFC 7348 §5).
//!
//! All packets of one flow hash alike, whichever worker sees them: addresses, protocol and ports where every packet
//! of the flow shows them; addresses and protocol for fragments, since later ones show no ports; MACs for all that is not IP.

use std::net::IpAddr;

use crate::ethernet::Frame;
use crate::ip::{Fragment, Packet, protocol};

/// How many source ports there are to choose from.
pub const SOURCE_PORTS: usize = 64;

/// They lie from here up, in the dynamic range (RFC 7348 §5); one of them may be taken on any host.
pub const FIRST_SOURCE_PORT: u16 = 49_152;

/// Odd constants from the digits of π: any will do, as long as every worker has the same.
const KEY: [u64; 3] = [
    0x243f_6a88_85a3_08d3,
    0x1319_8a2e_0370_7345,
    0xa409_3822_299f_31d1,
];

/// The hash of the flow that `frame` belongs to.
#[inline]
#[must_use]
pub fn hash(frame: &[u8]) -> u32 {
    let Some(frame) = Frame::parse(frame) else {
        return 0;
    };
    match Packet::parse(&frame) {
        Ok(Some(packet)) => hash_packet(&packet),
        _ => {
            let mut wide = [[0; 8]; 2];
            wide[0][..6].copy_from_slice(&frame.source().octets());
            wide[1][..6].copy_from_slice(&frame.destination().octets());
            finish(mix(
                mix(
                    KEY[0] ^ u64::from(frame.ethertype()),
                    u64::from_le_bytes(wide[0]),
                ),
                u64::from_le_bytes(wide[1]),
            ))
        }
    }
}

/// Which of the [`SOURCE_PORTS`] a flow takes.
#[inline]
#[must_use]
pub const fn source_port_index(hash: u32) -> usize {
    (hash >> (32 - SOURCE_PORTS.ilog2())) as usize
}

/// A hash of three words, for tables of one worker alone.
#[inline]
pub(crate) const fn mix_words(a: u32, b: u32, c: u32) -> u32 {
    finish(mix(KEY[0] ^ a as u64, (b as u64) << 32 | c as u64))
}

fn hash_packet(packet: &Packet<'_>) -> u32 {
    let ports = match (packet.protocol, packet.fragment, packet.body) {
        (
            protocol::TCP | protocol::UDP | protocol::SCTP | protocol::DCCP | protocol::UDP_LITE,
            Fragment::Whole,
            [a, b, c, d, ..],
        ) => u32::from_le_bytes([*a, *b, *c, *d]),
        _ => 0,
    };
    let mut state = mix(KEY[0] ^ u64::from(packet.protocol), u64::from(ports));
    for address in [packet.source, packet.destination] {
        state = match address {
            IpAddr::V4(ip) => mix(state, u64::from(ip.to_bits())),
            IpAddr::V6(ip) => {
                let [a, b, c, d, e, f, g, h, rest @ ..] = ip.octets();
                mix(
                    mix(state, u64::from_le_bytes([a, b, c, d, e, f, g, h])),
                    u64::from_le_bytes(rest),
                )
            }
        };
    }
    finish(state)
}

/// One folded multiplication: every bit of the input reaches the middle of the product.
#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "both halves of the product are kept, by folding"
)]
const fn mix(state: u64, word: u64) -> u64 {
    let product = (state ^ word ^ KEY[1]) as u128 * KEY[2] as u128;
    (product as u64) ^ ((product >> 64) as u64)
}

#[inline]
const fn finish(state: u64) -> u32 {
    (mix(state, KEY[0]) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use etherparse::PacketBuilder;

    use super::*;

    fn udp(source_port: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
            .udp(source_port, 53)
            .write(&mut frame, payload)
            .unwrap();
        frame
    }

    fn udp6(source_port: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv6([0xfd; 16], [0xfe; 16], 64)
            .udp(source_port, 53)
            .write(&mut frame, payload)
            .unwrap();
        frame
    }

    #[test]
    fn many_flows_use_many_ports() {
        // Conformance V7: 1,000 flows that differ in one port use every source port there is.
        for make in [udp, udp6] {
            let used: HashSet<_> = (0..1_000)
                .map(|port| source_port_index(hash(&make(port, b"x"))))
                .collect();
            assert_eq!(used.len(), SOURCE_PORTS);
        }
        assert_eq!(source_port_index(u32::MAX), SOURCE_PORTS - 1);
    }

    #[test]
    fn one_flow_has_one_hash_whatever_it_carries() {
        // Conformance V8.
        for make in [udp, udp6] {
            let first = hash(&make(7, b"x"));
            for len in 0..1_400 {
                assert_eq!(hash(&make(7, &vec![0xa5; len])), first);
            }
        }
    }

    #[test]
    fn fragments_of_one_datagram_stay_together() {
        // Conformance V8: the first fragment shows ports and the later do not.
        let (mut first, mut later) = (udp(7, b"x"), udp(0xdead, b"y"));
        first[20] = 0x20;
        later[21] = 100;
        assert_eq!(hash(&first), hash(&later));
    }

    #[test]
    fn anything_has_a_hash() {
        assert_eq!(hash(&[]), 0);
        assert_ne!(hash(&[2; 14]), hash(&[4; 14]));
    }
}
