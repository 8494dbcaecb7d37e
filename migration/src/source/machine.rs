//! The source's protocol without IO: an event goes in, a list of actions comes out, the last of which brings the next
//! event.
//!
//! ```text
//!  New ─▶ Greeting ─▶ (Opening) ─▶ Starting ─▶ Sending ─▶ Acking ─▶ Measuring ─▶ Pausing ─▶ Sweeping ─▶ Sending ─▶ Acking ─▶ Saving ─▶ Judging
//!                                    ▲                    │ next round                     (last)     (last)              │
//!                                    └────────────────────┘                                                               ▼
//!  any ─▶ Ended{FailedRunning} before the pause, Ended{FailedPaused} after it                                 Ended{AwaitOutcome}
//!
//!  post-copy: … ─▶ Pausing ─▶ Sweeping ─▶ Declaring ─▶ Acking ─▶ Saving ─▶ Judging ─▶ Serving ──Complete──▶ Ended{AwaitOutcome}
//!                                                                            └────┬────┘ answers page requests
//! ```
//!
//! Post-copy ([`crate::post_copy`]) is entered where the rules or a person say so, also in the middle of a round: what was not sent by
//! then is still in the order, what was sent and then written comes back by the sweep, and together they are what the target is told
//! that it lacks. That nothing was left out is checked by the target over both.
//!
//! **Why no write of the guest is lost.** [`Order`] holds what the target does not have. Every page starts in it. A page
//! leaves it only into a batch, and comes back when the dirty log says that it was written after the log was last
//! taken; the log is re-armed before pages are read, so a write that the read missed is in the next log. After the pause
//! the log is taken once more (`Sweeping`) and merged with what is still owed: from then on nothing writes, so when
//! this last set is sent the target's memory is the guest's. Taking the log clears it. If an attempt fails, what it took
//! and did not send is gone from the log, and therefore no attempt inherits anything: each begins with all pages.
//!
//! In an upgrade the target has taken over the memory itself before it answers the hello: nothing is pending, and the machine goes
//! from Greeting straight to Pausing. The round after the pause is empty and tells the target that nothing writes any more.
//!
//! **Why no throttle outlives the attempt.** It is raised only between rounds, and whatever leaves pre-copy, the pause or
//! any end, first lets go (`let_go`), before a word is written to a link that may hang.

use std::time::Duration;

use drover_proto::v1::{MigrationPhase, Progress};
use drover_proto::{Code, Fault};

use crate::bandwidth;
use crate::codec::{Cancel, Hello, HelloAck, Message, PageAnswer, Ready, RoundEnd, Run, StateFrame, bad};
use crate::convergence::{self, Costs, Decision, Intent, Sample, Trend};
use crate::digest::{Totals, digest};
use crate::handshake::{self, Agreed, feature};
use crate::meter::Meter;
use crate::post_copy;
use crate::source::Outcome;
use crate::source::order::Order;
use crate::vm::{PAGE_SIZE, PageSet};

/// Progress is reported so often inside a round.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// From so long after a round's begin on it is looked which of its pages were written again. Not before, so that a guest that writes
/// without pause does not make rounds too short to measure anything by.
const LOOK_AFTER: Duration = Duration::from_millis(50);
/// Looks are so far apart, and at least [`LOOK_SHARE`] times as long as one takes.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const LOOK_SHARE: u32 = 8;

/// Most pages of a job, 256 KiB: from reading them until they are handed to the kernel they stay in a processor's second-level cache. With
/// four times as many a migration took 5 to 7 % more processor time.
const JOB_PAGES: u64 = 64;

