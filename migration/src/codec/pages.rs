//! The two frames that carry guest memory. Their payloads are read in place.
//!
//! ```text
//!  Pages:  round u32 | pages u32 | runs u32 | 0 u32 | pages × 4096 bytes | runs × { first u64, count u64 }
//!  Zeros:  round u32 | runs u32                                          | runs × { first u64, count u64 }
//! ```
//!
//! Runs ascend and do not overlap. The data stands before the runs so that the sender can fill it before it knows
//! which pages turn out to be zero.

use drover_proto::Fault;

use super::{BATCH_PAGES, RUNS_MAX, bad};
use crate::vm::PAGE_SIZE;

pub(super) const PAGES_PREFIX: usize = 16;
pub(super) const ZEROS_PREFIX: usize = 8;
pub(super) const RUN_BYTES: usize = 16;
pub(super) const PAGES_PAYLOAD_MAX: usize = PAGES_PREFIX + BATCH_PAGES * PAGE_SIZE + RUNS_MAX * RUN_BYTES;
pub(super) const ZEROS_PAYLOAD_MAX: usize = ZEROS_PREFIX + RUNS_MAX * RUN_BYTES;

/// Neighbouring pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of the first page.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl Run {
    /// Number of the page after the last.
    pub fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }
}

/// Adds a page to ascending runs.
pub(crate) fn push(runs: &mut Vec<Run>, first: u64, count: u64) {
    match runs.last_mut() {
        Some(last) if last.end() == first => last.count += count,
        _ => runs.push(Run { first, count }),
    }
}

/// The runs of a frame, found sound: each holds a page, they ascend, none overflows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runs<'a> {
    table: &'a [u8],
    pages: u64,
}

impl<'a> Runs<'a> {
    pub(super) fn decode(table: &'a [u8], runs: usize) -> Result<Self, Fault> {
        if runs == 0 || runs > RUNS_MAX || table.len() != runs * RUN_BYTES {
            return Err(bad(format!(
                "a page frame announces {runs} runs (1 to {RUNS_MAX} are allowed) and has {} bytes of them",
                table.len()
            )));
        }
        let mut all = Self { table, pages: 0 };
        let mut end = 0;
        for run in all.iter() {
            let sound = run.count > 0 && run.first >= end && run.first.checked_add(run.count).is_some();
            if !sound {
                return Err(bad(format!(
                    "a page frame's run of {} pages from page {} is empty, overlaps the one before, or overflows",
                    run.count, run.first
                )));
            }
            end = run.end();
            all.pages += run.count;
        }
        Ok(all)
    }

    /// The runs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Run> + use<'a> {
        self.table.chunks_exact(RUN_BYTES).map(|entry| Run {
            first: u64_at(entry, 0),
            count: u64_at(entry, 8),
        })
    }

    /// Pages in all runs.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The page after the highest one.
    pub fn end(&self) -> u64 {
        self.iter().last().map_or(0, Run::end)
    }
}

/// Pages with content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages<'a> {
    /// The round it belongs to.
    pub round: u32,
    /// Which pages.
    pub runs: Runs<'a>,
    /// Their content, in the order of the runs.
    pub data: &'a [u8],
}

impl<'a> Pages<'a> {
    pub(super) fn decode(payload: &'a [u8]) -> Result<Self, Fault> {
        let Some((prefix, rest)) = payload.split_at_checked(PAGES_PREFIX) else {
            return Err(bad(format!(
                "a Pages frame has {} bytes, at least {PAGES_PREFIX} are due",
                payload.len()
            )));
        };
        let (pages, runs) = (u32_at(prefix, 4) as usize, u32_at(prefix, 8) as usize);
        if pages == 0 || pages > BATCH_PAGES {
            return Err(bad(format!(
                "a Pages frame announces {pages} pages, 1 to {BATCH_PAGES} are allowed"
            )));
        }
        let Some((data, table)) = rest.split_at_checked(pages * PAGE_SIZE) else {
            return Err(bad(format!(
                "a Pages frame announces {pages} pages and has {} bytes",
                rest.len()
            )));
        };
        let runs = Runs::decode(table, runs)?;
        if runs.pages() != pages as u64 {
            return Err(bad(format!(
                "a Pages frame announces {pages} pages, its runs hold {}",
                runs.pages()
            )));
        }
        Ok(Self {
            round: u32_at(prefix, 0),
            runs,
            data,
        })
    }
}

