//! A VMM without a VM: a process of its own with the real one's lock, socket and manners. What a guest or a peer would do to it,
//! a test does by writing a word to its console.
//!
//! It ends with an error when it is granted before it is ready, so that a test which goes on proves that it never was.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use drover_migration::transport::receive_descriptors;
use drover_proto::descriptors::{COUNT_MAX, Kind, MESSAGE_BYTES_MAX, SOCKET, TAKEN, decode};
use drover_proto::v1::vmm_server::{Vmm, VmmServer};
use drover_proto::v1::*;
use drover_proto::{Code, Fault, LOCAL_ADDR};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// Set for a process that is to be a VMM.
pub const IS_VMM: &str = "DROVER_FAKE_VMM";
/// Set for one that is in its sandbox: [`INSIDE`], or anything else for one of a build that takes no snapshot there.
pub const CAGE: &str = "DROVER_FAKE_CAGE";
/// See [`CAGE`].
pub const INSIDE: &str = "inside";

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "read to check the file's form")]
struct Config {
    cluster_id: String,
    host: String,
    vm: String,
    epoch: u64,
    vcpus: u32,
    memory_mib: u64,
    huge_pages: bool,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
    cpu_profile: String,
    socket: PathBuf,
    tls: drover_pki::TlsFiles,
    incoming: Option<Incoming>,
    #[serde(default)]
    disks: Vec<serde_json::Value>,
    #[serde(default)]
    nics: Vec<serde_json::Value>,
    #[serde(default)]
    balloon: Option<Balloon>,
    #[serde(default)]
    restore: Option<Restored>,
    #[serde(default)]
    sandbox: Option<serde_json::Value>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Balloon {
    slot: u32,
    target_mib: u64,
    revision: u64,
}

impl Balloon {
    /// What is told of it before its guest has done anything.
    fn devices(&self, memory_mib: u64) -> VmmDevices {
        assert_eq!(self.slot, 31);
        VmmDevices {
            memory: Some(VmMemory {
                target_mib: self.target_mib,
                revision: self.revision,
                actual_mib: memory_mib,
                driver: true,
            }),
            ..VmmDevices::default()
        }
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "read to check the file's form")]
struct Restored {
    folder: PathBuf,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "read to check the file's form")]
struct Incoming {
    migration: String,
    from_host: String,
    listen_ip: std::net::IpAddr,
    plaintext: bool,
    #[serde(default)]
    local: bool,
}

/// What the agent handed in, by kind and name.
#[derive(Default)]
struct Handed(Mutex<BTreeMap<(Kind, String), File>>);

impl Handed {
    fn serve(&self, listener: &std::os::unix::net::UnixListener) {
        for caller in listener.incoming() {
            let mut caller = caller.unwrap();
            let mut message = vec![0; MESSAGE_BYTES_MAX];
            let (length, descriptors) = loop {
                match receive_descriptors::<COUNT_MAX>(&caller, &mut message) {
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
                    received => break received.unwrap(),
                }
            };
            let (kind, name) = decode(&message[..length]).unwrap();
            let [file] = <[_; 1]>::try_from(descriptors).unwrap();
            let key = (kind, name.to_owned());
            self.0.lock().unwrap().insert(key, File::from(file));
            let _ = caller.write_all(TAKEN);
        }
    }

    /// Writes into a snapshot's file, as far as it was handed in.
    fn write(&self, path: &Path, text: &str) -> Result<(), Fault> {
        let key = (Kind::Snapshot, path.to_str().unwrap().to_owned());
        let handed = self.0.lock().unwrap();
        let missing = || Fault::new(Code::Denied, format!("{} was not handed in", path.display()));
        handed
            .get(&key)
            .ok_or_else(missing)?
            .write_all_at(text.as_bytes(), 0)
            .unwrap();
        Ok(())
    }

    fn has_userfaultfd(&self) -> bool {
        self.0.lock().unwrap().contains_key(&(Kind::Uffd, String::new()))
    }
}

