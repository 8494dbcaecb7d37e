//! A console's port and its driver without a guest: two queues on a [`Rig`].

#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::Arc;

use drover_vmm::devices::console::Console;
use drover_vmm::devices::virtio::console::Port;

use super::driver::{DATA, MEMORY_BYTES, Rig, Ring};

/// Where the buffers of each queue are.
pub const INPUT: u64 = DATA;
pub const OUTPUT: u64 = DATA + 0x10_0000;

/// A port, its console and its driver.
pub struct Ported {
    pub rig: Rig,
    pub port: Arc<Port>,
    pub console: Arc<Console>,
    pub receive: Ring,
    pub transmit: Ring,
}

impl Ported {
    /// One that nobody drives yet.
    pub fn new() -> Self {
        let console = Arc::<Console>::default();
        let port = Arc::new(Port::new(console.clone()).unwrap());
        Self {
            rig: Rig::new(port.clone()),
            port,
            console,
            receive: Ring::new(0),
            transmit: Ring::new(1),
        }
    }

    /// All that a driver does first.
    pub fn start(&mut self) {
        self.rig.start();
        self.receive = Ring::new(0);
        self.transmit = Ring::new(1);
        self.transmit.set_up(&self.rig);
    }

    /// A driven one.
    pub fn driven() -> Self {
        let mut made = Self::new();
        made.start();
        made
    }

    /// Gives a buffer for input, of so many bytes.
    pub fn give(&mut self, bytes: u32) {
        self.receive.submit(&self.rig, 0, &[(INPUT, bytes, true)]);
    }

    /// What has come into the buffer that was given last, if it was filled.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        let used = self.receive.used(&self.rig);
        assert!(used.len() <= 1, "one buffer was given: {used:?}");
        used.first()
            .map(|&(_, len)| self.rig.read(INPUT, usize::try_from(len).unwrap()))
    }

    /// Makes a chain with these bytes available.
    pub fn offer(&mut self, bytes: &[u8]) {
        self.rig.write(OUTPUT, bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        self.transmit.submit(&self.rig, 0, &[(OUTPUT, len, false)]);
    }

    /// What stands on the console.
    pub fn text(&self) -> Vec<u8> {
        self.console.read(0, usize::MAX).data
    }

    /// Another VMM's, with this one's memory, state and driver, and the console as the serial port takes it along.
    pub fn moved(&self) -> Self {
        let mut target = Self::new();
        let memory = self.rig.read(0, usize::try_from(MEMORY_BYTES).unwrap());
        target.rig.write(0, &memory);
        let (scrollback, next) = self.console.save();
        target.console.restore(&scrollback, next);
        target.rig.device.restore(&self.rig.device.save()).unwrap();
        target.receive = self.receive.clone();
        target.transmit = self.transmit.clone();
        target
    }
}
