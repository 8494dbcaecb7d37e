//! ACPI's fixed registers and the slots' hot-plug registers: how the host asks a guest to shut down, to look at a slot, or to give one up.
//!
//! | ports | register | |
//! | --- | --- | --- |
//! | 0x600, 0x602 | PM1a status, enable (ACPI 6.4, 4.8.3.1) | of their events the power button alone exists |
//! | 0x620, 0x622 | GPE0 status, enable (4.8.4.1) | event 1: something is to be read at 0x640 or 0x644 |
//! | 0x640 | slots that were filled, a bit a slot | a 1 written acknowledges |
//! | 0x644 | slots that are to be given up | a 1 written acknowledges; the wish stays |
//! | 0x648 | | a 1 written gives the slot up, if that is wished; reads as 0 |
//!
//! ```text
//!   press, filled, ask ──► status & enable ──► IRQ 9 (level) ──► the guest's ACPI interpreter ──► its drivers
//! ```
//!
//! Event 1 has no memory of its own: it is there as long as anything at 0x640 or 0x644 is not acknowledged, so that none is lost however
//! a guest orders its reads, its acknowledgements and its enabling. A slot is given up only where the host has asked for it: what a
//! guest writes by itself removes nothing, since what it has is not its own to decide. Pure; [`Acpi`] adds the lock and the line.

use std::sync::{Mutex, MutexGuard};

use super::pci::SLOTS;

/// PM1a event registers, where QEMU's q35 has them: status, enable.
pub const PM1A_EVENT: u16 = 0x600;
/// Bytes of them.
pub const PM1A_EVENT_BYTES: u8 = 4;
/// General-purpose events 0: status, enable.
pub const GPE0: u16 = 0x620;
/// Bytes of them: 16 events.
pub const GPE0_BYTES: u8 = 4;
/// The event that says that slots changed.
pub const GPE_SLOTS: u8 = 1;
/// The slots' registers.
pub const SLOT_REGISTERS: u16 = 0x640;
/// Bytes of them.
pub const SLOT_REGISTER_BYTES: u8 = 12;
/// Interrupt of ACPI events: level, active high.
pub const SCI_IRQ: u8 = 9;

const PM1_LAST: u16 = PM1A_EVENT + PM1A_EVENT_BYTES as u16 - 1;
const GPE0_LAST: u16 = GPE0 + GPE0_BYTES as u16 - 1;
const SLOTS_LAST: u16 = SLOT_REGISTERS + SLOT_REGISTER_BYTES as u16 - 1;

const POWER_BUTTON: u16 = 1 << 8;
const SLOTS_EVENT: u16 = 1 << GPE_SLOTS;
/// Slot 0 is the host bridge's.
const SLOT_BITS: u32 = !1;

fn bit(slot: usize) -> u32 {
    assert!((1..SLOTS).contains(&slot), "a slot of the bus");
    1 << slot
}

/// The registers. All of it is saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    pub(super) pm1_status: u16,
    pub(super) pm1_enable: u16,
    pub(super) gpe_enable: u16,
    /// Filled, and not acknowledged.
    pub(super) filled: u32,
    /// To be given up, and not acknowledged.
    pub(super) asked: u32,
    /// To be given up.
    pub(super) leaving: u32,
}

impl Registers {
    /// Registers that were saved, if they can be.
    pub fn saved(
        pm1_status: u32,
        pm1_enable: u32,
        gpe_enable: u32,
        [filled, asked, leaving]: [u32; 3],
    ) -> Result<Self, String> {
        let known = |what: &str, value: u32, bits: u16| match value & !u32::from(bits) {
            0 => Ok(value as u16),
            _ => Err(format!("acpi {what} is {value:#x}, of which {bits:#x} exist")),
        };
        if (filled | leaving) & !SLOT_BITS != 0 || asked & !leaving != 0 {
            return Err(format!(
                "acpi slots {filled:#x}, {asked:#x}, {leaving:#x} are none that can be"
            ));
        }
        Ok(Self {
            pm1_status: known("pm1_status", pm1_status, POWER_BUTTON)?,
            pm1_enable: known("pm1_enable", pm1_enable, POWER_BUTTON)?,
            gpe_enable: known("gpe_enable", gpe_enable, SLOTS_EVENT)?,
            filled,
            asked,
            leaving,
        })
    }

