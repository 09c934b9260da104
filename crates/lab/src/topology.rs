//! The underlay: a switch that is also the router, hosts on it, and what lies outside.
//!
//! ```text
//!   NAME-h1 eth0 192.0.2.1 ─┐
//!   NAME-h2 eth0 192.0.2.2 ─┼─ NAME-sw br0 192.0.2.254 ── 198.51.100.254 ── NAME-out eth0 198.51.100.1
//!   …                       ┘       2001:db8:2::fe        2001:db8:ff::fe        2001:db8:ff::1
//! ```
//!
//! Nothing of a lab stands in the namespace it was started from: all of it goes with its namespaces.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Context;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netns::{Netlink, Netns, Route, sysctl};
use serde::{Deserialize, Serialize};

use crate::ethtool;
use crate::name::{Kind, LabName, MAX_HOSTS, Role};

/// The switch's bridge.
const BRIDGE: &str = "br0";
/// Every host's underlay link.
pub(crate) const UPLINK: &str = "eth0";
/// The address that egress is tried with.
pub(crate) const OUTSIDE_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xff, 0, 0, 0, 0, 1);
/// The router's last number, towards the hosts and towards the outside.
const ROUTER: u8 = 254;

/// How the underlay carries packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Wire {
    /// No packet is larger than the MTU, as on a plain network card
    #[default]
    Mtu,
    /// Packets of up to 64 KiB cross whole, as between virtual machines of one host
    Gso,
}

/// Which addresses the hosts' VTEPs have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub(crate) enum Underlay {
    /// IPv4
    #[default]
    #[value(name = "4")]
    #[serde(rename = "4")]
    V4,
    /// IPv6
    #[value(name = "6")]
    #[serde(rename = "6")]
    V6,
}

/// A host's last number on the underlay.
fn station(kind: Kind, host: u16) -> u8 {
    let number = match kind {
        Kind::Host => host,
        Kind::Kernel => MAX_HOSTS + 10 + host,
        Kind::Plain => MAX_HOSTS + 20 + host,
        Kind::Peer => MAX_HOSTS + 30 + host,
    };
    u8::try_from(number).expect("hosts are at most 200, the bench's own eight of each kind")
}

/// A host's address on the underlay.
pub(crate) fn address(kind: Kind, host: u16, underlay: Underlay) -> IpAddr {
    underlay_net(station(kind, host), underlay).addr()
}

fn underlay_net(station: u8, underlay: Underlay) -> IpNet {
    match underlay {
        Underlay::V4 => net4([192, 0, 2, station], 24),
        Underlay::V6 => net6([0x2001, 0xdb8, 2, 0, 0, 0, 0, station.into()]),
    }
}

fn net4(octets: [u8; 4], prefix: u8) -> IpNet {
    Ipv4Net::new_assert(octets.into(), prefix).into()
}

fn net6(segments: [u16; 8]) -> IpNet {
    Ipv6Net::new_assert(segments.into(), 64).into()
}

fn default_route(via: IpAddr) -> Route {
    let dst = match via {
        IpAddr::V4(_) => Ipv4Net::default().into(),
        IpAddr::V6(_) => Ipv6Net::default().into(),
    };
    Route {
        dst,
        via: Some(via),
        dev: None,
        metric: None,
    }
}

/// The addresses of a host's underlay link, of both families.
pub(crate) fn nets(host: u16) -> [IpNet; 2] {
    [Underlay::V4, Underlay::V6].map(|underlay| underlay_net(station(Kind::Host, host), underlay))
}

/// The router's addresses towards the hosts, of both families.
pub(crate) fn routers() -> [IpAddr; 2] {
    [Underlay::V4, Underlay::V6].map(|underlay| underlay_net(ROUTER, underlay).addr())
}

/// Makes a link of the switch's namespace a port of the switch.
pub(crate) fn plug(switch: &Netlink, link: &str) -> anyhow::Result<()> {
    switch.set_master(link, Some(BRIDGE))?;
    switch.set_up(link)?;
    Ok(())
}

/// Makes the switch and the outside, and joins them.
pub(crate) fn make_underlay(lab: &LabName) -> anyhow::Result<()> {
    let switch = make_netns(&lab.of(Role::Switch))?;
    let outside = make_netns(&lab.of(Role::Outside))?;
    let link = Netlink::open(&switch)?;
    link.add_bridge(BRIDGE)?;
    for underlay in [Underlay::V4, Underlay::V6] {
        link.add_address(BRIDGE, underlay_net(ROUTER, underlay))?;
    }
    link.set_up(BRIDGE)?;
    no_bridge_filters(&switch)?;
    for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        sysctl::set(&switch, key, "1")?;
    }

    link.add_veth("out", UPLINK, &outside)?;
    let out = Netlink::open(&outside)?;
    link.add_address("out", net4([198, 51, 100, ROUTER], 24))?;
    link.add_address(
        "out",
        net6([0x2001, 0xdb8, 0xff, 0, 0, 0, 0, ROUTER.into()]),
    )?;
    out.add_address(UPLINK, IpNet::new_assert(OUTSIDE_V4.into(), 24))?;
    out.add_address(UPLINK, IpNet::new_assert(OUTSIDE_V6.into(), 64))?;
    link.set_up("out")?;
    out.set_up(UPLINK)?;
    out.add_route(&default_route(IpAddr::from([198, 51, 100, ROUTER])))?;
    out.add_route(&default_route(IpAddr::from([
        0x2001,
        0xdb8,
        0xff,
        0,
        0,
        0,
        0,
        u16::from(ROUTER),
    ])))?;
    Ok(())
}

