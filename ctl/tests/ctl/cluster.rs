//! `ctl` as a process, against a controller that answers over real mutual TLS: what is printed, and how it ends.

use std::io::Read;
use std::process::Stdio;

use drover_pki::{ClusterCa, Role};
use drover_proto::{Code, Fault, v1};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::fake::{Ended, Fake, ctl, dead_addr, migration, vm, write_context};
use v1::MigrationPhase::{Aborted, Done, PreCopy, Switchover};
use v1::VmState;

fn host(name: &str) -> v1::Host {
    let image = v1::Image {
        name: "probe".into(),
        kind: "elf-pvh".into(),
        bytes: 4096,
        ..Default::default()
    };
    let spec = v1::HostSpec {
        name: name.into(),
        images: vec![image],
        ..Default::default()
    };
    v1::Host {
        spec: Some(spec),
        state: v1::HostState::Up.into(),
        ..Default::default()
    }
}

pub fn done() -> v1::Migration {
    let blackout = v1::Blackout {
        pause: 10,
        last_pages: 20,
        state: 30,
        commit: 40,
        resume: 50,
        total: 12_345,
    };
    let receipt = v1::Receipt {
        total_ms: 812,
        bytes: 1 << 26,
        rounds: 4,
        blackout_us: Some(blackout),
        ..Default::default()
    };
    v1::Migration {
        receipt: Some(receipt),
        ..migration(Done)
    }
}

fn aborted(code: Code) -> v1::Migration {
    let reason = v1::Reason::from(Fault::new(code, "so it goes"));
    v1::Migration {
        ended_in: PreCopy.into(),
        reason: Some(reason),
        ..migration(Aborted)
    }
}

#[test]
fn an_unreachable_cluster_ends_with_5_and_names_the_controllers() {
    let fake = Fake::start();
    let (one, two) = (dead_addr(), dead_addr());
    let context = write_context(fake.dir.path(), "test", &[one, two]);
    let ended = Ended::of(ctl(&context, "vm list").output().unwrap());
    assert_eq!(ended.code, Some(5), "{ended:?}");
    assert!(
        ended.stderr.contains(&one.to_string()) && ended.stderr.contains(&two.to_string()),
        "{ended:?}"
    );
    assert!(
        ended.stderr.starts_with("error: ") && ended.stderr.contains("[no_leader]"),
        "{ended:?}"
    );
    assert_eq!(ended.stdout, "");
}

#[test]
fn a_dead_controller_is_passed_over() {
    let fake = Fake::start();
    fake.state().hosts = vec![host("host1"), host("host2")];
    let context = write_context(fake.dir.path(), "test", &[dead_addr(), fake.addr]);
    let ended = Ended::of(ctl(&context, "host list -q").output().unwrap());
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(0), "host1\nhost2\n"),
        "{ended:?}"
    );
}

#[test]
fn a_certificate_of_another_cluster_is_denied_with_8() {
    let fake = Fake::start();
    let dir = tempfile::tempdir().unwrap();
    ClusterCa::create("test")
        .unwrap()
        .issue_to(&dir.path().join("user"), Role::User, "admin")
        .unwrap();
    let context = write_context(dir.path(), "test", &[fake.addr]);
    let ended = Ended::of(ctl(&context, "vm list -o json").output().unwrap());
    assert_eq!(ended.code, Some(8), "{ended:?}");
    let error: serde_json::Value = serde_json::from_str(&ended.stderr).unwrap();
    assert_eq!(error["error"]["code"], "denied");
}

#[test]
fn a_context_of_another_cluster_than_its_certificate_is_denied() {
    let fake = Fake::start();
    let context = write_context(fake.dir.path(), "other", &[fake.addr]);
    let ended = Ended::of(ctl(&context, "vm list").output().unwrap());
    assert_eq!(ended.code, Some(8), "{ended:?}");
}

