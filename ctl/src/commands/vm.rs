//! `ctl vm create|list|show|set|start|stop|shutdown|delete`.
//!
//! An action is done when the cluster has accepted it; the wait after it only watches. So a wait that runs out
//! (exit code 7) or is interrupted (130) changes nothing, and what was asked for still comes about.

use std::time::{Duration, Instant};

use drover_proto::{Code, v1};

use super::{POLL, Session};
use crate::args::{ActArgs, CreateArgs, Restart, ShutdownArgs, VmCommand};
use crate::client::Patience;
use crate::failure::{Exit, Failure, Result};
use crate::view::{VmView, vm_state_word};

/// `ctl vm …` but the console.
pub async fn run(session: &Session, command: &VmCommand) -> Result<()> {
    match command {
        VmCommand::Create(args) => create(session, args).await,
        VmCommand::List => {
            let vms = session.client.vms(Patience::default()).await?;
            session
                .out
                .list(&vms.into_iter().map(VmView::from).collect::<Vec<_>>())
        }
        VmCommand::Show { vm, user_data: false } => show(session, vm).await,
        VmCommand::Show { vm, user_data: true } => super::cloud::show(session, vm).await,
        VmCommand::Start(args) => {
            let vm = session.client.start_vm(&args.vm).await?;
            settle(session, args, vm, Goal::Running).await
        }
        VmCommand::Stop(args) => {
            let vm = session.client.stop_vm(&args.vm).await?;
            settle(session, args, vm, Goal::Stopped).await
        }
        VmCommand::Shutdown(args) => shutdown(session, args).await,
        VmCommand::AttachDisk { vm, disk, wait } => {
            super::devices::attach_disk(session, vm, disk, wait).await
        }
        VmCommand::DetachDisk { vm, volume, wait } => {
            super::devices::detach_disk(session, vm, volume, wait).await
        }
        VmCommand::AttachNic { vm, nic, wait } => super::devices::attach_nic(session, vm, nic, wait).await,
        VmCommand::DetachNic { vm, nic, wait } => super::devices::detach_nic(session, vm, nic, wait).await,
        VmCommand::Set(args) => super::memory::set(session, args).await,
        VmCommand::Snapshot(command) => super::snapshot::run(session, command).await,
        VmCommand::Clone { vm, name } => super::snapshot::clone(session, vm, name).await,
        VmCommand::Delete(args) => {
            let vm = session.client.delete_vm(&args.vm).await?;
            settle(session, args, vm, Goal::Gone).await
        }
        VmCommand::Console(args) => super::console::run(session, args).await,
        VmCommand::Upgrade(args) => super::upgrade::run(session, args).await,
    }
}

/// The guest is asked, and stopped by force only where that is asked for.
async fn shutdown(session: &Session, args: &ShutdownArgs) -> Result<()> {
    let (name, vm) = (&args.act.vm, session.client.shutdown_vm(&args.act.vm).await?);
    let Some(force_after) = args.force_after else {
        return settle(session, &args.act, vm, Goal::Stopped).await;
    };
    match wait(session, name, force_after, Goal::Stopped).await {
        Err(failure) if failure.exit == Exit::TimedOut => {
            let vm = session.client.stop_vm(name).await?;
            settle(session, &args.act, vm, Goal::Stopped).await
        }
        Err(failure) => Err(failure),
        Ok(_) => settle(session, &args.act, vm, Goal::Stopped).await,
    }
}

/// One VM, and beside it what is installed on its host.
async fn show(session: &Session, name: &str) -> Result<()> {
    let mut view = VmView::from(session.client.vm(name).await?);
    if let (Some(host), Some(_)) = (&view.placement.host, &view.vmm) {
        // Shown without, should the host be gone by now.
        let spec = session.client.host(host).await.ok().and_then(|host| host.spec);
        view.compare(spec.and_then(|spec| spec.vmm));
    }
    session.out.show(&view)
}

