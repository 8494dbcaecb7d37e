//! Upgrades: both machines joined by a link that breaks in every way, around a memory that both sides have and a guest that writes
//! whenever it runs, and behind them the log, which takes the first of what the two sides propose. One seed replays a run.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::VecDeque;
use std::time::Duration;

use common::{Rng, layout};
use drover_migration::codec::{self, Frame, Hello, Message};
use drover_migration::convergence::{Costs, Intent};
use drover_migration::handshake::{Expected, TOKEN_BYTES, VERSIONS, regions};
use drover_migration::source::{self, Outcome};
use drover_migration::target;
use drover_proto::{Code, Fault};
use proptest::prelude::*;

const PAGES: u64 = 64;
/// A run that takes more steps has lost its end.
const STEPS_MAX: usize = 2_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    None,
    Cut,
    Corrupt,
    Lose,
    Repeat,
    KillSource,
    KillTarget,
    CancelSource,
    CancelTarget,
    PauseFails,
    SaveFails,
    AdoptFails,
    RestoreFails,
}

const TROUBLES: [Trouble; 13] = [
    Trouble::None,
    Trouble::Cut,
    Trouble::Corrupt,
    Trouble::Lose,
    Trouble::Repeat,
    Trouble::KillSource,
    Trouble::KillTarget,
    Trouble::CancelSource,
    Trouble::CancelTarget,
    Trouble::PauseFails,
    Trouble::SaveFails,
    Trouble::AdoptFails,
    Trouble::RestoreFails,
];

/// One direction: frames on their way.
#[derive(Default)]
struct Wire {
    frames: VecDeque<Vec<u8>>,
    sent: u64,
    received: u64,
}

impl Wire {
    fn send(&mut self, message: &Message) {
        let mut frame = Vec::new();
        codec::encode(message, self.sent, &mut frame).unwrap();
        self.sent += 1;
        self.frames.push_back(frame);
    }
}

struct World {
    rng: Rng,
    trouble: Trouble,
    struck: bool,
    now: Duration,
    cut: bool,
    to_target: Wire,
    to_source: Wire,
    source_machine: source::Machine,
    target_machine: target::Machine,
    source_actions: VecDeque<source::Action>,
    source_alive: bool,
    target_alive: bool,
    /// What both VMMs have mapped, and how the source left it.
    memory: Vec<u8>,
    left: Option<Vec<u8>>,
    paused: bool,
    adopted: bool,
    restored: bool,
    granted: bool,
    outcome: Option<Outcome>,
    target_end: Option<Result<target::Done, Fault>>,
    /// What the log holds: committed or aborted.
    log: Option<bool>,
}

fn lost() -> Fault {
    Fault::new(Code::LinkLost, "the link was cut")
}

fn flaw() -> Fault {
    Fault::new(Code::BadState, "it fails, as planned")
}

impl World {
    fn new(seed: u64, trouble: Trouble) -> Self {
        let hello = Hello {
            version_min: *VERSIONS.start(),
            version_max: *VERSIONS.end(),
            migration: "m1".into(),
            vm: "vm1".into(),
            from_host: "host1".into(),
            source_epoch: 4,
            target_epoch: 5,
            page_size: 4096,
            regions: regions(&layout(PAGES)),
            device_model: 1,
            cpu_profile: "baseline".into(),
            local: true,
            ..Hello::default()
        };
        let expected = Expected {
            versions: VERSIONS,
            migration: "m1".into(),
            vm: "vm1".into(),
            from_host: "host1".into(),
            epoch: 5,
            layout: layout(PAGES),
            device_model: 1,
            cpu_profile: "baseline".into(),
            plaintext: false,
            local: true,
            token: [7; TOKEN_BYTES],
            post_copy: Ok(()),
        };
        Self {
            rng: Rng(seed),
            trouble,
            struck: false,
            now: Duration::from_secs(100),
            cut: false,
            to_target: Wire::default(),
            to_source: Wire::default(),
            source_machine: source::Machine::new(config(hello)),
            target_machine: target::Machine::new(expected).unwrap(),
            source_actions: VecDeque::new(),
            source_alive: true,
            target_alive: true,
            memory: vec![0; 256],
            left: None,
            paused: false,
            adopted: false,
            restored: false,
            granted: false,
            outcome: None,
            target_end: None,
            log: None,
        }
    }

