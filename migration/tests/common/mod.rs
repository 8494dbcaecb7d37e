//! A VM made of a byte array, with a dirty log as exact as the contract asks for: marking and writing are one step.

#![allow(dead_code, reason = "each test binary uses its part")]

pub mod cluster;

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use drover_migration::codec::Run;
use drover_migration::post_copy::PostCopyVm;
use drover_migration::target::Received;
use drover_migration::vm::{Layout, PAGE_SIZE, PageSet, Region, SourceVm, TargetVm};
use drover_proto::{Code, Fault};

/// What the fake VM does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    StartLog,
    TakeDirty,
    Pause,
    Save,
    Write,
    /// Succeeds, with a bit changed.
    WriteWrong,
    Restore,
    Place,
}

pub struct Inner {
    pub memory: Vec<u8>,
    pub dirty: Option<PageSet>,
    pub paused: bool,
    pub pauses: u32,
    pub restored: Option<Vec<u8>>,
    /// Pages that memory holds; the others are holes.
    pub present: Vec<bool>,
    /// Whoever touches a hole waits for its page.
    pub armed: bool,
    /// These will never come.
    pub lost: Option<PageSet>,
    pub faulted: Vec<u64>,
    /// A page that restoring the state reads, and waits for.
    pub restore_reads: Option<usize>,
    pub stood: Option<Received>,
    /// Pages that the guest writes in the moment of the pause, however busy the machine is.
    pub writes_at_pause: std::ops::Range<usize>,
    pub flaw: Option<Flaw>,
    pub look: Look,
    /// It knows of every page that is zero, and not of every other one.
    pub sparse: bool,
}

/// What the VM finds when it only looks which pages were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    Nothing,
    /// All of them, and they stay in the log.
    All,
    /// All of them, out of the log.
    AllTaken,
}

/// A handle on the VM; the guest's writer has another.
#[derive(Clone)]
pub struct FakeVm {
    pub inner: Arc<Mutex<Inner>>,
    changed: Arc<Condvar>,
    layout: Layout,
}

/// Three regions with holes between them when there are pages enough.
pub fn layout(pages: u64) -> Layout {
    let page = PAGE_SIZE as u64;
    let parts = if pages >= 3 {
        vec![pages / 3, 1, pages - pages / 3 - 1]
    } else {
        vec![pages]
    };
    let mut gpa = 0;
    parts
        .into_iter()
        .map(|count| {
            let region = Region {
                gpa,
                len: count * page,
            };
            gpa += region.len + 16 * page;
            region
        })
        .collect()
}

impl FakeVm {
    pub fn new(pages: u64) -> Self {
        let bytes = usize::try_from(pages).unwrap() * PAGE_SIZE;
        let inner = Inner {
            memory: vec![0; bytes],
            dirty: None,
            paused: false,
            pauses: 0,
            restored: None,
            present: vec![false; usize::try_from(pages).unwrap()],
            armed: false,
            lost: None,
            faulted: Vec::new(),
            restore_reads: None,
            stood: None,
            writes_at_pause: 0..0,
            flaw: None,
            look: Look::Nothing,
            sparse: false,
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
            changed: Arc::default(),
            layout: layout(pages),
        }
    }

    /// How many pages it has.
    pub fn pages(&self) -> usize {
        self.lock().memory.len() / PAGE_SIZE
    }

    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// The guest writes a page, unless it is paused. Says whether it did.
    pub fn guest_writes(&self, page: usize, value: u8) -> bool {
        let mut inner = self.lock();
        if inner.paused {
            return false;
        }
        inner.memory[page * PAGE_SIZE..][..PAGE_SIZE].fill(value);
        if let Some(dirty) = &mut inner.dirty {
            dirty.insert(Run {
                first: page as u64,
                count: 1,
            });
        }
        true
    }

    /// The guest writes a byte of a page, unless it is paused. Says whether it did.
    pub fn guest_pokes(&self, page: usize, at: usize, value: u8) -> bool {
        let mut inner = self.lock();
        if inner.paused {
            return false;
        }
        inner.memory[page * PAGE_SIZE + at % PAGE_SIZE] = value;
        if let Some(dirty) = &mut inner.dirty {
            dirty.insert(Run {
                first: page as u64,
                count: 1,
            });
        }
        true
    }

