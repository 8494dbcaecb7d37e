//! The console's virtio device on real KVM: what the probe guest says and hears over it while it is moved, held up, replaced and taken.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{
    PATIENCE, World, assert_intact, await_state, grant, grant_for, incoming_by, listen_addr, seconds,
    send_by, text,
};
use drover_proto::v1::{
    OutcomeRequest, SnapshotStage, StartOutgoingRequest, TakeSnapshotRequest, VmmInfo, VmmState,
};
use drover_proto::{Code, Fault, LOCAL_PREFIX};
use drover_vmm::machine::Machine;
use drover_vmm::time::NS_PER_S;
use drover_vmm::uffd::Uffd;

/// Between two looks: typing all the time would take the processor from the guest.
const PERIOD: Duration = Duration::from_millis(2);

fn with_console(config: &mut serde_json::Value) {
    config["cmdline"] = "own=16M hot=4M rate=20000 console=virtio".into();
    config["console"] = serde_json::json!({"slot": 29});
}

/// Types lines without end, numbered, and knows how much of it was accepted.
#[derive(Clone, Default)]
struct Typist {
    lines: u64,
    rest: Vec<u8>,
    accepted: u64,
}

impl Typist {
    /// Types what the machine accepts at once.
    fn type_some(&mut self, machine: &Machine) {
        if self.rest.is_empty() {
            self.rest = format!("ping {}\n", self.lines).into_bytes();
            self.lines += 1;
        }
        let taken = machine.type_in(&self.rest);
        self.accepted += taken as u64;
        self.rest.drain(..taken);
    }

    /// Types until something holds.
    fn type_until(&mut self, machine: &Machine, what: &str, done: impl Fn() -> bool) {
        let began = Instant::now();
        while !done() {
            assert!(
                began.elapsed() < PATIENCE,
                "no {what}: {}",
                text(machine.console())
            );
            self.type_some(machine);
            std::thread::sleep(PERIOD);
        }
    }

    /// Types until so many further lines were answered.
    fn converse(&mut self, machine: &Machine, further: usize) {
        let before = pongs(&text(machine.console())).len();
        self.type_until(machine, "answers", || {
            pongs(&text(machine.console())).len() >= before + further
        });
    }

    /// Ends its last line, and waits for the answer to it.
    fn finish(&mut self, machine: &Machine) -> String {
        let began = Instant::now();
        loop {
            let taken = machine.type_in(&self.rest);
            self.accepted += taken as u64;
            self.rest.drain(..taken);
            let seen = text(machine.console());
            let typed = seconds(&seen, "console_typed").last().copied();
            if self.rest.is_empty() && typed >= Some(self.accepted) {
                return seen[..seen.rfind('\n').unwrap() + 1].to_owned();
            }
            assert!(
                began.elapsed() < PATIENCE,
                "{typed:?} of {}: {seen}",
                self.accepted
            );
            std::thread::sleep(PERIOD);
        }
    }

    /// Each line was answered once, in its order; each of the guest's lines is there once; every byte was heard by virtio, once.
    fn assert_all_came(&self, seen: &str) {
        assert_intact(seen);
        let want: Vec<u64> = (0..self.lines).collect();
        assert_eq!(pongs(seen), want, "{seen}");
        let said = &seen[seen.find("probe up").unwrap()..];
        for (lines_before, line) in said.lines().enumerate() {
            if line.starts_with("probe t=") {
                assert_eq!(
                    seconds(line, "console_lines"),
                    [lines_before as u64],
                    "{line} of {said}"
                );
            }
        }
        assert_eq!(seconds(seen, "console_typed").last(), Some(&self.accepted));
        assert!(
            seconds(seen, "console_unsaid").iter().all(|&unsaid| unsaid == 0),
            "{seen}"
        );
    }
}

fn pongs(seen: &str) -> Vec<u64> {
    let number = |line: &str| line.trim_end().strip_prefix("probe pong ")?.parse().ok();
    let whole = &seen[..seen.rfind('\n').map_or(0, |end| end + 1)];
    whole.lines().filter_map(number).collect()
}

/// Starts the guest and waits until it has said something over virtio.
fn booted(world: &World) -> Arc<Machine> {
    let machine = world.machine("host1", 1, with_console);
    grant(&machine);
    common::await_console(machine.console(), "a line by virtio", |seen| {
        !seconds(seen, "console_lines").is_empty()
    });
    machine
}

fn told(source: &Machine, migration: &str, committed: bool) {
    let migration = migration.into();
    source.outcome(&OutcomeRequest { migration, committed }).unwrap();
}

/// Asks until it is taken: the engine of the migration before may still be winding down.
fn insist(ask: impl Fn() -> Result<(), Fault>) {
    let began = Instant::now();
    while let Err(fault) = ask() {
        assert_eq!(fault.code, Code::MigrationActive, "{fault}");
        assert!(began.elapsed() < PATIENCE, "the engine does not end");
        std::thread::sleep(PERIOD);
    }
}

