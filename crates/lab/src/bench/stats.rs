//! What is made of samples: medians and spread, and nothing that needs more of them than a few.

use serde::{Deserialize, Serialize};

/// One measurement of one load over one path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sample {
    /// Throughput, in the load's unit.
    pub(crate) value: f64,
    /// CPU time for each unit of work, in the load's CPU unit.
    pub(crate) cpu: f64,
    /// Latencies, where the load measures them.
    pub(crate) latency: Option<Latency>,
}

/// Round-trip times of requests in microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Latency {
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// Samples of one load over one path, summed up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) samples: Vec<f64>,
    pub(crate) cpu: f64,
    pub(crate) cpu_samples: Vec<f64>,
    /// Of each round, where the load measures latencies.
    #[serde(default)]
    pub(crate) p99_samples: Vec<f64>,
    #[serde(skip)]
    pub(crate) latency: Option<Latency>,
}

/// Sums up; `None` of no samples.
pub(crate) fn summarize(samples: &[Sample]) -> Option<Summary> {
    let values: Vec<f64> = samples.iter().map(|sample| sample.value).collect();
    let latencies: Vec<Latency> = samples.iter().filter_map(|sample| sample.latency).collect();
    let of = |pick: fn(&Latency) -> f64| median(latencies.iter().map(pick));
    Some(Summary {
        median: median(values.iter().copied())?,
        min: values.iter().copied().reduce(f64::min)?,
        max: values.iter().copied().reduce(f64::max)?,
        cpu: median(samples.iter().map(|sample| sample.cpu))?,
        cpu_samples: samples.iter().map(|sample| sample.cpu).collect(),
        p99_samples: latencies.iter().map(|latency| latency.p99_us).collect(),
        latency: match (of(|latency| latency.p50_us), of(|latency| latency.p99_us)) {
            (Some(p50_us), Some(p99_us)) => Some(Latency { p50_us, p99_us }),
            _ => None,
        },
        samples: values,
    })
}

/// The middle one; of an even number the mean of the middle two.
fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        len if len % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// The lower quartile, the median and the upper quartile; between two samples in proportion. `None` of none.
pub(crate) fn quartiles(values: &[f64]) -> Option<[f64; 3]> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    Some([1, 2, 3].map(|quarter| {
        let (index, rest) = (last * quarter / 4, last * quarter % 4);
        let next = values[(index + 1).min(last)];
        values[index] + (next - values[index]) * [0.0, 0.25, 0.5, 0.75][rest]
    }))
}

/// How many times `other` fits; `None` where that says nothing.
pub(crate) fn ratio(value: f64, other: Option<f64>) -> Option<f64> {
    other
        .filter(|&other| other > 0.0)
        .map(|other| value / other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(value: f64) -> Sample {
        Sample {
            value,
            cpu: value * 2.0,
            latency: None,
        }
    }

    #[test]
    fn medians_of_odd_and_even_numbers() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
        assert_eq!(median([7.0].into_iter()), Some(7.0));
        assert_eq!(median(std::iter::empty()), None);
    }

    #[test]
    fn one_bad_round_does_not_move_the_median() {
        let summary = summarize(&[5.0, 4.9, 0.1, 5.1, 5.0].map(sample)).unwrap();
        assert_eq!(
            (summary.median, summary.min, summary.max, summary.cpu),
            (5.0, 0.1, 5.1, 10.0)
        );
        assert_eq!(
            summary.samples,
            [5.0, 4.9, 0.1, 5.1, 5.0],
            "in the order of the rounds"
        );
        assert_eq!(summary.latency, None);
        assert_eq!(summarize(&[]), None);
    }

    #[test]
    fn latencies_have_medians_of_their_own() {
        let at = |p50_us, p99_us| Sample {
            value: 1.0,
            cpu: 1.0,
            latency: Some(Latency { p50_us, p99_us }),
        };
        let summary = summarize(&[at(10.0, 90.0), at(30.0, 70.0), at(20.0, 80.0)]).unwrap();
        assert_eq!(summary.p99_samples, [90.0, 70.0, 80.0]);
        assert_eq!(
            summary.latency,
            Some(Latency {
                p50_us: 20.0,
                p99_us: 80.0
            })
        );
    }

    #[test]
    fn quartiles_lie_between_samples() {
        assert_eq!(quartiles(&[5.0, 1.0, 2.0, 3.0, 4.0]), Some([2.0, 3.0, 4.0]));
        assert_eq!(quartiles(&[1.0, 2.0]), Some([1.25, 1.5, 1.75]));
        assert_eq!(quartiles(&[7.0]), Some([7.0; 3]));
        assert_eq!(quartiles(&[]), None);
    }

    #[test]
    fn ratios_need_something_to_compare_with() {
        assert_eq!(ratio(3.0, Some(2.0)), Some(1.5));
        assert_eq!(ratio(3.0, Some(0.0)), None);
        assert_eq!(ratio(3.0, None), None);
    }
}
