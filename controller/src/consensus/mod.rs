//! The replicated log, as the rest of the controller sees it: propose a command, know that a read is current, read,
//! and hear of changes. The only user of openraft; none of its types leaves this module.
//!
//! ```text
//!   propose ─▶ openraft ─▶ Log (drover_storage) ──────▶ disk
//!                 │  ▲
//!                 │  └── Network ◀── mutual TLS ──▶ RaftService of the peers
//!                 ▼
//!              Machine ─▶ drover_state::apply ─▶ State ─▶ read, changed
//! ```
//!
//! See docs/consensus.md.

mod lead;
mod linear;
mod log;
mod machine;
mod network;
mod service;
mod types;
mod wire;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex as StdMutex, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use drover_pki::Credentials;
use drover_proto::v1::raft_server::RaftServer;
use drover_proto::{Code, Fault, v1};
use drover_state::State;
use drover_storage::LogStore;
use openraft::error::ClientWriteError;
use openraft::{ServerState, SnapshotPolicy};
use prost::Message;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

pub use self::service::RaftService;

use self::linear::Rounds;
use self::log::Log;
use self::machine::{Machine, Shared};
use self::network::{Network, Reach, SNAPSHOT_PIECE_BYTES};
use self::types::{Address, Metrics, Proposal, Raft};

/// Largest command, bytes. Several fit one message to a follower.
const COMMAND_BYTES_MAX: usize = 1 << 20;
/// A proposal that is not committed by then is reported as of unknown outcome.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Entries that one message to a follower carries.
const ENTRIES_PER_MESSAGE: u64 = 256;
/// A follower may take this long for one piece of a snapshot: the last one is made durable before it answers.
const SNAPSHOT_PIECE_TIMEOUT_MS: u64 = 10_000;
/// How long a shutdown waits for openraft's tasks to let go of the store.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);
const RELEASE_POLL: Duration = Duration::from_millis(2);

/// A controller, as the membership in the log names it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Its id in the Raft group.
    pub id: u64,
    /// Its name; its certificate is for `<name>.controller.drover`.
    pub name: String,
    /// `ip:port` where it listens.
    pub addr: String,
}

/// What `GetCluster` tells of the Raft group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// The current term.
    pub term: u64,
    /// The log is applied up to this index on this member.
    pub applied: u64,
    /// The entries up to this index are gone from this member's log: a snapshot stands for them. 0: none.
    pub purged: u64,
    /// The leader, if one is known here.
    pub leader: Option<Peer>,
    /// Every member with its role; `matched` and "unreachable" only where the leader answers.
    pub members: Vec<v1::Member>,
}

/// Raft's timing and housekeeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// The leader says that it is there this often.
    pub heartbeat_ms: u64,
    /// A follower that hears nothing for a random time between these two stands for election.
    pub election_min_ms: u64,
    /// See [`Self::election_min_ms`].
    pub election_max_ms: u64,
    /// A snapshot is made every so many entries.
    pub snapshot_every: u64,
    /// Entries kept behind a snapshot, for followers that are a little late.
    pub entries_kept: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            heartbeat_ms: 150,
            election_min_ms: 900,
            election_max_ms: 1800,
            snapshot_every: 5_000,
            entries_kept: 1_000,
        }
    }
}

/// All that a member needs to take part.
pub struct Member {
    /// Itself; one of `members`.
    pub me: Peer,
    /// The first membership. Ignored once the cluster is formed: then the log holds it.
    pub members: Vec<Peer>,
    /// The cluster's id.
    pub cluster_id: String,
    /// The settings that a new cluster starts with; the defaults when absent.
    pub settings: Option<v1::Settings>,
    /// Timing.
    pub tuning: Tuning,
    /// Its certificate.
    pub credentials: Arc<Credentials>,
    /// Its memory.
    pub store: Arc<dyn LogStore>,
}

/// A handle on the replicated log. Cheap to clone.
#[derive(Clone)]
pub struct Consensus {
    inner: Arc<Inner>,
}

