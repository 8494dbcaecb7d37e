//! Upgrades in the log: a migration whose source and target are two VMMs of one host, by the same rules.

#![allow(clippy::unwrap_used, reason = "a panic is the test's failure")]

mod common;

use common::*;
use drover_proto::Code;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    AdvanceMigration, CommitHandoverRequest, MigrationOptions, MigrationPhase, PlanMigration, VmRole,
    VmState, VmmBuild,
};
use drover_state::preflight::preflight;
use drover_state::{State, desired};

/// Plans an upgrade and brings it to where the target listens; its id.
fn upgrading(c: &mut Cluster, vm: &str, host: &str) -> String {
    let id = c.ok(upgrade(vm, host)).migration.unwrap().id;
    c.ok(advance(&id, MigrationPhase::Preparing, ""));
    c.ok(advance(&id, MigrationPhase::PreCopy, "local"));
    id
}

#[test]
fn an_upgrade_goes_through_the_same_phases_and_moves_the_right_to_run_to_the_next_epoch_on_the_same_host() {
    let mut c = Cluster::running();
    let id = c.ok(upgrade("vm1", "host1")).migration.unwrap().id;
    assert_eq!(desired(&c.state, "host1").vms.len(), 1, "only planned");
    c.ok(advance(&id, MigrationPhase::Preparing, ""));
    let both: Vec<_> = desired(&c.state, "host1")
        .vms
        .iter()
        .map(|vm| (vm.role(), vm.epoch, vm.migration.clone().unwrap().id))
        .collect();
    assert_eq!(
        both,
        [(VmRole::Run, 1, id.clone()), (VmRole::Incoming, 2, id.clone())]
    );
    c.ok(advance(&id, MigrationPhase::PreCopy, "local"));
    assert_eq!(c.granted("host1"), ["vm1@1"]);
    let received = VmmBuild {
        version: "0.2.0".into(),
        build: "b2".into(),
    };
    let committed = CommitHandoverRequest {
        host: "host1".into(),
        migration: id.clone(),
        vm: "vm1".into(),
        epoch: 2,
        vmm: Some(received.clone()),
        ..CommitHandoverRequest::default()
    };
    assert!(c.ok(Kind::CommitHandover(committed)).current);
    assert_eq!(c.granted("host1"), ["vm1@2"]);
    assert_eq!(c.vm("vm1").vmm, Some(received));
    let only = &desired(&c.state, "host1").vms;
    assert_eq!(only.len(), 1, "the old VMM is not desired any more");
    assert_eq!((only[0].epoch, only[0].arrived_by.as_str()), (2, id.as_str()));
    c.ok(finish(&id, 5));
    assert_eq!(c.phase(&id), MigrationPhase::Done);
    let restored = State::decode(&c.state.encode()).unwrap();
    assert_eq!(restored, c.state);
}

#[test]
fn whichever_of_commit_and_abort_comes_first_wins_in_an_upgrade_too() {
    let mut c = Cluster::running();
    let first = upgrading(&mut c, "vm1", "host1");
    c.ok(abort(&first, "host1", Code::TargetFailed));
    assert!(!c.ok(commit(&first, "host1", "vm1", 2)).current);
    assert_eq!(c.granted("host1"), ["vm1@1"]);
    let second = upgrading(&mut c, "vm1", "host1");
    c.ok(commit(&second, "host1", "vm1", 2));
    assert_eq!(
        c.refused(abort(&second, "host1", Code::TargetFailed)),
        Code::MigrationEnded
    );
    assert_eq!(c.granted("host1"), ["vm1@2"]);
    assert!(c.ok(commit(&second, "host1", "vm1", 2)).current, "asked again");
}

#[test]
fn memory_is_counted_once_on_a_host_where_two_vmms_share_it() {
    let mut c = Cluster::new();
    let Kind::CreateVm(mut large) = create("vm1") else {
        unreachable!()
    };
    large.spec.as_mut().unwrap().memory_mib = HOST_MEMORY_MIB;
    c.ok(Kind::CreateVm(large));
    c.run("vm1", "host1");
    let used = |c: &Cluster| c.state.usages()["host1"];
    let before = used(&c);
    let id = upgrading(&mut c, "vm1", "host1");
    assert_eq!(used(&c), before, "the host is full, and an upgrade needs nothing");
    c.ok(commit(&id, "host1", "vm1", 2));
    assert_eq!(used(&c), before);
    c.ok(finish(&id, 5));
    assert_eq!(used(&c), before);
}