struct Fake {
    /// In its sandbox.
    handed: Option<Arc<Handed>>,
    /// Where its newest snapshot is.
    folder: Mutex<PathBuf>,
    /// Told to end it answers, and lives on.
    deaf: bool,
    info: watch::Sender<VmmInfo>,
    requests: Mutex<Vec<String>>,
}

impl Fake {
    fn change(&self, change: impl FnOnce(&mut VmmInfo)) -> VmmInfo {
        self.info.send_modify(|info| {
            change(info);
            info.seq += 1;
        });
        self.info.borrow().clone()
    }

    fn note(&self, request: String) {
        self.requests.lock().unwrap().push(request);
    }

    fn end_as_told(&self) -> VmmInfo {
        if !self.deaf {
            self.end(0);
        }
        self.info.borrow().clone()
    }

    fn end(&self, code: i32) -> ! {
        std::process::exit(code)
    }

    /// What a guest or a peer does.
    fn happen(&self, word: &str) {
        let failure = || Some(Fault::new(Code::LinkLost, "the peer is gone").into());
        let reason = || Some(Fault::new(Code::GuestTripleFault, "the guest triple-faulted").into());
        self.change(|info| match word {
            "ready" => info.set_state(VmmState::Ready),
            "hand-over" => info.set_state(VmmState::HandedOver),
            "fail" => {
                info.set_state(VmmState::Failed);
                info.reason = reason();
            }
            "exit" => info.set_state(VmmState::Exited),
            "give-up" => {
                let devices = info.devices.get_or_insert_default();
                devices
                    .devices
                    .retain(|device| device.state() != VmmDeviceState::Ejecting);
            }
            "break" => info.migration.get_or_insert_default().failure = failure(),
            "progress" => {
                let progress = info
                    .migration
                    .get_or_insert_default()
                    .progress
                    .get_or_insert_default();
                progress.set_phase(MigrationPhase::PreCopy);
                progress.round += 1;
            }
            "half-way" => info.snapshot.get_or_insert_default().bytes_done += 50,
            "snapshot-done" => {
                let snapshot = info.snapshot.get_or_insert_default();
                snapshot.set_stage(SnapshotStage::Done);
                (snapshot.bytes_stored, snapshot.paused_us) = (60, 700);
            }
            "snapshot-sealed" => {
                let handed = self.handed.as_ref().unwrap();
                let manifest = self.folder.lock().unwrap().join("manifest.new");
                handed.write(&manifest, "whole").unwrap();
                let snapshot = info.snapshot.get_or_insert_default();
                snapshot.set_stage(SnapshotStage::Sealed);
                (snapshot.bytes_stored, snapshot.paused_us) = (60, 700);
            }
            "snapshot-failed" => {
                let snapshot = info.snapshot.get_or_insert_default();
                snapshot.set_stage(SnapshotStage::Failed);
                snapshot.reason = Some(Fault::new(Code::SnapshotFailed, "no room").into());
            }
            "receipt" => {
                let receipt = Receipt {
                    rounds: 7,
                    ..Receipt::default()
                };
                info.migration.get_or_insert_default().receipt = Some(receipt);
            }
            other => panic!("no such word: {other}"),
        });
    }
}

#[tonic::async_trait]
impl Vmm for Fake {
    async fn watch_info(&self, request: Request<WatchInfoRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        let mut info = self.info.subscribe();
        let wait = Duration::from_millis(request.wait_ms.into());
        let _ = tokio::time::timeout(wait, info.wait_for(|info| info.seq != request.seen_seq)).await;
        Ok(Response::new(self.info.borrow().clone()))
    }

    async fn grant(&self, request: Request<GrantRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        let info = self.info.borrow().clone();
        if info.epoch != request.epoch {
            eprintln!("ERROR fake: a grant for epoch {}", request.epoch);
            self.end(3);
        }
        if info.state() == VmmState::Incoming {
            eprintln!("ERROR fake: granted before it was ready");
            self.end(4);
        }
        Ok(Response::new(self.change(|info| {
            info.deadline_boottime_ns = info.deadline_boottime_ns.max(request.deadline_boottime_ns);
            if matches!(
                info.state(),
                VmmState::Waiting | VmmState::Ready | VmmState::Frozen
            ) {
                info.set_state(VmmState::Running);
            }
        })))
    }

