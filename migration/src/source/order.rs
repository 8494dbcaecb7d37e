//! Which pages of a round go next, and which wait for the next one, because the guest has written them again already.
//!
//! ```text
//!            ┌ pending ── cold, in order of their numbers ─┐
//!  round r   │                                             ├──▶ sent
//!            └ hot ────── seen in round r - 1 ───────────┘
//!                  │ seen to be written since the round began, before its turn or after it
//!                  ▼
//!                seen ──▶ hot of round r + 1
//! ```
//!
//! A page that was written again since the round began is due in the next round whatever is done now, so to send it now is to send it
//! twice. What was seen once is likely to be written again soon and goes last, when most is known of it.
//!
//! **Nothing is lost here.** A page leaves the three sets only through [`Order::take`], and what was seen stays in them, or comes
//! back to them, even if the next dirty log does not name it: whoever looks may have taken it out of the log.

use crate::codec::Run;
use crate::vm::PageSet;

/// Guests with more pages (64 GiB) are sent in order of address, since the two sets more would take more memory than they are worth.
const PAGES_MAX: u64 = 1 << 24;

/// See the module.
#[derive(Debug)]
pub(super) struct Order {
    pending: PageSet,
    pending_pages: u64,
    /// Words of `pending` below this are empty.
    cursor: usize,
    hot: PageSet,
    hot_pages: u64,
    seen: PageSet,
    seen_pages: u64,
    /// Pages that were due in this round and wait for the next one.
    put_off: u64,
    /// `pending` is with whoever takes the dirty log.
    lent: bool,
    /// A deliberate mistake for tests of the tests: forget what was seen.
    forgetful: bool,
}

impl Order {
    /// Every page below `pages` is still to be sent.
    pub fn full(pages: u64, forgetful: bool) -> Self {
        let aside = if pages <= PAGES_MAX { pages } else { 0 };
        Self {
            pending: PageSet::full(pages),
            pending_pages: pages,
            cursor: 0,
            hot: PageSet::empty(aside),
            hot_pages: 0,
            seen: PageSet::empty(aside),
            seen_pages: 0,
            put_off: 0,
            lent: false,
            forgetful,
        }
    }

    /// Whether pages can be put off.
    pub fn puts_off(&self) -> bool {
        !self.seen.words.is_empty()
    }

    /// Of a large guest: what is still to be sent, for the dirty log to be added to and to come back with [`Order::next_round`]. A second
    /// set would be as large again.
    pub fn lend(&mut self) -> Option<PageSet> {
        if self.puts_off() || self.lent {
            return None;
        }
        self.lent = true;
        Some(std::mem::take(&mut self.pending))
    }

    /// Every page that is still to be sent; none is afterwards.
    pub fn take_all(&mut self) -> PageSet {
        let puts_off = self.puts_off();
        let [mut all, hot, seen] = [&mut self.pending, &mut self.hot, &mut self.seen].map(std::mem::take);
        if puts_off {
            all.merge(&hot);
            all.merge(&seen);
        }
        (self.pending_pages, self.hot_pages, self.seen_pages) = (0, 0, 0);
        all
    }

    /// Pages that the target lacks, as far as is known.
    pub fn remaining(&self) -> u64 {
        self.due() + self.seen_pages
    }

    /// Of them, those that are due in this round.
    pub fn due(&self) -> u64 {
        self.pending_pages + self.hot_pages
    }

    /// Pages that were due in this round and wait for the next one.
    pub fn put_off(&self) -> u64 {
        self.put_off
    }

    /// The next pages of the round, at most `max`; none when all that are due were taken.
    pub fn take(&mut self, max: u64) -> Vec<Run> {
        if self.pending_pages == 0 && self.hot_pages > 0 {
            std::mem::swap(&mut self.pending, &mut self.hot);
            std::mem::swap(&mut self.pending_pages, &mut self.hot_pages);
            self.cursor = 0;
        }
        let runs = self.pending.take_runs(&mut self.cursor, max);
        self.pending_pages -= runs.iter().map(|run| run.count).sum::<u64>();
        runs
    }

    /// These pages were written since the round began: those of them that are still due wait for the next round, the others are due
    /// in it as well.
    pub fn keep_seen(&mut self, seen: &PageSet) {
        if !self.puts_off() {
            self.pending.merge(seen);
            self.pending_pages = self.pending.count();
            self.cursor = 0;
            return;
        }
        let cold = remove(&mut self.pending, seen);
        self.pending_pages -= cold;
        let hot = remove(&mut self.hot, seen);
        self.hot_pages -= hot;
        self.put_off += cold + hot;
        self.seen.merge(seen);
        self.seen_pages = self.seen.count();
    }

    /// A round has ended, and `dirty` was written in it: all that is left is due in the next one. Gives the number of pages that the
    /// guest wrote.
    pub fn next_round(&mut self, dirty: PageSet) -> u64 {
        if self.forgetful {
            self.seen.words.fill(0);
        }
        (self.cursor, self.put_off) = (0, 0);
        if std::mem::take(&mut self.lent) {
            let before = self.pending_pages;
            self.pending = dirty;
            self.pending_pages = self.pending.count();
            return self.pending_pages.saturating_sub(before);
        }
        self.pending.merge(&dirty);
        if !self.puts_off() {
            self.pending_pages = self.pending.count();
            return dirty.count();
        }
        // What was seen is sent last; `hot`, if the round was broken off, goes back to the rest.
        self.pending.merge(&self.hot);
        std::mem::swap(&mut self.hot, &mut self.seen);
        self.seen.words.fill(0);
        self.seen_pages = 0;
        let (mut written, mut cold, mut hot) = (0, 0, 0);
        for ((pending, late), dirty) in self
            .pending
            .words
            .iter_mut()
            .zip(&self.hot.words)
            .zip(&dirty.words)
        {
            written += u64::from((dirty | late).count_ones());
            *pending &= !late;
            cold += u64::from(pending.count_ones());
            hot += u64::from(late.count_ones());
        }
        (self.pending_pages, self.hot_pages) = (cold, hot);
        written
    }
}

