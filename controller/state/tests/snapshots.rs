//! Snapshots and restores: what each command does and refuses, and what is whose at each step.

#![allow(clippy::unwrap_used, reason = "a panic is the test's failure")]

mod common;

use common::*;
use drover_proto::Code;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    AttachDisk, HostSpec, Reason, Removal, ReportSnapshotRequest, ResizeVolume, RestartPolicy, Snapshot,
    SnapshotNews, SnapshotPhase, VmDisk, VmSpec, VmState,
};
use drover_state::placement::{choose, fits};
use drover_state::{State, desired, purpose_of_start};

const MIB: u64 = 1 << 20;

/// vm1 runs on host1 at epoch 1 with `data`, which it writes, and `base`, which it reads.
fn cluster() -> Cluster {
    let mut c = Cluster::new();
    for volume in ["base", "data"] {
        c.ok(create_volume(volume, "", 8 * MIB));
    }
    c.ok(create_with_disks("vm1", &["data", "base:ro"]));
    c.run("vm1", "host1");
    c
}

/// With the snapshot `nightly`, s1, ready, and vm1 stopped.
fn with_snapshot() -> Cluster {
    let mut c = cluster();
    c.ok(take("vm1", "nightly"));
    c.ok(news("host1", "s1", 1, SnapshotNews::Done));
    stopped(&mut c);
    c
}

fn stopped(c: &mut Cluster) {
    c.ok(stop("vm1"));
    let (host, epoch) = (drover_state::host_of(c.vm("vm1")).to_owned(), c.epoch("vm1"));
    c.ok(report(&host, "vm1", epoch, VmState::Stopped));
}

fn phase(c: &Cluster, id: &str) -> SnapshotPhase {
    c.state
        .snapshot(id)
        .map_or(SnapshotPhase::Unspecified, Snapshot::phase)
}

fn why(c: &Cluster, id: &str) -> String {
    c.state.snapshot(id).unwrap().reason.clone().unwrap().code
}

fn removals(c: &Cluster, host: &str) -> Vec<String> {
    let name = |removal: &Removal| match removal.snapshot.as_str() {
        "" => format!("{}/{}", removal.volume, restored(removal.content)),
        id => id.to_owned(),
    };
    desired(&c.state, host).removals.iter().map(name).collect()
}

fn removed(c: &mut Cluster, host: &str) {
    for removal in desired(&c.state, host).removals {
        c.ok(Kind::ReportSnapshot(ReportSnapshotRequest {
            host: host.into(),
            news: SnapshotNews::Removed.into(),
            removal: Some(removal),
            ..ReportSnapshotRequest::default()
        }));
    }
}

/// The number of the restore that a content comes from; 0: it is of its volume's making.
fn restored(content: u64) -> u64 {
    if content < 1_000_000 { content } else { 0 }
}

/// Content and size of a volume.
fn content(c: &Cluster, volume: &str) -> (u64, u64) {
    let volume = c.state.volume(volume).unwrap();
    (restored(volume.content), volume.size_bytes / MIB)
}

#[test]
fn a_snapshot_is_desired_of_its_run_until_it_is_ready() {
    let mut c = cluster();
    let taken = c.ok(take("vm1", "nightly")).snapshot.unwrap();
    assert_eq!(
        (taken.id.as_str(), taken.name.as_str(), taken.pool.as_str()),
        ("s1", "nightly", "default")
    );
    let slots: Vec<u32> = taken.spec.unwrap().disks.iter().map(|disk| disk.slot).collect();
    assert_eq!(slots, [1, 2], "written down as they were counted");
    let wanted = desired(&c.state, "host1").vms.remove(0);
    assert_eq!(wanted.snapshot.unwrap().id, "s1");
    c.ok(news("host2", "s1", 1, SnapshotNews::Done));
    c.ok(news("host1", "s1", 2, SnapshotNews::Done));
    assert_eq!(phase(&c, "s1"), SnapshotPhase::Creating, "another run's word");
    c.ok(news("host1", "s1", 1, SnapshotNews::Done));
    let ready = c.state.snapshot("s1").unwrap();
    assert_eq!(
        (ready.phase(), ready.bytes_stored, ready.paused_us),
        (SnapshotPhase::Ready, 60, 700)
    );
    assert!(desired(&c.state, "host1").vms[0].snapshot.is_none());
    assert_eq!(State::decode(&c.state.encode()).unwrap(), c.state);
    // Nothing that comes late changes it.
    c.ok(news("host1", "s1", 1, SnapshotNews::Failed));
    assert_eq!(phase(&c, "s1"), SnapshotPhase::Ready);
    assert!(removals(&c, "host1").is_empty());
}