    async fn start_outgoing(
        &self,
        request: Request<StartOutgoingRequest>,
    ) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        let downtime = request.options.unwrap_or_default().max_downtime_ms;
        self.note(format!(
            "outgoing {} {} {downtime}",
            request.migration, request.target_host
        ));
        let migration = VmmMigration {
            id: request.migration,
            outgoing: true,
            ..VmmMigration::default()
        };
        Ok(Response::new(
            self.change(|info| info.migration = Some(migration)),
        ))
    }

    async fn outcome(&self, request: Request<OutcomeRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.note(format!("outcome {} {}", request.migration, request.committed));
        if request.committed {
            return Ok(Response::new(self.end_as_told()));
        }
        Ok(Response::new(self.change(|info| {
            info.migration = None;
            info.set_state(VmmState::Running);
        })))
    }

    async fn switch_to_post_copy(
        &self,
        request: Request<SwitchToPostCopyRequest>,
    ) -> Result<Response<VmmInfo>, Status> {
        self.note(format!("switch_to_post_copy {}", request.into_inner().migration));
        Ok(Response::new(self.change(|_| {})))
    }

    async fn destroy(&self, _: Request<DestroyRequest>) -> Result<Response<VmmInfo>, Status> {
        Ok(Response::new(self.end_as_told()))
    }

    /// What was asked of it, a line each.
    async fn read_console(
        &self,
        request: Request<ReadConsoleRequest>,
    ) -> Result<Response<ReadConsoleResponse>, Status> {
        let data = self.requests.lock().unwrap().join("\n").into_bytes();
        let next_offset = data.len() as u64;
        let epoch = self.info.borrow().epoch;
        Ok(Response::new(ReadConsoleResponse {
            data,
            offset: request.into_inner().offset,
            next_offset,
            epoch,
        }))
    }

    async fn write_console(
        &self,
        request: Request<WriteConsoleRequest>,
    ) -> Result<Response<WriteConsoleResponse>, Status> {
        let data = request.into_inner().data;
        for word in std::str::from_utf8(&data).unwrap().split_whitespace() {
            self.happen(word);
        }
        Ok(Response::new(WriteConsoleResponse {
            accepted: u32::try_from(data.len()).unwrap(),
        }))
    }

    async fn attach_disk(&self, request: Request<AttachDiskRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.note(format!("attach {} {}", request.slot, request.revision));
        Ok(Response::new(self.change(|info| {
            let devices = info.devices.get_or_insert_default();
            devices.revision = request.revision;
            devices.devices.retain(|device| device.slot != request.slot);
            devices.devices.push(VmmDevice {
                slot: request.slot,
                kind: "disk".to_owned(),
                size_bytes: std::fs::metadata(&request.path).unwrap().len(),
                path: request.path,
                read_only: request.read_only,
                state: VmmDeviceState::Attached.into(),
                ..VmmDevice::default()
            });
        })))
    }

    async fn attach_nic(&self, request: Request<AttachNicRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.note(format!("attach {} {}", request.slot, request.revision));
        // As the real one finds it.
        if nix::net::if_::if_nametoindex(request.tap.as_str()).is_err() {
            let message = format!("tap {} is not there", request.tap);
            return Err(Fault::new(Code::NicUnusable, message).into());
        }
        Ok(Response::new(self.change(|info| {
            let devices = info.devices.get_or_insert_default();
            devices.revision = request.revision;
            devices.devices.retain(|device| device.slot != request.slot);
            devices.devices.push(VmmDevice {
                slot: request.slot,
                kind: "nic".to_owned(),
                mac: request.mac,
                tap: request.tap,
                state: VmmDeviceState::Attached.into(),
                ..VmmDevice::default()
            });
        })))
    }

    async fn detach_nic(&self, request: Request<DetachNicRequest>) -> Result<Response<VmmInfo>, Status> {
        let DetachNicRequest { revision, slot, mac } = request.into_inner();
        self.note(format!("detach {slot} {revision}"));
        Ok(Response::new(self.change(|info| {
            let devices = info.devices.get_or_insert_default();
            devices.revision = revision;
            for device in devices.devices.iter_mut().filter(|device| device.mac == mac) {
                device.set_state(VmmDeviceState::Ejecting);
            }
        })))
    }

    async fn detach_disk(&self, request: Request<DetachDiskRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.note(format!("detach {} {}", request.slot, request.revision));
        Ok(Response::new(self.change(|info| {
            let devices = info.devices.get_or_insert_default();
            devices.revision = request.revision;
            for device in devices
                .devices
                .iter_mut()
                .filter(|device| device.slot == request.slot)
            {
                device.set_state(VmmDeviceState::Ejecting);
            }
        })))
    }

    async fn resize_disk(&self, request: Request<ResizeDiskRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.note(format!("resize {} {}", request.slot, request.size_bytes));
        Ok(Response::new(self.change(|info| {
            let devices = info.devices.get_or_insert_default();
            for device in devices
                .devices
                .iter_mut()
                .filter(|device| device.slot == request.slot)
            {
                device.size_bytes = request.size_bytes;
            }
        })))
    }

    async fn power_button(&self, request: Request<PowerButtonRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner().request;
        self.note(format!("press {request}"));
        Ok(Response::new(self.change(|info| {
            info.devices.get_or_insert_default().pressed = request;
        })))
    }

    /// Makes the files that it is told of; what they hold is the slot's number.
    async fn take_snapshot(
        &self,
        request: Request<TakeSnapshotRequest>,
    ) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        let slots: Vec<u32> = request.disks.iter().map(|disk| disk.slot).collect();
        self.note(format!("snapshot {} {slots:?}", request.id));
        let known = self.info.borrow().snapshot.clone();
        if known.is_some_and(|known| known.id == request.id) {
            return Ok(Response::new(self.info.borrow().clone()));
        }
        let folder = PathBuf::from(&request.folder);
        if self.handed.is_none() && std::fs::read_dir(&folder).unwrap().next().is_some() {
            return Err(Fault::new(Code::SnapshotFailed, "the folder is not empty").into());
        }
        let write = |path: &Path, text: &str| match &self.handed {
            Some(handed) => handed.write(path, text),
            None => {
                std::fs::write(path, text).unwrap();
                Ok(())
            }
        };
        assert!(self.handed.as_ref().is_none_or(|handed| handed.has_userfaultfd()));
        write(&folder.join("memory"), "pages")?;
        for disk in &request.disks {
            write(Path::new(&disk.path), &disk.slot.to_string())?;
        }
        *self.folder.lock().unwrap() = folder;
        let snapshot = VmmSnapshot {
            id: request.id,
            stage: SnapshotStage::Running.into(),
            bytes_total: 100,
            ..VmmSnapshot::default()
        };
        Ok(Response::new(self.change(|info| info.snapshot = Some(snapshot))))
    }

    async fn cancel_snapshot(
        &self,
        request: Request<CancelSnapshotRequest>,
    ) -> Result<Response<VmmInfo>, Status> {
        let id = request.into_inner().id;
        self.note(format!("cancel {id}"));
        Ok(Response::new(self.change(|info| {
            let known = info.snapshot.get_or_insert_default();
            if known.id == id && known.stage() == SnapshotStage::Running {
                known.set_stage(SnapshotStage::Cancelled);
            }
        })))
    }

    async fn set_memory(&self, request: Request<SetMemoryRequest>) -> Result<Response<VmmInfo>, Status> {
        let request = request.into_inner();
        self.note(format!("memory {} {}", request.target_mib, request.revision));
        Ok(Response::new(self.change(|info| {
            if let Some(memory) = &mut info.devices.get_or_insert_default().memory {
                (memory.target_mib, memory.revision) = (request.target_mib, request.revision);
                // A guest that does as it is asked at once.
                memory.actual_mib = request.target_mib;
            }
        })))
    }

    async fn forecast(&self, request: Request<ForecastRequest>) -> Result<Response<Forecast>, Status> {
        let request = request.into_inner();
        self.note(format!("forecast {} {}", request.vm, request.epoch));
        Ok(Response::new(Forecast {
            bandwidth_bytes_per_s: request.bandwidth_bytes_per_s,
            rounds: 3,
            ..Forecast::default()
        }))
    }
}

