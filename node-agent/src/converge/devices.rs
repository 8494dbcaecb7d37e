//! What a run's VMM is to have beside memory and vCPUs, and does not: one step at a time. Pure.
//!
//! ```text
//!   the specification has, the VMM has not ──► attach        has it, smaller ──► grow
//!   is to be given up, or is in no specification ──► detach  ──► (the guest gives it up)
//!   less or more memory is wanted than the VMM was told ──► set it
//!   a NIC's TAP is kept, the NIC is neither wanted nor there ──► release
//!   what the VMM has, changed ──► report
//! ```
//!
//! A volume is known by the folder that its file is in, not by the whole path: a pool may be mounted elsewhere by now, and no disk is to
//! be taken from its guest for that. A NIC is known by its MAC, and its TAP by its name. While a migration of the run is under way the
//! VMM takes no disk and no NIC, so nothing of the kind is asked of it.
//!
//! A TAP outlives its NIC in the VMM: it goes when the VMM says that it has the NIC no more, and was told of the wish, so that no call
//! on its way can want it again.

use std::collections::BTreeSet;
use std::path::Path;

use drover_proto::Code;
use drover_proto::v1::{
    DetachDiskRequest, DetachNicRequest, MigrationPhase, Network, Reason, SetMemoryRequest, VmDesired,
    VmDevice, VmDeviceState, VmDevices, VmDisk, VmNic, VmSpec, VmmDevice, VmmDeviceState, VmmDevices,
    VmmState, Volume,
};

use super::{Action, Alive, Detach, Observed, Piece, Seen, reason};
use crate::host::seed::{SEED_FILE, SEED_SLOT};

const SLOTS_MAX: u32 = 31;
const DISK: &str = "disk";
const NIC: &str = "nic";

/// The specification with a slot for each disk and NIC: as told, else counted as a VMM does.
pub fn with_slots(spec: &VmSpec) -> VmSpec {
    let mut spec = spec.clone();
    let disks = spec.disks.iter_mut().map(|disk| &mut disk.slot);
    let slots: Vec<&mut u32> = disks
        .chain(spec.nics.iter_mut().map(|nic| &mut nic.slot))
        .collect();
    let told: BTreeSet<u32> = slots.iter().map(|slot| **slot).collect();
    let mut free = (1..=SLOTS_MAX).filter(|slot| !told.contains(slot));
    for slot in slots.into_iter().filter(|slot| **slot == 0) {
        *slot = free.next().unwrap_or(0);
    }
    spec
}

/// One thing of the specification.
struct Wanted<'a> {
    slot: u32,
    detach_revision: u64,
    what: What<'a>,
}

#[derive(Clone, Copy)]
enum What<'a> {
    Disk(&'a VmDisk, Option<&'a Volume>),
    Nic(&'a VmNic, Option<&'a Network>),
}

impl<'a> Wanted<'a> {
    fn disk(disk: &'a VmDisk, volumes: &'a [Volume]) -> Self {
        let volume = volumes.iter().find(|volume| volume.name == disk.volume);
        Self {
            slot: disk.slot,
            detach_revision: disk.detach_revision,
            what: What::Disk(disk, volume),
        }
    }

    fn nic(nic: &'a VmNic, networks: &'a [Network]) -> Self {
        let network = networks.iter().find(|network| network.name == nic.network);
        Self {
            slot: nic.slot,
            detach_revision: nic.detach_revision,
            what: What::Nic(nic, network),
        }
    }

