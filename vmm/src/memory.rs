//! Guest memory: one shared file ([`backing`]), mapped in two regions around the 32-bit hole; a very large one in pieces.
//!
//! ```text
//!   0 ............ 3 GiB | hole: PCI, I/O APIC, local APIC | 4 GiB ............
//!   region 0              no memory                        region 1
//! ```
//!
//! Shared and in a file, so that another process can map the same pages. Every write that the VMM makes through
//! `vm-memory` marks its page in a bitmap, because KVM's dirty log knows only of what vCPUs and the kernel write.
//! A page that was never written is a hole of the file, unless a neighbour was written and both lie in one huge page: then it is zero.
//! Reading a hole through the mapping fills it, with zeroes; making a page zero again punches a hole.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use drover_migration::codec;
use drover_migration::vm::{Layout, PAGE_SIZE, PageSet, Region};
use drover_proto::{Code, Fault};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::mman::{ProtFlags, mprotect};
use nix::unistd::{Whence, lseek};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::backing;
use crate::uffd::Uffd;

/// Where the memory below 4 GiB ends and the hole begins.
pub const HOLE_START: u64 = 3 << 30;
/// Where the hole ends and the rest of the memory begins.
pub const HOLE_END: u64 = 4 << 30;

/// What is mapped, and told to KVM, in one piece at most. KVM tells which pages of a piece were written all at once: that of a large guest would take
/// tens of MiB.
const PIECE_BYTES_MAX: u64 = 64 << 30;
/// So often pages are discarded that are still there, and this long between: a huge page cannot be split for the moment in which the kernel
/// holds it, as it does one that was just written.
const DISCARD_TRIES: u32 = 20;
const DISCARD_PAUSE: Duration = Duration::from_millis(1);

/// [`PAGE_SIZE`] as an address difference.
pub const PAGE: u64 = PAGE_SIZE as u64;

/// The guest's memory as `vm-memory` sees it.
pub type Mapped = GuestMemoryMmap<AtomicBitmap>;

/// The guest's memory.
#[derive(Debug)]
pub struct Memory {
    mapped: Mapped,
    /// What is mapped, piece by piece.
    pieces: Layout,
    /// The guest's regions, which may be of several pieces.
    layout: Layout,
    bytes: u64,
    /// Whoever touches a hole waits for its page.
    watched: AtomicBool,
    /// No page is given up; held by whoever is giving some up.
    whole: RwLock<bool>,
}

/// The regions of a guest with `bytes` of memory.
pub fn layout(bytes: u64) -> Layout {
    let mut regions = vec![Region {
        gpa: 0,
        len: bytes.min(HOLE_START),
    }];
    if bytes > HOLE_START {
        regions.push(Region {
            gpa: HOLE_END,
            len: bytes - HOLE_START,
        });
    }
    regions
}

/// The same memory, cut up so that no piece is larger than `most`.
fn cut(regions: &Layout, most: u64) -> Layout {
    let pieces = |region: &Region| {
        let Region { gpa, len } = *region;
        (0..len)
            .step_by(usize::try_from(most).unwrap_or(usize::MAX))
            .map(move |from| Region {
                gpa: gpa + from,
                len: most.min(len - from),
            })
    };
    regions.iter().flat_map(pieces).collect()
}

/// Where pages `first .. first + count` lie: (piece, offset in it, length), bytes.
fn covered(pieces: &Layout, first: u64, count: u64) -> Result<Vec<(usize, u64, u64)>, Fault> {
    let total: u64 = pieces.iter().map(|region| region.len).sum();
    let end = first
        .checked_add(count)
        .and_then(|end| end.checked_mul(PAGE))
        .filter(|&end| end <= total);
    let Some(end) = end else {
        let message = format!(
            "pages {first}..+{count} lie outside the guest's {} pages",
            total / PAGE
        );
        return Err(Fault::new(Code::BadFrame, message));
    };
    let (mut start, mut base, mut found) = (first * PAGE, 0, Vec::with_capacity(1));
    for (index, region) in pieces.iter().enumerate() {
        let stop = end.min(base + region.len);
        if start < stop {
            found.push((index, start - base, stop - start));
            start = stop;
        }
        base += region.len;
    }
    Ok(found)
}

