//! One processor's work: write, verify, watch the clocks.
#![allow(unsafe_code, reason = "it writes memory by address")]

use core::sync::atomic::{AtomicU64, Ordering};

use drover_probe::CPUS_MAX;
use drover_probe::layout::{Layout, share};
use drover_probe::ledger::{Ledger, Loss, Pages};
use drover_probe::pace::Pace;
use drover_probe::page::Page;
use drover_probe::params::Rate;
use drover_probe::pattern::Chooser;

use super::console::say;
use super::machine;
use super::plan::Plan;

/// Pages between two looks at the clock.
const BATCH: u64 = 32;
/// A sweep over all owned pages takes this long.
const SWEEP_S: u64 = 10;
/// Work that a stopped guest catches up on.
const BURST_MS: u64 = 250;
/// Losses that a processor reports one by one; the rest are counted only.
const LOSSES_SAID_MAX: u64 = 64;
/// Reports of a clock that went back.
const BACKS_SAID_MAX: u64 = 16;

/// What a worker has done; written by its own processor only.
#[repr(align(64))]
pub struct Done {
    /// Pages written.
    pub written: AtomicU64,
    /// Pages compared.
    pub verified: AtomicU64,
    /// Pages lost.
    pub lost: AtomicU64,
    /// Times that a clock went back.
    pub back: AtomicU64,
}

/// Every processor's.
pub static DONE: [Done; CPUS_MAX as usize] = [const {
    Done {
        written: AtomicU64::new(0),
        verified: AtomicU64::new(0),
        lost: AtomicU64::new(0),
        back: AtomicU64::new(0),
    }
}; CPUS_MAX as usize];

fn add(counter: &AtomicU64, by: u64) -> u64 {
    let sum = counter.load(Ordering::Relaxed) + by;
    counter.store(sum, Ordering::Relaxed);
    sum
}

/// The owned pages of one processor: the hot ones first.
struct Owned {
    layout: &'static Layout,
    first: u64,
}

impl Pages for Owned {
    fn page(&mut self, index: usize) -> &mut Page {
        let address = self
            .layout
            .address(self.first + index as u64)
            .expect("owned pages lie within the layout");
        // SAFETY: the page is usable memory by the machine's map, outside image and record, mapped, aligned, and belongs to this
        // processor's share alone; `&mut self` makes the reference the only one.
        unsafe { &mut *core::ptr::with_exposed_provenance_mut::<Page>(address as usize) }
    }
}

/// A processor at work.
pub struct Worker {
    processor: usize,
    plan: &'static Plan,
    done: &'static Done,
    ledger: Ledger<'static, Owned>,
    chooser: Chooser,
    /// `None`: as fast as it goes.
    writing: Option<Pace>,
    sweeping: Pace,
    sweep_next: usize,
    last_counter: u64,
    last_ns: u64,
}

impl Worker {
    /// Takes over a processor's share. Called once for each.
    pub fn new(plan: &'static Plan, processor: usize) -> Worker {
        let (cpus, index) = (plan.cpus as u64, processor as u64);
        let (first, count) = share(plan.params.own_pages, cpus, index);
        let (_, hot) = share(plan.params.hot_pages, cpus, index);
        let record = core::ptr::with_exposed_provenance_mut::<u64>((plan.record + 8 * first) as usize);
        // SAFETY: the record's memory was taken out of the layout for this, holds a word for every owned page, and this processor's
        // part of it is handed out here only, once. Integers have no invalid pattern, and `fill` writes each before it is used.
        let expected = unsafe { core::slice::from_raw_parts_mut(record, count as usize) };
        let now = machine::counter();
        let ticks_per_s = plan.clock.ticks_per_s();
        let writing = match plan.params.rate {
            Rate::Max => None,
            Rate::PagesPerSecond(rate) => {
                Some(Pace::new(share(rate, cpus, index).1, ticks_per_s, BURST_MS, now))
            }
        };
        Worker {
            processor,
            plan,
            done: &DONE[processor],
            ledger: Ledger::new(
                Owned {
                    layout: &plan.layout,
                    first,
                },
                expected,
                first,
                plan.params.content,
            ),
            chooser: Chooser::new(plan.params.pattern, hot.max(1), index),
            writing,
            sweeping: Pace::new(count.div_ceil(SWEEP_S), ticks_per_s, BURST_MS, now),
            sweep_next: 0,
            last_counter: now,
            last_ns: 0,
        }
    }

    /// Gives every owned page its first content.
    pub fn fill(&mut self) {
        for index in 0..self.ledger.len() {
            let wrote = self.ledger.fill(index);
            add(&self.done.written, u64::from(wrote));
        }
    }

    /// A batch of writes and checks, as far as the paces allow. Returns whether anything was due.
    pub fn step(&mut self) -> bool {
        let now = self.watch_clocks();
        let writes = self.writing.as_mut().map_or(BATCH, |pace| pace.take(now, BATCH));
        for _ in 0..writes {
            let index = self.chooser.choose();
            let verdict = self.ledger.rewrite(index as usize);
            self.judge(verdict);
        }
        add(&self.done.written, writes);
        let checks = self.sweeping.take(now, BATCH);
        for _ in 0..checks {
            let verdict = self.ledger.verify(self.sweep_next);
            self.judge(verdict);
            self.sweep_next = (self.sweep_next + 1) % self.ledger.len();
        }
        writes + checks > 0
    }

    fn judge(&mut self, verdict: Result<(), Loss>) {
        add(&self.done.verified, 1);
        let Err(loss) = verdict else {
            return;
        };
        if add(&self.done.lost, 1) <= LOSSES_SAID_MAX {
            say!("{loss}");
        }
    }

    fn watch_clocks(&mut self) -> u64 {
        let now = machine::counter();
        if now < self.last_counter {
            self.went_back("tsc", self.last_counter - now);
        }
        self.last_counter = now;
        if let Some(ns) = self.plan.clock.nanoseconds(self.processor) {
            if ns < self.last_ns {
                self.went_back("kvmclock", self.last_ns - ns);
            }
            self.last_ns = ns;
        }
        now
    }

    fn went_back(&self, clock: &str, by: u64) {
        if add(&self.done.back, 1) <= BACKS_SAID_MAX {
            say!("probe BACK clock={clock} cpu={} by={by}", self.processor);
        }
    }
}
