//! Gauges of what is so now, made anew at each scrape: nothing is kept, so no series outlives what it is about.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use drover_proto::v1::{HostState, Migration, MigrationPhase, Progress, StreamProgress, VmState};
use drover_state::State;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet};
use prometheus_client::metrics::MetricType;

use crate::api::LeaderMemory;
use crate::consensus::Consensus;

/// Migrations under way that are told one by one, the oldest; each makes up to 75 series. All are counted by phase.
const MIGRATIONS_MAX: usize = 256;

type Labels = Vec<(&'static str, String)>;

/// Name, what it is, and how it is read off a migration's progress.
type Figure<T> = (&'static str, &'static str, fn(&T) -> Option<f64>);

const FIGURES: [Figure<Progress>; 8] = [
    ("migration_round", "Round over the dirty pages", |p| {
        Some(p.round.into())
    }),
    ("migration_sent_bytes", "Bytes on the wire so far", |p| {
        Some(p.bytes_sent as f64)
    }),
    ("migration_memory_bytes", "Guest memory", |p| {
        Some(p.bytes_total as f64)
    }),
    (
        "migration_remaining_bytes",
        "Guest memory known to be dirty or unsent",
        |p| Some(p.bytes_remaining as f64),
    ),
    (
        "migration_dirty_bytes_per_second",
        "How fast the guest makes pages dirty",
        |p| Some(p.dirty_bytes_per_s as f64),
    ),
    (
        "migration_bandwidth_bytes_per_second",
        "What the link carries; absent until it was measured",
        |p| Some(p.bandwidth_bytes_per_s as f64).filter(|&rate| rate > 0.0),
    ),
    (
        "migration_throttle_ratio",
        "Share of its time that each vCPU is held back, 0 to 1",
        |p| Some(f64::from(p.throttle_percent) / 100.0),
    ),
    (
        "migration_eta_seconds",
        "Expected until all pages are sent; absent while the guest writes faster than the link carries",
        |p| Some(seconds(p.eta_ms)).filter(|&eta| eta > 0.0),
    ),
];

const STREAM_FIGURES: [Figure<StreamProgress>; 4] = [
    ("migration_stream_sent_bytes", "Bytes on one stream so far", |s| {
        Some(s.bytes as f64)
    }),
    (
        "migration_stream_bytes_per_second",
        "What one stream carries",
        |s| Some(s.bytes_per_s as f64),
    ),
    (
        "migration_stream_queued_pages",
        "Pages that one stream has taken on and not written",
        |s| Some(s.pages_queued as f64),
    ),
    (
        "migration_stream_stalled_seconds",
        "For how long nothing went out on one stream that has something to write",
        |s| Some(seconds(s.stalled_ms)),
    ),
];

/// See the module.
pub(super) struct Live {
    consensus: Consensus,
    memory: Arc<LeaderMemory>,
}

impl Live {
    pub(super) fn new(consensus: Consensus, memory: Arc<LeaderMemory>) -> Self {
        Self { consensus, memory }
    }
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live").finish_non_exhaustive()
    }
}

impl Collector for Live {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let leads = self.consensus.leadership().borrow().is_some();
        let status = self.consensus.status();
        let of_itself = [
            (
                "controller_leader",
                "1 on the controller that leads",
                f64::from(u8::from(leads)),
            ),
            ("raft_term", "Raft's term", status.term as f64),
            (
                "raft_applied_index",
                "The log is applied up to here",
                status.applied as f64,
            ),
        ];
        for (name, help, value) in of_itself {
            let mut gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            gauge.encode_gauge(&value)?;
        }
        if !leads {
            return Ok(());
        }
        let sight = self.consensus.read(|state| Sight::of(state, &self.memory));
        sight.encode(&mut encoder)
    }
}

/// What the leader knows.
#[derive(Default)]
struct Sight {
    vms: BTreeMap<VmState, u64>,
    hosts: BTreeMap<HostState, u64>,
    phases: BTreeMap<MigrationPhase, u64>,
    migrations: Vec<Migration>,
}

impl Sight {
    fn of(state: &State, memory: &LeaderMemory) -> Self {
        let mut sight = Self::default();
        for vm in state.vms() {
            *sight.vms.entry(vm.state()).or_default() += 1;
        }
        for host in state.hosts() {
            *sight.hosts.entry(host.state()).or_default() += 1;
        }
        for migration in state
            .migrations()
            .filter(|migration| !drover_state::is_ended(migration))
        {
            let phase = memory.progress.phase(migration);
            *sight.phases.entry(phase).or_default() += 1;
            if sight.migrations.len() < MIGRATIONS_MAX {
                sight.migrations.push(memory.progress.merge(migration.clone()));
            }
        }
        sight
    }

    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let vms = counted("state", &self.vms, VmState::as_str_name);
        gauges(encoder, "vms", "VMs by state", vms)?;
        let hosts = counted("state", &self.hosts, HostState::as_str_name);
        gauges(encoder, "hosts", "Hosts by state", hosts)?;
        gauges(
            encoder,
            "migrations_under_way",
            "Migrations that have not ended, by phase",
            counted("phase", &self.phases, MigrationPhase::as_str_name),
        )?;
        let info = self.migrations.iter().map(|migration| {
            let mut labels = labels(migration);
            labels.push(("source", migration.from.clone()));
            labels.push(("target", migration.to.clone()));
            labels.push(("phase", word(migration.phase().as_str_name())));
            (labels, 1.0)
        });
        gauges(encoder, "migration_info", "A migration under way; always 1", info)?;
        for (name, help, read) in FIGURES {
            let told = self.migrations.iter().filter_map(|migration| {
                let value = read(migration.progress.as_ref()?)?;
                Some((labels(migration), value))
            });
            gauges(encoder, name, help, told)?;
        }
        for (name, help, read) in STREAM_FIGURES {
            let told = self.migrations.iter().flat_map(|migration| {
                let streams = migration.progress.iter().flat_map(|progress| &progress.by_stream);
                streams.filter_map(move |stream| {
                    let mut labels = labels(migration);
                    labels.push(("stream", stream.number.to_string()));
                    Some((labels, read(stream)?))
                })
            });
            gauges(encoder, name, help, told)?;
        }
        Ok(())
    }
}

fn labels(migration: &Migration) -> Labels {
    vec![("vm", migration.vm.clone()), ("migration", migration.id.clone())]
}

fn counted<K>(
    label: &'static str,
    counts: &BTreeMap<K, u64>,
    name: fn(&K) -> &'static str,
) -> impl Iterator<Item = (Labels, f64)> {
    counts
        .iter()
        .map(move |(key, &count)| (vec![(label, word(name(key)))], count as f64))
}

/// "MIGRATION_PHASE_PRE_COPY" → "pre-copy".
fn word(name: &str) -> String {
    let prefixes = ["VM_STATE_", "HOST_STATE_", "MIGRATION_PHASE_"];
    let rest = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix));
    rest.unwrap_or(name).to_ascii_lowercase().replace('_', "-")
}

fn seconds(ms: u64) -> f64 {
    Duration::from_millis(ms).as_secs_f64()
}

/// One gauge with its series; nothing at all when there are none.
fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (L, f64)>,
) -> fmt::Result {
    let mut values = values.into_iter().peekable();
    if values.peek().is_none() {
        return Ok(());
    }
    let mut gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        gauge.encode_family(&labels)?.encode_gauge(&value)?;
    }
    Ok(())
}
