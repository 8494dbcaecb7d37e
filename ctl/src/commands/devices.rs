//! `ctl vm attach-disk|detach-disk|attach-nic|detach-nic`.
//!
//! As with every action, it is done when the cluster has accepted it, and the wait after it only watches.

use std::time::{Duration, Instant};

use drover_proto::v1;
use drover_proto::v1::VmDeviceState;

use super::{POLL, Session};
use crate::args::WaitArgs;
use crate::failure::{Exit, Failure, Result};
use crate::view::VmView;

/// Gives the VM a disk.
pub async fn attach_disk(session: &Session, name: &str, disk: &v1::VmDisk, args: &WaitArgs) -> Result<()> {
    let vm = session.client.attach_disk(name, disk.clone()).await?;
    let what = What::Disk(disk.volume.clone());
    attached(session, vm, name, &what, args).await
}

/// Wants the VM without a disk.
pub async fn detach_disk(session: &Session, name: &str, volume: &str, args: &WaitArgs) -> Result<()> {
    let vm = session.client.detach_disk(name, volume).await?;
    detached(session, vm, name, &What::Disk(volume.to_owned()), args).await
}

/// Gives the VM a NIC.
pub async fn attach_nic(session: &Session, name: &str, nic: &v1::VmNic, args: &WaitArgs) -> Result<()> {
    let vm = session.client.attach_nic(name, nic.clone()).await?;
    // What was added last, with the addresses that were chosen.
    let added = vm.spec.as_ref().and_then(|spec| spec.nics.last()).cloned();
    attached(session, vm, name, &What::Nic(added.unwrap_or_default()), args).await
}

/// Wants the VM without a NIC.
pub async fn detach_nic(session: &Session, name: &str, asked: &str, args: &WaitArgs) -> Result<()> {
    let vm = session.client.detach_nic(name, asked).await?;
    // What is asked for last is the one that was meant; where nothing runs it has gone already.
    let spec = vm.spec.as_ref();
    let nics = spec.iter().flat_map(|spec| &spec.nics);
    let meant = nics
        .filter(|nic| nic.detach_revision > 0)
        .max_by_key(|nic| nic.detach_revision)
        .filter(|nic| nic.mac == asked.to_ascii_lowercase() || nic.network == asked);
    let meant = meant.cloned().unwrap_or_else(|| v1::VmNic {
        network: asked.to_owned(),
        ..v1::VmNic::default()
    });
    detached(session, vm, name, &What::Nic(meant), args).await
}

/// What comes or goes.
enum What {
    /// By its volume.
    Disk(String),
    Nic(v1::VmNic),
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Disk(volume) => f.write_str(volume),
            Self::Nic(nic) => {
                let parts = [&nic.network, &nic.mac, &nic.ip].map(String::as_str);
                let told: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
                write!(f, "the NIC {}", told.join(" "))
            }
        }
    }
}

impl What {
    fn is(&self, device: &v1::VmDevice) -> bool {
        match self {
            Self::Disk(volume) => device.volume == *volume,
            Self::Nic(nic) => !nic.mac.is_empty() && device.mac == nic.mac,
        }
    }

    /// Whether the specification has it.
    fn is_in(&self, spec: &v1::VmSpec) -> bool {
        match self {
            Self::Disk(volume) => spec.disks.iter().any(|disk| disk.volume == *volume),
            Self::Nic(meant) => spec
                .nics
                .iter()
                .any(|nic| nic.mac == meant.mac && nic.attach_revision == meant.attach_revision),
        }
    }
}

async fn attached(session: &Session, mut vm: v1::Vm, name: &str, what: &What, args: &WaitArgs) -> Result<()> {
    if !args.no_wait {
        vm = until(session, name, args.timeout, |vm| has(vm, what)).await?;
    }
    session.out.done(&VmView::from(vm), &format!("{name} has {what}"))
}

async fn detached(session: &Session, mut vm: v1::Vm, name: &str, what: &What, args: &WaitArgs) -> Result<()> {
    if !args.no_wait {
        vm = until(session, name, args.timeout, |vm| lacks(vm, what)).await?;
    }
    let sentence = match lacks(&vm, what) {
        Ok(()) => format!("{name} has {what} no more"),
        Err(_) => format!("{name}'s guest is asked to give {what} up"),
    };
    session.out.done(&VmView::from(vm), &sentence)
}

/// Why something is not yet so.
pub(super) enum Yet {
    /// It may still be.
    Waits(String),
    /// It was refused, and is tried again.
    Refused(v1::Reason),
}

/// Whether there is a VMM that runs the VM, or is about to.
pub(super) fn runs(vm: &v1::Vm) -> bool {
    !matches!(
        vm.state(),
        v1::VmState::Stopped | v1::VmState::Failed | v1::VmState::Pending
    )
}

fn has(vm: &v1::Vm, what: &What) -> std::result::Result<(), Yet> {
    if !runs(vm) {
        return Ok(());
    }
    let devices = vm.devices.as_ref().map_or(&[][..], |devices| &devices.devices);
    let Some(device) = devices.iter().find(|device| what.is(device)) else {
        return Err(Yet::Waits("its VMM does not have it".to_owned()));
    };
    match (device.state(), &device.reason) {
        (VmDeviceState::Attached, _) => Ok(()),
        (VmDeviceState::Failed, Some(reason)) => Err(Yet::Refused(reason.clone())),
        _ => Err(Yet::Waits("its VMM has something else there".to_owned())),
    }
}

fn lacks(vm: &v1::Vm, what: &What) -> std::result::Result<(), Yet> {
    if !vm.spec.as_ref().is_some_and(|spec| what.is_in(spec)) {
        return Ok(());
    }
    let heeds = vm.devices.as_ref().is_none_or(|devices| devices.heeds_slots);
    Err(Yet::Waits(if heeds {
        "its guest has not given it up".to_owned()
    } else {
        "its guest has no driver that gives it up; it goes when the VM stops".to_owned()
    }))
}

/// Waits until `done` says so.
pub(super) async fn until(
    session: &Session,
    name: &str,
    timeout: Duration,
    done: impl Fn(&v1::Vm) -> std::result::Result<(), Yet>,
) -> Result<v1::Vm> {
    let end = Instant::now() + timeout;
    let poll = async {
        loop {
            let vm = session.client.vm(name).await?;
            match done(&vm) {
                Ok(()) => return Ok(vm),
                Err(Yet::Refused(reason)) => {
                    let message = format!("{name}: {}", reason.message);
                    return Err(Failure::new(Exit::Failed, &reason.code, message));
                }
                Err(Yet::Waits(why)) if Instant::now() >= end => {
                    let seconds = timeout.as_secs_f32();
                    return Err(Failure::timed_out(format!("{name} after {seconds} s: {why}")));
                }
                Err(Yet::Waits(_)) => tokio::time::sleep(POLL).await,
            }
        }
    };
    tokio::select! {
        vm = poll => vm,
        _ = tokio::signal::ctrl_c() => Err(Failure::interrupted(format!("stopped waiting for {name}"))),
    }
}
