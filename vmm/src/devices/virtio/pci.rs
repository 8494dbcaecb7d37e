//! A virtio device on the PCI bus (4.1): its configuration space, one region of registers, its interrupts and doorbells.
//!
//! ```text
//!   region 0   0x0000  common registers: transport     0x3000  doorbells, one a queue
//!              0x1000  interrupt status                0x4000  MSI-X table
//!              0x2000  the device's configuration      0x5000  MSI-X pending bits
//! ```
//!
//! All registers are under one lock, held for moments: the worker takes it to take a chain and to give it back, not while it serves.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::warn;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Broken, Chain, Queue, Room};
use super::transport::{self, Transport};
use super::{Device, F_INDIRECT, Inlet, NO_VECTOR};
use crate::devices::complaints::complain;
use crate::devices::gate::IoGate;
use crate::devices::pci::PciDevice;
use crate::devices::pci::config::{ConfigSpace, Ident};
use crate::devices::pci::msix::{self, Msix};
use crate::devices::saved::{SavedRegisters, SavedVirtio};
use crate::devices::wires::{DOORBELL_STRIDE, Wires};
use crate::fd;
use crate::memory::{Mapped, Memory};

/// Bytes of a device's one region.
pub const REGION_BYTES: u32 = 0x8000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DOORBELLS: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const PAGE: u64 = 0x1000;
const BAR: u8 = 0;

/// The standard's vendor; its devices are numbered from this one on (4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
/// A device without the drafts' interface (4.1.2.2).
const REVISION: u8 = 1;

/// Capability of a vendor's own, and what it points to (4.1.4).
const VENDOR_CAPABILITY: u8 = 9;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
const CAPABILITY_BYTES: u8 = 16;
/// Of the capability that accesses the region through the configuration space: where bar, offset, length and data stand in it.
const WINDOW_BAR: usize = 4;
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

struct Inner {
    config: ConfigSpace,
    msix: Msix,
    transport: Transport,
    /// A chain was taken and not given back.
    under_way: bool,
    /// The queue that is looked at first, so that none starves the others.
    turn: usize,
}

/// What came of looking for work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A chain was served.
    Done,
    /// There is none, or none may be served now.
    Nothing,
    /// There is none, but chains wait for what comes from outside.
    Dry,
}

/// A virtio device on the bus.
pub struct VirtioPci {
    inner: Mutex<Inner>,
    device: Arc<dyn Device>,
    memory: Arc<Memory>,
    gate: Arc<IoGate>,
    wires: Box<dyn Wires>,
    bell: EventFd,
    leaves: AtomicBool,
    /// Where its capabilities for MSI-X and for access through the configuration space stand.
    msix_at: usize,
    window_at: usize,
}

/// MSI-X vectors of a device: one for its configuration and one a queue.
pub fn vectors(device: &dyn Device) -> usize {
    1 + device.queues().len()
}

fn capability(kind: u8, offset: u64, len: u64, more: &[u8]) -> Vec<u8> {
    let total = CAPABILITY_BYTES + u8::try_from(more.len()).expect("a few bytes");
    let mut body = vec![total, kind, BAR, 0, 0, 0];
    for value in [offset, len] {
        body.extend(u32::try_from(value).expect("within the region").to_le_bytes());
    }
    body.extend(more);
    body
}

/// Chains that hold what came from outside, if both are there.
fn fill(
    inlet: &dyn Inlet,
    queue: &mut Queue,
    features: u64,
    memory: &Mapped,
    dry: &mut bool,
) -> Result<Option<Chain>, Broken> {
    if queue.ahead(memory)? == 0 {
        return Ok(None);
    }
    let Some(incoming) = inlet.next(features) else {
        *dry = true;
        return Ok(None);
    };
    match queue.pop_room(memory, incoming.bytes, incoming.several)? {
        Room::Enough(chain) => Ok(Some(chain)),
        Room::NotYet => Ok(None),
        Room::Never => {
            inlet.refuse();
            *dry = true;
            Ok(None)
        }
    }
}

