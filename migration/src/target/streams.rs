//! The streams on which pages come, each with a thread that reads, decodes and writes to the VM's memory.
//!
//! They share the machine, which judges every frame, with the engine's own thread, which has the link. The lock is held for the
//! judgement only: reading and writing overlap. A thread writes what it was told before it reads on, so when it tells the machine
//! that its stream's part of a round is over, those pages are in memory.
//!
//! A stream may be silent between its frames for as long as the link lives; inside a frame it may not. What fails on a stream is
//! kept for the engine's thread, which finds it wherever it waits.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, Scope};
use std::time::{Duration, Instant};

use drover_proto::{Code, Fault};

use super::machine::{Action, Event, Machine};
use crate::codec::{Deltas, Frame, Message, Packed, Runs, StreamEnd};
use crate::control::Control;
use crate::encode::compress::Unpacker;
use crate::encode::delta;
use crate::transport::{Link, SLICE, Stop, Stream, Watch};
use crate::vm::{PAGE_SIZE, RegionEnds, TargetVm};

/// What compressed pages are unpacked with, and to: one for each stream.
#[derive(Default)]
pub(super) struct Desk {
    unpacker: Unpacker,
    content: Vec<u8>,
}

/// What the threads share.
pub(super) struct Streams<'a> {
    vm: &'a dyn TargetVm,
    pub(super) regions: &'a RegionEnds,
    machine: Mutex<Machine>,
    /// A stream has ended its part of the round, or failed. In a post-copy: somebody waits for a page, or one came.
    pub(super) changed: Condvar,
    control: &'a Control,
    pub(super) origin: Instant,
    timeout: Duration,
    moved: AtomicU64,
    closed: AtomicBool,
    failed: Mutex<Option<Fault>>,
    /// What came of a restore that was done beside the link's thread.
    pub(super) restored: Mutex<Option<Result<(), Fault>>>,
}

impl<'a> Streams<'a> {
    pub fn new(
        vm: &'a dyn TargetVm,
        regions: &'a RegionEnds,
        machine: Machine,
        control: &'a Control,
        origin: Instant,
        timeout: Duration,
    ) -> Self {
        Self {
            vm,
            regions,
            machine: Mutex::new(machine),
            changed: Condvar::new(),
            control,
            origin,
            timeout,
            moved: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            failed: Mutex::default(),
            restored: Mutex::default(),
        }
    }

    pub fn vm(&self) -> &dyn TargetVm {
        self.vm
    }

