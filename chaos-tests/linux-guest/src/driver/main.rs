//! Runs inside the emulated host: boots a Linux guest under one `drover-vmm`, moves it to a second one, and talks to its shell all along.
//!
//! It plays the agent's and the controller's part: it writes configurations, gives grants, and tells the source the outcome.

mod installed;
mod net;
mod restored;
mod shell;
mod vmm;

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use drover_linux_guest::report::{NETWORK_CONFIG, Report};
use drover_node_agent::host::seed::{self, SEED_FILE, SEED_SERIAL, SEED_SLOT};
use drover_pki::{ClusterCa, Role, TlsFiles};
use drover_proto::v1::{
    AttachDiskRequest, AttachNicRequest, CloudSeed, DetachDiskRequest, DetachNicRequest, MigrationOptions,
    PowerButtonRequest, ResizeDiskRequest, SetMemoryRequest, StartOutgoingRequest, VmmInfo, VmmState,
};
use serde_json::json;

use self::net::Stream;
use self::shell::Shell;
use self::vmm::Vmm;

const ROOT: &str = "/run/drover";
const CLUSTER: &str = "linux-guest";
const MIGRATION: &str = "m1";
const GUEST_MEMORY_MIB: u64 = 256;
/// What the guest is to give up of it.
const GIVEN_UP_MIB: u64 = 64;
const GUEST_VCPUS: u32 = 2;
/// The guest's disk, which both VMMs open.
const DISK: &str = "disk.raw";
const DISK_BYTES: u64 = 16 << 20;
const GROWN_BYTES: u64 = 24 << 20;
/// The disk that comes while the guest runs, and where: after the random numbers, the first disk and the NIC.
const LATE_DISK: &str = "late.raw";
const LATE_SLOT: u32 = 4;
/// The first disk's: after the random numbers.
const DISK_SLOT: u32 = 2;
/// Of the VM that goes on from a snapshot: after the source's and the target's.
const EPOCH_RESTORED: u64 = 3;
/// Of the VM that boots from its disk.
const EPOCH_INSTALLED: u64 = 4;
/// Blocks that the guest writes at least before it moves, and after.
const WRITES_MIN: u64 = 4;
/// The longest that the guest may take to give a disk up, or to shut down: about 10 s on an idle machine, and everything here may be
/// many times slower.
const HEED_MAX: Duration = Duration::from_secs(150);
/// Where the NIC comes that comes while it runs.
const LATE_NIC_SLOT: u32 = 5;
/// What the guest sends at least before it moves, and after.
const STREAM_BYTES: u64 = 512 << 10;
/// The longest that booting may take in an emulated host.
const BOOT_MAX: Duration = Duration::from_secs(240);
/// The longest that a migration may take there.
const MIGRATION_MAX: Duration = Duration::from_secs(180);
/// A blackout that the stop rule accepts: emulated processors encrypt slowly.
const DOWNTIME_MAX_MS: u32 = 2000;
/// Lines of each VMM's log that a failure shows.
const LOG_LINES: usize = 60;

fn say(report: &Report) {
    println!("\n{}", report.line());
}

fn main() -> ExitCode {
    drover_pki::install_provider();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let ended = runtime
        .context("starting tokio")
        .and_then(|runtime| runtime.block_on(drive()));
    match ended {
        Ok(()) => {
            say(&Report::Done);
            ExitCode::SUCCESS
        }
        Err(error) => {
            show_logs(Path::new(ROOT));
            say(&Report::Failed {
                why: format!("{error:#}"),
            });
            ExitCode::FAILURE
        }
    }
}