    fn flawed(&self, flaw: Flaw) -> Result<(), Fault> {
        match self.lock().flaw {
            Some(found) if found == flaw => Err(Fault::new(Code::BadState, format!("{flaw:?} fails"))),
            _ => Ok(()),
        }
    }

    /// No run may cross a region's end.
    fn in_one_region(&self, first: u64, count: u64) {
        let mut end = 0;
        let inside = self.layout.iter().any(|region| {
            let begin = end;
            end += region.len / PAGE_SIZE as u64;
            first >= begin && first + count <= end
        });
        assert!(inside, "pages {first}..{} are not in one region", first + count);
    }
}

impl SourceVm for FakeVm {
    fn layout(&self) -> Layout {
        self.layout.clone()
    }

    fn start_dirty_log(&self) -> Result<(), Fault> {
        self.flawed(Flaw::StartLog)?;
        let pages = (self.lock().memory.len() / PAGE_SIZE) as u64;
        self.lock().dirty = Some(PageSet::empty(pages));
        Ok(())
    }

    fn stop_dirty_log(&self) {
        self.lock().dirty = None;
    }

    fn take_dirty(&self, into: &mut PageSet) -> Result<(), Fault> {
        self.flawed(Flaw::TakeDirty)?;
        let mut inner = self.lock();
        let dirty = inner.dirty.as_mut().expect("the log is on");
        into.merge(dirty);
        dirty.words.fill(0);
        Ok(())
    }

    fn look_dirty(&self, into: &mut PageSet) -> Result<(), Fault> {
        let mut inner = self.lock();
        let look = inner.look;
        let dirty = inner.dirty.as_mut().expect("the log is on");
        if look != Look::Nothing {
            into.merge(dirty);
        }
        if look == Look::AllTaken {
            dirty.words.fill(0);
        }
        Ok(())
    }

    fn read_pages(&self, first: u64, out: &mut [u8]) {
        self.in_one_region(first, (out.len() / PAGE_SIZE) as u64);
        out.copy_from_slice(&self.lock().memory[usize::try_from(first).unwrap() * PAGE_SIZE..][..out.len()]);
    }

    /// Knows it of every other page.
    fn zero_ahead(&self, first: u64, count: u64) -> u64 {
        self.in_one_region(first, count);
        let inner = self.lock();
        let known = (first..first + count).take_while(|page| {
            (inner.sparse || page % 2 == 0)
                && inner.memory[usize::try_from(*page).unwrap() * PAGE_SIZE..][..PAGE_SIZE]
                    .iter()
                    .all(|byte| *byte == 0)
        });
        known.count() as u64
    }

    fn pause(&self) -> Result<(), Fault> {
        self.lock().pauses += 1;
        self.flawed(Flaw::Pause)?;
        let last = self.lock().writes_at_pause.clone();
        for page in last {
            self.guest_writes(page, 0x5a);
        }
        self.lock().paused = true;
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, Fault> {
        assert!(self.lock().paused, "only a paused VM is saved");
        self.flawed(Flaw::Save)?;
        Ok(b"registers and devices".to_vec())
    }
}

impl TargetVm for FakeVm {
    fn layout(&self) -> Layout {
        self.layout.clone()
    }

