//! The sender's buffer for one batch of pages. Guest memory is copied once, straight to where the frame is sent from;
//! zero pages found there fall out and become runs. Nothing is allocated a page.

use drover_proto::Fault;

use super::encoded::DELTA_PREFIX;
use super::pages::{PAGES_PREFIX, RUN_BYTES, Run, ZEROS_PREFIX, push};
use super::{BATCH_PAGES, HEADER_BYTES, Kind, seal};
use crate::encode::cache::{Cache, Exchanged};
use crate::encode::compress::{Method, Packer};
use crate::vm::PAGE_SIZE;
use crate::zero::is_zero;

/// Pages are read and scanned in steps of so many, so that they are still in the cache when they are scanned.
const STEP_PAGES: usize = 16;
const DATA_AT: usize = HEADER_BYTES + PAGES_PREFIX;

/// Up to [`BATCH_PAGES`] pages on their way into frames.
#[derive(Debug)]
pub struct Batch {
    /// Frames for encoded pages; memory for them is taken when they are first needed.
    packed_frame: Vec<u8>,
    packed: Option<(Method, usize)>,
    deltas_frame: Vec<u8>,
    delta_runs: Vec<Run>,
    deltas: usize,
    round: u32,
    pages_frame: Vec<u8>,
    zeros_frame: Vec<u8>,
    pages: usize,
    seen: usize,
    known_zeros: u64,
    runs: Vec<Run>,
    zeros: Vec<Run>,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            packed_frame: Vec::new(),
            packed: None,
            deltas_frame: Vec::new(),
            delta_runs: Vec::new(),
            deltas: 0,
            round: 0,
            pages_frame: vec![0; HEADER_BYTES + Kind::Pages.payload_max()],
            zeros_frame: vec![0; HEADER_BYTES + Kind::Zeros.payload_max()],
            pages: 0,
            seen: 0,
            known_zeros: 0,
            runs: Vec::with_capacity(BATCH_PAGES),
            zeros: Vec::with_capacity(BATCH_PAGES),
        }
    }
}

impl Batch {
    /// Empties the batch for pages of `round`.
    pub fn begin(&mut self, round: u32) {
        self.round = round;
        self.pages = 0;
        self.seen = 0;
        self.known_zeros = 0;
        self.runs.clear();
        self.zeros.clear();
        self.packed = None;
        self.delta_runs.clear();
        self.deltas = 0;
    }

    /// Adds the pages of `run`, which come after all that were added before. `read(first, out)` fills `out` with the
    /// content of the pages from `first` on. A batch takes at most [`BATCH_PAGES`] pages that are read.
    pub fn add(&mut self, run: Run, mut read: impl FnMut(u64, &mut [u8])) {
        let mut page = run.first;
        while page < run.end() {
            let step = usize::try_from(run.end() - page)
                .unwrap_or(STEP_PAGES)
                .min(STEP_PAGES);
            self.count(step);
            let from = DATA_AT + self.pages * PAGE_SIZE;
            read(page, &mut self.pages_frame[from..from + step * PAGE_SIZE]);
            for at in (from..).step_by(PAGE_SIZE).take(step) {
                if is_zero(&self.pages_frame[at..at + PAGE_SIZE]) {
                    push(&mut self.zeros, page, 1);
                } else {
                    let to = DATA_AT + self.pages * PAGE_SIZE;
                    if to != at {
                        self.pages_frame.copy_within(at..at + PAGE_SIZE, to);
                    }
                    push(&mut self.runs, page, 1);
                    self.pages += 1;
                }
                page += 1;
            }
        }
    }

    /// Adds pages that are known to be zero, any number of them.
    pub fn add_zeros(&mut self, run: Run) {
        if run.count > 0 {
            self.known_zeros = self.known_zeros.saturating_add(run.count);
            push(&mut self.zeros, run.first, run.count);
        }
    }

    fn count(&mut self, pages: usize) {
        self.seen = self.seen.saturating_add(pages);
        assert!(self.seen <= BATCH_PAGES, "a batch was given {} pages", self.seen);
    }

    /// Pages with content, those that go as deltas among them.
    pub fn pages(&self) -> u64 {
        (self.pages + self.deltas) as u64
    }

    /// Of them, those that go as deltas.
    pub fn delta_pages(&self) -> u64 {
        self.deltas as u64
    }

    /// Zero pages.
    pub fn zero_pages(&self) -> u64 {
        self.known_zeros + (self.seen - self.pages - self.deltas) as u64
    }

    /// The content of all pages that go neither as zeroes nor as deltas.
    pub fn content(&self) -> &[u8] {
        &self.pages_frame[DATA_AT..DATA_AT + self.pages * PAGE_SIZE]
    }

