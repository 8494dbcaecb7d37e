//! Post-copy: the machines of both sides around two guests, one step at a time in any order; then the whole engine over sockets, with
//! a guest that runs at the target while its pages come, and with links that are cut.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::VecDeque;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Duration;

use common::{FakeVm, Flaw, Look, Rng, layout};
use drover_migration::Control;
use drover_migration::codec::{self, Batch, Frame, Hello, Message, Run, Runs, StreamEnd};
use drover_migration::convergence::{Costs, Intent};
use drover_migration::handshake::{Expected, TOKEN_BYTES, VERSIONS, feature, regions};
use drover_migration::post_copy::{OnFault, Outgoing, PostCopyVm};
use drover_migration::source::{self, Outcome, Sent, Way};
use drover_migration::target::{self, Admission, Received};
use drover_migration::transport::{Link, Stop};
use drover_migration::vm::{PAGE_SIZE, PageSet, SourceVm, TargetVm};
use drover_proto::v1::{Compression, MigrationOptions};
use drover_proto::{Code, Fault};
use proptest::prelude::*;

const STREAMS: u32 = 2;
const STEPS_MAX: usize = 100_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    None,
    /// The link, and with it everything.
    CutLink,
    /// One of the streams.
    CutStream,
    /// A frame of a stream comes again, later.
    RepeatPages,
}

#[derive(Clone, Debug)]
struct Plan {
    seed: u64,
    pages: u64,
    /// The source switches when so many batches were sent.
    switch_after: usize,
    trouble: Trouble,
    /// Steps after Ready before the trouble.
    at: usize,
    /// A deliberate mistake of the target: it keeps what it has of the missing pages.
    keep_stale: bool,
    /// And another: who waits for a missing page gets zeroes.
    make_zeros: bool,
    /// What the source finds when it looks in the middle of a round which pages were written again.
    look: Look,
    /// It finds nothing before so many batches were sent.
    look_after: usize,
    /// Pages that the guest writes in one step at the source.
    burst: usize,
    /// Most microseconds of a step: with long ones the source gets to look.
    step_us: u64,
    /// A deliberate mistake of the source: it forgets the pages that were put off because they were written again.
    forget_put_off: bool,
}

fn plans() -> impl Strategy<Value = Plan> {
    use Trouble::{CutLink, CutStream, None, RepeatPages};
    let troubles = prop::sample::select(vec![None, CutLink, CutStream, RepeatPages]);
    let looks = prop::sample::select(vec![Look::Nothing, Look::All, Look::AllTaken]);
    let paces = prop::sample::select(vec![200, 8000]);
    let plans = (
        any::<u64>(),
        1_u64..900,
        0_usize..12,
        troubles,
        0_usize..60,
        looks,
        paces,
    );
    plans.prop_map(|(seed, pages, switch_after, trouble, at, look, step_us)| Plan {
        seed,
        pages,
        switch_after,
        trouble,
        at,
        keep_stale: false,
        make_zeros: false,
        look,
        look_after: 0,
        burst: 1,
        step_us,
        forget_put_off: false,
    })
}

struct World {
    plan: Plan,
    rng: Rng,
    now: Duration,
    source_vm: FakeVm,
    target_vm: FakeVm,
    source: source::Machine,
    target: target::Machine,
    actions: VecDeque<source::Action>,
    to_target: VecDeque<Vec<u8>>,
    to_source: VecDeque<Vec<u8>>,
    streams: Vec<VecDeque<Vec<u8>>>,
    sent: Sent,
    batches: usize,
    pushing: Option<(u32, Outgoing)>,
    asked: bool,
    cut: bool,
    restored: bool,
    ready: bool,
    since_ready: usize,
    struck: bool,
    /// What each page must hold for the guest at the target.
    expected: Vec<u8>,
    waiting: Option<usize>,
    outcome: Option<Outcome>,
    end: Option<Result<target::Done, Fault>>,
}

fn lost() -> Fault {
    Fault::new(Code::LinkLost, "the link was cut")
}

