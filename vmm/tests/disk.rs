//! Disks on real KVM: the probe guest keeps a journal, its VMM is killed, or moves, and nothing that was acknowledged is lost.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;
#[path = "common/process.rs"]
mod running;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{
    World, assert_intact, await_console, await_info, await_state, grant, grant_for, has_seconds, seconds,
    text,
};
use drover_proto::v1::{GrantRequest, OutcomeRequest, ReadConsoleRequest, StartOutgoingRequest, VmmState};
use drover_proto::{Code, LOCAL_PREFIX};
use drover_vmm::machine::Machine;
use drover_vmm::time::{NS_PER_S, boottime_ns};
use running::Process;
use serde_json::json;

const CMDLINE: &str = "own=16M hot=4M rate=20000 disk=journal";

fn disk(world: &World) -> PathBuf {
    let path = world.path().join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    path
}

fn with_disk(config: &mut serde_json::Value, path: &Path) {
    config["cmdline"] = CMDLINE.into();
    config["rng"] = true.into();
    config["disks"] = json!([{"path": path, "serial": "journal"}]);
}

fn incoming(config: &mut serde_json::Value, migration: &str, from: &str, local: bool) {
    config["incoming"] =
        json!({"migration": migration, "from_host": from, "listen_ip": "127.0.0.1", "local": local});
}

fn newest(text: &str, field: &str) -> u64 {
    seconds(text, field).last().copied().unwrap_or(0)
}

/// The journal was kept without loss so far, and interrupts arrive.
fn assert_kept(text: &str) {
    assert_intact(text);
    assert!(seconds(text, "disk_lost").iter().all(|&lost| lost == 0), "{text}");
    assert!(
        seconds(text, "disk_seq").is_sorted(),
        "the journal went back:\n{text}"
    );
}

fn found(text: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with("probe disk ")).unwrap();
    assert!(line.trim_end().ends_with(" lost=0"), "{line}");
    line.split("found_seq=")
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

/// Waits until the journal has grown by more than a second's worth; returns the console.
fn await_growth(machine: &Machine, from: u64) -> String {
    await_console(machine.console(), "growth of the journal", |text| {
        newest(text, "disk_seq") > from + 8 && has_seconds(2)(text)
    })
}

#[test]
fn a_guest_finds_its_disk_keeps_a_journal_and_the_next_boot_finds_all_of_it() {
    needs_kvm!();
    let world = World::new();
    let path = disk(&world);
    let mut last = 0;
    for epoch in 1..=3 {
        let machine = world.machine("host1", epoch, |config| with_disk(config, &path));
        grant(&machine);
        let seen = await_growth(&machine, last);
        println!("{seen}");
        assert_kept(&seen);
        assert!(found(&seen) >= last, "acknowledged {last}:\n{seen}");
        assert!(newest(&seen, "disk_irqs") > 0, "no interrupt arrived:\n{seen}");
        last = newest(&seen, "disk_seq");
    }
}

/// A guest that keeps its journal, and where its disk is.
fn writing(world: &World) -> (PathBuf, Arc<Machine>) {
    let path = disk(world);
    let machine = world.machine("host1", 1, |config| with_disk(config, &path));
    grant(&machine);
    await_growth(&machine, 0);
    (path, machine)
}

/// Sends `source`, by migration `m1` and with the same disk, to a VMM on `host` that has received it on return. Gives that, and what the guest had
/// said before.
fn sent(world: &World, source: &Arc<Machine>, path: &Path, host: &str) -> (Arc<Machine>, String) {
    let target = world.machine(host, 2, |config| {
        with_disk(config, path);
        incoming(config, "m1", "host1", host == "host1");
    });
    send(source, "m1", &target, host);
    await_state(&target, VmmState::Ready);
    let before = text(source.console());
    (target, before)
}

fn listen_addr(machine: &Machine) -> String {
    await_info(machine, "listen_addr", |info| !info.listen_addr.is_empty()).listen_addr
}

fn send(source: &Arc<Machine>, migration: &str, target: &Machine, target_host: &str) {
    let listened = listen_addr(target);
    let target_addr = if target.config().incoming.as_ref().unwrap().local {
        format!("{LOCAL_PREFIX}{}", target.config().handover_socket().display())
    } else {
        listened
    };
    let request = StartOutgoingRequest {
        migration: migration.into(),
        target_addr,
        target_host: target_host.into(),
        target_epoch: source.config().epoch + 1,
        options: None,
    };
    source.start_outgoing(request).unwrap();
}

