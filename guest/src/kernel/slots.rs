//! The slots' registers: what came into a slot, and what is to be given up. Looked at, not waited for.
//!
//! Their event's interrupt is served by nobody and its line stays masked; enabling it says that the registers are looked at.

use super::machine;
use super::time::Clock;
use super::virtio;

/// The event's enable bits, what was filled, what is to be given up, giving up.
const EVENTS_ENABLED: u16 = 0x622;
const SLOTS_EVENT: u16 = 2;
const SLOTS_FILLED: u16 = 0x640;
const SLOTS_ASKED: u16 = 0x644;
const SLOTS_GIVEN_UP: u16 = 0x648;
/// Between two looks at them.
const LOOK_MS: u64 = 20;

/// When to look next.
pub struct Slots {
    clock_khz: u64,
    next_look: u64,
}

/// What there was to be seen.
pub struct Look {
    filled: u32,
    asked: u32,
}

impl Slots {
    /// Says that the registers are looked at from now on.
    pub fn watch(clock: &Clock) -> Slots {
        machine::port_write_word(EVENTS_ENABLED, SLOTS_EVENT);
        Slots {
            clock_khz: clock.tsc_khz,
            next_look: 0,
        }
    }

    /// Looks, if it is time and there is something.
    pub fn look(&mut self) -> Option<Look> {
        let now = machine::counter();
        if now < self.next_look {
            return None;
        }
        self.next_look = now + LOOK_MS * self.clock_khz;
        let look = Look {
            filled: machine::port_read_long(SLOTS_FILLED),
            asked: machine::port_read_long(SLOTS_ASKED),
        };
        (look.filled | look.asked != 0).then_some(look)
    }
}

impl Look {
    /// The lowest slot that a device of this id came into. It is acknowledged: who takes it has it.
    pub fn take(&self, id: u32) -> Option<u32> {
        let mut filled = (0..u32::BITS).filter(|slot| self.filled >> slot & 1 == 1);
        let slot = filled.find(|&slot| virtio::id(slot) == id)?;
        machine::port_write_long(SLOTS_FILLED, 1 << slot);
        Some(slot)
    }

    /// Whether the slot is to be given up.
    pub fn asks(&self, slot: u32) -> bool {
        self.asked >> slot & 1 == 1
    }
}

/// Gives a slot up: nothing of its device is used any more.
pub fn give_up(slot: u32) {
    machine::port_write_long(SLOTS_GIVEN_UP, 1 << slot);
}