/// What the machine is told once.
#[derive(Clone, Debug)]
pub struct Config {
    /// What is offered to the target.
    pub hello: Hello,
    /// Pages of guest memory, at least 1.
    pub total_pages: u64,
    /// What the user wants.
    pub intent: Intent,
    /// What the switchover costs beside the pages.
    pub costs: Costs,
    /// For the receipt: how dirty pages are found.
    pub tracker: String,
    /// A deliberate mistake for tests of the tests: leave out the pass after the pause.
    pub skip_final_pass: bool,
    /// Another: forget the pages that were put off because they were written again.
    pub forget_put_off: bool,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// The stream is there.
    Connected,
    /// The target wrote this.
    Received(Message),
    /// Every agreed stream is there.
    StreamsOpen,
    /// The dirty log is on.
    LogStarted,
    /// The batch went out. With streams: it is on its way, and so much went out since the last time.
    BatchSent(Sent),
    /// The rest of the round's batches went out, and every stream said that its part of the round is over.
    StreamsEnded(Sent),
    /// The pages that were written since the last time.
    DirtyTaken(PageSet),
    /// Pages that were written since the last time, some of them at least.
    DirtySeen(PageSet),
    /// No vCPU executes any more.
    Paused {
        /// How long it took to stop them.
        took: Duration,
    },
    /// The paused VM's state.
    Saved {
        /// The encoded `VmSave`.
        state: Vec<u8>,
        /// How long it took.
        took: Duration,
    },
    /// The stream broke or stalled, or the target broke the protocol.
    LinkFailed(Fault),
    /// The VM could not do what an action asked.
    VmFailed(Fault),
    /// Somebody wants the migration to end. Said instead of doing the last action, or in the middle of a `SendBatch` or a
    /// `Receive`; never when a `Pause` was begun.
    Cancelled,
}

/// What a batch became.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Pages with content.
    pub pages: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// On the wire.
    pub bytes: u64,
}

impl Sent {
    /// Adds what another batch became.
    pub fn add(&mut self, other: Self) {
        self.pages += other.pages;
        self.zero_pages += other.zero_pages;
        self.bytes += other.bytes;
    }

    /// Bytes of content to reckon with for what comes next: a quarter of what encoding saved is left out, since the next pages may lend
    /// themselves less to it.
    fn counted(self) -> u64 {
        let content = self.pages.saturating_mul(PAGE_SIZE as u64);
        content - content.saturating_sub(self.bytes) / 4
    }
}

/// What the driver is to do. In each list all but the last are done at once; the last brings the next event, or ends.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Wait at the pause point of this name, if a test holds it.
    Reach(&'static str),
    /// Tell whoever watches.
    Report(Progress),
    /// Do nothing for a moment: the target starts now, and where it shares processors with this side they are the target's.
    Rest,
    /// Hold each vCPU back for so many percent of its time; 0: let it run freely, at once.
    Throttle(u32),
    /// Write the frame.
    Send(Message),
    /// → `Received` (or `LinkFailed`).
    Receive,
    /// Open the streams that pages are to travel on, each of which shows the token → `StreamsOpen`.
    OpenStreams {
        /// How many, at least 1.
        count: u32,
        /// From the target.
        token: Vec<u8>,
    },
    /// From now on pages may go in the forms that the target can read.
    Encode {
        /// See [`crate::handshake::feature`].
        features: u32,
        /// Streams that pages travel on, 0 for the link alone.
        streams: u32,
    },
    /// → `LogStarted`.
    StartLog,
    /// Read the pages, send them as frames → `BatchSent`.
    SendBatch {
        /// The round.
        round: u32,
        /// At most `JOB_PAGES` pages, ascending.
        runs: Vec<Run>,
        /// Whether the bandwidth's cap is to be kept: not in the blackout.
        capped: bool,
    },
    /// Wait until all batches are sent, and say on every stream that its part of the round is over → `StreamsEnded`.
    EndStreams {
        /// The round.
        round: u32,
        /// Whether nothing more will come on the streams.
        last: bool,
    },
    /// → `DirtyTaken`.
    TakeDirty,
    /// While batches may be on their way → `DirtySeen`.
    LookDirty,
    /// → `Paused`.
    Pause,
    /// → `Saved`.
    Save,
    /// Post-copy: once the target is ready it may need this side's pages at any moment, the commit may be in the log before Ready is read here.
    Serve,
    /// Post-copy: send these pages as they are over the link, before all others, and do not send them again in the background.
    Answer {
        /// The round.
        round: u32,
        /// At most [`crate::codec::BATCH_PAGES`] pages, ascending.
        runs: Vec<Run>,
    },
    /// Post-copy: send these pages as they are in the background.
    Push {
        /// The round.
        round: u32,
        /// All that the target lacks.
        pages: PageSet,
    },
    /// It is over.
    End(Outcome),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    New,
    Greeting,
    Opening,
    Starting,
    Sending,
    Looking,
    Ending,
    Acking,
    Measuring,
    Pausing,
    Sweeping,
    Declaring,
    Saving,
    Judging,
    Serving,
    Ended,
}

