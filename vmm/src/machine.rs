//! A VM together with its right to run, its migration, and what is told of them: one owner, one lock.
//!
//! Every input (a grant, an outcome, the deadline's timer, the guest's end, the engine) changes the core under the lock and then
//! settles: whether vCPUs run is made equal to what [`Right::may_run`] says, and what changed is published.
//! Stopping vCPUs happens under the lock, so nobody sees "paused" before it is true.
//!
//! vCPU threads never take this lock. They leave the guest at its deadline by timers of their own (see [`crate::vcpu`]), whoever holds the
//! lock, and whatever a stalled disk makes a log line wait for; the watch thread only makes the state that is told follow.
//! A holder that panics ends the process, see `main.rs`.

mod balloon;
mod hotplug;
mod snapshots;

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use drover_migration::Control;
use drover_migration::target::Received;
use drover_proto::v1::{
    GrantRequest, MigrationPhase, OutcomeRequest, Progress, Reason, Receipt, StartOutgoingRequest, VmmInfo,
    VmmMigration,
};
use drover_proto::{Code, Fault, LOCAL_PREFIX};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::devices::attached::Gear;
use crate::devices::console::Console;
use crate::forecast::Watch;
use crate::opened::{Opened, Parts, Waiting};
use crate::right::Right;
use crate::sandbox::{self, Thread};
use crate::time::{NS_PER_S, boottime_ns};
use crate::vcpu::GuestEnd;
use crate::vm::{Shape, Vm};
use crate::{boot, fd, incoming, outgoing, snapshot, version};

/// How long the watch thread sleeps at most, ms; only so that it notices when its machine is gone.
const WATCH_PERIOD_MS: u16 = 1000;

/// A migration that this VMM takes part in.
struct Migration {
    id: String,
    outgoing: bool,
    /// To another VMM of this host.
    local: bool,
    control: Arc<Control>,
    progress: Option<Progress>,
    failure: Option<Fault>,
    receipt: Option<Receipt>,
    /// A target's: it is to run, or runs, before it has all pages.
    post_copy: bool,
    /// A source's: the target needs its pages.
    serving: bool,
}

struct Core {
    right: Right,
    running: bool,
    ran_before: bool,
    reason: Option<Fault>,
    listen_addr: String,
    migration: Option<Migration>,
    /// The highest number of a migration whose abort was told. None up to it may start: the call that starts one can be late.
    aborted_up_to: Option<u64>,
    /// An engine's thread is alive, perhaps of a migration that was aborted meanwhile.
    engine_busy: bool,
    received: Option<Received>,
    /// What was received runs: since its grant, and since its vCPUs ran.
    runs_since: Option<(Instant, Instant)>,
    asked: hotplug::Asked,
    taking: snapshots::Taking,
    memory_told: balloon::Told,
}

/// One VM of this process.
pub struct Machine {
    config: Config,
    /// Set from the start, or once the memory is there that it is built on.
    vm: OnceLock<Vm>,
    /// What it will be built of then.
    parts: Mutex<Option<Parts>>,
    console: Arc<Console>,
    core: Mutex<Core>,
    /// One device is attached at a time. Taken before the core's.
    plugging: Mutex<()>,
    watch: Watch,
    timer: TimerFd,
    info: watch::Sender<VmmInfo>,
    over: watch::Sender<bool>,
}

fn shape(config: &Config) -> Shape {
    Shape {
        vcpus: config.vcpus,
        memory_bytes: config.memory_bytes(),
        huge_pages: config.huge_pages,
        profile: config.cpu_profile,
    }
}

/// The VM, or its parts where it is to be built on memory that is handed over.
fn build(config: &Config, parts: Parts) -> Result<(Option<Vm>, Option<Parts>), Fault> {
    let Some(memory) = &parts.memory else {
        return Ok((None, Some(parts)));
    };
    let vm = Vm::build_of(shape(config), &parts.kvm, memory)?;
    vm.equip(parts.equipment)?;
    if let Some(files) = &parts.snapshot {
        snapshot::load::restore(&vm, config, files)?;
    } else if let Some(images) = &parts.images {
        let entry = boot::load(vm.memory(), images, config)?;
        vm.boot(config.cpu_profile, entry)?;
        vm.memory().forget_written();
    }
    Ok((Some(vm), None))
}

