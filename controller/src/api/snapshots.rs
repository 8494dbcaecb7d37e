//! Snapshots as clients see them, and how far each is, each restore and each volume that is filled from an image: that is in the leader's memory
//! only, as of migrations. A new leader knows nothing until the next report, a fraction of a second later.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    BeginRestoreRequest, BeginRestoreResponse, GetSnapshotRequest, ListSnapshotsRequest,
    ListSnapshotsResponse, ReportSnapshotRequest, ReportSnapshotResponse, ReportVolumeRequest,
    ReportVolumeResponse, Snapshot, SnapshotNews, SnapshotPhase, SnapshotProgress, Vm, VmState, Volume,
    VolumeNews,
};
use drover_proto::{Code, Fault};
use drover_state::{is_being_filled, snapshot_without_secrets};

use super::Shared;
use super::on_leader::Call;

/// Entries kept: more are never under way at once on the hosts of a cluster. Beyond it all are forgotten, and reported again.
const ENTRIES_MAX: usize = 4_096;

/// What is under way: a snapshot by its id, a restore by its number, a volume that is filled by its content's, which no restore has.
type Entry = (String, u64);

/// How far snapshots, restores and volumes are.
#[derive(Debug, Default)]
pub struct SnapshotTable {
    entries: Mutex<BTreeMap<Entry, SnapshotProgress>>,
}

impl SnapshotTable {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Entry, SnapshotProgress>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, entry: Entry, progress: SnapshotProgress) {
        let mut entries = self.lock();
        if entries.len() >= ENTRIES_MAX && !entries.contains_key(&entry) {
            entries.clear();
        }
        entries.insert(entry, progress);
    }

    /// The snapshot with how far it is, while it is being taken.
    pub(crate) fn merge(&self, snapshot: Snapshot) -> Snapshot {
        let entry = (snapshot.id.clone(), 0);
        if snapshot.phase() != SnapshotPhase::Creating {
            self.lock().remove(&entry);
            return snapshot;
        }
        let progress = self.lock().get(&entry).copied();
        Snapshot { progress, ..snapshot }
    }

    /// The VM with how far its restore is, while there is one.
    pub(crate) fn merge_vm(&self, mut vm: Vm) -> Vm {
        if let Some(restore) = &mut vm.restore {
            restore.progress = self.lock().get(&(String::new(), restore.number)).copied();
        }
        vm
    }

    /// The volume with how far it is, while it is being filled.
    pub(crate) fn merge_volume(&self, volume: Volume) -> Volume {
        if !is_being_filled(&volume) {
            return volume;
        }
        let progress = self.lock().get(&(String::new(), volume.content)).copied();
        Volume { progress, ..volume }
    }
}

pub(super) fn list(api: &Shared, request: &ListSnapshotsRequest) -> Result<ListSnapshotsResponse, Fault> {
    let asked = |snapshot: &&Snapshot| request.vm.is_empty() || snapshot.vm == request.vm;
    let snapshots: Vec<Snapshot> = api.consensus.read(|state| {
        state
            .snapshots()
            .filter(asked)
            .map(snapshot_without_secrets)
            .collect()
    });
    let merged = snapshots
        .into_iter()
        .map(|snapshot| api.memory.snapshots.merge(snapshot));
    Ok(ListSnapshotsResponse {
        snapshots: merged.collect(),
    })
}

pub(super) fn get(api: &Shared, request: &GetSnapshotRequest) -> Result<Snapshot, Fault> {
    let found = api.consensus.read(|state| {
        state
            .snapshot_of(&request.vm, &request.name, "name")
            .map(snapshot_without_secrets)
    });
    Ok(api.memory.snapshots.merge(found?))
}

