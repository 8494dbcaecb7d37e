//! Forming the cluster, and telling the reconcilers when this member leads.
//!
//! ```text
//! None ── openraft says leader ──▶ confirming ── a linearizable round, InitCluster if the state is new ──▶ Some(term)
//!   ▲                                  │                                                                     │
//!   └──────────────────── openraft says not leader, or of another term ─────────────────────────────────────┘
//! ```

use std::time::Duration;

use drover_proto::v1::command::Kind;
use drover_proto::{Code, Fault, v1};
use openraft::ServerState;
use openraft::error::{InitializeError, RaftError};
use tokio::sync::watch;
use tokio::time::sleep;

use super::linear::Rounds;
use super::types::{Membership, Metrics, Raft};
use super::{Peer, Proposer, first_membership};

/// Pause after a step that failed; the step itself is bounded.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// What a member knows of the cluster before it is formed.
pub(crate) struct Forming {
    pub(crate) me: Peer,
    pub(crate) members: Vec<Peer>,
    pub(crate) init: v1::InitCluster,
}

impl Forming {
    /// The member with the lowest id proposes the first membership, if it has nothing stored. The others wait for it.
    pub(crate) async fn begin(&self, raft: &Raft) -> Result<(), Fault> {
        let stopped = |error: &dyn std::fmt::Display| {
            Fault::new(
                Code::Internal,
                format!("the cluster could not be formed: {error}"),
            )
        };
        let first = first_membership(&self.members);
        if raft.is_initialized().await.map_err(|error| stopped(&error))? {
            let metrics = raft.metrics();
            let membership = metrics.borrow().membership_config.membership().clone();
            let configured = Membership::new(vec![first.keys().copied().collect()], first);
            if membership != configured && membership.nodes().next().is_some() {
                tracing::warn!(
                    "the configuration's members are ignored: the cluster was formed with {membership}"
                );
            }
            return Ok(());
        }
        if first.keys().next() != Some(&self.me.id) {
            tracing::info!("waiting for the cluster to be formed");
            return Ok(());
        }
        tracing::info!(
            cluster = self.init.cluster_id,
            members = first.len(),
            "forming the cluster"
        );
        match raft.initialize(first).await {
            // Not allowed: another member's entry or vote came first, so the cluster is being formed.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(stopped(&error)),
        }
    }

    /// Confirms the lead; returns when the state is current and belongs to this cluster.
    async fn establish(&self, rounds: &Rounds, proposer: &Proposer) {
        loop {
            match self.try_establish(rounds, proposer).await {
                Ok(()) => return,
                Err(fault) if fault.code == Code::NoLeader => tracing::debug!("not leading yet: {fault}"),
                Err(fault) => tracing::error!("the cluster could not be set up: {fault}"),
            }
            sleep(RETRY_PAUSE).await;
        }
    }

    async fn try_establish(&self, rounds: &Rounds, proposer: &Proposer) -> Result<(), Fault> {
        rounds.linearize().await?;
        if proposer
            .shared
            .read(|state| state.cluster_id() == self.init.cluster_id)
        {
            return Ok(());
        }
        let command = v1::Command {
            caller: "leader".to_owned(),
            kind: Some(Kind::InitCluster(self.init.clone())),
            ..Default::default()
        };
        proposer.propose(command).await.map(drop)
    }
}

/// The term that this member leads in, as openraft believes.
pub(crate) fn leading_term(metrics: &Metrics) -> Option<u64> {
    (metrics.state == ServerState::Leader && metrics.running_state.is_ok()).then_some(metrics.current_term)
}

/// Publishes the term this member leads in, once it is established. Ends with openraft.
pub(crate) async fn watch(
    forming: Forming,
    raft: Raft,
    rounds: Rounds,
    proposer: Proposer,
    publish: watch::Sender<Option<u64>>,
) {
    let mut metrics = raft.metrics();
    loop {
        let term = leading_term(&metrics.borrow_and_update());
        if *publish.borrow() != term {
            publish.send_if_modified(|published| published.take().is_some());
            if term.is_some() {
                let changed = metrics.wait_for(|metrics| leading_term(metrics) != term);
                tokio::select! {
                    () = forming.establish(&rounds, &proposer) => {
                        tracing::info!(?term, name = forming.me.name, "leading");
                        publish.send_replace(term);
                    }
                    changed = changed => {
                        if changed.is_err() {
                            return;
                        }
                        continue;
                    }
                }
            } else {
                tracing::info!(name = forming.me.name, "leading no more");
            }
        }
        if metrics.changed().await.is_err() {
            return;
        }
    }
}