/// See the module.
#[derive(Debug)]
pub struct Machine {
    config: Config,
    state: State,
    /// Streams beside the link that pages travel on.
    streams: u32,
    connected_at: Duration,
    /// What the target does not have.
    order: Order,
    /// A page may be put off in the first round as well.
    late_pages: bool,
    looked_at: Duration,
    look_every: Duration,
    round: u32,
    round_began: Duration,
    round_sent: Sent,
    log_taken_at: Duration,
    sent: Sent,
    meter: Meter,
    asked_at: Duration,
    round_trip: Option<Duration>,
    dirty_rate: u64,
    trend: Trend,
    /// How much the vCPUs are held back now, and the most they were, percent.
    throttle: u32,
    throttle_most: u32,
    polished: u32,
    reported_at: Duration,
    blackout: Option<Blackout>,
    digest: [u8; 32],
    /// A person wants post-copy now.
    post_copy_wanted: bool,
    /// Why the target cannot, where it would be allowed.
    post_copy_unavailable: Option<String>,
    post_copy: bool,
    /// In a post-copy: what the target lacks.
    missing: PageSet,
    /// Pages were given out in this round that the target has not acknowledged.
    in_round: bool,
}

/// The source's part of the blackout so far.
#[derive(Clone, Copy, Debug, Default)]
struct Blackout {
    before: Duration,
    pause: Duration,
    paused_at: Duration,
    last_pages: Duration,
    last_pages_at: Duration,
}

impl Machine {
    /// A machine that waits for `Connected`.
    pub fn new(config: Config) -> Self {
        let lacking = if config.hello.local { 0 } else { config.total_pages };
        Self {
            order: Order::full(lacking, config.forget_put_off),
            late_pages: false,
            looked_at: Duration::ZERO,
            look_every: LOOK_EVERY,
            config,
            state: State::New,
            streams: 0,
            connected_at: Duration::ZERO,
            round: 0,
            round_began: Duration::ZERO,
            round_sent: Sent::default(),
            log_taken_at: Duration::ZERO,
            sent: Sent::default(),
            meter: Meter::default(),
            asked_at: Duration::ZERO,
            round_trip: None,
            dirty_rate: 0,
            trend: Trend::default(),
            throttle: 0,
            throttle_most: 0,
            polished: 0,
            reported_at: Duration::ZERO,
            blackout: None,
            digest: [0; 32],
            post_copy_wanted: false,
            post_copy_unavailable: None,
            post_copy: false,
            missing: PageSet::default(),
            in_round: false,
        }
    }

    /// A person wants post-copy now: heeded at the next batch, where it is allowed and the target can.
    pub fn want_post_copy(&mut self) {
        self.post_copy_wanted = true;
    }

