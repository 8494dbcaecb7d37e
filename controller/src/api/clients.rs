//! The service `Controller`: what users ask.
//!
//! Reads are linearizable: the leader confirms that it leads, then answers. With `allow_stale` any controller answers at
//! once from what it has applied.

use std::time::Duration;

use drover_proto::v1::command::Kind;
use drover_proto::v1::controller_server::Controller;
use drover_proto::v1::{
    AbortMigrationRequest, AttachDisk, AttachDiskToVmRequest, AttachNic, AttachNicToVmRequest,
    CancelMigrationRequest, Cluster, CommandResponse, CreateNetwork, CreateNetworkRequest, CreateSnapshot,
    CreateSnapshotRequest, CreateVm, CreateVmRequest, CreateVolume, CreateVolumeRequest, DeleteNetwork,
    DeleteNetworkRequest, DeleteSnapshot, DeleteSnapshotRequest, DeleteVm, DeleteVmRequest, DeleteVolume,
    DeleteVolumeRequest, DetachDisk, DetachDiskFromVmRequest, DetachNic, DetachNicFromVmRequest,
    GetClusterRequest, GetHostRequest, GetMigrationRequest, GetSnapshotRequest, GetVmRequest, Host,
    ListEventsRequest, ListEventsResponse, ListHostsRequest, ListHostsResponse, ListMigrationsRequest,
    ListMigrationsResponse, ListNetworksRequest, ListNetworksResponse, ListSnapshotsRequest,
    ListSnapshotsResponse, ListVmsRequest, ListVmsResponse, ListVolumesRequest, ListVolumesResponse,
    MigrateVmRequest, Migration, MigrationForecast, Network, PlanMigration, PostcopyMigrationRequest,
    ReadConsoleRequest, ReadConsoleResponse, Reason, ResizeVolume, ResizeVolumeRequest, RestoreVm,
    RestoreVmRequest, SetVmMemory, SetVmMemoryRequest, ShutdownVm, ShutdownVmRequest, Snapshot, StartVm,
    StartVmRequest, StopVm, StopVmRequest, Vm, Volume, WantPostCopy, WatchMigrationRequest,
    WatchMigrationResponse, WriteConsoleRequest, WriteConsoleResponse,
};
use drover_proto::{Code, Fault};
use drover_state::{State, Usage};
use prost::Message;
use tokio::time::{Instant, timeout_at};
use tonic::{Request, Response, Status};

use super::caller::{Caller, Service};
use super::on_leader::Call;
use super::{Api, Shared, console, forecast, reach, snapshots, wait_of};

/// Events in one answer when the request names no number, and at most.
const EVENTS_DEFAULT: usize = 500;
const EVENTS_AT_ONCE_MAX: usize = 5_000;

type Answer<T> = Result<Response<T>, Status>;

impl Api {
    /// A read: from this member's state when a stale one will do, else by the leader, which first makes sure that it is.
    async fn read<Req, Resp>(
        &self,
        path: &'static str,
        request: Request<Req>,
        allow_stale: bool,
        look: fn(&Shared, &Req) -> Result<Resp, Fault>,
    ) -> Answer<Resp>
    where
        Req: Message + Clone + 'static,
        Resp: Message + Default + 'static,
    {
        if allow_stale {
            Caller::of(&request, &self.shared.cluster, Service::Controller)?;
            return Ok(Response::new(look(&self.shared, request.get_ref())?));
        }
        self.call(path, request, Duration::ZERO, move |call, message| async move {
            call.linearize().await?;
            look(&call.api, &message)
        })
        .await
    }

    /// A change: one command, and the part of its response that the caller gets.
    async fn change<Req, Resp>(
        &self,
        path: &'static str,
        request: Request<Req>,
        command: fn(&Call, Req) -> (String, Kind),
        answer: fn(&Call, CommandResponse) -> Option<Resp>,
    ) -> Answer<Resp>
    where
        Req: Message + Clone + 'static,
        Resp: Message + Default + 'static,
    {
        self.call(path, request, Duration::ZERO, move |call, message| async move {
            let (request_id, kind) = command(&call, message);
            let response = call.propose(&request_id, kind).await?;
            answer(&call, response)
                .ok_or_else(|| Fault::new(Code::Internal, "the command's answer lacks its subject"))
        })
        .await
    }

