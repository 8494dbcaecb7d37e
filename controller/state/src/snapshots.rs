//! Snapshots as they are read: which there are, which hosts can restore one, and what is to be removed from pools.
//!
//! ```text
//!   create ──> CREATING ──done──> READY ──delete──> DELETING ──its folder is removed──> gone
//!                 │                                    ^
//!                 ├──failed, or the run ends──> FAILED ┤ (its folder is removed at once)
//!                 └──delete: that ends it ─────────────┘
//! ```
//!
//! A restore never writes over anything. The content that a volume gets is a file of its own, named by the restore's number; which file is
//! the volume's, the volume's record says (`content`), and it says so from the entry on by which the restored run may begin. Before that
//! entry a start without the restore finds everything as it was; after it nothing of what was before is ever used. So a restore that dies
//! half-way has done nothing, an agent that comes too late finds its file there already, and what is left is removed by whoever has the pool.

use std::collections::BTreeMap;

use drover_proto::v1::{Host, HostState, Removal, Restore, Snapshot, SnapshotPhase, Vm, VmSpec, Volume};
use drover_proto::{Code, Fault};

use crate::cloud;
use crate::placement::Purpose;
use crate::state::{State, epoch_of, host_of, spec_of};
use crate::validate::quoted;
use crate::volumes::{TOLD_MAX, has_pool};

/// What is to be removed of volumes: by volume and content, the pool.
pub(crate) type Removals = BTreeMap<(String, u64), String>;

/// The number in a snapshot's id, `None` when it is not of the form "s7".
pub fn snapshot_number(id: &str) -> Option<u64> {
    let digits = id.strip_prefix('s')?;
    let canonical = !digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit());
    if canonical { digits.parse().ok() } else { None }
}

impl State {
    /// All snapshots, oldest first.
    pub fn snapshots(&self) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.values()
    }

    /// One snapshot, by its id ("s7").
    pub fn snapshot(&self, id: &str) -> Option<&Snapshot> {
        self.snapshots.get(&snapshot_number(id)?)
    }

    /// The snapshot of this VM that is named so, or has this id.
    ///
    /// # Errors
    /// `snapshot_not_found`, of `field`.
    pub fn snapshot_of(&self, vm: &str, name: &str, field: &str) -> Result<&Snapshot, Fault> {
        let mut of_vm = self.snapshots.values().filter(|snapshot| snapshot.vm == vm);
        of_vm
            .find(|snapshot| snapshot.name == name || snapshot.id == name)
            .ok_or_else(|| {
                let message = format!(
                    "{field} is {}; no snapshot of {} has this name or id",
                    quoted(name),
                    quoted(vm)
                );
                Fault::new(Code::SnapshotNotFound, message).field(field)
            })
    }

    /// The snapshot that a VM's next run is to begin as.
    pub(crate) fn source_of<'s, 'v>(&'s self, vm: &'v Vm) -> Option<(&'v Restore, &'s Snapshot)> {
        let restore = vm.restore.as_ref()?;
        Some((restore, self.snapshot(&restore.snapshot)?))
    }

    /// The snapshot that is being taken of the VM's run.
    pub(crate) fn taken_of(&self, vm: &Vm) -> Option<&Snapshot> {
        let snapshot = self.snapshot(&vm.snapshot)?;
        let of_run = snapshot.epoch == epoch_of(vm) && snapshot.host == host_of(vm);
        (of_run && snapshot.phase() == SnapshotPhase::Creating).then_some(snapshot)
    }

    /// The VM that is to be restored from the snapshot and has not begun.
    pub(crate) fn waits_for(&self, id: &str) -> Option<&Vm> {
        let waits = |vm: &&Vm| vm.restore.as_ref().is_some_and(|restore| restore.snapshot == id);
        self.vms.values().find(waits)
    }

    /// What the host is to remove: of everything that is to go, one host that is up and has its pool, the one that made it before others.
    pub(crate) fn removals_of(&self, host: &str) -> Vec<Removal> {
        let is_to_go = |snapshot: &&Snapshot| match snapshot.phase() {
            SnapshotPhase::Failed => !snapshot.cleared,
            phase => phase == SnapshotPhase::Deleting,
        };
        let snapshots = self.snapshots.values().filter(is_to_go);
        let snapshots = snapshots
            .filter(|snapshot| self.remover(&snapshot.pool, &snapshot.host) == Some(host))
            .map(|snapshot| Removal {
                pool: snapshot.pool.clone(),
                snapshot: snapshot.id.clone(),
                ..Removal::default()
            });
        let contents = self.removals.iter();
        let contents = contents
            .filter(|(_, pool)| self.remover(pool, "") == Some(host))
            .map(|((volume, content), pool)| Removal {
                pool: pool.clone(),
                volume: volume.clone(),
                content: *content,
                ..Removal::default()
            });
        snapshots.chain(contents.take(TOLD_MAX)).collect()
    }

    fn remover(&self, pool: &str, first: &str) -> Option<&str> {
        let can = |(_, host): &(&String, &Host)| {
            host.state() == HostState::Up && knows_snapshots(host) && has_pool(host, pool)
        };
        let mut hosts = self.hosts.iter().filter(can).map(|(name, _)| name.as_str());
        let all = hosts.clone();
        hosts
            .find(|name| *name == first)
            .or_else(|| all.into_iter().next())
    }
}

