//! The state machine: [`drover_state`] fed by openraft.
//!
//! The state lives in memory; what is durable is the log and the newest snapshot. At the start the snapshot is loaded and
//! openraft applies again what is known to be committed behind it.

use std::io::Cursor;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use drover_proto::v1;
use drover_proto::v1::command::Kind;
use drover_state::{Effect, State};
use drover_storage::LogStore;
use openraft::storage::{RaftStateMachine, Snapshot};
use openraft::{
    AnyError, EntryPayload, OptionalSend, RaftSnapshotBuilder, RaftTypeConfig, StorageError, StorageIOError,
};
use prost::Message;
use tokio::sync::{Mutex, watch};
use tokio::time::sleep;

use super::log::{any, durable};
use super::types::{Answer, Entry, LogId, Proposal, SnapshotMeta, StoredMembership, TypeConfig};
use super::wire;

/// Watchers of the state hear of a hand-over so much later than the target, which waits for its answer while the guest stands still:
/// what they do then (desired states, the reconcilers' looks, the source's end) would take the processors from it.
const HAND_OVER_QUIET: Duration = Duration::from_millis(5);

type Stored<T> = Result<T, StorageError<u64>>;
type IoError = StorageIOError<u64>;

/// What applying has made of the log so far.
#[derive(Default)]
struct Applied {
    state: State,
    last: Option<LogId>,
    membership: StoredMembership,
}

/// The applied state, shared between openraft, who writes it, and everybody who reads.
pub(crate) struct Shared {
    applied: RwLock<Applied>,
    index: watch::Sender<u64>,
    /// The newest time in the log, Unix milliseconds: stamps never go back.
    newest_ms: AtomicU64,
}

impl Shared {
    pub(crate) fn read<R>(&self, look: impl FnOnce(&State) -> R) -> R {
        look(&self.applied().state)
    }

    /// Changes with every batch of entries applied.
    pub(crate) fn index(&self) -> watch::Receiver<u64> {
        self.index.subscribe()
    }

    /// A time stamp for a new command: the wall clock, but never before an earlier stamp.
    pub(crate) fn stamp(&self, wall_ms: u64) -> u64 {
        self.newest_ms.fetch_max(wall_ms, Ordering::Relaxed).max(wall_ms)
    }

    fn applied(&self) -> RwLockReadGuard<'_, Applied> {
        self.applied.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn applied_mut(&self) -> RwLockWriteGuard<'_, Applied> {
        self.applied.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn announce(&self, last: Option<LogId>) {
        self.index.send_replace(last.map_or(0, |last| last.index));
    }

    /// Announces what is applied [`HAND_OVER_QUIET`] from now.
    fn announce_later(self: &Arc<Self>) {
        let shared = self.clone();
        tokio::spawn(async move {
            sleep(HAND_OVER_QUIET).await;
            let last = shared.applied().last;
            shared.announce(last);
        });
    }
}

/// The state machine as openraft drives it.
pub(crate) struct Machine {
    shared: Arc<Shared>,
    snapshots: Snapshots,
}

/// The durable snapshot. One writer at a time: a snapshot that was built slowly must not replace one that was
/// received meanwhile and reaches further.
#[derive(Clone)]
struct Snapshots {
    store: Arc<dyn LogStore>,
    newest: Arc<Mutex<Option<LogId>>>,
}

impl Machine {
    /// Loads the newest snapshot, if there is one.
    pub(crate) fn open(store: Arc<dyn LogStore>) -> Stored<Self> {
        let mut applied = Applied::default();
        if let Some((meta, data)) = load(&*store)? {
            applied = install(&meta, &data)?;
        }
        let last = applied.last;
        let shared = Shared {
            applied: RwLock::new(applied),
            index: watch::Sender::new(last.map_or(0, |last| last.index)),
            newest_ms: AtomicU64::new(0),
        };
        let snapshots = Snapshots {
            store,
            newest: Arc::new(Mutex::new(last)),
        };
        Ok(Self {
            shared: Arc::new(shared),
            snapshots,
        })
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }
}

fn load(store: &dyn LogStore) -> Stored<Option<(SnapshotMeta, Vec<u8>)>> {
    let broken = |error: AnyError| IoError::read_snapshot(None, error);
    let Some(stored) = store.snapshot().map_err(|error| broken(any(error)))? else {
        return Ok(None);
    };
    let meta = v1::SnapshotMeta::decode(stored.meta.as_slice()).map_err(|error| broken(any(error)))?;
    let meta = wire::snapshot_meta_in(meta).map_err(|error| broken(any(error)))?;
    Ok(Some((meta, stored.data)))
}

fn install(meta: &SnapshotMeta, data: &[u8]) -> Stored<Applied> {
    let state = State::decode(data)
        .map_err(|error| IoError::read_snapshot(Some(meta.signature()), AnyError::error(error)))?;
    Ok(Applied {
        state,
        last: meta.last_log_id,
        membership: meta.last_membership.clone(),
    })
}

