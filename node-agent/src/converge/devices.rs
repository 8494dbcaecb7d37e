//! What a run's VMM is to have beside memory and vCPUs, and does not: one step at a time. Pure.
//!
//! ```text
//!   the specification has, the VMM has not ──► attach        has it, smaller ──► grow
//!   is to be given up, or is in no specification ──► detach  ──► (the guest gives it up)
//!   less or more memory is wanted than the VMM was told ──► set it
//!   what the VMM has, changed ──► report
//! ```
//!
//! A volume is known by the folder that its file is in, not by the whole path: a pool may be mounted elsewhere by now, and no disk is to
//! be taken from its guest for that. While a migration of the run is under way the VMM takes no disk, so nothing of the kind is asked of it.

use std::collections::BTreeSet;
use std::path::Path;

use drover_proto::v1::{
    DetachDiskRequest, MigrationPhase, SetMemoryRequest, VmDesired, VmDevice, VmDeviceState, VmDevices,
    VmDisk, VmSpec, VmmDevice, VmmDeviceState, VmmDevices, VmmState,
};

use super::{Action, Alive, Observed, Seen};

const SLOTS_MAX: u32 = 31;

/// The specification's disks with their slots: as told, else counted as a VMM does.
pub fn with_slots(spec: &VmSpec) -> Vec<VmDisk> {
    let told = spec.disks.iter().map(|disk| disk.slot);
    let told: BTreeSet<u32> = told.chain(spec.nics.iter().map(|nic| nic.slot)).collect();
    let mut free = (1..=SLOTS_MAX).filter(|slot| !told.contains(slot));
    let slotted = |disk: &VmDisk| VmDisk {
        slot: if disk.slot == 0 {
            free.next().unwrap_or(0)
        } else {
            disk.slot
        },
        ..disk.clone()
    };
    spec.disks.iter().map(slotted).collect()
}

/// The volume whose file this is.
fn volume_of(device: &VmmDevice) -> &str {
    let folder = Path::new(&device.path).parent().and_then(Path::file_name);
    folder.and_then(|name| name.to_str()).unwrap_or_default()
}

fn report(seen: &Seen, has: &VmmDevices, wanted: &[VmDisk]) -> VmDevices {
    let disks = has.devices.iter().filter(|device| device.kind == "disk");
    let mut devices: Vec<VmDevice> = disks
        .map(|device| VmDevice {
            slot: device.slot,
            volume: volume_of(device).to_owned(),
            state: match device.state() {
                VmmDeviceState::Attached => VmDeviceState::Attached,
                _ => VmDeviceState::Ejecting,
            }
            .into(),
            size_bytes: device.size_bytes,
            reason: seen.attaching.failed.get(volume_of(device)).cloned(),
        })
        .collect();
    let lacks = |disk: &&VmDisk| !has.devices.iter().any(|device| device.slot == disk.slot);
    for disk in wanted.iter().filter(lacks) {
        if let Some(reason) = seen.attaching.failed.get(&disk.volume) {
            devices.push(VmDevice {
                slot: disk.slot,
                volume: disk.volume.clone(),
                state: VmDeviceState::Failed.into(),
                size_bytes: 0,
                reason: Some(reason.clone()),
            });
        }
    }
    devices.sort_by_key(|device| device.slot);
    VmDevices {
        devices,
        revision: has.revision,
        heeds_slots: has.heeds_slots,
        heeds_button: has.heeds_button,
        device_model: has.device_model,
        pressed: has.pressed,
        memory: has.memory,
    }
}

/// How much memory the VM's guest is to have: the VMM keeps the newest that it was told, also over a migration.
fn memory(has: &VmmDevices, spec: &VmSpec) -> Option<SetMemoryRequest> {
    let told = has.memory?.revision;
    (told < spec.memory_revision).then(|| SetMemoryRequest {
        revision: spec.memory_revision,
        target_mib: target_mib(spec),
    })
}

/// MiB of its memory that the VM's guest is to have.
pub fn target_mib(spec: &VmSpec) -> u64 {
    match spec.memory_target_mib {
        0 => spec.memory_mib,
        target => target.min(spec.memory_mib),
    }
}

