//! `towline promote`.

use std::process::ExitCode;

use super::{Context, output};
use crate::api::Request;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline promote\n\n\
                        Only where a host stands by ('towline host ls' shows it) and no manager answers. Hosts find the new manager \
                        by themselves and tell it what runs on them; join tokens are new ones. Should the old manager come back, it stands down.")]
pub(crate) struct Args {}

pub(crate) fn run(_: &Args, context: &Context) -> anyhow::Result<ExitCode> {
    context.client()?.request(&Request::Promote)?;
    output::line("This host is now the manager; hosts come to it within seconds.")?;
    Ok(ExitCode::SUCCESS)
}
