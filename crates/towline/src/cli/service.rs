//! `towline service`: with the words and columns of `docker service`.
//!
//! Does NOT start anything: members are containers of `towline run --service`.

mod options;
mod table;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Subcommand;

use super::refused::not_built;
use super::{Context, USAGE, failure, output};
use crate::api;
use crate::api::service::{Request, Response};
pub(super) use options::seconds;
use options::{CreateArgs, UpdateArgs};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a service: a name, a virtual address and published ports for containers that come and go
    Create(Box<CreateArgs>),
    /// List services
    #[command(visible_alias = "list", after_help = "Example: towline service ls")]
    Ls {
        /// Print ids alone
        #[arg(short, long)]
        quiet: bool,
        /// Do not cut ids
        #[arg(long)]
        no_trunc: bool,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Show all about services, as JSON
    #[command(after_help = "Example: towline service inspect web")]
    Inspect {
        /// Names or ids
        #[arg(required = true, value_name = "SERVICE")]
        services: Vec<String>,
        /// As without it: the answer is always JSON
        #[arg(long)]
        json: bool,
    },
    /// Change a service; connections that are open stay
    Update(Box<UpdateArgs>),
    /// Remove services; their members run on
    #[command(
        visible_alias = "remove",
        after_help = "Example: towline service rm web"
    )]
    Rm {
        /// Names or ids
        #[arg(required = true, value_name = "SERVICE")]
        services: Vec<String>,
    },
    /// List the members of services
    #[command(after_help = "Example: towline service ps web")]
    Ps {
        /// Names or ids
        #[arg(required = true, value_name = "SERVICE")]
        services: Vec<String>,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    #[command(hide = true, disable_help_flag = true)]
    Scale {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<OsString>,
    },
    #[command(hide = true, disable_help_flag = true)]
    Rollback {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<OsString>,
    },
    #[command(hide = true, disable_help_flag = true)]
    Logs {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<OsString>,
    },
}

pub(crate) fn run(command: Command, context: &Context) -> anyhow::Result<ExitCode> {
    match command {
        Command::Create(args) => {
            let json = args.json;
            let request = Request::Create(Box::new(args.spec()?));
            made(ask(context, request)?, json)?;
        }
        Command::Update(args) => {
            let json = args.json;
            let (service, change) = args.change()?;
            let change = Box::new(change);
            made(ask(context, Request::Update { service, change })?, json)?;
        }
        Command::Ls {
            quiet,
            no_trunc,
            json,
        } => {
            let Response::Services(services) = ask(context, Request::List)? else {
                return Err(super::unexpected());
            };
            if json {
                output::json(&services)?;
            } else {
                table::services(&services, quiet, no_trunc)?;
            }
        }
        Command::Inspect { services, json: _ } => {
            let (services, code) = look_up(context, services)?;
            output::json(&services)?;
            return Ok(code);
        }
        Command::Ps { services, json } => {
            let (services, code) = look_up(context, services)?;
            let members = services
                .iter()
                .flat_map(|service| service.members.iter().map(move |member| (service, member)));
            if json {
                output::json(&members.map(|(_, member)| member).collect::<Vec<_>>())?;
            } else {
                table::members(members)?;
            }
            return Ok(code);
        }
        Command::Rm { services } => return rm(context, services),
        Command::Scale { .. } => return Err(no_scheduler("service scale")),
        Command::Rollback { .. } => {
            return Err(not_built(
                "service rollback",
                "'towline service update' changes it back",
            ));
        }
        Command::Logs { .. } => {
            return Err(not_built(
                "service logs",
                "'towline logs' shows a container's output on its host",
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What Docker does and this program does not: it starts and places nothing.
fn no_scheduler(what: &str) -> anyhow::Error {
    failure(
        USAGE,
        format!(
            "'{what}' does not exist: Towline moves frames, it does not schedule; \
             start members with 'towline run --service NAME'"
        ),
    )
}

fn ask(context: &Context, request: Request) -> anyhow::Result<Response> {
    match context.client()?.request(&api::Request::Service(request))? {
        api::Response::Service(response) => Ok(response),
        _ => Err(super::unexpected()),
    }
}

fn made(response: Response, json: bool) -> anyhow::Result<()> {
    let Response::Service(service) = response else {
        return Err(super::unexpected());
    };
    if json {
        output::json(&service)
    } else {
        output::line(&service.id)
    }
}

/// All that exist of these; one that does not is said, and the code is a failure's.
fn look_up(
    context: &Context,
    names: Vec<String>,
) -> anyhow::Result<(Vec<api::service::Service>, ExitCode)> {
    let mut found = Vec::new();
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match ask(context, Request::Inspect(name)) {
            Ok(Response::Service(service)) => found.push(*service),
            Ok(_) => return Err(super::unexpected()),
            Err(error) => {
                eprintln!("towline: {error:#}");
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok((found, code))
}

fn rm(context: &Context, names: Vec<String>) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match ask(context, Request::Remove(name.clone())) {
            Ok(_) => output::line(&name)?,
            Err(error) => {
                eprintln!("towline: {error:#}");
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}
