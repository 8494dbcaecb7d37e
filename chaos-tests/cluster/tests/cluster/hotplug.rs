//! A disk that comes to a running VM is there wherever the VM is then, once, and goes when its guest gives it up.

use drover_chaos_cluster::points::AFTER_ATTACH;
use drover_proto::Code;
use drover_proto::v1::{RestartPolicy, VmDeviceState, VmSpec, VmState, VmmDevice};

use super::*;

const BYTES: u64 = 16 << 20;
const HOT_PLUG: &str = "own=16M hot=4M rate=2000 disk=hot-plug";

/// The VM without disks, on host1, and the volumes `data` and `more`.
fn boot_without_disks(cluster: &Cluster) -> Console {
    for volume in ["data", "more"] {
        cluster
            .client
            .create_volume(volume, BYTES)
            .expect("a volume is created");
    }
    let spec = VmSpec {
        restart: RestartPolicy::OnFailure.into(),
        ..probe_spec(VM, &host_name(0), 64, 1, HOT_PLUG)
    };
    cluster.client.create_vm(&spec, true).expect("the VM is created");
    cluster.client.await_running(VM);
    let mut console = Console::new(VM);
    let second = console.await_more(&cluster.client, 1);
    assert!(second.disk.is_none(), "{second:?}");
    console
}

/// The last sequence that the guest said is durable, once that is above `before`.
fn acknowledged(cluster: &Cluster, console: &mut Console, before: u64) -> u64 {
    drover_chaos_cluster::await_some(&format!("the journal to be beyond {before}"), || {
        let disk = console.await_more(&cluster.client, 1).disk;
        let disk = disk.ok_or("the guest has no disk")?;
        assert_eq!(disk.lost, 0, "the guest's disk lost something: {disk:?}");
        (disk.sequence > before)
            .then_some(disk.sequence)
            .ok_or(format!("{disk:?}"))
    })
}

/// The volumes of the specification, with their slots.
fn specified(vm: &Vm) -> Vec<(&str, u32)> {
    let disks = vm.spec.iter().flat_map(|spec| &spec.disks);
    disks.map(|disk| (disk.volume.as_str(), disk.slot)).collect()
}

/// Waits until the cluster says that these volumes are attached, in these slots, and nothing else is.
fn await_attached(cluster: &Cluster, want: &[(&str, u32)]) {
    cluster
        .client
        .await_vm(VM, &format!("seen with {want:?}"), |vm| reported(vm) == want);
}

fn reported(vm: &Vm) -> Vec<(&str, u32)> {
    let devices = vm.devices.iter().flat_map(|devices| &devices.devices);
    let attached = devices.filter(|device| device.state() == VmDeviceState::Attached);
    attached
        .map(|device| (device.volume.as_str(), device.slot))
        .collect()
}

/// What the only VMM of the VM has, by its own word. Hosts may spell a file's path otherwise.
fn plugged(cluster: &Cluster) -> Vec<VmmDevice> {
    cluster.await_runs_exactly_once(VM);
    let mut vmms = cluster.vmms(VM);
    assert_eq!(vmms.len(), 1, "{vmms:?}");
    let mut devices = vmms.remove(0).info.devices.expect("this version says so").devices;
    for device in &mut devices {
        let path = std::fs::canonicalize(&device.path).expect("its file is there");
        device.path = path.display().to_string();
    }
    devices
}

fn attach(cluster: &Cluster, volume: &str) {
    let vm = cluster.client.attach_disk(VM, volume).expect("the VM runs");
    assert!(specified(&vm).iter().any(|(has, _)| *has == volume), "{vm:?}");
}

#[test]
fn a_disk_that_comes_to_a_running_vm_moves_and_restarts_with_it_until_its_guest_gives_it_up() {
    let Some(mut cluster) = cluster() else { return };
    let mut console = boot_without_disks(&cluster);
    attach(&cluster, "data");
    await_attached(&cluster, &[("data", 1)]);
    let came = acknowledged(&cluster, &mut console, 0);

    let moved = cluster
        .client
        .migrate(VM, &host_name(1))
        .expect("both hosts have the pool");
    assert_done(&cluster.client.await_end(&moved.id));
    await_attached(&cluster, &[("data", 1)]);
    let arrived = acknowledged(&cluster, &mut console, came);

    cluster.client.detach_disk(VM, "data").expect("it has it");
    cluster
        .client
        .await_vm(VM, "without disks", |vm| specified(vm).is_empty());
    assert!(plugged(&cluster).is_empty());
    let second = console.await_more(&cluster.client, 2);
    assert!(second.disk.is_none(), "{second:?}");
    let gone = console
        .lines
        .iter()
        .filter(|line| line.contains("probe disk gone"));
    assert_eq!(gone.count(), 1);

    // In slots that no counting in this order leads to.
    attach(&cluster, "more");
    await_attached(&cluster, &[("more", 1)]);
    // The guest takes one of those that come at once, and hears of the others no more.
    acknowledged(&cluster, &mut console, 0);
    attach(&cluster, "data");
    await_attached(&cluster, &[("more", 1), ("data", 2)]);
    cluster.client.detach_disk(VM, "more").expect("it has it");
    await_attached(&cluster, &[("data", 2)]);
    let again = acknowledged(&cluster, &mut console, arrived);
    let before = plugged(&cluster);
    let (host, epoch) = cluster.await_runs_exactly_once(VM);
    assert_eq!(cluster.kill_vmms_for(host, VM, epoch), 1);
    cluster.client.await_vm(VM, "running again", |vm| {
        vm.state() == VmState::Running && vm.placement.as_ref().is_some_and(|at| at.epoch == epoch + 1)
    });
    let mut console = Console::new(VM);
    acknowledged(&cluster, &mut console, again);
    assert_eq!(plugged(&cluster), before);
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn an_agent_that_dies_before_it_reports_what_it_attached_leaves_one_disk() {
    let Some(mut cluster) = cluster() else { return };
    let mut console = boot_without_disks(&cluster);
    cluster.hold(AFTER_ATTACH);
    attach(&cluster, "data");
    cluster.await_reached(AFTER_ATTACH);
    let vm = cluster.client.vm(VM).expect("the VM is known");
    assert!(reported(&vm).is_empty(), "{vm:?}");
    cluster.kill_agent(0);
    let attached = plugged(&cluster);
    assert_eq!(attached.len(), 1, "{attached:?}");
    cluster.release(AFTER_ATTACH);
    cluster.hold(AFTER_ATTACH);
    cluster.start_agent(0);
    await_attached(&cluster, &[("data", 1)]);
    assert_eq!(plugged(&cluster), attached);
    assert!(!cluster.reached(AFTER_ATTACH), "it was attached twice");
    cluster.release(AFTER_ATTACH);
    acknowledged(&cluster, &mut console, 0);
    let fault = cluster.client.attach_disk(VM, "data").expect_err("the VM has it");
    assert_eq!(fault.code, Code::VolumeInUse, "{fault}");
    assert_sound_at_the_end(&cluster, &mut console);
}
