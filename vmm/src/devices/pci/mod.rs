//! The PCI bus: one root bus whose devices a guest finds, places and programs.
//!
//! ```text
//!   ports 0xcf8, 0xcfc ──► bus ──► config   what a device is, where its registers lie       (pure)
//!   addresses in MMIO  ──►     └─► device   its registers; msix: its interrupts             (pure, but for the device's own work)
//! ```
//!
//! Configuration goes by the two ports alone (PCI Local Bus 3.0, 3.2.2.3.2); the 4 KiB of extended configuration space, which needs a
//! memory window of its own, have nothing in them that a device here offers. Interrupts are messages (MSI-X) and nothing else: no device
//! has a pin, so no routing table describes one.
//!
//! A guest may place registers anywhere in [`MMIO`], where no memory can ever be, and devices on top of each other, where the lower
//! slot answers. Registers placed elsewhere are heard by nobody.

pub mod bus;
pub mod config;
pub mod msix;

use std::ops::Range;

/// Where registers of devices may lie. From above the highest memory below 4 GiB to well below the I/O APIC.
pub const MMIO: Range<u64> = 0xc000_0000..0xe000_0000;
/// Slots of the bus; the first is the host bridge's.
pub const SLOTS: usize = 32;
/// Selects a device and a register, 32 bits.
pub const ADDRESS_PORT: u16 = 0xcf8;
/// The selected register, 32 bits; its last port is [`DATA_PORT_LAST`].
pub const DATA_PORT: u16 = 0xcfc;
/// The last byte of the selected register.
pub const DATA_PORT_LAST: u16 = DATA_PORT + 3;

/// One device of the bus. Every access is of 1 to 8 bytes, at any offset; what a device does not know reads as zero and takes no write.
pub trait PciDevice: Send + Sync {
    /// The guest reads `data.len()` bytes of its configuration, at `offset` below 256.
    fn config_read(&self, offset: usize, data: &mut [u8]);
    /// The guest writes its configuration.
    fn config_write(&self, offset: usize, data: &[u8]);
    /// The region and the offset in it that the guest has placed at `gpa`, if the whole access lies in it.
    fn decode(&self, gpa: u64, len: usize) -> Option<(usize, u64)>;
    /// The guest reads region `bar`.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);
    /// The guest writes region `bar`.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);
}
