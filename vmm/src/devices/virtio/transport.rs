//! The registers by which a driver and its device agree: status, features, queues (4.1.4.3). Pure but for looking at memory's extent.
//!
//! ```text
//!   reset ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► queues ─► DRIVER_OK: the device works
//!     ▲                                                           │
//!     └── 0 is written, once nothing is under way ◄──────────────┴─► DEVICE_NEEDS_RESET: it stands
//! ```
//!
//! A reset that is asked for while requests are under way is done when the last has ended; until then the status reads as it was
//! (2.4.1 has drivers wait for 0). Only bits that the driver may set at its step are taken; features can change until FEATURES_OK,
//! queues until they are switched on.

use super::queue::{Broken, Queue};
use super::{F_VERSION_1, NO_VECTOR};
use crate::memory::Mapped;

/// Device status bits (2.1).
pub mod status {
    /// The guest has seen the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// The features are agreed.
    pub const FEATURES_OK: u8 = 8;
    /// The device has met something it cannot go on from.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}

/// Bytes of the registers.
pub const BYTES: usize = 64;
/// The interrupt is for a queue; for a change of the configuration (4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// The registers of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transport {
    /// What the device offers.
    pub offered: u64,
    /// What the driver has accepted.
    pub accepted: u64,
    /// Which half of [`Self::offered`] is read.
    pub offered_select: u32,
    /// Which half of [`Self::accepted`] is written.
    pub accepted_select: u32,
    /// The vector of changes of the configuration.
    pub config_vector: u16,
    /// See [`status`].
    pub status: u8,
    /// Counts changes of the device's configuration.
    pub generation: u8,
    /// The queue whose registers are shown.
    pub queue_select: u16,
    /// Interrupts that were not acknowledged by a read.
    pub isr: u8,
    /// The queues.
    pub queues: Vec<Queue>,
    /// A reset waits until nothing is under way.
    pub resetting: bool,
    vectors: u16,
}

impl Transport {
    /// Registers after a reset; `vectors` MSI-X vectors can be chosen.
    pub fn new(offered: u64, queues: &[u16], vectors: u16) -> Self {
        Self {
            offered: offered | F_VERSION_1,
            accepted: 0,
            offered_select: 0,
            accepted_select: 0,
            config_vector: NO_VECTOR,
            status: 0,
            generation: 0,
            queue_select: 0,
            isr: 0,
            queues: queues.iter().map(|&size| Queue::new(size)).collect(),
            resetting: false,
            vectors,
        }
    }

    /// Whether chains may be taken.
    pub fn works(&self) -> bool {
        let of_interest = status::DRIVER_OK | status::NEEDS_RESET | status::FAILED;
        self.status & of_interest == status::DRIVER_OK && !self.resetting
    }

