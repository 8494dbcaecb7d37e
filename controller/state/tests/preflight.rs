//! What is looked at before a VM is moved, and that the plan and its dry run look at the same.

mod common;

use common::*;
use drover_proto::Code;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    CreateVm, HostSpec, MigrationOptions, PlanMigration, ReportVmRequest, VmDevices, VmSpec, VmState,
};
use drover_state::placement::{Purpose, choose};
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
fn a_vm_with_a_virtio_console_starts_on_and_moves_to_hosts_that_know_it_only() {
    let mut c = Cluster::new();
    let spec = VmSpec {
        virtio_console: true,
        ..vm_spec("vm1")
    };
    let create = CreateVm {
        spec: Some(spec.clone()),
        start: true,
    };
    assert_eq!(c.refused(Kind::CreateVm(create.clone())), Code::NoHostFits);
    let nobody = choose(&c.state, &spec, Purpose::Start).unwrap_err();
    assert_eq!(nobody.code, Code::NoHostFits);
    assert!(
        nobody
            .message
            .contains("host1 knows devices up to version 1, a virtio console is of version 6"),
        "{nobody}"
    );
    for (host, device_model) in [("host1", 6), ("host2", 5), ("host3", 7)] {
        c.ok(Kind::RegisterHost(HostSpec {
            device_model,
            ..host_spec(host)
        }));
    }
    c.ok(Kind::CreateVm(create));
    assert_eq!(c.refused(place("vm1", "host2", 0)), Code::NoHostFits);
    c.run("vm1", "host1");
    // Whether its VMM has said what it has or not.
    for device_model in [0, 6] {
        c.ok(Kind::ReportVm(ReportVmRequest {
            host: "host1".into(),
            vm: "vm1".into(),
            epoch: 1,
            state: VmState::Running.into(),
            devices: Some(VmDevices {
                device_model,
                ..VmDevices::default()
            }),
            ..ReportVmRequest::default()
        }));
        assert_eq!(c.refused(plan("vm1", "host2")), Code::NoHostFits);
        let found = preflight(&c.state, &asked("vm1", "host2")).unwrap();
        assert_eq!(against(&found), [("device_model", Code::NoHostFits)]);
    }
    assert_eq!(c.ok(plan("vm1", "")).migration.unwrap().to, "host3");
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
