//! The paths that are compared, each with hosts of its own kind on the one switch.
//!
//! | path | from, to |
//! |---|---|
//! | underlay | NAME-h1 → NAME-h2, no overlay |
//! | kernel | NAME-k1c1 → NAME-k2c1: veth, bridge, the kernel's vxlan device; static tables, no bridge filters |
//! | towline | the first containers of NAME-h1 and NAME-h2 |
//! | plain | NAME-p1c1 → NAME-p2c1: Towline on its plain backend, a cluster of its own |
//! | local-kernel | NAME-k3c1 → NAME-k3c2: two containers of one host, a bridge and veth pairs |
//! | local | the first two containers of NAME-h1 |
//! | vip | the first container of NAME-h1 → a member of a service on NAME-h2, by the service's virtual address |
//! | ingress | NAME-out → NAME-h1 → the same member, by a published port |
//! | apart | containers of NAME-h1 and NAME-h2 on a network of their own, which has no services |
//! | dnat | NAME-out → NAME-h1 → the same member, by a rule of plain nftables that hides the client |
//! | ovs, tinc, fastd, wireguard-go | NAME-oN → NAME-oN+1: other programs' tunnels, see `path/peers.rs` |

pub(crate) mod kernel;
mod peers;
mod service;

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::load::SERVER_PORT;
use super::tool::Tool;
use crate::agent::{Agent, Host};
use crate::cpu::CpuGroup;
use crate::down;
use crate::interrupt;
use crate::name::{Kind, LabName, Role};
use crate::pinger::{self, Aim};
use crate::process::Process;
use crate::shapes::Endpoint;
use crate::spot::Spot;
use crate::state::{Folder, State};
use crate::topology;
use crate::{NETWORK, up};

/// What `--paths` chooses from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PathKind {
    /// Host to host without an overlay
    Underlay,
    /// The kernel's VXLAN with a bridge and veth pairs
    Kernel,
    /// Towline
    Towline,
    /// Towline on its plain backend, the tun-tap crate: one frame for each system call
    Plain,
    /// Two containers of one host, by a kernel bridge and veth pairs
    LocalKernel,
    /// Two containers of one host, by Towline
    Local,
    /// A service's member, by its virtual address
    Vip,
    /// The same member from outside, by a published port
    Ingress,
    /// The same by a rule of plain nftables that hides the client
    Dnat,
    /// Towline, between containers of a network that has no services
    Apart,
    /// Open vSwitch with its userspace datapath, VXLAN
    Ovs,
    /// tinc 1.0, without its encryption
    Tinc,
    /// fastd, without its encryption
    Fastd,
    /// wireguard-go, which always encrypts
    WireguardGo,
}

impl PathKind {
    /// Other programs that do the like.
    pub(crate) const PEERS: [Self; 4] = [Self::Ovs, Self::Tinc, Self::Fastd, Self::WireguardGo];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Underlay => "underlay",
            Self::Kernel => "kernel",
            Self::Towline => "towline",
            Self::Plain => "plain",
            Self::LocalKernel => "local-kernel",
            Self::Local => "local",
            Self::Vip => "vip",
            Self::Ingress => "ingress",
            Self::Dnat => "dnat",
            Self::Apart => "apart",
            Self::Ovs => "ovs",
            Self::Tinc => "tinc",
            Self::Fastd => "fastd",
            Self::WireguardGo => "wireguard-go",
        }
    }

    /// Whether both of its ends are on one host.
    pub(crate) const fn is_local(self) -> bool {
        matches!(self, Self::LocalKernel | Self::Local)
    }

    /// Whether it leads to a service's member.
    pub(crate) const fn is_service(self) -> bool {
        matches!(self, Self::Vip | Self::Ingress | Self::Dnat)
    }

    /// Whether it is measured against the way between two containers of a network with services.
    pub(crate) const fn is_beside_services(self) -> bool {
        self.is_service() || matches!(self, Self::Apart)
    }

    /// Whether it can begin and end in virtual machines.
    const fn reaches_machines(self) -> bool {
        matches!(
            self,
            Self::Underlay | Self::Kernel | Self::Towline | Self::Local
        )
    }

    /// The kernel's path that does the same.
    pub(crate) const fn kernels(self) -> Self {
        if self.is_local() {
            Self::LocalKernel
        } else {
            Self::Kernel
        }
    }
}

