//! One VMM and the one task that tends it, from its start or its finding to its end.
//!
//! ```text
//!   fresh: pause point → marker (durable) → config.json → exec ─┐
//!   found after a restart of the agent: its lock is held ───────┤
//!                                                               ▼
//!        ┌── long-polls its info ──► supervisor            all at once, until
//!        ├── hands on grants                               the process is gone
//!        ├── READY → CommitHandover → Grant
//!        ├── reports: address, state, receipt, failure
//!        └── progress, at most 4 times a second
//! ```
//!
//! The parts share nothing but the newest info and whether the VMM has a right to run, so that the way from READY to the grant waits
//! for nothing else. A grant by a heartbeat names only VM and epoch; it is handed on only to a VMM of which it is known that
//! the epoch is its own: one that booted for it, or whose hand-over is committed. Before an incoming one is handed its first, the
//! folder says so for later agents (`granted`, see [`crate::host::store`]).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use drover_proto::v1::vmm_client::VmmClient;
use drover_proto::v1::{
    AbortMigrationRequest, AttachDiskRequest, AttachNicRequest, Balloon, CommitHandoverRequest,
    CommitHandoverResponse, GrantRequest, MigrationPhase, Network, Progress, Reason, ReportMigrationRequest,
    ReportVmRequest, ResizeDiskRequest, VmDesired, VmDevices, VmDisk, VmNic, VmSpec, VmState, VmmBuild,
    VmmInfo, VmmState, Volume, WatchInfoRequest,
};
use drover_proto::{Code, Fault};
use hyper_util::rt::TokioIo;
use tokio::process::Child;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};
use tower::service_fn;

use crate::agent::Context;
use crate::clock::boottime_ns;
use crate::converge::{target_mib, with_slots};
use crate::host::process::{self, Abandoned};
use crate::host::seed::{self, SEED_FILE, SEED_SERIAL, SEED_SLOT};
use crate::host::store::{is_restored, note_granted, note_restored, was_granted, write_private};
use crate::host::volumes::{self, Files};
use crate::key::Key;
use crate::loops::deadline_ns;
use crate::network::plan::Nic;
use crate::network::{NICS_FILE, at_its_start};
use crate::pause_point;
use crate::reports::{Report, Reported};
use crate::sandbox;
use crate::snapshots;
use crate::supervisor::Event;

/// How long a VMM may hold a watch of its info, ms.
const WATCH_WAIT_MS: u32 = 10_000;
/// How much later its answer may come before it is asked anew.
const WATCH_MARGIN: Duration = Duration::from_secs(5);
/// A VMM that is starting has no socket yet: it is asked again after this.
const SOCKET_RETRY: Duration = Duration::from_millis(10);
/// One call of a VMM; it answers from memory.
pub const VMM_CALL_MAX: Duration = Duration::from_secs(2);
/// After a report that no controller took.
const REPORT_RETRY: Duration = Duration::from_millis(100);
/// One in which it opens and takes a file or a TAP.
const DEVICE_CALL_MAX: Duration = Duration::from_secs(10);
/// One attempt of a report that ends in the log.
pub const REPORT_ATTEMPT: Duration = Duration::from_secs(3);
/// One attempt of the commit: the guest stands still meanwhile, so the next controller is tried soon.
const COMMIT_ATTEMPT: Duration = Duration::from_secs(2);
/// Between two rounds of the commit.
const COMMIT_RETRY: Duration = Duration::from_millis(20);
/// Between two reports of progress.
const PROGRESS_PERIOD: Duration = Duration::from_millis(250);
/// Progress that begins a blackout is held back for so long: mostly the VM runs by then, and until then the processors have better
/// to do.
const BLACKOUT_QUIET: Duration = Duration::from_millis(50);
/// The slot of every VM's balloon: the last of its bus, which the cluster, counting from the first, comes to for nothing else.
const BALLOON_SLOT: u32 = 31;
/// The slot of a VM's virtio console: before the seed disk's and the balloon's, which the cluster gives to nothing else either.
const CONSOLE_SLOT: u32 = 29;
/// What a disk's serial number takes of its volume's name; a name is ASCII.
const SERIAL_CHARS_MAX: usize = 20;
/// A report of progress that is not taken by then is out of date.
const PROGRESS_ATTEMPT: Duration = Duration::from_secs(1);

/// What others hold of a VMM.
pub struct Link {
    /// Which one.
    pub key: Key,
    /// Its folder.
    pub folder: PathBuf,
    /// Its socket.
    pub client: VmmClient<Channel>,
    /// What it said last.
    pub info: watch::Sender<Option<VmmInfo>>,
    /// Whether its epoch is known to be its own.
    pub had_right: watch::Sender<bool>,
    /// It is no longer wanted: do not start what is not started.
    pub cancelled: AtomicBool,
    /// Its process, while it is our child and not waited for; else 0.
    pub child: AtomicU32,
    /// Held while a state of the VM is reported, so that none overtakes another.
    pub reporting: Mutex<()>,
}

