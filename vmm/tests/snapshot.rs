//! Snapshots on real KVM: the probe guest writes flat out, keeps a journal, is taken, goes on, and goes on again from what was taken.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;
#[path = "common/process.rs"]
mod running;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{
    World, assert_intact, await_console, await_info, await_state, grant, grant_for, has_seconds, incoming,
    listen_addr, seconds, send, text,
};
use drover_proto::v1::{
    DestroyRequest, GrantRequest, OutcomeRequest, SnapshotDisk, SnapshotStage, TakeSnapshotRequest, VmmInfo,
    VmmSnapshot, VmmState, WatchInfoRequest,
};
use drover_proto::{Code, Fault};
use drover_vmm::machine::Machine;
use drover_vmm::time::{NS_PER_S, boottime_ns};
use drover_vmm::uffd::Uffd;
use running::Process;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};
use serde_json::json;

/// The disk's slot: nothing else is on the bus.
const SLOT: u32 = 1;

/// Whether snapshots can be taken here; says loudly when not.
fn possible() -> bool {
    if let Err(fault) = Uffd::open_for_writes() {
        println!("SKIPPED: {fault}");
        return false;
    }
    common::kvm()
}

macro_rules! needs_snapshots {
    () => {
        if !possible() {
            return;
        }
    };
}

/// A guest that rewrites 24 of its 64 MiB as fast as it can, and keeps a journal on `disk`.
fn busy(config: &mut serde_json::Value, disk: &Path) {
    common::flat_out(config);
    config["cmdline"] = "own=64M hot=24M rate=max disk=journal".into();
    config["disks"] = json!([{"path": disk, "serial": "journal"}]);
}

/// One with so much memory, all of it written, that its snapshot takes a while.
fn large(config: &mut serde_json::Value) {
    config["memory_mib"] = 512.into();
    config["cmdline"] = "own=448M hot=24M rate=max".into();
}

fn disk(world: &World) -> PathBuf {
    let path = world.path().join("disk.raw");
    File::create(&path).unwrap().set_len(4 << 20).unwrap();
    path
}

fn folder(world: &World, name: &str) -> PathBuf {
    let path = world.path().join(name);
    std::fs::create_dir(&path).unwrap();
    path
}

fn request(id: &str, folder: &Path, disks: &[u32]) -> TakeSnapshotRequest {
    let disk = |&slot: &u32| SnapshotDisk {
        slot,
        path: folder.join(format!("disk{slot}")).to_string_lossy().into_owned(),
    };
    TakeSnapshotRequest {
        id: id.into(),
        folder: folder.to_string_lossy().into_owned(),
        disks: disks.iter().map(disk).collect(),
    }
}

fn take(machine: &Arc<Machine>, id: &str, folder: &Path, disks: &[u32]) -> Result<VmmInfo, Fault> {
    machine.take_snapshot(&request(id, folder, disks))
}

fn told(info: &VmmInfo) -> VmmSnapshot {
    info.snapshot.clone().unwrap_or_default()
}

/// Waits for the snapshot's end, whatever it is.
fn ended(machine: &Machine) -> VmmSnapshot {
    let running = |info: &VmmInfo| told(info).stage() != SnapshotStage::Running;
    told(&await_info(machine, "end of the snapshot", running))
}

fn done(machine: &Machine) -> VmmSnapshot {
    let snapshot = ended(machine);
    assert_eq!(snapshot.stage(), SnapshotStage::Done, "{snapshot:?}");
    assert_eq!(snapshot.bytes_done, snapshot.bytes_total);
    snapshot
}

/// Two more lines of a second, and nothing was ever lost.
fn assert_goes_on(machine: &Machine) -> String {
    let lines = seconds(&text(machine.console()), "t").len();
    let seen = await_console(machine.console(), "two more lines", has_seconds(lines + 2));
    assert_intact(&seen);
    assert!(
        seconds(&seen, "disk_lost").iter().all(|&lost| lost == 0),
        "{seen}"
    );
    seen
}

fn restored(
    world: &World,
    epoch: u64,
    folder: &Path,
    change: impl FnOnce(&mut serde_json::Value),
) -> Arc<Machine> {
    world.machine("host1", epoch, |config| {
        change(config);
        config["restore"] = json!({ "folder": folder });
    })
}

