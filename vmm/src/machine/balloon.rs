//! The running VM's balloon: what its guest is asked for, and what is told of it.
//!
//! A guest says what its balloon holds as often as it likes, and each change that is told wakes its agent and becomes an entry in the
//! cluster's log. So it is told when the guest has come where it was asked to, once for each time it was asked, and else every few seconds.

use std::time::{Duration, Instant};

use drover_proto::v1::{SetMemoryRequest, VmMemory, VmmInfo};
use drover_proto::{Code, Fault};
use tracing::info;

use super::{Core, Machine};
use crate::config::{PAGES_A_MIB, balloon_pages};
use crate::devices::virtio::balloon::{Level, Target};
use crate::time::boottime_ns;
use crate::vm::Vm;

/// Between two changes that are told.
const PERIOD: Duration = Duration::from_secs(5);

/// What was last told of the balloon.
#[derive(Debug, Default)]
pub(super) struct Told {
    actual: u32,
    /// When that changed.
    since: Option<Instant>,
    /// The wish that was fulfilled last.
    fulfilled: Option<u64>,
}

impl Told {
    /// The balloon stands so now.
    pub(super) fn look(&mut self, now: Instant, level: Level) {
        let there = level.actual == level.target.pages;
        let arrives = there && self.fulfilled != Some(level.target.revision);
        let due = |since: Instant| now.saturating_duration_since(since) >= PERIOD;
        if self.actual != level.actual && (arrives || self.since.is_none_or(due)) {
            self.actual = level.actual;
            self.since = Some(now);
        }
        if there {
            self.fulfilled = Some(level.target.revision);
        }
    }
}

impl Machine {
    /// What is told of the guest's memory, where it can be asked for some.
    pub(super) fn memory_told(core: &Core, vm: &Vm) -> Option<VmMemory> {
        let level = vm.devices().attached.balloon_level()?;
        // As long as nothing was told: what a VM that was received says of itself.
        let told = &core.memory_told;
        let actual = told.since.map_or(level.actual, |_| told.actual);
        let pages = vm.memory().bytes() / (1 << 20) * PAGES_A_MIB;
        let left = |pages_given: u32| pages.saturating_sub(u64::from(pages_given)) / PAGES_A_MIB;
        Some(VmMemory {
            target_mib: left(level.target.pages),
            revision: level.target.revision,
            actual_mib: left(actual),
            // Filled in when it is asked for.
            driver: false,
        })
    }

    /// Asks the guest to have so much of its memory. Also while the VM is moved, before its pause: what it was asked for travels.
    pub fn set_memory(&self, request: &SetMemoryRequest) -> Result<VmmInfo, Fault> {
        let target = Target {
            pages: balloon_pages(self.config.memory_mib, request.target_mib)?,
            revision: request.revision,
        };
        {
            let core = self.core();
            let Some(vm) = self.vm().filter(|_| core.running) else {
                let state = core.right.state(boottime_ns()).as_str_name();
                let message = format!("a VM in {state} is asked for no memory");
                return Err(Fault::new(Code::VmState, message));
            };
            vm.devices().attached.set_balloon(target)?;
            info!(
                target_mib = request.target_mib,
                revision = request.revision,
                "the guest is to have so much memory"
            );
            self.publish(&core);
        }
        Ok(self.info())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_changes_its_mind_all_the_time_is_told_of_every_few_seconds_and_when_it_has_done_as_asked()
    {
        let (mut told, began) = (Told::default(), Instant::now());
        let at = |ms: u64| began + Duration::from_millis(ms);
        let level = |pages, revision, actual| Level {
            target: Target { pages, revision },
            actual,
        };
        told.look(at(0), level(100, 1, 40));
        assert_eq!(told.actual, 40, "the first is told at once");
        told.look(at(1000), level(100, 1, 70));
        assert_eq!(told.actual, 40);
        told.look(at(1500), level(100, 1, 100));
        assert_eq!(told.actual, 100, "it has done as asked");
        for (ms, actual) in [(2000, 99), (2500, 100), (3000, 7), (4000, 100), (6000, 8)] {
            told.look(at(ms), level(100, 1, actual));
            assert_eq!(told.actual, 100);
        }
        told.look(at(6500), level(100, 1, 9));
        assert_eq!(told.actual, 9, "five seconds after the last change");
        told.look(at(6600), level(20, 2, 20));
        assert_eq!(told.actual, 20, "of another wish it is told at once again");
    }
}
