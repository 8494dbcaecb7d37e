//! What pages looked like when they were last sent, for a bounded number of them, so that later only what changed needs to be sent.
//!
//! **Why a delta never meets another page than it was made against.** A page is in one job a round, and no page of a round is sent before
//! the target has acknowledged the round before, all of it written. So when a page is sent again, the target holds exactly what was sent
//! last; the cache holds that too, because whoever sends a page in any form tells the cache, under one lock for that page
//! ([`Cache::exchange`], [`Cache::forget`]). The checksum beside each delta is for the day on which this reasoning fails.
//!
//! Pages are spread over shards by their number, so that streams rarely meet. A shard that is full takes a new page only in place of one
//! that was not sent for `KEPT_ROUNDS` rounds: a hot set larger than the cache then keeps a part that stays, where replacing the oldest
//! would throw out each page just before it comes again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::delta;
use crate::vm::PAGE_SIZE;

const SHARDS: usize = 64;
/// Neighbouring pages that share a shard.
const SHARD_PAGES: u64 = 64;
/// A page that was not sent for so many rounds makes room for another.
const KEPT_ROUNDS: u32 = 2;

/// What became of a page that was told to the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchanged {
    /// A delta was appended; the checksum of the page as it is now.
    Delta(u32),
    /// It was known, but too much of it changed.
    Changed,
    /// It was not known.
    New,
}

#[derive(Default)]
struct Shard {
    slots: HashMap<u64, usize>,
    content: Vec<u8>,
    owners: Vec<Owner>,
    /// Where the search for a page that can go begins.
    hand: usize,
}

#[derive(Clone, Copy)]
struct Owner {
    /// `None`: free.
    page: Option<u64>,
    round: u32,
}

/// See the module.
pub struct Cache {
    shards: Vec<Mutex<Shard>>,
    slots_per_shard: usize,
}

impl Cache {
    /// An empty cache that will hold at most `bytes` of content; memory is taken as it fills.
    pub fn new(bytes: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            slots_per_shard: bytes / PAGE_SIZE / SHARDS,
        }
    }

    fn shard(&self, page: u64) -> MutexGuard<'_, Shard> {
        let index = page / SHARD_PAGES % SHARDS as u64;
        self.shards[usize::try_from(index).expect("there are few shards")]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A page is being sent with this content in this round: appends a delta to `out` if that will do, and keeps the content.
    pub fn exchange(&self, page: u64, round: u32, content: &[u8], out: &mut Vec<u8>) -> Exchanged {
        let mut shard = self.shard(page);
        let shard = &mut *shard;
        if let Some(&slot) = shard.slots.get(&page) {
            let kept = &mut shard.content[slot * PAGE_SIZE..][..PAGE_SIZE];
            let fits = delta::diff(kept, content, out);
            kept.copy_from_slice(content);
            shard.owners[slot].round = round;
            return if fits {
                Exchanged::Delta(delta::checksum(content))
            } else {
                Exchanged::Changed
            };
        }
        if let Some(slot) = shard.room(round, self.slots_per_shard) {
            if let Some(gone) = shard.owners[slot].page.replace(page) {
                shard.slots.remove(&gone);
            }
            shard.owners[slot].round = round;
            shard.slots.insert(page, slot);
            shard.content[slot * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(content);
        }
        Exchanged::New
    }

    /// A page is being sent in another form, or is zero: what is kept of it is no longer what the target has.
    pub fn forget(&self, page: u64) {
        let mut shard = self.shard(page);
        if let Some(slot) = shard.slots.remove(&page) {
            shard.owners[slot] = Owner { page: None, round: 0 };
        }
    }

    /// Gives all memory back.
    pub fn clear(&self) {
        for shard in &self.shards {
            *shard.lock().unwrap_or_else(PoisonError::into_inner) = Shard::default();
        }
    }

    /// Pages kept.
    pub fn pages(&self) -> usize {
        let kept = |shard: &Mutex<Shard>| shard.lock().unwrap_or_else(PoisonError::into_inner).slots.len();
        self.shards.iter().map(kept).sum()
    }
}

