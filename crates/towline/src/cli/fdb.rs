//! `towline fdb`.

use std::process::ExitCode;

use super::{Context, output};
use crate::api::{Request, Response};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline fdb --network myoverlay")]
pub(crate) struct Args {
    /// Only this network, by name or id
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let request = Request::Fdb {
        network: args.network,
    };
    let Response::Fdb(entries) = context.client()?.request(&request)? else {
        return Err(super::unexpected());
    };
    if args.json {
        output::json(&entries)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::table(
        &["NETWORK", "VNI", "MAC", "IPS", "KIND", "WHERE"],
        entries.into_iter().map(|entry| {
            let place = match (&entry.container, &entry.host, &entry.remote) {
                (Some(container), ..) => container.clone(),
                (None, Some(host), Some(remote)) => format!("{host} ({remote})"),
                (None, None, Some(remote)) => remote.clone(),
                (None, _, None) => "-".to_owned(),
            };
            [
                entry.network,
                entry.vni.to_string(),
                entry.mac,
                output::list(entry.ips),
                entry.kind,
                place,
            ]
        }),
    )?;
    Ok(ExitCode::SUCCESS)
}
