//! The kernel's paths in their strongest form: tables given, so that nothing is looked for, and no filters on a bridge.

use std::net::IpAddr;

use ipnet::IpNet;
use netns::{Netlink, Netns, Vxlan};

use super::{Helpers, Path, PathKind};
use crate::name::{Kind, LabName, Role};
use crate::state::State;
use crate::topology::{self, Underlay};

/// What the kernel's VXLAN adds to a packet: Ethernet, VXLAN and UDP headers, and IPv4's or IPv6's.
const OVERHEAD_V4: u32 = 14 + 8 + 8 + 20;
const OVERHEAD_V6: u32 = 14 + 8 + 8 + 40;
const LINK_MTU: u32 = 1500;
const KERNEL_VNI: u32 = 42;
/// The kernel's own default is Linux's old port; this is IANA's.
const VXLAN_PORT: u16 = 4789;
const BRIDGE: &str = "br0";
/// The host of the local path; it has no underlay. The first two are those of the VXLAN path.
const LOCAL_HOST: u16 = 3;

/// Between two hosts: a veth pair, a bridge and the kernel's vxlan device on each.
pub(super) fn make(lab: &LabName, state: &State) -> anyhow::Result<Path> {
    let underlay = state.settings.underlay;
    let mtu = overlay_mtu(underlay);
    let mut containers = Vec::new();
    for (own, other) in [(1, 2), (2, 1)] {
        let host = topology::make_host(lab, Kind::Kernel, own, state.settings.wire)?;
        topology::no_bridge_filters(&host)?;
        let link = Netlink::open(&host)?;
        let spec = Vxlan {
            vni: KERNEL_VNI,
            local: topology::address(Kind::Kernel, own, underlay),
            port: VXLAN_PORT,
            learning: false,
            dev: Some(topology::UPLINK.to_owned()),
            udp_checksum: true,
        };
        link.add_bridge(BRIDGE)?;
        link.add_vxlan("vx0", &spec)?;
        link.set_mtu("vx0", mtu)?;
        link.set_master("vx0", Some(BRIDGE))?;
        link.add_fdb(
            "vx0",
            mac(other),
            topology::address(Kind::Kernel, other, underlay),
        )?;
        for name in [BRIDGE, "vx0"] {
            link.set_up(name)?;
        }
        let name = lab.of(Role::Container(Kind::Kernel, own, 1));
        containers.push(make_container(&link, &name, (own, other), mtu)?);
    }
    Ok(between(PathKind::Kernel, containers))
}

/// Within one host: a bridge, and a veth pair for each container.
pub(super) fn make_local(lab: &LabName, state: &State) -> anyhow::Result<Path> {
    let host = Netns::create(&lab.of(Role::Node(Kind::Kernel, LOCAL_HOST)))?;
    topology::no_bridge_filters(&host)?;
    let link = Netlink::open(&host)?;
    link.add_bridge(BRIDGE)?;
    link.set_up(BRIDGE)?;
    let mtu = overlay_mtu(state.settings.underlay);
    let mut containers = Vec::new();
    for (own, other) in [(1, 2), (2, 1)] {
        let name = lab.of(Role::Container(Kind::Kernel, LOCAL_HOST, own));
        containers.push(make_container(&link, &name, (own, other), mtu)?);
    }
    Ok(between(PathKind::LocalKernel, containers))
}

/// A container on the bridge of `link`'s host, which knows the other one.
fn make_container(
    link: &Netlink,
    name: &str,
    (own, other): (u16, u16),
    mtu: u32,
) -> anyhow::Result<Netns> {
    let container = Netns::create(name)?;
    let port = format!("c{own}");
    link.add_veth(&port, "eth0", &container)?;
    link.set_mtu(&port, mtu)?;
    link.set_master(&port, Some(BRIDGE))?;
    link.set_up(&port)?;
    let inside = Netlink::open(&container)?;
    inside.set_mtu("eth0", mtu)?;
    inside.set_mac("eth0", mac(own))?;
    inside.add_address("eth0", IpNet::new_assert(ip(own), 24))?;
    inside.set_up("eth0")?;
    inside.add_neighbor("eth0", ip(other), mac(other))?;
    Ok(container)
}

fn between(kind: PathKind, containers: Vec<Netns>) -> Path {
    let [client, server] = <[Netns; 2]>::try_from(containers).expect("both loops run twice");
    Path {
        kind,
        client,
        server,
        address: ip(2),
        bind: ip(2),
        port_offset: 0,
        agents: None,
        helpers: Helpers::default(),
    }
}

const fn overlay_mtu(underlay: Underlay) -> u32 {
    LINK_MTU
        - match underlay {
            Underlay::V4 => OVERHEAD_V4,
            Underlay::V6 => OVERHEAD_V6,
        }
}

fn ip(container: u16) -> IpAddr {
    let [_, low] = container.to_be_bytes();
    IpAddr::from([10, 99, 0, low])
}

fn mac(container: u16) -> [u8; 6] {
    let [_, low] = container.to_be_bytes();
    [0x02, 0x54, 0x4c, 0, 0, low]
}
