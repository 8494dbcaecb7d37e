//! The streams that carry pages, each with a thread that reads, encodes and sends, so that these overlap with each other and with
//! what the engine's own thread does.
//!
//! ```text
//!  engine ──give(job)──▶ [ queue, two jobs a stream ] ──▶ worker 0 ──▶ stream 0
//!         ◀─sent so far─                              ──▶ worker 1 ──▶ stream 1
//!  engine ──end_round──▶ when the queue is empty each worker says StreamEnd on its stream ──▶ sent in all
//! ```
//!
//! Which stream a page travels on is chance: whoever is free takes the next job. That is safe because a page is in one job a round,
//! and no page of the next round is given out before the target has acknowledged this one. A worker whose stream fails says so
//! once; nobody works on after that. The streams are closed when the crew is dismissed and not before, so that the target hears
//! on the link why an attempt ends, and not from a broken stream that it does.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::thread::{Builder, Scope};
use std::time::{Duration, Instant};

use drover_proto::v1::{MigrationPhase, Progress};
use drover_proto::{Code, Fault};

use super::Sent;
use super::batches::{Job, Pace, Sender};
use super::encoder::Encoder;
use super::lanes::{Gauge, Lane, Lanes};
use crate::codec::{Message, StreamEnd};
use crate::control::Control;
use crate::transport::{SLICE, Stop, Stream};
use crate::vm::{RegionEnds, SourceVm};

/// Jobs that wait for a stream, so that it never waits for the engine. The engine is woken when half of them are left, not for each.
const QUEUED_PER_STREAM: usize = 4;
/// How the streams stand is told so often while the engine waits for all of them.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// The workers and what they share with the engine's thread.
pub(super) struct Crew<'a> {
    vm: &'a dyn SourceVm,
    regions: &'a RegionEnds,
    pace: &'a Pace,
    control: &'a Control,
    encoder: RwLock<Encoder>,
    lanes: &'a Lanes<'a>,
    shown: Mutex<Shown>,
    board: Mutex<Board>,
    /// For workers: there is something to do.
    work: Condvar,
    /// For the engine: there is room for more jobs, or something ended.
    done: Condvar,
}

#[derive(Default)]
struct Board {
    jobs: VecDeque<Job>,
    workers: usize,
    /// Workers that wait.
    idle: usize,
    /// The round that is being ended, and who has.
    ending: Option<StreamEnd>,
    ended: usize,
    sent: Sent,
    failed: Option<Stop>,
    dismissed: bool,
}

/// What was last told to whoever watches.
#[derive(Default)]
struct Shown {
    /// Only in pre-copy: once the VM is to be paused nothing is told but what the machine reports.
    progress: Option<Progress>,
    at: Option<Instant>,
    gauge: Gauge,
}

/// What a worker does next.
enum Task {
    Send(Job),
    End(StreamEnd),
    Leave,
}

impl<'a> Crew<'a> {
    pub fn new(
        vm: &'a dyn SourceVm,
        regions: &'a RegionEnds,
        pace: &'a Pace,
        control: &'a Control,
        lanes: &'a Lanes<'a>,
        encoder: Encoder,
    ) -> Self {
        Self {
            encoder: RwLock::new(encoder),
            vm,
            regions,
            pace,
            control,
            lanes,
            shown: Mutex::default(),
            board: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
        }
    }

    /// From now on pages are encoded by this one. No job is under way.
    pub fn encode_with(&self, encoder: Encoder) {
        *self.encoder.write().unwrap_or_else(PoisonError::into_inner) = encoder;
    }

    /// The first job of a round comes next, and none is under way.
    pub fn begin_round(&self, round: u32) {
        self.encoder().begin_round(round);
    }

    fn encoder(&self) -> RwLockReadGuard<'_, Encoder> {
        self.encoder.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The counters of a stream.
    pub fn lane(&self, stream: u32) -> &'a Lane<'a> {
        self.lanes.of(stream)
    }

