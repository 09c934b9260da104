//! IPv6 neighbour discovery (RFC 4861), as far as a VTEP must read it to answer it and to guard it.

use std::net::Ipv6Addr;

use crate::MacAddr;
use crate::icmp;
use crate::ip::{Fragment, Malformed, Packet, protocol, pseudo_header_sum};
use crate::offload::checksum::{fold, sum};

/// The address of all nodes on the link.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

const ECHO_REPLY: u8 = 129;
const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

const OPTION_SOURCE_MAC: u8 = 1;
const OPTION_TARGET_MAC: u8 = 2;

const FLAG_SOLICITED: u8 = 0x40;
const FLAG_OVERRIDE: u8 = 0x20;

/// A neighbour discovery message that has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Asks for routers.
    RouterSolicitation {
        /// The sender's MAC, if it says it.
        source_mac: Option<MacAddr>,
    },
    /// Poses as a router: an advertisement or a redirect.
    Router,
    /// Asks who has `target`.
    Solicitation {
        /// The address asked for.
        target: Ipv6Addr,
        /// The sender's MAC, if it says it.
        source_mac: Option<MacAddr>,
    },
    /// Says who has `target`.
    Advertisement {
        /// The address told of.
        target: Ipv6Addr,
        /// Whose it is, if it says it.
        target_mac: Option<MacAddr>,
    },
}

impl Message {
    /// The message in a packet; `None` when the packet carries none.
    ///
    /// # Errors
    /// [`Malformed`] for what every receiver must ignore: fragmented (RFC 6980 §5), a hop limit below 255, a code, a wrong
    /// checksum, cut off, an option of length zero (RFC 4861 §6.1, §7.1).
    pub fn parse(packet: &Packet<'_>) -> Result<Option<Self>, Malformed> {
        if !packet.is_icmpv6() {
            return Ok(None);
        }
        let [kind @ ROUTER_SOLICITATION..=REDIRECT, code, ..] = *packet.body else {
            return Ok(None);
        };
        let whole = packet.fragment == Fragment::Whole;
        let pseudo = pseudo_header_sum(
            packet.source,
            packet.destination,
            protocol::ICMPV6,
            packet.body.len(),
        );
        if !whole
            || packet.hop_limit != 255
            || code != 0
            || fold(pseudo + sum(packet.body)) != 0xffff
        {
            return Err(Malformed);
        }
        // Behind type, code and checksum: four bytes of flags or nothing, then the target where there is one.
        let options_at = |at: usize| packet.body.get(at..).ok_or(Malformed);
        let target = || -> Result<Ipv6Addr, Malformed> {
            let bytes = packet
                .body
                .get(8..)
                .and_then(|rest| rest.first_chunk::<16>())
                .ok_or(Malformed)?;
            Ok(Ipv6Addr::from(*bytes))
        };
        Ok(Some(match kind {
            ROUTER_SOLICITATION => Self::RouterSolicitation {
                source_mac: mac_option(options_at(8)?, OPTION_SOURCE_MAC)?,
            },
            NEIGHBOR_SOLICITATION => Self::Solicitation {
                target: target()?,
                source_mac: mac_option(options_at(24)?, OPTION_SOURCE_MAC)?,
            },
            NEIGHBOR_ADVERTISEMENT => Self::Advertisement {
                target: target()?,
                target_mac: mac_option(options_at(24)?, OPTION_TARGET_MAC)?,
            },
            // Router advertisements and redirects: no need to know what they say.
            _ => Self::Router,
        }))
    }
}

/// The MAC in the first option of a kind. A second one could say something else to a receiver that takes the last: malformed.
fn mac_option(mut options: &[u8], wanted: u8) -> Result<Option<MacAddr>, Malformed> {
    let mut found = None;
    while let [kind, units, ..] = *options {
        let len = usize::from(units) * 8;
        let option = options
            .get(..len)
            .filter(|option| !option.is_empty())
            .ok_or(Malformed)?;
        if kind == wanted {
            let [_, _, mac @ ..] = option else {
                return Err(Malformed);
            };
            let mac = MacAddr::new(mac.try_into().map_err(|_| Malformed)?);
            if found.replace(mac).is_some() {
                return Err(Malformed);
            }
        }
        options = &options[len..];
    }
    if options.is_empty() {
        Ok(found)
    } else {
        Err(Malformed)
    }
}

