//! Post-copy in the log: who holds what between the commit and the last page, and how it ends.

mod common;

use common::*;
use drover_proto::Code;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    MigrationOptions, MigrationPhase, PlanMigration, ReportVmRequest, VmRole, VmState, WantPostCopy,
};
use drover_state::desired;
use drover_state::preflight::preflight;

fn commit_with_pages_missing(c: &mut Cluster, allowed: bool) -> String {
    let plan = PlanMigration {
        vm: "vm1".into(),
        to: "host2".into(),
        options: Some(MigrationOptions {
            allow_postcopy: allowed,
            ..MigrationOptions::default()
        }),
        ..PlanMigration::default()
    };
    let id = c
        .ok(Kind::PlanMigration(plan))
        .migration
        .expect("it is planned")
        .id;
    c.ok(advance(&id, MigrationPhase::Preparing, ""));
    c.ok(advance(&id, MigrationPhase::PreCopy, "127.0.0.1:9000"));
    id
}

fn missing(id: &str) -> Kind {
    match commit(id, "host2", "vm1", 2) {
        Kind::CommitHandover(mut commit) => {
            commit.post_copy = true;
            Kind::CommitHandover(commit)
        }
        other => other,
    }
}

#[test]
fn the_source_keeps_its_memory_and_nothing_else_until_the_target_has_all_pages() {
    let mut c = Cluster::running();
    let id = commit_with_pages_missing(&mut c, true);
    assert!(c.ok(missing(&id)).current);
    assert_eq!(c.phase(&id), MigrationPhase::PostCopy);
    assert_eq!(
        (c.granted("host1"), c.granted("host2")),
        (vec![], vec!["vm1@2".to_owned()])
    );
    let source = &desired(&c.state, "host1").vms[0];
    assert_eq!((source.role(), source.epoch), (VmRole::Serving, 1));
    let used = |c: &Cluster, host: &str| c.state.usages().get(host).map_or(0, |usage| usage.memory_mib);
    assert_eq!(used(&c, "host1"), used(&c, "host2"), "its memory is still there");
    assert!(used(&c, "host1") > 0);
    assert!(c.ok(missing(&id)).current, "asked again it is committed still");
    assert_eq!(c.refused(abort(&id, "", Code::Cancelled)), Code::MigrationEnded);
    assert_eq!(
        c.refused(abort(&id, "host1", Code::LinkLost)),
        Code::MigrationEnded
    );
    assert_eq!(c.refused(plan("vm1", "host3")), Code::MigrationActive);
    c.ok(finish(&id, 5));
    assert_eq!(c.phase(&id), MigrationPhase::Done);
    assert!(c.state.migration(&id).unwrap().reason.is_none());
    assert!(desired(&c.state, "host1").vms.is_empty());
    assert_eq!(used(&c, "host1"), 0);
}

#[test]
fn a_run_that_ends_before_its_pages_are_there_ends_the_migration_and_says_why() {
    let mut c = Cluster::running();
    let id = commit_with_pages_missing(&mut c, true);
    c.ok(missing(&id));
    let mut lost = ReportVmRequest {
        host: "host2".into(),
        vm: "vm1".into(),
        epoch: 2,
        ..ReportVmRequest::default()
    };
    lost.set_state(VmState::Failed);
    lost.reason = Some(drover_proto::Fault::new(Code::PostCopyLost, "1000 pages were missing").into());
    c.ok(Kind::ReportVm(lost));
    let migration = c.state.migration(&id).unwrap();
    assert_eq!(
        (migration.phase(), migration.ended_in()),
        (MigrationPhase::Done, MigrationPhase::PostCopy)
    );
    assert_eq!(
        migration.reason.as_ref().unwrap().code,
        Code::PostCopyLost.as_str()
    );
    assert_eq!(migration.receipt, None);
    assert_eq!(c.vm("vm1").state(), VmState::Failed);
    assert!(
        desired(&c.state, "host1").vms.is_empty() && desired(&c.state, "host2").vms.is_empty(),
        "nobody is needed any more"
    );
}

