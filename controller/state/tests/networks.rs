//! Networks and the NICs of VMs: addresses that are chosen, refused and given back, and the hosts that a VM may come to.

#![allow(clippy::unwrap_used, reason = "a panic is the test's failure")]

mod common;

use common::*;
use drover_proto::v1::command::Kind;
use drover_proto::v1::{MigrationPhase, Network, NetworkKind, PlanMigration, VmNic, VmState};
use drover_proto::{Code, Fault};
use drover_state::placement::{self, Purpose};
use drover_state::preflight::preflight;
use drover_state::{State, desired};

/// Three hosts with VXLAN and the network lan, which host3 lacks.
fn cluster() -> Cluster {
    let mut c = Cluster::new();
    let mut third = host_spec("host3");
    third.networks.clear();
    third.networking = "lan: no interface is named br7".into();
    c.ok(Kind::RegisterHost(third));
    c.ok(create_network("lan", 0, "10.1.0.0/29"));
    c.ok(create_network("wide", 7, ""));
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

fn nics(c: &Cluster, vm: &str) -> Vec<VmNic> {
    c.vm(vm).spec.clone().unwrap().nics
}

fn ip(c: &Cluster, vm: &str) -> String {
    nics(c, vm)[0].ip.clone()
}

#[test]
fn a_network_gets_its_defaults_and_survives_a_snapshot() {
    let mut c = cluster();
    let lan = c.state.network("lan").unwrap();
    assert_eq!(
        (lan.kind(), lan.mtu, lan.gateway.as_str()),
        (NetworkKind::Bridge, 1500, "10.1.0.1")
    );
    let wide = c.state.network("wide").unwrap();
    assert_eq!(
        (wide.kind(), wide.mtu, wide.port),
        (NetworkKind::Vxlan, 1450, 4789)
    );
    assert_eq!(wide.gateway, "");
    c.ok(create_with_nics("vm1", &["lan", "wide"]));
    let shown = c.state.networks_with_users();
    assert_eq!(
        (shown[0].vms.clone(), shown[0].hosts.clone()),
        (vec!["vm1".into()], vec!["host1".into(), "host2".into()])
    );
    assert_eq!(shown[1].hosts.len(), 3);
    assert_eq!(State::decode(&c.state.encode()).unwrap(), c.state);
}

#[test]
fn a_network_out_of_its_form_is_refused_by_field() {
    let mut c = cluster();
    let with = |change: fn(&mut Network)| {
        let Kind::CreateNetwork(mut create) = create_network("n", 0, "10.9.0.0/24") else {
            unreachable!()
        };
        change(create.network.as_mut().unwrap());
        Kind::CreateNetwork(create)
    };
    let invalid = Code::InvalidArgument;
    for (kind, wanted) in [
        (create_network("Lan", 0, ""), (invalid, "network.name")),
        (with(|n| n.kind = 9), (invalid, "network.kind")),
        (with(|n| n.vni = 5), (invalid, "network.vni")),
        (with(|n| n.port = 5), (invalid, "network.port")),
        (with(|n| n.set_kind(NetworkKind::Vxlan)), (invalid, "network.vni")),
        (create_network("n", 1 << 24, ""), (invalid, "network.vni")),
        (with(|n| n.mtu = 100), (invalid, "network.mtu")),
        (with(|n| n.mtu = 9_001), (invalid, "network.mtu")),
        (create_network("n", 0, "10.1.0.1/24"), (invalid, "network.subnet")),
        (
            with(|n| n.gateway = "10.9.0.255".into()),
            (invalid, "network.gateway"),
        ),
        (
            with(|n| n.gateway = "10.8.0.1".into()),
            (invalid, "network.gateway"),
        ),
        (
            with(|n| (n.subnet, n.gateway) = (String::new(), "10.9.0.1".into())),
            (invalid, "network.gateway"),
        ),
        (
            create_network("lan", 0, ""),
            (Code::NetworkExists, "network.name"),
        ),
        (create_network("n", 7, ""), (Code::NetworkExists, "network.vni")),
        (delete_network("n"), (Code::NetworkNotFound, "name")),
    ] {
        let refused = refusal(&mut c, kind);
        assert_eq!((refused.0, refused.1.as_str()), wanted);
    }
    let said = fault(&mut c, create_network("n", 0, "10.1.0.1/24")).message;
    assert!(
        said.contains("\"10.1.0.1/24\"") && said.contains("10.1.0.0/24"),
        "{said}"
    );
}

#[test]
fn a_network_with_a_vm_in_it_stays() {
    let mut c = cluster();
    c.ok(create_with_nics("vm1", &["lan"]));
    c.run("vm1", "host1");
    assert_eq!(
        refusal(&mut c, delete_network("lan")),
        (Code::NetworkInUse, "name".to_owned())
    );
    c.ok(delete("vm1"));
    assert_eq!(
        refusal(&mut c, delete_network("lan")).0,
        Code::NetworkInUse,
        "it is not gone yet"
    );
    c.ok(report("host1", "vm1", 1, VmState::Stopped));
    c.ok(delete_network("lan"));
}

#[test]
fn addresses_are_chosen_unique_and_given_back_with_the_vm() {
    let mut c = cluster();
    for vm in ["vm1", "vm2", "vm3", "vm4"] {
        c.ok(create_with_nics(vm, &["lan"]));
    }
    assert_eq!(
        ["vm1", "vm2", "vm3", "vm4"].map(|vm| ip(&c, vm)),
        ["10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5"]
    );
    c.ok(create_with_nics("vm5", &["lan"]));
    let full = fault(&mut c, create_with_nics("vm6", &["lan"]));
    assert_eq!(
        (full.code, full.field.as_str()),
        (Code::AddressInUse, "spec.nics.network"),
        "{full}"
    );
    c.ok(create_with_nics("vm6", &["wide"]));
    assert_eq!(ip(&c, "vm6"), "", "it has no subnet");
    let mac = nics(&c, "vm3")[0].mac.clone();
    assert!(mac.starts_with("52:54:"), "{mac}");
    c.ok(delete("vm3"));
    c.ok(create_with_nics("vm7", &["lan"]));
    assert_eq!(ip(&c, "vm7"), "10.1.0.4");
    c.ok(delete("vm7"));
    c.ok(create_with_nics("vm3", &["lan"]));
    assert_eq!(nics(&c, "vm3")[0].mac, mac, "the same VM gets the same MAC");
}

#[test]
fn an_address_that_is_asked_for_is_had_or_refused_by_field() {
    let mut c = cluster();
    c.ok(create_with_nics(
        "vm1",
        &["lan,mac=52:54:00:AA:00:01,ip=10.1.0.2", "lan"],
    ));
    assert_eq!(nics(&c, "vm1")[0].mac, "52:54:00:aa:00:01");
    assert_eq!(
        nics(&c, "vm1")[1].ip,
        "10.1.0.3",
        "what was asked for is taken before anything is chosen"
    );
    let (invalid, in_use) = (Code::InvalidArgument, Code::AddressInUse);
    for (nics, wanted) in [
        (&["lan,mac=52:54:00:aa:00:01"][..], (in_use, "spec.nics.mac")),
        (
            &["lan,mac=52:54:00:aa:00:09", "wide,mac=52:54:00:aa:00:09"],
            (in_use, "spec.nics.mac"),
        ),
        (&["lan,mac=01:54:00:aa:00:09"], (invalid, "spec.nics.mac")),
        (&["lan,mac=52:54"], (invalid, "spec.nics.mac")),
        (&["lan,ip=10.1.0.2"], (in_use, "spec.nics.ip")),
        (&["lan,ip=10.1.0.6", "lan,ip=10.1.0.6"], (in_use, "spec.nics.ip")),
        (&["lan,ip=10.1.0.0"], (invalid, "spec.nics.ip")),
        (&["lan,ip=10.1.0.1"], (invalid, "spec.nics.ip")),
        (&["lan,ip=10.1.0.7"], (invalid, "spec.nics.ip")),
        (&["lan,ip=10.2.0.2"], (invalid, "spec.nics.ip")),
        (&["lan,ip=fe80::1"], (invalid, "spec.nics.ip")),
        (&["wide,ip=10.1.0.2"], (invalid, "spec.nics.ip")),
        (&["none"], (Code::NetworkNotFound, "spec.nics.network")),
        (&["../x"], (invalid, "spec.nics.network")),
        (&["wide"; 5], (invalid, "spec.nics")),
    ] {
        let refused = refusal(&mut c, create_with_nics("vm2", nics));
        assert_eq!((refused.0, refused.1.as_str()), wanted, "{nics:?}");
    }
    let said = fault(&mut c, create_with_nics("vm2", &["wide,mac=52:54:00:aa:00:01"])).message;
    assert!(said.contains("vm1"), "{said}");
    c.ok(create_with_nics("vm2", &["wide"; 4]));
}

#[test]
fn a_vm_goes_only_to_hosts_that_offer_its_networks() {
    let mut c = cluster();
    let Kind::CreateVm(mut pinned) = create_with_nics("vm1", &["lan"]) else {
        unreachable!()
    };
    pinned.spec.as_mut().unwrap().host = "host3".into();
    let said = fault(&mut c, Kind::CreateVm(pinned));
    assert_eq!(said.code, Code::NoHostFits);
    assert!(
        said.message
            .contains("host3 does not offer network lan: lan: no interface is named br7"),
        "{said}"
    );
    c.ok(create_with_nics("vm1", &["wide", "lan"]));
    assert_eq!(c.refused(place("vm1", "host3", 0)), Code::NetworkUnavailable);
    c.run("vm1", "host1");
    let said = fault(&mut c, plan("vm1", "host3"));
    assert_eq!(
        (said.code, said.field.as_str()),
        (Code::NoHostFits, "to"),
        "{said}"
    );
    let found = |to: &str| {
        let plan = PlanMigration {
            vm: "vm1".into(),
            to: to.into(),
            ..PlanMigration::default()
        };
        let flight = preflight(&c.state, &plan).unwrap();
        let networks = flight
            .findings
            .into_iter()
            .find(|finding| finding.check == "networks");
        (flight.to, networks.unwrap().outcome.is_ok())
    };
    assert_eq!(found("host3"), ("host3".to_owned(), false));
    assert_eq!(found(""), ("host2".to_owned(), true), "placement knows it too");
    let mut second = host_spec("host2");
    (second.vxlan, second.networking) = (String::new(), "no nft".into());
    c.ok(Kind::RegisterHost(second));
    let spec = c.vm("vm1").spec.clone().unwrap();
    let none = placement::choose(&c.state, &spec, Purpose::Migrate { from: "host1" }).unwrap_err();
    assert!(
        none.message
            .contains("host2 offers no VXLAN, which network wide is: no nft"),
        "{none}"
    );
}

#[test]
fn a_host_says_what_it_offers_in_a_form_that_is_checked() {
    let mut c = cluster();
    let with = |change: fn(&mut drover_proto::v1::HostSpec)| {
        let mut spec = host_spec("host1");
        change(&mut spec);
        Kind::RegisterHost(spec)
    };
    for (kind, field) in [
        (with(|s| s.vxlan = "0.0.0.0".into()), "spec.vxlan"),
        (with(|s| s.vxlan = "host1".into()), "spec.vxlan"),
        (with(|s| s.networks = vec!["../x".into()]), "spec.networks"),
        (with(|s| s.networks = vec!["x".into(); 65]), "spec.networks"),
    ] {
        assert_eq!(refusal(&mut c, kind), (Code::InvalidArgument, field.to_owned()));
    }
    c.ok(with(|s| s.networks = vec!["b".into(), "a".into(), "b".into()]));
    assert_eq!(
        c.state.host("host1").unwrap().spec.as_ref().unwrap().networks,
        ["a", "b"]
    );
}

#[test]
fn a_host_is_told_its_peers_from_the_moment_a_vm_is_to_come_to_them() {
    let mut c = cluster();
    let address = |host: &str| host_spec(host).vxlan;
    let peers = |c: &Cluster, host: &str| {
        let told = desired(&c.state, host).peers;
        told.into_iter()
            .map(|peers| (peers.network, peers.addresses))
            .collect::<Vec<_>>()
    };
    c.ok(create_with_nics("vm1", &["wide", "lan"]));
    c.run("vm1", "host1");
    assert_eq!(peers(&c, "host1"), [("wide".to_owned(), vec![])]);
    assert_eq!(peers(&c, "host2"), []);
    c.ok(create_with_nics("vm2", &["wide"]));
    c.run("vm2", "host3");
    assert_eq!(peers(&c, "host1"), [("wide".to_owned(), vec![address("host3")])]);
    let id = c.ok(plan("vm1", "host2")).migration.unwrap().id;
    assert_eq!(peers(&c, "host3")[0].1, [address("host1")]);
    c.ok(advance(&id, MigrationPhase::Preparing, ""));
    assert_eq!(peers(&c, "host3")[0].1, [address("host1"), address("host2")]);
    assert_eq!(peers(&c, "host2")[0].1, [address("host1"), address("host3")]);
    c.ok(advance(&id, MigrationPhase::PreCopy, "127.0.0.1:9000"));
    c.ok(commit(&id, "host2", "vm1", 2));
    assert_eq!(peers(&c, "host3")[0].1, [address("host2")]);
    c.ok(stop("vm1"));
    c.ok(report("host2", "vm1", 2, VmState::Stopped));
    assert_eq!(peers(&c, "host3")[0].1, Vec::<String>::new());
}

#[test]
fn a_repeated_request_gets_the_first_answer_and_a_replica_the_same_addresses() {
    let mut c = cluster();
    let mut replica = c.clone();
    let first = c
        .apply_as("r1", create_with_nics("vm1", &["lan", "wide"]))
        .unwrap();
    assert_eq!(
        c.apply_as("r1", create_with_nics("vm1", &["lan", "wide"]))
            .unwrap(),
        first
    );
    replica
        .apply_as("r1", create_with_nics("vm1", &["lan", "wide"]))
        .unwrap();
    replica.now_ms = c.now_ms;
    assert_eq!(nics(&c, "vm1"), nics(&replica, "vm1"));
    let first = c.apply_as("r2", create_network("more", 0, "")).unwrap();
    assert_eq!(c.apply_as("r2", create_network("more", 0, "")).unwrap(), first);
}
