//! Both machines, joined by a link that breaks in every way, around a guest that writes between any two steps; either
//! side may die or fail at any step. Time is simulated, one thread, one seed replays a run.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::VecDeque;
use std::time::Duration;

use common::{FakeVm, Flaw, Look, Rng, layout};
use drover_migration::codec::{self, Batch, Frame, Hello, Message, Run};
use drover_migration::convergence::{Costs, Intent, fits};
use drover_migration::encode::cache::Cache;
use drover_migration::encode::compress::{Method, Packer, Unpacker};
use drover_migration::encode::delta;
use drover_migration::handshake::{Expected, TOKEN_BYTES, VERSIONS, feature, regions};
use drover_migration::source::{self, Outcome};
use drover_migration::target;
use drover_migration::vm::{PAGE_SIZE, PageSet, SourceVm, TargetVm};
use drover_proto::{Code, Fault};
use proptest::prelude::*;

/// A run that takes more steps has lost its end.
const STEPS_MAX: usize = 200_000;
/// What the simulated link carries: so much, or so little that pages are written again before their turn.
const LINK_BYTES_PER_S: u64 = 100 << 20;
const SLOW_LINK_BYTES_PER_S: u64 = 5 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    None,
    CutLink,
    TruncateFrame,
    CorruptFrame,
    LoseFrame,
    SwapFrames,
    RepeatFrame,
    KillSource,
    KillTarget,
    CancelSource,
    CancelTarget,
    Source(Flaw),
    Target(Flaw),
}

const TROUBLES: [Trouble; 17] = [
    Trouble::None,
    Trouble::CutLink,
    Trouble::TruncateFrame,
    Trouble::CorruptFrame,
    Trouble::LoseFrame,
    Trouble::SwapFrames,
    Trouble::RepeatFrame,
    Trouble::KillSource,
    Trouble::KillTarget,
    Trouble::CancelSource,
    Trouble::CancelTarget,
    Trouble::Source(Flaw::StartLog),
    Trouble::Source(Flaw::TakeDirty),
    Trouble::Source(Flaw::Pause),
    Trouble::Source(Flaw::Save),
    Trouble::Target(Flaw::Write),
    Trouble::Target(Flaw::Restore),
];

#[derive(Clone, Debug)]
struct Plan {
    seed: u64,
    pages: u64,
    /// Pages that the guest writes, from a random place on.
    hot: u64,
    /// Out of 16 steps so many are the guest's.
    eagerness: usize,
    max_downtime_ms: u64,
    max_throttle: u32,
    trouble: Trouble,
    /// Steps before the trouble.
    at: usize,
    skip_final_pass: bool,
    forget_put_off: bool,
    link_bytes_per_s: u64,
    look: Look,
    /// What the target knows.
    features: u32,
}

impl Plan {
    fn intent(&self) -> Intent {
        Intent {
            max_downtime: Duration::from_millis(self.max_downtime_ms),
            max_throttle: self.max_throttle,
            ..Intent::default()
        }
    }
}

fn plans() -> impl Strategy<Value = Plan> {
    (
        any::<u64>(),
        1_u64..700,
        1_u64..200,
        0_usize..15,
        prop::sample::select(vec![1_u64, 20, 300]),
        prop::sample::select(vec![0_u32, 50, 99]),
        prop::sample::select(TROUBLES.to_vec()),
        0_usize..120,
        prop::sample::select(vec![LINK_BYTES_PER_S, SLOW_LINK_BYTES_PER_S]),
        prop::sample::select(vec![Look::Nothing, Look::All, Look::AllTaken]),
        prop::sample::select(vec![0, feature::LATE_PAGES, feature::ENCODED, feature::ALL]),
    )
        .prop_map(
            |(
                seed,
                pages,
                hot,
                eagerness,
                max_downtime_ms,
                max_throttle,
                trouble,
                at,
                link,
                look,
                features,
            )| Plan {
                seed,
                pages,
                hot: hot.min(pages),
                eagerness,
                max_downtime_ms,
                max_throttle,
                trouble,
                at,
                skip_final_pass: false,
                forget_put_off: false,
                link_bytes_per_s: link,
                look,
                features,
            },
        )
}

