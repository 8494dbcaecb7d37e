//! `ctl vm console` as a process: scroll-back, following across hand-overs, input in parts, and a real terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Stdio;

use drover_proto::{Code, Fault, v1};
use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, tcgetattr};

use crate::fake::{Ended, Fake, migration, vm};
use v1::MigrationPhase::Done;
use v1::VmState;

fn part(text: &str, offset: u64, epoch: u64) -> v1::ReadConsoleResponse {
    let data = text.as_bytes().to_vec();
    v1::ReadConsoleResponse {
        next_offset: offset + data.len() as u64,
        data,
        offset,
        epoch,
    }
}

fn fake() -> Fake {
    let fake = Fake::start();
    fake.state()
        .vms
        .insert("vm1".into(), (vm("vm1", VmState::Running), vec![]));
    fake
}

fn stop(fake: &Fake) {
    let mut state = fake.state();
    state
        .vms
        .insert("vm1".into(), (vm("vm1", VmState::Stopped), vec![]));
    state
        .console
        .push(Err(Fault::new(Code::VmState, "vm1 is stopped")));
}

#[test]
fn no_follow_prints_what_is_there_and_ends() {
    let fake = fake();
    fake.state().console = vec![
        Ok(part("tick 1\n", 0, 1)),
        Ok(part("tick 2\n", 7, 1)),
        Ok(part("", 14, 1)),
    ];
    let ended = fake.run("vm console vm1 --no-follow");
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(0), "tick 1\ntick 2\n"),
        "{ended:?}"
    );
}

#[test]
fn json_parts_carry_their_offsets() {
    let fake = fake();
    fake.state().console = vec![Ok(part("tick 1\n", 5, 1))];
    let json = fake.run("vm console vm1 --no-follow -o json").json();
    assert_eq!(
        (json["offset"].as_u64(), json["next_offset"].as_u64()),
        (Some(5), Some(12))
    );
    assert_eq!(json["data"], "tick 1\n");
}

#[test]
fn a_reader_goes_on_across_a_hand_over() {
    let fake = fake();
    fake.state().migrations = vec![migration(Done)];
    fake.state().console = vec![
        Ok(part("before ", 0, 1)),
        Err(Fault::new(Code::HostUnreachable, "host1 has no such VMM")),
        Ok(part("after", 7, 2)),
    ];
    stop(&fake);
    // The VM runs while it is asked whether it is over, and has stopped at the second time.
    fake.state().vms.insert(
        "vm1".into(),
        (
            vm("vm1", VmState::Running),
            vec![VmState::Running, VmState::Running, VmState::Stopped],
        ),
    );
    let ended = fake.run("vm console vm1 -q");
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(0), "before after"),
        "{ended:?}"
    );
    assert_eq!(fake.calls("list_migrations"), 1);
}

#[test]
fn a_cold_start_begins_the_console_again() {
    let fake = fake();
    fake.state().console = vec![
        Ok(part("first life", 0, 1)),
        Ok(part("", 10, 2)),
        Ok(part("second life", 0, 2)),
    ];
    stop(&fake);
    let ended = fake.run("vm console vm1");
    assert_eq!(ended.stdout, "first lifesecond life", "{ended:?}");
    assert!(
        ended.stderr.contains("started again") && ended.stderr.contains("is stopped"),
        "{ended:?}"
    );
}

#[test]
fn input_that_is_not_taken_at_once_is_offered_again() {
    let fake = fake();
    fake.state().input_at_once = 3;
    let mut child = fake
        .ctl("vm console vm1")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"echo hello\n").unwrap();
    fake.wait_until("the input", |state| state.input == b"echo hello\n");
    stop(&fake);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_terminal_is_raw_while_attached_and_ctrl_right_bracket_leaves_it_as_it_was() {
    let fake = fake();
    fake.state().input_at_once = 64;
    fake.state().console = vec![Ok(part("login: ", 0, 1))];
    let pty = openpty(None, None).unwrap();
    let (mut master, terminal) = (File::from(pty.master), pty.slave);
    let cooked = |terminal: &OwnedFd| {
        tcgetattr(terminal)
            .unwrap()
            .local_flags
            .contains(LocalFlags::ICANON)
    };
    assert!(cooked(&terminal));
    let side = || Stdio::from(terminal.try_clone().unwrap());
    let mut child = fake
        .ctl("vm console vm1")
        .stdin(side())
        .stdout(side())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut seen = Vec::new();
    let mut buffer = [0; 256];
    while !String::from_utf8_lossy(&seen).contains("login: ") {
        let n = master.read(&mut buffer).unwrap();
        seen.extend(&buffer[..n]);
    }
    assert!(!cooked(&terminal));
    // Ctrl-C belongs to the guest here.
    master.write_all(b"root\r\x03\x1d").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(fake.state().input, b"root\r\x03");
    assert!(cooked(&terminal));
}

#[test]
fn a_console_that_may_not_be_read_is_an_error() {
    let fake = fake();
    fake.state().console = vec![Err(Fault::new(Code::Denied, "hosts may not read consoles"))];
    let ended = Ended::of(fake.ctl("vm console vm1").output().unwrap());
    assert_eq!(ended.code, Some(8), "{ended:?}");
}

#[test]
fn a_stopped_vm_has_no_console_and_that_is_no_unknown_vm() {
    let fake = fake();
    fake.state()
        .vms
        .insert("vm1".into(), (vm("vm1", VmState::Stopped), vec![]));
    fake.state().console = vec![Err(Fault::new(Code::VmNotFound, "host1 has no VMM of \"vm1\""))];
    let ended = fake.run("vm console vm1 --no-follow");
    assert_eq!(ended.code, Some(4), "{ended:?}");
    assert_eq!(
        ended.stderr,
        "error: vm1 is stopped: it has no console [vm_state]\n"
    );
}

#[test]
fn a_console_is_read_as_soon_as_the_vm_has_arrived() {
    let fake = fake();
    fake.state().console = vec![
        Err(Fault::new(
            Code::StaleEpoch,
            "host1 has no VMM of vm1 for epoch 1",
        )),
        Ok(part("here", 0, 2)),
    ];
    let ended = fake.run("vm console vm1 --no-follow");
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(0), "here"),
        "{ended:?}"
    );
}
