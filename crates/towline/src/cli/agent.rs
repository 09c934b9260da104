//! `towline agent`: the daemon.

use std::process::ExitCode;

use super::Context;
use crate::config::{Config, Flags};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline agent --name h1\n\n\
                        The log goes to stderr; TOWLINE_LOG=debug says more, TOWLINE_LOG=warn less.\n\
                        Containers run on when the agent stops, and a new agent takes them up again.")]
pub(crate) struct Args {
    #[command(flatten)]
    flags: Flags,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let config = Config::load(args.flags, context.given_socket())?;
    crate::agent::run(config)?;
    Ok(ExitCode::SUCCESS)
}
