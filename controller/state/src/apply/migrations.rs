//! A migration's entries.
//!
//! ```text
//!   PLANNED ──> PREPARING ──> PRE_COPY ──commit──> COMMITTED ──> DONE
//!      └────────────┴────────────┴──abort──> ABORTED
//!                                └──commit, pages missing──> POST_COPY ──> DONE; with a reason, if the run ended before they were there
//! ```
//!
//! An upgrade, whose source and target are two VMMs of one host, goes the same way; its PRE_COPY copies nothing.
//!
//! Whichever of commit and abort comes first in the log wins, and the other is answered with the outcome. The commit
//! raises the VM's epoch and moves its placement in one step, so at no entry do two epochs hold. SWITCHOVER and READY
//! are not entries: no disk write but the commit's own stands inside the blackout.

use drover_proto::v1::{
    AbortMigrationRequest, AdvanceMigration, CommandResponse, CommitHandoverRequest, FinishMigration,
    Forecast, Migration, MigrationPhase, Placement, PlanMigration, Reason, Receipt, VmState, WantPostCopy,
};
use drover_proto::{Code, Fault, LOCAL_ADDR};

use super::{Applied, Effect, Tx, bounded, reason};
use crate::limits::MIGRATIONS_ENDED_MAX;
use crate::preflight::{Preflight, post_copy_obstacle, preflight};
use crate::state::{epoch_of, host_of, is_committed, is_ended, migration_number};
use crate::validate::{self, quoted};

