//! Calls to the other members: one lazily connected, mutually authenticated channel a peer.
//!
//! openraft repeats what fails and bounds how long it waits; here nothing is retried. What is noted is whether a peer
//! answers at all, for people who ask for the cluster's status.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use drover_pki::{Credentials, controller_dns};
use drover_proto::v1::raft_client::RaftClient;
use openraft::error::{
    InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError, SnapshotMismatch, Unreachable,
};
use openraft::network::{Backoff, RPCOption};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};
use openraft::{AnyError, RaftNetwork, RaftNetworkFactory, SnapshotSegmentId};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::types::{Address, TypeConfig};
use super::wire::{self, WireError};

/// Largest Raft message: entries are bounded by bytes when read, a single one by what may be proposed.
pub(crate) const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// A piece of a snapshot.
pub(crate) const SNAPSHOT_PIECE_BYTES: u64 = 1 << 20;
/// A peer that does not take the connection by then is tried anew.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection over which nothing comes back is given up, so that a healed network is used at once and not after
/// TCP's doubled retransmission pauses.
const KEEPALIVE_INTERVAL: Duration = Duration::from_millis(500);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause before openraft calls an unreachable peer again.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// When each peer answered last.
#[derive(Default)]
pub(crate) struct Reach {
    answered: Mutex<BTreeMap<u64, Instant>>,
}

impl Reach {
    fn answered(&self, peer: u64) {
        let mut answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        answered.insert(peer, Instant::now());
    }

    /// Whether `peer` answered within the last `window`.
    pub(crate) fn within(&self, peer: u64, window: Duration) -> bool {
        let answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        answered.get(&peer).is_some_and(|at| at.elapsed() < window)
    }
}

/// Makes the clients.
pub(crate) struct Network {
    credentials: Arc<Credentials>,
    reach: Arc<Reach>,
    // openraft asks for a new client for every round of a linearizable read: they share a connection.
    channels: BTreeMap<(u64, Address), Result<Channel, String>>,
}

impl Network {
    pub(crate) fn new(credentials: Arc<Credentials>, reach: Arc<Reach>) -> Self {
        Self {
            credentials,
            reach,
            channels: BTreeMap::new(),
        }
    }
}

fn connect(credentials: &Credentials, node: &Address) -> Result<Channel, String> {
    let endpoint =
        Endpoint::from_shared(format!("https://{}", node.addr)).map_err(|error| error.to_string())?;
    let endpoint = endpoint
        .tls_config(credentials.tonic_client(&controller_dns(Some(&node.name))))
        .map_err(|error| error.to_string())?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_lazy())
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &Address) -> Peer {
        let key = (target, node.clone());
        let channel = self
            .channels
            .entry(key)
            .or_insert_with(|| connect(&self.credentials, node));
        let client = channel.clone().map(|channel| {
            RaftClient::new(channel)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX)
        });
        Peer {
            id: target,
            name: node.name.clone(),
            client,
            reach: self.reach.clone(),
        }
    }
}

/// The client for one peer.
pub(crate) struct Peer {
    id: u64,
    name: String,
    client: Result<RaftClient<Channel>, String>,
    reach: Arc<Reach>,
}

type Rpc<T, E> = Result<T, RPCError<u64, Address, E>>;

impl Peer {
    fn client<E: std::error::Error>(&self) -> Rpc<RaftClient<Channel>, E> {
        let invalid = |why: &String| RPCError::Unreachable(Unreachable::new(&AnyError::error(why)));
        self.client.as_ref().map_err(invalid).cloned()
    }

    fn answered<T, E: std::error::Error>(&self, answer: Result<tonic::Response<T>, Status>) -> Rpc<T, E> {
        match answer {
            Ok(answer) => {
                self.reach.answered(self.id);
                Ok(answer.into_inner())
            }
            Err(status) => Err(self.failed(&status)),
        }
    }

    fn failed<E: std::error::Error>(&self, status: &Status) -> RPCError<u64, Address, E> {
        if let Some(denied) = drover_pki::tls_fault(status) {
            tracing::warn!(peer = self.name, "{denied}");
        } else {
            tracing::debug!(peer = self.name, code = ?status.code(), "{}", status.message());
        }
        let error = AnyError::error(format!("{}: {}", self.name, status.message()));
        match status.code() {
            Code::Unavailable | Code::PermissionDenied => RPCError::Unreachable(Unreachable::new(&error)),
            _ => RPCError::Network(NetworkError::new(&error)),
        }
    }

    fn senseless<E: std::error::Error>(&self, error: &WireError) -> RPCError<u64, Address, E> {
        tracing::warn!(peer = self.name, "an answer makes no sense: {error}");
        RPCError::Network(NetworkError::new(error))
    }
}

fn bounded<T>(message: T, option: &RPCOption) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(option.hard_ttl());
    request
}

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Rpc<AppendEntriesResponse<u64>, RaftError<u64>> {
        let request = bounded(wire::append_out(&rpc), &option);
        let answer = self.client()?.append_entries(request).await;
        wire::append_answer_in(&self.answered(answer)?).map_err(|error| self.senseless(&error))
    }

    async fn install_snapshot(
        &mut self,
        rpc: InstallSnapshotRequest<TypeConfig>,
        option: RPCOption,
    ) -> Rpc<InstallSnapshotResponse<u64>, RaftError<u64, InstallSnapshotError>> {
        let (id, offset) = (rpc.meta.snapshot_id.clone(), rpc.offset);
        let request = bounded(wire::install_out(rpc), &option);
        let answer = self.client()?.install_snapshot(request).await;
        let answer = self.answered(answer)?;
        if answer.mismatch {
            let mismatch = SnapshotMismatch {
                expect: SnapshotSegmentId {
                    id: answer.snapshot_id,
                    offset: answer.expected,
                },
                got: SnapshotSegmentId { id, offset },
            };
            return Err(RemoteError::new(self.id, RaftError::APIError(mismatch.into())).into());
        }
        let Some(vote) = answer.vote else {
            return Err(self.senseless(&WireError::Missing("vote")));
        };
        Ok(InstallSnapshotResponse {
            vote: wire::vote_in(&vote),
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<u64>,
        option: RPCOption,
    ) -> Rpc<VoteResponse<u64>, RaftError<u64>> {
        let request = bounded(wire::vote_request_out(&rpc), &option);
        let answer = self.client()?.vote(request).await;
        wire::vote_answer_in(&self.answered(answer)?).map_err(|error| self.senseless(&error))
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY_PAUSE))
    }
}
