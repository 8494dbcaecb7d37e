//! A VM's life.
//!
//! ```text
//!              create/start                place: epoch + 1          report running
//!   STOPPED ──────────────────> PENDING ─────────────────> STARTING ────────────────> RUNNING <──> PAUSED
//!      ^                           ^                          │ stop                     │ stop
//!      │ reported gone             │ restart by policy        v                          v
//!      └────── STOPPING <──────────┼──────────────────────────┴──────────────────────────┘
//!                                  │          host down: UNKNOWN, until the host is up again
//!                               FAILED  <──── reported failed, at the placement's epoch, from any of them
//! ```
//!
//! A run (one epoch) ends once: by FAILED, by STOPPED, or by the hand-over to the next epoch. Its migration ends with
//! it, in the same entry: aborted when it was not committed, finished when it was.

use drover_proto::v1::{
    CommandResponse, CreateVm, PlaceVm, Placement, Reason, ReportVmRequest, RestartPolicy, Vm, VmPending,
    VmSpec, VmState,
};
use drover_proto::{Code, Fault};

use super::{Applied, Tx, bounded, reason};
use crate::cloud;
use crate::limits::{RESTARTS_MAX, RETIRED_MAX, VMS_MAX};
use crate::networks;
use crate::placement::{self, Purpose};
use crate::snapshots::purpose_of_start;
use crate::state::{epoch_of, host_of, is_committed, occupies, spec_of};
use crate::validate::{self, quoted};
use crate::volumes;

