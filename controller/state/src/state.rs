//! The state itself and how it is read. Only `apply` writes it.

use std::collections::{BTreeMap, VecDeque};

use drover_proto::v1::{
    Blackout, Event, Host, HostState, Migration, MigrationPhase, Network, RequestRecord, Settings, Snapshot,
    Vm, VmSpec, VmState, Volume,
};

use crate::snapshots::Removals;

/// The replicated state of one cluster. Equal logs give equal states, byte for byte once encoded.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    pub(crate) cluster_id: String,
    pub(crate) settings: Settings,
    pub(crate) hosts: BTreeMap<String, Host>,
    pub(crate) vms: BTreeMap<String, Vm>,
    pub(crate) volumes: BTreeMap<String, Volume>,
    pub(crate) networks: BTreeMap<String, Network>,
    pub(crate) snapshots: BTreeMap<u64, Snapshot>,
    pub(crate) removals: Removals,
    pub(crate) migrations: BTreeMap<u64, Migration>,
    pub(crate) events: VecDeque<Event>,
    pub(crate) requests: Requests,
    pub(crate) retired: BTreeMap<String, u64>,
    pub(crate) epoch_floor: u64,
    pub(crate) next_migration: u64,
    pub(crate) next_event: u64,
    pub(crate) next_snapshot: u64,
}

/// The newest answers by request id, oldest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Requests {
    pub(crate) order: VecDeque<String>,
    pub(crate) by_id: BTreeMap<String, RequestRecord>,
}

/// What is taken of a host: by VMs placed there, and by migrations that will bring one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// VMs placed there, without those still to come.
    pub vms: u32,
}

impl Default for State {
    fn default() -> Self {
        Self {
            cluster_id: String::new(),
            settings: default_settings(),
            hosts: BTreeMap::new(),
            vms: BTreeMap::new(),
            volumes: BTreeMap::new(),
            networks: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            removals: Removals::new(),
            migrations: BTreeMap::new(),
            events: VecDeque::new(),
            requests: Requests::default(),
            retired: BTreeMap::new(),
            epoch_floor: 0,
            next_migration: 1,
            next_event: 1,
            next_snapshot: 1,
        }
    }
}

impl State {
    /// The cluster's id; empty until the cluster is formed.
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// The cluster's settings, complete.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// All hosts, by name. Their usage is not filled in: see [`State::usages`].
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values()
    }

    /// One host.
    pub fn host(&self, name: &str) -> Option<&Host> {
        self.hosts.get(name)
    }

    /// Whether the host is known and not declared down.
    pub fn host_is_up(&self, name: &str) -> bool {
        self.host(name).is_some_and(|host| host.state() == HostState::Up)
    }

    /// All VMs, by name.
    pub fn vms(&self) -> impl Iterator<Item = &Vm> {
        self.vms.values()
    }

    /// One VM.
    pub fn vm(&self, name: &str) -> Option<&Vm> {
        self.vms.get(name)
    }

    /// All migrations that are kept, oldest first.
    pub fn migrations(&self) -> impl DoubleEndedIterator<Item = &Migration> {
        self.migrations.values()
    }

    /// One migration, by its id ("m7").
    pub fn migration(&self, id: &str) -> Option<&Migration> {
        self.migrations.get(&migration_number(id)?)
    }

    /// At most `limit` events after `seq`, oldest first.
    pub fn events_after(&self, seq: u64, limit: usize) -> impl Iterator<Item = &Event> {
        let from = self.events.partition_point(|event| event.seq <= seq);
        self.events.range(from..).take(limit)
    }

    /// The newest event's number, 0 before the first.
    pub fn last_event(&self) -> u64 {
        self.next_event - 1
    }

    /// What is taken of every host that has anything.
    pub fn usages(&self) -> BTreeMap<&str, Usage> {
        let mut usages: BTreeMap<&str, Usage> = BTreeMap::new();
        for vm in self.vms.values().filter(|vm| occupies(vm)) {
            let usage = usages.entry(host_of(vm)).or_default();
            usage.add(spec_of(vm));
            usage.vms += 1;
        }
        for migration in self.migrations_under_way() {
            let host = match migration.phase() {
                // An upgrade's two VMMs have one memory, and only one of them runs.
                _ if migration.is_upgrade() => continue,
                // In a post-copy the source's memory is still needed.
                MigrationPhase::PostCopy => migration.from.as_str(),
                _ if is_committed(migration) => continue,
                _ => migration.to.as_str(),
            };
            if let Some(vm) = self.vm(&migration.vm) {
                usages.entry(host).or_default().add(spec_of(vm));
            }
        }
        usages
    }

    /// Migrations that have not ended.
    pub fn migrations_under_way(&self) -> impl Iterator<Item = &Migration> {
        self.vms
            .values()
            .filter(|vm| !vm.migration.is_empty())
            .filter_map(|vm| self.migration(&vm.migration))
    }
}

