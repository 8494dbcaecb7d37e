//! A volume as users see it.

use drover_proto::v1;
use serde::Serialize;

use super::{BytesView, ReasonView, some};
use crate::output::Tabular;
use crate::units;

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VolumeView {
    /// Its name.
    pub name: String,
    /// The storage that it is on.
    pub pool: String,
    /// What a guest sees as the disk's size.
    pub size_bytes: u64,
    /// `ready`; `filling` from its image; `failed`, which it stays.
    pub state: &'static str,
    /// Why it failed.
    pub reason: Option<ReasonView>,
    /// Why no host fills a filling one now.
    pub waits: Option<String>,
    /// How far a filling one is, bytes of its size.
    pub progress: Option<BytesView>,
    /// The image that it was made of.
    pub image: Option<String>,
    /// Whether a VM with it has run: its file is there.
    pub used: bool,
    /// The number in its file's name: of an image's content, or a restore's.
    pub content: Option<u64>,
    /// The VMs that have it.
    pub vms: Vec<String>,
    /// Unix milliseconds.
    pub created_ms: u64,
}

impl From<v1::Volume> for VolumeView {
    fn from(volume: v1::Volume) -> Self {
        let v1::Volume {
            name,
            pool,
            size_bytes,
            created_ms,
            used,
            vms,
            initial_bytes: _,
            content,
            writers: _,
            image,
            image_blake3: _,
            filling,
            reason,
            progress,
            waits,
        } = volume;
        let state = match (filling, &reason) {
            (false, _) => "ready",
            (true, None) => "filling",
            (true, Some(_)) => "failed",
        };
        Self {
            name,
            pool,
            size_bytes,
            state,
            reason: ReasonView::of(reason),
            waits: some(waits),
            progress: progress.map(BytesView::from),
            image: some(image),
            used,
            content: Some(content).filter(|content| *content > 0),
            vms,
            created_ms,
        }
    }
}

impl VolumeView {
    /// Its file, within the pool's folder.
    pub fn file(&self) -> String {
        match self.content {
            Some(number) => format!("{}/data-{number}.raw", self.name),
            None => format!("{}/data.raw", self.name),
        }
    }

    /// What was created, in a sentence.
    pub fn sentence(&self) -> String {
        let Self {
            name, pool, state, ..
        } = self;
        let size = self.size();
        let of = self
            .image
            .as_ref()
            .map(|image| format!(", of image {image}"))
            .unwrap_or_default();
        match (*state, &self.reason) {
            ("ready", _) => format!("{name} is created: {size} in pool {pool}{of}"),
            (_, Some(reason)) => format!("{name} could not be filled{of}: {}", reason.message),
            _ => format!("{name} is being filled: {size} in pool {pool}{of}"),
        }
    }

    /// Its size for people.
    pub fn size(&self) -> String {
        units::bytes(self.size_bytes)
    }
}

impl Tabular for VolumeView {
    const HEAD: &'static [&'static str] = &["NAME", "POOL", "SIZE", "STATE", "VMS", "CREATED"];

    fn id(&self) -> &str {
        &self.name
    }

    fn row(&self) -> Vec<String> {
        let vms = if self.vms.is_empty() {
            "-".to_owned()
        } else {
            self.vms.join(", ")
        };
        vec![
            self.name.clone(),
            self.pool.clone(),
            self.size(),
            self.state.to_owned(),
            vms,
            units::instant(self.created_ms),
        ]
    }
}
