//! `towline events`.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use control::events::{Action, ClusterEvent, From, Subject, Told};

use super::{Context, USAGE, failure, output};
use crate::api::{Request, Response};

/// The wait before a manager that went away is asked again.
const RETRY: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Follows until it is interrupted. The manager remembers the last 4,096 events of its present life; a reader that is too slow
is told how many it missed.

Example: towline events --since 10m --network myoverlay")]
pub(crate) struct Args {
    /// Begin with what happened then: a time ago (90s, 10m, 2h) or seconds since 1970 [default: now]
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only this network, by name
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args, context: &Context) -> anyhow::Result<ExitCode> {
    let mut from = match &args.since {
        Some(since) => From::Time(time(since, SystemTime::now())?),
        None => From::Now,
    };
    let mut told = ask(from, context)?;
    loop {
        if told.missed > 0 {
            eprintln!("towline: note: {} events were missed", told.missed);
        }
        for event in &told.events {
            let wanted = args.network.as_deref();
            if wanted.is_none() || event.subject.network() == wanted {
                print(event, args.json)?;
            }
        }
        from = From::Position(told.position);
        told = match ask(from, context) {
            Ok(told) => told,
            Err(error) => wait(&error, from, context),
        };
    }
}

/// Asks until somebody answers.
fn wait(error: &anyhow::Error, from: From, context: &Context) -> Told {
    eprintln!("towline: note: {error:#}; waiting");
    loop {
        std::thread::sleep(RETRY);
        if let Ok(told) = ask(from, context) {
            return told;
        }
    }
}

fn ask(from: From, context: &Context) -> anyhow::Result<Told> {
    let Response::Events(told) = context.client()?.request(&Request::Events(from))? else {
        bail!(super::unexpected());
    };
    Ok(told)
}

/// Milliseconds since 1970 of a time as a person gives it.
fn time(given: &str, now: SystemTime) -> anyhow::Result<u64> {
    let since_1970 = if let Ok(seconds) = given.parse() {
        Duration::from_secs(seconds)
    } else {
        let ago = humantime::parse_duration(given).map_err(|error| {
            failure(
                USAGE,
                format!("invalid --since '{given}' ({error}): give a time ago like 90s, 10m or 2h, or seconds since 1970"),
            )
        })?;
        now.checked_sub(ago)
            .and_then(|then| then.duration_since(UNIX_EPOCH).ok())
            .unwrap_or_default()
    };
    u64::try_from(since_1970.as_millis()).context("a time too far in the future")
}

fn print(event: &ClusterEvent, json: bool) -> anyhow::Result<()> {
    if json {
        return output::line(&serde_json::to_string(event)?);
    }
    output::line(&line(event))
}

fn line(event: &ClusterEvent) -> String {
    let time = UNIX_EPOCH
        .checked_add(Duration::from_millis(event.time_ms))
        .map_or_else(
            || "-".to_owned(),
            |time| humantime::format_rfc3339_millis(time).to_string(),
        );
    let action = match event.action {
        Action::Join => "join",
        Action::Create => "create",
        Action::Update => "update",
        Action::Up => "up",
        Action::Down => "down",
        Action::Remove => "remove",
    };
    let subject = match &event.subject {
        Subject::Host { host, vtep } => format!("host      {action:<7} {host} ({vtep})"),
        Subject::Network { network, vni } => {
            format!("network   {action:<7} {network} (VNI {vni})")
        }
        Subject::Endpoint {
            network,
            container,
            host,
            mac,
            ips,
            ..
        } => {
            let ips = output::list(ips);
            format!("endpoint  {action:<7} {container} on {host}: {network} {ips} {mac}")
        }
        Subject::Service {
            service, network, ..
        } => format!("service   {action:<7} {service} on {network}"),
        Subject::Member {
            service,
            network,
            container,
            host,
            ..
        } => format!("member    {action:<7} {container} on {host}: {service} ({network})"),
    };
    format!("{time}  {subject}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_ago_or_absolute() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000);
        assert_eq!(time("10m", now).expect("good"), 400_000);
        assert_eq!(time("7", now).expect("good"), 7_000);
        assert_eq!(time("1h", now).expect("before 1970 is all there is"), 0);
        let error = time("soon", now).expect_err("no time").to_string();
        assert!(error.contains("invalid --since 'soon'"), "{error}");
        assert!(time(&u64::MAX.to_string(), now).is_err());
    }

    #[test]
    fn an_event_is_one_line() {
        let event = ClusterEvent {
            time_ms: 1_500,
            action: Action::Up,
            subject: Subject::Host {
                host: "h1".to_owned(),
                vtep: [192, 0, 2, 1].into(),
            },
        };
        let wanted = "1970-01-01T00:00:01.500Z  host      up      h1 (192.0.2.1)";
        assert_eq!(line(&event), wanted);
    }
}
