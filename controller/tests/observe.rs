//! What watchers get: a migration as it changes, through any controller and across a change of leader, and its figures as metrics for
//! those who may read them. The agents here are this test; everything else is real.
#![allow(clippy::unwrap_used, reason = "in a test, unwrap is the check")]

mod support;

use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use drover_pki::{Role, controller_dns};
use drover_proto::Code;
use drover_proto::v1::{self, MigrationPhase, VmState};
use support::callers::{agent, beat, channel, create, credentials, desired, fault, register, report, user};
use support::{Cluster, soon, usual};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::codegen::Service;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

/// How long a look is held: longer than anything awaited takes.
const WAIT_MS: u32 = 30_000;

async fn scrape(mut channel: Channel) -> Result<(StatusCode, String), tonic::transport::Error> {
    let request = Request::get("/metrics").body(tonic::body::Body::empty()).unwrap();
    std::future::poll_fn(|context| channel.poll_ready(context)).await?;
    let response = channel.call(request).await?;
    let status = response.status();
    let body = to_bytes(Body::new(response.into_body()), 1 << 20).await.unwrap();
    Ok((status, String::from_utf8(body.to_vec()).unwrap()))
}

async fn metrics(cluster: &Cluster, at: usize) -> String {
    let monitor = credentials(cluster, Role::Monitor, "prometheus");
    let (status, text) = scrape(channel(cluster, at, &monitor)).await.unwrap();
    assert_eq!(status, StatusCode::OK, "{text}");
    assert!(text.ends_with("# EOF\n"), "{text}");
    text
}

fn has(text: &str, line: &str) -> bool {
    text.lines().any(|found| found == line)
}

fn look(seen: u64) -> v1::WatchMigrationRequest {
    v1::WatchMigrationRequest {
        id: "m1".into(),
        seen,
        wait_ms: WAIT_MS,
    }
}

