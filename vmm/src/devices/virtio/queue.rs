//! A split virtqueue as the device sees it: chains of buffers taken from the ring of those that are available, and given back.
//!
//! Source: Virtual I/O Device 1.2, 2.7. Everything the driver wrote is hostile: each index, address and length is checked before use, no
//! chain is longer than the queue, and a chain that breaks a rule is a [`Broken`] that names it. The rings are read and written through
//! `vm-memory`, so that what is written here is marked as written (see [`crate::memory`]).

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::Mapped;

/// Largest queue.
pub const QUEUE_SIZE_MAX: u16 = 256;
/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: u64 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Of the available ring: no interrupt is wanted.
const NO_INTERRUPT: u16 = 1;

/// What the driver did that it must not. The device asks to be reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken(pub String);

fn broken<T>(what: impl Into<String>) -> Result<T, Broken> {
    Err(Broken(what.into()))
}

/// A piece of guest memory, all of which is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest address.
    pub gpa: u64,
    /// Bytes, at least 1.
    pub len: u32,
}

/// A request: what the device reads, then what it writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// The first descriptor, by which it is given back, and how many bytes of it can be written. Several where chains are filled as one:
    /// see [`Queue::pop_room`].
    pub heads: Vec<(u16, u64)>,
    /// To be read.
    pub readable: Vec<Buffer>,
    /// To be written.
    pub writable: Vec<Buffer>,
}

/// Whether chains hold what is to be put into them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Room {
    /// They do.
    Enough(Chain),
    /// Not those that are available now, which were left there.
    NotYet,
    /// Not even if the driver gives all it can.
    Never,
}

/// Bytes of all of `buffers`.
pub fn total(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.len)).sum()
}

/// A queue: what the driver has set, and how far the device is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// The largest size, a power of two.
    pub size_max: u16,
    /// The size that the driver has chosen.
    pub size: u16,
    /// The driver has switched it on.
    pub enabled: bool,
    /// Where the descriptors are.
    pub descriptors: u64,
    /// Where the ring of available chains is.
    pub available: u64,
    /// Where the ring of used chains is.
    pub used: u64,
    /// The MSI-X vector of its interrupt, or none.
    pub vector: u16,
    /// The next entry of the available ring, counted without end.
    pub next_available: u16,
    /// The next entry of the used ring, counted without end.
    pub next_used: u16,
}

