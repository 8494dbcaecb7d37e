//! The source's side: [`Machine`] is the protocol, [`run`] drives it over a stream and a VM.
//!
//! What the receipt gets from here, all by this host's monotonic clock: `pause`, from the call of `SourceVm::pause` until
//! it returned; `last_pages`, from then until the target had acknowledged the final set; and the time before the
//! blackout. The rest is measured by the target and the VMM (see [`crate::target`]).

mod batches;
mod encoder;
mod holes;
mod lanes;
mod machine;
mod order;
mod streams;

use std::collections::VecDeque;
use std::num::NonZero;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use drover_points::{reach, seeded_bug};
use drover_proto::v1::MigrationOptions;
use drover_proto::{Code, Fault};

pub use machine::{Action, Config, Event, Machine, Sent};

use batches::{Job, Pace, Sender};
use encoder::Encoder;
use holes::{Holes, Verdict};
use lanes::Lanes;
use streams::Crew;

use crate::codec::{Frame, Hello, Join, Message, Run, bad};
use crate::control::Control;
use crate::convergence::{Costs, Intent};
use crate::handshake::{self, STREAMS_MAX, VERSIONS, feature};
use crate::post_copy::{self, Outgoing};
use crate::transport::{Link, Stop, Stream};
use crate::vm::{PAGE_SIZE, PageSet, RegionEnds, SourceVm};

/// Most streams when nobody says how many: one keeps a processor busy on either side, and a link is filled by a few.
const STREAMS_AUTO_MAX: usize = 4;

/// How long the source is still once the target is ready: reporting, and closing streams, is not urgent then.
const TARGET_FIRST: Duration = Duration::from_millis(20);

/// How long the source listens for the reason when a stream was closed.
const REFUSAL_WAIT: Duration = Duration::from_secs(1);

/// What the source knows before it connects.
#[derive(Clone, Debug)]
pub struct Params {
    /// The migration's id.
    pub migration: String,
    /// The VM's name.
    pub vm: String,
    /// This host's name.
    pub from_host: String,
    /// The epoch that the VM runs for here.
    pub source_epoch: u64,
    /// The epoch that the target was started for: `source_epoch + 1`.
    pub target_epoch: u64,
    /// The user's intent. `max_downtime_ms` of 0 is taken as 100.
    pub options: MigrationOptions,
    /// Version of the save-state that `SourceVm::save` writes.
    pub device_model: u32,
    /// The VM's CPU profile by name.
    pub cpu_profile: String,
    /// How dirty pages are found, for the receipt: `"bitmap"` or `"ring"`.
    pub tracker: &'static str,
    /// Whether the link that `dial` makes has handed over the memory itself: no page is sent, no dirty log is needed.
    pub local: bool,
    /// A link that moves no byte for so long counts as lost. Normally [`crate::transport::LINK_TIMEOUT`].
    pub link_timeout: Duration,
}

/// How an attempt ended, for the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The VM is paused and the target said Ready. Only the outcome in the log decides what comes next.
    AwaitOutcome,
    /// `SourceVm::pause` was never called: the VM goes on as if nothing had been. The caller reports the fault.
    FailedRunning(Fault),
    /// The VM is paused (`SourceVm::pause` was called). The caller reports the fault and stays paused until it learns the
    /// outcome from the log: the abort it asks for may come second there.
    FailedPaused(Fault),
}

/// What a connection to the target is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The link that the two VMMs talk over: always encrypted and authenticated.
    Link,
    /// A stream that carries pages.
    Pages {
        /// Without TLS.
        plaintext: bool,
    },
}