    fn name(&self) -> &'a str {
        match self.what {
            What::Disk(disk, _) => &disk.volume,
            What::Nic(nic, _) => &nic.mac,
        }
    }

    fn kind(&self) -> &'static str {
        match self.what {
            What::Disk(..) => DISK,
            What::Nic(..) => NIC,
        }
    }

    fn is(&self, device: &VmmDevice) -> bool {
        device.slot == self.slot && device.kind == self.kind() && name_of(device) == self.name()
    }

    /// With what it is made of, unless the controllers did not say.
    fn piece(&self) -> Option<Piece> {
        Some(match self.what {
            What::Disk(disk, volume) => Piece::Disk(disk.clone(), volume?.clone()),
            What::Nic(nic, network) => Piece::Nic(nic.clone(), network?.clone()),
        })
    }

    /// As a VMM would have it, where it has nothing.
    fn nobody(&self) -> VmmDevice {
        VmmDevice {
            slot: self.slot,
            kind: self.kind().to_owned(),
            mac: match self.what {
                What::Disk(..) => String::new(),
                What::Nic(nic, _) => nic.mac.clone(),
            },
            ..VmmDevice::default()
        }
    }

    /// Why it is not attached, as far as it is known.
    fn failed(&self, seen: &Seen, has: &VmmDevices) -> Option<Reason> {
        if self.kind() == NIC && !has.changes_nics {
            let message = "the VMM that runs it is of a version that takes no NIC while it runs: upgrade it";
            return Some(reason(Code::ProtocolVersion, message));
        }
        seen.attaching.failed.get(self.name()).cloned()
    }
}

/// The volume whose file this is, or the MAC.
fn name_of(device: &VmmDevice) -> &str {
    if device.kind == NIC {
        return &device.mac;
    }
    let folder = Path::new(&device.path).parent().and_then(Path::file_name);
    folder.and_then(|name| name.to_str()).unwrap_or_default()
}

