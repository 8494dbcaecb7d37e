//! The few milliseconds in which nobody executes: who may, and by whose word.

use drover_proto::v1::VmmState;

use super::*;

/// Looks at the VMMs while nothing may change.
const LOOKS: usize = 60;

#[test]
fn a_target_that_is_ready_does_not_run_before_the_commit() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    cluster.hold("controller.before_commit_propose");
    let planned = migrate_on(&cluster, source);
    // Looked at all the way: a target that runs too early is seen before it is asked for the commit.
    drover_chaos_cluster::await_some("the commit to be asked for", || {
        let seen = cluster.vmms(VM);
        let early = seen.iter().find(|vmm| vmm.runs() && vmm.info.epoch > epoch);
        assert!(
            early.is_none(),
            "the target executes before the commit: {early:?}"
        );
        match cluster.reached("controller.before_commit_propose") {
            true => Ok(()),
            false => Err(format!("{seen:?}")),
        }
    });
    for _ in 0..LOOKS {
        cluster.assert_nobody_runs(VM);
    }
    let states: Vec<_> = cluster
        .vmms(VM)
        .iter()
        .map(|vmm| (vmm.host, vmm.info.state()))
        .collect();
    assert!(states.contains(&(source, VmmState::HandedOver)), "{states:?}");
    assert!(states.contains(&(next(source), VmmState::Ready)), "{states:?}");

    // The abort is first in the log: the source goes on where it was, whatever the target believes.
    cluster
        .client
        .cancel(&planned.id)
        .expect("what is not committed can be cancelled");
    cluster.release("controller.before_commit_propose");
    assert_aborted(&cluster.client.await_end(&planned.id), &["cancelled"]);
    assert_eq!(cluster.await_runs_exactly_once(VM), (source, epoch));
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn a_source_that_lost_its_peer_stays_paused_until_the_outcome() {
    let Some(mut cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    cluster.hold("target.before_ready");
    let planned = migrate_on(&cluster, source);
    cluster.await_reached("target.before_ready");
    // From here on nobody can tell the source the outcome, and the verdict that it waits for never comes.
    cluster.kill_agent(source);
    assert_eq!(cluster.kill_vmms(next(source), VM), 1);
    await_failure_noticed(&cluster, source);
    for _ in 0..LOOKS {
        cluster.assert_nobody_runs(VM);
    }
    cluster.start_agent(source);
    cluster.release("target.before_ready");
    let ended = cluster.client.await_end(&planned.id);
    assert_eq!(ended.phase(), MigrationPhase::Aborted, "{ended:?}");
    assert_eq!(cluster.await_runs_exactly_once(VM), (source, epoch));
    assert_sound_at_the_end(&cluster, &mut console);
}

/// Waits until the source's VMM says that it cannot carry on with its migration.
fn await_failure_noticed(cluster: &Cluster, source: usize) {
    drover_chaos_cluster::await_some("the source to notice the loss", || {
        let seen = cluster.vmms(VM);
        let migration = seen
            .iter()
            .find(|vmm| vmm.host == source)
            .and_then(|vmm| vmm.info.migration.as_ref());
        match migration.and_then(|migration| migration.failure.as_ref()) {
            Some(_) => Ok(()),
            None => Err(format!("{seen:?}")),
        }
    });
}

#[test]
fn what_is_written_between_the_last_round_and_the_pause_is_not_lost() {
    let Some(cluster) = cluster() else { return };
    // Slow enough that the rounds' own dirty sets do not hold every hot page.
    let mut console = boot(&cluster, 1, "own=16M hot=16M rate=1500");
    for _ in 0..2 {
        let (source, epoch) = cluster.await_runs_exactly_once(VM);
        cluster.hold("source.before_pause");
        let planned = migrate_on(&cluster, source);
        cluster.await_reached("source.before_pause");
        let before = console.reports.last().map_or(0, |report| report.written);
        let after = console.await_more(&cluster.client, 1).written;
        assert!(
            after > before,
            "the guest wrote on while the source waited: {before}, {after}"
        );
        cluster.release("source.before_pause");
        assert_done(&cluster.client.await_end(&planned.id));
        assert_eq!(cluster.await_runs_exactly_once(VM), (next(source), epoch + 1));
    }
    // A sweep over all pages takes the guest ten seconds; the pages in question are rewritten, and so checked, in three.
    console.await_more(&cluster.client, 4);
    assert_sound_at_the_end(&cluster, &mut console);
}
