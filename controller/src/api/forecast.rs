//! Dry runs: everything that planning a migration would check, and how it would go.
//!
//! The checks are the plan's own (`drover_state::preflight`). How it would go is for the VMM to say, which alone sees what its guest
//! writes and which would apply the rules; what it cannot know, how fast the link to the target is, comes from the
//! receipts of the migrations between the two hosts. Nothing is written: neither the log nor the VM's record changes.
//!
//! The leader remembers a forecast for a while in its memory. If the same migration is asked for within that time, it carries
//! the forecast along into its record, so that its receipt can be held against it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use drover_proto::v1::{
    Finding, Forecast, ForecastRequest, MigrateVmRequest, MigrationForecast, MigrationOptions,
    MigrationPhase, PlanMigration, Reason,
};
use drover_proto::{Code, Fault};
use drover_state::limits::VMS_MAX;
use drover_state::preflight::{Preflight, preflight};
use drover_state::{State, epoch_of, host_of};
use tokio::time::timeout;

use super::console::{AGENT_TIMEOUT, agent, answered, place_of};
use super::on_leader::Call;

/// How long the VMM watches its guest, and a little more.
pub(super) const WATCHING: Duration = Duration::from_millis(1_500);
/// So long a forecast is taken for one of the migration that is asked for.
const REMEMBERED_FOR: Duration = Duration::from_secs(600);
/// So many of the newest receipts between two hosts say how fast their link is.
const RECEIPTS: usize = 3;
/// A receipt of less says more about latencies than about the link, bytes.
const RECEIPT_BYTES_MIN: u64 = 32 << 20;

/// Forecasts of the last minutes, one a VM.
#[derive(Debug, Default)]
pub struct Forecasts {
    by_vm: Mutex<BTreeMap<String, Kept>>,
}

#[derive(Debug)]
struct Kept {
    asked: MigrateVmRequest,
    epoch: u64,
    made: Instant,
    forecast: Forecast,
}

impl Forecasts {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Kept>> {
        self.by_vm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, asked: MigrateVmRequest, epoch: u64, forecast: Forecast, now: Instant) {
        let mut by_vm = self.lock();
        by_vm.retain(|_, kept| now.saturating_duration_since(kept.made) < REMEMBERED_FOR);
        if by_vm.len() < VMS_MAX {
            let kept = Kept {
                epoch,
                made: now,
                forecast,
                asked,
            };
            by_vm.insert(kept.asked.vm.clone(), kept);
        }
    }

    /// The forecast of exactly what is asked for, of this run of the VM, if it is not too old.
    fn find(&self, asked: &MigrateVmRequest, epoch: u64, now: Instant) -> Option<Forecast> {
        let by_vm = self.lock();
        let kept = by_vm.get(&asked.vm)?;
        let same = !asked.upgrade
            && kept.asked.to == asked.to
            && kept.asked.options.unwrap_or_default() == asked.options.unwrap_or_default()
            && kept.epoch == epoch
            && now.saturating_duration_since(kept.made) < REMEMBERED_FOR;
        same.then(|| kept.forecast.clone())
    }
}

/// What a dry run expected of this migration, if there was one shortly before.
pub(super) fn remembered(call: &Call, asked: &MigrateVmRequest) -> Option<Forecast> {
    let epoch = call
        .api
        .consensus
        .read(|state| state.vm(&asked.vm).map(epoch_of))?;
    call.api.memory.forecasts.find(asked, epoch, Instant::now())
}

/// What is asked for as it is planned: an upgrade's target is the host that the VM is on, as far as this leader knows. `apply` refuses
/// it should the VM be elsewhere by then.
pub(super) fn plan_of(call: &Call, asked: &MigrateVmRequest) -> PlanMigration {
    let mut plan = PlanMigration {
        vm: asked.vm.clone(),
        to: asked.to.clone(),
        options: asked.options,
        forecast: None,
        upgrade: asked.upgrade,
    };
    if plan.upgrade && plan.to.is_empty() {
        let host = |state: &State| state.vm(&plan.vm).map(|vm| host_of(vm).to_owned());
        plan.to = call.api.consensus.read(host).unwrap_or_default();
    }
    plan
}

/// The dry run. Of an upgrade there are the findings only: it sends no page, so nothing depends on what the guest writes.
pub(super) async fn forecast(call: &Call, asked: MigrateVmRequest) -> Result<MigrationForecast, Fault> {
    let plan = plan_of(call, &asked);
    let (found, link) = call.api.consensus.read(|state| {
        let found = preflight(state, &plan)?;
        let link = measured(state, &found.from, &found.to, found.options.plaintext);
        Ok::<_, Fault>((found, link))
    })?;
    let mut answer = told(&asked.vm, &found);
    if found.refusal().is_none() && !asked.upgrade {
        match watched(call, &asked, &found, link).await {
            Ok(forecast) => answer.forecast = Some(forecast),
            Err(fault) if fault.code == Code::NoLeader => return Err(fault),
            Err(fault) => answer.unknown = Some(Reason::from(fault)),
        }
    }
    Ok(answer)
}