    /// Tells whoever watches; in pre-copy with how each stream stands. For the engine's thread.
    pub fn report(&self, mut progress: Progress) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.progress = None;
        if progress.phase() == MigrationPhase::PreCopy {
            progress.by_stream = shown.gauge.read(self.lanes, progress.streams, self.lanes.now());
            let sent = progress.by_stream.iter().map(|stream| stream.bytes).sum();
            progress.bytes_sent = progress.bytes_sent.max(sent);
            (shown.progress, shown.at) = (Some(progress.clone()), Some(Instant::now()));
        }
        drop(shown);
        self.control.report(progress);
    }

    /// As long as the engine waits the machine reports nothing: then the streams' figures go on by themselves.
    fn report_again(&self) {
        let due = {
            let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
            let due = shown.at.is_some_and(|at| at.elapsed() >= TELL_EVERY);
            shown.progress.clone().filter(|_| due)
        };
        if let Some(progress) = due {
            self.report(progress);
        }
    }

    /// Sends a job on the caller's own stream.
    pub fn send_with<S: Stream>(&self, sender: &mut Sender<'_, S>, job: &Job) -> Result<Sent, Stop> {
        sender.send(
            job,
            self.vm,
            self.regions,
            &self.encoder(),
            self.pace,
            self.control,
        )
    }

    /// Puts a worker on the stream of `sender`.
    pub fn hire<'scope, 'env, S: Stream + 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        sender: Sender<'env, S>,
    ) -> Result<(), Fault>
    where
        'env: 'scope,
    {
        let worker = Builder::new().name("pages".to_owned());
        worker
            .spawn_scoped(scope, move || self.work(sender))
            .map_err(|error| Fault::new(Code::Internal, format!("no thread for a stream: {error}")))?;
        self.board().workers += 1;
        Ok(())
    }

    /// Gives a job to whoever is free first; gives what was sent since the last time.
    pub fn give(&self, job: Job) -> Result<Sent, Stop> {
        let mut board = self.board();
        while board.jobs.len() >= board.workers * QUEUED_PER_STREAM {
            board = self.wait(board)?;
        }
        self.check(&board)?;
        board.jobs.push_back(job);
        if board.idle > 0 {
            self.work.notify_one();
        }
        Ok(std::mem::take(&mut board.sent))
    }

    /// Waits until all jobs are done and every stream has said so; gives what was sent since the last time.
    pub fn end_round(&self, round: u32, last: bool) -> Result<Sent, Stop> {
        let mut board = self.board();
        (board.ending, board.ended) = (Some(StreamEnd { round, last }), 0);
        self.work.notify_all();
        while board.ended < board.workers {
            board = self.wait(board)?;
        }
        self.check(&board)?;
        board.ending = None;
        Ok(std::mem::take(&mut board.sent))
    }

    /// Sends the workers away.
    pub fn dismiss(&self) {
        self.board().dismissed = true;
        self.work.notify_all();
        self.done.notify_all();
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, board: &Board) -> Result<(), Stop> {
        if self.control.is_cancelled() || board.dismissed {
            return Err(Stop::Cancelled);
        }
        board.failed.clone().map_or(Ok(()), Err)
    }

    /// Waits for a change, for a slice of time at most.
    fn wait<'b>(&'b self, board: MutexGuard<'b, Board>) -> Result<MutexGuard<'b, Board>, Stop> {
        self.check(&board)?;
        let waited = self.done.wait_timeout(board, SLICE);
        let (board, slice) = waited.unwrap_or_else(PoisonError::into_inner);
        if !slice.timed_out() {
            return Ok(board);
        }
        drop(board);
        self.report_again();
        Ok(self.board())
    }

    fn work<S: Stream>(&self, mut sender: Sender<'_, S>) {
        let mut ended = 0;
        loop {
            let done = match self.next(ended, &sender) {
                Task::Send(job) => self.send_with(&mut sender, &job),
                Task::End(end) => {
                    ended = end.round;
                    sender
                        .link
                        .send(&Message::StreamEnd(end))
                        .map(|()| Sent::default())
                }
                Task::Leave => return,
            };
            let mut board = self.board();
            match done {
                Ok(sent) => {
                    board.sent.add(sent);
                    if board.ending.is_some_and(|end| end.round == ended) {
                        board.ended += 1;
                        self.done.notify_all();
                    }
                }
                Err(stop) => {
                    board.failed.get_or_insert(stop);
                    self.done.notify_all();
                }
            }
        }
    }

    /// Waits for something to do. `ended`: the round that this worker has ended last. As long as the kernel still sends what `sender`
    /// wrote, that is looked at: it is what the link, on which the engine waits, may be silent for.
    fn next<S: Stream>(&self, ended: u32, sender: &Sender<'_, S>) -> Task {
        let mut unacknowledged = None;
        let mut board = self.board();
        loop {
            if board.dismissed {
                return Task::Leave;
            }
            if board.failed.is_none() {
                if let Some(job) = board.jobs.pop_front() {
                    if board.jobs.len() == board.workers * QUEUED_PER_STREAM / 2 {
                        self.done.notify_all();
                    }
                    return Task::Send(job);
                }
                if let Some(end) = board.ending.filter(|end| end.round != ended) {
                    return Task::End(end);
                }
            }
            let on_its_way = sender.is_on_its_way(&mut unacknowledged);
            let patience = if on_its_way { SLICE } else { IDLE };
            board.idle += 1;
            let waited = self.work.wait_timeout(board, patience);
            board = waited.unwrap_or_else(PoisonError::into_inner).0;
            board.idle -= 1;
        }
    }
}

/// An idle worker is woken by whoever has work; the bound is for nobody's sake but a reader's.
const IDLE: Duration = Duration::from_secs(1);
