//! How the pages of a batch are encoded: what all streams share for it, and what each needs of its own.
//!
//! Whether deltas are tried is decided between rounds only ([`Encoder::begin_round`], called while no worker has a job), since the cache
//! is of use only if it is told of every page that is sent.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use drover_proto::Fault;
use drover_proto::v1::Compression;

use crate::codec::Batch;
use crate::encode::cache::Cache;
use crate::encode::choice::{Chooser, Done, Plan, Tried, Wish, deltas_pay};
use crate::encode::compress::{Method, Packer};
use crate::handshake::feature;
use crate::vm::PAGE_SIZE;

/// Most memory for encoding, cache and buffers together, bytes; and what each stream has of it beside the cache: the compressed frame, what
/// zstd works in, deltas.
const BYTES_MAX: usize = 44 << 20;
const STREAM_BYTES: usize = 3 << 20;
/// Most memory for the cache, bytes.
const CACHE_BYTES_MAX: usize = 32 << 20;
/// Sets of pages that a source holds at once, of a guest small enough for all of them; a larger guest's take the cache's place.
const PAGE_SETS: u64 = 5;
/// Of so many pages of a batch one is looked at before the whole is compressed.
const SAMPLE_SHARE: usize = 64;
/// Pages of a batch that both methods are tried on.
const TRIAL_PAGES: usize = 8;
/// A batch whose sample shrinks to no less than this, of 1000, goes as it is.
const INCOMPRESSIBLE_PER_MILLE: usize = 900;

/// What the user asks for.
pub(super) fn wish(asked: i32) -> Wish {
    match Compression::try_from(asked) {
        Ok(Compression::Off) => Wish::Off,
        Ok(Compression::Lz4) => Wish::Always(Method::Lz4),
        Ok(Compression::Zstd) => Wish::Always(Method::Zstd),
        Ok(Compression::Auto) | Err(_) => Wish::Auto,
    }
}

/// What to offer the target for that.
pub(super) fn offered(wish: Wish) -> u32 {
    match wish {
        Wish::Off => feature::ALL & !feature::ENCODED,
        _ => feature::ALL,
    }
}

/// See the module.
pub(super) struct Encoder {
    wish: Wish,
    features: u32,
    origin: Instant,
    chooser: Mutex<Chooser>,
    cache: Cache,
    deltas: AtomicBool,
    known: AtomicU64,
    as_deltas: AtomicU64,
}

impl Encoder {
    /// For a target that agreed to these features, on so many streams, and a guest of so many pages.
    pub fn new(wish: Wish, features: u32, streams: u32, pages: u64, origin: Instant) -> Self {
        let workers = streams.max(1);
        let of_pages = usize::try_from(pages / 8 * PAGE_SETS).unwrap_or(usize::MAX);
        let readable = [feature::LZ4, feature::ZSTD].map(|method| features & method != 0);
        let of_streams = (workers as usize).saturating_mul(STREAM_BYTES);
        Self {
            wish,
            features,
            origin,
            chooser: Mutex::new(Chooser::new(wish, readable, workers)),
            cache: Cache::new(
                BYTES_MAX
                    .saturating_sub(of_streams)
                    .saturating_sub(of_pages)
                    .min(CACHE_BYTES_MAX),
            ),
            deltas: AtomicBool::new(false),
            known: AtomicU64::new(0),
            as_deltas: AtomicU64::new(0),
        }
    }

    /// One that leaves pages as they are.
    pub fn plain(origin: Instant) -> Self {
        Self::new(Wish::Off, 0, 1, 0, origin)
    }

    /// Decides on deltas. No job of another round is under way.
    pub fn begin_round(&self, round: u32) {
        let tried = Tried {
            known: self.known.load(Ordering::Relaxed),
            deltas: self.as_deltas.load(Ordering::Relaxed),
        };
        let on = self.features & feature::DELTAS != 0
            && round > 1
            && deltas_pay(self.wish, self.chooser().link(), tried);
        if self.deltas.swap(on, Ordering::AcqRel) && !on {
            self.cache.clear();
        }
    }

    fn chooser(&self) -> MutexGuard<'_, Chooser> {
        self.chooser.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Encodes the pages of `batch`, all of which were added. What it gives is completed with what was sent, for [`Encoder::done`].
    pub fn encode(&self, batch: &mut Batch, packer: &mut Packer) -> Result<Done, Fault> {
        if self.wish == Wish::Off || self.features & feature::ENCODED == 0 {
            return Ok(Done::default());
        }
        if self.deltas.load(Ordering::Acquire) {
            let (known, deltas) = batch.take_deltas(&self.cache);
            self.known.fetch_add(known, Ordering::Relaxed);
            self.as_deltas.fetch_add(deltas, Ordering::Relaxed);
        }
        let mut done = Done {
            content: batch.content().len() as u64,
            ..Done::default()
        };
        if done.content == 0 {
            return Ok(done);
        }
        let Plan { method, sample } = self.chooser().plan();
        if sample {
            for (index, method) in Method::ALL.into_iter().enumerate() {
                done.samples[index] = Some(try_some(batch, packer, method, TRIAL_PAGES)?);
            }
        }
        let Some(method) = method else { return Ok(done) };
        let pages = batch.content().len() / PAGE_SIZE;
        let (from, to, _) = try_some(batch, packer, method, pages.div_ceil(SAMPLE_SHARE))?;
        if to.saturating_mul(1000) >= from.saturating_mul(INCOMPRESSIBLE_PER_MILLE as u64) {
            return Ok(done);
        }
        let began = Instant::now();
        if let Some(length) = batch.pack(method, packer)? {
            done.packed = Some((method, done.content, length as u64, began.elapsed()));
        }
        Ok(done)
    }

    /// A batch that was encoded is sent.
    pub fn done(&self, done: &Done) {
        if self.wish == Wish::Auto && self.features & feature::ENCODED != 0 {
            self.chooser().done(self.origin.elapsed(), done);
        }
    }
}

/// Compresses about `pages` pages, spread over the batch: bytes before, bytes after, and the time.
fn try_some(
    batch: &Batch,
    packer: &mut Packer,
    method: Method,
    pages: usize,
) -> Result<(u64, u64, std::time::Duration), Fault> {
    let content = batch.content();
    let all = content.len() / PAGE_SIZE;
    let pages = pages.clamp(1, all.max(1));
    let mut sample = Vec::with_capacity(pages * PAGE_SIZE);
    for index in 0..pages.min(all) {
        let at = index * all / pages * PAGE_SIZE;
        sample.extend_from_slice(&content[at..at + PAGE_SIZE]);
    }
    let mut out = vec![0; Packer::room(sample.len())];
    let began = Instant::now();
    let length = packer.pack(method, &sample, &mut out)?;
    let took = began.elapsed();
    let from = sample.len() as u64;
    Ok((from, length.map_or(from, |length| length as u64), took))
}
