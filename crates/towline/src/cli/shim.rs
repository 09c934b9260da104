//! `towline shim`: what `towline run` starts; not for use by hand.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use super::Context;
use crate::shim::{Shim, enter};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Enter the container's namespaces and become the command
    #[arg(long)]
    enter: bool,
    /// The container's folder
    folder: PathBuf,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

// The other commands' signature.
#[allow(clippy::unnecessary_wraps)]
pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    if args.enter {
        return Ok(enter::run(&args.folder, &args.command));
    }
    let socket = context.socket().to_owned();
    Ok(Shim {
        folder: args.folder,
        socket,
        command: args.command,
    }
    .run())
}
