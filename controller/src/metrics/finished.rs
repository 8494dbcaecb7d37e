//! Counts the migrations that end while this controller leads. Each ends under one leader, so the sum over all controllers counts it
//! once; one that ends just when the lead changes may be counted by nobody.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use drover_proto::Code;
use drover_proto::v1::{Migration, MigrationPhase};
use drover_state::State;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Upper bounds of the blackout's buckets, seconds: around the usual intents of 10 to 300 ms they lie close.
const BLACKOUT_BUCKETS: [f64; 15] = [
    0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 5.0,
];
/// Upper bounds of the whole migration's buckets, seconds.
const DURATION_BUCKETS: [f64; 13] = [
    0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0,
];

/// How it ended, and by which stable code if it was aborted: as many series as there are codes, at most.
type Ending = [(&'static str, &'static str); 2];

/// See the module. Cheap to share.
#[derive(Debug)]
pub struct Finished {
    looked: Mutex<Option<Looked>>,
    endings: Family<Ending, Counter>,
    duration: Histogram,
    blackout: Histogram,
    sent: Counter,
}

/// What the last look saw.
#[derive(Debug, Default)]
struct Looked {
    under_way: BTreeSet<String>,
    /// Of the newest migration.
    number: u64,
}

impl Default for Finished {
    fn default() -> Self {
        Self {
            looked: Mutex::default(),
            endings: Family::default(),
            duration: Histogram::new(DURATION_BUCKETS),
            blackout: Histogram::new(BLACKOUT_BUCKETS),
            sent: Counter::default(),
        }
    }
}

impl Finished {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "migrations_finished",
            "Migrations that ended while this controller led, by result and by the code of what aborted them",
            self.endings.clone(),
        );
        registry.register(
            "migration_duration_seconds",
            "From the source's connect until the guest ran at the target, of migrations that were done",
            self.duration.clone(),
        );
        registry.register(
            "migration_blackout_seconds",
            "How long the guest stood still, of migrations that were done",
            self.blackout.clone(),
        );
        registry.register(
            "migration_transferred_bytes",
            "Bytes on the wire, source to target, of migrations that were done",
            self.sent.clone(),
        );
    }

    /// This controller begins to lead: what ended before was for others to count.
    pub fn begin(&self) {
        *self.looked.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Counts what ended since the last look.
    pub fn look(&self, state: &State) {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = state.migrations().next_back().map_or(0, number);
        let Some(looked) = looked.as_mut() else {
            let under_way = state
                .migrations()
                .filter(|migration| !drover_state::is_ended(migration));
            *looked = Some(Looked {
                under_way: under_way.map(|migration| migration.id.clone()).collect(),
                number: newest,
            });
            return;
        };
        let new = state.migrations().rev();
        let new = new.take_while(|migration| number(migration) > looked.number);
        looked.under_way.extend(new.map(|migration| migration.id.clone()));
        looked.number = newest;
        looked.under_way.retain(|id| {
            let Some(migration) = state.migration(id) else {
                return false;
            };
            let ended = drover_state::is_ended(migration);
            if ended {
                self.count(migration);
            }
            !ended
        });
    }

    fn count(&self, migration: &Migration) {
        // A VM that was lost in a post-copy is done with a reason.
        let code = migration.reason.as_ref().map(|reason| reason.code.as_str());
        let code = code.map(|code| Code::parse(code).map_or("other", Code::as_str));
        if migration.phase() != MigrationPhase::Done {
            let code = code.unwrap_or("other");
            self.endings
                .get_or_create(&[("result", "aborted"), ("code", code)])
                .inc();
            return;
        }
        self.endings
            .get_or_create(&[("result", "done"), ("code", code.unwrap_or(""))])
            .inc();
        // None: the target's agent was gone for long after the commit.
        let Some(receipt) = &migration.receipt else {
            return;
        };
        self.duration
            .observe(Duration::from_millis(receipt.total_ms).as_secs_f64());
        self.sent.inc_by(receipt.bytes);
        if let Some(blackout) = &receipt.blackout_us {
            self.blackout
                .observe(Duration::from_micros(blackout.total).as_secs_f64());
        }
    }
}

