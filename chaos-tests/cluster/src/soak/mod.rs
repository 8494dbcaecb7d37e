//! Random kill points, one migration after the other, on one cluster: what `cargo xtask chaos` runs a thousand times and
//! the cluster tests a few times.
//!
//! ```text
//!   runs once ──▶ migration asked for ──▶ point reached, or delay over ──▶ blow ──▶ it has ended
//!      ▲                                                                               │
//!      │          nothing left over, the guest answers, lost=0  ◀── still or again ────┤
//!      └── boots at a higher epoch ◀── stopped with a reason, its VMM was hit ◀────────┘
//! ```
//!
//! Every rule that is broken is a panic that says what was seen. Three look all the time: the witness (nobody executes
//! twice, nor beyond the lease), the console (no page lost, nothing goes back), and what it looks at while a migration ends. What
//! may come of a blow is in [`crate::verdicts`].
//!
//! It does not choose what to try: [`plan`] does, from a seed.

pub mod leftovers;
pub mod plan;
pub mod tally;

use std::time::{Duration, Instant};

use drover_probe::report::Second;
use drover_proto::Code;
use drover_proto::v1::{Migration, MigrationOptions, MigrationPhase, VmState, VmmState};

use crate::cluster::{PARTIES, host_name};
use crate::points::{Stage, stage};
use crate::soak::leftovers::find_leftovers;
use crate::soak::plan::{Blow, Kill, Moment};
use crate::verdicts::{Ending, Victim};
use crate::{Cluster, Console, LOOK_AGAIN, SeenVmm, await_some, points, probe_spec};

/// Pages that the guest owns; it rewrites all of them, and so compares all of them, several times a second.
const OWN_PAGES: u64 = 2048;

/// What the guest does: 8 MiB, every page four times a second. A lost page is found within a second.
const GUEST: &str = "own=8M hot=8M rate=8000";

/// The guest's memory, MiB.
const MEMORY_MIB: u64 = 32;

/// An abort is held back for so many looks.
const LOOKS_AT_A_HELD_ABORT: u32 = 8;

/// So long the source is kept from its pause, where that is wanted: the guest writes some two hundred pages meanwhile.
const LATE_WRITES: Duration = Duration::from_millis(30);

/// After so many starts a VM is deleted and another one made: that leaves nothing behind either.
const STARTS_MAX: u32 = 12;

/// What came of a kill.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// How the migration and its VM ended.
    pub ending: Ending,
    /// Whether the blow hit anything: a delay may be longer than the migration.
    pub hit: bool,
    /// The VM's epoch afterwards.
    pub epoch: u64,
}

/// A cluster with one VM that is migrated on and on.
pub struct Soak {
    cluster: Cluster,
    console: Console,
    vm: String,
    vms: u32,
    starts: u32,
    /// The highest epoch that was seen placed or executing.
    epoch: u64,
    /// The guest's memory came over the wire, and reports from this one on are of the time since.
    unproven_from: Option<usize>,
}

impl Soak {
    /// Boots the VM on a cluster that is up.
    pub fn new(cluster: Cluster) -> Self {
        let mut soak = Self {
            cluster,
            console: Console::new(""),
            vm: String::new(),
            vms: 0,
            starts: 0,
            epoch: 0,
            unproven_from: None,
        };
        soak.create();
        soak
    }

    /// The cluster, for its logs.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// One migration with its blow, and everything that must be true afterwards. Panics with what is not.
    pub fn kill(&mut self, kill: &Kill) -> Outcome {
        if kill.may_lose_the_vm() {
            self.prove_memory();
        }
        let (source, epoch) = self.runs_once();
        let target = (source + kill.hops) % PARTIES;
        let leader = self.cluster.leader();
        let mut looks = Looks::new(epoch);
        self.hold(kill, &mut looks);
        let migration = self
            .cluster
            .client
            .migrate_with(&self.vm, &host_name(target), options(kill))
            .unwrap_or_else(|fault| panic!("the migration is refused: {fault}"));
        self.await_moment(kill, &migration, &mut looks);
        let hit = self.strike(kill, &migration, [source, target, leader]);
        let ended = self.await_end(&migration, &mut looks);
        if kill.blow == Blow::Cut {
            self.cluster.heal_host(source);
        }
        let ending = self.settle(kill, hit, &ended);
        self.check(kill, hit, ending, &ended);
        match ending {
            Ending::Stayed => self.assert_runs_on(source, epoch, kill),
            Ending::Moved => {
                self.assert_runs_on(target, epoch + 1, kill);
                self.unproven_from = Some(self.console.reports.len());
            }
            Ending::LostWithSource | Ending::LostWithTarget => self.replace(),
        }
        self.cluster.witness.assert_clean();
        Outcome {
            ending,
            hit,
            epoch: self.epoch,
        }
    }

