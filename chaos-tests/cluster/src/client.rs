//! A user of the cluster: blocking calls of the `Controller` service through whichever controller answers.
//!
//! Every call is retried at the next controller while nobody leads, under one request id, as `ctl` does it; so a test sees
//! only answers that a user would see.

use std::future::Future;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use drover_pki::{Credentials, controller_dns};
use drover_proto::v1::controller_client::ControllerClient;
use drover_proto::v1::{
    AttachDiskToVmRequest, AttachNicToVmRequest, CancelMigrationRequest, Cluster as ClusterInfo,
    CreateNetworkRequest, CreateSnapshotRequest, CreateVmRequest, CreateVolumeRequest, DeleteNetworkRequest,
    DeleteSnapshotRequest, DeleteVmRequest, DeleteVolumeRequest, DetachDiskFromVmRequest,
    DetachNicFromVmRequest, GetClusterRequest, GetMigrationRequest, GetSnapshotRequest, GetVmRequest, Host,
    ListEventsRequest, ListHostsRequest, ListMigrationsRequest, ListVolumesRequest, MigrateVmRequest,
    Migration, MigrationForecast, MigrationOptions, MigrationPhase, Network, PostcopyMigrationRequest,
    ReadConsoleRequest, ReadConsoleResponse, RestoreVmRequest, SetVmMemoryRequest, Snapshot, SnapshotPhase,
    StartVmRequest, StopVmRequest, Vm, VmDisk, VmNic, VmSpec, VmState, Volume, WatchMigrationRequest,
    WriteConsoleRequest,
};
use drover_proto::{Code, Fault};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::{LOOK_AGAIN, PATIENCE, await_some};

/// How long a watch is held, below the time that a call may take.
const WATCH_WAIT_MS: u32 = 2_000;
/// One call may take so long before the next controller is asked.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

static REQUESTS: AtomicU64 = AtomicU64::new(0);

/// An id that no other request has.
pub fn request_id() -> String {
    format!(
        "test-{}-{}",
        std::process::id(),
        REQUESTS.fetch_add(1, Ordering::Relaxed)
    )
}

/// A VM that boots the probe with `memory_mib` and the probe's `parameters`, pinned to `host` unless that is empty.
pub fn probe_spec(name: &str, host: &str, memory_mib: u64, vcpus: u32, parameters: &str) -> VmSpec {
    VmSpec {
        name: name.to_owned(),
        vcpus,
        memory_mib,
        kernel: "probe".to_owned(),
        cmdline: parameters.to_owned(),
        host: host.to_owned(),
        ..VmSpec::default()
    }
}

/// A connection to all controllers, with one identity.
pub struct Client {
    runtime: Runtime,
    channels: Vec<Channel>,
    next: AtomicUsize,
}

