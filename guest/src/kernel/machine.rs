//! What the processor offers: ring 0's services, ports, the tables of boot.s, the other processors.
//!
//! Layouts and register offsets: Intel SDM volume 3, chapters 7 (task state, I/O permission bitmap), 6 (interrupt table) and 11 (local
//! APIC, start-up of application processors).
#![allow(unsafe_code, reason = "a kernel programs its machine")]

use core::arch::asm;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use drover_probe::CPUS_MAX;

use super::time::Clock;

// SAFETY: boot.s is part of this image and defines every symbol it uses, but for the two entries in mod.rs.
core::arch::global_asm!(include_str!("boot.s"), options(att_syntax));

const CPUS: usize = CPUS_MAX as usize;
const TSS_BYTES: usize = 512;
const TSS_LIMIT: u64 = 104 + 256;
const FIRST_TSS_ENTRY: usize = 6;
const TRAMPOLINE: usize = 0x8000;
const PAGE_DIRECTORIES_BUILT: u64 = 4;
/// Memory above is left alone: one page directory maps a GiB.
pub const MAPPED_GIB_MAX: u64 = 64;

/// The local APIC's registers.
pub mod lapic {
    /// Interrupt command, low half.
    pub const COMMAND: u32 = 0x300;
    /// The timer's vector and mode.
    pub const TIMER: u32 = 0x320;
    /// The timer's first count.
    pub const TIMER_INITIAL: u32 = 0x380;
    /// The timer's count now.
    pub const TIMER_CURRENT: u32 = 0x390;
    /// The timer's divider.
    pub const TIMER_DIVIDE: u32 = 0x3e0;
}

const TIMER_VECTOR: usize = 0x20;
/// The disk's interrupt.
pub const DISK_VECTOR: u32 = 0x21;
/// The NIC's interrupt.
pub const NET_VECTOR: u32 = 0x22;
const INVALID_OPCODE_VECTOR: usize = 6;
const SPURIOUS_VECTOR: usize = 0xff;

/// One processor's ring-0 stack; the timer's handler finds the counters at its bottom.
#[repr(C, align(4096))]
pub struct CpuArea {
    /// Ticks since boot.
    pub ticks: AtomicU64,
    /// The counter at the last tick.
    pub last_tick: AtomicU64,
    /// The longest time between two ticks since it was last taken.
    pub gap: AtomicU64,
    /// Ticks at which the counter was lower than at the tick before.
    pub back: AtomicU64,
    /// Interrupts of the disk.
    pub disk: AtomicU64,
    /// Interrupts of the NIC.
    pub net: AtomicU64,
    reserved: [AtomicU64; 2],
    /// The hypervisor's clock page.
    pub clock_page: [AtomicU32; 8],
    stack: [AtomicU8; 4000],
}

unsafe extern "C" {
    static cpu_areas: [CpuArea; CPUS];
    static idt: [AtomicU64; 512];
    static gdt: [AtomicU64; FIRST_TSS_ENTRY + 2 * CPUS];
    static tss: [[AtomicU32; TSS_BYTES / 4]; CPUS];
    static pdpt: [AtomicU64; 512];
    static next_cpu: AtomicU32;
    static cpu_limit: AtomicU32;
    static trampoline_start: u8;
    static trampoline_end: u8;
    static image_end: u8;
    fn timer_entry();
    fn disk_entry();
    fn net_entry();
    fn spurious_entry();
    fn invalid_opcode_entry();
    fn service_call();
    fn exception_stubs();
}

#[repr(align(4096))]
struct Directories([[AtomicU64; 512]; (MAPPED_GIB_MAX - PAGE_DIRECTORIES_BUILT) as usize]);

static DIRECTORIES: Directories = Directories(
    [const { [const { AtomicU64::new(0) }; 512] }; (MAPPED_GIB_MAX - PAGE_DIRECTORIES_BUILT) as usize],
);

/// A processor's area.
pub fn area(processor: usize) -> &'static CpuArea {
    // SAFETY: boot.s reserves CPUS areas of this layout; everything in them is atomic.
    unsafe { &cpu_areas[processor] }
}

/// The first address after the image and its zeroed memory.
pub fn end_of_image() -> u64 {
    (&raw const image_end).addr() as u64
}

