//! Any controller takes any request: here it is answered when this one leads, and else passed on to the one that does.
//!
//! ```text
//!   caller ──> this controller ── leads ──> local handler
//!                    │  └─ does not ──> leader's same method, with drover-caller and drover-forwarded
//!                    └─ nobody leads: wait for the election, at most ELECTION_WAIT, then no_leader
//! ```
//!
//! Every call may be made twice: one whose answer was lost is sent again to the next leader. Mutating requests carry an
//! id, and agents' reports name an epoch, so that the second time changes nothing.
//!
//! A call that was forwarded once is never forwarded again: the first controller does the waiting.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use drover_pki::controller_dns;
use drover_proto::codes::CODE_KEY;
use drover_proto::v1::{Command, CommandResponse, command::Kind};
use drover_proto::{Code, Fault};
use prost::Message;
use tokio::time::{Instant, sleep, timeout};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code as GrpcCode, Extensions, Request, Response, Status};
use tonic_prost::ProstCodec;

use super::Shared;
use super::caller::{CALLER_KEY, Caller, FORWARDED_KEY, Service};
use crate::consensus::Peer;

/// How long a request waits for a leader: a few elections' time.
const ELECTION_WAIT: Duration = Duration::from_secs(5);
/// Pause before the next look for a leader.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// How long one forwarded call may take beside the time it was asked to wait.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(8);
/// How often a forwarded call looks whether another member leads by now.
const LEADER_LOOK: Duration = Duration::from_millis(100);
/// Bytes of a forwarded call's answer; long lists fit.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// One call that is answered here, by the leader.
#[derive(Clone)]
pub(crate) struct Call {
    pub(crate) api: Arc<Shared>,
    pub(crate) caller: Caller,
    /// The term this controller leads in.
    pub(crate) term: u64,
}

impl Call {
    /// Puts a command into the log in the caller's name.
    pub(crate) async fn propose(&self, request_id: &str, kind: Kind) -> Result<CommandResponse, Fault> {
        let command = Command {
            now_ms: 0, // stamped by the leader's consensus
            request_id: request_id.to_owned(),
            caller: self.caller.audit_name(),
            kind: Some(kind),
        };
        drover_state::into_result(self.api.consensus.propose(command).await?)
    }

    /// Makes sure that the state as read from here on holds everything that was committed before.
    pub(crate) async fn linearize(&self) -> Result<(), Fault> {
        self.api.consensus.linearize().await
    }

    /// Fails when this controller does not lead in the call's term any more: a long poll looks at every turn.
    pub(crate) fn still_leads(&self) -> Result<(), Fault> {
        if *self.api.consensus.leadership().borrow() == Some(self.term) {
            return Ok(());
        }
        Err(Fault::new(
            Code::NoLeader,
            "this controller has lost the lead; ask again",
        ))
    }
}

impl Shared {
    /// Answers `request` by `local` when this controller leads, else by the leader's `path`. `wait` is how long the request
    /// itself asks to be held.
    pub(crate) async fn on_leader<Req, Resp, Local, Answer>(
        self: &Arc<Self>,
        service: Service,
        path: &'static str,
        request: Request<Req>,
        wait: Duration,
        local: Local,
    ) -> Result<Response<Resp>, Status>
    where
        Req: Message + Clone + 'static,
        Resp: Message + Default + 'static,
        Local: Fn(Call, Req) -> Answer,
        Answer: Future<Output = Result<Resp, Fault>>,
    {
        let caller = Caller::of(&request, &self.cluster, service)?;
        let message = request.into_inner();
        let give_up = Instant::now() + ELECTION_WAIT;
        loop {
            let term = *self.consensus.leadership().borrow();
            let leader = self
                .consensus
                .leader()
                .filter(|leader| leader.id != self.consensus.me().id);
            let fault = match (term, leader) {
                (Some(term), _) => {
                    let call = Call {
                        api: self.clone(),
                        caller: caller.clone(),
                        term,
                    };
                    match local(call, message.clone()).await {
                        Ok(answer) => return Ok(Response::new(answer)),
                        Err(fault) => fault,
                    }
                }
                (None, Some(leader)) if !caller.forwarded => {
                    match self.forward(&leader, path, &message, &caller, wait).await {
                        Ok(answer) => return Ok(Response::new(answer)),
                        Err(fault) => fault,
                    }
                }
                (None, leader) => no_leader(leader.as_ref()),
            };
            let again = fault.code == Code::NoLeader && !caller.forwarded && Instant::now() < give_up;
            if !again {
                return Err(fault.into());
            }
            sleep(RETRY_PAUSE).await;
        }
    }

    /// The leader's answer. `no_leader` when it does not come, or when another member leads meanwhile.
    async fn forward<Req, Resp>(
        &self,
        leader: &Peer,
        path: &'static str,
        message: &Req,
        caller: &Caller,
        wait: Duration,
    ) -> Result<Resp, Fault>
    where
        Req: Message + Clone + 'static,
        Resp: Message + Default + 'static,
    {
        let dns_name = controller_dns(Some(&leader.name));
        let lost = |why: &str| {
            let message = format!(
                "the leader {} at {} did not answer: {why}",
                leader.name, leader.addr
            );
            Fault::new(Code::NoLeader, message)
        };
        let channel = self.channels.to(&dns_name, &leader.addr)?;
        let call = async {
            let mut grpc = Grpc::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
            grpc.ready().await.map_err(|error| lost(&error.to_string()))?;
            let request = Request::from_parts(metadata(caller), Extensions::default(), message.clone());
            let path = PathAndQuery::from_static(path);
            let answer = grpc
                .unary(request, path, ProstCodec::<Req, Resp>::default())
                .await;
            answer.map(Response::into_inner).map_err(|status| {
                if is_of_the_transport(&status) {
                    lost(status.message())
                } else {
                    Fault::from(&status)
                }
            })
        };
        let moved = async {
            loop {
                sleep(LEADER_LOOK).await;
                if self.consensus.leader().is_some_and(|now| now.id != leader.id) {
                    return;
                }
            }
        };
        tokio::select! {
            answer = timeout(wait + FORWARD_TIMEOUT, call) => answer.unwrap_or_else(|_| {
                self.channels.forget(&dns_name);
                Err(lost("no answer in time"))
            }),
            () = moved => Err(lost("another controller leads now")),
        }
    }
}

fn no_leader(known: Option<&Peer>) -> Fault {
    let message = match known {
        Some(leader) => format!("this controller does not lead, {} does; ask it", leader.name),
        None => "no controller leads at the moment: fewer than half of them may be up; try again".to_owned(),
    };
    Fault::new(Code::NoLeader, message)
}

fn metadata(caller: &Caller) -> MetadataMap {
    let mut metadata = MetadataMap::new();
    if let Ok(uri) = MetadataValue::try_from(caller.identity.to_string()) {
        metadata.insert(CALLER_KEY, uri);
    }
    metadata.insert(FORWARDED_KEY, MetadataValue::from_static("1"));
    metadata
}

/// Whether the status was made by a connection that broke rather than by a handler: ours always carry a code.
pub(crate) fn is_of_the_transport(status: &Status) -> bool {
    status.metadata().get(CODE_KEY).is_none()
        && matches!(
            status.code(),
            GrpcCode::Unavailable
                | GrpcCode::DeadlineExceeded
                | GrpcCode::Cancelled
                | GrpcCode::Unknown
                | GrpcCode::Internal
        )
}