fn broken(what: &str, error: impl std::fmt::Display) -> Fault {
    Fault::new(Code::VmmStartFailed, format!("guest memory: {what}: {error}"))
}

/// A write to the file failed. One for which there is no memory is the host's lack, and no mistake.
fn unwritten(error: &io::Error, at: u64) -> Fault {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOSPC | Errno::ENOMEM) => Fault::new(
            Code::MemoryExhausted,
            format!(
                "guest memory: the host has none left for what lies at {at:#x} ({error}): free some, or move the VM to another host"
            ),
        ),
        _ => broken("write", error),
    }
}

/// What was handed over as guest memory must be a file of exactly its size that can be read and written: a shorter one would end this
/// process at the first page beyond it.
fn check_adopted(file: &File, bytes: u64) -> Result<(), Fault> {
    let refused =
        |what: String| Fault::new(Code::BadState, format!("the memory that was handed over {what}"));
    let about = file
        .metadata()
        .map_err(|error| refused(format!("cannot be looked at: {error}")))?;
    if !about.is_file() || about.len() != bytes {
        return Err(refused(format!(
            "is {} of {} bytes; a file of {bytes} is due",
            if about.is_file() { "a file" } else { "no file" },
            about.len()
        )));
    }
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|error| refused(format!("has no flags: {error}")))?;
    let mode = OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE;
    if mode != OFlag::O_RDWR {
        return Err(refused("was not opened for reading and writing".to_owned()));
    }
    Ok(())
}

impl Memory {
    /// Maps `bytes` of zeroes, a multiple of 1 MiB; `huge_pages`: in huge pages, if the host allows it.
    pub fn new(bytes: u64, huge_pages: bool) -> Result<Self, Fault> {
        assert!(
            bytes > 0 && bytes.is_multiple_of(1 << 20),
            "guest memory is whole MiB"
        );
        let file = backing::create(bytes, huge_pages)?;
        Self::of_file(&file, bytes, huge_pages)
    }

    /// Maps the memory of another VMM, `bytes` of it, for reading only: until [`Memory::open`] nothing in this process, nor KVM on its
    /// behalf, can write to it.
    pub fn adopt(file: &File, bytes: u64, huge_pages: bool) -> Result<Self, Fault> {
        check_adopted(file, bytes)?;
        let memory = Self::of_file(file, bytes, huge_pages)?;
        memory.protect(ProtFlags::PROT_READ)?;
        Ok(memory)
    }

    /// Lets adopted memory be written to.
    pub fn open(&self) -> Result<(), Fault> {
        self.protect(ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
    }

    #[allow(unsafe_code, reason = "the protection of a mapping is changed by its address")]
    fn protect(&self, to: ProtFlags) -> Result<(), Fault> {
        for region in self.mapped.iter() {
            let len = usize::try_from(region.len()).map_err(|error| broken("size", error))?;
            let start =
                NonNull::new(region.as_ptr().cast()).ok_or_else(|| broken("protect", "no mapping"))?;
            // SAFETY: the range is exactly one live mapping of this VM's, which nothing in Rust refers to: guest memory is read and
            // written through raw pointers, volatile, or by the kernel, to which a refused access is an error and not undefined.
            unsafe { mprotect(start, len, to) }.map_err(|error| broken("protect", error))?;
        }
        Ok(())
    }

    /// The file that the guest's memory is, for another VMM to adopt.
    pub fn file(&self) -> &File {
        self.region(0)
            .file_offset()
            .expect("every region is a piece of the file")
            .file()
    }

    /// Maps `file`, which is `bytes` long.
    pub fn of_file(file: &File, bytes: u64, huge_pages: bool) -> Result<Self, Fault> {
        let layout = layout(bytes);
        let pieces = cut(&layout, PIECE_BYTES_MAX);
        let mut ranges = Vec::with_capacity(pieces.len());
        let mut offset = 0;
        for region in &pieces {
            let len = usize::try_from(region.len).map_err(|error| broken("size", error))?;
            let file = file.try_clone().map_err(|error| broken("duplicate", error))?;
            ranges.push((GuestAddress(region.gpa), len, Some(FileOffset::new(file, offset))));
            offset += region.len;
        }
        let mapped = Mapped::from_ranges_with_files(&ranges).map_err(|error| broken("map", error))?;
        if huge_pages {
            mapped.iter().for_each(backing::advise);
        }
        Ok(Self {
            mapped,
            pieces,
            layout,
            bytes,
            watched: AtomicBool::new(false),
            whole: RwLock::new(false),
        })
    }

    /// The memory for reads and writes by guest address.
    pub fn mapped(&self) -> &Mapped {
        &self.mapped
    }

    /// The guest's regions, lowest first.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The pieces that are mapped, lowest first: the regions, large ones cut up.
    pub fn pieces(&self) -> &Layout {
        &self.pieces
    }

    fn covered(&self, first: u64, count: u64) -> Result<Vec<(usize, u64, u64)>, Fault> {
        covered(&self.pieces, first, count)
    }

    /// All memory, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE
    }