impl World {
    fn new(plan: Plan) -> Self {
        let mut rng = Rng(plan.seed);
        let (source_vm, target_vm) = (FakeVm::new(plan.pages), FakeVm::new(plan.pages));
        source_vm.lock().look = plan.look;
        for page in 0..usize::try_from(plan.pages).unwrap() {
            if rng.below(3) > 0 {
                source_vm.guest_writes(page, rng.byte());
            }
        }
        // Nothing is short enough, so that it is always by post-copy.
        let intent = Intent {
            post_copy: true,
            max_downtime: Duration::ZERO,
            ..Intent::default()
        };
        let source = source::Machine::new(source::Config {
            hello: Hello {
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
                streams: STREAMS,
                plaintext: false,
                local: false,
                features: feature::ALL,
            },
            total_pages: plan.pages,
            intent,
            costs: Costs::NONE,
            tracker: "bitmap".into(),
            skip_final_pass: false,
            forget_put_off: plan.forget_put_off,
        });
        let target = target::Machine::new(Expected {
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
            post_copy: Ok(()),
        })
        .unwrap();
        Self {
            plan,
            rng,
            now: Duration::from_secs(100),
            source_vm,
            target_vm,
            source,
            target,
            actions: VecDeque::new(),
            to_target: VecDeque::new(),
            to_source: VecDeque::new(),
            streams: (0..STREAMS).map(|_| VecDeque::new()).collect(),
            sent: Sent::default(),
            batches: 0,
            pushing: None,
            asked: false,
            cut: false,
            restored: false,
            ready: false,
            since_ready: 0,
            struck: false,
            expected: Vec::new(),
            waiting: None,
            outcome: None,
            end: None,
        }
    }

    fn play(&mut self) {
        self.actions = self.source.handle(self.now, source::Event::Connected).into();
        for _ in 0..STEPS_MAX {
            if self.outcome.is_some() && self.end.is_some() {
                return;
            }
            self.now += Duration::from_micros(self.rng.next() % self.plan.step_us);
            self.since_ready += usize::from(self.ready);
            if self.since_ready > self.plan.at && !self.struck {
                self.strike();
            }
            match self.rng.below(6) {
                0 => self.step_source(),
                1 => self.target_link(),
                2 => self.target_stream(),
                3 => self.push(),
                4 => self.target_asks(),
                _ => self.guests(),
            }
        }
        panic!(
            "it did not end in {STEPS_MAX} steps: {:?} {:?}",
            self.outcome, self.end
        );
    }

    fn strike(&mut self) {
        self.struck = true;
        let stream = self.rng.below(STREAMS as usize);
        match self.plan.trouble {
            Trouble::None => {}
            Trouble::CutLink => {
                self.cut = true;
                self.to_target.clear();
                self.to_source.clear();
            }
            Trouble::CutStream => {
                self.streams[stream].clear();
                self.streams[stream].push_back(Vec::new());
            }
            Trouble::RepeatPages => match self.streams[stream].front().cloned() {
                Some(frame) if matches!(codec::decode(&frame, 0), Ok((Frame::Pages(_), _))) => {
                    self.streams[stream].push_front(frame);
                }
                _ => self.struck = false,
            },
        }
    }

    fn guests(&mut self) {
        let page = self.rng.below(usize::try_from(self.plan.pages).unwrap());
        let value = self.rng.byte();
        if !self.ready {
            self.source_vm.guest_writes(page, value);
            for _ in 1..self.plan.burst {
                let page = self.rng.below(usize::try_from(self.plan.pages).unwrap());
                self.source_vm.guest_writes(page, self.rng.byte());
            }
            return;
        }
        // It stands still until it has what it waits for, as a vCPU does.
        let page = self.waiting.take().unwrap_or(page);
        match self.target_vm.touch(page, value) {
            Some(was) => {
                assert_eq!(
                    was, self.expected[page],
                    "the guest did not find page {page} as it had left it"
                );
                self.expected[page] = value;
            }
            None => self.waiting = Some(page),
        }
    }

