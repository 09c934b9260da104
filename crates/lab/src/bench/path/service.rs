//! A service with one member, and the ways to it: its virtual address, a published port, and a rule of plain nftables; and
//! two containers of a network that has no services, to see what services cost those who use none.

use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use netns::Netns;
use serde::Deserialize;

use super::super::load::{IPERF_PORT, SERVER_PORT};
use super::{Helpers, Path, PathKind, Place, lab_agents, open_hosts};
use crate::agent::Host;
use crate::interrupt;
use crate::name::{Kind, LabName, Role};
use crate::spot::Spot;
use crate::state::{Folder, State};
use crate::topology;
use crate::{NETWORK, up};

/// The service's name.
const SERVICE: &str = "lab-bench";
/// The table of the rule that a host's owner would write.
const TABLE: &str = "lab-bench-dnat";
/// The network without services.
const APART: &str = "lab-bench-apart";
/// What that rule's ports are above the member's.
const DNAT_OFFSET: u16 = 1000;
/// How long the member may take to serve.
const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Deserialize)]
struct Service {
    vips: Vec<IpAddr>,
    members: Vec<Member>,
}

#[derive(Deserialize)]
struct Member {
    container: String,
    state: String,
}

#[derive(Deserialize)]
struct Container {
    name: String,
    endpoints: Vec<Port>,
}

#[derive(Deserialize)]
struct Port {
    network: String,
    ips: Vec<IpAddr>,
}

/// The way `kind` to the service's member, which is started when there is none.
pub(super) fn make(
    kind: PathKind,
    lab: &LabName,
    folder: &Folder,
    state: &State,
) -> anyhow::Result<Path> {
    let hosts = open_hosts(lab, folder, state)?;
    let member = lab.of(Role::Container(
        Kind::Host,
        2,
        state.settings.containers + 1,
    ));
    let service = match hosts[0].ask::<Vec<Service>>(&["service", "inspect", SERVICE]) {
        Ok(_) => serving(&hosts[0])?,
        Err(_) => start(&hosts, &member)?,
    };
    let ipv4 = |ips: &[IpAddr]| {
        let ip = ips.iter().find(|ip| ip.is_ipv4()).or(ips.first());
        ip.copied().context("the service has no address")
    };
    let entry = topology::address(Kind::Host, 1, state.settings.underlay);
    let (client, address, port_offset) = match kind {
        PathKind::Vip => {
            let endpoints = up::endpoints(&hosts[0])?;
            let client = Place::first(&hosts[0]).find(&endpoints)?.container.clone();
            (client, ipv4(&service.vips)?, 0)
        }
        PathKind::Dnat => {
            let ips = addresses(&hosts[1], &member, "ingress")?;
            let same_family = ips.into_iter().find(|ip| ip.is_ipv4() == entry.is_ipv4());
            let ip = same_family.context("the member has no address of the underlay's family")?;
            plain_rule(&Netns::open(&hosts[0].name)?, ip)?;
            (lab.of(Role::Outside), entry, DNAT_OFFSET)
        }
        _ => (lab.of(Role::Outside), entry, 0),
    };
    let any: IpAddr = if address.is_ipv4() {
        [0_u8; 4].into()
    } else {
        [0_u16; 8].into()
    };
    Ok(Path {
        kind,
        client: Spot::Here(Netns::open(&client)?),
        server: Spot::Here(Netns::open(&member)?),
        address,
        bind: any,
        port_offset,
        agents: lab_agents(lab, state)?,
        machines: Vec::new(),
        helpers: Helpers::default(),
    })
}

/// A container's addresses on one of its networks.
fn addresses(host: &Host, container: &str, network: &str) -> anyhow::Result<Vec<IpAddr>> {
    let containers: Vec<Container> = host.ask(&["ps"])?;
    let mut ports = containers
        .into_iter()
        .filter(|known| known.name == container)
        .flat_map(|known| known.endpoints);
    let port = ports.find(|port| port.network == network);
    let port = port.with_context(|| format!("{container} is not on the network {network}"))?;
    Ok(port.ips)
}

