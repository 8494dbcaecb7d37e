//! Snapshots: begun, ended, deleted, and VMs restored from them. The states and what a restore may touch: `crate::snapshots`.

use drover_proto::v1::{
    BeginRestoreRequest, CommandResponse, CreateSnapshot, DeleteSnapshot, Reason, Removal,
    ReportSnapshotRequest, Restore, RestoreVm, Snapshot, SnapshotNews, SnapshotPhase, Vm, VmDevice,
    VmDeviceState, VmNic, VmSpec, VmState, Volume,
};
use drover_proto::{Code, Fault};

use super::devices::fix_slots;
use super::volumes::first_writers;
use super::{Applied, Tx, bounded, reason, unfit};
use crate::cloud::{self, snapshot_without_secrets};
use crate::limits::{
    NAME_BYTES_MAX, POOL_DEFAULT, REMOVALS_MAX, SERIAL_BYTES_MAX, SNAPSHOTS_MAX, SNAPSHOTS_OF_VM_MAX,
    VOLUMES_MAX,
};
use crate::networks;
use crate::placement;
use crate::snapshots::{self, knows_snapshots, snapshot_number, spec_then};
use crate::state::{State, epoch_of, host_of, occupies, spec_of};
use crate::validate::{self, quoted};
use crate::volumes::{self, has_pool};

