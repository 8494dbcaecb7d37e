//! The interrupt controllers and the timer that KVM emulates: two 8259s, the I/O APIC, the 8254.
//!
//! A VM's routing of interrupt lines is KVM's default (every line to both kinds of controller), so it needs no saving.

use drover_proto::{Code, Fault};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_irqchip, kvm_pit_config};
use kvm_ioctls::VmFd;

use crate::abi;
use crate::save::{CHIP_IDS, SavedIrqchip};

/// Creates them; before any vCPU.
pub fn create(vm: &VmFd) -> Result<(), Fault> {
    let failed =
        |what: &str, error| Fault::new(Code::KvmUnusable, format!("cannot create the {what}: {error}"));
    vm.create_irq_chip()
        .map_err(|error| failed("interrupt controllers", error))?;
    // The speaker's port is emulated too: Linux calibrates by it.
    let config = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(config).map_err(|error| failed("timer", error))
}

/// Their state, of a VM whose vCPUs are stopped.
pub fn save(vm: &VmFd) -> Result<SavedIrqchip, Fault> {
    let failed = |error| {
        Fault::new(
            Code::GuestKvmFailure,
            format!("cannot read the interrupt controllers: {error}"),
        )
    };
    let mut chips = CHIP_IDS.map(|id| kvm_irqchip {
        chip_id: id,
        ..abi::zeroed()
    });
    for chip in &mut chips {
        vm.get_irqchip(chip).map_err(failed)?;
    }
    Ok(SavedIrqchip {
        chips,
        pit: vm.get_pit2().map_err(failed)?,
    })
}

/// Sets their state.
pub fn restore(vm: &VmFd, saved: &SavedIrqchip) -> Result<(), Fault> {
    let failed = |error| {
        Fault::new(
            Code::BadState,
            format!("KVM refuses the interrupt controllers' state: {error}"),
        )
    };
    for chip in &saved.chips {
        vm.set_irqchip(chip).map_err(failed)?;
    }
    vm.set_pit2(&saved.pit).map_err(failed)
}