impl Link {
    /// The VMM of `folder`. Call it inside a tokio runtime.
    pub fn new(key: Key, folder: PathBuf) -> Arc<Self> {
        let in_folder = folder.clone();
        let connect = service_fn(move |_| {
            let folder = in_folder.clone();
            async move { process::connect(&folder).await.map(TokioIo::new) }
        });
        // The address is never resolved: the connector knows where to go.
        let channel = Endpoint::from_static("http://vmm.drover").connect_with_connector_lazy(connect);
        let needs_word = key.migration().is_some() || is_restored(&folder);
        let had_right = !needs_word || was_granted(&folder);
        Arc::new(Self {
            client: VmmClient::new(channel),
            info: watch::Sender::new(None),
            had_right: watch::Sender::new(had_right),
            cancelled: AtomicBool::new(false),
            child: AtomicU32::new(0),
            reporting: Mutex::new(()),
            key,
            folder,
        })
    }

    /// What the VMM said last, if it ever answered.
    pub fn newest_info(&self) -> Option<VmmInfo> {
        self.info.borrow().clone()
    }
}

/// What a VMM's task tells the supervisor.
pub enum News {
    /// Its info or its right changed.
    Changed,
    /// The controllers answered its commit with the abort.
    CommitRefused(Reason),
    /// Its process is gone, or was not started; with its lock when it was not our child.
    Gone(Reason, Option<Abandoned>),
}

/// Tends the VMM of `link` until it is gone. `fresh`: start it for this first.
pub async fn tend(
    context: Arc<Context>,
    link: Arc<Link>,
    fresh: Option<VmDesired>,
    events: mpsc::Sender<Event>,
) {
    let tell = |news| {
        let event = Event::Vmm {
            key: link.key.clone(),
            news,
        };
        let events = events.clone();
        async move {
            // Only a supervisor that has ended does not listen; then nobody needs to know.
            let _ = events.send(event).await;
        }
    };
    let mut child = None;
    if let Some(desired) = fresh {
        match start(&context, &link, &desired).await {
            Ok(started) => child = Some(started),
            Err(fault) => {
                tracing::error!(vmm = %link.key, "not started: {fault}");
                context.networks.detach(&link.key);
                return tell(News::Gone(fault.into(), None)).await;
            }
        }
    }
    let tend = async {
        tokio::join!(
            follow_info(&link, &tell),
            hand_on_grants(&context, &link),
            commit_when_ready(&context, &link, &tell),
            report(&context, &link),
            report_progress(&context, &link),
            keep_tuns(&link),
            snapshots::report_progress(&context, &link),
        )
    };
    let (reason, lock) = tokio::select! {
        gone = until_gone(&link, child) => gone,
        _ = tend => unreachable!("the tending of a VMM ends only with it"),
    };
    tracing::info!(vmm = %link.key, "gone: {}", reason.message);
    context.sandbox.gone(&link.key);
    context.networks.detach(&link.key);
    tell(News::Gone(reason, lock)).await;
}

async fn until_gone(link: &Link, child: Option<Child>) -> (Reason, Option<Abandoned>) {
    let (how, lock) = match child {
        Some(mut child) => {
            let ended = child.wait().await;
            link.child.store(0, Ordering::SeqCst);
            match ended {
                Ok(status) => (status.to_string(), None),
                Err(error) => (format!("waiting for it failed: {error}"), None),
            }
        }
        None => loop {
            match process::gone(&link.folder).await {
                Ok(lock) => break ("its lock is free".to_owned(), Some(lock)),
                Err(error) => {
                    tracing::error!(vmm = %link.key, "its lock cannot be waited for: {error}");
                    sleep(WATCH_MARGIN).await;
                }
            }
        },
    };
    (died(&link.folder, &how), lock)
}

/// The reason that a VMM which ended unasked is reported with.
pub fn died(folder: &Path, how: &str) -> Reason {
    let said = process::last_error(folder).map_or_else(String::new, |line| format!("; in its log: {line}"));
    Fault::new(Code::VmmDied, format!("the VMM's process ended ({how}){said}")).into()
}

