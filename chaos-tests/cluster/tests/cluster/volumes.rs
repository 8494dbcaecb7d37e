//! What a guest has written to a volume is there wherever and however often its VM starts.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use drover_chaos_cluster::points::{AFTER_FILL, BEFORE_FILL};
use drover_probe::report::DiskFound;
use drover_proto::Code;
use drover_proto::v1::{Host, HostState, RestartPolicy, VmDisk, VmSpec, VmState, Volume};

use super::*;

const BYTES: u64 = 16 << 20;
const JOURNAL: &str = "own=16M hot=4M rate=2000 disk=journal";

fn with_disk(name: &str, host: &str) -> VmSpec {
    VmSpec {
        host: host.to_owned(),
        ..with_volume(name, "data")
    }
}

fn with_volume(name: &str, volume: &str) -> VmSpec {
    let disk = VmDisk {
        volume: volume.to_owned(),
        ..VmDisk::default()
    };
    VmSpec {
        disks: vec![disk],
        restart: RestartPolicy::OnFailure.into(),
        ..probe_spec(name, "", 64, 1, JOURNAL)
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
    let content = cluster.volume_file("data");
    let file = std::fs::metadata(&content).expect("the first start made its file");
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
            .delete_volume("data", true)
            .map_err(|fault| fault.to_string())
    });
    await_removed(&content);
}

/// Waits until a host has removed it.
fn await_removed(file: &Path) {
    drover_chaos_cluster::await_some("the volume's file to be removed", || match file.exists() {
        false => Ok(()),
        true => Err(file.display().to_string()),
    });
}

fn qemu_img(words: &[&str], files: [&Path; 2]) {
    let made = Command::new("qemu-img").args(words).args(files).output();
    let made = made.expect("qemu-img is installed");
    assert!(made.status.success(), "{made:?}");
}

#[test]
fn a_volume_made_of_an_image_holds_it_whole_whoever_dies_meanwhile_and_goes_when_it_is_deleted() {
    let Some(mut cluster) = cluster() else { return };
    cluster
        .client
        .create_volume("data", BYTES)
        .expect("a volume is created");
    cluster
        .client
        .create_vm(&with_disk(VM, ""), true)
        .expect("the VM is created");
    cluster.client.await_running(VM);
    let written = acknowledged(&cluster, &mut Console::new(VM), 2);
    cluster.client.stop_vm(VM).expect("it runs");
    cluster
        .client
        .await_vm(VM, "stopped", |vm| vm.state() == VmState::Stopped);

    // As a cloud image comes: compressed, and put there under its name when it is whole.
    let (scratch, image) = (
        cluster.scratch().join("journal"),
        cluster.images().join("journal"),
    );
    let words = ["convert", "-c", "-f", "raw", "-O", "qcow2"];
    qemu_img(&words, [&cluster.volume_file("data"), &scratch]);
    std::fs::rename(&scratch, &image).expect("it is there");
    drover_chaos_cluster::await_some("all hosts to tell of the image", || {
        let hosts = cluster.client.hosts().map_err(|fault| fault.to_string())?;
        let tells = |host: &Host| {
            let images = host.spec.iter().flat_map(|spec| &spec.images);
            let mut images = images.filter(|image| image.name == "journal");
            images.any(|image| image.kind == "qcow2" && image.disk_bytes == BYTES)
        };
        match hosts.iter().filter(|host| tells(host)).count() {
            PARTIES => Ok(()),
            some => Err(format!("{some} of {PARTIES}")),
        }
    });
    for (named, code) in [("probe", Code::ImageUnusable), ("none", Code::ImageNotFound)] {
        let fault = cluster
            .client
            .create_volume_of("bad", named)
            .expect_err("no disk");
        assert_eq!((fault.code, fault.field.as_str()), (code, "volume.image"));
    }

    // Whoever fills it dies: before it has begun, for good; and with the content in its place, unreported.
    let pool_file = |volume: &Volume| format!("{}/data-{}.raw", volume.name, volume.content);
    let pool = cluster.volume_folder("data");
    let pool = pool.parent().expect("a pool").to_owned();
    cluster.hold(BEFORE_FILL);
    let first = cluster
        .client
        .create_volume_of("first", "journal")
        .expect("it fits");
    assert_eq!(first.size_bytes, BYTES);
    cluster.await_reached(BEFORE_FILL);
    let fault = cluster
        .client
        .create_vm(&with_volume("vm2", "first"), true)
        .expect_err("it is not filled");
    assert_eq!(fault.code, Code::VolumeNotReady);
    let first_file = pool.join(pool_file(&first));
    assert!(!first_file.exists());
    cluster.kill_agent(0);
    cluster.release(BEFORE_FILL);
    cluster
        .client
        .await_volume("first", "filled by the other host", |volume| !volume.filling);
    assert!(first_file.exists());
    cluster.start_agent(0);
    drover_chaos_cluster::await_some("the host to be up again", || {
        let hosts = cluster.client.hosts().map_err(|fault| fault.to_string())?;
        let is_up = |host: &Host| host.state() == HostState::Up;
        match hosts.iter().filter(|host| is_up(host)).count() {
            PARTIES => Ok(()),
            some => Err(format!("{some} of {PARTIES}")),
        }
    });

    cluster.hold(AFTER_FILL);
    let second = cluster
        .client
        .create_volume_of("second", "journal")
        .expect("it fits");
    cluster.await_reached(AFTER_FILL);
    let second_file = pool.join(pool_file(&second));
    assert!(second_file.exists());
    cluster.kill_agent(0);
    cluster.release(AFTER_FILL);
    cluster.start_agent(0);
    cluster
        .client
        .await_volume("second", "filled", |volume| !volume.filling);

    for (vm, volume) in [("vm2", "first"), ("vm3", "second")] {
        cluster
            .client
            .create_vm(&with_volume(vm, volume), true)
            .expect("it is filled");
        cluster.client.await_running(vm);
        let mut console = Console::new(vm);
        let now = acknowledged(&cluster, &mut console, 1);
        let found = console.lines.iter().find_map(|line| DiskFound::parse(line));
        let found = found.expect("the guest read its journal when it booted");
        assert!(
            found.lost == 0 && found.sequence >= written && now > found.sequence,
            "{written} was acknowledged, {found:?} found, {now} now"
        );
        cluster.client.delete_vm(vm).expect("it is deleted");
        cluster.await_no_vmm(vm);
    }
    for (volume, removes, file) in [("first", false, &first_file), ("second", true, &second_file)] {
        drover_chaos_cluster::await_some("the volume to be free", || {
            let deleted = cluster.client.delete_volume(volume, removes);
            deleted.map_err(|fault| fault.to_string())
        });
        if removes {
            await_removed(file);
        }
    }
    assert!(first_file.exists(), "it was to be kept");
    cluster.witness.assert_clean();
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
    let fault = cluster
        .client
        .delete_volume("data", false)
        .expect_err("a VM has it");
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