impl Usage {
    pub(crate) fn add(&mut self, spec: &VmSpec) {
        self.memory_mib = self.memory_mib.saturating_add(spec.memory_mib);
        self.vcpus = self.vcpus.saturating_add(spec.vcpus);
    }
}

/// The settings of a cluster that names none.
pub fn default_settings() -> Settings {
    Settings {
        lease_ms: 5_000,
        drift_margin_ms: 500,
        heartbeat_ms: 1_000,
        max_downtime_ms: 100,
        prepare_timeout_ms: 20_000,
        stall_timeout_ms: 15_000,
        switchover_timeout_ms: 10_000,
        allow_plaintext: false,
    }
}

/// What commit and resume took in the last migrations of the cluster, µs, for the next one's stop rule.
pub fn commit_us(state: &State) -> u32 {
    lately(state, 40_000, |blackout| {
        blackout.commit.saturating_add(blackout.resume)
    })
}

/// What stopping the vCPUs took in the last migrations of the cluster, µs.
pub fn pause_us(state: &State) -> u32 {
    lately(state, 20_000, |blackout| blackout.pause)
}

/// What saving and restoring the state took in the last migrations of the cluster, µs.
pub fn state_us(state: &State) -> u32 {
    lately(state, 20_000, |blackout| blackout.state)
}

/// A part of the last migrations' blackouts, µs; 0 as long as there was none. The second largest of eight: one that met an election
/// or a busy moment says nothing about the next. And no more than `most_us`: after a bad hour migrations must go on, or nobody would
/// ever measure a better one.
fn lately(state: &State, most_us: u32, part: impl Fn(&Blackout) -> u64) -> u32 {
    const LAST: usize = 8;
    let parts = state.migrations.values().rev().filter_map(|migration| {
        let took = part(migration.receipt.as_ref()?.blackout_us.as_ref()?);
        Some(u32::try_from(took).unwrap_or(most_us).min(most_us))
    });
    let mut taken: Vec<u32> = parts.take(LAST).collect();
    taken.sort_unstable_by(|one, other| other.cmp(one));
    taken.get(1).or(taken.first()).copied().unwrap_or(0)
}

/// The number in a migration's id, `None` when it is not of the form "m7".
pub fn migration_number(id: &str) -> Option<u64> {
    let digits = id.strip_prefix('m')?;
    let canonical = !digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit());
    if canonical { digits.parse().ok() } else { None }
}

/// The VM's placement's run epoch.
pub fn epoch_of(vm: &Vm) -> u64 {
    vm.placement.as_ref().map_or(0, |placement| placement.epoch)
}

/// The VM's placement's host, empty when it was never placed.
pub fn host_of(vm: &Vm) -> &str {
    vm.placement
        .as_ref()
        .map_or("", |placement| placement.host.as_str())
}

pub(crate) fn spec_of(vm: &Vm) -> &VmSpec {
    vm.spec
        .as_ref()
        .expect("every VM in the state was created with a spec")
}

/// Whether the VM takes room on its host: a VMM may exist there that has the right to run, or is not yet reported gone.
pub fn occupies(vm: &Vm) -> bool {
    matches!(
        vm.state(),
        VmState::Starting | VmState::Running | VmState::Paused | VmState::Stopping | VmState::Unknown
    )
}

/// Whether the migration's hand-over is in the log: there is no way back.
pub fn is_committed(migration: &Migration) -> bool {
    matches!(
        migration.phase(),
        MigrationPhase::Committed | MigrationPhase::PostCopy | MigrationPhase::Done
    )
}

/// Whether the migration is over, one way or the other.
pub fn is_ended(migration: &Migration) -> bool {
    matches!(migration.phase(), MigrationPhase::Done | MigrationPhase::Aborted)
}
