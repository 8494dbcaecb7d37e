//! What of a VMM's info a controller has to hear: pure. The caller sends one report after the other, each until it is
//! answered, so that an older state never arrives after a newer one.
//!
//! Ends are not reported here: whether the end of a VMM is a failure is for [`crate::converge`] to say, which knows what is
//! desired. Nor is the pause for a hand-over: it must not cost a write in the log inside the blackout.

use drover_proto::v1::{MigrationPhase, Reason, Receipt, VmState, VmmInfo, VmmState};
use drover_proto::{Code, Fault};

use crate::key::Key;

/// One report.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// A side of a migration cannot carry on.
    Abort {
        /// The migration.
        migration: String,
        /// Why.
        reason: Reason,
        /// The phase this side was in.
        phase: MigrationPhase,
    },
    /// The target listens.
    Target {
        /// The migration.
        migration: String,
        /// Where.
        addr: String,
    },
    /// The target runs: what the migration cost.
    Receipt {
        /// The migration.
        migration: String,
        /// The figures.
        receipt: Receipt,
    },
    /// The VM's state.
    Vm {
        /// RUNNING or PAUSED.
        state: VmState,
        /// Why it is paused.
        reason: Option<Reason>,
    },
}

/// What was answered already.
#[derive(Clone, Debug, Default)]
pub struct Reported {
    aborts: Option<String>,
    target: bool,
    receipt: bool,
    vm: Option<VmState>,
}

impl Reported {
    /// Takes note that `report` was answered.
    pub fn answered(&mut self, report: &Report) {
        match report {
            Report::Abort { migration, .. } => self.aborts = Some(migration.clone()),
            Report::Target { .. } => self.target = true,
            Report::Receipt { .. } => self.receipt = true,
            Report::Vm { state, .. } => self.vm = Some(*state),
        }
    }

    /// The most urgent report that is due.
    pub fn due(&self, key: &Key, info: &VmmInfo, had_right: bool) -> Option<Report> {
        let migration = info.migration.as_ref();
        if let Some(migration) = migration
            && let Some(reason) = &migration.failure
            && self.aborts.as_ref() != Some(&migration.id)
        {
            let phase = migration
                .progress
                .as_ref()
                .map_or(MigrationPhase::Unspecified, |progress| progress.phase());
            return Some(Report::Abort {
                migration: migration.id.clone(),
                reason: reason.clone(),
                phase,
            });
        }
        if let Some(id) = key.migration() {
            if info.state() == VmmState::Incoming && !info.listen_addr.is_empty() && !self.target {
                return Some(Report::Target {
                    migration: id.to_owned(),
                    addr: info.listen_addr.clone(),
                });
            }
            if let Some(receipt) = migration
                .filter(|migration| migration.id == id)
                .and_then(|m| m.receipt.clone())
                && !self.receipt
            {
                return Some(Report::Receipt {
                    migration: id.to_owned(),
                    receipt,
                });
            }
        }
        let state = match info.state() {
            VmmState::Running => VmState::Running,
            VmmState::Frozen => VmState::Paused,
            _ => return None,
        };
        if !had_right || self.vm == Some(state) {
            return None;
        }
        let lease_over = || Fault::new(Code::NoLeader, "the host's lease ran out and was not renewed").into();
        let reason = (state == VmState::Paused).then(|| info.reason.clone().unwrap_or_else(lease_over));
        Some(Report::Vm { state, reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_proto::v1::{Progress, VmmMigration};

    fn all_due(key: &Key, info: &VmmInfo) -> Vec<Report> {
        let mut reported = Reported::default();
        std::iter::from_fn(|| {
            let report = reported.due(key, info, true)?;
            reported.answered(&report);
            Some(report)
        })
        .take(10)
        .collect()
    }

    fn info(state: VmmState) -> VmmInfo {
        VmmInfo {
            state: state.into(),
            ..VmmInfo::default()
        }
    }

    #[test]
    fn a_state_is_reported_once_and_again_when_it_changed() {
        let key = Key::start("vm1", 1);
        let mut reported = Reported::default();
        let running = reported.due(&key, &info(VmmState::Running), true).unwrap();
        assert_eq!(
            running,
            Report::Vm {
                state: VmState::Running,
                reason: None
            }
        );
        reported.answered(&running);
        assert_eq!(reported.due(&key, &info(VmmState::Running), true), None);
        let frozen = reported.due(&key, &info(VmmState::Frozen), true).unwrap();
        assert!(matches!(
            &frozen,
            Report::Vm {
                state: VmState::Paused,
                reason: Some(_)
            }
        ));
        reported.answered(&frozen);
        assert_eq!(reported.due(&key, &info(VmmState::Running), true), Some(running));
    }

    #[test]
    fn neither_the_pause_for_a_hand_over_nor_an_end_is_reported_here() {
        for state in [
            VmmState::HandedOver,
            VmmState::Failed,
            VmmState::Exited,
            VmmState::Waiting,
            VmmState::Ready,
        ] {
            assert_eq!(all_due(&Key::start("vm1", 1), &info(state)), []);
        }
    }

    #[test]
    fn a_target_reports_its_address_and_after_it_runs_the_receipt_before_its_state() {
        let key = Key::incoming("vm1", 2, "m1");
        let listening = VmmInfo {
            listen_addr: "127.0.0.1:9".into(),
            ..info(VmmState::Incoming)
        };
        assert_eq!(
            all_due(&key, &listening),
            [Report::Target {
                migration: "m1".into(),
                addr: "127.0.0.1:9".into()
            }]
        );
        let receipt = Receipt {
            rounds: 3,
            ..Receipt::default()
        };
        let migration = VmmMigration {
            id: "m1".into(),
            receipt: Some(receipt.clone()),
            ..VmmMigration::default()
        };
        let runs = VmmInfo {
            migration: Some(migration),
            ..info(VmmState::Running)
        };
        assert_eq!(
            all_due(&key, &runs),
            [
                Report::Receipt {
                    migration: "m1".into(),
                    receipt
                },
                Report::Vm {
                    state: VmState::Running,
                    reason: None
                }
            ]
        );
    }

    #[test]
    fn a_failure_comes_first_with_its_phase() {
        let progress = Progress {
            phase: MigrationPhase::PreCopy.into(),
            ..Progress::default()
        };
        let failure = Reason::from(Fault::new(Code::LinkLost, "cut"));
        let migration = VmmMigration {
            id: "m2".into(),
            outgoing: true,
            progress: Some(progress),
            failure: Some(failure.clone()),
            receipt: None,
            post_copy: false,
        };
        let info = VmmInfo {
            migration: Some(migration),
            ..info(VmmState::Running)
        };
        let due = all_due(&Key::start("vm1", 1), &info);
        let abort = Report::Abort {
            migration: "m2".into(),
            reason: failure,
            phase: MigrationPhase::PreCopy,
        };
        assert_eq!(due[0], abort);
        assert_eq!(due.len(), 2);
    }
}
