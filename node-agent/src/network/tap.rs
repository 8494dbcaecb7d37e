//! TAPs: made persistent, so that a VMM opens one by its name (tuntap, Documentation/networking of the kernel). Deleted as any device.
#![allow(unsafe_code, reason = "ioctls that no crate wraps")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

/// Where TAPs are made and opened.
const TUN: &str = "/dev/net/tun";
/// Ethernet frames, each after the header of a virtio-net device, and nothing else before it.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Makes the TAP, down; it stays when this returns. Its owner is the VMMs' user, so that a VMM may open it without any privilege.
///
/// # Errors
/// What the kernel says, EBUSY for one that is open.
pub fn make(name: &str, owner: u32) -> io::Result<()> {
    let tap = open(name)?;
    set(&tap, libc::TUNSETOWNER, owner.into())?;
    set(&tap, libc::TUNSETPERSIST, 1)
}

/// Opens the TAP, which is made when it is not there and is gone when this is dropped, unless it was made persistent.
///
/// # Errors
/// What the kernel says.
pub fn open(name: &str) -> io::Result<File> {
    let tap = usable()?;
    // SAFETY: all zeros is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(FLAGS).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the descriptor is open and TUNSETIFF reads and writes one `ifreq`, which lives past the call.
    let outcome = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tap)
}

/// Opens the device that TAPs are made with.
///
/// # Errors
/// It is not there, or this user may not.
pub fn usable() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)
}

fn set(tap: &File, what: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the descriptor is open, and these ioctls take a number, no pointer.
    let outcome = unsafe { libc::ioctl(tap.as_raw_fd(), what, value) };
    if outcome < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