impl Client {
    /// Calls go to `controllers` ("ip:port"). Made on a thread that reaches them; connects when first used.
    pub fn new(credentials: &Credentials, controllers: &[String]) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("starting the client's runtime")?;
        let _inside = runtime.enter();
        let mut channels = Vec::new();
        for controller in controllers {
            let endpoint = Endpoint::from_shared(format!("https://{controller}"))?
                .tls_config(credentials.tonic_client(&controller_dns(None)))?
                .connect_timeout(Duration::from_secs(1))
                .timeout(CALL_TIMEOUT);
            channels.push(endpoint.connect_lazy());
        }
        drop(_inside);
        Ok(Self {
            runtime,
            channels,
            next: AtomicUsize::new(0),
        })
    }

    /// One call, asked again elsewhere while the answer is "no leader".
    fn call<T, F, A>(&self, ask: F) -> Result<T, Fault>
    where
        F: Fn(ControllerClient<Channel>) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let at = self.next.load(Ordering::Relaxed) % self.channels.len();
            match self.call_at(at, &ask) {
                Err(fault) if fault.code == Code::NoLeader && Instant::now() < deadline => {
                    self.next.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(LOOK_AGAIN * 5);
                }
                answer => return answer,
            }
        }
    }

    fn call_at<T, F, A>(&self, controller: usize, ask: &F) -> Result<T, Fault>
    where
        F: Fn(ControllerClient<Channel>) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        let client = ControllerClient::new(self.channels[controller].clone());
        self.runtime
            .block_on(ask(client))
            .map(Response::into_inner)
            .map_err(|status| Fault::from(&status))
    }

    /// What the cluster says of itself, asked of one controller only.
    pub fn cluster_at(&self, controller: usize) -> Result<ClusterInfo, Fault> {
        self.call_at(controller, &|mut client: ControllerClient<Channel>| async move {
            client.get_cluster(GetClusterRequest { allow_stale: false }).await
        })
    }

    /// What the cluster says of itself.
    pub fn cluster(&self) -> Result<ClusterInfo, Fault> {
        self.call(
            |mut client| async move { client.get_cluster(GetClusterRequest { allow_stale: false }).await },
        )
    }

    /// Every host.
    pub fn hosts(&self) -> Result<Vec<Host>, Fault> {
        self.call(
            |mut client| async move { client.list_hosts(ListHostsRequest { allow_stale: false }).await },
        )
        .map(|answer| answer.hosts)
    }

    /// Creates a VM and, with `start`, wants it running.
    pub fn create_vm(&self, spec: &VmSpec, start: bool) -> Result<Vm, Fault> {
        let request = CreateVmRequest {
            request_id: request_id(),
            spec: Some(spec.clone()),
            start,
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.create_vm(request).await }
        })
    }

    /// Creates a network.
    pub fn create_network(&self, network: &Network) -> Result<Network, Fault> {
        let request = CreateNetworkRequest {
            request_id: request_id(),
            network: Some(network.clone()),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.create_network(request).await }
        })
    }

    /// Deletes a network.
    pub fn delete_network(&self, name: &str) -> Result<Network, Fault> {
        let request = DeleteNetworkRequest {
            request_id: request_id(),
            name: name.to_owned(),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.delete_network(request).await }
        })
    }

    /// Creates a volume in the pool `default`.
    pub fn create_volume(&self, name: &str, size_bytes: u64) -> Result<Volume, Fault> {
        let volume = Volume {
            name: name.to_owned(),
            size_bytes,
            ..Volume::default()
        };
        self.create(volume)
    }

    /// Creates a volume of an image, as large as that, in the pool `default`.
    pub fn create_volume_of(&self, name: &str, image: &str) -> Result<Volume, Fault> {
        self.create(Volume {
            name: name.to_owned(),
            image: image.to_owned(),
            ..Volume::default()
        })
    }

    fn create(&self, volume: Volume) -> Result<Volume, Fault> {
        let request = CreateVolumeRequest {
            request_id: request_id(),
            volume: Some(volume),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.create_volume(request).await }
        })
    }

    /// Begins a snapshot.
    pub fn create_snapshot(&self, vm: &str, name: &str) -> Result<Snapshot, Fault> {
        let request = CreateSnapshotRequest {
            request_id: request_id(),
            vm: vm.to_owned(),
            name: name.to_owned(),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.create_snapshot(request).await }
        })
    }

    /// One snapshot.
    pub fn snapshot(&self, vm: &str, name: &str) -> Result<Snapshot, Fault> {
        let request = GetSnapshotRequest {
            vm: vm.to_owned(),
            name: name.to_owned(),
            allow_stale: false,
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.get_snapshot(request).await }
        })
    }

    /// Waits until a snapshot is no more being taken.
    pub fn await_snapshot(&self, vm: &str, name: &str) -> Snapshot {
        await_some(&format!("snapshot {name} of {vm} to end"), || {
            let snapshot = self.snapshot(vm, name).map_err(|fault| fault.to_string())?;
            match snapshot.phase() {
                SnapshotPhase::Creating => Err(format!("{snapshot:?}")),
                _ => Ok(snapshot),
            }
        })
    }

    /// Wants a snapshot gone.
    pub fn delete_snapshot(&self, vm: &str, name: &str) -> Result<Snapshot, Fault> {
        let request = DeleteSnapshotRequest {
            request_id: request_id(),
            vm: vm.to_owned(),
            name: name.to_owned(),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.delete_snapshot(request).await }
        })
    }

    /// Wants a VM, or the new one `clone`, as a snapshot has it.
    pub fn restore_vm(&self, vm: &str, snapshot: &str, clone: &str) -> Result<Vm, Fault> {
        let request = RestoreVmRequest {
            request_id: request_id(),
            vm: vm.to_owned(),
            snapshot: snapshot.to_owned(),
            clone: clone.to_owned(),
            new_addresses: false,
        };
        self.restore(request)
    }

    /// Wants the new VM `clone` as a snapshot has it, with NICs of its own.
    pub fn clone_vm(&self, vm: &str, snapshot: &str, clone: &str) -> Result<Vm, Fault> {
        self.restore(RestoreVmRequest {
            request_id: request_id(),
            vm: vm.to_owned(),
            snapshot: snapshot.to_owned(),
            clone: clone.to_owned(),
            new_addresses: true,
        })
    }

    fn restore(&self, request: RestoreVmRequest) -> Result<Vm, Fault> {
        self.call(|mut client| {
            let request = request.clone();
            async move { client.restore_vm(request).await }
        })
    }

    /// Gives a VM a volume that it can write to.
    pub fn attach_disk(&self, vm: &str, volume: &str) -> Result<Vm, Fault> {
        let disk = VmDisk {
            volume: volume.to_owned(),
            ..VmDisk::default()
        };
        let request = AttachDiskToVmRequest {
            request_id: request_id(),
            vm: vm.to_owned(),
            disk: Some(disk),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.attach_disk(request).await }
        })
    }

    /// Changes how much of its memory a VM's guest is to have.
    pub fn set_memory(&self, vm: &str, memory_mib: u64) -> Result<Vm, Fault> {
        let request = SetVmMemoryRequest {
            request_id: request_id(),
            vm: vm.to_owned(),
            memory_mib,
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.set_vm_memory(request).await }
        })
    }

    /// Wants a VM to give a volume up.
    pub fn detach_disk(&self, vm: &str, volume: &str) -> Result<Vm, Fault> {
        let request = DetachDiskFromVmRequest {
            request_id: request_id(),
            vm: vm.to_owned(),
            volume: volume.to_owned(),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.detach_disk(request).await }
        })
    }

    /// Gives a VM a NIC in a network, with addresses that are chosen.
    pub fn attach_nic(&self, vm: &str, network: &str) -> Result<Vm, Fault> {
        let nic = VmNic {
            network: network.to_owned(),
            ..VmNic::default()
        };
        let request = AttachNicToVmRequest {
            request_id: request_id(),
            vm: vm.to_owned(),
            nic: Some(nic),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.attach_nic(request).await }
        })
    }

    /// Wants a VM to give a NIC up: by its MAC, or its network.
    pub fn detach_nic(&self, vm: &str, nic: &str) -> Result<Vm, Fault> {
        let request = DetachNicFromVmRequest {
            request_id: request_id(),
            vm: vm.to_owned(),
            nic: nic.to_owned(),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.detach_nic(request).await }
        })
    }

    /// Every volume.
    pub fn volumes(&self) -> Result<Vec<Volume>, Fault> {
        self.call(|mut client| async move { client.list_volumes(ListVolumesRequest::default()).await })
            .map(|answer| answer.volumes)
    }

    /// The volume, once it satisfies `fits`.
    pub fn await_volume(&self, name: &str, what: &str, fits: impl Fn(&Volume) -> bool) -> Volume {
        await_some(&format!("volume {name} to be {what}"), || {
            let volumes = self.volumes().map_err(|fault| fault.to_string())?;
            let found = volumes.into_iter().find(|volume| volume.name == name);
            match found {
                Some(volume) if fits(&volume) => Ok(volume),
                other => Err(format!("{other:?}")),
            }
        })
    }

    /// Deletes a volume, with what it holds or without.
    pub fn delete_volume(&self, name: &str, remove_content: bool) -> Result<Volume, Fault> {
        let request = DeleteVolumeRequest {
            request_id: request_id(),
            name: name.to_owned(),
            remove_content,
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.delete_volume(request).await }
        })
    }

    /// One VM.
    pub fn vm(&self, name: &str) -> Result<Vm, Fault> {
        self.call(|mut client| {
            let request = GetVmRequest {
                name: name.to_owned(),
                allow_stale: false,
                with_user_data: false,
            };
            async move { client.get_vm(request).await }
        })
    }

    /// Wants a VM running.
    pub fn start_vm(&self, name: &str) -> Result<Vm, Fault> {
        let request = StartVmRequest {
            request_id: request_id(),
            name: name.to_owned(),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.start_vm(request).await }
        })
    }

    /// Wants a VM stopped.
    pub fn stop_vm(&self, name: &str) -> Result<Vm, Fault> {
        let request = StopVmRequest {
            request_id: request_id(),
            name: name.to_owned(),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.stop_vm(request).await }
        })
    }

    /// Deletes a VM.
    pub fn delete_vm(&self, name: &str) -> Result<Vm, Fault> {
        let request = DeleteVmRequest {
            request_id: request_id(),
            name: name.to_owned(),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.delete_vm(request).await }
        })
    }

    /// Starts a migration.
    pub fn migrate(&self, vm: &str, to: &str) -> Result<Migration, Fault> {
        self.migrate_with(vm, to, MigrationOptions::default())
    }

    /// Starts a migration with options.
    pub fn migrate_with(&self, vm: &str, to: &str, options: MigrationOptions) -> Result<Migration, Fault> {
        let request = MigrateVmRequest {
            request_id: request_id(),
            vm: vm.to_owned(),
            to: to.to_owned(),
            options: Some(options),
            upgrade: false,
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.migrate_vm(request).await }
        })
    }

    /// Starts an upgrade: the VM's VMM is replaced on its own host.
    pub fn upgrade(&self, vm: &str) -> Result<Migration, Fault> {
        let request = MigrateVmRequest {
            request_id: request_id(),
            vm: vm.to_owned(),
            upgrade: true,
            ..MigrateVmRequest::default()
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.migrate_vm(request).await }
        })
    }

    /// What a migration would be like.
    pub fn forecast(
        &self,
        vm: &str,
        to: &str,
        options: MigrationOptions,
    ) -> Result<MigrationForecast, Fault> {
        let request = MigrateVmRequest {
            request_id: String::new(),
            vm: vm.to_owned(),
            to: to.to_owned(),
            options: Some(options),
            upgrade: false,
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.forecast_migration(request).await }
        })
    }

    /// One migration.
    pub fn migration(&self, id: &str) -> Result<Migration, Fault> {
        self.call(|mut client| {
            let request = GetMigrationRequest {
                id: id.to_owned(),
                allow_stale: false,
            };
            async move { client.get_migration(request).await }
        })
    }

    /// One migration, as soon as it is other than what `seen` names (0: nothing); gives the name of what it is then.
    pub fn watch(&self, id: &str, seen: u64) -> Result<(Migration, u64), Fault> {
        let request = WatchMigrationRequest {
            id: id.to_owned(),
            seen,
            wait_ms: WATCH_WAIT_MS,
        };
        let answer = self.call(|mut client| {
            let request = request.clone();
            async move { client.watch_migration(request).await }
        })?;
        Ok((answer.migration.unwrap_or_default(), answer.seen))
    }

    /// Every migration that the cluster keeps, the newest first.
    pub fn migrations(&self) -> Result<Vec<Migration>, Fault> {
        self.call(|mut client| async move { client.list_migrations(ListMigrationsRequest::default()).await })
            .map(|answer| answer.migrations)
    }

    /// Asks for a migration's abort.
    pub fn cancel(&self, id: &str) -> Result<Migration, Fault> {
        let request = CancelMigrationRequest {
            request_id: request_id(),
            id: id.to_owned(),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.cancel_migration(request).await }
        })
    }

    /// Asks a migration to go on by post-copy now.
    pub fn postcopy(&self, id: &str) -> Result<Migration, Fault> {
        let request = PostcopyMigrationRequest {
            request_id: request_id(),
            id: id.to_owned(),
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.postcopy_migration(request).await }
        })
    }

    /// The newest event's number and message, and how many there are.
    pub fn last_event(&self) -> Result<u64, Fault> {
        let request = ListEventsRequest {
            after_seq: 0,
            wait_ms: 0,
            limit: 0,
        };
        self.call(|mut client| async move { client.list_events(request).await })
            .map(|answer| answer.last_seq)
    }

    /// Console bytes from `offset` on; waits up to `wait_ms` for one.
    pub fn read_console(&self, vm: &str, offset: u64, wait_ms: u32) -> Result<ReadConsoleResponse, Fault> {
        let request = ReadConsoleRequest {
            vm: vm.to_owned(),
            offset,
            wait_ms,
            ..ReadConsoleRequest::default()
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.read_console(request).await }
        })
    }

    /// Types `text` on a VM's console, all of it.
    pub fn type_text(&self, vm: &str, text: &str) {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let accepted = await_some("the console to take input", || {
                let request = WriteConsoleRequest {
                    vm: vm.to_owned(),
                    data: rest.to_vec(),
                    epoch: 0,
                };
                self.call(|mut client| {
                    let request = request.clone();
                    async move { client.write_console(request).await }
                })
                .map(|answer| usize::try_from(answer.accepted).expect("a byte count fits"))
                .map_err(|fault| fault.to_string())
            });
            rest = &rest[accepted.min(rest.len())..];
        }
    }

    /// Waits until the VM is as `fits` wants it.
    pub fn await_vm(&self, name: &str, what: &str, fits: impl Fn(&Vm) -> bool) -> Vm {
        await_some(&format!("VM {name} to be {what}"), || match self.vm(name) {
            Ok(vm) if fits(&vm) => Ok(vm),
            Ok(vm) => Err(format!("{vm:?}")),
            Err(fault) => Err(fault.to_string()),
        })
    }

    /// Waits until the VM runs.
    pub fn await_running(&self, name: &str) -> Vm {
        self.await_vm(name, "running", |vm| vm.state() == VmState::Running)
    }

    /// Waits until the migration has ended, either way.
    pub fn await_end(&self, id: &str) -> Migration {
        await_some(&format!("the end of migration {id}"), || {
            match self.migration(id) {
                Ok(migration)
                    if matches!(migration.phase(), MigrationPhase::Done | MigrationPhase::Aborted) =>
                {
                    Ok(migration)
                }
                Ok(migration) => Err(format!("{migration:?}")),
                Err(fault) => Err(fault.to_string()),
            }
        })
    }
}
