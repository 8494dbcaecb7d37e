//! What a VM has beside memory and vCPUs, as it changes while the VM is there; and its power button.
//!
//! ```text
//!   attach ─► in the specification ─► the run's VMM has it (reported)
//!   detach ─► to be given up ──────► the run's VMM has it no more (reported) ─► out of the specification
//!               └── nothing runs ──────────────────────────────────────────────────┘
//! ```
//!
//! The specification says what a VM is to have, so that starts, migrations and restarts agree; a disk stays in it, and its volume
//! the VM's, until no VMM can have it any more, and so does a NIC with its addresses. That takes a report made after the VMM was told of the wish: each change has a
//! revision, the VMM refuses what is older than what it was told last, and a report says which that is. A run's end removes what was
//! to be given up as well: nothing has it then.

use std::collections::BTreeSet;

use drover_proto::v1::{
    AttachDisk, AttachNic, DetachDisk, DetachNic, Vm, VmDevice, VmDeviceState, VmDevices, VmDisk, VmNic,
    VmSpec, VmState,
};
use drover_proto::{Code, Fault};

use super::snapshots::{not_restored, not_taken};
use super::{Applied, Tx, bounded};
use crate::limits::{MAC_CHARS, NAME_BYTES_MAX, SLOTS_GIVEN_MAX, SLOTS_MAX};
use crate::networks;
use crate::placement::{self, Purpose};
use crate::state::{host_of, occupies, spec_of};
use crate::validate::{self, quoted};
use crate::volumes;

/// What may come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Disk,
    Nic,
}

/// The slots of all that a VM has, in the order in which those without a number are counted.
fn slots_mut(spec: &mut VmSpec) -> impl Iterator<Item = &mut u32> {
    let disks = spec.disks.iter_mut().map(|disk| &mut disk.slot);
    disks.chain(spec.nics.iter_mut().map(|nic| &mut nic.slot))
}

/// Writes down the slots that were counted so far, as they were, and returns the lowest that is free.
pub(super) fn fix_slots(spec: &mut VmSpec) -> Option<u32> {
    let mut taken: BTreeSet<u32> = slots_mut(spec).map(|slot| *slot).collect();
    for slot in slots_mut(spec).filter(|slot| **slot == 0) {
        *slot = (1..=SLOTS_GIVEN_MAX).find(|free| !taken.contains(free))?;
        taken.insert(*slot);
    }
    (1..=SLOTS_GIVEN_MAX).find(|free| !taken.contains(free))
}

/// The next revision of what a VM has, and the slot that something new in it gets.
fn one_more(spec: &mut VmSpec) -> Result<(u64, u32), Fault> {
    spec.devices_revision += 1;
    let Some(slot) = fix_slots(spec) else {
        let message = format!(
            "vm is {}, which has something in each of the {SLOTS_GIVEN_MAX} slots that there are for disks and NICs",
            spec.name
        );
        return Err(Fault::new(Code::InvalidArgument, message).field("vm"));
    };
    Ok((spec.devices_revision, slot))
}

/// Whether the VM is wanted without something that it still has, for a message.
fn still(detach_revision: u64) -> &'static str {
    if detach_revision > 0 {
        "; its guest was asked to give it up and has not yet"
    } else {
        ""
    }
}

