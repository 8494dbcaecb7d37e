//! TCP with mutual TLS, and without it where both sides were told so. The settings come from the caller; here the peer's name is
//! checked and time is bounded.
//!
//! Until its handshake is done a peer is a stranger, who may send a byte now and then for ever. So the clock and the cancel flag are looked at
//! before every read of the socket ([`Hasty`]).

use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_proto::{Code, Fault};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::SockaddrStorage;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::UnbufferedServerConnection;
use rustls::{ClientConfig, ClientConnection, ServerConfig, StreamOwned};

use super::receiving::ReceivingEnd;
use super::{LINK_TIMEOUT, SLICE, Stream, failure, is_slice_over};
use crate::control::Control;

/// Bytes read from the socket at once: the TLS library asks for a few KiB at a time.
const READ_BUFFER: usize = 256 << 10;
/// Enough for a frame's header: pages are then read from the socket straight to where they are wanted.
const READ_BUFFER_PLAIN: usize = 4 << 10;
/// Encrypted bytes that may wait for the socket.
const WRITE_BUFFER: usize = 256 << 10;

/// A TCP socket that is read through a buffer.
#[derive(Debug)]
pub struct Socket(BufReader<TcpStream>);

impl Socket {
    fn new(tcp: TcpStream, buffer: usize) -> io::Result<Self> {
        prepare(&tcp)?;
        Ok(Self(BufReader::with_capacity(buffer, tcp)))
    }
}

fn prepare(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nonblocking(false)?;
    tcp.set_nodelay(true)?;
    tcp.set_slice(SLICE)
}

impl Read for Socket {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.0.read(out)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.get_mut().write(bytes)
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.0.get_mut().write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket during the handshake: the TLS library calls it again and again as long as bytes drip in.
struct Hasty<'a> {
    sock: &'a mut Socket,
    until: Instant,
    given_up: &'a dyn Fn() -> bool,
}

impl Hasty<'_> {
    fn over(&self) -> bool {
        (self.given_up)() || Instant::now() >= self.until
    }

    fn check(&self) -> io::Result<()> {
        if self.over() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}

impl Read for Hasty<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.check()?;
        self.sock.read(out)
    }
}

impl Write for Hasty<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.check()?;
        self.sock.write(bytes)
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.check()?;
        self.sock.write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One end of a connection between two hosts.
#[derive(Debug)]
pub enum HostStream {
    /// The source's end, encrypted.
    Client(Box<StreamOwned<ClientConnection, Socket>>),
    /// The target's end, encrypted.
    Server(Box<ReceivingEnd>),
    /// Either end, not encrypted.
    Plain(Socket),
}

impl HostStream {
    fn tcp(&self) -> &TcpStream {
        match self {
            Self::Client(stream) => stream.sock.0.get_ref(),
            Self::Server(stream) => stream.tcp(),
            Self::Plain(stream) => stream.0.get_ref(),
        }
    }

    /// The peer's certificates, its own first; none without TLS.
    pub(super) fn peer_certificates(&self) -> &[CertificateDer<'_>] {
        match self {
            Self::Client(stream) => stream.conn.peer_certificates(),
            Self::Server(stream) => stream.peer_certificates(),
            Self::Plain(_) => None,
        }
        .unwrap_or_default()
    }
}

impl Read for HostStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Client(stream) => stream.read(out),
            Self::Server(stream) => stream.read(out),
            Self::Plain(stream) => stream.read(out),
        }
    }
}

impl Write for HostStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Client(stream) => stream.write(bytes),
            Self::Server(stream) => stream.write(bytes),
            Self::Plain(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Client(stream) => stream.flush(),
            Self::Server(stream) => stream.flush(),
            Self::Plain(stream) => stream.flush(),
        }
    }
}

impl Stream for HostStream {
    fn set_slice(&self, slice: Duration) -> io::Result<()> {
        self.tcp().set_slice(slice)
    }

    fn unacknowledged(&self) -> Option<u64> {
        self.tcp().unacknowledged()
    }

    fn is_guarded(&self) -> bool {
        !matches!(self, Self::Plain(_))
    }
}

/// Connects to a target VMM and verifies that its certificate carries the DNS name `server_name`
/// (`<host>.host.drover`).
pub fn connect(
    addr: SocketAddr,
    server_name: &str,
    tls: Arc<ClientConfig>,
    control: &Control,
) -> Result<HostStream, Fault> {
    encrypt(dial(addr, None, READ_BUFFER)?, addr, server_name, tls, control)
}

/// [`connect`], or [`connect_plain`] without `tls`, on a socket that is connected to nothing: for a process that can make none.
pub fn connect_on(
    socket: OwnedFd,
    addr: SocketAddr,
    tls: Option<(&str, Arc<ClientConfig>)>,
    control: &Control,
) -> Result<HostStream, Fault> {
    match tls {
        None => Ok(HostStream::Plain(dial(addr, Some(socket), READ_BUFFER_PLAIN)?)),
        Some((server_name, tls)) => {
            let sock = dial(addr, Some(socket), READ_BUFFER)?;
            encrypt(sock, addr, server_name, tls, control)
        }
    }
}

