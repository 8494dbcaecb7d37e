//! A guest answers by its address wherever its VM is, and what its NIC hangs on is there exactly as long as a VMM is.

use drover_chaos_cluster::points::{AFTER_ATTACH, AFTER_TAP};
use drover_chaos_cluster::{await_some, cluster::host_ip};
use drover_proto::Code;
use drover_proto::v1::{
    Network, NetworkKind, RestartPolicy, SnapshotPhase, VmDeviceState, VmNic, VmSpec, VmState,
};

use super::*;

/// What the probe takes its address from; the cluster gives the first that is free.
const ADDRESS: &str = "10.77.0.2";

fn wide() -> Network {
    Network {
        name: "wide".to_owned(),
        kind: NetworkKind::Vxlan.into(),
        vni: 77,
        subnet: "10.77.0.0/24".to_owned(),
        ..Network::default()
    }
}

fn with_nic(name: &str, host: &str) -> VmSpec {
    let nic = VmNic {
        network: "wide".to_owned(),
        ..VmNic::default()
    };
    let parameters = format!("own=16M hot=4M rate=2000 net=echo ip={ADDRESS}");
    VmSpec {
        nics: vec![nic],
        ..probe_spec(name, host, 64, 1, &parameters)
    }
}

/// The agent's own devices of a host, by kind: TAPs, bridges and tunnels.
fn devices(cluster: &Cluster, host: usize) -> (usize, usize, usize) {
    let shown = cluster.at_host(host, "ip", "-o link show");
    let names = shown.lines().filter_map(|line| line.split(": ").nth(1));
    let kinds: Vec<char> = names
        .filter(|name| name.starts_with("dv"))
        .filter_map(|name| name.chars().nth(6))
        .collect();
    let of = |kind| kinds.iter().filter(|other| **other == kind).count();
    (of('t'), of('b'), of('x'))
}

fn await_devices(cluster: &Cluster, host: usize, wanted: (usize, usize, usize)) {
    await_some(
        &format!("{wanted:?} TAPs, bridges and tunnels on host {host}"),
        || match devices(cluster, host) {
            found if found == wanted => Ok(()),
            found => Err(format!("{found:?}")),
        },
    );
}

/// Waits until the guest answers a ping from another host, through the tunnel between them.
fn await_answer(cluster: &Cluster, from: usize) {
    await_some("an answer to a ping", || {
        let to = ADDRESS.parse().expect("it is one");
        if cluster.ping(from, to) {
            Ok(())
        } else {
            Err("none".to_owned())
        }
    });
}

/// Gives a host a tunnel of its own into the network, without its agent, which offers none: what it sends goes to all `peers`.
fn add_pinger(cluster: &Cluster, host: usize, peers: &[usize]) {
    let own = host_ip(host);
    let words = format!("link add pinger type vxlan id 77 dstport 4789 local {own} dev eth0 nolearning");
    cluster.at_host(host, "ip", &words);
    for peer in peers {
        let to = host_ip(*peer);
        cluster.at_host(
            host,
            "bridge",
            &format!("fdb append 00:00:00:00:00:00 dev pinger dst {to}"),
        );
    }
    cluster.at_host(host, "ip", "addr add 10.77.0.9/24 dev pinger");
    cluster.at_host(host, "ip", "link set pinger mtu 1450 up");
}

