//! A virtio NIC on which a station answers: see [`drover_probe::echo`].
//!
//! Source: Virtual I/O Device 1.2, 5.1. No offloads, so that each frame is as it was on the wire; each buffer is one descriptor, each frame one
//! buffer. Frames are found by polling, a step at a time between the worker's; the interrupts of those that come wake an idle processor and are
//! counted.

use core::sync::atomic::{Ordering, fence};

use drover_probe::echo::{FRAME_MAX, Station};
use drover_probe::report::NetSecond;

use super::console::say;
use super::machine;
use super::slots::{self, Look};
use super::virtio::{self, PAGE, Queue, Registers, WRITE, get, put};

/// Virtio's vendor, and a NIC that follows the standard.
pub const NIC_ID: u32 = 0x1041_1af4;
/// It has an address.
pub const F_MAC: u32 = 1 << 5;
/// Its queues.
pub const RECEIVE: u16 = 0;
/// See [`RECEIVE`].
pub const TRANSMIT: u16 = 1;

/// Bytes before each frame.
pub const HEADER: u64 = 12;
const BUFFER: u64 = 2048;
const SIZE: u16 = 32;
const AVAILABLE_OFFSET: u64 = 2048;
/// Of each queue: descriptors and the available ring, the used ring, buffers.
const QUEUE_PAGES: u64 = 2 + BUFFER * SIZE as u64 / PAGE;
/// Pages that the driver and the device share.
pub const PAGES: u64 = 2 * QUEUE_PAGES;
/// Frames in one step.
const BATCH: u16 = 16;

/// A queue and its buffers.
struct Ring {
    index: u16,
    memory: u64,
    /// Chains offered and given back, counted without end.
    offered: u16,
    returned: u16,
}

impl Ring {
    fn queue(&self, vector: Option<u16>) -> Queue {
        Queue {
            index: self.index,
            size: SIZE,
            vector,
            descriptors: self.memory,
            available: self.memory + AVAILABLE_OFFSET,
            used: self.memory + PAGE,
        }
    }

    fn buffer(&self, slot: u16) -> u64 {
        self.memory + 2 * PAGE + BUFFER * u64::from(slot)
    }

    fn offer(&mut self, slot: u16, len: u32, flags: u16) {
        virtio::describe(self.memory, slot, self.buffer(slot), len, flags, 0);
        let available = self.memory + AVAILABLE_OFFSET;
        put(available + 4 + 2 * u64::from(self.offered % SIZE), slot);
        self.offered = self.offered.wrapping_add(1);
        fence(Ordering::SeqCst);
        put(available + 2, self.offered);
    }

    /// The next buffer that was given back: its slot and how many bytes were written.
    fn take(&mut self) -> Option<(u16, u64)> {
        if get::<u16>(self.memory + PAGE + 2) == self.returned {
            return None;
        }
        fence(Ordering::SeqCst);
        let entry = self.memory + PAGE + 4 + 8 * u64::from(self.returned % SIZE);
        self.returned = self.returned.wrapping_add(1);
        Some((get::<u32>(entry) as u16 % SIZE, get::<u32>(entry + 4).into()))
    }
}

/// Why there is no NIC.
pub const NO_NIC: &str = "no virtio NIC on PCI's root bus";

/// The place of the one NIC: always the same, or one that may come and go.
pub struct Post {
    memory: u64,
    ip: [u8; 4],
    net: Option<Net>,
}

impl Post {
    /// Opens the NIC that is there; without hot-plug there must be one. `memory`: [`PAGES`] pages.
    pub fn open(memory: u64, ip: [u8; 4], hot_plug: bool) -> Result<Post, &'static str> {
        let net = match virtio::find(NIC_ID) {
            Some(slot) => Some(Net::open(memory, ip, slot)?),
            None if hot_plug => None,
            None => return Err(NO_NIC),
        };
        Ok(Post { memory, ip, net })
    }

    /// Answers what has come, where there is a NIC.
    pub fn step(&mut self) -> Option<NetSecond> {
        self.net.as_mut().map(Net::step)
    }

    /// Gives the NIC up that is to be, and takes the next.
    #[inline(never)]
    pub fn change(&mut self, slots: &Look) {
        if let Some(net) = self.net.take_if(|net| slots.asks(net.registers.slot)) {
            net.give_up();
        }
        if self.net.is_none()
            && let Some(slot) = slots.take(NIC_ID)
        {
            match Net::open(self.memory, self.ip, slot) {
                Ok(net) => self.net = Some(net),
                Err(why) => say!("probe no nic: {why}"),
            }
        }
    }
}

