//! A cluster of controllers on loopback, with real TLS and real disks. States are awaited, never slept for.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod callers;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use drover_controller::config::Config;
use drover_controller::consensus::Consensus;
use drover_controller::server::Controller;
use drover_pki::{ClusterCa, Role};
use drover_proto::v1::command::Kind;
use drover_proto::{Fault, v1};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::time::timeout;

/// Far longer than anything awaited takes: a test that waits so long has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at a state that announces no changes.
const LOOK_PAUSE: Duration = Duration::from_millis(5);

pub const CLUSTER: &str = "test";

/// Awaits `what`, which must come.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("waited in vain: {what}"))
}

/// Awaits what can only be looked at: looks again after a moment.
pub async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    soon(what, async {
        loop {
            if let Some(seen) = look() {
                return seen;
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    })
    .await
}

/// Settings that let a snapshot come early.
pub fn small_log() -> Value {
    json!({"heartbeat_ms": 100, "election_min_ms": 500, "election_max_ms": 1000, "snapshot_every": 20, "entries_kept": 5})
}

pub fn usual() -> Value {
    json!({"heartbeat_ms": 100, "election_min_ms": 500, "election_max_ms": 1000})
}

/// The files of `count` controllers: certificates and configurations; and their addresses.
pub struct Files {
    pub folder: TempDir,
    pub ca: ClusterCa,
    pub addrs: Vec<SocketAddr>,
}

impl Files {
    /// `listeners` keep the ports until the controllers take them.
    pub async fn new(count: usize, raft: &Value) -> (Self, Vec<TcpListener>) {
        let folder = tempfile::tempdir().unwrap();
        let ca = ClusterCa::create(CLUSTER).unwrap();
        let (mut listeners, mut addrs) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addrs.push(listener.local_addr().unwrap());
            listeners.push(listener);
        }
        let files = Self { folder, ca, addrs };
        for at in 0..count {
            files
                .ca
                .issue_to(&files.home(at), Role::Controller, &name(at))
                .unwrap();
            files.write_config(at, raft);
        }
        (files, listeners)
    }

    pub fn home(&self, at: usize) -> PathBuf {
        self.folder.path().join(name(at))
    }

    pub fn config_file(&self, at: usize) -> PathBuf {
        self.home(at).join("controller.json")
    }

    pub fn config(&self, at: usize) -> Config {
        Config::load(&self.config_file(at)).unwrap()
    }

    fn write_config(&self, at: usize, raft: &Value) {
        let member = |at: usize| json!({"id": at + 1, "name": name(at), "addr": self.addrs[at]});
        let config = json!({
            "cluster_id": CLUSTER, "id": at + 1, "name": name(at), "data_dir": "data",
            "listen": self.addrs[at], "advertise": self.addrs[at],
            "members": (0..self.addrs.len()).map(member).collect::<Vec<_>>(),
            "tls": {"ca": "ca.pem", "cert": format!("{}.pem", name(at)), "key": format!("{}.key", name(at))},
            "settings": {"lease_ms": 4000},
            "raft": raft,
        });
        std::fs::write(self.config_file(at), config.to_string()).unwrap();
    }
}

pub fn name(at: usize) -> String {
    format!("c{}", at + 1)
}

/// Controllers in this process.
pub struct Cluster {
    pub files: Files,
    nodes: Vec<Option<Controller>>,
}

impl Cluster {
    pub async fn start(count: usize, raft: &Value) -> Self {
        let (files, listeners) = Files::new(count, raft).await;
        let mut nodes = Vec::new();
        for (at, listener) in listeners.into_iter().enumerate() {
            nodes.push(Some(
                Controller::start_on(&files.config(at), listener).await.unwrap(),
            ));
        }
        Self { files, nodes }
    }

    pub fn node(&self, at: usize) -> &Consensus {
        self.nodes[at].as_ref().expect("it runs").consensus()
    }

    pub fn running(&self) -> impl Iterator<Item = usize> {
        self.nodes
            .iter()
            .enumerate()
            .filter(|(_, node)| node.is_some())
            .map(|(at, _)| at)
    }

    pub async fn stop(&mut self, at: usize) {
        self.nodes[at].take().expect("it runs").stop().await;
    }

    pub async fn start_again(&mut self, at: usize) {
        assert!(self.nodes[at].is_none());
        self.nodes[at] = Some(Controller::start(&self.files.config(at)).await.unwrap());
    }

    /// The one that leads, once one does among those that run.
    pub async fn leader(&self) -> usize {
        let leads = self.running().map(|at| {
            let mut leadership = self.node(at).leadership();
            Box::pin(async move {
                leadership
                    .wait_for(Option::is_some)
                    .await
                    .expect("the controller runs");
                at
            })
        });
        let mut tasks = tokio::task::JoinSet::new();
        for lead in leads.collect::<Vec<_>>() {
            tasks.spawn(lead);
        }
        soon("a leader", tasks.join_next())
            .await
            .expect("some controller runs")
            .unwrap()
    }

    /// Proposes at whoever leads, again after each election, as a client would.
    pub async fn propose(&self, command: v1::Command) -> v1::CommandResponse {
        soon("the command is committed", async {
            loop {
                let leader = self.leader().await;
                if let Ok(response) = self.node(leader).propose(command.clone()).await {
                    return response;
                }
                tokio::time::sleep(LOOK_PAUSE).await;
            }
        })
        .await
    }

    /// Awaits that `at` has applied the registration of `host`.
    pub async fn knows(&self, at: usize, host: &str) {
        let node = self.node(at);
        let mut changed = node.changed();
        soon("the member knows the host", async {
            while !node.read(|state| state.host(host).is_some()) {
                changed.changed().await.expect("the controller runs");
            }
        })
        .await;
    }

    pub async fn stop_all(&mut self) {
        for at in self.running().collect::<Vec<_>>() {
            self.stop(at).await;
        }
    }
}

pub fn register(host: &str) -> v1::Command {
    let spec = v1::HostSpec {
        name: host.to_owned(),
        agent_addr: "127.0.0.1:7101".to_owned(),
        migration_ip: "127.0.0.1".to_owned(),
        capacity: Some(v1::HostCapacity {
            cpus: 2,
            memory_mib: 4096,
        }),
        version: "0.1.0".to_owned(),
        device_model: 1,
        boot_id: "boot-1".to_owned(),
        ..Default::default()
    };
    v1::Command {
        request_id: format!("register-{host}"),
        caller: format!("host/{host}"),
        kind: Some(Kind::RegisterHost(spec)),
        ..Default::default()
    }
}

/// Whether a fault is a `no_leader`, with its words.
pub fn no_leader<T: std::fmt::Debug>(result: Result<T, Fault>) -> String {
    let fault = result.expect_err("it does not lead");
    assert_eq!(fault.code, drover_proto::Code::NoLeader);
    fault.message
}
