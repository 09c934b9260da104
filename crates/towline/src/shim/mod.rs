//! The shim: parent of a container's command, in a session of its own.
//!
//! ```text
//! towline run ──spawns──▶ shim ──spawns──▶ child: enters the namespaces, execs CMD
//!       │  ▲                │ ▲                │
//!       └──┴── channel ─────┘ └── channel ─────┘      (closed by the exec: CMD runs)
//! ```
//!
//! It keeps the command's exit code and log, passes signals on, kills what the
//! command leaves behind, and tells the agent. It works on when client and agent
//! are gone. It stays outside the container's namespaces, so that whoever kills
//! everything inside them leaves the one that reports it.
//!
//! Does NOT make or remove namespaces and interfaces: that is the agent's.

pub(crate) mod channel;
pub(crate) mod dns;
pub(crate) mod enter;
pub(crate) mod folder;
pub(crate) mod mount;
mod output;
pub(crate) mod process;

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions};
use signal_hook::consts::signal;
use signal_hook::iterator::Signals;

use self::channel::{Channel, Outcome, Start};
use self::folder::{Exit, Folder, Phase, Running};
use self::output::Output;
use self::process::{ProcessId, Victims};
use crate::api::{Request, container};
use crate::client::Client;

/// Exit code of `run` and `exec` when Towline itself failed, as Docker's.
pub(crate) const EXIT_TOWLINE: u8 = 125;
/// Exit code when the command was found and can't be executed.
pub(crate) const EXIT_NOT_EXECUTABLE: u8 = 126;
/// Exit code when the command was not found.
pub(crate) const EXIT_NOT_FOUND: u8 = 127;
/// Added to a signal's number to make an exit code.
pub(crate) const EXIT_SIGNAL: u8 = 128;

/// Signals passed on to the command: those a person or an init system sends.
pub(crate) const FORWARDED: [i32; 8] = [
    signal::SIGHUP,
    signal::SIGINT,
    signal::SIGQUIT,
    signal::SIGUSR1,
    signal::SIGUSR2,
    signal::SIGALRM,
    signal::SIGTERM,
    signal::SIGWINCH,
];

/// How long what a command leaves behind may take to die.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// How long the agent may take to clear a container away before the shim ends without its answer.
const AGENT_LIMIT: Duration = Duration::from_secs(15);
/// How long output may take to reach a slow reader before the end is told without it.
const OUTPUT_LIMIT: Duration = Duration::from_secs(2);

/// What the shim needs to know beside the container's folder.
#[derive(Debug)]
pub(crate) struct Shim {
    /// The container's folder.
    pub(crate) folder: PathBuf,
    /// Where the agent listens.
    pub(crate) socket: PathBuf,
    /// The command and its arguments.
    pub(crate) command: Vec<OsString>,
}

/// Why the command was not started.
#[derive(Debug)]
pub(crate) struct StartFailure {
    /// The exit code for the caller.
    pub(crate) code: u8,
    /// One line for a person.
    pub(crate) message: String,
}

impl StartFailure {
    fn towline(message: impl Into<String>) -> Self {
        Self {
            code: EXIT_TOWLINE,
            message: message.into(),
        }
    }
}

impl From<io::Error> for StartFailure {
    fn from(error: io::Error) -> Self {
        Self::towline(format!("the shim failed: {error}"))
    }
}

impl Shim {
    /// Runs the command to its end and returns its exit code.
    pub(crate) fn run(self) -> ExitCode {
        let channel = match Channel::from_stdin() {
            Ok(channel) => channel,
            Err(error) => {
                eprintln!("towline: {error}");
                return ExitCode::from(EXIT_TOWLINE);
            }
        };
        // Fails only for a leader of a group, whom no terminal's signals reach either.
        let _ = rustix::process::setsid();
        match self.supervise(&channel) {
            Ok(code) => ExitCode::from(code),
            Err(StartFailure { code, message }) => {
                // A client that is gone hears nothing; the agent sees the shim's end.
                let _ = channel.send(&Outcome::Failed { code, message }, &[]);
                ExitCode::from(code)
            }
        }
    }

    fn supervise(&self, channel: &Channel) -> Result<u8, StartFailure> {
        let Some((start, fds)) = channel.receive::<Start>()? else {
            return Err(StartFailure::towline(
                "the client went away before the start",
            ));
        };
        let folder = Folder::at(&self.folder);
        let gone =
            || StartFailure::towline("the container was removed before its command was started");
        // Held until this process ends: the agent clears nothing away meanwhile.
        let _lock = folder.lock()?.ok_or_else(gone)?;
        let spec = folder
            .spec()?
            .filter(|spec| spec.phase == Phase::Ready)
            .ok_or_else(gone)?;
        let netns = spec.netns.ok_or_else(gone)?;

        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(io::Error::from)?;
        let mut signals = Signals::new(FORWARDED.into_iter().chain([signal::SIGCHLD]))?;
        let mut running = Running {
            shim: ProcessId::current()?,
            command: None,
        };
        folder.write_running(&running)?;

        let (output, stdio) = Output::new(&folder, start.foreground, fds)?;
        let command = match self.spawn(&spec.name, netns, stdio) {
            Ok(command) => command,
            Err(failure) => {
                kill_leftovers(None);
                folder.write_exit(&Exit {
                    code: failure.code,
                    started: false,
                    finished: folder::now(),
                })?;
                return Err(failure);
            }
        };
        // Already ended and not yet waited for: still a process with a start time.
        running.command = ProcessId::of(command.as_raw_nonzero().get().unsigned_abs()).ok();
        say_failed(&folder, folder.write_running(&running));
        let _ = channel.send(&Outcome::Started, &[]);
        self.tell_agent(
            container::Request::Started {
                name: spec.name.clone(),
            },
            Duration::ZERO,
        );

        let code = wait(&mut signals, command);
        kill_leftovers(Some(netns));
        let output = output.finish(OUTPUT_LIMIT);
        let exit = Exit {
            code,
            started: true,
            finished: folder::now(),
        };
        say_failed(&folder, folder.write_exit(&exit));
        self.tell_agent(container::Request::Ended { name: spec.name }, AGENT_LIMIT);
        output.wait();
        Ok(code)
    }

