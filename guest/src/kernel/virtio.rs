//! What the drivers of virtio devices share: finding one by a scan of PCI's root bus, agreeing with it, setting up a queue.
//!
//! Sources: Virtual I/O Device 1.2, 2.7 (queues), 3.1 (the steps) and 4.1 (PCI).
#![allow(unsafe_code, reason = "a driver shares memory with its device")]

use core::sync::atomic::{Ordering, fence};

use super::machine;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Of a descriptor: another follows.
pub const NEXT: u16 = 1;
/// Of a descriptor: the device writes.
pub const WRITE: u16 = 2;

const SLOTS_OF_BUS: u32 = 32;
const CAPABILITIES_MAX: u32 = 48;
/// Vectors that are programmed, all the same.
const VECTORS: u64 = 2;
const MSIX: u32 = 0x11;
const VENDORS_OWN: u32 = 9;
/// Memory space and bus master.
const COMMAND: u32 = 6;
const MSIX_ENABLE: u32 = 1 << 31;

const NO_VECTOR: u16 = 0xffff;
const F_VERSION_1: u32 = 1;
/// Each side says at which index it wants to be told (2.7.10).
const F_EVENT_INDEX: u32 = 1 << 29;
/// Of the available ring: no interrupt is wanted; of the used ring: no doorbell is.
const NO_INTERRUPT: u16 = 1;
const NO_DOORBELL: u16 = 1;
/// Where regions are placed that nobody has placed: in the 32-bit hole, above what firmware and chipsets use of it.
const REGIONS: u64 = 0xd000_0000;
/// Each slot has so much there, each region an even share of it.
const REGION_STRIDE: u64 = 1 << 20;
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// Reads shared memory or a register.
pub fn get<T: Copy>(at: u64) -> T {
    // SAFETY: `at` lies in the pages that the plan set aside for a driver, or in the region of its device's registers that its
    // configuration space names, both mapped one to one; `T` is an integer, and the access is aligned and volatile.
    unsafe { core::ptr::with_exposed_provenance::<T>(at as usize).read_volatile() }
}

/// Writes shared memory or a register.
pub fn put<T: Copy>(at: u64, value: T) {
    // SAFETY: as for `get`; nothing in Rust refers to these addresses but a page of data while no request has it.
    unsafe { core::ptr::with_exposed_provenance_mut::<T>(at as usize).write_volatile(value) }
}

/// Where a device's registers are.
#[derive(Clone, Copy, Default)]
pub struct Registers {
    /// Its slot.
    pub slot: u32,
    common: u64,
    doorbell: u64,
    doorbell_stride: u64,
    /// Its configuration.
    pub device: u64,
    msix_table: u64,
}

/// A queue to be set up.
pub struct Queue {
    /// Which.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// The vector of its interrupts; none: it is polled.
    pub vector: Option<u16>,
    /// Where the descriptors are.
    pub descriptors: u64,
    /// Where the ring of available chains is.
    pub available: u64,
    /// Where the ring of used chains is.
    pub used: u64,
}

fn config(slot: u32, register: u32) -> u32 {
    1 << 31 | slot << 11 | register
}

/// Places the memory regions of a device that its machine's firmware left nowhere.
fn place(slot: u32) {
    let mut index = 0;
    while index < 6 {
        let register = config(slot, 0x10 + 4 * index);
        let was = machine::config_read(register);
        let wide = was & 7 == 4;
        if was & 1 == 0 && was & !0xf == 0 {
            // SAFETY: the device's regions are switched off: it has answered nowhere so far.
            unsafe { machine::config_write(register, u32::MAX) };
            let bytes = u64::from(!(machine::config_read(register) & !0xf)) + 1;
            let at = REGIONS + REGION_STRIDE * u64::from(slot) + REGION_STRIDE / 8 * u64::from(index);
            let fits = bytes <= REGION_STRIDE / 8;
            // SAFETY: as above; the place is no memory, and nothing else is placed there.
            unsafe { machine::config_write(register, if fits { (at & 0xffff_ffff) as u32 } else { 0 }) };
        }
        index += if wide { 2 } else { 1 };
    }
}

