//! Our side: a VM made through the API, moved through the API, judged by the receipt, and watched at its VMMs' sockets.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use drover_chaos_cluster::client::probe_spec;
use drover_chaos_cluster::cluster::host_name;
use drover_chaos_cluster::process::find;
use drover_chaos_cluster::{Client, Cluster};
use drover_proto::Fault;
use drover_proto::v1::{Migration, MigrationOptions, MigrationPhase, Receipt, VmState};
use nix::unistd::Pid;

use crate::guest::{Feed, GuestLog};
use crate::interrupt;
use crate::meter::Meter;
use crate::result::{Cancelled, Measures, Run, Side, millis};
use crate::warm;
use crate::watch::{self, Watch};
use crate::workload::Workload;
use crate::{BOOT_LIMIT, DOWNTIME_MS, LOOK_AGAIN, MOVE_LIMIT, REPORTS_AFTER, SWEEP_S};

/// How long one read of the console waits.
const WAIT_MS: u32 = 500;

/// So slowly goes a migration that is to be cancelled, MiB/s: its first round is not over when it is.
const CANCELLED_MIB_S: u64 = 32;

/// Between two looks whether a cancelled migration's target is gone.
const CANCEL_LOOK: Duration = Duration::from_millis(1);

/// How much of its time a vCPU may be held back where the workload allows it.
const THROTTLE_PERCENT: u32 = 99;

/// A running VM of ours. To be ended by [`Vm::end`]; the cluster's end ends it too.
pub struct Vm<'a> {
    cluster: &'a Cluster,
    workload: Workload,
    name: String,
    at: usize,
    log: GuestLog,
    console: Console<'a>,
}

struct Console<'a> {
    client: &'a Client,
    vm: String,
    offset: u64,
}

impl Console<'_> {
    fn read(&mut self, wait_ms: u32) -> Result<Vec<u8>> {
        let answer = self.client.read_console(&self.vm, self.offset, wait_ms);
        let answer = answer.map_err(said)?;
        if answer.offset != self.offset {
            bail!(
                "the console of {} has lost or repeated bytes: asked for {}, got {}",
                self.vm,
                self.offset,
                answer.offset
            );
        }
        self.offset = answer.next_offset;
        Ok(answer.data)
    }
}

impl Feed for Console<'_> {
    fn pull(&mut self) -> Result<Vec<u8>> {
        self.read(WAIT_MS)
    }
}

fn said(fault: Fault) -> anyhow::Error {
    anyhow!("{fault}")
}

impl<'a> Vm<'a> {
    /// Boots the workload's guest on host number `at` and waits until it works.
    pub fn boot(cluster: &'a Cluster, workload: Workload, name: &str, at: usize) -> Result<Self> {
        let spec = probe_spec(
            name,
            &host_name(at),
            workload.memory_mib,
            workload.vcpus,
            workload.parameters,
        );
        cluster.client.create_vm(&spec, true).map_err(said)?;
        let console = Console {
            client: &cluster.client,
            vm: name.to_owned(),
            offset: 0,
        };
        let mut vm = Self {
            cluster,
            workload,
            name: name.to_owned(),
            at,
            log: GuestLog::default(),
            console,
        };
        vm.await_state("running", |state| state == Some(VmState::Running))?;
        let enough = |log: &GuestLog| log.up && log.reports.len() >= REPORTS_AFTER;
        vm.log
            .await_some(&mut vm.console, "the guest to work", BOOT_LIMIT, enough)?;
        Ok(vm)
    }

    /// Where it runs.
    pub fn at(&self) -> usize {
        self.at
    }

