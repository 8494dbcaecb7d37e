//! When pre-copy ends: the stop rule, the throttle and the abort rule, as pure functions of what was measured.
//!
//! With `D` the bytes known dirty at the end of a round, `B` the measured bandwidth (capped), `w` the rate at which the
//! guest made pages dirty in that round, `p` the share of its time that each vCPU was held back meanwhile, `R` the round
//! trip, `S` the state's bytes, and `T` the longest blackout the user allows:
//!
//! ```text
//!  expected blackout   E = pause + state + commit + 2 R + 9/8 (D + S + w * pause) / B
//!  stop rule           E <= T                    and no further round is worth while
//!  worth while         D / B >= 1 ms  and  min(D, w * D / B) <= D / 2,  at most 4 times, and inside the deadline
//!  throttle            E > T and D above 3/4 of what the round carried:
//!                      p' = 1 - (B / 2) / (w / (1 - p)), at least 20 % and p + 10 %, at most what is allowed
//!  post-copy           where it is allowed, instead of an abort; and when, with no throttle left, D is above 3/4 of what the
//!                      second or a later round carried, or the next round would end after the deadline
//!  abort rule          the deadline passed; or pause + state + commit are above T already; or, with no throttle left,
//!                      D has not shrunk by a tenth for 5 rounds that took 3 s; or 60 rounds
//! ```
//!
//! Sources: pre-copy ends when the writable working set fits the blackout that is allowed, or stops shrinking (Clark et
//! al., "Live Migration of Virtual Machines", NSDI 2005, sections 3 and 5). `D / B <= T` is what QEMU does
//! (docs/devel/migration/main.rst, "downtime-limit"). What stands still beside the pages is counted too, since `T` is a
//! promise: the pause, the state's size and its two sides by the VMM's model, the round trip as measured, the commit as
//! the cluster measured it lately. The eighth is for a link that is slower in the blackout than it was in the rounds.
//!
//! The rounds that are worth while are ours: a guest that writes slowly could stop at `T` and would then have a blackout
//! of `T`; a few short rounds more and it has one of milliseconds. The abort looks at rounds, never at samples in time:
//! `D` over time is a saw-tooth.
//!
//! Holding vCPUs back until pre-copy converges is QEMU's auto-converge (docs/devel/migration, "auto-converge"), which
//! climbs a fixed ladder. Here the figures choose: so much that the guest dirties half of what the link carries, and
//! each round halves the rest. A hot set that is rewritten within one round counts once in `w`, so `w` can be far too low
//! and a step too small; then the next round shows a higher rate for the same share, and the share rises again. It
//! never falls in an attempt: pre-copy that converges is short, and a share that was let go would be needed again.

use std::time::Duration;

use drover_proto::v1::MigrationOptions;
use drover_proto::{Code, Fault};

use crate::bandwidth::time;

/// Taken when the user names no longest blackout.
pub const MAX_DOWNTIME_DEFAULT: Duration = Duration::from_millis(100);
/// From Ready until the vCPUs run, where nobody measured it: the entry in the log of three controllers on one machine took
/// 5 to 8 ms, and the grant's way and the resume less than 2 ms.
pub const COMMIT_DEFAULT: Duration = Duration::from_millis(10);
/// Rounds spent on making a blackout shorter that would be allowed already.
pub const POLISHING_ROUNDS_MAX: u32 = 4;
/// Below this the last pages take too little time to make it worth less.
pub const POLISHED: Duration = Duration::from_millis(1);
/// So many rounds without shrinking, in at least [`STUCK_FOR`], are no convergence.
pub const STUCK_ROUNDS: u32 = 5;
/// See [`STUCK_ROUNDS`]: rounds of a small hot set are short, and a burst of writes should not end a migration.
pub const STUCK_FOR: Duration = Duration::from_secs(3);
/// Most rounds of one attempt, whatever they bring.
pub const ROUNDS_MAX: u32 = 60;
/// Most that a vCPU is held back, percent: at 100 it would stand still outside every promise about blackouts.
pub const THROTTLE_MAX: u32 = 99;
/// Least that a vCPU is held back, percent: less would hardly show.
pub const THROTTLE_FIRST: u32 = 20;
/// Least by which the throttle rises, percent points.
pub const THROTTLE_STEP: u32 = 10;

