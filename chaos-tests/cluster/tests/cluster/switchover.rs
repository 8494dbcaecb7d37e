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
    cluster.await_reached("controller.before_commit_propose");
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
    cluster.hold("agent.before_commit");
    let planned = migrate_on(&cluster, source);
    cluster.await_reached("agent.before_commit");
    // From here on nobody can tell the source the outcome, and its peer is gone without a word.
    cluster.kill_agent(source);
    assert_eq!(cluster.kill_vmms(next(source), VM), 1);
    for _ in 0..LOOKS * 4 {
        cluster.assert_nobody_runs(VM);
        std::thread::sleep(drover_chaos_cluster::LOOK_AGAIN);
    }
    cluster.start_agent(source);
    cluster.release("agent.before_commit");
    let ended = cluster.client.await_end(&planned.id);
    match ended.phase() {
        MigrationPhase::Done => {
            cluster
                .client
                .await_vm(VM, "failed with its target", |vm| reason_of(vm) == "vmm_died");
            cluster.await_no_vmm(VM);
            console = boot_again(&cluster);
        }
        _ => {
            assert_eq!(cluster.await_runs_exactly_once(VM), (source, epoch));
        }
    }
    assert_sound_at_the_end(&cluster, &mut console);
}
