//! `towline host`.

use std::process::ExitCode;

use clap::Subcommand;

use super::{Context, output};
use crate::api::{Request, Response};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the cluster's hosts
    #[command(after_help = "Example: towline host ls")]
    Ls {
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Remove a host for good: its containers' addresses are freed, and its certificate is not taken again
    #[command(after_help = "Example: towline host rm h3\n\n\
                            A host that was removed by mistake: 'towline leave --force' there, then 'towline join'.")]
    Rm {
        /// Its name or id; an id also of a host that is no member (any more), on a manager's host
        host: String,
        /// Also when it is connected: it is cut off at once, with its containers
        #[arg(short, long)]
        force: bool,
    },
}

pub(crate) fn run(command: Command, context: &Context) -> anyhow::Result<ExitCode> {
    match command {
        Command::Ls { json } => ls(json, context)?,
        Command::Rm { host, force } => {
            let id = id_of(&host, context)?;
            context.client()?.request(&Request::HostRemove {
                host: host.clone(),
                force,
            })?;
            output::line(&host)?;
            if let Some(id) = id {
                output::warnings(&[format!(
                    "its id was {id}: should the manager's store be lost, 'towline host rm {id}' shuts it out again"
                )]);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The id of a host that is a member under this name.
fn id_of(name: &str, context: &Context) -> anyhow::Result<Option<String>> {
    let Response::Hosts(hosts) = context.client()?.request(&Request::HostList)? else {
        return Err(super::unexpected());
    };
    let found = hosts.into_iter().find(|host| host.name == name);
    Ok(found.map(|host| host.id))
}

fn ls(json: bool, context: &Context) -> anyhow::Result<()> {
    let Response::Hosts(hosts) = context.client()?.request(&Request::HostList)? else {
        return Err(super::unexpected());
    };
    if json {
        return output::json(&hosts);
    }
    output::table(
        &["HOST ID", "NAME", "VTEP", "LINK MTU", "STATE", "ROLE"],
        hosts.into_iter().map(|host| {
            let this = if host.this { " *" } else { "" };
            [
                format!("{}{this}", host.id.get(..12).unwrap_or(&host.id)),
                host.name,
                std::net::SocketAddr::new(host.vtep, host.port).to_string(),
                host.link_mtu.to_string(),
                host.state,
                host.role,
            ]
        }),
    )
}