    /// The mapped pieces, in the order of [`Self::pieces`].
    pub fn regions(&self) -> impl Iterator<Item = &GuestRegionMmap<AtomicBitmap>> {
        self.mapped.iter()
    }

    fn region(&self, index: usize) -> &GuestRegionMmap<AtomicBitmap> {
        self.mapped.iter().nth(index).expect("every piece is mapped")
    }

    /// Copies whole pages from `first` on.
    pub fn read_pages(&self, first: u64, out: &mut [u8]) -> Result<(), Fault> {
        let mut rest = out;
        for (index, offset, len) in self.covered(first, page_count(rest.len())?)? {
            let (now, later) =
                rest.split_at_mut(usize::try_from(len).expect("a piece of a slice fits usize"));
            self.region(index)
                .read_slice(now, MemoryRegionAddress(offset))
                .map_err(|error| broken("read", error))?;
            rest = later;
        }
        Ok(())
    }

    /// As [`Self::read_pages`], through the file: a hole reads as zero and stays one.
    pub fn read_file(&self, first: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.covered(first, page_count(out.len())?)?;
        // Pages are numbered as they stand in the file.
        self.file()
            .read_exact_at(out, first * PAGE)
            .map_err(|error| broken("read", error))
    }

    /// As [`Self::read_pages`], of pages that this VMM received: one that it did not write is zero, and is not touched. That would take
    /// memory for it, or end this process where there is none.
    pub fn read_received(&self, first: u64, out: &mut [u8]) -> Result<(), Fault> {
        let count = page_count(out.len())?;
        for (page, content) in (first..first + count).zip(out.chunks_exact_mut(PAGE_SIZE)) {
            let (index, offset, _) = self.covered(page, 1)?[0];
            if run_of(self.region(index), offset, offset + PAGE).written {
                self.read_pages(page, content)?;
            } else {
                content.fill(0);
            }
        }
        Ok(())
    }

    /// Writes whole pages from `first` on. A page that the VMM never wrote is written through the file: the kernel then takes a
    /// page without clearing it first and without a fault, and where the host has no memory left that is an error, while a fault
    /// would end the process. One that is written again (hot, most likely) goes through the mapping, so that the guest finds it mapped.
    pub fn write_pages(&self, first: u64, data: &[u8]) -> Result<(), Fault> {
        let mut rest = data;
        for (index, offset, len) in self.covered(first, page_count(rest.len())?)? {
            let (region, mut at, end) = (self.region(index), offset, offset + len);
            while at < end {
                let run = run_of(region, at, end);
                let (now, later) =
                    rest.split_at(usize::try_from(run.len).expect("a piece of a slice fits usize"));
                if run.written {
                    region
                        .write_slice(now, MemoryRegionAddress(at))
                        .map_err(|error| broken("write", error))?;
                } else {
                    fill(region, at, now).map_err(|error| unwritten(&error, at))?;
                }
                (at, rest) = (at + run.len, later);
            }
        }
        Ok(())
    }

