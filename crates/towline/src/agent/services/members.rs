//! Members of services on this host: which of them serve, and who finds out.
//!
//! A member serves from the start of its command, or from its first good check, until it is unhealthy or about to go. What was last
//! said of it stands in the state file, so that a restart of the agent takes nobody out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::EndpointState;
use control::service::{HealthCheck, Membership, Publish, Service};
use discovery::health::{Checker, HealthTarget};
use discovery::plan::MEMBER_INTERFACE;
use netns::Netns;
use rustix::process::{Pid, Signal, kill_process_group};
use vtep::Vni;

use super::Work;
use crate::agent::container::leave_ingress;
use crate::agent::container::publish::{follow_service, of_service};
use crate::agent::state::{EndpointRecord, ServicePort};
use crate::agent::{Agent, Member, ingress};

/// Containers of this host, as far as services are concerned.
#[derive(Default)]
pub(super) struct Members {
    /// Something may have to be done.
    pub(super) stale: bool,
    containers: BTreeMap<String, Container>,
}

#[derive(Default)]
struct Container {
    /// Its command runs.
    started: bool,
    /// It is about to go.
    draining: bool,
    /// What is checked, and who does it.
    checked: Option<(HealthCheck, Option<Checker>)>,
    /// What the check says; none: nothing yet.
    healthy: Option<bool>,
    /// Why it is as it is.
    why: String,
    problem: Option<String>,
    ports: Ports,
}

/// The ports that a container has by its service.
#[derive(Default)]
struct Ports {
    /// Somebody is bringing them to what is asked for.
    following: bool,
    /// Why not all could be had.
    problem: Option<String>,
}

impl Members {
    /// A container is here.
    pub(super) fn found(&mut self, name: String, started: bool) {
        let container = self.containers.entry(name).or_default();
        container.started |= started;
        self.stale = true;
    }

    /// The command of a container runs.
    pub(super) fn started(&mut self, name: &str) {
        if let Some(container) = self.containers.get_mut(name)
            && !container.started
        {
            container.started = true;
            self.stale = true;
        }
    }

    /// A container goes.
    pub(super) fn gone(&mut self, name: &str) {
        self.containers.remove(name);
    }

    /// A check has a result.
    pub(super) fn health(&mut self, name: &str, healthy: bool, why: &str) {
        if let Some(container) = self.containers.get_mut(name)
            && container.checked.is_some()
        {
            container.healthy = Some(healthy);
            why.clone_into(&mut container.why);
            self.stale = true;
        }
    }

    /// The ports of a container were brought to what its service asks for.
    pub(super) fn ports_followed(&mut self, name: &str, problem: Option<String>) {
        let Some(container) = self.containers.get_mut(name) else {
            return;
        };
        container.ports.following = false;
        let problem = problem.map(|why| {
            format!("container {name}: not all ports that its service publishes on its host are open: {why}")
        });
        if let Some(problem) = problem
            .as_ref()
            .filter(|_| problem != container.ports.problem)
        {
            tracing::warn!("{problem}");
        }
        // They may be others by now; what could not be had is tried again in a while.
        self.stale |= problem.is_none();
        container.ports.problem = problem;
    }

    /// A container is about to go: it serves no more, which is said before this returns.
    pub(super) fn drain(&mut self, agent: &Agent, member: &Member, name: &str) {
        if let Some(container) = self.containers.get_mut(name) {
            container.draining = true;
            container.checked = None;
            publish(agent, member, name, |before| {
                Some(Membership {
                    serving: false,
                    ..before
                })
            });
        }
    }

    /// What the operator should know.
    pub(super) fn problems(&self) -> impl Iterator<Item = String> {
        self.containers.values().flat_map(|container| {
            let problems = container.problem.iter().chain(&container.ports.problem);
            problems.cloned()
        })
    }

    /// How those are that are checked, by container.
    pub(super) fn shown(&self) -> BTreeMap<String, String> {
        let checked = self
            .containers
            .iter()
            .filter(|(_, container)| container.checked.is_some());
        checked
            .map(|(name, container)| {
                let health = match container.healthy {
                    None => "starting".to_owned(),
                    Some(true) => "healthy".to_owned(),
                    Some(false) => format!("unhealthy: {}", container.why),
                };
                (name.clone(), health)
            })
            .collect()
    }

    /// Brings all members up to what is known.
    pub(super) fn settle(
        &mut self,
        agent: &Arc<Agent>,
        member: &Arc<Member>,
        services: &discovery::Services,
        complete: &BTreeSet<Vni>,
    ) {
        if !std::mem::take(&mut self.stale) {
            return;
        }
        let (records, ports) = agent
            .state
            .read(|state| (state.endpoints.clone(), state.service_ports.clone()));
        let ingress = member.services.ingress_network();
        for (name, container) in &mut self.containers {
            let own = || {
                let records = records.iter();
                records.filter(|record| record.container == *name && record.standing.is_whole())
            };
            let has_ingress = || own().any(|record| record.ifname == MEMBER_INTERFACE);
            let Some((record, membership)) = own().find_map(|record| {
                let membership = record.member?;
                (Some(record.vni) != ingress).then_some((record, membership))
            }) else {
                container.follow_ports(agent, name, &ports, Vec::new());
                if container.started && has_ingress() {
                    leave_ingress(agent, name);
                }
                continue;
            };
            let mut known = services.of(record.vni);
            let Some(service) = known.find(|service| service.epoch == membership.service) else {
                if complete.contains(&record.vni) {
                    container.checked = None;
                    container.follow_ports(agent, name, &ports, Vec::new());
                    publish(agent, member, name, |_| None);
                    if has_ingress() {
                        leave_ingress(agent, name);
                    }
                }
                continue;
            };
            container.check(agent, member, name, record, membership, service);
            container.follow_ports(agent, name, &ports, of_service(service));
            let serving = container.started
                && !container.draining
                && (container.checked.is_none() || container.healthy == Some(true));
            publish(agent, member, name, |before| {
                Some(Membership { serving, ..before })
            });
            let on_ingress = own().any(|record| Some(record.vni) == ingress);
            if container.started && service.spec.uses_ingress() && ingress.is_some() && !on_ingress
            {
                ingress::attach_member(agent, name, membership.service, membership.weight);
            }
        }
    }
}

