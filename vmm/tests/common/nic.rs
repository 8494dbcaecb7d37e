//! A NIC without a tap and its driver without a guest: three queues on a [`Rig`], and a cable to hold the other end of.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use drover_vmm::devices::virtio::net::{FRAME_BYTES_MAX, Link, Mac, Net};

use super::driver::{Rig, Ring};

pub const MAC: Mac = [0x52, 0x54, 0, 1, 2, 3];
pub const RECEIVE: u16 = 0;
pub const TRANSMIT: u16 = 1;
pub const CONTROL: u16 = 2;

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
        Self {
            rig: Rig::new(net.clone()),
            net,
            cable,
            far,
            receive: Ring::new(RECEIVE),
            transmit: Ring::new(TRANSMIT),
            control: Ring::new(CONTROL),
        }
    }

    /// All that a driver does first, with all that is offered but `without`.
    pub fn start_without(&mut self, without: u64) {
        self.rig.start_without(without);
        let rings = [&mut self.transmit, &mut self.control];
        rings.into_iter().for_each(|ring| ring.set_up(&self.rig));
        self.receive = Ring::new(RECEIVE);
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
            *own = of.clone();
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
