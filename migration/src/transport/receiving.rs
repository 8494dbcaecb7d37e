//! The target's end of an encrypted connection. Nearly all of a migration's bytes are decrypted here, so they are handled
//! as little as the TLS library allows: read into one buffer that is used again and again, decrypted there, and taken from there to where they are
//! wanted. The library's own stream would copy each byte twice more.
//!
//! ```text
//!  socket ──▶ wire[from..to] ── decrypted in place, a record at a time ──▶ the caller's buffer
//!                                                            └──▶ rest, what the caller had no room for
//!  socket ◀── outgoing ◀── handshake, answers, alerts
//! ```

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;

use rustls::pki_types::CertificateDer;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};

/// Encrypted bytes that are read at once. Half of a processor's second-level cache, or less: what was read is still there when it is decrypted.
const WIRE_BYTES: usize = 256 << 10;
/// Plain bytes that are encrypted at once; the target sends next to nothing.
const WRITE_BYTES: usize = 16 << 10;
/// Longest alert, as a record: RFC 8446, sections 5 and 6.
const ALERT_BYTES_MAX: usize = 64;

/// See the module.
pub struct ReceivingEnd {
    conn: UnbufferedServerConnection,
    tcp: TcpStream,
    wire: Vec<u8>,
    from: usize,
    to: usize,
    rest: Vec<u8>,
    rest_taken: usize,
    outgoing: Vec<u8>,
    outgoing_sent: usize,
    /// The peer said that nothing more will come.
    closed: bool,
    /// Something that came could not be read: the library is not to be asked again.
    failed: bool,
}

/// What one turn came to.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    /// So many bytes were given to the caller. More of them may have come to `rest`.
    Data(usize),
    /// Something was done.
    On,
    /// What was to be sent is encrypted.
    Encrypted,
    /// Nothing can be done before more bytes come.
    Hungry,
}

impl ReceivingEnd {
    /// An end whose handshake is still to be made: with [`ReceivingEnd::shake`].
    pub fn new(conn: UnbufferedServerConnection, tcp: TcpStream) -> Self {
        Self {
            conn,
            tcp,
            wire: vec![0; WIRE_BYTES],
            from: 0,
            to: 0,
            rest: Vec::new(),
            rest_taken: 0,
            outgoing: Vec::new(),
            outgoing_sent: 0,
            closed: false,
            failed: false,
        }
    }

