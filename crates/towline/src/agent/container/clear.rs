//! Takes away what a container holds: processes, ports, addresses, gateway, namespace, name.
//!
//! Every step may have been done before, by this agent or by one that was killed. A step that fails doesn't keep
//! the others from being done; the container stays in the phase `Ending` and is tried again.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use netns::{Netlink, Netns};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};
use vtep::fdb::PortId;

use super::{Agent, Drain, gateway, held, host_interface, is_running, lost_mounts, mount_points};
use crate::agent::state::EndpointRecord;
use crate::agent::{Member, volumes};
use crate::shim::EXIT_SIGNAL;
use crate::shim::folder::{self, Exit, Folder, Phase, Spec};
use crate::shim::process::{ProcessId, Victims, kill_all, wait_ended};

/// How long killed processes may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// How long a shim may take to report and end once its command is dead.
const SHIM_LIMIT: Duration = Duration::from_secs(10);
/// The exit code of a command whose shim was killed: the kernel kills it with SIGKILL then.
const KILLED: u8 = EXIT_SIGNAL + 9;

/// The shim says that the command has ended.
pub(super) fn ended(agent: &Arc<Agent>, name: &str) -> anyhow::Result<()> {
    let folder = agent.containers.folder(name)?;
    let lock = agent.containers.lock(name);
    let _held = held(&lock);
    let Some(mut spec) = folder.spec()? else {
        return Ok(());
    };
    if folder.exit()?.is_none() {
        bail!("container {name} has not ended");
    }
    clear(agent, &folder, &mut spec)
}

/// The command of this container could not be started. Another that has its name by now stays.
pub(super) fn aborted(agent: &Arc<Agent>, name: &str, id: &str) -> anyhow::Result<()> {
    let folder = agent.containers.folder(name)?;
    let lock = agent.containers.lock(name);
    let _held = held(&lock);
    let Some(mut spec) = folder.spec()?.filter(|spec| spec.id == id) else {
        return Ok(());
    };
    // Taken for as long as this lasts: a shim that comes late finds it taken and gives up.
    let Some(_nobody_starts) = folder.lock()? else {
        bail!("container {name} was started: 'towline rm -f {name}' removes it");
    };
    clear(agent, &folder, &mut spec)
}

/// `towline rm`. The name of what was removed; nothing when there was nothing and `force` doesn't mind.
pub(super) fn remove(
    agent: &Arc<Agent>,
    name: &str,
    force: bool,
    with_volumes: bool,
    drain: Drain,
) -> anyhow::Result<Option<String>> {
    let (folder, spec) = if force {
        let Some(found) = agent.containers.look_up(name)? else {
            return Ok(None);
        };
        found
    } else {
        agent.containers.find(name)?
    };
    let lock = agent.containers.lock(&spec.name);
    let shim = {
        let _held = held(&lock);
        let Some(mut spec) = folder.spec()? else {
            return Ok(Some(spec.name));
        };
        let shim = running_shim(&folder, &spec)?;
        if shim.is_some() && !force {
            bail!(
                "container {} is running: 'towline rm -f {0}' kills and removes it",
                spec.name
            );
        }
        if shim.is_none() && !force {
            refuse_starting(&folder, &spec)?;
        }
        spec.remove = true;
        spec.remove_volumes |= with_volumes;
        folder.write_spec(&spec)?;
        shim
    };
    // Not under the lock: the shim reports the end before it ends itself.
    if let Some(shim) = shim {
        end(agent, &spec, &shim, drain, None)?;
    }
    settle(agent, &folder, &spec)?;
    Ok(Some(spec.name))
}

/// `towline stop`: drains a member of a service, asks the command to end, and kills it when it has not after `grace`. The container's name.
/// One that has ended already is fine.
pub(super) fn stop(
    agent: &Arc<Agent>,
    name: &str,
    grace: Duration,
    drain: Drain,
) -> anyhow::Result<String> {
    let (folder, spec) = agent.containers.find(name)?;
    let lock = agent.containers.lock(&spec.name);
    let shim = {
        let _held = held(&lock);
        let shim = running_shim(&folder, &spec)?;
        if shim.is_none() {
            refuse_starting(&folder, &spec)?;
        }
        shim
    };
    if let Some(shim) = shim {
        end(agent, &spec, &shim, drain, Some(grace))?;
        settle(agent, &folder, &spec)?;
    }
    Ok(spec.name)
}