/// The NIC with its station.
struct Net {
    registers: Registers,
    station: Station,
    receive: Ring,
    transmit: Ring,
    received: u64,
    answered: u64,
}

impl Net {
    /// Sets the NIC in `slot` up for `ip`. `memory`: [`PAGES`] pages.
    #[inline(never)]
    fn open(memory: u64, ip: [u8; 4], slot: u32) -> Result<Net, &'static str> {
        let registers = virtio::open(slot, machine::NET_VECTOR)?;
        for word in 0..PAGES * PAGE / 8 {
            put(memory + 8 * word, 0u64);
        }
        if !virtio::agree(&registers, F_MAC) {
            return Err("it has no address");
        }
        let mut mac = [0; 6];
        for (at, byte) in (registers.device..).zip(&mut mac) {
            *byte = get(at);
        }
        let ring = |index: u16| Ring {
            index,
            memory: memory + QUEUE_PAGES * PAGE * u64::from(index),
            offered: 0,
            returned: 0,
        };
        let mut net = Net {
            registers,
            station: Station { mac, ip },
            receive: ring(RECEIVE),
            transmit: ring(TRANSMIT),
            received: 0,
            answered: 0,
        };
        virtio::set_up(&registers, &net.receive.queue(Some(1)))?;
        virtio::set_up(&registers, &net.transmit.queue(None))?;
        virtio::start(&registers);
        for slot in 0..SIZE {
            net.receive.offer(slot, BUFFER as u32, WRITE);
        }
        virtio::ring(&registers, RECEIVE);
        Ok(net)
    }

    /// Ends the device's work, and gives its slot up.
    fn give_up(self) {
        virtio::reset(&self.registers);
        slots::give_up(self.registers.slot);
        say!("probe nic gone answered={}", self.answered);
    }

    /// Answers what has come, and says how much that was.
    fn step(&mut self) -> NetSecond {
        let (mut came, mut goes) = (false, false);
        for _ in 0..BATCH {
            let Some((slot, written)) = self.receive.take() else {
                break;
            };
            self.received += 1;
            goes |= self.answer(slot, written);
            self.receive.offer(slot, BUFFER as u32, WRITE);
            came = true;
        }
        fence(Ordering::SeqCst);
        if goes {
            virtio::ring(&self.registers, TRANSMIT);
        }
        if came {
            virtio::ring(&self.registers, RECEIVE);
        }
        NetSecond {
            received: self.received,
            answered: self.answered,
            interrupts: machine::area(0).net.load(Ordering::Relaxed),
        }
    }

    /// Offers the answer to the frame in `slot`, if it gets one and a buffer for it is free.
    fn answer(&mut self, slot: u16, written: u64) -> bool {
        let mut frame = [0u8; FRAME_MAX];
        let len = written.saturating_sub(HEADER).min(FRAME_MAX as u64) as usize;
        let from = self.receive.buffer(slot) + HEADER;
        for (at, byte) in (from..).zip(&mut frame[..len]) {
            *byte = get(at);
        }
        let mut reply = [0; FRAME_MAX];
        let Some(len) = self.station.answer(&frame[..len], &mut reply) else {
            return false;
        };
        while self.transmit.take().is_some() {}
        if self.transmit.offered.wrapping_sub(self.transmit.returned) == SIZE {
            return false;
        }
        // Buffers come back in the order in which they went.
        let slot = self.transmit.offered % SIZE;
        let to = self.transmit.buffer(slot) + HEADER;
        for (at, &byte) in (to..).zip(&reply[..len]) {
            put(at, byte);
        }
        self.transmit.offer(slot, HEADER as u32 + len as u32, 0);
        self.answered += 1;
        true
    }
}
