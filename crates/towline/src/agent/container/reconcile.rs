//! Finds out what became of containers: at a start of the agent, when a process has ended, and now and then.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bridge::Attachment;
use control::{EndpointState, Epoch, Owned};
use netns::Netns;
use vtep::Vni;

use super::prepare::port_spec;
use super::{Agent, clear, gateway, held, lost_mounts, mount_points, places, publish};
use crate::agent::state::{AttachmentRecord, EndpointRecord};
use crate::agent::{Member, names};
use crate::shim::folder::{Folder, Phase, Spec};

/// Takes up containers that run, clears away those that ended, and from now on learns of their ends.
pub(crate) fn start(agent: &Arc<Agent>) {
    reconcile(agent);
    if let Err(error) = mount_points::sweep(agent, None) {
        tracing::warn!("mount points that were made for containers may still be there: {error:#}");
    }
    // Ports of containers that ended while no agent ran.
    if let Ok(member) = agent.member()
        && let Err(error) = member.gateway().keep_published()
    {
        tracing::warn!("ports of containers that are gone may still be open: {error}");
    }
    lost_mounts::start(agent);
    let watching = Arc::clone(agent);
    let spawned = std::thread::Builder::new()
        .name("containers".into())
        .spawn(move || {
            loop {
                match watching.containers.watcher.ended() {
                    Ok(names) => names
                        .iter()
                        .for_each(|name| report(name, look(&watching, name))),
                    Err(error) => {
                        tracing::warn!("can't wait for processes: {error}");
                        // `reconcile` finds their ends too.
                        std::thread::sleep(Duration::from_secs(1));
                    }
                }
            }
        });
    if let Err(error) = spawned {
        tracing::warn!("can't start a thread, ends of containers are noticed late: {error}");
    }
}

/// Looks at every container. Cheap when nothing has changed.
pub(crate) fn reconcile(agent: &Arc<Agent>) {
    match agent.containers.folders() {
        Ok(names) => names
            .iter()
            .for_each(|name| report(name, look(agent, name))),
        Err(error) => tracing::warn!("{error:#}"),
    }
    // Each would wait for a connection: not while there is none.
    let connected = agent
        .member()
        .is_ok_and(|member| member.control.status().connected_to.is_some());
    if connected {
        let unsent = std::mem::take(&mut *held(&agent.containers.unsent));
        for request in unsent {
            tell_late(agent, request);
        }
    }
}

/// Tells the manager what it could not be told before, unless a container took the name up again meanwhile.
fn tell_late(agent: &Agent, request: control::Request) {
    let control::Request::ReleaseName(name) = &request else {
        return clear::tell(agent, request);
    };
    let lock = agent.containers.lock(name);
    let _held = held(&lock);
    // A name that can't be read is somebody's.
    let unused = agent
        .containers
        .folder(name)
        .is_ok_and(|folder| matches!(folder.spec(), Ok(None)));
    if unused {
        clear::tell(agent, request);
    }
}

fn report(name: &str, looked: anyhow::Result<()>) {
    if let Err(error) = looked {
        tracing::warn!("container {name}: {error:#}");
    }
}

/// Looks at one container and does what has to be done.
pub(super) fn look(agent: &Arc<Agent>, name: &str) -> anyhow::Result<()> {
    let folder = agent.containers.folder(name)?;
    let lock = agent.containers.lock(name);
    let _held = held(&lock);
    let Some(mut spec) = folder.spec()? else {
        // Killed before the first file was written. Whoever makes one now holds the lock.
        return Ok(folder.remove()?);
    };
    match spec.phase {
        Phase::Exited => Ok(()),
        // The agent that prepared it was killed: nobody prepares without the lock.
        Phase::Preparing | Phase::Ending => clear::clear(agent, &folder, &mut spec),
        Phase::Ready => look_at_ready(agent, &folder, &mut spec),
    }
}

fn look_at_ready(agent: &Arc<Agent>, folder: &Folder, spec: &mut Spec) -> anyhow::Result<()> {
    let running = folder.running()?;
    if let Some(shim) = running.as_ref().map(|running| &running.shim) {
        if let Some(pidfd) = shim.open()? {
            agent
                .containers
                .watcher
                .watch(&spec.name, shim.pid, pidfd)?;
            let command = running.and_then(|running| running.command);
            serve(agent, spec, command.is_some())?;
            if let Some(command) = command {
                lost_mounts::look(agent, spec, &command);
            }
            return Ok(());
        }
    } else if watch_client(agent, spec) {
        // It is about to start the shim.
        return serve(agent, spec, false);
    }
    // Taken for as long as this lasts: a shim that comes late finds it taken and gives up. One that has
    // just taken it is seen at the next look.
    match folder.lock()? {
        Some(_nobody_starts) => clear::clear(agent, folder, spec),
        None => Ok(()),
    }
}

/// Learns of the client's end; false when it has ended already.
pub(super) fn watch_client(agent: &Agent, spec: &Spec) -> bool {
    let Some(client) = &spec.client else {
        return false;
    };
    match client.open() {
        Ok(Some(pidfd)) => agent
            .containers
            .watcher
            .watch(&spec.name, client.pid, pidfd)
            .is_ok(),
        _ => false,
    }
}