/// Ends the device's work.
pub fn reset(registers: &Registers) {
    put(registers.common + 20, 0u8);
}

/// What is in the slot: the vendor below.
pub fn id(slot: u32) -> u32 {
    machine::config_read(config(slot, 0))
}

/// The slot of the first device of `id`.
pub fn find(id: u32) -> Option<u32> {
    (0..SLOTS_OF_BUS).find(|&slot| self::id(slot) == id)
}

/// Switches the device in `slot` on, and places only what is nowhere. Its messages are of interrupt `vector`.
pub fn open(slot: u32, vector: u32) -> Result<Registers, &'static str> {
    place(slot);
    let bar = |index: u32| u64::from(machine::config_read(config(slot, 0x10 + 4 * index)) & !0xf);
    let mut found = Registers {
        slot,
        ..Registers::default()
    };
    let mut msix = None;
    let mut at = machine::config_read(config(slot, 0x34)) & 0xfc;
    for _ in 0..CAPABILITIES_MAX {
        if at == 0 {
            break;
        }
        let head = machine::config_read(config(slot, at));
        let second = machine::config_read(config(slot, at + 4));
        let place = |offset: u32| bar(second & 7) + u64::from(offset);
        match (head & 0xff, head >> 24) {
            (MSIX, _) => {
                msix = Some((at, head));
                found.msix_table = place(second & !7);
            }
            (VENDORS_OWN, 1) => found.common = place(machine::config_read(config(slot, at + 8))),
            (VENDORS_OWN, 2) => {
                found.doorbell = place(machine::config_read(config(slot, at + 8)));
                found.doorbell_stride = machine::config_read(config(slot, at + 16)).into();
            }
            (VENDORS_OWN, 4) => found.device = place(machine::config_read(config(slot, at + 8))),
            _ => {}
        }
        at = head >> 8 & 0xfc;
    }
    if found.common < PAGE || found.doorbell < PAGE || found.device < PAGE {
        return Err("its registers are nowhere");
    }
    // SAFETY: the device writes to memory only once its queues are set up, and then to its driver's pages.
    unsafe { machine::config_write(config(slot, 4), COMMAND) };
    if let Some((at, head)) = msix {
        for entry in (0..VECTORS).map(|index| found.msix_table + 16 * index) {
            put(entry, 0xfee0_0000u32);
            put(entry + 4, 0u32);
            put(entry + 8, vector);
            put(entry + 12, 0u32);
        }
        // SAFETY: its messages go to the local APIC of processor 0.
        unsafe { machine::config_write(config(slot, at), head & 0xffff | MSIX_ENABLE) };
    }
    Ok(found)
}

/// Whether the device offers event indexes.
pub fn offers_event_index(registers: &Registers) -> bool {
    put(registers.common, 0u32);
    get::<u32>(registers.common + 4) & F_EVENT_INDEX != 0
}

/// The feature, if it is wanted.
pub fn event_index_if(wanted: bool) -> u32 {
    if wanted { F_EVENT_INDEX } else { 0 }
}

/// Resets the device and accepts `features` of the lower 32; false: it does not have them.
pub fn agree(registers: &Registers, features: u32) -> bool {
    let common = registers.common;
    let status = common + 20;
    put(status, 0u8);
    for bits in [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER] {
        put(status, bits);
    }
    for (half, features) in [(0u32, features), (1, F_VERSION_1)] {
        put(common + 8, half);
        put(common + 12, features);
    }
    put(status, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    put(common + 16, 0u16);
    get::<u8>(status) & FEATURES_OK != 0
}

/// Switches a queue on.
pub fn set_up(registers: &Registers, queue: &Queue) -> Result<(), &'static str> {
    let common = registers.common;
    put(common + 22, queue.index);
    if get::<u16>(common + 24) < queue.size {
        return Err("its queue is too small");
    }
    put(common + 24, queue.size);
    put(common + 26, queue.vector.unwrap_or(NO_VECTOR));
    for (register, place) in [(32, queue.descriptors), (40, queue.available), (48, queue.used)] {
        put(common + register, (place & 0xffff_ffff) as u32);
        put(common + register + 4, (place >> 32) as u32);
    }
    put(common + 28, 1u16);
    Ok(())
}