/// The shim of a container that runs.
fn running_shim(folder: &Folder, spec: &Spec) -> anyhow::Result<Option<ProcessId>> {
    if !is_running(folder, spec) {
        return Ok(None);
    }
    Ok(folder.running()?.map(|running| running.shim))
}

fn refuse_starting(folder: &Folder, spec: &Spec) -> anyhow::Result<()> {
    if spec.phase == Phase::Ready && folder.exit()?.is_none() && !is_running(folder, spec) {
        bail!(
            "container {} is being started: 'towline rm -f {0}' removes it all the same",
            spec.name
        );
    }
    Ok(())
}

/// Ends a container's command: after its connections, by SIGTERM where it is given time, by SIGKILL at last. The shim has reported the
/// end then.
fn end(
    agent: &Agent,
    spec: &Spec,
    shim: &ProcessId,
    drain: Drain,
    grace: Option<Duration>,
) -> anyhow::Result<()> {
    let Some(shim) = shim.open()? else {
        return Ok(());
    };
    drain.wait(agent, &spec.name);
    if let Some(grace) = grace {
        // It passes the signal on to the command.
        match pidfd_send_signal(&shim, Signal::TERM) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
        if wait_ended(&shim, grace)? {
            return Ok(());
        }
        tracing::info!(
            "container {} has not ended within {grace:?} and is killed",
            spec.name
        );
    }
    kill_inside(spec)?;
    if !wait_ended(&shim, SHIM_LIMIT)? {
        tracing::warn!(
            "container {}: its shim does not end and is killed",
            spec.name
        );
        pidfd_send_signal(&shim, Signal::KILL)?;
        wait_ended(&shim, KILL_LIMIT)?;
    }
    Ok(())
}

/// Clears away what an ended container holds, unless its shim has seen to that.
fn settle(agent: &Arc<Agent>, folder: &Folder, spec: &Spec) -> anyhow::Result<()> {
    let lock = agent.containers.lock(&spec.name);
    let _held = held(&lock);
    // Another container of this name may have been made meanwhile.
    if let Some(mut now) = folder.spec()?.filter(|now| now.id == spec.id) {
        // Taken for as long as this lasts. A shim that has reported the end and still writes to a slow reader
        // holds it too, and minds nothing.
        let nobody_starts = folder.lock()?;
        if nobody_starts.is_none() && now.phase == Phase::Ready && folder.exit()?.is_none() {
            bail!("container {} is being started: try again", spec.name);
        }
        clear(agent, folder, &mut now)?;
    }
    Ok(())
}

/// Kills and removes every container.
///
/// # Errors
/// Names each one that could not be removed.
pub(crate) fn remove_all(agent: &Arc<Agent>) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for (_, spec) in agent.containers.all()? {
        if let Err(error) = remove(agent, &spec.name, true, true, Drain::No) {
            failed.push(format!("{}: {error:#}", spec.name));
        }
    }
    if !failed.is_empty() {
        bail!("can't remove all containers: {}", failed.join("; "));
    }
    Ok(())
}

/// Takes back what a failed start has made. The caller holds the container's lock.
pub(super) fn undo(
    agent: &Arc<Agent>,
    folder: &Folder,
    spec: &mut Spec,
    name_is_ours: bool,
) -> anyhow::Result<()> {
    if name_is_ours {
        return clear(agent, folder, spec);
    }
    // Refused before anything but the folder was made.
    Ok(folder.remove()?)
}

/// Takes away all that a container holds. Afterwards it is `Exited`, or gone when it is to be removed or its
/// command never ran. The caller holds the container's lock and knows that its command doesn't run or may be killed.
pub(super) fn clear(agent: &Arc<Agent>, folder: &Folder, spec: &mut Spec) -> anyhow::Result<()> {
    if spec.phase != Phase::Exited {
        spec.phase = Phase::Ending;
        folder
            .write_spec(spec)
            .with_context(|| format!("can't write to {}", folder.path().display()))?;
        release(agent, spec)?;
    }
    let exit = folder.exit()?;
    let started = match &exit {
        Some(exit) => exit.started,
        None => folder
            .running()?
            .is_some_and(|running| running.command.is_some()),
    };
    if spec.remove || !started {
        if spec.remove_volumes || !started {
            volumes::remove_anonymous(agent, spec)?;
        }
        tell(agent, control::Request::ReleaseName(spec.name.clone()));
        folder
            .remove()
            .with_context(|| format!("can't remove {}", folder.path().display()))?;
        tracing::info!("container {} is gone", spec.name);
        return Ok(());
    }
    if exit.is_none() {
        folder.write_exit(&Exit {
            code: KILLED,
            started,
            finished: folder::now(),
        })?;
    }
    if spec.phase != Phase::Exited {
        spec.phase = Phase::Exited;
        folder.write_spec(spec)?;
        tracing::info!("container {} has ended", spec.name);
    }
    Ok(())
}