fn encrypt(
    sock: Socket,
    addr: SocketAddr,
    server_name: &str,
    tls: Arc<ClientConfig>,
    control: &Control,
) -> Result<HostStream, Fault> {
    let doing = doing(addr);
    let name = ServerName::try_from(server_name.to_owned()).map_err(|_| {
        Fault::new(Code::InvalidArgument, format!("{server_name:?} is no DNS name")).field("target_host")
    })?;
    let conn = ClientConnection::new(tls, name).map_err(|error| unusable(&error))?;
    let mut stream = Box::new(StreamOwned::new(conn, sock));
    stream.conn.set_buffer_limit(Some(WRITE_BUFFER));
    let given_up = || control.is_cancelled();
    let StreamOwned { conn, sock } = &mut *stream;
    handshake(conn, sock, LINK_TIMEOUT, &doing, &given_up)?;
    Ok(HostStream::Client(stream))
}

/// Connects to a target VMM without TLS: for a stream that shows a token which came over an authenticated link.
pub fn connect_plain(addr: SocketAddr) -> Result<HostStream, Fault> {
    Ok(HostStream::Plain(dial(addr, None, READ_BUFFER_PLAIN)?))
}

fn doing(addr: SocketAddr) -> String {
    format!("cannot reach the target VMM at {addr}")
}

fn dial(addr: SocketAddr, socket: Option<OwnedFd>, buffer: usize) -> Result<Socket, Fault> {
    let tcp = match socket {
        None => TcpStream::connect_timeout(&addr, LINK_TIMEOUT),
        Some(socket) => connect_given(socket, addr, LINK_TIMEOUT),
    };
    tcp.and_then(|tcp| Socket::new(tcp, buffer))
        .map_err(|error| failure(&doing(addr), &error))
}

/// As `TcpStream::connect_timeout`, on a socket that is there.
fn connect_given(socket: OwnedFd, addr: SocketAddr, at_most: Duration) -> io::Result<TcpStream> {
    let tcp = TcpStream::from(socket);
    tcp.set_nonblocking(true)?;
    match nix::sys::socket::connect(tcp.as_raw_fd(), &SockaddrStorage::from(addr)) {
        Ok(()) => return Ok(tcp),
        Err(Errno::EINPROGRESS | Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let until = Instant::now() + at_most;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(tcp.as_fd(), PollFlags::POLLOUT)], left) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match tcp.take_error()? {
        Some(error) => Err(error),
        None => Ok(tcp),
    }
}

fn unusable(error: &rustls::Error) -> Fault {
    Fault::new(Code::Internal, format!("TLS settings cannot be used: {error}"))
}

/// The target's end of a connection that was just accepted: shakes hands within `timeout`.
pub(super) fn greet(
    tcp: TcpStream,
    tls: &Arc<ServerConfig>,
    timeout: Duration,
    given_up: &dyn Fn() -> bool,
) -> Result<HostStream, Fault> {
    let doing = "the handshake failed";
    prepare(&tcp).map_err(|error| failure(doing, &error))?;
    let conn = UnbufferedServerConnection::new(Arc::clone(tls)).map_err(|error| unusable(&error))?;
    let mut end = Box::new(ReceivingEnd::new(conn, tcp));
    let until = Instant::now() + timeout;
    let over = || given_up() || Instant::now() >= until;
    while end.is_shaking() {
        let shaken = end.shake();
        let goes_on = shaken.as_ref().map_or_else(is_slice_over, |()| true);
        match shaken {
            Err(error) if !goes_on => return Err(failure(doing, &error)),
            _ if over() => return Err(unfinished(doing, timeout, given_up)),
            _ => {}
        }
    }
    Ok(HostStream::Server(end))
}

/// The target's end of a connection without TLS.
pub(super) fn greet_plain(tcp: TcpStream) -> Result<HostStream, Fault> {
    let sock = Socket::new(tcp, READ_BUFFER_PLAIN);
    let sock = sock.map_err(|error| failure("a connection cannot be used", &error))?;
    Ok(HostStream::Plain(sock))
}

fn handshake(
    conn: &mut ClientConnection,
    sock: &mut Socket,
    timeout: Duration,
    doing: &str,
    given_up: &dyn Fn() -> bool,
) -> Result<(), Fault> {
    let until = Instant::now() + timeout;
    let mut hasty = Hasty {
        sock,
        until,
        given_up,
    };
    while conn.is_handshaking() || conn.wants_write() {
        match conn.complete_io(&mut hasty) {
            Ok(_) => {}
            Err(error) if !is_slice_over(&error) => return Err(failure(doing, &error)),
            Err(_) if hasty.over() => return Err(unfinished(doing, timeout, given_up)),
            Err(_) => {}
        }
    }
    Ok(())
}

/// A handshake that was given up, or took too long.
fn unfinished(doing: &str, timeout: Duration, given_up: &dyn Fn() -> bool) -> Fault {
    if given_up() {
        return Fault::new(Code::Cancelled, "the migration was cancelled");
    }
    let message = format!("{doing}: not done in {} ms", timeout.as_millis());
    Fault::new(Code::LinkLost, message)
}
