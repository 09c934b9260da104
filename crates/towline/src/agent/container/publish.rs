//! Ports of this host that are a container's own: those of `run --publish`, and ports of `mode=host` of its service.
//!
//! They lead through the gateway bridge and last as long as the container, those of its service as long as that asks for them:
//! [`follow`] opens and closes ports of members that run.

use std::net::{Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use bridge::{BridgeError, HostPort, On};
use control::service::{Protocol, Publish, PublishMode, PublishOn};

use super::{Agent, in_background, locked};
use crate::agent::Member;
use crate::agent::state::{AttachmentRecord, ServicePort};

/// Opens `ports` for the container `name`, and those of its service, all or none, and remembers them. `false`: they are kept for when
/// it has a way out.
///
/// # Errors
/// When one is taken, by whom, and what the kernel refused.
pub(super) fn open(
    agent: &Agent,
    member: &Member,
    name: &str,
    ports: &[Publish],
    service: &[Publish],
) -> anyhow::Result<bool> {
    if ports.is_empty() && service.is_empty() {
        return Ok(true);
    }
    let mut wanted = Vec::new();
    for port in ports {
        let port = chosen(agent, port)?;
        check(member, &port)?;
        wanted.push(port);
    }
    let mut of_service = Vec::new();
    for asked in service {
        let port = chosen(agent, asked)?;
        check(member, &port)?;
        of_service.push(ServicePort {
            asked: asked.clone(),
            port: port.clone(),
        });
        wanted.push(port);
    }
    let record = agent.state.update(|state| {
        if !of_service.is_empty() {
            state.service_ports.insert(name.to_owned(), of_service);
        }
        let mut records = state.attachments.iter_mut();
        let Some(record) = records.find(|record| record.container == name) else {
            state.closed_ports.insert(name.to_owned(), wanted);
            return None;
        };
        record.publish = wanted;
        state.closed_ports.remove(name);
        Some(record.clone())
    })?;
    match record {
        Some(record) => reopen(agent, member, &record).map(|()| true),
        None => Ok(false),
    }
}

/// Opens what a container has, as after a restart of the agent.
///
/// # Errors
/// When another container has one of the ports, and what the kernel refused.
pub(super) fn reopen(
    agent: &Agent,
    member: &Member,
    record: &AttachmentRecord,
) -> anyhow::Result<()> {
    let ports: Vec<HostPort> = record.publish.iter().filter_map(host_port).collect();
    let opened = member.gateway().publish(&record.host_ifname, &ports);
    match opened {
        Err(BridgeError::PortTaken { port, holder }) => {
            let holder = agent.state.read(|state| {
                let mut records = state.attachments.iter();
                let record = records.find(|record| record.host_ifname == holder);
                record.map_or(holder.clone(), |record| record.container.clone())
            });
            bail!("port {port} is already in use by container {holder}: publish another")
        }
        opened => Ok(opened?),
    }
}

/// Brings the ports that a running container has by its service to those that it asks for now: what is asked for no more is closed with its
/// connections, and what is new is opened. What is the container's own by `run --publish` stays. The container's lock is held.
///
/// # Errors
/// Which ports could not be had, and why; all others are as they should be then.
fn follow(agent: &Agent, member: &Member, name: &str, wanted: &[Publish]) -> anyhow::Result<()> {
    let (kept, gone): (Vec<ServicePort>, Vec<ServicePort>) = agent
        .state
        .read(|state| state.service_ports.get(name).cloned())
        .unwrap_or_default()
        .into_iter()
        .partition(|known| wanted.contains(&known.asked));
    // Before others are opened: one may be the same port, asked for in another way.
    if !gone.is_empty() {
        close(agent, member, name, &gone)?;
    }
    let has = |asked: &&Publish| !kept.iter().any(|known| known.asked == **asked);
    let mut problems = Vec::new();
    for asked in wanted.iter().filter(has) {
        if let Err(error) = add(agent, member, name, asked) {
            problems.push(format!("{error:#}"));
        }
    }
    if !problems.is_empty() {
        bail!("{}", problems.join("; "));
    }
    Ok(())
}

/// As [`follow`], by a thread of its own, which tells services what came of it.
pub(in crate::agent) fn follow_service(agent: &Arc<Agent>, name: &str, wanted: Vec<Publish>) {
    let (agent, name) = (Arc::clone(agent), name.to_owned());
    in_background("service-ports", move || {
        // `leave` can't come between.
        let _changing = agent.changing();
        let Ok(member) = agent.member() else { return };
        let followed = locked(&agent, &name, || follow(&agent, &member, &name, &wanted));
        let problem = followed.err().map(|error| format!("{error:#}"));
        member.services.ports_followed(&name, problem);
    });
}

/// Opens one more port for a container, by its service.
fn add(agent: &Agent, member: &Member, name: &str, asked: &Publish) -> anyhow::Result<()> {
    let port = chosen(agent, asked)?;
    refuse_taken(agent, &port)?;
    check(member, &port)?;
    let record = agent.state.update(|state| {
        let known = state.service_ports.entry(name.to_owned()).or_default();
        known.push(ServicePort {
            asked: asked.clone(),
            port: port.clone(),
        });
        let mut records = state.attachments.iter_mut();
        if let Some(record) = records.find(|record| record.container == name) {
            record.publish.push(port.clone());
            return Some(record.clone());
        }
        let closed = state.closed_ports.entry(name.to_owned()).or_default();
        closed.push(port.clone());
        None
    })?;
    if let Some(record) = record
        && let Err(error) = reopen(agent, member, &record)
    {
        agent.state.update(|state| state.forget_port(name, &port))?;
        return Err(error);
    }
    Ok(())
}

/// Closes ports that a container had by its service.
fn close(agent: &Agent, member: &Member, name: &str, gone: &[ServicePort]) -> anyhow::Result<()> {
    let host_ifname = agent.state.update(|state| {
        for known in gone {
            state.forget_port(name, &known.port);
        }
        let mut records = state.attachments.iter();
        let record = records.find(|record| record.container == name);
        record.map(|record| record.host_ifname.clone())
    })?;
    if let Some(host_ifname) = host_ifname {
        let ports = gone.iter().filter_map(|known| host_port(&known.port));
        let ports: Vec<HostPort> = ports.collect();
        member.gateway().close(&host_ifname, &ports)?;
    }
    // A service may have them on every host now.
    member.services.host_changed();
    Ok(())
}

/// Takes no new connections by the ports that a container has by its service: it is about to leave that.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn drain(agent: &Agent, member: &Member, name: &str) -> anyhow::Result<()> {
    let (known, host_ifname) = agent.state.read(|state| {
        let mut records = state.attachments.iter();
        let record = records.find(|record| record.container == name);
        let known = state.service_ports.get(name).cloned();
        (known, record.map(|record| record.host_ifname.clone()))
    });
    if let (Some(known), Some(host_ifname)) = (known, host_ifname) {
        let ports = known.iter().filter_map(|known| host_port(&known.port));
        let ports: Vec<HostPort> = ports.collect();
        member.gateway().drain(&host_ifname, &ports)?;
    }
    Ok(())
}

