//! When a throttled vCPU runs and when it rests: the schedule alone, without a clock, a timer or a thread.
//!
//! ```text
//!  BOOTTIME   |0 ms               |10                 |20                 |30
//!  at 70 %    |run 3 ms|  rest    |run 3 ms|  rest    |run 3 ms|  rest    |
//! ```
//!
//! A period begins at every multiple of [`PERIOD_NS`] on the host's clock, for all vCPUs alike: they run and rest together,
//! so none spins for a lock whose holder rests. The part that runs counts from the moment at which the thread is back,
//! however late the host wakes it; so a guest that is held back for 99 % still makes progress on a busy host, and no
//! vCPU gets more than its share of a period for each period that begins.
//!
//! Waiting, and being got out of the guest in time, is [`crate::vcpu`]'s part.

/// Length of a period: short enough that a guest's own time-outs do not notice, long enough that entries and exits cost little.
pub const PERIOD_NS: u64 = 10_000_000;
/// Most that a vCPU is held back, percent.
pub const PERCENT_MAX: u32 = 99;

/// What a vCPU is to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Run until then, unless something else ends it; `u64::MAX` where nothing holds it back.
    Run(u64),
    /// Rest until then.
    Rest(u64),
}

/// Where one vCPU stands in its schedule.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// The throttle for which the rest was planned.
    percent: u32,
    runs_until: u64,
}

impl Pace {
    /// What to do at `now`, with `percent` of the time to rest. Times are of one clock, ns.
    pub fn turn(&mut self, percent: u32, now: u64) -> Turn {
        if percent == 0 {
            *self = Self::default();
            return Turn::Run(u64::MAX);
        }
        let run_ns = PERIOD_NS / 100 * u64::from(100 - percent.min(PERCENT_MAX));
        if self.percent != percent {
            // A new throttle begins at once, with what runs of the period that is under way.
            self.percent = percent;
            self.runs_until = now - now % PERIOD_NS + run_ns;
        }
        if now < self.runs_until {
            return Turn::Run(self.runs_until);
        }
        let rests_until = self.runs_until.next_multiple_of(PERIOD_NS);
        if now < rests_until {
            return Turn::Rest(rests_until);
        }
        self.runs_until = now + run_ns;
        Turn::Run(self.runs_until)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn a_vcpu_that_nothing_holds_back_runs_for_ever() {
        let mut pace = Pace::default();
        assert_eq!(pace.turn(0, 17 * MS), Turn::Run(u64::MAX));
        pace.turn(90, 18 * MS);
        assert_eq!(pace.turn(0, 19 * MS), Turn::Run(u64::MAX));
    }

    #[test]
    fn a_vcpu_runs_at_the_beginning_of_each_period_and_rests_for_what_is_asked() {
        let mut pace = Pace::default();
        assert_eq!(pace.turn(70, 101 * MS), Turn::Run(103 * MS));
        assert_eq!(pace.turn(70, 102 * MS), Turn::Run(103 * MS), "kicked in between");
        assert_eq!(pace.turn(70, 103 * MS), Turn::Rest(110 * MS));
        assert_eq!(pace.turn(70, 109 * MS), Turn::Rest(110 * MS), "woken in between");
        assert_eq!(pace.turn(70, 110 * MS), Turn::Run(113 * MS));
        assert_eq!(pace.turn(70, 113 * MS), Turn::Rest(120 * MS));
    }

    #[test]
    fn a_throttle_that_rises_in_the_middle_of_a_period_begins_with_a_rest() {
        let mut pace = Pace::default();
        assert_eq!(pace.turn(20, 101 * MS), Turn::Run(108 * MS));
        assert_eq!(pace.turn(90, 104 * MS), Turn::Rest(110 * MS));
    }

    #[test]
    fn a_vcpu_that_is_woken_late_runs_all_the_same_and_no_longer() {
        let mut pace = Pace::default();
        pace.turn(99, 100 * MS);
        assert_eq!(pace.turn(99, 101 * MS), Turn::Rest(110 * MS));
        assert_eq!(pace.turn(99, 119 * MS), Turn::Run(119 * MS + MS / 10));
        assert_eq!(pace.turn(99, 119 * MS + MS / 10), Turn::Rest(120 * MS));
    }

    proptest! {
        #[test]
        fn no_vcpu_runs_for_more_than_its_share_of_the_periods_it_saw(
            percent in 1_u32..=99,
            late_us in prop::collection::vec(0_u64..15_000, 1..50),
        ) {
            let (mut pace, mut now, mut ran) = (Pace::default(), 1_000_000 * PERIOD_NS, 0);
            let began = now;
            for late in late_us {
                match pace.turn(percent, now) {
                    Turn::Run(until) => {
                        prop_assert!(until > now, "a turn that ends before it begins would be for ever");
                        ran += until - now;
                        now = until;
                    }
                    Turn::Rest(until) => {
                        prop_assert!(until > now && until - now <= PERIOD_NS);
                        now = until + late * 1000;
                    }
                }
            }
            let periods = (now - began).div_ceil(PERIOD_NS);
            prop_assert!(ran <= periods * PERIOD_NS / 100 * u64::from(100 - percent));
        }
    }
}