#[test]
fn a_missing_context_is_a_usage_error_that_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let ended = Ended::of(ctl(&dir.path().join("none.json"), "vm list").output().unwrap());
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("ctl dev up"), "{ended:?}");
}

#[test]
fn unknown_things_end_with_3_and_the_code_and_field() {
    let fake = Fake::start();
    for (line, code) in [
        ("vm show vm9", "vm_not_found"),
        ("vm stop vm9", "vm_not_found"),
        ("vm console vm9", "vm_not_found"),
        ("host show host9", "host_not_found"),
        ("migration show m9", "migration_not_found"),
        ("migrate vm9 host2", "vm_not_found"),
    ] {
        let ended = fake.run(&format!("{line} -o json"));
        assert_eq!(ended.code, Some(3), "{line}: {ended:?}");
        let error: serde_json::Value = serde_json::from_str(&ended.stderr).unwrap();
        assert_eq!(error["error"]["code"], code, "{line}");
        assert!(error["error"]["field"].is_string(), "{line}: {error}");
    }
}

#[test]
fn refusals_by_state_end_with_4_and_no_leader_with_5() {
    let fake = Fake::start();
    fake.state().refuse_all = Some(Fault::new(Code::SameHost, "vm1 is on host1 already"));
    let ended = fake.run("migrate vm1 host1");
    assert_eq!(
        (ended.code, ended.stderr.as_str()),
        (Some(4), "error: vm1 is on host1 already [same_host]\n")
    );
    fake.state().refuse_all =
        Some(Fault::new(Code::InvalidArgument, "memory_mib is 4").field("spec.memory_mib"));
    let ended = fake.run("vm create vm1 --image probe --memory 4");
    assert_eq!(ended.code, Some(2));
    assert_eq!(
        ended.stderr,
        "error: memory_mib is 4 [invalid_argument] (field spec.memory_mib)\n"
    );
}

#[test]
fn an_election_is_waited_out() {
    let fake = Fake::start();
    fake.state().refuse_all = Some(Fault::new(Code::NoLeader, "no leader is known"));
    let child = fake
        .ctl("vm list -o json")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    fake.wait_until("two attempts", |state| state.calls.len() >= 2);
    fake.state().refuse_all = None;
    let ended = Ended::of(child.wait_with_output().unwrap());
    assert_eq!((ended.code, ended.json()), (Some(0), json!([])), "{ended:?}");
}

#[test]
fn lists_and_shows_speak_json_with_the_promised_names() {
    let fake = Fake::start();
    fake.state()
        .vms
        .insert("vm1".into(), (vm("vm1", VmState::Running), vec![]));
    fake.state().hosts = vec![host("host1"), host("host2")];
    fake.state().migrations = vec![done()];
    let list = fake.run("vm list -o json").json();
    assert_eq!(
        (&list[0]["name"], &list[0]["state"]),
        (&json!("vm1"), &json!("running"))
    );
    assert_eq!(list[0]["placement"], json!({"host": "host1", "epoch": 1}));
    assert_eq!(fake.run("vm show vm1 -o json").json()["placement"]["epoch"], 1);
    assert_eq!(
        fake.run("image list -o json").json()[0]["hosts"],
        json!(["host1", "host2"])
    );
    assert_eq!(fake.run("host show host2 -o json").json()["name"], "host2");
    assert_eq!(fake.run("cluster status -o json").json()["leader"], "c1");
    let migrations = fake.run("migration list -o json").json();
    assert_eq!(migrations[0]["receipt"]["blackout_us"]["total"], 12_345);
    let table = fake.run("vm list");
    assert_eq!(
        table.stdout.lines().next().unwrap().split_whitespace().next(),
        Some("NAME")
    );
    assert!(
        table.stdout.lines().nth(1).unwrap().starts_with("vm1 "),
        "{table:?}"
    );
}