    /// Once all pages were added: those of which `cache` knows an older form, with little changed, go as deltas. Gives how many pages it
    /// knew, and how many of them go as deltas.
    pub fn take_deltas(&mut self, cache: &Cache) -> (u64, u64) {
        for page in self.zeros.iter().flat_map(|run| run.first..run.end()) {
            cache.forget(page);
        }
        self.deltas_frame.clear();
        self.deltas_frame.resize(DATA_AT, 0);
        let (runs, mut kept, mut known) = (std::mem::take(&mut self.runs), 0, 0);
        let pages = runs.iter().flat_map(|run| run.first..run.end());
        for (page, at) in pages.zip((DATA_AT..).step_by(PAGE_SIZE)) {
            let begin = self.deltas_frame.len();
            self.deltas_frame.resize(begin + DELTA_PREFIX, 0);
            let content = &self.pages_frame[at..at + PAGE_SIZE];
            let exchanged = cache.exchange(page, self.round, content, &mut self.deltas_frame);
            known += u64::from(exchanged != Exchanged::New);
            if let Exchanged::Delta(crc) = exchanged {
                let length = self.deltas_frame.len() - begin - DELTA_PREFIX;
                let prefix = &mut self.deltas_frame[begin..begin + DELTA_PREFIX];
                prefix[..4].copy_from_slice(&crc.to_le_bytes());
                write_u32s(&mut prefix[4..], [length]);
                push(&mut self.delta_runs, page, 1);
                self.deltas += 1;
                continue;
            }
            self.deltas_frame.truncate(begin);
            let to = DATA_AT + kept * PAGE_SIZE;
            if to != at {
                self.pages_frame.copy_within(at..at + PAGE_SIZE, to);
            }
            push(&mut self.runs, page, 1);
            kept += 1;
        }
        self.pages = kept;
        (known, self.deltas as u64)
    }

    /// Compresses [`Batch::content`]; gives the length, unless it gets no smaller: then it goes as it is.
    pub fn pack(&mut self, method: Method, packer: &mut Packer) -> Result<Option<usize>, Fault> {
        let content = &self.pages_frame[DATA_AT..DATA_AT + self.pages * PAGE_SIZE];
        let room = Packer::room(content.len());
        let needed = DATA_AT + room + RUN_BYTES * BATCH_PAGES;
        if self.packed_frame.len() < needed {
            self.packed_frame.resize(needed, 0);
        }
        let length = packer.pack(method, content, &mut self.packed_frame[DATA_AT..DATA_AT + room])?;
        self.packed = length.map(|length| (method, length));
        Ok(length)
    }

    /// The frame with the deltas, if there are any.
    pub fn seal_deltas(&mut self, sequence: u64) -> Result<Option<&[u8]>, Fault> {
        if self.delta_runs.is_empty() {
            return Ok(None);
        }
        let table = self.deltas_frame.len();
        self.deltas_frame
            .resize(table + self.delta_runs.len() * RUN_BYTES, 0);
        let numbers = [self.round as usize, self.deltas, self.delta_runs.len(), 0];
        write_u32s(&mut self.deltas_frame[HEADER_BYTES..], numbers);
        write_runs(&mut self.deltas_frame[table..], &self.delta_runs);
        seal(&mut self.deltas_frame, Kind::Deltas, sequence)?;
        Ok(Some(&self.deltas_frame))
    }

    /// The frame with the compressed pages, if they were.
    pub fn seal_packed(&mut self, sequence: u64) -> Result<Option<&[u8]>, Fault> {
        let Some((method, length)) = self.packed else {
            return Ok(None);
        };
        let table = DATA_AT + length;
        let frame = &mut self.packed_frame[..table + self.runs.len() * RUN_BYTES];
        let numbers = [self.round as usize, self.pages, self.runs.len(), method as usize];
        write_u32s(&mut frame[HEADER_BYTES..], numbers);
        write_runs(&mut frame[table..], &self.runs);
        seal(frame, Kind::Packed, sequence)?;
        Ok(Some(frame))
    }

    /// The frame with the pages that have content and go as they are, if there are any.
    pub fn seal_pages(&mut self, sequence: u64) -> Result<Option<&[u8]>, Fault> {
        self.seal_pages_as(Kind::Pages, sequence)
    }

    /// The same as [`Kind::GuardedPages`].
    pub fn seal_guarded_pages(&mut self, sequence: u64) -> Result<Option<&[u8]>, Fault> {
        self.seal_pages_as(Kind::GuardedPages, sequence)
    }

    fn seal_pages_as(&mut self, kind: Kind, sequence: u64) -> Result<Option<&[u8]>, Fault> {
        if self.runs.is_empty() || self.packed.is_some() {
            return Ok(None);
        }
        let table = DATA_AT + self.pages * PAGE_SIZE;
        let frame = &mut self.pages_frame[..table + self.runs.len() * RUN_BYTES];
        write_u32s(
            &mut frame[HEADER_BYTES..],
            [self.round as usize, self.pages, self.runs.len(), 0],
        );
        write_runs(&mut frame[table..], &self.runs);
        seal(frame, kind, sequence)?;
        Ok(Some(frame))
    }

