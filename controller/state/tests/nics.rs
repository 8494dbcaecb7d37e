//! NICs that are attached and given up: what the specification says at each step, and whose addresses are whose.

#![allow(clippy::unwrap_used, reason = "a panic is the test's failure")]

mod common;

use common::*;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    AttachDisk, AttachNic, DetachDisk, DetachNic, ReportVmRequest, VmDevice, VmDeviceState, VmDevices,
    VmDisk, VmNic, VmState,
};
use drover_proto::{Code, Fault};
use drover_state::{State, desired};

const OTHER: &str = "52:54:00:00:00:09";

/// `network[,mac=…][,ip=…]`, as in `create_with_nics`.
fn attach(vm: &str, nic: &str) -> Kind {
    let Kind::CreateVm(made) = create_with_nics(vm, &[nic]) else {
        unreachable!()
    };
    Kind::AttachNic(AttachNic {
        vm: vm.into(),
        nic: made.spec.unwrap().nics.pop(),
    })
}

fn detach(vm: &str, nic: &str) -> Kind {
    Kind::DetachNic(DetachNic {
        vm: vm.into(),
        nic: nic.into(),
    })
}

fn fault(c: &mut Cluster, kind: Kind) -> Fault {
    let before = c.state.encode();
    let fault = c.apply(kind).unwrap_err();
    assert_eq!(c.state.encode(), before, "a refusal changed the state");
    fault
}

/// vm1 runs on host1 with a disk and a NIC in "lan"; "wide" is there as well, "dmz" offered by nobody.
fn cluster() -> Cluster {
    let mut c = Cluster::new();
    c.ok(create_volume("a", "", 8 << 20));
    c.ok(create_network("lan", 0, "10.1.0.0/29"));
    c.ok(create_network("wide", 6, "10.2.0.0/16"));
    c.ok(create_network("dmz", 0, ""));
    let Kind::CreateVm(mut create) = create_with_nics("vm1", &["lan"]) else {
        unreachable!()
    };
    create.spec.as_mut().unwrap().disks = vec![VmDisk {
        volume: "a".into(),
        ..VmDisk::default()
    }];
    c.ok(Kind::CreateVm(create));
    c.run("vm1", "host1");
    c
}

fn nics(c: &Cluster) -> Vec<VmNic> {
    c.vm("vm1").spec.as_ref().unwrap().nics.clone()
}

fn slots(c: &Cluster) -> Vec<u32> {
    nics(c).iter().map(|nic| nic.slot).collect()
}

/// The VMM of vm1 has something in these slots and was told of `revision`; `tells` of NICs as well.
fn has(c: &Cluster, revision: u64, tells: bool, slots: &[u32]) -> Kind {
    let device = |slot: &u32| VmDevice {
        slot: *slot,
        state: VmDeviceState::Attached.into(),
        ..VmDevice::default()
    };
    Kind::ReportVm(ReportVmRequest {
        host: "host1".into(),
        vm: "vm1".into(),
        epoch: c.epoch("vm1"),
        state: VmState::Running.into(),
        devices: Some(VmDevices {
            devices: slots.iter().map(device).collect(),
            revision,
            tells_nics: tells,
            ..VmDevices::default()
        }),
        ..ReportVmRequest::default()
    })
}

#[test]
fn a_nic_that_is_attached_has_addresses_of_its_own_and_a_slot_and_its_host_is_told_the_network() {
    let mut c = cluster();
    let answer = c.ok(attach("vm1", "wide")).vm.unwrap();
    let got = answer.spec.unwrap().nics.pop().unwrap();
    assert_eq!(
        (got.ip.as_str(), got.slot, got.attach_revision),
        ("10.2.0.2", 3, 1)
    );
    assert_eq!(slots(&c), [2, 3], "what was counted is written down");
    assert_eq!(c.vm("vm1").spec.as_ref().unwrap().disks[0].slot, 1);
    assert_ne!(nics(&c)[0].mac, nics(&c)[1].mac);
    c.ok(attach(
        "vm1",
        &format!("lan,mac={},ip=10.1.0.5", OTHER.to_uppercase()),
    ));
    assert_eq!(
        (nics(&c)[2].mac.as_str(), nics(&c)[2].ip.as_str()),
        (OTHER, "10.1.0.5")
    );
    let wanted = desired(&c.state, "host1");
    let told: Vec<&str> = wanted.vms[0]
        .networks
        .iter()
        .map(|network| network.name.as_str())
        .collect();
    assert_eq!(told, ["lan", "wide", "lan"]);
    assert_eq!(wanted.peers.len(), 1, "of the tunnel that its host is in now");
    assert_eq!(State::decode(&c.state.encode()).unwrap(), c.state);
    // A restart and a migration have them all.
    let id = c.copying("vm1", "host2");
    assert_eq!(
        desired(&c.state, "host2").vms[0].spec.as_ref().unwrap().nics,
        nics(&c)
    );
    c.ok(abort(&id, "host2", Code::LinkLost));
    c.ok(report("host1", "vm1", c.epoch("vm1"), VmState::Stopped));
    assert_eq!(slots(&c), [2, 3, 4]);
    c.ok(detach("vm1", "wide"));
    assert_eq!(slots(&c), [2, 4], "nothing runs: it goes at once");
}

