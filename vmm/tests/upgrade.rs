//! A VMM is replaced on its own host: the next one takes over the memory itself, on real KVM, under a guest that writes.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Instant;

use common::{
    PATIENCE, World, assert_intact, await_console, await_info, await_state, grant, has_seconds, probe_vm,
    seconds, text,
};
use drover_proto::v1::{OutcomeRequest, Receipt, StartOutgoingRequest, VmmInfo, VmmState};
use drover_proto::{Code, LOCAL_ADDR, LOCAL_PREFIX};
use drover_vmm::cpu::profile::Profile;
use drover_vmm::machine::Machine;
use drover_vmm::vm::{Shape, Vm};
use vm_memory::{Bytes, GuestAddress};

const FOREVER: u64 = u64::MAX;

/// A VMM on host1 that waits for the one before it.
fn waiting(
    world: &World,
    epoch: u64,
    migration: &str,
    change: impl FnOnce(&mut serde_json::Value),
) -> Arc<Machine> {
    let machine = world.machine("host1", epoch, |config| {
        config["incoming"] = serde_json::json!({
            "migration": migration, "from_host": "host1", "listen_ip": "127.0.0.1", "local": true,
        });
        change(config);
    });
    let info = await_info(&machine, "listen_addr", |info| !info.listen_addr.is_empty());
    assert_eq!(info.listen_addr, LOCAL_ADDR);
    machine
}

fn hand_over(source: &Arc<Machine>, migration: &str, target: &Machine) {
    let socket = target.config().handover_socket();
    start_outgoing(
        source,
        &StartOutgoingRequest {
            migration: migration.into(),
            target_addr: format!("{LOCAL_PREFIX}{}", socket.display()),
            target_host: "host1".into(),
            target_epoch: source.config().epoch + 1,
            options: None,
        },
    );
}

/// Asks until it is taken: the engine of the migration before may still be winding down.
fn start_outgoing(source: &Arc<Machine>, request: &StartOutgoingRequest) {
    let began = Instant::now();
    while let Err(fault) = source.start_outgoing(request.clone()) {
        assert_eq!(fault.code, Code::MigrationActive, "{fault}");
        assert!(began.elapsed() < PATIENCE, "the engine does not end");
        std::thread::yield_now();
    }
}

fn outcome(source: &Machine, migration: &str, committed: bool) {
    let migration = migration.into();
    let told = source.outcome(&OutcomeRequest { migration, committed });
    told.unwrap();
}

fn failure(machine: &Machine) -> String {
    let failed = |info: &VmmInfo| info.migration.clone()?.failure;
    let info = await_info(machine, "failure", |info| failed(info).is_some());
    failed(&info).unwrap().code
}

/// The whole hand-over, as the agent of a host does it.
fn upgrade(source: &Arc<Machine>, migration: &str, target: &Machine) -> Receipt {
    hand_over(source, migration, target);
    await_state(target, VmmState::Ready);
    assert_eq!(source.info().state(), VmmState::HandedOver);
    let info = grant(target);
    outcome(source, migration, true);
    assert_eq!(source.info().state(), VmmState::Exited);
    info.migration
        .unwrap()
        .receipt
        .expect("a target that runs has its receipt")
}

/// The file that its memory is.
fn file_of(machine: &Machine) -> (u64, u64) {
    let about = machine.vm().unwrap().memory().file().metadata().unwrap();
    (about.dev(), about.ino())
}

/// A digest of all of the guest's memory.
fn digest(vm: &Vm) -> u64 {
    let mut chunk = vec![0; 1 << 20];
    let mut digest = 0xcbf2_9ce4_8422_2325_u64;
    for first in (0..vm.memory().pages()).step_by(256) {
        vm.memory().read_pages(first, &mut chunk).unwrap();
        for word in chunk.chunks_exact(8) {
            let word = u64::from_le_bytes(word.try_into().unwrap());
            digest = (digest ^ word)
                .wrapping_mul(0x0000_0100_0000_01b3)
                .rotate_left(23);
        }
    }
    digest
}

