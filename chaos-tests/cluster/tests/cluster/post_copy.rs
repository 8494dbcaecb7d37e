//! Post-copy: a guest that no pause is short enough for, and a source that is lost while pages are missing.

use drover_chaos_cluster::SeenVmm;
use drover_proto::Code;
use drover_proto::v1::{Compression, MigrationOptions, RestartPolicy, VmmState};

use super::*;

/// Post-copy is allowed; `bandwidth_mib_s` is for pages before the switch, and for those that nobody waits for after it.
fn allowed(bandwidth_mib_s: u64, deadline_ms: u64) -> MigrationOptions {
    MigrationOptions {
        max_downtime_ms: 100,
        deadline_ms,
        bandwidth_mib_s,
        streams: 2,
        allow_postcopy: true,
        // What the probe writes compresses so well that it would get through without post-copy.
        compression: Compression::Off.into(),
        ..MigrationOptions::default()
    }
}

/// Follows the migration from phase to phase until `until` says so of it; the phases met, and how it was then.
fn follow(
    cluster: &Cluster,
    id: &str,
    until: impl Fn(&Migration) -> bool,
) -> (Vec<MigrationPhase>, Migration) {
    let (mut seen, mut phases) = (0, Vec::new());
    loop {
        let (migration, name) = cluster.client.watch(id, seen).expect("it is followed");
        seen = name;
        if phases.last() != Some(&migration.phase()) {
            phases.push(migration.phase());
        }
        if until(&migration) {
            return (phases, migration);
        }
    }
}

fn has_ended(migration: &Migration) -> bool {
    matches!(migration.phase(), MigrationPhase::Done | MigrationPhase::Aborted)
}

/// Whether it ended because the hosts' kernel has no userfaultfd for it; says so loudly.
fn is_unavailable(migration: &Migration) -> bool {
    let reason = migration.reason.clone().unwrap_or_default();
    let unavailable = reason.code == "postcopy_unavailable";
    if unavailable {
        println!("SKIPPED: {}", reason.message);
    }
    unavailable
}

#[test]
fn a_guest_that_writes_faster_than_its_share_of_the_link_moves_by_post_copy_and_finds_all_its_pages() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, FLAT_OUT);
    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    let planned = cluster
        .client
        .migrate_with(VM, &host_name(next(source)), allowed(8, 0))
        .expect("the migration is planned");
    let (phases, ended) = follow(&cluster, &planned.id, has_ended);
    if is_unavailable(&ended) {
        return;
    }
    assert_done(&ended);
    assert!(ended.reason.is_none(), "{ended:?}");
    assert!(
        phases.contains(&MigrationPhase::PostCopy),
        "{phases:?}: {ended:?}"
    );
    let receipt = ended.receipt.expect("a receipt");
    eprintln!("{receipt:?}");
    let post_copy = receipt.post_copy.expect("the receipt of a post-copy");
    assert!(
        post_copy.pages > 0 && post_copy.faults > 0 && post_copy.duration_us > 0,
        "{post_copy:?}"
    );
    // The source's VMM is gone: nobody needs it any more.
    assert_eq!(cluster.await_runs_exactly_once(VM), (next(source), epoch + 1));
    assert_eq!(cluster.vmm_processes(source, VM), 0);
    console.await_more(&cluster.client, 4);
    assert_sound_at_the_end(&cluster, &mut console);
}

fn await_serving(cluster: &Cluster, source: usize) {
    drover_chaos_cluster::await_some("the source to serve", || {
        let seen = cluster.vmms(VM);
        let serves = |vmm: &SeenVmm| vmm.host == source && vmm.info.state() == VmmState::Serving;
        seen.iter().any(serves).then_some(()).ok_or(format!("{seen:?}"))
    });
}

/// Begins a migration from host `source` and waits until its target runs without its pages; its id. `None` where that cannot be.
fn await_lacking(cluster: &Cluster, source: usize) -> Option<String> {
    // Seconds too slow for the deadline, so that the switch is in the first round.
    let planned = cluster
        .client
        .migrate_with(VM, &host_name(next(source)), allowed(2, 2000))
        .expect("the migration is planned");
    let (_, lacking) = follow(cluster, &planned.id, |migration| {
        migration.phase() == MigrationPhase::PostCopy || has_ended(migration)
    });
    if is_unavailable(&lacking) {
        return None;
    }
    assert_eq!(lacking.phase(), MigrationPhase::PostCopy, "{lacking:?}");
    await_serving(cluster, source);
    Some(planned.id)
}