async fn start(context: &Arc<Context>, link: &Arc<Link>, desired: &VmDesired) -> Result<Child, Fault> {
    if link.key.migration().is_some() {
        pause_point("agent.before_prepare").await;
    }
    let mut config = vmm_config(context, &link.key, desired, &link.folder)?;
    if let Some(restore) = &desired.restore {
        link.had_right.send_replace(false);
        config["restore"] = serde_json::json!({"folder": snapshots::folder(context, restore)?});
        snapshots::install(context, link, desired, restore).await?;
    }
    if let Some(spec) = desired.spec.as_ref().filter(|spec| !spec.disks.is_empty()) {
        config["disks"] = disks(context, &link.key, spec, &desired.volumes).await?;
    }
    let nics = context.networks.attach(&link.key, desired).await?;
    // Said only where there are any, as of disks.
    if !nics.is_empty() {
        let nic = |nic: &Nic| serde_json::json!({"tap": nic.tap, "mac": nic.mac_text(), "mtu": nic.mtu});
        config["nics"] = nics.iter().map(nic).collect();
    }
    if let Some(balloon) = desired.spec.as_ref().and_then(balloon) {
        config["balloon"] = balloon;
    }
    if let Some(console) = desired.spec.as_ref().and_then(console) {
        config["console"] = console;
    }
    let (context, link) = (context.clone(), link.clone());
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Fault::new(Code::VmmStartFailed, format!("{what}: {error}"))
    };
    tell_nic_slots(&mut config, desired);
    if let Some(cage) = context.sandbox.of_vmm().await? {
        config["sandbox"] = cage;
    }
    let seed = desired.seed.clone();
    if seed.is_some() {
        add_seed(&mut config, &link.folder);
    }
    let begun = tokio::task::spawn_blocking({
        let (context, link) = (context.clone(), link.clone());
        move || {
            if link.cancelled.load(Ordering::SeqCst) {
                return Err(Fault::new(
                    Code::VmStopped,
                    "it is no longer desired on this host",
                ));
            }
            let mut store = context.store.lock().expect("nobody panics with the store");
            let folder = store
                .begin(&link.key)
                .map_err(|error| failed("no marker", &error))?;
            if config.get("restore").is_some() {
                note_restored(&folder).map_err(|error| failed("restored", &error))?;
            }
            if !nics.is_empty() {
                let text = serde_json::to_vec(&nics).map_err(|error| failed(NICS_FILE, &error))?;
                write_private(&folder.join(NICS_FILE), &text).map_err(|error| failed(NICS_FILE, &error))?;
            }
            if let Some(seed) = seed {
                seed::write(&folder, &seed).map_err(|error| failed(SEED_FILE, &error))?;
            }
            write_private(&folder.join("config.json"), config.to_string().as_bytes())
                .map_err(|error| failed("config.json", &error))
        }
    });
    begun.await.map_err(|error| failed("marker", &error))??;
    let memory_mib = desired.spec.as_ref().map_or(0, |spec| spec.memory_mib);
    let groups = context.sandbox.groups(&link.key, memory_mib)?;
    let child = process::spawn(&context.config.vmm, &link.folder, groups)
        .map_err(|error| failed(&context.config.vmm.display().to_string(), &error))?;
    link.child.store(child.id().unwrap_or(0), Ordering::SeqCst);
    tracing::info!(vmm = %link.key, pid = child.id(), "started");
    if link.key.migration().is_none() {
        context.heartbeat_now.notify_one(); // Its grant can be here before it is.
    }
    Ok(child)
}

/// What the VMM's config.json says; refuses what no VMM could be started with.
fn vmm_config(
    context: &Context,
    key: &Key,
    desired: &VmDesired,
    folder: &Path,
) -> Result<serde_json::Value, Fault> {
    let spec: VmSpec = desired.spec.clone().ok_or_else(|| {
        Fault::new(
            Code::Internal,
            format!("{key} is desired without a specification"),
        )
    })?;
    let config = &context.config;
    let image = |field: &str, name: &str| {
        let path = config.images_dir.join(name);
        let is_name = !name.is_empty() && !name.contains('/') && !name.starts_with('.');
        // What is received or restored boots nothing.
        if is_name && (key.migration().is_some() || desired.restore.is_some() || path.is_file()) {
            return Ok(path);
        }
        let message = format!(
            "{name:?} is not in this host's images folder {}",
            config.images_dir.display()
        );
        Err(Fault::new(Code::ImageNotFound, message).field(field))
    };
    let socket = folder.join("vmm.sock");
    let incoming = match (key.migration(), &desired.migration) {
        (None, _) => serde_json::Value::Null,
        (Some(id), Some(migration)) => {
            // Planned, so the cluster's policy allows it if it is wanted.
            let plaintext = migration.options.is_some_and(|options| options.plaintext);
            let mut incoming = serde_json::json!({
                "migration": id, "from_host": migration.from, "listen_ip": config.migration_ip, "plaintext": plaintext,
            });
            // Said only where it is so: the installed VMM may be of a version before it, and refuses what it does not know.
            if migration.is_upgrade() {
                incoming["local"] = true.into();
            }
            if !config.post_copy {
                incoming["post_copy"] = false.into();
            }
            incoming
        }
        (Some(id), None) => {
            return Err(Fault::new(
                Code::Internal,
                format!("{id} is desired without its migration"),
            ));
        }
    };
    let initrd = if spec.initrd.is_empty() {
        None
    } else {
        Some(image("initrd", &spec.initrd)?)
    };
    let cpu_profile = if spec.cpu_profile.is_empty() {
        "baseline"
    } else {
        &spec.cpu_profile
    };
    Ok(serde_json::json!({
        "cluster_id": config.cluster_id, "host": config.name, "vm": key.vm, "epoch": key.epoch,
        "vcpus": spec.vcpus, "memory_mib": spec.memory_mib, "huge_pages": config.huge_pages, "kernel": image("kernel", &spec.kernel)?,
        "initrd": initrd, "cmdline": spec.cmdline, "cpu_profile": cpu_profile, "socket": socket,
        "tls": config.tls, "incoming": incoming,
    }))
}