#[test]
fn a_writing_guest_goes_on_in_the_next_vmm_with_the_same_memory_and_no_page_is_sent() {
    needs_kvm!();
    for vcpus in [1, 2] {
        let world = World::new();
        let shape = |config: &mut serde_json::Value| config["vcpus"] = vcpus.into();
        let source = world.machine("host1", 1, shape);
        grant(&source);
        await_console(source.console(), "second line", has_seconds(2));
        let target = waiting(&world, 2, "m1", shape);
        assert!(target.vm().is_none(), "it has memory before it was handed any");
        let receipt = upgrade(&source, "m1", &target);
        println!("{receipt:?}");
        assert_eq!((receipt.pages, receipt.zero_pages, receipt.rounds), (0, 0, 1));
        assert_eq!(receipt.tracker, "none");
        assert!(receipt.bytes < 1 << 20, "{receipt:?}");
        assert!(receipt.blackout_us.unwrap().total > 0);
        assert_eq!(file_of(&source), file_of(&target));
        let before = seconds(&text(target.console()), "t").len();
        assert!(before >= 2, "the console's text came along");
        // The memory outlives the VMM that made it.
        drop(source);
        assert_intact(&await_console(
            target.console(),
            "lines after it",
            has_seconds(before + 2),
        ));
        let build = target.info().build.unwrap();
        assert_eq!(build.version, env!("CARGO_PKG_VERSION"));
        assert!(!target.config().handover_socket().exists());
    }
}

#[test]
fn an_upgrade_that_is_aborted_at_the_last_moment_leaves_the_guest_in_the_old_vmm_and_the_next_one_succeeds() {
    needs_kvm!();
    let world = World::new();
    let source = world.machine("host1", 1, |_| {});
    grant(&source);
    await_console(source.console(), "first line", has_seconds(1));
    let refused = waiting(&world, 2, "m1", |_| {});
    hand_over(&source, "m1", &refused);
    await_state(&refused, VmmState::Ready);
    outcome(&source, "m1", false);
    assert_eq!(source.info().state(), VmmState::Running);
    refused.destroy(None);
    drop(refused);
    let before = seconds(&text(source.console()), "t").len();
    assert_intact(&await_console(
        source.console(),
        "lines after the abort",
        has_seconds(before + 2),
    ));
    let target = waiting(&world, 2, "m2", |_| {});
    upgrade(&source, "m2", &target);
    assert_intact(&await_console(
        target.console(),
        "lines after it",
        has_seconds(before + 3),
    ));
}

#[test]
fn until_it_may_the_next_vmm_cannot_write_a_byte_whatever_the_state_asks_for() {
    needs_kvm!();
    let old = probe_vm(2, "own=16M hot=4M");
    let shape = Shape {
        vcpus: 2,
        memory_bytes: old.memory().bytes(),
        profile: Profile::Baseline,
        huge_pages: true,
    };
    old.resume(FOREVER);
    let text = await_console(old.console(), "first line", has_seconds(1));
    assert!(
        text.contains("clock=kvmclock"),
        "its clock's page is one that KVM writes: {text}"
    );
    old.pause();
    let (saved, before) = (old.save().unwrap(), digest(&old));
    let next = Vm::build_on(shape, old.memory().file(), Arc::default()).unwrap();
    next.restore(&saved).unwrap();
    assert!(
        next.memory()
            .mapped()
            .write_volatile_to(GuestAddress(0), &mut Vec::new(), 0)
            .is_ok(),
        "it can be read"
    );
    let mut zeroes = std::fs::File::open("/dev/zero").unwrap();
    let written = next
        .memory()
        .mapped()
        .read_exact_volatile_from(GuestAddress(0x9000), &mut zeroes, 4096);
    assert!(written.is_err(), "it was written to");
    assert_eq!(digest(&old), before, "restoring changed the guest's memory");
    drop(next);
    assert_eq!(digest(&old), before, "giving it up changed the guest's memory");

    // As after an abort: the old one goes on, and is replaced later.
    old.resume(FOREVER);
    assert_intact(&await_console(
        old.console(),
        "lines after the abort",
        has_seconds(3),
    ));
    old.pause();
    let saved = old.save().unwrap();
    let next = Vm::build_on(shape, old.memory().file(), Arc::default()).unwrap();
    next.restore(&saved).unwrap();
    drop(old);
    next.open_memory().unwrap();
    next.resume(FOREVER);
    assert_intact(&await_console(
        next.console(),
        "lines in the next one",
        has_seconds(5),
    ));
}

