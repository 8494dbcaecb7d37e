//! What was never written, told in the first round by a frame a hole and not by one a job: a guest of which little is populated is
//! mostly holes, and a frame for each 64 pages of them took longer than its content.
//!
//! ```text
//!  job of one run ── in a hole that is known, or found ahead? ──▶ held, joined with what is held before it
//!        │ no                                                          │ something else comes, or the round ends
//!        ▼                                                             ▼
//!      streams ◀──────────────────────────────────────────────────── one job: a run of zeroes
//! ```
//!
//! A hole stays known while the guest runs on: the log was re-armed before the VM was asked, so a page that is written meanwhile is
//! due in the next round whatever is said of it in this one.

use crate::codec::Run;
use crate::vm::{RegionEnds, SourceVm};

/// Most pages held at once (1 GiB): what is held is neither counted nor notices a stream that has failed.
const HELD_MAX: u64 = 1 << 18;

const NONE: Run = Run { first: 0, count: 0 };

/// See the module.
#[derive(Debug)]
pub(super) struct Holes {
    known: Run,
    held: Run,
}

/// What is to be done with a run of the first round.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is held. What was held before and is not its neighbour is to be sent.
    Held(Option<Run>),
    /// It is to be sent as it is.
    Send,
}

impl Holes {
    pub fn none() -> Self {
        Self {
            known: NONE,
            held: NONE,
        }
    }

    /// Holds `run` if all of it is a hole. `pages`: of the guest.
    pub fn offer(&mut self, run: Run, pages: u64, regions: &RegionEnds, vm: &dyn SourceVm) -> Verdict {
        if !within(run, self.known) {
            let rest = Run {
                first: run.first,
                count: pages.saturating_sub(run.first),
            };
            let ahead = regions.split(rest).next().unwrap_or(NONE);
            self.known = Run {
                first: ahead.first,
                count: vm.zero_ahead(ahead.first, ahead.count).min(ahead.count),
            };
        }
        if !within(run, self.known) {
            return Verdict::Send;
        }
        if self.held.count > 0 && self.held.end() == run.first && self.held.count < HELD_MAX {
            self.held.count += run.count;
            return Verdict::Held(None);
        }
        Verdict::Held(Some(std::mem::replace(&mut self.held, run)).filter(|before| before.count > 0))
    }

    /// What is held, which is to be sent now.
    pub fn take(&mut self) -> Option<Run> {
        Some(std::mem::replace(&mut self.held, NONE)).filter(|held| held.count > 0)
    }
}

fn within(run: Run, hole: Run) -> bool {
    run.first >= hole.first && run.end() <= hole.end()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::codec::push_run;
    use crate::vm::{Layout, PAGE_SIZE, PageSet, Region};
    use drover_proto::Fault;

    /// A VM that says of each page whether it is a hole, and for what it was asked.
    struct Sparse {
        written: Vec<bool>,
        asked: Mutex<Vec<Run>>,
    }

    impl SourceVm for Sparse {
        fn layout(&self) -> Layout {
            let page = PAGE_SIZE as u64;
            let (all, first) = (self.written.len() as u64, self.written.len() as u64 / 3);
            let region = |gpa, pages| Region {
                gpa,
                len: pages * page,
            };
            vec![region(0, first), region((first + 9) * page, all - first)]
        }
        fn zero_ahead(&self, first: u64, count: u64) -> u64 {
            self.asked.lock().unwrap().push(Run { first, count });
            let from = usize::try_from(first).unwrap();
            let ahead = self.written[from..from + usize::try_from(count).unwrap()].iter();
            ahead.take_while(|written| !**written).count() as u64
        }
        fn start_dirty_log(&self) -> Result<(), Fault> {
            unreachable!("it is asked for holes only")
        }
        fn stop_dirty_log(&self) {}
        fn take_dirty(&self, _: &mut PageSet) -> Result<(), Fault> {
            unreachable!("it is asked for holes only")
        }
        fn read_pages(&self, _: u64, _: &mut [u8]) {}
        fn pause(&self) -> Result<(), Fault> {
            unreachable!("it is asked for holes only")
        }
        fn save(&self) -> Result<Vec<u8>, Fault> {
            unreachable!("it is asked for holes only")
        }
    }

    proptest! {
        /// Whatever is written and in whatever jobs it is offered: each page is told once, as a hole only if it is one, and no hole is
        /// asked about across the end of a region.
        #[test]
        fn every_page_is_sent_once_and_only_holes_are_told_as_such(
            written in proptest::collection::vec(proptest::bool::weighted(0.1), 6..400),
            job in 1_u64..40,
        ) {
            let vm = Sparse { written, asked: Mutex::default() };
            let pages = vm.written.len() as u64;
            let regions = RegionEnds::new(&vm.layout());
            let (mut holes, mut told, mut sent) = (Holes::none(), Vec::new(), Vec::new());
            for first in (0..pages).step_by(usize::try_from(job).unwrap()) {
                let run = Run { first, count: job.min(pages - first) };
                match holes.offer(run, pages, &regions, &vm) {
                    Verdict::Held(before) => told.extend(before),
                    Verdict::Send => {
                        told.extend(holes.take());
                        sent.push(run);
                    }
                }
            }
            told.extend(holes.take());
            let mut seen: Vec<u64> = told.iter().chain(&sent).flat_map(|run| run.first..run.end()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..pages).collect::<Vec<_>>());
            let is_hole = |page: u64| !vm.written[usize::try_from(page).unwrap()];
            prop_assert!(told.iter().flat_map(|run| run.first..run.end()).all(is_hole));
            let third = pages / 3;
            let asked = vm.asked.lock().unwrap();
            prop_assert!(asked.iter().all(|run| run.first >= third || run.end() <= third), "{:?}", asked);
            // Neighbours are told together.
            let mut joined = Vec::new();
            told.iter().for_each(|run| push_run(&mut joined, run.first, run.count));
            prop_assert!(job > third || told.len() <= joined.len() + 1, "{:?}", told);
        }
    }

    #[test]
    fn what_is_held_is_bounded() {
        let vm = Sparse {
            written: vec![false; 3 << 18],
            asked: Mutex::default(),
        };
        let pages = vm.written.len() as u64;
        let regions = RegionEnds::new(&vm.layout());
        let (mut holes, mut told) = (Holes::none(), Vec::new());
        for first in (1 << 18..pages).step_by(64) {
            let Verdict::Held(before) = holes.offer(Run { first, count: 64 }, pages, &regions, &vm) else {
                panic!("page {first} is a hole");
            };
            told.extend(before);
        }
        assert_eq!((told.len(), told[0].count), (1, HELD_MAX));
        assert_eq!(vm.asked.lock().unwrap().len(), 1);
    }
}
