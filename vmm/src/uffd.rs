//! userfaultfd(2): memory in which a page that is missing makes whoever touches it wait until it is placed.
//!
//! Only what a post-copy and a snapshot need, in shared file memory, registered as whole regions: pages that are missing, and pages that are
//! protected against writes, which make whoever writes to one wait until it may. The descriptor comes from `/dev/userfaultfd`
//! if that may be opened, else from the system call, which needs root or `vm.unprivileged_userfaultfd=1`: KVM touches guest memory in the
//! kernel, and only these two ways give a descriptor that sees that as well (Linux, Documentation/admin-guide/mm/userfaultfd.rst).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use drover_proto::{Code, Fault};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;

use crate::memory::PAGE;

const DEVICE: &str = "/dev/userfaultfd";
const API: u64 = 0xaa;
/// Missing pages of shared memory files.
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// Pages can be made to fail whoever touches them (Linux 6.6).
const FEATURE_POISON: u64 = 1 << 14;
/// Pages can be protected against writes, and faults say so; also of shared memory files (Linux 5.19).
const FEATURES_WRITES: u64 = 1 | 1 << 12;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WRITES: u64 = 2;
const EVENT_PAGEFAULT: u8 = 0x12;
const MESSAGE_BYTES: usize = 32;
/// Where the address stands in a message about a fault.
const ADDRESS_AT: usize = 16;
/// Faults that are read with one call.
const MESSAGES_MAX: usize = 64;

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd {
    fd: File,
    poisons: bool,
}

fn denied(what: &str, error: &io::Error) -> Fault {
    Fault::new(
        Code::PostCopyUnavailable,
        format!(
            "userfaultfd cannot be used ({what}: {error}): give the VMM's user access to {DEVICE}, or set vm.unprivileged_userfaultfd=1"
        ),
    )
}

fn failed(what: &str, error: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Internal, format!("userfaultfd: {what}: {error}"))
}

impl Uffd {
    /// A descriptor that can do what a post-copy needs, or why there is none (`postcopy_unavailable`).
    pub fn open() -> Result<Self, Fault> {
        Self::open_at(Path::new(DEVICE))
    }

    fn open_at(device: &Path) -> Result<Self, Fault> {
        let fd = descriptor(device).map_err(|error| denied("userfaultfd(2)", &error))?;
        let features = raw::agree(&fd, 0).map_err(|error| denied("UFFDIO_API", &error))?;
        if features & FEATURE_MISSING_SHMEM == 0 {
            let error = io::Error::from(io::ErrorKind::Unsupported);
            return Err(denied("missing pages of shared memory, Linux 4.11", &error));
        }
        Ok(Self {
            fd: File::from(fd),
            poisons: features & FEATURE_POISON != 0,
        })
    }

    /// A descriptor that can protect pages against writes, or why there is none (`snapshot_unavailable`).
    pub fn open_for_writes() -> Result<Self, Fault> {
        Self::for_writes(descriptor(Path::new(DEVICE)))
    }

    /// As [`Self::open_for_writes`], by `/dev/userfaultfd`, which somebody opened who may.
    pub fn of_device_for_writes(device: &File) -> Result<Self, Fault> {
        Self::for_writes(raw::of_device(device))
    }

    fn for_writes(made: io::Result<OwnedFd>) -> Result<Self, Fault> {
        let denied = |what: &str, error: &io::Error| {
            let message = format!(
                "memory cannot be written behind a running guest ({what}: {error}): that takes Linux 5.19, and access of the VMM's user to {DEVICE} or vm.unprivileged_userfaultfd=1"
            );
            Fault::new(Code::SnapshotUnavailable, message)
        };
        let fd = made.map_err(|error| denied("userfaultfd(2)", &error))?;
        raw::agree(&fd, FEATURES_WRITES).map_err(|error| denied("UFFDIO_API", &error))?;
        Ok(Self {
            fd: File::from(fd),
            poisons: false,
        })
    }

    /// Pages in `len` bytes from `start` on can be protected against writes from now on. Both whole pages.
    pub fn register_for_writes(&self, start: u64, len: u64) -> Result<(), Fault> {
        raw::register(&self.fd, start, len, REGISTER_MODE_WRITES).map_err(|error| failed("register", error))
    }

    /// From the return on whoever writes to these pages waits, or nobody does any more, those included who wait already.
    pub fn protect(&self, start: u64, len: u64, protected: bool) -> Result<(), Fault> {
        loop {
            match raw::protect(&self.fd, start, len, protected) {
                // The address space is being changed at this moment.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                result => return result.map_err(|error| failed("protect", error)),
            }
        }
    }

