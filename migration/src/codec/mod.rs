//! Frames: what the two VMMs write to each other's byte stream.
//!
//! ```text
//!  0      4         5     6         8          16        20     24
//!  +------+---------+-----+---------+----------+---------+------+---------------------
//!  | DRVM | envelope| kind| 0       | sequence | length  | crc  | payload, `length` bytes
//!  +------+---------+-----+---------+----------+---------+------+---------------------
//! ```
//!
//! All numbers are little-endian. `sequence` counts the frames of one direction from 0, so that a frame that was lost,
//! repeated or reordered below us is seen. `crc` is CRC-32 (IEEE 802.3, as in zlib) over the header's first 20 bytes
//! and the payload; of `GuardedPages` the pages' content is left out, since TLS has checked it already. The header's form never changes: a version is agreed inside the first frames, and a build that
//! shares no version must still be able to read the refusal.
//!
//! Pages travel in a form that is filled and read without a copy ([`Pages`], [`Zeros`]), or encoded ([`Packed`], [`Deltas`]); everything else is a small protobuf
//! message ([`Message`]), so that fields can be added. Every size is bounded before memory is taken for it. Nothing here
//! panics on any input. What a frame *means* in its place is not judged here but by the machines.

mod batch;
mod encoded;
mod messages;
mod pages;

use drover_proto::{Code, Fault};
use prost::Message as _;

pub use batch::Batch;
pub use encoded::{Deltas, Packed};
pub(crate) use messages::shortened;
pub use messages::{
    Cancel, Complete, Hello, HelloAck, Join, MISSING_BYTES_MAX, MemoryRegion, Message, Missing, PageAnswer,
    PageRequest, Ready, Refusal, RoundAck, RoundEnd, StateFrame, StreamEnd,
};
pub(crate) use pages::push as push_run;
pub use pages::{Pages, Run, Runs, Zeros};

/// The first bytes of every frame.
pub const MAGIC: [u8; 4] = *b"DRVM";
/// Form of the header.
pub const ENVELOPE: u8 = 1;
/// Length of the header.
pub const HEADER_BYTES: usize = 24;
/// Most pages with content in one frame: 1 MiB of data.
pub const BATCH_PAGES: usize = 256;
/// Most runs in one frame.
pub const RUNS_MAX: usize = BATCH_PAGES;
/// Longest payload of a small message. A hello with the most regions needs less than half.
pub const MESSAGE_BYTES_MAX: usize = 16 * 1024;
/// Longest payload of the frame with the saved state: 32 vCPUs need about 0.5 MiB, the console's scroll-back 256 KiB.
pub const STATE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Most regions a hello may name.
pub const REGIONS_MAX: usize = 64;

const HEADER_CRC_AT: usize = 20;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Source: who it is and what it sends.
    Hello = 1,
    /// Target: agreed.
    HelloAck = 2,
    /// Source: pages with content.
    Pages = 3,
    /// Source: pages that are zero.
    Zeros = 4,
    /// Source: end of a round, with its counts.
    RoundEnd = 5,
    /// Target: the round is in its memory.
    RoundAck = 6,
    /// Source: the saved state, the last frame.
    State = 7,
    /// Target: all is verified and restored.
    Ready = 8,
    /// Target: it cannot carry on.
    Refusal = 9,
    /// Source: it gives up.
    Cancel = 10,
    /// Source: the first frame of a stream for pages.
    Join = 11,
    /// Source: a stream's part of a round is sent.
    StreamEnd = 12,
    /// Source: pages with content, which the checksum leaves out. Only where the stream itself notices every byte that changed.
    GuardedPages = 13,
    /// Source: pages that the target lacks as the source stands paused.
    Missing = 14,
    /// Target: pages that its guest waits for.
    PageRequest = 15,
    /// Source: those are sent.
    PageAnswer = 16,
    /// Target: it has all pages.
    Complete = 17,
    /// Source: pages with content, compressed. Only where the target said that it can read them.
    Packed = 20,
    /// Source: what changed in pages. The same.
    Deltas = 21,
}

impl Kind {
    const ALL: [Self; 19] = [
        Self::Hello,
        Self::HelloAck,
        Self::Pages,
        Self::Zeros,
        Self::RoundEnd,
        Self::RoundAck,
        Self::State,
        Self::Ready,
        Self::Refusal,
        Self::Cancel,
        Self::Join,
        Self::StreamEnd,
        Self::GuardedPages,
        Self::Missing,
        Self::PageRequest,
        Self::PageAnswer,
        Self::Complete,
        Self::Packed,
        Self::Deltas,
    ];