struct Inner {
    me: Peer,
    members: Vec<Peer>,
    cluster_id: String,
    tuning: Tuning,
    raft: Raft,
    shared: Arc<Shared>,
    rounds: Rounds,
    proposer: Proposer,
    leading: watch::Receiver<Option<u64>>,
    reach: Arc<Reach>,
    store: Weak<dyn LogStore>,
    tasks: StdMutex<JoinSet<()>>,
}

impl Consensus {
    /// Opens the log, takes up the part this member had in the cluster, and forms the cluster if that falls to it.
    ///
    /// # Errors
    /// A store that cannot be read, or settings that make no sense: `internal`, for whoever starts the process.
    pub async fn start(member: Member) -> Result<Self, Fault> {
        let broken = |what: &str, error: &dyn std::fmt::Display| {
            Fault::new(Code::Internal, format!("{what}: {error}"))
        };
        let config = Arc::new(raft_config(&member).map_err(|error| broken("raft settings", &error))?);
        let machine = Machine::open(member.store.clone()).map_err(|error| broken("the snapshot", &error))?;
        let shared = machine.shared();
        check_cluster(&shared, &member.cluster_id)?;
        let reach = Arc::new(Reach::default());
        let network = Network::new(member.credentials, reach.clone());
        let log = Log::new(member.store.clone());
        let raft = Raft::new(member.me.id, config, network, log, machine)
            .await
            .map_err(|error| broken("the log", &error))?;

        let mut tasks = JoinSet::new();
        let (rounds, serve_rounds) = Rounds::new(raft.clone());
        tasks.spawn(serve_rounds);
        let proposer = Proposer::new(raft.clone(), shared.clone());
        let (publish, leading) = watch::channel(None);
        let forming = lead::Forming {
            me: member.me.clone(),
            members: member.members.clone(),
            init: v1::InitCluster {
                cluster_id: member.cluster_id.clone(),
                settings: member.settings,
            },
        };
        forming.begin(&raft).await?;
        tasks.spawn(lead::watch(
            forming,
            raft.clone(),
            rounds.clone(),
            proposer.clone(),
            publish,
        ));
        let inner = Inner {
            me: member.me,
            members: member.members,
            cluster_id: member.cluster_id,
            tuning: member.tuning,
            raft,
            shared,
            rounds,
            proposer,
            leading,
            reach,
            store: Arc::downgrade(&member.store),
            tasks: StdMutex::new(tasks),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Replicates `command` and returns what applying it answered. Stamps `now_ms`.
    ///
    /// # Errors
    /// `no_leader` when this member does not lead (the message names the leader) or no quorum answers in time: then the
    /// outcome is unknown, and the same `request_id` may be sent again. Else the refusal of `apply`, code and field kept.
    pub async fn propose(&self, command: v1::Command) -> Result<v1::CommandResponse, Fault> {
        self.inner.proposer.propose(command).await
    }

    /// Returns once [`Self::read`] on this member sees everything that was committed before this call. Concurrent
    /// callers share one round, which started after each of them called.
    ///
    /// # Errors
    /// `no_leader` when this member does not lead, or could not confirm in time that it does.
    pub async fn linearize(&self) -> Result<(), Fault> {
        self.inner.rounds.linearize().await
    }

    /// Reads the state as applied on this member. `look` must be short: applying waits for it.
    pub fn read<R>(&self, look: impl FnOnce(&State) -> R) -> R {
        self.inner.shared.read(look)
    }

    /// The applied index; changes with every batch of entries applied.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.inner.shared.index()
    }

    /// Whether this member believes that it leads. [`Self::linearize`] makes sure of it.
    pub fn is_leader(&self) -> bool {
        lead::leading_term(&self.inner.raft.metrics().borrow()).is_some()
    }

    /// The term this member leads in, else `None`. Set only after it has applied all that earlier leaders committed, and
    /// the cluster is formed.
    pub fn leadership(&self) -> watch::Receiver<Option<u64>> {
        self.inner.leading.clone()
    }

    /// The leader, if one is known here.
    pub fn leader(&self) -> Option<Peer> {
        leader_of(&self.inner.raft.metrics().borrow())
    }

    /// This member.
    pub fn me(&self) -> &Peer {
        &self.inner.me
    }

    /// What `GetCluster` tells.
    pub fn status(&self) -> Status {
        let metrics = self.inner.raft.metrics().borrow().clone();
        let applied = metrics.last_applied.map_or(0, |last| last.index);
        let purged = metrics.purged.map_or(0, |purged| purged.index);
        let leader = leader_of(&metrics);
        let membership = metrics.membership_config.membership();
        let mut peers: Vec<Peer> = membership.nodes().map(|(&id, node)| peer(id, node)).collect();
        if peers.is_empty() {
            peers.clone_from(&self.inner.members);
        }
        let member = |peer: Peer| v1::Member {
            role: self.role(&metrics, &peer).to_owned(),
            matched: self.matched(&metrics, peer.id),
            id: peer.id,
            name: peer.name,
            addr: peer.addr,
        };
        let members = peers.into_iter().map(member).collect();
        Status {
            term: metrics.current_term,
            applied,
            purged,
            leader,
            members,
        }
    }

    fn role(&self, metrics: &Metrics, peer: &Peer) -> &'static str {
        let leading = metrics.state == ServerState::Leader;
        let window = Duration::from_millis(self.inner.tuning.election_max_ms);
        match metrics.current_leader == Some(peer.id) {
            true => "leader",
            false if leading && !self.inner.reach.within(peer.id, window) => "unreachable",
            false => "follower",
        }
    }

