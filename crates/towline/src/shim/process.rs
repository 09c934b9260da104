//! Processes by identity: a process id alone may be another's by the time it is used.
//!
//! Reads `/proc` and holds pidfds (pidfd_open(2), Linux 5.3). Does NOT start anything.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// One process of one boot: the id together with the moment it started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    /// The process id.
    pub(crate) pid: u32,
    /// Clock ticks from boot to its start (proc(5), field 22 of `stat`).
    pub(crate) start_ticks: u64,
    /// The boot both belong to: process ids repeat after the next one.
    pub(crate) boot: String,
}

impl ProcessId {
    /// The calling process.
    pub(crate) fn current() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// The process that has this id now.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        Ok(Self {
            pid,
            start_ticks: Stat::read(pid)?.start_ticks,
            boot: boot_id()?,
        })
    }

    /// A pidfd of exactly this process; nothing when it has ended.
    ///
    /// The descriptor becomes readable when the process ends.
    pub(crate) fn open(&self) -> io::Result<Option<OwnedFd>> {
        if boot_id()? != self.boot {
            return Ok(None);
        }
        let Some(pidfd) = open_pidfd(self.pid)? else {
            return Ok(None);
        };
        // The descriptor came first: if the start time still fits now, the
        // descriptor is of that very process.
        match Stat::read(self.pid) {
            Ok(stat) if stat.start_ticks == self.start_ticks => {
                Ok((!wait_ended(&pidfd, Duration::ZERO)?).then_some(pidfd))
            }
            Ok(_) => Ok(None),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether it still runs. A process that can't be looked at counts as running.
    pub(crate) fn is_running(&self) -> bool {
        !matches!(self.open(), Ok(None))
    }
}

/// The kernel's name of this boot.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// Waits until the process behind `pidfd` has ended; false when `limit` passed first.
pub(crate) fn wait_ended(pidfd: impl AsFd, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Which processes to kill.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Victims {
    /// Those of this network namespace: its device and inode. The caller's own is spared.
    pub(crate) netns: Option<(u64, u64)>,
    /// The descendants of this process; the caller itself is spared.
    pub(crate) descendants_of: Option<u32>,
}

/// Kills processes and waits until they are gone. False when some still were there
/// after `limit`.
///
/// They are looked for again until none is found, so one that forks while being
/// killed is met too.
pub(crate) fn kill_all(victims: Victims, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    let own = fs::metadata("/proc/self/ns/net").map(|meta| (meta.dev(), meta.ino()))?;
    let victims = Victims {
        netns: victims.netns.filter(|id| *id != own),
        ..victims
    };
    loop {
        let killed = kill_once(victims)?;
        if killed.is_empty() {
            return Ok(true);
        }
        for pidfd in &killed {
            if !wait_ended(pidfd, deadline.saturating_duration_since(Instant::now()))? {
                return Ok(false);
            }
        }
        // Orphans among them are the caller's children now, when it is a subreaper.
        if victims.descendants_of == Some(std::process::id()) {
            reap();
        }
    }
}

/// Collects the exit codes of children nobody waits for.
pub(crate) fn reap() {
    while let Ok(Some(_)) = rustix::process::wait(rustix::process::WaitOptions::NOHANG) {}
}

/// One round of [`kill_all`]: what was found and killed.
fn kill_once(victims: Victims) -> io::Result<Vec<OwnedFd>> {
    let myself = std::process::id();
    let stats = all_stats()?;
    let descendants = victims
        .descendants_of
        .map_or_else(HashSet::new, |ancestor| descendants_of(ancestor, &stats));
    let mut killed = Vec::new();
    for stat in &stats {
        if stat.pid == myself || stat.state == b'Z' {
            continue;
        }
        let Some(pidfd) = open_pidfd(stat.pid)? else {
            continue;
        };
        // Looked at after the descriptor was opened, so that it is this process that is killed.
        let same = Stat::read(stat.pid).is_ok_and(|now| now.start_ticks == stat.start_ticks);
        let meant = descendants.contains(&stat.pid)
            || victims
                .netns
                .is_some_and(|id| netns_of(stat.pid) == Some(id));
        if same && meant && pidfd_send_signal(&pidfd, Signal::KILL).is_ok() {
            killed.push(pidfd);
        }
    }
    Ok(killed)
}

/// The network namespace of a process: device and inode.
fn netns_of(pid: u32) -> Option<(u64, u64)> {
    let meta = fs::metadata(format!("/proc/{pid}/ns/net")).ok()?;
    Some((meta.dev(), meta.ino()))
}

fn open_pidfd(pid: u32) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Ok(None);
    };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => Ok(Some(pidfd)),
        // EINVAL: a thread's id by now, not a process's.
        Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What of `/proc/PID/stat` is used here.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    pid: u32,
    parent: u32,
    state: u8,
    start_ticks: u64,
}

