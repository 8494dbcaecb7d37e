//! VMs and hosts: what each command does, and what it refuses.

mod common;

use common::*;
use drover_proto::Code;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{CreateVm, HostState, InitCluster, RestartPolicy, VmSpec, VmState};
use drover_state::limits::RESTARTS_MAX;
use drover_state::{State, desired};

fn create_with(change: impl Fn(&mut VmSpec)) -> Kind {
    let mut spec = vm_spec("vm1");
    change(&mut spec);
    Kind::CreateVm(CreateVm {
        spec: Some(spec),
        start: true,
    })
}

#[test]
fn a_vm_is_created_placed_run_stopped_and_deleted() {
    let mut c = Cluster::new();
    assert_eq!(c.ok(create("vm1")).vm.unwrap().state(), VmState::Pending);
    assert_eq!(
        c.ok(place("vm1", "host2", 0)).vm.unwrap().state(),
        VmState::Starting
    );
    assert_eq!(c.granted("host2"), ["vm1@1"]);
    assert!(c.ok(report("host2", "vm1", 1, VmState::Running)).current);
    assert_eq!(c.vm("vm1").state(), VmState::Running);
    let stopping = c.ok(stop("vm1")).vm.unwrap();
    assert_eq!(stopping.state(), VmState::Stopping);
    let awaited = stopping.reason.unwrap().message;
    assert!(awaited.contains("host2's agent"), "{awaited}");
    assert!(
        c.granted("host2").is_empty(),
        "a VM that is being stopped has no right to run"
    );
    let awaited = desired(&c.state, "host2");
    assert!(awaited.vms.is_empty());
    assert_eq!(
        (awaited.stopping[0].vm.as_str(), awaited.stopping[0].epoch),
        ("vm1", 1)
    );
    c.ok(report("host2", "vm1", 1, VmState::Stopped));
    assert!(desired(&c.state, "host2").stopping.is_empty());
    assert_eq!(c.vm("vm1").state(), VmState::Stopped);
    c.ok(delete("vm1"));
    assert!(c.state.vm("vm1").is_none());
}

#[test]
fn a_vm_of_a_deleted_ones_name_never_runs_at_an_epoch_that_was_used() {
    let mut c = Cluster::running();
    c.ok(delete("vm1"));
    assert!(c.vm("vm1").deleting);
    assert_eq!(c.refused(start("vm1")), Code::VmState);
    c.ok(report("host1", "vm1", 1, VmState::Stopped));
    assert!(c.state.vm("vm1").is_none());
    c.ok(create("vm1"));
    c.ok(place("vm1", "host2", 1));
    assert_eq!(c.epoch("vm1"), 2);
}

#[test]
fn what_does_not_exist_or_cannot_be_is_refused_with_its_code() {
    let mut c = Cluster::running();
    assert_eq!(c.refused(create("vm1")), Code::VmExists);
    assert_eq!(c.refused(start("vm9")), Code::VmNotFound);
    assert_eq!(c.refused(stop("vm9")), Code::VmNotFound);
    assert_eq!(c.refused(delete("vm9")), Code::VmNotFound);
    let mut c = Cluster::new();
    assert_eq!(
        c.refused(create_with(|s| s.kernel = "absent".into())),
        Code::ImageNotFound
    );
    assert_eq!(
        c.refused(create_with(|s| s.kernel = "broken".into())),
        Code::ImageInvalid
    );
    assert_eq!(
        c.refused(create_with(|s| s.kernel = "initramfs".into())),
        Code::ImageInvalid
    );
    assert_eq!(
        c.refused(create_with(|s| s.initrd = "absent".into())),
        Code::ImageNotFound
    );
    assert_eq!(
        c.refused(create_with(|s| s.host = "host9".into())),
        Code::HostNotFound
    );
    assert_eq!(
        c.refused(create_with(|s| s.memory_mib = HOST_MEMORY_MIB + 1)),
        Code::NoHostFits
    );
    assert_eq!(c.refused(create_with(|s| s.vcpus = 17)), Code::NoHostFits);
    assert_eq!(c.refused(create_with(|s| s.vcpus = 33)), Code::InvalidArgument);
}

#[test]
fn a_vm_too_large_for_any_host_is_told_why_of_every_host() {
    let mut c = Cluster::new();
    let fault = c.apply(create_with(|s| s.memory_mib = 4_096)).unwrap_err();
    for host in ["host1", "host2", "host3"] {
        assert!(
            fault
                .message
                .contains(&format!("{host} has 1024 MiB free of 1024 MiB")),
            "{}",
            fault.message
        );
    }
}

