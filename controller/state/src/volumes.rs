//! Volumes and who has them. Read from the state alone; `apply` asks here before a VM gets a disk or a volume goes.
//!
//! One writer or any number of readers: a volume that a VM may write to belongs to that VM alone, from the VM's creation to
//! its end and whether it runs or not. So what a stopped VM had written is there when it starts again, and no order of
//! starts brings two guests onto one disk. The VMM's lock on the file is the second guard, not the first.

use std::collections::BTreeMap;

use drover_proto::v1::{Host, Vm, VmSpec, Volume};
use drover_proto::{Code, Fault};

use crate::snapshots::{knows_snapshots, too_old};
use crate::state::{State, spec_of};
use crate::validate::quoted;

impl State {
    /// One volume. Who has it is not filled in: see [`State::volumes_with_users`].
    pub fn volume(&self, name: &str) -> Option<&Volume> {
        self.volumes.get(name)
    }

    /// All volumes, by name, each with the VMs that have it.
    pub fn volumes_with_users(&self) -> Vec<Volume> {
        let mut users: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (name, vm) in &self.vms {
            for disk in &spec_of(vm).disks {
                users.entry(disk.volume.as_str()).or_default().push(name.clone());
            }
        }
        let with_users = |volume: &Volume| Volume {
            vms: users.remove(volume.name.as_str()).unwrap_or_default(),
            ..volume.clone()
        };
        self.volumes.values().map(with_users).collect()
    }

    /// The first VM, but for the one that is named, that has the volume and for which `counts` says so, told whether it may write to it.
    pub(crate) fn user_of(&self, volume: &str, except: &str, counts: impl Fn(bool) -> bool) -> Option<&Vm> {
        let others = self.vms.iter().filter(|(name, _)| *name != except);
        others.map(|(_, vm)| vm).find(|vm| {
            let mut disks = spec_of(vm).disks.iter();
            disks.any(|disk| disk.volume == volume && counts(!disk.read_only))
        })
    }
}

/// Whether the VM of this spec, new or as it is to become, may have its disks.
///
/// # Errors
/// `volume_not_found`, `volume_in_use`.
pub(crate) fn may_have(state: &State, spec: &VmSpec) -> Result<(), Fault> {
    const FIELD: &str = "spec.disks.volume";
    for disk in &spec.disks {
        let volume = &disk.volume;
        if state.volume(volume).is_none() {
            let message = format!(
                "{FIELD} is {}; no volume has this name: create it first",
                quoted(volume)
            );
            return Err(Fault::new(Code::VolumeNotFound, message).field(FIELD));
        }
        // A reader is in the way of a writer only, a writer of everybody.
        if let Some(other) = state.user_of(volume, &spec.name, |writes| writes || !disk.read_only) {
            let message = format!(
                "{FIELD} is {volume}, which VM {} has; a volume that is written to belongs to one VM, only readers may share one",
                spec_of(other).name
            );
            return Err(Fault::new(Code::VolumeInUse, message).field(FIELD));
        }
    }
    Ok(())
}

/// Whether the host has the pools of the spec's volumes. The message goes on after the host's name.
///
/// # Errors
/// `pool_not_found`; `snapshot_unavailable` where one was restored and the host would not find its content.
pub(crate) fn reaches(state: &State, spec: &VmSpec, host: &Host) -> Result<(), Fault> {
    for volume in spec.disks.iter().filter_map(|disk| state.volume(&disk.volume)) {
        if !has_pool(host, &volume.pool) {
            let message = format!(
                "has no pool {}, in which volume {} is",
                quoted(&volume.pool),
                volume.name
            );
            return Err(Fault::new(Code::PoolNotFound, message));
        }
        if volume.content > 0 && !knows_snapshots(host) {
            return Err(too_old());
        }
    }
    Ok(())
}

/// Whether the host reported the pool.
pub(crate) fn has_pool(host: &Host, pool: &str) -> bool {
    let pools = host.spec.as_ref().map(|spec| spec.pools.as_slice());
    pools.unwrap_or_default().iter().any(|has| has == pool)
}
