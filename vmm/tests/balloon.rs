//! A guest that gives memory up and says which is free, on real KVM: what its host gets back, and what a move and an upgrade make of it.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use common::{
    World, assert_intact, await_console, await_info, await_state, grant, has_seconds, incoming_by,
    listen_addr, seconds, send_with, text,
};
use drover_proto::v1::{
    MigrationOptions, OutcomeRequest, Receipt, SetMemoryRequest, StartOutgoingRequest, VmMemory, VmmInfo,
    VmmState,
};
use drover_proto::{Code, LOCAL_PREFIX};
use drover_vmm::machine::Machine;

const MEMORY_MIB: u64 = 192;
const PAGES_A_MIB: u64 = 256;
/// Below this are the guest's image and what it owns; from here on all pages are spare.
const SPARE_FROM_MIB: u64 = 24;

/// Of the guest's 192 MiB it owns 16, and has written to all others.
fn config<'a>(
    balloon: Option<&'a str>,
    from: Option<(&'a str, &'a str)>,
) -> impl FnOnce(&mut serde_json::Value) + 'a {
    move |config| {
        config["memory_mib"] = MEMORY_MIB.into();
        let how = balloon.map_or_else(String::new, |how| format!(" balloon={how}"));
        config["cmdline"] = format!("own=16M hot=1M rate=2000 spare=written{how}").into();
        if balloon.is_some() {
            config["balloon"] = serde_json::json!({"slot": 31});
        }
        if let Some((migration, from)) = from {
            incoming_by(config, migration, from);
        }
    }
}

fn set(machine: &Machine, revision: u64, target_mib: u64) {
    let request = SetMemoryRequest { revision, target_mib };
    machine.set_memory(&request).unwrap();
}

fn memory(info: &VmmInfo) -> VmMemory {
    info.devices.as_ref().unwrap().memory.unwrap()
}

/// Waits until the guest says that its balloon holds so much.
fn await_held(machine: &Machine, mib: u64) -> String {
    let held = await_console(machine.console(), &format!("balloon of {mib} MiB"), |text| {
        seconds(text, "balloon").last() == Some(&(mib * PAGES_A_MIB))
    });
    assert_whole(&held);
    held
}

fn assert_whole(text: &str) {
    assert_intact(text);
    assert!(
        seconds(text, "balloon_lost").iter().all(|&lost| lost == 0),
        "{text}"
    );
}

/// What the guest's memory takes of its host's, MiB.
fn taken_mib(machine: &Machine) -> u64 {
    let about = machine.vm().unwrap().memory().file().metadata().unwrap();
    (about.blocks() * 512) >> 20
}

fn options(bandwidth_mib_s: u64) -> Option<MigrationOptions> {
    Some(MigrationOptions {
        bandwidth_mib_s,
        max_downtime_ms: 500,
        ..MigrationOptions::default()
    })
}

fn outcome(source: &Machine, migration: &str) {
    let migration = migration.into();
    let told = OutcomeRequest {
        migration,
        committed: true,
    };
    source.outcome(&told).unwrap();
}

/// Both stand; whatever was given up, the target's spare pages are the source's.
fn assert_same_spare_pages(source: &Machine, target: &Machine) {
    let [source, target] = [source, target].map(|machine| machine.vm().unwrap().memory());
    let (mut here, mut there) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for first in (SPARE_FROM_MIB..MEMORY_MIB).map(|mib| mib * PAGES_A_MIB) {
        source.read_pages(first, &mut here).unwrap();
        target.read_received(first, &mut there).unwrap();
        let differ = here
            .chunks(4096)
            .zip(there.chunks(4096))
            .position(|(here, there)| here != there);
        if let Some(page) = differ {
            panic!(
                "page {} at the target is not as it was at the source",
                first + page as u64
            );
        }
    }
}

fn receipt(target: &Machine) -> Receipt {
    let received = |info: &VmmInfo| info.migration.clone()?.receipt;
    received(&await_info(target, "receipt", |info| received(info).is_some())).unwrap()
}

/// Moves a guest that has written to all of its memory; the receipt, and what the memory took at the source before, MiB.
fn moved(balloon: Option<&str>) -> (Receipt, u64) {
    let world = World::new();
    let source = world.machine("host1", 1, config(balloon, None));
    grant(&source);
    await_console(source.console(), "second line", has_seconds(2));
    if balloon == Some("on") {
        await_console(source.console(), "reports", |text| {
            seconds(text, "balloon_reported")
                .last()
                .is_some_and(|&pages| pages > 160 * PAGES_A_MIB)
        });
    }
    let taken = taken_mib(&source);
    let target = world.machine("host2", 2, config(balloon, Some(("m1", "host1"))));
    send_with(&source, "m1", listen_addr(&target), "host2", options(0)).unwrap();
    await_state(&target, VmmState::Ready);
    grant(&target);
    outcome(&source, "m1");
    let before = seconds(&text(target.console()), "t").len();
    assert_whole(&await_console(
        target.console(),
        "lines after the move",
        has_seconds(before + 2),
    ));
    (receipt(&target), taken)
}

#[test]
fn what_a_guest_says_is_free_goes_back_to_its_host_and_is_never_sent() {
    needs_kvm!();
    let (all, taken_of_all) = moved(None);
    let (reported, taken) = moved(Some("on"));
    println!(
        "{MEMORY_MIB} MiB, 16 owned, all written: {} pages of content sent and {taken_of_all} MiB taken; free pages reported: {} and {taken}",
        all.pages, reported.pages
    );
    let mib = |receipt: &Receipt| receipt.pages / PAGES_A_MIB;
    assert!(mib(&all) > 170 && taken_of_all > 170, "{all:?} {taken_of_all}");
    assert!(mib(&reported) < 40 && taken < 60, "{reported:?} {taken}");
    // What is zero is told of nevertheless, so that the target knows of every page.
    assert!(reported.zero_pages > 150 * PAGES_A_MIB, "{reported:?}");
}

