//! A controller without a cluster: says what a test tells it to say, and remembers what it was asked.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use drover_pki::Credentials;
use drover_proto::v1::fleet_server::{Fleet, FleetServer};
use drover_proto::v1::*;
use drover_proto::{Code, Fault};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::PATIENCE;

/// What the controller answers.
#[derive(Clone, Default)]
pub struct Script {
    /// The desired state, with the revision that a watch shows.
    pub desired: HostDesired,
    /// The revision that heartbeats show; 0: the desired state's.
    pub confirmed_revision: u64,
    /// What may run.
    pub grants: Vec<(String, u64)>,
    /// The leader that heartbeats name.
    pub leader: String,
    /// Whether it answers at all; else it says that there is no leader.
    pub mute: bool,
    /// The log's outcome of any hand-over; none: there is no leader.
    pub commit: Option<bool>,
    /// Whether a restored run may begin; none: there is no leader.
    pub begin: Option<bool>,
    /// Heartbeats are answered with "no such host" until it registers.
    pub unknown_host: bool,
    /// Heartbeats answered since the script was changed.
    heartbeats: u64,
}

/// One call that a test may be interested in.
#[derive(Clone, Debug)]
pub enum Call {
    Register(HostSpec),
    Vm(ReportVmRequest),
    Migration(ReportMigrationRequest),
    Commit(CommitHandoverRequest),
    Abort(AbortMigrationRequest),
    Snapshot(ReportSnapshotRequest),
    Begin(BeginRestoreRequest),
    Volume(ReportVolumeRequest),
}

/// Shared by the server and the test.
#[derive(Clone)]
pub struct FakeFleet {
    pub script: watch::Sender<Script>,
    calls: Arc<Mutex<Vec<Call>>>,
    called: watch::Sender<usize>,
}

pub const LEASE_MS: u64 = 60_000;
pub const MAX_DOWNTIME_MS: u32 = 321;

