//! Drives migrations that are planned, and ends those that nobody ends.
//!
//! | it stands | for | then |
//! | --- | --- | --- |
//! | Planned | – | Preparing: the target's agent sees it |
//! | any, uncommitted | the target is declared down | abort `target_down` |
//! | any, source not paused | beyond the deadline that was asked for | abort `deadline_exceeded`, unless the next line applies |
//! | PreCopy, source not paused, post-copy allowed and possible | beyond that deadline | the source is asked to switch to post-copy, once |
//! | the same, asked | `switchover_timeout_ms` beyond the deadline | abort `deadline_exceeded` |
//! | Planned, Preparing | `prepare_timeout_ms` | abort `target_not_ready` |
//! | PreCopy | `stall_timeout_ms` without any new figure from either side | abort `stalled` |
//! | PreCopy, source paused | `switchover_timeout_ms` | abort `switchover_timeout` |
//! | Committed | `RECEIPT_WAIT` | finish without a receipt |
//! | PostCopy | – | nothing: it ends with the target's receipt, or with the run |
//!
//! The two that carry it out abort sooner when they know that they cannot go on. An abort here may lose to a commit: the
//! first in the log wins. At the deadline of a migration that may go on by post-copy the source's VMM alone can switch, and may be doing so at
//! this moment; so this asks, gives it the time that a switchover may take, and then ends it all the same: a source that
//! does not answer does not keep a migration alive. Lengths are counted from this leader's first look, so a change of leader only lengthens them.

use std::sync::Arc;
use std::time::Duration;

use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    AbortMigrationRequest, AdvanceMigration, FinishMigration, Migration, MigrationPhase, Settings,
    WantPostCopy,
};
use drover_proto::{Code, Fault};
use drover_state::State;
use drover_state::preflight::post_copy_obstacle;

use super::{Now, Reconciler};
use crate::api::LeaderMemory;
use crate::api::progress::Standing;

/// How long a committed migration waits for its receipt: the target's agent may be restarting.
const RECEIPT_WAIT: Duration = Duration::from_secs(30);

pub(super) struct Migrations {
    memory: Arc<LeaderMemory>,
}

impl Migrations {
    pub(super) fn new(memory: Arc<LeaderMemory>) -> Self {
        Self { memory }
    }
}

impl Reconciler for Migrations {
    const NAME: &'static str = "migrations";
    const PERIOD: Duration = Duration::from_millis(100);

    fn begin(&mut self, _term: u64) {
        self.memory.progress.clear();
        self.memory.finished.begin();
    }

    fn decide(&mut self, state: &State, now: Now) -> Vec<Kind> {
        self.memory.finished.look(state);
        let progress = &self.memory.progress;
        progress.retain(|id| {
            state
                .migration(id)
                .is_some_and(|migration| !drover_state::is_ended(migration))
        });
        let step = |migration: &Migration| {
            let standing = progress.standing(migration, now.instant);
            let target = Target {
                up: state.host_is_up(&migration.to),
                obstacle: state.host(&migration.to).and_then(post_copy_obstacle),
            };
            next(migration, standing, target, state.settings(), now.unix_ms).map(|next| match next {
                Next::Prepare => Kind::AdvanceMigration(AdvanceMigration {
                    id: migration.id.clone(),
                    phase: MigrationPhase::Preparing.into(),
                    target_addr: String::new(),
                }),
                Next::Abort(fault) => Kind::AbortMigration(AbortMigrationRequest {
                    host: String::new(),
                    migration: migration.id.clone(),
                    reason: Some(fault.into()),
                    phase: progress.phase(migration).into(),
                }),
                Next::WantPostCopy => Kind::WantPostCopy(WantPostCopy {
                    id: migration.id.clone(),
                }),
                Next::Finish => Kind::FinishMigration(FinishMigration {
                    id: migration.id.clone(),
                    receipt: None,
                }),
            })
        };
        state.migrations_under_way().filter_map(step).collect()
    }
}

#[derive(Debug, PartialEq)]
enum Next {
    Prepare,
    Abort(Fault),
    WantPostCopy,
    Finish,
}

/// What is known of the target's host.
#[derive(Clone, Copy)]
struct Target<'a> {
    up: bool,
    /// Why it cannot take a VM by post-copy.
    obstacle: Option<&'a str>,
}