#[test]
fn addresses_are_the_vms_until_its_vmm_was_told_and_has_the_nic_no_more() {
    let mut c = cluster();
    c.ok(attach("vm1", &format!("lan,mac={OTHER},ip=10.1.0.5")));
    c.ok(detach("vm1", OTHER));
    let taken = |c: &mut Cluster| {
        let codes = [format!("lan,mac={OTHER}"), "lan,ip=10.1.0.5".to_owned()]
            .map(|nic| c.refused(create_with_nics("vm2", &[&nic])));
        assert_eq!(codes, [Code::AddressInUse; 2]);
        assert_eq!(c.refused(delete_network("lan")), Code::NetworkInUse);
    };
    taken(&mut c);
    // It lacks the NIC, but what was sent to attach it may still come.
    c.ok(has(&c, 1, true, &[1, 2]));
    taken(&mut c);
    // An agent of a version that says nothing of NICs: whether it is there nobody knows.
    c.ok(has(&c, 2, false, &[1]));
    taken(&mut c);
    c.ok(has(&c, 2, true, &[1, 2, 3]));
    taken(&mut c);
    c.ok(has(&c, 2, true, &[1, 2]));
    assert_eq!(slots(&c), [2]);
    c.ok(create_with_nics(
        "vm2",
        &[&format!("lan,mac={OTHER},ip=10.1.0.5")],
    ));
}

#[test]
fn one_that_is_never_given_up_is_the_vms_until_its_run_ends() {
    let mut c = cluster();
    c.ok(attach("vm1", "wide"));
    c.ok(detach("vm1", "lan"));
    c.ok(has(&c, 2, true, &[1, 2, 3]));
    // A disk's revision that comes after says nothing of the NIC.
    c.ok(Kind::DetachDisk(DetachDisk {
        vm: "vm1".into(),
        volume: "a".into(),
    }));
    c.ok(has(&c, 3, true, &[2, 3]));
    assert_eq!(slots(&c), [2, 3]);
    c.ok(report("host1", "vm1", c.epoch("vm1"), VmState::Failed));
    assert_eq!(slots(&c), [3]);
}

#[test]
fn nics_do_not_change_while_their_vm_is_moved_and_a_wish_goes_along() {
    let mut c = cluster();
    c.ok(attach("vm1", "wide"));
    c.ok(detach("vm1", "wide"));
    let id = c.copying("vm1", "host2");
    for kind in [attach("vm1", "wide"), detach("vm1", "lan")] {
        let fault = fault(&mut c, kind);
        assert_eq!(fault.code, Code::MigrationActive);
        assert!(fault.message.contains(&id), "{fault}");
    }
    c.ok(commit(&id, "host2", "vm1", c.epoch("vm1") + 1));
    assert_eq!(nics(&c)[1].detach_revision, 2, "asked for, not given up");
    c.ok(finish(&id, 1));
    c.ok(attach("vm1", "wide"));
}

