//! A VM with its right to run: leases, ends with reasons, migration between two machines over mutual TLS.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;

use std::time::Instant;

use common::{
    PATIENCE, World, assert_intact, await_console, await_info, await_state, failure, flat_out, grant,
    grant_for, has_seconds, incoming, incoming_by, listen_addr, seconds, send, send_by, send_with, slow_link,
    text,
};
use drover_proto::v1::{GrantRequest, OutcomeRequest, VmmInfo, VmmState};
use drover_proto::{Code, Fault};
use drover_vmm::machine::Machine;

#[test]
fn a_vm_without_a_grant_does_not_run_and_one_of_another_epoch_is_refused() {
    needs_kvm!();
    let world = World::new();
    let machine = world.machine("host1", 3, |_| {});
    assert_eq!(machine.info().state(), VmmState::Waiting);
    let stale = GrantRequest {
        epoch: 2,
        deadline_boottime_ns: u64::MAX,
    };
    assert_eq!(machine.grant(&stale).unwrap_err().code, Code::StaleEpoch);
    assert_eq!(machine.info().state(), VmmState::Waiting);
    assert_eq!(machine.console().next(), 0);
    assert_eq!(grant(&machine).state(), VmmState::Running);
    await_console(machine.console(), "first line", has_seconds(1));
}

#[test]
fn an_expired_lease_freezes_the_guest_and_a_new_grant_resumes_it() {
    needs_kvm!();
    let world = World::new();
    let machine = world.machine("host1", 1, |_| {});
    grant(&machine);
    await_console(machine.console(), "first line", has_seconds(1));
    drop(machine);

    let machine = world.machine("host1", 2, |_| {});
    grant_for(&machine, 200_000_000);
    await_state(&machine, VmmState::Frozen);
    let console = machine.console().next();
    let vm = machine.vm().unwrap();
    vm.start_dirty_log().unwrap();
    let pages = vm.memory().pages();
    let mut dirty = drover_migration::vm::PageSet::empty(pages);
    vm.take_dirty(&mut dirty).unwrap();
    assert_eq!(dirty.count(), 0, "a frozen guest wrote");
    assert_eq!(machine.console().next(), console);
    vm.stop_dirty_log().unwrap();
    assert_eq!(grant(&machine).state(), VmmState::Running);
    assert_intact(&await_console(
        machine.console(),
        "line after the freeze",
        has_seconds(2),
    ));
}

#[test]
fn how_a_guest_ends_is_a_state_with_a_reason() {
    needs_kvm!();
    let world = World::new();
    let cases = [
        ("triple", VmmState::Failed, Code::GuestTripleFault.as_str()),
        (
            "emulation",
            VmmState::Failed,
            Code::GuestEmulationFailure.as_str(),
        ),
        ("shutdown", VmmState::Exited, ""),
    ];
    for (epoch, (fault, state, code)) in (1..).zip(cases) {
        let cmdline = format!("own=1M fault={fault}");
        let machine = world.machine("host1", epoch, |config| config["cmdline"] = cmdline.into());
        grant(&machine);
        let info = await_state(&machine, state);
        let reason = info.reason.unwrap_or_default();
        assert_eq!(reason.code, code, "{}", reason.message);
        if state == VmmState::Failed {
            assert!(reason.message.contains("rip 0x"), "{}", reason.message);
        }
        assert_eq!(grant(&machine).state(), state, "a grant revived an ended guest");
    }
}

#[test]
fn what_is_not_a_kernel_becomes_a_failed_vm_that_says_so() {
    needs_kvm!();
    let world = World::new();
    let script = world.path().join("script");
    std::fs::write(&script, "#!/bin/sh\n").unwrap();
    let truncated = world.path().join("truncated");
    let whole = std::fs::read(common::probe()).unwrap();
    std::fs::write(&truncated, &whole[..8192]).unwrap();
    for (epoch, kernel) in (1..).zip([script, truncated, world.path().join("nowhere")]) {
        let machine = world.machine("host1", epoch, |config| {
            config["kernel"] = kernel.to_str().unwrap().into()
        });
        let info = machine.info();
        assert_eq!(info.state(), VmmState::Failed);
        let reason = info.reason.unwrap();
        assert_eq!(reason.code, Code::KernelInvalid.as_str(), "{}", reason.message);
        assert_eq!(grant(&machine).state(), VmmState::Failed);
    }
}