/// Migrations are numbered in the order in which they were planned: "m7".
fn number(migration: &Migration) -> u64 {
    let digits = migration.id.strip_prefix('m');
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use drover_proto::v1::command::Kind;
    use drover_proto::v1::{
        AbortMigrationRequest, CreateVm, PlaceVm, PlanMigration, Reason, ReportVmRequest, VmState,
    };

    use super::*;
    use crate::reconcile::tests_support::{apply, cluster, vm_spec};

    fn plan(state: &mut State, vm: &str) {
        apply(
            state,
            Kind::PlanMigration(PlanMigration {
                vm: vm.into(),
                to: "host2".into(),
                ..PlanMigration::default()
            }),
        );
    }

    fn abort(state: &mut State, id: &str, code: &str) {
        let reason = Reason {
            code: code.into(),
            message: "because".into(),
        };
        apply(
            state,
            Kind::AbortMigration(AbortMigrationRequest {
                migration: id.into(),
                reason: Some(reason),
                ..AbortMigrationRequest::default()
            }),
        );
    }

    #[test]
    fn each_end_is_counted_once_by_who_led_then_even_when_no_look_saw_it_under_way() {
        let (mut state, finished) = (state_with_vm(), Finished::default());
        plan(&mut state, "vm1");
        abort(&mut state, "m1", "cancelled");
        finished.look(&state);
        let count = |code| {
            finished
                .endings
                .get_or_create(&[("result", "aborted"), ("code", code)])
                .get()
        };
        assert_eq!(count("cancelled"), 0, "it ended before this controller led");
        plan(&mut state, "vm1");
        finished.look(&state);
        abort(&mut state, "m2", "cancelled");
        finished.look(&state);
        finished.look(&state);
        assert_eq!(count("cancelled"), 1);
        plan(&mut state, "vm1");
        abort(&mut state, "m3", "link_lost");
        finished.look(&state);
        assert_eq!((count("cancelled"), count("link_lost")), (1, 1));
        finished.begin();
        finished.look(&state);
        assert_eq!((count("cancelled"), count("link_lost")), (1, 1));
    }

    fn state_with_vm() -> State {
        let mut state = cluster();
        let create = CreateVm {
            spec: Some(vm_spec("vm1", 256)),
            start: true,
        };
        apply(&mut state, Kind::CreateVm(create));
        let place = PlaceVm {
            vm: "vm1".into(),
            host: "host1".into(),
            expected_epoch: 0,
        };
        apply(&mut state, Kind::PlaceVm(place));
        let mut runs = ReportVmRequest {
            host: "host1".into(),
            vm: "vm1".into(),
            epoch: 1,
            ..ReportVmRequest::default()
        };
        runs.set_state(VmState::Running);
        apply(&mut state, Kind::ReportVm(runs));
        state
    }

    #[test]
    fn a_receipt_goes_into_the_histograms() {
        let finished = Finished::default();
        let mut done = Migration {
            receipt: Some(drover_proto::v1::Receipt {
                total_ms: 1_500,
                bytes: 7,
                blackout_us: Some(drover_proto::v1::Blackout {
                    total: 12_000,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Migration::default()
        };
        done.set_phase(MigrationPhase::Done);
        finished.count(&done);
        let mut registry = Registry::with_prefix("drover");
        finished.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "drover_migrations_finished_total{result=\"done\",code=\"\"} 1",
            "drover_migration_duration_seconds_bucket{le=\"2.0\"} 1",
            "drover_migration_blackout_seconds_bucket{le=\"0.01\"} 0",
            "drover_migration_blackout_seconds_bucket{le=\"0.015\"} 1",
            "drover_migration_transferred_bytes_total 7",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
