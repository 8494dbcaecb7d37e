//! Bad links and targets that lie, over real sockets: what is slow is not lost, what stands still is; whatever breaks, the attempt ends with a
//! code and the next one moves everything; and no lie makes a source believe that its VM is elsewhere.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Scope};
use std::time::Duration;

use common::cluster::{
    Cluster, PAGES, assert_moved, filled_vm, filled_vm_of, quiet, source_params, target_params,
};
use common::{FakeVm, Rng};
use drover_migration::Control;
use drover_migration::codec::{Frame, HelloAck, Message, Ready, RoundAck};
use drover_migration::handshake::TOKEN_BYTES;
use drover_migration::source::{self, Outcome};
use drover_migration::target;
use drover_migration::transport::{Link, Stop};
use drover_proto::Code;
use drover_proto::v1::{MigrationPhase, StreamProgress};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBuf, TcpMaxSeg};

/// For links that are to be found dead soon.
const SHORT: Duration = Duration::from_millis(400);
/// How often what waits here looks whether all is over.
const GLANCE: Duration = Duration::from_millis(10);

/// What becomes of the bytes from the source on a connection.
#[derive(Clone, Copy, Debug, Default)]
struct Conduct {
    /// Bytes a second, if it is slow.
    rate: Option<u64>,
    trouble: Option<(Trouble, u64)>,
}

/// What happens after so many bytes from the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// The connection is closed.
    Cut,
    /// Nothing moves any more, either way.
    Stall,
    /// A bit flips.
    Flip,
}

/// A way to `to` on which the first connection fares as `conduct` says, until all is `over`.
fn through<'scope>(
    scope: &'scope Scope<'scope, '_>,
    to: SocketAddr,
    conduct: Conduct,
    over: &'scope AtomicBool,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    if conduct.rate.is_some() {
        // As on a real link: small packets, and little of them on the way.
        setsockopt(&listener, TcpMaxSeg, &1448).unwrap();
        setsockopt(&listener, RcvBuf, &(4 << 10)).unwrap();
    }
    listener.set_nonblocking(true).unwrap();
    let addr = listener.local_addr().unwrap();
    scope.spawn(move || {
        let near = loop {
            match listener.accept() {
                Ok((near, _)) => break near,
                Err(_) if over.load(Ordering::Relaxed) => return,
                Err(_) => thread::sleep(GLANCE),
            }
        };
        let far = TcpStream::connect(to).unwrap();
        near.set_nonblocking(false).unwrap();
        for stream in [&near, &far] {
            stream.set_nodelay(true).unwrap();
            stream.set_read_timeout(Some(GLANCE)).unwrap();
        }
        let stalled = AtomicBool::new(false);
        let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        thread::scope(|scope| {
            scope.spawn(|| carry(back_from, back_to, Conduct::default(), &stalled, over));
            carry(near, far, conduct, &stalled, over);
        });
    });
    addr
}