    /// All as after a reset.
    pub fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.size_max).collect();
        *self = Self::new(self.offered, &sizes, self.vectors);
    }

    /// The device's configuration is another now. Returns the vector that tells a driver that is ready.
    pub fn config_changed(&mut self) -> Option<u16> {
        self.generation = self.generation.wrapping_add(1);
        if !self.works() {
            return None;
        }
        self.isr |= ISR_CONFIG;
        Some(self.config_vector)
    }

    /// The vector that tells of changes of the configuration, if the driver was ever told of one and may have missed it.
    pub fn config_missed(&self) -> Option<u16> {
        (self.works() && self.isr & ISR_CONFIG != 0).then_some(self.config_vector)
    }

    /// The device cannot go on until it is reset. Returns the vector that tells a driver that is ready.
    pub fn break_down(&mut self) -> Option<u16> {
        let told = self.status & status::DRIVER_OK != 0 && self.status & status::NEEDS_RESET == 0;
        self.status |= status::NEEDS_RESET;
        if !told {
            return None;
        }
        self.isr |= ISR_CONFIG;
        Some(self.config_vector)
    }

    /// Chains of queue `queue` were given back. Returns the vector that tells the driver.
    pub fn used(&mut self, queue: usize) -> u16 {
        self.isr |= ISR_QUEUE;
        self.queues[queue].vector
    }

    /// The guest reads the interrupt status, which acknowledges it.
    pub fn take_isr(&mut self) -> u8 {
        std::mem::take(&mut self.isr)
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(usize::from(self.queue_select))
    }

    fn half(features: u64, select: u32) -> u32 {
        match select {
            0 | 1 => u32::try_from(features >> (32 * select) & u64::from(u32::MAX)).expect("32 bits"),
            _ => 0,
        }
    }

    fn image(&self) -> [u8; BYTES] {
        let mut image = [0; BYTES];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.offered_select.to_le_bytes());
        put(4, &Self::half(self.offered, self.offered_select).to_le_bytes());
        put(8, &self.accepted_select.to_le_bytes());
        put(12, &Self::half(self.accepted, self.accepted_select).to_le_bytes());
        put(16, &self.config_vector.to_le_bytes());
        let count = u16::try_from(self.queues.len()).expect("a device has few queues");
        put(18, &count.to_le_bytes());
        put(20, &[self.status, self.generation]);
        put(22, &self.queue_select.to_le_bytes());
        // A queue that does not exist has the size 0.
        if let Some(queue) = self.queue() {
            put(24, &queue.size.to_le_bytes());
            put(26, &queue.vector.to_le_bytes());
            put(28, &u16::from(queue.enabled).to_le_bytes());
            put(30, &self.queue_select.to_le_bytes());
            put(32, &queue.descriptors.to_le_bytes());
            put(40, &queue.available.to_le_bytes());
            put(48, &queue.used.to_le_bytes());
        }
        image
    }

    /// The guest reads the registers.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let image = self.image();
        for (at, byte) in (offset..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    /// The guest writes a register, by its own width (4.1.3.1: 64 bits may go in two halves); any other access is ignored. `busy`: requests
    /// are under way. What the driver did that it must not is an error, and the registers stay as they were.
    pub fn write(&mut self, offset: usize, data: &[u8], busy: bool, memory: &Mapped) -> Result<(), Broken> {
        let value = data
            .iter()
            .take(8)
            .rev()
            .fold(0u64, |value, &byte| value << 8 | u64::from(byte));
        let word = (value & u64::from(u32::MAX)) as u32;
        let half = (value & 0xffff) as u16;
        match (offset, data.len()) {
            (0, 4) => self.offered_select = word,
            (8, 4) => self.accepted_select = word,
            (12, 4) => self.accept(word),
            (16, 2) => self.config_vector = self.vector(half),
            (20, 1) => self.set_status(data[0], busy),
            (22, 2) => self.queue_select = half,
            (24..56, _) if self.resetting => {}
            (28, 2) => return self.enable(half, memory),
            (24..56, _) => self.write_queue(offset, data.len(), value),
            _ => {}
        }
        Ok(())
    }

    fn vector(&self, asked: u16) -> u16 {
        if asked < self.vectors { asked } else { NO_VECTOR }
    }

    fn accept(&mut self, word: u32) {
        if self.accepted_select > 1 || self.status & status::FEATURES_OK != 0 {
            return;
        }
        let shift = 32 * self.accepted_select;
        self.accepted = self.accepted & !(u64::from(u32::MAX) << shift) | u64::from(word) << shift;
    }

    fn set_status(&mut self, asked: u8, busy: bool) {
        if asked == 0 {
            if busy {
                self.resetting = true;
            } else {
                self.reset();
            }
            return;
        }
        if self.resetting {
            return;
        }
        let mut new = asked & !status::NEEDS_RESET & !self.status;
        let agreed = self.accepted & !self.offered == 0 && self.accepted & F_VERSION_1 != 0;
        if !agreed {
            new &= !status::FEATURES_OK;
        }
        if (self.status | new) & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.status |= new;
    }

    fn write_queue(&mut self, offset: usize, width: usize, value: u64) {
        let vector = self.vector((value & 0xffff) as u16);
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        if (offset, width) == (26, 2) {
            queue.vector = vector;
            return;
        }
        if queue.enabled {
            return;
        }
        let place = match offset {
            24 if width == 2 => {
                queue.size = (value & 0xffff) as u16;
                return;
            }
            32..40 => &mut queue.descriptors,
            40..48 => &mut queue.available,
            48..56 => &mut queue.used,
            _ => return,
        };
        match (offset % 8, width) {
            (0, 8) => *place = value,
            (0, 4) => *place = *place & !u64::from(u32::MAX) | value,
            (4, 4) => *place = *place & u64::from(u32::MAX) | value << 32,
            _ => {}
        }
    }

    fn enable(&mut self, value: u16, memory: &Mapped) -> Result<(), Broken> {
        let agreed = self.status & status::FEATURES_OK != 0;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return Ok(());
        };
        if value != 1 || queue.enabled || !agreed {
            return Ok(());
        }
        queue.check(memory)?;
        queue.enabled = true;
        Ok(())
    }

    /// What is wrong with registers that were saved elsewhere, if anything.
    pub fn check(&self, memory: &Mapped) -> Result<(), String> {
        let fits = |vector: u16| vector == NO_VECTOR || vector < self.vectors;
        if self.resetting || !fits(self.config_vector) {
            return Err("the registers of a device that cannot be".to_owned());
        }
        if self.status & status::FEATURES_OK != 0 && self.accepted & !self.offered != 0 {
            return Err(format!(
                "features {:#x} were accepted, this device offers {:#x}",
                self.accepted, self.offered
            ));
        }
        for (index, queue) in self.queues.iter().enumerate() {
            if !fits(queue.vector) {
                return Err(format!("queue {index} has vector {}", queue.vector));
            }
            if queue.enabled {
                queue
                    .check(memory)
                    .map_err(|broken| format!("queue {index}: {}", broken.0))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::Memory;

    fn memory() -> Memory {
        Memory::new(1 << 20, false).unwrap()
    }

    fn transport() -> Transport {
        Transport::new(1 << 9, &[256, 64], 3)
    }

    fn set(transport: &mut Transport, memory: &Memory, offset: usize, data: &[u8]) -> Result<(), Broken> {
        transport.write(offset, data, false, memory.mapped())
    }

    /// As a driver does it, up to and with FEATURES_OK.
    fn agree(transport: &mut Transport, memory: &Memory, features: u64) -> bool {
        for bit in [status::ACKNOWLEDGE, status::DRIVER] {
            set(transport, memory, 20, &[bit]).unwrap();
        }
        for half in [0u32, 1] {
            set(transport, memory, 8, &half.to_le_bytes()).unwrap();
            let word = (features >> (32 * half) & u64::from(u32::MAX)) as u32;
            set(transport, memory, 12, &word.to_le_bytes()).unwrap();
        }
        set(transport, memory, 20, &[status::FEATURES_OK]).unwrap();
        transport.status & status::FEATURES_OK != 0
    }

    #[test]
    fn features_are_agreed_only_if_offered_and_only_with_version_1() {
        let memory = memory();
        for (features, ok) in [
            (F_VERSION_1, true),
            (F_VERSION_1 | 1 << 9, true),
            (1 << 9, false),
            (F_VERSION_1 | 1 << 10, false),
        ] {
            let mut transport = transport();
            assert_eq!(agree(&mut transport, &memory, features), ok, "{features:#x}");
            set(&mut transport, &memory, 20, &[status::DRIVER_OK]).unwrap();
            assert_eq!(transport.works(), ok);
        }
    }

    #[test]
    fn a_queue_is_switched_on_only_where_all_of_it_is_memory() {
        let memory = memory();
        let mut transport = transport();
        agree(&mut transport, &memory, F_VERSION_1);
        for (offset, at) in [(32usize, 0x1000u64), (40, 0x2000), (48, 0x10_0000 - 0x100)] {
            set(&mut transport, &memory, offset, &at.to_le_bytes()).unwrap();
        }
        assert!(
            set(&mut transport, &memory, 28, &[1, 0]).is_err(),
            "a ring beyond memory"
        );
        set(&mut transport, &memory, 48, &0x3000u32.to_le_bytes()).unwrap();
        set(&mut transport, &memory, 24, &[3, 0]).unwrap();
        assert!(
            set(&mut transport, &memory, 28, &[1, 0]).is_err(),
            "three is no power of two"
        );
        set(&mut transport, &memory, 24, &[64, 0]).unwrap();
        set(&mut transport, &memory, 28, &[1, 0]).unwrap();
        set(&mut transport, &memory, 24, &[128, 0]).unwrap();
        assert_eq!(
            (transport.queues[0].enabled, transport.queues[0].size),
            (true, 64)
        );
    }

    #[test]
    fn a_reset_waits_for_what_is_under_way() {
        let memory = memory();
        let mut transport = transport();
        agree(&mut transport, &memory, F_VERSION_1);
        set(&mut transport, &memory, 20, &[status::DRIVER_OK]).unwrap();
        transport.write(20, &[0], true, memory.mapped()).unwrap();
        assert!(transport.resetting && !transport.works());
        assert_ne!(transport.status, 0);
        transport.reset();
        assert_eq!(transport, super::tests::transport());
    }

    #[test]
    fn a_broken_device_tells_its_driver_once_and_stands() {
        let memory = memory();
        let mut transport = transport();
        agree(&mut transport, &memory, F_VERSION_1);
        set(&mut transport, &memory, 16, &[2, 0]).unwrap();
        set(&mut transport, &memory, 20, &[status::DRIVER_OK]).unwrap();
        assert_eq!(transport.break_down(), Some(2));
        assert_eq!(transport.break_down(), None);
        assert!(!transport.works());
        assert_eq!((transport.take_isr(), transport.take_isr()), (ISR_CONFIG, 0));
    }

    proptest! {
        #[test]
        fn any_access_leaves_registers_that_can_be_saved(
            accesses in proptest::collection::vec((0usize..70, proptest::collection::vec(any::<u8>(), 0..9), any::<bool>()), 1..80),
        ) {
            let memory = memory();
            let mut transport = transport();
            for (offset, bytes, read) in accesses {
                if read {
                    transport.read(offset, &mut vec![0; bytes.len()]);
                } else if set(&mut transport, &memory, offset, &bytes).is_err() {
                    transport.break_down();
                }
                prop_assert!(transport.check(memory.mapped()).is_ok());
                prop_assert!(!transport.works() || transport.status & status::FEATURES_OK != 0);
                prop_assert!(transport.queues.iter().all(|queue| !queue.enabled || queue.size.is_power_of_two()));
            }
        }
    }
}
