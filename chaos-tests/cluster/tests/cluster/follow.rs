//! A migration as those see it who follow it: over a slow link, stream by stream, through the loss of the leader.

use drover_proto::v1::MigrationOptions;

use super::*;

/// So few MiB a second that the first round takes seconds.
fn slow() -> MigrationOptions {
    MigrationOptions {
        max_downtime_ms: 5_000,
        bandwidth_mib_s: 6,
        streams: 3,
        ..MigrationOptions::default()
    }
}

#[test]
fn a_migration_over_a_slow_link_is_followed_by_phase_round_and_stream_through_the_loss_of_the_leader() {
    let Some(mut cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    let planned = cluster
        .client
        .migrate_with(VM, &host_name(next(source)), slow())
        .expect("the migration is planned");

    let (mut seen, mut lost) = (0, None);
    let (mut phase, mut rounds) = (planned.phase(), Vec::new());
    let mut by_stream = [0; 3];
    let ended = loop {
        let (migration, name) = cluster.client.watch(&planned.id, seen).expect("it is followed");
        seen = name;
        assert!(migration.phase() >= phase, "{phase:?}, then {migration:?}");
        phase = migration.phase();
        if matches!(phase, MigrationPhase::Done | MigrationPhase::Aborted) {
            break migration;
        }
        let Some(progress) = migration.progress else {
            continue;
        };
        rounds.push(progress.round);
        for stream in &progress.by_stream {
            let before = &mut by_stream[stream.number as usize];
            assert!(stream.bytes >= *before, "{stream:?} after {before}");
            *before = stream.bytes;
        }
        // In the middle of the first round.
        if lost.is_none() && by_stream.iter().all(|&bytes| bytes > 0) {
            let leader = cluster.leader();
            cluster.kill_controller(leader);
            lost = Some(leader);
        }
    };
    assert_done(&ended);
    eprintln!("rounds {rounds:?}, by stream {by_stream:?}, {:?}", ended.receipt);
    assert!(rounds.is_sorted() && rounds.contains(&1) && rounds.iter().any(|&round| round > 1));
    let receipt = ended.receipt.as_ref().expect("a receipt");
    assert_eq!(receipt.streams, 3);
    assert!(receipt.bytes >= by_stream.iter().sum::<u64>() && by_stream.iter().all(|&bytes| bytes > 1 << 20));
    assert_eq!(cluster.await_runs_exactly_once(VM), (next(source), epoch + 1));
    cluster.start_controller(lost.expect("the leader was lost meanwhile"));
    assert_sound_at_the_end(&cluster, &mut console);
}