    /// The guest's last word: all its memory is as it left it.
    pub fn finish(&mut self) -> Second {
        self.prove_memory();
        self.runs_once();
        self.cluster.witness.assert_clean();
        self.console.await_more(&self.cluster.client, 1)
    }

    // --- before ---

    fn hold(&self, kill: &Kill, looks: &mut Looks) {
        if let Moment::At(point) = kill.moment {
            self.cluster.hold(point);
        }
        if kill.abort_held {
            self.cluster.hold(points::CONTROLLER_ABORT);
            looks.abort_held = true;
        }
        if kill.late_writes {
            self.cluster.hold(points::BEFORE_PAUSE);
            looks.pause_held = true;
        }
    }

    /// Waits for the moment of the blow.
    fn await_moment(&self, kill: &Kill, migration: &Migration, looks: &mut Looks) {
        let point = match kill.moment {
            Moment::After(delay) => return self.wait(delay, looks),
            Moment::At(point) => point,
        };
        await_some(&format!("somebody to come to {point}"), || {
            if self.cluster.reached(point) {
                return Ok(());
            }
            let now = self.migration(migration)?;
            // The source's agent hears of the commit when it hears of the end, or later.
            let behind = stage(point) == Stage::Committed && now.phase() == MigrationPhase::Done;
            assert!(
                !has_ended(&now) || behind || self.cluster.reached(point),
                "the migration ended by itself before {point}: {now:?}"
            );
            looks.look(&self.cluster, &self.vm);
            Err(format!("{now:?}"))
        });
    }

