//! Volumes: made known, filled, noted as used, forgotten. Their files are the agents' (docs/node-agent.md).

use drover_proto::v1::{
    CommandResponse, CreateVolume, DeleteVolume, ReportVolumeRequest, ResizeVolume, Vm, VmSpec, Volume,
    VolumeNews,
};
use drover_proto::{Code, Fault};

use super::snapshots::{not_restored, not_taken};
use super::{Applied, Tx, bounded, reason};
use crate::limits::VOLUMES_MAX;
use crate::state::spec_of;
use crate::validate::{self, quoted};
use crate::volumes::{self, has_pool, not_ready};

/// What a volume's count of writers begins with. The record beside its file outlives it: whoever makes a volume of that name anew, in this
/// cluster or in another on the same storage, begins beyond what any before it came to.
pub(super) fn first_writers(now_ms: u64) -> u64 {
    now_ms
}

impl Tx<'_> {
    pub(super) fn create_volume(&mut self, create: &CreateVolume) -> Applied {
        let volume = validate::volume(create.volume.as_ref())?;
        let name = volume.name.clone();
        if self.state.volumes.contains_key(&name) {
            let message = format!("volume.name is {}; a volume of this name exists", quoted(&name));
            return Err(Fault::new(Code::VolumeExists, message).field("volume.name"));
        }
        if self.state.volumes.len() >= VOLUMES_MAX {
            let message = format!(
                "volume.name is {name}; the cluster has {VOLUMES_MAX} volumes, which is all it takes"
            );
            return Err(Fault::new(Code::InvalidArgument, message).field("volume.name"));
        }
        if !self.state.hosts().any(|host| has_pool(host, &volume.pool)) {
            let message = format!(
                "volume.pool is {}; no host has a pool of this name",
                quoted(&volume.pool)
            );
            return Err(Fault::new(Code::PoolNotFound, message).field("volume.pool"));
        }
        let mut volume = Volume {
            created_ms: self.now_ms,
            writers: first_writers(self.now_ms),
            content: self.new_content(),
            ..volume
        };
        if !volume.image.is_empty() {
            let image = volumes::image_for(self.state, &volume)?;
            (volume.size_bytes, volume.image_blake3) = (image.size_bytes, image.blake3);
            volume.filling = true;
        }
        let message = match volume.image.as_str() {
            "" => format!("{name} was created by {}", self.caller),
            image => format!("{name} was created by {}, of image {image}", self.caller),
        };
        self.state.volumes.insert(name.clone(), volume.clone());
        self.event("volume.created", format!("volume/{name}"), message);
        Ok(answer(volume))
    }

    /// The number of a new content: no file of a volume of any name was ever called so, in this cluster or in another on the same storage. So
    /// nobody takes a file for it that was there before, and who removes that one, however late, does not remove this. Its digits are of the
    /// time, and of the events until then, which rise with every volume that comes or goes. JSON holds it exactly.
    fn new_content(&self) -> u64 {
        self.now_ms.saturating_mul(1_000) + self.state.next_event % 1_000
    }

    pub(super) fn delete_volume(&mut self, delete: &DeleteVolume) -> Applied {
        let name = delete.name.as_str();
        if let Some(vm) = self.state.user_of(name, "", |_| true) {
            let message = format!(
                "name is {name}, which VM {} has; delete the VM first",
                spec_of(vm).name
            );
            return Err(Fault::new(Code::VolumeInUse, message).field("name"));
        }
        let Some(volume) = self.state.volumes.remove(name) else {
            let message = format!("name is {}; no volume has this name", quoted(name));
            return Err(Fault::new(Code::VolumeNotFound, message).field("name"));
        };
        // What was half filled is of no use to anybody. What was not used has no file, or one that is not this volume's.
        let had = volume.content > 0 || volume.used;
        let removes = had && (delete.remove_content || volume.filling);
        if removes {
            self.remove_content(&volume, volume.content);
        }
        let how = if removes { ", with what it held" } else { "" };
        let message = format!("{name} was deleted by {}{how}", self.caller);
        self.event("volume.deleted", format!("volume/{name}"), message);
        Ok(answer(volume))
    }

    /// A host has filled a volume from its image, or cannot.
    pub(super) fn report_volume(&mut self, report: &ReportVolumeRequest) -> Applied {
        let name = &report.volume;
        let awaited = |volume: &&mut Volume| volume.filling && volume.content == report.content;
        let asked = self
            .state
            .volume(name)
            .and_then(|volume| self.state.filler(volume));
        let is_asked = asked == Some(report.host.as_str());
        let Some(volume) = self.state.volumes.get_mut(name).filter(awaited) else {
            return Ok(CommandResponse::default());
        };
        let image = volume.image.clone();
        let (kind, message) = match report.news() {
            VolumeNews::Filled => {
                (volume.filling, volume.reason) = (false, None);
                let message = format!(
                    "{name} holds what image {image} does, put there by {}",
                    report.host
                );
                ("volume.filled", message)
            }
            // What went wrong on a host that is not asked any more says nothing.
            VolumeNews::Failed if volume.reason.is_none() && is_asked => {
                let unsaid = || reason(Code::Internal, "its host gave no reason");
                let why = report.reason.as_ref().map_or_else(unsaid, bounded);
                let message = format!(
                    "{name} could not be filled from image {image} by {}: {} [{}]",
                    report.host, why.message, why.code
                );
                volume.reason = Some(why);
                ("volume.failed", message)
            }
            VolumeNews::Failed => return Ok(CommandResponse::default()),
            other => {
                let message = format!(
                    "news is {}; FILLED and FAILED go into the log",
                    other.as_str_name()
                );
                return Err(Fault::new(Code::InvalidArgument, message).field("news"));
            }
        };
        let volume = volume.clone();
        self.event(kind, format!("volume/{name}"), message);
        Ok(answer(volume))
    }

    pub(super) fn resize_volume(&mut self, resize: &ResizeVolume) -> Applied {
        let name = &resize.name;
        let Some(volume) = self.state.volume(name) else {
            let message = format!("name is {}; no volume has this name", quoted(name));
            return Err(Fault::new(Code::VolumeNotFound, message).field("name"));
        };
        let (has, bytes) = (volume.size_bytes, resize.size_bytes);
        validate::volume_bytes("size_bytes", bytes)?;
        not_ready("name", volume)?;
        if bytes < has {
            let message = format!("size_bytes is {bytes}, volume {name} has {has}; a volume only grows");
            return Err(Fault::new(Code::InvalidArgument, message).field("size_bytes"));
        }
        let has_it = |vm: &&Vm| spec_of(vm).disks.iter().any(|disk| disk.volume == *name);
        let moved = |vm: &&Vm| !vm.migration.is_empty();
        if let Some(vm) = self.state.vms().filter(has_it).find(moved) {
            let (vm, migration) = (&spec_of(vm).name, &vm.migration);
            let message =
                format!("name is {name}, which VM {vm} has, and {migration} moves that; grow it after");
            return Err(Fault::new(Code::MigrationActive, message).field("name"));
        }
        if let Some(vm) = self.state.vms().find(has_it) {
            not_taken("name", vm)?;
            not_restored("name", vm)?;
        }
        let mut grown = volume.clone();
        if bytes > has {
            grown.size_bytes = bytes;
            if grown.initial_bytes == 0 {
                grown.initial_bytes = has;
            }
            self.state.volumes.insert(name.clone(), grown.clone());
            let message = format!("{name} has {bytes} bytes now, asked for by {}", self.caller);
            self.event("volume.resized", format!("volume/{name}"), message);
        }
        Ok(answer(grown))
    }

    /// From now on whoever only read these volumes cannot be sure of what they hold.
    pub(super) fn note_writer(&mut self, spec: &VmSpec) {
        for disk in spec.disks.iter().filter(|disk| !disk.read_only) {
            if let Some(volume) = self.state.volumes.get_mut(&disk.volume) {
                volume.writers += 1;
            }
        }
    }

    /// The VM was seen running: from now on a host that does not find a file of its volumes lacks the storage, and makes none.
    pub(super) fn note_used(&mut self, vm: &str) {
        let Some(vm) = self.state.vms.get(vm) else { return };
        // Of one that was attached later its own report says so: this one may be of a VMM that has yet to get it.
        for disk in spec_of(vm).disks.iter().filter(|disk| disk.attach_revision == 0) {
            if let Some(volume) = self.state.volumes.get_mut(&disk.volume) {
                volume.used = true;
            }
        }
    }
}

fn answer(volume: Volume) -> CommandResponse {
    CommandResponse {
        volume: Some(volume),
        current: true,
        ..CommandResponse::default()
    }
}
