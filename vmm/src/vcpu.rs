//! vCPU threads: who may be inside `KVM_RUN`, and how they are got out.
//!
//! ```text
//!   parked ──enter: wanted, lease alive, guest not over──► running ──kick, lease over, guest over──► parked
//! ```
//!
//! A thread leaves `KVM_RUN` for good only through `EINTR`: after an I/O exit it always enters again, so that KVM completes
//! the instruction, and `immediate_exit` turns that entry back at once (Linux, Documentation/virt/kvm/api.rst, 4.10 and 5).
//! So a parked vCPU has no half-done instruction, and its state can be saved.
//!
//! To kick: set `immediate_exit`, then send the signal. Whichever the thread meets first brings it out; there is no moment in which
//! both are missed.
//!
//! The deadline needs nobody else: each thread has a timer of its own on `CLOCK_BOOTTIME`, armed for the gate's deadline, whose signal's
//! handler sets that vCPU's `immediate_exit`. Before an entry the thread arms the timer, then clears the flag, then looks at the clock. A
//! deadline that passed before the look is seen by it; one that passes later is a signal, and that ends the entry wherever the
//! thread was: even one that was stopped with `SIGSTOP` just before `KVM_RUN` and wakes an hour later runs the handler first.
//! No lock of the machine is needed for it, no other thread, and no log. When a deadline rises, the timer still fires at the old one,
//! and the thread arms it anew.
//!
//! A throttle ([`crate::throttle`]) keeps vCPUs out of the guest for a share of each period. The same timer ends a vCPU's turn: it is armed
//! for the deadline or the turn's end, whichever is first, and everything is looked at after the flag was cleared, the turn and the
//! throttle too. Between two turns the thread waits at the gate's condition, outside `KVM_RUN` and without an instruction half done;
//! stopping, the deadline and a change of the throttle end that wait, so neither a pause nor a release waits for a rest.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use drover_proto::{Code, Fault};
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{VcpuExit, VcpuFd};
use tracing::{error, info};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::Devices;
use crate::memory::Memory;
use crate::sandbox::{self, Thread};
use crate::throttle::{PERCENT_MAX, Pace, Turn};
use crate::time::boottime_ns;

/// How long [`Gate::stop`] waits before it kicks again. One kick is enough; this is only a net under it.
const KICK_AGAIN: Duration = Duration::from_millis(20);
/// Bytes of code that are logged when the guest cannot go on (the longest instruction has 15).
const CODE_BYTES: usize = 16;

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It shut itself down.
    Exited,
    /// It cannot go on.
    Failed(Fault),
}

/// A vCPU and what it takes to get its thread out of it.
#[derive(Debug)]
pub struct VcpuCell {
    /// The vCPU's number and APIC id.
    pub id: u32,
    fd: Mutex<VcpuFd>,
    cpuid: Mutex<Vec<kvm_cpuid_entry2>>,
    immediate_exit: raw::ImmediateExit,
    thread: OnceLock<libc::pthread_t>,
}

impl VcpuCell {
    /// Wraps vCPU `id`.
    pub fn new(id: u32, mut fd: VcpuFd) -> Self {
        let immediate_exit = raw::ImmediateExit::of(&mut fd);
        Self {
            id,
            fd: Mutex::new(fd),
            cpuid: Mutex::default(),
            immediate_exit,
            thread: OnceLock::new(),
        }
    }

    /// The vCPU. Its thread holds this while it runs: only to be called while it is parked, else this waits.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().expect("no holder of a vCPU's lock panics")
    }

    /// What the guest sees of the CPU, as it was set last.
    pub fn cpuid(&self) -> MutexGuard<'_, Vec<kvm_cpuid_entry2>> {
        self.cpuid.lock().expect("no holder of the CPUID's lock panics")
    }

    fn kick(&self) {
        self.immediate_exit.get().store(1, Ordering::SeqCst);
        if let Some(&thread) = self.thread.get() {
            raw::signal(thread);
        }
    }
}

#[derive(Debug, Default)]
struct State {
    wanted: bool,
    quit: bool,
    running: u32,
    end: Option<GuestEnd>,
}

/// Where vCPU threads wait until they may run.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    deadline_ns: AtomicU64,
    throttle_percent: AtomicU32,
    ended: EventFd,
}

