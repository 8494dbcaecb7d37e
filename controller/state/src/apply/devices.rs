//! What a VM has beside memory and vCPUs, as it changes while the VM is there; and its power button.
//!
//! ```text
//!   attach ─► in the specification ─► the run's VMM has it (reported)
//!   detach ─► to be given up ──────► the run's VMM has it no more (reported) ─► out of the specification
//!               └── nothing runs ──────────────────────────────────────────────────┘
//! ```
//!
//! The specification says what a VM is to have, so that starts, migrations and restarts agree; a disk stays in it, and its volume
//! the VM's, until no VMM can have it any more. That takes a report made after the VMM was told of the wish: each change has a
//! revision, the VMM refuses what is older than what it was told last, and a report says which that is. A run's end removes what was
//! to be given up as well: nothing has it then.

use std::collections::BTreeSet;

use drover_proto::v1::{AttachDisk, DetachDisk, VmDevice, VmDeviceState, VmDevices, VmDisk, VmSpec, VmState};
use drover_proto::{Code, Fault};

use super::snapshots::{not_restored, not_taken};
use super::{Applied, Tx, bounded};
use crate::limits::{NAME_BYTES_MAX, SLOTS_MAX};
use crate::placement::{self, Purpose};
use crate::state::{host_of, occupies, spec_of};
use crate::validate::{self, quoted};
use crate::volumes;

/// The slots of all that a VM has, in the order in which those without a number are counted.
fn slots_mut(spec: &mut VmSpec) -> impl Iterator<Item = &mut u32> {
    let disks = spec.disks.iter_mut().map(|disk| &mut disk.slot);
    disks.chain(spec.nics.iter_mut().map(|nic| &mut nic.slot))
}

/// Writes down the slots that were counted so far, as they were, and returns the lowest that is free.
pub(super) fn fix_slots(spec: &mut VmSpec) -> Option<u32> {
    let mut taken: BTreeSet<u32> = slots_mut(spec).map(|slot| *slot).collect();
    for slot in slots_mut(spec).filter(|slot| **slot == 0) {
        *slot = (1..=SLOTS_MAX).find(|free| !taken.contains(free))?;
        taken.insert(*slot);
    }
    (1..=SLOTS_MAX).find(|free| !taken.contains(free))
}

