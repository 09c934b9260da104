//! What the data plane is to reach beside the kernel's, and whether it did.

use crate::bench::load::Load;
use crate::bench::path::PathKind;
use crate::bench::report::{Report, Row};
use crate::bench::stats;
use crate::topology::{Underlay, Wire};

/// Heads of the columns of [`lines`].
pub(super) const HEADER: [&str; 6] = [
    "target",
    "floor",
    "goal",
    "median",
    "lower - upper quartile",
    "verdict",
];

/// What is compared.
#[derive(Clone, Copy, PartialEq)]
enum What {
    Rate,
    /// CPU time for each unit of work: the less, the better.
    Cpu,
    /// The latency that one of a hundred exceeds: the less, the better.
    P99,
}

struct Target {
    wire: Wire,
    load: Load,
    what: What,
    /// Which of Towline's paths.
    own: PathKind,
    /// What it is compared with.
    against: PathKind,
    floor: f64,
    goal: f64,
}

const fn rate(wire: Wire, load: Load, floor: f64, goal: f64) -> Target {
    Target {
        wire,
        load,
        what: What::Rate,
        own: PathKind::Towline,
        against: PathKind::Kernel,
        floor,
        goal,
    }
}

const fn cpu(load: Load) -> Target {
    Target {
        wire: Wire::Mtu,
        load,
        what: What::Cpu,
        own: PathKind::Towline,
        against: PathKind::Kernel,
        floor: 1.7,
        goal: 1.6,
    }
}

const fn offloads(load: Load) -> Target {
    Target {
        wire: Wire::Mtu,
        load,
        what: What::Rate,
        own: PathKind::Towline,
        against: PathKind::Plain,
        floor: 4.5,
        goal: 4.5,
    }
}

/// A way to a service's member.
const fn service(own: PathKind, load: Load, what: What) -> Target {
    let limit = match what {
        What::Rate => 0.9,
        What::Cpu | What::P99 => 1.3,
    };
    Target {
        wire: Wire::Mtu,
        load,
        what,
        own,
        against: PathKind::Towline,
        floor: limit,
        goal: limit,
    }
}

/// What uses no service, on a network with services.
const fn beside(load: Load) -> Target {
    Target {
        wire: Wire::Mtu,
        load,
        what: What::Rate,
        own: PathKind::Towline,
        against: PathKind::Apart,
        floor: 0.97,
        goal: 1.0,
    }
}

const TARGETS: [Target; 20] = [
    rate(Wire::Mtu, Load::Tcp1, 0.9, 1.0),
    rate(Wire::Mtu, Load::Tcp4, 0.8, 0.9),
    cpu(Load::Tcp1),
    cpu(Load::Tcp4),
    rate(Wire::Mtu, Load::Udp64, 2.0, 2.2),
    rate(Wire::Mtu, Load::Udpmix, 0.8, 1.0),
    rate(Wire::Mtu, Load::Udpmix1372, 0.8, 1.0),
    rate(Wire::Mtu, Load::Rr, 0.25, 0.35),
    rate(Wire::Gso, Load::Tcp1, 0.6, 0.7),
    rate(Wire::Gso, Load::Tcp4, 0.6, 0.7),
    offloads(Load::Tcp1),
    offloads(Load::Tcp4),
    service(PathKind::Vip, Load::Tcp1, What::Rate),
    service(PathKind::Ingress, Load::Tcp1, What::Rate),
    service(PathKind::Vip, Load::Rr, What::P99),
    service(PathKind::Ingress, Load::Rr, What::P99),
    service(PathKind::Vip, Load::Conn, What::P99),
    service(PathKind::Ingress, Load::Conn, What::P99),
    beside(Load::Tcp1),
    beside(Load::Rr),
];

/// One line for each target that was measured, over the IPv4 underlay.
pub(super) fn lines(runs: &[Report]) -> Vec<Vec<String>> {
    TARGETS
        .iter()
        .filter_map(|target| {
            let ratios = target.ratios(runs)?;
            Some(target.line(stats::quartiles(&ratios)?))
        })
        .collect()
}

impl Target {
    /// Towline's figure of each round, as a multiple of what it is compared with.
    fn ratios(&self, runs: &[Report]) -> Option<Vec<f64>> {
        let run = runs
            .iter()
            .find(|run| run.wire == self.wire && run.underlay == Underlay::V4)?;
        let samples = |row: &Row| match self.what {
            What::Rate => row.summary.samples.clone(),
            What::Cpu => row.summary.cpu_samples.clone(),
            What::P99 => row.summary.p99_samples.clone(),
        };
        let own = samples(run.row(self.load, self.own)?);
        let other = samples(run.row(self.load, self.against)?);
        Some(
            own.iter()
                .zip(&other)
                .filter_map(|(own, other)| stats::ratio(*own, Some(*other)))
                .collect(),
        )
    }