    /// The frame with the zero pages, if there are any.
    pub fn seal_zeros(&mut self, sequence: u64) -> Result<Option<&[u8]>, Fault> {
        if self.zeros.is_empty() {
            return Ok(None);
        }
        let table = HEADER_BYTES + ZEROS_PREFIX;
        let frame = &mut self.zeros_frame[..table + self.zeros.len() * RUN_BYTES];
        write_u32s(
            &mut frame[HEADER_BYTES..],
            [self.round as usize, self.zeros.len()],
        );
        write_runs(&mut frame[table..], &self.zeros);
        seal(frame, Kind::Zeros, sequence)?;
        Ok(Some(frame))
    }
}

fn write_u32s<const N: usize>(out: &mut [u8], numbers: [usize; N]) {
    for (slot, number) in out.chunks_exact_mut(4).zip(numbers) {
        let number = u32::try_from(number).expect("a batch's counts are small");
        slot.copy_from_slice(&number.to_le_bytes());
    }
}

fn write_runs(out: &mut [u8], runs: &[Run]) {
    for (slot, run) in out.chunks_exact_mut(RUN_BYTES).zip(runs) {
        slot[..8].copy_from_slice(&run.first.to_le_bytes());
        slot[8..].copy_from_slice(&run.count.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Frame, decode};
    use super::*;

    /// Page `n` is zero when `n` is divisible by 3, else filled with its number.
    fn read(first: u64, out: &mut [u8]) {
        for (page, bytes) in (first..).zip(out.chunks_exact_mut(PAGE_SIZE)) {
            bytes.fill(if page % 3 == 0 {
                0
            } else {
                u8::try_from(page % 251).unwrap() | 1
            });
        }
    }

    #[test]
    fn a_batch_sends_each_page_once_either_with_content_or_as_zero() {
        let mut batch = Batch::default();
        for _ in 0..2 {
            batch.begin(5);
            batch.add(
                Run {
                    first: 10,
                    count: 100,
                },
                read,
            );
            batch.add(
                Run {
                    first: 300,
                    count: 155,
                },
                read,
            );
            batch.add_zeros(Run { first: 456, count: 1 });
            let mut seen = std::collections::BTreeSet::new();
            let bytes = batch.seal_pages(0).unwrap().unwrap().to_vec();
            let (Frame::Pages(pages), []) = decode(&bytes, 0).unwrap() else {
                panic!("no pages frame")
            };
            let mut data = pages.data.chunks_exact(PAGE_SIZE);
            for page in pages.runs.iter().flat_map(|run| run.first..run.end()) {
                let mut expected = [0; PAGE_SIZE];
                read(page, &mut expected);
                assert_eq!(data.next(), Some(&expected[..]), "page {page}");
                assert!(seen.insert(page));
            }
            let bytes = batch.seal_zeros(1).unwrap().unwrap().to_vec();
            let (Frame::Zeros(zeros), []) = decode(&bytes, 1).unwrap() else {
                panic!("no zeros frame")
            };
            assert!(
                zeros
                    .runs
                    .iter()
                    .flat_map(|run| run.first..run.end())
                    .all(|page| page % 3 == 0 && seen.insert(page))
            );
            assert_eq!(seen, (10..110).chain(300..455).chain([456]).collect());
            assert_eq!((zeros.round, batch.pages() + batch.zero_pages()), (5, 256));
        }
    }

    #[test]
    fn the_checksum_of_guarded_pages_covers_everything_but_their_content() {
        let mut batch = Batch::default();
        batch.begin(1);
        batch.add(Run { first: 7, count: 3 }, |_, out| out.fill(9));
        let bytes = batch.seal_guarded_pages(0).unwrap().unwrap().to_vec();
        let content = DATA_AT..DATA_AT + 3 * PAGE_SIZE;
        for at in (0..bytes.len()).filter(|at| at % 97 == 0 || !content.contains(at)) {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let noticed = decode(&changed, 0).is_err();
            assert_eq!(noticed, !content.contains(&at), "byte {at}");
        }
    }

    #[test]
    fn a_batch_of_zero_pages_is_one_run_and_no_data() {
        let mut batch = Batch::default();
        batch.begin(1);
        batch.add(Run { first: 0, count: 256 }, |_, out| out.fill(0));
        assert_eq!(batch.seal_pages(0).unwrap(), None);
        let bytes = batch.seal_zeros(0).unwrap().unwrap().to_vec();
        let (Frame::Zeros(zeros), []) = decode(&bytes, 0).unwrap() else {
            panic!("no zeros frame")
        };
        assert_eq!(
            zeros.runs.iter().collect::<Vec<_>>(),
            [Run { first: 0, count: 256 }]
        );
    }
}