impl VirtioPci {
    /// `device`, with its region at `gpa` until the guest moves it. `bell` wakes its worker.
    pub fn new(
        device: Arc<dyn Device>,
        gpa: u32,
        memory: Arc<Memory>,
        gate: Arc<IoGate>,
        wires: Box<dyn Wires>,
        bell: EventFd,
    ) -> Self {
        let mut config = ConfigSpace::new(Ident {
            id: (VENDOR, DEVICE_BASE + device.id()),
            class: device.class(),
            revision: REVISION,
            subsystem: (VENDOR, DEVICE_BASE),
        });
        config.add_bar(usize::from(BAR), REGION_BYTES, gpa);
        let count = vectors(&*device);
        let msix = Msix::new(count);
        let [table, pending] = [TABLE, PENDING].map(|at| u32::try_from(at).expect("within the region"));
        let (body, writable) = msix.capability(BAR, table, pending);
        let msix_at = config.add_capability(msix::CAPABILITY, &body, &writable);
        let stride = u32::try_from(DOORBELL_STRIDE).expect("a few bytes").to_le_bytes();
        for (kind, offset, len, more) in [
            (CFG_COMMON, 0, transport::BYTES as u64, &[] as &[u8]),
            (CFG_ISR, ISR, 1, &[]),
            (CFG_DEVICE, DEVICE, PAGE, &[]),
            (CFG_NOTIFY, DOORBELLS, PAGE, &stride),
        ] {
            config.add_capability(VENDOR_CAPABILITY, &capability(kind, offset, len, more), &[]);
        }
        let mut writable = [0xff; 18];
        writable[..2].fill(0);
        writable[3..6].fill(0);
        let window_at =
            config.add_capability(VENDOR_CAPABILITY, &capability(CFG_PCI, 0, 0, &[0; 4]), &writable);
        let vectors = u16::try_from(count).expect("a device has few queues");
        let transport = Transport::new(device.features() | F_INDIRECT, device.queues(), vectors);
        Self {
            inner: Mutex::new(Inner {
                config,
                msix,
                transport,
                under_way: false,
                turn: 0,
            }),
            device,
            memory,
            gate,
            wires,
            bell,
            leaves: AtomicBool::new(false),
            msix_at,
            window_at,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of a device's lock panics")
    }

    /// Waits for the bell, and where chains wait for what comes from outside, for that too.
    pub(super) fn wait(&self, left: Work) -> std::io::Result<()> {
        if left == Work::Dry
            && let Some(inlet) = self.device.inlet()
        {
            let mut fds = [
                PollFd::new(fd::lend(&self.bell), PollFlags::POLLIN),
                PollFd::new(inlet.source(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) if fds[0].any().unwrap_or(true) => {}
                Ok(_) | Err(Errno::EINTR) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        self.bell.read().map(drop)
    }

    /// When it may work.
    pub(super) fn gate(&self) -> &IoGate {
        &self.gate
    }

    /// Whether it is off the bus for good.
    pub(super) fn leaves(&self) -> bool {
        self.leaves.load(Ordering::SeqCst)
    }

    /// It is off the bus for good: its doorbells are silent, and its worker ends with the request that it has begun.
    pub fn leave(&self) {
        self.leaves.store(true, Ordering::SeqCst);
        self.wires.place_doorbells(None);
        self.ring();
    }

    fn ring(&self) {
        if let Err(error) = self.bell.write(1) {
            warn!(%error, "a device's worker cannot be woken");
        }
    }

    fn raise(&self, inner: &mut Inner, vector: u16) {
        if vector != NO_VECTOR
            && inner.msix.raise(usize::from(vector))
            && let Some(message) = inner.msix.message(usize::from(vector))
        {
            self.wires.send(usize::from(vector), message);
        }
    }

    fn broke(&self, inner: &mut Inner, broken: &Broken) {
        complain(|| {
            format!(
                "the guest's driver of its device of kind {}: {}",
                self.device.id(),
                broken.0
            )
        });
        if let Some(vector) = inner.transport.break_down() {
            self.raise(inner, vector);
        }
    }

    /// Serves one chain, if there is one and it may be served now.
    pub fn step(&self) -> bool {
        self.work() == Work::Done
    }

    /// Serves one chain, if there is one and it may be served now, and says what is left to wait for.
    pub fn work(&self) -> Work {
        if self.leaves() {
            return Work::Nothing;
        }
        let Some(begun) = self.gate.begin() else {
            return Work::Nothing;
        };
        let mut dry = false;
        let giving_up = self.makes_holes().then(|| self.memory.giving_up()).flatten();
        let taken = self.take(&mut self.inner(), giving_up.is_some(), &mut dry);
        let Some((queue, chain, features)) = taken else {
            return if dry { Work::Dry } else { Work::Nothing };
        };
        let served = self
            .device
            .serve(queue, &chain, self.memory.mapped(), features, &begun);
        drop(giving_up);
        let mut inner = self.inner();
        inner.under_way = false;
        if inner.transport.resetting {
            inner.transport.reset();
            self.device.reset();
            return Work::Done;
        }
        let given = served
            .and_then(|written| inner.transport.queues[queue].push(self.memory.mapped(), &chain, written));
        if given.is_ok() {
            self.device.pushed(queue);
        }
        match given {
            Ok(true) => {
                let vector = inner.transport.used(queue);
                self.raise(&mut inner, vector);
            }
            Ok(false) => {}
            Err(broken) => self.broke(&mut inner, &broken),
        }
        Work::Done
    }

    fn makes_holes(&self) -> bool {
        (0..self.device.queues().len()).any(|queue| self.device.makes_holes(queue))
    }

    /// The next chain to serve; without `giving_up` none that makes pages holes. `dry`: there would be one if something came from outside.
    fn take(&self, inner: &mut Inner, giving_up: bool, dry: &mut bool) -> Option<(usize, Chain, u64)> {
        if !inner.transport.works() || !inner.config.is_master() {
            return None;
        }
        let count = inner.transport.queues.len();
        for index in (0..count).map(|ahead| (inner.turn + ahead) % count) {
            let queue = &mut inner.transport.queues[index];
            if !queue.enabled || (!giving_up && self.device.makes_holes(index)) {
                continue;
            }
            let features = inner.transport.accepted;
            let taken = match self.device.inlet().filter(|inlet| inlet.queue() == index) {
                None => queue.pop(self.memory.mapped()),
                Some(inlet) => fill(inlet, queue, features, self.memory.mapped(), dry),
            };
            match taken {
                Ok(None) => {}
                Ok(Some(chain)) => {
                    inner.under_way = true;
                    inner.turn = (index + 1) % count;
                    return Some((index, chain, features));
                }
                Err(broken) => {
                    self.broke(inner, &broken);
                    return None;
                }
            }
        }
        None
    }

    fn region_read(&self, inner: &mut Inner, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = offset % PAGE;
        let at = usize::try_from(within).expect("within a page");
        match offset - within {
            0 => inner.transport.read(at, data),
            ISR if within == 0 => {
                if let Some(byte) = data.first_mut() {
                    *byte = inner.transport.take_isr();
                }
            }
            DEVICE => self.device.read_config(at, data),
            TABLE => inner.msix.read_table(within, data),
            PENDING => inner.msix.read_pending(within, data),
            _ => {}
        }
    }

    fn region_write(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        let within = offset % PAGE;
        match offset - within {
            0 => {
                let at = usize::try_from(within).expect("within a page");
                let busy = inner.under_way;
                if let Err(broken) = inner.transport.write(at, data, busy, self.memory.mapped()) {
                    self.broke(inner, &broken);
                }
                if inner.transport.status == 0 {
                    self.device.reset();
                }
                // A queue that was filled before the driver said that it is ready.
                self.ring();
            }
            DEVICE => self
                .device
                .write_config(usize::try_from(within).expect("within a page"), data),
            DOORBELLS => self.ring(),
            TABLE => {
                inner.msix.write_table(within, data);
                self.send_due(inner);
            }
            _ => {}
        }
    }

    fn send_due(&self, inner: &mut Inner) {
        for vector in inner.msix.take_due() {
            if let Some(message) = inner.msix.message(vector) {
                self.wires.send(vector, message);
            }
        }
    }

    /// What follows from a change of the configuration space.
    fn follow_config(&self, inner: &mut Inner) {
        let control = inner.config.word(self.msix_at) >> 16;
        inner.msix.set_control((control & 0xffff) as u16);
        self.send_due(inner);
        let region = inner.config.bar(usize::from(BAR)).filter(|_| !self.leaves());
        self.wires.place_doorbells(region.map(|gpa| gpa + DOORBELLS));
    }

    /// The access that the window in the configuration space asks for (4.1.4.9): where in the region, and how many bytes.
    fn window(&self, inner: &Inner) -> Option<(u64, usize)> {
        let bar = inner.config.word(self.window_at + WINDOW_BAR) & 0xff;
        let offset = u64::from(inner.config.word(self.window_at + WINDOW_OFFSET));
        let len = inner.config.word(self.window_at + WINDOW_LENGTH);
        let fits = bar == u32::from(BAR)
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(u64::from(len))
            && offset + u64::from(len) <= u64::from(REGION_BYTES);
        fits.then_some((offset, len as usize))
    }

    fn touches_window(&self, offset: usize, len: usize) -> bool {
        let at = self.window_at + WINDOW_DATA;
        offset < at + 4 && offset + len > at
    }

    /// The features that a driver has accepted that is ready.
    pub fn accepted(&self) -> Option<u64> {
        let inner = self.inner();
        inner.transport.works().then_some(inner.transport.accepted)
    }

    /// Whether it has a driver that is ready. Waits for nobody: who holds the registers at the moment may be waiting for a page of memory.
    pub fn has_driver(&self) -> bool {
        match self.inner.try_lock() {
            Ok(inner) => inner.transport.works(),
            Err(TryLockError::WouldBlock) => true,
            Err(TryLockError::Poisoned(_)) => panic!("no holder of a device's lock panics"),
        }
    }

    /// Tells the driver that the device's configuration is another now.
    pub fn config_changed(&self) {
        let mut inner = self.inner();
        if let Some(vector) = inner.transport.config_changed() {
            self.raise(&mut inner, vector);
        }
    }

    /// Its state. A request that is under way is not part of it: the gate is drained before a state is saved to go on from.
    pub fn save(&self) -> SavedVirtio {
        let inner = self.inner();
        let (msix_table, msix_pending) = inner.msix.save();
        SavedVirtio {
            config: inner.config.save(),
            msix_table,
            msix_pending,
            registers: SavedRegisters::of(&inner.transport),
            device: self.device.save(),
        }
    }

    /// Takes over a saved device's. On return its doorbells ring, and its driver has had an interrupt for whatever it may have missed: one
    /// too many is harmless.
    pub fn restore(&self, saved: &SavedVirtio) -> Result<(), String> {
        self.device.restore(&saved.device)?;
        let mut inner = self.inner();
        let inner = &mut *inner;
        inner.config.restore(&saved.config)?;
        let control = (inner.config.word(self.msix_at) >> 16 & 0xffff) as u16;
        inner
            .msix
            .restore(&saved.msix_table, &saved.msix_pending, control)?;
        saved.registers.put_into(&mut inner.transport)?;
        inner.transport.check(self.memory.mapped())?;
        self.follow_config(inner);
        if let Some(vector) = inner.transport.config_missed() {
            self.raise(inner, vector);
        }
        if inner.transport.works() {
            for queue in 0..inner.transport.queues.len() {
                if inner.transport.queues[queue].enabled {
                    let vector = inner.transport.used(queue);
                    self.raise(inner, vector);
                }
            }
        }
        Ok(())
    }
}

impl PciDevice for VirtioPci {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let mut inner = self.inner();
        if self.touches_window(offset, data.len())
            && let Some((at, len)) = self.window(&inner)
        {
            let mut bytes = [0; 4];
            self.region_read(&mut inner, at, &mut bytes[..len]);
            inner.config.write(self.window_at + WINDOW_DATA, &bytes);
        }
        inner.config.read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let mut inner = self.inner();
        inner.config.write(offset, data);
        if self.touches_window(offset, data.len())
            && let Some((at, len)) = self.window(&inner)
        {
            let mut bytes = [0; 4];
            inner.config.read(self.window_at + WINDOW_DATA, &mut bytes);
            self.region_write(&mut inner, at, &bytes[..len]);
        }
        self.follow_config(&mut inner);
    }

    fn decode(&self, gpa: u64, len: usize) -> Option<(usize, u64)> {
        self.inner().config.decode(gpa, len)
    }

    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        self.region_read(&mut self.inner(), offset, data);
    }

    fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
        self.region_write(&mut self.inner(), offset, data);
    }
}