    /// How many pages from `first` on, at most `count`, were never written: a hole of the file (lseek(2), `SEEK_DATA`).
    /// Reading them through the mapping would fill it with zeroes.
    pub fn hole_ahead(&self, first: u64, count: u64) -> u64 {
        let file = self.file();
        // Pages are numbered as they stand in the file.
        let Some(at) = first.checked_mul(PAGE).and_then(|at| i64::try_from(at).ok()) else {
            return 0;
        };
        match lseek(file, at, Whence::SeekData) {
            Ok(data) => u64::try_from(data - at).map_or(0, |hole| (hole / PAGE).min(count)),
            Err(Errno::ENXIO) => count,
            Err(_) => 0,
        }
    }

    /// Makes pages read as zero and gives their memory back. Pages that the VMM never wrote are skipped, so this is meant
    /// for a guest that has not run here yet.
    pub fn zero_pages(&self, first: u64, count: u64) -> Result<(), Fault> {
        for (index, offset, len) in self.covered(first, count)? {
            let region = self.region(index);
            let mut at = offset;
            while at < offset + len {
                let run = run_of(region, at, offset + len);
                if run.written {
                    self.punch(region, at, run.len)?;
                }
                at += run.len;
            }
        }
        Ok(())
    }

    fn punch(&self, region: &GuestRegionMmap<AtomicBitmap>, offset: u64, len: u64) -> Result<(), Fault> {
        punch_hole(region, offset, len).map_err(|error| broken("punch", error))?;
        // There is no memory behind them any more: what comes next for them goes through the file again.
        let (offset, len) = (usize::try_from(offset), usize::try_from(len));
        if let (Ok(offset), Ok(len)) = (offset, len) {
            (**region).bitmap().reset_addr_range(offset, len);
        }
        Ok(())
    }

    /// Gives the memory of pages back, whoever wrote them: each is a hole afterwards.
    ///
    /// # Errors
    /// `postcopy_unavailable`: a page is still there, in a huge page that the kernel cannot split.
    pub fn discard(&self, pages: &PageSet) -> Result<(), Fault> {
        for run in pages.runs() {
            let mut tries = 0;
            while !self.discard_run(run)? {
                tries += 1;
                if tries == DISCARD_TRIES {
                    let message = format!("of pages {}..{} some cannot be discarded", run.first, run.end());
                    return Err(Fault::new(Code::PostCopyUnavailable, message));
                }
                std::thread::sleep(DISCARD_PAUSE);
            }
        }
        Ok(())
    }

    /// Whether every page of `run` is a hole now.
    fn discard_run(&self, run: codec::Run) -> Result<bool, Fault> {
        for (index, offset, len) in self.covered(run.first, run.count)? {
            self.punch(self.region(index), offset, len)?;
        }
        Ok(self.hole_ahead(run.first, run.count) >= run.count)
    }

    /// From now on whoever touches a hole waits for its page.
    pub fn watch(&self, uffd: &Uffd) -> Result<(), Fault> {
        self.watched.store(true, Ordering::SeqCst);
        self.mapped
            .iter()
            .try_for_each(|region| uffd.register(region.as_ptr() as u64, region.len()))
    }

    /// Holes read as zero again.
    pub fn unwatch(&self, uffd: &Uffd) -> Result<(), Fault> {
        self.mapped
            .iter()
            .try_for_each(|region| uffd.unregister(region.as_ptr() as u64, region.len()))?;
        self.watched.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Lets no page be given up from its return on, or again: for whoever has pages protected, or copies them behind the guest, which a hole
    /// takes no notice of. Once they may be given up again, [`crate::vm::Vm::wake_devices`].
    pub fn keep_whole(&self, keep: bool) {
        *self.whole.write().unwrap_or_else(PoisonError::into_inner) = keep;
    }

    /// Lets pages be given up as long as it is held. None: they may not be, now. Where holes are watched one that came now would be waited
    /// for, and nobody would bring its page; or all are to be kept.
    pub fn giving_up(&self) -> Option<RwLockReadGuard<'_, bool>> {
        let whole = self.whole.try_read().ok()?;
        (!*whole && !self.watched.load(Ordering::SeqCst)).then_some(whole)
    }

    /// From now on pages can be protected against writes; none is yet.
    pub fn watch_writes(&self, uffd: &Uffd) -> Result<(), Fault> {
        self.mapped
            .iter()
            .try_for_each(|region| uffd.register_for_writes(region.as_ptr() as u64, region.len()))
    }