    /// Plays until the two have ended and the log has decided, the trouble after `at` steps.
    fn play(&mut self, at: usize) {
        self.source_actions = self
            .source_machine
            .handle(self.now, source::Event::Connected)
            .into();
        for step in 0..STEPS_MAX {
            self.now += Duration::from_micros(10);
            if step >= at && !self.struck {
                self.struck = self.strike();
            }
            self.guest_writes();
            self.check();
            if self.log.is_some() {
                return;
            }
            let moved = match self.rng.below(3) {
                0 => self.step_source() || self.step_target(),
                1 => self.step_target() || self.step_source(),
                _ => self.decide(),
            };
            if !moved && !self.step_source() && !self.step_target() && !self.decide() {
                // Both wait for a frame that will never come: their time-outs end it.
                self.cut = true;
            }
        }
        panic!("it did not end in {STEPS_MAX} steps");
    }

    fn source_runs(&self) -> bool {
        self.source_alive && !self.paused
    }

    fn target_runs(&self) -> bool {
        self.target_alive && self.granted
    }

    fn check(&self) {
        assert!(!(self.source_runs() && self.target_runs()), "two VMMs run");
        if let Some(left) = &self.left
            && !self.source_runs()
            && !self.target_runs()
        {
            assert_eq!(&self.memory, left, "memory changed while nobody ran");
        }
    }

    /// Whoever runs writes; the first to run after the pause must find memory as it was left.
    fn guest_writes(&mut self) {
        if !self.source_runs() && !self.target_runs() {
            return;
        }
        if let Some(left) = self.left.take() {
            assert_eq!(self.memory, left, "the guest goes on with another memory");
        }
        let at = self.rng.below(self.memory.len());
        self.memory[at] = self.rng.byte();
    }

    fn strike(&mut self) -> bool {
        match self.trouble {
            Trouble::Cut => self.cut = true,
            Trouble::KillSource => (self.source_alive, self.cut) = (false, true),
            Trouble::KillTarget => (self.target_alive, self.cut) = (false, true),
            Trouble::Corrupt | Trouble::Lose | Trouble::Repeat => return self.strike_frame(),
            _ => {}
        }
        true
    }

    fn strike_frame(&mut self) -> bool {
        let frames = match self.rng.below(2) {
            0 => &mut self.to_source.frames,
            _ => &mut self.to_target.frames,
        };
        let Some(frame) = frames.front_mut() else {
            return false;
        };
        match self.trouble {
            Trouble::Corrupt => {
                let byte = self.rng.below(frame.len());
                frame[byte] ^= 1 << self.rng.below(8);
            }
            Trouble::Lose => drop(frames.pop_front()),
            _ => {
                let again = frame.clone();
                frames.push_front(again);
            }
        }
        true
    }

    /// An agent proposes what its VMM says; the first proposal is the log's.
    fn decide(&mut self) -> bool {
        let commits = self.target_alive && matches!(self.target_end, Some(Ok(_)));
        let aborts = !self.target_alive
            || matches!(self.target_end, Some(Err(_)))
            || matches!(
                self.outcome,
                Some(Outcome::FailedRunning(_) | Outcome::FailedPaused(_))
            )
            || !self.source_alive;
        let committed = match (commits, aborts) {
            (false, false) => return false,
            (true, true) => self.rng.below(2) == 0,
            (committed, _) => committed,
        };
        self.log = Some(committed);
        if committed {
            assert!(self.paused, "committed while the source runs");
            self.source_alive = false;
            self.granted = true;
        } else {
            self.target_alive = false;
            self.paused = false;
        }
        self.guest_writes();
        self.check();
        true
    }

