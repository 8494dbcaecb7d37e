//! How far each migration under way has come, as its two hosts report it: in the leader's memory only, so that no disk
//! write stands inside the blackout. A new leader knows nothing until the next report, which is a fraction of a second.
//!
//! What it does not do: it decides no outcome. The driver reads from it how long a migration has stood still.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use drover_proto::v1::{Migration, MigrationPhase, Progress, StreamProgress};
use drover_state::limits::{STREAMS_MAX, VMS_MAX};
use tokio::sync::watch;

/// Progress of all migrations under way.
#[derive(Debug, Default)]
pub struct ProgressTable {
    migrations: Mutex<BTreeMap<String, Entry>>,
    news: watch::Sender<u64>,
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
    /// A side's report. Ignored for a migration whose hand-over is decided, but for the target's in a post-copy.
    pub fn report(&self, migration: &Migration, side: Side, progress: &Progress, now: Instant) {
        let lacks = migration.phase() == MigrationPhase::PostCopy && side == Side::Target;
        if !lacks && drover_state::is_committed(migration) || drover_state::is_ended(migration) {
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
        let mut progress = progress.clone();
        if let Some(known) = slot {
            progress.set_phase(progress.phase().max(known.phase()));
        }
        if progress.phase() > MigrationPhase::Ready {
            progress.set_phase(MigrationPhase::Ready);
        }
        // What a host tells beyond the possible is dropped.
        progress.by_stream.truncate(STREAMS_MAX as usize);
        if progress.phase() >= MigrationPhase::Switchover {
            entry.paused_since.get_or_insert(now);
        }
        if slot.as_ref().map(advance) != Some(advance(&progress)) {
            entry.advanced = entry.advanced.max(now);
        }
        if slot.as_ref() != Some(&progress) {
            *slot = Some(progress);
            drop(table);
            self.news.send_modify(|count| *count = count.wrapping_add(1));
        }
    }

    /// Changes with every figure that is new.
    pub fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
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
        let figures = self.lock().get(&migration.id).and_then(|entry| match phase {
            // Then only the target knows what it lacks.
            MigrationPhase::PostCopy => entry.target.clone(),
            _ => entry.source.as_ref().or(entry.target.as_ref()).cloned(),
        });
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

/// What of a report shows that something moved. How long a stream has been stalled changes just because nothing does.
fn advance(progress: &Progress) -> Progress {
    let still = |stream: &StreamProgress| StreamProgress {
        number: stream.number,
        bytes: stream.bytes,
        ..StreamProgress::default()
    };
    Progress {
        by_stream: progress.by_stream.iter().map(still).collect(),
        ..*progress
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

    #[test]
    fn a_stream_that_tells_how_long_it_has_been_stalled_is_no_progress() {
        let (table, start) = (ProgressTable::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let copying = migration(MigrationPhase::PreCopy);
        let stalled = |bytes, stalled_ms| Progress {
            by_stream: vec![StreamProgress {
                bytes,
                bytes_per_s: 10_000 - stalled_ms,
                stalled_ms,
                ..StreamProgress::default()
            }],
            ..progress(MigrationPhase::PreCopy, 1)
        };
        for ms in [0, 1_000, 2_000] {
            table.report(&copying, Side::Source, &stalled(7, ms), at(ms));
        }
        let shown = table.merge(copying.clone()).progress.unwrap();
        assert_eq!(shown.by_stream[0].stalled_ms, 2_000, "it is shown all the same");
        assert_eq!(
            table.standing(&copying, at(3_000)).without_progress,
            Duration::from_millis(3_000)
        );
        table.report(&copying, Side::Source, &stalled(8, 0), at(3_000));
        assert_eq!(
            table.standing(&copying, at(3_000)).without_progress,
            Duration::ZERO
        );
    }

    #[test]
    fn whoever_waits_for_news_hears_of_new_figures_only_and_of_no_more_streams_than_there_can_be() {
        let (table, now) = (ProgressTable::default(), Instant::now());
        let mut news = table.news();
        let copying = migration(MigrationPhase::PreCopy);
        let mut told = progress(MigrationPhase::PreCopy, 1);
        told.by_stream = vec![StreamProgress::default(); 1_000];
        table.report(&copying, Side::Source, &told, now);
        assert!(news.has_changed().unwrap());
        news.mark_unchanged();
        table.report(&copying, Side::Source, &told, now);
        assert!(!news.has_changed().unwrap());
        assert_eq!(table.merge(copying).progress.unwrap().by_stream.len(), 16);
    }
}
