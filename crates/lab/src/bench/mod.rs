//! `towline lab bench`: the same loads over several paths, in turns, in one run.
//!
//! Every round runs every load over every path, one after the other, and each round begins with another path: what
//! disturbs the machine for a while disturbs all of them. Medians of the rounds are compared, with their spread beside.
//! CPU time is that of the generators, of the path's agents, of ksoftirqd, and of virtual machines as a whole; a path that is fast because it burns
//! another core shows there.

mod load;
pub(crate) mod page;
pub(crate) mod path;
mod report;
mod stats;
mod tool;

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cpu::CpuGroup;
use crate::name::LabName;
use crate::state::{Folder, State};
use crate::{interrupt, output};
use load::{Choice, Load};
pub use page::ReportArgs;

use path::PathKind;
use report::{Machine, NotRun, Report};
use stats::Sample;

/// What `--service` measures.
const SERVICE_LOADS: [Choice; 3] = [Choice::Tcp1, Choice::Rr, Choice::Conn];
const SERVICE_PATHS: [PathKind; 5] = [
    PathKind::Towline,
    PathKind::Apart,
    PathKind::Vip,
    PathKind::Ingress,
    PathKind::Dnat,
];

/// What is measured when nobody says.
const USUAL_PATHS: [PathKind; 4] = [
    PathKind::Underlay,
    PathKind::Kernel,
    PathKind::Towline,
    PathKind::Plain,
];

/// Options of `lab bench`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: towline lab bench --only tcp1,rr --paths kernel,towline --rounds 7\n\n\
                        The lab must be up, with two hosts or more and a container on each; the paths 'local' and 'local-kernel' are\n\
                        between two containers of one host and need --containers 2. Paths of other programs (ovs, tinc, fastd,\n\
                        wireguard-go) need their Debian packages: 'scripts/setup peers' installs them."
)]
pub struct BenchArgs {
    /// How many times each load runs over each path
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// How long each run takes, in seconds
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Which loads
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "tcp1,tcp4,udp64,udpmix,rr",
        value_name = "LOAD,…"
    )]
    only: Vec<Choice>,
    /// Which paths [default: underlay,kernel,towline,plain; without plain where a host is a virtual machine]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PATH,…")]
    paths: Vec<PathKind>,
    /// Measure services: tcp1, rr and conn over towline, apart, vip, ingress and dnat
    #[arg(long, conflicts_with_all = ["only", "paths"])]
    service: bool,
    /// The lab's name
    #[arg(long, default_value = "lab")]
    name: LabName,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let lab = &args.name;
    crate::require_rights("lab bench", lab)?;
    let folder = Folder::of(lab);
    let state = folder.open()?;
    if state.settings.hosts < 2 {
        bail!("the bench needs two hosts: take lab '{lab}' down, and up with --hosts 2 or more");
    }
    let (only, chosen) = if args.service {
        (&SERVICE_LOADS[..], &SERVICE_PATHS[..])
    } else {
        let usual = &USUAL_PATHS[..];
        let paths = match &args.paths[..] {
            // The last of them is for namespaces only.
            [] if state.settings.vms > 0 => &usual[..usual.len() - 1],
            [] => usual,
            chosen => chosen,
        };
        (&args.only[..], paths)
    };
    let loads = unique(only.iter().flat_map(|choice| choice.loads()).copied());
    if loads
        .iter()
        .any(|load| matches!(load, Load::Tcp1 | Load::Tcp4))
    {
        crate::require_tool("iperf3", "iperf3")?;
    }
    let _lock = folder.lock()?;
    interrupt::catch()?;
    // What a bench that was killed left.
    path::take_down(lab, &folder, &state)?;
    let machine = Machine::this();
    let measured = measure(args, &folder, &state, &loads, chosen);
    let taken_down = path::take_down(lab, &folder, &state);
    let (samples, not_run) = measured?;
    let results = report::rows(&samples);
    taken_down.context("can't take away what the bench has added to the lab")?;
    let report = Report {
        date: time::OffsetDateTime::now_utc().date().to_string(),
        wire: state.settings.wire,
        underlay: state.settings.underlay,
        rounds: args.rounds,
        seconds: args.seconds,
        machine,
        results,
        not_run,
    };
    if args.json {
        output::json(&report)
    } else {
        output::line(&report::text(&report))?;
        match &state.settings.machines {
            None => Ok(()),
            Some(shape) => output::line(&format!(
                "{} of {} hosts are virtual machines by {}: figures of these say nothing of other machines.",
                state.settings.vms,
                state.settings.hosts,
                shape.accelerator.name()
            )),
        }
    }
}

