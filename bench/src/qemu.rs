//! The other side: QEMU with the same guest, one process a host, moved by its own commands over the same links.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use drover_chaos_cluster::Cluster;
use drover_chaos_cluster::cluster::{host_ip, host_name};
use drover_chaos_cluster::process::Daemon;
use drover_pki::{Role, host_dns};
use serde_json::{Value, json};

use crate::guest::{Feed, GuestLog};
use crate::interrupt;
use crate::meter::Meter;
use crate::qmp::Qmp;
use crate::result::{Measures, Run, Sample, Side, millis};
use crate::warm;
use crate::workload::Workload;
use crate::{BOOT_LIMIT, DOWNTIME_MS, LOOK_AGAIN, MOVE_LIMIT, REPORTS_AFTER};

/// The program, from the distribution.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// QEMU's small firmware, which comes with the program: where ring 0 is emulated the usual one takes a quarter of a minute to
/// find the kernel, before every turn. It is gone before the guest runs and has no part in a migration.
pub const FIRMWARE: (&str, &str) = ("qboot.rom", "/usr/share/qemu/qboot.rom");

/// No limit: QEMU's own default is 128 MiB/s.
const BANDWIDTH_MAX: u64 = 1 << 40;

/// The first port in a host's namespace that an incoming QEMU takes; nobody else is there.
const FIRST_PORT: u16 = 7500;

/// Between two questions how far it is: as often as ours is looked at, and no more.
const PERIOD: Duration = Duration::from_millis(20);

/// After its first process has ended, QEMU's target runs within this time or never.
const RESUME_LIMIT: Duration = Duration::from_secs(10);

/// One QEMU process.
struct Process {
    /// Kept, since dropping it ends the process.
    daemon: Daemon,
    qmp: Qmp,
    console: Console,
}

/// What the process wrote to its serial port.
struct Console {
    file: PathBuf,
    offset: u64,
}

impl Console {
    fn read(&mut self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        // QEMU makes the file when it starts.
        if let Ok(mut file) = File::open(&self.file) {
            file.seek(SeekFrom::Start(self.offset))?;
            file.read_to_end(&mut bytes)
                .with_context(|| format!("reading {}", self.file.display()))?;
            self.offset += bytes.len() as u64;
        }
        Ok(bytes)
    }
}

impl Feed for Console {
    fn pull(&mut self) -> Result<Vec<u8>> {
        let bytes = self.read()?;
        if bytes.is_empty() {
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(bytes)
    }
}

/// A running VM of QEMU's; dropping it ends it.
pub struct Vm<'a> {
    cluster: &'a Cluster,
    workload: Workload,
    probe: &'a Path,
    name: String,
    at: usize,
    moves: u16,
    log: GuestLog,
    process: Process,
}

impl<'a> Vm<'a> {
    /// Boots the workload's guest at host number `at` and waits until it works.
    pub fn boot(
        cluster: &'a Cluster,
        probe: &'a Path,
        workload: Workload,
        name: &str,
        at: usize,
    ) -> Result<Self> {
        let process = start(cluster, probe, workload, &format!("{name}-0"), at, None)?;
        let mut vm = Self {
            cluster,
            workload,
            probe,
            name: name.to_owned(),
            at,
            moves: 0,
            log: GuestLog::default(),
            process,
        };
        let enough = |log: &GuestLog| log.up && log.reports.len() >= REPORTS_AFTER;
        vm.log.await_some(
            &mut vm.process.console,
            "QEMU's guest to work",
            BOOT_LIMIT,
            enough,
        )?;
        Ok(vm)
    }

    /// Where it runs.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Moves it to host number `to`, and measures.
    pub fn move_to(&mut self, to: usize, pair: usize) -> Result<Run> {
        self.moves += 1;
        let port = FIRST_PORT + self.moves;
        let name = format!("{}-{}", self.name, self.moves);
        let mut target = start(self.cluster, self.probe, self.workload, &name, to, Some(port))?;
        self.prepare(to)?;
        warm::memory(self.workload.populated_mib)?;
        // What it said until now, so that only what it says from now on counts as noticed of the move.
        let said = self.process.console.read()?;
        self.log.feed(&said);
        let before = self.log.reports.len();
        let meter = Meter::start(
            &[self.process.daemon.pid(), target.daemon.pid()],
            // Both are known.
            Vec::new,
        );
        let wire_before = self.cluster.bytes_sent_by_host(self.at)?;
        let begun = Instant::now();
        let uri = format!("tcp:{}:{port}", host_ip(to));
        self.process.qmp.execute("migrate", json!({"uri": uri}))?;
        let moved = self.follow(begun).and_then(|(status, samples)| {
            let ran = target.qmp.await_event("RESUME", RESUME_LIMIT)?;
            Ok((status, samples, ran))
        });
        let usage = meter.stop()?;
        let (status, samples, ran) = moved?;
        let wire_bytes = self.cluster.bytes_sent_by_host(self.at)? - wire_before;
        let said = self.process.console.read()?;
        self.log.feed(&said);
        std::mem::swap(&mut self.process, &mut target);
        drop(target);
        self.at = to;
        let wanted = self.log.reports.len() + REPORTS_AFTER;
        self.log.await_some(
            &mut self.process.console,
            "reports after the move",
            BOOT_LIMIT,
            |log| log.reports.len() >= wanted,
        )?;
        let noticed = self.log.noticed(before);
        let number = |value: &Value| value.as_f64().unwrap_or_default();
        Ok(Run {
            measures: Some(Measures {
                total_ms: millis(ran.duration_since(begun)),
                blackout_ms: number(&status["downtime"]),
                guest_gap_ms: noticed.gap_ms,
                bytes: number(&status["ram"]["transferred"]),
                cpu_s: usage.cpu_s,
            }),
            transfer_ms: Some(number(&status["total-time"])),
            wire_bytes: Some(wire_bytes),
            cpu_less_vcpus_s: Some(usage.cpu_less_vcpus_s),
            noticed: Some(noticed.into()),
            rounds: status["ram"]["dirty-sync-count"].as_u64(),
            samples,
            ..Run::new(pair, Side::Qemu)
        })
    }

