//! Looks every few seconds after what other programs may have broken.

use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;

use super::{Agent, container, manager, port, static_mode};

const EVERY: Duration = Duration::from_secs(5);

/// Starts looking, for as long as the agent lives.
///
/// # Errors
/// When no thread can be made.
pub(super) fn start(agent: &Arc<Agent>) -> anyhow::Result<()> {
    let agent = Arc::downgrade(agent);
    thread::Builder::new()
        .name("upkeep".into())
        .spawn(move || watch(&agent))
        .context("cannot start a thread")?;
    Ok(())
}

fn watch(agent: &Weak<Agent>) {
    let mut gateway = Gateway::default();
    loop {
        thread::sleep(EVERY);
        let Some(agent) = agent.upgrade() else { return };
        container::reconcile(&agent);
        static_mode::look(&agent);
        leave_idle_networks(&agent);
        gateway.look(&agent);
        // What had the port may have gone.
        if let Ok(member) = agent.member() {
            port::follow(&agent, &member);
            member.services.look();
        }
        manager::look(&agent);
    }
}

/// A `run` that failed half-way may have entered a network that no container is on.
fn leave_idle_networks(agent: &Agent) {
    let _changing = agent.changing();
    let Ok(member) = agent.member() else { return };
    let idle: Vec<_> = agent.state.read(|state| {
        let used = |vni| state.endpoints.iter().any(|endpoint| endpoint.vni == vni);
        state
            .networks
            .iter()
            .map(|network| network.vni)
            .filter(|&vni| !used(vni))
            .collect()
    });
    for vni in idle {
        if let Err(error) = member.leave_idle_network(agent, vni) {
            tracing::warn!("cannot leave the network with VNI {vni}: {error:#}");
        }
    }
}

/// The gateway bridge, and what was last said of it.
#[derive(Default)]
struct Gateway {
    problem: Option<String>,
}

impl Gateway {
    fn look(&mut self, agent: &Agent) {
        // `leave` takes the bridge away, and nothing may put it back then.
        let _changing = agent.changing();
        let Ok(member) = agent.member() else { return };
        let repaired = member.gateway().repair();
        let problem = match repaired {
            Ok(repair) => {
                if !repair.put_back.is_empty() {
                    tracing::warn!("put back: {}", repair.put_back.join(", "));
                }
                None
            }
            Err(error) => Some(error.to_string()),
        };
        // Said once, not every five seconds.
        if problem != self.problem
            && let Some(problem) = &problem
        {
            tracing::warn!("the gateway bridge needs help: {problem}");
        }
        self.problem = problem;
    }
}
