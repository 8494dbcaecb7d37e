//! Which hot page comes next.

use crate::page::mix;
use crate::params::Pattern;

/// A small generator of 64-bit numbers: a counter through a bijection, so its period is 2^64.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Starts from `seed`; equal seeds give equal numbers.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(mix(seed))
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit`, all with the same chance up to one part in 2^64 / `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        let scaled = u128::from(self.number()) * u128::from(limit);
        u64::try_from(scaled >> 64).unwrap_or(0)
    }
}

/// Spreads popular pages over the hot set. A prime above every possible number of pages, so ranks map to pages one to one.
const SPREAD: u64 = 4_294_967_291;

/// Chooses among `count` hot pages.
#[derive(Clone, Debug)]
pub struct Chooser {
    pattern: Pattern,
    count: u64,
    next: u64,
    random: Random,
}

impl Chooser {
    /// `count` is at least 1 and below 2^32.
    #[must_use]
    pub fn new(pattern: Pattern, count: u64, seed: u64) -> Chooser {
        assert!(
            (1..SPREAD).contains(&count),
            "a hot set has at least one page and fewer than 2^32"
        );
        Chooser {
            pattern,
            count,
            next: 0,
            random: Random::new(seed),
        }
    }

    /// The index of the page to write next, below `count`.
    pub fn choose(&mut self) -> u64 {
        match self.pattern {
            Pattern::Sequential => {
                let index = self.next;
                self.next = if index + 1 == self.count { 0 } else { index + 1 };
                index
            }
            Pattern::Uniform => self.random.below(self.count),
            Pattern::Zipf => {
                let rank = self.zipf_rank();
                ((rank - 1) * SPREAD) % self.count
            }
        }
    }

    /// A rank from 1 to `count` with a chance close to 1/rank (exponent 1), without floating point: the ranks from 2^k to 2^(k+1) - 1
    /// together weigh nearly the same for every k, so choose k evenly, then the rank evenly within; the last, incomplete octave is
    /// chosen in proportion to how much of it exists.
    fn zipf_rank(&mut self) -> u64 {
        let top = u64::from(self.count.ilog2());
        let low = 1u64 << top;
        let in_last = self.count - low + 1;
        let ticket = self.random.below(top * low + in_last);
        let octave = ticket / low;
        if octave == top {
            return low + ticket % low;
        }
        (1 << octave) + self.random.below(1 << octave)
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;

    fn histogram(pattern: Pattern, count: u64, draws: u64) -> Vec<u64> {
        let mut chooser = Chooser::new(pattern, count, 42);
        let mut seen = vec![0; usize::try_from(count).unwrap()];
        for _ in 0..draws {
            seen[usize::try_from(chooser.choose()).unwrap()] += 1;
        }
        seen
    }

    #[test]
    fn sequential_visits_every_page_in_turn() {
        let mut chooser = Chooser::new(Pattern::Sequential, 3, 0);
        let order: Vec<u64> = (0..7).map(|_| chooser.choose()).collect();
        assert_eq!(order, [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn uniform_gives_every_page_about_its_share() {
        let seen = histogram(Pattern::Uniform, 100, 100_000);
        assert!(seen.iter().all(|hits| (800..1200).contains(hits)), "{seen:?}");
    }

    #[test]
    fn zipf_is_steep_and_reaches_every_page() {
        for count in [1, 2, 3, 100, 1000, 1024] {
            let mut seen = histogram(Pattern::Zipf, count, 1_000_000);
            assert!(
                seen.iter().all(|hits| *hits > 0),
                "every one of {count} pages is written"
            );
            seen.sort_unstable_by(|a, b| b.cmp(a));
            if count >= 100 {
                // By the law the k-th page has 1/k of the first one's share; octaves make it right to a factor of two.
                for k in [2usize, 8, 64] {
                    let ratio = seen[0] / seen[k - 1];
                    let k = u64::try_from(k).unwrap();
                    assert!(
                        (k / 2..=k * 2).contains(&ratio),
                        "of {count} pages the {k}-th: 1/{ratio}"
                    );
                }
            }
        }
    }

    #[test]
    fn equal_seeds_give_equal_choices() {
        assert_eq!(
            histogram(Pattern::Zipf, 50, 1000),
            histogram(Pattern::Zipf, 50, 1000)
        );
    }
}
