//! The service `Fleet`: what agents ask and report.
//!
//! Reports are level-triggered and may come twice, late, or to a leader that is none any more: each names an epoch, and
//! `apply` decides. One that would change nothing is answered without an entry.

use std::time::{Duration, Instant};

use drover_proto::v1::command::Kind;
use drover_proto::v1::fleet_server::Fleet;
use drover_proto::v1::{
    AbortMigrationRequest, AbortMigrationResponse, AdvanceMigration, BeginRestoreRequest,
    BeginRestoreResponse, CommitHandoverRequest, CommitHandoverResponse, FinishMigration, HeartbeatRequest,
    HeartbeatResponse, HostDesired, HostState, HostUp, Migration, MigrationPhase, RegisterHostRequest,
    RegisterHostResponse, ReportMigrationRequest, ReportMigrationResponse, ReportSnapshotRequest,
    ReportSnapshotResponse, ReportVmRequest, ReportVmResponse, ReportVolumeRequest, ReportVolumeResponse,
    VmRef, WatchDesiredRequest,
};
use drover_proto::{Code, Fault};
use prost::Message;
use tokio::time::timeout_at;
use tonic::{Request, Response, Status};

use super::caller::Service;
use super::on_leader::Call;
use super::progress::Side;
use super::{Api, reach, snapshots, wait_of};

type Answer<T> = Result<Response<T>, Status>;

impl Api {
    async fn agent_call<Req, Resp, Local, Fut>(
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
            .on_leader(Service::Fleet, path, request, wait, local)
            .await
    }
}

#[tonic::async_trait]
impl Fleet for Api {
    async fn register_host(&self, request: Request<RegisterHostRequest>) -> Answer<RegisterHostResponse> {
        self.agent_call(
            "/drover.v1.Fleet/RegisterHost",
            request,
            Duration::ZERO,
            register_host,
        )
        .await
    }

    async fn heartbeat(&self, request: Request<HeartbeatRequest>) -> Answer<HeartbeatResponse> {
        self.agent_call("/drover.v1.Fleet/Heartbeat", request, Duration::ZERO, heartbeat)
            .await
    }

    async fn watch_desired(&self, request: Request<WatchDesiredRequest>) -> Answer<HostDesired> {
        let wait = wait_of(request.get_ref().wait_ms);
        self.agent_call("/drover.v1.Fleet/WatchDesired", request, wait, watch_desired)
            .await
    }

    async fn report_vm(&self, request: Request<ReportVmRequest>) -> Answer<ReportVmResponse> {
        self.agent_call("/drover.v1.Fleet/ReportVm", request, Duration::ZERO, report_vm)
            .await
    }

    async fn report_migration(
        &self,
        request: Request<ReportMigrationRequest>,
    ) -> Answer<ReportMigrationResponse> {
        self.agent_call(
            "/drover.v1.Fleet/ReportMigration",
            request,
            Duration::ZERO,
            report_migration,
        )
        .await
    }

    async fn commit_handover(
        &self,
        request: Request<CommitHandoverRequest>,
    ) -> Answer<CommitHandoverResponse> {
        self.agent_call(
            "/drover.v1.Fleet/CommitHandover",
            request,
            Duration::ZERO,
            commit_handover,
        )
        .await
    }

    async fn abort_migration(
        &self,
        request: Request<AbortMigrationRequest>,
    ) -> Answer<AbortMigrationResponse> {
        self.agent_call(
            "/drover.v1.Fleet/AbortMigration",
            request,
            Duration::ZERO,
            abort_migration,
        )
        .await
    }

    async fn report_snapshot(
        &self,
        request: Request<ReportSnapshotRequest>,
    ) -> Answer<ReportSnapshotResponse> {
        let path = "/drover.v1.Fleet/ReportSnapshot";
        self.agent_call(path, request, Duration::ZERO, snapshots::report)
            .await
    }

    async fn begin_restore(&self, request: Request<BeginRestoreRequest>) -> Answer<BeginRestoreResponse> {
        let path = "/drover.v1.Fleet/BeginRestore";
        self.agent_call(path, request, Duration::ZERO, snapshots::begin)
            .await
    }

    async fn report_volume(&self, request: Request<ReportVolumeRequest>) -> Answer<ReportVolumeResponse> {
        let path = "/drover.v1.Fleet/ReportVolume";
        self.agent_call(path, request, Duration::ZERO, snapshots::report_volume)
            .await
    }
}

