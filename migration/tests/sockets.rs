//! The engine over real sockets: two threads, a guest that writes all the while, TLS where hosts talk to each other.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use common::cluster::{self, quiet};
use common::{FakeVm, Flaw, Rng};
use drover_migration::Control;
use drover_migration::codec::{self, Hello, Message};
use drover_migration::source::{self, Outcome, Way};
use drover_migration::target::{self, Admission, Received};
use drover_migration::transport::{Listener, connect};
use drover_pki::{CertificateDer, ClusterCa, Credentials, Role, host_dns, identity_of};
use drover_proto::v1::{MigrationOptions, MigrationPhase};
use drover_proto::{Code, Fault};

const PAGES: u64 = 2048;

fn source_params() -> source::Params {
    source::Params {
        options: MigrationOptions {
            max_downtime_ms: 1000,
            streams: 1,
            ..MigrationOptions::default()
        },
        ..cluster::source_params(1, false)
    }
}

fn target_params() -> target::Params {
    cluster::target_params(false)
}

/// A source that opens no streams beside the link.
fn once<S>(stream: S) -> impl FnMut(Way) -> Result<S, Fault> {
    let mut stream = Some(stream);
    move |way| {
        assert_eq!(way, Way::Link);
        Ok(stream.take().expect("one connection is made"))
    }
}

/// A target that is asked for no streams.
fn alone<S>(admission: &Admission) -> Result<Vec<S>, Fault> {
    panic!("{admission:?} was asked for")
}

/// A VM whose memory is partly zero, and a thread that is its guest until the VM pauses or the guest is dropped.
struct Guest {
    vm: FakeVm,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Guest {
    fn start() -> Self {
        let vm = FakeVm::new(PAGES);
        let mut rng = Rng(7);
        for page in 0..usize::try_from(PAGES).unwrap() {
            if page % 4 != 0 {
                vm.guest_writes(page, rng.byte());
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (guest, stopped) = (vm.clone(), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let page = 600 + rng.below(100);
                if !guest.guest_writes(page, rng.byte()) {
                    return;
                }
                thread::yield_now();
            }
        });
        Self {
            vm,
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// Both sides over a socket pair.
fn migrate(
    source_vm: &FakeVm,
    target_vm: &FakeVm,
    source_params: &source::Params,
    source_control: &Control,
) -> (Outcome, Result<Received, Fault>) {
    let (near, far) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let target = scope.spawn(|| target::run(target_vm, far, alone, &target_params(), &quiet()));
        let outcome = source::run(source_vm, once(near), source_params, source_control);
        (outcome, target.join().unwrap())
    })
}

fn assert_moved(source_vm: &FakeVm, target_vm: &FakeVm) {
    let (source, target) = (source_vm.lock(), target_vm.lock());
    assert!(source.paused && source.pauses == 1);
    assert!(
        source.dirty.is_some(),
        "the log of a VM that stands is the VMM's to end"
    );
    assert!(source.memory == target.memory, "memory differs");
    assert_eq!(target.restored.as_deref(), Some(&b"registers and devices"[..]));
}

#[test]
fn a_busy_guest_arrives_byte_for_byte_with_a_receipt() {
    let (guest, target_vm) = (Guest::start(), FakeVm::new(PAGES));
    let (seen, progress) = mpsc::channel();
    let control = Control::new(move |progress| seen.send(progress).unwrap());
    let (outcome, received) = migrate(&guest.vm, &target_vm, &source_params(), &control);
    assert_eq!(outcome, Outcome::AwaitOutcome);
    assert_moved(&guest.vm, &target_vm);

    let received = received.unwrap();
    let (granted, running) = (
        received.ready_at + Duration::from_micros(1500),
        received.ready_at + Duration::from_micros(1800),
    );
    let receipt = received.finish(granted, running);
    let blackout = receipt.blackout_us.unwrap();
    assert_eq!((blackout.commit, blackout.resume), (1500, 300));
    assert_eq!(
        blackout.total,
        blackout.pause + blackout.last_pages + blackout.state + blackout.commit + blackout.resume
    );
    assert!(receipt.total_ms >= blackout.total / 1000);
    assert!(receipt.rounds >= 2 && receipt.tracker == "bitmap");
    assert!(receipt.pages + receipt.zero_pages >= PAGES && receipt.zero_pages >= PAGES / 4 - 25);
    assert!(receipt.bytes > receipt.pages * 4096 && receipt.bytes < receipt.pages * 4096 + (1 << 20));

    drop(control);
    let phases: Vec<i32> = progress.iter().map(|progress| progress.phase).collect();
    let mut in_order = phases.clone();
    in_order.sort_unstable();
    assert_eq!(phases, in_order, "phases only rise");
    assert_eq!(phases.first(), Some(&MigrationPhase::PreCopy.into()));
    assert_eq!(phases.last(), Some(&MigrationPhase::Ready.into()));
}

#[test]
fn after_a_failed_attempt_the_guest_runs_on_and_a_second_target_gets_everything() {
    let guest = Guest::start();
    let broken = FakeVm::new(PAGES);
    broken.lock().flaw = Some(Flaw::Write);
    let (outcome, received) = migrate(&guest.vm, &broken, &source_params(), &quiet());
    let Outcome::FailedRunning(fault) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        (fault.code, received.unwrap_err().code),
        (Code::BadState, Code::BadState)
    );
    assert!(fault.message.contains("the target says: Write fails"), "{fault}");
    assert!(!guest.vm.lock().paused && guest.vm.lock().dirty.is_none());

    let target_vm = FakeVm::new(PAGES);
    let (outcome, received) = migrate(&guest.vm, &target_vm, &source_params(), &quiet());
    assert_eq!((outcome, received.is_ok()), (Outcome::AwaitOutcome, true));
    assert_moved(&guest.vm, &target_vm);
}

#[test]
fn a_target_that_cannot_restore_leaves_the_source_paused_and_says_why() {
    let (guest, target_vm) = (Guest::start(), FakeVm::new(PAGES));
    target_vm.lock().flaw = Some(Flaw::Restore);
    let (outcome, received) = migrate(&guest.vm, &target_vm, &source_params(), &quiet());
    let Outcome::FailedPaused(fault) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        (fault.code, received.unwrap_err().code),
        (Code::BadState, Code::BadState)
    );
    let vm = guest.vm.lock();
    assert!(
        vm.paused && vm.dirty.is_some(),
        "the log of a VM that stands is the VMM's to end"
    );
}

