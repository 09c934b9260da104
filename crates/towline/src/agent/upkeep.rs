//! Looks every few seconds after what other programs may have broken.

use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;

use super::Agent;

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
    let mut last_problem = None;
    loop {
        thread::sleep(EVERY);
        let Some(agent) = agent.upgrade() else { return };
        let Ok(member) = agent.member() else {
            last_problem = None;
            continue;
        };
        let repaired = member.gateway().repair();
        let problem = match repaired {
            Ok(repair) => {
                if !repair.is_empty() {
                    tracing::warn!("put back on the gateway bridge: {repair}");
                }
                None
            }
            Err(error) => Some(error.to_string()),
        };
        // Said once, not every five seconds.
        if problem != last_problem
            && let Some(problem) = &problem
        {
            tracing::warn!("the gateway bridge needs help: {problem}");
        }
        last_problem = problem;
    }
}
