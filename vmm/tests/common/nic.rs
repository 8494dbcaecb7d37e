//! A NIC without a tap and its driver without a guest: three queues on a [`Rig`], and a cable to hold the other end of.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use drover_vmm::devices::virtio::net::{FRAME_BYTES_MAX, Link, Mac, Net};

use super::driver::{NEXT, Part, Rig, SIZE, WRITE};

pub const MAC: Mac = [0x52, 0x54, 0, 1, 2, 3];
pub const RECEIVE: u16 = 0;
pub const TRANSMIT: u16 = 1;
pub const CONTROL: u16 = 2;
const RING_BYTES: u64 = 0x8000;

/// The device's end of a cable.
pub struct Cable {
    near: UnixDatagram,
    /// What the driver was said to take, each time.
    pub offloads: Mutex<Vec<u32>>,
}

impl Link for Cable {
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        self.near.recv(into)
    }
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.near.send(frame).map(drop)
    }
    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        self.offloads.lock().unwrap().push(offloads);
        Ok(())
    }
    fn readable(&self) -> BorrowedFd<'_> {
        self.near.as_fd()
    }
}

/// A queue of the driver's.
pub struct Ring {
    queue: u16,
    next: u16,
    seen: u16,
}

impl Ring {
    fn at(&self, offset: u64) -> u64 {
        0x1000 + RING_BYTES * u64::from(self.queue) + offset
    }

    /// Programs the queue, with a vector after the configuration's.
    fn set_up(&mut self, rig: &Rig) {
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

/// A NIC, its driver and the other end of its cable.
pub struct Nic {
    pub rig: Rig,
    pub net: Arc<Net>,
    pub cable: Arc<Cable>,
    pub far: UnixDatagram,
    pub receive: Ring,
    pub transmit: Ring,
    pub control: Ring,
}

impl Nic {
    /// One that nobody drives yet.
    pub fn new() -> Self {
        let (near, far) = UnixDatagram::pair().unwrap();
        for end in [&near, &far] {
            end.set_nonblocking(true).unwrap();
        }
        let cable = Arc::new(Cable {
            near,
            offloads: Mutex::default(),
        });
        let net = Arc::new(Net::new(cable.clone(), MAC, 1500));
        let ring = |queue| Ring {
            queue,
            next: 0,
            seen: 0,
        };
        Self {
            rig: Rig::new(net.clone()),
            net,
            cable,
            far,
            receive: ring(RECEIVE),
            transmit: ring(TRANSMIT),
            control: ring(CONTROL),
        }
    }

    /// All that a driver does first, with all that is offered but `without`.
    pub fn start_without(&mut self, without: u64) {
        self.rig.start_without(without);
        let rings = [&mut self.transmit, &mut self.control];
        rings.into_iter().for_each(|ring| ring.set_up(&self.rig));
        (self.receive.next, self.receive.seen) = (0, 0);
    }

    /// A driven one without what is in `without`.
    pub fn without(without: u64) -> Self {
        let mut nic = Self::new();
        nic.start_without(without);
        nic
    }

    /// The driver's place in its queues, of another's whose state this one has taken over.
    pub fn go_on(&mut self, other: &Self) {
        for (own, of) in [
            (&mut self.receive, &other.receive),
            (&mut self.transmit, &other.transmit),
            (&mut self.control, &other.control),
        ] {
            (own.next, own.seen) = (of.next, of.seen);
        }
    }

    /// What has come out of the cable's other end, frames with their headers.
    pub fn sent(&self) -> Vec<Vec<u8>> {
        let mut buffer = vec![0; FRAME_BYTES_MAX + 1];
        std::iter::from_fn(|| {
            let len = self.far.recv(&mut buffer).ok()?;
            Some(buffer[..len].to_vec())
        })
        .collect()
    }
}
