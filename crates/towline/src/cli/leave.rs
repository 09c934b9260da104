//! `towline leave`.

use std::process::ExitCode;

use super::Context;
use crate::api::Request;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline leave")]
pub(crate) struct Args {
    /// Also when containers run here (they are killed) or other hosts need this manager
    #[arg(short, long)]
    force: bool,
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<ExitCode> {
    context
        .client()?
        .request(&Request::Leave { force: args.force })?;
    Ok(ExitCode::SUCCESS)
}
