//! Where a target waits for its source, and then for the streams that carry the pages.
//!
//! Whoever calls is a stranger until its handshake is done and what it showed was checked. Several callers are met at once, each in a
//! thread and with little time; the first who passes is the source. Whoever does not pass is turned away with a line in the log, and
//! the wait goes on.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use drover_proto::{Code, Fault};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;

use super::link::{Link, Stop, Watch};
use super::tls::{HostStream, greet, greet_plain};
use super::{LINK_TIMEOUT, SLICE, failure, is_slice_over};
use crate::codec::{Frame, Message, Refusal};
use crate::control::Control;
use crate::target::Admission;

/// A caller must finish its handshake in this time, and then show its token in the same.
const ACCEPT_HANDSHAKE: Duration = Duration::from_secs(2);
/// So many callers may be shaking hands; further ones wait. The source, which has [`LINK_TIMEOUT`], is kept out only by some thirty
/// strangers before it who all use up their time.
const CALLERS_MAX: usize = 16;
/// How often callers that shake hands are looked after.
const CALLER_GLANCE: Duration = Duration::from_millis(2);

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
    /// own certificate first) is turned away. Ends with `cancelled` when `control` says so. How long a target waits is its
    /// controller's affair.
    ///
    /// `verify` is called from several threads; the first caller who passes is taken.
    pub fn accept(
        &self,
        tls: &Arc<ServerConfig>,
        verify: impl Fn(&[CertificateDer<'_>]) -> Result<(), Fault> + Sync,
        control: &Control,
    ) -> Result<HostStream, Fault> {
        let tls = without_tickets(tls);
        let mut source = None;
        self.meet(
            control,
            None,
            |tcp, given_up| encrypted(tcp, &tls, &verify, given_up),
            |stream| {
                source = Some(stream);
                Ok(true)
            },
        )?;
        source.ok_or_else(|| Fault::new(Code::Internal, "a listener took nobody"))
    }

    /// Waits for the streams that were agreed on, each of which shows the token and which one it is; gives them in that order. With
    /// TLS each caller is verified as in [`Listener::accept`]. They must all be there within [`LINK_TIMEOUT`].
    pub fn accept_streams(
        &self,
        tls: &Arc<ServerConfig>,
        verify: impl Fn(&[CertificateDer<'_>]) -> Result<(), Fault> + Sync,
        admission: &Admission,
        control: &Control,
    ) -> Result<Vec<HostStream>, Fault> {
        let tls = without_tickets(tls);
        let mut streams: Vec<Option<HostStream>> = (0..admission.streams).map(|_| None).collect();
        let met = self.meet(
            control,
            Some(Instant::now() + LINK_TIMEOUT),
            |tcp, given_up| {
                let stream = if admission.plaintext {
                    greet_plain(tcp)?
                } else {
                    encrypted(tcp, &tls, &verify, given_up)?
                };
                joined(stream, admission, given_up)
            },
            |(index, stream)| {
                let slot = streams
                    .get_mut(index)
                    .filter(|slot| slot.is_none())
                    .ok_or_else(|| Fault::new(Code::Denied, format!("stream {index} is there already")))?;
                *slot = Some(stream);
                Ok(streams.iter().all(Option::is_some))
            },
        );
        let came = streams.iter().flatten().count();
        met.map_err(|fault| match fault.code {
            Code::LinkLost => Fault::new(
                Code::LinkLost,
                format!(
                    "{came} of {} streams came in {} ms",
                    admission.streams,
                    LINK_TIMEOUT.as_millis()
                ),
            ),
            _ => fault,
        })?;
        Ok(streams.into_iter().flatten().collect())
    }

    /// Meets callers until `take`, told of each who passed `admit`, says that this is all.
    fn meet<T: Send>(
        &self,
        control: &Control,
        until: Option<Instant>,
        admit: impl Fn(TcpStream, &(dyn Fn() -> bool + Sync)) -> Result<T, Fault> + Sync,
        take: impl FnMut(T) -> Result<bool, Fault>,
    ) -> Result<(), Fault> {
        // Raised when this returns: whoever is shaking hands then is given up.
        let over = AtomicBool::new(false);
        let given_up = || over.load(Ordering::Acquire) || control.is_cancelled();
        let admit = |tcp, from| {
            let admitted = admit(tcp, &given_up);
            if let Err(fault) = &admitted
                && !given_up()
            {
                turned_away(from, fault);
            }
            admitted.ok().map(|passed| (from, passed))
        };
        thread::scope(|scope| {
            let met = self.take_callers(scope, control, until, &admit, take);
            over.store(true, Ordering::Release);
            met
        })
    }

    fn take_callers<'scope, T: Send + 'scope>(
        &self,
        scope: &'scope thread::Scope<'scope, '_>,
        control: &Control,
        until: Option<Instant>,
        admit: &'scope (impl Fn(TcpStream, SocketAddr) -> Option<(SocketAddr, T)> + Sync),
        mut take: impl FnMut(T) -> Result<bool, Fault>,
    ) -> Result<(), Fault> {
        let mut callers: Vec<thread::ScopedJoinHandle<'scope, Option<(SocketAddr, T)>>> = Vec::new();
        while !control.is_cancelled() {
            while let Some(at) = callers.iter().position(thread::ScopedJoinHandle::is_finished) {
                match callers.swap_remove(at).join() {
                    Ok(Some((from, passed))) => match take(passed) {
                        Ok(true) => return Ok(()),
                        Ok(false) => {}
                        Err(fault) => turned_away(from, &fault),
                    },
                    Ok(None) => {}
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Err(Fault::new(Code::LinkLost, "nobody came in time"));
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
            match caller.spawn_scoped(scope, move || admit(tcp, from)) {
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
            Err(error) => Err(failure("cannot accept the source", &error)),
        }
    }
}

fn turned_away(from: SocketAddr, fault: &Fault) {
    tracing::warn!(%from, %fault, "turned away who called for a migration");
}

/// Nothing is ever resumed, and no ticket should lie unread at the source.
fn without_tickets(tls: &Arc<ServerConfig>) -> Arc<ServerConfig> {
    let mut tls = ServerConfig::clone(tls);
    tls.send_tls13_tickets = 0;
    Arc::new(tls)
}

/// A wait of a caller's thread.
struct Waiting<'a>(&'a (dyn Fn() -> bool + Sync));

impl Watch for Waiting<'_> {
    fn stop(&self) -> Option<Stop> {
        (self.0)().then_some(Stop::Cancelled)
    }
}

fn encrypted(
    tcp: TcpStream,
    tls: &Arc<ServerConfig>,
    verify: &(impl Fn(&[CertificateDer<'_>]) -> Result<(), Fault> + Sync),
    given_up: &(dyn Fn() -> bool + Sync),
) -> Result<HostStream, Fault> {
    let stream = greet(tcp, tls, ACCEPT_HANDSHAKE, given_up)?;
    if let Err(fault) = verify(stream.peer_certificates()) {
        let watch = Waiting(given_up);
        let mut link = Link::new(stream, LINK_TIMEOUT, &watch)?;
        link.last_word(&Message::Refusal(Refusal::from(&fault)));
        link.drain();
        return Err(fault);
    }
    Ok(stream)
}

/// Reads a stream's first frame; gives which of the agreed streams it is.
fn joined(
    stream: HostStream,
    admission: &Admission,
    given_up: &(dyn Fn() -> bool + Sync),
) -> Result<(usize, HostStream), Fault> {
    let until = Instant::now() + ACCEPT_HANDSHAKE;
    let in_time = move || given_up() || Instant::now() >= until;
    let watch = Waiting(&in_time);
    let mut link = Link::new(stream, ACCEPT_HANDSHAKE, &watch)?;
    let mut buffer = Vec::new();
    let join = match link.receive(&mut buffer) {
        Ok((Frame::Message(Message::Join(join)), _)) => join,
        Ok((frame, _)) => {
            let message = format!("a stream began with {:?}, not with its token", frame.kind());
            return Err(Fault::new(Code::BadFrame, message));
        }
        Err(Stop::Failed(fault)) => return Err(fault),
        Err(Stop::Cancelled) => return Err(Fault::new(Code::LinkLost, "a stream showed no token in time")),
    };
    if !admission.admits(&join) {
        return Err(Fault::new(
            Code::Denied,
            format!(
                "stream {} showed a token that is not this migration's, or was not agreed on",
                join.stream
            ),
        ));
    }
    Ok((join.stream as usize, link.into_stream()))
}
