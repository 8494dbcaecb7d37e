//! A tap: a network interface of the host whose frames are read and written here.
//!
//! Whoever sets the host up has made it, persistent and with headers (`ip tuntap add NAME mode tap vnet_hdr`); it is opened by its name and never made.
//! One process at a time has it. Like a disk's lock it is had exactly while the VM may run (see [`crate::devices::gate`]), but the target of a
//! migration has it before, so that one that is unusable is known before anything is committed, and its carrier is up when it is needed; what came
//! to it meanwhile is passed over when the state is restored. The next VMM of the same host may be given the same tap, and has it then once the one
//! before has given it back. While nobody has it the host drops what is sent to it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use drover_proto::{Code, Fault};
use nix::net::if_::if_nametoindex;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::header::HEADER_BYTES;
use super::{FRAME_BYTES_MAX, Link};
use crate::devices::gate::Held;
use crate::fd;
use crate::sandbox;

const DEVICE: &str = "/dev/net/tun";
/// Longest name of an interface, bytes.
pub const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;
/// A VMM that ends, or hands over, gives its tap back a little later than its agent learns of it.
const PATIENCE: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(5);
/// A tap queues fewer frames than this (its `txqueuelen`, 1000 by default), unless they come faster than they are passed over.
const PASSED_MAX: usize = 10_000;

#[derive(Debug, Default)]
struct State {
    file: Option<File>,
    offloads: u32,
}

/// Whether a tap is opened before the VM may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Early {
    /// It is not.
    No,
    /// If nobody has it when the VM is built: the VMM before this one on its host may, and hands it over.
    IfFree,
    /// It must be possible.
    Yes,
}

/// A tap.
pub struct Tap {
    name: String,
    early: Early,
    state: Mutex<State>,
    /// Of the tap, while it is open: a worker may wait for this one while the tap is closed.
    readable: Epoll,
}

impl std::fmt::Debug for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tap").field("name", &self.name).finish()
    }
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

fn unusable(name: &str, what: &str) -> Fault {
    Fault::new(Code::NicUnusable, format!("tap {name} {what}")).field("nics")
}

impl Tap {
    /// The tap `name`, which must be there.
    pub fn find(name: &str, early: Early) -> Result<Self, Fault> {
        let fault = |what: &str| unusable(name, what);
        // From inside there is no network to look into: a tap that is not there cannot be opened, and none is made.
        if !sandbox::entered() && if_nametoindex(name).is_err() {
            return Err(fault(&format!(
                "is not there: make it with `ip tuntap add {name} mode tap vnet_hdr`"
            )));
        }
        let readable = Epoll::new().map_err(|error| fault(&format!("cannot be waited for: {error}")))?;
        let tap = Self {
            early,
            name: name.to_owned(),
            state: Mutex::default(),
            readable,
        };
        if early == Early::Yes {
            tap.take()?;
        }
        Ok(tap)
    }

    /// Opens a tap that is to be open early if nobody has it.
    pub fn open_if_free(&self) -> Result<(), Fault> {
        if self.early != Early::IfFree {
            return Ok(());
        }
        let mut state = self.state();
        match self.open(state.offloads) {
            Ok(file) => state.file = Some(file),
            Err(error) if is_busy(&error) => {}
            Err(error) => return Err(self.refused(&error)),
        }
        Ok(())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of a tap's lock panics")
    }

    fn open(&self, offloads: u32) -> io::Result<File> {
        let file = sandbox::tun()?;
        if let Err(error) = raw::attach(&file, &self.name) {
            sandbox::return_tun(file);
            return Err(error);
        }
        raw::set_header(&file, HEADER_BYTES)?;
        raw::set_offloads(&file, offloads)?;
        let event = EpollEvent::new(EventSet::IN, 0);
        self.readable
            .ctl(ControlOperation::Add, file.as_raw_fd(), event)?;
        Ok(file)
    }

    fn refused(&self, error: &io::Error) -> Fault {
        let why = match error.raw_os_error() {
            _ if is_busy(error) => "is open in another process".to_owned(),
            Some(libc::EINVAL) => "is no tap, or one of several queues, which needs to be of one".to_owned(),
            _ => format!("cannot be opened by {DEVICE}: {error}"),
        };
        unusable(&self.name, &why)
    }

    /// Passes over what has come so far.
    pub fn pass_over(&self) {
        let mut frame = [0; FRAME_BYTES_MAX];
        for _ in 0..PASSED_MAX {
            match self.receive(&mut frame) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

impl Held for Tap {
    fn take(&self) -> Result<(), Fault> {
        let mut state = self.state();
        if state.file.is_some() {
            return Ok(());
        }
        let until = Instant::now() + PATIENCE;
        state.file = loop {
            match self.open(state.offloads) {
                Ok(file) => break Some(file),
                Err(error) if is_busy(&error) && Instant::now() < until => std::thread::sleep(AGAIN),
                Err(error) => return Err(self.refused(&error)),
            }
        };
        Ok(())
    }

    fn sync(&self) -> Result<(), Fault> {
        Ok(())
    }

    fn release(&self) {
        self.state().file = None;
    }
}

impl Link for Tap {
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut state = self.state();
        let file = state.file.as_mut().ok_or(io::ErrorKind::WouldBlock)?;
        let read = file.read(into);
        if let Err(error) = &read
            && error.raw_os_error() == Some(libc::EBADFD)
        {
            // Deleted: it would be readable for ever.
            state.file = None;
        }
        read
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        match self.state().file.as_mut() {
            Some(file) => file.write(frame).map(drop),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        let mut state = self.state();
        state.offloads = offloads;
        match &state.file {
            Some(file) => raw::set_offloads(file, offloads),
            None => Ok(()),
        }
    }

    fn readable(&self) -> BorrowedFd<'_> {
        fd::lend(&self.readable)
    }
}

/// Linux, include/uapi/linux/if_tun.h.
#[allow(unsafe_code, reason = "ioctls that no crate in use wraps")]
mod raw {
    use std::fs::File;
    use std::io;

    use vmm_sys_util::ioctl::{ioctl_with_ref, ioctl_with_val};

    fn check(result: i32) -> io::Result<()> {
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    pub fn attach(file: &File, name: &str) -> io::Result<()> {
        // SAFETY: integers and arrays of them, for which zero is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let room = request.ifr_name.len() - 1;
        for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
        // SAFETY: reads and writes one ifreq.
        check(unsafe { ioctl_with_ref(file, libc::TUNSETIFF, &request) })
    }

    pub fn set_header(file: &File, bytes: usize) -> io::Result<()> {
        let bytes = libc::c_int::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: reads one int.
        check(unsafe { ioctl_with_ref(file, libc::TUNSETVNETHDRSZ, &bytes) })
    }

    pub fn set_offloads(file: &File, offloads: u32) -> io::Result<()> {
        // SAFETY: takes its argument by value.
        check(unsafe { ioctl_with_val(file, libc::TUNSETOFFLOAD, offloads.into()) })
    }
}
