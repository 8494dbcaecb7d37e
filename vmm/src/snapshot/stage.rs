//! How far a VM's newest snapshot is, as a state machine without IO: whether the VM stands for it, and what else is refused meanwhile.
//!
//! ```text
//!   begin ──► Preparing ──hold──► Holding ──taken──► Writing ──seal──► Sealing ──► Done, Sealed
//!                 │                 │ the VM stands      │                │
//!                 └─────────────────┴────────────────────┴────────────────┴──► Failed, Cancelled
//! ```
//!
//! Only the snapshot's engine moves it on, and only the engine ends it, with its last word: so what is told as ended writes to no file and
//! holds back no page any more. A cancel, or the VM's end, is a wish that the engine meets at its next step. It holds also while the VM stands:
//! nobody lets the VM run under an engine that reads its state. From the seal on a cancel comes too late.
//!
//! **The seal and the lease.** A VMM whose lease has ended reads its disks' files without their locks, and another VMM of a higher epoch may write
//! there. So a snapshot is sealed only under a lease that lives after the last block was read: a lease for this epoch then proves that there was no
//! higher one before. Without it the engine waits.

use drover_proto::v1::{SnapshotStage, VmmSnapshot};
use drover_proto::{Code, Fault};

/// What a snapshot is that has come to its end well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whole {
    /// Its manifest has its name.
    Named,
    /// Its manifest has still to be named, by the agent of a VMM that cannot.
    Unnamed,
}

/// Where the engine is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Preparing,
    Holding,
    Writing,
    Sealing,
    Done(Whole),
    Failed(Fault),
    Cancelled,
}

/// Why the engine is to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Cancelled,
    VmEnded,
}

impl Stop {
    fn fault(self) -> Fault {
        match self {
            Self::Cancelled => Fault::new(Code::Cancelled, "the snapshot was cancelled"),
            Self::VmEnded => Fault::new(Code::VmStopped, "the VM ended before its snapshot was complete"),
        }
    }
}

/// How much is done, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amounts {
    /// Of memory and disks together, looked at and, where not zero, written.
    pub done: u64,
    /// Of memory and disks together.
    pub total: u64,
    /// What was written.
    pub stored: u64,
}

#[derive(Clone, Debug)]
struct Snapshot {
    id: String,
    phase: Phase,
    stop: Option<Stop>,
    amounts: Amounts,
    paused_us: u64,
}

/// What a wish to begin comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Began {
    /// It begins.
    Now,
    /// It is the newest one already, under way or ended.
    Before,
}

/// The newest snapshot of a VM.
#[derive(Clone, Debug, Default)]
pub struct Snapshots(Option<Snapshot>);

impl Snapshots {
    /// The snapshot that is under way.
    pub fn active(&self) -> Option<&str> {
        let snapshot = self.0.as_ref()?;
        let ended = matches!(
            snapshot.phase,
            Phase::Done(_) | Phase::Failed(_) | Phase::Cancelled
        );
        (!ended).then_some(snapshot.id.as_str())
    }

    /// The refusal of what cannot be while a snapshot is under way.
    pub fn refuse_if_active(&self) -> Result<(), Fault> {
        let Some(id) = self.active() else { return Ok(()) };
        let message = format!("a snapshot of this VM is under way: {id}");
        Err(Fault::new(Code::SnapshotActive, message))
    }

    /// Whether the VM is to stand for its instant.
    pub fn holds(&self) -> bool {
        self.0
            .as_ref()
            .is_some_and(|snapshot| snapshot.phase == Phase::Holding)
    }

    /// Begins `id`, unless it was the newest before.
    pub fn begin(&mut self, id: &str) -> Result<Began, Fault> {
        if self.0.as_ref().is_some_and(|newest| newest.id == id) {
            return Ok(Began::Before);
        }
        self.refuse_if_active()?;
        self.0 = Some(Snapshot {
            id: id.to_owned(),
            phase: Phase::Preparing,
            stop: None,
            amounts: Amounts::default(),
            paused_us: 0,
        });
        Ok(Began::Now)
    }

    /// Somebody wants `id` to end. Whether that is still possible.
    pub fn cancel(&mut self, id: &str) -> bool {
        self.stop(Some(id), Stop::Cancelled)
    }

    /// The VM has ended, or is about to. Whether a snapshot is to end with it.
    pub fn vm_ended(&mut self) -> bool {
        self.stop(None, Stop::VmEnded)
    }

    fn stop(&mut self, id: Option<&str>, stop: Stop) -> bool {
        let Some(snapshot) = &mut self.0 else { return false };
        let stoppable = matches!(snapshot.phase, Phase::Preparing | Phase::Holding | Phase::Writing);
        if !stoppable || id.is_some_and(|id| id != snapshot.id) {
            return false;
        }
        snapshot.stop.get_or_insert(stop);
        true
    }