async fn register_host(call: Call, request: RegisterHostRequest) -> Result<RegisterHostResponse, Fault> {
    let Some(spec) = request.spec else {
        let message = "spec is missing; it says what the host is";
        return Err(Fault::new(Code::InvalidArgument, message).field("spec"));
    };
    call.caller.speaks_for(&spec.name)?;
    call.propose("", Kind::RegisterHost(spec)).await?;
    let settings = call.api.consensus.read(|state| *state.settings());
    Ok(RegisterHostResponse {
        settings: Some(settings),
        cluster_id: call.api.cluster.clone(),
    })
}

/// Renews a host's lease. The order of the steps is what `leases` describes.
async fn heartbeat(call: Call, request: HeartbeatRequest) -> Result<HeartbeatResponse, Fault> {
    let host = request.host.as_str();
    call.caller.speaks_for(host)?;
    known_host(&call, host)?;
    call.api.memory.leases.note(call.term, host, Instant::now());
    call.linearize().await?;
    may_answer(&call, host)?;
    let (down, boot_id) = call.api.consensus.read(|state| {
        let host = state.host(host);
        let down = host.is_some_and(|host| host.state() == HostState::Down);
        let boot_id = host
            .and_then(|host| host.spec.as_ref())
            .map(|spec| spec.boot_id.clone());
        (down, boot_id.unwrap_or_default())
    });
    if down || (!request.boot_id.is_empty() && boot_id != request.boot_id) {
        let up = HostUp {
            host: host.to_owned(),
            boot_id: request.boot_id.clone(),
        };
        call.propose("", Kind::HostUp(up)).await?;
        may_answer(&call, host)?;
    }
    call.still_leads()?;
    Ok(call.api.consensus.read(|state| HeartbeatResponse {
        lease_ms: state.settings().lease_ms,
        grants: drover_state::grants(state, host),
        revision: drover_state::desired(state, host).revision,
        leader: call.api.consensus.me().addr.clone(),
    }))
}

fn known_host(call: &Call, host: &str) -> Result<(), Fault> {
    if call.api.consensus.read(|state| state.host(host).is_some()) {
        return Ok(());
    }
    let shown: String = host.chars().take(80).collect();
    let message = format!("host is {shown:?}; no host of this name is registered, register it first");
    Err(Fault::new(Code::HostNotFound, message).field("host"))
}

/// Nothing is granted to a host while it is being declared down.
fn may_answer(call: &Call, host: &str) -> Result<(), Fault> {
    if call.api.memory.leases.may_answer(call.term, host) {
        return Ok(());
    }
    Err(Fault::new(
        Code::NoLeader,
        format!("{host} is being declared down; its next heartbeat raises it again"),
    ))
}

async fn watch_desired(call: Call, request: WatchDesiredRequest) -> Result<HostDesired, Fault> {
    call.caller.speaks_for(&request.host)?;
    call.linearize().await?;
    known_host(&call, &request.host)?;
    let mut changed = call.api.consensus.changed();
    let until = tokio::time::Instant::now() + wait_of(request.wait_ms);
    loop {
        changed.borrow_and_update();
        let desired = call
            .api
            .consensus
            .read(|state| drover_state::desired(state, &request.host));
        if desired.revision != request.seen_revision || tokio::time::Instant::now() >= until {
            return Ok(desired);
        }
        // An end of the wait or of the sender both lead to one more look, the last.
        let _ = timeout_at(until, changed.changed()).await;
        call.still_leads()?;
    }
}

async fn report_vm(call: Call, request: ReportVmRequest) -> Result<ReportVmResponse, Fault> {
    call.caller.speaks_for(&request.host)?;
    let known = call.api.consensus.read(|state| {
        let vm = state.vm(&request.vm)?;
        let epoch = drover_state::epoch_of(vm);
        if epoch > request.epoch {
            return Some(false); // epochs only rise: whatever came since, it is stale
        }
        let same = epoch == request.epoch
            && drover_state::host_of(vm) == request.host
            && vm.state() == request.state()
            && drover_state::occupies(vm)
            && vm.seen_epoch == epoch
            && (request.vmm.is_none() || vm.vmm == request.vmm)
            && (request.devices.is_none() || vm.devices == request.devices);
        same.then_some(true)
    });
    if let Some(current) = known {
        return Ok(ReportVmResponse { current });
    }
    let response = call.propose("", Kind::ReportVm(request)).await?;
    Ok(ReportVmResponse {
        current: response.current,
    })
}