fn detach(seen: &Seen, revision: u64, volume: &str, device: &VmmDevice) -> Action {
    Action::Detach {
        key: seen.key.clone(),
        volume: volume.to_owned(),
        request: DetachDiskRequest {
            revision,
            slot: device.slot,
            path: device.path.clone(),
        },
    }
}

/// The next step, if there is one.
pub fn next(observed: &Observed, seen: &Seen, alive: &Alive, wanted: &VmDesired) -> Option<Action> {
    let has = alive.devices.as_ref()?;
    let spec = wanted.spec.as_ref()?;
    if alive.state != VmmState::Running || !seen.had_right {
        return None;
    }
    let key = seen.key.clone();
    if wanted.shutdown > has.pressed {
        let request = wanted.shutdown;
        return Some(Action::Press { key, request });
    }
    if let Some(request) = memory(has, spec) {
        return Some(Action::SetMemory { key, request });
    }
    let disks = with_slots(spec);
    let devices = report(seen, has, &disks);
    if seen.attaching.reported.as_ref() != Some(&devices) {
        return Some(Action::ReportDevices { key, devices });
    }
    let leaves = wanted.migration.as_ref().is_some_and(|migration| {
        let ended = matches!(migration.phase(), MigrationPhase::Aborted | MigrationPhase::Done);
        migration.from == observed.host && migration.epoch == wanted.epoch + 1 && !ended
    });
    if leaves || alive.outgoing.is_some() {
        return None;
    }
    let revision = spec.devices_revision;
    let stays = |device: &&VmmDevice| device.state() == VmmDeviceState::Attached;
    let in_slot = |slot: u32| has.devices.iter().find(|device| device.slot == slot);
    // Whoever is in a slot that is another's, or nobody's, goes first.
    let is_wanted = |device: &&VmmDevice| {
        let mut here = disks.iter().filter(|disk| disk.slot == device.slot);
        here.any(|disk| disk.volume == volume_of(device))
    };
    let strangers = has.devices.iter().filter(|device| device.kind == "disk");
    if let Some(stranger) = strangers.filter(stays).find(|device| !is_wanted(device)) {
        return Some(detach(seen, revision, volume_of(stranger), stranger));
    }
    // What failed waits for the others, so that it holds up none of them.
    let mut turns: Vec<&VmDisk> = disks.iter().collect();
    turns.sort_by_key(|disk| {
        let failed = seen.attaching.failed.contains_key(&disk.volume);
        (disk.detach_revision == 0, failed)
    });
    turns.into_iter().find_map(|disk| {
        let volume = wanted.volumes.iter().find(|volume| volume.name == disk.volume)?;
        match in_slot(disk.slot) {
            here if disk.detach_revision > 0 => {
                let told = has.revision >= disk.detach_revision;
                let attached = here.filter(stays);
                let nobody = VmmDevice {
                    slot: disk.slot,
                    ..VmmDevice::default()
                };
                // Also where nothing is there: what was sent to attach it must not come after this.
                (!told || attached.is_some())
                    .then(|| detach(seen, revision, &disk.volume, here.unwrap_or(&nobody)))
            }
            None => Some(Action::Attach {
                key: key.clone(),
                revision,
                disk: disk.clone(),
                volume: volume.clone(),
            }),
            Some(device) if stays(&device) && device.size_bytes < volume.size_bytes => Some(Action::Resize {
                key: key.clone(),
                slot: disk.slot,
                volume: volume.clone(),
                path: device.path.clone(),
            }),
            Some(_) => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use drover_proto::v1::{Migration, Reason, VmMemory, Volume};

    use super::*;
    use crate::converge::{Attaching, Life};
    use crate::key::Key;

    const MIB: u64 = 1 << 20;

    fn disk(volume: &str, slot: u32) -> VmDisk {
        VmDisk {
            volume: volume.into(),
            slot,
            ..VmDisk::default()
        }
    }

    fn device(volume: &str, slot: u32, state: VmmDeviceState) -> VmmDevice {
        VmmDevice {
            slot,
            kind: "disk".into(),
            path: format!("/pool/{volume}/data.raw"),
            size_bytes: MIB,
            state: state.into(),
            ..VmmDevice::default()
        }
    }

    /// What is next, all that is so having been reported.
    fn step(
        disks: &[VmDisk],
        revision: u64,
        has: VmmDevices,
        change: impl Fn(&mut VmDesired),
    ) -> Option<Action> {
        step_after(&[], disks, revision, has, change)
    }

    /// As `step`, where these volumes could not be attached before.
    fn step_after(
        failed: &[&str],
        disks: &[VmDisk],
        revision: u64,
        has: VmmDevices,
        change: impl Fn(&mut VmDesired),
    ) -> Option<Action> {
        let volume = |disk: &VmDisk| Volume {
            name: disk.volume.clone(),
            size_bytes: MIB,
            ..Volume::default()
        };
        let mut wanted = VmDesired {
            epoch: 3,
            spec: Some(VmSpec {
                disks: disks.to_vec(),
                devices_revision: revision,
                ..VmSpec::default()
            }),
            volumes: disks.iter().map(volume).collect(),
            ..VmDesired::default()
        };
        change(&mut wanted);
        let alive = Alive {
            state: VmmState::Running,
            reason: None,
            outgoing: None,
            devices: Some(has.clone()),
            snapshot: None,
        };
        let mut seen = Seen {
            key: Key::start("vm1", 3),
            life: Life::Alive(alive.clone()),
            had_right: true,
            commit_refused: false,
            outgoing_taken: None,
            switch_taken: None,
            commit_taken: false,
            end_reported: false,
            snapshot_taken: None,
            snapshot_told: None,
            attaching: Attaching {
                failed: failed
                    .iter()
                    .map(|volume| ((*volume).to_owned(), Reason::default()))
                    .collect(),
                reported: None,
            },
        };
        let observed = Observed {
            host: "host1".into(),
            ..Observed::default()
        };
        let first = next(&observed, &seen, &alive, &wanted);
        if let Some(Action::ReportDevices { devices, .. }) = &first {
            seen.attaching.reported = Some(devices.clone());
            return next(&observed, &seen, &alive, &wanted);
        }
        first
    }

    fn has(revision: u64, devices: &[VmmDevice]) -> VmmDevices {
        VmmDevices {
            devices: devices.to_vec(),
            revision,
            ..VmmDevices::default()
        }
    }

    fn untouched(_: &mut VmDesired) {}

    /// It is being moved away.
    fn moving(wanted: &mut VmDesired) {
        let mut migration = Migration {
            from: "host1".into(),
            epoch: 4,
            ..Migration::default()
        };
        migration.set_phase(MigrationPhase::PreCopy);
        wanted.migration = Some(migration);
    }

    #[test]
    fn what_could_not_be_attached_holds_up_no_other() {
        let mut disks = [disk("a", 1), disk("b", 2), disk("c", 3)];
        let next =
            |disks: &[VmDisk], failed: &[&str]| match step_after(failed, disks, 9, has(8, &[]), untouched) {
                Some(Action::Attach { disk, .. }) => format!("attach {}", disk.volume),
                Some(Action::Detach { volume, .. }) => format!("detach {volume}"),
                other => format!("{other:?}"),
            };
        assert_eq!(next(&disks, &[]), "attach a");
        assert_eq!(next(&disks, &["a"]), "attach b");
        assert_eq!(next(&disks, &["a", "b", "c"]), "attach a");
        disks[1].detach_revision = 9;
        assert_eq!(next(&disks, &["a", "b"]), "detach b");
    }

    #[test]
    fn what_is_missing_is_attached_and_what_is_there_is_left_alone() {
        use VmmDeviceState::{Attached, Ejecting};
        let disks = [disk("a", 1), disk("b", 5)];
        let attached = step(&disks, 7, has(0, &[device("a", 1, Attached)]), untouched);
        assert!(
            matches!(&attached, Some(Action::Attach { revision: 7, disk, .. }) if disk.slot == 5),
            "{attached:?}"
        );
        let both = [device("a", 1, Attached), device("b", 5, Attached)];
        assert_eq!(step(&disks, 7, has(7, &both), untouched), None);
        // Its slot is another's until that has been given up, and no disk that is still wanted is taken away.
        let taken = [device("a", 1, Attached), device("c", 5, Attached)];
        let detached = step(&disks, 7, has(6, &taken), untouched);
        assert!(matches!(&detached, Some(Action::Detach { request, .. }) if request.slot == 5));
        let leaving = [device("a", 1, Attached), device("c", 5, Ejecting)];
        assert_eq!(step(&disks, 7, has(7, &leaving), untouched), None);
        let counted = [disk("a", 0), disk("b", 0)];
        assert_eq!(
            step(
                &counted,
                0,
                has(0, &[device("a", 1, Attached), device("b", 2, Attached)]),
                untouched
            ),
            None
        );
    }

    #[test]
    fn a_wish_is_told_even_where_nothing_is_there_so_that_nothing_comes_after_it() {
        use VmmDeviceState::{Attached, Ejecting};
        let wish = VmDisk {
            detach_revision: 8,
            ..disk("a", 1)
        };
        let wish = [wish];
        for (has, told) in [
            (has(7, &[]), true),
            (has(8, &[]), false),
            (has(7, &[device("a", 1, Attached)]), true),
            (has(7, &[device("a", 1, Ejecting)]), true),
            (has(8, &[device("a", 1, Ejecting)]), false),
        ] {
            let next = step(&wish, 8, has.clone(), untouched);
            let detaches = matches!(&next, Some(Action::Detach { request, .. }) if request.revision == 8);
            assert_eq!((detaches, next.is_some()), (told, told), "{has:?}");
        }
    }

    #[test]
    fn a_run_that_is_moved_is_given_nothing_and_its_button_is_pressed_once() {
        assert_eq!(step(&[disk("a", 1)], 1, has(0, &[]), moving), None);
        let asked = |wanted: &mut VmDesired| wanted.shutdown = 2;
        let pressed = |pressed| VmmDevices {
            pressed,
            ..VmmDevices::default()
        };
        assert!(matches!(
            step(&[], 0, pressed(1), asked),
            Some(Action::Press { request: 2, .. })
        ));
        assert_eq!(step(&[], 0, pressed(2), asked), None);
    }

    #[test]
    fn what_memory_the_guest_is_to_have_is_told_once_for_each_revision_also_of_a_run_that_is_moved() {
        let told = |revision| VmmDevices {
            memory: Some(VmMemory {
                revision,
                ..VmMemory::default()
            }),
            ..VmmDevices::default()
        };
        let wanted = |target: u64, is_moved: bool| {
            move |wanted: &mut VmDesired| {
                let spec = wanted.spec.get_or_insert_default();
                (spec.memory_mib, spec.memory_target_mib, spec.memory_revision) = (64, target, 3);
                if is_moved {
                    moving(wanted);
                }
            }
        };
        for (target, is_moved, want) in [(32, false, 32), (0, true, 64)] {
            match step(&[], 0, told(2), wanted(target, is_moved)) {
                Some(Action::SetMemory { request, .. }) => {
                    assert_eq!((request.revision, request.target_mib), (3, want));
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(step(&[], 0, told(3), wanted(target, is_moved)), None);
        }
        assert_eq!(
            step(&[], 0, has(0, &[]), wanted(32, false)),
            None,
            "a VMM without a balloon, of a version before it"
        );
    }

    #[test]
    fn a_grown_volume_grows_its_disk_and_a_failure_is_reported() {
        let grown = |wanted: &mut VmDesired| wanted.volumes[0].size_bytes = 2 * MIB;
        let there = has(0, &[device("a", 1, VmmDeviceState::Attached)]);
        assert!(matches!(
            step(&[disk("a", 1)], 0, there, grown),
            Some(Action::Resize { slot: 1, .. })
        ));
        let mut attaching = Attaching::default();
        attaching.failed.insert("a".into(), Reason::default());
        let seen = Seen {
            key: Key::start("vm1", 3),
            life: Life::Silent,
            had_right: true,
            commit_refused: false,
            outgoing_taken: None,
            switch_taken: None,
            commit_taken: false,
            end_reported: false,
            snapshot_taken: None,
            snapshot_told: None,
            attaching,
        };
        let reported = report(&seen, &VmmDevices::default(), &[disk("a", 4)]);
        assert_eq!(
            (reported.devices[0].slot, reported.devices[0].state()),
            (4, VmDeviceState::Failed)
        );
    }
}