impl Gate {
    /// A closed gate; `ended` is written when a guest has ended.
    pub fn new(ended: EventFd) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            deadline_ns: AtomicU64::new(0),
            throttle_percent: AtomicU32::new(0),
            ended,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the gate's lock panics")
    }

    /// Lets vCPUs run until the `CLOCK_BOOTTIME` `deadline_ns`.
    pub fn open(&self, deadline_ns: u64) {
        let mut state = self.state();
        self.deadline_ns.store(deadline_ns, Ordering::SeqCst);
        state.wanted = true;
        self.changed.notify_all();
    }

    /// Stops all vCPUs; on return none executes.
    pub fn stop(&self, cells: &[Arc<VcpuCell>]) {
        let mut state = self.state();
        state.wanted = false;
        // Those that rest between two turns are in no guest to be kicked out of.
        self.changed.notify_all();
        while state.running > 0 {
            for cell in cells {
                cell.kick();
            }
            let waited = self.changed.wait_timeout(state, KICK_AGAIN);
            state = waited.expect("no holder of the gate's lock panics").0;
        }
    }

    /// Keeps each vCPU out of the guest for `percent` of its time, at most [`PERCENT_MAX`]; 0: not at all. At once.
    pub fn throttle(&self, percent: u32, cells: &[Arc<VcpuCell>]) {
        let state = self.state();
        let percent = percent.min(PERCENT_MAX);
        if self.throttle_percent.swap(percent, Ordering::SeqCst) != percent {
            for cell in cells {
                cell.kick();
            }
            self.changed.notify_all();
        }
        drop(state);
    }

    /// What [`Gate::throttle`] was told last.
    pub fn throttled(&self) -> u32 {
        self.throttle_percent.load(Ordering::SeqCst)
    }

    /// Stops all vCPUs and ends their threads.
    pub fn quit(&self, cells: &[Arc<VcpuCell>]) {
        self.stop(cells);
        self.state().quit = true;
        self.changed.notify_all();
    }

    /// How the guest ended, if it has.
    pub fn end(&self) -> Option<GuestEnd> {
        self.state().end.clone()
    }

    /// Waits until this vCPU may run. False: its thread is to end.
    fn enter(&self, cell: &VcpuCell, timer: &mut raw::DeadlineTimer) -> bool {
        let mut state = self.state();
        loop {
            if state.quit {
                return false;
            }
            if state.wanted && state.end.is_none() {
                // Under the lock, so that a `stop` comes either wholly before, and is seen, or wholly after, and kicks.
                self.prepare(cell, timer, u64::MAX);
                if !self.expired() {
                    break;
                }
            }
            state = self
                .changed
                .wait(state)
                .expect("no holder of the gate's lock panics");
        }
        state.running += 1;
        self.changed.notify_all();
        true
    }

    /// Makes an entry possible that the deadline ends, or the turn's end at `until`. In this order: what passes after the store sets
    /// the flag again.
    fn prepare(&self, cell: &VcpuCell, timer: &mut raw::DeadlineTimer, until: u64) {
        timer.arm(self.deadline_ns.load(Ordering::SeqCst).min(until));
        cell.immediate_exit.get().store(0, Ordering::SeqCst);
    }

    /// Makes the next entry possible, once it is this vCPU's turn. False: it is to leave, for a stop, the deadline or the guest's end.
    fn admit(&self, cell: &VcpuCell, timer: &mut raw::DeadlineTimer, pace: &mut Pace) -> bool {
        while self.keep_running() {
            let percent = self.throttled();
            let until = match pace.turn(percent, boottime_ns()) {
                Turn::Run(until) => until,
                Turn::Rest(until) => {
                    self.rest(percent, until);
                    continue;
                }
            };
            self.prepare(cell, timer, until);
            // Whatever came between the questions above and the store had its kick overwritten: ask again.
            let same = percent == self.throttled();
            if same && boottime_ns() < until && self.keep_running() {
                return true;
            }
        }
        false
    }

    /// Waits outside the guest until `until`, or until something has changed.
    fn rest(&self, percent: u32, until: u64) {
        let until = until.min(self.deadline_ns.load(Ordering::SeqCst));
        let state = self.state();
        // Under the lock, so that what changes after this question wakes the wait.
        let as_asked = state.wanted && percent == self.throttled();
        let left = Duration::from_nanos(until.saturating_sub(boottime_ns()));
        if as_asked && state.end.is_none() && !left.is_zero() {
            let waited = self.changed.wait_timeout(state, left);
            drop(waited.expect("no holder of the gate's lock panics"));
        }
    }

    /// Waits, but not for long, until a vCPU has passed the gate: for measuring how long a resume takes.
    pub fn await_running(&self) {
        let waited = self
            .changed
            .wait_timeout_while(self.state(), KICK_AGAIN, |state| state.running == 0);
        drop(waited.expect("no holder of the gate's lock panics"));
    }

    fn leave(&self, end: Option<GuestEnd>) {
        let mut state = self.state();
        state.running -= 1;
        if let Some(end) = end {
            self.conclude(&mut state, end);
        }
        self.changed.notify_all();
    }

    /// The guest cannot go on, for a reason outside of it: kicks all vCPUs out, and none comes in again. Waits for them no longer than
    /// `wait`; gives whether none executes. One may be in a system call that nothing interrupts.
    pub fn fail(&self, fault: Fault, cells: &[Arc<VcpuCell>], wait: Duration) -> bool {
        let until = Instant::now() + wait;
        let mut state = self.state();
        self.conclude(&mut state, GuestEnd::Failed(fault));
        self.changed.notify_all();
        while state.running > 0 && Instant::now() < until {
            for cell in cells {
                cell.kick();
            }
            let waited = self.changed.wait_timeout(state, KICK_AGAIN);
            state = waited.expect("no holder of the gate's lock panics").0;
        }
        state.running == 0
    }

    fn conclude(&self, state: &mut State, end: GuestEnd) {
        state.end.get_or_insert(end);
        if let Err(error) = self.ended.write(1) {
            error!(%error, "the guest's end cannot be announced");
        }
    }

    fn expired(&self) -> bool {
        boottime_ns() >= self.deadline_ns.load(Ordering::SeqCst)
    }

    fn keep_running(&self) -> bool {
        if self.expired() {
            return false;
        }
        let state = self.state();
        state.wanted && state.end.is_none()
    }
}