    /// Whoever waits in `len` bytes from `start` on tries again.
    pub fn wake(&self, start: u64, len: u64) -> Result<(), Fault> {
        raw::wake(&self.fd, start, len).map_err(|error| failed("wake", error))
    }

    /// Waits until somebody waits for a page, or `bell` is rung, but no longer than `wait`.
    pub fn await_fault_or(&self, bell: BorrowedFd<'_>, wait: Duration) -> Result<(), Fault> {
        let wait = PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO);
        let mut fds = [
            PollFd::new(self.fd.as_fd(), PollFlags::POLLIN),
            PollFd::new(bell, PollFlags::POLLIN),
        ];
        match poll(&mut fds, wait) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(failed("poll", error)),
        }
    }

    /// From now on whoever touches a page in `len` bytes from `start` on that memory does not hold waits. Both whole pages.
    pub fn register(&self, start: u64, len: u64) -> Result<(), Fault> {
        raw::register(&self.fd, start, len, REGISTER_MODE_MISSING).map_err(|error| failed("register", error))
    }

    /// Takes [`Uffd::register`] back: holes read as zeroes again.
    pub fn unregister(&self, start: u64, len: u64) -> Result<(), Fault> {
        raw::unregister(&self.fd, start, len).map_err(|error| failed("unregister", error))
    }

    /// Adds the addresses that somebody waits for and that were not told before. Waits for one, but no longer than `wait`.
    pub fn faults(&self, wait: Duration, addresses: &mut Vec<u64>) -> Result<(), Fault> {
        let wait = PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO);
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, wait) {
            Ok(0) | Err(Errno::EINTR) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(failed("poll", error)),
        }
        let mut messages = [0; MESSAGES_MAX * MESSAGE_BYTES];
        let length = match read(&self.fd, &mut messages) {
            Ok(length) => length,
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(error) => return Err(failed("read", error)),
        };
        for message in messages[..length].chunks_exact(MESSAGE_BYTES) {
            if message[0] == EVENT_PAGEFAULT
                && let Some(address) = message[ADDRESS_AT..].first_chunk()
            {
                addresses.push(u64::from_ne_bytes(*address));
            }
        }
        Ok(())
    }

    /// Places whole pages from address `to` on, but for those that memory holds already, and wakes who waits for them.
    pub fn copy(&self, to: u64, data: &[u8]) -> Result<(), Fault> {
        self.page_by_page(to, data.len() as u64, "copy", |done, left| {
            let from = usize::try_from(done)
                .ok()
                .and_then(|done| data.get(done..))
                .unwrap_or_default();
            raw::copy(&self.fd, to + done, from, left)
        })
    }

    /// As [`Uffd::copy`], with `len` bytes of zeroes.
    pub fn zero(&self, to: u64, len: u64) -> Result<(), Fault> {
        self.page_by_page(to, len, "zero", |done, left| raw::zero(&self.fd, to + done, left))
    }

    /// Makes whoever waits for these pages, or touches one later, fail; not those that memory holds. False: the kernel cannot.
    pub fn poison(&self, at: u64, len: u64) -> Result<bool, Fault> {
        if self.poisons {
            self.page_by_page(at, len, "poison", |done, left| {
                raw::poison(&self.fd, at + done, left)
            })?;
        }
        Ok(self.poisons)
    }

    /// Repeats `call(done, left)`, which says how far it came, until `len` bytes from `at` on are done or were there.
    fn page_by_page(
        &self,
        at: u64,
        len: u64,
        what: &str,
        call: impl Fn(u64, u64) -> (i64, io::Result<()>),
    ) -> Result<(), Fault> {
        let mut done = 0;
        while done < len {
            let (came, result) = call(done, len - done);
            let Err(error) = result else { return Ok(()) };
            match (u64::try_from(came), error.raw_os_error()) {
                (Ok(came @ 1..), _) => done += came,
                (_, Some(libc::EEXIST)) => {
                    raw::wake(&self.fd, at + done, PAGE).map_err(|error| failed("wake", error))?;
                    done += PAGE;
                }
                // The address space is being changed at this moment.
                (_, Some(libc::EAGAIN)) => std::thread::yield_now(),
                _ => return Err(failed(what, error)),
            }
        }
        Ok(())
    }
}

fn descriptor(device: &Path) -> io::Result<OwnedFd> {
    raw::from_device(device).or_else(|by_device| {
        raw::from_syscall().inspect_err(|by_call| tracing::info!(%by_device, %by_call, "no userfaultfd"))
    })
}

/// The calls themselves (linux/userfaultfd.h).
#[allow(unsafe_code, reason = "ioctls that no crate in use wraps")]
mod raw {
    use std::os::fd::AsRawFd;

