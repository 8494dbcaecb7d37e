//! The clocks that the VMM reads, each in nanoseconds.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds in a second.
pub const NS_PER_S: u64 = 1_000_000_000;

fn read(clock: ClockId) -> u64 {
    let now = clock_gettime(clock).expect("the kernel has every clock that is read here");
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    seconds * NS_PER_S + u64::try_from(now.tv_nsec()).unwrap_or(0)
}

/// `CLOCK_BOOTTIME`: leases are counted by it. It never steps, and counts while the host is suspended.
pub fn boottime_ns() -> u64 {
    read(ClockId::CLOCK_BOOTTIME)
}

/// `CLOCK_REALTIME`: the one clock that two hosts share, as well as their time service keeps it.
pub fn realtime_ns() -> u64 {
    read(ClockId::CLOCK_REALTIME)
}
