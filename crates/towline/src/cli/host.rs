//! `towline host`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Subcommand;

use super::filter::Filters;
use super::network::label;
use super::refused::not_built;
use super::{Context, output};
use crate::api::{Host, Request, Response};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the cluster's hosts
    #[command(after_help = "Example: towline host ls")]
    Ls {
        /// Only those that fit: id=PREFIX, name=PART, role=manager|standby|member, label=KEY[=VALUE]
        #[arg(short, long, value_name = "KEY=VALUE")]
        filter: Vec<String>,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Show all about hosts, as JSON
    #[command(after_help = "Example: towline host inspect h1")]
    Inspect {
        /// Names or ids
        #[arg(required = true, value_name = "HOST")]
        hosts: Vec<String>,
        /// As without it: the answer is always JSON
        #[arg(long)]
        json: bool,
    },
    /// Give a host labels, or take some from it: 'run --constraint node.labels.KEY==VALUE' asks for them
    #[command(after_help = "Example: towline host update --label-add disk=ssd h1")]
    Update {
        /// A label to add, or to change, KEY=VALUE; once per label
        #[arg(long, value_name = "KEY=VALUE")]
        label_add: Vec<String>,
        /// The key of a label to take away; once per label
        #[arg(long, value_name = "KEY")]
        label_rm: Vec<String>,
        #[arg(long, hide = true)]
        role: Option<String>,
        #[arg(long, hide = true)]
        availability: Option<String>,
        /// Its name or id
        host: String,
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
        Command::Ls { filter, json } => ls(&filter, json, context)?,
        Command::Inspect { hosts, json: _ } => return inspect(&hosts, context),
        Command::Update {
            label_add,
            label_rm,
            role,
            availability,
            host,
        } => {
            if role.is_some() {
                return Err(not_built(
                    "host update --role",
                    "a host joins with a manager's token, and 'towline promote' makes it the manager",
                ));
            }
            if availability.is_some() {
                return Err(not_built(
                    "host update --availability",
                    "containers start where 'towline run' is called: call it on another host",
                ));
            }
            update(&host, &label_add, label_rm, context)?;
        }
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
    let found = list(context)?.into_iter().find(|host| host.name == name);
    Ok(found.map(|host| host.id))
}

fn update(
    host: &str,
    add: &[String],
    remove: Vec<String>,
    context: &Context,
) -> anyhow::Result<()> {
    if add.is_empty() && remove.is_empty() {
        anyhow::bail!("nothing to change: give --label-add KEY=VALUE or --label-rm KEY");
    }
    let add = add
        .iter()
        .map(|text| label(text))
        .collect::<anyhow::Result<BTreeMap<_, _>>>()?;
    context.client()?.request(&Request::HostUpdate {
        host: host.to_owned(),
        add,
        remove,
    })?;
    output::line(host)
}

fn list(context: &Context) -> anyhow::Result<Vec<Host>> {
    match context.client()?.request(&Request::HostList)? {
        Response::Hosts(hosts) => Ok(hosts),
        _ => Err(super::unexpected()),
    }
}

fn inspect(wanted: &[String], context: &Context) -> anyhow::Result<ExitCode> {
    let hosts = list(context)?;
    let mut code = ExitCode::SUCCESS;
    let mut found = Vec::new();
    for name in wanted {
        match hosts
            .iter()
            .find(|host| host.name == *name || host.id == *name)
        {
            Some(host) => found.push(host),
            None => {
                eprintln!("towline: no host '{name}': 'towline host ls' lists them");
                code = ExitCode::FAILURE;
            }
        }
    }
    output::json(&found)?;
    Ok(code)
}

fn ls(filters: &[String], json: bool, context: &Context) -> anyhow::Result<()> {
    let filters = Filters::parse(filters, &["id", "name", "role", "label"])?;
    let mut hosts = list(context)?;
    hosts.retain(|host| {
        filters.starts("id", &host.id)
            && filters.part_of("name", &host.name)
            && filters.is("role", &host.role)
            && filters.labels("label", &host.labels)
    });
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
