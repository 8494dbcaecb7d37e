//! Create, start, stop, delete, and guests that end by themselves.

use drover_proto::Code;
use drover_proto::v1::VmState;

use super::*;

#[test]
fn a_vm_is_started_stopped_and_deleted_and_its_epoch_rises_with_each_start() {
    let Some(cluster) = cluster() else { return };
    let client = &cluster.client;
    boot(&cluster, 1, STEADY);
    let (_, first) = cluster.await_runs_exactly_once(VM);
    client.stop_vm(VM).expect("a running VM can be stopped");
    client.await_vm(VM, "stopped", |vm| vm.state() == VmState::Stopped);
    cluster.await_no_vmm(VM);
    let mut console = boot_again(&cluster);
    let (_, second) = cluster.await_runs_exactly_once(VM);
    assert_eq!(second, first + 1);
    console.await_more(client, 1);
    client.delete_vm(VM).expect("a running VM can be deleted");
    cluster.await_no_vmm(VM);
    drover_chaos_cluster::await_some("the VM to be forgotten", || match client.vm(VM) {
        Err(fault) if fault.code == Code::VmNotFound => Ok(()),
        other => Err(format!("{other:?}")),
    });
    cluster.witness.assert_clean();
}

#[test]
fn a_guest_that_triple_faults_is_a_failed_vm_with_its_reason() {
    let Some(cluster) = cluster() else { return };
    let spec = probe_spec(
        VM,
        "",
        64,
        1,
        "own=16M hot=4M rate=1000 fault=triple fault_after=1",
    );
    cluster.client.create_vm(&spec, true).expect("the VM is created");
    let vm = cluster
        .client
        .await_vm(VM, "failed", |vm| vm.state() == VmState::Failed);
    assert_eq!(reason_of(&vm), "guest_triple_fault", "{vm:?}");
    cluster.await_no_vmm(VM);
    cluster.witness.assert_clean();
}
