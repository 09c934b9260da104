//! A host of a cluster made of the libraries alone: it does what no program does, such as as many changes a second as a manager takes.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::{
    AgentConfig, AgentHandle, HostInfo, Request, RequestError, Response, Token, WallClock,
};
use netns::Netns;

/// For all that waits for a manager, on a slow machine too.
const PATIENCE: Duration = Duration::from_secs(60);

/// Joins the cluster as a host of this name and VTEP address, in `netns`, and connects: control's side of an agent.
///
/// # Panics
/// When the manager does not take it in.
#[must_use]
pub fn connect(
    netns: &Netns,
    name: &str,
    vtep: IpAddr,
    manager: SocketAddr,
    token: &str,
) -> AgentHandle {
    let token: Token = token.parse().expect("the token that init printed");
    let start = || {
        let identity = control::join(&[manager], &token, vtep).expect("the manager signs");
        AgentHandle::start(AgentConfig {
            host: HostInfo {
                id: identity.certificate().host,
                name: name.to_owned(),
                vtep,
                port: 4789,
                link_mtu: 1500,
                incarnation: 1,
            },
            managers: vec![manager],
            identity: Arc::new(identity),
            bind: vtep,
            endpoints: Vec::new(),
            cache: None,
            clock: WallClock::default(),
        })
        .expect("a thread")
    };
    let agent = netns.run(start).expect("a running test's namespace");
    agent
        .wait_connected(PATIENCE)
        .expect("the manager takes it in");
    agent
}

/// Asks until the manager answers: what has no answer may have been done or not, and is asked again.
///
/// # Errors
/// What the manager says no with.
///
/// # Panics
/// When no manager answers for a minute.
pub fn ask(agent: &AgentHandle, request: &Request) -> Result<Response, String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match agent.request(request.clone()) {
            Ok(response) => return Ok(response),
            Err(RequestError::Refused(reason)) if !reason.contains("has just started") => {
                return Err(reason);
            }
            Err(error) => assert!(Instant::now() < deadline, "{request:?}: {error}"),
        }
    }
}
