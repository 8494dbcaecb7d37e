//! What a guest's cloud-init is told: the files of its seed disk, fixed with the run, and shown to nobody who does not ask.

#![allow(clippy::unwrap_used, reason = "a panic is the test's failure")]

mod common;

use common::*;
use drover_proto::Code;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    AttachNic, CloudInit, CloudSeed, CreateVm, DetachNic, MigrationPhase, SnapshotNews, VmNic, VmState,
};
use drover_state::{State, desired, without_secrets};

const SECRET: &str = "#cloud-config\npassword: hunter2\n";
const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ me@home";

fn create_with_cloud(vm: &str, nics: &[&str], change: impl FnOnce(&mut CloudInit)) -> Kind {
    let Kind::CreateVm(mut create) = create_with_nics(vm, nics) else {
        unreachable!()
    };
    let mut cloud = CloudInit {
        user_data: SECRET.into(),
        ..CloudInit::default()
    };
    change(&mut cloud);
    create.spec.as_mut().unwrap().cloud_init = Some(cloud);
    Kind::CreateVm(CreateVm {
        start: true,
        ..create
    })
}

/// "lan" is routed, "net" has no subnet.
fn cluster() -> Cluster {
    let mut c = Cluster::new();
    c.ok(create_network("lan", 0, "10.1.0.0/24"));
    c.ok(create_network("net", 5, ""));
    c
}

fn seed(c: &Cluster, host: &str) -> CloudSeed {
    desired(&c.state, host).vms[0].seed.clone().unwrap()
}

#[test]
fn a_run_has_its_name_keys_and_addresses_and_the_next_start_those_that_are_so_then() {
    let mut c = cluster();
    c.ok(create_with_cloud(
        "vm1",
        &["lan,mac=52:54:00:00:00:01", "net,mac=52:54:00:00:00:02"],
        |cloud| {
            cloud.ssh_keys = vec![KEY.into()];
            cloud.hostname = "web.example.org".into();
        },
    ));
    let created_ms = c.vm("vm1").created_ms;
    c.run("vm1", "host1");
    let first = seed(&c, "host1");
    assert_eq!(first.user_data, SECRET.as_bytes());
    assert_eq!(
        first.meta_data,
        format!(
            "instance-id: \"vm1-{created_ms}\"\nlocal-hostname: \"web.example.org\"\npublic-keys:\n  - \"{KEY}\"\n"
        )
    );
    let expected = r#"version: 2
ethernets:
  nic0:
    match: {macaddress: "52:54:00:00:00:01"}
    mtu: 1500
    addresses: ["10.1.0.2/24"]
    routes: [{to: "0.0.0.0/0", via: "10.1.0.1"}]
  nic1:
    match: {macaddress: "52:54:00:00:00:02"}
    mtu: 1450
    dhcp4: true
    optional: true
"#;
    assert_eq!(first.network_config, expected);
    // Whatever comes and goes, and wherever it moves.
    c.ok(Kind::AttachNic(AttachNic {
        vm: "vm1".into(),
        nic: Some(VmNic {
            network: "lan".into(),
            ..VmNic::default()
        }),
    }));
    c.ok(Kind::DetachNic(DetachNic {
        vm: "vm1".into(),
        nic: "net".into(),
    }));
    assert_eq!(seed(&c, "host1"), first);
    let id = c.copying("vm1", "host2");
    assert_eq!(seed(&c, "host2"), first, "the target's before the commit");
    c.ok(commit(&id, "host2", "vm1", 2));
    assert_eq!(c.phase(&id), MigrationPhase::Committed);
    assert_eq!(seed(&c, "host2"), first);
    c.ok(finish(&id, 1));
    assert_eq!(State::decode(&c.state.encode()).unwrap(), c.state);
    c.ok(stop("vm1"));
    c.ok(report("host2", "vm1", 2, VmState::Stopped));
    c.ok(start("vm1"));
    c.run("vm1", "host1");
    let next = seed(&c, "host1");
    assert_eq!(next.meta_data, first.meta_data, "the same instance");
    assert!(
        next.network_config.contains("10.1.0.3/24"),
        "{}",
        next.network_config
    );
    assert!(!next.network_config.contains("dhcp4"), "{}", next.network_config);
}

