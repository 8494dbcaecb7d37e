//! One event at a time into one machine: the happy path as the literal list of actions, and every lie refused with its code.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../fuzz/exercise.rs"]
#[allow(dead_code, reason = "only the parties' names are needed here")]
mod exercise;

use std::time::Duration;

use drover_migration::codec::{
    self, Batch, Frame, Hello, HelloAck, Message, Ready, Refusal, RoundAck, RoundEnd, Run, StateFrame,
};
use drover_migration::convergence::{Costs, Intent};
use drover_migration::digest::{Totals, digest};
use drover_migration::handshake::{Expected, TOKEN_BYTES, VERSIONS};
use drover_migration::source::{self, Outcome};
use drover_migration::target;
use drover_migration::vm::PageSet;
use drover_proto::v1::MigrationPhase;
use drover_proto::{Code, Fault};
use exercise::{PAGES, hello, layout};

const NOW: Duration = Duration::from_secs(1);

struct Target(target::Machine);

impl Target {
    fn new() -> Self {
        let machine = target::Machine::new(Expected {
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
        });
        Self(machine.unwrap())
    }

    /// A target that has agreed to the hello.
    fn greeted() -> Self {
        let mut target = Self::new();
        target.tell(Message::Hello(hello())).unwrap();
        target
    }

    /// A target that has the whole memory in one round, which was the last one.
    fn swept() -> Self {
        let mut target = Self::greeted();
        target.zeros(1, 0, PAGES).unwrap();
        target.tell(round_end(1, 0, PAGES, true)).unwrap();
        target
    }

    /// The fault that the frame ended it with, if it did; then the source was told the same code.
    fn take(&mut self, frame: Frame<'_>) -> Result<(), Fault> {
        let actions = self.0.handle(NOW, target::Event::Received(frame, 100));
        let Some(target::Action::End(result)) = actions.last() else {
            return Ok(());
        };
        let fault = result.clone().unwrap_err();
        let told = actions.iter().any(|action| {
            matches!(action, target::Action::Send(Message::Refusal(Refusal { code, .. })) if code == fault.code.as_str())
        });
        assert!(told, "the source was not told of {fault}");
        let after = self.0.handle(NOW, target::Event::Restored);
        assert!(after.is_empty(), "something was done after the end");
        Err(fault)
    }

    fn tell(&mut self, message: Message) -> Result<(), Fault> {
        self.take(Frame::Message(message))
    }

    fn pages(&mut self, round: u32, first: u64, count: u64) -> Result<(), Fault> {
        self.batch(round, first, count, 7)
    }

    fn zeros(&mut self, round: u32, first: u64, count: u64) -> Result<(), Fault> {
        self.batch(round, first, count, 0)
    }

    fn batch(&mut self, round: u32, first: u64, count: u64, byte: u8) -> Result<(), Fault> {
        let mut batch = Batch::default();
        batch.begin(round);
        batch.add(Run { first, count }, |_, out| out.fill(byte));
        let frame = if byte == 0 {
            batch.seal_zeros(0)
        } else {
            batch.seal_pages(0)
        };
        self.take(codec::decode(frame.unwrap().unwrap(), 0).unwrap().0)
    }
}

fn round_end(round: u32, pages: u64, zero_pages: u64, last: bool) -> Message {
    Message::RoundEnd(RoundEnd {
        round,
        pages,
        zero_pages,
        last,
        ..RoundEnd::default()
    })
}

/// The state that follows [`Target::swept`].
fn state() -> StateFrame {
    let totals = Totals {
        rounds: 1,
        pages: 0,
        zero_pages: PAGES,
    };
    StateFrame {
        state: b"state".to_vec(),
        digest: digest(b"state", totals).to_vec(),
        rounds: totals.rounds,
        pages: totals.pages,
        zero_pages: totals.zero_pages,
        ..StateFrame::default()
    }
}

fn code(result: Result<(), Fault>) -> Code {
    result.expect_err("the lie was believed").code
}

#[test]
fn a_target_refuses_whatever_comes_before_its_time() {
    assert_eq!(code(Target::new().zeros(1, 0, 1)), Code::BadFrame);
    assert_eq!(code(Target::new().tell(round_end(1, 0, 0, true))), Code::BadFrame);
    assert_eq!(
        code(Target::greeted().tell(Message::State(state()))),
        Code::BadFrame
    );
    assert_eq!(
        code(Target::greeted().tell(Message::RoundAck(RoundAck { round: 1 }))),
        Code::BadFrame
    );
}