#[test]
fn a_cancel_during_pre_copy_ends_both_sides_and_the_guest_runs_on() {
    let (guest, target_vm) = (Guest::start(), FakeVm::new(PAGES));
    let control = Arc::new_cyclic(|weak: &std::sync::Weak<Control>| {
        let weak = weak.clone();
        Control::new(move |_| {
            if let Some(control) = weak.upgrade() {
                control.cancel();
            }
        })
    });
    let (outcome, received) = migrate(&guest.vm, &target_vm, &source_params(), &control);
    let Outcome::FailedRunning(fault) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        (fault.code, received.unwrap_err().code),
        (Code::Cancelled, Code::Cancelled)
    );
    assert!(!guest.vm.lock().paused);
}

#[test]
fn a_deadline_under_a_bandwidth_cap_ends_pre_copy_with_figures() {
    let (guest, target_vm) = (Guest::start(), FakeVm::new(PAGES));
    let mut params = source_params();
    params.options.bandwidth_mib_s = 1;
    params.options.deadline_ms = 100;
    let (outcome, received) = migrate(&guest.vm, &target_vm, &params, &quiet());
    let Outcome::FailedRunning(fault) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        (fault.code, fault.field.as_str()),
        (Code::DeadlineExceeded, "deadline_ms")
    );
    assert_eq!(received.unwrap_err().code, Code::DeadlineExceeded);
}

#[test]
fn a_target_that_dies_or_falls_silent_is_a_lost_link_for_a_running_source() {
    for dies in [true, false] {
        let guest = Guest::start();
        let (near, mut far) = UnixStream::pair().unwrap();
        let params = source::Params {
            link_timeout: Duration::from_millis(300),
            ..source_params()
        };
        let outcome = thread::scope(|scope| {
            let held = scope.spawn(move || {
                let mut hello = [0; codec::HEADER_BYTES];
                far.read_exact(&mut hello).unwrap();
                (!dies).then_some(far)
            });
            let outcome = source::run(&guest.vm, once(near), &params, &quiet());
            drop(held.join());
            outcome
        });
        let Outcome::FailedRunning(fault) = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(fault.code, Code::LinkLost, "{fault}");
        assert!(!guest.vm.lock().paused);
    }
}

