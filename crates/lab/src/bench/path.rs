//! The paths that are compared, each with hosts of its own kind on the one switch.
//!
//! | path | from, to |
//! |---|---|
//! | underlay | NAME-h1 → NAME-h2, no overlay |
//! | kernel | NAME-k1c1 → NAME-k2c1: veth, bridge, the kernel's vxlan device; static tables, no bridge filters |
//! | towline | the first containers of NAME-h1 and NAME-h2 |
//! | plain | NAME-p1c1 → NAME-p2c1: Towline on its plain backend, a cluster of its own |

use std::net::IpAddr;

use anyhow::{Context, bail};
use ipnet::IpNet;
use netns::{Netlink, Netns, Vxlan};
use serde::Serialize;

use crate::agent::{Agent, Host};
use crate::cpu::CpuGroup;
use crate::icmp::{self, Pair};
use crate::name::{Kind, LabName, Role};
use crate::state::{Folder, State};
use crate::topology::{self, Underlay};
use crate::up;

/// What the kernel's VXLAN adds to a packet: Ethernet, VXLAN and UDP headers, and IPv4's or IPv6's.
const OVERHEAD_V4: u32 = 14 + 8 + 8 + 20;
const OVERHEAD_V6: u32 = 14 + 8 + 8 + 40;
const LINK_MTU: u32 = 1500;
const KERNEL_VNI: u32 = 42;
/// The kernel's own default is Linux's old port; this is IANA's.
const VXLAN_PORT: u16 = 4789;

/// What `--paths` chooses from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PathKind {
    /// Host to host without an overlay
    Underlay,
    /// The kernel's VXLAN with a bridge and veth pairs
    Kernel,
    /// Towline
    Towline,
    /// Towline on its plain backend, the tun-tap crate: one frame for each system call
    Plain,
}

impl PathKind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Underlay => "underlay",
            Self::Kernel => "kernel",
            Self::Towline => "towline",
            Self::Plain => "plain",
        }
    }
}

/// A way from one namespace to an address in another.
#[derive(Debug)]
pub(crate) struct Path {
    pub(crate) kind: PathKind,
    pub(crate) client: Netns,
    pub(crate) server: Netns,
    pub(crate) address: IpAddr,
    /// The agents whose CPU time is part of its cost.
    pub(crate) agents: Option<CpuGroup>,
}

/// Makes what a path needs beyond the lab itself.
pub(crate) fn make(
    kind: PathKind,
    lab: &LabName,
    folder: &Folder,
    state: &State,
) -> anyhow::Result<Path> {
    let path = match kind {
        PathKind::Underlay => Path {
            kind,
            client: Netns::open(&lab.of(Role::Node(Kind::Host, 1)))?,
            server: Netns::open(&lab.of(Role::Node(Kind::Host, 2)))?,
            address: topology::address(Kind::Host, 2, state.settings.underlay),
            agents: None,
        },
        PathKind::Kernel => make_kernel(lab, state)?,
        PathKind::Towline => {
            let agents = CpuGroup::create(lab, "agents")?;
            for agent in state.agents.iter().take(2) {
                agents.add(agent.pid)?;
            }
            let hosts = open_hosts(lab, folder, Kind::Host)?;
            between_containers(kind, &hosts, agents)?
        }
        PathKind::Plain => make_plain(lab, folder, state)?,
    };
    check(&path)?;
    Ok(path)
}

/// Tries it, so that one that carries nothing is named before minutes are spent; fills neighbour caches on the way.
fn check(path: &Path) -> anyhow::Result<()> {
    let pair = Pair {
        netns: path.client.clone(),
        to: path.address,
    };
    let seen = icmp::ping(&[pair], 5)?;
    if seen.iter().all(|seen| seen.rtts.is_empty()) {
        bail!(
            "the {} path carries nothing: no ping to {} was answered",
            path.kind.name(),
            path.address
        );
    }
    Ok(())
}

fn open_hosts(lab: &LabName, folder: &Folder, kind: Kind) -> anyhow::Result<Vec<Host>> {
    (1..=2)
        .map(|host| Host::open(lab, folder, kind, host))
        .collect()
}