    use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
    use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

    use super::{API, File, FromRawFd, OpenOptions, OpenOptionsExt, OwnedFd, Path, io};

    const KIND: u32 = 0xaa;

    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Api {
        api: u64,
        features: u64,
        ioctls: u64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Range {
        start: u64,
        len: u64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Register {
        range: Range,
        mode: u64,
        ioctls: u64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Copying {
        dst: u64,
        src: u64,
        len: u64,
        mode: u64,
        done: i64,
    }

    /// `uffdio_zeropage` and `uffdio_poison` alike.
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Filling {
        range: Range,
        mode: u64,
        done: i64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Protecting {
        range: Range,
        mode: u64,
    }

    ioctl_io_nr!(USERFAULTFD_IOC_NEW, KIND, 0x00);
    ioctl_iowr_nr!(UFFDIO_API, KIND, 0x3f, Api);
    ioctl_iowr_nr!(UFFDIO_REGISTER, KIND, 0x00, Register);
    ioctl_ior_nr!(UFFDIO_UNREGISTER, KIND, 0x01, Range);
    ioctl_ior_nr!(UFFDIO_WAKE, KIND, 0x02, Range);
    ioctl_iowr_nr!(UFFDIO_COPY, KIND, 0x03, Copying);
    ioctl_iowr_nr!(UFFDIO_ZEROPAGE, KIND, 0x04, Filling);
    ioctl_iowr_nr!(UFFDIO_WRITEPROTECT, KIND, 0x06, Protecting);
    ioctl_iowr_nr!(UFFDIO_POISON, KIND, 0x08, Filling);

    fn outcome(returned: i32) -> io::Result<()> {
        match returned {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn owned(returned: i32) -> io::Result<OwnedFd> {
        if returned < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave this descriptor to us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(returned) })
    }

    pub fn from_device(path: &Path) -> io::Result<OwnedFd> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(path)?;
        of_device(&device)
    }

    pub fn of_device(device: &File) -> io::Result<OwnedFd> {
        let flags = libc::c_ulong::from((libc::O_CLOEXEC | libc::O_NONBLOCK).unsigned_abs());
        // SAFETY: this ioctl takes flags as its argument, not an address.
        let returned = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW(), flags) };
        owned(returned)
    }

    pub fn from_syscall() -> io::Result<OwnedFd> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes flags alone.
        let returned = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        owned(i32::try_from(returned).unwrap_or(-1))
    }

    /// Shakes hands, asking for `features`, without which it fails; gives the kernel's.
    pub fn agree(fd: &OwnedFd, features: u64) -> io::Result<u64> {
        let mut api = Api {
            api: API,
            features,
            ..Api::default()
        };
        // SAFETY: the argument is of the form that the kernel reads and writes here.
        outcome(unsafe { ioctl_with_mut_ref(fd, UFFDIO_API(), &mut api) })?;
        Ok(api.features)
    }

    pub fn register(fd: &File, start: u64, len: u64, mode: u64) -> io::Result<()> {
        let mut register = Register {
            range: Range { start, len },
            mode,
            ioctls: 0,
        };
        // SAFETY: as in `agree`; it changes no memory, only what a touch of the range does.
        outcome(unsafe { ioctl_with_mut_ref(fd, UFFDIO_REGISTER(), &mut register) })
    }

    pub fn unregister(fd: &File, start: u64, len: u64) -> io::Result<()> {
        // SAFETY: as in `register`.
        outcome(unsafe { ioctl_with_ref(fd, UFFDIO_UNREGISTER(), &Range { start, len }) })
    }

    pub fn protect(fd: &File, start: u64, len: u64, protected: bool) -> io::Result<()> {
        let mut protecting = Protecting {
            range: Range { start, len },
            mode: u64::from(protected),
        };
        // SAFETY: as in `register`.
        outcome(unsafe { ioctl_with_mut_ref(fd, UFFDIO_WRITEPROTECT(), &mut protecting) })
    }

    pub fn wake(fd: &File, start: u64, len: u64) -> io::Result<()> {
        // SAFETY: as in `register`.
        outcome(unsafe { ioctl_with_ref(fd, UFFDIO_WAKE(), &Range { start, len }) })
    }

    /// Copies at most `len` bytes, no more than `from` has. How far it came counts where it failed.
    pub fn copy(fd: &File, to: u64, from: &[u8], len: u64) -> (i64, io::Result<()>) {
        let mut copying = Copying {
            dst: to,
            src: from.as_ptr() as u64,
            len: len.min(from.len() as u64),
            mode: 0,
            done: 0,
        };
        // SAFETY: the kernel reads `len` bytes of `from`, which is as long, and writes only to pages of the registered range that do not
        // exist yet, so to nothing that anybody holds a reference to.
        let result = outcome(unsafe { ioctl_with_mut_ref(fd, UFFDIO_COPY(), &mut copying) });
        (copying.done, result)
    }