fn next(
    migration: &Migration,
    standing: Standing,
    target: Target<'_>,
    settings: &Settings,
    unix_ms: u64,
) -> Option<Next> {
    let abort = |code, message: String| Some(Next::Abort(Fault::new(code, message)));
    let beyond = |length: Duration, limit_ms: u64| length > Duration::from_millis(limit_ms);
    let phase = migration.phase();
    if phase >= MigrationPhase::Committed {
        return (phase == MigrationPhase::Committed && standing.in_phase > RECEIPT_WAIT)
            .then_some(Next::Finish);
    }
    if !target.up {
        return abort(Code::TargetDown, format!("{} is declared down", migration.to));
    }
    if standing.paused.is_none()
        && let Some(next) = at_the_deadline(migration, target, settings, unix_ms)
    {
        return Some(next);
    }
    match (phase, standing.paused) {
        (MigrationPhase::Planned, _) => Some(Next::Prepare),
        (MigrationPhase::Preparing, _) if beyond(standing.in_phase, settings.prepare_timeout_ms) => {
            let message = format!(
                "{} did not listen within {} ms",
                migration.to, settings.prepare_timeout_ms
            );
            abort(Code::TargetNotReady, message)
        }
        (MigrationPhase::PreCopy, Some(paused)) if beyond(paused, settings.switchover_timeout_ms) => {
            let message = format!(
                "paused for {} ms without a commit",
                settings.switchover_timeout_ms
            );
            abort(Code::SwitchoverTimeout, message)
        }
        (MigrationPhase::PreCopy, None) if beyond(standing.without_progress, settings.stall_timeout_ms) => {
            abort(
                Code::Stalled,
                format!("no progress for {} ms", settings.stall_timeout_ms),
            )
        }
        _ => None,
    }
}

/// What the deadline asks for, if it has passed: of a migration that may go on by post-copy, the switch first.
fn at_the_deadline(
    migration: &Migration,
    target: Target<'_>,
    settings: &Settings,
    unix_ms: u64,
) -> Option<Next> {
    let options = migration.options.unwrap_or_default();
    let deadline_ms = options.deadline_ms;
    let over_by = unix_ms
        .saturating_sub(migration.created_ms)
        .saturating_sub(deadline_ms);
    if deadline_ms == 0 || over_by == 0 {
        return None;
    }
    let can_switch = options.allow_postcopy && migration.phase() == MigrationPhase::PreCopy;
    let message = format!("not done within {deadline_ms} ms, as was asked");
    let fault = match target.obstacle {
        Some(why) if can_switch => Fault::new(
            Code::PostCopyUnavailable,
            format!(
                "post-copy is allowed, but {} cannot: {why}; without it: {message}",
                migration.to
            ),
        ),
        None if can_switch && !migration.post_copy_wanted => return Some(Next::WantPostCopy),
        None if can_switch && over_by <= settings.switchover_timeout_ms => return None,
        None if can_switch => Fault::new(
            Code::DeadlineExceeded,
            format!(
                "{message}, and the source did not switch to post-copy within {} ms after that",
                settings.switchover_timeout_ms
            ),
        ),
        _ => Fault::new(Code::DeadlineExceeded, message),
    };
    Some(Next::Abort(fault))
}

#[cfg(test)]
mod tests {
    use drover_proto::v1::MigrationOptions;
    use drover_state::default_settings;

    use super::*;

    fn migration(phase: MigrationPhase) -> Migration {
        let mut migration = Migration {
            id: "m1".into(),
            to: "host2".into(),
            created_ms: 1_000,
            ..Migration::default()
        };
        migration.set_phase(phase);
        migration
    }

    fn standing(in_phase_ms: u64, without_progress_ms: u64, paused_ms: Option<u64>) -> Standing {
        Standing {
            in_phase: Duration::from_millis(in_phase_ms),
            without_progress: Duration::from_millis(without_progress_ms),
            paused: paused_ms.map(Duration::from_millis),
        }
    }

