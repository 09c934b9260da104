//! The result: JSON for programs, a table for people.

use std::borrow::Cow;
use std::fs;

use serde::{Deserialize, Serialize};

use super::load::Load;
use super::path::PathKind;
use super::stats::{self, Sample, Summary};
use crate::output;
use crate::topology::{Underlay, Wire};

/// All that was measured, as `--json` prints it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The day it was measured (UTC), as 2026-11-23.
    pub(crate) date: String,
    pub(crate) wire: Wire,
    pub(crate) underlay: Underlay,
    pub(crate) rounds: u32,
    pub(crate) seconds: u32,
    pub(crate) machine: Machine,
    pub(crate) results: Vec<Row>,
    /// Other programs' paths that were asked for in vain.
    pub(crate) not_run: Vec<NotRun>,
}

/// A path that could not be measured.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct NotRun {
    pub(crate) path: PathKind,
    pub(crate) why: String,
}

impl NotRun {
    /// One line for each, for people.
    pub(crate) fn lines(not_run: &[Self]) -> String {
        not_run
            .iter()
            .map(|Self { path, why }| format!("NOT MEASURED: {}: {why}\n", path.name()))
            .collect()
    }
}

/// Where it was measured: figures of different machines can't be compared, only ratios can.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cpus: usize,
    pub(crate) cpu: String,
    pub(crate) memory_mb: u64,
    pub(crate) kernel: String,
    /// Processes that wanted a CPU in the minute before: above 0.5 others disturbed the measurement.
    pub(crate) load_average: f64,
}

/// One load over one path.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) load: Load,
    pub(crate) path: PathKind,
    pub(crate) unit: Cow<'static, str>,
    #[serde(flatten)]
    pub(crate) summary: Summary,
    cpu_unit: Cow<'static, str>,
    p50_us: Option<f64>,
    p99_us: Option<f64>,
    pub(crate) vs_kernel: Option<f64>,
    vs_underlay: Option<f64>,
    /// Of a path to a service's member, and of one where no service is, against the way between two containers.
    #[serde(default)]
    vs_towline: Option<f64>,
}

impl Machine {
    pub(crate) fn this() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal").unwrap_or_default();
        let kilobytes: u64 = memory
            .split(' ')
            .next()
            .and_then(|number| number.parse().ok())
            .unwrap_or(0);
        Self {
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get),
            cpu: field(&read("/proc/cpuinfo"), "model name")
                .unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            memory_mb: kilobytes / 1000,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load_average: read("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or(0.0),
        }
    }
}

/// Sums up each load over each path, and compares.
pub(crate) fn rows(samples: &[(Load, PathKind, Vec<Sample>)]) -> Vec<Row> {
    let summaries: Vec<(Load, PathKind, Summary)> = samples
        .iter()
        .filter_map(|(load, path, samples)| Some((*load, *path, stats::summarize(samples)?)))
        .collect();
    let median_of = |load, path| {
        summaries
            .iter()
            .find(|(a, b, _)| (*a, *b) == (load, path))
            .map(|(.., summary)| summary.median)
    };
    summaries
        .iter()
        .map(|(load, path, summary)| Row {
            load: *load,
            path: *path,
            unit: load.unit().into(),
            cpu_unit: load.cpu_unit().into(),
            p50_us: summary.latency.map(|latency| rounded(latency.p50_us)),
            p99_us: summary.latency.map(|latency| rounded(latency.p99_us)),
            vs_kernel: stats::ratio(summary.median, median_of(*load, path.kernels())).map(rounded),
            vs_underlay: stats::ratio(summary.median, median_of(*load, PathKind::Underlay))
                .filter(|_| !path.is_local())
                .map(rounded),
            vs_towline: stats::ratio(summary.median, median_of(*load, PathKind::Towline))
                .filter(|_| path.is_beside_services())
                .map(rounded),
            summary: Summary {
                median: rounded(summary.median),
                min: rounded(summary.min),
                max: rounded(summary.max),
                samples: summary.samples.iter().copied().map(rounded).collect(),
                cpu: rounded(summary.cpu),
                cpu_samples: summary.cpu_samples.iter().copied().map(rounded).collect(),
                p99_samples: summary.p99_samples.iter().copied().map(rounded).collect(),
                latency: None,
            },
        })
        .collect()
}