/// What the VMM's config.json says of the VM's disks. Said only where there are any, as what a VMM of a version before them
/// refuses. The files are there when this returns.
async fn disks(
    context: &Arc<Context>,
    key: &Key,
    spec: &VmSpec,
    told: &[Volume],
) -> Result<serde_json::Value, Fault> {
    // A migration's target leaves away what no VMM has had yet: it gets that when it runs.
    let is_new = |disk: &VmDisk| {
        let used = told
            .iter()
            .any(|volume| volume.name == disk.volume && volume.used);
        key.migration().is_some() && disk.attach_revision > 0 && !used
    };
    let wanted: Vec<VmDisk> = with_slots(spec)
        .disks
        .into_iter()
        .filter(|disk| !is_new(disk))
        .collect();
    // Told where counting leads elsewhere: an installed VMM of an older version refuses the word.
    let says_slots = !wanted.iter().zip(1..).all(|(disk, counted)| disk.slot == counted);
    let mut disks = Vec::new();
    for disk in &wanted {
        let name = &disk.volume;
        let refused = |code, message: String| Fault::new(code, message).field("disks");
        let volume = told.iter().find(|volume| volume.name == *name).ok_or_else(|| {
            refused(
                Code::VolumeNotFound,
                format!("{key} is desired without its volume {name}"),
            )
        })?;
        let pool = context.config.pools.get(&volume.pool).ok_or_else(|| {
            let host = &context.config.name;
            refused(
                Code::PoolNotFound,
                format!("{host} has no pool {:?}, in which volume {name} is", volume.pool),
            )
        })?;
        let (pool, volume) = (pool.clone(), volume.clone());
        let (host, key) = (context.config.name.clone(), key.clone());
        let (writers, writes) = (volume.writers, !disk.read_only);
        let there = tokio::task::spawn_blocking(move || volumes::files(&pool, &volume, &host, &key, writes));
        let there = there
            .await
            .map_err(|error| refused(Code::Internal, error.to_string()))??;
        let (path, serial) = (there.content, serial_of(disk));
        let mut told = serde_json::json!({"path": path, "read_only": disk.read_only, "serial": serial});
        if let Some(fence) = there.fence {
            told["fence"] = serde_json::json!({"path": fence, "writers": writers});
        }
        if says_slots {
            told["slot"] = disk.slot.into();
        }
        disks.push(told);
    }
    Ok(disks.into())
}

/// What the VMM's config.json says of the VM's balloon: nothing where it has none. Of a VM that is received the state has the last word.
fn balloon(spec: &VmSpec) -> Option<serde_json::Value> {
    (spec.balloon() == Balloon::On).then(|| {
        serde_json::json!({
            "slot": BALLOON_SLOT, "target_mib": target_mib(spec), "revision": spec.memory_revision,
        })
    })
}

/// What the VMM's config.json says of the VM's virtio console: nothing where it has none.
fn console(spec: &VmSpec) -> Option<serde_json::Value> {
    spec.virtio_console
        .then(|| serde_json::json!({"slot": CONSOLE_SLOT}))
}

/// Gives the VM its seed disk, whose file is in the VMM's own folder, beside whatever disks it has.
fn add_seed(config: &mut serde_json::Value, folder: &Path) {
    let disk = serde_json::json!({
        "path": folder.join(SEED_FILE), "read_only": true, "serial": SEED_SERIAL, "slot": SEED_SLOT,
    });
    match config.get_mut("disks").and_then(serde_json::Value::as_array_mut) {
        Some(disks) => disks.push(disk),
        None => config["disks"] = serde_json::json!([disk]),
    }
}

/// Puts the NICs, in the specification's order, into the slots that were written down, if they were.
fn tell_nic_slots(config: &mut serde_json::Value, desired: &VmDesired) {
    let nics = config.get_mut("nics").and_then(serde_json::Value::as_array_mut);
    let wanted = at_its_start(desired);
    for (nic, wanted) in nics.into_iter().flatten().zip(wanted) {
        if wanted.slot > 0 {
            nic["slot"] = wanted.slot.into();
        }
    }
}

