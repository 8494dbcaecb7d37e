//! A VM as one thing: built, resumed, paused, saved, restored. It knows nothing of leases and epochs.
//!
//! ```text
//!   build ──► paused ◄──resume / pause──► running
//!                │
//!                ├── save: the VmSave of this instant; memory is read by pages
//!                └── restore: before the first resume, into a VM built without a kernel
//!
//! A VM can be built on the memory of another VMM's, to take it over. Until that is decided it only reads there: the mapping is
//! read-only, so that neither this process nor KVM on its behalf can write, whatever the restored state asks for.
//! ```

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use drover_migration::convergence::Costs;
use drover_migration::vm::PageSet;
use drover_proto::{Code, Fault};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_cpuid_entry2, kvm_msr_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};
use tracing::{debug, error};
use vmm_sys_util::eventfd::EventFd;

use crate::backing;
use crate::boot::start::{self, Entry};
use crate::caps::Caps;
use crate::cpu::clock::BLACKOUT_NS_MAX;
use crate::cpu::profile::{self, Profile};
use crate::cpu::state;
use crate::devices::Devices;
use crate::devices::acpi::{Acpi, Line, SCI_IRQ};
use crate::devices::attached::{At, Attached, Equipment};
use crate::devices::console::Console;
use crate::devices::gate::IoGate;
use crate::devices::serial::{IRQ, SerialPort};
use crate::dirty::{Bitmap, DirtyTracker};
use crate::irqchip;
use crate::memory::Memory;
use crate::opened;
use crate::save::{self, Saved, SavedClock, SavedVcpu, bad};
use crate::vcpu::{self, Context, Gate, GuestEnd, VcpuCell};

/// Three pages for KVM's task-state segment on Intel hosts without unrestricted guests, within the 32-bit hole.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page for its identity map.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// What a state costs however small it is: two hosts wake each other up.
const WAKING: Duration = Duration::from_micros(500);
/// Saving and restoring a vCPU, twice what was measured.
const VCPU_STATE_TIME: Duration = Duration::from_micros(200);
/// At most so large is a vCPU's state: registers, XSAVE area, MSRs, CPUID.
const VCPU_STATE_BYTES: u64 = 16 << 10;

/// So long a hand-over waits for requests of disks that are under way. A request moves at most 16 MiB, so a disk that takes longer hangs, and
/// the VM is better off where it is.
const DRAIN_BOUND: Duration = Duration::from_secs(5);

/// The same of a snapshot, which is not worth a longer stand.
const SNAPSHOT_DRAIN_BOUND: Duration = Duration::from_secs(2);

/// What a VM is made of.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory, bytes, whole MiB.
    pub memory_bytes: u64,
    /// Whether the memory is to be of huge pages, if the host allows it.
    pub huge_pages: bool,
    /// What the guest sees of the CPU.
    pub profile: Profile,
}

/// A VM.
pub struct Vm {
    fd: Arc<VmFd>,
    caps: Caps,
    msr_indices: Vec<u32>,
    supported_cpuid: Vec<kvm_cpuid_entry2>,
    memory: Arc<Memory>,
    devices: Arc<Devices>,
    /// When the devices may work.
    io: Arc<IoGate>,
    console: Arc<Console>,
    cells: Vec<Arc<VcpuCell>>,
    gate: Arc<Gate>,
    ended: EventFd,
    tracker: Mutex<Box<dyn DirtyTracker>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// As long as the memory may not be written to: what every vCPU is told again once it may.
    guarded: Mutex<Option<Vec<Vec<kvm_msr_entry>>>>,
}

fn start_failed(what: &str, error: impl std::fmt::Display) -> Fault {
    Fault::new(Code::VmmStartFailed, format!("{what}: {error}"))
}

impl Vm {
    /// Builds a paused VM without a kernel: to be booted with [`Vm::boot`] or filled with [`Vm::restore`].
    pub fn build(shape: Shape) -> Result<Self, Fault> {
        let memory = backing::create(shape.memory_bytes, shape.huge_pages)?;
        Self::build_of(shape, &opened::kvm()?, &memory)
    }

    /// [`Vm::build`] of what is open already; `memory` is a file of zeroes, as long as is due.
    pub fn build_of(shape: Shape, kvm: &Kvm, memory: &File) -> Result<Self, Fault> {
        let memory = || Memory::of_file(memory, shape.memory_bytes, shape.huge_pages);
        Self::assemble(shape, kvm, memory, Arc::default())
    }

