//! A balloon (5.5): memory that the guest gives up as its host wishes, and memory that it says is free.
//!
//! | queue | holds | its pages |
//! | --- | --- | --- |
//! | 0, inflate | numbers of pages of 4 KiB, 32 bits each | become holes |
//! | 1, deflate | the same | stay holes; whoever touches one has a page of zeroes |
//! | 2, 3, 4 | free pages themselves, as buffers to be written | become holes |
//!
//! Reports are the standard's queue 4. Queues 2 and 3 are of statistics and hints, which are not offered; where a feature is missing the
//! standard leaves its queue's number out, and Linux counts on without a gap. So reports may come by any of the three.
//!
//! What the driver says of its balloon (`actual`) is its word alone: nothing here relies on it. Nothing is kept of which pages are in the
//! balloon either: one that is given up twice, or given back and never was given up, changes nothing.

use std::sync::{Mutex, MutexGuard};

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::Device;
use super::buffers::Cursor;
use super::queue::{Broken, Chain, total};
use crate::devices::complaints::complain;
use crate::devices::gate::Begun;
use crate::devices::saved::{SavedBalloon, SavedDevice};
use crate::memory::{Mapped, PAGE};
use crate::reclaim::{give_back, runs};

const ID: u16 = 5;
/// Linux reports only by a queue of at least 32 (`PAGE_REPORTING_CAPACITY`).
const QUEUES: [u16; 5] = [128; 5];
const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// The driver may use pages of the balloon where it has no other memory left, without asking.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// The driver says which pages are free.
const F_REPORTING: u64 = 1 << 5;

/// Numbers of pages in one request, 64 MiB of pages. What a migration waits for is bounded by it.
const NUMBERS_MAX: usize = 1 << 14;
const NUMBER_BYTES: usize = 4;
/// Of one report so much is given back at most, and the rest stays the guest's: 4 GiB take about half a second where they are of small pages.
const REPORT_BYTES_MAX: u64 = 4 << 30;
/// Where `actual` stands in the configuration, after the target.
const ACTUAL: usize = 4;
const CONFIG_BYTES: usize = 8;

/// What the balloon is to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Pages.
    pub pages: u32,
    /// The wish that this is of: a later one has a higher number.
    pub revision: u64,
}

/// What the balloon is to hold and what its driver says that it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Level {
    /// To hold.
    pub target: Target,
    /// Pages, says the driver.
    pub actual: u32,
}

/// The device.
pub struct Balloon {
    level: Mutex<Level>,
    /// Pages of the VM's memory.
    pages: u64,
}