    fn step_source(&mut self) -> bool {
        if !self.source_alive || self.outcome.is_some() {
            return false;
        }
        let cancelled = self.struck && self.trouble == Trouble::CancelSource;
        let waits = self.source_actions.front() == Some(&source::Action::Receive);
        if waits && self.to_source.frames.is_empty() && !self.cut && !cancelled {
            return false;
        }
        let action = self.source_actions.pop_front().unwrap();
        if let Some(event) = self.perform_source(action, cancelled) {
            self.source_actions = self.source_machine.handle(self.now, event).into();
        }
        true
    }

    fn perform_source(&mut self, action: source::Action, cancelled: bool) -> Option<source::Event> {
        use source::{Action, Event};
        match action {
            Action::Reach(_) | Action::Report(_) | Action::Rest => None,
            Action::Send(message) if self.cut => {
                let farewell = matches!(message, Message::Cancel(_));
                (!farewell).then(|| Event::LinkFailed(lost()))
            }
            Action::Send(message) => {
                self.to_target.send(&message);
                None
            }
            Action::End(outcome) => {
                match &outcome {
                    Outcome::AwaitOutcome => assert!(self.paused && self.restored),
                    Outcome::FailedRunning(_) => assert!(!self.paused, "said to run, and paused"),
                    Outcome::FailedPaused(_) => {}
                }
                self.outcome = Some(outcome);
                None
            }
            _ if cancelled => Some(Event::Cancelled),
            Action::Receive => Some(self.source_receives()),
            Action::Pause if self.trouble == Trouble::PauseFails => Some(Event::VmFailed(flaw())),
            Action::Pause => {
                assert!(self.adopted, "paused before the target has the memory");
                self.paused = true;
                self.left = Some(self.memory.clone());
                let took = Duration::from_micros(5);
                Some(Event::Paused { took })
            }
            Action::Save if self.trouble == Trouble::SaveFails => Some(Event::VmFailed(flaw())),
            Action::Save => {
                assert!(self.paused, "only a paused VM is saved");
                let state = b"registers and devices".to_vec();
                let took = Duration::from_micros(5);
                Some(Event::Saved { state, took })
            }
            other => panic!("an upgrade has no {other:?}"),
        }
    }

    fn source_receives(&mut self) -> source::Event {
        let Some(bytes) = self.to_source.frames.pop_front() else {
            return source::Event::LinkFailed(lost());
        };
        match codec::decode(&bytes, self.to_source.received) {
            Ok((Frame::Message(message), [])) => {
                self.to_source.received += 1;
                source::Event::Received(message)
            }
            Ok(_) => source::Event::LinkFailed(Fault::new(Code::BadFrame, "not a message")),
            Err(fault) => source::Event::LinkFailed(fault),
        }
    }

    fn step_target(&mut self) -> bool {
        if !self.target_alive || self.target_end.is_some() {
            return false;
        }
        let bytes = self.to_target.frames.pop_front();
        let event = match &bytes {
            _ if self.struck && self.trouble == Trouble::CancelTarget => target::Event::Cancelled,
            Some(bytes) => match codec::decode(bytes, self.to_target.received) {
                Ok((frame, _)) => {
                    self.to_target.received += 1;
                    target::Event::Received(frame, bytes.len())
                }
                Err(fault) => target::Event::LinkFailed(fault),
            },
            None if self.cut || self.outcome.is_some() => target::Event::LinkFailed(lost()),
            None => return false,
        };
        let mut actions = VecDeque::from(self.target_machine.handle(self.now, event));
        while let Some(action) = actions.pop_front() {
            if let Some(followed) = self.perform_target(action) {
                actions = self.target_machine.handle(self.now, followed).into();
            }
        }
        true
    }

