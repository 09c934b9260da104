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
        #[command(flatten)]
        refused: Box<RefusedOptions>,
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
    #[command(after_help = "Example: towline volume inspect pgdata
         towline volume inspect --format '{{.Mountpoint}}' pgdata")]
    Inspect {
        /// Names
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
        /// How to print each: 'json', or a template such as '{{.Mountpoint}} {{json .Labels}}'
        #[arg(short, long, value_name = "TEMPLATE", conflicts_with = "json")]
        format: Option<String>,
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
        /// Print the names of the volumes removed as JSON
        #[arg(long)]
        json: bool,
    },
}

/// Docker's options that are not built, so that each is refused by name: most are of its cluster volumes.
#[derive(Debug, clap::Args)]
pub(crate) struct RefusedOptions {
    #[arg(short, long, hide = true)]
    opt: Vec<String>,
    #[arg(long = "type", hide = true)]
    kind: Option<String>,
    #[arg(long, hide = true)]
    scope: Option<String>,
    #[arg(long, hide = true)]
    sharing: Option<String>,
    #[arg(long, hide = true)]
    group: Option<String>,
    #[arg(long, hide = true)]
    availability: Option<String>,
    #[arg(long, hide = true)]
    required_bytes: Option<String>,
    #[arg(long, hide = true)]
    limit_bytes: Option<String>,
    #[arg(long, hide = true)]
    topology_required: Vec<String>,
    #[arg(long, hide = true)]
    topology_preferred: Vec<String>,
    #[arg(long, hide = true)]
    secret: Vec<String>,
}

impl RefusedOptions {
    fn check(&self) -> anyhow::Result<()> {
        let local = "a volume is a folder of one host; docs/volumes.md has ways to share one";
        for (given, option, instead) in [
            (
                !self.opt.is_empty(),
                "--opt",
                "mount by hand, and give containers the folder with --mount type=bind",
            ),
            (self.kind.is_some(), "--type", local),
            (self.scope.is_some(), "--scope", local),
            (self.sharing.is_some(), "--sharing", local),
            (self.group.is_some(), "--group", local),
            (self.availability.is_some(), "--availability", local),
            (self.required_bytes.is_some(), "--required-bytes", local),
            (self.limit_bytes.is_some(), "--limit-bytes", local),
            (
                !self.topology_required.is_empty(),
                "--topology-required",
                local,
            ),
            (
                !self.topology_preferred.is_empty(),
                "--topology-preferred",
                local,
            ),
            (!self.secret.is_empty(), "--secret", local),
        ] {
            if given {
                return Err(not_built(&format!("volume create {option}"), instead));
            }
        }
        Ok(())
    }
}

pub(crate) fn run(command: Command, context: &Context) -> anyhow::Result<ExitCode> {
    match command {
        Command::Create {
            name,
            driver,
            label,
            refused,
        } => {
            refused.check()?;
            create(name, &driver, &label, context)?;
        }
        Command::Ls {
            quiet,
            filter,
            format,
            json,
        } => {
            let format = format.as_deref().map(Template::parse).transpose()?;
            ls(quiet, &filter, format.as_ref(), json, context)?;
        }
        Command::Inspect {
            volumes,
            format,
            json: _,
        } => return inspect(&volumes, format.as_deref(), context),
        Command::Rm { volumes, force } => return rm(volumes, force, context),
        Command::Prune {
            all,
            force,
            filter,
            json,
        } => prune(all, force, &filter, json, context)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn create(
    name: Option<String>,
    driver: &str,
    labels: &[String],
    context: &Context,
) -> anyhow::Result<()> {
    if driver != "local" {
        anyhow::bail!(
            "volume driver '{driver}' does not exist: leave --driver out; docs/volumes.md has ways to share a folder"
        );
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

fn inspect(names: &[String], format: Option<&str>, context: &Context) -> anyhow::Result<ExitCode> {
    let template = format.map(Template::parse).transpose()?;
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
    match template {
        Some(template) => {
            let objects: Result<Vec<_>, _> = found.iter().map(serde_json::to_value).collect();
            template.print(&objects?)?;
        }
        None => output::json(&found)?,
    }
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

fn prune(
    all: bool,
    force: bool,
    filters: &[String],
    json: bool,
    context: &Context,
) -> anyhow::Result<()> {
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
    let mut pruned = Vec::new();
    let mut outcome = Ok(());
    for volume in unused {
        match remove(&mut client, &volume.name, true) {
            Ok(true) => pruned.push(volume.name),
            Ok(false) => {}
            // A container has taken it meanwhile.
            Err(ClientError::Refused(message)) => output::warnings(&[message]),
            Err(error) => {
                outcome = Err(error.into());
                break;
            }
        }
    }
    // What is gone is said, also when the rest can't be removed.
    if json {
        output::json(&pruned)?;
    } else if !pruned.is_empty() {
        output::line("Deleted Volumes:")?;
        pruned.iter().try_for_each(|name| output::line(name))?;
    }
    outcome
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Options {
        #[command(flatten)]
        refused: RefusedOptions,
    }

    #[test]
    fn options_of_other_volumes_are_refused_by_their_names() {
        for (option, instead) in [
            ("--opt=size=1g", "--mount type=bind"),
            ("--type=mount", "docs/volumes.md"),
            ("--scope=multi", "docs/volumes.md"),
            ("--sharing=all", "docs/volumes.md"),
            ("--group=g", "docs/volumes.md"),
            ("--availability=pause", "docs/volumes.md"),
            ("--required-bytes=1", "docs/volumes.md"),
            ("--limit-bytes=1", "docs/volumes.md"),
            ("--topology-required=a=b", "docs/volumes.md"),
            ("--topology-preferred=a=b", "docs/volumes.md"),
            ("--secret=a=b", "docs/volumes.md"),
        ] {
            let given = Options::try_parse_from(["towline", option]).expect("it is known");
            let error = given.refused.check().expect_err(option).to_string();
            let (name, _) = option.split_once('=').expect("a value");
            let named = format!("'volume create {name}' is not built yet");
            assert!(error.starts_with(&named), "{option}: {error}");
            assert!(error.contains(instead), "{option}: {error}");
        }
    }
}
