//! Fresh memory costs the same for whoever comes next. A machine that is a virtual machine itself may give what is free back to its host,
//! and then the first touch of a page is a fault of the host's, many times dearer than the page: a GiB cost 0.2 s of processor time when it had been in use a
//! moment ago, and up to 1.5 s otherwise. So before everything that is measured as much memory as it will take is touched and let go.

use std::num::NonZeroUsize;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

/// What a move takes beside its guest's memory, MiB: buffers of sockets, a process.
const BESIDE_MIB: u64 = 256;
const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

/// Touches and lets go as much memory as a guest of `mib` MiB and what moves it will take.
#[allow(
    unsafe_code,
    reason = "memory that is touched and given back is mapped by hand"
)]
pub fn memory(mib: u64) -> Result<()> {
    let bytes = usize::try_from(mib + BESIDE_MIB).context("a size that fits")? * MIB;
    let length = NonZeroUsize::new(bytes).context("some memory")?;
    let (protection, flags) = (
        ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        MapFlags::MAP_PRIVATE,
    );
    // SAFETY: the mapping is anonymous and at an address that the kernel chooses.
    let start =
        unsafe { mmap_anonymous(None, length, protection, flags) }.context("mapping memory to touch")?;
    // SAFETY: the range is the mapping made above; the advice changes no content. A kernel without huge pages refuses, which is as well.
    let _ = unsafe { madvise(start, bytes, MmapAdvise::MADV_HUGEPAGE) };
    for at in (0..bytes).step_by(PAGE) {
        // SAFETY: `at` lies in the mapping, which can be written to and which nothing else knows of.
        unsafe { start.cast::<u8>().add(at).write_volatile(1) };
    }
    // SAFETY: the mapping is this function's own, and nothing refers to it any more.
    unsafe { munmap(start, bytes) }.context("letting memory go")
}
