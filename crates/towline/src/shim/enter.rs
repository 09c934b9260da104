//! Enters a container's namespaces and becomes its command.
//!
//! Runs in a process with one thread: the shim's child, or the client of `exec`. Namespaces are
//! entered here rather than between fork and exec, where only unsafe code may run.
#![allow(unsafe_code)]

use std::ffi::{CStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use netns::Netns;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags};
use serde::{Deserialize, Serialize};

use super::channel::{Channel, Outcome};
use super::folder::Folder;
use super::{EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, EXIT_TOWLINE, StartFailure, mount};

/// What the shim tells its child. The command's standard input comes along.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    /// The shim's process id.
    pub(crate) parent: u32,
    /// The network namespace's name.
    pub(crate) name: String,
    /// Its device and inode: a name may be another's by now.
    pub(crate) netns: (u64, u64),
}

/// The child's whole life before it is the command. Returns only on failure.
pub(crate) fn run(folder: &Path, command: &[OsString]) -> ExitCode {
    let channel = match Channel::from_stdin() {
        Ok(channel) => channel,
        Err(error) => {
            eprintln!("towline: {error}");
            return ExitCode::from(EXIT_TOWLINE);
        }
    };
    let StartFailure { code, message } = match follow_order(&channel, &Folder::at(folder)) {
        Ok(input) => exec(command, Some(input)),
        Err(error) => StartFailure {
            code: EXIT_TOWLINE,
            message: format!("{error:#}"),
        },
    };
    // A shim that is gone needs no answer.
    let _ = channel.send(&Outcome::Failed { code, message }, &[]);
    ExitCode::from(code)
}

fn follow_order(channel: &Channel, folder: &Folder) -> anyhow::Result<OwnedFd> {
    use anyhow::{Context, anyhow, bail};

    let (order, mut fds) = channel
        .receive::<Order>()?
        .ok_or_else(|| anyhow!("the shim went away"))?;
    let input = fds
        .pop()
        .ok_or_else(|| anyhow!("the shim sent no standard input"))?;
    // The command must not outlive its shim: nobody would keep its exit code. Survives the exec
    // (unless the command is set-user-ID; the agent kills what is left then).
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .context("can't ask to end with the shim")?;
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    if parent != Some(order.parent) {
        bail!("the shim went away");
    }
    // A session of its own, so that a command that signals its process group doesn't meet the shim.
    rustix::process::setsid().context("can't start a session")?;

    let netns = Netns::open(&order.name)?;
    if netns.id() != order.netns {
        bail!(
            "the network namespace {} is not the container's: it was replaced",
            order.name
        );
    }
    enter_netns(netns.as_fd())
        .with_context(|| format!("can't enter the network namespace {}", order.name))?;
    fresh_mounts().context("can't make a mount namespace with a /sys of its own")?;
    // From the folder, not with the order: a message is shorter than what a container may be given.
    let spec = folder
        .spec()?
        .ok_or_else(|| anyhow!("the container was removed before its command was started"))?;
    mount::all(&spec.mounts)?;
    Ok(input)
}

fn enter_netns(netns: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::thread::move_into_link_name_space(
        netns,
        Some(LinkNameSpaceType::Network),
    )?)
}

/// A mount namespace whose `/sys` shows the network namespace just entered, as `ip netns exec` makes it.
///
/// Mounts stay slaves of the host's: with private ones the copies of `/run/netns/*` here would keep every
/// other network namespace alive after it was deleted.
fn fresh_mounts() -> io::Result<()> {
    // SAFETY: unshare is unsafe because of CLONE_FILES alone, which takes the descriptor table from other
    // threads; a new mount namespace touches no descriptor. There is no safe call for it.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slave)?;
    let read_only = rustix::fs::statvfs("/sys").is_ok_and(|status| {
        status
            .f_flag
            .contains(rustix::fs::StatVfsMountFlags::RDONLY)
    });
    // Nothing mounted there is as good.
    let _ = rustix::mount::unmount("/sys", UnmountFlags::DETACH);
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    flags.set(MountFlags::RDONLY, read_only);
    rustix::mount::mount("sysfs", "/sys", "sysfs", flags, None::<&CStr>)?;
    Ok(())
}

/// Enters all namespaces of a container's first process. The caller must have one thread.
pub(crate) fn join(pidfd: impl AsFd) -> io::Result<()> {
    let both = ThreadNameSpaceType::NETWORK | ThreadNameSpaceType::MOUNT;
    Ok(rustix::thread::move_into_thread_name_spaces(
        pidfd.as_fd(),
        both,
    )?)
}

/// Becomes `command`, with `input` as its standard input when given. Returns only on failure.
pub(crate) fn exec(command: &[OsString], input: Option<OwnedFd>) -> StartFailure {
    let Some((program, arguments)) = command.split_first() else {
        return StartFailure {
            code: EXIT_TOWLINE,
            message: "no command was given".into(),
        };
    };
    let mut command = Command::new(program);
    command.args(arguments);
    if let Some(input) = input {
        command.stdin(Stdio::from(input));
    }
    let error = command.exec();
    let shown = Path::new(program).display();
    match error.kind() {
        io::ErrorKind::NotFound => StartFailure {
            code: EXIT_NOT_FOUND,
            message: format!("can't run '{shown}': not found; give its path, or install it"),
        },
        _ => StartFailure {
            code: EXIT_NOT_EXECUTABLE,
            message: format!("can't run '{shown}': {error}; it must be an executable file"),
        },
    }
}
