//! Real handshakes on loopback: who is let in, and what those are told who are not.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;

use drover_pki::{
    CertificateDer, ClusterCa, Credentials, Identity, PkiError, Role, TlsFiles, controller_dns, host_dns,
    identity_of, peer_identity, tls_fault,
};
use drover_proto::v1::fleet_client::FleetClient;
use drover_proto::v1::fleet_server::{Fleet, FleetServer};
use drover_proto::v1::*;
use drover_proto::{Code, Fault};
use tempfile::TempDir;
use tokio::net::TcpListener as AsyncListener;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};

/// Answers heartbeats with the caller's identity as the message of the status [`SEEN`]; nothing else.
struct WhoAreYou(&'static str);

/// The status that says the caller was let in.
const SEEN: tonic::Code = tonic::Code::AlreadyExists;

#[tonic::async_trait]
impl Fleet for WhoAreYou {
    async fn heartbeat(&self, req: Request<HeartbeatRequest>) -> Result<Response<HeartbeatResponse>, Status> {
        let identity = peer_identity(&req, self.0)?;
        Err(Status::new(SEEN, identity.to_string()))
    }
    async fn register_host(
        &self,
        _: Request<RegisterHostRequest>,
    ) -> Result<Response<RegisterHostResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn watch_desired(&self, _: Request<WatchDesiredRequest>) -> Result<Response<HostDesired>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn report_vm(&self, _: Request<ReportVmRequest>) -> Result<Response<ReportVmResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn report_migration(
        &self,
        _: Request<ReportMigrationRequest>,
    ) -> Result<Response<ReportMigrationResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn commit_handover(
        &self,
        _: Request<CommitHandoverRequest>,
    ) -> Result<Response<CommitHandoverResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn abort_migration(
        &self,
        _: Request<AbortMigrationRequest>,
    ) -> Result<Response<AbortMigrationResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn report_snapshot(
        &self,
        _: Request<ReportSnapshotRequest>,
    ) -> Result<Response<ReportSnapshotResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn begin_restore(
        &self,
        _: Request<BeginRestoreRequest>,
    ) -> Result<Response<BeginRestoreResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn report_volume(
        &self,
        _: Request<ReportVolumeRequest>,
    ) -> Result<Response<ReportVolumeResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

fn party(ca: &ClusterCa, role: Role, name: &str) -> (TempDir, Credentials) {
    let dir = tempfile::tempdir().unwrap();
    let files = ca.issue_to(dir.path(), role, name).unwrap();
    let credentials = Credentials::load(&files, ca.cluster()).unwrap();
    (dir, credentials)
}

async fn serve(credentials: &Credentials, cluster: &'static str) -> std::net::SocketAddr {
    let listener = AsyncListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let server = Server::builder()
        .tls_config(credentials.tonic_server())
        .unwrap()
        .add_service(FleetServer::new(WhoAreYou(cluster)))
        .serve_with_incoming(TcpIncoming::from(listener));
    tokio::spawn(server);
    addr
}

async fn channel(
    addr: std::net::SocketAddr,
    client: &Credentials,
    dns: &str,
) -> Result<Channel, tonic::transport::Error> {
    Endpoint::from_shared(format!("https://{addr}"))
        .unwrap()
        .tls_config(client.tonic_client(dns))
        .unwrap()
        .connect()
        .await
}

/// The identity that the server saw, or the fault that a person would be shown.
async fn who_am_i(
    addr: std::net::SocketAddr,
    client: &Credentials,
    dns: &str,
) -> Result<String, Option<Fault>> {
    let channel = channel(addr, client, dns)
        .await
        .map_err(|error| tls_fault(&error))?;
    let status = FleetClient::new(channel)
        .heartbeat(HeartbeatRequest::default())
        .await
        .unwrap_err();
    match status.code() {
        SEEN => Ok(status.message().to_owned()),
        _ => Err(tls_fault(&status).or_else(|| Some(Fault::from(&status)))),
    }
}

#[tokio::test]
async fn parties_of_one_cluster_know_each_other_over_grpc() {
    let ca = ClusterCa::create("dev-1").unwrap();
    let (_d1, server) = party(&ca, Role::Controller, "c1");
    let addr = serve(&server, "dev-1").await;
    for (role, name) in [
        (Role::Host, "host1"),
        (Role::User, "admin"),
        (Role::Controller, "c2"),
    ] {
        let (_d2, client) = party(&ca, role, name);
        for dns in [controller_dns(None), controller_dns(Some("c1"))] {
            let seen = who_am_i(addr, &client, &dns).await.unwrap();
            assert_eq!(seen, format!("drover://dev-1/{role}/{name}"));
        }
    }
}

#[tokio::test]
async fn another_cluster_is_refused_by_server_and_by_client() {
    let (ours, theirs) = (
        ClusterCa::create("dev-1").unwrap(),
        ClusterCa::create("dev-2").unwrap(),
    );
    // Another cluster, and another CA that claims the same id.
    let namesake = ClusterCa::create("dev-1").unwrap();
    let (_d1, server) = party(&ours, Role::Controller, "c1");
    let addr = serve(&server, "dev-1").await;
    for other in [&theirs, &namesake] {
        // A client that trusts our CA but was issued by another: the server refuses it.
        let dir = tempfile::tempdir().unwrap();
        let files = other.issue_to(dir.path(), Role::Host, "host1").unwrap();
        let refused = Credentials::load(&files, other.cluster()).unwrap();
        let fault = who_am_i(addr, &refused, &controller_dns(None))
            .await
            .unwrap_err()
            .expect("a TLS fault");
        assert_eq!(fault.code, Code::Denied, "{fault}");
        assert!(fault.message.contains("server's certificate"), "{fault}");
    }
}

#[tokio::test]
async fn a_caller_whose_certificate_another_ca_issued_is_refused_by_the_server() {
    let (ours, theirs) = (
        ClusterCa::create("dev-1").unwrap(),
        ClusterCa::create("dev-1").unwrap(),
    );
    let (_d1, server) = party(&ours, Role::Controller, "c1");
    let addr = serve(&server, "dev-1").await;
    // The intruder does not check the server, so that only the server can refuse.
    let tls = tonic::transport::ClientTlsConfig::new()
        .domain_name(controller_dns(None))
        .ca_certificate(tonic::transport::Certificate::from_pem(ours.cert_pem()))
        .identity({
            let issued = theirs.issue(Role::Host, "host1").unwrap();
            tonic::transport::Identity::from_pem(issued.cert_pem, issued.key_pem)
        });
    let endpoint = Endpoint::from_shared(format!("https://{addr}"))
        .unwrap()
        .tls_config(tls)
        .unwrap();
    // TLS 1.3: the client learns of the refusal with its first read.
    let error: Box<dyn std::error::Error> = match endpoint.connect().await {
        Err(error) => Box::new(error),
        Ok(channel) => Box::new(
            FleetClient::new(channel)
                .heartbeat(HeartbeatRequest::default())
                .await
                .unwrap_err(),
        ),
    };
    if let Some(fault) = tls_fault(error.as_ref()) {
        assert_eq!(fault.code, Code::Denied, "{fault}");
    }
    assert!(
        !format!("{error:?}").contains("drover://"),
        "the server let the intruder in: {error:?}"
    );
}

#[tokio::test]
async fn a_caller_without_a_certificate_is_refused() {
    let ca = ClusterCa::create("dev-1").unwrap();
    let (_d1, server) = party(&ca, Role::Controller, "c1");
    let addr = serve(&server, "dev-1").await;
    let tls = tonic::transport::ClientTlsConfig::new()
        .domain_name(controller_dns(None))
        .ca_certificate(tonic::transport::Certificate::from_pem(ca.cert_pem()));
    let endpoint = Endpoint::from_shared(format!("https://{addr}"))
        .unwrap()
        .tls_config(tls)
        .unwrap();
    let answered = match endpoint.connect().await {
        Err(_) => None,
        Ok(channel) => FleetClient::new(channel)
            .heartbeat(HeartbeatRequest::default())
            .await
            .err(),
    };
    assert!(
        answered.is_none_or(|status| status.code() != SEEN),
        "a nameless caller was answered"
    );
}

#[tokio::test]
async fn a_host_cannot_pose_as_a_controller_nor_as_another_host() {
    let ca = ClusterCa::create("dev-1").unwrap();
    let (_d1, host) = party(&ca, Role::Host, "host1");
    let (_d2, client) = party(&ca, Role::User, "admin");
    let addr = serve(&host, "dev-1").await;
    assert_eq!(
        who_am_i(addr, &client, &host_dns("host1")).await.unwrap(),
        "drover://dev-1/user/admin"
    );
    for dns in [
        controller_dns(None),
        controller_dns(Some("host1")),
        host_dns("host2"),
    ] {
        let fault = who_am_i(addr, &client, &dns)
            .await
            .unwrap_err()
            .expect("a TLS fault");
        assert_eq!(fault.code, Code::Denied, "{dns}: {fault}");
    }
}

#[tokio::test]
async fn a_server_of_another_cluster_id_denies_a_caller_by_its_uri() {
    // Two clusters under one CA cannot be made by us; should somebody, the URI still tells them apart.
    let ca = ClusterCa::create("dev-1").unwrap();
    let (_d1, server) = party(&ca, Role::Controller, "c1");
    let (_d2, client) = party(&ca, Role::User, "admin");
    let addr = serve(&server, "dev-9").await;
    let fault = who_am_i(addr, &client, &controller_dns(None))
        .await
        .unwrap_err()
        .unwrap();
    assert_eq!(fault.code, Code::Denied);
    assert!(
        fault.message.contains("drover://dev-1/user/admin") && fault.message.contains("dev-9"),
        "{fault}"
    );
}

#[test]
fn two_hosts_see_each_other_over_plain_tls() {
    let ca = ClusterCa::create("dev-1").unwrap();
    let (_d1, target) = party(&ca, Role::Host, "host2");
    let (_d2, source) = party(&ca, Role::Host, "host1");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let accept = thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        let tls = rustls::ServerConnection::new(target.rustls_server()).unwrap();
        let mut stream = rustls::StreamOwned::new(tls, socket);
        let mut word = [0; 4];
        stream.read_exact(&mut word).unwrap();
        stream.write_all(&word).unwrap();
        stream.flush().unwrap();
        identity_of(stream.conn.peer_certificates().unwrap(), "dev-1").unwrap()
    });
    let name = rustls_pki_types::ServerName::try_from(host_dns("host2")).unwrap();
    let tls = rustls::ClientConnection::new(source.rustls_client(), name).unwrap();
    let mut stream = rustls::StreamOwned::new(tls, TcpStream::connect(addr).unwrap());
    stream.write_all(b"ping").unwrap();
    let mut word = [0; 4];
    stream.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"ping");
    let target_seen = identity_of(stream.conn.peer_certificates().unwrap(), "dev-1").unwrap();
    assert_eq!(target_seen.to_string(), "drover://dev-1/host/host2");
    assert_eq!(accept.join().unwrap().to_string(), "drover://dev-1/host/host1");
}