impl Machine {
    /// Builds what `config` says and starts watching it. A VM that cannot be built becomes a machine in the state FAILED,
    /// so that its agent learns the reason. Only a failing watch is an error.
    pub fn start(config: Config) -> Result<Arc<Self>, Fault> {
        let opened = Opened::of(&config);
        Self::start_of(config, opened)
    }

    /// [`Machine::start`] of what was opened for `config`.
    pub fn start_of(config: Config, opened: Opened) -> Result<Arc<Self>, Fault> {
        let built = opened.parts.and_then(|parts| build(&config, parts));
        let mut right = match &config.incoming {
            Some(_) => Right::incoming(config.epoch),
            None => Right::cold(config.epoch),
        };
        let (vm, parts, reason) = match built {
            Ok((vm, parts)) => (vm, parts, None),
            Err(fault) => {
                error!(%fault, "the VM cannot be built");
                right.failed();
                (None, None, Some(fault))
            }
        };
        let internal = |error| Fault::new(Code::VmmStartFailed, format!("the lease's timer: {error}"));
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, flags).map_err(internal)?;
        let machine = Arc::new(Self {
            console: vm.as_ref().map_or_else(Arc::default, |vm| vm.console().clone()),
            vm: vm.map_or_else(OnceLock::new, OnceLock::from),
            parts: Mutex::new(parts),
            core: Mutex::new(Core {
                right,
                running: false,
                ran_before: false,
                reason,
                listen_addr: String::new(),
                migration: None,
                aborted_up_to: None,
                engine_busy: false,
                received: None,
                runs_since: None,
                asked: hotplug::Asked::default(),
                taking: snapshots::Taking::default(),
                memory_told: balloon::Told::default(),
            }),
            plugging: Mutex::default(),
            watch: Watch::default(),
            timer,
            info: watch::Sender::new(VmmInfo::default()),
            over: watch::Sender::new(false),
            config,
        });
        machine.settle(&mut machine.core());
        if machine.vm().is_some() {
            spawn("watch", Arc::downgrade(&machine), watch_loop)?;
        }
        let failed = machine.core().reason.is_some();
        if let Some(waiting) = opened.waiting.filter(|_| !failed) {
            machine.start_incoming(waiting)?;
        }
        Ok(machine)
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().expect("no holder of the machine's lock panics")
    }

    /// What this machine was made from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The VM, unless it could not be built.
    pub fn vm(&self) -> Option<&Vm> {
        self.vm.get()
    }

    /// The VM of a machine whose engine runs: an engine is only started for a VM that was built.
    pub(crate) fn built(&self) -> &Vm {
        self.vm
            .get()
            .expect("an engine is only started for a VM that was built")
    }

    /// The guest's console.
    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }

    /// What is told of this machine, now.
    pub fn info(&self) -> VmmInfo {
        let mut info = self.info.borrow().clone();
        info.console_next = self.console.next();
        self.fill_in_heeded(&mut info);
        info
    }

    /// Told of every change of [`Self::info`] but the console's.
    pub fn subscribe(&self) -> watch::Receiver<VmmInfo> {
        self.info.subscribe()
    }

    /// Becomes true when the process is to end.
    pub fn over(&self) -> watch::Receiver<bool> {
        self.over.subscribe()
    }

    /// Makes the vCPUs run or stand as the right says, arms the deadline's timer, and publishes what changed.
    fn settle(&self, core: &mut Core) {
        let leased = core.right.may_run(boottime_ns());
        // A VM that stands for a snapshot keeps its disks and taps for the moment, as long as its lease lets it.
        let keeps = leased && core.taking.newest.holds();
        let mut may_run = leased && !keeps;
        if let Some(vm) = self.vm() {
            if may_run && let Err(fault) = Self::open(core, vm) {
                error!(%fault, "the VM may run and cannot");
                Self::note_end(core, GuestEnd::Failed(fault));
                may_run = false;
            }
            if may_run {
                self.arm(core.right.deadline_ns());
                if !core.running && (core.ran_before || self.goes_on()) {
                    vm.announce_pause();
                }
                vm.resume(core.right.deadline_ns());
                if !std::mem::replace(&mut core.ran_before, true) {
                    vm.announce_nics();
                }
            } else if core.running && (keeps || core.right.handed_over()) {
                vm.pause_to_hand_over();
            } else if core.running || (core.taking.keeps && !keeps) {
                vm.pause();
            }
            core.running = may_run;
            core.taking.keeps = keeps;
        }
        if core.right.destroyed() {
            self.over.send_replace(true);
        }
        self.publish(core);
    }

    /// Whether the guest has run before, in another VMM.
    fn goes_on(&self) -> bool {
        self.config.incoming.is_some() || self.config.restore.is_some()
    }

    /// What must be had before the VM runs: the memory that was handed over can be written to, and the disks are locked.
    fn open(core: &Core, vm: &Vm) -> Result<(), Fault> {
        if !core.ran_before {
            vm.open_memory()?;
        }
        vm.open_devices(core.right.deadline_ns())
    }

    fn arm(&self, deadline_ns: u64) {
        let part = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let at = TimeSpec::new(part(deadline_ns / NS_PER_S), part(deadline_ns % NS_PER_S));
        let set = self
            .timer
            .set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME);
        if let Err(error) = set {
            // The vCPUs have timers of their own.
            error!(%error, "the lease's timer cannot be set");
        }
    }

    fn publish(&self, core: &Core) {
        let migration = core.migration.as_ref().map(|migration| VmmMigration {
            id: migration.id.clone(),
            outgoing: migration.outgoing,
            progress: migration.progress.clone(),
            failure: migration.failure.clone().map(Reason::from),
            receipt: migration.receipt.clone(),
            post_copy: migration.post_copy,
        });
        let mut next = VmmInfo {
            seq: 0,
            vm: self.config.vm.clone(),
            epoch: core.right.epoch(),
            state: core.right.state(boottime_ns()).into(),
            reason: core.reason.clone().map(Reason::from),
            listen_addr: core.listen_addr.clone(),
            migration,
            console_next: 0,
            pid: std::process::id(),
            deadline_boottime_ns: core.right.deadline_ns(),
            build: Some(version::own().clone()),
            devices: self.vm().map(|vm| Self::devices_told(core, vm)),
            snapshot_files_handed: sandbox::entered(),
            snapshot: core.taking.newest.told(),
        };
        let mut told = None;
        self.info.send_if_modified(|info| {
            next.seq = info.seq;
            // A lease that goes on is no news: else every heartbeat would wake every watcher.
            info.deadline_boottime_ns = next.deadline_boottime_ns;
            if *info == next {
                return false;
            }
            next.seq += 1;
            if info.state != next.state {
                told = Some((next.state(), next.reason.clone()));
            }
            *info = next;
            true
        });
        // After those who wait were woken: the disk may take its time for the line.
        if let Some((state, reason)) = told {
            info!(state = state.as_str_name(), ?reason, "state");
        }
    }

    /// The deadline's timer or the guest's end woke the watch thread.
    fn look(&self) {
        let mut core = self.core();
        if let Some(end) = self.vm().and_then(Vm::end) {
            Self::note_end(&mut core, end);
        }
        if let Some(level) = self.vm().and_then(|vm| vm.devices().attached.balloon_level()) {
            core.memory_told.look(Instant::now(), level);
        }
        self.settle(&mut core);
    }

    fn note_end(core: &mut Core, end: GuestEnd) {
        if core.reason.is_some() {
            return;
        }
        core.taking.vm_ended();
        match end {
            GuestEnd::Exited => core.right.exited(),
            GuestEnd::Failed(fault) => {
                core.right.failed();
                core.reason = Some(fault);
            }
        }
        if let Some(migration) = &mut core.migration
            && migration.outgoing
        {
            migration.control.cancel();
            let message = "the VM ended while it was moved";
            migration
                .failure
                .get_or_insert_with(|| Fault::new(Code::SourceFailed, message));
        }
    }

    /// A lease. The first one of an incoming VM that is ready starts it.
    pub fn grant(&self, request: &GrantRequest) -> Result<VmmInfo, Fault> {
        let granted_at = Instant::now();
        let starts_received = self.core().right.ready() && request.epoch == self.config.epoch;
        if starts_received {
            drover_points::reach("target.granted");
        }
        {
            let mut core = self.core();
            core.right.grant(request.epoch, request.deadline_boottime_ns)?;
            self.settle(&mut core);
            if core.running
                && let Some(received) = core.received.take()
            {
                self.built().await_running();
                let running_at = Instant::now();
                core.runs_since = Some((granted_at, running_at));
                if let Some(migration) = &mut core.migration {
                    if migration.post_copy {
                        info!("running, while pages are missing");
                    } else {
                        let receipt = received.finish(granted_at, running_at);
                        info!(?receipt, "received and running");
                        migration.receipt = Some(receipt);
                    }
                }
                self.publish(&core);
            }
        }
        if starts_received {
            drover_points::reach("target.running");
        }
        Ok(self.info())
    }

    /// The outcome of a migration from the log.
    pub fn outcome(&self, request: &OutcomeRequest) -> Result<VmmInfo, Fault> {
        let mut core = self.core();
        if !request.committed {
            core.aborted_up_to = core.aborted_up_to.max(migration_number(&request.migration));
        }
        let current = core
            .migration
            .as_ref()
            .filter(|m| m.outgoing && m.id == request.migration);
        let Some(migration) = current else {
            if request.committed {
                let message = format!("this VMM is not the source of migration {:?}", request.migration);
                return Err(Fault::new(Code::MigrationNotFound, message).field("migration"));
            }
            // An abort that is told twice, or of a migration that never reached this VMM.
            drop(core);
            return Ok(self.info());
        };
        if request.committed {
            if core.right.serving() {
                drop(core);
                return Ok(self.info());
            }
            let serves = migration.serving;
            if serves {
                core.right.serve()?;
            } else {
                core.right.committed()?;
            }
            info!(
                migration = request.migration,
                serves, "committed: the VM runs on its target"
            );
        } else {
            migration.control.cancel();
            core.migration = None;
            // The engine says so too, and ends the log, but it may still be waiting for its link. A VM that stands runs first.
            self.built().throttle(0);
            if core.right.handed_over() {
                core.right.aborted();
                self.settle(&mut core);
            }
            self.rest_log(&core);
            info!(migration = request.migration, "aborted: the VM stays");
        }
        self.settle(&mut core);
        drop(core);
        Ok(self.info())
    }

    /// Ends the dirty log of an attempt that is over, unless the VM stands: then it waits until the VM is back. Under the core's lock,
    /// so that nobody claims the log before. An engine that is told to give up and reads the log once more is answered with an error.
    fn rest_log(&self, core: &Core) {
        if !core.right.live() {
            return;
        }
        if let Err(fault) = self.built().stop_dirty_log() {
            warn!(%fault, "the dirty log stays on; the guest runs a little slower");
        }
    }

    /// Somebody wants the outgoing migration `id` to switch to post-copy now. It does so where that is allowed and possible, and before
    /// its pause; asking again changes nothing.
    pub fn switch_to_post_copy(&self, id: &str) -> Result<VmmInfo, Fault> {
        {
            let core = self.core();
            let current = core.migration.as_ref().filter(|m| m.outgoing && m.id == id);
            let Some(migration) = current else {
                let message = format!("this VMM is not the source of migration {id:?}");
                return Err(Fault::new(Code::MigrationNotFound, message).field("migration"));
            };
            info!(migration = id, "post-copy is wanted now");
            migration.control.switch_to_post_copy();
        }
        Ok(self.info())
    }

    /// Ends the VM and, once that is answered, the process.
    pub fn destroy(&self, reason: Option<&Reason>) -> VmmInfo {
        let mut core = self.core();
        info!(?reason, "destroyed");
        if let Some(migration) = &core.migration {
            migration.control.cancel();
        }
        core.taking.vm_ended();
        core.right.destroy();
        self.settle(&mut core);
        drop(core);
        self.info()
    }

    /// Types on the console. A VM that may be saved at any moment, or has ended, takes nothing.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let core = self.core();
        match self.vm() {
            Some(vm) if core.running => vm.type_in(bytes),
            _ => 0,
        }
    }

    // What the engines' glue calls.

    /// Starts sending the VM away. Asking again for the same migration changes nothing.
    pub fn start_outgoing(self: &Arc<Self>, request: StartOutgoingRequest) -> Result<VmmInfo, Fault> {
        {
            let mut core = self.core();
            if core
                .migration
                .as_ref()
                .is_some_and(|m| m.outgoing && m.id == request.migration)
            {
                drop(core);
                return Ok(self.info());
            }
            let number = migration_number(&request.migration);
            if number.is_some() && number <= core.aborted_up_to {
                let message = format!(
                    "migration {} was aborted before it started here",
                    request.migration
                );
                return Err(Fault::new(Code::MigrationEnded, message).field("migration"));
            }
            let under_way = core
                .migration
                .as_ref()
                .filter(|m| m.outgoing)
                .map(|m| m.id.clone());
            if core.engine_busy || under_way.is_some() {
                let id = under_way.unwrap_or_else(|| "an aborted one that winds down".to_owned());
                return Err(Fault::new(
                    Code::MigrationActive,
                    format!("a migration is under way: {id}"),
                ));
            }
            core.taking.newest.refuse_if_active()?;
            if self.vm().is_none() || !core.right.live() {
                let state = self.info().state().as_str_name();
                return Err(Fault::new(
                    Code::VmState,
                    format!("a VM in {state} cannot be moved"),
                ));
            }
            let control = self.control(&request.migration);
            self.watch.claim(self.built());
            core.engine_busy = true;
            core.migration = Some(Migration {
                local: request.target_addr.starts_with(LOCAL_PREFIX),
                ..Migration::new(&request.migration, true, control.clone())
            });
            let machine = self.clone();
            let thread = std::thread::Builder::new().name("outgoing".to_owned());
            if let Err(error) = thread.spawn(move || outgoing::run(&machine, &request, &control)) {
                core.engine_busy = false;
                core.migration = None;
                self.watch.release();
                return Err(Fault::new(
                    Code::Internal,
                    format!("no thread for the migration: {error}"),
                ));
            }
            self.publish(&core);
        }
        Ok(self.info())
    }

    fn start_incoming(self: &Arc<Self>, waiting: Result<Waiting, Fault>) -> Result<(), Fault> {
        let Some(incoming) = self.config.incoming.clone() else {
            return Ok(());
        };
        let control = self.control(&incoming.migration);
        {
            let mut core = self.core();
            core.engine_busy = true;
            core.migration = Some(Migration::new(&incoming.migration, false, control.clone()));
            self.publish(&core);
        }
        let machine = self.clone();
        std::thread::Builder::new()
            .name("incoming".to_owned())
            .spawn(move || incoming::run(&machine, &incoming, waiting, &control))
            .map(drop)
            .map_err(|error| Fault::new(Code::VmmStartFailed, format!("incoming thread: {error}")))
    }

    fn control(self: &Arc<Self>, id: &str) -> Arc<Control> {
        let (machine, id) = (Arc::downgrade(self), id.to_owned());
        Arc::new(Control::new(move |progress| {
            let Some(machine) = machine.upgrade() else { return };
            // Whoever holds the lock may be waiting for a vCPU that waits for a page, which the caller is about to bring.
            if progress.phase() == MigrationPhase::PostCopy {
                if let Ok(mut core) = machine.core.try_lock() {
                    machine.change_migration(&mut core, &id, |migration| migration.progress = Some(progress));
                }
            } else {
                machine.with_migration(&id, |migration| migration.progress = Some(progress));
            }
        }))
    }

    /// Changes the migration `id`, if it is still the current one.
    fn with_migration(&self, id: &str, change: impl FnOnce(&mut Migration)) {
        self.change_migration(&mut self.core(), id, change);
    }

    fn change_migration(&self, core: &mut Core, id: &str, change: impl FnOnce(&mut Migration)) {
        if let Some(migration) = core.migration.as_mut().filter(|migration| migration.id == id) {
            change(migration);
            self.publish(core);
        }
    }

    /// Stops the VM for the switchover of migration `id`: on return no vCPU executes, no device writes to memory, and what the guest was told
    /// is on its disks is there for whoever opens them next, on this host or another.
    pub(crate) fn hand_over(&self, id: &str) -> Result<(), Fault> {
        let local = self.stop_to_hand_over(id)?;
        // Without the core's lock: an abort must not wait for a disk. If it comes now, the VM runs again and this is a fault.
        self.built().drain(!local)
    }

    /// Whether the migration `id`, for which the VM stands now, goes to another VMM of this host.
    fn stop_to_hand_over(&self, id: &str) -> Result<bool, Fault> {
        let mut core = self.core();
        Self::check_current(&core, id)?;
        core.right.hand_over()?;
        self.settle(&mut core);
        if let Some(end) = self.built().end() {
            Self::note_end(&mut core, end);
            self.settle(&mut core);
            return Err(Fault::new(
                Code::SourceFailed,
                "the VM ended as it was paused for the switchover",
            ));
        }
        Ok(core.migration.as_ref().is_some_and(|migration| migration.local))
    }

    /// Holds the vCPUs back for the pre-copy of migration `id`, or lets them go. Of a migration that is over, only the latter.
    pub(crate) fn throttle(&self, id: &str, percent: u32) {
        let core = self.core();
        if percent == 0 || Self::check_current(&core, id).is_ok() {
            info!(migration = id, percent, "throttle");
            self.built().throttle(percent);
        }
    }

    /// The encoded state of the VM that was handed over for migration `id`.
    ///
    /// Under the lock, so that an abort cannot resume the VM in the middle of it.
    pub(crate) fn save_handed_over(&self, id: &str) -> Result<Vec<u8>, Fault> {
        let core = self.core();
        Self::check_current(&core, id)?;
        if !core.right.handed_over() {
            return Err(Fault::new(Code::Cancelled, "the migration was aborted"));
        }
        Ok(crate::save::encode(&self.built().save()?))
    }

    fn check_current(core: &Core, id: &str) -> Result<(), Fault> {
        match &core.migration {
            Some(migration) if migration.id == id => Ok(()),
            _ => Err(Fault::new(Code::Cancelled, "the migration was aborted")),
        }
    }

    /// The engine of migration `id` cannot go on. An incoming VM will never run then.
    pub(crate) fn migration_failed(&self, id: &str, fault: Fault) {
        warn!(migration = id, %fault, "the migration failed");
        let mut core = self.core();
        let Some(migration) = core.migration.as_mut().filter(|migration| migration.id == id) else {
            return;
        };
        let outgoing = migration.outgoing;
        migration.failure.get_or_insert_with(|| fault.clone());
        if !outgoing {
            core.right.failed();
            core.reason.get_or_insert(fault);
        }
        self.settle(&mut core);
    }

    /// The engine's thread ends.
    pub(crate) fn engine_ended(&self) {
        let mut core = self.core();
        core.engine_busy = false;
        self.rest_log(&core);
        // Still under the lock: the next engine must not claim the log before it is given back for this one.
        self.watch.release();
    }

    /// Who has the dirty log.
    pub(crate) fn watch(&self) -> &Watch {
        &self.watch
    }

    /// The VM, if it runs and no migration of it is under way: what it writes can be watched.
    pub(crate) fn watchable(&self) -> Result<&Vm, Fault> {
        let core = self.core();
        let moving = core.migration.as_ref().filter(|migration| migration.outgoing);
        if let Some(migration) = moving {
            let message = format!("migration {} of this VM is under way", migration.id);
            return Err(Fault::new(Code::MigrationActive, message).field("vm"));
        }
        match self.vm() {
            Some(vm) if core.running => Ok(vm),
            _ => {
                let state = core.right.state(boottime_ns()).as_str_name();
                let message = format!("a VM in {state} writes nothing that could be watched");
                Err(Fault::new(Code::VmState, message).field("vm"))
            }
        }
    }

    /// Builds the VM on the memory that the VMM before this one has handed over.
    pub(crate) fn adopt(self: &Arc<Self>, memory: &File) -> Result<(), Fault> {
        let parts = self.parts.lock().expect("no holder of this lock panics").take();
        let parts = parts.ok_or_else(|| Fault::new(Code::Internal, "memory was handed over twice"))?;
        let vm = Vm::build_on_of(shape(&self.config), &parts.kvm, memory, self.console.clone())?;
        for (_, gear) in &parts.equipment {
            if let Gear::Nic(nic) = gear {
                nic.tap.open_if_free()?;
            }
        }
        vm.equip(parts.equipment)?;
        if self.vm.set(vm).is_err() {
            return Err(Fault::new(Code::Internal, "memory was handed over twice"));
        }
        spawn("watch", Arc::downgrade(self), watch_loop)
    }

    /// An incoming VMM listens.
    pub(crate) fn listening(&self, addr: String) {
        let mut core = self.core();
        core.listen_addr = addr;
        self.publish(&core);
    }

    /// The target of migration `id` needs this VM's pages, also once the hand-over is committed.
    pub(crate) fn serving(&self, id: &str) {
        self.with_migration(id, |migration| migration.serving = true);
    }

    /// The engine of the outgoing migration `id` has ended. Gives whether the hand-over is committed: then this VM is over.
    pub(crate) fn served(&self, id: &str) -> bool {
        let mut core = self.core();
        if let Some(migration) = core.migration.as_mut().filter(|migration| migration.id == id) {
            migration.serving = false;
        }
        if core.right.serving() {
            info!(migration = id, "the target needs nothing more");
            core.right.destroy();
            self.settle(&mut core);
        }
        core.right.destroyed()
    }

    /// Everything but some pages was received and verified: they come while it runs.
    pub(crate) fn received_by_post_copy(&self, received: Received) -> Result<(), Fault> {
        if let Some(migration) = &mut self.core().migration {
            migration.post_copy = true;
        }
        self.received(received)
    }

    /// The last missing page is there.
    pub(crate) fn post_copy_complete(&self, received: Received) {
        let mut core = self.core();
        let runs_since = core.runs_since;
        if let Some(migration) = &mut core.migration {
            migration.post_copy = false;
            if let Some((granted_at, running_at)) = runs_since {
                let receipt = received.finish(granted_at, running_at);
                info!(?receipt, "all pages are there");
                migration.receipt = Some(receipt);
            } else {
                core.received = Some(received);
            }
        }
        self.publish(&core);
    }

    /// Everything was received and verified.
    pub(crate) fn received(&self, received: Received) -> Result<(), Fault> {
        let mut core = self.core();
        core.right.received()?;
        core.received = Some(received);
        if let Some(progress) = core.migration.as_mut().and_then(|m| m.progress.as_mut()) {
            progress.set_phase(MigrationPhase::Ready);
        }
        if drover_points::seeded_bug("resume-before-commit") {
            let hour = Duration::from_secs(3600).as_nanos();
            let deadline = boottime_ns() + u64::try_from(hour).expect("an hour fits");
            core.right.grant(self.config.epoch, deadline)?;
        }
        self.settle(&mut core);
        Ok(())
    }

    /// The seeded bug `resume-on-lost-reply`: the source takes its peer's silence for an abort.
    pub(crate) fn resume_on_lost_reply(&self) {
        if drover_points::seeded_bug("resume-on-lost-reply") {
            let mut core = self.core();
            core.right.aborted();
            self.settle(&mut core);
        }
    }
}

