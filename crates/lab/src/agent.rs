//! Agents: real `towline agent` processes, one in each host, and asking them through the `towline` command line. In a
//! virtual machine they lie where they do on any machine.
//!
//! Nothing here knows more of them than a user does: the program's commands and their `--json`.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use netns::Netns;
use serde::de::DeserializeOwned;

use crate::interrupt;
use crate::name::{Kind, LabName, Role};
use crate::process::Process;
use crate::spot::Spot;
use crate::state::{Folder, Settings};
use crate::vm::Machine;

/// How long an agent may take from its start to its first answer.
const START_PATIENCE: Duration = Duration::from_secs(15);
/// The same in a virtual machine, whose processor may be slow.
const GUEST_START_PATIENCE: Duration = Duration::from_secs(60);
/// Where a virtual machine's agent writes what it has to say.
const GUEST_LOG: &str = "/var/log/towline.log";
/// Lines of an agent's log that an error shows.
const LOG_TAIL: usize = 5;

/// The program that is running now: agents are of the same build as the lab.
pub(crate) fn program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("can't tell where this program is")
}

/// That program, without what the environment tells the machine's own agent.
fn towline() -> anyhow::Result<Command> {
    let mut command = Command::new(program()?);
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"TOWLINE_") {
            command.env_remove(name);
        }
    }
    Ok(command)
}

/// A host of a lab, as a client of its agent sees it.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    /// The host's name, which is its namespace's.
    pub(crate) name: String,
    /// Where its programs run.
    pub(crate) spot: Spot,
    folder: PathBuf,
    socket: PathBuf,
}

impl Host {
    /// A host that `lab up` has made: a namespace, or a virtual machine.
    pub(crate) fn of(
        lab: &LabName,
        folder: &Folder,
        settings: &Settings,
        host: u16,
    ) -> anyhow::Result<Self> {
        if settings.is_machine(host) {
            Ok(Self {
                name: lab.of(Role::Node(Kind::Host, host)),
                spot: Spot::Guest(Machine::open(folder, lab, host)?, None),
                folder: folder.host_path(Kind::Host, host),
                socket: folder.socket(Kind::Host, host),
            })
        } else {
            Self::open(lab, folder, Kind::Host, host)
        }
    }

    /// A host in a namespace, that `lab up` or the bench has made.
    pub(crate) fn open(
        lab: &LabName,
        folder: &Folder,
        kind: Kind,
        host: u16,
    ) -> anyhow::Result<Self> {
        let name = lab.of(Role::Node(kind, host));
        Ok(Self {
            spot: Spot::Here(Netns::open(&name)?),
            name,
            folder: folder.host(kind, host)?,
            socket: folder.socket(kind, host),
        })
    }

    /// Where a container of this host runs.
    pub(crate) fn container(&self, name: &str) -> anyhow::Result<Spot> {
        Ok(match &self.spot {
            Spot::Here(_) => Spot::Here(Netns::open(name)?),
            Spot::Guest(machine, _) => Spot::Guest(machine.clone(), Some(name.to_owned())),
        })
    }

    /// Starts the host's agent, in a process group of its own, and returns at once.
    pub(crate) fn start_agent(&self, options: &[&str]) -> anyhow::Result<Agent> {
        let netns = match &self.spot {
            Spot::Here(netns) => netns,
            Spot::Guest(machine, _) => return self.start_agent_in(machine, options),
        };
        let log_path = self.folder.join("agent.log");
        let log = File::create(&log_path)
            .with_context(|| format!("can't write {}", log_path.display()))?;
        // What the machine's own agent is told must not reach this one.
        let config = self.folder.join("towline.toml");
        fs::write(&config, "").with_context(|| format!("can't write {}", config.display()))?;
        let mut command = towline()?;
        command
            .arg("agent")
            .args(["--name", &self.name])
            .arg("--state-dir")
            .arg(self.folder.join("state"))
            .arg("--socket")
            .arg(&self.socket)
            .arg("--config")
            .arg(&config)
            .args(options)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("can't share the agent's log")?)
            .stderr(log)
            .process_group(0);
        let child = netns
            .run(|| command.spawn())?
            .with_context(|| format!("can't start the agent of {}", self.name))?;
        let process = Process::of(child.id())
            .with_context(|| format!("the agent of {} vanished", self.name))?;
        Ok(Agent {
            host: self.clone(),
            child: Some(child),
            process,
            log: log_path,
        })
    }

    /// The same in a virtual machine, where the agent is as on any machine.
    fn start_agent_in(&self, machine: &Machine, options: &[&str]) -> anyhow::Result<Agent> {
        let script = format!("setsid \"$0\" \"$@\" >{GUEST_LOG} 2>&1 </dev/null &");
        let mut command = Command::new("sh");
        command
            .args(["-c", &script, "towline", "agent", "--name", &self.name])
            .args(options);
        let output = self.spot.output(&mut command)?;
        if !output.status.success() {
            bail!(
                "can't start the agent of {}: {}",
                self.name,
                plain(&String::from_utf8_lossy(&output.stderr))
            );
        }
        Ok(Agent {
            host: self.clone(),
            child: None,
            process: machine.process,
            log: PathBuf::from(GUEST_LOG),
        })
    }

    /// Runs `towline ARGUMENTS` as if on this host.
    fn client(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = towline()?;
        command.args(arguments).env("TOWLINE_SOCKET", &self.socket);
        self.spot
            .output(&mut command)
            .with_context(|| format!("can't run towline {} on {}", arguments.join(" "), self.name))
    }

    /// Runs a command of `towline` on this host; what it prints is for nobody.
    pub(crate) fn towline(&self, arguments: &[&str]) -> anyhow::Result<()> {
        checked(&self.name, arguments, self.client(arguments)?).map(drop)
    }

    /// Runs a command of `towline` with `--json` on this host and reads its answer.
    pub(crate) fn ask<T: DeserializeOwned>(&self, arguments: &[&str]) -> anyhow::Result<T> {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
        let output = checked(&self.name, &arguments, self.client(&arguments)?)?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!(
                "'towline {}' on {} printed other JSON than expected",
                arguments.join(" "),
                self.name
            )
        })
    }
}