    fn step_source(&mut self) {
        use source::{Action, Event};
        if self.outcome.is_some() {
            return;
        }
        let waits = matches!(self.actions.front(), Some(Action::Receive));
        if waits && self.to_source.is_empty() && !self.cut {
            return;
        }
        if self.batches >= self.plan.switch_after {
            self.source.want_post_copy();
        }
        let event = match self
            .actions
            .pop_front()
            .expect("a list ends with what brings the next event")
        {
            Action::Reach(_)
            | Action::Report(_)
            | Action::Rest
            | Action::Throttle(_)
            | Action::Serve
            | Action::Encode { .. } => return,
            Action::Send(_) if self.cut => Event::LinkFailed(lost()),
            Action::Send(message) => {
                let mut frame = Vec::new();
                codec::encode(&message, 0, &mut frame).unwrap();
                self.to_target.push_back(frame);
                return;
            }
            Action::Receive => match self.to_source.pop_front() {
                None => Event::LinkFailed(lost()),
                Some(bytes) => match codec::decode(&bytes, 0).unwrap() {
                    (Frame::Message(message), []) => Event::Received(message),
                    other => panic!("{other:?}"),
                },
            },
            Action::OpenStreams { count, .. } => {
                assert_eq!(count, STREAMS);
                Event::StreamsOpen
            }
            Action::StartLog => {
                self.source_vm.start_dirty_log().unwrap();
                Event::LogStarted
            }
            Action::SendBatch { round, runs, .. } => {
                self.batches += 1;
                let (frames, sent) = self.encode(round, &runs);
                self.on_a_stream(frames);
                self.sent.add(sent);
                Event::BatchSent(Sent::default())
            }
            Action::EndStreams { round, last } => {
                self.end_streams(round, last);
                Event::StreamsEnded(std::mem::take(&mut self.sent))
            }
            Action::TakeDirty => {
                let mut dirty = PageSet::empty(self.plan.pages);
                self.source_vm.take_dirty(&mut dirty).unwrap();
                Event::DirtyTaken(dirty)
            }
            Action::LookDirty => {
                let mut seen = PageSet::empty(self.plan.pages);
                if self.batches >= self.plan.look_after {
                    self.source_vm.look_dirty(&mut seen).unwrap();
                }
                Event::DirtySeen(seen)
            }
            Action::Pause => {
                self.source_vm.pause().unwrap();
                let memory = &self.source_vm.lock().memory;
                self.expected = memory.iter().step_by(PAGE_SIZE).copied().collect();
                Event::Paused {
                    took: Duration::from_micros(100),
                }
            }
            Action::Save => Event::Saved {
                state: self.source_vm.save().unwrap(),
                took: Duration::from_micros(100),
            },
            Action::Answer { round, runs } => {
                if let Some((_, outgoing)) = &mut self.pushing {
                    outgoing.asked(&runs);
                }
                let (frames, _) = self.encode(round, &runs);
                if !self.cut {
                    self.to_target.extend(frames);
                }
                return;
            }
            Action::Push { round, pages } => {
                self.pushing = Some((round, Outgoing::new(pages)));
                return;
            }
            Action::End(outcome) => {
                self.outcome = Some(outcome);
                return;
            }
        };
        self.actions = self.source.handle(self.now, event).into();
    }

    fn encode(&self, round: u32, runs: &[Run]) -> (Vec<Vec<u8>>, Sent) {
        let mut batch = Batch::default();
        batch.begin(round);
        for run in runs {
            for first in run.first..run.end() {
                batch.add(Run { first, count: 1 }, |first, out| {
                    self.source_vm.read_pages(first, out)
                });
            }
        }
        let pages = batch.seal_pages(0).unwrap().map(<[u8]>::to_vec);
        let zeros = batch.seal_zeros(0).unwrap().map(<[u8]>::to_vec);
        let sent = Sent {
            pages: batch.pages(),
            zero_pages: batch.zero_pages(),
            bytes: 0,
        };
        (pages.into_iter().chain(zeros).collect(), sent)
    }

    fn on_a_stream(&mut self, frames: Vec<Vec<u8>>) {
        let stream = self.rng.below(STREAMS as usize);
        let broken = self.streams[stream].back().is_some_and(Vec::is_empty);
        if !broken && !self.cut {
            self.streams[stream].extend(frames);
        }
    }

    fn end_streams(&mut self, round: u32, last: bool) {
        let mut frame = Vec::new();
        codec::encode(&Message::StreamEnd(StreamEnd { round, last }), 0, &mut frame).unwrap();
        for stream in &mut self.streams {
            if !stream.back().is_some_and(Vec::is_empty) {
                stream.push_back(frame.clone());
            }
        }
    }