/// What a vCPU thread works with.
pub struct Context {
    /// The vCPU.
    pub cell: Arc<VcpuCell>,
    /// Its gate.
    pub gate: Arc<Gate>,
    /// Its devices.
    pub devices: Arc<Devices>,
    /// The guest's memory.
    pub memory: Arc<Memory>,
}

/// The body of a vCPU's thread: runs whenever the gate lets it, until the gate says quit.
pub fn run(context: &Context) {
    let thread = raw::this_thread();
    context.cell.thread.get_or_init(|| thread);
    let mut timer = match raw::DeadlineTimer::of_this_thread(&context.cell.immediate_exit) {
        Ok(timer) => timer,
        Err(error) => {
            // Without it nothing runs.
            let message = format!("no timer for the deadline of vCPU {}: {error}", context.cell.id);
            let end = GuestEnd::Failed(Fault::new(Code::VmmStartFailed, message));
            context.gate.conclude(&mut context.gate.state(), end);
            return;
        }
    };
    sandbox::narrow(Thread::Vcpu);
    while context.gate.enter(&context.cell, &mut timer) {
        let end = execute(context, &mut timer);
        context.gate.leave(end);
    }
}

/// Executes the vCPU until it is kicked out or the guest ends.
fn execute(context: &Context, timer: &mut raw::DeadlineTimer) -> Option<GuestEnd> {
    let Context {
        cell,
        gate,
        devices,
        memory,
    } = context;
    let mut fd = cell.fd();
    let mut pace = Pace::default();
    if !gate.admit(cell, timer, &mut pace) {
        return None;
    }
    loop {
        let exit = match fd.run() {
            Ok(exit) => exit,
            Err(error) if error.errno() == libc::EINTR => {
                if gate.admit(cell, timer, &mut pace) {
                    continue;
                }
                return None;
            }
            Err(error) if error.errno() == libc::EAGAIN => continue,
            Err(error) => return Some(kvm_failure(&fd, memory, &format!("KVM_RUN failed: {error}"))),
        };
        let end = match exit {
            VcpuExit::IoOut(port, data) => devices.port_write(port, data),
            VcpuExit::IoIn(port, data) => {
                devices.port_read(port, data);
                None
            }
            VcpuExit::MmioRead(gpa, data) => {
                devices.mmio_read(gpa, data);
                None
            }
            VcpuExit::MmioWrite(gpa, data) => {
                devices.mmio_write(gpa, data);
                None
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => None,
            other => {
                let seen = Ended::of(&other);
                Some(seen.describe(&mut fd, memory, cell.id))
            }
        };
        if end.is_some() {
            return end;
        }
        if gate.expired() {
            // The pending exit is completed by one more entry, which returns at once.
            cell.immediate_exit.get().store(1, Ordering::SeqCst);
        }
    }
}

/// The exits that end a guest, freed of their borrow of the vCPU.
enum Ended {
    TripleFault,
    Internal,
    System(u32),
    Other(String),
}

impl Ended {
    fn of(exit: &VcpuExit) -> Self {
        match exit {
            VcpuExit::Shutdown => Self::TripleFault,
            VcpuExit::InternalError => Self::Internal,
            VcpuExit::SystemEvent(kind, _) => Self::System(*kind),
            other => Self::Other(format!("{other:?}")),
        }
    }

    fn describe(self, fd: &mut VcpuFd, memory: &Memory, id: u32) -> GuestEnd {
        match self {
            Self::System(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN) => {
                info!("the guest shut itself down");
                GuestEnd::Exited
            }
            Self::TripleFault | Self::System(kvm_bindings::KVM_SYSTEM_EVENT_RESET) => {
                let at = log_state(fd, memory, "triple fault");
                let message = format!("vCPU {id} triple-faulted at {at}");
                GuestEnd::Failed(Fault::new(Code::GuestTripleFault, message))
            }
            Self::Internal if raw::suberror(fd) == kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => {
                let at = log_state(fd, memory, "emulation failure");
                let message = format!("KVM cannot emulate what vCPU {id} executes at {at}");
                GuestEnd::Failed(Fault::new(Code::GuestEmulationFailure, message))
            }
            Self::Internal => {
                let what = format!("internal error {} of vCPU {id}", raw::suberror(fd));
                kvm_failure(fd, memory, &what)
            }
            Self::System(kind) => kvm_failure(fd, memory, &format!("system event {kind} of vCPU {id}")),
            Self::Other(exit) => kvm_failure(fd, memory, &format!("vCPU {id} exited with {exit}")),
        }
    }
}

fn kvm_failure(fd: &VcpuFd, memory: &Memory, what: &str) -> GuestEnd {
    let at = log_state(fd, memory, what);
    GuestEnd::Failed(Fault::new(Code::GuestKvmFailure, format!("{what}, at {at}")))
}

/// Logs registers and the bytes at the instruction pointer; returns both in short.
fn log_state(fd: &VcpuFd, memory: &Memory, what: &str) -> String {
    let Ok(regs) = fd.get_regs() else {
        return "an address that KVM does not tell".to_owned();
    };
    let cs_base = fd
        .get_sregs()
        .map_or(0, |sregs| if sregs.cs.l == 1 { 0 } else { sregs.cs.base });
    let mut code = [0u8; CODE_BYTES];
    let linear = cs_base.wrapping_add(regs.rip);
    let bytes = fd
        .translate_gva(linear)
        .ok()
        .filter(|translated| translated.valid != 0)
        .and_then(|translated| {
            memory
                .mapped()
                .read(&mut code, GuestAddress(translated.physical_address))
                .ok()
        })
        .map_or(&[][..], |read| &code[..read]);
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let bytes = bytes.join(" ");
    error!(
        what,
        ?regs,
        rip = format!("{:#x}", regs.rip),
        bytes,
        "the guest cannot go on"
    );
    if let Ok(sregs) = fd.get_sregs() {
        error!(?sregs, "its system registers");
    }
    format!(
        "rip {:#x}, bytes {}",
        regs.rip,
        if bytes.is_empty() { "unreadable" } else { &bytes }
    )
}

/// What touches the shared `kvm_run` page and signals.
#[allow(
    unsafe_code,
    reason = "signals, a timer, and the page that is shared with KVM"
)]
mod raw {
    use std::cell::Cell;
    use std::io;
    use std::ptr::{self, NonNull};
    use std::sync::Once;
    use std::sync::atomic::{AtomicU8, Ordering};

