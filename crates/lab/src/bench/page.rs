//! What `scripts/bench` publishes: a part of a Markdown page, and a plot beside it, of one or more runs of the bench.
//!
//! Only what stands between two markers of the page is written anew; the rest is for people.

mod plot;
mod targets;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::report::{self, Machine, NotRun, Report};
use crate::output;
use crate::topology::{Underlay, Wire};

/// The lines between which a part of a page is written: the whole of the bench, or one section.
struct Markers {
    begin: String,
    end: String,
}

impl Markers {
    fn of(section: Option<&str>) -> Self {
        let section = section.map_or_else(String::new, |section| format!(" {section}"));
        Self {
            begin: format!("<!-- From here on scripts/bench{section} writes. -->"),
            end: format!("<!-- Down to here scripts/bench{section} writes. -->"),
        }
    }
}

/// Options of `lab report`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: towline lab report --page docs/performance.md mtu.json gso.json\n\n\
                  Each file is what 'towline lab bench --json' printed. The page must have the lines\n  \
                  <!-- From here on scripts/bench writes. -->\n  \
                  <!-- Down to here scripts/bench writes. -->\n\
                  and what stands between them is replaced; a plot of the same name that ends in .svg is written beside it. With --section NAME\n\
                  the lines say 'scripts/bench NAME writes', and the plot's name ends in -NAME.svg."
)]
pub struct ReportArgs {
    /// The page to write into; without it the Markdown is printed, and no plot made
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
    /// The part of the page to write [default: the one of no name]
    #[arg(long, value_name = "NAME", requires = "page", value_parser = section)]
    section: Option<String>,
    /// What made the measurements, to be named on the page
    #[arg(long, default_value = "towline lab bench", value_name = "TEXT")]
    command: String,
    /// The commit that was measured, to be named on the page
    #[arg(long, value_name = "HASH")]
    commit: Option<String>,
    /// Measurements, in the order in which they are to be shown
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
}

pub(crate) fn run(args: &ReportArgs) -> anyhow::Result<()> {
    let runs = args
        .runs
        .iter()
        .map(|file| read(file))
        .collect::<anyhow::Result<Vec<Report>>>()?;
    let Some(page) = &args.page else {
        return output::line(markdown(args, &runs, None).trim_end());
    };
    let plot = match &args.section {
        None => page.with_extension("svg"),
        Some(section) => {
            let stem = page.file_stem().unwrap_or_default().to_string_lossy();
            page.with_file_name(format!("{stem}-{section}.svg"))
        }
    };
    let name = plot
        .file_name()
        .with_context(|| format!("{} is no page's name", page.display()))?
        .to_string_lossy();
    let old = fs::read_to_string(page).with_context(|| format!("can't read {}", page.display()))?;
    let markers = Markers::of(args.section.as_deref());
    let new = replaced(&old, &markers, &markdown(args, &runs, Some(&name)))
        .with_context(|| format!("can't write into {}", page.display()))?;
    let picture = plot::svg(&runs);
    fs::write(&plot, picture).with_context(|| format!("can't write {}", plot.display()))?;
    fs::write(page, new).with_context(|| format!("can't write {}", page.display()))
}

/// A section's name is part of a file's.
fn section(text: &str) -> Result<String, String> {
    let good = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_lowercase());
    good.then(|| text.to_owned())
        .ok_or_else(|| "a section's name is of the letters a-z".to_owned())
}

fn read(file: &Path) -> anyhow::Result<Report> {
    let text = fs::read(file).with_context(|| format!("can't read {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| {
        format!(
            "{} is not what 'towline lab bench --json' prints",
            file.display()
        )
    })
}

/// The page with what stands between its markers replaced.
fn replaced(page: &str, markers: &Markers, text: &str) -> anyhow::Result<String> {
    let Markers { begin, end } = markers;
    let parts = page
        .split_once(begin.as_str())
        .and_then(|(before, rest)| Some((before, rest.split_once(end.as_str())?.1)));
    let Some((before, after)) = parts else {
        bail!("it lacks the line '{begin}', or '{end}' behind it");
    };
    Ok(format!("{before}{begin}\n{text}\n{end}{after}"))
}