    /// From the return on whoever writes to these pages through the mapping waits: vCPUs, the kernel for them, this process's threads.
    pub fn protect_pages(&self, uffd: &Uffd, first: u64, count: u64) -> Result<(), Fault> {
        self.protect_or_release(uffd, first, count, true)
    }

    /// These pages can be written to again, by those too who wait.
    pub fn release_pages(&self, uffd: &Uffd, first: u64, count: u64) -> Result<(), Fault> {
        self.protect_or_release(uffd, first, count, false)
    }

    fn protect_or_release(&self, uffd: &Uffd, first: u64, count: u64, protected: bool) -> Result<(), Fault> {
        for (index, offset, len) in self.covered(first, count)? {
            uffd.protect(self.region(index).as_ptr() as u64 + offset, len, protected)?;
        }
        Ok(())
    }

    /// All pages can be written to for good. Every region is tried, whatever becomes of the others; the first fault counts.
    pub fn release_writes(&self, uffd: &Uffd) -> Result<(), Fault> {
        let release = |region: &GuestRegionMmap<AtomicBitmap>| {
            let (start, len) = (region.as_ptr() as u64, region.len());
            uffd.protect(start, len, false)?;
            uffd.unregister(start, len)?;
            // Who waits for a write is not woken by that.
            uffd.wake(start, len)
        };
        let released: Vec<_> = self.mapped.iter().map(release).collect();
        released.into_iter().collect()
    }

    /// The number of the page at an address of this process, if it is one of the guest's.
    pub fn page_at(&self, address: u64) -> Option<u64> {
        let mut first = 0;
        for region in self.mapped.iter() {
            match address.checked_sub(region.as_ptr() as u64) {
                Some(offset) if offset < region.len() => return Some(first + offset / PAGE),
                _ => first += region.len() / PAGE,
            }
        }
        None
    }

    /// Lets read(2) write the first 8 bytes of a page.
    #[cfg(test)]
    pub fn fill_through_the_kernel(&self, page: u64, from: &mut File) -> Result<(), Fault> {
        let at = GuestAddress(page * PAGE);
        self.mapped
            .read_exact_volatile_from(at, from, 8)
            .map_err(|error| broken("read", error))
    }

    /// Gives holes among the pages `first .. first + count` this content, or zeroes, and wakes who waits for them.
    pub fn place(&self, uffd: &Uffd, first: u64, data: Option<&[u8]>, count: u64) -> Result<(), Fault> {
        let mut rest = data;
        for (index, offset, len) in self.covered(first, count)? {
            let at = self.region(index).as_ptr() as u64 + offset;
            match rest {
                None => uffd.zero(at, len)?,
                Some(data) => {
                    let len = usize::try_from(len).expect("a piece of a slice fits usize");
                    let (now, later) = data.split_at(len.min(data.len()));
                    uffd.copy(at, now)?;
                    rest = Some(later);
                }
            }
        }
        Ok(())
    }

