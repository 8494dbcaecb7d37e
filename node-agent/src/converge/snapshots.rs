//! What is to become of a run's snapshot, and of a run that begins as one: one step at a time. Pure.
//!
//! ```text
//!   to be taken, the VMM knows nothing of it ──► make its folder, tell the VMM     (once: see `Seen::snapshot_taken`)
//!   to be taken, the VMM is done, has failed ──► report it
//!   to be taken, the VMM has sealed it ────────► name its manifest, report it
//!   not to be taken, the VMM takes it ─────────► cancel it
//!   restored, verified, not begun ─────────────► ask for the beginning; it may run when that is in the log
//!   to be removed, no VMM here writes it ──────► remove it, report that
//! ```
//!
//! What a VMM has done is read from what it says, so an agent that comes after one that died finishes what that began.

use drover_proto::v1::{
    HostDesired, Removal, ReportSnapshotRequest, SnapshotNews, SnapshotProgress, SnapshotStage, VmDesired,
    VmmSnapshot, VmmState, Volume,
};
use drover_proto::{Code, Fault};

use super::{Action, Alive, Life, Observed, Seen, with_slots};

/// The next step of the run's snapshot, if there is one.
pub fn next(observed: &Observed, seen: &Seen, alive: &Alive, wanted: &VmDesired) -> Option<Action> {
    let key = seen.key.clone();
    let knows = alive.snapshot.as_ref();
    let writes = knows.filter(|known| known.stage() == SnapshotStage::Running);
    match (&wanted.snapshot, knows) {
        (Some(asked), Some(known)) if asked.id == known.id => {
            if seen.snapshot_told.as_ref() == Some(&asked.id) {
                return None;
            }
            let report = Box::new(ended(wanted.epoch, known)?);
            Some(match known.stage() {
                SnapshotStage::Sealed => Action::CompleteSnapshot {
                    key,
                    snapshot: Box::new(asked.clone()),
                    report,
                },
                _ => Action::ReportSnapshot { key, report },
            })
        }
        // A desired state that is out of date knows of no snapshot yet.
        (None, _) if writes.is_some() && !observed.confirmed => Some(Action::Confirm),
        (_, Some(known)) if writes.is_some() => Some(Action::CancelSnapshot {
            key,
            id: known.id.clone(),
        }),
        (Some(asked), _) => {
            let done = [&seen.snapshot_taken, &seen.snapshot_told];
            let once = done.into_iter().flatten().any(|id| *id == asked.id);
            let runs = alive.state == VmmState::Running && seen.had_right;
            let spec = wanted.spec.as_ref()?;
            (runs && !once).then(|| Action::TakeSnapshot {
                key,
                snapshot: Box::new(asked.clone()),
                disks: with_slots(spec)
                    .disks
                    .into_iter()
                    .filter(|disk| !disk.read_only)
                    .map(|disk| disk.slot)
                    .collect(),
            })
        }
        (None, _) => None,
    }
}

/// What is reported of a snapshot that the VMM has ended.
fn ended(epoch: u64, known: &VmmSnapshot) -> Option<ReportSnapshotRequest> {
    let (news, reason) = match known.stage() {
        SnapshotStage::Unspecified | SnapshotStage::Running => return None,
        SnapshotStage::Done | SnapshotStage::Sealed => (SnapshotNews::Done, None),
        SnapshotStage::Failed => (SnapshotNews::Failed, known.reason.clone()),
        SnapshotStage::Cancelled => {
            let why = Fault::new(Code::Cancelled, "its VMM was told to end it");
            (SnapshotNews::Failed, Some(why.into()))
        }
    };
    Some(ReportSnapshotRequest {
        snapshot: known.id.clone(),
        epoch,
        news: news.into(),
        progress: Some(progress(known)),
        bytes_stored: known.bytes_stored,
        paused_us: known.paused_us,
        reason,
        ..ReportSnapshotRequest::default()
    })
}

/// How far the VMM is.
pub fn progress(known: &VmmSnapshot) -> SnapshotProgress {
    SnapshotProgress {
        bytes_done: known.bytes_done,
        bytes_total: known.bytes_total,
    }
}

/// A name of what is to be removed that no VM has.
pub fn name_of(removal: &Removal) -> String {
    let Removal {
        pool,
        snapshot,
        volume,
        content,
    } = removal;
    format!("{pool}/{snapshot}/{volume}/{content}")
}

