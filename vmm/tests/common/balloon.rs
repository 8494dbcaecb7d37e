//! A balloon and its driver without a guest: five queues on a [`Rig`].

#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::Arc;

use drover_vmm::devices::virtio::balloon::{Balloon, Target};

use super::driver::{DATA, MEMORY_BYTES, Rig, Ring};

pub const INFLATE: usize = 0;
pub const DEFLATE: usize = 1;
/// The standard's queue of reports.
pub const REPORT: usize = 4;
pub const PAGE: u64 = 4096;
pub const F_REPORTING: u64 = 1 << 5;

/// A balloon and its driver.
pub struct Ballooned {
    pub rig: Rig,
    pub balloon: Arc<Balloon>,
    pub rings: Vec<Ring>,
}

impl Ballooned {
    /// One that nobody drives yet.
    pub fn new() -> Self {
        let balloon = Arc::new(Balloon::new(Target::default(), MEMORY_BYTES / PAGE));
        Self {
            rig: Rig::new(balloon.clone()),
            balloon,
            rings: (0..5).map(Ring::new).collect(),
        }
    }

    /// All that a driver does first, with all that is offered but `without`.
    pub fn start_without(&mut self, without: u64) {
        self.rig.start_without(without);
        self.rings = (0..5).map(Ring::new).collect();
        self.rings[1..].iter_mut().for_each(|ring| ring.set_up(&self.rig));
    }

    /// A driven one.
    pub fn driven() -> Self {
        let mut made = Self::new();
        made.start_without(0);
        made
    }

    /// Offers a request with these numbers of pages.
    pub fn offer(&mut self, queue: usize, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.rig.write(DATA, &bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        self.rings[queue].submit(&self.rig, 0, &[(DATA, len, false)]);
    }

    /// The same, which is served.
    pub fn request(&mut self, queue: usize, pages: &[u32]) {
        self.offer(queue, pages);
        assert_eq!(self.rig.run(), 1);
        assert_eq!(self.rings[queue].used(&self.rig), [(0, 0)]);
    }

    /// Whether the page is a hole of the memory's file.
    pub fn is_hole(&self, page: u32) -> bool {
        self.rig.memory.hole_ahead(page.into(), 1) == 1
    }
}
