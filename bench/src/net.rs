//! `cargo xtask bench net`: frames through a virtio NIC on a tap, with the same guest.
//!
//! ```text
//!   send      guest ─► VMM ─► tap: its own counters; a sample of what comes is looked at byte by byte
//!   receive   packet socket ─► tap ─► VMM ─► guest, which looks at each byte and says after every 64 frames how many have come
//! ```
//!
//! All of it is in a network namespace without a name, which goes with the last process in it, however this one ends. The guest polls, so neither side's
//! interrupts count, and no frame has an offload. There is no vhost on either side.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use drover_probe::frames::{self, FRAME_MAX, FRAME_MIN, Kind};
use drover_probe::report::NetLoad;
use nix::sched::{CloneFlags, unshare};

use crate::BOOT_LIMIT;
use crate::beside::ours::Ours;
use crate::beside::qemu::{Aio, Firmware, Machine, Qemu};
use crate::beside::rows::{Figure, Values};
use crate::beside::{Arguments, Bench, Given, Vm};
use crate::guest::GuestLog;
use crate::meter::Meter;
use crate::packet::Packet;
use crate::result::Side;

const FIGURES: [Figure; 3] = [
    Figure {
        name: "frames_per_s",
        title: "frames/s",
        digits: 0,
    },
    Figure {
        name: "mbit_per_s",
        title: "Mbit/s",
        digits: 0,
    },
    Figure {
        name: "cpu",
        title: "VMM's processors",
        digits: 2,
    },
];

/// A direction and a size of frames.
#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    guest_sends: bool,
    bytes: usize,
}

const fn load(name: &'static str, guest_sends: bool, bytes: usize) -> Load {
    Load {
        name,
        guest_sends,
        bytes,
    }
}

const ROWS: [Load; 4] = [
    load("send-1514", true, FRAME_MAX),
    load("send-60", true, FRAME_MIN),
    load("receive-1514", false, FRAME_MAX),
    load("receive-60", false, FRAME_MIN),
];

const TAP: &str = "tap0";
const MEMORY_MIB: u64 = 64;
/// Whole seconds that are measured.
const SECONDS: usize = 3;
/// Addresses of the guest and of this process.
const GUEST: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const HERE: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Frames that are sent at most before the guest says that they have come: more than its queue holds, fewer than that and the tap's.
const WINDOW: u64 = 768;
/// When nothing is heard for so long, what is under way is taken for lost.
const PATIENCE: Duration = Duration::from_millis(10);
/// Between two frames of the guest's that are looked at.
const SAMPLE: Duration = Duration::from_millis(1);

/// Measures both sides in turns.
pub fn bench(arguments: &Arguments) -> Result<()> {
    // Before the spawner's thread is started, which is to be in it too.
    lan()?;
    let bench = Bench::new(arguments)?;
    let rows = bench.chosen(&ROWS, |row| row.name)?;
    bench.take("net", &FIGURES, &rows, |row| row.name, measure)
}

/// Moves this thread, and all that it starts, into a network of its own, with a tap.
fn lan() -> Result<()> {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        bail!("no benchmark on this machine: a network namespace: {error}");
    }
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/net/tun") {
        bail!("no benchmark on this machine: /dev/net/tun: {error}");
    }
    // No host of this network says anything by itself.
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    for words in [
        format!("tuntap add {TAP} mode tap vnet_hdr"),
        format!("link set {TAP} up"),
    ] {
        let done = Command::new("ip").args(words.split(' ')).status();
        let done = done.with_context(|| format!("ip {words}"))?;
        ensure!(done.success(), "ip {words}: {done}");
    }
    Ok(())
}

fn measure(bench: &Bench<'_>, row: &Load, side: Side) -> Result<Values> {
    let mode = if row.guest_sends {
        format!("flood frame={}", row.bytes)
    } else {
        "sink".to_owned()
    };
    let given = Given {
        memory_mib: MEMORY_MIB,
        parameters: format!("own=64K hot=4K rate=0 hz=10 net={mode}"),
        disk: None,
        tap: Some(TAP.to_owned()),
    };
    if side == Side::Ours {
        return watch(row, &mut Ours::start(bench, &given)?);
    }
    watch(
        row,
        &mut Qemu::start(bench, &given, Machine::Q35, Firmware::Usual, Aio::Threads)?,
    )
}

