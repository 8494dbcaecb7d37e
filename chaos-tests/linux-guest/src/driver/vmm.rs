//! One `drover-vmm` process and its control socket.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use drover_proto::v1::vmm_client::VmmClient;
use drover_proto::v1::{GrantRequest, OutcomeRequest, VmmInfo, VmmState, WatchInfoRequest};
use hyper_util::rt::TokioIo;
use nix::time::{ClockId, clock_gettime};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// How long a grant is good for: no test of leases, and the emulated host stalls at times.
const LEASE: Duration = Duration::from_secs(60);
const RENEW_PERIOD: Duration = Duration::from_secs(5);
const SOCKET_MAX: Duration = Duration::from_secs(60);
const SOCKET_RETRY: Duration = Duration::from_millis(50);
const WATCH_WAIT_MS: u32 = 5000;
const END_MAX: Duration = Duration::from_secs(60);

/// A running VMM; it is killed when this is dropped.
pub struct Vmm {
    process: Child,
    client: VmmClient<Channel>,
    renewing: Option<AbortHandle>,
}

impl Vmm {
    /// Starts a VMM in `folder` and waits until it answers.
    pub async fn start(folder: &Path, config: &serde_json::Value) -> Result<Self> {
        let path = folder.join("config.json");
        std::fs::write(&path, config.to_string()).with_context(|| format!("writing {}", path.display()))?;
        let log = std::fs::File::create(folder.join("vmm.log")).context("creating the VMM's log")?;
        let process = Command::new("/bin/drover-vmm")
            .arg("--config")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .context("starting drover-vmm")?;
        let client = VmmClient::new(connect(folder.join("vmm.sock")));
        let mut vmm = Self {
            process,
            client,
            renewing: None,
        };
        let deadline = Instant::now() + SOCKET_MAX;
        while let Err(status) = vmm.client.watch_info(WatchInfoRequest::default()).await {
            if let Some(ended) = vmm.process.try_wait()? {
                bail!("drover-vmm ended at once: {ended}");
            }
            if Instant::now() > deadline {
                bail!("drover-vmm does not answer on its socket: {status}");
            }
            sleep(SOCKET_RETRY).await;
        }
        Ok(vmm)
    }

    /// Its control socket.
    pub fn client(&self) -> VmmClient<Channel> {
        self.client.clone()
    }

    /// Waits until the VMM says what `wanted` accepts. A failed VMM or migration ends the waiting.
    pub async fn until(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&VmmInfo) -> bool,
    ) -> Result<VmmInfo> {
        let deadline = Instant::now() + limit;
        let mut seen = VmmInfo::default();
        loop {
            let request = WatchInfoRequest {
                seen_seq: seen.seq,
                wait_ms: WATCH_WAIT_MS,
            };
            let Ok(answer) = timeout_at(deadline, self.client.watch_info(request)).await else {
                bail!("waited {limit:?} for {what}; the VMM says {seen:?}");
            };
            seen = answer
                .with_context(|| format!("waiting for {what}"))?
                .into_inner();
            if wanted(&seen) {
                return Ok(seen);
            }
            let failed = seen
                .migration
                .as_ref()
                .is_some_and(|migration| migration.failure.is_some());
            if failed || matches!(seen.state(), VmmState::Failed | VmmState::Exited) {
                bail!("while waiting for {what}: {seen:?}");
            }
        }
    }

    /// Gives the right to run, once.
    pub async fn grant(&self, epoch: u64) -> Result<()> {
        give(self.client(), epoch).await
    }

    /// Gives the right to run again and again.
    pub fn renew(&mut self, epoch: u64) {
        let client = self.client();
        let renewing = tokio::spawn(async move {
            loop {
                if let Err(error) = give(client.clone(), epoch).await {
                    println!("grant for epoch {epoch}: {error:#}");
                }
                sleep(RENEW_PERIOD).await;
            }
        });
        self.renewing = Some(renewing.abort_handle());
    }

    /// Lets the right to run expire.
    pub fn stop_renewing(&mut self) {
        if let Some(renewing) = self.renewing.take() {
            renewing.abort();
        }
    }

    /// Kills the process, and waits until it has given back all that it had.
    pub async fn kill(mut self) -> Result<()> {
        self.stop_renewing();
        self.process.kill().await.context("killing drover-vmm")
    }

    /// Tells a source how its migration ended. A source that is gone before it could answer has heard it.
    pub async fn outcome(&mut self, migration: &str, committed: bool) -> Result<()> {
        let request = OutcomeRequest {
            migration: migration.to_owned(),
            committed,
        };
        match self.client.outcome(request).await {
            Ok(_) => Ok(()),
            Err(_) if self.ends_by_itself().await => Ok(()),
            Err(status) => Err(status.into()),
        }
    }

    /// Whether the process ends, with success, without being told again.
    pub async fn ends_by_itself(&mut self) -> bool {
        matches!(timeout(END_MAX, self.process.wait()).await, Ok(Ok(status)) if status.success())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.stop_renewing();
    }
}

fn connect(socket: PathBuf) -> Channel {
    let connect = service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The address is never resolved: the connector knows where to go.
    Endpoint::from_static("http://vmm.drover").connect_with_connector_lazy(connect)
}

/// `CLOCK_BOOTTIME`.
pub fn boottime() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_BOOTTIME)?.into())
}

async fn give(mut client: VmmClient<Channel>, epoch: u64) -> Result<()> {
    let deadline_boottime_ns = (boottime()? + LEASE).as_nanos().try_into()?;
    client
        .grant(GrantRequest {
            epoch,
            deadline_boottime_ns,
        })
        .await?;
    Ok(())
}
