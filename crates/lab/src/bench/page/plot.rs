//! The plot: for each load and path a dot at the median of the rounds' ratios to the kernel's path (to the direct way, where
//! services were measured), on a line from the lowest to the highest. The axis is logarithmic, so that half and twice lie equally far from one.
//!
//! SVG without scripts, fonts or parts from elsewhere; it brings its own background, light or dark as its reader prefers.

use std::fmt::Write as _;

use crate::bench::path::PathKind;
use crate::bench::report::{Report, Row, short};
use crate::bench::stats;

const WIDTH: f64 = 860.0;
const MARGIN: f64 = 18.0;
/// Where the paths' names end, and the plot lies.
const NAMES_END: f64 = 282.0;
const LEFT: f64 = 300.0;
const RIGHT: f64 = 690.0;
/// Where each line's figures begin.
const VALUES: f64 = 706.0;
const ROW: f64 = 18.0;
/// Between the rows of two loads.
const GAP: f64 = 7.0;
const HEAD: f64 = 30.0;
/// Title and legend.
const TOP: f64 = 76.0;
/// The axis's numbers and name.
const FOOT: f64 = 46.0;
/// Where the axis may begin and end, and has numbers.
const TICKS: [f64; 12] = [
    0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0,
];

/// Colours as text, weak text, lines, background, then the marks' own; of GitHub's palettes, which differ enough in
/// lightness to be told apart without colour, as do the marks' shapes.
const LIGHT: [&str; 8] = [
    "#1f2328", "#59636e", "#d1d9e0", "#ffffff", "#0969da", "#bc4c00", "#818b98", "#8250df",
];
const DARK: [&str; 8] = [
    "#f0f6fc", "#9198a1", "#3d444d", "#0d1117", "#58a6ff", "#f0883e", "#9198a1", "#bc8cff",
];
/// The classes that the colours are given to.
const CLASSES: [&str; 8] = [
    "ink", "weak", "grid", "ground", "own", "plain", "other", "peer",
];

/// One line of the plot.
struct Line<'a> {
    row: &'a Row,
    low: f64,
    median: f64,
    high: f64,
}

/// The loads of one run, each with its lines.
struct Panel<'a> {
    title: String,
    groups: Vec<(&'static str, Vec<Line<'a>>)>,
}

impl Panel<'_> {
    fn height(&self) -> f64 {
        let rows: f64 = self.groups.iter().map(|(_, lines)| height(lines)).sum();
        HEAD + rows
    }
}

fn height(lines: &[Line<'_>]) -> f64 {
    lines.iter().map(|_| ROW).sum::<f64>() + GAP
}

/// Whose rates the others' are multiples of.
pub(super) fn yardstick(runs: &[Report]) -> &'static str {
    if runs.iter().any(Report::is_of_services) {
        "the direct way's"
    } else {
        "the kernel's"
    }
}

/// Draws what the runs say of every path but the one they are compared with.
pub(super) fn svg(runs: &[Report]) -> String {
    let panels: Vec<Panel<'_>> = runs.iter().flat_map(panels_of).collect();
    let lines = || {
        panels
            .iter()
            .flat_map(|panel| &panel.groups)
            .flat_map(|(_, lines)| lines)
    };
    let axis = Axis::over(lines().flat_map(|line| [line.low, line.high]));
    let height = TOP + panels.iter().map(Panel::height).sum::<f64>() + FOOT;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
         <title>Rates as multiples of {}</title>\n<style>{}@media (prefers-color-scheme: dark) {{{}}}</style>\n\
         <rect class=\"ground\" width=\"{WIDTH}\" height=\"{height}\" rx=\"8\"/>\n",
        yardstick(runs),
        style(LIGHT),
        style(DARK)
    );
    text(
        &mut out,
        (MARGIN, 27.0),
        "start",
        "ink head",
        &format!(
            "Rate, as a multiple of {} in the same round",
            yardstick(runs)
        ),
    );
    legend(&mut out, lines());
    let bottom = height - FOOT;
    axis.numbers(&mut out, bottom, yardstick(runs));
    text(
        &mut out,
        (VALUES, TOP + 19.0),
        "start",
        "weak",
        "ratio   median rate",
    );
    let mut y = TOP;
    for panel in &panels {
        axis.grid(&mut out, y + HEAD - 4.0, y + panel.height());
        text(
            &mut out,
            (MARGIN, y + 19.0),
            "start",
            "ink bold",
            &panel.title,
        );
        y += HEAD;
        for (load, lines) in &panel.groups {
            text(&mut out, (MARGIN, y + 13.0), "start", "ink", load);
            for (line, step) in lines.iter().zip(0_u8..) {
                axis.line(&mut out, line, y + ROW * f64::from(step));
            }
            y += self::height(lines);
        }
    }
    out.push_str("</svg>\n");
    out
}

