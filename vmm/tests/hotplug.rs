//! Disks that come, grow and go while the probe guest runs, on real KVM, and what a migration has to do with it.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{
    World, assert_intact, await_console, await_info, await_state, grant, has_seconds, seconds, text,
};
use drover_proto::Code;
use drover_proto::v1::{
    AttachDiskRequest, DetachDiskRequest, OutcomeRequest, PowerButtonRequest, ResizeDiskRequest,
    StartOutgoingRequest, VmmDevice, VmmDeviceState, VmmDevices, VmmInfo, VmmState,
};
use drover_vmm::machine::Machine;
use serde_json::json;

const MIB: u64 = 1 << 20;

fn disk(world: &World, name: &str) -> PathBuf {
    let path = world.path().join(name);
    std::fs::File::create(&path).unwrap().set_len(4 * MIB).unwrap();
    path
}

/// A machine whose guest uses whatever disk comes, with these disks and slots from the start.
fn machine(
    world: &World,
    host: &str,
    epoch: u64,
    disks: &[(&Path, usize)],
    incoming: Option<&str>,
) -> Arc<Machine> {
    world.machine(host, epoch, |config| {
        config["cmdline"] = "own=16M hot=4M rate=20000 disk=hot-plug".into();
        let disks = disks
            .iter()
            .map(|(path, slot)| json!({"path": path, "slot": slot}));
        config["disks"] = disks.collect();
        if let Some(migration) = incoming {
            let from = if host == "host1" { "host2" } else { "host1" };
            config["incoming"] = json!({"migration": migration, "from_host": from, "listen_ip": "127.0.0.1"});
        }
    })
}

fn attach(revision: u64, slot: u32, path: &Path) -> AttachDiskRequest {
    AttachDiskRequest {
        revision,
        slot,
        path: path.to_str().unwrap().to_owned(),
        ..AttachDiskRequest::default()
    }
}

fn detach(revision: u64, slot: u32, path: &Path) -> DetachDiskRequest {
    DetachDiskRequest {
        revision,
        slot,
        path: path.to_str().unwrap().to_owned(),
    }
}

fn devices(info: &VmmInfo) -> &VmmDevices {
    info.devices.as_ref().unwrap()
}

fn slots(info: &VmmInfo) -> Vec<u32> {
    devices(info).devices.iter().map(|device| device.slot).collect()
}

fn await_slots(machine: &Machine, want: &[u32]) -> VmmInfo {
    await_info(machine, "the slots", |info| slots(info) == want)
}

fn newest(text: &str, field: &str) -> u64 {
    seconds(text, field).last().copied().unwrap_or(0)
}

fn await_growth(machine: &Machine, from: u64) -> u64 {
    let seen = await_console(machine.console(), "growth of the journal", |text| {
        newest(text, "disk_seq") > from + 8
    });
    assert_intact(&seen);
    assert!(
        seconds(&seen, "disk_lost").iter().all(|&lost| lost == 0),
        "{seen}"
    );
    newest(&seen, "disk_seq")
}

fn start_outgoing(source: &Arc<Machine>, migration: &str, target: &Machine, host: &str) {
    let info = await_info(target, "listen_addr", |info| !info.listen_addr.is_empty());
    let request = StartOutgoingRequest {
        migration: migration.into(),
        target_addr: info.listen_addr,
        target_host: host.into(),
        target_epoch: source.config().epoch + 1,
        options: None,
    };
    source.start_outgoing(request).unwrap();
    await_state(target, VmmState::Ready);
}

fn outcome(source: &Machine, migration: &str, committed: bool) {
    let migration = migration.into();
    source.outcome(&OutcomeRequest { migration, committed }).unwrap();
}

#[test]
fn a_disk_comes_moves_grows_and_goes_and_another_takes_its_slot() {
    needs_kvm!();
    let world = World::new();
    let (first, second) = (disk(&world, "first.raw"), disk(&world, "second.raw"));
    let source = machine(&world, "host1", 1, &[], None);
    grant(&source);
    await_console(source.console(), "a second", has_seconds(1));
    assert_eq!(devices(&source.info()).device_model, 1, "nothing on its bus");
    let told = source.attach_disk(&attach(1, 5, &first)).unwrap();
    let expected = VmmDevice {
        slot: 5,
        kind: "disk".into(),
        path: first.to_str().unwrap().into(),
        size_bytes: 4 * MIB,
        state: VmmDeviceState::Attached.into(),
        ..VmmDevice::default()
    };
    assert_eq!(devices(&told).devices, [expected]);
    assert!(devices(&told).heeds_slots && devices(&told).device_model == 4);
    let seq = await_growth(&source, 0);
    source.attach_disk(&attach(1, 5, &first)).unwrap();
    assert_eq!(
        source.attach_disk(&attach(1, 5, &second)).unwrap_err().code,
        Code::DeviceBusy
    );

    let target = machine(&world, "host2", 2, &[(&first, 5)], Some("m1"));
    start_outgoing(&source, "m1", &target, "host2");
    grant(&target);
    outcome(&source, "m1", true);
    let seq = await_growth(&target, seq);
    std::fs::File::options()
        .write(true)
        .open(&first)
        .unwrap()
        .set_len(8 * MIB)
        .unwrap();
    let mut grow = ResizeDiskRequest {
        slot: 5,
        path: first.to_str().unwrap().into(),
        size_bytes: 8 * MIB,
    };
    let told = target.resize_disk(&grow).unwrap();
    assert_eq!(devices(&told).devices[0].size_bytes, 8 * MIB);
    grow.size_bytes = 16 * MIB;
    assert_eq!(target.resize_disk(&grow).unwrap_err().code, Code::DiskUnusable);
    grow.size_bytes = 4 * MIB;
    let told = target.resize_disk(&grow).unwrap();
    assert_eq!(
        devices(&told).devices[0].size_bytes,
        8 * MIB,
        "a disk does not shrink"
    );
    let seq = await_growth(&target, seq);

    target.detach_disk(&detach(2, 5, &first)).unwrap();
    await_slots(&target, &[]);
    let gone = await_console(target.console(), "the end of the disk", |text| {
        text.contains("probe disk gone")
    });
    assert!(
        gone.lines()
            .any(|line| line.starts_with("probe disk gone") && line.trim_end().ends_with(" lost=0"))
    );
    // Whoever runs with it next finds it unlocked; a call that comes too late brings nothing back.
    assert_eq!(
        target.attach_disk(&attach(1, 5, &first)).unwrap_err().code,
        Code::DeviceBusy
    );
    target.attach_disk(&attach(3, 5, &second)).unwrap();
    await_slots(&target, &[5]);
    await_console(target.console(), "the second disk", |text| {
        text.matches("probe disk sectors=").count() == 2
    });
    let reader = machine(&world, "host1", 9, &[(&first, 1)], None);
    grant(&reader);
    let seen = await_console(reader.console(), "the first disk", |text| {
        text.contains("probe disk sectors=16384")
    });
    let found: u64 = seen
        .split("found_seq=")
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(found >= seq, "acknowledged {seq}:\n{seen}");
}