impl Tx<'_> {
    pub(super) fn plan_migration(&mut self, plan: &PlanMigration) -> Applied {
        let found = preflight(self.state, plan)?;
        if let Some(fault) = found.refusal() {
            return Err(fault.clone());
        }
        let Preflight {
            from, to, options, ..
        } = found;
        let epoch = epoch_of(self.known_vm("vm", &plan.vm)?) + 1;
        let number = self.state.next_migration;
        let id = format!("m{number}");
        let mut migration = Migration {
            id: id.clone(),
            vm: plan.vm.clone(),
            from: from.clone(),
            to: to.clone(),
            epoch,
            options: Some(options),
            created_ms: self.now_ms,
            changed_ms: self.now_ms,
            requested_by: self.caller.to_owned(),
            forecast: plan.forecast.as_ref().map(bounded_forecast),
            ..Migration::default()
        };
        migration.set_phase(MigrationPhase::Planned);
        self.state.next_migration += 1;
        self.state.migrations.insert(number, migration);
        let vm = self.vm_mut(&plan.vm);
        vm.migration.clone_from(&id);
        vm.last_migration.clone_from(&id);
        let caller = self.caller;
        let way = way(&from, &to);
        self.migration_event(
            "planned",
            &id,
            format!("{}: {way}, asked for by {caller}", plan.vm),
        );
        Ok(self.migration_response(&id, true))
    }

    pub(super) fn advance_migration(&mut self, advance: &AdvanceMigration) -> Applied {
        let migration = self.known_migration(&advance.id)?;
        let (from, to) = (migration.phase(), advance.phase());
        if is_ended(migration) || is_committed(migration) {
            return Err(ended(migration));
        }
        if from == to && (advance.target_addr.is_empty() || advance.target_addr == migration.target_addr) {
            return Ok(self.migration_response(&advance.id, true));
        }
        let next = match from {
            MigrationPhase::Planned => MigrationPhase::Preparing,
            _ => MigrationPhase::PreCopy,
        };
        if to != next || from == to {
            let message = format!(
                "{} is {}; it cannot go to {}",
                advance.id,
                phase_name(from),
                phase_name(to)
            );
            return Err(Fault::new(Code::InvalidArgument, message).field("phase"));
        }
        let addr = &advance.target_addr;
        let (is_addr, right) = if migration.is_upgrade() {
            (addr == LOCAL_ADDR, "\"local\" for an upgrade")
        } else {
            let parsed = addr.parse::<std::net::SocketAddr>();
            (parsed.is_ok(), "the ip:port where the target listens")
        };
        if to == MigrationPhase::PreCopy && !is_addr {
            let message = format!("target_addr is {}; it is {right}", quoted(addr));
            return Err(Fault::new(Code::InvalidArgument, message).field("target_addr"));
        }
        let now_ms = self.now_ms;
        let migration = self.migration_mut(&advance.id);
        migration.set_phase(to);
        migration.target_addr.clone_from(addr);
        migration.changed_ms = now_ms;
        self.migration_event(
            &phase_name(to).replace('-', "_"),
            &advance.id,
            format!("{} is {}", advance.id, phase_name(to)),
        );
        Ok(self.migration_response(&advance.id, true))
    }

    /// The source switches to post-copy when its agent has told it. Until the commit this changes nothing but what is wanted.
    pub(super) fn want_post_copy(&mut self, want: &WantPostCopy) -> Applied {
        self.go_on_by_post_copy(want).map_err(|fault| fault.field("id"))
    }

    fn go_on_by_post_copy(&mut self, want: &WantPostCopy) -> Applied {
        let migration = self.known_migration(&want.id)?;
        let id = &want.id;
        if !migration.options.is_some_and(|options| options.allow_postcopy) {
            let message = format!(
                "id is {id}; it was begun without allow_postcopy: cancel it and begin again with --allow-postcopy"
            );
            return Err(Fault::new(Code::PostCopyNotAllowed, message));
        }
        if migration.phase() == MigrationPhase::PostCopy || migration.post_copy_wanted && !is_ended(migration)
        {
            return Ok(self.migration_response(id, true));
        }
        if is_ended(migration) || is_committed(migration) {
            return Err(ended(migration));
        }
        if let Some(why) = self.state.host(&migration.to).and_then(post_copy_obstacle) {
            let message = format!("{} cannot take a VM by post-copy: {why}", migration.to);
            return Err(Fault::new(Code::PostCopyUnavailable, message));
        }
        let (now_ms, caller) = (self.now_ms, self.caller);
        let message = format!("{} is to go on by post-copy, asked for by {caller}", migration.vm);
        let migration = self.migration_mut(id);
        migration.post_copy_wanted = true;
        migration.changed_ms = now_ms;
        self.migration_event("post_copy_wanted", id, message);
        Ok(self.migration_response(id, true))
    }

    pub(super) fn commit_handover(&mut self, commit: &CommitHandoverRequest) -> Applied {
        let checks_epoch = !drover_points::seeded_bug("no-epoch-check");
        let migration = self.known_migration(&commit.migration)?;
        for (field, given, is) in [
            ("vm", &commit.vm, &migration.vm),
            ("host", &commit.host, &migration.to),
        ] {
            if given != is {
                let message = format!(
                    "{field} is {}; migration {} has {is}",
                    quoted(given),
                    commit.migration
                );
                return Err(Fault::new(Code::InvalidArgument, message).field(field));
            }
        }
        if checks_epoch && commit.epoch != migration.epoch {
            let message = format!(
                "epoch is {}; migration {} is for {}",
                commit.epoch, commit.migration, migration.epoch
            );
            return Err(Fault::new(Code::StaleEpoch, message).field("epoch"));
        }
        match migration.phase() {
            MigrationPhase::Committed | MigrationPhase::PostCopy | MigrationPhase::Done => {
                // Whether that epoch is still the VM's is what its grants say.
                return Ok(self.migration_response(&commit.migration, true));
            }
            MigrationPhase::Aborted => return Ok(self.migration_response(&commit.migration, false)),
            MigrationPhase::PreCopy => {}
            phase => {
                let message = format!(
                    "{} is {}; nothing was copied yet",
                    commit.migration,
                    phase_name(phase)
                );
                return Err(Fault::new(Code::InvalidArgument, message).field("migration"));
            }
        }
        if commit.post_copy && !migration.options.is_some_and(|options| options.allow_postcopy) {
            let message = format!(
                "post_copy is true; migration {} does not allow it",
                commit.migration
            );
            return Err(Fault::new(Code::InvalidArgument, message).field("post_copy"));
        }
        let (from, to, name) = (migration.from.clone(), migration.to.clone(), migration.vm.clone());
        let vm = self.known_vm("vm", &name)?;
        if checks_epoch && (epoch_of(vm) + 1 != commit.epoch || host_of(vm) != from) {
            let message = format!(
                "epoch is {}; {name} is at epoch {} on {}",
                commit.epoch,
                epoch_of(vm),
                host_of(vm)
            );
            return Err(Fault::new(Code::StaleEpoch, message).field("epoch"));
        }
        if !self.state.host_is_up(&to) {
            return Err(
                Fault::new(Code::HostDown, format!("host is {to}, which is declared down")).field("host"),
            );
        }
        let now_ms = self.now_ms;
        let migration = self.migration_mut(&commit.migration);
        migration.set_phase(if commit.post_copy {
            MigrationPhase::PostCopy
        } else {
            MigrationPhase::Committed
        });
        migration.changed_ms = now_ms;
        let vm = self.vm_mut(&name);
        vm.placement = Some(Placement {
            host: to.clone(),
            epoch: commit.epoch,
            arrived_by: commit.migration.clone(),
        });
        vm.vmm = commit.vmm.as_ref().map(validate::vmm_build);
        vm.devices = None;
        self.set_vm_state(&name, VmState::Running, None);
        let lost = if from == to { "the old VMM" } else { from.as_str() };
        let message = format!(
            "{name} belongs to {to} as epoch {}; {lost} has lost it{}",
            commit.epoch,
            if commit.post_copy {
                ", but for the pages that it still gives"
            } else {
                ""
            }
        );
        self.migration_event("committed", &commit.migration, message);
        Ok(self.migration_response(&commit.migration, true))
    }

    pub(super) fn abort_migration(&mut self, abort: &AbortMigrationRequest) -> Applied {
        let migration = self.known_migration(&abort.migration)?;
        if !abort.host.is_empty() && abort.host != migration.from && abort.host != migration.to {
            let message = format!(
                "host is {}; migration {} does not touch it",
                quoted(&abort.host),
                abort.migration
            );
            return Err(Fault::new(Code::InvalidArgument, message).field("host"));
        }
        let why = abort
            .reason
            .as_ref()
            .map_or_else(|| reason(Code::Internal, "no reason was given"), bounded);
        // A person who cancels what has ended is told so; a party that reports a failure twice is not bothered.
        let by_a_person = why.code == Code::Cancelled.as_str();
        if is_committed(migration) || (is_ended(migration) && by_a_person) {
            return Err(ended(migration));
        }
        if !is_ended(migration) {
            self.end_aborted(&abort.migration, why, Some(abort.phase()));
        }
        Ok(self.migration_response(&abort.migration, true))
    }

    pub(super) fn finish_migration(&mut self, finish: &FinishMigration) -> Applied {
        let migration = self.known_migration(&finish.id)?;
        match migration.phase() {
            MigrationPhase::Committed | MigrationPhase::PostCopy => {
                let (name, epoch) = (migration.vm.clone(), migration.epoch);
                // A receipt is written by a guest that runs.
                if let Some(vm) = self.state.vms.get_mut(&name)
                    && finish.receipt.is_some()
                    && epoch_of(vm) == epoch
                {
                    vm.seen_epoch = epoch;
                }
                self.end_done(&finish.id, finish.receipt.as_ref(), None);
            }
            MigrationPhase::Done => {
                let migration = self.migration_mut(&finish.id);
                // A receipt that comes late is still a receipt.
                if migration.receipt.is_none() {
                    migration.receipt = finish.receipt.as_ref().map(bounded_receipt);
                }
            }
            MigrationPhase::Aborted => return Err(ended(migration)),
            phase => {
                let message = format!(
                    "{} is {}; only a committed one is finished",
                    finish.id,
                    phase_name(phase)
                );
                return Err(Fault::new(Code::InvalidArgument, message).field("id"));
            }
        }
        Ok(self.migration_response(&finish.id, true))
    }

    /// Uncommitted → ABORTED. `seen` is the phase that the reporter knew, which may be further than the log's.
    pub(super) fn end_aborted(&mut self, id: &str, why: Reason, seen: Option<MigrationPhase>) {
        let now_ms = self.now_ms;
        let migration = self.migration_mut(id);
        let ended_in = seen
            .filter(|seen| *seen < MigrationPhase::Committed)
            .unwrap_or_default()
            .max(migration.phase());
        let stays = if migration.is_upgrade() {
            "stays in its VMM on"
        } else {
            "stays on"
        };
        let message = format!(
            "{} {stays} {}: {} [{}]",
            migration.vm, migration.from, why.message, why.code
        );
        migration.set_ended_in(ended_in);
        migration.set_phase(MigrationPhase::Aborted);
        migration.reason = Some(why);
        migration.changed_ms = now_ms;
        self.migration_event("aborted", id, message);
        self.ended(id);
    }

    /// COMMITTED or POST_COPY → DONE. `lost`: why the run ended while pages were missing.
    pub(super) fn end_done(&mut self, id: &str, receipt: Option<&Receipt>, lost: Option<Reason>) {
        let now_ms = self.now_ms;
        let migration = self.migration_mut(id);
        if migration.phase() == MigrationPhase::PostCopy && receipt.is_none() {
            migration.reason = lost;
            migration.set_ended_in(MigrationPhase::PostCopy);
        }
        migration.set_phase(MigrationPhase::Done);
        migration.receipt = receipt.map(bounded_receipt);
        migration.changed_ms = now_ms;
        let blackout_us = receipt
            .and_then(|receipt| receipt.blackout_us.as_ref())
            .map(|blackout| blackout.total);
        let way = way(&migration.from, &migration.to);
        let message = match blackout_us {
            Some(us) => format!("{}: {way}, blackout {us} us", migration.vm),
            None => format!("{}: {way}, no receipt", migration.vm),
        };
        self.migration_event("done", id, message);
        self.ended(id);
    }

    fn ended(&mut self, id: &str) {
        let name = self.migration_mut(id).vm.clone();
        if let Some(vm) = self.state.vms.get_mut(&name)
            && vm.migration == id
        {
            vm.migration.clear();
        }
        self.effects.push(Effect::MigrationEnded(id.to_owned()));
        self.forget_old();
    }

    /// Drops the oldest ended migrations above the bound. One that a VM names as its last stays: its source may still
    /// have to learn the outcome.
    fn forget_old(&mut self) {
        let state = &mut *self.state;
        let mut over = state.migrations.len().saturating_sub(MIGRATIONS_ENDED_MAX);
        if over == 0 {
            return;
        }
        let vms = &state.vms;
        state.migrations.retain(|_, migration| {
            let named = vms
                .get(&migration.vm)
                .is_some_and(|vm| vm.last_migration == migration.id);
            let drop = over > 0 && is_ended(migration) && !named;
            over -= usize::from(drop);
            !drop
        });
    }

    fn known_migration(&self, id: &str) -> Result<&Migration, Fault> {
        self.state.migration(id).ok_or_else(|| {
            let message = format!(
                "migration is {}; none has this id, or it ended long ago",
                quoted(id)
            );
            Fault::new(Code::MigrationNotFound, message).field("migration")
        })
    }

    fn migration_mut(&mut self, id: &str) -> &mut Migration {
        migration_number(id)
            .and_then(|number| self.state.migrations.get_mut(&number))
            .expect("the migration was looked up in this command")
    }

    fn migration_event(&mut self, what: &str, id: &str, message: String) {
        self.event(&format!("migration.{what}"), format!("migration/{id}"), message);
    }

    fn migration_response(&self, id: &str, current: bool) -> CommandResponse {
        let migration = self.state.migration(id).cloned();
        let vm = migration
            .as_ref()
            .and_then(|migration| self.state.vm(&migration.vm))
            .cloned();
        CommandResponse {
            migration,
            vm,
            current,
            ..CommandResponse::default()
        }
    }
}