/// Makes one host's namespace and puts it on the switch.
pub(crate) fn make_host(lab: &LabName, kind: Kind, host: u16, wire: Wire) -> anyhow::Result<Netns> {
    let name = lab.of(Role::Node(kind, host));
    let switch = Netns::open(&lab.of(Role::Switch))?;
    let netns = make_netns(&name)?;
    let port = port(lab, kind, host);
    let link = Netlink::open(&switch)?;
    link.add_veth(&port, UPLINK, &netns)?;
    link.set_master(&port, Some(BRIDGE))?;
    make_wire(&switch, &port, &netns, wire)
        .with_context(|| format!("can't set the offloads of {name}'s link"))?;
    link.set_up(&port)?;

    let link = Netlink::open(&netns)?;
    for underlay in [Underlay::V4, Underlay::V6] {
        link.add_address(UPLINK, underlay_net(station(kind, host), underlay))?;
    }
    link.set_up(UPLINK)?;
    for underlay in [Underlay::V4, Underlay::V6] {
        link.add_route(&default_route(underlay_net(ROUTER, underlay).addr()))?;
    }
    Ok(netns)
}

/// Takes a host off the switch. The kernel would do that by itself some time after the host's namespace has gone.
pub(crate) fn unplug_host(lab: &LabName, kind: Kind, host: u16) -> anyhow::Result<()> {
    let switch = lab.of(Role::Switch);
    if Netns::exists(&switch) {
        Netlink::open(&Netns::open(&switch)?)?.delete_link(&port(lab, kind, host))?;
    }
    Ok(())
}

/// The switch names its ports after the hosts behind them.
fn port(lab: &LabName, kind: Kind, host: u16) -> String {
    let name = lab.of(Role::Node(kind, host));
    name.rsplit('-').next().unwrap_or(&name).to_owned()
}

/// Sets both ends of a host's link.
///
/// [`Wire::Mtu`]: the sender cuts in software whatever is larger than the MTU, and the receiving host merges what its
/// link's NAPI poll finds, as the driver of a plain network card does. The switch does neither.
fn make_wire(switch: &Netns, port: &str, host: &Netns, wire: Wire) -> std::io::Result<()> {
    if wire == Wire::Gso {
        return Ok(());
    }
    let features = |gro| {
        move |name: &str| match name {
            "rx-gro" => Some(gro),
            _ if name.starts_with("tx-") && name.ends_with("-segmentation") => Some(false),
            _ => None,
        }
    };
    ethtool::set_features(switch, port, features(false))?;
    ethtool::set_features(host, UPLINK, features(true))
}

/// Makes a namespace whose links' addresses can be used at once: the lab gives no address twice.
fn make_netns(name: &str) -> anyhow::Result<Netns> {
    let netns = Netns::create(name)?;
    // Absent where IPv6 is switched off.
    if sysctl::get(&netns, "net/ipv6/conf/default/accept_dad").is_ok() {
        sysctl::set(&netns, "net/ipv6/conf/default/accept_dad", "0")?;
    }
    Ok(netns)
}

/// Bridged frames pass no iptables in this namespace: where br_netfilter is loaded every new namespace begins with
/// that on, and it costs the kernel's paths a sixth of their packet rate.
pub(crate) fn no_bridge_filters(netns: &Netns) -> anyhow::Result<()> {
    for key in ["arptables", "iptables", "ip6tables"]
        .map(|table| format!("net/bridge/bridge-nf-call-{table}"))
    {
        // Absent where the module isn't loaded.
        if sysctl::get(netns, &key).is_ok() {
            sysctl::set(netns, &key, "0")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_what_is_promised_and_never_meet() {
        assert_eq!(
            address(Kind::Host, 1, Underlay::V4).to_string(),
            "192.0.2.1"
        );
        assert_eq!(
            address(Kind::Host, 16, Underlay::V6).to_string(),
            "2001:db8:2::10"
        );
        let mut seen = std::collections::HashSet::from([ROUTER]);
        for (kind, count) in [
            (Kind::Host, MAX_HOSTS),
            (Kind::Kernel, 2),
            (Kind::Plain, 2),
            (Kind::Peer, 8),
        ] {
            for host in 1..=count {
                assert!(seen.insert(station(kind, host)), "{kind:?} {host}");
            }
        }
        assert!(!seen.contains(&0) && !seen.contains(&255));
    }

    #[test]
    fn default_routes_are_of_the_gateways_family() {
        assert_eq!(
            default_route(IpAddr::from([192, 0, 2, 254]))
                .dst
                .to_string(),
            "0.0.0.0/0"
        );
        assert_eq!(
            default_route(underlay_net(254, Underlay::V6).addr())
                .dst
                .to_string(),
            "::/0"
        );
        assert_eq!(
            underlay_net(254, Underlay::V6).to_string(),
            "2001:db8:2::fe/64"
        );
    }
}