    /// The delay before a blow; that it begins when the migration was accepted is what the plan says.
    fn wait(&self, delay: Duration, looks: &mut Looks) {
        let end = Instant::now() + delay;
        loop {
            looks.look(&self.cluster, &self.vm);
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(LOOK_AGAIN));
        }
    }

    // --- the blow ---

    /// Strikes, and lets go on whoever waits. Whether it hit anything.
    fn strike(&mut self, kill: &Kill, migration: &Migration, parties: [usize; 3]) -> bool {
        let [source, target, leader] = parties;
        let mut hit = true;
        match kill.blow {
            Blow::Kill(Victim::Leader) => self.cluster.kill_controller(leader),
            Blow::Kill(Victim::SourceVmm) => hit = self.kill_vmm(source, kill),
            Blow::Kill(Victim::TargetVmm) => hit = self.kill_vmm(target, kill),
            Blow::Kill(Victim::SourceAgent) => self.restart_agent(source),
            Blow::Kill(Victim::TargetAgent) => self.restart_agent(target),
            Blow::Cancel => hit = self.cancel(kill, migration),
            Blow::Cut => self.cluster.cut_hosts(source, target),
        }
        if let Moment::At(point) = kill.moment {
            self.cluster.release(point);
        }
        if kill.blow == Blow::Kill(Victim::Leader) {
            // Started again once the others have dealt with it.
            assert_ne!(self.cluster.leader(), leader, "a dead controller cannot lead");
            self.cluster.start_controller(leader);
        }
        hit
    }

    fn kill_vmm(&mut self, host: usize, kill: &Kill) -> bool {
        let killed = self.cluster.kill_vmms(host, &self.vm);
        // After the commit the source's is ended by its agent, which nobody holds.
        let may_be_gone = match kill.moment {
            Moment::After(_) => true,
            Moment::At(point) => {
                kill.blow == Blow::Kill(Victim::SourceVmm) && stage(point) == Stage::Committed
            }
        };
        assert!(
            killed == 1 || (killed == 0 && may_be_gone),
            "{killed} VMMs of {} on {}",
            self.vm,
            host_name(host)
        );
        killed == 1
    }

    fn restart_agent(&mut self, host: usize) {
        self.cluster.kill_agent(host);
        self.cluster.start_agent(host);
    }

    /// Whether it came in time.
    fn cancel(&self, kill: &Kill, migration: &Migration) -> bool {
        match self.cluster.client.cancel(&migration.id) {
            Ok(_) => true,
            Err(fault) => {
                assert_eq!(fault.code, Code::MigrationEnded, "{kill}: {fault}");
                false
            }
        }
    }

    // --- after ---

    fn migration(&self, migration: &Migration) -> Result<Migration, String> {
        self.cluster
            .client
            .migration(&migration.id)
            .map_err(|fault| fault.to_string())
    }

    /// Waits until the migration has ended, looking all the time.
    fn await_end(&self, migration: &Migration, looks: &mut Looks) -> Migration {
        let ended = await_some(&format!("the end of migration {}", migration.id), || {
            looks.look(&self.cluster, &self.vm);
            match self.migration(migration)? {
                now if has_ended(&now) => Ok(now),
                now => Err(format!("{now:?}")),
            }
        });
        looks.release(&self.cluster);
        ended
    }

    /// What came of it, once it is known of the VM too.
    fn settle(&self, kill: &Kill, hit: bool, ended: &Migration) -> Ending {
        let done = ended.phase() == MigrationPhase::Done;
        // A VMM that was killed is reported by its agent, which takes a moment more.
        let its_end = match kill.blow {
            Blow::Kill(Victim::TargetVmm) => hit && done,
            Blow::Kill(Victim::SourceVmm) => hit && !done,
            _ => false,
        };
        let vm = self.cluster.client.await_vm(&self.vm, "settled", |vm| {
            vm.state() == VmState::Failed || (vm.state() == VmState::Running && !its_end)
        });
        match (done, vm.state()) {
            (true, VmState::Running) => Ending::Moved,
            (true, _) => Ending::LostWithTarget,
            (false, VmState::Running) => Ending::Stayed,
            (false, _) => Ending::LostWithSource,
        }
    }

    /// Compares what came of it with what may.
    fn check(&self, kill: &Kill, hit: bool, ending: Ending, ended: &Migration) {
        let allowed = match kill.blow {
            _ if hit => kill.allowed(),
            // Refused, for it has ended: by the commit, as nobody else aborts here.
            _ => &[Ending::Moved],
        };
        assert!(
            allowed.contains(&ending),
            "{kill}: {ending:?}, want {allowed:?}: {ended:?}"
        );
        if ended.phase() == MigrationPhase::Aborted {
            let reason = ended.reason.clone().unwrap_or_default();
            assert!(
                !reason.code.is_empty() && !reason.message.is_empty(),
                "aborted without a reason: {ended:?}"
            );
            if kill.blow == Blow::Cancel {
                assert_eq!(reason.code, "cancelled", "{ended:?}");
            }
        } else {
            assert!(
                !(kill.blow == Blow::Cancel && hit),
                "the cancel was accepted: {ended:?}"
            );
        }
    }

    /// The VM runs where it must, at that epoch, and its guest answers; nothing else is there.
    fn assert_runs_on(&mut self, host: usize, epoch: u64, kill: &Kill) {
        assert_eq!(self.runs_once(), (host, epoch), "{kill}");
        self.assert_nothing_left(1);
        self.console
            .ping(&self.cluster.client, &format!("after-{}", kill.number));
    }

    fn runs_once(&mut self) -> (usize, u64) {
        let (host, epoch) = self.cluster.await_runs_exactly_once(&self.vm);
        assert!(
            epoch >= self.epoch,
            "the epoch of {} went from {} to {epoch}",
            self.vm,
            self.epoch
        );
        self.epoch = epoch;
        (host, epoch)
    }

    fn assert_nothing_left(&self, vmms: usize) {
        await_some("nothing to be left over", || {
            match find_leftovers(&self.cluster, &self.vm, vmms) {
                left if left.is_empty() => Ok(()),
                left => Err(left.join("; ")),
            }
        });
    }

    /// Waits until the guest has rewritten, and so compared, every page since its memory last came over the wire.
    fn prove_memory(&mut self) {
        let Some(from) = self.unproven_from.take() else {
            return;
        };
        await_some("the guest to compare all its memory", || {
            self.console.pull(&self.cluster.client)?;
            match self.console.reports.get(from..) {
                Some([first, .., last]) if last.written >= first.written + OWN_PAGES => Ok(()),
                reports => Err(format!("reports since the memory was moved: {reports:?}")),
            }
        });
    }

    // --- VMs ---

    fn create(&mut self) {
        self.vms += 1;
        self.vm = format!("soak-{}", self.vms);
        (self.starts, self.epoch) = (1, 0);
        let spec = probe_spec(&self.vm, "", MEMORY_MIB, 1, GUEST);
        self.cluster
            .client
            .create_vm(&spec, true)
            .expect("the VM is created");
        self.await_boot();
    }

    /// Its VMM was killed: it is stopped, says why, and starts again at a higher epoch, or makes room for another.
    fn replace(&mut self) {
        let client = &self.cluster.client;
        let failed = client.vm(&self.vm).expect("a failed VM is known");
        let reason = failed.reason.clone().unwrap_or_default().code;
        assert_eq!(reason, "vmm_died", "{failed:?}");
        self.assert_nothing_left(0);
        if self.starts < STARTS_MAX {
            self.starts += 1;
            client.start_vm(&self.vm).expect("a failed VM can be started");
            let before = self.epoch;
            self.await_boot();
            assert!(self.epoch > before, "it starts at epoch {before} again");
            return;
        }
        client.delete_vm(&self.vm).expect("a failed VM can be deleted");
        await_some("the VM to be forgotten", || match client.vm(&self.vm) {
            Err(fault) if fault.code == Code::VmNotFound => Ok(()),
            other => Err(format!("{other:?}")),
        });
        self.create();
    }

    fn await_boot(&mut self) {
        self.runs_once();
        self.console = Console::new(&self.vm);
        self.console.ping(&self.cluster.client, "booted");
        self.unproven_from = None;
    }
}