/// Why the machine could not be built.
fn refused(machine: &Machine) -> Fault {
    let info = machine.info();
    assert_eq!(info.state(), VmmState::Failed);
    let reason = info.reason.unwrap();
    Fault::new(Code::parse(&reason.code).unwrap(), reason.message)
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn a_guest_that_writes_flat_out_loses_nothing_and_goes_on_from_its_snapshot_again_and_again() {
    needs_snapshots!();
    let world = World::new();
    let (path, folder) = (disk(&world), folder(&world, "s1"));
    let source = world.machine("host1", 1, |config| busy(config, &path));
    grant(&source);
    await_console(source.console(), "second line", has_seconds(2));
    take(&source, "s1", &folder, &[SLOT]).unwrap();
    assert_eq!(
        take(&source, "s1", &folder, &[SLOT])
            .unwrap()
            .snapshot
            .unwrap()
            .id,
        "s1"
    );
    let snapshot = done(&source);
    println!("{snapshot:?}");
    assert!(snapshot.paused_us > 0 && snapshot.bytes_total == (160 << 20) + (4 << 20));
    let blocks = std::fs::metadata(folder.join("memory")).unwrap().blocks() * 512;
    assert!(blocks < 120 << 20, "zeroes are holes: {blocks}");
    let then = assert_goes_on(&source);
    source.destroy(None);
    drop(source);
    // From the same snapshot twice: it is only read.
    for epoch in 2..=3 {
        std::fs::copy(folder.join("disk1"), &path).unwrap();
        let machine = restored(&world, epoch, &folder, |config| busy(config, &path));
        assert_eq!(machine.info().state(), VmmState::Waiting, "{:?}", machine.info());
        let before = seconds(&text(machine.console()), "t").len();
        assert!(
            before > 0 && before < seconds(&then, "t").len(),
            "the console is of the instant"
        );
        grant(&machine);
        let seen = await_console(machine.console(), "lines after it", has_seconds(before + 3));
        println!("{seen}");
        assert_intact(&seen);
        assert!(
            seconds(&seen, "disk_lost").iter().all(|&lost| lost == 0),
            "{seen}"
        );
        assert!(seconds(&seen, "disk_seq").is_sorted());
        // The journal went on, and so does a second snapshot, of a guest that was restored.
        let again = folder.with_file_name(format!("again{epoch}"));
        std::fs::create_dir(&again).unwrap();
        take(&machine, "s2", &again, &[SLOT]).unwrap();
        done(&machine);
        assert_goes_on(&machine);
        machine.destroy(None);
    }
}

#[test]
fn what_was_damaged_is_refused_with_file_and_place_and_what_does_not_fit_with_the_difference() {
    needs_snapshots!();
    let world = World::new();
    let (path, folder) = (disk(&world), folder(&world, "s1"));
    let source = world.machine("host1", 1, |config| busy(config, &path));
    grant(&source);
    await_console(source.console(), "line", has_seconds(1));
    take(&source, "s1", &folder, &[SLOT]).unwrap();
    done(&source);
    source.destroy(None);
    drop(source);
    std::fs::copy(folder.join("disk1"), &path).unwrap();
    let place = |name: &str| {
        let size = std::fs::metadata(folder.join(name)).unwrap().len();
        if name == "memory" {
            (5 << 20) + 17
        } else {
            size / 2
        }
    };
    let mut epoch = 2;
    let mut refusal = |change: &dyn Fn(&mut serde_json::Value)| {
        epoch += 1;
        refused(&restored(&world, epoch, &folder, |config| {
            busy(config, &path);
            change(config);
        }))
    };
    for name in ["memory", "state", "manifest"] {
        flip(&folder.join(name), place(name));
        let fault = refusal(&|_| {});
        println!("{fault}");
        assert_eq!(fault.code, Code::SnapshotDamaged);
        assert!(fault.message.contains(name), "{fault}");
        assert!(
            name != "memory" || fault.message.contains("bytes 5242880..6291456"),
            "{fault}"
        );
        flip(&folder.join(name), place(name));
    }
    flip(&path, 5);
    let fault = refusal(&|_| {});
    assert_eq!(fault.code, Code::SnapshotDamaged);
    assert!(
        fault.message.contains("disk.raw in slot 1: bytes 0..1048576"),
        "{fault}"
    );
    flip(&path, 5);
    let wrong: [(&str, serde_json::Value); 4] = [
        ("memory_mib", 161.into()),
        ("vcpus", 2.into()),
        ("cpu_profile", "host".into()),
        ("disks", json!([])),
    ];
    for (field, value) in wrong {
        let fault = refusal(&|config| config[field] = value.clone());
        println!("{fault}");
        assert_eq!(fault.code, Code::BadState, "{fault}");
    }
    let whole = restored(&world, 20, &folder, |config| busy(config, &path));
    assert_eq!(whole.info().state(), VmmState::Waiting, "{:?}", whole.info());
}

#[test]
fn while_a_snapshot_is_under_way_nothing_is_moved_or_changed_and_after_its_cancel_all_is_as_before() {
    needs_snapshots!();
    let world = World::new();
    let (first, second) = (folder(&world, "s1"), folder(&world, "s2"));
    let source = world.machine("host1", 1, large);
    let early = take(&source, "s0", &first, &[]).unwrap_err();
    assert_eq!(early.code, Code::VmState, "it does not run yet");
    grant(&source);
    await_console(source.console(), "line", has_seconds(1));
    assert_eq!(
        take(&source, "s0", &first, &[SLOT]).unwrap_err().code,
        Code::InvalidArgument
    );
    take(&source, "s1", &first, &[]).unwrap();
    assert_eq!(
        take(&source, "s2", &second, &[]).unwrap_err().code,
        Code::SnapshotActive
    );
    let target = world.machine("host2", 2, |config| {
        large(config);
        incoming(config, "host1");
    });
    let addr = listen_addr(&target);
    assert_eq!(
        send(&source, addr.clone(), "host2").unwrap_err().code,
        Code::SnapshotActive
    );
    source.cancel_snapshot("s9");
    source.cancel_snapshot("s1");
    assert_eq!(ended(&source).stage(), SnapshotStage::Cancelled);
    assert_eq!(
        std::fs::read_dir(&first).unwrap().count(),
        0,
        "what it made is removed"
    );
    assert_goes_on(&source);
    send(&source, addr, "host2").unwrap();
    assert_eq!(
        take(&source, "s2", &second, &[]).unwrap_err().code,
        Code::MigrationActive
    );
    await_state(&target, VmmState::Ready);
    let told = OutcomeRequest {
        migration: "m1".into(),
        committed: true,
    };
    source.outcome(&told).unwrap();
    grant(&target);
    assert_goes_on(&target);
}

#[test]
fn a_guest_frozen_by_its_lease_is_not_taken_to_the_end_before_its_next_one() {
    needs_snapshots!();
    let world = World::new();
    let (path, folder) = (disk(&world), folder(&world, "s1"));
    let source = world.machine("host1", 1, |config| busy(config, &path));
    let lease = Duration::from_millis(200);
    let give = || grant_for(&source, u64::try_from(lease.as_nanos()).unwrap());
    let up = |machine: &Machine| !seconds(&text(machine.console()), "t").is_empty();
    while !up(&source) {
        give();
        std::thread::sleep(lease / 10);
    }
    // The lease ends while memory is copied, or soon after; complete it cannot be before.
    give();
    take(&source, "s1", &folder, &[SLOT]).unwrap();
    let frozen = await_info(&source, "freeze", |info| {
        info.state() == VmmState::Frozen || told(info).stage() == SnapshotStage::Done
    });
    if told(&frozen).stage() == SnapshotStage::Done {
        return println!("SKIPPED: this host takes a snapshot of 160 MiB within a lease of {lease:?}");
    }
    await_info(&source, "all copied", |info| {
        let told = told(info);
        told.bytes_total > 0 && told.bytes_done == told.bytes_total
    });
    assert_eq!(told(&source.info()).stage(), SnapshotStage::Running);
    assert!(!folder.join("manifest").exists());
    assert_eq!(source.info().state(), VmmState::Frozen);
    grant(&source);
    done(&source);
    assert_goes_on(&source);
}

/// A folder in a tmpfs of `bytes` that is mounted nowhere, and what holds it.
fn small_folder(bytes: u64) -> std::io::Result<(std::os::fd::OwnedFd, PathBuf)> {
    let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, c"size", &*bytes.to_string())?;
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
    Ok((mount, path))
}

