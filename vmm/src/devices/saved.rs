//! The devices on the PCI bus as they are saved: typed, and the protobuf they travel as. Pure.
//!
//! Decoding bounds counts and lengths; whether a state is one of the devices that are here, these check when they take it over.

use std::collections::BTreeMap;

use drover_proto::v1::virtio_save::Device;
use drover_proto::v1::{
    AcpiSave, PciSave, VirtioBalloonSave, VirtioBlkSave, VirtioConsoleSave, VirtioNetSave, VirtioQueueSave,
    VirtioRngSave, VirtioSave,
};

use super::acpi::{Registers, slots_of};
use super::pci::SLOTS;
use super::pci::bus::SavedBus;
use super::pci::config::CONFIG_BYTES;
use super::pci::msix::{ENTRY_BYTES, VECTORS_MAX};
use super::virtio::blk::SERIAL_BYTES;
use super::virtio::console::input::INPUT_BYTES_MAX;
use super::virtio::net::{FRAME_BYTES_MAX, Mac};
use super::virtio::queue::Queue;
use super::virtio::transport::Transport;

/// The device models that brought random numbers and disks, NICs, balloons, consoles.
pub const MODEL_DISKS: u32 = 2;
/// See [`MODEL_DISKS`].
pub const MODEL_NICS: u32 = 3;
/// See [`MODEL_DISKS`].
pub const MODEL_BALLOON: u32 = 5;
/// See [`MODEL_DISKS`].
pub const MODEL_CONSOLE: u32 = 6;

/// Most queues of a device.
const QUEUES_MAX: usize = 64;

/// The bus and its devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedPci {
    /// The bus's own.
    pub bus: SavedBus,
    /// The devices' by slot, from 1 on.
    pub devices: BTreeMap<usize, SavedVirtio>,
}

impl SavedPci {
    /// Whether the devices are in slots 1, 2, …, where a VMM that knows no others looks for them.
    pub fn is_counted(&self) -> bool {
        self.devices.keys().copied().eq(1..=self.devices.len())
    }
}

/// A virtio device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedVirtio {
    /// Its configuration space.
    pub config: Vec<u8>,
    /// Its MSI-X table.
    pub msix_table: Vec<u8>,
    /// Its pending bits.
    pub msix_pending: Vec<u8>,
    /// Its registers and queues.
    pub registers: SavedRegisters,
    /// What is its own.
    pub device: SavedDevice,
}

/// The transport's registers: see [`Transport`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedRegisters {
    offered: u64,
    accepted: u64,
    offered_select: u32,
    accepted_select: u32,
    config_vector: u16,
    status: u8,
    generation: u8,
    queue_select: u16,
    isr: u8,
    queues: Vec<SavedQueue>,
}

/// A queue: see [`Queue`].
#[derive(Clone, Debug, PartialEq, Eq)]
struct SavedQueue {
    size: u16,
    enabled: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    vector: u16,
    next_available: u16,
    next_used: u16,
}

/// What is a device's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SavedDevice {
    /// A source of random numbers: nothing.
    Rng,
    /// A disk.
    Blk(SavedBlk),
    /// A NIC.
    Net(SavedNet),
    /// A balloon.
    Balloon(SavedBalloon),
    /// A console.
    Console(SavedConsole),
}

impl SavedDevice {
    /// The device model that brought its kind.
    pub fn device_model(&self) -> u32 {
        match self {
            Self::Rng | Self::Blk(_) => MODEL_DISKS,
            Self::Net(_) => MODEL_NICS,
            Self::Balloon(_) => MODEL_BALLOON,
            Self::Console(_) => MODEL_CONSOLE,
        }
    }
}

/// A balloon. Which pages are in it is the guest's to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedBalloon {
    /// Pages that it is to hold.
    pub target_pages: u32,
    /// The wish that this is of.
    pub revision: u64,
    /// Pages that it holds, says its driver.
    pub actual_pages: u32,
}

