//! How far each migration under way has come, as its two hosts report it: in the leader's memory only, so that no disk
//! write stands inside the blackout. A new leader knows nothing until the next report, which is a fraction of a second.
//!
//! What it does not do: it decides no outcome. The driver reads from it how long a migration has stood still.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use drover_proto::v1::{Migration, MigrationPhase, Progress};
use drover_state::limits::VMS_MAX;

/// Progress of all migrations under way.
#[derive(Debug, Default)]
pub struct ProgressTable {
    migrations: Mutex<BTreeMap<String, Entry>>,
}

#[derive(Debug)]
struct Entry {
    source: Option<Progress>,
    target: Option<Progress>,
    /// The replicated phase that `phase_since` is about.
    phase: MigrationPhase,
    phase_since: Instant,
    advanced: Instant,
    paused_since: Option<Instant>,
}

/// How long a migration has been where it is, as far as this leader has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// In its replicated phase.
    pub in_phase: Duration,
    /// Since either side reported anything new.
    pub without_progress: Duration,
    /// Since the source was reported paused; `None` before.
    pub paused: Option<Duration>,
}

/// Which side of a migration reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The host that the VM leaves.
    Source,
    /// The host that it goes to.
    Target,
}

impl ProgressTable {
    /// A side's report. Ignored for a migration whose hand-over is decided.
    pub fn report(&self, migration: &Migration, side: Side, progress: &Progress, now: Instant) {
        if drover_state::is_committed(migration) || drover_state::is_ended(migration) {
            return;
        }
        let mut table = self.lock();
        let Some(entry) = entry(&mut table, migration, now) else {
            return;
        };
        let slot = match side {
            Side::Source => &mut entry.source,
            Side::Target => &mut entry.target,
        };
        // The order of reports is not certain: one that is behind does not bring the phase back.
        let mut progress = *progress;
        if let Some(known) = slot {
            progress.set_phase(progress.phase().max(known.phase()));
        }
        if progress.phase() > MigrationPhase::Ready {
            progress.set_phase(MigrationPhase::Ready);
        }
        if slot.as_ref() != Some(&progress) {
            *slot = Some(progress);
            entry.advanced = entry.advanced.max(now);
        }
        if progress.phase() >= MigrationPhase::Switchover {
            entry.paused_since.get_or_insert(now);
        }
    }

    /// How long the migration has stood where it is. The first look counts as its beginning.
    pub fn standing(&self, migration: &Migration, now: Instant) -> Standing {
        let mut table = self.lock();
        let Some(entry) = entry(&mut table, migration, now) else {
            return Standing::default();
        };
        Standing {
            in_phase: now.saturating_duration_since(entry.phase_since),
            without_progress: now.saturating_duration_since(entry.advanced),
            paused: entry
                .paused_since
                .map(|since| now.saturating_duration_since(since)),
        }
    }

    /// Forgets every migration but those that `keep` names.
    pub fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.lock().retain(|id, _| keep(id));
    }

    /// Forgets everything: this controller leads no more, or leads anew.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// The furthest phase that is known, replicated or reported.
    pub fn phase(&self, migration: &Migration) -> MigrationPhase {
        let reported = |progress: &Option<Progress>| {
            progress
                .as_ref()
                .map_or(MigrationPhase::Unspecified, Progress::phase)
        };
        match self.lock().get(&migration.id) {
            Some(entry) if migration.phase() == MigrationPhase::PreCopy => migration
                .phase()
                .max(reported(&entry.source))
                .max(reported(&entry.target)),
            _ => migration.phase(),
        }
    }

    /// The migration as a client shall see it: the further of the two phases, and the source's figures, or the target's
    /// as long as there are none.
    pub fn merge(&self, mut migration: Migration) -> Migration {
        let phase = self.phase(&migration);
        if drover_state::is_ended(&migration) {
            return migration;
        }
        let figures = self
            .lock()
            .get(&migration.id)
            .and_then(|entry| entry.source.or(entry.target));
        if let Some(mut progress) = figures {
            progress.set_phase(phase);
            migration.progress = Some(progress);
        }
        migration.set_phase(phase);
        migration
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.migrations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The migration's entry, made or brought to its replicated phase. `None` when there are too many.
fn entry<'a>(
    table: &'a mut BTreeMap<String, Entry>,
    migration: &Migration,
    now: Instant,
) -> Option<&'a mut Entry> {
    let phase = migration.phase();
    if !table.contains_key(&migration.id) && table.len() >= VMS_MAX {
        return None;
    }
    let entry = table.entry(migration.id.clone()).or_insert_with(|| Entry {
        source: None,
        target: None,
        phase,
        phase_since: now,
        advanced: now,
        paused_since: None,
    });
    if entry.phase != phase {
        entry.phase = phase;
        entry.phase_since = now;
        entry.advanced = entry.advanced.max(now);
    }
    Some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn migration(phase: MigrationPhase) -> Migration {
        let mut migration = Migration {
            id: "m1".into(),
            ..Migration::default()
        };
        migration.set_phase(phase);
        migration
    }

    fn progress(phase: MigrationPhase, bytes_sent: u64) -> Progress {
        let mut progress = Progress {
            bytes_sent,
            ..Progress::default()
        };
        progress.set_phase(phase);
        progress
    }

    #[test]
    fn the_further_of_the_two_phases_is_shown_with_the_sources_figures() {
        let (table, now) = (ProgressTable::default(), Instant::now());
        let copying = migration(MigrationPhase::PreCopy);
        table.report(&copying, Side::Target, &progress(MigrationPhase::Ready, 1), now);
        table.report(
            &copying,
            Side::Source,
            &progress(MigrationPhase::Switchover, 7),
            now,
        );
        let shown = table.merge(copying);
        assert_eq!(
            (shown.phase(), shown.progress.unwrap().bytes_sent),
            (MigrationPhase::Ready, 7)
        );
        let done = migration(MigrationPhase::Done);
        assert_eq!(table.merge(done.clone()), done);
    }

    #[test]
    fn a_late_report_does_not_bring_a_phase_back() {
        let (table, now) = (ProgressTable::default(), Instant::now());
        let copying = migration(MigrationPhase::PreCopy);
        table.report(
            &copying,
            Side::Source,
            &progress(MigrationPhase::Switchover, 7),
            now,
        );
        table.report(&copying, Side::Source, &progress(MigrationPhase::PreCopy, 6), now);
        assert_eq!(table.phase(&copying), MigrationPhase::Switchover);
    }

    #[test]
    fn standing_still_is_counted_from_the_last_new_figure_of_either_side() {
        let (table, start) = (ProgressTable::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let copying = migration(MigrationPhase::PreCopy);
        table.report(
            &copying,
            Side::Source,
            &progress(MigrationPhase::PreCopy, 1),
            at(0),
        );
        table.report(
            &copying,
            Side::Target,
            &progress(MigrationPhase::PreCopy, 1),
            at(100),
        );
        table.report(
            &copying,
            Side::Source,
            &progress(MigrationPhase::PreCopy, 1),
            at(900),
        );
        let standing = table.standing(&copying, at(1_000));
        assert_eq!(standing.without_progress, Duration::from_millis(900));
        assert_eq!(
            (standing.in_phase, standing.paused),
            (Duration::from_millis(1_000), None)
        );
        table.report(
            &copying,
            Side::Source,
            &progress(MigrationPhase::Switchover, 1),
            at(1_000),
        );
        assert_eq!(
            table.standing(&copying, at(1_250)).paused,
            Some(Duration::from_millis(250))
        );
    }
}
