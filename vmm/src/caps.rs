//! What this host's KVM offers, asked once before anything is used.
//!
//! What a VM cannot do without is demanded by name; what it can do without is missed with a line in the log.

use drover_proto::{Code, Fault};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CLOCK_REALTIME, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use tracing::{info, warn};

/// The KVM API that has been stable since Linux 2.6.22.
const API_VERSION: i32 = 12;

const REQUIRED: [(Cap, &str); 14] = [
    (Cap::Irqchip, "IRQCHIP"),
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::SetTssAddr, "SET_TSS_ADDR"),
    (Cap::ExtCpuid, "EXT_CPUID"),
    (Cap::Pit2, "PIT2"),
    (Cap::PitState2, "PIT_STATE2"),
    (Cap::Irqfd, "IRQFD"),
    (Cap::MpState, "MP_STATE"),
    (Cap::VcpuEvents, "VCPU_EVENTS"),
    (Cap::Debugregs, "DEBUGREGS"),
    (Cap::Xsave, "XSAVE"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
    (Cap::AdjustClock, "ADJUST_CLOCK"),
    (Cap::SyncMmu, "SYNC_MMU"),
];

/// The optional abilities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caps {
    /// Extended control registers can be read and set.
    pub xcrs: bool,
    /// The dirty log can be read without protecting pages again.
    pub manual_dirty_protect: bool,
    /// `KVM_SET_CLOCK` takes a real time and advances the clock to now by itself.
    pub clock_realtime: bool,
    /// The guest's TSC rate can be set.
    pub tsc_control: bool,
    /// The guest's TSC rate can be read.
    pub tsc_khz: bool,
    /// A guest can be told that it was paused.
    pub kvmclock_ctrl: bool,
    /// The real-mode identity map's address can be set.
    pub identity_map: bool,
    /// Interrupts can be routed as messages: without it a VM has no bus.
    pub irq_routing: bool,
    /// A write to an address can ring an eventfd: without it doorbells ring through exits.
    pub ioeventfd: bool,
}

impl Caps {
    /// Asks `kvm`; a fault names what a VM cannot do without.
    pub fn ask(kvm: &Kvm) -> Result<Self, Fault> {
        let version = kvm.get_api_version();
        if version != API_VERSION {
            let message = format!("/dev/kvm speaks API version {version}, wanted is {API_VERSION}");
            return Err(Fault::new(Code::KvmUnusable, message));
        }
        let missing: Vec<&str> = REQUIRED
            .iter()
            .filter(|(cap, _)| !kvm.check_extension(*cap))
            .map(|&(_, name)| name)
            .collect();
        if !missing.is_empty() {
            return Err(Fault::new(
                Code::KvmUnusable,
                format!(
                    "this host's KVM lacks {}, without which no VM can run",
                    missing.join(", ")
                ),
            ));
        }
        let offered = |cap, name: &str, without: &str| {
            let offered = kvm.check_extension(cap);
            if !offered {
                info!(capability = name, "KVM lacks a capability: {without}");
            }
            offered
        };
        Ok(Self {
            xcrs: offered(
                Cap::Xcrs,
                "XCRS",
                "extended control registers stay as KVM sets them",
            ),
            manual_dirty_protect: manual_protect_offered(kvm),
            clock_realtime: clock_realtime_offered(kvm),
            tsc_control: offered(
                Cap::TscControl,
                "TSC_CONTROL",
                "the guest's TSC rate is the host's",
            ),
            tsc_khz: offered(Cap::GetTscKhz, "GET_TSC_KHZ", "the TSC rate is unknown"),
            kvmclock_ctrl: offered(
                Cap::KvmclockCtrl,
                "KVMCLOCK_CTRL",
                "guests are not told of pauses",
            ),
            identity_map: offered(
                Cap::SetIdentityMapAddr,
                "SET_IDENTITY_MAP_ADDR",
                "KVM's default is used",
            ),
            irq_routing: offered(Cap::IrqRouting, "IRQ_ROUTING", "VMs with disks cannot run here"),
            ioeventfd: offered(
                Cap::Ioeventfd,
                "IOEVENTFD",
                "doorbells of devices ring through exits",
            ),
        })
    }

    /// Turns on what has to be turned on once per VM. What fails is missed from then on.
    pub fn enable(&mut self, vm: &VmFd) {
        if self.manual_dirty_protect {
            let cap = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                flags: 0,
                args: [u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE), 0, 0, 0],
                pad: [0; 64],
            };
            if let Err(error) = vm.enable_cap(&cap) {
                warn!(%error, "manual dirty-log protection cannot be enabled; rounds protect all pages at once");
                self.manual_dirty_protect = false;
            }
        }
    }
}

fn manual_protect_offered(kvm: &Kvm) -> bool {
    let flags = kvm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
    let offered = u32::try_from(flags).unwrap_or(0) & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
    if !offered {
        info!("KVM lacks manual dirty-log protection; rounds protect all pages at once");
    }
    offered
}

fn clock_realtime_offered(kvm: &Kvm) -> bool {
    let flags = u32::try_from(kvm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
    let offered = flags & KVM_CLOCK_REALTIME != 0;
    if !offered {
        info!(
            "KVM does not tie its clock to real time; the guest's clocks are set forward by readings a little apart"
        );
    }
    offered
}