type Samples = Vec<(Load, PathKind, Vec<Sample>)>;

fn measure(
    args: &BenchArgs,
    folder: &Folder,
    state: &State,
    loads: &[Load],
    chosen: &[PathKind],
) -> anyhow::Result<(Samples, Vec<NotRun>)> {
    let lab = &args.name;
    let progress = Progress::new(args.rounds, loads.len() * chosen.len());
    progress.say("making the paths");
    let (mut paths, mut not_run) = (Vec::new(), Vec::new());
    for kind in unique(chosen.iter().copied()) {
        interrupt::check()?;
        match path::make(kind, lab, folder, state) {
            Ok(path) => paths.push(path),
            // Another program's fault ends no measurement of ours.
            Err(error) if PathKind::PEERS.contains(&kind) => {
                eprintln!("towline: NOT MEASURED: the {} path: {error:#}", kind.name());
                let why = format!("{error:#}");
                not_run.push(NotRun { path: kind, why });
            }
            Err(error) => {
                return Err(error.context(format!("can't make the {} path", kind.name())));
            }
        }
    }
    // Control groups are root's; virtual machines are counted without.
    let tools = if state.settings.only_machines() {
        None
    } else {
        Some(CpuGroup::create(lab, "load")?)
    };
    let mut samples: Samples = loads
        .iter()
        .flat_map(|load| paths.iter().map(|path| (*load, path.kind, Vec::new())))
        .collect();
    for round in 0..args.rounds as usize {
        progress.round(round);
        for (row, load) in loads.iter().enumerate() {
            for turn in 0..paths.len() {
                interrupt::check()?;
                let column = (turn + round) % paths.len();
                let path = &paths[column];
                progress.say(&format!(
                    "{} over the {} path",
                    load.title(),
                    path.kind.name()
                ));
                let sample = load::measure(*load, path, tools.as_ref(), args.seconds)?;
                samples[row * paths.len() + column].2.push(sample);
                progress.step();
            }
        }
    }
    progress.finish();
    Ok((samples, not_run))
}

/// Each once, in the order given.
fn unique<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut seen = Vec::new();
    for item in items {
        if !seen.contains(&item) {
            seen.push(item);
        }
    }
    seen
}

/// A bar on a terminal, a line for each round elsewhere; always on stderr.
struct Progress {
    bar: Option<ProgressBar>,
    rounds: u32,
}

impl Progress {
    fn new(rounds: u32, steps_a_round: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(u64::from(rounds) * steps_a_round as u64);
            if let Ok(style) =
                ProgressStyle::with_template("{bar:30} {pos}/{len}, {eta} to go: {msg}")
            {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_secs(1));
            bar
        });
        Self { bar, rounds }
    }

    fn round(&self, round: usize) {
        if self.bar.is_none() {
            eprintln!("towline: round {} of {}", round + 1, self.rounds);
        }
    }

    fn say(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
        }
    }

    fn step(&self) {
        if let Some(bar) = &self.bar {
            bar.inc(1);
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_twice_runs_once() {
        assert_eq!(unique([3, 1, 3, 2, 1].into_iter()), [3, 1, 2]);
    }
}
