//! The store in memory, for tests: durable at once, gone with the process.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{Done, Entry, LogStore, Snapshot, StorageError};

#[derive(Default)]
struct Inner {
    vote: Option<Vec<u8>>,
    committed: Option<Vec<u8>>,
    purged: Option<Vec<u8>>,
    log: BTreeMap<u64, Vec<u8>>,
    snapshot: Option<Snapshot>,
}

/// A [`LogStore`] in memory.
#[derive(Default)]
pub struct MemoryStore {
    inner: Mutex<Inner>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogStore for MemoryStore {
    fn vote(&self) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(self.lock().vote.clone())
    }

    fn save_vote(&self, vote: &[u8], done: Done) {
        self.lock().vote = Some(vote.to_vec());
        done(Ok(()));
    }

    fn committed(&self) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(self.lock().committed.clone())
    }

    fn save_committed(&self, committed: Option<&[u8]>) -> Result<(), StorageError> {
        self.lock().committed = committed.map(<[u8]>::to_vec);
        Ok(())
    }

    fn append(&self, entries: &[Entry], done: Done) {
        let mut inner = self.lock();
        let last = inner.log.keys().next_back().copied();
        let checked = check_append(last, entries);
        if checked.is_ok() {
            inner
                .log
                .extend(entries.iter().map(|entry| (entry.index, entry.bytes.clone())));
        }
        drop(inner);
        done(checked);
    }

    fn read(&self, range: Range<u64>, bytes_max: usize) -> Result<Vec<Entry>, StorageError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let mut bytes = 0;
        let inner = self.lock();
        let found = inner.log.range(range).take_while(|(_, content)| {
            let first = bytes == 0;
            bytes += content.len().max(1);
            first || bytes <= bytes_max
        });
        Ok(found
            .map(|(&index, content)| Entry {
                index,
                bytes: content.clone(),
            })
            .collect())
    }

    fn last(&self) -> Result<Option<Entry>, StorageError> {
        let inner = self.lock();
        Ok(inner.log.last_key_value().map(|(&index, bytes)| Entry {
            index,
            bytes: bytes.clone(),
        }))
    }

    fn truncate(&self, from: u64, done: Done) {
        self.lock().log.split_off(&from);
        done(Ok(()));
    }

    fn purge(&self, through: u64, mark: &[u8], done: Done) {
        let mut inner = self.lock();
        inner.log = inner.log.split_off(&through.saturating_add(1));
        inner.purged = Some(mark.to_vec());
        drop(inner);
        done(Ok(()));
    }

    fn purged(&self) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(self.lock().purged.clone())
    }

    fn save_snapshot(&self, snapshot: &Snapshot, done: Done) {
        self.lock().snapshot = Some(snapshot.clone());
        done(Ok(()));
    }

    fn snapshot(&self) -> Result<Option<Snapshot>, StorageError> {
        Ok(self.lock().snapshot.clone())
    }
}

/// Refuses entries that are not consecutive, do not come after `last`, or are too large. (That the first follows `last`
/// without a gap is left to the reader at the next start: openraft's own test suite appends with gaps.)
pub(crate) fn check_append(last: Option<u64>, entries: &[Entry]) -> Result<(), StorageError> {
    let mut previous = last;
    for (position, entry) in entries.iter().enumerate() {
        let in_place = match previous {
            Some(previous) if position == 0 => entry.index > previous,
            Some(previous) => entry.index == previous + 1,
            None => true,
        };
        if !in_place {
            return Err(StorageError::Refused(format!(
                "entry {} cannot follow {previous:?}",
                entry.index
            )));
        }
        if entry.bytes.len() > crate::ENTRY_BYTES_MAX {
            let (index, len, max) = (entry.index, entry.bytes.len(), crate::ENTRY_BYTES_MAX);
            return Err(StorageError::Refused(format!(
                "entry {index} has {len} bytes, at most {max} are allowed"
            )));
        }
        previous = Some(entry.index);
    }
    Ok(())
}
