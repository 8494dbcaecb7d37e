//! Pages on several streams: over mutual TLS and without it, with strangers at the door, and with streams that break or stall.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, Weak, mpsc};
use std::thread;
use std::time::Duration;

use common::cluster::{
    Cluster, PAGES, assert_moved, filled_vm, quiet, source_params, target_params, with_guest,
};
use common::{FakeVm, Flaw, Rng};
use drover_migration::Control;
use drover_migration::codec::{self, Join, Message};
use drover_migration::source::{self, Outcome, Way};
use drover_migration::target::{self, Admission, Received};
use drover_migration::transport::{HostStream, Link, connect, connect_plain};
use drover_pki::host_dns;
use drover_proto::v1::{Compression, MigrationPhase, Progress};
use drover_proto::{Code, Fault};

/// For links that are to be found dead soon.
const SHORT: Duration = Duration::from_millis(300);

#[test]
fn a_busy_guest_arrives_over_several_streams_encrypted_or_not() {
    let cluster = Cluster::new();
    for (streams, plaintext) in [(3, false), (3, true), (1, true), (16, false)] {
        let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
        let (outcome, received) = cluster.migrate(
            (&source_vm, &target_vm),
            &source_params(streams, plaintext),
            &target_params(plaintext),
            |_| {},
        );
        assert_eq!(outcome, Outcome::AwaitOutcome, "{streams} streams");
        assert_moved(&source_vm, &target_vm);
        let receipt = received.unwrap().receipt;
        assert_eq!((receipt.streams, receipt.plaintext), (streams, plaintext));
        assert!(receipt.pages + receipt.zero_pages >= PAGES && receipt.zero_pages >= PAGES / 4 - 25);
        assert!(receipt.bytes > receipt.pages * 4096);
    }
}

#[test]
fn a_guest_that_is_mostly_holes_is_told_in_few_frames_and_loses_nothing_that_it_writes_there() {
    let cluster = Cluster::new();
    for (streams, plaintext) in [(2, false), (2, true), (0, false)] {
        let (source_vm, target_vm) = (FakeVm::new(PAGES), FakeVm::new(PAGES));
        source_vm.lock().sparse = true;
        let (outcome, received) = cluster.migrate(
            (&source_vm, &target_vm),
            &source_params(streams, plaintext),
            &target_params(plaintext),
            |_| {},
        );
        assert_eq!(outcome, Outcome::AwaitOutcome, "{streams} streams");
        assert_moved(&source_vm, &target_vm);
        let receipt = received.unwrap().receipt;
        assert!(
            receipt.pages > 0 && receipt.pages + receipt.zero_pages >= PAGES,
            "{receipt:?}"
        );
    }
    // Nobody writes: four regions' worth of frames, where a frame for each 64 pages would be 64 of them.
    let (source_vm, target_vm) = (FakeVm::new(PAGES), FakeVm::new(PAGES));
    (source_vm.lock().sparse, source_vm.lock().paused) = (true, true);
    let (_, received) = cluster.migrate(
        (&source_vm, &target_vm),
        &source_params(2, false),
        &target_params(false),
        |_| {},
    );
    let receipt = received.unwrap().receipt;
    assert_eq!((receipt.pages, receipt.zero_pages), (0, PAGES));
    assert!(receipt.bytes < 1500, "{receipt:?}");
}

#[test]
fn a_target_that_was_not_told_refuses_pages_without_tls() {
    let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
    let (outcome, received) = Cluster::new().migrate(
        (&source_vm, &target_vm),
        &source_params(2, true),
        &target_params(false),
        |_| {},
    );
    let Outcome::FailedRunning(fault) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        (fault.code, received.unwrap_err().code),
        (Code::Denied, Code::Denied)
    );
    assert!(!source_vm.lock().paused);
}

fn join(token: Vec<u8>, stream: u32) -> Vec<u8> {
    let mut frame = Vec::new();
    codec::encode(&Message::Join(Join { token, stream }), 0, &mut frame).unwrap();
    frame
}

