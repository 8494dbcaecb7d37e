//! The small messages, as protobuf: fields are added, never changed or renumbered. An unknown field is skipped, a
//! missing one is its default, so the machines check what they need.

use drover_proto::{Code, Fault};
use prost::Message as _;

use super::{Kind, bad};

/// One region of guest memory.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct MemoryRegion {
    /// Guest-physical address.
    #[prost(uint64, tag = "1")]
    pub gpa: u64,
    /// Length in bytes.
    #[prost(uint64, tag = "2")]
    pub len: u64,
}

/// The source's first frame.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Hello {
    /// Lowest protocol version that the source speaks.
    #[prost(uint32, tag = "1")]
    pub version_min: u32,
    /// Highest protocol version that the source speaks.
    #[prost(uint32, tag = "2")]
    pub version_max: u32,
    /// The migration's id.
    #[prost(string, tag = "3")]
    pub migration: String,
    /// The VM's name.
    #[prost(string, tag = "4")]
    pub vm: String,
    /// The source's host.
    #[prost(string, tag = "5")]
    pub from_host: String,
    /// The epoch the VM runs for at the source.
    #[prost(uint64, tag = "6")]
    pub source_epoch: u64,
    /// The epoch the target would run it for.
    #[prost(uint64, tag = "7")]
    pub target_epoch: u64,
    /// Bytes a page.
    #[prost(uint32, tag = "8")]
    pub page_size: u32,
    /// Guest memory, in order of address.
    #[prost(message, repeated, tag = "9")]
    pub regions: Vec<MemoryRegion>,
    /// Version of the save-state that will come.
    #[prost(uint32, tag = "10")]
    pub device_model: u32,
    /// The CPU profile that the guest was started with.
    #[prost(string, tag = "11")]
    pub cpu_profile: String,
    /// Streams beside this link that the source would like for its pages; 0: pages travel on this link.
    #[prost(uint32, tag = "12")]
    pub streams: u32,
    /// Whether those streams are to go without TLS.
    #[prost(bool, tag = "13")]
    pub plaintext: bool,
    /// What else the source can do, as bits: see [`crate::handshake::feature`].
    #[prost(uint32, tag = "20")]
    pub features: u32,
    /// Whether the target is on the same host and takes over the memory itself: no page is sent.
    #[prost(bool, tag = "30")]
    pub local: bool,
}

/// The target agrees.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct HelloAck {
    /// The version both go on with.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Streams that the source is to open for its pages, at most as many as it asked for; 0: pages travel on this link.
    #[prost(uint32, tag = "2")]
    pub streams: u32,
    /// What each of them has to show.
    #[prost(bytes = "vec", tag = "3")]
    pub token: Vec<u8>,
    /// Those of the hello's features that are agreed on.
    #[prost(uint32, tag = "20")]
    pub features: u32,
    /// Post-copy was offered and the target cannot: why, for people.
    #[prost(string, tag = "21")]
    pub post_copy_unavailable: String,
}

/// The first frame of a stream that carries pages: proves that it belongs to this migration.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Join {
    /// The token of the target's `HelloAck`.
    #[prost(bytes = "vec", tag = "1")]
    pub token: Vec<u8>,
    /// Which of the agreed streams this is, from 0.
    #[prost(uint32, tag = "2")]
    pub stream: u32,
}

/// The source has sent all of a round's pages that travel on this stream.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct StreamEnd {
    /// The round.
    #[prost(uint32, tag = "1")]
    pub round: u32,
    /// Whether this was the pass after the pause: nothing more comes on this stream.
    #[prost(bool, tag = "2")]
    pub last: bool,
}

/// End of a round.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct RoundEnd {
    /// The round, from 1.
    #[prost(uint32, tag = "1")]
    pub round: u32,
    /// Pages with content in this round.
    #[prost(uint64, tag = "2")]
    pub pages: u64,
    /// Zero pages in this round.
    #[prost(uint64, tag = "3")]
    pub zero_pages: u64,
    /// Whether this was the pass after the pause: only the state may follow.
    #[prost(bool, tag = "4")]
    pub last: bool,
    /// Instead of the pages that the target lacks it was told which they are; they follow while it runs. Only with `last`.
    #[prost(bool, tag = "5")]
    pub post_copy: bool,
    /// How many they are.
    #[prost(uint64, tag = "6")]
    pub missing: u64,
}

