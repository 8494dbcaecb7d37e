//! Daemons that end and come back while guests run.

use drover_proto::v1::VmmState;

use super::*;

#[test]
fn an_agent_restarted_under_a_running_vm_finds_it_again() {
    let Some(mut cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (host, epoch) = cluster.await_runs_exactly_once(VM);
    let vmm = cluster.vmms(VM)[0].info.pid;
    for round in 0..3 {
        cluster.kill_agent(host);
        assert_eq!(cluster.vmm_processes(host, VM), 1, "a VMM outlives its agent");
        cluster.start_agent(host);
        console.ping(&cluster.client, &format!("restart-{round}"));
        assert_eq!(cluster.await_runs_exactly_once(VM), (host, epoch));
        assert_eq!(cluster.vmms(VM)[0].info.pid, vmm, "it is the same VMM");
    }
    // Found again, it takes orders again.
    assert_done(&cluster.client.await_end(&migrate_on(&cluster, host).id));
    assert_eq!(cluster.await_runs_exactly_once(VM), (next(host), epoch + 1));
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn losing_the_controllers_freezes_a_guest_and_does_not_kill_it() {
    let Some(mut cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (host, epoch) = cluster.await_runs_exactly_once(VM);
    (0..PARTIES).for_each(|index| cluster.kill_controller(index));
    drover_chaos_cluster::await_some("the guest to freeze", || {
        let seen = cluster.vmms(VM);
        match seen.as_slice() {
            [only] if only.info.state() == VmmState::Frozen => Ok(()),
            _ => Err(format!("{seen:?}")),
        }
    });
    (0..PARTIES).for_each(|index| cluster.start_controller(index));
    // Everything that was acknowledged is still known.
    assert_eq!(cluster.await_runs_exactly_once(VM), (host, epoch));
    console.ping(&cluster.client, "thawed");
    assert_sound_at_the_end(&cluster, &mut console);
}
