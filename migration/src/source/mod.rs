//! The source's side: [`Machine`] is the protocol, [`run`] drives it over a stream and a VM.
//!
//! What the receipt gets from here, all by this host's monotonic clock: `pause`, from the call of `SourceVm::pause` until
//! it returned; `last_pages`, from then until the target had acknowledged the final set; and the time before the
//! blackout. The rest is measured by the target and the VMM (see [`crate::target`]).

mod machine;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use drover_points::{reach, seeded_bug};
use drover_proto::Fault;
use drover_proto::v1::MigrationOptions;

pub use machine::{Action, Config, Event, Machine, Sent};

use crate::bandwidth::Cap;
use crate::codec::{Batch, Frame, Hello, Message, Run, bad};
use crate::control::Control;
use crate::convergence::{Costs, Intent};
use crate::handshake::{self, VERSIONS};
use crate::transport::{Link, Stop, Stream};
use crate::vm::{PAGE_SIZE, PageSet, RegionEnds, SourceVm};

/// In the first round the VM is asked for holes again after so many pages.
const HOLE_STEP: u64 = 16;

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

/// Moves `vm` over the stream that `dial` makes. Blocks until the attempt has ended; the dirty log is off then.
pub fn run<S: Stream>(
    vm: &mut dyn SourceVm,
    dial: impl FnOnce() -> Result<S, Fault>,
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
    let link = match dial().and_then(|stream| Link::new(stream, params.link_timeout, control)) {
        Ok(link) => link,
        Err(fault) => return Outcome::FailedRunning(fault),
    };
    let mut driver = Driver {
        vm,
        link,
        control,
        regions: RegionEnds::new(&layout),
        total_pages,
        cap: config.intent.bandwidth.map(Cap::new),
        batch: Batch::default(),
        buffer: Vec::new(),
        origin: Instant::now(),
        logging: false,
        throttled: false,
    };
    let outcome = driver.drive(Machine::new(config));
    if driver.logging {
        driver.vm.stop_dirty_log();
    }
    if driver.throttled {
        driver.vm.throttle(0);
    }
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
            },
            total_pages,
            intent: Intent::of(&self.options),
            costs: costs.with_commit(self.options.commit_us),
            tracker: self.tracker.to_owned(),
            skip_final_pass: seeded_bug("no-final-dirty-pass"),
        }
    }
}

/// The shell around the machine: it does what it is told and says what came of it.
struct Driver<'a, S> {
    vm: &'a mut dyn SourceVm,
    link: Link<'a, S>,
    control: &'a Control,
    regions: RegionEnds,
    total_pages: u64,
    cap: Option<Cap>,
    batch: Batch,
    buffer: Vec<u8>,
    origin: Instant,
    logging: bool,
    throttled: bool,
}

impl<S: Stream> Driver<'_, S> {
    fn drive(&mut self, mut machine: Machine) -> Outcome {
        let mut actions = VecDeque::from(machine.handle(self.origin.elapsed(), Event::Connected));
        loop {
            let action = actions
                .pop_front()
                .expect("a machine's list ends with what brings the next event");
            if let Action::End(outcome) = action {
                return outcome;
            }
            if let Some(event) = self.perform(action) {
                actions = machine.handle(self.origin.elapsed(), event).into();
            }
        }
    }

    fn perform(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Reach(point) => reach(point),
            Action::Report(progress) => self.control.report(progress),
            Action::Throttle(percent) => {
                self.throttled = percent > 0;
                self.vm.throttle(percent);
            }
            Action::Send(message @ Message::Cancel(_)) => self.link.last_word(&message),
            Action::Send(message) => return self.link.send(&message).err().map(Event::from),
            _ if self.control.is_cancelled() => return Some(Event::Cancelled),
            Action::Receive => return Some(self.receive().unwrap_or_else(Event::from)),
            Action::SendBatch { round, runs, capped } => {
                return Some(
                    self.send_batch(round, &runs, capped)
                        .map_or_else(Event::from, Event::BatchSent),
                );
            }
            action => return Some(self.command(action).unwrap_or_else(Event::VmFailed)),
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
                let mut dirty = PageSet::empty(self.total_pages);
                self.vm.take_dirty(&mut dirty)?;
                Event::DirtyTaken(dirty)
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

    fn receive(&mut self) -> Result<Event, Stop> {
        match self.link.receive(&mut self.buffer)? {
            (Frame::Message(message), _) => Ok(Event::Received(message)),
            (frame, _) => Err(Stop::Failed(bad(format!("the target sent {:?}", frame.kind())))),
        }
    }

    fn send_batch(&mut self, round: u32, runs: &[Run], capped: bool) -> Result<Sent, Stop> {
        let Self {
            vm,
            link,
            batch,
            regions,
            cap,
            control,
            origin,
            ..
        } = self;
        batch.begin(round);
        for run in runs.iter().flat_map(|run| regions.split(*run)) {
            let mut rest = run;
            // Later rounds hold only pages that were written.
            while round == 1 && rest.count > 0 {
                let zeros = vm.zero_ahead(rest.first, rest.count).min(rest.count);
                batch.add_zeros(Run {
                    first: rest.first,
                    count: zeros,
                });
                rest = Run {
                    first: rest.first + zeros,
                    count: rest.count - zeros,
                };
                let part = Run {
                    first: rest.first,
                    count: rest.count.min(HOLE_STEP),
                };
                batch.add(part, |first, out| vm.read_pages(first, out));
                rest = Run {
                    first: part.end(),
                    count: rest.count - part.count,
                };
            }
            batch.add(rest, |first, out| vm.read_pages(first, out));
        }
        let mut sent = Sent {
            pages: batch.pages(),
            zero_pages: batch.zero_pages(),
            bytes: 0,
        };
        for content in [true, false] {
            let sequence = link.next_sequence();
            let frame = if content {
                batch.seal_pages(sequence)?
            } else {
                batch.seal_zeros(sequence)?
            };
            let Some(frame) = frame else { continue };
            if let Some(cap) = cap.as_mut().filter(|_| capped) {
                pause_for(cap.wait(origin.elapsed(), frame.len() as u64), control)?;
            }
            link.send_frame(frame)?;
            sent.bytes += frame.len() as u64;
        }
        Ok(sent)
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

/// Waits for the bandwidth's cap, with an eye on the cancel flag.
fn pause_for(wait: Duration, control: &Control) -> Result<(), Stop> {
    const GLANCE: Duration = Duration::from_millis(20);
    let until = Instant::now() + wait;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        if control.is_cancelled() {
            return Err(Stop::Cancelled);
        }
        std::thread::sleep(left.min(GLANCE));
    }
}
