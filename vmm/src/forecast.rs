//! A dry run's part in the VMM: watching what the running guest writes, and what the engine's rules make of it.
//!
//! ```text
//!            watch                          end, fault
//!   FREE ───────────▶ WATCHING ─────────────────────────▶ FREE
//!     │ a migration      │ a migration (the log is off before it goes on)
//!     └──────────────────┴──────────▶ CLAIMED ──its engine ended──▶ FREE
//! ```
//!
//! The dirty log has one reader at a time: reading clears it, so a reader beside a migration's engine would steal the pages that
//! the target then never gets. Every step of the watching, switching the log on, reading it, switching it off, happens under
//! one lock and only while the state is WATCHING; a migration claims the log under the same lock, and from its return on
//! nobody else touches it. The migration waits for one step at most, never for the watching, which gives up at once.
//!
//! The guest runs on meanwhile, but for the write faults that a migration would cost it too.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use drover_migration::convergence::Intent;
use drover_migration::forecast::{self, BANDWIDTH_DEFAULT, Facts, Window, Writes};
use drover_migration::vm::PageSet;
use drover_proto::v1::{Forecast, ForecastRequest};
use drover_proto::{Code, Fault};
use tracing::{info, warn};

use crate::machine::Machine;
use crate::memory::{Memory, PAGE};
use crate::vm::Vm;

/// How long after the beginning the log is read: short enough to see a fast writer's rate, long enough to see the whole of
/// what it writes again and again.
const MOMENTS: [Duration; 5] = [
    Duration::from_millis(20),
    Duration::from_millis(60),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_millis(1000),
];
/// A block of `st_blocks`, bytes (stat(2)).
const BLOCK: u64 = 512;

/// The dirty log of a VM.
trait Log {
    fn start(&self) -> Result<(), Fault>;
    fn take(&self, into: &mut PageSet) -> Result<(), Fault>;
    fn stop(&self) -> Result<(), Fault>;
    fn pages(&self) -> u64;
}

impl Log for Vm {
    fn start(&self) -> Result<(), Fault> {
        self.start_dirty_log()
    }

    fn take(&self, into: &mut PageSet) -> Result<(), Fault> {
        self.take_dirty(into)
    }

    fn stop(&self) -> Result<(), Fault> {
        self.stop_dirty_log()
    }

    fn pages(&self) -> u64 {
        self.memory().pages()
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Free,
    Watching,
    Claimed,
}

/// Who has the dirty log.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    state: Mutex<State>,
    changed: Condvar,
}

impl Watch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the watch's lock panics")
    }

    /// A migration takes the log: whoever watches has stopped and switched it off when this returns.
    pub(crate) fn claim(&self, vm: &Vm) {
        self.claim_log(vm);
    }

    fn claim_log(&self, log: &dyn Log) {
        let mut state = self.state();
        if *state == State::Watching {
            info!("a migration begins: the dry run's watching ends");
            stop(log);
        }
        *state = State::Claimed;
        self.changed.notify_all();
    }

    /// The migration's engine has ended.
    pub(crate) fn release(&self) {
        let mut state = self.state();
        if *state == State::Claimed {
            *state = State::Free;
        }
    }

    /// The distinct pages that were written up to each of `moments`, counted from now. Blocks until the last of them.
    fn watch(&self, log: &dyn Log, moments: &[Duration]) -> Result<Vec<Window>, Fault> {
        {
            let mut state = self.state();
            match *state {
                State::Free => log.start()?,
                State::Watching => {
                    let message = "another dry run watches this VM at the moment; ask again in a second";
                    return Err(Fault::new(Code::VmState, message).field("vm"));
                }
                State::Claimed => return Err(claimed("is under way")),
            }
            *state = State::Watching;
        }
        let began = Instant::now();
        let mut written = PageSet::empty(log.pages());
        let mut windows = Vec::with_capacity(moments.len());
        for moment in moments {
            let left = moment.saturating_sub(began.elapsed());
            let waited = self
                .changed
                .wait_timeout_while(self.state(), left, |state| *state == State::Watching);
            let (mut state, _) = waited.expect("no holder of the watch's lock panics");
            if *state != State::Watching {
                return Err(claimed("began"));
            }
            let length = began.elapsed();
            if let Err(fault) = log.take(&mut written) {
                stop(log);
                *state = State::Free;
                return Err(fault);
            }
            windows.push(Window {
                length,
                bytes: written.count() * PAGE,
            });
        }
        let mut state = self.state();
        // Claimed since the last look: then the log is not ours to stop, and all was read before.
        if *state == State::Watching {
            stop(log);
            *state = State::Free;
        }
        Ok(windows)
    }
}

fn stop(log: &dyn Log) {
    if let Err(fault) = log.stop() {
        warn!(%fault, "the dirty log stays on; the guest runs a little slower");
    }
}

fn claimed(what: &str) -> Fault {
    let message = format!("a migration of this VM {what}, and it alone reads what the guest writes");
    Fault::new(Code::MigrationActive, message).field("vm")
}

/// What of the memory is not a hole of its file, bytes.
fn populated(memory: &Memory) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let blocks = memory
        .regions()
        .next()
        .and_then(vm_memory::GuestMemoryRegion::file_offset)
        .and_then(|behind| behind.file().metadata().ok())
        .map(|metadata| metadata.blocks());
    // Unknown counts as all.
    blocks.map_or(memory.bytes(), |blocks| {
        blocks.saturating_mul(BLOCK).min(memory.bytes())
    })
}