/// Moves `vm` over the connections that `dial` makes. Blocks until the attempt has ended. The dirty log is off then, unless the VM was
/// paused: switching it off takes milliseconds that the target's start could use, and a VM that stands still loses nothing by it.
pub fn run<S: Stream>(
    vm: &dyn SourceVm,
    mut dial: impl FnMut(Way) -> Result<S, Fault>,
    params: &Params,
    control: &Control,
) -> Outcome {
    let layout = vm.layout();
    let total_pages = match handshake::total_pages(&layout) {
        Ok(pages) => pages,
        Err(fault) => return Outcome::FailedRunning(fault),
    };
    let config = params.config(&layout, total_pages, vm.costs());
    reach("source.before_connect");
    let stream = match dial(Way::Link) {
        Ok(stream) => stream,
        Err(fault) => return Outcome::FailedRunning(fault),
    };
    let origin = Instant::now();
    let lanes = Lanes::new(control, origin);
    let link = match Link::new(stream, params.link_timeout, &lanes) {
        Ok(link) => link,
        Err(fault) => return Outcome::FailedRunning(fault),
    };
    let regions = RegionEnds::new(&layout);
    let pace = Pace::new(config.intent.bandwidth, origin);
    let crew = Crew::new(vm, &regions, &pace, control, &lanes, Encoder::plain(origin));
    let outgoing = Mutex::default();
    let outcome = thread::scope(|scope| {
        let mut driver = Driver {
            vm,
            sender: Sender::on_link(link, lanes.of(0)),
            dial: &mut dial,
            plaintext: config.hello.plaintext,
            compression: params.options.compression,
            control,
            scope,
            crew: &crew,
            outgoing: &outgoing,
            link_timeout: params.link_timeout,
            streams: 0,
            round: 0,
            regions: &regions,
            holes: Holes::none(),
            total_pages,
            buffer: Vec::new(),
            lent: None,
            origin,
            logging: false,
            throttled: false,
        };
        let outcome = driver.drive(Machine::new(config));
        if driver.logging && matches!(outcome, Outcome::FailedRunning(_)) {
            vm.stop_dirty_log();
        }
        if driver.throttled {
            vm.throttle(0);
        }
        crew.dismiss();
        outcome
    });
    match &outcome {
        Outcome::AwaitOutcome => tracing::info!(migration = params.migration, "the target is ready"),
        Outcome::FailedRunning(fault) => {
            tracing::warn!(migration = params.migration, %fault, "failed, the VM runs on")
        }
        Outcome::FailedPaused(fault) => {
            tracing::warn!(migration = params.migration, %fault, "failed, paused")
        }
    }
    outcome
}

impl Params {
    /// What to offer the target: what the intent does not allow is not offered.
    fn features(&self) -> u32 {
        let refused = if self.options.allow_postcopy {
            0
        } else {
            feature::POST_COPY
        };
        encoder::offered(encoder::wish(self.options.compression)) & !refused
    }

    fn config(&self, layout: &[crate::vm::Region], total_pages: u64, costs: Costs) -> Config {
        Config {
            hello: Hello {
                version_min: *VERSIONS.start(),
                version_max: *VERSIONS.end(),
                migration: self.migration.clone(),
                vm: self.vm.clone(),
                from_host: self.from_host.clone(),
                source_epoch: self.source_epoch,
                target_epoch: self.target_epoch,
                page_size: u32::try_from(PAGE_SIZE).expect("a page is small"),
                regions: handshake::regions(layout),
                device_model: self.device_model,
                cpu_profile: self.cpu_profile.clone(),
                streams: if self.local { 0 } else { streams(&self.options) },
                plaintext: self.options.plaintext,
                features: if self.local { 0 } else { self.features() },
                local: self.local,
            },
            total_pages,
            intent: Intent::of(&self.options),
            costs: costs.measured(&self.options),
            tracker: self.tracker.to_owned(),
            skip_final_pass: seeded_bug("no-final-dirty-pass"),
            forget_put_off: false,
        }
    }
}

/// How many streams to ask for: as many as the user wants, else as suit the processors. A single encrypted one is the link itself.
fn streams(options: &MigrationOptions) -> u32 {
    let wanted = match options.streams {
        0 => {
            let processors = thread::available_parallelism().map_or(1, NonZero::get);
            u32::try_from(processors.min(STREAMS_AUTO_MAX)).unwrap_or(1)
        }
        streams => streams.min(STREAMS_MAX),
    };
    // Post-copy keeps the link for the pages that the guest waits for.
    if wanted == 1 && !options.plaintext && !options.allow_postcopy {
        0
    } else {
        wanted
    }
}

/// The shell around the machine: it does what it is told and says what came of it.
struct Driver<'scope, 'env, S, D> {
    vm: &'env dyn SourceVm,
    sender: Sender<'env, S>,
    dial: &'env mut D,
    plaintext: bool,
    compression: i32,
    control: &'env Control,
    scope: &'scope Scope<'scope, 'env>,
    crew: &'env Crew<'env>,
    outgoing: &'env Mutex<Outgoing>,
    link_timeout: Duration,
    streams: u32,
    round: u32,
    regions: &'env RegionEnds,
    holes: Holes,
    total_pages: u64,
    buffer: Vec<u8>,
    /// For the dirty log to be added to.
    lent: Option<PageSet>,
    origin: Instant,
    logging: bool,
    throttled: bool,
}

