//! How much one port or one remote may cause: copies of flooded frames, or errors.
//!
//! A token bucket in one word, which all workers draw from without a lock: the moment at which the bucket will be full again
//! (the "theoretical arrival time" of ITU-T I.371, Annex A). It is made with its port or remote and lives in the tables beside it,
//! so that a container gets its budget once, however many queues its interface has.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::Serialize;

/// How fast, and how much at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Limit {
    /// Tokens a second in the long run; at least one.
    pub rate: u32,
    /// Tokens after a silence.
    pub burst: u32,
}

/// The budget of one port or remote; full at first.
#[derive(Debug, Default)]
pub struct Budget {
    /// When it was first drawn from.
    start: OnceLock<Instant>,
    /// When it will be full again, in nanoseconds after `start`.
    full_at: AtomicU64,
}

impl Budget {
    /// Takes `tokens` out of the budget, or nothing when it holds fewer. What needs more than the whole burst is let through by a full
    /// budget and empties it. Time that goes back gives nothing.
    pub fn take(&self, tokens: usize, limit: Limit, now: Instant) -> bool {
        let nanos = |tokens: u32| u64::from(tokens) * 1_000_000_000 / u64::from(limit.rate.max(1));
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX).min(limit.burst);
        let start = *self.start.get_or_init(|| now);
        // 584 years.
        let now =
            u64::try_from(now.saturating_duration_since(start).as_nanos()).unwrap_or(u64::MAX);
        let latest = now.saturating_add(nanos(limit.burst));
        self.full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
                let full_at = full_at.max(now).saturating_add(nanos(tokens));
                (full_at <= latest).then_some(full_at)
            })
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn many_threads_share_one_budget() {
        let (budget, now) = (Budget::default(), Instant::now());
        let limit = Limit {
            rate: 10,
            burst: 1_000,
        };
        let taken: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..1_000).filter(|_| budget.take(1, limit, now)).count()))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        });
        assert_eq!(taken, 1_000);
    }

    #[test]
    fn no_burst_lets_nothing_through_that_costs() {
        let (budget, now) = (Budget::default(), Instant::now());
        let limit = Limit { rate: 0, burst: 1 };
        assert!(budget.take(0, limit, now));
        assert!(budget.take(5, limit, now));
        assert!(!budget.take(1, limit, now + Duration::from_millis(999)));
        assert!(budget.take(1, limit, now + Duration::from_secs(1)));
    }

    proptest! {
        /// Whatever comes when, no more than the burst and the rate allow gets through, and a silence of a burst fills it.
        #[test]
        fn never_more_than_rate_and_burst(
            steps in proptest::collection::vec((0u64..50_000_000, 0usize..20), 1..200),
            rate in 1u32..5_000,
            burst in 1u32..500,
        ) {
            let (budget, start) = (Budget::default(), Instant::now());
            let limit = Limit { rate, burst };
            let (mut now, mut passed) = (start, 0u64);
            for (nanos, tokens) in steps {
                now += Duration::from_nanos(nanos);
                if budget.take(tokens, limit, now) {
                    passed += (tokens as u64).min(u64::from(burst));
                }
                // Costs are rounded down, by less than a nanosecond each.
                let seconds = (now - start).as_secs_f64() + 1e-6;
                let most = f64::from(burst) + seconds * f64::from(rate);
                prop_assert!(passed as f64 <= most, "{passed} tokens, at most {most}");
            }
            let later = now + Duration::from_secs(1) * burst.div_ceil(rate);
            prop_assert!(budget.take(burst as usize, limit, later));
        }
    }
}
