//! A volume as users see it.

use drover_proto::v1;
use serde::Serialize;

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
    /// Whether a VM with it has run: its file is there.
    pub used: bool,
    /// The number of the restore that its content comes from, which names its file.
    pub restored: Option<u64>,
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
        } = volume;
        Self {
            name,
            pool,
            size_bytes,
            used,
            restored: Some(content).filter(|content| *content > 0),
            vms,
            created_ms,
        }
    }
}

impl VolumeView {
    /// Its file, within the pool's folder.
    pub fn file(&self) -> String {
        match self.restored {
            Some(number) => format!("{}/data-{number}.raw", self.name),
            None => format!("{}/data.raw", self.name),
        }
    }

    /// Its size for people.
    pub fn size(&self) -> String {
        units::bytes(self.size_bytes)
    }
}

impl Tabular for VolumeView {
    const HEAD: &'static [&'static str] = &["NAME", "POOL", "SIZE", "VMS", "CREATED"];

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
            vms,
            units::instant(self.created_ms),
        ]
    }
}
