//! NICs that come and go while the probe guest runs, on real KVM and taps of the test's own network.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

mod common;
#[path = "common/lan.rs"]
mod lan;

use std::sync::Arc;
use std::time::Duration;

use common::{
    World, assert_intact, await_console, await_info, await_state, grant, has_seconds, incoming_by,
    listen_addr, send_by, text,
};
use drover_proto::Code;
use drover_proto::v1::{
    AttachNicRequest, DetachNicRequest, OutcomeRequest, VmmDevice, VmmDeviceState, VmmInfo, VmmState,
};
use drover_vmm::devices::virtio::net::tap::{Early, Tap};
use drover_vmm::machine::Machine;
use lan::{Pinger, ip, tap};
use serde_json::json;

const MAC: &str = "52:54:00:77:00:02";
const OTHER_MAC: &str = "52:54:00:77:00:03";
const EVERY: Duration = Duration::from_millis(10);

fn attach(revision: u64, slot: u32, tap: &str, mac: &str) -> AttachNicRequest {
    AttachNicRequest {
        revision,
        slot,
        tap: tap.to_owned(),
        mac: mac.to_owned(),
        mtu: 1500,
    }
}

fn detach(revision: u64, slot: u32, mac: &str) -> DetachNicRequest {
    let mac = mac.to_owned();
    DetachNicRequest { revision, slot, mac }
}

/// A machine whose guest does this with NICs.
fn cmdline(config: &mut serde_json::Value, net: &str) {
    config["cmdline"] = format!("own=16M hot=4M rate=20000 net={net} ip=10.77.0.2").into();
}

fn nics(info: &VmmInfo) -> Vec<VmmDevice> {
    info.devices.as_ref().unwrap().devices.clone()
}

fn nic(slot: u32, tap: &str, state: VmmDeviceState) -> VmmDevice {
    VmmDevice {
        slot,
        kind: "nic".to_owned(),
        mac: MAC.to_owned(),
        tap: tap.to_owned(),
        state: state.into(),
        ..VmmDevice::default()
    }
}

/// Moves the VM to the other host, whose VMM is configured with the NIC on `tap` in `slot`.
fn migrate(world: &World, source: &Arc<Machine>, net: &str, tap: &str, slot: u32) -> Arc<Machine> {
    let target = world.machine("host2", 2, |config| {
        cmdline(config, net);
        config["nics"] = json!([{"tap": tap, "mac": MAC, "slot": slot}]);
        incoming_by(config, "m1", "host1");
    });
    send_by(source, "m1", listen_addr(&target), "host2").unwrap();
    await_state(&target, VmmState::Ready);
    let refused = source.attach_nic(&attach(9, 9, "tap3", OTHER_MAC)).unwrap_err();
    assert_eq!(refused.code, Code::MigrationActive, "{refused}");
    let refused = source.detach_nic(&detach(9, slot, MAC)).unwrap_err();
    assert_eq!(refused.code, Code::MigrationActive, "{refused}");
    grant(&target);
    let outcome = OutcomeRequest {
        migration: "m1".to_owned(),
        committed: true,
    };
    source.outcome(&outcome).unwrap();
    target
}

