//! A virtio disk under the load of a benchmark: see [`drover_probe::load`].
//!
//! Source: Virtual I/O Device 1.2, 5.2. As many requests as were asked for are under way all the time, each of a block, three descriptors
//! of its own: header, data, answer. What has ended is found by polling and replaced at once; no interrupts are asked for. What was read is
//! compared in full. Requests are counted from when every block has its first content.
#![allow(unsafe_code, reason = "a driver shares memory with its device")]

use core::sync::atomic::Ordering;

use drover_probe::clock::microseconds;
use drover_probe::load::{BLOCKS_MAX, DEPTH_MAX, Load, Order, blocks_on};
use drover_probe::page::Page;
use drover_probe::params::{Content, DiskBench};
use drover_probe::report::DiskLoad;

use super::console::say;
use super::disk::{DISK_ID, F_FLUSH, HEADER_BYTES, IN, NO_ANSWER, NO_DISK, OUT, SECTORS_A_BLOCK};
use super::machine;
use super::plan::Plan;
use super::virtio::{self, NEXT, PAGE, Registers, Ring, WRITE, get, put};

const SIZE: u16 = 256;
// Which page holds what: the ring, headers and answers, data by slot, what every block must hold.
const HEADERS: u64 = Ring::PAGES;
const DATA: u64 = HEADERS + 1;
const EXPECTED: u64 = DATA + DEPTH_MAX as u64;
const ANSWERS_OFFSET: u64 = 2048;
/// Pages that are set aside, most of them shared with the device.
pub const PAGES: u64 = EXPECTED + 4 * BLOCKS_MAX / PAGE;

/// Seconds of the timer's ticks without an answer, after which the disk is left alone.
const PATIENCE_S: u64 = 10;
/// Losses that are said one by one.
const LOSSES_SAID_MAX: u64 = 16;

/// The disk.
pub struct LoadedDisk {
    plan: &'static Plan,
    memory: u64,
    registers: Registers,
    ring: Ring,
    load: Load<'static>,
    /// By slot: what is under way.
    orders: [Order; DEPTH_MAX as usize],
    answered_at_tick: u64,
    given_up: bool,
    done: DiskLoad,
}

