//! Post-copy: the VM runs at its target before all of its pages are there. The page sets of both sides, without IO.
//!
//! ```text
//!  source, paused for good                              target
//!  Missing*, RoundEnd{post_copy} ─────────────────────▶ discards what it has of these pages; whoever touches one waits
//!        ◀───────────────────────────────────────────── RoundAck
//!  State ─────────────────────────────────────────────▶ restores
//!        ◀───────────────────────────────────────────── PageRequest{pages}   on the link, whenever something waits;
//!  Pages* on the link, PageAnswer ────────────────────▶                       without pages once a second: a sign of life
//!        ◀───────────────────────────────────────────── Ready                the commit, the grant: it runs
//!  Pages* on the streams, the rest in the background ─▶ places them
//!        ◀───────────────────────────────────────────── Complete             the source ends
//! ```
//!
//! A page of the missing set is in one of three states: *missing*, *requested*, and, once it is placed, in the set no more. It is placed
//! whole and only where nothing is yet ([`PostCopyVm::place_pages`]), so a page that comes twice, on the link and on a stream, does no
//! harm although the guest may have written it in between. What the source sends cannot differ from one time to the next: it never
//! runs again.
//!
//! **Nothing is ever made up.** A page outside the missing set is known to be as it was at the source, so where memory has a hole there,
//! it is zero and is placed as that. A page in the set comes from the source or not at all: when the link is lost, whoever waits for it
//! or touches it later gets an error, never zeroes ([`PostCopyVm::lose`]).
//!
//! The link is what counts. A stream that breaks costs speed only: what did not come on it is asked for over the link.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use drover_proto::v1::PostCopyReceipt;
use drover_proto::{Code, Fault};

use crate::codec::{BATCH_PAGES, MISSING_BYTES_MAX, Missing, Run, Runs, bad, push_run};
use crate::target::Received;
use crate::vm::PageSet;

/// Pages of one job in the background: few, so that a cap or a slow link does not keep back the neighbourhood of the next fault.
pub const PUSH_PAGES: u64 = 64;
/// The target speaks at least so often.
pub const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
/// In this phase the link may be silent for so many times longer than before it counts as lost: it costs the VM.
pub const PATIENCE: u32 = 6;

const WORDS_MAX: usize = MISSING_BYTES_MAX / size_of::<u64>();

/// A VM that can run before all its pages are there. `place_pages` and `place_zeros` are called from several threads at once.
pub trait PostCopyVm: Sync {
    /// Discards the pages of `missing`. From the return on whoever touches a page that memory does not hold waits until it is placed.
    fn arm(&self, missing: &PageSet) -> Result<(), Fault>;
    /// Adds to `pages` those that somebody waits for and that were not told before. Waits for one, but no longer than `wait`.
    fn faults(&self, wait: Duration, pages: &mut Vec<u64>) -> Result<(), Fault>;
    /// Gives whole pages from `first` on, all of one region, their content, but for those that have one already; wakes who waits for them.
    fn place_pages(&self, first: u64, data: &[u8]) -> Result<(), Fault>;
    /// As `place_pages`, with zeroes.
    fn place_zeros(&self, first: u64, count: u64) -> Result<(), Fault>;
    /// Everything is verified and restored, and Ready was said: from now on there may be a grant.
    fn stand(&self, received: Received) -> Result<(), Fault>;
    /// Nothing is missing any more.
    fn disarm(&self) -> Result<(), Fault>;
    /// What is missing will never come. On return nobody waits for a page; whoever touches one of `missing` fails, and other pages that
    /// memory does not hold read as zero, which they are.
    fn lose(&self, missing: &PageSet, why: &Fault);
}

/// The fault of a VM that knows nothing of post-copy.
pub fn unavailable() -> Fault {
    Fault::new(Code::PostCopyUnavailable, "this VMM takes no VM by post-copy")
}

