//! What may come of a kill: the table of ARCHITECTURE §3, written out. Pure.

use crate::points::{Stage, stage};

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the parties of a migration, by their names")]
pub enum Victim {
    Leader,
    SourceVmm,
    TargetVmm,
    SourceAgent,
    TargetAgent,
}

/// How a migration and its VM can end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// Aborted; the VM runs on where it was.
    Stayed,
    /// Done; the VM runs on the target.
    Moved,
    /// Aborted, and the VM failed with its source's VMM.
    LostWithSource,
    /// Done, and the VM failed with its target's VMM.
    LostWithTarget,
}

/// Points at which the target, or its agent, can go on to the commit while the one who reached the point waits.
pub const UNDECIDED: [&str; 5] = [
    "source.after_state",
    "source.ready_received",
    "target.after_ready",
    "agent.before_commit",
    "controller.before_commit_propose",
];

/// Points at which the target has all it needs, though it has not said so.
pub const COMPLETE: [&str; 3] = [
    "target.after_last_pages",
    "target.before_restore",
    "target.before_ready",
];

/// What may come of the end of `victim` at `point`.
pub fn of_kill(victim: Victim, point: &str) -> &'static [Ending] {
    use Ending::{LostWithSource, LostWithTarget, Moved, Stayed};
    let committed = stage(point) == Stage::Committed;
    let undecided = UNDECIDED.contains(&point);
    match victim {
        Victim::Leader if committed => &[Moved],
        Victim::Leader if stage(point) == Stage::BeforePause => &[Moved],
        // The source stays paused until a leader decides; the next one may find that it took too long.
        Victim::Leader => &[Moved, Stayed],
        Victim::SourceVmm if committed => &[Moved],
        Victim::SourceVmm if undecided || COMPLETE.contains(&point) => &[LostWithSource, Moved],
        Victim::SourceVmm => &[LostWithSource],
        Victim::TargetVmm if committed => &[LostWithTarget],
        Victim::TargetVmm if undecided => &[Stayed, LostWithTarget],
        Victim::TargetVmm => &[Stayed],
        Victim::SourceAgent | Victim::TargetAgent if committed => &[Moved],
        Victim::SourceAgent | Victim::TargetAgent => &[Moved, Stayed],
    }
}

/// What may come of a kill at a moment that nobody knows, if it hit a process.
pub fn of_kill_anywhere(victim: Victim) -> &'static [Ending] {
    use Ending::{LostWithSource, LostWithTarget, Moved, Stayed};
    match victim {
        Victim::Leader | Victim::SourceAgent | Victim::TargetAgent => &[Moved, Stayed],
        Victim::SourceVmm => &[LostWithSource, Moved],
        Victim::TargetVmm => &[Stayed, LostWithTarget],
    }
}

/// What may come of a link between the two hosts that is cut at `point`.
pub fn of_cut(point: &str) -> &'static [Ending] {
    use Ending::{Moved, Stayed};
    match stage(point) {
        Stage::Committed => &[Moved],
        Stage::Paused if UNDECIDED.contains(&point) || COMPLETE.contains(&point) => &[Moved, Stayed],
        Stage::BeforePause | Stage::Paused => &[Stayed],
    }
}

/// Whether there is such a party at the point: no target's VMM before it is prepared, and the source's may be over at the end.
pub fn is_there(victim: Victim, point: &str) -> bool {
    match victim {
        Victim::TargetVmm => !["controller.before_prepare", "agent.before_prepare"].contains(&point),
        Victim::SourceVmm => point != "controller.before_finish",
        _ => true,
    }
}
