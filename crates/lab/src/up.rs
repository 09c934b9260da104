//! `towline lab up`: hosts, agents, a cluster, a network, containers; all of it or nothing.

use std::collections::HashSet;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ipnet::{IpNet, Ipv4Net};
use netns::Netns;

use crate::agent::{Agent, Host};
use crate::name::{Kind, LabName, MAX_CONTAINERS, MAX_HOSTS, Role};
use crate::shapes::{FdbEntry, Initialized, Network};
use crate::state::{self, Folder, Settings, State};
use crate::topology::{self, Underlay, Wire};
use crate::vm::{self, Accelerator, Image, Machine, Shape};
use crate::{NETWORK, down, interrupt, limits};

/// How long the tables may take to reach every host.
const TABLES_PATIENCE: Duration = Duration::from_secs(60);
/// Of the overlay network, when none is asked for: the first that has room.
const SUBNETS: [Ipv4Net; 2] = [
    Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 9, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(10, 9, 0, 0), 16),
];
/// What each container runs: nothing, for longer than any lab.
const COMMAND: [&str; 2] = ["sleep", "infinity"];

/// Options of `lab up`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline lab up --hosts 3 --containers 2")]
pub struct UpArgs {
    /// How many hosts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_HOSTS)))]
    hosts: u16,
    /// How many containers on each host
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(0..=i64::from(MAX_CONTAINERS)))]
    containers: u16,
    /// The lab's name: the names of its hosts and containers begin with it
    #[arg(long, default_value = "lab")]
    name: LabName,
    /// Subnet of the lab's overlay network 'myoverlay'
    /// [default: 10.0.9.0/24; 10.9.0.0/16 where that has no room for all containers]
    #[arg(long, value_name = "CIDR")]
    subnet: Option<IpNet>,
    /// How the underlay carries packets
    #[arg(long, value_enum, default_value_t)]
    wire: Wire,
    /// IP version between the hosts
    #[arg(long, value_enum, default_value_t)]
    underlay: Underlay,
    /// How many of the hosts, the last ones, are virtual machines; where all are, no root is needed
    #[arg(long, value_name = "N", default_value_t = 0, requires = "image")]
    vms: u16,
    /// Folder of what virtual machines boot, as 'scripts/vm image' prints it
    #[arg(long, value_name = "FOLDER")]
    image: Option<PathBuf>,
    /// Memory of a virtual machine in MiB
    #[arg(long, value_name = "MIB", default_value_t = 320, value_parser = clap::value_parser!(u16).range(192..))]
    memory: u16,
    /// How a virtual machine's processor is had [default: kvm where a guest boots with it, else tcg]
    #[arg(long, value_enum, value_name = "KIND")]
    accelerator: Option<Accelerator>,
    /// First of the ports of loopback that virtual machines take, where all hosts are [default: from 42000, the first free]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1024..))]
    first_port: Option<u16>,
    /// Print what stands as JSON instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

impl UpArgs {
    pub(crate) const fn lab(&self) -> &LabName {
        &self.name
    }
}

/// Brings the lab up. When any step fails, or at Ctrl-C, what was made is taken away again.
pub(crate) fn run(args: &UpArgs) -> anyhow::Result<()> {
    let lab = &args.name;
    let subnet = check(args)?;
    interrupt::catch()?;
    let folder = Folder::of(lab);
    let _lock = vacate(lab, &folder)?;
    let machines = check_vacant(lab, &folder).and_then(|()| machines(args, &folder));
    let machines = match machines {
        Ok(machines) => machines,
        Err(error) => {
            folder.remove_empty();
            return Err(error);
        }
    };
    let (image, shape) = machines.unzip();
    let settings = Settings {
        hosts: args.hosts,
        containers: args.containers,
        subnet,
        wire: args.wire,
        underlay: args.underlay,
        vms: args.vms,
        machines: shape,
    };
    let mut state = State {
        settings,
        complete: false,
        agents: Vec::new(),
    };
    if let Err(error) = make(lab, &folder, &mut state, image.as_ref()) {
        return match down::take_down(lab, &folder) {
            Ok(_) => Err(error.context(format!("lab '{lab}' was not made"))),
            Err(left) => Err(error.context(format!(
                "lab '{lab}' was not made, and not all of it could be taken away ({left:#}): run 'towline lab down --name {lab}'"
            ))),
        };
    }
    Ok(())
}