/// Where a migration goes, in words.
fn way(from: &str, to: &str) -> String {
    if from == to {
        return format!("another VMM on {to}");
    }
    format!("{from} -> {to}")
}

/// A forecast from outside, its texts and its list brought below their bounds.
fn bounded_forecast(forecast: &Forecast) -> Forecast {
    const SOURCE_CHARS_MAX: usize = 16;
    const WINDOWS_MAX: usize = 16;
    let mut forecast = forecast.clone();
    forecast.windows.truncate(WINDOWS_MAX);
    forecast.reason = forecast.reason.as_ref().map(bounded);
    forecast.bandwidth_source = forecast.bandwidth_source.chars().take(SOURCE_CHARS_MAX).collect();
    forecast
}

/// A receipt from outside, its texts brought below their bounds.
fn bounded_receipt(receipt: &Receipt) -> Receipt {
    const TRACKER_CHARS_MAX: usize = 16;
    const WHY_CHARS_MAX: usize = 512;
    Receipt {
        tracker: receipt.tracker.chars().take(TRACKER_CHARS_MAX).collect(),
        post_copy_unavailable: receipt
            .post_copy_unavailable
            .chars()
            .take(WHY_CHARS_MAX)
            .collect(),
        ..receipt.clone()
    }
}

fn ended(migration: &Migration) -> Fault {
    let message = match (migration.phase(), migration.reason.as_ref()) {
        (MigrationPhase::Aborted, Some(why)) => format!("{} was aborted: {}", migration.id, why.message),
        (MigrationPhase::Committed, _) => format!("{} is committed: there is no way back", migration.id),
        (MigrationPhase::PostCopy, _) => format!(
            "{} is committed, {} runs on {} while its last pages come: there is no way back",
            migration.id, migration.vm, migration.to
        ),
        _ => format!("{} has ended", migration.id),
    };
    Fault::new(Code::MigrationEnded, message).field("migration")
}

fn phase_name(phase: MigrationPhase) -> &'static str {
    match phase {
        MigrationPhase::Unspecified => "unspecified",
        MigrationPhase::Planned => "planned",
        MigrationPhase::Preparing => "preparing",
        MigrationPhase::PreCopy => "pre-copy",
        MigrationPhase::Switchover => "switchover",
        MigrationPhase::Ready => "ready",
        MigrationPhase::Committed => "committed",
        MigrationPhase::PostCopy => "post-copy",
        MigrationPhase::Done => "done",
        MigrationPhase::Aborted => "aborted",
    }
}
