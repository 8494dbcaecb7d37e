//! The devices on a VM's PCI bus: built, plugged in and given up, saved, restored, ended.
//!
//! ```text
//!   prepare ──► plug ──► There ──(the guest gives the slot up)──► Leaving ──► gone
//!     opened,     on the    works                                   off the bus; its last request ends,
//!     locked      bus                                               then its disk is unlocked
//! ```
//!
//! What is to be in which slot is told by whoever configures the VM; where nothing is told, devices take the lowest free slots in their
//! order, as they did before slots could be told. A slot is generic: it neither knows nor asks what kind of device is in it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use drover_proto::{Code, Fault};
use kvm_ioctls::VmFd;
use tracing::{error, info, warn};
use vmm_sys_util::eventfd::EventFd;

use super::console::Console;
use super::gate::{Held, IoGate};
use super::pci::bus::Bus;
use super::pci::{MMIO, SLOTS};
use super::saved::{MODEL_BALLOON, MODEL_CONSOLE, MODEL_DISKS, MODEL_NICS, SavedPci};
use super::virtio::balloon::{Balloon, Level, Target};
use super::virtio::blk::disk::Disk;
use super::virtio::blk::{Blk, SECTOR};
use super::virtio::console::Port;
use super::virtio::net::tap::Tap;
use super::virtio::net::{Mac, Net, announce};
use super::virtio::pci::{REGION_BYTES, VirtioPci, vectors};
use super::virtio::rng::Rng;
use super::virtio::{Device, worker};
use super::wires::Router;
use crate::memory::Memory;
use crate::sandbox::{self, Thread};

/// One thing that a VM is given beside its memory and its vCPUs.
#[derive(Debug)]
pub enum Gear {
    /// A source of random numbers.
    Rng,
    /// A disk.
    Disk(Disk),
    /// A NIC.
    Nic(Nic),
    /// The balloon of a VM with so many pages.
    Balloon(Target, u64),
    /// A port of the VM's console.
    Console,
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

/// What a VM is given, each thing with its slot, or without: then it takes the lowest that is free.
pub type Equipment = Vec<(Option<usize>, Gear)>;

/// What of a device is told to whoever configures it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum About {
    /// A source of random numbers.
    Rng,
    /// A disk.
    Disk {
        /// Its file.
        path: PathBuf,
        /// It cannot be written.
        read_only: bool,
    },
    /// A NIC.
    Nic {
        /// Its address.
        mac: Mac,
        /// Its tap's name.
        tap: String,
    },
    /// A balloon.
    Balloon,
    /// A port of the console.
    Console,
}

impl About {
    /// The device model that brought its kind.
    pub fn device_model(&self) -> u32 {
        match self {
            Self::Rng | Self::Disk { .. } => MODEL_DISKS,
            Self::Nic { .. } => MODEL_NICS,
            Self::Balloon => MODEL_BALLOON,
            Self::Console => MODEL_CONSOLE,
        }
    }
}

/// A kind of device, for what is its own.
#[derive(Clone)]
enum Kind {
    Rng,
    Disk(Arc<Disk>),
    Nic(Arc<Net>, Arc<Tap>),
    Balloon(Arc<Balloon>),
    Console(Arc<Port>),
}

impl Kind {
    fn model(&self) -> Result<Arc<dyn Device>, Fault> {
        Ok(match self {
            Self::Rng => Arc::new(Rng::new()?),
            Self::Disk(disk) => Arc::new(Blk::new(disk.clone())),
            Self::Nic(net, _) => net.clone(),
            Self::Balloon(balloon) => balloon.clone(),
            Self::Console(port) => port.clone(),
        })
    }

    /// What it needs to be held to work.
    fn held(&self) -> Option<Arc<dyn Held>> {
        match self {
            Self::Rng | Self::Balloon(_) | Self::Console(_) => None,
            Self::Disk(disk) => Some(disk.clone()),
            Self::Nic(_, tap) => Some(tap.clone()),
        }
    }
}

/// A device that was made and is on no bus yet.
pub struct Prepared {
    about: About,
    kind: Kind,
    model: Arc<dyn Device>,
    /// What it needs is held already.
    taken: bool,
}

