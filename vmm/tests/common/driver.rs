//! A driver without a guest: programs a virtio device through its registers and its queue as a kernel would, rightly or wrongly.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::Path;
use std::sync::{Arc, Mutex};

use drover_vmm::devices::gate::IoGate;
use drover_vmm::devices::pci::PciDevice;
use drover_vmm::devices::pci::msix::Message;
use drover_vmm::devices::virtio::blk::Blk;
use drover_vmm::devices::virtio::blk::disk::Disk;
use drover_vmm::devices::virtio::pci::VirtioPci;
use drover_vmm::devices::virtio::transport::status;
use drover_vmm::devices::virtio::{Device, F_VERSION_1};
use drover_vmm::devices::wires::Wires;
use drover_vmm::memory::Memory;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

pub const DESCRIPTORS: u64 = 0x1000;
pub const AVAILABLE: u64 = 0x3000;
pub const USED: u64 = 0x5000;
/// Where requests' buffers are, a MiB each for 8 of them.
pub const DATA: u64 = 0x10_0000;
pub const MEMORY_BYTES: u64 = 16 << 20;
pub const SIZE: u16 = 8;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

const DEVICE_REGION: u64 = 0xc000_8000;
/// Between the rings of two queues.
const RING_BYTES: u64 = 0x8000;

/// Remembers what was sent.
#[derive(Default)]
pub struct Sent(pub Mutex<Vec<(usize, Message)>>);

struct Recorder(Arc<Sent>);

impl Wires for Recorder {
    fn send(&self, vector: usize, message: Message) {
        self.0.0.lock().unwrap().push((vector, message));
    }
    fn place_doorbells(&self, _gpa: Option<u64>) {}
}

/// A device, its driver and their memory.
pub struct Rig {
    pub memory: Arc<Memory>,
    pub gate: Arc<IoGate>,
    pub device: Arc<VirtioPci>,
    pub sent: Arc<Sent>,
    pub next: u16,
    pub seen: u16,
}

/// A buffer of a chain: address, length, whether the device writes it.
pub type Part = (u64, u32, bool);

impl Rig {
    /// A device that may work, and a driver that has not looked at it yet.
    pub fn new(model: Arc<dyn Device>) -> Self {
        let memory = Arc::new(Memory::new(MEMORY_BYTES, false).unwrap());
        let (gate, sent) = (Arc::new(IoGate::default()), Arc::new(Sent::default()));
        gate.open(u64::MAX).unwrap();
        let device = Arc::new(VirtioPci::new(
            model,
            u32::try_from(DEVICE_REGION).unwrap(),
            memory.clone(),
            gate.clone(),
            Box::new(Recorder(sent.clone())),
            EventFd::new(0).unwrap(),
        ));
        Self {
            memory,
            gate,
            device,
            sent,
            next: 0,
            seen: 0,
        }
    }

    /// A disk on the file at `path`.
    pub fn disk(path: &Path, read_only: bool) -> Self {
        let disk = Disk::open(path, read_only, "vol-1").unwrap();
        Self::new(Arc::new(Blk::new(Arc::new(disk))))
    }

    pub fn set(&self, offset: u64, value: &[u8]) {
        self.device.bar_write(0, offset, value);
    }

    pub fn status(&self) -> u8 {
        let mut byte = [0];
        self.device.bar_read(0, 20, &mut byte);
        byte[0]
    }

