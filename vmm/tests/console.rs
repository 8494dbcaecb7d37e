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
use drover_vmm::devices::attached::Gear;
use drover_vmm::machine::Machine;
use drover_vmm::time::NS_PER_S;
use drover_vmm::uffd::Uffd;
use drover_vmm::vm::Vm;
use vm_memory::{Bytes, GuestAddress};

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

/// Where the device in slot 1 has its registers, and the driver its queue.
const REGISTERS: u64 = 0xc000_8000;
const AVAILABLE: u64 = 0x2000;

fn set(vm: &Vm, register: u64, value: &[u8]) {
    vm.devices().mmio_write(REGISTERS + register, value);
}

/// Writes the available ring's index, and rings.
fn offer(vm: &Vm, index: u16) {
    let at = GuestAddress(AVAILABLE + 2);
    vm.memory().mapped().write_obj(index, at).unwrap();
    set(vm, 0x3000, &[0, 0]);
}

/// What is typed goes, or goes not, to the virtio console within a while.
fn await_typed(vm: &Vm, by_virtio: bool) {
    let began = Instant::now();
    while vm.devices().attached.type_in(b"").is_some() != by_virtio {
        assert!(began.elapsed() < PATIENCE, "by virtio: not {by_virtio}");
        std::thread::sleep(PERIOD);
    }
}

#[test]
fn what_is_typed_goes_to_the_serial_port_again_when_the_driver_has_broken_a_rule_or_is_gone() {
    needs_kvm!();
    let vm = common::empty_vm(1);
    vm.equip(vec![(Some(1), Gear::Console)]).unwrap();
    vm.open_devices(u64::MAX).unwrap();
    // Bus master; a driver that accepts the standard, with a queue of 8 for input.
    vm.devices().port_write(0xcf8, &0x8000_0804_u32.to_le_bytes());
    vm.devices().port_write(0xcfc, &[6, 0]);
    let start = |vm: &Vm| {
        vm.memory()
            .mapped()
            .write_slice(&[0; 0x4000], GuestAddress(0x1000))
            .unwrap();
        // A buffer of a byte at 0x10000, to be written.
        for (at, half) in [(0x1000, 0x1_0000u64), (0x1008, 1 | 2 << 32)] {
            vm.memory().mapped().write_obj(half, GuestAddress(at)).unwrap();
        }
        for status in [0, 1, 3] {
            set(vm, 20, &[status]);
        }
        set(vm, 8, &1u32.to_le_bytes());
        set(vm, 12, &1u32.to_le_bytes());
        set(vm, 20, &[11]);
        set(vm, 24, &8u16.to_le_bytes());
        for (register, at) in [(32, 0x1000u64), (40, AVAILABLE), (48, 0x3000)] {
            set(vm, register, &at.to_le_bytes());
        }
        set(vm, 28, &1u16.to_le_bytes());
        set(vm, 20, &[15]);
    };
    let serial = || vm.devices().serial().save().input;
    start(&vm);
    assert_eq!(
        (vm.type_in(b"a"), serial()),
        (1, b"a".to_vec()),
        "it has given no buffer"
    );
    offer(&vm, 1);
    await_typed(&vm, true);
    assert_eq!((vm.type_in(b"bc"), serial()), (2, b"a".to_vec()));
    // More than the queue has.
    offer(&vm, 100);
    await_typed(&vm, false);
    assert_eq!((vm.type_in(b"d"), serial()), (1, b"ad".to_vec()));
    start(&vm);
    offer(&vm, 1);
    await_typed(&vm, true);
    set(&vm, 20, &[0]);
    await_typed(&vm, false);
    assert_eq!((vm.type_in(b"e"), serial()), (1, b"ade".to_vec()));
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
