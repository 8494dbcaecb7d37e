//! The store on disk: one RocksDB with one column family, so that one write-ahead log orders everything.
//!
//! ```text
//! key                      content
//! 01 "format"              version of this layout, u32 little endian
//! 01 "vote" | "committed"  the caller's bytes
//! 01 "purged"              index u64 big endian, then the caller's mark
//! 02 <index, u64 be>       a log entry
//! 03 "snapshot"            length of the data u64 big endian, then the caller's meta
//! 04 <chunk, u32 be>       the snapshot's data, in order
//! ```

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rocksdb::{DB, DBRecoveryMode, Direction, IteratorMode, Options, ReadOptions, WriteBatch, WriteOptions};

use crate::memory::check_append;
use crate::writer::{Writer, read_mark};
use crate::{Done, Entry, LogStore, SNAPSHOT_BYTES_MAX, Snapshot, StorageError, record};

/// Version of the layout above.
const FORMAT: u32 = 1;
const FORMAT_KEY: &[u8] = b"\x01format";
const VOTE_KEY: &[u8] = b"\x01vote";
const COMMITTED_KEY: &[u8] = b"\x01committed";
const PURGED_KEY: &[u8] = b"\x01purged";
const LOG_PREFIX: u8 = 2;
const SNAPSHOT_KEY: &[u8] = b"\x03snapshot";
const CHUNK_PREFIX: u8 = 4;

/// A snapshot's data is cut into values of this size, since RocksDB holds a value in memory whole, several times.
const CHUNK_BYTES: usize = 1 << 20;
/// Memtable: the log between two snapshots fits.
const WRITE_BUFFER_BYTES: usize = 16 << 20;
/// RocksDB's own information logs that are kept.
const INFO_LOGS_MAX: usize = 2;
const INFO_LOG_BYTES_MAX: usize = 1 << 20;

/// A [`LogStore`] in a folder.
pub struct RocksStore {
    // Order matters: the writer must end, and report, before the database is closed.
    writer: Writer,
    db: Arc<DB>,
    last: Mutex<Option<u64>>,
}

impl RocksStore {
    /// Opens the store in `folder`, or creates it there. Reads the whole log once: a store that does not hold together
    /// is refused here, and not in the middle of an election.
    pub fn open(folder: &Path) -> Result<Self, StorageError> {
        std::fs::create_dir_all(folder)
            .map_err(|error| StorageError::io("creating the data folder", error))?;
        let db = DB::open(&options(), folder).map_err(|error| open_error(folder, &error))?;
        let (synced, found) = (read_mark(folder), db.latest_sequence_number());
        if found < synced {
            return Err(StorageError::LostRecords {
                path: folder.to_owned(),
                synced,
                found,
            });
        }
        let db = Arc::new(db);
        let writer = Writer::start(db.clone(), folder)?;
        let store = Self {
            writer,
            db,
            last: Mutex::new(None),
        };
        store.check_format(folder)?;
        let last = store.check_log()?;
        *store.lock_last() = last;
        store.vote()?;
        store.committed()?;
        store.snapshot()?;
        Ok(store)
    }

    fn check_format(&self, folder: &Path) -> Result<(), StorageError> {
        match self.get(FORMAT_KEY)? {
            Some(format) => {
                let found = format.try_into().map_or(0, u32::from_le_bytes);
                if found == FORMAT {
                    return Ok(());
                }
                Err(StorageError::Format {
                    path: folder.to_owned(),
                    found,
                    known: FORMAT,
                })
            }
            None => {
                let mut batch = WriteBatch::default();
                put(&mut batch, FORMAT_KEY, &FORMAT.to_le_bytes());
                self.write(batch)?;
                let (done, wait) = std::sync::mpsc::sync_channel(1);
                self.writer.sync(Box::new(move |result| drop(done.send(result))));
                wait.recv()
                    .map_err(|_| StorageError::io("creating the store", "the writer thread has ended"))?
            }
        }
    }

    /// Checks that the log has no hole and every entry is whole. Returns the last index.
    fn check_log(&self) -> Result<Option<u64>, StorageError> {
        let mut last = None;
        let mut expected = self.purged_index()?.map_or(0, |purged| purged.saturating_add(1));
        for entry in self.entries(0..u64::MAX) {
            let found = entry?.index;
            if found != expected {
                return Err(StorageError::Hole { expected, found });
            }
            last = Some(found);
            expected = found.saturating_add(1);
        }
        Ok(last)
    }

