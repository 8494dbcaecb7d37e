//! Saving and restoring vCPUs and the guest's clock through KVM.
//!
//! Order of saving a vCPU, all of them stopped and with no I/O exit pending:
//!
//! 1. `mp_state` first: reading it makes KVM take in a pending INIT or SIPI, which changes registers.
//! 2. registers, system registers, XSAVE, extended control and debug registers, local APIC, MSRs;
//! 3. `vcpu_events` last: the calls before may still move a pending exception.
//!
//! Order of restoring one: CPUID (it decides which bits the rest may have), `mp_state`, registers, system registers, XSAVE,
//! extended control and debug registers, local APIC (after `sregs`, which holds its base), the TSC, the other
//! MSRs with `TSC_DEADLINE` last (a deadline that lies in the past of the old TSC would be lost, and an idle guest hang),
//! then `vcpu_events`. The VM's clock is set before all of this: the TSC offset is computed from it.

use drover_proto::{Code, Fault};
use kvm_bindings::{
    CpuId, KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_MAX_MSR_ENTRIES, Msrs, kvm_clock_data,
    kvm_cpuid_entry2, kvm_lapic_state, kvm_msr_entry,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use tracing::{debug, warn};

use super::clock::{self, Elapsed, Instant};
use super::profile;
use crate::caps::Caps;
use crate::save::{SavedClock, SavedVcpu, bad, msr_entry};
use crate::time::realtime_ns;

const MSR_TSC: u32 = 0x10;
const MSR_KVM_SYSTEM_TIME: u32 = 0x12;
/// From `MSR_KVM_SYSTEM_TIME_NEW` to `MSR_KVM_PV_EOI_EN`.
const MSRS_KVM_NEW: std::ops::RangeInclusive<u32> = 0x4b56_4d01..=0x4b56_4d04;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const LAPIC_LINT0: usize = 0x350;
const LAPIC_LINT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 7 << 8;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_MASK: u32 = 7 << 8;

fn kvm_fault(what: &str, error: impl std::fmt::Display) -> Fault {
    Fault::new(Code::GuestKvmFailure, format!("KVM: {what}: {error}"))
}

fn refused(what: &str, error: impl std::fmt::Display) -> Fault {
    bad(format!("KVM refuses the saved {what}: {error}"))
}

/// The MSRs that KVM names as a vCPU's state.
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, Fault> {
    let list = kvm
        .get_msr_index_list()
        .map_err(|error| kvm_fault("list of MSRs", error))?;
    Ok(list.as_slice().to_vec())
}

/// Gives a vCPU of a cold start its CPUID and its few registers that matter before the kernel runs.
pub fn init(vcpu: &VcpuFd, cpuid: &[kvm_cpuid_entry2]) -> Result<(), Fault> {
    set_cpuid(vcpu, cpuid).map_err(|error| kvm_fault("set CPUID", error))?;
    let entry = msr_entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING);
    if set_msrs(vcpu, &[entry])?.is_some() {
        debug!("KVM does not take MISC_ENABLE; string operations may be slower");
    }
    let mut lapic = vcpu
        .get_lapic()
        .map_err(|error| kvm_fault("read the local APIC", error))?;
    for (register, mode) in [(LAPIC_LINT0, DELIVERY_EXTINT), (LAPIC_LINT1, DELIVERY_NMI)] {
        set_delivery(&mut lapic, register, mode);
    }
    vcpu.set_lapic(&lapic)
        .map_err(|error| kvm_fault("set the local APIC", error))
}

/// As firmware leaves it: LINT0 takes the 8259's interrupts, LINT1 is the NMI (MultiProcessor Specification, 3.6.1).
fn set_delivery(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let bytes = &mut lapic.regs[register..register + 4];
    let old = u32::from_le_bytes([0, 1, 2, 3].map(|i: usize| bytes[i].cast_unsigned()));
    let new = (old & !DELIVERY_MASK & !(1 << 16)) | mode;
    for (byte, value) in bytes.iter_mut().zip(new.to_le_bytes()) {
        *byte = value.cast_signed();
    }
}