    /// Builds a paused VM on the memory of another VMM's, which that one may still be running: to be filled with [`Vm::restore`]. It does
    /// not write to the memory until [`Vm::open_memory`].
    pub fn build_on(shape: Shape, memory: &File, console: Arc<Console>) -> Result<Self, Fault> {
        Self::build_on_of(shape, &opened::kvm()?, memory, console)
    }

    /// [`Vm::build_on`] with KVM open already.
    pub fn build_on_of(shape: Shape, kvm: &Kvm, memory: &File, console: Arc<Console>) -> Result<Self, Fault> {
        let vm = Self::assemble(
            shape,
            kvm,
            || Memory::adopt(memory, shape.memory_bytes, shape.huge_pages),
            console,
        )?;
        *vm.guarded() = Some(Vec::new());
        Ok(vm)
    }

    fn assemble(
        shape: Shape,
        kvm: &Kvm,
        memory: impl FnOnce() -> Result<Memory, Fault>,
        console: Arc<Console>,
    ) -> Result<Self, Fault> {
        let mut caps = Caps::ask(kvm)?;
        let fd = kvm
            .create_vm()
            .map_err(|error| start_failed("KVM creates no VM", error))?;
        caps.enable(&fd);
        debug!(?caps, "KVM");
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(|error| start_failed("task-state address", error))?;
        if caps.identity_map {
            fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
                .map_err(|error| start_failed("identity map", error))?;
        }
        // Before the interrupt controllers, whose making leaves KVM a grace period to wait for (Linux 6.18), behind which that of the memory would come.
        let memory = Arc::new(memory()?);
        set_slots(&fd, &memory, false)?;
        irqchip::create(&fd)?;
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let line = eventfd().map_err(|error| start_failed("eventfd", error))?;
        fd.register_irqfd(&line, IRQ)
            .map_err(|error| start_failed("serial port's interrupt", error))?;
        let ended = eventfd().map_err(|error| start_failed("eventfd", error))?;
        let clone = || ended.try_clone().map_err(|error| start_failed("eventfd", error));
        let (announce, gone) = (clone()?, clone()?);
        let (fd, io) = (Arc::new(fd), Arc::<IoGate>::default());
        let devices = Arc::new(Devices::new(
            SerialPort::new(line, console.clone())?,
            Acpi::new(Box::new(Sci(fd.clone()))),
            Attached::new(&fd, &memory, &io, &console, gone),
        ));
        let vm = Self {
            io,
            msr_indices: state::msr_indices(kvm)?,
            supported_cpuid: supported_cpuid(kvm)?,
            cells: cells(&fd, shape.vcpus)?,
            tracker: Mutex::new(Box::new(Bitmap::new(&caps))),
            gate: Arc::new(Gate::new(announce)),
            threads: Mutex::default(),
            guarded: Mutex::default(),
            fd,
            caps,
            memory,
            devices,
            console,
            ended,
        };
        vm.start_threads()?;
        Ok(vm)
    }

    /// Puts `equipment` on the VM's bus. Once, before it is booted or restored.
    pub fn equip(&self, equipment: Equipment) -> Result<(), Fault> {
        if !equipment.is_empty() {
            self.can_route()?;
        }
        self.devices.attached.equip(equipment)
    }

    /// Whether devices on the bus could interrupt.
    pub fn can_route(&self) -> Result<(), Fault> {
        if self.caps.irq_routing {
            return Ok(());
        }
        let message = "this host's KVM lacks IRQ_ROUTING, without which a VM has neither disks nor NICs";
        Err(Fault::new(Code::KvmUnusable, message))
    }

    /// What is on the VM's bus, and how its guest is told of it.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// Prepares the vCPUs for the kernel that was loaded at `entry`.
    pub fn boot(&self, profile: Profile, entry: Entry) -> Result<(), Fault> {
        let count = u32::try_from(self.cells.len()).expect("a VM has at most 32 vCPUs");
        let cpuid = profile.apply(&self.supported_cpuid, count)?;
        for cell in &self.cells {
            let fd = cell.fd();
            let cpuid = profile::for_vcpu(&cpuid, cell.id);
            state::init(&fd, &cpuid)?;
            *cell.cpuid() = cpuid;
            if cell.id == 0 {
                let reset = fd
                    .get_sregs()
                    .map_err(|error| start_failed("system registers", error))?;
                fd.set_sregs(&start::sregs(entry, reset))
                    .map_err(|error| start_failed("system registers", error))?;
                fd.set_regs(&start::regs(entry))
                    .map_err(|error| start_failed("registers", error))?;
            }
        }
        Ok(())
    }

