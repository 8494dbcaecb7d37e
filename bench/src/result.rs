//! The figures of every single run, their medians, and the JSON made of them.

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::guest::Noticed;
use crate::host::Host;
use crate::workload::Workload;

/// Milliseconds, with their fraction.
pub fn millis(length: Duration) -> f64 {
    length.as_secs_f64() * 1000.0
}

/// Who moved the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Drover.
    Ours,
    /// QEMU.
    Qemu,
    /// Nobody: a plain copy over the same link.
    Copy,
}

/// What is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Measures {
    /// From the request until the target runs.
    pub total_ms: f64,
    /// By the mover's own clock.
    pub blackout_ms: f64,
    /// The longest time between two ticks of the guest's timer around the move.
    pub guest_gap_ms: f64,
    /// What the mover says that it sent.
    pub bytes: f64,
    /// Processor seconds of both VMMs, the guest's own included.
    pub cpu_s: f64,
}

/// How long a cancel took, from the request on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cancelled {
    /// Until the source's VMM was done with the migration: nothing holds its vCPUs back, and no write is logged.
    pub source_ms: f64,
    /// Until the target's process was gone.
    pub target_ms: f64,
}

/// How far a migration was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Since the request.
    pub at_ms: f64,
    /// Bytes sent.
    pub sent: u64,
    /// Bytes known to be missing at the target.
    pub remaining: u64,
}

/// One run of either side, or one copy.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Which pair it belongs to, from 1.
    pub pair: usize,
    /// Whose.
    pub side: Side,
    /// Absent if it failed, and in a copy.
    #[serde(flatten)]
    pub measures: Option<Measures>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The mover's own total: from the connection until the target runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transfer_ms: Option<f64>,
    /// What the link counted, from the source's host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wire_bytes: Option<u64>,
    /// Of the processor seconds, those that no vCPU's thread used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_less_vcpus_s: Option<f64>,
    /// Most private memory of one of our VMMs beyond the source's at rest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extra_mib: Option<f64>,
    /// Passes over the memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounds: Option<u64>,
    /// What the guest noticed besides the gap.
    #[serde(flatten)]
    pub noticed: Option<Writes>,
    /// A copy's rate, into fresh memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mib_per_s: Option<f64>,
    /// A copy's rate from one buffer to another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reused_mib_per_s: Option<f64>,
    /// A migration of the same guest that was cancelled before this run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cancel: Option<Cancelled>,
    /// More of our receipt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Value>,
    /// For the picture.
    #[serde(skip)]
    pub samples: Vec<Sample>,
}

/// How much of the guest's work the move cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Writes {
    guest_writes_before_per_s: u64,
    guest_writes_lowest_per_s: u64,
}

impl From<Noticed> for Writes {
    fn from(noticed: Noticed) -> Self {
        Self {
            guest_writes_before_per_s: noticed.writes_before_per_s,
            guest_writes_lowest_per_s: noticed.writes_lowest_per_s,
        }
    }
}

impl Run {
    /// A run without any figure yet.
    pub fn new(pair: usize, side: Side) -> Self {
        Self {
            pair,
            side,
            measures: None,
            error: None,
            transfer_ms: None,
            wire_bytes: None,
            cpu_less_vcpus_s: None,
            extra_mib: None,
            rounds: None,
            noticed: None,
            mib_per_s: None,
            reused_mib_per_s: None,
            cancel: None,
            receipt: None,
            samples: Vec::new(),
        }
    }

    /// A run that came to nothing.
    pub fn failed(pair: usize, side: Side, error: &anyhow::Error) -> Self {
        Self {
            error: Some(format!("{error:#}")),
            ..Self::new(pair, side)
        }
    }

    /// MiB a second while pages flowed.
    fn throughput(&self) -> Option<f64> {
        let (measures, transfer_ms) = (self.measures?, self.transfer_ms?);
        (transfer_ms > 0.0).then(|| measures.bytes / 1_048_576.0 / (transfer_ms / 1000.0))
    }
}

/// The median: of an even number the mean of the two in the middle. `None` of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// A plain copy's figure.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Copied {
    /// MiB a second.
    pub mib_per_s: Option<f64>,
}

