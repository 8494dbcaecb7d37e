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
mod post_copy;
mod streams;

use std::collections::VecDeque;
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use drover_points::reach;
use drover_proto::v1::Receipt;
use drover_proto::{Code, Fault};

pub use machine::{Action, Admission, Done, Event, Machine, ROUNDS_ACCEPTED_MAX};
use streams::{Desk, LinkWatch, Streams};

use crate::codec::{Frame, Message};
use crate::control::Control;
use crate::handshake::{Expected, TOKEN_BYTES, VERSIONS};
use crate::post_copy::OnFault;
use crate::transport::{Link, Stop, Stream};
use crate::vm::{PageSet, RegionEnds, TargetVm};

/// How long the target listens for the source's cancel when a stream was closed.
const CANCEL_WAIT: Duration = Duration::from_millis(500);

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
    /// Whether pages may come unencrypted, if the source wants that too.
    pub plaintext: bool,
    /// Whether the memory itself is handed over, on one host.
    pub local: bool,
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
        let mut blackout = receipt.blackout_us.unwrap_or_default();
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
        receipt.blackout_us = Some(blackout);
        if let Some(post_copy) = &mut receipt.post_copy {
            // So far from Ready on.
            post_copy.duration_us = post_copy
                .duration_us
                .saturating_sub(blackout.commit.saturating_add(blackout.resume));
        }
        receipt.total_ms = micros(self.before_blackout).saturating_add(blackout.total) / 1000;
        receipt
    }
}

/// Receives a VM from the source at the other end of `stream`. Blocks until Ready was said or the attempt has failed.
/// `admit` waits for the streams that carry the pages, if there are to be any, and gives them in their order; what they showed was
/// read off them. The guest must not run before its grant, whatever this returns.
pub fn run<S: Stream>(
    vm: &dyn TargetVm,
    stream: S,
    admit: impl FnOnce(&Admission) -> Result<Vec<S>, Fault>,
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
        plaintext: params.plaintext,
        local: params.local,
        token: token()?,
        post_copy: vm.post_copy().map(drop),
    })?;
    let origin = Instant::now();
    let streams = Streams::new(vm, &regions, machine, control, origin, params.link_timeout);
    let watch = LinkWatch(&streams);
    let result = thread::scope(|scope| {
        let mut driver = Driver {
            link: Link::new(stream, params.link_timeout, &watch)?,
            control,
            scope,
            streams: &streams,
            admit: Some(admit),
            desk: Desk::default(),
            refused: false,
            lacks: false,
            link_timeout: params.link_timeout,
        };
        let result = driver.drive();
        streams.end_post_copy(result.as_ref());
        streams.close();
        if driver.refused {
            driver.link.drain();
        }
        result
    });
    match result {
        Ok(done) => Ok(done.received(origin)),
        Err(fault) => {
            tracing::warn!(migration = params.migration, %fault, "the incoming migration failed");
            Err(fault)
        }
    }
}

impl Done {
    fn received(self, origin: Instant) -> Received {
        Received {
            receipt: self.receipt,
            ready_at: origin + self.ready_at,
            before_blackout: self.before_blackout,
        }
    }
}

fn token() -> Result<[u8; TOKEN_BYTES], Fault> {
    let mut token = [0; TOKEN_BYTES];
    let random = rustls::crypto::ring::default_provider().secure_random;
    let filled = random.fill(&mut token);
    filled.map_err(|_| Fault::new(Code::Internal, "the system has no random numbers"))?;
    Ok(token)
}

/// The shell around the machine: it does what it is told and says what came of it.
struct Driver<'scope, 'env, S, A> {
    link: Link<'env, S>,
    control: &'env Control,
    scope: &'scope Scope<'scope, 'env>,
    streams: &'env Streams<'env>,
    admit: Option<A>,
    desk: Desk,
    refused: bool,
    /// A post-copy has begun: from now on this side speaks first.
    lacks: bool,
    link_timeout: Duration,
}

