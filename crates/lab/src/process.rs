//! Edge: processes, as /proc shows them: which stand in a lab's namespaces, and ending them.
//!
//! A process is named by id and start time, since ids are used again.

use std::collections::HashSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use crate::vm;

/// How long a killed process may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// A process that was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Process {
    /// Process id.
    pub(crate) pid: u32,
    /// When it started, in clock ticks since boot (proc_pid_stat(5), field 22).
    pub(crate) start: u64,
}

impl Process {
    /// The process that has this id now.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self {
            pid,
            start: start_time(&stat)?,
        })
    }

    /// Whether it still runs; a zombie doesn't.
    pub(crate) fn alive(self) -> bool {
        let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", self.pid)) else {
            return false;
        };
        start_time(&stat) == Some(self.start) && !matches!(state(&stat), Some('Z' | 'X'))
    }

    /// The network namespace its main thread is in, as [`netns::Netns::id`] gives it.
    pub(crate) fn netns(self) -> Option<(u64, u64)> {
        let meta = fs::metadata(format!("/proc/{}/ns/net", self.pid)).ok()?;
        Some((meta.dev(), meta.ino()))
    }

    /// Whether it is a `towline agent`, a `towline shim` or a QEMU that was given a path below `folder`.
    pub(crate) fn belongs_to(self, folder: &Path) -> bool {
        let Ok(line) = fs::read(format!("/proc/{}/cmdline", self.pid)) else {
            return false;
        };
        line_belongs_to(&line, folder)
    }
}

/// Whether a command line (arguments ended by zero bytes) is an agent's, a shim's or a QEMU's with a path below `folder`.
fn line_belongs_to(line: &[u8], folder: &Path) -> bool {
    let mut words = line.split(|&byte| byte == 0);
    let program = words.next().unwrap_or_default();
    let arguments: Vec<&[u8]> = words.collect();
    let mut below = folder.as_os_str().as_bytes().to_vec();
    below.push(b'/');
    if program.ends_with(vm::QEMU.as_bytes()) {
        // Its options hold several values each, and double a comma.
        let value = format!("={}", vm::quoted(folder));
        let value = [value.as_bytes(), b"/"].concat();
        return arguments
            .iter()
            .any(|argument| argument.windows(value.len()).any(|part| part == value));
    }
    arguments
        .iter()
        .any(|&argument| argument == b"agent" || argument == b"shim")
        && arguments.iter().any(|argument| {
            argument.starts_with(&below)
                || argument
                    .iter()
                    .position(|&byte| byte == b'=')
                    .is_some_and(|at| argument[at + 1..].starts_with(&below))
        })
}

/// Every process, except kernel threads' lack of it: whatever has a folder in /proc.
pub(crate) fn all() -> anyhow::Result<Vec<Process>> {
    let entries = fs::read_dir("/proc").context("can't read /proc")?;
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(Process::of)
        .collect())
}

/// Kills all of them and waits until they are gone.
pub(crate) fn kill_all(processes: &HashSet<Process>) -> anyhow::Result<()> {
    let mut waiting = Vec::new();
    for &process in processes {
        let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else {
            continue;
        };
        // The pidfd first, then the check that it is the one meant: from here on the id can't pass to another.
        let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
            continue;
        };
        if process.alive() {
            match rustix::process::pidfd_send_signal(&pidfd, Signal::KILL) {
                Ok(()) => waiting.push((process, pidfd)),
                Err(rustix::io::Errno::SRCH) => {}
                Err(error) => {
                    return Err(error).context(format!("can't kill process {}", process.pid));
                }
            }
        }
    }
    let deadline = Instant::now() + KILL_PATIENCE;
    for (process, pidfd) in waiting {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).context("the time left fits")?;
            let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Ok(0) => bail!(
                    "process {} doesn't end after SIGKILL: see /proc/{0}/stack",
                    process.pid
                ),
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("can't wait for a process"),
            }
        }
    }
    Ok(())
}

/// The fields after the command, which is in brackets and may hold anything.
fn fields(stat: &str) -> Option<impl Iterator<Item = &str>> {
    Some(stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace())
}

fn state(stat: &str) -> Option<char> {
    fields(stat)?.next()?.chars().next()
}

fn start_time(stat: &str) -> Option<u64> {
    // Field 22 of all; the command is field 2.
    fields(stat)?.nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_command_may_hold_anything() {
        let stat = "7 (a) R b) ) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 9";
        assert_eq!(state(stat), Some('S'));
        assert_eq!(start_time(stat), Some(4711));
        assert_eq!(start_time("7 (a"), None);
    }

    #[test]
    fn a_killed_process_is_gone_and_another_is_untouched() {
        let mut victim = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Process::of(victim.id()).unwrap();
        let recycled = Process {
            pid: other.id(),
            start: 1,
        };
        assert!(process.alive() && !recycled.alive());
        assert_eq!(
            process.netns(),
            Process::of(std::process::id()).unwrap().netns()
        );

        kill_all(&HashSet::from([process, recycled])).unwrap();
        assert!(!process.alive(), "a zombie isn't alive");
        victim.wait().unwrap();
        assert!(
            other.try_wait().unwrap().is_none(),
            "its start time differs"
        );
        kill_all(&HashSet::from([process])).unwrap();
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn only_agents_and_shims_of_the_folder() {
        let folder = Path::new("/run/labs/a");
        let line = |words: &[&str]| {
            words
                .iter()
                .flat_map(|word| [word.as_bytes(), b"\0"].concat())
                .collect::<Vec<u8>>()
        };
        assert!(line_belongs_to(
            &line(&["towline", "agent", "--socket", "/run/labs/a/h1/sock"]),
            folder
        ));
        assert!(line_belongs_to(
            &line(&["towline", "shim", "--dir=/run/labs/a/h1"]),
            folder
        ));
        assert!(!line_belongs_to(
            &line(&["towline", "agent", "--socket", "/run/labs/ab/h1/sock"]),
            folder
        ));
        assert!(!line_belongs_to(
            &line(&["vi", "/run/labs/a/h1/agent.log"]),
            folder
        ));
        assert!(!line_belongs_to(&line(&["/run/labs/a/x/agent"]), folder));
        let qemu = |option: &str| line(&["/usr/bin/qemu-system-x86_64", "-chardev", option]);
        let own = qemu("socket,id=console,path=/run/labs/a/h1/console.sock,server=on");
        assert!(line_belongs_to(&own, folder));
        let others = qemu("socket,id=console,path=/run/labs/ab/h1/console.sock,server=on");
        assert!(!line_belongs_to(&others, folder));
        assert!(!line_belongs_to(&[], folder));
    }
}
