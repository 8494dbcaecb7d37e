//! A virtio balloon, filled from the spare pages: those that nobody owns.
//!
//! Source: Virtual I/O Device 1.2, 5.5. One request at a time in all, found answered by polling, a step at a time between the worker's; the target
//! is looked at by the clock.
//!
//! ```text
//!   spare pages:  0 ──── in the balloon ──── held ──── written to ──── high ──── never in it: reported free, or left alone ──── all
//! ```
//!
//! Pages go into the balloon from the lowest on and come back in the opposite order. Each that came back is written to at once, and compared
//! when it goes in again: so a page that its host takes away late is seen.

use core::sync::atomic::{Ordering, fence};

use drover_probe::report::BalloonSecond;
use drover_probe::spare;

use super::machine;
use super::plan::Plan;
use super::virtio::{self, NEXT, PAGE, Queue, Registers, WRITE, get, put};

/// Virtio's vendor, and a balloon that follows the standard.
const BALLOON_ID: u32 = 0x1045_1af4;
const F_REPORTING: u32 = 1 << 5;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const REPORT: u16 = 4;
/// Where the driver says what it holds, behind the target.
const ACTUAL: u64 = 4;

const SIZE: u16 = 32;
const AVAILABLE_OFFSET: u64 = 2048;
/// Of each queue: descriptors and the available ring, the used ring.
const QUEUE_PAGES: u64 = 2;
/// Pages that the driver and the device share: three queues, and the numbers of a request.
pub const PAGES: u64 = 3 * QUEUE_PAGES + 1;
/// Pages in one request.
const BATCH: u64 = 256;
/// Pages that are reported as one buffer, a huge page at most, and buffers in one report.
const BUFFER_PAGES: u64 = 512;
const BUFFERS: u16 = 16;
/// Between two looks at the target.
const LOOK_MS: u64 = 20;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Doing {
    Nothing,
    Inflating(u64),
    Deflating(u64),
    Reporting(u64),
}

/// A queue; one chain at a time is in it.
struct Ring {
    index: u16,
    memory: u64,
    offered: u16,
}

impl Ring {
    fn queue(&self) -> Queue {
        Queue {
            index: self.index,
            size: SIZE,
            vector: None,
            descriptors: self.memory,
            available: self.memory + AVAILABLE_OFFSET,
            used: self.memory + PAGE,
        }
    }

    /// Makes the chain available that begins at the first descriptor.
    fn offer(&mut self, registers: &Registers) {
        let available = self.memory + AVAILABLE_OFFSET;
        put(available + 4 + 2 * u64::from(self.offered % SIZE), 0u16);
        self.offered = self.offered.wrapping_add(1);
        fence(Ordering::SeqCst);
        put(available + 2, self.offered);
        fence(Ordering::SeqCst);
        virtio::ring(registers, self.index);
    }

    fn is_answered(&self) -> bool {
        let answered = get::<u16>(self.memory + PAGE + 2) == self.offered;
        fence(Ordering::SeqCst);
        answered
    }
}

/// The balloon.
pub struct Balloon {
    plan: &'static Plan,
    registers: Registers,
    inflate: Ring,
    deflate: Ring,
    report: Ring,
    numbers: u64,
    doing: Doing,
    next_look: u64,
    /// Pages that it is to hold, and holds; up to here the others hold what was written to them.
    target: u64,
    held: u64,
    high: u64,
    /// Spare pages that were reported free, or never will be.
    reported: u64,
    lost: u64,
}