    async fn call<Req, Resp, Local, Fut>(
        &self,
        path: &'static str,
        request: Request<Req>,
        wait: Duration,
        local: Local,
    ) -> Answer<Resp>
    where
        Req: Message + Clone + 'static,
        Resp: Message + Default + 'static,
        Local: Fn(Call, Req) -> Fut,
        Fut: Future<Output = Result<Resp, Fault>>,
    {
        self.shared
            .on_leader(Service::Controller, path, request, wait, local)
            .await
    }
}

#[tonic::async_trait]
impl Controller for Api {
    async fn get_cluster(&self, request: Request<GetClusterRequest>) -> Answer<Cluster> {
        let stale = request.get_ref().allow_stale;
        self.read("/drover.v1.Controller/GetCluster", request, stale, |api, _| {
            Ok(cluster(api))
        })
        .await
    }

    async fn list_hosts(&self, request: Request<ListHostsRequest>) -> Answer<ListHostsResponse> {
        let stale = request.get_ref().allow_stale;
        self.read("/drover.v1.Controller/ListHosts", request, stale, |api, _| {
            let hosts = api.consensus.read(|state| {
                let usages = state.usages();
                let used = |host: &Host| usages.get(name_of(host)).copied().unwrap_or_default();
                state.hosts().map(|host| with_usage(host, used(host))).collect()
            });
            Ok(ListHostsResponse { hosts })
        })
        .await
    }

    async fn get_host(&self, request: Request<GetHostRequest>) -> Answer<Host> {
        let stale = request.get_ref().allow_stale;
        self.read("/drover.v1.Controller/GetHost", request, stale, |api, message| {
            let host = api.consensus.read(|state| {
                let used = state
                    .usages()
                    .get(message.name.as_str())
                    .copied()
                    .unwrap_or_default();
                state.host(&message.name).map(|host| with_usage(host, used))
            });
            host.ok_or_else(|| {
                not_found(
                    Code::HostNotFound,
                    "name",
                    &message.name,
                    "no host of this name is registered",
                )
            })
        })
        .await
    }

