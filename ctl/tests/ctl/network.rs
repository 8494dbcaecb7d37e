//! `ctl network` and the NICs of `ctl vm`.

use drover_proto::v1;
use serde_json::json;

use crate::fake::Fake;

fn network(name: &str, vms: &[&str]) -> v1::Network {
    v1::Network {
        name: name.to_owned(),
        kind: v1::NetworkKind::Bridge.into(),
        subnet: "10.1.0.0/24".to_owned(),
        gateway: "10.1.0.1".to_owned(),
        mtu: 1500,
        vms: vms.iter().map(|vm| (*vm).to_owned()).collect(),
        hosts: vec!["host1".to_owned(), "host2".to_owned()],
        ..Default::default()
    }
}

#[test]
fn a_network_is_created_with_what_was_said_of_it_and_one_request_id() {
    let fake = Fake::start();
    fake.state().lose_answers = 1;
    let ended = fake.run("network create wide --vxlan 7 --mtu 1400 --subnet 10.2.0.0/16 --allow-spoofing");
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(0), "wide is created: vxlan 7, 10.2.0.0/16, MTU 1400\n"),
        "{ended:?}"
    );
    assert_eq!(fake.run("network create lan").code, Some(0));
    let state = fake.state();
    let (wide, lan) = (&state.networks[0], state.networks.last().unwrap());
    assert_eq!(
        (wide.kind(), wide.vni, wide.allow_spoofing),
        (v1::NetworkKind::Vxlan, 7, true)
    );
    assert_eq!(
        (lan.kind(), lan.mtu, lan.subnet.as_str()),
        (v1::NetworkKind::Bridge, 0, "")
    );
    let ids: Vec<_> = state.calls.iter().map(|(_, id)| id).collect();
    assert!(ids.len() == 3 && ids[0] == ids[1] && ids[1] != ids[2], "{ids:?}");
}

#[test]
fn networks_are_listed_and_shown_with_their_vms_and_hosts() {
    let fake = Fake::start();
    fake.state().networks = vec![network("lan", &["vm1", "vm2"]), network("other", &[])];
    assert_eq!(fake.run("network list -q").stdout, "lan\nother\n");
    let shown = fake.run("network show lan");
    for part in ["vm1, vm2", "host1, host2", "10.1.0.1", "their own only"] {
        assert!(shown.stdout.contains(part), "{part}: {shown:?}");
    }
    let json = fake.run("network show lan -o json").json();
    assert_eq!(
        (&json["kind"], &json["vni"], &json["vms"]),
        (&json!("bridge"), &json!(null), &json!(["vm1", "vm2"]))
    );
    let ended = fake.run("network show none");
    assert!(
        ended.code == Some(3) && ended.stderr.contains("network_not_found"),
        "{ended:?}"
    );
}

#[test]
fn deleting_a_network_in_use_has_the_exit_code_of_a_refusal() {
    let fake = Fake::start();
    fake.state().networks = vec![network("lan", &["vm1"]), network("other", &[])];
    let ended = fake.run("network delete lan -o json");
    assert!(
        ended.code == Some(4) && ended.stderr.contains("network_in_use"),
        "{ended:?}"
    );
    assert_eq!(fake.run("network delete none").code, Some(3));
    assert_eq!(fake.run("network delete other").stdout, "other is deleted\n");
}

#[test]
fn a_vm_is_created_with_its_nics_and_shows_them() {
    let fake = Fake::start();
    let ended =
        fake.run("vm create vm1 --image probe --nic lan:mac=52:54:00:00:00:01,ip=10.1.0.7 --nic wide");
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let shown = fake.run("vm show vm1");
    assert!(
        shown.stdout.contains("lan 52:54:00:00:00:01 10.1.0.7"),
        "{shown:?}"
    );
    let json = fake.run("vm show vm1 -o json").json();
    assert_eq!(
        json["spec"]["nics"],
        json!([
            {"network": "lan", "mac": "52:54:00:00:00:01", "ip": "10.1.0.7", "unplugged": false},
            {"network": "wide", "mac": null, "ip": null, "unplugged": false},
        ])
    );
}

#[test]
fn a_nic_comes_with_the_addresses_that_were_chosen_and_goes_by_its_network_or_mac() {
    let fake = Fake::start();
    assert_eq!(fake.run("vm create vm1 --image probe").code, Some(0));
    let ended = fake.run("vm attach-nic vm1 lan");
    assert_eq!(
        ended.stdout, "vm1 has the NIC lan 52:54:00:00:00:01 10.1.0.2\n",
        "{ended:?}"
    );
    let unknown = fake.run("vm detach-nic vm1 wide");
    assert!(
        unknown.code == Some(3) && unknown.stderr.contains("nic_not_found"),
        "{unknown:?}"
    );
    let ended = fake.run("vm detach-nic vm1 52:54:00:00:00:01");
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(fake.run("vm attach-nic vm1 lan:speed=9").code, Some(2));
    assert_eq!(fake.run("vm attach-nic vm9 lan").code, Some(3));
}
