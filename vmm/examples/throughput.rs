//! How fast the engine moves memory on this machine, beside a plain TCP copy of the same memory into fresh memory:
//! `cargo run -p drover-vmm --example throughput -- [MiB, default 1024] [runs, default 3]
//! [kinds]`, each kind `copy`, or `plain-N` or `tls-N` with N streams, 0 for as many as the engine takes by itself, and `-off`, `-lz4` or
//! `-zstd` after it for another compression than the automatic one. With `HALF` in the environment every second word of memory is zero, so
//! that it compresses; `CAP` is a cap in MiB/s.
//!
//! Source and target are two processes with the VMM's own guest memory, all of it random; there is no guest in it. The runs of the
//! kinds alternate, so that what else the machine does hits all of them. Each line has the time from the connect to Ready, the
//! CPU time of both processes, and the most memory beyond the guest's that either held.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use drover_migration::Control;
use drover_migration::source::{self, Outcome, Way};
use drover_migration::target::{self, Admission};
use drover_migration::transport::{LINK_TIMEOUT, Listener, connect, connect_plain};
use drover_migration::vm::{Layout, PAGE_SIZE, PageSet, SourceVm, TargetVm};
use drover_pki::{ClusterCa, Credentials, Role, TlsFiles, host_dns};
use drover_proto::Fault;
use drover_proto::v1::{Compression, MigrationOptions};
use drover_vmm::memory::Memory;

type Failure = Box<dyn std::error::Error>;

const CLUSTER: &str = "bench";
/// What the plain copy reads and writes at once.
const COPY_BYTES: usize = 1 << 20;

struct Bare(Memory);

impl SourceVm for Bare {
    fn layout(&self) -> Layout {
        self.0.layout().clone()
    }
    fn start_dirty_log(&self) -> Result<(), Fault> {
        Ok(())
    }
    fn stop_dirty_log(&self) {}
    fn take_dirty(&self, _into: &mut PageSet) -> Result<(), Fault> {
        Ok(())
    }
    fn read_pages(&self, first: u64, out: &mut [u8]) {
        self.0
            .read_pages(first, out)
            .expect("the engine asks for pages that there are");
    }
    fn zero_ahead(&self, first: u64, count: u64) -> u64 {
        self.0.hole_ahead(first, count)
    }
    fn pause(&self) -> Result<(), Fault> {
        Ok(())
    }
    fn save(&self) -> Result<Vec<u8>, Fault> {
        Ok(vec![7; 64 << 10])
    }
}

impl TargetVm for Bare {
    fn layout(&self) -> Layout {
        self.0.layout().clone()
    }
    fn write_pages(&self, first: u64, data: &[u8]) -> Result<(), Fault> {
        self.0.write_pages(first, data)
    }
    fn read_back(&self, first: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.0.read_pages(first, out)
    }
    fn zero_pages(&self, first: u64, count: u64) -> Result<(), Fault> {
        self.0.zero_pages(first, count)
    }
    fn restore(&self, _state: &[u8]) -> Result<(), Fault> {
        Ok(())
    }
}

/// Whether memory is to be of huge pages: unless the environment says `SMALL_PAGES`.
fn huge_pages() -> bool {
    env::var_os("SMALL_PAGES").is_none()
}

/// Pages of xorshift noise, or half of it.
fn random(mib: u64) -> Result<Memory, Fault> {
    let memory = Memory::new(mib << 20, huge_pages())?;
    let step = if env::var_os("HALF").is_some() { 2 } else { 1 };
    let (mut state, mut chunk) = (0x9e37_79b9_7f4a_7c15_u64, vec![0; 1 << 20]);
    for first in (0..memory.pages()).step_by((1 << 20) / PAGE_SIZE) {
        for word in chunk.chunks_exact_mut(8).step_by(step) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        memory.write_pages(first, &chunk)?;
    }
    Ok(memory)
}

/// CPU time of this process so far, and its highest resident memory without shared pages, KiB, as of now.
fn used() -> Result<(Duration, u64), Failure> {
    const TICKS_PER_S: u32 = 100;
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
    let ticks = fields[11].parse::<u32>()? + fields[12].parse::<u32>()?;
    let status = fs::read_to_string("/proc/self/status")?;
    let anonymous = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .unwrap_or("0");
    let kib = anonymous.trim().trim_end_matches(" kB").parse()?;
    Ok((Duration::from_secs(1) * ticks / TICKS_PER_S, kib))
}

fn credentials(dir: &Path, host: &str) -> Result<Credentials, Failure> {
    let files = TlsFiles {
        ca: dir.join("ca.pem"),
        cert: dir.join(format!("{host}.pem")),
        key: dir.join(format!("{host}.key")),
    };
    Ok(Credentials::load(&files, CLUSTER)?)
}

