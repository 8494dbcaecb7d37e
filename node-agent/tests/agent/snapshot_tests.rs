//! Snapshots taken, ended and removed; runs that begin as one, and may not run before the controllers say so.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use drover_proto::Code;
use drover_proto::v1::*;

use crate::fake_fleet::{Call, Script};
use crate::fake_vmm::INSIDE;
use crate::world::{World, kill_9, run};

const BYTES: u64 = 4 << 20;

fn folder(world: &World) -> PathBuf {
    world.config.pools["default"].join(".snapshots/test/s7")
}

fn snapshot() -> Snapshot {
    Snapshot {
        id: "s7".into(),
        vm: "vm1".into(),
        pool: "default".into(),
        host: "host1".into(),
        epoch: 1,
        ..Snapshot::default()
    }
}

/// vm1, its disks the volumes `data`, written to, and `base`, read.
fn with_disks(content: u64) -> HostDesired {
    let disk = |volume: &str| VmDisk {
        volume: volume.into(),
        read_only: volume == "base",
        ..VmDisk::default()
    };
    let volume = |name: &str| Volume {
        name: name.into(),
        pool: "default".into(),
        size_bytes: BYTES,
        content: if name == "data" { content } else { 0 },
        ..Volume::default()
    };
    let mut desired = run(1, None);
    let vm = &mut desired.vms[0];
    vm.spec.as_mut().unwrap().disks = vec![disk("data"), disk("base")];
    vm.volumes = vec![volume("data"), volume("base")];
    desired
}

fn taken(script: &mut Script) {
    script.desired = with_disks(0);
    script.desired.vms[0].snapshot = Some(snapshot());
    script.grants = vec![("vm1".into(), 1)];
}

fn removal(script: &mut Script) {
    script.desired.vms[0].snapshot = None;
    script.desired.removals = vec![Removal {
        pool: "default".into(),
        snapshot: "s7".into(),
        ..Removal::default()
    }];
}

async fn until_news(world: &World, news: SnapshotNews) -> ReportSnapshotRequest {
    let is_it = |call: &Call| match call {
        Call::Snapshot(report) if report.news() == news => Some(report.clone()),
        _ => None,
    };
    world.fleet.until(&format!("{news:?}"), is_it).await
}

fn is_taken(info: &VmmInfo) -> bool {
    info.snapshot.is_some()
}

async fn times_asked(world: &World) -> usize {
    let requests = world.requests("e1-start").await;
    requests
        .lines()
        .filter(|line| line.starts_with("snapshot"))
        .count()
}

pub async fn a_snapshot_is_taken_once_followed_and_its_end_reported() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(taken);
    world.until_vmm("e1-start", "taken", is_taken).await;
    let mode = folder(&world).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o700);
    assert!(folder(&world).join("disk-1.raw").exists());
    assert!(!folder(&world).join("disk-2.raw").exists(), "it only reads that");
    world.happen("e1-start", "half-way").await;
    let half = |call: &Call| match call {
        Call::Snapshot(report) if report.progress.is_some_and(|progress| progress.bytes_done == 50) => {
            Some(())
        }
        _ => None,
    };
    world.fleet.until("how far it is", half).await;
    world.happen("e1-start", "snapshot-done").await;
    let done = until_news(&world, SnapshotNews::Done).await;
    assert_eq!(
        (
            done.snapshot.as_str(),
            done.epoch,
            done.bytes_stored,
            done.paused_us
        ),
        ("s7", 1, 60, 700)
    );
    assert_eq!(times_asked(&world).await, 1);
}

pub async fn what_a_vmm_has_done_while_no_agent_watched_the_next_one_reports() {
    let world = World::new().await;
    let agent = world.agent().await;
    world.fleet.say(taken);
    world.until_vmm("e1-start", "taken", is_taken).await;
    drop(agent);
    world.happen("e1-start", "snapshot-done").await;
    let _agent = world.agent().await;
    until_news(&world, SnapshotNews::Done).await;
    assert_eq!(times_asked(&world).await, 1);
    assert!(folder(&world).join("memory").exists());
}

