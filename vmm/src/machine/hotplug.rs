//! Devices that come and go while the VM runs, and its power button.
//!
//! ```text
//!   AttachDisk ─► open, lock ─► plug, fill the slot ─► the guest finds it
//!   DetachDisk ─► ask ───────────────► the guest gives the slot up ─► off the bus ─► ended, unlocked: not listed any more
//! ```
//!
//! A disk is opened and locked before the machine's lock is taken, since storage may hang and grants must not wait for it; whether the
//! VM may still have it is asked again under the lock, under which a migration begins too. So an attach is whole or nothing, and a VM
//! that is being moved gets none. What the guest was asked to give up stays asked for: that travels with the VM.

use std::path::PathBuf;

use drover_proto::v1::{
    AttachDiskRequest, DetachDiskRequest, PowerButtonRequest, ResizeDiskRequest, VmmDevice, VmmDeviceState,
    VmmDevices, VmmInfo,
};
use drover_proto::{Code, Fault};
use tracing::info;

use super::{Core, Machine};
use crate::config::DiskConfig;
use crate::devices::acpi::Registers;
use crate::devices::attached::{About, At, Gear, Prepared};
use crate::devices::pci::SLOTS;
use crate::time::boottime_ns;
use crate::vm::Vm;

/// What the machine remembers of such calls.
#[derive(Default)]
pub(super) struct Asked {
    revision: u64,
    pressed: u64,
}

fn slot_of(slot: u32) -> Result<usize, Fault> {
    let found = usize::try_from(slot)
        .ok()
        .filter(|slot| (1..SLOTS).contains(slot));
    found.ok_or_else(|| {
        let message = format!("slot is {slot}, must be 1..={}", SLOTS - 1);
        Fault::new(Code::InvalidArgument, message).field("slot")
    })
}

/// Whether `at` is the disk that a call means.
fn is_disk(at: &At, path: &str) -> bool {
    matches!(&at.about, About::Disk { path: own, .. } if own.as_os_str() == path)
}

impl Machine {
    /// What is told of the slots. Whether the guest heeds them is filled in when it is asked for: the guest may change it at any rate.
    pub(super) fn devices_told(core: &Core, vm: &Vm) -> VmmDevices {
        let registers = vm.devices().acpi.registers();
        let device = |at: At| {
            let state = match (at.leaves, registers.leaves(at.slot)) {
                (true, _) => VmmDeviceState::Leaving,
                (_, true) => VmmDeviceState::Ejecting,
                _ => VmmDeviceState::Attached,
            };
            let (kind, path, read_only) = match at.about {
                About::Rng => ("rng", String::new(), false),
                About::Nic { .. } => ("nic", String::new(), false),
                About::Balloon => ("balloon", String::new(), false),
                About::Disk { path, read_only } => ("disk", path.to_string_lossy().into_owned(), read_only),
            };
            VmmDevice {
                slot: u32::try_from(at.slot).expect("a bus has few slots"),
                kind: kind.to_owned(),
                path,
                read_only,
                size_bytes: at.size_bytes,
                state: state.into(),
            }
        };
        VmmDevices {
            devices: vm.devices().attached.list().into_iter().map(device).collect(),
            revision: core.asked.revision,
            pressed: core.asked.pressed,
            heeds_slots: false,
            heeds_button: false,
            device_model: vm.device_model(),
            memory: Self::memory_told(core, vm),
        }
    }

    /// Fills in what the guest heeds now.
    pub(super) fn fill_in_heeded(&self, info: &mut VmmInfo) {
        if let (Some(vm), Some(devices)) = (self.vm(), &mut info.devices) {
            let registers = vm.devices().acpi.registers();
            devices.heeds_slots = registers.heeds_slots();
            devices.heeds_button = registers.heeds_button();
            if let Some(memory) = &mut devices.memory {
                memory.driver = vm.devices().attached.balloon_has_driver();
            }
        }
    }

    /// The VM, if what it has can change now, or be taken as it is: it runs, and is neither moved nor taken.
    pub(super) fn changeable(&self, core: &Core) -> Result<&Vm, Fault> {
        let moving = core.migration.as_ref().filter(|migration| migration.outgoing);
        if moving.is_some() || core.engine_busy {
            let id = moving.map_or("an aborted one that winds down", |migration| &migration.id);
            let message = format!("a migration of this VM is under way: {id}");
            return Err(Fault::new(Code::MigrationActive, message));
        }
        core.taking.newest.refuse_if_active()?;
        match self.vm() {
            Some(vm) if core.running => Ok(vm),
            _ => {
                let state = core.right.state(boottime_ns()).as_str_name();
                let message = format!("of a VM in {state} nothing is changed or taken");
                Err(Fault::new(Code::VmState, message))
            }
        }
    }