/// What of it can be removed now.
pub fn removals(desired: &HostDesired, observed: &Observed) -> impl Iterator<Item = Action> {
    let writes = |seen: &Seen, id: &str| match &seen.life {
        Life::Alive(alive) => alive
            .snapshot
            .as_ref()
            .is_some_and(|known| known.id == id && known.stage() == SnapshotStage::Running),
        _ => false,
    };
    let is_due = move |removal: &&Removal| {
        let done = observed.told.contains(&(name_of(removal), 0));
        let written =
            !removal.snapshot.is_empty() && observed.vmms.iter().any(|seen| writes(seen, &removal.snapshot));
        !done && !written
    };
    // An order that is out of date names what may be another's by now.
    let due = desired.removals.iter().filter(is_due);
    due.map(|removal| match observed.confirmed {
        true => Action::Remove {
            removal: removal.clone(),
        },
        false => Action::Confirm,
    })
}

/// What is removed where this content of the volume is.
pub fn content_of(volume: &Volume) -> Removal {
    Removal {
        pool: volume.pool.clone(),
        volume: volume.name.clone(),
        content: volume.content,
        ..Removal::default()
    }
}

/// What can be filled now. An order that is out of date would make what nobody removes any more.
pub fn fills(desired: &HostDesired, observed: &Observed) -> impl Iterator<Item = Action> {
    let is_due = |volume: &&Volume| {
        let told = (name_of(&content_of(volume)), 0);
        !observed.told.contains(&told)
    };
    let due = desired.fills.iter().filter(is_due);
    due.map(|volume| match observed.confirmed {
        true => Action::Fill {
            volume: Box::new(volume.clone()),
        },
        false => Action::Confirm,
    })
}

#[cfg(test)]
mod tests {
    use drover_proto::v1::{Migration, MigrationPhase, Restore, Snapshot, VmDisk, VmSpec};

    use super::*;
    use crate::converge::{Attaching, converge};
    use crate::key::Key;

    fn knows(id: &str, stage: SnapshotStage) -> Option<VmmSnapshot> {
        Some(VmmSnapshot {
            id: id.into(),
            stage: stage.into(),
            ..VmmSnapshot::default()
        })
    }

    fn seen(state: VmmState, snapshot: Option<VmmSnapshot>) -> Seen {
        Seen {
            nics: Vec::new(),
            key: Key::start("vm1", 3),
            life: Life::Alive(Alive {
                state,
                reason: None,
                outgoing: None,
                devices: None,
                snapshot,
            }),
            had_right: true,
            commit_refused: false,
            outgoing_taken: None,
            switch_taken: None,
            commit_taken: false,
            end_reported: false,
            attaching: Attaching::default(),
            snapshot_taken: None,
            snapshot_told: None,
        }
    }

    fn desired(asked: Option<&str>) -> HostDesired {
        let disk = |volume: &str, read_only| VmDisk {
            volume: volume.into(),
            read_only,
            ..VmDisk::default()
        };
        let mut vm = VmDesired {
            vm: "vm1".into(),
            epoch: 3,
            spec: Some(VmSpec {
                disks: vec![disk("base", true), disk("data", false)],
                ..VmSpec::default()
            }),
            snapshot: asked.map(|id| Snapshot {
                id: id.into(),
                ..Snapshot::default()
            }),
            ..VmDesired::default()
        };
        vm.set_role(drover_proto::v1::VmRole::Run);
        HostDesired {
            revision: 1,
            vms: vec![vm],
            ..HostDesired::default()
        }
    }

