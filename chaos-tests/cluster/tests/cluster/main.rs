//! What holds of a whole cluster, shown with real processes and real guests.
//!
//! One cluster a test, reused inside its loops. Every test ends by asking the witness whether the right to run was ever
//! broken, and by asking the guest whether it lost anything.

mod bad_input;
mod balloon;
mod cancel;
mod cloud;
mod dry_run;
mod follow;
mod harness;
mod hotplug;
mod kills;
mod lifecycle;
mod links;
mod migration_port;
mod networks;
mod post_copy;
mod restarts;
mod sandbox;
mod snapshots;
mod soak;
mod switchover;
mod tour;
mod upgrade;
mod volumes;

use drover_chaos_cluster::client::probe_spec;
use drover_chaos_cluster::cluster::{PARTIES, host_name};
use drover_chaos_cluster::{Cluster, Console, Settings};
use drover_proto::v1::{Migration, MigrationPhase, Vm};

/// The VM of every test.
const VM: &str = "vm1";

/// A guest that writes steadily and leaves the processors to the others.
const STEADY: &str = "own=16M hot=4M rate=2000";

/// A guest that writes as fast as it can.
const FLAT_OUT: &str = "own=32M hot=16M rate=max";

/// A cluster with the quick settings, or `None` where it cannot run.
fn cluster() -> Option<Cluster> {
    Cluster::or_skip(&Settings::default())
}

/// Creates and starts the VM on host1 and waits for the guest's first reports.
fn boot(cluster: &Cluster, vcpus: u32, parameters: &str) -> Console {
    let spec = probe_spec(VM, "", 64, vcpus, parameters);
    cluster.client.create_vm(&spec, true).expect("the VM is created");
    cluster.client.await_running(VM);
    let mut console = Console::new(VM);
    console.await_more(&cluster.client, 1);
    console
}

/// Starts the VM again after it failed, with a fresh console.
fn boot_again(cluster: &Cluster) -> Console {
    cluster.client.start_vm(VM).expect("a failed VM can be started");
    cluster.client.await_running(VM);
    let mut console = Console::new(VM);
    console.await_more(&cluster.client, 1);
    console
}

/// The host after `host`, in a ring.
fn next(host: usize) -> usize {
    (host + 1) % PARTIES
}

/// Starts a migration to the next host.
fn migrate_on(cluster: &Cluster, from: usize) -> Migration {
    cluster
        .client
        .migrate(VM, &host_name(next(from)))
        .expect("the migration is planned")
}

/// Fails unless the migration is done; its words otherwise.
fn assert_done(migration: &Migration) {
    assert_eq!(migration.phase(), MigrationPhase::Done, "{migration:?}");
}

/// Fails unless the migration was aborted for one of these reasons.
fn assert_aborted(migration: &Migration, reasons: &[&str]) {
    assert_eq!(migration.phase(), MigrationPhase::Aborted, "{migration:?}");
    let reason = migration.reason.clone().unwrap_or_default();
    assert!(
        reasons.contains(&reason.code.as_str()),
        "aborted for {reason:?}, want one of {reasons:?}"
    );
    assert!(
        !reason.message.is_empty(),
        "a reason without words: {migration:?}"
    );
}

/// The code of a VM's or a migration's reason.
fn reason_of(vm: &Vm) -> String {
    vm.reason.clone().unwrap_or_default().code
}

/// What every test ends with: the rule held, the VM runs once, the guest is whole and still counts.
fn assert_sound_at_the_end(cluster: &Cluster, console: &mut Console) {
    cluster.await_runs_exactly_once(VM);
    console.await_more(&cluster.client, 2);
    cluster.witness.assert_clean();
}
