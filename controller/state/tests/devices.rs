//! Disks that are attached and given up, power buttons, volumes that grow: what the specification says at each step.

#![allow(clippy::unwrap_used, reason = "a panic is the test's failure")]

mod common;

use common::*;
use drover_proto::Code;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    AttachDisk, DetachDisk, ReportVmRequest, ResizeVolume, ShutdownVm, VmDevice, VmDeviceState, VmDevices,
    VmDisk, VmState,
};
use drover_state::{State, desired};

const MIB: u64 = 1 << 20;

fn attach(vm: &str, volume: &str) -> Kind {
    Kind::AttachDisk(AttachDisk {
        vm: vm.into(),
        disk: Some(VmDisk {
            volume: volume.into(),
            ..VmDisk::default()
        }),
    })
}

fn detach(vm: &str, volume: &str) -> Kind {
    Kind::DetachDisk(DetachDisk {
        vm: vm.into(),
        volume: volume.into(),
    })
}

fn shutdown(vm: &str) -> Kind {
    Kind::ShutdownVm(ShutdownVm { name: vm.into() })
}

fn resize(volume: &str, size_bytes: u64) -> Kind {
    Kind::ResizeVolume(ResizeVolume {
        name: volume.into(),
        size_bytes,
    })
}

/// The VMM of `vm` has these volumes, by slot, and was told of the specification's `revision`.
fn has(c: &Cluster, vm: &str, revision: u64, disks: &[(u32, &str)]) -> Kind {
    let device = |&(slot, volume): &(u32, &str)| VmDevice {
        slot,
        volume: volume.into(),
        state: VmDeviceState::Attached.into(),
        ..VmDevice::default()
    };
    Kind::ReportVm(ReportVmRequest {
        host: "host1".into(),
        vm: vm.into(),
        epoch: c.epoch(vm),
        state: VmState::Running.into(),
        devices: Some(VmDevices {
            devices: disks.iter().map(device).collect(),
            revision,
            ..VmDevices::default()
        }),
        ..ReportVmRequest::default()
    })
}

/// vm1 runs on host1 with volumes a and b; there are c and d as well.
fn cluster() -> Cluster {
    let mut c = Cluster::new();
    for volume in ["a", "b", "c", "d"] {
        c.ok(create_volume(volume, "", 8 * MIB));
    }
    c.ok(create_with_disks("vm1", &["a", "b"]));
    c.run("vm1", "host1");
    c
}

fn disks(c: &Cluster) -> Vec<(String, u32)> {
    let disks = &c.vm("vm1").spec.as_ref().unwrap().disks;
    disks
        .iter()
        .map(|disk| (disk.volume.clone(), disk.slot))
        .collect()
}

fn slots(c: &Cluster, want: &[(&str, u32)]) {
    let want: Vec<(String, u32)> = want
        .iter()
        .map(|(volume, slot)| ((*volume).to_owned(), *slot))
        .collect();
    assert_eq!(disks(c), want);
}

#[test]
fn what_was_counted_is_written_down_and_a_new_disk_takes_the_lowest_free_slot() {
    let mut c = cluster();
    slots(&c, &[("a", 0), ("b", 0)]);
    c.ok(attach("vm1", "c"));
    slots(&c, &[("a", 1), ("b", 2), ("c", 3)]);
    assert!(c.state.volume("a").unwrap().used && !c.state.volume("c").unwrap().used);
    // A run's report is not yet one of the disk's: its file may still have to be made.
    c.ok(report("host1", "vm1", c.epoch("vm1"), VmState::Running));
    assert!(!c.state.volume("c").unwrap().used);
    c.ok(has(&c, "vm1", 1, &[(1, "a"), (2, "b"), (3, "c")]));
    assert!(c.state.volume("c").unwrap().used);
    c.ok(detach("vm1", "a"));
    c.ok(has(&c, "vm1", 2, &[(2, "b"), (3, "c")]));
    c.ok(attach("vm1", "d"));
    slots(&c, &[("b", 2), ("c", 3), ("d", 1)]);
    let wanted = desired(&c.state, "host1").vms.remove(0);
    assert_eq!(wanted.spec.unwrap().devices_revision, 3);
    assert_eq!(wanted.volumes.len(), 3);
    assert_eq!(State::decode(&c.state.encode()).unwrap(), c.state);
}

#[test]
fn a_disk_is_the_vms_until_its_vmm_was_told_and_has_it_no_more() {
    let mut c = cluster();
    c.ok(attach("vm1", "c"));
    c.ok(detach("vm1", "c"));
    assert_eq!(c.refused(create_with_disks("vm2", &["c"])), Code::VolumeInUse);
    // The VMM lacks it, but what was sent to attach it may still come: it was told of revision 1 at most.
    c.ok(has(&c, "vm1", 1, &[(1, "a"), (2, "b")]));
    assert_eq!(disks(&c).len(), 3);
    assert_eq!(c.refused(attach("vm1", "c")), Code::VolumeInUse);
    c.ok(has(&c, "vm1", 2, &[(1, "a"), (2, "b"), (3, "c")]));
    assert_eq!(disks(&c).len(), 3, "the guest has not given it up");
    c.ok(has(&c, "vm1", 2, &[(1, "a"), (2, "b")]));
    slots(&c, &[("a", 1), ("b", 2)]);
    c.ok(create_with_disks("vm2", &["c"]));
}

