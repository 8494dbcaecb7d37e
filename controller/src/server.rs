//! The controller's process: opens the store, joins the cluster, serves, and stops cleanly.
//!
//! ```text
//! start: certificate ─▶ data folder (whose is it?) ─▶ store ─▶ consensus ─▶ reconcilers ─▶ listen
//! stop:  reconcilers ─▶ no new connections, open calls get a moment ─▶ consensus ─▶ store
//! ```

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use drover_pki::{Credentials, Identity, Role};
use drover_proto::Fault;
use drover_storage::RocksStore;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::api::{Api, LeaderMemory};
use crate::config::Config;
use crate::consensus::{Consensus, Member};
use crate::{metrics, reconcile};

/// The file in the data folder that says whose it is.
const OWNER_FILE: &str = "member.json";
/// Open calls get this long to end when the process stops; long polls are cut off.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);
/// A client that is gone without a word is noticed by then.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Calls under way on one connection: a peer forwards the long polls of all its agents over one.
const STREAMS_PER_CONNECTION_MAX: u32 = 4096;

/// A running controller.
pub struct Controller {
    consensus: Consensus,
    reconcilers: JoinSet<()>,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Controller {
    /// Starts a controller that listens where its configuration says.
    ///
    /// # Errors
    /// What keeps it from starting, for the person who starts it.
    pub async fn start(config: &Config) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(config.listen)
            .await
            .with_context(|| format!("listen is {}: the address cannot be bound", config.listen))?;
        Self::start_on(config, listener).await
    }

    /// Starts a controller on a listener that exists.
    ///
    /// # Errors
    /// As [`Controller::start`].
    pub async fn start_on(config: &Config, listener: TcpListener) -> anyhow::Result<Self> {
        let credentials = Arc::new(credentials(config)?);
        claim(config)?;
        let folder = config.data_dir.join("raft");
        let store = tokio::task::spawn_blocking(move || RocksStore::open(&folder)).await??;
        let consensus = Consensus::start(Member {
            me: config.me(),
            members: config.peers(),
            cluster_id: config.cluster_id.clone(),
            settings: config.settings(),
            tuning: config.tuning(),
            credentials: credentials.clone(),
            store: Arc::new(store),
        })
        .await?;

        let memory = Arc::new(LeaderMemory::default());
        let api = Api::new(consensus.clone(), credentials.clone(), memory.clone());
        let reconcilers = reconcile::spawn(&consensus, &memory);

        let (stop, stopped) = oneshot::channel();
        let services = Routes::new(consensus.raft_service())
            .add_service(api.controller())
            .add_service(api.fleet());
        let metrics = metrics::route(&config.cluster_id, &consensus, &memory);
        let routes = services.into_axum_router().merge(metrics);
        let router = Server::builder()
            .tls_config(credentials.tonic_server())
            .context("the certificate cannot be served")?
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
            .add_routes(Routes::from(routes));
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let serving = tokio::spawn(router.serve_with_incoming_shutdown(incoming, async {
            let _ = stopped.await;
        }));
        tracing::info!(name = config.name, id = config.id, listen = %config.listen, "controller started");
        Ok(Self {
            consensus,
            reconcilers,
            stop: Some(stop),
            serving,
        })
    }

    /// The replicated log of this controller.
    pub fn consensus(&self) -> &Consensus {
        &self.consensus
    }

    /// Returns when the controller cannot go on.
    pub async fn failed(&mut self) -> Fault {
        self.consensus.failed().await
    }

    /// Stops serving and leaves the cluster to the others. The data folder can be opened again afterwards.
    pub async fn stop(mut self) {
        self.reconcilers.shutdown().await;
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        match timeout(DRAIN_TIMEOUT, &mut self.serving).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::warn!("serving ended with: {error}"),
            Ok(Err(error)) => tracing::error!("serving ended with: {error}"),
            Err(_) => {
                self.serving.abort();
                let _ = (&mut self.serving).await;
            }
        }
        self.consensus.shutdown().await;
        tracing::info!(name = self.consensus.me().name, "controller stopped");
    }
}

fn credentials(config: &Config) -> anyhow::Result<Credentials> {
    let credentials = Credentials::load(&config.tls, &config.cluster_id)?;
    let Identity { role, name, .. } = credentials.identity();
    if *role != Role::Controller || *name != config.name {
        bail!(
            "tls.cert is of {}; want a certificate of the controller {}",
            credentials.identity(),
            config.name
        );
    }
    Ok(credentials)
}

/// Whose a data folder is.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    cluster_id: String,
    id: u64,
}

/// Makes the data folder, or makes sure that it is this member's: two members with one memory, or one member with
/// another's, would break what the votes in it promise.
fn claim(config: &Config) -> anyhow::Result<()> {
    let folder = &config.data_dir;
    let owner = Owner {
        cluster_id: config.cluster_id.clone(),
        id: config.id,
    };
    // Users' secrets are in the log.
    let mut private = std::fs::DirBuilder::new();
    private.recursive(true).mode(0o700);
    private
        .create(folder)
        .with_context(|| format!("data_dir is {}", folder.display()))?;
    let file = folder.join(OWNER_FILE);
    let found = match std::fs::read(&file) {
        Ok(found) => found,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return mark(folder, &owner),
        Err(error) => return Err(error).with_context(|| file.display().to_string()),
    };
    let found: Owner = serde_json::from_slice(&found).with_context(|| file.display().to_string())?;
    if found != owner {
        bail!(
            "data_dir is {}, which belongs to the controller {} of the cluster {:?}; this is the controller {} of {:?}",
            folder.display(),
            found.id,
            found.cluster_id,
            owner.id,
            owner.cluster_id
        );
    }
    Ok(())
}

fn mark(folder: &Path, owner: &Owner) -> anyhow::Result<()> {
    let write = || -> std::io::Result<()> {
        let staged = folder.join(format!("{OWNER_FILE}.new"));
        let file = std::fs::File::create(&staged)?;
        serde_json::to_writer(&file, owner)?;
        file.sync_all()?;
        std::fs::rename(&staged, folder.join(OWNER_FILE))?;
        std::fs::File::open(folder)?.sync_all()
    };
    write().with_context(|| format!("data_dir is {}: it cannot be written", folder.display()))
}
