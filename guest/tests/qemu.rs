//! The probe guest under QEMU: it boots, reports, answers, survives QEMU's own migration, and notices a page changed behind its back.
//!
//! The guest is built first, by the cargo that runs the test. Needs qemu-system-x86_64; the tests of hardware virtualization need
//! /dev/kvm as well.

#![allow(clippy::unwrap_used, reason = "a test may, its helpers too")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use drover_probe::report::{ClockSource, Second, Up};

/// On a host that emulates ring 0, QEMU's firmware alone takes half a minute when all processors are busy.
const PATIENCE: Duration = Duration::from_secs(180);

/// Why a test cannot run here.
fn missing(kvm: bool) -> Option<&'static str> {
    if Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        return Some("qemu-system-x86_64 is not installed");
    }
    let usable = || {
        std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok()
    };
    (kvm && !usable()).then_some("/dev/kvm cannot be opened")
}

macro_rules! skip_unless {
    (qemu) => {
        skip_unless!(@ false)
    };
    (qemu with kvm) => {
        skip_unless!(@ true)
    };
    (@ $kvm:expr) => {
        if let Some(why) = missing($kvm) {
            println!("SKIPPED: {why}");
            return;
        }
    };
}

fn probe() -> PathBuf {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--quiet", "-p", "drover-probe", "--profile", "guest"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(built.success(), "the guest does not build");
    Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .unwrap()
        .join("guest/probe")
}

/// One QEMU, its guest's console, and its end.
struct Qemu {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Qemu {
    fn start(accelerator: &str, cpus: u32, line: &str, more: &[&str]) -> Qemu {
        let mut child = Command::new("qemu-system-x86_64")
            .args([
                "-accel",
                accelerator,
                "-cpu",
                "qemu64",
                "-machine",
                "q35",
                "-m",
                "256",
                "-smp",
                &cpus.to_string(),
            ])
            .args([
                "-nodefaults",
                "-no-reboot",
                "-display",
                "none",
                "-serial",
                "stdio",
            ])
            .arg("-kernel")
            .arg(probe())
            .args(["-append", line])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.split(b'\n').map_while(Result::ok) {
                let _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
        });
        Qemu {
            input: child.stdin.take().unwrap(),
            child,
            lines,
        }
    }

    /// The first line of which `wanted` makes something.
    fn wait<T>(&self, what: &str, wanted: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left);
            let line = line.unwrap_or_else(|why| panic!("no {what} ({why}) after these lines: {seen:#?}"));
            if let Some(found) = wanted(&line) {
                return found;
            }
            seen.push(line);
        }
    }

    fn wait_for(&self, part: &str) -> String {
        self.wait(part, |line| line.contains(part).then(|| line.to_owned()))
    }

    fn type_line(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    fn wait_for_end(mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "QEMU does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// QEMU's control socket: one JSON object a line.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(path: &Path) -> Qmp {
        let mut qmp = Qmp(BufReader::new(connect(path)));
        qmp.read();
        qmp.run("qmp_capabilities", serde_json::json!({}));
        qmp
    }

    fn read(&mut self) -> serde_json::Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn run(&mut self, command: &str, arguments: serde_json::Value) -> serde_json::Value {
        let request = serde_json::json!({ "execute": command, "arguments": arguments });
        writeln!(self.0.get_mut(), "{request}").unwrap();
        loop {
            let answer = self.read();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }
}

fn connect(path: &Path) -> UnixStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                return stream;
            }
            Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A second's line that is as it must be, later than `after`.
fn clean_second(qemu: &Qemu, after: u64) -> Second {
    let second = qemu.wait("line a second", |line| {
        Second::parse(line).filter(|second| second.t_s > after)
    });
    assert_eq!((second.lost, second.back), (0, 0), "{second}");
    second
}

#[test]
fn two_processors_boot_under_kvm_report_and_answer() {
    skip_unless!(qemu with kvm);
    let mut qemu = Qemu::start("kvm", 2, "own=32M hot=8M cpus=2 pattern=zipf", &[]);
    let up = qemu.wait("up", Up::parse);
    assert_eq!((up.cpus, up.own_pages, up.hot_pages), (2, 8192, 2048));
    assert_eq!(up.clock, ClockSource::KvmClock);
    let first = clean_second(&qemu, 0);
    let later = clean_second(&qemu, first.t_s + 1);
    assert!(later.ticks > first.ticks && later.written > first.written && later.verified > first.verified);
    qemu.type_line("ping hello");
    qemu.wait_for("probe pong hello");
}