/// The disk's files on this host, made or grown first where they are to be.
async fn files_of(context: &Context, link: &Link, volume: Volume, writes: bool) -> Result<Files, Fault> {
    let refused = |code, message: String| Fault::new(code, message).field("disks");
    let pool = context.config.pools.get(&volume.pool).cloned().ok_or_else(|| {
        let (host, pool, name) = (&context.config.name, &volume.pool, &volume.name);
        refused(
            Code::PoolNotFound,
            format!("{host} has no pool {pool:?}, in which volume {name} is"),
        )
    })?;
    // It runs, however it came here: a file that nobody has used yet is its to make.
    let (host, maker) = (
        context.config.name.clone(),
        Key::start(&link.key.vm, link.key.epoch),
    );
    let there = tokio::task::spawn_blocking(move || volumes::files(&pool, &volume, &host, &maker, writes));
    there
        .await
        .map_err(|error| refused(Code::Internal, error.to_string()))?
}

fn told(path: &Path) -> Result<String, Fault> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| {
        Fault::new(
            Code::DiskUnusable,
            format!("{} cannot be told to a VMM", path.display()),
        )
    })
}

/// What a disk tells its guest as its serial number.
fn serial_of(disk: &VmDisk) -> String {
    if disk.serial.is_empty() {
        disk.volume.chars().take(SERIAL_CHARS_MAX).collect()
    } else {
        disk.serial.clone()
    }
}

/// Gives the VMM a disk.
pub async fn attach_disk(
    context: &Context,
    link: &Link,
    revision: u64,
    disk: VmDisk,
    volume: Volume,
) -> Result<(), Fault> {
    let writers = volume.writers;
    let there = files_of(context, link, volume, !disk.read_only).await?;
    let request = AttachDiskRequest {
        revision,
        slot: disk.slot,
        path: told(&there.content)?,
        read_only: disk.read_only,
        serial: serial_of(&disk),
        fence: there.fence.as_deref().map(told).transpose()?.unwrap_or_default(),
        writers,
    };
    tracing::info!(vmm = %link.key, slot = disk.slot, volume = disk.volume, "gets a disk");
    sandbox::hand_file(&link.folder, &request.path, request.read_only).await?;
    if !request.fence.is_empty() {
        sandbox::hand_file(&link.folder, &request.fence, false).await?;
    }
    let attached = patiently(link.client.clone().attach_disk(request)).await;
    pause_point("agent.after_attach").await;
    attached
}

/// Gives the VMM a NIC, whose TAP is there and written down before the VMM is told.
pub async fn attach_nic(
    context: &Context,
    link: &Link,
    revision: u64,
    nic: &VmNic,
    network: &Network,
) -> Result<(), Fault> {
    let made = context
        .networks
        .add(&link.key, &link.folder, nic, network)
        .await?;
    pause_point("agent.after_tap").await;
    let request = AttachNicRequest {
        revision,
        slot: nic.slot,
        mac: made.mac_text(),
        mtu: made.mtu,
        tap: made.tap,
    };
    tracing::info!(vmm = %link.key, slot = nic.slot, mac = nic.mac, network = nic.network, "gets a NIC");
    // One becomes the tap, the other is for when a VM that froze runs again: see `keep_tuns`.
    sandbox::hand_tuns(&link.folder, 2).await?;
    let attached = patiently(link.client.clone().attach_nic(request)).await;
    pause_point("agent.after_attach").await;
    attached
}

/// Grows a disk's file, and tells the VMM.
pub async fn resize(
    context: &Context,
    link: &Link,
    slot: u32,
    volume: Volume,
    path: String,
) -> Result<(), Fault> {
    let size_bytes = volume.size_bytes;
    files_of(context, link, volume, false).await?;
    let request = ResizeDiskRequest {
        slot,
        path,
        size_bytes,
    };
    patiently(link.client.clone().resize_disk(request)).await
}

/// A call in which the VMM may wait for its storage, or a TAP.
pub async fn patiently<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<(), Fault> {
    match timeout(DEVICE_CALL_MAX, call).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => Err(Fault::from(&status)),
        Err(_) => Err(Fault::new(Code::HostUnreachable, "the VMM does not answer")),
    }
}

/// Reports what the VMM, which runs, has.
pub async fn report_devices(context: &Context, link: &Link, devices: VmDevices) -> Result<(), Fault> {
    let request = ReportVmRequest {
        vm: link.key.vm.clone(),
        epoch: link.key.epoch,
        state: VmState::Running.into(),
        vmm: build_of(link),
        devices: Some(devices),
        ..ReportVmRequest::default()
    };
    report_vm(context, request).await
}

