//! What a Raft member must not forget: its vote, its log, its newest snapshot. Bytes only; what they mean is the
//! caller's affair.
//!
//! Two implementations of [`LogStore`]: [`RocksStore`] on disk and [`MemoryStore`] for tests. This crate is a leaf, so that
//! only binaries which need the disk link RocksDB.
//!
//! ```text
//!  caller's thread                              writer thread (RocksStore)
//!  append ── memtable + WAL buffer ── queue ──▶ takes all that wait ── flush_wal(sync) ── mark ── done, done, done
//!           (readable from here on)                                    (durable from here on)
//! ```
//!
//! RocksDB runs with manual WAL flush: what has not been synced sits in the process's own memory, and dies with it. So
//! nothing survives by luck, and a test that copies the folder sees exactly what a crash would leave.
//!
//! Every record carries a format version and a CRC over its key and content; every sync leaves the sequence
//! number it reached in a small file beside the database, so that a log which lost acknowledged records is refused
//! at the next start instead of being believed (RocksDB itself takes a damaged length field for the end of the log).

mod error;
mod memory;
mod record;
mod rocks;
mod writer;

use std::ops::Range;

pub use error::StorageError;
pub use memory::MemoryStore;
pub use rocks::RocksStore;

/// Called exactly once, when an operation is durable or has failed. Must not block: the writer thread runs it.
pub type Done = Box<dyn FnOnce(Result<(), StorageError>) + Send>;

/// One log entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its place in the log.
    pub index: u64,
    /// The caller's encoding of it.
    pub bytes: Vec<u8>,
}

/// The newest snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The caller's description of it.
    pub meta: Vec<u8>,
    /// Its content.
    pub data: Vec<u8>,
}

/// Largest entry, bytes. One gRPC message must be able to carry it.
pub const ENTRY_BYTES_MAX: usize = 4 << 20;
/// Largest snapshot, bytes. It is held in memory while it is written and sent.
pub const SNAPSHOT_BYTES_MAX: usize = 512 << 20;

/// A durable store of one Raft member.
///
/// Writes take effect in the order of the calls, and become durable in that order: a crash leaves a prefix of them that
/// contains every one whose [`Done`] was called with `Ok`. A write is readable as soon as its call returns. One failed
/// write or sync fails all later ones: what the disk holds is unknown from then on (a second `fsync` may lie).
pub trait LogStore: Send + Sync + 'static {
    /// The vote, if one was ever saved.
    fn vote(&self) -> Result<Option<Vec<u8>>, StorageError>;
    /// Replaces the vote; durable when `done` is called.
    fn save_vote(&self, vote: &[u8], done: Done);

    /// The newest committed position that survived.
    fn committed(&self) -> Result<Option<Vec<u8>>, StorageError>;
    /// Notes how far the log is known to be committed. Becomes durable with the next durable write: losing it costs time
    /// after a restart, never truth.
    fn save_committed(&self, committed: Option<&[u8]>) -> Result<(), StorageError>;

    /// Adds consecutive entries after the last one; durable when `done` is called.
    fn append(&self, entries: &[Entry], done: Done);
    /// The entries of `range` that exist, in order; stops before exceeding `bytes_max`, but gives at least one.
    fn read(&self, range: Range<u64>, bytes_max: usize) -> Result<Vec<Entry>, StorageError>;
    /// The last entry, if the log is not empty.
    fn last(&self) -> Result<Option<Entry>, StorageError>;
    /// Removes the entries from `from` on.
    fn truncate(&self, from: u64, done: Done);
    /// Removes the entries up to and including `through` and remembers `mark`, the caller's name for that position.
    fn purge(&self, through: u64, mark: &[u8], done: Done);
    /// The mark of the newest purge.
    fn purged(&self) -> Result<Option<Vec<u8>>, StorageError>;

    /// Replaces the snapshot, all or nothing; durable when `done` is called.
    fn save_snapshot(&self, snapshot: &Snapshot, done: Done);
    /// The newest snapshot.
    fn snapshot(&self) -> Result<Option<Snapshot>, StorageError>;
}