    fn lock_last(&self) -> MutexGuard<'_, Option<u64>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        let found = self
            .db
            .get(key)
            .map_err(|error| StorageError::io("reading the store", error))?;
        found
            .map(|found| record::open(key, &found).map(<[u8]>::to_vec))
            .transpose()
    }

    /// Into the memtable and the WAL's buffer; durable with the next sync.
    fn write(&self, batch: WriteBatch) -> Result<(), StorageError> {
        self.writer.failure()?;
        self.db
            .write_opt(batch, &WriteOptions::default())
            .map_err(|error| {
                let error = StorageError::io("writing the store", error);
                self.writer.fail(error.clone());
                error
            })
    }

    fn write_and_sync(&self, batch: WriteBatch, done: Done) {
        match self.write(batch) {
            Ok(()) => self.writer.sync(done),
            Err(error) => done(Err(error)),
        }
    }

    fn purged_record(&self) -> Result<Option<(u64, Vec<u8>)>, StorageError> {
        let Some(record) = self.get(PURGED_KEY)? else {
            return Ok(None);
        };
        let Some((index, mark)) = record.split_first_chunk() else {
            return Err(StorageError::Damaged {
                what: "purged".to_owned(),
                problem: "it is too short".to_owned(),
            });
        };
        Ok(Some((u64::from_be_bytes(*index), mark.to_vec())))
    }

    fn purged_index(&self) -> Result<Option<u64>, StorageError> {
        Ok(self.purged_record()?.map(|(index, _)| index))
    }

    fn entries(&self, range: Range<u64>) -> impl Iterator<Item = Result<Entry, StorageError>> {
        let (first, end) = (log_key(range.start), log_key(range.end));
        let mut bounded = ReadOptions::default();
        bounded.set_iterate_lower_bound(first);
        bounded.set_iterate_upper_bound(end);
        self.db
            .iterator_opt(IteratorMode::From(&first, Direction::Forward), bounded)
            .map(|item| {
                let (key, value) = item.map_err(|error| StorageError::io("reading the log", error))?;
                open_entry(&key, &value)
            })
    }
}

impl LogStore for RocksStore {
    fn vote(&self) -> Result<Option<Vec<u8>>, StorageError> {
        self.get(VOTE_KEY)
    }

    fn save_vote(&self, vote: &[u8], done: Done) {
        let mut batch = WriteBatch::default();
        put(&mut batch, VOTE_KEY, vote);
        if drover_points::seeded_bug("vote-not-synced") {
            return done(self.write(batch));
        }
        self.write_and_sync(batch, done);
    }

    fn committed(&self) -> Result<Option<Vec<u8>>, StorageError> {
        self.get(COMMITTED_KEY)
    }

    fn save_committed(&self, committed: Option<&[u8]>) -> Result<(), StorageError> {
        let mut batch = WriteBatch::default();
        match committed {
            Some(committed) => put(&mut batch, COMMITTED_KEY, committed),
            None => batch.delete(COMMITTED_KEY),
        }
        self.write(batch)
    }

    fn append(&self, entries: &[Entry], done: Done) {
        let mut last = self.lock_last();
        let written = check_append(*last, entries).and_then(|()| {
            let mut batch = WriteBatch::default();
            for entry in entries {
                put(&mut batch, &log_key(entry.index), &entry.bytes);
            }
            self.write(batch)
        });
        if let Err(error) = written {
            drop(last);
            return done(Err(error));
        }
        *last = entries.last().map_or(*last, |entry| Some(entry.index));
        drop(last);
        self.writer.sync(done);
    }

