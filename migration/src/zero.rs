//! Whether a page is zero.

/// Bytes looked at before the first chance to leave early; a multiple of every vector register's length.
const STRIDE: usize = 256;

/// Whether every byte is zero. The inner loop has no branch, so that the compiler makes vector instructions of it; most
/// pages that are not zero are found out by their first stride.
pub fn is_zero(bytes: &[u8]) -> bool {
    let strides = bytes.chunks_exact(STRIDE);
    strides.remainder().iter().all(|byte| *byte == 0)
        && strides
            .into_iter()
            .all(|stride| stride.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_bit_anywhere_makes_a_page_not_zero() {
        let mut page = [0; 4096];
        assert!(is_zero(&page));
        for at in 0..page.len() {
            page[at] = 1 << (at % 8);
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }
}
