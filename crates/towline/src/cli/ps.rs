//! `towline ps`: the containers of this host.

use std::process::ExitCode;

use super::{Context, output, unexpected};
use crate::api::container::{Container, Part, Request, Response};
use crate::api::{self};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline ps -a")]
pub(crate) struct Args {
    /// Also containers that have ended
    #[arg(short, long)]
    all: bool,
    /// Print ids alone
    #[arg(short, long)]
    quiet: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<ExitCode> {
    let request = api::Request::Container(Request::List { all: args.all });
    let api::Response::Container(Response::List(containers)) =
        context.client()?.request(&request)?
    else {
        return Err(unexpected());
    };
    if args.json {
        output::json(&containers)?;
    } else if args.quiet {
        for container in &containers {
            output::line(&container.id)?;
        }
    } else {
        let headings = [
            "CONTAINER ID",
            "COMMAND",
            "CREATED",
            "STATUS",
            "NETWORKS",
            "SERVICE",
            "PORTS",
            "NAMES",
        ];
        output::table(&headings, containers.iter().map(row))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(container: &Container) -> [String; 8] {
    let now = crate::shim::folder::now();
    let places = container
        .endpoints
        .iter()
        .map(|place| format!("{} {}", place.network, output::list(&place.ips)));
    [
        container.id.clone(),
        shorten(&container.command.join(" ")),
        format!("{} ago", duration(now.saturating_sub(container.created))),
        status(container, now),
        output::list(places),
        container
            .service
            .as_ref()
            .map_or_else(|| "-".to_owned(), part),
        output::list(&container.ports),
        container.name.clone(),
    ]
}

/// The service, and whether the container serves.
fn part(part: &Part) -> String {
    let state = match (&part.health, part.serving) {
        (Some(health), _) if health != "healthy" => health,
        (_, true) => "serving",
        (_, false) => "not serving",
    };
    format!("{} ({state})", part.service)
}

fn status(container: &Container, now: u64) -> String {
    match (
        container.state.as_str(),
        container.exit_code,
        container.finished,
    ) {
        ("running", ..) => format!("Up {}", duration(now.saturating_sub(container.created))),
        ("exited", Some(code), Some(finished)) => {
            format!(
                "Exited ({code}) {} ago",
                duration(now.saturating_sub(finished))
            )
        }
        (state, ..) => state.to_owned(),
    }
}

/// The command in quotes, at most 20 characters of it, as Docker shows it. Control characters are not printed.
fn shorten(command: &str) -> String {
    let mut shown: String = command
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(20)
        .collect();
    if command.chars().nth(20).is_some() {
        shown.pop();
        shown.push('…');
    }
    format!("\"{shown}\"")
}

/// Seconds in the largest unit that fits.
fn duration(seconds: u64) -> String {
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86400 => (seconds / 3600, "hour"),
        _ => (seconds / 86400, "day"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_commands_are_short() {
        assert_eq!(duration(1), "1 second");
        assert_eq!(duration(59), "59 seconds");
        assert_eq!(duration(60), "1 minute");
        assert_eq!(duration(7200), "2 hours");
        assert_eq!(duration(90_000), "1 day");
        assert_eq!(shorten("sleep 60"), "\"sleep 60\"");
        assert_eq!(
            shorten("abcdefghijklmnopqrstuvwxyz"),
            "\"abcdefghijklmnopqrs…\""
        );
        assert_eq!(
            shorten("a\u{1b}[31m"),
            "\"a [31m\"",
            "no escape sequence reaches the terminal"
        );
    }
}
