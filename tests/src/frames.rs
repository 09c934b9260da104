//! Headers of frames and datagrams, made and read by etherparse and by hand: an oracle that is not Towline's own code.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use etherparse::{
    Ethernet2Header, IpHeaders, IpNumber, Ipv4Header, Ipv6Header, NetSlice, SlicedPacket,
    TransportSlice, UdpHeader, ether_type,
};

use vtep::edge::Offload;

use crate::wire::Endpoint;

/// Bytes of the VXLAN header.
pub const VXLAN_LEN: usize = 8;

/// A VXLAN header (RFC 7348 §5) with `frame` behind it.
#[must_use]
pub fn vxlan(vni: u32, frame: &[u8]) -> Vec<u8> {
    let mut payload = vec![0x08, 0, 0, 0];
    payload.extend((vni << 8).to_be_bytes());
    payload.extend(frame);
    payload
}

/// What stands in a datagram's outer UDP checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// The right sum.
    Right,
    /// None (RFC 768).
    Zero,
    /// A sum that is neither.
    Wrong,
}

/// A datagram that a host puts on the link.
#[derive(Clone, Debug)]
pub struct Datagram {
    /// Its sender, as it says.
    pub from: SocketAddr,
    /// Where it goes.
    pub to: SocketAddr,
    /// TOS or traffic class: DSCP and ECN.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Its UDP checksum.
    pub checksum: Checksum,
    /// What it carries.
    pub payload: Vec<u8>,
}

impl Datagram {
    /// The IP packet.
    ///
    /// # Panics
    /// When its addresses are of two families, or it is larger than UDP can be.
    #[must_use]
    pub fn packet(&self) -> Vec<u8> {
        let mut udp = udp_header(self.from, self.to, &self.payload);
        match self.checksum {
            Checksum::Right => {}
            Checksum::Zero => udp.checksum = 0,
            // Never zero, and another sum even in ones' complement.
            Checksum::Wrong => udp.checksum = udp.checksum.wrapping_add(1).max(1),
        }
        let ips = (self.from.ip(), self.to.ip());
        let length = UdpHeader::LEN + self.payload.len();
        let mut packet = ip_header(ips, self.tos, self.ttl, length);
        packet.extend(udp.to_bytes());
        packet.extend(&self.payload);
        packet
    }
}

fn udp_header(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> UdpHeader {
    match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => UdpHeader::with_ipv4_checksum(
            from.port(),
            to.port(),
            &ipv4(source, destination, 0, 64, UdpHeader::LEN + payload.len()),
            payload,
        ),
        (IpAddr::V6(source), IpAddr::V6(destination)) => UdpHeader::with_ipv6_checksum(
            from.port(),
            to.port(),
            &ipv6(source, destination, 0, 64, UdpHeader::LEN + payload.len()),
            payload,
        ),
        _ => panic!("{from} and {to} are of two families"),
    }
    .expect("a datagram that fits UDP")
}

fn ip_header(ips: (IpAddr, IpAddr), tos: u8, ttl: u8, length: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    match ips {
        (IpAddr::V4(source), IpAddr::V4(destination)) => IpHeaders::Ipv4(
            ipv4(source, destination, tos, ttl, length),
            Default::default(),
        ),
        (IpAddr::V6(source), IpAddr::V6(destination)) => IpHeaders::Ipv6(
            ipv6(source, destination, tos, ttl, length),
            Default::default(),
        ),
        (source, destination) => panic!("{source} and {destination} are of two families"),
    }
    .write(&mut packet)
    .expect("a Vec takes all");
    packet
}

fn ipv4(source: Ipv4Addr, destination: Ipv4Addr, tos: u8, ttl: u8, length: usize) -> Ipv4Header {
    let length = u16::try_from(length).expect("a packet that fits IP");
    let mut header = Ipv4Header::new(
        length,
        ttl,
        IpNumber::UDP,
        source.octets(),
        destination.octets(),
    )
    .expect("a packet that fits IPv4");
    header.dscp = (tos >> 2).try_into().expect("six bits");
    header.ecn = (tos & 3).try_into().expect("two bits");
    header.header_checksum = header.calc_header_checksum();
    header
}

fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, class: u8, ttl: u8, length: usize) -> Ipv6Header {
    Ipv6Header {
        traffic_class: class,
        payload_length: u16::try_from(length).expect("a packet that fits IP"),
        next_header: IpNumber::UDP,
        hop_limit: ttl,
        source: source.octets(),
        destination: destination.octets(),
        ..Ipv6Header::default()
    }
}

/// The EtherType of an address's family.
#[must_use]
pub fn ether_of(address: SocketAddr) -> u16 {
    if address.is_ipv4() {
        ether_type::IPV4.0
    } else {
        ether_type::IPV6.0
    }
}

