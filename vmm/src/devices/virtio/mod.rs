//! Virtio 1.2 devices on the PCI bus. Source: Virtual I/O Device (VIRTIO) 1.2; numbers in comments are its sections.
//!
//! ```text
//!   guest ──► pci        registers in one region, interrupts, doorbells        (4.1)
//!               ├── transport   status, features, queue set-up                 (2.1–2.4, 4.1.4.3; pure)
//!               ├── queue       chains of buffers in guest memory              (2.7)
//!               └── worker ──►  device: rng, blk, net, balloon, console        (5; a folder each)
//! ```
//!
//! One worker thread a device takes chains, has the device serve them, and gives them back. It works only while the VM may run (see
//! [`super::gate`]). What a driver does wrong makes its device ask to be reset (`DEVICE_NEEDS_RESET`) and stand until then; nothing else.

pub mod balloon;
pub mod blk;
pub mod buffers;
pub mod console;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod transport;
pub mod worker;

use std::os::fd::BorrowedFd;

use self::queue::{Broken, Chain};
use super::gate::Begun;
use super::saved::SavedDevice;
use crate::memory::Mapped;

/// The device follows this standard, not the drafts before it (6).
pub const F_VERSION_1: u64 = 1 << 32;
/// Descriptors may stand in a table of their own (6).
pub const F_INDIRECT: u64 = 1 << 28;
/// No MSI-X vector (4.1.4.3).
pub const NO_VECTOR: u16 = 0xffff;

/// What a device does, apart from how it is reached.
pub trait Device: Send + Sync + 'static {
    /// Its number (5).
    fn id(&self) -> u16;
    /// PCI class: base, sub, interface.
    fn class(&self) -> [u8; 3];
    /// The features it offers of its own, beside the transport's.
    fn features(&self) -> u64;
    /// The largest size of each of its queues.
    fn queues(&self) -> &'static [u16];
    /// The guest reads its configuration, at `offset`; beyond its end stand zeroes, with which `data` comes.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// The guest writes its configuration, at `offset`, perhaps beyond its end.
    fn write_config(&self, _offset: usize, _data: &[u8]) {}
    /// Whether serving chains of `queue` makes pages of memory holes.
    fn makes_holes(&self, _queue: usize) -> bool {
        false
    }
    /// Serves a chain of queue `queue`; the driver has accepted `features`. Returns how many bytes were written to the buffers.
    fn serve(
        &self,
        queue: usize,
        chain: &Chain,
        memory: &Mapped,
        features: u64,
        begun: &Begun<'_>,
    ) -> Result<u32, Broken>;
    /// What it has served last of this queue is the driver's: nothing has reset or broken it meanwhile.
    fn pushed(&self, _queue: usize) {}
    /// The driver has reset it.
    fn reset(&self) {}
    /// What comes to it from outside, if anything does.
    fn inlet(&self) -> Option<&dyn Inlet> {
        None
    }
    /// What is its own of a saved state.
    fn save(&self) -> SavedDevice;
    /// Takes that over, or says why it is another device's.
    fn restore(&self, saved: &SavedDevice) -> Result<(), String>;
}

/// What comes to a device from outside, and into chains that wait for it: one piece is held by the device from when it is taken from its source
/// until chains with room for it have been served.
pub trait Inlet {
    /// The queue whose chains are filled.
    fn queue(&self) -> usize;
    /// The piece that is held, else the next of the source; none: the source is dry.
    fn next(&self, features: u64) -> Option<Incoming>;
    /// No chain of the driver's will ever hold the piece: it is dropped.
    fn refuse(&self);
    /// Readable when the source is not dry.
    fn source(&self) -> BorrowedFd<'_>;
}

/// A piece that came from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// Its size.
    pub bytes: u64,
    /// Whether several chains may hold it together.
    pub several: bool,
}