#[test]
fn create_waits_until_the_vm_runs_when_asked_to() {
    let fake = Fake::start();
    let ended = fake.run("vm create vm1 --image probe --start --wait -o json");
    assert_eq!(
        (ended.code, &ended.json()["state"]),
        (Some(0), &json!("running")),
        "{ended:?}"
    );
    assert!(fake.calls("get_vm") >= 2);
}

#[test]
fn an_attempt_whose_answer_was_lost_is_repeated_with_the_same_request_id() {
    let fake = Fake::start();
    fake.state().lose_answers = 2;
    let ended = fake.run("vm create vm1 --image probe");
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let state = fake.state();
    let ids: Vec<_> = state
        .calls
        .iter()
        .filter(|(call, _)| *call == "create_vm")
        .map(|(_, id)| id)
        .collect();
    assert_eq!(ids.len(), 3);
    assert!(ids.iter().all(|id| *id == ids[0] && id.len() == 32), "{ids:?}");
}

#[test]
fn a_wait_that_runs_out_ends_with_7_and_the_state() {
    let fake = Fake::start();
    fake.state()
        .vms
        .insert("vm1".into(), (vm("vm1", VmState::Stopping), vec![]));
    let ended = fake.run("vm stop vm1 --timeout 300ms");
    assert_eq!(ended.code, Some(7), "{ended:?}");
    assert!(ended.stderr.contains("vm1 is stopping"), "{ended:?}");
    assert_eq!(fake.run("vm stop vm1 --no-wait").code, Some(0));
}

#[test]
fn delete_waits_until_the_vm_is_gone() {
    let fake = Fake::start();
    fake.state()
        .vms
        .insert("vm1".into(), (vm("vm1", VmState::Running), vec![]));
    let ended = fake.run("vm delete vm1");
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(0), "vm1 is deleted\n"),
        "{ended:?}"
    );
}

#[test]
fn a_vm_that_fails_to_start_ends_with_1_and_its_reason() {
    let fake = Fake::start();
    let mut failing = vm("vm1", VmState::Starting);
    failing.reason = Some(v1::Reason {
        code: "kernel_invalid".into(),
        message: "no entry point".into(),
    });
    fake.state()
        .vms
        .insert("vm1".into(), (failing, vec![VmState::Starting, VmState::Failed]));
    let ended = fake.run("vm start vm1");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_eq!(
        ended.stderr,
        "error: vm1 failed: no entry point [kernel_invalid]\n"
    );
}

/// Its phases were told as they came, and the receipt of [`done`] at the end.
pub fn assert_watched_to_its_receipt(ended: &Ended) {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(
        ended.stdout.contains("blackout") && ended.stdout.contains("12.3 ms"),
        "{ended:?}"
    );
    assert!(
        ended.stderr.contains("m1 pre-copy") && ended.stderr.contains("m1 switchover"),
        "{ended:?}"
    );
}

#[test]
fn a_migration_is_watched_to_its_receipt() {
    let fake = Fake::start();
    fake.state()
        .vms
        .insert("vm1".into(), (vm("vm1", VmState::Running), vec![]));
    let steps = || vec![migration(PreCopy), migration(Switchover), done()];
    fake.state().migration = steps();
    let ended = fake.run("migrate vm1 host2 --max-downtime 50ms");
    assert_watched_to_its_receipt(&ended);
    fake.state().migration = steps();
    let json = fake.run("migrate vm1 host2 -o json");
    assert_eq!(json.stderr, "", "progress has no place beside JSON");
    assert_eq!(json.json()["receipt"]["blackout_us"]["last_pages"], 20);
}

