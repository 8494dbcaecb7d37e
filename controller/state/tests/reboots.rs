//! A host's reboots: what they end, and that news from before one comes too late to be another.

#![allow(clippy::unwrap_used, reason = "a panic is the test's failure")]

mod common;

use common::*;
use drover_proto::Code;
use drover_proto::v1::VmState;
use drover_proto::v1::command::Kind;
use drover_state::State;
use drover_state::limits::EARLIER_BOOTS_MAX;

fn registered(boot_id: &str) -> Kind {
    let mut spec = host_spec("host1");
    spec.boot_id = boot_id.into();
    Kind::RegisterHost(spec)
}

/// Where a boot is named: in a heartbeat or in a registration.
const NEWS: [fn(&str) -> Kind; 2] = [|boot_id| host_up("host1", boot_id), registered];

#[test]
fn news_from_before_a_reboot_is_refused_and_ends_nothing() {
    for reboots in NEWS {
        for late in NEWS {
            let mut c = Cluster::running();
            c.ok(reboots("boot-2"));
            c.ok(start("vm1"));
            c.run("vm1", "host1");
            let fault = c.apply(late("boot-1")).unwrap_err();
            assert_eq!(fault.code, Code::InvalidArgument);
            assert!(fault.field.ends_with("boot_id"), "{}", fault.field);
            assert!(fault.message.contains("boot-1"), "{}", fault.message);
            assert_eq!(c.refused(late("boot-1")), Code::InvalidArgument);
            assert_eq!(c.vm("vm1").state(), VmState::Running);
            assert_eq!(c.granted("host1"), ["vm1@2"]);
            c.ok(late("boot-2"));
            assert_eq!(c.vm("vm1").state(), VmState::Running);
        }
    }
}

#[test]
fn a_host_that_is_down_is_not_raised_by_news_from_before_its_reboot() {
    let mut c = Cluster::running();
    c.ok(host_up("host1", "boot-2"));
    c.ok(host_down("host1"));
    assert_eq!(c.refused(host_up("host1", "boot-1")), Code::InvalidArgument);
    assert!(!c.state.host_is_up("host1"));
    c.ok(host_up("host1", "boot-2"));
    assert!(c.state.host_is_up("host1"));
}

#[test]
fn only_the_last_boots_are_kept_and_a_snapshot_holds_them() {
    let mut c = Cluster::new();
    for boot in 2..=EARLIER_BOOTS_MAX + 3 {
        c.ok(host_up("host1", &format!("boot-{boot}")));
    }
    let mut c = Cluster {
        state: State::decode(&c.state.encode()).unwrap(),
        ..c
    };
    let kept = &c.state.host("host1").unwrap().earlier_boot_ids;
    assert_eq!((kept.len(), kept[0].as_str()), (EARLIER_BOOTS_MAX, "boot-3"));
    assert_eq!(c.refused(host_up("host1", "boot-3")), Code::InvalidArgument);
}

#[test]
fn a_boot_id_without_bound_is_refused() {
    let mut c = Cluster::new();
    assert_eq!(
        c.refused(host_up("host1", &"b".repeat(2_000))),
        Code::InvalidArgument
    );
}