    fn from_wire(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// The longest payload that a frame of this kind may announce.
    pub const fn payload_max(self) -> usize {
        match self {
            Self::Pages | Self::GuardedPages | Self::Packed => pages::PAGES_PAYLOAD_MAX,
            Self::Deltas => encoded::DELTAS_PAYLOAD_MAX,
            Self::Zeros => pages::ZEROS_PAYLOAD_MAX,
            Self::State => STATE_BYTES_MAX,
            _ => MESSAGE_BYTES_MAX,
        }
    }
}

/// A decoded frame.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame<'a> {
    /// Pages with content.
    Pages(Pages<'a>),
    /// Pages with content, compressed.
    Packed(Packed<'a>),
    /// Pages as what changed in them.
    Deltas(Deltas<'a>),
    /// Pages that are zero.
    Zeros(Zeros<'a>),
    /// Anything else.
    Message(Message),
}

impl Frame<'_> {
    /// The frame's kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Pages(_) => Kind::Pages,
            Self::Packed(_) => Kind::Packed,
            Self::Deltas(_) => Kind::Deltas,
            Self::Zeros(_) => Kind::Zeros,
            Self::Message(message) => message.kind(),
        }
    }
}

/// A header that was found sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Length of the payload, within the kind's bound.
    pub length: usize,
    crc: u32,
}

/// A frame that breaks the protocol.
pub(crate) fn bad(message: impl Into<String>) -> Fault {
    Fault::new(Code::BadFrame, message)
}

/// Reads a header. `sequence` is the number the frame must carry.
pub fn decode_header(bytes: &[u8; HEADER_BYTES], sequence: u64) -> Result<Header, Fault> {
    let [m0, m1, m2, m3, envelope, kind, z0, z1, rest @ ..] = *bytes;
    let [s0, s1, s2, s3, s4, s5, s6, s7, l0, l1, l2, l3, c0, c1, c2, c3] = rest;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(bad(format!(
            "a frame begins with {:02x?}, not with {MAGIC:02x?}: the peer is no VMM of Drover, or bytes were lost",
            [m0, m1, m2, m3]
        )));
    }
    if envelope != ENVELOPE {
        return Err(Fault::new(
            Code::ProtocolVersion,
            format!("a frame has envelope version {envelope}, this build reads version {ENVELOPE}"),
        ));
    }
    let known = Kind::from_wire(kind).ok_or_else(|| bad(format!("a frame has the unknown kind {kind}")))?;
    if [z0, z1] != [0, 0] {
        return Err(bad("a frame's reserved bytes are not zero"));
    }
    let found = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    if found != sequence {
        return Err(bad(format!(
            "frame {found} came where frame {sequence} was due: frames were lost or reordered"
        )));
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > known.payload_max() {
        return Err(bad(format!(
            "a {known:?} frame announces {length} bytes, at most {} are allowed",
            known.payload_max()
        )));
    }
    Ok(Header {
        kind: known,
        length,
        crc: u32::from_le_bytes([c0, c1, c2, c3]),
    })
}

/// Reads the payload that belongs to `header`, whose bytes are `raw`.
pub fn decode_payload<'a>(
    raw: &[u8; HEADER_BYTES],
    header: Header,
    payload: &'a [u8],
) -> Result<Frame<'a>, Fault> {
    if payload.len() != header.length {
        return Err(bad(format!(
            "a {:?} frame announces {} bytes and has {}",
            header.kind,
            header.length,
            payload.len()
        )));
    }
    let crc = checksum(raw, header.kind, payload);
    if crc != header.crc {
        return Err(bad(format!(
            "a {:?} frame's checksum is {crc:08x}, it announces {:08x}",
            header.kind, header.crc
        )));
    }
    match header.kind {
        Kind::Pages | Kind::GuardedPages => Pages::decode(payload).map(Frame::Pages),
        Kind::Packed => Packed::decode(payload).map(Frame::Packed),
        Kind::Deltas => Deltas::decode(payload).map(Frame::Deltas),
        Kind::Zeros => Zeros::decode(payload).map(Frame::Zeros),
        kind => Message::decode(kind, payload).map(Frame::Message),
    }
}