impl Tx<'_> {
    pub(super) fn create_snapshot(&mut self, create: &CreateSnapshot) -> Applied {
        let vm = self.known_vm("vm", &create.vm)?;
        let pool = may_be_taken(self.state, vm)?;
        let number = self.state.next_snapshot;
        let id = format!("s{number}");
        let name = self.free_name(create, &id)?;
        let vm = self.known_vm("vm", &create.vm)?;
        let mut spec = spec_of(vm).clone();
        fix_slots(&mut spec);
        for disk in &mut spec.disks {
            (disk.attach_revision, disk.detach_revision) = (0, 0);
        }
        for nic in &mut spec.nics {
            (nic.attach_revision, nic.detach_revision) = (0, 0);
        }
        cloud::room(self.state, &spec, "vm")?;
        let host = self.state.host(host_of(vm)).and_then(|host| host.spec.as_ref());
        let needs = vm.devices.as_ref().map(|devices| devices.device_model);
        let needs = needs.filter(|model| *model > 0);
        let volumes = spec.disks.iter();
        let volumes = volumes.filter_map(|disk| self.state.volume(&disk.volume).cloned());
        let mut snapshot = Snapshot {
            id: id.clone(),
            vm: create.vm.clone(),
            name: name.clone(),
            pool,
            volumes: volumes.collect(),
            host: host_of(vm).to_owned(),
            epoch: epoch_of(vm),
            created_ms: self.now_ms,
            changed_ms: self.now_ms,
            requested_by: self.caller.to_owned(),
            device_model: needs.unwrap_or_else(|| host.map_or(0, |host| host.device_model)),
            cpu_features: host
                .map(|host| placement::seen_there(&spec.cpu_profile, &host.cpu_features))
                .unwrap_or_default(),
            spec: Some(spec),
            seed: vm.seed.clone(),
            ..Snapshot::default()
        };
        snapshot.set_phase(SnapshotPhase::Creating);
        self.state.next_snapshot += 1;
        self.state.snapshots.insert(number, snapshot);
        self.vm_mut(&create.vm).snapshot.clone_from(&id);
        let message = format!("{name} of {}, asked for by {}", create.vm, self.caller);
        self.snapshot_event("creating", number, message);
        Ok(self.snapshot_response(number, true))
    }

    /// The name that the snapshot can have.
    fn free_name(&self, create: &CreateSnapshot, id: &str) -> Result<String, Fault> {
        let (state, vm) = (&*self.state, &create.vm);
        let of_vm = state.snapshots().filter(|snapshot| snapshot.vm == *vm).count();
        let full = [
            (of_vm, SNAPSHOTS_OF_VM_MAX, vm.as_str()),
            (state.snapshots.len(), SNAPSHOTS_MAX, "the cluster"),
        ];
        if let Some((_, max, whose)) = full.into_iter().find(|(has, max, _)| has >= max) {
            let message =
                format!("vm is {vm}; {whose} has {max} snapshots, which is all it takes: delete some");
            return Err(Fault::new(Code::InvalidArgument, message).field("vm"));
        }
        if create.name.is_empty() {
            return Ok(id.to_owned());
        }
        validate::name("name", &create.name)?;
        if snapshot_number(&create.name).is_some() {
            let message = format!(
                "name is {}; that is how the cluster numbers them: choose another",
                create.name
            );
            return Err(Fault::new(Code::InvalidArgument, message).field("name"));
        }
        if let Ok(other) = state.snapshot_of(vm, &create.name, "name") {
            let message = format!("name is {}; {} of {vm} has this name", create.name, other.id);
            return Err(Fault::new(Code::SnapshotExists, message).field("name"));
        }
        Ok(create.name.clone())
    }

    pub(super) fn delete_snapshot(&mut self, delete: &DeleteSnapshot) -> Applied {
        let snapshot = self.state.snapshot_of(&delete.vm, &delete.name, "name")?;
        let (number, id, was) = (number_of(snapshot), snapshot.id.clone(), snapshot.phase());
        if let Some(vm) = self.state.waits_for(&id) {
            let message = format!(
                "name is {}, from which {} is to be restored; it can go once that runs, or was stopped",
                delete.name,
                spec_of(vm).name
            );
            return Err(Fault::new(Code::SnapshotInUse, message).field("name"));
        }
        let cleared = snapshot.cleared;
        let message = format!(
            "{} of {} is deleted by {}",
            snapshot.name, snapshot.vm, self.caller
        );
        if was == SnapshotPhase::Creating {
            let vm = snapshot.vm.clone();
            self.taken_no_more(&vm, &id);
        }
        if was != SnapshotPhase::Deleting {
            self.set_phase(number, SnapshotPhase::Deleting, None);
            self.snapshot_event("deleting", number, message);
        }
        let response = self.snapshot_response(number, true);
        if was == SnapshotPhase::Failed && cleared {
            self.state.snapshots.remove(&number);
        }
        Ok(response)
    }

    pub(super) fn report_snapshot(&mut self, report: &ReportSnapshotRequest) -> Applied {
        if report.news() == SnapshotNews::Removed {
            return self.removed(report.removal.as_ref());
        }
        let Some(snapshot) = self.state.snapshot(&report.snapshot) else {
            return Ok(CommandResponse::default());
        };
        let (number, phase) = (number_of(snapshot), snapshot.phase());
        let of_run = snapshot.host == report.host && snapshot.epoch == report.epoch;
        if !of_run || phase != SnapshotPhase::Creating {
            let said = phase == SnapshotPhase::Ready && report.news() == SnapshotNews::Done;
            return Ok(self.snapshot_response(number, of_run && said));
        }
        let (vm, id, name) = (snapshot.vm.clone(), snapshot.id.clone(), snapshot.name.clone());
        match report.news() {
            SnapshotNews::Done => {
                // What the guest was told until its instant: more may have been asked for since the snapshot was.
                let told = self.state.vm(&vm).map_or(0, |vm| spec_of(vm).memory_revision);
                let snapshot = self.snapshot_mut(number);
                if let Some(spec) = &mut snapshot.spec {
                    spec.memory_revision = spec.memory_revision.max(told);
                }
                snapshot.bytes_total = report.progress.map_or(0, |progress| progress.bytes_total);
                snapshot.bytes_stored = report.bytes_stored;
                snapshot.paused_us = report.paused_us;
                self.taken_no_more(&vm, &id);
                self.set_phase(number, SnapshotPhase::Ready, None);
                let message = format!("{name} of {vm} is there, it paused {} us", report.paused_us);
                self.snapshot_event("ready", number, message);
            }
            SnapshotNews::Failed => {
                let unsaid = || reason(Code::SnapshotFailed, "its host gave no reason");
                let why = report.reason.as_ref().map_or_else(unsaid, bounded);
                self.end_failed(number, why);
            }
            other => {
                let message = format!(
                    "news is {}; DONE, FAILED and REMOVED go into the log",
                    other.as_str_name()
                );
                return Err(Fault::new(Code::InvalidArgument, message).field("news"));
            }
        }
        Ok(self.snapshot_response(number, true))
    }

    /// A host has removed something.
    fn removed(&mut self, removal: Option<&Removal>) -> Applied {
        let removal = removal.cloned().unwrap_or_default();
        let done = CommandResponse {
            current: true,
            ..CommandResponse::default()
        };
        if removal.snapshot.is_empty() {
            self.state.removals.remove(&(removal.volume, removal.content));
            return Ok(done);
        }
        let Some(snapshot) = self.state.snapshot(&removal.snapshot) else {
            return Ok(done);
        };
        let number = number_of(snapshot);
        match snapshot.phase() {
            SnapshotPhase::Failed => self.snapshot_mut(number).cleared = true,
            SnapshotPhase::Deleting => {
                let message = format!("{} of {} is gone", snapshot.name, snapshot.vm);
                self.snapshot_event("deleted", number, message);
                self.state.snapshots.remove(&number);
            }
            _ => {}
        }
        Ok(done)
    }

    /// The VM's run is over, or not to be counted on: so is the snapshot that is being taken of it.
    pub(super) fn fail_snapshot_of(&mut self, vm: &str, why: Reason) {
        let id = self.vm_mut(vm).snapshot.clone();
        if let Some(number) = snapshot_number(&id) {
            self.end_failed(number, why);
        }
    }

    fn end_failed(&mut self, number: u64, why: Reason) {
        let Some(snapshot) = self.state.snapshots.get(&number) else {
            return;
        };
        let (vm, id) = (snapshot.vm.clone(), snapshot.id.clone());
        let message = format!("{} of {vm} failed: {} [{}]", snapshot.name, why.message, why.code);
        self.taken_no_more(&vm, &id);
        self.set_phase(number, SnapshotPhase::Failed, Some(why));
        self.snapshot_event("failed", number, message);
    }

    fn taken_no_more(&mut self, vm: &str, id: &str) {
        if let Some(vm) = self.state.vms.get_mut(vm)
            && vm.snapshot == id
        {
            vm.snapshot.clear();
        }
    }

    pub(super) fn restore_vm(&mut self, asked: &RestoreVm) -> Applied {
        let snapshot = self
            .state
            .snapshot_of(&asked.vm, &asked.snapshot, "snapshot")?
            .clone();
        if snapshot.phase() != SnapshotPhase::Ready {
            let phase = phase_name(snapshot.phase());
            let message = format!(
                "snapshot is {}, which is {phase}; only one that is ready can be restored",
                snapshot.name
            );
            return Err(Fault::new(Code::SnapshotNotReady, message).field("snapshot"));
        }
        let clone = !asked.clone.is_empty();
        let name = if clone { &asked.clone } else { &asked.vm };
        let spec = if clone {
            self.spec_of_clone(name, &snapshot, asked.new_addresses)?
        } else if asked.new_addresses {
            let message =
                "new_addresses is true; only a new VM beside the first gets NICs of its own: name it";
            return Err(Fault::new(Code::InvalidArgument, message).field("new_addresses"));
        } else {
            self.spec_as_it_was(name, &snapshot)?
        };
        let number = self.state.next_snapshot;
        self.state.next_snapshot += 1;
        if clone {
            self.make_volumes(&spec, &snapshot, number);
            self.insert_vm(spec, true);
        } else {
            self.withdraw_restore(name);
            let vm = self.vm_mut(name);
            vm.spec = Some(spec);
            vm.wanted_running = true;
            (vm.restarts, vm.shutdown) = (0, 0);
            self.set_vm_state(name, VmState::Pending, None);
        }
        self.vm_mut(name).restore = Some(Restore {
            number,
            snapshot: snapshot.id.clone(),
            clone,
            ..Restore::default()
        });
        let message = format!(
            "{} wants {name} as {} of {}",
            self.caller, snapshot.name, snapshot.vm
        );
        self.vm_event("vm.restore", name, message);
        Ok(self.vm_response(name, true))
    }

    /// What the VM is when it is restored in place, if it can be.
    fn spec_as_it_was(&self, name: &str, snapshot: &Snapshot) -> Result<VmSpec, Fault> {
        let vm = self.known_vm("vm", name)?;
        if vm.deleting || !matches!(vm.state(), VmState::Stopped | VmState::Failed) {
            return Err(unfit(
                name,
                vm,
                "only one that is stopped can be restored: stop it first, or restore it as a new VM",
            ));
        }
        if vm.restore.as_ref().is_some_and(|restore| restore.clone) {
            not_restored("vm", vm)?;
        }
        let now = spec_of(vm);
        let mut spec = VmSpec {
            host: now.host.clone(),
            devices_revision: now.devices_revision + 1,
            // Higher than what the guest was told by then, so that it is told what it is to have.
            memory_revision: spec_then(snapshot).memory_revision.max(now.memory_revision) + 1,
            ..spec_then(snapshot).clone()
        };
        spec.set_restart(now.restart());
        for (disk, then) in spec.disks.iter().zip(&snapshot.volumes) {
            let Some(volume) = self.state.volume(&disk.volume) else {
                let message = format!(
                    "volume {} was deleted since: restore it as a new VM, which gets volumes of its own",
                    disk.volume
                );
                return Err(Fault::new(Code::VolumeNotFound, message).field("snapshot"));
            };
            if disk.read_only {
                unchanged(volume, then)?;
            } else if (volume.created_ms, &volume.pool) != (then.created_ms, &then.pool) {
                let message = format!(
                    "volume {} was deleted since and another made of its name, whose content would be lost: restore it as a new VM, which gets volumes of its own",
                    disk.volume
                );
                return Err(Fault::new(Code::VolumeChanged, message).field("snapshot"));
            }
        }
        self.could_be_restored(&mut spec, snapshot, &[])?;
        Ok(spec)
    }

    /// What a new VM beside the one that the snapshot is of is, if it can be.
    fn spec_of_clone(&self, name: &str, snapshot: &Snapshot, new_addresses: bool) -> Result<VmSpec, Fault> {
        self.may_be_named("clone", name)?;
        let mut spec = VmSpec {
            name: name.to_owned(),
            host: String::new(),
            memory_revision: spec_then(snapshot).memory_revision + 1,
            ..spec_then(snapshot).clone()
        };
        let mut pools = Vec::new();
        for (disk, then) in spec.disks.iter_mut().zip(&snapshot.volumes) {
            if disk.serial.is_empty() {
                // The guest knows it by this.
                disk.serial = disk.volume.chars().take(SERIAL_BYTES_MAX).collect();
            }
            if disk.read_only {
                let gone = || {
                    let message = format!(
                        "volume {}, which {} only reads, was deleted since",
                        disk.volume, snapshot.vm
                    );
                    Fault::new(Code::VolumeNotFound, message).field("snapshot")
                };
                unchanged(self.state.volume(&disk.volume).ok_or_else(gone)?, then)?;
                continue;
            }
            let volume = format!("{name}-{}", disk.volume);
            if volume.len() > NAME_BYTES_MAX {
                let message = format!(
                    "clone is {name}; its volume would be {volume}, and a name has {NAME_BYTES_MAX} characters at most: choose a shorter one"
                );
                return Err(Fault::new(Code::InvalidArgument, message).field("clone"));
            }
            if self.state.volume(&volume).is_some() {
                let message = format!(
                    "clone is {name}; its volume would be {volume}, which exists: choose another name"
                );
                return Err(Fault::new(Code::VolumeExists, message).field("clone"));
            }
            disk.volume = volume;
            pools.push(then.pool.clone());
        }
        if self.state.volumes.len() + pools.len() > VOLUMES_MAX {
            let message = format!("clone is {name}; the cluster takes {VOLUMES_MAX} volumes in all");
            return Err(Fault::new(Code::InvalidArgument, message).field("clone"));
        }
        if new_addresses {
            replace_nics(&mut spec)?;
        }
        cloud::room(self.state, &spec, "snapshot")?;
        self.could_be_restored(&mut spec, snapshot, &pools)?;
        Ok(spec)
    }

    /// Whether nobody else has what it needs, and any host could ever restore it. `pools`: of volumes that are still to be made.
    fn could_be_restored(
        &self,
        spec: &mut VmSpec,
        snapshot: &Snapshot,
        pools: &[String],
    ) -> Result<(), Fault> {
        let field = |fault: Fault| fault.field("snapshot");
        let there = VmSpec {
            name: spec.name.clone(),
            disks: spec
                .disks
                .iter()
                .filter(|disk| self.state.volume(&disk.volume).is_some())
                .cloned()
                .collect(),
            ..VmSpec::default()
        };
        volumes::may_have(self.state, &there).map_err(field)?;
        networks::address(self.state, spec).map_err(|fault| {
            let message = match fault.code {
                Code::AddressInUse => format!(
                    "{}. But a guest goes on with the addresses that it had",
                    fault.message
                ),
                _ => fault.message,
            };
            Fault::new(fault.code, message).field("snapshot")
        })?;
        placement::could_ever_fit(
            self.state,
            spec,
            snapshots::restoring(snapshot),
            |host| match pools.iter().find(|pool| !has_pool(host, pool)) {
                Some(pool) => Err(Fault::new(
                    Code::PoolNotFound,
                    format!("has no pool {}", quoted(pool)),
                )),
                None => Ok(()),
            },
        )
        .map_err(field)
    }

    fn make_volumes(&mut self, spec: &VmSpec, snapshot: &Snapshot, number: u64) {
        for (disk, then) in spec
            .disks
            .iter()
            .zip(&snapshot.volumes)
            .filter(|(disk, _)| !disk.read_only)
        {
            let volume = Volume {
                name: disk.volume.clone(),
                pool: then.pool.clone(),
                size_bytes: then.size_bytes,
                created_ms: self.now_ms,
                writers: first_writers(self.now_ms),
                content: number,
                ..Volume::default()
            };
            let message = format!("{} was created for {} by {}", volume.name, spec.name, self.caller);
            self.event("volume.created", format!("volume/{}", volume.name), message);
            self.state.volumes.insert(volume.name.clone(), volume);
        }
    }

    /// Once this is in the log the VM's volumes are the restored ones, and its VMM may run.
    pub(super) fn begin_restore(&mut self, begin: &BeginRestoreRequest) -> Applied {
        let name = &begin.vm;
        let Some(vm) = self.state.vm(name) else {
            return Ok(CommandResponse::default());
        };
        let of_run = epoch_of(vm) == begin.epoch && host_of(vm) == begin.host;
        let number = vm.restore.as_ref().map_or(0, |restore| restore.number);
        if !of_run || !occupies(vm) || number != begin.restore || number == 0 {
            let begun = of_run && occupies(vm) && begin.restore > 0 && vm.restored == begin.restore;
            return Ok(self.vm_response(name, begun));
        }
        // While its host is declared down nothing begins there.
        if vm.state() != VmState::Starting {
            return Ok(self.vm_response(name, false));
        }
        let disks = spec_of(vm).disks.clone();
        let run = vm.clone();
        for disk in disks.iter().filter(|disk| !disk.read_only) {
            let Some(mut volume) = snapshots::volume_of_run(self.state, &run, &disk.volume) else {
                continue;
            };
            volume.used = true;
            if let Some(before) = self.state.volumes.insert(disk.volume.clone(), volume)
                && before.content != number
            {
                self.remove_content(&before, before.content);
            }
        }
        let vm = self.vm_mut(name);
        (vm.restore, vm.restored) = (None, number);
        let message = format!("{name} begins as it was restored, and its volumes are what they were then");
        self.vm_event("vm.restored", name, message);
        Ok(self.vm_response(name, true))
    }

    /// The VM's next run is not to begin as a snapshot: what was made for that goes.
    pub(super) fn withdraw_restore(&mut self, name: &str) {
        let vm = self.vm_mut(name);
        let Some(restore) = vm.restore.take() else { return };
        let disks = spec_of(vm).disks.clone();
        for disk in disks.iter().filter(|disk| !disk.read_only) {
            let Some(volume) = self.state.volume(&disk.volume).cloned() else {
                continue;
            };
            self.remove_content(&volume, restore.number);
            if volume.content == restore.number {
                self.state.volumes.remove(&disk.volume);
                let message = format!("{} went with {name}, which never ran", disk.volume);
                self.event("volume.deleted", format!("volume/{}", disk.volume), message);
            }
        }
    }

    /// Has a content of the volume removed by whoever reaches it.
    pub(super) fn remove_content(&mut self, volume: &Volume, content: u64) {
        let removals = &mut self.state.removals;
        removals.insert((volume.name.clone(), content), volume.pool.clone());
        if removals.len() > REMOVALS_MAX {
            removals.pop_first();
        }
    }

    fn snapshot_mut(&mut self, number: u64) -> &mut Snapshot {
        self.state
            .snapshots
            .get_mut(&number)
            .expect("the snapshot was looked up in this command")
    }

    fn set_phase(&mut self, number: u64, phase: SnapshotPhase, why: Option<Reason>) {
        let now_ms = self.now_ms;
        let snapshot = self.snapshot_mut(number);
        snapshot.set_phase(phase);
        snapshot.reason = why;
        snapshot.changed_ms = now_ms;
    }

    fn snapshot_event(&mut self, what: &str, number: u64, message: String) {
        self.event(
            &format!("snapshot.{what}"),
            format!("snapshot/s{number}"),
            message,
        );
    }

    fn snapshot_response(&self, number: u64, current: bool) -> CommandResponse {
        CommandResponse {
            snapshot: self.state.snapshots.get(&number).map(snapshot_without_secrets),
            current,
            ..CommandResponse::default()
        }
    }
}

