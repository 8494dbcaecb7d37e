//! `cargo xtask bench disk`: requests a second through a virtio disk, on the same file, with the same guest.
//!
//! The probe keeps so many requests of 4 KiB under way, at random places, and compares what it reads with what it wrote last. It polls, so neither
//! side's interrupts count. Both sides go through the host's page cache, as QEMU's `cache=writeback` does.

use std::fs::File;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use drover_probe::report::DiskLoad;

use crate::BOOT_LIMIT;
use crate::beside::ours::Ours;
use crate::beside::qemu::{Aio, Firmware, Machine, Qemu};
use crate::beside::rows::{Figure, Values};
use crate::beside::{Arguments, Bench, Given, Vm};
use crate::guest::GuestLog;
use crate::meter::Meter;
use crate::result::Side;

const FIGURES: [Figure; 2] = [
    Figure {
        name: "iops",
        title: "requests/s",
        digits: 0,
    },
    Figure {
        name: "cpu",
        title: "VMM's processors",
        digits: 2,
    },
];

/// A load and its peer.
#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    depth: u32,
    writes: u32,
    aio: Aio,
}

const fn load(name: &'static str, depth: u32, writes: u32, aio: Aio) -> Load {
    Load {
        name,
        depth,
        writes,
        aio,
    }
}

const ROWS: [Load; 8] = [
    load("read-1-threads", 1, 0, Aio::Threads),
    load("read-1-uring", 1, 0, Aio::IoUring),
    load("read-32-threads", 32, 0, Aio::Threads),
    load("read-32-uring", 32, 0, Aio::IoUring),
    load("write-32-threads", 32, 100, Aio::Threads),
    load("write-32-uring", 32, 100, Aio::IoUring),
    load("mixed-32-threads", 32, 30, Aio::Threads),
    load("mixed-32-uring", 32, 30, Aio::IoUring),
];

/// The disk; all of it is in use.
const DISK_BYTES: u64 = 256 << 20;
const MEMORY_MIB: u64 = 64;
/// Whole seconds that are measured.
const SECONDS: usize = 3;

/// Measures both sides in turns.
pub fn bench(arguments: &Arguments) -> Result<()> {
    let bench = Bench::new(arguments)?;
    let rows = bench.chosen(&ROWS, |row| row.name)?;
    bench.take("disk", &FIGURES, &rows, |row| row.name, measure)
}

/// A disk for one run: a file of holes, which the guest fills.
fn make_disk(bench: &Bench<'_>) -> Result<PathBuf> {
    let path = bench.folder.path().join("disk.raw");
    let _ = std::fs::remove_file(&path);
    let file = File::create(&path).with_context(|| format!("making {}", path.display()))?;
    file.set_len(DISK_BYTES).context("a disk's size")?;
    Ok(path)
}

fn measure(bench: &Bench<'_>, row: &Load, side: Side) -> Result<Values> {
    let disk = make_disk(bench)?;
    let given = Given {
        memory_mib: MEMORY_MIB,
        parameters: format!(
            "own=64K hot=4K rate=0 hz=10 disk=bench depth={} writes={}",
            row.depth, row.writes
        ),
        disk: Some(disk),
        tap: None,
    };
    if side == Side::Ours {
        return watch(&mut Ours::start(bench, &given)?);
    }
    watch(&mut Qemu::start(
        bench,
        &given,
        Machine::Q35,
        Firmware::Usual,
        row.aio,
    )?)
}

/// Requests a second, over whole seconds after the first in which the load ran.
fn watch(vm: &mut dyn Vm) -> Result<Values> {
    let mut log = GuestLog::default();
    let done = |load: &DiskLoad| load.reads + load.writes;
    let loads = |log: &GuestLog| -> Vec<DiskLoad> {
        let loads = log.reports.iter().filter_map(|report| report.disk_load);
        loads.filter(|load| done(load) > 0).collect()
    };
    log.await_some(vm.console(), "the load to begin", BOOT_LIMIT, |log| {
        !loads(log).is_empty()
    })?;
    let (meter, began) = (Meter::start(&[vm.pid()], Vec::new), Instant::now());
    let over = log.await_some(vm.console(), "the load", BOOT_LIMIT, |log| {
        loads(log).len() > SECONDS
    });
    let cpu = meter.stop()?.cpu_less_vcpus_s / began.elapsed().as_secs_f64();
    over?;
    let loads = loads(&log);
    let (first, last) = (loads[0], loads[SECONDS]);
    ensure!(last.lost == 0, "the guest lost {} blocks of its disk", last.lost);
    let seconds = (last.at_us - first.at_us) as f64 / 1e6;
    let iops = (done(&last) - done(&first)) as f64 / seconds;
    Ok(Values::from([("iops", iops), ("cpu", cpu)]))
}
