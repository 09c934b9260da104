//! `towline exec`: becomes a command inside a running container.

use std::ffi::OsString;
use std::process::ExitCode;

use super::{Context, failure, unexpected};
use crate::api::container::{Request, Response};
use crate::api::{self};
use crate::shim::{EXIT_TOWLINE, enter};

/// The command shares the caller's terminal, descriptors and environment.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline exec c1 -- ping -c 1 10.0.9.3\n\
    It ends with the container, at the latest.")]
pub(crate) struct Args {
    /// As without it: standard input is always connected
    #[arg(short, long)]
    interactive: bool,
    /// As without it: the command has the caller's terminal
    #[arg(short, long)]
    tty: bool,
    /// The container's name, or the beginning of its id
    container: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let towline = |error: anyhow::Error| failure(EXIT_TOWLINE, format!("{error:#}"));
    join(&args.container, context).map_err(towline)?;
    let failed = enter::exec(&args.command, None);
    Err(failure(failed.code, failed.message))
}

/// Enters the container's namespaces. This process has one thread, which is what joining a mount namespace takes.
fn join(container: &str, context: &Context) -> anyhow::Result<()> {
    let request = api::Request::Container(Request::Locate {
        name: container.to_owned(),
    });
    let api::Response::Container(Response::Located(located)) =
        context.client()?.request(&request)?
    else {
        return Err(unexpected());
    };
    let pidfd = located.process.map_or(Ok(None), |process| process.open())?;
    let Some(pidfd) = pidfd else {
        anyhow::bail!(
            "container {} is not running: 'towline ps -a' shows how it ended",
            located.name
        );
    };
    let folder = std::env::current_dir();
    enter::join(pidfd)?;
    // Entering a mount namespace leads to its root; the host's files are there too.
    if let Ok(folder) = folder {
        let _ = std::env::set_current_dir(folder);
    }
    Ok(())
}