/// What a target answers to `bytes`, and how it ends.
fn speak_to_target(bytes: &[u8]) -> (Fault, Message) {
    let (mut near, far) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let target = scope
            .spawn(|| target::run(&FakeVm::new(PAGES), far, alone, &target_params(), &quiet()).unwrap_err());
        near.write_all(bytes).unwrap();
        near.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        near.read_to_end(&mut answer).unwrap();
        let codec::Frame::Message(message) = codec::decode(&answer, 0).unwrap().0 else {
            panic!("pages")
        };
        (target.join().unwrap(), message)
    })
}

#[test]
fn a_stranger_and_a_build_of_another_version_are_refused_with_a_code() {
    let mut hello = Vec::new();
    let from_the_future = Hello {
        version_min: 7,
        version_max: 9,
        ..Hello::default()
    };
    codec::encode(&Message::Hello(from_the_future), 0, &mut hello).unwrap();
    let truncated = &hello[..hello.len() - 3];
    for (bytes, code) in [
        (&b"GET / HTTP/1.1\r\nHost: example\r\n\r\n"[..], Code::BadFrame),
        (truncated, Code::BadFrame),
        (&hello, Code::ProtocolVersion),
    ] {
        let (fault, answer) = speak_to_target(bytes);
        assert_eq!(fault.code, code, "{fault}");
        let Message::Refusal(refusal) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!(refusal.code, code.as_str());
    }
}

/// Certificates of one cluster.
struct Cluster {
    ca: ClusterCa,
    dir: tempfile::TempDir,
}

