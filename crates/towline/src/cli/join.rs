//! `towline join`.

use std::net::IpAddr;
use std::process::ExitCode;

use super::{Context, output};
use crate::api::{Join, Request, Response};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline join --token tl1-… 192.0.2.1\n\
                        'towline init' on the manager printed the whole command; so does 'towline token' there.")]
pub(crate) struct Args {
    /// The cluster's token, as 'towline token' prints it on a manager's host
    #[arg(long)]
    token: String,
    /// Managers of the cluster [port: 4789]
    #[arg(required = true, value_name = "HOST[:PORT]")]
    managers: Vec<String>,
    /// This host's underlay address, which other hosts reach
    /// [default: the address of the interface that leads to the first manager]
    #[arg(long, value_name = "ADDR")]
    advertise: Option<IpAddr>,
    /// This host's UDP port of VXLAN, 1 to 49151 [default: 4789]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let request = Request::Join(Join {
        token: args.token,
        managers: args.managers,
        advertise: args.advertise,
        port: args.port,
    });
    let Response::Joined(joined) = context.client()?.request(&request)? else {
        return Err(super::unexpected());
    };
    if args.json {
        output::json(&joined)?;
    } else {
        output::line(&format!(
            "This host has joined the cluster of {}; packets of {} bytes pass both ways.",
            joined.manager, joined.path_mtu
        ))?;
        output::warnings(&joined.warnings);
    }
    Ok(ExitCode::SUCCESS)
}