/// The process that receives; it prints its address, and in the end what it used.
fn receive(kind: &str, mib: u64, dir: &Path) -> Result<(), Failure> {
    let memory = Memory::new(mib << 20, huge_pages())?;
    if kind == "copy" {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        println!("{}", listener.local_addr()?);
        let (mut stream, _) = listener.accept()?;
        let (before, _) = used()?;
        let mut chunk = vec![0; COPY_BYTES];
        for first in (0..memory.pages()).step_by(COPY_BYTES / PAGE_SIZE) {
            stream.read_exact(&mut chunk)?;
            memory.write_pages(first, &chunk)?;
        }
        stream.write_all(&[1])?;
        println!("{} 0", (used()?.0 - before).as_millis());
        return Ok(());
    }
    let credentials = credentials(dir, "host2")?;
    let listener = Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST))?;
    println!("{}", listener.addr()?);
    let control = Control::new(|_| {});
    let params = target::Params {
        migration: "m1".to_owned(),
        vm: "vm1".to_owned(),
        from_host: "host1".to_owned(),
        epoch: 2,
        device_model: 1,
        cpu_profile: "baseline".to_owned(),
        plaintext: true,
        local: false,
        link_timeout: LINK_TIMEOUT,
    };
    let server = credentials.rustls_server();
    let stream = listener.accept(&server, |_| Ok(()), &control)?;
    let admit = |admission: &Admission| listener.accept_streams(&server, |_| Ok(()), admission, &control);
    let (before, held) = used()?;
    let received = target::run(&Bare(memory), stream, admit, &params, &control)?;
    let (after, holds) = used()?;
    println!("{} {}", (after - before).as_millis(), holds.saturating_sub(held));
    drop(received);
    Ok(())
}

/// Sends `memory` to `addr`; the time until the target has it.
fn send(kind: &str, memory: Bare, addr: SocketAddr, dir: &Path) -> Result<(Bare, Duration), Failure> {
    if kind == "copy" {
        let began = Instant::now();
        let mut stream = TcpStream::connect(addr)?;
        let mut chunk = vec![0; COPY_BYTES];
        for first in (0..memory.0.pages()).step_by(COPY_BYTES / PAGE_SIZE) {
            memory.0.read_pages(first, &mut chunk)?;
            stream.write_all(&chunk)?;
        }
        stream.read_exact(&mut [0])?;
        return Ok((memory, began.elapsed()));
    }
    let credentials = credentials(dir, "host1")?;
    let control = Control::new(|_| {});
    let (name, streams) = kind
        .split_once('-')
        .ok_or("a kind is a name and a number of streams")?;
    let (streams, compression) = streams.split_once('-').unwrap_or((streams, "auto"));
    let compression = match compression {
        "auto" => Compression::Auto,
        "off" => Compression::Off,
        "lz4" => Compression::Lz4,
        "zstd" => Compression::Zstd,
        other => return Err(format!("there is no compression {other:?}").into()),
    };
    let options = MigrationOptions {
        streams: streams.parse()?,
        compression: compression.into(),
        bandwidth_mib_s: env::var("CAP").map_or(Ok(0), |cap| cap.parse())?,
        plaintext: name == "plain",
        ..MigrationOptions::default()
    };
    let params = source::Params {
        migration: "m1".to_owned(),
        vm: "vm1".to_owned(),
        from_host: "host1".to_owned(),
        source_epoch: 1,
        target_epoch: 2,
        options,
        device_model: 1,
        cpu_profile: "baseline".to_owned(),
        tracker: "none",
        local: false,
        link_timeout: LINK_TIMEOUT,
    };
    let began = Instant::now();
    let dial = |way| match way {
        Way::Pages { plaintext: true } => connect_plain(addr),
        _ => connect(addr, &host_dns("host2"), credentials.rustls_client(), &control),
    };
    let outcome = source::run(&memory, dial, &params, &control);
    let took = began.elapsed();
    match outcome {
        Outcome::AwaitOutcome => Ok((memory, took)),
        other => Err(format!("{other:?}").into()),
    }
}

fn line(child: &mut BufReader<impl Read>) -> Result<String, Failure> {
    let mut text = String::new();
    child.read_line(&mut text)?;
    Ok(text.trim().to_owned())
}

fn start(kind: &str, mib: u64, dir: &Path) -> Result<Child, Failure> {
    let child = Command::new(env::current_exe()?)
        .args(["receive", kind, &mib.to_string()])
        .arg(dir)
        .stdout(Stdio::piped())
        .spawn()?;
    Ok(child)
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = env::args().skip(1).collect();
    if let [mode, kind, mib, dir] = &args[..]
        && mode == "receive"
    {
        return receive(kind, mib.parse()?, Path::new(dir));
    }
    let number = |at: usize, default: u64| args.get(at).map_or(Ok(default), |text| text.parse());
    let (mib, runs) = (number(0, 1024)?, number(1, 3)?);
    let kinds = args.get(2).map_or("copy,plain-0,tls-0,tls-1", String::as_str);
    let dir = tempfile::tempdir()?;
    let ca = ClusterCa::create(CLUSTER)?;
    for host in ["host1", "host2"] {
        ca.issue_to(dir.path(), Role::Host, host)?;
    }
    let mut memory = Bare(random(mib)?);
    for run in 1..=runs {
        for kind in kinds.split(',') {
            let mut child = start(kind, mib, dir.path())?;
            let mut output = BufReader::new(child.stdout.take().ok_or("no output")?);
            let addr = line(&mut output)?.parse()?;
            let (before, held) = used()?;
            let (back, took) = send(kind, memory, addr, dir.path())?;
            memory = back;
            let (after, holds) = used()?;
            let theirs = line(&mut output)?;
            let (their_ms, their_kib) = theirs.split_once(' ').ok_or("no figures")?;
            child.wait()?;
            println!(
                "run {run} {kind:10} {:6.0} MiB/s  {:5} ms  CPU source {:5} ms, target {their_ms:>5} ms  extra memory {} and {their_kib} KiB",
                mib as f64 / took.as_secs_f64(),
                took.as_millis(),
                (after - before).as_millis(),
                holds.saturating_sub(held),
            );
        }
    }
    Ok(())
}
