//! TCP with mutual TLS. The settings come from the caller; here the peer's name is checked and time is bounded.
//!
//! Until its handshake is done a peer is a stranger, who may send a byte now and then for ever. So the clock and the cancel flag are looked at
//! before every read of the socket ([`Hasty`]), and a listener shakes hands with several callers at once, each in a thread.

use std::io::{self, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::ops::DerefMut;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
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
/// A caller must finish its handshake in this time.
const ACCEPT_HANDSHAKE: Duration = Duration::from_secs(2);
/// So many callers may be shaking hands; further ones wait. The source, which has [`LINK_TIMEOUT`], is kept out only by some thirty
/// strangers before it who all use up their time.
const CALLERS_MAX: usize = 16;
/// How often callers that shake hands are looked after.
const CALLER_GLANCE: Duration = Duration::from_millis(2);

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
    let given_up = || control.is_cancelled();
    handshake(
        &mut stream.conn,
        &mut stream.sock,
        LINK_TIMEOUT,
        &doing,
        &given_up,
    )?;
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
    ///
    /// `verify` is called from several threads; the first caller who passes is taken.
    pub fn accept(
        self,
        tls: Arc<ServerConfig>,
        verify: impl Fn(&[CertificateDer<'_>]) -> Result<(), Fault> + Sync,
        control: &Control,
    ) -> Result<ServerStream, Fault> {
        // One connection a target: nothing is ever resumed, and no ticket should lie unread at the source.
        let mut tls = ServerConfig::clone(&tls);
        tls.send_tls13_tickets = 0;
        let tls = Arc::new(tls);
        // Raised when this returns: whoever is shaking hands then is given up.
        let over = AtomicBool::new(false);
        let door = Door {
            tls,
            verify: &verify,
            control,
            over: &over,
        };
        thread::scope(|scope| {
            let taken = self.take_callers(scope, &door);
            over.store(true, Ordering::Release);
            taken
        })
    }

    fn take_callers<'scope, 'env, V>(
        &self,
        scope: &'scope thread::Scope<'scope, 'env>,
        door: &'scope Door<'_, V>,
    ) -> Result<ServerStream, Fault>
    where
        V: Fn(&[CertificateDer<'_>]) -> Result<(), Fault> + Sync,
    {
        let mut callers: Vec<thread::ScopedJoinHandle<'scope, Option<ServerStream>>> = Vec::new();
        while !door.control.is_cancelled() {
            while let Some(at) = callers.iter().position(thread::ScopedJoinHandle::is_finished) {
                match callers.swap_remove(at).join() {
                    Ok(Some(stream)) => return Ok(stream),
                    Ok(None) => {}
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            if callers.len() == CALLERS_MAX {
                thread::sleep(CALLER_GLANCE);
                continue;
            }
            let patience = if callers.is_empty() { SLICE } else { CALLER_GLANCE };
            let Some((tcp, from)) = self.next_caller(patience)? else {
                continue;
            };
            let caller = thread::Builder::new().name("caller".to_owned());
            match caller.spawn_scoped(scope, move || door.admit_or_log(tcp, from)) {
                Ok(caller) => callers.push(caller),
                Err(error) => tracing::warn!(%from, %error, "no thread for who called for a migration"),
            }
        }
        Err(Fault::new(
            Code::Cancelled,
            "the wait for the source was cancelled",
        ))
    }

    /// Who calls within a while.
    fn next_caller(&self, patience: Duration) -> Result<Option<(TcpStream, SocketAddr)>, Fault> {
        let slice = PollTimeout::try_from(patience).expect("a slice is short");
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

/// What every caller of a listener is met with.
struct Door<'a, V> {
    tls: Arc<ServerConfig>,
    verify: &'a V,
    control: &'a Control,
    over: &'a AtomicBool,
}

impl<V: Fn(&[CertificateDer<'_>]) -> Result<(), Fault>> Door<'_, V> {
    fn given_up(&self) -> bool {
        self.over.load(Ordering::Acquire) || self.control.is_cancelled()
    }

    fn admit_or_log(&self, tcp: TcpStream, from: SocketAddr) -> Option<ServerStream> {
        let admitted = self.admit(tcp);
        if let Err(fault) = &admitted
            && !self.given_up()
        {
            tracing::warn!(%from, %fault, "turned away who called for a migration");
        }
        admitted.ok()
    }

    fn admit(&self, tcp: TcpStream) -> Result<ServerStream, Fault> {
        let doing = "the handshake failed";
        let sock = Socket::new(tcp).map_err(|error| failure(doing, &error))?;
        let mut conn = ServerConnection::new(Arc::clone(&self.tls))
            .map_err(|error| Fault::new(Code::Internal, format!("TLS settings cannot be used: {error}")))?;
        conn.set_buffer_limit(Some(WRITE_BUFFER));
        let mut stream = StreamOwned::new(conn, sock);
        let given_up = || self.given_up();
        handshake(
            &mut stream.conn,
            &mut stream.sock,
            ACCEPT_HANDSHAKE,
            doing,
            &given_up,
        )?;
        match (self.verify)(stream.conn.peer_certificates().unwrap_or_default()) {
            Ok(()) => Ok(stream),
            Err(fault) => {
                let mut link = Link::new(stream, LINK_TIMEOUT, self.control)?;
                link.last_word(&Message::Refusal(Refusal::from(&fault)));
                link.drain();
                Err(fault)
            }
        }
    }
}

fn handshake<D: SideData>(
    conn: &mut impl DerefMut<Target = ConnectionCommon<D>>,
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
            Err(_) if given_up() => {
                return Err(Fault::new(Code::Cancelled, "the migration was cancelled"));
            }
            Err(_) if hasty.over() => {
                let message = format!("{doing}: not done in {} ms", timeout.as_millis());
                return Err(Fault::new(Code::LinkLost, message));
            }
            Err(_) => {}
        }
    }
    Ok(())
}