fn number_of(snapshot: &Snapshot) -> u64 {
    snapshot_number(&snapshot.id).expect("every snapshot is kept by its number")
}

fn phase_name(phase: SnapshotPhase) -> String {
    phase
        .as_str_name()
        .trim_start_matches("SNAPSHOT_PHASE_")
        .to_lowercase()
}

/// The pool that a snapshot of the VM goes to, if one can be taken now.
fn may_be_taken(state: &State, vm: &Vm) -> Result<String, Fault> {
    let spec = spec_of(vm);
    let name = &spec.name;
    let refused = |code, message: String| Err(Fault::new(code, message).field("vm"));
    if !vm.migration.is_empty() {
        let message = format!(
            "vm is {name}, which {} moves; take the snapshot before or after that",
            vm.migration
        );
        return refused(Code::MigrationActive, message);
    }
    not_taken("vm", vm)?;
    if vm.state() != VmState::Running || !vm.wanted_running || vm.deleting {
        return Err(unfit(name, vm, "only of one that runs a snapshot is taken"));
    }
    if let Some(what) = changing(vm) {
        let message = format!(
            "vm is {name}, which is about to get or to give up {what}; wait for that, or stop it and start it"
        );
        return refused(Code::DeviceBusy, message);
    }
    let writes = spec.disks.iter().find(|disk| !disk.read_only);
    let pool = writes
        .and_then(|disk| state.volume(&disk.volume))
        .map_or(POOL_DEFAULT, |volume| volume.pool.as_str());
    let host = host_of(vm);
    match state.host(host) {
        Some(host) if knows_snapshots(host) && has_pool(host, pool) => Ok(pool.to_owned()),
        Some(known) if knows_snapshots(known) => {
            let message = format!(
                "vm is {name} on {host}, which has no pool {}: a snapshot needs one",
                quoted(pool)
            );
            refused(Code::PoolNotFound, message)
        }
        _ => {
            let message = format!("vm is {name} on {host}, which {}", snapshots::too_old().message);
            refused(Code::SnapshotUnavailable, message)
        }
    }
}

