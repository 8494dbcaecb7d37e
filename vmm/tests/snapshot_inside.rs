//! Snapshots by VMMs in their sandbox, which make no file: their agent, here the test, makes and hands in, and names the manifest.
//!
//! Real processes on real KVM, each in its own cage. What a snapshot is in itself: `snapshot.rs`.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

#[path = "common/caged.rs"]
mod cage;
mod common;
#[path = "common/inside.rs"]
mod inside;
#[path = "common/process.rs"]
mod running;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use cage::{hand_in, hand_snapshot, hand_snapshot_files, stranger};
use common::{PATIENCE, World, has_seconds, seconds};
use drover_proto::descriptors::Kind;
use drover_proto::v1::{
    CancelSnapshotRequest, SnapshotDisk, SnapshotStage, TakeSnapshotRequest, VmmInfo, VmmSnapshot, VmmState,
};
use drover_proto::{Code, Fault};
use inside::Caged;
use nix::libc;
use running::watch;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};
use serde_json::json;

/// The disk's slot: nothing else is on the bus.
const SLOT: u32 = 1;
/// A short lease.
const LEASE: Duration = Duration::from_secs(1);

/// Whether snapshots can be taken inside here; says loudly when not.
fn possible() -> bool {
    if let Err(error) = File::open("/dev/userfaultfd") {
        println!("SKIPPED: /dev/userfaultfd: {error}");
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
    fs::create_dir(&path).unwrap();
    path
}

async fn take(caged: &mut Caged, id: &str, folder: &Path, slots: &[u32]) -> Result<(), Fault> {
    let disk = |&slot: &u32| SnapshotDisk {
        slot,
        path: folder.join(format!("disk{slot}")).to_string_lossy().into_owned(),
    };
    let request = TakeSnapshotRequest {
        id: id.into(),
        folder: folder.to_string_lossy().into_owned(),
        disks: slots.iter().map(disk).collect(),
    };
    let answer = caged.vmm.take_snapshot(request).await;
    answer.map(drop).map_err(|status| Fault::from(&status))
}

fn told(info: &VmmInfo) -> VmmSnapshot {
    info.snapshot.clone().unwrap_or_default()
}

async fn ended(caged: &mut Caged) -> VmmSnapshot {
    let ended = |info: &VmmInfo| told(info).stage() != SnapshotStage::Running;
    told(&watch(&mut caged.vmm, "end of the snapshot", ended).await)
}

async fn sealed(caged: &mut Caged) {
    let snapshot = ended(caged).await;
    assert_eq!(snapshot.stage(), SnapshotStage::Sealed, "{snapshot:?}");
    assert_eq!(snapshot.bytes_done, snapshot.bytes_total);
}

/// What the agent does when the VMM has sealed it.
fn name(folder: &Path) {
    assert!(!folder.join("manifest").exists(), "a VMM inside names nothing");
    fs::rename(folder.join("manifest.new"), folder.join("manifest")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writing_guest_is_taken_inside_and_goes_on_from_that_inside_and_is_taken_again() {
    needs_snapshots!();
    let world = World::new();
    let (path, first) = (disk(&world), folder(&world, "s1"));
    let mut source = Caged::start(&world, "host1", 1, |config| busy(config, &path)).await;
    let info = watch(&mut source.vmm, "info", |_| true).await;
    assert!(info.snapshot_files_handed);
    source.grant().await;
    source.console("second line", has_seconds(2)).await;
    hand_snapshot(&source.folder, &first, &[SLOT]);
    take(&mut source, "s1", &first, &[SLOT]).await.unwrap();
    take(&mut source, "s1", &first, &[SLOT])
        .await
        .expect("it is the one under way");
    sealed(&mut source).await;
    assert!(
        fs::metadata(first.join("memory")).unwrap().blocks() * 512 < 120 << 20,
        "zeroes are holes"
    );
    let before = seconds(&source.text().await, "t").len();
    source.more_seconds().await;
    drop(source);
    name(&first);

    fs::copy(first.join("disk1"), &path).unwrap();
    let mut restored = Caged::start(&world, "host1", 2, |config| {
        busy(config, &path);
        config["restore"] = json!({ "folder": first });
    })
    .await;
    restored.state(VmmState::Waiting).await;
    let then = seconds(&restored.text().await, "t").len();
    assert!(then > 0 && then <= before, "the console is of the instant");
    restored.grant().await;
    let seen = restored.console("lines after it", has_seconds(then + 3)).await;
    assert!(
        seconds(&seen, "disk_lost").iter().all(|&lost| lost == 0),
        "{seen}"
    );
    assert!(seconds(&seen, "disk_seq").is_sorted(), "{seen}");
    let again = folder(&world, "s2");
    hand_snapshot(&restored.folder, &again, &[SLOT]);
    take(&mut restored, "s2", &again, &[SLOT]).await.unwrap();
    sealed(&mut restored).await;
    restored.more_seconds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_what_it_takes_it_is_refused_by_name_and_the_guest_runs_on() {
    needs_snapshots!();
    let world = World::new();
    let (path, folder) = (disk(&world), folder(&world, "s1"));
    let mut caged = Caged::start(&world, "host1", 1, |config| busy(config, &path)).await;
    caged.grant().await;
    caged.console("line", has_seconds(1)).await;
    let refused = take(&mut caged, "s1", &folder, &[SLOT]).await.unwrap_err();
    assert_eq!(refused.code, Code::Denied, "{refused}");
    assert!(refused.message.contains("has not handed in"), "{refused}");
    // Of another folder, without a disk's, without the device, and one that holds something.
    hand_snapshot(&caged.folder, world.path(), &[SLOT]);
    let refused = take(&mut caged, "s1", &folder, &[SLOT]).await.unwrap_err();
    assert_eq!(refused.code, Code::Denied, "{refused}");
    hand_snapshot(&caged.folder, &folder, &[]);
    let refused = take(&mut caged, "s1", &folder, &[SLOT]).await.unwrap_err();
    assert!(
        refused.code == Code::Denied && refused.message.contains("disk1"),
        "{refused}"
    );
    hand_snapshot_files(&caged.folder, &folder, &[SLOT]);
    let refused = take(&mut caged, "s1", &folder, &[SLOT]).await.unwrap_err();
    assert!(
        refused.code == Code::Denied && refused.message.contains("userfaultfd"),
        "{refused}"
    );
    fs::write(folder.join("disk1"), "of somebody").unwrap();
    hand_snapshot(&caged.folder, &folder, &[SLOT]);
    let refused = take(&mut caged, "s1", &folder, &[SLOT]).await.unwrap_err();
    assert_eq!(refused.code, Code::InvalidArgument, "{refused}");
    assert_eq!(fs::read(folder.join("disk1")).unwrap(), b"of somebody");
    fs::write(folder.join("disk1"), "").unwrap();
    let other = File::open("/dev/null").unwrap();
    hand_snapshot(&caged.folder, &folder, &[SLOT]);
    assert_eq!(hand_in(&caged.folder, Kind::Uffd, "", &[other.into()]), "ok");
    let refused = take(&mut caged, "s1", &folder, &[SLOT]).await.unwrap_err();
    assert_eq!(refused.code, Code::SnapshotUnavailable, "{refused}");
    hand_snapshot(&caged.folder, &folder, &[SLOT]);
    take(&mut caged, "s1", &folder, &[SLOT]).await.unwrap();
    sealed(&mut caged).await;
    caged.more_seconds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_frozen_by_its_lease_is_not_sealed_before_its_next_one() {
    needs_snapshots!();
    if !cfg!(feature = "chaos") {
        return println!("SKIPPED: only a build with the feature chaos waits before the seal");
    }
    let world = World::new();
    let (path, points, folder) = (disk(&world), folder(&world, "points"), folder(&world, "s1"));
    let point = points.join("snapshot.written");
    File::create(&point).unwrap();
    let mut caged = Caged::start_with(
        &world,
        "host1",
        1,
        |config| busy(config, &path),
        |command| command.env("DROVER_POINTS_DIR", &points),
    )
    .await;
    while seconds(&caged.text().await, "t").is_empty() {
        caged.grant_for(LEASE).await;
        tokio::time::sleep(LEASE / 10).await;
    }
    hand_snapshot(&caged.folder, &folder, &[SLOT]);
    caged.grant_for(LEASE).await;
    take(&mut caged, "s1", &folder, &[SLOT]).await.unwrap();
    // All is copied and on the medium but the manifest, and the lease ends.
    let began = Instant::now();
    while !points.join("snapshot.written.reached").exists() {
        assert!(began.elapsed() < PATIENCE, "it is not written");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    caged.state(VmmState::Frozen).await;
    fs::remove_file(&point).unwrap();
    // It asks for the seal every 50 ms.
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(25)).await;
        let info = watch(&mut caged.vmm, "info", |_| true).await;
        assert_eq!(told(&info).stage(), SnapshotStage::Running);
        assert_eq!(fs::metadata(folder.join("manifest.new")).unwrap().len(), 0);
    }
    caged.grant().await;
    sealed(&mut caged).await;
    assert!(fs::metadata(folder.join("manifest.new")).unwrap().len() > 0);
    caged.more_seconds().await;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_or_a_cancel_gives_the_room_back_and_the_guest_goes_on() {
    needs_snapshots!();
    let world = World::new();
    let (_mount, full) = match small_folder(8 << 20) {
        Ok(small) => small,
        Err(error) => return println!("SKIPPED: no tmpfs of its own: {error}"),
    };
    let mut caged = Caged::start(&world, "host1", 1, large).await;
    caged.grant().await;
    caged.console("line", has_seconds(1)).await;
    hand_snapshot(&caged.folder, &full, &[]);
    take(&mut caged, "s1", &full, &[]).await.unwrap();
    let failed = ended(&mut caged).await;
    assert_eq!(failed.stage(), SnapshotStage::Failed);
    let reason = failed.reason.unwrap();
    assert_eq!(reason.code, Code::SnapshotFailed.as_str());
    assert!(
        reason.message.contains("memory: No space left"),
        "{}",
        reason.message
    );
    assert_eq!(
        fs::metadata(full.join("memory")).unwrap().blocks(),
        0,
        "the room is given back"
    );
    let folder = folder(&world, "s2");
    hand_snapshot(&caged.folder, &folder, &[]);
    take(&mut caged, "s2", &folder, &[]).await.unwrap();
    let id = "s2".into();
    caged
        .vmm
        .cancel_snapshot(CancelSnapshotRequest { id })
        .await
        .unwrap();
    assert_eq!(ended(&mut caged).await.stage(), SnapshotStage::Cancelled);
    for name in ["memory", "state", "manifest.new"] {
        assert_eq!(fs::metadata(folder.join(name)).unwrap().blocks(), 0, "{name}");
    }
    caged.more_seconds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_leads_out_ends_the_process_whichever_of_a_snapshots_threads_tries_it() {
    if !cfg!(feature = "chaos") {
        return println!("SKIPPED: only a build with the feature chaos makes attempts");
    }
    needs_snapshots!();
    let world = World::new();
    let (_listener, addr) = stranger();
    let tcp = format!("tcp={}", addr.port());
    let mut epoch = 0;
    for thread in ["snapshot", "snapshot-memory", "snapshot-writer"] {
        for what in ["exec=/bin/true", "fork", "executable", "socket", &tcp] {
            epoch += 1;
            let folder = folder(&world, &format!("s{epoch}"));
            let small = |config: &mut serde_json::Value| {
                config["memory_mib"] = 16.into();
                config["cmdline"] = "own=1M".into();
            };
            let attempt = format!("{thread}:{what}");
            let mut caged = Caged::start_with(&world, "host1", epoch, small, |command| {
                command.env("DROVER_ATTEMPT", &attempt).stderr(Stdio::inherit())
            })
            .await;
            caged.grant().await;
            caged.state(VmmState::Running).await;
            hand_snapshot(&caged.folder, &folder, &[]);
            // The process may be gone before it has answered.
            let _ = take(&mut caged, "s1", &folder, &[]).await;
            let status = caged.process.child.wait().unwrap();
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{attempt}: {status}");
            assert!(!folder.join("manifest").exists());
        }
    }
}
