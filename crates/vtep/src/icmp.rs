//! ICMP messages of both families, as frames that the engine answers with (RFC 792, RFC 4443).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{IpNumber, Ipv4Header, Ipv6Header};

use crate::MacAddr;
use crate::ethernet;
use crate::ip::{protocol, pseudo_header_sum};
use crate::offload::checksum::{fold, sum};

/// Appends a frame with an ICMP message: the parts of `body` in order, its type replaced by `kind` and its checksum filled in.
/// Appends nothing, and says so, when that is more than one packet holds.
pub(crate) fn emit_v4(
    (source, source_mac): (Ipv4Addr, MacAddr),
    (destination, destination_mac): (Ipv4Addr, MacAddr),
    hop_limit: u8,
    kind: u8,
    body: &[&[u8]],
    out: &mut Vec<u8>,
) -> bool {
    let Some(mut header) = u16::try_from(total(body)).ok().and_then(|len| {
        let (source, destination) = (source.octets(), destination.octets());
        Ipv4Header::new(len, hop_limit, IpNumber::ICMP, source, destination).ok()
    }) else {
        return false;
    };
    header.header_checksum = header.calc_header_checksum();
    out.extend_from_slice(&ethernet::emit(
        destination_mac,
        source_mac,
        ethernet::TYPE_IPV4,
    ));
    out.extend_from_slice(&header.to_bytes());
    append(body, kind, 0, out);
    true
}

/// As [`emit_v4`], with an ICMPv6 message.
pub(crate) fn emit_v6(
    (source, source_mac): (Ipv6Addr, MacAddr),
    (destination, destination_mac): (Ipv6Addr, MacAddr),
    hop_limit: u8,
    kind: u8,
    body: &[&[u8]],
    out: &mut Vec<u8>,
) -> bool {
    let Ok(payload_length) = u16::try_from(total(body)) else {
        return false;
    };
    let header = Ipv6Header {
        payload_length,
        next_header: IpNumber(protocol::ICMPV6),
        hop_limit,
        source: source.octets(),
        destination: destination.octets(),
        ..Default::default()
    };
    out.extend_from_slice(&ethernet::emit(
        destination_mac,
        source_mac,
        ethernet::TYPE_IPV6,
    ));
    out.extend_from_slice(&header.to_bytes());
    let pseudo = pseudo_header_sum(
        IpAddr::V6(source),
        IpAddr::V6(destination),
        protocol::ICMPV6,
        total(body),
    );
    append(body, kind, pseudo, out);
    true
}

/// Appends the message itself. Its body has at least a type, a code and a checksum.
fn append(body: &[&[u8]], kind: u8, pseudo: u64, out: &mut Vec<u8>) {
    let at = out.len();
    body.iter().for_each(|part| out.extend_from_slice(part));
    let body = &mut out[at..];
    body[0] = kind;
    body[2..4].fill(0);
    let checksum = !fold(pseudo + sum(body));
    body[2..4].copy_from_slice(&checksum.to_be_bytes());
}

fn total(body: &[&[u8]]) -> usize {
    body.iter().map(|part| part.len()).sum()
}
