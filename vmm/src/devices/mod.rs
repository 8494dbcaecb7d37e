//! What a guest finds at its I/O ports and addresses beside what KVM emulates.
//!
//! | ports | device |
//! | --- | --- |
//! | 0x3f8..=0x3ff | serial port, IRQ 4: the console |
//! | 0x600..=0x603, 0x620..=0x623, 0x640..=0x64b | ACPI's events: the power button, slots that change: see [`acpi`] |
//! | 0x604 | ACPI's PM1a control as QEMU places it: sleep type 0 with the enable bit (0x2000) powers off |
//! | 0x64 | keyboard controller, of which only the reset line exists: writing 0xfe resets |
//! | 0xcf8..=0xcff | PCI configuration: see [`pci`] |
//!
//! Everything else reads as all ones, as an empty bus does, and ignores writes. Guests are never reset in place: a reset ends
//! the VM with a reason, and its restart policy decides.

pub mod acpi;
pub mod attached;
mod complaints;
pub mod console;
pub mod gate;
pub mod pci;
pub mod saved;
pub mod serial;
pub mod virtio;
pub mod wires;

use std::sync::Mutex;

use drover_proto::{Code, Fault};

use self::acpi::Acpi;
use self::attached::Attached;
use self::serial::SerialPort;
use crate::boot::acpi::PM1A_CONTROL as POWER_PORT;
use crate::vcpu::GuestEnd;

const PM1_LAST: u16 = acpi::PM1A_EVENT + acpi::PM1A_EVENT_BYTES as u16 - 1;
const GPE0_LAST: u16 = acpi::GPE0 + acpi::GPE0_BYTES as u16 - 1;
const SLOT_REGISTERS_LAST: u16 = acpi::SLOT_REGISTERS + acpi::SLOT_REGISTER_BYTES as u16 - 1;
/// PM1a control: SLP_EN with sleep type 0 (S5, as QEMU and the probe guest have it), and the bits that say so.
const POWER_OFF: u16 = 0x2000;
const POWER_OFF_BITS: u16 = 0x3c00;
/// PM1a control as it reads: SCI_EN, the machine is in ACPI mode.
const POWER_STATE: u16 = 1;
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

fn powers_off(data: &[u8]) -> bool {
    let value = data
        .iter()
        .rev()
        .fold(0u32, |value, byte| value << 8 | u32::from(*byte));
    data.len() <= 4 && value & u32::from(POWER_OFF_BITS) == u32::from(POWER_OFF)
}

/// The devices of one VM.
pub struct Devices {
    serial: Mutex<SerialPort>,
    /// ACPI's events.
    pub acpi: Acpi,
    /// The bus and what is on it.
    pub attached: Attached,
}

impl Devices {
    /// The devices of a VM.
    pub fn new(serial: SerialPort, acpi: Acpi, attached: Attached) -> Self {
        Self {
            serial: Mutex::new(serial),
            acpi,
            attached,
        }
    }

    /// The serial port.
    pub fn serial(&self) -> std::sync::MutexGuard<'_, SerialPort> {
        self.serial
            .lock()
            .expect("no holder of the serial port's lock panics")
    }

    /// The guest writes `data` to `port`. The result is the VM's end, if the guest asked for it.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<GuestEnd> {
        match port {
            serial::BASE..=serial::LAST => self.serial().write(port, data),
            POWER_PORT if powers_off(data) => return Some(GuestEnd::Exited),
            KEYBOARD_COMMAND if data.first() == Some(&KEYBOARD_RESET) => {
                let message = "the guest reset itself through the keyboard controller";
                return Some(GuestEnd::Failed(Fault::new(Code::GuestTripleFault, message)));
            }
            acpi::PM1A_EVENT..=PM1_LAST
            | acpi::GPE0..=GPE0_LAST
            | acpi::SLOT_REGISTERS..=SLOT_REGISTERS_LAST => {
                let given_up = self.acpi.change(|registers| registers.write(port, data));
                acpi::slots_of(given_up).for_each(|slot| self.attached.unplug(slot));
            }
            pci::ADDRESS_PORT..=pci::DATA_PORT_LAST => self.attached.bus.port_write(port, data),
            _ => {}
        }
        None
    }

    /// The guest reads from `port`.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match port {
            serial::BASE..=serial::LAST => self.serial().read(port, data),
            KEYBOARD_COMMAND => data.fill(0),
            acpi::PM1A_EVENT..=PM1_LAST
            | acpi::GPE0..=GPE0_LAST
            | acpi::SLOT_REGISTERS..=SLOT_REGISTERS_LAST => self.acpi.registers().read(port, data),
            POWER_PORT => {
                data.fill(0);
                data.iter_mut()
                    .zip(POWER_STATE.to_le_bytes())
                    .for_each(|(byte, value)| *byte = value);
            }
            pci::ADDRESS_PORT..=pci::DATA_PORT_LAST => self.attached.bus.port_read(port, data),
            _ => data.fill(0xff),
        }
    }

    /// The guest reads an address that is not memory.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.attached.bus.mmio_read(gpa, data);
    }

    /// The guest writes an address that is not memory.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.attached.bus.mmio_write(gpa, data);
    }
}
