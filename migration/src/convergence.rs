//! When pre-copy ends: the stop rule and the abort rule, as pure functions of what was measured.
//!
//! With `D` the bytes known dirty at the end of a round, `B` the measured bandwidth (capped), `w` the rate at which the
//! guest made pages dirty in that round, and `T` the longest blackout the user allows:
//!
//! ```text
//!  expected blackout   E = D / B + A             A = min(10 ms, T / 2): pause, state, commit
//!  stop rule           E <= T                    and no further round is worth while
//!  worth while         D / B >= 1 ms  and  min(D, w * D / B) <= D / 2,  at most 4 times, and inside the deadline
//!  abort rule          the deadline passed; or D has not shrunk by a tenth for 5 rounds that took 3 s; or 60 rounds
//! ```
//!
//! Sources: pre-copy ends when the writable working set fits the blackout that is allowed, or stops shrinking (Clark et
//! al., "Live Migration of Virtual Machines", NSDI 2005, sections 3 and 5). `D / B <= T` is what QEMU does
//! (docs/devel/migration/main.rst, "downtime-limit"). The rounds that are worth while are ours: a guest that writes
//! slowly could stop at `T` and would then have a blackout of `T`; a few short rounds more and it has one of
//! milliseconds. The abort looks at rounds, never at samples in time: `D` over time is a saw-tooth.

use std::time::Duration;

use drover_proto::{Code, Fault};

use crate::bandwidth::time;

/// Blackout that is not page data.
pub const ALLOWANCE: Duration = Duration::from_millis(10);
/// Taken when the user names no longest blackout.
pub const MAX_DOWNTIME_DEFAULT: Duration = Duration::from_millis(300);
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

/// What the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intent {
    /// Longest blackout allowed.
    pub max_downtime: Duration,
    /// The switchover must begin within so long after the connect.
    pub deadline: Option<Duration>,
    /// Cap in bytes a second.
    pub bandwidth: Option<u64>,
}

/// What was measured when a round had ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Rounds done.
    pub round: u32,
    /// Since the connect.
    pub elapsed: Duration,
    /// Bytes known dirty or unsent.
    pub remaining: u64,
    /// Bytes of distinct pages a second that the guest wrote in the last round.
    pub dirty_rate: u64,
    /// Bytes a second that the link carries.
    pub bandwidth: u64,
    /// Rounds after the first one that would have fit.
    pub polished: u32,
}

/// What to do after a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Pause and send the rest.
    Switchover,
    /// Send another round while the guest runs.
    NextRound,
    /// Give up.
    Abort(Fault),
}

/// How long the guest would stand still if it were paused now.
pub fn expected_blackout(sample: &Sample, intent: &Intent) -> Duration {
    time(sample.remaining, sample.bandwidth).saturating_add(ALLOWANCE.min(intent.max_downtime / 2))
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

/// The stop rule, then the abort rule. `trend` has seen this sample.
pub fn decide(sample: &Sample, trend: &Trend, intent: &Intent) -> Decision {
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
    if trend.is_stuck(sample.elapsed) || sample.round >= ROUNDS_MAX {
        return Decision::Abort(no_convergence(sample, intent));
    }
    Decision::NextRound
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
    let message = format!(
        "after {} rounds {:.1} MiB stay dirty: the guest rewrites {:.1} MiB/s of its memory and the link carries \
         {:.1} MiB/s{cap}, so the blackout would be {} ms and {} ms are allowed: allow {} ms with max-downtime, give \
         the migration more bandwidth, or let the guest write less",
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
    use super::*;

    const MIB: u64 = 1 << 20;

    fn intent(max_downtime_ms: u64) -> Intent {
        Intent {
            max_downtime: Duration::from_millis(max_downtime_ms),
            deadline: None,
            bandwidth: None,
        }
    }

    fn sample(remaining: u64, dirty_rate: u64) -> Sample {
        Sample {
            round: 1,
            elapsed: Duration::from_secs(1),
            remaining,
            dirty_rate,
            bandwidth: 1000 * MIB,
            polished: 0,
        }
    }

    /// A guest with a hot set of `hot` bytes that it writes at `write_rate`; plays rounds until the decision.
    fn play(hot: u64, write_rate: u64, bandwidth: u64, intent: &Intent) -> (Decision, Sample) {
        let dirtied = |round: Duration| {
            hot.min(u64::try_from(u128::from(write_rate) * round.as_nanos() / 1_000_000_000).unwrap())
        };
        let mut took = time(1024 * MIB, bandwidth);
        let (mut trend, mut elapsed, mut polished) = (Trend::default(), Duration::ZERO, 0);
        for round in 1.. {
            elapsed += took;
            let remaining = dirtied(took);
            let dirty_rate = crate::bandwidth::rate(remaining, took);
            let sample = Sample {
                round,
                elapsed,
                remaining,
                dirty_rate,
                bandwidth,
                polished,
            };
            trend = trend.after(&sample);
            let decision = decide(&sample, &trend, intent);
            if decision != Decision::NextRound {
                return (decision, sample);
            }
            polished += u32::from(fits(&sample, intent));
            took = time(remaining, bandwidth);
        }
        unreachable!("rounds are bounded")
    }

    #[test]
    fn an_idle_guest_is_switched_over_after_the_first_round() {
        assert_eq!(
            decide(&sample(0, 0), &Trend::default(), &intent(300)),
            Decision::Switchover
        );
    }

    #[test]
    fn a_slow_writer_is_polished_to_a_blackout_of_milliseconds() {
        let (decision, sample) = play(256 * MIB, 100 * MIB, 1000 * MIB, &intent(300));
        assert_eq!(decision, Decision::Switchover);
        assert!(
            time(sample.remaining, sample.bandwidth) < Duration::from_millis(2),
            "{sample:?}"
        );
    }

    #[test]
    fn a_hot_set_that_fits_is_switched_over_without_endless_polishing() {
        let (decision, sample) = play(64 * MIB, 10_000 * MIB, 1000 * MIB, &intent(300));
        assert_eq!(decision, Decision::Switchover);
        assert!(sample.round <= 1 + POLISHING_ROUNDS_MAX, "{sample:?}");
    }

    #[test]
    fn a_hot_set_that_never_fits_ends_with_figures_and_advice() {
        let (decision, sample) = play(64 * MIB, 10_000 * MIB, 1000 * MIB, &intent(40));
        let Decision::Abort(fault) = decision else {
            panic!("{decision:?}")
        };
        assert_eq!(
            (fault.code, fault.field.as_str()),
            (Code::NoConvergence, "max_downtime_ms")
        );
        assert!(fault.message.contains("64.0 MiB stay dirty"), "{fault}");
        assert!(
            fault.message.contains("40 ms are allowed: allow 110 ms"),
            "{fault}"
        );
        assert!(sample.elapsed >= STUCK_FOR && sample.round <= ROUNDS_MAX);
        let (decision, _) = play(64 * MIB, 10_000 * MIB, 1000 * MIB, &intent(110));
        assert_eq!(decision, Decision::Switchover, "the advice is right");
    }

    #[test]
    fn a_passed_deadline_aborts_unless_the_rest_fits() {
        let with = |ms| Intent {
            deadline: Some(Duration::from_millis(ms)),
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
}
