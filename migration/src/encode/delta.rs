//! What changed in a page, as pieces of the new content.
//!
//! ```text
//!  { gap u16, length u16, `length` bytes of new content }*      gap: bytes since the end of the piece before that stay as they were
//! ```
//!
//! The purpose is that of QEMU's XBZRLE (docs/devel/migration, "xbzrle"), the form is not: pieces hold the new bytes and not their
//! difference to the old ones, so that a piece costs nothing to apply. A delta is right only on the content it was made against, which is
//! why whoever sends one sends a checksum of the result with it ([`checksum`]), and whoever applies it compares.

use drover_proto::{Code, Fault};

use crate::codec::bad;
use crate::vm::PAGE_SIZE;

/// Above this a page is sent whole: the delta saves too little for the work on both sides.
pub const DELTA_BYTES_MAX: usize = PAGE_SIZE / 4;

const PIECE_HEADER: usize = 4;
const WORD: usize = 8;

/// The checksum of a page that is sent with its delta: CRC-32 (IEEE 802.3).
pub fn checksum(page: &[u8]) -> u32 {
    crc32fast::hash(page)
}

/// Appends what turns `old` into `new` to `out`. Gives false, and leaves `out` as it was, if that takes more than
/// [`DELTA_BYTES_MAX`] bytes. Both are whole pages.
pub fn diff(old: &[u8], new: &[u8], out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let words = || old.chunks_exact(WORD).zip(new.chunks_exact(WORD)).enumerate();
    let mut end_before = 0;
    let mut differing = words()
        .filter(|(_, (old, new))| old != new)
        .map(|(at, _)| at)
        .peekable();
    while let Some(first) = differing.next() {
        // A single equal word costs more as a gap than as content.
        let mut last = first;
        while let Some(next) = differing.next_if(|next| *next <= last + 2) {
            last = next;
        }
        let (from, to) = (first * WORD, (last + 1) * WORD);
        if out.len() - start + PIECE_HEADER + to - from > DELTA_BYTES_MAX {
            out.truncate(start);
            return false;
        }
        for number in [from - end_before, to - from] {
            let number = u16::try_from(number).expect("a page has no more than 4096 bytes");
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&new[from..to]);
        end_before = to;
    }
    true
}

/// Applies a delta to the page it was made against. `expected`: the checksum that the result must have.
///
/// Errors: `bad_frame` if it leaves the page or is cut off; `digest_mismatch` if the result is another than the sender's, because the
/// page was not the one that the sender knew. `page` is of no use then.
pub fn patch(page: &mut [u8], delta: &[u8], expected: u32) -> Result<(), Fault> {
    let (mut rest, mut at) = (delta, 0_usize);
    while !rest.is_empty() {
        let Some((header, after)) = rest.split_first_chunk::<PIECE_HEADER>() else {
            return Err(bad(format!(
                "a delta ends inside a piece's header, {} bytes in",
                rest.len()
            )));
        };
        let [g0, g1, l0, l1] = *header;
        let (gap, length) = (u16::from_le_bytes([g0, g1]), u16::from_le_bytes([l0, l1]));
        let (from, length) = (at + usize::from(gap), usize::from(length));
        let piece = after.split_at_checked(length);
        let Some((slot, (content, after))) = page.get_mut(from..from + length).zip(piece) else {
            return Err(bad(format!(
                "a delta's piece of {length} bytes at {from} leaves its page, or has only {} bytes",
                after.len()
            )));
        };
        slot.copy_from_slice(content);
        (at, rest) = (from + length, after);
    }
    let found = checksum(page);
    if found != expected {
        return Err(Fault::new(
            Code::DigestMismatch,
            format!("a page has checksum {found:08x} after its delta, the source's has {expected:08x}"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn changed(seed: u8, changes: &[(usize, Vec<u8>)]) -> (Vec<u8>, Vec<u8>) {
        let old: Vec<u8> = (0..PAGE_SIZE).map(|at| (at as u8).wrapping_mul(seed)).collect();
        let mut new = old.clone();
        for (at, bytes) in changes {
            let end = (at + bytes.len()).min(PAGE_SIZE);
            new[*at..end].copy_from_slice(&bytes[..end - at]);
        }
        (old, new)
    }

    proptest! {
        #[test]
        fn a_delta_turns_the_old_page_into_the_new_one_and_only_that(
            seed in any::<u8>(),
            changes in prop::collection::vec((0..PAGE_SIZE, prop::collection::vec(any::<u8>(), 1..200)), 0..12),
        ) {
            let (old, new) = changed(seed, &changes);
            let mut delta = vec![7; 3];
            if diff(&old, &new, &mut delta) {
                prop_assert!(delta.len() - 3 <= DELTA_BYTES_MAX);
                let mut page = old.clone();
                patch(&mut page, &delta[3..], checksum(&new)).unwrap();
                prop_assert!(page == new);
                // On another page it is refused: one that differs where the delta does not write.
                let mut other = new.iter().map(|byte| !byte).collect::<Vec<_>>();
                let code = patch(&mut other, &delta[3..], checksum(&new)).unwrap_err().code;
                prop_assert_eq!(code, Code::DigestMismatch);
            } else {
                prop_assert_eq!(delta, [7; 3]);
                let differing = old.iter().zip(&new).filter(|(old, new)| old != new).count();
                prop_assert!(differing * 25 > DELTA_BYTES_MAX, "{differing} bytes were too many");
            }
        }

        #[test]
        fn no_bytes_make_it_panic_or_write_elsewhere(delta in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut page = vec![1; PAGE_SIZE];
            let result = patch(&mut page, &delta, 0);
            prop_assert!(result.is_err() && page.len() == PAGE_SIZE);
        }
    }

    #[test]
    fn an_equal_page_is_an_empty_delta_and_a_new_one_is_none() {
        let (old, new) = changed(3, &[]);
        let mut out = Vec::new();
        assert!(diff(&old, &new, &mut out) && out.is_empty());
        assert!(!diff(&old, &vec![0xee; PAGE_SIZE], &mut out) && out.is_empty());
    }

    #[test]
    fn a_piece_that_leaves_the_page_is_refused() {
        let mut page = vec![0; PAGE_SIZE];
        for (gap, length, content) in [
            (4090_u16, 8_u16, 8),
            (u16::MAX, 8, 8),
            (0, 16, 8),
            (0, u16::MAX, 8),
        ] {
            let mut delta = Vec::new();
            delta.extend_from_slice(&gap.to_le_bytes());
            delta.extend_from_slice(&length.to_le_bytes());
            delta.resize(4 + content, 1);
            assert_eq!(
                patch(&mut page, &delta, 0).unwrap_err().code,
                Code::BadFrame,
                "{gap} {length}"
            );
        }
        assert_eq!(patch(&mut page, &[0, 0, 1], 0).unwrap_err().code, Code::BadFrame);
    }
}
