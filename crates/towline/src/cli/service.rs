//! `towline service`: with the words and columns of `docker service`.
//!
//! Does NOT start anything: members are containers of `towline run --service`.

mod options;
mod refused;
mod show;
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
    #[command(visible_alias = "list")]
    Ls(show::LsArgs),
    /// Show all about services, as JSON
    Inspect(show::InspectArgs),
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
    Ps(show::PsArgs),
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
        Command::Ls(args) => show::ls(&args, context)?,
        Command::Inspect(args) => return show::inspect(args, context),
        Command::Ps(args) => return show::ps(args, context),
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
