//! The fuzz target's corpus, replayed and mutated without a fuzzer, so that every test run exercises the codec with
//! hostile bytes. `DROVER_WRITE_CORPUS=1 cargo test -p drover-migration --test corpus` writes the corpus anew.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../fuzz/exercise.rs"]
mod exercise;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use drover_migration::codec::{
    self, Batch, Cancel, HelloAck, Message, Ready, Refusal, RoundAck, RoundEnd, Run, StateFrame,
};
use drover_migration::digest::{Totals, digest};
use drover_migration::encode::cache::Cache;
use drover_migration::encode::compress::{Method, Packer};
use drover_proto::{Code, Fault};
use exercise::{PAGES, exercise, hello};
use proptest::prelude::*;

fn corpus_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/codec")
}

fn stream(messages: &[Message], from: u64) -> Vec<u8> {
    let mut out = Vec::new();
    let mut frame = Vec::new();
    for (sequence, message) in (from..).zip(messages) {
        codec::encode(message, sequence, &mut frame).unwrap();
        out.extend_from_slice(&frame);
    }
    out
}

/// A round with `content` pages of content, the rest of memory zero; `from` is the first frame's number.
fn round(round: u32, content: u64, last: bool, from: u64) -> Vec<u8> {
    let mut batch = Batch::default();
    batch.begin(round);
    batch.add(
        Run {
            first: 0,
            count: PAGES,
        },
        |first, out| {
            for (page, bytes) in (first..).zip(out.chunks_exact_mut(4096)) {
                bytes.fill(u8::from(page < content));
            }
        },
    );
    let mut out = batch.seal_pages(from).unwrap().unwrap().to_vec();
    out.extend_from_slice(batch.seal_zeros(from + 1).unwrap().unwrap());
    let end = RoundEnd {
        round,
        pages: content,
        zero_pages: PAGES - content,
        last,
        ..RoundEnd::default()
    };
    out.extend(stream(&[Message::RoundEnd(end)], from + 2));
    out
}

/// A whole migration as the target reads it.
fn migration() -> Vec<u8> {
    let mut out = stream(&[Message::Hello(hello())], 0);
    out.extend(round(1, 2, false, 1));
    out.extend(round(2, 1, true, 4));
    let totals = Totals {
        rounds: 2,
        pages: 3,
        zero_pages: 2 * PAGES - 3,
    };
    out.extend(stream(&[state(totals)], 7));
    out
}

fn state(totals: Totals) -> Message {
    let state = b"state".to_vec();
    Message::State(StateFrame {
        digest: digest(&state, totals).to_vec(),
        state,
        rounds: totals.rounds,
        pages: totals.pages,
        zero_pages: totals.zero_pages,
        tracker: "bitmap".into(),
        ..StateFrame::default()
    })
}

/// A migration whose pages come compressed first and as deltas then; `from`: the round from which on they are deltas.
fn encoded(method: Method, deltas_from: u32) -> Vec<u8> {
    let (cache, mut packer, mut batch) = (Cache::new(64 << 20), Packer::default(), Batch::default());
    let mut out = stream(&[Message::Hello(hello())], 0);
    let mut sequence = 1;
    for round in 1..=2_u32 {
        batch.begin(round);
        let all = Run {
            first: 0,
            count: PAGES,
        };
        batch.add(all, |_, out| {
            out.fill(7);
            out.chunks_mut(4096)
                .for_each(|page| page[100] = u8::try_from(round).unwrap());
        });
        batch.take_deltas(&cache);
        if round < deltas_from {
            batch.pack(method, &mut packer).unwrap();
        } else if round == 1 {
            batch.take_deltas(&cache);
        }
        if let Some(frame) = batch.seal_deltas(sequence).unwrap() {
            out.extend_from_slice(frame);
        } else {
            out.extend_from_slice(batch.seal_packed(sequence).unwrap().unwrap());
        }
        let end = RoundEnd {
            round,
            pages: PAGES,
            zero_pages: 0,
            last: round == 2,
            ..RoundEnd::default()
        };
        out.extend(stream(&[Message::RoundEnd(end)], sequence + 1));
        sequence += 2;
    }
    let totals = Totals {
        rounds: 2,
        pages: 2 * PAGES,
        zero_pages: 0,
    };
    out.extend(stream(&[state(totals)], sequence));
    out
}