#[test]
fn qemus_own_migration_under_kvm_loses_nothing() {
    skip_unless!(qemu with kvm);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let control = |name: &str| format!("unix:{},server=on,wait=off", path(name).display());
    let channel = format!("unix:{}", path("migration").display());
    let line = "own=64M hot=4M cpus=2 rate=3000";
    let source = Qemu::start("kvm", 2, line, &["-qmp", &control("source")]);
    let mut target = Qemu::start(
        "kvm",
        2,
        line,
        &["-qmp", &control("target"), "-incoming", &channel],
    );
    Qmp::connect(&path("target"));
    let before = clean_second(&source, 1);
    let mut qmp = Qmp::connect(&path("source"));
    qmp.run("migrate", serde_json::json!({ "uri": channel }));
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = qmp.run("query-migrate", serde_json::json!({}))["status"].to_string();
        if status.contains("completed") {
            break;
        }
        assert!(
            !status.contains("failed") && Instant::now() < deadline,
            "{status}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let after = clean_second(&target, before.t_s);
    let swept = clean_second(&target, after.t_s + 11);
    assert!(
        after.ticks > before.ticks && swept.verified > after.verified + 16384,
        "{swept}"
    );
    target.type_line("ping there");
    target.wait_for("probe pong there");
}

#[test]
fn the_8254_serves_where_there_is_no_kvmclock() {
    skip_unless!(qemu);
    let mut qemu = Qemu::start("tcg", 1, "own=4M hz=100 content=zero hot=1M", &[]);
    let up = qemu.wait("up", Up::parse);
    assert_eq!((up.cpus, up.clock), (1, ClockSource::Pit));
    clean_second(&qemu, 1);
    qemu.type_line("hello?");
    qemu.wait_for("probe unknown command \"hello?\"");
}

#[test]
fn bad_parameters_are_named_and_nothing_runs() {
    skip_unless!(qemu);
    for (line, part) in [
        ("own=1G", "\"own=1G\": does not fit"),
        ("patern=zipf", "\"patern=zipf\": unknown name"),
        ("cpus=99", "\"cpus=99\": must be a number from 1 to 16"),
    ] {
        let said = Qemu::start("tcg", 1, line, &[]).wait_for("probe ");
        assert!(
            said.starts_with("probe bad parameter ") && said.contains(part),
            "{said}"
        );
    }
}

#[test]
fn a_shutdown_and_a_triple_fault_end_the_machine() {
    skip_unless!(qemu);
    for fault in ["shutdown", "triple"] {
        let qemu = Qemu::start("tcg", 1, &format!("own=4M fault={fault} fault_after=1"), &[]);
        clean_second(&qemu, 0);
        qemu.wait_for_end();
    }
}

#[test]
fn a_page_changed_behind_its_back_is_lost_at_once_and_for_ever() {
    skip_unless!(qemu);
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("gdb");
    let server = format!("unix:{},server=on,wait=off", socket.display());
    let qemu = Qemu::start("tcg", 1, "own=128M hot=4K rate=10", &["-gdb", &server]);
    clean_second(&qemu, 0);
    // GDB's remote protocol: stop, write a word at 64 MiB, amid the owned pages, go on.
    let mut gdb = connect(&socket);
    gdb.write_all(b"\x03").unwrap();
    packet(&mut gdb, "M4000100,8:0123456789abcdef");
    packet(&mut gdb, "c");
    let lost = qemu.wait_for("probe LOST page=");
    assert!(lost.contains("expected_seq=1 found_seq=1 why=checksum"), "{lost}");
    let counted = |line: &str| Second::parse(line).map(|second| second.lost);
    assert_eq!(qemu.wait("count", counted), 1);
    assert_eq!(
        qemu.wait("count", counted),
        1,
        "the page was repaired, the count stays"
    );
}

fn packet(gdb: &mut UnixStream, body: &str) {
    let sum = body.bytes().fold(0u8, u8::wrapping_add);
    write!(gdb, "+${body}#{sum:02x}").unwrap();
    let mut acknowledged = [0];
    while acknowledged != *b"+" {
        gdb.read_exact(&mut acknowledged).unwrap();
    }
}