impl Shard {
    /// A slot that is free, or whose page was not sent lately.
    fn room(&mut self, round: u32, slots: usize) -> Option<usize> {
        if self.owners.len() < slots {
            // At once, so that growing never holds it twice; it becomes memory as it is written.
            self.content.reserve_exact(slots * PAGE_SIZE - self.content.len());
            self.owners.push(Owner { page: None, round: 0 });
            self.content.resize(self.owners.len() * PAGE_SIZE, 0);
            return Some(self.owners.len() - 1);
        }
        // A bounded look: a full shard of hot pages is passed by quickly.
        const LOOKS: usize = 8;
        for _ in 0..LOOKS.min(slots) {
            self.hand = (self.hand + 1) % slots;
            let owner = self.owners[self.hand];
            if owner.page.is_none() || owner.round + KEPT_ROUNDS < round {
                return Some(self.hand);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(byte: u8) -> Vec<u8> {
        vec![byte; PAGE_SIZE]
    }

    #[test]
    fn a_hot_set_larger_than_the_cache_keeps_a_part_that_hits_every_round() {
        let cache = Cache::new(SHARDS * 4 * PAGE_SIZE);
        let mut hits = [0; 6];
        for round in 2..8_u32 {
            for number in 0..512 {
                let mut out = Vec::new();
                let mut content = page(1);
                content[0] = u8::try_from(round).unwrap();
                if matches!(
                    cache.exchange(number, round, &content, &mut out),
                    Exchanged::Delta(_)
                ) {
                    hits[round as usize - 2] += 1;
                }
            }
        }
        // 512 pages lie in 8 shards, which hold 4 each.
        assert_eq!(hits, [0, 32, 32, 32, 32, 32]);
    }

    #[test]
    fn what_went_cold_makes_room() {
        let cache = Cache::new(SHARDS * PAGE_SIZE);
        let mut out = Vec::new();
        assert_eq!(cache.exchange(1, 2, &page(1), &mut out), Exchanged::New);
        assert_eq!(cache.exchange(2, 4, &page(2), &mut out), Exchanged::New);
        assert!(matches!(
            cache.exchange(1, 4, &page(1), &mut out),
            Exchanged::Delta(_)
        ));
        assert_eq!(cache.exchange(2, 7, &page(2), &mut out), Exchanged::New);
        assert!(matches!(
            cache.exchange(2, 8, &page(2), &mut out),
            Exchanged::Delta(_)
        ));
        assert_eq!((cache.pages(), out.len()), (1, 0));
        cache.clear();
        assert_eq!(cache.pages(), 0);
    }

    proptest! {
        /// The cache beside a target that does what it is sent: whatever is sent in whichever form, every delta fits.
        #[test]
        fn the_cache_never_differs_from_what_the_target_has(
            steps in prop::collection::vec((0_u64..200, any::<u8>(), 0_usize..PAGE_SIZE, 0_u8..8), 1..400),
        ) {
            let cache = Cache::new(SHARDS * 2 * PAGE_SIZE);
            let mut guest = vec![page(0); 200];
            let mut target = vec![page(0); 200];
            for (step, (number, byte, at, how)) in steps.into_iter().enumerate() {
                let index = usize::try_from(number).unwrap();
                match how {
                    0 => guest[index] = page(byte),
                    _ => guest[index][at] = byte,
                }
                let round = 2 + u32::try_from(step / 40).unwrap();
                let content = guest[index].clone();
                if how == 1 {
                    cache.forget(number);
                    target[index] = content;
                    continue;
                }
                let mut out = Vec::new();
                match cache.exchange(number, round, &content, &mut out) {
                    Exchanged::Delta(crc) => delta::patch(&mut target[index], &out, crc).unwrap(),
                    _ => target[index] = content,
                }
                prop_assert!(target[index] == guest[index]);
                prop_assert!(cache.pages() <= SHARDS * 2);
            }
        }
    }
}
