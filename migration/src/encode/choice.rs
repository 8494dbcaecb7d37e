//! Which batches are compressed, and how: a pure function of what was measured, and the record of it. No clock is read here.
//!
//! With `L` the bytes a second that the streams carry together when nothing is compressed, `K` the streams, and of each method `m` the bytes
//! a second `v` that one worker compresses and the share `r` that is left, both as measured on this guest's pages and on this machine as
//! busy as it is, a byte of the guest takes
//!
//! ```text
//!  plain        1 / L
//!  method m     5/4 / (K v) + r / L          the quarter: unpacking, which the target does
//! ```
//!
//! Compressing and sending are added up although they overlap where the link is slow, and `L` leaves out the time to read memory, which both
//! ways take. So this errs towards plain, and more so the faster the link: one that carries more than `4/5 K v` is never given
//! anything compressed. A method must take at most 4/5 of plain's time to be taken up, and is left at 19/20, so that noise does not make it swing.
//!
//! `L` is measured in windows in which nothing was compressed: the first ones, and one again every [`PROBE_EVERY`]. While batches are
//! compressed the streams may well wait for the processors, and say nothing of the link but that it carries no less.

use std::time::Duration;

use super::compress::Method;
use crate::bandwidth::rate;

/// How pages are to be encoded, as the user asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// By what is measured.
    #[default]
    Auto,
    /// Neither compressed nor as deltas.
    Off,
    /// Always with this method, where it makes a batch smaller.
    Always(Method),
}

/// What a method does with this guest's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    /// Bytes a second that go in, one worker.
    pub speed: u64,
    /// What is left of 1000 bytes.
    pub per_mille: u64,
}

/// Nanoseconds that a MiB of the guest takes, sent as it is, over a link of so many bytes a second.
pub fn plain_ns(link: u64) -> u64 {
    NS_MIB / link.max(1)
}

/// The same when it is compressed by `workers` streams.
pub fn packed_ns(link: u64, workers: u32, figures: &Figures) -> u64 {
    let work = NS_MIB / figures.speed.max(1).saturating_mul(workers.max(1).into());
    (work + work / 4).saturating_add(plain_ns(link).saturating_mul(figures.per_mille) / 1000)
}

const NS_MIB: u64 = 1_000_000_000 << 20;

/// The decision. `link`: bytes a second; `figures`: of [`Method::ALL`], if known; `now`: what is done so far.
pub fn encoding(
    link: Option<u64>,
    workers: u32,
    figures: [Option<Figures>; 2],
    now: Option<Method>,
) -> Option<Method> {
    let link = link?;
    let plain = plain_ns(link);
    let cost = |method: Method| {
        let known = figures[method as usize - 1]?;
        let ns = packed_ns(link, workers, &known);
        let bound = if Some(method) == now {
            plain / 20 * 19
        } else {
            plain / 5 * 4
        };
        (ns <= bound).then_some((method, ns))
    };
    let best = Method::ALL.into_iter().filter_map(cost).min_by_key(|(_, ns)| *ns);
    match (best, now.and_then(cost)) {
        // Another method must be a tenth better than the one in use.
        (Some((_, ns)), Some((current, current_ns))) if ns > current_ns / 10 * 9 => Some(current),
        (best, _) => best.map(|(method, _)| method),
    }
}

/// What came of deltas so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tried {
    /// Pages that the cache knew when they were sent again.
    pub known: u64,
    /// Of them, those that went as deltas.
    pub deltas: u64,
}

/// On a link that carries more than this, bytes a second, finding what changed costs more than it saves.
const DELTAS_LINK_MAX: u64 = 400 << 20;
/// After so many pages it shows whether the guest changes a little of each or rewrites it all.
const DELTAS_TRIED_MIN: u64 = 1024;