/// Sets CPUID.
fn set_cpuid(vcpu: &VcpuFd, entries: &[kvm_cpuid_entry2]) -> Result<(), String> {
    let cpuid = CpuId::from_entries(entries).map_err(|error| format!("{error:?}"))?;
    vcpu.set_cpuid2(&cpuid).map_err(|error| error.to_string())
}

/// Reads the MSRs in `indices`; leaves out, with a line in the log, each that KVM refuses to read.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Fault> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let ask: Vec<_> = rest
            .iter()
            .take(KVM_MAX_MSR_ENTRIES)
            .map(|&index| msr_entry(index, 0))
            .collect();
        let mut msrs = Msrs::from_entries(&ask).map_err(|error| kvm_fault("MSRs", format!("{error:?}")))?;
        // KVM stops at the first one it refuses and returns how many it read.
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(|error| kvm_fault("read MSRs", error))?;
        found.extend_from_slice(&msrs.as_slice()[..read]);
        if read < ask.len() {
            debug!(
                msr = format!("{:#x}", rest[read]),
                "KVM lists an MSR but refuses to read it; left out"
            );
            rest = &rest[read + 1..];
        } else {
            rest = &rest[read..];
        }
    }
    Ok(found)
}

/// Writes MSRs in order; returns the first that KVM refuses, if any.
fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<Option<kvm_msr_entry>, Fault> {
    for chunk in entries.chunks(KVM_MAX_MSR_ENTRIES) {
        let msrs = Msrs::from_entries(chunk).map_err(|error| kvm_fault("MSRs", format!("{error:?}")))?;
        let written = vcpu
            .set_msrs(&msrs)
            .map_err(|error| kvm_fault("write MSRs", error))?;
        if written < chunk.len() {
            return Ok(Some(chunk[written]));
        }
    }
    Ok(None)
}

/// Of a vCPU's MSRs those by which the guest has told KVM where in its memory KVM is to write: its clock, stolen time, page-ready
/// events, end of interrupt (Documentation/virt/kvm/x86/msr.rst). Not the wall clock, which KVM writes once, when it is asked for.
pub fn written_through(msrs: &[kvm_msr_entry]) -> Vec<kvm_msr_entry> {
    let through =
        |msr: &&kvm_msr_entry| msr.index == MSR_KVM_SYSTEM_TIME || MSRS_KVM_NEW.contains(&msr.index);
    msrs.iter().filter(through).copied().collect()
}

/// Tells KVM again where it writes in the guest's memory, which could not be written to when the vCPU was restored.
pub fn restore_written_through(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), Fault> {
    restore_msrs(vcpu, msrs)
}

/// Reads a stopped vCPU's state. `cpuid` is what it was given: where guests run without hardware virtualization,
/// `KVM_GET_CPUID2` tells of the host's CPU instead.
pub fn save(
    vcpu: &VcpuFd,
    caps: &Caps,
    msr_indices: &[u32],
    cpuid: &[kvm_cpuid_entry2],
) -> Result<SavedVcpu, Fault> {
    let mp_state = vcpu
        .get_mp_state()
        .map_err(|error| kvm_fault("read mp_state", error))?;
    let regs = vcpu
        .get_regs()
        .map_err(|error| kvm_fault("read registers", error))?;
    let sregs = vcpu
        .get_sregs()
        .map_err(|error| kvm_fault("read system registers", error))?;
    let xsave = vcpu.get_xsave().map_err(|error| kvm_fault("read XSAVE", error))?;
    let xcrs = if caps.xcrs {
        Some(
            vcpu.get_xcrs()
                .map_err(|error| kvm_fault("read extended control registers", error))?,
        )
    } else {
        None
    };
    let debug_regs = vcpu
        .get_debug_regs()
        .map_err(|error| kvm_fault("read debug registers", error))?;
    let lapic = vcpu
        .get_lapic()
        .map_err(|error| kvm_fault("read the local APIC", error))?;
    let msrs = get_msrs(vcpu, msr_indices)?;
    let tsc_khz = if caps.tsc_khz {
        vcpu.get_tsc_khz().unwrap_or(0)
    } else {
        0
    };
    let tsc_offset = offset::get(vcpu);
    let events = vcpu
        .get_vcpu_events()
        .map_err(|error| kvm_fault("read events", error))?;
    Ok(SavedVcpu {
        mp_state,
        regs,
        sregs,
        xsave: Box::new(xsave),
        xcrs,
        debug_regs,
        lapic: Box::new(lapic),
        events,
        msrs,
        cpuid: cpuid.to_vec(),
        tsc_khz,
        tsc_offset,
    })
}