#[test]
fn what_does_not_fit_is_refused_before_the_guest_is_paused() {
    needs_kvm!();
    type Change = fn(&mut serde_json::Value);
    let cases: [(Change, Code); 4] = [
        (|config| config["memory_mib"] = 96.into(), Code::TargetFailed),
        (
            |config| config["cpu_profile"] = "x86-64-v2".into(),
            Code::TargetFailed,
        ),
        (|config| config["vm"] = "vm2".into(), Code::Denied),
        (
            |config| config["incoming"]["migration"] = "m77".into(),
            Code::Denied,
        ),
    ];
    let world = World::new();
    let source = world.machine("host1", 1, |_| {});
    grant(&source);
    for (number, (change, code)) in (1..).zip(cases) {
        let id = format!("m{number}");
        let target = waiting(&world, 2, &id, change);
        hand_over(&source, &id, &target);
        assert_eq!(failure(&source), code.as_str());
        assert_eq!(source.info().state(), VmmState::Running, "{code}");
        assert!(
            target.vm().is_none(),
            "it took the memory of a VM that is not its own"
        );
        outcome(&source, &id, false);
        target.destroy(None);
    }
    let nobody = waiting(&world, 2, "m8", |_| {});
    let socket = nobody.config().handover_socket();
    std::fs::remove_file(socket).unwrap();
    hand_over(&source, "m8", &nobody);
    assert_eq!(failure(&source), Code::LinkLost.as_str());
    assert_eq!(source.info().state(), VmmState::Running);
    outcome(&source, "m8", false);
}

#[test]
fn many_upgrades_one_after_another_and_a_move_between_them() {
    needs_kvm!();
    let world = World::new();
    let mut machine = world.machine("host1", 1, |_| {});
    grant(&machine);
    await_console(machine.console(), "first line", has_seconds(1));
    let memory = file_of(&machine);
    for epoch in 2..=21 {
        let id = format!("m{epoch}");
        let target = waiting(&world, epoch, &id, |_| {});
        upgrade(&machine, &id, &target);
        machine = target;
    }
    assert_eq!(file_of(&machine), memory, "it is the first one's memory");
    let seen = seconds(&text(machine.console()), "t").len();
    assert_intact(&await_console(
        machine.console(),
        "lines after all",
        has_seconds(seen + 2),
    ));

    // Copied to memory of its own, there and back, and replaced again.
    let moved = world.machine("host2", 22, |config| {
        config["incoming"] =
            serde_json::json!({"migration": "m22", "from_host": "host1", "listen_ip": "127.0.0.1"});
    });
    let addr = await_info(&moved, "listen_addr", |info| !info.listen_addr.is_empty()).listen_addr;
    let request = StartOutgoingRequest {
        migration: "m22".into(),
        target_addr: addr,
        target_host: "host2".into(),
        target_epoch: 22,
        options: None,
    };
    start_outgoing(&machine, &request);
    await_state(&moved, VmmState::Ready);
    grant(&moved);
    outcome(&machine, "m22", true);
    assert_ne!(file_of(&moved), memory);
    let seen = seconds(&text(moved.console()), "t").len();
    assert_intact(&await_console(
        moved.console(),
        "lines after the move",
        has_seconds(seen + 2),
    ));
    let last = world.machine("host2", 23, |config| {
        config["incoming"] = serde_json::json!({
            "migration": "m23", "from_host": "host2", "listen_ip": "127.0.0.1", "local": true,
        });
    });
    await_info(&last, "listen_addr", |info| !info.listen_addr.is_empty());
    upgrade(&moved, "m23", &last);
    let seen = seconds(&text(last.console()), "t").len();
    assert_intact(&await_console(
        last.console(),
        "lines at the end",
        has_seconds(seen + 2),
    ));
}