    pub fn zero(fd: &File, start: u64, len: u64) -> (i64, io::Result<()>) {
        let mut filling = Filling {
            range: Range { start, len },
            ..Filling::default()
        };
        // SAFETY: as in `copy`: only pages that do not exist yet.
        let result = outcome(unsafe { ioctl_with_mut_ref(fd, UFFDIO_ZEROPAGE(), &mut filling) });
        (filling.done, result)
    }

    pub fn poison(fd: &File, start: u64, len: u64) -> (i64, io::Result<()>) {
        let mut filling = Filling {
            range: Range { start, len },
            ..Filling::default()
        };
        // SAFETY: as in `copy`; a touch of the page then raises SIGBUS or fails the system call that touched it.
        let result = outcome(unsafe { ioctl_with_mut_ref(fd, UFFDIO_POISON(), &mut filling) });
        (filling.done, result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;
    use drover_migration::codec::Run;
    use drover_migration::vm::{PAGE_SIZE, PageSet};

    #[test]
    fn whoever_touches_a_missing_page_waits_for_it_and_one_that_is_there_is_not_overwritten() {
        let uffd = match Uffd::open() {
            Ok(uffd) => uffd,
            Err(fault) => return println!("SKIPPED: {fault}"),
        };
        let memory = Memory::new(4 << 20, true).unwrap();
        memory.write_pages(0, &[1; 16 * PAGE_SIZE]).unwrap();
        let mut missing = PageSet::empty(memory.pages());
        missing.insert(Run { first: 3, count: 5 });
        memory.discard(&missing).unwrap();
        memory.watch(&uffd).unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut page = [0; PAGE_SIZE];
                memory.read_pages(4, &mut page).unwrap();
                page[77]
            });
            let mut faults = Vec::new();
            while faults.is_empty() {
                uffd.faults(Duration::from_millis(100), &mut faults).unwrap();
            }
            assert_eq!(memory.page_at(faults[0]), Some(4));
            memory.place(&uffd, 3, Some(&[7; 2 * PAGE_SIZE]), 2).unwrap();
            assert_eq!(reader.join().unwrap(), 7);
        });
        // Page 4 comes again, in a longer run.
        memory.place(&uffd, 3, Some(&[9; 5 * PAGE_SIZE]), 5).unwrap();
        memory.place(&uffd, 200, None, 1).unwrap();
        memory.unwatch(&uffd).unwrap();
        let mut back = vec![0; 16 * PAGE_SIZE];
        memory.read_pages(0, &mut back).unwrap();
        let bytes: Vec<u8> = back.iter().step_by(PAGE_SIZE).copied().collect();
        assert_eq!(bytes, [1, 1, 1, 7, 7, 9, 9, 9, 1, 1, 1, 1, 1, 1, 1, 1]);
    }

    /// As KVM does where it emulates an instruction, or writes a clock's page.
    #[test]
    fn the_kernel_waits_for_a_missing_page_too() {
        let uffd = match Uffd::open() {
            Ok(uffd) => uffd,
            Err(fault) => return println!("SKIPPED: {fault}"),
        };
        let memory = Memory::new(1 << 20, false).unwrap();
        memory.watch(&uffd).unwrap();
        let page = 9;
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut ones = File::open("/dev/urandom").unwrap();
                memory.fill_through_the_kernel(page, &mut ones)
            });
            let mut faults = Vec::new();
            while faults.is_empty() && !writer.is_finished() {
                uffd.faults(Duration::from_millis(100), &mut faults).unwrap();
            }
            assert_eq!(faults.first().and_then(|at| memory.page_at(*at)), Some(page));
            memory.place(&uffd, page, Some(&[7; PAGE_SIZE]), 1).unwrap();
            writer.join().unwrap().unwrap();
        });
        memory.unwatch(&uffd).unwrap();
        let mut back = [0; PAGE_SIZE];
        memory.read_pages(page, &mut back).unwrap();
        assert_eq!(
            back[8..],
            [7; PAGE_SIZE - 8],
            "the kernel wrote 8 bytes of what was placed"
        );
    }

    #[test]
    fn a_denied_userfaultfd_says_what_to_do() {
        let fault = denied("userfaultfd(2)", &io::Error::from_raw_os_error(libc::EPERM));
        assert_eq!(fault.code, Code::PostCopyUnavailable);
        assert!(fault.message.contains("vm.unprivileged_userfaultfd"), "{fault}");
    }
}
