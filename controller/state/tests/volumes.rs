//! Volumes: who may have one, where a VM that has one may be, and when it goes.

#![allow(clippy::unwrap_used, reason = "a panic is the test's failure")]

mod common;

use common::*;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{HostSpec, PlanMigration, VmState};
use drover_proto::{Code, Fault};
use drover_state::placement::{self, Purpose};
use drover_state::preflight::preflight;
use drover_state::{State, desired};

const MIB: u64 = 1 << 20;

/// host3 lacks the pool; volume data is there.
fn cluster() -> Cluster {
    let mut c = Cluster::new();
    c.ok(Kind::RegisterHost(HostSpec {
        pools: Vec::new(),
        ..host_spec("host3")
    }));
    c.ok(create_volume("data", "", 8 * MIB));
    c
}

fn fault(c: &mut Cluster, kind: Kind) -> Fault {
    let before = c.state.encode();
    let fault = c.apply(kind).unwrap_err();
    assert_eq!(c.state.encode(), before, "a refusal changed the state");
    fault
}

fn refusal(c: &mut Cluster, kind: Kind) -> (Code, String) {
    let fault = fault(c, kind);
    (fault.code, fault.field)
}

#[test]
fn a_volume_is_made_of_what_was_asked_for_and_of_the_leaders_clock() {
    let mut c = cluster();
    let Kind::CreateVolume(mut create) = create_volume("more", "default", MIB) else {
        unreachable!()
    };
    let asked = create.volume.as_mut().unwrap();
    (asked.used, asked.created_ms, asked.vms) = (true, 7, vec!["vm9".into()]);
    let made = c.ok(Kind::CreateVolume(create)).volume.unwrap();
    assert_eq!((made.created_ms, made.used), (c.now_ms, false));
    assert_eq!(made.vms, Vec::<String>::new());
    let volumes = c.state.volumes_with_users();
    let names: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!(names, ["data", "more"]);
    assert_eq!(c.state.volume("data").unwrap().pool, "default");
    assert_eq!(State::decode(&c.state.encode()).unwrap(), c.state);
}

#[test]
fn a_volume_out_of_its_form_is_refused_by_field() {
    let mut c = cluster();
    let invalid = Code::InvalidArgument;
    for (kind, wanted) in [
        (create_volume("Data", "", MIB), (invalid, "volume.name")),
        (create_volume("d", "../x", MIB), (invalid, "volume.pool")),
        (create_volume("d", "", 0), (invalid, "volume.size_bytes")),
        (create_volume("d", "", MIB + 512), (invalid, "volume.size_bytes")),
        (
            create_volume("d", "", (64 << 40) + MIB),
            (invalid, "volume.size_bytes"),
        ),
        (
            create_volume("data", "", MIB),
            (Code::VolumeExists, "volume.name"),
        ),
        (
            create_volume("d", "tape", MIB),
            (Code::PoolNotFound, "volume.pool"),
        ),
        (delete_volume("d"), (Code::VolumeNotFound, "name")),
    ] {
        let refused = refusal(&mut c, kind);
        assert_eq!((refused.0, refused.1.as_str()), wanted);
    }
    c.ok(create_volume("huge", "", 64 << 40));
}

#[test]
fn a_volume_that_is_written_to_belongs_to_one_vm() {
    let mut c = cluster();
    c.ok(create_with_disks("vm1", &["data"]));
    let in_use = (Code::VolumeInUse, "spec.disks.volume".to_owned());
    assert_eq!(refusal(&mut c, create_with_disks("vm2", &["data"])), in_use);
    assert_eq!(refusal(&mut c, create_with_disks("vm2", &["data:ro"])), in_use);
    let said = fault(&mut c, create_with_disks("vm2", &["data"])).message;
    assert!(said.contains("data") && said.contains("vm1"), "{said}");
    assert_eq!(
        refusal(&mut c, delete_volume("data")),
        (Code::VolumeInUse, "name".to_owned())
    );
    c.ok(delete("vm1"));
    c.ok(create_with_disks("vm2", &["data:ro"]));
    c.ok(create_with_disks("vm3", &["data:ro"]));
    assert_eq!(refusal(&mut c, create_with_disks("vm4", &["data"])), in_use);
    assert_eq!(c.state.volumes_with_users()[0].vms, ["vm2", "vm3"]);
    c.ok(delete("vm2"));
    c.ok(delete("vm3"));
    c.ok(delete_volume("data"));
    assert_eq!(c.state.volumes_with_users().len(), 0);
}

#[test]
fn a_vm_that_is_being_deleted_has_its_volume_until_it_is_gone() {
    let mut c = cluster();
    c.ok(create_with_disks("vm1", &["data"]));
    c.run("vm1", "host1");
    c.ok(delete("vm1"));
    assert_eq!(
        refusal(&mut c, create_with_disks("vm2", &["data"])).0,
        Code::VolumeInUse
    );
    c.ok(report("host1", "vm1", 1, VmState::Stopped));
    c.ok(create_with_disks("vm2", &["data"]));
}