async fn create(session: &Session, args: &CreateArgs) -> Result<()> {
    let restart = match args.restart {
        Restart::Never => v1::RestartPolicy::Never,
        Restart::OnFailure => v1::RestartPolicy::OnFailure,
    };
    let balloon = super::memory::balloon(session, args.balloon).await?;
    let spec = v1::VmSpec {
        name: args.name.clone(),
        vcpus: args.vcpus,
        memory_mib: args.memory,
        kernel: args.image.clone(),
        initrd: args.initrd.clone().unwrap_or_default(),
        cmdline: args.cmdline.clone(),
        cpu_profile: args.cpu_profile.clone(),
        restart: restart.into(),
        host: args.host.clone().unwrap_or_default(),
        disks: args.disks.clone(),
        nics: args.nics.clone(),
        balloon: balloon.into(),
        virtio_console: args.virtio_console,
        cloud_init: super::cloud::read(&args.cloud)?,
        ..v1::VmSpec::default()
    };
    let mut vm = session.client.create_vm(spec, args.start).await?;
    if args.wait {
        vm = wait(session, &args.name, args.timeout, Goal::Running)
            .await?
            .unwrap_or(vm);
    }
    let view = VmView::from(vm);
    session.out.done(&view, &view.sentence())
}

/// What a wait waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    /// The guest runs.
    Running,
    /// Nothing of it runs.
    Stopped,
    /// It is no more.
    Gone,
}

impl Goal {
    fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Gone => "gone",
        }
    }

    /// Whether `vm` is where it ought to be; an error when it will not get there.
    fn reached(self, vm: &v1::Vm) -> Result<bool> {
        let (state, name) = (
            vm.state(),
            vm.spec
                .as_ref()
                .map(|spec| spec.name.as_str())
                .unwrap_or_default(),
        );
        match (self, state) {
            (Self::Running, v1::VmState::Running) | (Self::Stopped, v1::VmState::Stopped) => Ok(true),
            // What failed does not run either.
            (Self::Stopped, v1::VmState::Failed) if !vm.wanted_running => Ok(true),
            (Self::Running, v1::VmState::Failed) if !restarts(vm) => {
                let reason = vm.reason.clone().unwrap_or_default();
                let message = format!("{name} failed: {}", reason.message);
                Err(Failure::new(Exit::Failed, &reason.code, message))
            }
            (Self::Running, _) if !vm.wanted_running => {
                let message = format!("{name} was stopped meanwhile");
                Err(Failure::new(Exit::Refused, Code::VmStopped.as_str(), message))
            }
            (Self::Stopped, _) if vm.wanted_running => {
                let message = format!("{name} was started meanwhile");
                Err(Failure::new(Exit::Refused, Code::VmState.as_str(), message))
            }
            _ => Ok(false),
        }
    }
}

/// Whether the cluster will start a failed VM again by itself.
fn restarts(vm: &v1::Vm) -> bool {
    vm.spec
        .as_ref()
        .is_some_and(|spec| spec.restart() == v1::RestartPolicy::OnFailure)
}

async fn settle(session: &Session, args: &ActArgs, accepted: v1::Vm, goal: Goal) -> Result<()> {
    if args.no_wait {
        let view = VmView::from(accepted);
        let sentence = if view.deleting {
            format!("{} is being deleted", view.name)
        } else {
            view.sentence()
        };
        return session.out.done(&view, &sentence);
    }
    match wait(session, &args.vm, args.timeout, goal).await? {
        Some(vm) => {
            let view = VmView::from(vm);
            session.out.done(&view, &view.sentence())
        }
        None => session
            .out
            .done(&VmView::from(accepted), &format!("{} is deleted", args.vm)),
    }
}

/// Waits until the VM is where it ought to be; `None` when it is gone.
async fn wait(session: &Session, name: &str, timeout: Duration, goal: Goal) -> Result<Option<v1::Vm>> {
    tokio::select! {
        settled = poll(session, name, timeout, goal) => settled,
        _ = tokio::signal::ctrl_c() => {
            Err(Failure::interrupted(format!("stopped waiting for {name} to be {}", goal.word())))
        }
    }
}