#[test]
fn strangers_among_the_streams_are_turned_away_and_those_of_the_source_taken() {
    let cluster = Cluster::new();
    for plaintext in [true, false] {
        let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
        let strangers = |addr: SocketAddr| {
            for words in [
                join(vec![0; 32], 0),
                join(Vec::new(), 0),
                join(vec![0; 9000], u32::MAX),
                b"GET / HTTP/1.1\r\nHost: example\r\n\r\n".to_vec(),
                Vec::new(),
            ] {
                let mut stream: HostStream = if plaintext {
                    connect_plain(addr).unwrap()
                } else {
                    let tls = cluster.host1.rustls_client();
                    connect(addr, &host_dns("host2"), tls, &quiet()).unwrap()
                };
                // It may be turned away before all was said.
                let _ = stream.write_all(&words).and_then(|()| stream.flush());
            }
            drop(TcpStream::connect(addr).unwrap());
        };
        let (outcome, received) = cluster.migrate(
            (&source_vm, &target_vm),
            &source_params(3, plaintext),
            &target_params(plaintext),
            strangers,
        );
        assert_eq!(outcome, Outcome::AwaitOutcome);
        assert_eq!(received.unwrap().receipt.streams, 3);
        assert_moved(&source_vm, &target_vm);
    }
}

/// What becomes of the bytes of a stream on their way.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trouble {
    /// The connection is closed after so many, the first frame passes in any case.
    CutAfter(usize),
    /// Nothing moves any more after so many.
    StallAfter(usize),
    /// A bit flips.
    CorruptAt(usize),
}

/// Carries bytes from `from` to `to`, with trouble. Holds both until `end` says so.
fn carry(mut from: UnixStream, mut to: UnixStream, trouble: Trouble, end: &mpsc::Receiver<()>) {
    let (mut carried, mut buffer) = (0, [0; 4096]);
    loop {
        if matches!(trouble, Trouble::StallAfter(at) if carried >= at) {
            let _ = end.recv();
            return;
        }
        let Ok(count @ 1..) = from.read(&mut buffer) else {
            return;
        };
        match trouble {
            Trouble::CutAfter(at) if carried >= at => return,
            Trouble::CorruptAt(at) if (carried..carried + count).contains(&at) => buffer[at - carried] ^= 4,
            _ => {}
        }
        if to.write_all(&buffer[..count]).is_err() {
            return;
        }
        carried += count;
    }
}

/// Three streams over socket pairs, the second of them with trouble.
fn migrate_with_trouble(
    vms: (&FakeVm, &FakeVm),
    trouble: Option<Trouble>,
    control: &Control,
    params: &source::Params,
) -> (Outcome, Result<Received, Fault>) {
    let (give, take) = mpsc::channel();
    let (end, ended) = mpsc::channel();
    let (link, far_link) = UnixStream::pair().unwrap();
    let mut link = Some(link);
    let mut opened = 0;
    thread::scope(|scope| {
        let admit = move |admission: &Admission| {
            let streams: Vec<UnixStream> = take.iter().take(admission.streams as usize).collect();
            for stream in &streams {
                // The first frame was read off before a stream is given.
                let control = quiet();
                let mut joins = Link::new(stream.try_clone().unwrap(), SHORT, &control).unwrap();
                let (frame, _) = joins
                    .receive(&mut Vec::new())
                    .map(|(f, n)| (format!("{f:?}"), n))
                    .unwrap();
                assert!(frame.contains("Join"), "{frame}");
            }
            Ok(streams)
        };
        let target_params = target::Params {
            link_timeout: params.link_timeout,
            ..target_params(true)
        };
        let target = scope.spawn(move || target::run(vms.1, far_link, admit, &target_params, &quiet()));
        let mut ended = Some(ended);
        let dial = |way| {
            if way == Way::Link {
                return Ok(link.take().unwrap());
            }
            opened += 1;
            let (near, far) = UnixStream::pair().unwrap();
            let (Some(trouble), 2) = (trouble, opened) else {
                give.send(far).unwrap();
                return Ok(near);
            };
            let (mid, out) = UnixStream::pair().unwrap();
            let ended = ended.take().unwrap();
            scope.spawn(move || carry(far, out, trouble, &ended));
            give.send(mid).unwrap();
            Ok(near)
        };
        let outcome = with_guest(vms.0, || source::run(vms.0, dial, params, control));
        let received = target.join().unwrap();
        drop(end);
        (outcome, received)
    })
}