/// The time-stamp counter.
pub fn counter() -> u64 {
    // SAFETY: every 64-bit processor has the instruction, and CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Numbers of boot.s's services.
#[derive(Clone, Copy)]
enum Service {
    Idle = 0,
    WriteMsr = 1,
    LapicRead = 2,
    LapicWrite = 3,
    Cpuid = 4,
    NoInterruptTable = 5,
    Emulation = 6,
    Stop = 7,
    ConfigRead = 8,
    ConfigWrite = 9,
}

fn call(service: Service, first: u64, second: u64) -> u64 {
    let answer;
    // SAFETY: a service keeps every register but these and touches memory only where its caller, a function of this module, points it.
    unsafe {
        asm!("call {service}", service = sym service_call, inlateout("rax") service as u64 => answer, in("rdi") first, inlateout("rsi") second => _,
            lateout("rcx") _, lateout("rdx") _);
    }
    answer
}

/// Sleeps until the next interrupt.
pub fn idle() {
    call(Service::Idle, 0, 0);
}

/// Ends this processor's work: interrupts off, halted.
pub fn stop() -> ! {
    loop {
        call(Service::Stop, 0, 0);
    }
}

/// Has KVM fail to emulate an instruction. Returns where the instruction works after all.
pub fn fail_emulation() {
    call(Service::Emulation, 0, 0);
}

/// Resets the machine by an exception without a handler.
pub fn triple_fault() -> ! {
    call(Service::NoInterruptTable, 0, 0);
    // SAFETY: raises an exception and never comes back.
    unsafe { asm!("ud2", options(noreturn)) }
}

/// Writes a model-specific register.
///
/// # Safety
/// The register exists, and the value makes nobody write to memory that Rust owns.
pub unsafe fn write_msr(register: u32, value: u64) {
    call(Service::WriteMsr, u64::from(register), value);
}

/// Reads a register of the local APIC.
pub fn lapic_read(register: u32) -> u32 {
    (call(Service::LapicRead, u64::from(register), 0) & 0xffff_ffff) as u32
}

/// Writes a register of the local APIC.
pub fn lapic_write(register: u32, value: u32) {
    call(Service::LapicWrite, u64::from(register), u64::from(value));
}

/// CPUID in ring 0, where a hypervisor always answers: eax, ebx, ecx, edx.
pub fn cpuid(leaf: u32) -> [u32; 4] {
    let mut answer = [0u32; 4];
    call(
        Service::Cpuid,
        u64::from(leaf),
        (&raw mut answer).expose_provenance() as u64,
    );
    // SAFETY: the service filled the array through the exposed pointer; a volatile read keeps the compiler from assuming zeros.
    unsafe { (&raw const answer).read_volatile() }
}

/// Reads 32 bits of PCI configuration space at `address`, in the form of port 0xcf8.
pub fn config_read(address: u32) -> u32 {
    (call(Service::ConfigRead, u64::from(address), 0) & 0xffff_ffff) as u32
}

/// Writes 32 bits of PCI configuration space.
///
/// # Safety
/// Whatever the device does then, it does not write to memory that Rust owns.
pub unsafe fn config_write(address: u32, value: u32) {
    call(Service::ConfigWrite, u64::from(address), u64::from(value));
}

/// Writes a byte to a port below 0x800.
pub fn port_write(port: u16, value: u8) {
    // SAFETY: the task state's bitmap opens the port; no device that the guest programs writes to memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// Writes a word to a port below 0x800.
pub fn port_write_word(port: u16, value: u16) {
    // SAFETY: as for port_write.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads a byte from a port below 0x800.
pub fn port_read(port: u16) -> u8 {
    let value;
    // SAFETY: as for port_write.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Writes 32 bits to ports below 0x800.
pub fn port_write_long(port: u16, value: u32) {
    // SAFETY: as for port_write.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads 32 bits from ports below 0x800.
pub fn port_read_long(port: u16) -> u32 {
    let value;
    // SAFETY: as for port_write.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Fills the interrupt table, which boot.s has loaded empty. Before anything that may fault and before the first service.
pub fn fill_interrupt_table() {
    let stubs = exception_stubs as *const () as u64;
    for vector in 0..32usize {
        gate(vector, stubs + 16 * vector as u64);
    }
    gate(TIMER_VECTOR, timer_entry as *const () as u64);
    gate(INVALID_OPCODE_VECTOR, invalid_opcode_entry as *const () as u64);
    gate(DISK_VECTOR as usize, disk_entry as *const () as u64);
    gate(NET_VECTOR as usize, net_entry as *const () as u64);
    gate(SPURIOUS_VECTOR, spurious_entry as *const () as u64);
    fence(Ordering::SeqCst);
}

fn gate(vector: usize, handler: u64) {
    const CODE: u64 = 0x10;
    const PRESENT_INTERRUPT: u64 = 0x8e00;
    let low = (handler & 0xffff) | CODE << 16 | PRESENT_INTERRUPT << 32 | (handler >> 16 & 0xffff) << 48;
    // SAFETY: boot.s reserves 256 entries of two words; everything in them is atomic.
    let table = unsafe { &idt };
    table[2 * vector + 1].store(handler >> 32, Ordering::Relaxed);
    table[2 * vector].store(low, Ordering::Relaxed);
}

/// Maps memory from 4 GiB up to `end`. Entries go from absent to present, so no translation needs to be flushed.
pub fn map_up_to(end: u64) {
    const LARGE: u64 = 0xe7; // dirty, accessed, 2 MiB, ring 3, writable, present
    let gibs = end.div_ceil(1 << 30).min(MAPPED_GIB_MAX);
    for gib in PAGE_DIRECTORIES_BUILT..gibs {
        let directory = &DIRECTORIES.0[(gib - PAGE_DIRECTORIES_BUILT) as usize];
        for (index, entry) in directory.iter().enumerate() {
            entry.store(gib << 30 | (index as u64) << 21 | LARGE, Ordering::Relaxed);
        }
        // SAFETY: boot.s's table of 512 entries; everything in it is atomic.
        let pointers = unsafe { &pdpt };
        pointers[gib as usize].store(directory.as_ptr().addr() as u64 | 7, Ordering::Release);
    }
}

/// Wakes the other processors and returns how many work, this one included. With a number given, waits until so many do or two seconds
/// have passed; without, until none has come for half a second.
pub fn wake_others(wanted: Option<u32>, clock: &Clock) -> usize {
    const ALL_BUT_SELF: u32 = 0xc_0000;
    const INIT: u32 = 0x4500;
    const START: u32 = 0x4600 | (TRAMPOLINE >> 12) as u32;
    let limit = wanted.unwrap_or(CPUS_MAX);
    if limit == 1 {
        return 1;
    }
    for processor in 1..CPUS {
        prepare(processor);
    }
    copy_trampoline();
    // SAFETY: boot.s's counters, atomic.
    let (next, most) = unsafe { (&next_cpu, &cpu_limit) };
    most.store(limit, Ordering::SeqCst);
    lapic_write(lapic::COMMAND, ALL_BUT_SELF | INIT);
    clock.wait_ms(10);
    lapic_write(lapic::COMMAND, ALL_BUT_SELF | START);
    clock.wait_ms(1);
    lapic_write(lapic::COMMAND, ALL_BUT_SELF | START);
    let patience_ms = if wanted.is_some() { 2000 } else { 500 };
    let mut seen = 1;
    let mut waited_ms = 0;
    while seen < limit && waited_ms < patience_ms {
        clock.wait_ms(1);
        waited_ms += 1;
        let now = next.load(Ordering::SeqCst);
        if now != seen && wanted.is_none() {
            waited_ms = 0;
        }
        seen = now;
    }
    // A processor that comes later finds the door closed, here in boot.s or by its number in the plan.
    let working = seen.min(limit);
    most.store(working, Ordering::SeqCst);
    working as usize
}

/// Fills a processor's task state and its descriptor.
fn prepare(processor: usize) {
    // SAFETY: boot.s's tables, atomic.
    let (state, descriptors) = unsafe { (&tss[processor], &gdt) };
    let stack_top = (area(processor) as *const CpuArea).addr() as u64 + size_of::<CpuArea>() as u64;
    state[1].store((stack_top & 0xffff_ffff) as u32, Ordering::Relaxed);
    state[2].store((stack_top >> 32) as u32, Ordering::Relaxed);
    state[25].store(104 << 16, Ordering::Relaxed); // the bitmap's offset
    state[90].store(0xff, Ordering::Relaxed); // the byte after the bitmap
    let base = state.as_ptr().addr() as u64;
    let entry = FIRST_TSS_ENTRY + 2 * processor;
    let low = TSS_LIMIT | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    descriptors[entry].store(low, Ordering::Relaxed);
    descriptors[entry + 1].store(base >> 32, Ordering::Relaxed);
}

fn copy_trampoline() {
    let start = &raw const trampoline_start;
    let length = (&raw const trampoline_end).addr() - start.addr();
    let target = core::ptr::with_exposed_provenance_mut::<u8>(TRAMPOLINE);
    // SAFETY: the symbols bound code inside the image; the target is conventional memory below 640 KiB, of which nothing is used any
    // more once the boot information has been read, and which is never owned.
    unsafe { core::ptr::copy_nonoverlapping(start, target, length) };
    fence(Ordering::SeqCst);
}
