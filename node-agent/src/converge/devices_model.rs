//! `devices` against a model of all that it deals with: a specification that changes, a VMM that orders calls by their revision, a guest
//! that gives up what it was asked for when it likes, agents that are killed between any two steps, and calls of theirs that come late.
//!
//! What must hold at each step: whatever NIC the VMM has, its TAP is there; nothing is asked of a guest that its VM is to keep; nothing
//! leaves the specification that the VMM has or may get. And once all is quiet: the VMM has what the specification has, and no TAP
//! more.

use drover_proto::v1::{
    Network, VmDesired, VmDevice, VmDeviceState, VmDisk, VmNic, VmSpec, VmmDevice, VmmDeviceState,
    VmmDevices, VmmState, Volume,
};
use proptest::prelude::*;

use super::devices::next;
use super::{Action, Alive, Attaching, Detach, Life, Observed, Piece, Seen};
use crate::key::Key;
use crate::network::plan::{self, Names, Nic};

const MIB: u64 = 1 << 20;
const NETWORK: &str = "lan";
/// More than any run takes to come to rest.
const STEPS_TO_REST: usize = 200;

#[derive(Clone, Debug)]
enum Step {
    AttachNic(u8),
    AttachDisk(u8),
    Detach(prop::sample::Index),
    /// The agent does what is next.
    Act,
    /// It is killed at that: what it sends to the VMM comes later, or never.
    DieActing,
    /// A call that is on its way comes to the VMM.
    Late(prop::sample::Index),
    /// The guest gives up what it was asked for.
    GiveUp(prop::sample::Index),
    /// What the guest gave up has ended.
    End,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..3_u8).prop_map(Step::AttachNic),
        2 => (0..3_u8).prop_map(Step::AttachDisk),
        4 => any::<prop::sample::Index>().prop_map(Step::Detach),
        9 => Just(Step::Act),
        3 => Just(Step::DieActing),
        3 => any::<prop::sample::Index>().prop_map(Step::Late),
        4 => any::<prop::sample::Index>().prop_map(Step::GiveUp),
        3 => Just(Step::End),
    ]
}

/// A call of the VMM.
#[derive(Clone, Debug)]
enum Call {
    Attach(u64, VmmDevice),
    Detach(u64, VmmDevice),
}

struct Model {
    names: Names,
    key: Key,
    /// The cluster's.
    spec: VmSpec,
    /// The VMM's.
    has: VmmDevices,
    /// Calls that agents sent which were killed.
    late: Vec<Call>,
    /// In the VMM's folder, so that every agent knows it; its TAPs are there.
    held: Vec<Nic>,
    /// Of the agent that lives.
    attaching: Attaching,
}

fn disk_device(disk: &VmDisk) -> VmmDevice {
    VmmDevice {
        slot: disk.slot,
        kind: "disk".to_owned(),
        path: format!("/pool/{}/data.raw", disk.volume),
        size_bytes: MIB,
        state: VmmDeviceState::Attached.into(),
        ..VmmDevice::default()
    }
}

impl Model {
    fn new() -> Self {
        Self {
            names: Names::new("c", "host1"),
            key: Key::start("vm1", 3),
            spec: VmSpec::default(),
            has: VmmDevices {
                changes_nics: true,
                ..VmmDevices::default()
            },
            late: Vec::new(),
            held: Vec::new(),
            attaching: Attaching::default(),
        }
    }

    fn wanted(&self) -> VmDesired {
        let volume = |disk: &VmDisk| Volume {
            name: disk.volume.clone(),
            size_bytes: MIB,
            ..Volume::default()
        };
        VmDesired {
            epoch: 3,
            volumes: self.spec.disks.iter().map(volume).collect(),
            networks: vec![network()],
            spec: Some(self.spec.clone()),
            ..VmDesired::default()
        }
    }

    fn free_slot(&self) -> u32 {
        let disks = self.spec.disks.iter().map(|disk| disk.slot);
        let taken: Vec<u32> = disks.chain(self.spec.nics.iter().map(|nic| nic.slot)).collect();
        (1..).find(|slot| !taken.contains(slot)).expect("few are taken")
    }

    /// As `apply` does.
    fn attach(&mut self, nic: bool, number: u8) {
        let (slot, revision) = (self.free_slot(), self.spec.devices_revision + 1);
        let (mac, volume) = (format!("52:54:00:00:00:0{number}"), format!("v{number}"));
        if nic && self.spec.nics.iter().all(|nic| nic.mac != mac) {
            self.spec.nics.push(VmNic {
                network: NETWORK.to_owned(),
                mac,
                slot,
                attach_revision: revision,
                ..VmNic::default()
            });
        } else if !nic && self.spec.disks.iter().all(|disk| disk.volume != volume) {
            self.spec.disks.push(VmDisk {
                volume,
                slot,
                attach_revision: revision,
                ..VmDisk::default()
            });
        } else {
            return;
        }
        self.spec.devices_revision = revision;
    }

