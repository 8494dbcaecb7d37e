//! The guest on its machine: one worker a processor, and on processor 0 the desk that reports and answers.
//!
//! ```text
//! boot.s (ring 0) -> probe_entry (ring 3)
//!   processor 0:  boot information -> clock -> timer -> wakes the others -> publishes the plan -> fills -> (journal, station, balloon) -> "probe up" -> work + desk
//!   the others:                                            wait for the plan -> timer -> fill -> work
//! ```
//!
//! Rust runs in ring 3 only: hosts without hardware virtualization run ring 3 natively and emulate ring 0.

mod balloon;
mod boot;
mod console;
mod desk;
mod disk;
mod machine;
mod net;
mod plan;
mod time;
mod virtio;
mod worker;

use core::sync::atomic::{AtomicUsize, Ordering};

use self::balloon::Balloon;
use self::boot::BootInfo;
use self::console::say;
use self::desk::Desk;
use self::disk::Bay;
use self::net::Net;
use self::plan::{PLAN, Plan};
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
    let (disk_memory, net_memory, balloon_memory) = (plan.disk, plan.net, plan.balloon);
    let cpus = machine::wake_others(plan.params.cpus, &clock);
    let plan = PLAN.publish(plan.with_machine(clock, timer, cpus));
    let mut worker = start_work(plan, 0);
    while FILLED.load(Ordering::Acquire) < plan.cpus {
        machine::idle();
    }
    let hot_plug = plan.params.hot_plug;
    let mut bay = match disk_memory.map(|memory| Bay::open(memory, hot_plug, &plan.clock)) {
        None => None,
        Some(Ok(bay)) => Some(bay),
        Some(Err(why)) => {
            say!("probe no disk: {why}");
            machine::stop()
        }
    };
    let mut net = match net_memory
        .zip(plan.params.net)
        .map(|(memory, ip)| Net::open(memory, ip))
    {
        None => None,
        Some(Ok(net)) => Some(net),
        Some(Err(why)) => {
            say!("probe no nic: {why}");
            machine::stop()
        }
    };
    if plan.params.spare_written {
        (0..plan.spare()).for_each(|index| balloon::write(plan.spare_page(index), index));
    }
    let mut balloon = match balloon_memory.map(|memory| Balloon::open(memory, plan)) {
        None => None,
        Some(Ok(balloon)) => Some(balloon),
        Some(Err(why)) => {
            say!("probe no balloon: {why}");
            machine::stop()
        }
    };
    say!("{}", plan.up());
    let mut desk = Desk::new(plan);
    loop {
        let worked = worker.step();
        let journal = bay.as_mut().and_then(Bay::step);
        let station = net.as_mut().map(Net::step);
        let pages = balloon.as_mut().map(Balloon::step);
        desk.tend(journal, station, pages);
        if !worked {
            machine::idle();
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
