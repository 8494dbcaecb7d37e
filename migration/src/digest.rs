//! What source and target must agree on when all has been sent: the saved state byte for byte, and how much memory went
//! over the link. The pages themselves are covered by each frame's checksum and sequence number, and by TLS.

/// What was sent in all rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Rounds, the pass after the pause included.
    pub rounds: u32,
    /// Pages with content.
    pub pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
}

/// BLAKE3 over the saved state and the totals.
pub fn digest(state: &[u8], totals: Totals) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(state);
    hasher.update(&totals.rounds.to_le_bytes());
    hasher.update(&totals.pages.to_le_bytes());
    hasher.update(&totals.zero_pages.to_le_bytes());
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_changes_with_the_state_and_with_every_count() {
        let totals = Totals {
            rounds: 3,
            pages: 70,
            zero_pages: 9,
        };
        let digests = [
            digest(b"state", totals),
            digest(b"statf", totals),
            digest(b"state", Totals { rounds: 4, ..totals }),
            digest(b"state", Totals { pages: 71, ..totals }),
            digest(
                b"state",
                Totals {
                    zero_pages: 8,
                    ..totals
                },
            ),
        ];
        assert!((1..digests.len()).all(|other| digests[0] != digests[other]));
    }
}