    fn read(&self, range: Range<u64>, bytes_max: usize) -> Result<Vec<Entry>, StorageError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        // Not into the range that was purged: RocksDB would walk its tombstones.
        let first = self
            .purged_index()?
            .map_or(0, |purged| purged.saturating_add(1))
            .max(range.start);
        let (mut found, mut bytes) = (Vec::new(), 0);
        for entry in self.entries(first..range.end.max(first)) {
            let entry = entry?;
            bytes += entry.bytes.len().max(1);
            if bytes > bytes_max && !found.is_empty() {
                break;
            }
            found.push(entry);
        }
        Ok(found)
    }

    fn last(&self) -> Result<Option<Entry>, StorageError> {
        let Some(last) = *self.lock_last() else {
            return Ok(None);
        };
        let key = log_key(last);
        Ok(self.get(&key)?.map(|bytes| Entry { index: last, bytes }))
    }

    fn truncate(&self, from: u64, done: Done) {
        let mut batch = WriteBatch::default();
        batch.delete_range(log_key(from), log_key(u64::MAX));
        let mut last = self.lock_last();
        if let Err(error) = self.write(batch) {
            drop(last);
            return done(Err(error));
        }
        // What precedes `from` is there: the log has no holes. Entry `from - 1` may be purged: then the log is empty.
        let before = from
            .checked_sub(1)
            .filter(|&before| self.get(&log_key(before)).is_ok_and(|found| found.is_some()));
        *last = last.map_or(None, |last| if last < from { Some(last) } else { before });
        drop(last);
        self.writer.sync(done);
    }

    fn purge(&self, through: u64, mark: &[u8], done: Done) {
        let mut batch = WriteBatch::default();
        batch.delete_range(log_key(0), log_key(through.saturating_add(1)));
        put(&mut batch, PURGED_KEY, &[&through.to_be_bytes(), mark].concat());
        let mut last = self.lock_last();
        if let Err(error) = self.write(batch) {
            drop(last);
            return done(Err(error));
        }
        *last = last.filter(|&last| last > through);
        drop(last);
        self.writer.sync(done);
    }

    fn purged(&self) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(self.purged_record()?.map(|(_, mark)| mark))
    }

    fn save_snapshot(&self, snapshot: &Snapshot, done: Done) {
        if snapshot.data.len() > SNAPSHOT_BYTES_MAX {
            let len = snapshot.data.len();
            let why = format!("the snapshot has {len} bytes, at most {SNAPSHOT_BYTES_MAX} are allowed");
            return done(Err(StorageError::Refused(why)));
        }
        let mut batch = WriteBatch::default();
        batch.delete_range(chunk_key(0), chunk_key(u32::MAX));
        for (number, chunk) in (0..).zip(snapshot.data.chunks(CHUNK_BYTES)) {
            put(&mut batch, &chunk_key(number), chunk);
        }
        let len = u64::try_from(snapshot.data.len()).expect("a length fits 64 bits");
        put(
            &mut batch,
            SNAPSHOT_KEY,
            &[&len.to_be_bytes(), snapshot.meta.as_slice()].concat(),
        );
        self.write_and_sync(batch, done);
    }

    fn snapshot(&self) -> Result<Option<Snapshot>, StorageError> {
        // One view for head and chunks: a newer snapshot may be saved meanwhile.
        let view = self.db.snapshot();
        let get = |key: &[u8]| -> Result<Option<Vec<u8>>, StorageError> {
            let found = view
                .get(key)
                .map_err(|error| StorageError::io("reading the snapshot", error))?;
            found
                .map(|found| record::open(key, &found).map(<[u8]>::to_vec))
                .transpose()
        };
        let Some(head) = get(SNAPSHOT_KEY)? else {
            return Ok(None);
        };
        let damaged = |problem: String| StorageError::Damaged {
            what: "snapshot".to_owned(),
            problem,
        };
        let Some((len, meta)) = head.split_first_chunk() else {
            return Err(damaged("its head is too short".to_owned()));
        };
        let len = usize::try_from(u64::from_be_bytes(*len)).unwrap_or(usize::MAX);
        if len > SNAPSHOT_BYTES_MAX {
            return Err(damaged(format!("its length is said to be {len}")));
        }
        let mut data = Vec::with_capacity(len);
        for number in (0..).take(len.div_ceil(CHUNK_BYTES)) {
            let Some(chunk) = get(&chunk_key(number))? else {
                return Err(damaged(format!("chunk {number} is missing")));
            };
            data.extend_from_slice(&chunk);
        }
        if data.len() != len {
            return Err(damaged(format!("it has {} bytes instead of {len}", data.len())));
        }
        Ok(Some(Snapshot {
            meta: meta.to_vec(),
            data,
        }))
    }
}

fn options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    // What is not synced stays in this process: see the crate's page.
    options.set_manual_wal_flush(true);
    // A crash may leave any part of the unsynced tail, in any order of pages: take what is whole before the first flaw.
    // Whether that contains all that was acknowledged is checked by the mark.
    options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    options.set_paranoid_checks(true);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_keep_log_file_num(INFO_LOGS_MAX);
    options.set_max_log_file_size(INFO_LOG_BYTES_MAX);
    options
}

fn open_error(folder: &Path, error: &rocksdb::Error) -> StorageError {
    let text = error.to_string();
    // RocksDB has no code of its own for it; these are its words for a lock held by this or another process.
    if text.contains("lock hold by current process") || text.contains("While lock file") {
        return StorageError::InUse(PathBuf::from(folder));
    }
    StorageError::io("opening the store", text)
}

fn put(batch: &mut WriteBatch, key: &[u8], content: &[u8]) {
    batch.put(key, record::seal(key, content));
}

fn log_key(index: u64) -> [u8; 9] {
    let mut key = [LOG_PREFIX; 9];
    key[1..].copy_from_slice(&index.to_be_bytes());
    key
}

fn chunk_key(number: u32) -> [u8; 5] {
    let mut key = [CHUNK_PREFIX; 5];
    key[1..].copy_from_slice(&number.to_be_bytes());
    key
}

fn open_entry(key: &[u8], value: &[u8]) -> Result<Entry, StorageError> {
    let index = key
        .get(1..)
        .and_then(|index| index.try_into().ok())
        .map(u64::from_be_bytes);
    let index = index.ok_or_else(|| StorageError::Damaged {
        what: key.escape_ascii().to_string(),
        problem: "its key is not a log index".to_owned(),
    })?;
    Ok(Entry {
        index,
        bytes: record::open(key, value)?.to_vec(),
    })
}
