//! Who had a disk last: a record beside it, on the same storage, that keeps out whoever comes late.
//!
//! The lock ([`super::disk`]) says who has the disk now, among those between whom its file system passes locks. It says nothing to a host
//! that was cut off and whose VM was started elsewhere, once that other VM stands still for a moment. The record does: it holds the highest
//! turn that ever took the disk, and nobody takes it with a lower one, whatever its agent tells it.
//!
//! It is written before anything runs, and on the medium before the first change of the disk: only that waits for the storage, so a hand-over
//! does not.
//!
//! A turn is which placement of all that could write to the volume this is, as the controllers count them in their log
//! (`Volume.writers`), then the run's epoch, which rises with each hand-over. Both only rise, so turns are in the order of the log.
//!
//! ```text
//!   0        8        16       24               40
//!   ┌────────┬────────┬────────┬────────────────┐
//!   │DROVERWR│ writers│  epoch │ blake3, first  │   little-endian; an empty file: nobody yet
//!   └────────┴────────┴────────┴────────────────┘
//! ```

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use drover_proto::{Code, Fault};
use rustix::fs::{FlockOperation, flock};

use super::disk::{lock, unusable};
use crate::sandbox;

const MAGIC: &[u8; 8] = b"DROVERWR";
const RECORD: usize = 40;
const DIGESTED: usize = 24;

/// Whose turn it is to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Turn {
    /// How often a VM that may write to the volume had been placed, or given it.
    pub writers: u64,
    /// The run's epoch.
    pub epoch: u64,
}

impl Turn {
    fn encode(self) -> [u8; RECORD] {
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(MAGIC);
        record[8..16].copy_from_slice(&self.writers.to_le_bytes());
        record[16..DIGESTED].copy_from_slice(&self.epoch.to_le_bytes());
        let digest = blake3::hash(&record[..DIGESTED]);
        record[DIGESTED..].copy_from_slice(&digest.as_bytes()[..RECORD - DIGESTED]);
        record
    }

    /// `None` where the bytes are no record.
    fn decode(record: &[u8]) -> Option<Self> {
        let number = |at: usize| {
            let bytes = record.get(at..at + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        let turn = Self {
            writers: number(8)?,
            epoch: number(16)?,
        };
        (turn.encode() == record).then_some(turn)
    }
}

/// A disk's record, and this run's turn.
#[derive(Debug)]
pub struct Fence {
    path: PathBuf,
    file: File,
    turn: Turn,
    /// It was written, and may not be on the medium yet.
    unsettled: AtomicBool,
}

impl Fence {
    /// Opens the record, which is there, if empty.
    pub fn open(path: &Path, turn: Turn) -> Result<Self, Fault> {
        let file = sandbox::open_file(path, false);
        let file = file.map_err(|error| unusable(path, &error.to_string()))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            turn,
            unsettled: AtomicBool::new(false),
        })
    }

    fn last(&self) -> io::Result<Option<Turn>> {
        let mut record = [0; RECORD + 1];
        let mut read = 0;
        while read < record.len() {
            match self.file.read_at(&mut record[read..], read as u64)? {
                0 => break,
                more => read += more,
            }
        }
        let turn = Turn::decode(&record[..read]);
        if read > 0 && turn.is_none() {
            let what = format!("holds {read} bytes that are no record of who had the disk last");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Ok(turn)
    }

    fn note(&self) -> Result<(), Fault> {
        let failed = |error: io::Error| unusable(&self.path, &error.to_string());
        let last = self.last().map_err(failed)?;
        if let Some(last) = last.filter(|last| *last > self.turn) {
            let Turn { writers, epoch } = self.turn;
            let message = format!(
                "{}: a later run has taken the disk (placement {}, epoch {}; this is placement {writers}, epoch {epoch})",
                self.path.display(),
                last.writers,
                last.epoch
            );
            return Err(Fault::new(Code::StaleEpoch, message).field("disks"));
        }
        if last == Some(self.turn) {
            return Ok(());
        }
        self.unsettled.store(true, Ordering::SeqCst);
        self.file.write_all_at(&self.turn.encode(), 0).map_err(failed)
    }

    /// The disk is about to change: the record is on the medium when this returns.
    pub fn settle(&self) -> io::Result<()> {
        if self.unsettled.load(Ordering::SeqCst) {
            self.file.sync_data()?;
            self.unsettled.store(false, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Takes the turn: from now on no earlier one is.
    ///
    /// # Errors
    /// `stale_epoch`: a later one was taken. `disk_unusable`: the record cannot be read or written.
    pub fn take(&self) -> Result<(), Fault> {
        // The lock of the record, not the disk's: of a volume with a restored content that is another file.
        lock(&self.file, FlockOperation::NonBlockingLockExclusive, &self.path)?;
        let noted = self.note();
        if let Err(error) = flock(self.file.as_fd(), FlockOperation::Unlock) {
            tracing::error!(%error, path = %self.path.display(), "a record's lock cannot be given back");
        }
        noted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(writers: u64, epoch: u64) -> Turn {
        Turn { writers, epoch }
    }

    fn record(dir: &tempfile::TempDir) -> PathBuf {
        let path = dir.path().join("writer");
        File::create(&path).unwrap();
        path
    }

    fn taken(path: &Path, turn: Turn) -> Result<(), Fault> {
        Fence::open(path, turn).unwrap().take()
    }

    #[test]
    fn turns_are_taken_in_their_order_and_never_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = record(&dir);
        let early = Fence::open(&path, turn(1, 7)).unwrap();
        early.take().unwrap();
        early.take().unwrap();
        early.settle().unwrap();
        // A hand-over, another start, and another VM whose epochs are its own.
        for later in [turn(1, 8), turn(2, 9), turn(3, 1)] {
            taken(&path, later).unwrap();
            let fault = early.take().unwrap_err();
            assert_eq!((fault.code, fault.field.as_str()), (Code::StaleEpoch, "disks"));
            assert!(fault.message.contains("placement 1, epoch 7"), "{fault}");
        }
        assert_eq!(taken(&path, turn(2, 9)).unwrap_err().code, Code::StaleEpoch);
        taken(&path, turn(3, 1)).unwrap();
    }

    #[test]
    fn what_is_no_record_is_refused_and_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = record(&dir);
        let whole = turn(4, 4).encode();
        let mut flipped = whole;
        flipped[9] ^= 1;
        for bad in [
            &whole[..39],
            &flipped,
            &[&whole[..], b"x"].concat(),
            b"somebody's",
        ] {
            std::fs::write(&path, bad).unwrap();
            let fault = taken(&path, turn(9, 9)).unwrap_err();
            assert_eq!(fault.code, Code::DiskUnusable, "{fault}");
            assert_eq!(std::fs::read(&path).unwrap(), bad);
        }
        std::fs::write(&path, whole).unwrap();
        taken(&path, turn(9, 9)).unwrap();
    }
}