/// Takes up the interfaces of a container that an earlier agent attached. `started`: its command runs.
pub(super) fn serve(agent: &Agent, spec: &Spec, started: bool) -> anyhow::Result<()> {
    let member = agent.member()?;
    let netns = Netns::open(&spec.name)?;
    if held(&agent.containers.served).contains(&spec.name) {
        if started {
            member.services.started(&spec.name);
        }
        places::finish(agent, &member, &netns, spec)?;
        answer_names(agent, &member, &netns, spec);
        return Ok(());
    }
    let records: Vec<EndpointRecord> = agent
        .state
        .read(|state| state.places(&spec.name).cloned().collect());
    for record in &records {
        member
            .datapath
            .adopt(&port_spec(&netns, record))
            .with_context(|| format!("can't take up the interface {}", record.ifname))?;
        member.control.publish(record.endpoint(), EndpointState::Up);
    }
    let attachments: Vec<AttachmentRecord> = agent.state.read(|state| {
        state
            .attachments
            .iter()
            .filter(|record| record.container == spec.name)
            .cloned()
            .collect()
    });
    for record in attachments {
        member
            .gateway()
            .adopt(&Attachment {
                container: netns.clone(),
                ifname: record.ifname.clone(),
                host_ifname: record.host_ifname.clone(),
                addresses: Some(record.addresses),
            })
            .context("can't take up its place on the gateway bridge")?;
        publish::reopen(agent, &member, &record)?;
    }
    places::finish(agent, &member, &netns, spec)?;
    gateway::settle(agent, &member, &netns, spec)?;
    held(&agent.containers.served).insert(spec.name.clone());
    member.services.found(&spec.name, started);
    answer_names(agent, &member, &netns, spec);
    tracing::info!("took up container {} again", spec.name);
    Ok(())
}

/// Serves a container's questions, on its networks as they are now; tried again at the next look.
fn answer_names(agent: &Agent, member: &Member, netns: &Netns, spec: &Spec) {
    if member.control.static_tables().is_none()
        && let Err(error) = member.names.container(agent, netns, spec)
    {
        tracing::warn!("container {}: names are not answered: {error:#}", spec.name);
    }
}

/// Frees what the manager counts as this host's and no container has: an agent was killed between the manager's
/// answer and its own record. Returns at once.
pub(crate) fn owned(agent: &Arc<Agent>, owned: &Owned) {
    let (agent, owned) = (Arc::clone(agent), owned.clone());
    in_background("owned", move || {
        // What is being made just now is recorded when this can be taken.
        let _changing = agent.changing();
        for endpoint in owned.endpoints {
            let (vni, epoch) = (endpoint.vni, endpoint.epoch);
            let known = agent.state.read(|state| {
                state
                    .endpoints
                    .iter()
                    .any(|r| (r.vni, r.epoch) == (vni, epoch))
            });
            if !known {
                clear::tell(&agent, control::Request::Free { vni, epoch });
            }
        }
        for name in agent.containers.folders().unwrap_or_default() {
            if !owned.names.contains(&name) {
                claim_late(&agent, &name);
            }
        }
        for name in owned.names {
            // One that can't be read is somebody's.
            let unknown = agent
                .containers
                .folder(&name)
                .is_ok_and(|folder| matches!(folder.spec(), Ok(None)));
            if unknown {
                clear::tell(&agent, control::Request::ReleaseName(name));
            }
        }
    });
}

/// A container that was started while no manager answered gets its name, unless another host has one of that name: then
/// both run on, and a person decides.
fn claim_late(agent: &Agent, name: &str) {
    let lock = agent.containers.lock(name);
    let _held = held(&lock);
    let known = agent
        .containers
        .folder(name)
        .is_ok_and(|folder| matches!(folder.spec(), Ok(Some(_))));
    let Some(member) = agent.member().ok().filter(|_| known) else {
        return;
    };
    let claimed = member
        .control
        .request(control::Request::ClaimName(name.to_owned()));
    if let Err(error) = claimed {
        tracing::warn!("container {name} runs on without its name: {error}");
    }
}

/// An address was given to another host while this one was counted as lost: its interface goes. Returns at once.
pub(crate) fn lost(agent: &Arc<Agent>, vni: Vni, epoch: Epoch) {
    let agent = Arc::clone(agent);
    in_background("lost", move || {
        let record = agent.state.read(|state| {
            state
                .endpoints
                .iter()
                .find(|record| (record.vni, record.epoch) == (vni, epoch))
                .cloned()
        });
        let (Some(record), Ok(member)) = (record, agent.member()) else {
            return;
        };
        let lock = agent.containers.lock(&record.container);
        let _held = held(&lock);
        tracing::warn!(
            "container {}: {} is taken down, its addresses are another's now",
            record.container,
            record.ifname
        );
        report(
            &record.container,
            clear::release_endpoint(&agent, &member, &record),
        );
        member.names.refresh(&agent, &record.container);
        let folder = agent.containers.folder(&record.container);
        if let Ok(folder) = folder
            && let Ok(Some(spec)) = folder.spec()
        {
            names::follow(&agent, &folder, &spec, None);
        }
    });
}

/// The callers carry news that must not wait for the manager's answers.
pub(crate) fn in_background(name: &str, work: impl FnOnce() + Send + 'static) {
    if let Err(error) = std::thread::Builder::new().name(name.into()).spawn(work) {
        tracing::warn!("can't start a thread: {error}");
    }
}