    fn start_threads(&self) -> Result<(), Fault> {
        let mut threads = self
            .threads
            .lock()
            .expect("no holder of the threads' lock panics");
        for cell in &self.cells {
            let context = Context {
                cell: cell.clone(),
                gate: self.gate.clone(),
                devices: self.devices.clone(),
                memory: self.memory.clone(),
            };
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{}", cell.id))
                .spawn(move || vcpu::run(&context))
                .map_err(|error| start_failed("vCPU thread", error))?;
            threads.push(thread);
        }
        Ok(())
    }

    /// Lets the vCPUs run until the `CLOCK_BOOTTIME` `deadline_ns`, at the latest.
    pub fn resume(&self, deadline_ns: u64) {
        self.gate.open(deadline_ns);
    }

    /// Lets the devices on the bus work until the `CLOCK_BOOTTIME` `deadline_ns`, at the latest. A fault: a disk cannot be locked for this
    /// VM; nothing of it may run then.
    pub fn open_devices(&self, deadline_ns: u64) -> Result<(), Fault> {
        self.io.open(deadline_ns)
    }

    /// Has the devices look at their queues again: what kept some waiting is over.
    pub fn wake_devices(&self) {
        self.io.wake();
    }

    /// Tells the network where the VM is, from a thread that ends: it has just begun to run here.
    pub fn announce_nics(&self) {
        self.devices.attached.announce();
    }

    /// Waits, but not for long, until a vCPU executes after [`Vm::resume`].
    pub fn await_running(&self) {
        self.gate.await_running();
    }

    /// Tells the guest that it was paused, so that its watchdogs do not take that for a hang. vCPUs must be parked.
    pub fn announce_pause(&self) {
        if !self.caps.kvmclock_ctrl {
            return;
        }
        for cell in &self.cells {
            // Refused where the guest uses no kvmclock: then there is nobody to tell.
            let _ = cell.fd().kvmclock_ctrl();
        }
    }

    /// Stops the vCPUs; on return none executes, and none has a half-done instruction. Devices begin no further request; what they have
    /// begun may end later, and disks are unlocked when the last has.
    pub fn pause(&self) {
        self.gate.stop(&self.cells);
        self.io.close(false);
    }

    /// [`Vm::pause`], but disks stay locked until [`Vm::drain`].
    pub fn pause_to_hand_over(&self) {
        self.gate.stop(&self.cells);
        self.io.close(true);
    }

    /// Waits until the devices of a VM that was paused have ended what they had begun, for at most five seconds; with `sync` what they
    /// wrote is on the medium then. Disks are unlocked. After it no device writes to memory, so the last dirty pages can be asked for.
    pub fn drain(&self, sync: bool) -> Result<(), Fault> {
        self.io.drain(DRAIN_BOUND, sync)
    }

    /// Waits until the devices of a VM that was paused by [`Vm::pause_to_hand_over`] have ended what they had begun, for at most two seconds. Disks stay
    /// locked, and nothing is flushed: the VM goes on here.
    pub fn await_drained(&self) -> Result<(), Fault> {
        self.io.await_drained(SNAPSHOT_DRAIN_BOUND)
    }

    /// Keeps each vCPU out of the guest for `percent` of its time, 0 to 99; 0 lets it run freely, at once.
    pub fn throttle(&self, percent: u32) {
        self.gate.throttle(percent, &self.cells);
    }

    /// How much of its time each vCPU is kept out of the guest, percent.
    pub fn throttled(&self) -> u32 {
        self.gate.throttled()
    }

    /// What a switchover of this VM costs beside the last pages. The devices and the interrupt controllers are saved once for show, which
    /// the guest does not notice; that counts four times, for save, way, checks and restore, on processors that may be busier then.
    /// vCPUs cannot be saved while they run: each is taken as 0.2 ms and 16 KiB, twice what was measured, and the two hosts' waking each
    /// other up as 0.5 ms. Where the VM cannot be saved, the migration will find that out; here it is taken for a slow one.
    pub fn switchover_costs(&self) -> Costs {
        let vcpus = u32::try_from(self.cells.len()).expect("a VM has at most 32 vCPUs");
        let began = Instant::now();
        let devices = state::save_clock(&self.fd)
            .and_then(|clock| self.save_rest(Vec::new(), clock))
            .map(|saved| save::encode(&saved).len());
        let took = began.elapsed();
        let Ok(bytes) = devices else {
            return Costs::default();
        };
        Costs {
            pause: Duration::from_millis(1),
            state: took * 4 + WAKING + VCPU_STATE_TIME * vcpus,
            state_bytes: u64::try_from(bytes).unwrap_or(u64::MAX) + VCPU_STATE_BYTES * u64::from(vcpus),
            ..Costs::default()
        }
    }

