//! How a migration is followed and found again.

use drover_proto::v1;
use drover_proto::v1::MigrationPhase::{PreCopy, Switchover};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cluster::{assert_watched_to_its_receipt, done};
use crate::fake::{Ended, Fake, migration};

#[test]
fn a_migration_is_followed_to_its_end_whose_exit_code_it_gives() {
    let fake = Fake::start();
    let mut copying = migration(PreCopy);
    copying.progress = Some(v1::Progress {
        round: 2,
        by_stream: vec![
            v1::StreamProgress::default(),
            v1::StreamProgress {
                number: 1,
                stalled_ms: 2_000,
                ..Default::default()
            },
        ],
        ..Default::default()
    });
    let steps = || vec![migration(PreCopy), copying.clone(), migration(Switchover), done()];
    fake.state().migration = steps();
    let ended = fake.run("migration show m1 --follow");
    assert_watched_to_its_receipt(&ended);

    fake.state().migration = steps();
    let json = fake.run("migration show m1 --follow -o json");
    let lines: Vec<serde_json::Value> = json
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).expect("an object a line"))
        .collect();
    let phases: Vec<_> = lines.iter().map(|line| line["phase"].as_str().unwrap()).collect();
    assert_eq!(phases, ["pre-copy", "pre-copy", "switchover", "done"], "{json:?}");
    assert_eq!(lines[1]["progress"]["by_stream"][1]["stalled_ms"], 2_000);
    assert_eq!((json.code, json.stderr.as_str()), (Some(0), ""));

    let mut aborted = migration(v1::MigrationPhase::Aborted);
    aborted.reason = Some(v1::Reason {
        code: "link_lost".into(),
        message: "cut".into(),
    });
    fake.state().migration = vec![migration(PreCopy), aborted];
    let ended = fake.run("migration show m1 --follow --quiet");
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(6), ""), "{ended:?}");
    fake.state().migration = vec![];
    assert_eq!(fake.run("migration show m9 --follow").code, Some(3));
}

#[test]
fn a_controller_that_knows_no_watching_is_asked_again_and_again() {
    let fake = Fake::start();
    fake.state().knows_no_watching = true;
    fake.state().migration = vec![migration(PreCopy), migration(PreCopy), done()];
    let ended = fake.run("migration show m1 --follow");
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(fake.calls("get_migration") >= 3);
}

#[test]
fn ctrl_c_stops_following_and_nothing_else() {
    let fake = Fake::start();
    fake.state().migration = vec![migration(PreCopy)];
    let child = fake
        .ctl("migration show m1 --follow")
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    fake.wait_until("it follows", |state| {
        state.calls.iter().any(|(call, _)| *call == "watch_migration")
    });
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    let ended = Ended::of(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert!(ended.stderr.contains("[interrupted]"), "{ended:?}");
    assert_eq!(fake.calls("cancel_migration"), 0);
}

#[test]
fn migrations_are_listed_by_vm_host_and_state() {
    let fake = Fake::start();
    let mut elsewhere = done();
    (elsewhere.id, elsewhere.from, elsewhere.to) = ("m2".into(), "host3".into(), "host4".into());
    fake.state().migrations = vec![migration(PreCopy), elsewhere];
    let ids = |line: &str| fake.run(line).stdout;
    assert_eq!(ids("migration list -q"), "m1\nm2\n");
    assert_eq!(ids("migration list -q --state active"), "m1\n");
    assert_eq!(ids("migration list -q --state done"), "m2\n");
    assert_eq!(ids("migration list -q --state aborted"), "");
    assert_eq!(ids("migration list -q --host host2"), "m1\n");
    assert_eq!(ids("migration list -q --host host3 --state ended"), "m2\n");
    let json = fake.run("migration list --state ended -o json").json();
    assert_eq!(json[0]["receipt"]["blackout_us"]["last_pages"], 20);
    assert_eq!(fake.run("migration list --state moving").code, Some(2));
}