#[test]
fn names_are_a_vms_own_and_numbers_the_clusters() {
    let mut c = cluster();
    c.ok(create("vm2"));
    c.run("vm2", "host2");
    c.ok(take("vm1", "nightly"));
    assert_eq!(c.refused(take("vm1", "other")), Code::SnapshotActive);
    assert_eq!(
        c.ok(take("vm2", "nightly")).snapshot.unwrap().pool,
        "default",
        "without volumes as well"
    );
    c.ok(news("host1", "s1", 1, SnapshotNews::Done));
    assert_eq!(c.refused(take("vm1", "nightly")), Code::SnapshotExists);
    assert_eq!(c.refused(take("vm1", "s9")), Code::InvalidArgument);
    assert_eq!(c.refused(take("vm1", "Nightly")), Code::InvalidArgument);
    assert_eq!(c.refused(take("none", "")), Code::VmNotFound);
    let unnamed = c.ok(take("vm1", "")).snapshot.unwrap();
    assert_eq!(unnamed.name, "s3");
    assert!(c.state.snapshot_of("vm1", "s3", "name").is_ok());
    assert_eq!(
        c.refused(drop_snapshot("vm1", "s2")),
        Code::SnapshotNotFound,
        "it is vm2's"
    );
}

#[test]
fn a_vm_has_a_bounded_number_of_snapshots() {
    let mut c = cluster();
    for number in 1..=64 {
        c.ok(take("vm1", ""));
        c.ok(news("host1", &format!("s{number}"), 1, SnapshotNews::Done));
    }
    assert_eq!(c.refused(take("vm1", "")), Code::InvalidArgument);
    c.ok(drop_snapshot("vm1", "s1"));
    removed(&mut c, "host1");
    c.ok(take("vm1", ""));
}

#[test]
fn a_snapshot_and_whatever_changes_the_vm_exclude_each_other() {
    let mut c = cluster();
    c.ok(create_volume("more", "", MIB));
    let attach = || {
        Kind::AttachDisk(AttachDisk {
            vm: "vm1".into(),
            disk: Some(VmDisk {
                volume: "more".into(),
                ..VmDisk::default()
            }),
        })
    };
    let grow = || {
        Kind::ResizeVolume(ResizeVolume {
            name: "data".into(),
            size_bytes: 9 * MIB,
        })
    };
    let migration = c.ok(plan("vm1", "host2")).migration.unwrap().id;
    assert_eq!(c.refused(take("vm1", "")), Code::MigrationActive);
    c.ok(abort(&migration, "", Code::Cancelled));
    c.ok(take("vm1", ""));
    assert_eq!(c.refused(plan("vm1", "host2")), Code::SnapshotActive);
    assert_eq!(c.refused(upgrade("vm1", "host1")), Code::SnapshotActive);
    assert_eq!(c.refused(attach()), Code::SnapshotActive);
    assert_eq!(c.refused(grow()), Code::SnapshotActive);
    c.ok(drop_snapshot("vm1", "s1"));
    c.ok(attach());
    assert_eq!(
        c.refused(take("vm1", "")),
        Code::DeviceBusy,
        "it is about to get a disk"
    );
    c.ok(plan("vm1", "host2"));
}