    /// Ends the guest for a reason outside of it, its devices with it: see [`Gate::fail`]. Gives whether nobody touches its memory any more.
    pub fn fail(&self, fault: Fault, wait: Duration) -> bool {
        self.io.quit();
        self.gate.fail(fault, &self.cells, wait) && self.io.is_idle()
    }

    /// How the guest ended, if it has.
    pub fn end(&self) -> Option<GuestEnd> {
        self.gate.end()
    }

    /// Becomes readable when the guest has ended.
    pub fn ended(&self) -> &EventFd {
        &self.ended
    }

    /// When its devices may work.
    pub fn io_gate(&self) -> Arc<IoGate> {
        self.io.clone()
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The guest's console.
    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }

    /// Types on the console, by its virtio device where that has a driver that takes any; returns how many bytes fitted.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let by_virtio = self.devices.attached.type_in(bytes);
        by_virtio.unwrap_or_else(|| self.devices.serial().type_in(bytes))
    }

    /// The least device model that can take the VM over as it is now.
    pub fn device_model(&self) -> u32 {
        let here: Vec<At> = self.devices.attached.list();
        let here = here.into_iter().filter(|at| !at.leaves);
        let here = here.map(|at| (at.slot, at.about.device_model()));
        save::device_model(here, &self.devices.acpi.registers())
    }

    /// The state of a paused and drained VM.
    pub fn save(&self) -> Result<Saved, Fault> {
        if !self.io.is_drained() {
            let message = "a device's request is under way";
            return Err(Fault::new(Code::Internal, message));
        }
        let mut vcpus = Vec::with_capacity(self.cells.len());
        // All clocks are read before and together: the TSC offsets belong to this instant.
        let clock = state::save_clock(&self.fd)?;
        for cell in &self.cells {
            vcpus.push(state::save(
                &cell.fd(),
                &self.caps,
                &self.msr_indices,
                &cell.cpuid(),
            )?);
        }
        self.save_rest(vcpus, clock)
    }

    /// All but the vCPUs, which were saved already.
    fn save_rest(&self, vcpus: Vec<SavedVcpu>, clock: SavedClock) -> Result<Saved, Fault> {
        Ok(Saved {
            vcpus,
            irqchip: irqchip::save(&self.fd)?,
            clock,
            serial: self.devices.serial().save(),
            memory_bytes: self.memory.bytes(),
            pci: Some(self.devices.attached.save()),
            acpi: self.devices.acpi.registers(),
        })
    }

    /// Takes over a saved VM; memory has been written already. A VM that refused may be used no further.
    pub fn restore(&self, saved: &Saved) -> Result<(), Fault> {
        self.restore_after(saved, BLACKOUT_NS_MAX)
    }

    /// [`Vm::restore`] of a VM that may have stood for as long as `longest_ns`.
    pub fn restore_after(&self, saved: &Saved, longest_ns: u64) -> Result<(), Fault> {
        if saved.vcpus.len() != self.cells.len() || saved.memory_bytes != self.memory.bytes() {
            return Err(bad(format!(
                "the saved VM has {} vCPUs and {} bytes of memory, this one was built with {} and {}",
                saved.vcpus.len(),
                saved.memory_bytes,
                self.cells.len(),
                self.memory.bytes()
            )));
        }
        state::check_cpuid(&saved.vcpus, &self.supported_cpuid)?;
        let plan = state::restore_clock(&self.fd, &self.caps, &saved.clock, longest_ns)?;
        irqchip::restore(&self.fd, &saved.irqchip)?;
        for (cell, vcpu) in self.cells.iter().zip(&saved.vcpus) {
            state::restore(&cell.fd(), &self.caps, vcpu, &plan)
                .map_err(|fault| Fault::new(fault.code, format!("vCPU {}: {}", cell.id, fault.message)))?;
            cell.cpuid().clone_from(&vcpu.cpuid);
        }
        if let Some(guarded) = self.guarded().as_mut() {
            *guarded = saved
                .vcpus
                .iter()
                .map(|vcpu| state::written_through(&vcpu.msrs))
                .collect();
        }
        // Last: they may raise their interrupts, which the controllers restored above must not forget.
        self.devices.serial().restore(&saved.serial)?;
        match &saved.pci {
            Some(pci) => self.devices.attached.restore(pci).map_err(bad)?,
            None => self.devices.attached.clear(),
        }
        self.devices.acpi.restore(saved.acpi);
        Ok(())
    }

    /// Lets this VM, built on another VMM's memory, write to it: that one never runs again. Nothing to do for any other, or twice.
    pub fn open_memory(&self) -> Result<(), Fault> {
        let mut guarded = self.guarded();
        let Some(msrs) = guarded.as_ref() else {
            return Ok(());
        };
        self.memory.open()?;
        for (cell, msrs) in self.cells.iter().zip(msrs) {
            state::restore_written_through(&cell.fd(), msrs)?;
        }
        *guarded = None;
        Ok(())
    }

    fn guarded(&self) -> MutexGuard<'_, Option<Vec<Vec<kvm_msr_entry>>>> {
        self.guarded.lock().expect("no holder of this lock panics")
    }

    /// [`Vm::restore`] of an encoded state.
    pub fn restore_encoded(&self, bytes: &[u8]) -> Result<(), Fault> {
        self.restore(&save::decode(bytes)?)
    }

    fn tracker(&self) -> MutexGuard<'_, Box<dyn DirtyTracker>> {
        self.tracker
            .lock()
            .expect("no holder of the tracker's lock panics")
    }

    /// How dirty pages are found, for receipts.
    pub fn tracker_name(&self) -> &'static str {
        self.tracker().name()
    }

    /// Whether the dirty log is on.
    pub fn logs_writes(&self) -> bool {
        self.tracker().is_on()
    }

    /// Starts the dirty log.
    pub fn start_dirty_log(&self) -> Result<(), Fault> {
        self.tracker().start(&self.fd, &self.memory)
    }

    /// Ends the dirty log.
    pub fn stop_dirty_log(&self) -> Result<(), Fault> {
        self.tracker().stop(&self.fd, &self.memory)
    }

    /// Adds to `into` the pages written since the last call, by the guest and by the VMM.
    pub fn take_dirty(&self, into: &mut PageSet) -> Result<(), Fault> {
        self.tracker().take(&self.fd, &self.memory, into)
    }

    /// The last [`Vm::take_dirty`], of a VM that was paused for a hand-over: it does not prepare for another.
    pub fn take_last_dirty(&self, into: &mut PageSet) -> Result<(), Fault> {
        self.tracker().take_last(&self.fd, &self.memory, into)
    }

    /// Adds to `into` pages that the guest wrote since the last call of [`Self::take_dirty`], which may or may not name them again.
    pub fn look_dirty(&self, into: &mut PageSet) -> Result<(), Fault> {
        self.tracker().look(&self.fd, &self.memory, into)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.gate.quit(&self.cells);
        let mut threads = self
            .threads
            .lock()
            .expect("no holder of the threads' lock panics");
        for thread in threads.drain(..) {
            // A panic in it was logged by the panic hook; there is nothing to add here.
            let _ = thread.join();
        }
    }
}