/// A way from one place to an address in another.
#[derive(Debug)]
pub(crate) struct Path {
    pub(crate) kind: PathKind,
    pub(crate) client: Spot,
    pub(crate) server: Spot,
    /// Where the client finds the server.
    pub(crate) address: IpAddr,
    /// Where the server listens.
    pub(crate) bind: IpAddr,
    /// What the client's port is above the server's.
    pub(crate) port_offset: u16,
    /// The agents whose CPU time is part of its cost.
    pub(crate) agents: Option<CpuGroup>,
    /// The virtual machines whose CPU time is part of its cost.
    pub(crate) machines: Vec<Process>,
    /// Programs that carry it and end with it.
    helpers: Helpers,
}

impl Path {
    /// Where our own servers listen; none: on a free port.
    pub(crate) fn fixed_port(&self) -> Option<u16> {
        self.kind.is_service().then_some(SERVER_PORT)
    }
}

/// Programs that carry a path.
#[derive(Debug, Default)]
struct Helpers {
    tools: Vec<Tool>,
    /// What they leave behind outside of the lab's folder when they are killed.
    files: Vec<PathBuf>,
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.tools.clear();
        for file in &self.files {
            // Gone already where its program ended by itself.
            let _ = std::fs::remove_file(file);
        }
    }
}

/// Makes what a path needs beyond the lab itself.
pub(crate) fn make(
    kind: PathKind,
    lab: &LabName,
    folder: &Folder,
    state: &State,
) -> anyhow::Result<Path> {
    let first_two = || open_hosts(lab, folder, state);
    let machines = lab_machines(state);
    if !machines.is_empty() && !kind.reaches_machines() {
        bail!(
            "the first two hosts are to be namespaces for it, and one is a virtual machine: of those, --paths underlay,kernel,towline,local are measured"
        );
    }
    let mut path = match kind {
        PathKind::Underlay => Path {
            kind,
            client: first_two()?[0].spot.clone(),
            server: first_two()?[1].spot.clone(),
            address: topology::address(Kind::Host, 2, state.settings.underlay),
            bind: topology::address(Kind::Host, 2, state.settings.underlay),
            port_offset: 0,
            agents: None,
            machines: Vec::new(),
            helpers: Helpers::default(),
        },
        PathKind::Kernel => kernel::make(lab, folder, state)?,
        PathKind::LocalKernel => kernel::make_local(lab, state)?,
        PathKind::Towline => {
            let hosts = first_two()?;
            let ends = [Place::first(&hosts[0]), Place::first(&hosts[1])];
            between_containers(kind, &hosts, ends, lab_agents(lab, state)?)?
        }
        PathKind::Local => {
            let hosts = first_two()?;
            let second = Place {
                host: &hosts[0],
                index: 1,
            };
            let ends = [Place::first(&hosts[0]), second];
            between_containers(kind, &hosts, ends, lab_agents(lab, state)?)?
        }
        PathKind::Vip | PathKind::Ingress | PathKind::Dnat => {
            service::make(kind, lab, folder, state)?
        }
        PathKind::Apart => service::make_apart(lab, folder, state)?,
        PathKind::Plain => make_plain(lab, folder, state)?,
        PathKind::Ovs | PathKind::Tinc | PathKind::Fastd | PathKind::WireguardGo => {
            peers::make(kind, lab, folder, state)?
        }
    };
    path.machines = machines;
    check(&path)?;
    Ok(path)
}

/// Takes away what a bench has added to the lab, also one that was killed.
pub(super) fn take_down(lab: &LabName, folder: &Folder, state: &State) -> anyhow::Result<()> {
    if lab_machines(state).is_empty() {
        service::take_down(lab, folder, state)?;
    }
    kernel::take_down(lab, folder, state)?;
    down::take_down_bench(lab, folder)
}