/// What every fake is.
pub fn build() -> VmmBuild {
    VmmBuild {
        version: "0.0.1".to_owned(),
        build: "f0".to_owned(),
    }
}

/// What a VMM has that was given these NICs.
fn devices(nics: &[serde_json::Value]) -> VmmDevices {
    let text = |nic: &serde_json::Value, field: &str| nic[field].as_str().unwrap().to_owned();
    let device = |(slot, nic)| VmmDevice {
        slot,
        kind: "nic".to_owned(),
        mac: text(nic, "mac"),
        tap: text(nic, "tap"),
        state: VmmDeviceState::Attached.into(),
        ..VmmDevice::default()
    };
    VmmDevices {
        devices: (1..).zip(nics).map(device).collect(),
        changes_nics: true,
        ..VmmDevices::default()
    }
}

/// The process's whole life.
pub fn live() {
    // Orphans of a test that failed end with it.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
    if std::env::args().nth(1).as_deref() == Some("--version") {
        let VmmBuild { version, build } = build();
        println!("drover-vmm {version} build {build}");
        return;
    }
    let cage = std::env::var(CAGE).ok();
    let asked = std::env::args().nth(1).unwrap_or_default();
    if asked == "--post-copy" || cage.is_some() && asked.starts_with("--sandbox") {
        return println!("ok");
    }
    let path = PathBuf::from(std::env::args_os().nth(2).expect("--config FILE"));
    let folder = path.parent().unwrap();
    let Ok(_lock) = lock(folder) else {
        eprintln!("ERROR fake: the lock is held");
        std::process::exit(5);
    };
    let config: Config = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    // As one that verifies: its folder must be whole.
    if let Some(restored) = &config.restore
        && !restored.folder.join("memory").exists()
    {
        eprintln!("ERROR fake: the snapshot is damaged");
        std::process::exit(7);
    }
    if config.cmdline == "die" {
        eprintln!("INFO fake: starts\nERROR fake: the kernel is none");
        std::process::exit(6);
    }
    let receiving = config.incoming.as_ref();
    let migration = receiving.map(|from| VmmMigration {
        id: from.migration.clone(),
        ..VmmMigration::default()
    });
    let info = VmmInfo {
        seq: 1,
        vm: config.vm.clone(),
        epoch: config.epoch,
        state: if receiving.is_some() {
            VmmState::Incoming
        } else {
            VmmState::Waiting
        }
        .into(),
        listen_addr: receiving.map_or_else(String::new, |incoming| match incoming.local {
            true => LOCAL_ADDR.to_owned(),
            false => format!("{}:4711", incoming.listen_ip),
        }),
        build: Some(build()),
        migration,
        devices: match &config.balloon {
            Some(balloon) => Some(balloon.devices(config.memory_mib)),
            None => (config.cmdline == "devices").then(|| devices(&config.nics)),
        },
        pid: std::process::id(),
        snapshot_files_handed: cage.as_deref() == Some(INSIDE),
        ..VmmInfo::default()
    };
    let handed = cage.map(|_| {
        assert!(config.sandbox.is_some(), "it is to have a sandbox");
        let (handed, listener) = (Arc::new(Handed::default()), folder.join(SOCKET));
        let (serving, listener) = (
            handed.clone(),
            std::os::unix::net::UnixListener::bind(listener).unwrap(),
        );
        std::thread::spawn(move || serving.serve(&listener));
        handed
    });
    let fake = Fake {
        handed,
        folder: Mutex::default(),
        deaf: config.cmdline == "deaf",
        info: watch::Sender::new(info),
        requests: Mutex::default(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let listener = UnixListener::bind(&config.socket).unwrap();
        let server = Server::builder().add_service(VmmServer::new(fake));
        server
            .serve_with_incoming(UnixListenerStream::new(listener))
            .await
            .unwrap();
    });
}

fn lock(folder: &Path) -> Result<Flock<File>, ()> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(folder.join("lock"))
        .unwrap();
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| ())
}