    const UP: Target<'_> = Target {
        up: true,
        obstacle: None,
    };

    fn code(migration: &Migration, standing: Standing, up: bool) -> Option<Code> {
        let target = Target { up, ..UP };
        match next(migration, standing, target, &default_settings(), 2_000) {
            Some(Next::Abort(fault)) => Some(fault.code),
            None => None,
            other => panic!("not an abort: {other:?}"),
        }
    }

    #[test]
    fn a_planned_migration_is_prepared() {
        let planned = migration(MigrationPhase::Planned);
        assert_eq!(
            next(&planned, standing(0, 0, None), UP, &default_settings(), 0),
            Some(Next::Prepare)
        );
    }

    #[test]
    fn each_bound_aborts_with_its_own_code_and_not_before() {
        use MigrationPhase::{PreCopy, Preparing};
        let copying = migration(PreCopy);
        assert_eq!(code(&migration(Preparing), standing(20_000, 0, None), true), None);
        assert_eq!(
            code(&migration(Preparing), standing(20_001, 0, None), true),
            Some(Code::TargetNotReady)
        );
        assert_eq!(code(&copying, standing(99_000, 15_000, None), true), None);
        assert_eq!(
            code(&copying, standing(99_000, 15_001, None), true),
            Some(Code::Stalled)
        );
        assert_eq!(code(&copying, standing(99_000, 99_000, Some(10_000)), true), None);
        assert_eq!(
            code(&copying, standing(99_000, 99_000, Some(10_001)), true),
            Some(Code::SwitchoverTimeout)
        );
        assert_eq!(
            code(&copying, standing(0, 0, None), false),
            Some(Code::TargetDown)
        );
    }

    #[test]
    fn a_deadline_aborts_only_while_the_guest_still_runs_at_the_source() {
        let mut copying = migration(MigrationPhase::PreCopy);
        copying.options = Some(MigrationOptions {
            deadline_ms: 900,
            ..MigrationOptions::default()
        });
        assert_eq!(
            code(&copying, standing(0, 0, None), true),
            Some(Code::DeadlineExceeded)
        );
        assert_eq!(code(&copying, standing(0, 0, Some(1)), true), None);
    }

    #[test]
    fn after_the_commit_it_only_goes_forward() {
        let committed = migration(MigrationPhase::Committed);
        let settings = default_settings();
        let down = Target { up: false, ..UP };
        assert_eq!(
            next(&committed, standing(30_000, 99_000, None), down, &settings, 0),
            None
        );
        assert_eq!(
            next(&committed, standing(30_001, 0, None), down, &settings, 0),
            Some(Next::Finish)
        );
        let lacking = migration(MigrationPhase::PostCopy);
        let long = standing(3_600_000, 3_600_000, None);
        assert_eq!(next(&lacking, long, down, &settings, 3_600_000), None);
    }

    #[test]
    fn at_the_deadline_a_source_that_may_switch_to_post_copy_is_asked_to_and_has_the_time_for_it_and_no_more()
    {
        let settings = default_settings();
        let mut copying = migration(MigrationPhase::PreCopy);
        copying.options = Some(MigrationOptions {
            deadline_ms: 1_000,
            allow_postcopy: true,
            ..MigrationOptions::default()
        });
        let at = |migration: &Migration, paused, target, unix_ms| {
            next(migration, standing(0, 0, paused), target, &settings, unix_ms)
        };
        let code = |next: Option<Next>| match next {
            Some(Next::Abort(fault)) => fault.code,
            other => panic!("not an abort: {other:?}"),
        };
        assert_eq!(at(&copying, None, UP, 2_000), None);
        assert_eq!(at(&copying, None, UP, 2_001), Some(Next::WantPostCopy));
        assert_eq!(at(&copying, Some(1), UP, 2_001), None, "it is switching");
        let asked = Migration {
            post_copy_wanted: true,
            ..copying.clone()
        };
        let latest = 2_000 + settings.switchover_timeout_ms;
        assert_eq!(at(&asked, None, UP, latest), None);
        assert_eq!(code(at(&asked, None, UP, latest + 1)), Code::DeadlineExceeded);
        let cannot = Target {
            obstacle: Some("userfaultfd is denied"),
            ..UP
        };
        assert_eq!(code(at(&copying, None, cannot, 2_001)), Code::PostCopyUnavailable);
        // Nobody listens yet: there is nothing to switch.
        let preparing = Migration {
            phase: MigrationPhase::Preparing.into(),
            ..copying
        };
        assert_eq!(code(at(&preparing, None, UP, 2_001)), Code::DeadlineExceeded);
    }
}