    use kvm_ioctls::VcpuFd;
    use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

    use crate::time::NS_PER_S;

    thread_local! {
        /// The flag of the vCPU whose timer this thread has, or null. Neither built nor torn down lazily, so a handler may read it.
        static OWN_FLAG: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
    }

    /// The flag in a vCPU's `kvm_run` page that turns an entry back.
    #[derive(Debug)]
    pub struct ImmediateExit(NonNull<AtomicU8>);

    // SAFETY: the pointer is to one byte of a shared mapping, used only as an atomic.
    unsafe impl Send for ImmediateExit {}
    // SAFETY: as above.
    unsafe impl Sync for ImmediateExit {}

    impl ImmediateExit {
        /// The flag of `fd`, which must live at least as long (it does: both are fields of one cell).
        pub fn of(fd: &mut VcpuFd) -> Self {
            let flag = &raw mut fd.get_kvm_run().immediate_exit;
            Self(NonNull::new(flag.cast()).expect("a field of a mapped structure is not null"))
        }

        pub fn get(&self) -> &AtomicU8 {
            // SAFETY: the mapping lives as long as the cell that holds both, see `of`; a byte is always aligned.
            unsafe { self.0.as_ref() }
        }
    }

    /// Turns this thread's next entry back: the signal may have come just before it.
    extern "C" fn turn_back(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: null, or the flag that the thread's `DeadlineTimer` borrows; an atomic store is safe in a handler.
        if let Some(flag) = unsafe { OWN_FLAG.get().as_ref() } {
            flag.store(1, Ordering::SeqCst);
        }
    }