#[test]
fn a_stream_that_breaks_ends_the_attempt_on_both_sides_and_the_guest_runs_on() {
    for (trouble, codes) in [
        // What was on its way with the first byte may be a frame's beginning.
        (Trouble::CutAfter(1), &[Code::LinkLost, Code::BadFrame][..]),
        (Trouble::CutAfter(300 << 10), &[Code::LinkLost, Code::BadFrame]),
        (Trouble::StallAfter(1), &[Code::LinkLost]),
        (Trouble::StallAfter(300 << 10), &[Code::LinkLost]),
        (Trouble::CorruptAt(300 << 10), &[Code::BadFrame]),
        (Trouble::CorruptAt(70), &[Code::BadFrame]),
    ] {
        let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
        let mut params = source_params(3, true);
        if matches!(trouble, Trouble::StallAfter(_)) {
            params.link_timeout = SHORT;
        }
        let (outcome, received) =
            migrate_with_trouble((&source_vm, &target_vm), Some(trouble), &quiet(), &params);
        let Outcome::FailedRunning(fault) = outcome else {
            panic!("{trouble:?}: {outcome:?}")
        };
        let theirs = received.unwrap_err();
        assert!(codes.contains(&theirs.code), "{trouble:?}: {theirs}");
        assert!(
            fault.code == theirs.code || fault.code == Code::LinkLost,
            "{trouble:?}: {fault}"
        );
        assert!(!source_vm.lock().paused && source_vm.lock().dirty.is_none());
    }
}

#[test]
fn a_target_that_cannot_write_is_heard_over_its_closing_streams() {
    let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
    target_vm.lock().flaw = Some(Flaw::Write);
    let (outcome, received) =
        migrate_with_trouble((&source_vm, &target_vm), None, &quiet(), &source_params(3, true));
    let Outcome::FailedRunning(fault) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        (fault.code, received.unwrap_err().code),
        (Code::BadState, Code::BadState)
    );
    assert!(fault.message.contains("the target says: Write fails"), "{fault}");
}

#[test]
fn a_cancel_with_streams_open_reaches_the_target_as_a_cancel() {
    let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
    let (control, _) = reports_until(|progress| progress.round > 0);
    let (outcome, received) =
        migrate_with_trouble((&source_vm, &target_vm), None, &control, &source_params(3, true));
    let Outcome::FailedRunning(fault) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        (fault.code, received.unwrap_err().code),
        (Code::Cancelled, Code::Cancelled)
    );
    assert!(!source_vm.lock().paused);
}

/// A control that keeps every report, and cancels at the first that `enough` says so of.
fn reports_until(
    enough: impl Fn(&Progress) -> bool + Send + Sync + 'static,
) -> (Arc<Control>, Arc<Mutex<Vec<Progress>>>) {
    let reports = Arc::new(Mutex::new(Vec::new()));
    let kept = reports.clone();
    let control = Arc::new_cyclic(|weak: &Weak<Control>| {
        let weak = weak.clone();
        Control::new(move |progress| {
            if let Some(control) = weak.upgrade().filter(|_| enough(&progress)) {
                control.cancel();
            }
            kept.lock().unwrap().push(progress);
        })
    });
    (control, reports)
}

#[test]
fn every_stream_is_reported_until_the_pause_and_none_after_it() {
    let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
    let (control, reports) = reports_until(|_| false);
    let mut params = source_params(3, true);
    // Slow enough for reports in the middle of a round.
    params.options.bandwidth_mib_s = 40;
    let (outcome, received) = migrate_with_trouble((&source_vm, &target_vm), None, &control, &params);
    assert_eq!(outcome, Outcome::AwaitOutcome);
    let (reports, receipt) = (reports.lock().unwrap(), received.unwrap().receipt);
    let mut before = [0; 3];
    for report in reports.iter() {
        if report.phase() != MigrationPhase::PreCopy {
            assert_eq!(report.by_stream, [], "{report:?}");
            continue;
        }
        let numbers: Vec<_> = report.by_stream.iter().map(|stream| stream.number).collect();
        assert_eq!(numbers, [0, 1, 2]);
        let bytes: Vec<_> = report.by_stream.iter().map(|stream| stream.bytes).collect();
        assert!(
            bytes.iter().zip(&before).all(|(now, before)| now >= before),
            "{report:?}"
        );
        assert!(report.bytes_sent >= bytes.iter().sum() && report.bytes_sent <= receipt.bytes);
        before.copy_from_slice(&bytes);
    }
    let (sent, all) = (before.iter().sum::<u64>(), 3 * PAGES / 4 * 4096);
    assert!(sent > all / 4, "{before:?}");
}