#[test]
fn only_of_one_that_runs_where_it_can_be_a_snapshot_is_taken() {
    let mut c = cluster();
    c.ok(report("host1", "vm1", 1, VmState::Paused));
    assert_eq!(c.refused(take("vm1", "")), Code::VmState);
    c.ok(report("host1", "vm1", 1, VmState::Running));
    let host = |change: &dyn Fn(&mut HostSpec)| {
        let mut spec = host_spec("host1");
        change(&mut spec);
        Kind::RegisterHost(spec)
    };
    c.ok(host(&|spec| spec.snapshots = false));
    assert_eq!(c.refused(take("vm1", "")), Code::SnapshotUnavailable);
    c.ok(host(&|spec| spec.pools = vec!["tape".into()]));
    assert_eq!(c.refused(take("vm1", "")), Code::PoolNotFound);
    c.ok(host(&|_| {}));
    c.ok(stop("vm1"));
    assert_eq!(c.refused(take("vm1", "")), Code::VmState);
}

#[test]
fn a_run_that_ends_or_is_not_to_be_counted_on_fails_its_snapshot_and_what_it_left_is_removed() {
    let ends: [(&str, Kind, Code); 5] = [
        (
            "fails",
            report("host1", "vm1", 1, VmState::Failed),
            Code::SnapshotFailed,
        ),
        (
            "shuts down",
            report("host1", "vm1", 1, VmState::Stopped),
            Code::VmStopped,
        ),
        ("is stopped", stop("vm1"), Code::VmStopped),
        ("its host is lost", host_down("host1"), Code::HostDown),
        (
            "its host reboots",
            host_up("host1", "boot-2"),
            Code::SnapshotFailed,
        ),
    ];
    for (what, end, code) in ends {
        let mut c = cluster();
        c.ok(take("vm1", ""));
        c.ok(end);
        assert_eq!(phase(&c, "s1"), SnapshotPhase::Failed, "{what}");
        assert_eq!(why(&c, "s1"), code.as_str(), "{what}");
        assert!(c.vm("vm1").snapshot.is_empty());
        let remover = if what == "its host is lost" {
            "host2"
        } else {
            "host1"
        };
        assert_eq!(removals(&c, remover), ["s1"], "{what}");
        assert!(removals(&c, "host3").is_empty(), "one of them is enough");
        removed(&mut c, remover);
        assert!(removals(&c, remover).is_empty());
        assert_eq!(phase(&c, "s1"), SnapshotPhase::Failed, "it is still told why");
        c.ok(drop_snapshot("vm1", "s1"));
        assert_eq!(
            phase(&c, "s1"),
            SnapshotPhase::Unspecified,
            "nothing was left to remove"
        );
    }
}

#[test]
fn a_snapshot_is_listed_until_its_folder_is_removed_by_whoever_has_the_pool() {
    let mut c = cluster();
    c.ok(take("vm1", ""));
    c.ok(drop_snapshot("vm1", "s1"));
    assert!(c.vm("vm1").snapshot.is_empty(), "that ended it");
    c.ok(drop_snapshot("vm1", "s1"));
    assert_eq!(phase(&c, "s1"), SnapshotPhase::Deleting);
    c.ok(news("host1", "s1", 1, SnapshotNews::Done));
    assert_eq!(phase(&c, "s1"), SnapshotPhase::Deleting, "it comes too late");
    for host in ["host1", "host2", "host3"] {
        c.ok(host_down(host));
    }
    assert!(
        ["host1", "host2", "host3"]
            .iter()
            .all(|host| removals(&c, host).is_empty())
    );
    c.ok(host_up("host3", ""));
    assert_eq!(removals(&c, "host3"), ["s1"]);
    c.ok(host_up("host1", ""));
    assert_eq!(removals(&c, "host1"), ["s1"], "who made it first");
    assert!(removals(&c, "host3").is_empty());
    removed(&mut c, "host1");
    assert_eq!(phase(&c, "s1"), SnapshotPhase::Unspecified);
    assert_eq!(c.ok(create("vm2")).vm.unwrap().snapshot, "");
    assert_eq!(State::decode(&c.state.encode()).unwrap(), c.state);
}