    /// The engine's step from one phase to the next.
    fn step(&mut self, from: &Phase, to: Phase) -> Result<&mut Snapshot, Fault> {
        let broken = || {
            Fault::new(
                Code::Internal,
                format!("a snapshot goes on to {to:?} without one in {from:?}"),
            )
        };
        let snapshot = self.0.as_mut().filter(|snapshot| snapshot.phase == *from);
        let snapshot = snapshot.ok_or_else(broken)?;
        if let Some(stop) = snapshot.stop {
            return Err(stop.fault());
        }
        snapshot.phase = to;
        Ok(snapshot)
    }

    /// The engine wants the VM to stand. On a fault it does not.
    pub fn hold(&mut self) -> Result<(), Fault> {
        self.step(&Phase::Preparing, Phase::Holding).map(drop)
    }

    /// The engine needs the VM to stand no longer, also where it is to stop, which it learns from a fault.
    pub fn taken(&mut self) -> Result<(), Fault> {
        if let Some(snapshot) = self
            .0
            .as_mut()
            .filter(|snapshot| snapshot.phase == Phase::Holding)
        {
            snapshot.phase = Phase::Writing;
        }
        self.step(&Phase::Writing, Phase::Writing).map(drop)
    }

    /// How long the VM stood.
    pub fn stood(&mut self, paused_us: u64) {
        if let Some(snapshot) = &mut self.0 {
            snapshot.paused_us = paused_us;
        }
    }

    /// How far the engine is.
    pub fn note(&mut self, amounts: Amounts) {
        if let Some(snapshot) = &mut self.0 {
            snapshot.amounts = amounts;
        }
    }

    /// All is written: `leased` says whether the VM's lease lives at this moment. False: it is to be asked again later.
    pub fn seal(&mut self, leased: bool) -> Result<bool, Fault> {
        if leased {
            return self.step(&Phase::Writing, Phase::Sealing).map(|_| true);
        }
        self.step(&Phase::Writing, Phase::Writing).map(|_| false)
    }

    /// The engine's last word.
    pub fn ended(&mut self, result: Result<Whole, Fault>) {
        let Some(snapshot) = self.0.as_mut() else { return };
        snapshot.phase = match (result, snapshot.stop) {
            (Ok(whole), None) if snapshot.phase == Phase::Sealing => Phase::Done(whole),
            (Ok(_), None) => Phase::Failed(Fault::new(Code::Internal, "it ended without its seal")),
            (_, Some(Stop::Cancelled)) => Phase::Cancelled,
            (_, Some(stop @ Stop::VmEnded)) => Phase::Failed(stop.fault()),
            (Err(fault), None) => Phase::Failed(fault),
        };
    }

