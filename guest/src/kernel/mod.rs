//! The guest on its machine: one worker a processor, and on processor 0 the desk that reports and answers.
//!
//! ```text
//! boot.s (ring 0) -> probe_entry (ring 3)
//!   processor 0:  boot information -> clock -> timer -> wakes the others -> publishes the plan -> fills -> (journal, station, balloon, console) -> "probe up" -> work + desk
//!   the others:                                            wait for the plan -> timer -> fill -> work
//! ```
//!
//! Rust runs in ring 3 only: hosts without hardware virtualization run ring 3 natively and emulate ring 0.

mod balloon;
mod boot;
mod console;
mod desk;
mod disk;
mod disk_load;
mod machine;
mod net;
mod net_load;
mod plan;
mod port;
mod slots;
mod time;
mod virtio;
mod worker;

use core::sync::atomic::{AtomicUsize, Ordering};

use drover_probe::params::Params;
use drover_probe::report::Second;

use self::balloon::Balloon;
use self::boot::BootInfo;
use self::console::say;
use self::desk::Desk;
use self::disk::Bay;
use self::disk_load::LoadedDisk;
use self::net::Post;
use self::net_load::LoadedNet;
use self::plan::{PLAN, Plan};
use self::port::Port;
use self::slots::Slots;
use self::time::Clock;
use self::worker::Worker;

/// Processors whose pages all have their first content.
static FILLED: AtomicUsize = AtomicUsize::new(0);

/// Where boot.s enters ring 3, once a processor.
#[allow(unsafe_code, reason = "boot.s calls it by its name")]
// SAFETY: boot.s is the only other user of the name.
#[unsafe(no_mangle)]
extern "C" fn probe_entry(processor: usize, kind: u64, boot_address: u64) -> ! {
    if processor == 0 {
        first(kind, boot_address)
    } else {
        other(processor)
    }
}

fn first(kind: u64, boot_address: u64) -> ! {
    machine::fill_interrupt_table();
    console::open();
    let info = BootInfo::read(kind, boot_address);
    let plan = match info
        .command_line()
        .and_then(|line| Plan::make(line, info.layout()))
    {
        Ok(draft) => draft,
        Err(bad) => {
            say!("{bad}");
            machine::stop()
        }
    };
    let Some(clock) = Clock::find() else {
        say!("probe no clock: neither kvmclock nor a running 8254");
        machine::stop()
    };
    let Some(timer) = time::measure_timer(&clock) else {
        say!("probe no timer: the local APIC's counter does not move");
        machine::stop()
    };
    let memory = [plan.disk, plan.net, plan.balloon, plan.port];
    let cpus = machine::wake_others(plan.params.cpus, &clock);
    let plan = PLAN.publish(plan.with_machine(clock, timer, cpus));
    let mut worker = start_work(plan, 0);
    while FILLED.load(Ordering::Acquire) < plan.cpus {
        machine::idle();
    }
    let mut drivers = match Drivers::open(plan, memory) {
        Ok(drivers) => drivers,
        Err((what, why)) => {
            say!("probe no {what}: {why}");
            machine::stop()
        }
    };
    say!("{}", plan.up());
    let mut desk = Desk::new(plan);
    loop {
        let worked = worker.step();
        desk.tend(drivers.step());
        if !worked && !drivers.are_loaded() {
            machine::idle();
        }
    }
}

/// What processor 0 drives beside its pages.
struct Drivers {
    params: &'static Params,
    slots: Option<Slots>,
    bay: Option<Bay>,
    post: Option<Post>,
    disk_load: Option<LoadedDisk>,
    net_load: Option<LoadedNet>,
    balloon: Option<Balloon>,
}

