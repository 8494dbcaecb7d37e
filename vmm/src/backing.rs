//! The file that guest memory lies in: shared, nameless, and of huge pages where the host allows it.
//!
//! Memory of 4 KiB pages costs a fault, an allocation and an entry in four tables for each of them: to fill it takes twice as
//! long as in pages of 2 MiB, to give it back forty times. A memfd has huge pages only where the host's administrator allowed them for all
//! shared memory (`shmem_enabled`); a tmpfs of its own has them as its mount says (Linux,
//! Documentation/admin-guide/mm/transhuge.rst). So the file is made in a tmpfs that is mounted nowhere and goes with the file. Mounting wants
//! `CAP_SYS_ADMIN`; who lacks it gets a memfd.
//!
//! What is huge is the kernel's choice for each part: a fault takes 2 MiB, a write as much as it writes, and either
//! falls back to less where memory is scattered. A hole that is written to once may become 2 MiB of memory, zero but for what was written.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use drover_proto::{Code, Fault};
use nix::sys::memfd::{MFdFlags, memfd_create};
use rustix::fs::{AtFlags, Mode, OFlags, openat, unlinkat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};
use tracing::debug;
use vm_memory::GuestMemoryRegion;
use vm_memory::GuestRegionMmap;
use vm_memory::bitmap::Bitmap;

/// The file's name, as `/proc/PID/fd` shows it: a sign for who looks for guest memory.
const NAME: &std::ffi::CStr = c"drover-guest";

/// A file of `bytes` zeroes, all of them a hole. `huge_pages`: of huge pages, if the host allows it.
pub fn create(bytes: u64, huge_pages: bool) -> Result<File, Fault> {
    let broken = |what: &str, error: io::Error| {
        Fault::new(Code::VmmStartFailed, format!("guest memory: {what}: {error}"))
    };
    let limit = drover_points::limit("GUEST_MEMORY_BYTES");
    if let Some(limit) = limit {
        let huge = if huge_pages { "within_size" } else { "never" };
        let file = in_own_tmpfs(huge, limit).map_err(|error| broken("a limited tmpfs", error))?;
        file.set_len(bytes).map_err(|error| broken("size", error))?;
        return Ok(file);
    }
    let huge = huge_pages
        .then(|| in_own_tmpfs("within_size", 0))
        .and_then(|made| {
            made.inspect_err(|error| debug!(%error, "guest memory has huge pages only if memfds have"))
                .ok()
        });
    let file = match huge {
        Some(file) => file,
        None => memfd_create(NAME, MFdFlags::MFD_CLOEXEC)
            .map_err(|error| broken("memfd_create", error.into()))?
            .into(),
    };
    file.set_len(bytes).map_err(|error| broken("size", error))?;
    Ok(file)
}

/// A file without a name in a tmpfs that only it holds, with huge pages as its mount's option says, of `limit` bytes; 0: as large as need be,
/// what limits memory is the host, as with a memfd.
pub(crate) fn in_own_tmpfs(huge: &str, limit: u64) -> io::Result<File> {
    let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("huge", huge), ("size", &limit.to_string()), ("mode", "0700")] {
        fsconfig_set_string(&context, key, value)?;
    }
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file: OwnedFd = openat(&mount, NAME, flags, Mode::RUSR | Mode::WUSR)?;
    unlinkat(&mount, NAME, AtFlags::empty())?;
    Ok(file.into())
}

/// Asks for huge pages in a mapping, for hosts that give them to memfds only where they are asked for (`shmem_enabled` is `advise`).
#[allow(unsafe_code, reason = "advice on memory is given by address")]
pub fn advise<B: Bitmap>(region: &GuestRegionMmap<B>) {
    let length = usize::try_from(region.len()).expect("a mapped region fits the address space");
    // SAFETY: the range is the region's own mapping, which lives as long as the borrow; the advice changes neither its content nor its
    // protection. A kernel without huge pages refuses it, which is as good.
    unsafe { libc::madvise(region.as_ptr().cast(), length, libc::MADV_HUGEPAGE) };
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn memory_of_either_kind_is_all_hole_until_it_is_written_and_has_no_name() {
        for huge_pages in [false, true] {
            let file = create(8 << 20, huge_pages).unwrap();
            let metadata = file.metadata().unwrap();
            assert_eq!((metadata.len(), metadata.blocks()), (8 << 20, 0));
            file.write_all_at(&[1], 5 << 20).unwrap();
            let blocks = file.metadata().unwrap().blocks();
            assert!(blocks > 0 && blocks <= (2 << 20) / 512, "{blocks} blocks");
            let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
            let name = link.to_string_lossy();
            assert!(
                name.contains("drover-guest") && name.ends_with("(deleted)"),
                "{name}"
            );
        }
    }
}
