//! `kill -9` of each party at each pause point. What may come of it is the table in ARCHITECTURE §3 (`verdicts`).
//!
//! Killed daemons are started again, as systemd would do it; VMMs are not.

use drover_chaos_cluster::points;
use drover_chaos_cluster::verdicts::{Ending, Victim, is_there, of_kill};
use drover_proto::v1::VmState;

use super::*;

/// What came of it.
fn ending(cluster: &Cluster, migration: &Migration) -> Ending {
    let vm = cluster.client.await_vm(VM, "running or failed", |vm| {
        matches!(vm.state(), VmState::Running | VmState::Failed)
    });
    match (migration.phase(), vm.state()) {
        (MigrationPhase::Done, VmState::Running) => Ending::Moved,
        (MigrationPhase::Done, _) => Ending::LostWithTarget,
        (_, VmState::Running) => Ending::Stayed,
        _ => Ending::LostWithSource,
    }
}

struct Killing {
    cluster: Cluster,
    console: Console,
    victim: Victim,
    /// What is disturbed is an upgrade: source and target are two VMMs of one host, with one agent.
    upgrades: bool,
}

impl Killing {
    /// One kill at one point, and everything that must be true after it.
    fn at(&mut self, point: &str) {
        let victim = self.victim;
        eprintln!("kill {victim:?} at {point}");
        let (source, epoch) = self.cluster.await_runs_exactly_once(VM);
        let target = if self.upgrades { source } else { next(source) };
        self.cluster.hold(point);
        let planned = if self.upgrades {
            self.cluster.client.upgrade(VM).expect("the upgrade is planned")
        } else {
            migrate_on(&self.cluster, source)
        };
        self.cluster.await_reached(point);
        self.kill((source, epoch), target, point);

        let ended = self.cluster.client.await_end(&planned.id);
        let ending = self.settle(&ended, point);
        let allowed = of_kill(victim, point);
        assert!(
            allowed.contains(&ending),
            "{victim:?} killed at {point}: {ending:?}, want {allowed:?}: {ended:?}"
        );
        match ending {
            Ending::Stayed => self.assert_runs(source, epoch, point),
            Ending::Moved => self.assert_runs(target, epoch + 1, point),
            Ending::LostWithSource | Ending::LostWithTarget => {
                let vm = self.cluster.client.vm(VM).expect("a failed VM is known");
                assert_eq!(reason_of(&vm), "vmm_died", "{victim:?} killed at {point}: {vm:?}");
                self.cluster.await_no_vmm(VM);
                self.console = boot_again(&self.cluster);
            }
        }
        self.cluster.witness.assert_clean();
    }

    fn kill(&mut self, (source, epoch): (usize, u64), target: usize, point: &str) {
        match self.victim {
            Victim::Leader => {
                // Started again once the others have dealt with it.
                let leader = self.cluster.leader();
                self.cluster.kill_controller(leader);
                self.cluster.release(point);
                let moved_on = self.cluster.leader();
                assert_ne!(moved_on, leader, "a dead controller cannot lead");
                self.cluster.start_controller(leader);
            }
            Victim::SourceVmm => {
                assert_eq!(
                    self.cluster.kill_vmms_for(source, VM, epoch),
                    1,
                    "there is one source VMM at {point}"
                );
                self.cluster.release(point);
            }
            Victim::TargetVmm => {
                assert_eq!(
                    self.cluster.kill_vmms_for(target, VM, epoch + 1),
                    1,
                    "there is one target VMM at {point}"
                );
                self.cluster.release(point);
            }
            Victim::SourceAgent => self.restart_agent(source, point),
            Victim::TargetAgent => self.restart_agent(target, point),
        }
    }

    fn restart_agent(&mut self, host: usize, point: &str) {
        self.cluster.kill_agent(host);
        self.cluster.start_agent(host);
        self.cluster.release(point);
    }

    fn settle(&self, ended: &Migration, point: &str) -> Ending {
        // A target that was lost after the commit is reported by its agent, which takes a moment more.
        if self.victim == Victim::TargetVmm && ended.phase() == MigrationPhase::Done {
            self.cluster
                .client
                .await_vm(VM, &format!("failed after {point}"), |vm| {
                    vm.state() == VmState::Failed
                });
        }
        if self.victim == Victim::SourceVmm && ended.phase() == MigrationPhase::Aborted {
            self.cluster
                .client
                .await_vm(VM, &format!("failed after {point}"), |vm| {
                    vm.state() == VmState::Failed
                });
        }
        ending(&self.cluster, ended)
    }

    fn assert_runs(&mut self, host: usize, epoch: u64, point: &str) {
        assert_eq!(
            self.cluster.await_runs_exactly_once(VM),
            (host, epoch),
            "{:?} killed at {point}",
            self.victim
        );
        self.console.ping(&self.cluster.client, &format!("after-{point}"));
    }
}

fn kill_at_each_point(victim: Victim) {
    kill_at_each_point_of(false, victim);
}

fn kill_at_each_point_of(upgrades: bool, victim: Victim) {
    let Some(cluster) = cluster() else { return };
    let console = boot(&cluster, 1, STEADY);
    let mut killing = Killing {
        cluster,
        console,
        victim,
        upgrades,
    };
    for point in points::all() {
        // An upgrade has no rounds before its pause.
        let is_met = !(upgrades && point.ends_with(".round_end"));
        if is_met && is_there(victim, point) {
            killing.at(point);
        }
    }
    assert_sound_at_the_end(&killing.cluster, &mut killing.console);
}

#[test]
fn a_leader_killed_at_any_step_leaves_the_vm_running_once() {
    kill_at_each_point(Victim::Leader);
}

#[test]
fn a_leader_killed_at_any_step_of_an_upgrade_leaves_the_vm_running_once() {
    kill_at_each_point_of(true, Victim::Leader);
}

#[test]
fn an_old_vmm_killed_at_any_step_of_its_upgrade_is_the_vms_failure_or_nothing_is_lost() {
    kill_at_each_point_of(true, Victim::SourceVmm);
}

#[test]
fn a_new_vmm_killed_at_any_step_of_an_upgrade_leaves_the_old_one_running_until_the_commit() {
    kill_at_each_point_of(true, Victim::TargetVmm);
}

#[test]
fn an_agent_killed_at_any_step_of_an_upgrade_finds_both_vmms_again() {
    kill_at_each_point_of(true, Victim::SourceAgent);
}

#[test]
fn a_source_vmm_killed_at_any_step_is_the_vms_failure_or_nothing_is_lost() {
    kill_at_each_point(Victim::SourceVmm);
}

#[test]
fn a_target_vmm_killed_at_any_step_leaves_the_source_running_until_the_commit() {
    kill_at_each_point(Victim::TargetVmm);
}

#[test]
fn a_source_agent_killed_at_any_step_leaves_the_vm_running_once() {
    kill_at_each_point(Victim::SourceAgent);
}

#[test]
fn a_target_agent_killed_at_any_step_leaves_the_vm_running_once() {
    kill_at_each_point(Victim::TargetAgent);
}
