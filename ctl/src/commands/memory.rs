//! `ctl vm set --memory`, and whether a new VM gets a balloon.

use drover_proto::v1;

use super::Session;
use super::devices::{Yet, runs, until};
use crate::args::{SetArgs, WithBalloon};
use crate::client::Patience;
use crate::failure::Result;
use crate::view::VmView;

/// The least device model that has balloons.
const BALLOON_MODEL: u32 = 5;

/// Whether a VM that is created gets a balloon. Where nothing is said it does if every host could take it: a VM with one is moved to no
/// host of an older version.
pub async fn balloon(session: &Session, asked: WithBalloon) -> Result<v1::Balloon> {
    let on = match asked {
        WithBalloon::On => true,
        WithBalloon::Off => false,
        WithBalloon::Auto => {
            let hosts = session.client.hosts(Patience::default()).await?;
            let knows = |host: &v1::Host| {
                host.spec
                    .as_ref()
                    .is_some_and(|spec| spec.device_model >= BALLOON_MODEL)
            };
            !hosts.is_empty() && hosts.iter().all(knows)
        }
    };
    Ok(if on { v1::Balloon::On } else { v1::Balloon::Off })
}

/// Changes how much of its memory the VM's guest is to have.
pub async fn set(session: &Session, args: &SetArgs) -> Result<()> {
    let name = &args.vm;
    let mut vm = session.client.set_vm_memory(name, args.memory).await?;
    if !args.wait.no_wait {
        vm = until(session, name, args.wait.timeout, told).await?;
    }
    let view = VmView::from(vm);
    let sentence = format!("{name}: memory {}", view.memory_line());
    session.out.done(&view, &sentence)
}

/// Whether the VMM of a VM that runs knows what is wanted. When the guest does it is the guest's affair.
fn told(vm: &v1::Vm) -> std::result::Result<(), Yet> {
    let Some(devices) = vm.devices.as_ref().filter(|_| runs(vm)) else {
        return if runs(vm) {
            Err(Yet::Waits("its VMM has not said what it has".to_owned()))
        } else {
            Ok(())
        };
    };
    let wanted = vm.spec.as_ref().map_or(0, |spec| spec.memory_revision);
    match &devices.memory {
        Some(memory) if memory.revision < wanted => Err(Yet::Waits("its VMM was not told".to_owned())),
        // Without one it was started by an older version: its next start has it.
        _ => Ok(()),
    }
}