#[test]
fn a_placement_is_checked_again_when_it_is_applied() {
    let mut c = Cluster::new();
    c.ok(create("vm1"));
    assert_eq!(c.refused(place("vm1", "host9", 0)), Code::HostNotFound);
    assert_eq!(c.refused(place("vm9", "host1", 0)), Code::VmNotFound);
    c.ok(host_down("host1"));
    assert_eq!(c.refused(place("vm1", "host1", 0)), Code::HostDown);
    for name in ["a", "b", "c", "d"] {
        c.ok(create(name));
        c.ok(place(name, "host2", 0));
    }
    assert_eq!(c.refused(place("vm1", "host2", 0)), Code::NoHostFits);
    c.ok(place("vm1", "host3", 0));
    assert_eq!(c.refused(place("vm1", "host3", 1)), Code::VmState);
}

#[test]
fn a_placement_for_a_stale_epoch_is_refused() {
    let mut c = Cluster::new();
    c.ok(create("vm1"));
    assert_eq!(c.refused(place("vm1", "host1", 7)), Code::StaleEpoch);
}

#[test]
fn a_report_for_a_stale_epoch_changes_nothing() {
    let mut c = Cluster::running();
    c.ok(report("host1", "vm1", 1, VmState::Failed));
    c.ok(start("vm1"));
    c.run("vm1", "host1");
    let before = c.state.encode();
    assert!(!c.ok(report("host1", "vm1", 1, VmState::Failed)).current);
    assert!(
        !c.ok(report("host2", "vm1", 2, VmState::Stopped)).current,
        "host2 does not hold it"
    );
    assert!(
        !c.ok(report("host1", "vm1", 3, VmState::Running)).current,
        "no such epoch yet"
    );
    assert!(
        !c.ok(report("host1", "vm9", 1, VmState::Running)).current,
        "no such VM"
    );
    assert_eq!(c.state.encode(), before);
}

#[test]
fn a_failure_keeps_its_reason_and_ends_the_run() {
    let mut c = Cluster::new();
    c.ok(create("vm1"));
    c.ok(place("vm1", "host1", 0));
    c.ok(report("host1", "vm1", 1, VmState::Failed));
    let vm = c.vm("vm1");
    assert_eq!(
        (vm.state(), vm.reason.as_ref().unwrap().code.as_str()),
        (VmState::Failed, "kernel_invalid")
    );
    assert!(c.granted("host1").is_empty());
    assert!(
        !c.ok(report("host1", "vm1", 1, VmState::Running)).current,
        "a run ends once"
    );
    assert!(
        c.ok(report("host1", "vm1", 1, VmState::Failed)).current,
        "but may be reported twice"
    );
}

#[test]
fn restarts_on_failure_are_counted_and_bounded() {
    let mut c = Cluster::new();
    c.ok(create_with(|s| s.set_restart(RestartPolicy::OnFailure)));
    for restart in 0..=RESTARTS_MAX {
        let epoch = c.epoch("vm1");
        c.ok(place("vm1", "host1", epoch));
        c.ok(report("host1", "vm1", epoch + 1, VmState::Failed));
        assert_eq!(c.vm("vm1").restarts, restart);
        if restart < RESTARTS_MAX {
            c.ok(pending("vm1", "again"));
        }
    }
    assert_eq!(c.refused(pending("vm1", "again")), Code::VmState);
    c.ok(start("vm1"));
    assert_eq!((c.vm("vm1").restarts, c.vm("vm1").state()), (0, VmState::Pending));
}

#[test]
fn a_guest_that_shuts_itself_down_is_not_started_again() {
    let mut c = Cluster::running();
    c.ok(report("host1", "vm1", 1, VmState::Stopped));
    assert_eq!(
        (c.vm("vm1").state(), c.vm("vm1").wanted_running),
        (VmState::Stopped, false)
    );
}

#[test]
fn a_start_during_a_stop_waits_until_the_old_run_is_gone() {
    let mut c = Cluster::running();
    c.ok(stop("vm1"));
    c.ok(start("vm1"));
    assert_eq!(c.vm("vm1").state(), VmState::Stopping);
    assert!(c.granted("host1").is_empty());
    assert_eq!(c.refused(place("vm1", "host2", 1)), Code::VmState);
    c.ok(report("host1", "vm1", 1, VmState::Stopped));
    c.ok(place("vm1", "host2", 1));
    assert_eq!(c.granted("host2"), ["vm1@2"]);
}