fn target(world: &World, epoch: u64, migration: &str) -> Arc<Machine> {
    world.machine("host2", epoch, |config| {
        with_console(config);
        incoming_by(config, migration, "host1");
    })
}

#[test]
fn nothing_said_or_typed_is_lost_or_doubled_over_an_abort_a_move_a_freeze_and_an_upgrade() {
    needs_kvm!();
    let world = World::new();
    let source = booted(&world);
    assert_eq!(source.info().devices.unwrap().device_model, 6);
    let mut typist = Typist::default();
    typist.converse(&source, 3);

    let first = target(&world, 2, "m1");
    send_by(&source, "m1", listen_addr(&first), "host2").unwrap();
    typist.type_until(&source, "a target that is ready", || {
        first.info().state() == VmmState::Ready
    });
    assert_eq!(source.type_in(b"x"), 0, "typed on a VM that stands");
    first.destroy(None);
    told(&source, "m1", false);
    typist.converse(&source, 20);

    let second = target(&world, 2, "m2");
    let addr = listen_addr(&second);
    insist(|| send_by(&source, "m2", addr.clone(), "host2"));
    typist.type_until(&source, "a target that is ready", || {
        second.info().state() == VmmState::Ready
    });
    let waits = source.console().next();
    grant_for(&second, NS_PER_S);
    told(&source, "m2", true);
    assert_eq!(source.console().next(), waits, "the source wrote on");
    // The lease ends while it is typed on.
    typist.type_until(&second, "end of the lease", || {
        second.info().state() == VmmState::Frozen
    });
    assert_eq!(second.type_in(b"x"), 0, "typed on a VM that stands");
    grant(&second);
    typist.converse(&second, 20);

    let third = world.machine("host2", 3, |config| {
        with_console(config);
        incoming_by(config, "m3", "host2");
        config["incoming"]["local"] = true.into();
    });
    listen_addr(&third);
    let request = StartOutgoingRequest {
        migration: "m3".into(),
        target_addr: format!("{LOCAL_PREFIX}{}", third.config().handover_socket().display()),
        target_host: "host2".into(),
        target_epoch: 3,
        options: None,
    };
    insist(|| second.start_outgoing(request.clone()).map(drop));
    typist.type_until(&second, "the next VMM", || {
        third.info().state() == VmmState::Ready
    });
    grant(&third);
    told(&second, "m3", true);
    typist.converse(&third, 20);
    let seen = typist.finish(&third);
    typist.assert_all_came(&seen);
    println!("{} lines, {} bytes typed", typist.lines, typist.accepted);
}

#[test]
fn a_guest_that_goes_on_from_a_snapshot_hears_what_was_typed_before_it_and_says_nothing_twice() {
    needs_kvm!();
    if let Err(fault) = Uffd::open_for_writes() {
        return println!("SKIPPED: {fault}");
    }
    let world = World::new();
    let machine = booted(&world);
    let mut typist = Typist::default();
    typist.converse(&machine, 3);
    let folder = world.path().join("snapshot");
    std::fs::create_dir(&folder).unwrap();
    // Nothing is typed from here to the instant, and what was typed is still on its way.
    for _ in 0..200 {
        typist.type_some(&machine);
    }
    let request = TakeSnapshotRequest {
        id: "s1".into(),
        folder: folder.to_string_lossy().into_owned(),
        disks: vec![],
    };
    let mut taken = typist.clone();
    machine.take_snapshot(&request).unwrap();
    let stage = |info: &VmmInfo| info.snapshot.clone().unwrap_or_default().stage();
    common::await_info(&machine, "a snapshot", |info| stage(info) == SnapshotStage::Done);
    typist.converse(&machine, 20);
    let seen = typist.finish(&machine);
    typist.assert_all_came(&seen);
    machine.destroy(None);
    drop(machine);

    let again = world.machine("host1", 2, |config| {
        with_console(config);
        config["restore"] = serde_json::json!({ "folder": folder });
    });
    await_state(&again, VmmState::Waiting);
    grant(&again);
    taken.converse(&again, 20);
    let seen = taken.finish(&again);
    taken.assert_all_came(&seen);
}

#[test]
fn until_its_driver_is_up_and_without_one_what_is_typed_goes_to_the_serial_port() {
    needs_kvm!();
    let world = World::new();
    let machine = world.machine("host1", 1, |config| config["console"] = true.into());
    grant(&machine);
    common::await_console(machine.console(), "a line", common::has_seconds(1));
    let mut typist = Typist::default();
    typist.converse(&machine, 5);
    let devices = machine.info().devices.unwrap().devices;
    assert_eq!((devices[0].slot, devices[0].kind.as_str()), (1, "console"));
}