    fn write_pages(&self, first: u64, data: &[u8]) -> Result<(), Fault> {
        self.flawed(Flaw::Write)?;
        self.in_one_region(first, (data.len() / PAGE_SIZE) as u64);
        let mut inner = self.lock();
        let wrong = inner.flaw == Some(Flaw::WriteWrong);
        for (page, bytes) in (usize::try_from(first).unwrap()..).zip(data.chunks_exact(PAGE_SIZE)) {
            inner.memory[page * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(bytes);
            inner.memory[page * PAGE_SIZE + 77] ^= u8::from(wrong);
            inner.present[page] = true;
        }
        Ok(())
    }

    fn read_back(&self, first: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.read_pages(first, out);
        Ok(())
    }

    fn zero_pages(&self, first: u64, count: u64) -> Result<(), Fault> {
        self.in_one_region(first, count);
        let (first, count) = (usize::try_from(first).unwrap(), usize::try_from(count).unwrap());
        let mut inner = self.lock();
        inner.memory[first * PAGE_SIZE..][..count * PAGE_SIZE].fill(0);
        inner.present[first..first + count].fill(false);
        Ok(())
    }

    fn post_copy(&self) -> Result<&dyn PostCopyVm, Fault> {
        Ok(self)
    }

    fn restore(&self, state: &[u8]) -> Result<(), Fault> {
        self.flawed(Flaw::Restore)?;
        let reads = self.lock().restore_reads;
        if let Some(page) = reads {
            let lost = || Fault::new(Code::PostCopyLost, "the state's own page is lost");
            let was = self.touch_and_wait(page, 0).ok_or_else(lost)?;
            self.touch(page, was);
        }
        self.lock().restored = Some(state.to_vec());
        Ok(())
    }
}

impl FakeVm {
    /// What the guest does at the target: reads a page and then writes it. `None`: it has to wait, and that is told as a fault.
    pub fn touch(&self, page: usize, value: u8) -> Option<u8> {
        let mut inner = self.lock();
        if inner.lost.as_ref().is_some_and(|lost| lost.contains(page as u64)) {
            return None;
        }
        if inner.armed && !inner.present[page] {
            inner.faulted.push(page as u64);
            self.changed.notify_all();
            return None;
        }
        let was = inner.memory[page * PAGE_SIZE];
        inner.memory[page * PAGE_SIZE..][..PAGE_SIZE].fill(value);
        inner.present[page] = true;
        Some(was)
    }

    /// As `touch`, and waits for the page. `None`: it is lost.
    pub fn touch_and_wait(&self, page: usize, value: u8) -> Option<u8> {
        loop {
            if let Some(was) = self.touch(page, value) {
                return Some(was);
            }
            let inner = self.lock();
            if inner.lost.as_ref().is_some_and(|lost| lost.contains(page as u64)) {
                return None;
            }
            if !inner.present[page] {
                drop(
                    self.changed
                        .wait_timeout(inner, Duration::from_millis(5))
                        .unwrap(),
                );
            }
        }
    }
}

impl PostCopyVm for FakeVm {
    fn arm(&self, missing: &PageSet) -> Result<(), Fault> {
        let mut inner = self.lock();
        inner.armed = true;
        let last = missing.runs().last().map(|run| run.end() - 1);
        inner.restore_reads = last.map(|page| usize::try_from(page).unwrap());
        for page in missing.runs().iter().flat_map(|run| run.first..run.end()) {
            let page = usize::try_from(page).unwrap();
            inner.present[page] = false;
            // What a page that nobody places reads as: anything but what is right.
            inner.memory[page * PAGE_SIZE..][..PAGE_SIZE].fill(0xee);
        }
        Ok(())
    }

    fn faults(&self, wait: Duration, pages: &mut Vec<u64>) -> Result<(), Fault> {
        let inner = self.lock();
        let waited = self
            .changed
            .wait_timeout_while(inner, wait, |inner| inner.faulted.is_empty());
        pages.append(&mut waited.unwrap().0.faulted);
        Ok(())
    }

    fn place_pages(&self, first: u64, data: &[u8]) -> Result<(), Fault> {
        self.flawed(Flaw::Place)?;
        self.in_one_region(first, (data.len() / PAGE_SIZE) as u64);
        let mut inner = self.lock();
        for (page, bytes) in (usize::try_from(first).unwrap()..).zip(data.chunks_exact(PAGE_SIZE)) {
            if !inner.present[page] {
                inner.memory[page * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(bytes);
                inner.present[page] = true;
            }
        }
        self.changed.notify_all();
        Ok(())
    }

    fn place_zeros(&self, first: u64, count: u64) -> Result<(), Fault> {
        (first..first + count).try_for_each(|page| self.place_pages(page, &[0; PAGE_SIZE]))
    }

    fn stand(&self, received: Received) -> Result<(), Fault> {
        self.lock().stood = Some(received);
        Ok(())
    }

    fn disarm(&self) -> Result<(), Fault> {
        self.lock().armed = false;
        Ok(())
    }

    fn lose(&self, missing: &PageSet, _why: &Fault) {
        let mut inner = self.lock();
        inner.lost = Some(missing.clone());
        inner.armed = false;
        drop(inner);
        self.changed.notify_all();
    }
}

/// SplitMix64: the tests' only randomness, so that a seed replays a run.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    pub fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}
