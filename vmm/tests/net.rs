//! NICs on real KVM: the probe guest answers echoes through a tap, moves, freezes, is taken over, and the outside watches.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;
#[path = "common/lan.rs"]
mod lan;

use std::sync::Arc;
use std::time::Duration;

use common::{
    World, assert_intact, await_console, await_info, await_state, grant, grant_for, has_seconds, incoming_by,
    listen_addr, seconds, send_by, text,
};
use drover_proto::v1::{OutcomeRequest, StartOutgoingRequest, VmmState};
use drover_proto::{Code, LOCAL_PREFIX};
use drover_vmm::devices::gate::Held;
use drover_vmm::devices::virtio::net::tap::{Early, Tap};
use drover_vmm::devices::virtio::net::{FRAME_BYTES_MAX, Link};
use drover_vmm::machine::Machine;
use drover_vmm::time::NS_PER_S;
use lan::{Echo, Outside, Pinger, await_learned, ip, tap};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;

const CMDLINE: &str = "own=16M hot=4M rate=20000 net=echo ip=10.77.0.2";
const MAC: &str = "52:54:00:77:00:02";
const EVERY: Duration = Duration::from_millis(10);

fn with_nic(config: &mut serde_json::Value, tap: &str) {
    config["cmdline"] = CMDLINE.into();
    config["nics"] = json!([{"tap": tap, "mac": MAC}]);
}

fn outcome(source: &Machine, migration: &str, committed: bool) {
    let migration = migration.into();
    source.outcome(&OutcomeRequest { migration, committed }).unwrap();
}

/// A running guest on `tap1`, and a pinger whose echoes it answers.
fn answering(world: &World, every: Duration, burst: u32) -> (Arc<Machine>, Pinger) {
    tap("tap1");
    let machine = world.machine("host1", 1, |config| with_nic(config, "tap1"));
    grant(&machine);
    await_console(machine.console(), "probe up", has_seconds(1));
    let pinger = Pinger::start(every, burst);
    pinger.await_answers(20);
    (machine, pinger)
}

fn assert_alive(machine: &Machine) {
    let lines = seconds(&text(machine.console()), "t").len();
    let seen = await_console(machine.console(), "another line", has_seconds(lines + 2));
    assert_intact(&seen);
    assert!(seconds(&seen, "net_answered").is_sorted(), "{seen}");
}

#[test]
fn a_guest_answers_echoes_through_its_tap_and_interrupts_arrive() {
    needs_kvm!();
    needs_lan!();
    let world = World::new();
    let (machine, pinger) = answering(&world, EVERY, 1);
    pinger.await_answers(100);
    assert_alive(&machine);
    let outside = Outside::of(&pinger.stop());
    println!("{outside:?}\n{}", text(machine.console()));
    assert_eq!((outside.lost.as_slice(), outside.twice), ([].as_slice(), 0));
    let seen = text(machine.console());
    for field in ["net_rx", "net_answered", "net_irqs"] {
        assert!(seconds(&seen, field).last() > Some(&20), "{field}:\n{seen}");
    }
}

/// Moves the VM from `source` to a new VMM for the next epoch on the other host, with the other tap.
fn migrate(world: &World, source: &Arc<Machine>) -> Arc<Machine> {
    let epoch = source.config().epoch + 1;
    let (from, to, tap) =
        [("host2", "host1", "tap1"), ("host1", "host2", "tap2")][usize::from(epoch.is_multiple_of(2))];
    let id = format!("m{epoch}");
    let target = world.machine(to, epoch, |config| {
        with_nic(config, tap);
        incoming_by(config, &id, from);
    });
    send_by(source, &id, listen_addr(&target), to).unwrap();
    await_state(&target, VmmState::Ready);
    grant(&target);
    outcome(source, &id, true);
    assert_eq!(target.info().state(), VmmState::Running);
    target
}

fn blackout_us(machine: &Machine) -> u64 {
    let info = await_info(machine, "a receipt", |info| {
        info.migration.as_ref().is_some_and(|m| m.receipt.is_some())
    });
    info.migration
        .unwrap()
        .receipt
        .unwrap()
        .blackout_us
        .unwrap()
        .total
}

/// What was lost was lost in one piece for each move, and nothing came twice.
fn assert_lost_in_moves_only(echoes: &[Echo], moves: usize) -> Outside {
    let outside = Outside::of(echoes);
    println!("{outside:?}");
    assert!(outside.lost.len() <= moves, "{outside:?}");
    assert_eq!(outside.twice, 0, "{outside:?}");
    outside
}

