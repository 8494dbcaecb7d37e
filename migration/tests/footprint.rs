//! How much memory an attempt takes beside the guest's own: each side is a process, which looks what it holds, with as many streams as there may be, all
//! encrypted and compressed, and from that what it comes to for the largest guest.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use common::Rng;
use common::cluster::{quiet, source_params, target_params};
use drover_migration::codec::Run;
use drover_migration::source::{self, Outcome};
use drover_migration::target::{self, Admission};
use drover_migration::transport::{Listener, connect};
use drover_migration::vm::{Layout, PAGE_SIZE, PageSet, Region, SourceVm, TargetVm};
use drover_pki::{ClusterCa, Credentials, Role, TlsFiles, host_dns};
use drover_proto::Fault;
use drover_proto::v1::Compression;

/// What either side may take beside the guest's memory.
const MOST: u64 = 64 << 20;
/// Streams, as many as there may be.
const STREAMS: u32 = 16;
/// Pages of the guest that runs here, and of the largest that there may be.
const PAGES: u64 = 1 << 22;
const PAGES_MAX: u64 = 1 << 28;
/// Of them, those that have content.
const CONTENT: u64 = 16 << 10;
/// KVM's log and what the VMM itself wrote are read in pieces of 64 GiB.
const PIECE_PAGES: u64 = 1 << 24;

/// Memory of this process that is no file's, bytes: what it takes beside the guest's memory.
fn anonymous() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Does something, and gives the most memory that it took, looked at often and by whoever calls `look`.
fn watched<T>(run: impl FnOnce() -> T) -> (T, u64) {
    let (before, over) = (anonymous(), AtomicBool::new(false));
    PEAK.store(0, Ordering::Relaxed);
    let done = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                look();
                thread::sleep(Duration::from_millis(2));
            }
        });
        let done = run();
        over.store(true, Ordering::Relaxed);
        done
    });
    (done, PEAK.load(Ordering::Relaxed).saturating_sub(before))
}

static PEAK: AtomicU64 = AtomicU64::new(0);

fn look() {
    PEAK.fetch_max(anonymous(), Ordering::Relaxed);
}

fn one_region() -> Layout {
    vec![Region {
        gpa: 0,
        len: PAGES * PAGE_SIZE as u64,
    }]
}

/// A guest of which a part has content, that changes a little in the rounds.
struct Sparse {
    taken: AtomicU64,
    noise: Vec<u8>,
}

impl SourceVm for Sparse {
    fn layout(&self) -> Layout {
        one_region()
    }
    fn start_dirty_log(&self) -> Result<(), Fault> {
        Ok(())
    }
    fn stop_dirty_log(&self) {}
    fn take_dirty(&self, into: &mut PageSet) -> Result<(), Fault> {
        // As the VMM does, which reads KVM's log of a piece.
        let log = std::hint::black_box(PageSet::full(PAGES.min(PIECE_PAGES)));
        look();
        drop(log);
        if self.taken.fetch_add(1, Ordering::Relaxed) < 3 {
            into.insert(Run {
                first: 0,
                count: CONTENT,
            });
        }
        Ok(())
    }
    fn look_dirty(&self, _: &mut PageSet) -> Result<(), Fault> {
        drop(std::hint::black_box(PageSet::full(PAGES.min(PIECE_PAGES))));
        Ok(())
    }
    fn read_pages(&self, first: u64, out: &mut [u8]) {
        let round = self.taken.load(Ordering::Relaxed).to_le_bytes()[0];
        for (page, out) in (first..).zip(out.chunks_exact_mut(PAGE_SIZE)) {
            // Half of it compresses.
            let at = usize::try_from(page % 256).unwrap();
            out.fill(round);
            out[..PAGE_SIZE / 2].copy_from_slice(&self.noise[at..at + PAGE_SIZE / 2]);
        }
    }
    fn zero_ahead(&self, first: u64, count: u64) -> u64 {
        if first < CONTENT { 0 } else { count }
    }
    fn pause(&self) -> Result<(), Fault> {
        Ok(())
    }
    fn save(&self) -> Result<Vec<u8>, Fault> {
        Ok(vec![1; 64 << 10])
    }
}

/// A target that keeps what has content.
struct Kept(Mutex<Vec<u8>>);