#[test]
fn a_guest_is_reached_by_its_address_before_and_after_its_vm_moves() {
    let Some(mut cluster) = cluster() else { return };
    let last = PARTIES - 1;
    let fault = cluster
        .client
        .create_vm(&with_nic(VM, ""), true)
        .expect_err("there is no such network");
    assert_eq!(fault.code, Code::NetworkNotFound);
    cluster
        .client
        .create_network(&wide())
        .expect("a network is created");
    let fault = cluster
        .client
        .create_vm(&with_nic(VM, &host_name(last)), true)
        .expect_err("that host offers no network");
    assert_eq!(fault.code, Code::NoHostFits);
    assert!(fault.message.contains("offers no VXLAN"), "{fault}");
    let made = cluster
        .client
        .create_vm(&with_nic(VM, ""), true)
        .expect("the VM is created");
    assert_eq!(made.spec.expect("it has one").nics[0].ip, ADDRESS);
    cluster.client.await_running(VM);
    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    assert_ne!(source, last);
    let target = 1 - source;
    assert_eq!(devices(&cluster, source), (1, 1, 1));
    assert_eq!(devices(&cluster, target), (0, 0, 0));
    // The guest's frames find their way back to whom they came from: a tunnel learns.
    add_pinger(&cluster, last, &[source, target]);
    await_answer(&cluster, last);

    let fault = cluster
        .client
        .migrate(VM, &host_name(last))
        .expect_err("that host offers no network");
    assert_eq!(fault.code, Code::NoHostFits);
    let moved = cluster
        .client
        .migrate(VM, &host_name(target))
        .expect("both hosts offer the network");
    assert_done(&cluster.client.await_end(&moved.id));
    assert_eq!(cluster.await_runs_exactly_once(VM), (target, epoch + 1));
    await_answer(&cluster, last);
    await_devices(&cluster, source, (0, 0, 0));
    assert_eq!(devices(&cluster, target), (1, 1, 1));

    let upgraded = cluster.client.upgrade(VM).expect("an upgrade is planned");
    assert_done(&cluster.client.await_end(&upgraded.id));
    await_answer(&cluster, last);
    await_devices(&cluster, target, (1, 1, 1));

    // The agent is killed, and so is the VMM while nobody watches: the next agent clears up.
    cluster.kill_agent(target);
    assert_eq!(devices(&cluster, target), (1, 1, 1));
    await_answer(&cluster, last);
    assert!(cluster.kill_vmms(target, VM) > 0);
    cluster.start_agent(target);
    await_devices(&cluster, target, (0, 0, 0));
    let rules = || cluster.at_host(target, "nft", "list tables");
    await_some("no rules to be left", || match rules() {
        rules if rules.is_empty() => Ok(()),
        rules => Err(rules),
    });
    cluster.witness.assert_clean();

    assert_eq!(
        cluster
            .client
            .delete_network("wide")
            .expect_err("a VM has it")
            .code,
        Code::NetworkInUse
    );
    cluster.client.delete_vm(VM).expect("the VM is deleted");
    await_some("the network to be free", || {
        cluster
            .client
            .delete_network("wide")
            .map_err(|fault| fault.to_string())
    });
}

/// A VM without a NIC on the first host, whose guest uses one that comes.
fn boot_without_nic(cluster: &Cluster) {
    cluster
        .client
        .create_network(&wide())
        .expect("a network is created");
    let parameters = format!("own=16M hot=4M rate=2000 net=hot-plug ip={ADDRESS}");
    let spec = VmSpec {
        restart: RestartPolicy::OnFailure.into(),
        ..probe_spec(VM, &host_name(0), 64, 1, &parameters)
    };
    cluster.client.create_vm(&spec, true).expect("the VM is created");
    cluster.client.await_running(VM);
    Console::new(VM).await_more(&cluster.client, 1);
}

/// The MACs that the VMM has by its agent's report.
fn reported(vm: &Vm) -> Vec<&str> {
    let devices = vm.devices.iter().flat_map(|devices| &devices.devices);
    let attached = devices.filter(|device| device.state() == VmDeviceState::Attached);
    attached.map(|device| device.mac.as_str()).collect()
}

/// Gives the VM a NIC and waits until its VMM has it; its MAC.
fn attach(cluster: &Cluster) -> String {
    let vm = cluster.client.attach_nic(VM, "wide").expect("the VM runs");
    let nic = vm
        .spec
        .and_then(|spec| spec.nics.last().cloned())
        .expect("it has one");
    assert_eq!(nic.ip, ADDRESS);
    await_attached(cluster, &nic.mac);
    nic.mac
}