/// A UDP frame between two endpoints.
#[derive(Clone, Debug)]
pub struct Udp {
    /// Source MAC.
    pub source: [u8; 6],
    /// Destination MAC.
    pub destination: [u8; 6],
    /// Source address and port.
    pub from: SocketAddr,
    /// Destination address and port.
    pub to: SocketAddr,
    /// TOS or traffic class.
    pub tos: u8,
    /// What it carries.
    pub payload: Vec<u8>,
}

impl Udp {
    /// From one endpoint to another over IPv4.
    #[must_use]
    pub fn between(from: &Endpoint, to: &Endpoint) -> Self {
        Self {
            source: from.mac().octets(),
            destination: to.mac().octets(),
            from: SocketAddr::new(from.ip(), 40_000),
            to: SocketAddr::new(to.ip(), 7777),
            tos: 0,
            payload: b"a frame of a test".to_vec(),
        }
    }

    /// From one endpoint to another over IPv6.
    #[must_use]
    pub fn between6(from: &Endpoint, to: &Endpoint) -> Self {
        Self {
            from: SocketAddr::new(from.ip6(), 40_000),
            to: SocketAddr::new(to.ip6(), 7777),
            ..Self::between(from, to)
        }
    }

    /// To everybody in the network.
    #[must_use]
    pub fn broadcast(from: &Endpoint) -> Self {
        Self {
            destination: [0xff; 6],
            to: SocketAddr::new(Ipv4Addr::BROADCAST.into(), 7777),
            ..Self::between(from, from)
        }
    }

    /// The frame.
    ///
    /// # Panics
    /// When its addresses are of two families.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        let packet = Datagram {
            from: self.from,
            to: self.to,
            tos: self.tos,
            ttl: 64,
            checksum: Checksum::Right,
            payload: self.payload.clone(),
        }
        .packet();
        ethernet(self.destination, self.source, ether_of(self.from), &packet)
    }
}

/// A TCP frame between two endpoints over IPv4 whose checksum is left to whoever cuts it: in its place stands the
/// pseudo-header's sum.
///
/// # Panics
/// When the payload does not fit IPv4.
#[must_use]
pub fn unfinished_tcp(from: &Endpoint, to: &Endpoint, payload: &[u8]) -> Vec<u8> {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (from.ip(), to.ip()) else {
        panic!("{} and {} are IPv4 addresses", from.ip(), to.ip());
    };
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2(from.mac().octets(), to.mac().octets())
        .ipv4(source.octets(), destination.octets(), 64)
        .tcp(40_000, 7777, 1, 1024)
        .ack(1)
        .psh()
        .write(&mut frame, payload)
        .expect("a payload that fits IPv4");
    let length = u32::try_from(20 + payload.len()).expect("a payload that fits IPv4");
    let mut pseudo = [source.octets(), destination.octets()].concat();
    pseudo.extend(u32::from(IpNumber::TCP.0).to_be_bytes());
    pseudo.extend(length.to_be_bytes());
    let sum = ones_complement_sum(&pseudo);
    frame[50..52].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// The wish to cut such a frame into segments of `size` bytes of payload.
#[must_use]
pub fn cut_to(size: u16) -> Offload {
    Offload {
        flags: Offload::NEEDS_CSUM,
        gso_type: Offload::GSO_TCPV4,
        hdr_len: 54,
        gso_size: size,
        csum_start: 34,
        csum_offset: 16,
    }
}

/// The sum of RFC 1071, not inverted.
///
/// # Panics
/// Never: it is folded.
#[must_use]
pub fn ones_complement_sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("it was folded")
}