#[test]
fn what_is_given_or_left_out_is_so_in_the_files() {
    let mut c = cluster();
    c.ok(create_with_cloud("vm1", &["lan"], |cloud| {
        cloud.network_config = "version: 1\n".into()
    }));
    c.run("vm1", "host1");
    let files = seed(&c, "host1");
    assert_eq!(files.network_config, "version: 1\n");
    assert!(files.meta_data.contains("local-hostname: \"vm1\""));
    assert!(!files.meta_data.contains("public-keys"));
    let mut c = cluster();
    c.ok(create_with_cloud("vm1", &[], |_| {}));
    c.run("vm1", "host1");
    assert_eq!(seed(&c, "host1").network_config, "", "without NICs there is none");
    c.ok(create("vm2"));
    c.run("vm2", "host2");
    assert_eq!(desired(&c.state, "host2").vms[0].seed, None);
}

#[test]
fn secrets_are_in_no_answer_no_event_and_no_words() {
    let mut c = cluster();
    let kind = create_with_cloud("vm1", &["lan"], |_| {});
    assert!(!format!("{kind:?}").contains("hunter2"));
    let first = c.apply_as("r1", kind.clone()).unwrap();
    assert_eq!(c.apply_as("r1", kind).unwrap(), first);
    let has = |bytes: &[u8]| bytes.windows(7).any(|at| at == b"hunter2");
    assert!(!has(&prost::Message::encode_to_vec(&first)));
    let shown = first.vm.unwrap().spec.unwrap().cloud_init.unwrap();
    assert_eq!(shown.user_data_bytes, 32);
    c.run("vm1", "host1");
    let placed = without_secrets(c.vm("vm1"));
    assert!(placed.seed.is_none() && !has(&prost::Message::encode_to_vec(&placed)));
    let answer = c.ok(stop("vm1"));
    assert!(!has(&prost::Message::encode_to_vec(&answer)));
    for event in c.state.events_after(0, 100) {
        assert!(!event.message.contains("hunter2"), "{event:?}");
    }
    // The state has it once: no record of an answer holds another.
    let state = c.state.encode();
    assert_eq!(state.windows(7).filter(|at| *at == b"hunter2").count(), 1);
    let told = desired(&c.state, "host1");
    assert!(!format!("{told:?}").contains("hunter2"));
}

#[test]
fn a_run_that_begins_as_a_snapshot_has_the_files_that_its_guest_has_read() {
    let mut c = cluster();
    c.ok(create_with_cloud("vm1", &["lan"], |_| {}));
    c.run("vm1", "host1");
    let first = seed(&c, "host1");
    let taken = c.ok(take("vm1", "nightly")).snapshot.unwrap();
    let has = |message: &dyn Fn() -> Vec<u8>| message().windows(7).any(|at| at == b"hunter2");
    assert!(!has(&|| prost::Message::encode_to_vec(&taken)) && taken.seed.is_none());
    let told = desired(&c.state, "host1").vms.remove(0).snapshot.unwrap();
    assert!(!has(&|| prost::Message::encode_to_vec(&told)) && told.seed.is_none());
    c.ok(news("host1", "s1", 1, SnapshotNews::Done));
    // The next boot would have other files.
    c.ok(Kind::AttachNic(AttachNic {
        vm: "vm1".into(),
        nic: Some(VmNic {
            network: "net".into(),
            ..VmNic::default()
        }),
    }));
    c.ok(stop("vm1"));
    c.ok(report("host1", "vm1", 1, VmState::Stopped));
    c.ok(restore("vm1", "nightly", ""));
    c.run("vm1", "host2");
    assert_eq!(seed(&c, "host2"), first);
    let told = desired(&c.state, "host2").vms.remove(0).restore.unwrap();
    assert!(!has(&|| prost::Message::encode_to_vec(&told)));
    assert_eq!(State::decode(&c.state.encode()).unwrap(), c.state);
}

#[test]
fn a_seed_disks_slot_is_nobody_elses_and_the_clusters_room_is_bounded() {
    let mut c = cluster();
    c.ok(create_with_cloud("vm1", &["lan"], |_| {}));
    c.run("vm1", "host1");
    for n in 0..24 {
        c.ok(create_volume(&format!("v{n}"), "", 1 << 20));
        c.ok(Kind::AttachDisk(drover_proto::v1::AttachDisk {
            vm: "vm1".into(),
            disk: Some(drover_proto::v1::VmDisk {
                volume: format!("v{n}"),
                ..Default::default()
            }),
        }));
    }
    let spec = c.vm("vm1").spec.clone().unwrap();
    assert!(spec.disks.iter().all(|disk| (1..30).contains(&disk.slot)));
    assert_eq!(
        c.refused(create_with_cloud("vm2", &[], |cloud| cloud.user_data = b"password: x".to_vec())),
        Code::InvalidArgument
    );
}
