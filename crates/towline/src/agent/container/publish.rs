//! Ports of this host that are a container's own: those of `run --publish`, and ports of `mode=host` of its service.
//!
//! They lead through the gateway bridge and last as long as the container. A service's ports of this mode are opened for members that
//! start after they were published.

use std::net::{Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

use anyhow::{Context as _, bail};
use bridge::{BridgeError, HostPort, On};
use control::service::{Protocol, Publish, PublishMode, PublishOn};

use super::Agent;
use crate::agent::Member;
use crate::agent::state::AttachmentRecord;

/// Opens `ports` for the container `name`, all or none, and remembers them. `false`: they are kept for when it has a way out.
///
/// # Errors
/// When one is taken, by whom, and what the kernel refused.
pub(super) fn open(
    agent: &Agent,
    member: &Member,
    name: &str,
    ports: &[Publish],
) -> anyhow::Result<bool> {
    if ports.is_empty() {
        return Ok(true);
    }
    let mut wanted = Vec::new();
    for port in ports {
        let port = chosen(agent, port)?;
        check(member, &port)?;
        wanted.push(port);
    }
    let record = agent.state.update(|state| {
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
pub(super) fn of_service(service: &control::service::Service) -> Vec<Publish> {
    let ports = service.spec.publish.iter();
    ports
        .filter(|port| port.mode == PublishMode::Host)
        .cloned()
        .collect()
}