impl Tx<'_> {
    pub(super) fn create_vm(&mut self, create: &CreateVm) -> Applied {
        let mut spec = validate::vm_spec(create.spec.as_ref())?;
        let name = spec.name.clone();
        self.may_be_named("spec.name", &name)?;
        if !spec.host.is_empty() && self.state.host(&spec.host).is_none() {
            let message = format!(
                "spec.host is {}; no host of this name is registered",
                quoted(&spec.host)
            );
            return Err(Fault::new(Code::HostNotFound, message).field("spec.host"));
        }
        placement::images_exist(self.state, &spec)?;
        volumes::may_have(self.state, &spec)?;
        networks::address(self.state, &mut spec)?;
        cloud::room(self.state, &spec, "spec.cloud_init")?;
        placement::could_ever_fit(self.state, &spec, Purpose::Start, |_| Ok(()))?;
        self.insert_vm(spec, create.start);
        Ok(self.vm_response(&name, true))
    }

    /// Whether a new VM may have this name, and there may be one more.
    pub(super) fn may_be_named(&self, field: &str, name: &str) -> Result<(), Fault> {
        validate::name(field, name)?;
        if self.state.vms.contains_key(name) {
            let message = format!("{field} is {}; a VM of this name exists", quoted(name));
            return Err(Fault::new(Code::VmExists, message).field(field));
        }
        if self.state.vms.len() >= VMS_MAX {
            let message = format!("{field} is {name}; the cluster has {VMS_MAX} VMs, which is all it takes");
            return Err(Fault::new(Code::InvalidArgument, message).field(field));
        }
        Ok(())
    }

    pub(super) fn insert_vm(&mut self, spec: VmSpec, start: bool) {
        let name = spec.name.clone();
        let epoch = self.state.retired.remove(&name).unwrap_or(self.state.epoch_floor);
        let mut vm = Vm {
            spec: Some(spec),
            placement: Some(Placement {
                epoch,
                ..Placement::default()
            }),
            wanted_running: start,
            created_ms: self.now_ms,
            changed_ms: self.now_ms,
            ..Vm::default()
        };
        vm.set_state(if start { VmState::Pending } else { VmState::Stopped });
        self.state.vms.insert(name.clone(), vm);
        let caller = self.caller;
        self.vm_event("vm.created", &name, format!("{name} was created by {caller}"));
    }

    pub(super) fn start_vm(&mut self, name: &str) -> Applied {
        let vm = self.known_vm("name", name)?;
        if vm.deleting {
            return Err(Fault::new(Code::VmState, format!("{name} is being deleted")).field("name"));
        }
        let state = vm.state();
        if vm.wanted_running && state != VmState::Failed {
            return Ok(self.vm_response(name, true));
        }
        let vm = self.vm_mut(name);
        vm.wanted_running = true;
        vm.restarts = 0;
        // Whether the guest has begun to shut down nobody knows; if it has, it is started again.
        vm.shutdown = 0;
        // One that is still being stopped is placed again when it is gone.
        if matches!(state, VmState::Stopped | VmState::Failed) {
            self.set_vm_state(name, VmState::Pending, None);
        }
        let caller = self.caller;
        self.vm_event("vm.start", name, format!("{caller} wants {name} running"));
        Ok(self.vm_response(name, true))
    }

    pub(super) fn stop_vm(&mut self, name: &str) -> Applied {
        let vm = self.known_vm("name", name)?;
        if !vm.wanted_running && matches!(vm.state(), VmState::Stopped | VmState::Stopping) {
            return Ok(self.vm_response(name, true));
        }
        let caller = self.caller;
        self.vm_event("vm.stop", name, format!("{caller} wants {name} stopped"));
        self.end_wanted(name);
        Ok(self.vm_response(name, true))
    }

    pub(super) fn delete_vm(&mut self, name: &str) -> Applied {
        let vm = self.known_vm("name", name)?;
        if vm.deleting {
            return Ok(self.vm_response(name, true));
        }
        let caller = self.caller;
        self.vm_event("vm.delete", name, format!("{caller} wants {name} deleted"));
        self.vm_mut(name).deleting = true;
        let mut response = self.vm_response(name, true);
        self.end_wanted(name);
        if let Some(vm) = self.state.vm(name) {
            response.vm = Some(cloud::without_secrets(vm));
        } else if let Some(vm) = response.vm.as_mut() {
            vm.wanted_running = false;
            vm.set_state(VmState::Stopped);
        }
        Ok(response)
    }

    /// The VM is no longer wanted: it is gone at once when nothing can execute it, else it is being stopped.
    fn end_wanted(&mut self, name: &str) {
        let vm = self.vm_mut(name);
        vm.wanted_running = false;
        let (state, host) = (vm.state(), host_of(vm).to_owned());
        let may_execute = occupies(vm) && self.state.host_is_up(&host);
        if may_execute {
            let stopped = || reason(Code::VmStopped, format!("{name} was stopped"));
            self.abort_uncommitted(name, stopped());
            self.fail_snapshot_of(name, stopped());
            if state != VmState::Stopping {
                let awaited = format!("waits for {host}'s agent to report that the VMM is gone");
                self.set_vm_state(name, VmState::Stopping, Some(reason(Code::VmStopped, awaited)));
            }
        } else {
            self.run_is_over(name, "nothing of it runs");
        }
    }

    pub(super) fn place_vm(&mut self, place: &PlaceVm) -> Applied {
        let vm = self.known_vm("vm", &place.vm)?;
        if !drover_points::seeded_bug("no-epoch-check") && epoch_of(vm) != place.expected_epoch {
            return Err(stale("expected_epoch", place.expected_epoch, vm));
        }
        if !vm.wanted_running || vm.deleting || !matches!(vm.state(), VmState::Stopped | VmState::Pending) {
            return Err(unfit(
                &place.vm,
                vm,
                "only one that is wanted and waits can be placed",
            ));
        }
        let spec = spec_of(vm).clone();
        let host_field = |fault: Fault| fault.field("host");
        if self.state.host(&place.host).is_some() && !self.state.host_is_up(&place.host) {
            return Err(Fault::new(
                Code::HostDown,
                format!("host is {}, which is declared down", place.host),
            )
            .field("host"));
        }
        let purpose = purpose_of_start(self.state, vm);
        placement::fits(self.state, &spec, purpose, &place.host).map_err(host_field)?;
        self.note_writer(&spec);
        let seed = cloud::seed(self.state, self.known_vm("vm", &place.vm)?);
        let vm = self.vm_mut(&place.vm);
        let epoch = epoch_of(vm) + 1;
        vm.seed = seed;
        vm.placement = Some(Placement {
            host: place.host.clone(),
            epoch,
            arrived_by: String::new(),
        });
        vm.vmm = None;
        vm.restored = 0;
        self.forget_devices(&place.vm);
        self.set_vm_state(&place.vm, VmState::Starting, None);
        self.vm_event(
            "vm.placed",
            &place.vm,
            format!("{} starts on {} as epoch {epoch}", place.vm, place.host),
        );
        Ok(self.vm_response(&place.vm, true))
    }

    pub(super) fn vm_pending(&mut self, pending: &VmPending) -> Applied {
        let name = &pending.vm;
        let vm = self.known_vm("vm", name)?;
        let restart = vm.state() == VmState::Failed && may_restart(vm);
        if !vm.wanted_running || !(restart || matches!(vm.state(), VmState::Stopped | VmState::Pending)) {
            return Err(unfit(
                name,
                vm,
                "only one that is wanted and waits can be pending",
            ));
        }
        let why = pending.reason.as_ref().map(bounded);
        if vm.state() == VmState::Pending && vm.reason == why {
            return Ok(self.vm_response(name, true));
        }
        if restart {
            self.vm_mut(name).restarts += 1;
        }
        let message = why
            .as_ref()
            .map_or_else(|| format!("{name} waits for a host"), |why| why.message.clone());
        self.set_vm_state(name, VmState::Pending, why);
        self.vm_event(if restart { "vm.restart" } else { "vm.pending" }, name, message);
        Ok(self.vm_response(name, true))
    }

    pub(super) fn report_vm(&mut self, report: &ReportVmRequest) -> Applied {
        let name = &report.vm;
        let Some(vm) = self.state.vm(name) else {
            return Ok(CommandResponse::default());
        };
        let matches_epoch = epoch_of(vm) == report.epoch || drover_points::seeded_bug("no-epoch-check");
        if !matches_epoch || host_of(vm) != report.host {
            return Ok(self.vm_response(name, false));
        }
        let state = vm.state();
        let over = !occupies(vm);
        match report.state() {
            VmState::Running | VmState::Paused | VmState::Failed | VmState::Stopped => {}
            other => {
                let message = format!(
                    "state is {}; RUNNING, PAUSED, FAILED and STOPPED are reported",
                    other.as_str_name()
                );
                return Err(Fault::new(Code::InvalidArgument, message).field("state"));
            }
        }
        if over {
            return Ok(self.vm_response(name, state == report.state()));
        }
        let not_begun = vm.restore.is_some();
        if not_begun && matches!(report.state(), VmState::Running | VmState::Paused) {
            // Nobody granted it that.
            return Ok(self.vm_response(name, false));
        }
        match (state, report.state()) {
            (VmState::Stopping, VmState::Stopped | VmState::Failed) => {
                self.run_is_over(name, "its VMM is gone")
            }
            (VmState::Stopping, _) => {}
            (_, VmState::Failed) => {
                let why = report.reason.as_ref().map_or_else(
                    || reason(Code::Internal, "the host reported a failure without a reason"),
                    bounded,
                );
                self.run_failed(name, why);
            }
            (_, VmState::Stopped) => {
                self.vm_mut(name).wanted_running = false;
                self.run_is_over(name, "the guest shut itself down");
            }
            (_, reported) => {
                if let Some(build) = &report.vmm {
                    self.vm_mut(name).vmm = Some(validate::vmm_build(build));
                }
                if let Some(devices) = &report.devices {
                    self.note_devices(name, devices);
                }
                self.seen(name, reported, report.reason.as_ref());
            }
        }
        Ok(self.vm_response(name, true))
    }

    /// RUNNING or PAUSED was reported for the placement's run.
    fn seen(&mut self, name: &str, reported: VmState, why: Option<&Reason>) {
        let vm = self.vm_mut(name);
        let state = vm.state();
        vm.seen_epoch = epoch_of(vm);
        self.note_used(name);
        let vm = self.vm_mut(name);
        // While its host is declared down the lease decides: the host's return makes it run again, not a late report.
        if state == reported || state == VmState::Unknown {
            return;
        }
        let host = host_of(vm).to_owned();
        self.set_vm_state(
            name,
            reported,
            why.filter(|_| reported == VmState::Paused).map(bounded),
        );
        let (kind, does) = if reported == VmState::Running {
            ("vm.running", "runs")
        } else {
            ("vm.paused", "is paused")
        };
        self.vm_event(kind, name, format!("{name} {does} on {host}"));
    }

    /// The placement's run failed. Its migration ends with it.
    pub(super) fn run_failed(&mut self, name: &str, why: Reason) {
        self.abort_uncommitted(
            name,
            reason(Code::SourceFailed, format!("{name} failed: {}", why.message)),
        );
        self.finish_committed(name, why.clone());
        let message = format!("{name} failed: {}", why.message);
        self.fail_snapshot_of(name, reason(Code::SnapshotFailed, message));
        self.nothing_has_it(name);
        let message = format!("{name} failed: {} [{}]", why.message, why.code);
        self.set_vm_state(name, VmState::Failed, Some(why));
        self.vm_event("vm.failed", name, message);
    }

    /// Nothing executes the VM any more: it is stopped, or waits to be started again, or is removed.
    pub(super) fn run_is_over(&mut self, name: &str, why: &str) {
        let stopped = reason(Code::VmStopped, format!("{name} was stopped"));
        self.abort_uncommitted(name, stopped.clone());
        self.finish_committed(name, stopped.clone());
        self.fail_snapshot_of(name, stopped);
        self.nothing_has_it(name);
        let vm = self.vm_mut(name);
        // Who stops a VM that was to be restored has it as it was. One that was made for it is nothing else yet.
        let is_clone = vm.restore.as_ref().is_some_and(|restore| restore.clone);
        if vm.deleting || !vm.wanted_running && !is_clone {
            self.withdraw_restore(name);
        }
        let vm = self.vm_mut(name);
        if vm.deleting {
            let epoch = epoch_of(vm);
            self.state.vms.remove(name);
            self.retire(name, epoch);
            self.vm_event("vm.deleted", name, format!("{name} is deleted"));
            return;
        }
        let next = if vm.wanted_running {
            VmState::Pending
        } else {
            VmState::Stopped
        };
        self.set_vm_state(name, next, None);
        self.vm_event("vm.stopped", name, format!("{name} is stopped: {why}"));
    }

    /// The run has ended, and with it what was asked of it.
    fn nothing_has_it(&mut self, name: &str) {
        // One that is still to begin as a snapshot has what that had, however often it is tried.
        if self.vm_mut(name).restore.is_none() {
            self.drop_detached(name, |_, _| true);
        }
        self.forget_devices(name);
        let vm = self.vm_mut(name);
        (vm.shutdown, vm.seed) = (0, None);
    }

    /// Remembers a deleted VM's last epoch, so that a VM of the same name never runs at one that was used.
    fn retire(&mut self, name: &str, epoch: u64) {
        if epoch == 0 {
            return;
        }
        let retired = &mut self.state.retired;
        retired.insert(name.to_owned(), epoch);
        if retired.len() > RETIRED_MAX {
            let lowest = retired.iter().map(|(name, epoch)| (*epoch, name.clone())).min();
            if let Some((epoch, name)) = lowest {
                retired.remove(&name);
                self.state.epoch_floor = self.state.epoch_floor.max(epoch);
            }
        }
    }

    pub(super) fn known_vm(&self, field: &str, name: &str) -> Result<&Vm, Fault> {
        self.state.vm(name).ok_or_else(|| {
            Fault::new(
                Code::VmNotFound,
                format!("{field} is {}; no VM has this name", quoted(name)),
            )
            .field(field)
        })
    }

    pub(super) fn vm_mut(&mut self, name: &str) -> &mut Vm {
        self.state
            .vms
            .get_mut(name)
            .expect("the VM was looked up in this command")
    }

    pub(super) fn set_vm_state(&mut self, name: &str, state: VmState, why: Option<Reason>) {
        let now_ms = self.now_ms;
        let vm = self.vm_mut(name);
        vm.set_state(state);
        vm.reason = why;
        vm.changed_ms = now_ms;
    }

    /// Ends the VM's migration when its hand-over is not in the log.
    fn abort_uncommitted(&mut self, name: &str, why: Reason) {
        let id = self.vm_mut(name).migration.clone();
        if self
            .state
            .migration(&id)
            .is_some_and(|migration| !is_committed(migration))
        {
            self.end_aborted(&id, why, None);
        }
    }

    /// Ends the VM's migration when its hand-over is in the log: there is nothing more to wait for.
    fn finish_committed(&mut self, name: &str, why: Reason) {
        let id = self.vm_mut(name).migration.clone();
        if self.state.migration(&id).is_some_and(is_committed) {
            self.end_done(&id, None, Some(why));
        }
    }
}

/// Whether the VM's policy has it restarted once more.
pub fn may_restart(vm: &Vm) -> bool {
    spec_of(vm).restart() == RestartPolicy::OnFailure
        && vm.wanted_running
        && !vm.deleting
        && vm.restarts < RESTARTS_MAX
}

fn stale(field: &str, given: u64, vm: &Vm) -> Fault {
    let message = format!(
        "{field} is {given}; {} is at epoch {}",
        spec_of(vm).name,
        epoch_of(vm)
    );
    Fault::new(Code::StaleEpoch, message).field(field)
}

pub(crate) fn unfit(name: &str, vm: &Vm, right: &str) -> Fault {
    let state = vm
        .state()
        .as_str_name()
        .trim_start_matches("VM_STATE_")
        .to_lowercase();
    let wanted = if vm.deleting {
        "being deleted"
    } else if vm.wanted_running {
        "wanted running"
    } else {
        "wanted stopped"
    };
    Fault::new(Code::VmState, format!("{name} is {state} and {wanted}; {right}")).field("vm")
}
