//! `ctl vm snapshot`.

use drover_proto::v1;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::fake::{Ended, Fake, vm};

fn snapshot(phase: v1::SnapshotPhase) -> v1::Snapshot {
    let disk = |volume: &str, read_only| v1::VmDisk {
        volume: volume.to_owned(),
        read_only,
        ..Default::default()
    };
    let volume = |name: &str| v1::Volume {
        name: name.to_owned(),
        size_bytes: 1 << 30,
        ..Default::default()
    };
    v1::Snapshot {
        id: "s7".to_owned(),
        vm: "vm1".to_owned(),
        name: "s7".to_owned(),
        pool: "default".to_owned(),
        phase: phase.into(),
        spec: Some(v1::VmSpec {
            memory_mib: 256,
            disks: vec![disk("data", false), disk("base", true)],
            ..Default::default()
        }),
        volumes: vec![volume("data"), volume("base")],
        host: "host1".to_owned(),
        epoch: 3,
        ..Default::default()
    }
}

fn under_way(bytes_done: u64) -> v1::Snapshot {
    v1::Snapshot {
        progress: Some(v1::SnapshotProgress {
            bytes_done,
            bytes_total: 4 << 20,
        }),
        ..snapshot(v1::SnapshotPhase::Creating)
    }
}

fn ready() -> v1::Snapshot {
    v1::Snapshot {
        bytes_total: 2 << 30,
        bytes_stored: 64 << 20,
        paused_us: 1_500,
        ..snapshot(v1::SnapshotPhase::Ready)
    }
}

#[test]
fn a_snapshot_is_watched_until_it_is_ready_and_asked_for_once() {
    let fake = Fake::start();
    fake.state().snapshots = vec![(
        under_way(0),
        vec![under_way(1 << 20), under_way(2 << 20), ready()],
    )];
    fake.state().lose_answers = 1;
    let ended = fake.run("vm snapshot create vm1 nightly");
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (
            Some(0),
            "nightly of vm1 is ready: 64.0 MiB in pool default; the guest stood still for 1.5 ms\n"
        ),
        "{ended:?}"
    );
    assert!(ended.stderr.contains("1.0 MiB of 4.0 MiB"), "{ended:?}");
    let state = fake.state();
    let ids: Vec<_> = state
        .calls
        .iter()
        .filter(|(call, _)| *call == "create_snapshot")
        .map(|(_, id)| id)
        .collect();
    assert!(
        ids.len() == 2 && ids[0] == ids[1] && !ids[0].is_empty(),
        "{ids:?}"
    );
}

#[test]
fn one_that_fails_ends_with_its_reason_and_one_that_is_not_waited_for_at_once() {
    let fake = Fake::start();
    let failed = v1::Snapshot {
        reason: Some(v1::Reason {
            code: "snapshot_failed".to_owned(),
            message: "no room".to_owned(),
        }),
        ..snapshot(v1::SnapshotPhase::Failed)
    };
    fake.state().snapshots = vec![(under_way(0), vec![failed])];
    let ended = fake.run("vm snapshot create vm1 --no-wait -o json");
    assert_eq!(
        (ended.code, ended.json()["phase"].clone()),
        (Some(0), json!("creating"))
    );
    let ended = fake.run("vm snapshot create vm1 --wait");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("no room [snapshot_failed]"), "{ended:?}");
    assert_eq!(fake.run("vm snapshot create none").code, Some(3));
}

