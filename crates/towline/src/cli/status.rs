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
        ("control".to_owned(), flat(&cluster.control)),
        ("datapath".to_owned(), flat(&cluster.datapath)),
        ("gateway".to_owned(), flat(&cluster.gateway)),
        ("traffic".to_owned(), counts(&cluster.traffic)),
        ("drops".to_owned(), counts(&cluster.drops)),
    ];
    if let Some(command) = &cluster.join_command {
        lines.push(("to join".to_owned(), command.clone()));
    }
    lines
}

/// What passed each port and each remote; a table without rows is not shown.
fn tables(cluster: &ClusterStatus) -> anyhow::Result<()> {
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

/// An object as one line: `name value` pairs. What is absent or off is left out; what is on is its name.
fn flat(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => format!(
            "[{}]",
            items.iter().map(flat).collect::<Vec<_>>().join("; ")
        ),
        Value::Object(fields) => output::list(fields.iter().filter_map(|(name, value)| {
            let name = name.replace('_', " ");
            match value {
                Value::Null | Value::Bool(false) => None,
                Value::Bool(true) => Some(name),
                Value::Array(items) if items.is_empty() => None,
                Value::Object(_) => Some(format!("{name} ({})", flat(value))),
                _ => Some(format!("{name} {}", flat(value))),
            }
        })),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_become_one_line() {
        let value = serde_json::json!({"kind": "userspace", "listen": null, "queues": [1, 2], "on": {"a": true, "b": false}});
        assert_eq!(flat(&value), "kind userspace, on (a), queues [1; 2]");
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
