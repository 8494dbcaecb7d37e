//! One batch of pages on its way: read from the VM, made into frames, written to a stream, no faster than the cap allows.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Sent;
use super::encoder::Encoder;
use super::lanes::Lane;
use crate::bandwidth::Cap;
use crate::codec::{Batch, Run};
use crate::control::Control;
use crate::encode::choice::Done;
use crate::encode::compress::Packer;
use crate::transport::{Link, Stop, Stream};
use crate::vm::{RegionEnds, SourceVm};

/// In the first round the VM is asked for holes again after so many pages; in later ones it is asked once, and only of so many at once.
const HOLE_STEP: u64 = 16;

/// Pages to be sent.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub round: u32,
    pub runs: Vec<Run>,
    pub capped: bool,
    /// Pages go as they are: somebody may wait for them, and what a delta would be against is gone.
    pub plain: bool,
    /// All of them are known to be zero: none is read, and there may be any number.
    pub hole: bool,
}

/// The bandwidth's cap, which all streams share.
#[derive(Debug)]
pub(super) struct Pace {
    cap: Option<Mutex<Cap>>,
    origin: Instant,
}

impl Pace {
    /// `rate`: bytes a second, if there is a cap.
    pub fn new(rate: Option<u64>, origin: Instant) -> Self {
        Self {
            cap: rate.map(|rate| Mutex::new(Cap::new(rate))),
            origin,
        }
    }

    /// Waits until `bytes` may be sent, with an eye on the cancel flag.
    fn keep(&self, bytes: usize, control: &Control) -> Result<(), Stop> {
        const GLANCE: Duration = Duration::from_millis(20);
        let Some(cap) = &self.cap else { return Ok(()) };
        let wait = cap
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .wait(self.origin.elapsed(), bytes as u64);
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
}

/// One stream and the buffer for what goes out on it.
pub(super) struct Sender<'c, S> {
    pub link: Link<'c, S>,
    lane: &'c Lane<'c>,
    batch: Batch,
    packer: Packer,
    /// Pages may go without a checksum.
    guarded: bool,
}

impl<'c, S: Stream> Sender<'c, S> {
    /// For the link, where a peer of version 1 reads too.
    pub fn on_link(link: Link<'c, S>, lane: &'c Lane<'c>) -> Self {
        Self {
            link,
            lane,
            batch: Batch::default(),
            packer: Packer::default(),
            guarded: false,
        }
    }

    /// For a stream.
    pub fn on_stream(link: Link<'c, S>, lane: &'c Lane<'c>) -> Self {
        Self {
            guarded: link.is_guarded(),
            link,
            lane,
            batch: Batch::default(),
            packer: Packer::default(),
        }
    }

    /// Whether the kernel still sends what was written; `before`: as [`Link::unacknowledged`] has it. Should that stand still, the stream is stalled.
    pub fn is_on_its_way(&self, before: &mut Option<u64>) -> bool {
        let some = self.link.unacknowledged(before).0 > 0;
        self.lane.kernel_holds(some);
        some
    }

    /// Sends the pages of `job`.
    pub fn send(
        &mut self,
        job: &Job,
        vm: &dyn SourceVm,
        regions: &RegionEnds,
        encoder: &Encoder,
        pace: &Pace,
        control: &Control,
    ) -> Result<Sent, Stop> {
        let Self {
            link,
            lane,
            batch,
            packer,
            guarded,
        } = self;
        lane.take_on(job.runs.iter().map(|run| run.count).sum());
        batch.begin(job.round);
        for run in job.runs.iter().flat_map(|run| regions.split(*run)) {
            if job.hole {
                batch.add_zeros(run);
                continue;
            }
            // Later rounds hold only pages that were written; but many together may be memory that the guest has given up since, and to read
            // that would take memory for it again.
            if job.round == 1 {
                add_with_holes(batch, run, HOLE_STEP, vm);
            } else if run.count >= HOLE_STEP {
                add_with_holes(batch, run, run.count, vm);
            } else {
                batch.add(run, |first, out| vm.read_pages(first, out));
            }
        }
        let mut done = if job.plain {
            Done::default()
        } else {
            encoder.encode(batch, packer)?
        };
        let mut sent = Sent {
            pages: batch.pages(),
            zero_pages: batch.zero_pages(),
            bytes: 0,
        };
        for part in Part::ALL {
            let sequence = link.next_sequence();
            let pages = match part {
                Part::Deltas => batch.delta_pages(),
                Part::Packed | Part::Plain => sent.pages - batch.delta_pages(),
                Part::Zeros => sent.zero_pages,
            };
            let frame = match part {
                Part::Deltas => batch.seal_deltas(sequence)?,
                Part::Packed => batch.seal_packed(sequence)?,
                Part::Plain if *guarded => batch.seal_guarded_pages(sequence)?,
                Part::Plain => batch.seal_pages(sequence)?,
                Part::Zeros => batch.seal_zeros(sequence)?,
            };
            let Some(frame) = frame else { continue };
            let began = Instant::now();
            if job.capped {
                pace.keep(frame.len(), control)?;
            }
            lane.begin_frame();
            link.send_frame(frame)?;
            let bytes = frame.len() as u64;
            lane.end_frame(bytes, pages);
            sent.bytes += bytes;
            done.sending += began.elapsed();
        }
        done.wire = sent.bytes;
        if !job.plain {
            encoder.done(&done);
        }
        Ok(sent)
    }
}

/// What a batch may become.
#[derive(Clone, Copy)]
enum Part {
    Deltas,
    Packed,
    Plain,
    Zeros,
}

impl Part {
    const ALL: [Self; 4] = [Self::Deltas, Self::Packed, Self::Plain, Self::Zeros];
}

/// Adds pages of which some may hold nothing: those are not read. The VM is asked again after `step` pages that hold something.
fn add_with_holes(batch: &mut Batch, run: Run, step: u64, vm: &dyn SourceVm) {
    let mut rest = run;
    while rest.count > 0 {
        let zeros = vm.zero_ahead(rest.first, rest.count).min(rest.count);
        batch.add_zeros(Run {
            first: rest.first,
            count: zeros,
        });
        let part = Run {
            first: rest.first + zeros,
            count: (rest.count - zeros).min(step),
        };
        batch.add(part, |first, out| vm.read_pages(first, out));
        rest = Run {
            first: part.end(),
            count: rest.count - zeros - part.count,
        };
    }
}
