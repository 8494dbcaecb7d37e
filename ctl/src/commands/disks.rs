//! `ctl vm attach-disk|detach-disk`.
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
pub async fn attach(session: &Session, name: &str, disk: &v1::VmDisk, args: &WaitArgs) -> Result<()> {
    let mut vm = session.client.attach_disk(name, disk.clone()).await?;
    if !args.no_wait {
        vm = until(session, name, args.timeout, |vm| has(vm, &disk.volume)).await?;
    }
    let sentence = format!("{name} has {}", disk.volume);
    session.out.done(&VmView::from(vm), &sentence)
}

/// Wants the VM without a disk.
pub async fn detach(session: &Session, name: &str, volume: &str, args: &WaitArgs) -> Result<()> {
    let mut vm = session.client.detach_disk(name, volume).await?;
    if !args.no_wait {
        vm = until(session, name, args.timeout, |vm| lacks(vm, volume)).await?;
    }
    let sentence = match lacks(&vm, volume) {
        Ok(()) => format!("{name} has {volume} no more"),
        Err(_) => format!("{name}'s guest is asked to give {volume} up"),
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

fn has(vm: &v1::Vm, volume: &str) -> std::result::Result<(), Yet> {
    if !runs(vm) {
        return Ok(());
    }
    let devices = vm.devices.as_ref().map_or(&[][..], |devices| &devices.devices);
    let Some(device) = devices.iter().find(|device| device.volume == volume) else {
        return Err(Yet::Waits("its VMM does not have it".to_owned()));
    };
    match (device.state(), &device.reason) {
        (VmDeviceState::Attached, _) => Ok(()),
        (VmDeviceState::Failed, Some(reason)) => Err(Yet::Refused(reason.clone())),
        _ => Err(Yet::Waits("its VMM has something else there".to_owned())),
    }
}

fn lacks(vm: &v1::Vm, volume: &str) -> std::result::Result<(), Yet> {
    let disks = vm.spec.as_ref().map_or(&[][..], |spec| &spec.disks);
    if !disks.iter().any(|disk| disk.volume == volume) {
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