    /// A job in the background.
    fn push(&mut self) {
        let Some((round, outgoing)) = &mut self.pushing else {
            return;
        };
        let (round, runs) = (*round, outgoing.take());
        if runs.is_empty() {
            self.pushing = None;
            self.end_streams(round, true);
            return;
        }
        let (frames, _) = self.encode(round, &runs);
        self.on_a_stream(frames);
    }

    fn target_link(&mut self) {
        if self.end.is_some() {
            return;
        }
        let Some(frame) = self.to_target.pop_front() else {
            if self.cut {
                let actions = self.target.handle(self.now, target::Event::LinkFailed(lost()));
                self.carry_out(actions.into_iter().map(own).collect());
            }
            return;
        };
        let (decoded, _) = codec::decode(&frame, 0).unwrap();
        let round_ends = matches!(decoded, Frame::Message(Message::RoundEnd(_)));
        if round_ends && !self.target.streams_have_ended() {
            self.to_target.push_front(frame);
            return;
        }
        self.asked &= !matches!(decoded, Frame::Message(Message::PageAnswer(_)));
        let event = target::Event::Received(decoded, frame.len());
        let actions = self.target.handle(self.now, event).into_iter().map(own).collect();
        self.carry_out(actions);
    }

    fn target_stream(&mut self) {
        let index = self.rng.below(STREAMS as usize);
        if self.end.is_some() {
            return;
        }
        match self.streams[index].front() {
            Some(frame) if frame.is_empty() => {
                assert!(self.target.bears_broken_stream(u32::try_from(index).unwrap()));
            }
            Some(_) => {
                let frame = self.streams[index].pop_front().unwrap();
                let (decoded, _) = codec::decode(&frame, 0).unwrap();
                let index = u32::try_from(index).unwrap();
                let actions = self.target.stream(self.now, index, decoded, frame.len()).unwrap();
                let actions = actions.into_iter().map(own).collect();
                self.carry_out(actions);
            }
            None => {}
        }
    }

    /// What the link's thread and the one that reads faults do.
    fn target_asks(&mut self) {
        if self.end.is_some() {
            return;
        }
        let mut faults = Vec::new();
        self.target_vm.faults(Duration::ZERO, &mut faults).unwrap();
        for page in faults {
            match self.target.fault(self.now, page) {
                OnFault::Wait if self.plan.make_zeros => self.target_vm.place_zeros(page, 1).unwrap(),
                OnFault::Zero => self.target_vm.place_zeros(page, 1).unwrap(),
                OnFault::Wait => {}
            }
        }
        if std::mem::take(&mut self.restored) {
            let actions = self.target.handle(self.now, target::Event::Restored);
            self.carry_out(actions.into_iter().map(own).collect());
        }
        if let Some(actions) = self.target.complete(self.now) {
            self.carry_out(actions.into_iter().map(own).collect());
        } else if !self.asked
            && let Some(request) = self.target.next_request(self.now)
        {
            self.asked = true;
            self.say(&Message::PageRequest(request));
        }
    }

    fn say(&mut self, message: &Message) {
        if !self.cut {
            let mut frame = Vec::new();
            codec::encode(message, 0, &mut frame).unwrap();
            self.to_source.push_back(frame);
        }
    }

