//! The file that a disk is: reads, writes, flushes, holes, and the lock of whoever may run.
//!
//! The lock is `flock(2)`'s, exclusive for a disk that can be written and shared for one that cannot. It is held exactly while the VM may run
//! (see [`crate::devices::gate`]): a source gives it back when it hands over, a target takes it when it is granted its first lease. It keeps
//! two VMMs of one host apart, and of several where the file system passes locks on. Whose turn it is, which also keeps out a host that was
//! cut off, is noted beside it each time that it is taken ([`super::fence`]).

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use drover_proto::{Code, Fault};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use rustix::fs::{FlockOperation, flock};

use super::SECTOR;
use super::fence::Fence;
use crate::devices::gate::Held;
use crate::sandbox;

/// A process that was killed gives its files back one after the other: its folder's lock, by which its agent knows that it is gone, before its
/// disks'. So long is waited for the rest.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_AGAIN: Duration = Duration::from_millis(5);
/// Zeroes written at once where the file can have no holes.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Who wants to know what is about to change on a disk.
pub trait Guard: Send + Sync {
    /// `len` bytes from byte `at` on are about to change. They do when this returns, whatever came of it.
    fn before_change(&self, at: u64, len: u64);
}

#[derive(Default)]
struct Guarded(Mutex<Option<Arc<dyn Guard>>>);

impl std::fmt::Debug for Guarded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Guarded")
    }
}

/// A disk's file.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    file: File,
    sectors: AtomicU64,
    read_only: bool,
    serial: String,
    fence: Option<Fence>,
    guarded: Guarded,
}