fn await_attached(cluster: &Cluster, mac: &str) {
    let what = format!("seen with {mac}");
    cluster.client.await_vm(VM, &what, |vm| reported(vm) == [mac]);
}

fn await_no_nic(cluster: &Cluster) {
    cluster.client.await_vm(VM, "without NICs", |vm| {
        vm.spec.as_ref().is_some_and(|spec| spec.nics.is_empty())
    });
}

#[test]
fn a_nic_that_comes_to_a_running_vm_moves_and_restarts_with_it_until_its_guest_gives_it_up() {
    let Some(mut cluster) = cluster() else { return };
    boot_without_nic(&cluster);
    let last = PARTIES - 1;
    add_pinger(&cluster, last, &[0, 1]);
    assert_eq!(devices(&cluster, 0), (0, 0, 0));
    let mac = attach(&cluster);
    assert_eq!(devices(&cluster, 0), (1, 1, 1));
    await_answer(&cluster, last);

    let fault = cluster
        .client
        .migrate(VM, &host_name(last))
        .expect_err("that host offers no network");
    assert_eq!(fault.code, Code::NoHostFits);
    let moved = cluster
        .client
        .migrate(VM, &host_name(1))
        .expect("both hosts offer the network");
    assert_done(&cluster.client.await_end(&moved.id));
    await_attached(&cluster, &mac);
    await_answer(&cluster, last);
    await_devices(&cluster, 0, (0, 0, 0));
    assert_eq!(devices(&cluster, 1), (1, 1, 1));

    cluster.client.detach_nic(VM, "wide").expect("it has one");
    await_no_nic(&cluster);
    await_devices(&cluster, 1, (0, 0, 0));
    let mut console = Console::new(VM);
    console.await_more(&cluster.client, 1);
    let gone = console
        .lines
        .iter()
        .filter(|line| line.contains("probe nic gone"));
    assert_eq!(gone.count(), 1);

    let mac = attach(&cluster);
    await_answer(&cluster, last);
    let (host, epoch) = cluster.await_runs_exactly_once(VM);
    assert_eq!(cluster.kill_vmms_for(host, VM, epoch), 1);
    cluster.client.await_vm(VM, "running again", |vm| {
        vm.state() == VmState::Running && vm.placement.as_ref().is_some_and(|at| at.epoch == epoch + 1)
    });
    await_attached(&cluster, &mac);
    await_answer(&cluster, last);
    assert_sound_at_the_end(&cluster, &mut Console::new(VM));
}

#[test]
fn an_agent_that_dies_while_a_nic_comes_or_goes_leaves_one_tap_or_none() {
    let Some(mut cluster) = cluster() else { return };
    boot_without_nic(&cluster);
    // The TAP is there, and the VMM was not told: the next agent tells it.
    cluster.hold(AFTER_TAP);
    let vm = cluster.client.attach_nic(VM, "wide").expect("the VM runs");
    let mac = vm.spec.expect("it has one").nics[0].mac.clone();
    cluster.await_reached(AFTER_TAP);
    assert_eq!(devices(&cluster, 0), (1, 1, 1));
    cluster.kill_agent(0);
    cluster.release(AFTER_TAP);
    cluster.hold(AFTER_ATTACH);
    cluster.start_agent(0);
    // The VMM has it, and no controller was told.
    cluster.await_reached(AFTER_ATTACH);
    cluster
        .client
        .await_vm(VM, "not seen with it", |vm| reported(vm).is_empty());
    cluster.kill_agent(0);
    cluster.release(AFTER_ATTACH);
    cluster.start_agent(0);
    await_attached(&cluster, &mac);
    assert_eq!(devices(&cluster, 0), (1, 1, 1));
    let last = PARTIES - 1;
    add_pinger(&cluster, last, &[0, 1]);
    await_answer(&cluster, last);
    // The guest gives it up while no agent watches.
    let fault = cluster
        .client
        .detach_nic(VM, "none")
        .expect_err("it has none there");
    assert_eq!(fault.code, Code::NicNotFound);
    cluster.kill_agent(0);
    cluster.client.detach_nic(VM, &mac).expect("it has it");
    assert_eq!(devices(&cluster, 0), (1, 1, 1));
    cluster.start_agent(0);
    await_no_nic(&cluster);
    await_devices(&cluster, 0, (0, 0, 0));
    assert_sound_at_the_end(&cluster, &mut Console::new(VM));
}