/// Refuses before anything has changed. Returns the subnet to use.
fn check(args: &UpArgs) -> anyhow::Result<IpNet> {
    if args.vms > args.hosts {
        bail!(
            "--vms {} is more than --hosts {}: it says how many of the hosts are virtual machines",
            args.vms,
            args.hosts
        );
    }
    if args.vms < args.hosts {
        crate::require_root("lab up")?;
        if !Path::new("/dev/net/tun").exists() {
            bail!("there is no /dev/net/tun: load the module with 'modprobe tun'");
        }
        crate::require_tool("nft", "nftables")?;
    }
    if args.vms > 0 {
        vm::check(args.vms, args.memory)?;
    }
    let containers = u128::from(args.hosts) * u128::from(args.containers);
    subnet_for(containers, args.subnet)
}

/// What the virtual machines boot, and what they have in common; none where there are none.
fn machines(args: &UpArgs, folder: &Folder) -> anyhow::Result<Option<(Image, Shape)>> {
    let Some(image) = args.image.as_deref().filter(|_| args.vms > 0) else {
        return Ok(None);
    };
    let image = Image::open(image)?;
    let accelerator = match args.accelerator {
        Some(accelerator) => accelerator,
        None => {
            let found = vm::probe(&image, folder.path())?;
            let why = if found.why.is_empty() {
                String::new()
            } else {
                format!(" ({})", found.why)
            };
            eprintln!(
                "towline: virtual machines run by {}{why}",
                found.accelerator.name()
            );
            found.accelerator
        }
    };
    // Of a mixed lab they are in the switch's namespace, where no port is taken.
    let ports = if args.vms == args.hosts {
        Some(vm::choose_ports(args.first_port, args.vms)?)
    } else {
        None
    };
    let shape = Shape {
        memory: args.memory,
        accelerator,
        ports,
    };
    Ok(Some((image, shape)))
}

/// The subnet that was asked for, or the first of the usual ones that has room.
fn subnet_for(containers: u128, wanted: Option<IpNet>) -> anyhow::Result<IpNet> {
    let usual = || {
        let subnets = SUBNETS.map(IpNet::from);
        let fits = subnets.into_iter().find(|net| room_of(*net) >= containers);
        fits.unwrap_or(subnets[0])
    };
    let subnet = wanted.unwrap_or_else(usual);
    if subnet != subnet.trunc() {
        bail!("invalid subnet {subnet}: it should be {}", subnet.trunc());
    }
    let room = room_of(subnet);
    if containers > room {
        bail!(
            "{subnet} has room for {room} containers, {containers} are asked for: give a larger --subnet"
        );
    }
    Ok(subnet)
}

/// Takes the lab's folder for itself. What is in it of a run that was killed half-way goes first: processes, namespaces, files.
fn vacate(lab: &LabName, folder: &Folder) -> anyhow::Result<File> {
    folder.create()?;
    let lock = folder.lock()?;
    if !folder.is_half_made() {
        return Ok(lock);
    }
    down::take_down(lab, folder).with_context(|| {
        format!("lab '{lab}' was left half made, and can't be taken away: run 'towline lab down --name {lab}'")
    })?;
    eprintln!(
        "towline: lab '{lab}' was left half made by a run that was killed; what there was of it is taken away"
    );
    // The folder that was locked is gone.
    drop(lock);
    folder.create()?;
    folder.lock()
}