/// Two containers of a network of their own, one on each of the first two hosts.
pub(super) fn make_apart(lab: &LabName, folder: &Folder, state: &State) -> anyhow::Result<Path> {
    let hosts = open_hosts(lab, folder, state)?;
    let containers = apart(lab, state);
    hosts[0].towline(&["network", "create", APART])?;
    for (host, container) in hosts.iter().zip(&containers) {
        up::run_container(host, container, APART)?;
    }
    let [client, server] = containers;
    let address = addresses(&hosts[1], &server, APART)?;
    let address = *address.first().context("a container has no address")?;
    Ok(Path {
        kind: PathKind::Apart,
        client: Spot::Here(Netns::open(&client)?),
        server: Spot::Here(Netns::open(&server)?),
        address,
        bind: address,
        port_offset: 0,
        agents: lab_agents(lab, state)?,
        machines: Vec::new(),
        helpers: Helpers::default(),
    })
}

/// Their names: behind the service's member.
fn apart(lab: &LabName, state: &State) -> [String; 2] {
    let index = state.settings.containers + 2;
    [1, 2].map(|host| lab.of(Role::Container(Kind::Host, host, index)))
}

fn start(hosts: &[Host], member: &str) -> anyhow::Result<Service> {
    let publish = [IPERF_PORT, SERVER_PORT].map(|port| format!("{port}:{port}"));
    hosts[0].towline(&[
        "service",
        "create",
        "--name",
        SERVICE,
        "--network",
        NETWORK,
        "--publish",
        &publish[0],
        "--publish",
        &publish[1],
    ])?;
    hosts[1].towline(&[
        "run",
        "-d",
        "--name",
        member,
        "--service",
        SERVICE,
        "--",
        "sleep",
        "infinity",
    ])?;
    serving(&hosts[0])
}

/// Waits until the member gets connections.
fn serving(host: &Host) -> anyhow::Result<Service> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        interrupt::check()?;
        let found: Vec<Service> = host.ask(&["service", "inspect", SERVICE])?;
        if let Some(service) = found.into_iter().next()
            && service
                .members
                .iter()
                .any(|member| member.state == "serving")
        {
            // The rules follow within moments.
            std::thread::sleep(Duration::from_secs(1));
            return Ok(service);
        }
        if Instant::now() > deadline {
            bail!("the service's member does not serve after {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What a host's owner would write without services.
fn plain_rule(host: &Netns, member: IpAddr) -> anyhow::Result<()> {
    let family = if member.is_ipv4() { "ip" } else { "ip6" };
    let ports = [IPERF_PORT, SERVER_PORT];
    let asked = ports
        .map(|port| (port + DNAT_OFFSET).to_string())
        .join(", ");
    let rules = ports.map(|port| {
        let to = match member {
            IpAddr::V4(ip) => format!("{ip}:{port}"),
            IpAddr::V6(ip) => format!("[{ip}]:{port}"),
        };
        format!("tcp dport {} dnat {family} to {to}\n", port + DNAT_OFFSET)
    });
    let text = format!(
        "table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n\
         chain in {{ type nat hook prerouting priority dstnat - 1;\n{}}}\n\
         chain out {{ type nat hook postrouting priority srcnat - 1;\n\
         ct status dnat meta l4proto tcp ct original proto-dst {{ {asked} }} masquerade\n}}\n}}\n",
        rules.concat()
    );
    nft(host, &text)
}

fn nft(host: &Netns, text: &str) -> anyhow::Result<()> {
    let output = host.run(|| {
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(text.as_bytes())?;
        }
        child.wait_with_output()
    })?;
    let output = output.context("can't run nft")?;
    if !output.status.success() {
        bail!("nft: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Takes away the service, its member, the rule and the network without services, as far as they are there.
pub(super) fn take_down(lab: &LabName, folder: &Folder, state: &State) -> anyhow::Result<()> {
    let hosts = open_hosts(lab, folder, state)?;
    if hosts[0]
        .ask::<serde_json::Value>(&["network", "inspect", APART])
        .is_ok()
    {
        for (host, container) in hosts.iter().zip(apart(lab, state)) {
            // Not there yet when the bench was killed early: the network's removal says what is wrong if it is.
            let _ = host.towline(&["rm", "-f", &container]);
        }
        hosts[0].towline(&["network", "rm", APART])?;
    }
    let Ok(found) = hosts[0].ask::<Vec<Service>>(&["service", "inspect", SERVICE]) else {
        return Ok(());
    };
    for member in found.iter().flat_map(|service| &service.members) {
        let name = member.container.as_str();
        hosts[1].towline(&["rm", "-f", "--drain-timeout", "0s", name])?;
    }
    hosts[0].towline(&["service", "rm", SERVICE])?;
    nft(
        &Netns::open(&hosts[0].name)?,
        &format!("table inet {TABLE}\ndelete table inet {TABLE}\n"),
    )
}