/// One direction of the link: whole frames on their way.
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
        self.push(frame);
    }

    fn push(&mut self, frame: Vec<u8>) {
        self.sent += 1;
        self.frames.push_back(frame);
    }
}

struct Side<A> {
    alive: bool,
    actions: VecDeque<A>,
}

struct World {
    plan: Plan,
    rng: Rng,
    now: Duration,
    cut: bool,
    struck: bool,
    source_vm: FakeVm,
    target_vm: FakeVm,
    source_machine: source::Machine,
    target_machine: target::Machine,
    source: Side<source::Action>,
    target_alive: bool,
    to_target: Wire,
    to_source: Wire,
    batch: Batch,
    /// Forms of pages that both sides know.
    forms: u32,
    cache: Cache,
    packer: Packer,
    unpacker: Unpacker,
    encoded: u64,
    hot_from: usize,
    /// How much the guest is held back now, and whether it ever was.
    throttle: u32,
    throttled: bool,
    outcome: Option<Outcome>,
    target_end: Option<Result<target::Done, Fault>>,
    ready_said: bool,
    memory_differed: bool,
    cancel_source: bool,
    cancel_target: bool,
}

fn lost() -> Fault {
    Fault::new(Code::LinkLost, "the link was cut")
}

impl World {
    fn new(plan: Plan) -> Self {
        let mut rng = Rng(plan.seed);
        let source_vm = FakeVm::new(plan.pages);
        for page in 0..usize::try_from(plan.pages).unwrap() {
            if rng.below(3) > 0 {
                source_vm.guest_writes(page, rng.byte());
            }
        }
        source_vm.lock().look = plan.look;
        let target_vm = FakeVm::new(plan.pages);
        match plan.trouble {
            Trouble::Source(flaw) => source_vm.lock().flaw = Some(flaw),
            Trouble::Target(flaw) => target_vm.lock().flaw = Some(flaw),
            _ => {}
        }
        let hello = Hello {
            version_min: *VERSIONS.start(),
            version_max: *VERSIONS.end(),
            migration: "m1".into(),
            vm: "vm1".into(),
            from_host: "host1".into(),
            source_epoch: 4,
            target_epoch: 5,
            page_size: 4096,
            regions: regions(&layout(plan.pages)),
            device_model: 1,
            cpu_profile: "baseline".into(),
            streams: 0,
            plaintext: false,
            // As if the target left out what it does not know.
            features: plan.features,
            local: false,
        };
        let source_machine = source::Machine::new(source::Config {
            hello,
            total_pages: plan.pages,
            intent: plan.intent(),
            costs: Costs::NONE,
            tracker: "bitmap".into(),
            skip_final_pass: plan.skip_final_pass,
            forget_put_off: plan.forget_put_off,
        });
        let target_machine = target::Machine::new(Expected {
            versions: VERSIONS,
            migration: "m1".into(),
            vm: "vm1".into(),
            from_host: "host1".into(),
            epoch: 5,
            layout: layout(plan.pages),
            device_model: 1,
            cpu_profile: "baseline".into(),
            plaintext: false,
            local: false,
            token: [7; TOKEN_BYTES],
            post_copy: Err(drover_migration::post_copy::unavailable()),
        })
        .unwrap();
        Self {
            hot_from: rng.below(usize::try_from(plan.pages - plan.hot + 1).unwrap()),
            plan,
            rng,
            now: Duration::from_secs(100),
            cut: false,
            struck: false,
            source_vm,
            target_vm,
            source_machine,
            target_machine,
            source: Side {
                alive: true,
                actions: VecDeque::new(),
            },
            target_alive: true,
            to_target: Wire::default(),
            to_source: Wire::default(),
            batch: Batch::default(),
            forms: 0,
            cache: Cache::new(64 * 8 * PAGE_SIZE),
            packer: Packer::default(),
            unpacker: Unpacker::default(),
            encoded: 0,
            throttle: 0,
            throttled: false,
            outcome: None,
            target_end: None,
            ready_said: false,
            memory_differed: false,
            cancel_source: false,
            cancel_target: false,
        }
    }

