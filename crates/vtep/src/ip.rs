//! A view over an IPv4 or IPv6 packet: addresses, fragments, and where the upper layer starts.
//!
//! [`Packet::parse`] checks every length once. Its body ends where the IP header says, not where the frame does, so
//! padding is never taken for payload. Reassembly is not done here: the body of a later fragment means nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{Ipv4HeaderSlice, Ipv6HeaderSlice};

use crate::ethernet::{self, Frame};

/// Protocol numbers (IANA "Assigned Internet Protocol Numbers").
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// DCCP.
    pub const DCCP: u8 = 33;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// Authentication header.
    pub const AUTHENTICATION: u8 = 51;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION: u8 = 60;
    /// SCTP.
    pub const SCTP: u8 = 132;
    /// UDP-Lite.
    pub const UDP_LITE: u8 = 136;
}

/// Extension headers read before the packet is given up: more than any real packet has, and a bound for hostile input.
const MAX_EXTENSIONS: usize = 8;

/// What a packet is to its datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// All of it.
    Whole,
    /// Its start, with the upper layer's header.
    First,
    /// A later part.
    Later,
}

/// An IP packet whose lengths agree.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Who says it sent the packet.
    pub source: IpAddr,
    /// Where the packet is to go.
    pub destination: IpAddr,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// The upper layer's protocol, behind all extension headers that are understood.
    pub protocol: u8,
    /// Whether `body` is all there is.
    pub fragment: Fragment,
    /// The upper layer's header and payload.
    pub body: &'a [u8],
    /// Where `body` starts, in bytes from the start of the packet.
    pub body_offset: usize,
}

/// Headers that contradict themselves or the length of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

impl<'a> Packet<'a> {
    /// The packet in a frame; `None` when the frame carries no IP.
    ///
    /// # Errors
    /// [`Malformed`] on a wrong version, a header length below the minimum, lengths beyond the frame, a cut-off or endless chain
    /// of extension headers.
    #[inline]
    pub fn parse(frame: &Frame<'a>) -> Result<Option<Self>, Malformed> {
        match frame.ethertype() {
            ethernet::TYPE_IPV4 => Self::parse_v4(frame.payload()).map(Some),
            ethernet::TYPE_IPV6 => Self::parse_v6(frame.payload()).map(Some),
            _ => Ok(None),
        }
    }

    fn parse_v4(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let header = Ipv4HeaderSlice::from_slice(bytes).map_err(|_| Malformed)?;
        let body_offset = header.slice().len();
        let body = bytes
            .get(body_offset..usize::from(header.total_len()))
            .ok_or(Malformed)?;
        let fragment = match (header.fragments_offset().value(), header.more_fragments()) {
            (0, false) => Fragment::Whole,
            (0, true) => Fragment::First,
            _ => Fragment::Later,
        };
        Ok(Self {
            source: IpAddr::V4(header.source_addr()),
            destination: IpAddr::V4(header.destination_addr()),
            hop_limit: header.ttl(),
            protocol: header.protocol().0,
            fragment,
            body,
            body_offset,
        })
    }

    fn parse_v6(bytes: &'a [u8]) -> Result<Self, Malformed> {
        const HEADER_LEN: usize = 40;
        let header = Ipv6HeaderSlice::from_slice(bytes).map_err(|_| Malformed)?;
        let end = HEADER_LEN + usize::from(header.payload_length());
        let packet = bytes.get(..end).ok_or(Malformed)?;
        let mut packet = Self {
            source: IpAddr::V6(header.source_addr()),
            destination: IpAddr::V6(header.destination_addr()),
            hop_limit: header.hop_limit(),
            protocol: header.next_header().0,
            fragment: Fragment::Whole,
            body: &packet[HEADER_LEN..],
            body_offset: HEADER_LEN,
        };
        for _ in 0..MAX_EXTENSIONS {
            if !packet.skip_extension()? {
                return Ok(packet);
            }
        }
        Err(Malformed)
    }

    /// Steps over one extension header (RFC 8200 §4); false when there is none to step over.
    fn skip_extension(&mut self) -> Result<bool, Malformed> {
        if self.fragment == Fragment::Later {
            return Ok(false);
        }
        let (units, unit_len) = match self.protocol {
            protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION => (1, 8),
            // RFC 4302 §2.2: in words of 4 bytes, minus 2.
            protocol::AUTHENTICATION => (2, 4),
            protocol::FRAGMENT => (1, 8),
            _ => return Ok(false),
        };
        let [next, len, offset_high, offset_low, ..] = *self.body else {
            return Err(Malformed);
        };
        let mut header_len = (usize::from(len) + units) * unit_len;
        if self.protocol == protocol::FRAGMENT {
            // The second byte of a fragment header is reserved, its length fixed (RFC 8200 §4.5).
            header_len = 8;
            let offset_and_more = u16::from_be_bytes([offset_high, offset_low]);
            self.fragment = match (offset_and_more >> 3, offset_and_more & 1) {
                // An atomic fragment is a whole packet (RFC 6946).
                (0, 0) => self.fragment,
                (0, _) => Fragment::First,
                _ => Fragment::Later,
            };
        }
        self.body = self.body.get(header_len..).ok_or(Malformed)?;
        self.body_offset += header_len;
        self.protocol = next;
        Ok(true)
    }

    /// Whether the body starts with an ICMPv6 header of this packet's own.
    #[must_use]
    pub fn is_icmpv6(&self) -> bool {
        self.source.is_ipv6()
            && self.protocol == protocol::ICMPV6
            && self.fragment != Fragment::Later
    }
}

/// The link-local address that `mac` gives its interface (RFC 4291 appendix A, modified EUI-64).
#[must_use]
pub fn link_local(mac: crate::MacAddr) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.octets();
    Ipv6Addr::from([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ])
}

