//! The judgement on a member: pure, told the time.

use std::time::Duration;

use control::service::HealthCheck;

/// How often a member is asked that was never healthy, at least: it should not wait for a long interval to serve.
const WHILE_STARTING: Duration = Duration::from_secs(1);
/// For how long it is asked so often, where its start period is not longer.
const STARTING: Duration = Duration::from_secs(60);

/// What is known of one member's health.
#[derive(Clone, Debug)]
pub struct Health {
    interval: Duration,
    retries: u32,
    start_period: Duration,
    healthy: bool,
    ever_healthy: bool,
    failures: u32,
}

impl Health {
    /// Of a member that is `healthy` as far as is known; one that has just started is not.
    #[must_use]
    pub fn new(check: &HealthCheck, healthy: bool) -> Self {
        Self {
            interval: Duration::from_millis(check.interval.max(1).into()),
            retries: check.retries.max(1),
            start_period: Duration::from_millis(check.start_period.into()),
            healthy,
            ever_healthy: healthy,
            failures: 0,
        }
    }

    /// Whether it is healthy.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.healthy
    }

    /// What a try found that ended `age` after the member's start. `Some`: the member has turned healthy, or unhealthy.
    ///
    /// One success makes it healthy. As many failures in a row as the check says make it unhealthy; those within the start
    /// period count only after the first success.
    pub fn judge(&mut self, age: Duration, success: bool) -> Option<bool> {
        if success {
            self.failures = 0;
            self.ever_healthy = true;
            return (!std::mem::replace(&mut self.healthy, true)).then_some(true);
        }
        if !self.ever_healthy && age < self.start_period {
            return None;
        }
        self.failures = self.failures.saturating_add(1);
        let over = self.failures >= self.retries;
        (over && std::mem::replace(&mut self.healthy, false)).then_some(false)
    }

    /// How long to wait for the next try, `age` after the member's start.
    #[must_use]
    pub fn next_try(&self, age: Duration) -> Duration {
        if !self.ever_healthy && age < self.start_period.max(STARTING) {
            self.interval.min(WHILE_STARTING)
        } else {
            self.interval
        }
    }
}

#[cfg(test)]
mod tests {
    use control::service::HealthTest;
    use proptest::prelude::*;

    use super::*;

    fn check(retries: u32, start_period: u32) -> HealthCheck {
        HealthCheck {
            test: HealthTest::Tcp { port: 80 },
            interval: 30_000,
            timeout: 1_000,
            retries,
            start_period,
        }
    }

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn one_success_is_healthy_and_several_failures_are_not() {
        let mut health = Health::new(&check(3, 0), false);
        assert_eq!(health.judge(at(1), false), None, "it was not healthy yet");
        assert_eq!(health.judge(at(2), true), Some(true));
        assert_eq!(health.judge(at(3), true), None);
        assert_eq!(health.judge(at(4), false), None);
        assert_eq!(health.judge(at(5), false), None);
        assert_eq!(health.judge(at(6), true), None, "not three in a row");
        for second in 7..9 {
            assert_eq!(health.judge(at(second), false), None);
        }
        assert_eq!(health.judge(at(9), false), Some(false));
        assert_eq!(health.judge(at(10), false), None, "said once");
        assert_eq!(health.judge(at(11), true), Some(true));
    }

    #[test]
    fn one_that_was_healthy_is_so_until_its_failures_say_otherwise() {
        let mut health = Health::new(&check(2, 10_000), true);
        assert!(health.is_healthy());
        assert_eq!(health.judge(at(1), true), None);
        assert_eq!(health.judge(at(2), false), None);
        assert_eq!(health.judge(at(3), false), Some(false));
    }

    #[test]
    fn failures_count_from_the_end_of_the_start_period_or_the_first_success() {
        let mut health = Health::new(&check(1, 10_000), false);
        assert_eq!(health.next_try(at(1)), at(1), "it may serve soon");
        assert_eq!(health.next_try(at(60)), at(30), "it may never");
        assert_eq!(health.judge(at(5), false), None);
        assert_eq!(health.judge(at(6), true), Some(true));
        assert_eq!(health.next_try(at(6)), at(30));
        assert_eq!(health.judge(at(7), false), Some(false));
    }

    proptest! {
        #[test]
        fn what_is_said_is_what_it_is_and_never_said_twice(retries in 0..5_u32, start in 0..20_000_u32, found: Vec<bool>) {
            let mut health = Health::new(&check(retries, start), false);
            let mut said = false;
            for (second, success) in (0..).zip(found) {
                if let Some(now) = health.judge(at(second), success) {
                    prop_assert_ne!(now, said);
                    said = now;
                }
                prop_assert_eq!(health.is_healthy(), said);
                prop_assert!(!success || said);
            }
        }
    }
}
