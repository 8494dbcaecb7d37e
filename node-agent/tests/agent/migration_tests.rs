//! Either side of a migration.

use drover_proto::Code;
use drover_proto::v1::*;

use crate::fake_fleet::{Call, MAX_DOWNTIME_MS};
use crate::world::{World, incoming, kill_9, migration, run, until_ended};

const TARGET: &str = "e2-m1";

fn prepare(script: &mut crate::fake_fleet::Script) {
    script.desired = incoming(2, migration("m1", "host2", "host1", 2, MigrationPhase::Preparing));
    // No controller would say so before the commit; the VMM ends at once should the agent hand it on.
    script.grants = vec![("vm1".into(), 2)];
}

fn leaving(phase: MigrationPhase) -> HostDesired {
    run(1, Some(migration("m1", "host1", "host2", 2, phase)))
}

async fn paused_source(world: &World) -> VmmInfo {
    world.fleet.say(|script| {
        script.desired = leaving(MigrationPhase::PreCopy);
        script.grants = vec![("vm1".into(), 1)];
    });
    let connects = |info: &VmmInfo| {
        info.migration
            .as_ref()
            .is_some_and(|migration| migration.id == "m1")
    };
    world.until_vmm("e1-start", "connecting", connects).await;
    world.happen("e1-start", "hand-over").await;
    world.until_state("e1-start", VmmState::HandedOver).await
}

pub async fn a_target_prepares_commits_and_runs_by_the_commits_lease() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(prepare);
    let addr = world
        .fleet
        .until("the target's address", |call| match call {
            Call::Migration(report) if report.migration == "m1" && !report.target_addr.is_empty() => {
                Some(report.target_addr.clone())
            }
            _ => None,
        })
        .await;
    assert_eq!(addr, "127.0.0.1:4711");
    let waiting = world.until_state(TARGET, VmmState::Incoming).await;
    // From here on heartbeats grant nothing: what it runs by is the commit's own lease.
    world
        .fleet
        .say(|script| (script.commit, script.grants) = (Some(true), vec![]));
    world.fleet.until_heartbeats(2).await;
    world.happen(TARGET, "progress ready").await;
    let runs = world.until_state(TARGET, VmmState::Running).await;
    assert_eq!(runs.pid, waiting.pid);
    let commit = world.fleet.until("commit", |call| match call {
        Call::Commit(commit) => Some(commit.clone()),
        _ => None,
    });
    let commit = commit.await;
    let expected = CommitHandoverRequest {
        host: "host1".into(),
        migration: "m1".into(),
        vm: "vm1".into(),
        epoch: 2,
        post_copy: false,
        vmm: Some(crate::fake_vmm::build()),
    };
    assert_eq!(commit, expected);
    world.happen(TARGET, "receipt").await;
    let receipt = |call: &Call| match call {
        Call::Migration(report) => report.receipt.clone(),
        _ => None,
    };
    assert_eq!(world.fleet.until("the receipt", receipt).await.rounds, 7);
    world.fleet.until_vm(VmState::Running, 2).await;
    let progress = |call: &Call| match call {
        Call::Migration(report) => report.progress.clone().filter(|progress| progress.round > 0),
        _ => None,
    };
    world.fleet.until("progress", progress).await;
}

pub async fn a_commit_is_asked_for_until_it_is_answered_also_by_the_next_agent() {
    let world = World::new().await;
    let agent = world.agent().await;
    world.fleet.say(prepare);
    world.until_state(TARGET, VmmState::Incoming).await;
    world.happen(TARGET, "ready").await;
    let commits = |count| {
        move |calls: &[Call]| {
            calls
                .iter()
                .filter(|call| matches!(call, Call::Commit(_)))
                .count()
                >= count
        }
    };
    world.fleet.until_calls("three commits", commits(3)).await;
    drop(agent);
    world.fleet.forget_calls();
    let _agent = world.agent().await;
    world
        .fleet
        .until_calls("a commit by the second agent", commits(1))
        .await;
    world.until_state(TARGET, VmmState::Ready).await;
    world.fleet.say(|script| script.commit = Some(true));
    world.until_state(TARGET, VmmState::Running).await;
}

pub async fn a_target_whose_commit_is_refused_ends_without_a_report() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(prepare);
    let info = world.until_state(TARGET, VmmState::Incoming).await;
    world.fleet.say(|script| script.commit = Some(false));
    world.happen(TARGET, "ready").await;
    world
        .fleet
        .until_calls("commit", |calls| {
            calls.iter().any(|call| matches!(call, Call::Commit(_)))
        })
        .await;
    world.fleet.say(|script| script.desired = HostDesired::default());
    world.until_file(TARGET, "over").await;
    until_ended(&info).await;
    assert!(
        !world.fleet.calls().iter().any(|call| matches!(call, Call::Vm(_))),
        "{:?}",
        world.fleet.calls()
    );
}

fn aborted(call: &Call) -> Option<AbortMigrationRequest> {
    match call {
        Call::Abort(abort) => Some(abort.clone()),
        _ => None,
    }
}