/// A VM that is started again when it fails, and that has just begun to run at the target while most of its pages are missing; its
/// background is slow, so that they are for seconds.
struct Lacking {
    cluster: Cluster,
    console: Console,
    id: String,
    source: usize,
    /// The source's.
    epoch: u64,
}

impl Lacking {
    /// `None` where it cannot be.
    fn begin() -> Option<Self> {
        let cluster = cluster()?;
        let mut spec = probe_spec(VM, "", 64, 1, "own=32M hot=4M rate=2000");
        spec.set_restart(RestartPolicy::OnFailure);
        cluster.client.create_vm(&spec, true).expect("the VM is created");
        cluster.client.await_running(VM);
        let mut console = Console::new(VM);
        console.await_more(&cluster.client, 1);
        let (source, epoch) = cluster.await_runs_exactly_once(VM);
        let id = await_lacking(&cluster, source)?;
        Some(Self {
            cluster,
            console,
            id,
            source,
            epoch,
        })
    }

    /// The run was lost with its pages, for this reason: never one with holes, but a new one by the VM's policy, one VMM, and no process
    /// of either old one.
    fn assert_lost(&self, code: &str) {
        let cluster = &self.cluster;
        let ended = cluster.client.await_end(&self.id);
        assert_done(&ended);
        assert_eq!(ended.ended_in(), MigrationPhase::PostCopy, "{ended:?}");
        assert_eq!(ended.receipt, None, "what was lost has no receipt");
        let reason = ended.reason.clone().unwrap_or_default();
        assert_eq!(reason.code, code, "{ended:?}");
        cluster
            .client
            .await_vm(VM, "started again", |vm| vm.restarts == 1);
        let (_, epoch) = cluster.await_runs_exactly_once(VM);
        assert_eq!(
            epoch,
            self.epoch + 2,
            "the source's epoch, the lost run's, the new one's"
        );
        self.assert_nothing_left_over();
        assert_sound_at_the_end(cluster, &mut Console::new(VM));
    }

    fn assert_nothing_left_over(&self) {
        drover_chaos_cluster::await_some("one VMM to be left", || {
            let left: Vec<usize> = (0..PARTIES)
                .map(|host| self.cluster.vmm_processes(host, VM))
                .collect();
            (left.iter().sum::<usize>() == 1)
                .then_some(())
                .ok_or(format!("{left:?}"))
        });
    }
}

#[test]
fn a_source_killed_while_pages_are_missing_ends_the_run_and_the_vm_starts_again_with_nothing_left_over() {
    let Some(mut lacking) = Lacking::begin() else {
        return;
    };
    assert_eq!(
        lacking.cluster.kill_vmms(lacking.source, VM),
        1,
        "the source has the pages that are missing"
    );
    lacking.assert_lost("postcopy_lost");
}

#[test]
fn a_target_killed_while_pages_are_missing_ends_the_run_and_the_source_with_it() {
    let Some(mut lacking) = Lacking::begin() else {
        return;
    };
    assert_eq!(lacking.cluster.kill_vmms(next(lacking.source), VM), 1);
    lacking.assert_lost("vmm_died");
}

#[test]
fn a_targets_agent_killed_while_pages_are_missing_costs_nothing() {
    let Some(mut lacking) = Lacking::begin() else {
        return;
    };
    let target = next(lacking.source);
    lacking.cluster.kill_agent(target);
    lacking.cluster.start_agent(target);
    let ended = lacking.cluster.client.await_end(&lacking.id);
    assert_done(&ended);
    assert!(ended.reason.is_none(), "{ended:?}");
    assert!(
        ended
            .receipt
            .clone()
            .is_some_and(|receipt| receipt.post_copy.is_some()),
        "{ended:?}"
    );
    let here = lacking.cluster.await_runs_exactly_once(VM);
    assert_eq!(here, (target, lacking.epoch + 1));
    lacking.assert_nothing_left_over();
    assert_sound_at_the_end(&lacking.cluster, &mut lacking.console);
}

#[test]
fn a_link_cut_while_pages_are_missing_ends_the_run_and_the_vm_starts_again_with_nothing_left_over() {
    let Some(lacking) = Lacking::begin() else { return };
    lacking.cluster.cut_hosts(lacking.source, next(lacking.source));
    lacking.assert_lost("postcopy_lost");
    lacking.cluster.heal_host(lacking.source);
}

