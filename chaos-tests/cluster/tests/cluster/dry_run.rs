//! A dry run of a guest that writes as fast as it can: it tells what would be, changes nothing, and is in nobody's way.

use drover_proto::Code;
use drover_proto::v1::MigrationOptions;

use super::*;

const MIB: u64 = 1 << 20;

/// Whoever waits for it here wants to see the move, not how short it can be.
fn patient() -> MigrationOptions {
    MigrationOptions {
        max_downtime_ms: 5_000,
        ..MigrationOptions::default()
    }
}

#[test]
fn a_dry_run_tells_what_a_busy_guest_writes_changes_nothing_and_the_move_after_it_shows_what_was_expected() {
    let Some(cluster) = cluster() else { return };
    let client = &cluster.client;
    let spec = probe_spec(VM, "", 160, 1, "own=64M");
    client.create_vm(&spec, true).expect("the VM is created");
    client.await_running(VM);
    let mut console = Console::new(VM);
    console.await_more(client, 2);
    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    let (here, there) = (host_name(source), host_name(next(source)));
    let (vm, events) = (client.vm(VM).expect("a VM"), client.last_event().expect("events"));

    let told = client.forecast(VM, &there, patient()).expect("a dry run");
    eprintln!("{told:?}");
    assert_eq!((&told.refusal, &told.unknown), (&None, &None));
    assert!(told.findings.iter().all(|finding| finding.passed));
    let forecast = told.forecast.expect("nothing speaks against it");
    assert!(forecast.populated_bytes > 64 * MIB && forecast.populated_bytes <= 160 * MIB);
    assert!(forecast.working_set_bytes > 8 * MIB && forecast.dirty_bytes_per_s > 8 * MIB);
    assert!(forecast.converges && forecast.rounds >= 2 && forecast.bytes >= forecast.populated_bytes);
    assert_eq!(forecast.bandwidth_source, "default");

    let refused = client.forecast(VM, &here, patient()).expect("an answer");
    assert_eq!(
        refused.refusal.map(|reason| reason.code).as_deref(),
        Some(Code::SameHost.as_str())
    );
    assert_eq!(refused.forecast, None);

    assert_eq!(client.vm(VM).expect("a VM"), vm, "epoch, placement and all");
    assert_eq!(client.migrations().expect("a list"), []);
    assert_eq!(client.last_event().expect("events"), events);
    assert_eq!(cluster.await_runs_exactly_once(VM), (source, epoch));

    let planned = client
        .migrate_with(VM, &there, patient())
        .expect("the migration is planned");
    let ended = client.await_end(&planned.id);
    assert_done(&ended);
    assert_eq!(ended.forecast.as_ref(), Some(&forecast), "beside the receipt");
    eprintln!("expected {forecast:?}\ncame     {:?}", ended.receipt);
    assert_eq!(cluster.await_runs_exactly_once(VM), (next(source), epoch + 1));

    let back = client.forecast(VM, &here, patient()).expect("a dry run");
    assert_eq!(
        back.forecast.expect("it runs").bandwidth_source,
        "receipts",
        "the move has measured the link"
    );
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn a_migration_that_is_asked_for_during_dry_runs_goes_through_and_loses_nothing() {
    let Some(cluster) = cluster() else { return };
    let client = &cluster.client;
    let mut console = boot(&cluster, 1, FLAT_OUT);
    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    let there = host_name(next(source));
    let ended = std::thread::scope(|scope| {
        let dry_runs = scope.spawn(|| {
            // One after another, until a migration is in their way.
            loop {
                let told = client.forecast(VM, &there, patient()).expect("an answer");
                if let Some(reason) = told.refusal.or(told.unknown) {
                    return reason.code;
                }
            }
        });
        let planned = client
            .migrate_with(VM, &there, patient())
            .expect("the migration is planned");
        let ended = client.await_end(&planned.id);
        let code = dry_runs.join().expect("the dry runs end");
        let in_the_way = [
            Code::MigrationActive,
            Code::SameHost,
            Code::StaleEpoch,
            Code::VmState,
        ];
        assert!(in_the_way.iter().any(|known| known.as_str() == code), "{code}");
        ended
    });
    assert_done(&ended);
    assert_eq!(cluster.await_runs_exactly_once(VM), (next(source), epoch + 1));
    assert_sound_at_the_end(&cluster, &mut console);
}