impl<'env, S, A> Driver<'_, 'env, S, A>
where
    S: Stream + 'env,
    A: FnOnce(&Admission) -> Result<Vec<S>, Fault>,
{
    fn drive(&mut self) -> Result<Done, Fault> {
        let mut buffer = Vec::new();
        loop {
            if self.lacks {
                return self.fill();
            }
            let event = match self.link.receive(&mut buffer) {
                Ok((frame, bytes)) => match self.complete(&frame) {
                    Ok(()) => Event::Received(frame, bytes),
                    Err(stop) => self.stopped(stop),
                },
                Err(stop) => self.stopped(stop),
            };
            let actions = self.streams.handle(event);
            if let Some(result) = self.carry_out(actions) {
                return result;
            }
        }
    }

    /// Does all of a list, or what comes in its stead; gives the end, if that is what it came to.
    fn carry_out(&mut self, actions: Vec<Action<'_>>) -> Option<Result<Done, Fault>> {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            if let Action::End(result) = action {
                return Some(result);
            }
            if let Some(event) = self.perform(action) {
                actions = self.streams.handle(event).into();
            }
        }
        None
    }

    /// Before a round's end is told the machine, all its pages are written.
    fn complete(&self, frame: &Frame<'_>) -> Result<(), Stop> {
        match frame {
            Frame::Message(Message::RoundEnd(_)) => self.streams.wait_for_all(),
            _ => Ok(()),
        }
    }

    /// The link or a stream came to an end. A source that gives up says so on the link, while its streams just close.
    fn stopped(&mut self, stop: Stop) -> Event<'static> {
        match stop {
            Stop::Cancelled => Event::Cancelled,
            Stop::Failed(fault) if self.streams.caused(&fault) => {
                match self.link.hear_last_word(CANCEL_WAIT) {
                    Some(message @ Message::Cancel(_)) => Event::Received(Frame::Message(message), 0),
                    _ => Event::LinkFailed(fault),
                }
            }
            Stop::Failed(fault) => Event::LinkFailed(fault),
        }
    }

    fn perform<'a>(&mut self, action: Action<'a>) -> Option<Event<'a>> {
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
                self.link.last_word(&message);
                self.refused = true;
                Ok(())
            }
            // Whether it is heard or not, nothing is missing any more.
            Action::Send(message @ Message::Complete(_)) => {
                self.link.last_word(&message);
                Ok(())
            }
            Action::Send(message) => {
                return match self.link.send(&message) {
                    Ok(()) => None,
                    Err(stop) => Some(self.stopped(stop)),
                };
            }
            Action::Admit(admission) => {
                return match self.admit(&admission) {
                    Ok(()) => None,
                    Err(fault) if fault.code == Code::Cancelled => Some(Event::Cancelled),
                    Err(fault) => Some(Event::LinkFailed(fault)),
                };
            }
            Action::Arm(missing) => {
                return Some(self.arm(&missing).map_or_else(Event::VmFailed, |()| Event::Armed));
            }
            Action::Place { runs, data } => {
                let placed = self.streams.place(runs, Some(data));
                return Some(placed.map_or_else(Event::VmFailed, |()| Event::Placed(runs)));
            }
            Action::PlaceZeros { runs } => {
                let placed = self.streams.place(runs, None);
                return Some(placed.map_or_else(Event::VmFailed, |()| Event::Placed(runs)));
            }
            Action::Stand(done) => {
                let stands = self.streams.stand(done);
                return Some(stands.map_or_else(Event::VmFailed, |()| Event::Stood));
            }
            Action::Restore(state) if self.lacks_soon() => self.restore_aside(state),
            Action::Write { runs, data } => self.streams.write(runs, data),
            Action::Unpack(packed) => self.streams.unpack(&packed, &mut self.desk),
            Action::Patch(deltas) => self.streams.patch(&deltas),
            Action::Zero { runs } => self.streams.zero(runs),
            Action::AdoptMemory => match self.streams.vm().adopt_memory() {
                Ok(()) => return Some(Event::MemoryAdopted),
                Err(fault) => Err(fault),
            },
            Action::Restore(state) => match self.streams.vm().restore(&state) {
                Ok(()) => return Some(Event::Restored),
                Err(fault) => Err(fault),
            },
            Action::End(_) => Ok(()),
        };
        done.err().map(Event::VmFailed)
    }

    fn admit(&mut self, admission: &Admission) -> Result<(), Fault> {
        let admit = self.admit.take();
        let admit = admit.ok_or_else(|| Fault::new(Code::Internal, "streams were admitted before"))?;
        (0..)
            .zip(admit(admission)?)
            .try_for_each(|(index, stream)| self.streams.serve(self.scope, index, stream))
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
