//! `towline volume`: with the words and columns of `docker volume`.

use std::process::ExitCode;

use clap::Subcommand;

use super::filter::Filters;
use super::network::label;
use super::refused::not_built;
use super::template::Template;
use super::{Context, output, unexpected};
use crate::api::volume::{Request, Response, Volume};
use crate::api::{self};
use crate::client::{Client, ClientError};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a volume
    #[command(after_help = "Example: towline volume create --label tier=db pgdata")]
    Create {
        /// Its name, `[a-zA-Z0-9][a-zA-Z0-9_.-]+` [default: 64 random hexadecimal digits]
        name: Option<String>,
        /// What keeps it; only 'local' exists: a folder of this host
        #[arg(short, long, default_value = "local")]
        driver: String,
        /// A label, KEY=VALUE; once per label
        #[arg(long, value_name = "KEY=VALUE")]
        label: Vec<String>,
        #[arg(short, long, hide = true)]
        opt: Vec<String>,
    },
    /// List this host's volumes
    #[command(
        visible_alias = "list",
        after_help = "Example: towline volume ls --filter dangling=true"
    )]
    Ls {
        /// Print names alone
        #[arg(short, long)]
        quiet: bool,
        /// Only those that fit: dangling=true|false (no container has it), driver=NAME, label=KEY[=VALUE], name=PART
        #[arg(short, long, value_name = "KEY=VALUE")]
        filter: Vec<String>,
        /// How to print each: 'json', or a template such as '{{.Name}}' or 'table {{.Name}}\t{{.Mountpoint}}'. Fields: .Name, .Driver,
        /// .Scope, .Mountpoint, .Created, .Labels, .Label "key", .Anonymous, .Containers
        #[arg(long, value_name = "TEMPLATE", conflicts_with = "json")]
        format: Option<String>,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Show all about volumes, as JSON
    #[command(after_help = "Example: towline volume inspect pgdata")]
    Inspect {
        /// Names
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
        /// As without it: the answer is always JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove volumes that no container has, with what is in them
    #[command(
        visible_alias = "remove",
        after_help = "Example: towline volume rm pgdata"
    )]
    Rm {
        /// Names
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
        /// One that does not exist is no error
        #[arg(short, long)]
        force: bool,
    },
    /// Remove all volumes that nobody named and no container has
    #[command(after_help = "Example: towline volume prune --force --filter label=tier=test")]
    Prune {
        /// Those that somebody named, too
        #[arg(short, long)]
        all: bool,
        /// Do not ask before
        #[arg(short, long)]
        force: bool,
        /// Only those that fit: label=KEY[=VALUE], label!=KEY[=VALUE]
        #[arg(long, value_name = "KEY=VALUE")]
        filter: Vec<String>,
    },
}