impl LoadedDisk {
    /// Finds the disk, sets it up, and begins as many requests as are to be under way. `memory`: [`PAGES`] pages.
    pub fn open(plan: &'static Plan, memory: u64, bench: DiskBench) -> Result<LoadedDisk, &'static str> {
        let slot = virtio::find(DISK_ID).ok_or(NO_DISK)?;
        let registers = virtio::open(slot, machine::DISK_VECTOR)?;
        for word in 0..DATA * PAGE / 8 {
            put(memory + 8 * word, 0u64);
        }
        let event_index = virtio::offers_event_index(&registers);
        // A driver that does not know flushes has each write on the medium before it is answered.
        if !virtio::agree(&registers, F_FLUSH | virtio::event_index_if(event_index)) {
            return Err("it does not know flushes");
        }
        let ring = Ring::new(0, memory, SIZE, event_index);
        virtio::set_up(&registers, &ring.queue())?;
        ring.want_no_interrupts();
        virtio::start(&registers);
        let sectors = u64::from(get::<u32>(registers.device));
        let sectors = sectors | u64::from(get::<u32>(registers.device + 4)) << 32;
        let blocks = blocks_on(sectors.saturating_mul(512), bench.depth)
            .ok_or("it is too small for so many requests at once")?;
        let expected = core::ptr::with_exposed_provenance_mut::<u32>((memory + EXPECTED * PAGE) as usize);
        // SAFETY: these pages were taken out of the layout for this, hold a word for every block, and are handed out here only, once. The
        // device is told of none of them. Integers have no invalid pattern, and all are written before they are read.
        let expected = unsafe { core::slice::from_raw_parts_mut(expected, blocks as usize) };
        let mut disk = LoadedDisk {
            plan,
            memory,
            registers,
            ring,
            load: Load::new(expected, bench),
            orders: [Order {
                write: false,
                block: 0,
                sequence: 0,
            }; DEPTH_MAX as usize],
            answered_at_tick: machine::area(0).ticks.load(Ordering::Relaxed),
            given_up: false,
            done: DiskLoad::default(),
        };
        let before = disk.ring.offered;
        for slot in 0..disk.load.depth() {
            disk.begin(slot);
        }
        disk.ring.ring_from(&disk.registers, before);
        Ok(disk)
    }

    /// Replaces the requests that have ended, and says how many there were so far.
    pub fn step(&mut self) -> DiskLoad {
        if !self.given_up {
            self.advance();
        }
        DiskLoad {
            at_us: microseconds(
                machine::counter().saturating_sub(self.plan.clock.boot),
                self.plan.clock.tsc_khz,
            ),
            ..self.done
        }
    }

    fn advance(&mut self) {
        let before = self.ring.offered;
        while let Some((head, _)) = self.ring.take() {
            let slot = head / 3;
            if head % 3 != 0 || slot >= self.load.depth() {
                self.lose(0, 0, "chain");
                self.given_up = true;
                return;
            }
            self.end(slot);
            self.begin(slot);
        }
        let ticks = machine::area(0).ticks.load(Ordering::Relaxed);
        if self.ring.offered != before {
            self.ring.ring_from(&self.registers, before);
            self.answered_at_tick = ticks;
        } else if ticks.wrapping_sub(self.answered_at_tick) > PATIENCE_S * u64::from(self.plan.params.hz) {
            self.given_up = true;
            self.lose(0, 0, "no-answer");
        }
    }

    fn header(&self, slot: u16) -> u64 {
        self.memory + HEADERS * PAGE + HEADER_BYTES * u64::from(slot)
    }

    fn answer(&self, slot: u16) -> u64 {
        self.memory + HEADERS * PAGE + ANSWERS_OFFSET + u64::from(slot)
    }

    fn data(&self, slot: u16) -> u64 {
        self.memory + (DATA + u64::from(slot)) * PAGE
    }

    fn page(&mut self, slot: u16) -> &mut Page {
        // SAFETY: a page of this driver's own, aligned, mapped one to one; the device has it only while a request of its slot is under way,
        // and then nobody comes here. `&mut self` makes the reference the only one.
        unsafe { &mut *core::ptr::with_exposed_provenance_mut::<Page>(self.data(slot) as usize) }
    }

    /// Offers the next request of `slot`; the doorbell is rung apart.
    fn begin(&mut self, slot: u16) {
        let order = self.load.order(slot);
        self.orders[usize::from(slot)] = order;
        if order.write {
            self.page(slot)
                .write(order.block, order.sequence, Content::Random);
        }
        let (kind, flags) = if order.write {
            (OUT, NEXT)
        } else {
            (IN, NEXT | WRITE)
        };
        let (header, first, table) = (self.header(slot), 3 * slot, self.ring.descriptors());
        put(header, u64::from(kind));
        put(header + 8, SECTORS_A_BLOCK * order.block);
        put(self.answer(slot), NO_ANSWER);
        virtio::describe(table, first, header, HEADER_BYTES as u32, NEXT, first + 1);
        virtio::describe(table, first + 1, self.data(slot), PAGE as u32, flags, first + 2);
        virtio::describe(table, first + 2, self.answer(slot), 1, WRITE, 0);
        self.ring.offer(first);
    }

    /// Judges the request of `slot`, which was given back.
    fn end(&mut self, slot: u16) {
        let order = self.orders[usize::from(slot)];
        let failed = get::<u8>(self.answer(slot)) != 0;
        if order.write {
            if failed {
                self.lose(order.block, order.sequence, "write-failed");
            }
        } else {
            let page = self.page(slot);
            let (right, found) = (page.verify(order.block, order.sequence).is_ok(), page.sequence());
            if failed || !right {
                let why = if failed { "read-failed" } else { "read" };
                self.lose_found(order, found, why);
            }
        }
        if self.load.is_filled() {
            self.done.reads += u64::from(!order.write);
            self.done.writes += u64::from(order.write);
        }
    }

    fn lose(&mut self, block: u64, sequence: u64, why: &str) {
        let order = Order {
            write: true,
            block,
            sequence,
        };
        self.lose_found(order, 0, why);
    }

    #[inline(never)]
    fn lose_found(&mut self, order: Order, found: u64, why: &str) {
        self.done.lost += 1;
        if self.done.lost <= LOSSES_SAID_MAX {
            let Order { block, sequence, .. } = order;
            say!("probe DISK LOST block={block} expected_seq={sequence} found_seq={found} why={why}");
        }
    }
}
