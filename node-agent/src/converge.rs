//! What a host has to do next: a pure function of what is desired and what is observed.
//!
//! It is called after every change of either, its actions are carried out at leisure and may be lost or repeated: the next
//! call sees what came of them. Of one VMM it asks one thing at a time.
//!
//! ```text
//!   desired                      no VMM here                 a VMM here
//!   ─────────────────────────    ─────────────────────────   ─────────────────────────────────────────────
//!   RUN, booted for its epoch    start it, once an epoch;    run on; StartOutgoing in PRE_COPY; Outcome
//!                                else report it FAILED       aborted when the log says so, until its info
//!   RUN, arrived by a migration  report it FAILED            names that migration no more; its end is
//!                                                            reported, then it is destroyed; what it has is made
//!                                                            what is desired, and reported (see `devices`), so is its
//!                                                            snapshot, and its beginning as one (see `snapshots`)
//!   INCOMING                     start it in PREPARING,      wait for the source; abort when it ended
//!                                once; else abort. Of an
//!                                upgrade beside the source
//!   SERVING                      –                           tell it the commit, then leave it alone: it gives the target its pages
//!   neither                      –                           destroy it: Outcome committed when HANDED_OVER
//!   stopping                     report it STOPPED           destroy it, then report it STOPPED
//! ```
//!
//! Two things are never done here. A VMM is never destroyed for want of an answer: without desired state nothing is called, and
//! that a VMM is *not* desired is believed only when it is [`Observed::confirmed`] or a higher epoch of the VM is desired, which
//! is final. And no VMM is started for an epoch that had one, or that lies below the highest seen.
//!
//! Which VMM a run is, the desired state says and nothing else: `arrived_by` M is `e<epoch>-M`, none is `e<epoch>-start`. What the
//! VMM answered, or whether it answers at all, has no part in it, nor has the VM's newest migration, which may be another. Should
//! a desired state be wrong about it, the store still refuses the second VMM of an epoch (see [`crate::host::store`]).

mod devices;
#[cfg(test)]
mod devices_model;
mod snapshots;

pub use devices::{target_mib, with_slots};
pub use snapshots::{content_of, name_of as name_of_removal, progress as progress_of};

use std::collections::{BTreeMap, BTreeSet};

use drover_proto::v1::{
    DetachDiskRequest, DetachNicRequest, HostDesired, Migration, MigrationPhase, Network, Reason, Removal,
    ReportSnapshotRequest, SetMemoryRequest, Snapshot, StartOutgoingRequest, VmDesired, VmDevices, VmDisk,
    VmNic, VmRole, VmState, VmmDevices, VmmSnapshot, VmmState, Volume,
};
use drover_proto::{Code, Fault};

use crate::key::{Key, Kind, migration_number};
use crate::network::plan::Nic;

/// What an agent knows of its host.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The host's name.
    pub host: String,
    /// Every VMM whose end is not reported and forgotten.
    pub vmms: Vec<Seen>,
    /// Every VMM that was ever started and whose marker still stands; those in `vmms` among them.
    pub markers: BTreeSet<Key>,
    /// By VM: the highest epoch that a VMM was started for.
    pub highest: BTreeMap<String, u64>,
    /// Whether the desired state was confirmed by a leader with a quorum after it was received.
    pub confirmed: bool,
    /// `(vm, epoch)` without a VMM whose end was reported under this desired state; and, with 0, what was reported as removed.
    pub told: BTreeSet<(String, u64)>,
}

/// What is known of how a VMM's devices came about.
#[derive(Clone, Debug, Default)]
pub struct Attaching {
    /// By volume or MAC: why it could not be attached or grown the last time.
    pub failed: BTreeMap<String, Reason>,
    /// Of these, what is not to be tried again yet.
    pub resting: BTreeSet<String>,
    /// What a controller was told last.
    pub reported: Option<VmDevices>,
}