/// vm1 runs on host1 and is copied to host2; both hosts' leases are renewed for as long as the test lasts.
async fn migration_in_pre_copy(cluster: &Cluster, at: usize) {
    for host in ["host1", "host2"] {
        let mut host_agent = agent(cluster, at, host);
        register(&mut host_agent, host, "127.0.0.1:1").await;
        tokio::spawn(async move {
            loop {
                let request = v1::HeartbeatRequest {
                    host: host.into(),
                    boot_id: "boot-1".into(),
                };
                // Without a leader the next one comes soon.
                let _ = host_agent.heartbeat(request).await;
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        });
    }
    let (mut host1, mut host2) = (agent(cluster, at, "host1"), agent(cluster, at, "host2"));
    let mut client = user(cluster, at);
    let mut vm = create("vm1");
    vm.spec.as_mut().unwrap().host = "host1".into();
    client.create_vm(vm).await.unwrap();
    desired(&mut host1, "host1", |desired| !desired.vms.is_empty()).await;
    beat(&mut host1, "host1").await;
    assert!(report(&mut host1, "host1", "vm1", 1, VmState::Running).await);
    let request = v1::MigrateVmRequest {
        vm: "vm1".into(),
        to: "host2".into(),
        ..Default::default()
    };
    client.migrate_vm(request).await.unwrap();
    desired(&mut host2, "host2", |desired| !desired.vms.is_empty()).await;
    let listening = v1::ReportMigrationRequest {
        host: "host2".into(),
        migration: "m1".into(),
        target_addr: "127.0.0.1:9000".into(),
        ..Default::default()
    };
    let phase = host2
        .report_migration(listening)
        .await
        .unwrap()
        .into_inner()
        .phase();
    assert_eq!(phase, MigrationPhase::PreCopy);
}

fn progress() -> v1::ReportMigrationRequest {
    let stream = |number, stalled_ms| v1::StreamProgress {
        number,
        bytes: 1_000,
        bytes_per_s: 500,
        pages_queued: 256,
        stalled_ms,
    };
    let mut progress = v1::Progress {
        round: 3,
        bytes_sent: 2_000,
        bytes_remaining: 77,
        throttle_percent: 20,
        streams: 2,
        by_stream: vec![stream(0, 0), stream(1, 2_500)],
        ..Default::default()
    };
    progress.set_phase(MigrationPhase::PreCopy);
    v1::ReportMigrationRequest {
        host: "host1".into(),
        migration: "m1".into(),
        progress: Some(progress),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_is_watched_and_measured_through_a_change_of_leader_to_its_end() {
    let mut cluster = Cluster::start(3, &usual()).await;
    let leader = cluster.leader().await;
    let far = (leader + 1) % 3;
    migration_in_pre_copy(&cluster, far).await;

    let mut watcher = user(&cluster, far);
    let first = watcher.watch_migration(look(0)).await.unwrap().into_inner();
    assert_eq!(first.migration.unwrap().phase(), MigrationPhase::PreCopy);
    let at_the_leader = user(&cluster, leader).watch_migration(look(0)).await.unwrap();
    assert_eq!(
        at_the_leader.into_inner().seen,
        first.seen,
        "the same sight, the same name"
    );
    let held = tokio::spawn({
        let mut watcher = watcher.clone();
        async move { watcher.watch_migration(look(first.seen)).await }
    });
    agent(&cluster, far, "host1")
        .report_migration(progress())
        .await
        .unwrap();
    let second = soon("the news", held).await.unwrap().unwrap().into_inner();
    let told = second.migration.unwrap().progress.unwrap();
    assert_eq!(
        (told.round, told.by_stream.len(), told.by_stream[1].stalled_ms),
        (3, 2, 2_500)
    );
    let nobodys = v1::WatchMigrationRequest {
        id: "m9".into(),
        ..look(0)
    };
    assert_eq!(
        fault(watcher.watch_migration(nobodys).await).code,
        Code::MigrationNotFound
    );

    let text = metrics(&cluster, leader).await;
    for line in [
        "drover_controller_leader 1.0",
        "drover_vms{state=\"running\"} 1.0",
        "drover_hosts{state=\"up\"} 2.0",
        "drover_migrations_under_way{phase=\"pre-copy\"} 1.0",
        "drover_migration_info{vm=\"vm1\",migration=\"m1\",source=\"host1\",target=\"host2\",phase=\"pre-copy\"} 1.0",
        "drover_migration_round{vm=\"vm1\",migration=\"m1\"} 3.0",
        "drover_migration_remaining_bytes{vm=\"vm1\",migration=\"m1\"} 77.0",
        "drover_migration_throttle_ratio{vm=\"vm1\",migration=\"m1\"} 0.2",
        "drover_migration_stream_sent_bytes{vm=\"vm1\",migration=\"m1\",stream=\"0\"} 1000.0",
        "drover_migration_stream_stalled_seconds{vm=\"vm1\",migration=\"m1\",stream=\"1\"} 2.5",
    ] {
        assert!(has(&text, line), "{line} in {text}");
    }
    assert!(
        !text.contains("drover_migration_eta_seconds{"),
        "nobody knows it yet"
    );
    let text = metrics(&cluster, far).await;
    assert!(
        has(&text, "drover_controller_leader 0.0") && !text.contains("vm1"),
        "{text}"
    );

    let held = tokio::spawn({
        let mut watcher = watcher.clone();
        async move { watcher.watch_migration(look(second.seen)).await }
    });
    cluster.stop(leader).await;
    let third = soon("the next leader's answer", held)
        .await
        .unwrap()
        .unwrap()
        .into_inner();
    let migration = third.migration.unwrap();
    assert_eq!(
        (migration.phase(), migration.progress),
        (MigrationPhase::PreCopy, None)
    );
    let next = cluster.leader().await;
    agent(&cluster, far, "host1")
        .report_migration(progress())
        .await
        .unwrap();
    assert!(
        metrics(&cluster, next)
            .await
            .contains("drover_migration_round{vm=\"vm1\"")
    );

    let cancel = v1::CancelMigrationRequest {
        id: "m1".into(),
        ..Default::default()
    };
    watcher.cancel_migration(cancel).await.unwrap();
    let last = watcher
        .watch_migration(look(third.seen))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(last.migration.unwrap().phase(), MigrationPhase::Aborted);
    let again = watcher
        .watch_migration(look(last.seen))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        again.seen, last.seen,
        "what has ended is told at once, also to who knows it"
    );
    let counted = "drover_migrations_finished_total{result=\"aborted\",code=\"cancelled\"} 1";
    let text = soon("the count", async {
        loop {
            let text = metrics(&cluster, next).await;
            if has(&text, counted) {
                return text;
            }
        }
    })
    .await;
    assert!(!text.contains("vm1"), "no series outlives its migration: {text}");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_for_those_with_a_certificate_that_may_read_them_and_a_monitor_may_nothing_else() {
    let mut cluster = Cluster::start(1, &usual()).await;
    cluster.leader().await;
    for role in [Role::Monitor, Role::User, Role::Controller] {
        let name = if role == Role::Controller { "c1" } else { "someone" };
        let (status, text) = scrape(channel(&cluster, 0, &credentials(&cluster, role, name)))
            .await
            .unwrap();
        assert_eq!(status, StatusCode::OK, "{role}: {text}");
    }
    let host = credentials(&cluster, Role::Host, "host1");
    let (status, text) = scrape(channel(&cluster, 0, &host)).await.unwrap();
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(
        text.contains("drover://test/host/host1") && !text.contains("drover_"),
        "{text}"
    );

    let addr = cluster.files.addrs[0];
    let ca = std::fs::read(cluster.files.home(0).join("ca.pem")).unwrap();
    let nobody = ClientTlsConfig::new()
        .domain_name(controller_dns(None))
        .ca_certificate(Certificate::from_pem(ca));
    let endpoint = Endpoint::from_shared(format!("https://{addr}")).unwrap();
    let unnamed = endpoint.tls_config(nobody).unwrap().connect_lazy();
    let refused = scrape(unnamed).await;
    assert!(refused.is_err(), "{refused:?}");

    let mut plain = tokio::net::TcpStream::connect(addr).await.unwrap();
    plain
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: c1\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    // A reset is as good as an end.
    let _ = soon("the end of the connection", plain.read_to_end(&mut answer)).await;
    assert!(
        !String::from_utf8_lossy(&answer).contains("drover_"),
        "{answer:?}"
    );

    let monitor = channel(&cluster, 0, &credentials(&cluster, Role::Monitor, "prometheus"));
    let mut client = v1::controller_client::ControllerClient::new(monitor.clone());
    let read = v1::GetClusterRequest { allow_stale: true };
    assert_eq!(fault(client.get_cluster(read).await).code, Code::Denied);
    let mut fleet = v1::fleet_client::FleetClient::new(monitor);
    let beat = v1::HeartbeatRequest {
        host: "host1".into(),
        boot_id: "boot-1".into(),
    };
    assert_eq!(fault(fleet.heartbeat(beat).await).code, Code::Denied);
    cluster.stop_all().await;
}
