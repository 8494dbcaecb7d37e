//! What the engine needs of a VM, on either side. The VMM implements these two traits; the engine knows nothing of KVM.
//!
//! The promise of [`SourceVm`]: the engine calls `pause` at most once an attempt, and after it never resumes anything:
//! only the outcome in the replicated log does, and that is the VMM's affair.

use drover_proto::{Code, Fault};

use crate::codec::Run;
use crate::convergence::Costs;
use crate::post_copy::{self, PostCopyVm};

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

/// Where the regions end, as page numbers: what cuts runs so that each part lies in one region.
#[derive(Clone, Debug)]
pub(crate) struct RegionEnds(Vec<u64>);

impl RegionEnds {
    pub(crate) fn new(layout: &[Region]) -> Self {
        let ends = layout.iter().scan(0, |end, region| {
            *end += region.len / PAGE_SIZE as u64;
            Some(*end)
        });
        Self(ends.collect())
    }

    /// The parts of `run`, ascending.
    pub(crate) fn split(&self, run: Run) -> impl Iterator<Item = Run> {
        let mut first = run.first;
        std::iter::from_fn(move || {
            (first < run.end()).then(|| {
                let region = self.0.partition_point(|end| *end <= first);
                let end = self.0.get(region).map_or(run.end(), |end| run.end().min(*end));
                let part = Run {
                    first,
                    count: end - first,
                };
                first = end;
                part
            })
        })
    }
}

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

    /// Adds the pages of `run`, all of which the set can hold.
    pub fn insert(&mut self, run: Run) {
        self.in_words(run, |word, bits| *word |= bits);
    }

    fn in_words(&mut self, run: Run, change: impl Fn(&mut u64, u64)) {
        let mut page = run.first;
        while page < run.end() {
            let count = (64 - page % 64).min(run.end() - page);
            let bits = (u64::MAX >> (64 - count)) << (page % 64);
            change(
                &mut self.words[usize::try_from(page / 64).expect("the set holds the page")],
                bits,
            );
            page += count;
        }
    }

    /// Takes the pages of `run`, all of which the set can hold, out of it.
    pub fn remove(&mut self, run: Run) {
        self.in_words(run, |word, bits| *word &= !bits);
    }

    /// Whether the page is in the set.
    pub fn contains(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|at| self.words.get(at));
        word.is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// The runs of the set, ascending.
    pub fn runs(&self) -> Vec<Run> {
        let mut rest = self.clone();
        rest.take_runs(&mut 0, u64::MAX)
    }

    /// The next pages, at most `max` and ascending, from word `*from` on, which moves behind them, and to the front after the last one.
    pub fn next_pages(&self, from: &mut usize, max: usize) -> Vec<u64> {
        let mut pages = Vec::new();
        while let Some(word) = self.words.get(*from) {
            if pages.len() + word.count_ones() as usize > max {
                return pages;
            }
            pages.extend(
                (0..64)
                    .filter(|bit| word >> bit & 1 == 1)
                    .map(|bit| *from as u64 * 64 + bit),
            );
            *from += 1;
        }
        *from = 0;
        pages
    }

    /// Takes the lowest pages out of the set, at most `max` of them, as ascending runs. No page is below word `*from`,
    /// which moves on, so that emptying the set takes one pass over it.
    pub fn take_runs(&mut self, from: &mut usize, max: u64) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut left = max;
        while let Some(word) = self.words.get_mut(*from) {
            while *word != 0 && left > 0 {
                let bit = word.trailing_zeros();
                let count = u64::from((*word >> bit).trailing_ones()).min(left);
                *word &= !((u64::MAX >> (64 - count)) << bit);
                crate::codec::push_run(&mut runs, *from as u64 * 64 + u64::from(bit), count);
                left -= count;
            }
            if *word != 0 {
                break;
            }
            *from += 1;
        }
        runs
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

