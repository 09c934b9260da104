//! The loads, and measuring one over one path.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::path::Path;
use super::stats::{Latency, Sample};
use super::tool::Tool;
use crate::agent;
use crate::cpu::{self, CpuGroup};
use crate::load::{Called, Listening, Received, Sent};

/// iperf3's port; each path has namespaces of its own.
pub(super) const IPERF_PORT: u16 = 5201;
/// Where our own servers listen that are reached by a published port.
pub(super) const SERVER_PORT: u16 = 5202;
/// Bytes of a request and of its answer.
const REQUEST_LEN: u16 = 64;

/// What `--only` chooses from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Choice {
    /// TCP, one stream
    Tcp1,
    /// TCP, four streams
    Tcp4,
    /// UDP, 64 bytes of payload
    Udp64,
    /// UDP of mixed sizes: 64 to 263 bytes, and 64 to 1372
    Udpmix,
    /// Requests and responses of 64 bytes over one TCP connection
    Rr,
    /// New TCP connections, a request and a response of 64 bytes over each
    Conn,
}

impl Choice {
    /// Its rows of the result.
    pub(crate) const fn loads(self) -> &'static [Load] {
        match self {
            Self::Tcp1 => &[Load::Tcp1],
            Self::Tcp4 => &[Load::Tcp4],
            Self::Udp64 => &[Load::Udp64],
            Self::Udpmix => &[Load::Udpmix, Load::Udpmix1372],
            Self::Rr => &[Load::Rr],
            Self::Conn => &[Load::Conn],
        }
    }
}

/// One row of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Load {
    Tcp1,
    Tcp4,
    Udp64,
    Udpmix,
    Udpmix1372,
    Rr,
    Conn,
}

impl Load {
    /// For people, with its unit.
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::Tcp1 => "TCP, 1 stream, Gbit/s",
            Self::Tcp4 => "TCP, 4 streams, Gbit/s",
            Self::Udp64 => "UDP 64 B, packets/s",
            Self::Udpmix => "UDP 64-263 B, packets/s",
            Self::Udpmix1372 => "UDP 64-1372 B, packets/s",
            Self::Rr => "TCP request/response, /s",
            Self::Conn => "new TCP connections, /s",
        }
    }

    /// For people, without its unit.
    pub(crate) fn name(self) -> &'static str {
        let title = self.title();
        title.rsplit_once(", ").map_or(title, |(name, _unit)| name)
    }

    pub(crate) const fn unit(self) -> &'static str {
        match self {
            Self::Tcp1 | Self::Tcp4 => "Gbit/s",
            Self::Udp64 | Self::Udpmix | Self::Udpmix1372 => "packets/s",
            Self::Rr => "transactions/s",
            Self::Conn => "connections/s",
        }
    }

    pub(crate) const fn cpu_unit(self) -> &'static str {
        match self {
            Self::Tcp1 | Self::Tcp4 => "s/GB",
            Self::Udp64 | Self::Udpmix | Self::Udpmix1372 => "us/packet",
            Self::Rr => "us/transaction",
            Self::Conn => "us/connection",
        }
    }
}

/// What one run of a load did, before it is divided by its time.
struct Work {
    value: f64,
    /// How much of what `cpu_unit` divides by.
    amount: f64,
    /// Seconds of CPU time in one of `cpu_unit`'s own.
    cpu_scale: f64,
    latency: Option<Latency>,
}

