//! Migrations in the log: order, outcome, and who holds the right to run at every entry.

mod common;

use common::*;
use drover_proto::Code;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    Blackout, DirtyWindow, FinishMigration, Forecast, MigrationOptions, MigrationPhase, PlanMigration,
    Receipt, VmRole, VmState,
};
use drover_state::limits::MIGRATIONS_ENDED_MAX;
use drover_state::{State, commit_us, desired, pause_us, state_us};

#[test]
fn a_migration_goes_through_its_phases_and_moves_the_right_to_run() {
    let mut c = Cluster::running();
    let id = c.ok(plan("vm1", "host2")).migration.unwrap().id;
    assert_eq!(id, "m1");
    assert!(
        desired(&c.state, "host2").vms.is_empty(),
        "nothing to prepare while it is only planned"
    );
    c.ok(advance(&id, MigrationPhase::Preparing, ""));
    let incoming = &desired(&c.state, "host2").vms[0];
    assert_eq!((incoming.role(), incoming.epoch), (VmRole::Incoming, 2));
    c.ok(advance(&id, MigrationPhase::PreCopy, "127.0.0.1:9000"));
    let leaving = desired(&c.state, "host1").vms[0].migration.clone().unwrap();
    assert_eq!(
        (leaving.target_addr.as_str(), leaving.to.as_str()),
        ("127.0.0.1:9000", "host2")
    );
    assert_eq!(
        (c.granted("host1"), c.granted("host2")),
        (vec!["vm1@1".to_owned()], vec![])
    );
    assert!(c.ok(commit(&id, "host2", "vm1", 2)).current);
    assert_eq!(
        (c.granted("host1"), c.granted("host2")),
        (vec![], vec!["vm1@2".to_owned()])
    );
    assert!(desired(&c.state, "host1").vms.is_empty());
    let arrived = &desired(&c.state, "host2").vms[0];
    assert_eq!(
        (arrived.role(), arrived.migration.as_ref().unwrap().id.as_str()),
        (VmRole::Run, "m1")
    );
    assert_eq!(c.refused(plan("vm1", "host3")), Code::MigrationActive);
    c.ok(finish(&id, 5));
    assert_eq!(c.phase(&id), MigrationPhase::Done);
    assert_eq!(c.vm("vm1").seen_epoch, 2, "a receipt says that it ran");
    assert_eq!(
        c.state.migration(&id).unwrap().receipt.as_ref().unwrap().total_ms,
        5
    );
    assert_eq!(
        (
            c.vm("vm1").migration.as_str(),
            c.vm("vm1").last_migration.as_str()
        ),
        ("", "m1")
    );
}

#[test]
fn what_brought_an_epoch_stays_known_until_the_next_one() {
    let mut c = Cluster::running();
    let by = |c: &Cluster, host: &str| desired(&c.state, host).vms[0].arrived_by.clone();
    assert_eq!(by(&c, "host1"), "", "it booted there");
    let first = c.copying("vm1", "host2");
    assert_eq!(by(&c, "host2"), "", "an incoming VMM has not arrived");
    c.ok(commit(&first, "host2", "vm1", 2));
    c.ok(finish(&first, 5));
    assert_eq!(by(&c, "host2"), first);
    // A later migration of the same epoch changes nothing about it, neither under way nor aborted.
    let second = c.copying("vm1", "host3");
    let shown = desired(&c.state, "host2").vms[0].clone();
    assert_eq!(
        (shown.arrived_by, shown.migration.unwrap().id),
        (first.clone(), second.clone())
    );
    c.ok(abort(&second, "host3", Code::TargetFailed));
    assert_eq!(by(&c, "host2"), first);
    let restored = State::decode(&c.state.encode()).unwrap();
    assert_eq!(desired(&restored, "host2"), desired(&c.state, "host2"));
    c.ok(stop("vm1"));
    c.ok(report("host2", "vm1", 2, VmState::Stopped));
    c.ok(start("vm1"));
    c.ok(place("vm1", "host2", 2));
    assert_eq!(by(&c, "host2"), "", "it boots anew");
}

#[test]
fn what_cannot_be_moved_is_refused_with_its_code() {
    let mut c = Cluster::running();
    assert_eq!(c.refused(plan("vm9", "host2")), Code::VmNotFound);
    assert_eq!(c.refused(plan("vm1", "host9")), Code::HostNotFound);
    assert_eq!(c.refused(plan("vm1", "host1")), Code::SameHost);
    let long = MigrationOptions {
        max_downtime_ms: u32::MAX,
        ..MigrationOptions::default()
    };
    let request = PlanMigration {
        vm: "vm1".into(),
        to: "host2".into(),
        options: Some(long),
        ..PlanMigration::default()
    };
    assert_eq!(c.refused(Kind::PlanMigration(request)), Code::InvalidArgument);
    c.ok(create("vm2"));
    assert_eq!(c.refused(plan("vm2", "host2")), Code::VmState);
    c.ok(plan("vm1", "host2"));
    assert_eq!(c.refused(plan("vm1", "host3")), Code::MigrationActive);
    c.ok(abort("m1", "", Code::Cancelled));
    c.ok(host_down("host2"));
    assert_eq!(c.refused(plan("vm1", "host2")), Code::HostDown);
}