    fn matched(&self, metrics: &Metrics, id: u64) -> u64 {
        if id == self.inner.me.id {
            return metrics.last_log_index.unwrap_or(0);
        }
        let replicated = metrics
            .replication
            .as_ref()
            .and_then(|replication| replication.get(&id).copied());
        replicated.flatten().map_or(0, |id| id.index)
    }

    /// The `Raft` service, for the peers.
    pub fn raft_service(&self) -> RaftServer<RaftService> {
        let names = self
            .inner
            .members
            .iter()
            .map(|member| member.name.clone())
            .collect();
        RaftService::server(self.inner.raft.clone(), self.inner.cluster_id.clone(), names)
    }

    /// Has this member stand for election at once. For tests and for moving the lead.
    ///
    /// # Errors
    /// `no_leader` when this member has stopped.
    pub async fn elect(&self) -> Result<(), Fault> {
        let stopped = |error| Fault::new(Code::NoLeader, format!("this controller has stopped: {error}"));
        self.inner.raft.trigger().elect().await.map_err(stopped)
    }

    /// Returns when this member cannot go on: its disk failed. The process should end; what it acknowledged is safe.
    pub async fn failed(&self) -> Fault {
        let mut metrics = self.inner.raft.metrics();
        let stopped = metrics.wait_for(|metrics| metrics.running_state.is_err()).await;
        let why = match stopped.map(|metrics| metrics.running_state.clone()) {
            Ok(Err(error)) => error.to_string(),
            _ => "it was stopped".to_owned(),
        };
        Fault::new(Code::Internal, format!("Raft has stopped: {why}"))
    }

    /// Stops taking part and lets go of the store, which can be opened again afterwards.
    pub async fn shutdown(&self) {
        let mut tasks = std::mem::take(&mut *self.inner.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::warn!("Raft did not stop cleanly: {error}");
        }
        let released = async {
            while self.inner.store.strong_count() > 0 {
                sleep(RELEASE_POLL).await;
            }
        };
        if timeout(RELEASE_TIMEOUT, released).await.is_err() {
            tracing::warn!("the store is still in use after the shutdown");
        }
    }
}

/// Puts commands into the log, their time stamps in order.
#[derive(Clone)]
pub(crate) struct Proposer {
    raft: Raft,
    shared: Arc<Shared>,
    order: Arc<Mutex<()>>,
}

