//! A virtio disk and the journal on it, driven from ring 3 by one queue.
//!
//! Source: Virtual I/O Device 1.2, 5.2. Each request is three descriptors of its own: header, data,
//! answer. Answers are seen by polling, a step at a time between the worker's; interrupts are only counted, which shows that they arrive.
//!
//! ```text
//!   idle ─► 8 writes ─► flush: acknowledged ─► one block is read back and compared ─► idle
//! ```
//!
//! A request that is not answered for ten seconds of the timer's ticks, which stand while the guest does, is lost.

use core::sync::atomic::{Ordering, fence};

use drover_probe::journal::{BATCH, BLOCKS_MAX, Journal, TORN, blocks_on};
use drover_probe::page::Page;
use drover_probe::params::Content;
use drover_probe::report::{DiskFound, DiskSecond};

use super::console::say;
use super::machine;
use super::slots::{self, Look};
use super::time::Clock;
use super::virtio::{self, NEXT, PAGE, Queue, Registers, WRITE, get, put};

/// Pages that the driver and the device share.
pub const PAGES: u64 = DATA + SLOTS as u64;

/// One request for each block of a batch, and one for flushes and reads.
const SLOTS: usize = BATCH as usize + 1;
const OTHER: usize = BATCH as usize;
const QUEUE_SIZE: u16 = 32;
// Which page holds what: descriptors and the available ring, the used ring, headers and answers, data by slot.
const RINGS: u64 = 0;
const USED: u64 = 1;
const HEADERS: u64 = 2;
const DATA: u64 = 3;
const AVAILABLE_OFFSET: u64 = 2048;
/// Bytes of a request's header.
pub const HEADER_BYTES: u64 = 16;
const ANSWERS_OFFSET: u64 = 2048;

/// A request that reads.
pub const IN: u32 = 0;
/// A request that writes.
pub const OUT: u32 = 1;
const FLUSH: u32 = 4;
/// Sectors of a block.
pub const SECTORS_A_BLOCK: u64 = PAGE / 512;
/// What stands in the place of an answer that is not there yet.
pub const NO_ANSWER: u8 = 0xff;

/// Virtio's vendor, and a disk that follows the standard.
pub const DISK_ID: u32 = 0x1042_1af4;
/// It knows flushes, and what was not flushed need not be on the medium.
pub const F_FLUSH: u32 = 1 << 9;

/// Between two batches.
const PAUSE_MS: u64 = 5;
/// Ticks, at the default rate, without an answer: see the module's head.
const PATIENCE_TICKS: u64 = 10_000;
/// While it boots the guest waits by the counter.
const BOOT_PATIENCE_S: u64 = 30;
/// Losses that are said one by one.
const LOSSES_SAID_MAX: u64 = 16;

/// Why there is no disk.
pub const NO_DISK: &str = "no virtio disk on PCI's root bus";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Doing {
    Nothing,
    Writing,
    Flushing,
    Reading { block: u64 },
}

/// The place of the one disk: always the same, or one that may come and go.
pub struct Bay {
    memory: u64,
    clock_khz: u64,
    disk: Option<Disk>,
}

impl Bay {
    /// Opens the disk that is there; without hot-plug there must be one. `memory`: [`PAGES`] pages.
    pub fn open(memory: u64, hot_plug: bool, clock: &Clock) -> Result<Bay, &'static str> {
        let clock_khz = clock.tsc_khz;
        let disk = match virtio::find(DISK_ID) {
            Some(slot) => Some(Disk::open(memory, clock_khz, slot)?),
            None if hot_plug => None,
            None => return Err(NO_DISK),
        };
        Ok(Bay {
            memory,
            clock_khz,
            disk,
        })
    }

    /// Does what is due of the journal, and says how it stands, where there is a disk.
    pub fn step(&mut self) -> Option<DiskSecond> {
        self.disk.as_mut().map(Disk::step)
    }

    /// Gives the disk up that is to be, and takes the next.
    // Pages on the stack are large: the ways down are kept apart.
    #[inline(never)]
    pub fn change(&mut self, slots: &Look) {
        let leaves = |disk: &mut Disk| slots.asks(disk.registers.slot) && disk.rests();
        if let Some(disk) = self.disk.take_if(leaves) {
            disk.give_up();
        }
        if self.disk.is_none()
            && let Some(slot) = slots.take(DISK_ID)
        {
            match Disk::open(self.memory, self.clock_khz, slot) {
                Ok(disk) => self.disk = Some(disk),
                Err(why) => say!("probe no disk: {why}"),
            }
        }
    }
}