/// What the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intent {
    /// Longest blackout allowed.
    pub max_downtime: Duration,
    /// The switchover must begin within so long after the connect.
    pub deadline: Option<Duration>,
    /// Cap in bytes a second.
    pub bandwidth: Option<u64>,
    /// Most that each vCPU may be held back, percent of its time; 0: not at all.
    pub max_throttle: u32,
    /// Whether the VM may run at the target before all its pages are there.
    pub post_copy: bool,
}

impl Default for Intent {
    fn default() -> Self {
        Self {
            max_downtime: MAX_DOWNTIME_DEFAULT,
            deadline: None,
            bandwidth: None,
            max_throttle: 0,
            post_copy: false,
        }
    }
}

impl Intent {
    /// What `options` ask for; 0 stands for a default or for nothing, as they say.
    pub fn of(options: &MigrationOptions) -> Self {
        Self {
            max_downtime: match options.max_downtime_ms {
                0 => MAX_DOWNTIME_DEFAULT,
                ms => Duration::from_millis(ms.into()),
            },
            deadline: (options.deadline_ms > 0).then(|| Duration::from_millis(options.deadline_ms)),
            bandwidth: (options.bandwidth_mib_s > 0).then(|| options.bandwidth_mib_s.saturating_mul(1 << 20)),
            max_throttle: options.max_throttle_percent.min(THROTTLE_MAX),
            post_copy: options.allow_postcopy,
        }
    }
}

/// What a switchover costs beside page data, as far as it is known before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// Stopping the vCPUs.
    pub pause: Duration,
    /// Saving the state, and restoring it at the other side.
    pub state: Duration,
    /// Bytes of the encoded state.
    pub state_bytes: u64,
    /// From Ready until the vCPUs run.
    pub commit: Duration,
}

impl Costs {
    /// Nothing costs anything: for tests that look at something else.
    pub const NONE: Self = Self {
        pause: Duration::ZERO,
        state: Duration::ZERO,
        state_bytes: 0,
        commit: Duration::ZERO,
    };

    /// With what the cluster measured lately (`pause_us`, `state_us`, `commit_us`) and a quarter to spare; 0: nobody did. The state is
    /// of other VMs too, so it is never taken for less than this VM's own.
    #[must_use]
    pub fn measured(self, options: &MigrationOptions) -> Self {
        let or = |measured_us: u32, model: Duration| {
            let measured = Duration::from_micros(measured_us.into());
            match measured_us {
                0 => model,
                _ => measured + measured / 4,
            }
        };
        Self {
            pause: or(options.pause_us, self.pause),
            state: or(options.state_us, self.state).max(self.state),
            commit: or(options.commit_us, self.commit),
            ..self
        }
    }

    /// What no link changes.
    fn least(&self) -> Duration {
        self.pause.saturating_add(self.state).saturating_add(self.commit)
    }
}

impl Default for Costs {
    /// For a VM that does not know: above what VMs with a few vCPUs take.
    fn default() -> Self {
        Self {
            pause: Duration::from_millis(2),
            state: Duration::from_millis(5),
            state_bytes: 512 << 10,
            commit: COMMIT_DEFAULT,
        }
    }
}

/// What was measured when a round had ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Rounds done.
    pub round: u32,
    /// Since the connect.
    pub elapsed: Duration,
    /// Bytes of the pages that the round carried.
    pub carried: u64,
    /// Bytes known dirty or unsent.
    pub remaining: u64,
    /// Bytes of distinct pages a second that the guest wrote in the last round.
    pub dirty_rate: u64,
    /// Bytes a second that the link carries.
    pub bandwidth: u64,
    /// The shortest time from a question to its answer.
    pub round_trip: Duration,
    /// What the switchover costs beside the pages.
    pub costs: Costs,
    /// Rounds after the first one that would have fit.
    pub polished: u32,
    /// How much each vCPU was held back in the round, percent.
    pub throttle: u32,
}

