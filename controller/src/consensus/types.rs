//! openraft's type parameters. Its `serde` bounds are met through protobuf: what is stored and sent is protobuf only (see
//! `wire`), so that a cluster can be upgraded one member at a time.

use std::io::Cursor;

use drover_proto::v1;
use prost::Message;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// What the log carries.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Proposal(pub(crate) v1::Command);

/// What applying an entry answers. Entries of the protocol itself answer with nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer(pub(crate) v1::CommandResponse);

/// Where a member is. Its id stands beside it in the membership.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Address {
    /// The member's name, which its certificate carries.
    pub(crate) name: String,
    /// `ip:port`.
    pub(crate) addr: String,
}

openraft::declare_raft_types!(
    /// openraft as this controller uses it.
    pub(crate) TypeConfig:
        D = Proposal,
        R = Answer,
        Node = Address,
);

pub(crate) type Raft = openraft::Raft<TypeConfig>;
pub(crate) type Entry = openraft::Entry<TypeConfig>;
pub(crate) type LogId = openraft::LogId<u64>;
pub(crate) type Vote = openraft::Vote<u64>;
pub(crate) type Membership = openraft::Membership<u64, Address>;
pub(crate) type StoredMembership = openraft::StoredMembership<u64, Address>;
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<u64, Address>;
pub(crate) type Metrics = openraft::RaftMetrics<u64, Address>;

impl Serialize for Proposal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0.encode_to_vec())
    }
}

impl<'de> Deserialize<'de> for Proposal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        v1::Command::decode(bytes.as_slice())
            .map(Self)
            .map_err(de::Error::custom)
    }
}

impl Serialize for Answer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0.encode_to_vec())
    }
}

impl<'de> Deserialize<'de> for Answer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        v1::CommandResponse::decode(bytes.as_slice())
            .map(Self)
            .map_err(de::Error::custom)
    }
}