#[test]
fn a_restore_in_place_changes_no_volume_before_it_begins_and_all_of_them_then() {
    let mut c = with_snapshot();
    c.ok(Kind::ResizeVolume(ResizeVolume {
        name: "data".into(),
        size_bytes: 16 * MIB,
    }));
    c.ok(restore("vm1", "nightly", ""));
    assert_eq!(content(&c, "data"), (0, 16));
    assert_eq!(c.refused(start("none")), Code::VmNotFound);
    c.ok(place("vm1", "host2", 1));
    let wanted = desired(&c.state, "host2").vms.remove(0);
    let told: Vec<_> = wanted
        .volumes
        .iter()
        .map(|volume| (restored(volume.content), volume.size_bytes / MIB))
        .collect();
    assert_eq!(
        told,
        [(2, 8), (0, 8)],
        "what is written to is as it was; what is read is what it is"
    );
    let pending = wanted.restore.unwrap();
    assert_eq!((pending.number, pending.source.unwrap().id.as_str()), (2, "s1"));
    // Neither another run's word, nor another restore's.
    for wrong in [
        begin("host1", "vm1", 2, 2),
        begin("host2", "vm1", 1, 2),
        begin("host2", "vm1", 2, 1),
    ] {
        assert!(!c.ok(wrong).current);
    }
    assert_eq!(content(&c, "data"), (0, 16));
    assert!(c.granted("host2").is_empty(), "and nothing of it may run");
    assert!(!c.ok(report("host2", "vm1", 2, VmState::Running)).current);
    assert!(c.ok(begin("host2", "vm1", 2, 2)).current);
    assert_eq!(c.granted("host2"), ["vm1@2"]);
    assert_eq!((content(&c, "data"), content(&c, "base")), ((2, 8), (0, 8)));
    assert!(desired(&c.state, "host2").vms[0].restore.is_none(), "it may run");
    assert!(c.ok(begin("host2", "vm1", 2, 2)).current, "asked again");
    assert_eq!(removals(&c, "host1"), ["data/0"]);
    assert_eq!(c.refused(delete_volume("data")), Code::VolumeInUse);
    removed(&mut c, "host1");
    assert!(removals(&c, "host1").is_empty());
    // From here on it is as any other: what it wrote since stays.
    c.ok(report("host2", "vm1", 2, VmState::Failed));
    c.ok(start("vm1"));
    c.ok(place("vm1", "host1", 2));
    assert!(desired(&c.state, "host1").vms[0].restore.is_none());
    assert_eq!(content(&c, "data"), (2, 8));
    assert!(!c.ok(begin("host2", "vm1", 2, 2)).current, "that run is over");
    assert_eq!(State::decode(&c.state.encode()).unwrap(), c.state);
}

#[test]
fn a_restore_that_fails_before_it_begins_is_tried_again_and_a_stop_has_the_vm_as_it_was() {
    let mut c = with_snapshot();
    c.ok(restore("vm1", "s1", ""));
    assert_eq!(c.refused(drop_snapshot("vm1", "s1")), Code::SnapshotInUse);
    c.ok(place("vm1", "host1", 1));
    c.ok(report("host1", "vm1", 2, VmState::Failed));
    assert!(c.vm("vm1").restore.is_some());
    assert_eq!(
        c.refused(Kind::AttachDisk(AttachDisk {
            vm: "vm1".into(),
            disk: None
        })),
        Code::RestoreActive
    );
    c.ok(start("vm1"));
    c.ok(place("vm1", "host2", 2));
    assert_eq!(
        desired(&c.state, "host2").vms[0].restore.as_ref().unwrap().number,
        2
    );
    c.ok(stop("vm1"));
    assert!(!c.ok(begin("host2", "vm1", 3, 2)).current, "it is being stopped");
    c.ok(report("host2", "vm1", 3, VmState::Stopped));
    assert!(c.vm("vm1").restore.is_none());
    assert_eq!(content(&c, "data"), (0, 8));
    assert_eq!(removals(&c, "host1"), ["data/2"], "what was copied for it goes");
    c.ok(drop_snapshot("vm1", "s1"));
    c.ok(start("vm1"));
    c.ok(place("vm1", "host1", 3));
    assert_eq!(restored(desired(&c.state, "host1").vms[0].volumes[0].content), 0);
}