/// Takes `which` out of `set`; gives how many pages of it were there.
fn remove(set: &mut PageSet, which: &PageSet) -> u64 {
    let mut removed = 0;
    for (word, which) in set.words.iter_mut().zip(&which.words) {
        removed += u64::from((*word & which).count_ones());
        *word &= !which;
    }
    removed
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 300;

    fn set(pages: &BTreeSet<u64>) -> PageSet {
        let mut set = PageSet::empty(PAGES);
        pages
            .iter()
            .for_each(|&first| set.insert(Run { first, count: 1 }));
        set
    }

    fn pages() -> impl Strategy<Value = BTreeSet<u64>> {
        prop::collection::btree_set(0..PAGES, 0..40)
    }

    fn taken(order: &mut Order, max: u64) -> Vec<u64> {
        let runs = order.take(max);
        runs.iter().flat_map(|run| run.first..run.end()).collect()
    }

    #[test]
    fn a_page_written_again_before_its_turn_goes_last_in_the_next_round_and_once() {
        let mut order = Order::full(PAGES, false);
        assert_eq!(taken(&mut order, 100), (0..100).collect::<Vec<_>>());
        // 7 went already, 100 and 299 did not.
        order.keep_seen(&set(&[7, 100, 299].into()));
        assert_eq!((order.due(), order.put_off(), order.remaining()), (198, 2, 201));
        assert_eq!(taken(&mut order, 1000), (101..299).collect::<Vec<_>>());
        assert_eq!(taken(&mut order, 1000), [0; 0]);
        assert_eq!(order.next_round(set(&[7, 200].into())), 4);
        assert_eq!(taken(&mut order, 1000), [200]);
        assert_eq!(taken(&mut order, 1000), [7, 100, 299]);
        assert_eq!(order.remaining(), 0);
    }

    #[test]
    fn a_guest_too_large_for_it_is_sent_in_order() {
        let mut order = Order {
            hot: PageSet::empty(0),
            seen: PageSet::empty(0),
            ..Order::full(PAGES, false)
        };
        order.keep_seen(&set(&[7, 100].into()));
        assert_eq!(taken(&mut order, 1000).len(), 300);
        order.keep_seen(&set(&[9].into()));
        assert_eq!(taken(&mut order, 1000), [9]);
        assert_eq!(order.next_round(set(&[3].into())), 1);
        assert_eq!(taken(&mut order, 1000), [3]);
        // Broken off with one page due, which the log is added to.
        order.next_round(set(&[5].into()));
        let mut lent = order.lend().unwrap();
        assert_eq!((order.lend(), order.remaining()), (None, 1));
        lent.merge(&set(&[8, 9].into()));
        assert_eq!(order.next_round(lent), 2);
        assert_eq!(taken(&mut order, 1000), [5, 8, 9]);
        assert_eq!(
            Order::full(PAGES, false).lend(),
            None,
            "one that is not too large"
        );
    }

    proptest! {
        /// Against a model of plain sets: whatever is seen and written, each page that is owed is sent once a round or stays owed.
        #[test]
        fn no_page_is_lost_or_sent_twice_a_round(rounds in prop::collection::vec((prop::collection::vec((1_u64..150, pages()), 1..6), pages()), 1..6)) {
            let mut order = Order::full(PAGES, false);
            let mut owed: BTreeSet<u64> = (0..PAGES).collect();
            for (steps, dirty) in rounds {
                let mut sent = BTreeSet::new();
                let (mut put_off, mut seen_of_all) = (BTreeSet::new(), BTreeSet::new());
                for (max, seen) in steps.into_iter().chain([(PAGES, BTreeSet::new()), (PAGES, BTreeSet::new())]) {
                    for page in taken(&mut order, max) {
                        prop_assert!(owed.contains(&page) && !put_off.contains(&page));
                        prop_assert!(sent.insert(page), "page {page} was sent twice");
                    }
                    put_off.extend(seen.iter().copied().filter(|page| owed.contains(page) && !sent.contains(page)));
                    seen_of_all.extend(seen.iter().copied());
                    order.keep_seen(&set(&seen));
                    prop_assert_eq!(order.put_off(), put_off.len() as u64);
                    prop_assert_eq!(order.remaining(), (&(&owed - &sent) | &seen_of_all).len() as u64);
                }
                prop_assert_eq!(order.due(), 0);
                // Whether the log names what was seen or not.
                owed = &(&(&owed - &sent) | &seen_of_all) | &dirty;
                let written = order.next_round(set(&dirty));
                prop_assert_eq!(written, (&seen_of_all | &dirty).len() as u64);
                prop_assert_eq!(order.remaining(), owed.len() as u64);
            }
        }
    }
}