fn report(seen: &Seen, has: &VmmDevices, wanted: &[Wanted<'_>]) -> VmDevices {
    let told = has
        .devices
        .iter()
        .filter(|device| [DISK, NIC].contains(&device.kind.as_str()) && !is_seed(device));
    let mut devices: Vec<VmDevice> = told
        .map(|device| VmDevice {
            slot: device.slot,
            volume: if device.kind == DISK { name_of(device) } else { "" }.to_owned(),
            mac: device.mac.clone(),
            state: match device.state() {
                VmmDeviceState::Attached => VmDeviceState::Attached,
                _ => VmDeviceState::Ejecting,
            }
            .into(),
            size_bytes: device.size_bytes,
            reason: seen.attaching.failed.get(name_of(device)).cloned(),
        })
        .collect();
    let lacks = |wanted: &&Wanted<'_>| !has.devices.iter().any(|device| device.slot == wanted.slot);
    for wanted in wanted.iter().filter(lacks) {
        if let Some(reason) = wanted.failed(seen, has) {
            let nobody = wanted.nobody();
            devices.push(VmDevice {
                slot: wanted.slot,
                volume: if wanted.kind() == DISK { wanted.name() } else { "" }.to_owned(),
                mac: nobody.mac,
                state: VmDeviceState::Failed.into(),
                size_bytes: 0,
                reason: Some(reason),
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
        tells_nics: true,
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

fn detach(seen: &Seen, revision: u64, name: &str, device: &VmmDevice) -> Action {
    let slot = device.slot;
    Action::Detach {
        key: seen.key.clone(),
        name: name.to_owned(),
        request: if device.kind == NIC {
            let mac = device.mac.clone();
            Detach::Nic(DetachNicRequest { revision, slot, mac })
        } else {
            let path = device.path.clone();
            Detach::Disk(DetachDiskRequest { revision, slot, path })
        },
    }
}

/// Whether it is the run's seed disk, which comes and goes with the VMM.
fn is_seed(device: &VmmDevice) -> bool {
    device.slot == SEED_SLOT
        && Path::new(&device.path)
            .file_name()
            .is_some_and(|name| name == SEED_FILE)
}

/// Whether the VMM can be given and asked for what is of this kind.
fn changes(has: &VmmDevices, kind: &str) -> bool {
    kind == DISK || kind == NIC && has.changes_nics
}

/// The next step, if there is one.
pub fn next(observed: &Observed, seen: &Seen, alive: &Alive, wanted: &VmDesired) -> Option<Action> {
    let has = alive.devices.as_ref()?;
    let spec = with_slots(wanted.spec.as_ref()?);
    if alive.state != VmmState::Running || !seen.had_right {
        return None;
    }
    let key = seen.key.clone();
    if wanted.shutdown > has.pressed {
        let request = wanted.shutdown;
        return Some(Action::Press { key, request });
    }
    if let Some(request) = memory(has, &spec) {
        return Some(Action::SetMemory { key, request });
    }
    let disks = spec.disks.iter().map(|disk| Wanted::disk(disk, &wanted.volumes));
    let nics = spec.nics.iter().map(|nic| Wanted::nic(nic, &wanted.networks));
    let all: Vec<Wanted<'_>> = disks.chain(nics).collect();
    let devices = report(seen, has, &all);
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
    // Whoever is in a slot that is another's, or nobody's, goes first.
    let stranger = has.devices.iter().find(|device| {
        let known = all.iter().any(|wanted| wanted.is(device));
        stays(device) && !known && changes(has, &device.kind) && !is_seed(device)
    });
    if let Some(stranger) = stranger {
        return Some(detach(seen, revision, name_of(stranger), stranger));
    }
    if let Some(release) = release(seen, has, &spec) {
        return Some(release);
    }
    // What failed waits for the others, so that it holds up none of them.
    let mut turns: Vec<&Wanted<'_>> = all.iter().filter(|wanted| changes(has, wanted.kind())).collect();
    turns.sort_by_key(|wanted| {
        let failed = seen.attaching.failed.contains_key(wanted.name());
        (wanted.detach_revision == 0, failed)
    });
    turns
        .into_iter()
        .find_map(|wanted| turn(seen, has, revision, wanted))
}

fn stays(device: &VmmDevice) -> bool {
    device.state() == VmmDeviceState::Attached
}

/// What is to be done about one thing that is in its own slot, or nowhere.
fn turn(seen: &Seen, has: &VmmDevices, revision: u64, wanted: &Wanted<'_>) -> Option<Action> {
    let here = has.devices.iter().find(|device| device.slot == wanted.slot);
    let key = seen.key.clone();
    if wanted.detach_revision > 0 {
        let told = has.revision >= wanted.detach_revision;
        let attached = here.is_some_and(stays);
        let nobody = wanted.nobody();
        // Also where nothing is there: what was sent to attach it must not come after this.
        return (!told || attached).then(|| detach(seen, revision, wanted.name(), here.unwrap_or(&nobody)));
    }
    if seen.attaching.resting.contains(wanted.name()) {
        return None;
    }
    match (here, wanted.what) {
        (None, _) => Some(Action::Attach {
            key,
            revision,
            piece: wanted.piece()?,
        }),
        (Some(device), What::Disk(_, Some(volume)))
            if stays(device) && device.size_bytes < volume.size_bytes =>
        {
            Some(Action::Resize {
                key,
                slot: wanted.slot,
                volume: volume.clone(),
                path: device.path.clone(),
            })
        }
        (Some(_), _) => None,
    }
}

/// A TAP that is kept for nothing: its NIC is wanted no more, and the VMM does not have it and will not be given it.
fn release(seen: &Seen, has: &VmmDevices, spec: &VmSpec) -> Option<Action> {
    let key = seen.key.clone();
    let mut idle = seen.nics.iter().filter(|held| {
        let there = has.devices.iter().any(|device| device.tap == held.tap);
        changes(has, NIC) && !there
    });
    idle.find_map(|held| {
        let mac = held.mac_text();
        let of_spec = spec
            .nics
            .iter()
            .find(|nic| nic.mac == mac && nic.attach_revision == held.revision);
        match of_spec {
            Some(nic) if nic.detach_revision == 0 => None,
            // Told of with the others.
            Some(nic) if has.revision < nic.detach_revision => None,
            None if has.revision < spec.devices_revision => {
                let nobody = VmmDevice {
                    slot: held.slot.max(1),
                    kind: NIC.to_owned(),
                    mac: mac.clone(),
                    ..VmmDevice::default()
                };
                Some(detach(seen, spec.devices_revision, &mac, &nobody))
            }
            _ => Some(Action::Release {
                key: key.clone(),
                tap: held.tap.clone(),
            }),
        }
    })
}

#[cfg(test)]
mod tests {
    use drover_proto::v1::{Migration, VmMemory};

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
        step_resting(&[], failed, disks, revision, has, change)
    }

    /// As `step_after`, where these are not to be tried again yet.
    fn step_resting(
        resting: &[&str],
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
                resting: resting.iter().map(|volume| (*volume).to_owned()).collect(),
                ..Attaching::default()
            },
            nics: Vec::new(),
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
                Some(Action::Attach { piece, .. }) => format!("attach {}", piece.name()),
                Some(Action::Detach { name, .. }) => format!("detach {name}"),
                other => format!("{other:?}"),
            };
        assert_eq!(next(&disks, &[]), "attach a");
        assert_eq!(next(&disks, &["a"]), "attach b");
        assert_eq!(next(&disks, &["a", "b", "c"]), "attach a");
        disks[1].detach_revision = 9;
        assert_eq!(next(&disks, &["a", "b"]), "detach b");
    }

    #[test]
    fn what_failed_just_now_is_let_rest_and_then_tried_again_and_can_be_taken_back_meanwhile() {
        use VmmDeviceState::Attached;
        let mut disks = [disk("a", 1)];
        let grown = |wanted: &mut VmDesired| wanted.volumes[0].size_bytes = 2 * MIB;
        let there = || has(9, &[device("a", 1, Attached)]);
        assert_eq!(
            step_resting(&["a"], &["a"], &disks, 9, has(9, &[]), untouched),
            None
        );
        assert_eq!(step_resting(&["a"], &["a"], &disks, 9, there(), grown), None);
        let again = step_after(&["a"], &disks, 9, there(), grown);
        assert!(matches!(&again, Some(Action::Resize { .. })), "{again:?}");
        disks[0].detach_revision = 10;
        let back = step_resting(&["a"], &["a"], &disks, 10, there(), untouched);
        assert!(matches!(&back, Some(Action::Detach { .. })), "{back:?}");
    }

    #[test]
    fn what_is_missing_is_attached_and_what_is_there_is_left_alone() {
        use VmmDeviceState::{Attached, Ejecting};
        let disks = [disk("a", 1), disk("b", 5)];
        let attached = step(&disks, 7, has(0, &[device("a", 1, Attached)]), untouched);
        assert!(
            matches!(&attached, Some(Action::Attach { revision: 7, piece: Piece::Disk(disk, _), .. }) if disk.slot == 5),
            "{attached:?}"
        );
        let both = [device("a", 1, Attached), device("b", 5, Attached)];
        assert_eq!(step(&disks, 7, has(7, &both), untouched), None);
        // Its slot is another's until that has been given up, and no disk that is still wanted is taken away.
        let taken = [device("a", 1, Attached), device("c", 5, Attached)];
        let detached = step(&disks, 7, has(6, &taken), untouched);
        assert!(
            matches!(&detached, Some(Action::Detach { request: Detach::Disk(request), .. }) if request.slot == 5)
        );
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
    fn a_seed_disk_is_nobodys_to_take_and_not_the_clusters_to_know() {
        let mut seed = device("e3-start", SEED_SLOT, VmmDeviceState::Attached);
        seed.path = "/data/vms/vm1/e3-start/seed.img".into();
        let there = has(7, &[device("a", 1, VmmDeviceState::Attached), seed.clone()]);
        assert_eq!(step(&[disk("a", 1)], 7, there.clone(), untouched), None);
        // Only where the cluster puts it: a disk of that name elsewhere is one like others.
        seed.slot = 3;
        let taken = step(&[], 7, has(7, &[seed]), untouched);
        assert!(matches!(&taken, Some(Action::Detach { .. })), "{taken:?}");
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
            let detaches = matches!(&next, Some(Action::Detach { request: Detach::Disk(request), .. }) if request.revision == 8);
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
            nics: Vec::new(),
        };
        let lacks = disk("a", 4);
        let reported = report(&seen, &VmmDevices::default(), &[Wanted::disk(&lacks, &[])]);
        assert_eq!(
            (reported.devices[0].slot, reported.devices[0].state()),
            (4, VmDeviceState::Failed)
        );
    }
}
