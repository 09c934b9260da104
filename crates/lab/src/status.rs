//! `towline lab status`: what stands of a lab, and whether it runs.

use std::net::IpAddr;
use std::process::Command;

use serde::Serialize;

use crate::NETWORK;
use crate::agent::Host;
use crate::name::{Kind, LabName, Role};
use crate::output;
use crate::shapes::Container;
use crate::state::{Folder, State};
use crate::topology::{self, Underlay, Wire};
use crate::vm::{Accelerator, Shape};

/// Containers of a host that are named one by one.
const NAMED_MAX: usize = 20;

/// Options of `lab status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline lab status --json")]
pub struct StatusArgs {
    /// The lab's name
    #[arg(long, default_value = "lab")]
    name: LabName,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// A lab, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    name: String,
    wire: Wire,
    underlay: Underlay,
    network: &'static str,
    subnet: ipnet::IpNet,
    hosts: Vec<HostReport>,
}

/// A host of the lab.
#[derive(Debug, Serialize)]
struct HostReport {
    name: String,
    address: IpAddr,
    manager: bool,
    pid: u32,
    /// `running`, `stopped`, or `no answer`.
    agent: &'static str,
    /// Of a virtual machine.
    vm: Option<MachineReport>,
    containers: Vec<ContainerReport>,
}

/// What a host is that is a virtual machine.
#[derive(Debug, Serialize)]
struct MachineReport {
    accelerator: Accelerator,
    memory_mib: u16,
    /// Its kernel's release; empty when it doesn't answer.
    kernel: String,
}

/// A container on one of the lab's hosts.
#[derive(Debug, Serialize)]
struct ContainerReport {
    name: String,
    state: String,
    ips: Vec<IpAddr>,
}

pub(crate) fn run(args: &StatusArgs) -> anyhow::Result<()> {
    show(&args.name, args.json)
}

/// Prints what stands of the lab.
pub(crate) fn show(lab: &LabName, json: bool) -> anyhow::Result<()> {
    crate::require_rights("lab status", lab)?;
    let folder = Folder::of(lab);
    let report = report(lab, &folder, &folder.open()?);
    if json {
        output::json(&report)
    } else {
        output::line(&text(&report))
    }
}

fn report(lab: &LabName, folder: &Folder, state: &State) -> Report {
    let settings = &state.settings;
    let hosts = (1..).zip(&state.agents).map(|(number, agent)| {
        let host = Host::of(lab, folder, settings, number);
        let asked = match &host {
            Ok(host) => host.ask::<Vec<Container>>(&["ps", "-a"]),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        };
        let machine = settings.machines.as_ref();
        let machine = machine.filter(|_| settings.is_machine(number));
        HostReport {
            name: lab.of(Role::Node(Kind::Host, number)),
            address: topology::address(Kind::Host, number, settings.underlay),
            manager: number == 1,
            pid: agent.pid,
            agent: match (&asked, agent.alive()) {
                // Also when a user has started another in the place of ours.
                (Ok(_), _) => "running",
                (Err(_), true) => "no answer",
                (Err(_), false) => "stopped",
            },
            vm: machine.map(|shape| machine_report(shape, host.as_ref().ok())),
            containers: containers(asked.unwrap_or_default()),
        }
    });
    Report {
        name: lab.to_string(),
        wire: settings.wire,
        underlay: settings.underlay,
        network: NETWORK,
        subnet: settings.subnet,
        hosts: hosts.collect(),
    }
}

fn machine_report(shape: &Shape, host: Option<&Host>) -> MachineReport {
    let asked = host.map(|host| host.spot.output(Command::new("uname").arg("-r")));
    let kernel = match asked {
        Some(Ok(output)) if output.status.success() => output.stdout,
        _ => Vec::new(),
    };
    MachineReport {
        accelerator: shape.accelerator,
        memory_mib: shape.memory,
        kernel: String::from_utf8_lossy(&kernel).trim().to_owned(),
    }
}

/// By name, the shorter first: c2 before c10.
fn containers(mut containers: Vec<Container>) -> Vec<ContainerReport> {
    containers.sort_by(|a, b| (a.name.len(), &a.name).cmp(&(b.name.len(), &b.name)));
    let ips = |container: &Container| {
        let places = container.endpoints.iter();
        places.flat_map(|place| place.ips.iter().copied()).collect()
    };
    containers
        .into_iter()
        .map(|container| ContainerReport {
            ips: ips(&container),
            name: container.name,
            state: container.state,
        })
        .collect()
}

