//! What a migration would be like, before it is one: the rounds, played through with the rules of [`crate::convergence`].
//!
//! ```text
//!  the running guest, watched      W(t) = bytes of distinct pages that it writes within t, measured for a few t
//!  round 1                         carries what is populated, takes t1 = populated / B + R
//!  round k                         carries D = W(t) of the round before it; held back by p, W((1 - p) t)
//!  after each round                decide() of the sample that the source would have: on, throttle, switchover, abort
//! ```
//!
//! Watching for several lengths of time, not for one, is what tells a guest that rewrites the same 64 MiB for ever from one
//! that walks through its memory: the first has the same `W` for every `t` beyond some point, the second's goes on
//! rising (the writable working set of Clark et al., NSDI 2005, section 3). Between the measured points `W` is a straight
//! line, beyond the last one it goes on as the last line does, up to all that can be written.
//!
//! Nothing of the rules is here: this file only makes the samples. What it cannot know is assumed and said: the link's
//! speed and round trip, that the guest goes on as it was watched, that pages travel whole and none that is populated is zero.

use std::cmp::Reverse;
use std::time::Duration;

use drover_proto::{Fault, v1};

use crate::bandwidth::{rate, time};
use crate::convergence::{self, Costs, Decision, Intent, ROUNDS_MAX, Sample, THROTTLE_MAX, Trend};
use crate::meter::Meter;
use crate::vm::PAGE_SIZE;

/// Taken for the bandwidth of a link that no migration has measured, bytes a second: that of 1 Gbit/s Ethernet, less what
/// its frames cost.
pub const BANDWIDTH_DEFAULT: u64 = 110 << 20;
/// Taken for the link's round trip, which nobody measures before there is a link.
const ROUND_TRIP: Duration = Duration::from_micros(500);
/// The longest blackout that is looked at for one that would do: what a migration may ask for at most.
const MAX_DOWNTIME_MOST: Duration = Duration::from_secs(600);
/// The fastest link that is looked at for one that would do, MiB a second.
const BANDWIDTH_MOST_MIB: u64 = 100 << 10;
/// Bytes of a page.
const PAGE: u64 = PAGE_SIZE as u64;
/// Suggested blackouts are full so many milliseconds.
const SUGGESTION_STEP_MS: u64 = 10;

/// How much a guest wrote while it was watched for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// How long it was watched.
    pub length: Duration,
    /// Bytes of the distinct pages that it wrote meanwhile.
    pub bytes: u64,
}

/// What a guest writes in any length of time, by what it was seen to write in some.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Writes {
    /// Rising in both.
    windows: Vec<Window>,
    most: u64,
}

impl Writes {
    /// By windows that all began together, in any order; `most` is all that it can write, bytes.
    pub fn new(windows: &[Window], most: u64) -> Self {
        let mut windows: Vec<Window> = windows
            .iter()
            .copied()
            .filter(|window| !window.length.is_zero())
            .collect();
        windows.sort_by_key(|window| (window.length, Reverse(window.bytes)));
        windows.dedup_by_key(|window| window.length);
        let mut seen = 0;
        for window in &mut windows {
            seen = window.bytes.min(most).max(seen);
            window.bytes = seen;
        }
        Self { windows, most }
    }

    /// The measured points.
    pub fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// Bytes of distinct pages within `length`.
    pub fn within(&self, length: Duration) -> u64 {
        let after = self.windows.partition_point(|window| window.length < length);
        let origin = Window {
            length: Duration::ZERO,
            bytes: 0,
        };
        // The line through the two points around, or through the last two.
        let right = after.min(self.windows.len().saturating_sub(1));
        let Some(right_point) = self.windows.get(right) else {
            return 0;
        };
        let left = right
            .checked_sub(1)
            .and_then(|left| self.windows.get(left))
            .unwrap_or(&origin);
        let run = (right_point.length - left.length).as_nanos().max(1);
        let rise = u128::from(right_point.bytes - left.bytes);
        let along = length.saturating_sub(left.length).as_nanos();
        let bytes = u128::from(left.bytes).saturating_add(rise.saturating_mul(along) / run);
        u64::try_from(bytes).unwrap_or(u64::MAX).min(self.most)
    }
}