/// Pages that the target lacks, or has in an older version, as the source stands paused: a piece of the set.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Missing {
    /// Number of the first page that the bitmap speaks of, a multiple of 64.
    #[prost(uint64, tag = "1")]
    pub first: u64,
    /// A bit a page, the lowest page in the lowest bit of the first byte; at most [`MISSING_BYTES_MAX`] bytes, a multiple of 8.
    #[prost(bytes = "vec", tag = "2")]
    pub bitmap: Vec<u8>,
}

/// Longest bitmap of a [`Missing`]: 256 MiB of guest memory.
pub const MISSING_BYTES_MAX: usize = 8 << 10;

/// Post-copy: the target asks for pages that its guest waits for. Without any it only says that it lives.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PageRequest {
    /// At most [`super::BATCH_PAGES`], ascending.
    #[prost(uint64, repeated, tag = "1")]
    pub pages: Vec<u64>,
}

/// Post-copy: the pages that were asked for last have been sent, all of them.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct PageAnswer {}

/// Post-copy: the target has every page. The source's memory is needed no more.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Complete {}

/// The target has written the round to its memory.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct RoundAck {
    /// The round.
    #[prost(uint32, tag = "1")]
    pub round: u32,
}

/// The saved state, and what the target needs to judge the whole and to write the receipt.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct StateFrame {
    /// An encoded `VmSave`.
    #[prost(bytes = "vec", tag = "1")]
    pub state: Vec<u8>,
    /// See [`crate::digest::digest`].
    #[prost(bytes = "vec", tag = "2")]
    pub digest: Vec<u8>,
    /// Rounds, the last pass included.
    #[prost(uint32, tag = "3")]
    pub rounds: u32,
    /// Pages with content in all rounds.
    #[prost(uint64, tag = "4")]
    pub pages: u64,
    /// Zero pages in all rounds.
    #[prost(uint64, tag = "5")]
    pub zero_pages: u64,
    /// How long stopping the vCPUs took, µs.
    #[prost(uint64, tag = "6")]
    pub pause_us: u64,
    /// From the pause until the last pages were acknowledged, µs.
    #[prost(uint64, tag = "7")]
    pub last_pages_us: u64,
    /// How long saving the state took, µs.
    #[prost(uint64, tag = "8")]
    pub save_us: u64,
    /// From the source's connect until it began to pause, µs.
    #[prost(uint64, tag = "9")]
    pub before_blackout_us: u64,
    /// How dirty pages were found: "bitmap" or "ring".
    #[prost(string, tag = "10")]
    pub tracker: String,
    /// Most that each vCPU was held back before the pause, percent of its time.
    #[prost(uint32, tag = "11")]
    pub throttle_percent: u32,
}

/// The target has verified and restored everything.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Ready {
    /// The digest as the target computed it.
    #[prost(bytes = "vec", tag = "1")]
    pub digest: Vec<u8>,
    /// Pages with content, as the target counted.
    #[prost(uint64, tag = "2")]
    pub pages: u64,
    /// Zero pages, as the target counted.
    #[prost(uint64, tag = "3")]
    pub zero_pages: u64,
}

/// The target cannot carry on.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Refusal {
    /// A stable code.
    #[prost(string, tag = "1")]
    pub code: String,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// The source gives up.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Cancel {
    /// A stable code.
    #[prost(string, tag = "1")]
    pub code: String,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// Longest message of a peer that is passed on, bytes.
const PEER_TEXT_MAX: usize = 1024;

impl From<&Fault> for Refusal {
    fn from(fault: &Fault) -> Self {
        Self {
            code: fault.code.as_str().to_owned(),
            message: shortened(&fault.message),
        }
    }
}

impl From<&Fault> for Cancel {
    fn from(fault: &Fault) -> Self {
        Self {
            code: fault.code.as_str().to_owned(),
            message: shortened(&fault.message),
        }
    }
}