    /// As it is told.
    pub fn told(&self) -> Option<VmmSnapshot> {
        let snapshot = self.0.as_ref()?;
        let (stage, reason) = match &snapshot.phase {
            Phase::Preparing | Phase::Holding | Phase::Writing | Phase::Sealing => {
                (SnapshotStage::Running, None)
            }
            Phase::Done(Whole::Named) => (SnapshotStage::Done, None),
            Phase::Done(Whole::Unnamed) => (SnapshotStage::Sealed, None),
            Phase::Cancelled => (SnapshotStage::Cancelled, None),
            Phase::Failed(fault) => (SnapshotStage::Failed, Some(fault.clone())),
        };
        Some(VmmSnapshot {
            id: snapshot.id.clone(),
            stage: stage.into(),
            bytes_done: snapshot.amounts.done,
            bytes_total: snapshot.amounts.total,
            paused_us: snapshot.paused_us,
            reason: reason.map(Into::into),
            bytes_stored: snapshot.amounts.stored,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Input {
        Begin(u8),
        Cancel(u8),
        VmEnded,
        Hold,
        Taken,
        Seal(bool),
        Ended(bool),
    }

    fn input() -> impl Strategy<Value = Input> {
        prop_oneof![
            3 => (0u8..3).prop_map(Input::Begin),
            1 => (0u8..3).prop_map(Input::Cancel),
            1 => Just(Input::VmEnded),
            4 => Just(Input::Hold),
            4 => Just(Input::Taken),
            3 => any::<bool>().prop_map(Input::Seal),
            2 => any::<bool>().prop_map(Input::Ended),
        ]
    }

    fn fault() -> Fault {
        Fault::new(Code::SnapshotFailed, "no room")
    }

    fn stage(snapshots: &Snapshots) -> SnapshotStage {
        snapshots
            .told()
            .map_or(SnapshotStage::Unspecified, |told| told.stage())
    }

    proptest! {
        #[test]
        fn it_is_done_only_by_every_step_in_order_and_what_was_stopped_before_its_seal_never_is(
            inputs in proptest::collection::vec(input(), 0..60),
            named in any::<bool>(),
        ) {
            let mut snapshots = Snapshots::default();
            // Kept without looking at the machine: how many of the steps were made, and whether a stop came in time.
            let (mut steps, mut stopped, mut active) = (0, false, None);
            for input in &inputs {
                match *input {
                    Input::Begin(id) => {
                        let known = stage(&snapshots) != SnapshotStage::Unspecified
                            && snapshots.told().unwrap().id == id.to_string();
                        let began = snapshots.begin(&id.to_string());
                        prop_assert_eq!(began.is_err(), active.is_some() && active != Some(id));
                        if began == Ok(Began::Now) {
                            prop_assert!(!known);
                            (steps, stopped, active) = (0, false, Some(id));
                        }
                    }
                    Input::Cancel(id) => {
                        let took = snapshots.cancel(&id.to_string());
                        prop_assert_eq!(took, active == Some(id) && steps < 3);
                        stopped |= took;
                    }
                    Input::VmEnded => {
                        let took = snapshots.vm_ended();
                        prop_assert_eq!(took, active.is_some() && steps < 3);
                        stopped |= took;
                    }
                    Input::Hold => {
                        let made = snapshots.hold().is_ok();
                        prop_assert_eq!(made, active.is_some() && steps == 0 && !stopped);
                        steps += i32::from(made);
                    }
                    Input::Taken => {
                        let stood = active.is_some() && steps == 1;
                        let made = snapshots.taken().is_ok();
                        prop_assert_eq!(made, active.is_some() && (1..=2).contains(&steps) && !stopped);
                        steps += i32::from(stood);
                    }
                    Input::Seal(leased) => {
                        let made = snapshots.seal(leased) == Ok(true);
                        prop_assert_eq!(made, leased && active.is_some() && steps == 2 && !stopped);
                        steps += i32::from(made);
                    }
                    Input::Ended(well) if active.is_some() => {
                        let (whole, told) = match named {
                            true => (Whole::Named, SnapshotStage::Done),
                            false => (Whole::Unnamed, SnapshotStage::Sealed),
                        };
                        snapshots.ended(if well { Ok(whole) } else { Err(fault()) });
                        let ended = stage(&snapshots);
                        prop_assert_eq!(ended == told, well && steps == 3 && !stopped);
                        prop_assert!(ended == told || matches!(ended, SnapshotStage::Failed | SnapshotStage::Cancelled));
                        active = None;
                    }
                    Input::Ended(_) => {}
                }
                prop_assert_eq!(snapshots.holds(), active.is_some() && steps == 1);
                prop_assert_eq!(snapshots.active().is_some(), active.is_some());
                prop_assert_eq!(snapshots.refuse_if_active().is_err(), active.is_some());
            }
        }
    }

    #[test]
    fn a_cancel_while_the_vm_stands_lets_nothing_run_before_the_engine_ends_it() {
        let mut snapshots = Snapshots::default();
        snapshots.begin("s1").unwrap();
        snapshots.hold().unwrap();
        assert!(snapshots.cancel("s1"));
        assert!(snapshots.holds(), "the engine may be reading the state");
        assert_eq!(stage(&snapshots), SnapshotStage::Running);
        let stopped = snapshots.taken().unwrap_err();
        assert_eq!(stopped.code, Code::Cancelled);
        assert!(!snapshots.holds());
        assert_eq!(
            stage(&snapshots),
            SnapshotStage::Running,
            "its engine has not ended"
        );
        snapshots.ended(Err(stopped));
        assert_eq!(stage(&snapshots), SnapshotStage::Cancelled);
    }

    #[test]
    fn without_a_lease_the_seal_waits_and_the_vms_end_is_the_snapshots() {
        let mut snapshots = Snapshots::default();
        snapshots.begin("s1").unwrap();
        snapshots.hold().unwrap();
        snapshots.taken().unwrap();
        assert_eq!(snapshots.seal(false), Ok(false));
        assert!(snapshots.vm_ended());
        let fault = snapshots.seal(true).unwrap_err();
        snapshots.ended(Err(fault));
        assert_eq!(
            snapshots.told().unwrap().reason.unwrap().code,
            Code::VmStopped.as_str()
        );
        assert_eq!(
            snapshots.begin("s1"),
            Ok(Began::Before),
            "an id is of one attempt"
        );
        assert_eq!(snapshots.begin("s2"), Ok(Began::Now));
    }
}