#[test]
fn ctrl_c_ends_a_snapshot_and_waits_until_nothing_is_left_of_it() {
    let fake = Fake::start();
    fake.state().snapshots = vec![(under_way(0), vec![])];
    let mut command = fake.ctl("vm snapshot create vm1");
    command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let child = command.spawn().unwrap();
    fake.wait_until("it is watched", |state| {
        state.calls.iter().any(|(call, _)| *call == "get_snapshot")
    });
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    let ended = Ended::of(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert!(ended.stderr.contains("nothing is left of it"), "{ended:?}");
    assert!(fake.calls("delete_snapshot") > 0);
    assert!(fake.state().snapshots.is_empty());
}

#[test]
fn snapshots_are_listed_and_shown_with_what_they_hold() {
    let fake = Fake::start();
    let other = v1::Snapshot {
        vm: "vm2".to_owned(),
        name: "old".to_owned(),
        ..snapshot(v1::SnapshotPhase::Failed)
    };
    fake.state().snapshots = vec![(ready(), vec![]), (other, vec![])];
    let listed = fake.run("vm snapshot list");
    assert!(
        listed.stdout.contains("64.0 MiB") && listed.stdout.contains("failed"),
        "{listed:?}"
    );
    assert_eq!(fake.run("vm snapshot list vm2 -q").stdout, "old\n");
    let shown = fake.run("vm snapshot show vm1 s7");
    for part in [
        "data (1.0 GiB), base (1.0 GiB, not held)",
        "host1 (epoch 3)",
        "2.0 GiB",
    ] {
        assert!(shown.stdout.contains(part), "{shown:?}");
    }
    let json = fake.run("vm snapshot show vm1 s7 -o json").json();
    assert_eq!(
        json["volumes"],
        json!([
            {"volume": "data", "size_bytes": 1 << 30, "held": true},
            {"volume": "base", "size_bytes": 1 << 30, "held": false},
        ])
    );
    assert_eq!(fake.run("vm snapshot show vm1 s9").code, Some(3));
}

#[test]
fn a_restored_vm_is_waited_for_and_a_clone_has_its_own_name() {
    let fake = Fake::start();
    let vms = ["vm1", "vm2"].map(|name| {
        let next = vec![v1::VmState::Pending, v1::VmState::Starting, v1::VmState::Running];
        (name.to_owned(), (vm(name, v1::VmState::Stopped), next))
    });
    fake.state().vms = vms.into();
    let ended = fake.run("vm snapshot restore vm1 s7");
    assert!(
        ended.code == Some(0)
            && ended
                .stdout
                .contains("vm1 is running on host1 (epoch 1), as it was"),
        "{ended:?}"
    );
    let ended = fake.run("vm snapshot restore vm1 s7 --as vm2");
    assert!(
        ended.code == Some(0) && ended.stdout.contains("vm2 is running"),
        "{ended:?}"
    );
    let clones: Vec<String> = fake
        .state()
        .restored
        .iter()
        .map(|asked| asked.clone.clone())
        .collect();
    assert_eq!(clones, ["", "vm2"]);
}

#[test]
fn a_clone_is_made_by_a_snapshot_that_is_gone_when_it_runs_and_when_it_cannot() {
    let fake = Fake::start();
    let next = vec![v1::VmState::Pending, v1::VmState::Running];
    let vms = [
        ("vm1".to_owned(), (vm("vm1", v1::VmState::Running), vec![])),
        ("vm2".to_owned(), (vm("vm2", v1::VmState::Stopped), next)),
    ];
    fake.state().vms = vms.into();
    for (clone, code) in [("vm2", 0), ("vm9", 3)] {
        fake.state().snapshots = vec![(ready(), vec![])];
        let ended = fake.run(&format!("vm clone vm1 {clone}"));
        assert_eq!(ended.code, Some(code), "{ended:?}");
        let state = fake.state();
        assert_eq!(state.snapshots[0].0.phase(), v1::SnapshotPhase::Deleting);
        if code == 0 {
            assert!(ended.stdout.contains("vm2 is running"), "{ended:?}");
            let asked = &state.restored[0];
            assert!(asked.new_addresses && asked.clone == "vm2" && !asked.snapshot.is_empty());
        }
    }
    assert_eq!(
        fake.run("vm snapshot restore vm1 s7 --new-addresses").code,
        Some(2)
    );
}

#[test]
fn a_deleted_snapshot_is_waited_for_until_its_files_are_gone() {
    let fake = Fake::start();
    fake.state().snapshots = vec![(ready(), vec![])];
    let ended = fake.run("vm snapshot delete vm1 s7");
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(0), "s7 of vm1 is deleted\n"),
        "{ended:?}"
    );
    assert!(fake.state().snapshots.is_empty());
    assert_eq!(fake.run("vm snapshot delete vm1 s7").code, Some(3));
}