#[test]
fn a_target_refuses_whatever_comes_twice_or_too_late() {
    assert_eq!(
        code(Target::greeted().tell(Message::Hello(hello()))),
        Code::BadFrame
    );
    assert_eq!(code(Target::swept().pages(1, 0, 1)), Code::BadFrame);
    assert_eq!(code(Target::swept().zeros(2, 0, 1)), Code::BadFrame);
    assert_eq!(
        code(Target::swept().tell(round_end(2, 0, 0, true))),
        Code::BadFrame
    );
    let mut restoring = Target::swept();
    restoring.tell(Message::State(state())).unwrap();
    assert_eq!(code(restoring.tell(Message::State(state()))), Code::BadFrame);
}

#[test]
fn a_target_refuses_pages_that_lie_outside_memory_or_their_round() {
    assert_eq!(code(Target::greeted().pages(1, PAGES, 1)), Code::BadFrame);
    assert_eq!(code(Target::greeted().zeros(1, PAGES - 1, 2)), Code::BadFrame);
    assert_eq!(code(Target::greeted().zeros(1, u64::MAX - 9, 3)), Code::BadFrame);
    assert_eq!(code(Target::greeted().pages(0, 0, 1)), Code::BadFrame);
    assert_eq!(code(Target::greeted().pages(2, 0, 1)), Code::BadFrame);
    let mut flooded = Target::greeted();
    flooded.zeros(1, 0, PAGES).unwrap();
    assert_eq!(
        code(flooded.pages(1, 0, 1)),
        Code::BadFrame,
        "more pages in a round than memory has"
    );
}

#[test]
fn a_target_refuses_counts_that_differ_from_what_came() {
    for (pages, zero_pages) in [(1, PAGES), (0, PAGES - 1), (0, u64::MAX), (u64::MAX, u64::MAX)] {
        let mut target = Target::greeted();
        target.zeros(1, 0, PAGES).unwrap();
        assert_eq!(
            code(target.tell(round_end(1, pages, zero_pages, false))),
            Code::DigestMismatch
        );
    }
    let mut hole = Target::greeted();
    hole.zeros(1, 1, PAGES - 1).unwrap();
    hole.tell(round_end(1, 0, PAGES - 1, false)).unwrap();
    hole.zeros(2, 1, 5).unwrap();
    assert_eq!(
        code(hole.tell(round_end(2, 0, 5, true))),
        Code::DigestMismatch,
        "page 0 never came"
    );
    let mut older = Target::new();
    older
        .tell(Message::Hello(Hello {
            features: 0,
            ..hello()
        }))
        .unwrap();
    older.zeros(1, 1, PAGES - 1).unwrap();
    assert_eq!(
        code(older.tell(round_end(1, 0, PAGES - 1, false))),
        Code::DigestMismatch,
        "a source that never said so may not leave a page for later"
    );
    let mut skipped = Target::greeted();
    skipped.zeros(1, 0, PAGES).unwrap();
    assert_eq!(code(skipped.tell(round_end(2, 0, PAGES, false))), Code::BadFrame);
}

#[test]
fn a_target_refuses_a_state_whose_digest_or_totals_differ() {
    type Change = fn(&mut StateFrame);
    let changes: [Change; 6] = [
        |state| state.state.push(0),
        |state| state.digest[0] ^= 1,
        |state| state.digest.clear(),
        |state| state.rounds += 1,
        |state| state.pages += 1,
        |state| state.zero_pages -= 1,
    ];
    for change in changes {
        let mut lie = state();
        change(&mut lie);
        assert_eq!(
            code(Target::swept().tell(Message::State(lie))),
            Code::DigestMismatch
        );
    }
    assert_eq!(Target::swept().tell(Message::State(state())), Ok(()));
}

fn source_config() -> source::Config {
    source::Config {
        hello: hello(),
        total_pages: PAGES,
        intent: Intent::default(),
        costs: Costs::NONE,
        tracker: "bitmap".into(),
        skip_final_pass: false,
        forget_put_off: false,
    }
}

/// A source to which `answers` were told, with a VM that is idle and quick.
fn source_after(answers: &[Message]) -> (source::Machine, Vec<source::Action>) {
    let mut machine = source::Machine::new(source_config());
    let mut actions = machine.handle(NOW, source::Event::Connected);
    for answer in answers {
        actions = machine.handle(NOW, source::Event::Received(answer.clone()));
        loop {
            let event = match actions.last().unwrap() {
                source::Action::StartLog => source::Event::LogStarted,
                source::Action::SendBatch { runs, .. } => source::Event::BatchSent(source::Sent {
                    zero_pages: runs.iter().map(|run| run.count).sum(),
                    ..source::Sent::default()
                }),
                source::Action::TakeDirty => source::Event::DirtyTaken(PageSet::empty(PAGES)),
                source::Action::Pause => source::Event::Paused {
                    took: Duration::from_micros(50),
                },
                source::Action::Save => source::Event::Saved {
                    state: b"state".to_vec(),
                    took: Duration::from_micros(70),
                },
                _ => break,
            };
            actions = machine.handle(NOW, event);
        }
    }
    (machine, actions)
}