/// Whether pages that are sent again are to be sent as what changed in them. `link`: as for [`encoding`].
pub fn deltas_pay(wish: Wish, link: Option<u64>, tried: Tried) -> bool {
    let link_waits = match wish {
        Wish::Off => false,
        Wish::Always(_) => true,
        Wish::Auto => link.is_some_and(|link| link <= DELTAS_LINK_MAX),
    };
    link_waits && (tried.known < DELTAS_TRIED_MIN || tried.deltas >= tried.known / 8)
}

/// A window of so many of the guest's bytes is judged by, or what came in [`WINDOW_TIME`]: large enough that sockets' buffers do not make a
/// slow link look fast for long.
const WINDOW_BYTES: u64 = 16 << 20;
const WINDOW_TIME: Duration = Duration::from_millis(250);
/// Least bytes of a window.
const WINDOW_BYTES_MIN: u64 = 1 << 20;
/// While compressing the link is measured again so often.
pub const PROBE_EVERY: Duration = Duration::from_secs(2);
/// Every so many batches pages are sampled, if compressing could pay at all.
const SAMPLE_EVERY: u32 = 32;
/// And so seldom that it takes no more than this part of the time that sending takes: on a fast link it would be felt.
const SAMPLE_SHARE: u32 = 100;

/// What is to be done with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Compress it, if a sample of it says that it gets smaller.
    pub method: Option<Method>,
    /// Try both methods on a few of its pages, and tell.
    pub sample: bool,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// The guest's bytes in it, zero pages and deltas left out.
    pub content: u64,
    /// What was written to the stream, all frames.
    pub wire: u64,
    /// Time that writing took, waiting for the cap included.
    pub sending: Duration,
    /// If it was compressed: how, from how many bytes to how many, and in what time.
    pub packed: Option<(Method, u64, u64, Duration)>,
    /// Of samples: the same.
    pub samples: [Option<(u64, u64, Duration)>; 2],
}

/// The record. One for all streams.
#[derive(Clone, Debug)]
pub struct Chooser {
    wish: Wish,
    /// Of [`Method::ALL`], which the peer can read.
    readable: [bool; 2],
    workers: u32,
    figures: [Option<Figures>; 2],
    link: Option<u64>,
    now: Option<Method>,
    batches: u32,
    window: Window,
    probing: bool,
    probed_at: Duration,
    /// Time that sampling and sending took so far.
    sampled: Duration,
    sent: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
struct Window {
    began: Option<Duration>,
    content: u64,
    wire: u64,
    packed: u64,
    sending: Duration,
}

impl Chooser {
    /// For so many streams to a peer that can read these methods.
    pub fn new(wish: Wish, readable: [bool; 2], workers: u32) -> Self {
        Self {
            wish,
            readable,
            workers: workers.max(1),
            figures: [None; 2],
            link: None,
            now: None,
            batches: 0,
            window: Window::default(),
            probing: false,
            probed_at: Duration::ZERO,
            sampled: Duration::ZERO,
            sent: Duration::ZERO,
        }
    }

    /// What is done with the batch that comes next.
    pub fn plan(&mut self) -> Plan {
        match self.wish {
            Wish::Off => Plan {
                method: None,
                sample: false,
            },
            Wish::Always(method) => Plan {
                method: Some(method).filter(|method| self.reads(*method)),
                sample: false,
            },
            Wish::Auto => {
                self.batches = self.batches.wrapping_add(1);
                Plan {
                    method: self.now.filter(|_| !self.probing),
                    sample: self.batches % SAMPLE_EVERY == 1
                        && self.sampled.saturating_mul(SAMPLE_SHARE) <= self.sent
                        && self.could_pay(),
                }
            }
        }
    }

    /// Bytes a second that the streams carry uncompressed, as far as is known.
    pub fn link(&self) -> Option<u64> {
        self.link
    }

    /// What is done as a rule.
    pub fn now(&self) -> Option<Method> {
        match self.wish {
            Wish::Always(method) => Some(method).filter(|method| self.reads(*method)),
            _ => self.now,
        }
    }

    fn reads(&self, method: Method) -> bool {
        self.readable[method as usize - 1]
    }

