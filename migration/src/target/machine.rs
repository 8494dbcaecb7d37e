//! The target's protocol without IO: an event goes in, a list of actions comes out.
//!
//! ```text
//!  Waiting ──Hello──▶ (Adopting ──MemoryAdopted──▶) Receiving ──RoundEnd{last}──▶ Swept ──State──▶ Restoring ──Restored──▶ Answering ──Ready went out──▶ Ended{Done}
//!  post-copy: Receiving ──RoundEnd{post_copy}──▶ Arming ──Armed──▶ Swept ─▶ Restoring ─▶ Answering ─▶ Lacking ──nothing lacking──▶ Ended{Done}
//!  any ──a frame out of place, a count that differs, the link, the VM──▶ Ended{Failed}
//! ```
//!
//! Pages come on the link or, if that was agreed, on streams beside it. A round is over when the link says so *and* every stream has
//! said that its part is over, and was written; only then is it acknowledged, and only then may a page come again. So no page is
//! overtaken by its older content, whichever stream either takes.
//!
//! In an upgrade the memory itself came with the link. It is taken over as soon as the hello is found good, before the source pauses;
//! no page may come, and the only round is the empty one after the pause, which says that the source stands still.
//!
//! It trusts no frame: a page beyond memory, a round that is not the one under way, more pages in a round than memory
//! has, counts that differ from what came, a page that never came, pages after the last round, a digest that
//! differs, each ends the attempt. Ready is said only when all of it held and the VM took the state.

use std::fmt;
use std::time::Duration;

use drover_proto::v1::{Blackout, EncodingReceipt, MigrationPhase, PostCopyReceipt, Progress, Receipt};
use drover_proto::{Code, Fault};

use crate::bandwidth;
use crate::codec::{
    Complete, Deltas, Frame, HelloAck, Join, Message, Packed, PageRequest, Pages, Ready, Refusal, RoundAck,
    RoundEnd, Runs, StateFrame, Zeros, bad, shortened,
};
use crate::convergence::{self, THROTTLE_MAX};
use crate::digest::{Totals, digest};
use crate::encode::compress::Method;
use crate::handshake::{self, Agreed, Expected, TOKEN_BYTES, feature};
use crate::post_copy::{self, Lacking, OnFault};
use crate::vm::{PAGE_SIZE, PageSet};

/// Progress is reported so often inside a round.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// Most rounds a source may send: more than any version's rules have asked for, and a bound all the same.
pub const ROUNDS_ACCEPTED_MAX: u32 = 16 * convergence::ROUNDS_MAX;
/// Longest name of a tracker that is kept for the receipt.
const TRACKER_BYTES_MAX: usize = 16;

