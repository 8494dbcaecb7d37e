//! Declares a host down when its lease and the drift margin have passed since its last renewal was received.
//!
//! A fresh leader has heard of nobody, so it waits a full lease and margin for everybody. While a HostDown entry is on its
//! way, the host is granted nothing: see `api::leases` for why.
//!
//! What it does not do: it never raises a host; the host's own heartbeat does.

use std::sync::Arc;
use std::time::Duration;

use drover_proto::v1::command::Kind;
use drover_proto::v1::{HostDown, HostState};
use drover_proto::{Code, Fault};
use drover_state::State;

use super::{Now, Reconciler};
use crate::api::LeaderMemory;

pub(super) struct Leases {
    memory: Arc<LeaderMemory>,
    term: u64,
}

impl Leases {
    pub(super) fn new(memory: Arc<LeaderMemory>) -> Self {
        Self { memory, term: 0 }
    }
}

impl Reconciler for Leases {
    const NAME: &'static str = "leases";
    const PERIOD: Duration = Duration::from_millis(100);

    fn begin(&mut self, term: u64) {
        self.term = term;
    }

    fn decide(&mut self, state: &State, now: Now) -> Vec<Kind> {
        let settings = state.settings();
        let patience = Duration::from_millis(settings.lease_ms.saturating_add(settings.drift_margin_ms));
        let hosts = state.hosts().filter_map(|host| {
            let spec = host.spec.as_ref()?;
            Some((spec.name.as_str(), host.state() == HostState::Up))
        });
        let expired = self
            .memory
            .leases
            .begin_down(self.term, hosts, patience, now.instant);
        expired
            .into_iter()
            .map(|host| Kind::HostDown(HostDown { host }))
            .collect()
    }

    fn settled(&mut self, kind: &Kind, outcome: &Result<(), Fault>) {
        let unknown = matches!(outcome, Err(fault) if fault.code == Code::NoLeader);
        if let Kind::HostDown(down) = kind
            && !unknown
        {
            self.memory.leases.finish_down(self.term, &down.host);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::reconcile::tests_support::{apply, cluster};

    #[test]
    fn a_silent_host_is_declared_down_once_its_lease_and_margin_have_passed() {
        let mut state = cluster();
        let mut task = Leases::new(Arc::default());
        task.begin(3);
        let start = Instant::now();
        let at = |ms| Now {
            instant: start + Duration::from_millis(ms),
            unix_ms: 0,
        };
        assert!(
            task.decide(&state, at(0)).is_empty(),
            "a fresh leader has heard of nobody and waits"
        );
        for host in ["host2", "host3"] {
            task.memory
                .leases
                .note(3, host, start + Duration::from_millis(1_000));
        }
        assert!(task.decide(&state, at(5_500)).is_empty());
        let commands = task.decide(&state, at(5_501));
        assert_eq!(commands, [Kind::HostDown(HostDown { host: "host1".into() })]);
        apply(&mut state, commands[0].clone());
        task.settled(&commands[0], &Ok(()));
        assert!(task.decide(&state, at(5_502)).is_empty());
    }

    #[test]
    fn an_entry_whose_fate_is_unknown_is_proposed_again_until_it_is_known() {
        let mut state = cluster();
        let mut task = Leases::new(Arc::default());
        task.begin(1);
        let start = Instant::now();
        let at = |ms| Now {
            instant: start + Duration::from_millis(ms),
            unix_ms: 0,
        };
        task.decide(&state, at(0));
        let commands = task.decide(&state, at(6_000));
        assert_eq!(commands.len(), 3);
        for kind in &commands {
            task.settled(kind, &Err(Fault::new(Code::NoLeader, "no quorum")));
            apply(&mut state, kind.clone());
        }
        assert!(!task.memory.leases.may_answer(1, "host1"));
        assert_eq!(
            task.decide(&state, at(6_001)),
            commands,
            "applied or not, only an answer ends it"
        );
        task.settled(&commands[0], &Ok(()));
        assert!(task.memory.leases.may_answer(1, "host1"));
    }
}