async fn poll(session: &Session, name: &str, timeout: Duration, goal: Goal) -> Result<Option<v1::Vm>> {
    let until = Instant::now() + timeout;
    loop {
        let vm = match session.client.vm(name).await {
            Ok(vm) => vm,
            Err(failure) if goal == Goal::Gone && failure.code == Code::VmNotFound.as_str() => {
                return Ok(None);
            }
            Err(failure) => return Err(failure),
        };
        if goal.reached(&vm)? {
            return Ok(Some(vm));
        }
        if Instant::now() >= until {
            return Err(late(name, timeout, goal, &vm));
        }
        tokio::time::sleep(POLL).await;
    }
}

fn late(name: &str, timeout: Duration, goal: Goal, vm: &v1::Vm) -> Failure {
    let reason = vm.reason.as_ref().filter(|reason| !reason.message.is_empty());
    let heeds = vm.devices.as_ref().is_none_or(|devices| devices.heeds_button);
    let deaf = (vm.shutdown > 0 && !heeds).then(|| {
        ": the guest does not heed its power button; --force-after LENGTH or `ctl vm stop` end it".to_owned()
    });
    let why = reason
        .map(|reason| format!(": {} [{}]", reason.message, reason.code))
        .or(deaf)
        .unwrap_or_default();
    Failure::timed_out(format!(
        "{name} is {} after {} s, not {}{why}",
        vm_state_word(vm.state()),
        timeout.as_secs_f32(),
        goal.word()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(state: v1::VmState, wanted_running: bool, restart: v1::RestartPolicy) -> v1::Vm {
        v1::Vm {
            spec: Some(v1::VmSpec {
                name: "vm1".to_owned(),
                restart: restart.into(),
                ..Default::default()
            }),
            state: state.into(),
            wanted_running,
            reason: Some(v1::Reason {
                code: "vmm_died".to_owned(),
                message: "it ended".to_owned(),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_wait_for_running_ends_early_when_the_vm_will_not_run() {
        use v1::RestartPolicy::{Never, OnFailure};
        use v1::VmState::{Failed, Pending, Running, Stopping};
        assert!(Goal::Running.reached(&vm(Running, true, Never)).unwrap());
        assert!(!Goal::Running.reached(&vm(Pending, true, Never)).unwrap());
        let failed = Goal::Running.reached(&vm(Failed, true, Never)).unwrap_err();
        assert_eq!((failed.exit, failed.code.as_str()), (Exit::Failed, "vmm_died"));
        assert!(!Goal::Running.reached(&vm(Failed, true, OnFailure)).unwrap());
        assert_eq!(
            Goal::Running
                .reached(&vm(Stopping, false, Never))
                .unwrap_err()
                .exit,
            Exit::Refused
        );
    }

    #[test]
    fn a_wait_for_stopped_ends_early_when_somebody_starts_it() {
        use v1::RestartPolicy::Never;
        use v1::VmState::{Running, Starting, Stopped};
        assert!(Goal::Stopped.reached(&vm(Stopped, false, Never)).unwrap());
        assert!(!Goal::Stopped.reached(&vm(Running, false, Never)).unwrap());
        assert_eq!(
            Goal::Stopped
                .reached(&vm(Starting, true, Never))
                .unwrap_err()
                .exit,
            Exit::Refused
        );
        assert!(!Goal::Gone.reached(&vm(Running, false, Never)).unwrap());
    }

    #[test]
    fn a_wait_that_runs_out_says_where_the_vm_stands_and_why() {
        let vm = vm(v1::VmState::Pending, true, v1::RestartPolicy::Never);
        let failure = late("vm1", Duration::from_millis(1500), Goal::Running, &vm);
        assert_eq!(failure.exit, Exit::TimedOut);
        assert_eq!(
            failure.message,
            "vm1 is pending after 1.5 s, not running: it ended [vmm_died]"
        );
    }
}
