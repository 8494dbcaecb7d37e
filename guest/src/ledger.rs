//! One processor's owned pages and its own record of what it last wrote to each of them.
//!
//! The record (an expected sequence a page) lives in other memory than the pages. A page that fails is repaired after it was counted, so
//! that each loss counts once; the count itself never goes down.

use crate::page::{Damage, Page};
use crate::params::Content;

/// Owned pages, by their index among this processor's.
pub trait Pages {
    /// The page at `index`, which is below the number of entries in the ledger's record.
    fn page(&mut self, index: usize) -> &mut Page;
}

/// A page that did not hold what was last written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The page's number among all owned pages.
    pub page: u64,
    /// The sequence last written; 0 for a page that must be wholly zero.
    pub expected_sequence: u64,
    /// The sequence in its header.
    pub found_sequence: u64,
    /// What was wrong.
    pub damage: Damage,
}

/// The pages of one processor.
#[derive(Debug)]
pub struct Ledger<'a, P> {
    pages: P,
    expected: &'a mut [u64],
    first_number: u64,
    content: Content,
}

impl<'a, P: Pages> Ledger<'a, P> {
    /// Takes over `expected.len()` pages, numbered from `first_number`. Nothing is touched yet.
    pub fn new(pages: P, expected: &'a mut [u64], first_number: u64, content: Content) -> Self {
        Ledger {
            pages,
            expected,
            first_number,
            content,
        }
    }

    /// Pages owned.
    #[must_use]
    pub fn len(&self) -> usize {
        self.expected.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.expected.is_empty()
    }

    /// Gives a page its first content. A cold page of content zero is left as the machine gave it when that is zeros.
    ///
    /// Returns whether it was written to.
    pub fn fill(&mut self, index: usize) -> bool {
        if self.content != Content::Zero {
            self.put(index, 1);
            return true;
        }
        self.expected[index] = 0;
        let page = self.pages.page(index);
        let dirty = !page.is_zero();
        if dirty {
            *page = Page::zero();
        }
        dirty
    }

    /// Checks a page against the record.
    ///
    /// # Errors
    /// The loss; the page is repaired, so that the next check passes.
    pub fn verify(&mut self, index: usize) -> Result<(), Loss> {
        let sequence = self.expected[index];
        let number = self.number(index);
        let page = self.pages.page(index);
        let Err(damage) = page.verify(number, sequence) else {
            return Ok(());
        };
        let loss = Loss {
            page: number,
            expected_sequence: sequence,
            found_sequence: page.sequence(),
            damage,
        };
        if sequence == 0 {
            *page = Page::zero();
        } else {
            self.put(index, sequence + 1);
        }
        Err(loss)
    }

    /// Checks a page, then writes it anew with the next sequence.
    ///
    /// # Errors
    /// The loss of what the page held before.
    pub fn rewrite(&mut self, index: usize) -> Result<(), Loss> {
        let verdict = self.verify(index);
        self.put(index, self.expected[index] + 1);
        verdict
    }

    fn number(&self, index: usize) -> u64 {
        self.first_number + index as u64
    }

    fn put(&mut self, index: usize, sequence: u64) {
        let number = self.number(index);
        self.pages.page(index).write(number, sequence, self.content);
        self.expected[index] = sequence;
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;

    impl Pages for Vec<Page> {
        fn page(&mut self, index: usize) -> &mut Page {
            &mut self[index]
        }
    }

    fn filled(expected: &mut [u64], content: Content) -> Ledger<'_, Vec<Page>> {
        let pages = vec![Page::zero(); expected.len()];
        let mut ledger = Ledger::new(pages, expected, 100, content);
        for index in 0..ledger.len() {
            ledger.fill(index);
        }
        ledger
    }

    #[test]
    fn untouched_pages_verify_through_many_writes() {
        for content in [Content::Zero, Content::Repeat, Content::Random] {
            let mut expected = [9; 4];
            let mut ledger = filled(&mut expected, content);
            for round in 0..100 {
                assert_eq!(ledger.rewrite(round % 3), Ok(()));
                for index in 0..ledger.len() {
                    assert_eq!(ledger.verify(index), Ok(()));
                }
            }
        }
    }

    #[test]
    fn a_stale_page_is_one_loss_and_is_found_by_either_check() {
        let mut records = [[0; 4]; 2];
        for (expected, find) in records.iter_mut().zip([Ledger::verify, Ledger::rewrite]) {
            let mut ledger = filled(expected, Content::Random);
            ledger.rewrite(2).unwrap();
            let stale = ledger.pages[2].clone();
            ledger.rewrite(2).unwrap();
            ledger.pages[2] = stale;
            let loss = Loss {
                page: 102,
                expected_sequence: 3,
                found_sequence: 2,
                damage: Damage::Sequence,
            };
            assert_eq!(find(&mut ledger, 2), Err(loss));
            assert_eq!(ledger.verify(2), Ok(()));
        }
    }

    #[test]
    fn two_exchanged_pages_are_two_losses() {
        let mut expected = [0; 4];
        let mut ledger = filled(&mut expected, Content::Repeat);
        ledger.pages.swap(0, 3);
        assert_eq!(ledger.verify(0).unwrap_err().damage, Damage::Number);
        assert_eq!(ledger.verify(3).unwrap_err().damage, Damage::Number);
    }

    #[test]
    fn zero_content_stays_wholly_zero_until_it_is_hot() {
        let mut expected = [5; 2];
        let pages = vec![Page([3; crate::page::WORDS]), Page::zero()];
        let mut ledger = Ledger::new(pages, &mut expected, 0, Content::Zero);
        assert!(ledger.fill(0), "a page with leftovers is cleared");
        assert!(!ledger.fill(1), "a page of zeros is not dirtied");
        assert!(ledger.pages[0].is_zero());
        ledger.rewrite(1).unwrap();
        assert!(!ledger.pages[1].is_zero());
        ledger.pages[0].0[77] = 1;
        let loss = Loss {
            page: 0,
            expected_sequence: 0,
            found_sequence: 0,
            damage: Damage::NotZero,
        };
        assert_eq!(ledger.verify(0), Err(loss));
        assert_eq!(ledger.verify(0), Ok(()));
    }
}