    fn perform_target(&mut self, action: target::Action<'_>) -> Option<target::Event<'static>> {
        use target::{Action, Event};
        match action {
            Action::AdoptMemory if self.trouble == Trouble::AdoptFails => {
                return Some(Event::VmFailed(flaw()));
            }
            Action::AdoptMemory => {
                assert!(
                    !self.paused && !self.adopted,
                    "the guest waits for what could be done before"
                );
                self.adopted = true;
                return Some(Event::MemoryAdopted);
            }
            Action::Restore(_) if self.trouble == Trouble::RestoreFails => {
                return Some(Event::VmFailed(flaw()));
            }
            Action::Restore(state) => {
                assert!(self.paused, "restored from a VM that runs");
                assert_eq!(state, b"registers and devices");
                self.restored = true;
                return Some(Event::Restored);
            }
            Action::Send(message) if self.cut => {
                let refusal = matches!(message, Message::Refusal(_));
                return (!refusal).then(|| Event::LinkFailed(lost()));
            }
            Action::Send(message) => self.to_source.send(&message),
            Action::End(result) => {
                assert!(
                    result.is_err() || (self.paused && self.restored),
                    "ready without the state"
                );
                self.target_end = Some(result);
            }
            Action::Reach(_) | Action::Report(_) => {}
            other => panic!("an upgrade has no {other:?}"),
        }
        None
    }
}

fn config(hello: Hello) -> source::Config {
    source::Config {
        hello,
        total_pages: PAGES,
        intent: Intent::default(),
        costs: Costs::NONE,
        tracker: "none".into(),
        skip_final_pass: false,
        forget_put_off: false,
    }
}

fn play(seed: u64, trouble: Trouble, at: usize) -> World {
    let mut world = World::new(seed, trouble);
    world.play(at);
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_breaks_one_vmm_at_most_runs_and_it_finds_the_memory_as_it_was_left(
        seed in any::<u64>(), trouble in prop::sample::select(TROUBLES.to_vec()), at in 0_usize..40,
    ) {
        let world = play(seed, trouble, at);
        let committed = world.log == Some(true);
        if trouble == Trouble::None {
            prop_assert!(committed && world.target_runs());
            let Some(Ok(done)) = &world.target_end else { panic!("{:?}", world.target_end) };
            let receipt = &done.receipt;
            prop_assert_eq!((receipt.pages, receipt.zero_pages, receipt.rounds), (0, 0, 1));
        }
        let never = [Trouble::PauseFails, Trouble::SaveFails, Trouble::AdoptFails, Trouble::RestoreFails];
        prop_assert!(!(never.contains(&trouble) && committed), "{trouble:?} was committed");
        if !committed && world.source_alive {
            prop_assert!(world.source_runs(), "aborted, and nobody runs");
        }
    }
}

#[test]
fn every_trouble_meets_upgrades_before_and_after_their_pause() {
    for trouble in [Trouble::Cut, Trouble::CancelSource, Trouble::KillTarget] {
        let (mut running, mut paused) = (0, 0);
        for seed in 0..200 {
            let world = play(seed, trouble, usize::try_from(seed % 40).unwrap());
            match world.outcome {
                Some(Outcome::FailedRunning(_)) => running += 1,
                Some(Outcome::FailedPaused(_)) => paused += 1,
                _ => {}
            }
        }
        assert!(
            running > 0 && paused > 0,
            "{trouble:?}: {running} before the pause, {paused} after it"
        );
    }
}

#[test]
fn a_page_or_a_second_round_is_refused() {
    let mut world = World::new(1, Trouble::None);
    let hello = world.source_machine.handle(world.now, source::Event::Connected);
    let Some(source::Action::Send(Message::Hello(hello))) = hello.first().cloned() else {
        panic!("{hello:?}")
    };
    let now = world.now;
    let target = &mut world.target_machine;
    target.handle(
        now,
        target::Event::Received(Frame::Message(Message::Hello(hello)), 1),
    );
    target.handle(now, target::Event::MemoryAdopted);
    let mut batch = codec::Batch::default();
    batch.begin(1);
    batch.add(codec::Run { first: 0, count: 1 }, |_, out| out.fill(1));
    let bytes = batch.seal_pages(0).unwrap().unwrap().to_vec();
    let (frame, _) = codec::decode(&bytes, 0).unwrap();
    let actions = target.handle(now, target::Event::Received(frame, bytes.len()));
    let refused = |action: &target::Action<'_>| matches!(action, target::Action::End(Err(fault)) if fault.code == Code::BadFrame);
    assert!(actions.iter().any(refused), "{actions:?}");
    assert!(
        !actions
            .iter()
            .any(|action| matches!(action, target::Action::Write { .. }))
    );
}