async fn follow_info<F: Future<Output = ()>>(link: &Link, tell: &impl Fn(News) -> F) {
    // No info has this number, so that the first is answered at once.
    let mut seen_seq = u64::MAX;
    loop {
        let request = WatchInfoRequest {
            seen_seq,
            wait_ms: WATCH_WAIT_MS,
        };
        let bound = Duration::from_millis(WATCH_WAIT_MS.into()) + WATCH_MARGIN;
        let info = match timeout(bound, link.client.clone().watch_info(request)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => {
                tracing::debug!(vmm = %link.key, "no info: {}", status.message());
                sleep(SOCKET_RETRY).await;
                continue;
            }
            Err(_) => {
                tracing::warn!(vmm = %link.key, "the VMM lives but does not answer");
                continue;
            }
        };
        if info.vm != link.key.vm || info.epoch != link.key.epoch {
            tracing::error!(vmm = %link.key, "its socket answers for {} epoch {}", info.vm, info.epoch);
            sleep(WATCH_MARGIN).await;
            continue;
        }
        if info.seq == seen_seq {
            continue;
        }
        seen_seq = info.seq;
        // Only a grant makes a VMM run, and the agent that gave it knew that the hand-over was committed.
        if matches!(
            info.state(),
            VmmState::Running | VmmState::Frozen | VmmState::HandedOver | VmmState::Serving
        ) {
            link.had_right
                .send_if_modified(|had| !std::mem::replace(had, true));
        }
        link.info.send_replace(Some(info));
        tell(News::Changed).await;
    }
}

/// A VM that freezes gives its taps back, and its VMM, which can open nothing, uses up a descriptor for each when it runs again: they are
/// replaced when it does.
async fn keep_tuns(link: &Link) {
    loop {
        let info = until(link, |info| info.state() == VmmState::Running).await;
        let devices = info.devices.unwrap_or_default().devices;
        let nics = devices.iter().filter(|device| device.kind == "nic").count();
        if let Err(fault) = sandbox::hand_tuns(&link.folder, nics).await {
            tracing::warn!(vmm = %link.key, "{fault}");
        }
        until(link, |info| info.state() != VmmState::Running).await;
    }
}

async fn hand_on_grants(context: &Context, link: &Link) {
    let mut grants = context.grants.subscribe();
    let mut had_right = link.had_right.subscribe();
    let vm = (link.key.vm.clone(), link.key.epoch);
    let mut given_ns = 0;
    loop {
        let deadline_ns = {
            let grants = grants.borrow_and_update();
            if grants.granted.contains(&vm) {
                grants.deadline_ns
            } else {
                0
            }
        };
        if *had_right.borrow_and_update() && deadline_ns > given_ns && deadline_ns > boottime_ns() {
            match grant(link, deadline_ns).await {
                Ok(()) => given_ns = deadline_ns,
                Err(fault) => {
                    tracing::debug!(vmm = %link.key, "the grant was not taken: {fault}");
                    // A newer grant may have come meanwhile.
                    sleep(SOCKET_RETRY).await;
                    continue;
                }
            }
        }
        tokio::select! {
            changed = grants.changed() => if changed.is_err() { std::future::pending::<()>().await },
            _ = had_right.changed() => {}
        }
    }
}

async fn grant(link: &Link, deadline_boottime_ns: u64) -> Result<(), Fault> {
    let needs_word = link.key.migration().is_some() || is_restored(&link.folder);
    if needs_word && !was_granted(&link.folder) {
        note_granted(&link.folder)
            .map_err(|error| Fault::new(Code::Internal, format!("the grant cannot be noted: {error}")))?;
    }
    let request = GrantRequest {
        epoch: link.key.epoch,
        deadline_boottime_ns,
    };
    match timeout(VMM_CALL_MAX, link.client.clone().grant(request)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => Err(Fault::from(&status)),
        Err(_) => Err(Fault::new(Code::HostUnreachable, "the VMM does not answer")),
    }
}

/// Resolves when the info fulfils `what`.
pub async fn until(link: &Link, what: impl Fn(&VmmInfo) -> bool) -> VmmInfo {
    let mut info = link.info.subscribe();
    let found = info
        .wait_for(|info| info.as_ref().is_some_and(&what))
        .await
        .ok()
        .and_then(|info| info.clone());
    match found {
        Some(info) => info,
        None => std::future::pending().await, // The link is gone, and this task is about to be.
    }
}

