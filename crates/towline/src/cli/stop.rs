//! `towline stop`: ends containers and keeps them.

use std::process::ExitCode;

use super::{Context, rm};
use crate::api::container::Request;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "A member of a service is drained first: no host sends it new connections, the open ones have the drain timeout. \
    Then its command gets SIGTERM, and SIGKILL when it does not end in time.\n\nExample: towline stop -t 30 c1"
)]
pub(crate) struct Args {
    /// Names, or beginnings of ids
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
    /// Seconds the command has to end by itself, before it is killed
    #[arg(
        short,
        long,
        visible_alias = "time",
        value_name = "SECONDS",
        default_value_t = 10
    )]
    timeout: u32,
    /// How long the open connections of a service's member are waited for [default: as its service says]
    #[arg(long, value_name = "DURATION", value_parser = super::service::seconds)]
    drain_timeout: Option<u32>,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    rm::each(args.containers, context, |name| Request::Stop {
        name,
        grace: args.timeout,
        drain_timeout: args.drain_timeout,
    })
}