/// What happened.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// The source wrote this frame, of so many bytes.
    Received(Frame<'a>, usize),
    /// The VM stands on the source's memory.
    MemoryAdopted,
    /// The VM took the state.
    Restored,
    /// Whoever touches a page that is missing waits from now on.
    Armed,
    /// These pages, which were missing, are in memory.
    Placed(Runs<'a>),
    /// The VM may be granted to run.
    Stood,
    /// The stream broke or stalled, or a frame could not be read.
    LinkFailed(Fault),
    /// The VM could not do what an action asked.
    VmFailed(Fault),
    /// The VMM is to end.
    Cancelled,
}

/// What the driver is to do, in order. Unless the list holds an `AdoptMemory`, a `Restore` or an `End`, the next frame is read after it.
#[derive(Clone, Debug, PartialEq)]
pub enum Action<'a> {
    /// Wait at the pause point of this name, if a test holds it.
    Reach(&'static str),
    /// Tell whoever watches.
    Report(Progress),
    /// Write the frame.
    Send(Message),
    /// Wait for the streams that were agreed on.
    Admit(Admission),
    /// Write the data to these pages.
    Write {
        /// Which pages.
        runs: Runs<'a>,
        /// Their content.
        data: &'a [u8],
    },
    /// Write what is packed here.
    Unpack(Packed<'a>),
    /// Change these pages.
    Patch(Deltas<'a>),
    /// Make these pages zero.
    Zero {
        /// Which pages.
        runs: Runs<'a>,
    },
    /// Take over the memory that came with the link → `MemoryAdopted`.
    AdoptMemory,
    /// Restore the VM from this encoded `VmSave` → `Restored`. In a post-copy it may touch pages that are missing: frames go on
    /// being read meanwhile, and faults being told.
    Restore(Vec<u8>),
    /// Post-copy: discard these pages, and let whoever touches one wait → `Armed`.
    Arm(PageSet),
    /// Post-copy: give the pages this content where they have none → `Placed`.
    Place {
        /// Which pages.
        runs: Runs<'a>,
        /// Their content.
        data: &'a [u8],
    },
    /// Post-copy: make these pages zero where they have no content → `Placed`.
    PlaceZeros {
        /// Which pages.
        runs: Runs<'a>,
    },
    /// Post-copy: Ready was said, from now on the VM may be granted to run → `Stood`.
    Stand(Done),
    /// It is over. Comes with or after the frame that says so to the source.
    End(Result<Done, Fault>),
}

/// Whom to take for a stream of this migration.
#[derive(Clone, PartialEq, Eq)]
pub struct Admission {
    /// How many streams, at least 1.
    pub streams: u32,
    /// Whether they come without TLS.
    pub plaintext: bool,
    token: [u8; TOKEN_BYTES],
}

impl Admission {
    /// Whether a stream may join that begins with this.
    pub fn admits(&self, join: &Join) -> bool {
        let length_differs = u8::from(join.token.len() != TOKEN_BYTES);
        // Looks at every byte, so that the time it takes tells nothing of the token.
        let differs = join
            .token
            .iter()
            .zip(&self.token)
            .fold(length_differs, |all, (a, b)| all | (a ^ b));
        differs == 0 && join.stream < self.streams
    }
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admission")
            .field("streams", &self.streams)
            .field("plaintext", &self.plaintext)
            .finish_non_exhaustive()
    }
}

/// What Ready was said for.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    /// The receipt but for the blackout's `commit`, `resume`, `total` and for `total_ms`.
    pub receipt: Receipt,
    /// From the source's connect until it began to pause.
    pub before_blackout: Duration,
    /// The `now` at which everything was restored.
    pub ready_at: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Adopting,
    Receiving,
    /// What is missing is being discarded.
    Arming,
    Swept,
    Restoring,
    /// The list that says Ready and ends is being done; it may still fail.
    Answering,
    /// It may run, and lacks pages.
    Lacking,
    Ended,
}

/// See the module.
#[derive(Debug)]
pub struct Machine {
    expected: Expected,
    total_pages: u64,
    state: State,
    agreed: Agreed,
    /// Streams whose part of the round is over, a bit each.
    streams_ended: u32,
    /// Pages that came at least once; dropped when the round has ended that must leave none out.
    covered: Option<PageSet>,
    round: u32,
    round_pages: u64,
    round_zero_pages: u64,
    totals: Totals,
    encoded: EncodingReceipt,
    bytes: u64,
    began_at: Duration,
    reported_at: Duration,
    swept_at: Duration,
    done: Option<Done>,
    digest: [u8; 32],
    /// What the source declared missing so far.
    missing: Option<PageSet>,
    /// Since they are all known and discarded: what of them is still missing.
    lacking: Option<Lacking>,
    /// The VM was told that it may be granted to run.
    stood: bool,
    /// Streams that broke, a bit each: in a post-copy that is no end.
    broken: u32,
    /// Post-copy was asked for and is not possible: why.
    unavailable: String,
}

impl Machine {
    /// A machine that waits for the source's hello. Refuses a layout that is not sound.
    pub fn new(expected: Expected) -> Result<Self, Fault> {
        let total_pages = handshake::total_pages(&expected.layout)?;
        Ok(Self {
            total_pages,
            expected,
            state: State::Waiting,
            agreed: Agreed::default(),
            streams_ended: 0,
            covered: Some(PageSet::empty(total_pages)),
            round: 1,
            round_pages: 0,
            round_zero_pages: 0,
            totals: Totals::default(),
            encoded: EncodingReceipt::default(),
            bytes: 0,
            began_at: Duration::ZERO,
            reported_at: Duration::ZERO,
            swept_at: Duration::ZERO,
            done: None,
            digest: [0; 32],
            missing: None,
            lacking: None,
            stood: false,
            broken: 0,
            unavailable: String::new(),
        })
    }

    /// One step. `now`: time since any fixed instant; it never goes back. If an action fails, the rest of its list is
    /// dropped for the list that the failure brings. After an `End` was done nothing more is to be told.
    pub fn handle<'a>(&mut self, now: Duration, event: Event<'a>) -> Vec<Action<'a>> {
        if self.state == State::Ended {
            return Vec::new();
        }
        let step = match event {
            Event::Received(frame, bytes) => {
                self.bytes = self.bytes.saturating_add(bytes as u64);
                self.receive(now, frame, bytes)
            }
            Event::MemoryAdopted if self.state == State::Adopting => {
                self.state = State::Receiving;
                Ok(self.welcome(now))
            }
            Event::MemoryAdopted => Err(Fault::new(
                Code::Internal,
                "memory was taken over without being asked for",
            )),
            Event::Restored if self.state == State::Restoring => Ok(self.restored(now)),
            Event::Restored => Err(Fault::new(
                Code::Internal,
                "the VM was restored without being asked to",
            )),
            Event::Armed if self.state == State::Arming => Ok(self.armed(now)),
            Event::Armed => Err(Fault::new(
                Code::Internal,
                "the VM was armed without being asked to",
            )),
            Event::Stood => {
                self.stood = true;
                Ok(Vec::new())
            }
            Event::Placed(runs) => {
                if let Some(lacking) = &mut self.lacking {
                    lacking.placed(now, runs);
                }
                Ok(self.lacking_report(now))
            }
            Event::LinkFailed(fault) if fault.code == Code::LinkLost => return self.fail(fault),
            Event::LinkFailed(fault) | Event::VmFailed(fault) => Err(fault),
            Event::Cancelled => Err(Fault::new(Code::Cancelled, "the target's VMM was asked to end")),
        };
        step.unwrap_or_else(|fault| {
            let mut actions = vec![Action::Send(Message::Refusal(Refusal::from(&fault)))];
            actions.extend(self.fail(fault));
            actions
        })
    }

    fn receive<'a>(
        &mut self,
        now: Duration,
        frame: Frame<'a>,
        bytes: usize,
    ) -> Result<Vec<Action<'a>>, Fault> {
        match (self.state, frame) {
            (_, Frame::Message(Message::Cancel(cancel))) => Ok(self.fail(cancel.fault())),
            (State::Waiting, Frame::Message(Message::Hello(hello))) => {
                self.agreed = handshake::check(&hello, &self.expected)?;
                if let (true, Err(why)) = (hello.features & feature::POST_COPY != 0, &self.expected.post_copy)
                {
                    self.unavailable = shortened(&why.message);
                }
                self.began_at = now;
                if self.agreed.local {
                    // All of it is there: no page is missing, and none may come.
                    self.covered = None;
                    self.state = State::Adopting;
                    return Ok(vec![Action::AdoptMemory]);
                }
                self.state = State::Receiving;
                Ok(self.welcome(now))
            }
            (State::Receiving, frame) if self.on_link() && is_memory(&frame) => {
                self.memory(now, frame, bytes)
            }
            (State::Receiving, Frame::Message(Message::Missing(missing)))
                if self.agrees_to(feature::POST_COPY) =>
            {
                let (total, set) = (self.total_pages, &mut self.missing);
                let set = set.get_or_insert_with(|| PageSet::empty(total));
                post_copy::declared(&missing, total, set)?;
                Ok(Vec::new())
            }
            (State::Receiving, Frame::Message(Message::RoundEnd(end))) => self.end_round(now, end),
            (State::Restoring | State::Lacking, frame @ (Frame::Pages(_) | Frame::Zeros(_))) => {
                self.came(frame)
            }
            (State::Restoring | State::Lacking, Frame::Message(Message::PageAnswer(_)))
                if self.lacking.is_some() =>
            {
                Ok(Vec::new())
            }
            (State::Swept, Frame::Message(Message::State(frame))) => self.judge(frame),
            (state, frame) => Err(bad(format!(
                "the source sent {:?} while the target was {state:?}",
                frame.kind()
            ))),
        }
    }

    fn agrees_to(&self, feature: u32) -> bool {
        self.agreed.features & feature != 0
    }

    /// Whether pages come on the link itself.
    fn on_link(&self) -> bool {
        self.agreed.streams == 0 && !self.agreed.local
    }

    fn welcome<'a>(&mut self, now: Duration) -> Vec<Action<'a>> {
        let Agreed {
            version,
            streams,
            plaintext,
            features,
            ..
        } = self.agreed;
        let token = self.expected.token;
        let mut actions = vec![Action::Send(Message::HelloAck(HelloAck {
            version,
            streams,
            token: if streams > 0 { token.to_vec() } else { Vec::new() },
            features,
            post_copy_unavailable: self.unavailable.clone(),
        }))];
        if streams > 0 {
            actions.push(Action::Admit(Admission {
                streams,
                plaintext,
                token,
            }));
        }
        actions.push(Action::Reach("target.after_hello"));
        actions.push(self.report(now, MigrationPhase::PreCopy));
        actions
    }

    /// One step for a frame of so many bytes that came on one of the agreed streams. What fails here ends the attempt, but it is for
    /// the link to say so: it must be told to [`Machine::handle`] as `LinkFailed`.
    pub fn stream<'a>(
        &mut self,
        now: Duration,
        stream: u32,
        frame: Frame<'a>,
        bytes: usize,
    ) -> Result<Vec<Action<'a>>, Fault> {
        self.bytes = self.bytes.saturating_add(bytes as u64);
        let bit = 1_u32.checked_shl(stream).unwrap_or(0);
        let goes_on = stream < self.agreed.streams && self.streams_ended & bit == 0;
        match (self.state, frame) {
            (State::Lacking, frame @ (Frame::Pages(_) | Frame::Zeros(_))) if goes_on => self.came(frame),
            (State::Lacking, Frame::Message(Message::StreamEnd(end)))
                if goes_on && end.last && end.round == self.round + 1 =>
            {
                self.streams_ended |= bit;
                Ok(Vec::new())
            }
            (State::Receiving, frame) if goes_on && is_memory(&frame) => self.memory(now, frame, bytes),
            (State::Receiving, Frame::Message(Message::StreamEnd(end)))
                if goes_on && end.round == self.round =>
            {
                self.streams_ended |= bit;
                Ok(Vec::new())
            }
            (state, frame) => Err(bad(format!(
                "{:?} came on stream {stream} in round {} while the target was {state:?}",
                frame.kind(),
                self.round
            ))),
        }
    }

    /// A stream is of no more use. Whether that is no reason to end: in a post-copy the rest is asked for over the link.
    pub fn bears_broken_stream(&mut self, stream: u32) -> bool {
        let bears = self.state == State::Lacking;
        if bears {
            self.broken |= 1_u32.checked_shl(stream).unwrap_or(0);
        }
        bears
    }

    /// In a post-copy, from when pages are missing: what is.
    pub fn lacking(&self) -> Option<&Lacking> {
        self.lacking.as_ref()
    }

    /// After the end: what was still missing, if there was a post-copy.
    pub fn take_lacking(&mut self) -> Option<PageSet> {
        self.lacking.take().map(|lacking| lacking.missing().clone())
    }

    /// Post-copy: somebody waits for a page. Gives whether it is to be made zero, because it is one that was never missing.
    pub fn fault(&mut self, now: Duration, page: u64) -> OnFault {
        let lacking = self.lacking.as_mut();
        lacking.map_or(OnFault::Wait, |lacking| lacking.fault(now, page))
    }

    /// Post-copy: what to ask the source for now, if anything.
    pub fn next_request(&mut self, now: Duration) -> Option<PageRequest> {
        let over = self.streams_ended | self.broken;
        let alone = self.state == State::Lacking && over.count_ones() == self.agreed.streams;
        let pages = self.lacking.as_mut()?.next_request(now, alone)?;
        Some(PageRequest { pages })
    }

    /// Post-copy: ends it if nothing is missing any more.
    pub fn complete<'a>(&mut self, now: Duration) -> Option<Vec<Action<'a>>> {
        let whole = self.lacking.as_ref().is_some_and(|lacking| lacking.left() == 0);
        if self.state != State::Lacking || !whole {
            return None;
        }
        let mut done = self.done.take()?;
        let lacking = self.lacking.as_ref()?;
        done.receipt.bytes = self.bytes;
        done.receipt.pages = self.totals.pages;
        done.receipt.zero_pages = self.totals.zero_pages;
        done.receipt.post_copy = Some(PostCopyReceipt {
            duration_us: u64::try_from(now.saturating_sub(done.ready_at).as_micros()).unwrap_or(u64::MAX),
            ..lacking.receipt()
        });
        self.state = State::Ended;
        let complete = Action::Send(Message::Complete(Complete {}));
        Some(vec![
            Action::Reach("target.before_complete"),
            complete,
            Action::End(Ok(done)),
        ])
    }

    /// Pages that were missing.
    fn came<'a>(&mut self, frame: Frame<'a>) -> Result<Vec<Action<'a>>, Fault> {
        let (round, runs) = match &frame {
            Frame::Pages(pages) => (pages.round, pages.runs),
            Frame::Zeros(zeros) => (zeros.round, zeros.runs),
            Frame::Packed(_) | Frame::Deltas(_) | Frame::Message(_) => {
                return Err(bad(format!("{:?} came where plain pages are due", frame.kind())));
            }
        };
        let Some(lacking) = self.lacking.as_ref().filter(|_| round == self.round + 1) else {
            return Err(bad(format!("pages of round {round} came after the state")));
        };
        lacking.check(runs)?;
        Ok(vec![match frame {
            Frame::Pages(pages) => {
                self.totals.pages = self.totals.pages.saturating_add(runs.pages());
                Action::Place {
                    runs,
                    data: pages.data,
                }
            }
            _ => {
                self.totals.zero_pages = self.totals.zero_pages.saturating_add(runs.pages());
                Action::PlaceZeros { runs }
            }
        }])
    }

    fn armed<'a>(&mut self, now: Duration) -> Vec<Action<'a>> {
        let missing = self.missing.take().unwrap_or_default();
        self.lacking = Some(Lacking::new(now, missing));
        self.state = State::Swept;
        self.streams_ended = 0;
        self.swept_at = now;
        let ack = Action::Send(Message::RoundAck(RoundAck { round: self.round }));
        vec![ack, Action::Reach("target.after_last_pages")]
    }

    fn lacking_report<'a>(&mut self, now: Duration) -> Vec<Action<'a>> {
        if self.state != State::Lacking || now.saturating_sub(self.reported_at) < REPORT_EVERY {
            return Vec::new();
        }
        vec![self.report(now, MigrationPhase::PostCopy)]
    }

    /// Whether every stream has said that its part of the round is over. Until then the end of the round must not be told.
    pub fn streams_have_ended(&self) -> bool {
        self.streams_ended.count_ones() == self.agreed.streams
    }

    fn memory<'a>(
        &mut self,
        now: Duration,
        frame: Frame<'a>,
        bytes: usize,
    ) -> Result<Vec<Action<'a>>, Fault> {
        if let Frame::Pages(Pages { runs, .. })
        | Frame::Packed(Packed { runs, .. })
        | Frame::Deltas(Deltas { runs, .. }) = &frame
        {
            self.encoded.content_bytes += runs.pages() * PAGE_SIZE as u64;
            self.encoded.sent_bytes += bytes as u64;
        }
        match frame {
            Frame::Pages(pages) => self.pages(now, pages),
            Frame::Zeros(zeros) => self.zeros(now, zeros),
            Frame::Packed(packed) => self.packed(now, packed),
            Frame::Deltas(deltas) => self.deltas(now, deltas),
            Frame::Message(_) => Err(bad("a message is no memory")),
        }
    }

    /// Encoded pages come only in a form that was agreed on.
    fn agreed_on(&self, form: u32, name: &str) -> Result<(), Fault> {
        if self.agreed.features & form == 0 {
            return Err(bad(format!("pages came as {name}, which was not agreed on")));
        }
        Ok(())
    }

    fn packed<'a>(&mut self, now: Duration, packed: Packed<'a>) -> Result<Vec<Action<'a>>, Fault> {
        let (form, counter) = match packed.method {
            Method::Lz4 => (feature::LZ4, &mut self.encoded.lz4_pages),
            Method::Zstd => (feature::ZSTD, &mut self.encoded.zstd_pages),
        };
        *counter += packed.runs.pages();
        self.agreed_on(form, packed.method.name())?;
        self.round_pages += packed.runs.pages();
        self.place(packed.round, packed.runs)?;
        Ok(self.and_report(now, Action::Unpack(packed)))
    }

    /// A delta is for a page that came before, in an earlier round.
    fn deltas<'a>(&mut self, now: Duration, deltas: Deltas<'a>) -> Result<Vec<Action<'a>>, Fault> {
        self.agreed_on(feature::DELTAS, "deltas")?;
        if deltas.round < 2 || deltas.runs.end() > self.total_pages {
            return Err(bad(format!("deltas came in round {}", deltas.round)));
        }
        if let Some(covered) = &self.covered
            && !deltas.iter().all(|(page, ..)| covered.contains(page))
        {
            return Err(bad("a delta came for a page that never came"));
        }
        self.encoded.delta_pages += deltas.runs.pages();
        self.round_pages += deltas.runs.pages();
        self.place(deltas.round, deltas.runs)?;
        Ok(self.and_report(now, Action::Patch(deltas)))
    }

    fn pages<'a>(&mut self, now: Duration, pages: Pages<'a>) -> Result<Vec<Action<'a>>, Fault> {
        self.round_pages += pages.runs.pages();
        self.place(pages.round, pages.runs)?;
        Ok(self.and_report(
            now,
            Action::Write {
                runs: pages.runs,
                data: pages.data,
            },
        ))
    }

    fn zeros<'a>(&mut self, now: Duration, zeros: Zeros<'a>) -> Result<Vec<Action<'a>>, Fault> {
        self.round_zero_pages = self.round_zero_pages.saturating_add(zeros.runs.pages());
        self.place(zeros.round, zeros.runs)?;
        Ok(self.and_report(now, Action::Zero { runs: zeros.runs }))
    }

    /// Pages may stand here: the right round, inside memory, no more than memory has. Counted before.
    fn place(&mut self, round: u32, runs: Runs<'_>) -> Result<(), Fault> {
        if round != self.round {
            return Err(bad(format!(
                "pages of round {round} came in round {}",
                self.round
            )));
        }
        if runs.end() > self.total_pages {
            return Err(bad(format!(
                "page {} was sent, memory has {} pages",
                runs.end() - 1,
                self.total_pages
            )));
        }
        if self.round_pages.saturating_add(self.round_zero_pages) > self.total_pages {
            return Err(bad(format!(
                "round {round} holds more pages than memory, which has {}",
                self.total_pages
            )));
        }
        if let Some(covered) = &mut self.covered {
            runs.iter().for_each(|run| covered.insert(run));
        }
        Ok(())
    }

    fn end_round<'a>(&mut self, now: Duration, end: RoundEnd) -> Result<Vec<Action<'a>>, Fault> {
        if end.round != self.round || end.round >= ROUNDS_ACCEPTED_MAX {
            return Err(bad(format!(
                "round {} was ended in round {}; {ROUNDS_ACCEPTED_MAX} are too many",
                end.round, self.round
            )));
        }
        if !self.streams_have_ended() {
            return Err(bad(format!(
                "round {} was ended before its pages had come on every stream",
                end.round
            )));
        }
        if (end.pages, end.zero_pages) != (self.round_pages, self.round_zero_pages) {
            return Err(Fault::new(
                Code::DigestMismatch,
                format!(
                    "round {} had {} pages and {} zero pages for the source, {} and {} came",
                    end.round, end.pages, end.zero_pages, self.round_pages, self.round_zero_pages
                ),
            ));
        }
        let post_copy = end.last && end.post_copy && self.agrees_to(feature::POST_COPY);
        let declared = self.missing.as_ref().map_or(0, PageSet::count);
        if end.post_copy != post_copy || end.missing != declared {
            return Err(Fault::new(
                Code::DigestMismatch,
                format!(
                    "the source says that {} pages are missing, it named {declared}",
                    end.missing
                ),
            ));
        }
        if let (Some(covered), Some(missing)) = (&mut self.covered, &self.missing) {
            covered.merge(missing);
        }
        let may_be_late = self.agrees_to(feature::LATE_PAGES) && !end.last;
        if !may_be_late
            && let Some(missing) = self
                .covered
                .take()
                .map(|covered| self.total_pages - covered.count())
            && missing > 0
        {
            return Err(Fault::new(
                Code::DigestMismatch,
                format!(
                    "{missing} of {} pages had not come when round {} ended",
                    self.total_pages, end.round
                ),
            ));
        }
        self.totals.rounds = end.round;
        self.totals.pages += end.pages;
        self.totals.zero_pages += end.zero_pages;
        if post_copy {
            let total = self.total_pages;
            let missing = self.missing.get_or_insert_with(|| PageSet::empty(total));
            self.state = State::Arming;
            return Ok(vec![Action::Arm(missing.clone())]);
        }
        let ack = Action::Send(Message::RoundAck(RoundAck { round: end.round }));
        if end.last {
            self.state = State::Swept;
            self.swept_at = now;
            return Ok(vec![ack, Action::Reach("target.after_last_pages")]);
        }
        self.round += 1;
        self.streams_ended = 0;
        (self.round_pages, self.round_zero_pages) = (0, 0);
        Ok(vec![
            ack,
            Action::Reach("target.round_end"),
            self.report(now, MigrationPhase::PreCopy),
        ])
    }

    fn judge<'a>(&mut self, frame: StateFrame) -> Result<Vec<Action<'a>>, Fault> {
        let said = Totals {
            rounds: frame.rounds,
            pages: frame.pages,
            zero_pages: frame.zero_pages,
        };
        if said != self.totals {
            let came = self.totals;
            return Err(Fault::new(
                Code::DigestMismatch,
                format!("the source counts {said:?}, {came:?} came"),
            ));
        }
        self.digest = digest(&frame.state, said);
        if frame.digest != self.digest {
            return Err(Fault::new(
                Code::DigestMismatch,
                "the saved state is not the one that the source saved",
            ));
        }
        let mut tracker = frame.tracker;
        if tracker.len() > TRACKER_BYTES_MAX || !tracker.is_ascii() {
            tracker = "unknown".to_owned();
        }
        self.done = Some(Done {
            receipt: Receipt {
                bytes: self.bytes,
                rounds: said.rounds,
                pages: said.pages,
                zero_pages: said.zero_pages,
                tracker,
                streams: self.agreed.streams.max(1),
                plaintext: self.agreed.plaintext,
                throttle_percent: frame.throttle_percent.min(THROTTLE_MAX),
                post_copy_unavailable: self.unavailable.clone(),
                encoding: Some(self.encoded),
                blackout_us: Some(Blackout {
                    pause: frame.pause_us,
                    last_pages: frame.last_pages_us,
                    ..Blackout::default()
                }),
                ..Receipt::default()
            },
            before_blackout: Duration::from_micros(frame.before_blackout_us),
            ready_at: Duration::ZERO,
        });
        self.state = State::Restoring;
        Ok(vec![
            Action::Reach("target.before_restore"),
            Action::Restore(frame.state),
        ])
    }

    fn restored<'a>(&mut self, now: Duration) -> Vec<Action<'a>> {
        let Some(mut done) = self.done.take() else {
            return self.fail(Fault::new(
                Code::Internal,
                "a VM was restored before its state was judged",
            ));
        };
        done.ready_at = now;
        if let Some(blackout) = &mut done.receipt.blackout_us {
            let state = now.saturating_sub(self.swept_at).as_micros();
            blackout.state = u64::try_from(state).unwrap_or(u64::MAX);
        }
        let ready = Message::Ready(Ready {
            digest: self.digest.to_vec(),
            pages: self.totals.pages,
            zero_pages: self.totals.zero_pages,
        });
        // Nothing is reported here: that the VM is ready is said once, by the VMM, with all that goes with it.
        let mut actions = vec![
            Action::Reach("target.before_ready"),
            Action::Send(ready),
            Action::Reach("target.after_ready"),
        ];
        if self.lacking.is_some() {
            self.done = Some(done.clone());
            actions.push(Action::Stand(done));
            self.state = State::Lacking;
        } else {
            actions.push(Action::End(Ok(done)));
            self.state = State::Answering;
        }
        actions
    }

    fn fail<'a>(&mut self, fault: Fault) -> Vec<Action<'a>> {
        let left = self.lacking.as_ref().map_or(0, Lacking::left);
        let fault = match self.state {
            State::Lacking if self.stood => Fault::new(
                Code::PostCopyLost,
                format!("{left} pages were missing, which only the source had: {fault}"),
            ),
            _ => fault,
        };
        self.state = State::Ended;
        vec![Action::End(Err(fault))]
    }

    fn and_report<'a>(&mut self, now: Duration, action: Action<'a>) -> Vec<Action<'a>> {
        let mut actions = vec![action];
        if now.saturating_sub(self.reported_at) >= REPORT_EVERY {
            actions.push(self.report(now, MigrationPhase::PreCopy));
        }
        actions
    }

    fn report<'a>(&mut self, now: Duration, phase: MigrationPhase) -> Action<'a> {
        self.reported_at = now;
        let left = self.lacking.as_ref().map_or(0, Lacking::left);
        Action::Report(Progress {
            phase: phase.into(),
            round: self.round,
            bytes_sent: self.bytes,
            bytes_total: self.total_pages.saturating_mul(PAGE_SIZE as u64),
            bandwidth_bytes_per_s: bandwidth::rate(self.bytes, now.saturating_sub(self.began_at)),
            streams: self.agreed.streams.max(1),
            bytes_remaining: left.saturating_mul(PAGE_SIZE as u64),
            ..Progress::default()
        })
    }
}

/// Whether a frame carries guest memory.
fn is_memory(frame: &Frame<'_>) -> bool {
    !matches!(frame, Frame::Message(_))
}