/// Tries it, so that one that carries nothing is named before minutes are spent; fills neighbour caches on the way. Other programs'
/// tunnels may take some seconds to find each other.
fn check(path: &Path) -> anyhow::Result<()> {
    let tries = if path.helpers.tools.is_empty() { 1 } else { 10 };
    for _ in 0..tries {
        interrupt::check()?;
        let aim = Aim {
            from: path.client.clone(),
            to: Some(path.address),
        };
        let seen = pinger::ping(&[aim], 5)?;
        if seen.iter().any(|seen| !seen.rtts_us.is_empty()) {
            return Ok(());
        }
    }
    bail!(
        "the {} path carries nothing: no ping to {} was answered",
        path.kind.name(),
        path.address
    )
}

/// The lab's first two hosts.
fn open_hosts(lab: &LabName, folder: &Folder, state: &State) -> anyhow::Result<Vec<Host>> {
    (1..=2)
        .map(|host| Host::of(lab, folder, &state.settings, host))
        .collect()
}

/// Those of the first two that are virtual machines.
fn lab_machines(state: &State) -> Vec<Process> {
    (1..=2)
        .zip(&state.agents)
        .filter(|&(host, _)| state.settings.is_machine(host))
        .map(|(_, process)| *process)
        .collect()
}

/// The lab's own agents whose CPU time counts: those of its first two hosts, as far as these are namespaces.
fn lab_agents(lab: &LabName, state: &State) -> anyhow::Result<Option<CpuGroup>> {
    if state.settings.only_machines() {
        return Ok(None);
    }
    let agents = CpuGroup::create(lab, "agents")?;
    for (host, agent) in (1..=2).zip(&state.agents) {
        if !state.settings.is_machine(host) {
            agents.add(agent.pid)?;
        }
    }
    Ok(Some(agents))
}

/// One container of a host, counted from 0.
struct Place<'a> {
    host: &'a Host,
    index: usize,
}

impl<'a> Place<'a> {
    const fn first(host: &'a Host) -> Self {
        Self { host, index: 0 }
    }

    fn find<'e>(&self, endpoints: &'e [Endpoint]) -> anyhow::Result<&'e Endpoint> {
        let mut here = endpoints
            .iter()
            .filter(|endpoint| endpoint.host == self.host.name);
        here.nth(self.index).with_context(|| {
            format!(
                "{} runs too few containers: bring the lab up with --containers {} or more",
                self.host.name,
                self.index + 1
            )
        })
    }
}

/// From one container to another, of those that run on `hosts`.
fn between_containers(
    kind: PathKind,
    hosts: &[Host],
    ends: [Place<'_>; 2],
    agents: Option<CpuGroup>,
) -> anyhow::Result<Path> {
    let endpoints = up::endpoints(&hosts[0])?;
    let [from, to] = &ends;
    let (client, server) = (from.find(&endpoints)?, to.find(&endpoints)?);
    let address = server.ips.first();
    let address = *address.with_context(|| format!("{} has no address", server.container))?;
    Ok(Path {
        kind,
        client: from.host.container(&client.container)?,
        server: to.host.container(&server.container)?,
        address,
        bind: address,
        port_offset: 0,
        agents,
        machines: Vec::new(),
        helpers: Helpers::default(),
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
    let hosts = (1..=2)
        .map(|host| Host::open(lab, folder, Kind::Plain, host))
        .collect::<anyhow::Result<Vec<_>>>()?;
    up::make_cluster(&hosts, Kind::Plain, settings.underlay)?;
    up::make_network(&hosts[0], settings.subnet)?;
    for (number, host) in (1..).zip(&hosts) {
        let name = lab.of(Role::Container(Kind::Plain, number, 1));
        up::run_container(host, &name, NETWORK)?;
    }
    up::wait_for_tables(&hosts)?;
    let ends = [Place::first(&hosts[0]), Place::first(&hosts[1])];
    between_containers(PathKind::Plain, &hosts, ends, Some(group))
}