/// What is known of a VM and of its way before a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The guest's memory, bytes.
    pub memory: u64,
    /// What of it is not a hole, bytes.
    pub populated: u64,
    /// What the guest writes.
    pub writes: Writes,
    /// What the link is thought to carry, bytes a second.
    pub bandwidth: u64,
    /// What the switchover costs beside the pages.
    pub costs: Costs,
}

/// How a migration would go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Course {
    /// What it would be given up with, if it would be.
    pub ended: Result<(), Fault>,
    /// From the connect until the guest runs at the target, or until the attempt is given up.
    pub total: Duration,
    /// When the switchover was allowed first: rounds after it only make the blackout shorter.
    pub allowed_at: Option<Duration>,
    /// Bytes of pages and state on the wire.
    pub bytes: u64,
    /// Rounds over the dirty pages, the last pass included.
    pub rounds: u32,
    /// How long the guest would stand still; of an attempt that is given up, if it were paused then.
    pub blackout: Duration,
    /// Most that each vCPU would be held back, percent.
    pub throttle: u32,
    /// It converges only by post-copy: how long the guest would run at the target before all its pages are there.
    pub post_copy: Option<Duration>,
}

/// What would make a migration possible that would be given up, each by itself. `None`: nothing that can be had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Remedies {
    /// So long a blackout.
    pub max_downtime: Option<Duration>,
    /// So fast a link, without a cap below it, bytes a second.
    pub bandwidth: Option<u64>,
    /// To hold the vCPUs back so much, percent.
    pub throttle: Option<u32>,
}

/// A migration between two rounds.
struct Rehearsal<'a> {
    facts: &'a Facts,
    intent: &'a Intent,
    link: u64,
    meter: Meter,
    elapsed: Duration,
    allowed_at: Option<Duration>,
    bytes: u64,
    round: u32,
    polished: u32,
    throttle: u32,
    trend: Trend,
}

/// Plays the migration through. At most [`ROUNDS_MAX`] rounds, whatever the facts.
pub fn rehearse(facts: &Facts, intent: &Intent) -> Course {
    let mut rehearsal = Rehearsal {
        facts,
        intent,
        link: facts.bandwidth.min(intent.bandwidth.unwrap_or(u64::MAX)).max(1),
        meter: Meter::default(),
        elapsed: ROUND_TRIP,
        allowed_at: None,
        bytes: 0,
        round: 0,
        polished: 0,
        throttle: 0,
        trend: Trend::default(),
    };
    if let Some(fault) = convergence::hopeless(&facts.costs, intent) {
        let sample = rehearsal.sample(0, 0, ROUND_TRIP);
        return rehearsal.course(Err(fault), &sample);
    }
    // What travels as runs of zeroes takes no time worth counting.
    let (mut carried, mut content) = (facts.memory, facts.populated.min(facts.memory));
    loop {
        let took = rehearsal.send(content);
        let running = took.saturating_mul(100 - rehearsal.throttle) / 100;
        // Whole pages, as the source counts them: at the edge of a rule a part of one would decide.
        let dirty = facts.writes.within(running) / PAGE * PAGE;
        let sample = rehearsal.sample(carried, dirty, took);
        if let Some(fault) = convergence::past_deadline(rehearsal.elapsed, intent) {
            let unsent = rehearsal.cut_at_deadline();
            if intent.post_copy {
                return rehearsal.by_post_copy(&sample, sample.remaining.saturating_add(unsent));
            }
            return rehearsal.course(Err(fault), &sample);
        }
        rehearsal.trend = rehearsal.trend.after(&sample);
        let fits = convergence::fits(&sample, intent);
        if fits {
            rehearsal.allowed_at.get_or_insert(rehearsal.elapsed);
        }
        match convergence::decide(&sample, &rehearsal.trend, intent) {
            Decision::NextRound => rehearsal.polished += u32::from(fits),
            Decision::Throttle(percent) => {
                rehearsal.throttle = percent.min(THROTTLE_MAX);
                rehearsal.trend = Trend::default();
            }
            Decision::Abort(fault) => return rehearsal.course(Err(fault), &sample),
            Decision::PostCopy => return rehearsal.by_post_copy(&sample, sample.remaining),
            Decision::Switchover => return rehearsal.course(Ok(()), &sample),
        }
        debug_assert!(rehearsal.round < ROUNDS_MAX, "the rules end an attempt by then");
        (carried, content) = (dirty, dirty);
    }
}