/// A console, but for its scroll-back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedConsole {
    /// What was typed and is in no buffer of its driver's yet.
    pub input: Vec<u8>,
    /// Its driver takes input.
    pub hears: bool,
}

/// A NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedNet {
    /// Its address.
    pub mac: Mac,
    /// Most bytes of a packet.
    pub mtu: u16,
    /// A frame with its header that was taken from the tap and is in no chain yet; empty: none.
    pub held: Vec<u8>,
}

/// A disk, but for what is on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedBlk {
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// It cannot be written.
    pub read_only: bool,
    /// What it tells as its serial number.
    pub serial: String,
}

impl SavedRegisters {
    /// The registers as they are now.
    pub fn of(transport: &Transport) -> Self {
        Self {
            offered: transport.offered,
            accepted: transport.accepted,
            offered_select: transport.offered_select,
            accepted_select: transport.accepted_select,
            config_vector: transport.config_vector,
            status: transport.status,
            generation: transport.generation,
            queue_select: transport.queue_select,
            isr: transport.isr,
            queues: transport.queues.iter().map(SavedQueue::of).collect(),
        }
    }

    /// Puts them into `transport`, of a device that must offer at least what the saved one did and have as many queues. The features that
    /// its driver was offered stay the offer.
    pub fn put_into(&self, transport: &mut Transport) -> Result<(), String> {
        if self.offered & !transport.offered != 0 || self.queues.len() != transport.queues.len() {
            return Err(format!(
                "features {:#x} and {} queues; this device has {:#x} and {}",
                self.offered,
                self.queues.len(),
                transport.offered,
                transport.queues.len()
            ));
        }
        transport.offered = self.offered;
        transport.accepted = self.accepted;
        transport.offered_select = self.offered_select;
        transport.accepted_select = self.accepted_select;
        transport.config_vector = self.config_vector;
        transport.status = self.status;
        transport.generation = self.generation;
        transport.queue_select = self.queue_select;
        transport.isr = self.isr;
        transport.resetting = false;
        for (queue, saved) in transport.queues.iter_mut().zip(&self.queues) {
            saved.put_into(queue);
        }
        Ok(())
    }
}

impl SavedQueue {
    fn of(queue: &Queue) -> Self {
        Self {
            size: queue.size,
            enabled: queue.enabled,
            descriptors: queue.descriptors,
            available: queue.available,
            used: queue.used,
            vector: queue.vector,
            next_available: queue.next_available,
            next_used: queue.next_used,
        }
    }

    fn put_into(&self, queue: &mut Queue) {
        *queue = Queue {
            size_max: queue.size_max,
            size: self.size,
            enabled: self.enabled,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            vector: self.vector,
            next_available: self.next_available,
            next_used: self.next_used,
        };
    }
}

/// Encodes the bus.
pub fn encode(saved: &SavedPci) -> PciSave {
    let slot = |slot: &usize| u32::try_from(*slot).expect("a bus has few slots");
    PciSave {
        address: saved.bus.address,
        bridge: saved.bus.bridge.clone(),
        devices: saved.devices.values().map(encode_device).collect(),
        slots: if saved.is_counted() {
            Vec::new()
        } else {
            saved.devices.keys().map(slot).collect()
        },
    }
}

/// Encodes the registers of ACPI's events, with a bus that has nothing on it.
pub fn encode_acpi(registers: &Registers, idle_bus: Option<&SavedPci>) -> AcpiSave {
    AcpiSave {
        pm1_status: registers.pm1_status.into(),
        pm1_enable: registers.pm1_enable.into(),
        gpe_enable: registers.gpe_enable.into(),
        filled: registers.filled,
        asked: registers.asked,
        leaving: registers.leaving,
        idle_bus: idle_bus.map(encode),
    }
}