/// How the TSC of restored vCPUs is set, worked out once for the VM.
#[derive(Clone, Copy, Debug)]
pub struct TscPlan {
    source: Option<Instant>,
    target: Option<Instant>,
    elapsed_ns: u64,
}

/// Reads the guest's clock, its vCPUs stopped.
pub fn save_clock(vm: &VmFd) -> Result<SavedClock, Fault> {
    let before = realtime_ns();
    let data = vm
        .get_clock()
        .map_err(|error| kvm_fault("read the clock", error))?;
    Ok(SavedClock {
        kvmclock_ns: data.clock,
        realtime_ns: if data.flags & KVM_CLOCK_REALTIME != 0 {
            data.realtime
        } else {
            before
        },
        host_tsc: (data.flags & KVM_CLOCK_HOST_TSC != 0).then_some(data.host_tsc),
    })
}

/// Sets the guest's clock forward by the blackout, before any vCPU is restored.
pub fn restore_clock(vm: &VmFd, caps: &Caps, saved: &SavedClock, longest_ns: u64) -> Result<TscPlan, Fault> {
    let elapsed = clock::elapsed(saved.realtime_ns, realtime_ns(), longest_ns);
    if let Elapsed::Clamped(ns) = elapsed {
        warn!(
            saved_realtime_ns = saved.realtime_ns,
            "the two hosts' clocks contradict each other; the guest's time advances by {ns} ns only"
        );
    }
    // Left to KVM where it can: it computes the blackout at the instant of setting.
    let by_kvm = caps.clock_realtime && matches!(elapsed, Elapsed::Measured(_));
    let data = if by_kvm {
        kvm_clock_data {
            clock: saved.kvmclock_ns,
            flags: KVM_CLOCK_REALTIME,
            realtime: saved.realtime_ns,
            ..Default::default()
        }
    } else {
        kvm_clock_data {
            clock: saved.kvmclock_ns.saturating_add(elapsed.ns()),
            ..Default::default()
        }
    };
    vm.set_clock(&data).map_err(|error| refused("clock", error))?;
    let now = vm
        .get_clock()
        .map_err(|error| kvm_fault("read the clock", error))?;
    let instant = |kvmclock_ns, host_tsc| Instant {
        kvmclock_ns,
        host_tsc,
    };
    Ok(TscPlan {
        source: saved.host_tsc.map(|tsc| instant(saved.kvmclock_ns, tsc)),
        target: (now.flags & KVM_CLOCK_HOST_TSC != 0).then(|| instant(now.clock, now.host_tsc)),
        elapsed_ns: elapsed.ns(),
    })
}