#[test]
fn a_ca_issues_on_after_it_was_saved_and_loaded() {
    let dir = tempfile::tempdir().unwrap();
    ClusterCa::create("dev-1").unwrap().save(dir.path()).unwrap();
    assert_eq!(mode(&dir.path().join("ca.key")), 0o600);
    let loaded = ClusterCa::load(dir.path()).unwrap();
    assert_eq!(loaded.cluster(), "dev-1");
    let (_d, credentials) = party(&loaded, Role::Host, "host1");
    assert_eq!(
        credentials.identity(),
        &Identity {
            cluster: "dev-1".into(),
            role: Role::Host,
            name: "host1".into()
        }
    );
    // What the loaded CA issued is good under the certificate that was saved.
    let issued = loaded.issue_to(dir.path(), Role::User, "admin").unwrap();
    assert!(Credentials::load(&issued, "dev-1").is_ok());
}

#[test]
fn a_key_that_others_can_read_is_refused_and_issuing_again_mends_it() {
    let ca = ClusterCa::create("dev-1").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let files = ca.issue_to(dir.path(), Role::Host, "host1").unwrap();
    assert_eq!(mode(&files.key), 0o600);
    for open in [0o640, 0o604, 0o644] {
        std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(open)).unwrap();
        let error = Credentials::load(&files, "dev-1").unwrap_err();
        assert!(
            matches!(error, PkiError::KeyMode { mode, .. } if mode == open),
            "{error}"
        );
    }
    let files = ca.issue_to(dir.path(), Role::Host, "host1").unwrap();
    assert_eq!(mode(&files.key), 0o600);
    assert!(Credentials::load(&files, "dev-1").is_ok());
}

