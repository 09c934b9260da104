//! `towline lab ping`: who reaches whom, and how fast.

use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::{Context, bail};
use netns::Netns;
use serde::Serialize;

use crate::agent::Host;
use crate::name::{Kind, LabName, Role};
use crate::output;
use crate::pinger::{self, Aim, Answers};
use crate::shapes::Endpoint;
use crate::spot::Spot;
use crate::state::{Folder, Settings};
use crate::{NETWORK, interrupt, topology, up};

/// Widest matrix; with more containers there is a line for each instead.
const MAX_COLUMNS: usize = 16;

/// Options of `lab ping`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: towline lab ping --count 5\n\n\
                        Exit codes: 0 every ping was answered; 1 one was not.")]
pub struct PingArgs {
    /// How many pings for each pair
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// The lab's name
    #[arg(long, default_value = "lab")]
    name: LabName,
    /// Print JSON instead of a matrix
    #[arg(long)]
    json: bool,
}

/// All that was pinged, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    ok: bool,
    pairs: Vec<Line>,
    egress: Vec<Line>,
    gateways: Vec<Line>,
}

/// One pair.
#[derive(Debug, Serialize)]
struct Line {
    from: String,
    to: String,
    sent: u32,
    received: usize,
    rtt_us: Option<Rtt>,
}

/// Round-trip times in microseconds.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Rtt {
    min: u64,
    p50: u64,
    p99: u64,
}

/// What is pinged, before it is.
#[derive(Debug)]
struct Plan {
    from: String,
    /// Nothing: the gateway's address, which is known afterwards.
    to: Option<String>,
    aim: Aim,
}

/// A container of the lab's network.
#[derive(Debug)]
struct Station {
    name: String,
    spot: Spot,
    ip: IpAddr,
}

