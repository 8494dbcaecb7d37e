//! A snapshot as users see it.

use drover_proto::v1;
use serde::Serialize;

use super::{ReasonView, dash, some};
use crate::output::{Detailed, Tabular};
use crate::units;

/// A snapshot of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SnapshotView {
    /// Its id: never given twice.
    pub id: String,
    /// Its name; its id where none was given.
    pub name: String,
    /// The VM that it is of, which may be gone by now.
    pub vm: String,
    /// `creating`, `ready`, `failed` or `deleting`.
    pub phase: &'static str,
    /// Why it failed.
    pub reason: Option<ReasonView>,
    /// The storage that it is on.
    pub pool: String,
    /// Memory, and the disks that the VM may write to.
    pub bytes_total: u64,
    /// What its files take.
    pub bytes_stored: u64,
    /// How long the guest stood still for it, microseconds.
    pub paused_us: u64,
    /// The VM's memory then, MiB.
    pub memory_mib: u64,
    /// The VM's volumes then.
    pub volumes: Vec<SnapshotVolumeView>,
    /// The host that took it.
    pub host: String,
    /// The VM's run epoch then.
    pub epoch: u64,
    /// Who asked for it.
    pub requested_by: String,
    /// Unix milliseconds.
    pub created_ms: u64,
    /// Unix milliseconds.
    pub changed_ms: u64,
    /// How far it is, while it is being taken.
    pub progress: Option<BytesView>,
}

/// A volume as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SnapshotVolumeView {
    /// Its name.
    pub volume: String,
    /// Its size.
    pub size_bytes: u64,
    /// Whether its content is in the snapshot: not of those that the VM only reads.
    pub held: bool,
}

/// How far something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BytesView {
    /// Dealt with by now.
    pub bytes_done: u64,
    /// In all.
    pub bytes_total: u64,
}

impl From<v1::SnapshotProgress> for BytesView {
    fn from(progress: v1::SnapshotProgress) -> Self {
        Self {
            bytes_done: progress.bytes_done,
            bytes_total: progress.bytes_total,
        }
    }
}

impl From<v1::Snapshot> for SnapshotView {
    fn from(snapshot: v1::Snapshot) -> Self {
        let phase = match snapshot.phase() {
            v1::SnapshotPhase::Unspecified => "unspecified",
            v1::SnapshotPhase::Creating => "creating",
            v1::SnapshotPhase::Ready => "ready",
            v1::SnapshotPhase::Failed => "failed",
            v1::SnapshotPhase::Deleting => "deleting",
        };
        let spec = snapshot.spec.unwrap_or_default();
        let volumes = spec.disks.iter().zip(&snapshot.volumes);
        let volumes = volumes.map(|(disk, volume)| SnapshotVolumeView {
            volume: volume.name.clone(),
            size_bytes: volume.size_bytes,
            held: !disk.read_only,
        });
        Self {
            volumes: volumes.collect(),
            id: snapshot.id,
            name: snapshot.name,
            vm: snapshot.vm,
            phase,
            reason: ReasonView::of(snapshot.reason),
            pool: snapshot.pool,
            bytes_total: snapshot.bytes_total,
            bytes_stored: snapshot.bytes_stored,
            paused_us: snapshot.paused_us,
            memory_mib: spec.memory_mib,
            host: snapshot.host,
            epoch: snapshot.epoch,
            requested_by: snapshot.requested_by,
            created_ms: snapshot.created_ms,
            changed_ms: snapshot.changed_ms,
            progress: snapshot.progress.map(BytesView::from),
        }
    }
}

impl SnapshotView {
    /// Where it stands, in a sentence.
    pub fn sentence(&self) -> String {
        let Self { name, vm, .. } = self;
        match (self.phase, &self.reason) {
            ("ready", _) => format!(
                "{name} of {vm} is ready: {} in pool {}; the guest stood still for {}",
                units::bytes(self.bytes_stored),
                self.pool,
                units::micros(self.paused_us)
            ),
            (phase, Some(reason)) => format!("{name} of {vm} is {phase}: {}", reason.line()),
            (phase, None) => format!("{name} of {vm} is {phase}"),
        }
    }
}

impl Tabular for SnapshotView {
    const HEAD: &'static [&'static str] =
        &["VM", "NAME", "ID", "PHASE", "STORED", "PAUSED", "POOL", "CREATED"];

    #[allow(clippy::misnamed_getters, reason = "a snapshot is called by its name")]
    fn id(&self) -> &str {
        &self.name
    }

    fn row(&self) -> Vec<String> {
        let of_ready = |text: String| {
            if self.phase == "ready" {
                text
            } else {
                "-".to_owned()
            }
        };
        vec![
            self.vm.clone(),
            self.name.clone(),
            self.id.clone(),
            self.phase.to_owned(),
            of_ready(units::bytes(self.bytes_stored)),
            of_ready(units::micros(self.paused_us)),
            self.pool.clone(),
            units::instant(self.created_ms),
        ]
    }
}

impl Detailed for SnapshotView {
    fn fields(&self) -> Vec<(&'static str, String)> {
        let volume = |volume: &SnapshotVolumeView| {
            let how = if volume.held { "" } else { ", not held" };
            format!("{} ({}{how})", volume.volume, units::bytes(volume.size_bytes))
        };
        let volumes: Vec<String> = self.volumes.iter().map(volume).collect();
        let mut fields = vec![
            ("name", self.name.clone()),
            ("id", self.id.clone()),
            ("vm", self.vm.clone()),
            ("phase", self.phase.to_owned()),
        ];
        if let Some(reason) = &self.reason {
            fields.push(("reason", reason.line()));
        }
        if let Some(progress) = &self.progress {
            let (done, total) = (
                units::bytes(progress.bytes_done),
                units::bytes(progress.bytes_total),
            );
            fields.push(("progress", format!("{done} of {total}")));
        }
        fields.extend([
            ("pool", self.pool.clone()),
            ("of", units::bytes(self.bytes_total)),
            ("stored", units::bytes(self.bytes_stored)),
            ("paused", units::micros(self.paused_us)),
            ("memory", format!("{} MiB", self.memory_mib)),
            ("volumes", dash(some(volumes.join(", ")).as_deref())),
            ("taken on", format!("{} (epoch {})", self.host, self.epoch)),
            ("asked for by", self.requested_by.clone()),
            ("created", units::instant(self.created_ms)),
            ("changed", units::instant(self.changed_ms)),
        ]);
        fields
    }
}
