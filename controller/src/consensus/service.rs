//! The `Raft` service: what peers ask of this member. Only members of this cluster are heard.

use drover_pki::{Role, peer_identity};
use drover_proto::v1::raft_server::{Raft as RaftRpc, RaftServer};
use drover_proto::{Code, Fault, v1};
use drover_storage::SNAPSHOT_BYTES_MAX;
use openraft::error::{InstallSnapshotError, RaftError};
use tonic::{Request, Response, Status};

use super::network::MESSAGE_BYTES_MAX;
use super::types::Raft;
use super::wire::{self, WireError};

/// Answers peers.
pub struct RaftService {
    raft: Raft,
    cluster: String,
    members: Vec<String>,
}

impl RaftService {
    /// The service, for [`tonic::transport::server::Router::add_service`]. `members` are the names of those who may call.
    pub(crate) fn server(raft: Raft, cluster: String, members: Vec<String>) -> RaftServer<Self> {
        RaftServer::new(Self {
            raft,
            cluster,
            members,
        })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    fn admit<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let caller = peer_identity(request, &self.cluster)?;
        if caller.role != Role::Controller {
            let why = format!("{caller} is no controller; only controllers may call the Raft service");
            return Err(Fault::new(Code::Denied, why).into());
        }
        // The first membership, and whoever was added since: names are never given to another id.
        let added = || {
            let metrics = self.raft.metrics();
            let membership = metrics.borrow().membership_config.clone();
            membership.nodes().any(|(_, node)| node.name == caller.name)
        };
        if !self.members.contains(&caller.name) && !added() {
            let why = format!("{caller} is no member of this cluster's Raft group");
            return Err(Fault::new(Code::Denied, why).into());
        }
        Ok(())
    }
}

fn senseless(error: &WireError) -> Status {
    Fault::new(
        Code::InvalidArgument,
        format!("the message makes no sense: {error}"),
    )
    .into()
}

fn stopped(error: impl std::fmt::Display) -> Status {
    Fault::new(Code::NoLeader, format!("this member's Raft has stopped: {error}")).into()
}

#[tonic::async_trait]
impl RaftRpc for RaftService {
    async fn append_entries(
        &self,
        request: Request<v1::AppendEntriesRequest>,
    ) -> Result<Response<v1::AppendEntriesResponse>, Status> {
        self.admit(&request)?;
        let request = wire::append_in(request.into_inner()).map_err(|error| senseless(&error))?;
        let answer = self.raft.append_entries(request).await.map_err(stopped)?;
        Ok(Response::new(wire::append_answer_out(&answer)))
    }

    async fn vote(&self, request: Request<v1::VoteRequest>) -> Result<Response<v1::VoteResponse>, Status> {
        self.admit(&request)?;
        let request = wire::vote_request_in(request.get_ref()).map_err(|error| senseless(&error))?;
        let answer = self.raft.vote(request).await.map_err(stopped)?;
        Ok(Response::new(wire::vote_answer_out(&answer)))
    }

    async fn install_snapshot(
        &self,
        request: Request<v1::InstallSnapshotRequest>,
    ) -> Result<Response<v1::InstallSnapshotResponse>, Status> {
        self.admit(&request)?;
        let request = wire::install_in(request.into_inner()).map_err(|error| senseless(&error))?;
        let end = usize::try_from(request.offset)
            .unwrap_or(usize::MAX)
            .saturating_add(request.data.len());
        if end > SNAPSHOT_BYTES_MAX {
            let why = format!(
                "offset is {}; a snapshot has at most {SNAPSHOT_BYTES_MAX} bytes",
                request.offset
            );
            return Err(Fault::new(Code::InvalidArgument, why).field("offset").into());
        }
        match self.raft.install_snapshot(request).await {
            Ok(answer) => Ok(Response::new(v1::InstallSnapshotResponse {
                vote: Some(wire::vote_out(&answer.vote)),
                ..Default::default()
            })),
            Err(RaftError::APIError(InstallSnapshotError::SnapshotMismatch(mismatch))) => {
                Ok(Response::new(v1::InstallSnapshotResponse {
                    vote: None,
                    mismatch: true,
                    expected: mismatch.expect.offset,
                    snapshot_id: mismatch.expect.id,
                }))
            }
            Err(RaftError::Fatal(error)) => Err(stopped(error)),
        }
    }
}
