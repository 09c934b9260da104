//! Refusals of connections: told to who is refused, and to the log, but not so often that strangers fill it.

use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Instant;

use super::lock;
use crate::limits::{REFUSALS_LOGGED, REFUSALS_WINDOW};
use crate::message::ToAgent;

/// The log is the process's, and so is how much of it strangers may fill.
static LOGGED: Mutex<Sparing> = Mutex::new(Sparing::new());

/// The refusal to send, told in the log too.
pub(super) fn reject(reason: String, from: IpAddr) -> ToAgent {
    if let Some(left_out) = lock(&LOGGED).line(Instant::now()) {
        if left_out > 0 {
            tracing::warn!(
                "{left_out} more refusals in {} s were not told here",
                REFUSALS_WINDOW.as_secs()
            );
        }
        tracing::warn!(%from, %reason, "refused a connection");
    }
    ToAgent::Reject {
        reason,
        removed: false,
    }
}

/// Counts lines within a window of time.
struct Sparing {
    start: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl Sparing {
    const fn new() -> Self {
        Self {
            start: None,
            lines: 0,
            left_out: 0,
        }
    }

    /// Whether a line may be written now: if so, how many were left out in the window before, once.
    fn line(&mut self, now: Instant) -> Option<u64> {
        let over = |start: Instant| now.saturating_duration_since(start) >= REFUSALS_WINDOW;
        if self.start.is_none_or(over) {
            (self.start, self.lines) = (Some(now), 0);
        }
        if self.lines == REFUSALS_LOGGED {
            self.left_out += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn strangers_do_not_fill_the_log_and_nothing_is_left_out_in_silence() {
        let mut sparing = Sparing::new();
        let start = Instant::now();
        for _ in 0..REFUSALS_LOGGED {
            assert_eq!(sparing.line(start), Some(0));
        }
        for _ in 0..1_000 {
            assert_eq!(sparing.line(start + Duration::from_secs(1)), None);
        }
        let next = start + REFUSALS_WINDOW;
        assert_eq!(sparing.line(next), Some(1_000));
        assert_eq!(sparing.line(next), Some(0));
    }
}