/// One VMM as it is seen.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Which one.
    pub key: Key,
    /// How it stands.
    pub life: Life,
    /// Known to have the right to run, or to have had it: booted here, or its hand-over is known to be committed.
    pub had_right: bool,
    /// `CommitHandover` was answered with the abort.
    pub commit_refused: bool,
    /// The migration for which the VMM took `StartOutgoing`.
    pub outgoing_taken: Option<String>,
    /// The migration for which the VMM took `SwitchToPostCopy`.
    pub switch_taken: Option<String>,
    /// The VMM took the commit of its outgoing migration.
    pub commit_taken: bool,
    /// A controller has answered the report of its end.
    pub end_reported: bool,
    /// Its devices.
    pub attaching: Attaching,
    /// The snapshot that the VMM was told to take.
    pub snapshot_taken: Option<String>,
    /// The snapshot whose end a controller was told.
    pub snapshot_told: Option<String>,
    /// The NICs whose TAPs are kept for it.
    pub nics: Vec<Nic>,
}

/// How a VMM stands.
#[derive(Clone, Debug)]
pub enum Life {
    /// It is being started.
    Starting,
    /// Its process lives but has not answered yet.
    Silent,
    /// It said so.
    Alive(Alive),
    /// Its process is gone, or could not be started.
    Gone(Reason),
}

/// What a VMM says of itself.
#[derive(Clone, Debug)]
pub struct Alive {
    /// Its state.
    pub state: VmmState,
    /// Why it failed or ended.
    pub reason: Option<Reason>,
    /// The outgoing migration it knows of, under way or ended.
    pub outgoing: Option<String>,
    /// What it has, if it is of a version that says so.
    pub devices: Option<VmmDevices>,
    /// The newest snapshot that was taken of it, under way or ended.
    pub snapshot: Option<VmmSnapshot>,
}

/// What a VMM may be given while it runs, with its slot and what it is made of.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// A disk.
    Disk(VmDisk, Volume),
    /// A NIC.
    Nic(VmNic, Network),
}

impl Piece {
    /// The disk's volume, or the NIC's MAC.
    pub fn name(&self) -> &str {
        match self {
            Self::Disk(disk, _) => &disk.volume,
            Self::Nic(nic, _) => &nic.mac,
        }
    }
}