/// Refuses while anything of an earlier lab, or of somebody else under its names, is there.
fn check_vacant(lab: &LabName, folder: &Folder) -> anyhow::Result<()> {
    let taken = Netns::list()?
        .into_iter()
        .find(|name| lab.role(name).is_some());
    // Who is not root has no namespaces, and takes none's name.
    if let Some(name) = taken.filter(|_| rustix::process::geteuid().is_root()) {
        bail!(
            "namespace {name} is there already: take lab '{lab}' down with 'towline lab down --name {lab}', or give another --name"
        );
    }
    if !folder.is_empty() {
        bail!(
            "lab '{lab}' is up, or has left a folder behind: take it down with 'towline lab down --name {lab}', or give another --name"
        );
    }
    Ok(())
}

/// How many containers a subnet has addresses for: all but its own, the gateway's, and in IPv4 the broadcast address.
fn room_of(subnet: IpNet) -> u128 {
    let bits = u32::from(subnet.max_prefix_len() - subnet.prefix_len());
    1_u128
        .checked_shl(bits)
        .unwrap_or(u128::MAX)
        .saturating_sub(3)
}

fn make(
    lab: &LabName,
    folder: &Folder,
    state: &mut State,
    image: Option<&Image>,
) -> anyhow::Result<()> {
    folder.write(state)?;
    let settings = state.settings.clone();
    if !settings.only_machines() {
        let containers = u64::from(settings.hosts) * u64::from(settings.containers);
        limits::raise(&state::root(), settings.hosts, containers)?;
        topology::make_underlay(lab)?;
    }
    // These first: they boot while namespaces are made.
    let machines = start_machines(lab, folder, &settings, image)?;
    let mut agents = Vec::new();
    for host in 1..=settings.hosts {
        interrupt::check()?;
        if !settings.is_machine(host) {
            topology::make_host(lab, Kind::Host, host, settings.wire)?;
        } else if let Some(machine) = machines
            .iter()
            .find(|machine| machine.name == lab.of(Role::Node(Kind::Host, host)))
        {
            machine.wait_ready()?;
        }
        let agent = Host::of(lab, folder, &settings, host)?.start_agent(&[])?;
        state.agents.push(agent.process());
        folder.write(state)?;
        agents.push(agent);
    }
    agents.iter_mut().try_for_each(Agent::wait_ready)?;

    let hosts = (1..=settings.hosts)
        .map(|host| Host::of(lab, folder, &settings, host))
        .collect::<anyhow::Result<Vec<_>>>()?;
    make_cluster(&hosts, Kind::Host, settings.underlay)
        .and_then(|()| fill(lab, &hosts, &settings))
        .map_err(|error| explain(&machines, error))?;
    state.complete = true;
    folder.write(state)
}

/// Makes the network and its containers.
fn fill(lab: &LabName, hosts: &[Host], settings: &Settings) -> anyhow::Result<()> {
    make_network(&hosts[0], settings.subnet)?;
    // One after the other: addresses are handed out in order, so that every lab has the same.
    for (number, host) in (1..).zip(hosts) {
        for index in 1..=settings.containers {
            interrupt::check()?;
            let name = lab.of(Role::Container(Kind::Host, number, index));
            run_container(host, &name, NETWORK)?;
        }
    }
    if settings.containers > 0 {
        wait_for_tables(hosts)?;
    }
    Ok(())
}

fn start_machines(
    lab: &LabName,
    folder: &Folder,
    settings: &Settings,
    image: Option<&Image>,
) -> anyhow::Result<Vec<Machine>> {
    let (Some(image), Some(shape)) = (image, &settings.machines) else {
        return Ok(Vec::new());
    };
    (1..=settings.hosts)
        .filter(|&host| settings.is_machine(host))
        .map(|host| {
            interrupt::check()?;
            Machine::start(folder, lab, host, image, shape, settings.wire)
        })
        .collect()
}

/// What an error of a lab with a dead machine is really of.
fn explain(machines: &[Machine], error: anyhow::Error) -> anyhow::Error {
    match machines.iter().find(|machine| !machine.process.alive()) {
        Some(machine) => machine.explain(error),
        None => error,
    }
}