    async fn create_vm(&self, mut request: Request<CreateVmRequest>) -> Answer<Vm> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/CreateVm",
            request,
            |_, message| {
                let create = CreateVm {
                    spec: message.spec,
                    start: message.start,
                };
                (message.request_id, Kind::CreateVm(create))
            },
            |_, response| response.vm,
        )
        .await
    }

    async fn list_vms(&self, request: Request<ListVmsRequest>) -> Answer<ListVmsResponse> {
        let stale = request.get_ref().allow_stale;
        self.read("/drover.v1.Controller/ListVms", request, stale, |api, _| {
            Ok(ListVmsResponse {
                vms: api
                    .consensus
                    .read(|state| state.vms().map(drover_state::without_secrets).collect()),
            })
        })
        .await
    }

    async fn get_vm(&self, request: Request<GetVmRequest>) -> Answer<Vm> {
        let stale = request.get_ref().allow_stale;
        self.read("/drover.v1.Controller/GetVm", request, stale, |api, message| {
            let shown = |vm: &Vm| match message.with_user_data {
                true => Vm {
                    seed: None,
                    ..vm.clone()
                },
                false => drover_state::without_secrets(vm),
            };
            let vm = api.consensus.read(|state| state.vm(&message.name).map(shown));
            let vm = vm.map(|vm| api.memory.snapshots.merge_vm(vm));
            vm.ok_or_else(|| not_found(Code::VmNotFound, "name", &message.name, "no VM has this name"))
        })
        .await
    }

    async fn start_vm(&self, mut request: Request<StartVmRequest>) -> Answer<Vm> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/StartVm",
            request,
            |_, message| (message.request_id, Kind::StartVm(StartVm { name: message.name })),
            |_, response| response.vm,
        )
        .await
    }

    async fn stop_vm(&self, mut request: Request<StopVmRequest>) -> Answer<Vm> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/StopVm",
            request,
            |_, message| (message.request_id, Kind::StopVm(StopVm { name: message.name })),
            |_, response| response.vm,
        )
        .await
    }

    async fn delete_vm(&self, mut request: Request<DeleteVmRequest>) -> Answer<Vm> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/DeleteVm",
            request,
            |_, message| {
                (
                    message.request_id,
                    Kind::DeleteVm(DeleteVm { name: message.name }),
                )
            },
            |_, response| response.vm,
        )
        .await
    }

    async fn shutdown_vm(&self, mut request: Request<ShutdownVmRequest>) -> Answer<Vm> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/ShutdownVm",
            request,
            |_, message| {
                let shutdown = ShutdownVm { name: message.name };
                (message.request_id, Kind::ShutdownVm(shutdown))
            },
            |_, response| response.vm,
        )
        .await
    }

    async fn set_vm_memory(&self, mut request: Request<SetVmMemoryRequest>) -> Answer<Vm> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/SetVmMemory",
            request,
            |_, message| {
                let SetVmMemoryRequest {
                    request_id,
                    vm,
                    memory_mib,
                } = message;
                (request_id, Kind::SetVmMemory(SetVmMemory { vm, memory_mib }))
            },
            |_, response| response.vm,
        )
        .await
    }

    async fn attach_disk(&self, mut request: Request<AttachDiskToVmRequest>) -> Answer<Vm> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/AttachDisk",
            request,
            |_, AttachDiskToVmRequest { request_id, vm, disk }| {
                (request_id, Kind::AttachDisk(AttachDisk { vm, disk }))
            },
            |_, response| response.vm,
        )
        .await
    }

    async fn detach_disk(&self, mut request: Request<DetachDiskFromVmRequest>) -> Answer<Vm> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/DetachDisk",
            request,
            |_,
             DetachDiskFromVmRequest {
                 request_id,
                 vm,
                 volume,
             }| { (request_id, Kind::DetachDisk(DetachDisk { vm, volume })) },
            |_, response| response.vm,
        )
        .await
    }

    async fn attach_nic(&self, mut request: Request<AttachNicToVmRequest>) -> Answer<Vm> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/AttachNic",
            request,
            |_, AttachNicToVmRequest { request_id, vm, nic }| {
                (request_id, Kind::AttachNic(AttachNic { vm, nic }))
            },
            |_, response| response.vm,
        )
        .await
    }

    async fn detach_nic(&self, mut request: Request<DetachNicFromVmRequest>) -> Answer<Vm> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/DetachNic",
            request,
            |_, DetachNicFromVmRequest { request_id, vm, nic }| {
                (request_id, Kind::DetachNic(DetachNic { vm, nic }))
            },
            |_, response| response.vm,
        )
        .await
    }

    async fn resize_volume(&self, mut request: Request<ResizeVolumeRequest>) -> Answer<Volume> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/ResizeVolume",
            request,
            |_,
             ResizeVolumeRequest {
                 request_id,
                 name,
                 size_bytes,
             }| { (request_id, Kind::ResizeVolume(ResizeVolume { name, size_bytes })) },
            |_, response| response.volume,
        )
        .await
    }

    async fn create_volume(&self, mut request: Request<CreateVolumeRequest>) -> Answer<Volume> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/CreateVolume",
            request,
            |_, message| {
                let create = CreateVolume {
                    volume: message.volume,
                };
                (message.request_id, Kind::CreateVolume(create))
            },
            |_, response| response.volume,
        )
        .await
    }

    async fn list_volumes(&self, request: Request<ListVolumesRequest>) -> Answer<ListVolumesResponse> {
        let stale = request.get_ref().allow_stale;
        self.read("/drover.v1.Controller/ListVolumes", request, stale, |api, _| {
            let volumes = api.consensus.read(State::volumes_with_users).into_iter();
            let volumes = volumes.map(|volume| api.memory.snapshots.merge_volume(volume));
            Ok(ListVolumesResponse {
                volumes: volumes.collect(),
            })
        })
        .await
    }

    async fn delete_volume(&self, mut request: Request<DeleteVolumeRequest>) -> Answer<Volume> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/DeleteVolume",
            request,
            |_, message| {
                let delete = DeleteVolume {
                    name: message.name,
                    remove_content: message.remove_content,
                };
                (message.request_id, Kind::DeleteVolume(delete))
            },
            |_, response| response.volume,
        )
        .await
    }

    async fn create_snapshot(&self, mut request: Request<CreateSnapshotRequest>) -> Answer<Snapshot> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/CreateSnapshot",
            request,
            |_, CreateSnapshotRequest { request_id, vm, name }| {
                (request_id, Kind::CreateSnapshot(CreateSnapshot { vm, name }))
            },
            |_, response| response.snapshot,
        )
        .await
    }

    async fn list_snapshots(&self, request: Request<ListSnapshotsRequest>) -> Answer<ListSnapshotsResponse> {
        let stale = request.get_ref().allow_stale;
        let path = "/drover.v1.Controller/ListSnapshots";
        self.read(path, request, stale, snapshots::list).await
    }

    async fn get_snapshot(&self, request: Request<GetSnapshotRequest>) -> Answer<Snapshot> {
        let stale = request.get_ref().allow_stale;
        let path = "/drover.v1.Controller/GetSnapshot";
        self.read(path, request, stale, snapshots::get).await
    }

    async fn delete_snapshot(&self, mut request: Request<DeleteSnapshotRequest>) -> Answer<Snapshot> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/DeleteSnapshot",
            request,
            |_, DeleteSnapshotRequest { request_id, vm, name }| {
                (request_id, Kind::DeleteSnapshot(DeleteSnapshot { vm, name }))
            },
            |_, response| response.snapshot,
        )
        .await
    }

    async fn restore_vm(&self, mut request: Request<RestoreVmRequest>) -> Answer<Vm> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/RestoreVm",
            request,
            |_, message| {
                let restore = RestoreVm {
                    vm: message.vm,
                    snapshot: message.snapshot,
                    clone: message.clone,
                    new_addresses: message.new_addresses,
                };
                (message.request_id, Kind::RestoreVm(restore))
            },
            |_, response| response.vm,
        )
        .await
    }

    async fn create_network(&self, mut request: Request<CreateNetworkRequest>) -> Answer<Network> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/CreateNetwork",
            request,
            |_, message| {
                let create = CreateNetwork {
                    network: message.network,
                };
                (message.request_id, Kind::CreateNetwork(create))
            },
            |_, response| response.network,
        )
        .await
    }

    async fn list_networks(&self, request: Request<ListNetworksRequest>) -> Answer<ListNetworksResponse> {
        let stale = request.get_ref().allow_stale;
        self.read("/drover.v1.Controller/ListNetworks", request, stale, |api, _| {
            let networks = api.consensus.read(State::networks_with_users);
            Ok(ListNetworksResponse { networks })
        })
        .await
    }

    async fn delete_network(&self, mut request: Request<DeleteNetworkRequest>) -> Answer<Network> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/DeleteNetwork",
            request,
            |_, message| {
                let delete = DeleteNetwork { name: message.name };
                (message.request_id, Kind::DeleteNetwork(delete))
            },
            |_, response| response.network,
        )
        .await
    }

    async fn read_console(&self, request: Request<ReadConsoleRequest>) -> Answer<ReadConsoleResponse> {
        let wait = wait_of(request.get_ref().wait_ms);
        self.call(
            "/drover.v1.Controller/ReadConsole",
            request,
            wait,
            |call, message| async move {
                call.linearize().await?;
                console::read(&call, message).await
            },
        )
        .await
    }

    async fn write_console(&self, request: Request<WriteConsoleRequest>) -> Answer<WriteConsoleResponse> {
        let path = "/drover.v1.Controller/WriteConsole";
        self.call(path, request, Duration::ZERO, |call, message| async move {
            call.linearize().await?;
            console::write(&call, message).await
        })
        .await
    }

    async fn migrate_vm(&self, mut request: Request<MigrateVmRequest>) -> Answer<Migration> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/MigrateVm",
            request,
            |call, message| {
                let plan = PlanMigration {
                    forecast: forecast::remembered(call, &message),
                    ..forecast::plan_of(call, &message)
                };
                (message.request_id, Kind::PlanMigration(plan))
            },
            |call, response| {
                response
                    .migration
                    .map(|migration| call.api.memory.progress.merge(migration))
            },
        )
        .await
    }

    async fn forecast_migration(&self, request: Request<MigrateVmRequest>) -> Answer<MigrationForecast> {
        self.call(
            "/drover.v1.Controller/ForecastMigration",
            request,
            forecast::WATCHING,
            |call, message| async move {
                call.linearize().await?;
                forecast::forecast(&call, message).await
            },
        )
        .await
    }

    async fn list_migrations(
        &self,
        request: Request<ListMigrationsRequest>,
    ) -> Answer<ListMigrationsResponse> {
        let stale = request.get_ref().allow_stale;
        self.read(
            "/drover.v1.Controller/ListMigrations",
            request,
            stale,
            |api, message| {
                let asked = |migration: &&Migration| message.vm.is_empty() || migration.vm == message.vm;
                let migrations: Vec<Migration> = api
                    .consensus
                    .read(|state| state.migrations().rev().filter(asked).cloned().collect());
                let merged = migrations
                    .into_iter()
                    .map(|migration| api.memory.progress.merge(migration))
                    .collect();
                Ok(ListMigrationsResponse { migrations: merged })
            },
        )
        .await
    }

    async fn get_migration(&self, request: Request<GetMigrationRequest>) -> Answer<Migration> {
        let stale = request.get_ref().allow_stale;
        self.read(
            "/drover.v1.Controller/GetMigration",
            request,
            stale,
            |api, message| known_migration(api, &message.id),
        )
        .await
    }

    async fn watch_migration(
        &self,
        request: Request<WatchMigrationRequest>,
    ) -> Answer<WatchMigrationResponse> {
        let wait = wait_of(request.get_ref().wait_ms);
        let path = "/drover.v1.Controller/WatchMigration";
        self.call(path, request, wait, |call, message| async move {
            call.linearize().await?;
            let mut changed = call.api.consensus.changed();
            let mut news = call.api.memory.progress.news();
            let until = Instant::now() + wait_of(message.wait_ms);
            loop {
                changed.borrow_and_update();
                news.borrow_and_update();
                let migration = known_migration(&call.api, &message.id)?;
                let seen = name_of_sight(&migration);
                let over = drover_state::is_ended(&migration) || Instant::now() >= until;
                if over || seen != message.seen {
                    let migration = Some(migration);
                    return Ok(WatchMigrationResponse { migration, seen });
                }
                // Whatever ends the wait leads to one more look.
                let _ = timeout_at(until, async {
                    tokio::select! {
                        _ = changed.changed() => {}
                        _ = news.changed() => {}
                    }
                })
                .await;
                call.still_leads()?;
            }
        })
        .await
    }

    async fn cancel_migration(&self, mut request: Request<CancelMigrationRequest>) -> Answer<Migration> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        let path = "/drover.v1.Controller/CancelMigration";
        self.call(path, request, Duration::ZERO, |call, message| async move {
            let reached = call
                .api
                .consensus
                .read(|state| state.migration(&message.id).cloned());
            let phase = reached
                .map(|migration| call.api.memory.progress.phase(&migration))
                .unwrap_or_default();
            let reason = Reason {
                code: Code::Cancelled.as_str().to_owned(),
                message: format!("{} cancelled it", call.caller.audit_name()),
            };
            let abort = AbortMigrationRequest {
                host: String::new(),
                migration: message.id,
                reason: Some(reason),
                phase: phase.into(),
            };
            reach("controller.before_abort").await;
            let response = call
                .propose(&message.request_id, Kind::AbortMigration(abort))
                .await
                .map_err(|mut fault| {
                    if fault.field == "migration" {
                        "id".clone_into(&mut fault.field);
                    }
                    fault
                })?;
            response
                .migration
                .ok_or_else(|| Fault::new(Code::Internal, "the abort's answer lacks the migration"))
        })
        .await
    }

    async fn postcopy_migration(&self, mut request: Request<PostcopyMigrationRequest>) -> Answer<Migration> {
        self.shared.ensure_id(&mut request.get_mut().request_id);
        self.change(
            "/drover.v1.Controller/PostcopyMigration",
            request,
            |_, message| {
                (
                    message.request_id,
                    Kind::WantPostCopy(WantPostCopy { id: message.id }),
                )
            },
            |call, response| {
                response
                    .migration
                    .map(|migration| call.api.memory.progress.merge(migration))
            },
        )
        .await
    }

    async fn list_events(&self, request: Request<ListEventsRequest>) -> Answer<ListEventsResponse> {
        let wait = wait_of(request.get_ref().wait_ms);
        self.call(
            "/drover.v1.Controller/ListEvents",
            request,
            wait,
            |call, message| async move {
                call.linearize().await?;
                let mut changed = call.api.consensus.changed();
                let until = Instant::now() + wait_of(message.wait_ms);
                loop {
                    changed.borrow_and_update();
                    let answer = call.api.consensus.read(|state| events(state, &message));
                    if !answer.events.is_empty() || Instant::now() >= until {
                        return Ok(answer);
                    }
                    // An end of the wait or of the sender both lead to one more look, the last.
                    let _ = timeout_at(until, changed.changed()).await;
                    call.still_leads()?;
                }
            },
        )
        .await
    }
}

