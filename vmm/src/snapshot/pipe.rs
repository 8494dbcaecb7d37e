//! What lies between those who copy blocks out, ahead of whoever wants to change them, and the one thread that writes them to files.
//!
//! ```text
//!   write faults of memory ─┐
//!   writes to disks ────────┼─► buffers, at most so many ──► writer: digest, write ──► back to the buffers
//!   whoever copies in order ┘
//! ```
//!
//! The guest waits for the copy of a block into a buffer, never for a file, as long as there are buffers. Half of them are for those it waits for:
//! who copies in order takes none of these. Where the files take nothing for so long that the guest would stand still, the snapshot fails, and the guest
//! runs on. The first fault is the snapshot's, and ends all that wait here.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use drover_proto::{Code, Fault};
use tracing::error;
use vmm_sys_util::eventfd::EventFd;

use super::format::{BLOCK, BLOCK_BYTES};
use super::sheet::Sheet;
use super::stage::Amounts;
use crate::fd;

/// Buffers of a block: 16 MiB.
pub(super) const BUFFERS: usize = 256;
/// Of these, those that nobody has who copies in order.
const FOR_THE_GUEST: usize = BUFFERS / 2;
/// Most blocks whose digests are kept, of all files: some 64 MiB. A guest gets so far ahead of the copy by writing to 64 GiB in other places than where it is.
const AHEAD_MAX: usize = 1 << 20;
/// So long the guest waits for a buffer at most. A file system that takes no 64 KiB for so long hangs, or its disk is far too slow for this guest.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is on its way to the writer.
enum Item {
    /// A block.
    Block { sheet: usize, index: u64, data: Vec<u8> },
    /// All blocks below `index` came before this.
    Passed { sheet: usize, index: u64 },
}

#[derive(Default)]
struct State {
    free: Vec<Vec<u8>>,
    made: usize,
    queue: VecDeque<Item>,
    closed: bool,
    fault: Option<Fault>,
}

impl State {
    fn left(&self) -> usize {
        self.free.len() + BUFFERS - self.made
    }

    fn take(&mut self) -> Vec<u8> {
        let made = &mut self.made;
        self.free.pop().unwrap_or_else(|| {
            *made += 1;
            Vec::with_capacity(BLOCK)
        })
    }
}

/// The buffers, and how far all is.
pub struct Pipe {
    state: Mutex<State>,
    changed: Condvar,
    /// Rung when a buffer is free again, and at the end.
    bell: EventFd,
    total: AtomicU64,
    done: AtomicU64,
    stored: AtomicU64,
}

impl Pipe {
    /// All buffers free.
    pub fn new() -> Result<Self, Fault> {
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let bell = bell.map_err(|error| Fault::new(Code::Internal, format!("a snapshot's bell: {error}")))?;
        Ok(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            bell,
            total: AtomicU64::new(0),
            done: AtomicU64::new(0),
            stored: AtomicU64::new(0),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the pipe's lock panics")
    }

    /// Wakes who waits for the bell.
    pub fn ring(&self) {
        if let Err(error) = self.bell.write(1) {
            error!(%error, "a snapshot goes on late");
        }
    }

    /// Readable after the bell was rung, until [`Pipe::heard`].
    pub fn bell(&self) -> BorrowedFd<'_> {
        fd::lend(&self.bell)
    }

    /// Makes the bell silent.
    pub fn heard(&self) {
        let _ = self.bell.read();
    }

    /// Ends everything with `fault`, unless it has failed already.
    pub fn fail(&self, fault: Fault) {
        let mut state = self.state();
        state.fault.get_or_insert(fault);
        state.queue.clear();
        drop(state);
        self.changed.notify_all();
        self.ring();
    }

    /// Why everything ends.
    pub fn check(&self) -> Result<(), Fault> {
        self.state().fault.clone().map_or(Ok(()), Err)
    }

    /// A buffer for a block that the guest waits for.
    pub fn buffer(&self) -> Result<Vec<u8>, Fault> {
        self.buffer_until(Instant::now() + PATIENCE)
    }

