//! The link of an upgrade: a Unix socket between two VMMs of one host, over which the guest's memory itself is handed over.
//!
//! ```text
//!  source                                              target
//!  connects to the socket in the target's folder ────▶ is it my own user?
//!  is it my own user?
//!  Offer{what: memory} + the descriptor ─────────────▶ exactly this, and one descriptor?
//!  frames, as on every link ◀────────────────────────▶
//! ```
//!
//! The folder is of mode 0700, and the kernel says of either end which user it belongs to (`SO_PEERCRED`, unix(7)): nobody else is
//! on this link, so it needs no TLS. Only then is the descriptor sent (`SCM_RIGHTS`), before the first frame and once. What it is
//! good for is for the hello to say, and what it is for the VMM to look at; nothing is mapped here.
//!
//! A source in a sandbox can connect to nothing: its agent does, and hands it the connection ([`offer`]). Both VMMs may have become other users
//! by then. What the kernel tells is who they were when they listened and connected, which is their agent's user.
#![allow(
    unsafe_code,
    reason = "a descriptor that the kernel passed is taken into ownership"
)]

use std::fs::{self, File};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use drover_proto::{Code, Fault};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg};

use super::{SLICE, failure};
use crate::control::Control;

/// What goes with the descriptor: who is meant, the form's version, and what the descriptor is.
const OFFER: [u8; 8] = *b"DRVL\x01mem";
/// A caller of ours has its offer sent before it waits for anything; one that its agent connected for it, once it was told to.
const OFFER_WAIT: Duration = Duration::from_secs(5);
/// Room for more descriptors than are due, so that further ones are seen, and closed, instead of cut off.
const DESCRIPTORS_SEEN: usize = 4;
/// Longest path that a socket address holds (sockaddr_un's 108 bytes with the closing zero).
const PATH_MAX: usize = 107;

fn broken(doing: &str, path: &Path, error: impl std::fmt::Display) -> Fault {
    Fault::new(
        Code::LinkLost,
        format!("cannot {doing} the other VMM at {}: {error}", path.display()),
    )
}

/// Calls `with` with a path for `path` that fits a socket's address: one too long is reached through its folder's descriptor.
fn fitting<T>(path: &Path, with: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no path of a socket"));
    };
    if path.as_os_str().len() <= PATH_MAX {
        return with(path);
    }
    let folder = File::open(folder)?;
    with(
        &Path::new("/proc/self/fd")
            .join(folder.as_raw_fd().to_string())
            .join(name),
    )
}

/// The user of this process.
fn own_user() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// The peer must be of the user `own`.
fn check_user(stream: &UnixStream, own: u32) -> Result<(), Fault> {
    let denied = |what: String| Err(Fault::new(Code::Denied, what));
    match getsockopt(stream, PeerCredentials) {
        Ok(peer) if peer.uid() == own => Ok(()),
        Ok(peer) => denied(format!(
            "the other end of the upgrade's socket is of user {}, only {own} is served",
            peer.uid()
        )),
        Err(error) => denied(format!(
            "the other end of the upgrade's socket has no credentials: {error}"
        )),
    }
}

/// Connects to the VMM that listens at `path` and hands it the memory behind `memory`.
///
/// # Errors
/// `link_lost`: nobody listens there. `denied`: it is of another user.
pub fn connect_local(path: &Path, memory: BorrowedFd<'_>) -> Result<UnixStream, Fault> {
    let stream =
        fitting(path, |path| UnixStream::connect(path)).map_err(|error| broken("reach", path, error))?;
    offer(stream, own_user(), path, memory)
}

/// Hands the memory behind `memory` to the VMM at the other end of `stream`, which somebody else has connected to `path`. That VMM's socket must
/// have been made by the user `own`: both may have become other users since, and different ones.
///
/// # Errors
/// As [`connect_local`].
pub fn offer(stream: UnixStream, own: u32, path: &Path, memory: BorrowedFd<'_>) -> Result<UnixStream, Fault> {
    check_user(&stream, own)?;
    let descriptors = [memory.as_raw_fd()];
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&OFFER)],
        &[ControlMessage::ScmRights(&descriptors)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
    match sent {
        // A fresh socket's buffer takes so few bytes whole.
        Ok(bytes) if bytes == OFFER.len() => Ok(stream),
        Ok(bytes) => Err(broken("offer memory to", path, format!("{bytes} bytes went out"))),
        Err(error) => Err(broken("offer memory to", path, error)),
    }
}

/// Where the target of an upgrade waits for its source. The socket's file goes with it.
#[derive(Debug)]
pub struct LocalListener {
    socket: UnixListener,
    path: PathBuf,
    /// Who made it: the caller must be of this user, whoever this process is by then.
    user: u32,
}

impl LocalListener {
    /// Listens at `path`, in place of what was left there.
    pub fn bind(path: &Path) -> Result<Self, Fault> {
        let bound = fitting(path, |path| {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let socket = UnixListener::bind(path)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        let socket = bound.map_err(|error| {
            let message = format!("cannot listen at {}: {error}", path.display());
            Fault::new(Code::VmmStartFailed, message)
        })?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            user: own_user(),
        })
    }