impl Balloon {
    /// Finds the balloon and sets it up. `memory`: [`PAGES`] pages.
    pub fn open(memory: u64, plan: &'static Plan) -> Result<Balloon, &'static str> {
        let slot = virtio::find(BALLOON_ID).ok_or("no virtio balloon on PCI's root bus")?;
        let registers = virtio::open(slot, machine::DISK_VECTOR)?;
        for word in 0..PAGES * PAGE / 8 {
            put(memory + 8 * word, 0u64);
        }
        if !virtio::agree(&registers, F_REPORTING) {
            return Err("it takes no reports of free pages");
        }
        let ring = |index: u16, place: u64| Ring {
            index,
            memory: memory + QUEUE_PAGES * PAGE * place,
            offered: 0,
        };
        let balloon = Balloon {
            plan,
            registers,
            inflate: ring(INFLATE, 0),
            deflate: ring(DEFLATE, 1),
            report: ring(REPORT, 2),
            numbers: memory + 3 * QUEUE_PAGES * PAGE,
            doing: Doing::Nothing,
            next_look: 0,
            target: 0,
            held: 0,
            high: if plan.params.spare_written && !plan.params.reports {
                plan.spare()
            } else {
                0
            },
            reported: if plan.params.reports { 0 } else { plan.spare() },
            lost: 0,
        };
        for ring in [&balloon.inflate, &balloon.deflate, &balloon.report] {
            virtio::set_up(&registers, &ring.queue())?;
        }
        virtio::start(&registers);
        Ok(balloon)
    }

    /// Does what is due, and says how it stands.
    pub fn step(&mut self) -> BalloonSecond {
        let now = machine::counter();
        if now >= self.next_look {
            self.next_look = now + LOOK_MS * self.plan.clock.tsc_khz;
            self.target = u64::from(get::<u32>(self.registers.device)).min(self.plan.spare());
        }
        if self.is_answered() {
            self.finish();
            self.begin();
        }
        BalloonSecond {
            pages: self.held,
            target: self.target,
            reported: if self.plan.params.reports {
                self.reported
            } else {
                0
            },
            lost: self.lost,
        }
    }

    fn is_answered(&self) -> bool {
        match self.doing {
            Doing::Nothing => true,
            Doing::Inflating(_) => self.inflate.is_answered(),
            Doing::Deflating(_) => self.deflate.is_answered(),
            Doing::Reporting(_) => self.report.is_answered(),
        }
    }

    fn finish(&mut self) {
        match core::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Nothing => return,
            Doing::Reporting(pages) => {
                self.reported += pages;
                return;
            }
            Doing::Inflating(pages) => self.held += pages,
            Doing::Deflating(pages) => {
                self.high = self.high.max(self.held);
                self.held -= pages;
                for index in self.held..self.held + pages {
                    self.write(index);
                }
            }
        }
        put(self.registers.device + ACTUAL, self.held as u32);
    }

    fn begin(&mut self) {
        if self.held < self.target {
            let pages = (self.target - self.held).min(BATCH);
            for index in self.held..(self.held + pages).min(self.high) {
                self.compare(index);
            }
            self.offer_numbers(self.held, pages, true);
            self.doing = Doing::Inflating(pages);
        } else if self.held > self.target {
            let pages = (self.held - self.target).min(BATCH);
            self.offer_numbers(self.held - pages, pages, false);
            self.doing = Doing::Deflating(pages);
        } else if self.reported < self.plan.spare() {
            self.reported = self.reported.max(self.held.max(self.high));
            self.report_more();
        }
    }

    fn address(&self, index: u64) -> u64 {
        self.plan.spare_page(index)
    }

    fn offer_numbers(&mut self, first: u64, pages: u64, inflates: bool) {
        for (at, index) in (first..first + pages).enumerate() {
            put(self.numbers + 4 * at as u64, (self.address(index) / PAGE) as u32);
        }
        let ring = if inflates {
            &mut self.inflate
        } else {
            &mut self.deflate
        };
        virtio::describe(ring.memory, 0, self.numbers, 4 * pages as u32, 0, 0);
        ring.offer(&self.registers);
    }

    /// Reports the next pages that nobody ever had, in buffers that do not cross what a huge page covers.
    fn report_more(&mut self) {
        let (mut index, mut buffers) = (self.reported, 0u16);
        while index < self.plan.spare() && buffers < BUFFERS {
            let start = self.address(index);
            let room = BUFFER_PAGES - start / PAGE % BUFFER_PAGES;
            let mut pages = 1;
            while pages < room
                && index + pages < self.plan.spare()
                && self.address(index + pages) == start + pages * PAGE
            {
                pages += 1;
            }
            let len = (pages * PAGE) as u32;
            virtio::describe(self.report.memory, buffers, start, len, NEXT | WRITE, buffers + 1);
            index += pages;
            buffers += 1;
        }
        if buffers == 0 {
            return;
        }
        // The last has no next.
        put(self.report.memory + 16 * u64::from(buffers - 1) + 12, WRITE);
        self.report.offer(&self.registers);
        self.doing = Doing::Reporting(index - self.reported);
    }

    fn write(&self, index: u64) {
        write(self.address(index), index);
    }

    fn compare(&mut self, index: u64) {
        let at = self.address(index);
        let is_there = |word: u64| get::<u64>(at + 8 * word) == spare::word(index, word);
        if !(0..PAGE / 8).all(is_there) {
            self.lost += 1;
        }
    }
}

/// Gives the spare page `index` at this address content.
pub fn write(at: u64, index: u64) {
    for word in 0..PAGE / 8 {
        put(at + 8 * word, spare::word(index, word));
    }
}
