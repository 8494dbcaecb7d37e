//! What is looked at before a VM is moved, and that the plan and its dry run look at the same.

mod common;

use common::*;
use drover_proto::Code;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{MigrationOptions, PlanMigration};
use drover_state::preflight::{Preflight, preflight};

fn asked(vm: &str, to: &str) -> PlanMigration {
    PlanMigration {
        vm: vm.to_owned(),
        to: to.to_owned(),
        ..PlanMigration::default()
    }
}

fn against(found: &Preflight) -> Vec<(&'static str, Code)> {
    let refused = |finding: &drover_state::preflight::Finding| {
        finding
            .outcome
            .as_ref()
            .err()
            .map(|fault| (finding.check, fault.code))
    };
    found.findings.iter().filter_map(refused).collect()
}

#[test]
fn nothing_speaks_against_a_move_that_fits_and_every_check_says_what_it_found() {
    let c = Cluster::running();
    let found = preflight(&c.state, &asked("vm1", "host2")).unwrap();
    assert_eq!(found.refusal(), None);
    assert_eq!((found.from.as_str(), found.to.as_str()), ("host1", "host2"));
    assert_eq!(
        found.options.max_downtime_ms,
        c.state.settings().max_downtime_ms,
        "the cluster's defaults are filled in"
    );
    let checks: Vec<_> = found.findings.iter().map(|finding| finding.check).collect();
    assert_eq!(
        checks,
        [
            "options",
            "migration",
            "state",
            "target",
            "other_host",
            "host_up",
            "memory",
            "vcpus",
            "images",
            "cpu",
            "device_model"
        ]
    );
    assert!(
        found
            .findings
            .iter()
            .all(|finding| !finding.outcome.as_ref().unwrap().is_empty())
    );
}

#[test]
fn all_that_speaks_against_a_move_is_found_at_once_and_the_plan_is_refused_by_the_first() {
    let mut c = Cluster::running();
    c.ok(plan("vm1", "host3"));
    c.ok(host_down("host2"));
    let mut poor = host_spec("host2");
    poor.cpu_features.clear();
    poor.images.clear();
    poor.device_model = 0;
    if let Some(capacity) = &mut poor.capacity {
        capacity.memory_mib = 1;
    }
    c.ok(Kind::RegisterHost(poor));
    let mut request = asked("vm1", "host2");
    request.options = Some(MigrationOptions {
        max_downtime_ms: u32::MAX,
        ..MigrationOptions::default()
    });
    let found = preflight(&c.state, &request).unwrap();
    let codes = against(&found);
    for wanted in [
        ("options", Code::InvalidArgument),
        ("migration", Code::MigrationActive),
        ("memory", Code::NoHostFits),
        ("images", Code::NoHostFits),
    ] {
        assert!(codes.contains(&wanted), "{wanted:?} is not in {codes:?}");
    }
    assert_eq!(c.refused(Kind::PlanMigration(request)), codes[0].1);
}

#[test]
fn the_plan_answers_each_move_as_the_dry_run_does() {
    let mut c = Cluster::running();
    c.ok(create("vm2"));
    c.ok(host_down("host3"));
    for vm in ["vm1", "vm2", "vm9"] {
        for to in ["", "host1", "host2", "host3", "host9"] {
            let dry = preflight(&c.state, &asked(vm, to))
                .and_then(|found| found.refusal().cloned().map_or(Ok(found.to.clone()), Err));
            let mut copy = Cluster {
                state: c.state.clone(),
                ..Cluster::new()
            };
            let real = copy
                .apply(plan(vm, to))
                .map(|response| response.migration.unwrap().to);
            assert_eq!(dry, real, "{vm} to {to:?}");
        }
    }
}