#[test]
fn a_guest_that_never_gives_a_disk_up_has_it_until_its_run_ends() {
    for end in [VmState::Failed, VmState::Stopped] {
        let mut c = cluster();
        c.ok(detach("vm1", "b"));
        c.ok(has(&c, "vm1", 1, &[(1, "a"), (2, "b")]));
        c.ok(detach("vm1", "b"));
        assert_eq!(disks(&c).len(), 2);
        c.ok(report("host1", "vm1", c.epoch("vm1"), end));
        slots(&c, &[("a", 1)]);
        c.ok(attach("vm1", "c"));
        c.ok(detach("vm1", "a"));
        slots(&c, &[("c", 2)]);
    }
}

#[test]
fn what_a_vm_has_does_not_change_while_it_is_moved_and_a_wish_goes_along() {
    let mut c = cluster();
    c.ok(detach("vm1", "b"));
    let id = c.copying("vm1", "host2");
    for kind in [attach("vm1", "c"), detach("vm1", "a"), resize("a", 16 * MIB)] {
        assert_eq!(c.refused(kind), Code::MigrationActive);
    }
    let epoch = c.epoch("vm1") + 1;
    c.ok(commit(&id, "host2", "vm1", epoch));
    assert!(c.vm("vm1").devices.is_none());
    assert_eq!(disks(&c).len(), 2, "asked for, not given up");
    c.ok(finish(&id, 1));
    c.ok(attach("vm1", "c"));
}

#[test]
fn what_cannot_be_attached_or_detached_is_refused() {
    let mut c = cluster();
    c.ok(create_with_disks("vm2", &["d"]));
    for (kind, code) in [
        (attach("vm9", "c"), Code::VmNotFound),
        (attach("vm1", "x"), Code::VolumeNotFound),
        (attach("vm1", "a"), Code::VolumeInUse),
        (attach("vm1", "d"), Code::VolumeInUse),
        (attach("vm1", "../c"), Code::InvalidArgument),
        (detach("vm1", "c"), Code::VolumeNotFound),
        (detach("vm9", "c"), Code::VmNotFound),
        (resize("x", 8 * MIB), Code::VolumeNotFound),
        (resize("a", 4 * MIB), Code::InvalidArgument),
        (resize("a", 8 * MIB + 1), Code::InvalidArgument),
    ] {
        let before = c.state.encode();
        assert_eq!(c.refused(kind.clone()), code, "{kind:?}");
        assert_eq!(c.state.encode(), before);
    }
    for n in 2..24 {
        c.ok(create_volume(&format!("more{n}"), "", MIB));
        c.ok(attach("vm1", &format!("more{n}")));
    }
    assert_eq!(c.refused(attach("vm1", "c")), Code::InvalidArgument, "the 25th");
}

#[test]
fn a_guest_that_is_asked_to_shut_down_runs_until_it_has_and_is_not_restarted() {
    let mut c = cluster();
    c.ok(shutdown("vm1"));
    assert_eq!(c.vm("vm1").state(), VmState::Running);
    assert_eq!(desired(&c.state, "host1").vms[0].shutdown, 1);
    assert_eq!(c.granted("host1").len(), 1);
    c.ok(shutdown("vm1"));
    assert_eq!(desired(&c.state, "host1").vms[0].shutdown, 2);
    c.ok(start("vm1"));
    assert_eq!((c.vm("vm1").wanted_running, c.vm("vm1").shutdown), (true, 0));
    c.ok(shutdown("vm1"));
    c.ok(report("host1", "vm1", c.epoch("vm1"), VmState::Stopped));
    let vm = c.vm("vm1");
    assert_eq!(
        (vm.state(), vm.wanted_running, vm.shutdown),
        (VmState::Stopped, false, 0)
    );
    c.ok(shutdown("vm1"));
    assert_eq!(c.vm("vm1").state(), VmState::Stopped);
}

#[test]
fn a_volume_only_grows_and_remembers_what_its_file_may_still_be() {
    let mut c = cluster();
    c.ok(resize("a", 16 * MIB));
    c.ok(resize("a", 32 * MIB));
    let volume = c.ok(resize("a", 32 * MIB)).volume.unwrap();
    assert_eq!((volume.size_bytes, volume.initial_bytes), (32 * MIB, 8 * MIB));
    assert_eq!(desired(&c.state, "host1").vms[0].volumes[0].size_bytes, 32 * MIB);
}