/// Gives the VM that is to begin as a snapshot a NIC beside each that its guest remembers. Those lead nowhere, and the guest is to give them up.
fn replace_nics(spec: &mut VmSpec) -> Result<(), Fault> {
    if spec.nics.is_empty() {
        return Ok(());
    }
    spec.devices_revision += 1;
    let revision = spec.devices_revision;
    let fresh = |nic: &VmNic| VmNic {
        network: nic.network.clone(),
        attach_revision: revision,
        ..VmNic::default()
    };
    let fresh: Vec<VmNic> = spec.nics.iter().map(fresh).collect();
    for nic in &mut spec.nics {
        nic.ip.clear();
        (nic.unplugged, nic.detach_revision) = (true, revision);
    }
    spec.nics.extend(fresh);
    fix_slots(spec);
    if spec.nics.iter().all(|nic| nic.slot > 0) {
        return Ok(());
    }
    let message = format!(
        "clone is {}; beside all that it has there are not slots enough for NICs of its own",
        spec.name
    );
    Err(Fault::new(Code::InvalidArgument, message).field("clone"))
}

/// What the VM that runs was given, or is to give up, and its VMM has not told that it is so.
fn changing(vm: &Vm) -> Option<String> {
    let devices = vm.devices.as_ref().map_or(&[][..], |devices| &devices.devices);
    let has = |is_it: &dyn Fn(&VmDevice) -> bool| {
        let mut those = devices.iter().filter(|device| is_it(device));
        those.any(|device| device.state() == VmDeviceState::Attached)
    };
    let spec = spec_of(vm);
    let disk = spec.disks.iter().find(|disk| {
        let here = || has(&|device| device.volume == disk.volume);
        disk.detach_revision > 0 || disk.attach_revision > 0 && !here()
    });
    let nic = spec.nics.iter().find(|nic| {
        // A VMM of a version that changes no NICs names none, and one with a slot is where it was put.
        let here = || {
            has(&|device| {
                device.mac == nic.mac
                    || device.mac.is_empty() && device.volume.is_empty() && device.slot == nic.slot
            })
        };
        nic.detach_revision > 0 || nic.attach_revision > 0 && !here()
    });
    let disk = disk.map(|disk| format!("volume {}", disk.volume));
    disk.or_else(|| nic.map(|nic| format!("the NIC {} in {}", nic.mac, nic.network)))
}