    fn gpe_status(&self) -> u16 {
        if self.filled | self.asked == 0 {
            0
        } else {
            SLOTS_EVENT
        }
    }

    /// Whether the interrupt's line is up.
    pub fn interrupts(&self) -> bool {
        self.pm1_status & self.pm1_enable != 0 || self.gpe_status() & self.gpe_enable != 0
    }

    /// Whether the guest has a driver for the power button.
    pub fn heeds_button(&self) -> bool {
        self.pm1_enable & POWER_BUTTON != 0
    }

    /// Whether the guest has a driver for its slots.
    pub fn heeds_slots(&self) -> bool {
        self.gpe_enable & SLOTS_EVENT != 0
    }

    /// Whether it holds what a VMM that knows no such registers would lose, and somebody would miss. That the guest heeds them is none: it then
    /// is as one whose kernel lacks the drivers.
    pub fn is_in_use(&self) -> bool {
        self.filled | self.asked | self.leaving != 0
    }

    /// Presses the power button.
    pub fn press(&mut self) {
        self.pm1_status |= POWER_BUTTON;
    }

    /// There is a device in `slot` now.
    pub fn fill(&mut self, slot: usize) {
        self.filled |= bit(slot);
    }

    /// Asks the guest to give up the device in `slot`; asking again reminds it.
    pub fn ask(&mut self, slot: usize) {
        self.asked |= bit(slot);
        self.leaving |= bit(slot);
    }

    /// Whether the device in `slot` is to be given up.
    pub fn leaves(&self, slot: usize) -> bool {
        self.leaving & bit(slot) != 0
    }

    /// There is nothing in `slot` any more, or never was.
    pub fn forget(&mut self, slot: usize) {
        for slots in [&mut self.filled, &mut self.asked, &mut self.leaving] {
            *slots &= !bit(slot);
        }
    }

    fn byte(&self, port: u16) -> u8 {
        let of = |value: u32, at: u16| value.to_le_bytes()[usize::from(at % 4)];
        match port {
            PM1A_EVENT..=PM1_LAST => of(
                u32::from(self.pm1_status) | u32::from(self.pm1_enable) << 16,
                port - PM1A_EVENT,
            ),
            GPE0..=GPE0_LAST => of(
                u32::from(self.gpe_status()) | u32::from(self.gpe_enable) << 16,
                port - GPE0,
            ),
            SLOT_REGISTERS..=SLOTS_LAST => match (port - SLOT_REGISTERS) / 4 {
                0 => of(self.filled, port - SLOT_REGISTERS),
                1 => of(self.asked, port - SLOT_REGISTERS),
                _ => 0,
            },
            _ => 0xff,
        }
    }

    /// The guest reads from `port` on.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        for (offset, byte) in (0..).zip(data) {
            *byte = self.byte(port.wrapping_add(offset));
        }
    }

    /// The guest writes from `port` on. Returns the slots that it gives up, of those that it was asked for; they are forgotten here.
    pub fn write(&mut self, port: u16, data: &[u8]) -> u32 {
        let mut given_up = 0;
        for (offset, &byte) in (0..).zip(data) {
            let port = port.wrapping_add(offset);
            let at = |block: u16| u32::from(byte) << (8 * (u32::from(port - block) % 4));
            match port {
                PM1A_EVENT..=PM1_LAST => {
                    let (clear, enable) = halves(at(PM1A_EVENT));
                    self.pm1_status &= !clear;
                    let which = halves(0xff << (8 * u32::from(port - PM1A_EVENT))).1;
                    self.pm1_enable = (self.pm1_enable & !which | enable) & POWER_BUTTON;
                }
                GPE0..=GPE0_LAST => {
                    let which = halves(0xff << (8 * u32::from(port - GPE0))).1;
                    self.gpe_enable = (self.gpe_enable & !which | halves(at(GPE0)).1) & SLOTS_EVENT;
                }
                SLOT_REGISTERS..=SLOTS_LAST => match (port - SLOT_REGISTERS) / 4 {
                    0 => self.filled &= !at(SLOT_REGISTERS),
                    1 => self.asked &= !at(SLOT_REGISTERS),
                    _ => given_up |= at(SLOT_REGISTERS) & self.leaving,
                },
                _ => {}
            }
        }
        for slots in [&mut self.filled, &mut self.asked, &mut self.leaving] {
            *slots &= !given_up;
        }
        given_up
    }
}