#[test]
fn nothing_begins_on_a_host_that_is_declared_down() {
    let mut c = with_snapshot();
    c.ok(restore("vm1", "s1", ""));
    c.ok(place("vm1", "host1", 1));
    c.ok(host_down("host1"));
    assert!(!c.ok(begin("host1", "vm1", 2, 2)).current);
    assert_eq!(content(&c, "data"), (0, 8));
    c.ok(host_up("host1", ""));
    assert!(c.ok(begin("host1", "vm1", 2, 2)).current);
}

#[test]
fn what_cannot_be_restored_in_place_is_refused_with_what_can_be_done() {
    let mut c = with_snapshot();
    assert_eq!(c.refused(restore("vm1", "other", "")), Code::SnapshotNotFound);
    c.ok(start("vm1"));
    assert_eq!(c.refused(restore("vm1", "s1", "")), Code::VmState);
    c.run("vm1", "host1");
    assert_eq!(c.refused(restore("vm1", "s1", "")), Code::VmState);
    c.ok(take("vm1", "again"));
    stopped(&mut c);
    assert_eq!(c.refused(restore("vm1", "again", "")), Code::SnapshotNotReady);
    // What it only reads is not in the snapshot.
    c.ok(delete("vm1"));
    c.ok(create_with_disks("vm2", &["base"]));
    c.run("vm2", "host1");
    c.ok(stop("vm2"));
    c.ok(report("host1", "vm2", 1, VmState::Stopped));
    c.ok(delete("vm2"));
    assert_eq!(c.refused(restore("vm1", "s1", "")), Code::VmNotFound);
    assert_eq!(c.refused(restore("vm1", "s1", "vm3")), Code::VolumeChanged);
}

#[test]
fn a_volume_that_another_vm_has_is_not_restored_into() {
    let mut c = with_snapshot();
    c.ok(Kind::DetachDisk(drover_proto::v1::DetachDisk {
        vm: "vm1".into(),
        volume: "data".into(),
    }));
    c.ok(create_with_disks("vm2", &["data"]));
    assert_eq!(c.refused(restore("vm1", "s1", "")), Code::VolumeInUse);
    c.ok(delete("vm2"));
    c.ok(restore("vm1", "s1", ""));
    let disks = &c.vm("vm1").spec.as_ref().unwrap().disks;
    assert_eq!(disks[0].volume, "data", "it has again what it had");
    let mut c = with_snapshot();
    c.ok(delete("vm1"));
    c.ok(delete_volume("data"));
    c.ok(create("vm1"));
    stopped(&mut c);
    assert_eq!(c.refused(restore("vm1", "s1", "")), Code::VolumeNotFound);
    c.ok(restore("vm1", "s1", "vm3"));
}

#[test]
fn a_volume_that_was_made_anew_is_not_restored_into() {
    let mut c = with_snapshot();
    let before = c.state.volume("data").unwrap().writers;
    c.ok(Kind::DetachDisk(drover_proto::v1::DetachDisk {
        vm: "vm1".into(),
        volume: "data".into(),
    }));
    c.ok(delete_volume("data"));
    c.now_ms += 1;
    c.ok(create_volume("data", "", 8 * MIB));
    assert_eq!(c.refused(restore("vm1", "s1", "")), Code::VolumeChanged);
    // Whoever had it before never has a later turn at its file than whoever gets it now.
    assert!(c.state.volume("data").unwrap().writers >= before);
    c.ok(create_with_disks("vm2", &["data"]));
    c.run("vm2", "host1");
    assert!(c.state.volume("data").unwrap().writers > before);
}