impl Prepared {
    /// Makes the device of `gear`, of a VM with this console.
    pub fn new(gear: Gear, console: &Arc<Console>) -> Result<Self, Fault> {
        let (about, kind) = match gear {
            Gear::Rng => (About::Rng, Kind::Rng),
            Gear::Disk(disk) => {
                let (path, read_only) = (disk.path().to_owned(), disk.is_read_only());
                (About::Disk { path, read_only }, Kind::Disk(Arc::new(disk)))
            }
            Gear::Nic(Nic { tap, mac, mtu }) => {
                let (name, tap) = (tap.name().to_owned(), Arc::new(tap));
                let net = Arc::new(Net::new(tap.clone(), mac, mtu));
                (About::Nic { mac, tap: name }, Kind::Nic(net, tap))
            }
            Gear::Balloon(target, pages) => (
                About::Balloon,
                Kind::Balloon(Arc::new(Balloon::new(target, pages))),
            ),
            Gear::Console => (
                About::Console,
                Kind::Console(Arc::new(Port::new(console.clone())?)),
            ),
        };
        Ok(Self {
            about,
            model: kind.model()?,
            kind,
            taken: false,
        })
    }

    /// What it is.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// Takes what it needs to work, for a VM that runs already. May wait for seconds.
    pub fn take(&mut self) -> Result<(), Fault> {
        if let Some(held) = self.kind.held() {
            held.take()?;
            self.taken = true;
        }
        Ok(())
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if let (true, Some(held)) = (self.taken, self.kind.held()) {
            held.release();
        }
    }
}

struct There {
    device: Arc<VirtioPci>,
    held: Option<Arc<dyn Held>>,
    worker: JoinHandle<()>,
}

impl There {
    /// Ends a device that is off the bus; waits for the request that it has begun.
    fn end(self, slot: usize, gate: &IoGate) {
        self.device.leave();
        // A panic in it was logged by the panic hook; there is nothing to add here.
        let _ = self.worker.join();
        gate.remove_bell(slot);
        if let Some(held) = &self.held {
            gate.remove_held(held);
        }
    }
}

/// What is in a slot, for whoever configures the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At {
    /// The slot.
    pub slot: usize,
    /// What it is.
    pub about: About,
    /// A disk's size as the guest sees it.
    pub size_bytes: u64,
    /// It is off the bus already, and only ends.
    pub leaves: bool,
}

struct Slot {
    about: About,
    kind: Kind,
    /// None: off the bus, and ending.
    there: Option<There>,
}

impl Slot {
    fn told(&self, slot: usize) -> At {
        At {
            slot,
            about: self.about.clone(),
            size_bytes: match &self.kind {
                Kind::Disk(disk) => disk.sectors() * SECTOR,
                Kind::Rng | Kind::Nic(..) | Kind::Balloon(_) | Kind::Console(_) => 0,
            },
            leaves: self.there.is_none(),
        }
    }
}

type Table = Mutex<BTreeMap<usize, Slot>>;

fn lock(table: &Table) -> MutexGuard<'_, BTreeMap<usize, Slot>> {
    table.lock().expect("no holder of the slots' lock panics")
}

/// The bus, its devices and their workers.
pub struct Attached {
    /// The bus.
    pub bus: Bus,
    table: Arc<Table>,
    router: Arc<Router>,
    memory: Arc<Memory>,
    gate: Arc<IoGate>,
    console: Arc<Console>,
    /// Rung when a device has gone.
    news: EventFd,
    announcers: Mutex<Vec<JoinHandle<()>>>,
}

impl Attached {
    /// An empty bus. No device on it works before `gate` is opened.
    pub fn new(
        vm: &Arc<VmFd>,
        memory: &Arc<Memory>,
        gate: &Arc<IoGate>,
        console: &Arc<Console>,
        news: EventFd,
    ) -> Self {
        Self {
            bus: Bus::new(),
            table: Arc::default(),
            router: Router::new(vm.clone()),
            memory: memory.clone(),
            gate: gate.clone(),
            console: console.clone(),
            news,
            announcers: Mutex::default(),
        }
    }

    /// Gives a VM that has not run yet its devices.
    pub fn equip(&self, equipment: Equipment) -> Result<(), Fault> {
        let told: Vec<usize> = equipment.iter().filter_map(|(slot, _)| *slot).collect();
        let mut free = (1..SLOTS).filter(|slot| !told.contains(slot));
        for (slot, gear) in equipment {
            let slot = slot.or_else(|| free.next());
            let slot = slot.ok_or_else(|| Fault::new(Code::InvalidArgument, "more devices than slots"))?;
            self.plug(slot, Prepared::new(gear, &self.console)?)?;
        }
        Ok(())
    }

    /// What is in the slots.
    pub fn list(&self) -> Vec<At> {
        lock(&self.table)
            .iter()
            .map(|(slot, at)| at.told(*slot))
            .collect()
    }