/// Runs `load` over `path` for `seconds`; `tools` counts the generators' CPU time.
pub(crate) fn measure(
    load: Load,
    path: &Path,
    tools: Option<&CpuGroup>,
    seconds: u32,
) -> anyhow::Result<Sample> {
    let usage = || -> anyhow::Result<Duration> {
        let groups = [tools, path.agents.as_ref()].into_iter().flatten();
        let counted = groups
            .map(CpuGroup::usage)
            .sum::<anyhow::Result<Duration>>()?;
        Ok(counted + cpu::of_processes(&path.machines) + cpu::ksoftirqd())
    };
    let run = Run {
        path,
        tools,
        seconds,
    };
    let before = usage()?;
    let work = match load {
        Load::Tcp1 => run.iperf3(1),
        Load::Tcp4 => run.iperf3(4),
        Load::Udp64 => run.datagrams(64, 64),
        Load::Udpmix => run.datagrams(64, 263),
        Load::Udpmix1372 => run.datagrams(64, 1372),
        Load::Rr => run.requests("serve", "call"),
        Load::Conn => run.requests("greet", "knock"),
    }
    .with_context(|| format!("'{}' over the {} path", load.title(), path.kind.name()))?;
    let used = usage()?.saturating_sub(before);
    Ok(Sample {
        value: work.value,
        cpu: used.as_secs_f64() / work.cpu_scale / work.amount,
        latency: work.latency,
    })
}

struct Run<'a> {
    path: &'a Path,
    tools: Option<&'a CpuGroup>,
    seconds: u32,
}

impl Run<'_> {
    fn client(&self, command: &mut Command) -> anyhow::Result<Tool> {
        Tool::start(&self.path.client, self.tools, command)
    }

    fn server(&self, command: &mut Command) -> anyhow::Result<Tool> {
        Tool::start(&self.path.server, self.tools, command)
    }

    fn iperf3(&self, streams: u32) -> anyhow::Result<Work> {
        let (bind, address) = (self.path.bind.to_string(), self.path.address.to_string());
        let port = (IPERF_PORT + self.path.port_offset).to_string();
        let (streams, time) = (streams.to_string(), self.seconds.to_string());
        let mut server = self.server(Command::new("iperf3").args([
            "-s",
            "-1",
            "--forceflush",
            "-B",
            &bind,
            "-p",
            &IPERF_PORT.to_string(),
        ]))?;
        server.wait_for(|line| line.contains("Server listening"))?;
        let client = self.client(Command::new("iperf3").args([
            "-J",
            "-i",
            "0",
            "--connect-timeout",
            "5000",
            "-c",
            &address,
            "-p",
            &port,
            "-P",
            &streams,
            "-t",
            &time,
        ]))?;
        let (bytes, bits_per_second) = parse_iperf3(&client.finish(self.seconds)?)?;
        server.finish(0)?;
        Ok(Work {
            value: bits_per_second / 1e9,
            amount: bytes / 1e9,
            cpu_scale: 1.0,
            latency: None,
        })
    }

    fn datagrams(&self, min: u16, max: u16) -> anyhow::Result<Work> {
        let (sink, to) = self.listener("sink")?;
        let client = self.client(load_command()?.arg("send").args([
            format!("--to={to}"),
            format!("--min={min}"),
            format!("--max={max}"),
            format!("--seconds={}", self.seconds),
        ]))?;
        let sent: Sent = client.finish_json(self.seconds)?;
        let received: Received = sink.finish_json(0)?;
        if received.datagrams < 2 || received.micros == 0 {
            bail!(
                "{} datagrams were sent, {} arrived",
                sent.datagrams,
                received.datagrams
            );
        }
        let amount = as_f64(received.datagrams);
        let value = amount / Duration::from_micros(received.micros).as_secs_f64();
        Ok(Work {
            value,
            amount,
            cpu_scale: 1e-6,
            latency: None,
        })
    }

    fn requests(&self, server: &str, client: &str) -> anyhow::Result<Work> {
        let (server, to) = self.listener(server)?;
        let client = self.client(load_command()?.arg(client).args([
            format!("--to={to}"),
            format!("--size={REQUEST_LEN}"),
            format!("--seconds={}", self.seconds),
        ]))?;
        let called: Called = client.finish_json(self.seconds)?;
        server.finish(0)?;
        let amount = as_f64(called.transactions);
        let value = amount / Duration::from_micros(called.micros.max(1)).as_secs_f64();
        let latency = Some(Latency {
            p50_us: called.p50_us,
            p99_us: called.p99_us,
        });
        Ok(Work {
            value,
            amount,
            cpu_scale: 1e-6,
            latency,
        })
    }

    /// Starts one of our own servers and reads where it listens.
    fn listener(&self, kind: &str) -> anyhow::Result<(Tool, SocketAddr)> {
        let mut server = self.server(
            load_command()?
                .arg(kind)
                .arg(format!("--bind={}", self.path.bind))
                .args(self.path.fixed_port().map(|port| format!("--port={port}"))),
        )?;
        let line = server.wait_for(|_| true)?;
        let Listening { listening } = serde_json::from_str(&line)
            .with_context(|| format!("'{line}' says not where the {kind} listens"))?;
        let port = listening.port() + self.path.port_offset;
        Ok((server, SocketAddr::new(self.path.address, port)))
    }
}

