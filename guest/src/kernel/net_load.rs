//! A virtio NIC under the load of a benchmark: frames sent as fast as they are taken, or counted as they come. See [`drover_probe::frames`].
//!
//! Source: Virtual I/O Device 1.2, 5.1. No offloads; each buffer is one descriptor, each frame one buffer. What was sent and what came is found
//! by polling, and no interrupts are asked for. Whoever sends the first frame is whom all go to.
//!
//! ```text
//!   flood   waits for a hello ─► fills every free buffer ─► rings the doorbell once for all of them ─► …
//!   sink    takes what has come, looks at each byte ─► after every 64 frames says how many there were
//! ```
#![allow(unsafe_code, reason = "a driver shares memory with its device")]

use drover_probe::clock::microseconds;
use drover_probe::frames::{self, ANSWER_EVERY, FRAME_MAX, FRAME_MIN, Kind};
use drover_probe::params::NetBench;
use drover_probe::report::NetLoad;

use super::machine;
use super::net::{F_MAC, HEADER, NIC_ID, NO_NIC, RECEIVE, TRANSMIT};
use super::plan::Plan;
use super::virtio::{self, PAGE, Registers, Ring, WRITE, get, put};

const SIZE: u16 = 256;
const BUFFER: u64 = 2048;
/// Of each queue: the ring, buffers.
const QUEUE_PAGES: u64 = Ring::PAGES + BUFFER * SIZE as u64 / PAGE;
/// Pages that the driver and the device share.
pub const PAGES: u64 = 2 * QUEUE_PAGES;
/// Frames that are taken in one step.
const BATCH: u16 = 64;

/// The NIC.
pub struct LoadedNet {
    plan: &'static Plan,
    registers: Registers,
    mac: [u8; 6],
    /// Whom frames go to, once somebody has sent one.
    peer: Option<[u8; 6]>,
    /// None: a sink.
    sends_bytes: Option<usize>,
    receive: Ring,
    transmit: Ring,
    number: u64,
    done: NetLoad,
}

fn buffer(ring: &Ring, slot: u16) -> u64 {
    ring.memory + Ring::PAGES * PAGE + BUFFER * u64::from(slot)
}

/// The frame in a buffer of this driver's.
fn frame(at: u64, bytes: usize) -> &'static mut [u8] {
    // SAFETY: `at` is a buffer of this driver's own, mapped one to one, and `bytes` at most what it has after the header. The device has it
    // only between offer and take; the driver looks at it only outside of that, at one at a time, and keeps no reference.
    unsafe { core::slice::from_raw_parts_mut(core::ptr::with_exposed_provenance_mut(at as usize), bytes) }
}

impl LoadedNet {
    /// Finds the NIC and sets it up. `memory`: [`PAGES`] pages.
    pub fn open(plan: &'static Plan, memory: u64, bench: NetBench) -> Result<LoadedNet, &'static str> {
        let slot = virtio::find(NIC_ID).ok_or(NO_NIC)?;
        let registers = virtio::open(slot, machine::NET_VECTOR)?;
        for word in 0..PAGES * PAGE / 8 {
            put(memory + 8 * word, 0u64);
        }
        let event_index = virtio::offers_event_index(&registers);
        if !virtio::agree(&registers, F_MAC | virtio::event_index_if(event_index)) {
            return Err("it has no address");
        }
        let mut mac = [0; 6];
        for (at, byte) in (registers.device..).zip(&mut mac) {
            *byte = get(at);
        }
        let ring = |index: u16| {
            let memory = memory + QUEUE_PAGES * PAGE * u64::from(index);
            Ring::new(index, memory, SIZE, event_index)
        };
        let mut net = LoadedNet {
            plan,
            registers,
            mac,
            peer: None,
            sends_bytes: (!bench.sink).then_some(bench.frame_bytes as usize),
            receive: ring(RECEIVE),
            transmit: ring(TRANSMIT),
            number: 0,
            done: NetLoad::default(),
        };
        virtio::set_up(&registers, &net.receive.queue())?;
        virtio::set_up(&registers, &net.transmit.queue())?;
        net.receive.want_no_interrupts();
        net.transmit.want_no_interrupts();
        virtio::start(&registers);
        for slot in 0..SIZE {
            net.make_room(slot);
        }
        net.receive.ring_from(&registers, 0);
        Ok(net)
    }

    fn make_room(&mut self, slot: u16) {
        let at = buffer(&self.receive, slot);
        virtio::describe(self.receive.descriptors(), slot, at, BUFFER as u32, WRITE, 0);
        self.receive.offer(slot);
    }

    /// Goes on, and says how much was done so far.
    pub fn step(&mut self) -> NetLoad {
        self.take();
        if let (Some(bytes), Some(peer)) = (self.sends_bytes, self.peer) {
            self.flood(bytes, peer);
        }
        NetLoad {
            at_us: microseconds(
                machine::counter().saturating_sub(self.plan.clock.boot),
                self.plan.clock.tsc_khz,
            ),
            ..self.done
        }
    }

    /// Takes what has come.
    fn take(&mut self) {
        let (before, sink) = (self.receive.offered, self.sends_bytes.is_none());
        for _ in 0..BATCH {
            let Some((slot, written)) = self.receive.take() else {
                break;
            };
            let slot = slot % SIZE;
            let bytes = u64::from(written).saturating_sub(HEADER).min(FRAME_MAX as u64);
            let seen = frames::read(frame(buffer(&self.receive, slot) + HEADER, bytes as usize));
            if let Some(seen) = seen {
                self.peer = Some(seen.from);
                if sink && seen.kind == Kind::Data {
                    self.done.frames += 1;
                    self.done.bytes += bytes;
                    self.done.damaged += u64::from(!seen.whole);
                    if self.done.frames.is_multiple_of(ANSWER_EVERY) {
                        self.answer(seen.from);
                    }
                }
            }
            self.make_room(slot);
        }
        if self.receive.offered != before {
            self.receive.ring_from(&self.registers, before);
        }
    }

    /// The next free buffer to send from. Buffers come back in the order in which they went.
    fn free(&mut self) -> Option<u16> {
        (self.transmit.under_way() < SIZE).then_some(self.transmit.offered % SIZE)
    }

    fn send(&mut self, slot: u16, bytes: usize, to: [u8; 6], kind: Kind, number: u64) {
        let at = buffer(&self.transmit, slot);
        frames::write(frame(at + HEADER, bytes), to, self.mac, kind, number);
        let len = HEADER as u32 + bytes as u32;
        virtio::describe(self.transmit.descriptors(), slot, at, len, 0, 0);
        self.transmit.offer(slot);
    }

    /// Says how many frames have come.
    fn answer(&mut self, to: [u8; 6]) {
        while self.transmit.take().is_some() {}
        let before = self.transmit.offered;
        if let Some(slot) = self.free() {
            self.send(slot, FRAME_MIN, to, Kind::Count, self.done.frames);
            self.transmit.ring_from(&self.registers, before);
        }
    }

    /// Counts what was sent, and fills every free buffer.
    fn flood(&mut self, bytes: usize, to: [u8; 6]) {
        while self.transmit.take().is_some() {
            self.done.frames += 1;
            self.done.bytes += bytes as u64;
        }
        let before = self.transmit.offered;
        for _ in 0..BATCH {
            let Some(slot) = self.free() else {
                break;
            };
            self.number += 1;
            self.send(slot, bytes, to, Kind::Data, self.number);
        }
        if self.transmit.offered != before {
            self.transmit.ring_from(&self.registers, before);
        }
    }
}