    fn carry_out(&mut self, actions: Vec<Owned>) {
        for action in actions {
            match action {
                Owned::Nothing => {}
                Owned::Send(message) => self.say(&message),
                Owned::Write(pages) => {
                    for (page, bytes) in pages {
                        match bytes {
                            Some(bytes) => self.target_vm.write_pages(page, &bytes).unwrap(),
                            None => self.target_vm.zero_pages(page, 1).unwrap(),
                        }
                    }
                }
                Owned::Place(frame_pages, frame) => {
                    for (page, bytes) in frame_pages {
                        let bytes = bytes.unwrap_or_else(|| vec![0; PAGE_SIZE]);
                        self.target_vm.place_pages(page, &bytes).unwrap();
                    }
                    let (decoded, _) = codec::decode(&frame, 0).unwrap();
                    let Frame::Zeros(zeros) = decoded else {
                        panic!("a list of runs")
                    };
                    self.target.handle(self.now, target::Event::Placed(zeros.runs));
                }
                Owned::Arm(missing) => {
                    if self.plan.keep_stale {
                        self.target_vm.lock().armed = true;
                    } else {
                        self.target_vm.arm(&missing).unwrap();
                    }
                    let actions = self.target.handle(self.now, target::Event::Armed);
                    self.carry_out(actions.into_iter().map(own).collect());
                }
                Owned::Restore => self.restored = true,
                Owned::Stand => {
                    self.ready = true;
                    self.target.handle(self.now, target::Event::Stood);
                }
                Owned::End(result) => self.end = Some(result),
            }
        }
    }
}

/// An action that outlives its frame.
enum Owned {
    Nothing,
    Send(Message),
    Write(Vec<(u64, Option<Vec<u8>>)>),
    Place(Vec<(u64, Option<Vec<u8>>)>, Vec<u8>),
    Arm(PageSet),
    Restore,
    Stand,
    End(Result<target::Done, Fault>),
}

fn pages_of(runs: Runs<'_>, data: Option<&[u8]>) -> Vec<(u64, Option<Vec<u8>>)> {
    let pages = runs.iter().flat_map(|run| run.first..run.end());
    match data {
        Some(data) => pages
            .zip(data.chunks_exact(PAGE_SIZE))
            .map(|(page, bytes)| (page, Some(bytes.to_vec())))
            .collect(),
        None => pages.map(|page| (page, None)).collect(),
    }
}

/// The runs as a frame of their own.
fn listed(runs: Runs<'_>) -> Vec<u8> {
    let mut batch = Batch::default();
    batch.begin(1);
    runs.iter().for_each(|run| batch.add_zeros(run));
    batch.seal_zeros(0).unwrap().unwrap().to_vec()
}

fn own(action: target::Action<'_>) -> Owned {
    use target::Action;
    match action {
        Action::Reach(_) | Action::Report(_) | Action::Admit(_) => Owned::Nothing,
        Action::AdoptMemory => panic!("no upgrade was asked for"),
        Action::Send(message) => Owned::Send(message),
        Action::Write { runs, data } => Owned::Write(pages_of(runs, Some(data))),
        Action::Unpack(_) | Action::Patch(_) => panic!("this source encodes nothing"),
        Action::Zero { runs } => Owned::Write(pages_of(runs, None)),
        Action::Place { runs, data } => Owned::Place(pages_of(runs, Some(data)), listed(runs)),
        Action::PlaceZeros { runs } => Owned::Place(pages_of(runs, None), listed(runs)),
        Action::Arm(missing) => Owned::Arm(missing),
        Action::Restore(_) => Owned::Restore,
        Action::Stand(_) => Owned::Stand,
        Action::End(result) => Owned::End(result),
    }
}

fn check(plan: &Plan) {
    let mut world = World::new(plan.clone());
    world.play();
    let end = world.end.as_ref().unwrap();
    match (plan.trouble, end) {
        (Trouble::CutLink, Err(fault)) => {
            assert!(world.ready && fault.code == Code::PostCopyLost, "{fault}");
            assert!(
                matches!(world.outcome, Some(Outcome::FailedPaused(_))),
                "{:?}",
                world.outcome
            );
            return;
        }
        (_, end) => assert!(end.is_ok(), "{end:?}"),
    }
    let receipt = &end.as_ref().unwrap().receipt;
    let post_copy = receipt.post_copy.expect("the receipt of a post-copy");
    assert!(receipt.pages + receipt.zero_pages >= plan.pages && post_copy.faults <= post_copy.pages);
    let memory = &world.target_vm.lock().memory;
    let pages: Vec<u8> = memory.iter().step_by(PAGE_SIZE).copied().collect();
    assert_eq!(pages, world.expected, "memory is not as the guest had left it");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn the_guest_finds_every_page_as_it_left_it_or_the_loss_is_said(plan in plans()) {
        check(&plan);
    }
}

#[test]
#[should_panic(expected = "had left it")]
fn a_target_that_keeps_stale_pages_is_seen() {
    sabotage(|plan| plan.keep_stale = true);
}