    /// Plays until both sides have ended or are dead.
    fn play(&mut self) {
        self.source.actions = self
            .source_machine
            .handle(self.now, source::Event::Connected)
            .into();
        for step in 0..STEPS_MAX {
            let source_over = self.outcome.is_some() || !self.source.alive;
            let target_over = self.target_end.is_some() || !self.target_alive;
            if source_over && target_over {
                return;
            }
            self.now += Duration::from_micros(self.rng.next() % 20);
            if step >= self.plan.at && !self.struck {
                self.struck = self.strike();
            }
            if self.rng.below(1600) < self.plan.eagerness * (100 - self.throttle as usize) {
                self.guest_writes();
                continue;
            }
            let moved = match self.rng.below(2) {
                0 => self.step_source() || self.step_target(),
                _ => self.step_target() || self.step_source(),
            };
            if !moved {
                // Both wait for a frame that will never come: their time-outs end it.
                self.cut = true;
            }
        }
        panic!("the migration did not end in {STEPS_MAX} steps");
    }

    fn guest_writes(&mut self) {
        let page = self.hot_from + self.rng.below(usize::try_from(self.plan.hot).unwrap());
        let value = self.rng.byte() & 3;
        if self.rng.below(2) == 0 {
            self.source_vm.guest_pokes(page, self.rng.below(PAGE_SIZE), value);
        } else {
            self.source_vm.guest_writes(page, value);
        }
    }

    /// Brings the trouble about, if there is something to hit.
    fn strike(&mut self) -> bool {
        match self.plan.trouble {
            Trouble::CutLink => self.cut = true,
            Trouble::KillSource => (self.source.alive, self.cut) = (false, true),
            Trouble::KillTarget => (self.target_alive, self.cut) = (false, true),
            Trouble::CancelSource => self.cancel_source = true,
            Trouble::CancelTarget => self.cancel_target = true,
            Trouble::None | Trouble::Source(_) | Trouble::Target(_) => {}
            frame_trouble => return self.strike_frame(frame_trouble),
        }
        true
    }

    fn strike_frame(&mut self, trouble: Trouble) -> bool {
        let back = self.rng.below(2) == 0;
        let frames = if back {
            &mut self.to_source.frames
        } else {
            &mut self.to_target.frames
        };
        let due = if trouble == Trouble::SwapFrames { 2 } else { 1 };
        if frames.len() < due {
            return false;
        }
        let at = self.rng.below(frames.len());
        match trouble {
            Trouble::TruncateFrame => {
                let keep = self.rng.below(frames[at].len());
                frames[at].truncate(keep);
                frames.truncate(at + 1);
            }
            Trouble::CorruptFrame => {
                let byte = self.rng.below(frames[at].len());
                frames[at][byte] ^= 1 << self.rng.below(8);
            }
            Trouble::LoseFrame => {
                frames.remove(at);
            }
            Trouble::SwapFrames => frames.swap(0, 1),
            _ => {
                let again = frames[at].clone();
                frames.insert(at, again);
            }
        }
        true
    }

    fn step_source(&mut self) -> bool {
        if !self.source.alive || self.outcome.is_some() {
            return false;
        }
        let Some(action) = self.source.actions.front() else {
            panic!("a machine's list ended without an end")
        };
        if *action == source::Action::Receive
            && self.to_source.frames.is_empty()
            && !self.cut
            && !self.cancel_source
        {
            return false;
        }
        let action = self.source.actions.pop_front().unwrap();
        if let Some(event) = self.perform_source(action) {
            self.source.actions = self.source_machine.handle(self.now, event).into();
            let ends = self
                .source
                .actions
                .iter()
                .filter(|action| matches!(action, source::Action::End(_)))
                .count();
            assert!(ends <= 1 && !self.source.actions.is_empty());
        }
        true
    }