impl Balloon {
    /// The balloon of a VM with so many pages.
    pub fn new(target: Target, pages: u64) -> Self {
        let level = Level { target, actual: 0 };
        Self {
            level: Mutex::new(level),
            pages,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Level> {
        self.level.lock().expect("no holder of a balloon's lock panics")
    }

    /// How it stands.
    pub fn level(&self) -> Level {
        *self.lock()
    }

    /// Takes another target. False: it is an earlier one's turn no more.
    pub fn set_target(&self, target: Target) -> bool {
        let mut level = self.lock();
        let takes = target.revision >= level.target.revision;
        if takes {
            level.target = target;
        }
        takes
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let Level { target, actual } = *self.lock();
        let mut config = [0; CONFIG_BYTES];
        config[..ACTUAL].copy_from_slice(&target.pages.to_le_bytes());
        config[ACTUAL..].copy_from_slice(&actual.to_le_bytes());
        config
    }
}

/// The numbers in a request of the driver's, each of a page that there is.
fn numbers(chain: &Chain, memory: &Mapped) -> Result<Vec<u32>, Broken> {
    let bytes = total(&chain.readable);
    let len = usize::try_from(bytes).unwrap_or(usize::MAX);
    if !chain.writable.is_empty() || !len.is_multiple_of(NUMBER_BYTES) || len > NUMBERS_MAX * NUMBER_BYTES {
        return Err(Broken(format!(
            "{bytes} bytes of page numbers, and {} to be written: at most {NUMBERS_MAX} numbers of {NUMBER_BYTES} bytes to be read are due",
            total(&chain.writable)
        )));
    }
    let mut read = vec![0; len];
    Cursor::new(memory, &chain.readable).read(&mut read)?;
    let number = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let numbers: Vec<u32> = read.chunks_exact(NUMBER_BYTES).map(number).collect();
    let is_there = |number: u32| memory.address_in_range(GuestAddress(u64::from(number) * PAGE));
    match numbers.iter().find(|&&number| !is_there(number)) {
        Some(number) => Err(Broken(format!("page {number:#x} is no guest memory"))),
        None => Ok(numbers),
    }
}

/// That a page cannot be given back is its host's loss and no mistake of the driver's.
fn give_back_or_say_why(memory: &Mapped, gpa: u64, len: u64) {
    if let Err(error) = give_back(memory, gpa, len) {
        complain(|| {
            format!("{len} bytes of memory at {gpa:#x} that the guest gave up cannot be had: {error}")
        });
    }
}

fn inflate(chain: &Chain, memory: &Mapped) -> Result<(), Broken> {
    for run in runs(numbers(chain, memory)?) {
        give_back_or_say_why(memory, run.gpa, run.len);
    }
    Ok(())
}

fn report(chain: &Chain, memory: &Mapped) -> Result<(), Broken> {
    if !chain.readable.is_empty() {
        return Err(Broken("free pages in a buffer that is to be read".to_owned()));
    }
    let mut left = REPORT_BYTES_MAX;
    for buffer in &chain.writable {
        let len = u64::from(buffer.len).min(left);
        give_back_or_say_why(memory, buffer.gpa, len);
        left -= len;
    }
    Ok(())
}

impl Device for Balloon {
    fn id(&self) -> u16 {
        ID
    }

    fn class(&self) -> [u8; 3] {
        [0xff, 0, 0]
    }

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn queues(&self) -> &'static [u16] {
        &QUEUES
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.config();
        for (at, byte) in (offset..).zip(data) {
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let mut level = self.lock();
        let mut actual = level.actual.to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            if let Some(own) = at.checked_sub(ACTUAL).and_then(|at| actual.get_mut(at)) {
                *own = *byte;
            }
        }
        level.actual = u32::from_le_bytes(actual);
    }

    /// What takes pages back is served at any time, the others only while pages may be given up: see [`crate::memory::Memory::giving_up`].
    fn makes_holes(&self, queue: usize) -> bool {
        queue != DEFLATE
    }

    fn serve(
        &self,
        queue: usize,
        chain: &Chain,
        memory: &Mapped,
        features: u64,
        _begun: &Begun<'_>,
    ) -> Result<u32, Broken> {
        match queue {
            INFLATE => inflate(chain, memory)?,
            DEFLATE => drop(numbers(chain, memory)?),
            _ if features & F_REPORTING == 0 => {
                return Err(Broken("a report of free pages, which was not agreed".to_owned()));
            }
            _ => report(chain, memory)?,
        }
        Ok(0)
    }

    fn reset(&self) {
        self.lock().actual = 0;
    }

    fn save(&self) -> SavedDevice {
        let Level { target, actual } = *self.lock();
        SavedDevice::Balloon(SavedBalloon {
            target_pages: target.pages,
            revision: target.revision,
            actual_pages: actual,
        })
    }

    fn restore(&self, saved: &SavedDevice) -> Result<(), String> {
        match saved {
            SavedDevice::Balloon(saved) if u64::from(saved.target_pages) <= self.pages => {
                *self.lock() = Level {
                    target: Target {
                        pages: saved.target_pages,
                        revision: saved.revision,
                    },
                    actual: saved.actual_pages,
                };
                Ok(())
            }
            SavedDevice::Balloon(saved) => Err(format!(
                "a balloon that is to hold {} pages, of a VM with {}",
                saved.target_pages, self.pages
            )),
            other => Err(format!(
                "the saved device is {other:?}, this VM has its balloon there"
            )),
        }
    }
}