#[test]
fn a_balloon_holds_what_is_asked_over_a_move_and_pages_that_it_takes_meanwhile_are_zero_at_the_target() {
    needs_kvm!();
    let world = World::new();
    let source = world.machine("host1", 1, config(Some("quiet"), None));
    grant(&source);
    await_console(source.console(), "first line", has_seconds(1));
    let told = memory(&source.info());
    assert_eq!(
        (told.target_mib, told.actual_mib, told.driver),
        (MEMORY_MIB, MEMORY_MIB, true)
    );
    assert_eq!(source.info().devices.unwrap().device_model, 5);
    let before = taken_mib(&source);
    set(&source, 1, MEMORY_MIB - 64);
    await_held(&source, 64);
    await_info(&source, "what the guest has", |info| {
        memory(info).actual_mib == MEMORY_MIB - 64
    });
    let after = taken_mib(&source);
    assert!(after + 60 <= before, "{before} MiB were taken, then {after}");
    let late = SetMemoryRequest {
        revision: 0,
        target_mib: MEMORY_MIB,
    };
    assert_eq!(source.set_memory(&late).unwrap_err().code, Code::DeviceBusy);
    let small = SetMemoryRequest {
        revision: 2,
        target_mib: 15,
    };
    assert_eq!(source.set_memory(&small).unwrap_err().code, Code::InvalidArgument);

    let target = world.machine("host2", 2, config(Some("quiet"), Some(("m1", "host1"))));
    send_with(&source, "m1", listen_addr(&target), "host2", options(16)).unwrap();
    let sent = |info: &VmmInfo| {
        let progress = info.migration.as_ref()?.progress.as_ref()?;
        Some(progress.bytes_sent)
    };
    // Pages of low addresses are sent first, and taken first.
    await_info(&source, "two thirds sent", |info| sent(info) > Some(80 << 20));
    set(&source, 2, MEMORY_MIB - 100);
    await_held(&source, 100);
    assert_ne!(
        source.info().state(),
        VmmState::HandedOver,
        "the pages were to be taken before the pause"
    );
    await_state(&target, VmmState::Ready);
    assert_same_spare_pages(&source, &target);
    assert!(matches!(
        source.set_memory(&SetMemoryRequest { revision: 3, target_mib: 64 }),
        Err(fault) if fault.code == Code::VmState
    ));

    grant(&target);
    outcome(&source, "m1");
    let told = memory(&target.info());
    assert_eq!((told.target_mib, told.revision), (MEMORY_MIB - 100, 2));
    let lines = seconds(&text(target.console()), "t").len();
    await_console(target.console(), "a line after the move", has_seconds(lines + 1));
    await_held(&target, 100);
    assert!(taken_mib(&target) < MEMORY_MIB - 90);
    // It all comes back, is written to, and is compared as it goes in again.
    set(&target, 3, MEMORY_MIB);
    await_held(&target, 0);
    set(&target, 4, MEMORY_MIB - 32);
    await_held(&target, 32);
}

#[test]
fn a_balloon_keeps_its_pages_in_the_next_vmm_of_its_host() {
    needs_kvm!();
    let world = World::new();
    let source = world.machine("host1", 1, config(Some("quiet"), None));
    grant(&source);
    await_console(source.console(), "first line", has_seconds(1));
    set(&source, 1, MEMORY_MIB - 64);
    await_held(&source, 64);
    let taken = taken_mib(&source);
    let target = world.machine("host1", 2, |json| {
        config(Some("quiet"), Some(("m1", "host1")))(json);
        json["incoming"]["local"] = true.into();
    });
    upgrade(&source, &target);
    assert_eq!(memory(&target.info()).target_mib, MEMORY_MIB - 64);
    let lines = seconds(&text(target.console()), "t").len();
    await_console(target.console(), "a line after it", has_seconds(lines + 1));
    await_held(&target, 64);
    assert!(
        taken_mib(&target) <= taken + 8,
        "{taken} MiB, then {}",
        taken_mib(&target)
    );
    set(&target, 2, MEMORY_MIB - 8);
    await_held(&target, 8);
    set(&target, 3, MEMORY_MIB - 80);
    await_held(&target, 80);
}

fn upgrade(source: &Arc<Machine>, target: &Machine) {
    listen_addr(target);
    let socket = target.config().handover_socket();
    let request = StartOutgoingRequest {
        migration: "m1".into(),
        target_addr: format!("{LOCAL_PREFIX}{}", socket.display()),
        target_host: "host1".into(),
        target_epoch: source.config().epoch + 1,
        options: None,
    };
    source.start_outgoing(request).unwrap();
    await_state(target, VmmState::Ready);
    grant(target);
    outcome(source, "m1");
}

#[test]
fn what_a_vm_was_configured_to_have_is_asked_for_as_it_boots_and_one_without_a_balloon_is_asked_for_nothing()
{
    needs_kvm!();
    let world = World::new();
    let machine = world.machine("host1", 1, |json| {
        config(Some("on"), None)(json);
        json["balloon"] = serde_json::json!({"slot": 31, "target_mib": MEMORY_MIB - 48, "revision": 9});
    });
    grant(&machine);
    await_held(&machine, 48);
    assert_eq!(memory(&machine.info()).revision, 9);
    let plain = world.machine("host1", 2, config(None, None));
    grant(&plain);
    let request = SetMemoryRequest {
        revision: 1,
        target_mib: 64,
    };
    assert_eq!(plain.set_memory(&request).unwrap_err().code, Code::VmState);
    assert_eq!(plain.info().devices.unwrap().memory, None);
}