    /// A timer of the calling thread on `CLOCK_BOOTTIME`, which turns the thread out of its vCPU.
    pub struct DeadlineTimer<'a> {
        id: libc::timer_t,
        armed_ns: u64,
        _flag: &'a ImmediateExit,
    }

    impl<'a> DeadlineTimer<'a> {
        /// Not armed yet. The signal must have its handler, see [`this_thread`].
        pub fn of_this_thread(flag: &'a ImmediateExit) -> io::Result<Self> {
            // SAFETY: all its fields may be zero.
            let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = SIGRTMIN();
            // SAFETY: always succeeds.
            event.sigev_notify_thread_id = unsafe { libc::gettid() };
            let mut id = ptr::null_mut();
            // SAFETY: both pointers are to live values of the right type.
            if unsafe { libc::timer_create(libc::CLOCK_BOOTTIME, &raw mut event, &raw mut id) } != 0 {
                return Err(io::Error::last_os_error());
            }
            OWN_FLAG.set(flag.get());
            Ok(Self {
                id,
                armed_ns: 0,
                _flag: flag,
            })
        }

        /// Fires at `deadline_ns`, at once if that has passed. Armed for it already, it stays as it is.
        pub fn arm(&mut self, deadline_ns: u64) {
            if deadline_ns == self.armed_ns {
                return;
            }
            let part =
                |value: u64| i64::try_from(value).expect("a 64-bit count of nanoseconds has few seconds");
            let zero = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let at = libc::itimerspec {
                it_interval: zero,
                it_value: libc::timespec {
                    tv_sec: part(deadline_ns / NS_PER_S),
                    tv_nsec: part(deadline_ns % NS_PER_S),
                },
            };
            // SAFETY: the timer lives until `drop`; the old value is not asked for.
            let set =
                unsafe { libc::timer_settime(self.id, libc::TIMER_ABSTIME, &raw const at, ptr::null_mut()) };
            assert_eq!(set, 0, "a timer that exists takes every time");
            self.armed_ns = deadline_ns;
        }
    }

    impl Drop for DeadlineTimer<'_> {
        fn drop(&mut self) {
            // SAFETY: the timer exists and is deleted once. What it sent is delivered to this thread before the call returns.
            unsafe { libc::timer_delete(self.id) };
            OWN_FLAG.set(ptr::null());
        }
    }

    /// The calling thread, prepared to be kicked.
    pub fn this_thread() -> libc::pthread_t {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            register_signal_handler(SIGRTMIN(), turn_back).expect("SIGRTMIN can be handled");
        });
        // SAFETY: always succeeds.
        unsafe { libc::pthread_self() }
    }

    /// Interrupts `KVM_RUN` of `thread`.
    pub fn signal(thread: libc::pthread_t) {
        // SAFETY: the thread is a vCPU's, which is joined only after it was last signalled, so its id is valid.
        unsafe { libc::pthread_kill(thread, SIGRTMIN()) };
    }

    /// The suberror of an exit that was `KVM_EXIT_INTERNAL_ERROR`.
    pub fn suberror(fd: &mut VcpuFd) -> u32 {
        // SAFETY: the exit's reason says that this member of the union is the one that was filled in.
        unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }
}
