//! Where the owned pages lie: the machine's memory map less the guest's own image, cut into whole pages.

use crate::PAGE_SIZE;

/// Usable ranges kept; a map with more is used in part.
pub const RANGES_MAX: usize = 16;

/// Whole pages from `start` to below `end`, physical addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// First byte after.
    pub end: u64,
}

impl Range {
    fn pages(self) -> u64 {
        (self.end - self.start) / PAGE_SIZE
    }
}

/// Memory that the guest may use.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    ranges: [Range; RANGES_MAX],
    len: usize,
}

impl Layout {
    /// Nothing yet.
    #[must_use]
    pub const fn new() -> Layout {
        Layout {
            ranges: [Range { start: 0, end: 0 }; RANGES_MAX],
            len: 0,
        }
    }

    /// Adds the part of a usable range that lies between `floor` and `ceiling`, in whole pages. A range beyond [`RANGES_MAX`] is dropped.
    pub fn add(&mut self, base: u64, size: u64, floor: u64, ceiling: u64) {
        let start = base.max(floor).div_ceil(PAGE_SIZE).saturating_mul(PAGE_SIZE);
        let end = base.saturating_add(size).min(ceiling) / PAGE_SIZE * PAGE_SIZE;
        if start < end && self.len < RANGES_MAX {
            self.ranges[self.len] = Range { start, end };
            self.len += 1;
        }
    }

    /// All pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.ranges[..self.len].iter().map(|range| range.pages()).sum()
    }

    /// Highest address in use.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.ranges[..self.len]
            .iter()
            .map(|range| range.end)
            .max()
            .unwrap_or(0)
    }

    /// Takes `pages` pages in one piece out of the layout and returns their address.
    pub fn take(&mut self, pages: u64) -> Option<u64> {
        let range = self.ranges[..self.len]
            .iter_mut()
            .find(|range| range.pages() >= pages)?;
        let start = range.start;
        range.start += pages * PAGE_SIZE;
        Some(start)
    }

    /// The address of the `index`-th page.
    #[must_use]
    pub fn address(&self, index: u64) -> Option<u64> {
        let mut left = index;
        for range in &self.ranges[..self.len] {
            if left < range.pages() {
                return Some(range.start + left * PAGE_SIZE);
            }
            left -= range.pages();
        }
        None
    }
}

/// The `index`-th of `parts` shares of `total`: (first, how many). Shares differ by at most one.
#[must_use]
pub fn share(total: u64, parts: u64, index: u64) -> (u64, u64) {
    let (whole, rest) = (total / parts, total % parts);
    (whole * index + rest.min(index), whole + u64::from(index < rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOR: u64 = 0x20_0000;
    const CEILING: u64 = 16 << 30;

    fn layout() -> Layout {
        let mut layout = Layout::new();
        layout.add(0, 0x9_fc00, FLOOR, CEILING);
        layout.add(0x10_0000, 0x20_0000 + 100, FLOOR, CEILING);
        layout.add(4 << 30, 3 * PAGE_SIZE, FLOOR, CEILING);
        layout
    }

    #[test]
    fn only_whole_pages_above_the_image_are_used() {
        let layout = layout();
        assert_eq!(layout.pages(), 256 + 3);
        assert_eq!(layout.address(0), Some(FLOOR));
        assert_eq!(layout.address(255), Some(0x2f_f000));
        assert_eq!(layout.address(256), Some(4 << 30));
        assert_eq!(layout.address(259), None);
        assert_eq!(layout.end(), (4 << 30) + 3 * PAGE_SIZE);
    }

    #[test]
    fn what_is_taken_is_not_given_again() {
        let mut layout = layout();
        assert_eq!(layout.take(2), Some(FLOOR));
        assert_eq!(layout.address(0), Some(FLOOR + 2 * PAGE_SIZE));
        assert_eq!(layout.pages(), 254 + 3);
        assert_eq!(layout.take(255), None, "no single range has so many left");
    }

    #[test]
    fn absurd_maps_do_no_harm() {
        let mut layout = Layout::new();
        layout.add(u64::MAX, u64::MAX, FLOOR, CEILING);
        layout.add(5000, 10, 0, CEILING);
        assert_eq!((layout.pages(), layout.address(0)), (0, None));
        for _ in 0..2 * RANGES_MAX {
            layout.add(FLOOR, PAGE_SIZE, FLOOR, CEILING);
        }
        assert_eq!(layout.pages(), RANGES_MAX as u64);
    }

    #[test]
    fn shares_cover_everything_once() {
        for (total, parts) in [(10, 3), (16, 16), (7, 1), (100, 7)] {
            let mut next = 0;
            for index in 0..parts {
                let (first, count) = share(total, parts, index);
                assert_eq!(first, next);
                next += count;
            }
            assert_eq!(next, total);
        }
    }
}
