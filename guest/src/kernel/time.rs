//! Time: the counter, its frequency, the hypervisor's clock, and the local APIC's timer.
#![allow(
    unsafe_code,
    reason = "time-stamp counter, kvmclock page and timer are read raw"
)]

use core::sync::atomic::Ordering;

use drover_probe::clock::KvmClock;
use drover_probe::report::ClockSource;

use super::machine::{self, lapic};
use super::plan::Plan;

/// KVM's hypervisor leaves and clock register: kernel documentation, `Documentation/virt/kvm/x86/cpuid.rst` and `msr.rst`.
const KVM_SIGNATURE_LEAF: u32 = 0x4000_0000;
const KVM_FEATURES_LEAF: u32 = 0x4000_0001;
const KVM_FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// Tries to read a clock page while the hypervisor writes to it.
const TRIES_MAX: u32 = 1000;

/// The 8254's input, hertz, and how long to measure against it.
const PIT_HZ: u64 = 1_193_182;
const PIT_COUNTS: u64 = PIT_HZ / 25;
const PIT_READS_MAX: u32 = 1_000_000;

/// How the guest tells time.
pub struct Clock {
    /// The counter when the clock was found.
    pub boot: u64,
    /// Its frequency.
    pub tsc_khz: u64,
    /// Where that comes from.
    pub source: ClockSource,
}

impl Clock {
    /// Finds the frequency: from kvmclock, else against the 8254.
    pub fn find() -> Option<Clock> {
        let boot = machine::counter();
        if has_kvmclock() {
            register_kvmclock(0);
            let tsc_khz = read_kvmclock(0).map_or(0, |page| page.tsc_khz());
            if tsc_khz > 0 {
                return Some(Clock {
                    boot,
                    tsc_khz,
                    source: ClockSource::KvmClock,
                });
            }
        }
        measure_by_pit().map(|tsc_khz| Clock {
            boot,
            tsc_khz,
            source: ClockSource::Pit,
        })
    }

    /// Sets up the hypervisor's clock page of a processor, where there is one.
    pub fn register(&self, processor: usize) {
        if self.source == ClockSource::KvmClock && processor > 0 {
            register_kvmclock(processor);
        }
    }

    /// The hypervisor's time on this processor, nanoseconds.
    pub fn nanoseconds(&self, processor: usize) -> Option<u64> {
        if self.source != ClockSource::KvmClock {
            return None;
        }
        read_kvmclock(processor).map(|page| page.nanoseconds(machine::counter()))
    }

    /// Counter ticks in a second.
    pub fn ticks_per_s(&self) -> u64 {
        self.tsc_khz * 1000
    }

    /// Waits, busily.
    pub fn wait_ms(&self, ms: u64) {
        let start = machine::counter();
        while machine::counter().wrapping_sub(start) < ms * self.tsc_khz {
            core::hint::spin_loop();
        }
    }
}

fn has_kvmclock() -> bool {
    let [_, b, c, d] = machine::cpuid(KVM_SIGNATURE_LEAF);
    let is_kvm = [b, c, d] == [0x4b4d_564b, 0x564b_4d56, 0x4d];
    is_kvm && machine::cpuid(KVM_FEATURES_LEAF)[0] & KVM_FEATURE_CLOCKSOURCE2 != 0
}

fn register_kvmclock(processor: usize) {
    let page = machine::area(processor).clock_page.as_ptr().addr() as u64;
    // SAFETY: KVM offers the register, and the page is made of atomics that nobody else writes.
    unsafe { machine::write_msr(KVM_SYSTEM_TIME, page | 1) };
}

fn read_kvmclock(processor: usize) -> Option<KvmClock> {
    let words = &machine::area(processor).clock_page;
    let word = |index: usize| words[index].load(Ordering::Acquire);
    let wide = |index: usize| u64::from(word(index)) | u64::from(word(index + 1)) << 32;
    for _ in 0..TRIES_MAX {
        let version = word(0);
        let page = KvmClock {
            tsc_timestamp: wide(2),
            system_time_ns: wide(4),
            multiplier: word(6),
            shift: word(7).to_le_bytes()[0].cast_signed(),
        };
        if version & 1 == 0 && word(0) == version {
            return Some(page);
        }
        core::hint::spin_loop();
    }
    None
}

/// Counts the counter while the 8254's channel 0 counts down once from 65535 (mode 0, no interrupt reaches us).
fn measure_by_pit() -> Option<u64> {
    machine::port_write(0x43, 0x30);
    machine::port_write(0x40, 0xff);
    machine::port_write(0x40, 0xff);
    let first = read_pit();
    let start = machine::counter();
    for _ in 0..PIT_READS_MAX {
        let passed = first.wrapping_sub(read_pit()) & 0xffff;
        let ticks = machine::counter().wrapping_sub(start);
        if passed >= PIT_COUNTS {
            return Some(ticks * PIT_HZ / (passed * 1000));
        }
    }
    None
}

fn read_pit() -> u64 {
    machine::port_write(0x43, 0x00);
    let low = machine::port_read(0x40);
    u64::from(u16::from_le_bytes([low, machine::port_read(0x40)]))
}

/// The timer's counts a second, undivided, measured against the counter; `None` if it stands still.
pub fn measure_timer(clock: &Clock) -> Option<u64> {
    const ONE_SHOT_MASKED: u32 = 0x1_0000;
    const UNDIVIDED: u32 = 0xb;
    machine::lapic_write(lapic::TIMER_DIVIDE, UNDIVIDED);
    machine::lapic_write(lapic::TIMER, ONE_SHOT_MASKED);
    let start = machine::counter();
    machine::lapic_write(lapic::TIMER_INITIAL, u32::MAX);
    clock.wait_ms(20);
    let counts = u64::from(u32::MAX - machine::lapic_read(lapic::TIMER_CURRENT));
    let ticks = machine::counter().wrapping_sub(start);
    machine::lapic_write(lapic::TIMER_INITIAL, 0);
    (counts > 0).then(|| {
        u64::try_from(u128::from(counts) * u128::from(clock.ticks_per_s()) / u128::from(ticks)).unwrap_or(0)
    })
}

/// Starts the calling processor's ticks.
pub fn start_ticks(plan: &Plan, processor: usize) {
    const PERIODIC: u32 = 0x2_0000;
    const UNDIVIDED: u32 = 0xb;
    const VECTOR: u32 = 0x20;
    let period = (plan.timer_hz / u64::from(plan.params.hz)).clamp(1, u64::from(u32::MAX));
    machine::area(processor)
        .last_tick
        .store(machine::counter(), Ordering::Relaxed);
    machine::lapic_write(lapic::TIMER_DIVIDE, UNDIVIDED);
    machine::lapic_write(lapic::TIMER, PERIODIC | VECTOR);
    machine::lapic_write(lapic::TIMER_INITIAL, period as u32);
}
