//! The root bus: who answers at a port or an address.

use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use super::config::{ConfigSpace, Ident};
use super::{ADDRESS_PORT, DATA_PORT, PciDevice, SLOTS};

/// A host bridge of no particular make: Red Hat's generic one.
const HOST_BRIDGE: Ident = Ident {
    id: (0x1b36, 0x0008),
    class: [6, 0, 0],
    revision: 0,
    subsystem: (0x1af4, 0x1100),
};
const ENABLE: u32 = 1 << 31;

/// The bus and the devices on it.
pub struct Bus {
    address: Mutex<u32>,
    bridge: Mutex<ConfigSpace>,
    /// By slot; the first is the bridge's and stays empty. Never locked while a register is read or written.
    devices: RwLock<[Option<Arc<dyn PciDevice>>; SLOTS]>,
}

/// The bus's own part of a saved state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedBus {
    /// What the address port holds.
    pub address: u32,
    /// The host bridge's configuration space.
    pub bridge: Vec<u8>,
}

impl Default for Bus {
    fn default() -> Self {
        Self::new()
    }
}

impl Bus {
    /// A bus with nothing on it but its bridge.
    pub fn new() -> Self {
        Self {
            address: Mutex::default(),
            bridge: Mutex::new(ConfigSpace::new(HOST_BRIDGE)),
            devices: RwLock::default(),
        }
    }

    /// Puts `device` into `slot`, or takes away what is there.
    pub fn put(&self, slot: usize, device: Option<Arc<dyn PciDevice>>) {
        assert!((1..SLOTS).contains(&slot), "a slot of the bus");
        let mut devices = self.devices.write().expect("no holder of the slots' lock panics");
        devices[slot] = device;
    }

    fn device(&self, slot: usize) -> Option<Arc<dyn PciDevice>> {
        let devices = self.devices.read().expect("no holder of the slots' lock panics");
        devices.get(slot)?.clone()
    }

