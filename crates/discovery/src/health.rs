//! Whether a member is well, asked from inside its own namespace, as Docker's health checks are judged.
//!
//! [`Health`] is the judgement: told what a try found, it says when the member turns healthy or unhealthy. [`Checker`] is the thread
//! that tries. A member begins unhealthy: it serves from its first success on. Failures do not count in the start period.

mod state;
mod tries;

use std::net::IpAddr;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use control::service::{HealthCheck, HealthTest};
use netns::Netns;

pub use state::Health;

/// Runs a command in a member within a time limit; says why it failed. It must end the command when the time is over.
pub type RunCommand = Box<dyn Fn(&[String], Duration) -> Result<(), String> + Send>;
/// Is told when a member turns healthy or unhealthy, and why.
pub type OnChange = Box<dyn Fn(bool, &str) + Send>;

/// Who is asked.
pub struct HealthTarget {
    /// The member's namespace. It lives for as long as the checker.
    pub netns: Netns,
    /// The member's address, for tries by TCP and HTTP.
    pub ip: IpAddr,
    /// How commands are run in it.
    pub command: RunCommand,
}

/// Tries again and again, until it is dropped.
///
/// A try that is under way then comes to its end, within its time limit, and nobody is told of it.
pub struct Checker {
    // Never sent on: that it is gone ends the thread.
    _stop: Sender<()>,
}

impl Checker {
    /// Begins to ask, at once. `healthy`: what is known of it already, which holds until a try says otherwise.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        check: HealthCheck,
        target: HealthTarget,
        healthy: bool,
        on_change: OnChange,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        std::thread::Builder::new()
            .name("health".to_owned())
            .spawn(move || {
                let started = Instant::now();
                let mut health = Health::new(&check, healthy);
                let mut wait = Duration::ZERO;
                while stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                    let found = try_once(&check, &target);
                    // A checker that was dropped meanwhile has nobody to tell.
                    if matches!(stopped.try_recv(), Err(mpsc::TryRecvError::Disconnected)) {
                        return;
                    }
                    let why = found.as_ref().err().map_or("", String::as_str);
                    if let Some(healthy) = health.judge(started.elapsed(), found.is_ok()) {
                        on_change(healthy, why);
                    }
                    wait = health.next_try(started.elapsed());
                }
            })?;
        Ok(Self { _stop: stop })
    }
}

/// One try. The reason is for people.
fn try_once(check: &HealthCheck, target: &HealthTarget) -> Result<(), String> {
    let limit = Duration::from_millis(check.timeout.max(1).into());
    match &check.test {
        HealthTest::Command(command) => (target.command)(command, limit),
        HealthTest::Tcp { port } => tries::tcp(&target.netns, target.ip, *port, limit),
        HealthTest::Http { port, path } => {
            tries::http(&target.netns, target.ip, *port, path, limit)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_member_is_well_while_it_listens_and_nobody_is_told_of_a_checker_that_is_gone() {
        let here = IpAddr::from([127, 0, 0, 1]);
        let listener = TcpListener::bind((here, 0)).expect("a port of the loopback");
        let port = listener.local_addr().expect("it is bound").port();
        let check = HealthCheck {
            test: HealthTest::Tcp { port },
            interval: 10,
            timeout: 30_000,
            retries: 2,
            start_period: 0,
        };
        let target = HealthTarget {
            netns: Netns::current().expect("/proc is mounted"),
            ip: here,
            command: Box::new(|_, _| Err("no command is asked for".to_owned())),
        };
        let (tell, told) = mpsc::channel();
        let on_change = Box::new(move |healthy, why: &str| {
            let _ = tell.send((healthy, why.to_owned()));
        });
        let checker = Checker::start(check, target, false, on_change).expect("a thread");
        let patience = Duration::from_secs(30);
        let news = told.recv_timeout(patience).expect("it listens");
        assert_eq!(news, (true, String::new()));
        drop(listener);
        let (healthy, why) = told.recv_timeout(patience).expect("nobody listens");
        assert!(!healthy && why.contains("can't connect"), "{why}");
        drop(checker);
        // Its thread ends, and with it the one who tells.
        assert_eq!(
            told.recv_timeout(patience),
            Err(RecvTimeoutError::Disconnected)
        );
    }
}
