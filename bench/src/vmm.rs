//! `cargo xtask bench vmm`: how long a VMM takes to its guest's first instruction, and what it holds of the machine's memory beside the guest's.
//!
//! The first instructions of a guest say an empty line on its serial port, and the same watcher waits for it on both sides. Ours is the probe's:
//! its image is loaded within our figure. QEMU begins with its firmware, which where ring 0 is emulated takes longer than all before it; so its start is
//! measured with a firmware of those few instructions and no kernel, and when the probe's own first line came is told apart.

use std::time::Duration;

use anyhow::Result;

use crate::beside::footprint::Footprint;
use crate::beside::ours::Ours;
use crate::beside::qemu::{Aio, Firmware, Machine, Qemu};
use crate::beside::rows::{Figure, Values};
use crate::beside::{Arguments, Bench, Given, Vm, await_reports};
use crate::guest::GuestLog;
use crate::result::{Side, millis};
use crate::{BOOT_LIMIT, REPORTS_AFTER};

const FIGURES: [Figure; 5] = [
    Figure {
        name: "start_ms",
        title: "first instruction ms",
        digits: 1,
    },
    Figure {
        name: "kernel_ms",
        title: "kernel's first ms",
        digits: 1,
    },
    Figure {
        name: "anon_mib",
        title: "anonymous MiB",
        digits: 1,
    },
    Figure {
        name: "private_mib",
        title: "private MiB",
        digits: 1,
    },
    Figure {
        name: "pss_mib",
        title: "Pss MiB",
        digits: 1,
    },
];

/// QEMU's machines beside ours, by the names of their rows.
const ROWS: [(&str, Machine); 2] = [("microvm", Machine::Microvm), ("q35", Machine::Q35)];

/// The guest: it works a little, as most do.
const PARAMETERS: &str = "own=16M hot=4M rate=1000";
const MEMORY_MIB: u64 = 128;

/// Measures both sides in turns.
pub fn bench(arguments: &Arguments) -> Result<()> {
    let bench = Bench::new(arguments)?;
    let rows = bench.chosen(&ROWS, |row| row.0)?;
    bench.take("vmm", &FIGURES, &rows, |row| row.0, measure)
}

fn measure(bench: &Bench<'_>, row: &(&'static str, Machine), side: Side) -> Result<Values> {
    let given = Given {
        memory_mib: MEMORY_MIB,
        parameters: PARAMETERS.to_owned(),
        disk: None,
        tap: None,
    };
    if side == Side::Ours {
        let mut vm = Ours::start(bench, &given)?;
        let first = millis(vm.first_byte(BOOT_LIMIT)?);
        let mut values = settled(&mut vm)?;
        values.extend([
            ("start_ms", first),
            ("kernel_ms", first),
            ("listens_ms", millis(vm.listens)),
            ("granted_ms", millis(vm.granted)),
        ]);
        return Ok(values);
    }
    let start = |firmware| Qemu::start(bench, &given, row.1, firmware, Aio::Threads);
    let began: Duration = start(Firmware::Beacon)?.first_byte(BOOT_LIMIT)?;
    let mut vm = start(Firmware::Usual)?;
    let kernel = vm.first_byte(BOOT_LIMIT)?;
    let mut values = settled(&mut vm)?;
    values.extend([("start_ms", millis(began)), ("kernel_ms", millis(kernel))]);
    Ok(values)
}

/// What the process holds once its guest works.
fn settled(vm: &mut dyn Vm) -> Result<Values> {
    let mut log = GuestLog::default();
    await_reports(vm, &mut log, |reports| reports.len() >= REPORTS_AFTER)?;
    let held = Footprint::of(vm.pid())?;
    let mib = |kib: u64| kib as f64 / 1024.0;
    Ok(Values::from([
        ("anon_mib", mib(held.anon_kib)),
        ("private_mib", mib(held.private_kib)),
        ("pss_mib", mib(held.pss_kib)),
    ]))
}
