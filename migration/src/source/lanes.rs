//! What each stream carries, for whoever watches. The streams' threads only count, without a lock; the engine's thread looks some
//! times a second, and no more once the VM is to be paused.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use drover_proto::v1::StreamProgress;

use crate::bandwidth::rate;
use crate::control::Control;
use crate::handshake::STREAMS_MAX;
use crate::transport::{Stop, Watch};

/// A rate is that of the last whole span of this length, or of the time so far.
const RATE_SPAN: Duration = Duration::from_secs(1);
/// A stream that is silent for less is not called stalled.
const STALLED_AFTER: Duration = Duration::from_secs(1);

/// One stream's counters. It watches the stream's link, so it sees bytes move inside a frame.
#[derive(Debug)]
pub(super) struct Lane<'c> {
    control: &'c Control,
    origin: Instant,
    bytes: AtomicU64,
    pages_queued: AtomicU64,
    writing: AtomicBool,
    /// Milliseconds since `origin` when a byte moved last, or a frame was begun.
    moved_ms: AtomicU64,
    /// Grows with each look that found bytes moved.
    moves: AtomicU64,
}

impl<'c> Lane<'c> {
    fn new(control: &'c Control, origin: Instant) -> Self {
        Self {
            control,
            origin,
            bytes: AtomicU64::new(0),
            pages_queued: AtomicU64::new(0),
            writing: AtomicBool::new(false),
            moved_ms: AtomicU64::new(0),
            moves: AtomicU64::new(0),
        }
    }

    /// The stream takes on `pages`.
    pub fn take_on(&self, pages: u64) {
        self.pages_queued.store(pages, Ordering::Relaxed);
    }

    /// A frame is about to be written.
    pub fn begin_frame(&self) {
        self.moved();
        self.writing.store(true, Ordering::Relaxed);
    }

    /// The frame of `bytes` bytes went out, with `pages` of those taken on.
    pub fn end_frame(&self, bytes: u64, pages: u64) {
        self.writing.store(false, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        // Only the stream's own thread changes it.
        let queued = self.pages_queued.load(Ordering::Relaxed);
        self.pages_queued
            .store(queued.saturating_sub(pages), Ordering::Relaxed);
    }

    /// What the kernel still holds of the frames that went out is as if it were not: it is for the peer to take it.
    pub fn kernel_holds(&self, some: bool) {
        self.writing.store(some, Ordering::Relaxed);
    }

    fn stalled(&self, now: Duration) -> Duration {
        if !self.writing.load(Ordering::Relaxed) {
            return Duration::ZERO;
        }
        let moved = Duration::from_millis(self.moved_ms.load(Ordering::Relaxed));
        let silent = now.saturating_sub(moved);
        if silent < STALLED_AFTER {
            Duration::ZERO
        } else {
            silent
        }
    }
}

impl Watch for Lane<'_> {
    fn stop(&self) -> Option<Stop> {
        self.control.stop()
    }

    fn moved(&self) {
        self.moved_ms
            .store(millis(self.origin.elapsed()), Ordering::Relaxed);
        self.moves.fetch_add(1, Ordering::Relaxed);
    }
}

/// How the link waits: it may be silent as long as a stream moves, if only in the kernel.
impl Watch for Lanes<'_> {
    fn stop(&self) -> Option<Stop> {
        self.control.stop()
    }

    fn moved_elsewhere(&self) -> u64 {
        let moves = self.lanes.iter().map(|lane| lane.moves.load(Ordering::Relaxed));
        moves.fold(0, u64::wrapping_add)
    }
}

/// All lanes that an attempt may use.
#[derive(Debug)]
pub(super) struct Lanes<'c> {
    control: &'c Control,
    origin: Instant,
    lanes: Vec<Lane<'c>>,
}

impl<'c> Lanes<'c> {
    /// For an attempt that began at `origin`.
    pub fn new(control: &'c Control, origin: Instant) -> Self {
        Self {
            control,
            origin,
            lanes: (0..STREAMS_MAX).map(|_| Lane::new(control, origin)).collect(),
        }
    }

    /// Since the attempt began.
    pub fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// The lane of a stream, or of the link where that carries the pages (0). `stream`: below [`STREAMS_MAX`], which the
    /// handshake sees to.
    pub fn of(&self, stream: u32) -> &Lane<'c> {
        &self.lanes[stream as usize % self.lanes.len()]
    }
}

