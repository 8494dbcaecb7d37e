//! The background tasks: one file each, run by the leader only.
//!
//! ```text
//!   woken by a change of the state, and once a period ──> decide(state, now) ──> commands ──> the log
//!          ^                                                                                   │
//!          └───────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! A task is level-triggered: it looks at the whole state and says what is missing, so it does not matter what it has
//! seen before, nor how often it looks. It does not retry: the next look is the retry. What it decides is pure and tested
//! as such; `apply` checks every command again, so one that was decided on an old state is refused, not obeyed.

pub mod leases;
pub mod migrations;
pub mod placement;
pub mod restarts;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use drover_proto::v1::Command;
use drover_proto::v1::command::Kind;
use drover_proto::{Code, Fault};
use drover_state::State;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tracing::{debug, info};

use crate::api::{LeaderMemory, reach};
use crate::consensus::Consensus;

/// Pause after a command was refused, so that two views of the state cannot chase each other through the log.
const REFUSED_PAUSE: Duration = Duration::from_millis(200);
/// Commands of one look; the next look finds the rest.
const COMMANDS_AT_ONCE_MAX: usize = 256;

/// What time it is, for deciding.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// For lengths of time: never goes back.
    pub instant: Instant,
    /// For comparing with what the log says: Unix milliseconds.
    pub unix_ms: u64,
}

/// One background task.
trait Reconciler: Send + 'static {
    const NAME: &'static str;
    /// It looks at least this often.
    const PERIOD: Duration;

    /// This controller begins to lead in `term`.
    fn begin(&mut self, _term: u64) {}
    /// What is missing.
    fn decide(&mut self, state: &State, now: Now) -> Vec<Kind>;
    /// A command of the last look was applied, refused, or lost (`no_leader`: its fate is unknown).
    fn settled(&mut self, _kind: &Kind, _outcome: &Result<(), Fault>) {}
}

/// Starts all tasks. They end when the consensus does, or when the set is dropped.
pub fn spawn(consensus: &Consensus, memory: &Arc<LeaderMemory>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(run(consensus.clone(), leases::Leases::new(memory.clone())));
    tasks.spawn(run(consensus.clone(), placement::Placement));
    tasks.spawn(run(consensus.clone(), restarts::Restarts));
    tasks.spawn(run(
        consensus.clone(),
        migrations::Migrations::new(memory.clone()),
    ));
    tasks
}

async fn run<R: Reconciler>(consensus: Consensus, mut task: R) {
    let mut leadership = consensus.leadership();
    let mut changed = consensus.changed();
    let mut period = interval(R::PERIOD);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let Ok(term) = leadership.wait_for(Option::is_some).await.map(|term| *term) else {
            return;
        };
        let Some(term) = term else { continue };
        debug!(task = R::NAME, term, "begins");
        task.begin(term);
        while *leadership.borrow_and_update() == Some(term) {
            changed.borrow_and_update();
            if look(&consensus, &mut task).await.is_err() {
                sleep(REFUSED_PAUSE).await;
                continue;
            }
            tokio::select! {
                alive = changed.changed() => if alive.is_err() { return },
                alive = leadership.changed() => if alive.is_err() { return },
                _ = period.tick() => {}
            }
        }
    }
}

/// One look. An error when a command did not get through.
async fn look<R: Reconciler>(consensus: &Consensus, task: &mut R) -> Result<(), ()> {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = Now {
        instant: Instant::now(),
        unix_ms: u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX),
    };
    let commands = consensus.read(|state| task.decide(state, now));
    let mut all_applied = Ok(());
    for kind in commands.into_iter().take(COMMANDS_AT_ONCE_MAX) {
        info!(task = R::NAME, command = ?kind, "proposes");
        let command = Command {
            caller: "leader".to_owned(),
            kind: Some(kind.clone()),
            ..Command::default()
        };
        if let Some(point) = pause_point(&kind) {
            reach(point).await;
        }
        let outcome = consensus
            .propose(command)
            .await
            .and_then(drover_state::into_result)
            .map(|_| ());
        task.settled(&kind, &outcome);
        if let Err(fault) = outcome {
            debug!(task = R::NAME, %fault, "did not get through");
            all_applied = Err(());
            if fault.code == Code::NoLeader {
                break;
            }
        }
    }
    all_applied
}

/// Where a test can hold the leader before it takes this step of a migration.
fn pause_point(kind: &Kind) -> Option<&'static str> {
    match kind {
        Kind::AdvanceMigration(_) => Some("controller.before_prepare"),
        Kind::AbortMigration(_) => Some("controller.before_abort"),
        Kind::FinishMigration(_) => Some("controller.before_finish"),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests_support {
    //! A state to decide on.

    use drover_proto::v1::{HostCapacity, HostSpec, Image, VmSpec};

    use super::*;

    pub(crate) fn now() -> Now {
        Now {
            instant: Instant::now(),
            unix_ms: 0,
        }
    }

    pub(crate) fn apply(state: &mut State, kind: Kind) {
        let command = Command {
            kind: Some(kind),
            ..Command::default()
        };
        drover_state::into_result(drover_state::apply(state, &command).0)
            .expect("the test's command is valid");
    }

    /// host1, host2 and host3, 1 GiB each.
    pub(crate) fn cluster() -> State {
        let mut state = State::default();
        for name in ["host1", "host2", "host3"] {
            let image = Image {
                name: "probe".into(),
                kind: "elf-pvh".into(),
                ..Image::default()
            };
            let spec = HostSpec {
                name: name.into(),
                agent_addr: "127.0.0.1:1".into(),
                migration_ip: "127.0.0.1".into(),
                capacity: Some(HostCapacity {
                    cpus: 2,
                    memory_mib: 1_024,
                }),
                images: vec![image],
                ..HostSpec::default()
            };
            apply(&mut state, Kind::RegisterHost(spec));
        }
        state
    }

    pub(crate) fn vm_spec(name: &str, memory_mib: u64) -> VmSpec {
        VmSpec {
            name: name.into(),
            vcpus: 1,
            memory_mib,
            kernel: "probe".into(),
            ..VmSpec::default()
        }
    }
}