/// What a run differs from the others in.
fn title(run: &Report) -> String {
    let wire = match run.wire {
        Wire::Mtu => "packets of at most the MTU on the wire",
        Wire::Gso => "packets of up to 64 KiB on the wire",
    };
    let underlay = match run.underlay {
        Underlay::V4 => "IPv4 underlay",
        Underlay::V6 => "IPv6 underlay",
    };
    format!("{underlay}, {wire}")
}

fn markdown(args: &ReportArgs, runs: &[Report], plot: Option<&str>) -> String {
    let mut text = String::from("\n");
    heading(&mut text, args, runs);
    if let Some(plot) = plot {
        let _ = write!(
            text,
            "![Each load's rate as a multiple of {}, median and range of the rounds]({plot})\n\n",
            plot::yardstick(runs)
        );
    }
    let targets = targets::lines(runs);
    if !targets.is_empty() {
        text.push_str(
            "### Against the targets\n\n\
             Ratios to the kernel's path, or to what is said; each of two runs of the same round. A target *holds* \
             unless three quarters of the rounds miss its floor, and is *reached* when the median reaches its goal.\n\n",
        );
        table(&mut text, &targets::HEADER, targets.into_iter());
    }
    for run in runs {
        let _ = write!(text, "### {}\n\n", title(run));
        let header = report::HEADER.map(str::to_lowercase);
        table(
            &mut text,
            &header.each_ref().map(String::as_str),
            report::cells(&run.results),
        );
        let not_run = NotRun::lines(&run.not_run);
        if !not_run.is_empty() {
            let _ = writeln!(text, "{not_run}");
        }
    }
    text
}

/// When, where and how it was measured.
fn heading(text: &mut String, args: &ReportArgs, runs: &[Report]) {
    let Some(first) = runs.first() else {
        return;
    };
    let Machine {
        cpus,
        cpu,
        memory_mb,
        kernel,
        ..
    } = &first.machine;
    let commit = args
        .commit
        .as_deref()
        .map(|commit| format!(", commit {commit}"))
        .unwrap_or_default();
    let rounds = runs
        .iter()
        .map(|run| format!("{} of {} s", run.rounds, run.seconds))
        .collect::<Vec<_>>()
        .join(", ");
    let loads = runs
        .iter()
        .map(|run| format!("{:.2}", run.machine.load_average))
        .collect::<Vec<_>>()
        .join(", ");
    let _ = write!(
        text,
        "{}{commit}, `{}`. {cpus} x {cpu}, {} GB, Linux {kernel}; load average before each run: {loads}. Rounds: {rounds}; in each, every \
         load goes over every path in turn, and each begins with another path. All hosts of the lab, both ends of the load and the kernel's own \
         work share these cores.\n\n",
        first.date,
        args.command,
        memory_mb / 1000,
    );
}