async fn drive() -> Result<()> {
    std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("opening /dev/kvm")?;
    say(&Report::HostUp);
    let ca = ClusterCa::create(CLUSTER)?;
    for name in [DISK, LATE_DISK] {
        let disk = std::fs::File::create(folder("disks")?.join(name)).context("making a disk")?;
        disk.set_len(DISK_BYTES).context("making a disk")?;
    }
    let (host1, host2) = (identity(&ca, "host1")?, identity(&ca, "host2")?);

    net::set_up().context("making the network")?;

    for vmm in ["source", "target", "restored", "installed"] {
        seed::write(&folder(vmm)?, &seed_files()).context("writing a seed disk")?;
    }
    let started = Instant::now();
    let [tap1, tap2] = net::TAPS;
    let mut source = Vmm::start(&folder("source")?, &config("host1", 1, &host1, tap1, None)).await?;
    source.renew(1);
    source
        .until("the guest to run", BOOT_MAX, |info| {
            info.state() == VmmState::Running
        })
        .await?;
    let mut shell = Shell::of(&source);
    shell
        .wait_for_prompt(BOOT_MAX)
        .await
        .context("waiting for the guest's shell")?;
    say(&Report::Shell {
        boot_ms: started.elapsed().as_millis().try_into()?,
    });
    shell
        .write_random_file()
        .await
        .context("filling a file in the guest")?;
    shell.write_disk().await.context("writing the guest's disk")?;
    shell.set_up_network().await.context("the guest's NIC")?;
    let (before, asked) = shell
        .facts()
        .await
        .context("asking the guest before the migration")?;
    say(&Report::Answered {
        migrated: false,
        guest: before,
        asked,
    });

    let [volume, seeded] = shell.seed().await?;
    attach_late(&source).await?;
    shell.use_second_disk().await?;
    let attached = shell.second_disk().await?;
    attach_late_nic(&source).await?;
    shell.use_second_nic().await?;
    let echoes = shell.second_echoes().await?;
    let mut available_kib = [shell.available_kib().await?; 4];
    set_memory(&mut source, 1, GUEST_MEMORY_MIB - GIVEN_UP_MIB).await?;
    available_kib[1] = shell.available_kib().await?;

    let incoming = json!({ "migration": MIGRATION, "from_host": "host1", "listen_ip": "127.0.0.1" });
    let stream = Stream::open(folder("stream")?, shell.begin_stream()).await?;
    shell.begin_writes().await?;
    stream.more(STREAM_BYTES).await.context("before the migration")?;
    let written = shell.written(WRITES_MIN).await?;
    let target = config("host2", 2, &host2, tap2, Some(incoming));
    let mut target = Vmm::start(&folder("target")?, &target).await?;
    let migrated = migrate(&mut source, &mut target).await?;
    shell.follow(&target);
    say(&migrated);
    let moved_with = shell.written(0).await?;
    stream.more(STREAM_BYTES).await.context("after the migration")?;
    shell.written(moved_with + WRITES_MIN).await?;
    shell.end_stream().await.context("ending the stream")?;
    let host = stream.close().await?;
    let guest = shell
        .stream_digests()
        .await
        .context("the guest's end of the stream")?;
    say(&Report::Streamed { host, guest });
    let [all, lost] = shell.lost_writes().await?;
    let blocks = [written, moved_with, all];
    say(&Report::Wrote { blocks, lost });
    let (after, asked) = shell
        .facts()
        .await
        .context("asking the guest after the migration")?;
    say(&Report::Answered {
        migrated: true,
        guest: after,
        asked,
    });
    let [_, seeded_after] = shell.seed().await?;
    let files = [seeded, seeded_after];
    say(&Report::Seeded { files, volume });
    let moved = shell.second_disk().await?;
    let echoes = [echoes, shell.second_echoes().await?];
    say(&give_nic_up(&mut target, &mut shell, echoes).await?);
    say(&give_up_and_grow(&mut target, &mut shell, [attached, moved]).await?);
    available_kib[2] = shell.available_kib().await?;
    set_memory(&mut target, 2, GUEST_MEMORY_MIB).await?;
    available_kib[3] = shell.available_kib().await?;
    say(&Report::Ballooned {
        asked_kib: GIVEN_UP_MIB << 10,
        available_kib,
        features: shell.balloon_features().await?,
    });
    let again = config("host2", EPOCH_RESTORED, &host2, tap2, None);
    let (mut restored, report) = restored::go_back(target, &mut shell, again, EPOCH_RESTORED).await?;
    say(&report);
    shell.install().await?;
    say(&power_off(&mut restored, &mut shell).await?);
    restored.kill().await?;
    let again = config("host2", EPOCH_INSTALLED, &host2, tap2, None);
    let (mut installed, mut shell, report) = installed::boot(again, EPOCH_INSTALLED).await?;
    say(&report);
    say(&power_off(&mut installed, &mut shell).await?);
    Ok(())
}

/// What the guest's seed disk holds.
fn seed_files() -> CloudSeed {
    CloudSeed {
        user_data: b"#cloud-config\nhostname: linux\n".to_vec(),
        meta_data: "instance-id: \"linux-1\"\n".to_owned(),
        network_config: NETWORK_CONFIG.to_owned(),
    }
}

