//! A cluster of one fake controller and one host with a real agent, in a folder of its own.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use drover_node_agent::network::config::NetworksConfig;
use drover_node_agent::sandbox::Policy;
use drover_node_agent::{Agent, AgentError, Config};
use drover_pki::{ClusterCa, Credentials, Role};
use drover_proto::v1::vmm_client::VmmClient;
use drover_proto::v1::*;
use hyper_util::rt::TokioIo;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::PATIENCE;
use crate::fake_fleet::FakeFleet;
use crate::fake_vmm::{CAGE, IS_VMM};

pub struct World {
    pub dir: TempDir,
    pub ca: ClusterCa,
    pub fleet: FakeFleet,
    pub config: Config,
}

impl World {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = ClusterCa::create("test").unwrap();
        let tls = ca.issue_to(&dir.path().join("tls"), Role::Host, "host1").unwrap();
        let controller = ca
            .issue_to(&dir.path().join("tls"), Role::Controller, "c1")
            .unwrap();
        let (fleet, addr) = FakeFleet::start(&Credentials::load(&controller, "test").unwrap()).await;
        let images = dir.path().join("images");
        std::fs::create_dir(&images).unwrap();
        std::fs::create_dir(dir.path().join("pool")).unwrap();
        std::fs::write(images.join("kernel"), "any bytes").unwrap();
        let vmm = dir.path().join("drover-vmm");
        install_vmm(&vmm, "");
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let config = Config {
            cluster_id: "test".into(),
            name: "host1".into(),
            data_dir: dir.path().join("data"),
            listen: any,
            advertise: any,
            migration_ip: any.ip(),
            controllers: vec![addr],
            images_dir: images,
            vmm,
            tls,
            memory_mib: Some(4096),
            cpus: Some(2),
            huge_pages: true,
            post_copy: true,
            networks: NetworksConfig::default(),
            pools: [("default".to_owned(), dir.path().join("pool"))].into(),
            sandbox: Policy::Off,
            vmm_user: None,
        };
        Self {
            dir,
            ca,
            fleet,
            config,
        }
    }

    /// One whose VMMs are in their sandbox, `cage`: [`CAGE`].
    pub async fn caged(cage: &str) -> Self {
        let mut world = Self::new().await;
        install_vmm(&world.config.vmm, &format!("{CAGE}={cage}"));
        world.config.sandbox = Policy::BestEffort;
        world
    }

    /// Starts the agent; after another was dropped, as soon as that one has let go of its folder.
    pub async fn agent(&self) -> Agent {
        let start = async {
            loop {
                match Agent::start(self.config.clone()).await {
                    Err(AgentError::Store(drover_node_agent::host::store::StoreError::InUse(_))) => {
                        tokio::task::yield_now().await;
                    }
                    started => return started.unwrap(),
                }
            }
        };
        tokio::time::timeout(PATIENCE, start)
            .await
            .expect("the agent before holds its folder")
    }

    pub fn folder(&self, name: &str) -> PathBuf {
        self.config.data_dir.join("vms/vm1").join(name)
    }

    pub fn vmm(&self, folder: &str) -> VmmClient<Channel> {
        let socket = self.folder(folder).join("vmm.sock");
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        VmmClient::new(Endpoint::from_static("http://vmm.test").connect_with_connector_lazy(connect))
    }

    /// Waits until the VMM of `folder` says what `wanted` wants.
    pub async fn until_vmm(&self, folder: &str, what: &str, wanted: impl Fn(&VmmInfo) -> bool) -> VmmInfo {
        let mut vmm = self.vmm(folder);
        let found = async {
            let mut seen_seq = u64::MAX;
            loop {
                match vmm
                    .watch_info(WatchInfoRequest {
                        seen_seq,
                        wait_ms: 1000,
                    })
                    .await
                {
                    Ok(info) if wanted(info.get_ref()) => return info.into_inner(),
                    Ok(info) => seen_seq = info.get_ref().seq,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        };
        match tokio::time::timeout(PATIENCE, found).await {
            Ok(info) => info,
            Err(_) => panic!(
                "{folder} is not {what}; its log: {:?}, calls: {:#?}",
                std::fs::read_to_string(self.folder(folder).join("vmm.log")),
                self.fleet.calls()
            ),
        }
    }

    pub async fn until_state(&self, folder: &str, state: VmmState) -> VmmInfo {
        self.until_vmm(folder, &format!("{state:?}"), |info| info.state() == state)
            .await
    }

    /// Lets something happen to the VMM of `folder`.
    pub async fn happen(&self, folder: &str, words: &str) {
        let data = words.as_bytes().to_vec();
        self.vmm(folder)
            .write_console(WriteConsoleRequest {
                data,
                ..Default::default()
            })
            .await
            .unwrap();
    }

    /// What was asked of the VMM of `folder`.
    pub async fn requests(&self, folder: &str) -> String {
        let answer = self
            .vmm(folder)
            .read_console(ReadConsoleRequest::default())
            .await
            .unwrap();
        String::from_utf8(answer.into_inner().data).unwrap()
    }

    /// Waits until a file of a VMM's folder is there.
    pub async fn until_file(&self, folder: &str, name: &str) {
        let path = self.folder(folder).join(name);
        let there = async {
            while !path.exists() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, there)
            .await
            .unwrap_or_else(|_| panic!("{} does not come", path.display()));
    }
}

/// Makes this program the VMM, with something more in its environment.
fn install_vmm(vmm: &std::path::Path, environment: &str) {
    let this = std::env::current_exe().unwrap();
    let script = format!(
        "#!/bin/sh\n{IS_VMM}=1 {environment} exec '{}' \"$@\"\n",
        this.display()
    );
    std::fs::write(vmm, script).unwrap();
    std::fs::set_permissions(vmm, std::fs::Permissions::from_mode(0o755)).unwrap();
}

pub fn run_spec() -> VmSpec {
    VmSpec {
        name: "vm1".into(),
        vcpus: 1,
        memory_mib: 64,
        kernel: "kernel".into(),
        ..VmSpec::default()
    }
}

pub fn run(epoch: u64, migration: Option<Migration>) -> HostDesired {
    let role = VmRole::Run.into();
    let vm = VmDesired {
        vm: "vm1".into(),
        epoch,
        spec: Some(run_spec()),
        role,
        migration,
        arrived_by: String::new(),
        volumes: Vec::new(),
        networks: Vec::new(),
        ..VmDesired::default()
    };
    HostDesired {
        vms: vec![vm],
        ..HostDesired::default()
    }
}

pub fn incoming(epoch: u64, migration: Migration) -> HostDesired {
    let mut desired = run(epoch, Some(migration));
    desired.vms[0].set_role(VmRole::Incoming);
    desired
}

pub fn migration(id: &str, from: &str, to: &str, epoch: u64, phase: MigrationPhase) -> Migration {
    Migration {
        id: id.into(),
        vm: "vm1".into(),
        from: from.into(),
        to: to.into(),
        epoch,
        phase: phase.into(),
        target_addr: "127.0.0.1:4711".into(),
        ..Migration::default()
    }
}

pub fn kill_9(info: &VmmInfo) {
    kill(Pid::from_raw(i32::try_from(info.pid).unwrap()), Signal::SIGKILL).unwrap();
}

/// Waits until the VMM's process has ended: it gives back its lock, by which its agent knows, a moment before.
pub async fn until_ended(info: &VmmInfo) {
    let ended = async {
        while lives(info) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, ended)
        .await
        .unwrap_or_else(|_| panic!("process {} lives on", info.pid));
}

pub fn lives(info: &VmmInfo) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", info.pid)).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z'))
}
