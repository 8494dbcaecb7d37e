//! From the start of a VM to its end.

use std::os::unix::fs::PermissionsExt;

use drover_proto::Code;
use drover_proto::v1::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::fake_fleet::{Call, LEASE_MS};
use crate::world::{World, kill_9, lives, run, until_ended};

fn started(script: &mut crate::fake_fleet::Script) {
    script.desired = run(1, None);
    script.grants = vec![("vm1".into(), 1)];
}

fn stopping() -> HostDesired {
    HostDesired {
        stopping: vec![VmRef {
            vm: "vm1".into(),
            epoch: 1,
        }],
        ..HostDesired::default()
    }
}

pub async fn a_vm_is_started_granted_and_reported_running() {
    let world = World::new().await;
    // The heartbeat that brings the grant may be on its way already.
    let before_ns = drover_node_agent::clock::boottime_ns();
    let _agent = world.agent().await;
    world.fleet.say(started);
    let info = world.until_state("e1-start", VmmState::Running).await;
    let lease_ns = LEASE_MS * 1_000_000;
    let now_ns = drover_node_agent::clock::boottime_ns();
    assert!(
        (before_ns + lease_ns..=now_ns + lease_ns).contains(&info.deadline_boottime_ns),
        "not from the time of sending"
    );
    let report = world.fleet.until_vm(VmState::Running, 1).await;
    assert_eq!((report.host.as_str(), report.vm.as_str()), ("host1", "vm1"));
    let mode = |name| {
        world
            .folder("e1-start")
            .join(name)
            .metadata()
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    assert_eq!((mode("config.json"), mode(".")), (0o600, 0o700));
    assert_eq!(
        std::fs::read_to_string(world.folder("highest_epoch"))
            .unwrap()
            .trim(),
        "1"
    );
    // It is in a session of its own, so that no signal to the agent's terminal reaches it.
    let pid = Pid::from_raw(i32::try_from(info.pid).unwrap());
    assert_eq!(nix::unistd::getsid(Some(pid)).unwrap(), pid);
    // The lease is renewed on and on.
    world
        .until_vmm("e1-start", "granted again", |now| {
            now.deadline_boottime_ns > info.deadline_boottime_ns
        })
        .await;
}

pub async fn a_vm_runs_on_while_its_agent_is_restarted() {
    let world = World::new().await;
    let agent = world.agent().await;
    world.fleet.say(started);
    let before = world.until_state("e1-start", VmmState::Running).await;
    world.fleet.until_vm(VmState::Running, 1).await;
    drop(agent);
    assert!(lives(&before));
    let _agent = world.agent().await;
    let granted = |info: &VmmInfo| info.deadline_boottime_ns > before.deadline_boottime_ns;
    let after = world
        .until_vmm("e1-start", "granted by the second agent", granted)
        .await;
    assert_eq!(after.pid, before.pid);
    assert_eq!(after.state(), VmmState::Running);
}

pub async fn a_vmm_that_was_killed_is_reported_failed_and_its_epoch_is_never_started_again() {
    let world = World::new().await;
    let agent = world.agent().await;
    world.fleet.say(started);
    kill_9(&world.until_state("e1-start", VmmState::Running).await);
    let report = world.fleet.until_vm(VmState::Failed, 1).await;
    let reason = report.reason.unwrap();
    assert_eq!(reason.code, Code::VmmDied.as_str());
    assert!(reason.message.contains("SIGKILL"), "{}", reason.message);
    world.fleet.say(|script| script.desired = HostDesired::default());
    world.until_file("e1-start", "over").await;
    // An older desired state turns up, under this agent and under the next.
    world.fleet.forget_calls();
    world.fleet.say(started);
    world.fleet.until_vm(VmState::Failed, 1).await;
    drop(agent);
    world.fleet.forget_calls();
    let _agent = world.agent().await;
    world.fleet.until_vm(VmState::Failed, 1).await;
    assert!(!world.folder("e1-start").join("vmm.sock").exists());
}

pub async fn a_vmm_that_was_killed_while_no_agent_watched_is_reported_failed() {
    let world = World::new().await;
    let agent = world.agent().await;
    world.fleet.say(started);
    let info = world.until_state("e1-start", VmmState::Running).await;
    drop(agent);
    kill_9(&info);
    let _agent = world.agent().await;
    let reason = world.fleet.until_vm(VmState::Failed, 1).await.reason.unwrap();
    assert_eq!(reason.code, Code::VmmDied.as_str());
}

pub async fn a_vm_that_is_stopped_is_destroyed_and_reported_stopped() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(started);
    let info = world.until_state("e1-start", VmmState::Running).await;
    world
        .fleet
        .say(|script| (script.desired, script.grants) = (stopping(), vec![]));
    world.fleet.until_vm(VmState::Stopped, 1).await;
    until_ended(&info).await;
    world.fleet.say(|script| script.desired = HostDesired::default());
    world.until_file("e1-start", "over").await;
    assert!(
        !world
            .fleet
            .calls()
            .iter()
            .any(|call| matches!(call, Call::Vm(vm) if vm.state() == VmState::Failed))
    );
}