impl Proposer {
    fn new(raft: Raft, shared: Arc<Shared>) -> Self {
        Self {
            raft,
            shared,
            order: Arc::default(),
        }
    }

    async fn propose(&self, mut command: v1::Command) -> Result<v1::CommandResponse, Fault> {
        let bytes = command.encoded_len();
        if bytes > COMMAND_BYTES_MAX {
            let message = format!("the request has {bytes} bytes; at most {COMMAND_BYTES_MAX} are possible");
            return Err(Fault::new(Code::InvalidArgument, message));
        }
        let stopped = |error: &dyn std::fmt::Display| {
            Fault::new(Code::NoLeader, format!("this controller has stopped: {error}"))
        };
        let answer = {
            // Stamped and queued as one step: times in the log never go back.
            let _order = self.order.lock().await;
            command.now_ms = self.shared.stamp(wall_ms());
            self.raft
                .client_write_ff(Proposal(command))
                .await
                .map_err(|error| stopped(&error))?
        };
        match timeout(PROPOSE_TIMEOUT, answer).await {
            Ok(Ok(Ok(written))) => drover_state::into_result(written.data.0),
            Ok(Ok(Err(ClientWriteError::ForwardToLeader(to)))) => Err(not_leader(to.leader_node.as_ref())),
            Ok(Ok(Err(ClientWriteError::ChangeMembershipError(error)))) => {
                Err(Fault::new(Code::Internal, error.to_string()))
            }
            Ok(Err(error)) => Err(stopped(&error)),
            Err(_) => Err(Fault::new(
                Code::NoLeader,
                format!(
                    "no majority of the controllers answered within {} s: the outcome is unknown; send the same request \
                     id again",
                    PROPOSE_TIMEOUT.as_secs()
                ),
            )),
        }
    }
}

fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn peer(id: u64, node: &Address) -> Peer {
    Peer {
        id,
        name: node.name.clone(),
        addr: node.addr.clone(),
    }
}

fn leader_of(metrics: &Metrics) -> Option<Peer> {
    let id = metrics.current_leader?;
    let node = metrics.membership_config.membership().get_node(&id)?;
    Some(peer(id, node))
}

fn not_leader(leader: Option<&Address>) -> Fault {
    let message = match leader {
        Some(leader) => format!(
            "this controller does not lead; {} at {} does",
            leader.name, leader.addr
        ),
        None => "no controller leads at present; try again".to_owned(),
    };
    Fault::new(Code::NoLeader, message)
}

fn check_cluster(shared: &Shared, cluster_id: &str) -> Result<(), Fault> {
    let stored = shared.read(|state| state.cluster_id().to_owned());
    if stored.is_empty() || stored == cluster_id {
        return Ok(());
    }
    let message = format!("cluster_id is {cluster_id:?}, but the data folder is of the cluster {stored:?}");
    Err(Fault::new(Code::InvalidArgument, message).field("cluster_id"))
}

fn raft_config(member: &Member) -> Result<openraft::Config, openraft::ConfigError> {
    let tuning = &member.tuning;
    openraft::Config {
        cluster_name: member.cluster_id.clone(),
        heartbeat_interval: tuning.heartbeat_ms,
        election_timeout_min: tuning.election_min_ms,
        election_timeout_max: tuning.election_max_ms,
        install_snapshot_timeout: SNAPSHOT_PIECE_TIMEOUT_MS,
        max_payload_entries: ENTRIES_PER_MESSAGE,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(tuning.snapshot_every),
        snapshot_max_chunk_size: SNAPSHOT_PIECE_BYTES,
        max_in_snapshot_log_to_keep: tuning.entries_kept,
        ..openraft::Config::default()
    }
    .validate()
}

fn first_membership(members: &[Peer]) -> BTreeMap<u64, Address> {
    let node = |peer: &Peer| {
        (
            peer.id,
            Address {
                name: peer.name.clone(),
                addr: peer.addr.clone(),
            },
        )
    };
    members.iter().map(node).collect()
}
