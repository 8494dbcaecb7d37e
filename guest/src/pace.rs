//! How many pages may be written now: a bucket that time fills and writes empty.

/// A pace of so many pages a second, measured in ticks of a clock.
#[derive(Clone, Debug)]
pub struct Pace {
    per_s: u64,
    ticks_per_s: u64,
    burst_ticks: u64,
    last: u64,
    /// Pages times ticks a second, so that nothing is lost to rounding.
    credit: u64,
}

impl Pace {
    /// Starts empty at `now`. After a long stop (a blackout) at most `burst_ms` worth of pages is caught up on.
    #[must_use]
    pub fn new(per_s: u64, ticks_per_s: u64, burst_ms: u64, now: u64) -> Pace {
        let burst_ticks = (ticks_per_s / 1000).max(1) * burst_ms;
        Pace {
            per_s,
            ticks_per_s,
            burst_ticks,
            last: now,
            credit: 0,
        }
    }

    /// Takes at most `want` pages out of what is due at `now`.
    pub fn take(&mut self, now: u64, want: u64) -> u64 {
        let elapsed = now.saturating_sub(self.last).min(self.burst_ticks);
        self.last = now;
        let most = self.per_s.saturating_mul(self.burst_ticks).max(self.ticks_per_s);
        let earned = self.credit.saturating_add(elapsed.saturating_mul(self.per_s));
        self.credit = earned.min(most);
        let pages = (self.credit / self.ticks_per_s).min(want);
        self.credit -= pages * self.ticks_per_s;
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GHZ: u64 = 1_000_000_000;

    #[test]
    fn over_a_second_exactly_the_pace_is_given_however_often_it_is_asked() {
        for step in [1_000, 333_333, 7_000_001] {
            let mut pace = Pace::new(1234, GHZ, 100, 0);
            let mut given = 0;
            let mut now = 0;
            while now < 10 * GHZ {
                now += step;
                given += pace.take(now, u64::MAX);
            }
            assert_eq!(given, 1234 * now / GHZ, "asked every {step} ns");
        }
    }

    #[test]
    fn a_long_stop_is_not_caught_up_on() {
        let mut pace = Pace::new(1000, GHZ, 100, 0);
        assert_eq!(pace.take(60 * GHZ, u64::MAX), 100);
        assert_eq!(pace.take(60 * GHZ, u64::MAX), 0);
    }

    #[test]
    fn a_slow_pace_still_comes_to_its_page() {
        let mut pace = Pace::new(1, GHZ, 100, 0);
        let given: u64 = (1..=30).map(|step| pace.take(step * GHZ / 10, 1)).sum();
        assert_eq!(given, 3);
    }

    #[test]
    fn a_clock_that_goes_back_gives_nothing() {
        let mut pace = Pace::new(1000, GHZ, 100, GHZ);
        assert_eq!(pace.take(0, u64::MAX), 0);
    }

    #[test]
    fn a_pace_of_nothing_never_gives_a_page() {
        assert_eq!(Pace::new(0, GHZ, 100, 0).take(GHZ, 1), 0);
    }
}