/// The NIC that is meant: by its MAC, or by the network where there is one in it.
fn meant<'a>(vm: &'a Vm, asked: &str) -> Result<&'a VmNic, Fault> {
    let spec = spec_of(vm);
    let lacks = |what: String| {
        let message = format!("nic is {}; {} has no NIC {what}", quoted(asked), spec.name);
        Fault::new(Code::NicNotFound, message).field("nic")
    };
    if asked.contains(':') {
        let mac = networks::mac("nic", asked)?;
        let found = spec.nics.iter().find(|nic| nic.mac == mac);
        return found.ok_or_else(|| lacks("with this MAC".to_owned()));
    }
    let mut found = spec.nics.iter().filter(|nic| nic.network == asked);
    match (found.next(), found.next()) {
        (Some(nic), None) => Ok(nic),
        (None, _) => Err(lacks("in a network of this name".to_owned())),
        (Some(one), Some(other)) => {
            let message = format!(
                "nic is {asked}; {} has several NICs in this network, {} and {} among them: name one by its MAC",
                spec.name, one.mac, other.mac
            );
            Err(Fault::new(Code::InvalidArgument, message).field("nic"))
        }
    }
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
            let still = still(has.detach_revision);
            let message = format!("disk.volume is {}, which {name} has{still}", has.volume);
            return Err(Fault::new(Code::VolumeInUse, message).field("disk.volume"));
        }
        let mut spec = old.clone();
        let (revision, slot) = one_more(&mut spec)?;
        spec.disks.push(VmDisk {
            volume: asked.volume,
            read_only: asked.read_only,
            serial: asked.serial,
            slot,
            attach_revision: revision,
            detach_revision: 0,
        });
        validate::disks(&spec)?;
        let only = VmSpec {
            name: name.clone(),
            disks: spec.disks.last().cloned().into_iter().collect(),
            ..VmSpec::default()
        };
        volumes::may_have(self.state, &only)?;
        self.place_has(vm, &only, &spec, "disk.volume")?;
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

    pub(super) fn attach_nic(&mut self, attach: &AttachNic) -> Applied {
        let name = &attach.vm;
        self.changeable_vm(name)?;
        let asked = attach.nic.clone().unwrap_or_default();
        let vm = self.known_vm("vm", name)?;
        if occupies(vm) && vm.devices.as_ref().is_some_and(|devices| !devices.tells_nics) {
            let message = format!(
                "vm is {name}, whose host {} has an agent of a version that gives a running VM no NIC: upgrade it, or stop the VM",
                host_of(vm)
            );
            return Err(Fault::new(Code::ProtocolVersion, message).field("vm"));
        }
        let mut spec = spec_of(vm).clone();
        let (revision, slot) = one_more(&mut spec)?;
        let mut only = VmSpec {
            name: name.clone(),
            nics: vec![VmNic {
                network: asked.network,
                mac: asked.mac,
                ip: asked.ip,
                slot,
                attach_revision: revision,
                ..VmNic::default()
            }],
            ..VmSpec::default()
        };
        networks::check_nics(&mut only)?;
        spec.nics.append(&mut only.nics);
        // All of them: what the VM has itself is taken as well.
        networks::address(self.state, &mut spec)?;
        networks::check_nics(&mut spec)?;
        only.nics.extend(spec.nics.last().cloned());
        self.place_has(vm, &only, &spec, "nic.network")?;
        *self.spec_mut(name) = spec;
        let VmNic { network, mac, .. } = &only.nics[0];
        let message = format!("{} gives {name} the NIC {mac} in {network}", self.caller);
        self.vm_event("vm.attach", name, message);
        Ok(self.vm_response(name, true))
    }

    /// Whether the VM's host reaches what `only` adds, or, where nothing runs, any host all of `spec`.
    fn place_has(&self, vm: &Vm, only: &VmSpec, spec: &VmSpec, field: &str) -> Result<(), Fault> {
        let Some(host) = self.state.host(host_of(vm)).filter(|_| occupies(vm)) else {
            return placement::could_ever_fit(self.state, spec, Purpose::Start, |_| Ok(()));
        };
        let reaches = volumes::reaches(self.state, only, host);
        let reaches = reaches.and_then(|()| networks::reaches(self.state, only, host));
        reaches.map_err(|fault| {
            let message = format!("{} is on {}, which {}", spec.name, host_of(vm), fault.message);
            Fault::new(fault.code, message).field(field)
        })
    }

    pub(super) fn detach_nic(&mut self, detach: &DetachNic) -> Applied {
        let name = &detach.vm;
        self.changeable_vm(name)?;
        let VmNic { mac, network, .. } = meant(self.known_vm("vm", name)?, &detach.nic)?.clone();
        self.give_up(name, &format!("the NIC {mac} in {network}"), |spec, revision| {
            let nic = spec.nics.iter_mut().find(|nic| nic.mac == mac);
            nic.expect("it was just found").detach_revision = revision;
        });
        Ok(self.vm_response(name, true))
    }

    /// Wants the VM without what `mark` marks with a revision: the guest is asked, or it goes at once where nothing runs.
    fn give_up(&mut self, name: &str, what: &str, mark: impl Fn(&mut VmSpec, u64)) {
        let runs = occupies(self.vm_mut(name));
        let spec = self.spec_mut(name);
        fix_slots(spec);
        spec.devices_revision += 1;
        let revision = spec.devices_revision;
        mark(spec, revision);
        let message = format!("{} wants {name} to give {what} up", self.caller);
        self.vm_event("vm.detach", name, message);
        if !runs {
            self.drop_detached(name, |_, _| true);
        }
    }

    pub(super) fn detach_disk(&mut self, detach: &DetachDisk) -> Applied {
        let (name, volume) = (&detach.vm, &detach.volume);
        self.changeable_vm(name)?;
        let vm = self.known_vm("vm", name)?;
        if !spec_of(vm).disks.iter().any(|disk| disk.volume == *volume) {
            let message = format!("volume is {}, which {name} does not have", quoted(volume));
            return Err(Fault::new(Code::VolumeNotFound, message).field("volume"));
        }
        self.give_up(name, &format!("the volume {volume}"), |spec, revision| {
            let disk = spec.disks.iter_mut().find(|disk| disk.volume == *volume);
            disk.expect("it was just found").detach_revision = revision;
        });
        Ok(self.vm_response(name, true))
    }

    /// Takes what is to be given up, and is gone by its slot and the revision of the wish, out of the specification.
    pub(super) fn drop_detached(&mut self, name: &str, gone: impl Fn(Kind, (u32, u64)) -> bool) {
        let detached = |kind, slot, revision| revision > 0 && gone(kind, (slot, revision));
        let spec = self.vm_mut(name).spec.get_or_insert_default();
        let disks = spec
            .disks
            .extract_if(.., |disk| detached(Kind::Disk, disk.slot, disk.detach_revision));
        let disks = disks.map(|disk| format!("the volume {}", disk.volume));
        let nics = spec
            .nics
            .extract_if(.., |nic| detached(Kind::Nic, nic.slot, nic.detach_revision));
        let nics = nics.map(|nic| format!("the NIC {} in {}", nic.mac, nic.network));
        let dropped: Vec<String> = disks.chain(nics).collect();
        for what in dropped {
            self.vm_event("vm.detached", name, format!("{name} has {what} no more"));
        }
    }

    /// A run is over, or has moved on: what was known of its VMM is not known of the next.
    pub(super) fn forget_devices(&mut self, name: &str) {
        self.vm_mut(name).devices = None;
    }

    /// The agent has said what the run's VMM has.
    pub(super) fn note_devices(&mut self, name: &str, reported: &VmDevices) {
        let reported = within_bounds(reported);
        let has = |slot: u32| {
            let mut here = reported.devices.iter().filter(|device| device.slot == slot);
            here.any(|device| device.state() != VmDeviceState::Failed)
        };
        self.drop_detached(name, |kind, (slot, revision)| {
            // An agent of a version before it says nothing of NICs, and what it does not name may be there.
            let told = kind == Kind::Disk || reported.tells_nics;
            told && reported.revision >= revision && !has(slot)
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
        if device.mac.len() > MAC_CHARS {
            device.mac.clear();
        }
        device.reason = device.reason.as_ref().map(bounded);
    }
    reported
}
