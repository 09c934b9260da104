//! `towline status`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use serde_json::Value;

use super::{Context, output};
use crate::api::{ClusterStatus, Request, Response, Status};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline status --json")]
pub(crate) struct Args {
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<ExitCode> {
    let Response::Status(status) = context.client()?.request(&Request::Status)? else {
        return Err(super::unexpected());
    };
    if args.json {
        output::json(&status)?;
    } else {
        output::line(text(&status).trim_end())?;
        if let Some(cluster) = &status.cluster {
            tables(cluster)?;
        }
        output::warnings(
            status
                .cluster
                .as_ref()
                .map_or(&[], |cluster| &cluster.warnings),
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn text(status: &Status) -> String {
    let mut lines = vec![(
        "agent".to_owned(),
        format!(
            "{}, towline {}, process {}, state in {}",
            status.name, status.version, status.pid, status.state_dir
        ),
    )];
    match &status.cluster {
        Some(cluster) => lines.extend(cluster_lines(cluster)),
        None => lines.push((
            "cluster".to_owned(),
            "none: run 'towline init' for a new one, or 'towline join'".to_owned(),
        )),
    }
    lines
        .iter()
        .map(|(what, value)| format!("{what:<10}{value}\n"))
        .collect()
}

fn cluster_lines(cluster: &ClusterStatus) -> Vec<(String, String)> {
    let mut lines = vec![
        (
            "cluster".to_owned(),
            format!(
                "{}, host {}, VTEP {}, link MTU {}",
                cluster.role,
                cluster.host,
                std::net::SocketAddr::new(cluster.vtep, cluster.port),
                cluster.link_mtu
            ),
        ),
        ("endpoints".to_owned(), cluster.endpoints.to_string()),
        (
            "control".to_owned(),
            match &cluster.source {
                Some(source) => format!(
                    "static: tables come from {}, read {} ago",
                    source.file,
                    age(Some(source.age_ms))
                ),
                None => control(&cluster.control),
            },
        ),
        ("datapath".to_owned(), datapath(&cluster.datapath)),
        ("floods".to_owned(), floods(&cluster.datapath)),
        ("gateway".to_owned(), gateway(&cluster.gateway)),
        ("neighbors".to_owned(), neighbors(&cluster.neighbor_limits)),
        ("traffic".to_owned(), counts(&cluster.traffic)),
        ("drops".to_owned(), counts(&cluster.drops)),
    ];
    if cluster.role == "manager" {
        lines.push((
            "to join".to_owned(),
            "'towline token' prints the command".to_owned(),
        ));
    }
    lines
}

/// The networks followed, and what passed each port and each remote; a table without rows is not shown.
fn tables(cluster: &ClusterStatus) -> anyhow::Result<()> {
    let subscriptions = cluster.control["subscriptions"].as_array();
    if let Some(subscriptions) = subscriptions.filter(|list| !list.is_empty()) {
        output::line("")?;
        output::table(
            &[
                "NETWORK",
                "VNI",
                "ROWS",
                "GENERATION",
                "REVISION",
                "LAST NEWS",
                "LEASED AHEAD",
            ],
            subscriptions.iter().map(|network| {
                [
                    text_of(&network["name"]),
                    network["vni"].to_string(),
                    network["rows"].to_string(),
                    network["generation"].to_string(),
                    network["revision"].to_string(),
                    network["age_ms"]
                        .as_u64()
                        .map_or_else(|| "-".to_owned(), |ms| format!("{} ago", age(Some(ms)))),
                    network["leased"].as_array().map_or(0, Vec::len).to_string(),
                ]
            }),
        )?;
    }
    if !cluster.services.is_empty() {
        output::line("")?;
        output::table(
            &["SERVICE", "ON NETWORK", "MODE", "SERVING", "VIP", "PORTS"],
            cluster.services.iter().map(|service| {
                [
                    service.name.clone(),
                    service.network.clone(),
                    service.mode.clone(),
                    format!("{} of {}", service.serving, service.members),
                    output::list(&service.vips),
                    output::list(&service.ports),
                ]
            }),
        )?;
    }
    if !cluster.ports.is_empty() {
        output::line("")?;
        output::table(
            &[
                "PORT",
                "CONTAINER",
                "NETWORK",
                "FRAMES IN",
                "BYTES IN",
                "FRAMES OUT",
                "BYTES OUT",
                "DROPS",
            ],
            cluster.ports.iter().map(|port| {
                [
                    port.port.to_string(),
                    format!("{} {}", port.container, port.interface),
                    port.network.clone(),
                    port.frames_in.to_string(),
                    port.frame_bytes_in.to_string(),
                    port.frames_out.to_string(),
                    port.frame_bytes_out.to_string(),
                    counts(&port.drops),
                ]
            }),
        )?;
    }
    if !cluster.remotes.is_empty() {
        output::line("")?;
        output::table(
            &[
                "REMOTE",
                "HOST",
                "PATH MTU",
                "DATAGRAMS IN",
                "BYTES IN",
                "DATAGRAMS OUT",
                "BYTES OUT",
                "DROPS",
                "SEND FAILURES",
            ],
            cluster.remotes.iter().map(|remote| {
                [
                    remote.remote.to_string(),
                    remote.host.clone().unwrap_or_else(|| "-".to_owned()),
                    remote
                        .path_mtu
                        .map_or_else(|| "-".to_owned(), |mtu| mtu.to_string()),
                    remote.datagrams_in.to_string(),
                    remote.datagram_bytes_in.to_string(),
                    remote.datagrams_out.to_string(),
                    remote.datagram_bytes_out.to_string(),
                    counts(&remote.drops),
                    counts(&remote.send_failures),
                ]
            }),
        )?;
    }
    Ok(())
}

fn counts(counts: &BTreeMap<String, u64>) -> String {
    output::list(
        counts
            .iter()
            .filter(|(_, count)| **count > 0)
            .map(|(name, count)| format!("{name} {count}")),
    )
}

/// The kernel's limits.
fn neighbors(limits: &BTreeMap<String, u64>) -> String {
    if limits.is_empty() {
        return "the limit is set outside of this network namespace".to_owned();
    }
    let limits = limits
        .iter()
        .map(|(family, limit)| format!("{family} {limit}"));
    format!("at most {} on the whole machine", output::list(limits))
}

/// Which manager answers, or why none does.
fn control(value: &Value) -> String {
    let since = value["since_ms"].as_u64();
    match value["connected_to"].as_str() {
        Some(manager) => format!("connected to {manager} for {}", age(since)),
        None => format!(
            "no manager answers for {} (tried {}): {}; frames flow on what is known",
            age(since),
            texts(&value["managers"]),
            value["last_error"].as_str().unwrap_or("not tried yet"),
        ),
    }
}

/// How much is flooded at most: broadcast, multicast, and what has no entry.
fn floods(datapath: &Value) -> String {
    format!(
        "at most {} copies a second from each port, {} from each remote",
        datapath["port_floods"]["rate"], datapath["remote_floods"]["rate"]
    )
}

fn datapath(value: &Value) -> String {
    let mut parts = vec![
        text_of(&value["kind"]),
        format!("UDP {}", text_of(&value["listen"])),
        format!("{} workers", value["workers"]),
        format!(
            "receive buffer {} KiB",
            value["receive_buffer_bytes"].as_u64().unwrap_or(0) / 1024
        ),
        match value["segments_max"].as_u64() {
            Some(segments) if segments > 1 => format!("UDP_SEGMENT up to {segments}"),
            _ => "no UDP_SEGMENT".to_owned(),
        },
    ];
    let merges = value["merges_datagrams"] == true;
    parts.push(if merges { "UDP_GRO" } else { "no UDP_GRO" }.to_owned());
    let backends = value["backends"].as_array().into_iter().flatten();
    for backend in backends.filter(|backend| backend["ports"] != 0) {
        let on = backend["features"].as_object().into_iter().flatten();
        parts.push(format!(
            "{} ports {} (offloads: {})",
            backend["ports"],
            text_of(&backend["backend"]),
            output::list(on.filter(|(_, on)| **on == true).map(|(name, _)| name)),
        ));
    }
    output::list(parts)
}

fn gateway(value: &Value) -> String {
    if value.is_null() {
        return "-".to_owned();
    }
    let mut parts = vec![
        format!(
            "{} {}",
            text_of(&value["bridge"]),
            if value["up"] == true { "up" } else { "down" }
        ),
        text_of(&value["ipv4"]),
        text_of(&value["ipv6"]),
        format!("{} containers", value["attached"]),
    ];
    let foreign = value["foreign"].as_array().into_iter().flatten();
    parts.extend(foreign.map(|foreign| {
        format!(
            "accepts in {} of {} {} ({}): {}",
            text_of(&foreign["chain"]),
            text_of(&foreign["family"]),
            text_of(&foreign["table"]),
            text_of(&foreign["backend"]),
            text_of(&foreign["state"])
        )
    }));
    output::list(parts)
}

fn age(ms: Option<u64>) -> String {
    match ms {
        None => "ever".to_owned(),
        Some(ms) if ms < 10_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        Some(ms) if ms < 600_000 => format!("{} s", ms / 1000),
        Some(ms) => format!("{} min", ms / 60_000),
    }
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or("-").to_owned()
}

fn texts(value: &Value) -> String {
    output::list(value.as_array().into_iter().flatten().map(text_of))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_manager_is_said_with_the_cause() {
        let value = serde_json::json!({
            "connected_to": null, "since_ms": 75_000, "managers": ["192.0.2.1:4789"], "last_error": "refused"
        });
        assert_eq!(
            control(&value),
            "no manager answers for 75 s (tried 192.0.2.1:4789): refused; frames flow on what is known"
        );
    }

    #[test]
    fn only_offloads_that_are_on_are_named() {
        let value = serde_json::json!({
            "kind": "userspace", "listen": "192.0.2.1:4789", "workers": 2, "receive_buffer_bytes": 4_194_304,
            "segments_max": 64, "merges_datagrams": true,
            "backends": [
                { "backend": "offload", "ports": 3, "features": { "checksum": true, "udp": false } },
                { "backend": "plain", "ports": 0, "features": {} }
            ]
        });
        assert_eq!(
            datapath(&value),
            "userspace, UDP 192.0.2.1:4789, 2 workers, receive buffer 4096 KiB, UDP_SEGMENT up to 64, UDP_GRO, \
             3 ports offload (offloads: checksum)"
        );
    }

    #[test]
    fn the_limits_of_floods_are_said() {
        let value = serde_json::json!({
            "port_floods": { "rate": 20_000, "burst": 20_000 }, "remote_floods": { "rate": 100_000, "burst": 100_000 }
        });
        assert_eq!(
            floods(&value),
            "at most 20000 copies a second from each port, 100000 from each remote"
        );
    }

    #[test]
    fn a_host_without_a_cluster_is_told_what_to_do() {
        let status = Status {
            version: "1".into(),
            pid: 7,
            name: "h1".into(),
            state_dir: "/s".into(),
            cluster: None,
        };
        assert!(text(&status).contains("towline init"));
    }
}