impl Snapshots {
    /// Makes the snapshot durable, unless a newer one is.
    async fn save(&self, meta: &SnapshotMeta, data: &[u8]) -> Stored<()> {
        let mut newest = self.newest.lock().await;
        if meta.last_log_id < *newest {
            return Ok(());
        }
        let snapshot = drover_storage::Snapshot {
            meta: wire::snapshot_meta_out(meta).encode_to_vec(),
            data: data.to_vec(),
        };
        durable(|done| self.store.save_snapshot(&snapshot, done))
            .await
            .map_err(|error| IoError::write_snapshot(Some(meta.signature()), any(error)))?;
        *newest = meta.last_log_id;
        Ok(())
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Stored<(Option<LogId>, StoredMembership)> {
        let applied = self.shared.applied();
        Ok((applied.last, applied.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Stored<Vec<Answer>>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut applied = self.shared.applied_mut();
        let mut answers = Vec::new();
        let mut hands_over = false;
        for entry in entries {
            applied.last = Some(entry.log_id);
            let answer = match entry.payload {
                EntryPayload::Blank => Answer::default(),
                EntryPayload::Membership(membership) => {
                    applied.membership = StoredMembership::new(Some(entry.log_id), membership);
                    Answer::default()
                }
                EntryPayload::Normal(Proposal(command)) => {
                    self.shared.newest_ms.fetch_max(command.now_ms, Ordering::Relaxed);
                    hands_over |= matches!(command.kind, Some(Kind::CommitHandover(_)));
                    let (answer, effects) = drover_state::apply(&mut applied.state, &command);
                    trace(&effects);
                    Answer(answer)
                }
            };
            answers.push(answer);
        }
        let last = applied.last;
        drop(applied);
        if hands_over {
            self.shared.announce_later();
        } else {
            self.shared.announce(last);
        }
        Ok(answers)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        let applied = self.shared.applied();
        let last = applied
            .last
            .map_or_else(|| "start".to_owned(), |last| last.to_string());
        let meta = SnapshotMeta {
            last_log_id: applied.last,
            last_membership: applied.membership.clone(),
            snapshot_id: last,
        };
        Builder {
            meta,
            data: applied.state.encode(),
            snapshots: self.snapshots.clone(),
        }
    }

    async fn begin_receiving_snapshot(
        &mut self,
    ) -> Stored<Box<<TypeConfig as RaftTypeConfig>::SnapshotData>> {
        Ok(Box::new(Cursor::new(Vec::new())))
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Box<Cursor<Vec<u8>>>) -> Stored<()> {
        let data = snapshot.into_inner();
        // Understood first, durable second, in use last.
        let received = install(meta, &data)?;
        self.snapshots.save(meta, &data).await?;
        let last = received.last;
        *self.shared.applied_mut() = received;
        self.shared.announce(last);
        tracing::info!(last = %meta.snapshot_id, bytes = data.len(), "installed the leader's snapshot");
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Stored<Option<Snapshot<TypeConfig>>> {
        let found = load(&*self.snapshots.store)?;
        Ok(found.map(|(meta, data)| Snapshot {
            meta,
            snapshot: Box::new(Cursor::new(data)),
        }))
    }
}

fn trace(effects: &[Effect]) {
    for effect in effects {
        if let Effect::Event(event) = effect {
            tracing::debug!(kind = event.kind, subject = event.subject, "{}", event.message);
        }
    }
}

/// A snapshot of the moment it was asked for; written while applying goes on.
pub(crate) struct Builder {
    meta: SnapshotMeta,
    data: Vec<u8>,
    snapshots: Snapshots,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    async fn build_snapshot(&mut self) -> Stored<Snapshot<TypeConfig>> {
        let data = std::mem::take(&mut self.data);
        self.snapshots.save(&self.meta, &data).await?;
        tracing::debug!(last = %self.meta.snapshot_id, bytes = data.len(), "built a snapshot");
        Ok(Snapshot {
            meta: self.meta.clone(),
            snapshot: Box::new(Cursor::new(data)),
        })
    }
}

#[cfg(test)]
mod tests {
    use drover_storage::{MemoryStore, RocksStore};
    use openraft::testing::{StoreBuilder, Suite};
    use tempfile::TempDir;

    use super::super::log::Log;
    use super::*;

    struct InMemory;

    impl StoreBuilder<TypeConfig, Log, Machine> for InMemory {
        async fn build(&self) -> Stored<((), Log, Machine)> {
            let store: Arc<dyn LogStore> = Arc::new(MemoryStore::new());
            Ok(((), Log::new(store.clone()), Machine::open(store)?))
        }
    }

    struct OnDisk;

    impl StoreBuilder<TypeConfig, Log, Machine, TempDir> for OnDisk {
        async fn build(&self) -> Stored<(TempDir, Log, Machine)> {
            let folder = TempDir::new().expect("a temporary folder can be made");
            let store: Arc<dyn LogStore> = Arc::new(RocksStore::open(folder.path()).expect("it is empty"));
            Ok((folder, Log::new(store.clone()), Machine::open(store)?))
        }
    }

    #[test]
    fn openrafts_own_suite_passes_in_memory() {
        Suite::test_all(InMemory).unwrap();
    }

    #[test]
    fn openrafts_own_suite_passes_on_disk() {
        Suite::test_all(OnDisk).unwrap();
    }

    #[test]
    fn stamps_never_go_back() {
        let machine = Machine::open(Arc::new(MemoryStore::new())).unwrap();
        let shared = machine.shared();
        assert_eq!([5, 3, 9, 9].map(|wall_ms| shared.stamp(wall_ms)), [5, 5, 9, 9]);
    }
}