/// Whether no snapshot is being taken of the VM.
pub(crate) fn not_taken(field: &str, vm: &Vm) -> Result<(), Fault> {
    if vm.snapshot.is_empty() {
        return Ok(());
    }
    let message = format!(
        "{field} is {}, of which snapshot {} is being taken; wait for that, or delete it",
        spec_of(vm).name,
        vm.snapshot
    );
    Err(Fault::new(Code::SnapshotActive, message).field(field))
}

/// Whether nothing restores the VM.
pub(super) fn not_restored(field: &str, vm: &Vm) -> Result<(), Fault> {
    let Some(restore) = &vm.restore else { return Ok(()) };
    let message = format!(
        "{field} is {}, which is to begin as snapshot {} and has not yet",
        spec_of(vm).name,
        restore.snapshot
    );
    Err(Fault::new(Code::RestoreActive, message).field(field))
}

/// Whether a volume that a snapshot's VM only read, which the snapshot therefore does not hold, is what it was.
fn unchanged(volume: &Volume, then: &Volume) -> Result<(), Fault> {
    let same = |volume: &Volume| {
        (
            volume.created_ms,
            volume.writers,
            volume.content,
            volume.size_bytes,
        )
    };
    if same(volume) == same(then) {
        return Ok(());
    }
    let message = format!(
        "volume {} was only read when the snapshot was taken, so that the snapshot does not hold it, and was written to or made anew since",
        volume.name
    );
    Err(Fault::new(Code::VolumeChanged, message).field("snapshot"))
}