    /// The same limits as ours.
    fn prepare(&mut self, to: usize) -> Result<()> {
        let qmp = &mut self.process.qmp;
        let mut parameters = json!({"max-bandwidth": BANDWIDTH_MAX, "downtime-limit": DOWNTIME_MS});
        if self.workload.peer_tls {
            parameters["tls-creds"] = credentials(qmp, self.cluster, self.at, "client")?;
            parameters["tls-hostname"] = json!(host_dns(&host_name(to)));
        }
        qmp.execute("migrate-set-parameters", parameters)?;
        let converge = json!({"capability": "auto-converge", "state": self.workload.throttle});
        qmp.execute("migrate-set-capabilities", json!({"capabilities": [converge]}))?;
        Ok(())
    }

    /// Waits until the migration is complete; its last figures and those on the way.
    fn follow(&mut self, begun: Instant) -> Result<(Value, Vec<Sample>)> {
        let mut samples = Vec::new();
        loop {
            let status = self.process.qmp.execute("query-migrate", json!({}))?;
            let ram = &status["ram"];
            if let (Some(sent), Some(remaining)) = (ram["transferred"].as_u64(), ram["remaining"].as_u64()) {
                samples.push(Sample {
                    at_ms: millis(begun.elapsed()),
                    sent,
                    remaining,
                });
            }
            match status["status"].as_str() {
                Some("completed") => return Ok((status, samples)),
                Some(ended @ ("failed" | "cancelled")) => {
                    bail!("QEMU's migration {ended}: {}", status["error-desc"]);
                }
                _ => {}
            }
            if begun.elapsed() > MOVE_LIMIT {
                self.process.qmp.execute("migrate_cancel", json!({}))?;
                bail!("not over after {MOVE_LIMIT:?}: {}", status["ram"]);
            }
            interrupt::check()?;
            std::thread::sleep(PERIOD);
        }
    }
}

/// Gives a QEMU the certificate of its host `at`, laid out as it wants it, for one end of a connection, `client` or `server`. Returns what it
/// is called by.
fn credentials(qmp: &mut Qmp, cluster: &Cluster, at: usize, endpoint: &str) -> Result<Value> {
    let name = host_name(at);
    let dir = cluster.scratch().join(format!("qemu-{name}-{endpoint}"));
    if !dir.exists() {
        let files = cluster.issue(Role::Host, &name)?;
        fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        let to = |what: &str| dir.join(format!("{endpoint}-{what}.pem"));
        let copies = [
            (files.ca, dir.join("ca-cert.pem")),
            (files.cert, to("cert")),
            (files.key, to("key")),
        ];
        for (from, to) in copies {
            fs::copy(&from, &to).with_context(|| format!("copying {}", from.display()))?;
        }
    }
    let id = json!(format!("tls-{endpoint}"));
    let object = json!({"qom-type": "tls-creds-x509", "id": id, "dir": dir, "endpoint": endpoint, "verify-peer": true});
    qmp.execute("object-add", object)?;
    Ok(id)
}

/// Starts a QEMU at a host; with `port` one that waits there for a VM.
fn start(
    cluster: &Cluster,
    probe: &Path,
    workload: Workload,
    name: &str,
    at: usize,
    port: Option<u16>,
) -> Result<Process> {
    let file = |what: &str| cluster.scratch().join(format!("qemu-{name}.{what}"));
    let (serial, socket, log) = (file("serial"), file("qmp"), file("log"));
    let mut command = Command::new(PROGRAM);
    command.args([
        "-accel",
        "kvm",
        "-cpu",
        "qemu64",
        "-machine",
        "q35",
        "-nodefaults",
        "-no-user-config",
    ]);
    command.args([
        "-no-reboot",
        "-display",
        "none",
        "-name",
        "probe,debug-threads=on",
    ]);
    command.args(["-m", &workload.memory_mib.to_string()]);
    command.args(["-smp", &workload.vcpus.to_string()]);
    if Path::new(FIRMWARE.1).exists() {
        command.args(["-bios", FIRMWARE.0]);
    }
    command.arg("-kernel").arg(probe);
    command.args(["-append", workload.parameters]);
    command.args(["-serial", &format!("file:{}", serial.display())]);
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
    if port.is_some() {
        command.args(["-incoming", "defer"]);
    }
    let errors = File::create(&log).with_context(|| format!("making {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
    let daemon = cluster.start_at_host(at, command)?;
    let mut qmp = Qmp::connect(&socket).with_context(|| {
        let said = fs::read_to_string(&log).unwrap_or_default();
        format!("QEMU at host {}: {}", at + 1, said.trim())
    })?;
    if let Some(port) = port {
        if workload.peer_tls {
            let id = credentials(&mut qmp, cluster, at, "server")?;
            qmp.execute("migrate-set-parameters", json!({"tls-creds": id}))?;
        }
        let uri = format!("tcp:{}:{port}", host_ip(at));
        qmp.execute("migrate-incoming", json!({"uri": uri}))?;
    }
    let console = Console {
        file: serial,
        offset: 0,
    };
    Ok(Process { daemon, qmp, console })
}
