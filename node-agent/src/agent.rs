//! The agent as a whole: what its tasks share, and how they are started.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use drover_pki::{Credentials, PkiError, Role};
use drover_proto::v1::agent_server::AgentServer;
use drover_proto::v1::{HostSpec, Settings};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::config::Config;
use crate::console::Console;
use crate::controllers::Controllers;
use crate::host::store::{Store, StoreError};
use crate::key::Key;
use crate::loops::{self, Grants};
use crate::network::Networks;
use crate::sandbox::Sandbox;
use crate::supervisor::Supervisor;
use crate::vmm::Link;
use crate::{DEVICE_MODEL, inventory};

/// News that may wait for the supervisor; whoever has more waits.
const EVENTS_MAX: usize = 256;
/// Volumes that are filled from images at once.
const FILLS_AT_ONCE: usize = 2;

/// What the agent's tasks share.
pub struct Context {
    /// The configuration.
    pub config: Config,
    /// The controllers.
    pub controllers: Controllers,
    /// Markers and folders.
    pub store: Mutex<Store>,
    /// The VMMs that can be asked.
    pub links: Mutex<BTreeMap<Key, Arc<Link>>>,
    /// The cluster's settings, once registered.
    pub settings: watch::Sender<Option<Settings>>,
    /// What VMs' NICs hang on.
    pub networks: Networks,
    /// The VMMs' sandbox.
    pub sandbox: Sandbox,
    /// The contents that are to be filled from images here, by their numbers: what is not among them any more is given up.
    pub fills: Arc<Mutex<BTreeSet<u64>>>,
    /// A turn for each that is filled at once: others wait, so that the storage, and the agent's threads, are there for VMs.
    pub filling: Semaphore,
    /// The newest answered heartbeat.
    pub grants: watch::Sender<Grants>,
    /// Asks for a heartbeat out of turn.
    pub heartbeat_now: Notify,
    /// Asks for the host to be registered again.
    pub register_again: Notify,
    /// This boot of the kernel.
    pub boot_id: String,
}

/// Why an agent could not be started.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its certificate or key is not usable.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// Its certificate is another's.
    #[error("tls.cert: it is of {found}: want the one of host {name:?}")]
    Identity {
        /// Who the certificate is of.
        found: String,
        /// This host's name.
        name: String,
    },
    /// Its folder is not usable.
    #[error("data_dir: {0}")]
    Store(#[from] StoreError),
    /// The address is taken or not this machine's.
    #[error("listen: {addr}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM's program is not there.
    #[error("vmm: {0}: no such program")]
    Vmm(std::path::PathBuf),
    /// The host could not be measured.
    #[error("the host cannot be measured")]
    Measure(#[source] io::Error),
    /// KVM is missing.
    #[error(
        "/dev/kvm cannot be used: load the module kvm_intel or kvm_amd, and run the agent as a user who may open it"
    )]
    Kvm(#[source] kvm_ioctls::Error),
    /// The transport refused its settings.
    #[error("transport")]
    Transport(#[from] tonic::transport::Error),
}

/// A running agent. Dropping it ends the agent and leaves its VMMs running.
pub struct Agent {
    addr: SocketAddr,
    tasks: JoinSet<()>,
}

impl Agent {
    /// Checks everything that can be checked at once, takes over the VMMs it finds, and starts.
    pub async fn start(config: Config) -> Result<Self, AgentError> {
        let credentials = Credentials::load(&config.tls, &config.cluster_id)?;
        let identity = credentials.identity();
        if identity.role != Role::Host || identity.name != config.name {
            return Err(AgentError::Identity {
                found: identity.to_string(),
                name: config.name,
            });
        }
        if !config.vmm.is_file() {
            return Err(AgentError::Vmm(config.vmm));
        }
        let (store, found) = Store::open(&config.data_dir)?;
        let unusable = |source| AgentError::Listen {
            addr: config.listen,
            source,
        };
        let listener = TcpListener::bind(config.listen).await.map_err(unusable)?;
        let addr = listener.local_addr().map_err(unusable)?;
        let spec = host_spec(&config, addr)?;
        let context = Arc::new(Context {
            controllers: Controllers::new(&config.controllers, &credentials)?,
            store: Mutex::new(store),
            links: Mutex::default(),
            settings: watch::Sender::new(None),
            networks: Networks::new(&config).await,
            fills: Arc::default(),
            filling: Semaphore::new(FILLS_AT_ONCE),
            grants: watch::Sender::default(),
            heartbeat_now: Notify::new(),
            register_again: Notify::new(),
            boot_id: spec.boot_id.clone(),
            sandbox: Sandbox::of(&config),
            config,
        });
        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let server = Server::builder()
            .tls_config(credentials.tonic_server())?
            .add_service(AgentServer::new(Console::new(context.clone())))
            .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
        let supervisor = Supervisor::new(context.clone(), found, events.clone(), inbox);
        let mut tasks = JoinSet::new();
        tasks.spawn(loops::heartbeat(context.clone()));
        tasks.spawn(loops::register(context.clone(), spec));
        tasks.spawn(loops::watch_desired(context.clone(), events));
        tasks.spawn(supervisor.run());
        // Only now: the supervisor has taken over the VMMs that live, whose devices stay.
        tasks.spawn(async move { context.networks.keep().await });
        tasks.spawn(async move {
            if let Err(error) = server.await {
                tracing::error!("the Agent service ended: {error}");
            }
        });
        tracing::info!(%addr, "the agent listens");
        Ok(Self { addr, tasks })
    }

    /// Where the Agent service listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Resolves when a task that never ends has ended: the agent is broken then.
    pub async fn broken(&mut self) -> String {
        match self.tasks.join_next().await {
            Some(Err(error)) => format!("a task of the agent failed: {error}"),
            _ => "a task of the agent ended".to_owned(),
        }
    }
}

fn host_spec(config: &Config, addr: SocketAddr) -> Result<HostSpec, AgentError> {
    let mut advertise = config.advertise;
    if advertise.port() == 0 {
        advertise.set_port(addr.port());
    }
    Ok(HostSpec {
        name: config.name.clone(),
        agent_addr: advertise.to_string(),
        migration_ip: config.migration_ip.to_string(),
        capacity: Some(inventory::capacity(config.memory_mib, config.cpus).map_err(AgentError::Measure)?),
        cpu_features: inventory::cpu_features().map_err(AgentError::Measure)?,
        kvm_caps: inventory::kvm_caps().map_err(AgentError::Kvm)?,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        device_model: DEVICE_MODEL,
        images: Vec::new(),
        vmm: None,
        boot_id: inventory::boot_id().map_err(AgentError::Measure)?,
        post_copy: String::new(),
        pools: config.pools.keys().cloned().collect(),
        // Filled in before each registration.
        networks: Vec::new(),
        vxlan: String::new(),
        networking: String::new(),
        sandbox: String::new(),
        seeds: true,
        unplugs: true,
        numbers: true,
        snapshots: true,
    })
}