#[test]
fn a_nic_comes_is_used_moves_and_goes_and_its_tap_is_free_then() {
    needs_kvm!();
    needs_lan!();
    let world = World::new();
    tap("tap1");
    tap("tap2");
    let source = world.machine("host1", 1, |config| cmdline(config, "hot-plug"));
    let early = source.attach_nic(&attach(1, 3, "tap1", MAC)).unwrap_err();
    assert_eq!(early.code, Code::VmState, "{early}");
    grant(&source);
    await_console(source.console(), "a second", has_seconds(1));
    let told = source.attach_nic(&attach(1, 3, "tap1", MAC)).unwrap();
    assert_eq!(nics(&told), [nic(3, "tap1", VmmDeviceState::Attached)]);
    let devices = told.devices.unwrap();
    assert!(devices.changes_nics && devices.device_model == 4);
    let pinger = Pinger::start(EVERY, 1);
    pinger.await_answers(20);
    // What is so already changes nothing; what is another's is refused.
    source.attach_nic(&attach(1, 3, "tap1", MAC)).unwrap();
    for refused in [
        attach(1, 3, "tap2", MAC),
        attach(1, 3, "tap1", OTHER_MAC),
        attach(1, 4, "tap2", MAC),
    ] {
        let fault = source.attach_nic(&refused).unwrap_err();
        assert_eq!(fault.code, Code::DeviceBusy, "{refused:?}: {fault}");
    }

    let target = migrate(&world, &source, "hot-plug", "tap2", 3);
    pinger.await_answers(20);
    assert_eq!(nics(&target.info()), [nic(3, "tap2", VmmDeviceState::Attached)]);
    let busy = Tap::find("tap2", Early::Yes).unwrap_err();
    assert_eq!(busy.code, Code::NicUnusable, "the VM has it: {busy}");
    target.detach_nic(&detach(2, 3, MAC)).unwrap();
    await_info(&target, "no NIC", |info| nics(info).is_empty());
    let free = Tap::find("tap2", Early::Yes).unwrap();
    await_console(target.console(), "the end of the NIC", |text| {
        text.contains("probe nic gone")
    });
    drop(free);
    // A call that comes too late brings nothing back; another NIC takes its slot.
    let late = target.attach_nic(&attach(1, 3, "tap2", MAC)).unwrap_err();
    assert_eq!(late.code, Code::DeviceBusy, "{late}");
    drop(pinger);
    target.attach_nic(&attach(3, 3, "tap1", OTHER_MAC)).unwrap();
    // Whose neighbour it is has changed.
    ip("neigh flush dev br0");
    let pinger = Pinger::start(EVERY, 1);
    pinger.await_answers(20);
    assert_intact(&text(target.console()));
}

#[test]
fn a_nic_that_a_guest_keeps_is_its_own_and_the_wish_travels() {
    needs_kvm!();
    needs_lan!();
    let world = World::new();
    tap("tap1");
    tap("tap2");
    let source = world.machine("host1", 1, |config| {
        cmdline(config, "echo");
        config["nics"] = json!([{"tap": "tap1", "mac": MAC}]);
    });
    grant(&source);
    await_console(source.console(), "a second", has_seconds(1));
    let pinger = Pinger::start(EVERY, 1);
    pinger.await_answers(20);
    let none = source.detach_nic(&detach(1, 1, OTHER_MAC)).unwrap();
    assert_eq!(nics(&none), [nic(1, "tap1", VmmDeviceState::Attached)]);
    let told = source.detach_nic(&detach(2, 1, MAC)).unwrap();
    assert_eq!(nics(&told), [nic(1, "tap1", VmmDeviceState::Ejecting)]);
    pinger.await_answers(20);
    let target = migrate(&world, &source, "echo", "tap2", 1);
    await_info(&target, "asked as before", |info| {
        nics(info) == [nic(1, "tap2", VmmDeviceState::Ejecting)]
    });
    pinger.await_answers(20);
}

#[test]
fn a_tap_that_cannot_be_had_gives_no_nic_and_the_vm_runs_on() {
    needs_kvm!();
    needs_lan!();
    let world = World::new();
    tap("tap1");
    let machine = world.machine("host1", 1, |config| cmdline(config, "hot-plug"));
    grant(&machine);
    await_console(machine.console(), "a second", has_seconds(1));
    let held = Tap::find("tap1", Early::Yes).unwrap();
    for (request, code) in [
        (attach(1, 1, "tap1", MAC), Code::NicUnusable),
        (attach(1, 1, "nowhere", MAC), Code::NicUnusable),
        (attach(1, 0, "tap1", MAC), Code::InvalidArgument),
        (attach(1, 1, "tap1", "53:54:00:77:00:02"), Code::InvalidArgument),
        (attach(1, 1, "tap1/..", MAC), Code::InvalidArgument),
    ] {
        let fault = machine.attach_nic(&request).unwrap_err();
        assert_eq!(fault.code, code, "{request:?}: {fault}");
    }
    drop(held);
    assert_eq!(machine.info().state(), VmmState::Running);
    assert!(nics(&machine.info()).is_empty());
    machine.attach_nic(&attach(1, 1, "tap1", MAC)).unwrap();
    let pinger = Pinger::start(EVERY, 1);
    pinger.await_answers(20);
}
