//! Rates, and how fast a link may be used. How fast it is: [`crate::meter`]. Time comes in; no clock is read here.

use std::time::Duration;

/// Work that a link may have done at once after a pause, as time at its full rate.
const BURST: Duration = Duration::from_millis(50);

/// `bytes` in `time`, as bytes a second.
pub fn rate(bytes: u64, time: Duration) -> u64 {
    let nanos = time.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

/// The time that `bytes` take at `rate` bytes a second.
pub fn time(bytes: u64, rate: u64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// A cap on the rate, as a token bucket in its "virtual scheduling" form (ITU-T I.371, annex A): instead of tokens it
/// keeps the instant at which the link would be idle if it had sent at exactly the rate.
#[derive(Clone, Debug)]
pub struct Cap {
    rate: u64,
    idle_at: Duration,
}

impl Cap {
    /// A cap of `rate` bytes a second.
    pub fn new(rate: u64) -> Self {
        Self {
            rate: rate.max(1),
            idle_at: Duration::ZERO,
        }
    }

    /// Accounts for `bytes` to be sent, and says how long to wait before they are. `now` never goes back.
    pub fn wait(&mut self, now: Duration, bytes: u64) -> Duration {
        let start = self.idle_at.max(now.saturating_sub(BURST));
        self.idle_at = start + time(bytes, self.rate);
        start.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_capped_link_carries_the_cap_and_no_more() {
        let mut cap = Cap::new(10 * MIB);
        let mut now = Duration::from_secs(5);
        for _ in 0..100 {
            now += cap.wait(now, MIB);
        }
        let took = now - Duration::from_secs(5);
        assert!(
            took <= Duration::from_secs(10) && took >= Duration::from_millis(9800),
            "{took:?}"
        );
    }

    #[test]
    fn an_idle_link_saves_up_no_more_than_the_burst() {
        let mut cap = Cap::new(10 * MIB);
        let now = Duration::from_secs(3600);
        let waits: Duration = (0..20).map(|_| cap.wait(now, MIB)).max().unwrap();
        assert_eq!(waits, Duration::from_millis(1900) - BURST);
    }

    #[test]
    fn rates_and_times_do_not_overflow() {
        assert_eq!(rate(u64::MAX, Duration::ZERO), u64::MAX);
        assert_eq!(time(u64::MAX, 0), Duration::from_nanos(u64::MAX));
        assert_eq!(rate(MIB, Duration::from_millis(500)), 2 * MIB);
        assert_eq!(time(MIB, 2 * MIB), Duration::from_millis(500));
    }
}
