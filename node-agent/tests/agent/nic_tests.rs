//! NICs that come and go while their VM runs, in a network namespace of each test's own: what is there at each step, and what is left.

use std::collections::BTreeSet;
use std::process::Command;

use drover_node_agent::network::config::BridgeConfig;
use drover_node_agent::network::plan::Nic;
use drover_proto::Code;
use drover_proto::v1::*;
use nix::sched::{CloneFlags, unshare};

use crate::PATIENCE;
use crate::fake_fleet::Call;
use crate::world::{World, run};

const FOLDER: &str = "e1-start";
const FIRST: &str = "52:54:00:00:00:01";
const SECOND: &str = "52:54:00:00:00:02";

/// For this thread and those that it makes.
pub fn enter_namespace() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    ip("link set lo up");
}

fn ip(words: &str) -> String {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {words}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn is_there(tap: &str) -> bool {
    nix::net::if_::if_nametoindex(tap).is_ok()
}

/// A host that offers "lan", and one whose VM is `spec`'s.
async fn world() -> World {
    let mut world = World::new().await;
    let bridge = BridgeConfig {
        bridge: None,
        uplink: None,
    };
    world.config.networks.bridges.insert("lan".to_owned(), bridge);
    world
}

fn nic(mac: &str, attach_revision: u64, detach_revision: u64) -> VmNic {
    VmNic {
        network: "lan".to_owned(),
        mac: mac.to_owned(),
        slot: if mac == FIRST { 1 } else { 2 },
        attach_revision,
        detach_revision,
        ..VmNic::default()
    }
}

/// vm1 with these NICs.
fn wanted(revision: u64, nics: &[VmNic], network: &str) -> HostDesired {
    let mut desired = run(1, None);
    let vm = &mut desired.vms[0];
    let spec = vm.spec.as_mut().unwrap();
    spec.cmdline = "devices".to_owned();
    spec.devices_revision = revision;
    spec.nics = nics.to_vec();
    for nic in &mut spec.nics {
        network.clone_into(&mut nic.network);
    }
    let network = Network {
        name: network.to_owned(),
        mtu: 1400,
        ..Network::default()
    };
    vm.networks = nics.iter().map(|_| network.clone()).collect();
    desired
}

fn say(world: &World, desired: HostDesired) {
    world.fleet.say(|script| {
        script.desired = desired;
        script.grants = vec![("vm1".into(), 1)];
    });
}

/// The NICs that stand in the VMM's folder.
fn written(world: &World) -> Vec<Nic> {
    let text = std::fs::read(world.folder(FOLDER).join("nics.json")).unwrap_or(b"[]".to_vec());
    serde_json::from_slice(&text).expect("whole at any moment")
}

/// The VMM's NICs, by MAC and TAP.
fn has(info: &VmmInfo) -> BTreeSet<(String, String)> {
    let devices = info.devices.iter().flat_map(|devices| &devices.devices);
    devices
        .map(|device| (device.mac.clone(), device.tap.clone()))
        .collect()
}

async fn until_nics(world: &World, macs: &[&str]) -> VmmInfo {
    let is_so = |info: &VmmInfo| {
        let has: Vec<String> = has(info).into_iter().map(|(mac, _)| mac).collect();
        has == macs
    };
    world.until_vmm(FOLDER, &format!("with {macs:?}"), is_so).await
}

/// Waits until exactly these NICs are written down, and their TAPs alone are there.
async fn until_kept(world: &World, macs: &[&str]) {
    let settled = async {
        loop {
            let nics = written(world);
            let shown = ip("-o link show type tun");
            let all_there = nics.iter().all(|nic| is_there(&nic.tap));
            let has: Vec<String> = nics.iter().map(Nic::mac_text).collect();
            if has == macs && all_there && shown.lines().count() == macs.len() {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, settled)
        .await
        .unwrap_or_else(|_| panic!("kept is {:?}, not {macs:?}: {}", written(world), ip("-o link")));
}

async fn until_ejecting(world: &World) -> VmmInfo {
    let ejecting = |info: &VmmInfo| {
        let mut devices = info.devices.iter().flat_map(|devices| &devices.devices);
        devices.any(|device| device.state() == VmmDeviceState::Ejecting)
    };
    world.until_vmm(FOLDER, "asked to give one up", ejecting).await
}

/// Waits for a report of these MACs by the VMM's devices.
async fn until_reported(world: &World, macs: &[&str]) -> VmDevices {
    let reported = |call: &Call| match call {
        Call::Vm(ReportVmRequest {
            devices: Some(devices),
            ..
        }) => {
            let told: Vec<&str> = devices.devices.iter().map(|device| device.mac.as_str()).collect();
            (devices.tells_nics && told == macs).then(|| devices.clone())
        }
        _ => None,
    };
    world
        .fleet
        .until(&format!("a report of {macs:?}"), reported)
        .await
}

pub async fn a_tap_is_there_before_its_nic_and_goes_after_the_guest_has_given_it_up() {
    let world = world().await;
    let _agent = world.agent().await;
    say(&world, wanted(0, &[nic(FIRST, 0, 0)], "lan"));
    until_nics(&world, &[FIRST]).await;
    until_kept(&world, &[FIRST]).await;

    say(&world, wanted(1, &[nic(FIRST, 0, 0), nic(SECOND, 1, 0)], "lan"));
    let info = until_nics(&world, &[FIRST, SECOND]).await;
    until_reported(&world, &[FIRST, SECOND]).await;
    until_kept(&world, &[FIRST, SECOND]).await;
    let kept: BTreeSet<(String, String)> = written(&world)
        .into_iter()
        .map(|nic| (nic.mac_text(), nic.tap))
        .collect();
    assert_eq!(kept, has(&info));

    say(&world, wanted(2, &[nic(FIRST, 0, 0), nic(SECOND, 1, 2)], "lan"));
    until_ejecting(&world).await;
    world.fleet.until_heartbeats(2).await;
    until_kept(&world, &[FIRST, SECOND]).await;
    world.happen(FOLDER, "give-up").await;
    until_kept(&world, &[FIRST]).await;
    world.fleet.forget_calls();
    // The first of the VM goes as those that came later do, and it comes again under another name.
    say(&world, wanted(3, &[nic(FIRST, 0, 3)], "lan"));
    until_ejecting(&world).await;
    let before = written(&world);
    world.happen(FOLDER, "give-up").await;
    until_kept(&world, &[]).await;
    until_reported(&world, &[]).await;
    say(&world, wanted(4, &[nic(FIRST, 4, 0)], "lan"));
    until_kept(&world, &[FIRST]).await;
    until_nics(&world, &[FIRST]).await;
    assert_ne!(written(&world)[0].tap, before[0].tap);
}

pub async fn an_agent_that_is_killed_between_any_two_steps_leaves_what_the_next_makes_good() {
    let world = world().await;
    let agent = world.agent().await;
    say(&world, wanted(1, &[nic(FIRST, 0, 0)], "lan"));
    until_nics(&world, &[FIRST]).await;
    // Killed when the NIC stood in the folder and its VMM was not told.
    drop(agent);
    let mut nics = written(&world);
    let mut late = nics[0].clone();
    (late.mac[5], late.revision, late.slot) = (2, 2, 2);
    late.tap
        .replace_range(14.., if late.tap.ends_with('a') { "b" } else { "a" });
    nics.push(late.clone());
    let path = world.folder(FOLDER).join("nics.json");
    std::fs::write(&path, serde_json::to_vec(&nics).unwrap()).unwrap();
    say(&world, wanted(2, &[nic(FIRST, 0, 0), nic(SECOND, 2, 0)], "lan"));
    let agent = world.agent().await;
    let info = until_nics(&world, &[FIRST, SECOND]).await;
    assert!(
        has(&info).contains(&(SECOND.to_owned(), late.tap.clone())),
        "{info:?}"
    );
    until_kept(&world, &[FIRST, SECOND]).await;
    // Killed while the guest was asked; it gives the NIC up while nobody watches.
    say(&world, wanted(3, &[nic(FIRST, 0, 0), nic(SECOND, 2, 3)], "lan"));
    until_ejecting(&world).await;
    drop(agent);
    world.happen(FOLDER, "give-up").await;
    assert_eq!(written(&world).len(), 2);
    let agent = world.agent().await;
    until_kept(&world, &[FIRST]).await;
    drop(agent);
    // Killed before it was told of a NIC that is wanted no more by the time the next comes: neither the VMM gets it, nor does its TAP stay.
    let mut nics = written(&world);
    (late.revision, late.tap) = (4, format!("{}c", &nics[0].tap[..14]));
    nics.push(late);
    std::fs::write(&path, serde_json::to_vec(&nics).unwrap()).unwrap();
    say(&world, wanted(5, &[nic(FIRST, 0, 0)], "lan"));
    let _agent = world.agent().await;
    until_kept(&world, &[FIRST]).await;
    let info = until_nics(&world, &[FIRST]).await;
    assert_eq!(info.devices.unwrap().revision, 5, "what comes late is refused");
}

pub async fn a_network_that_is_not_there_gives_no_nic_and_is_reported() {
    let world = world().await;
    let _agent = world.agent().await;
    say(&world, wanted(0, &[], "lan"));
    until_nics(&world, &[]).await;
    say(&world, wanted(1, &[nic(FIRST, 1, 0)], "elsewhere"));
    let devices = until_reported(&world, &[FIRST]).await;
    let device = &devices.devices[0];
    assert_eq!(device.state(), VmDeviceState::Failed);
    let reason = device.reason.as_ref().unwrap();
    assert_eq!(reason.code, Code::NetworkUnavailable.as_str(), "{reason:?}");
    let lives = until_nics(&world, &[]).await;
    assert_eq!(lives.state(), VmmState::Running);
    say(&world, wanted(2, &[nic(FIRST, 2, 0)], "lan"));
    until_nics(&world, &[FIRST]).await;
    until_kept(&world, &[FIRST]).await;
}