#[test]
fn credentials_that_do_not_belong_together_are_refused() {
    let (ours, theirs) = (
        ClusterCa::create("dev-1").unwrap(),
        ClusterCa::create("dev-2").unwrap(),
    );
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mine = ours.issue_to(a.path(), Role::Host, "host1").unwrap();
    let other = theirs.issue_to(b.path(), Role::Host, "host1").unwrap();

    let wrong_cluster = Credentials::load(&other, "dev-1").unwrap_err();
    assert_eq!(wrong_cluster.code(), Code::Denied);
    assert!(wrong_cluster.to_string().contains("dev-2"), "{wrong_cluster}");

    let wrong_ca = Credentials::load(
        &TlsFiles {
            ca: other.ca.clone(),
            ..mine.clone()
        },
        "dev-1",
    )
    .unwrap_err();
    assert_eq!(wrong_ca.code(), Code::Denied, "{wrong_ca}");

    let wrong_key = Credentials::load(
        &TlsFiles {
            key: other.key.clone(),
            ..mine.clone()
        },
        "dev-1",
    )
    .unwrap_err();
    assert!(matches!(wrong_key, PkiError::Pem { .. }), "{wrong_key}");

    let missing = Credentials::load(
        &TlsFiles {
            cert: a.path().join("none.pem"),
            ..mine.clone()
        },
        "dev-1",
    )
    .unwrap_err();
    assert!(missing.to_string().contains("none.pem"), "{missing}");

    std::fs::write(&mine.cert, "not a certificate").unwrap();
    assert!(matches!(
        Credentials::load(&mine, "dev-1").unwrap_err(),
        PkiError::Pem { .. }
    ));
}

#[test]
fn names_that_could_leave_their_folder_or_label_are_refused() {
    let ca = ClusterCa::create("dev-1").unwrap();
    for name in ["", "../x", "a/b", "A", "-a", "a.b", &"a".repeat(64)] {
        assert!(
            matches!(ca.issue(Role::Host, name), Err(PkiError::Name { .. })),
            "{name:?} was taken"
        );
        assert!(
            matches!(ClusterCa::create(name), Err(PkiError::Name { .. })),
            "{name:?} was taken"
        );
    }
    assert!(identity_of(&[] as &[CertificateDer<'_>], "dev-1").is_err());
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}