/// Appends a frame that tells the asker at `to` that `target` is at `mac`. An unspecified asker (duplicate address detection)
/// is told by telling all nodes, without the solicited flag (RFC 4861 §7.2.4).
pub fn emit_advertisement(
    target: Ipv6Addr,
    mac: MacAddr,
    to: Ipv6Addr,
    to_mac: MacAddr,
    out: &mut Vec<u8>,
) {
    let (to, to_mac, flags) = if to.is_unspecified() {
        (
            ALL_NODES,
            MacAddr::new([0x33, 0x33, 0, 0, 0, 1]),
            FLAG_OVERRIDE,
        )
    } else {
        (to, to_mac, FLAG_SOLICITED | FLAG_OVERRIDE)
    };
    let mut body = [0; 32];
    body[4] = flags;
    body[8..24].copy_from_slice(&target.octets());
    body[24..26].copy_from_slice(&[OPTION_TARGET_MAC, 1]);
    body[26..].copy_from_slice(&mac.octets());
    let written = icmp::emit_v6(
        (target, mac),
        (to, to_mac),
        255,
        NEIGHBOR_ADVERTISEMENT,
        &[&body],
        out,
    );
    debug_assert!(written, "32 bytes fit a packet");
}

/// Appends the frame that answers an echo request (RFC 4443 §4.2): its body with another type.
pub(crate) fn emit_echo_reply(
    from: (Ipv6Addr, MacAddr),
    to: (Ipv6Addr, MacAddr),
    hop_limit: u8,
    request: &Packet<'_>,
    out: &mut Vec<u8>,
) -> bool {
    let pseudo = pseudo_header_sum(
        request.source,
        request.destination,
        protocol::ICMPV6,
        request.body.len(),
    );
    if fold(pseudo + sum(request.body)) != 0xffff {
        return false;
    }
    icmp::emit_v6(from, to, hop_limit, ECHO_REPLY, &[request.body], out)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ethernet::Frame;
    use crate::ip::solicited_node;

    /// A frame with a solicitation for `target`, with the sender's MAC told as `option` if there is one.
    pub(crate) fn solicitation(
        source: Ipv6Addr,
        mac: MacAddr,
        target: Ipv6Addr,
        option: Option<MacAddr>,
    ) -> Vec<u8> {
        let mut body = vec![NEIGHBOR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        body.extend(target.octets());
        if let Some(option) = option {
            body.extend([OPTION_SOURCE_MAC, 1]);
            body.extend(option.octets());
        }
        let group = solicited_node(target);
        let [.., a, b, c] = target.octets();
        icmpv6(
            (source, mac),
            (group, MacAddr::new([0x33, 0x33, 0xff, a, b, c])),
            &body,
        )
    }

    /// A frame with an unsolicited advertisement.
    pub(crate) fn announcement(
        target: Ipv6Addr,
        source: Ipv6Addr,
        mac: MacAddr,
        told: MacAddr,
    ) -> Vec<u8> {
        let mut body = vec![NEIGHBOR_ADVERTISEMENT, 0, 0, 0, FLAG_OVERRIDE, 0, 0, 0];
        body.extend(target.octets());
        body.extend([OPTION_TARGET_MAC, 1]);
        body.extend(told.octets());
        icmpv6(
            (source, mac),
            (ALL_NODES, MacAddr::new([0x33, 0x33, 0, 0, 0, 1])),
            &body,
        )
    }

    pub(crate) fn icmpv6(
        from: (Ipv6Addr, MacAddr),
        to: (Ipv6Addr, MacAddr),
        body: &[u8],
    ) -> Vec<u8> {
        let mut out = Vec::new();
        icmp::emit_v6(from, to, 255, body[0], &[body], &mut out);
        out
    }

    fn parse(bytes: &[u8]) -> Result<Option<Message>, Malformed> {
        Message::parse(
            &Packet::parse(&Frame::parse(bytes).unwrap())
                .unwrap()
                .unwrap(),
        )
    }

    fn ip(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }

    const A: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 1]);
    const B: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 2]);

    #[test]
    fn reads_what_is_written() {
        let bytes = solicitation(ip("fd00::2"), A, ip("fd00::3"), Some(A));
        assert_eq!(
            parse(&bytes),
            Ok(Some(Message::Solicitation {
                target: ip("fd00::3"),
                source_mac: Some(A)
            }))
        );
        let bytes = solicitation(Ipv6Addr::UNSPECIFIED, A, ip("fd00::3"), None);
        assert_eq!(
            parse(&bytes),
            Ok(Some(Message::Solicitation {
                target: ip("fd00::3"),
                source_mac: None
            }))
        );
        let mut bytes = Vec::new();
        emit_advertisement(ip("fd00::3"), B, ip("fd00::2"), A, &mut bytes);
        assert_eq!(
            parse(&bytes),
            Ok(Some(Message::Advertisement {
                target: ip("fd00::3"),
                target_mac: Some(B)
            }))
        );
        assert_eq!(
            (&bytes[..6], bytes[14 + 7], bytes[14 + 40 + 4]),
            (&A.octets()[..], 255, 0x60)
        );
    }

    #[test]
    fn an_independent_reader_agrees() {
        let mut bytes = Vec::new();
        emit_advertisement(ip("fd00::3"), B, ip("fd00::2"), A, &mut bytes);
        let sliced = etherparse::SlicedPacket::from_ethernet(&bytes).unwrap();
        let Some(etherparse::TransportSlice::Icmpv6(icmp)) = sliced.transport else {
            panic!("no ICMPv6")
        };
        assert!(icmp.is_checksum_valid(ip("fd00::3").octets(), ip("fd00::2").octets()));
    }

    #[test]
    fn a_probe_is_answered_to_all_nodes_without_the_solicited_flag() {
        // Conformance V21.
        let mut bytes = Vec::new();
        emit_advertisement(ip("fd00::3"), B, Ipv6Addr::UNSPECIFIED, A, &mut bytes);
        assert_eq!(&bytes[..6], [0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!(bytes[14 + 24..14 + 40], ALL_NODES.octets());
        assert_eq!(bytes[14 + 40 + 4], 0x20);
    }

    #[test]
    fn what_receivers_must_ignore_is_malformed() {
        let good = solicitation(ip("fd00::2"), A, ip("fd00::3"), Some(A));
        // Hop limit, code, checksum.
        for (offset, value) in [(21, 254), (55, 1), (56, 0x12)] {
            let mut bytes = good.clone();
            bytes[offset] = value;
            assert_eq!(parse(&bytes), Err(Malformed), "byte {offset} = {value}");
        }
        let body = |options: &[u8]| {
            let body = [
                &[NEIGHBOR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0][..],
                &[0xfd; 16],
                options,
            ]
            .concat();
            parse(&icmpv6((ip("fd00::2"), A), (ip("fd00::3"), B), &body))
        };
        assert_eq!(
            body(&[1, 0, 0, 0, 0, 0, 0, 0]),
            Err(Malformed),
            "option of length zero"
        );
        assert_eq!(
            body(&[1, 2, 0, 0, 0, 0, 0, 0]),
            Err(Malformed),
            "option past the end"
        );
        assert_eq!(
            body(&[1, 1, 2, 0, 0, 0, 0, 1, 1, 1, 2, 0, 0, 0, 0, 2]),
            Err(Malformed),
            "two MACs"
        );
        assert_eq!(body(&[1]), Err(Malformed), "half an option");
        assert!(
            matches!(body(&[14, 1, 0, 0, 0, 0, 0, 0]), Ok(Some(_))),
            "a nonce is skipped"
        );
        assert_eq!(
            parse(&icmpv6(
                (ip("fd00::2"), A),
                (ip("fd00::3"), B),
                &[NEIGHBOR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0]
            )),
            Err(Malformed)
        );
    }
}