fn outcome(source: &Machine, migration: &str, committed: bool) {
    let migration = migration.into();
    source.outcome(&OutcomeRequest { migration, committed }).unwrap();
}

/// The journal goes on at `target`, after all that `before` had acknowledged, and the guest finds nothing lost.
fn assert_goes_on(target: &Machine, before: &str) {
    let lines = seconds(&text(target.console()), "t").len();
    let seen = await_console(target.console(), "lines after the move", has_seconds(lines + 2));
    assert_kept(&seen);
    assert!(newest(&seen, "disk_seq") > newest(before, "disk_seq"), "{seen}");
}

#[test]
fn a_guest_moves_with_its_disk_and_loses_neither_a_page_nor_a_block() {
    needs_kvm!();
    let world = World::new();
    let (path, mut source) = writing(&world);
    for epoch in 2..6 {
        let (from, to) = [("host2", "host1"), ("host1", "host2")][usize::from(epoch % 2 == 0)];
        let id = format!("m{epoch}");
        let target = world.machine(to, epoch, |config| {
            with_disk(config, &path);
            incoming(config, &id, from, false);
        });
        send(&source, &id, &target, to);
        await_state(&target, VmmState::Ready);
        let before = text(source.console());
        grant(&target);
        outcome(&source, &id, true);
        assert_eq!(target.info().state(), VmmState::Running);
        assert_goes_on(&target, &before);
        source = target;
    }
    drop(source);
    let again = world.machine("host1", 9, |config| with_disk(config, &path));
    grant(&again);
    assert_kept(&await_growth(&again, 0));
}

#[test]
fn a_guest_is_handed_to_the_next_vmm_of_its_host_with_its_disk() {
    needs_kvm!();
    let world = World::new();
    let (path, source) = writing(&world);
    let (next, before) = sent(&world, &source, &path, "host1");
    grant(&next);
    outcome(&source, "m1", true);
    assert_goes_on(&next, &before);
}

#[test]
fn an_abort_after_the_pause_gives_the_source_its_disk_back() {
    needs_kvm!();
    let world = World::new();
    let (path, source) = writing(&world);
    let (_target, before) = sent(&world, &source, &path, "host2");
    outcome(&source, "m1", false);
    assert_goes_on(&source, &before);
}

#[test]
fn a_disk_that_another_vm_runs_with_is_refused_by_name_and_freed_by_whoever_stops() {
    needs_kvm!();
    let world = World::new();
    let path = disk(&world);
    let first = world.machine("host1", 1, |config| with_disk(config, &path));
    grant_for(&first, 600 * NS_PER_S);
    await_growth(&first, 0);
    let second = world.machine("host1", 2, |config| with_disk(config, &path));
    grant(&second);
    let info = await_state(&second, VmmState::Failed);
    let reason = info.reason.unwrap();
    assert_eq!(reason.code, Code::DiskUnusable.as_str());
    assert!(
        reason.message.contains("disk.raw") && reason.message.contains("locked"),
        "{}",
        reason.message
    );
    assert_eq!(second.console().next(), 0, "it ran");
    drop(first);
    // A lease that ends frees the disk too, and the next one takes it back.
    let third = world.machine("host1", 3, |config| with_disk(config, &path));
    await_console(third.console(), "growth of the journal", |text| {
        grant_for(&third, 200_000_000);
        has_seconds(2)(text)
    });
    await_state(&third, VmmState::Frozen);
    let fourth = world.machine("host1", 4, |config| with_disk(config, &path));
    grant(&fourth);
    assert_kept(&await_growth(&fourth, 0));
    grant(&third);
    let reason = await_state(&third, VmmState::Failed).reason.unwrap();
    assert_eq!(reason.code, Code::DiskUnusable.as_str());
}