#[test]
fn a_target_is_chosen_when_none_is_named_and_its_room_is_reserved() {
    let mut c = Cluster::running();
    for name in ["a", "b", "c"] {
        c.ok(create(name));
        c.run(name, "host2");
    }
    assert_eq!(c.ok(plan("vm1", "")).migration.unwrap().to, "host3");
    for name in ["d", "e", "f"] {
        c.ok(create(name));
        c.run(name, "host3");
    }
    c.ok(create("g"));
    assert_eq!(c.refused(place("g", "host3", 0)), Code::NoHostFits);
    c.ok(abort("m1", "", Code::Cancelled));
    c.ok(place("g", "host3", 0));
    let fault = c.apply(plan("vm1", "host3")).unwrap_err();
    assert_eq!((fault.code, fault.field.as_str()), (Code::NoHostFits, "to"));
    assert!(
        fault.message.contains("host3 has 0 MiB free"),
        "{}",
        fault.message
    );
}

/// vm1 with this profile on host1, and hosts with these features.
fn on_host1_with(profile: &str, features: [&[&str]; 3]) -> Cluster {
    let mut c = Cluster::new();
    for (host, features) in ["host1", "host2", "host3"].into_iter().zip(features) {
        let mut spec = host_spec(host);
        spec.cpu_features = features.iter().map(|name| (*name).to_owned()).collect();
        c.ok(Kind::RegisterHost(spec));
    }
    let Kind::CreateVm(mut request) = create("vm1") else {
        unreachable!()
    };
    let spec = request.spec.as_mut().expect("a VM is created with its spec");
    spec.cpu_profile = profile.into();
    c.ok(Kind::CreateVm(request));
    c.run("vm1", "host1");
    c
}

#[test]
fn a_guest_never_lands_where_a_cpu_feature_that_it_sees_is_missing() {
    let all: &[&str] = &["avx2", "sse4_2"];
    let mut c = on_host1_with("host", [all, &["sse4_2"], all]);
    let fault = c.apply(plan("vm1", "host2")).unwrap_err();
    assert!(
        fault.code == Code::NoHostFits && fault.message.contains("avx2"),
        "{}",
        fault.message
    );
    assert_eq!(c.ok(plan("vm1", "")).migration.unwrap().to, "host3");
}

#[test]
fn a_baseline_guest_lands_only_where_there_is_as_much_of_the_level_as_at_its_source() {
    // Only host1's popcnt and sse3 (under the kernel's other name for it) are seen by the guest; its avx2 is not.
    let source: &[&str] = &["avx2", "pni", "popcnt"];
    let mut c = on_host1_with("baseline", [source, &["avx2", "ssse3"], &["sse3", "popcnt"]]);
    let fault = c.apply(plan("vm1", "host2")).unwrap_err();
    assert_eq!(fault.code, Code::NoHostFits);
    assert!(fault.message.ends_with(": popcnt, sse3"), "{}", fault.message);
    assert_eq!(c.ok(plan("vm1", "host3")).migration.unwrap().to, "host3");
}

#[test]
fn a_target_that_reads_only_older_save_state_is_refused() {
    let mut c = Cluster::running();
    let mut spec = host_spec("host1");
    spec.device_model = 2;
    c.ok(Kind::RegisterHost(spec));
    let fault = c.apply(plan("vm1", "host2")).unwrap_err();
    assert!(
        fault.message.contains("host2 reads save-state up to version 1"),
        "{}",
        fault.message
    );
}

#[test]
fn phases_only_go_forward() {
    let mut c = Cluster::running();
    let id = c.ok(plan("vm1", "host2")).migration.unwrap().id;
    assert_eq!(
        c.refused(advance(&id, MigrationPhase::PreCopy, "127.0.0.1:9000")),
        Code::InvalidArgument
    );
    c.ok(advance(&id, MigrationPhase::Preparing, ""));
    assert_eq!(
        c.refused(advance(&id, MigrationPhase::PreCopy, "nowhere")),
        Code::InvalidArgument
    );
    assert_eq!(c.refused(commit(&id, "host2", "vm1", 2)), Code::InvalidArgument);
    c.ok(advance(&id, MigrationPhase::PreCopy, "127.0.0.1:9000"));
    assert_eq!(
        c.refused(advance(&id, MigrationPhase::Preparing, "")),
        Code::InvalidArgument
    );
    assert_eq!(
        c.refused(advance(&id, MigrationPhase::Committed, "")),
        Code::InvalidArgument
    );
    assert_eq!(
        c.refused(advance(&id, MigrationPhase::PreCopy, "127.0.0.1:9001")),
        Code::InvalidArgument
    );
    c.ok(advance(&id, MigrationPhase::PreCopy, "127.0.0.1:9000"));
    assert_eq!(c.refused(finish(&id, 1)), Code::InvalidArgument);
    c.ok(commit(&id, "host2", "vm1", 2));
    assert_eq!(
        c.refused(advance(&id, MigrationPhase::PreCopy, "127.0.0.1:9000")),
        Code::MigrationEnded
    );
}

