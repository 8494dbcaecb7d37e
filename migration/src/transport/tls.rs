//! TCP with mutual TLS. The settings come from the caller; here the peer's name is checked and time is bounded.

use std::io::{self, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::ops::DerefMut;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_proto::{Code, Fault};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, ServerConfig, ServerConnection, SideData, StreamOwned,
};

use super::{LINK_TIMEOUT, Link, SLICE, Stream, failure, is_slice_over};
use crate::codec::{Message, Refusal};
use crate::control::Control;

/// Bytes read from the socket at once: the TLS library asks for a few KiB at a time.
const READ_BUFFER: usize = 256 << 10;
/// Encrypted bytes that may wait for the socket.
const WRITE_BUFFER: usize = 256 << 10;
/// A caller must finish its handshake in this time, so that a stranger who says nothing does not keep the source out.
const ACCEPT_HANDSHAKE: Duration = Duration::from_secs(2);

/// A TCP socket that is read in large pieces.
#[derive(Debug)]
pub struct Socket(BufReader<TcpStream>);

impl Socket {
    fn new(tcp: TcpStream) -> io::Result<Self> {
        tcp.set_nonblocking(false)?;
        tcp.set_nodelay(true)?;
        tcp.set_slice(SLICE)?;
        Ok(Self(BufReader::with_capacity(READ_BUFFER, tcp)))
    }
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

/// The source's end of a link between two hosts.
pub type ClientStream = StreamOwned<ClientConnection, Socket>;
/// The target's end of a link between two hosts.
pub type ServerStream = StreamOwned<ServerConnection, Socket>;

impl Stream for ClientStream {
    fn set_slice(&self, slice: Duration) -> io::Result<()> {
        self.sock.0.get_ref().set_slice(slice)
    }
}

impl Stream for ServerStream {
    fn set_slice(&self, slice: Duration) -> io::Result<()> {
        self.sock.0.get_ref().set_slice(slice)
    }
}

/// Connects to a target VMM and verifies that its certificate carries the DNS name `server_name`
/// (`<host>.host.drover`).
pub fn connect(
    addr: SocketAddr,
    server_name: &str,
    tls: Arc<ClientConfig>,
    control: &Control,
) -> Result<ClientStream, Fault> {
    let doing = format!("cannot reach the target VMM at {addr}");
    let name = ServerName::try_from(server_name.to_owned()).map_err(|_| {
        Fault::new(Code::InvalidArgument, format!("{server_name:?} is no DNS name")).field("target_host")
    })?;
    let tcp = TcpStream::connect_timeout(&addr, LINK_TIMEOUT);
    let sock = tcp
        .and_then(Socket::new)
        .map_err(|error| failure(&doing, &error))?;
    let mut conn = ClientConnection::new(tls, name)
        .map_err(|error| Fault::new(Code::Internal, format!("TLS settings cannot be used: {error}")))?;
    conn.set_buffer_limit(Some(WRITE_BUFFER));
    let mut stream = StreamOwned::new(conn, sock);
    handshake(&mut stream.conn, &mut stream.sock, LINK_TIMEOUT, &doing, control)?;
    Ok(stream)
}

/// Where a target VMM waits for its source.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
}

impl Listener {
    /// Listens on a free port of `ip`.
    pub fn bind(ip: IpAddr) -> Result<Self, Fault> {
        let bound = TcpListener::bind((ip, 0)).and_then(|socket| {
            socket.set_nonblocking(true)?;
            Ok(Self { socket })
        });
        bound.map_err(|error| Fault::new(Code::VmmStartFailed, format!("cannot listen on {ip}: {error}")))
    }

    /// The address with the port that the kernel chose.
    pub fn addr(&self) -> Result<SocketAddr, Fault> {
        let addr = self.socket.local_addr();
        addr.map_err(|error| Fault::new(Code::Internal, format!("a listener without an address: {error}")))
    }