/// An agent's news. Progress stays in memory; what would change nothing is answered without an entry.
pub(super) async fn report(
    call: Call,
    request: ReportSnapshotRequest,
) -> Result<ReportSnapshotResponse, Fault> {
    call.caller.speaks_for(&request.host)?;
    let snapshot = call
        .api
        .consensus
        .read(|state| state.snapshot(&request.snapshot).cloned());
    let taken = snapshot.as_ref().is_some_and(|snapshot| {
        let of_run = (&snapshot.host, snapshot.epoch) == (&request.host, request.epoch);
        of_run && snapshot.phase() == SnapshotPhase::Creating
    });
    match request.news() {
        SnapshotNews::Progress => {
            let progress = request.progress.unwrap_or_default();
            let current = taken || request.restore > 0;
            if current {
                let entry = (request.snapshot, request.restore);
                call.api.memory.snapshots.note(entry, progress);
            }
            Ok(ReportSnapshotResponse { current })
        }
        SnapshotNews::Done | SnapshotNews::Failed if !taken => {
            let is_ready = |snapshot: &Snapshot| snapshot.phase() == SnapshotPhase::Ready;
            let current = snapshot.as_ref().is_some_and(is_ready);
            Ok(ReportSnapshotResponse { current })
        }
        SnapshotNews::Unspecified => {
            let message = "news is unspecified; PROGRESS, DONE, FAILED and REMOVED are reported";
            Err(Fault::new(Code::InvalidArgument, message).field("news"))
        }
        _ => {
            let response = call.propose("", Kind::ReportSnapshot(request)).await?;
            Ok(ReportSnapshotResponse {
                current: response.current,
            })
        }
    }
}

/// An agent's news of a volume that it fills. As of a snapshot.
pub(super) async fn report_volume(
    call: Call,
    request: ReportVolumeRequest,
) -> Result<ReportVolumeResponse, Fault> {
    call.caller.speaks_for(&request.host)?;
    let current = call.api.consensus.read(|state| {
        let volume = state.volume(&request.volume);
        volume.is_some_and(|volume| volume.content == request.content && is_being_filled(volume))
    });
    match request.news() {
        VolumeNews::Unspecified => {
            let message = "news is unspecified; PROGRESS, FILLED and FAILED are reported";
            Err(Fault::new(Code::InvalidArgument, message).field("news"))
        }
        VolumeNews::Progress if current => {
            let progress = request.progress.unwrap_or_default();
            let entry = (String::new(), request.content);
            call.api.memory.snapshots.note(entry, progress);
            Ok(ReportVolumeResponse { current })
        }
        VolumeNews::Filled | VolumeNews::Failed if current => {
            let response = call.propose("", Kind::ReportVolume(request)).await?;
            Ok(ReportVolumeResponse {
                current: response.current,
            })
        }
        _ => Ok(ReportVolumeResponse { current }),
    }
}

/// A restored VMM asks whether it may begin.
pub(super) async fn begin(call: Call, request: BeginRestoreRequest) -> Result<BeginRestoreResponse, Fault> {
    call.caller.speaks_for(&request.host)?;
    let begun = call.api.consensus.read(|state| {
        let vm = state.vm(&request.vm)?;
        let of_run = drover_state::epoch_of(vm) == request.epoch && drover_state::host_of(vm) == request.host;
        match vm.restore {
            // Declared down: asked again when the host is up.
            Some(_) if of_run && vm.state() == VmState::Unknown => Some(false),
            None if of_run && vm.restored == request.restore => Some(drover_state::occupies(vm)),
            _ => None,
        }
    });
    if let Some(begun) = begun {
        return Ok(BeginRestoreResponse { begun });
    }
    super::reach("controller.before_begin_restore").await;
    let response = call.propose("", Kind::BeginRestore(request)).await?;
    Ok(BeginRestoreResponse {
        begun: response.current,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_far_a_snapshot_is_is_shown_while_it_is_being_taken() {
        let table = SnapshotTable::default();
        let snapshot = |phase: SnapshotPhase| Snapshot {
            id: "s1".into(),
            phase: phase.into(),
            ..Snapshot::default()
        };
        let progress = SnapshotProgress {
            bytes_done: 1,
            bytes_total: 2,
        };
        table.note(("s1".into(), 0), progress);
        assert_eq!(
            table.merge(snapshot(SnapshotPhase::Creating)).progress,
            Some(progress)
        );
        assert_eq!(table.merge(snapshot(SnapshotPhase::Ready)).progress, None);
        assert_eq!(
            table.merge(snapshot(SnapshotPhase::Creating)).progress,
            None,
            "it was forgotten"
        );
    }

    #[test]
    fn the_table_is_bounded() {
        let table = SnapshotTable::default();
        for number in 0..=ENTRIES_MAX as u64 {
            table.note((String::new(), number), SnapshotProgress::default());
        }
        assert_eq!(table.lock().len(), 1);
    }
}