fn outcome(source: &Machine, committed: bool) -> Result<(), Fault> {
    source
        .outcome(&OutcomeRequest {
            migration: "m1".into(),
            committed,
        })
        .map(drop)
}

#[test]
fn a_guest_moves_while_it_writes_and_runs_only_after_its_grant() {
    needs_kvm!();
    for vcpus in [1, 2] {
        let world = World::new();
        let shape = |config: &mut serde_json::Value| config["vcpus"] = vcpus.into();
        let source = world.machine("host1", 1, shape);
        grant(&source);
        await_console(source.console(), "second line", has_seconds(2));
        let target = world.machine("host2", 2, |config| {
            shape(config);
            incoming(config, "host1");
        });
        let early = GrantRequest {
            epoch: 2,
            deadline_boottime_ns: u64::MAX,
        };
        assert_eq!(target.grant(&early).unwrap_err().code, Code::VmState);
        send(&source, listen_addr(&target), "host2").unwrap();
        await_state(&target, VmmState::Ready);
        assert_eq!(source.info().state(), VmmState::HandedOver);
        assert_eq!(target.console().next(), source.console().next());
        grant(&source);
        assert_eq!(
            source.info().state(),
            VmmState::HandedOver,
            "a lease resumed a handed-over VM"
        );
        let before = seconds(&text(target.console()), "t").len();
        let info = grant(&target);
        assert_eq!(info.state(), VmmState::Running);
        let receipt = info
            .migration
            .unwrap()
            .receipt
            .expect("a target that runs has its receipt");
        let encoded = receipt
            .encoding
            .expect("a receipt says what was made of the pages");
        assert!(receipt.rounds >= 1 && receipt.pages > 0 && receipt.bytes > encoded.sent_bytes);
        assert!(encoded.sent_bytes > 0, "{encoded:?}");
        assert!(receipt.blackout_us.unwrap().total > 0);
        println!("{receipt:?}");
        let text = await_console(target.console(), "line after the move", has_seconds(before + 2));
        assert_intact(&text);
        outcome(&source, true).unwrap();
        assert_eq!(source.info().state(), VmmState::Exited);
        assert!(*source.over().borrow());
    }
}

/// Pages that the guest writes a second, by its newest line.
fn pace(text: &str) -> u64 {
    let (written, t) = (seconds(text, "written"), seconds(text, "t"));
    let newest = t.len() - 1;
    (written[newest] - written[newest - 1]) / (t[newest] - t[newest - 1])
}

fn throttle_of(info: &VmmInfo) -> u32 {
    let progress = info
        .migration
        .as_ref()
        .and_then(|migration| migration.progress.clone());
    progress.map_or(0, |progress| progress.throttle_percent)
}

#[test]
fn a_guest_that_writes_faster_than_the_link_converges_by_a_throttle_and_is_as_fast_as_before_afterwards() {
    needs_kvm!();
    let world = World::new();
    let source = world.machine("host1", 1, flat_out);
    grant(&source);
    let before = pace(&await_console(source.console(), "lines", has_seconds(3)));

    let refusing = world.machine("host2", 2, |config| {
        flat_out(config);
        incoming(config, "host1");
    });
    send_with(&source, "m1", listen_addr(&refusing), "host2", slow_link(0)).unwrap();
    assert_eq!(failure(&source), Code::NoConvergence.as_str());
    assert_eq!(source.info().state(), VmmState::Running);
    outcome(&source, false).unwrap();

    let target = world.machine("host2", 2, |config| {
        flat_out(config);
        incoming_by(config, "m2", "host1");
    });
    // How much a guest writes that is held back goes by how quickly its host serves the faults of a dirty log: there is room for several
    // times of what was seen.
    let mut options = slow_link(99);
    options.as_mut().unwrap().bandwidth_mib_s = 48;
    send_with(&source, "m2", listen_addr(&target), "host2", options).unwrap();
    await_info(&source, "throttle", |info| throttle_of(info) > 0);
    await_state(&target, VmmState::Ready);
    assert_eq!(
        source.vm().unwrap().throttled(),
        0,
        "the throttle outlived the pause"
    );
    let info = grant(&target);
    let receipt = info.migration.unwrap().receipt.unwrap();
    println!("{before} pages a second before; {receipt:?}");
    assert!((1..=99).contains(&receipt.throttle_percent), "{receipt:?}");
    let seen = seconds(&text(target.console()), "t").len();
    let text = await_console(target.console(), "lines after the move", has_seconds(seen + 3));
    assert_intact(&text);
    assert!(
        pace(&text) > before / 6,
        "{} pages a second after the move, {before} before",
        pace(&text)
    );
}

