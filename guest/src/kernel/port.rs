//! A virtio console, polled: the console's other way out and in.
//!
//! Source: Virtual I/O Device 1.2, 5.3. One port, by queues 0 (what is typed) and 1 (what is said).

use super::machine;
use super::virtio::{self, PAGE, Registers, Ring, WRITE, get, put};

/// Virtio's vendor, and a console that follows the standard.
const CONSOLE_ID: u32 = 0x1043_1af4;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Lines under way.
const LINES: u16 = 8;
/// Bytes of a line's place.
pub const LINE_BYTES: u64 = PAGE / LINES as u64;
/// Buffers for what is typed, so small that typing crosses them.
const TYPED: u16 = 8;
const TYPED_BYTES: u64 = 24;
/// Pages that the driver and the device share: both rings, lines, what is typed.
pub const PAGES: u64 = 2 * Ring::PAGES + 2;
/// A device that gives no line's place back for so long has ended: the guest goes on.
const WAIT_S: u64 = 20;

/// The console.
pub struct Port {
    registers: Registers,
    receive: Ring,
    transmit: Ring,
    lines: u64,
    typed: u64,
    /// Places of lines that the device does not have, a bit each.
    free: u32,
    /// A buffer that was filled: which, how far it was read, how much is in it.
    open: Option<(u16, u32, u32)>,
    wait: u64,
    /// Lines said, lines that could not be, bytes typed.
    pub counts: [u64; 3],
}

impl Port {
    /// Finds the console and sets it up. `memory`: [`PAGES`] pages.
    pub fn open(memory: u64, ticks_per_s: u64) -> Result<Port, &'static str> {
        let slot = virtio::find(CONSOLE_ID).ok_or("no virtio console on PCI's root bus")?;
        let registers = virtio::open(slot, machine::DISK_VECTOR)?;
        for word in 0..PAGES * PAGE / 8 {
            put(memory + 8 * word, 0u64);
        }
        if !virtio::agree(&registers, 0) {
            return Err("it does not follow the standard");
        }
        let lines = memory + 2 * Ring::PAGES * PAGE;
        let mut port = Port {
            registers,
            receive: Ring::new(RECEIVE, memory, TYPED, false),
            transmit: Ring::new(TRANSMIT, memory + Ring::PAGES * PAGE, LINES, false),
            lines,
            typed: lines + PAGE,
            free: (1 << LINES) - 1,
            open: None,
            wait: WAIT_S * ticks_per_s,
            counts: [0; 3],
        };
        for ring in [&port.receive, &port.transmit] {
            virtio::set_up(&registers, &ring.queue())?;
            ring.want_no_interrupts();
        }
        virtio::start(&registers);
        for index in 0..TYPED {
            let at = port.typed + TYPED_BYTES * u64::from(index);
            virtio::describe(
                port.receive.descriptors(),
                index,
                at,
                TYPED_BYTES as u32,
                WRITE,
                0,
            );
            port.receive.offer(index);
        }
        port.receive.ring_from(&registers, 0);
        Ok(port)
    }

    /// Says a line of at most [`LINE_BYTES`]; false: the device takes none.
    pub fn say(&mut self, line: &[u8]) -> bool {
        let began = machine::counter();
        while self.free == 0 {
            while let Some((index, _)) = self.transmit.take() {
                self.free |= 1 << (index % LINES);
            }
            if self.free == 0 && machine::counter().saturating_sub(began) > self.wait {
                self.counts[1] += 1;
                return false;
            }
            core::hint::spin_loop();
        }
        let index = self.free.trailing_zeros() as u16;
        self.free &= !(1 << index);
        let at = self.lines + LINE_BYTES * u64::from(index);
        for (offset, byte) in (0..LINE_BYTES).zip(line) {
            put(at + offset, *byte);
        }
        let before = self.transmit.offered;
        virtio::describe(self.transmit.descriptors(), index, at, line.len() as u32, 0, 0);
        self.transmit.offer(index);
        self.transmit.ring_from(&self.registers, before);
        self.counts[0] += 1;
        true
    }

    /// The next byte that was typed.
    pub fn typed(&mut self) -> Option<u8> {
        let (index, at, len) = match self.open.take() {
            Some(open) => open,
            None => {
                let (index, len) = self.receive.take()?;
                (index % TYPED, 0, len.min(TYPED_BYTES as u32))
            }
        };
        let byte = (at < len).then(|| get(self.typed + TYPED_BYTES * u64::from(index) + u64::from(at)));
        if at + 1 < len {
            self.open = Some((index, at + 1, len));
        } else {
            let before = self.receive.offered;
            self.receive.offer(index);
            self.receive.ring_from(&self.registers, before);
        }
        self.counts[2] += u64::from(byte.is_some());
        byte
    }
}
