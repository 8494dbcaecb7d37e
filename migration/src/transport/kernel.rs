//! What the kernel holds of what was written to a socket. On a slow link that may be megabytes, which go out long after the last call: movement
//! that no call shows.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

/// Bytes of `socket` that the peer's host has not acknowledged (`SIOCOUTQ`, tcp(7) and unix(7); of a Unix socket the
/// memory that they take). None where the kernel does not say.
#[allow(unsafe_code, reason = "an ioctl that no crate wraps")]
pub(super) fn unacknowledged(socket: BorrowedFd<'_>) -> Option<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open as long as the borrow, and the request writes one int, to `bytes`.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    u64::try_from(bytes).ok().filter(|_| done == 0)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_the_peer_did_not_take_is_counted_and_what_it_took_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        assert_eq!(unacknowledged(near.as_fd()), Some(0));
        near.set_nonblocking(true).unwrap();
        let mut written = 0;
        while let Ok(count) = near.write(&[7; 64 << 10]) {
            written += count;
        }
        let full = unacknowledged(near.as_fd()).unwrap();
        assert!(full > 0 && full <= written as u64, "{full} of {written}");
        far.read_exact(&mut vec![0; written]).unwrap();
        while unacknowledged(near.as_fd()) != Some(0) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_unix_socket_tells_too_and_what_is_no_socket_does_not() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        near.write_all(&[7; 1000]).unwrap();
        assert!(unacknowledged(near.as_fd()).unwrap() >= 1000);
        far.read_exact(&mut [0; 1000]).unwrap();
        assert_eq!(unacknowledged(near.as_fd()), Some(0));
        let file = tempfile::tempfile().unwrap();
        assert_eq!(unacknowledged(file.as_fd()), None);
    }
}