    fn address(&self) -> MutexGuard<'_, u32> {
        self.address
            .lock()
            .expect("no holder of the address's lock panics")
    }

    fn bridge(&self) -> MutexGuard<'_, ConfigSpace> {
        self.bridge.lock().expect("no holder of the bridge's lock panics")
    }

    /// The selected slot and register. None: nothing is selected, or a bus or function that does not exist.
    fn selected(&self) -> Option<(usize, usize)> {
        let address = *self.address();
        let is_ours = address & ENABLE != 0 && address & 0x00ff_0700 == 0;
        is_ours.then_some(((address >> 11 & 0x1f) as usize, (address & 0xfc) as usize))
    }

    /// The guest reads one of the configuration ports.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port < DATA_PORT {
            if port == ADDRESS_PORT && data.len() == 4 {
                data.copy_from_slice(&self.address().to_le_bytes());
            }
            return;
        }
        let within = usize::from(port - DATA_PORT);
        let Some((slot, register)) = self.selected().filter(|_| within + data.len() <= 4) else {
            return;
        };
        match slot {
            0 => self.bridge().read(register + within, data),
            _ => {
                if let Some(device) = self.device(slot) {
                    device.config_read(register + within, data);
                }
            }
        }
    }

    /// The guest writes one of the configuration ports.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        if port < DATA_PORT {
            if let Ok(bytes) = data.try_into()
                && port == ADDRESS_PORT
            {
                *self.address() = u32::from_le_bytes(bytes);
            }
            return;
        }
        let within = usize::from(port - DATA_PORT);
        let Some((slot, register)) = self.selected().filter(|_| within + data.len() <= 4) else {
            return;
        };
        match slot {
            0 => self.bridge().write(register + within, data),
            _ => {
                if let Some(device) = self.device(slot) {
                    device.config_write(register + within, data);
                }
            }
        }
    }

    fn decode(&self, gpa: u64, len: usize) -> Option<(Arc<dyn PciDevice>, usize, u64)> {
        let devices = self.devices.read().expect("no holder of the slots' lock panics");
        devices.iter().flatten().find_map(|device| {
            let (bar, offset) = device.decode(gpa, len)?;
            Some((device.clone(), bar, offset))
        })
    }

    /// The guest reads an address that is not memory.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        match self.decode(gpa, data.len()) {
            Some((device, bar, offset)) => device.bar_read(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes an address that is not memory.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if let Some((device, bar, offset)) = self.decode(gpa, data.len()) {
            device.bar_write(bar, offset, data);
        }
    }

    /// The bus's own state.
    pub fn save(&self) -> SavedBus {
        SavedBus {
            address: *self.address(),
            bridge: self.bridge().save(),
        }
    }

    /// Takes it over.
    pub fn restore(&self, saved: &SavedBus) -> Result<(), String> {
        *self.address() = saved.address;
        self.bridge()
            .restore(&saved.bridge)
            .map_err(|what| format!("host bridge: {what}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::config::tests::IDENT;
    use super::*;

    /// A device of one region that remembers what was written last.
    struct Toy {
        config: Mutex<ConfigSpace>,
        last: Mutex<(usize, u64, Vec<u8>)>,
    }

    impl PciDevice for Toy {
        fn config_read(&self, offset: usize, data: &mut [u8]) {
            self.config.lock().unwrap().read(offset, data);
        }
        fn config_write(&self, offset: usize, data: &[u8]) {
            self.config.lock().unwrap().write(offset, data);
        }
        fn decode(&self, gpa: u64, len: usize) -> Option<(usize, u64)> {
            self.config.lock().unwrap().decode(gpa, len)
        }
        fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset & 0xff).unwrap());
        }
        fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
            *self.last.lock().unwrap() = (bar, offset, data.to_vec());
        }
    }

    fn bus(devices: &[(usize, Arc<Toy>)]) -> Bus {
        let bus = Bus::new();
        for (slot, device) in devices {
            bus.put(*slot, Some(device.clone()));
        }
        bus
    }

    fn toy() -> Arc<Toy> {
        let mut config = ConfigSpace::new(IDENT);
        config.add_bar(0, 0x1000, 0xc000_0000);
        Arc::new(Toy {
            config: Mutex::new(config),
            last: Mutex::default(),
        })
    }

    fn read(bus: &Bus, slot: u32, register: u32) -> u32 {
        bus.port_write(ADDRESS_PORT, &(ENABLE | slot << 11 | register).to_le_bytes());
        let mut word = [0; 4];
        bus.port_read(DATA_PORT, &mut word);
        u32::from_le_bytes(word)
    }

    #[test]
    fn a_scan_finds_the_bridge_and_the_devices_and_nothing_else() {
        let bus = bus(&[(1, toy()), (2, toy()), (31, toy())]);
        bus.put(31, None);
        let found: Vec<u32> = (0..32).map(|slot| read(&bus, slot, 0)).collect();
        assert_eq!(found[..3], [0x0008_1b36, 0x1042_1af4, 0x1042_1af4]);
        assert!(found[3..].iter().all(|&id| id == u32::MAX));
        assert_eq!(read(&bus, 0, 8) >> 16, 0x600);
        for elsewhere in [1 << 16, 1 << 8] {
            bus.port_write(ADDRESS_PORT, &(ENABLE | elsewhere).to_le_bytes());
            let mut word = [0; 4];
            bus.port_read(DATA_PORT, &mut word);
            assert_eq!(word, [0xff; 4], "another bus or function");
        }
    }

    #[test]
    fn a_device_answers_where_the_guest_has_placed_it_once_it_is_switched_on() {
        let device = toy();
        let bus = bus(&[(1, device.clone())]);
        let mut byte = [0];
        bus.mmio_read(0xc000_0042, &mut byte);
        assert_eq!(byte, [0xff]);
        read(&bus, 1, 4);
        bus.port_write(DATA_PORT, &[2, 0]);
        bus.mmio_read(0xc000_0042, &mut byte);
        assert_eq!(byte, [0x42]);
        read(&bus, 1, 0x10);
        bus.port_write(DATA_PORT, &0xd123_4000u32.to_le_bytes());
        bus.mmio_write(0xd123_4010, &[1, 2]);
        assert_eq!(*device.last.lock().unwrap(), (0, 0x10, vec![1, 2]));
    }

    #[test]
    fn a_saved_bus_comes_back() {
        let bus = Bus::new();
        read(&bus, 0, 4);
        bus.port_write(DATA_PORT, &[2]);
        let other = Bus::new();
        other.restore(&bus.save()).unwrap();
        assert_eq!(other.save(), bus.save());
    }

    proptest! {
        #[test]
        fn any_access_of_any_width_is_answered(
            accesses in proptest::collection::vec((any::<bool>(), ADDRESS_PORT..=DATA_PORT + 3, proptest::collection::vec(any::<u8>(), 0..9), any::<u64>()), 1..60),
        ) {
            let bus = bus(&[(1, toy()), (31, toy())]);
            for (write, port, mut bytes, gpa) in accesses {
                if write {
                    bus.port_write(port, &bytes);
                    bus.mmio_write(gpa, &bytes);
                } else {
                    bus.port_read(port, &mut bytes);
                    bus.mmio_read(gpa, &mut bytes);
                }
            }
            prop_assert_eq!(read(&bus, 0, 0), 0x0008_1b36);
        }
    }
}
