//! What tests over real sockets share.

use std::time::{Duration, Instant};

use control::{AgentHandle, Event};

/// Takes events until one fits.
///
/// # Panics
/// When none has within `patience`.
pub(crate) fn await_event<T>(
    agent: &AgentHandle,
    patience: Duration,
    what: &str,
    mut fits: impl FnMut(Event) -> Option<T>,
) -> T {
    let deadline = Instant::now() + patience;
    loop {
        let event = agent
            .events()
            .recv_deadline(deadline)
            .unwrap_or_else(|_| panic!("no {what}"));
        if let Some(found) = fits(event) {
            return found;
        }
    }
}