pub async fn a_vm_that_was_stopped_before_its_host_heard_of_it_is_reported_stopped() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(|script| script.desired = stopping());
    world.fleet.until_vm(VmState::Stopped, 1).await;
    // Should the start turn up after all, it is refused.
    world.fleet.say(started);
    world.fleet.until_vm(VmState::Failed, 1).await;
    assert!(!world.folder("e1-start").exists());
}

pub async fn a_guest_that_fails_is_reported_with_its_reason_and_then_destroyed() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(started);
    let info = world.until_state("e1-start", VmmState::Running).await;
    world.happen("e1-start", "fail").await;
    let reason = world.fleet.until_vm(VmState::Failed, 1).await.reason.unwrap();
    assert_eq!(reason.code, Code::GuestTripleFault.as_str());
    world.fleet.say(|script| script.desired = HostDesired::default());
    world.until_file("e1-start", "over").await;
    until_ended(&info).await;
}

pub async fn a_guest_that_shuts_itself_down_is_reported_stopped() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(started);
    world.until_state("e1-start", VmmState::Running).await;
    world.happen("e1-start", "exit").await;
    let reason = world.fleet.until_vm(VmState::Stopped, 1).await.reason.unwrap();
    assert!(reason.message.contains("shut itself down"), "{}", reason.message);
}

pub async fn a_vmm_that_cannot_start_is_reported_with_the_error_in_its_log() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(|script| {
        started(script);
        script.desired.vms[0].spec.as_mut().unwrap().cmdline = "die".into();
    });
    let reason = world.fleet.until_vm(VmState::Failed, 1).await.reason.unwrap();
    assert_eq!(reason.code, Code::VmmDied.as_str());
    assert!(reason.message.contains("exit status: 6"), "{}", reason.message);
    assert!(
        reason.message.contains("ERROR fake: the kernel is none"),
        "{}",
        reason.message
    );
}

pub async fn a_missing_image_fails_the_vm_and_names_it() {
    let world = World::new().await;
    let _agent = world.agent().await;
    for (epoch, kernel) in [(1, "absent"), (2, "../kernel")] {
        world.fleet.say(|script| {
            script.desired = run(epoch, None);
            script.desired.vms[0].spec.as_mut().unwrap().kernel = kernel.into();
        });
        let reason = world.fleet.until_vm(VmState::Failed, epoch).await.reason.unwrap();
        assert_eq!(reason.code, Code::ImageNotFound.as_str());
        assert!(reason.message.contains(kernel), "{}", reason.message);
    }
}

pub async fn silence_destroys_nothing_and_neither_does_an_unconfirmed_absence() {
    let world = World::new().await;
    let agent = world.agent().await;
    world.fleet.say(started);
    let info = world.until_state("e1-start", VmmState::Running).await;
    // No controller knows a leader, the agent is restarted meanwhile.
    world.fleet.say(|script| script.mute = true);
    drop(agent);
    let _agent = world.agent().await;
    // A controller that was cut off shows an older state; the leader, who answers heartbeats, does not.
    world.fleet.say(|script| {
        let revision = script.desired.revision;
        script.mute = false;
        script.desired = HostDesired::default();
        script.confirmed_revision = revision;
    });
    world.fleet.until_heartbeats(20).await;
    let granted = |now: &VmmInfo| now.deadline_boottime_ns > info.deadline_boottime_ns;
    let now = world.until_vmm("e1-start", "granted", granted).await;
    assert_eq!((now.state(), now.pid), (VmmState::Running, info.pid));
    // The leader shows it too.
    world.fleet.say(|script| script.confirmed_revision = 0);
    world.until_file("e1-start", "over").await;
    until_ended(&info).await;
}

pub async fn a_vmm_that_hangs_is_killed_when_it_is_to_end() {
    let world = World::new().await;
    let _agent = world.agent().await;
    world.fleet.say(started);
    let info = world.until_state("e1-start", VmmState::Running).await;
    kill(Pid::from_raw(i32::try_from(info.pid).unwrap()), Signal::SIGSTOP).unwrap();
    world
        .fleet
        .say(|script| (script.desired, script.grants) = (stopping(), vec![]));
    world.fleet.until_vm(VmState::Stopped, 1).await;
    until_ended(&info).await;
}

pub async fn a_vmm_that_ignores_its_end_is_killed_also_by_the_next_agent() {
    let world = World::new().await;
    let agent = world.agent().await;
    world.fleet.say(|script| {
        started(script);
        script.desired.vms[0].spec.as_mut().unwrap().cmdline = "deaf".into();
    });
    let info = world.until_state("e1-start", VmmState::Running).await;
    drop(agent);
    world
        .fleet
        .say(|script| (script.desired, script.grants) = (stopping(), vec![]));
    let _agent = world.agent().await;
    world.fleet.until_vm(VmState::Stopped, 1).await;
    until_ended(&info).await;
}
