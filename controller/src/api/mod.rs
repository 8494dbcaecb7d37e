//! The services that clients (`Controller`) and agents (`Fleet`) call.
//!
//! | file | what |
//! | --- | --- |
//! | `caller` | who calls, and what the role may do |
//! | `on_leader` | answer here or pass on to the leader |
//! | `channels` | connections to controllers and agents |
//! | `clients` | the service `Controller` |
//! | `console` | its console calls, which go on to an agent |
//! | `fleet` | the service `Fleet` |
//! | `forecast` | dry runs of migrations, which go on to an agent as well |
//! | `snapshots` | snapshots and restores, and how far they are |
//! | `leases`, `progress` | what only the leader's memory holds; the reconcilers read both |
//!
//! Handlers are thin: the form and the meaning of a request are checked by `apply`, which every replica runs. What a
//! handler adds is who asks, where the answer is made, and how long it waits.

mod caller;
mod channels;
mod clients;
mod console;
mod fleet;
pub mod forecast;
pub mod leases;
mod on_leader;
pub mod progress;
pub mod snapshots;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use drover_pki::Credentials;
use drover_proto::v1::controller_server::ControllerServer;
use drover_proto::v1::fleet_server::FleetServer;

use self::channels::Channels;
use self::forecast::Forecasts;
use self::leases::Leases;
use self::progress::ProgressTable;
use self::snapshots::SnapshotTable;
use crate::consensus::Consensus;
use crate::metrics::Finished;

/// Bytes of one request of a client: the largest holds 64 KiB for a console.
const CLIENT_BYTES_MAX: usize = 256 << 10;
/// Bytes of one request of an agent: the largest is a registration with all its images.
const FLEET_BYTES_MAX: usize = 4 << 20;
/// The longest that a request is held.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// What the leader keeps in its memory only. The reconcilers share it with the services.
#[derive(Debug, Default)]
pub struct LeaderMemory {
    /// When each host was last heard of.
    pub leases: Leases,
    /// How far each migration has come.
    pub progress: ProgressTable,
    /// How far each snapshot and restore has come.
    pub snapshots: SnapshotTable,
    /// What dry runs expected lately.
    pub forecasts: Forecasts,
    /// How many migrations ended, and how, while this controller led.
    pub finished: Finished,
}

/// The services `Controller` and `Fleet`. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    consensus: Consensus,
    cluster: String,
    memory: Arc<LeaderMemory>,
    channels: Channels,
    ids: AtomicU64,
    ids_prefix: String,
}

impl Api {
    /// Services over `consensus`, of the cluster that `credentials` are of.
    pub fn new(consensus: Consensus, credentials: Arc<Credentials>, memory: Arc<LeaderMemory>) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let ids_prefix = format!("{}-{:x}", consensus.me().name, started.as_nanos());
        Self {
            shared: Arc::new(Shared {
                cluster: credentials.identity().cluster.clone(),
                channels: Channels::new(credentials),
                consensus,
                memory,
                ids: AtomicU64::new(0),
                ids_prefix,
            }),
        }
    }

    /// The service that clients call, its requests bounded.
    pub fn controller(&self) -> ControllerServer<Self> {
        ControllerServer::new(self.clone()).max_decoding_message_size(CLIENT_BYTES_MAX)
    }

    /// The service that agents call, its requests bounded.
    pub fn fleet(&self) -> FleetServer<Self> {
        FleetServer::new(self.clone()).max_decoding_message_size(FLEET_BYTES_MAX)
    }
}

impl Shared {
    /// A request without an id gets one here, before it may be forwarded, so that a repetition on the way is recognised.
    fn ensure_id(&self, request_id: &mut String) {
        if request_id.is_empty() {
            let number = self.ids.fetch_add(1, Ordering::Relaxed);
            *request_id = format!("{}-{number}", self.ids_prefix);
        }
    }
}

/// How long a request asks to be held, bounded.
fn wait_of(wait_ms: u32) -> Duration {
    Duration::from_millis(wait_ms.into()).min(WAIT_MAX)
}

/// Unix milliseconds.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Waits at a pause point without blocking the runtime. Nothing in a build without the feature `chaos`.
pub(crate) async fn reach(name: &'static str) {
    if cfg!(feature = "chaos") {
        // The task only fails when the runtime ends, and then nothing waits here any more.
        let _ = tokio::task::spawn_blocking(move || drover_points::reach(name)).await;
    }
}
