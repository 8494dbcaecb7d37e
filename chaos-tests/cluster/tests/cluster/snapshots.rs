//! A guest's memory and disk go back to one instant, in its place or beside it, and nothing is half-way whoever dies.

use drover_chaos_cluster::points::{
    AFTER_BEGIN_RESTORE, AFTER_NAMING, AFTER_RESTORE_COPY, AFTER_SNAPSHOT, BEFORE_BEGIN_RESTORE,
    BEFORE_NAMING, BEFORE_SNAPSHOT,
};
use drover_proto::Code;
use drover_proto::v1::{Snapshot, SnapshotPhase, VmDisk, VmSpec, VmState};

use super::*;

const BYTES: u64 = 16 << 20;
const JOURNAL: &str = "own=16M hot=4M rate=2000 disk=journal";
const CLONE: &str = "vm2";

/// The VM with its journal on the volume `data`, on host1.
fn boot_with_journal(cluster: &Cluster) -> Console {
    cluster
        .client
        .create_volume("data", BYTES)
        .expect("a volume is created");
    let disk = VmDisk {
        volume: "data".to_owned(),
        ..VmDisk::default()
    };
    let spec = VmSpec {
        disks: vec![disk],
        ..probe_spec(VM, "", 64, 1, JOURNAL)
    };
    cluster.client.create_vm(&spec, true).expect("the VM is created");
    cluster.client.await_running(VM);
    let mut console = Console::new(VM);
    acknowledged(cluster, &mut console, 2);
    console
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

fn ready(snapshot: &Snapshot) {
    assert_eq!(snapshot.phase(), SnapshotPhase::Ready, "{snapshot:?}");
    assert!(
        snapshot.bytes_stored > 0 && snapshot.bytes_total >= BYTES + (64 << 20),
        "{snapshot:?}"
    );
}

fn stop(cluster: &Cluster) {
    cluster.client.stop_vm(VM).expect("it runs");
    cluster
        .client
        .await_vm(VM, "stopped", |vm| vm.state() == VmState::Stopped);
    cluster.await_no_vmm(VM);
}

/// The guest as the console of a restored run has it: what it said before the instant, then what it says since.
fn restored_console(cluster: &Cluster, vm: &str, then: u64) -> Console {
    let mut console = Console::new(vm);
    let now = acknowledged(cluster, &mut console, 2);
    assert!(now > then, "{now} after the restore, {then} at the instant");
    let boots = console.lines.iter().filter(|line| line.starts_with("probe up"));
    assert_eq!(boots.count(), 1, "it went on, it did not boot");
    console
}

fn folders(cluster: &Cluster) -> usize {
    let volume = cluster.volume_folder("data");
    let pool = volume.parent().expect("a pool");
    let clusters = std::fs::read_dir(pool.join(".snapshots")).into_iter().flatten();
    let of = |entry: std::io::Result<std::fs::DirEntry>| std::fs::read_dir(entry.expect("a folder").path());
    clusters
        .flat_map(|entry| of(entry).expect("it can be read"))
        .count()
}

fn await_folders(cluster: &Cluster, want: usize) {
    drover_chaos_cluster::await_some(&format!("{want} snapshots' folders"), || match folders(cluster) {
        has if has == want => Ok(()),
        has => Err(format!("{has}")),
    });
}

#[test]
fn a_writing_guest_goes_back_to_one_instant_and_runs_beside_itself() {
    if let Some(cluster) = cluster() {
        goes_back_and_runs_beside_itself(&cluster);
    }
}

#[test]
fn a_writing_guest_outside_of_a_sandbox_goes_back_to_one_instant_and_runs_beside_itself() {
    if let Some(cluster) = Cluster::with_sandbox_or_skip(&Settings::default(), "off") {
        goes_back_and_runs_beside_itself(&cluster);
    }
}

fn goes_back_and_runs_beside_itself(cluster: &Cluster) {
    let mut console = boot_with_journal(cluster);
    let before = acknowledged(cluster, &mut console, 1);
    let begun = cluster.client.create_snapshot(VM, "nightly").expect("it runs");
    let last = cluster.client.migrate(VM, &host_name(1));
    if let Err(fault) = last {
        assert_eq!(fault.code, Code::SnapshotActive, "{fault}");
    }
    ready(&cluster.client.await_snapshot(VM, "nightly"));
    assert_eq!(begun.phase(), SnapshotPhase::Creating);
    cluster
        .client
        .await_vm(VM, "moved nowhere", |vm| vm.migration.is_empty());
    let reports_then = console.reports.len();
    // It writes on, and its journal goes far beyond what it was.
    let after = acknowledged(cluster, &mut console, 6);
    assert!(after > before, "{after} after, {before} before");

    cluster.client.restore_vm(VM, "nightly", CLONE).expect("it fits");
    cluster.client.await_running(CLONE);
    let mut beside = restored_console(cluster, CLONE, before);
    cluster.await_runs_exactly_once(CLONE);
    cluster.await_runs_exactly_once(VM);
    let fault = cluster
        .client
        .delete_volume("vm2-data", true)
        .expect_err("the clone has it");
    assert_eq!(fault.code, Code::VolumeInUse);
    assert!(
        acknowledged(cluster, &mut console, 1) > after,
        "the original was not touched"
    );

    let fault = cluster.client.restore_vm(VM, "nightly", "").expect_err("it runs");
    assert_eq!(fault.code, Code::VmState, "{fault}");
    let replaced = cluster.volume_file("data");
    stop(cluster);
    let reports_last = console.reports.len();
    cluster
        .client
        .restore_vm(VM, "nightly", "")
        .expect("it is stopped");
    cluster.client.await_running(VM);
    let mut console = Console::new(VM);
    drover_chaos_cluster::await_some("the console's beginning", || console.pull(&cluster.client));
    assert!(
        console.reports.len() < reports_last,
        "{} reports, {reports_then} at the instant, {reports_last} at the end",
        console.reports.len()
    );
    let mut console = restored_console(cluster, VM, before);
    drover_chaos_cluster::await_some("what was replaced to be removed", || match replaced.exists() {
        false => Ok(()),
        true => Err(format!("{} is there", replaced.display())),
    });
    // From here on it is as any other: what it writes is there after the next start.
    let restored = acknowledged(cluster, &mut console, 1);
    stop(cluster);
    cluster.client.start_vm(VM).expect("it is stopped");
    cluster.client.await_running(VM);
    let mut console = Console::new(VM);
    console.await_more(&cluster.client, 1);
    let found = console
        .lines
        .iter()
        .find_map(|line| drover_probe::report::DiskFound::parse(line));
    let found = found.expect("the guest read its journal when it booted");
    assert!(
        found.lost == 0 && found.sequence >= restored,
        "{found:?}, {restored} was acknowledged"
    );

    cluster
        .client
        .delete_snapshot(VM, "nightly")
        .expect("nobody needs it");
    await_folders(cluster, 0);
    acknowledged(cluster, &mut beside, 1);
    assert_sound_at_the_end(cluster, &mut console);
}

#[test]
fn whoever_dies_while_a_snapshot_is_taken_leaves_a_whole_one_or_nothing() {
    let Some(mut cluster) = cluster() else { return };
    let mut console = boot_with_journal(&cluster);
    let (host, epoch) = cluster.await_runs_exactly_once(VM);
    // The agent, before and after it has told the VMM, and before and after it has named what that sealed.
    for (name, point) in [
        ("before", BEFORE_SNAPSHOT),
        ("after", AFTER_SNAPSHOT),
        ("unnamed", BEFORE_NAMING),
        ("named", AFTER_NAMING),
    ] {
        cluster.hold(point);
        cluster.client.create_snapshot(VM, name).expect("it runs");
        cluster.await_reached(point);
        let snapshot = cluster.client.snapshot(VM, name).expect("it is known");
        assert_eq!(snapshot.phase(), SnapshotPhase::Creating, "{point}: {snapshot:?}");
        cluster.kill_agent(host);
        cluster.release(point);
        cluster.start_agent(host);
        ready(&cluster.client.await_snapshot(VM, name));
    }
    // The leader.
    cluster.hold(BEFORE_SNAPSHOT);
    cluster.client.create_snapshot(VM, "leader").expect("it runs");
    cluster.await_reached(BEFORE_SNAPSHOT);
    let leader = cluster.leader();
    cluster.kill_controller(leader);
    cluster.release(BEFORE_SNAPSHOT);
    ready(&cluster.client.await_snapshot(VM, "leader"));
    cluster.start_controller(leader);
    acknowledged(&cluster, &mut console, 2);
    await_folders(&cluster, 5);
    // The VMM: the snapshot fails with the run, and its folder goes.
    cluster.hold(BEFORE_SNAPSHOT);
    cluster.client.create_snapshot(VM, "vmm").expect("it runs");
    cluster.await_reached(BEFORE_SNAPSHOT);
    assert_eq!(cluster.kill_vmms_for(host, VM, epoch), 1);
    cluster.release(BEFORE_SNAPSHOT);
    let failed = cluster.client.await_snapshot(VM, "vmm");
    assert_eq!(failed.phase(), SnapshotPhase::Failed, "{failed:?}");
    await_folders(&cluster, 5);
    drover_chaos_cluster::await_some("its leftovers to be known as gone", || {
        let failed = cluster
            .client
            .snapshot(VM, "vmm")
            .map_err(|fault| fault.to_string())?;
        failed.cleared.then_some(()).ok_or(format!("{failed:?}"))
    });
    // What was whole is whole.
    let vm = cluster.client.vm(VM).expect("it is known");
    assert_eq!(vm.state(), VmState::Failed);
    cluster
        .client
        .restore_vm(VM, "leader", "")
        .expect("it has failed");
    cluster.client.await_running(VM);
    let mut console = restored_console(&cluster, VM, 0);
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn whoever_dies_while_a_vm_is_restored_leaves_it_as_it_was_until_it_begins_and_as_the_snapshot_from_then_on()
{
    let Some(mut cluster) = cluster() else { return };
    let mut console = boot_with_journal(&cluster);
    let before = acknowledged(&cluster, &mut console, 1);
    cluster.client.create_snapshot(VM, "nightly").expect("it runs");
    ready(&cluster.client.await_snapshot(VM, "nightly"));
    acknowledged(&cluster, &mut console, 2);
    stop(&cluster);
    let file = cluster.volume_file("data");
    let content = std::fs::read(&file).expect("its file is there");

    // Withdrawn between the copy and the beginning: the VM is what it was.
    cluster.hold(AFTER_RESTORE_COPY);
    cluster
        .client
        .restore_vm(VM, "nightly", "")
        .expect("it is stopped");
    cluster.await_reached(AFTER_RESTORE_COPY);
    cluster.assert_nobody_runs(VM);
    cluster.client.stop_vm(VM).expect("it is to be restored");
    cluster.release(AFTER_RESTORE_COPY);
    cluster.client.await_vm(VM, "stopped", |vm| {
        vm.state() == VmState::Stopped && vm.restore.is_none()
    });
    let now = std::fs::read(&file).expect("its file is there");
    assert!(now == content, "the volume was touched");

    // The agent: after the copy, and after the beginning is in the log.
    for point in [AFTER_RESTORE_COPY, AFTER_BEGIN_RESTORE] {
        cluster.hold(point);
        cluster
            .client
            .restore_vm(VM, "nightly", "")
            .expect("it is stopped");
        cluster.await_reached(point);
        // Once the beginning is in the log, an agent that reads so in its desired state may run it already.
        if point == AFTER_RESTORE_COPY {
            cluster.assert_nobody_runs(VM);
        }
        let vm = cluster.client.vm(VM).expect("it is known");
        let host = vm.placement.expect("it is placed").host;
        let host = (0..PARTIES)
            .find(|index| host_name(*index) == host)
            .expect("a host");
        cluster.kill_agent(host);
        cluster.release(point);
        cluster.start_agent(host);
        cluster.client.await_running(VM);
        restored_console(&cluster, VM, before);
        cluster.await_runs_exactly_once(VM);
        stop(&cluster);
    }
    // The leader, which has been asked whether it may begin.
    cluster.hold(BEFORE_BEGIN_RESTORE);
    cluster
        .client
        .restore_vm(VM, "nightly", "")
        .expect("it is stopped");
    cluster.await_reached(BEFORE_BEGIN_RESTORE);
    cluster.assert_nobody_runs(VM);
    let leader = cluster.leader();
    cluster.kill_controller(leader);
    cluster.release(BEFORE_BEGIN_RESTORE);
    cluster.client.await_running(VM);
    let mut console = restored_console(&cluster, VM, before);
    cluster.start_controller(leader);
    // The VMM, as soon as it runs: the next start boots what it had begun to write on.
    let (host, epoch) = cluster.await_runs_exactly_once(VM);
    let written = acknowledged(&cluster, &mut console, 1);
    assert_eq!(cluster.kill_vmms_for(host, VM, epoch), 1);
    cluster
        .client
        .await_vm(VM, "failed", |vm| vm.state() == VmState::Failed);
    let mut console = boot_again(&cluster);
    let found = console
        .lines
        .iter()
        .find_map(|line| drover_probe::report::DiskFound::parse(line));
    let found = found.expect("the guest read its journal when it booted");
    assert!(
        found.lost == 0 && found.sequence >= written,
        "{found:?}, {written} was acknowledged"
    );
    assert_sound_at_the_end(&cluster, &mut console);
}