/// The number in a migration's id, `m` and a number: a later migration has a higher one.
fn migration_number(id: &str) -> Option<u64> {
    id.strip_prefix('m')?.parse().ok()
}

impl Migration {
    fn new(id: &str, outgoing: bool, control: Arc<Control>) -> Self {
        Self {
            id: id.to_owned(),
            outgoing,
            local: false,
            control,
            progress: None,
            failure: None,
            receipt: None,
            post_copy: false,
            serving: false,
        }
    }
}

fn spawn(name: &str, machine: Weak<Machine>, body: fn(&Weak<Machine>)) -> Result<(), Fault> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || body(&machine))
        .map(drop)
        .map_err(|error| Fault::new(Code::VmmStartFailed, format!("{name} thread: {error}")))
}

/// Waits for the deadline and for the guest's end, and lets the machine look.
fn watch_loop(machine: &Weak<Machine>) {
    sandbox::narrow(Thread::Watch);
    while let Some(machine) = machine.upgrade() {
        let vm = machine.built();
        let ended = vm.ended();
        let mut fds = [
            PollFd::new(machine.timer.as_fd(), PollFlags::POLLIN),
            PollFd::new(fd::lend(ended), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::from(WATCH_PERIOD_MS)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => error!(%error, "the watch cannot wait"),
        }
        // Both are only bells: what they mean is read from the clock and the gate.
        let _ = machine.timer.wait();
        let _ = ended.read();
        machine.look();
    }
}
