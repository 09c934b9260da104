//! `towline rm`: removes containers.

use std::process::ExitCode;

use super::{Context, output, unexpected};
use crate::api::container::{Request, Response};
use crate::api::{self};
use crate::client::ClientError;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline rm -f c1")]
pub(crate) struct Args {
    /// Names, or beginnings of ids
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
    /// Kill it when it runs; one that does not exist is no error
    #[arg(short, long)]
    force: bool,
    /// Remove its volumes that nobody named, too
    #[arg(short, long)]
    volumes: bool,
    /// How long the open connections of a service's member are waited for [default: as its service says]
    #[arg(long, value_name = "DURATION", value_parser = super::service::seconds)]
    drain_timeout: Option<u32>,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    each(args.containers, context, |name| Request::Remove {
        name,
        force: args.force,
        volumes: args.volumes,
        drain_timeout: args.drain_timeout,
    })
}

/// Asks for each container, and prints the names of those that it was done to. One that is refused doesn't spare the others, as in
/// Docker.
pub(super) fn each(
    names: Vec<String>,
    context: &Context,
    request: impl Fn(String) -> Request,
) -> anyhow::Result<ExitCode> {
    let mut client = context.client()?;
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match client.request(&api::Request::Container(request(name))) {
            Ok(api::Response::Container(Response::Removed(name) | Response::Stopped(name))) => {
                output::line(&name)?;
            }
            Ok(api::Response::Container(Response::Done)) => {}
            Ok(_) => return Err(unexpected()),
            Err(ClientError::Refused(message)) => {
                eprintln!("towline: {message}");
                code = ExitCode::FAILURE;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(code)
}
