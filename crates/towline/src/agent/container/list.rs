//! What containers there are: for `ps`, `exec` and `logs`.

use std::net::IpAddr;

use super::{Agent, is_running};
use crate::agent::Member;
use crate::agent::state::State;
use crate::api::container::{Container, GatewayPlace, Located, MountPlace, Part, Place};
use crate::shim::folder::{Folder, Phase, Spec};
use crate::shim::mount::{Mount, Source};

/// The containers of this host, the newest first.
pub(super) fn list(agent: &Agent, all: bool) -> anyhow::Result<Vec<Container>> {
    let containers = agent.containers.all()?;
    let state = agent.state.read(Clone::clone);
    let member = agent.member().ok();
    Ok(containers
        .iter()
        .map(|(folder, spec)| describe(folder, spec, &state, member.as_deref()))
        .filter(|container| all || container.state == "running")
        .collect())
}

/// Where a container is, and its first process while it runs.
pub(super) fn locate(agent: &Agent, name: &str) -> anyhow::Result<Located> {
    let (folder, spec) = agent.containers.find(name)?;
    let running = if spec.phase == Phase::Ready {
        folder.running()?
    } else {
        None
    };
    let process = running
        .and_then(|running| running.command)
        .filter(|process| process.is_running());
    Ok(Located {
        name: spec.name,
        folder: folder.path().to_owned(),
        process,
    })
}

/// Containers that hold something on this host.
pub(crate) fn names(agent: &Agent) -> anyhow::Result<Vec<String>> {
    let containers = agent.containers.all()?.into_iter();
    Ok(containers
        .filter(|(_, spec)| spec.phase != Phase::Exited)
        .map(|(_, spec)| spec.name)
        .collect())
}

fn mount_place(mount: &Mount) -> MountPlace {
    let (kind, name) = match &mount.source {
        Source::Bind(_) => ("bind", None),
        Source::Volume { name, .. } => ("volume", Some(name.clone())),
        Source::Tmpfs { .. } => ("tmpfs", None),
    };
    MountPlace {
        kind: kind.to_owned(),
        name,
        source: mount.path().map(|path| path.display().to_string()),
        target: mount.target.display().to_string(),
        readonly: mount.readonly,
    }
}

fn describe(folder: &Folder, spec: &Spec, state: &State, member: Option<&Member>) -> Container {
    let running = is_running(folder, spec);
    let process = folder
        .running()
        .ok()
        .flatten()
        .and_then(|running| running.command)
        .filter(|_| running);
    let exit = folder
        .exit()
        .ok()
        .flatten()
        .filter(|_| spec.phase == Phase::Exited);
    let shown = match spec.phase {
        Phase::Ready if running => "running",
        Phase::Preparing | Phase::Ready => "created",
        Phase::Ending => "ending",
        Phase::Exited => "exited",
    };
    let part = state
        .places(&spec.name)
        .find_map(|endpoint| endpoint.member);
    let attachment = state
        .attachments
        .iter()
        .find(|attachment| attachment.container == spec.name);
    Container {
        id: spec.id.clone(),
        name: spec.name.clone(),
        command: spec.command.clone(),
        state: shown.to_owned(),
        pid: process.map(|process| process.pid),
        exit_code: exit.as_ref().map(|exit| exit.code),
        created: spec.created,
        finished: exit.map(|exit| exit.finished),
        endpoints: state
            .places(&spec.name)
            .map(|endpoint| Place {
                network: state
                    .networks
                    .iter()
                    .find(|network| network.vni == endpoint.vni)
                    .map_or_else(|| endpoint.vni.to_string(), |network| network.name.clone()),
                interface: endpoint.ifname.clone(),
                mac: endpoint.mac.to_string(),
                ips: endpoint.ips.clone(),
            })
            .collect(),
        service: part.map(|part| {
            let service = member.and_then(|member| member.services.by_epoch(part.service));
            Part {
                service: service
                    .map_or_else(|| part.service.to_string(), |service| service.spec.name),
                weight: part.weight,
                serving: part.serving,
                health: member.and_then(|member| member.services.health(&spec.name)),
            }
        }),
        ports: attachment.map_or_else(Vec::new, |attachment| attachment.publish.clone()),
        // What is in its own folder, such as its resolv.conf, nobody asked for.
        mounts: spec
            .mounts
            .iter()
            .filter(|mount| {
                mount
                    .path()
                    .is_none_or(|path| !path.starts_with(folder.path()))
            })
            .map(mount_place)
            .collect(),
        gwbridge: attachment.map(|attachment| GatewayPlace {
            interface: attachment.ifname.clone(),
            host_interface: attachment.host_ifname.clone(),
            ips: vec![
                IpAddr::from(attachment.addresses.0),
                IpAddr::from(attachment.addresses.1),
            ],
        }),
    }
}