/// The group that neighbour solicitations for `ip` go to (RFC 4291 §2.7.1).
#[must_use]
pub fn solicited_node(ip: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = ip.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

/// The sum of a pseudo-header, to start an upper layer's checksum with (RFC 9293 §3.1, RFC 8200 §8.1).
pub(crate) fn pseudo_header_sum(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    len: usize,
) -> u64 {
    let words = |bytes: &[u8]| {
        bytes
            .chunks_exact(2)
            .map(|word| u64::from(u16::from_be_bytes([word[0], word[1]])))
            .sum::<u64>()
    };
    let address = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => words(&Ipv4Addr::octets(&ip)),
        IpAddr::V6(ip) => words(&Ipv6Addr::octets(&ip)),
    };
    address(source) + address(destination) + u64::from(protocol) + len as u64
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    fn parse(bytes: &[u8]) -> Result<Packet<'_>, Malformed> {
        Ok(Packet::parse(&Frame::parse(bytes).unwrap())?.unwrap())
    }

    fn v4_udp() -> Vec<u8> {
        let mut bytes = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
            .udp(1, 2)
            .write(&mut bytes, b"hello")
            .unwrap();
        bytes
    }

    #[test]
    fn v4_body_ends_where_the_header_says() {
        let mut bytes = v4_udp();
        bytes.extend([0; 20]);
        let packet = parse(&bytes).unwrap();
        assert_eq!(packet.source, "10.0.9.2".parse::<IpAddr>().unwrap());
        assert_eq!(
            (packet.protocol, packet.body.len(), packet.fragment),
            (protocol::UDP, 13, Fragment::Whole)
        );
    }

    #[test]
    fn v4_lies_are_malformed() {
        // Conformance H6: bad IHL, lying lengths, wrong version.
        for (offset, value) in [(14, 0x44), (14, 0x4f), (14, 0x65), (17, 200), (17, 10)] {
            let mut bytes = v4_udp();
            bytes[offset] = value;
            assert_eq!(
                parse(&bytes).unwrap_err(),
                Malformed,
                "byte {offset} = {value:#x}"
            );
        }
        let bytes = v4_udp();
        for len in 14..bytes.len() {
            assert!(parse(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn v4_fragments() {
        let mut bytes = v4_udp();
        bytes[20] = 0x20;
        assert_eq!(parse(&bytes).unwrap().fragment, Fragment::First);
        bytes[21] = 1;
        assert_eq!(parse(&bytes).unwrap().fragment, Fragment::Later);
        bytes[20] = 0x40;
        bytes[21] = 0;
        assert_eq!(parse(&bytes).unwrap().fragment, Fragment::Whole);
    }

    fn v6(next: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = ethernet::emit([2; 6].into(), [4; 6].into(), ethernet::TYPE_IPV6).to_vec();
        bytes.extend([
            0x60,
            0,
            0,
            0,
            0,
            u8::try_from(body.len()).unwrap(),
            next,
            64,
        ]);
        bytes.extend([0xfd; 16]);
        bytes.extend([0xfe; 16]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn v6_extension_headers_are_stepped_over() {
        let hop_by_hop = [protocol::DESTINATION, 0, 5, 2, 0, 0, 0, 0];
        let destination = [protocol::UDP, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let body = [&hop_by_hop[..], &destination, &[0, 1, 0, 2, 0, 8, 0, 0]].concat();
        let bytes = v6(protocol::HOP_BY_HOP, &body);
        let packet = parse(&bytes).unwrap();
        assert_eq!(
            (packet.protocol, packet.body.len(), packet.body_offset),
            (protocol::UDP, 8, 64)
        );
        for len in 14..bytes.len() {
            assert!(parse(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn v6_chains_that_lie_are_malformed() {
        // Conformance H6: nested headers without end, and a header longer than the packet.
        assert!(
            parse(&v6(
                protocol::HOP_BY_HOP,
                &[protocol::HOP_BY_HOP, 0, 0, 0, 0, 0, 0, 0].repeat(12)
            ))
            .is_err()
        );
        assert!(
            parse(&v6(
                protocol::DESTINATION,
                &[protocol::UDP, 9, 0, 0, 0, 0, 0, 0]
            ))
            .is_err()
        );
        assert!(parse(&v6(protocol::FRAGMENT, &[protocol::UDP, 0])).is_err());
    }

    #[test]
    fn v6_fragments() {
        let fragment =
            |offset_and_more: u8| [protocol::UDP, 0, 0, offset_and_more, 0, 0, 0, 1, 0xaa, 0xbb];
        assert_eq!(
            parse(&v6(protocol::FRAGMENT, &fragment(0)))
                .unwrap()
                .fragment,
            Fragment::Whole
        );
        assert_eq!(
            parse(&v6(protocol::FRAGMENT, &fragment(1)))
                .unwrap()
                .fragment,
            Fragment::First
        );
        // The body of a later fragment looks like an extension header here; it is none.
        let bytes = v6(
            protocol::FRAGMENT,
            &[protocol::HOP_BY_HOP, 0, 0, 8, 0, 0, 0, 1, 0xff],
        );
        let packet = parse(&bytes).unwrap();
        assert_eq!(
            (packet.fragment, packet.body),
            (Fragment::Later, &[0xff][..])
        );
    }

    #[test]
    fn addresses_made_from_others() {
        assert_eq!(
            link_local("02:42:0a:00:09:02".parse().unwrap()),
            "fe80::42:aff:fe00:902".parse::<Ipv6Addr>().unwrap()
        );
        assert_eq!(
            solicited_node("fd00::12:3456".parse().unwrap()),
            "ff02::1:ff12:3456".parse::<Ipv6Addr>().unwrap()
        );
    }
}