/// Watches the guest for about a second, and says how a migration would go.
///
/// # Errors
/// `vm_state`: it does not run, or another dry run watches it. `migration_active`: it is being moved, or began to be.
pub fn make(machine: &Machine, request: &ForecastRequest) -> Result<Forecast, Fault> {
    let vm = machine.watchable()?;
    let windows = machine.watch().watch(vm, &MOMENTS)?;
    // A guest that was frozen or ended meanwhile did not show what it writes.
    machine.watchable()?;
    let (memory, options) = (vm.memory(), request.options.unwrap_or_default());
    let populated = populated(memory);
    let facts = Facts {
        memory: memory.bytes(),
        populated,
        // What it wrote is populated by now; that it goes on into fresh memory is not thought likely.
        writes: Writes::new(&windows, populated),
        bandwidth: match request.bandwidth_bytes_per_s {
            0 => BANDWIDTH_DEFAULT,
            known => known,
        },
        costs: vm.switchover_costs().measured(&options),
    };
    let intent = Intent::of(&options);
    Ok(forecast::forecast(&facts, &intent))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// A log that says what is done to it, and writes another page each time it is read.
    struct Fake {
        done: Mutex<Sender<&'static str>>,
        reads: Mutex<u64>,
        breaks: bool,
    }

    impl Fake {
        fn new(breaks: bool) -> (Self, Receiver<&'static str>) {
            let (done, seen) = channel();
            let fake = Self {
                done: Mutex::new(done),
                reads: Mutex::new(0),
                breaks,
            };
            (fake, seen)
        }

        fn say(&self, what: &'static str) {
            self.done.lock().unwrap().send(what).unwrap();
        }
    }

    impl Log for Fake {
        fn start(&self) -> Result<(), Fault> {
            self.say("start");
            Ok(())
        }

        fn take(&self, into: &mut PageSet) -> Result<(), Fault> {
            self.say("take");
            if self.breaks {
                return Err(Fault::new(Code::GuestKvmFailure, "broken"));
            }
            let mut reads = self.reads.lock().unwrap();
            into.insert(drover_migration::codec::Run {
                first: *reads,
                count: 1,
            });
            *reads += 1;
            Ok(())
        }

        fn stop(&self) -> Result<(), Fault> {
            self.say("stop");
            Ok(())
        }

        fn pages(&self) -> u64 {
            64
        }
    }

    const SHORT: [Duration; 3] = [
        Duration::from_millis(1),
        Duration::from_millis(2),
        Duration::from_millis(3),
    ];
    const NEVER: Duration = Duration::from_secs(3600);

    #[test]
    fn pages_of_all_windows_are_counted_once_and_the_log_is_off_afterwards() {
        let (log, seen) = Fake::new(false);
        let watch = Watch::default();
        let windows = watch.watch(&log, &SHORT).unwrap();
        let bytes: Vec<_> = windows.iter().map(|window| window.bytes / PAGE).collect();
        assert_eq!(bytes, [1, 2, 3]);
        assert!(
            windows
                .iter()
                .zip(SHORT)
                .all(|(window, moment)| window.length >= moment)
        );
        let done: Vec<_> = seen.try_iter().collect();
        assert_eq!(done, ["start", "take", "take", "take", "stop"]);
        assert_eq!(*watch.state(), State::Free);
    }

    #[test]
    fn a_migration_ends_the_watching_at_once_and_nobody_touches_the_log_beside_it() {
        let (log, seen) = Fake::new(false);
        let (log, watch) = (Arc::new(log), Arc::new(Watch::default()));
        let (one, other) = (log.clone(), watch.clone());
        let watching = std::thread::spawn(move || other.watch(&*one, &[Duration::ZERO, NEVER]));
        assert_eq!(
            (seen.recv().unwrap(), seen.recv().unwrap()),
            ("start", "take"),
            "then it waits for an hour"
        );
        watch.claim_log(&*log);
        assert_eq!(seen.recv().unwrap(), "stop", "before the claim returned");
        assert_eq!(watching.join().unwrap().unwrap_err().code, Code::MigrationActive);
        let refused = watch.watch(&*log, &SHORT).unwrap_err();
        assert_eq!(refused.code, Code::MigrationActive);
        assert!(seen.try_recv().is_err(), "the log is the migration's");
        watch.release();
        assert!(watch.watch(&*log, &SHORT).is_ok());
    }

    #[test]
    fn two_dry_runs_do_not_share_a_log() {
        let (log, seen) = Fake::new(false);
        let (log, watch) = (Arc::new(log), Arc::new(Watch::default()));
        let (one, other) = (log.clone(), watch.clone());
        let watching = std::thread::spawn(move || other.watch(&*one, &[NEVER]));
        assert_eq!(seen.recv().unwrap(), "start");
        // The lock is held from before `start` until the state is set.
        assert_eq!(watch.watch(&*log, &SHORT).unwrap_err().code, Code::VmState);
        watch.claim_log(&*log);
        assert!(watching.join().unwrap().is_err());
    }

    #[test]
    fn a_log_that_breaks_is_switched_off() {
        let (log, seen) = Fake::new(true);
        let watch = Watch::default();
        assert_eq!(watch.watch(&log, &SHORT).unwrap_err().code, Code::GuestKvmFailure);
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), ["start", "take", "stop"]);
        assert_eq!(*watch.state(), State::Free);
    }
}