fn text(report: &Report) -> String {
    let rows = report.hosts.iter().map(|host| {
        let role = if host.manager { "manager" } else { "member" };
        vec![
            host.name.clone(),
            host.address.to_string(),
            role.to_owned(),
            format!("{} (pid {}{})", host.agent, host.pid, kind(host)),
            describe_all(&host.containers),
        ]
    });
    let table = output::table(&["HOST", "ADDRESS", "ROLE", "AGENT", "CONTAINERS"], rows);
    format!("{table}\n\nnetwork {} {}", report.network, report.subnet)
}

/// What is to be said of a virtual machine.
fn kind(host: &HostReport) -> String {
    match &host.vm {
        None => String::new(),
        Some(vm) => format!(
            ", Linux {} by {}",
            if vm.kernel.is_empty() {
                "?"
            } else {
                &vm.kernel
            },
            vm.accelerator.name()
        ),
    }
}

/// Each of them, or of many the first and the last.
fn describe_all(containers: &[ContainerReport]) -> String {
    match containers {
        [] => "-".to_owned(),
        [first, .., last] if containers.len() > NAMED_MAX => {
            let running = containers.iter().filter(|one| one.state == "running");
            format!(
                "{} … {} ({} of {} running)",
                describe(first),
                describe(last),
                running.count(),
                containers.len()
            )
        }
        few => {
            let described: Vec<String> = few.iter().map(describe).collect();
            described.join(", ")
        }
    }
}

fn describe(container: &ContainerReport) -> String {
    match container.ips.first() {
        Some(ip) if container.state == "running" => format!("{} {ip}", container.name),
        _ => format!("{} ({})", container.name, container.state),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Report {
        let container = |name: &str, state: &str, ips: &[&str]| ContainerReport {
            name: name.into(),
            state: state.into(),
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        };
        Report {
            name: "lab".into(),
            wire: Wire::Mtu,
            underlay: Underlay::V4,
            network: NETWORK,
            subnet: "10.0.9.0/24".parse().unwrap(),
            hosts: vec![HostReport {
                name: "lab-h1".into(),
                address: "192.0.2.1".parse().unwrap(),
                manager: true,
                pid: 7,
                agent: "running",
                vm: None,
                containers: vec![
                    container("lab-h1c1", "running", &["10.0.9.2"]),
                    container("job", "exited", &[]),
                ],
            }],
        }
    }

    #[test]
    fn the_json_shape_is_as_documented() {
        let expected = serde_json::json!({
            "name": "lab", "wire": "mtu", "underlay": "4", "network": "myoverlay", "subnet": "10.0.9.0/24",
            "hosts": [{
                "name": "lab-h1", "address": "192.0.2.1", "manager": true, "pid": 7, "agent": "running", "vm": null,
                "containers": [{"name": "lab-h1c1", "state": "running", "ips": ["10.0.9.2"]},
                               {"name": "job", "state": "exited", "ips": []}],
            }],
        });
        assert_eq!(serde_json::to_value(sample()).unwrap(), expected);
    }

    #[test]
    fn of_many_containers_the_first_and_the_last_are_named() {
        let mut report = sample();
        report.hosts[0].containers = (1..=1000)
            .map(|index| ContainerReport {
                name: format!("c{index}"),
                state: if index == 7 { "exited" } else { "running" }.into(),
                ips: vec!["10.9.0.2".parse().unwrap()],
            })
            .collect();
        let text = text(&report);
        let expected = "c1 10.9.0.2 … c1000 10.9.0.2 (999 of 1000 running)";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn the_table_names_all() {
        let text = text(&sample());
        assert!(text.contains("lab-h1c1 10.0.9.2, job (exited)"), "{text}");
        assert!(text.contains("running (pid 7)"), "{text}");
        let mut report = sample();
        report.hosts[0].vm = Some(MachineReport {
            accelerator: Accelerator::Software,
            memory_mib: 320,
            kernel: "6.1.0".into(),
        });
        let text = super::text(&report);
        let said = "running (pid 7, Linux 6.1.0 by software emulation)";
        assert!(text.contains(said), "{text}");
    }
}
