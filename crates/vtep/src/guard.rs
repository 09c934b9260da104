//! Who may send what, from a container: its own MAC, its own addresses, and no word about others'.
//!
//! The rule of thumb is RFC 2827 at a port: what leaves a container must be answerable to it. Its own are the port's MAC,
//! the port's addresses, and the link-local address that follows from the MAC. Without being anyone's, 0.0.0.0 passes as
//! the sender of an ARP probe, and `::` as the source of duplicate address detection and of multicast listener reports.
//! A port of the host itself hands on packets of others (`any_source`), but speaks for no one else in ARP or discovery.
//! DHCP does not pass: addresses come from the tables. Router advertisements and redirects do not pass either (RFC 6105).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::arp::Arp;
use crate::ethernet::Frame;
use crate::fdb::Port;
use crate::ip::{Fragment, Malformed, Packet, link_local, protocol};
use crate::nd::Message;
use crate::stats::DropReason;

/// What a frame carries, read once for all that ask.
#[derive(Clone, Copy, Debug)]
pub enum Contents<'a> {
    /// ARP for IPv4.
    Arp(Arp),
    /// IPv6 neighbour discovery.
    Nd(Packet<'a>, Message),
    /// Any other IP packet.
    Ip(Packet<'a>),
    /// Anything else.
    Other,
}

impl<'a> Contents<'a> {
    /// Reads what a frame carries.
    ///
    /// # Errors
    /// [`Malformed`] when its headers contradict themselves.
    pub fn parse(frame: &Frame<'a>) -> Result<Self, Malformed> {
        if let Some(packet) = Packet::parse(frame)? {
            return Ok(match Message::parse(&packet)? {
                Some(message) => Self::Nd(packet, message),
                None => Self::Ip(packet),
            });
        }
        Ok(Arp::parse(frame)?.map_or(Self::Other, Self::Arp))
    }
}

/// Checks a frame from a container against its port.
///
/// # Errors
/// The reason to drop it: [`DropReason::InvalidSource`], [`DropReason::GuardMac`], [`DropReason::GuardIp`] or
/// [`DropReason::GuardNeighbor`].
#[inline]
pub fn check(port: &Port, frame: &Frame<'_>, contents: &Contents<'_>) -> Result<(), DropReason> {
    let source = frame.source();
    if source.is_multicast() || source.is_zero() {
        return Err(DropReason::InvalidSource);
    }
    if source != port.mac {
        return Err(DropReason::GuardMac);
    }
    let (allowed, reason) = match contents {
        Contents::Arp(arp) => (may_send_arp(port, arp), DropReason::GuardNeighbor),
        Contents::Nd(packet, message) => {
            if !may_send_from(port, packet, Some(message)) {
                return Err(DropReason::GuardIp);
            }
            (may_send_nd(port, message), DropReason::GuardNeighbor)
        }
        Contents::Ip(packet) => (may_send_from(port, packet, None), DropReason::GuardIp),
        Contents::Other => (true, DropReason::GuardIp),
    };
    if allowed { Ok(()) } else { Err(reason) }
}

/// Whether an address is the port's own.
#[inline]
#[must_use]
pub fn is_own(port: &Port, ip: IpAddr) -> bool {
    port.ips.contains(&ip) || matches!(ip, IpAddr::V6(ip) if ip == link_local(port.mac))
}

fn may_send_arp(port: &Port, arp: &Arp) -> bool {
    let probe = arp.is_request && arp.sender_ip == Ipv4Addr::UNSPECIFIED;
    arp.sender_mac == port.mac && (probe || is_own(port, IpAddr::V4(arp.sender_ip)))
}

fn may_send_nd(port: &Port, message: &Message) -> bool {
    match *message {
        Message::RouterSolicitation { source_mac } | Message::Solicitation { source_mac, .. } => {
            source_mac.is_none_or(|mac| mac == port.mac)
        }
        Message::Advertisement { target, target_mac } => {
            is_own(port, IpAddr::V6(target)) && target_mac.is_none_or(|mac| mac == port.mac)
        }
        Message::Router => false,
    }
}

fn may_send_from(port: &Port, packet: &Packet<'_>, message: Option<&Message>) -> bool {
    if packet.source == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        return match message {
            // RFC 4861 §4.3: a solicitation from `::` must not tell a MAC.
            Some(Message::Solicitation {
                source_mac: None, ..
            }) => true,
            Some(_) => false,
            None => is_listener_report(packet),
        };
    }
    // Discovery is spoken with one's own addresses by any port.
    is_own(port, packet.source) || (port.any_source && message.is_none())
}