#[test]
fn the_first_of_commit_and_abort_wins_and_the_other_learns_it() {
    let mut c = Cluster::running();
    let id = c.copying("vm1", "host2");
    c.ok(abort(&id, "host1", Code::LinkLost));
    let late = c.ok(commit(&id, "host2", "vm1", 2));
    assert!(!late.current);
    assert_eq!(late.migration.unwrap().reason.unwrap().code, "link_lost");
    assert_eq!(c.granted("host1"), ["vm1@1"]);
    assert_eq!(c.state.migration(&id).unwrap().ended_in(), MigrationPhase::Ready);
    assert!(
        c.ok(abort(&id, "host2", Code::TargetFailed)).current,
        "reported twice, aborted once"
    );
    assert_eq!(c.refused(abort(&id, "", Code::Cancelled)), Code::MigrationEnded);
    let told = desired(&c.state, "host1").vms[0].migration.clone().unwrap();
    assert_eq!(
        told.phase(),
        MigrationPhase::Aborted,
        "the source learns the outcome"
    );

    let id = c.copying("vm1", "host2");
    assert!(c.ok(commit(&id, "host2", "vm1", 2)).current);
    assert_eq!(
        c.refused(abort(&id, "host1", Code::LinkLost)),
        Code::MigrationEnded
    );
    assert!(
        c.ok(commit(&id, "host2", "vm1", 2)).current,
        "asked again, it is committed still"
    );
    assert_eq!(c.epoch("vm1"), 2);
}

#[test]
fn a_commit_for_a_stale_epoch_is_refused() {
    let mut c = Cluster::running();
    let id = c.copying("vm1", "host2");
    assert_eq!(c.refused(commit(&id, "host2", "vm1", 1)), Code::StaleEpoch);
    assert_eq!(c.refused(commit(&id, "host2", "vm1", 3)), Code::StaleEpoch);
    assert_eq!(c.granted("host1"), ["vm1@1"]);
}

#[test]
fn a_commit_by_anybody_but_the_target_for_its_vm_is_refused() {
    let mut c = Cluster::running();
    c.ok(create("vm2"));
    let id = c.copying("vm1", "host2");
    assert_eq!(c.refused(commit(&id, "host3", "vm1", 2)), Code::InvalidArgument);
    assert_eq!(c.refused(commit(&id, "host2", "vm2", 2)), Code::InvalidArgument);
    assert_eq!(
        c.refused(commit("m9", "host2", "vm1", 2)),
        Code::MigrationNotFound
    );
    assert_eq!(
        c.refused(abort(&id, "host3", Code::LinkLost)),
        Code::InvalidArgument
    );
}

#[test]
fn a_commit_to_a_host_that_is_down_is_refused() {
    let mut c = Cluster::running();
    let id = c.copying("vm1", "host2");
    c.ok(host_down("host2"));
    assert_eq!(c.refused(commit(&id, "host2", "vm1", 2)), Code::HostDown);
}

#[test]
fn a_commit_from_a_source_host_that_is_down_saves_the_vm() {
    let mut c = Cluster::running();
    let id = c.copying("vm1", "host2");
    c.ok(host_down("host1"));
    c.ok(commit(&id, "host2", "vm1", 2));
    assert_eq!(c.vm("vm1").state(), VmState::Running);
    c.ok(host_up("host1", "boot-1"));
    assert!(c.granted("host1").is_empty());
}

#[test]
fn a_source_that_fails_aborts_its_migration_in_the_same_entry() {
    let mut c = Cluster::running();
    let id = c.copying("vm1", "host2");
    c.ok(report("host1", "vm1", 1, VmState::Failed));
    let migration = c.state.migration(&id).unwrap();
    assert_eq!(migration.phase(), MigrationPhase::Aborted);
    assert_eq!(migration.reason.as_ref().unwrap().code, "source_failed");
    assert!(!c.ok(commit(&id, "host2", "vm1", 2)).current);
    assert_eq!(c.vm("vm1").state(), VmState::Failed);
    assert!(desired(&c.state, "host2").vms.is_empty());
}