impl Rehearsal<'_> {
    /// A round with so much content; how long it takes.
    fn send(&mut self, content: u64) -> Duration {
        let took = time(content, self.link).saturating_add(ROUND_TRIP);
        self.meter.round(content, took);
        self.round += 1;
        self.elapsed = self.elapsed.saturating_add(took);
        self.bytes = self.bytes.saturating_add(content);
        took
    }

    /// What the source would have measured.
    fn sample(&self, carried: u64, dirty: u64, took: Duration) -> Sample {
        Sample {
            round: self.round,
            elapsed: self.elapsed,
            carried,
            remaining: dirty,
            dirty_rate: rate(dirty, took),
            bandwidth: self.meter.estimate(self.intent.bandwidth),
            round_trip: ROUND_TRIP,
            costs: self.facts.costs,
            polished: self.polished,
            throttle: self.throttle,
        }
    }

    /// The deadline passed in the middle of the round: what came after it is not sent. Gives how many bytes that is.
    fn cut_at_deadline(&mut self) -> u64 {
        let deadline = self.intent.deadline.unwrap_or_default();
        let over = self.elapsed.saturating_sub(deadline).as_nanos();
        let unsent = u128::from(self.link).saturating_mul(over) / 1_000_000_000;
        let unsent = u64::try_from(unsent).unwrap_or(u64::MAX).min(self.bytes);
        self.bytes -= unsent;
        self.elapsed = self.elapsed.min(deadline);
        unsent
    }

    /// The guest runs at the target before it has the last `remaining` bytes.
    fn by_post_copy(&self, sample: &Sample, remaining: u64) -> Course {
        let paused = Sample {
            remaining: 0,
            ..*sample
        };
        let remaining = remaining.min(self.facts.memory);
        let phase = time(remaining, self.link);
        let course = self.course(Ok(()), &paused);
        Course {
            total: course.total.saturating_add(phase),
            bytes: course.bytes.saturating_add(remaining),
            post_copy: Some(phase),
            ..course
        }
    }

    fn course(&self, ended: Result<(), Fault>, sample: &Sample) -> Course {
        let blackout = convergence::expected_blackout(sample, self.intent);
        let mut course = Course {
            ended,
            total: self.elapsed,
            allowed_at: self.allowed_at,
            bytes: self.bytes,
            rounds: self.round,
            blackout,
            throttle: self.throttle,
            post_copy: None,
        };
        if course.ended.is_ok() {
            course.total = course.total.saturating_add(blackout);
            course.bytes = course
                .bytes
                .saturating_add(sample.remaining)
                .saturating_add(self.facts.costs.state_bytes);
            course.rounds += 1;
        }
        course
    }
}