impl Tx<'_> {
    /// The VM, if what it has can be changed now.
    fn changeable_vm(&mut self, name: &str) -> Result<(), Fault> {
        let vm = self.known_vm("vm", name)?;
        if vm.deleting {
            return Err(
                Fault::new(Code::VmState, format!("vm is {name}, which is being deleted")).field("vm"),
            );
        }
        if !vm.migration.is_empty() {
            let message = format!(
                "vm is {name}, which {} moves; what it has changes before or after that",
                vm.migration
            );
            return Err(Fault::new(Code::MigrationActive, message).field("vm"));
        }
        not_taken("vm", vm)?;
        not_restored("vm", vm)
    }

    fn spec_mut(&mut self, name: &str) -> &mut VmSpec {
        let now_ms = self.now_ms;
        let vm = self.vm_mut(name);
        vm.changed_ms = now_ms;
        vm.spec.get_or_insert_default()
    }

    pub(super) fn attach_disk(&mut self, attach: &AttachDisk) -> Applied {
        let name = &attach.vm;
        self.changeable_vm(name)?;
        let asked = attach.disk.clone().unwrap_or_default();
        let vm = self.known_vm("vm", name)?;
        let old = spec_of(vm);
        if let Some(has) = old.disks.iter().find(|disk| disk.volume == asked.volume) {
            let still = if has.detach_revision > 0 {
                "; its guest was asked to give it up and has not yet"
            } else {
                ""
            };
            let message = format!("disk.volume is {}, which {name} has{still}", has.volume);
            return Err(Fault::new(Code::VolumeInUse, message).field("disk.volume"));
        }
        let mut spec = old.clone();
        let revision = spec.devices_revision + 1;
        spec.devices_revision = revision;
        let slot = fix_slots(&mut spec);
        spec.disks.push(VmDisk {
            volume: asked.volume,
            read_only: asked.read_only,
            serial: asked.serial,
            slot: slot.unwrap_or(0),
            attach_revision: revision,
            detach_revision: 0,
        });
        validate::disks(&spec)?;
        if slot.is_none() {
            let message = format!("{name} has something in each of its {SLOTS_MAX} slots");
            return Err(Fault::new(Code::InvalidArgument, message).field("disk"));
        }
        let only = VmSpec {
            name: name.clone(),
            disks: spec.disks.last().cloned().into_iter().collect(),
            ..VmSpec::default()
        };
        volumes::may_have(self.state, &only)?;
        match self.state.host(host_of(vm)).filter(|_| occupies(vm)) {
            Some(host) => volumes::reaches(self.state, &only, host).map_err(|fault| {
                let message = format!("{name} is on {}, which {}", host_of(vm), fault.message);
                Fault::new(fault.code, message).field("disk.volume")
            })?,
            None => placement::could_ever_fit(self.state, &spec, Purpose::Start, |_| Ok(()))?,
        }
        let volume = only.disks[0].volume.clone();
        self.note_writer(&only);
        *self.spec_mut(name) = spec;
        let caller = self.caller;
        self.vm_event(
            "vm.attach",
            name,
            format!("{caller} gives {name} the volume {volume}"),
        );
        Ok(self.vm_response(name, true))
    }

    pub(super) fn detach_disk(&mut self, detach: &DetachDisk) -> Applied {
        let (name, volume) = (&detach.vm, &detach.volume);
        self.changeable_vm(name)?;
        let vm = self.known_vm("vm", name)?;
        if !spec_of(vm).disks.iter().any(|disk| disk.volume == *volume) {
            let message = format!("volume is {}, which {name} does not have", quoted(volume));
            return Err(Fault::new(Code::VolumeNotFound, message).field("volume"));
        }
        let runs = occupies(vm);
        let spec = self.spec_mut(name);
        fix_slots(spec);
        spec.devices_revision += 1;
        let revision = spec.devices_revision;
        if let Some(disk) = spec.disks.iter_mut().find(|disk| disk.volume == *volume) {
            disk.detach_revision = revision;
        }
        let caller = self.caller;
        self.vm_event(
            "vm.detach",
            name,
            format!("{caller} wants {name} to give the volume {volume} up"),
        );
        if !runs {
            self.drop_detached(name, |_| true);
        }
        Ok(self.vm_response(name, true))
    }

    /// Takes the disks that are to be given up and that nothing has any more out of the specification.
    pub(super) fn drop_detached(&mut self, name: &str, gone: impl Fn(&VmDisk) -> bool) {
        let detached = |disk: &VmDisk| disk.detach_revision > 0 && gone(disk);
        let spec = self.vm_mut(name).spec.get_or_insert_default();
        let dropped: Vec<VmDisk> = spec.disks.extract_if(.., |disk| detached(disk)).collect();
        for disk in dropped {
            let message = format!("{name} has the volume {} no more", disk.volume);
            self.vm_event("vm.detached", name, message);
        }
    }

    /// A run is over, or has moved on: what was known of its VMM is not known of the next.
    pub(super) fn forget_devices(&mut self, name: &str) {
        self.vm_mut(name).devices = None;
    }

    /// The agent has said what the run's VMM has.
    pub(super) fn note_devices(&mut self, name: &str, reported: &VmDevices) {
        let reported = within_bounds(reported);
        let has = |disk: &VmDisk| {
            reported
                .devices
                .iter()
                .any(|device| device.slot == disk.slot && device.state() != VmDeviceState::Failed)
        };
        self.drop_detached(name, |disk| {
            reported.revision >= disk.detach_revision && !has(disk)
        });
        let is_there = |device: &&VmDevice| device.state() == VmDeviceState::Attached;
        for device in reported.devices.iter().filter(is_there) {
            let has = |disk: &&VmDisk| disk.volume == device.volume;
            if spec_of(self.vm_mut(name)).disks.iter().any(|disk| has(&disk))
                && let Some(volume) = self.state.volumes.get_mut(&device.volume)
            {
                volume.used = true;
            }
        }
        self.vm_mut(name).devices = Some(reported);
    }

    pub(super) fn shutdown_vm(&mut self, name: &str) -> Applied {
        let vm = self.known_vm("name", name)?;
        if vm.deleting {
            return Err(Fault::new(Code::VmState, format!("{name} is being deleted")).field("name"));
        }
        if !occupies(vm) {
            return self.stop_vm(name);
        }
        if vm.state() != VmState::Stopping {
            let vm = self.vm_mut(name);
            vm.wanted_running = false;
            vm.shutdown += 1;
            let caller = self.caller;
            self.vm_event("vm.shutdown", name, format!("{caller} asks {name} to shut down"));
        }
        Ok(self.vm_response(name, true))
    }
}

/// What an agent reported, brought below its bounds.
fn within_bounds(reported: &VmDevices) -> VmDevices {
    let mut reported = reported.clone();
    let most = usize::try_from(SLOTS_MAX).expect("few slots");
    reported.devices.truncate(most);
    for device in &mut reported.devices {
        if device.volume.len() > NAME_BYTES_MAX {
            device.volume.clear();
        }
        device.reason = device.reason.as_ref().map(bounded);
    }
    reported
}