fn told(vm: &str, found: &Preflight) -> MigrationForecast {
    let finding = |finding: &drover_state::preflight::Finding| {
        let (message, code) = match &finding.outcome {
            Ok(message) => (message.clone(), String::new()),
            Err(fault) => (fault.message.clone(), fault.code.as_str().to_owned()),
        };
        Finding {
            check: finding.check.to_owned(),
            passed: finding.outcome.is_ok(),
            message,
            code,
        }
    };
    let refusal = found.refusal().cloned();
    MigrationForecast {
        vm: vm.to_owned(),
        from: found.from.clone(),
        to: found.to.clone(),
        options: Some(found.options),
        findings: found.findings.iter().map(finding).collect(),
        refusal_field: refusal
            .as_ref()
            .map(|fault| fault.field.clone())
            .unwrap_or_default(),
        refusal: refusal.map(Reason::from),
        ..MigrationForecast::default()
    }
}

/// Asks the VMM by way of its host's agent.
async fn watched(
    call: &Call,
    asked: &MigrateVmRequest,
    found: &Preflight,
    link: Option<u64>,
) -> Result<Forecast, Fault> {
    let place = place_of(call, &asked.vm)?;
    let request = ForecastRequest {
        vm: asked.vm.clone(),
        epoch: place.epoch,
        options: Some(MigrationOptions {
            allow_postcopy: found.options.allow_postcopy && found.no_post_copy().is_none(),
            ..found.options
        }),
        bandwidth_bytes_per_s: link.unwrap_or_default(),
    };
    let mut agent = agent(call, &place)?;
    let answer = timeout(WATCHING + AGENT_TIMEOUT, agent.forecast(request)).await;
    let mut forecast = answered(
        &place,
        answer.map(|answer| answer.map(tonic::Response::into_inner)),
    )?;
    call.still_leads()?;
    let source = if link.is_some() { "receipts" } else { "default" };
    source.clone_into(&mut forecast.bandwidth_source);
    forecast.made_ms = super::now_ms();
    // As the source would end it.
    if let (Some(why), Some(reason)) = (found.no_post_copy(), &mut forecast.reason) {
        Code::PostCopyUnavailable.as_str().clone_into(&mut reason.code);
        reason.message = format!("{}; without it: {}", why.message, reason.message);
    }
    let memory = &call.api.memory.forecasts;
    memory.keep(asked.clone(), place.epoch, forecast.clone(), Instant::now());
    Ok(forecast)
}

/// What the link between two hosts carried in the last migrations that used it without a cap, bytes a second.
fn measured(state: &State, one: &str, other: &str, plaintext: bool) -> Option<u64> {
    let between = |from: &str, to: &str| (from == one && to == other) || (from == other && to == one);
    let (mut bytes, mut took_us) = (0_u128, 0_u128);
    let receipts = state
        .migrations()
        .rev()
        .filter(|migration| {
            let capped = migration
                .options
                .is_some_and(|options| options.bandwidth_mib_s > 0);
            migration.phase() == MigrationPhase::Done && between(&migration.from, &migration.to) && !capped
        })
        .filter_map(|migration| migration.receipt.as_ref())
        .filter(|receipt| receipt.plaintext == plaintext && receipt.bytes >= RECEIPT_BYTES_MIN)
        .take(RECEIPTS);
    for receipt in receipts {
        let blackout = receipt.blackout_us.unwrap_or_default();
        let idle = blackout.total.saturating_sub(blackout.last_pages);
        bytes += u128::from(receipt.bytes);
        took_us += u128::from(receipt.total_ms) * 1_000;
        took_us = took_us.saturating_sub(idle.into());
    }
    let rate = (bytes * 1_000_000).checked_div(took_us)?;
    Some(u64::try_from(rate).unwrap_or(u64::MAX)).filter(|rate| *rate > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(to: &str, max_downtime_ms: u32) -> MigrateVmRequest {
        MigrateVmRequest {
            request_id: format!("any-{to}-{max_downtime_ms}"),
            vm: "vm1".into(),
            to: to.into(),
            options: Some(MigrationOptions {
                max_downtime_ms,
                ..MigrationOptions::default()
            }),
            upgrade: false,
        }
    }

    #[test]
    fn a_forecast_goes_along_with_exactly_the_migration_it_was_made_for() {
        let (forecasts, now) = (Forecasts::default(), Instant::now());
        let forecast = Forecast {
            total_ms: 7,
            ..Forecast::default()
        };
        forecasts.keep(asked("host2", 50), 3, forecast.clone(), now);
        let mut same = asked("host2", 50);
        same.request_id = "another".into();
        assert_eq!(forecasts.find(&same, 3, now), Some(forecast));
        assert_eq!(
            forecasts.find(&asked("host3", 50), 3, now),
            None,
            "another target"
        );
        assert_eq!(forecasts.find(&asked("host2", 60), 3, now), None, "other options");
        assert_eq!(forecasts.find(&asked("host2", 50), 4, now), None, "another run");
        let late = now + REMEMBERED_FOR;
        assert_eq!(forecasts.find(&asked("host2", 50), 3, late), None, "too old");
    }
}
