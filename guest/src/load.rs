//! The load that a benchmark puts on a disk: which block each request is of, and what must be in it.
//!
//! A slot is a place for one request at a time. Each has every `depth`-th block of the disk to itself, so that no two requests under way are of
//! one block, and what a block must hold is always known. First each slot writes its blocks once, in turn; then it reads and writes them at random.

use crate::params::DiskBench;
use crate::pattern::Random;

/// Most blocks of 4 KiB that are used: of each the guest keeps what was last written.
pub const BLOCKS_MAX: u64 = 65_536;
/// Most requests under way.
pub const DEPTH_MAX: u32 = 64;

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// It writes.
    pub write: bool,
    /// Which block, of 4 KiB.
    pub block: u64,
    /// The sequence that is written, or that must be found.
    pub sequence: u64,
}

/// What the disk must hold, and what comes next.
#[derive(Debug)]
pub struct Load<'a> {
    /// By block: the sequence written last.
    expected: &'a mut [u32],
    depth: u64,
    writes_percent: u64,
    /// Blocks of each slot that were written once, or are about to be.
    begun: [u32; DEPTH_MAX as usize],
    random: Random,
}

/// How many blocks of a disk of `bytes` are used by `depth` slots: as many by each. None if there are too few for one a slot.
#[must_use]
pub fn blocks_on(bytes: u64, depth: u32) -> Option<u64> {
    let depth = u64::from(depth);
    let blocks = (bytes / crate::PAGE_SIZE).min(BLOCKS_MAX) / depth * depth;
    (blocks > 0).then_some(blocks)
}

impl<'a> Load<'a> {
    /// The load on a disk of which `expected` has a word a block, as [`blocks_on`] counts them.
    #[must_use]
    pub fn new(expected: &'a mut [u32], bench: DiskBench) -> Load<'a> {
        expected.fill(0);
        Load {
            expected,
            depth: u64::from(bench.depth.clamp(1, DEPTH_MAX)),
            writes_percent: u64::from(bench.writes_percent),
            begun: [0; DEPTH_MAX as usize],
            random: Random::new(1),
        }
    }

    /// Slots.
    #[must_use]
    pub fn depth(&self) -> u16 {
        self.depth as u16
    }

    fn blocks_a_slot(&self) -> u64 {
        self.expected.len() as u64 / self.depth
    }

    /// Whether no slot has a block left that was never written.
    #[must_use]
    pub fn is_filled(&self) -> bool {
        self.begun[..self.depth as usize]
            .iter()
            .all(|&begun| u64::from(begun) == self.blocks_a_slot())
    }

    /// The next request of `slot`, whose last one has ended.
    pub fn order(&mut self, slot: u16) -> Order {
        let (share, begun) = (self.blocks_a_slot(), &mut self.begun[usize::from(slot)]);
        let first = u64::from(*begun) < share;
        let nth = if first {
            *begun += 1;
            u64::from(*begun) - 1
        } else {
            self.random.below(share)
        };
        let block = u64::from(slot) + self.depth * nth;
        let write = first || self.random.below(100) < self.writes_percent;
        let expected = &mut self.expected[block as usize];
        if write {
            // Never 0, which stands for never written.
            *expected = expected.checked_add(1).unwrap_or(1);
        }
        Order {
            write,
            block,
            sequence: u64::from(*expected),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;

    fn bench(depth: u32, writes_percent: u32) -> DiskBench {
        DiskBench {
            depth,
            writes_percent,
        }
    }

    #[test]
    fn every_block_is_written_once_before_any_of_its_slot_is_read() {
        let mut expected = vec![7; 24];
        let mut load = Load::new(&mut expected, bench(8, 0));
        let mut written = Vec::new();
        for round in 0..3 {
            assert!(!load.is_filled(), "{round}");
            for slot in 0..8 {
                let order = load.order(slot);
                assert!(order.write && order.sequence == 1, "{order:?}");
                written.push(order.block);
            }
        }
        assert!(load.is_filled());
        written.sort_unstable();
        assert_eq!(written, (0..24).collect::<Vec<_>>());
        assert!((0..8).all(|slot| !load.order(slot).write));
    }

    #[test]
    fn a_read_expects_what_was_written_last_and_no_slot_touches_anothers_blocks() {
        let mut expected = vec![0; 64];
        let mut load = Load::new(&mut expected, bench(16, 30));
        let mut held = vec![0; 64];
        let mut writes = 0;
        for round in 0..1000u16 {
            let slot = round * 7 % 16;
            let order = load.order(slot);
            assert_eq!(order.block % 16, u64::from(slot));
            let held = &mut held[order.block as usize];
            if order.write {
                *held += 1;
                writes += 1;
            }
            assert_eq!(order.sequence, *held, "{order:?}");
        }
        assert!((64 + 200..64 + 400).contains(&writes), "{writes}");
    }

    #[test]
    fn every_slot_has_as_many_blocks_and_small_disks_are_refused() {
        assert_eq!(blocks_on(u64::MAX, 64), Some(BLOCKS_MAX));
        assert_eq!(blocks_on(100 * 4096, 32), Some(96));
        assert_eq!(blocks_on(31 * 4096, 32), None);
    }
}
