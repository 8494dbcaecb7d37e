//! Drives migrations that are planned, and ends those that nobody ends.
//!
//! | it stands | for | then |
//! | --- | --- | --- |
//! | Planned | – | Preparing: the target's agent sees it |
//! | any, uncommitted | the target is declared down | abort `target_down` |
//! | any, source not paused | beyond the deadline that was asked for | abort `deadline_exceeded` |
//! | Planned, Preparing | `prepare_timeout_ms` | abort `target_not_ready` |
//! | PreCopy | `stall_timeout_ms` without any new figure from either side | abort `stalled` |
//! | PreCopy, source paused | `switchover_timeout_ms` | abort `switchover_timeout` |
//! | Committed | `RECEIPT_WAIT` | finish without a receipt |
//!
//! The two that carry it out abort sooner when they know that they cannot go on. An abort here may lose to a commit: the
//! first in the log wins. Lengths are counted from this leader's first look, so a change of leader only lengthens them.

use std::sync::Arc;
use std::time::Duration;

use drover_proto::v1::command::Kind;
use drover_proto::v1::{
    AbortMigrationRequest, AdvanceMigration, FinishMigration, Migration, MigrationPhase, Settings,
};
use drover_proto::{Code, Fault};
use drover_state::State;

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
            let target_up = state.host_is_up(&migration.to);
            next(migration, standing, target_up, state.settings(), now.unix_ms).map(|next| match next {
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
    Finish,
}

fn next(
    migration: &Migration,
    standing: Standing,
    target_up: bool,
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
    if !target_up {
        return abort(Code::TargetDown, format!("{} is declared down", migration.to));
    }
    let deadline_ms = migration
        .options
        .as_ref()
        .map_or(0, |options| options.deadline_ms);
    if deadline_ms > 0
        && standing.paused.is_none()
        && unix_ms.saturating_sub(migration.created_ms) > deadline_ms
    {
        return abort(
            Code::DeadlineExceeded,
            format!("not done within {deadline_ms} ms, as was asked"),
        );
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

    fn code(migration: &Migration, standing: Standing, target_up: bool) -> Option<Code> {
        match next(migration, standing, target_up, &default_settings(), 2_000) {
            Some(Next::Abort(fault)) => Some(fault.code),
            None => None,
            other => panic!("not an abort: {other:?}"),
        }
    }

    #[test]
    fn a_planned_migration_is_prepared() {
        let planned = migration(MigrationPhase::Planned);
        assert_eq!(
            next(&planned, standing(0, 0, None), true, &default_settings(), 0),
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
        assert_eq!(
            next(&committed, standing(30_000, 99_000, None), false, &settings, 0),
            None
        );
        assert_eq!(
            next(&committed, standing(30_001, 0, None), false, &settings, 0),
            Some(Next::Finish)
        );
    }
}