/// What to do after a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Pause and send the rest.
    Switchover,
    /// Send another round while the guest runs.
    NextRound,
    /// Hold each vCPU back for so many percent of its time, then send another round.
    Throttle(u32),
    /// Pause, and let the VM run at the target before it has the rest.
    PostCopy,
    /// Give up.
    Abort(Fault),
}

/// How long the guest would stand still if it were paused now.
pub fn expected_blackout(sample: &Sample, intent: &Intent) -> Duration {
    let Sample { costs, bandwidth, .. } = *sample;
    let meanwhile = u128::from(sample.dirty_rate) * costs.pause.as_nanos() / 1_000_000_000;
    let bytes = sample
        .remaining
        .saturating_add(costs.state_bytes)
        .saturating_add(u64::try_from(meanwhile).unwrap_or(u64::MAX));
    let bandwidth = bandwidth.min(intent.bandwidth.unwrap_or(u64::MAX));
    costs
        .least()
        .saturating_add(sample.round_trip.saturating_mul(2))
        .saturating_add(time(bytes.saturating_add(bytes / 8), bandwidth))
}

/// Whether the expected blackout is one that the user allows.
pub fn fits(sample: &Sample, intent: &Intent) -> bool {
    expected_blackout(sample, intent) <= intent.max_downtime
}

/// Whether another round would make an allowed blackout much shorter.
fn worth_while(sample: &Sample, intent: &Intent) -> bool {
    let round = time(sample.remaining, sample.bandwidth);
    let dirty_after = u128::from(sample.dirty_rate) * round.as_nanos() / 1_000_000_000;
    let in_time = intent
        .deadline
        .is_none_or(|deadline| sample.elapsed.saturating_add(round) < deadline);
    round >= POLISHED
        && dirty_after <= u128::from(sample.remaining / 2)
        && sample.polished < POLISHING_ROUNDS_MAX
        && sample.round < ROUNDS_MAX
        && in_time
}

/// How much more the vCPUs are to be held back, if they may and the rest does not shrink by itself.
fn throttle(sample: &Sample, intent: &Intent) -> Option<u32> {
    let allowed = intent.max_throttle.min(THROTTLE_MAX);
    if sample.throttle >= allowed || sample.remaining <= sample.carried / 4 * 3 {
        return None;
    }
    let unthrottled = u128::from(sample.dirty_rate) * 100 / u128::from(100 - sample.throttle);
    let runs = u128::from(sample.bandwidth / 2) * 100 / unthrottled.max(1);
    let asked = 100 - u32::try_from(runs.min(100)).expect("no more than 100");
    let least = (sample.throttle + THROTTLE_STEP).max(THROTTLE_FIRST);
    Some(asked.max(least).min(allowed))
}

/// The stop rule, the throttle, post-copy where it is allowed, the abort rule. `trend` has seen this sample.
pub fn decide(sample: &Sample, trend: &Trend, intent: &Intent) -> Decision {
    match pre_copy(sample, trend, intent) {
        Decision::Abort(_) if intent.post_copy => Decision::PostCopy,
        Decision::NextRound if intent.post_copy && is_futile(sample, intent) => Decision::PostCopy,
        decision => decision,
    }
}

/// Whether another round would bring nothing, or would come too late. One that fits already is worth while for itself.
fn is_futile(sample: &Sample, intent: &Intent) -> bool {
    let round = time(sample.remaining, sample.bandwidth);
    let late = |deadline| sample.elapsed.saturating_add(round) >= deadline;
    let shrinks = sample.remaining <= sample.carried / 4 * 3;
    !fits(sample, intent) && ((sample.round > 1 && !shrinks) || intent.deadline.is_some_and(late))
}