/// `set` as messages.
pub fn declare(set: &PageSet) -> impl Iterator<Item = Missing> {
    set.words
        .chunks(WORDS_MAX)
        .zip((0..).step_by(WORDS_MAX * 64))
        .filter(|(words, _)| words.iter().any(|word| *word != 0))
        .map(|(words, first)| Missing {
            first,
            bitmap: words.iter().flat_map(|word| word.to_le_bytes()).collect(),
        })
}

/// Adds what a message of the peer declares to `set`, which is of `total` pages.
pub fn declared(missing: &Missing, total: u64, set: &mut PageSet) -> Result<(), Fault> {
    let (chunks, rest) = missing.bitmap.as_chunks::<8>();
    let sound =
        rest.is_empty() && missing.bitmap.len() <= MISSING_BYTES_MAX && missing.first.is_multiple_of(64);
    if !sound {
        return Err(bad(format!(
            "a set of missing pages begins at page {} and has {} bytes: 64 pages a word and {MISSING_BYTES_MAX} bytes at most are due",
            missing.first,
            missing.bitmap.len()
        )));
    }
    for (chunk, first) in chunks.iter().zip((missing.first..).step_by(64)) {
        let word = u64::from_le_bytes(*chunk);
        let outside = match total.saturating_sub(first) {
            0 => word,
            left @ 1..64 => word >> left,
            _ => 0,
        };
        if outside != 0 {
            return Err(bad(format!(
                "a page from {first} on is said to be missing, memory has {total} pages"
            )));
        }
        let slot = usize::try_from(first / 64)
            .ok()
            .and_then(|at| set.words.get_mut(at));
        if let Some(slot) = slot {
            *slot |= word;
        }
    }
    Ok(())
}

/// The source's side: what was not sent yet, and where to go on.
#[derive(Debug, Default)]
pub struct Outgoing {
    unsent: PageSet,
    cursor: usize,
}

impl Outgoing {
    /// All of `unsent` is to be sent.
    pub fn new(unsent: PageSet) -> Self {
        Self { unsent, cursor: 0 }
    }

    /// The target asked for these, which are sent at once: they are not sent again, and what follows them comes next.
    pub fn asked(&mut self, runs: &[Run]) {
        // While the target restores, pages are asked for before any are to be sent in the background.
        if self.unsent.words.is_empty() {
            return;
        }
        for run in runs {
            self.unsent.remove(*run);
        }
        if let Some(last) = runs.last() {
            self.cursor = usize::try_from(last.first / 64).unwrap_or(0);
        }
    }

    /// The next pages to be sent, ascending; none: everything was given out.
    pub fn take(&mut self) -> Vec<Run> {
        let runs = self.unsent.take_runs(&mut self.cursor, PUSH_PAGES);
        if !runs.is_empty() {
            return runs;
        }
        self.cursor = 0;
        self.unsent.take_runs(&mut self.cursor, PUSH_PAGES)
    }
}

/// The pages of a request as runs, if it is one that may be answered.
pub fn requested(pages: &[u64], total: u64) -> Result<Vec<Run>, Fault> {
    let ascending = pages.is_sorted_by(|one, next| one < next);
    if !ascending || pages.len() > BATCH_PAGES || pages.last().is_some_and(|last| *last >= total) {
        return Err(bad(format!(
            "{} pages up to {:?} are asked for; {BATCH_PAGES} ascending ones of {total} are the most",
            pages.len(),
            pages.last()
        )));
    }
    let mut runs = Vec::new();
    pages.iter().for_each(|page| push_run(&mut runs, *page, 1));
    Ok(runs)
}

/// What is to be done about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFault {
    /// The page is zero: place it as that.
    Zero,
    /// It was asked for, or is about to be.
    Wait,
}

