//! When each host was last heard of: in the leader's memory only, since a new leader starts all hosts at a full lease.
//!
//! ```text
//!   heartbeat: note(received) -> confirm with a quorum -> refuse if `may_answer` says no -> read the state -> answer
//!   watcher:   expired for lease + margin -> begin_down -> entry HostDown -> finish_down
//! ```
//!
//! The order is what makes it safe. A heartbeat that was received before `begin_down` can only grant until its sending +
//! lease, and that is over, since `begin_down` asks for more. One that is received later is not answered until the
//! HostDown entry has been applied, and then it reads a state in which the host is down.
//!
//! What it does not do: it never looks at a clock; who calls says what time it is.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use drover_state::limits::HOSTS_MAX;

/// The leases of all hosts as the leader of one term sees them.
#[derive(Debug, Default)]
pub struct Leases {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    term: u64,
    hosts: BTreeMap<String, Lease>,
}

#[derive(Debug)]
struct Lease {
    /// When the newest renewal was received; or when this leader first looked.
    received: Instant,
    /// A HostDown entry is on its way: nothing is granted until it has been applied.
    going_down: bool,
}

impl Leases {
    /// A renewal of the host was received at `now`, by the leader of `term`.
    pub fn note(&self, term: u64, host: &str, now: Instant) {
        if let Some(lease) = self
            .of_term(term)
            .as_mut()
            .and_then(|table| table.lease(host, now))
        {
            lease.received = lease.received.max(now);
        }
    }

    /// Whether a renewal may be answered with grants. Ask after the quorum's word and before reading the state.
    pub fn may_answer(&self, term: u64, host: &str) -> bool {
        let table = self.of_term(term);
        let lease = table.as_ref().and_then(|table| table.hosts.get(host));
        lease.is_some_and(|lease| !lease.going_down)
    }

    /// Those of `hosts` (name, whether it is up in the state) that were not heard of for `patience` (lease + margin), and
    /// those whose HostDown entry has an unknown fate. Each is held from here on: it gets no grants until
    /// [`Leases::finish_down`].
    pub fn begin_down<'a>(
        &self,
        term: u64,
        hosts: impl IntoIterator<Item = (&'a str, bool)>,
        patience: Duration,
        now: Instant,
    ) -> Vec<String> {
        let mut table = self.of_term(term);
        let Some(table) = table.as_mut() else {
            return Vec::new();
        };
        let mut expired = Vec::new();
        for (host, up) in hosts {
            let Some(lease) = table.lease(host, now) else {
                continue;
            };
            if lease.going_down || (up && now.saturating_duration_since(lease.received) > patience) {
                lease.going_down = true;
                expired.push(host.to_owned());
            }
        }
        expired
    }

    /// The HostDown entry was applied, or certainly never will be.
    pub fn finish_down(&self, term: u64, host: &str) {
        let mut table = self.of_term(term);
        if let Some(lease) = table.as_mut().and_then(|table| table.hosts.get_mut(host)) {
            lease.going_down = false;
        }
    }

    /// The table, emptied when the term is a newer one: what an earlier leadership knew is worth nothing. `None` for a
    /// term that is over.
    fn of_term(&self, term: u64) -> OfTerm<'_> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.term < term {
            *table = Table {
                term,
                hosts: BTreeMap::new(),
            };
        }
        let current = table.term == term;
        OfTerm { table, current }
    }
}

/// The locked table, visible only to callers of its term.
struct OfTerm<'a> {
    table: MutexGuard<'a, Table>,
    current: bool,
}

impl OfTerm<'_> {
    fn as_ref(&self) -> Option<&Table> {
        self.current.then_some(&*self.table)
    }

    fn as_mut(&mut self) -> Option<&mut Table> {
        self.current.then_some(&mut *self.table)
    }
}

impl Table {
    /// The host's lease, begun now when it was never seen in this term. `None` when the table is full.
    fn lease(&mut self, host: &str, now: Instant) -> Option<&mut Lease> {
        if !self.hosts.contains_key(host) {
            if self.hosts.len() >= 2 * HOSTS_MAX {
                return None;
            }
            self.hosts.insert(
                host.to_owned(),
                Lease {
                    received: now,
                    going_down: false,
                },
            );
        }
        self.hosts.get_mut(host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(5_500);

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn a_host_is_given_up_only_after_its_lease_and_the_margin() {
        let (leases, start) = (Leases::default(), Instant::now());
        leases.note(1, "host1", start);
        assert!(
            leases
                .begin_down(1, [("host1", true)], PATIENCE, at(start, 5_500))
                .is_empty()
        );
        assert_eq!(
            leases.begin_down(1, [("host1", true)], PATIENCE, at(start, 5_501)),
            ["host1"]
        );
    }

    #[test]
    fn a_new_leader_waits_a_full_lease_for_a_host_that_it_never_heard() {
        let (leases, start) = (Leases::default(), Instant::now());
        leases.note(1, "host1", start);
        assert!(
            leases
                .begin_down(2, [("host1", true)], PATIENCE, at(start, 60_000))
                .is_empty()
        );
        assert!(
            leases
                .begin_down(2, [("host1", true)], PATIENCE, at(start, 65_500))
                .is_empty()
        );
        assert_eq!(
            leases.begin_down(2, [("host1", true)], PATIENCE, at(start, 65_501)),
            ["host1"]
        );
    }

    #[test]
    fn a_renewal_that_comes_while_the_host_is_declared_down_is_not_answered_until_it_is() {
        let (leases, start) = (Leases::default(), Instant::now());
        leases.note(1, "host1", start);
        assert!(leases.may_answer(1, "host1"));
        leases.begin_down(1, [("host1", true)], PATIENCE, at(start, 6_000));
        leases.note(1, "host1", at(start, 6_001));
        assert!(!leases.may_answer(1, "host1"));
        assert_eq!(
            leases.begin_down(1, [("host1", true)], PATIENCE, at(start, 6_002)),
            ["host1"],
            "an entry whose fate is unknown is proposed again"
        );
        assert_eq!(
            leases.begin_down(1, [("host1", false)], PATIENCE, at(start, 6_002)),
            ["host1"],
            "also when it has been applied without our knowing"
        );
        leases.finish_down(1, "host1");
        assert!(leases.may_answer(1, "host1"));
        assert!(
            leases
                .begin_down(1, [("host1", true)], PATIENCE, at(start, 6_003))
                .is_empty()
        );
    }

    #[test]
    fn a_renewal_noted_in_another_term_is_not_answered() {
        let (leases, start) = (Leases::default(), Instant::now());
        leases.note(1, "host1", start);
        assert!(!leases.may_answer(2, "host1"));
        leases.note(2, "host1", start);
        assert!(
            !leases.may_answer(1, "host1"),
            "and the old term does not come back"
        );
        assert!(leases.may_answer(2, "host1"));
    }
}
