//! `towline token`.

use std::process::ExitCode;
use std::time::Duration;

use control::{Lasts, Role};

use super::{Context, output};
use crate::api::{Request, Response, TokenWanted};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples: towline token\n          towline token manager --rotate --expires 24h\n\n\
                        Run it on a manager's host. Hosts that have joined do not need the token any more."
)]
pub(crate) struct Args {
    /// What hosts become that join with the token: 'worker' runs containers, 'manager' may also run the cluster's manager
    #[arg(default_value = "worker", value_parser = role)]
    role: Role,
    /// Make a new token; the present one is good no more
    #[arg(long)]
    rotate: bool,
    /// How long it is good for from now on: a number with s, m, h or d, or 'never' to let it be good for ever
    /// [default: as it was; a new one is good for ever]
    #[arg(long, value_name = "DURATION", value_parser = expires)]
    expires: Option<Lasts>,
    /// Print the token alone
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<ExitCode> {
    let request = Request::Token(TokenWanted {
        role: args.role,
        rotate: args.rotate,
        lasts: args.expires,
    });
    let Response::Token(token) = context.client()?.request(&request)? else {
        return Err(super::unexpected());
    };
    if args.json {
        output::json(&token)?;
    } else if args.quiet {
        output::line(&token.token)?;
    } else {
        let validity = match token.expires_in {
            None => "It is good until it is rotated.".to_owned(),
            Some(0) => "It has expired: 'towline token --rotate' makes a new one.".to_owned(),
            Some(seconds) => format!("It expires in {}.", in_words(seconds)),
        };
        output::line(&format!(
            "To add a {} to this cluster, start 'towline agent' on it and run there:\n\n    {}\n\n{validity}",
            token.role, token.join_command
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn role(text: &str) -> Result<Role, String> {
    [Role::Worker, Role::Manager]
        .into_iter()
        .find(|role| role.name() == text)
        .ok_or_else(|| "it is 'worker' or 'manager'".to_owned())
}

fn expires(text: &str) -> Result<Lasts, String> {
    if text == "never" {
        return Ok(Lasts::Forever);
    }
    duration(text).map(|duration| Lasts::Seconds(duration.as_secs()))
}

/// A number of seconds, minutes, hours or days, at least a second.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong =
        || format!("'{text}' is no duration: write a number and s, m, h or d, such as 90s or 24h");
    let (number, unit) = text
        .split_at_checked(text.len().saturating_sub(1))
        .ok_or_else(wrong)?;
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(wrong()),
    };
    let number: u32 = number.parse().map_err(|_| wrong())?;
    if number == 0 {
        return Err(wrong());
    }
    Ok(Duration::from_secs(u64::from(number) * unit))
}

fn in_words(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_a_number_and_a_unit() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(duration("7d"), Ok(Duration::from_secs(7 * 86_400)));
        assert_eq!(expires("never"), Ok(Lasts::Forever));
        for bad in [
            "",
            "h",
            "24",
            "0s",
            "-1h",
            "1.5h",
            "1w",
            "99999999999h",
            "1ä",
            "24 h",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn roles_are_two() {
        assert_eq!(role("manager"), Ok(Role::Manager));
        assert!(role("Worker").is_err());
    }
}