/// The target's side: what it lacks, and what it has asked for.
#[derive(Debug)]
pub struct Lacking {
    declared: PageSet,
    missing: PageSet,
    left: u64,
    requested: PageSet,
    queue: VecDeque<u64>,
    /// Where the pages that nobody waits for are asked for next, once they do not come by themselves.
    cursor: usize,
    spoke_at: Duration,
    waiting: BTreeMap<u64, Duration>,
    faults: u64,
    latency_sum: Duration,
    latency_longest: Duration,
}

impl Lacking {
    /// All of `missing` is lacking. `now`: as everywhere in this module, time since any fixed instant.
    pub fn new(now: Duration, missing: PageSet) -> Self {
        let left = missing.count();
        Self {
            requested: PageSet {
                words: vec![0; missing.words.len()],
            },
            declared: missing.clone(),
            missing,
            left,
            queue: VecDeque::new(),
            cursor: 0,
            spoke_at: now,
            waiting: BTreeMap::new(),
            faults: 0,
            latency_sum: Duration::ZERO,
            latency_longest: Duration::ZERO,
        }
    }

    /// What is still lacking.
    pub fn missing(&self) -> &PageSet {
        &self.missing
    }

    /// How many pages that is.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Somebody waits for a page.
    pub fn fault(&mut self, now: Duration, page: u64) -> OnFault {
        if !self.missing.contains(page) {
            return OnFault::Zero;
        }
        if let std::collections::btree_map::Entry::Vacant(first) = self.waiting.entry(page) {
            first.insert(now);
            self.faults += 1;
        }
        self.request(page);
        OnFault::Wait
    }

    fn request(&mut self, page: u64) {
        if !self.requested.contains(page) {
            self.requested.insert(Run {
                first: page,
                count: 1,
            });
            self.queue.push_back(page);
        }
    }

    /// What to ask the source for now, ascending; without pages: only a sign of life is due. `alone`: nothing more comes on the streams.
    pub fn next_request(&mut self, now: Duration, alone: bool) -> Option<Vec<u64>> {
        if alone && self.queue.is_empty() {
            let rest = self.missing.next_pages(&mut self.cursor, BATCH_PAGES);
            rest.into_iter().for_each(|page| self.request(page));
        }
        let due = now.saturating_sub(self.spoke_at) >= SIGN_OF_LIFE;
        let count = self.queue.len().min(BATCH_PAGES);
        if count == 0 && !due {
            return None;
        }
        self.spoke_at = now;
        let mut pages: Vec<u64> = self.queue.drain(..count).collect();
        // Some may have come by themselves meanwhile.
        pages.retain(|page| self.missing.contains(*page));
        pages.sort_unstable();
        (due || !pages.is_empty()).then_some(pages)
    }

    /// Whether pages that a frame brings may be placed: only ones that were declared missing.
    pub fn check(&self, runs: Runs<'_>) -> Result<(), Fault> {
        let stranger = runs
            .iter()
            .flat_map(|run| run.first..run.end())
            .find(|page| !self.declared.contains(*page));
        match stranger {
            None => Ok(()),
            Some(page) => Err(bad(format!("page {page} came, which was not missing"))),
        }
    }

    /// These pages are in memory now, for the first time or again.
    pub fn placed(&mut self, now: Duration, runs: Runs<'_>) {
        for page in runs.iter().flat_map(|run| run.first..run.end()) {
            if !self.missing.contains(page) {
                continue;
            }
            self.missing.remove(Run {
                first: page,
                count: 1,
            });
            self.left -= 1;
            if let Some(since) = self.waiting.remove(&page) {
                let took = now.saturating_sub(since);
                self.latency_sum += took;
                self.latency_longest = self.latency_longest.max(took);
            }
        }
    }

    /// For the receipt, but for the duration.
    pub fn receipt(&self) -> PostCopyReceipt {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        PostCopyReceipt {
            pages: self.declared.count(),
            duration_us: 0,
            faults: self.faults,
            fault_mean_us: micros(self.latency_sum) / self.faults.max(1),
            fault_longest_us: micros(self.latency_longest),
        }
    }
}