/// Carries bytes until an end closes, there is trouble, or all is over.
fn carry(mut from: TcpStream, mut to: TcpStream, conduct: Conduct, stalled: &AtomicBool, over: &AtomicBool) {
    let (mut carried, mut buffer) = (0, [0; 4096]);
    while !over.load(Ordering::Relaxed) {
        if stalled.load(Ordering::Relaxed) {
            thread::sleep(GLANCE);
            continue;
        }
        let count = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
            Err(_) => break,
        };
        let next = carried + count as u64;
        if let Some((trouble, at)) = conduct.trouble.filter(|(_, at)| (carried..next).contains(at)) {
            match trouble {
                Trouble::Cut => break,
                Trouble::Stall => {
                    stalled.store(true, Ordering::Relaxed);
                    continue;
                }
                Trouble::Flip => buffer[usize::try_from(at - carried).unwrap()] ^= 4,
            }
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
        carried = next;
        if let Some(rate) = conduct.rate {
            thread::sleep(Duration::from_micros(count as u64 * 1_000_000 / rate));
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// Both sides' parameters for `streams` streams and links that are lost after `timeout`.
fn impatient(streams: u32, plaintext: bool, timeout: Duration) -> (source::Params, target::Params) {
    let (mut source, mut target) = (source_params(streams, plaintext), target_params(plaintext));
    (source.link_timeout, target.link_timeout) = (timeout, timeout);
    source.options.max_downtime_ms = 60_000;
    (source, target)
}

#[test]
fn what_the_kernel_still_sends_for_longer_than_a_link_may_be_silent_is_not_lost() {
    // Longer than what lies in the middle of the way takes, where neither side sees it; shorter than what lies in the source's kernel does.
    const TIMEOUT: Duration = Duration::from_secs(2);
    let cluster = Cluster::new();
    for plaintext in [false, true] {
        let (source_vm, target_vm) = (filled_vm_of(256), FakeVm::new(256));
        let (params, target_params) = impatient(4, plaintext, TIMEOUT);
        let over = AtomicBool::new(false);
        let (outcome, received) = thread::scope(|scope| {
            let slow = Conduct {
                rate: Some(48 << 10),
                trouble: None,
            };
            let route = |_, to| through(scope, to, slow, &over);
            let moved =
                cluster.migrate_by((&source_vm, &target_vm), &params, &target_params, &quiet(), route);
            over.store(true, Ordering::Relaxed);
            moved
        });
        assert_eq!(outcome, Outcome::AwaitOutcome);
        received.unwrap();
        assert_moved(&source_vm, &target_vm);
    }
}

/// What the last report before the pause said of each stream.
fn watched() -> (Control, std::sync::Arc<Mutex<Vec<StreamProgress>>>) {
    let last = std::sync::Arc::new(Mutex::new(Vec::new()));
    let kept = last.clone();
    let control = Control::new(move |progress| {
        if progress.phase() == MigrationPhase::PreCopy {
            *kept.lock().unwrap() = progress.by_stream;
        }
    });
    (control, last)
}

#[test]
fn of_four_streams_one_that_carries_a_fiftieth_of_the_others_gets_few_of_the_pages() {
    const FAST: u64 = 8 << 20;
    let cluster = Cluster::new();
    for plaintext in [false, true] {
        let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
        let mut params = source_params(4, plaintext);
        params.options.max_downtime_ms = 60_000;
        let (control, last) = watched();
        let over = AtomicBool::new(false);
        let mut opened = 0;
        let (outcome, received) = thread::scope(|scope| {
            let route = |_, to| {
                opened += 1;
                let rate = match opened {
                    // The link, and the second stream.
                    1 => None,
                    3 => Some(FAST / 50),
                    _ => Some(FAST),
                };
                let conduct = Conduct { rate, trouble: None };
                through(scope, to, conduct, &over)
            };
            let moved = cluster.migrate_by(
                (&source_vm, &target_vm),
                &params,
                &target_params(plaintext),
                &control,
                route,
            );
            over.store(true, Ordering::Relaxed);
            moved
        });
        assert_eq!(outcome, Outcome::AwaitOutcome);
        assert_moved(&source_vm, &target_vm);
        let receipt = received.unwrap().receipt;
        assert!(receipt.pages >= 3 * PAGES / 4 - 100, "{receipt:?}");
        let streams = last.lock().unwrap();
        let by_stream: Vec<u64> = streams.iter().map(|stream| stream.bytes).collect();
        let all: u64 = by_stream.iter().sum();
        assert!(by_stream[1] > 0 && by_stream[1] < all / 10, "{by_stream:?}");
        for fast in [0, 2, 3] {
            assert!(by_stream[fast] > 2 * by_stream[1], "{by_stream:?}");
        }
    }
}

#[test]
fn whatever_breaks_at_any_moment_ends_the_attempt_with_a_code_and_the_next_one_moves_everything() {
    const CASES: u64 = 40;
    const SMALL: u64 = 1024;
    /// What a connection carries before its first frame of pages, and more.
    const HANDSHAKES: u64 = 6 << 10;
    let cluster = Cluster::new();
    for seed in 0..CASES {
        let mut rng = Rng(seed);
        let plaintext = rng.below(2) == 0;
        let streams = 1 + rng.below(4);
        let troubled = rng.below(streams + 1);
        let trouble = [Trouble::Cut, Trouble::Stall, Trouble::Flip][rng.below(3)];
        // Of all pages each stream carries a part, once or a little more often.
        let share = usize::try_from(SMALL * 4096 / streams as u64).unwrap();
        let at = HANDSHAKES
            + if troubled == 0 {
                rng.below(400)
            } else {
                rng.below(share)
            } as u64;
        let case = format!(
            "seed {seed}: {streams} streams, plaintext {plaintext}, {trouble:?} of connection {troubled} after {at}"
        );
        let (source_vm, target_vm) = (filled_vm_of(SMALL), FakeVm::new(SMALL));
        let asked = u32::try_from(streams).unwrap();
        let (params, target_params) = impatient(asked, plaintext, SHORT);
        let over = AtomicBool::new(false);
        let mut opened = 0;
        let (outcome, received) = thread::scope(|scope| {
            let route = |_, to| {
                let conduct = Conduct {
                    rate: None,
                    trouble: (opened == troubled).then_some((trouble, at)),
                };
                opened += 1;
                through(scope, to, conduct, &over)
            };
            let moved =
                cluster.migrate_by((&source_vm, &target_vm), &params, &target_params, &quiet(), route);
            over.store(true, Ordering::Relaxed);
            moved
        });
        let fault = match outcome {
            Outcome::AwaitOutcome => {
                received.unwrap_or_else(|fault| panic!("{case}: {fault}"));
                assert_moved(&source_vm, &target_vm);
                continue;
            }
            Outcome::FailedRunning(fault) => {
                assert!(!source_vm.lock().paused, "{case}: {fault}");
                assert!(source_vm.lock().dirty.is_none(), "{case}: the log is still on");
                fault
            }
            Outcome::FailedPaused(fault) => {
                assert!(source_vm.lock().paused, "{case}: {fault}");
                fault
            }
        };
        let codes = match trouble {
            Trouble::Cut | Trouble::Stall => &[Code::LinkLost, Code::BadFrame][..],
            // TLS finds it before the engine does, and then it is the link's failure.
            Trouble::Flip => &[Code::BadFrame, Code::LinkLost],
        };
        assert!(codes.contains(&fault.code), "{case}: {fault}");
        if let Err(theirs) = received {
            assert!(codes.contains(&theirs.code), "{case}: {theirs}");
        }
        // The log's answer to a source that stands.
        source_vm.lock().paused = false;
        source_vm.lock().pauses = 0;
        let second = FakeVm::new(SMALL);
        let (outcome, received) = cluster.migrate((&source_vm, &second), &params, &target_params, |_| {});
        assert_eq!(outcome, Outcome::AwaitOutcome, "{case}");
        received.unwrap();
        assert_moved(&source_vm, &second);
    }
}

/// What a target that lies says to a message; `None`: nothing, and it is over.
type Lie = fn(&Message) -> Vec<Message>;

fn agrees(streams: u32) -> Message {
    Message::HelloAck(HelloAck {
        version: 2,
        streams,
        token: vec![7; TOKEN_BYTES],
        ..HelloAck::default()
    })
}

fn ack(round: u32) -> Message {
    Message::RoundAck(RoundAck { round })
}

/// An honest target's answer to all but the state.
fn honest(message: &Message) -> Vec<Message> {
    match message {
        Message::Hello(_) => vec![agrees(0)],
        Message::RoundEnd(end) => vec![ack(end.round)],
        _ => Vec::new(),
    }
}

/// What is said to the state, changed by `lie`.
fn to_the_state(message: &Message, lie: impl FnOnce(&mut Ready)) -> Vec<Message> {
    let Message::State(state) = message else {
        return honest(message);
    };
    let mut ready = Ready {
        digest: state.digest.clone(),
        pages: state.pages,
        zero_pages: state.zero_pages,
    };
    lie(&mut ready);
    vec![Message::Ready(ready)]
}

/// A source's attempt with a target that answers as `lie` says.
fn migrate_to_liar(vm: &FakeVm, lie: Lie) -> Outcome {
    let (near, far) = UnixStream::pair().unwrap();
    let mut near = Some(near);
    thread::scope(|scope| {
        scope.spawn(move || {
            let control = quiet();
            let mut link = Link::new(far, Duration::from_secs(5), &control).unwrap();
            let mut buffer = Vec::new();
            loop {
                let said = match link.receive(&mut buffer) {
                    Ok((Frame::Message(message), _)) => lie(&message),
                    Ok(_) => Vec::new(),
                    Err(Stop::Cancelled | Stop::Failed(_)) => return,
                };
                for message in &said {
                    let _ = link.send(message);
                }
            }
        });
        let mut params = source_params(1, false);
        params.link_timeout = SHORT;
        source::run(
            vm,
            |_| Ok(near.take().expect("one connection is made")),
            &params,
            &quiet(),
        )
    })
}

#[test]
fn a_target_that_tells_the_truth_is_believed() {
    let vm = filled_vm_of(64);
    let outcome = migrate_to_liar(&vm, |message| to_the_state(message, |_| {}));
    assert_eq!(outcome, Outcome::AwaitOutcome);
}

#[test]
fn no_lie_of_a_target_ends_in_anything_but_a_failure_with_its_code() {
    let everything_at_once: Lie = |message| match message {
        Message::Hello(_) => {
            let ready = Message::Ready(Ready::default());
            vec![agrees(0), ack(1), ack(2), ready]
        }
        _ => Vec::new(),
    };
    let cases: [(&str, Lie, Code, bool); 11] = [
        (
            "acknowledges rounds before they were sent, and is ready",
            everything_at_once,
            Code::DigestMismatch,
            true,
        ),
        (
            "acknowledges twice",
            |message| match message {
                Message::RoundEnd(end) => vec![ack(end.round), ack(end.round)],
                other => honest(other),
            },
            Code::BadFrame,
            true,
        ),
        (
            "acknowledges the next round",
            |message| match message {
                Message::RoundEnd(end) => vec![ack(end.round + 1)],
                other => honest(other),
            },
            Code::BadFrame,
            false,
        ),
        (
            "is ready instead of acknowledging",
            |message| match message {
                Message::RoundEnd(_) => vec![Message::Ready(Ready::default())],
                other => honest(other),
            },
            Code::BadFrame,
            false,
        ),
        (
            "acknowledges instead of being ready",
            |message| match message {
                Message::State(_) => vec![ack(2)],
                other => honest(other),
            },
            Code::BadFrame,
            true,
        ),
        (
            "is ready with another state",
            |message| to_the_state(message, |ready| ready.digest[31] ^= 1),
            Code::DigestMismatch,
            true,
        ),
        (
            "is ready without a digest",
            |message| to_the_state(message, |ready| ready.digest.clear()),
            Code::DigestMismatch,
            true,
        ),
        (
            "is ready with fewer pages",
            |message| to_the_state(message, |ready| ready.pages -= 1),
            Code::DigestMismatch,
            true,
        ),
        (
            "is ready with more zero pages",
            |message| to_the_state(message, |ready| ready.zero_pages += 1),
            Code::DigestMismatch,
            true,
        ),
        (
            "grants itself streams",
            |message| match message {
                Message::Hello(_) => vec![agrees(2)],
                other => honest(other),
            },
            Code::BadFrame,
            false,
        ),
        (
            "says nothing to the state",
            |message| honest(message),
            Code::LinkLost,
            true,
        ),
    ];
    for (what, lie, code, paused) in cases {
        let vm = filled_vm_of(64);
        let outcome = migrate_to_liar(&vm, lie);
        let expected = match &outcome {
            Outcome::FailedRunning(fault) => (fault.code, false),
            Outcome::FailedPaused(fault) => (fault.code, true),
            Outcome::AwaitOutcome => panic!("a target that {what} was believed"),
        };
        assert_eq!(expected, (code, paused), "a target that {what}: {outcome:?}");
        assert_eq!(vm.lock().paused, paused, "a target that {what}");
    }
}
