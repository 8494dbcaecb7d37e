//! The guest's time across a move: TSC and kvmclock advance by the real length of the blackout. Pure functions.
//!
//! The only clock that two hosts share is real time, so the blackout's length is the difference of two readings of it. Where
//! KVM ties its clock to real time and the TSC in one reading (`KVM_CLOCK_REALTIME`, `KVM_CLOCK_HOST_TSC`), the TSC follows the
//! algorithm of Linux, Documentation/virt/kvm/devices/vcpu.rst, 4.1 `KVM_VCPU_TSC_OFFSET`; otherwise the
//! saved TSC is set forward by the elapsed time.
//!
//! Host clocks can be wrong. A blackout that seems negative or absurdly long is clamped, since a
//! guest whose time jumps back, or a day ahead, is worse off than one that lost some milliseconds.

use crate::time::NS_PER_S;

/// A longer blackout is not believed: the deadlines of a migration are far shorter.
pub const BLACKOUT_NS_MAX: u64 = 3600 * NS_PER_S;

/// The same of a snapshot, which may lie for long: ten years.
pub const SNAPSHOT_AGE_NS_MAX: u64 = 10 * 365 * 24 * BLACKOUT_NS_MAX;

/// How much time passed for the guest while it was away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elapsed {
    /// The difference of the two hosts' clocks.
    Measured(u64),
    /// The clocks contradict each other; this is what the guest is given.
    Clamped(u64),
}

impl Elapsed {
    /// Nanoseconds to advance the guest's clocks by.
    pub fn ns(self) -> u64 {
        match self {
            Self::Measured(ns) | Self::Clamped(ns) => ns,
        }
    }
}

/// The blackout between two readings of real time, nanoseconds; one longer than `longest_ns` is not believed.
pub fn elapsed(saved_realtime_ns: u64, now_realtime_ns: u64, longest_ns: u64) -> Elapsed {
    match now_realtime_ns.checked_sub(saved_realtime_ns) {
        Some(ns) if ns <= longest_ns => Elapsed::Measured(ns),
        _ => Elapsed::Clamped(0),
    }
}

/// TSC ticks in `ns` at `khz`.
pub fn ticks(ns: u64, khz: u64) -> u64 {
    let ticks = u128::from(ns) * u128::from(khz) / 1_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// One instant on a host, as KVM reads it: its kvmclock and the host's TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instant {
    /// The guest's kvmclock, nanoseconds.
    pub kvmclock_ns: u64,
    /// The host's TSC.
    pub host_tsc: u64,
}

/// The TSC offset on the target that keeps guest TSC and kvmclock in step: both hosts' instants name the same
/// guest clock, so the guest TSC at the target's instant must be the one at the source's plus the guest time between them.
pub fn target_tsc_offset(source_offset: i64, source: Instant, target: Instant, khz: u64) -> i64 {
    let (guest_ns, ahead) = match target.kvmclock_ns.checked_sub(source.kvmclock_ns) {
        Some(ns) => (ns, true),
        None => (source.kvmclock_ns - target.kvmclock_ns, false),
    };
    let guest_ticks = ticks(guest_ns, khz);
    let base = source_offset.wrapping_add(source.host_tsc.wrapping_sub(target.host_tsc).cast_signed());
    if ahead {
        base.wrapping_add(guest_ticks.cast_signed())
    } else {
        base.wrapping_sub(guest_ticks.cast_signed())
    }
}

/// The value for the TSC's MSR where offsets cannot be set.
pub fn target_tsc(saved_tsc: u64, elapsed_ns: u64, khz: u64) -> u64 {
    saved_tsc.wrapping_add(ticks(elapsed_ns, khz))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_clock_that_went_back_or_leapt_is_not_believed() {
        let elapsed = |saved, now| super::elapsed(saved, now, BLACKOUT_NS_MAX);
        assert_eq!(elapsed(1_000, 5_000), Elapsed::Measured(4_000));
        assert_eq!(elapsed(5_000, 1_000), Elapsed::Clamped(0));
        assert_eq!(elapsed(0, BLACKOUT_NS_MAX), Elapsed::Measured(BLACKOUT_NS_MAX));
        assert_eq!(elapsed(0, BLACKOUT_NS_MAX + 1), Elapsed::Clamped(0));
    }

    #[test]
    fn ticks_follow_the_rate_without_overflow() {
        assert_eq!(ticks(NS_PER_S, 2_500_000), 2_500_000_000);
        assert_eq!(ticks(1, 999_999), 0);
        assert_eq!(ticks(u64::MAX, u64::MAX), u64::MAX);
    }

    proptest! {
        #[test]
        fn the_guest_tsc_advances_by_the_guest_time_between_the_instants(
            offset in any::<i64>(),
            source_tsc in any::<u64>(),
            target_tsc in any::<u64>(),
            start_ns in 0u64..1 << 60,
            blackout_ns in 0u64..BLACKOUT_NS_MAX,
            khz in 1_000u64..6_000_000,
        ) {
            let source = Instant { kvmclock_ns: start_ns, host_tsc: source_tsc };
            let target = Instant { kvmclock_ns: start_ns + blackout_ns, host_tsc: target_tsc };
            let new = target_tsc_offset(offset, source, target, khz);
            let before = source_tsc.wrapping_add_signed(offset);
            let after = target_tsc.wrapping_add_signed(new);
            prop_assert_eq!(after.wrapping_sub(before), ticks(blackout_ns, khz));
        }

        #[test]
        fn a_guest_clock_behind_sets_the_tsc_back_as_far(
            behind_ns in 1u64..NS_PER_S,
            khz in 1_000u64..6_000_000,
        ) {
            let source = Instant { kvmclock_ns: NS_PER_S, host_tsc: 500 };
            let target = Instant { kvmclock_ns: NS_PER_S - behind_ns, host_tsc: 500 };
            let want = -ticks(behind_ns, khz).cast_signed();
            prop_assert_eq!(target_tsc_offset(0, source, target, khz), want);
        }
    }
}