async fn report_migration(
    call: Call,
    request: ReportMigrationRequest,
) -> Result<ReportMigrationResponse, Fault> {
    call.caller.speaks_for(&request.host)?;
    let migration = migration(&call, &request.migration)?;
    let side = side_of(&migration, &request.host, request.epoch)?;
    if let Some(progress) = &request.progress {
        call.api
            .memory
            .progress
            .report(&migration, side, progress, Instant::now());
    }
    let mut phase = migration.phase();
    if side == Side::Target && phase == MigrationPhase::Preparing && !request.target_addr.is_empty() {
        let advance = AdvanceMigration {
            id: request.migration.clone(),
            phase: MigrationPhase::PreCopy.into(),
            target_addr: request.target_addr,
        };
        reach("controller.before_precopy").await;
        phase = phase_after(&call, &request.migration, Kind::AdvanceMigration(advance)).await?;
    }
    if side == Side::Target && request.receipt.is_some() && drover_state::is_committed(&migration) {
        let known = migration.phase() == MigrationPhase::Done && migration.receipt.is_some();
        if !known {
            let finish = FinishMigration {
                id: request.migration.clone(),
                receipt: request.receipt,
            };
            reach("controller.before_finish").await;
            phase = phase_after(&call, &request.migration, Kind::FinishMigration(finish)).await?;
        }
    }
    Ok(ReportMigrationResponse { phase: phase.into() })
}

/// Proposes a step of the migration. When it ended meanwhile, the answer is how.
async fn phase_after(call: &Call, id: &str, kind: Kind) -> Result<MigrationPhase, Fault> {
    match call.propose("", kind).await {
        Ok(_) => {}
        Err(fault) if fault.code == Code::MigrationEnded => {}
        Err(fault) => return Err(fault),
    }
    migration(call, id).map(|migration| migration.phase())
}

/// The target has verified everything: whichever of this and an abort is first in the log wins.
async fn commit_handover(
    call: Call,
    request: CommitHandoverRequest,
) -> Result<CommitHandoverResponse, Fault> {
    call.caller.speaks_for(&request.host)?;
    // The answer carries a lease, so it is a renewal and counts as one.
    call.api
        .memory
        .leases
        .note(call.term, &request.host, Instant::now());
    reach("controller.before_commit_propose").await;
    let wanted = VmRef {
        vm: request.vm.clone(),
        epoch: request.epoch,
    };
    let host = request.host.clone();
    let response = call.propose("", Kind::CommitHandover(request)).await?;
    reach("controller.after_commit").await;
    if !response.current {
        let reason = response.migration.and_then(|migration| migration.reason);
        return Ok(CommitHandoverResponse {
            committed: false,
            reason,
            lease_ms: 0,
        });
    }
    call.still_leads()?;
    may_answer(&call, &host)?;
    // Asked again much later, the epoch may be over: committed, and no lease.
    let lease_ms = call.api.consensus.read(|state| {
        let granted = drover_state::grants(state, &host).contains(&wanted);
        if granted { state.settings().lease_ms } else { 0 }
    });
    Ok(CommitHandoverResponse {
        committed: true,
        reason: None,
        lease_ms,
    })
}

async fn abort_migration(
    call: Call,
    mut request: AbortMigrationRequest,
) -> Result<AbortMigrationResponse, Fault> {
    call.caller.speaks_for(&request.host)?;
    let id = request.migration.clone();
    let known = migration(&call, &id)?;
    side_of(&known, &request.host, 0)?;
    let furthest = request.phase().max(call.api.memory.progress.phase(&known));
    request.set_phase(furthest);
    reach("controller.before_abort").await;
    let phase = phase_after(&call, &id, Kind::AbortMigration(request)).await?;
    Ok(AbortMigrationResponse {
        aborted: phase == MigrationPhase::Aborted,
    })
}

fn migration(call: &Call, id: &str) -> Result<Migration, Fault> {
    call.api
        .consensus
        .read(|state| state.migration(id).cloned())
        .ok_or_else(|| {
            let shown: String = id.chars().take(80).collect();
            let message = format!("migration is {shown:?}; none has this id, or it ended long ago");
            Fault::new(Code::MigrationNotFound, message).field("migration")
        })
}

/// Which side reports: by its host or, where both are on one, by the epoch that its VMM was started for.
fn side_of(migration: &Migration, host: &str, epoch: u64) -> Result<Side, Fault> {
    let is_target = migration.is_upgrade() && epoch == migration.epoch;
    if host == migration.from && !is_target {
        return Ok(Side::Source);
    }
    if host == migration.to {
        return Ok(Side::Target);
    }
    let message = format!(
        "host is {host:?}; {} goes from {} to {}",
        migration.id, migration.from, migration.to
    );
    Err(Fault::new(Code::InvalidArgument, message).field("host"))
}