/// Lets the device work.
pub fn start(registers: &Registers) {
    put(
        registers.common + 20,
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
    );
}

/// Rings the doorbell of queue `index`.
pub fn ring(registers: &Registers, index: u16) {
    put(
        registers.doorbell + registers.doorbell_stride * u64::from(index),
        index,
    );
}

/// Writes descriptor `index` of those at `table`.
pub fn describe(table: u64, index: u16, at: u64, len: u32, flags: u16, next: u16) {
    let descriptor = table + 16 * u64::from(index);
    put(descriptor, at);
    put(descriptor + 8, len);
    put(descriptor + 12, flags);
    put(descriptor + 14, next);
}

/// A queue that is polled: its ring in three pages, and how far both sides are.
pub struct Ring {
    index: u16,
    size: u16,
    event_index: bool,
    /// Where it is.
    pub memory: u64,
    /// Chains offered and given back, counted without end.
    pub offered: u16,
    returned: u16,
}

impl Ring {
    /// Pages of a ring: descriptors, available, used; up to 256 entries.
    pub const PAGES: u64 = 3;

    /// Queue `index` of `size` entries in zeroed memory.
    pub fn new(index: u16, memory: u64, size: u16, event_index: bool) -> Ring {
        Ring {
            index,
            size,
            event_index,
            memory,
            offered: 0,
            returned: 0,
        }
    }

    /// To be set up.
    pub fn queue(&self) -> Queue {
        Queue {
            index: self.index,
            size: self.size,
            vector: None,
            descriptors: self.descriptors(),
            available: self.available(),
            used: self.used(),
        }
    }

    /// Where its descriptors are.
    pub fn descriptors(&self) -> u64 {
        self.memory
    }

    fn available(&self) -> u64 {
        self.memory + PAGE
    }

    fn used(&self) -> u64 {
        self.memory + 2 * PAGE
    }

    /// Says that the device need not interrupt: by the flag, or by an index that has just passed.
    pub fn want_no_interrupts(&self) {
        if self.event_index {
            let event = self.available() + 4 + 2 * u64::from(self.size);
            put(event, self.returned.wrapping_sub(1));
        } else {
            put(self.available(), NO_INTERRUPT);
        }
    }

    /// Offers the chain that begins at descriptor `head`.
    pub fn offer(&mut self, head: u16) {
        let slot = self.available() + 4 + 2 * u64::from(self.offered % self.size);
        put(slot, head);
        self.offered = self.offered.wrapping_add(1);
        fence(Ordering::SeqCst);
        put(self.available() + 2, self.offered);
    }

    /// Chains that the device has.
    pub fn under_way(&self) -> u16 {
        self.offered.wrapping_sub(self.returned)
    }

    /// The next chain that was given back: where it begins and how many bytes were written.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if get::<u16>(self.used() + 2) == self.returned {
            return None;
        }
        fence(Ordering::SeqCst);
        let entry = self.used() + 4 + 8 * u64::from(self.returned % self.size);
        self.returned = self.returned.wrapping_add(1);
        if self.event_index {
            self.want_no_interrupts();
        }
        Some(((get::<u32>(entry) & 0xffff) as u16, get::<u32>(entry + 4)))
    }

    /// Rings the doorbell for what was offered since `before`, if the device wants to hear of it (2.7.7 and 2.7.10).
    pub fn ring_from(&self, registers: &Registers, before: u16) {
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event: u16 = get(self.used() + 4 + 8 * u64::from(self.size));
            self.offered.wrapping_sub(event).wrapping_sub(1) < self.offered.wrapping_sub(before)
        } else {
            get::<u16>(self.used()) & NO_DOORBELL == 0
        };
        if wanted {
            ring(registers, self.index);
        }
    }
}
