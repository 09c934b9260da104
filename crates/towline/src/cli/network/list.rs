//! `network ls` and `network prune`: which networks, and how they are shown.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use serde_json::json;

use crate::api::{NetworkSummary, Request, Response};
use crate::cli::filter::Filters;
use crate::cli::template::Template;
use crate::cli::{Context, output, unexpected};

/// The last second of the year 9999, since 1970.
const LAST_SECOND: u64 = 253_402_300_799;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Filters: driver=NAME, id=PART, label=KEY[=VALUE], name=PART, scope=NAME, type=custom|builtin

Example: towline network ls
         towline network ls --filter label=tier --format '{{.Name}} {{.Subnets}}'")]
pub(crate) struct LsArgs {
    /// Only networks for which this holds, KEY=VALUE; once per filter: values of one key are alternatives
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// How to print each: 'json', or a template such as '{{.ID}} {{.Name}}' or 'table {{.Name}}\t{{.VNI}}'. Fields: .ID, .Name,
    /// .Driver, .Scope, .IPv4, .IPv6, .Internal, .Labels, .Label "key", .CreatedAt, .Attachable, .Ingress, .VNI, .MTU, .Subnets
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "json")]
    format: Option<String>,
    /// Print ids alone
    #[arg(short, long)]
    quiet: bool,
    /// Do not cut ids
    #[arg(long)]
    no_trunc: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Filters: until=TIME (made before: a duration ago such as 24h, or a point in time), label=KEY[=VALUE], label!=KEY[=VALUE]

Example: towline network prune --filter until=24h")]
pub(crate) struct PruneArgs {
    /// Do not ask
    #[arg(short, long)]
    force: bool,
    /// Only networks for which this holds, KEY=VALUE; once per filter
    #[arg(long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// Print the names of the networks removed as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn ls(args: &LsArgs, context: &Context) -> anyhow::Result<()> {
    let template = args.format.as_deref().map(Template::parse).transpose()?;
    let keys = ["driver", "id", "label", "name", "scope", "type"];
    let filters = Filters::parse(&args.filter, &keys)?;
    for kind in filters.values("type") {
        if kind != "custom" && kind != "builtin" {
            bail!("invalid filter: 'type'='{kind}': it is 'custom' or 'builtin'");
        }
    }
    let networks = networks(context)?.into_iter();
    let networks: Vec<NetworkSummary> = networks
        .filter(|network| {
            filters.is("driver", &network.driver)
                && filters.part_of("id", &network.id)
                && filters.labels("label", &network.labels)
                && filters.part_of("name", &network.name)
                && filters.is("scope", &network.scope)
                && filters.is("type", "custom")
        })
        .collect();
    if args.json {
        return output::json(&networks);
    }
    let cut = |id: &str| match id.get(..12) {
        Some(short) if !args.no_trunc => short.to_owned(),
        _ => id.to_owned(),
    };
    if let Some(template) = template {
        let fields = |network: &NetworkSummary| {
            json!({
                "ID": cut(&network.id), "Name": network.name, "Driver": network.driver, "Scope": network.scope,
                "IPv4": network.ipv4, "IPv6": network.ipv6, "Internal": network.internal,
                "Attachable": network.attachable, "Ingress": network.ingress, "Labels": network.labels,
                "CreatedAt": at(network.created), "VNI": network.vni, "MTU": network.mtu,
                "Subnets": network.subnets,
            })
        };
        return template.print(&networks.iter().map(fields).collect::<Vec<_>>());
    }
    if args.quiet {
        let mut ids = networks.iter();
        return ids.try_for_each(|network| output::line(&cut(&network.id)));
    }
    output::table(
        &["NETWORK ID", "NAME", "DRIVER", "SCOPE"],
        networks.into_iter().map(|network| {
            [
                cut(&network.id),
                network.name,
                network.driver,
                network.scope,
            ]
        }),
    )
}

pub(super) fn prune(args: &PruneArgs, context: &Context) -> anyhow::Result<()> {
    let filters = Filters::parse(&args.filter, &["until", "label", "label!"])?;
    let now = SystemTime::now();
    let until = filters
        .values("until")
        .map(|text| point(text, now))
        .collect::<anyhow::Result<Vec<u64>>>()?;
    if !args.force {
        eprintln!(
            "WARNING! This will remove all networks of the cluster not used by at least one container or service."
        );
        if !output::agreed()? {
            return Ok(());
        }
    }
    let networks = networks(context)?.into_iter();
    let wanted = networks
        .filter(|network| {
            until.iter().all(|&until| network.created < until)
                && filters.labels("label", &network.labels)
                && filters.no_labels("label!", &network.labels)
        })
        .map(|network| network.id)
        .collect();
    let Response::Pruned(pruned) = context.client()?.request(&Request::NetworkPrune(wanted))?
    else {
        return Err(unexpected());
    };
    if args.json {
        return output::json(&pruned);
    }
    if !pruned.is_empty() {
        output::line("Deleted Networks:")?;
    }
    pruned.iter().try_for_each(|name| output::line(name))
}

fn networks(context: &Context) -> anyhow::Result<Vec<NetworkSummary>> {
    match context.client()?.request(&Request::NetworkList)? {
        Response::Networks(networks) => Ok(networks),
        _ => Err(unexpected()),
    }
}

fn at(seconds: u64) -> String {
    // A host may have made it up; later than the year 9999 there is no way to write it.
    match UNIX_EPOCH.checked_add(Duration::from_secs(seconds)) {
        Some(time) if seconds <= LAST_SECOND => humantime::format_rfc3339_seconds(time).to_string(),
        _ => seconds.to_string(),
    }
}

/// A point in time, in seconds since 1970: so long ago, a number of seconds since 1970, or as RFC 3339 has it.
fn point(text: &str, now: SystemTime) -> anyhow::Result<u64> {
    if let Ok(seconds) = text.parse() {
        return Ok(seconds);
    }
    let time = match humantime::parse_duration(text) {
        Ok(ago) => now.checked_sub(ago),
        Err(_) => humantime::parse_rfc3339_weak(text).ok(),
    };
    let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let since = since.with_context(|| {
        format!("invalid filter 'until={text}': write a duration such as 24h, seconds since 1970, or 2026-11-23T12:00:00Z")
    })?;
    Ok(since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_in_time_is_a_duration_ago_or_a_date() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        for (text, seconds) in [
            ("10", 10),
            ("24h", 1_000_000_000 - 86_400),
            ("1h30m", 1_000_000_000 - 5400),
            ("2001-09-09T01:46:40Z", 1_000_000_000),
        ] {
            assert_eq!(point(text, now).expect(text), seconds, "{text}");
        }
        for bad in ["", "soon", "-5m", "100000000000h", "99999999y"] {
            let error = point(bad, now).expect_err(bad).to_string();
            assert!(error.contains("invalid filter 'until="), "{error}");
        }
    }

    #[test]
    fn a_time_is_shown_in_utc() {
        assert_eq!(at(1_000_000_000), "2001-09-09T01:46:40Z");
        assert_eq!(at(LAST_SECOND), "9999-12-31T23:59:59Z");
        for late in [LAST_SECOND + 1, u64::MAX] {
            assert_eq!(at(late), late.to_string());
        }
    }
}