    /// Waits for the source. Whoever fails the TLS handshake or `verify` (which gets the peer's certificate chain, its
    /// own certificate first) is turned away with a line in the log, and the wait goes on. Ends with `cancelled` when
    /// `control` says so. How long a target waits is its controller's affair.
    pub fn accept(
        self,
        tls: Arc<ServerConfig>,
        verify: impl Fn(&[CertificateDer<'_>]) -> Result<(), Fault>,
        control: &Control,
    ) -> Result<ServerStream, Fault> {
        // One connection a target: nothing is ever resumed, and no ticket should lie unread at the source.
        let mut tls = ServerConfig::clone(&tls);
        tls.send_tls13_tickets = 0;
        let tls = Arc::new(tls);
        while !control.is_cancelled() {
            let Some((tcp, from)) = self.next_caller()? else {
                continue;
            };
            match admit(tcp, Arc::clone(&tls), &verify, control) {
                Ok(stream) => return Ok(stream),
                Err(fault) => tracing::warn!(%from, %fault, "turned away who called for a migration"),
            }
        }
        Err(Fault::new(
            Code::Cancelled,
            "the wait for the source was cancelled",
        ))
    }

    /// Who calls within a slice.
    fn next_caller(&self) -> Result<Option<(TcpStream, SocketAddr)>, Fault> {
        let slice = PollTimeout::try_from(SLICE).expect("a slice is short");
        let _ready = poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], slice);
        match self.socket.accept() {
            Ok(caller) => Ok(Some(caller)),
            // A caller who hung up before being accepted is not the listener's failure.
            Err(error) if is_slice_over(&error) || error.kind() == io::ErrorKind::ConnectionAborted => {
                Ok(None)
            }
            Err(error) => Err(Fault::new(
                Code::TargetFailed,
                format!("cannot accept the source: {error}"),
            )),
        }
    }
}

fn admit(
    tcp: TcpStream,
    tls: Arc<ServerConfig>,
    verify: &impl Fn(&[CertificateDer<'_>]) -> Result<(), Fault>,
    control: &Control,
) -> Result<ServerStream, Fault> {
    let doing = "the handshake failed";
    let sock = Socket::new(tcp).map_err(|error| failure(doing, &error))?;
    let mut conn = ServerConnection::new(tls)
        .map_err(|error| Fault::new(Code::Internal, format!("TLS settings cannot be used: {error}")))?;
    conn.set_buffer_limit(Some(WRITE_BUFFER));
    let mut stream = StreamOwned::new(conn, sock);
    handshake(
        &mut stream.conn,
        &mut stream.sock,
        ACCEPT_HANDSHAKE,
        doing,
        control,
    )?;
    match verify(stream.conn.peer_certificates().unwrap_or_default()) {
        Ok(()) => Ok(stream),
        Err(fault) => {
            let mut link = Link::new(stream, LINK_TIMEOUT, control)?;
            link.last_word(&Message::Refusal(Refusal::from(&fault)));
            link.drain();
            Err(fault)
        }
    }
}

fn handshake<D: SideData>(
    conn: &mut impl DerefMut<Target = ConnectionCommon<D>>,
    sock: &mut Socket,
    timeout: Duration,
    doing: &str,
    control: &Control,
) -> Result<(), Fault> {
    let until = Instant::now() + timeout;
    while conn.is_handshaking() || conn.wants_write() {
        match conn.complete_io(sock) {
            Ok(_) => {}
            Err(error) if !is_slice_over(&error) => return Err(failure(doing, &error)),
            Err(_) if control.is_cancelled() => {
                return Err(Fault::new(Code::Cancelled, "the migration was cancelled"));
            }
            Err(_) if Instant::now() >= until => {
                return Err(Fault::new(
                    Code::LinkLost,
                    format!("{doing}: no answer in {} ms", timeout.as_millis()),
                ));
            }
            Err(_) => {}
        }
    }
    Ok(())
}