/// Makes the first host a manager and lets the others join it, all at once.
pub(crate) fn make_cluster(hosts: &[Host], kind: Kind, underlay: Underlay) -> anyhow::Result<()> {
    let (first, rest) = hosts.split_first().context("a cluster has a first host")?;
    let manager = topology::address(kind, 1, underlay).to_string();
    let Initialized { token } = first.ask(&["init", "--advertise", &manager])?;
    std::thread::scope(|scope| {
        let joins: Vec<_> = (2..)
            .zip(rest)
            .map(|(number, host)| {
                let (token, manager) = (&token, &manager);
                let own = topology::address(kind, number, underlay).to_string();
                scope.spawn(move || {
                    host.towline(&["join", "--token", token, "--advertise", &own, manager])
                })
            })
            .collect();
        joins.into_iter().try_for_each(|join| {
            join.join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    interrupt::check()
}

/// Makes the lab's network.
pub(crate) fn make_network(host: &Host, subnet: IpNet) -> anyhow::Result<()> {
    host.towline(&[
        "network",
        "create",
        "-d",
        "overlay",
        "--subnet",
        &subnet.to_string(),
        NETWORK,
    ])
}

/// Starts a container that does nothing.
pub(crate) fn run_container(host: &Host, name: &str, network: &str) -> anyhow::Result<()> {
    let words = [
        "run",
        "-d",
        "--name",
        name,
        "--network",
        network,
        "--",
        COMMAND[0],
        COMMAND[1],
    ];
    host.towline(&words)
}

/// Waits until every host knows where every container of the network is.
pub(crate) fn wait_for_tables(hosts: &[Host]) -> anyhow::Result<()> {
    let endpoints = endpoints(&hosts[0])?;
    let deadline = Instant::now() + TABLES_PATIENCE;
    for host in hosts {
        loop {
            interrupt::check()?;
            let entries: Vec<FdbEntry> = host.ask(&["fdb", "--network", NETWORK])?;
            let known: HashSet<String> = entries.into_iter().map(|entry| entry.mac).collect();
            let Some(missing) = endpoints
                .iter()
                .find(|endpoint| !known.contains(&endpoint.mac))
            else {
                break;
            };
            if Instant::now() > deadline {
                bail!(
                    "{} has not heard of {} after {TABLES_PATIENCE:?}",
                    host.name,
                    missing.container
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}

/// The containers of the lab's network, on all hosts.
pub(crate) fn endpoints(host: &Host) -> anyhow::Result<Vec<crate::shapes::Endpoint>> {
    let networks: Vec<Network> = host.ask(&["network", "inspect", NETWORK])?;
    Ok(networks
        .into_iter()
        .flat_map(|network| network.endpoints)
        .filter(|endpoint| endpoint.state == "up")
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_what_can_be_handed_out() {
        assert_eq!(room_of("10.0.9.0/24".parse().unwrap()), 253);
        assert_eq!(room_of("10.0.9.0/30".parse().unwrap()), 1);
        assert_eq!(room_of("10.0.9.1/32".parse().unwrap()), 0);
        assert!(room_of("fd00::/64".parse().unwrap()) > 1 << 60);
        assert!(room_of("::/0".parse().unwrap()) > 1 << 60);
    }

    #[test]
    fn a_subnet_that_nobody_asked_for_has_room() {
        let chosen = |containers| subnet_for(containers, None).unwrap().to_string();
        assert_eq!(chosen(0), "10.0.9.0/24");
        assert_eq!(chosen(253), "10.0.9.0/24");
        assert_eq!(chosen(1000), "10.9.0.0/16");
        assert!(subnet_for(100_000, None).is_err());
        let wanted = Some("10.0.9.0/24".parse().unwrap());
        let error = subnet_for(254, wanted).unwrap_err().to_string();
        assert!(error.contains("room for 253"), "{error}");
        let crooked = Some("10.0.9.1/24".parse().unwrap());
        assert!(subnet_for(1, crooked).is_err());
    }
}