#[test]
fn a_clone_has_volumes_of_its_own_beside_the_original_which_runs() {
    let mut c = cluster();
    c.ok(take("vm1", "nightly"));
    c.ok(news("host1", "s1", 1, SnapshotNews::Done));
    c.ok(restore("vm1", "nightly", "vm2"));
    assert_eq!(c.vm("vm1").state(), VmState::Running);
    let clone = c.vm("vm2").spec.clone().unwrap();
    let disks: Vec<_> = clone
        .disks
        .iter()
        .map(|disk| (disk.volume.as_str(), disk.serial.as_str(), disk.slot))
        .collect();
    assert_eq!(
        disks,
        [("vm2-data", "data", 1), ("base", "base", 2)],
        "the guest knows them by their serial numbers"
    );
    assert_eq!(content(&c, "vm2-data"), (2, 8));
    assert_eq!(c.refused(restore("vm1", "nightly", "vm2")), Code::VmExists);
    c.ok(place("vm2", "host2", 0));
    assert_eq!(desired(&c.state, "host2").vms[0].volumes[0].content, 2);
    assert!(c.ok(begin("host2", "vm2", 1, 2)).current);
    assert!(c.state.volume("vm2-data").unwrap().used);
    assert!(removals(&c, "host1").is_empty(), "nothing was replaced");
    assert_eq!(content(&c, "data"), (0, 8));
}

#[test]
fn a_clone_that_never_ran_takes_its_volumes_along_and_a_stop_does_not_end_it() {
    let mut c = with_snapshot();
    c.ok(restore("vm1", "nightly", "vm2"));
    c.ok(stop("vm2"));
    assert!(c.vm("vm2").restore.is_some(), "it is nothing else yet");
    c.ok(start("vm2"));
    c.ok(place("vm2", "host1", 0));
    c.ok(report("host1", "vm2", 1, VmState::Failed));
    c.ok(delete("vm2"));
    assert!(c.state.volume("vm2-data").is_none() && c.state.volume("data").is_some());
    assert_eq!(removals(&c, "host1"), ["vm2-data/2"]);
    c.ok(drop_snapshot("vm1", "s1"));
}

#[test]
fn a_clones_names_and_addresses_are_checked() {
    let mut c = Cluster::new();
    c.ok(create_network("lan", 0, "10.1.0.0/24"));
    c.ok(create_with_nics("vm1", &["lan"]));
    c.run("vm1", "host1");
    c.ok(take("vm1", "nightly"));
    c.ok(news("host1", "s1", 1, SnapshotNews::Done));
    assert_eq!(
        c.refused(restore("vm1", "nightly", "vm2")),
        Code::AddressInUse,
        "a guest keeps its addresses"
    );
    stopped(&mut c);
    c.ok(restore("vm1", "nightly", ""));
    c.ok(delete("vm1"));
    c.ok(restore("vm1", "nightly", "vm2"));
    let mut c = with_snapshot();
    c.ok(create_volume("vm2-data", "", MIB));
    assert_eq!(c.refused(restore("vm1", "nightly", "vm2")), Code::VolumeExists);
    assert_eq!(
        c.refused(restore("vm1", "nightly", &"x".repeat(60))),
        Code::InvalidArgument
    );
    assert_eq!(c.refused(restore("vm1", "nightly", "UP")), Code::InvalidArgument);
}

