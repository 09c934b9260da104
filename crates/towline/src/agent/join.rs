//! `init`, `join` and `leave`: how a host comes into a cluster and goes out of it.
//!
//! All is checked before anything of the host is changed; what a failing step
//! has begun is taken back.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bridge::Gateway;
use control::{Authority, HostId, Request, Response, Role, Token, WallClock};
use vtep::vxlan::DEFAULT_PORT;

use super::keys::{self, Keys};
use super::membership::Parts;
use super::network::unexpected;
use super::state::Membership;
use super::{
    Agent, container, ingress, manager, neighbors, news, path, port, static_mode, survey, trust,
    underlay,
};
use crate::api::{Init, Initialized, Join, Joined};

const CONNECT_WITHIN: Duration = Duration::from_secs(3);
const ADMITTED_WITHIN: Duration = Duration::from_secs(5);

/// Said wherever a cluster is made or joined, until the data path is encrypted.
pub(super) const NOT_ENCRYPTED: &str =
    "containers' frames (UDP) are not encrypted: use an underlay that you trust";

/// Makes this host the first of a cluster.
pub(super) fn init(agent: &Arc<Agent>, wanted: &Init) -> anyhow::Result<Initialized> {
    let _changing = agent.changing();
    in_no_cluster(agent)?;
    let port = wanted.port.unwrap_or(DEFAULT_PORT);
    port::check(port)?;
    let underlay = underlay::settle(&agent.netns, wanted.advertise, None)?;
    let manager = SocketAddr::new(underlay.vtep, port);
    let unix = WallClock::default().unix();
    let authority = match &wanted.ca {
        Some(path) => keys::import(path)?,
        None => Authority::create(unix)?,
    };
    let host = agent.state.read(|state| state.host);
    let keys = Keys {
        identity: Arc::new(authority.issue(host, Role::Manager, unix, agent.config.cert_expiry)?),
        authority: Some(Arc::new(authority)),
    };
    let settled = Membership {
        manager: true,
        managers: vec![manager],
        vtep: underlay.vtep,
        port,
        control_port: port,
        link_mtu: underlay.link_mtu,
        pools: wanted.pools.clone(),
    };
    // A store that an aborted `init` may have left would bring back another cluster.
    manager::remove_store(agent)?;
    let entered = Parts::start(agent, settled, keys).and_then(|parts| {
        parts
            .control
            .wait_connected(ADMITTED_WITHIN)
            .context("this host's own manager does not take it in")?;
        enter(agent, parts)
    });
    if let Err(error) = entered {
        manager::remove_store(agent)?;
        return Err(error);
    }
    let token = trust::worker_token(&*agent.member()?)?;
    Ok(Initialized {
        host: host.to_string(),
        token: token.token,
        manager: manager.to_string(),
        join_command: token.join_command,
        warnings: vec![NOT_ENCRYPTED.to_owned()],
    })
}

/// Makes this host one of an existing cluster.
pub(super) fn join(agent: &Arc<Agent>, wanted: &Join) -> anyhow::Result<Joined> {
    let _changing = agent.changing();
    in_no_cluster(agent)?;
    let token: Token = wanted.token.parse()?;
    let port = wanted.port.unwrap_or(DEFAULT_PORT);
    port::check(port)?;
    let mut managers = Vec::new();
    for text in &wanted.managers {
        managers.push(resolve(text)?);
    }
    let first = reach(&managers)?;
    let underlay = underlay::settle(&agent.netns, wanted.advertise, Some(first))?;
    if first.is_ipv4() != underlay.vtep.is_ipv4() {
        bail!(
            "{} and the manager {} are of different IP versions: give --advertise an address of the manager's",
            underlay.vtep,
            first.ip()
        );
    }
    let identity = control::join(&managers, &token, underlay.vtep)?;
    let keys = Keys {
        identity: Arc::new(identity),
        authority: None,
    };
    let settled = Membership {
        manager: false,
        managers,
        vtep: underlay.vtep,
        port,
        control_port: 0,
        link_mtu: underlay.link_mtu,
        pools: Vec::new(),
    };
    let parts = Parts::start(agent, settled, keys)?;
    let cluster = parts.control.wait_connected(ADMITTED_WITHIN)?;
    let tested = test_path(&parts, cluster.manager);
    let path_mtu = match tested {
        Ok(path_mtu) => path_mtu,
        Err(error) => {
            parts.withdraw();
            return Err(error);
        }
    };
    enter(agent, parts)?;
    let mut warnings = cluster.warnings;
    warnings.extend(path::narrow_path(
        path_mtu,
        underlay.link_mtu,
        underlay.vtep,
    ));
    warnings.push(NOT_ENCRYPTED.to_owned());
    Ok(Joined {
        host: agent.state.read(|state| state.host).to_string(),
        manager: cluster.address.to_string(),
        path_mtu,
        warnings,
    })
}