/// Asks the guest to have so much memory, and waits until it says that it does.
async fn set_memory(vmm: &mut Vmm, revision: u64, target_mib: u64) -> Result<()> {
    let request = SetMemoryRequest { revision, target_mib };
    vmm.client()
        .set_memory(request)
        .await
        .context("asking for memory")?;
    let what = format!("the guest to have {target_mib} MiB");
    let has = |info: &VmmInfo| {
        let memory = info.devices.as_ref().and_then(|devices| devices.memory);
        memory.is_some_and(|memory| memory.actual_mib == target_mib)
    };
    vmm.until(&what, HEED_MAX, has).await.map(drop)
}

fn path_of(disk: &str) -> String {
    format!("{ROOT}/disks/{disk}")
}

async fn attach_late(vmm: &Vmm) -> Result<()> {
    let request = AttachDiskRequest {
        revision: 1,
        slot: LATE_SLOT,
        path: path_of(LATE_DISK),
        serial: "vol-2".to_owned(),
        ..AttachDiskRequest::default()
    };
    vmm.client()
        .attach_disk(request)
        .await
        .context("attaching a disk")?;
    Ok(())
}

async fn attach_late_nic(vmm: &Vmm) -> Result<()> {
    let request = AttachNicRequest {
        revision: 2,
        slot: LATE_NIC_SLOT,
        tap: net::LATE_TAPS[0].to_owned(),
        mac: net::LATE_MAC.to_owned(),
        mtu: 1500,
    };
    let attached = vmm.client().attach_nic(request).await;
    attached.context("attaching a NIC")?;
    Ok(())
}

async fn await_given_up(vmm: &mut Vmm, what: &str, slot: u32) -> Result<()> {
    vmm.until(&format!("the guest to give the {what} up"), HEED_MAX, |info| {
        let devices = info.devices.as_ref().map(|devices| devices.devices.as_slice());
        devices.is_some_and(|devices| devices.iter().all(|device| device.slot != slot))
    })
    .await
    .map(drop)
}

async fn give_nic_up(vmm: &mut Vmm, shell: &mut Shell, echoes: [u64; 2]) -> Result<Report> {
    let request = DetachNicRequest {
        revision: 2,
        slot: LATE_NIC_SLOT,
        mac: net::LATE_MAC.to_owned(),
    };
    let asked = vmm.client().detach_nic(request).await;
    asked.context("detaching the NIC")?;
    await_given_up(vmm, "NIC", LATE_NIC_SLOT).await?;
    Ok(Report::NicHotPlugged {
        echoes,
        given_up: shell.slot_power(LATE_NIC_SLOT).await?,
        remains: shell.has_second_nic().await?,
        tap_is_free: net::is_free(net::LATE_TAPS[1])?,
    })
}

async fn give_up_and_grow(vmm: &mut Vmm, shell: &mut Shell, digests: [String; 2]) -> Result<Report> {
    let request = DetachDiskRequest {
        revision: 3,
        slot: LATE_SLOT,
        path: path_of(LATE_DISK),
    };
    vmm.client()
        .detach_disk(request)
        .await
        .context("detaching the disk")?;
    await_given_up(vmm, "disk", LATE_SLOT).await?;
    let file = std::fs::File::options().write(true).open(path_of(DISK))?;
    file.set_len(GROWN_BYTES)?;
    let request = ResizeDiskRequest {
        slot: DISK_SLOT,
        path: path_of(DISK),
        size_bytes: GROWN_BYTES,
    };
    vmm.client()
        .resize_disk(request)
        .await
        .context("growing the disk")?;
    Ok(Report::HotPlugged {
        digests,
        given_up: shell.slot_power(LATE_SLOT).await?,
        remains: shell.has_second_disk().await?,
        grown_sectors: shell.sectors().await?,
    })
}

async fn power_off(vmm: &mut Vmm, shell: &mut Shell) -> Result<Report> {
    shell.heed_button().await?;
    let request = PowerButtonRequest { request: 1 };
    let info = vmm
        .client()
        .power_button(request)
        .await
        .context("pressing the button")?;
    let shut_down = vmm.until("the guest to shut down", HEED_MAX, |info| {
        info.state() == VmmState::Exited
    });
    if let Err(error) = shut_down.await {
        let guest = shell.power_state().await;
        bail!("{error:#}; the guest: {guest:?}");
    }
    let devices = info.into_inner().devices.unwrap_or_default();
    Ok(Report::PoweredOff {
        heeded: devices.heeds_button && devices.heeds_slots,
    })
}