#[test]
fn a_full_disk_fails_the_snapshot_with_its_reason_and_the_guest_and_the_next_one_go_on() {
    needs_snapshots!();
    let world = World::new();
    let path = disk(&world);
    let (_mount, full) = match small_folder(8 << 20) {
        Ok(small) => small,
        Err(error) => return println!("SKIPPED: no tmpfs of its own: {error}"),
    };
    let source = world.machine("host1", 1, |config| busy(config, &path));
    grant(&source);
    await_console(source.console(), "line", has_seconds(1));
    take(&source, "s1", &full, &[SLOT]).unwrap();
    let failed = ended(&source);
    println!("{failed:?}");
    assert_eq!(failed.stage(), SnapshotStage::Failed);
    let reason = failed.reason.unwrap();
    assert_eq!(reason.code, Code::SnapshotFailed.as_str());
    assert!(
        reason.message.contains("memory: No space left"),
        "{}",
        reason.message
    );
    assert_eq!(
        std::fs::read_dir(&full).unwrap().count(),
        0,
        "the room is given back"
    );
    assert_eq!(source.info().state(), VmmState::Running);
    assert_goes_on(&source);
    take(&source, "s2", &folder(&world, "s2"), &[SLOT]).unwrap();
    done(&source);
    assert_goes_on(&source);
}