#[test]
#[should_panic(expected = "had left it")]
fn a_target_that_makes_zeroes_of_missing_pages_is_seen() {
    sabotage(|plan| plan.make_zeros = true);
}

/// Batches of a round of [`sabotage`]'s memory.
const BATCHES: usize = 11;

/// Pages that never came at all are counted by the target, which then refuses.
#[test]
#[should_panic(expected = "DigestMismatch")]
fn a_source_that_forgets_in_the_first_round_what_it_had_put_off_is_refused() {
    sabotage(|plan| {
        (plan.look, plan.step_us) = (Look::AllTaken, 8000);
        (plan.switch_after, plan.forget_put_off) = (8, true);
    });
}

/// Later the target has each page, and cannot know that it is an old one.
#[test]
#[should_panic(expected = "had left it")]
fn a_source_that_forgets_at_the_switch_what_it_had_put_off_is_seen() {
    sabotage(|plan| {
        (plan.look, plan.step_us) = (Look::AllTaken, 8000);
        (plan.look_after, plan.switch_after) = (BATCHES + 1, BATCHES + 7);
        // Much, so that the second round is as long as the first.
        (plan.burst, plan.forget_put_off) = (64, true);
    });
}

fn sabotage(change: impl Fn(&mut Plan)) {
    for seed in 0..50 {
        let mut plan = Plan {
            seed,
            pages: 700,
            switch_after: 4,
            trouble: Trouble::None,
            at: 0,
            keep_stale: false,
            make_zeros: false,
            look: Look::All,
            look_after: 0,
            burst: 1,
            step_us: 200,
            forget_put_off: false,
        };
        change(&mut plan);
        check(&plan);
    }
}

// The whole engine.

const PAGES: u64 = 4096;

fn quiet() -> Control {
    Control::new(|_| {})
}

/// Three of four pages have content.
fn filled_vm() -> FakeVm {
    let (vm, mut rng) = (FakeVm::new(PAGES), Rng(11));
    for page in (0..usize::try_from(PAGES).unwrap()).filter(|page| page % 4 != 0) {
        vm.guest_writes(page, rng.byte());
    }
    vm.lock().writes_at_pause = 1000..3000;
    vm
}

/// Both ends of the connections, the link first, so that a test can cut them.
#[derive(Default)]
struct Wires(Mutex<Vec<TcpStream>>);

impl Wires {
    fn cut(&self, which: std::ops::Range<usize>) {
        for wire in &self.0.lock().unwrap()[which] {
            let _ = wire.shutdown(Shutdown::Both);
        }
    }
}

fn accepted(listener: &TcpListener) -> TcpStream {
    let wire = listener.accept().unwrap().0;
    wire.set_nodelay(true).unwrap();
    wire
}

fn admit(listener: &TcpListener, admission: &Admission) -> Result<Vec<TcpStream>, Fault> {
    let mut streams: Vec<Option<TcpStream>> = (0..admission.streams).map(|_| None).collect();
    for _ in 0..admission.streams {
        let control = quiet();
        let mut link = Link::new(accepted(listener), Duration::from_secs(5), &control)?;
        let mut buffer = Vec::new();
        match link.receive(&mut buffer) {
            Ok((Frame::Message(Message::Join(join)), _)) if admission.admits(&join) => {
                streams[join.stream as usize] = Some(link.into_stream());
            }
            Ok((frame, _)) => panic!("{frame:?}"),
            Err(Stop::Failed(fault)) => return Err(fault),
            Err(Stop::Cancelled) => panic!("nobody cancels"),
        }
    }
    Ok(streams.into_iter().flatten().collect())
}

/// Moves a VM for which no pause is short enough. Once it may run at the target its guest goes on there: `guest` gets the
/// VM, what each page must hold, and the wires.
fn migrate(
    source_vm: &FakeVm,
    target_vm: &FakeVm,
    guest: impl Fn(&FakeVm, Vec<u8>, &Wires) + Sync,
) -> (Outcome, Result<Received, Fault>) {
    migrate_with(post_copy_options(), source_vm, target_vm, guest)
}

