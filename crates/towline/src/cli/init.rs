//! `towline init`.

use std::net::IpAddr;
use std::process::ExitCode;

use super::{Context, output};
use crate::api::{Init, Request, Response};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline init --advertise 192.0.2.1")]
pub(crate) struct Args {
    /// This host's underlay address, which other hosts reach
    /// [default: the address of the interface with the default route]
    #[arg(long, value_name = "ADDR")]
    advertise: Option<IpAddr>,
    /// UDP port of VXLAN and TCP port of control [default: 4789]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let request = Request::Init(Init {
        advertise: args.advertise,
        port: args.port,
    });
    let Response::Initialized(made) = context.client()?.request(&request)? else {
        return Err(super::unexpected());
    };
    if args.json {
        output::json(&made)?;
    } else {
        output::line(&format!(
            "This host is now the manager of a new cluster, at {}.\n\n\
             To add a host, start 'towline agent' on it and run there:\n\n    {}\n",
            made.manager, made.join_command
        ))?;
        output::warnings(&made.warnings);
    }
    Ok(ExitCode::SUCCESS)
}