#[test]
fn a_host_that_is_down_holds_its_vms_until_it_is_up_again() {
    let mut c = Cluster::running();
    c.ok(create("vm2"));
    c.ok(place("vm2", "host1", 0));
    c.ok(host_down("host1"));
    assert_eq!(c.vm("vm1").state(), VmState::Unknown);
    assert!(c.granted("host1").is_empty());
    assert_eq!(
        desired(&c.state, "host1").vms.len(),
        2,
        "its VMMs are frozen, not to be destroyed"
    );
    assert_eq!(c.refused(place("vm1", "host2", 1)), Code::VmState);
    c.ok(host_up("host1", "boot-1"));
    assert_eq!(
        c.vm("vm1").state(),
        VmState::Running,
        "it was seen running at this epoch"
    );
    assert_eq!(c.vm("vm2").state(), VmState::Starting, "it was not");
    assert_eq!(c.granted("host1"), ["vm1@1", "vm2@1"]);
}

#[test]
fn a_vm_on_a_host_that_is_down_can_be_stopped_and_started_elsewhere() {
    let mut c = Cluster::running();
    c.ok(host_down("host1"));
    assert_eq!(c.ok(stop("vm1")).vm.unwrap().state(), VmState::Stopped);
    c.ok(start("vm1"));
    c.run("vm1", "host2");
    c.ok(host_up("host1", "boot-1"));
    assert!(c.granted("host1").is_empty());
    assert_eq!(c.granted("host2"), ["vm1@2"]);
}

#[test]
fn a_host_that_goes_down_ends_what_was_being_stopped_there() {
    let mut c = Cluster::running();
    c.ok(delete("vm1"));
    c.ok(host_down("host1"));
    assert!(c.state.vm("vm1").is_none());
}

#[test]
fn a_hosts_reboot_fails_the_vms_it_ran() {
    for by_heartbeat in [true, false] {
        let mut c = Cluster::running();
        if by_heartbeat {
            c.ok(host_up("host1", "boot-2"));
        } else {
            let mut spec = host_spec("host1");
            spec.boot_id = "boot-2".into();
            c.ok(Kind::RegisterHost(spec));
        }
        let vm = c.vm("vm1");
        assert_eq!(
            (vm.state(), vm.reason.as_ref().unwrap().code.as_str()),
            (VmState::Failed, "vmm_died")
        );
    }
}

#[test]
fn registering_again_changes_a_host_and_does_not_raise_it() {
    let mut c = Cluster::new();
    c.ok(host_down("host1"));
    let mut spec = host_spec("host1");
    spec.agent_addr = "127.0.0.1:7999".into();
    c.ok(Kind::RegisterHost(spec));
    let host = c.state.host("host1").unwrap();
    assert_eq!(host.state(), HostState::Down, "only a lease raises it");
    assert_eq!(host.spec.as_ref().unwrap().agent_addr, "127.0.0.1:7999");
    let before = c.state.clone();
    c.ok(Kind::RegisterHost(host.spec.clone().unwrap()));
    assert_eq!(c.state, before, "the same registration again is no change");
}

#[test]
fn the_same_request_id_gets_the_first_answer() {
    let mut c = Cluster::new();
    let first = c.apply_as("r1", create("vm1")).unwrap();
    c.run("vm1", "host1");
    let before = c.state.encode();
    assert_eq!(c.apply_as("r1", create("vm1")).unwrap(), first);
    assert_eq!(c.state.encode(), before);
    assert_eq!(
        c.apply_as("r1", create("vm2")).unwrap_err().code,
        Code::RequestIdReused
    );
    assert_eq!(
        c.apply_as(&"x".repeat(129), create("vm2")).unwrap_err().code,
        Code::InvalidArgument
    );
    let refusal = c.apply_as("r2", start("vm9")).unwrap_err();
    c.ok(create("vm9"));
    assert_eq!(
        c.apply_as("r2", start("vm9")).unwrap_err(),
        refusal,
        "a refusal is an answer too"
    );
}

#[test]
fn a_desired_state_changes_its_revision_exactly_when_it_changes() {
    let mut c = Cluster::running();
    let host1 = desired(&c.state, "host1").revision;
    let host2 = desired(&c.state, "host2").revision;
    c.ok(create("vm2"));
    c.run("vm2", "host2");
    assert_eq!(desired(&c.state, "host1").revision, host1);
    assert_ne!(desired(&c.state, "host2").revision, host2);
}

#[test]
fn a_cluster_is_formed_once() {
    let init = |id: &str| {
        Kind::InitCluster(InitCluster {
            cluster_id: id.into(),
            settings: None,
        })
    };
    let mut c = Cluster {
        state: State::default(),
        now_ms: 0,
    };
    c.ok(init("dev-1"));
    let before = c.state.encode();
    c.ok(init("dev-1"));
    assert_eq!(c.state.encode(), before);
    assert_eq!(c.refused(init("dev-2")), Code::InvalidArgument);
}
