//! What the fuzzer and the test that replays its corpus do with an input: read it as frames, once as it is and once with
//! every checksum and sequence number set right (which no fuzzer would guess), and tell both machines what was read.
//! Nothing may panic, memory stays inside its bounds, and what is decoded must survive being encoded again.

use std::time::Duration;

use drover_migration::codec::{self, Frame, HEADER_BYTES, Hello};
use drover_migration::convergence::{Costs, Intent};
use drover_migration::encode::compress::Unpacker;
use drover_migration::encode::delta;
use drover_migration::handshake::{Expected, TOKEN_BYTES, VERSIONS, feature, regions};
use drover_migration::source;
use drover_migration::target;
use drover_migration::vm::{PAGE_SIZE, PageSet, Region};

/// Pages of the guest that the machines believe in.
pub const PAGES: u64 = 64;

/// See the module. Whether the target, told the input as it is, came to say Ready.
pub fn exercise(bytes: &[u8]) -> bool {
    read(&repaired(bytes));
    read(bytes)
}

/// The layout that hellos of the corpus name.
pub fn layout() -> Vec<Region> {
    vec![Region {
        gpa: 0,
        len: PAGES * PAGE_SIZE as u64,
    }]
}

/// The hello that the target below expects.
pub fn hello() -> Hello {
    Hello {
        version_min: *VERSIONS.start(),
        version_max: *VERSIONS.end(),
        migration: "m1".into(),
        vm: "vm1".into(),
        from_host: "host1".into(),
        source_epoch: 1,
        target_epoch: 2,
        page_size: 4096,
        regions: regions(&layout()),
        device_model: 1,
        cpu_profile: "baseline".into(),
        streams: 0,
        plaintext: false,
        features: feature::ALL,
        local: false,
    }
}

fn read(mut bytes: &[u8]) -> bool {
    let mut target = new_target();
    let mut source = new_source();
    for sequence in 0.. {
        let Ok((frame, rest)) = codec::decode(bytes, sequence) else {
            return false;
        };
        let length = bytes.len() - rest.len();
        let now = Duration::from_millis(sequence);
        tell_source(&mut source, now, &frame);
        if let Frame::Message(message) = &frame {
            let mut again = Vec::new();
            codec::encode(message, sequence, &mut again).expect("what was read can be written");
            let (back, _) = codec::decode(&again, sequence).expect("what was written can be read");
            assert_eq!(back, frame);
        }
        let mut ended = false;
        let mut restore = false;
        for action in target.handle(now, target::Event::Received(frame, length)) {
            match action {
                target::Action::Write { runs, data } => {
                    assert!(runs.end() <= PAGES && data.len() as u64 == runs.pages() * PAGE_SIZE as u64);
                }
                target::Action::Unpack(packed) => {
                    let mut content = vec![0; packed.content_bytes()];
                    assert!(packed.runs.end() <= PAGES && content.len() <= codec::BATCH_PAGES * PAGE_SIZE);
                    let _ = Unpacker::default().unpack(packed.method, packed.data, &mut content);
                }
                target::Action::Patch(deltas) => {
                    assert!(deltas.runs.end() <= PAGES);
                    assert_eq!(deltas.iter().count() as u64, deltas.runs.pages());
                    for (_, delta, crc) in deltas.iter() {
                        let _ = delta::patch(&mut [0; PAGE_SIZE], delta, crc);
                    }
                }
                target::Action::Zero { runs } => assert!(runs.end() <= PAGES),
                target::Action::Restore(_) => restore = true,
                target::Action::End(result) => {
                    assert!(result.is_err(), "no Ready before the VM is restored");
                    ended = true;
                }
                _ => {}
            }
        }
        if restore {
            let actions = target.handle(now, target::Event::Restored);
            assert!(matches!(actions.last(), Some(target::Action::End(Ok(_)))));
            return true;
        }
        if ended {
            return false;
        }
        bytes = rest;
    }
    false
}

/// The frames as if they came from the target; the rest of the source's world answers at once.
fn tell_source(source: &mut source::Machine, now: Duration, frame: &Frame<'_>) {
    let Frame::Message(message) = frame else { return };
    let mut event = source::Event::Received(message.clone());
    loop {
        let actions = source.handle(now, event);
        event = match actions.last() {
            Some(source::Action::StartLog) => source::Event::LogStarted,
            Some(source::Action::SendBatch { runs, .. }) => source::Event::BatchSent(source::Sent {
                pages: runs.iter().map(|run| run.count).sum(),
                ..source::Sent::default()
            }),
            Some(source::Action::TakeDirty) => source::Event::DirtyTaken(PageSet::empty(PAGES)),
            Some(source::Action::Pause) => source::Event::Paused { took: Duration::ZERO },
            Some(source::Action::Save) => source::Event::Saved {
                state: b"state".to_vec(),
                took: Duration::ZERO,
            },
            _ => return,
        };
    }
}

fn new_source() -> source::Machine {
    let mut source = source::Machine::new(source::Config {
        hello: hello(),
        total_pages: PAGES,
        intent: Intent::default(),
        costs: Costs::NONE,
        tracker: "bitmap".into(),
        skip_final_pass: false,
        forget_put_off: false,
    });
    let greeting = source.handle(Duration::ZERO, source::Event::Connected);
    assert_eq!(greeting.last(), Some(&source::Action::Receive));
    source
}

fn new_target() -> target::Machine {
    target::Machine::new(Expected {
        versions: VERSIONS,
        migration: "m1".into(),
        vm: "vm1".into(),
        from_host: "host1".into(),
        epoch: 2,
        layout: layout(),
        device_model: 1,
        cpu_profile: "baseline".into(),
        plaintext: false,
        local: false,
        token: [7; TOKEN_BYTES],
        post_copy: Err(drover_migration::post_copy::unavailable()),
    })
    .expect("the layout is sound")
}

/// The same frames with magic, envelope, sequence and checksum as they should be. What is left over at the end stays.
fn repaired(bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let mut at = 0;
    let mut sequence = 0_u64;
    while let Some(header) = out.get_mut(at..at + HEADER_BYTES) {
        header[..4].copy_from_slice(&codec::MAGIC);
        header[4] = codec::ENVELOPE;
        header[6..8].fill(0);
        header[8..16].copy_from_slice(&sequence.to_le_bytes());
        let announced = u32::from_le_bytes(header[16..20].try_into().expect("four bytes")) as usize;
        let left = out.len() - at - HEADER_BYTES;
        let length = announced.min(left);
        let written = u32::try_from(length).expect("inputs are small");
        out[at + 16..at + 20].copy_from_slice(&written.to_le_bytes());
        let mut crc = crc32fast::Hasher::new();
        crc.update(&out[at..at + 20]);
        crc.update(&out[at + HEADER_BYTES..at + HEADER_BYTES + length]);
        out[at + 20..at + 24].copy_from_slice(&crc.finalize().to_le_bytes());
        at += HEADER_BYTES + length;
        sequence += 1;
    }
    out
}