impl FakeFleet {
    pub async fn start(credentials: &Credentials) -> (Self, SocketAddr) {
        // 0 is what an agent has seen that has seen nothing.
        let desired = HostDesired {
            revision: 1,
            ..HostDesired::default()
        };
        let script = watch::Sender::new(Script {
            desired,
            ..Script::default()
        });
        let fleet = Self {
            script,
            calls: Arc::default(),
            called: watch::Sender::default(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let server = Server::builder()
            .tls_config(credentials.tonic_server())
            .unwrap()
            .add_service(FleetServer::new(fleet.clone()))
            .serve_with_incoming(TcpIncoming::from(listener));
        tokio::spawn(server);
        (fleet, addr)
    }

    /// Changes the script; a desired state that differs gets the next revision.
    pub fn say(&self, change: impl FnOnce(&mut Script)) {
        self.script.send_modify(|script| {
            let before = script.desired.clone();
            change(script);
            if script.desired != before {
                script.desired.revision = before.revision + 1;
            }
            script.heartbeats = 0;
        });
    }

    /// Waits for a call that `wanted` makes something of.
    pub async fn until<T>(&self, what: &str, wanted: impl Fn(&Call) -> Option<T>) -> T {
        let mut called = self.called.subscribe();
        let found = async {
            loop {
                if let Some(found) = self.calls.lock().unwrap().iter().find_map(&wanted) {
                    return found;
                }
                called.changed().await.unwrap();
            }
        };
        match tokio::time::timeout(PATIENCE, found).await {
            Ok(found) => found,
            Err(_) => panic!("no call: {what}; got {:#?}", self.calls()),
        }
    }

    pub async fn until_calls(&self, what: &str, enough: impl Fn(&[Call]) -> bool) {
        let mut called = self.called.subscribe();
        let found = async {
            while !enough(&self.calls()) {
                called.changed().await.unwrap();
            }
        };
        if tokio::time::timeout(PATIENCE, found).await.is_err() {
            panic!("not called: {what}; got {:#?}", self.calls());
        }
    }

    pub async fn until_vm(&self, state: VmState, epoch: u64) -> ReportVmRequest {
        self.until(&format!("{state:?} of epoch {epoch}"), |call| match call {
            Call::Vm(report) if report.state() == state && report.epoch == epoch => Some(report.clone()),
            _ => None,
        })
        .await
    }

    /// Waits for heartbeats that were answered after the last change of the script.
    pub async fn until_heartbeats(&self, count: u64) {
        let mut script = self.script.subscribe();
        let beaten = script.wait_for(|script| script.heartbeats >= count);
        tokio::time::timeout(PATIENCE, beaten)
            .await
            .expect("no heartbeats")
            .unwrap();
    }

    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    pub fn forget_calls(&self) {
        self.calls.lock().unwrap().clear();
    }

    fn note(&self, call: Call) -> Result<(), Status> {
        if self.script.borrow().mute {
            return Err(no_leader());
        }
        self.calls.lock().unwrap().push(call);
        self.called.send_modify(|count| *count += 1);
        Ok(())
    }
}

fn no_leader() -> Status {
    Fault::new(Code::NoLeader, "no leader is known").into()
}

#[tonic::async_trait]
impl Fleet for FakeFleet {
    async fn register_host(
        &self,
        request: Request<RegisterHostRequest>,
    ) -> Result<Response<RegisterHostResponse>, Status> {
        self.script.send_modify(|script| script.unknown_host = false);
        self.note(Call::Register(request.into_inner().spec.unwrap()))?;
        let settings = Settings {
            lease_ms: LEASE_MS,
            heartbeat_ms: 20,
            max_downtime_ms: MAX_DOWNTIME_MS,
            ..Settings::default()
        };
        Ok(Response::new(RegisterHostResponse {
            settings: Some(settings),
            cluster_id: "test".into(),
        }))
    }

    async fn heartbeat(&self, _: Request<HeartbeatRequest>) -> Result<Response<HeartbeatResponse>, Status> {
        let script = self.script.borrow().clone();
        if script.mute {
            return Err(no_leader());
        }
        if script.unknown_host {
            return Err(Fault::new(Code::HostNotFound, "no such host").into());
        }
        self.script.send_modify(|script| script.heartbeats += 1);
        let grants = script
            .grants
            .into_iter()
            .map(|(vm, epoch)| VmRef { vm, epoch })
            .collect();
        let revision = if script.confirmed_revision > 0 {
            script.confirmed_revision
        } else {
            script.desired.revision
        };
        Ok(Response::new(HeartbeatResponse {
            lease_ms: LEASE_MS,
            grants,
            revision,
            leader: script.leader,
        }))
    }

    async fn watch_desired(
        &self,
        request: Request<WatchDesiredRequest>,
    ) -> Result<Response<HostDesired>, Status> {
        let request = request.into_inner();
        let mut script = self.script.subscribe();
        let changed =
            script.wait_for(|script| script.mute || script.desired.revision != request.seen_revision);
        let _ = tokio::time::timeout(Duration::from_millis(request.wait_ms.into()), changed).await;
        let script = self.script.borrow().clone();
        if script.mute {
            Err(no_leader())
        } else {
            Ok(Response::new(script.desired))
        }
    }

    async fn report_vm(
        &self,
        request: Request<ReportVmRequest>,
    ) -> Result<Response<ReportVmResponse>, Status> {
        self.note(Call::Vm(request.into_inner()))?;
        Ok(Response::new(ReportVmResponse { current: true }))
    }

    async fn report_migration(
        &self,
        request: Request<ReportMigrationRequest>,
    ) -> Result<Response<ReportMigrationResponse>, Status> {
        self.note(Call::Migration(request.into_inner()))?;
        Ok(Response::new(ReportMigrationResponse::default()))
    }

    async fn commit_handover(
        &self,
        request: Request<CommitHandoverRequest>,
    ) -> Result<Response<CommitHandoverResponse>, Status> {
        self.note(Call::Commit(request.into_inner()))?;
        let Some(committed) = self.script.borrow().commit else {
            return Err(no_leader());
        };
        let reason = (!committed).then(|| Fault::new(Code::Cancelled, "cancelled").into());
        let lease_ms = if committed { LEASE_MS } else { 0 };
        Ok(Response::new(CommitHandoverResponse {
            committed,
            reason,
            lease_ms,
        }))
    }

    async fn abort_migration(
        &self,
        request: Request<AbortMigrationRequest>,
    ) -> Result<Response<AbortMigrationResponse>, Status> {
        self.note(Call::Abort(request.into_inner()))?;
        Ok(Response::new(AbortMigrationResponse { aborted: true }))
    }

    async fn report_snapshot(
        &self,
        request: Request<ReportSnapshotRequest>,
    ) -> Result<Response<ReportSnapshotResponse>, Status> {
        self.note(Call::Snapshot(request.into_inner()))?;
        Ok(Response::new(ReportSnapshotResponse { current: true }))
    }

    async fn begin_restore(
        &self,
        request: Request<BeginRestoreRequest>,
    ) -> Result<Response<BeginRestoreResponse>, Status> {
        self.note(Call::Begin(request.into_inner()))?;
        let begun = self.script.borrow().begin.ok_or_else(no_leader)?;
        Ok(Response::new(BeginRestoreResponse { begun }))
    }

    async fn report_volume(
        &self,
        request: Request<ReportVolumeRequest>,
    ) -> Result<Response<ReportVolumeResponse>, Status> {
        self.note(Call::Volume(request.into_inner()))?;
        Ok(Response::new(ReportVolumeResponse { current: true }))
    }
}
