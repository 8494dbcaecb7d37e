//! The machine's part in a snapshot: what it excludes, and when the VM stands for it.
//!
//! The engine ([`crate::snapshot`]) asks here before each of its steps, under the machine's lock; whether the VM stands is part of
//! `settle`, as the right to run is, so a grant, the end of a lease or a destroy in the middle of it need no code of their own. The thread that copies
//! memory never comes here: whoever holds the lock may be waiting for a vCPU that waits for that thread.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use drover_proto::v1::{TakeSnapshotRequest, VmmInfo};
use drover_proto::{Code, Fault};
use tracing::info;

use super::{Core, Machine};
use crate::sandbox;
use crate::snapshot::pipe::Pipe;
use crate::snapshot::stage::{Amounts, Began, Snapshots, Whole};
use crate::snapshot::{self, Task};
use crate::time::boottime_ns;

/// What the machine knows of snapshots.
#[derive(Default)]
pub(super) struct Taking {
    /// The newest.
    pub(super) newest: Snapshots,
    /// Of the one that is under way: failing it wakes all its threads.
    pipe: Option<Arc<Pipe>>,
    /// The VM stands for it and keeps what it holds.
    pub(super) keeps: bool,
}

impl Taking {
    fn stop(&self, code: Code, message: &str) {
        if let Some(pipe) = &self.pipe {
            pipe.fail(Fault::new(code, message));
        }
    }

    /// The VM has ended, or is about to.
    pub(super) fn vm_ended(&mut self) {
        if self.newest.vm_ended() {
            self.stop(Code::VmStopped, "the VM ended");
        }
    }
}

impl Machine {
    /// Begins a snapshot of the running VM. Asking again for the newest one changes nothing.
    pub fn take_snapshot(self: &Arc<Self>, request: &TakeSnapshotRequest) -> Result<VmmInfo, Fault> {
        // Taken also where it is of no use: whoever asks again hands it in again, and a file that is kept takes room when it is removed.
        let handed = sandbox::for_snapshot(Path::new(&request.folder));
        let vm = {
            let core = self.core();
            let newest = core.taking.newest.told();
            if newest.is_some_and(|newest| newest.id == request.id) {
                drop(core);
                return Ok(self.info());
            }
            // Refuses while a migration or another snapshot is under way, or the VM does not run.
            self.changeable(&core)?
        };
        // Without the lock: storage may hang, and grants must not wait for it.
        let task = Task::new(vm, request, handed)?;
        self.begin_snapshot(&mut self.core(), request, task)?;
        Ok(self.info())
    }

    fn begin_snapshot(
        self: &Arc<Self>,
        core: &mut Core,
        request: &TakeSnapshotRequest,
        task: Task,
    ) -> Result<(), Fault> {
        if core
            .taking
            .newest
            .told()
            .is_some_and(|newest| newest.id == request.id)
        {
            return Ok(());
        }
        task.check(self.changeable(core)?)?;
        if core.taking.newest.begin(&request.id)? == Began::Before {
            return Ok(());
        }
        core.taking.pipe = Some(task.pipe.clone());
        let machine = self.clone();
        let thread = std::thread::Builder::new().name("snapshot".to_owned());
        if let Err(error) = thread.spawn(move || snapshot::run(&machine, &task)) {
            let message = format!("no thread for the snapshot: {error}");
            let fault = Fault::new(Code::SnapshotFailed, message);
            core.taking.newest.ended(Err(fault.clone()));
            core.taking.pipe = None;
            return Err(fault);
        }
        self.publish(core);
        Ok(())
    }

    /// Ends the snapshot `id`, if it is under way and not complete yet.
    pub fn cancel_snapshot(&self, id: &str) -> VmmInfo {
        {
            let mut core = self.core();
            if core.taking.newest.cancel(id) {
                info!(snapshot = id, "cancelled");
                core.taking.stop(Code::Cancelled, "the snapshot was cancelled");
            }
        }
        self.info()
    }

    // What the engine calls.

    /// Stops the VM for the snapshot's instant: on return no vCPU executes, and no device begins anything.
    pub(crate) fn hold_for_snapshot(&self) -> Result<(), Fault> {
        let mut core = self.core();
        core.taking.newest.hold()?;
        self.settle(&mut core);
        if let Some(end) = self.built().end() {
            Self::note_end(&mut core, end);
            self.settle(&mut core);
            return Err(Fault::new(
                Code::VmStopped,
                "the VM ended as it was paused for its snapshot",
            ));
        }
        Ok(())
    }

    /// The instant is over: the VM runs as its lease lets it. A fault: the snapshot was stopped meanwhile.
    pub(crate) fn release_after_snapshot(&self, began: Instant) -> Result<(), Fault> {
        let mut core = self.core();
        let taken = core.taking.newest.taken();
        self.settle(&mut core);
        if core.running {
            self.built().await_running();
        }
        let paused_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        info!(paused_us, "the instant of the snapshot is over");
        core.taking.newest.stood(paused_us);
        self.publish(&core);
        taken
    }

    /// How far the snapshot is.
    pub(crate) fn snapshot_at(&self, amounts: Amounts) {
        let mut core = self.core();
        core.taking.newest.note(amounts);
        self.publish(&core);
    }

    /// All is written. Whether the snapshot may be completed now: see [`crate::snapshot::stage`].
    pub(crate) fn seal_snapshot(&self) -> Result<bool, Fault> {
        let mut core = self.core();
        let leased = core.right.may_run(boottime_ns());
        core.taking.newest.seal(leased)
    }

    /// The engine's last word. A VM that stood for it runs again.
    pub(crate) fn snapshot_ended(&self, result: Result<Whole, Fault>) {
        let mut core = self.core();
        core.taking.newest.ended(result);
        core.taking.pipe = None;
        self.settle(&mut core);
    }
}