async fn watch(
    vmm: &mut drover_proto::v1::vmm_client::VmmClient<tonic::transport::Channel>,
    done: impl Fn(&VmmInfo) -> bool,
) -> VmmInfo {
    let (began, mut seen_seq) = (Instant::now(), 0);
    loop {
        let request = WatchInfoRequest {
            seen_seq,
            wait_ms: 1_000,
        };
        let info = vmm.watch_info(request).await.unwrap().into_inner();
        if done(&info) {
            return info;
        }
        assert!(began.elapsed() < common::PATIENCE, "{info:?}");
        seen_seq = info.seq;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_is_killed_in_the_middle_leaves_no_snapshot_and_its_disk_is_the_guests() {
    needs_snapshots!();
    let world = World::new();
    let (path, folder) = (disk(&world), folder(&world, "s1"));
    let config = |config: &mut serde_json::Value| {
        large(config);
        config["cmdline"] = "own=448M hot=24M rate=max disk=journal".into();
        config["disks"] = json!([{"path": path}]);
    };
    let mut process = Process::start(&world.write("host1", 1, config));
    let mut vmm = process.client().await;
    let lease = GrantRequest {
        epoch: 1,
        deadline_boottime_ns: boottime_ns() + 600 * NS_PER_S,
    };
    vmm.grant(lease).await.unwrap();
    watch(&mut vmm, |info| info.console_next > 0).await;
    let began = Instant::now();
    while !path.metadata().is_ok_and(|about| about.blocks() > 64) {
        assert!(began.elapsed() < common::PATIENCE, "no journal");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    vmm.take_snapshot(request("s1", &folder, &[SLOT])).await.unwrap();
    let info = watch(&mut vmm, |info| told(info).bytes_done > 0).await;
    assert_eq!(
        told(&info).stage(),
        SnapshotStage::Running,
        "too fast to be killed"
    );
    process.child.kill().unwrap();
    process.child.wait().unwrap();
    assert!(folder.join("memory").exists() && !folder.join("manifest").exists());
    let fault = refused(&restored(&world, 2, &folder, config));
    assert_eq!(fault.code, Code::SnapshotDamaged);
    assert!(fault.message.contains("no snapshot"), "{fault}");
    // The guest's next boot finds its journal whole.
    let machine = world.machine("host1", 3, config);
    grant(&machine);
    let seen = await_console(machine.console(), "journal", |text| text.contains("probe disk "));
    assert!(
        seen.lines()
            .any(|line| line.starts_with("probe disk ") && line.ends_with(" lost=0")),
        "{seen}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_destroyed_in_the_middle_ends_at_once() {
    needs_snapshots!();
    let world = World::new();
    let folder = folder(&world, "s1");
    let mut process = Process::start(&world.write("host1", 1, large));
    let mut vmm = process.client().await;
    let lease = GrantRequest {
        epoch: 1,
        deadline_boottime_ns: boottime_ns() + 600 * NS_PER_S,
    };
    vmm.grant(lease).await.unwrap();
    watch(&mut vmm, |info| info.console_next > 0).await;
    vmm.take_snapshot(request("s1", &folder, &[])).await.unwrap();
    vmm.destroy(DestroyRequest::default()).await.unwrap();
    assert!(process.child.wait().unwrap().success());
    assert!(!folder.join("manifest").exists());
}

/// What a snapshot costs the guest, printed: `cargo test -p drover-vmm --test snapshot -- --ignored --nocapture what_a_snapshot_costs`.
#[test]
#[ignore = "measures, which takes a quiet machine"]
fn what_a_snapshot_costs() {
    needs_snapshots!();
    for (memory_mib, own, hot) in [
        (256, "192M", "192M"),
        (1024, "896M", "64M"),
        (1024, "896M", "896M"),
    ] {
        for round in 1..=3 {
            let world = World::new();
            let folder = folder(&world, "s1");
            let machine = world.machine("host1", 1, |config| {
                config["memory_mib"] = memory_mib.into();
                config["cmdline"] = format!("own={own} hot={hot} rate=max").into();
            });
            grant(&machine);
            let before = await_console(machine.console(), "lines before", has_seconds(4));
            let began = Instant::now();
            take(&machine, "s1", &folder, &[]).unwrap();
            let snapshot = done(&machine);
            let took = began.elapsed();
            let lines = seconds(&text(machine.console()), "t").len();
            let after = await_console(machine.console(), "lines after", has_seconds(lines + 4));
            assert_intact(&after);
            let (written, gaps) = (seconds(&after, "written"), seconds(&after, "gap_us"));
            let count = seconds(&before, "t").len();
            println!(
                "memory={memory_mib}MiB hot={hot} round={round} paused_us={} took_ms={} stored_mib={} written/s before={:?} since={:?} gaps_us since={:?}",
                snapshot.paused_us,
                took.as_millis(),
                snapshot.bytes_stored >> 20,
                &written[count - 3..count],
                &written[count..],
                &gaps[count..],
            );
            machine.destroy(None);
        }
    }
}