impl Container {
    /// Sees to it that a running container has the ports that its service asks for, and no others by it.
    fn follow_ports(
        &mut self,
        agent: &Arc<Agent>,
        name: &str,
        known: &BTreeMap<String, Vec<ServicePort>>,
        wanted: Vec<Publish>,
    ) {
        let known = known.get(name).map_or(&[][..], Vec::as_slice);
        let same =
            wanted.len() == known.len() && known.iter().all(|known| wanted.contains(&known.asked));
        if same {
            self.ports.problem = None;
        } else if self.started && !self.draining && !self.ports.following {
            self.ports.following = true;
            follow_service(agent, name, wanted);
        }
    }

    /// Sees to it that what the service asks for is checked, and nothing else.
    fn check(
        &mut self,
        agent: &Agent,
        member: &Arc<Member>,
        name: &str,
        record: &EndpointRecord,
        membership: Membership,
        service: &Service,
    ) {
        let wanted = service
            .spec
            .health
            .as_ref()
            .filter(|_| self.started && !self.draining);
        match (&self.checked, wanted) {
            (None, None) => return,
            (Some((check, Some(_))), Some(wanted)) if check == wanted => return,
            _ => {}
        }
        let Some(check) = wanted else {
            self.checked = None;
            self.healthy = None;
            return;
        };
        // A member that was healthy is so until a check says otherwise.
        if self.healthy.is_none() && membership.serving {
            self.healthy = Some(true);
        }
        let healthy = self.healthy == Some(true);
        let started = start(agent, member, name, record, check, healthy);
        self.problem = started
            .as_ref()
            .err()
            .map(|error| format!("container {name}: its health cannot be checked: {error:#}"));
        self.checked = Some((check.clone(), started.ok()));
    }
}

fn start(
    agent: &Agent,
    member: &Arc<Member>,
    name: &str,
    record: &EndpointRecord,
    check: &HealthCheck,
    healthy: bool,
) -> anyhow::Result<Checker> {
    let address = record.ips.first().copied();
    let target = HealthTarget {
        netns: Netns::open(name)?,
        ip: address.unwrap_or(IpAddr::from([127, 0, 0, 1])),
        command: Box::new(command(name.to_owned(), agent.config.socket.clone())),
    };
    // Not the member itself: a check must not keep alive what ends it.
    let (work, name) = (member.services.work.clone(), name.to_owned());
    let on_change = move |healthy: bool, why: &str| {
        let _ = work.send(Work::Health {
            name: name.clone(),
            healthy,
            why: why.to_owned(),
        });
    };
    Ok(Checker::start(
        check.clone(),
        target,
        healthy,
        Box::new(on_change),
    )?)
}

/// Runs a command in a container, as `towline exec` does: that is who knows how.
fn command(
    name: String,
    socket: PathBuf,
) -> impl Fn(&[String], Duration) -> Result<(), String> + Send {
    move |words, limit| {
        let mut child = Command::new("/proc/self/exe")
            .arg("--socket")
            .arg(&socket)
            .args(["exec", &name, "--"])
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // What the command starts must end with it: the next check would start it again.
            .process_group(0)
            .spawn()
            .map_err(|error| format!("the command cannot be started ({error})"))?;
        let deadline = Instant::now() + limit;
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(format!("the command ended with {status}")),
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Ok(None) => {
                    let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
                    let _ = child.wait();
                    return Err(format!("the command took longer than {limit:?}"));
                }
                Err(error) => return Err(format!("the command cannot be waited for ({error})")),
            }
        }
    }
}

/// Says of a container's places what `change` makes of their membership; what is as it was is not said again.
fn publish(
    agent: &Agent,
    member: &Member,
    name: &str,
    change: impl Fn(Membership) -> Option<Membership>,
) {
    let differs = |record: &EndpointRecord| {
        record.container == name
            && record.standing.is_whole()
            && record
                .member
                .is_some_and(|before| change(before) != Some(before))
    };
    let any = agent
        .state
        .read(|state| state.endpoints.iter().any(differs));
    if !any {
        return;
    }
    let changed = agent.state.update(|state| {
        let records = state.endpoints.iter_mut().filter(|record| differs(record));
        records
            .map(|record| {
                record.member = record.member.and_then(&change);
                record.clone()
            })
            .collect::<Vec<_>>()
    });
    match changed {
        Ok(changed) => {
            for record in changed {
                member.control.publish(record.endpoint(), EndpointState::Up);
            }
        }
        Err(error) => tracing::warn!("container {name}: what it serves cannot be kept: {error:#}"),
    }
}