/// Refuses what a container of this host has.
fn refuse_taken(agent: &Agent, port: &Publish) -> anyhow::Result<()> {
    match holder(agent, port) {
        Some(holder) => bail!(
            "port {}/{} is already in use by container {holder}: publish another",
            port.published.unwrap_or_default(),
            port.protocol
        ),
        None => Ok(()),
    }
}

/// Refuses a port that a member which runs here could not have.
///
/// # Errors
/// Who has it.
pub(in crate::agent) fn could_be(
    agent: &Agent,
    member: &Member,
    port: &Publish,
) -> anyhow::Result<()> {
    refuse_taken(agent, port)?;
    check(member, port)
}

/// The container of this host that has `publish` for its own, or a port that would be taken from it.
pub(in crate::agent) fn holder(agent: &Agent, publish: &Publish) -> Option<String> {
    agent.state.read(|state| {
        let mut records = state.attachments.iter();
        let has = |record: &&AttachmentRecord| {
            let mut ports = record.publish.iter();
            ports.any(|port| control::service::overlaps(port, publish))
        };
        records.find(has).map(|record| record.container.clone())
    })
}

/// What the gateway bridge must know of a port; none without a number.
fn host_port(port: &Publish) -> Option<HostPort> {
    Some(HostPort {
        protocol: match port.protocol {
            Protocol::Tcp => netns::nftables::Protocol::Tcp,
            Protocol::Udp => netns::nftables::Protocol::Udp,
        },
        published: port.published?,
        target: port.target,
        on: port.on.as_ref().map(|on| match on {
            PublishOn::Address(address) => On::Address(*address),
            PublishOn::Interface(name) => On::Interface(name.clone()),
        }),
    })
}

/// The port with a number: one that is free now where none was asked for.
fn chosen(agent: &Agent, port: &Publish) -> anyhow::Result<Publish> {
    if port.published.is_some() {
        return Ok(port.clone());
    }
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    let free = agent.netns.run(|| match port.protocol {
        Protocol::Tcp => TcpListener::bind(any).and_then(|socket| socket.local_addr()),
        Protocol::Udp => UdpSocket::bind(any).and_then(|socket| socket.local_addr()),
    })?;
    let free = free.context("this host has no free port")?;
    Ok(Publish {
        published: Some(free.port()),
        ..port.clone()
    })
}

/// Refuses what a service has on every host, and what a program of this host has.
fn check(member: &Member, port: &Publish) -> anyhow::Result<()> {
    let number = port.published.unwrap_or_default();
    if let Some(service) = member.services.that_publishes(port) {
        bail!(
            "port '{number}' is already in use by service '{}' ({}) as an ingress port",
            service.spec.name,
            service.id
        );
    }
    if let Err(problem) = member.services.could_publish(port) {
        bail!(
            "port {number}/{} cannot be published: {problem} on this host; stop that, or publish another port",
            port.protocol
        );
    }
    Ok(())
}

/// The ports of a service that are its members' own.
pub(in crate::agent) fn of_service(service: &control::service::Service) -> Vec<Publish> {
    let ports = service.spec.publish.iter();
    ports
        .filter(|port| port.mode == PublishMode::Host)
        .cloned()
        .collect()
}