    fn perform_source(&mut self, action: source::Action) -> Option<source::Event> {
        use source::{Action, Event};
        match action {
            Action::Reach(_) | Action::Rest => return None,
            Action::Encode { features, .. } => {
                self.forms = features;
                return None;
            }
            Action::Report(progress) => {
                assert!(progress.bytes_remaining <= progress.bytes_total);
                return None;
            }
            Action::Throttle(percent) => {
                assert!(percent <= self.plan.max_throttle, "held back more than allowed");
                self.throttled |= percent > 0;
                self.throttle = percent;
                return None;
            }
            Action::Send(message) => {
                if matches!(message, Message::Cancel(_)) {
                    assert_eq!(self.throttle, 0, "still held back while a farewell is written");
                }
                if self.cut {
                    let farewell = matches!(message, Message::Cancel(_));
                    return (!farewell).then(|| Event::LinkFailed(lost()));
                }
                self.to_target.send(&message);
                return None;
            }
            Action::End(outcome) => {
                assert!(self.source.actions.is_empty(), "an end is the last action");
                self.source_ended(outcome);
                return None;
            }
            _ if self.cancel_source => return Some(Event::Cancelled),
            _ => {}
        }
        let took = Duration::from_micros(self.rng.next() % 1000);
        let result = match action {
            Action::Receive => Ok(self.source_receives()),
            Action::SendBatch { round, runs, .. } => Ok(self.send_batch(round, &runs)),
            Action::StartLog => self.source_vm.start_dirty_log().map(|()| Event::LogStarted),
            Action::TakeDirty => {
                let mut dirty = PageSet::empty(self.plan.pages);
                self.source_vm
                    .take_dirty(&mut dirty)
                    .map(|()| Event::DirtyTaken(dirty))
            }
            Action::LookDirty => {
                let mut seen = PageSet::empty(self.plan.pages);
                self.source_vm
                    .look_dirty(&mut seen)
                    .map(|()| Event::DirtySeen(seen))
            }
            Action::Pause => {
                let sample = self.source_machine.sample(self.now);
                assert!(
                    fits(&sample, &self.plan.intent()),
                    "paused before the stop rule held: {sample:?}"
                );
                self.now += took;
                self.source_vm.pause().map(|()| Event::Paused { took })
            }
            other => {
                assert_eq!(other, Action::Save);
                assert_eq!(self.throttle, 0, "the throttle outlived the pause");
                self.source_vm.save().map(|state| Event::Saved { state, took })
            }
        };
        Some(result.unwrap_or_else(Event::VmFailed))
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

    fn send_batch(&mut self, round: u32, runs: &[Run]) -> source::Event {
        if self.cut {
            return source::Event::LinkFailed(lost());
        }
        self.batch.begin(round);
        for run in runs {
            for page in run.first..run.end() {
                let vm = &self.source_vm;
                self.batch.add(
                    Run {
                        first: page,
                        count: 1,
                    },
                    |first, out| vm.read_pages(first, out),
                );
            }
        }
        if self.forms & feature::DELTAS != 0 && round > 1 {
            self.encoded += self.batch.take_deltas(&self.cache).1;
        }
        if self.forms & feature::ZSTD != 0 && self.rng.below(3) == 0 && !self.batch.content().is_empty() {
            let method = Method::ALL[self.rng.below(2)];
            let length = self.batch.pack(method, &mut self.packer).unwrap();
            self.encoded += u64::from(length.is_some());
        }
        let mut sent = source::Sent {
            pages: self.batch.pages(),
            zero_pages: self.batch.zero_pages(),
            bytes: 0,
        };
        for form in 0..4 {
            let sequence = self.to_target.sent;
            let frame = match form {
                0 => self.batch.seal_deltas(sequence),
                1 => self.batch.seal_packed(sequence),
                2 => self.batch.seal_pages(sequence),
                _ => self.batch.seal_zeros(sequence),
            };
            if let Some(frame) = frame.unwrap() {
                sent.bytes += frame.len() as u64;
                self.to_target.push(frame.to_vec());
            }
        }
        let took = Duration::from_nanos(sent.bytes * 1_000_000_000 / self.plan.link_bytes_per_s);
        self.now += took;
        if self.plan.link_bytes_per_s == SLOW_LINK_BYTES_PER_S {
            // The guest does not wait for a slow link.
            let writes = usize::try_from(took.as_millis()).unwrap() * self.plan.eagerness / 16;
            for _ in 0..writes * (100 - self.throttle as usize) / 100 {
                self.guest_writes();
            }
        }
        source::Event::BatchSent(sent)
    }

    fn source_ended(&mut self, outcome: Outcome) {
        assert_eq!(self.throttle, 0, "the throttle outlived the attempt");
        let vm = self.source_vm.lock();
        assert!(vm.pauses <= 1, "paused once an attempt at most");
        match &outcome {
            Outcome::AwaitOutcome => assert!(vm.paused && self.ready_said),
            Outcome::FailedRunning(_) => assert_eq!(vm.pauses, 0, "a VM said to run was paused"),
            Outcome::FailedPaused(_) => assert_eq!(vm.pauses, 1),
        }
        drop(vm);
        self.outcome = Some(outcome);
    }

    fn step_target(&mut self) -> bool {
        if !self.target_alive || self.target_end.is_some() {
            return false;
        }
        let bytes = self.to_target.frames.pop_front();
        let event = match &bytes {
            _ if self.cancel_target => target::Event::Cancelled,
            Some(bytes) => match codec::decode(bytes, self.to_target.received) {
                Ok((frame, rest)) => {
                    assert!(rest.is_empty(), "one frame at a time");
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
            let followed = match self.perform_target(action) {
                Ok(None) => continue,
                Ok(Some(event)) => event,
                Err(fault) => target::Event::VmFailed(fault),
            };
            actions = self.target_machine.handle(self.now, followed).into();
        }
        true
    }

    fn perform_target(
        &mut self,
        action: target::Action<'_>,
    ) -> Result<Option<target::Event<'static>>, Fault> {
        use target::{Action, Event};
        match action {
            Action::Reach(_) | Action::Report(_) => {}
            Action::Admit(_) | Action::AdoptMemory => panic!("neither streams nor an upgrade were asked for"),
            Action::Arm(_) | Action::Place { .. } | Action::PlaceZeros { .. } | Action::Stand(_) => {
                panic!("no post-copy was asked for")
            }
            Action::Send(message) => {
                if matches!(message, Message::Ready(_)) {
                    self.check_ready();
                }
                if !self.cut {
                    self.to_source.send(&message);
                } else if !matches!(message, Message::Refusal(_)) {
                    return Ok(Some(Event::LinkFailed(lost())));
                }
            }
            Action::Write { runs, mut data } => {
                for page in runs.iter().flat_map(|run| run.first..run.end()) {
                    let (one, rest) = data.split_at(PAGE_SIZE);
                    self.target_vm.write_pages(page, one)?;
                    data = rest;
                }
                assert!(data.is_empty());
            }
            Action::Unpack(packed) => {
                let mut content = vec![0; packed.content_bytes()];
                self.unpacker.unpack(packed.method, packed.data, &mut content)?;
                let pages = packed.runs.iter().flat_map(|run| run.first..run.end());
                for (page, one) in pages.zip(content.chunks(PAGE_SIZE)) {
                    self.target_vm.write_pages(page, one)?;
                }
            }
            Action::Patch(deltas) => {
                for (page, delta, crc) in deltas.iter() {
                    let mut content = vec![0; PAGE_SIZE];
                    self.target_vm.read_back(page, &mut content)?;
                    delta::patch(&mut content, delta, crc)?;
                    self.target_vm.write_pages(page, &content)?;
                }
            }
            Action::Zero { runs } => {
                for page in runs.iter().flat_map(|run| run.first..run.end()) {
                    self.target_vm.zero_pages(page, 1)?;
                }
            }
            Action::Restore(state) => {
                self.target_vm.restore(&state)?;
                return Ok(Some(Event::Restored));
            }
            Action::End(result) => {
                // A Ready that could not be sent ends in failure: nobody was told, nobody may commit it.
                assert!(result.is_err() || self.ready_said, "an end without Ready");
                self.target_end = Some(result);
            }
        }
        Ok(None)
    }

    /// Ready is being said: all that a target may not be wrong about.
    fn check_ready(&mut self) {
        assert!(!self.ready_said, "Ready is said once");
        self.ready_said = true;
        let (source, target) = (self.source_vm.lock(), self.target_vm.lock());
        assert!(source.paused, "Ready while the source's guest runs");
        assert_eq!(target.restored.as_deref(), Some(&b"registers and devices"[..]));
        self.memory_differed = source.memory != target.memory;
    }
}

fn play(plan: Plan) -> World {
    let mut world = World::new(plan);
    world.play();
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_breaks_it_ends_and_ready_means_that_the_memories_are_equal(plan in plans()) {
        let world = play(plan.clone());
        prop_assert!(!world.memory_differed, "Ready was said over different memory");
        if let Some(Ok(done)) = &world.target_end {
            let counted = done.receipt.pages + done.receipt.zero_pages;
            prop_assert!(counted >= plan.pages && done.receipt.rounds >= 2);
            prop_assert_eq!(done.receipt.throttle_percent > 0, world.throttled);
        }
        if plan.trouble == Trouble::None {
            let fine = matches!(world.outcome, Some(Outcome::AwaitOutcome)) && matches!(world.target_end, Some(Ok(_)));
            let gave_up = matches!(
                &world.outcome,
                Some(Outcome::FailedRunning(fault)) if fault.code == Code::NoConvergence
            );
            prop_assert!(fine || gave_up, "{:?}", world.outcome);
        }
    }
}

/// Plans that differ in the seed and in when the trouble comes.
fn swept(trouble: Trouble, seeds: u64) -> impl Iterator<Item = Plan> {
    (0..seeds).map(move |seed| Plan {
        seed,
        pages: 300,
        hot: 40,
        eagerness: 6,
        max_downtime_ms: 300,
        max_throttle: 0,
        trouble,
        at: usize::try_from(seed).unwrap(),
        skip_final_pass: false,
        forget_put_off: false,
        link_bytes_per_s: LINK_BYTES_PER_S,
        look: Look::All,
        features: feature::ALL,
    })
}

#[test]
fn an_undisturbed_migration_succeeds() {
    let mut encoded = 0;
    for plan in swept(Trouble::None, 50) {
        let world = play(plan);
        encoded += world.encoded;
        assert_eq!(world.outcome, Some(Outcome::AwaitOutcome));
        assert!(matches!(world.target_end, Some(Ok(_))) && !world.memory_differed);
    }
    assert!(encoded > 50, "only {encoded} were compressed or sent as a delta");
}

#[test]
fn a_frame_that_was_harmed_on_the_way_is_never_taken_for_a_good_one() {
    for trouble in [
        Trouble::TruncateFrame,
        Trouble::CorruptFrame,
        Trouble::LoseFrame,
        Trouble::SwapFrames,
        Trouble::RepeatFrame,
    ] {
        let mut harmed = 0;
        for plan in swept(trouble, 60) {
            let world = play(plan);
            // A harmed acknowledgement of Ready is the one case in which the target is done and the source is not.
            if world.struck && world.outcome != Some(Outcome::AwaitOutcome) {
                harmed += 1;
            }
            assert!(!world.memory_differed);
        }
        assert!(harmed > 10, "{trouble:?} was hardly tried");
    }
}

#[test]
fn a_cancel_at_any_step_ends_both_sides_and_the_source_says_whether_it_paused() {
    let (mut running, mut paused) = (0, 0);
    for plan in swept(Trouble::CancelSource, 150) {
        match play(plan).outcome {
            Some(Outcome::FailedRunning(fault)) if fault.code == Code::Cancelled => running += 1,
            Some(Outcome::FailedPaused(fault)) if fault.code == Code::Cancelled => paused += 1,
            Some(Outcome::AwaitOutcome) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(
        running > 0 && paused > 0,
        "{running} before the pause, {paused} after it"
    );
}

/// Plans of a guest that rewrites its hot pages faster than they can be sent, which may be held back.
fn restless(trouble: Trouble, seeds: u64) -> impl Iterator<Item = Plan> {
    swept(trouble, seeds).map(|plan| Plan {
        eagerness: 15,
        hot: 250,
        max_downtime_ms: 2,
        max_throttle: 99,
        at: plan.at * 40,
        ..plan
    })
}

#[test]
fn a_guest_that_writes_too_fast_is_held_back_until_it_converges_and_let_go_at_the_pause() {
    let mut throttled = 0;
    for plan in restless(Trouble::None, 40) {
        let without = play(Plan {
            max_throttle: 0,
            ..plan.clone()
        });
        let Some(Outcome::FailedRunning(fault)) = &without.outcome else {
            continue;
        };
        assert_eq!(fault.code, Code::NoConvergence);
        let world = play(plan);
        assert_eq!(world.outcome, Some(Outcome::AwaitOutcome));
        assert!(world.throttled && !world.memory_differed);
        let Some(Ok(done)) = &world.target_end else {
            panic!("{:?}", world.target_end)
        };
        assert!(
            (20..=99).contains(&done.receipt.throttle_percent),
            "{:?}",
            done.receipt
        );
        throttled += 1;
    }
    assert!(throttled > 20, "only {throttled} needed it");
}

#[test]
fn however_a_throttled_attempt_ends_the_guest_is_let_go() {
    for trouble in TROUBLES {
        // These end it before a second round could show what the guest writes, or say nothing of an end.
        let too_early = matches!(
            trouble,
            Trouble::KillSource
                | Trouble::Source(Flaw::StartLog | Flaw::TakeDirty)
                | Trouble::Target(Flaw::Write)
        );
        let throttled = restless(trouble, 60)
            .map(play)
            .filter(|world| world.throttled && world.outcome.is_some())
            .inspect(|world| assert_eq!(world.throttle, 0))
            .count();
        assert!(too_early || throttled > 0, "{trouble:?} never met a throttle");
    }
}

#[test]
fn a_vm_that_fails_to_restore_leaves_the_source_paused_with_the_targets_reason() {
    for plan in swept(Trouble::Target(Flaw::Restore), 20) {
        let world = play(plan);
        let Some(Outcome::FailedPaused(fault)) = world.outcome else {
            panic!("{:?}", world.outcome)
        };
        assert_eq!(fault.code, Code::BadState);
        assert!(
            fault.message.contains("the target says: Restore fails"),
            "{fault}"
        );
        assert!(!world.ready_said);
    }
}

#[test]
fn without_the_final_pass_the_harness_sees_lost_pages() {
    let differed = swept(Trouble::None, 50)
        .map(|plan| {
            play(Plan {
                skip_final_pass: true,
                ..plan
            })
        })
        .filter(|world| world.memory_differed)
        .count();
    assert!(differed > 0, "the seeded bug went unnoticed");
}

/// Plans of a guest that writes its pages again before a slow link comes to them.
fn rewriting(seeds: u64) -> impl Iterator<Item = Plan> {
    swept(Trouble::None, seeds).map(|plan| Plan {
        pages: 650,
        hot: 350,
        link_bytes_per_s: SLOW_LINK_BYTES_PER_S,
        ..plan
    })
}

#[test]
fn pages_written_again_before_their_turn_are_not_sent_twice() {
    let sent = |plan: Plan| {
        let world = play(plan);
        assert!(!world.memory_differed);
        let Some(Ok(done)) = &world.target_end else {
            panic!("{:?} {:?}", world.outcome, world.target_end)
        };
        done.receipt.pages + done.receipt.zero_pages
    };
    let [mut never, mut later, mut always] = [0; 3];
    for plan in rewriting(30) {
        never += sent(Plan {
            look: Look::Nothing,
            ..plan.clone()
        });
        // A target of before insists on all pages in the first round.
        later += sent(Plan {
            features: feature::ENCODED,
            ..plan.clone()
        });
        always += sent(plan);
    }
    assert!(
        always < later && later <= never,
        "{always} pages with all rounds, {later} without the first, {never} without looking"
    );
}

#[test]
fn pages_that_are_put_off_and_forgotten_are_seen_by_the_harness() {
    let differed = rewriting(50)
        .map(|plan| {
            play(Plan {
                forget_put_off: true,
                look: Look::AllTaken,
                ..plan
            })
        })
        .filter(|world| {
            world.memory_differed
                || matches!(&world.target_end, Some(Err(fault)) if fault.code == Code::DigestMismatch)
        })
        .count();
    assert!(differed > 0, "the seeded bug went unnoticed");
}
