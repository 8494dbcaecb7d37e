//! A socket for whole frames of one type on one interface (packet(7)).
#![allow(unsafe_code, reason = "nix has no packet sockets of a type of one's own")]

use std::ffi::CString;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

/// The type of the frames of a benchmark: see `drover_probe::frames`.
const TYPE: u16 = 0x88b5;

/// The socket.
pub struct Packet(OwnedFd);

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn length<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).expect("a small structure")
}

impl Packet {
    /// On the interface `name` of this thread's network. What is sent goes past the interface's queueing.
    pub fn open(name: &str) -> Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: makes a descriptor, no more.
        let fd = check(unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(TYPE.to_be())) })
            .context("a packet socket")?;
        // SAFETY: the descriptor was just made and is nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let name = CString::new(name)?;
        // SAFETY: reads the name, which ends in a zero.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        // SAFETY: integers and arrays of them, for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET)?;
        address.sll_protocol = TYPE.to_be();
        address.sll_ifindex = i32::try_from(index)?;
        // SAFETY: reads one address of the length that is told.
        check(unsafe {
            libc::bind(
                fd.as_raw_fd(),
                (&raw const address).cast(),
                length::<libc::sockaddr_ll>(),
            )
        })
        .with_context(|| format!("binding a packet socket to {name:?}"))?;
        let on: i32 = 1;
        // SAFETY: reads one int.
        check(unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_QDISC_BYPASS,
                (&raw const on).cast(),
                length::<i32>(),
            )
        })
        .context("going past the queueing")?;
        Ok(Self(fd))
    }

    /// So long is waited for a frame.
    pub fn wait_for(&self, patience: Duration) -> Result<()> {
        let patience = TimeVal::microseconds(i64::try_from(patience.as_micros())?);
        setsockopt(&self.0, sockopt::ReceiveTimeout, &patience).context("a socket's patience")
    }

    /// Sends a frame; false where the interface takes none now.
    pub fn send(&self, frame: &[u8]) -> bool {
        send(self.0.as_raw_fd(), frame, MsgFlags::empty()).is_ok()
    }

    /// The next frame's length, if one came in time.
    pub fn receive(&self, into: &mut [u8]) -> Option<usize> {
        recv(self.0.as_raw_fd(), into, MsgFlags::empty()).ok()
    }
}