#[test]
fn disks_out_of_their_form_are_refused_by_field() {
    let mut c = cluster();
    let volume = "spec.disks.volume".to_owned();
    assert_eq!(
        refusal(&mut c, create_with_disks("vm1", &["none"])),
        (Code::VolumeNotFound, volume.clone())
    );
    assert_eq!(
        refusal(&mut c, create_with_disks("vm1", &["data", "data:ro"])),
        (Code::InvalidArgument, volume.clone())
    );
    assert_eq!(
        refusal(&mut c, create_with_disks("vm1", &["../data"])),
        (Code::InvalidArgument, volume)
    );
    let many: Vec<String> = (0..25).map(|at| format!("v{at}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(
        refusal(&mut c, create_with_disks("vm1", &many)),
        (Code::InvalidArgument, "spec.disks".to_owned())
    );
    let Kind::CreateVm(mut create) = create_with_disks("vm1", &["data"]) else {
        unreachable!()
    };
    create.spec.as_mut().unwrap().disks[0].serial = "with blank".into();
    assert_eq!(
        refusal(&mut c, Kind::CreateVm(create)),
        (Code::InvalidArgument, "spec.disks.serial".to_owned())
    );
}

#[test]
fn a_vm_goes_only_to_hosts_that_have_the_pools_of_its_volumes() {
    let mut c = cluster();
    let Kind::CreateVm(mut pinned) = create_with_disks("vm1", &["data"]) else {
        unreachable!()
    };
    pinned.spec.as_mut().unwrap().host = "host3".into();
    let said = fault(&mut c, Kind::CreateVm(pinned));
    assert_eq!(said.code, Code::NoHostFits);
    assert!(
        said.message
            .contains("host3 has no pool \"default\", in which volume data is"),
        "{said}"
    );
    c.ok(create_with_disks("vm1", &["data"]));
    assert_eq!(c.refused(place("vm1", "host3", 0)), Code::PoolNotFound);
    c.run("vm1", "host1");
    let said = fault(&mut c, plan("vm1", "host3"));
    assert_eq!(
        (said.code, said.field.as_str()),
        (Code::NoHostFits, "to"),
        "{said}"
    );
    assert!(
        said.message.contains("host3") && said.message.contains("\"default\""),
        "{said}"
    );
    let dry = |to: &str| {
        let plan = PlanMigration {
            vm: "vm1".into(),
            to: to.into(),
            ..PlanMigration::default()
        };
        preflight(&c.state, &plan).unwrap()
    };
    let pools = |to: &str| {
        let findings = dry(to).findings;
        let found = findings.into_iter().find(|finding| finding.check == "pools");
        found.unwrap().outcome
    };
    assert!(pools("host2").is_ok() && pools("host3").is_err());
    assert_eq!(dry("").to, "host2", "placement knows it too");
}

#[test]
fn a_failed_vm_is_placed_again_only_where_its_pool_is() {
    let mut c = cluster();
    c.ok(create_with_disks("vm1", &["data"]));
    c.run("vm1", "host1");
    c.ok(report("host1", "vm1", 1, VmState::Failed));
    c.ok(host_down("host1"));
    c.ok(host_down("host2"));
    let spec = c.vm("vm1").spec.clone().unwrap();
    let fault = placement::choose(&c.state, &spec, Purpose::Start).unwrap_err();
    assert!(fault.message.contains("host3 has no pool"), "{fault}");
    c.ok(host_up("host2", "boot-1"));
    assert_eq!(
        placement::choose(&c.state, &spec, Purpose::Start).unwrap(),
        "host2"
    );
}

#[test]
fn a_host_is_told_the_volumes_of_its_vms_and_whether_they_were_used() {
    let mut c = cluster();
    c.ok(create_with_disks("vm1", &["data"]));
    c.ok(place("vm1", "host1", 0));
    let told = |c: &Cluster, host: &str| desired(&c.state, host).vms[0].volumes.clone();
    let first = told(&c, "host1");
    assert_eq!((first[0].name.as_str(), first[0].size_bytes), ("data", 8 * MIB));
    assert!(!first[0].used, "its file may be made");
    c.ok(report("host1", "vm1", 1, VmState::Running));
    assert!(told(&c, "host1")[0].used);
    c.copying("vm1", "host2");
    assert!(told(&c, "host2")[0].used, "a migration's target makes no file");
    c.ok(report("host1", "vm1", 1, VmState::Failed));
    c.ok(start("vm1"));
    c.run("vm1", "host2");
    assert!(told(&c, "host2")[0].used, "nor does the next start");
}

#[test]
fn a_repeated_request_for_a_volume_gets_the_first_answer() {
    let mut c = cluster();
    let first = c.apply_as("r1", create_volume("more", "", MIB)).unwrap();
    assert_eq!(c.apply_as("r1", create_volume("more", "", MIB)).unwrap(), first);
    assert_eq!(
        c.apply_as("r1", create_volume("more", "", 2 * MIB))
            .unwrap_err()
            .code,
        Code::RequestIdReused
    );
}
