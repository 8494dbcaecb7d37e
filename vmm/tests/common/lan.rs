//! A network of the test's own: a namespace without a name, which goes with the last thread in it, a bridge, taps on it, and a pinger.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// The guest's address; the host's is the first of the network.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const PAYLOAD_BYTES: usize = 56;
/// How long a wait for the next echo lasts at most before it is asked whether the pinger ends.
const LOOK_MS: i64 = 20;

/// Whether this thread is in a network of its own now; says loudly when it cannot be.
pub fn lan() -> bool {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        println!("SKIPPED: a network namespace: {error}");
        return false;
    }
    if let Err(error) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
    {
        println!("SKIPPED: /dev/net/tun: {error}");
        return false;
    }
    for words in [
        "link set lo up",
        "link add br0 type bridge forward_delay 0",
        "addr add 10.77.0.1/24 dev br0",
        "link set br0 up",
    ] {
        ip(words);
    }
    true
}

/// Ends the test, loudly, where it can have no network of its own.
#[macro_export]
macro_rules! needs_lan {
    () => {
        if !lan::lan() {
            return;
        }
    };
}

/// Runs `ip` with `words`.
pub fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}");
}

/// A tap on the bridge, as an agent makes it.
pub fn tap(name: &str) {
    ip(&format!("tuntap add {name} mode tap vnet_hdr"));
    ip(&format!("link set {name} master br0 up"));
}