impl Stat {
    fn read(pid: u32) -> io::Result<Self> {
        // Lossy: the command's name between the parentheses is any bytes.
        let bytes = fs::read(format!("/proc/{pid}/stat"))?;
        Self::parse(pid, &String::from_utf8_lossy(&bytes))
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat can't be read")))
    }

    fn parse(pid: u32, text: &str) -> Option<Self> {
        // The name may hold spaces and parentheses: what counts starts after the last one.
        let (_, rest) = text.rsplit_once(')')?;
        let mut fields = rest.split_ascii_whitespace();
        let state = *fields.next()?.as_bytes().first()?;
        let parent = fields.next()?.parse().ok()?;
        // state is field 3, the parent 4, the start time 22.
        let start_ticks = fields.nth(17)?.parse().ok()?;
        Some(Self {
            pid,
            parent,
            state,
            start_ticks,
        })
    }
}

fn all_stats() -> io::Result<Vec<Stat>> {
    let mut stats = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        match Stat::read(pid) {
            Ok(stat) => stats.push(stat),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(stats)
}

/// Children, their children and so on.
fn descendants_of(ancestor: u32, stats: &[Stat]) -> HashSet<u32> {
    let mut found = HashSet::new();
    let mut parents = vec![ancestor];
    while let Some(parent) = parents.pop() {
        for stat in stats.iter().filter(|stat| stat.parent == parent) {
            if found.insert(stat.pid) {
                parents.push(stat.pid);
            }
        }
    }
    found
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_name_with_parentheses_and_spaces_is_no_trap() {
        let text = "7 (a) b (c) S 3 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 8123 0 0";
        let stat = Stat::parse(7, text).expect("a whole line");
        assert_eq!(
            stat,
            Stat {
                pid: 7,
                parent: 3,
                state: b'S',
                start_ticks: 8123
            }
        );
        assert_eq!(Stat::parse(7, "7 (a) S 3"), None);
        assert_eq!(Stat::parse(7, ""), None);
    }

    #[test]
    fn a_process_is_known_until_it_ends_and_not_by_its_number_alone() {
        let mut child = Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep exists");
        let identity = ProcessId::of(child.id()).expect("it runs");
        assert!(identity.is_running());
        let other_start = ProcessId {
            start_ticks: identity.start_ticks + 1,
            ..identity.clone()
        };
        assert!(
            !other_start.is_running(),
            "the same number of another moment"
        );
        let other_boot = ProcessId {
            boot: "elsewhere".into(),
            ..identity.clone()
        };
        assert!(!other_boot.is_running(), "the same number of another boot");

        let pidfd = identity.open().expect("may be opened").expect("runs");
        child.kill().expect("our child");
        assert!(wait_ended(&pidfd, Duration::from_secs(10)).expect("can be waited for"));
        assert!(!identity.is_running(), "a zombie has ended");
        child.wait().expect("our child");
        assert!(!identity.is_running());
    }

    #[test]
    fn descendants_are_found_at_any_depth() {
        let stat = |pid, parent| Stat {
            pid,
            parent,
            state: b'S',
            start_ticks: 1,
        };
        let stats = [stat(4, 3), stat(2, 1), stat(3, 2), stat(9, 8), stat(1, 0)];
        assert_eq!(descendants_of(1, &stats), HashSet::from([2, 3, 4]));
        assert!(descendants_of(4, &stats).is_empty());
    }
}