fn options(kill: &Kill) -> MigrationOptions {
    MigrationOptions {
        bandwidth_mib_s: kill.bandwidth_mib_s,
        ..MigrationOptions::default()
    }
}

fn has_ended(migration: &Migration) -> bool {
    matches!(migration.phase(), MigrationPhase::Done | MigrationPhase::Aborted)
}

/// What is seen of the VMMs while a migration is under way. Two rules: an epoch that executed gives way to higher ones only;
/// and while the abort is held back, a source that has paused stays paused, since nobody has told it the outcome.
///
/// Whoever was held beside the blow is let go here, a while after it came.
struct Looks {
    source_epoch: u64,
    highest_running: u64,
    source_paused: bool,
    abort_held: bool,
    looks_at_abort: u32,
    pause_held: bool,
}

impl Looks {
    fn new(source_epoch: u64) -> Self {
        Self {
            source_epoch,
            highest_running: source_epoch,
            source_paused: false,
            abort_held: false,
            looks_at_abort: 0,
            pause_held: false,
        }
    }

    fn look(&mut self, cluster: &Cluster, vm: &str) {
        if self.pause_held && cluster.reached(points::BEFORE_PAUSE) {
            std::thread::sleep(LATE_WRITES);
            self.pause_held = false;
            cluster.release(points::BEFORE_PAUSE);
        }
        for vmm in cluster.vmms(vm) {
            self.note(&vmm);
        }
        if self.abort_held && cluster.reached(points::CONTROLLER_ABORT) {
            self.looks_at_abort += 1;
            if self.looks_at_abort >= LOOKS_AT_A_HELD_ABORT {
                self.abort_held = false;
                cluster.release(points::CONTROLLER_ABORT);
            }
        }
    }

    fn note(&mut self, vmm: &SeenVmm) {
        let epoch = vmm.info.epoch;
        if vmm.runs() {
            assert!(
                epoch >= self.highest_running,
                "epoch {epoch} executes after epoch {}: {vmm:?}",
                self.highest_running
            );
            self.highest_running = epoch;
            assert!(
                !(epoch == self.source_epoch && self.source_paused && self.abort_held),
                "the source had paused and executes again, though no abort is in the log: {vmm:?}"
            );
        }
        if epoch == self.source_epoch && vmm.info.state() == VmmState::HandedOver {
            self.source_paused = true;
        }
    }

    /// Nobody waits any more.
    fn release(&mut self, cluster: &Cluster) {
        (self.abort_held, self.pause_held) = (false, false);
        cluster.release(points::CONTROLLER_ABORT);
        cluster.release(points::BEFORE_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_proto::v1::VmmInfo;

    fn seen(epoch: u64, state: VmmState) -> SeenVmm {
        SeenVmm {
            host: 0,
            dir: "host1".into(),
            info: VmmInfo {
                epoch,
                state: state.into(),
                ..VmmInfo::default()
            },
            asked_ns: 0,
        }
    }

    fn notes(abort_held: bool, states: &[(u64, VmmState)]) {
        let mut looks = Looks::new(4);
        looks.abort_held = abort_held;
        states
            .iter()
            .for_each(|&(epoch, state)| looks.note(&seen(epoch, state)));
    }

    const RESUMED: [(u64, VmmState); 3] = [
        (4, VmmState::Running),
        (4, VmmState::HandedOver),
        (4, VmmState::Running),
    ];

    #[test]
    fn a_source_that_resumes_after_its_abort_is_in_order() {
        notes(false, &RESUMED);
    }

    #[test]
    #[should_panic(expected = "no abort is in the log")]
    fn a_source_that_resumes_by_itself_is_seen() {
        notes(true, &RESUMED);
    }

    #[test]
    #[should_panic(expected = "epoch 4 executes after epoch 5")]
    fn an_epoch_that_executes_after_a_higher_one_is_seen() {
        notes(false, &[(5, VmmState::Running), (4, VmmState::Running)]);
    }
}