/// Restores a vCPU.
pub fn restore(vcpu: &VcpuFd, caps: &Caps, saved: &SavedVcpu, plan: &TscPlan) -> Result<(), Fault> {
    set_cpuid(vcpu, &saved.cpuid).map_err(|error| refused("CPUID", error))?;
    vcpu.set_mp_state(saved.mp_state)
        .map_err(|error| refused("mp_state", error))?;
    vcpu.set_regs(&saved.regs)
        .map_err(|error| refused("registers", error))?;
    vcpu.set_sregs(&saved.sregs)
        .map_err(|error| refused("system registers", error))?;
    xsave::set(vcpu, &saved.xsave).map_err(|error| refused("XSAVE state", error))?;
    match &saved.xcrs {
        Some(xcrs) if caps.xcrs => {
            vcpu.set_xcrs(xcrs)
                .map_err(|error| refused("extended control registers", error))?;
        }
        Some(_) => warn!("the source saved extended control registers, this host's KVM cannot set them"),
        None => {}
    }
    vcpu.set_debug_regs(&saved.debug_regs)
        .map_err(|error| refused("debug registers", error))?;
    vcpu.set_lapic(&saved.lapic)
        .map_err(|error| refused("local APIC", error))?;
    restore_tsc(vcpu, caps, saved, plan)?;
    let (deadline, rest): (Vec<_>, Vec<_>) = saved
        .msrs
        .iter()
        .filter(|msr| msr.index != MSR_TSC)
        .partition(|msr| msr.index == MSR_TSC_DEADLINE);
    restore_msrs(vcpu, &rest)?;
    restore_msrs(vcpu, &deadline)?;
    vcpu.set_vcpu_events(&saved.events)
        .map_err(|error| refused("events", error))
}

/// Rates closer than this count as the same: KVM tolerates as much (`tsc_tolerance_ppm`, its default).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Refuses a guest whose TSC would run at another rate here, in the middle of its life. A rate of 0 is not known.
fn check_tsc_rate(saved_khz: u32, host_khz: u32, can_scale: bool) -> Result<(), Fault> {
    let apart = u64::from(saved_khz.abs_diff(host_khz)) * 1_000_000;
    if can_scale || saved_khz == 0 || host_khz == 0 || apart <= u64::from(host_khz) * TSC_TOLERANCE_PPM {
        return Ok(());
    }
    Err(bad(format!(
        "the guest's TSC runs at {saved_khz} kHz, this host's at {host_khz} kHz, and its KVM cannot scale it: \
         a host with a TSC of {saved_khz} kHz, or with TSC scaling, could take it"
    )))
}

fn restore_tsc(vcpu: &VcpuFd, caps: &Caps, saved: &SavedVcpu, plan: &TscPlan) -> Result<(), Fault> {
    check_tsc_rate(saved.tsc_khz, vcpu.get_tsc_khz().unwrap_or(0), caps.tsc_control)?;
    if caps.tsc_control && saved.tsc_khz != 0 && vcpu.get_tsc_khz().ok() != Some(saved.tsc_khz) {
        vcpu.set_tsc_khz(saved.tsc_khz)
            .map_err(|error| refused("TSC rate", error))?;
    }
    let khz = if saved.tsc_khz != 0 {
        saved.tsc_khz
    } else {
        vcpu.get_tsc_khz().unwrap_or(0)
    };
    let khz = u64::from(khz);
    if let Some(msr) = saved.msrs.iter().find(|msr| msr.index == MSR_TSC) {
        let value = clock::target_tsc(msr.data, plan.elapsed_ns, khz);
        restore_msrs(vcpu, &[msr_entry(MSR_TSC, value)])?;
    }
    if let (Some(source_offset), Some(source), Some(target)) = (saved.tsc_offset, plan.source, plan.target)
        && offset::offered(vcpu)
    {
        let new = clock::target_tsc_offset(source_offset, source, target, khz);
        offset::set(vcpu, new).map_err(|error| refused("TSC offset", error))?;
    }
    Ok(())
}

/// Writes MSRs and insists on each. One that KVM refuses although its value is what the vCPU has already is let pass.
fn restore_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), Fault> {
    let mut rest = msrs;
    while let Some(failed) = set_msrs(vcpu, rest)? {
        let has = get_msrs(vcpu, &[failed.index])?;
        if has.first().map(|msr| msr.data) != Some(failed.data) {
            let message = format!(
                "KVM refuses the saved MSR {:#x} = {:#x}",
                failed.index, failed.data
            );
            return Err(bad(message));
        }
        debug!(
            msr = format!("{:#x}", failed.index),
            "KVM refuses an MSR that has its value already"
        );
        let at = rest
            .iter()
            .position(|msr| msr.index == failed.index)
            .expect("it is one of them");
        rest = &rest[at + 1..];
    }
    Ok(())
}

