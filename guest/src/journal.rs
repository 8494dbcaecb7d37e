//! The journal on a disk: numbered blocks, written in batches round and round, so that whoever reads it knows what must be there.
//!
//! ```text
//!   a batch:  write 8 blocks ─► all answered ─► flush ─► answered: acknowledged ─► the next batch
//!   block (s - 1) mod blocks holds sequence s, its own number, and a checksum over all of it: a [`Page`]
//! ```
//!
//! After a crash everything acknowledged must be there. Of the batch that was under way any block may be old, new or torn, and of no other:
//! batches do not overlap.
//!
//! [`Page`]: crate::page::Page

/// Blocks written before a flush.
pub const BATCH: u64 = 8;
/// Fewest blocks of a journal, so that a batch never overwrites the one before.
pub const BLOCKS_MIN: u64 = 4 * BATCH;
/// Most blocks: a boot reads them all.
pub const BLOCKS_MAX: u64 = 256;
/// No journal lives so long: a higher sequence was not written by one.
const SEQUENCE_MAX: u64 = 1 << 48;
/// A block without a valid page, where a sequence is expected.
pub const TORN: u64 = u64::MAX;

/// How many blocks a journal on a disk of `bytes` has; `None` if it is too small.
#[must_use]
pub fn blocks_on(bytes: u64) -> Option<u64> {
    let blocks = (bytes / crate::PAGE_SIZE).min(BLOCKS_MAX) / BATCH * BATCH;
    (blocks >= BLOCKS_MIN).then_some(blocks)
}

/// Where a journal is: how large, and how much of it is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Journal {
    blocks: u64,
    acknowledged: u64,
}

impl Journal {
    /// Blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The last sequence that a flush has covered.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// The next batch is acknowledged.
    pub fn acknowledge(&mut self) {
        self.acknowledged += BATCH;
    }

    /// The block of sequence `sequence`, from 1 on.
    #[must_use]
    pub fn block_of(&self, sequence: u64) -> u64 {
        (sequence - 1) % self.blocks
    }

    /// The sequence that block `block` must hold; 0: it was never written.
    #[must_use]
    pub fn due(&self, block: u64) -> u64 {
        if self.acknowledged <= block {
            return 0;
        }
        let rounds = (self.acknowledged - block - 1) / self.blocks;
        rounds * self.blocks + block + 1
    }

    /// Whether the batch after the acknowledged ones may have been under way in block `block`.
    fn in_doubt(&self, block: u64) -> bool {
        (1..=BATCH).any(|ahead| self.block_of(self.acknowledged + ahead) == block)
    }

    /// What a journal is that was found on a disk: `found` holds the valid sequence of each block, 0 for one that is wholly zero, [`TORN`] for
    /// anything else. Also the blocks that are not what they must be, as (block, due, found), at most the first of them, and how many.
    #[must_use]
    pub fn recover(found: &[u64]) -> (Journal, u64, Option<(u64, u64, u64)>) {
        let blocks = found.len() as u64;
        let newest = found
            .iter()
            .copied()
            .filter(|&at| at <= SEQUENCE_MAX)
            .max()
            .unwrap_or(0);
        let mut journal = Journal {
            blocks,
            acknowledged: newest.saturating_sub(1) / BATCH * BATCH,
        };
        let whole = newest > 0
            && (1..=BATCH).all(|ahead| {
                let sequence = journal.acknowledged + ahead;
                found[journal.block_of(sequence) as usize] == sequence
            });
        if whole {
            journal.acknowledge();
        }
        let mut lost = 0;
        let mut first = None;
        for (block, &at) in (0..).zip(found) {
            let due = journal.due(block);
            if at != due && !journal.in_doubt(block) {
                lost += 1;
                first = first.or(Some((block, due, at)));
            }
        }
        (journal, lost, first)
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;

    const BLOCKS: usize = 32;

    /// A disk on which everything up to `acknowledged` was written.
    fn written(acknowledged: u64) -> Vec<u64> {
        let journal = Journal {
            blocks: BLOCKS as u64,
            acknowledged,
        };
        (0..BLOCKS as u64).map(|block| journal.due(block)).collect()
    }

    fn recovered(found: &[u64]) -> (u64, u64) {
        let (journal, lost, _) = Journal::recover(found);
        (journal.acknowledged(), lost)
    }

    #[test]
    fn a_whole_journal_is_found_as_it_was() {
        for acknowledged in (0..200).map(|batch| batch * BATCH) {
            assert_eq!(
                recovered(&written(acknowledged)),
                (acknowledged, 0),
                "{acknowledged}"
            );
        }
    }

    #[test]
    fn the_batch_under_way_may_be_anything_and_nothing_else_may() {
        for acknowledged in (0..40).map(|batch| batch * BATCH) {
            let journal = Journal {
                blocks: BLOCKS as u64,
                acknowledged,
            };
            for block in 0..BLOCKS as u64 {
                let mut found = written(acknowledged);
                found[block as usize] = TORN;
                let doubt = journal.in_doubt(block);
                let never = acknowledged == 0;
                let (at, lost) = recovered(&found);
                if doubt {
                    assert_eq!((at, lost), (acknowledged, 0));
                } else if !never && journal.block_of(acknowledged) / BATCH == block / BATCH {
                    // A block of the newest batch: it looks as if that had been under way, and the reader of the console knows better.
                    assert_eq!((at, lost), (acknowledged - BATCH, 0));
                } else {
                    assert_eq!((at, lost), (acknowledged, 1), "{acknowledged} {block}");
                }
            }
            for done in 1..BATCH {
                let mut found = written(acknowledged);
                let sequence = acknowledged + done;
                found[journal.block_of(sequence) as usize] = sequence;
                assert_eq!(recovered(&found), (acknowledged, 0));
            }
        }
    }

    #[test]
    fn an_older_block_is_lost_and_named() {
        let mut found = written(80);
        found[3] = 36 - BLOCKS as u64;
        assert_eq!(Journal::recover(&found).2, Some((3, 68, 4)));
    }

    #[test]
    fn absurd_disks_do_no_harm() {
        assert_eq!(blocks_on(BLOCKS_MIN * 4096 - 1), None);
        assert_eq!(blocks_on(u64::MAX), Some(BLOCKS_MAX));
        assert_eq!(blocks_on(39 * 4096), Some(32));
        for found in [vec![TORN; BLOCKS], vec![TORN - 1; BLOCKS], vec![1; BLOCKS]] {
            let (_, lost, _) = Journal::recover(&found);
            assert!(lost > 0 || found[0] == 1);
        }
    }
}