#[test]
fn what_cannot_be_attached_or_detached_is_refused_with_what_would_be_right() {
    let mut c = cluster();
    c.ok(create_with_nics(
        "vm2",
        &[&format!("lan,mac={OTHER},ip=10.1.0.5")],
    ));
    c.ok(attach("vm1", "wide"));
    for (kind, code, says) in [
        (attach("vm9", "lan"), Code::VmNotFound, "vm9"),
        (attach("vm1", "nowhere"), Code::NetworkNotFound, "nowhere"),
        (
            attach("vm1", &format!("lan,mac={OTHER}")),
            Code::AddressInUse,
            "vm2",
        ),
        (
            attach("vm1", "lan,ip=10.1.0.5"),
            Code::AddressInUse,
            "another NIC",
        ),
        (
            attach("vm1", "lan,ip=10.9.0.1"),
            Code::InvalidArgument,
            "10.1.0.0/29",
        ),
        (
            attach("vm1", "lan,mac=53:54:00:00:00:01"),
            Code::InvalidArgument,
            "unicast",
        ),
        (
            attach("vm1", "dmz"),
            Code::NetworkUnavailable,
            "vm1 is on host1, which does not offer network dmz",
        ),
        (detach("vm9", "lan"), Code::VmNotFound, "vm9"),
        (
            detach("vm1", "dmz"),
            Code::NicNotFound,
            "no NIC in a network of this name",
        ),
        (detach("vm1", OTHER), Code::NicNotFound, "no NIC with this MAC"),
        (detach("vm1", "1:2:3"), Code::InvalidArgument, "six bytes"),
    ] {
        let fault = fault(&mut c, kind);
        assert_eq!(fault.code, code, "{fault}");
        assert!(fault.message.contains(says), "{fault}");
    }
    let mut stopped = c.clone();
    stopped.ok(report("host1", "vm1", stopped.epoch("vm1"), VmState::Stopped));
    let none = fault(&mut stopped, attach("vm1", "dmz"));
    assert_eq!(none.code, Code::NoHostFits, "{none}");
    c.ok(attach("vm1", "wide"));
    let several = fault(&mut c, detach("vm1", "wide"));
    assert_eq!(several.code, Code::InvalidArgument);
    assert!(several.message.contains(&nics(&c)[1].mac), "{several}");
    c.ok(attach("vm1", "lan"));
    assert_eq!(
        c.refused(attach("vm1", "lan")),
        Code::InvalidArgument,
        "the fifth"
    );
}

#[test]
fn a_repeated_request_attaches_once_and_a_replica_chooses_the_same_addresses() {
    let mut c = cluster();
    let mut replica = c.clone();
    let first = c.apply_as("r1", attach("vm1", "lan")).unwrap();
    assert_eq!(c.apply_as("r1", attach("vm1", "lan")).unwrap(), first);
    assert_eq!(replica.apply_as("r1", attach("vm1", "lan")).unwrap(), first);
    assert_eq!(slots(&c), [2, 3]);
    c.ok(detach("vm1", &nics(&c)[1].mac));
    c.ok(detach("vm1", &nics(&c)[1].mac));
    assert_eq!(nics(&c)[1].detach_revision, 3, "asking again reminds");
    // The addresses of one that has gone are free for the next.
    let (mac, ip) = (nics(&c)[1].mac.clone(), nics(&c)[1].ip.clone());
    c.ok(has(&c, 3, true, &[1, 2]));
    c.ok(attach("vm1", "lan"));
    assert_eq!((nics(&c)[1].mac.clone(), nics(&c)[1].ip.clone()), (mac, ip));
    let disk = VmDisk {
        volume: "a".into(),
        ..VmDisk::default()
    };
    let again = Kind::AttachDisk(AttachDisk {
        vm: "vm1".into(),
        disk: Some(disk),
    });
    assert_eq!(c.refused(again), Code::VolumeInUse);
}

#[test]
fn a_snapshot_and_a_nic_that_comes_or_goes_exclude_each_other() {
    let mut c = cluster();
    c.ok(take("vm1", ""));
    for kind in [attach("vm1", "wide"), detach("vm1", "lan")] {
        assert_eq!(fault(&mut c, kind).code, Code::SnapshotActive);
    }
    c.ok(drop_snapshot("vm1", "s1"));
    c.ok(attach("vm1", "wide"));
    let told = fault(&mut c, take("vm1", ""));
    assert_eq!(told.code, Code::DeviceBusy, "it is about to get a NIC");
    assert!(told.message.contains(&nics(&c)[1].mac), "{told}");
    let Kind::ReportVm(mut report) = has(&c, 1, true, &[1, 2, 3]) else {
        unreachable!()
    };
    let devices = &mut report.devices.as_mut().unwrap().devices;
    devices[2].mac.clone_from(&nics(&c)[1].mac);
    c.ok(Kind::ReportVm(report));
    let taken = c.ok(take("vm1", "")).snapshot.unwrap().spec.unwrap();
    assert_eq!(
        (taken.nics[1].slot, taken.nics[1].attach_revision),
        (3, 0),
        "a run that is restored has it from its beginning"
    );
    c.ok(drop_snapshot("vm1", "s2"));
    c.ok(detach("vm1", "wide"));
    assert_eq!(fault(&mut c, take("vm1", "")).code, Code::DeviceBusy);
}
