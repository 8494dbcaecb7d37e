//! The devices of a VM that has a PCI bus, as one thing: built, saved, restored, ended.

use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use drover_proto::{Code, Fault};
use kvm_ioctls::VmFd;
use tracing::warn;
use vmm_sys_util::eventfd::EventFd;

use super::gate::IoGate;
use super::pci::bus::Bus;
use super::pci::{MMIO, PciDevice};
use super::saved::SavedPci;
use super::virtio::blk::Blk;
use super::virtio::blk::disk::Disk;
use super::virtio::net::tap::Tap;
use super::virtio::net::{Mac, Net, announce};
use super::virtio::pci::{REGION_BYTES, VirtioPci, vectors};
use super::virtio::rng::Rng;
use super::virtio::{Device, worker};
use super::wires::Router;
use crate::memory::Memory;

/// What a VM is given beside its memory and its vCPUs; slots in this order, from 1 on.
#[derive(Debug, Default)]
pub struct Equipment {
    /// A source of random numbers.
    pub rng: bool,
    /// Disks.
    pub disks: Vec<Disk>,
    /// NICs.
    pub nics: Vec<Nic>,
}

/// A NIC of a VM.
#[derive(Debug)]
pub struct Nic {
    /// Where its frames go and come from.
    pub tap: Tap,
    /// Its address.
    pub mac: Mac,
    /// Most bytes of a packet.
    pub mtu: u16,
}

impl Equipment {
    /// Whether there is nothing for a bus.
    pub fn is_empty(&self) -> bool {
        !self.rng && self.disks.is_empty() && self.nics.is_empty()
    }
}

/// The bus, its devices and their workers.
pub struct Attached {
    /// The bus.
    pub bus: Bus,
    devices: Vec<Arc<VirtioPci>>,
    nics: Vec<announce::Place>,
    taps: Vec<Arc<Tap>>,
    gate: Arc<IoGate>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

impl Attached {
    /// Builds the devices; none works before `gate` is opened.
    pub fn build(
        vm: &Arc<VmFd>,
        memory: &Arc<Memory>,
        gate: &Arc<IoGate>,
        equipment: Equipment,
    ) -> Result<Self, Fault> {
        let mut models: Vec<Arc<dyn Device>> = Vec::new();
        if equipment.rng {
            models.push(Arc::new(Rng::new()?));
        }
        for disk in equipment.disks {
            let disk = Arc::new(disk);
            gate.add_held(disk.clone());
            models.push(Arc::new(Blk::new(disk)));
        }
        let (mut nets, mut taps) = (Vec::new(), Vec::new());
        let before_nics = models.len();
        for Nic { tap, mac, mtu } in equipment.nics {
            let tap = Arc::new(tap);
            gate.add_held(tap.clone());
            let net = Arc::new(Net::new(tap.clone(), mac, mtu));
            models.push(net.clone());
            nets.push(net);
            taps.push(tap);
        }
        let router = Router::new(vm.clone());
        let (mut devices, mut workers) = (Vec::new(), Vec::new());
        for (slot, model) in (1u32..).zip(models) {
            let failed =
                |error: std::io::Error| Fault::new(Code::VmmStartFailed, format!("a device's bell: {error}"));
            let bell = EventFd::new(libc::EFD_CLOEXEC).map_err(failed)?;
            gate.add_bell(bell.try_clone().map_err(failed)?);
            let rung = bell.try_clone().map_err(failed)?;
            let wires = router.wires(vectors(&*model), model.queues().len(), rung)?;
            let window = u32::try_from(MMIO.start).expect("the window lies below 4 GiB");
            let device = Arc::new(VirtioPci::new(
                model,
                window + slot * REGION_BYTES,
                memory.clone(),
                gate.clone(),
                Box::new(wires),
                bell,
            ));
            workers.push(worker::start(
                device.clone(),
                usize::try_from(slot).expect("few slots"),
            )?);
            devices.push(device);
        }
        let places = devices.iter().skip(before_nics).cloned();
        let on_bus = devices.iter().map(|device| device.clone() as Arc<dyn PciDevice>);
        Ok(Self {
            bus: Bus::new(on_bus.collect()),
            nics: nets.into_iter().zip(places).collect(),
            taps,
            devices,
            gate: gate.clone(),
            workers: Mutex::new(workers),
        })
    }

    /// Tells the network where the VM is: it has just begun to run here.
    pub fn announce(&self) {
        if self.nics.is_empty() {
            return;
        }
        match announce::start(self.nics.clone(), self.gate.clone()) {
            Ok(thread) => self.workers().push(thread),
            Err(fault) => warn!(%fault, "the VM's NICs are not announced"),
        }
    }

    fn workers(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.workers
            .lock()
            .expect("no holder of the workers' lock panics")
    }

    /// The state of the bus and its devices.
    pub fn save(&self) -> SavedPci {
        SavedPci {
            bus: self.bus.save(),
            devices: self.devices.iter().map(|device| device.save()).collect(),
        }
    }

    /// Takes over a saved bus, whose devices must be these.
    pub fn restore(&self, saved: &SavedPci) -> Result<(), String> {
        if saved.devices.len() != self.devices.len() {
            return Err(format!(
                "the saved VM has {} devices on its bus, this one was built with {}",
                saved.devices.len(),
                self.devices.len()
            ));
        }
        self.bus.restore(&saved.bus)?;
        for (slot, (device, saved)) in (1..).zip(self.devices.iter().zip(&saved.devices)) {
            device
                .restore(saved)
                .map_err(|what| format!("pci slot {slot}: {what}"))?;
        }
        // What came until the source had paused is the source's.
        self.taps.iter().for_each(|tap| tap.pass_over());
        Ok(())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.gate.quit();
        for worker in self.workers().drain(..) {
            // A panic in it was logged by the panic hook; there is nothing to add here.
            let _ = worker.join();
        }
    }
}
