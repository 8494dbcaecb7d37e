//! Volumes and who has them. Read from the state alone; `apply` asks here before a VM gets a disk or a volume goes.
//!
//! One writer or any number of readers: a volume that a VM may write to belongs to that VM alone, from the VM's creation to
//! its end and whether it runs or not. So what a stopped VM had written is there when it starts again, and no order of
//! starts brings two guests onto one disk. The VMM's lock on the file is the second guard, not the first.

use std::collections::BTreeMap;

use drover_proto::v1::{Host, HostState, Image, Vm, VmSpec, Volume};
use drover_proto::{Code, Fault};

use crate::limits::VOLUME_BYTES_UNIT;
use crate::snapshots::{knows_snapshots, too_old};
use crate::state::{State, spec_of};
use crate::validate::{self, quoted};

/// Most volumes that a host is asked to fill, and contents that it is asked to remove, at once.
pub(crate) const TOLD_MAX: usize = 64;

impl State {
    /// One volume. Who has it is not filled in: see [`State::volumes_with_users`].
    pub fn volume(&self, name: &str) -> Option<&Volume> {
        self.volumes.get(name)
    }

    /// All volumes, by name, each with the VMs that have it.
    pub fn volumes_with_users(&self) -> Vec<Volume> {
        let mut users: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (name, vm) in &self.vms {
            for disk in &spec_of(vm).disks {
                users.entry(disk.volume.as_str()).or_default().push(name.clone());
            }
        }
        let with_users = |volume: &Volume| Volume {
            vms: users.remove(volume.name.as_str()).unwrap_or_default(),
            waits: self.why_nobody_fills(volume),
            ..volume.clone()
        };
        self.volumes.values().map(with_users).collect()
    }

    /// What the host is to fill from its images: of each volume that is to be filled one host that is up and can.
    pub(crate) fn fills_of(&self, host: &str) -> Vec<Volume> {
        let by_this = |volume: &&Volume| self.filler(volume) == Some(host);
        let volumes = self.volumes.values().filter(|volume| is_being_filled(volume));
        let volumes = volumes.filter(by_this);
        volumes.take(TOLD_MAX).cloned().collect()
    }

    /// Empty unless the volume waits for a host that can fill it.
    fn why_nobody_fills(&self, volume: &Volume) -> String {
        if !is_being_filled(volume) || self.filler(volume).is_some() {
            return String::new();
        }
        format!(
            "no host that is up has pool {}, and image {} as it was when the volume was created",
            volume.pool, volume.image
        )
    }

    /// The host that is asked to fill the volume.
    pub(crate) fn filler(&self, volume: &Volume) -> Option<&str> {
        let can = |(_, host): &(&String, &Host)| {
            let up = host.state() == HostState::Up && has_pool(host, &volume.pool);
            let same = |image: &Image| image.blake3 == volume.image_blake3;
            up && disk_image(host, &volume.image).is_some_and(same)
        };
        self.hosts.iter().find(can).map(|(name, _)| name.as_str())
    }

    /// The first VM, but for the one that is named, that has the volume and for which `counts` says so, told whether it may write to it.
    pub(crate) fn user_of(&self, volume: &str, except: &str, counts: impl Fn(bool) -> bool) -> Option<&Vm> {
        let others = self.vms.iter().filter(|(name, _)| *name != except);
        others.map(|(_, vm)| vm).find(|vm| {
            let mut disks = spec_of(vm).disks.iter();
            disks.any(|disk| disk.volume == volume && counts(!disk.read_only))
        })
    }
}

/// Whether the VM of this spec, new or as it is to become, may have its disks.
///
/// # Errors
/// `volume_not_found`, `volume_in_use`.
pub(crate) fn may_have(state: &State, spec: &VmSpec) -> Result<(), Fault> {
    const FIELD: &str = "spec.disks.volume";
    for disk in &spec.disks {
        let volume = &disk.volume;
        let Some(known) = state.volume(volume) else {
            let message = format!(
                "{FIELD} is {}; no volume has this name: create it first",
                quoted(volume)
            );
            return Err(Fault::new(Code::VolumeNotFound, message).field(FIELD));
        };
        not_ready(FIELD, known)?;
        // A reader is in the way of a writer only, a writer of everybody.
        if let Some(other) = state.user_of(volume, &spec.name, |writes| writes || !disk.read_only) {
            let message = format!(
                "{FIELD} is {volume}, which VM {} has; a volume that is written to belongs to one VM, only readers may share one",
                spec_of(other).name
            );
            return Err(Fault::new(Code::VolumeInUse, message).field(FIELD));
        }
    }
    Ok(())
}

/// Whether the volume waits for its image's content, and may yet get it.
pub fn is_being_filled(volume: &Volume) -> bool {
    volume.filling && volume.reason.is_none()
}

