//! The VXLAN header, what it costs, and what else may arrive on its port.
//!
//! ```text
//!  0                   1                   2                   3        RFC 7348 §5
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! |R|R|R|R|I|R|R|R|            Reserved                           |
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! |                VXLAN Network Identifier (VNI) |   Reserved    |
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! ```

use std::net::IpAddr;

use crate::Vni;

/// Length of the VXLAN header in bytes.
pub const HEADER_LEN: usize = 8;
/// The UDP port that IANA assigned to VXLAN.
pub const DEFAULT_PORT: u16 = 4789;
/// The first bytes of a reachability probe (`probe.rs`): the I flag's bit is clear in the first.
pub const PROBE_MAGIC: [u8; 4] = *b"TLPB";
/// The first bytes of what a member answers to a probe; the I flag's bit is clear, too.
pub const PROBE_ANSWER_MAGIC: [u8; 4] = *b"TLPA";

/// The I flag: the VNI is valid.
const FLAG_I: u8 = 0x08;

const ETHERNET_LEN: u16 = 14;
const UDP_LEN: u16 = 8;
const IPV4_LEN: u16 = 20;
const IPV6_LEN: u16 = 40;

/// The family of the outer IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4, without options.
    V4,
    /// IPv6, without extension headers.
    V6,
}

impl Family {
    /// The family of an underlay address.
    #[must_use]
    pub const fn of(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// How frames are protected on the underlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Not at all: plain VXLAN.
    Cleartext,
}

/// Bytes between the largest IP packet of the underlay and the largest IP packet of the overlay: outer IP, UDP and VXLAN headers,
/// and the inner Ethernet header. 50 over IPv4, 70 over IPv6.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the VXLAN header has 8 bytes"
)]
pub const fn overhead(family: Family, protection: Protection) -> u16 {
    let ip = match family {
        Family::V4 => IPV4_LEN,
        Family::V6 => IPV6_LEN,
    };
    match protection {
        Protection::Cleartext => ip + UDP_LEN + HEADER_LEN as u16 + ETHERNET_LEN,
    }
}

/// What a UDP payload on the VXLAN port is, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The I flag is set.
    Vxlan,
    /// A reachability probe, or the answer to one.
    Probe,
    /// The I flag is clear; encrypted datagrams will be told here.
    Unknown,
}

/// Tells what a payload is. Only VXLAN has the I flag, bit 0x08 of the first byte.
#[inline]
#[must_use]
pub fn classify(payload: &[u8]) -> Class {
    match payload {
        [first, ..] if first & FLAG_I != 0 => Class::Vxlan,
        [b'T', b'L', b'P', b'A' | b'B', ..] => Class::Probe,
        _ => Class::Unknown,
    }
}

/// A VXLAN header that has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whether the I flag is set: without it the VNI means nothing.
    pub vni_valid: bool,
    /// The network's identifier.
    pub vni: Vni,
    /// Whether any of the other 39 bits is set; they are ignored on receipt (RFC 7348 §5).
    pub reserved: bool,
}

impl Header {
    /// Reads the header, and returns the frame behind it; `None` when there are fewer than 8 bytes.
    #[inline]
    #[must_use]
    pub fn parse(payload: &[u8]) -> Option<(Self, &[u8])> {
        let (header, frame) = payload.split_first_chunk::<HEADER_LEN>()?;
        let [flags, r1, r2, r3, v1, v2, v3, r4] = *header;
        let reserved = (flags & !FLAG_I) | r1 | r2 | r3 | r4 != 0;
        Some((
            Self {
                vni_valid: flags & FLAG_I != 0,
                vni: Vni::from_be_bytes([v1, v2, v3]),
                reserved,
            },
            frame,
        ))
    }

    /// The header that is sent for a network: I flag set, every other bit zero (RFC 7348 §5).
    #[inline]
    #[must_use]
    pub const fn emit(vni: Vni) -> [u8; HEADER_LEN] {
        let [v1, v2, v3] = vni.to_be_bytes();
        [FLAG_I, 0, 0, 0, v1, v2, v3, 0]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn emits_only_the_i_flag_and_the_vni() {
        // Conformance V1.
        assert_eq!(
            Header::emit(Vni::new(0x12_34_56).unwrap()),
            [0x08, 0, 0, 0, 0x12, 0x34, 0x56, 0]
        );
    }

    #[test]
    fn overhead_is_50_and_70() {
        // Conformance V14: the one function that every MTU is made with.
        assert_eq!(overhead(Family::V4, Protection::Cleartext), 50);
        assert_eq!(overhead(Family::V6, Protection::Cleartext), 70);
        assert_eq!(Family::of("2001:db8::1".parse().unwrap()), Family::V6);
    }

    #[test]
    fn parses_a_header_decoded_by_hand() {
        let payload = [0x08, 0, 0, 0, 0x00, 0x10, 0x00, 0, 0xaa, 0xbb];
        let (header, frame) = Header::parse(&payload).unwrap();
        assert_eq!(
            header,
            Header {
                vni_valid: true,
                vni: Vni::new(4096).unwrap(),
                reserved: false
            }
        );
        assert_eq!(frame, [0xaa, 0xbb]);
        assert!(Header::parse(&payload[..7]).is_none());
        assert!(Header::parse(&payload[..8]).unwrap().1.is_empty());
    }

    #[test]
    fn each_reserved_bit_is_seen_and_changes_nothing_else() {
        // Conformance V2.
        let vni = Vni::new(7).unwrap();
        let reserved = (0..64)
            .filter(|bit| *bit != 4 && !(32..56).contains(bit))
            .collect::<Vec<_>>();
        assert_eq!(reserved.len(), 39);
        for bit in reserved {
            let mut payload = Header::emit(vni);
            payload[bit / 8] |= 0x80 >> (bit % 8);
            assert_eq!(
                Header::parse(&payload).unwrap().0,
                Header {
                    vni_valid: true,
                    vni,
                    reserved: true
                },
                "bit {bit}"
            );
        }
    }

    #[test]
    fn classifies_by_the_first_byte() {
        // Conformance V3: an I flag of 0 is never VXLAN.
        for first in 0..=255_u8 {
            let class = classify(&[first, 0, 0, 0, 0, 0, 1, 0]);
            assert_eq!(class == Class::Vxlan, first & 0x08 != 0, "{first:#x}");
        }
        assert_eq!(classify(&PROBE_MAGIC), Class::Probe);
        assert_eq!(classify(&PROBE_ANSWER_MAGIC), Class::Probe);
        assert_eq!(classify(&PROBE_MAGIC[..3]), Class::Unknown);
        assert_eq!(classify(&[]), Class::Unknown);
    }

    proptest! {
        #[test]
        fn round_trip(number in 0..=Vni::MAX.get()) {
            // Conformance V5.
            let vni = Vni::new(number).unwrap();
            let header = Header::parse(&Header::emit(vni)).unwrap().0;
            prop_assert_eq!(header, Header { vni_valid: true, vni, reserved: false });
        }
    }
}