/// What a VMM is asked to have given up.
#[derive(Clone, Debug, PartialEq)]
pub enum Detach {
    /// A disk.
    Disk(DetachDiskRequest),
    /// A NIC.
    Nic(DetachNicRequest),
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Write the marker and start a VMM.
    StartVmm {
        /// Which one.
        key: Key,
        /// What for.
        desired: Box<VmDesired>,
    },
    /// Let the source's VMM connect to the target's.
    StartOutgoing {
        /// The source's VMM.
        key: Key,
        /// Where to.
        request: StartOutgoingRequest,
    },
    /// Tell the source what the log says.
    Outcome {
        /// The source's VMM.
        key: Key,
        /// The migration.
        migration: String,
        /// Whether the hand-over is committed.
        committed: bool,
    },
    /// Tell the source that it is to switch to post-copy now.
    SwitchToPostCopy {
        /// The source's VMM.
        key: Key,
        /// The migration.
        migration: String,
    },
    /// Tell the source of a post-copy that its hand-over is committed: it lives on as long as the target needs its pages.
    Serve {
        /// The source's VMM.
        key: Key,
        /// The migration.
        migration: String,
    },
    /// Give a run's VMM a disk or a NIC.
    Attach {
        /// The VMM.
        key: Key,
        /// Of the specification.
        revision: u64,
        /// What.
        piece: Piece,
    },
    /// Ask a run's guest to give something up.
    Detach {
        /// The VMM.
        key: Key,
        /// The disk's volume, or the NIC's MAC.
        name: String,
        /// Which.
        request: Detach,
    },
    /// Remove a TAP of a NIC that the VMM has no more.
    Release {
        /// The VMM.
        key: Key,
        /// The TAP.
        tap: String,
    },
    /// Grow a disk's file, and tell the guest.
    Resize {
        /// The VMM.
        key: Key,
        /// The slot.
        slot: u32,
        /// Of the disk.
        volume: Volume,
        /// As the VMM has it.
        path: String,
    },
    /// Press the power button.
    Press {
        /// The VMM.
        key: Key,
        /// For which request.
        request: u64,
    },
    /// Ask a run's guest to have so much of its memory.
    SetMemory {
        /// The VMM.
        key: Key,
        /// How much.
        request: SetMemoryRequest,
    },
    /// Report what a run's VMM has.
    ReportDevices {
        /// The VMM.
        key: Key,
        /// What it has.
        devices: VmDevices,
    },
    /// Have a snapshot of a run begun.
    TakeSnapshot {
        /// The VMM.
        key: Key,
        /// The snapshot.
        snapshot: Box<Snapshot>,
        /// The slots of the disks that are to be in it.
        disks: Vec<u32>,
    },
    /// End a snapshot that nobody waits for.
    CancelSnapshot {
        /// The VMM.
        key: Key,
        /// The snapshot's id.
        id: String,
    },
    /// Make a snapshot of what a VMM in its sandbox has sealed, and report it.
    CompleteSnapshot {
        /// Which.
        key: Key,
        /// The snapshot.
        snapshot: Box<Snapshot>,
        /// The report.
        report: Box<ReportSnapshotRequest>,
    },
    /// Report the end of a snapshot.
    ReportSnapshot {
        /// The VMM.
        key: Key,
        /// What became of it.
        report: Box<ReportSnapshotRequest>,
    },
    /// Ask whether a restored run may begin.
    BeginRestore {
        /// The VMM.
        key: Key,
        /// The restore's number.
        restore: u64,
    },
    /// Fill a volume from its image.
    Fill {
        /// Which one.
        volume: Box<Volume>,
    },
    /// Remove something from a pool.
    Remove {
        /// What.
        removal: Removal,
    },
    /// The log holds the hand-over to this VMM: grants are for it.
    Committed {
        /// The target's VMM.
        key: Key,
    },
    /// End a VMM.
    Destroy {
        /// Which one.
        key: Key,
        /// What its log will say.
        reason: Reason,
    },
    /// Report the end of a VMM.
    ReportEnd {
        /// Which one.
        key: Key,
        /// FAILED or STOPPED.
        state: VmState,
        /// Why.
        reason: Reason,
    },
    /// Report the end of a run that has no VMM here.
    ReportGone {
        /// The VM.
        vm: String,
        /// Its epoch.
        epoch: u64,
        /// FAILED or STOPPED.
        state: VmState,
        /// Why.
        reason: Reason,
    },
    /// Propose the abort of a migration whose target is lost.
    Abort {
        /// The migration.
        migration: String,
        /// Why.
        reason: Reason,
        /// The phase it was seen in.
        phase: MigrationPhase,
    },
    /// Nothing is left of this VMM but its marker and its log.
    Forget {
        /// Which one.
        key: Key,
    },
    /// Ask a leader whether the desired state still stands.
    Confirm,
}

/// Everything to be done now.
pub fn converge(desired: &HostDesired, observed: &Observed) -> Vec<Action> {
    let mut actions: Vec<Action> = observed
        .vmms
        .iter()
        .filter_map(|seen| for_vmm(desired, observed, seen))
        .collect();
    actions.extend(
        desired
            .vms
            .iter()
            .filter_map(|wanted| for_wanted(observed, wanted)),
    );
    actions.extend(snapshots::removals(desired, observed));
    actions.extend(snapshots::fills(desired, observed));
    for stopping in &desired.stopping {
        let here = observed
            .vmms
            .iter()
            .any(|seen| seen.key.vm == stopping.vm && seen.key.epoch == stopping.epoch);
        if !here && !observed.told.contains(&(stopping.vm.clone(), stopping.epoch)) {
            let reason = reason(Code::VmStopped, "no VMM of this epoch is on the host");
            let (vm, epoch) = (stopping.vm.clone(), stopping.epoch);
            actions.push(Action::ReportGone {
                vm,
                epoch,
                state: VmState::Stopped,
                reason,
            });
        }
    }
    actions
}