/// Whether the volume has its content.
///
/// # Errors
/// `volume_not_ready`, of `field`.
pub(crate) fn not_ready(field: &str, volume: &Volume) -> Result<(), Fault> {
    if !volume.filling {
        return Ok(());
    }
    let Volume { name, image, .. } = volume;
    let message = match &volume.reason {
        None => format!("{field} is {name}, which is still being filled from image {image}: wait for that"),
        Some(reason) => format!(
            "{field} is {name}, which could not be filled from image {image} ({}): delete it, and create it anew",
            reason.message
        ),
    };
    Err(Fault::new(Code::VolumeNotReady, message).field(field))
}

/// An image that the host reported as the content of a disk.
fn disk_image<'a>(host: &'a Host, name: &str) -> Option<&'a Image> {
    let images = host.spec.as_ref().map(|spec| spec.images.as_slice());
    let mut images = images.unwrap_or_default().iter();
    images.find(|image| image.name == name && image.disk_bytes > 0)
}

/// Of what, and how large, a volume is made of an image.
pub(crate) struct Made {
    /// Digest of the image.
    pub blake3: String,
    /// The volume's size: as asked for, else the image's.
    pub size_bytes: u64,
}

/// What of the image that is named the volume is to be made of, if a host has it and the pool.
///
/// # Errors
/// `image_not_found`, `image_unusable`; `invalid_argument` where the size does not do.
pub(crate) fn image_for(state: &State, volume: &Volume) -> Result<Made, Fault> {
    const FIELD: &str = "volume.image";
    let named = quoted(&volume.image);
    let reach = || {
        let hosts = state.hosts.values();
        hosts.filter(|host| host.state() == HostState::Up && has_pool(host, &volume.pool))
    };
    let mut found = reach().filter_map(|host| Some((host, disk_image(host, &volume.image)?)));
    let Some((first, image)) = found.next() else {
        let knows = |host: &&Host| {
            let images = host.spec.as_ref().map(|spec| spec.images.as_slice());
            let mut images = images.unwrap_or_default().iter();
            images.any(|image| image.name == volume.image)
        };
        if let Some(host) = reach().find(knows) {
            let message = format!(
                "{FIELD} is {named}, which on {} is no content of a disk; `ctl image list` says what it is",
                host_name(host)
            );
            return Err(Fault::new(Code::ImageUnusable, message).field(FIELD));
        }
        let message = format!(
            "{FIELD} is {named}; no host that is up and has pool {} has an image of this name",
            volume.pool
        );
        return Err(Fault::new(Code::ImageNotFound, message).field(FIELD));
    };
    if let Some((other, _)) = found.find(|(_, other)| other.blake3 != image.blake3) {
        let message = format!(
            "{FIELD} is {named}, which is one thing on {} and another on {}: give all hosts the same",
            host_name(first),
            host_name(other)
        );
        return Err(Fault::new(Code::ImageUnusable, message).field(FIELD));
    }
    let needs = image.disk_bytes;
    let size_bytes = match volume.size_bytes {
        0 => needs
            .div_ceil(VOLUME_BYTES_UNIT)
            .saturating_mul(VOLUME_BYTES_UNIT),
        asked => asked,
    };
    validate::volume_bytes("volume.size_bytes", size_bytes)?;
    if size_bytes < needs {
        let message = format!(
            "volume.size_bytes is {size_bytes}; the disk of image {} has {needs}",
            volume.image
        );
        return Err(Fault::new(Code::InvalidArgument, message).field("volume.size_bytes"));
    }
    Ok(Made {
        blake3: image.blake3.clone(),
        size_bytes,
    })
}

fn host_name(host: &Host) -> &str {
    host.spec.as_ref().map_or("", |spec| spec.name.as_str())
}

/// Whether the host has the pools of the spec's volumes. The message goes on after the host's name.
///
/// # Errors
/// `pool_not_found`; `snapshot_unavailable` where one was restored and the host would not find its content.
pub(crate) fn reaches(state: &State, spec: &VmSpec, host: &Host) -> Result<(), Fault> {
    for volume in spec.disks.iter().filter_map(|disk| state.volume(&disk.volume)) {
        if !has_pool(host, &volume.pool) {
            let message = format!(
                "has no pool {}, in which volume {} is",
                quoted(&volume.pool),
                volume.name
            );
            return Err(Fault::new(Code::PoolNotFound, message));
        }
        if volume.content > 0 && !knows_snapshots(host) {
            return Err(too_old());
        }
        let numbers = host.spec.as_ref().is_some_and(|spec| spec.numbers);
        if volume.content > 0 && !volume.used && !numbers {
            let message = "has an agent of a version that makes no file of a new volume: upgrade it";
            return Err(Fault::new(Code::ProtocolVersion, message));
        }
    }
    Ok(())
}

/// Whether the host reported the pool.
pub(crate) fn has_pool(host: &Host, pool: &str) -> bool {
    let pools = host.spec.as_ref().map(|spec| spec.pools.as_slice());
    pools.unwrap_or_default().iter().any(|has| has == pool)
}
