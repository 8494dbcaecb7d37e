//! What is in a spare page that was written to: words that are neither zero nor compress, of its number.

/// The `word`-th word of spare page `index` (SplitMix64's finishing steps, so that neighbours share nothing).
#[must_use]
pub const fn word(index: u64, word: u64) -> u64 {
    let mut value = (index << 9 | word & 511)
        .wrapping_add(1)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_words_of_pages_are_alike_and_none_is_zero() {
        let words: BTreeSet<u64> = (0..64)
            .flat_map(|index| (0..512).map(move |at| word(index, at)))
            .collect();
        assert_eq!(words.len(), 64 * 512);
        assert!(!words.contains(&0));
    }
}