fn seeds() -> BTreeMap<&'static str, Vec<u8>> {
    let fault = Fault::new(Code::BadState, "it cannot be restored");
    let ack = |round| Message::RoundAck(RoundAck { round });
    let hello_ack = Message::HelloAck(HelloAck {
        version: 2,
        ..HelloAck::default()
    });
    let totals = Totals {
        rounds: 2,
        pages: PAGES,
        zero_pages: 0,
    };
    let ready = Ready {
        digest: digest(b"state", totals).to_vec(),
        pages: PAGES,
        zero_pages: 0,
    };
    let mut lying = stream(&[Message::RoundEnd(RoundEnd::default())], 0);
    lying[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    let whole = migration();
    BTreeMap::from([
        ("migration", whole.clone()),
        ("migration-cut", whole[..whole.len() - 7].to_vec()),
        (
            "answers",
            stream(&[hello_ack.clone(), ack(1), ack(2), Message::Ready(ready)], 0),
        ),
        ("answers-wrong-round", stream(&[hello_ack.clone(), ack(7)], 0)),
        (
            "refusal",
            stream(&[hello_ack, Message::Refusal(Refusal::from(&fault))], 0),
        ),
        (
            "cancel",
            stream(
                &[Message::Hello(hello()), Message::Cancel(Cancel::from(&fault))],
                0,
            ),
        ),
        ("hello-other-version", {
            stream(
                &[Message::Hello(codec::Hello {
                    version_min: 9,
                    version_max: 9,
                    ..hello()
                })],
                0,
            )
        }),
        ("length-lies", lying),
        ("not-ours", b"GET / HTTP/1.1\r\n\r\n0000000000".to_vec()),
        ("empty", Vec::new()),
        ("migration-lz4", encoded(Method::Lz4, 2)),
        ("migration-zstd", encoded(Method::Zstd, 2)),
        ("deltas-too-early", encoded(Method::Lz4, 1)),
    ])
}

#[test]
fn the_corpus_on_disk_is_what_the_codec_writes_today() {
    let dir = corpus_dir();
    if std::env::var_os("DROVER_WRITE_CORPUS").is_some() {
        fs::create_dir_all(&dir).unwrap();
        for (name, bytes) in seeds() {
            fs::write(dir.join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in seeds() {
        let found = fs::read(dir.join(name)).unwrap();
        assert!(
            found == bytes,
            "{name} differs: the wire changed; old builds could not read it"
        );
    }
}

#[test]
fn only_the_whole_migration_of_the_corpus_ends_in_ready() {
    for (name, bytes) in seeds() {
        let whole = ["migration", "migration-lz4", "migration-zstd"].contains(&name);
        assert_eq!(exercise(&bytes), whole, "{name}");
    }
}

#[test]
fn every_input_of_the_corpus_is_survived_whole_and_cut_off_anywhere() {
    for entry in fs::read_dir(corpus_dir()).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        exercise(&bytes);
        let step = (bytes.len() / 500).max(1);
        for end in (0..bytes.len()).step_by(step) {
            exercise(&bytes[..end]);
        }
    }
}

/// One change to an input.
#[derive(Clone, Debug)]
enum Edit {
    Set(prop::sample::Index, u8),
    Number(prop::sample::Index, u64),
    Remove(prop::sample::Index, usize),
    Insert(prop::sample::Index, Vec<u8>),
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let at = any::<prop::sample::Index>;
    let number = prop::sample::select(vec![
        0,
        1,
        63,
        64,
        65,
        255,
        256,
        257,
        u64::from(u32::MAX),
        u64::MAX / 2,
        u64::MAX,
    ]);
    let edit = prop_oneof![
        3 => (at(), any::<u8>()).prop_map(|(at, byte)| Edit::Set(at, byte)),
        3 => (at(), number).prop_map(|(at, number)| Edit::Number(at, number)),
        1 => (at(), 1_usize..100).prop_map(|(at, count)| Edit::Remove(at, count)),
        1 => (at(), prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
    ];
    prop::collection::vec(edit, 1..6)
}

fn edited(mut bytes: Vec<u8>, edits: &[Edit]) -> Vec<u8> {
    for edit in edits {
        let len = bytes.len();
        match edit {
            Edit::Set(at, byte) if len > 0 => bytes[at.index(len)] = *byte,
            Edit::Number(at, number) if len >= 8 => {
                let at = at.index(len - 7);
                bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            }
            Edit::Remove(at, count) if len > 0 => {
                let at = at.index(len);
                bytes.drain(at..(at + count).min(len));
            }
            Edit::Insert(at, more) => {
                let at = at.index(len + 1);
                bytes.splice(at..at, more.iter().copied());
            }
            _ => {}
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_inputs_are_survived(seed in prop::sample::select(seeds().into_values().collect::<Vec<_>>()), edits in edits()) {
        exercise(&edited(seed, &edits));
    }

    #[test]
    fn random_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        exercise(&bytes);
    }
}
