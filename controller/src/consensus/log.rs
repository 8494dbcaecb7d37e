//! openraft's log store over [`drover_storage`]: protobuf in, protobuf out; the store itself knows only bytes.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use drover_proto::v1;
use drover_storage::{Done, LogStore};
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{AnyError, LogState, OptionalSend, RaftLogReader, StorageError, StorageIOError};
use prost::Message;
use tokio::sync::oneshot;

use super::types::{Entry, LogId, TypeConfig, Vote};
use super::wire;

/// Entries that one message to a follower carries, bytes. Well below [`super::network::MESSAGE_BYTES_MAX`].
const REPLICATION_BYTES_MAX: usize = 2 << 20;

type Stored<T> = Result<T, StorageError<u64>>;
type IoError = StorageIOError<u64>;

/// The log, handed to openraft and to its readers.
#[derive(Clone)]
pub(crate) struct Log {
    store: Arc<dyn LogStore>,
}

/// Runs a write and waits, without blocking the worker, until it is durable.
pub(crate) async fn durable(write: impl FnOnce(Done)) -> Result<(), drover_storage::StorageError> {
    let (done, durable) = oneshot::channel();
    // The receiver is gone only when openraft dropped the call: then nobody cares.
    write(Box::new(move |result| drop(done.send(result))));
    durable.await.unwrap_or_else(|_| {
        Err(drover_storage::StorageError::Io {
            doing: "writing the store",
            problem: "the store was closed".to_owned(),
        })
    })
}

pub(crate) fn any(error: impl std::error::Error + 'static) -> AnyError {
    AnyError::new(&error)
}

impl Log {
    pub(crate) fn new(store: Arc<dyn LogStore>) -> Self {
        Self { store }
    }

    fn read(&self, range: (Bound<&u64>, Bound<&u64>), bytes_max: usize) -> Stored<Vec<Entry>> {
        let start = match range.0 {
            Bound::Included(&start) => start,
            Bound::Excluded(&start) => start.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.1 {
            Bound::Included(&end) => end.saturating_add(1),
            Bound::Excluded(&end) => end,
            Bound::Unbounded => u64::MAX,
        };
        let found = self
            .store
            .read(start..end, bytes_max)
            .map_err(|error| IoError::read_logs(any(error)))?;
        found.iter().map(decode_entry).collect()
    }
}

fn decode_entry(stored: &drover_storage::Entry) -> Stored<Entry> {
    let broken = |error: AnyError| IoError::read_log_at_index(stored.index, error);
    let entry = v1::LogEntry::decode(stored.bytes.as_slice()).map_err(|error| broken(any(error)))?;
    let entry = wire::entry_in(entry).map_err(|error| broken(any(error)))?;
    if entry.log_id.index != stored.index {
        return Err(broken(AnyError::error(format!("it calls itself {}", entry.log_id))).into());
    }
    Ok(entry)
}

fn decode_log_id(bytes: Option<Vec<u8>>) -> Stored<Option<LogId>> {
    let Some(bytes) = bytes else { return Ok(None) };
    let id = v1::LogId::decode(bytes.as_slice()).map_err(|error| IoError::read_logs(any(error)))?;
    Ok(Some(wire::log_id_in(&id)))
}

impl RaftLogReader<TypeConfig> for Log {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Stored<Vec<Entry>> {
        self.read((range.start_bound(), range.end_bound()), usize::MAX)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Stored<Vec<Entry>> {
        self.read(
            (Bound::Included(&start), Bound::Excluded(&end)),
            REPLICATION_BYTES_MAX,
        )
    }
}

impl RaftLogStorage<TypeConfig> for Log {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Stored<LogState<TypeConfig>> {
        let read = |error| IoError::read_logs(any(error));
        let last_purged_log_id = decode_log_id(self.store.purged().map_err(read)?)?;
        let last = self.store.last().map_err(read)?;
        let last = last
            .as_ref()
            .map(decode_entry)
            .transpose()?
            .map(|entry| entry.log_id);
        Ok(LogState {
            last_purged_log_id,
            last_log_id: last.or(last_purged_log_id),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Stored<()> {
        let bytes = wire::vote_out(vote).encode_to_vec();
        durable(|done| self.store.save_vote(&bytes, done))
            .await
            .map_err(|error| IoError::write_vote(any(error)).into())
    }

    async fn read_vote(&mut self) -> Stored<Option<Vote>> {
        let read = |error| IoError::read_vote(error);
        let Some(bytes) = self.store.vote().map_err(|error| read(any(error)))? else {
            return Ok(None);
        };
        let vote = v1::RaftVote::decode(bytes.as_slice()).map_err(|error| read(any(error)))?;
        Ok(Some(wire::vote_in(&vote)))
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Stored<()> {
        let bytes = committed.map(|id| wire::log_id_out(&id).encode_to_vec());
        let saved = self.store.save_committed(bytes.as_deref());
        saved.map_err(|error| IoError::write(any(error)).into())
    }

    async fn read_committed(&mut self) -> Stored<Option<LogId>> {
        decode_log_id(
            self.store
                .committed()
                .map_err(|error| IoError::read(any(error)))?,
        )
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Stored<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let encode = |entry: Entry| drover_storage::Entry {
            index: entry.log_id.index,
            bytes: wire::entry_out(&entry).encode_to_vec(),
        };
        let entries: Vec<_> = entries.into_iter().map(encode).collect();
        let flushed: Done =
            Box::new(move |result| callback.log_io_completed(result.map_err(io::Error::other)));
        self.store.append(&entries, flushed);
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId) -> Stored<()> {
        let done = durable(|done| self.store.truncate(log_id.index, done)).await;
        done.map_err(|error| IoError::write_logs(any(error)).into())
    }

    async fn purge(&mut self, log_id: LogId) -> Stored<()> {
        let mark = wire::log_id_out(&log_id).encode_to_vec();
        let done = durable(|done| self.store.purge(log_id.index, &mark, done)).await;
        done.map_err(|error| IoError::write_logs(any(error)).into())
    }
}