#[test]
fn a_detached_migration_returns_once_it_is_planned() {
    let fake = Fake::start();
    fake.state()
        .vms
        .insert("vm1".into(), (vm("vm1", VmState::Running), vec![]));
    let ended = fake.run(
        "migrate vm1 host2 --detach --bandwidth 500MiB --deadline 60s --throttle 90 --streams 4 --plaintext -o json",
    );
    assert_eq!(
        (ended.code, &ended.json()["phase"]),
        (Some(0), &json!("planned")),
        "{ended:?}"
    );
    assert_eq!(
        ended.json()["options"],
        json!({
            "max_downtime_ms": null, "deadline_ms": 60_000, "bandwidth_mib_s": 500,
            "streams": 4, "plaintext": true, "compression": "auto", "max_throttle_percent": 90, "allow_postcopy": false,
        })
    );
    assert_eq!(fake.calls("watch_migration"), 0);
}

#[test]
fn an_aborted_migration_ends_with_6_and_its_reason() {
    let fake = Fake::start();
    fake.state()
        .vms
        .insert("vm1".into(), (vm("vm1", VmState::Running), vec![]));
    fake.state().migration = vec![aborted(Code::LinkLost)];
    let ended = fake.run("migrate vm1 host2 -o json");
    assert_eq!(ended.code, Some(6), "{ended:?}");
    assert_eq!(ended.json()["reason"]["code"], "link_lost");
    let error: serde_json::Value = serde_json::from_str(&ended.stderr).unwrap();
    assert_eq!(error["error"]["code"], "link_lost");
}

#[test]
fn ctrl_c_asks_for_the_cancel_and_waits_for_the_end() {
    let fake = Fake::start();
    fake.state()
        .vms
        .insert("vm1".into(), (vm("vm1", VmState::Running), vec![]));
    fake.state().migration = vec![migration(PreCopy)];
    fake.state().cancelled = Some(aborted(Code::Cancelled));
    let child = fake
        .ctl("migrate vm1 host2 -o json")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    fake.wait_until("the migration is watched", |state| {
        state.calls.iter().any(|(call, _)| *call == "watch_migration")
    });
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    let ended = Ended::of(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert_eq!(ended.json()["phase"], "aborted");
    assert!(fake.calls("cancel_migration") >= 1);
}

#[test]
fn ctrl_c_after_the_commit_changes_nothing() {
    let fake = Fake::start();
    fake.state()
        .vms
        .insert("vm1".into(), (vm("vm1", VmState::Running), vec![]));
    fake.state().migration = vec![migration(v1::MigrationPhase::Committed)];
    let child = fake
        .ctl("migrate vm1 host2 -o json")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    fake.wait_until("the migration is watched", |state| {
        state.calls.iter().any(|(call, _)| *call == "watch_migration")
    });
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    fake.wait_until("the cancel is refused", |state| {
        state.calls.iter().any(|(call, _)| *call == "cancel_migration")
    });
    fake.state().migration = vec![done()];
    let ended = Ended::of(child.wait_with_output().unwrap());
    assert_eq!(
        (ended.code, &ended.json()["phase"]),
        (Some(0), &json!("done")),
        "{ended:?}"
    );
}

#[test]
fn post_copy_can_be_asked_for_in_mid_run_and_a_refusal_has_its_code() {
    let fake = Fake::start();
    fake.state().migration = vec![migration(v1::MigrationPhase::PreCopy)];
    let ended = fake.run("migration postcopy m1 -o json");
    assert_eq!(
        (ended.code, &ended.json()["phase"]),
        (Some(0), &json!("pre-copy")),
        "{ended:?}"
    );
    fake.state().migration.clear();
    let ended = fake.run("migration postcopy m1");
    assert_eq!(
        (ended.code, ended.stderr.contains("[postcopy_not_allowed]")),
        (Some(4), true),
        "{ended:?}"
    );
}

#[test]
fn a_cancel_says_when_it_came_too_late() {
    let fake = Fake::start();
    fake.state().cancelled = Some(aborted(Code::Cancelled));
    let ended = fake.run("migration cancel m1");
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("aborted during pre-copy"), "{ended:?}");
    fake.state().cancelled = Some(done());
    assert_eq!(fake.run("migration cancel m1").code, Some(4));
    fake.state().cancelled = None;
    let ended = fake.run("migration cancel m1");
    assert_eq!(
        (ended.code, ended.stderr.contains("[migration_ended]")),
        (Some(4), true),
        "{ended:?}"
    );
}