/// The line of ACPI's events.
struct Sci(Arc<VmFd>);

impl Line for Sci {
    fn set(&self, up: bool) {
        if let Err(error) = self.0.set_irq_line(u32::from(SCI_IRQ), up) {
            error!(%error, up, "KVM does not take the line of ACPI's events");
        }
    }
}

fn cells(fd: &VmFd, count: u32) -> Result<Vec<Arc<VcpuCell>>, Fault> {
    (0..count)
        .map(|id| {
            let vcpu = fd
                .create_vcpu(u64::from(id))
                .map_err(|error| start_failed(&format!("KVM creates no vCPU {id}"), error))?;
            Ok(Arc::new(VcpuCell::new(id, vcpu)))
        })
        .collect()
}

fn supported_cpuid(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, Fault> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| Fault::new(Code::KvmUnusable, format!("KVM names no CPUID: {error}")))?;
    Ok(cpuid.as_slice().to_vec())
}

/// Tells KVM where the guest's memory is, one slot a region, with or without a dirty log.
#[allow(unsafe_code, reason = "KVM maps memory by address")]
pub fn set_slots(vm: &VmFd, memory: &Memory, log_dirty: bool) -> Result<(), Fault> {
    for (slot, (region, mapped)) in (0u32..).zip(memory.pieces().iter().zip(memory.regions())) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: region.gpa,
            memory_size: region.len,
            userspace_addr: mapped.as_ptr() as u64,
        };
        // SAFETY: the range is a live shared mapping of exactly this size. It is unmapped only with `Memory`, which
        // `Vm` holds beside the VM's descriptor and the vCPU threads hold as long as they run.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(|error| start_failed("KVM refuses the guest's memory", error))?;
    }
    Ok(())
}