fn hello_ack() -> Message {
    Message::HelloAck(HelloAck {
        version: 2,
        ..HelloAck::default()
    })
}

fn ack(round: u32) -> Message {
    Message::RoundAck(RoundAck { round })
}

fn ready() -> Message {
    let totals = Totals {
        rounds: 2,
        pages: 0,
        zero_pages: PAGES,
    };
    Message::Ready(Ready {
        digest: digest(b"state", totals).to_vec(),
        pages: 0,
        zero_pages: PAGES,
    })
}

#[test]
fn a_sources_path_step_by_step() {
    use source::Action;
    let machine = source::Machine::new(source_config()).handle(NOW, source::Event::Connected);
    assert_eq!(machine, [Action::Send(Message::Hello(hello())), Action::Receive]);
    let (_, actions) = source_after(&[hello_ack()]);
    assert_eq!(
        actions,
        [Action::Send(round_end(1, 0, PAGES, false)), Action::Receive]
    );
    let (machine, actions) = source_after(&[hello_ack(), ack(1)]);
    assert_eq!(actions, [Action::Send(round_end(2, 0, 0, true)), Action::Receive]);
    assert!(machine.has_paused());
    let (_, actions) = source_after(&[hello_ack(), ack(1), ack(2)]);
    let [
        Action::Send(Message::State(sent)),
        Action::Reach("source.after_state"),
        Action::Receive,
    ] = &actions[..]
    else {
        panic!("{actions:?}")
    };
    assert_eq!(
        (sent.rounds, sent.zero_pages, sent.pause_us, sent.save_us),
        (2, PAGES, 50, 70)
    );
    let (_, actions) = source_after(&[hello_ack(), ack(1), ack(2), ready()]);
    let [
        Action::Reach("source.ready_received"),
        Action::Rest,
        Action::Report(progress),
        Action::End(Outcome::AwaitOutcome),
    ] = &actions[..]
    else {
        panic!("{actions:?}")
    };
    assert_eq!(progress.phase(), MigrationPhase::Ready);
}

#[test]
fn a_source_refuses_answers_that_do_not_fit_and_tells_whether_it_has_paused() {
    let wrong_digest = Message::Ready(Ready {
        digest: vec![0; 32],
        pages: 0,
        zero_pages: PAGES,
    });
    let newer = Message::HelloAck(HelloAck {
        version: 9,
        ..HelloAck::default()
    });
    let Message::Ready(truth) = ready() else {
        panic!("it is Ready")
    };
    let counted = |pages, zero_pages| {
        let lie = Message::Ready(Ready {
            pages,
            zero_pages,
            ..truth.clone()
        });
        (vec![hello_ack(), ack(1), ack(2), lie], Code::DigestMismatch, true)
    };
    for (answers, code, paused) in [
        counted(1, PAGES),
        counted(0, PAGES - 1),
        counted(0, PAGES + 1),
        (vec![ack(1)], Code::BadFrame, false),
        (vec![newer], Code::BadFrame, false),
        (vec![hello_ack(), ack(2)], Code::BadFrame, false),
        (vec![hello_ack(), hello_ack()], Code::BadFrame, false),
        (vec![hello_ack(), ready()], Code::BadFrame, false),
        (vec![hello_ack(), ack(1), ack(1)], Code::BadFrame, true),
        (vec![hello_ack(), ack(1), ready()], Code::BadFrame, true),
        (vec![hello_ack(), ack(1), ack(2), ack(3)], Code::BadFrame, true),
        (
            vec![hello_ack(), ack(1), ack(2), wrong_digest],
            Code::DigestMismatch,
            true,
        ),
    ] {
        let (_, actions) = source_after(&answers);
        let [
            source::Action::Send(Message::Cancel(cancel)),
            source::Action::End(outcome),
        ] = &actions[..]
        else {
            panic!("{answers:?}: {actions:?}")
        };
        assert_eq!(cancel.code, code.as_str(), "{answers:?}");
        match outcome {
            Outcome::FailedRunning(fault) => assert!(!paused && fault.code == code, "{answers:?}: {fault}"),
            Outcome::FailedPaused(fault) => assert!(paused && fault.code == code, "{answers:?}: {fault}"),
            Outcome::AwaitOutcome => panic!("{answers:?} was believed"),
        }
    }
}