pub(crate) fn run(command: Command, context: &Context) -> anyhow::Result<ExitCode> {
    match command {
        Command::Create {
            name,
            driver,
            label,
            opt,
        } => create(name, &driver, &label, &opt, context)?,
        Command::Ls {
            quiet,
            filter,
            format,
            json,
        } => {
            let format = format.as_deref().map(Template::parse).transpose()?;
            ls(quiet, &filter, format.as_ref(), json, context)?;
        }
        Command::Inspect { volumes, json: _ } => return inspect(&volumes, context),
        Command::Rm { volumes, force } => return rm(volumes, force, context),
        Command::Prune { all, force, filter } => prune(all, force, &filter, context)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn create(
    name: Option<String>,
    driver: &str,
    labels: &[String],
    options: &[String],
    context: &Context,
) -> anyhow::Result<()> {
    if driver != "local" {
        anyhow::bail!(
            "volume driver '{driver}' does not exist: leave --driver out; docs/volumes.md has ways to share a folder"
        );
    }
    if !options.is_empty() {
        return Err(not_built(
            "volume create --opt",
            "mount by hand, and give containers the folder with --mount type=bind",
        ));
    }
    let labels = labels
        .iter()
        .map(|text| label(text))
        .collect::<anyhow::Result<_>>()?;
    let request = Request::Create { name, labels };
    match context.client()?.request(&api::Request::Volume(request))? {
        api::Response::Volume(Response::Created(name)) => output::line(&name),
        _ => Err(unexpected()),
    }
}

fn ls(
    quiet: bool,
    filters: &[String],
    format: Option<&Template>,
    json: bool,
    context: &Context,
) -> anyhow::Result<()> {
    let filters = Filters::parse(filters, &["dangling", "driver", "label", "name"])?;
    for value in filters.values("dangling") {
        if !["true", "1", "false", "0"].contains(&value) {
            anyhow::bail!("invalid filter 'dangling={value}': it is true or false");
        }
    }
    let volumes = list(context)?.into_iter().filter(|volume| {
        let dangling = if volume.containers.is_empty() {
            ["true", "1"]
        } else {
            ["false", "0"]
        };
        let mut wanted = filters.values("dangling").peekable();
        let fits = wanted.peek().is_none() || wanted.any(|value| dangling.contains(&value));
        fits && filters.is("driver", &volume.driver)
            && filters.labels("label", &volume.labels)
            && filters.part_of("name", &volume.name)
    });
    if json {
        return output::json(&volumes.collect::<Vec<_>>());
    }
    if let Some(format) = format {
        let objects: Result<Vec<_>, _> = volumes.map(serde_json::to_value).collect();
        return format.print(&objects?);
    }
    if quiet {
        for volume in volumes {
            output::line(&volume.name)?;
        }
        return Ok(());
    }
    output::table(
        &["DRIVER", "VOLUME NAME"],
        volumes.map(|volume| [volume.driver, volume.name]),
    )
}

fn inspect(names: &[String], context: &Context) -> anyhow::Result<ExitCode> {
    let mut known = list(context)?;
    let mut code = ExitCode::SUCCESS;
    let mut found = Vec::new();
    for name in names {
        match known.iter().position(|volume| volume.name == *name) {
            Some(index) => found.push(known.swap_remove(index)),
            None if found.iter().any(|volume: &Volume| volume.name == *name) => {}
            None => {
                eprintln!("towline: get {name}: no such volume: 'towline volume ls' lists them");
                code = ExitCode::FAILURE;
            }
        }
    }
    output::json(&found)?;
    Ok(code)
}

fn rm(names: Vec<String>, force: bool, context: &Context) -> anyhow::Result<ExitCode> {
    let mut client = context.client()?;
    let mut code = ExitCode::SUCCESS;
    // One that can't be removed doesn't spare the others, as in Docker.
    for name in names {
        match remove(&mut client, &name, force) {
            Ok(_) => output::line(&name)?,
            Err(ClientError::Refused(message)) => {
                eprintln!("towline: {message}");
                code = ExitCode::FAILURE;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(code)
}

fn prune(all: bool, force: bool, filters: &[String], context: &Context) -> anyhow::Result<()> {
    let filters = Filters::parse(filters, &["label", "label!"])?;
    let kind = if all { "all" } else { "anonymous" };
    if !force {
        eprintln!(
            "WARNING! This will remove {kind} local volumes not used by at least one container."
        );
        if !output::agreed()? {
            return Ok(());
        }
    }
    let unused = list(context)?.into_iter().filter(|volume| {
        volume.containers.is_empty()
            && (all || volume.anonymous)
            && filters.labels("label", &volume.labels)
            && filters.no_labels("label!", &volume.labels)
    });
    let mut client = context.client()?;
    for volume in unused {
        match remove(&mut client, &volume.name, true) {
            Ok(true) => output::line(&volume.name)?,
            Ok(false) => {}
            // A container has taken it meanwhile.
            Err(ClientError::Refused(message)) => output::warnings(&[message]),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn list(context: &Context) -> anyhow::Result<Vec<Volume>> {
    match context
        .client()?
        .request(&api::Request::Volume(Request::List))?
    {
        api::Response::Volume(Response::List(volumes)) => Ok(volumes),
        _ => Err(unexpected()),
    }
}

/// Whether there was one.
fn remove(client: &mut Client, name: &str, force: bool) -> Result<bool, ClientError> {
    let request = Request::Remove {
        name: name.to_owned(),
        force,
    };
    let response = client.request(&api::Request::Volume(request))?;
    Ok(!matches!(
        response,
        api::Response::Volume(Response::Removed(false))
    ))
}