/// MLD reports and MLDv1 done, which an interface sends before it has an address (RFC 3590 §4). They are link-local and say
/// so by a hop limit of 1 (RFC 3810 §5).
fn is_listener_report(packet: &Packet<'_>) -> bool {
    packet.protocol == protocol::ICMPV6
        && packet.fragment == Fragment::Whole
        && packet.hop_limit == 1
        && matches!(packet.body.first(), Some(131 | 132 | 143))
        && packet.destination.is_multicast()
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;
    use crate::fdb::PortId;
    use crate::nd::tests::{announcement, icmpv6, solicitation};
    use crate::{MacAddr, Vni};

    const OWN: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 1]);
    const OTHER: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 2]);

    fn port() -> Port {
        let ips = vec!["10.0.9.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        Port {
            id: PortId(1),
            vni: Vni::new(1).unwrap(),
            mac: OWN,
            ips,
            mtu: 1450,
            any_source: false,
        }
    }

    fn verdict(bytes: &[u8]) -> Result<(), DropReason> {
        verdict_at(&port(), bytes)
    }

    fn verdict_at(port: &Port, bytes: &[u8]) -> Result<(), DropReason> {
        let frame = Frame::parse(bytes).unwrap();
        let contents = Contents::parse(&frame).map_err(|Malformed| DropReason::Malformed)?;
        check(port, &frame, &contents)
    }

    fn ip6(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }

    fn udp(mac: MacAddr, source: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        let builder = PacketBuilder::ethernet2(mac.octets(), OTHER.octets());
        match source.parse().unwrap() {
            IpAddr::V4(ip) => builder.ipv4(ip.octets(), [10, 0, 9, 3], 64),
            IpAddr::V6(ip) => builder.ipv6(ip.octets(), [0xfd; 16], 64),
        }
        .udp(68, 67)
        .write(&mut bytes, b"x")
        .unwrap();
        bytes
    }

    fn arp(is_request: bool, sender_mac: MacAddr, sender_ip: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        let sender_ip = sender_ip.parse().unwrap();
        Arp {
            is_request,
            sender_mac,
            sender_ip,
            target_mac: MacAddr::ZERO,
            target_ip: [10, 0, 9, 3].into(),
        }
        .emit(MacAddr::BROADCAST, &mut bytes);
        bytes[6..12].copy_from_slice(&OWN.octets());
        bytes
    }

    #[test]
    fn own_addresses_pass() {
        // Conformance H8: what is the port's own.
        for own in ["10.0.9.2", "fd00::2", "fe80::ff:fe00:1"] {
            assert_eq!(verdict(&udp(OWN, own)), Ok(()), "{own}");
        }
        assert_eq!(verdict(&arp(true, OWN, "10.0.9.2")), Ok(()));
        assert_eq!(verdict(&arp(false, OWN, "10.0.9.2")), Ok(()));
        assert_eq!(
            verdict(&solicitation(
                ip6("fd00::2"),
                OWN,
                ip6("fd00::3"),
                Some(OWN)
            )),
            Ok(())
        );
        assert_eq!(
            verdict(&announcement(ip6("fd00::2"), ip6("fd00::2"), OWN, OWN)),
            Ok(())
        );
    }

    #[test]
    fn nobodys_address_passes_where_it_must() {
        // Conformance H8: 0.0.0.0 in ARP probes, `::` in DAD and MLD.
        assert_eq!(verdict(&arp(true, OWN, "0.0.0.0")), Ok(()));
        assert_eq!(
            verdict(&arp(false, OWN, "0.0.0.0")),
            Err(DropReason::GuardNeighbor)
        );
        assert_eq!(
            verdict(&udp(OWN, "0.0.0.0")),
            Err(DropReason::GuardIp),
            "DHCP is not used"
        );
        let unspecified = Ipv6Addr::UNSPECIFIED;
        assert_eq!(
            verdict(&solicitation(unspecified, OWN, ip6("fd00::2"), None)),
            Ok(())
        );
        assert_eq!(
            verdict(&solicitation(unspecified, OWN, ip6("fd00::2"), Some(OWN))),
            Err(DropReason::GuardIp)
        );
        assert_eq!(verdict(&udp(OWN, "::")), Err(DropReason::GuardIp));
        let mut report = icmpv6(
            (unspecified, OWN),
            (ip6("ff02::16"), MacAddr::new([0x33, 0x33, 0, 0, 0, 0x16])),
            &[143, 0, 0, 0, 0, 0, 0, 0],
        );
        assert_eq!(
            verdict(&report),
            Err(DropReason::GuardIp),
            "a report has hop limit 1"
        );
        report[21] = 1;
        assert_eq!(verdict(&report), Ok(()));
    }

    #[test]
    fn others_addresses_are_dropped() {
        // Conformance H8: MAC, IPv4, IPv6, and link-local of another.
        assert_eq!(verdict(&udp(OTHER, "10.0.9.2")), Err(DropReason::GuardMac));
        for other in ["10.0.9.3", "fd00::3", "fe80::ff:fe00:2", "127.0.0.1", "::1"] {
            assert_eq!(
                verdict(&udp(OWN, other)),
                Err(DropReason::GuardIp),
                "{other}"
            );
        }
    }

    #[test]
    fn a_hosts_own_port_hands_on_any_packet_and_claims_no_ones_place() {
        // Conformance H8, for the port by which a host sends what came from outside.
        let mut host = port();
        host.any_source = true;
        for source in ["198.51.100.7", "2001:db8::7", "10.0.9.3"] {
            assert_eq!(verdict_at(&host, &udp(OWN, source)), Ok(()), "{source}");
            assert_eq!(
                verdict_at(&host, &udp(OTHER, source)),
                Err(DropReason::GuardMac)
            );
        }
        assert_eq!(verdict_at(&host, &udp(OWN, "::")), Err(DropReason::GuardIp));
        assert_eq!(
            verdict_at(&host, &arp(false, OWN, "10.0.9.3")),
            Err(DropReason::GuardNeighbor)
        );
        let claim = announcement(ip6("fd00::3"), ip6("fd00::2"), OWN, OWN);
        assert_eq!(verdict_at(&host, &claim), Err(DropReason::GuardNeighbor));
        let asked = solicitation(ip6("fd00::3"), OWN, ip6("fd00::4"), Some(OWN));
        assert_eq!(verdict_at(&host, &asked), Err(DropReason::GuardIp));
    }

    #[test]
    fn claims_about_others_are_dropped() {
        // Conformance H8: answering ARP or ND for another's address, or with another's MAC.
        assert_eq!(
            verdict(&arp(false, OWN, "10.0.9.3")),
            Err(DropReason::GuardNeighbor)
        );
        assert_eq!(
            verdict(&arp(true, OWN, "10.0.9.3")),
            Err(DropReason::GuardNeighbor)
        );
        assert_eq!(
            verdict(&arp(false, OTHER, "10.0.9.2")),
            Err(DropReason::GuardNeighbor)
        );
        assert_eq!(
            verdict(&announcement(ip6("fd00::3"), ip6("fd00::2"), OWN, OWN)),
            Err(DropReason::GuardNeighbor)
        );
        assert_eq!(
            verdict(&announcement(ip6("fd00::2"), ip6("fd00::2"), OWN, OTHER)),
            Err(DropReason::GuardNeighbor)
        );
        assert_eq!(
            verdict(&announcement(ip6("fd00::3"), ip6("fd00::3"), OWN, OWN)),
            Err(DropReason::GuardIp)
        );
        assert_eq!(
            verdict(&solicitation(
                ip6("fd00::2"),
                OWN,
                ip6("fd00::3"),
                Some(OTHER)
            )),
            Err(DropReason::GuardNeighbor)
        );
    }

    #[test]
    fn nobody_poses_as_a_router() {
        for kind in [134, 137] {
            let bytes = icmpv6(
                (ip6("fe80::ff:fe00:1"), OWN),
                (ip6("ff02::1"), MacAddr::new([0x33, 0x33, 0, 0, 0, 1])),
                &[kind, 0, 0, 0, 0, 0, 0, 0],
            );
            assert_eq!(
                verdict(&bytes),
                Err(DropReason::GuardNeighbor),
                "ICMPv6 type {kind}"
            );
        }
    }

    #[test]
    fn a_tag_hides_nothing() {
        // Linux takes a frame with VLAN id 0 as untagged.
        let mut bytes = udp(OWN, "10.0.9.3");
        bytes.splice(12..12, [0x81, 0, 0, 0]);
        assert_eq!(verdict(&bytes), Err(DropReason::GuardIp));
    }

    #[test]
    fn invalid_sources() {
        // Conformance V23.
        assert_eq!(
            verdict(&udp(MacAddr::ZERO, "10.0.9.2")),
            Err(DropReason::InvalidSource)
        );
        assert_eq!(
            verdict(&udp(MacAddr::BROADCAST, "10.0.9.2")),
            Err(DropReason::InvalidSource)
        );
    }
}