/// What pre-copy by itself would do.
fn pre_copy(sample: &Sample, trend: &Trend, intent: &Intent) -> Decision {
    if fits(sample, intent) {
        return if worth_while(sample, intent) {
            Decision::NextRound
        } else {
            Decision::Switchover
        };
    }
    if let Some(fault) = past_deadline(sample.elapsed, intent) {
        return Decision::Abort(fault);
    }
    if sample.round >= ROUNDS_MAX {
        return Decision::Abort(no_convergence(sample, intent));
    }
    if let Some(percent) = throttle(sample, intent) {
        return Decision::Throttle(percent);
    }
    if trend.is_stuck(sample.elapsed) {
        return Decision::Abort(no_convergence(sample, intent));
    }
    Decision::NextRound
}

/// The fault of a switchover that could not be short enough even if no page were left: told before anything is sent.
pub fn hopeless(costs: &Costs, intent: &Intent) -> Option<Fault> {
    let least = costs.least();
    (least > intent.max_downtime).then(|| {
        let message = format!(
            "a switchover of this VM takes about {} ms without any page (pause {} ms, state {} ms, commit {} ms) and \
             {} ms are allowed: allow {} ms with max-downtime",
            least.as_millis(),
            costs.pause.as_millis(),
            costs.state.as_millis(),
            costs.commit.as_millis(),
            intent.max_downtime.as_millis(),
            suggestion_ms(least),
        );
        Fault::new(Code::NoConvergence, message).field("max_downtime_ms")
    })
}

/// The fault of a pre-copy that took longer than its deadline.
pub fn past_deadline(elapsed: Duration, intent: &Intent) -> Option<Fault> {
    let deadline = intent.deadline.filter(|deadline| elapsed >= *deadline)?;
    Some(
        Fault::new(
            Code::DeadlineExceeded,
            format!(
                "{} ms after it began the migration was not ready for its switchover, its deadline was {} ms: give it \
                 a longer deadline, a longer max-downtime or more bandwidth",
                elapsed.as_millis(),
                deadline.as_millis()
            ),
        )
        .field("deadline_ms"),
    )
}

fn no_convergence(sample: &Sample, intent: &Intent) -> Fault {
    const MIB: f64 = 1_048_576.0;
    let blackout = expected_blackout(sample, intent);
    let cap = match intent.bandwidth {
        Some(cap) if sample.bandwidth >= cap - cap / 8 => " (its cap)",
        _ => "",
    };
    let held_back = match sample.throttle {
        0 => String::new(),
        percent => format!(" while its vCPUs are held back for {percent} % of their time"),
    };
    let throttle = if sample.throttle >= THROTTLE_MAX {
        "let the guest write less".to_owned()
    } else if intent.max_throttle == 0 {
        "let its vCPUs be held back with throttle, or let the guest write less".to_owned()
    } else {
        format!(
            "allow a throttle above {} %, or let the guest write less",
            intent.max_throttle
        )
    };
    let message = format!(
        "after {} rounds {:.1} MiB stay dirty: the guest rewrites {:.1} MiB/s of its memory{held_back} and the link \
         carries {:.1} MiB/s{cap}, so the blackout would be {} ms and {} ms are allowed: allow {} ms with \
         max-downtime, give the migration more bandwidth, {throttle}",
        sample.round,
        sample.remaining as f64 / MIB,
        sample.dirty_rate as f64 / MIB,
        sample.bandwidth as f64 / MIB,
        blackout.as_millis(),
        intent.max_downtime.as_millis(),
        suggestion_ms(blackout),
    );
    Fault::new(Code::NoConvergence, message).field("max_downtime_ms")
}

/// The blackout with a quarter to spare, in full 10 ms.
fn suggestion_ms(blackout: Duration) -> u128 {
    (blackout.as_millis() * 5 / 4 + 10).next_multiple_of(10)
}