pub async fn a_snapshot_that_fails_or_is_refused_is_reported_with_its_reason() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(taken);
    world.until_vmm("e1-start", "taken", is_taken).await;
    world.happen("e1-start", "snapshot-failed").await;
    let reason = until_news(&world, SnapshotNews::Failed).await.reason.unwrap();
    assert_eq!(reason.message, "no room");

    let world = World::new().await;
    std::fs::create_dir_all(folder(&world)).unwrap();
    std::fs::write(folder(&world).join("memory"), "of an agent that died").unwrap();
    let _agent = world.agent().await;
    world.fleet.say(taken);
    let reason = until_news(&world, SnapshotNews::Failed).await.reason.unwrap();
    assert_eq!(reason.code, Code::SnapshotFailed.as_str());
    assert!(
        folder(&world).join("memory").exists(),
        "it is not cleared unasked"
    );
}

pub async fn a_snapshot_that_nobody_waits_for_is_cancelled_and_then_removed() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(taken);
    world.until_vmm("e1-start", "taken", is_taken).await;
    world.fleet.say(removal);
    let removed = until_news(&world, SnapshotNews::Removed).await.removal.unwrap();
    assert_eq!(removed.snapshot, "s7");
    assert!(!folder(&world).exists());
    assert!(world.requests("e1-start").await.contains("cancel s7"));
}

/// A world whose VMMs are in their sandbox and can be handed what a snapshot takes; says loudly when not.
async fn caged() -> Option<World> {
    if let Err(error) = std::fs::File::open("/dev/userfaultfd") {
        println!("SKIPPED: /dev/userfaultfd: {error}");
        return None;
    }
    Some(World::caged(INSIDE).await)
}

fn is_named(world: &World) -> bool {
    folder(world).join("manifest").exists()
}

pub async fn what_a_vmm_in_its_sandbox_has_sealed_is_named_before_it_is_reported() {
    let Some(world) = caged().await else { return };
    let _agent = world.agent().await;
    world.fleet.say(taken);
    world.until_vmm("e1-start", "taken", is_taken).await;
    for name in ["memory", "state", "manifest.new", "disk-1.raw"] {
        let mode = folder(&world).join(name).metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{name}");
    }
    assert!(!folder(&world).join("disk-2.raw").exists(), "it only reads that");
    assert!(!is_named(&world));
    world.happen("e1-start", "snapshot-sealed").await;
    let done = until_news(&world, SnapshotNews::Done).await;
    assert_eq!((done.snapshot.as_str(), done.bytes_stored), ("s7", 60));
    assert_eq!(std::fs::read(folder(&world).join("manifest")).unwrap(), b"whole");
    assert!(!folder(&world).join("manifest.new").exists());
    assert_eq!(std::fs::read(folder(&world).join("disk-1.raw")).unwrap(), b"1");
    assert_eq!(times_asked(&world).await, 1);
}

pub async fn an_agent_that_dies_before_or_after_the_manifest_is_named_leaves_the_rest_to_the_next() {
    for named_before in [false, true] {
        let Some(world) = caged().await else { return };
        let agent = world.agent().await;
        world.fleet.say(taken);
        world.until_vmm("e1-start", "taken", is_taken).await;
        drop(agent);
        world.happen("e1-start", "snapshot-sealed").await;
        assert!(!is_named(&world), "only an agent names it");
        if named_before {
            let (unnamed, named) = (
                folder(&world).join("manifest.new"),
                folder(&world).join("manifest"),
            );
            std::fs::rename(unnamed, named).unwrap();
        }
        let _agent = world.agent().await;
        until_news(&world, SnapshotNews::Done).await;
        assert_eq!(std::fs::read(folder(&world).join("manifest")).unwrap(), b"whole");
        assert_eq!(times_asked(&world).await, 1);
    }
}