/// Reads one frame off the front of `bytes`; gives it and the bytes after it.
pub fn decode(bytes: &[u8], sequence: u64) -> Result<(Frame<'_>, &[u8]), Fault> {
    let Some((raw, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(bad(format!(
            "{} of a header's {HEADER_BYTES} bytes came",
            bytes.len()
        )));
    };
    let header = decode_header(raw, sequence)?;
    let Some((payload, rest)) = rest.split_at_checked(header.length) else {
        return Err(bad(format!(
            "a {:?} frame was cut off: {} of {} bytes came",
            header.kind,
            rest.len(),
            header.length
        )));
    };
    Ok((decode_payload(raw, header, payload)?, rest))
}

/// Encodes `message` as a whole frame into `out`, whose content is replaced.
pub fn encode(message: &Message, sequence: u64, out: &mut Vec<u8>) -> Result<(), Fault> {
    out.clear();
    out.resize(HEADER_BYTES, 0);
    let full = "a vector grows as needed";
    match message {
        Message::Hello(body) => body.encode(out).expect(full),
        Message::HelloAck(body) => body.encode(out).expect(full),
        Message::RoundEnd(body) => body.encode(out).expect(full),
        Message::RoundAck(body) => body.encode(out).expect(full),
        Message::State(body) => body.encode(out).expect(full),
        Message::Ready(body) => body.encode(out).expect(full),
        Message::Refusal(body) => body.encode(out).expect(full),
        Message::Cancel(body) => body.encode(out).expect(full),
        Message::Join(body) => body.encode(out).expect(full),
        Message::StreamEnd(body) => body.encode(out).expect(full),
        Message::Missing(body) => body.encode(out).expect(full),
        Message::PageRequest(body) => body.encode(out).expect(full),
        Message::PageAnswer(body) => body.encode(out).expect(full),
        Message::Complete(body) => body.encode(out).expect(full),
    }
    seal(out, message.kind(), sequence)
}

/// Fills in the header of the frame `frame`, whose first [`HEADER_BYTES`] are free for it.
pub(crate) fn seal(frame: &mut [u8], kind: Kind, sequence: u64) -> Result<(), Fault> {
    let length = frame.len() - HEADER_BYTES;
    if length > kind.payload_max() {
        return Err(bad(format!(
            "a {kind:?} frame would have {length} bytes, at most {} are allowed",
            kind.payload_max()
        )));
    }
    let length = u32::try_from(length).expect("every kind's bound is below 4 GiB");
    let (header, payload) = frame
        .split_first_chunk_mut::<HEADER_BYTES>()
        .expect("a frame has a header");
    header[..4].copy_from_slice(&MAGIC);
    header[4] = ENVELOPE;
    header[5] = kind as u8;
    header[6..8].fill(0);
    header[8..16].copy_from_slice(&sequence.to_le_bytes());
    header[16..20].copy_from_slice(&length.to_le_bytes());
    let crc = checksum(header, kind, payload);
    header[HEADER_CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    Ok(())
}

fn checksum(header: &[u8; HEADER_BYTES], kind: Kind, payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header[..HEADER_CRC_AT]);
    let (before, after) = match kind {
        Kind::GuardedPages => pages::around_data(payload),
        _ => (payload, &[][..]),
    };
    crc.update(before);
    crc.update(after);
    crc.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_end() -> Message {
        Message::RoundEnd(RoundEnd {
            round: 3,
            pages: 70,
            zero_pages: 9,
            last: false,
            post_copy: false,
            missing: 0,
        })
    }

    fn encoded(message: &Message, sequence: u64) -> Vec<u8> {
        let mut out = Vec::new();
        encode(message, sequence, &mut out).unwrap();
        out
    }

    #[test]
    fn a_message_comes_back_as_it_was() {
        let bytes = encoded(&round_end(), 7);
        let (frame, rest) = decode(&bytes, 7).unwrap();
        assert_eq!(frame, Frame::Message(round_end()));
        assert!(rest.is_empty());
    }

    #[test]
    fn every_bit_that_flips_is_noticed() {
        let bytes = encoded(&round_end(), 7);
        for bit in 0..bytes.len() * 8 {
            let mut broken = bytes.clone();
            broken[bit / 8] ^= 1 << (bit % 8);
            let fault = decode(&broken, 7).unwrap_err();
            let envelope = bit / 8 == 4;
            assert_eq!(
                fault.code,
                if envelope {
                    Code::ProtocolVersion
                } else {
                    Code::BadFrame
                },
                "bit {bit}"
            );
        }
    }

    #[test]
    fn a_frame_cut_off_anywhere_is_a_bad_frame() {
        let bytes = encoded(&round_end(), 0);
        for end in 0..bytes.len() {
            assert_eq!(decode(&bytes[..end], 0).unwrap_err().code, Code::BadFrame);
        }
    }

    #[test]
    fn a_lost_or_repeated_frame_shows_in_the_sequence() {
        let bytes = encoded(&round_end(), 7);
        for due in [6, 8] {
            let fault = decode(&bytes, due).unwrap_err();
            assert_eq!(fault.code, Code::BadFrame);
            assert!(fault.message.contains("frame 7 came where frame"), "{fault}");
        }
    }

    #[test]
    fn a_length_beyond_the_kinds_bound_is_refused_before_the_payload_is_read() {
        let mut header: [u8; HEADER_BYTES] = encoded(&round_end(), 0)[..HEADER_BYTES].try_into().unwrap();
        header[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        let fault = decode_header(&header, 0).unwrap_err();
        assert_eq!(fault.code, Code::BadFrame);
        assert!(fault.message.contains("4294967295"), "{fault}");
    }

    #[test]
    fn a_state_too_large_is_refused_by_the_sender_already() {
        let state = Message::State(StateFrame {
            state: vec![0; STATE_BYTES_MAX + 1],
            ..StateFrame::default()
        });
        assert_eq!(
            encode(&state, 0, &mut Vec::new()).unwrap_err().code,
            Code::BadFrame
        );
    }
}