#[test]
fn events_are_a_list_or_a_stream() {
    let fake = Fake::start();
    let event = |seq, kind: &str| v1::Event {
        seq,
        time_ms: 1_700_000_000_000,
        kind: kind.into(),
        ..Default::default()
    };
    fake.state().events = vec![event(1, "vm.created"), event(2, "vm.running")];
    assert_eq!(fake.run("events -o json").json()[1]["kind"], "vm.running");
    assert_eq!(fake.run("events --after 1").stdout.lines().count(), 1);

    let mut child = fake
        .ctl("events --follow -o json")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let mut next = || serde_json::from_str::<serde_json::Value>(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(
        (next()["seq"].clone(), next()["seq"].clone()),
        (json!(1), json!(2))
    );
    fake.state().events.push(event(3, "vm.stopped"));
    assert_eq!(next()["kind"], "vm.stopped");
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_closed_pipe_ends_the_stream_in_silence() {
    let fake = Fake::start();
    fake.state().events = vec![v1::Event {
        seq: 1,
        ..Default::default()
    }];
    let mut child = fake
        .ctl("events -f")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0];
    child.stdout.take().unwrap().read_exact(&mut byte).unwrap();
    fake.state().events.push(v1::Event {
        seq: 2,
        ..Default::default()
    });
    let ended = Ended::of(child.wait_with_output().unwrap());
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

#[test]
fn a_wrong_command_line_is_json_too_when_json_is_asked_for() {
    let fake = Fake::start();
    let ended = fake.run("vm create vm1 -o json");
    assert_eq!(ended.code, Some(2));
    let error: serde_json::Value = serde_json::from_str(&ended.stderr).unwrap();
    assert_eq!(error["error"]["code"], "usage");
    let help = fake.run("--help");
    assert_eq!(help.code, Some(0));
    assert!(
        help.stdout.contains("Exit codes:") && help.stdout.contains("130"),
        "{help:?}"
    );
}

#[test]
fn every_shell_gets_a_completion_script_without_a_cluster() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let ended = Ended::of(
            ctl(&dir.path().join("none"), &format!("completion {shell}"))
                .output()
                .unwrap(),
        );
        assert_eq!(ended.code, Some(0), "{shell}");
        assert!(ended.stdout.contains("migrate"), "{shell}");
    }
}

#[test]
fn a_ca_issues_identities_and_is_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let run = |line: &str| Ended::of(ctl(dir.path(), line).current_dir(dir.path()).output().unwrap());
    assert_eq!(run("ca create pki --cluster prod").code, Some(0));
    assert_eq!(run("ca create pki --cluster prod").code, Some(4));
    let issued = run("ca issue pki --role host --name host1 --out host1 -o json");
    assert_eq!(issued.json()["key"], "host1/host1.key", "{issued:?}");
    let files = drover_pki::TlsFiles {
        ca: dir.path().join("host1/ca.pem"),
        cert: dir.path().join("host1/host1.pem"),
        key: dir.path().join("host1/host1.key"),
    };
    drover_pki::Credentials::load(&files, "prod").unwrap();
    assert_eq!(
        run("ca issue pki --role host --name Not_a_name --out x").code,
        Some(2)
    );
}

#[test]
fn dev_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let run = |line: &str| {
        let mut command = ctl(dir.path(), line);
        Ended::of(
            command
                .env("DROVER_DEV_DIR", dir.path().join("dev"))
                .output()
                .unwrap(),
        )
    };
    assert_eq!(run("dev status").code, Some(3));
    assert_eq!(run("dev down").code, Some(3));
    assert!(!dir.path().join("dev/dev.json").exists());
}