/// Rights the checksum of the IPv4 header of 20 bytes that `packet` begins with.
pub fn complete_ipv4(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let sum = !ones_complement_sum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// An Ethernet frame.
#[must_use]
pub fn ethernet(destination: [u8; 6], source: [u8; 6], ether_type: u16, payload: &[u8]) -> Vec<u8> {
    let header = Ethernet2Header {
        source,
        destination,
        ether_type: ether_type.into(),
    };
    let mut frame = header.to_bytes().to_vec();
    frame.extend(payload);
    frame
}

/// `frame` with a tag of this type and content behind its addresses.
#[must_use]
pub fn tagged(mut frame: Vec<u8>, tpid: u16, tci: u16) -> Vec<u8> {
    let mut tag = tpid.to_be_bytes().to_vec();
    tag.extend(tci.to_be_bytes());
    frame.splice(12..12, tag);
    frame
}

/// An ARP packet (RFC 826): `operation` is 1 for a request, 2 for a reply; each side is its MAC and address.
#[must_use]
pub fn arp(
    destination: [u8; 6],
    operation: u16,
    sender: ([u8; 6], Ipv4Addr),
    target: ([u8; 6], Ipv4Addr),
) -> Vec<u8> {
    let mut packet = vec![0, 1, 0x08, 0x00, 6, 4];
    packet.extend(operation.to_be_bytes());
    for (mac, ip) in [sender, target] {
        packet.extend(mac);
        packet.extend(ip.octets());
    }
    ethernet(destination, sender.0, ether_type::ARP.0, &packet)
}

/// An ICMPv6 packet with hop limit 255: neighbour discovery (RFC 4861). `body` begins behind the checksum.
///
/// # Panics
/// Never: it always fits.
#[must_use]
pub fn icmpv6(
    macs: ([u8; 6], [u8; 6]),
    ips: (Ipv6Addr, Ipv6Addr),
    kind: u8,
    body: &[u8],
) -> Vec<u8> {
    let (first, rest) = body.split_first_chunk().expect("four bytes of its own");
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2(macs.0, macs.1)
        .ipv6(ips.0.octets(), ips.1.octets(), 255)
        .icmpv6_raw(kind, 0, *first)
        .write(&mut frame, rest)
        .expect("a Vec takes all");
    frame
}

/// A neighbour solicitation for `target`, to its solicited-node address (RFC 4861 §4.3), with the sender's MAC unless its
/// address is `::`.
#[must_use]
pub fn solicitation(sender: ([u8; 6], Ipv6Addr), target: Ipv6Addr) -> Vec<u8> {
    let [.., a, b, c] = target.octets();
    let group = Ipv6Addr::new(
        0xff02,
        0,
        0,
        0,
        0,
        1,
        0xff00 | u16::from(a),
        u16::from_be_bytes([b, c]),
    );
    let mut body = vec![0; 4];
    body.extend(target.octets());
    if !sender.1.is_unspecified() {
        body.extend([1, 1]);
        body.extend(sender.0);
    }
    let destination = [0x33, 0x33, 0xff, a, b, c];
    icmpv6((sender.0, destination), (sender.1, group), 135, &body)
}

/// A VXLAN datagram that was seen on the link.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The whole frame, with its outer Ethernet header.
    pub frame: Vec<u8>,
    /// Sender.
    pub from: SocketAddr,
    /// Receiver.
    pub to: SocketAddr,
    /// TOS or traffic class.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// DF over IPv4; always true over IPv6, where no router cuts.
    pub dont_fragment: bool,
    /// The UDP checksum as it stands there.
    pub checksum: u16,
    /// Whether that is the right sum.
    pub checksum_is_right: bool,
    /// What UDP carries: VXLAN header and frame.
    pub payload: Vec<u8>,
}

impl Seen {
    /// Reads a frame from the link; `None` when it is no UDP for or from a port that tests use for VXLAN.
    #[must_use]
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let sliced = SlicedPacket::from_ethernet(frame).ok()?;
        let Some(TransportSlice::Udp(udp)) = &sliced.transport else {
            return None;
        };
        let (ips, tos, ttl, dont_fragment) = match sliced.net.as_ref()? {
            NetSlice::Ipv4(ip) => {
                let header = ip.header();
                let ips = (
                    IpAddr::V4(header.source_addr()),
                    IpAddr::V4(header.destination_addr()),
                );
                let tos = header.dcp().value() << 2 | header.ecn().value();
                (ips, tos, header.ttl(), header.dont_fragment())
            }
            NetSlice::Ipv6(ip) => {
                let header = ip.header();
                let ips = (
                    IpAddr::V6(header.source_addr()),
                    IpAddr::V6(header.destination_addr()),
                );
                (ips, header.traffic_class(), header.hop_limit(), true)
            }
            NetSlice::Arp(_) => return None,
        };
        let from = SocketAddr::new(ips.0, udp.source_port());
        let to = SocketAddr::new(ips.1, udp.destination_port());
        // mDNS and the like would be the kernel's of host b, which nobody asked.
        if udp.payload().len() < VXLAN_LEN {
            return None;
        }
        Some(Self {
            from,
            to,
            tos,
            ttl,
            dont_fragment,
            checksum: udp.checksum(),
            checksum_is_right: udp_header(from, to, udp.payload()).checksum == udp.checksum(),
            payload: udp.payload().to_vec(),
            frame: frame.to_vec(),
        })
    }

    /// The VXLAN header.
    #[must_use]
    pub fn vxlan(&self) -> &[u8] {
        &self.payload[..VXLAN_LEN]
    }

    /// The inner frame.
    #[must_use]
    pub fn inner(&self) -> &[u8] {
        &self.payload[VXLAN_LEN..]
    }
}