pub async fn what_cannot_be_named_is_no_snapshot() {
    let Some(world) = caged().await else { return };
    let _agent = world.agent().await;
    world.fleet.say(taken);
    world.until_vmm("e1-start", "taken", is_taken).await;
    std::fs::remove_file(folder(&world).join("manifest.new")).unwrap();
    world.happen("e1-start", "snapshot-sealed").await;
    let ended = |call: &Call| match call {
        Call::Snapshot(report) if report.news() != SnapshotNews::Progress => Some(report.clone()),
        _ => None,
    };
    let told = world.fleet.until("its end", ended).await;
    assert_eq!(told.news(), SnapshotNews::Failed);
    let reason = told.reason.unwrap();
    assert_eq!(reason.code, Code::SnapshotFailed.as_str());
    assert!(
        reason.message.contains("the manifest of s7"),
        "{}",
        reason.message
    );
}

pub async fn a_vmm_in_its_sandbox_of_an_older_build_takes_no_snapshot_and_the_reason_says_what_helps() {
    let world = World::caged("older").await;
    let _agent = world.agent().await;
    world.fleet.say(taken);
    let reason = until_news(&world, SnapshotNews::Failed).await.reason.unwrap();
    assert_eq!(reason.code, Code::SnapshotUnavailable.as_str());
    assert!(reason.message.contains("ctl vm upgrade"), "{}", reason.message);
    assert_eq!(times_asked(&world).await, 0, "what it cannot do it is not asked");
    assert!(!folder(&world).exists());
}

/// The snapshot's folder as its VMM left it, and the desired state that restores it, as restore 9.
fn restored(world: &World) -> impl Fn(&mut Script) + use<> {
    let folder = folder(world);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("memory"), "pages").unwrap();
    std::fs::write(
        folder.join("disk-1.raw"),
        vec![7; usize::try_from(BYTES).unwrap()],
    )
    .unwrap();
    let before = world.config.pools["default"].join("data");
    std::fs::create_dir(&before).unwrap();
    std::fs::write(before.join("data.raw"), "what is there now").unwrap();
    |script: &mut Script| {
        script.desired = with_disks(9);
        script.desired.vms[0].restore = Some(Restore {
            number: 9,
            snapshot: "s7".into(),
            source: Some(snapshot()),
            ..Restore::default()
        });
        script.grants = vec![("vm1".into(), 1)];
    }
}

fn content(world: &World, name: &str) -> Vec<u8> {
    std::fs::read(world.config.pools["default"].join("data").join(name)).unwrap_or_default()
}

fn times_begun(world: &World) -> usize {
    let calls = world.fleet.calls();
    calls.iter().filter(|call| matches!(call, Call::Begin(_))).count()
}

pub async fn a_restored_run_has_its_disks_content_and_does_not_run_before_it_may() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(restored(&world));
    world.until_state("e1-start", VmmState::Waiting).await;
    let config = std::fs::read(world.folder("e1-start").join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["restore"], serde_json::json!({"folder": folder(&world)}));
    let path = config["disks"][0]["path"].as_str().unwrap();
    assert!(path.ends_with("data/data-9.raw"), "{path}");
    assert_eq!(
        content(&world, "data-9.raw"),
        std::fs::read(folder(&world).join("disk-1.raw")).unwrap()
    );
    assert_eq!(content(&world, "data.raw"), b"what is there now");
    let asked = |call: &Call| match call {
        Call::Begin(begin) => Some((begin.host.clone(), begin.epoch, begin.restore)),
        _ => None,
    };
    assert_eq!(
        world.fleet.until("asked", asked).await,
        ("host1".to_owned(), 1, 9)
    );
    // It is granted by every heartbeat; the entry is not in the log.
    world
        .fleet
        .until_calls("asked again and again", |calls| {
            calls.iter().filter(|call| matches!(call, Call::Begin(_))).count() > 2
        })
        .await;
    world.fleet.until_heartbeats(10).await;
    world.until_state("e1-start", VmmState::Waiting).await;
    world.fleet.say(|script| script.begin = Some(false));
    world.fleet.until_heartbeats(10).await;
    world.until_state("e1-start", VmmState::Waiting).await;
    world.fleet.say(|script| script.begin = Some(true));
    world.until_state("e1-start", VmmState::Running).await;
    let copied = |call: &Call| match call {
        Call::Snapshot(report) if report.restore == 9 => report.progress,
        _ => None,
    };
    assert_eq!(
        world.fleet.until("how far it is", copied).await.bytes_total,
        BYTES
    );
}