/// The VM as the source of a migration. `read_pages` and `zero_ahead` are called from several threads at once, never while
/// the engine's own thread is in another call than `look_dirty`.
pub trait SourceVm: Sync {
    /// The guest's memory.
    fn layout(&self) -> Layout;
    /// Starts the dirty log: from the return on, every write by the guest or the VMM is found by `take_dirty`.
    fn start_dirty_log(&self) -> Result<(), Fault>;
    /// Ends dirty logging; called on every way out before the pause. After it the log is the VMM's to end, once the VM runs again.
    fn stop_dirty_log(&self);
    /// Adds to `into` the pages written since the last call, by the guest's vCPUs and by the VMM itself, and re-arms
    /// tracking for them. Pages are re-armed *before* they are read by `read_page`, so no write is missed.
    fn take_dirty(&self, into: &mut PageSet) -> Result<(), Fault>;
    /// Adds to `into` pages written since the last call of `take_dirty`, as many as are found at little cost, so that they are not sent
    /// now and again later. The next `take_dirty` may leave them out or not. A VM that cannot finds none.
    fn look_dirty(&self, into: &mut PageSet) -> Result<(), Fault> {
        let _ = into;
        Ok(())
    }
    /// Copies pages `first..` into `out` (whole pages, all of one region). The guest may be writing meanwhile: a torn page
    /// is dirty again.
    fn read_pages(&self, first: u64, out: &mut [u8]);
    /// How many pages from `first` on, at most `count`, are known to be zero without reading them, because nothing was
    /// ever written there, or the guest has given them up. Asked like `read_pages`, after the log was taken: a page written meanwhile is dirty again.
    fn zero_ahead(&self, first: u64, count: u64) -> u64 {
        let _ = (first, count);
        0
    }
    /// What the switchover will cost beside the last pages, as far as the VM knows before it. `commit` is not its affair.
    fn costs(&self) -> Costs {
        Costs::default()
    }
    /// Keeps each vCPU out of the guest for `percent` of its time, 0 to 99, from within milliseconds on; 0 lets it run
    /// freely at once. The engine says 0 on every way out, the pause included. A VM that cannot does nothing.
    fn throttle(&self, percent: u32) {
        let _ = percent;
    }
    /// Stops all vCPUs for the switchover; on return none executes.
    fn pause(&self) -> Result<(), Fault>;
    /// The encoded `VmSave` of the paused VM.
    fn save(&self) -> Result<Vec<u8>, Fault>;
    /// The target is about to get ready, by post-copy: from now on, and after the commit, it needs this VM's pages. Until the engine returns.
    fn serving(&self) {}
}

/// The VM as the target of a migration. Memory is written from several threads at once, never the same page by two.
pub trait TargetVm: Sync {
    /// The guest's memory.
    fn layout(&self) -> Layout;
    /// Writes whole pages from `first` on, all of one region.
    fn write_pages(&self, first: u64, data: &[u8]) -> Result<(), Fault>;
    /// Copies pages that were written before, all of one region, into `out`, to change them.
    fn read_back(&self, first: u64, out: &mut [u8]) -> Result<(), Fault>;
    /// Makes pages `first..first + count`, all of one region, read as zero, without populating memory that is a hole.
    fn zero_pages(&self, first: u64, count: u64) -> Result<(), Fault>;
    /// Takes over the source's memory, which this process was handed, and builds the VM on it. Until the grant nothing may write to it:
    /// should the hand-over be aborted, the source goes on with it as it is.
    fn adopt_memory(&self) -> Result<(), Fault> {
        Err(Fault::new(Code::Internal, "this VM takes over no memory"))
    }
    /// Decodes and restores an encoded `VmSave`; refuses whatever it does not know or cannot set.
    fn restore(&self, state: &[u8]) -> Result<(), Fault>;
    /// This VM as one that can run before all its pages are there, or why it cannot. The answer stays the same.
    fn post_copy(&self) -> Result<&dyn PostCopyVm, Fault> {
        Err(post_copy::unavailable())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_taken_apart_into_ascending_runs_and_nothing_is_lost() {
        let runs = [(0, 1), (3, 61), (64, 1), (66, 200), (400, 3), (511, 1)]
            .map(|(first, count)| Run { first, count });
        for max in [1, 2, 7, 64, 100, 1000] {
            let mut set = PageSet::empty(512);
            runs.iter().for_each(|run| set.insert(*run));
            let (mut from, mut taken) = (0, Vec::new());
            loop {
                let some = set.take_runs(&mut from, max);
                let pages: Vec<u64> = some.iter().flat_map(|run| run.first..run.end()).collect();
                assert!(pages.len() as u64 <= max);
                if pages.is_empty() {
                    break;
                }
                taken.extend(pages);
            }
            assert_eq!(
                taken,
                runs.iter()
                    .flat_map(|run| run.first..run.end())
                    .collect::<Vec<_>>()
            );
            assert_eq!(set.count(), 0);
        }
        let mut set = PageSet::full(512);
        assert_eq!(
            set.take_runs(&mut 0, 300),
            [Run { first: 0, count: 300 }],
            "a run goes on across words"
        );
        assert_eq!(set.count(), 212);
    }

    #[test]
    fn a_run_is_cut_where_regions_end() {
        let page = PAGE_SIZE as u64;
        let ends = RegionEnds::new(&[3, 1, 6].map(|pages| Region {
            gpa: 0,
            len: pages * page,
        }));
        let parts = |first, count| {
            ends.split(Run { first, count })
                .map(|r| (r.first, r.count))
                .collect::<Vec<_>>()
        };
        assert_eq!(parts(0, 10), [(0, 3), (3, 1), (4, 6)]);
        assert_eq!(parts(1, 2), [(1, 2)]);
        assert_eq!(parts(5, 1), [(5, 1)]);
    }

    #[test]
    fn a_full_set_holds_exactly_the_pages_asked_for() {
        for pages in [0, 1, 63, 64, 65, 128, 1000] {
            assert_eq!(PageSet::full(pages).count(), pages);
        }
    }
}