/// Refuses a guest that uses what this host lacks, by name.
pub fn check_cpuid(saved: &[SavedVcpu], supported: &[kvm_cpuid_entry2]) -> Result<(), Fault> {
    for vcpu in saved {
        let missing = profile::missing(&vcpu.cpuid, supported);
        if !missing.is_empty() {
            return Err(bad(format!(
                "the guest uses CPU features that this host lacks: {}",
                missing.join(", ")
            )));
        }
    }
    Ok(())
}

#[allow(unsafe_code, reason = "the structure may be shorter than what KVM reads")]
mod xsave {
    use kvm_bindings::kvm_xsave;
    use kvm_ioctls::VcpuFd;

    pub fn set(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
        // SAFETY: KVM reads more than the 4 KiB of `kvm_xsave` only for a guest with dynamically enabled features (AMX), and
        // this process never asks for the permission that these need (`arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM)`).
        unsafe { vcpu.set_xsave(xsave) }
    }
}

/// `KVM_VCPU_TSC_OFFSET`, an attribute of the vCPU, for which `kvm-ioctls` has no wrappers on x86.
#[allow(unsafe_code, reason = "ioctls that no crate wraps")]
mod offset {
    use std::io;

    use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
    use kvm_ioctls::VcpuFd;
    use vmm_sys_util::ioctl::ioctl_with_ref;
    use vmm_sys_util::ioctl_iow_nr;

    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
    ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

    fn attr(value: *const i64) -> kvm_device_attr {
        kvm_device_attr {
            flags: 0,
            group: KVM_VCPU_TSC_CTRL,
            attr: u64::from(KVM_VCPU_TSC_OFFSET),
            addr: value as u64,
        }
    }

    /// Whether this vCPU's offset can be read and set.
    pub fn offered(vcpu: &VcpuFd) -> bool {
        // SAFETY: the kernel only looks the attribute up; `addr` is not used.
        (unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &attr(std::ptr::null())) }) == 0
    }

    /// The offset, where it can be read.
    pub fn get(vcpu: &VcpuFd) -> Option<i64> {
        if !offered(vcpu) {
            return None;
        }
        let mut value = 0i64;
        let attr = attr(&raw mut value);
        // SAFETY: the kernel writes eight bytes to `addr`, which is a live `i64`.
        let done = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) };
        (done == 0).then_some(value)
    }

    /// Sets the offset.
    pub fn set(vcpu: &VcpuFd, value: i64) -> io::Result<()> {
        // SAFETY: the kernel reads eight bytes from `addr`, which is a live `i64`.
        match unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr(&raw const value)) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tsc_of_another_rate_is_refused_with_both_rates_where_it_cannot_be_scaled() {
        let fault = check_tsc_rate(2_000_000, 2_500_000, false).unwrap_err();
        assert_eq!(fault.code, Code::BadState);
        assert!(
            fault.message.contains("2000000 kHz") && fault.message.contains("2500000 kHz"),
            "{fault}"
        );
        assert!(check_tsc_rate(2_000_501, 2_000_000, false).is_err());
        assert!(check_tsc_rate(1_999_499, 2_000_000, false).is_err());
    }

    #[test]
    fn a_rate_that_is_close_or_unknown_or_can_be_scaled_is_taken() {
        for (saved, host, can_scale) in [
            (2_000_500, 2_000_000, false),
            (1_999_500, 2_000_000, false),
            (0, 2_000_000, false),
            (2_000_000, 0, false),
            (2_000_000, 2_500_000, true),
        ] {
            assert_eq!(
                check_tsc_rate(saved, host, can_scale),
                Ok(()),
                "{saved} on {host}"
            );
        }
    }
}
