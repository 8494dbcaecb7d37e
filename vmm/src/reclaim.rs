//! Memory that a running guest gives up: it becomes a hole of the memory's file, and its host has it back.
//!
//! A page that was given up reads as zeroes from then on, whoever looks: this guest, the next VMM that adopts the file, a migration that
//! sends it. So the page was written, with zeroes, and is marked as any other that the VMM writes. **After** it became a hole: a migration
//! that takes the marks between the two would send what the page held before, and never look at it again.
//!
//! Where part of a huge page is given up the kernel splits it. Should it be unable to at the moment, the part is zeroed and its memory stays
//! with its neighbours': what is read is the same, only less is won. Whoever gives up whole huge pages loses nothing.

use std::io;

use drover_migration::vm::Region;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{Mapped, PAGE, punch_hole};

/// Makes the whole pages within `len` bytes of guest memory from `gpa` on holes, which count as written.
///
/// # Errors
/// Not all of it is memory, or the kernel refused: what was reached before that is a hole, and what was tried is marked.
pub fn give_back(memory: &Mapped, gpa: u64, len: u64) -> io::Result<()> {
    let outside = || io::Error::new(io::ErrorKind::InvalidInput, "no guest memory");
    let first = gpa.checked_next_multiple_of(PAGE).ok_or_else(outside)?;
    let end = gpa.checked_add(len).ok_or_else(outside)? / PAGE * PAGE;
    let mut at = first;
    while at < end {
        let region = memory.find_region(GuestAddress(at)).ok_or_else(outside)?;
        let offset = at - region.start_addr().0;
        let count = (end - at).min(region.len() - offset);
        let punched = punch_hole(region, offset, count);
        let (from, bytes) = (usize::try_from(offset), usize::try_from(count));
        if let (Ok(from), Ok(bytes)) = (from, bytes) {
            (**region).bitmap().mark_dirty(from, bytes);
        }
        punched?;
        at += count;
    }
    Ok(())
}

/// Ascending runs of pages, as addresses and lengths in bytes, of page numbers in any order; each page once.
pub fn runs(mut numbers: Vec<u32>) -> Vec<Region> {
    numbers.sort_unstable();
    numbers.dedup();
    let mut runs: Vec<Region> = Vec::new();
    for gpa in numbers.into_iter().map(|number| u64::from(number) * PAGE) {
        match runs.last_mut() {
            Some(last) if last.gpa + last.len == gpa => last.len += PAGE,
            _ => runs.push(Region { gpa, len: PAGE }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{HOLE_END, HOLE_START, Memory};
    use drover_migration::vm::{PAGE_SIZE, PageSet};

    const HUGE_PAGES: u64 = (2 << 20) / PAGE;

    fn written(memory: &Memory) -> PageSet {
        let mut written = PageSet::empty(memory.pages());
        memory.take_written(&mut written);
        written
    }

    #[test]
    fn what_is_given_back_is_a_hole_that_counts_as_written() {
        for huge_pages in [false, true] {
            let memory = Memory::new(8 << 20, huge_pages).unwrap();
            let all = vec![7; usize::try_from(memory.bytes()).unwrap()];
            memory.write_pages(0, &all).unwrap();
            memory.forget_written();
            // A huge page whole, half of the next, and pages that are cut are left.
            give_back(memory.mapped(), 2 << 20, 3 << 20).unwrap();
            give_back(memory.mapped(), PAGE - 1, 2 * PAGE).unwrap();
            let given = written(&memory);
            let pages = |run: &drover_migration::codec::Run| run.first..run.end();
            assert_eq!(
                given.runs().iter().map(pages).collect::<Vec<_>>(),
                [1..2, HUGE_PAGES..HUGE_PAGES * 5 / 2]
            );
            assert_eq!(memory.hole_ahead(HUGE_PAGES, HUGE_PAGES), HUGE_PAGES);
            let mut back = vec![1; all.len()];
            memory.read_pages(0, &mut back).unwrap();
            for (page, content) in (0..).zip(back.chunks_exact(PAGE_SIZE)) {
                let byte = if given.contains(page) { 0 } else { 7 };
                assert!(content.iter().all(|&found| found == byte), "page {page}");
            }
        }
    }

    #[test]
    fn a_range_may_span_pieces_but_nothing_that_is_no_memory() {
        let memory = Memory::new((3 << 30) + (1 << 20), false).unwrap();
        memory
            .write_pages(HOLE_START / PAGE - 1, &[7; 2 * PAGE_SIZE])
            .unwrap();
        memory.forget_written();
        for (gpa, len) in [
            (HOLE_START - PAGE, 2 * PAGE),
            (HOLE_END + (1 << 20), PAGE),
            (u64::MAX - 1, 1),
            (u64::MAX, u64::MAX),
        ] {
            assert!(give_back(memory.mapped(), gpa, len).is_err(), "{gpa:#x}");
        }
        give_back(memory.mapped(), HOLE_END, PAGE).unwrap();
        assert_eq!(
            written(&memory).count(),
            2,
            "the page before the hole, and the one after it"
        );
    }

    #[test]
    fn numbers_become_runs_whatever_their_order_and_each_counts_once() {
        let found: Vec<_> = runs(vec![9, 4, 5, 4, 3, u32::MAX])
            .into_iter()
            .map(|run| (run.gpa / PAGE, run.len / PAGE))
            .collect();
        assert_eq!(found, [(3, 3), (9, 1), (u64::from(u32::MAX), 1)]);
        assert!(runs(Vec::new()).is_empty());
    }
}
