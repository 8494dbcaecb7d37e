//! A guest answers by its address wherever its VM is, and what its NIC hangs on is there exactly as long as a VMM is.

use drover_chaos_cluster::{await_some, cluster::host_ip};
use drover_proto::Code;
use drover_proto::v1::{Network, NetworkKind, VmNic, VmSpec};

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