fn identity(ca: &ClusterCa, host: &str) -> Result<TlsFiles> {
    Ok(ca.issue_to(&folder(host)?, Role::Host, host)?)
}

fn folder(name: &str) -> Result<PathBuf> {
    let path = Path::new(ROOT).join(name);
    let mut private = std::fs::DirBuilder::new();
    private
        .recursive(true)
        .mode(0o700)
        .create(&path)
        .with_context(|| format!("making {}", path.display()))?;
    Ok(path)
}

fn config(
    host: &str,
    epoch: u64,
    tls: &TlsFiles,
    tap: &str,
    incoming: Option<serde_json::Value>,
) -> serde_json::Value {
    // Of an agent's VMM, which is in its folder.
    let seed = json!({ "path": SEED_FILE, "read_only": true, "serial": SEED_SERIAL, "slot": SEED_SLOT });
    let mut disks = vec![json!({ "path": path_of(DISK), "serial": "vol-1" }), seed];
    let mut nics = vec![json!({ "tap": tap, "mac": net::MAC })];
    if incoming.is_some() {
        disks.push(json!({ "path": path_of(LATE_DISK), "serial": "vol-2", "slot": LATE_SLOT }));
        nics.push(json!({ "tap": net::LATE_TAPS[1], "mac": net::LATE_MAC, "slot": LATE_NIC_SLOT }));
    }
    json!({
        "cluster_id": CLUSTER, "host": host, "vm": "linux", "epoch": epoch, "vcpus": GUEST_VCPUS, "memory_mib": GUEST_MEMORY_MIB,
        "kernel": "/guest/vmlinuz", "initrd": "/guest/initrd", "cmdline": "console=ttyS0 quiet panic=-1",
        "cpu_profile": "host", "socket": "vmm.sock", "tls": tls, "incoming": incoming,
        "rng": true, "disks": disks, "nics": nics, "balloon": { "slot": 31 }, "console": { "slot": 29 },
    })
}

async fn migrate(source: &mut Vmm, target: &mut Vmm) -> Result<Report> {
    let listens = |info: &VmmInfo| !info.listen_addr.is_empty();
    let target_addr = target
        .until("the target to listen", MIGRATION_MAX, listens)
        .await?
        .listen_addr;
    source
        .client()
        .start_outgoing(StartOutgoingRequest {
            migration: MIGRATION.to_owned(),
            target_addr,
            target_host: "host2".to_owned(),
            target_epoch: 2,
            options: Some(MigrationOptions {
                max_downtime_ms: DOWNTIME_MAX_MS,
                ..MigrationOptions::default()
            }),
        })
        .await
        .context("starting the migration")?;
    target
        .until("the target to be ready", MIGRATION_MAX, |info| {
            info.state() == VmmState::Ready
        })
        .await?;
    source.stop_renewing();
    target.grant(2).await.context("granting the target")?;
    target.renew(2);
    source
        .outcome(MIGRATION, true)
        .await
        .context("telling the source")?;
    let has_receipt = |info: &VmmInfo| {
        let receipt = info
            .migration
            .as_ref()
            .and_then(|migration| migration.receipt.as_ref());
        info.state() == VmmState::Running && receipt.is_some()
    };
    let info = target
        .until("the target to run", MIGRATION_MAX, has_receipt)
        .await?;
    let receipt = info
        .migration
        .and_then(|migration| migration.receipt)
        .context("a receipt")?;
    let blackout = receipt.blackout_us.context("the receipt's blackout")?;
    let source_ended = source.ends_by_itself().await;
    ensure!(receipt.bytes > 0, "the receipt counts no bytes: {receipt:?}");
    Ok(Report::Migrated {
        rounds: receipt.rounds,
        bytes: receipt.bytes,
        blackout_us: blackout.total,
        source_ended,
    })
}

fn show_logs(root: &Path) {
    for name in ["source", "target"] {
        let Ok(log) = std::fs::read_to_string(root.join(name).join("vmm.log")) else {
            continue;
        };
        println!("--- the end of the log of the {name} VMM ---");
        let lines: Vec<&str> = log.lines().collect();
        for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
            println!("{line}");
        }
    }
}