struct Descriptor {
    gpa: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Queue {
    /// A queue after a reset.
    pub fn new(size_max: u16) -> Self {
        Self {
            size_max,
            size: size_max,
            vector: super::NO_VECTOR,
            ..Self::default()
        }
    }

    /// Whether size and places are ones that a queue can have.
    pub fn check(&self, memory: &Mapped) -> Result<(), Broken> {
        let size = u64::from(self.size);
        if !self.size.is_power_of_two() || self.size > self.size_max {
            return broken(format!(
                "a queue of {size}, must be a power of two up to {}",
                self.size_max
            ));
        }
        for (what, at, align, bytes) in [
            ("descriptors", self.descriptors, 16, DESCRIPTOR_BYTES * size),
            ("available ring", self.available, 2, 6 + 2 * size),
            ("used ring", self.used, 4, 6 + 8 * size),
        ] {
            let fits = usize::try_from(bytes).is_ok_and(|len| memory.check_range(GuestAddress(at), len));
            if !at.is_multiple_of(align) || !fits {
                return broken(format!(
                    "the {what} at {at:#x}: {bytes} bytes of guest memory, aligned to {align}, are due"
                ));
            }
        }
        Ok(())
    }

    /// How many chains the driver has made available.
    pub fn ahead(&self, memory: &Mapped) -> Result<u16, Broken> {
        let index: u16 = self.load(memory, self.available + 2)?;
        let ahead = index.wrapping_sub(self.next_available);
        if ahead > self.size {
            return broken(format!(
                "{ahead} chains are available in a queue of {}",
                self.size
            ));
        }
        Ok(ahead)
    }

    /// The next chain that the driver has made available.
    pub fn pop(&mut self, memory: &Mapped) -> Result<Option<Chain>, Broken> {
        if self.ahead(memory)? == 0 {
            return Ok(None);
        }
        let slot = self.available + 4 + 2 * u64::from(self.next_available % self.size);
        let head: u16 = self.load(memory, slot)?;
        let chain = self.chain(memory, head)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    /// Chains to be written that hold `bytes` bytes, as one request; of `several` chains, or of the next one alone.
    pub fn pop_room(&mut self, memory: &Mapped, bytes: u64, several: bool) -> Result<Room, Broken> {
        let (before, most) = (self.next_available, if several { self.size } else { 1 });
        let (mut all, mut room) = (Chain::default(), 0);
        // The driver may make more available meanwhile: what is taken is counted, not believed.
        while all.heads.len() < usize::from(most)
            && let Some(chain) = self.pop(memory)?
        {
            if !chain.readable.is_empty() {
                return broken("a buffer to be filled that is to be read");
            }
            room += total(&chain.writable);
            all.heads.extend(chain.heads);
            all.writable.extend(chain.writable);
            if room >= bytes {
                return Ok(Room::Enough(all));
            }
        }
        self.next_available = before;
        Ok(if all.heads.len() == usize::from(most) {
            Room::Never
        } else {
            Room::NotYet
        })
    }

    fn chain(&self, memory: &Mapped, head: u16) -> Result<Chain, Broken> {
        let mut chain = Chain::default();
        let (mut table, mut entries) = (self.descriptors, self.size);
        let (mut index, mut left, mut indirect) = (head, self.size, false);
        loop {
            if index >= entries {
                return broken(format!("descriptor {index} of {entries}"));
            }
            let descriptor = self.descriptor(memory, table + DESCRIPTOR_BYTES * u64::from(index))?;
            if descriptor.flags & INDIRECT != 0 {
                let count = u64::from(descriptor.len) / DESCRIPTOR_BYTES;
                let whole = u64::from(descriptor.len).is_multiple_of(DESCRIPTOR_BYTES);
                if indirect || descriptor.flags & NEXT != 0 {
                    return broken("an indirect descriptor within or beside others of its chain");
                }
                if !whole || !(1..=u64::from(self.size)).contains(&count) {
                    return broken(format!(
                        "an indirect table of {} bytes, for a queue of {}",
                        descriptor.len, self.size
                    ));
                }
                entries = u16::try_from(count).expect("at most the queue's size");
                (table, index, indirect) = (descriptor.gpa, 0, true);
                self.check_there(memory, table, descriptor.len)?;
                continue;
            }
            if left == 0 {
                return broken(format!("a chain longer than its queue of {}", self.size));
            }
            left -= 1;
            self.check_there(memory, descriptor.gpa, descriptor.len)?;
            let buffer = Buffer {
                gpa: descriptor.gpa,
                len: descriptor.len,
            };
            if descriptor.flags & WRITE != 0 {
                chain.writable.push(buffer);
            } else if chain.writable.is_empty() {
                chain.readable.push(buffer);
            } else {
                return broken("a buffer to be read after one to be written");
            }
            if descriptor.flags & NEXT == 0 {
                chain.heads.push((head, total(&chain.writable)));
                return Ok(chain);
            }
            index = descriptor.next;
        }
    }

    fn check_there(&self, memory: &Mapped, gpa: u64, len: u32) -> Result<(), Broken> {
        let there = usize::try_from(len).is_ok_and(|len| memory.check_range(GuestAddress(gpa), len));
        if len == 0 || !there {
            return broken(format!("{len} bytes at {gpa:#x} are no guest memory"));
        }
        Ok(())
    }

    fn descriptor(&self, memory: &Mapped, at: u64) -> Result<Descriptor, Broken> {
        let mut bytes = [0; 16];
        memory
            .read_slice(&mut bytes, GuestAddress(at))
            .map_err(|error| Broken(format!("a descriptor at {at:#x}: {error}")))?;
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        Ok(Descriptor {
            gpa: u64::from(word(0)) | u64::from(word(4)) << 32,
            len: word(8),
            flags: half(12),
            next: half(14),
        })
    }

    fn load(&self, memory: &Mapped, at: u64) -> Result<u16, Broken> {
        memory
            .load::<u16>(GuestAddress(at), Ordering::Acquire)
            .map(u16::from_le)
            .map_err(|error| Broken(format!("the available ring at {at:#x}: {error}")))
    }

    /// Gives a request back, of which `written` bytes were written, all its chains at once. True: the driver wants an interrupt for it.
    pub fn push(&mut self, memory: &Mapped, chain: &Chain, written: u32) -> Result<bool, Broken> {
        let failed = |error| Broken(format!("the used ring at {:#x}: {error}", self.used));
        let (mut next, mut left) = (self.next_used, written);
        for &(head, room) in &chain.heads {
            let slot = self.used + 4 + 8 * u64::from(next % self.size);
            let here = u32::try_from(room).map_or(left, |room| room.min(left));
            let mut entry = [0; 8];
            entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
            entry[4..].copy_from_slice(&here.to_le_bytes());
            memory.write_slice(&entry, GuestAddress(slot)).map_err(failed)?;
            (next, left) = (next.wrapping_add(1), left - here);
        }
        memory
            .store(next.to_le(), GuestAddress(self.used + 2), Ordering::Release)
            .map_err(failed)?;
        self.next_used = next;
        // The index must be seen before it is asked whether anybody looks.
        fence(Ordering::SeqCst);
        Ok(self.load(memory, self.available)? & NO_INTERRUPT == 0)
    }
}