    /// Waits for the source: the first caller of this process's user who offers memory. Whoever does not is turned away, with a line in
    /// the log. Ends with `cancelled` when `control` says so.
    pub fn accept(&self, control: &Control) -> Result<(UnixStream, OwnedFd), Fault> {
        loop {
            if control.is_cancelled() {
                return Err(Fault::new(Code::Cancelled, "the target's VMM was asked to end"));
            }
            wait(self.socket.as_fd(), SLICE)?;
            match self.socket.accept() {
                Ok((stream, _)) => match meet(&stream, self.user) {
                    Ok(memory) => return Ok((stream, memory)),
                    Err(fault) => tracing::warn!(%fault, "a caller on the upgrade's socket was turned away"),
                },
                Err(error) if super::is_slice_over(&error) => {}
                Err(error) => return Err(failure("cannot take a caller on the upgrade's socket", &error)),
            }
        }
    }
}

impl Drop for LocalListener {
    fn drop(&mut self) {
        // Nobody is waited for any more; a file that is gone already is as good.
        let _ = fs::remove_file(&self.path);
    }
}

fn wait(what: BorrowedFd<'_>, at_most: Duration) -> Result<bool, Fault> {
    let timeout = PollTimeout::try_from(at_most).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(what, PollFlags::POLLIN)], timeout) {
        Ok(ready) => Ok(ready > 0),
        Err(nix::errno::Errno::EINTR) => Ok(false),
        Err(error) => Err(Fault::new(Code::Internal, format!("poll: {error}"))),
    }
}

/// Looks who it is and takes the memory that it offers.
fn meet(stream: &UnixStream, user: u32) -> Result<OwnedFd, Fault> {
    check_user(stream, user)?;
    if !wait(stream.as_fd(), OFFER_WAIT)? {
        return Err(Fault::new(Code::LinkLost, "it offered nothing in time"));
    }
    let mut bytes = [0; OFFER.len()];
    let (count, mut descriptors) = receive_descriptors::<DESCRIPTORS_SEEN>(stream, &mut bytes)
        .map_err(|error| Fault::new(Code::LinkLost, format!("its offer cannot be read: {error}")))?;
    if count != bytes.len() || bytes != OFFER || descriptors.len() != 1 {
        let message = format!(
            "it offered {} descriptors with {count} bytes that are no offer; one, of guest memory, is due",
            descriptors.len()
        );
        return Err(Fault::new(Code::BadFrame, message));
    }
    stream
        .set_nonblocking(false)
        .map_err(|error| failure("cannot set a socket", &error))?;
    descriptors
        .pop()
        .ok_or_else(|| Fault::new(Code::Internal, "a descriptor was counted that is not there"))
}

/// One message with its descriptors, at most `MOST`, all of which are owned from here on. Does not wait for it.
pub fn receive_descriptors<const MOST: usize>(
    stream: &UnixStream,
    bytes: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([i32; MOST]);
    let mut parts = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(passed) = part {
            // SAFETY: the kernel made these descriptors for this process in this call (unix(7), SCM_RIGHTS); nobody else knows them.
            descriptors.extend(passed.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::thread;

    use super::*;

    fn control() -> Control {
        Control::new(|_| {})
    }

    fn content(mut file: File) -> String {
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn the_memory_arrives_and_the_link_carries_bytes_both_ways() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover.sock");
        let listener = LocalListener::bind(&path).unwrap();
        let mut memory = tempfile::tempfile().unwrap();
        memory.write_all(b"guest").unwrap();
        let mut near = connect_local(&path, memory.as_fd()).unwrap();
        let (mut far, passed) = listener.accept(&control()).unwrap();
        assert_eq!(content(File::from(passed)), "guest");
        near.write_all(b"hello").unwrap();
        let mut bytes = [0; 5];
        far.read_exact(&mut bytes).unwrap();
        far.write_all(&bytes).unwrap();
        near.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn whoever_offers_no_memory_or_too_much_is_turned_away_and_the_wait_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover.sock");
        let listener = LocalListener::bind(&path).unwrap();
        let mut without = UnixStream::connect(&path).unwrap();
        without.write_all(&OFFER).unwrap();
        let mut other_words = UnixStream::connect(&path).unwrap();
        other_words.write_all(b"GET / HTTP").unwrap();
        let memory = tempfile::tempfile().unwrap();
        let twice = UnixStream::connect(&path).unwrap();
        let both = [memory.as_raw_fd(), memory.as_raw_fd()];
        sendmsg::<()>(
            twice.as_raw_fd(),
            &[IoSlice::new(&OFFER)],
            &[ControlMessage::ScmRights(&both)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        drop(UnixStream::connect(&path).unwrap());
        let _near = connect_local(&path, memory.as_fd()).unwrap();
        assert!(listener.accept(&control()).is_ok());
        assert_eq!(without.read(&mut [0]).unwrap(), 0, "it was hung up on");
    }

    #[test]
    fn a_path_too_long_for_an_address_is_reached() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a".repeat(120));
        fs::create_dir(&folder).unwrap();
        let path = folder.join("handover.sock");
        let listener = LocalListener::bind(&path).unwrap();
        let memory = tempfile::tempfile().unwrap();
        let _near = connect_local(&path, memory.as_fd()).unwrap();
        assert!(listener.accept(&control()).is_ok());
    }

    #[test]
    fn nobody_there_is_a_lost_link_and_a_cancel_ends_the_wait() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover.sock");
        let memory = tempfile::tempfile().unwrap();
        assert_eq!(
            connect_local(&path, memory.as_fd()).unwrap_err().code,
            Code::LinkLost
        );
        let listener = LocalListener::bind(&path).unwrap();
        let control = control();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| listener.accept(&control));
            control.cancel();
            assert_eq!(waiting.join().unwrap().unwrap_err().code, Code::Cancelled);
        });
    }
}