/// Ours by theirs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ratio {
    /// Of the total times: below 1, ours is quicker.
    pub total: Option<f64>,
    /// Of the blackouts.
    pub blackout: Option<f64>,
    /// Our bytes a second while pages flowed, by the plain copy's.
    pub throughput_of_copy: Option<f64>,
}

/// A workload's medians and all of its runs.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The workload's name.
    pub name: &'static str,
    /// Pairs that were run.
    pub pairs: usize,
    /// Medians of our runs that ended well; none if there is no such run.
    pub ours: Option<Measures>,
    /// QEMU's.
    pub qemu: Option<Measures>,
    /// The copy beside them.
    pub copy: Copied,
    /// How they compare.
    pub ratio: Ratio,
    /// Medians of our cancels; none if there was no such run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cancel: Option<Cancelled>,
    /// Every single one.
    pub runs: Vec<Run>,
}

impl Summary {
    /// Sums up a workload's runs.
    pub fn new(workload: &Workload, pairs: usize, runs: Vec<Run>) -> Self {
        let of = |side: Side| runs.iter().filter(move |run| run.side == side);
        let (ours, qemu) = (medians(of(Side::Ours)), medians(of(Side::Qemu)));
        let copy = median(of(Side::Copy).filter_map(|run| run.mib_per_s));
        let throughput = median(of(Side::Ours).filter_map(Run::throughput));
        let by = |part: fn(&Measures) -> f64| divided(ours.as_ref().map(part), qemu.as_ref().map(part));
        Self {
            name: workload.name,
            pairs,
            copy: Copied { mib_per_s: copy },
            ratio: Ratio {
                total: by(|measures| measures.total_ms),
                blackout: by(|measures| measures.blackout_ms),
                throughput_of_copy: divided(throughput, copy),
            },
            cancel: cancels(&runs),
            ours,
            qemu,
            runs,
        }
    }

    /// Runs of one side that failed.
    pub fn failures(&self, side: Side) -> impl Iterator<Item = &Run> {
        self.runs
            .iter()
            .filter(move |run| run.side == side && run.error.is_some())
    }

    /// The run whose total is nearest to the median: the one to draw.
    pub fn typical(&self, side: Side) -> Option<&Run> {
        let middle = match side {
            Side::Ours => self.ours,
            Side::Qemu => self.qemu,
            Side::Copy => None,
        }?;
        let distance = |run: &Run| {
            run.measures.map_or(f64::INFINITY, |measures| {
                (measures.total_ms - middle.total_ms).abs()
            })
        };
        self.runs
            .iter()
            .filter(|run| run.side == side && run.measures.is_some())
            .min_by(|one, other| distance(one).total_cmp(&distance(other)))
    }
}

fn cancels(runs: &[Run]) -> Option<Cancelled> {
    let of =
        |part: fn(&Cancelled) -> f64| median(runs.iter().filter_map(|run| run.cancel.as_ref().map(part)));
    Some(Cancelled {
        source_ms: of(|cancel| cancel.source_ms)?,
        target_ms: of(|cancel| cancel.target_ms)?,
    })
}

fn divided(one: Option<f64>, other: Option<f64>) -> Option<f64> {
    let (one, other) = (one?, other?);
    (other > 0.0).then(|| one / other)
}

fn medians<'a>(runs: impl Iterator<Item = &'a Run>) -> Option<Measures> {
    let all: Vec<Measures> = runs.filter_map(|run| run.measures).collect();
    let of = |part: fn(&Measures) -> f64| median(all.iter().map(part));
    Some(Measures {
        total_ms: of(|measures| measures.total_ms)?,
        blackout_ms: of(|measures| measures.blackout_ms)?,
        guest_gap_ms: of(|measures| measures.guest_gap_ms)?,
        bytes: of(|measures| measures.bytes)?,
        cpu_s: of(|measures| measures.cpu_s)?,
    })
}