fn table(text: &mut String, header: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let _ = writeln!(text, "| {} |", header.join(" | "));
    let _ = writeln!(text, "|{}", "---|".repeat(header.len()));
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::load::Load;
    use crate::bench::path::PathKind;
    use crate::bench::stats::{Latency, Sample};

    /// A run in which every path has the same rates each round, `factor` times the kernel's.
    pub(super) fn run_of(wire: Wire, paths: &[(PathKind, f64)]) -> Report {
        let mut samples = Vec::new();
        for load in [Load::Tcp1, Load::Tcp4, Load::Udp64, Load::Rr] {
            for &(path, factor) in paths {
                let latency = Latency {
                    p50_us: 40.0 / factor,
                    p99_us: 100.0 / factor,
                };
                let sample = |round: f64| Sample {
                    value: 4.0 * factor * round,
                    cpu: 2.0 / factor,
                    latency: (load == Load::Rr).then_some(latency),
                };
                samples.push((load, path, [1.0, 1.1, 0.9].map(sample).to_vec()));
            }
        }
        Report {
            date: "2026-11-23".into(),
            wire,
            underlay: Underlay::V4,
            rounds: 3,
            seconds: 2,
            machine: Machine {
                cpus: 2,
                cpu: "a <CPU> & more".into(),
                memory_mb: 8000,
                kernel: "6.18.0".into(),
                load_average: 0.1,
            },
            results: report::rows(&samples),
            not_run: Vec::new(),
        }
    }

    pub(super) fn runs() -> Vec<Report> {
        use PathKind::{Kernel, Local, LocalKernel, Plain, Towline, Underlay};
        vec![
            run_of(
                Wire::Mtu,
                &[
                    (Underlay, 1.3),
                    (Kernel, 1.0),
                    (Towline, 0.95),
                    (Plain, 0.02),
                    (LocalKernel, 2.0),
                    (Local, 3.0),
                ],
            ),
            run_of(Wire::Gso, &[(Kernel, 1.0), (Towline, 0.5)]),
        ]
    }

    /// A run over the ways to a service's member.
    pub(super) fn run_of_services() -> Report {
        use PathKind::{Apart, Dnat, Ingress, Towline, Vip};
        run_of(
            Wire::Mtu,
            &[
                (Towline, 1.0),
                (Apart, 1.0),
                (Vip, 0.95),
                (Ingress, 0.8),
                (Dnat, 0.75),
            ],
        )
    }

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let (all, services) = (Markers::of(None), Markers::of(Some("services")));
        let [begin, end] = [&all.begin, &all.end];
        let rest = format!("{}\nkept\n{}\n", services.begin, services.end);
        let page = format!("a\n{begin}\nold\n{end}\nz\n{rest}");
        let once = replaced(&page, &all, "new").unwrap();
        assert_eq!(once, format!("a\n{begin}\nnew\n{end}\nz\n{rest}"));
        assert_eq!(replaced(&once, &all, "new").unwrap(), once);
        let other = replaced(&page, &services, "new").unwrap();
        assert!(
            other.contains("\nold\n") && !other.contains("kept"),
            "{other}"
        );
        for bad in [
            String::new(),
            begin.clone(),
            format!("{end}\n{begin}"),
            rest,
        ] {
            let error = replaced(&bad, &all, "new").unwrap_err().to_string();
            assert!(error.contains("lacks the line"), "{error}");
        }
    }

    #[test]
    fn a_page_is_written_with_its_plot_and_a_bad_run_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (page, run_file) = (dir.path().join("speed.md"), dir.path().join("run.json"));
        let Markers { begin, end } = Markers::of(None);
        fs::write(&page, format!("# Speed\n{begin}\n{end}\n")).unwrap();
        fs::write(&run_file, serde_json::to_vec(&runs()[0]).unwrap()).unwrap();
        let args = |file: &Path| ReportArgs {
            page: Some(page.clone()),
            section: None,
            command: "scripts/bench".into(),
            commit: Some("abc123".into()),
            runs: vec![file.to_owned()],
        };
        run(&args(&run_file)).unwrap();
        let text = fs::read_to_string(&page).unwrap();
        for part in [
            "# Speed",
            "commit abc123, `scripts/bench`. 2 x a <CPU>",
            "](speed.svg)",
            "### Against the targets",
            "### IPv4 underlay, packets of at most the MTU on the wire",
            "| TCP, 1 stream, Gbit/s | underlay |",
        ] {
            assert!(text.contains(part), "'{part}' is missing in {text}");
        }
        assert!(dir.path().join("speed.svg").exists());
        fs::write(&run_file, "{}").unwrap();
        let error = run(&args(&run_file)).unwrap_err().to_string();
        assert!(error.contains("lab bench --json"), "{error}");
        assert_eq!(fs::read_to_string(&page).unwrap(), text);
    }
}