pub async fn an_agent_that_dies_before_the_beginning_leaves_it_to_the_next() {
    let world = World::new().await;
    let agent = world.agent().await;
    world.fleet.say(restored(&world));
    let info = world.until_state("e1-start", VmmState::Waiting).await;
    world
        .fleet
        .until_calls("asked", |calls| {
            calls.iter().any(|call| matches!(call, Call::Begin(_)))
        })
        .await;
    drop(agent);
    world.fleet.forget_calls();
    let agent = world.agent().await;
    world
        .fleet
        .until_calls("asked anew", |calls| {
            calls.iter().any(|call| matches!(call, Call::Begin(_)))
        })
        .await;
    world.fleet.until_heartbeats(5).await;
    world.until_state("e1-start", VmmState::Waiting).await;
    drop(agent);
    // The entry got into the log, its answer to nobody.
    world.fleet.say(|script| script.desired.vms[0].restore = None);
    let agent = world.agent().await;
    let now = world.until_state("e1-start", VmmState::Running).await;
    assert_eq!(now.pid, info.pid);
    drop(agent);
    world.fleet.forget_calls();
    let _agent = world.agent().await;
    let granted = |now: &VmmInfo| now.deadline_boottime_ns > info.deadline_boottime_ns;
    world.until_vmm("e1-start", "granted on", granted).await;
    assert_eq!(times_begun(&world), 0, "what runs is not begun again");
}

pub async fn a_restored_run_that_ends_before_its_beginning_is_reported_and_nothing_was_written_over() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(restored(&world));
    kill_9(&world.until_state("e1-start", VmmState::Waiting).await);
    world.fleet.until_vm(VmState::Failed, 1).await;
    assert_eq!(content(&world, "data.raw"), b"what is there now");

    // Its disk is gone, then its memory: the first no VMM is started for.
    for (gone, code) in [("disk-1.raw", Code::SnapshotDamaged), ("memory", Code::VmmDied)] {
        let world = World::new().await;
        let restored = restored(&world);
        std::fs::remove_file(folder(&world).join(gone)).unwrap();
        let _agent = world.agent().await;
        world.fleet.say(restored);
        let reason = world.fleet.until_vm(VmState::Failed, 1).await.reason.unwrap();
        assert_eq!(reason.code, code.as_str(), "{}", reason.message);
        assert_eq!(times_begun(&world), 0);
        assert_eq!(content(&world, "data.raw"), b"what is there now");
    }
}

pub async fn what_a_restore_has_replaced_is_removed_when_the_controllers_order_it() {
    let world = World::new().await;
    let restored = restored(&world);
    world.fleet.say(restored);
    world.fleet.say(|script| {
        script.begin = Some(true);
        script.desired.removals = vec![Removal {
            pool: "default".into(),
            volume: "data".into(),
            ..Removal::default()
        }];
    });
    let _agent = world.agent().await;
    until_news(&world, SnapshotNews::Removed).await;
    assert!(!world.config.pools["default"].join("data/data.raw").exists());
    world.until_state("e1-start", VmmState::Running).await;
    assert_eq!(content(&world, "data-9.raw").len() as u64, BYTES);
}