fn checked(host: &str, arguments: &[&str], output: Output) -> anyhow::Result<Output> {
    if output.status.success() {
        return Ok(output);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = plain(&said);
    // The command's name is enough: a join's token has no place in a message.
    let command = arguments
        .iter()
        .take_while(|word| !word.starts_with('-'))
        .copied()
        .collect::<Vec<_>>()
        .join(" ");
    bail!("'towline {command}' on {host}: {said}")
}

/// What the program has said on stderr, without its name.
pub(crate) fn plain(said: &str) -> &str {
    said.trim().strip_prefix("towline: ").unwrap_or(said.trim())
}

/// An agent that was just started.
#[derive(Debug)]
pub(crate) struct Agent {
    host: Host,
    /// None in a virtual machine.
    child: Option<Child>,
    process: Process,
    log: PathBuf,
}

impl Agent {
    /// The agent, or the virtual machine that it is in.
    pub(crate) const fn process(&self) -> Process {
        self.process
    }

    /// Waits until it takes requests.
    pub(crate) fn wait_ready(&mut self) -> anyhow::Result<()> {
        let Some(child) = &mut self.child else {
            return self.wait_ready_in_guest();
        };
        let deadline = Instant::now() + START_PATIENCE;
        while UnixStream::connect(&self.host.socket).is_err() {
            interrupt::check()?;
            if let Some(status) = child.try_wait().context("can't look after an agent")? {
                bail!(
                    "the agent of {} ended ({status}){}",
                    self.host.name,
                    tail(&self.log)
                );
            }
            if Instant::now() > deadline {
                bail!(
                    "the agent of {} takes no requests after {START_PATIENCE:?}{}",
                    self.host.name,
                    tail(&self.log)
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// The same by a command in the guest, where the agent's socket is.
    fn wait_ready_in_guest(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + GUEST_START_PATIENCE;
        loop {
            interrupt::check()?;
            let Err(error) = self.host.towline(&["ps"]) else {
                return Ok(());
            };
            if Instant::now() > deadline || !self.process.alive() {
                let mut show = Command::new("tail");
                show.args(["-n", &LOG_TAIL.to_string()]).arg(&self.log);
                let log = self.host.spot.output(&mut show).map(|output| output.stdout);
                return Err(error.context(format!(
                    "the agent of {} takes no requests; the end of its log: {}",
                    self.host.name,
                    String::from_utf8_lossy(&log.unwrap_or_default())
                        .trim()
                        .replace('\n', "; ")
                )));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// The last lines of a log, to be put behind an error.
fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    match lines.len() {
        0 => String::new(),
        count => format!(": {}", lines[count.saturating_sub(LOG_TAIL)..].join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_short_and_an_absent_log_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert_eq!(tail(&log), "");
        fs::write(
            &log,
            (1..=9).map(|n| format!("line {n}\n\n")).collect::<String>(),
        )
        .unwrap();
        assert_eq!(tail(&log), ": line 5; line 6; line 7; line 8; line 9");
    }

    #[test]
    fn a_failed_command_is_told_without_its_options() {
        let output = Command::new("sh")
            .args(["-c", "echo 'towline: no such thing' >&2; exit 1"])
            .output()
            .unwrap();
        let error = checked(
            "lab-h1",
            &["join", "--token", "secret", "192.0.2.1"],
            output,
        )
        .unwrap_err();
        assert_eq!(error.to_string(), "'towline join' on lab-h1: no such thing");
    }
}