/// To three places after the point: more is noise.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

impl Report {
    /// What was measured of one load over one path.
    pub(crate) fn row(&self, load: Load, path: PathKind) -> Option<&Row> {
        self.results
            .iter()
            .find(|row| (row.load, row.path) == (load, path))
    }

    /// Whether it measured ways to a service's member.
    pub(crate) fn is_of_services(&self) -> bool {
        self.results.iter().any(|row| row.path.is_service())
    }

    /// What a path's rates are compared with.
    pub(crate) fn yardstick(&self, path: PathKind) -> PathKind {
        if self.is_of_services() {
            PathKind::Towline
        } else {
            path.kernels()
        }
    }

    /// How its underlay carries packets, in words.
    pub(crate) const fn wire_in_words(&self) -> &'static str {
        match self.wire {
            Wire::Mtu => "no packet larger than the MTU on the wire",
            Wire::Gso => "packets of up to 64 KiB on the wire",
        }
    }
}

/// Heads of a table's columns.
pub(crate) const HEADER: [&str; 9] = [
    "LOAD",
    "PATH",
    "MEDIAN",
    "MIN - MAX",
    "CPU",
    "P50 / P99 µs",
    "VS KERNEL",
    "VS UNDERLAY",
    "VS TOWLINE",
];

/// A table's cells, each load named once.
pub(crate) fn cells(results: &[Row]) -> impl Iterator<Item = Vec<String>> + '_ {
    let mut last = None;
    results.iter().map(move |row| {
        let title = if last.replace(row.load) == Some(row.load) {
            ""
        } else {
            row.load.title()
        };
        let times = |ratio: Option<f64>| {
            ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}x"))
        };
        let latency = match (row.p50_us, row.p99_us) {
            (Some(p50), Some(p99)) => format!("{p50:.0} / {p99:.0}"),
            _ => "-".to_owned(),
        };
        vec![
            title.to_owned(),
            row.path.name().to_owned(),
            short(row.summary.median),
            format!("{} - {}", short(row.summary.min), short(row.summary.max)),
            format!(
                "{:.2} {}",
                row.summary.cpu,
                row.cpu_unit.replacen("us", "µs", 1)
            ),
            latency,
            times(row.vs_kernel),
            times(row.vs_underlay),
            times(row.vs_towline),
        ]
    })
}

/// The table.
pub(crate) fn text(report: &Report) -> String {
    let table = output::table(&HEADER, cells(&report.results));
    let Machine {
        cpus,
        cpu,
        kernel,
        load_average,
        ..
    } = &report.machine;
    format!(
        "{table}\n\n{}{} rounds of {} s, medians; {}.\n\
         {cpus} x {cpu}, Linux {kernel}; load average before: {load_average:.2}.\n\
         All hosts share this machine's CPUs: compare ratios, and read the CPU column beside them.",
        NotRun::lines(&report.not_run),
        report.rounds,
        report.seconds,
        report.wire_in_words()
    )
}

