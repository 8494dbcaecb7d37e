//! The byte stream between the two VMMs: [`Link`] puts frames on any [`Stream`], [`connect`] and [`Listener`] make
//! streams of TCP with mutual TLS.
//!
//! Every stream is half-duplex where it counts: the source writes a round and then reads one acknowledgement, the target
//! reads and answers. So one thread a stream suffices on each side, with blocking calls. Every call blocks a slice of time only, after
//! which the clock and what else is to be watched (the cancel flag, at least) are looked at: a link that moves nothing for
//! [`LINK_TIMEOUT`] is lost, and a cancel is heeded within a slice. What moves is not only what a call takes or gives: on a slow link the kernel
//! goes on sending what it was given ([`Stream::unacknowledged`]).

mod kernel;
mod link;
mod listener;
mod local;
mod receiving;
mod tls;

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use drover_proto::{Code, Fault};

pub use link::{Link, Stop, Watch};
pub use listener::Listener;
pub use local::{LocalListener, connect_local, offer, receive_descriptors};
pub use tls::{HostStream, Socket, connect, connect_on, connect_plain};

/// A link that moves no byte for so long counts as lost.
pub const LINK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one call to the stream blocks.
pub(crate) const SLICE: Duration = Duration::from_millis(25);

/// A blocking byte stream whose calls return `WouldBlock` or `TimedOut` after a while, so that its user can look at a
/// clock and a cancel flag in between.
pub trait Stream: Read + Write + Send {
    /// Bounds how long one `read` or `write` blocks.
    fn set_slice(&self, slice: Duration) -> io::Result<()>;
    /// Whether a byte that changed on the way never comes out of it, so that pages need no checksum of their own.
    fn is_guarded(&self) -> bool {
        false
    }
    /// Bytes that were written and have not reached the peer's host, if that can be known. As long as it changes something moves.
    fn unacknowledged(&self) -> Option<u64> {
        None
    }
}

impl Stream for TcpStream {
    fn set_slice(&self, slice: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(slice))?;
        self.set_write_timeout(Some(slice))
    }

    fn unacknowledged(&self) -> Option<u64> {
        kernel::unacknowledged(self.as_fd())
    }
}

impl Stream for UnixStream {
    fn set_slice(&self, slice: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(slice))?;
        self.set_write_timeout(Some(slice))
    }

    fn unacknowledged(&self) -> Option<u64> {
        kernel::unacknowledged(self.as_fd())
    }
}

/// Whether a call only ran out of its slice.
fn is_slice_over(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

/// What a failed call means: `denied` when a certificate was refused by either side, else `link_lost`.
fn failure(doing: &str, error: &io::Error) -> Fault {
    use rustls::{AlertDescription as Alert, Error};
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    let denied = match tls {
        Some(Error::InvalidCertificate(_) | Error::NoCertificatesPresented) => true,
        Some(Error::AlertReceived(alert)) => matches!(
            alert,
            Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                | Alert::AccessDenied
                | Alert::CertificateRequired
                | Alert::DecryptError
        ),
        _ => false,
    };
    let code = if denied { Code::Denied } else { Code::LinkLost };
    let advice = if denied {
        " (is it a host of this cluster?)"
    } else {
        ""
    };
    // rustls says it with a link to its manual.
    let what = match error.kind() {
        io::ErrorKind::UnexpectedEof => "the peer hung up without a word".to_owned(),
        _ => error.to_string(),
    };
    Fault::new(code, format!("{doing}: {what}{advice}"))
}