    /// Whether any method could be worth its time even if it left nothing over. As long as nothing is known it could.
    fn could_pay(&self) -> bool {
        let Some(link) = self.link else {
            return self.readable != [false; 2];
        };
        Method::ALL.into_iter().any(|method| {
            self.reads(method)
                && self.figures[method as usize - 1].is_none_or(|figures| {
                    let free = Figures {
                        per_mille: 0,
                        ..figures
                    };
                    packed_ns(link, self.workers, &free) <= plain_ns(link) / 5 * 4
                })
        })
    }

    /// A batch is done. `now`: time since any fixed instant, of whichever worker.
    pub fn done(&mut self, now: Duration, done: &Done) {
        for (method, sample) in Method::ALL.into_iter().zip(done.samples) {
            if let Some((from, to, took)) = sample {
                self.learn(method, from, to, took);
                self.sampled = self.sampled.saturating_add(took);
            }
        }
        if let Some((method, from, to, took)) = done.packed {
            self.learn(method, from, to, took);
            self.window.packed += from;
        }
        self.window.content += done.content;
        self.window.wire += done.wire;
        self.window.sending += done.sending;
        self.sent = self.sent.saturating_add(done.sending);
        let began = *self.window.began.get_or_insert(now);
        let enough = self.window.content >= WINDOW_BYTES
            || (self.window.content >= WINDOW_BYTES_MIN && now.saturating_sub(began) >= WINDOW_TIME);
        if enough {
            self.close_window(now);
        }
    }

    fn close_window(&mut self, now: Duration) {
        let window = std::mem::take(&mut self.window);
        // Each stream was waiting for the link for its part of the time: this is what they carry if all of them wait.
        let carried = rate(window.wire.saturating_mul(self.workers.into()), window.sending);
        if window.packed < window.content / 8 {
            self.link = Some(carried);
            self.probed_at = now;
            self.probing = false;
        } else if now.saturating_sub(self.probed_at) >= PROBE_EVERY {
            self.probing = true;
        }
        if !self.probing {
            let figures = [Method::Lz4, Method::Zstd]
                .map(|method| self.figures[method as usize - 1].filter(|_| self.reads(method)));
            self.now = encoding(self.link, self.workers, figures, self.now);
        }
    }

