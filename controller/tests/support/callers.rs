//! Those who call a cluster of controllers: users and agents, each with a certificate of its own.

use drover_pki::{Credentials, Role, controller_dns};
use drover_proto::Fault;
use drover_proto::v1::controller_client::ControllerClient;
use drover_proto::v1::fleet_client::FleetClient;
use drover_proto::v1::{self, VmState};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::{CLUSTER, Cluster, soon};

/// How long a poll is held: longer than anything awaited takes.
pub const WAIT_MS: u32 = 30_000;

pub fn credentials(cluster: &Cluster, role: Role, name: &str) -> Credentials {
    let folder = cluster.files.folder.path().join(format!("{role}-{name}"));
    let files = cluster.files.ca.issue_to(&folder, role, name).unwrap();
    Credentials::load(&files, CLUSTER).unwrap()
}

pub fn channel(cluster: &Cluster, at: usize, credentials: &Credentials) -> Channel {
    let endpoint = Endpoint::from_shared(format!("https://{}", cluster.files.addrs[at])).unwrap();
    endpoint
        .tls_config(credentials.tonic_client(&controller_dns(None)))
        .unwrap()
        .connect_lazy()
}

pub fn user(cluster: &Cluster, at: usize) -> ControllerClient<Channel> {
    ControllerClient::new(channel(cluster, at, &credentials(cluster, Role::User, "admin")))
}

pub fn agent(cluster: &Cluster, at: usize, host: &str) -> FleetClient<Channel> {
    FleetClient::new(channel(cluster, at, &credentials(cluster, Role::Host, host)))
}

pub fn fault<T: std::fmt::Debug>(result: Result<T, Status>) -> Fault {
    Fault::from(&result.expect_err("a refusal"))
}

pub fn host_spec(name: &str, agent_addr: &str) -> v1::HostSpec {
    v1::HostSpec {
        name: name.into(),
        agent_addr: agent_addr.into(),
        migration_ip: "127.0.0.1".into(),
        capacity: Some(v1::HostCapacity {
            cpus: 2,
            memory_mib: 1_024,
        }),
        device_model: 1,
        images: vec![v1::Image {
            name: "probe".into(),
            kind: "elf-pvh".into(),
            ..Default::default()
        }],
        boot_id: "boot-1".into(),
        ..Default::default()
    }
}

pub async fn register(agent: &mut FleetClient<Channel>, host: &str, agent_addr: &str) {
    let request = v1::RegisterHostRequest {
        spec: Some(host_spec(host, agent_addr)),
    };
    let answer = agent.register_host(request).await.unwrap().into_inner();
    assert_eq!(
        (answer.cluster_id.as_str(), answer.settings.unwrap().lease_ms),
        (CLUSTER, 4_000)
    );
}

pub fn create(name: &str) -> v1::CreateVmRequest {
    let spec = v1::VmSpec {
        name: name.into(),
        vcpus: 1,
        memory_mib: 64,
        kernel: "probe".into(),
        ..Default::default()
    };
    v1::CreateVmRequest {
        request_id: format!("create-{name}"),
        spec: Some(spec),
        start: true,
    }
}

pub async fn beat(agent: &mut FleetClient<Channel>, host: &str) -> v1::HeartbeatResponse {
    let request = v1::HeartbeatRequest {
        host: host.into(),
        boot_id: "boot-1".into(),
    };
    agent.heartbeat(request).await.unwrap().into_inner()
}

pub fn granted(answer: &v1::HeartbeatResponse) -> Vec<(&str, u64)> {
    answer
        .grants
        .iter()
        .map(|vm| (vm.vm.as_str(), vm.epoch))
        .collect()
}

/// Polls the host's desired state until it satisfies `wanted`.
pub async fn desired(
    agent: &mut FleetClient<Channel>,
    host: &str,
    wanted: impl Fn(&v1::HostDesired) -> bool,
) -> v1::HostDesired {
    soon("the desired state", async {
        let mut seen_revision = 0;
        loop {
            let request = v1::WatchDesiredRequest {
                host: host.into(),
                seen_revision,
                wait_ms: WAIT_MS,
            };
            let answer = agent.watch_desired(request).await.unwrap().into_inner();
            if wanted(&answer) {
                return answer;
            }
            seen_revision = answer.revision;
        }
    })
    .await
}

pub async fn report(
    agent: &mut FleetClient<Channel>,
    host: &str,
    vm: &str,
    epoch: u64,
    state: VmState,
) -> bool {
    let mut request = v1::ReportVmRequest {
        host: host.into(),
        vm: vm.into(),
        epoch,
        ..Default::default()
    };
    request.set_state(state);
    agent.report_vm(request).await.unwrap().into_inner().current
}
