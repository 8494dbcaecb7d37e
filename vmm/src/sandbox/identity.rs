//! Who the process is, and what it may use: a user of its own, no capability, small limits.
#![allow(
    unsafe_code,
    reason = "prctl, capset and setrlimit, which no crate in use wraps"
)]

use std::io;

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

/// Descriptors that a VMM may have: disks, queues' bells, a migration's streams and what is offered come to a few hundred at most.
const DESCRIPTORS_MAX: libc::rlim_t = 1024;
/// More capabilities than any kernel has.
const CAPABILITIES_END: libc::c_ulong = 64;
/// `_LINUX_CAPABILITY_VERSION_3` (capget(2)).
const CAPABILITY_VERSION: u32 = 0x2008_0522;

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `prctl` with one argument.
fn prctl(option: libc::c_int, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used here take a number, no pointer.
    check(unsafe { libc::prctl(option, argument, 0, 0, 0) })
}

/// No core file, which would hold the guest's memory; few descriptors. Processes are not limited by number: the kernel counts them by
/// user, who may have many VMs. Threads are limited by the process's control group.
pub fn limit() -> io::Result<()> {
    for (resource, most) in [
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_MSGQUEUE, 0),
        (libc::RLIMIT_RTPRIO, 0),
        (libc::RLIMIT_NOFILE, DESCRIPTORS_MAX),
    ] {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: both calls read or write one `rlimit`.
        check(unsafe { libc::getrlimit(resource, &raw mut limit) })?;
        limit.rlim_max = limit.rlim_max.min(most);
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: as above.
        check(unsafe { libc::setrlimit(resource, &raw const limit) })?;
    }
    Ok(())
}

/// Becomes another user for good, without further groups.
pub fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    if uid == 0 || gid == 0 {
        return Err(io::Error::other("the user to become is root"));
    }
    forget_bounding_set()?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    match setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)) {
        Ok(()) => Err(io::Error::other("root could be had again")),
        Err(_) => Ok(()),
    }
}

/// No program that is executed could give a capability; none is.
fn forget_bounding_set() -> io::Result<()> {
    for capability in 0..CAPABILITIES_END {
        match prctl(libc::PR_CAPBSET_DROP, capability) {
            Ok(()) => {}
            // The kernel has no such capability, nor one after it.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Gives up all capabilities; `execve` could give none back, and other processes of this user cannot trace this one.
pub fn drop_capabilities() -> io::Result<()> {
    if nix::unistd::geteuid().is_root() {
        forget_bounding_set()?;
    }
    // SAFETY: takes numbers alone.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) })?;
    let header = [CAPABILITY_VERSION, 0];
    let none = [0_u32; 6];
    // SAFETY: the kernel reads a header of two words and, for this version, two structures of three words (capget(2)).
    let set = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    check(libc::c_int::try_from(set).unwrap_or(-1))?;
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    prctl(libc::PR_SET_DUMPABLE, 0)
}