    fn check_revision(core: &Core, revision: u64) -> Result<(), Fault> {
        if revision >= core.asked.revision {
            return Ok(());
        }
        let message = format!(
            "the call is of revision {revision}, {} was taken: it comes too late",
            core.asked.revision
        );
        Err(Fault::new(Code::DeviceBusy, message).field("revision"))
    }

    /// Whether the disk is in the slot already.
    fn has_disk(vm: &Vm, slot: usize, path: &str) -> Result<bool, Fault> {
        let Some(at) = vm.devices().attached.at(slot) else {
            return Ok(false);
        };
        let stays = !at.leaves && !vm.devices().acpi.registers().leaves(slot);
        if stays && is_disk(&at, path) {
            return Ok(true);
        }
        let message = format!("slot {slot} has {:?}, which was not given up yet", at.about);
        Err(Fault::new(Code::DeviceBusy, message).field("slot"))
    }

    /// Gives the running VM a disk. On return it is on the bus, and the guest was told.
    pub fn attach_disk(&self, request: &AttachDiskRequest) -> Result<VmmInfo, Fault> {
        let slot = slot_of(request.slot)?;
        let disk = DiskConfig {
            path: PathBuf::from(&request.path),
            read_only: request.read_only,
            serial: request.serial.clone(),
            slot: Some(slot),
        };
        disk.check()?;
        let _one = self.plugging.lock().expect("no holder of this lock panics");
        {
            let mut core = self.core();
            let vm = self.changeable(&core)?;
            Self::check_revision(&core, request.revision)?;
            vm.can_route()?;
            if Self::has_disk(vm, slot, &request.path)? {
                core.asked.revision = request.revision;
                self.publish(&core);
                drop(core);
                return Ok(self.info());
            }
        }
        let mut prepared = Prepared::new(Gear::Disk(disk.open()?))?;
        prepared.take()?;
        {
            let mut core = self.core();
            let vm = self.changeable(&core)?;
            Self::check_revision(&core, request.revision)?;
            vm.devices().attached.plug(slot, prepared)?;
            vm.devices().acpi.change(|registers| registers.fill(slot));
            core.asked.revision = request.revision;
            info!(slot, path = request.path, "attached");
            self.publish(&core);
        }
        Ok(self.info())
    }

    /// Asks the guest to give up a disk, if it has it.
    pub fn detach_disk(&self, request: &DetachDiskRequest) -> Result<VmmInfo, Fault> {
        let slot = slot_of(request.slot)?;
        {
            let mut core = self.core();
            let vm = self.changeable(&core)?;
            Self::check_revision(&core, request.revision)?;
            let at = vm.devices().attached.at(slot);
            if let Some(at) = at.filter(|at| is_disk(at, &request.path) && !at.leaves) {
                let reminds = request.revision > core.asked.revision;
                if reminds || !vm.devices().acpi.registers().leaves(slot) {
                    vm.devices().acpi.change(|registers| registers.ask(slot));
                    info!(slot, about = ?at.about, "the guest is asked to give it up");
                }
            }
            core.asked.revision = request.revision;
            self.publish(&core);
        }
        Ok(self.info())
    }

    /// Tells the guest that a disk has grown, as its file has.
    pub fn resize_disk(&self, request: &ResizeDiskRequest) -> Result<VmmInfo, Fault> {
        let slot = slot_of(request.slot)?;
        {
            let core = self.core();
            let vm = self.changeable(&core)?;
            let at = vm.devices().attached.at(slot);
            if !at.is_some_and(|at| is_disk(&at, &request.path) && !at.leaves) {
                let message = format!("slot {slot} does not have {}", request.path);
                return Err(Fault::new(Code::DeviceBusy, message).field("slot"));
            }
            vm.devices().attached.grow(slot, request.size_bytes)?;
            self.publish(&core);
        }
        Ok(self.info())
    }

    /// Presses the power button, once for each request. Also while the VM is moved: what the guest has not seen then travels.
    pub fn power_button(&self, request: &PowerButtonRequest) -> Result<VmmInfo, Fault> {
        {
            let mut core = self.core();
            let Some(vm) = self.vm().filter(|_| core.running) else {
                let state = core.right.state(boottime_ns()).as_str_name();
                let message = format!("the power button of a VM in {state} does nothing");
                return Err(Fault::new(Code::VmState, message));
            };
            if request.request > core.asked.pressed {
                vm.devices().acpi.change(Registers::press);
                core.asked.pressed = request.request;
                info!(request = request.request, "the power button is pressed");
                self.publish(&core);
            }
        }
        Ok(self.info())
    }
}