#[test]
fn whoever_ends_a_throttled_migration_lets_the_guest_go() {
    needs_kvm!();
    let world = World::new();
    let source = world.machine("host1", 1, flat_out);
    grant(&source);
    await_console(source.console(), "first line", has_seconds(1));
    let throttled = |migration: &str| {
        let target = world.machine("host2", 2, |config| {
            flat_out(config);
            incoming_by(config, migration, "host1");
        });
        // So little that a throttle alone cannot make it converge soon.
        let mut options = slow_link(60);
        options.as_mut().unwrap().bandwidth_mib_s = 12;
        // The engine of the attempt before may still be winding down.
        let began = Instant::now();
        while let Err(fault) = send_with(&source, migration, listen_addr(&target), "host2", options) {
            assert_eq!(fault.code, Code::MigrationActive, "{fault}");
            assert!(began.elapsed() < PATIENCE, "the engine does not end");
            std::thread::yield_now();
        }
        await_info(&source, "throttle", |info| throttle_of(info) > 0);
        assert!(source.vm().unwrap().throttled() > 0);
        target
    };
    let told = |migration: &str| {
        let migration = migration.into();
        source
            .outcome(&OutcomeRequest {
                migration,
                committed: false,
            })
            .unwrap();
    };
    // The log's abort: at once, whatever the engine is doing.
    let target = throttled("m1");
    told("m1");
    assert_eq!(source.vm().unwrap().throttled(), 0, "held back after the abort");
    assert!(
        !source.vm().unwrap().logs_writes(),
        "writes are logged after the abort"
    );
    assert_eq!(source.info().migration, None);
    target.destroy(None);
    // The target dies: before the failure is told.
    let target = throttled("m2");
    target.destroy(None);
    failure(&source);
    assert_eq!(source.vm().unwrap().throttled(), 0, "held back after the failure");
    told("m2");
    let before = seconds(&text(source.console()), "t").len();
    assert_intact(&await_console(
        source.console(),
        "line after",
        has_seconds(before + 2),
    ));
}

#[test]
fn an_abort_after_the_pause_resumes_the_source_and_a_second_attempt_succeeds() {
    needs_kvm!();
    let world = World::new();
    let source = world.machine("host1", 1, |_| {});
    grant(&source);
    await_console(source.console(), "first line", has_seconds(1));
    let first = world.machine("host2", 2, |config| incoming(config, "host1"));
    send(&source, listen_addr(&first), "host2").unwrap();
    await_state(&first, VmmState::Ready);
    first.destroy(None);
    assert!(
        first
            .grant(&GrantRequest {
                epoch: 2,
                deadline_boottime_ns: u64::MAX
            })
            .is_ok()
    );
    assert_ne!(first.info().state(), VmmState::Running, "a destroyed VM ran");
    assert_eq!(source.info().state(), VmmState::HandedOver);
    outcome(&source, false).unwrap();
    assert_eq!(source.info().state(), VmmState::Running);
    assert!(
        !source.vm().unwrap().logs_writes(),
        "writes are logged after the abort"
    );
    assert_eq!(source.info().migration, None);
    outcome(&source, false).unwrap();
    let before = seconds(&text(source.console()), "t").len();
    assert_intact(&await_console(
        source.console(),
        "line after the abort",
        has_seconds(before + 2),
    ));

    let second = world.machine("host2", 2, |config| incoming_by(config, "m2", "host1"));
    send_by(&source, "m2", listen_addr(&second), "host2").unwrap();
    await_state(&second, VmmState::Ready);
    grant(&second);
    let before = seconds(&text(second.console()), "t").len();
    assert_intact(&await_console(
        second.console(),
        "line after the move",
        has_seconds(before + 2),
    ));
}