    pub fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.set(0, &select.to_le_bytes());
            let mut word = [0; 4];
            self.device.bar_read(0, 4, &mut word);
            u64::from(u32::from_le_bytes(word))
        };
        half(0) | half(1) << 32
    }

    /// All that a driver does before its first request, with all that is offered but `without`.
    pub fn start_without(&mut self, without: u64) {
        (self.next, self.seen) = (0, 0);
        self.memory
            .mapped()
            .write_slice(&[0; 0x6000], GuestAddress(DESCRIPTORS))
            .unwrap();
        self.device.config_write(4, &[6, 4]);
        self.device.config_write(0x40 + 2, &0x8000u16.to_le_bytes());
        for vector in 0..2u64 {
            let mut entry = [0; 16];
            entry[..4].copy_from_slice(&0xfee0_0000u32.to_le_bytes());
            entry[8] = 0x40 + u8::try_from(vector).unwrap();
            self.set(0x4000 + 16 * vector, &entry);
        }
        self.set(20, &[0]);
        self.set(20, &[status::ACKNOWLEDGE]);
        self.set(20, &[status::DRIVER]);
        let accepted = self.offered() & !without | F_VERSION_1;
        for half in 0..2u32 {
            self.set(8, &half.to_le_bytes());
            let word = u32::try_from(accepted >> (32 * half) & u64::from(u32::MAX)).unwrap();
            self.set(12, &word.to_le_bytes());
        }
        self.set(20, &[status::FEATURES_OK]);
        self.set(16, &0u16.to_le_bytes());
        self.set(22, &0u16.to_le_bytes());
        self.set(24, &SIZE.to_le_bytes());
        self.set(26, &1u16.to_le_bytes());
        for (offset, at) in [(32, DESCRIPTORS), (40, AVAILABLE), (48, USED)] {
            self.set(offset, &at.to_le_bytes());
        }
        self.set(28, &1u16.to_le_bytes());
        self.set(20, &[status::DRIVER_OK]);
        assert_eq!(self.status(), 15, "the device does not accept its driver");
    }

    pub fn start(&mut self) {
        self.start_without(0);
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory
            .mapped()
            .write_slice(bytes, GuestAddress(gpa))
            .unwrap();
    }

    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .mapped()
            .read_slice(&mut bytes, GuestAddress(gpa))
            .unwrap();
        bytes
    }

    pub fn descriptor_at(&self, at: u64, gpa: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(at, &bytes);
    }

    pub fn descriptor(&self, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(DESCRIPTORS + 16 * u64::from(index), gpa, len, flags, next);
    }

    /// Makes the chain that begins at `head` available.
    pub fn offer(&mut self, head: u16) {
        self.write(
            AVAILABLE + 4 + 2 * u64::from(self.next % SIZE),
            &head.to_le_bytes(),
        );
        self.next = self.next.wrapping_add(1);
        self.write(AVAILABLE + 2, &self.next.to_le_bytes());
    }

    /// A chain of `parts` in the first descriptors.
    pub fn submit(&mut self, parts: &[Part]) {
        for (index, &(gpa, len, write)) in (0u16..).zip(parts) {
            let last = usize::from(index) + 1 == parts.len();
            let flags = if last { 0 } else { NEXT } | if write { WRITE } else { 0 };
            self.descriptor(index, gpa, len, flags, index + 1);
        }
        self.offer(0);
    }

    /// Lets the device work until there is nothing to do; returns how many chains it served.
    pub fn run(&self) -> usize {
        let mut served = 0;
        while self.device.step() {
            served += 1;
            assert!(served <= 2 * usize::from(SIZE), "the device does not end");
        }
        served
    }

    /// Chains that were given back since the last call: head and bytes written.
    pub fn used(&mut self) -> Vec<(u32, u32)> {
        let mut used = Vec::new();
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        let index = self.read(USED + 2, 2);
        while self.seen != u16::from_le_bytes([index[0], index[1]]) {
            let entry = self.read(USED + 4 + 8 * u64::from(self.seen % SIZE), 8);
            used.push((word(&entry[..4]), word(&entry[4..])));
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }

    /// The vectors of the messages sent since the last call.
    pub fn interrupts(&self) -> Vec<usize> {
        let sent = std::mem::take(&mut *self.sent.0.lock().unwrap());
        sent.into_iter().map(|(vector, _)| vector).collect()
    }

    /// A whole disk request: `data` is sent, or `room` bytes are received; the answer and what was received.
    pub fn request(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> (u8, Vec<u8>) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.write(DATA, &header);
        self.write(DATA + 0x1000, data);
        let (received, answer) = (DATA + 0x40_0000, DATA + 0x800);
        self.write(answer, &[0xee]);
        let mut parts = vec![(DATA, 16, false)];
        if !data.is_empty() {
            parts.push((DATA + 0x1000, u32::try_from(data.len()).unwrap(), false));
        }
        if room > 0 {
            parts.push((received, room, true));
        }
        parts.push((answer, 1, true));
        self.submit(&parts);
        assert_eq!((self.run(), self.used().len()), (1, 1));
        (self.read(answer, 1)[0], self.read(received, room as usize))
    }
}

/// A queue of the driver's, of a device with several.
#[derive(Clone)]
pub struct Ring {
    queue: u16,
    next: u16,
    seen: u16,
}

impl Ring {
    /// One that was not programmed yet; the first is by [`Rig::start_without`].
    pub fn new(queue: u16) -> Self {
        Self {
            queue,
            next: 0,
            seen: 0,
        }
    }

    fn at(&self, offset: u64) -> u64 {
        0x1000 + RING_BYTES * u64::from(self.queue) + offset
    }

    /// Programs the queue, with a vector after the configuration's.
    pub fn set_up(&mut self, rig: &Rig) {
        (self.next, self.seen) = (0, 0);
        rig.write(self.at(0), &[0; 0x6000]);
        let mut entry = [0; 16];
        entry[..4].copy_from_slice(&0xfee0_0000u32.to_le_bytes());
        entry[8] = 0x41 + u8::try_from(self.queue).unwrap();
        rig.set(0x4000 + 16 * u64::from(self.queue + 1), &entry);
        rig.set(22, &self.queue.to_le_bytes());
        rig.set(24, &SIZE.to_le_bytes());
        rig.set(26, &(self.queue + 1).to_le_bytes());
        for (register, offset) in [(32, 0), (40, 0x2000), (48, 0x4000)] {
            rig.set(register, &self.at(offset).to_le_bytes());
        }
        rig.set(28, &1u16.to_le_bytes());
    }

    /// Makes a chain of `parts` available, its descriptors from `first` on.
    pub fn submit(&mut self, rig: &Rig, first: u16, parts: &[Part]) {
        for (index, &(gpa, len, write)) in (first..).zip(parts) {
            let last = usize::from(index - first) + 1 == parts.len();
            let flags = if last { 0 } else { NEXT } | if write { WRITE } else { 0 };
            rig.descriptor_at(self.at(16 * u64::from(index)), gpa, len, flags, index + 1);
        }
        rig.write(
            self.at(0x2004 + 2 * u64::from(self.next % SIZE)),
            &first.to_le_bytes(),
        );
        self.next = self.next.wrapping_add(1);
        rig.write(self.at(0x2002), &self.next.to_le_bytes());
    }

    /// Chains that were given back since the last call: head and bytes written.
    pub fn used(&mut self, rig: &Rig) -> Vec<(u32, u32)> {
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        let index = rig.read(self.at(0x4002), 2);
        let mut used = Vec::new();
        while self.seen != u16::from_le_bytes([index[0], index[1]]) {
            let entry = rig.read(self.at(0x4004 + 8 * u64::from(self.seen % SIZE)), 8);
            used.push((word(&entry[..4]), word(&entry[4..])));
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }
}
