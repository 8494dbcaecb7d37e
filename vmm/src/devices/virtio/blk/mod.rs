//! A disk (5.2) on a raw file or a block device.
//!
//! | file | what |
//! | --- | --- |
//! | `mod.rs` | the device: what it offers, its configuration |
//! | `request.rs` | one request: parsed, checked against the disk's bounds, carried out, answered |
//! | `disk.rs` | the file: reads, writes, flushes, holes, the lock |
//!
//! Requests are carried out one after the other by the device's worker. What the guest was told is written is in the host's page cache; what
//! it was told is flushed is on the medium. A driver that does not know flushes has each write on the medium before it is told.

pub mod disk;
pub mod fence;
mod request;

use self::disk::Disk;
use super::Device;
use super::queue::{Broken, Chain, QUEUE_SIZE_MAX};
use crate::devices::gate::Begun;
use crate::devices::saved::{SavedBlk, SavedDevice};
use crate::memory::Mapped;

/// Bytes of a sector, in which everything is counted.
pub const SECTOR: u64 = 512;
/// Longest serial number (5.2.6).
pub const SERIAL_BYTES: usize = 20;

const ID: u16 = 2;
const QUEUES: [u16; 1] = [QUEUE_SIZE_MAX];

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Largest buffer and most buffers of a request's data. A request's time is bounded by them: a migration waits for it.
const SEGMENT_BYTES_MAX: u32 = 128 << 10;
const SEGMENTS_MAX: u32 = 126;
/// Most bytes of a request's data.
const DATA_BYTES_MAX: u64 = SEGMENT_BYTES_MAX as u64 * SEGMENTS_MAX as u64;
/// Largest range of a discard and of zeroes, sectors: 32 MiB, since zeroes may have to be written.
const RANGE_SECTORS_MAX: u32 = 1 << 16;
/// Ranges in one discard or one request for zeroes.
const RANGES_MAX: u32 = 1;
/// Discards are of whole blocks of the host's, sectors.
const DISCARD_ALIGNMENT: u32 = 8;
const CONFIG_BYTES: usize = 60;

/// The device.
pub struct Blk {
    disk: std::sync::Arc<Disk>,
}

impl Blk {
    /// The device of `disk`.
    pub fn new(disk: std::sync::Arc<Disk>) -> Self {
        Self { disk }
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.sectors().to_le_bytes());
        for (at, word) in [
            (8, SEGMENT_BYTES_MAX),
            (12, SEGMENTS_MAX),
            (20, 512),
            (36, RANGE_SECTORS_MAX),
            (40, RANGES_MAX),
            (44, DISCARD_ALIGNMENT),
            (48, RANGE_SECTORS_MAX),
            (52, RANGES_MAX),
        ] {
            put(at, &word.to_le_bytes());
        }
        // Zeroes may be made by holes.
        put(56, &[1]);
        config
    }
}

impl Device for Blk {
    fn id(&self) -> u16 {
        ID
    }

    fn class(&self) -> [u8; 3] {
        [1, 0, 0]
    }

    fn features(&self) -> u64 {
        let all = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
        if self.disk.is_read_only() {
            all | F_RO
        } else {
            all | F_DISCARD | F_WRITE_ZEROES
        }
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

    fn serve(
        &self,
        _queue: usize,
        chain: &Chain,
        memory: &Mapped,
        features: u64,
        _begun: &Begun<'_>,
    ) -> Result<u32, Broken> {
        request::serve(&self.disk, chain, memory, features & F_FLUSH != 0)
    }

    fn save(&self) -> SavedDevice {
        SavedDevice::Blk(SavedBlk {
            sectors: self.disk.sectors(),
            read_only: self.disk.is_read_only(),
            serial: self.disk.serial().to_owned(),
        })
    }

    fn restore(&self, saved: &SavedDevice) -> Result<(), String> {
        let own = self.save();
        // The file may have grown since the guest was told of its size.
        if let (SavedDevice::Blk(saved), SavedDevice::Blk(own)) = (saved, &own)
            && (saved.read_only, &saved.serial) == (own.read_only, &own.serial)
            && saved.sectors > 0
            && self.disk.shrink_to_saved(saved.sectors)
        {
            return Ok(());
        }
        Err(format!(
            "the saved device is {saved:?}, this VM has {own:?} there"
        ))
    }
}