/// A run's panel of two hosts, and one of one host where that was measured.
fn panels_of(run: &Report) -> Vec<Panel<'_>> {
    [false, true]
        .into_iter()
        .filter_map(|local| {
            let groups = groups(run, local);
            let title = if run.is_of_services() {
                "A service's member, to the direct way over the overlay".to_owned()
            } else if local {
                "Two containers of one host, to the kernel's bridge and veth pairs".to_owned()
            } else {
                format!("Two hosts, to the kernel's VXLAN: {}", super::title(run))
            };
            (!groups.is_empty()).then_some(Panel { title, groups })
        })
        .collect()
}

fn groups(run: &Report, local: bool) -> Vec<(&'static str, Vec<Line<'_>>)> {
    let mut groups: Vec<(&'static str, Vec<Line<'_>>)> = Vec::new();
    for row in run
        .results
        .iter()
        .filter(|row| row.path.is_local() == local)
    {
        let Some(line) = line_of(run, row) else {
            continue;
        };
        let name = row.load.name();
        match groups.last_mut().filter(|(last, _)| *last == name) {
            Some((_, lines)) => lines.push(line),
            None => groups.push((name, vec![line])),
        }
    }
    groups
}

/// The ratios of each round; none of the path that others are compared with, and where that was not measured.
fn line_of<'a>(run: &Report, row: &'a Row) -> Option<Line<'a>> {
    let yardstick = run.yardstick(row.path);
    let other = run
        .row(row.load, yardstick)
        .filter(|_| row.path != yardstick)?;
    let samples = row.summary.samples.iter().zip(&other.summary.samples);
    let ratios: Vec<f64> = samples
        .filter_map(|(own, other)| stats::ratio(*own, Some(*other)))
        .filter(|ratio| *ratio > 0.0)
        .collect();
    Some(Line {
        row,
        low: ratios.iter().copied().reduce(f64::min)?,
        median: stats::quartiles(&ratios)?[1],
        high: ratios.iter().copied().reduce(f64::max)?,
    })
}