pub async fn a_target_that_dies_aborts_its_migration() {
    let world = World::new().await;
    let agent = world.agent().await;
    world.fleet.say(prepare);
    kill_9(&world.until_state(TARGET, VmmState::Incoming).await);
    let abort = world.fleet.until("abort", aborted).await;
    assert_eq!(
        (abort.migration.as_str(), abort.reason.unwrap().code.as_str()),
        ("m1", Code::VmmDied.as_str())
    );
    // Not started again while it is still listed, nor by the next agent.
    drop(agent);
    world.fleet.forget_calls();
    let _agent = world.agent().await;
    world.fleet.until("abort by the second agent", aborted).await;
    // The next migration of the same epoch is another matter.
    world.fleet.say(|script| {
        script.desired = incoming(2, migration("m2", "host2", "host1", 2, MigrationPhase::Preparing));
    });
    world.until_state("e2-m2", VmmState::Incoming).await;
}

pub async fn a_source_connects_pauses_and_resumes_by_the_abort_in_the_log() {
    let world = World::new().await;
    let agent = world.agent().await;
    let paused = paused_source(&world).await;
    assert_eq!(
        world.requests("e1-start").await,
        format!("outgoing m1 host2 {MAX_DOWNTIME_MS}")
    );
    // An agent that dies meanwhile changes nothing.
    drop(agent);
    let _agent = world.agent().await;
    world.fleet.until_heartbeats(5).await;
    assert_eq!(
        world.until_vmm("e1-start", "there", |_| true).await.state(),
        VmmState::HandedOver
    );
    world
        .fleet
        .say(|script| script.desired = leaving(MigrationPhase::Aborted));
    let runs = world.until_state("e1-start", VmmState::Running).await;
    assert_eq!(runs.pid, paused.pid);
    assert!(world.requests("e1-start").await.ends_with("outcome m1 false"));
}

pub async fn a_source_ends_when_the_hand_over_is_committed() {
    let world = World::new().await;
    let _agent = world.agent().await;
    let paused = paused_source(&world).await;
    world
        .fleet
        .say(|script| (script.desired, script.grants) = (HostDesired::default(), vec![]));
    world.until_file("e1-start", "over").await;
    until_ended(&paused).await;
    let failed = |call: &Call| matches!(call, Call::Vm(report) if report.state() == VmState::Failed);
    assert!(!world.fleet.calls().iter().any(failed));
}

pub async fn a_source_that_ignores_the_commit_is_killed() {
    let world = World::new().await;
    let agent = world.agent().await;
    let mut deaf = leaving(MigrationPhase::PreCopy);
    deaf.vms[0].spec.as_mut().unwrap().cmdline = "deaf".into();
    world
        .fleet
        .say(|script| (script.desired, script.grants) = (deaf, vec![("vm1".into(), 1)]));
    world.until_state("e1-start", VmmState::Running).await;
    let paused = paused_source(&world).await;
    drop(agent);
    let _agent = world.agent().await;
    world
        .fleet
        .say(|script| (script.desired, script.grants) = (HostDesired::default(), vec![]));
    world.until_file("e1-start", "over").await;
    until_ended(&paused).await;
}

pub async fn a_vm_that_arrived_and_died_with_its_agent_is_never_booted() {
    let world = World::new().await;
    let agent = world.agent().await;
    world.fleet.say(prepare);
    world.until_state(TARGET, VmmState::Incoming).await;
    world.fleet.say(|script| script.commit = Some(true));
    world.happen(TARGET, "ready").await;
    let arrived = world.until_state(TARGET, VmmState::Running).await;
    // It is to leave again, and that is aborted: m2 stays the VM's newest migration.
    let later = |phase| {
        let mut desired = run(2, Some(migration("m2", "host1", "host3", 3, phase)));
        desired.vms[0].arrived_by = "m1".into();
        desired
    };
    world
        .fleet
        .say(|script| script.desired = later(MigrationPhase::Preparing));
    world.fleet.until_vm(VmState::Running, 2).await;
    drop(agent);
    kill_9(&arrived);
    world
        .fleet
        .say(|script| script.desired = later(MigrationPhase::Aborted));
    world.fleet.forget_calls();
    let agent = world.agent().await;
    world.fleet.until_vm(VmState::Failed, 2).await;
    // Should a controller say that it boots here, the host knows better.
    drop(agent);
    world.fleet.forget_calls();
    world.fleet.say(|script| script.desired = run(2, None));
    let _agent = world.agent().await;
    let reason = world.fleet.until_vm(VmState::Failed, 2).await.reason.unwrap();
    assert!(
        reason.message.contains("vm1/e2-m1 may have run"),
        "{}",
        reason.message
    );
    assert!(!world.folder("e2-start").exists());
}

pub async fn a_failure_of_either_side_is_proposed_as_an_abort_with_its_phase() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(|script| {
        script.desired = leaving(MigrationPhase::PreCopy);
        script.grants = vec![("vm1".into(), 1)];
    });
    world
        .until_vmm("e1-start", "connecting", |info| info.migration.is_some())
        .await;
    world.happen("e1-start", "progress break").await;
    let abort = world.fleet.until("abort by the source", aborted).await;
    assert_eq!(abort.reason.as_ref().unwrap().code, Code::LinkLost.as_str());
    assert_eq!(
        (abort.phase(), abort.host.as_str()),
        (MigrationPhase::PreCopy, "host1")
    );
    assert_eq!(
        world.until_vmm("e1-start", "there", |_| true).await.state(),
        VmmState::Running
    );
}