/// Makes rates of the lanes' counters.
#[derive(Debug, Default)]
pub(super) struct Gauge {
    spans: Vec<Span>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Span {
    began: Duration,
    bytes: u64,
    /// Of the span before.
    rate: Option<u64>,
}

impl Gauge {
    /// How the first `count` streams stand. `now`: since the lanes' origin; it never goes back.
    pub fn read(&mut self, lanes: &Lanes<'_>, count: u32, now: Duration) -> Vec<StreamProgress> {
        let count = count.min(STREAMS_MAX) as usize;
        self.spans.resize_with(count, || Span {
            began: now,
            ..Span::default()
        });
        let numbered = (0_u32..).zip(self.spans.iter_mut().zip(&lanes.lanes));
        numbered
            .map(|(number, (span, lane))| {
                let bytes = lane.bytes.load(Ordering::Relaxed);
                StreamProgress {
                    number,
                    bytes,
                    bytes_per_s: span.rate_at(now, bytes),
                    pages_queued: lane.pages_queued.load(Ordering::Relaxed),
                    stalled_ms: millis(lane.stalled(now)),
                }
            })
            .collect()
    }
}

impl Span {
    fn rate_at(&mut self, now: Duration, bytes: u64) -> u64 {
        let (length, carried) = (now.saturating_sub(self.began), bytes.saturating_sub(self.bytes));
        if length >= RATE_SPAN {
            *self = Self {
                began: now,
                bytes,
                rate: Some(rate(carried, length)),
            };
        }
        match self.rate {
            Some(rate) => rate,
            None if length.is_zero() => 0,
            None => rate(carried, length),
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn each_stream_shows_its_own_bytes_rate_and_pages() {
        let control = Control::new(|_| {});
        let lanes = Lanes::new(&control, Instant::now());
        let mut gauge = Gauge::default();
        assert_eq!(
            gauge.read(&lanes, 2, ms(0)),
            [
                StreamProgress::default(),
                StreamProgress {
                    number: 1,
                    ..StreamProgress::default()
                }
            ]
        );
        lanes.of(1).take_on(256);
        lanes.of(1).end_frame(MIB, 200);
        let early = gauge.read(&lanes, 2, ms(500));
        assert_eq!(
            (early[1].bytes, early[1].bytes_per_s, early[1].pages_queued),
            (MIB, 2 * MIB, 56)
        );
        assert_eq!((early[0].bytes, early[0].bytes_per_s), (0, 0));
        lanes.of(1).end_frame(3 * MIB, 56);
        assert_eq!(gauge.read(&lanes, 2, ms(2_000))[1].bytes_per_s, 2 * MIB);
        assert_eq!(
            gauge.read(&lanes, 2, ms(2_500))[1].bytes_per_s,
            2 * MIB,
            "until the next span is whole"
        );
        assert_eq!(gauge.read(&lanes, 2, ms(3_000))[1].bytes_per_s, 0);
        assert_eq!(gauge.read(&lanes, 2, ms(3_000))[1].pages_queued, 0);
    }

    #[test]
    fn a_stream_is_stalled_only_as_long_as_there_are_bytes_and_none_moves() {
        let control = Control::new(|_| {});
        let origin = Instant::now();
        let lanes = Lanes::new(&control, origin);
        let stalled = |now| Gauge::default().read(&lanes, 1, now)[0].stalled_ms;
        let long = origin.elapsed() + Duration::from_secs(60);
        assert_eq!(stalled(long), 0, "it has nothing to write");
        lanes.of(0).begin_frame();
        assert_eq!(stalled(origin.elapsed()), 0, "it has only begun");
        assert!(stalled(long) > 30_000, "{}", stalled(long));
        lanes.of(0).end_frame(1, 0);
        assert_eq!(stalled(long), 0);
        lanes.of(0).kernel_holds(true);
        assert!(stalled(long) > 30_000, "{}", stalled(long));
        lanes.of(0).kernel_holds(false);
        assert_eq!(stalled(long), 0);
    }

    #[test]
    fn no_more_streams_are_shown_than_there_can_be() {
        let control = Control::new(|_| {});
        let lanes = Lanes::new(&control, Instant::now());
        assert_eq!(
            Gauge::default().read(&lanes, u32::MAX, ms(1)).len(),
            STREAMS_MAX as usize
        );
    }
}