/// From the first container of the first host to the first of the second.
fn between_containers(kind: PathKind, hosts: &[Host], agents: CpuGroup) -> anyhow::Result<Path> {
    let endpoints = up::endpoints(&hosts[0])?;
    let first_on = |host: &Host| {
        endpoints
            .iter()
            .find(|endpoint| endpoint.host == host.name)
            .with_context(|| {
                format!(
                    "{} runs no container: bring the lab up with --containers 1 or more",
                    host.name
                )
            })
    };
    let (client, server) = (first_on(&hosts[0])?, first_on(&hosts[1])?);
    Ok(Path {
        kind,
        client: Netns::open(&client.container)?,
        server: Netns::open(&server.container)?,
        address: *server
            .ips
            .first()
            .with_context(|| format!("{} has no address", server.container))?,
        agents: Some(agents),
    })
}

fn make_plain(lab: &LabName, folder: &Folder, state: &State) -> anyhow::Result<Path> {
    let settings = &state.settings;
    let group = CpuGroup::create(lab, "plain")?;
    let mut agents = Vec::new();
    for host in 1..=2 {
        topology::make_host(lab, Kind::Plain, host, settings.wire)?;
        let agent =
            Host::open(lab, folder, Kind::Plain, host)?.start_agent(&["--backend", "plain"])?;
        group.add(agent.process().pid)?;
        agents.push(agent);
    }
    agents.iter_mut().try_for_each(Agent::wait_ready)?;
    let hosts = open_hosts(lab, folder, Kind::Plain)?;
    up::make_cluster(&hosts, Kind::Plain, settings.underlay)?;
    up::make_network(&hosts[0], settings.subnet)?;
    for (number, host) in (1..).zip(&hosts) {
        up::run_container(host, &lab.of(Role::Container(Kind::Plain, number, 1)))?;
    }
    up::wait_for_tables(&hosts)?;
    between_containers(PathKind::Plain, &hosts, group)
}

/// The strongest form of the kernel's path: tables given, so that nothing is looked for, and no filters on the bridge.
fn make_kernel(lab: &LabName, state: &State) -> anyhow::Result<Path> {
    let underlay = state.settings.underlay;
    let overhead = match underlay {
        Underlay::V4 => OVERHEAD_V4,
        Underlay::V6 => OVERHEAD_V6,
    };
    let mut containers = Vec::new();
    for (own, other) in [(1, 2), (2, 1)] {
        let host = topology::make_host(lab, Kind::Kernel, own, state.settings.wire)?;
        topology::no_bridge_filters(&host)?;
        let container = Netns::create(&lab.of(Role::Container(Kind::Kernel, own, 1)))?;
        let link = Netlink::open(&host)?;
        let spec = Vxlan {
            vni: KERNEL_VNI,
            local: topology::address(Kind::Kernel, own, underlay),
            port: VXLAN_PORT,
            learning: false,
            dev: Some(topology::UPLINK.to_owned()),
            udp_checksum: true,
        };
        link.add_bridge("br0")?;
        link.add_vxlan("vx0", &spec)?;
        link.add_veth("c1", "eth0", &container)?;
        for port in ["vx0", "c1"] {
            link.set_mtu(port, LINK_MTU - overhead)?;
            link.set_master(port, Some("br0"))?;
        }
        link.add_fdb(
            "vx0",
            mac(other),
            topology::address(Kind::Kernel, other, underlay),
        )?;
        for name in ["br0", "vx0", "c1"] {
            link.set_up(name)?;
        }
        let inside = Netlink::open(&container)?;
        inside.set_mtu("eth0", LINK_MTU - overhead)?;
        inside.set_mac("eth0", mac(own))?;
        inside.add_address("eth0", IpNet::new_assert(kernel_ip(own), 24))?;
        inside.set_up("eth0")?;
        inside.add_neighbor("eth0", kernel_ip(other), mac(other))?;
        containers.push(container);
    }
    let [client, server] = <[Netns; 2]>::try_from(containers).expect("the loop above runs twice");
    Ok(Path {
        kind: PathKind::Kernel,
        client,
        server,
        address: kernel_ip(2),
        agents: None,
    })
}

fn kernel_ip(host: u16) -> IpAddr {
    let [_, low] = host.to_be_bytes();
    IpAddr::from([10, 99, 0, low])
}

fn mac(host: u16) -> [u8; 6] {
    let [_, low] = host.to_be_bytes();
    [0x02, 0x54, 0x4c, 0, 0, low]
}