#[test]
fn pages_may_be_missing_at_the_commit_only_where_that_was_allowed() {
    let mut c = Cluster::running();
    let id = commit_with_pages_missing(&mut c, false);
    assert_eq!(c.refused(missing(&id)), Code::InvalidArgument);
    assert_eq!(c.phase(&id), MigrationPhase::PreCopy);
}

fn want(id: &str) -> Kind {
    Kind::WantPostCopy(WantPostCopy { id: id.into() })
}

/// host2 says so of itself.
fn says_of_post_copy(c: &mut Cluster, told: &str) {
    let spec = drover_proto::v1::HostSpec {
        post_copy: told.into(),
        ..host_spec("host2")
    };
    c.ok(Kind::RegisterHost(spec));
}

#[test]
fn a_person_can_ask_for_post_copy_at_any_time_before_the_commit_where_it_is_allowed() {
    let mut c = Cluster::running();
    let id = commit_with_pages_missing(&mut c, true);
    let before = desired(&c.state, "host1").revision;
    c.ok(want(&id));
    assert!(c.state.migration(&id).unwrap().post_copy_wanted);
    let told = desired(&c.state, "host1");
    assert_ne!(told.revision, before, "the source's agent learns of it");
    assert!(told.vms[0].migration.as_ref().unwrap().post_copy_wanted);
    let events = c.state.events_after(0, usize::MAX).count();
    c.ok(want(&id));
    assert_eq!(
        c.state.events_after(0, usize::MAX).count(),
        events,
        "asked again it is old news"
    );
    c.ok(missing(&id));
    c.ok(want(&id));
    c.ok(finish(&id, 5));
    assert_eq!(c.refused(want(&id)), Code::MigrationEnded);
    assert_eq!(c.refused(want("m99")), Code::MigrationNotFound);
}

#[test]
fn post_copy_is_refused_where_it_was_not_allowed_and_where_the_target_cannot() {
    let mut c = Cluster::running();
    let id = commit_with_pages_missing(&mut c, false);
    assert_eq!(c.refused(want(&id)), Code::PostCopyNotAllowed);
    assert!(!c.state.migration(&id).unwrap().post_copy_wanted);
    c.ok(abort(&id, "", Code::Cancelled));
    says_of_post_copy(&mut c, "userfaultfd is denied");
    let id = commit_with_pages_missing(&mut c, true);
    assert_eq!(c.refused(want(&id)), Code::PostCopyUnavailable);
}

#[test]
fn a_target_that_cannot_is_a_finding_that_refuses_nothing() {
    let mut c = Cluster::running();
    let plan = |allow_postcopy| PlanMigration {
        vm: "vm1".into(),
        to: "host2".into(),
        options: Some(MigrationOptions {
            allow_postcopy,
            ..MigrationOptions::default()
        }),
        ..PlanMigration::default()
    };
    let found = |c: &Cluster, allowed| {
        let found = preflight(&c.state, &plan(allowed)).unwrap();
        assert_eq!(found.refusal(), None);
        let finding = found
            .findings
            .into_iter()
            .find(|finding| finding.check == "post_copy");
        finding.map(|finding| finding.outcome.map_err(|fault| (fault.code, fault.message)))
    };
    assert_eq!(found(&c, false), None, "it was not asked for");
    assert!(found(&c, true).unwrap().is_ok());
    says_of_post_copy(&mut c, "userfaultfd is denied");
    let (code, message) = found(&c, true).unwrap().unwrap_err();
    assert_eq!(code, Code::PostCopyUnavailable);
    assert!(message.contains("userfaultfd is denied"), "{message}");
    says_of_post_copy(&mut c, "ok");
    assert!(found(&c, true).unwrap().is_ok());
}
