//! openraft's messages as protobuf, both ways: the wire between controllers and the records on disk.
//!
//! Into protobuf cannot fail. Out of it can: a peer or a disk may hand us anything, and what does not make sense is an
//! error that names the field.

use std::collections::{BTreeMap, BTreeSet};

use drover_proto::v1::{self, log_entry::Payload};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, VoteRequest, VoteResponse,
};
use openraft::{CommittedLeaderId, EntryPayload};
use prost::Message;

use super::types::{
    Address, Entry, LogId, Membership, Proposal, SnapshotMeta, StoredMembership, TypeConfig, Vote,
};

/// A message that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("the field {0} is missing")]
    Missing(&'static str),
    #[error("the field {field} has the unknown value {value}")]
    Unknown { field: &'static str, value: i32 },
    #[error("no protobuf message: {0}")]
    Malformed(#[from] prost::DecodeError),
}

type Wire<T> = Result<T, WireError>;

fn need<T>(field: &'static str, value: Option<T>) -> Wire<T> {
    value.ok_or(WireError::Missing(field))
}

pub(crate) fn vote_out(vote: &Vote) -> v1::RaftVote {
    v1::RaftVote {
        term: vote.leader_id.term,
        node: vote.leader_id.node_id,
        committed: vote.committed,
    }
}

pub(crate) fn vote_in(vote: &v1::RaftVote) -> Vote {
    match vote.committed {
        true => Vote::new_committed(vote.term, vote.node),
        false => Vote::new(vote.term, vote.node),
    }
}

pub(crate) fn log_id_out(id: &LogId) -> v1::LogId {
    v1::LogId {
        term: id.leader_id.term,
        node: id.leader_id.node_id,
        index: id.index,
    }
}

pub(crate) fn log_id_in(id: &v1::LogId) -> LogId {
    LogId::new(CommittedLeaderId::new(id.term, id.node), id.index)
}

pub(crate) fn membership_out(membership: &Membership) -> v1::Membership {
    let ids = |config: &BTreeSet<u64>| v1::NodeIds {
        ids: config.iter().copied().collect(),
    };
    let node = |(id, node): (&u64, &Address)| v1::RaftNode {
        id: *id,
        name: node.name.clone(),
        addr: node.addr.clone(),
    };
    v1::Membership {
        configs: membership.get_joint_config().iter().map(ids).collect(),
        nodes: membership.nodes().map(node).collect(),
    }
}

pub(crate) fn membership_in(membership: v1::Membership) -> Membership {
    let configs = membership
        .configs
        .into_iter()
        .map(|config| config.ids.into_iter().collect())
        .collect();
    let node = |node: v1::RaftNode| {
        (
            node.id,
            Address {
                name: node.name,
                addr: node.addr,
            },
        )
    };
    let nodes: BTreeMap<u64, Address> = membership.nodes.into_iter().map(node).collect();
    Membership::new(configs, nodes)
}

pub(crate) fn stored_membership_out(stored: &StoredMembership) -> v1::StoredMembership {
    v1::StoredMembership {
        log_id: stored.log_id().as_ref().map(log_id_out),
        membership: Some(membership_out(stored.membership())),
    }
}

pub(crate) fn stored_membership_in(stored: v1::StoredMembership) -> Wire<StoredMembership> {
    let membership = membership_in(need("membership.membership", stored.membership)?);
    Ok(StoredMembership::new(
        stored.log_id.as_ref().map(log_id_in),
        membership,
    ))
}

pub(crate) fn entry_out(entry: &Entry) -> v1::LogEntry {
    let payload = match &entry.payload {
        EntryPayload::Blank => Payload::Blank(true),
        EntryPayload::Normal(Proposal(command)) => Payload::Command(command.encode_to_vec()),
        EntryPayload::Membership(membership) => Payload::Membership(membership_out(membership)),
    };
    v1::LogEntry {
        id: Some(log_id_out(&entry.log_id)),
        payload: Some(payload),
    }
}

pub(crate) fn entry_in(entry: v1::LogEntry) -> Wire<Entry> {
    let payload = match need("entries.payload", entry.payload)? {
        Payload::Blank(_) => EntryPayload::Blank,
        Payload::Command(bytes) => EntryPayload::Normal(Proposal(v1::Command::decode(bytes.as_slice())?)),
        Payload::Membership(membership) => EntryPayload::Membership(membership_in(membership)),
    };
    Ok(Entry {
        log_id: log_id_in(&need("entries.id", entry.id)?),
        payload,
    })
}

pub(crate) fn append_out(request: &AppendEntriesRequest<TypeConfig>) -> v1::AppendEntriesRequest {
    v1::AppendEntriesRequest {
        vote: Some(vote_out(&request.vote)),
        prev: request.prev_log_id.as_ref().map(log_id_out),
        entries: request.entries.iter().map(entry_out).collect(),
        commit: request.leader_commit.as_ref().map(log_id_out),
    }
}

pub(crate) fn append_in(request: v1::AppendEntriesRequest) -> Wire<AppendEntriesRequest<TypeConfig>> {
    Ok(AppendEntriesRequest {
        vote: vote_in(&need("vote", request.vote)?),
        prev_log_id: request.prev.as_ref().map(log_id_in),
        entries: request.entries.into_iter().map(entry_in).collect::<Wire<_>>()?,
        leader_commit: request.commit.as_ref().map(log_id_in),
    })
}

pub(crate) fn append_answer_out(answer: &AppendEntriesResponse<u64>) -> v1::AppendEntriesResponse {
    use v1::append_entries_response::Kind;
    let (kind, matched, vote) = match answer {
        AppendEntriesResponse::Success => (Kind::Success, None, None),
        AppendEntriesResponse::PartialSuccess(matched) => {
            (Kind::Partial, matched.as_ref().map(log_id_out), None)
        }
        AppendEntriesResponse::Conflict => (Kind::Conflict, None, None),
        AppendEntriesResponse::HigherVote(vote) => (Kind::HigherVote, None, Some(vote_out(vote))),
    };
    v1::AppendEntriesResponse {
        kind: kind.into(),
        matched,
        vote,
    }
}

pub(crate) fn append_answer_in(answer: &v1::AppendEntriesResponse) -> Wire<AppendEntriesResponse<u64>> {
    use v1::append_entries_response::Kind;
    let kind = Kind::try_from(answer.kind).map_err(|_| WireError::Unknown {
        field: "kind",
        value: answer.kind,
    })?;
    Ok(match kind {
        Kind::Success => AppendEntriesResponse::Success,
        Kind::Partial => AppendEntriesResponse::PartialSuccess(answer.matched.as_ref().map(log_id_in)),
        Kind::Conflict => AppendEntriesResponse::Conflict,
        Kind::HigherVote => AppendEntriesResponse::HigherVote(vote_in(need("vote", answer.vote.as_ref())?)),
    })
}

pub(crate) fn vote_request_out(request: &VoteRequest<u64>) -> v1::VoteRequest {
    v1::VoteRequest {
        vote: Some(vote_out(&request.vote)),
        last: request.last_log_id.as_ref().map(log_id_out),
    }
}

pub(crate) fn vote_request_in(request: &v1::VoteRequest) -> Wire<VoteRequest<u64>> {
    let vote = vote_in(need("vote", request.vote.as_ref())?);
    Ok(VoteRequest::new(vote, request.last.as_ref().map(log_id_in)))
}

pub(crate) fn vote_answer_out(answer: &VoteResponse<u64>) -> v1::VoteResponse {
    v1::VoteResponse {
        vote: Some(vote_out(&answer.vote)),
        granted: answer.vote_granted,
        last: answer.last_log_id.as_ref().map(log_id_out),
    }
}

pub(crate) fn vote_answer_in(answer: &v1::VoteResponse) -> Wire<VoteResponse<u64>> {
    let vote = vote_in(need("vote", answer.vote.as_ref())?);
    Ok(VoteResponse::new(
        vote,
        answer.last.as_ref().map(log_id_in),
        answer.granted,
    ))
}

pub(crate) fn snapshot_meta_out(meta: &SnapshotMeta) -> v1::SnapshotMeta {
    v1::SnapshotMeta {
        last: meta.last_log_id.as_ref().map(log_id_out),
        membership: Some(stored_membership_out(&meta.last_membership)),
        id: meta.snapshot_id.clone(),
    }
}

pub(crate) fn snapshot_meta_in(meta: v1::SnapshotMeta) -> Wire<SnapshotMeta> {
    Ok(SnapshotMeta {
        last_log_id: meta.last.as_ref().map(log_id_in),
        last_membership: stored_membership_in(need("meta.membership", meta.membership)?)?,
        snapshot_id: meta.id,
    })
}

pub(crate) fn install_out(request: InstallSnapshotRequest<TypeConfig>) -> v1::InstallSnapshotRequest {
    v1::InstallSnapshotRequest {
        vote: Some(vote_out(&request.vote)),
        meta: Some(snapshot_meta_out(&request.meta)),
        offset: request.offset,
        data: request.data,
        done: request.done,
    }
}

pub(crate) fn install_in(request: v1::InstallSnapshotRequest) -> Wire<InstallSnapshotRequest<TypeConfig>> {
    Ok(InstallSnapshotRequest {
        vote: vote_in(&need("vote", request.vote)?),
        meta: snapshot_meta_in(need("meta", request.meta)?)?,
        offset: request.offset,
        data: request.data,
        done: request.done,
    })
}

#[cfg(test)]
mod tests {
    use drover_proto::v1::command::Kind;
    use proptest::prelude::*;

    use super::*;

    fn vote() -> impl Strategy<Value = Vote> {
        (any::<u64>(), any::<u64>(), any::<bool>()).prop_map(|(term, node, committed)| match committed {
            true => Vote::new_committed(term, node),
            false => Vote::new(term, node),
        })
    }

    fn log_id() -> impl Strategy<Value = LogId> {
        (any::<u64>(), any::<u64>(), any::<u64>())
            .prop_map(|(term, node, index)| LogId::new(CommittedLeaderId::new(term, node), index))
    }

    fn maybe_log_id() -> impl Strategy<Value = Option<LogId>> {
        prop::option::of(log_id())
    }

    fn membership() -> impl Strategy<Value = Membership> {
        let configs = prop::collection::vec(prop::collection::btree_set(0u64..20, 1..6), 0..3);
        let address = ("[a-z]{0,5}", "[0-9.:]{0,9}").prop_map(|(name, addr)| Address { name, addr });
        (configs, prop::collection::btree_map(0u64..30, address, 0..8))
            .prop_map(|(configs, nodes)| Membership::new(configs, nodes))
    }

    fn stored_membership() -> impl Strategy<Value = StoredMembership> {
        (maybe_log_id(), membership()).prop_map(|(id, membership)| StoredMembership::new(id, membership))
    }

    fn command() -> impl Strategy<Value = v1::Command> {
        (any::<u64>(), "[a-z0-9]{0,9}", "[a-z/]{0,9}", "[a-z0-9]{0,9}").prop_map(
            |(now_ms, request_id, caller, name)| v1::Command {
                now_ms,
                request_id,
                caller,
                kind: Some(Kind::StartVm(v1::StartVm { name })),
            },
        )
    }

    fn entry() -> impl Strategy<Value = Entry> {
        let payload = prop_oneof![
            Just(EntryPayload::Blank),
            command().prop_map(|command| EntryPayload::Normal(Proposal(command))),
            membership().prop_map(EntryPayload::Membership),
        ];
        (log_id(), payload).prop_map(|(log_id, payload)| Entry { log_id, payload })
    }

    fn snapshot_meta() -> impl Strategy<Value = SnapshotMeta> {
        (maybe_log_id(), stored_membership(), "[a-z0-9-]{0,12}").prop_map(
            |(last_log_id, last_membership, snapshot_id)| SnapshotMeta {
                last_log_id,
                last_membership,
                snapshot_id,
            },
        )
    }

    /// Through the bytes, too.
    fn bytes<M: Message + Default>(message: &M) -> M {
        M::decode(message.encode_to_vec().as_slice()).unwrap()
    }

    proptest! {
        #[test]
        fn an_append_survives_the_wire(
            vote in vote(), prev in maybe_log_id(), entries in prop::collection::vec(entry(), 0..5),
            commit in maybe_log_id(),
        ) {
            let request = AppendEntriesRequest::<TypeConfig> {
                vote, prev_log_id: prev, entries, leader_commit: commit,
            };
            let back = append_in(bytes(&append_out(&request))).unwrap();
            prop_assert_eq!(
                (back.vote, back.prev_log_id, &back.entries, back.leader_commit),
                (request.vote, request.prev_log_id, &request.entries, request.leader_commit)
            );
        }

        #[test]
        fn an_answer_to_an_append_survives_the_wire(vote in vote(), matched in maybe_log_id()) {
            for answer in [
                AppendEntriesResponse::Success,
                AppendEntriesResponse::Conflict,
                AppendEntriesResponse::PartialSuccess(matched),
                AppendEntriesResponse::HigherVote(vote),
            ] {
                let back = append_answer_in(&bytes(&append_answer_out(&answer))).unwrap();
                prop_assert_eq!(back, answer);
            }
        }

        #[test]
        fn a_vote_survives_the_wire(vote in vote(), last in maybe_log_id(), granted in any::<bool>()) {
            let request = VoteRequest::new(vote, last);
            prop_assert_eq!(vote_request_in(&bytes(&vote_request_out(&request))).unwrap(), request);
            let answer = VoteResponse::new(vote, last, granted);
            prop_assert_eq!(vote_answer_in(&bytes(&vote_answer_out(&answer))).unwrap(), answer);
        }

        #[test]
        fn a_piece_of_a_snapshot_survives_the_wire(
            vote in vote(), meta in snapshot_meta(), offset in any::<u64>(),
            data in prop::collection::vec(any::<u8>(), 0..50), done in any::<bool>(),
        ) {
            let request = InstallSnapshotRequest::<TypeConfig> { vote, meta, offset, data, done };
            let back = install_in(bytes(&install_out(request.clone()))).unwrap();
            prop_assert_eq!(
                (back.vote, &back.meta, back.offset, &back.data, back.done),
                (request.vote, &request.meta, request.offset, &request.data, request.done)
            );
        }

        #[test]
        fn no_bytes_make_it_panic(noise in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = v1::AppendEntriesRequest::decode(noise.as_slice()) {
                let _ = append_in(message);
            }
            if let Ok(message) = v1::InstallSnapshotRequest::decode(noise.as_slice()) {
                let _ = install_in(message);
            }
            if let Ok(message) = v1::LogEntry::decode(noise.as_slice()) {
                let _ = entry_in(message);
            }
        }
    }

    #[test]
    fn a_message_without_its_vote_is_refused_by_name() {
        let request = v1::AppendEntriesRequest::default();
        assert_eq!(append_in(request).unwrap_err(), WireError::Missing("vote"));
        let answer = v1::AppendEntriesResponse {
            kind: 77,
            ..Default::default()
        };
        let unknown = WireError::Unknown {
            field: "kind",
            value: 77,
        };
        assert_eq!(append_answer_in(&answer).unwrap_err(), unknown);
    }
}
