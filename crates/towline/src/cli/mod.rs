//! The commands: one file each. Here is what they share: the parser, the
//! connection to the agent, and the exit codes.

mod agent;
mod ca;
mod capture;
mod completions;
mod events;
mod exec;
mod fdb;
mod filter;
mod host;
mod init;
mod join;
mod leave;
mod logs;
mod mount;
pub(crate) mod network;
mod output;
mod promote;
mod ps;
mod refused;
mod resolve;
mod rm;
mod run;
mod service;
mod shim;
mod status;
mod stop;
mod template;
pub(crate) mod token;
mod update;
mod verify;
mod volume;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::client::{Client, ClientError};

/// Where the agent listens unless told otherwise.
pub(crate) const DEFAULT_SOCKET: &str = "/run/towline/agent.sock";

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    not done; the reason is on stderr
  2    the command line is wrong, or asks for something that is not built yet
  125  run, exec: the container could not be started
  126  run, exec: the command could not be executed
  127  run, exec: the command was not found
  else run, exec: the command's own exit code (128 + N when signal N ended it)";

/// Overlay networks for containers across hosts.
#[derive(Debug, Parser)]
#[command(name = "towline", version, after_help = EXIT_CODES, max_term_width = 100)]
pub(crate) struct Cli {
    /// Unix socket of the agent [default: /run/towline/agent.sock; configuration key of the agent: socket]
    #[arg(long, global = true, env = "TOWLINE_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this host, in the foreground
    Agent(agent::Args),
    /// Make this host the first of a new cluster
    Init(init::Args),
    /// Make this host one of an existing cluster
    Join(join::Args),
    /// Take this host out of its cluster and undo what the agent made on it
    Leave(leave::Args),
    /// Create, list, show and remove networks
    #[command(subcommand)]
    Network(network::Command),
    /// Create, list, show, change and remove services
    #[command(subcommand)]
    Service(service::Command),
    /// Make, list, show and remove volumes of this host
    #[command(subcommand)]
    Volume(volume::Command),
    /// Start a command in a container
    Run(Box<run::Args>),
    /// Run another command in a running container
    Exec(exec::Args),
    /// List containers
    Ps(ps::Args),
    /// Show a container's output
    Logs(logs::Args),
    /// End a container's command, and keep the container
    Stop(stop::Args),
    /// Remove a container
    Rm(rm::Args),
    /// List the cluster's hosts, or remove one that is lost
    #[command(subcommand)]
    Host(host::Command),
    /// Make this host the manager in the place of one that is lost
    Promote(promote::Args),
    /// Show what hosts join this cluster with, or change it
    Token(token::Args),
    /// Keep a copy of the cluster's certificate authority
    #[command(subcommand)]
    Ca(ca::Command),
    /// Change what holds for the whole cluster
    Update(update::Args),
    /// Show where frames for each MAC address go
    Fdb(fdb::Args),
    /// Look a name up as a container on a network would
    Resolve(resolve::Args),
    /// Follow what happens in the cluster
    Events(events::Args),
    /// Compare every host's tables with the manager's
    Verify(verify::Args),
    /// Show what this host's agent does and sees
    Status(status::Args),
    /// Show frames and datagrams as they pass, or write them to a file
    Capture(capture::Args),
    /// Try all of it on this machine: hosts, containers and measurements in network namespaces
    #[command(subcommand)]
    Lab(lab::Command),
    /// Print a shell's completion script
    Completions(completions::Args),
    /// A container's parent process
    #[command(hide = true)]
    Shim(shim::Args),
    #[command(flatten)]
    Refused(refused::Command),
}

/// What every command gets.
pub(crate) struct Context {
    socket: Option<PathBuf>,
}

impl Context {
    /// Where the agent listens.
    pub(crate) fn socket(&self) -> &Path {
        self.socket.as_deref().unwrap_or(Path::new(DEFAULT_SOCKET))
    }

    /// The socket as given by `--socket` or `TOWLINE_SOCKET`, if it was.
    pub(crate) fn given_socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// A connection to the agent.
    pub(crate) fn client(&self) -> Result<Client, ClientError> {
        Client::connect(self.socket())
    }
}

impl Cli {
    /// Runs the command and says with which code to exit.
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let context = Context {
            socket: self.socket,
        };
        match self.command {
            Command::Agent(args) => agent::run(args, &context),
            Command::Init(args) => init::run(args, &context),
            Command::Join(args) => join::run(args, &context),
            Command::Leave(args) => leave::run(&args, &context),
            Command::Network(command) => network::run(command, &context),
            Command::Service(command) => service::run(command, &context),
            Command::Volume(command) => volume::run(command, &context),
            Command::Run(args) => run::run(*args, &context),
            Command::Exec(args) => exec::run(args, &context),
            Command::Ps(args) => ps::run(&args, &context),
            Command::Logs(args) => logs::run(&args, &context),
            Command::Stop(args) => stop::run(args, &context),
            Command::Rm(args) => rm::run(args, &context),
            Command::Host(command) => host::run(command, &context),
            Command::Promote(args) => promote::run(&args, &context),
            Command::Token(args) => token::run(&args, &context),
            Command::Ca(command) => ca::run(command, &context),
            Command::Update(args) => update::run(&args, &context),
            Command::Fdb(args) => fdb::run(args, &context),
            Command::Resolve(args) => resolve::run(args, &context),
            Command::Events(args) => events::run(args, &context),
            Command::Verify(args) => verify::run(args, &context),
            Command::Status(args) => status::run(&args, &context),
            Command::Capture(args) => capture::run(args, &context),
            Command::Lab(command) => lab::run(command),
            Command::Completions(args) => completions::run(&args),
            Command::Shim(args) => shim::run(args, &context),
            Command::Refused(command) => Err(command.refuse()),
        }
    }
}

/// A failure that has an exit code of its own.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    /// The code to exit with.
    pub(crate) code: u8,
    /// One line: the thing, the cause, what to do next.
    pub(crate) message: String,
}

/// The command line is wrong, or asks for what is not built yet.
pub(crate) const USAGE: u8 = 2;

/// A failure with an exit code of its own, as an error.
pub(crate) fn failure(code: u8, message: impl Into<String>) -> anyhow::Error {
    Failure {
        code,
        message: message.into(),
    }
    .into()
}

/// The agent answered something else than was asked.
pub(crate) fn unexpected() -> anyhow::Error {
    anyhow::anyhow!(
        "the agent answered something else than was asked: is it of another version? restart 'towline agent'"
    )
}

/// The code to exit with after `error`.
pub(crate) fn exit_code_of(error: &anyhow::Error) -> ExitCode {
    error
        .downcast_ref::<Failure>()
        .map_or(ExitCode::FAILURE, |failure| ExitCode::from(failure.code))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_parser_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_failure_keeps_its_code_under_context() {
        let error = failure(126, "cannot execute").context("run");
        assert_eq!(exit_code_of(&error), ExitCode::from(126));
        assert_eq!(exit_code_of(&anyhow::anyhow!("else")), ExitCode::FAILURE);
    }
}