fn post_copy_options() -> MigrationOptions {
    MigrationOptions {
        // What the pause costs without any page; over this link it fits none, and not the state either.
        max_downtime_ms: 18,
        bandwidth_mib_s: 8,
        streams: 2,
        allow_postcopy: true,
        compression: Compression::Off.into(),
        ..MigrationOptions::default()
    }
}

/// What the guest at the source writes at once.
#[derive(Clone, Copy)]
enum Writes {
    Pages,
    /// Few, so that a delta tells them.
    Bytes,
}

/// As [`migrate`]. Post-copy is asked for after the first round, lest it takes the rules long to give up.
fn migrate_with(
    options: MigrationOptions,
    source_vm: &FakeVm,
    target_vm: &FakeVm,
    guest: impl Fn(&FakeVm, Vec<u8>, &Wires) + Sync,
) -> (Outcome, Result<Received, Fault>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let writes = match options.compression() {
        Compression::Off => Writes::Pages,
        _ => Writes::Bytes,
    };
    let target_control = quiet();
    let source_control = Arc::new_cyclic(|control: &Weak<Control>| {
        let control = control.clone();
        Control::new(move |progress| {
            if progress.round >= 2
                && let Some(control) = control.upgrade()
            {
                control.switch_to_post_copy();
            }
        })
    });
    let wires = Wires::default();
    let source_params = source::Params {
        migration: "m1".into(),
        vm: "vm1".into(),
        from_host: "host1".into(),
        source_epoch: 1,
        target_epoch: 2,
        options,
        device_model: 1,
        cpu_profile: "baseline".into(),
        tracker: "bitmap",
        local: false,
        link_timeout: Duration::from_secs(5),
    };
    let target_params = target::Params {
        migration: "m1".into(),
        vm: "vm1".into(),
        from_host: "host1".into(),
        epoch: 2,
        device_model: 1,
        cpu_profile: "baseline".into(),
        plaintext: false,
        local: false,
        link_timeout: Duration::from_secs(5),
    };
    let dial = |_: Way| {
        let wire = TcpStream::connect(addr).unwrap();
        wire.set_nodelay(true).unwrap();
        wires.0.lock().unwrap().push(wire.try_clone().unwrap());
        Ok(wire)
    };
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut rng = Rng(3);
            let mut write = |page| match writes {
                Writes::Pages => source_vm.guest_writes(page, rng.byte()),
                Writes::Bytes => source_vm.guest_pokes(page, rng.below(PAGE_SIZE), rng.byte()),
            };
            let mut pages = Rng(4);
            while write(500 + pages.below(3000)) && !over.load(Ordering::Relaxed) {
                thread::yield_now();
            }
        });
        scope.spawn(|| {
            while target_vm.lock().stood.is_none() {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                thread::yield_now();
            }
            let memory = source_vm
                .lock()
                .memory
                .iter()
                .step_by(PAGE_SIZE)
                .copied()
                .collect();
            guest(target_vm, memory, &wires);
        });
        let target = scope.spawn(|| {
            let stream = accepted(&listener);
            let admit = |admission: &Admission| admit(&listener, admission);
            target::run(target_vm, stream, admit, &target_params, &target_control)
        });
        let outcome = source::run(source_vm, dial, &source_params, &source_control);
        // A target that still waits for a connection is to find out.
        drop(TcpStream::connect(addr));
        let received = target.join().unwrap();
        over.store(true, Ordering::Relaxed);
        (outcome, received)
    })
}

/// A guest that reads and writes all over its memory, each page as it was or lost; gives how many pages were.
fn roam(vm: &FakeVm, mut expected: Vec<u8>) -> usize {
    let (mut rng, mut lost) = (Rng(5), 0);
    for _ in 0..6000 {
        let (page, value) = (rng.below(expected.len()), rng.byte());
        match vm.touch_and_wait(page, value) {
            Some(was) => {
                assert_eq!(was, expected[page], "page {page}");
                expected[page] = value;
            }
            None => lost += 1,
        }
    }
    for (page, value) in expected.iter().enumerate() {
        match vm.touch_and_wait(page, *value) {
            Some(was) => assert_eq!(was, *value, "page {page}"),
            None => lost += 1,
        }
    }
    lost
}

