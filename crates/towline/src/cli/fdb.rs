//! `towline fdb`.

use std::process::ExitCode;

use super::{Context, output};
use crate::api::{Request, Response};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
IN, OUT and DROPS: frames from and to a local container; of a remote entry, datagrams from and to its
host, for all MAC addresses there together.

Example: towline fdb --network myoverlay")]
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
        &[
            "NETWORK", "VNI", "MAC", "IPS", "KIND", "WHERE", "IN", "OUT", "DROPS",
        ],
        entries.into_iter().map(|entry| {
            let place = match (&entry.container, &entry.host, &entry.remote) {
                (Some(container), ..) => container.clone(),
                (None, Some(host), Some(remote)) => format!("{host} ({remote})"),
                (None, None, Some(remote)) => remote.clone(),
                (None, _, None) => "-".to_owned(),
            };
            let [received, sent, dropped] =
                entry.traffic.map_or(["-"; 3].map(str::to_owned), |passed| {
                    [passed.received, passed.sent, passed.dropped].map(|count| count.to_string())
                });
            [
                entry.network,
                entry.vni.to_string(),
                entry.mac,
                output::list(entry.ips),
                entry.kind,
                place,
                received,
                sent,
                dropped,
            ]
        }),
    )?;
    Ok(ExitCode::SUCCESS)
}