#[test]
fn a_clone_with_addresses_of_its_own_gets_nics_for_those_that_its_guest_is_to_give_up() {
    let mut c = Cluster::new();
    c.ok(create_network("lan", 0, "10.1.0.0/24"));
    c.ok(create_with_nics("vm1", &["lan"]));
    c.run("vm1", "host1");
    c.ok(take("vm1", "nightly"));
    c.ok(news("host1", "s1", 1, SnapshotNews::Done));
    let original = c.vm("vm1").spec.clone().unwrap().nics.remove(0);
    c.ok(clone_anew("vm1", "nightly", "vm2"));
    let spec = c.vm("vm2").spec.clone().unwrap();
    let [remembered, own] = spec.nics.as_slice() else {
        panic!("{:?}", spec.nics)
    };
    assert_eq!(
        (&remembered.mac, remembered.unplugged, remembered.ip.as_str()),
        (&original.mac, true, "")
    );
    assert!(!own.unplugged && own.mac != original.mac && own.ip != original.ip && !own.ip.is_empty());
    assert_ne!(remembered.slot, own.slot);
    let revisions = (remembered.detach_revision, own.attach_revision);
    assert_eq!(revisions, (spec.devices_revision, spec.devices_revision));
    // It goes only where it is kept out of its network.
    c.ok(Kind::RegisterHost(HostSpec {
        unplugs: false,
        ..host_spec("host2")
    }));
    let fits = |host: &str| {
        let vm = c.vm("vm2");
        let purpose = purpose_of_start(&c.state, vm);
        fits(&c.state, vm.spec.as_ref().unwrap(), purpose, host).map_err(|fault| fault.message)
    };
    assert!(fits("host2").unwrap_err().contains("plug in"));
    fits("host3").unwrap();
    // However often it is tried before it begins, it has what its guest remembers.
    c.ok(place("vm2", "host1", 0));
    c.ok(report("host1", "vm2", 1, VmState::Failed));
    c.ok(start("vm2"));
    c.ok(place("vm2", "host1", 1));
    c.ok(host_down("host1"));
    c.ok(host_up("host1", "boot-2"));
    c.ok(report("host1", "vm2", 2, VmState::Failed));
    assert_eq!(c.vm("vm2").spec.as_ref().unwrap().nics, spec.nics);
    c.ok(start("vm2"));
    // Nobody else gets what either has, and the original keeps its own.
    let taken = |c: &Cluster| {
        let nics = ["vm1", "vm2", "vm3"].map(|vm| c.vm(vm).spec.clone().unwrap().nics);
        let plugged = nics.into_iter().flatten().filter(|nic| !nic.unplugged);
        plugged.map(|nic| (nic.mac, nic.ip)).collect::<Vec<_>>()
    };
    c.ok(create_with_nics("vm3", &["lan"]));
    let mut all = taken(&c);
    assert_eq!(all.len(), 3);
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 3);
    assert_eq!(State::decode(&c.state.encode()).unwrap(), c.state);
    // What its guest has given up, or its run took along, is gone.
    c.ok(place("vm2", "host1", 2));
    let number = c.vm("vm2").restore.as_ref().unwrap().number;
    c.ok(begin("host1", "vm2", 3, number));
    c.ok(report("host1", "vm2", 3, VmState::Running));
    assert_eq!(c.vm("vm2").spec.as_ref().unwrap().nics.len(), 2);
    c.ok(stop("vm2"));
    c.ok(report("host1", "vm2", 3, VmState::Stopped));
    assert_eq!(c.vm("vm2").spec.as_ref().unwrap().nics.len(), 1);
    let in_place = Kind::RestoreVm(drover_proto::v1::RestoreVm {
        vm: "vm1".into(),
        snapshot: "nightly".into(),
        new_addresses: true,
        ..Default::default()
    });
    assert_eq!(c.refused(in_place), Code::InvalidArgument);
}

