//! A disk at an instant, while its guest writes on: a block that is about to change is copied out first.
//!
//! The guest's own writes go where and when they always went: nothing of them is held back, reordered or kept elsewhere, and a flush means what it
//! meant. What the guest waits for is one read of the old block and a buffer. Where that cannot be had the snapshot fails, and the write goes on.
//!
//! Why no reflink (`FICLONE`) at the instant, which some file systems have: the kernel first writes back all of the file that is in the page cache, inside the
//! pause, so that the guest would stand as long as its disk is slow.

use std::sync::{Arc, Mutex, MutexGuard};

use drover_migration::codec::Run;
use drover_migration::vm::PageSet;
use drover_proto::{Code, Fault};

use super::format::{BLOCK_BYTES, is_zero};
use super::pipe::{Pipe, blocks};
use crate::devices::gate::IoGate;
use crate::devices::virtio::blk::SECTOR;
use crate::devices::virtio::blk::disk::{Disk, Guard};

/// Blocks of a hole that are passed over at once.
const HOLE_BLOCKS: u64 = 4096;

struct Copied {
    set: PageSet,
    next: u64,
}

/// A disk of which a snapshot is taken.
pub struct Shadow {
    disk: Arc<Disk>,
    bytes: u64,
    sheet: usize,
    pipe: Arc<Pipe>,
    gate: Arc<IoGate>,
    /// Held while a block is read: so nobody changes one that is being read.
    copied: Mutex<Copied>,
}

impl Shadow {
    /// Of `disk`, into sheet `sheet`. From the instant on it is to be the disk's guard.
    pub fn new(disk: Arc<Disk>, sheet: usize, pipe: Arc<Pipe>, gate: Arc<IoGate>) -> Self {
        let bytes = disk.sectors() * SECTOR;
        Self {
            disk,
            bytes,
            sheet,
            pipe,
            gate,
            copied: Mutex::new(Copied {
                set: PageSet::empty(blocks(bytes)),
                next: 0,
            }),
        }
    }

    /// The disk's size at the instant, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    fn copied(&self) -> MutexGuard<'_, Copied> {
        self.copied.lock().expect("no holder of this lock panics")
    }

    fn length(&self, block: u64) -> u64 {
        BLOCK_BYTES.min(self.bytes - block * BLOCK_BYTES)
    }

    fn copy(&self, copied: &mut Copied, block: u64, mut buffer: Vec<u8>) -> Result<(), Fault> {
        let length = usize::try_from(self.length(block)).expect("a block fits");
        buffer.resize(length, 0);
        self.disk
            .read_at(&mut buffer, block * BLOCK_BYTES)
            .map_err(|error| {
                let message = format!("disk {}: {error}", self.disk.path().display());
                Fault::new(Code::SnapshotFailed, message)
            })?;
        copied.set.insert(Run {
            first: block,
            count: 1,
        });
        if is_zero(&buffer) {
            self.pipe.skipped(buffer.len() as u64);
            self.pipe.give_back(buffer);
        } else {
            self.pipe.push(self.sheet, block, buffer);
        }
        Ok(())
    }

    /// How many blocks from `block` on, below `end`, are a hole of the file and not copied; they count as copied then.
    fn pass_hole(&self, copied: &mut Copied, block: u64, end: u64) -> u64 {
        let most = end.min(block + HOLE_BLOCKS);
        let until = block * BLOCK_BYTES + self.disk.hole_ahead(block * BLOCK_BYTES);
        let whole = if until >= self.bytes {
            blocks(self.bytes)
        } else {
            until / BLOCK_BYTES
        };
        let holes = (block..most.min(whole)).take_while(|block| !copied.set.contains(*block));
        let count = holes.count() as u64;
        copied.set.insert(Run { first: block, count });
        let passed: u64 = (block..block + count).map(|block| self.length(block)).sum();
        self.pipe.skipped(passed);
        count
    }

    /// Copies what nobody has changed so far, in order, until all is copied.
    pub fn copy_all(&self, mut pause: impl FnMut()) -> Result<(), Fault> {
        let end = blocks(self.bytes);
        loop {
            pause();
            let buffer = self.pipe.await_spare_buffer()?;
            let mut copied = self.copied();
            while copied.next < end && copied.set.contains(copied.next) {
                copied.next += 1;
            }
            let next = copied.next;
            self.pipe.passed(self.sheet, next);
            if next == end {
                self.pipe.give_back(buffer);
                return Ok(());
            }
            if self.pass_hole(&mut copied, next, end) > 0 {
                self.pipe.give_back(buffer);
            } else {
                self.copy(&mut copied, next, buffer)?;
            }
        }
    }

    fn copy_before(&self, at: u64, len: u64) -> Result<(), Fault> {
        let end = blocks(at.saturating_add(len).min(self.bytes));
        let until = Pipe::patience(self.gate.left());
        let mut copied = self.copied();
        let mut block = at / BLOCK_BYTES;
        while block < end {
            if copied.set.contains(block) {
                block += 1;
                continue;
            }
            let holes = self.pass_hole(&mut copied, block, end);
            if holes == 0 {
                let buffer = self.pipe.buffer_until(until)?;
                self.copy(&mut copied, block, buffer)?;
            }
            block += holes.max(1);
        }
        Ok(())
    }
}