    /// Starts the child that enters the namespaces and becomes the command.
    fn spawn(&self, name: &str, netns: (u64, u64), stdio: Stdios) -> Result<Pid, StartFailure> {
        let (channel, childs) = Channel::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("towline")
            .arg("shim")
            .arg("--enter")
            .arg(&self.folder)
            .arg("--")
            .args(&self.command);
        command
            .stdin(Stdio::from(childs))
            .stdout(stdio.output)
            .stderr(stdio.error);
        let child = command.spawn()?;
        // Closes the child's end here, or its closing there would not be seen.
        drop(command);
        let order = enter::Order {
            parent: std::process::id(),
            name: name.to_owned(),
            netns,
        };
        channel.send(&order, &[rustix::fd::AsFd::as_fd(&stdio.input)])?;
        drop(stdio.input);
        match channel.receive::<Outcome>()? {
            Some((Outcome::Failed { code, message }, _)) => Err(StartFailure { code, message }),
            // Closed by the exec.
            _ => {
                let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
                pid.ok_or_else(|| {
                    StartFailure::towline("the kernel gave a process id out of range")
                })
            }
        }
    }

    /// Tells the agent as well as can be: it finds out by itself too. Waits for its answer up to `limit`.
    fn tell_agent(&self, request: container::Request, limit: Duration) {
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let socket = self.socket.clone();
        let told = std::thread::Builder::new()
            .name("tell-agent".into())
            .spawn(move || {
                if let Ok(mut agent) = Client::connect(&socket) {
                    let _ = agent.request(&Request::Container(request));
                }
                drop(done);
            });
        if told.is_ok() {
            let _ = wait.recv_timeout(limit);
        }
    }
}

/// The command's three standard descriptors.
#[derive(Debug)]
pub(crate) struct Stdios {
    input: OwnedFd,
    output: Stdio,
    error: Stdio,
}

/// Starts a shim for the container in `folder`, with `channel` to talk to it. With `speaks`, it says on the
/// caller's standard error what goes wrong while the command runs.
pub(crate) fn start(
    folder: &Path,
    socket: &Path,
    command: &[OsString],
    channel: Channel,
    speaks: bool,
) -> io::Result<std::process::Child> {
    let mut shim = Command::new("/proc/self/exe");
    shim.arg0("towline")
        .arg("shim")
        .arg(folder)
        .arg("--")
        .args(command)
        .env("TOWLINE_SOCKET", socket);
    shim.stdin(Stdio::from(channel)).stdout(Stdio::null());
    // A detached shim would keep the caller's descriptor open for ever.
    shim.stderr(if speaks {
        Stdio::inherit()
    } else {
        Stdio::null()
    });
    shim.spawn()
}

/// Passes signals on until the command ends; its exit code.
fn wait(signals: &mut Signals, command: Pid) -> u8 {
    for signal in signals.forever() {
        if signal != signal::SIGCHLD {
            // Not yet waited for, so the id is the command's even when it has ended.
            if let Some(signal) = Signal::from_named_raw(signal) {
                let _ = rustix::process::kill_process(command, signal);
            }
            continue;
        }
        // One SIGCHLD may stand for several children; orphans of the command are ours too.
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if pid != command {
                continue;
            }
            if let Some(code) = status.exit_status() {
                return u8::try_from(code & 0xff).unwrap_or(u8::MAX);
            }
            if let Some(number) = status.terminating_signal() {
                return u8::try_from(number)
                    .unwrap_or(0)
                    .saturating_add(EXIT_SIGNAL);
            }
        }
    }
    // `forever` ends only when its handle is closed, and nobody has that handle.
    EXIT_TOWLINE
}

/// The command comes before its records: a full disk doesn't end it.
fn say_failed(folder: &Folder, written: io::Result<()>) {
    if let Err(error) = written {
        eprintln!(
            "towline shim: can't write to {}: {error}",
            folder.path().display()
        );
    }
}

/// Kills what still runs in the container: descendants, wherever they went, and whoever else is in its namespace.
fn kill_leftovers(netns: Option<(u64, u64)>) {
    let victims = Victims {
        netns,
        descendants_of: Some(std::process::id()),
    };
    if !process::kill_all(victims, KILL_LIMIT).unwrap_or(false) {
        eprintln!("towline shim: some processes of the container can't be killed");
    }
    process::reap();
}