    /// Tells the machine.
    pub fn handle<'f>(&self, event: Event<'f>) -> Vec<Action<'f>> {
        self.machine().handle(self.origin.elapsed(), event)
    }

    /// Puts a thread on a stream.
    pub fn serve<'scope, 'env, S: Stream + 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        index: u32,
        stream: S,
    ) -> Result<(), Fault>
    where
        'env: 'scope,
    {
        let reader = Builder::new().name("pages".to_owned());
        reader
            .spawn_scoped(scope, move || match self.read(index, stream) {
                Ok(()) | Err(Stop::Cancelled) => {}
                Err(Stop::Failed(fault)) => self.fail(fault),
            })
            .map_err(|error| Fault::new(Code::Internal, format!("no thread for a stream: {error}")))?;
        Ok(())
    }

    /// Ends the threads.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Waits until every stream has ended its part of the round.
    pub fn wait_for_all(&self) -> Result<(), Stop> {
        let (mut moved, mut moved_at) = (self.moved.load(Ordering::Relaxed), Instant::now());
        let mut machine = self.machine();
        while !machine.streams_have_ended() {
            if let Some(stop) = self.stop() {
                return Err(stop);
            }
            let now = self.moved.load(Ordering::Relaxed);
            if now != moved {
                (moved, moved_at) = (now, Instant::now());
            } else if moved_at.elapsed() >= self.timeout {
                let message = format!(
                    "a round has ended, but not on every stream, and none has moved a byte for {} ms",
                    self.timeout.as_millis()
                );
                return Err(Fault::new(Code::LinkLost, message).into());
            }
            let waited = self.changed.wait_timeout(machine, SLICE);
            machine = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Whether this is what failed on a stream. From then on the link may be read in peace.
    pub fn caused(&self, fault: &Fault) -> bool {
        self.failed().as_ref() == Some(fault)
    }

    /// Writes pages that a frame brought.
    pub fn write(&self, runs: Runs<'_>, data: &[u8]) -> Result<(), Fault> {
        let mut rest = data;
        runs.iter()
            .flat_map(|run| self.regions.split(run))
            .try_for_each(|run| {
                let bytes = usize::try_from(run.count).expect("a frame's data fits memory") * PAGE_SIZE;
                let (part, after) = rest.split_at(bytes);
                rest = after;
                self.vm.write_pages(run.first, part)
            })
    }

    /// Writes pages that a frame brought compressed.
    pub fn unpack(&self, packed: &Packed<'_>, desk: &mut Desk) -> Result<(), Fault> {
        desk.content.resize(packed.content_bytes(), 0);
        desk.unpacker
            .unpack(packed.method, packed.data, &mut desk.content)?;
        self.write(packed.runs, &desk.content)
    }

    /// Changes pages that a frame brought deltas for.
    pub fn patch(&self, deltas: &Deltas<'_>) -> Result<(), Fault> {
        let mut content = [0; PAGE_SIZE];
        deltas.iter().try_for_each(|(page, delta, crc)| {
            self.vm.read_back(page, &mut content)?;
            delta::patch(&mut content, delta, crc)?;
            self.vm.write_pages(page, &content)
        })
    }

    /// Makes pages zero that a frame named.
    pub fn zero(&self, runs: Runs<'_>) -> Result<(), Fault> {
        runs.iter()
            .flat_map(|run| self.regions.split(run))
            .try_for_each(|run| self.vm.zero_pages(run.first, run.count))
    }

    fn read<S: Stream>(&self, index: u32, stream: S) -> Result<(), Stop> {
        let watch = StreamWatch(self);
        let mut link = Link::new(stream, self.timeout, &watch)?;
        let (mut buffer, mut desk) = (Vec::new(), Desk::default());
        loop {
            let (frame, bytes) = match link.receive_in_time(&mut buffer) {
                Ok(received) => received,
                Err(Stop::Failed(fault)) if self.machine().bears_broken_stream(index) => {
                    tracing::info!(index, %fault, "a stream is gone: what it lacks comes over the link");
                    self.changed.notify_all();
                    return Ok(());
                }
                Err(stop) => return Err(stop),
            };
            let ended = match &frame {
                Frame::Message(Message::StreamEnd(end)) => Some(*end),
                _ => None,
            };
            let actions = self
                .machine()
                .stream(self.origin.elapsed(), index, frame, bytes)?;
            for action in actions {
                match action {
                    Action::Write { runs, data } => self.write(runs, data)?,
                    Action::Unpack(packed) => self.unpack(&packed, &mut desk)?,
                    Action::Patch(deltas) => self.patch(&deltas)?,
                    Action::Zero { runs } => self.zero(runs)?,
                    Action::Place { runs, data } => self.placed(runs, Some(data))?,
                    Action::PlaceZeros { runs } => self.placed(runs, None)?,
                    Action::Report(progress) => self.control.report(progress),
                    _ => {}
                }
            }
            if let Some(StreamEnd { last, .. }) = ended {
                self.changed.notify_all();
                if last {
                    return Ok(());
                }
            }
            if let Some(stop) = watch.stop() {
                return Err(stop);
            }
        }
    }

    /// Places pages and says so.
    fn placed(&self, runs: Runs<'_>, data: Option<&[u8]>) -> Result<(), Fault> {
        self.place(runs, data)?;
        for action in self.handle(Event::Placed(runs)) {
            if let Action::Report(progress) = action {
                self.control.report(progress);
            }
        }
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn fail(&self, fault: Fault) {
        self.failed().get_or_insert(fault);
        self.changed.notify_all();
    }

    pub(super) fn stop(&self) -> Option<Stop> {
        let cancelled = self.control.is_cancelled().then_some(Stop::Cancelled);
        cancelled.or_else(|| self.failed().clone().map(Stop::Failed))
    }

    pub(super) fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self) -> MutexGuard<'_, Option<Fault>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a stream waits.
struct StreamWatch<'s, 'a>(&'s Streams<'a>);

impl Watch for StreamWatch<'_, '_> {
    fn stop(&self) -> Option<Stop> {
        let over = self.0.closed.load(Ordering::Acquire) || self.0.control.is_cancelled();
        over.then_some(Stop::Cancelled)
    }

    fn moved(&self) {
        self.0.moved.fetch_add(1, Ordering::Relaxed);
    }
}

/// How the link waits: it may be silent as long as a stream moves.
pub(super) struct LinkWatch<'s, 'a>(pub &'s Streams<'a>);

impl Watch for LinkWatch<'_, '_> {
    fn stop(&self) -> Option<Stop> {
        self.0.stop()
    }

    fn moved_elsewhere(&self) -> u64 {
        self.0.moved.load(Ordering::Relaxed)
    }
}