/// Frames a second, over whole seconds after the first in which any flowed.
fn watch(row: &Load, vm: &mut dyn Vm) -> Result<Values> {
    let mut log = GuestLog::default();
    log.await_some(vm.console(), "the guest to work", BOOT_LIMIT, |log| log.up)?;
    let counterpart = Counterpart::start(row)?;
    let loads = |log: &GuestLog| -> Vec<NetLoad> {
        let loads = log.reports.iter().filter_map(|report| report.net_load);
        loads.filter(|load| load.frames > 0).collect()
    };
    log.await_some(vm.console(), "frames to flow", BOOT_LIMIT, |log| {
        !loads(log).is_empty()
    })?;
    let (meter, began, before) = (
        Meter::start(&[vm.pid()], Vec::new),
        Instant::now(),
        arrived_at_tap()?,
    );
    let over = log.await_some(vm.console(), "the load", BOOT_LIMIT, |log| {
        loads(log).len() > SECONDS
    });
    let (arrived, elapsed) = (arrived_at_tap()? - before, began.elapsed().as_secs_f64());
    let cpu = meter.stop()?.cpu_less_vcpus_s / elapsed;
    over?;
    let seen = counterpart.stop()?;
    let loads = loads(&log);
    let (first, last) = (loads[0], loads[SECONDS]);
    ensure!(
        last.damaged == 0,
        "{} frames came damaged to the guest",
        last.damaged
    );
    let frames_per_s = if row.guest_sends {
        ensure!(seen > 0, "no frame of the guest's was seen");
        arrived as f64 / elapsed
    } else {
        let seconds = (last.at_us - first.at_us) as f64 / 1e6;
        (last.frames - first.frames) as f64 / seconds
    };
    Ok(Values::from([
        ("frames_per_s", frames_per_s),
        ("mbit_per_s", frames_per_s * row.bytes as f64 * 8.0 / 1e6),
        ("cpu", cpu),
    ]))
}

/// Frames that have come to the tap from its VMM so far.
fn arrived_at_tap() -> Result<u64> {
    let table = fs::read_to_string("/proc/thread-self/net/dev").context("reading the tap's counters")?;
    received_by(&table, TAP).with_context(|| format!("no counter of {TAP} in {table:?}"))
}

/// The frames that `name` has received, from the table of `/proc/<pid>/net/dev` (proc(5)).
fn received_by(table: &str, name: &str) -> Option<u64> {
    let counters = table
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'))?;
    counters.split_whitespace().nth(1)?.parse().ok()
}

/// This machine's end of the cable, a thread of its own.
struct Counterpart {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

impl Counterpart {
    fn start(row: &Load) -> Result<Self> {
        let (socket, over, bytes) = (Packet::open(TAP)?, Arc::<AtomicBool>::default(), row.bytes);
        let seen_by_thread = over.clone();
        let thread = if row.guest_sends {
            std::thread::spawn(move || look(&socket, &seen_by_thread))
        } else {
            std::thread::spawn(move || feed(&socket, bytes, &seen_by_thread))
        };
        Ok(Self { over, thread })
    }

    /// How many frames it has looked at.
    fn stop(self) -> Result<u64> {
        self.over.store(true, Ordering::Relaxed);
        let done = self.thread.join();
        done.map_err(|_| anyhow::anyhow!("the cable's other end panicked"))?
    }
}

/// Says hello until the guest sends, and then looks at one of its frames now and then.
fn look(socket: &Packet, over: &AtomicBool) -> Result<u64> {
    let mut hello = [0; FRAME_MIN];
    frames::write(&mut hello, GUEST, HERE, Kind::Hello, 0);
    socket.wait_for(PATIENCE)?;
    let (mut frame, mut seen, mut newest) = ([0; FRAME_MAX], 0, 0);
    while !over.load(Ordering::Relaxed) {
        let Some(length) = socket.receive(&mut frame) else {
            socket.send(&hello);
            continue;
        };
        if let Some(found) = frames::read(&frame[..length]) {
            ensure!(found.whole, "the guest's frame {} came damaged", found.number);
            ensure!(
                found.number > newest,
                "the guest's frame {} came after {newest}",
                found.number
            );
            (seen, newest) = (seen + 1, found.number);
        }
        std::thread::sleep(SAMPLE);
    }
    Ok(seen)
}

/// Sends frames as fast as the guest says that they come.
fn feed(socket: &Packet, bytes: usize, over: &AtomicBool) -> Result<u64> {
    let (mut frame, mut answer) = (vec![0; bytes], [0; FRAME_MAX]);
    let (mut number, mut under_way, mut came, mut answers) = (0u64, 0u64, 0u64, 0);
    socket.wait_for(PATIENCE)?;
    while !over.load(Ordering::Relaxed) {
        while under_way < WINDOW {
            number += 1;
            frames::write(&mut frame, GUEST, HERE, Kind::Data, number);
            if !socket.send(&frame) {
                break;
            }
            under_way += 1;
        }
        let answered = socket
            .receive(&mut answer)
            .and_then(|length| frames::read(&answer[..length]));
        match answered {
            Some(found) if found.kind == Kind::Count => {
                under_way = under_way.saturating_sub(found.number.saturating_sub(came));
                (came, answers) = (found.number, answers + 1);
            }
            Some(_) => {}
            // What the tap had no room for.
            None => under_way = 0,
        }
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taps_frames_are_found_by_its_whole_name() {
        let table = "Inter-|   Receive\n face |bytes packets\n  tap1: 5 1\n  tap0: 70 12 0\n";
        assert_eq!(received_by(table, "tap0"), Some(12));
        assert_eq!(received_by(table, "tap"), None);
    }
}