#[test]
fn a_guest_that_moves_is_found_where_it_is_and_no_echo_is_lost_but_in_the_blackout() {
    needs_kvm!();
    needs_lan!();
    let world = World::new();
    let (mut machine, pinger) = answering(&world, EVERY, 1);
    tap("tap2");
    let (mut from, moves) = (0, 4);
    for _ in 0..moves {
        let target = migrate(&world, &machine);
        // The source is gone as its agent sees to it: its tap with it.
        machine = target;
        pinger.await_answers(30);
        let echoes = pinger.echoes();
        let answered = echoes.iter().rposition(|echo| !echo.back.is_empty()).unwrap();
        println!(
            "blackout {} us; from outside {:?}",
            blackout_us(&machine),
            Outside::of(&echoes[from..answered])
        );
        from = answered;
    }
    assert_alive(&machine);
    assert_lost_in_moves_only(&pinger.stop(), moves);
}

#[test]
fn a_guest_that_moves_under_many_frames_answers_each_whole_and_once() {
    needs_kvm!();
    needs_lan!();
    let world = World::new();
    let (mut machine, pinger) = answering(&world, Duration::from_millis(4), 24);
    tap("tap2");
    for _ in 0..2 {
        machine = migrate(&world, &machine);
        pinger.await_answers(200);
    }
    assert_alive(&machine);
    let outside = Outside::of(&pinger.stop());
    println!("{outside:?}");
    assert_eq!(outside.twice, 0, "{outside:?}");
}

#[test]
fn the_network_learns_where_a_guest_is_without_a_word_of_its_own() {
    needs_kvm!();
    needs_lan!();
    let world = World::new();
    tap("tap1");
    tap("tap2");
    let source = world.machine("host1", 1, |config| with_nic(config, "tap1"));
    grant(&source);
    await_learned(MAC, "tap1");
    await_console(source.console(), "probe up", has_seconds(1));
    let target = migrate(&world, &source);
    await_learned(MAC, "tap2");
    let seen = text(target.console());
    assert_eq!(seconds(&seen, "net_answered").last(), Some(&0), "{seen}");
}