/// Waits until the bridge knows that `mac` is behind `tap`.
pub fn await_learned(mac: &str, tap: &str) {
    let began = Instant::now();
    loop {
        let known = Command::new("bridge")
            .args(["fdb", "show", "br", "br0"])
            .output()
            .unwrap();
        let known = String::from_utf8(known.stdout).unwrap();
        if known
            .lines()
            .any(|line| line.starts_with(&format!("{mac} dev {tap} ")))
        {
            return;
        }
        assert!(
            began.elapsed() < super::common::PATIENCE,
            "{mac} is not behind {tap}:\n{known}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What became of an echo.
#[derive(Clone, Debug)]
pub struct Echo {
    pub sent: Instant,
    /// When it came back, each time.
    pub back: Vec<Instant>,
}

#[derive(Default)]
struct Seen {
    echoes: Vec<Echo>,
    damaged: u32,
}

/// Sends echo requests to the guest and writes down what comes back.
pub struct Pinger {
    seen: Arc<Mutex<Seen>>,
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

fn payload(sequence: u16) -> [u8; PAYLOAD_BYTES] {
    std::array::from_fn(|at| u8::try_from((usize::from(sequence) * 31 + at * 7) % 256).unwrap())
}

fn request(id: u16, sequence: u16) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0];
    message.extend(id.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    message.extend(payload(sequence));
    let mut sum: u32 = message
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let check = !u16::try_from(sum).unwrap();
    message[2..4].copy_from_slice(&check.to_be_bytes());
    message
}

impl Pinger {
    /// `burst` requests at once, every `every`.
    pub fn start(every: Duration, burst: u32) -> Self {
        let socket = || {
            socket(
                AddressFamily::Inet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::Icmp,
            )
        };
        let (out, back) = (socket().unwrap(), socket().unwrap());
        setsockopt(&back, sockopt::ReceiveTimeout, &TimeVal::milliseconds(LOOK_MS)).unwrap();
        setsockopt(&back, sockopt::RcvBuf, &(4 << 20)).unwrap();
        let id = u16::try_from(out.as_raw_fd()).unwrap() ^ 0x5a5a;
        let (seen, over) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicBool>::default());
        let sender = {
            let (seen, over) = (seen.clone(), over.clone());
            std::thread::spawn(move || send(&out, id, every, burst, &seen, &over))
        };
        let receiver = {
            let (seen, over) = (seen.clone(), over.clone());
            std::thread::spawn(move || receive(&back, id, &seen, &over))
        };
        Self {
            seen,
            over,
            threads: vec![sender, receiver],
        }
    }

    /// All echoes so far, in the order in which they were sent.
    pub fn echoes(&self) -> Vec<Echo> {
        self.seen.lock().unwrap().echoes.clone()
    }

    /// How many requests were sent.
    pub fn sent(&self) -> usize {
        self.seen.lock().unwrap().echoes.len()
    }

    /// Waits until `count` requests that are sent from now on were answered.
    pub fn await_answers(&self, count: usize) {
        let (from, began) = (self.sent(), Instant::now());
        loop {
            let answered = |seen: &Seen| {
                let later = &seen.echoes[from..];
                later.iter().filter(|echo| !echo.back.is_empty()).count()
            };
            if answered(&self.seen.lock().unwrap()) >= count {
                return;
            }
            assert!(began.elapsed() < super::common::PATIENCE, "no echoes come back");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until `count` requests more are sent.
    pub fn await_sent(&self, count: usize) {
        let (from, began) = (self.sent(), Instant::now());
        while self.sent() < from + count {
            assert!(began.elapsed() < super::common::PATIENCE, "nothing is sent");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends no more, and gives all echoes once those that were sent last have come back, or do not.
    pub fn stop(mut self) -> Vec<Echo> {
        self.await_answers(5);
        self.end();
        let seen = self.seen.lock().unwrap();
        assert_eq!(seen.damaged, 0, "echoes came back with other contents");
        // The last ones may be under way.
        seen.echoes[..seen.echoes.len() - 5].to_vec()
    }

    fn end(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn send(socket: &OwnedFd, id: u16, every: Duration, burst: u32, seen: &Mutex<Seen>, over: &AtomicBool) {
    let to = SockaddrIn::from(std::net::SocketAddrV4::new(GUEST, 0));
    let mut next = Instant::now();
    while !over.load(Ordering::Relaxed) {
        for _ in 0..burst {
            let mut seen = seen.lock().unwrap();
            let Ok(sequence) = u16::try_from(seen.echoes.len()) else {
                return;
            };
            seen.echoes.push(Echo {
                sent: Instant::now(),
                back: Vec::new(),
            });
            drop(seen);
            // A host whose question for the guest's address was not answered says so here.
            let _ = sendto(socket.as_raw_fd(), &request(id, sequence), &to, MsgFlags::empty());
        }
        next += every;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn receive(socket: &OwnedFd, id: u16, seen: &Mutex<Seen>, over: &AtomicBool) {
    let mut packet = [0; 2048];
    while !over.load(Ordering::Relaxed) {
        let len = match recv(socket.as_raw_fd(), &mut packet, MsgFlags::empty()) {
            Ok(len) => len,
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => continue,
            Err(error) => panic!("{}", io::Error::from(error)),
        };
        let back = Instant::now();
        // After the IP header: type, code, checksum, id, sequence.
        let message = &packet[usize::from(packet[0] & 0xf) * 4..len];
        if message.len() < 8 || message[0] != 0 || message[4..6] != id.to_be_bytes() {
            continue;
        }
        let sequence = u16::from_be_bytes([message[6], message[7]]);
        let mut seen = seen.lock().unwrap();
        seen.damaged += u32::from(message[8..] != payload(sequence));
        if let Some(echo) = seen.echoes.get_mut(usize::from(sequence)) {
            echo.back.push(back);
        }
    }
}

/// What the outside saw of a guest that was moved.
#[derive(Debug)]
pub struct Outside {
    pub sent: usize,
    /// Echoes that never came, one number a run of them.
    pub lost: Vec<usize>,
    pub twice: usize,
    /// The longest that an echo took which came.
    pub slowest: Duration,
    /// The longest time between two echoes that came back.
    pub silence: Duration,
}

impl Outside {
    pub fn of(echoes: &[Echo]) -> Self {
        let runs = echoes.chunk_by(|a, b| a.back.is_empty() == b.back.is_empty());
        let mut came: Vec<Instant> = echoes
            .iter()
            .flat_map(|echo| echo.back.first().copied())
            .collect();
        came.sort();
        Self {
            sent: echoes.len(),
            lost: runs
                .filter(|run| run[0].back.is_empty())
                .map(<[Echo]>::len)
                .collect(),
            twice: echoes.iter().filter(|echo| echo.back.len() > 1).count(),
            slowest: echoes
                .iter()
                .filter_map(|echo| Some(*echo.back.first()? - echo.sent))
                .max()
                .unwrap_or_default(),
            silence: came
                .windows(2)
                .map(|pair| pair[1] - pair[0])
                .max()
                .unwrap_or_default(),
        }
    }
}
