//! What a guest finds at its I/O ports and addresses beside what KVM emulates.
//!
//! | ports | device |
//! | --- | --- |
//! | 0x3f8..=0x3ff | serial port, IRQ 4: the console |
//! | 0x600..=0x603 | ACPI's PM1a status and enable: no event ever happens |
//! | 0x604 | ACPI's PM1a control as QEMU places it: sleep type 0 with the enable bit (0x2000) powers off |
//! | 0x64 | keyboard controller, of which only the reset line exists: writing 0xfe resets |
//! | 0xcf8..=0xcff | PCI configuration, where the VM has a bus: see [`pci`] |
//!
//! Everything else reads as all ones, as an empty bus does, and ignores writes. Guests are never reset in place: a reset ends
//! the VM with a reason, and its restart policy decides.

pub mod attached;
mod complaints;
pub mod console;
pub mod gate;
pub mod pci;
pub mod saved;
pub mod serial;
pub mod virtio;
pub mod wires;

use std::sync::{Mutex, OnceLock};

use drover_proto::{Code, Fault};

use self::attached::Attached;
use self::serial::SerialPort;
use crate::boot::acpi;
use crate::vcpu::GuestEnd;

const POWER_PORT: u16 = acpi::PM1A_CONTROL;
const POWER_EVENTS: u16 = acpi::PM1A_EVENT;
const POWER_EVENTS_LAST: u16 = POWER_EVENTS + 3;
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
    attached: OnceLock<Attached>,
}

impl Devices {
    /// The devices of a VM without a bus.
    pub fn new(serial: SerialPort) -> Self {
        Self {
            serial: Mutex::new(serial),
            attached: OnceLock::new(),
        }
    }

    /// Adds a bus with its devices, once, before any vCPU has run.
    pub fn attach(&self, attached: Attached) {
        assert!(self.attached.set(attached).is_ok(), "a VM has one bus");
    }

    /// The bus with its devices, if the VM has one.
    pub fn attached(&self) -> Option<&Attached> {
        self.attached.get()
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
            pci::ADDRESS_PORT..=pci::DATA_PORT_LAST => {
                if let Some(attached) = self.attached() {
                    attached.bus.port_write(port, data);
                }
            }
            _ => {}
        }
        None
    }

    /// The guest reads from `port`.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match port {
            serial::BASE..=serial::LAST => self.serial().read(port, data),
            KEYBOARD_COMMAND | POWER_EVENTS..=POWER_EVENTS_LAST => data.fill(0),
            POWER_PORT => {
                data.fill(0);
                data.iter_mut()
                    .zip(POWER_STATE.to_le_bytes())
                    .for_each(|(byte, value)| *byte = value);
            }
            pci::ADDRESS_PORT..=pci::DATA_PORT_LAST => match self.attached() {
                Some(attached) => attached.bus.port_read(port, data),
                None => data.fill(0xff),
            },
            _ => data.fill(0xff),
        }
    }

    /// The guest reads an address that is not memory.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        match self.attached() {
            Some(attached) => attached.bus.mmio_read(gpa, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes an address that is not memory.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if let Some(attached) = self.attached() {
            attached.bus.mmio_write(gpa, data);
        }
    }
}