    /// What is in one slot.
    pub fn at(&self, slot: usize) -> Option<At> {
        lock(&self.table).get(&slot).map(|at| at.told(slot))
    }

    /// The disk in `slot`, if it is on the bus.
    pub fn disk(&self, slot: usize) -> Option<Arc<Disk>> {
        match lock(&self.table).get(&slot)? {
            Slot {
                kind: Kind::Disk(disk),
                there: Some(_),
                ..
            } => Some(disk.clone()),
            _ => None,
        }
    }

    /// The disk in `slot` has `bytes` now, and its guest is told. A fault: its file has not.
    pub fn grow(&self, slot: usize, bytes: u64) -> Result<(), Fault> {
        let table = lock(&self.table);
        let Some(Slot {
            kind: Kind::Disk(disk),
            there: Some(there),
            ..
        }) = table.get(&slot)
        else {
            return Err(Fault::new(Code::DeviceBusy, format!("slot {slot} has no disk")).field("slot"));
        };
        if disk.grow(bytes)? {
            there.device.config_changed();
        }
        Ok(())
    }

    /// The balloon, if there is one, with the device that it is.
    fn balloon(table: &BTreeMap<usize, Slot>) -> Option<(&Balloon, &VirtioPci)> {
        table.values().find_map(|at| match (&at.kind, &at.there) {
            (Kind::Balloon(balloon), Some(there)) => Some((&**balloon, &*there.device)),
            _ => None,
        })
    }

    /// How the VM's balloon stands, if it has one.
    pub fn balloon_level(&self) -> Option<Level> {
        Self::balloon(&lock(&self.table)).map(|(balloon, _)| balloon.level())
    }

    /// Whether the guest has a driver for the VM's balloon.
    pub fn balloon_has_driver(&self) -> bool {
        Self::balloon(&lock(&self.table)).is_some_and(|(_, device)| device.has_driver())
    }

    /// Types on the VM's virtio console; returns how many bytes fitted. None: it has none, or there is no driver that takes any.
    pub fn type_in(&self, bytes: &[u8]) -> Option<usize> {
        lock(&self.table)
            .values()
            .find_map(|at| match (&at.kind, &at.there) {
                // A driver that has broken a rule takes nothing until it begins anew, and may never.
                (Kind::Console(port), Some(there)) if there.device.has_driver() => port.type_in(bytes),
                _ => None,
            })
    }

    /// The guest is to give so much memory up. A fault: there is no balloon, or a later wish was told.
    pub fn set_balloon(&self, target: Target) -> Result<(), Fault> {
        let table = lock(&self.table);
        let Some((balloon, device)) = Self::balloon(&table) else {
            let message = "the VM has no balloon: its guest cannot be asked for memory";
            return Err(Fault::new(Code::VmState, message));
        };
        let before = balloon.level().target;
        if !balloon.set_target(target) {
            let message = format!(
                "the call is of revision {}, {} was taken: it comes too late",
                target.revision, before.revision
            );
            return Err(Fault::new(Code::DeviceBusy, message).field("revision"));
        }
        if before.pages != target.pages {
            device.config_changed();
        }
        Ok(())
    }

    /// Puts a device on the bus. What was taken for it is held with the rest from now on.
    pub fn plug(&self, slot: usize, mut prepared: Prepared) -> Result<(), Fault> {
        let mut table = lock(&self.table);
        if !(1..SLOTS).contains(&slot) || table.contains_key(&slot) {
            let message = format!("slot {slot} is not free; slots are 1..={}", SLOTS - 1);
            return Err(Fault::new(Code::DeviceBusy, message).field("slot"));
        }
        let failed =
            |error: std::io::Error| Fault::new(Code::VmmStartFailed, format!("a device's bell: {error}"));
        let bell = EventFd::new(libc::EFD_CLOEXEC).map_err(failed)?;
        let (rung, turned_away) = (
            bell.try_clone().map_err(failed)?,
            bell.try_clone().map_err(failed)?,
        );
        let model = prepared.model.clone();
        let wires = self.router.wires(vectors(&*model), model.queues().len(), rung)?;
        let window = u32::try_from(MMIO.start).expect("the window lies below 4 GiB");
        let device = Arc::new(VirtioPci::new(
            model,
            window + u32::try_from(slot).expect("few slots") * REGION_BYTES,
            self.memory.clone(),
            self.gate.clone(),
            Box::new(wires),
            bell,
        ));
        let worker = worker::start(device.clone(), slot)?;
        let there = There {
            device: device.clone(),
            held: prepared.kind.held(),
            worker,
        };
        let held = match prepared.kind.held() {
            Some(held) if prepared.taken => self.gate.add_taken(held),
            Some(held) => {
                self.gate.add_held(held);
                Ok(())
            }
            None => Ok(()),
        };
        if let Err(fault) = held {
            there.end(slot, &self.gate);
            return Err(fault);
        }
        prepared.taken = false;
        self.gate.add_bell(slot, turned_away);
        self.bus.put(slot, Some(device));
        table.insert(
            slot,
            Slot {
                about: prepared.about.clone(),
                kind: prepared.kind.clone(),
                there: Some(there),
            },
        );
        Ok(())
    }