/// What the desired state says of one VMM.
enum Want<'a> {
    Run(&'a VmDesired),
    Incoming(&'a VmDesired),
    Serving(&'a VmDesired),
    Nothing { certain: bool },
}

fn reason(code: Code, message: impl Into<String>) -> Reason {
    Fault::new(code, message).into()
}

/// Whether this VMM is the one that `wanted` means: see the module.
fn matches(key: &Key, wanted: &VmDesired) -> bool {
    if key.vm != wanted.vm || key.epoch != wanted.epoch {
        return false;
    }
    match (wanted.role(), &key.kind) {
        (VmRole::Run, Kind::Start) => wanted.arrived_by.is_empty(),
        (VmRole::Run, Kind::Incoming(id)) => wanted.arrived_by == *id,
        (VmRole::Incoming, Kind::Incoming(id)) => wanted
            .migration
            .as_ref()
            .is_some_and(|migration| migration.id == *id),
        (VmRole::Serving, _) => true,
        (VmRole::Incoming, Kind::Start) | (VmRole::Unspecified, _) => false,
    }
}

fn want<'a>(desired: &'a HostDesired, observed: &Observed, seen: &Seen) -> Want<'a> {
    match desired.vms.iter().find(|wanted| matches(&seen.key, wanted)) {
        Some(wanted) if wanted.role() == VmRole::Run => Want::Run(wanted),
        Some(wanted) if wanted.role() == VmRole::Serving => Want::Serving(wanted),
        Some(wanted) => Want::Incoming(wanted),
        None => {
            let higher = desired
                .vms
                .iter()
                .any(|other| other.vm == seen.key.vm && other.epoch > seen.key.epoch);
            Want::Nothing {
                certain: observed.confirmed || higher,
            }
        }
    }
}

fn for_vmm(desired: &HostDesired, observed: &Observed, seen: &Seen) -> Option<Action> {
    let key = seen.key.clone();
    let want = want(desired, observed, seen);
    if let Want::Nothing { certain: false } = want {
        return Some(Action::Confirm);
    }
    match (&seen.life, want) {
        (Life::Gone(why), want) => for_gone(seen, why, want),
        (Life::Starting | Life::Silent, Want::Nothing { .. }) => Some(Action::Destroy {
            key,
            reason: not_desired(),
        }),
        (Life::Starting | Life::Silent, _) => None,
        (Life::Alive(_), _) if seen.commit_refused => Some(Action::Destroy {
            key,
            reason: reason(Code::MigrationEnded, "the migration was aborted"),
        }),
        (Life::Alive(alive), Want::Run(wanted)) => for_running(observed, seen, alive, wanted),
        (Life::Alive(alive), Want::Incoming(wanted)) => match alive.state {
            VmmState::Failed | VmmState::Exited => Some(abort(wanted, end_of(alive).1)),
            _ => None,
        },
        (Life::Alive(alive), Want::Serving(wanted)) => for_serving(key, alive, wanted),
        (Life::Alive(alive), Want::Nothing { .. }) => {
            let stopping = desired
                .stopping
                .iter()
                .any(|vm| vm.vm == key.vm && vm.epoch == key.epoch);
            match &alive.outgoing {
                Some(migration) if alive.state == VmmState::HandedOver && !stopping => {
                    Some(Action::Outcome {
                        key,
                        migration: migration.clone(),
                        committed: true,
                    })
                }
                _ => Some(Action::Destroy {
                    key,
                    reason: not_desired(),
                }),
            }
        }
    }
}

/// A VMM of the epoch that a post-copy has handed over: only its source lives on.
fn for_serving(key: Key, alive: &Alive, wanted: &VmDesired) -> Option<Action> {
    let migration = wanted.migration.as_ref().map_or("", |migration| &migration.id);
    let is_source = alive.outgoing.as_deref() == Some(migration);
    match alive.state {
        VmmState::Serving if is_source => None,
        VmmState::HandedOver if is_source => Some(Action::Serve {
            key,
            migration: migration.to_owned(),
        }),
        _ => Some(Action::Destroy {
            key,
            reason: not_desired(),
        }),
    }
}

fn not_desired() -> Reason {
    reason(Code::VmStopped, "it is not desired on this host")
}

fn abort(wanted: &VmDesired, reason: Reason) -> Action {
    let migration = wanted.migration.clone().unwrap_or_default();
    let phase = migration.phase();
    Action::Abort {
        migration: migration.id,
        reason,
        phase,
    }
}