#[test]
fn a_run_that_was_followed_never_has_the_disk_again_also_where_nobody_holds_its_lock() {
    needs_kvm!();
    let world = World::new();
    let path = disk(&world);
    let record = world.path().join("writer");
    std::fs::File::create(&record).unwrap();
    let fenced = |config: &mut serde_json::Value| {
        with_disk(config, &path);
        config["disks"][0]["fence"] = json!({"path": record, "writers": 7});
    };
    let cut_off = world.machine("host1", 3, fenced);
    await_console(cut_off.console(), "growth of the journal", |text| {
        grant_for(&cut_off, 200_000_000);
        has_seconds(2)(text)
    });
    // One that freezes has its turn as long as nobody else took one.
    await_state(&cut_off, VmmState::Frozen);
    grant_for(&cut_off, 200_000_000);
    await_state(&cut_off, VmmState::Running);
    await_state(&cut_off, VmmState::Frozen);
    let stood = cut_off.console().next();
    let next = world.machine("host2", 4, fenced);
    grant(&next);
    assert_kept(&await_growth(&next, 0));
    // It is gone, and the disk's lock with it.
    drop(next);
    grant(&cut_off);
    let reason = await_state(&cut_off, VmmState::Failed).reason.unwrap();
    assert_eq!(reason.code, Code::StaleEpoch.as_str(), "{}", reason.message);
    assert!(reason.message.contains("epoch 4"), "{}", reason.message);
    assert_eq!(cut_off.console().next(), stood, "it ran");
    let later = world.machine("host1", 5, fenced);
    grant(&later);
    assert_kept(&await_growth(&later, 0));
}

/// Reads the console of a process until `done`.
async fn read_until(process: &Process, done: impl Fn(&str) -> bool) -> String {
    let mut vmm = process.client().await;
    let (mut console, mut offset) = (Vec::new(), 0);
    loop {
        let read = ReadConsoleRequest {
            offset,
            wait_ms: 30_000,
            ..Default::default()
        };
        let piece = vmm.read_console(read).await.unwrap().into_inner();
        offset = piece.next_offset;
        console.extend(piece.data);
        let text = String::from_utf8_lossy(&console);
        if done(&text[..text.rfind('\n').unwrap_or(0)]) {
            return text.into_owned();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_before_a_kill_is_there_after_it() {
    needs_kvm!();
    let world = World::new();
    let path = disk(&world);
    let mut last = 0;
    for epoch in 1..=4 {
        let mut process = Process::start(&world.write("host1", epoch, |config| with_disk(config, &path)));
        let deadline_boottime_ns = boottime_ns() + 600 * NS_PER_S;
        let request = GrantRequest {
            epoch,
            deadline_boottime_ns,
        };
        process.client().await.grant(request).await.unwrap();
        let seen = read_until(&process, |text| {
            newest(text, "disk_seq") > last + 8 && has_seconds(2)(text)
        })
        .await;
        // In the middle of a batch, most likely: it writes all the time.
        process.child.kill().unwrap();
        process.child.wait().unwrap();
        assert_kept(&seen);
        assert!(found(&seen) >= last, "acknowledged {last}:\n{seen}");
        last = newest(&seen, "disk_seq");
        println!("acknowledged {last}");
    }
}

#[test]
fn a_disk_that_is_none_and_a_target_with_another_disk_are_refused_by_name() {
    needs_kvm!();
    let world = World::new();
    let path = disk(&world);
    let odd = world.path().join("odd.raw");
    std::fs::write(&odd, [0; 700]).unwrap();
    for (epoch, bad) in (1..).zip([odd, world.path().join("nowhere"), PathBuf::from("/dev/null")]) {
        let machine = world.machine("host1", epoch, |config| with_disk(config, &bad));
        let reason = await_state(&machine, VmmState::Failed).reason.unwrap();
        assert_eq!(reason.code, Code::DiskUnusable.as_str());
        assert!(
            reason.message.contains(bad.to_str().unwrap()),
            "{}",
            reason.message
        );
    }
    let source = world.machine("host1", 11, |config| with_disk(config, &path));
    grant(&source);
    await_growth(&source, 0);
    let smaller = world.path().join("smaller.raw");
    std::fs::File::create(&smaller).unwrap().set_len(2 << 20).unwrap();
    for (migration, other) in [("m1", Some(&smaller)), ("m2", None)] {
        let target = world.machine("host2", 12, |config| {
            match other {
                Some(path) => with_disk(config, path),
                None => config["rng"] = true.into(),
            }
            incoming(config, migration, "host1", false);
        });
        send(&source, migration, &target, "host2");
        let info = await_state(&target, VmmState::Failed);
        let reason = info.reason.unwrap();
        assert_eq!(reason.code, Code::BadState.as_str(), "{}", reason.message);
        outcome(&source, migration, false);
        await_info(&source, "the end of the migration", |info| {
            info.migration.is_none()
        });
        assert_eq!(source.info().state(), VmmState::Running);
    }
    assert_goes_on(&source, &text(source.console()));
}