/// The disk with its journal.
struct Disk {
    memory: u64,
    registers: Registers,
    clock_khz: u64,
    journal: Journal,
    doing: Doing,
    next_batch: u64,
    /// Chains offered and given back, counted without end.
    offered: u16,
    returned: u16,
    asked_at_tick: u64,
    given_up: bool,
    next_read: u64,
    lost: u64,
}

impl Disk {
    /// Sets the disk in `slot` up, and reads the journal on it. `memory`: [`PAGES`] pages.
    #[inline(never)]
    fn open(memory: u64, clock_khz: u64, slot: u32) -> Result<Disk, &'static str> {
        let registers = virtio::open(slot, machine::DISK_VECTOR)?;
        for word in 0..PAGES * PAGE / 8 {
            put(memory + 8 * word, 0u64);
        }
        let mut disk = Disk {
            memory,
            registers,
            clock_khz,
            journal: Journal::recover(&[0; BLOCKS_MAX as usize]).0,
            doing: Doing::Nothing,
            next_batch: 0,
            offered: 0,
            returned: 0,
            asked_at_tick: 0,
            given_up: false,
            next_read: 0,
            lost: 0,
        };
        disk.set_up()?;
        disk.recover()?;
        Ok(disk)
    }

    fn page(&self, index: u64) -> u64 {
        self.memory + PAGE * index
    }

    fn set_up(&self) -> Result<(), &'static str> {
        if !virtio::agree(&self.registers, F_FLUSH) {
            return Err("it does not know flushes");
        }
        let queue = Queue {
            index: 0,
            size: QUEUE_SIZE,
            vector: Some(1),
            descriptors: self.page(RINGS),
            available: self.page(RINGS) + AVAILABLE_OFFSET,
            used: self.page(USED),
        };
        virtio::set_up(&self.registers, &queue)?;
        virtio::start(&self.registers);
        Ok(())
    }

    fn answer(&self, slot: usize) -> u64 {
        self.page(HEADERS) + ANSWERS_OFFSET + slot as u64
    }

    /// Offers a request in its slot; the doorbell is rung apart.
    fn offer(&mut self, slot: usize, kind: u32, block: u64) {
        let header = self.page(HEADERS) + HEADER_BYTES * slot as u64;
        put(header, u64::from(kind));
        put(header + 8, SECTORS_A_BLOCK * block);
        put(self.answer(slot), NO_ANSWER);
        let first = 3 * slot as u16;
        let data_flags = if kind == IN { NEXT | WRITE } else { NEXT };
        let answer_at = if kind == FLUSH { first + 1 } else { first + 2 };
        self.describe(first, header, HEADER_BYTES as u32, NEXT, first + 1);
        if kind != FLUSH {
            let data = self.page(DATA + slot as u64);
            self.describe(first + 1, data, PAGE as u32, data_flags, answer_at);
        }
        self.describe(answer_at, self.answer(slot), 1, WRITE, 0);
        let available = self.page(RINGS) + AVAILABLE_OFFSET;
        put(available + 4 + 2 * u64::from(self.offered % QUEUE_SIZE), first);
        self.offered = self.offered.wrapping_add(1);
        fence(Ordering::SeqCst);
        put(available + 2, self.offered);
    }

    fn describe(&self, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        virtio::describe(self.page(RINGS), index, at, len, flags, next);
    }

    fn ring(&mut self) {
        fence(Ordering::SeqCst);
        virtio::ring(&self.registers, 0);
        self.asked_at_tick = machine::area(0).ticks.load(Ordering::Relaxed);
    }

    /// Whether everything that was offered has been given back.
    fn all_answered(&mut self) -> bool {
        self.returned = get::<u16>(self.page(USED) + 2);
        fence(Ordering::SeqCst);
        self.returned == self.offered
    }

    fn succeeded(&self, slot: usize) -> bool {
        get::<u8>(self.answer(slot)) == 0
    }

    fn data(&self, slot: usize) -> Page {
        let mut page = Page::zero();
        for (at, word) in (0..).zip(&mut page.0) {
            *word = get(self.page(DATA + slot as u64) + 8 * at);
        }
        page
    }

    fn set_data(&self, slot: usize, page: &Page) {
        for (at, &word) in (0..).zip(&page.0) {
            put(self.page(DATA + slot as u64) + 8 * at, word);
        }
    }

    #[inline(never)]
    fn read_now(&mut self, block: u64) -> Result<Page, &'static str> {
        self.offer(OTHER, IN, block);
        self.ring();
        let began = machine::counter();
        while !self.all_answered() {
            if machine::counter().wrapping_sub(began) > BOOT_PATIENCE_S * 1000 * self.clock_khz {
                return Err("it does not answer");
            }
            core::hint::spin_loop();
        }
        if !self.succeeded(OTHER) {
            return Err("it cannot be read");
        }
        Ok(self.data(OTHER))
    }

    fn recover(&mut self) -> Result<(), &'static str> {
        let sectors: u64 = get::<u32>(self.registers.device).into();
        let sectors = sectors | u64::from(get::<u32>(self.registers.device + 4)) << 32;
        let blocks = blocks_on(sectors.saturating_mul(512)).ok_or("it is too small for a journal")?;
        let mut found = [0; BLOCKS_MAX as usize];
        let found = &mut found[..blocks as usize];
        for (block, found) in (0..).zip(found.iter_mut()) {
            let page = self.read_now(block)?;
            let sequence = page.sequence();
            *found = match page.verify(block, sequence) {
                Ok(()) => sequence,
                Err(_) => TORN,
            };
        }
        let (journal, lost, first) = Journal::recover(found);
        if let Some((block, due, at)) = first {
            say!("probe DISK LOST block={block} expected_seq={due} found_seq={at} why=boot");
        }
        self.journal = journal;
        self.lost = lost;
        let found = DiskFound {
            sectors,
            blocks,
            sequence: journal.acknowledged(),
            lost,
        };
        say!("{found}");
        Ok(())
    }

    fn lose(&mut self, block: u64, found: u64, why: &str) {
        self.lost += 1;
        if self.lost <= LOSSES_SAID_MAX {
            let due = self.journal.due(block);
            say!("probe DISK LOST block={block} expected_seq={due} found_seq={found} why={why}");
        }
    }

    /// Does what is due, and says how the journal stands.
    fn step(&mut self) -> DiskSecond {
        if !self.given_up {
            self.advance();
        }
        DiskSecond {
            sequence: self.journal.acknowledged(),
            lost: self.lost,
            interrupts: machine::area(0).disk.load(Ordering::Relaxed),
        }
    }

    /// Whether nothing is under way, so that it can be given up.
    fn rests(&self) -> bool {
        self.doing == Doing::Nothing || self.given_up
    }

    /// Ends the device's work, and gives its slot up.
    fn give_up(self) {
        virtio::reset(&self.registers);
        slots::give_up(self.registers.slot);
        let sequence = self.journal.acknowledged();
        say!("probe disk gone seq={sequence} lost={}", self.lost);
    }

    #[inline(never)]
    fn advance(&mut self) {
        if self.doing != Doing::Nothing && !self.all_answered() {
            let ticks = machine::area(0).ticks.load(Ordering::Relaxed);
            if ticks.wrapping_sub(self.asked_at_tick) > PATIENCE_TICKS {
                self.given_up = true;
                self.lose(0, 0, "no-answer");
            }
            return;
        }
        self.doing = match self.doing {
            Doing::Nothing => self.begin_batch(),
            Doing::Writing => {
                if !(0..OTHER).all(|slot| self.succeeded(slot)) {
                    self.lose(0, 0, "write-failed");
                }
                self.offer(OTHER, FLUSH, 0);
                self.ring();
                Doing::Flushing
            }
            Doing::Flushing => {
                if !self.succeeded(OTHER) {
                    self.lose(0, 0, "flush-failed");
                }
                self.journal.acknowledge();
                let block = self.next_read % self.journal.blocks();
                // A step that no number of blocks has as a factor: all are read in turn.
                self.next_read += 37;
                self.offer(OTHER, IN, block);
                self.ring();
                Doing::Reading { block }
            }
            Doing::Reading { block } => {
                let page = self.data(OTHER);
                if !self.succeeded(OTHER) || page.verify(block, self.journal.due(block)).is_err() {
                    self.lose(block, page.sequence(), "read");
                }
                Doing::Nothing
            }
        };
    }

    fn begin_batch(&mut self) -> Doing {
        let now = machine::counter();
        if now < self.next_batch {
            return Doing::Nothing;
        }
        self.next_batch = now + PAUSE_MS * self.clock_khz;
        let mut page = Page::zero();
        for (slot, ahead) in (1..=BATCH).enumerate() {
            let sequence = self.journal.acknowledged() + ahead;
            let block = self.journal.block_of(sequence);
            page.write(block, sequence, Content::Random);
            self.set_data(slot, &page);
            self.offer(slot, OUT, block);
        }
        self.ring();
        Doing::Writing
    }
}
