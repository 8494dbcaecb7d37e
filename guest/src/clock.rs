//! Arithmetic on the time-stamp counter.
//!
//! kvmclock's page is described in the kernel's `Documentation/virt/kvm/x86/msr.rst` under MSR_KVM_SYSTEM_TIME_NEW.

/// What a kvmclock page says, read while its version was even and unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmClock {
    /// The counter when `system_time_ns` was true.
    pub tsc_timestamp: u64,
    /// Nanoseconds of guest time at that moment.
    pub system_time_ns: u64,
    /// 32.32 factor from shifted counter ticks to nanoseconds.
    pub multiplier: u32,
    /// Left (or, when negative, right) shift of the ticks before that.
    pub shift: i8,
}

impl KvmClock {
    /// Guest time at counter value `tsc`, nanoseconds.
    #[must_use]
    pub fn nanoseconds(&self, tsc: u64) -> u64 {
        let ticks = tsc.wrapping_sub(self.tsc_timestamp);
        let scaled = u128::from(shift(ticks, self.shift)) * u128::from(self.multiplier);
        self.system_time_ns
            .wrapping_add(u64::try_from(scaled >> 32).unwrap_or(u64::MAX))
    }

    /// The counter's frequency by this page, kHz; 0 when the page was never filled.
    #[must_use]
    pub fn tsc_khz(&self) -> u64 {
        if self.multiplier == 0 {
            return 0;
        }
        shift((1_000_000 << 32) / u64::from(self.multiplier), -self.shift)
    }
}

fn shift(value: u64, by: i8) -> u64 {
    let amount = u32::from(by.unsigned_abs());
    let shifted = if by >= 0 {
        value.checked_shl(amount)
    } else {
        value.checked_shr(amount)
    };
    shifted.unwrap_or(0)
}

/// Counter ticks as microseconds.
#[must_use]
pub fn microseconds(ticks: u64, tsc_khz: u64) -> u64 {
    let khz = tsc_khz.max(1);
    (ticks / khz)
        .saturating_mul(1000)
        .saturating_add((ticks % khz) * 1000 / khz)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2.5 GHz: ticks are halved, then multiplied by 0.8.
    const PAGE: KvmClock = KvmClock {
        tsc_timestamp: 1_000_000,
        system_time_ns: 5_000,
        multiplier: 3_435_973_836,
        shift: -1,
    };

    #[test]
    fn time_follows_the_counter_at_the_pages_frequency() {
        assert_eq!(PAGE.nanoseconds(1_000_000), 5_000);
        let a_second_later = PAGE.nanoseconds(1_000_000 + 2_500_000_000);
        assert!(
            (1_000_004_998..=1_000_005_000).contains(&a_second_later),
            "{a_second_later}"
        );
    }

    #[test]
    fn the_frequency_is_read_back_from_the_page() {
        let khz = PAGE.tsc_khz();
        assert!((2_499_999..=2_500_001).contains(&khz), "{khz}");
        assert_eq!(
            KvmClock {
                multiplier: 0,
                ..PAGE
            }
            .tsc_khz(),
            0
        );
    }

    #[test]
    fn microseconds_neither_overflow_nor_divide_by_zero() {
        assert_eq!(microseconds(2_500_000, 2_500_000), 1000);
        assert_eq!(microseconds(2_499, 2_500_000), 0);
        assert_eq!(microseconds(u64::MAX, 1), u64::MAX);
        assert_eq!(microseconds(5, 0), 5000);
    }
}
