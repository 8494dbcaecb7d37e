//! Holding a daemon at a pause point: see `drover-points` for the other half.

use std::fs;
use std::path::{Path, PathBuf};

/// The points folder of one party.
pub struct Points {
    dir: PathBuf,
}

/// Points of a migration's source VMM, in the order in which a migration meets them.
pub const SOURCE: [&str; 8] = [
    "source.before_connect",
    "source.after_hello",
    "source.round_end",
    "source.before_pause",
    "source.after_pause",
    "source.after_last_pages",
    "source.after_state",
    "source.ready_received",
];

/// Points of its target VMM.
pub const TARGET: [&str; 9] = [
    "target.listening",
    "target.after_hello",
    "target.round_end",
    "target.after_last_pages",
    "target.before_restore",
    "target.before_ready",
    "target.after_ready",
    "target.granted",
    "target.running",
];

/// Points of the agents: the second and the last are the source's, the others the target's.
pub const AGENT: [&str; 5] = [
    "agent.before_prepare",
    "agent.before_outgoing",
    "agent.before_commit",
    "agent.after_commit",
    "agent.before_outcome",
];

/// Points of the leader.
pub const CONTROLLER: [&str; 5] = [
    "controller.before_prepare",
    "controller.before_precopy",
    "controller.before_commit_propose",
    "controller.after_commit",
    "controller.before_finish",
];

/// The leader's point before an abort, which a migration meets only when it is aborted.
pub const CONTROLLER_ABORT: &str = "controller.before_abort";

/// The agent's point between a NIC's TAP and its VMM's being told, which no migration meets.
pub const AFTER_TAP: &str = "agent.after_tap";

/// The agent's point between a VMM's answer that it has a disk or a NIC and the report of it, which no migration meets.
pub const AFTER_ATTACH: &str = "agent.after_attach";

/// The agent's points before it tells a VMM to take a snapshot, and after the VMM has answered.
pub const BEFORE_SNAPSHOT: &str = "agent.before_snapshot";
/// See [`BEFORE_SNAPSHOT`].
pub const AFTER_SNAPSHOT: &str = "agent.after_snapshot";

/// The agent's points before and after it names the manifest of a snapshot that a VMM in its sandbox has sealed.
pub const BEFORE_NAMING: &str = "agent.before_naming";
/// See [`BEFORE_NAMING`].
pub const AFTER_NAMING: &str = "agent.after_naming";

/// The agent's points before it fills a volume from its image, and between that and the report of it.
pub const BEFORE_FILL: &str = "agent.before_fill";
/// See [`BEFORE_FILL`].
pub const AFTER_FILL: &str = "agent.after_fill";

/// The agent's point between the copy of a restored VM's disks and the start of its VMM.
pub const AFTER_RESTORE_COPY: &str = "agent.after_restore_copy";

/// The agent's point after it has heard that a restored run may begin, before it lets it.
pub const AFTER_BEGIN_RESTORE: &str = "agent.after_begin_restore";

/// The leader's point before it proposes that.
pub const BEFORE_BEGIN_RESTORE: &str = "controller.before_begin_restore";

/// The source's last point before it pauses: its guest writes on while it waits there.
pub const BEFORE_PAUSE: &str = "source.before_pause";

/// Every point that each migration meets, all parties.
pub fn all() -> impl Iterator<Item = &'static str> {
    SOURCE.into_iter().chain(TARGET).chain(AGENT).chain(CONTROLLER)
}

/// How far the migration is when it waits at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The source's guest still runs.
    BeforePause,
    /// The source has paused, the log does not hold the outcome.
    Paused,
    /// The hand-over is in the log.
    Committed,
}

/// The stage in which `point` is met.
pub fn stage(point: &str) -> Stage {
    match point {
        "source.after_pause"
        | "source.after_last_pages"
        | "source.after_state"
        | "source.ready_received"
        | "target.after_last_pages"
        | "target.before_restore"
        | "target.before_ready"
        | "target.after_ready"
        | "agent.before_commit"
        | "controller.before_commit_propose" => Stage::Paused,
        "target.granted"
        | "target.running"
        | "agent.after_commit"
        | "agent.before_outcome"
        | "controller.after_commit"
        | "controller.before_finish" => Stage::Committed,
        _ => Stage::BeforePause,
    }
}

impl Points {
    /// The points in `dir`, which it makes.
    pub fn new(dir: &Path) -> std::io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// The folder, for `DROVER_POINTS_DIR`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// From now on the party waits at `point`.
    pub fn hold(&self, point: &str) {
        let _ = fs::remove_file(self.reached_file(point));
        fs::write(self.dir.join(point), "").expect("the points folder can be written");
    }

    /// Whether the party has come to `point` since it was held.
    pub fn reached(&self, point: &str) -> bool {
        self.reached_file(point).exists()
    }

    /// Waits until the party has come to `point`.
    pub fn await_reached(&self, point: &str) {
        crate::await_some(&format!("point {point}"), || match self.reached(point) {
            true => Ok(()),
            false => Err("not reached".to_owned()),
        });
    }

    /// Lets the party go on from `point`.
    pub fn release(&self, point: &str) {
        let _ = fs::remove_file(self.dir.join(point));
    }

    fn reached_file(&self, point: &str) -> PathBuf {
        self.dir.join(format!("{point}.reached"))
    }
}