    /// The mean of what is known and what was seen, so that one odd batch decides nothing.
    fn learn(&mut self, method: Method, from: u64, to: u64, took: Duration) {
        let seen = Figures {
            speed: rate(from, took),
            per_mille: to.saturating_mul(1000) / from.max(1),
        };
        let known = &mut self.figures[method as usize - 1];
        *known = Some(match *known {
            None => seen,
            Some(old) => Figures {
                speed: (old.speed.saturating_mul(3).saturating_add(seen.speed)) / 4,
                per_mille: (old.per_mille * 3 + seen.per_mille) / 4,
            },
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A machine and a guest, as they are and not as they are measured.
    #[derive(Clone, Copy, Debug)]
    struct World {
        link: u64,
        workers: u32,
        figures: [Figures; 2],
    }

    impl World {
        fn ns(&self, method: Option<Method>) -> u64 {
            match method {
                None => plain_ns(self.link),
                Some(method) => packed_ns(self.link, self.workers, &self.figures[method as usize - 1]),
            }
        }
    }

    fn worlds() -> impl Strategy<Value = World> {
        let figures = |speed: std::ops::Range<u64>| {
            (speed, 5_u64..1010).prop_map(|(speed, per_mille)| Figures {
                speed: speed * MIB,
                per_mille,
            })
        };
        (1_u64..4000, 1_u32..16, figures(100..3000), figures(40..800)).prop_map(
            |(link, workers, lz4, zstd)| World {
                link: link * MIB,
                workers,
                figures: [lz4, zstd],
            },
        )
    }

    /// Sends batches of 1 MiB through it, one after the other; gives the time that the whole took, and what was done in the end.
    fn play(world: &World, batches: u32) -> (Duration, Option<Method>) {
        let mut chooser = Chooser::new(Wish::Auto, [true; 2], world.workers);
        let mut now = Duration::ZERO;
        for _ in 0..batches {
            let plan = chooser.plan();
            let mut done = Done {
                content: MIB,
                ..Done::default()
            };
            let work = |method: Method, bytes: u64| {
                let figures = world.figures[method as usize - 1];
                (
                    bytes * figures.per_mille / 1000,
                    crate::bandwidth::time(bytes, figures.speed),
                )
            };
            if plan.sample {
                for method in Method::ALL {
                    let (to, took) = work(method, MIB / 32);
                    done.samples[method as usize - 1] = Some((MIB / 32, to, took));
                    now += took / world.workers;
                }
            }
            done.wire = MIB;
            if let Some(method) = plan.method {
                let (to, took) = work(method, MIB);
                done.packed = Some((method, MIB, to, took));
                done.wire = to.min(MIB);
                now += (took + took / 4) / world.workers;
            }
            let sending = crate::bandwidth::time(done.wire, world.link);
            done.sending = sending * world.workers;
            now += sending;
            chooser.done(now, &done);
        }
        (now, chooser.now())
    }

    proptest! {
        #[test]
        fn what_is_chosen_is_never_slower_than_plain_nor_much_slower_than_the_best(world in worlds(), now in 0_usize..3) {
            let now = [None, Some(Method::Lz4), Some(Method::Zstd)][now];
            let chosen = encoding(Some(world.link), world.workers, world.figures.map(Some), now);
            let best = [None, Some(Method::Lz4), Some(Method::Zstd)].map(|method| world.ns(method)).into_iter().min().unwrap();
            prop_assert!(world.ns(chosen) <= world.ns(None));
            prop_assert!(world.ns(chosen) <= best * 5 / 4 + 1000, "{chosen:?}: {} ns, {best} ns would do", world.ns(chosen));
        }

        #[test]
        fn a_faster_link_never_makes_a_method_pay_that_did_not(world in worlds(), faster in 1_u64..20) {
            let figures = world.figures.map(Some);
            if encoding(Some(world.link), world.workers, figures, None).is_none() {
                prop_assert_eq!(encoding(Some(world.link * faster), world.workers, figures, None), None);
            }
        }

        #[test]
        fn a_whole_migration_costs_at_most_a_trifle_more_than_plain_and_settles(world in worlds()) {
            let (took, chosen) = play(&world, 2000);
            let plain = Duration::from_nanos(world.ns(None) * 2000);
            // Samples: 1/32 of each 32nd batch by both methods.
            prop_assert!(took <= plain + plain / 20, "{took:?} instead of {plain:?} with {chosen:?}");
            let best = encoding(Some(world.link), world.workers, world.figures.map(Some), chosen);
            prop_assert_eq!(chosen, best, "it would not stay where it is");
        }
    }

    #[test]
    fn on_a_link_of_a_gigabit_text_is_compressed_and_noise_is_not() {
        let (lz4, zstd) = (600 * MIB, 250 * MIB);
        let world = |per_mille: [u64; 2], link| World {
            link,
            workers: 2,
            figures: [
                Figures {
                    speed: lz4,
                    per_mille: per_mille[0],
                },
                Figures {
                    speed: zstd,
                    per_mille: per_mille[1],
                },
            ],
        };
        let gigabit = 112 * MIB;
        assert_eq!(play(&world([1004, 1000], gigabit), 500).1, None);
        assert_eq!(play(&world([400, 300], gigabit), 500).1, Some(Method::Lz4));
        assert_eq!(play(&world([900, 300], gigabit), 500).1, Some(Method::Zstd));
        assert_eq!(play(&world([500, 300], gigabit / 10), 500).1, Some(Method::Zstd));
        assert_eq!(play(&world([500, 300], 2000 * MIB), 500).1, None);
    }

    /// Samples that are taken in 2000 batches, each of which takes so long to send.
    fn samples(sending: Duration) -> u32 {
        let mut chooser = Chooser::new(Wish::Auto, [true; 2], 4);
        let (content, tried) = (256 << 10, 32 << 10);
        let sample = [10, 300].map(|us| Some((tried, tried, Duration::from_micros(us))));
        let (mut now, mut taken) = (Duration::ZERO, 0);
        for _ in 0..2000 {
            let plan = chooser.plan();
            assert_eq!(plan.method, None, "nothing shrinks");
            taken += u32::from(plan.sample);
            now += sending;
            let samples = if plan.sample { sample } else { [None; 2] };
            chooser.done(
                now,
                &Done {
                    content,
                    wire: content,
                    sending,
                    packed: None,
                    samples,
                },
            );
        }
        taken
    }

    #[test]
    fn sampling_takes_a_hundredth_of_the_time_at_most_and_goes_on_where_that_is_plenty() {
        let quick = Duration::from_micros(200);
        let (taken, sent) = (samples(quick), 2000 * quick);
        let each = Duration::from_micros(310);
        assert!(taken > 3 && (taken - 1) * each <= sent / SAMPLE_SHARE, "{taken}");
        assert_eq!(
            samples(Duration::from_millis(20)),
            2000_u32.div_ceil(SAMPLE_EVERY)
        );
    }

    #[test]
    fn a_link_that_becomes_fast_is_noticed_while_everything_is_compressed() {
        let figures = Figures {
            speed: 500 * MIB,
            per_mille: 400,
        };
        let mut chooser = Chooser::new(Wish::Auto, [true, false], 1);
        let (mut now, mut link) = (Duration::ZERO, 100 * MIB);
        let mut seen = Vec::new();
        for batch in 0..4000 {
            if batch == 1000 {
                link = 5000 * MIB;
            }
            let plan = chooser.plan();
            let took = crate::bandwidth::time(MIB, figures.speed);
            let wire = plan.method.map_or(MIB, |_| MIB * 400 / 1000);
            let sending = crate::bandwidth::time(wire, link);
            now += sending + plan.method.map_or(Duration::ZERO, |_| took);
            chooser.done(
                now,
                &Done {
                    content: MIB,
                    wire,
                    sending,
                    packed: plan.method.map(|method| (method, MIB, wire, took)),
                    samples: [plan.sample.then_some((MIB, MIB * 400 / 1000, took)), None],
                },
            );
            seen.push(chooser.now());
        }
        assert_eq!(seen[900], Some(Method::Lz4));
        assert_eq!(seen[3999], None);
        let from = seen.iter().rposition(|now| now.is_some()).unwrap();
        assert!(from < 3000, "noticed after {from} batches");
    }

    #[test]
    fn deltas_are_tried_on_a_slow_link_and_given_up_where_pages_are_rewritten_whole() {
        let slow = Some(100 * MIB);
        let tried = |known, deltas| Tried { known, deltas };
        assert!(deltas_pay(Wish::Auto, slow, tried(0, 0)));
        assert!(deltas_pay(Wish::Auto, slow, tried(10_000, 2000)));
        assert!(!deltas_pay(Wish::Auto, slow, tried(10_000, 1000)));
        assert!(!deltas_pay(Wish::Auto, Some(1000 * MIB), tried(0, 0)));
        assert!(!deltas_pay(Wish::Auto, None, tried(0, 0)));
        assert!(deltas_pay(Wish::Always(Method::Lz4), None, tried(0, 0)));
        assert!(!deltas_pay(Wish::Off, slow, tried(0, 0)));
    }

    #[test]
    fn a_wish_is_kept_as_far_as_the_peer_can_read_it() {
        let plan = |wish, readable| Chooser::new(wish, readable, 2).plan();
        assert_eq!(
            plan(Wish::Off, [true; 2]),
            Plan {
                method: None,
                sample: false
            }
        );
        assert_eq!(
            plan(Wish::Always(Method::Zstd), [true; 2]).method,
            Some(Method::Zstd)
        );
        assert_eq!(plan(Wish::Always(Method::Zstd), [true, false]).method, None);
        assert!(!plan(Wish::Auto, [false; 2]).sample);
    }
}
