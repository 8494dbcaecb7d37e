//! What a host shall hold, and what may run on it. Both are read from the state alone.
//!
//! [`desired`] is the target of an agent's work: the VMMs that shall exist. [`grants`] is the right to execute, and the
//! narrower of the two: an incoming VMM is desired but never granted before its epoch is committed, a restored one not before it may begin. A VM that is being
//! stopped or that failed is in neither, so its VMM is destroyed; if nobody does that, its lease ends it. One that is
//! being stopped stays in `stopping` until its agent has reported it gone.

use std::collections::BTreeSet;

use drover_proto::v1::{
    CloudSeed, HostDesired, Migration, MigrationPhase, Network, Vm, VmDesired, VmRef, VmRole, VmSpec,
    VmState, Volume,
};
use prost::Message;

use crate::cloud;
use crate::snapshots;
use crate::state::{State, epoch_of, host_of, is_committed, is_ended, spec_of};

/// The VMMs that shall exist on the host, those whose end is awaited, by VM name, and their networks' peers. `revision` is a digest
/// of it: it changes exactly when that does, and is never 0.
pub fn desired(state: &State, host: &str) -> HostDesired {
    let mut vms = Vec::new();
    for (name, vm) in &state.vms {
        if host_of(vm) == host && has_run(vm) {
            vms.push(VmDesired {
                vm: name.clone(),
                epoch: epoch_of(vm),
                spec: Some(spec_without_cloud(vm)),
                seed: seed_of(vm),
                role: VmRole::Run.into(),
                migration: migration_of_run(state, vm).cloned(),
                arrived_by: arrived_by(vm).to_owned(),
                volumes: volumes_of(state, vm),
                networks: networks_of(state, vm),
                shutdown: vm.shutdown,
                snapshot: state.taken_of(vm).map(cloud::for_agents),
                restore: snapshots::told(state, vm),
            });
        }
        if let Some(migration) = incoming(state, vm, host) {
            vms.push(VmDesired {
                vm: name.clone(),
                epoch: migration.epoch,
                spec: Some(spec_without_cloud(vm)),
                seed: seed_of(vm),
                role: VmRole::Incoming.into(),
                migration: Some(migration.clone()),
                arrived_by: String::new(),
                volumes: volumes_of(state, vm),
                networks: networks_of(state, vm),
                ..VmDesired::default()
            });
        }
        if let Some(migration) = serving(state, vm, host) {
            vms.push(VmDesired {
                vm: name.clone(),
                epoch: migration.epoch.saturating_sub(1),
                spec: Some(spec_without_cloud(vm)),
                seed: seed_of(vm),
                role: VmRole::Serving.into(),
                migration: Some(migration.clone()),
                arrived_by: String::new(),
                volumes: volumes_of(state, vm),
                networks: networks_of(state, vm),
                ..VmDesired::default()
            });
        }
    }
    let is_stopping = |vm: &&Vm| host_of(vm) == host && vm.state() == VmState::Stopping;
    let stopping = state.vms.iter().filter(|(_, vm)| is_stopping(vm));
    let stopping = stopping
        .map(|(name, vm)| VmRef {
            vm: name.clone(),
            epoch: epoch_of(vm),
        })
        .collect();
    let specs = vms.iter().filter_map(|vm| vm.spec.as_ref());
    let networks: BTreeSet<&str> = specs
        .flat_map(|spec| spec.nics.iter().map(|nic| nic.network.as_str()))
        .collect();
    let mut desired = HostDesired {
        revision: 0,
        peers: state.network_peers(&networks, host),
        vms,
        stopping,
        removals: state.removals_of(host),
        fills: state.fills_of(host),
    };
    desired.revision = digest(&desired.encode_to_vec()).max(1);
    desired
}

/// Exactly the `(vm, epoch)` that may execute on the host.
pub fn grants(state: &State, host: &str) -> Vec<VmRef> {
    if !state.host_is_up(host) {
        return Vec::new();
    }
    // A run that is to begin as a snapshot has it may not before the log says so.
    let granted = |vm: &&Vm| host_of(vm) == host && has_run(vm) && vm.restore.is_none();
    state
        .vms
        .iter()
        .filter(|(_, vm)| granted(vm))
        .map(|(name, vm)| VmRef {
            vm: name.clone(),
            epoch: epoch_of(vm),
        })
        .collect()
}

/// Whether the placement's epoch is one to run: begun, and neither over nor being ended.
fn has_run(vm: &Vm) -> bool {
    matches!(
        vm.state(),
        VmState::Starting | VmState::Running | VmState::Paused | VmState::Unknown
    )
}

/// The specification, but for what its host is told as the files of the seed disk.
fn spec_without_cloud(vm: &Vm) -> VmSpec {
    VmSpec {
        cloud_init: None,
        ..spec_of(vm).clone()
    }
}

/// The files of the run's seed disk.
fn seed_of(vm: &Vm) -> Option<CloudSeed> {
    let cloud = spec_of(vm).cloud_init.as_ref()?;
    Some(CloudSeed {
        user_data: cloud.user_data.clone(),
        ..vm.seed.clone()?
    })
}

/// The volumes of the VM's disks, in their order.
fn volumes_of(state: &State, vm: &Vm) -> Vec<Volume> {
    let disks = &spec_of(vm).disks;
    disks
        .iter()
        .filter_map(|disk| snapshots::volume_of_run(state, vm, &disk.volume))
        .collect()
}

/// The networks of the VM's NICs, in their order.
fn networks_of(state: &State, vm: &Vm) -> Vec<Network> {
    let nics = &spec_of(vm).nics;
    nics.iter()
        .filter_map(|nic| state.network(&nic.network).cloned())
        .collect()
}

/// The migration that brought the placement's epoch, or nothing: then the VM booted for it.
fn arrived_by(vm: &Vm) -> &str {
    vm.placement
        .as_ref()
        .map_or("", |placement| placement.arrived_by.as_str())
}

/// The newest migration of this VM if the placement's epoch is its source's or the one it brought.
fn migration_of_run<'a>(state: &'a State, vm: &Vm) -> Option<&'a Migration> {
    let migration = state.migration(&vm.last_migration)?;
    let (host, epoch) = (host_of(vm), epoch_of(vm));
    let leaves = migration.from == host && migration.epoch == epoch + 1 && !is_committed(migration);
    let arrived = migration.to == host && migration.epoch == epoch && is_committed(migration);
    (leaves || arrived).then_some(migration)
}

/// The migration that is to bring the VM to the host, once its target shall exist.
pub(crate) fn incoming<'a>(state: &'a State, vm: &Vm, host: &str) -> Option<&'a Migration> {
    let migration = state.migration(&vm.migration)?;
    let prepared = migration.phase() >= MigrationPhase::Preparing;
    (migration.to == host && prepared && !is_committed(migration) && !is_ended(migration))
        .then_some(migration)
}

/// The migration whose source, on the host, still gives the target its pages.
pub(crate) fn serving<'a>(state: &'a State, vm: &Vm, host: &str) -> Option<&'a Migration> {
    let migration = state.migration(&vm.migration)?;
    (migration.from == host && migration.phase() == MigrationPhase::PostCopy).then_some(migration)
}

/// FNV-1a, 64 bits: a digest that is the same on every build, for telling apart, not for security.
pub(crate) fn digest(bytes: &[u8]) -> u64 {
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    bytes.iter().fold(OFFSET_BASIS, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(PRIME)
    })
}