impl<'env, S: Stream + 'env, D: FnMut(Way) -> Result<S, Fault>> Driver<'_, 'env, S, D> {
    fn drive(&mut self, mut machine: Machine) -> Outcome {
        let mut actions = VecDeque::from(machine.handle(self.origin.elapsed(), Event::Connected));
        loop {
            let action = actions
                .pop_front()
                .expect("a machine's list ends with what brings the next event");
            if let Action::End(outcome) = action {
                return outcome;
            }
            if action == Action::TakeDirty {
                self.lent = machine.lend_set();
            }
            if let Some(event) = self.perform(action) {
                if self.control.wants_post_copy() {
                    machine.want_post_copy();
                }
                actions = machine.handle(self.origin.elapsed(), event).into();
            }
        }
    }

    fn perform(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Reach(point) => reach(point),
            Action::Rest => thread::sleep(TARGET_FIRST),
            Action::Report(progress) => self.crew.report(progress),
            Action::Throttle(percent) => {
                self.throttled = percent > 0;
                self.vm.throttle(percent);
            }
            Action::Send(message @ Message::Cancel(_)) => self.sender.link.last_word(&message),
            Action::Send(message) => return self.sender.link.send(&message).err().map(Event::from),
            _ if self.control.is_cancelled() => return Some(Event::Cancelled),
            Action::Receive => return Some(self.receive().unwrap_or_else(Event::from)),
            Action::Encode { features, streams } => {
                let wish = encoder::wish(self.compression);
                self.crew.encode_with(Encoder::new(
                    wish,
                    features,
                    streams,
                    self.total_pages,
                    self.origin,
                ));
            }
            Action::OpenStreams { count, token } => {
                let opened = self.open_streams(count, &token);
                return Some(opened.map_or_else(Event::from, |()| Event::StreamsOpen));
            }
            Action::SendBatch { round, runs, capped } => {
                let sent = self.send_batch(Job {
                    round,
                    runs,
                    capped,
                    plain: false,
                    hole: false,
                });
                return Some(sent.map_or_else(|stop| self.lost(stop), Event::BatchSent));
            }
            Action::Serve => self.vm.serving(),
            Action::Answer { round, runs } => {
                self.outgoing().asked(&runs);
                let job = Job {
                    round,
                    runs,
                    capped: false,
                    plain: true,
                    hole: false,
                };
                let sent = self.crew.send_with(&mut self.sender, &job);
                return sent.err().map(Event::from);
            }
            Action::Push { round, pages } => {
                self.sender
                    .link
                    .set_timeout(self.link_timeout * post_copy::PATIENCE);
                *self.outgoing() = Outgoing::new(pages);
                return self.push(round).err().map(Event::LinkFailed);
            }
            Action::EndStreams { round, last } => {
                let sent = self.end_streams(round, last);
                return Some(sent.map_or_else(|stop| self.lost(stop), Event::StreamsEnded));
            }
            action => return Some(self.command(action).unwrap_or_else(|fault| self.failed(fault))),
        }
        None
    }

    fn command(&mut self, action: Action) -> Result<Event, Fault> {
        let began = Instant::now();
        Ok(match action {
            Action::StartLog => {
                self.logging = true;
                self.vm.start_dirty_log()?;
                Event::LogStarted
            }
            Action::TakeDirty => {
                let lent = self.lent.take();
                let mut dirty = lent.unwrap_or_else(|| PageSet::empty(self.total_pages));
                self.vm.take_dirty(&mut dirty)?;
                Event::DirtyTaken(dirty)
            }
            Action::LookDirty => {
                let mut seen = PageSet::empty(self.total_pages);
                self.vm.look_dirty(&mut seen)?;
                Event::DirtySeen(seen)
            }
            Action::Pause => {
                self.vm.pause()?;
                Event::Paused {
                    took: began.elapsed(),
                }
            }
            _ => {
                debug_assert_eq!(action, Action::Save, "the other actions are done elsewhere");
                let state = self.vm.save()?;
                Event::Saved {
                    state,
                    took: began.elapsed(),
                }
            }
        })
    }

    /// The VM failed. One whose migration was cancelled in this moment is being put back already.
    fn failed(&self, fault: Fault) -> Event {
        if self.control.is_cancelled() {
            Event::Cancelled
        } else {
            Event::VmFailed(fault)
        }
    }

    fn receive(&mut self) -> Result<Event, Stop> {
        match self.sender.link.receive(&mut self.buffer)? {
            (Frame::Message(message), _) => Ok(Event::Received(message)),
            (frame, _) => Err(Stop::Failed(bad(format!("the target sent {:?}", frame.kind())))),
        }
    }

    fn open_streams(&mut self, count: u32, token: &[u8]) -> Result<(), Stop> {
        for stream in 0..count {
            let way = Way::Pages {
                plaintext: self.plaintext,
            };
            let mut link = Link::new((self.dial)(way)?, self.link_timeout, self.control)?;
            link.send(&Message::Join(Join {
                token: token.to_vec(),
                stream,
            }))?;
            // A new link on the stream: its frames count from 0 again, as the target's do.
            let lane = self.crew.lane(stream);
            let link = Link::new(link.into_stream(), self.link_timeout, lane)?;
            self.crew.hire(self.scope, Sender::on_stream(link, lane))?;
        }
        self.streams = count;
        Ok(())
    }

    fn send_batch(&mut self, job: Job) -> Result<Sent, Stop> {
        if job.round != self.round {
            // The round before was acknowledged: nobody has a job.
            self.round = job.round;
            self.crew.begin_round(job.round);
        }
        if self.streams == 0 {
            return self.crew.send_with(&mut self.sender, &job);
        }
        // Later rounds hold only pages that were written.
        if let (1, [run]) = (job.round, &job.runs[..])
            && let Verdict::Held(before) = self.holes.offer(*run, self.total_pages, self.regions, self.vm)
        {
            return self.give_hole(before);
        }
        let held = self.holes.take();
        let mut sent = self.give_hole(held)?;
        sent.add(self.crew.give(job)?);
        Ok(sent)
    }

    fn give_hole(&self, hole: Option<Run>) -> Result<Sent, Stop> {
        let Some(run) = hole else {
            return Ok(Sent::default());
        };
        self.crew.give(Job {
            round: self.round,
            runs: vec![run],
            capped: true,
            plain: true,
            hole: true,
        })
    }

    fn end_streams(&mut self, round: u32, last: bool) -> Result<Sent, Stop> {
        let held = self.holes.take();
        let mut sent = self.give_hole(held)?;
        sent.add(self.crew.end_round(round, last)?);
        Ok(sent)
    }

    fn outgoing(&self) -> MutexGuard<'env, Outgoing> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends in the background what nobody asked for yet. Where it cannot go on, the target asks for the rest over the link.
    fn push(&self, round: u32) -> Result<(), Fault> {
        let (crew, outgoing) = (self.crew, self.outgoing);
        let push = move || {
            loop {
                let runs = outgoing.lock().unwrap_or_else(PoisonError::into_inner).take();
                if runs.is_empty() {
                    return crew.end_round(round, true);
                }
                crew.give(Job {
                    round,
                    runs,
                    capped: true,
                    plain: true,
                    hole: false,
                })?;
            }
        };
        let log = move || match push() {
            Ok(sent) => tracing::info!(?sent, "all pages are sent"),
            Err(stop) => tracing::info!(?stop, "the target gets the rest as it asks for it"),
        };
        let thread = thread::Builder::new().name("push".to_owned());
        let spawned = thread.spawn_scoped(self.scope, log);
        spawned
            .map(drop)
            .map_err(|error| Fault::new(Code::Internal, format!("no thread for the background: {error}")))
    }

    /// Sending failed. A target that refuses closes its streams, and says why on the link.
    fn lost(&mut self, stop: Stop) -> Event {
        if self.streams > 0
            && stop != Stop::Cancelled
            && let Some(message @ Message::Refusal(_)) = self.sender.link.hear_last_word(REFUSAL_WAIT)
        {
            return Event::Received(message);
        }
        stop.into()
    }
}

impl From<Stop> for Event {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Cancelled => Self::Cancelled,
            Stop::Failed(fault) => Self::LinkFailed(fault),
        }
    }
}