    /// Takes the device in `slot` off the bus; the guest finds nothing there when this returns. What the device has begun ends later.
    pub fn unplug(&self, slot: usize) {
        let Some(there) = lock(&self.table)
            .get_mut(&slot)
            .and_then(|slot| slot.there.take())
        else {
            return;
        };
        self.bus.put(slot, None);
        let (table, gate) = (self.table.clone(), self.gate.clone());
        let news = self.news.try_clone();
        let end = move || {
            sandbox::narrow(Thread::Device);
            there.end(slot, &gate);
            lock(&table).remove(&slot);
            info!(slot, "the device is gone");
            if let Err(error) = news.and_then(|news| news.write(1)) {
                error!(%error, "that a device has gone is told late");
            }
        };
        let thread = std::thread::Builder::new().name(format!("leave{slot}"));
        if let Err(error) = thread.spawn(end) {
            // Its disk stays locked, and the slot taken, until the VM ends.
            error!(%error, slot, "a device that was given up cannot be ended");
        }
    }

    fn announcers(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.announcers.lock().expect("no holder of this lock panics")
    }

    /// Tells the network where the VM is: it has just begun to run here.
    pub fn announce(&self) {
        let place = |at: &Slot| match (&at.kind, &at.there) {
            (Kind::Nic(net, _), Some(there)) => Some((net.clone(), there.device.clone())),
            _ => None,
        };
        let nics: Vec<announce::Place> = lock(&self.table).values().filter_map(place).collect();
        if nics.is_empty() {
            return;
        }
        match announce::start(nics, self.gate.clone()) {
            Ok(thread) => self.announcers().push(thread),
            Err(fault) => warn!(%fault, "the VM's NICs are not announced"),
        }
    }

    /// The state of the bus and of what is on it.
    pub fn save(&self) -> SavedPci {
        let table = lock(&self.table);
        let devices = table
            .iter()
            .filter_map(|(slot, at)| Some((*slot, at.there.as_ref()?.device.save())));
        SavedPci {
            bus: self.bus.save(),
            devices: devices.collect(),
        }
    }

    /// Takes over a saved bus, whose devices must be here. What is here and was not there is removed: the guest has not been told of
    /// it, or has given it up since this VM was built.
    pub fn restore(&self, saved: &SavedPci) -> Result<(), String> {
        self.bus.restore(&saved.bus)?;
        let mut table = lock(&self.table);
        for (slot, saved) in &saved.devices {
            let there = table.get(slot).and_then(|at| at.there.as_ref());
            let there = there.ok_or_else(|| {
                format!(
                    "pci slot {slot}: the saved VM has {:?} there, this one has nothing",
                    saved.device
                )
            })?;
            there
                .device
                .restore(saved)
                .map_err(|what| format!("pci slot {slot}: {what}"))?;
        }
        for slot in (1..SLOTS).filter(|slot| !saved.devices.contains_key(slot)) {
            if let Some(at) = table.remove(&slot) {
                self.remove(slot, at);
            }
        }
        for at in table.values() {
            // What came until the source had paused is the source's.
            if let Kind::Nic(_, tap) = &at.kind {
                tap.pass_over();
            }
        }
        Ok(())
    }

    /// Removes all there is, for a saved VM that has nothing.
    pub fn clear(&self) {
        let all = std::mem::take(&mut *lock(&self.table));
        all.into_iter().for_each(|(slot, at)| self.remove(slot, at));
    }

    fn remove(&self, slot: usize, at: Slot) {
        info!(slot, about = ?at.about, "the saved VM does not have this device");
        self.bus.put(slot, None);
        if let Some(there) = at.there {
            there.end(slot, &self.gate);
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.gate.quit();
        let mut table = lock(&self.table);
        for there in table.values_mut().filter_map(|slot| slot.there.take()) {
            // A panic in it was logged by the panic hook; there is nothing to add here.
            let _ = there.worker.join();
        }
        for thread in self.announcers().drain(..) {
            let _ = thread.join();
        }
    }
}