/// What stands before the pages' content in a payload, and what after it; all before, if there is not so much content as is announced.
pub(super) fn around_data(payload: &[u8]) -> (&[u8], &[u8]) {
    let Some((prefix, rest)) = payload.split_at_checked(PAGES_PREFIX) else {
        return (payload, &[]);
    };
    let data = (u32_at(prefix, 4) as usize).saturating_mul(PAGE_SIZE);
    rest.split_at_checked(data)
        .map_or((payload, &[]), |(_, after)| (prefix, after))
}

/// Pages that are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeros<'a> {
    /// The round it belongs to.
    pub round: u32,
    /// Which pages.
    pub runs: Runs<'a>,
}

impl<'a> Zeros<'a> {
    pub(super) fn decode(payload: &'a [u8]) -> Result<Self, Fault> {
        let Some((prefix, table)) = payload.split_at_checked(ZEROS_PREFIX) else {
            return Err(bad(format!(
                "a Zeros frame has {} bytes, at least {ZEROS_PREFIX} are due",
                payload.len()
            )));
        };
        Ok(Self {
            round: u32_at(prefix, 0),
            runs: Runs::decode(table, u32_at(prefix, 4) as usize)?,
        })
    }
}

/// `bytes` is long enough: its callers split it off at a constant.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zeros(runs: &[(u64, u64)]) -> Vec<u8> {
        let mut payload = 1_u32.to_le_bytes().to_vec();
        payload.extend(u32::try_from(runs.len()).unwrap().to_le_bytes());
        for (first, count) in runs {
            payload.extend(first.to_le_bytes());
            payload.extend(count.to_le_bytes());
        }
        payload
    }

    #[test]
    fn ascending_runs_are_read() {
        let payload = zeros(&[(0, 4), (4, 1), (9, 2)]);
        let frame = Zeros::decode(&payload).unwrap();
        assert_eq!(frame.runs.pages(), 7);
        assert_eq!(frame.runs.end(), 11);
        assert_eq!(frame.runs.iter().nth(2), Some(Run { first: 9, count: 2 }));
    }

    #[test]
    fn runs_that_lie_are_refused() {
        for runs in [
            &[][..],
            &[(3, 0)],
            &[(5, 2), (6, 1)],
            &[(5, 2), (0, 1)],
            &[(u64::MAX, 1)],
            &[(1, u64::MAX)],
            &[(0, u64::MAX / 2), (u64::MAX / 2, u64::MAX / 2 + 2)],
        ] {
            assert!(Zeros::decode(&zeros(runs)).is_err(), "{runs:?}");
        }
    }

    #[test]
    fn a_pages_frame_must_hold_as_many_pages_as_it_and_its_runs_say() {
        let frame = |pages: u32, data: usize, runs: &[(u64, u64)]| {
            let mut payload = Vec::new();
            for number in [1, pages, u32::try_from(runs.len()).unwrap(), 0] {
                payload.extend(number.to_le_bytes());
            }
            payload.extend(vec![7; data * PAGE_SIZE]);
            payload.extend(&zeros(runs)[ZEROS_PREFIX..]);
            payload
        };
        assert_eq!(
            Pages::decode(&frame(2, 2, &[(4, 2)])).unwrap().data.len(),
            2 * PAGE_SIZE
        );
        for broken in [
            frame(0, 0, &[(4, 1)]),
            frame(2, 1, &[(4, 2)]),
            frame(1, 2, &[(4, 1)]),
            frame(2, 2, &[(4, 3)]),
            frame(u32::MAX, 1, &[(4, 1)]),
            Vec::new(),
        ] {
            assert!(Pages::decode(&broken).is_err());
        }
    }
}