/// Decodes them; an error says what is wrong with their shape. The bus is in either place, or in none where a VMM without it wrote.
pub fn decode_board(
    pci: Option<PciSave>,
    acpi: Option<AcpiSave>,
) -> Result<(Option<SavedPci>, Registers), String> {
    let AcpiSave {
        pm1_status,
        pm1_enable,
        gpe_enable,
        filled,
        asked,
        leaving,
        idle_bus,
    } = acpi.unwrap_or_default();
    let registers = Registers::saved(pm1_status, pm1_enable, gpe_enable, [filled, asked, leaving])?;
    if idle_bus
        .as_ref()
        .is_some_and(|bus| pci.is_some() || !bus.devices.is_empty())
    {
        return Err("acpi.idle_bus is not the only bus, or not idle".to_owned());
    }
    let pci = pci.or(idle_bus).map(decode).transpose()?;
    let holds = |slot: usize| pci.as_ref().is_some_and(|pci| pci.devices.contains_key(&slot));
    if let Some(slot) = slots_of(filled | leaving).find(|&slot| !holds(slot)) {
        return Err(format!("acpi tells of slot {slot}, which is empty"));
    }
    Ok((pci, registers))
}

fn encode_device(saved: &SavedVirtio) -> VirtioSave {
    let registers = &saved.registers;
    VirtioSave {
        config: saved.config.clone(),
        msix_table: saved.msix_table.clone(),
        msix_pending: saved.msix_pending.clone(),
        offered: registers.offered,
        accepted: registers.accepted,
        offered_select: registers.offered_select,
        accepted_select: registers.accepted_select,
        config_vector: registers.config_vector.into(),
        status: registers.status.into(),
        generation: registers.generation.into(),
        queue_select: registers.queue_select.into(),
        isr: registers.isr.into(),
        queues: registers
            .queues
            .iter()
            .map(|queue| VirtioQueueSave {
                size: queue.size.into(),
                enabled: queue.enabled,
                descriptors: queue.descriptors,
                available: queue.available,
                used: queue.used,
                vector: queue.vector.into(),
                next_available: queue.next_available.into(),
                next_used: queue.next_used.into(),
            })
            .collect(),
        device: Some(match &saved.device {
            SavedDevice::Rng => Device::Rng(VirtioRngSave {}),
            SavedDevice::Blk(blk) => Device::Blk(VirtioBlkSave {
                sectors: blk.sectors,
                read_only: blk.read_only,
                serial: blk.serial.clone(),
            }),
            SavedDevice::Net(net) => Device::Net(VirtioNetSave {
                mac: net.mac.to_vec(),
                mtu: net.mtu.into(),
                held: net.held.clone(),
            }),
            SavedDevice::Balloon(balloon) => Device::Balloon(VirtioBalloonSave {
                target_pages: balloon.target_pages,
                revision: balloon.revision,
                actual_pages: balloon.actual_pages,
            }),
            SavedDevice::Console(console) => Device::Console(VirtioConsoleSave {
                input: console.input.clone(),
                hears: console.hears,
            }),
        }),
    }
}

/// Decodes the bus; an error says what is wrong with its shape.
pub fn decode(save: PciSave) -> Result<SavedPci, String> {
    if save.bridge.len() != CONFIG_BYTES || save.devices.len() >= SLOTS {
        return Err(format!(
            "pci has {} bytes of its bridge and {} devices, must have {CONFIG_BYTES} and at most {}",
            save.bridge.len(),
            save.devices.len(),
            SLOTS - 1
        ));
    }
    let slots: Vec<usize> = match save.slots.as_slice() {
        [] => (1..=save.devices.len()).collect(),
        told => told
            .iter()
            .map(|&slot| usize::try_from(slot).unwrap_or(SLOTS))
            .collect(),
    };
    let rise =
        slots.is_sorted_by(|one, next| one < next) && slots.iter().all(|slot| (1..SLOTS).contains(slot));
    if !rise || slots.len() != save.devices.len() {
        return Err(format!(
            "pci has {} devices in slots {:?}; a slot each, rising, within 1..={}, is due",
            save.devices.len(),
            save.slots,
            SLOTS - 1
        ));
    }
    let devices = slots.into_iter().zip(save.devices).map(|(slot, device)| {
        let device = decode_device(device).map_err(|what| format!("pci slot {slot}: {what}"))?;
        Ok((slot, device))
    });
    Ok(SavedPci {
        bus: SavedBus {
            address: save.address,
            bridge: save.bridge,
        },
        devices: devices.collect::<Result<_, String>>()?,
    })
}