/// From READY to running: the guest stands still meanwhile.
async fn commit_when_ready<F: Future<Output = ()>>(
    context: &Context,
    link: &Link,
    tell: &impl Fn(News) -> F,
) {
    if let Some(migration) = link.key.migration() {
        until(link, |info| info.state() == VmmState::Ready).await;
        pause_point("agent.before_commit").await;
        let (sent_ns, answer) = commit(context, link, migration).await;
        pause_point("agent.after_commit").await;
        if answer.committed {
            link.had_right.send_replace(true);
            let until_ns = deadline_ns(sent_ns, answer.lease_ms);
            while let Err(fault) = grant(link, until_ns).await {
                tracing::warn!(vmm = %link.key, "the grant after the commit was not taken: {fault}");
                sleep(SOCKET_RETRY).await;
                if boottime_ns() >= until_ns {
                    break; // From here on the heartbeats' grants are for it.
                }
            }
            context.heartbeat_now.notify_one();
        } else {
            let aborted = || Fault::new(Code::MigrationEnded, "the migration was aborted").into();
            tell(News::CommitRefused(answer.reason.unwrap_or_else(aborted))).await;
        }
    }
    std::future::pending().await
}

/// What the VMM says it is.
fn build_of(link: &Link) -> Option<VmmBuild> {
    link.newest_info().and_then(|info| info.build)
}

/// Asks until the log's outcome is known; with the time at which the answered request was sent.
async fn commit(context: &Context, link: &Link, migration: &str) -> (u64, CommitHandoverResponse) {
    let request = CommitHandoverRequest {
        host: context.config.name.clone(),
        migration: migration.to_owned(),
        vm: link.key.vm.clone(),
        epoch: link.key.epoch,
        post_copy: link
            .newest_info()
            .and_then(|info| info.migration)
            .is_some_and(|migration| migration.post_copy),
        vmm: build_of(link),
    };
    loop {
        let answer = context.controllers.call("commit", COMMIT_ATTEMPT, |mut client| {
            let request = request.clone();
            let sent_ns = boottime_ns();
            async move { Ok((sent_ns, client.commit_handover(request).await?.into_inner())) }
        });
        match answer.await {
            Ok(answer) => return answer,
            Err(fault) => tracing::warn!(vmm = %link.key, "the commit was not answered: {fault}; asking on"),
        }
        sleep(COMMIT_RETRY).await;
    }
}

async fn report(context: &Context, link: &Link) {
    let mut reported = Reported::default();
    let mut info = link.info.subscribe();
    let mut had_right = link.had_right.subscribe();
    loop {
        let due = {
            let right = *had_right.borrow_and_update();
            info.borrow_and_update()
                .as_ref()
                .and_then(|info| reported.due(&link.key, info, right))
        };
        if let Some(report) = due {
            match send(context, link, &report).await {
                Ok(()) => reported.answered(&report),
                Err(fault) => {
                    tracing::debug!(vmm = %link.key, "a report was not taken: {fault}");
                    sleep(REPORT_RETRY).await;
                }
            }
            continue;
        }
        tokio::select! {
            changed = info.changed() => if changed.is_err() { std::future::pending::<()>().await },
            _ = had_right.changed() => {}
        }
    }
}

async fn send(context: &Context, link: &Link, report: &Report) -> Result<(), Fault> {
    match report.clone() {
        Report::Abort {
            migration,
            reason,
            phase,
        } => {
            tracing::warn!(vmm = %link.key, migration, "cannot carry on: {}", reason.message);
            abort(context, migration, reason, phase as i32).await
        }
        Report::Target { migration, addr } => {
            let request = ReportMigrationRequest {
                migration,
                epoch: link.key.epoch,
                target_addr: addr,
                ..Default::default()
            };
            report_migration(context, request, REPORT_ATTEMPT).await
        }
        Report::Receipt { migration, receipt } => {
            let request = ReportMigrationRequest {
                migration,
                epoch: link.key.epoch,
                receipt: Some(receipt),
                ..Default::default()
            };
            report_migration(context, request, REPORT_ATTEMPT).await
        }
        Report::Vm { state, reason } => {
            let _turn = link.reporting.lock().await;
            let request = ReportVmRequest {
                host: String::new(),
                vm: link.key.vm.clone(),
                epoch: link.key.epoch,
                state: state.into(),
                reason,
                vmm: build_of(link),
                devices: None,
            };
            report_vm(context, request).await
        }
    }
}

/// Proposes an abort; answered is enough, the desired state tells the outcome.
pub async fn abort(context: &Context, migration: String, reason: Reason, phase: i32) -> Result<(), Fault> {
    let host = context.config.name.clone();
    let request = AbortMigrationRequest {
        host,
        migration,
        reason: Some(reason),
        phase,
    };
    let call = context.controllers.call("abort", REPORT_ATTEMPT, |mut client| {
        let request = request.clone();
        async move { client.abort_migration(request).await }
    });
    ended_is_answered(call.await.map(drop))
}

/// Reports a VM's state; this host's name is filled in.
pub async fn report_vm(context: &Context, mut request: ReportVmRequest) -> Result<(), Fault> {
    request.host = context.config.name.clone();
    let call = context.controllers.call("report", REPORT_ATTEMPT, |mut client| {
        let request = request.clone();
        async move { client.report_vm(request).await }
    });
    ended_is_answered(call.await.map(drop))
}