#[test]
fn a_stream_that_stalls_is_reported_while_the_engine_waits_for_it() {
    let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
    let stalled = |progress: &Progress| progress.by_stream.iter().any(|stream| stream.stalled_ms > 0);
    let (control, reports) = reports_until(stalled);
    // However few of the pages it is given, the end of the round gets no further either.
    let trouble = Some(Trouble::StallAfter(1));
    let (outcome, _) = migrate_with_trouble(
        (&source_vm, &target_vm),
        trouble,
        &control,
        &source_params(3, true),
    );
    let Outcome::FailedRunning(fault) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        fault.code,
        Code::Cancelled,
        "the stall was reported before the link counted as lost"
    );
    let reports = reports.lock().unwrap();
    let last = &reports.iter().rfind(|report| stalled(report)).unwrap().by_stream;
    assert_eq!((last[0].stalled_ms, last[2].stalled_ms), (0, 0), "{last:?}");
    assert!(last[1].stalled_ms >= 1_000, "{last:?}");
}

#[test]
fn pages_arrive_compressed_and_as_deltas_where_that_was_asked_for() {
    let cluster = Cluster::new();
    for (compression, streams) in [
        (Compression::Lz4, 2),
        (Compression::Zstd, 3),
        (Compression::Lz4, 1),
    ] {
        let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
        let mut params = source_params(streams, false);
        params.options.compression = compression.into();
        let (outcome, received) =
            cluster.migrate((&source_vm, &target_vm), &params, &target_params(false), |_| {});
        assert_eq!(outcome, Outcome::AwaitOutcome, "{compression:?}");
        assert_moved(&source_vm, &target_vm);
        let receipt = received.unwrap().receipt;
        let encoding = receipt.encoding.unwrap();
        let packed = match compression {
            Compression::Lz4 => encoding.lz4_pages,
            _ => encoding.zstd_pages,
        };
        assert!(packed > PAGES / 2, "{encoding:?}");
        assert_eq!(encoding.content_bytes, receipt.pages * 4096);
        assert!(encoding.sent_bytes < encoding.content_bytes / 10, "{encoding:?}");
    }
}

/// A VM of noise, which compresses to nothing less, and its migration over a link that is slow enough for some rounds.
fn noisy() -> (FakeVm, source::Params) {
    let (vm, mut rng) = (filled_vm(), Rng(5));
    for word in vm.lock().memory.chunks_exact_mut(8) {
        word.copy_from_slice(&rng.next().to_le_bytes());
    }
    let mut params = source_params(2, false);
    params.options.bandwidth_mib_s = 20;
    (vm, params)
}

#[test]
fn what_changed_little_goes_as_deltas_and_what_does_not_shrink_as_it_is() {
    for compression in [Compression::Zstd, Compression::Auto] {
        let ((source_vm, mut params), target_vm) = (noisy(), FakeVm::new(PAGES));
        params.options.compression = compression.into();
        let (outcome, received) =
            Cluster::new().migrate((&source_vm, &target_vm), &params, &target_params(false), |_| {});
        assert_eq!(outcome, Outcome::AwaitOutcome);
        assert_moved(&source_vm, &target_vm);
        let encoding = received.unwrap().receipt.encoding.unwrap();
        assert!(encoding.delta_pages > 50, "{encoding:?}");
        // The pages that the guest fills with one byte are the only ones that shrink.
        assert!(encoding.lz4_pages + encoding.zstd_pages < 1000, "{encoding:?}");
    }
}

#[test]
fn a_delta_for_a_page_that_is_not_as_the_source_knows_it_ends_the_attempt() {
    let cluster = Cluster::new();
    let ((source_vm, mut params), target_vm) = (noisy(), FakeVm::new(PAGES));
    // Whatever is written to the target's memory differs in a bit from what came.
    target_vm.lock().flaw = Some(Flaw::WriteWrong);
    params.options.compression = Compression::Zstd.into();
    let (outcome, received) =
        cluster.migrate((&source_vm, &target_vm), &params, &target_params(false), |_| {});
    let fault = received.unwrap_err();
    assert_eq!(fault.code, Code::DigestMismatch, "{fault}");
    assert!(!matches!(outcome, Outcome::AwaitOutcome), "{outcome:?}");
}
