//! One owned page: three words of header and a body made from the page's number and sequence.
//!
//! | word | holds |
//! | --- | --- |
//! | 0 | the page's number |
//! | 1 | its sequence: 1 at the first write, one more at each |
//! | 2 | a checksum over all the other words |
//! | 3… | the body: zeros, one word repeated, or words that do not compress |
//!
//! A page that comes back with an older sequence was lost by whoever moved it; one with another number was put in the wrong place; one whose
//! checksum fails is torn. The checksum covers every word and finds accidents; it is not a cryptographic digest.

use crate::params::Content;

/// Words of a page.
pub const WORDS: usize = 512;

const NUMBER: usize = 0;
const SEQUENCE: usize = 1;
const CHECKSUM: usize = 2;
const BODY: usize = 3;

/// A page as the guest sees it.
#[repr(C, align(4096))]
#[derive(Clone)]
pub struct Page(pub [u64; WORDS]);

/// What is wrong with a page that was read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// It carries another page's number.
    Number,
    /// It carries another sequence than the one last written.
    Sequence,
    /// Its words do not add up.
    Checksum,
    /// It should be wholly zero and is not.
    NotZero,
}

/// Spreads the bits of `x` over a word: the finalizer of a multiplicative hash, a bijection.
#[must_use]
pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

impl Page {
    /// A page of zeros.
    #[must_use]
    pub const fn zero() -> Page {
        Page([0; WORDS])
    }

    /// Writes the whole page: header and body.
    pub fn write(&mut self, number: u64, sequence: u64, content: Content) {
        let words = &mut self.0;
        words[NUMBER] = number;
        words[SEQUENCE] = sequence;
        let seed = mix(mix(number).wrapping_add(sequence));
        match content {
            Content::Zero => words[BODY..].fill(0),
            Content::Repeat => words[BODY..].fill(seed),
            Content::Random => {
                let mut state = seed;
                for word in &mut words[BODY..] {
                    state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    *word = (state ^ (state >> 31)).wrapping_mul(0xd6e8_feb8_6659_fd93);
                }
            }
        }
        self.0[CHECKSUM] = self.checksum();
    }

    /// Compares the page with what was last written to it; `sequence` 0 stands for never, that is wholly zero.
    ///
    /// # Errors
    /// The first thing that differs.
    pub fn verify(&self, number: u64, sequence: u64) -> Result<(), Damage> {
        if sequence == 0 {
            return if self.is_zero() {
                Ok(())
            } else {
                Err(Damage::NotZero)
            };
        }
        if self.0[NUMBER] != number {
            return Err(Damage::Number);
        }
        if self.0[SEQUENCE] != sequence {
            return Err(Damage::Sequence);
        }
        if self.0[CHECKSUM] != self.checksum() {
            return Err(Damage::Checksum);
        }
        Ok(())
    }

    /// The sequence in the header, whatever it is worth.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.0[SEQUENCE]
    }

    /// Whether every word is zero.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.0.iter().fold(0, |all, word| all | word) == 0
    }

    /// Four independent lanes, so that the multiplications overlap; the checksum's own word counts as zero.
    fn checksum(&self) -> u64 {
        const FACTOR: u64 = 0x9fb2_1c65_1e98_df25;
        let mut lanes: [u64; 4] = [1, 2, 3, 4];
        for (index, group) in self.0.chunks_exact(4).enumerate() {
            for (lane, (position, word)) in lanes.iter_mut().zip(group.iter().enumerate()) {
                let word = if index == 0 && position == CHECKSUM {
                    0
                } else {
                    *word
                };
                *lane = (lane.rotate_left(29) ^ word).wrapping_mul(FACTOR);
            }
        }
        lanes.iter().fold(0, |sum, lane| mix(sum ^ lane))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTENTS: [Content; 3] = [Content::Zero, Content::Repeat, Content::Random];

    fn written(number: u64, sequence: u64, content: Content) -> Page {
        let mut page = Page::zero();
        page.write(number, sequence, content);
        page
    }

    #[test]
    fn a_page_verifies_as_what_was_written_and_as_nothing_else() {
        for content in CONTENTS {
            let page = written(7, 3, content);
            assert_eq!(page.verify(7, 3), Ok(()));
            assert_eq!(page.verify(8, 3), Err(Damage::Number));
            assert_eq!(page.verify(7, 4), Err(Damage::Sequence));
            assert_eq!(page.verify(7, 0), Err(Damage::NotZero));
        }
    }

    #[test]
    fn any_flipped_bit_is_found() {
        for content in CONTENTS {
            for word in 0..WORDS {
                let mut page = written(7, 3, content);
                page.0[word] ^= 1 << (word % 64);
                assert!(page.verify(7, 3).is_err(), "{content:?} word {word}");
            }
        }
    }

    #[test]
    fn two_exchanged_words_are_found() {
        let mut page = written(7, 3, Content::Random);
        page.0.swap(8, 12);
        assert_eq!(page.verify(7, 3), Err(Damage::Checksum));
    }

    #[test]
    fn a_page_never_written_must_be_wholly_zero() {
        let mut page = Page::zero();
        assert_eq!(page.verify(7, 0), Ok(()));
        page.0[511] = 1;
        assert_eq!(page.verify(7, 0), Err(Damage::NotZero));
        assert_eq!(Page::zero().verify(7, 1), Err(Damage::Number));
        assert_eq!(Page::zero().verify(0, 1), Err(Damage::Sequence));
    }

    #[test]
    fn bodies_are_what_their_content_promises() {
        assert!(
            written(7, 1, Content::Zero).0[BODY..]
                .iter()
                .all(|word| *word == 0)
        );
        let repeat = written(7, 1, Content::Repeat);
        assert!(
            repeat.0[BODY..]
                .iter()
                .all(|word| *word == repeat.0[BODY] && *word != 0)
        );
        assert_ne!(repeat.0[BODY], written(7, 2, Content::Repeat).0[BODY]);
        let mut random = written(7, 1, Content::Random).0;
        random.sort_unstable();
        assert!(random.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
