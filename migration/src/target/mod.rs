//! The target's side: [`Machine`] is the protocol, [`run`] drives it over a stream and a VM.
//!
//! Who measures what of the blackout (`Receipt.blackout_us`), each by the monotonic clock of its own host:
//!
//! | part | from | until | by |
//! | --- | --- | --- | --- |
//! | `pause` | the call that stops the vCPUs | none executes | source |
//! | `last_pages` | none executes | the target's acknowledgement of the final set came | source |
//! | `state` | the final set was complete at the target | the state is restored: Ready | target |
//! | `commit` | Ready | the grant for the new epoch came | the target's VMM |
//! | `resume` | that grant | the vCPUs run | the target's VMM |
//!
//! `last_pages` and `state` overlap by the acknowledgement's way back, so the sum may be too large by that one latency and
//! is never too small.

mod machine;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use drover_points::reach;
use drover_proto::Fault;
use drover_proto::v1::{Blackout, Receipt};

pub use machine::{Action, Done, Event, Machine, ROUNDS_ACCEPTED_MAX};

use crate::codec::Message;
use crate::control::Control;
use crate::handshake::{Expected, VERSIONS};
use crate::transport::{Link, Stop, Stream};
use crate::vm::{PAGE_SIZE, RegionEnds, TargetVm};

/// What the target was started for; a source that says otherwise is refused.
#[derive(Clone, Debug)]
pub struct Params {
    /// The migration's id.
    pub migration: String,
    /// The VM's name.
    pub vm: String,
    /// The source's host.
    pub from_host: String,
    /// The epoch that this VMM was started for.
    pub epoch: u64,
    /// The highest version of the save-state that `TargetVm::restore` reads.
    pub device_model: u32,
    /// The VM's CPU profile by name.
    pub cpu_profile: String,
    /// A link that moves no byte for so long counts as lost. Normally [`crate::transport::LINK_TIMEOUT`].
    pub link_timeout: Duration,
}

/// Everything was received, verified and restored, and Ready was said.
#[derive(Clone, Debug)]
pub struct Received {
    /// The receipt so far: the blackout's `commit`, `resume`, `total` and `total_ms` are still to come.
    pub receipt: Receipt,
    /// When everything was restored: `commit` counts from here.
    pub ready_at: Instant,
    /// From the source's connect until it began to pause.
    pub before_blackout: Duration,
}

impl Received {
    /// The whole receipt. `granted_at`: when the grant for the new epoch came in; `running_at`: when the vCPUs ran.
    pub fn finish(self, granted_at: Instant, running_at: Instant) -> Receipt {
        let mut receipt = self.receipt;
        let blackout = receipt.blackout_us.get_or_insert_with(Blackout::default);
        blackout.commit = micros(granted_at.saturating_duration_since(self.ready_at));
        blackout.resume = micros(running_at.saturating_duration_since(granted_at));
        blackout.total = [
            blackout.pause,
            blackout.last_pages,
            blackout.state,
            blackout.commit,
            blackout.resume,
        ]
        .into_iter()
        .fold(0, u64::saturating_add);
        receipt.total_ms = micros(self.before_blackout).saturating_add(blackout.total) / 1000;
        receipt
    }
}

/// Receives a VM from the source at the other end of `stream`. Blocks until Ready was said or the attempt has failed.
/// The guest must not run before its grant, whatever this returns.
pub fn run<S: Stream>(
    vm: &mut dyn TargetVm,
    stream: S,
    params: &Params,
    control: &Control,
) -> Result<Received, Fault> {
    let layout = vm.layout();
    let regions = RegionEnds::new(&layout);
    let machine = Machine::new(Expected {
        versions: VERSIONS,
        migration: params.migration.clone(),
        vm: params.vm.clone(),
        from_host: params.from_host.clone(),
        epoch: params.epoch,
        layout,
        device_model: params.device_model,
        cpu_profile: params.cpu_profile.clone(),
    })?;
    let mut driver = Driver {
        vm,
        link: Link::new(stream, params.link_timeout, control)?,
        control,
        regions,
        origin: Instant::now(),
        refused: false,
    };
    let result = driver.drive(machine);
    if driver.refused {
        driver.link.drain();
    }
    match result {
        Ok(done) => {
            tracing::info!(
                migration = params.migration,
                "everything is verified and restored"
            );
            let ready_at = driver.origin + done.ready_at;
            Ok(Received {
                receipt: done.receipt,
                ready_at,
                before_blackout: done.before_blackout,
            })
        }
        Err(fault) => {
            tracing::warn!(migration = params.migration, %fault, "the incoming migration failed");
            Err(fault)
        }
    }
}

/// The shell around the machine: it does what it is told and says what came of it.
struct Driver<'a, S> {
    vm: &'a mut dyn TargetVm,
    link: Link<'a, S>,
    control: &'a Control,
    regions: RegionEnds,
    origin: Instant,
    refused: bool,
}

impl<S: Stream> Driver<'_, S> {
    fn drive(&mut self, mut machine: Machine) -> Result<Done, Fault> {
        let mut buffer = Vec::new();
        loop {
            let event = match self.link.receive(&mut buffer) {
                Ok((frame, bytes)) => Event::Received(frame, bytes),
                Err(Stop::Cancelled) => Event::Cancelled,
                Err(Stop::Failed(fault)) => Event::LinkFailed(fault),
            };
            let mut actions = VecDeque::from(machine.handle(self.origin.elapsed(), event));
            while let Some(action) = actions.pop_front() {
                if let Action::End(result) = action {
                    return result;
                }
                if let Some(event) = self.perform(action) {
                    actions = machine.handle(self.origin.elapsed(), event).into();
                }
            }
        }
    }

    fn perform(&mut self, action: Action<'_>) -> Option<Event<'static>> {
        let Self {
            vm, link, regions, ..
        } = self;
        let done = match action {
            Action::Reach(point) => {
                reach(point);
                Ok(())
            }
            Action::Report(progress) => {
                self.control.report(progress);
                Ok(())
            }
            Action::Send(message @ Message::Refusal(_)) => {
                link.last_word(&message);
                self.refused = true;
                Ok(())
            }
            Action::Send(message) => {
                return match link.send(&message) {
                    Ok(()) => None,
                    Err(Stop::Cancelled) => Some(Event::Cancelled),
                    Err(Stop::Failed(fault)) => Some(Event::LinkFailed(fault)),
                };
            }
            Action::Write { runs, mut data } => {
                runs.iter()
                    .flat_map(|run| regions.split(run))
                    .try_for_each(|run| {
                        let bytes =
                            usize::try_from(run.count).expect("a frame's data fits memory") * PAGE_SIZE;
                        let (part, rest) = data.split_at(bytes);
                        data = rest;
                        vm.write_pages(run.first, part)
                    })
            }
            Action::Zero { runs } => runs
                .iter()
                .flat_map(|run| regions.split(run))
                .try_for_each(|run| vm.zero_pages(run.first, run.count)),
            Action::Restore(state) => match vm.restore(&state) {
                Ok(()) => return Some(Event::Restored),
                Err(fault) => Err(fault),
            },
            Action::End(_) => Ok(()),
        };
        done.err().map(Event::VmFailed)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
