//! The kernel's paths in their strongest form: tables given, so that nothing is looked for, and no filters on a bridge.

use std::net::IpAddr;

use ipnet::IpNet;
use netns::{Netlink, Netns, Vxlan};

use super::{Helpers, Path, PathKind};
use crate::agent::Host;
use crate::name::{Kind, LabName, Role};
use crate::spot::Spot;
use crate::state::{Folder, State};
use crate::topology;

/// What the kernel's VXLAN adds to a packet: Ethernet, VXLAN and UDP headers, and IPv4's or IPv6's.
const OVERHEAD_V4: u32 = 14 + 8 + 8 + 20;
const OVERHEAD_V6: u32 = 14 + 8 + 8 + 40;
const LINK_MTU: u32 = 1500;
const KERNEL_VNI: u32 = 42;
/// The kernel's own default is Linux's old port; this is IANA's.
const VXLAN_PORT: u16 = 4789;
/// Where a host has an agent too, which has that port.
const PORT_BESIDE_AN_AGENT: u16 = 8472;
const BRIDGE: &str = "br0";
const DEVICE: &str = "vx0";
/// The host of the local path; it has no underlay. The first two are those of the VXLAN path.
const LOCAL_HOST: u16 = 3;

/// One host's end of the path: a bridge with the kernel's vxlan device, and a container behind it.
#[derive(Clone, Debug, clap::Args)]
pub struct KernelEnd {
    /// The container's name
    #[arg(long)]
    container: String,
    /// Which of the two it is
    #[arg(long)]
    own: u16,
    /// The host's address
    #[arg(long)]
    local: IpAddr,
    /// The other host's address
    #[arg(long)]
    remote: IpAddr,
    /// UDP port of both
    #[arg(long)]
    port: u16,
    /// Only take away what there is of it
    #[arg(long)]
    remove: bool,
}

impl KernelEnd {
    /// Makes it, or takes it away, in the namespace of the caller.
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let host = Netns::current()?;
        let link = Netlink::open(&host)?;
        for name in [DEVICE, BRIDGE] {
            link.delete_link(name)?;
        }
        if Netns::exists(&self.container) {
            Netns::delete(&self.container)?;
        }
        if self.remove {
            return Ok(());
        }
        self.make(&host).map(drop)
    }

    fn make(&self, host: &Netns) -> anyhow::Result<Netns> {
        let other = 3 - self.own;
        let mtu = overlay_mtu(self.local);
        topology::no_bridge_filters(host)?;
        let link = Netlink::open(host)?;
        let spec = Vxlan {
            vni: KERNEL_VNI,
            local: self.local,
            port: self.port,
            learning: false,
            dev: Some(topology::UPLINK.to_owned()),
            udp_checksum: true,
        };
        link.add_bridge(BRIDGE)?;
        link.add_vxlan(DEVICE, &spec)?;
        link.set_mtu(DEVICE, mtu)?;
        link.set_master(DEVICE, Some(BRIDGE))?;
        link.add_fdb(DEVICE, mac(other), self.remote)?;
        for name in [BRIDGE, DEVICE] {
            link.set_up(name)?;
        }
        make_container(&link, &self.container, (self.own, other), mtu)
    }

    /// The same as options of `lab load kernel`.
    fn options(&self) -> Vec<String> {
        let mut options = vec![
            format!("--container={}", self.container),
            format!("--own={}", self.own),
            format!("--local={}", self.local),
            format!("--remote={}", self.remote),
            format!("--port={}", self.port),
        ];
        options.extend(self.remove.then(|| "--remove".to_owned()));
        options
    }
}

/// The end on the first or the second host of the lab. A namespace gets a host of its own for it; a virtual machine
/// has it beside its agent, and so on another port.
fn end(lab: &LabName, state: &State, own: u16, remove: bool) -> KernelEnd {
    let settings = &state.settings;
    let address = |host| {
        let kind = if settings.is_machine(host) {
            Kind::Host
        } else {
            Kind::Kernel
        };
        topology::address(kind, host, settings.underlay)
    };
    KernelEnd {
        container: lab.of(Role::Container(Kind::Kernel, own, 1)),
        own,
        local: address(own),
        remote: address(3 - own),
        port: if settings.vms == 0 {
            VXLAN_PORT
        } else {
            PORT_BESIDE_AN_AGENT
        },
        remove,
    }
}

/// Between two hosts: a veth pair, a bridge and the kernel's vxlan device on each.
pub(super) fn make(lab: &LabName, folder: &Folder, state: &State) -> anyhow::Result<Path> {
    let mut containers = Vec::new();
    for own in [1, 2] {
        let end = end(lab, state, own, false);
        containers.push(if state.settings.is_machine(own) {
            let host = Host::of(lab, folder, &state.settings, own)?;
            in_guest(&host, &end)?;
            host.container(&end.container)?
        } else {
            let host = topology::make_host(lab, Kind::Kernel, own, state.settings.wire)?;
            Spot::Here(end.make(&host)?)
        });
    }
    Ok(between(PathKind::Kernel, containers))
}

/// Takes away the ends in virtual machines; those in namespaces go with these.
pub(super) fn take_down(lab: &LabName, folder: &Folder, state: &State) -> anyhow::Result<()> {
    for own in [1, 2] {
        if state.settings.is_machine(own) {
            let host = Host::of(lab, folder, &state.settings, own)?;
            in_guest(&host, &end(lab, state, own, true))?;
        }
    }
    Ok(())
}

fn in_guest(host: &Host, end: &KernelEnd) -> anyhow::Result<()> {
    let options = end.options();
    let mut words = vec!["lab", "load", "kernel"];
    words.extend(options.iter().map(String::as_str));
    host.towline(&words)
}

/// Within one host: a bridge, and a veth pair for each container.
pub(super) fn make_local(lab: &LabName, state: &State) -> anyhow::Result<Path> {
    let host = Netns::create(&lab.of(Role::Node(Kind::Kernel, LOCAL_HOST)))?;
    topology::no_bridge_filters(&host)?;
    let link = Netlink::open(&host)?;
    link.add_bridge(BRIDGE)?;
    link.set_up(BRIDGE)?;
    let mtu = overlay_mtu(topology::address(Kind::Kernel, 1, state.settings.underlay));
    let mut containers = Vec::new();
    for (own, other) in [(1, 2), (2, 1)] {
        let name = lab.of(Role::Container(Kind::Kernel, LOCAL_HOST, own));
        let container = make_container(&link, &name, (own, other), mtu)?;
        containers.push(Spot::Here(container));
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

fn between(kind: PathKind, containers: Vec<Spot>) -> Path {
    let [client, server] = <[Spot; 2]>::try_from(containers).expect("both loops run twice");
    Path {
        kind,
        client,
        server,
        address: ip(2),
        bind: ip(2),
        port_offset: 0,
        agents: None,
        machines: Vec::new(),
        helpers: Helpers::default(),
    }
}

const fn overlay_mtu(host: IpAddr) -> u32 {
    LINK_MTU
        - match host {
            IpAddr::V4(_) => OVERHEAD_V4,
            IpAddr::V6(_) => OVERHEAD_V6,
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
