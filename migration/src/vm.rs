//! What the engine needs of a VM, on either side. The VMM implements these two traits; the engine knows nothing of KVM.
//!
//! The promise of [`SourceVm`]: the engine calls `pause` at most once an attempt, and after it never resumes anything:
//! only the outcome in the replicated log does, and that is the VMM's affair.

use drover_proto::Fault;

/// Size of a page, bytes. Guest memory is a whole number of pages.
pub const PAGE_SIZE: usize = 4096;

/// One region of guest memory; both fields in bytes, multiples of [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Length.
    pub len: u64,
}

/// The guest's memory: pages are numbered 0.. through the regions in order of their address, so a page number is
/// dense and independent of holes.
pub type Layout = Vec<Region>;

/// A set of pages as a bitmap over dense page numbers, 64 pages a word, lowest page in the lowest bit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    /// The bitmap's words.
    pub words: Vec<u64>,
}

impl PageSet {
    /// An empty set that can hold `pages` pages.
    pub fn empty(pages: u64) -> Self {
        Self {
            words: vec![0; usize::try_from(pages.div_ceil(64)).expect("guest memory fits the address space")],
        }
    }

    /// Every page below `pages`.
    pub fn full(pages: u64) -> Self {
        let mut set = Self::empty(pages);
        set.words.fill(u64::MAX);
        if !pages.is_multiple_of(64)
            && let Some(last) = set.words.last_mut()
        {
            *last = (1 << (pages % 64)) - 1;
        }
        set
    }

    /// Number of pages in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds every page of `other`, which must be of the same size.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(
            self.words.len(),
            other.words.len(),
            "page sets of one guest have one size"
        );
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }
}

/// The VM as the source of a migration. Called from the engine's thread.
pub trait SourceVm {
    /// The guest's memory.
    fn layout(&self) -> Layout;
    /// Starts the dirty log: from the return on, every write by the guest or the VMM is found by `take_dirty`.
    fn start_dirty_log(&mut self) -> Result<(), Fault>;
    /// Ends dirty logging; called on every way out.
    fn stop_dirty_log(&mut self);
    /// Adds to `into` the pages written since the last call, by the guest's vCPUs and by the VMM itself, and re-arms
    /// tracking for them. Pages are re-armed *before* they are read by `read_page`, so no write is missed.
    fn take_dirty(&mut self, into: &mut PageSet) -> Result<(), Fault>;
    /// Copies pages `first..` into `out` (whole pages). The guest may be writing meanwhile: a torn page is dirty again.
    fn read_pages(&self, first: u64, out: &mut [u8]);
    /// Stops all vCPUs for the switchover; on return none executes.
    fn pause(&mut self) -> Result<(), Fault>;
    /// The encoded `VmSave` of the paused VM.
    fn save(&mut self) -> Result<Vec<u8>, Fault>;
}

/// The VM as the target of a migration.
pub trait TargetVm {
    /// The guest's memory.
    fn layout(&self) -> Layout;
    /// Writes whole pages from `first` on.
    fn write_pages(&mut self, first: u64, data: &[u8]) -> Result<(), Fault>;
    /// Makes pages `first..first + count` read as zero, without populating memory that is a hole.
    fn zero_pages(&mut self, first: u64, count: u64) -> Result<(), Fault>;
    /// Decodes and restores an encoded `VmSave`; refuses whatever it does not know or cannot set.
    fn restore(&mut self, state: &[u8]) -> Result<(), Fault>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_set_holds_exactly_the_pages_asked_for() {
        for pages in [0, 1, 63, 64, 65, 128, 1000] {
            assert_eq!(PageSet::full(pages).count(), pages);
        }
    }
}