#[test]
fn a_guest_that_writes_faster_than_the_link_runs_at_the_target_while_its_pages_come() {
    let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
    let (outcome, received) = migrate(&source_vm, &target_vm, |vm, expected, _| {
        assert_eq!(roam(vm, expected), 0, "pages were lost");
    });
    assert_eq!(outcome, Outcome::AwaitOutcome);
    let receipt = received.unwrap().receipt;
    let post_copy = receipt.post_copy.unwrap();
    println!("{receipt:?}");
    assert!(
        post_copy.pages > 0 && post_copy.faults > 0 && post_copy.duration_us > 0,
        "{post_copy:?}"
    );
    assert!(post_copy.fault_longest_us >= post_copy.fault_mean_us);
    assert!(!target_vm.lock().armed, "its memory is watched no more");
}

/// What somebody waits for is not to wait for being packed.
#[test]
fn pages_that_went_compressed_before_the_switch_come_as_they_are_after_it() {
    for compression in [Compression::Lz4, Compression::Zstd] {
        let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
        let options = MigrationOptions {
            compression: compression.into(),
            ..post_copy_options()
        };
        let (outcome, received) = migrate_with(options, &source_vm, &target_vm, |vm, expected, _| {
            assert_eq!(roam(vm, expected), 0, "pages were lost");
        });
        assert_eq!(outcome, Outcome::AwaitOutcome, "{compression:?}");
        let receipt = received.unwrap().receipt;
        println!("{compression:?}: {receipt:?}");
        let (encoding, post_copy) = (receipt.encoding.unwrap(), receipt.post_copy.unwrap());
        let packed = match compression {
            Compression::Lz4 => encoding.lz4_pages,
            _ => encoding.zstd_pages,
        };
        assert!(packed > 1000, "{encoding:?}");
        assert!(post_copy.pages > 0 && post_copy.faults > 0, "{post_copy:?}");
    }
}

#[test]
fn a_stream_that_breaks_costs_nothing() {
    let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
    let (outcome, received) = migrate(&source_vm, &target_vm, |vm, expected, wires| {
        wires.cut(1..3);
        assert_eq!(roam(vm, expected), 0, "pages were lost");
    });
    assert_eq!(outcome, Outcome::AwaitOutcome);
    assert!(received.unwrap().receipt.post_copy.is_some());
}

#[test]
fn a_link_that_is_cut_loses_the_vm_and_nobody_reads_zeroes() {
    let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
    let lost = AtomicUsize::new(0);
    let (outcome, received) = migrate(&source_vm, &target_vm, |vm, expected, wires| {
        wires.cut(0..3);
        lost.store(roam(vm, expected), Ordering::Relaxed);
    });
    let Outcome::FailedPaused(fault) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(fault.code, Code::LinkLost);
    assert_eq!(received.unwrap_err().code, Code::PostCopyLost);
    assert!(lost.into_inner() > 0, "there was nothing to lose");
}

#[test]
fn a_target_without_memory_for_a_page_loses_the_vm() {
    let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
    let (outcome, received) = migrate(&source_vm, &target_vm, |vm, expected, _| {
        vm.lock().flaw = Some(Flaw::Place);
        assert!(roam(vm, expected) > 0, "there was nothing to lose");
    });
    assert!(matches!(outcome, Outcome::FailedPaused(_)), "{outcome:?}");
    assert_eq!(received.unwrap_err().code, Code::PostCopyLost);
}

/// Restoring waits for a page, so nothing was said to be ready: the source still has all, and the abort lets it go on.
#[test]
fn a_target_without_memory_for_a_page_of_the_state_loses_nothing() {
    let (source_vm, target_vm) = (filled_vm(), FakeVm::new(PAGES));
    target_vm.lock().flaw = Some(Flaw::Place);
    let (outcome, received) = migrate(&source_vm, &target_vm, |_, _, _| {
        panic!("it was said to be ready");
    });
    assert!(matches!(outcome, Outcome::FailedPaused(_)), "{outcome:?}");
    let fault = received.unwrap_err();
    assert_eq!(fault.code, Code::BadState, "{fault}");
    assert!(target_vm.lock().stood.is_none());
}