#[test]
fn what_cannot_be_upgraded_is_refused_with_its_code() {
    let mut c = Cluster::running();
    assert_eq!(c.refused(upgrade("vm9", "host1")), Code::VmNotFound);
    assert_eq!(c.refused(upgrade("vm1", "host2")), Code::InvalidArgument);
    assert_eq!(
        c.refused(plan("vm1", "host1")),
        Code::SameHost,
        "not asked for by its name"
    );
    let about_pages = [
        MigrationOptions {
            streams: 2,
            ..MigrationOptions::default()
        },
        MigrationOptions {
            bandwidth_mib_s: 9,
            ..MigrationOptions::default()
        },
        MigrationOptions {
            plaintext: true,
            ..MigrationOptions::default()
        },
        MigrationOptions {
            max_throttle_percent: 9,
            ..MigrationOptions::default()
        },
    ];
    for options in about_pages {
        let request = PlanMigration {
            vm: "vm1".into(),
            to: "host1".into(),
            options: Some(options),
            upgrade: true,
            ..PlanMigration::default()
        };
        assert_eq!(c.refused(Kind::PlanMigration(request)), Code::InvalidArgument);
    }
    c.ok(create("vm2"));
    assert_eq!(
        c.refused(upgrade("vm2", "")),
        Code::VmState,
        "it waits for a host"
    );
    let moving = c.copying("vm1", "host2");
    assert_eq!(c.refused(upgrade("vm1", "host1")), Code::MigrationActive);
    c.ok(abort(&moving, "", Code::Cancelled));
    c.ok(upgrade("vm1", "host1"));
    assert_eq!(c.refused(plan("vm1", "host2")), Code::MigrationActive);
    c.ok(stop("vm1"));
    assert_eq!(c.refused(upgrade("vm1", "host1")), Code::VmState);
}

#[test]
fn an_agent_or_a_vmm_from_before_upgrades_is_told_of_beforehand() {
    let mut c = Cluster::running();
    let plan = PlanMigration {
        vm: "vm1".into(),
        to: "host1".into(),
        upgrade: true,
        ..PlanMigration::default()
    };
    let found = preflight(&c.state, &plan).unwrap();
    assert_eq!(found.refusal(), None);
    let mut old = host_spec("host1");
    old.vmm = None;
    c.ok(Kind::RegisterHost(old));
    assert_eq!(c.refused(upgrade("vm1", "host1")), Code::VmmStartFailed);
    c.ok(Kind::RegisterHost(host_spec("host1")));
    c.ok(stop("vm1"));
    c.ok(report("host1", "vm1", 1, VmState::Stopped));
    c.ok(start("vm1"));
    c.ok(place("vm1", "host1", 1));
    let Kind::ReportVm(mut silent) = report("host1", "vm1", 2, VmState::Running) else {
        unreachable!()
    };
    silent.vmm = None;
    c.ok(Kind::ReportVm(silent));
    assert_eq!(c.vm("vm1").vmm, None, "nothing is left of the run before");
    assert_eq!(c.refused(upgrade("vm1", "host1")), Code::ProtocolVersion);
    c.ok(report("host1", "vm1", 2, VmState::Running));
    c.ok(upgrade("vm1", "host1"));
}

#[test]
fn a_target_address_is_of_the_kind_that_the_migration_has() {
    let mut c = Cluster::running();
    let id = c.ok(upgrade("vm1", "host1")).migration.unwrap().id;
    c.ok(advance(&id, MigrationPhase::Preparing, ""));
    for addr in ["127.0.0.1:9000", "local:/tmp/x", ""] {
        let wrong = AdvanceMigration {
            id: id.clone(),
            phase: MigrationPhase::PreCopy.into(),
            target_addr: addr.into(),
        };
        assert_eq!(
            c.refused(Kind::AdvanceMigration(wrong)),
            Code::InvalidArgument,
            "{addr}"
        );
    }
    c.ok(abort(&id, "", Code::Cancelled));
    let moving = c.ok(plan("vm1", "host2")).migration.unwrap().id;
    c.ok(advance(&moving, MigrationPhase::Preparing, ""));
    assert_eq!(
        c.refused(advance(&moving, MigrationPhase::PreCopy, "local")),
        Code::InvalidArgument
    );
}

#[test]
fn the_host_of_an_upgrade_that_is_declared_down_gets_no_commit() {
    let mut c = Cluster::running();
    let id = upgrading(&mut c, "vm1", "host1");
    c.ok(host_down("host1"));
    assert_eq!(c.refused(commit(&id, "host1", "vm1", 2)), Code::HostDown);
    c.ok(abort(&id, "", Code::TargetDown));
    c.ok(host_up("host1", ""));
    assert_eq!(c.granted("host1"), ["vm1@1"], "the old VMM goes on");
}

#[test]
fn a_request_that_is_repeated_after_the_vm_moved_has_the_first_answer() {
    let mut c = Cluster::running();
    let first = c.apply_as("r1", upgrade("vm1", "host1")).unwrap();
    c.ok(abort("m1", "", Code::Cancelled));
    let moving = c.copying("vm1", "host2");
    c.ok(commit(&moving, "host2", "vm1", 2));
    assert_eq!(c.apply_as("r1", upgrade("vm1", "host2")).unwrap(), first);
}