fn in_no_cluster(agent: &Agent) -> anyhow::Result<()> {
    if let Some(file) = &agent.config.static_tables {
        bail!(
            "this agent is in static mode, its tables come from {}: start it without --static to make it part of a cluster",
            file.display()
        );
    }
    if let Ok(member) = agent.member() {
        bail!(
            "this host is in a cluster already (manager {}): run 'towline leave' first",
            member
                .settled
                .managers
                .iter()
                .map(SocketAddr::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        );
    }
    Ok(())
}

/// The last steps: the gateway bridge, and the state file that makes all this last.
fn enter(agent: &Arc<Agent>, parts: Parts) -> anyhow::Result<()> {
    let (settled, keys) = (parts.settled.clone(), parts.keys.clone());
    let host = keys.identity.certificate().host;
    let member = match parts.finish(agent) {
        Ok(member) => Arc::new(member),
        Err((parts, error)) => {
            parts.withdraw();
            return Err(error);
        }
    };
    // The keys first: a membership without them would be of no use.
    let kept = keys.save(&agent.config).and_then(|()| {
        agent.state.update(|state| {
            state.membership = Some(settled);
            state.host = host;
        })
    });
    if let Err(error) = kept {
        member.withdraw();
        drop(member);
        Gateway::remove(&agent.netns)?;
        keys::remove(&agent.config)?;
        return Err(error);
    }
    neighbors::raise(agent);
    news::start(agent, &member)?;
    survey::start(&member)?;
    agent.set_member(Some(member));
    Ok(())
}

fn test_path(parts: &Parts, manager: HostId) -> anyhow::Result<u16> {
    let Response::Hosts(hosts) = parts.control.request(Request::Hosts)? else {
        return Err(unexpected());
    };
    let view = hosts.into_iter().find(|view| view.info.id == manager);
    let view =
        view.context("the manager's own host is not in its cluster: start 'towline agent' there")?;
    let at = SocketAddr::new(view.info.vtep, view.info.port);
    let own = SocketAddr::new(parts.settled.vtep, parts.settled.port);
    let link_mtu = parts.settled.link_mtu;
    let path_mtu = path::probe(&parts.control, &parts.datapath, own, at, link_mtu)?;
    let narrow = Some(path_mtu).filter(|&path_mtu| path_mtu < link_mtu);
    parts
        .datapath
        .paths()
        .measured(at.ip(), narrow, Instant::now());
    Ok(path_mtu)
}

/// An address, an address and port, or a name with or without port.
fn resolve(text: &str) -> anyhow::Result<SocketAddr> {
    if let Ok(addr) = text.parse::<IpAddr>() {
        return Ok((addr, DEFAULT_PORT).into());
    }
    if let Ok(addr) = text.parse::<SocketAddr>() {
        return Ok(addr);
    }
    let found = if text.contains(':') {
        text.to_socket_addrs()
    } else {
        (text, DEFAULT_PORT).to_socket_addrs()
    };
    found
        .with_context(|| format!("cannot find the manager '{text}': give HOST or HOST:PORT, with an address or a name"))?
        .next()
        .with_context(|| format!("the name '{text}' has no address"))
}

/// The first manager that takes a TCP connection.
fn reach(managers: &[SocketAddr]) -> anyhow::Result<SocketAddr> {
    let mut causes = Vec::new();
    for &manager in managers {
        match TcpStream::connect_timeout(&manager, CONNECT_WITHIN) {
            Ok(_) => return Ok(manager),
            Err(error) => causes.push(why_unreachable(manager, &error)),
        }
    }
    bail!("{}", causes.join("; "))
}

fn why_unreachable(manager: SocketAddr, error: &std::io::Error) -> String {
    let (ip, port) = (manager.ip(), manager.port());
    match error.kind() {
        ErrorKind::ConnectionRefused => format!(
            "{ip} refuses TCP port {port}: run 'towline init' there, or give the port that its 'towline status' shows"
        ),
        ErrorKind::TimedOut | ErrorKind::WouldBlock => format!(
            "{ip} does not answer on TCP port {port}: check the address, and let TCP and UDP port {port} in there"
        ),
        _ => format!(
            "cannot reach TCP port {port} of {ip} ({error}): check the address and this host's routes"
        ),
    }
}

/// Takes this host out of its cluster and undoes what the agent made on it.
pub(super) fn leave(agent: &Arc<Agent>, force: bool) -> anyhow::Result<()> {
    let _changing = agent.changing();
    let member = agent.member()?;
    let running = container::names(agent)?;
    if !running.is_empty() && !force {
        bail!(
            "containers run here ({}): remove them with 'towline rm -f', or run 'towline leave --force'",
            running.join(", ")
        );
    }
    if member.runs_manager() && !force {
        let Response::Hosts(hosts) = member.control.request(Request::Hosts)? else {
            return Err(unexpected());
        };
        let others: Vec<String> = hosts
            .into_iter()
            .filter(|view| view.info.id != member.host.id)
            .map(|view| view.info.name)
            .collect();
        if !others.is_empty() {
            bail!(
                "this manager still has hosts ({}): run 'towline leave' on them first, or 'towline leave --force' here",
                others.join(", ")
            );
        }
    }
    container::remove_all(agent)?;
    static_mode::remove_ports(agent, &member)?;
    ingress::remove(agent, &member)?;
    if !member.runs_manager()
        && let Err(error) = member.control.request(Request::Leave)
    {
        if !force {
            return Err(error).context(
                "the manager does not know that this host leaves; 'towline leave --force' leaves all the same, \
                 then run 'towline host rm' for it on another host",
            );
        }
        tracing::warn!("left without the manager's knowledge: {error}");
    }
    drop(member);
    agent.state.update(|state| {
        state.membership = None;
        state.networks.clear();
        state.endpoints.clear();
        state.attachments.clear();
        // The manager forgets a host for good, so the next cluster meets a new one.
        state.host = HostId::random();
    })?;
    agent.stop_member();
    agent.containers.forget_unsent();
    let removed = Gateway::remove(&agent.netns);
    let restored = neighbors::restore(agent);
    keys::remove(&agent.config)?;
    manager::remove_store(agent)?;
    remove_tables(agent)?;
    removed?;
    restored
}

/// What was known of a cluster goes with it.
fn remove_tables(agent: &Agent) -> anyhow::Result<()> {
    let file = agent.tables_file();
    match fs::remove_file(&file) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", file.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn managers_are_addresses_with_or_without_port() {
        let at = |text: &str| resolve(text).expect(text).to_string();
        assert_eq!(at("192.0.2.1"), "192.0.2.1:4789");
        assert_eq!(at("192.0.2.1:5000"), "192.0.2.1:5000");
        assert_eq!(at("2001:db8::1"), "[2001:db8::1]:4789");
        assert_eq!(at("[2001:db8::1]:5000"), "[2001:db8::1]:5000");
        for bad in ["", "192.0.2.1:", "192.0.2.1:99999", "a b"] {
            assert!(resolve(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_refused_connection_names_port_and_next_step() {
        // Bound and dropped: nobody listens there now.
        let free = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|socket| socket.local_addr())
            .expect("port");
        let error = reach(&[free]).expect_err("refused").to_string();
        assert!(
            error.contains(&free.port().to_string()) && error.contains("towline init"),
            "{error}"
        );
    }
}