fn for_gone(seen: &Seen, why: &Reason, want: Want<'_>) -> Option<Action> {
    let key = seen.key.clone();
    match want {
        // A controller knows, and what it makes of it comes as another desired state.
        Want::Run(_) if seen.end_reported => None,
        Want::Run(_) => Some(Action::ReportEnd {
            key,
            state: VmState::Failed,
            reason: why.clone(),
        }),
        Want::Incoming(wanted) => Some(abort(wanted, why.clone())),
        Want::Serving(_) => Some(Action::Forget { key }),
        Want::Nothing { .. } => {
            if !seen.had_right || seen.end_reported || seen.commit_taken {
                return Some(Action::Forget { key });
            }
            let reason = reason(Code::VmStopped, "its VMM is gone, as desired");
            Some(Action::ReportEnd {
                key,
                state: VmState::Stopped,
                reason,
            })
        }
    }
}

/// How the end of a VMM is reported.
fn end_of(alive: &Alive) -> (VmState, Reason) {
    let given = |code, message: &str| alive.reason.clone().unwrap_or_else(|| reason(code, message));
    match alive.state {
        VmmState::Failed => (
            VmState::Failed,
            given(Code::Internal, "the VMM failed without a reason"),
        ),
        _ => (
            VmState::Stopped,
            given(Code::VmStopped, "the guest shut itself down"),
        ),
    }
}

fn for_running(observed: &Observed, seen: &Seen, alive: &Alive, wanted: &VmDesired) -> Option<Action> {
    // A snapshot's end waits for no device that cannot be had; what a snapshot waits for is done before it is begun.
    let snapshot = snapshots::next(observed, seen, alive, wanted);
    let (first, last) = match snapshot {
        Some(Action::TakeSnapshot { .. }) => (None, snapshot),
        ends => (ends, None),
    };
    let own = for_its_run(observed, seen, alive, wanted).filter(|action| {
        // The VMM would refuse: a snapshot that nobody wants any more ends first.
        !matches!(action, Action::StartOutgoing { .. }) || first.is_none()
    });
    own.or(first)
        .or_else(|| devices::next(observed, seen, alive, wanted))
        .or(last)
}

fn for_its_run(observed: &Observed, seen: &Seen, alive: &Alive, wanted: &VmDesired) -> Option<Action> {
    let key = seen.key.clone();
    if matches!(alive.state, VmmState::Failed | VmmState::Exited) {
        let (state, reason) = end_of(alive);
        return Some(match seen.end_reported {
            false => Action::ReportEnd { key, state, reason },
            true => Action::Destroy { key, reason },
        });
    }
    if !seen.had_right {
        let Some(restore) = &wanted.restore else {
            return Some(Action::Committed { key });
        };
        // All of it is verified then, and nothing has run.
        let restore = restore.number;
        return (alive.state == VmmState::Waiting).then_some(Action::BeginRestore { key, restore });
    }
    let migration = wanted.migration.as_ref();
    let migration =
        migration.filter(|m| m.from == observed.host && m.epoch == wanted.epoch.saturating_add(1))?;
    if let Some(outgoing) = &alive.outgoing
        && is_aborted(outgoing, migration)
    {
        // For as long as it names it: one that has learned of the abort does no more.
        return Some(Action::Outcome {
            key,
            migration: outgoing.clone(),
            committed: false,
        });
    }
    let runs = matches!(alive.state, VmmState::Running | VmmState::Frozen);
    let begun = [&alive.outgoing, &seen.outgoing_taken]
        .into_iter()
        .flatten()
        .any(|id| *id == migration.id);
    let asked = migration.phase() == MigrationPhase::PreCopy && !migration.target_addr.is_empty();
    if !runs || !asked {
        return None;
    }
    if !begun {
        return Some(Action::StartOutgoing {
            key,
            request: outgoing_request(migration),
        });
    }
    let switch = migration.post_copy_wanted && seen.switch_taken.as_ref() != Some(&migration.id);
    switch.then(|| Action::SwitchToPostCopy {
        key,
        migration: migration.id.clone(),
    })
}

/// Whether the log holds the abort of the migration `outgoing`, given the newest one of a run that is still placed here: it is
/// that one and is aborted, or it is a later one, which could not have been planned before the earlier had ended.
fn is_aborted(outgoing: &str, newest: &Migration) -> bool {
    if outgoing == newest.id {
        return newest.phase() == MigrationPhase::Aborted;
    }
    migration_number(outgoing) < migration_number(&newest.id)
}

