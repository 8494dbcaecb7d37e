//! The clock of leases: `CLOCK_BOOTTIME` counts on while the host sleeps and is never set (clock_gettime(2)).

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds since the kernel booted.
pub fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every kernel that has KVM has CLOCK_BOOTTIME");
    let part = |value: i64| u64::try_from(value).expect("the clock counts up from 0");
    part(now.tv_sec()) * 1_000_000_000 + part(now.tv_nsec())
}