#[test]
fn a_migration_whose_abort_was_told_does_not_start_afterwards_nor_does_an_older_one() {
    needs_kvm!();
    let world = World::new();
    let source = world.machine("host1", 1, |_| {});
    grant(&source);
    let told = |migration: &str| {
        source.outcome(&OutcomeRequest {
            migration: migration.into(),
            committed: false,
        })
    };
    told("m7").unwrap();
    told("m5").unwrap();
    for late in ["m5", "m6", "m7"] {
        let fault = send_by(&source, late, "127.0.0.1:1".into(), "host2").unwrap_err();
        assert_eq!(
            (fault.code, fault.field.as_str()),
            (Code::MigrationEnded, "migration"),
            "{fault}"
        );
        assert_eq!(source.info().migration, None, "{late}");
    }
    let target = world.machine("host2", 2, |config| incoming_by(config, "m8", "host1"));
    send_by(&source, "m8", listen_addr(&target), "host2").unwrap();
    await_state(&target, VmmState::Ready);
}

#[test]
fn a_target_that_dies_early_leaves_the_source_running() {
    needs_kvm!();
    let world = World::new();
    let source = world.machine("host1", 1, |_| {});
    grant(&source);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    send(&source, addr, "host2").unwrap();
    assert_eq!(failure(&source), Code::LinkLost.as_str());
    assert_eq!(source.info().state(), VmmState::Running);
    outcome(&source, false).unwrap();
    assert_intact(&await_console(
        source.console(),
        "line after the failure",
        has_seconds(2),
    ));
}

#[test]
fn a_target_of_another_shape_refuses_and_never_runs() {
    needs_kvm!();
    let world = World::new();
    let source = world.machine("host1", 1, |_| {});
    grant(&source);
    let target = world.machine("host2", 2, |config| {
        incoming(config, "host1");
        config["memory_mib"] = 128.into();
    });
    send(&source, listen_addr(&target), "host2").unwrap();
    assert!(!failure(&target).is_empty());
    assert!(!failure(&source).is_empty());
    assert_eq!(source.info().state(), VmmState::Running);
    assert_eq!(target.info().state(), VmmState::Failed);
    let late = GrantRequest {
        epoch: 2,
        deadline_boottime_ns: u64::MAX,
    };
    assert!(
        target
            .grant(&late)
            .is_ok_and(|info| info.state() == VmmState::Failed)
    );
}

#[test]
fn only_the_named_host_may_send_and_only_to_the_named_host() {
    needs_kvm!();
    let world = World::new();
    let source = world.machine("host1", 1, |_| {});
    grant(&source);
    let target = world.machine("host2", 2, |config| incoming(config, "host3"));
    send(&source, listen_addr(&target), "host2").unwrap();
    assert!(!failure(&source).is_empty());
    assert_eq!(
        target.info().state(),
        VmmState::Incoming,
        "a stranger ended the wait"
    );
    outcome(&source, false).unwrap();
    assert_eq!(source.info().state(), VmmState::Running);
}

#[test]
fn a_frozen_vm_moves_frozen_and_runs_on_its_target() {
    needs_kvm!();
    let world = World::new();
    let source = world.machine("host1", 1, |_| {});
    // Short leases until the guest is up, then none.
    await_console(source.console(), "first line", |text| {
        let up = has_seconds(1)(text);
        if !up {
            grant_for(&source, 200_000_000);
        }
        up
    });
    await_state(&source, VmmState::Frozen);
    let target = world.machine("host2", 2, |config| incoming(config, "host1"));
    send(&source, listen_addr(&target), "host2").unwrap();
    await_state(&target, VmmState::Ready);
    grant(&target);
    assert_intact(&await_console(
        target.console(),
        "line after the move",
        has_seconds(3),
    ));
}

#[test]
fn memory_beyond_the_32_bit_hole_moves_too() {
    needs_kvm!();
    let world = World::new();
    let large = |config: &mut serde_json::Value| config["memory_mib"] = 3136.into();
    let source = world.machine("host1", 1, large);
    grant(&source);
    await_console(source.console(), "first line", has_seconds(1));
    let memory = source.vm().unwrap().memory();
    let (last, mark) = (memory.pages() - 1, [0xc3; 4096]);
    memory.write_pages(last, &mark).unwrap();
    let target = world.machine("host2", 2, |config| {
        large(config);
        incoming(config, "host1");
    });
    send(&source, listen_addr(&target), "host2").unwrap();
    await_state(&target, VmmState::Ready);
    let mut page = [0; 4096];
    target.vm().unwrap().memory().read_pages(last, &mut page).unwrap();
    assert_eq!(page, mark);
    grant(&target);
    let before = seconds(&text(target.console()), "t").len();
    assert_intact(&await_console(
        target.console(),
        "line after the move",
        has_seconds(before + 2),
    ));
}