    /// The socket.
    pub fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// The peer's certificates, its own first.
    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'_>]> {
        self.conn.peer_certificates()
    }

    /// Whether [`ReceivingEnd::shake`] has something left to do.
    pub fn is_shaking(&self) -> bool {
        self.conn.is_handshaking() || self.outgoing_sent < self.outgoing.len()
    }

    /// A step of the handshake, with one read or write of the socket at most.
    pub fn shake(&mut self) -> io::Result<()> {
        if self.outgoing_sent < self.outgoing.len() {
            return self.send_some();
        }
        match self.turn(&mut [], &[])? {
            // What came last has completed the handshake.
            Turn::Hungry if !self.conn.is_handshaking() => Ok(()),
            Turn::Hungry if self.closed => Err(ErrorKind::UnexpectedEof.into()),
            Turn::Hungry => self.fetch(),
            _ => Ok(()),
        }
    }

    /// Lets the library look at what has come. Plain bytes go to `out` as far as there is room; `message` is encrypted, if it is not
    /// empty, once nothing else is to be done.
    fn turn(&mut self, out: &mut [u8], message: &[u8]) -> io::Result<Turn> {
        if self.failed {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let wire = &mut self.wire[self.from..self.to];
        let UnbufferedStatus { discard, state } = self.conn.process_tls_records(wire);
        let mut used = discard;
        let turn = match state {
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                let mut given = 0;
                while let Some(record) = traffic.next_record() {
                    let record = record.map_err(broken)?;
                    used += record.discard;
                    let fits = record.payload.len().min(out.len() - given);
                    let (now, later) = record.payload.split_at(fits);
                    out[given..given + fits].copy_from_slice(now);
                    self.rest.extend_from_slice(later);
                    given += fits;
                }
                Ok(Turn::Data(given))
            }
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                let at = self.outgoing.len();
                match data.encode(&mut []) {
                    Err(EncodeError::InsufficientSize(size)) => {
                        self.outgoing.resize(at + size.required_size, 0);
                        let encoded = data.encode(&mut self.outgoing[at..]);
                        encoded.map(|_| Turn::On).map_err(broken)
                    }
                    done => done.map(|_| Turn::On).map_err(broken),
                }
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                // It is in `outgoing`, and leaves before anything else does.
                data.done();
                Ok(Turn::On)
            }
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                self.closed = true;
                Ok(Turn::Hungry)
            }
            Ok(ConnectionState::WriteTraffic(mut traffic)) if !message.is_empty() => {
                let at = self.outgoing.len();
                match traffic.encrypt(message, &mut []) {
                    Err(EncryptError::InsufficientSize(size)) => {
                        self.outgoing.resize(at + size.required_size, 0);
                        let encrypted = traffic.encrypt(message, &mut self.outgoing[at..]);
                        encrypted.map(|_| Turn::Encrypted).map_err(broken)
                    }
                    done => done.map(|_| Turn::Encrypted).map_err(broken),
                }
            }
            Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => Ok(Turn::Hungry),
            Ok(other) => Err(broken(format!("{other:?} is not expected"))),
            Err(error) => Err(broken(error)),
        };
        self.from += used;
        if turn.is_err() {
            self.say_why();
        }
        turn
    }

    /// Reads from the socket; there is room for a whole record at least.
    fn fetch(&mut self) -> io::Result<()> {
        self.wire.copy_within(self.from..self.to, 0);
        (self.from, self.to) = (0, self.to - self.from);
        match self.tcp.read(&mut self.wire[self.to..])? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            count => {
                self.to += count;
                Ok(())
            }
        }
    }

    fn send_some(&mut self) -> io::Result<()> {
        match self.tcp.write(&self.outgoing[self.outgoing_sent..])? {
            0 => return Err(ErrorKind::WriteZero.into()),
            count => self.outgoing_sent += count,
        }
        if self.outgoing_sent == self.outgoing.len() {
            self.outgoing.clear();
            self.outgoing_sent = 0;
        }
        Ok(())
    }

    /// After a failure the library may have an alert for the peer, whom it reaches if the socket takes it at once.
    fn say_why(&mut self) {
        self.failed = true;
        let wire = &mut self.wire[self.from..self.to];
        // Asked once: what is to be sent comes before anything that was received is looked at again.
        if let Ok(ConnectionState::EncodeTlsData(mut data)) = self.conn.process_tls_records(wire).state {
            let mut alert = [0; ALERT_BYTES_MAX];
            if let Ok(length) = data.encode(&mut alert) {
                self.outgoing.extend_from_slice(&alert[..length]);
                let _ = self.tcp.write(&self.outgoing[self.outgoing_sent..]);
            }
        }
        self.outgoing.clear();
        self.outgoing_sent = 0;
    }
}

impl fmt::Debug for ReceivingEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReceivingEnd")
            .field("tcp", &self.tcp)
            .finish_non_exhaustive()
    }
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}

impl Read for ReceivingEnd {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.rest_taken < self.rest.len() {
            let left = &self.rest[self.rest_taken..];
            let count = left.len().min(out.len());
            out[..count].copy_from_slice(&left[..count]);
            self.rest_taken += count;
            return Ok(count);
        }
        self.rest.clear();
        self.rest_taken = 0;
        let mut given = 0;
        while given < out.len() {
            match self.turn(&mut out[given..], &[])? {
                Turn::Data(count) => given += count,
                Turn::On | Turn::Encrypted => {}
                Turn::Hungry if given > 0 || self.closed => break,
                Turn::Hungry if self.outgoing_sent < self.outgoing.len() => self.send_some()?,
                Turn::Hungry => self.fetch()?,
            }
        }
        Ok(given)
    }
}

