//! The forecast against the protocol: a source's machine moves a guest that writes exactly as it was watched to write, over a link
//! that is exactly as fast as was assumed, on a clock that only the test moves. It must go as was foretold.

use std::time::Duration;

use drover_migration::bandwidth::time;
use drover_migration::codec::{Hello, HelloAck, Message, Run};
use drover_migration::convergence::{Costs, Intent};
use drover_migration::forecast::{Facts, Window, Writes, rehearse};
use drover_migration::handshake::VERSIONS;
use drover_migration::source::{Action, Config, Event, Machine, Outcome, Sent};
use drover_migration::vm::{PAGE_SIZE, PageSet};
use drover_proto::Code;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const PAGE: u64 = PAGE_SIZE as u64;
const ROUND_TRIP: Duration = Duration::from_micros(500);

/// How it went: the fault it ended with, the time until its pause or its end, its rounds, and the highest throttle.
#[derive(Debug, PartialEq, Eq)]
struct Went {
    ended: Result<(), Code>,
    took: Duration,
    rounds: u32,
    throttle: u32,
}

fn go(facts: &Facts, intent: Intent) -> Went {
    let pages = facts.memory / PAGE;
    let mut machine = Machine::new(Config {
        hello: Hello {
            version_min: *VERSIONS.start(),
            version_max: *VERSIONS.end(),
            ..Hello::default()
        },
        total_pages: pages,
        intent,
        costs: facts.costs,
        tracker: "bitmap".to_owned(),
        skip_final_pass: false,
        forget_put_off: false,
    });
    let (mut now, mut taken_at) = (Duration::ZERO, Duration::ZERO);
    // Of the round: batches are sent without a break, so that none is rounded by itself.
    let mut sent = 0;
    let (mut rounds, mut throttle, mut most) = (0, 0, 0);
    let mut asked = None;
    let mut event = Event::Connected;
    loop {
        let mut next = None;
        for action in machine.handle(now, event) {
            match action {
                Action::Throttle(percent) => {
                    throttle = percent;
                    most = most.max(percent);
                }
                Action::Send(message) => asked = Some(message),
                Action::Receive => {
                    now += ROUND_TRIP;
                    next = Some(Event::Received(match asked.take() {
                        Some(Message::RoundEnd(end)) => {
                            rounds = end.round;
                            Message::RoundAck(drover_migration::codec::RoundAck { round: end.round })
                        }
                        _ => Message::HelloAck(HelloAck {
                            version: *VERSIONS.end(),
                            ..HelloAck::default()
                        }),
                    }));
                }
                Action::StartLog => {
                    taken_at = now;
                    next = Some(Event::LogStarted);
                }
                Action::SendBatch { runs, .. } => {
                    let pages: u64 = runs.iter().map(|run| run.count).sum();
                    sent += pages * PAGE;
                    now = taken_at + time(sent, facts.bandwidth);
                    next = Some(Event::BatchSent(Sent {
                        pages,
                        zero_pages: 0,
                        bytes: pages * PAGE,
                    }));
                }
                Action::TakeDirty => {
                    let ran = (now - taken_at) * (100 - throttle) / 100;
                    (taken_at, sent) = (now, 0);
                    let mut dirty = PageSet::empty(pages);
                    dirty.insert(Run {
                        first: 0,
                        count: facts.writes.within(ran) / PAGE,
                    });
                    next = Some(Event::DirtyTaken(dirty));
                }
                // The forecast knows nothing of pages that are put off: this guest's VM does not see them.
                Action::LookDirty => next = Some(Event::DirtySeen(PageSet::empty(pages))),
                Action::Pause => {
                    return Went {
                        ended: Ok(()),
                        took: now,
                        rounds: rounds + 1,
                        throttle: most,
                    };
                }
                Action::End(Outcome::FailedRunning(fault)) => {
                    return Went {
                        ended: Err(fault.code),
                        took: now,
                        rounds,
                        throttle: most,
                    };
                }
                Action::Reach(_) | Action::Report(_) => {}
                action => panic!("{action:?} before the pause"),
            }
        }
        event = next.expect("a list ends with what brings the next event");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn a_guest_that_goes_on_as_it_was_watched_is_moved_as_was_foretold(
        memory in 4u64..64,
        written in proptest::collection::vec(0u64..64, 4),
        bandwidth in 10u64..1000,
        max_downtime in 20u64..400,
        max_throttle in prop_oneof![Just(0), 1u32..=99],
    ) {
        let windows: Vec<_> = [30, 100, 400, 1000]
            .into_iter()
            .zip(written)
            .map(|(ms, mib)| Window { length: Duration::from_millis(ms), bytes: mib * MIB })
            .collect();
        let facts = Facts {
            memory: memory * MIB,
            populated: memory * MIB,
            writes: Writes::new(&windows, memory * MIB),
            bandwidth: bandwidth * MIB,
            costs: Costs::default(),
        };
        let intent = Intent { max_downtime: Duration::from_millis(max_downtime), max_throttle, ..Intent::default() };
        let (told, went) = (rehearse(&facts, &intent), go(&facts, intent));
        prop_assert_eq!(told.ended.as_ref().map_err(|fault| fault.code).copied(), went.ended);
        let before_pause = if went.ended.is_ok() { told.total - told.blackout } else { told.total };
        prop_assert_eq!((before_pause, told.rounds, told.throttle), (went.took, went.rounds, went.throttle));
    }
}