/// Ratios from `low` to `high`, both of them [`TICKS`].
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    /// One that holds all values, and one itself.
    fn over(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = values.fold((0.5, 2.0), |(low, high): (f64, f64), value| {
            (low.min(value), high.max(value))
        });
        let [first, .., last] = TICKS;
        let mut below = TICKS.into_iter().rev();
        let mut above = TICKS.into_iter();
        Self {
            low: below.find(|tick| *tick <= low).unwrap_or(first),
            high: above.find(|tick| *tick >= high).unwrap_or(last),
        }
    }

    fn x(&self, ratio: f64) -> f64 {
        let share = (ratio / self.low).ln() / (self.high / self.low).ln();
        LEFT + share.clamp(0.0, 1.0) * (RIGHT - LEFT)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let range = self.low..=self.high;
        TICKS.into_iter().filter(move |tick| range.contains(tick))
    }

    fn grid(&self, out: &mut String, top: f64, bottom: f64) {
        for tick in self.ticks() {
            let x = self.x(tick);
            let class = if tick == 1.0 { "one" } else { "grid" };
            let _ = writeln!(
                out,
                "<line class=\"{class}\" x1=\"{x:.1}\" y1=\"{top:.1}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\"/>"
            );
        }
    }

    fn numbers(&self, out: &mut String, bottom: f64, yardstick: &str) {
        for tick in self.ticks() {
            let class = if tick == 1.0 { "ink" } else { "weak" };
            let place = (self.x(tick), bottom + 16.0);
            text(out, place, "middle", class, &format!("{tick}×"));
        }
        text(
            out,
            (f64::midpoint(LEFT, RIGHT), bottom + 34.0),
            "middle",
            "weak",
            &format!("1 = {yardstick}; logarithmic; more is better"),
        );
    }

    fn line(&self, out: &mut String, line: &Line<'_>, y: f64) {
        let Line {
            row,
            low,
            median,
            high,
        } = line;
        let name = row.path.name();
        text(out, (NAMES_END, y + 13.0), "end", "weak", name);
        let y = y + 9.0;
        let class = class_of(row.path);
        let _ = writeln!(
            out,
            "<line class=\"{class} range\" x1=\"{:.1}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\"/>",
            self.x(*low),
            self.x(*high)
        );
        mark(out, row.path, (self.x(*median), y));
        let rate = short(row.summary.median);
        let unit = row
            .unit
            .replace("transactions", "")
            .replace("connections", "")
            .replace("packets", "");
        let space = if unit.starts_with('/') { "" } else { " " };
        text(
            out,
            (VALUES, y + 4.0),
            "start",
            "ink",
            &format!("{median:.2}   {rate}{space}{unit}"),
        );
    }
}

/// What a path's marks look like.
const fn class_of(path: PathKind) -> &'static str {
    match path {
        PathKind::Towline
        | PathKind::Local
        | PathKind::Vip
        | PathKind::Ingress
        | PathKind::Apart => "own",
        PathKind::Plain => "plain",
        PathKind::Underlay | PathKind::Kernel | PathKind::LocalKernel | PathKind::Dnat => "other",
        PathKind::Ovs | PathKind::Tinc | PathKind::Fastd | PathKind::WireguardGo => "peer",
    }
}

/// A mark at a point: a disc, a square, a triangle or a diamond.
fn mark(out: &mut String, path: PathKind, (x, y): (f64, f64)) {
    let class = class_of(path);
    let _ = match class {
        "own" => writeln!(
            out,
            "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5\"/>"
        ),
        "plain" => writeln!(
            out,
            "<rect class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\"/>",
            x - 4.0,
            y - 4.0
        ),
        "peer" => writeln!(
            out,
            "<path class=\"{class}\" d=\"M{x:.1} {:.1}l5 9h-10z\"/>",
            y - 5.0
        ),
        _ => writeln!(
            out,
            "<path class=\"{class}\" d=\"M{x:.1} {:.1}l5.5 5.5l-5.5 5.5l-5.5 -5.5z\"/>",
            y - 5.5
        ),
    };
}

/// Which mark is whose, and what a line beside it means.
fn legend<'a>(out: &mut String, lines: impl Iterator<Item = &'a Line<'a>>) {
    const Y: f64 = 50.0;
    let mut shown: Vec<&str> = Vec::new();
    let mut x = MARGIN + 6.0;
    for path in lines.map(|line| line.row.path) {
        let class = class_of(path);
        if shown.contains(&class) {
            continue;
        }
        shown.push(class);
        let (label, width) = match class {
            "own" => ("Towline", 92.0),
            "plain" => ("Towline, plain backend", 182.0),
            "peer" => ("others", 76.0),
            _ if path == PathKind::Dnat => ("plain nftables", 130.0),
            _ => ("underlay without an overlay", 216.0),
        };
        mark(out, path, (x, Y));
        text(out, (x + 12.0, Y + 4.0), "start", "ink", label);
        x += width;
    }
    let _ = writeln!(
        out,
        "<line class=\"other range\" x1=\"{x}\" y1=\"{Y}\" x2=\"{}\" y2=\"{Y}\"/>",
        x + 26.0
    );
    text(
        out,
        (x + 34.0, Y + 4.0),
        "start",
        "ink",
        "range of the rounds; mark: median",
    );
}