#[test]
fn a_restored_run_goes_where_what_its_guest_saw_is() {
    let mut c = Cluster::new();
    let host = |name: &str, change: &dyn Fn(&mut HostSpec)| {
        let mut spec = host_spec(name);
        spec.cpu_features = vec!["ssse3".into(), "popcnt".into()];
        spec.device_model = 4;
        change(&mut spec);
        Kind::RegisterHost(spec)
    };
    for name in ["host1", "host2", "host3"] {
        c.ok(host(name, &|_| {}));
    }
    c.ok(create("vm1"));
    c.run("vm1", "host1");
    c.ok(take("vm1", ""));
    c.ok(news("host1", "s1", 1, SnapshotNews::Done));
    stopped(&mut c);
    c.ok(restore("vm1", "s1", ""));
    let place_of = |c: &Cluster| {
        let vm = c.vm("vm1");
        choose(
            &c.state,
            vm.spec.as_ref().unwrap(),
            purpose_of_start(&c.state, vm),
        )
        .map_err(|fault| fault.message)
    };
    c.ok(host("host1", &|spec| spec.cpu_features = vec!["popcnt".into()]));
    c.ok(host("host2", &|spec| spec.device_model = 3));
    assert_eq!(place_of(&c).unwrap(), "host3");
    c.ok(host("host3", &|spec| spec.pools = vec![]));
    let message = place_of(&c).unwrap_err();
    for part in [
        "host1 lacks CPU features",
        "host2 reads save-state up to version 3, snapshot s1 is of version 4",
        "host3 has no pool \"default\", in which snapshot s1 is",
    ] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(c.refused(place("vm1", "host1", 1)), Code::NoHostFits);
    c.ok(host("host3", &|spec| spec.snapshots = false));
    assert!(
        place_of(&c)
            .unwrap_err()
            .contains("host3 has an agent that knows no snapshots")
    );
    // A restored volume is not found by an agent that knows of none.
    let mut c = with_snapshot();
    c.ok(restore("vm1", "s1", ""));
    c.ok(place("vm1", "host1", 1));
    c.ok(begin("host1", "vm1", 2, 2));
    c.ok(report("host1", "vm1", 2, VmState::Running));
    let mut old = host_spec("host2");
    old.snapshots = false;
    c.ok(Kind::RegisterHost(old));
    assert_eq!(c.refused(plan("vm1", "host2")), Code::NoHostFits);
    c.ok(plan("vm1", "host3"));
}

#[test]
fn a_restored_vm_keeps_its_policy_and_its_pin_and_gets_back_the_rest() {
    let mut c = Cluster::new();
    let mut spec = VmSpec {
        host: "host2".into(),
        ..vm_spec("vm1")
    };
    spec.set_restart(RestartPolicy::OnFailure);
    c.ok(Kind::CreateVm(drover_proto::v1::CreateVm {
        spec: Some(spec),
        start: true,
    }));
    c.run("vm1", "host2");
    c.ok(take("vm1", ""));
    c.ok(news("host2", "s1", 1, SnapshotNews::Done));
    stopped(&mut c);
    c.ok(restore("vm1", "s1", ""));
    let now = c.vm("vm1").spec.clone().unwrap();
    assert_eq!(
        (now.host.as_str(), now.restart()),
        ("host2", RestartPolicy::OnFailure)
    );
    assert_eq!(c.refused(place("vm1", "host1", 1)), Code::NoHostFits, "pinned");
    c.ok(restore("vm1", "s1", "vm2"));
    assert_eq!(
        c.vm("vm2").spec.as_ref().unwrap().host,
        "",
        "a clone is pinned to none"
    );
}

#[test]
fn a_reason_from_a_host_is_bounded() {
    let mut c = cluster();
    c.ok(take("vm1", ""));
    let Kind::ReportSnapshot(mut failed) = news("host1", "s1", 1, SnapshotNews::Failed) else {
        unreachable!()
    };
    failed.reason = Some(Reason {
        code: "made_up".into(),
        message: "x".repeat(100_000),
    });
    c.ok(Kind::ReportSnapshot(failed));
    let reason = c.state.snapshot("s1").unwrap().reason.clone().unwrap();
    assert_eq!((reason.code.as_str(), reason.message.len()), ("internal", 4_096));
}
