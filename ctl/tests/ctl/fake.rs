//! A controller without a cluster: it answers over real mutual TLS what a test told it to, and remembers what it was asked.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use drover_pki::{ClusterCa, Credentials, Role};
use drover_proto::v1::controller_server::{Controller, ControllerServer};
use drover_proto::{Code, Fault, v1};
use tempfile::TempDir;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// A state that is awaited must come by then.
const WITHIN: Duration = Duration::from_secs(20);

/// What the controller knows and was asked.
#[derive(Default)]
pub struct State {
    /// Everything is answered by this, while set.
    pub refuse_all: Option<Fault>,
    /// The next so many calls that change something are done, but their answer gets lost.
    pub lose_answers: u32,
    /// VMs, each with the states that the next reads show.
    pub vms: BTreeMap<String, (v1::Vm, Vec<v1::VmState>)>,
    /// Networks.
    pub networks: Vec<v1::Network>,
    /// Volumes.
    pub volumes: Vec<v1::Volume>,
    /// What each listing in turn finds of the newest volume, which is made of an image: its progress and reason. Then it is filled.
    pub fills: Vec<v1::Volume>,
    /// Volumes that were deleted without their content.
    pub kept: Vec<String>,
    /// Snapshots, each with the ones that the next reads show; one that is being deleted is gone with the next read.
    pub snapshots: Vec<(v1::Snapshot, Vec<v1::Snapshot>)>,
    /// What was asked to be restored.
    pub restored: Vec<v1::RestoreVmRequest>,
    /// Hosts.
    pub hosts: Vec<v1::Host>,
    /// What the next reads of a migration show; the last one stays.
    pub migration: Vec<v1::Migration>,
    /// As a controller of an earlier version, which cannot hold a look until something changes.
    pub knows_no_watching: bool,
    /// What a cancelled migration becomes.
    pub cancelled: Option<v1::Migration>,
    /// What a dry run finds.
    pub forecast: Option<v1::MigrationForecast>,
    /// All migrations, for lists.
    pub migrations: Vec<v1::Migration>,
    /// Events.
    pub events: Vec<v1::Event>,
    /// The console's answers, in order; then silence.
    pub console: Vec<Result<v1::ReadConsoleResponse, Fault>>,
    /// Input that arrived.
    pub input: Vec<u8>,
    /// Input taken of each write.
    pub input_at_once: usize,
    /// Calls, by name, with the request id if they have one.
    pub calls: Vec<(&'static str, String)>,
}

impl State {
    /// What the next look at the migration shows.
    fn next_sight(&mut self, id: &str) -> Result<v1::Migration, Fault> {
        match self.migration.len() {
            0 => {
                let message = format!("no migration is named \"{id}\"");
                Err(Fault::new(Code::MigrationNotFound, message).field("id"))
            }
            1 => Ok(self.migration[0].clone()),
            _ => Ok(self.migration.remove(0)),
        }
    }
}

/// A running fake controller with a context file for it.
pub struct Fake {
    pub dir: TempDir,
    pub addr: SocketAddr,
    pub context: PathBuf,
    state: Arc<Mutex<State>>,
    _runtime: tokio::runtime::Runtime,
}

impl Fake {
    pub fn start() -> Self {
        drover_pki::install_provider();
        let dir = tempfile::tempdir().unwrap();
        let ca = ClusterCa::create("test").unwrap();
        let tls = ca
            .issue_to(&dir.path().join("c1"), Role::Controller, "c1")
            .unwrap();
        let credentials = Credentials::load(&tls, "test").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let addr = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let service = ControllerServer::new(Service(state.clone()));
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            Server::builder()
                .tls_config(credentials.tonic_server())
                .unwrap()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .unwrap();
        });
        ca.issue_to(&dir.path().join("user"), Role::User, "admin")
            .unwrap();
        let context = write_context(dir.path(), "test", &[addr]);
        Self {
            dir,
            addr,
            context,
            state,
            _runtime: runtime,
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// `ctl` with the context of this controller.
    pub fn ctl(&self, line: &str) -> Command {
        ctl(&self.context, line)
    }

    /// Runs `ctl` to its end.
    pub fn run(&self, line: &str) -> Ended {
        Ended::of(self.ctl(line).output().unwrap())
    }

    /// Waits until the state is as `wanted` says.
    pub fn wait_until(&self, what: &str, wanted: impl Fn(&State) -> bool) {
        let until = Instant::now() + WITHIN;
        while !wanted(&self.state()) {
            assert!(Instant::now() < until, "{what}: not within {WITHIN:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How often `name` was called.
    pub fn calls(&self, name: &str) -> usize {
        self.state()
            .calls
            .iter()
            .filter(|(call, _)| *call == name)
            .count()
    }
}

/// `ctl` with a context file, and nothing of the tester's environment.
pub fn ctl(context: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ctl"));
    command
        .args(line.split_whitespace())
        .env("DROVER_CONTEXT", context)
        .env_remove("DROVER_DEV_DIR")
        .env_remove("XDG_STATE_HOME")
        .stdin(std::process::Stdio::null());
    command
}

/// Writes a context with the identity in `dir/user`.
pub fn write_context(dir: &Path, cluster: &str, controllers: &[SocketAddr]) -> PathBuf {
    let path = dir.join("client.json");
    let json = serde_json::json!({
        "cluster_id": cluster,
        "controllers": controllers,
        "tls": { "ca": "user/ca.pem", "cert": "user/admin.pem", "key": "user/admin.key" },
    });
    std::fs::write(&path, json.to_string()).unwrap();
    path
}

/// An address that nobody listens on.
pub fn dead_addr() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// What became of a `ctl`.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

pub fn vm(name: &str, state: v1::VmState) -> v1::Vm {
    let spec = v1::VmSpec {
        name: name.to_owned(),
        vcpus: 1,
        memory_mib: 256,
        kernel: "probe".into(),
        ..Default::default()
    };
    v1::Vm {
        spec: Some(spec),
        state: state.into(),
        placement: Some(v1::Placement {
            host: "host1".to_owned(),
            epoch: 1,
            ..Default::default()
        }),
        wanted_running: true,
        ..Default::default()
    }
}

pub fn migration(phase: v1::MigrationPhase) -> v1::Migration {
    v1::Migration {
        id: "m1".to_owned(),
        vm: "vm1".to_owned(),
        from: "host1".to_owned(),
        to: "host2".to_owned(),
        phase: phase.into(),
        epoch: 2,
        ..Default::default()
    }
}

struct Service(Arc<Mutex<State>>);

impl Service {
    /// Notes a call and gives the state, unless everything is refused.
    fn enter(&self, call: &'static str, request_id: &str) -> Result<MutexGuard<'_, State>, Status> {
        let mut state = self.0.lock().unwrap();
        state.calls.push((call, request_id.to_owned()));
        match state.refuse_all.clone() {
            Some(fault) => Err(fault.into()),
            None => Ok(state),
        }
    }
}

type Answer<T> = Result<Response<T>, Status>;

/// The answer, unless it is to get lost.
fn answer<T>(mut state: MutexGuard<'_, State>, value: T) -> Answer<T> {
    if state.lose_answers > 0 {
        state.lose_answers -= 1;
        return Err(Status::unavailable("the connection broke"));
    }
    Ok(Response::new(value))
}

fn no_snapshot(name: &str) -> Status {
    Fault::new(Code::SnapshotNotFound, format!("no snapshot is named \"{name}\""))
        .field("name")
        .into()
}

fn find_snapshot(state: &State, vm: &str, name: &str) -> Result<usize, Status> {
    let is_it = |snapshot: &v1::Snapshot| {
        snapshot.vm == vm && [&snapshot.name, &snapshot.id].iter().any(|has| *has == name)
    };
    let found = state.snapshots.iter().position(|(snapshot, _)| is_it(snapshot));
    found.ok_or_else(|| no_snapshot(name))
}

fn no_vm(name: &str) -> Status {
    Fault::new(Code::VmNotFound, format!("no VM is named \"{name}\""))
        .field("name")
        .into()
}

#[tonic::async_trait]
impl Controller for Service {
    async fn get_cluster(&self, request: Request<v1::GetClusterRequest>) -> Answer<v1::Cluster> {
        let cluster = v1::Cluster {
            id: "test".into(),
            answered_by: "c1".into(),
            ..Default::default()
        };
        if request.get_ref().allow_stale {
            return Ok(Response::new(cluster));
        }
        let _state = self.enter("get_cluster", "")?;
        Ok(Response::new(v1::Cluster {
            leader: "c1".into(),
            ..cluster
        }))
    }

    async fn list_hosts(&self, _: Request<v1::ListHostsRequest>) -> Answer<v1::ListHostsResponse> {
        let hosts = self.enter("list_hosts", "")?.hosts.clone();
        Ok(Response::new(v1::ListHostsResponse { hosts }))
    }

    async fn get_host(&self, request: Request<v1::GetHostRequest>) -> Answer<v1::Host> {
        let state = self.enter("get_host", "")?;
        let name = &request.get_ref().name;
        let host = state
            .hosts
            .iter()
            .find(|host| host.spec.as_ref().is_some_and(|spec| spec.name == *name));
        host.cloned().map(Response::new).ok_or_else(|| {
            Fault::new(Code::HostNotFound, format!("no host is named \"{name}\""))
                .field("name")
                .into()
        })
    }

    async fn create_vm(&self, request: Request<v1::CreateVmRequest>) -> Answer<v1::Vm> {
        let request = request.into_inner();
        let mut state = self.enter("create_vm", &request.request_id)?;
        let spec = request.spec.unwrap_or_default();
        let made = v1::Vm {
            state: if request.start {
                v1::VmState::Pending
            } else {
                v1::VmState::Stopped
            }
            .into(),
            wanted_running: request.start,
            spec: Some(spec.clone()),
            ..Default::default()
        };
        let next = vec![v1::VmState::Starting, v1::VmState::Running];
        state.vms.insert(
            spec.name,
            (made.clone(), if request.start { next } else { vec![] }),
        );
        answer(state, made)
    }

    async fn list_vms(&self, _: Request<v1::ListVmsRequest>) -> Answer<v1::ListVmsResponse> {
        let vms = self
            .enter("list_vms", "")?
            .vms
            .values()
            .map(|(vm, _)| vm.clone())
            .collect();
        Ok(Response::new(v1::ListVmsResponse { vms }))
    }

    async fn get_vm(&self, request: Request<v1::GetVmRequest>) -> Answer<v1::Vm> {
        let mut state = self.enter("get_vm", "")?;
        let name = request.into_inner().name;
        let Some((vm, next)) = state.vms.get_mut(&name) else {
            return Err(no_vm(&name));
        };
        if !next.is_empty() {
            vm.state = next.remove(0).into();
        }
        Ok(Response::new(vm.clone()))
    }

    async fn start_vm(&self, request: Request<v1::StartVmRequest>) -> Answer<v1::Vm> {
        let request = request.into_inner();
        let mut state = self.enter("start_vm", &request.request_id)?;
        let Some((vm, _)) = state.vms.get_mut(&request.name) else {
            return Err(no_vm(&request.name));
        };
        vm.wanted_running = true;
        let vm = vm.clone();
        answer(state, vm)
    }

    async fn stop_vm(&self, request: Request<v1::StopVmRequest>) -> Answer<v1::Vm> {
        let request = request.into_inner();
        let mut state = self.enter("stop_vm", &request.request_id)?;
        let Some((vm, _)) = state.vms.get_mut(&request.name) else {
            return Err(no_vm(&request.name));
        };
        vm.wanted_running = false;
        let vm = vm.clone();
        answer(state, vm)
    }

    async fn delete_vm(&self, request: Request<v1::DeleteVmRequest>) -> Answer<v1::Vm> {
        let request = request.into_inner();
        let mut state = self.enter("delete_vm", &request.request_id)?;
        let Some((mut vm, _)) = state.vms.remove(&request.name) else {
            return Err(no_vm(&request.name));
        };
        vm.deleting = true;
        answer(state, vm)
    }

    async fn create_network(&self, request: Request<v1::CreateNetworkRequest>) -> Answer<v1::Network> {
        let request = request.into_inner();
        let mut state = self.enter("create_network", &request.request_id)?;
        let network = request.network.unwrap_or_default();
        state.networks.push(network.clone());
        answer(state, network)
    }

    async fn list_networks(&self, _: Request<v1::ListNetworksRequest>) -> Answer<v1::ListNetworksResponse> {
        let networks = self.enter("list_networks", "")?.networks.clone();
        Ok(Response::new(v1::ListNetworksResponse { networks }))
    }

    async fn delete_network(&self, request: Request<v1::DeleteNetworkRequest>) -> Answer<v1::Network> {
        let request = request.into_inner();
        let mut state = self.enter("delete_network", &request.request_id)?;
        let found = state
            .networks
            .iter()
            .position(|network| network.name == request.name);
        let Some(at) = found else {
            let message = format!("no network is named \"{}\"", request.name);
            return Err(Fault::new(Code::NetworkNotFound, message).field("name").into());
        };
        if let Some(vm) = state.networks[at].vms.first() {
            let message = format!("name is {}, in which VM {vm} has a NIC", request.name);
            return Err(Fault::new(Code::NetworkInUse, message).field("name").into());
        }
        let network = state.networks.remove(at);
        answer(state, network)
    }

    async fn create_volume(&self, request: Request<v1::CreateVolumeRequest>) -> Answer<v1::Volume> {
        let request = request.into_inner();
        let mut state = self.enter("create_volume", &request.request_id)?;
        let mut volume = request.volume.unwrap_or_default();
        if !volume.image.is_empty() {
            (volume.size_bytes, volume.filling) = (2 << 30, true);
        }
        state.volumes.push(volume.clone());
        answer(state, volume)
    }

    async fn list_volumes(&self, _: Request<v1::ListVolumesRequest>) -> Answer<v1::ListVolumesResponse> {
        let mut state = self.enter("list_volumes", "")?;
        let next = (!state.fills.is_empty()).then(|| state.fills.remove(0));
        if let Some(newest) = state.volumes.last_mut().filter(|volume| volume.reason.is_none()) {
            newest.filling &= next.is_some();
            newest.reason = next.and_then(|next| next.reason);
        }
        let volumes = state.volumes.clone();
        Ok(Response::new(v1::ListVolumesResponse { volumes }))
    }

    async fn shutdown_vm(&self, request: Request<v1::ShutdownVmRequest>) -> Answer<v1::Vm> {
        let name = request.into_inner().name;
        Err(Fault::new(Code::VmNotFound, format!("no VM is named \"{name}\""))
            .field("name")
            .into())
    }

    async fn set_vm_memory(&self, request: Request<v1::SetVmMemoryRequest>) -> Answer<v1::Vm> {
        let request = request.into_inner();
        let mut state = self.enter("set_vm_memory", &request.request_id)?;
        let Some((vm, _)) = state.vms.get_mut(&request.vm) else {
            let message = format!("no VM is named \"{}\"", request.vm);
            return Err(Fault::new(Code::VmNotFound, message).field("vm").into());
        };
        let spec = vm.spec.get_or_insert_default();
        spec.memory_target_mib = request.memory_mib;
        spec.memory_revision += 1;
        let vm = vm.clone();
        answer(state, vm)
    }

    async fn attach_disk(&self, request: Request<v1::AttachDiskToVmRequest>) -> Answer<v1::Vm> {
        let vm = request.into_inner().vm;
        Err(Fault::new(Code::VmNotFound, format!("no VM is named \"{vm}\""))
            .field("vm")
            .into())
    }

    async fn detach_disk(&self, request: Request<v1::DetachDiskFromVmRequest>) -> Answer<v1::Vm> {
        let vm = request.into_inner().vm;
        Err(Fault::new(Code::VmNotFound, format!("no VM is named \"{vm}\""))
            .field("vm")
            .into())
    }

    async fn attach_nic(&self, request: Request<v1::AttachNicToVmRequest>) -> Answer<v1::Vm> {
        let v1::AttachNicToVmRequest { request_id, vm, nic } = request.into_inner();
        let mut state = self.enter("attach_nic", &request_id)?;
        let Some((found, _)) = state.vms.get_mut(&vm) else {
            return Err(no_vm(&vm));
        };
        let nic = v1::VmNic {
            mac: "52:54:00:00:00:01".to_owned(),
            ip: "10.1.0.2".to_owned(),
            ..nic.unwrap_or_default()
        };
        found.spec.get_or_insert_default().nics.push(nic);
        let found = found.clone();
        answer(state, found)
    }

    async fn detach_nic(&self, request: Request<v1::DetachNicFromVmRequest>) -> Answer<v1::Vm> {
        let v1::DetachNicFromVmRequest { request_id, vm, nic } = request.into_inner();
        let mut state = self.enter("detach_nic", &request_id)?;
        let Some((found, _)) = state.vms.get_mut(&vm) else {
            return Err(no_vm(&vm));
        };
        let nics = &mut found.spec.get_or_insert_default().nics;
        if !nics.iter().any(|has| has.mac == nic || has.network == nic) {
            let fault = Fault::new(Code::NicNotFound, format!("{vm} has no NIC \"{nic}\""));
            return Err(fault.field("nic").into());
        }
        nics.clear();
        let found = found.clone();
        answer(state, found)
    }

    async fn resize_volume(&self, request: Request<v1::ResizeVolumeRequest>) -> Answer<v1::Volume> {
        let name = request.into_inner().name;
        Err(
            Fault::new(Code::VolumeNotFound, format!("no volume is named \"{name}\""))
                .field("name")
                .into(),
        )
    }

    async fn delete_volume(&self, request: Request<v1::DeleteVolumeRequest>) -> Answer<v1::Volume> {
        let request = request.into_inner();
        let mut state = self.enter("delete_volume", &request.request_id)?;
        let found = state
            .volumes
            .iter()
            .position(|volume| volume.name == request.name);
        let Some(at) = found else {
            let message = format!("no volume is named \"{}\"", request.name);
            return Err(Fault::new(Code::VolumeNotFound, message).field("name").into());
        };
        if let Some(vm) = state.volumes[at].vms.first() {
            let message = format!("name is {}, which VM {vm} has", request.name);
            return Err(Fault::new(Code::VolumeInUse, message).field("name").into());
        }
        if !request.remove_content {
            state.kept.push(request.name);
        }
        let volume = state.volumes.remove(at);
        answer(state, volume)
    }

    async fn create_snapshot(&self, request: Request<v1::CreateSnapshotRequest>) -> Answer<v1::Snapshot> {
        let request = request.into_inner();
        let mut state = self.enter("create_snapshot", &request.request_id)?;
        let Some(at) = state
            .snapshots
            .iter()
            .position(|(snapshot, _)| snapshot.vm == request.vm)
        else {
            return Err(no_vm(&request.vm));
        };
        if !request.name.is_empty() {
            let (snapshot, next) = &mut state.snapshots[at];
            next.iter_mut()
                .chain([snapshot])
                .for_each(|snapshot| snapshot.name.clone_from(&request.name));
        }
        let begun = state.snapshots[at].0.clone();
        answer(state, begun)
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Answer<v1::ListSnapshotsResponse> {
        let vm = request.into_inner().vm;
        let state = self.enter("list_snapshots", "")?;
        let snapshots = state.snapshots.iter().map(|(snapshot, _)| snapshot);
        let asked = snapshots.filter(|snapshot| vm.is_empty() || snapshot.vm == vm);
        let snapshots = asked.cloned().collect();
        Ok(Response::new(v1::ListSnapshotsResponse { snapshots }))
    }

    async fn get_snapshot(&self, request: Request<v1::GetSnapshotRequest>) -> Answer<v1::Snapshot> {
        let request = request.into_inner();
        let mut state = self.enter("get_snapshot", "")?;
        let at = find_snapshot(&state, &request.vm, &request.name)?;
        let (snapshot, next) = &mut state.snapshots[at];
        if snapshot.phase() == v1::SnapshotPhase::Deleting {
            state.snapshots.remove(at);
            return Err(no_snapshot(&request.name));
        }
        if !next.is_empty() {
            *snapshot = next.remove(0);
        }
        Ok(Response::new(snapshot.clone()))
    }

    async fn delete_snapshot(&self, request: Request<v1::DeleteSnapshotRequest>) -> Answer<v1::Snapshot> {
        let request = request.into_inner();
        let mut state = self.enter("delete_snapshot", &request.request_id)?;
        let at = find_snapshot(&state, &request.vm, &request.name)?;
        state.snapshots[at].0.set_phase(v1::SnapshotPhase::Deleting);
        let deleted = state.snapshots[at].0.clone();
        answer(state, deleted)
    }

    async fn restore_vm(&self, request: Request<v1::RestoreVmRequest>) -> Answer<v1::Vm> {
        let request = request.into_inner();
        let mut state = self.enter("restore_vm", &request.request_id)?;
        let name = if request.clone.is_empty() {
            &request.vm
        } else {
            &request.clone
        };
        let Some((vm, _)) = state.vms.get_mut(name) else {
            return Err(no_vm(name));
        };
        vm.wanted_running = true;
        let vm = vm.clone();
        state.restored.push(request);
        answer(state, vm)
    }

    async fn read_console(&self, _: Request<v1::ReadConsoleRequest>) -> Answer<v1::ReadConsoleResponse> {
        let mut state = self.enter("read_console", "")?;
        if state.console.is_empty() {
            return Ok(Response::new(v1::ReadConsoleResponse::default()));
        }
        state.console.remove(0).map(Response::new).map_err(Status::from)
    }

    async fn write_console(
        &self,
        request: Request<v1::WriteConsoleRequest>,
    ) -> Answer<v1::WriteConsoleResponse> {
        let data = request.into_inner().data;
        let mut state = self.enter("write_console", "")?;
        let taken = data.len().min(state.input_at_once);
        state.input.extend(&data[..taken]);
        let accepted = u32::try_from(taken).unwrap();
        Ok(Response::new(v1::WriteConsoleResponse { accepted }))
    }

    async fn migrate_vm(&self, request: Request<v1::MigrateVmRequest>) -> Answer<v1::Migration> {
        let request = request.into_inner();
        let state = self.enter("migrate_vm", &request.request_id)?;
        if !state.vms.contains_key(&request.vm) {
            return Err(no_vm(&request.vm));
        }
        let planned = v1::Migration {
            options: request.options,
            ..migration(v1::MigrationPhase::Planned)
        };
        answer(state, planned)
    }

    async fn forecast_migration(
        &self,
        request: Request<v1::MigrateVmRequest>,
    ) -> Answer<v1::MigrationForecast> {
        let state = self.enter("forecast_migration", "")?;
        state
            .forecast
            .clone()
            .map(Response::new)
            .ok_or_else(|| no_vm(&request.get_ref().vm))
    }

    async fn list_migrations(
        &self,
        _: Request<v1::ListMigrationsRequest>,
    ) -> Answer<v1::ListMigrationsResponse> {
        let migrations = self.enter("list_migrations", "")?.migrations.clone();
        Ok(Response::new(v1::ListMigrationsResponse { migrations }))
    }

    async fn get_migration(&self, request: Request<v1::GetMigrationRequest>) -> Answer<v1::Migration> {
        let mut state = self.enter("get_migration", "")?;
        Ok(Response::new(state.next_sight(&request.get_ref().id)?))
    }

    async fn watch_migration(
        &self,
        request: Request<v1::WatchMigrationRequest>,
    ) -> Answer<v1::WatchMigrationResponse> {
        let v1::WatchMigrationRequest { id, seen, .. } = request.into_inner();
        let mut state = self.enter("watch_migration", "")?;
        if state.knows_no_watching {
            return Err(Status::unimplemented("no such call"));
        }
        let migration = state.next_sight(&id)?;
        Ok(Response::new(v1::WatchMigrationResponse {
            migration: Some(migration),
            seen: seen + 1,
        }))
    }

    async fn cancel_migration(&self, request: Request<v1::CancelMigrationRequest>) -> Answer<v1::Migration> {
        let mut state = self.enter("cancel_migration", &request.get_ref().request_id)?;
        match state.cancelled.clone() {
            Some(cancelled) => {
                state.migration = vec![cancelled.clone()];
                answer(state, cancelled)
            }
            None => Err(Fault::new(Code::MigrationEnded, "m1 is committed").into()),
        }
    }

    async fn postcopy_migration(
        &self,
        request: Request<v1::PostcopyMigrationRequest>,
    ) -> Answer<v1::Migration> {
        let state = self.enter("postcopy_migration", &request.get_ref().request_id)?;
        match state.migration.first().cloned() {
            Some(migration) => answer(state, migration),
            None => Err(Fault::new(Code::PostCopyNotAllowed, "m1 was begun without allow_postcopy").into()),
        }
    }

    async fn list_events(&self, request: Request<v1::ListEventsRequest>) -> Answer<v1::ListEventsResponse> {
        let state = self.enter("list_events", "")?;
        let after = request.get_ref().after_seq;
        let events: Vec<_> = state
            .events
            .iter()
            .filter(|event| event.seq > after)
            .cloned()
            .collect();
        let last_seq = state.events.last().map_or(0, |event| event.seq);
        Ok(Response::new(v1::ListEventsResponse { events, last_seq }))
    }
}