impl TargetVm for Kept {
    fn layout(&self) -> Layout {
        one_region()
    }
    fn write_pages(&self, first: u64, data: &[u8]) -> Result<(), Fault> {
        let at = usize::try_from(first).unwrap() * PAGE_SIZE;
        self.0.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }
    fn read_back(&self, first: u64, out: &mut [u8]) -> Result<(), Fault> {
        let at = usize::try_from(first).unwrap() * PAGE_SIZE;
        out.copy_from_slice(&self.0.lock().unwrap()[at..at + out.len()]);
        Ok(())
    }
    fn zero_pages(&self, _: u64, _: u64) -> Result<(), Fault> {
        Ok(())
    }
    fn restore(&self, _: &[u8]) -> Result<(), Fault> {
        Ok(())
    }
}

fn credentials(dir: &Path, host: &str) -> Credentials {
    let file = |name: &str| dir.join(name);
    let files = TlsFiles {
        ca: file("ca.pem"),
        cert: file(&format!("{host}.pem")),
        key: file(&format!("{host}.key")),
    };
    Credentials::load(&files, "test").unwrap()
}

const FOLDER: &str = "DROVER_TEST_FOLDER";

/// The other process of the test below.
#[test]
#[ignore = "started by the test below"]
fn the_target() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        return;
    };
    drover_pki::install_provider();
    let tls = credentials(Path::new(&folder), "host2").rustls_server();
    let listener = Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    println!("addr {}", listener.addr().unwrap());
    let control = quiet();
    let kept = Kept(Mutex::new(vec![1; usize::try_from(CONTENT).unwrap() * PAGE_SIZE]));
    let ((), took) = watched(|| {
        let stream = listener.accept(&tls, |_| Ok(()), &control).unwrap();
        let admit = |admission: &Admission| listener.accept_streams(&tls, |_| Ok(()), admission, &control);
        target::run(&kept, stream, admit, &target_params(false), &control).unwrap();
    });
    println!("took {took}");
}

/// The next line of the other process's that begins with `word`.
fn said(output: &mut impl BufRead, word: &str) -> String {
    loop {
        let mut line = String::new();
        assert!(
            output.read_line(&mut line).unwrap() > 0,
            "it ended without {word:?}"
        );
        // The harness's own words stand before it on the same line.
        if let Some((_, rest)) = line.split_once(word) {
            return rest.trim().to_owned();
        }
    }
}

/// What the two sides of a migration took, bytes: source, target.
fn attempt(compression: Compression) -> (u64, u64) {
    let dir = tempfile::tempdir().unwrap();
    drover_pki::install_provider();
    let ca = ClusterCa::create("test").unwrap();
    for host in ["host1", "host2"] {
        ca.issue_to(dir.path(), Role::Host, host).unwrap();
    }
    let mut other = Command::new(std::env::current_exe().unwrap())
        .args(["the_target", "--exact", "--ignored", "--nocapture"])
        .env(FOLDER, dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(other.stdout.take().unwrap());
    let addr = said(&mut output, "addr ").parse().unwrap();
    let mut rng = Rng(9);
    let vm = Sparse {
        taken: AtomicU64::new(0),
        noise: (0..PAGE_SIZE).map(|_| rng.byte()).collect(),
    };
    let mut params = source_params(STREAMS, false);
    params.options.compression = compression.into();
    let (tls, control) = (credentials(dir.path(), "host1").rustls_client(), quiet());
    let (outcome, source) = watched(|| {
        let dial = |_| connect(addr, &host_dns("host2"), tls.clone(), &control);
        source::run(&vm, dial, &params, &control)
    });
    assert_eq!(outcome, Outcome::AwaitOutcome);
    let target = said(&mut output, "took ").parse().unwrap();
    assert!(other.wait().unwrap().success());
    (source, target)
}

#[test]
fn an_attempt_takes_no_more_than_64_mib_on_either_side_with_all_streams_and_the_largest_guest() {
    for compression in [Compression::Zstd, Compression::Off] {
        let (source, target) = attempt(compression);
        // Sets of pages: of this guest all that a source has, of the largest what is to be sent and a piece of the log.
        let (here, largest) = (PAGES / 8, PAGES_MAX / 8);
        let source_largest = source.saturating_sub(5 * here) + largest + PIECE_PAGES / 8;
        let target_largest = target.saturating_sub(here) + largest;
        let kib = [source, target, source_largest, target_largest].map(|bytes| bytes >> 10);
        println!("{compression:?}: source and target, here and of the largest guest, KiB: {kib:?}");
        assert!(source > 4 << 20 && target > 2 << 20, "what was measured? {kib:?}");
        assert!(source_largest <= MOST && target_largest <= MOST, "{kib:?}");
    }
}