#[test]
fn a_vm_that_is_moved_is_given_nothing_and_a_slot_that_is_asked_for_travels() {
    needs_kvm!();
    let world = World::new();
    let (first, second) = (disk(&world, "first.raw"), disk(&world, "second.raw"));
    let source = world.machine("host1", 1, |config| {
        // This guest keeps its disk, whatever it is asked.
        config["cmdline"] = "own=16M hot=4M rate=20000 disk=journal".into();
        config["disks"] = json!([{"path": first}]);
    });
    assert_eq!(
        source.attach_disk(&attach(1, 2, &second)).unwrap_err().code,
        Code::VmState,
        "before it runs"
    );
    grant(&source);
    let seq = await_growth(&source, 0);
    let told = source.detach_disk(&detach(1, 1, &first)).unwrap();
    assert_eq!(devices(&told).devices[0].state(), VmmDeviceState::Ejecting);
    assert!(!devices(&told).heeds_slots);
    // The target was configured with a disk that the guest has not been given yet: it is left away.
    let target = machine(&world, "host2", 2, &[(&first, 1), (&second, 2)], Some("m1"));
    start_outgoing(&source, "m1", &target, "host2");
    for refused in [
        source.attach_disk(&attach(2, 2, &second)).unwrap_err(),
        source.detach_disk(&detach(2, 1, &first)).unwrap_err(),
    ] {
        assert_eq!(refused.code, Code::MigrationActive, "{refused}");
        assert!(refused.message.contains("m1"), "{refused}");
    }
    outcome(&source, "m1", false);
    await_info(&source, "the end of the migration", |info| {
        info.migration.is_none()
    });
    let seq = await_growth(&source, seq);
    drop(target);

    let target = machine(&world, "host2", 2, &[(&first, 1), (&second, 2)], Some("m2"));
    start_outgoing(&source, "m2", &target, "host2");
    grant(&target);
    outcome(&source, "m2", true);
    let info = await_slots(&target, &[1]);
    assert_eq!(devices(&info).devices[0].state(), VmmDeviceState::Ejecting);
    await_growth(&target, seq);
    target.attach_disk(&attach(2, 2, &second)).unwrap();
    assert_eq!(slots(&target.info()), [1, 2]);
}

#[test]
fn a_disk_that_another_runs_with_is_not_attached_and_the_vm_runs_on() {
    needs_kvm!();
    let world = World::new();
    let path = disk(&world, "disk.raw");
    let owner = machine(&world, "host1", 1, &[(&path, 1)], None);
    grant(&owner);
    let other = machine(&world, "host1", 2, &[], None);
    grant(&other);
    for (slot, path, code) in [
        (1, path.as_path(), Code::DiskUnusable),
        (1, Path::new("/nowhere"), Code::DiskUnusable),
        (0, path.as_path(), Code::InvalidArgument),
        (32, path.as_path(), Code::InvalidArgument),
    ] {
        assert_eq!(
            other.attach_disk(&attach(1, slot, path)).unwrap_err().code,
            code,
            "{slot} {path:?}"
        );
    }
    assert_eq!(other.info().state(), VmmState::Running);
    assert_eq!(slots(&other.info()), [] as [u32; 0]);
    drop(owner);
    other.attach_disk(&attach(1, 1, &path)).unwrap();
    await_growth(&other, 0);
}

#[test]
fn a_button_is_pressed_once_for_each_request_and_who_does_not_heed_it_runs_on() {
    needs_kvm!();
    let world = World::new();
    let machine = machine(&world, "host1", 1, &[], None);
    let press = |request| machine.power_button(&PowerButtonRequest { request });
    assert_eq!(press(1).unwrap_err().code, Code::VmState);
    grant(&machine);
    for (request, pressed) in [(1, 1), (3, 3), (2, 3)] {
        let told = press(request).unwrap();
        assert_eq!(
            (devices(&told).pressed, devices(&told).heeds_button),
            (pressed, false)
        );
    }
    await_console(machine.console(), "a second", has_seconds(1));
    assert_intact(&text(machine.console()));
}