/// The lower and the upper 16 bits.
fn halves(value: u32) -> (u16, u16) {
    let [a, b, c, d] = value.to_le_bytes();
    (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
}

/// The slots of a mask.
pub fn slots_of(mask: u32) -> impl Iterator<Item = usize> {
    (1..SLOTS).filter(move |&slot| mask & bit(slot) != 0)
}

/// An interrupt's line.
pub trait Line: Send + Sync {
    /// Puts it up or down.
    fn set(&self, up: bool);
}

/// The registers of a VM with the line that they drive.
pub struct Acpi {
    registers: Mutex<Registers>,
    line: Box<dyn Line>,
}

impl Acpi {
    /// Registers as after a reset.
    pub fn new(line: Box<dyn Line>) -> Self {
        Self {
            registers: Mutex::default(),
            line,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .expect("no holder of the ACPI registers' lock panics")
    }

    /// The registers as they are now.
    pub fn registers(&self) -> Registers {
        *self.lock()
    }

    /// Changes them, and puts the line where it belongs then.
    pub fn change<T>(&self, change: impl FnOnce(&mut Registers) -> T) -> T {
        let mut registers = self.lock();
        let was = registers.interrupts();
        let result = change(&mut registers);
        let is = registers.interrupts();
        if was != is {
            self.line.set(is);
        }
        result
    }

    /// Takes over saved ones. The interrupt controllers, restored before, do not know who held the line up.
    pub fn restore(&self, saved: Registers) {
        let mut registers = self.lock();
        *registers = saved;
        self.line.set(saved.interrupts());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use proptest::prelude::*;

    use super::*;

    fn word(registers: &Registers, port: u16) -> u32 {
        let mut bytes = [0; 4];
        registers.read(port, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn the_button_interrupts_who_heeds_it_until_that_is_acknowledged() {
        let mut registers = Registers::default();
        registers.press();
        assert!(!registers.interrupts() && !registers.heeds_button());
        registers.write(PM1A_EVENT + 2, &0xffffu16.to_le_bytes());
        assert_eq!(
            word(&registers, PM1A_EVENT),
            0x0100_0100,
            "of all events only this one exists"
        );
        assert!(registers.interrupts() && registers.heeds_button());
        registers.write(PM1A_EVENT, &[0xff]);
        assert!(registers.interrupts(), "another byte's bits");
        registers.write(PM1A_EVENT, &0x100u16.to_le_bytes());
        assert!(!registers.interrupts() && registers.heeds_button());
        registers.write(PM1A_EVENT + 3, &[0]);
        assert!(!registers.heeds_button());
    }

    #[test]
    fn a_filled_slot_is_told_until_it_is_acknowledged_however_early_it_was_filled() {
        let mut registers = Registers::default();
        registers.fill(3);
        registers.write(GPE0, &[0xff, 0xff]);
        registers.write(GPE0 + 2, &[0xff, 0xff]);
        assert!(
            registers.interrupts(),
            "filled before the guest looked, and not acknowledged by the event's own bit"
        );
        assert_eq!(
            (word(&registers, GPE0), word(&registers, SLOT_REGISTERS)),
            (0x2_0002, 8)
        );
        registers.write(SLOT_REGISTERS, &8u32.to_le_bytes());
        assert!(!registers.interrupts() && !registers.is_in_use());
    }

    #[test]
    fn only_a_slot_that_is_asked_for_is_given_up_and_a_reminder_tells_again() {
        let mut registers = Registers::default();
        registers.write(GPE0 + 2, &[2, 0]);
        let eject = SLOT_REGISTERS + 8;
        assert_eq!(registers.write(eject, &u32::MAX.to_le_bytes()), 0);
        registers.ask(31);
        registers.write(SLOT_REGISTERS + 4, &u32::MAX.to_le_bytes());
        assert!(!registers.interrupts() && registers.leaves(31) && registers.is_in_use());
        registers.ask(31);
        assert!(registers.interrupts());
        assert_eq!(registers.write(eject, &u32::MAX.to_le_bytes()), 1 << 31);
        assert!(!registers.interrupts() && !registers.is_in_use());
        assert_eq!(slots_of(1 << 31 | 2).collect::<Vec<_>>(), [1, 31]);
    }

    #[test]
    fn what_no_guest_can_have_left_is_not_taken_over() {
        for (pm1, gpe, slots) in [
            (1, 0, [0; 3]),
            (0, 1, [0; 3]),
            (0, 0, [1, 0, 0]),
            (0, 0, [0, 2, 0]),
        ] {
            assert!(Registers::saved(pm1, 0, gpe, slots).is_err());
        }
    }

    struct Wire(Arc<AtomicBool>);

    impl Line for Wire {
        fn set(&self, up: bool) {
            self.0.store(up, Ordering::SeqCst);
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Read(u16, usize),
        Write(u16, Vec<u8>),
        Press,
        Fill(usize),
        Ask(usize),
        Forget(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let port = || prop_oneof![0x5f0..0x660u16, any::<u16>()];
        prop_oneof![
            (port(), 0usize..9).prop_map(|(port, len)| Step::Read(port, len)),
            (port(), proptest::collection::vec(any::<u8>(), 0..9))
                .prop_map(|(port, data)| Step::Write(port, data)),
            Just(Step::Press),
            (1usize..32).prop_map(Step::Fill),
            (1usize..32).prop_map(Step::Ask),
            (1usize..32).prop_map(Step::Forget),
        ]
    }

    proptest! {
        #[test]
        fn whatever_is_done_the_line_follows_and_what_is_left_can_be_saved(steps in proptest::collection::vec(step(), 1..80)) {
            let up = Arc::new(AtomicBool::new(false));
            let acpi = Acpi::new(Box::new(Wire(up.clone())));
            let mut asked = 0u32;
            for step in steps {
                match step {
                    Step::Read(port, len) => acpi.registers().read(port, &mut vec![0; len]),
                    Step::Write(port, data) => {
                        let given_up = acpi.change(|registers| registers.write(port, &data));
                        prop_assert_eq!(given_up & !asked, 0, "given up unasked");
                        asked &= !given_up;
                    }
                    Step::Press => acpi.change(Registers::press),
                    Step::Fill(slot) => acpi.change(|registers| registers.fill(slot)),
                    Step::Ask(slot) => {
                        asked |= 1 << slot;
                        acpi.change(|registers| registers.ask(slot));
                    }
                    Step::Forget(slot) => {
                        asked &= !(1 << slot);
                        acpi.change(|registers| registers.forget(slot));
                    }
                }
                let now = acpi.registers();
                prop_assert_eq!(up.load(Ordering::SeqCst), now.interrupts());
                prop_assert_eq!(now.leaving, asked);
                let (status, enable, events) = (now.pm1_status.into(), now.pm1_enable.into(), now.gpe_enable.into());
                prop_assert_eq!(Registers::saved(status, enable, events, [now.filled, now.asked, now.leaving]), Ok(now));
            }
        }
    }
}
