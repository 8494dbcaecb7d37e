//! What the host can offer: its size, its CPU and KVM features, its images.

pub mod images;
pub mod installed;

use std::fs;
use std::io;

use drover_proto::v1::HostCapacity;
use kvm_ioctls::Kvm;

/// Kept for the host itself, MiB: kernel, agent, and what a VMM needs besides its guest's memory.
const HOST_RESERVE_MIB: u64 = 512;

/// KVM's capabilities that VMMs use or report, by the names of the kernel's header without their prefix.
const KVM_CAPS: [(&str, u32); 34] = {
    use kvm_bindings::*;
    [
        ("adjust_clock", KVM_CAP_ADJUST_CLOCK),
        ("coalesced_mmio", KVM_CAP_COALESCED_MMIO),
        ("debugregs", KVM_CAP_DEBUGREGS),
        ("dirty_log_ring", KVM_CAP_DIRTY_LOG_RING),
        ("dirty_log_ring_acq_rel", KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
        ("exception_payload", KVM_CAP_EXCEPTION_PAYLOAD),
        ("exit_on_emulation_failure", KVM_CAP_EXIT_ON_EMULATION_FAILURE),
        ("ext_cpuid", KVM_CAP_EXT_CPUID),
        ("get_msr_features", KVM_CAP_GET_MSR_FEATURES),
        ("get_tsc_khz", KVM_CAP_GET_TSC_KHZ),
        ("immediate_exit", KVM_CAP_IMMEDIATE_EXIT),
        ("ioeventfd", KVM_CAP_IOEVENTFD),
        ("irq_routing", KVM_CAP_IRQ_ROUTING),
        ("irqchip", KVM_CAP_IRQCHIP),
        ("irqfd", KVM_CAP_IRQFD),
        ("kvmclock_ctrl", KVM_CAP_KVMCLOCK_CTRL),
        ("manual_dirty_log_protect2", KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
        ("mp_state", KVM_CAP_MP_STATE),
        ("nested_state", KVM_CAP_NESTED_STATE),
        ("pit2", KVM_CAP_PIT2),
        ("pit_state2", KVM_CAP_PIT_STATE2),
        ("readonly_mem", KVM_CAP_READONLY_MEM),
        ("set_identity_map_addr", KVM_CAP_SET_IDENTITY_MAP_ADDR),
        ("set_tss_addr", KVM_CAP_SET_TSS_ADDR),
        ("split_irqchip", KVM_CAP_SPLIT_IRQCHIP),
        ("sync_regs", KVM_CAP_SYNC_REGS),
        ("tsc_control", KVM_CAP_TSC_CONTROL),
        ("tsc_deadline_timer", KVM_CAP_TSC_DEADLINE_TIMER),
        ("user_memory", KVM_CAP_USER_MEMORY),
        ("vcpu_events", KVM_CAP_VCPU_EVENTS),
        ("x2apic_api", KVM_CAP_X2APIC_API),
        ("x86_smm", KVM_CAP_X86_SMM),
        ("xcrs", KVM_CAP_XCRS),
        ("xsave", KVM_CAP_XSAVE),
    ]
};

/// The host's size; what is given in the configuration is not measured.
pub fn capacity(memory_mib: Option<u64>, cpus: Option<u32>) -> io::Result<HostCapacity> {
    let memory_mib = match memory_mib {
        Some(given) => given,
        None => guest_memory_mib(&fs::read_to_string("/proc/meminfo")?)?,
    };
    let cpus = match cpus {
        Some(given) => given,
        None => u32::try_from(std::thread::available_parallelism()?.get()).unwrap_or(u32::MAX),
    };
    Ok(HostCapacity { cpus, memory_mib })
}

/// Memory for guests by the text of `/proc/meminfo`, whose `MemTotal` counts KiB (proc_meminfo(5)).
fn guest_memory_mib(meminfo: &str) -> io::Result<u64> {
    let total_kib = meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .trim()
                .strip_suffix("kB")?
                .trim()
                .parse::<u64>()
                .ok()
        })
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemTotal"))?;
    Ok((total_kib / 1024).saturating_sub(HOST_RESERVE_MIB).max(1))
}

/// The CPU's features, sorted, by the kernel's names for them.
pub fn cpu_features() -> io::Result<Vec<String>> {
    Ok(features_of(&fs::read_to_string("/proc/cpuinfo")?))
}

fn features_of(cpuinfo: &str) -> Vec<String> {
    let flags = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags")?.trim_start().strip_prefix(':'));
    let mut names: Vec<String> = flags
        .unwrap_or_default()
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// What KVM offers, sorted. Fails when there is no usable KVM.
pub fn kvm_caps() -> Result<Vec<String>, kvm_ioctls::Error> {
    let kvm = Kvm::new()?;
    let has = |cap: u32| kvm.check_extension_raw(cap.into()) > 0;
    let mut names: Vec<String> = KVM_CAPS
        .iter()
        .filter(|(_, cap)| has(*cap))
        .map(|(name, _)| (*name).to_owned())
        .collect();
    names.sort_unstable();
    Ok(names)
}

/// The id of this boot of the kernel.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_sizes_are_taken_and_missing_ones_measured() {
        assert_eq!(
            capacity(Some(8192), Some(2)).unwrap(),
            HostCapacity {
                cpus: 2,
                memory_mib: 8192
            }
        );
        let measured = capacity(None, None).unwrap();
        assert!(measured.cpus >= 1 && measured.memory_mib >= 1);
    }

    #[test]
    fn meminfo_leaves_the_host_its_share() {
        assert_eq!(
            guest_memory_mib("MemTotal:        8388608 kB\nMemFree: 1 kB\n").unwrap(),
            8192 - 512
        );
        assert_eq!(guest_memory_mib("MemTotal: 1024 kB\n").unwrap(), 1);
        assert!(guest_memory_mib("MemFree: 1 kB\n").is_err());
    }

    #[test]
    fn features_are_sorted_and_stand_once() {
        let text = "processor: 0\nflags\t\t: sse2 fpu sse2 avx\n\nprocessor: 1\nflags\t\t: other\n";
        assert_eq!(features_of(text), ["avx", "fpu", "sse2"]);
        assert!(features_of("no flags").is_empty());
    }

    #[test]
    fn this_machines_kvm_names_what_a_vmm_needs() {
        let Ok(caps) = kvm_caps() else {
            eprintln!("SKIPPED: no usable /dev/kvm");
            return;
        };
        for needed in ["user_memory", "irqchip"] {
            assert!(
                caps.iter().any(|cap| cap == needed),
                "{needed} is missing in {caps:?}"
            );
        }
        assert!(caps.is_sorted());
    }
}