async fn report_migration(
    context: &Context,
    mut request: ReportMigrationRequest,
    attempt: Duration,
) -> Result<(), Fault> {
    request.host = context.config.name.clone();
    let call = context.controllers.call("report", attempt, |mut client| {
        let request = request.clone();
        async move { client.report_migration(request).await }
    });
    ended_is_answered(call.await.map(drop))
}

/// A report about something that is over or unknown has found its answer.
fn ended_is_answered(outcome: Result<(), Fault>) -> Result<(), Fault> {
    match outcome {
        Err(fault)
            if matches!(
                fault.code,
                Code::MigrationEnded | Code::MigrationNotFound | Code::VmNotFound | Code::StaleEpoch
            ) =>
        {
            tracing::debug!("a report came too late: {fault}");
            Ok(())
        }
        other => other,
    }
}

async fn report_progress(context: &Context, link: &Link) {
    let mut last: Option<(String, Progress)> = None;
    let newest = |info: &VmmInfo| {
        info.migration
            .as_ref()
            .and_then(|m| Some((m.id.clone(), m.progress.clone()?)))
    };
    loop {
        let info = until(link, |info| {
            newest(info).is_some_and(|newest| Some(newest) != last)
        })
        .await;
        let stands = |progress: &Progress| progress.phase() >= MigrationPhase::Switchover;
        let known = last.as_ref().is_some_and(|(_, progress)| stands(progress));
        let mut latest = newest(&info);
        if !known && latest.as_ref().is_some_and(|(_, progress)| stands(progress)) {
            sleep(BLACKOUT_QUIET).await;
            latest = link.newest_info().as_ref().and_then(newest);
        }
        let Some((migration, progress)) = latest else {
            continue;
        };
        let sent = Instant::now();
        let request = ReportMigrationRequest {
            migration: migration.clone(),
            epoch: link.key.epoch,
            progress: Some(progress.clone()),
            ..ReportMigrationRequest::default()
        };
        // Lost progress is followed by newer progress.
        let _ = report_migration(context, request, PROGRESS_ATTEMPT).await;
        // A new phase is told at once, figures of the same phase at their pace.
        let phase = progress.phase;
        last = Some((migration, progress));
        let other_phase = until(link, |info| {
            newest(info).is_some_and(|(_, now)| now.phase != phase)
        });
        tokio::select! {
            _ = other_phase => {}
            () = tokio::time::sleep_until(sent + PROGRESS_PERIOD) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use drover_proto::v1::VmNic;

    use super::*;

    #[test]
    fn a_balloon_has_the_last_slot_and_what_the_guest_is_to_have() {
        let mut spec = VmSpec {
            memory_mib: 64,
            ..VmSpec::default()
        };
        assert_eq!(balloon(&spec), None, "an older VMM refuses the word");
        spec.set_balloon(Balloon::On);
        assert_eq!(
            balloon(&spec),
            Some(serde_json::json!({"slot": 31, "target_mib": 64, "revision": 0}))
        );
        (spec.memory_target_mib, spec.memory_revision) = (24, 7);
        assert_eq!(
            balloon(&spec),
            Some(serde_json::json!({"slot": 31, "target_mib": 24, "revision": 7}))
        );
    }

    #[test]
    fn a_virtio_console_is_before_the_seed_disk_and_the_balloon() {
        let mut spec = VmSpec::default();
        assert_eq!(console(&spec), None, "an older VMM refuses the word");
        spec.virtio_console = true;
        assert_eq!(console(&spec), Some(serde_json::json!({"slot": 29})));
    }

    #[test]
    fn nics_stay_in_the_slots_that_were_written_down() {
        let nic = |slot| VmNic {
            slot,
            ..VmNic::default()
        };
        let desired = |slots: [u32; 2]| VmDesired {
            spec: Some(VmSpec {
                nics: slots.map(nic).to_vec(),
                ..VmSpec::default()
            }),
            ..VmDesired::default()
        };
        for (slots, want) in [
            ([0, 0], serde_json::json!([{"tap": "a"}, {"tap": "b"}])),
            (
                [3, 2],
                serde_json::json!([{"tap": "a", "slot": 3}, {"tap": "b", "slot": 2}]),
            ),
        ] {
            let mut config = serde_json::json!({"nics": [{"tap": "a"}, {"tap": "b"}]});
            tell_nic_slots(&mut config, &desired(slots));
            assert_eq!(config["nics"], want);
        }
        let mut without = serde_json::json!({});
        tell_nic_slots(&mut without, &desired([3, 2]));
        assert_eq!(without, serde_json::json!({}), "an older VMM refuses the word");
    }
}
