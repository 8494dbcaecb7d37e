//! How fast the link is, measured by what whole rounds took. Time comes in; no clock is read here.
//!
//! Content is what the guest has, not what is left of it on the wire: that is what a round has to carry. Of what encoding saves a quarter is
//! not counted on ([`crate::source::Sent`]).
//!
//! A round counts from its first byte until the target's acknowledgement, reading and scanning included, since the last
//! pages will take all of that too. So no socket's buffer can make a short round look fast; its round trip makes it look
//! slow, which errs to the safe side. Below `SAMPLE_BYTES_MIN` it would be nothing but round trip, and is left out.

use std::collections::VecDeque;
use std::time::Duration;

use crate::bandwidth::rate;

/// A round with fewer content bytes says more about the round trip than about the link.
const SAMPLE_BYTES_MIN: u64 = 1 << 20;
/// So many rounds are remembered: a link that became faster or slower counts as such soon.
const ROUNDS_KEPT: usize = 4;
/// Taken for the bandwidth while no round had enough content to measure it (an idle guest whose memory is zero), bytes/s.
const ASSUMED: u64 = 100 << 20;

/// The measured bandwidth: that of the last round or that of the last few together, whichever is lower. One lucky
/// round does not raise it, and one that shows a slower link lowers it at once.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    rounds: VecDeque<(u64, Duration)>,
}

impl Meter {
    /// A round carried `bytes` of content in `took`.
    pub fn round(&mut self, bytes: u64, took: Duration) {
        if bytes < SAMPLE_BYTES_MIN {
            return;
        }
        if self.rounds.len() == ROUNDS_KEPT {
            self.rounds.pop_front();
        }
        self.rounds.push_back((bytes, took));
    }

    /// Bytes a second as measured, if they were.
    pub fn measured(&self) -> Option<u64> {
        let &(bytes, took) = self.rounds.back()?;
        let (all_bytes, all_took) = self
            .rounds
            .iter()
            .fold((0_u64, Duration::ZERO), |(bytes, took), (more, longer)| {
                (bytes.saturating_add(*more), took.saturating_add(*longer))
            });
        Some(rate(bytes, took).min(rate(all_bytes, all_took)))
    }

    /// Bytes a second to reckon with, never 0. `cap`: the rate that may be used.
    pub fn estimate(&self, cap: Option<u64>) -> u64 {
        self.measured()
            .unwrap_or(ASSUMED)
            .min(cap.unwrap_or(u64::MAX))
            .max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn small_rounds_leave_the_estimate_alone() {
        let mut meter = Meter::default();
        assert_eq!(meter.estimate(None), ASSUMED);
        meter.round(500 * MIB, Duration::from_secs(1));
        meter.round(4096, Duration::from_nanos(10));
        assert_eq!(meter.estimate(None), 500 * MIB);
        assert_eq!(meter.estimate(Some(20 * MIB)), 20 * MIB);
    }

    #[test]
    fn a_lucky_round_does_not_raise_the_estimate_and_a_slow_one_lowers_it() {
        let mut meter = Meter::default();
        meter.round(1000 * MIB, Duration::from_secs(10));
        meter.round(2 * MIB, Duration::from_millis(1));
        assert!(meter.estimate(None) < 101 * MIB, "{}", meter.estimate(None));
        meter.round(10 * MIB, Duration::from_secs(1));
        assert_eq!(meter.estimate(None), 10 * MIB);
    }

    #[test]
    fn what_was_long_ago_is_forgotten() {
        let mut meter = Meter::default();
        meter.round(1000 * MIB, Duration::from_secs(100));
        for _ in 0..ROUNDS_KEPT {
            meter.round(100 * MIB, Duration::from_secs(1));
        }
        assert_eq!(meter.estimate(None), 100 * MIB);
    }
}
