//! Streams, connections, TLS.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use drover_proto::{Code, Fault};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection, StreamOwned};

use crate::control::Control;

/// A link that moves no byte for so long counts as lost.
pub const LINK_TIMEOUT: Duration = Duration::from_secs(5);

/// A blocking byte stream whose calls return `WouldBlock` or `TimedOut` after a while, so that its user can look at a
/// clock and a cancel flag in between.
pub trait Stream: Read + Write {
    /// Bounds how long one `read` or `write` blocks.
    fn set_slice(&self, slice: Duration) -> io::Result<()>;
}

/// The source's end of a link between two hosts.
pub type ClientStream = StreamOwned<ClientConnection, TcpStream>;
/// The target's end of a link between two hosts.
pub type ServerStream = StreamOwned<ServerConnection, TcpStream>;

/// Connects to a target VMM and verifies that its certificate carries the DNS name `server_name`
/// (`<host>.host.drover`).
pub fn connect(
    addr: SocketAddr,
    server_name: &str,
    tls: Arc<ClientConfig>,
    control: &Control,
) -> Result<ClientStream, Fault> {
    let _ = (addr, server_name, tls, control);
    Err(Fault::new(Code::Internal, "not there yet"))
}

/// Where a target VMM waits for its source.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
}

impl Listener {
    /// Listens on a free port of `ip`.
    pub fn bind(ip: IpAddr) -> Result<Self, Fault> {
        TcpListener::bind((ip, 0))
            .map(|socket| Self { socket })
            .map_err(|error| Fault::new(Code::VmmStartFailed, format!("cannot listen on {ip}: {error}")))
    }

    /// The address with the port that the kernel chose.
    pub fn addr(&self) -> Result<SocketAddr, Fault> {
        self.socket
            .local_addr()
            .map_err(|error| Fault::new(Code::Internal, format!("no local address: {error}")))
    }

    /// Waits for the source. Whoever fails the TLS handshake or `verify` (which gets the peer's certificate chain, its
    /// own certificate first) is turned away with a line in the log, and the wait goes on. Ends with `cancelled` when
    /// `control` says so.
    pub fn accept(
        self,
        tls: Arc<ServerConfig>,
        verify: impl Fn(&[CertificateDer<'_>]) -> Result<(), Fault>,
        control: &Control,
    ) -> Result<ServerStream, Fault> {
        let _ = (tls, verify, control);
        Err(Fault::new(Code::Internal, "not there yet"))
    }
}