/// All that one call of the benchmark found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The machine.
    pub host: Host,
    /// One entry a workload, in the order in which they were run.
    pub workloads: Vec<Summary>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::ALL;

    /// A run of made-up figures, `total_ms` and what follows from it.
    pub fn run(pair: usize, side: Side, total_ms: f64) -> Run {
        Run {
            measures: Some(Measures {
                total_ms,
                blackout_ms: total_ms / 100.0,
                guest_gap_ms: 5.0,
                bytes: total_ms * 1_048_576.0,
                cpu_s: 0.5,
            }),
            transfer_ms: Some(total_ms),
            ..Run::new(pair, side)
        }
    }

    fn copy(pair: usize, mib_per_s: f64) -> Run {
        Run {
            mib_per_s: Some(mib_per_s),
            ..Run::new(pair, Side::Copy)
        }
    }

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_the_two_in_the_middle() {
        assert_eq!(median([]), None);
        assert_eq!(median([7.0]), Some(7.0));
        assert_eq!(median([9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median([4.0, 1.0, 100.0, 2.0]), Some(3.0));
    }

    #[test]
    fn medians_and_ratios_count_the_runs_that_ended_well() {
        let mut runs = vec![copy(1, 2000.0), copy(2, 4000.0)];
        for (pair, total_ms) in [(1, 100.0), (2, 300.0), (3, 200.0)] {
            runs.push(run(pair, Side::Ours, total_ms));
            runs.push(run(pair, Side::Qemu, total_ms * 4.0));
        }
        runs.push(Run::failed(4, Side::Ours, &anyhow::anyhow!("cut")));
        runs[2].cancel = Some(Cancelled {
            source_ms: 9.0,
            target_ms: 40.0,
        });
        let summary = Summary::new(&ALL[0], 4, runs);
        assert_eq!(summary.cancel.unwrap().target_ms, 40.0);
        assert_eq!(summary.ours.unwrap().total_ms, 200.0);
        assert_eq!(summary.qemu.unwrap().blackout_ms, 8.0);
        assert_eq!(summary.ratio.total, Some(0.25));
        assert_eq!(summary.ratio.blackout, Some(0.25));
        // A byte a nanosecond and so on: 1 MiB a millisecond is 1000 MiB/s, a third of the copy's 3000.
        assert_eq!(summary.ratio.throughput_of_copy, Some(1.0 / 3.0));
        assert_eq!(summary.failures(Side::Ours).count(), 1);
        assert_eq!(summary.typical(Side::Ours).unwrap().pair, 3);
    }

    #[test]
    fn a_side_without_a_good_run_has_no_figures_and_no_ratio() {
        let runs = vec![
            run(1, Side::Ours, 10.0),
            Run::failed(1, Side::Qemu, &anyhow::anyhow!("slow")),
        ];
        let summary = Summary::new(&ALL[0], 1, runs);
        assert!(summary.qemu.is_none() && summary.ratio.total.is_none());
        assert_eq!(summary.copy.mib_per_s, None);
        assert!(summary.typical(Side::Qemu).is_none());
    }

    #[test]
    fn the_json_has_the_documented_shape() {
        let runs = vec![
            run(1, Side::Ours, 10.0),
            run(1, Side::Qemu, 20.0),
            copy(1, 1000.0),
            Run::failed(2, Side::Ours, &anyhow::anyhow!("cut")),
        ];
        let report = Report {
            host: Host::default(),
            workloads: vec![Summary::new(&ALL[0], 1, runs)],
        };
        let json = serde_json::to_value(&report).unwrap();
        let keys = |value: &Value| -> Vec<String> {
            let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
            keys.sort();
            keys
        };
        assert_eq!(keys(&json), ["host", "workloads"]);
        let first = &json["workloads"][0];
        assert_eq!(
            keys(first),
            ["copy", "name", "ours", "pairs", "qemu", "ratio", "runs"]
        );
        let measures = ["blackout_ms", "bytes", "cpu_s", "guest_gap_ms", "total_ms"];
        assert_eq!(keys(&first["ours"]), measures);
        assert_eq!(keys(&first["qemu"]), measures);
        assert_eq!(keys(&first["copy"]), ["mib_per_s"]);
        assert_eq!(keys(&first["ratio"]), ["blackout", "throughput_of_copy", "total"]);
        assert_eq!(first["runs"][0]["side"], "ours");
        assert_eq!(first["runs"][0]["total_ms"], 10.0);
        assert_eq!(first["runs"][2]["mib_per_s"], 1000.0);
        assert_eq!(first["runs"][3]["error"], "cut");
    }
}
