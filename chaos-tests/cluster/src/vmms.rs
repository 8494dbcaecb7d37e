//! The VMMs themselves, asked past their agents: each has a folder under its agent's, with a Unix socket.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drover_proto::v1::vmm_client::VmmClient;
use drover_proto::v1::{VmmInfo, VmmState, WatchInfoRequest};
use nix::time::{ClockId, clock_gettime};
use tonic::transport::{Channel, Endpoint};

/// A VMM that does not answer by then is passed over in this look.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// One VMM as it was at one instant.
#[derive(Clone, Debug)]
pub struct SeenVmm {
    /// The number of its host, from 0.
    pub host: usize,
    /// Its folder.
    pub dir: PathBuf,
    /// What it said.
    pub info: VmmInfo,
    /// `CLOCK_BOOTTIME` before it was asked.
    pub asked_ns: u64,
}

impl SeenVmm {
    /// Whether its vCPUs execute, by its own word.
    pub fn runs(&self) -> bool {
        self.info.state() == VmmState::Running
    }
}

/// `CLOCK_BOOTTIME`, the clock of leases.
pub fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has this clock");
    let (seconds, rest) = (now.tv_sec().unsigned_abs(), now.tv_nsec().unsigned_abs());
    seconds * 1_000_000_000 + rest
}

/// The folders of VMMs of `vm` (all VMs if `None`) under an agent's data folder.
pub fn folders(data: &Path, vm: Option<&str>) -> Vec<PathBuf> {
    let list = |dir: &Path| -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(dir) else {
            return Vec::new();
        };
        let mut paths: Vec<_> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.is_dir())
            .collect();
        paths.sort();
        paths
    };
    let vms = match vm {
        Some(name) => vec![data.join("vms").join(name)],
        None => list(&data.join("vms")),
    };
    vms.iter().flat_map(|dir| list(dir)).collect()
}

/// Connections to the VMMs of all hosts.
pub struct Eyes {
    hosts: Vec<PathBuf>,
    open: HashMap<PathBuf, VmmClient<Channel>>,
}

impl Eyes {
    /// Looks into these agents' data folders.
    pub fn new(hosts: Vec<PathBuf>) -> Self {
        Self {
            hosts,
            open: HashMap::new(),
        }
    }

    /// Every VMM that answers, one after the other.
    pub async fn look(&mut self) -> Vec<SeenVmm> {
        let mut seen = Vec::new();
        for host in 0..self.hosts.len() {
            for dir in folders(&self.hosts[host], None) {
                seen.extend(self.ask(host, dir).await);
            }
        }
        seen
    }

    /// One VMM, if it answers.
    pub async fn ask(&mut self, host: usize, dir: PathBuf) -> Option<SeenVmm> {
        let socket = dir.join("vmm.sock");
        if !self.open.contains_key(&dir) {
            let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).ok()?;
            let channel = endpoint.timeout(ANSWER_TIMEOUT).connect().await.ok()?;
            self.open.insert(dir.clone(), VmmClient::new(channel));
        }
        let client = self.open.get_mut(&dir)?;
        let asked_ns = boottime_ns();
        match client
            .watch_info(WatchInfoRequest {
                seen_seq: 0,
                wait_ms: 0,
            })
            .await
        {
            Ok(answer) => Some(SeenVmm {
                host,
                dir,
                info: answer.into_inner(),
                asked_ns,
            }),
            Err(_) => {
                self.open.remove(&dir);
                None
            }
        }
    }
}