    fn detach(&mut self, index: prop::sample::Index) {
        let disks = self.spec.disks.iter_mut().map(|disk| &mut disk.detach_revision);
        let nics = self.spec.nics.iter_mut().map(|nic| &mut nic.detach_revision);
        let mut all: Vec<&mut u64> = disks.chain(nics).collect();
        if !all.is_empty() {
            self.spec.devices_revision += 1;
            let at = index.index(all.len());
            *all[at] = self.spec.devices_revision;
        }
    }

    fn act(&self) -> Option<Action> {
        let alive = Alive {
            state: VmmState::Running,
            reason: None,
            outgoing: None,
            devices: Some(self.has.clone()),
            snapshot: None,
        };
        let seen = Seen {
            snapshot_taken: None,
            snapshot_told: None,
            key: self.key.clone(),
            life: Life::Alive(alive.clone()),
            had_right: true,
            commit_refused: false,
            outgoing_taken: None,
            switch_taken: None,
            commit_taken: false,
            end_reported: false,
            attaching: self.attaching.clone(),
            nics: self.held.clone(),
        };
        let observed = Observed {
            host: "host1".to_owned(),
            ..Observed::default()
        };
        next(&observed, &seen, &alive, &self.wanted())
    }

    /// Does what is next; false: there is nothing. `dies`: the agent is killed before the VMM has taken its call.
    fn step(&mut self, dies: bool) -> bool {
        let Some(action) = self.act() else { return false };
        let call = match action {
            Action::ReportDevices { devices, .. } => {
                self.report(&devices.devices, devices.revision);
                self.attaching.reported = Some(devices);
                None
            }
            Action::Attach { revision, piece, .. } => Some(Call::Attach(revision, self.made(&piece))),
            Action::Detach { request, .. } => {
                let (revision, slot) = match &request {
                    Detach::Disk(request) => (request.revision, request.slot),
                    Detach::Nic(request) => (request.revision, request.slot),
                };
                let device = VmmDevice {
                    slot,
                    path: match &request {
                        Detach::Disk(request) => request.path.clone(),
                        Detach::Nic(_) => String::new(),
                    },
                    mac: match request {
                        Detach::Disk(_) => String::new(),
                        Detach::Nic(request) => request.mac,
                    },
                    ..VmmDevice::default()
                };
                Some(Call::Detach(revision, device))
            }
            Action::Release { tap, .. } => {
                self.held.retain(|nic| nic.tap != tap);
                None
            }
            other => panic!("unexpected {other:?}"),
        };
        if dies {
            self.late.extend(call);
            self.attaching = Attaching::default();
        } else if let Some(call) = call {
            self.take(&call);
        }
        true
    }

    /// What the VMM is given; a NIC's TAP is there and written down.
    fn made(&mut self, piece: &Piece) -> VmmDevice {
        match piece {
            Piece::Disk(disk, _) => disk_device(disk),
            Piece::Nic(nic, network) => {
                let one = (std::slice::from_ref(nic), std::slice::from_ref(network));
                let made = plan::nics(&self.names, &self.key, one.0, one.1)
                    .expect("a good NIC")
                    .remove(0);
                if !self.held.iter().any(|held| held.tap == made.tap) {
                    self.held.push(made.clone());
                }
                VmmDevice {
                    slot: nic.slot,
                    kind: "nic".to_owned(),
                    mac: nic.mac.clone(),
                    tap: made.tap,
                    state: VmmDeviceState::Attached.into(),
                    ..VmmDevice::default()
                }
            }
        }
    }

    /// As the VMM does: see machine/hotplug.rs there.
    fn take(&mut self, call: &Call) {
        let (Call::Attach(revision, device) | Call::Detach(revision, device)) = call;
        if *revision < self.has.revision {
            return;
        }
        let devices = &mut self.has.devices;
        match call {
            Call::Attach(..) => {
                let tap_is_there = device.tap.is_empty() || self.held.iter().any(|nic| nic.tap == device.tap);
                let same_mac = |other: &VmmDevice| !device.mac.is_empty() && other.mac == device.mac;
                let free = !devices
                    .iter()
                    .any(|other| other.slot == device.slot || same_mac(other));
                if !tap_is_there || !free {
                    return;
                }
                devices.push(device.clone());
                devices.sort_by_key(|device| device.slot);
            }
            Call::Detach(..) => {
                let is_it = |other: &&mut VmmDevice| {
                    (other.slot, &other.path, &other.mac) == (device.slot, &device.path, &device.mac)
                };
                if let Some(found) = devices.iter_mut().find(is_it) {
                    let (disks, nics) = (&self.spec.disks, &self.spec.nics);
                    let kept = disks.iter().any(|disk| {
                        disk.detach_revision == 0
                            && disk_device(disk).path == found.path
                            && disk.slot == found.slot
                    }) || nics.iter().any(|nic| {
                        nic.detach_revision == 0 && nic.mac == found.mac && nic.slot == found.slot
                    });
                    assert!(!kept, "{found:?} is taken away");
                    if found.state() == VmmDeviceState::Attached {
                        found.set_state(VmmDeviceState::Ejecting);
                    }
                }
            }
        }
        self.has.revision = *revision;
    }