/// The rules of one set of colours.
fn style(colours: [&str; 8]) -> String {
    let mut rules = String::new();
    for (class, colour) in CLASSES.iter().zip(colours) {
        let _ = match *class {
            "grid" => write!(rules, ".grid{{stroke:{colour}}}"),
            "own" | "plain" | "other" | "peer" => {
                write!(rules, ".{class}{{fill:{colour};stroke:{colour}}}")
            }
            _ => write!(rules, ".{class}{{fill:{colour}}}"),
        };
    }
    let [ink, ..] = colours;
    let _ = write!(
        rules,
        ".one{{stroke:{ink};stroke-width:1.5}}.range{{stroke-width:2}}.bold{{font-weight:600}}.head{{font-size:15px;font-weight:600}}"
    );
    rules
}

fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, class: &str, words: &str) {
    let words = words
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    let _ = writeln!(
        out,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" xml:space=\"preserve\">{words}</text>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::page::tests::{run_of_services, runs};

    #[test]
    fn every_path_but_the_kernels_has_a_line_and_a_mark() {
        let picture = svg(&runs());
        assert_eq!(
            picture.matches(" range\"").count(),
            4 * 3 + 4 + 4 + 1,
            "three paths, the local one, the second run's, and the legend's"
        );
        assert_eq!(picture.matches("<circle").count(), 4 * 3 + 1);
        assert_eq!(
            picture.matches("to the kernel's").count(),
            3,
            "three panels: {picture}"
        );
        assert!(picture.contains(">0.95   3.80 Gbit/s<"), "{picture}");
        assert!(!picture.contains("NaN") && !picture.contains("inf"));
    }

    #[test]
    fn ways_to_a_service_are_measured_by_the_direct_way() {
        let picture = svg(&[run_of_services()]);
        assert!(
            picture.contains("multiple of the direct way's"),
            "{picture}"
        );
        assert!(picture.contains(">0.80   3.20 Gbit/s<"), "{picture}");
        assert!(!picture.contains("kernel"), "{picture}");
    }

    #[test]
    fn the_axis_holds_all_values_and_twice_is_as_far_as_half() {
        let axis = Axis::over([0.03, 2.4].into_iter());
        assert_eq!((axis.low, axis.high), (0.02, 5.0));
        let distance = |a, b| (axis.x(a) - axis.x(b)).abs();
        assert!((distance(0.5, 1.0) - distance(1.0, 2.0)).abs() < 0.001);
        assert_eq!((axis.x(0.001), axis.x(100.0)), (LEFT, RIGHT));
        let narrow = Axis::over(std::iter::empty());
        assert_eq!((narrow.low, narrow.high), (0.5, 2.0));
    }

    #[test]
    fn nothing_lies_outside_and_no_two_texts_on_each_other() {
        let picture = svg(&runs());
        let number = |line: &str, name: &str| -> f64 {
            let rest = line.split_once(&format!(" {name}=\"")).unwrap().1;
            rest.split('"').next().unwrap().parse().unwrap()
        };
        let mut places: Vec<(String, String)> = Vec::new();
        for line in picture.lines().filter(|line| line.starts_with("<text")) {
            let (x, y) = (number(line, "x"), number(line, "y"));
            assert!((0.0..WIDTH).contains(&x) && y > 0.0, "{line}");
            let place = (x.to_string(), y.to_string());
            assert!(!places.contains(&place), "{line}");
            places.push(place);
        }
    }
}
