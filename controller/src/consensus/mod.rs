//! The replicated log, as the rest of the controller sees it: propose a command, know that a read is current, read,
//! and hear of changes. The only user of openraft; none of its types leaves this module.

use drover_proto::{Code, Fault, v1};
use drover_state::State;
use tokio::sync::watch;

/// A controller, as the membership in the log names it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Its id in the Raft group.
    pub id: u64,
    /// Its name; its certificate is for `<name>.controller.drover`.
    pub name: String,
    /// `ip:port` where it listens.
    pub addr: String,
}

/// What `GetCluster` tells of the Raft group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// The current term.
    pub term: u64,
    /// The log is applied up to this index on this member.
    pub applied: u64,
    /// The leader, if one is known here.
    pub leader: Option<Peer>,
    /// Every member with its role; `matched` and "unreachable" only where the leader answers.
    pub members: Vec<v1::Member>,
}

/// A handle on the replicated log. Cheap to clone.
#[derive(Clone)]
pub struct Consensus {
    me: Peer,
    applied: watch::Receiver<u64>,
    leading: watch::Receiver<Option<u64>>,
}

impl Consensus {
    /// Replicates `command` and returns what applying it answered. Stamps `now_ms`.
    ///
    /// # Errors
    /// `no_leader` when this member does not lead (the message names the leader) or no quorum answers in time: then the
    /// outcome is unknown, and the same `request_id` may be sent again. Else the refusal of `apply`, code and field kept.
    pub async fn propose(&self, _command: v1::Command) -> Result<v1::CommandResponse, Fault> {
        Err(Fault::new(Code::NoLeader, "not built yet"))
    }

    /// Returns once [`Self::read`] on this member sees everything that was committed before this call. Concurrent
    /// callers share one round, which started after each of them called.
    ///
    /// # Errors
    /// `no_leader` when this member does not lead, or could not confirm in time that it does.
    pub async fn linearize(&self) -> Result<(), Fault> {
        Err(Fault::new(Code::NoLeader, "not built yet"))
    }

    /// Reads the state as applied on this member. `look` must be short: applying waits for it.
    pub fn read<R>(&self, look: impl FnOnce(&State) -> R) -> R {
        look(&State::default())
    }

    /// The applied index; changes with every batch of entries applied.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.applied.clone()
    }

    /// Whether this member believes that it leads. [`Self::linearize`] makes sure of it.
    pub fn is_leader(&self) -> bool {
        self.leading.borrow().is_some()
    }

    /// The term this member leads in, else `None`. Set only after it has applied all that earlier leaders committed.
    pub fn leadership(&self) -> watch::Receiver<Option<u64>> {
        self.leading.clone()
    }

    /// The leader, if one is known here.
    pub fn leader(&self) -> Option<Peer> {
        None
    }

    /// This member.
    pub fn me(&self) -> &Peer {
        &self.me
    }

    /// What `GetCluster` tells.
    pub fn status(&self) -> Status {
        Status::default()
    }
}