/// Whether the host's agent takes snapshots, restores them, and finds what was restored.
pub(crate) fn knows_snapshots(host: &Host) -> bool {
    host.spec.as_ref().is_some_and(|spec| spec.snapshots)
}

/// What a start of the VM is for.
pub fn purpose_of_start<'a>(state: &'a State, vm: &Vm) -> Purpose<'a> {
    match state.source_of(vm) {
        Some((_, snapshot)) => restoring(snapshot),
        None => Purpose::Start,
    }
}

pub(crate) fn restoring(snapshot: &Snapshot) -> Purpose<'_> {
    Purpose::Restore {
        snapshot: &snapshot.id,
        pool: &snapshot.pool,
        cpu_features: &snapshot.cpu_features,
        device_model: snapshot.device_model,
    }
}

/// Whether the host can restore a VM for this purpose. The message goes on after the host's name.
///
/// # Errors
/// `snapshot_unavailable`, `pool_not_found`.
pub(crate) fn restores(purpose: Purpose<'_>, host: &Host) -> Result<(), Fault> {
    let Purpose::Restore { snapshot, pool, .. } = purpose else {
        return Ok(());
    };
    if !knows_snapshots(host) {
        return Err(too_old());
    }
    if !has_pool(host, pool) {
        let message = format!("has no pool {}, in which snapshot {snapshot} is", quoted(pool));
        return Err(Fault::new(Code::PoolNotFound, message));
    }
    Ok(())
}

/// The host's agent knows nothing of snapshots. The message goes on after the host's name.
pub(crate) fn too_old() -> Fault {
    let message = "has an agent that knows no snapshots: upgrade it first";
    Fault::new(Code::SnapshotUnavailable, message)
}

/// A disk's volume as the VM's next run is to have it: after a restore that is still to begin, where there is one.
pub(crate) fn volume_of_run(state: &State, vm: &Vm, name: &str) -> Option<Volume> {
    let volume = state.volume(name)?;
    let Some((restore, snapshot)) = state.source_of(vm) else {
        return Some(volume.clone());
    };
    let writes = |spec: &VmSpec| {
        let mut disks = spec.disks.iter();
        disks.any(|disk| disk.volume == name && !disk.read_only)
    };
    if !writes(spec_of(vm)) {
        return Some(volume.clone());
    }
    let size_bytes = size_then(spec_of(vm), snapshot, name).unwrap_or(volume.size_bytes);
    Some(Volume {
        content: restore.number,
        size_bytes,
        initial_bytes: 0,
        ..volume.clone()
    })
}

/// How large the disk was that is now on the volume `name` of `spec`: a clone's volumes have other names, but the same slots.
fn size_then(spec: &VmSpec, snapshot: &Snapshot, name: &str) -> Option<u64> {
    let slot = spec.disks.iter().find(|disk| disk.volume == name)?.slot;
    let mut then = spec_then(snapshot).disks.iter().zip(&snapshot.volumes);
    then.find(|(disk, _)| disk.slot == slot)
        .map(|(_, volume)| volume.size_bytes)
}

pub(crate) fn spec_then(snapshot: &Snapshot) -> &VmSpec {
    snapshot
        .spec
        .as_ref()
        .expect("every snapshot was taken of a VM with a specification")
}

/// The restore as the agent of the run is told of it.
pub(crate) fn told(state: &State, vm: &Vm) -> Option<Restore> {
    let (restore, snapshot) = state.source_of(vm)?;
    Some(Restore {
        source: Some(cloud::for_agents(snapshot)),
        ..restore.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_in_one_spelling_only() {
        assert_eq!(snapshot_number("s7"), Some(7));
        for bad in [
            "",
            "s",
            "s07",
            "7",
            "s7x",
            "m7",
            "s-7",
            "s+7",
            "s99999999999999999999999",
        ] {
            assert_eq!(snapshot_number(bad), None, "{bad}");
        }
    }
}