    /// Until when a request of the guest's that begins now waits for buffers, however many it needs. `left`: until the lease ends, after which nothing may
    /// be written that waited here, for another host may have the disk by then.
    pub fn patience(left: Duration) -> Instant {
        Instant::now() + PATIENCE.min(left)
    }

    /// A buffer for a block of a request that has waited since `until` was told.
    pub fn buffer_until(&self, until: Instant) -> Result<Vec<u8>, Fault> {
        let mut state = self.state();
        loop {
            if let Some(fault) = &state.fault {
                return Err(fault.clone());
            }
            if state.left() > 0 {
                return Ok(state.take());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                let message = format!(
                    "the snapshot's files have taken too little for {} ms, or until the lease ended, and the guest would have to wait for them",
                    PATIENCE.as_millis()
                );
                self.fail(Fault::new(Code::SnapshotFailed, message));
                return self.check().map(|()| Vec::new());
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.expect("no holder of the pipe's lock panics").0;
        }
    }

    /// A buffer for a block that nobody waits for, if there is one to spare.
    pub fn spare_buffer(&self) -> Result<Option<Vec<u8>>, Fault> {
        let mut state = self.state();
        match &state.fault {
            Some(fault) => Err(fault.clone()),
            None if state.left() > FOR_THE_GUEST => Ok(Some(state.take())),
            None => Ok(None),
        }
    }

    /// Waits until there is a buffer to spare.
    pub fn await_spare_buffer(&self) -> Result<Vec<u8>, Fault> {
        let waiting = |state: &mut State| state.fault.is_none() && state.left() <= FOR_THE_GUEST;
        let waited = self.changed.wait_while(self.state(), waiting);
        let mut state = waited.expect("no holder of the pipe's lock panics");
        match &state.fault {
            Some(fault) => Err(fault.clone()),
            None => Ok(state.take()),
        }
    }

    /// Waits at most `time`, or until everything ends.
    pub fn rest(&self, time: Duration) {
        let waited = self
            .changed
            .wait_timeout_while(self.state(), time, |state| state.fault.is_none());
        drop(waited.expect("no holder of the pipe's lock panics"));
    }

    /// Block `index` of a sheet, in a buffer of this pipe's, is to be written.
    pub fn push(&self, sheet: usize, index: u64, data: Vec<u8>) {
        let mut state = self.state();
        if state.fault.is_none() {
            state.queue.push_back(Item::Block { sheet, index, data });
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Whoever copies sheet `sheet` in order has come to block `index`: all below were pushed, or are holes.
    pub fn passed(&self, sheet: usize, index: u64) {
        let mut state = self.state();
        if state.fault.is_some() {
            return;
        }
        // One after the other says no more than the last; so there are never more of them than blocks.
        match state.queue.back_mut() {
            Some(Item::Passed { sheet: of, index: to }) if *of == sheet => *to = index,
            _ => state.queue.push_back(Item::Passed { sheet, index }),
        }
        drop(state);
        self.changed.notify_all();
    }

    /// A buffer that was not needed.
    pub fn give_back(&self, buffer: Vec<u8>) {
        self.state().free.push(buffer);
        self.changed.notify_all();
        self.ring();
    }

    /// So many bytes are to be done.
    pub fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many bytes were found zero.
    pub fn skipped(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How far everything is.
    pub fn amounts(&self) -> Amounts {
        let read = |amount: &AtomicU64| amount.load(Ordering::Relaxed);
        Amounts {
            done: read(&self.done),
            total: read(&self.total),
            stored: read(&self.stored),
        }
    }

    /// Nothing more will be pushed.
    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    fn pop(&self) -> Option<Item> {
        let waiting = |state: &mut State| state.queue.is_empty() && !state.closed && state.fault.is_none();
        let waited = self.changed.wait_while(self.state(), waiting);
        waited
            .expect("no holder of the pipe's lock panics")
            .queue
            .pop_front()
    }

    /// The writer: writes what is pushed, until the pipe is closed or fails.
    pub fn write(&self, sheets: &mut [Sheet]) {
        while let Some(item) = self.pop() {
            let (sheet, index, data) = match item {
                Item::Block { sheet, index, data } => (sheet, index, data),
                Item::Passed { sheet, index } => {
                    sheets[sheet].passed(index);
                    continue;
                }
            };
            match sheets[sheet].put(index, &data) {
                Ok(stored) => {
                    self.stored.fetch_add(stored, Ordering::Relaxed);
                    self.done.fetch_add(data.len() as u64, Ordering::Relaxed);
                }
                Err(fault) => self.fail(fault),
            }
            if sheets.iter().map(Sheet::ahead).sum::<usize>() > AHEAD_MAX {
                let message = format!(
                    "the guest has written to more than {} GiB ahead of the snapshot's copy: take it when the guest writes less",
                    (AHEAD_MAX * BLOCK) >> 30
                );
                self.fail(Fault::new(Code::SnapshotFailed, message));
            }
            self.give_back(data);
        }
    }
}

/// How many blocks `bytes` are.
pub fn blocks(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(1);

    #[test]
    fn who_copies_in_order_leaves_buffers_to_those_the_guest_waits_for() {
        let pipe = Pipe::new().unwrap();
        let spare: Vec<_> = std::iter::from_fn(|| pipe.spare_buffer().unwrap()).collect();
        assert_eq!(spare.len(), BUFFERS - FOR_THE_GUEST);
        let rest: Vec<_> = (0..FOR_THE_GUEST)
            .map(|_| pipe.buffer_until(Instant::now() + SOON).unwrap())
            .collect();
        assert_eq!(rest.len(), FOR_THE_GUEST);
        pipe.give_back(Vec::with_capacity(BLOCK));
        assert!(pipe.spare_buffer().unwrap().is_none());
        assert!(pipe.buffer_until(Instant::now() + SOON).is_ok());
    }

    #[test]
    fn a_request_waits_for_buffers_until_its_lease_ends_and_no_longer_than_a_guest_can_wait() {
        let before = Instant::now();
        assert!(Pipe::patience(Duration::ZERO) <= Instant::now());
        let hour = Pipe::patience(Duration::from_secs(3600));
        assert!(hour >= before + PATIENCE && hour <= Instant::now() + PATIENCE);
    }

    #[test]
    fn files_that_take_nothing_fail_the_snapshot_and_not_the_guest() {
        let pipe = Pipe::new().unwrap();
        let all: Vec<_> = (0..BUFFERS)
            .map(|_| pipe.buffer_until(Instant::now() + SOON).unwrap())
            .collect();
        let fault = pipe.buffer_until(Instant::now() + SOON).unwrap_err();
        assert_eq!(fault.code, Code::SnapshotFailed);
        drop(all);
        assert_eq!(pipe.check().unwrap_err(), fault, "for all");
        assert_eq!(pipe.await_spare_buffer().unwrap_err(), fault);
    }

    #[test]
    fn a_file_that_cannot_be_written_is_the_fault_that_all_get() {
        let dir = tempfile::tempdir().unwrap();
        let sheet = Sheet::create(dir.path(), "memory", 2 * BLOCK_BYTES).unwrap();
        let pipe = Pipe::new().unwrap();
        let mut first = pipe.buffer().unwrap();
        first.resize(BLOCK, 1);
        pipe.push(0, 0, first);
        pipe.close();
        let mut sheets = [sheet];
        pipe.write(&mut sheets);
        assert_eq!(pipe.amounts().stored, BLOCK_BYTES);
        pipe.fail(Fault::new(Code::Cancelled, "first"));
        pipe.fail(Fault::new(Code::Internal, "second"));
        assert_eq!(pipe.check().unwrap_err().code, Code::Cancelled);
        assert!(pipe.spare_buffer().is_err());
    }
}