    /// As `apply` does.
    fn report(&mut self, devices: &[VmDevice], revision: u64) {
        let has = |slot: u32| {
            let mut here = devices.iter().filter(|device| device.slot == slot);
            here.any(|device| device.state() != VmDeviceState::Failed)
        };
        let gone = |slot, wish: u64| wish > 0 && revision >= wish && !has(slot);
        self.spec
            .disks
            .retain(|disk| !gone(disk.slot, disk.detach_revision));
        self.spec.nics.retain(|nic| !gone(nic.slot, nic.detach_revision));
    }

    fn guest(&mut self, from: VmmDeviceState, to: Option<VmmDeviceState>, at: usize) {
        let mut those = self
            .has
            .devices
            .iter_mut()
            .filter(|device| device.state() == from);
        let Some(slot) = those.nth(at).map(|device| device.slot) else {
            return;
        };
        match to {
            None => self.has.devices.retain(|device| device.slot != slot),
            Some(to) => {
                let device = self.has.devices.iter_mut().find(|device| device.slot == slot);
                device.expect("it was just found").set_state(to);
            }
        }
    }

    fn assert_sound(&self) {
        for device in self.has.devices.iter().filter(|device| device.kind == "nic") {
            assert!(
                self.held.iter().any(|nic| nic.tap == device.tap),
                "the VMM has {device:?}, whose TAP was removed"
            );
        }
    }

    /// Everybody does what is to be done, and late calls come.
    fn rest(&mut self) {
        for call in std::mem::take(&mut self.late) {
            self.take(&call);
            self.assert_sound();
        }
        for _ in 0..STEPS_TO_REST {
            let acted = self.step(false);
            self.assert_sound();
            let states = [VmmDeviceState::Ejecting, VmmDeviceState::Leaving];
            let moves = self
                .has
                .devices
                .iter()
                .any(|device| states.contains(&device.state()));
            if !acted && !moves {
                return;
            }
            self.guest(VmmDeviceState::Leaving, None, 0);
            self.guest(VmmDeviceState::Ejecting, Some(VmmDeviceState::Leaving), 0);
        }
        panic!("no rest: {:?} {:?}", self.spec, self.has);
    }
}

fn network() -> Network {
    Network {
        name: NETWORK.to_owned(),
        mtu: 1500,
        ..Network::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_dies_and_whatever_comes_late_no_tap_goes_before_its_nic_and_all_is_as_wanted_in_the_end(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut model = Model::new();
        for step in steps {
            match step {
                Step::AttachNic(number) => model.attach(true, number),
                Step::AttachDisk(number) => model.attach(false, number),
                Step::Detach(index) => model.detach(index),
                Step::Act => drop(model.step(false)),
                Step::DieActing => drop(model.step(true)),
                Step::Late(index) if !model.late.is_empty() => {
                    let call = model.late.remove(index.index(model.late.len()));
                    model.take(&call);
                }
                Step::Late(_) => {}
                Step::GiveUp(index) => {
                    model.guest(VmmDeviceState::Ejecting, Some(VmmDeviceState::Leaving), index.index(3));
                }
                Step::End => model.guest(VmmDeviceState::Leaving, None, 0),
            }
            model.assert_sound();
        }
        model.rest();
        let wanted = |spec: &VmSpec| {
            let disks = spec.disks.iter().map(|disk| disk.slot);
            let mut slots: Vec<u32> = disks.chain(spec.nics.iter().map(|nic| nic.slot)).collect();
            slots.sort_unstable();
            slots
        };
        let has: Vec<u32> = model.has.devices.iter().map(|device| device.slot).collect();
        prop_assert_eq!(has, wanted(&model.spec));
        let wishes = model.spec.nics.iter().filter(|nic| nic.detach_revision > 0).count();
        prop_assert_eq!(wishes, 0, "a guest that obeys keeps nothing");
        let taps: Vec<&String> = model.held.iter().map(|nic| &nic.tap).collect();
        let used = model.has.devices.iter().filter(|device| !device.tap.is_empty()).count();
        prop_assert_eq!(taps.len(), used, "a TAP was left: {:?}", taps);
    }
}