/// A migration with all that is known of it here.
fn known_migration(api: &Shared, id: &str) -> Result<Migration, Fault> {
    let migration = api.consensus.read(|state| state.migration(id).cloned());
    let migration = migration.ok_or_else(|| {
        not_found(
            Code::MigrationNotFound,
            "id",
            id,
            "no migration has this id, or it ended long ago",
        )
    })?;
    Ok(api.memory.progress.merge(migration))
}

/// A number that two sights of a migration share only when they show the same, on whichever controller: a hash of what is shown.
fn name_of_sight(migration: &Migration) -> u64 {
    let hash = blake3::hash(&migration.encode_to_vec());
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(first).max(1)
}

fn events(state: &State, request: &ListEventsRequest) -> ListEventsResponse {
    let limit = match usize::try_from(request.limit).unwrap_or(EVENTS_AT_ONCE_MAX) {
        0 => EVENTS_DEFAULT,
        limit => limit.min(EVENTS_AT_ONCE_MAX),
    };
    let events = state.events_after(request.after_seq, limit).cloned().collect();
    ListEventsResponse {
        events,
        last_seq: state.last_event(),
    }
}

fn cluster(api: &Shared) -> Cluster {
    let status = api.consensus.status();
    let settings = api.consensus.read(|state| *state.settings());
    Cluster {
        id: api.cluster.clone(),
        leader: status.leader.map(|leader| leader.name).unwrap_or_default(),
        members: status.members,
        settings: Some(settings),
        term: status.term,
        applied: status.applied,
        answered_by: api.consensus.me().name.clone(),
    }
}

fn name_of(host: &Host) -> &str {
    host.spec.as_ref().map_or("", |spec| spec.name.as_str())
}

fn with_usage(host: &Host, used: Usage) -> Host {
    Host {
        used_memory_mib: used.memory_mib,
        used_vcpus: used.vcpus,
        vms: used.vms,
        ..host.clone()
    }
}

fn not_found(code: Code, field: &str, value: &str, what: &str) -> Fault {
    let shown: String = value.chars().take(80).collect();
    Fault::new(code, format!("{field} is {shown:?}; {what}")).field(field)
}
