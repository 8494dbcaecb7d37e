//! Our side: a `drover-vmm` with a configuration of its own, granted its lease and read over its control socket.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use drover_chaos_cluster::process::Daemon;
use drover_chaos_cluster::vmms::boottime_ns;
use drover_proto::v1::vmm_client::VmmClient;
use drover_proto::v1::{GrantRequest, ReadConsoleRequest, VmmState};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use super::{Bench, Given, MAC, Vm, await_path};
use crate::guest::Feed;

/// A lease that no run outlives.
const LEASE_NS: u64 = 3600 * 1_000_000_000;

/// How long one read of the console waits.
const WAIT_MS: u32 = 500;

/// A VMM listens within this time.
const SOCKET_LIMIT: Duration = Duration::from_secs(20);

/// Between two looks whether it does.
const LOOK_AGAIN: Duration = Duration::from_micros(200);

/// One `drover-vmm` with its VM.
pub struct Ours {
    daemon: Daemon,
    begun: Instant,
    /// Since then, until it listened.
    pub listens: Duration,
    /// Since then, until it had its lease.
    pub granted: Duration,
    console: Console,
}

struct Console {
    runtime: Runtime,
    client: VmmClient<Channel>,
    offset: u64,
}

impl Console {
    fn read(&mut self, wait_ms: u32) -> Result<Vec<u8>> {
        let request = ReadConsoleRequest {
            offset: self.offset,
            wait_ms,
            ..ReadConsoleRequest::default()
        };
        let answer = self.runtime.block_on(self.client.read_console(request))?;
        let answer = answer.into_inner();
        if answer.offset != self.offset {
            bail!(
                "the console has lost bytes: asked for {}, got {}",
                self.offset,
                answer.offset
            );
        }
        self.offset = answer.next_offset;
        Ok(answer.data)
    }
}

impl Feed for Console {
    fn pull(&mut self) -> Result<Vec<u8>> {
        self.read(WAIT_MS)
    }
}

fn config(folder: &Path, probe: &Path, given: &Given) -> Value {
    let disks: Vec<_> = given.disk.iter().map(|path| json!({"path": path})).collect();
    let nics: Vec<_> = given
        .tap
        .iter()
        .map(|tap| json!({"tap": tap, "mac": MAC}))
        .collect();
    json!({
        "cluster_id": "bench", "host": "host1", "vm": "bench", "epoch": 1, "vcpus": 1, "memory_mib": given.memory_mib,
        "kernel": probe, "initrd": null, "cmdline": given.parameters, "cpu_profile": "baseline",
        "socket": folder.join("vmm.sock"), "incoming": null, "disks": disks, "nics": nics,
        // Read when it moves, which it does not.
        "tls": {"ca": "ca.pem", "cert": "host1.pem", "key": "host1.key"},
    })
}

impl Ours {
    /// Starts the process and grants it its lease as soon as it listens.
    pub fn start(bench: &Bench<'_>, given: &Given) -> Result<Self> {
        let folder = bench.subfolder("ours")?;
        let file = folder.join("config.json");
        fs::write(&file, config(&folder, &bench.arguments.probe, given).to_string())
            .context("writing a configuration")?;
        let log = folder.join("log");
        let errors = fs::File::create(&log).context("making a log")?;
        let mut command = Command::new(bench.arguments.binaries.join("drover-vmm"));
        command
            .arg("--config")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting a runtime")?;
        let socket = folder.join("vmm.sock");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?;
        let begun = Instant::now();
        let daemon = Daemon::start(&bench.spawner, command)?;
        await_path(&socket, SOCKET_LIMIT, LOOK_AGAIN)
            .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
        let listens = begun.elapsed();
        let channel = runtime.block_on(async {
            // Bound a moment before it listens.
            loop {
                match endpoint.connect().await {
                    Ok(channel) => return Ok(channel),
                    Err(error) if begun.elapsed() > SOCKET_LIMIT => return Err(error),
                    Err(_) => {}
                }
            }
        })?;
        let mut client = VmmClient::new(channel);
        let grant = GrantRequest {
            epoch: 1,
            deadline_boottime_ns: boottime_ns() + LEASE_NS,
        };
        let info = runtime.block_on(client.grant(grant))?.into_inner();
        if info.state() != VmmState::Running {
            bail!(
                "the VM does not run: {:?}\n{}",
                info.reason,
                fs::read_to_string(&log).unwrap_or_default()
            );
        }
        Ok(Self {
            granted: begun.elapsed(),
            daemon,
            begun,
            listens,
            console: Console {
                runtime,
                client,
                offset: 0,
            },
        })
    }
}

impl Vm for Ours {
    fn pid(&self) -> Pid {
        self.daemon.pid()
    }

    fn first_byte(&mut self, limit: Duration) -> Result<Duration> {
        let wait_ms = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
        let bytes = self.console.read(wait_ms)?;
        let at = self.begun.elapsed();
        if bytes.is_empty() {
            bail!("the guest said nothing within {limit:?}");
        }
        // What is read again is the same.
        self.console.offset = 0;
        Ok(at)
    }

    fn console(&mut self) -> &mut dyn Feed {
        &mut self.console
    }
}
