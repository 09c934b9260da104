//! `towline resolve`: what a container is answered for a name.

use std::process::ExitCode;

use super::{Context, output, unexpected};
use crate::api::names::{RecordType, Resolve, ResolvedRecord};
use crate::api::{Request, Response};

/// Look a name up as a container on a network would.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: towline resolve tasks.web --network myoverlay\n\n\
    Names are those of services, 'tasks.SERVICE', containers, their aliases and short ids, each also as NAME.NETWORK; \
    '_PORT._tcp.SERVICE' for where a port is, and addresses for whose they are. One record a line."
)]
pub(crate) struct Args {
    /// The name, or an address for the name that it has
    name: String,
    /// The network, by name or id
    #[arg(long, visible_alias = "net", value_name = "NETWORK")]
    network: String,
    /// What to ask for [default: addresses; PTR for an address, SRV for a name that begins with '_']
    #[arg(
        long = "type",
        short,
        value_enum,
        ignore_case = true,
        value_name = "TYPE"
    )]
    kind: Option<RecordType>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let request = Resolve {
        name: args.name,
        network: args.network,
        kind: args.kind,
    };
    let Response::Resolved(resolved) = context.client()?.request(&Request::Resolve(request))?
    else {
        return Err(unexpected());
    };
    if args.json {
        output::json(&resolved)?;
        return Ok(ExitCode::SUCCESS);
    }
    for record in &resolved.records {
        output::line(&match record {
            ResolvedRecord::Address { address } => address.to_string(),
            ResolvedRecord::Name { name } => name.clone(),
            ResolvedRecord::Service {
                weight,
                port,
                target,
                addresses,
            } => {
                let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                format!(
                    "{target} port {port} weight {weight}: {}",
                    addresses.join(", ")
                )
            }
        })?;
    }
    Ok(ExitCode::SUCCESS)
}