#[test]
fn a_source_that_hears_of_the_commit_before_it_has_read_ready_serves_all_the_same() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    cluster.hold("source.ready_received");
    let Some(id) = await_lacking(&cluster, source) else {
        return;
    };
    cluster.release("source.ready_received");
    let ended = cluster.client.await_end(&id);
    assert_done(&ended);
    assert!(ended.reason.is_none() && ended.receipt.is_some(), "{ended:?}");
    assert_eq!(cluster.await_runs_exactly_once(VM), (next(source), epoch + 1));
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn a_person_can_ask_for_post_copy_in_mid_run_where_it_was_allowed() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    let to = host_name(next(source));
    let begun = |allow_postcopy| {
        let options = MigrationOptions {
            allow_postcopy,
            ..allowed(2, 0)
        };
        let planned = cluster.client.migrate_with(VM, &to, options);
        let id = planned.expect("the migration is planned").id;
        let (_, copying) = follow(&cluster, &id, |migration| {
            let has_sent = migration
                .progress
                .as_ref()
                .is_some_and(|told| told.bytes_sent > 0);
            has_sent || has_ended(migration)
        });
        assert!(!has_ended(&copying), "{copying:?}");
        id
    };
    let id = begun(false);
    let refused = cluster.client.postcopy(&id).expect_err("it was not allowed");
    assert_eq!(refused.code, Code::PostCopyNotAllowed, "{refused}");
    cluster.client.cancel(&id).expect("it is cancelled");
    cluster.client.await_end(&id);

    let id = begun(true);
    if let Err(fault) = cluster.client.postcopy(&id) {
        assert_eq!(fault.code, Code::PostCopyUnavailable, "{fault}");
        return println!("SKIPPED: {fault}");
    }
    cluster
        .client
        .postcopy(&id)
        .expect("asked again it changes nothing");
    let (phases, ended) = follow(&cluster, &id, has_ended);
    assert_done(&ended);
    assert!(ended.post_copy_wanted && ended.reason.is_none(), "{ended:?}");
    assert!(
        phases.contains(&MigrationPhase::PostCopy),
        "{phases:?}: {ended:?}"
    );
    let post_copy = ended.receipt.and_then(|receipt| receipt.post_copy);
    assert!(
        post_copy.is_some_and(|post_copy| post_copy.pages > 0),
        "{post_copy:?}"
    );
    assert_eq!(cluster.await_runs_exactly_once(VM), (next(source), epoch + 1));
    assert_eq!(cluster.vmm_processes(source, VM), 0);
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn a_host_that_cannot_says_so_beforehand_and_the_migration_is_pre_copy_only_and_says_why() {
    let Some(mut cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    let target = next(source);
    let to = host_name(target);
    cluster.configure_agent(target, "post_copy", false.into());
    drover_chaos_cluster::await_some("the host to say so", || {
        let hosts = cluster.client.hosts().map_err(|fault| fault.to_string())?;
        let told = hosts
            .iter()
            .filter_map(|host| host.spec.as_ref())
            .find(|spec| spec.name == to)
            .map(|spec| spec.post_copy.clone());
        told.clone()
            .is_some_and(|told| told.contains("switched off"))
            .then_some(())
            .ok_or(format!("{told:?}"))
    });
    let told = cluster
        .client
        .forecast(VM, &to, allowed(0, 0))
        .expect("a dry run is answered");
    let finding = told
        .findings
        .iter()
        .find(|finding| finding.check == "post_copy")
        .expect("post-copy was asked for");
    assert_eq!(
        (finding.passed, finding.code.as_str()),
        (false, "postcopy_unavailable"),
        "{finding:?}"
    );
    assert_eq!(told.refusal, None, "it goes by pre-copy");

    let planned = cluster.client.migrate_with(VM, &to, allowed(0, 0));
    let ended = cluster.client.await_end(&planned.expect("it is planned").id);
    assert_done(&ended);
    let receipt = ended.receipt.expect("a receipt");
    assert_eq!(receipt.post_copy, None);
    assert!(
        receipt.post_copy_unavailable.contains("switched off"),
        "{receipt:?}"
    );
    assert_eq!(cluster.await_runs_exactly_once(VM), (target, epoch + 1));
    assert_sound_at_the_end(&cluster, &mut console);
}
