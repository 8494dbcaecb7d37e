//! Linearizable reads (Raft dissertation §6.4, ReadIndex), shared.
//!
//! ```text
//! callers   a   b c        d
//!           │   └─┴─ wait ─┴───────┐
//! rounds    ├── round 1 ──┤├── round 2 ──┤      a round serves exactly those who called before it began
//! ```

use std::time::Duration;

use drover_proto::{Code, Fault};
use openraft::error::{CheckIsLeaderError, RaftError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

use super::types::Raft;

/// Callers that may wait for one round.
const WAITING_MAX: usize = 4096;
/// A round, with its repetitions, takes at most this long. openraft gives the members one heartbeat's time to answer,
/// which a busy machine may miss once.
const ROUND_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause between the repetitions.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

type Caller = oneshot::Sender<Result<(), Fault>>;

/// The handle on the task that runs the rounds.
#[derive(Clone)]
pub(crate) struct Rounds {
    callers: mpsc::Sender<Caller>,
}

impl Rounds {
    /// The handle, and the task to spawn.
    pub(crate) fn new(raft: Raft) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (callers, waiting) = mpsc::channel(WAITING_MAX);
        (Self { callers }, serve(waiting, move || confirm(raft.clone())))
    }

    /// See [`super::Consensus::linearize`].
    pub(crate) async fn linearize(&self) -> Result<(), Fault> {
        let stopped = || Fault::new(Code::NoLeader, "this controller is shutting down");
        let (caller, confirmed) = oneshot::channel();
        self.callers.send(caller).await.map_err(|_| stopped())?;
        confirmed.await.map_err(|_| stopped())?
    }
}

/// Runs a round for all who wait when it begins, then the next.
async fn serve<F: Future<Output = Result<(), Fault>>>(
    mut waiting: mpsc::Receiver<Caller>,
    round: impl Fn() -> F,
) {
    let mut served = Vec::new();
    while waiting.recv_many(&mut served, WAITING_MAX).await > 0 {
        let confirmed = round().await;
        for caller in served.drain(..) {
            // A caller that went away meanwhile needs no answer.
            let _ = caller.send(confirmed.clone());
        }
    }
}

async fn confirm(raft: Raft) -> Result<(), Fault> {
    let deadline = Instant::now() + ROUND_TIMEOUT;
    loop {
        let failed = match timeout_at(deadline, raft.ensure_linearizable()).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(to)))) => {
                return Err(super::not_leader(to.leader_node.as_ref()));
            }
            Ok(Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(missing)))) => {
                format!("only {:?} of {} answered", missing.got, missing.cluster)
            }
            Ok(Err(RaftError::Fatal(error))) => {
                return Err(Fault::new(
                    Code::NoLeader,
                    format!("this controller has stopped: {error}"),
                ));
            }
            Err(_) => "the state machine lags behind".to_owned(),
        };
        if Instant::now() + RETRY_PAUSE >= deadline {
            let message = format!("this controller could not confirm that it leads: {failed}; try again");
            return Err(Fault::new(Code::NoLeader, message));
        }
        sleep(RETRY_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::sync::Semaphore;

    use super::*;

    /// Rounds that end when a permit is given; `begun` counts their beginnings.
    struct Stage {
        rounds: Rounds,
        begun: Arc<AtomicU64>,
        ends: Arc<Semaphore>,
    }

    fn stage() -> Stage {
        let (callers, waiting) = mpsc::channel(WAITING_MAX);
        let (begun, ends) = (Arc::new(AtomicU64::new(0)), Arc::new(Semaphore::new(0)));
        let (count, end) = (begun.clone(), ends.clone());
        tokio::spawn(serve(waiting, move || {
            count.fetch_add(1, Ordering::SeqCst);
            let end = end.clone();
            async move {
                end.acquire().await.expect("never closed").forget();
                Ok(())
            }
        }));
        Stage {
            rounds: Rounds { callers },
            begun,
            ends,
        }
    }

    async fn until(condition: impl Fn() -> bool) {
        while !condition() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn callers_share_the_round_that_begins_after_they_called() {
        let Stage { rounds, begun, ends } = stage();
        let call = || {
            let rounds = rounds.clone();
            tokio::spawn(async move { rounds.linearize().await })
        };
        let first = call();
        until(|| begun.load(Ordering::SeqCst) == 1).await;
        let late: Vec<_> = (0..50).map(|_| call()).collect();
        until(|| rounds.callers.capacity() == WAITING_MAX - 50).await;

        ends.add_permits(1);
        assert_eq!(first.await.unwrap(), Ok(()));
        until(|| begun.load(Ordering::SeqCst) == 2).await;
        assert!(
            late.iter().all(|caller| !caller.is_finished()),
            "round 1 began before they called"
        );

        ends.add_permits(1);
        for caller in late {
            assert_eq!(caller.await.unwrap(), Ok(()));
        }
        assert_eq!(begun.load(Ordering::SeqCst), 2, "fifty callers, one round");
    }

    #[tokio::test]
    async fn a_caller_is_told_when_the_task_has_ended() {
        let (callers, waiting) = mpsc::channel(1);
        drop(waiting);
        assert_eq!(
            Rounds { callers }.linearize().await.unwrap_err().code,
            Code::NoLeader
        );
    }
}
