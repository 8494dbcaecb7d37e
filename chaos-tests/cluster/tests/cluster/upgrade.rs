//! The VMM is replaced on its own host: the memory stays, nobody runs twice, and an installed VMM that is no good costs nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use drover_chaos_cluster::await_some;
use drover_proto::v1::{VmState, VmmBuild, VmmState};

use super::*;

/// Upgrades one after another.
const IN_A_ROW: usize = 20;

/// Looks at the VMMs while nothing may change.
const LOOKS: usize = 60;

/// The VMM of this build with another build id in it: another program by its own word, which does the same.
fn another_build(program: &Path, mark: u8) -> Vec<u8> {
    let answer = Command::new(program).arg("--version").output().expect("it runs");
    let answer = String::from_utf8(answer.stdout).expect("it answers in words");
    let id = answer.split_whitespace().last().expect("a build id");
    let id: Vec<u8> = (0..id.len() / 2)
        .map(|at| u8::from_str_radix(&id[2 * at..2 * at + 2], 16).expect("hexadecimal"))
        .collect();
    let mut bytes = fs::read(program).expect("it can be read");
    let at = bytes.windows(id.len()).position(|window| window == id);
    bytes[at.expect("the build id stands in the program")] ^= mark;
    bytes
}

/// What the host has installed, by its agent's word.
fn installed(cluster: &Cluster, host: usize) -> Option<VmmBuild> {
    let hosts = cluster.client.hosts().expect("hosts are listed");
    let spec = hosts.into_iter().filter_map(|host| host.spec);
    spec.into_iter()
        .find(|spec| spec.name == host_name(host))
        .and_then(|spec| spec.vmm)
}

/// Installs another VMM and waits until the cluster knows of it.
fn install(cluster: &Cluster, host: usize, program: &[u8]) {
    let before = installed(cluster, host);
    cluster.install_vmm(host, program);
    await_some("the agent to notice another VMM", || {
        match installed(cluster, host) {
            now if now == before => Err(format!("{now:?}")),
            _ => Ok(()),
        }
    });
}

fn upgrade(cluster: &Cluster) -> Migration {
    let planned = cluster.client.upgrade(VM).expect("the upgrade is planned");
    cluster.client.await_end(&planned.id)
}

#[test]
fn a_writing_guest_is_upgraded_moved_and_upgraded_many_times() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, FLAT_OUT);
    let (host, epoch) = cluster.await_runs_exactly_once(VM);
    let first = cluster
        .client
        .vm(VM)
        .expect("it is known")
        .vmm
        .expect("its VMM is known");
    assert_eq!(Some(&first), installed(&cluster, host).as_ref());
    install(&cluster, host, &another_build(&cluster.vmm_program(), 1));
    let due = installed(&cluster, host).expect("it answers");
    assert_ne!(due, first);

    let ended = upgrade(&cluster);
    assert_done(&ended);
    let receipt = ended.receipt.clone().unwrap_or_default();
    assert_eq!((receipt.pages, receipt.zero_pages), (0, 0), "{receipt:?}");
    assert_eq!(cluster.await_runs_exactly_once(VM), (host, epoch + 1));
    assert_eq!(cluster.client.vm(VM).expect("it is known").vmm, Some(due));
    console.await_more(&cluster.client, 2);

    let moving = migrate_on(&cluster, host);
    assert_done(&cluster.client.await_end(&moving.id));
    assert_eq!(cluster.await_runs_exactly_once(VM), (next(host), epoch + 2));
    let (host, epoch) = (next(host), epoch + 2);
    for round in 1..=IN_A_ROW {
        let ended = upgrade(&cluster);
        assert_done(&ended);
        assert_eq!(ended.epoch, epoch + round as u64);
        let blackout = ended.receipt.and_then(|receipt| receipt.blackout_us);
        eprintln!("upgrade {round}: {blackout:?}");
    }
    assert_eq!(
        cluster.await_runs_exactly_once(VM),
        (host, epoch + IN_A_ROW as u64)
    );
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn neither_vmm_of_an_upgrade_runs_before_the_log_decides() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (host, epoch) = cluster.await_runs_exactly_once(VM);
    cluster.hold("controller.before_commit_propose");
    let planned = cluster.client.upgrade(VM).expect("the upgrade is planned");
    cluster.await_reached("controller.before_commit_propose");
    for _ in 0..LOOKS {
        cluster.assert_nobody_runs(VM);
    }
    let states: Vec<_> = cluster
        .vmms(VM)
        .iter()
        .map(|vmm| (vmm.host, vmm.info.epoch, vmm.info.state()))
        .collect();
    assert!(
        states.contains(&(host, epoch, VmmState::HandedOver)),
        "{states:?}"
    );
    assert!(states.contains(&(host, epoch + 1, VmmState::Ready)), "{states:?}");
    cluster
        .client
        .cancel(&planned.id)
        .expect("what is not committed can be cancelled");
    cluster.release("controller.before_commit_propose");
    assert_aborted(&cluster.client.await_end(&planned.id), &["cancelled"]);
    assert_eq!(cluster.await_runs_exactly_once(VM), (host, epoch));
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn an_installed_vmm_that_is_no_good_costs_the_guest_nothing() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (host, epoch) = cluster.await_runs_exactly_once(VM);
    let good = fs::read(cluster.vmm_program()).expect("it can be read");

    // It does not even say which it is: nothing is tried.
    install(&cluster, host, b"#!/bin/sh\nexit 1\n");
    let fault = cluster
        .client
        .upgrade(VM)
        .expect_err("there is nothing to upgrade to");
    assert_eq!(fault.code.as_str(), "vmm_start_failed", "{fault}");

    // It says so and then ends at once, or hangs.
    for (build, rest) in [("0bad", "exit 1"), ("0bae", "exec sleep 1000")] {
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = --version ] && {{ echo drover-vmm 9.9.9 build {build}; exit; }}\n{rest}\n"
        );
        install(&cluster, host, script.as_bytes());
        let ended = upgrade(&cluster);
        assert_aborted(&ended, &["vmm_died", "vmm_start_failed", "target_not_ready"]);
        assert_eq!(cluster.await_vm_runs_as(VM), (host, epoch));
        console.await_more(&cluster.client, 1);
    }

    install(&cluster, host, &good);
    assert_done(&upgrade(&cluster));
    assert_eq!(cluster.await_runs_exactly_once(VM), (host, epoch + 1));
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn a_vm_that_does_not_run_or_is_being_moved_is_not_upgraded() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (host, _) = cluster.await_runs_exactly_once(VM);
    let refused = |code: &str| {
        let fault = cluster.client.upgrade(VM).expect_err("it is refused");
        assert_eq!(fault.code.as_str(), code, "{fault}");
    };
    cluster.hold("source.after_hello");
    let moving = migrate_on(&cluster, host);
    cluster.await_reached("source.after_hello");
    refused("migration_active");
    cluster.release("source.after_hello");
    assert_done(&cluster.client.await_end(&moving.id));
    assert_sound_at_the_end(&cluster, &mut console);
    cluster.client.stop_vm(VM).expect("it is stopped");
    cluster
        .client
        .await_vm(VM, "stopped", |vm| vm.state() == VmState::Stopped);
    refused("vm_state");
    cluster.await_no_vmm(VM);
}
