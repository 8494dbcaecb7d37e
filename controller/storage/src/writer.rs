//! The thread that makes writes durable: takes all that wait, syncs the WAL once, then reports to each, in order.
//!
//! It keeps `fsync` off the async workers, and makes one `fsync` serve many appends (group commit).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use rocksdb::DB;

use crate::{Done, StorageError};

/// Writes that wait for a sync. A caller beyond it waits: the disk is that far behind.
const QUEUE_MAX: usize = 4096;

/// The mark's file: the sequence number of the newest sync, then its CRC.
const MARK_FILE: &str = "synced";
const MARK_BYTES: usize = 12;

/// The handle on the thread. Dropping it waits until all that was handed in is durable and reported.
pub(crate) struct Writer {
    queue: Option<SyncSender<Done>>,
    thread: Option<JoinHandle<()>>,
    failed: Arc<OnceLock<StorageError>>,
}

impl Writer {
    /// Starts the thread for the database in `folder`.
    pub(crate) fn start(db: Arc<DB>, folder: &Path) -> Result<Self, StorageError> {
        let mark = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(folder.join(MARK_FILE));
        let mark = mark.map_err(|error| StorageError::io("opening the sync mark", error))?;
        let (queue, waiting) = sync_channel(QUEUE_MAX);
        let failed = Arc::new(OnceLock::new());
        let worker = Worker {
            db,
            mark,
            failed: failed.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("raft-wal".to_owned())
            .spawn(move || worker.run(&waiting))
            .map_err(|error| StorageError::io("starting the writer thread", error))?;
        Ok(Self {
            queue: Some(queue),
            thread: Some(thread),
            failed,
        })
    }

    /// Has everything that was written before this call synced, then `done` called.
    pub(crate) fn sync(&self, done: Done) {
        let queue = self
            .queue
            .as_ref()
            .expect("the queue is there until the writer is dropped");
        if let Err(returned) = queue.send(done) {
            (returned.0)(Err(StorageError::io(
                "syncing the log",
                "the writer thread has ended",
            )));
        }
    }

    /// The first failure, which stands for good.
    pub(crate) fn failure(&self) -> Result<(), StorageError> {
        self.failed.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Makes `error` the store's fate, unless it failed before.
    pub(crate) fn fail(&self, error: StorageError) {
        let _ = self.failed.set(error);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Worker {
    db: Arc<DB>,
    mark: File,
    failed: Arc<OnceLock<StorageError>>,
}

impl Worker {
    fn run(&self, waiting: &Receiver<Done>) {
        let mut group = Vec::new();
        while let Ok(first) = waiting.recv() {
            group.push(first);
            group.extend(waiting.try_iter().take(QUEUE_MAX));
            let result = self.sync();
            for done in group.drain(..) {
                done(result.clone());
            }
        }
    }

    fn sync(&self) -> Result<(), StorageError> {
        if let Some(error) = self.failed.get() {
            return Err(error.clone());
        }
        // Read before the sync: the sync covers at least this much.
        let sequence = self.db.latest_sequence_number();
        let synced = self
            .db
            .flush_wal(true)
            .map_err(|error| StorageError::io("syncing the log", error))
            .and_then(|()| self.write_mark(sequence));
        if let Err(error) = &synced {
            let _ = self.failed.set(error.clone());
        }
        synced
    }

    /// Not synced itself: an older mark only notices less, and never accuses wrongly.
    fn write_mark(&self, sequence: u64) -> Result<(), StorageError> {
        let mut mark = [0; MARK_BYTES];
        mark[..8].copy_from_slice(&sequence.to_le_bytes());
        let crc = crc32fast::hash(&mark[..8]);
        mark[8..].copy_from_slice(&crc.to_le_bytes());
        self.mark
            .write_all_at(&mark, 0)
            .map_err(|error| StorageError::io("writing the sync mark", error))
    }
}

/// The sequence number that was synced last, 0 when no mark survived (a power cut may have taken it: it is not synced).
pub(crate) fn read_mark(folder: &Path) -> u64 {
    let Ok(mark) = std::fs::read(folder.join(MARK_FILE)) else {
        return 0;
    };
    let Ok(mark) = <[u8; MARK_BYTES]>::try_from(mark) else {
        return 0;
    };
    let (sequence, crc) = mark.split_at(8);
    if crc != crc32fast::hash(sequence).to_le_bytes() {
        return 0;
    }
    u64::from_le_bytes(sequence.try_into().expect("split at eight"))
}
