//! Links that are cut: between two hosts, and around a leader.

use drover_proto::v1::VmmState;

use super::*;

/// Waits until the VM's only VMM is frozen by its lease.
fn await_frozen(cluster: &Cluster) {
    drover_chaos_cluster::await_some("the guest to freeze", || {
        let seen = cluster.vmms(VM);
        match seen.as_slice() {
            [only] if only.info.state() == VmmState::Frozen => Ok(()),
            _ => Err(format!("{seen:?}")),
        }
    });
}

#[test]
fn a_link_cut_before_the_commit_aborts_and_after_ready_does_not_matter() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let cases = [
        ("source.round_end", false),
        ("source.after_pause", false),
        ("agent.before_commit", true),
        ("agent.after_commit", true),
    ];
    for (point, moves) in cases {
        eprintln!("cut at {point}");
        let (source, epoch) = cluster.await_runs_exactly_once(VM);
        let target = next(source);
        cluster.hold(point);
        let planned = migrate_on(&cluster, source);
        cluster.await_reached(point);
        cluster.cut_hosts(source, target);
        cluster.release(point);
        let ended = cluster.client.await_end(&planned.id);
        if moves {
            assert_done(&ended);
        } else {
            assert_aborted(&ended, &["link_lost", "stalled", "switchover_timeout"]);
        }
        let want = if moves {
            (target, epoch + 1)
        } else {
            (source, epoch)
        };
        assert_eq!(cluster.await_runs_exactly_once(VM), want, "cut at {point}");
        console.ping(&cluster.client, &format!("cut-{point}"));
        cluster.heal_host(source);
    }
    // What was cut and healed carries the next migration.
    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    assert_done(&cluster.client.await_end(&migrate_on(&cluster, source).id));
    assert_eq!(cluster.await_runs_exactly_once(VM), (next(source), epoch + 1));
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn a_leader_that_was_cut_off_extends_no_lease() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (host, epoch) = cluster.await_runs_exactly_once(VM);
    let leader = cluster.leader();
    // The VM's host sees the old leader only, and the old leader sees no other controller.
    for other in (0..PARTIES).filter(|&other| other != leader) {
        cluster.network.cut_between(leader, other);
        cluster.network.cut_between(PARTIES + host, other);
    }
    await_frozen(&cluster);
    cluster.network.heal(leader);
    cluster.network.heal(PARTIES + host);
    assert_eq!(cluster.await_runs_exactly_once(VM), (host, epoch));
    console.ping(&cluster.client, "healed");
    assert_sound_at_the_end(&cluster, &mut console);
}
