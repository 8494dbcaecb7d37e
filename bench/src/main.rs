//! `cargo xtask bench`: what we cost beside QEMU, of one guest in turns.
//!
//! `vmm`, `disk` and `net` are of one VM on this machine (`beside`). The rest is of `migration`: one guest, moved by us and by QEMU over the same
//! links, and what it cost.
//!
//! ```text
//!   drover-bench ── a whole cluster (drover-chaos-cluster): 3 controllers, 3 agents, one network namespace a host
//!                    host1 ◀── veth, bridge ──▶ host2
//!                     ├─ drover-vmm ──migration──▶ drover-vmm        asked for through the API, judged by the receipt
//!                     ├─ qemu ───────migration──▶ qemu               asked for through QMP, judged by query-migrate
//!                     └─ thread ───────1 MiB────▶ thread             the limit: a plain TCP copy
//! ```
//!
//! Only one guest exists at a time, so that neither has to share the processors with the other. A guest is booted, moved
//! there and back, and ended; then it is the other side's turn. docs/bench.md says what each figure is measured by.
//!
//! It knows nothing of how either side does it, and it judges nothing but lost pages: its figures are for people, and for
//! whoever reads the JSON.

mod beside;
mod copy;
mod disk;
mod guest;
mod host;
mod interrupt;
mod meter;
mod net;
mod ours;
mod packet;
mod picture;
mod qemu;
mod qmp;
mod result;
mod table;
mod turns;
mod vmm;
mod warm;
mod watch;
mod workload;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use drover_chaos_cluster::cluster::obstacle;
use drover_chaos_cluster::{Cluster, Settings, Setup};

use crate::host::Host;
use crate::result::{Report, Side};
use crate::workload::{Workload, chosen};

/// A guest that writes its first content to a GiB works within this time.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// A migration that takes longer is given up, on either side.
const MOVE_LIMIT: Duration = Duration::from_secs(90);

/// How often a state that cannot be awaited is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Reports awaited after boot and after a move: the first may tell of before, the second is of a whole second.
const REPORTS_AFTER: usize = 2;

/// The guest reads back all of its pages once in this time.
const SWEEP_S: u64 = 11;

/// The blackout that both sides may have, as our default is.
const DOWNTIME_MS: u32 = 100;

/// What each host offers to guests: one of the largest, and the rest of its predecessor.
const HOST_MEMORY_MIB: u64 = 8192;

/// What makes the programs that are measured.
const MADE_BY: &str = "cargo xtask bench migration";

/// Measures us beside QEMU.
#[derive(Parser)]
#[command(name = "cargo xtask bench", version)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Live migrations of one guest, by us and by QEMU in turns
    Migration(Migration),
    /// A VMM's start and what it holds of memory beside its guest's
    Vmm(beside::Arguments),
    /// Requests a second of a virtio disk
    Disk(beside::Arguments),
    /// Frames through a virtio NIC on a tap
    Net(beside::Arguments),
}

#[derive(clap::Args)]
struct Migration {
    /// Writes every figure to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Migrations of each side a workload
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pairs: u32,
    /// Only these workloads
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    only: Vec<String>,
    /// Draws a picture a workload into this folder
    #[arg(long, value_name = "DIR")]
    pictures: Option<PathBuf>,
    /// Where drover-controller, drover-agent and drover-vmm lie
    #[arg(long, value_name = "DIR")]
    binaries: PathBuf,
    /// The probe guest's kernel
    #[arg(long, value_name = "FILE")]
    probe: PathBuf,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().what {
        What::Migration(arguments) => bench(&arguments),
        What::Vmm(arguments) => vmm::bench(&arguments),
        What::Disk(arguments) => disk::bench(&arguments),
        What::Net(arguments) => net::bench(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &Migration) -> Result<()> {
    let workloads = chosen(&arguments.only)?;
    let qemu = qemu::PROGRAM;
    if let Some(why) = obstacle(&arguments.binaries, &arguments.probe, MADE_BY) {
        bail!("no benchmark on this machine: {why}");
    }
    ensure!(
        !host::qemu_version().is_empty(),
        "no benchmark on this machine: {qemu} cannot be started (package qemu-system-x86)"
    );
    // Before minutes of work, not after them.
    if let Some(dir) = &arguments.pictures {
        fs::create_dir_all(dir).with_context(|| format!("--pictures {}", dir.display()))?;
    }
    if let Some(file) = &arguments.json {
        fs::write(file, "").with_context(|| format!("--json {}", file.display()))?;
    }
    interrupt::listen()?;
    let report = run(arguments, &workloads)?;
    println!("{}", table::render(&report));
    let failed = report
        .workloads
        .iter()
        .map(|summary| summary.failures(Side::Ours).count())
        .sum::<usize>();
    ensure!(failed == 0, "{failed} of our migrations failed");
    Ok(())
}

/// Runs all workloads; what is known is written after each of them.
fn run(arguments: &Migration, workloads: &[Workload]) -> Result<Report> {
    let mut report = Report {
        host: Host::here(),
        workloads: Vec::new(),
    };
    let setup = Setup {
        settings: Settings {
            max_downtime_ms: DOWNTIME_MS,
            // For the workloads that ask for it; the others are encrypted all the same.
            allow_plaintext: true,
            ..Settings::default()
        },
        binaries: arguments.binaries.clone(),
        probe: arguments.probe.clone(),
        host_memory_mib: HOST_MEMORY_MIB,
        watched: false,
        sandbox: Some("off"),
    };
    let cluster = Cluster::start(&setup)?;
    let pairs = usize::try_from(arguments.pairs).context("a number of pairs that fits")?;
    for workload in workloads {
        eprintln!("{}: {}", workload.name, workload.about);
        let summary = turns::take(&cluster, &arguments.probe, workload, pairs)?;
        if let Some(dir) = &arguments.pictures {
            let file = dir.join(format!("{}.svg", workload.name));
            write(&file, &picture::draw(workload, &summary))?;
        }
        report.workloads.push(summary);
        if let Some(file) = &arguments.json {
            let json = serde_json::to_string_pretty(&report).context("writing the figures as JSON")?;
            write(file, &(json + "\n"))?;
        }
    }
    Ok(report)
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("writing {}", file.display()))
}
