//! How much of its memory a VM's guest is to have: what the specification says at each step.

#![allow(clippy::unwrap_used, reason = "a panic is the test's failure")]

mod common;

use common::*;
use drover_proto::Code;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    Balloon, CreateVm, MigrationPhase, ReportVmRequest, SetVmMemory, SnapshotNews, VmDevices, VmMemory,
    VmSpec, VmState,
};
use drover_state::{State, desired};

fn set(vm: &str, memory_mib: u64) -> Kind {
    Kind::SetVmMemory(SetVmMemory {
        vm: vm.into(),
        memory_mib,
    })
}

/// vm1 with a balloon runs on host1.
fn cluster() -> Cluster {
    let mut c = Cluster::new();
    let mut spec = VmSpec {
        // The cluster's own to say.
        memory_target_mib: 32,
        memory_revision: 9,
        ..vm_spec("vm1")
    };
    spec.set_balloon(Balloon::On);
    let create = CreateVm {
        spec: Some(spec),
        start: true,
    };
    c.ok(Kind::CreateVm(create));
    c.run("vm1", "host1");
    c
}

fn wanted(c: &Cluster) -> (u64, u64) {
    let spec = c.vm("vm1").spec.as_ref().unwrap();
    (spec.memory_target_mib, spec.memory_revision)
}

#[test]
fn each_change_has_a_revision_and_goes_to_the_host_and_the_same_again_changes_nothing() {
    let mut c = cluster();
    assert_eq!(wanted(&c), (0, 0));
    c.ok(set("vm1", 128));
    assert_eq!(wanted(&c), (128, 1));
    let told = desired(&c.state, "host1").vms[0].spec.clone().unwrap();
    assert_eq!((told.memory_target_mib, told.memory_revision), (128, 1));
    c.ok(set("vm1", 128));
    assert_eq!(wanted(&c), (128, 1));
    c.ok(set("vm1", 256));
    assert_eq!(wanted(&c), (0, 2), "all of it");
    assert_eq!(
        State::decode(&c.state.encode()).unwrap().encode(),
        c.state.encode()
    );
}

#[test]
fn what_a_vm_was_not_created_for_is_refused() {
    let mut c = cluster();
    c.ok(create("vm2"));
    assert_eq!(c.refused(set("vm2", 128)), Code::VmState);
    assert_eq!(c.refused(set("vm3", 128)), Code::VmNotFound);
    for mib in [0, 15, 257, u64::MAX] {
        assert_eq!(c.refused(set("vm1", mib)), Code::InvalidArgument);
    }
    let mut odd = vm_spec("vm4");
    odd.balloon = 7;
    let create = CreateVm {
        spec: Some(odd),
        start: false,
    };
    assert_eq!(c.refused(Kind::CreateVm(create)), Code::InvalidArgument);
    c.ok(delete("vm1"));
    assert_eq!(c.refused(set("vm1", 128)), Code::VmState);
}

#[test]
fn what_was_asked_for_outlives_runs_failures_and_migrations_and_counts_for_no_room() {
    let mut c = cluster();
    c.ok(set("vm1", 64));
    let id = c.copying("vm1", "host2");
    c.ok(set("vm1", 96));
    let incoming = &desired(&c.state, "host2").vms[0];
    assert_eq!(incoming.spec.as_ref().unwrap().memory_target_mib, 96);
    c.ok(commit(&id, "host2", "vm1", 2));
    c.ok(finish(&id, 5));
    assert_eq!((c.phase(&id), wanted(&c)), (MigrationPhase::Done, (96, 2)));
    c.ok(report("host2", "vm1", 2, VmState::Failed));
    c.ok(start("vm1"));
    c.run("vm1", "host3");
    assert_eq!(wanted(&c), (96, 2));
    assert_eq!(
        c.state.usages()["host3"].memory_mib,
        256,
        "what it was created with"
    );
}

#[test]
fn what_the_guest_has_is_kept_as_long_as_its_run() {
    let mut c = cluster();
    let memory = VmMemory {
        target_mib: 64,
        revision: 1,
        actual_mib: 100,
        driver: true,
    };
    c.ok(Kind::ReportVm(ReportVmRequest {
        host: "host1".into(),
        vm: "vm1".into(),
        epoch: 1,
        state: VmState::Running.into(),
        devices: Some(VmDevices {
            memory: Some(memory),
            device_model: 5,
            ..VmDevices::default()
        }),
        ..ReportVmRequest::default()
    }));
    assert_eq!(c.vm("vm1").devices.as_ref().unwrap().memory, Some(memory));
    // Its hosts read device model 1.
    assert_eq!(c.refused(plan("vm1", "host2")), Code::NoHostFits);
    c.ok(stop("vm1"));
    c.ok(report("host1", "vm1", 1, VmState::Stopped));
    assert_eq!(c.vm("vm1").devices, None);
}

#[test]
fn a_restored_guest_is_told_what_it_is_to_have_whatever_it_was_told_before_its_instant() {
    let mut c = cluster();
    c.ok(take("vm1", "nightly"));
    // Between what was asked for and the instant: the guest's state may have it.
    c.ok(set("vm1", 32));
    let told = c.vm("vm1").spec.as_ref().unwrap().memory_revision;
    c.ok(news("host1", "s1", 1, SnapshotNews::Done));
    c.ok(stop("vm1"));
    c.ok(report("host1", "vm1", 1, VmState::Stopped));
    c.ok(restore("vm1", "nightly", ""));
    c.ok(restore("vm1", "nightly", "vm2"));
    for vm in ["vm1", "vm2"] {
        let spec = c.vm(vm).spec.clone().unwrap();
        assert!(spec.memory_revision > told, "{spec:?}");
        assert_eq!(
            spec.memory_target_mib, 0,
            "what it had when the snapshot was asked for"
        );
    }
}