impl Guard for Shadow {
    fn before_change(&self, at: u64, len: u64) {
        if let Err(fault) = self.copy_before(at, len) {
            self.pipe.fail(fault);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::pipe::BUFFERS;
    use crate::snapshot::sheet::Sheet;
    use crate::time::boottime_ns;

    #[derive(Clone, Debug)]
    enum Change {
        Write { at: u64, len: usize, byte: u8 },
        Discard { at: u64, len: u64 },
        Zero { at: u64, len: u64, unmap: bool },
    }

    /// Not whole blocks.
    const SECTORS: u64 = 5 * BLOCK_BYTES / SECTOR + 3;

    fn change() -> impl Strategy<Value = Change> {
        let place = (0..SECTORS).prop_flat_map(|at| (Just(at * SECTOR), 1..=SECTORS - at));
        prop_oneof![
            (place.clone(), any::<u8>()).prop_map(|((at, sectors), byte)| Change::Write {
                at,
                len: (sectors * SECTOR) as usize,
                byte
            }),
            place.clone().prop_map(|(at, sectors)| Change::Discard {
                at,
                len: sectors * SECTOR
            }),
            (place, any::<bool>()).prop_map(|((at, sectors), unmap)| Change::Zero {
                at,
                len: sectors * SECTOR,
                unmap
            }),
        ]
    }

    fn apply(disk: &Disk, change: &Change) {
        match *change {
            Change::Write { at, len, byte } => disk.write_at(&vec![byte; len], at).unwrap(),
            Change::Discard { at, len } => disk.discard(at, len).unwrap(),
            Change::Zero { at, len, unmap } => disk.write_zeroes(at, len, unmap).unwrap(),
        }
    }

    fn gate() -> Arc<IoGate> {
        let gate = Arc::new(IoGate::default());
        gate.open(u64::MAX).unwrap();
        gate
    }

    fn disk(path: &Path) -> Arc<Disk> {
        std::fs::File::create(path)
            .unwrap()
            .set_len(SECTORS * SECTOR)
            .unwrap();
        Arc::new(Disk::open(path, false, "").unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_changes_after_the_instant_the_file_has_what_was_there_and_the_disk_what_is(
            before in proptest::collection::vec(change(), 0..4),
            early in proptest::collection::vec(change(), 0..4),
            late in proptest::collection::vec(change(), 0..4),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (path, twin) = (dir.path().join("disk"), dir.path().join("twin"));
            let (disk, twin_disk) = (disk(&path), disk(&twin));
            before.iter().for_each(|change| apply(&disk, change));
            let then = std::fs::read(&path).unwrap();
            let pipe = Arc::new(Pipe::new().unwrap());
            let mut sheets = [Sheet::create(dir.path(), "copy", SECTORS * SECTOR).unwrap()];
            let shadow = Arc::new(Shadow::new(disk.clone(), 0, pipe.clone(), gate()));
            disk.guard(Some(shadow.clone()));
            early.iter().for_each(|change| apply(&disk, change));
            std::thread::scope(|scope| {
                let files = scope.spawn(|| pipe.write(&mut sheets));
                let changes = scope.spawn(|| late.iter().for_each(|change| apply(&disk, change)));
                shadow.copy_all(|| {}).unwrap();
                changes.join().unwrap();
                pipe.close();
                files.join().unwrap();
            });
            disk.guard(None);
            prop_assert!(std::fs::read(dir.path().join("copy")).unwrap() == then);
            prop_assert_eq!(pipe.amounts().done, SECTORS * SECTOR);
            before.iter().chain(&early).chain(&late).for_each(|change| apply(&twin_disk, change));
            prop_assert!(std::fs::read(&path).unwrap() == std::fs::read(&twin).unwrap());
        }
    }

    #[test]
    fn a_snapshot_that_failed_keeps_no_write_back() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(&dir.path().join("disk"));
        disk.write_at(&[1; 512], 0).unwrap();
        let pipe = Arc::new(Pipe::new().unwrap());
        disk.guard(Some(Arc::new(Shadow::new(disk.clone(), 0, pipe.clone(), gate()))));
        pipe.fail(Fault::new(Code::Cancelled, "cancelled"));
        disk.write_at(&[2; 512], 0).unwrap();
        let mut back = [0; 512];
        disk.read_at(&mut back, 0).unwrap();
        assert_eq!(back, [2; 512]);
    }

    #[test]
    fn a_write_that_would_wait_for_the_snapshots_files_past_its_lease_goes_on_and_the_snapshot_fails() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(&dir.path().join("disk"));
        disk.write_at(&[1; 512], 0).unwrap();
        let pipe = Arc::new(Pipe::new().unwrap());
        // The files take nothing: every buffer is away.
        let away: Vec<_> = (0..BUFFERS).map(|_| pipe.buffer().unwrap()).collect();
        let gate = Arc::new(IoGate::default());
        gate.open(boottime_ns()).unwrap();
        disk.guard(Some(Arc::new(Shadow::new(disk.clone(), 0, pipe.clone(), gate))));
        disk.write_at(&[2; 512], 0).unwrap();
        let mut back = [0; 512];
        disk.read_at(&mut back, 0).unwrap();
        assert_eq!((back, away.len()), ([2; 512], BUFFERS));
        assert_eq!(pipe.check().unwrap_err().code, Code::SnapshotFailed);
    }
}