impl Cluster {
    fn new() -> Self {
        drover_pki::install_provider();
        Self {
            ca: ClusterCa::create("test").unwrap(),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn host(&self, name: &str) -> Credentials {
        let files = self.ca.issue_to(self.dir.path(), Role::Host, name).unwrap();
        Credentials::load(&files, "test").unwrap()
    }
}

/// host2 waits for host1; `callers` call one after the other, each expecting `expected_target`.
fn migrate_over_tls(
    guest: &Guest,
    target_vm: &FakeVm,
    target: &Credentials,
    callers: &[(&Credentials, &str)],
) -> (Vec<Outcome>, Result<Received, Fault>) {
    let listener = Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let addr = listener.addr().unwrap();
    let target_control = quiet();
    thread::scope(|scope| {
        let received = scope.spawn(|| {
            let verify = |chain: &[CertificateDer<'_>]| match identity_of(chain, "test") {
                Ok(identity) if identity.role == Role::Host && identity.name == "host1" => Ok(()),
                other => Err(Fault::new(
                    Code::Denied,
                    format!("host1 is expected, not {other:?}"),
                )),
            };
            let stream = listener.accept(&target.rustls_server(), verify, &target_control)?;
            target::run(target_vm, stream, alone, &target_params(), &target_control)
        });
        let outcomes = callers.iter().map(|(caller, expected_target)| {
            let control = quiet();
            let dial = |_| connect(addr, &host_dns(expected_target), caller.rustls_client(), &control);
            source::run(&guest.vm, dial, &source_params(), &control)
        });
        let outcomes = outcomes.collect::<Vec<_>>();
        if outcomes.last() != Some(&Outcome::AwaitOutcome) {
            target_control.cancel();
        }
        (outcomes, received.join().unwrap())
    })
}

#[test]
fn a_guest_moves_over_mutual_tls() {
    let cluster = Cluster::new();
    let (guest, target_vm) = (Guest::start(), FakeVm::new(PAGES));
    let (host1, host2) = (cluster.host("host1"), cluster.host("host2"));
    let (outcomes, received) = migrate_over_tls(&guest, &target_vm, &host2, &[(&host1, "host2")]);
    assert_eq!(outcomes, [Outcome::AwaitOutcome]);
    received.unwrap();
    assert_moved(&guest.vm, &target_vm);
}

#[test]
fn strangers_are_denied_and_the_target_still_takes_its_source() {
    let (cluster, foreign) = (Cluster::new(), Cluster::new());
    let (guest, target_vm) = (Guest::start(), FakeVm::new(PAGES));
    let (host1, host2, host3) = (
        cluster.host("host1"),
        cluster.host("host2"),
        cluster.host("host3"),
    );
    let foreign1 = foreign.host("host1");
    let callers = [
        (&foreign1, "host2"),
        (&host3, "host2"),
        (&host1, "host3"),
        (&host1, "host2"),
    ];
    let (outcomes, received) = migrate_over_tls(&guest, &target_vm, &host2, &callers);
    for (outcome, who) in outcomes
        .iter()
        .zip(["another cluster", "another host", "another target"])
    {
        let Outcome::FailedRunning(fault) = outcome else {
            panic!("{who}: {outcome:?}")
        };
        assert_eq!(fault.code, Code::Denied, "{who}: {fault}");
    }
    assert_eq!(outcomes[3], Outcome::AwaitOutcome);
    received.unwrap();
    assert_moved(&guest.vm, &target_vm);
}

/// The head of a TLS handshake record that announces 16 KiB.
const LONG_RECORD: [u8; 5] = [22, 3, 1, 0x40, 0];
const DRIP: Duration = Duration::from_millis(10);

/// Sends the head of a record and then a byte every now and then, until the peer hangs up.
fn drip(mut stream: TcpStream, begun: &mpsc::Sender<()>) {
    if stream.write_all(&LONG_RECORD).is_err() {
        return;
    }
    let _ = begun.send(());
    while stream.write_all(&[0]).is_ok() {
        thread::sleep(DRIP);
    }
}

#[test]
fn strangers_who_drip_bytes_do_not_keep_the_source_out() {
    const STRANGERS: usize = 6;
    let cluster = Cluster::new();
    let (guest, target_vm) = (Guest::start(), FakeVm::new(PAGES));
    let (host1, host2) = (cluster.host("host1"), cluster.host("host2"));
    let listener = Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let addr = listener.addr().unwrap();
    let (begun, dripping) = mpsc::channel();
    let target_control = quiet();
    thread::scope(|scope| {
        for _ in 0..STRANGERS {
            let begun = begun.clone();
            scope.spawn(move || drip(TcpStream::connect(addr).unwrap(), &begun));
        }
        for _ in 0..STRANGERS {
            dripping.recv().unwrap();
        }
        let target = scope.spawn(|| {
            let stream = listener.accept(&host2.rustls_server(), |_| Ok(()), &target_control)?;
            target::run(&target_vm, stream, alone, &target_params(), &target_control)
        });
        let control = quiet();
        let dial = |_| connect(addr, &host_dns("host2"), host1.rustls_client(), &control);
        let outcome = source::run(&guest.vm, dial, &source_params(), &control);
        if outcome != Outcome::AwaitOutcome {
            target_control.cancel();
        }
        assert_eq!(outcome, Outcome::AwaitOutcome);
        target.join().unwrap().unwrap();
    });
    assert_moved(&guest.vm, &target_vm);
}

#[test]
fn a_target_that_drips_bytes_does_not_keep_its_source_from_a_cancel() {
    let cluster = Cluster::new();
    let host1 = cluster.host("host1");
    let stranger = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = stranger.local_addr().unwrap();
    let (begun, dripping) = mpsc::channel();
    let control = quiet();
    let fault = thread::scope(|scope| {
        scope.spawn(move || drip(stranger.accept().unwrap().0, &begun));
        let dial = scope.spawn(|| connect(addr, &host_dns("host2"), host1.rustls_client(), &control).err());
        dripping.recv().unwrap();
        control.cancel();
        dial.join().unwrap()
    });
    assert_eq!(fault.unwrap().code, Code::Cancelled);
}

#[test]
fn a_target_that_nobody_calls_stops_waiting_when_cancelled() {
    let cluster = Cluster::new();
    let host2 = cluster.host("host2");
    let listener = Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let addr = listener.addr().unwrap();
    let control = quiet();
    let fault = thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            listener
                .accept(&host2.rustls_server(), |_| Ok(()), &control)
                .err()
        });
        // Someone who connects and says nothing does not keep the target from hearing the cancel.
        let _silent = TcpStream::connect(addr).unwrap();
        control.cancel();
        waiting.join().unwrap()
    });
    assert_eq!(fault.unwrap().code, Code::Cancelled);
}
