//! What clients and agents get: any controller takes any call, roles are kept apart, a VM is created, run and handed over,
//! and a silent host is declared down. The agents here are this test; everything else is real.
#![allow(clippy::unwrap_used, reason = "in a test, unwrap is the check")]

mod support;

use drover_pki::{ClusterCa, Credentials, Role};
use drover_proto::v1::agent_server::{Agent, AgentServer};
use drover_proto::v1::controller_client::ControllerClient;
use drover_proto::v1::fleet_client::FleetClient;
use drover_proto::v1::{self, HostState, MigrationPhase, VmRole, VmState};
use drover_proto::{Code, Fault};
use support::callers::{
    WAIT_MS, agent, beat, channel, create, credentials, desired, fault, granted, host_spec, register, report,
    user,
};
use support::{CLUSTER, Cluster, soon, usual};
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_created_run_and_handed_over_through_any_controller() {
    let cluster = Cluster::start(3, &usual()).await;
    let leader = cluster.leader().await;
    let (near, far) = ((leader + 1) % 3, (leader + 2) % 3);
    let mut client = user(&cluster, near);
    let (mut host1, mut host2) = (agent(&cluster, far, "host1"), agent(&cluster, near, "host2"));
    register(&mut host1, "host1", "127.0.0.1:1").await;
    register(&mut host2, "host2", "127.0.0.1:1").await;

    let vm = client.create_vm(create("vm1")).await.unwrap().into_inner();
    assert_eq!((vm.state(), vm.wanted_running), (VmState::Pending, true));
    let wanted = desired(&mut host1, "host1", |desired| !desired.vms.is_empty()).await;
    assert_eq!((wanted.vms[0].role(), wanted.vms[0].epoch), (VmRole::Run, 1));
    let answer = beat(&mut host1, "host1").await;
    assert_eq!((granted(&answer), answer.lease_ms), (vec![("vm1", 1)], 4_000));
    assert_eq!(answer.revision, wanted.revision);
    assert!(report(&mut host1, "host1", "vm1", 1, VmState::Running).await);
    let read = v1::GetVmRequest {
        name: "vm1".into(),
        allow_stale: false,
        with_user_data: false,
    };
    assert_eq!(
        user(&cluster, far)
            .get_vm(read)
            .await
            .unwrap()
            .into_inner()
            .state(),
        VmState::Running
    );

    let request = v1::MigrateVmRequest {
        vm: "vm1".into(),
        to: "host2".into(),
        ..Default::default()
    };
    let migration = client.migrate_vm(request.clone()).await.unwrap().into_inner();
    assert_eq!(
        (migration.id.as_str(), migration.requested_by.as_str()),
        ("m1", "user/admin")
    );
    assert_eq!(
        fault(client.migrate_vm(request).await).code,
        Code::MigrationActive
    );
    let incoming = desired(&mut host2, "host2", |desired| !desired.vms.is_empty()).await;
    assert_eq!(
        (incoming.vms[0].role(), incoming.vms[0].epoch),
        (VmRole::Incoming, 2)
    );
    assert!(
        granted(&beat(&mut host2, "host2").await).is_empty(),
        "incoming is no right to run"
    );

    let mut listening = v1::ReportMigrationRequest {
        host: "host2".into(),
        migration: "m1".into(),
        ..Default::default()
    };
    listening.target_addr = "127.0.0.1:9000".into();
    let phase = host2
        .report_migration(listening)
        .await
        .unwrap()
        .into_inner()
        .phase();
    assert_eq!(phase, MigrationPhase::PreCopy);
    let has_addr = |desired: &v1::HostDesired| {
        desired.vms.iter().any(|vm| {
            vm.migration
                .as_ref()
                .is_some_and(|migration| !migration.target_addr.is_empty())
        })
    };
    desired(&mut host1, "host1", has_addr).await;

    let mut paused = v1::ReportMigrationRequest {
        host: "host1".into(),
        migration: "m1".into(),
        ..Default::default()
    };
    let mut progress = v1::Progress {
        round: 3,
        bytes_sent: 77,
        ..Default::default()
    };
    progress.set_phase(MigrationPhase::Switchover);
    paused.progress = Some(progress);
    host1.report_migration(paused).await.unwrap();
    let get = v1::GetMigrationRequest {
        id: "m1".into(),
        allow_stale: false,
    };
    let shown = client.get_migration(get.clone()).await.unwrap().into_inner();
    assert_eq!(
        (shown.phase(), shown.progress.unwrap().bytes_sent),
        (MigrationPhase::Switchover, 77)
    );

    let commit = v1::CommitHandoverRequest {
        host: "host2".into(),
        migration: "m1".into(),
        vm: "vm1".into(),
        epoch: 2,
        post_copy: false,
        vmm: None,
    };
    let stale = v1::CommitHandoverRequest {
        epoch: 1,
        ..commit.clone()
    };
    assert_eq!(fault(host2.commit_handover(stale).await).code, Code::StaleEpoch);
    for _ in 0..2 {
        let outcome = host2.commit_handover(commit.clone()).await.unwrap().into_inner();
        assert_eq!((outcome.committed, outcome.lease_ms), (true, 4_000));
    }
    assert!(granted(&beat(&mut host1, "host1").await).is_empty());
    assert_eq!(granted(&beat(&mut host2, "host2").await), [("vm1", 2)]);
    assert!(
        desired(&mut host1, "host1", |_| true).await.vms.is_empty(),
        "the source learns the outcome"
    );
    let late = v1::AbortMigrationRequest {
        host: "host1".into(),
        migration: "m1".into(),
        ..Default::default()
    };
    assert!(!host1.abort_migration(late).await.unwrap().into_inner().aborted);

    let receipt = v1::Receipt {
        total_ms: 9,
        ..Default::default()
    };
    let done = v1::ReportMigrationRequest {
        host: "host2".into(),
        migration: "m1".into(),
        receipt: Some(receipt.clone()),
        ..Default::default()
    };
    assert_eq!(
        host2.report_migration(done).await.unwrap().into_inner().phase(),
        MigrationPhase::Done
    );
    assert_eq!(
        client.get_migration(get).await.unwrap().into_inner().receipt,
        Some(receipt)
    );

    let stop = v1::StopVmRequest {
        request_id: "stop-1".into(),
        name: "vm1".into(),
    };
    assert_eq!(
        client.stop_vm(stop).await.unwrap().into_inner().state(),
        VmState::Stopping
    );
    let stopping = desired(&mut host2, "host2", |desired| !desired.stopping.is_empty()).await;
    assert_eq!(
        (stopping.stopping[0].vm.as_str(), stopping.stopping[0].epoch),
        ("vm1", 2)
    );
    assert!(report(&mut host2, "host2", "vm1", 2, VmState::Stopped).await);
    let delete = v1::DeleteVmRequest {
        request_id: "delete-1".into(),
        name: "vm1".into(),
    };
    client.delete_vm(delete).await.unwrap();
    let gone = client
        .get_vm(v1::GetVmRequest {
            name: "vm1".into(),
            allow_stale: false,
            with_user_data: false,
        })
        .await;
    let gone = fault(gone);
    assert_eq!((gone.code, gone.field.as_str()), (Code::VmNotFound, "name"));
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_are_kept_apart_and_a_host_speaks_for_itself() {
    let cluster = Cluster::start(1, &usual()).await;
    cluster.leader().await;
    let host1 = credentials(&cluster, Role::Host, "host1");
    let mut as_user = ControllerClient::new(channel(&cluster, 0, &host1));
    assert_eq!(
        fault(as_user.list_vms(v1::ListVmsRequest { allow_stale: true }).await).code,
        Code::Denied
    );
    let mut as_host = FleetClient::new(channel(&cluster, 0, &credentials(&cluster, Role::User, "admin")));
    let beat = v1::HeartbeatRequest {
        host: "admin".into(),
        ..Default::default()
    };
    assert_eq!(fault(as_host.heartbeat(beat).await).code, Code::Denied);

    let mut host1 = agent(&cluster, 0, "host1");
    let other = v1::RegisterHostRequest {
        spec: Some(host_spec("host2", "127.0.0.1:1")),
    };
    let denied = fault(host1.register_host(other).await);
    assert_eq!((denied.code, denied.field.as_str()), (Code::Denied, "host"));
    let mut claimed = Request::new(v1::HeartbeatRequest {
        host: "host2".into(),
        ..Default::default()
    });
    claimed.metadata_mut().insert(
        "drover-caller",
        format!("drover://{CLUSTER}/host/host2").parse().unwrap(),
    );
    assert_eq!(
        fault(host1.heartbeat(claimed).await).code,
        Code::Denied,
        "only a controller names a caller"
    );
    let unknown = v1::HeartbeatRequest {
        host: "host1".into(),
        ..Default::default()
    };
    assert_eq!(fault(host1.heartbeat(unknown).await).code, Code::HostNotFound);

    let folder = tempfile::tempdir().unwrap();
    let foreign = ClusterCa::create(CLUSTER)
        .unwrap()
        .issue_to(folder.path(), Role::User, "admin")
        .unwrap();
    let foreign = Credentials::load(&foreign, CLUSTER).unwrap();
    let mut stranger = ControllerClient::new(channel(&cluster, 0, &foreign));
    assert!(
        stranger.list_vms(v1::ListVmsRequest::default()).await.is_err(),
        "a CA of the same name is another CA"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_get_a_code_and_a_field_and_change_nothing() {
    let cluster = Cluster::start(3, &usual()).await;
    let leader = cluster.leader().await;
    let mut client = user(&cluster, (leader + 1) % 3);
    register(&mut agent(&cluster, leader, "host1"), "host1", "127.0.0.1:1").await;
    let mut large = create("vm1");
    large.request_id.clear();
    large.spec.as_mut().unwrap().memory_mib = 4_096;
    assert_eq!(fault(client.create_vm(large).await).code, Code::NoHostFits);
    let mut wrong = create("vm1");
    wrong.request_id.clear();
    wrong.spec.as_mut().unwrap().kernel = "absent".into();
    let refused = fault(client.create_vm(wrong).await);
    assert_eq!(
        (refused.code, refused.field.as_str()),
        (Code::ImageNotFound, "spec.kernel")
    );
    let cancel = v1::CancelMigrationRequest {
        request_id: String::new(),
        id: "m7".into(),
    };
    let refused = fault(client.cancel_migration(cancel).await);
    assert_eq!(
        (refused.code, refused.field.as_str()),
        (Code::MigrationNotFound, "id")
    );
    let console = v1::ReadConsoleRequest {
        vm: "vm9".into(),
        ..Default::default()
    };
    assert_eq!(fault(client.read_console(console).await).code, Code::VmNotFound);
    let all = client
        .list_vms(v1::ListVmsRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert!(all.vms.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_outlives_the_leader_and_its_id_gets_the_first_answer() {
    let mut cluster = Cluster::start(3, &usual()).await;
    let leader = cluster.leader().await;
    let mut client = user(&cluster, (leader + 1) % 3);
    register(&mut agent(&cluster, leader, "host1"), "host1", "127.0.0.1:1").await;
    let first = client.create_vm(create("vm1")).await.unwrap().into_inner();
    cluster.stop(leader).await;
    let again = client.create_vm(create("vm1")).await.unwrap().into_inner();
    assert_eq!(again, first, "answered by the next leader from the log");
    let seen = client
        .get_cluster(v1::GetClusterRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!((seen.id.as_str(), seen.members.len()), (CLUSTER, 3));
    assert!(
        seen.leader != support::name(leader) && seen.answered_by == seen.leader,
        "{seen:?}"
    );
    let mut stale = user(&cluster, (leader + 2) % 3);
    let seen = stale
        .get_cluster(v1::GetClusterRequest { allow_stale: true })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(seen.answered_by, support::name((leader + 2) % 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_host_is_declared_down_and_its_next_heartbeat_raises_it() {
    let cluster = Cluster::start(1, &usual()).await;
    cluster.leader().await;
    let mut client = user(&cluster, 0);
    let mut host1 = agent(&cluster, 0, "host1");
    register(&mut host1, "host1", "127.0.0.1:1").await;
    beat(&mut host1, "host1").await;
    soon("host1 is declared down", async {
        let mut after_seq = 0;
        loop {
            let request = v1::ListEventsRequest {
                after_seq,
                wait_ms: WAIT_MS,
                limit: 0,
            };
            let answer = client.list_events(request).await.unwrap().into_inner();
            if answer
                .events
                .iter()
                .any(|event| event.kind == "host.down" && event.subject == "host/host1")
            {
                return;
            }
            after_seq = answer.last_seq;
        }
    })
    .await;
    let get = v1::GetHostRequest {
        name: "host1".into(),
        allow_stale: false,
    };
    assert_eq!(
        client.get_host(get.clone()).await.unwrap().into_inner().state(),
        HostState::Down
    );
    beat(&mut host1, "host1").await;
    assert_eq!(
        client.get_host(get).await.unwrap().into_inner().state(),
        HostState::Up
    );
}

/// An agent that knows one console.
struct Console;

#[tonic::async_trait]
impl Agent for Console {
    async fn read_console(
        &self,
        request: Request<v1::ReadConsoleRequest>,
    ) -> Result<Response<v1::ReadConsoleResponse>, Status> {
        let request = request.into_inner();
        let data = format!("{} from {}", request.vm, request.offset).into_bytes();
        Ok(Response::new(v1::ReadConsoleResponse {
            data,
            epoch: request.epoch,
            ..Default::default()
        }))
    }

    async fn write_console(
        &self,
        request: Request<v1::WriteConsoleRequest>,
    ) -> Result<Response<v1::WriteConsoleResponse>, Status> {
        let accepted = u32::try_from(request.into_inner().data.len()).unwrap();
        Ok(Response::new(v1::WriteConsoleResponse { accepted }))
    }

    async fn forecast(
        &self,
        request: Request<v1::ForecastRequest>,
    ) -> Result<Response<v1::Forecast>, Status> {
        let request = request.into_inner();
        if request.epoch != 1 || request.vm.is_empty() {
            return Err(Fault::new(Code::StaleEpoch, "another epoch").into());
        }
        Ok(Response::new(v1::Forecast {
            bandwidth_bytes_per_s: request.bandwidth_bytes_per_s,
            max_downtime_ms: request.options.unwrap_or_default().max_downtime_ms,
            converges: true,
            total_ms: 900,
            ..Default::default()
        }))
    }
}

/// Serves [`Console`] with the certificate of `host`; the address.
async fn serve_console(cluster: &Cluster, host: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let serving = Server::builder()
        .tls_config(credentials(cluster, Role::Host, host).tonic_server())
        .unwrap()
        .add_service(AgentServer::new(Console))
        .serve_with_incoming(TcpIncoming::from(listener));
    tokio::spawn(serving);
    addr
}

#[tokio::test(flavor = "multi_thread")]
async fn a_console_is_read_through_the_agent_of_the_vms_host() {
    let cluster = Cluster::start(3, &usual()).await;
    let leader = cluster.leader().await;
    let mut client = user(&cluster, (leader + 1) % 3);
    // Where host2 says it is, somebody answers as host3.
    for (host, answers_as) in [("host1", "host1"), ("host2", "host3")] {
        let addr = serve_console(&cluster, answers_as).await;
        let mut agent = agent(&cluster, leader, host);
        register(&mut agent, host, &addr).await;
        let mut request = create(&format!("on-{host}"));
        request.spec.as_mut().unwrap().host = host.into();
        client.create_vm(request).await.unwrap();
        desired(&mut agent, host, |desired| !desired.vms.is_empty()).await;
    }
    let read = v1::ReadConsoleRequest {
        vm: "on-host1".into(),
        offset: 5,
        ..Default::default()
    };
    let answer = client.read_console(read.clone()).await.unwrap().into_inner();
    assert_eq!(
        (answer.data.as_slice(), answer.epoch),
        (b"on-host1 from 5".as_slice(), 1)
    );
    let write = v1::WriteConsoleRequest {
        vm: "on-host1".into(),
        data: b"abc".to_vec(),
        epoch: 0,
    };
    assert_eq!(
        client.write_console(write).await.unwrap().into_inner().accepted,
        3
    );
    let read = v1::ReadConsoleRequest {
        vm: "on-host2".into(),
        ..read
    };
    assert_eq!(
        fault(client.read_console(read).await).code,
        Code::HostUnreachable,
        "host3 is not host2"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_changes_nothing_and_what_it_expected_goes_along_with_the_migration() {
    let cluster = Cluster::start(3, &usual()).await;
    let leader = cluster.leader().await;
    let mut client = user(&cluster, (leader + 1) % 3);
    let addr = serve_console(&cluster, "host1").await;
    let mut host1 = agent(&cluster, leader, "host1");
    register(&mut host1, "host1", &addr).await;
    register(&mut agent(&cluster, leader, "host2"), "host2", "127.0.0.1:1").await;
    let mut request = create("vm1");
    request.spec.as_mut().unwrap().host = "host1".into();
    client.create_vm(request).await.unwrap();
    desired(&mut host1, "host1", |desired| !desired.vms.is_empty()).await;
    let dry_run = |to: &str| v1::MigrateVmRequest {
        request_id: "r1".into(),
        vm: "vm1".into(),
        to: to.into(),
        options: None,
        upgrade: false,
    };
    let early = client
        .forecast_migration(dry_run("host1"))
        .await
        .unwrap()
        .into_inner();
    let against: Vec<_> = early
        .findings
        .iter()
        .filter(|finding| !finding.passed)
        .map(|finding| (finding.check.as_str(), finding.code.as_str()))
        .collect();
    assert_eq!(
        against,
        [("state", "vm_state"), ("other_host", "same_host")],
        "all that speaks against it, not only the first"
    );
    assert_eq!(early.refusal.unwrap().code, "vm_state");
    assert_eq!((early.forecast, early.unknown), (None, None));

    assert!(report(&mut host1, "host1", "vm1", 1, VmState::Running).await);
    let get = v1::GetVmRequest {
        name: "vm1".into(),
        allow_stale: false,
        with_user_data: false,
    };
    let before = client.get_vm(get.clone()).await.unwrap().into_inner();
    let told = client
        .forecast_migration(dry_run("host2"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((told.refusal, told.unknown), (None, None));
    assert_eq!((told.from.as_str(), told.to.as_str()), ("host1", "host2"));
    let forecast = told.forecast.unwrap();
    assert_eq!(
        (forecast.bandwidth_source.as_str(), forecast.bandwidth_bytes_per_s),
        ("default", 0)
    );
    assert!(forecast.max_downtime_ms > 0, "the cluster's default is filled in");
    assert_eq!(client.get_vm(get).await.unwrap().into_inner(), before);
    let list = v1::ListMigrationsRequest::default();
    let listed = client.list_migrations(list).await.unwrap().into_inner();
    assert_eq!(listed.migrations, []);

    let planned = client.migrate_vm(dry_run("host2")).await.unwrap().into_inner();
    assert_eq!(planned.forecast, Some(forecast));
    let moving = client
        .forecast_migration(dry_run("host2"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(moving.refusal.unwrap().code, "migration_active");
    let missing = v1::MigrateVmRequest {
        vm: "vm9".into(),
        ..dry_run("host2")
    };
    assert_eq!(
        fault(client.forecast_migration(missing).await).code,
        Code::VmNotFound
    );
}
