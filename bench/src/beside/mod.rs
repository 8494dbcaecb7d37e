//! One VM of either side on this machine alone, without a cluster: what the benchmarks of the VMM itself start, in turns.
//!
//! Both sides' processes are started by the same spawner, so they end with this process however it ends, and their guests speak over the same
//! kind of console. Only one VM exists at a time.

pub mod footprint;
pub mod ours;
pub mod qemu;
pub mod rows;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use drover_chaos_cluster::process::Spawner;
use drover_probe::report::Second;
use nix::unistd::Pid;

use self::rows::{Figure, Report, Row, Run, table};
use crate::guest::{Feed, GuestLog};
use crate::host;
use crate::result::Side;
use crate::{BOOT_LIMIT, interrupt};

/// What every benchmark of the VMM itself is told.
#[derive(clap::Args)]
pub struct Arguments {
    /// Writes every figure to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Runs of each side a row
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Only these rows
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Where drover-vmm lies
    #[arg(long, value_name = "DIR")]
    pub binaries: PathBuf,
    /// The probe guest's kernel
    #[arg(long, value_name = "FILE")]
    pub probe: PathBuf,
}

/// What a VM of either side is given.
#[derive(Clone, Debug)]
pub struct Given {
    /// The guest's memory.
    pub memory_mib: u64,
    /// The probe's parameters.
    pub parameters: String,
    /// The file of its one disk.
    pub disk: Option<PathBuf>,
    /// The tap of its one NIC.
    pub tap: Option<String>,
}

/// The NIC's address, on either side.
pub const MAC: &str = "52:54:00:00:00:01";

/// A VM of either side.
pub trait Vm {
    /// Its process.
    fn pid(&self) -> Pid;
    /// Since its process was started, until its guest's first byte on the console was here. To be asked first.
    fn first_byte(&mut self, limit: Duration) -> Result<Duration>;
    /// Its guest's console.
    fn console(&mut self) -> &mut dyn Feed;
}

/// Waits until `enough` holds of the guest's reports.
pub fn await_reports(vm: &mut dyn Vm, log: &mut GuestLog, enough: impl Fn(&[Second]) -> bool) -> Result<()> {
    log.await_some(vm.console(), "the guest's reports", BOOT_LIMIT, |log| {
        enough(&log.reports)
    })
}

/// Where processes are started, files lie and what is measured with.
pub struct Bench<'a> {
    /// The command line's.
    pub arguments: &'a Arguments,
    /// Starts everything.
    pub spawner: Spawner,
    /// A folder that goes with this value.
    pub folder: tempfile::TempDir,
}

impl<'a> Bench<'a> {
    /// What is missing on this machine is an error.
    pub fn new(arguments: &'a Arguments) -> Result<Self> {
        for (file, what) in [
            (arguments.binaries.join("drover-vmm"), "drover-vmm"),
            (arguments.probe.clone(), "the probe guest"),
        ] {
            ensure!(
                file.exists(),
                "no benchmark on this machine: {what} is not built: cargo xtask bench makes it"
            );
        }
        let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
        if let Err(error) = kvm {
            bail!("no benchmark on this machine: /dev/kvm: {error}");
        }
        ensure!(
            nix::unistd::geteuid().is_root(),
            "no benchmark on this machine: needs root"
        );
        ensure!(
            !host::qemu_version().is_empty(),
            "no benchmark on this machine: {} cannot be started (package qemu-system-x86)",
            crate::qemu::PROGRAM
        );
        if let Some(file) = &arguments.json {
            fs::write(file, "").with_context(|| format!("--json {}", file.display()))?;
        }
        interrupt::listen()?;
        Ok(Self {
            arguments,
            spawner: Spawner::new()?,
            folder: tempfile::tempdir().context("making a folder")?,
        })
    }

    /// A folder of its own for one process.
    pub fn subfolder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.path().join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
        }
        fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(folder)
    }

    /// The rows of `all` that were asked for, by their names.
    pub fn chosen<T: Copy>(&self, all: &[T], name: impl Fn(&T) -> &'static str) -> Result<Vec<T>> {
        let only = &self.arguments.only;
        if let Some(unknown) = only
            .iter()
            .find(|word| !all.iter().any(|row| name(row) == **word))
        {
            let known: Vec<_> = all.iter().map(&name).collect();
            bail!("there is no row {unknown:?}, known are {}", known.join(", "));
        }
        let wanted = |row: &&T| only.is_empty() || only.iter().any(|word| word == name(row));
        Ok(all.iter().filter(wanted).copied().collect())
    }

    /// Runs each of `rows` with both sides in turns, as often as was asked for, and prints and writes what came of it.
    pub fn take<T: Copy>(
        &self,
        what: &'static str,
        figures: &[Figure],
        rows: &[T],
        name: impl Fn(&T) -> &'static str,
        mut measure: impl FnMut(&Self, &T, Side) -> Result<rows::Values>,
    ) -> Result<()> {
        let mut report = Report::new(what);
        for row in rows {
            let mut runs = Vec::new();
            for number in 1..=self.arguments.runs {
                // The other one first in every other turn.
                let sides = match number % 2 {
                    1 => [Side::Ours, Side::Qemu],
                    _ => [Side::Qemu, Side::Ours],
                };
                for side in sides {
                    let measured = measure(self, row, side);
                    interrupt::check()?;
                    let run = Run::new(number, side, measured);
                    eprintln!("{:<14} {}", name(row), rows::line(&run, figures));
                    runs.push(run);
                }
            }
            report.rows.push(Row::new(name(row), runs));
            if let Some(file) = &self.arguments.json {
                let json = serde_json::to_string_pretty(&report).context("writing the figures as JSON")?;
                fs::write(file, json + "\n").with_context(|| format!("writing {}", file.display()))?;
            }
        }
        println!("{}", table(&report, figures));
        let failed = report.failures(Side::Ours);
        ensure!(failed == 0, "{failed} of our runs failed");
        Ok(())
    }
}

/// Waits until `path` is there.
fn await_path(path: &Path, limit: Duration, look_again: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !path.exists() {
        if Instant::now() > deadline {
            bail!("{} is not there after {limit:?}", path.display());
        }
        std::thread::sleep(look_again);
    }
    Ok(())
}