    /// One step. `now`: time since any fixed instant; it never goes back. After the end nothing is done any more.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        match (self.state, event) {
            (State::Ended, _) => Vec::new(),
            (state, Event::Cancelled) => {
                if state == State::Pausing {
                    self.blackout = None;
                }
                self.give_up(Fault::new(Code::Cancelled, "the migration was cancelled"))
            }
            (_, Event::VmFailed(fault)) => self.give_up(fault),
            (_, Event::LinkFailed(fault)) => self.end(fault),
            (_, Event::Received(Message::Refusal(refusal))) => self.end(refusal.fault()),
            (State::New, Event::Connected) => self.greet(now),
            (State::Greeting, Event::Received(Message::HelloAck(ack))) => {
                self.answered(now);
                let hopeless = convergence::hopeless(&self.config.costs, &self.config.intent);
                match (handshake::check_choice(&ack, &self.config.hello), hopeless) {
                    (Ok(agreed), None) if agreed.local => {
                        let mut actions = vec![Action::Reach("source.after_hello")];
                        actions.extend(self.switch(now, false));
                        actions
                    }
                    (Ok(agreed), None) => self.agreed(agreed, ack),
                    (Err(fault), _) | (_, Some(fault)) => self.give_up(fault),
                }
            }
            (State::Opening, Event::StreamsOpen) => self.start(),
            (State::Starting, Event::LogStarted) => {
                self.log_taken_at = now;
                self.begin_round(now)
            }
            (State::Sending, Event::BatchSent(sent)) => self.after_batch(now, sent),
            (State::Looking, Event::DirtySeen(seen)) => self.after_look(now, &seen),
            (State::Ending, Event::StreamsEnded(sent)) => {
                self.count(sent);
                let mut actions = Vec::new();
                self.end_round(now, &mut actions);
                actions
            }
            (State::Acking, Event::Received(Message::RoundAck(ack))) if ack.round == self.round => {
                self.after_round(now)
            }
            (State::Measuring, Event::DirtyTaken(dirty)) => self.decide(now, dirty),
            (State::Pausing, Event::Paused { took }) => self.paused(now, took),
            (State::Sweeping, Event::DirtyTaken(dirty)) => {
                self.order.next_round(dirty);
                self.last_pass(now)
            }
            (State::Declaring, Event::StreamsEnded(sent)) => {
                self.count(sent);
                let mut actions = Vec::new();
                self.end_round(now, &mut actions);
                actions
            }
            (State::Saving, Event::Saved { state, took }) => self.saved(state, took),
            (State::Judging, Event::Received(Message::Ready(ready))) => self.judge(now, &ready),
            (State::Judging | State::Serving, Event::Received(Message::PageRequest(request)))
                if self.post_copy =>
            {
                self.answer(&request.pages)
            }
            (State::Serving, Event::Received(Message::Complete(_))) => {
                self.go(State::Ended, [Action::End(Outcome::AwaitOutcome)])
            }
            (state, Event::Received(message)) => self.give_up(bad(format!(
                "the target sent {:?} while the source was {state:?}",
                message.kind()
            ))),
            (state, event) => {
                let mistake = format!("the migration's driver said {event:?} while the source was {state:?}");
                self.give_up(Fault::new(Code::Internal, mistake))
            }
        }
    }

    /// What the dirty log is to be added to, where a second set of pages would be too large. For whoever is about to do
    /// [`Action::TakeDirty`]; it comes back with [`Event::DirtyTaken`].
    pub fn lend_set(&mut self) -> Option<PageSet> {
        self.order.lend()
    }

    /// Whether the VM was, or may have been, paused.
    pub fn has_paused(&self) -> bool {
        self.blackout.is_some()
    }

    /// The figures that the rules are applied to, as of `now`.
    pub fn sample(&self, now: Duration) -> Sample {
        Sample {
            round: self.round,
            elapsed: now.saturating_sub(self.connected_at),
            // What was put off was in the round as well: it was dirty before its turn instead of after it.
            carried: (self.round_sent.pages + self.round_sent.zero_pages + self.order.put_off())
                .saturating_mul(PAGE_SIZE as u64),
            remaining: self.order.remaining().saturating_mul(PAGE_SIZE as u64),
            dirty_rate: self.dirty_rate,
            bandwidth: self.meter.estimate(self.config.intent.bandwidth),
            round_trip: self.round_trip.unwrap_or_default(),
            costs: self.config.costs,
            polished: self.polished,
            throttle: self.throttle,
        }
    }

    fn go<const N: usize>(&mut self, state: State, actions: [Action; N]) -> Vec<Action> {
        self.state = state;
        actions.into()
    }

    fn greet(&mut self, now: Duration) -> Vec<Action> {
        self.connected_at = now;
        self.asked_at = now;
        let hello = Message::Hello(self.config.hello.clone());
        self.go(State::Greeting, [Action::Send(hello), Action::Receive])
    }

    fn agreed(&mut self, agreed: Agreed, ack: HelloAck) -> Vec<Action> {
        self.streams = agreed.streams;
        self.late_pages = agreed.features & feature::LATE_PAGES != 0;
        let can_post_copy = agreed.features & feature::POST_COPY != 0 && agreed.streams > 0;
        if self.config.intent.post_copy && !can_post_copy {
            let why = match (agreed.streams, ack.post_copy_unavailable) {
                (0, _) => "the target takes no streams beside the link".to_owned(),
                (_, said) if said.is_empty() => {
                    "the target's VMM does not know it: upgrade its host".to_owned()
                }
                (_, said) => said,
            };
            self.post_copy_unavailable = Some(why);
        }
        self.config.intent.post_copy &= can_post_copy;
        let mut actions = Vec::new();
        if agreed.features & feature::ENCODED != 0 {
            actions.push(Action::Encode {
                features: agreed.features,
                streams: agreed.streams,
            });
        }
        actions.extend(match agreed.streams {
            0 => self.start(),
            count => self.go(
                State::Opening,
                [Action::OpenStreams {
                    count,
                    token: ack.token,
                }],
            ),
        });
        actions
    }

    fn start(&mut self) -> Vec<Action> {
        self.go(
            State::Starting,
            [Action::Reach("source.after_hello"), Action::StartLog],
        )
    }

    fn open_round(&mut self, now: Duration) {
        self.round += 1;
        self.round_began = now;
        self.round_sent = Sent::default();
        self.in_round = true;
    }

    fn begin_round(&mut self, now: Duration) -> Vec<Action> {
        self.open_round(now);
        let mut actions = Vec::new();
        if !self.has_paused() {
            actions.push(self.report(now, MigrationPhase::PreCopy));
        }
        self.next_batch(now, &mut actions);
        actions
    }

    /// The next batch of the round, or its end, after which an acknowledgement is to be received.
    fn next_batch(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let runs = self.order.take(JOB_PAGES);
        if runs.is_empty() {
            debug_assert_eq!(self.order.due(), 0, "a round ends when nothing is due");
            if self.streams == 0 {
                return self.end_round(now, actions);
            }
            self.state = State::Ending;
            actions.push(Action::EndStreams {
                round: self.round,
                last: self.has_paused(),
            });
            return;
        }
        self.state = State::Sending;
        actions.push(Action::SendBatch {
            round: self.round,
            runs,
            capped: !self.has_paused(),
        });
    }

    /// The pages after the pause: all that are pending, or in a post-copy only which they are.
    fn last_pass(&mut self, now: Duration) -> Vec<Action> {
        if !self.post_copy {
            return self.begin_round(now);
        }
        if !self.in_round {
            self.open_round(now);
        }
        self.state = State::Declaring;
        self.missing = self.order.take_all();
        let declared = post_copy::declare(&self.missing).map(Message::Missing);
        let mut actions: Vec<Action> = declared.map(Action::Send).collect();
        actions.push(Action::EndStreams {
            round: self.round,
            last: false,
        });
        actions
    }

    fn answer(&mut self, pages: &[u64]) -> Vec<Action> {
        let runs = match post_copy::requested(pages, self.config.total_pages) {
            Ok(runs) => runs,
            Err(fault) => return self.give_up(fault),
        };
        let mut actions = Vec::new();
        if !runs.is_empty() {
            let round = self.round + 1;
            actions.push(Action::Answer { round, runs });
        }
        actions.push(Action::Send(Message::PageAnswer(PageAnswer {})));
        actions.push(Action::Receive);
        actions
    }

    fn end_round(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.state = State::Acking;
        self.asked_at = now;
        actions.push(Action::Send(Message::RoundEnd(RoundEnd {
            round: self.round,
            pages: self.round_sent.pages,
            zero_pages: self.round_sent.zero_pages,
            last: self.has_paused(),
            post_copy: self.post_copy,
            missing: self.missing.count(),
        })));
        actions.push(Action::Receive);
    }

    fn count(&mut self, sent: Sent) {
        self.round_sent.add(sent);
        self.sent.add(sent);
    }

    fn after_batch(&mut self, now: Duration, sent: Sent) -> Vec<Action> {
        self.count(sent);
        let mut actions = Vec::new();
        if !self.has_paused() {
            let elapsed = now.saturating_sub(self.connected_at);
            let late = convergence::past_deadline(elapsed, &self.config.intent);
            if self.config.intent.post_copy && (late.is_some() || self.post_copy_wanted) {
                return self.switch(now, true);
            }
            if let Some(fault) = late {
                return self.abort(fault);
            }
            if now.saturating_sub(self.reported_at) >= REPORT_EVERY {
                actions.push(self.report(now, MigrationPhase::PreCopy));
            }
            if self.is_time_to_look(now) {
                self.state = State::Looking;
                self.looked_at = now;
                actions.push(Action::LookDirty);
                return actions;
            }
        }
        self.next_batch(now, &mut actions);
        actions
    }

    /// Whether to look which pages of the round were written again. In the first round only where the target does not insist on
    /// every page.
    fn is_time_to_look(&self, now: Duration) -> bool {
        (self.round > 1 || self.late_pages)
            && self.order.puts_off()
            && self.order.due() > 0
            && now.saturating_sub(self.round_began) >= LOOK_AFTER
            && now.saturating_sub(self.looked_at) >= self.look_every
    }

    fn after_look(&mut self, now: Duration, seen: &PageSet) -> Vec<Action> {
        let took = now.saturating_sub(self.looked_at);
        self.look_every = LOOK_EVERY.max(took * LOOK_SHARE);
        self.looked_at = now;
        self.order.keep_seen(seen);
        let mut actions = Vec::new();
        self.next_batch(now, &mut actions);
        actions
    }

    /// An answer came. The shortest time to one is the round trip: others waited for what was still on its way.
    fn answered(&mut self, now: Duration) {
        let took = now.saturating_sub(self.asked_at);
        self.round_trip = Some(self.round_trip.map_or(took, |least| least.min(took)));
    }

    fn after_round(&mut self, now: Duration) -> Vec<Action> {
        self.answered(now);
        self.in_round = false;
        if let Some(blackout) = &mut self.blackout {
            blackout.last_pages = now.saturating_sub(blackout.paused_at);
            blackout.last_pages_at = now;
            let mut actions = vec![Action::Reach("source.after_last_pages")];
            if self.post_copy {
                actions.push(Action::Serve);
            }
            actions.push(Action::Save);
            self.state = State::Saving;
            return actions;
        }
        self.meter
            .round(self.round_sent.counted(), now.saturating_sub(self.round_began));
        self.go(
            State::Measuring,
            [Action::Reach("source.round_end"), Action::TakeDirty],
        )
    }

    fn decide(&mut self, now: Duration, dirty: PageSet) -> Vec<Action> {
        let period = now.saturating_sub(self.log_taken_at);
        let carried = self.sample(now).carried;
        let written = self.order.next_round(dirty);
        self.dirty_rate = bandwidth::rate(written.saturating_mul(PAGE_SIZE as u64), period);
        self.log_taken_at = now;
        let sample = Sample {
            carried,
            ..self.sample(now)
        };
        self.trend = self.trend.after(&sample);
        let decision = match convergence::decide(&sample, &self.trend, &self.config.intent) {
            Decision::Switchover => Decision::Switchover,
            _ if self.config.intent.post_copy && self.post_copy_wanted => Decision::PostCopy,
            decision => decision,
        };
        match decision {
            Decision::NextRound => {
                self.polished += u32::from(convergence::fits(&sample, &self.config.intent));
                self.begin_round(now)
            }
            Decision::Throttle(percent) => {
                self.throttle = percent;
                self.throttle_most = self.throttle_most.max(percent);
                self.trend = Trend::default();
                let mut actions = vec![Action::Throttle(percent)];
                actions.extend(self.begin_round(now));
                actions
            }
            Decision::Abort(fault) => self.abort(fault),
            Decision::PostCopy => self.switch(now, true),
            Decision::Switchover => self.switch(now, false),
        }
    }

    /// Begins the switchover.
    fn switch(&mut self, now: Duration, post_copy: bool) -> Vec<Action> {
        self.post_copy = post_copy;
        let report = self.report(now, MigrationPhase::Switchover);
        let before = now.saturating_sub(self.connected_at);
        self.blackout = Some(Blackout {
            before,
            ..Blackout::default()
        });
        self.go(
            State::Pausing,
            [report, Action::Reach("source.before_pause"), Action::Pause],
        )
    }

    /// Gives up because of a rule. Where only the target stands in the way of a post-copy that is allowed, that is the reason.
    fn abort(&mut self, fault: Fault) -> Vec<Action> {
        let fault = match &self.post_copy_unavailable {
            Some(why) => Fault::new(
                Code::PostCopyUnavailable,
                format!("post-copy is allowed, but {why}; without it: {}", fault.message),
            )
            .field("allow_postcopy"),
            None => fault,
        };
        self.give_up(fault)
    }

    fn paused(&mut self, now: Duration, took: Duration) -> Vec<Action> {
        let blackout = self.blackout.get_or_insert_default();
        blackout.pause = took;
        blackout.paused_at = now;
        // Held at `before_pause` the guest ran on: that time is pre-copy.
        blackout.before = now.saturating_sub(took).saturating_sub(self.connected_at);
        let mut actions = self.let_go();
        actions.push(Action::Reach("source.after_pause"));
        // In an upgrade the target has the memory itself: what the guest wrote last is there.
        if self.config.skip_final_pass || self.config.hello.local {
            actions.extend(self.last_pass(now));
        } else {
            self.state = State::Sweeping;
            actions.push(Action::TakeDirty);
        }
        actions
    }

    fn saved(&mut self, state: Vec<u8>, took: Duration) -> Vec<Action> {
        let totals = Totals {
            rounds: self.round,
            pages: self.sent.pages,
            zero_pages: self.sent.zero_pages,
        };
        self.digest = digest(&state, totals);
        let blackout = self.blackout.unwrap_or_default();
        let frame = Message::State(StateFrame {
            state,
            digest: self.digest.to_vec(),
            rounds: totals.rounds,
            pages: totals.pages,
            zero_pages: totals.zero_pages,
            pause_us: micros(blackout.pause),
            last_pages_us: micros(blackout.last_pages),
            save_us: micros(took),
            before_blackout_us: micros(blackout.before),
            tracker: self.config.tracker.clone(),
            throttle_percent: self.throttle_most,
        });
        self.go(
            State::Judging,
            [
                Action::Send(frame),
                Action::Reach("source.after_state"),
                Action::Receive,
            ],
        )
    }

    fn judge(&mut self, now: Duration, ready: &Ready) -> Vec<Action> {
        let (said, sent) = (
            (ready.pages, ready.zero_pages),
            (self.sent.pages, self.sent.zero_pages),
        );
        // In a post-copy it may have fetched pages since.
        let counts_fit = said == sent || (self.post_copy && said.0 >= sent.0 && said.1 >= sent.1);
        if ready.digest != self.digest || !counts_fit {
            return self.give_up(Fault::new(
                Code::DigestMismatch,
                "the target said Ready for another state or other pages than were sent",
            ));
        }
        let report = self.report(now, MigrationPhase::Ready);
        if self.post_copy {
            let push = Action::Push {
                round: self.round + 1,
                pages: std::mem::take(&mut self.missing),
            };
            return self.go(
                State::Serving,
                [
                    Action::Reach("source.ready_received"),
                    report,
                    push,
                    Action::Receive,
                ],
            );
        }
        let end = Action::End(Outcome::AwaitOutcome);
        self.go(
            State::Ended,
            [Action::Reach("source.ready_received"), Action::Rest, report, end],
        )
    }

    /// Ends, and tells the target why.
    fn give_up(&mut self, fault: Fault) -> Vec<Action> {
        // First: on a link that hangs, telling the target takes a while.
        let mut actions = self.let_go();
        if self.state != State::New {
            actions.push(Action::Send(Message::Cancel(Cancel::from(&fault))));
        }
        actions.extend(self.end(fault));
        actions
    }

    /// Nothing holds the vCPUs back any more.
    fn let_go(&mut self) -> Vec<Action> {
        match std::mem::take(&mut self.throttle) {
            0 => Vec::new(),
            _ => vec![Action::Throttle(0)],
        }
    }

    fn end(&mut self, fault: Fault) -> Vec<Action> {
        let mut actions = self.let_go();
        let end = if self.has_paused() {
            Outcome::FailedPaused(fault)
        } else {
            Outcome::FailedRunning(fault)
        };
        self.state = State::Ended;
        actions.push(Action::End(end));
        actions
    }

    fn report(&mut self, now: Duration, phase: MigrationPhase) -> Action {
        self.reported_at = now;
        let sample = self.sample(now);
        let bandwidth = self.live_bandwidth(now);
        let eta = match (phase, bandwidth.saturating_sub(sample.dirty_rate)) {
            (MigrationPhase::PreCopy, net @ 1..) => bandwidth::time(sample.remaining, net).as_millis().max(1),
            _ => 0,
        };
        Action::Report(Progress {
            phase: phase.into(),
            round: self.round,
            bytes_sent: self.sent.bytes,
            bytes_total: self.config.total_pages.saturating_mul(PAGE_SIZE as u64),
            bytes_remaining: sample.remaining,
            dirty_bytes_per_s: sample.dirty_rate,
            bandwidth_bytes_per_s: bandwidth,
            eta_ms: u64::try_from(eta).unwrap_or(u64::MAX),
            throttle_percent: self.throttle,
            streams: self.streams.max(1),
            // Filled in by the shell, which has the streams.
            by_stream: Vec::new(),
        })
    }

    /// What the link carries in this round, or carried in the last one; 0 as long as nothing was measured.
    fn live_bandwidth(&self, now: Duration) -> u64 {
        let mut live = self.meter.clone();
        live.round(self.round_sent.counted(), now.saturating_sub(self.round_began));
        live.measured().unwrap_or(0)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