    fn step(desired: &HostDesired, seen: &Seen, confirmed: bool) -> String {
        let observed = Observed {
            host: "host1".into(),
            vmms: vec![seen.clone()],
            confirmed,
            ..Observed::default()
        };
        let actions = converge(desired, &observed);
        let word = |action: &Action| match action {
            Action::TakeSnapshot { snapshot, disks, .. } => format!("take {} {disks:?}", snapshot.id),
            Action::CancelSnapshot { id, .. } => format!("cancel {id}"),
            Action::ReportSnapshot { report, .. } => {
                format!("report {} {:?}", report.snapshot, report.news())
            }
            Action::CompleteSnapshot { snapshot, report, .. } => {
                format!(
                    "name {}, report {} {:?}",
                    snapshot.id,
                    report.snapshot,
                    report.news()
                )
            }
            Action::BeginRestore { restore, .. } => format!("begin {restore}"),
            Action::Remove { removal } => format!("remove {}{}", removal.snapshot, removal.volume),
            Action::Fill { volume } => format!("fill {} {}", volume.name, volume.content),
            other => format!("{other:?}"),
        };
        actions.iter().map(word).collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn a_snapshot_is_begun_once_and_its_end_reported_once() {
        let wanted = desired(Some("s7"));
        let mut vmm = seen(VmmState::Running, None);
        assert_eq!(
            step(&wanted, &vmm, true),
            "take s7 [2]",
            "what it only reads is not in it"
        );
        assert_eq!(step(&wanted, &seen(VmmState::Frozen, None), true), "");
        vmm.snapshot_taken = Some("s7".into());
        assert_eq!(step(&wanted, &vmm, true), "", "its info is still to come");
        // An earlier one, which has ended, is in nobody's way.
        let after = seen(VmmState::Running, knows("s6", SnapshotStage::Done));
        assert_eq!(step(&wanted, &after, true), "take s7 [2]");
        for (stage, want) in [
            (SnapshotStage::Running, ""),
            (SnapshotStage::Done, "report s7 Done"),
            (SnapshotStage::Sealed, "name s7, report s7 Done"),
            (SnapshotStage::Failed, "report s7 Failed"),
            (SnapshotStage::Cancelled, "report s7 Failed"),
        ] {
            let mut vmm = seen(VmmState::Running, knows("s7", stage));
            assert_eq!(step(&wanted, &vmm, true), want);
            vmm.snapshot_told = Some("s7".into());
            assert_eq!(step(&wanted, &vmm, true), "");
        }
    }

    #[test]
    fn what_nobody_wants_is_cancelled_by_a_word_that_is_not_out_of_date() {
        let vmm = seen(VmmState::Running, knows("s7", SnapshotStage::Running));
        assert_eq!(step(&desired(None), &vmm, false), "Confirm");
        assert_eq!(step(&desired(None), &vmm, true), "cancel s7");
        assert_eq!(step(&desired(Some("s8")), &vmm, true), "cancel s7");
        for stage in [SnapshotStage::Cancelled, SnapshotStage::Sealed] {
            let ended = seen(VmmState::Running, knows("s7", stage));
            assert_eq!(step(&desired(None), &ended, true), "", "{stage:?}");
        }
    }

    #[test]
    fn a_snapshot_that_nobody_wants_ends_before_the_run_is_moved() {
        let mut wanted = desired(None);
        let mut migration = Migration {
            id: "m5".into(),
            from: "host1".into(),
            epoch: 4,
            target_addr: "10.0.0.2:7000".into(),
            ..Migration::default()
        };
        migration.set_phase(MigrationPhase::PreCopy);
        wanted.vms[0].migration = Some(migration);
        let mut vmm = seen(VmmState::Running, knows("s7", SnapshotStage::Running));
        assert_eq!(step(&wanted, &vmm, true), "cancel s7");
        vmm.life = seen(VmmState::Running, knows("s7", SnapshotStage::Cancelled)).life;
        assert!(step(&wanted, &vmm, true).starts_with("StartOutgoing"));
    }

    #[test]
    fn a_restored_run_asks_before_it_begins_and_only_once_it_is_verified() {
        let mut wanted = desired(None);
        let mut vmm = seen(VmmState::Waiting, None);
        vmm.had_right = false;
        wanted.vms[0].restore = Some(Restore {
            number: 9,
            ..Restore::default()
        });
        assert_eq!(step(&wanted, &vmm, true), "begin 9");
        wanted.vms[0].restore = None;
        assert!(
            step(&wanted, &vmm, true).starts_with("Committed"),
            "it is in the log"
        );
        wanted.vms[0].restore = Some(Restore::default());
        let mut failed = seen(VmmState::Failed, None);
        failed.had_right = false;
        assert!(
            step(&wanted, &failed, true).starts_with("ReportEnd"),
            "and not begun"
        );
    }

    #[test]
    fn a_volume_is_filled_by_a_word_that_is_not_out_of_date_and_once() {
        let wanted = HostDesired {
            fills: vec![Volume {
                name: "root".into(),
                pool: "default".into(),
                content: 7,
                ..Volume::default()
            }],
            ..HostDesired::default()
        };
        let mut observed = Observed::default();
        let only = |observed: &Observed| converge(&wanted, observed).pop();
        assert_eq!(only(&observed), Some(Action::Confirm));
        observed.confirmed = true;
        let Some(Action::Fill { volume }) = only(&observed) else {
            panic!("{:?}", only(&observed));
        };
        observed.told.insert((name_of(&content_of(&volume)), 0));
        assert_eq!(only(&observed), None);
    }

    #[test]
    fn a_folder_that_a_vmm_writes_in_is_removed_after_that() {
        let mut wanted = desired(None);
        wanted.removals = vec![
            Removal {
                pool: "default".into(),
                snapshot: "s7".into(),
                ..Removal::default()
            },
            Removal {
                pool: "default".into(),
                volume: "data".into(),
                ..Removal::default()
            },
        ];
        let vmm = seen(VmmState::Running, knows("s7", SnapshotStage::Running));
        assert_eq!(step(&wanted, &vmm, true), "cancel s7, remove data");
        let vmm = seen(VmmState::Running, knows("s7", SnapshotStage::Cancelled));
        assert_eq!(step(&wanted, &vmm, true), "remove s7, remove data");
    }
}