#[test]
fn a_clone_has_a_nic_of_its_own_and_the_one_that_its_guest_remembers_leads_nowhere() {
    const CLONE: &str = "vm2";
    let Some(cluster) = cluster() else { return };
    let last = PARTIES - 1;
    cluster
        .client
        .create_network(&wide())
        .expect("a network is created");
    // Its guest never gives a NIC up.
    cluster
        .client
        .create_vm(&with_nic(VM, &host_name(0)), true)
        .expect("the VM is created");
    cluster.client.await_running(VM);
    add_pinger(&cluster, last, &[0, 1]);
    await_answer(&cluster, last);
    cluster.client.create_snapshot(VM, "now").expect("it runs");
    let taken = cluster.client.await_snapshot(VM, "now");
    assert_eq!(taken.phase(), SnapshotPhase::Ready, "{taken:?}");
    let fault = cluster
        .client
        .restore_vm(VM, "now", CLONE)
        .expect_err("its addresses are another's");
    assert_eq!(fault.code, Code::AddressInUse);
    let made = cluster.client.clone_vm(VM, "now", CLONE).expect("it gets others");
    let nics = made.spec.expect("it has one").nics;
    let [remembered, own] = nics.as_slice() else {
        panic!("{nics:?}");
    };
    assert!(remembered.unplugged && !own.unplugged && remembered.mac != own.mac);
    assert_eq!((remembered.ip.as_str(), own.ip.as_str()), ("", "10.77.0.3"));
    cluster.client.await_running(CLONE);
    // The one is asked for in vain, the other attached.
    let has_both = |vm: &Vm| {
        let devices = vm.devices.iter().flat_map(|devices| &devices.devices);
        let macs: Vec<&str> = devices.map(|device| device.mac.as_str()).collect();
        macs == [remembered.mac.as_str(), own.mac.as_str()] && reported(vm) == [own.mac.as_str()]
    };
    cluster.client.await_vm(CLONE, "seen with both NICs", has_both);
    await_answer(&cluster, last);

    let (source, _) = cluster.await_runs_exactly_once(CLONE);
    let moved = cluster
        .client
        .migrate(CLONE, &host_name(1 - source))
        .expect("both hosts offer the network");
    assert_done(&cluster.client.await_end(&moved.id));
    cluster.client.await_vm(CLONE, "seen with both NICs", has_both);
    await_answer(&cluster, last);
    // Both guests answer to the address; only the first one was heard.
    for vm in [VM, CLONE] {
        cluster.client.stop_vm(vm).expect("it runs");
        cluster
            .client
            .await_vm(vm, "stopped", |vm| vm.state() == VmState::Stopped);
        assert!(!cluster.ping(last, ADDRESS.parse().expect("it is one")), "{vm}");
    }
    let started = cluster.client.start_vm(CLONE).expect("it is stopped");
    assert_eq!(started.spec.expect("it has one").nics, std::slice::from_ref(own));
    cluster.client.await_running(CLONE);
    cluster.client.await_vm(CLONE, "seen with its own NIC", |vm| {
        reported(vm) == [own.mac.as_str()]
    });
    cluster.witness.assert_clean();
}
