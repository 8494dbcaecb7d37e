//! What a guest has written to a volume is there wherever and however often its VM starts.

use std::os::unix::fs::MetadataExt;

use drover_probe::report::DiskFound;
use drover_proto::Code;
use drover_proto::v1::{RestartPolicy, VmDisk, VmSpec, VmState};

use super::*;

const BYTES: u64 = 16 << 20;
const JOURNAL: &str = "own=16M hot=4M rate=2000 disk=journal";

fn with_disk(name: &str, host: &str) -> VmSpec {
    let disk = VmDisk {
        volume: "data".to_owned(),
        ..VmDisk::default()
    };
    VmSpec {
        disks: vec![disk],
        restart: RestartPolicy::OnFailure.into(),
        ..probe_spec(name, host, 64, 1, JOURNAL)
    }
}

/// The last sequence that the guest said is durable, after `more` reports; all that it said of its disk must be whole and rise.
fn acknowledged(cluster: &Cluster, console: &mut Console, more: usize) -> u64 {
    console.await_more(&cluster.client, more);
    let mut last = 0;
    for report in &console.reports {
        let disk = report.disk.expect("the guest keeps its journal");
        assert_eq!(disk.lost, 0, "the guest's disk lost something: {report:?}");
        assert!(
            disk.sequence >= last,
            "the journal went back from {last}: {report:?}"
        );
        last = disk.sequence;
    }
    last
}

#[test]
fn a_volume_follows_its_vm_through_a_migration_an_upgrade_and_the_kill_of_its_vmm() {
    let Some(mut cluster) = cluster() else { return };
    cluster
        .client
        .create_volume("data", BYTES)
        .expect("a volume is created");
    assert!(!cluster.volume_file("data").exists(), "nobody needs it yet");
    cluster
        .client
        .create_vm(&with_disk(VM, ""), true)
        .expect("the VM is created");
    cluster.client.await_running(VM);
    let mut console = Console::new(VM);
    let booted = acknowledged(&cluster, &mut console, 2);
    assert!(booted > 0, "the journal is written to");
    let file = std::fs::metadata(cluster.volume_file("data")).expect("the first start made its file");
    assert_eq!(file.len(), BYTES);
    assert!(
        file.blocks() * 512 < BYTES / 2,
        "it takes the room of what was written"
    );
    assert_refused(&cluster);

    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    let target = 1 - source;
    let moved = cluster
        .client
        .migrate(VM, &host_name(target))
        .expect("both hosts have the pool");
    assert_done(&cluster.client.await_end(&moved.id));
    assert_eq!(cluster.await_runs_exactly_once(VM), (target, epoch + 1));
    let arrived = acknowledged(&cluster, &mut console, 2);
    assert!(arrived > booted, "{arrived} after the migration, {booted} before");

    let upgraded = cluster.client.upgrade(VM).expect("an upgrade is planned");
    assert_done(&cluster.client.await_end(&upgraded.id));
    let replaced = acknowledged(&cluster, &mut console, 2);
    assert!(
        replaced > arrived,
        "{replaced} after the upgrade, {arrived} before"
    );

    assert!(cluster.kill_vmms_for(target, VM, epoch + 2) > 0);
    cluster.client.await_vm(VM, "running again", |vm| {
        vm.state() == VmState::Running && vm.placement.as_ref().is_some_and(|at| at.epoch == epoch + 3)
    });
    let (restarted, _) = cluster.await_runs_exactly_once(VM);
    assert!(restarted < PARTIES - 1, "the last host has no pool");
    let mut console = Console::new(VM);
    let after = acknowledged(&cluster, &mut console, 2);
    let found = console.lines.iter().find_map(|line| DiskFound::parse(line));
    let found = found.expect("the guest read its journal when it booted");
    assert_eq!(found.lost, 0, "{found:?}");
    assert!(
        found.sequence >= replaced && after > found.sequence,
        "{replaced} was acknowledged, {found:?} found, {after} now"
    );
    cluster.witness.assert_clean();

    cluster.client.delete_vm(VM).expect("the VM is deleted");
    cluster.await_no_vmm(VM);
    drover_chaos_cluster::await_some("the volume to be free", || {
        cluster
            .client
            .delete_volume("data")
            .map_err(|fault| fault.to_string())
    });
    assert!(cluster.volume_file("data").exists(), "no agent removes a file");
}

/// Another VM, another host, and the volume's end are refused as long as the VM has it.
fn assert_refused(cluster: &Cluster) {
    let fault = cluster
        .client
        .create_vm(&with_disk("vm2", ""), true)
        .expect_err("the volume is another VM's");
    assert_eq!(
        (fault.code, fault.field.as_str()),
        (Code::VolumeInUse, "spec.disks.volume")
    );
    let fault = cluster.client.delete_volume("data").expect_err("a VM has it");
    assert_eq!(fault.code, Code::VolumeInUse);
    let last = host_name(PARTIES - 1);
    let fault = cluster
        .client
        .migrate(VM, &last)
        .expect_err("that host has no pool");
    assert_eq!(fault.code, Code::NoHostFits);
    let reason = format!("{last} has no pool \"default\", in which volume data is");
    assert!(fault.message.contains(&reason), "{fault}");
    let volumes = cluster.client.volumes().expect("volumes are listed");
    assert!(
        volumes.len() == 1 && volumes[0].used && volumes[0].vms == [VM],
        "{volumes:?}"
    );
}