/// Whether the remaining set shrinks from round to round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trend {
    best: Option<u64>,
    best_at: Duration,
    rounds_since: u32,
}

impl Trend {
    /// The trend after one more round.
    #[must_use]
    pub fn after(self, sample: &Sample) -> Self {
        match self.best {
            Some(best) if sample.remaining > best - best / 10 => Self {
                rounds_since: self.rounds_since + 1,
                ..self
            },
            _ => Self {
                best: Some(sample.remaining),
                best_at: sample.elapsed,
                rounds_since: 0,
            },
        }
    }

    fn is_stuck(&self, elapsed: Duration) -> bool {
        self.rounds_since >= STUCK_ROUNDS && elapsed.saturating_sub(self.best_at) >= STUCK_FOR
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn intent(max_downtime_ms: u64) -> Intent {
        Intent {
            max_downtime: Duration::from_millis(max_downtime_ms),
            ..Intent::default()
        }
    }

    fn costs_ms(pause: u64, state: u64, commit: u64) -> Costs {
        Costs {
            pause: Duration::from_millis(pause),
            state: Duration::from_millis(state),
            state_bytes: 256 << 10,
            commit: Duration::from_millis(commit),
        }
    }

    fn sample(remaining: u64, dirty_rate: u64) -> Sample {
        Sample {
            round: 1,
            elapsed: Duration::from_secs(1),
            carried: 1024 * MIB,
            remaining,
            dirty_rate,
            bandwidth: 1000 * MIB,
            round_trip: Duration::from_micros(200),
            costs: Costs::default(),
            polished: 0,
            throttle: 0,
        }
    }

    /// A guest with a hot set of `hot` bytes that it writes at `write_rate` when nothing holds it back, on a link whose
    /// speed in each round is `bandwidth` times an element of `wobble`, in percent, by turns.
    #[derive(Clone, Debug)]
    struct Model {
        hot: u64,
        write_rate: u64,
        bandwidth: u64,
        wobble: Vec<u64>,
        costs: Costs,
        round_trip: Duration,
    }

    /// How a play ended.
    #[derive(Debug)]
    struct End {
        decision: Decision,
        sample: Sample,
        /// The blackout as it came, the link at its slowest and all costs in full.
        blackout: Duration,
        throttles: Vec<u32>,
    }

    impl Model {
        fn new(hot: u64, write_rate: u64, bandwidth: u64) -> Self {
            Self {
                hot,
                write_rate,
                bandwidth,
                wobble: vec![100],
                costs: Costs::default(),
                round_trip: Duration::from_micros(200),
            }
        }

        fn speed(&self, round: u32) -> u64 {
            self.bandwidth * self.wobble[round as usize % self.wobble.len()] / 100
        }

        /// What becomes dirty in `took` under a throttle.
        fn dirtied(&self, took: Duration, throttle: u32) -> u64 {
            let rate = u128::from(self.write_rate) * u128::from(100 - throttle) / 100;
            self.hot
                .min(u64::try_from(rate * took.as_nanos() / 1_000_000_000).unwrap())
        }

        /// Plays rounds until the decision.
        fn play(&self, intent: &Intent) -> End {
            let (mut carried, mut throttle) = (1024 * MIB, 0);
            let (mut trend, mut elapsed, mut polished) = (Trend::default(), Duration::ZERO, 0);
            let mut meter = crate::meter::Meter::default();
            let mut throttles = Vec::new();
            for round in 1.. {
                let took = time(carried, self.speed(round)) + self.round_trip;
                elapsed += took;
                meter.round(carried, took);
                let remaining = self.dirtied(took, throttle);
                let sample = Sample {
                    round,
                    elapsed,
                    carried,
                    remaining,
                    dirty_rate: crate::bandwidth::rate(remaining, took),
                    bandwidth: meter.estimate(intent.bandwidth),
                    round_trip: self.round_trip,
                    costs: self.costs,
                    polished,
                    throttle,
                };
                trend = trend.after(&sample);
                let decision = decide(&sample, &trend, intent);
                match decision {
                    Decision::NextRound => polished += u32::from(fits(&sample, intent)),
                    Decision::Throttle(percent) => {
                        throttle = percent;
                        throttles.push(percent);
                        trend = Trend::default();
                    }
                    decision => {
                        let written = self.dirtied(self.costs.pause, throttle);
                        let last = self.hot.min(remaining + written);
                        let slowest = self.wobble.iter().min().unwrap() * self.bandwidth / 100;
                        return End {
                            decision,
                            sample,
                            blackout: self.costs.pause
                                + time(last, slowest)
                                + time(self.costs.state_bytes, slowest)
                                + self.round_trip * 3 / 2
                                + self.costs.state
                                + self.costs.commit,
                            throttles,
                        };
                    }
                }
                carried = remaining;
            }
            unreachable!("rounds are bounded")
        }
    }

    #[test]
    fn an_idle_guest_is_switched_over_after_the_first_round() {
        assert_eq!(
            decide(&sample(0, 0), &Trend::default(), &intent(100)),
            Decision::Switchover
        );
    }

    #[test]
    fn a_slow_writer_is_polished_to_last_pages_of_milliseconds() {
        let end = Model::new(256 * MIB, 100 * MIB, 1000 * MIB).play(&intent(100));
        assert_eq!(end.decision, Decision::Switchover);
        let last = time(end.sample.remaining, end.sample.bandwidth);
        assert!(last < Duration::from_millis(2), "{end:?}");
    }

    #[test]
    fn a_hot_set_that_fits_is_switched_over_without_endless_polishing() {
        let end = Model::new(64 * MIB, 10_000 * MIB, 1000 * MIB).play(&intent(100));
        assert_eq!(end.decision, Decision::Switchover);
        assert!(end.sample.round <= 1 + POLISHING_ROUNDS_MAX, "{end:?}");
    }

    #[test]
    fn every_cost_of_the_switchover_counts() {
        let plain = expected_blackout(&sample(64 * MIB, 0), &intent(100));
        // Pages and the state's bytes with their eighth; pause, state and commit; two round trips.
        assert_eq!(plain.as_micros(), 72_000 + 562 + 17_000 + 400);
        let more = [
            Costs {
                pause: Duration::from_millis(3),
                ..Costs::default()
            },
            Costs {
                state: Duration::from_millis(6),
                ..Costs::default()
            },
            Costs {
                commit: Duration::from_millis(11),
                ..Costs::default()
            },
            Costs {
                state_bytes: Costs::default().state_bytes + MIB,
                ..Costs::default()
            },
        ];
        for costs in more {
            let sample = Sample {
                costs,
                ..sample(64 * MIB, 0)
            };
            let blackout = expected_blackout(&sample, &intent(100));
            let more = blackout - plain;
            assert!(
                more >= Duration::from_millis(1) && more < Duration::from_millis(2),
                "{costs:?} costs {more:?}"
            );
        }
        let written = expected_blackout(&sample(64 * MIB, 4000 * MIB), &intent(100));
        assert!(
            written > plain,
            "what the guest writes until it stands must be sent too"
        );
        let capped = Intent {
            bandwidth: Some(500 * MIB),
            ..intent(100)
        };
        assert!(expected_blackout(&sample(64 * MIB, 0), &capped) > plain + Duration::from_millis(70));
    }

    #[test]
    fn a_hot_set_that_never_fits_ends_with_figures_and_advice() {
        let model = Model::new(64 * MIB, 10_000 * MIB, 1000 * MIB);
        let end = model.play(&intent(40));
        let Decision::Abort(fault) = end.decision else {
            panic!("{end:?}")
        };
        assert_eq!(
            (fault.code, fault.field.as_str()),
            (Code::NoConvergence, "max_downtime_ms")
        );
        assert!(fault.message.contains("64.0 MiB stay dirty"), "{fault}");
        assert!(fault.message.contains("40 ms are allowed: allow "), "{fault}");
        assert!(
            fault.message.contains("let its vCPUs be held back with throttle"),
            "{fault}"
        );
        assert!(end.sample.elapsed >= STUCK_FOR && end.sample.round <= ROUNDS_MAX);
        let advised = fault.message.split("allow ").nth(1).unwrap();
        let advised = advised.split(' ').next().unwrap().parse().unwrap();
        assert_eq!(
            model.play(&intent(advised)).decision,
            Decision::Switchover,
            "the advice of {advised} ms is right"
        );
    }

    #[test]
    fn what_was_measured_counts_instead_of_the_default() {
        let measured = |pause_us, state_us, commit_us| {
            Costs::default().measured(&MigrationOptions {
                pause_us,
                state_us,
                commit_us,
                ..MigrationOptions::default()
            })
        };
        assert_eq!(measured(0, 0, 0), Costs::default());
        let quick = measured(400, 800, 4_000);
        assert_eq!(quick.pause, Duration::from_micros(500));
        assert_eq!(
            quick.state,
            Costs::default().state,
            "other VMs' states say little of this one's"
        );
        assert_eq!(quick.commit, Duration::from_millis(5));
        assert_eq!(measured(0, 8_000, 0).state, Duration::from_millis(10));
        let slow = Sample {
            costs: measured(0, 0, 80_000),
            ..sample(0, 0)
        };
        assert!(!fits(&slow, &intent(100)), "a cluster that commits slowly");
        assert!(fits(&slow, &intent(120)));
    }

    #[test]
    fn a_blackout_below_what_a_switchover_takes_is_refused_with_what_would_do() {
        let costs = costs_ms(2, 3, 10);
        assert_eq!(hopeless(&costs, &intent(15)), None);
        let fault = hopeless(&costs, &intent(14)).unwrap();
        assert_eq!(
            (fault.code, fault.field.as_str()),
            (Code::NoConvergence, "max_downtime_ms")
        );
        assert!(
            fault.message.contains("14 ms are allowed: allow 30 ms"),
            "{fault}"
        );
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_is_held_back_by_what_the_figures_ask_for() {
        let throttled = Intent {
            max_throttle: 99,
            ..intent(100)
        };
        // Known at once: the guest dirtied twice what the link carries, so a quarter of its time is left to it.
        let fast = Sample {
            round: 2,
            carried: 64 * MIB,
            ..sample(128 * MIB, 2000 * MIB)
        };
        assert_eq!(
            decide(&fast, &Trend::default(), &throttled),
            Decision::Throttle(75)
        );
        let again = Sample {
            throttle: 75,
            dirty_rate: 1000 * MIB,
            ..fast
        };
        assert_eq!(
            decide(&again, &Trend::default(), &throttled),
            Decision::Throttle(88),
            "the same share shows a higher rate than thought"
        );
        let shrinks = Sample {
            carried: 256 * MIB,
            ..fast
        };
        assert_eq!(
            decide(&shrinks, &Trend::default(), &throttled),
            Decision::NextRound,
            "what shrinks by itself needs no throttle"
        );
    }

    #[test]
    fn a_throttle_that_is_not_enough_is_named_in_the_abort() {
        let model = Model::new(64 * MIB, 10_000 * MIB, 100 * MIB);
        let end = model.play(&Intent {
            max_throttle: 50,
            ..intent(100)
        });
        let Decision::Abort(fault) = &end.decision else {
            panic!("{end:?}")
        };
        assert_eq!(end.throttles, [50]);
        assert!(
            fault.message.contains("held back for 50 % of their time"),
            "{fault}"
        );
        assert!(fault.message.contains("allow a throttle above 50 %"), "{fault}");
    }

    #[test]
    fn a_hot_set_over_a_slow_link_converges_in_few_steps() {
        let model = Model::new(64 * MIB, 600 * MIB, 112 * MIB);
        let end = model.play(&Intent {
            max_throttle: 99,
            ..intent(100)
        });
        assert_eq!(end.decision, Decision::Switchover, "{end:?}");
        assert!(end.throttles.len() <= 5, "{:?}", end.throttles);
        assert!(end.sample.throttle <= 96, "{:?}", end.throttles);
    }

    #[test]
    fn a_passed_deadline_aborts_unless_the_rest_fits() {
        let with = |ms| Intent {
            deadline: Some(Duration::from_millis(ms)),
            max_throttle: 90,
            ..intent(100)
        };
        let hot = sample(500 * MIB, 900 * MIB);
        assert_eq!(decide(&hot, &Trend::default(), &with(1001)), Decision::NextRound);
        let Decision::Abort(fault) = decide(&hot, &Trend::default(), &with(1000)) else {
            panic!("no abort")
        };
        assert_eq!(fault.code, Code::DeadlineExceeded);
        assert_eq!(
            decide(&sample(50 * MIB, MIB), &Trend::default(), &with(1000)),
            Decision::Switchover
        );
    }

    #[test]
    fn a_set_that_shrinks_slowly_is_not_stuck() {
        let mut trend = Trend::default();
        let mut remaining = 1000 * MIB;
        for second in 0..30 {
            let sample = Sample {
                elapsed: Duration::from_secs(second),
                ..sample(remaining, 900 * MIB)
            };
            trend = trend.after(&sample);
            assert!(!trend.is_stuck(sample.elapsed));
            remaining = remaining * 85 / 100;
        }
    }

    fn models() -> impl Strategy<Value = Model> {
        (
            0_u64..1024,
            1_u64..20_000,
            5_u64..5_000,
            prop::collection::vec(92_u64..=100, 1..5),
            (0_u64..5, 0_u64..20, 0_u64..30),
            0_u64..20_000,
        )
            .prop_map(
                |(hot, write_rate, bandwidth, wobble, (pause, state, commit), trip_us)| Model {
                    hot: hot * MIB,
                    write_rate: write_rate * MIB,
                    bandwidth: bandwidth * MIB,
                    wobble,
                    costs: costs_ms(pause, state, commit),
                    round_trip: Duration::from_micros(trip_us),
                },
            )
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn whoever_is_switched_over_stands_still_no_longer_than_allowed(
            model in models(),
            max_downtime_ms in 1_u64..500,
            max_throttle in 0_u32..=99,
        ) {
            let intent = Intent { max_throttle, ..intent(max_downtime_ms) };
            let end = model.play(&intent);
            if end.decision == Decision::Switchover {
                prop_assert!(end.blackout <= intent.max_downtime, "{end:?}");
            }
        }

        #[test]
        fn a_throttle_only_rises_and_never_above_what_is_allowed(
            model in models(),
            max_downtime_ms in 1_u64..500,
            max_throttle in 0_u32..=99,
        ) {
            let end = model.play(&Intent { max_throttle, ..intent(max_downtime_ms) });
            prop_assert!(end.throttles.is_sorted_by(|low, high| low < high), "{end:?}");
            prop_assert!(end.throttles.iter().all(|&percent| percent <= max_throttle), "{end:?}");
        }

        #[test]
        fn with_a_full_throttle_whoever_can_be_moved_is_moved(model in models(), spare_ms in 20_u64..500) {
            // A hundredth of the writing fits the link twice, and the guest leaves time to send something.
            prop_assume!(model.write_rate / 100 < model.bandwidth * 9 / 20);
            let least = model.costs.least() + time(model.costs.state_bytes * 9 / 8, model.bandwidth * 9 / 10) + model.round_trip * 2;
            let intent = Intent {
                max_downtime: least + Duration::from_millis(spare_ms) + model.round_trip * 2,
                max_throttle: 99,
                ..Intent::default()
            };
            let end = model.play(&intent);
            prop_assert_eq!(&end.decision, &Decision::Switchover, "{:?}", end);
        }
    }
}