#[test]
fn a_source_that_fails_after_the_commit_harms_nothing() {
    let mut c = Cluster::running();
    let id = c.copying("vm1", "host2");
    c.ok(commit(&id, "host2", "vm1", 2));
    assert!(!c.ok(report("host1", "vm1", 1, VmState::Failed)).current);
    assert_eq!(c.granted("host2"), ["vm1@2"]);
    c.ok(report("host2", "vm1", 2, VmState::Failed));
    assert_eq!(
        c.phase(&id),
        MigrationPhase::Done,
        "the target's failure is the VM's, and nothing is left under way"
    );
    c.ok(finish(&id, 9));
    assert!(
        c.state.migration(&id).unwrap().receipt.is_some(),
        "a late receipt is kept"
    );
}

#[test]
fn stopping_or_deleting_the_vm_aborts_what_is_not_committed() {
    for kind in [stop("vm1"), delete("vm1")] {
        let mut c = Cluster::running();
        let id = c.copying("vm1", "host2");
        c.ok(kind);
        assert_eq!(
            c.state.migration(&id).unwrap().reason.as_ref().unwrap().code,
            "vm_stopped"
        );
        assert!(!c.ok(commit(&id, "host2", "vm1", 2)).current);
        assert!(c.granted("host1").is_empty() && c.granted("host2").is_empty());
    }
}

#[test]
fn old_migrations_are_forgotten_but_not_a_vms_last_one() {
    let mut c = Cluster::running();
    c.ok(create("vm2"));
    c.run("vm2", "host1");
    let kept = c.ok(plan("vm2", "host2")).migration.unwrap().id;
    c.ok(abort(&kept, "", Code::Cancelled));
    for _ in 0..MIGRATIONS_ENDED_MAX + 5 {
        let id = c.ok(plan("vm1", "host2")).migration.unwrap().id;
        c.ok(abort(&id, "", Code::Cancelled));
    }
    assert_eq!(c.state.migrations().count(), MIGRATIONS_ENDED_MAX);
    assert!(c.state.migration(&kept).is_some());
    assert!(c.state.migration("m2").is_none());
    assert_eq!(State::decode(&c.state.encode()).unwrap(), c.state);
}

#[test]
fn a_migration_keeps_the_forecast_that_was_made_for_it_within_bounds() {
    let mut c = Cluster::running();
    let forecast = Forecast {
        total_ms: 900,
        bandwidth_source: "receipts".repeat(100),
        windows: vec![DirtyWindow { us: 1, bytes: 2 }; 1_000],
        ..Forecast::default()
    };
    let planned = |forecast| {
        Kind::PlanMigration(PlanMigration {
            vm: "vm1".into(),
            to: "host2".into(),
            options: None,
            forecast,
            upgrade: false,
        })
    };
    let first = c
        .apply_as("r1", planned(Some(forecast)))
        .unwrap()
        .migration
        .unwrap();
    let kept = first.forecast.clone().unwrap();
    assert_eq!(kept.total_ms, 900);
    assert!(kept.bandwidth_source.len() <= 16 && kept.windows.len() <= 16);
    let again = c.apply_as("r1", planned(None)).unwrap().migration.unwrap();
    assert_eq!(
        again, first,
        "asked again of a leader that does not remember the forecast"
    );
}

#[test]
fn a_plan_carries_what_commits_took_lately_and_one_outlier_counts_for_nothing() {
    let mut c = Cluster::running();
    let mut hosts = ["host2", "host1"].into_iter().cycle();
    let mut carried = Vec::new();
    for (epoch, commit_us) in (2..).zip([6_000, 900_000, 5_000, 7_000, 800_000]) {
        let to = hosts.next().unwrap();
        let id = c.copying("vm1", to);
        carried.push(c.state.migration(&id).unwrap().options.unwrap().commit_us);
        c.ok(commit(&id, to, "vm1", epoch));
        c.ok(Kind::FinishMigration(FinishMigration {
            id,
            receipt: Some(Receipt {
                blackout_us: Some(Blackout {
                    pause: commit_us / 10,
                    state: commit_us / 5,
                    commit: commit_us,
                    resume: 500,
                    ..Blackout::default()
                }),
                ..Receipt::default()
            }),
        }));
    }
    assert_eq!(
        carried,
        [0, 6_500, 6_500, 6_500, 7_500],
        "the highest but for the outlier"
    );
    assert_eq!(
        commit_us(&c.state),
        40_000,
        "slow ones do not shut the next ones out"
    );
    assert_eq!((pause_us(&c.state), state_us(&c.state)), (20_000, 20_000));
    let last = c.copying("vm1", hosts.next().unwrap());
    let options = c.state.migration(&last).unwrap().options.unwrap();
    assert_eq!((options.pause_us, options.state_us), (20_000, 20_000));
}