impl Drivers {
    /// Opens what the plan asks for, in the memory that was set aside for disk, NIC, balloon and console. What cannot be, and why.
    fn open(
        plan: &'static Plan,
        [disk, net, balloon, port]: [Option<u64>; 4],
    ) -> Result<Drivers, (&'static str, &'static str)> {
        let params = &plan.params;
        let mut drivers = Drivers {
            params,
            slots: None,
            bay: None,
            post: None,
            disk_load: None,
            net_load: None,
            balloon: None,
        };
        let no_disk = |why| ("disk", why);
        let no_nic = |why| ("nic", why);
        match (disk, params.disk_bench) {
            (Some(memory), Some(bench)) => {
                drivers.disk_load = Some(LoadedDisk::open(plan, memory, bench).map_err(no_disk)?);
            }
            (Some(memory), None) => {
                drivers.bay = Some(Bay::open(memory, params.hot_plug, &plan.clock).map_err(no_disk)?);
            }
            (None, _) => {}
        }
        match (net, params.net_bench, params.net) {
            (Some(memory), Some(bench), _) => {
                drivers.net_load = Some(LoadedNet::open(plan, memory, bench).map_err(no_nic)?);
            }
            (Some(memory), None, Some(ip)) => {
                drivers.post = Some(Post::open(memory, ip, params.net_hot_plug).map_err(no_nic)?);
            }
            _ => {}
        }
        if params.spare_written {
            (0..plan.spare()).for_each(|index| balloon::write(plan.spare_page(index), index));
        }
        if let Some(memory) = balloon {
            drivers.balloon = Some(Balloon::open(memory, plan).map_err(|why| ("balloon", why))?);
        }
        if let Some(memory) = port {
            let port = Port::open(memory, plan.clock.ticks_per_s()).map_err(|why| ("console", why))?;
            console::take_port(port);
        }
        drivers.slots = (params.hot_plug || params.net_hot_plug).then(|| Slots::watch(&plan.clock));
        Ok(drivers)
    }

    /// Whether there is always something to do.
    fn are_loaded(&self) -> bool {
        self.disk_load.is_some() || self.net_load.is_some()
    }

    /// Does what is due, and says how far that is.
    fn step(&mut self) -> Second {
        if let Some(look) = self.slots.as_mut().and_then(Slots::look) {
            if let Some(bay) = self.bay.as_mut().filter(|_| self.params.hot_plug) {
                bay.change(&look);
            }
            if let Some(post) = self.post.as_mut().filter(|_| self.params.net_hot_plug) {
                post.change(&look);
            }
        }
        Second {
            disk: self.bay.as_mut().and_then(Bay::step),
            net: self.post.as_mut().and_then(Post::step),
            disk_load: self.disk_load.as_mut().map(LoadedDisk::step),
            net_load: self.net_load.as_mut().map(LoadedNet::step),
            balloon: self.balloon.as_mut().map(Balloon::step),
            ..Second::default()
        }
    }
}

fn other(processor: usize) -> ! {
    let plan = PLAN.wait();
    if processor >= plan.cpus {
        machine::stop();
    }
    let mut worker = start_work(plan, processor);
    loop {
        if !worker.step() {
            machine::idle();
        }
    }
}

fn start_work(plan: &'static Plan, processor: usize) -> Worker {
    plan.clock.register(processor);
    time::start_ticks(plan, processor);
    let mut worker = Worker::new(plan, processor);
    worker.fill();
    FILLED.fetch_add(1, Ordering::Release);
    worker
}

/// Where boot.s hands over an exception, in ring 3, with interrupts off and no interrupt table.
#[allow(unsafe_code, reason = "boot.s calls it by its name")]
// SAFETY: boot.s is the only other user of the name.
#[unsafe(no_mangle)]
extern "C" fn probe_exception(vector: u64, error: u64, rip: u64, cr2: u64, cs: u64, rsp: u64) -> ! {
    console::say_without_waiting(format_args!(
        "probe EXCEPTION vector={vector} error={error:#x} rip={rip:#x} cr2={cr2:#x} cs={cs:#x} rsp={rsp:#x}"
    ));
    machine::triple_fault()
}

#[panic_handler]
fn panicked(info: &core::panic::PanicInfo<'_>) -> ! {
    let (file, line) = info.location().map_or(("?", 0), |at| (at.file(), at.line()));
    console::say_without_waiting(format_args!("probe PANIC at {file}:{line}: {}", info.message()));
    machine::triple_fault()
}