    fn line(&self, [lower, median, upper]: [f64; 3]) -> Vec<String> {
        let (reached, holds, sign) = match self.what {
            What::Rate => (median >= self.goal, upper >= self.floor, ""),
            What::Cpu | What::P99 => (median <= self.goal, lower <= self.floor, "≤ "),
        };
        let verdict = match (reached, holds) {
            (true, _) => "reached",
            (_, true) => "holds",
            _ => "missed",
        };
        let mut name = self.load.name().to_owned();
        name.push_str(match self.what {
            What::Rate => "",
            What::Cpu => ", CPU",
            What::P99 => ", p99",
        });
        if self.wire == Wire::Gso {
            name.push_str(", 64 KiB on the wire");
        }
        name.push_str(match (self.own, self.against) {
            (PathKind::Vip, _) => ", by virtual address, to direct",
            (PathKind::Ingress, _) => ", by a published port, to direct",
            (_, PathKind::Plain) => ", to plain",
            (_, PathKind::Apart) => ", beside services, to a network without any",
            _ => "",
        });
        vec![
            name,
            format!("{sign}{}", self.floor),
            format!("{sign}{}", self.goal),
            format!("{median:.2}"),
            format!("{lower:.2} - {upper:.2}"),
            verdict.to_owned(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::page::tests::{run_of, run_of_services, runs};

    fn verdict(target: &Target, quartiles: [f64; 3]) -> String {
        target.line(quartiles).pop().unwrap()
    }

    #[test]
    fn a_floor_fails_only_when_the_better_quartile_misses_it() {
        let target = rate(Wire::Mtu, Load::Tcp1, 0.9, 1.0);
        assert_eq!(verdict(&target, [0.9, 1.0, 1.1]), "reached");
        assert_eq!(verdict(&target, [0.5, 0.6, 0.9]), "holds");
        assert_eq!(verdict(&target, [0.5, 0.6, 0.89]), "missed");
        assert_eq!(verdict(&cpu(Load::Tcp4), [1.5, 1.6, 3.0]), "reached");
        assert_eq!(verdict(&cpu(Load::Tcp4), [1.7, 1.8, 3.0]), "holds");
        assert_eq!(verdict(&cpu(Load::Tcp4), [1.71, 1.8, 3.0]), "missed");
    }

    #[test]
    fn what_was_measured_is_judged_and_nothing_else() {
        let lines = lines(&runs());
        let names: Vec<&str> = lines.iter().map(|line| line[0].as_str()).collect();
        assert_eq!(
            names,
            [
                "TCP, 1 stream",
                "TCP, 4 streams",
                "TCP, 1 stream, CPU",
                "TCP, 4 streams, CPU",
                "UDP 64 B",
                "TCP request/response",
                "TCP, 1 stream, 64 KiB on the wire",
                "TCP, 4 streams, 64 KiB on the wire",
                "TCP, 1 stream, to plain",
                "TCP, 4 streams, to plain",
            ]
        );
        assert_eq!(lines[0][3..], ["0.95", "0.95 - 0.95", "holds"]);
        assert_eq!(lines[6][5], "missed");
        assert!(super::lines(&[run_of(Wire::Mtu, &[(PathKind::Towline, 1.0)])]).is_empty());
    }

    #[test]
    fn ways_to_a_service_are_judged_by_the_direct_way() {
        let lines = lines(&[run_of_services()]);
        let verdicts: Vec<[&str; 2]> = lines
            .iter()
            .map(|line| [line[0].as_str(), line[5].as_str()])
            .collect();
        assert_eq!(
            verdicts,
            [
                ["TCP, 1 stream, by virtual address, to direct", "reached"],
                ["TCP, 1 stream, by a published port, to direct", "missed"],
                [
                    "TCP request/response, p99, by virtual address, to direct",
                    "reached"
                ],
                [
                    "TCP request/response, p99, by a published port, to direct",
                    "reached"
                ],
                [
                    "TCP, 1 stream, beside services, to a network without any",
                    "reached"
                ],
                [
                    "TCP request/response, beside services, to a network without any",
                    "reached"
                ],
            ]
        );
    }
}
