//! The two frames that carry guest memory in another form than it has. Like plain pages they are read in place.
//!
//! ```text
//!  Packed: round u32 | pages u32 | runs u32 | method u32 | compressed content                       | runs × { first u64, count u64 }
//!  Deltas: round u32 | pages u32 | runs u32 | 0 u32      | pages × { crc u32, length u32, delta } | runs × { first u64, count u64 }
//! ```
//!
//! Packed content is shorter than the pages, or the frame is refused: so nobody gains by claiming more than there is. See
//! [`crate::encode`] for what is inside.

use drover_proto::Fault;

use super::pages::{PAGES_PREFIX, RUN_BYTES, Runs, u32_at};
use super::{BATCH_PAGES, RUNS_MAX, bad};
use crate::encode::compress::Method;
use crate::encode::delta::DELTA_BYTES_MAX;
use crate::vm::PAGE_SIZE;

/// What stands before each delta.
pub(super) const DELTA_PREFIX: usize = 8;
pub(super) const DELTAS_PAYLOAD_MAX: usize =
    PAGES_PREFIX + BATCH_PAGES * (DELTA_PREFIX + DELTA_BYTES_MAX) + RUNS_MAX * RUN_BYTES;

/// Pages with content, compressed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed<'a> {
    /// The round it belongs to.
    pub round: u32,
    /// Which pages.
    pub runs: Runs<'a>,
    /// How.
    pub method: Method,
    /// What the content of all pages, in the order of the runs, was compressed to.
    pub data: &'a [u8],
}

/// Pages as what changed in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deltas<'a> {
    /// The round it belongs to.
    pub round: u32,
    /// Which pages.
    pub runs: Runs<'a>,
    data: &'a [u8],
}

/// A payload in its parts: the prefix's four numbers, what stands in the middle, and the runs, which hold as many pages as announced.
fn parts<'a>(kind: &str, payload: &'a [u8]) -> Result<([u32; 4], &'a [u8], Runs<'a>), Fault> {
    let Some((prefix, rest)) = payload.split_at_checked(PAGES_PREFIX) else {
        return Err(bad(format!(
            "a {kind} frame has {} bytes, at least {PAGES_PREFIX} are due",
            payload.len()
        )));
    };
    let numbers = [0, 4, 8, 12].map(|at| u32_at(prefix, at));
    let (pages, runs) = (numbers[1] as usize, numbers[2] as usize);
    let table = runs.saturating_mul(RUN_BYTES);
    let Some(at) = rest
        .len()
        .checked_sub(table)
        .filter(|_| (1..=BATCH_PAGES).contains(&pages))
    else {
        return Err(bad(format!(
            "a {kind} frame announces {pages} pages (1 to {BATCH_PAGES} are allowed) in {runs} runs and has {} bytes",
            rest.len()
        )));
    };
    let (data, table) = rest.split_at(at);
    let found = Runs::decode(table, runs)?;
    if found.pages() != pages as u64 {
        return Err(bad(format!(
            "a {kind} frame announces {pages} pages, its runs hold {}",
            found.pages()
        )));
    }
    Ok((numbers, data, found))
}

impl<'a> Packed<'a> {
    pub(super) fn decode(payload: &'a [u8]) -> Result<Self, Fault> {
        let ([round, pages, _, method], data, runs) = parts("Packed", payload)?;
        let Some(method) = Method::from_wire(method) else {
            return Err(bad(format!(
                "pages are compressed by the unknown method {method}"
            )));
        };
        if data.is_empty() || data.len() >= pages as usize * PAGE_SIZE {
            return Err(bad(format!(
                "{pages} pages are compressed to {} bytes, which is nothing or no less",
                data.len()
            )));
        }
        Ok(Self {
            round,
            runs,
            method,
            data,
        })
    }

    /// Length of the content, bytes.
    pub fn content_bytes(&self) -> usize {
        usize::try_from(self.runs.pages()).expect("a frame has few pages") * PAGE_SIZE
    }
}

impl<'a> Deltas<'a> {
    pub(super) fn decode(payload: &'a [u8]) -> Result<Self, Fault> {
        let ([round, pages, _, zero], data, runs) = parts("Deltas", payload)?;
        let mut rest = data;
        for _ in 0..pages {
            let Some((_, _, after)) = next(rest) else {
                return Err(bad(format!(
                    "a Deltas frame announces {pages} deltas, one of them is cut off or above {DELTA_BYTES_MAX} bytes"
                )));
            };
            rest = after;
        }
        if !rest.is_empty() || zero != 0 {
            return Err(bad(format!(
                "a Deltas frame has {} bytes after its {pages} deltas",
                rest.len()
            )));
        }
        Ok(Self { round, runs, data })
    }

    /// Each page's number, its delta, and the checksum of the result.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &'a [u8], u32)> + use<'a> {
        let mut rest = self.data;
        let pages = self.runs.iter().flat_map(|run| run.first..run.end());
        pages.map_while(move |page| {
            let (crc, delta, after) = next(rest)?;
            rest = after;
            Some((page, delta, crc))
        })
    }
}

/// The checksum of the delta in front, the delta, and what follows it.
fn next(data: &[u8]) -> Option<(u32, &[u8], &[u8])> {
    let (prefix, rest) = data.split_at_checked(DELTA_PREFIX)?;
    let (crc, length) = (u32_at(prefix, 0), u32_at(prefix, 4) as usize);
    let (delta, after) = rest
        .split_at_checked(length)
        .filter(|_| length <= DELTA_BYTES_MAX)?;
    Some((crc, delta, after))
}