fn load_command() -> anyhow::Result<Command> {
    let mut command = Command::new(agent::program()?);
    command.args(["lab", "load"]);
    Ok(command)
}

/// Counts of a run of seconds are far below 2^53, where f64 is exact.
#[allow(clippy::cast_precision_loss)]
fn as_f64(count: u64) -> f64 {
    count as f64
}

/// Bytes received and bits per second, of `iperf3 -J`.
fn parse_iperf3(text: &str) -> anyhow::Result<(f64, f64)> {
    #[derive(Deserialize)]
    struct Report {
        error: Option<String>,
        #[serde(default)]
        end: End,
    }
    #[derive(Default, Deserialize)]
    struct End {
        sum_received: Option<Sum>,
    }
    #[derive(Deserialize)]
    struct Sum {
        bytes: f64,
        bits_per_second: f64,
    }
    let report: Report = serde_json::from_str(text).context("iperf3 printed no report")?;
    if let Some(error) = report.error {
        bail!("iperf3: {error}");
    }
    match report.end.sum_received {
        Some(sum) if sum.bytes > 0.0 => Ok((sum.bytes, sum.bits_per_second)),
        _ => bail!("iperf3 received nothing"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_iperf3_report_is_read() {
        let good = r#"{"start":{"version":"iperf 3.12"},"intervals":[],
            "end":{"streams":[{}],"sum_sent":{"bytes":99,"bits_per_second":9.0},
                   "sum_received":{"start":0,"end":2.0,"seconds":2.0,"bytes":1000000000,"bits_per_second":4000000000.5,"sender":true}}}"#;
        assert_eq!(parse_iperf3(good).unwrap(), (1e9, 4_000_000_000.5));
        let failed = r#"{"start":{},"intervals":[],"end":{},"error":"unable to connect to server: Connection refused"}"#;
        assert_eq!(
            parse_iperf3(failed).unwrap_err().to_string(),
            "iperf3: unable to connect to server: Connection refused"
        );
        let nothing = r#"{"end":{"sum_received":{"bytes":0,"bits_per_second":0}}}"#;
        assert!(parse_iperf3(nothing).is_err());
        assert!(parse_iperf3("").is_err());
        assert!(parse_iperf3("iperf3: error").is_err());
    }

    #[test]
    fn every_choice_has_rows() {
        use clap::ValueEnum;
        let rows: Vec<Load> = Choice::value_variants()
            .iter()
            .flat_map(|choice| choice.loads())
            .copied()
            .collect();
        let names: Vec<String> = rows
            .iter()
            .map(|load| {
                serde_json::to_value(load)
                    .unwrap()
                    .as_str()
                    .unwrap()
                    .to_owned()
            })
            .collect();
        assert_eq!(
            names,
            [
                "tcp1",
                "tcp4",
                "udp64",
                "udpmix",
                "udpmix1372",
                "rr",
                "conn"
            ]
        );
    }
}