/// A number of a few digits: 4.69, 181 k, 1.20 M.
pub(crate) fn short(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{:.2} M", value / 1e6),
        value if value >= 1e5 => format!("{:.0} k", value / 1e3),
        value if value >= 1e3 => format!("{:.1} k", value / 1e3),
        value => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::stats::Latency;

    fn sample(value: f64, cpu: f64) -> Sample {
        Sample {
            value,
            cpu,
            latency: None,
        }
    }

    fn report() -> Report {
        let timed = |value| Sample {
            value,
            cpu: 40.0,
            latency: Some(Latency {
                p50_us: 41.26,
                p99_us: 119.0,
            }),
        };
        let samples = [
            (
                Load::Tcp1,
                PathKind::Underlay,
                vec![sample(5.0, 2.0), sample(4.0, 1.0), sample(4.5, 1.5)],
            ),
            (Load::Tcp1, PathKind::Kernel, vec![sample(3.0, 2.0); 3]),
            (Load::Tcp1, PathKind::Towline, vec![sample(1.5, 3.0); 3]),
            (Load::Tcp1, PathKind::LocalKernel, vec![sample(10.0, 1.0)]),
            (Load::Tcp1, PathKind::Local, vec![sample(8.0, 1.0)]),
            (Load::Rr, PathKind::Towline, vec![timed(21_400.0)]),
        ];
        Report {
            date: "2026-11-23".into(),
            wire: Wire::Mtu,
            underlay: Underlay::V4,
            rounds: 3,
            seconds: 2,
            machine: Machine {
                cpus: 2,
                cpu: "a CPU".into(),
                memory_mb: 8000,
                kernel: "6.18.0".into(),
                load_average: 0.1,
            },
            results: rows(&samples),
            not_run: vec![NotRun {
                path: PathKind::Tinc,
                why: "'tincd' is missing".into(),
            }],
        }
    }

    #[test]
    fn the_json_shape_is_as_documented() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(
            (&json["wire"], &json["rounds"], &json["seconds"]),
            (&"mtu".into(), &3.into(), &2.into())
        );
        let expected = serde_json::json!({
            "load": "tcp1", "path": "underlay", "unit": "Gbit/s", "median": 4.5, "min": 4.0, "max": 5.0,
            "samples": [5.0, 4.0, 4.5], "cpu": 1.5, "cpu_samples": [2.0, 1.0, 1.5], "p99_samples": [], "cpu_unit": "s/GB",
            "p50_us": null, "p99_us": null,
            "vs_kernel": 1.5, "vs_underlay": 1.0, "vs_towline": null,
        });
        assert_eq!(json["results"][0], expected);
        assert_eq!(json["results"][2]["vs_kernel"], 0.5);
        assert_eq!(json["results"][2]["vs_underlay"], 0.333);
        let rr = &json["results"][5];
        assert_eq!(
            (&rr["p50_us"], &rr["cpu_unit"]),
            (&41.26.into(), &"us/transaction".into())
        );
        assert!(
            rr["vs_kernel"].is_null(),
            "the kernel path was not measured under this load"
        );
        let local = &json["results"][4];
        assert_eq!(
            (&local["path"], &local["vs_kernel"]),
            (&"local".into(), &0.8.into())
        );
        assert!(
            local["vs_underlay"].is_null(),
            "nothing of it crosses the underlay"
        );
        let read: Report = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(serde_json::to_value(read).unwrap(), json);
    }

    #[test]
    fn the_table_names_each_load_once() {
        let text = text(&report());
        assert_eq!(text.matches("TCP, 1 stream").count(), 1, "{text}");
        for part in [
            "0.50x",
            "0.33x",
            "41 / 119",
            "21.4 k",
            "3 rounds of 2 s",
            "4.00 - 5.00",
            "1.50 s/GB",
            "NOT MEASURED: tinc: 'tincd' is missing",
        ] {
            assert!(text.contains(part), "'{part}' is missing:\n{text}");
        }
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [4.688, 999.0, 5800.0, 181_234.0, 1_200_000.0].map(short),
            ["4.69", "999.00", "5.8 k", "181 k", "1.20 M"]
        );
    }

    #[test]
    fn this_machine_is_described() {
        let machine = Machine::this();
        assert!(
            machine.cpus > 0
                && machine.memory_mb > 0
                && !machine.cpu.is_empty()
                && !machine.kernel.is_empty()
        );
    }
}