fn narrow<T: TryFrom<u32>>(what: &str, value: u32) -> Result<T, String> {
    T::try_from(value).map_err(|_| format!("{what} is {value}, which is too large"))
}

fn decode_device(save: VirtioSave) -> Result<SavedVirtio, String> {
    let (table, pending) = (save.msix_table.len(), save.msix_pending.len());
    if save.config.len() != CONFIG_BYTES
        || table > VECTORS_MAX * ENTRY_BYTES
        || pending > VECTORS_MAX / 8
        || save.queues.len() > QUEUES_MAX
    {
        return Err(format!(
            "{} bytes of configuration, {table} and {pending} of MSI-X, {} queues; {CONFIG_BYTES} are due, then at most {}, {} and {QUEUES_MAX}",
            save.config.len(),
            save.queues.len(),
            VECTORS_MAX * ENTRY_BYTES,
            VECTORS_MAX / 8
        ));
    }
    let device = match save.device.ok_or("of no known kind")? {
        Device::Rng(VirtioRngSave {}) => SavedDevice::Rng,
        Device::Blk(blk) if blk.serial.len() > SERIAL_BYTES => {
            return Err(format!("a serial number of {} bytes", blk.serial.len()));
        }
        Device::Blk(blk) => SavedDevice::Blk(SavedBlk {
            sectors: blk.sectors,
            read_only: blk.read_only,
            serial: blk.serial,
        }),
        Device::Net(net) => SavedDevice::Net(decode_net(net)?),
        Device::Balloon(balloon) => SavedDevice::Balloon(SavedBalloon {
            target_pages: balloon.target_pages,
            revision: balloon.revision,
            actual_pages: balloon.actual_pages,
        }),
        Device::Console(console) if console.input.len() > INPUT_BYTES_MAX => {
            return Err(format!("a console's input of {} bytes", console.input.len()));
        }
        Device::Console(console) => SavedDevice::Console(SavedConsole {
            input: console.input,
            hears: console.hears,
        }),
    };
    let queues = save.queues.iter().map(decode_queue).collect::<Result<_, _>>()?;
    Ok(SavedVirtio {
        config: save.config,
        msix_table: save.msix_table,
        msix_pending: save.msix_pending,
        registers: SavedRegisters {
            offered: save.offered,
            accepted: save.accepted,
            offered_select: save.offered_select,
            accepted_select: save.accepted_select,
            config_vector: narrow("config_vector", save.config_vector)?,
            status: narrow("status", save.status)?,
            generation: narrow("generation", save.generation)?,
            queue_select: narrow("queue_select", save.queue_select)?,
            isr: narrow("isr", save.isr)?,
            queues,
        },
        device,
    })
}

fn decode_net(save: VirtioNetSave) -> Result<SavedNet, String> {
    let mac = save.mac.as_slice().try_into();
    let (Ok(mac), true) = (mac, save.held.len() <= FRAME_BYTES_MAX) else {
        return Err(format!(
            "a NIC's address of {} bytes and a frame of {}, must be 6 and at most {FRAME_BYTES_MAX}",
            save.mac.len(),
            save.held.len()
        ));
    };
    Ok(SavedNet {
        mac,
        mtu: narrow("mtu", save.mtu)?,
        held: save.held,
    })
}

fn decode_queue(save: &VirtioQueueSave) -> Result<SavedQueue, String> {
    Ok(SavedQueue {
        size: narrow("size", save.size)?,
        enabled: save.enabled,
        descriptors: save.descriptors,
        available: save.available,
        used: save.used,
        vector: narrow("vector", save.vector)?,
        next_available: narrow("next_available", save.next_available)?,
        next_used: narrow("next_used", save.next_used)?,
    })
}