pub(crate) fn run(args: &PingArgs) -> anyhow::Result<ExitCode> {
    let lab = &args.name;
    crate::require_rights("lab ping", lab)?;
    let folder = Folder::of(lab);
    let settings = folder.open()?.settings;
    let manager = Host::of(lab, &folder, &settings, 1)?;
    let stations = up::endpoints(&manager)?
        .into_iter()
        .map(|endpoint| station(lab, &folder, &settings, endpoint))
        .collect::<anyhow::Result<Vec<_>>>()?;
    if stations.is_empty() {
        bail!(
            "lab '{lab}' has no containers on '{NETWORK}': take it down and up with --containers 1 or more"
        );
    }
    let outside = lab.of(Role::Outside);
    let groups = [
        pairs(&stations),
        egress(&stations, &outside),
        gateways(&stations),
    ];
    interrupt::catch()?;
    let all: Vec<Aim> = groups
        .iter()
        .flatten()
        .map(|plan| plan.aim.clone())
        .collect();
    let mut seen = pinger::ping(&all, args.count)?.into_iter();
    let [pairs, egress, gateways] = groups.map(|group| {
        group
            .into_iter()
            .map(|plan| {
                line(
                    plan,
                    seen.next()
                        .expect("a pair was seen for each that was asked for"),
                )
            })
            .collect::<Vec<_>>()
    });
    let ok = [&pairs, &egress, &gateways]
        .into_iter()
        .flatten()
        .all(|line| line.received == line.sent as usize);
    let report = Report {
        ok,
        pairs,
        egress,
        gateways,
    };
    if args.json {
        output::json(&report)?;
    } else {
        output::line(&matrix(lab, &report))?;
        output::line(&sum(lab, settings.hosts, &report))?;
    }
    Ok(if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn station(
    lab: &LabName,
    folder: &Folder,
    settings: &Settings,
    endpoint: Endpoint,
) -> anyhow::Result<Station> {
    let spot = match lab.role(&endpoint.host) {
        Some(Role::Node(Kind::Host, host)) => {
            Host::of(lab, folder, settings, host)?.container(&endpoint.container)?
        }
        _ => Spot::Here(Netns::open(&endpoint.container)?),
    };
    Ok(Station {
        spot,
        ip: *endpoint
            .ips
            .first()
            .with_context(|| format!("{} has no address on '{NETWORK}'", endpoint.container))?,
        name: endpoint.container,
    })
}

fn pairs(stations: &[Station]) -> Vec<Plan> {
    let ordered = stations
        .iter()
        .flat_map(|from| stations.iter().map(move |to| (from, to)));
    ordered
        .filter(|(from, to)| from.name != to.name)
        .map(|(from, to)| plan(from, Some(to.name.clone()), Some(to.ip)))
        .collect()
}

fn egress(stations: &[Station], outside: &str) -> Vec<Plan> {
    let to = || Some(topology::OUTSIDE_V4.into());
    stations
        .iter()
        .map(|from| plan(from, Some(outside.to_owned()), to()))
        .collect()
}

fn gateways(stations: &[Station]) -> Vec<Plan> {
    stations.iter().map(|from| plan(from, None, None)).collect()
}

fn plan(from: &Station, to: Option<String>, address: Option<IpAddr>) -> Plan {
    Plan {
        from: from.name.clone(),
        to,
        aim: Aim {
            from: from.spot.clone(),
            to: address,
        },
    }
}

fn line(plan: Plan, seen: Answers) -> Line {
    let to = plan.to.unwrap_or_else(|| seen.to.to_string());
    if let Some(reason) = seen.refused {
        eprintln!("towline: {} can't send to {to}: {reason}", plan.from);
    }
    Line {
        from: plan.from,
        to,
        sent: seen.sent,
        received: seen.rtts_us.len(),
        rtt_us: rtt(seen.rtts_us),
    }
}

fn rtt(mut rtts: Vec<u64>) -> Option<Rtt> {
    rtts.sort_unstable();
    // The nearest rank: a time that was seen, not one between two.
    let rank = |percent: usize| {
        rtts.get((rtts.len() * percent).div_ceil(100).max(1) - 1)
            .copied()
    };
    Some(Rtt {
        min: *rtts.first()?,
        p50: rank(50)?,
        p99: rank(99)?,
    })
}

/// One line that sums it up: a pair is ok when every ping of it was answered.
fn sum(lab: &LabName, hosts: u16, report: &Report) -> String {
    let whole = |line: &&Line| line.received == line.sent as usize;
    format!(
        "{lab}: {hosts} hosts, {} containers, {}/{} pairs ok",
        report.egress.len(),
        report.pairs.iter().filter(whole).count(),
        report.pairs.len()
    )
}

/// Medians in microseconds, or what was lost, for people.
fn matrix(lab: &LabName, report: &Report) -> String {
    let prefix = format!("{lab}-");
    let short = |name: &str| name.strip_prefix(&prefix).unwrap_or(name).to_owned();
    let names: Vec<&str> = report
        .egress
        .iter()
        .map(|line| line.from.as_str())
        .collect();
    let wide = names.len() > MAX_COLUMNS;
    let mut header = vec!["from \\ to".to_owned()];
    if wide {
        header.push("all others".to_owned());
    } else {
        header.extend(names.iter().map(|name| short(name)));
    }
    header.extend(["out".to_owned(), "gateway".to_owned()]);
    let rows = names.iter().enumerate().map(|(index, from)| {
        let mut row = vec![short(from)];
        let to: Vec<&Line> = report
            .pairs
            .iter()
            .filter(|line| line.from == *from)
            .collect();
        if wide {
            row.push(summary(&to));
        } else {
            row.extend(names.iter().map(|name| {
                to.iter()
                    .find(|line| line.to == *name)
                    .map_or_else(|| "·".to_owned(), |line| cell(line))
            }));
        }
        row.extend([cell(&report.egress[index]), cell(&report.gateways[index])]);
        row
    });
    let table = output::table(&header, rows);
    let all = || {
        [&report.pairs, &report.egress, &report.gateways]
            .into_iter()
            .flatten()
    };
    let sent: usize = all().map(|line| line.sent as usize).sum();
    let received: usize = all().map(|line| line.received).sum();
    format!("{table}\n\nmedian round trip in µs; {received} of {sent} pings answered")
}

fn cell(line: &Line) -> String {
    match &line.rtt_us {
        Some(rtt) if line.received == line.sent as usize => rtt.p50.to_string(),
        _ => format!("LOST {}/{}", line.sent as usize - line.received, line.sent),
    }
}

fn summary(lines: &[&Line]) -> String {
    let sent: usize = lines.iter().map(|line| line.sent as usize).sum();
    let received: usize = lines.iter().map(|line| line.received).sum();
    let mut medians: Vec<u64> = lines
        .iter()
        .filter_map(|line| line.rtt_us.as_ref())
        .map(|rtt| rtt.p50)
        .collect();
    medians.sort_unstable();
    match medians.get(medians.len() / 2) {
        Some(median) if received == sent => median.to_string(),
        _ => format!("LOST {}/{sent}", sent - received),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test_line(from: &str, to: &str, received: usize) -> Line {
        let rtt_us = (received > 0).then_some(Rtt {
            min: 70,
            p50: 80,
            p99: 90,
        });
        Line {
            from: from.into(),
            to: to.into(),
            sent: 5,
            received,
            rtt_us,
        }
    }

    #[test]
    fn percentiles_are_times_that_were_seen() {
        let micros = |values: &[u64]| values.to_vec();
        assert_eq!(rtt(Vec::new()), None);
        assert_eq!(
            rtt(micros(&[7])),
            Some(Rtt {
                min: 7,
                p50: 7,
                p99: 7
            })
        );
        assert_eq!(
            rtt(micros(&[30, 10, 50, 20, 40])),
            Some(Rtt {
                min: 10,
                p50: 30,
                p99: 50
            })
        );
        let hundred: Vec<u64> = (1..=100).collect();
        assert_eq!(
            rtt(micros(&hundred)),
            Some(Rtt {
                min: 1,
                p50: 50,
                p99: 99
            })
        );
    }

    #[test]
    fn the_json_shape_is_as_documented() {
        let report = Report {
            ok: false,
            pairs: vec![test_line("lab-h1c1", "lab-h2c1", 5)],
            egress: vec![test_line("lab-h1c1", "lab-out", 0)],
            gateways: Vec::new(),
        };
        let expected = serde_json::json!({
            "ok": false,
            "pairs": [{"from": "lab-h1c1", "to": "lab-h2c1", "sent": 5, "received": 5,
                       "rtt_us": {"min": 70, "p50": 80, "p99": 90}}],
            "egress": [{"from": "lab-h1c1", "to": "lab-out", "sent": 5, "received": 0, "rtt_us": null}],
            "gateways": [],
        });
        assert_eq!(serde_json::to_value(&report).unwrap(), expected);
    }

    #[test]
    fn the_matrix_shows_loss_by_name() {
        let lab: LabName = "lab".parse().unwrap();
        let report = Report {
            ok: false,
            pairs: vec![
                test_line("lab-h1c1", "lab-h2c1", 5),
                test_line("lab-h2c1", "lab-h1c1", 3),
            ],
            egress: vec![
                test_line("lab-h1c1", "lab-out", 5),
                test_line("lab-h2c1", "lab-out", 0),
            ],
            gateways: vec![
                test_line("lab-h1c1", "172.31.0.1", 5),
                test_line("lab-h2c1", "172.31.0.1", 5),
            ],
        };
        let text = matrix(&lab, &report);
        let rows: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            rows[0],
            ["from", "\\", "to", "h1c1", "h2c1", "out", "gateway"]
        );
        assert!(
            rows.iter()
                .any(|row| *row == ["h1c1", "·", "80", "80", "80"]),
            "{text}"
        );
        assert!(
            rows.iter()
                .any(|row| *row == ["h2c1", "LOST", "2/5", "·", "LOST", "5/5", "80"]),
            "{text}"
        );
        assert!(text.ends_with("23 of 30 pings answered"), "{text}");
        assert_eq!(
            sum(&lab, 2, &report),
            "lab: 2 hosts, 2 containers, 1/2 pairs ok"
        );
    }

    #[test]
    fn many_containers_get_a_line_each() {
        let lab: LabName = "lab".parse().unwrap();
        let names: Vec<String> = (1..=20).map(|n| format!("lab-h{n}c1")).collect();
        let ordered = names
            .iter()
            .flat_map(|from| names.iter().map(move |to| (from, to)));
        let report = Report {
            ok: true,
            pairs: ordered
                .filter(|(from, to)| from != to)
                .map(|(from, to)| test_line(from, to, 5))
                .collect(),
            egress: names
                .iter()
                .map(|from| test_line(from, "lab-out", 5))
                .collect(),
            gateways: names
                .iter()
                .map(|from| test_line(from, "172.31.0.1", 5))
                .collect(),
        };
        let text = matrix(&lab, &report);
        let longest = text.lines().map(|line| line.chars().count()).max().unwrap();
        assert!(longest < 60, "{text}");
        assert!(text.contains("all others"));
    }
}