#[test]
fn what_came_to_a_tap_before_its_vm_did_is_passed_over() {
    needs_lan!();
    tap("tap1");
    let tap = Tap::find("tap1", Early::Yes).unwrap();
    let mut frame = [0; FRAME_BYTES_MAX];
    // Asking for an address that nobody has is a frame for everybody.
    let await_frame = || {
        let mut fds = [PollFd::new(tap.readable(), PollFlags::POLLIN)];
        let pinger = Pinger::start(EVERY, 1);
        assert_eq!(poll(&mut fds, PollTimeout::from(60_000u16)), Ok(1));
        drop(pinger);
    };
    await_frame();
    assert!(tap.receive(&mut frame).unwrap() > 12);
    await_frame();
    ip("link set br0 down");
    tap.pass_over();
    let none = tap.receive(&mut frame).unwrap_err();
    assert_eq!(none.kind(), std::io::ErrorKind::WouldBlock);
    tap.release();
    let closed = tap.receive(&mut frame).unwrap_err();
    assert_eq!(closed.kind(), std::io::ErrorKind::WouldBlock);
    assert!(
        tap.send(&frame[..72]).is_err(),
        "sent through a tap that was given back"
    );
    tap.take().unwrap();
    ip("link del tap1");
    // The worker must not be woken for ever by a tap that is gone.
    assert!(tap.receive(&mut frame).is_err());
    let mut fds = [PollFd::new(tap.readable(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::ZERO), Ok(0));
}

#[test]
fn an_abort_after_the_pause_gives_the_source_its_tap_back() {
    needs_kvm!();
    needs_lan!();
    let world = World::new();
    let (source, pinger) = answering(&world, EVERY, 1);
    tap("tap2");
    let target = world.machine("host2", 2, |config| {
        with_nic(config, "tap2");
        incoming_by(config, "m1", "host1");
    });
    send_by(&source, "m1", listen_addr(&target), "host2").unwrap();
    await_state(&target, VmmState::Ready);
    outcome(&source, "m1", false);
    pinger.await_answers(30);
    assert_alive(&source);
    assert_lost_in_moves_only(&pinger.stop(), 1);
}

/// Hands the guest to the next VMM of its host, which has the tap `next_tap`.
fn hand_over(next_tap: &str) {
    let world = World::new();
    let (source, pinger) = answering(&world, EVERY, 1);
    if next_tap != "tap1" {
        tap(next_tap);
    }
    let next = world.machine("host1", 2, |config| {
        with_nic(config, next_tap);
        incoming_by(config, "m1", "host1");
        config["incoming"]["local"] = true.into();
    });
    listen_addr(&next);
    let request = StartOutgoingRequest {
        migration: "m1".into(),
        target_addr: format!("{LOCAL_PREFIX}{}", next.config().handover_socket().display()),
        target_host: "host1".into(),
        target_epoch: 2,
        options: None,
    };
    source.start_outgoing(request).unwrap();
    await_state(&next, VmmState::Ready);
    grant(&next);
    outcome(&source, "m1", true);
    pinger.await_answers(30);
    assert_alive(&next);
    println!("blackout {} us", blackout_us(&next));
    assert_lost_in_moves_only(&pinger.stop(), 1);
}

#[test]
fn a_guest_is_handed_to_the_next_vmm_of_its_host_with_its_tap() {
    needs_kvm!();
    needs_lan!();
    hand_over("tap1");
}

#[test]
fn a_guest_is_handed_to_the_next_vmm_of_its_host_and_to_another_tap() {
    needs_kvm!();
    needs_lan!();
    hand_over("tap2");
}

#[test]
fn a_guest_whose_lease_has_ended_answers_nothing_until_the_next_one() {
    needs_kvm!();
    needs_lan!();
    let world = World::new();
    tap("tap1");
    let machine = world.machine("host1", 1, |config| with_nic(config, "tap1"));
    let renewed_until = |done: &dyn Fn(&str) -> bool| {
        await_console(machine.console(), "what is awaited", |text| {
            grant_for(&machine, NS_PER_S);
            done(text)
        });
    };
    renewed_until(&has_seconds(1));
    let pinger = Pinger::start(EVERY, 1);
    renewed_until(&|text| seconds(text, "net_answered").last() > Some(&20));
    await_state(&machine, VmmState::Frozen);
    let from = pinger.sent();
    pinger.await_sent(50);
    let frozen = pinger.echoes().split_off(from);
    assert!(frozen.iter().all(|echo| echo.back.is_empty()), "{frozen:?}");
    grant_for(&machine, 3600 * NS_PER_S);
    pinger.await_answers(30);
    assert_alive(&machine);
    assert_lost_in_moves_only(&pinger.stop(), 1);
}

#[test]
fn a_tap_that_is_none_or_anothers_is_refused_by_name_and_freed_by_whoever_ends() {
    needs_kvm!();
    needs_lan!();
    let world = World::new();
    let (first, pinger) = answering(&world, EVERY, 1);
    let refused = |machine: &Machine, words: [&str; 2]| {
        let reason = await_state(machine, VmmState::Failed).reason.unwrap();
        assert_eq!(reason.code, Code::NicUnusable.as_str(), "{}", reason.message);
        assert!(
            words.iter().all(|word| reason.message.contains(word)),
            "{}",
            reason.message
        );
    };
    let nowhere = world.machine("host2", 2, |config| with_nic(config, "tap9"));
    refused(&nowhere, ["tap tap9", "ip tuntap add"]);
    let none = world.machine("host2", 3, |config| with_nic(config, "br0"));
    grant(&none);
    refused(&none, ["tap br0", "is no tap"]);
    let anothers = world.machine("host2", 4, |config| with_nic(config, "tap1"));
    grant(&anothers);
    refused(&anothers, ["tap tap1", "open in another"]);
    assert_eq!(anothers.console().next(), 0, "it ran");
    let early = world.machine("host2", 5, |config| {
        with_nic(config, "tap1");
        incoming_by(config, "m1", "host1");
    });
    refused(&early, ["tap tap1", "open in another"]);
    pinger.await_answers(5);
    drop(pinger);
    drop(first);
    let again = world.machine("host1", 6, |config| with_nic(config, "tap1"));
    grant(&again);
    await_console(again.console(), "probe up", has_seconds(1));
    let pinger = Pinger::start(EVERY, 1);
    pinger.await_answers(5);
}
