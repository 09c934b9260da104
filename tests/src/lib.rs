//! What the tests of whole hosts share: the program under test, namespaces that go when the test ends, and
//! commands whose failure is shown.
//!
//! Every test here needs root. It asks with [`require_root`], which fails rather than skips: a test that
//! returns early counts as passed.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use netns::Netns;

pub mod cluster;
pub mod container;
pub mod dns;
pub mod files;
pub mod frames;
pub mod lab;
pub mod member;
pub mod mounts;
pub mod named;
pub mod outward;
pub mod ovs;
pub mod packet;
pub mod raw;
pub mod service;
pub mod terminal;
pub mod web;
pub mod wire;

/// Fails the test when it doesn't run as root.
///
/// # Panics
/// Always, when the effective user is not root.
pub fn require_root() {
    let status = std::fs::read_to_string("/proc/self/status")
        .expect("every Linux process has a status file");
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|ids| ids.split_whitespace().nth(1).map(str::to_owned));
    assert_eq!(
        effective.as_deref(),
        Some("0"),
        "this test makes network namespaces and needs root: run scripts/test"
    );
}

/// The `towline` program: `TOWLINE_BIN`, else the one built beside this test.
///
/// # Panics
/// When there is none: the test must not pass without what it tests.
#[must_use]
pub fn towline_bin() -> PathBuf {
    let path = std::env::var_os("TOWLINE_BIN").map_or_else(
        || {
            let test = std::env::current_exe().expect("a running test has a path");
            let profile = test
                .parent()
                .and_then(|deps| deps.parent())
                .expect("tests lie in <profile>/deps");
            profile.join("towline")
        },
        PathBuf::from,
    );
    assert!(
        path.is_file(),
        "{} is missing: build it first (cargo build -p towline)",
        path.display()
    );
    path
}

/// A name no other test of this run uses, short enough for an interface name's prefix.
#[must_use]
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(
        "{prefix}{}-{}",
        std::process::id() % 10_000,
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// A network namespace that is deleted when the value goes, also when the test fails.
#[derive(Debug)]
pub struct TestNetns(Netns, String);

impl TestNetns {
    /// Creates a namespace of this name.
    ///
    /// # Panics
    /// When it can't be created.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        require_root();
        let name = name.into();
        let netns = Netns::create(&name).unwrap_or_else(|error| panic!("{error}"));
        Self(netns, name)
    }

    /// The namespace's name, as `ip netns` shows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.1
    }
}

impl std::ops::Deref for TestNetns {
    type Target = Netns;
    fn deref(&self) -> &Netns {
        &self.0
    }
}

impl Drop for TestNetns {
    fn drop(&mut self) {
        if let Err(error) = Netns::delete(&self.1) {
            eprintln!("{error}");
        }
    }
}

/// Runs `command` (words split at spaces) inside `netns` and returns what it printed.
///
/// # Panics
/// When it can't be started or fails, with all it printed.
pub fn sh(netns: &Netns, command: &str) -> String {
    let output = try_sh(netns, command);
    assert!(
        output.status.success(),
        "`{command}` failed: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Like [`sh`], for commands that may fail.
///
/// # Panics
/// When the command can't be started.
#[must_use]
pub fn try_sh(netns: &Netns, command: &str) -> Output {
    let mut words = command.split_whitespace();
    let program = words.next().expect("a command has a first word");
    netns
        .run(|| Command::new(program).args(words).output())
        .expect("the namespace of a running test can be entered")
        .unwrap_or_else(|error| panic!("can't start `{command}`: {error}"))
}

/// Whether times are held to what is promised, as `scripts/soak` asks by `TOWLINE_STRICT_TIMES`: a machine may be slow.
#[must_use]
pub fn strict_times() -> bool {
    std::env::var_os("TOWLINE_STRICT_TIMES").is_some_and(|value| !value.is_empty())
}

/// Asks `ready` again and again until it says yes.
///
/// # Panics
/// When `what` has not come true within `limit`.
pub fn wait_until(what: &str, limit: Duration, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !ready() {
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