impl Refusal {
    /// The fault as the source reports it. A code that this build does not know becomes `target_failed`.
    pub fn fault(&self) -> Fault {
        let code = Code::parse(&self.code).unwrap_or(Code::TargetFailed);
        Fault::new(code, format!("the target says: {}", shortened(&self.message)))
    }
}

impl Cancel {
    /// The fault as the target reports it, in the source's words. A code that this build does not know becomes `cancelled`.
    pub fn fault(&self) -> Fault {
        let code = Code::parse(&self.code).unwrap_or(Code::Cancelled);
        Fault::new(code, shortened(&self.message))
    }
}

/// The beginning of a text for the peer, or from it.
pub(crate) fn shortened(text: &str) -> String {
    let end = (0..=PEER_TEXT_MAX.min(text.len()))
        .rev()
        .find(|at| text.is_char_boundary(*at));
    text[..end.unwrap_or(0)].to_owned()
}

/// Any frame but pages.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// Source's first frame.
    Hello(Hello),
    /// Target's answer to it.
    HelloAck(HelloAck),
    /// Source: end of a round.
    RoundEnd(RoundEnd),
    /// Target: the round is written.
    RoundAck(RoundAck),
    /// Source: the saved state.
    State(StateFrame),
    /// Target: all is well.
    Ready(Ready),
    /// Target: it cannot carry on.
    Refusal(Refusal),
    /// Source: it gives up.
    Cancel(Cancel),
    /// Source: a stream for pages begins.
    Join(Join),
    /// Source: a stream's part of a round ends.
    StreamEnd(StreamEnd),
    /// Source: pages that the target lacks.
    Missing(Missing),
    /// Target: pages that its guest waits for.
    PageRequest(PageRequest),
    /// Source: they are sent.
    PageAnswer(PageAnswer),
    /// Target: it has all pages.
    Complete(Complete),
}

impl Message {
    /// The kind of frame it travels as.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::HelloAck(_) => Kind::HelloAck,
            Self::RoundEnd(_) => Kind::RoundEnd,
            Self::RoundAck(_) => Kind::RoundAck,
            Self::State(_) => Kind::State,
            Self::Ready(_) => Kind::Ready,
            Self::Refusal(_) => Kind::Refusal,
            Self::Cancel(_) => Kind::Cancel,
            Self::Join(_) => Kind::Join,
            Self::StreamEnd(_) => Kind::StreamEnd,
            Self::Missing(_) => Kind::Missing,
            Self::PageRequest(_) => Kind::PageRequest,
            Self::PageAnswer(_) => Kind::PageAnswer,
            Self::Complete(_) => Kind::Complete,
        }
    }

    pub(super) fn decode(kind: Kind, payload: &[u8]) -> Result<Self, Fault> {
        let decoded = match kind {
            Kind::Hello => Hello::decode(payload).map(Self::Hello),
            Kind::HelloAck => HelloAck::decode(payload).map(Self::HelloAck),
            Kind::RoundEnd => RoundEnd::decode(payload).map(Self::RoundEnd),
            Kind::RoundAck => RoundAck::decode(payload).map(Self::RoundAck),
            Kind::State => StateFrame::decode(payload).map(Self::State),
            Kind::Ready => Ready::decode(payload).map(Self::Ready),
            Kind::Refusal => Refusal::decode(payload).map(Self::Refusal),
            Kind::Cancel => Cancel::decode(payload).map(Self::Cancel),
            Kind::Join => Join::decode(payload).map(Self::Join),
            Kind::StreamEnd => StreamEnd::decode(payload).map(Self::StreamEnd),
            Kind::Missing => Missing::decode(payload).map(Self::Missing),
            Kind::PageRequest => PageRequest::decode(payload).map(Self::PageRequest),
            Kind::PageAnswer => PageAnswer::decode(payload).map(Self::PageAnswer),
            Kind::Complete => Complete::decode(payload).map(Self::Complete),
            Kind::Pages | Kind::GuardedPages | Kind::Packed | Kind::Deltas | Kind::Zeros => {
                return Err(bad("a page frame is no message"));
            }
        };
        decoded.map_err(|error| bad(format!("a {kind:?} frame cannot be read: {error}")))
    }
}
