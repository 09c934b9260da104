//! Where programs of a lab run: in a namespace of this machine, or in a virtual machine.
//!
//! Whatever starts a program does it by [`Spot::spawn`], and so drives both kinds of hosts by the same code.

use std::process::{Child, Command, Output, Stdio};

use anyhow::Context;
use netns::Netns;

use crate::vm::{self, Machine};

/// A place where programs run.
#[derive(Clone, Debug)]
pub(crate) enum Spot {
    /// A namespace of this machine.
    Here(Netns),
    /// A virtual machine, or a namespace in it.
    Guest(Machine, Option<String>),
}

/// Where the three streams of a program go.
pub(crate) type Streams = [Stdio; 3];

impl Spot {
    /// Starts `command` there. Of a guest, what is started here stands for it: killed, it takes the command with it.
    pub(crate) fn spawn(
        &self,
        command: &mut Command,
        [input, output, errors]: Streams,
    ) -> anyhow::Result<Child> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = match self {
            Self::Here(netns) => {
                command.stdin(input).stdout(output).stderr(errors);
                netns.run(|| command.spawn())?
            }
            Self::Guest(machine, netns) => vm::stand_in(machine, netns.as_deref(), false, command)?
                .stdin(input)
                .stdout(output)
                .stderr(errors)
                .spawn(),
        };
        child.with_context(|| format!("can't start {program}"))
    }

    /// Starts `command` there with this process' own streams. `terminal`: in a guest, whose programs can't have this one, it gets
    /// a terminal that follows it.
    pub(crate) fn spawn_attached(
        &self,
        command: &mut Command,
        terminal: bool,
    ) -> anyhow::Result<Child> {
        match self {
            Self::Guest(machine, netns) if terminal => {
                vm::stand_in(machine, netns.as_deref(), true, command)?
                    .spawn()
                    .context("can't start what stands for the command")
            }
            _ => self.spawn(command, std::array::from_fn(|_| Stdio::inherit())),
        }
    }

    /// Runs `command` there to its end, with nothing to read.
    pub(crate) fn output(&self, command: &mut Command) -> anyhow::Result<Output> {
        let streams = [Stdio::null(), Stdio::piped(), Stdio::piped()];
        self.spawn(command, streams)?
            .wait_with_output()
            .context("can't read what a program prints")
    }
}