    fn await_state(&self, what: &str, fits: impl Fn(Option<VmState>) -> bool) -> Result<()> {
        let deadline = Instant::now() + BOOT_LIMIT;
        loop {
            let vm = self.cluster.client.vm(&self.name);
            if fits(vm.as_ref().ok().map(|vm| vm.state())) {
                return Ok(());
            }
            interrupt::check()?;
            if Instant::now() > deadline {
                bail!(
                    "waited {BOOT_LIMIT:?} for {} to be {what}: it is {vm:?}",
                    self.name
                );
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// The folder of the VMM that executes, and its epoch.
    fn running(&self) -> Result<(PathBuf, u64)> {
        let mut seen = self.cluster.vmms(&self.name);
        seen.retain(|vmm| vmm.runs());
        match seen.as_slice() {
            [only] => Ok((only.dir.clone(), only.info.epoch)),
            other => bail!("{} is executed by {} VMMs", self.name, other.len()),
        }
    }

    /// Moves it to host number `to`, and measures.
    pub fn move_to(&mut self, to: usize, pair: usize) -> Result<Run> {
        let (source, epoch) = self.running()?;
        self.catch_up()?;
        let before = self.log.reports.len();
        warm::memory(self.workload.populated_mib)?;
        let known = find("drover-vmm", &source);
        let incoming = self.cluster.vm_dir(to, &self.name);
        let meter = {
            // Only a folder of the next epoch is the target's: an earlier visit to that host left others.
            let prefix = incoming.join(format!("e{}-", epoch + 1));
            Meter::start(&known, move || find("drover-vmm", &prefix))
        };
        let wire_before = self.cluster.bytes_sent_by_host(self.at)?;
        let begun = Instant::now();
        let options = MigrationOptions {
            max_downtime_ms: DOWNTIME_MS,
            max_throttle_percent: if self.workload.throttle {
                THROTTLE_PERCENT
            } else {
                0
            },
            plaintext: self.workload.plaintext,
            ..MigrationOptions::default()
        };
        let client = &self.cluster.client;
        let planned = if self.workload.upgrade {
            client.upgrade(&self.name)
        } else {
            client.migrate_with(&self.name, &host_name(to), options)
        };
        let planned = planned.map_err(said)?;
        let target = incoming.join(format!("e{}-{}", epoch + 1, planned.id));
        let watch = Watch::start(begun, source, target)?;
        let ended = self.await_end(&planned.id, &watch);
        let usage = meter.stop()?;
        let watched = watch.stop()?;
        let ended = ended?;
        let receipt = receipt(&ended)?;
        ensure!(
            receipt.plaintext == self.workload.plaintext,
            "the pages were {}encrypted, and that was not asked for",
            if receipt.plaintext { "not " } else { "" }
        );
        let ran = watched.ran.context("nobody saw the target's vCPUs run")?;
        let wire_bytes = self.cluster.bytes_sent_by_host(self.at)? - wire_before;
        self.at = to;
        self.catch_up()?;
        let wanted = self.log.reports.len() + REPORTS_AFTER;
        self.log
            .await_some(&mut self.console, "reports after the move", BOOT_LIMIT, |log| {
                log.reports.len() >= wanted
            })?;
        let noticed = self.log.noticed(before);
        let blackout_us = receipt.blackout_us.map_or(0, |parts| parts.total);
        Ok(Run {
            measures: Some(Measures {
                total_ms: millis(ran),
                blackout_ms: blackout_us as f64 / 1000.0,
                guest_gap_ms: noticed.gap_ms,
                bytes: receipt.bytes as f64,
                cpu_s: usage.cpu_s,
            }),
            transfer_ms: Some(receipt.total_ms as f64),
            wire_bytes: Some(wire_bytes),
            cpu_less_vcpus_s: Some(usage.cpu_less_vcpus_s),
            extra_mib: Some(usage.extra_mib),
            noticed: Some(noticed.into()),
            rounds: Some(u64::from(receipt.rounds)),
            receipt: Some(details(&receipt)),
            samples: watched.samples,
            ..Run::new(pair, Side::Ours)
        })
    }

    /// Begins to move it to host number `to`, slowly, cancels that in the midst of the first round, and measures.
    pub fn cancel_move(&self, to: usize) -> Result<Cancelled> {
        let (source, epoch) = self.running()?;
        let client = &self.cluster.client;
        let options = MigrationOptions {
            max_downtime_ms: DOWNTIME_MS,
            bandwidth_mib_s: CANCELLED_MIB_S,
            ..MigrationOptions::default()
        };
        let planned = client
            .migrate_with(&self.name, &host_name(to), options)
            .map_err(said)?;
        let target = self.cluster.vm_dir(to, &self.name);
        let target = target.join(format!("e{}-{}", epoch + 1, planned.id));
        let deadline = Instant::now() + MOVE_LIMIT;
        loop {
            let now = client.migration(&planned.id).map_err(said)?;
            if now
                .progress
                .as_ref()
                .is_some_and(|progress| progress.bytes_sent > 0)
            {
                break;
            }
            interrupt::check()?;
            ensure!(
                Instant::now() < deadline,
                "no page was sent within {MOVE_LIMIT:?}: {now:?}"
            );
            std::thread::sleep(LOOK_AGAIN);
        }
        let processes = find("drover-vmm", &target);
        ensure!(!processes.is_empty(), "nothing receives {}", planned.id);
        let free = watch::until_unmoved(source)?;
        let asked = Instant::now();
        client.cancel(&planned.id).map_err(said)?;
        let lives = |pid: &Pid| Path::new(&format!("/proc/{pid}")).exists();
        while processes.iter().any(lives) {
            ensure!(
                asked.elapsed() < MOVE_LIMIT,
                "the target of {} lives on",
                planned.id
            );
            std::thread::sleep(CANCEL_LOOK);
        }
        let target_ms = millis(asked.elapsed());
        let free = free.join().map_err(|_| anyhow!("the watch panicked"))??;
        Ok(Cancelled {
            source_ms: millis(free.saturating_duration_since(asked)),
            target_ms,
        })
    }

    /// Reads what the guest has said until now.
    fn catch_up(&mut self) -> Result<()> {
        loop {
            let bytes = self.console.read(0)?;
            if bytes.is_empty() {
                return self.log.check();
            }
            self.log.feed(&bytes);
        }
    }

    /// Waits until the migration's end is in the log.
    fn await_end(&self, id: &str, watch: &Watch) -> Result<Migration> {
        let deadline = Instant::now() + MOVE_LIMIT;
        loop {
            let migration = self.cluster.client.migration(id).map_err(said)?;
            match migration.phase() {
                MigrationPhase::Done => return Ok(migration),
                MigrationPhase::Aborted => {
                    let reason = migration.reason.unwrap_or_default();
                    bail!("aborted, {}: {}", reason.code, reason.message);
                }
                _ => {}
            }
            if Instant::now() > deadline {
                // Whether this is heard no longer matters: the VM is ended next.
                let _ = self.cluster.client.cancel(id);
                bail!("not over after {MOVE_LIMIT:?}: {:?}", migration.progress);
            }
            interrupt::check()?;
            // Sparing while pages flow, quick once it runs.
            std::thread::sleep(if watch.ran() { LOOK_AGAIN } else { LOOK_AGAIN * 10 });
        }
    }

    /// Lets the guest read back all that it owns.
    pub fn sweep(&mut self) -> Result<()> {
        let until = self.log.reports.last().map_or(0, |report| report.t_s) + SWEEP_S;
        let limit = Duration::from_secs(SWEEP_S) + BOOT_LIMIT;
        self.log
            .await_some(&mut self.console, "a sweep over all pages", limit, |log| {
                log.reports.last().is_some_and(|report| report.t_s >= until)
            })
    }

    /// Deletes the VM and waits until it is gone.
    pub fn end(self) -> Result<()> {
        self.cluster.client.delete_vm(&self.name).map_err(said)?;
        self.await_state("gone", |state| state.is_none())?;
        self.cluster.await_no_vmm(&self.name);
        Ok(())
    }
}

fn receipt(migration: &Migration) -> Result<Receipt> {
    migration
        .receipt
        .clone()
        .with_context(|| format!("migration {} left no receipt", migration.id))
}

/// The receipt's other figures, as they stand in the API.
fn details(receipt: &Receipt) -> serde_json::Value {
    let parts = receipt.blackout_us.unwrap_or_default();
    serde_json::json!({
        "pages": receipt.pages, "zero_pages": receipt.zero_pages, "tracker": receipt.tracker, "streams": receipt.streams,
        "plaintext": receipt.plaintext, "throttle_percent": receipt.throttle_percent,
        "blackout_us": {"pause": parts.pause, "last_pages": parts.last_pages, "state": parts.state,
                        "commit": parts.commit, "resume": parts.resume},
    })
}