fn outgoing_request(migration: &Migration) -> StartOutgoingRequest {
    StartOutgoingRequest {
        migration: migration.id.clone(),
        target_addr: migration.target_addr.clone(),
        target_host: migration.to.clone(),
        target_epoch: migration.epoch,
        options: migration.options,
    }
}

/// What to do about something desired that has no VMM here.
fn for_wanted(observed: &Observed, wanted: &VmDesired) -> Option<Action> {
    if observed.vmms.iter().any(|seen| matches(&seen.key, wanted)) {
        return None;
    }
    let in_the_way = |seen: &&Seen| seen.key.vm == wanted.vm && !hands_over_to(seen, wanted);
    if observed
        .vmms
        .iter()
        .filter(in_the_way)
        .any(|seen| !matches!(seen.life, Life::Gone(_)))
    {
        // What is left of an earlier run goes first: two of them may not fit.
        return None;
    }
    match wanted.role() {
        VmRole::Run => for_wanted_run(observed, wanted),
        VmRole::Incoming => Some(for_wanted_incoming(observed, wanted)),
        VmRole::Serving | VmRole::Unspecified => None,
    }
}

/// Whether this VMM is the source of the upgrade whose target is wanted: both are there until the log has decided.
fn hands_over_to(seen: &Seen, wanted: &VmDesired) -> bool {
    let is_upgrade = wanted.migration.as_ref().is_some_and(Migration::is_upgrade);
    let is_source = seen.had_right && seen.key.epoch.checked_add(1) == Some(wanted.epoch);
    wanted.role() == VmRole::Incoming && is_upgrade && is_source
}

fn for_wanted_run(observed: &Observed, wanted: &VmDesired) -> Option<Action> {
    let (vm, epoch) = (wanted.vm.clone(), wanted.epoch);
    if observed.told.contains(&(vm.clone(), epoch)) {
        return None;
    }
    let key = Key::start(&vm, epoch);
    let failed = |code, message: String| {
        Some(Action::ReportGone {
            vm: vm.clone(),
            epoch,
            state: VmState::Failed,
            reason: reason(code, message),
        })
    };
    if !wanted.arrived_by.is_empty() {
        return failed(
            Code::VmmDied,
            format!("the VMM that received it by {} is gone", wanted.arrived_by),
        );
    }
    if observed.markers.contains(&key) {
        return failed(
            Code::VmmDied,
            format!("its VMM for epoch {epoch} was started before and is gone"),
        );
    }
    match observed.highest.get(&vm) {
        Some(&highest) if epoch < highest => failed(
            Code::VmmStartFailed,
            format!("epoch {epoch} is below {highest}, which this host has seen"),
        ),
        _ if !key.is_well_formed() => failed(Code::VmmStartFailed, format!("{vm:?} is no VM's name")),
        _ => Some(Action::StartVmm {
            key,
            desired: Box::new(wanted.clone()),
        }),
    }
}

fn for_wanted_incoming(observed: &Observed, wanted: &VmDesired) -> Action {
    let migration = wanted.migration.clone().unwrap_or_default();
    let key = Key::incoming(&wanted.vm, wanted.epoch, &migration.id);
    let refused = |code, message: String| abort(wanted, reason(code, message));
    if observed.markers.contains(&key) {
        return refused(
            Code::VmmDied,
            "the target's VMM was started before and is gone".to_owned(),
        );
    }
    if migration.phase() != MigrationPhase::Preparing {
        return refused(Code::TargetFailed, "the target's VMM is gone".to_owned());
    }
    match observed.highest.get(&wanted.vm) {
        Some(&highest) if wanted.epoch < highest => refused(
            Code::StaleEpoch,
            format!(
                "epoch {} is below {highest}, which the target host has seen",
                wanted.epoch
            ),
        ),
        _ if !key.is_well_formed() => refused(Code::VmmStartFailed, format!("{key} is no VM and migration")),
        _ => Action::StartVmm {
            key,
            desired: Box::new(wanted.clone()),
        },
    }
}

#[cfg(test)]
mod tests;
