//! A person changes their mind, at each step.

use drover_chaos_cluster::points::{self, Stage, stage};
use drover_proto::Code;

use super::*;

/// Points at which the others can have committed while the one who reached the point waits.
const UNDECIDED: [&str; 3] = [
    "source.after_state",
    "source.ready_received",
    "target.after_ready",
];

#[test]
fn a_migration_can_be_cancelled_at_any_step_until_the_commit() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    for point in points::all() {
        eprintln!("cancel at {point}");
        let (source, epoch) = cluster.await_runs_exactly_once(VM);
        cluster.hold(point);
        let planned = migrate_on(&cluster, source);
        cluster.await_reached(point);
        let answer = cluster.client.cancel(&planned.id);
        cluster.release(point);
        let ended = cluster.client.await_end(&planned.id);
        let cancelled = ended.phase() == MigrationPhase::Aborted;
        if !UNDECIDED.contains(&point) {
            assert_eq!(
                cancelled,
                stage(point) != Stage::Committed,
                "cancelled at {point}: {answer:?}, {ended:?}"
            );
        }
        match answer {
            Ok(_) => assert_aborted(&ended, &["cancelled"]),
            Err(fault) => assert_eq!(fault.code, Code::MigrationEnded, "cancelled at {point}: {fault}"),
        }
        let want = if cancelled {
            (source, epoch)
        } else {
            (next(source), epoch + 1)
        };
        assert_eq!(cluster.await_runs_exactly_once(VM), want, "cancelled at {point}");
        console.ping(&cluster.client, &format!("after-{point}"));
        cluster.witness.assert_clean();
    }
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn an_abort_that_comes_to_the_log_after_the_commit_is_answered_with_it() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    cluster.hold("source.before_pause");
    cluster.hold(points::CONTROLLER_ABORT);
    let planned = migrate_on(&cluster, 1);
    cluster.await_reached("source.before_pause");
    std::thread::scope(|scope| {
        let cancelling = scope.spawn(|| cluster.client.cancel(&planned.id));
        cluster.await_reached(points::CONTROLLER_ABORT);
        cluster.release("source.before_pause");
        let ended = cluster.client.await_end(&planned.id);
        assert_eq!(ended.phase(), MigrationPhase::Done, "{ended:?}");
        cluster.release(points::CONTROLLER_ABORT);
        let answer = cancelling.join().expect("the one who cancels does not panic");
        let fault = answer.expect_err("it is too late to cancel");
        assert_eq!(fault.code, Code::MigrationEnded, "{fault}");
    });
    assert_eq!(cluster.await_runs_exactly_once(VM), (next(1), 2));
    assert_sound_at_the_end(&cluster, &mut console);
}