/// The least of `low..=high` for which `works`, if it does for `high`. Where it does for one and not for some above it, one
/// for which it does.
fn least(mut low: u64, mut high: u64, works: impl Fn(u64) -> bool) -> Option<u64> {
    if low > high || !works(high) {
        return None;
    }
    while low < high {
        let middle = low + (high - low) / 2;
        if works(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Some(high)
}

/// What would do for a migration that would be given up; nothing for one that would not.
pub fn remedies(facts: &Facts, intent: &Intent) -> Remedies {
    let converges = |facts: &Facts, intent: &Intent| rehearse(facts, intent).ended.is_ok();
    if converges(facts, intent) {
        return Remedies::default();
    }
    let allowed = |steps: u64| Intent {
        max_downtime: Duration::from_millis(steps * SUGGESTION_STEP_MS),
        ..*intent
    };
    let steps = |length: Duration| u64::try_from(length.as_millis()).unwrap_or(u64::MAX) / SUGGESTION_STEP_MS;
    let linked = |mib: u64| Facts {
        bandwidth: mib << 20,
        ..facts.clone()
    };
    let uncapped = Intent {
        bandwidth: None,
        ..*intent
    };
    let held_back = |percent: u64| Intent {
        max_throttle: u32::try_from(percent).unwrap_or(THROTTLE_MAX),
        ..*intent
    };
    Remedies {
        max_downtime: least(
            steps(intent.max_downtime) + 1,
            steps(MAX_DOWNTIME_MOST),
            |steps| converges(facts, &allowed(steps)),
        )
        .map(|steps| allowed(steps).max_downtime),
        bandwidth: least(1, BANDWIDTH_MOST_MIB, |mib| converges(&linked(mib), &uncapped))
            .map(|mib| mib << 20),
        throttle: least(
            u64::from(intent.max_throttle) + 1,
            u64::from(THROTTLE_MAX),
            |percent| converges(facts, &held_back(percent)),
        )
        .map(|percent| held_back(percent).max_throttle),
    }
}

/// All of it as it is told: what was found, what is assumed, how it would go, and what would do if it would not.
pub fn forecast(facts: &Facts, intent: &Intent) -> v1::Forecast {
    let course = rehearse(facts, intent);
    let remedies = remedies(facts, intent);
    let windows = facts.writes.windows();
    let micros = |length: Duration| u64::try_from(length.as_micros()).unwrap_or(u64::MAX);
    let millis = |length: Duration| u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
    let millis32 = |length: Duration| u32::try_from(length.as_millis()).unwrap_or(u32::MAX);
    v1::Forecast {
        memory_bytes: facts.memory,
        populated_bytes: facts.populated,
        dirty_bytes_per_s: windows
            .first()
            .map_or(0, |window| rate(window.bytes, window.length)),
        working_set_bytes: windows.last().map_or(0, |window| window.bytes),
        windows: windows
            .iter()
            .map(|window| v1::DirtyWindow {
                us: micros(window.length),
                bytes: window.bytes,
            })
            .collect(),
        bandwidth_bytes_per_s: facts.bandwidth.min(intent.bandwidth.unwrap_or(u64::MAX)),
        max_downtime_ms: millis32(intent.max_downtime),
        converges: course.ended.is_ok(),
        reason: course.ended.err().map(v1::Reason::from),
        total_ms: millis(course.total),
        bytes: course.bytes,
        rounds: course.rounds,
        blackout_us: micros(course.blackout),
        throttle_percent: course.throttle,
        max_downtime_ms_needed: remedies.max_downtime.map_or(0, millis32),
        bandwidth_bytes_per_s_needed: remedies.bandwidth.unwrap_or(0),
        throttle_percent_needed: remedies.throttle.unwrap_or(0),
        bandwidth_source: String::new(),
        made_ms: 0,
        post_copy: course.post_copy.is_some(),
        post_copy_ms: course.post_copy.map_or(0, millis),
    }
}

#[cfg(test)]
mod tests {
    use drover_proto::Code;
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A guest of 1 GiB that writes `rate` MiB a second into `hot` MiB, seen for a second, on a link of 500 MiB a second.
    fn hot(hot: u64, per_s: u64) -> Facts {
        let windows = [30, 100, 400, 1000].map(|length| Window {
            length: ms(length),
            bytes: (per_s * MIB * length / 1000).min(hot * MIB),
        });
        Facts {
            memory: 1024 * MIB,
            populated: 1024 * MIB,
            writes: Writes::new(&windows, 1024 * MIB),
            bandwidth: 500 * MIB,
            costs: Costs::default(),
        }
    }

    #[test]
    fn what_is_written_lies_on_the_lines_between_the_measured_points() {
        let point = |length, bytes| Window {
            length: ms(length),
            bytes,
        };
        let writes = Writes::new(&[point(400, 100), point(100, 80), point(0, 7)], 150);
        for (length, bytes) in [(0, 0), (50, 40), (100, 80), (250, 90), (400, 100), (1000, 140)] {
            assert_eq!(writes.within(ms(length)), bytes, "within {length} ms");
        }
        assert_eq!(writes.within(Duration::MAX), 150, "never more than the memory");
        assert_eq!(Writes::default().within(ms(1)), 0);
        assert_eq!(
            Writes::new(&[point(5, 200), point(9, 10)], 150).within(ms(9)),
            150
        );
    }

    #[test]
    fn an_idle_guest_takes_one_round_and_a_blackout_that_is_all_overhead() {
        let facts = hot(0, 0);
        let course = rehearse(&facts, &Intent::default());
        assert_eq!((course.ended, course.rounds, course.throttle), (Ok(()), 2, 0));
        assert_eq!(course.bytes, 1024 * MIB + facts.costs.state_bytes);
        let copy = time(1024 * MIB, facts.bandwidth);
        assert!(
            course.total > copy && course.total < copy + ms(40),
            "{:?}",
            course.total
        );
        let half = Facts {
            populated: 512 * MIB,
            ..facts
        };
        assert!(
            rehearse(&half, &Intent::default()).total < copy,
            "what is a hole is not copied"
        );
    }

    #[test]
    fn a_hot_set_that_is_too_large_is_refused_with_what_would_do() {
        let facts = hot(64, 3000);
        let intent = Intent::default();
        let course = rehearse(&facts, &intent);
        assert_eq!(course.ended.unwrap_err().code, Code::NoConvergence);
        let remedies = remedies(&facts, &intent);
        let needed = remedies.max_downtime.unwrap();
        assert!(needed > ms(128) && needed < ms(250), "{needed:?}");
        let link = remedies.bandwidth.unwrap();
        assert!(link > 600 * MIB && link < 1200 * MIB, "{}", link / MIB);
        let percent = remedies.throttle.unwrap();
        assert!((20..=99).contains(&percent), "{percent}");
    }

    #[test]
    fn a_throttle_that_is_allowed_is_used_and_told() {
        let facts = hot(256, 3000);
        let intent = Intent {
            max_throttle: 99,
            ..Intent::default()
        };
        let course = rehearse(&facts, &intent);
        assert_eq!(course.ended, Ok(()));
        assert!(course.throttle >= 20 && course.blackout <= intent.max_downtime);
        assert_eq!(remedies(&facts, &intent), Remedies::default());
    }

    #[test]
    fn a_deadline_ends_it_in_the_middle_of_a_round() {
        let intent = Intent {
            deadline: Some(ms(1000)),
            ..Intent::default()
        };
        let course = rehearse(&hot(0, 0), &intent);
        assert_eq!(course.ended.unwrap_err().code, Code::DeadlineExceeded);
        assert_eq!((course.total, course.rounds), (ms(1000), 1));
        assert!(
            course.bytes > 490 * MIB && course.bytes <= 500 * MIB,
            "{}",
            course.bytes / MIB
        );
        let link = remedies(&hot(0, 0), &intent).bandwidth.unwrap();
        assert!(link > 1024 * MIB && link < 1200 * MIB, "{}", link / MIB);
    }

    prop_compose! {
        fn any_facts()(
            memory in any::<u64>(),
            populated in any::<u64>(),
            windows in proptest::collection::vec((any::<u32>(), any::<u64>()), 0..6),
            bandwidth in any::<u64>(),
            costs in (0u64..1_000_000, 0u64..1_000_000, any::<u64>(), 0u64..1_000_000),
        ) -> Facts {
            let windows: Vec<_> = windows
                .into_iter()
                .map(|(us, bytes)| Window { length: Duration::from_micros(us.into()), bytes })
                .collect();
            Facts {
                memory,
                populated,
                writes: Writes::new(&windows, memory),
                bandwidth,
                costs: Costs {
                    pause: Duration::from_micros(costs.0),
                    state: Duration::from_micros(costs.1),
                    state_bytes: costs.2,
                    commit: Duration::from_micros(costs.3),
                },
            }
        }
    }

    prop_compose! {
        fn any_intent()(
            max_downtime in 0u64..700_000,
            deadline in proptest::option::of(0u64..1_000_000),
            bandwidth in proptest::option::of(1..u64::MAX),
            max_throttle in 0u32..=99,
        ) -> Intent {
            Intent { max_downtime: ms(max_downtime), deadline: deadline.map(ms), bandwidth, max_throttle, post_copy: false }
        }
    }

    proptest! {
        #[test]
        fn whatever_the_facts_it_ends_and_keeps_every_promise(facts in any_facts(), intent in any_intent()) {
            let told = forecast(&facts, &intent);
            prop_assert!(told.rounds <= ROUNDS_MAX + 1);
            prop_assert_eq!(told.converges, told.reason.is_none());
            prop_assert!(told.throttle_percent <= intent.max_throttle);
            if told.converges {
                prop_assert!(Duration::from_micros(told.blackout_us) <= intent.max_downtime);
            }
        }

        #[test]
        fn what_is_said_to_do_does(facts in any_facts(), intent in any_intent()) {
            let remedies = remedies(&facts, &intent);
            if let Some(max_downtime) = remedies.max_downtime {
                prop_assert!(max_downtime > intent.max_downtime);
                prop_assert_eq!(rehearse(&facts, &Intent { max_downtime, ..intent }).ended, Ok(()));
            }
            if let Some(bandwidth) = remedies.bandwidth {
                let facts = Facts { bandwidth, ..facts.clone() };
                prop_assert_eq!(rehearse(&facts, &Intent { bandwidth: None, ..intent }).ended, Ok(()));
            }
            if let Some(max_throttle) = remedies.throttle {
                prop_assert_eq!(rehearse(&facts, &Intent { max_throttle, ..intent }).ended, Ok(()));
            }
        }

        #[test]
        fn a_guest_that_writes_more_is_never_ready_sooner_nor_with_less_sent(
            bytes in proptest::collection::vec((0u64..512, 0u64..512), 4),
            bandwidth in 20u64..2000,
            max_downtime in 20u64..1000,
        ) {
            // The pages written during the pause are left out: they count by the rate, which falls as a round gets longer.
            let costs = Costs { pause: Duration::ZERO, ..Costs::default() };
            let facts = |more: bool| {
                let windows: Vec<_> = [30, 100, 400, 1000]
                    .into_iter()
                    .zip(&bytes)
                    .map(|(length, (some, extra))| Window {
                        length: ms(length),
                        bytes: (some + if more { *extra } else { 0 }) * MIB,
                    })
                    .collect();
                // One line beyond the last point for both, so that one lies above the other everywhere.
                let mut writes = Writes::new(&windows, 1024 * MIB);
                let last = writes.windows().last().map_or(0, |window| window.bytes);
                writes.windows.push(Window { length: ms(3_600_000), bytes: last });
                Facts { writes, bandwidth: bandwidth * MIB, costs, ..hot(0, 0) }
            };
            let intent = Intent { max_downtime: ms(max_downtime), ..Intent::default() };
            let (less, more) = (rehearse(&facts(false), &intent), rehearse(&facts(true), &intent));
            if let (Some(less), Some(more)) = (less.allowed_at, more.allowed_at) {
                prop_assert!(less <= more, "{less:?} {more:?}");
            }
            if less.ended.is_err() && less.rounds < ROUNDS_MAX {
                // A larger set may shrink for longer before it is given up, and then costs more.
                prop_assert!(more.ended.is_err() || more.total >= less.total);
            }
        }
    }
}
