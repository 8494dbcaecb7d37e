//! Devices that come and go while the VM runs, and its power button.
//!
//! ```text
//!   AttachDisk, AttachNic ─► open, take ─► plug, fill the slot ─► the guest finds it
//!   DetachDisk, DetachNic ─► ask ───────────────► the guest gives the slot up ─► off the bus ─► ended, given back: not listed any more
//! ```
//!
//! A disk is opened and locked, and a tap opened, before the machine's lock is taken, since storage may hang and grants must not wait for
//! it; whether the VM may still have it is asked again under the lock, under which a migration begins too. So an attach is whole or nothing, and a VM
//! that is being moved gets none. What the guest was asked to give up stays asked for: that travels with the VM.

use std::path::PathBuf;

use drover_proto::v1::{
    AttachDiskRequest, AttachNicRequest, DetachDiskRequest, DetachNicRequest, PowerButtonRequest,
    ResizeDiskRequest, VmmDevice, VmmDeviceState, VmmDevices, VmmInfo,
};
use drover_proto::{Code, Fault};
use tracing::info;

use super::{Core, Machine};
use crate::config::{DiskConfig, FenceConfig, NicConfig};
use crate::devices::acpi::Registers;
use crate::devices::attached::{About, At, Gear, Nic, Prepared};
use crate::devices::pci::SLOTS;
use crate::devices::virtio::net;
use crate::devices::virtio::net::tap::{Early, Tap};
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
            let mut told = VmmDevice {
                slot: u32::try_from(at.slot).expect("a bus has few slots"),
                size_bytes: at.size_bytes,
                state: state.into(),
                ..VmmDevice::default()
            };
            let kind = match at.about {
                About::Rng => "rng",
                About::Balloon => "balloon",
                About::Console => "console",
                About::Nic { mac, tap } => {
                    (told.mac, told.tap) = (net::text(mac), tap);
                    "nic"
                }
                About::Disk { path, read_only } => {
                    (told.path, told.read_only) = (path.to_string_lossy().into_owned(), read_only);
                    "disk"
                }
            };
            kind.clone_into(&mut told.kind);
            told
        };
        VmmDevices {
            devices: vm.devices().attached.list().into_iter().map(device).collect(),
            revision: core.asked.revision,
            pressed: core.asked.pressed,
            heeds_slots: false,
            heeds_button: false,
            device_model: vm.device_model(),
            memory: Self::memory_told(core, vm),
            changes_nics: true,
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

    /// Whether what is meant is in the slot already.
    fn has(vm: &Vm, slot: usize, is_it: impl Fn(&At) -> bool) -> Result<bool, Fault> {
        let Some(at) = vm.devices().attached.at(slot) else {
            return Ok(false);
        };
        let stays = !at.leaves && !vm.devices().acpi.registers().leaves(slot);
        if stays && is_it(&at) {
            return Ok(true);
        }
        let message = format!("slot {slot} has {:?}, which was not given up yet", at.about);
        Err(Fault::new(Code::DeviceBusy, message).field("slot"))
    }

    /// Gives the running VM what `open` opens, unless it has it in the slot already. On return it is on the bus, and the guest was told.
    fn attach(
        &self,
        slot: usize,
        revision: u64,
        is_it: impl Fn(&At) -> bool,
        open: impl FnOnce() -> Result<Gear, Fault>,
    ) -> Result<VmmInfo, Fault> {
        let _one = self.plugging.lock().expect("no holder of this lock panics");
        {
            let mut core = self.core();
            let vm = self.changeable(&core)?;
            Self::check_revision(&core, revision)?;
            vm.can_route()?;
            if Self::has(vm, slot, is_it)? {
                core.asked.revision = revision;
                self.publish(&core);
                drop(core);
                return Ok(self.info());
            }
        }
        let mut prepared = Prepared::new(open()?, self.console())?;
        prepared.take()?;
        {
            let mut core = self.core();
            let vm = self.changeable(&core)?;
            Self::check_revision(&core, revision)?;
            let about = prepared.about().clone();
            vm.devices().attached.plug(slot, prepared)?;
            vm.devices().acpi.change(|registers| registers.fill(slot));
            core.asked.revision = revision;
            info!(slot, ?about, "attached");
            self.publish(&core);
        }
        Ok(self.info())
    }

    /// Asks the guest to give up what is in the slot, if that is what is meant.
    fn detach(&self, slot: usize, revision: u64, is_it: impl Fn(&At) -> bool) -> Result<VmmInfo, Fault> {
        {
            let mut core = self.core();
            let vm = self.changeable(&core)?;
            Self::check_revision(&core, revision)?;
            let at = vm.devices().attached.at(slot);
            if let Some(at) = at.filter(|at| is_it(at) && !at.leaves) {
                let reminds = revision > core.asked.revision;
                if reminds || !vm.devices().acpi.registers().leaves(slot) {
                    vm.devices().acpi.change(|registers| registers.ask(slot));
                    info!(slot, about = ?at.about, "the guest is asked to give it up");
                }
            }
            core.asked.revision = revision;
            self.publish(&core);
        }
        Ok(self.info())
    }

    /// Gives the running VM a disk. On return it is on the bus, and the guest was told.
    pub fn attach_disk(&self, request: &AttachDiskRequest) -> Result<VmmInfo, Fault> {
        let slot = slot_of(request.slot)?;
        let disk = DiskConfig {
            path: PathBuf::from(&request.path),
            read_only: request.read_only,
            serial: request.serial.clone(),
            slot: Some(slot),
            fence: (!request.fence.is_empty()).then(|| FenceConfig {
                path: PathBuf::from(&request.fence),
                writers: request.writers,
            }),
        };
        disk.check()?;
        let is_it = |at: &At| is_disk(at, &request.path);
        self.attach(slot, request.revision, is_it, || {
            Ok(Gear::Disk(disk.open(self.config.epoch)?))
        })
    }

    /// Asks the guest to give up a disk, if it has it.
    pub fn detach_disk(&self, request: &DetachDiskRequest) -> Result<VmmInfo, Fault> {
        let slot = slot_of(request.slot)?;
        self.detach(slot, request.revision, |at| is_disk(at, &request.path))
    }

    /// Gives the running VM a NIC on a tap that is there. On return it is on the bus, and the guest was told.
    pub fn attach_nic(&self, request: &AttachNicRequest) -> Result<VmmInfo, Fault> {
        let slot = slot_of(request.slot)?;
        let mtu = u16::try_from(request.mtu).map_err(|_| {
            let message = format!("mtu is {}, must be at most {}", request.mtu, u16::MAX);
            Fault::new(Code::InvalidArgument, message).field("mtu")
        })?;
        let config = NicConfig {
            tap: request.tap.clone(),
            mac: request.mac.clone(),
            mtu,
            slot: Some(slot),
        };
        let mac = config.check()?;
        let is_it =
            |at: &At| matches!(&at.about, About::Nic { mac: own, tap } if *own == mac && *tap == request.tap);
        self.attach(slot, request.revision, is_it, || {
            self.no_other_has(mac)?;
            let tap = Tap::find(&config.tap, Early::No)?;
            Ok(Gear::Nic(Nic { tap, mac, mtu }))
        })
    }

    /// No two NICs of a VM have an address; that no two have a tap the kernel sees to.
    fn no_other_has(&self, mac: net::Mac) -> Result<(), Fault> {
        let here = self.vm().map(|vm| vm.devices().attached.list());
        let has = |at: &At| matches!(at.about, About::Nic { mac: own, .. } if own == mac);
        let Some(other) = here.into_iter().flatten().find(has) else {
            return Ok(());
        };
        let message = format!(
            "the NIC in slot {} has the address {}",
            other.slot,
            net::text(mac)
        );
        Err(Fault::new(Code::DeviceBusy, message).field("mac"))
    }

    /// Asks the guest to give up a NIC, if it has it.
    pub fn detach_nic(&self, request: &DetachNicRequest) -> Result<VmmInfo, Fault> {
        let slot = slot_of(request.slot)?;
        let mac = net::parse(&request.mac);
        let is_it = |at: &At| matches!(at.about, About::Nic { mac: own, .. } if Some(own) == mac);
        self.detach(slot, request.revision, is_it)
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