impl Disk {
    /// Opens `path`, whose size must be whole sectors.
    pub fn open(path: &Path, read_only: bool, serial: &str) -> Result<Self, Fault> {
        let fault = |what: String| unusable(path, &what);
        let file = sandbox::open_file(path, read_only);
        let mut file = file.map_err(|error| fault(error.to_string()))?;
        let kind = file
            .metadata()
            .map_err(|error| fault(error.to_string()))?
            .file_type();
        let is_disk = kind.is_file() || std::os::unix::fs::FileTypeExt::is_block_device(&kind);
        if !is_disk {
            return Err(fault("is neither a file nor a block device".to_owned()));
        }
        // Also a block device's size.
        let bytes = file
            .seek(SeekFrom::End(0))
            .map_err(|error| fault(error.to_string()))?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(fault(format!(
                "has {bytes} bytes, must have whole sectors of {SECTOR}"
            )));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            sectors: AtomicU64::new(bytes / SECTOR),
            read_only,
            serial: serial.to_owned(),
            fence: None,
            guarded: Guarded::default(),
        })
    }

    /// Is taken only by whose turn it is.
    #[must_use]
    pub fn fenced(self, fence: Option<Fence>) -> Self {
        Self { fence, ..self }
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::SeqCst)
    }

    /// From now on `guard` is told of every change before it is made, or nobody is. No request may be under way.
    pub fn guard(&self, guard: Option<Arc<dyn Guard>>) {
        *self.guarded.0.lock().expect("no holder of this lock panics") = guard;
    }

    fn before_change(&self, at: u64, len: u64) {
        let guard = self
            .guarded
            .0
            .lock()
            .expect("no holder of this lock panics")
            .clone();
        if let Some(guard) = guard {
            guard.before_change(at, len);
        }
    }

    /// How many bytes from byte `at` on are a hole of the file; 0 where the file does not tell.
    pub fn hole_ahead(&self, at: u64) -> u64 {
        let Ok(from) = i64::try_from(at) else { return 0 };
        // Nobody reads or writes at the file's own place.
        match lseek(&self.file, from, Whence::SeekData) {
            Ok(data) => u64::try_from(data - from).unwrap_or(0),
            Err(Errno::ENXIO) => u64::MAX - at,
            Err(_) => 0,
        }
    }

    fn file_bytes(&self) -> Result<u64, Fault> {
        // Also a block device's size. Nobody reads or writes at the file's own place.
        let end = (&self.file).seek(SeekFrom::End(0));
        end.map_err(|error| unusable(&self.path, &error.to_string()))
    }

    /// It has `bytes` now, if that is more than it had. Returns whether it is.
    ///
    /// # Errors
    /// `disk_unusable`: the file has less.
    pub fn grow(&self, bytes: u64) -> Result<bool, Fault> {
        let has = self.file_bytes()?;
        if has < bytes || !bytes.is_multiple_of(SECTOR) {
            let what =
                format!("has {has} bytes, it is to be a disk of {bytes}, in whole sectors of {SECTOR}");
            return Err(unusable(&self.path, &what));
        }
        Ok(self.sectors.fetch_max(bytes / SECTOR, Ordering::SeqCst) < bytes / SECTOR)
    }

    /// It was saved with so many sectors: what its file has beyond them, the guest is told of later. False: it has fewer.
    pub fn shrink_to_saved(&self, sectors: u64) -> bool {
        self.sectors.fetch_min(sectors, Ordering::SeqCst) >= sectors
    }

    /// Whether it cannot be written.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Its serial number.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.fence.as_ref().map_or(Ok(()), Fence::settle)
    }

    /// Reads exactly `out.len()` bytes at byte `at`.
    pub fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(out, at)
    }

    /// Writes all of `data` at byte `at`.
    pub fn write_at(&self, data: &[u8], at: u64) -> io::Result<()> {
        self.check_writable()?;
        self.before_change(at, data.len() as u64);
        self.file.write_all_at(data, at)
    }

    /// Puts everything written so far on the medium.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync_data()
    }

    fn allocate(&self, mode: FallocateFlags, at: u64, len: u64) -> io::Result<bool> {
        let signed = |value: u64| i64::try_from(value).map_err(io::Error::other);
        match fallocate(
            &self.file,
            mode | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            signed(at)?,
            signed(len)?,
        ) {
            Ok(()) => Ok(true),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Forgets `len` bytes at byte `at`, if the file can.
    pub fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        self.before_change(at, len);
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, at, len)
            .map(drop)
    }

    /// Makes `len` bytes at byte `at` zero, by a hole where that is allowed and possible.
    pub fn write_zeroes(&self, at: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.check_writable()?;
        self.before_change(at, len);
        let hole = may_unmap && self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, at, len)?;
        if hole || self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, at, len)? {
            return Ok(());
        }
        let mut done = 0;
        while done < len {
            let now = usize::try_from(len - done).map_or(ZEROES.len(), |left| left.min(ZEROES.len()));
            self.file.write_all_at(&ZEROES[..now], at + done)?;
            done += now as u64;
        }
        Ok(())
    }
}

pub(super) fn unusable(path: &Path, what: &str) -> Fault {
    Fault::new(Code::DiskUnusable, format!("disk {} {what}", path.display())).field("disks")
}

/// Locks a file that others may still have for a moment.
pub(super) fn lock(file: &File, operation: FlockOperation, path: &Path) -> Result<(), Fault> {
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(file.as_fd(), operation) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(LOCK_AGAIN);
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(unusable(path, "is locked by another that runs with it"));
            }
            Err(error) => return Err(unusable(path, &format!("cannot be locked: {error}"))),
        }
    }
}

impl Held for Disk {
    fn take(&self) -> Result<(), Fault> {
        let operation = if self.read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        lock(&self.file, operation, &self.path)?;
        let taken = self.fence.as_ref().map_or(Ok(()), Fence::take);
        if taken.is_err() {
            self.release();
        }
        taken
    }

    fn sync(&self) -> Result<(), Fault> {
        self.flush()
            .map_err(|error| unusable(&self.path, &format!("cannot be flushed: {error}")))
    }

    fn release(&self) {
        if let Err(error) = flock(self.file.as_fd(), FlockOperation::Unlock) {
            tracing::error!(%error, path = %self.path.display(), "a disk's lock cannot be given back");
        }
    }
}