impl Write for ReceivingEnd {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.flush()?;
        let bytes = &bytes[..bytes.len().min(WRITE_BYTES)];
        if bytes.is_empty() {
            return Ok(0);
        }
        let mut closing = false;
        loop {
            match self.turn(&mut [], bytes)? {
                Turn::Encrypted => return Ok(bytes.len()),
                // A peer that will say nothing more may still be spoken to; that state comes once.
                Turn::Hungry if self.closed && !std::mem::replace(&mut closing, true) => {}
                Turn::Hungry => return Err(ErrorKind::BrokenPipe.into()),
                Turn::Data(_) | Turn::On => {}
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.outgoing_sent < self.outgoing.len() {
            self.send_some()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::Arc;
    use std::thread;

    use drover_pki::{ClusterCa, Credentials, Role, TlsFiles, host_dns};
    use rustls::ClientConnection;
    use rustls::pki_types::ServerName;

    use super::*;

    /// A library's own connection to an end, shaken hands on both sides.
    fn pair() -> (rustls::StreamOwned<ClientConnection, TcpStream>, ReceivingEnd) {
        let dir = tempfile::tempdir().unwrap();
        let ca = ClusterCa::create("test").unwrap();
        let credentials = ["host1", "host2"].map(|host| {
            ca.issue_to(dir.path(), Role::Host, host).unwrap();
            let file = |ending: &str| dir.path().join(format!("{host}.{ending}"));
            let files = TlsFiles {
                ca: dir.path().join("ca.pem"),
                cert: file("pem"),
                key: file("key"),
            };
            Credentials::load(&files, "test").unwrap()
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let client = credentials[0].rustls_client();
        let caller = thread::spawn(move || {
            let name = ServerName::try_from(host_dns("host2")).unwrap();
            let mut conn = ClientConnection::new(client, name).unwrap();
            let mut tcp = TcpStream::connect(addr).unwrap();
            while conn.is_handshaking() || conn.wants_write() {
                conn.complete_io(&mut tcp).unwrap();
            }
            rustls::StreamOwned::new(conn, tcp)
        });
        let mut config = rustls::ServerConfig::clone(&credentials[1].rustls_server());
        config.send_tls13_tickets = 0;
        let conn = UnbufferedServerConnection::new(Arc::new(config)).unwrap();
        let mut end = ReceivingEnd::new(conn, listener.accept().unwrap().0);
        while end.is_shaking() {
            end.shake().unwrap();
        }
        (caller.join().unwrap(), end)
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 7 / 3) as u8).collect()
    }

    #[test]
    fn bytes_arrive_in_order_whatever_the_pieces_across_a_renewal_of_keys_until_the_peer_closes() {
        let (mut client, mut end) = pair();
        let sent = pattern(3 << 20);
        let content = sent.clone();
        let sender = thread::spawn(move || {
            for (number, piece) in content.chunks(70_001).enumerate() {
                client.write_all(piece).unwrap();
                if number % 5 == 3 {
                    client.conn.refresh_traffic_keys().unwrap();
                }
            }
            client.flush().unwrap();
            let mut answer = [0; 6];
            client.read_exact(&mut answer).unwrap();
            client.conn.send_close_notify();
            client.flush().unwrap();
            answer
        });
        let mut got = vec![0; sent.len()];
        let (mut filled, mut size) = (0, 1);
        while filled < got.len() {
            let until = got.len().min(filled + size);
            filled += end.read(&mut got[filled..until]).unwrap();
            size = size * 3 % 300_007;
        }
        assert!(got == sent, "something was lost or changed");
        end.write_all(b"answer").unwrap();
        end.flush().unwrap();
        assert_eq!(&sender.join().unwrap(), b"answer");
        for _ in 0..2 {
            assert_eq!(end.read(&mut [0; 9]).unwrap(), 0, "and it stays closed");
        }
    }

    #[test]
    fn a_byte_that_changed_on_the_way_is_an_error_and_none_of_its_record_comes_out() {
        let (mut client, mut end) = pair();
        let mut record = Vec::new();
        client.conn.writer().write_all(&pattern(1000)).unwrap();
        client.conn.write_tls(&mut record).unwrap();
        record[500] ^= 1;
        client.sock.write_all(&record).unwrap();
        let error = end.read(&mut [0; 1000]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        assert_eq!(end.read(&mut [0; 9]).unwrap_err().kind(), ErrorKind::BrokenPipe);
        assert_eq!(end.write(b"why").unwrap_err().kind(), ErrorKind::BrokenPipe);
        let told = client.read(&mut [0; 10]).unwrap_err();
        assert!(told.to_string().contains("alert"), "{told}");
    }

    #[test]
    fn a_socket_that_ends_without_a_word_is_told_from_a_peer_that_closes() {
        let (client, mut end) = pair();
        drop(client.sock);
        let error = end.read(&mut [0; 10]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }
}