    /// Makes whoever touches a hole among the pages, or waits for it, fail. False: the kernel cannot.
    pub fn poison(&self, uffd: &Uffd, pages: &PageSet) -> Result<bool, Fault> {
        for run in pages.runs() {
            for (index, offset, len) in self.covered(run.first, run.count)? {
                if !uffd.poison(self.region(index).as_ptr() as u64 + offset, len)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Forgets which pages the VMM wrote.
    pub fn forget_written(&self) {
        for region in self.mapped.iter() {
            (**region).bitmap().reset();
        }
    }

    /// Adds to `into` the pages that the VMM wrote since the last call or [`Self::forget_written`], and forgets them.
    pub fn take_written(&self, into: &mut PageSet) {
        let mut first = 0;
        for region in self.mapped.iter() {
            let words = (**region).bitmap().get_and_reset();
            crate::dirty::merge_at(&mut into.words, first, &words, region.len() / PAGE);
            first += region.len() / PAGE;
        }
    }
}

/// Makes whole pages of `region`, `len` bytes from `offset` on, a hole of its file.
pub(crate) fn punch_hole(region: &GuestRegionMmap<AtomicBitmap>, offset: u64, len: u64) -> io::Result<()> {
    let file = region.file_offset().expect("every region is a piece of the file");
    let signed = |value: u64| i64::try_from(value).map_err(io::Error::other);
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file.file(), mode, signed(file.start() + offset)?, signed(len)?).map_err(io::Error::from)
}

fn page_count(bytes: usize) -> Result<u64, Fault> {
    if !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(Fault::new(
            Code::BadFrame,
            format!("{bytes} bytes are not whole pages of {PAGE_SIZE}"),
        ));
    }
    Ok((bytes / PAGE_SIZE) as u64)
}

struct Run {
    written: bool,
    len: u64,
}

/// The pages from `at` on that the VMM wrote all, or none of them; at least one, none from `end` on.
fn run_of(region: &GuestRegionMmap<AtomicBitmap>, at: u64, end: u64) -> Run {
    let bitmap = (**region).bitmap();
    let is_written = |at: u64| usize::try_from(at).is_ok_and(|offset| bitmap.dirty_at(offset));
    let (written, mut stop) = (is_written(at), at + PAGE);
    while stop < end && is_written(stop) == written {
        stop += PAGE;
    }
    Run {
        written,
        len: stop - at,
    }
}

/// Writes to the file behind `region`.
fn fill(region: &GuestRegionMmap<AtomicBitmap>, at: u64, data: &[u8]) -> io::Result<()> {
    let behind = region.file_offset().expect("every region is a piece of the file");
    let offset = usize::try_from(at).map_err(io::Error::other)?;
    behind.file().write_all_at(data, behind.start() + at)?;
    (**region).bitmap().mark_dirty(offset, data.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of 4 KiB in a huge one.
    const HUGE_PAGES: u64 = (2 << 20) / PAGE;

    #[test]
    fn memory_beyond_three_gibibytes_continues_after_the_hole() {
        assert_eq!(
            layout(64 << 20),
            vec![Region {
                gpa: 0,
                len: 64 << 20
            }]
        );
        assert_eq!(
            layout((3 << 30) + (1 << 20)),
            vec![
                Region { gpa: 0, len: 3 << 30 },
                Region {
                    gpa: 4 << 30,
                    len: 1 << 20
                }
            ]
        );
    }

    #[test]
    fn pages_are_numbered_densely_across_the_hole() {
        let memory = Memory::new((3 << 30) + (1 << 20), true).unwrap();
        let edge = (3 << 30) / PAGE;
        let data: Vec<u8> = (0..2 * PAGE_SIZE)
            .map(|i| if i < PAGE_SIZE { 1 } else { 2 })
            .collect();
        memory.write_pages(edge - 1, &data).unwrap();
        let byte: u8 = memory.mapped().read_obj(GuestAddress(HOLE_END)).unwrap();
        assert_eq!(byte, 2);
        let mut back = vec![0; data.len()];
        memory.read_pages(edge - 1, &mut back).unwrap();
        assert_eq!(back, data);
        let mut written = PageSet::empty(memory.pages());
        memory.take_written(&mut written);
        assert_eq!(written.count(), 2);
        memory.take_written(&mut written);
        assert_eq!(written.count(), 2);
    }

    #[test]
    fn holes_end_where_something_was_written() {
        let memory = Memory::new((3 << 30) + (1 << 20), false).unwrap();
        let edge = (3 << 30) / PAGE;
        memory.write_pages(edge + 5, &[7; PAGE_SIZE]).unwrap();
        assert_eq!(memory.hole_ahead(0, edge), edge);
        assert_eq!(memory.hole_ahead(edge, 20), 5);
        assert_eq!(memory.hole_ahead(edge + 5, 1), 0);
        assert_eq!(memory.hole_ahead(edge + 6, 20), 20);
        assert_eq!(memory.hole_ahead(u64::MAX, 20), 0);
    }

    #[test]
    fn adopted_memory_is_the_same_and_can_be_written_to_only_once_it_is_opened() {
        let bytes = (3 << 30) + (1 << 20);
        let first = Memory::new(bytes, true).unwrap();
        let last = first.pages() - 1;
        first.write_pages(last, &[5; PAGE_SIZE]).unwrap();
        let second = Memory::adopt(first.file(), bytes, true).unwrap();
        let mut page = [0; PAGE_SIZE];
        second.read_pages(last, &mut page).unwrap();
        assert_eq!(page, [5; PAGE_SIZE]);
        // The kernel writes for KVM as it does for read(2): to a mapping that may not be written to it does not.
        let mut zeroes = File::open("/dev/zero").unwrap();
        let into = |memory: &Memory, zeroes: &mut File| {
            memory
                .mapped()
                .read_exact_volatile_from(GuestAddress(0), zeroes, PAGE_SIZE)
                .is_ok()
        };
        assert!(!into(&second, &mut zeroes), "it was written to");
        second.open().unwrap();
        assert!(into(&second, &mut zeroes));
        drop(second);
        first.read_pages(last, &mut page).unwrap();
        assert_eq!(page, [5; PAGE_SIZE], "it outlives whoever adopted it");
    }

    #[test]
    fn memory_of_another_size_or_that_cannot_be_written_is_not_adopted() {
        let memory = Memory::new(2 << 20, true).unwrap();
        for bytes in [1 << 20, 3 << 20] {
            let fault = Memory::adopt(memory.file(), bytes, true).unwrap_err();
            assert_eq!(fault.code, Code::BadState);
            assert!(fault.message.contains("2097152 bytes"), "{fault}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        for wrong in [File::open(&path).unwrap(), File::open(dir.path()).unwrap()] {
            assert_eq!(
                Memory::adopt(&wrong, 1 << 20, true).unwrap_err().code,
                Code::BadState
            );
        }
    }

    #[test]
    fn pages_outside_the_guest_are_refused() {
        let memory = Memory::new(1 << 20, true).unwrap();
        for first in [256, u64::MAX, u64::MAX / PAGE] {
            assert_eq!(
                memory.write_pages(first, &[0; PAGE_SIZE]).unwrap_err().code,
                Code::BadFrame
            );
            assert_eq!(memory.zero_pages(first, 1).unwrap_err().code, Code::BadFrame);
        }
        assert_eq!(memory.zero_pages(0, u64::MAX).unwrap_err().code, Code::BadFrame);
        assert_eq!(memory.write_pages(0, &[0; 100]).unwrap_err().code, Code::BadFrame);
    }

    #[test]
    fn pages_written_for_the_first_time_and_again_read_back_and_count_as_written() {
        for huge_pages in [false, true] {
            let memory = Memory::new(4 << 20, huge_pages).unwrap();
            memory.write_pages(4, &[1; 2 * PAGE_SIZE]).unwrap();
            memory.write_pages(3, &[2; 4 * PAGE_SIZE]).unwrap();
            memory.write_pages(5, &[3; PAGE_SIZE]).unwrap();
            let mut back = vec![9; 6 * PAGE_SIZE];
            memory.read_pages(2, &mut back).unwrap();
            let bytes: Vec<u8> = back.iter().step_by(PAGE_SIZE).copied().collect();
            assert_eq!(bytes, [0, 2, 2, 3, 2, 0]);
            let mut written = PageSet::empty(memory.pages());
            memory.take_written(&mut written);
            assert_eq!(written.count(), 4);
            if !huge_pages {
                // Page 7 was read through the mapping, which took a page for it.
                assert_eq!(memory.hole_ahead(8, 100), 100);
            }
            assert_eq!(memory.hole_ahead(HUGE_PAGES, 100), 100, "the huge page after it");
        }
    }

    #[test]
    fn a_large_guest_is_mapped_in_pieces_that_are_one_memory() {
        let tib = cut(&layout(1 << 40), PIECE_BYTES_MAX);
        assert!(
            tib.len() == 17 && tib.iter().all(|piece| piece.len <= PIECE_BYTES_MAX),
            "{tib:?}"
        );
        let bytes = (64 << 30) + (4 << 30);
        let memory = Memory::new(bytes, true).unwrap();
        assert_eq!((memory.layout().len(), memory.pieces().len()), (2, 3));
        let told: u64 = memory.pieces().iter().map(|piece| piece.len).sum();
        assert_eq!((told, memory.regions().count()), (bytes, 3));
        let edge = ((3 << 30) + PIECE_BYTES_MAX) / PAGE;
        let data: Vec<u8> = (0..2 * PAGE_SIZE)
            .map(|at| if at < PAGE_SIZE { 1 } else { 2 })
            .collect();
        memory.write_pages(edge - 1, &data).unwrap();
        let mut back = vec![0; data.len()];
        memory.read_pages(edge - 1, &mut back).unwrap();
        assert_eq!(back, data);
        let byte: u8 = memory
            .mapped()
            .read_obj(GuestAddress(HOLE_END + PIECE_BYTES_MAX))
            .unwrap();
        assert_eq!(byte, 2);
        let mut written = PageSet::empty(memory.pages());
        memory.take_written(&mut written);
        assert!(written.count() == 2 && written.contains(edge - 1) && written.contains(edge));
    }

    /// Memory of 1 MiB, of which there is less.
    fn scarce(bytes: u64) -> Memory {
        let file = backing::in_own_tmpfs("never", bytes).unwrap();
        file.set_len(1 << 20).unwrap();
        Memory::of_file(&file, 1 << 20, false).unwrap()
    }

    #[test]
    fn a_host_without_memory_left_is_an_error_with_its_code_however_often_pages_are_written_and_zeroed() {
        let (memory, page) = (scarce(16 * PAGE), [5; PAGE_SIZE]);
        let exhausted = |first| {
            let fault = memory.write_pages(first, &page).unwrap_err();
            assert_eq!(fault.code, Code::MemoryExhausted, "{fault}");
        };
        memory.write_pages(0, &[1; 16 * PAGE_SIZE]).unwrap();
        exhausted(16);
        memory.write_pages(3, &page).unwrap();
        memory.zero_pages(0, 4).unwrap();
        memory.write_pages(16, &[2; 4 * PAGE_SIZE]).unwrap();
        // Page 0 was written, and would be written through the mapping: that would end this process.
        exhausted(0);
        exhausted(3);
        let mut back = vec![9; 6 * PAGE_SIZE];
        memory.read_received(0, &mut back).unwrap();
        assert!(back[..4 * PAGE_SIZE].iter().all(|byte| *byte == 0));
        assert!(back[4 * PAGE_SIZE..].iter().all(|byte| *byte == 1));
        memory.zero_pages(19, 1).unwrap();
        memory.write_pages(0, &page).unwrap();
    }

    #[test]
    fn a_written_page_reads_as_zero_after_it_was_zeroed() {
        for huge_pages in [false, true] {
            let memory = Memory::new(4 << 20, huge_pages).unwrap();
            memory.write_pages(3, &[7; 3 * PAGE_SIZE]).unwrap();
            memory.zero_pages(0, 5).unwrap();
            let mut back = vec![0; 3 * PAGE_SIZE];
            memory.read_pages(3, &mut back).unwrap();
            assert!(back[..2 * PAGE_SIZE].iter().all(|&byte| byte == 0));
            assert!(back[2 * PAGE_SIZE..].iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn what_shares_a_huge_page_with_a_written_page_is_zero_and_the_next_huge_page_stays_a_hole() {
        let memory = Memory::new(8 << 20, true).unwrap();
        // Through the mapping, as a guest writes: the fault takes as much as it can get.
        let address = GuestAddress((HUGE_PAGES + 7) * PAGE);
        memory.mapped().write_obj(0x55_u8, address).unwrap();
        assert!(memory.hole_ahead(0, 2 * HUGE_PAGES) >= HUGE_PAGES);
        assert_eq!(memory.hole_ahead(HUGE_PAGES + 7, 1), 0);
        assert_eq!(memory.hole_ahead(2 * HUGE_PAGES, HUGE_PAGES), HUGE_PAGES);
        memory.zero_pages(HUGE_PAGES, HUGE_PAGES - 1).unwrap();
        memory.write_pages(2 * HUGE_PAGES - 1, &[9; PAGE_SIZE]).unwrap();
        let mut back = vec![1; usize::try_from(2 * HUGE_PAGES * PAGE).unwrap()];
        memory.read_pages(HUGE_PAGES, &mut back).unwrap();
        let set: Vec<usize> = (0..back.len()).filter(|&at| back[at] != 0).collect();
        let last = usize::try_from((HUGE_PAGES - 1) * PAGE).unwrap();
        assert_eq!(set, (last..last + PAGE_SIZE).collect::<Vec<_>>());
    }
}
