//! `towline status`.

use std::process::ExitCode;

use super::{Context, output};
use crate::api::{Request, Response};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline status --json")]
pub(crate) struct Args {
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<ExitCode> {
    let Response::Status(status) = context.client()?.request(&Request::Status)? else {
        return Err(super::unexpected());
    };
    if args.json {
        output::json(&status)?;
    }
    Ok(ExitCode::SUCCESS)
}