/// What a container holds on this host and its addresses in the cluster.
fn release(agent: &Arc<Agent>, spec: &Spec) -> anyhow::Result<()> {
    let mut problems = Vec::new();
    let mut attempt = |what: &str, done: anyhow::Result<()>| {
        if let Err(error) = done {
            problems.push(format!("{what}: {error:#}"));
        }
    };
    attempt("processes", kill_inside(spec));
    lost_mounts::forget(agent, &spec.name);
    // Without a membership there is nothing to detach from: `leave` took it away.
    if let Ok(member) = agent.member() {
        member.services.gone(&spec.name);
        member.names.gone(&spec.name);
        let records: Vec<EndpointRecord> = agent.state.read(|state| {
            state
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.container == spec.name)
                .cloned()
                .collect()
        });
        for record in &records {
            attempt(&record.ifname, release_endpoint(agent, &member, record));
        }
        attempt("gateway bridge", gateway::release(agent, &member, spec));
    } else {
        attempt("gateway bridge", delete_link(agent, spec));
    }
    attempt("network namespace", delete_netns(spec));
    attempt("mount points", mount_points::sweep(agent, Some(&spec.name)));
    held(&agent.containers.served).remove(&spec.name);
    if !problems.is_empty() {
        bail!(
            "can't clear container {} away yet: {}",
            spec.name,
            problems.join("; ")
        );
    }
    Ok(())
}

/// Takes one endpoint down: locally first, so that the address is nobody's before it may be another's.
pub(crate) fn release_endpoint(
    agent: &Agent,
    member: &Member,
    record: &EndpointRecord,
) -> anyhow::Result<()> {
    member.datapath.detach(PortId(record.port))?;
    tell(
        agent,
        control::Request::Free {
            vni: record.vni,
            epoch: record.epoch,
        },
    );
    agent.state.update(|state| {
        state
            .endpoints
            .retain(|endpoint| (endpoint.vni, endpoint.epoch) != (record.vni, record.epoch));
    })
}

fn delete_link(agent: &Agent, spec: &Spec) -> anyhow::Result<()> {
    Netlink::open(&agent.netns)?.delete_link(&host_interface(spec))?;
    Ok(())
}

/// Kills every process in the container's namespace.
fn kill_inside(spec: &Spec) -> anyhow::Result<()> {
    if !is_ours(spec) {
        return Ok(());
    }
    if !kill_all(
        Victims {
            netns: spec.netns,
            descendants_of: None,
        },
        KILL_LIMIT,
    )? {
        bail!("some processes in it don't end");
    }
    Ok(())
}

fn delete_netns(spec: &Spec) -> anyhow::Result<()> {
    // Made and not yet recorded when the agent was killed: the name was checked to be free before.
    let unrecorded = spec.netns.is_none();
    if is_ours(spec) || unrecorded {
        Netns::delete(&spec.name)?;
    }
    Ok(())
}

/// Whether the namespace of the container's name is the one that was made for it: inodes alone are given again.
fn is_ours(spec: &Spec) -> bool {
    Netns::open(&spec.name).is_ok_and(|netns| Some(netns.id()) == spec.netns)
}

/// Tells the manager, now or once it can be reached.
pub(super) fn tell(agent: &Agent, request: control::Request) {
    let told = agent
        .member()
        .map(|member| member.control.request(request.clone()));
    match told {
        Ok(Err(
            error @ (control::RequestError::NotConnected { .. }
            | control::RequestError::Timeout { .. }),
        )) => {
            tracing::warn!("the manager is told later: {error}");
            held(&agent.containers.unsent).push(request);
        }
        // What carries the name is freed before, a little later than this was asked for.
        Ok(Err(error)) if matches!(request, control::Request::ReleaseName(_)) => {
            tracing::info!("the manager is told again later: {error}");
            held(&agent.containers.unsent).push(request);
        }
        // It knows nothing of it any more.
        Ok(Err(error)) => tracing::debug!("{request:?}: {error}"),
        // Without a membership the manager has forgotten this host.
        Ok(Ok(_)) | Err(_) => {}
    }
}
