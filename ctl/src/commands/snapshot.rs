//! `ctl vm snapshot create|list|show|restore|delete` and `ctl vm clone`.
//!
//! A snapshot belongs to the cluster: this process only watches it. Ctrl-C asks for its end and goes on watching until that has come; a second
//! one stops watching. What is restored goes on without us: there Ctrl-C only stops waiting.

use std::time::{Duration, Instant};

use drover_proto::{Code, v1};
use tokio::signal::unix::{SignalKind, signal};

use super::bar::Bar;
use super::{POLL, Session};
use crate::args::SnapshotCommand;
use crate::failure::{Exit, Failure, Result};
use crate::view::{BytesView, SnapshotView, VmView};

/// `ctl vm snapshot …`
pub async fn run(session: &Session, command: &SnapshotCommand) -> Result<()> {
    match command {
        SnapshotCommand::Create {
            vm, name, no_wait, ..
        } => {
            let name = name.as_deref().unwrap_or_default();
            let begun = SnapshotView::from(session.client.create_snapshot(vm, name).await?);
            if *no_wait {
                return session.out.done(&begun, &begun.sentence());
            }
            let view = taken(session, begun).await?;
            session.out.done(&view, &view.sentence())
        }
        SnapshotCommand::List { vm } => {
            let snapshots = session
                .client
                .snapshots(vm.as_deref().unwrap_or_default())
                .await?;
            let views: Vec<_> = snapshots.into_iter().map(SnapshotView::from).collect();
            session.out.list(&views)
        }
        SnapshotCommand::Show { vm, snapshot } => {
            let snapshot = session.client.snapshot(vm, snapshot).await?;
            session.out.show(&SnapshotView::from(snapshot))
        }
        SnapshotCommand::Restore {
            vm,
            snapshot,
            clone,
            new_addresses,
            no_wait,
            timeout,
        } => {
            let clone = clone.as_deref().unwrap_or_default();
            let accepted = session
                .client
                .restore_vm(vm, snapshot, clone, *new_addresses)
                .await?;
            if *no_wait {
                let view = VmView::from(accepted);
                let sentence = format!("{} is to begin as {snapshot} of {vm}", view.name);
                return session.out.done(&view, &sentence);
            }
            let view = restored(session, &VmView::from(accepted).name, *timeout).await?;
            let sentence = format!("{}, as it was", view.sentence());
            session.out.done(&view, &sentence)
        }
        SnapshotCommand::Delete {
            vm,
            snapshot,
            no_wait,
            timeout,
        } => {
            let deleted = SnapshotView::from(session.client.delete_snapshot(vm, snapshot).await?);
            let sentence = match no_wait {
                true => deleted.sentence(),
                false => {
                    gone(session, &deleted, *timeout).await?;
                    format!("{} of {vm} is deleted", deleted.name)
                }
            };
            session.out.done(&deleted, &sentence)
        }
    }
}

/// `ctl vm clone`: by a snapshot that goes when the clone runs.
pub async fn clone(session: &Session, vm: &str, name: &str) -> Result<()> {
    let begun = SnapshotView::from(session.client.create_snapshot(vm, "").await?);
    let snapshot = taken(session, begun).await?.id;
    let cloned = async {
        session.client.restore_vm(vm, &snapshot, name, true).await?;
        restored(session, name, None).await
    };
    let cloned = cloned.await;
    let deleted = session.client.delete_snapshot(vm, &snapshot).await;
    let view = cloned.map_err(|mut failure| {
        if deleted.is_err() {
            failure.message = format!("{}; its snapshot {snapshot} of {vm} is left", failure.message);
        }
        failure
    })?;
    deleted.map_err(|mut failure| {
        failure.message = format!(
            "{name} runs, but its snapshot {snapshot} of {vm} is left: {}",
            failure.message
        );
        failure
    })?;
    let sentence = format!("{}, as {vm} was", view.sentence());
    session.out.done(&view, &sentence)
}

/// Watches a snapshot that is being taken until it is there.
async fn taken(session: &Session, begun: SnapshotView) -> Result<SnapshotView> {
    // One listener for all the time, so that no Ctrl-C falls between two waits.
    let mut interrupts =
        signal(SignalKind::interrupt()).map_err(|error| Failure::io("cannot listen for Ctrl-C", &error))?;
    let what = format!("{} of {}", begun.name, begun.vm);
    let mut bar = Bar::new(session.out, &what);
    let mut cancelled = false;
    let ended = loop {
        let look = async {
            tokio::time::sleep(POLL).await;
            if cancelled {
                let ended = session.client.delete_snapshot(&begun.vm, &begun.id).await;
                ended.map(drop)?;
            }
            session.client.snapshot(&begun.vm, &begun.id).await
        };
        tokio::select! {
            looked = look => match looked.map(SnapshotView::from) {
                Ok(view) if view.phase == "creating" || cancelled => bar.show(&what, view.progress),
                Ok(view) => break Ok(view),
                Err(failure) => break Err(failure),
            },
            _ = interrupts.recv() => {
                if cancelled {
                    break Err(Failure::interrupted(format!("stopped watching {what}, which is being deleted")));
                }
                cancelled = true;
                bar.remark(&format!("ending {what} (Ctrl-C again: stop watching)"));
            }
        }
    };
    bar.finish();
    match ended {
        Ok(view) if view.phase == "ready" => Ok(view),
        Ok(view) => Err(not_there(&view)),
        Err(failure) if failure.code == Code::SnapshotNotFound.as_str() && cancelled => Err(Failure::new(
            Exit::Interrupted,
            Code::Cancelled.as_str(),
            format!("{what} was ended, nothing is left of it"),
        )),
        Err(mut failure) => {
            failure.message = format!("lost sight of {what}: {}", failure.message);
            Err(failure)
        }
    }
}

fn not_there(view: &SnapshotView) -> Failure {
    match &view.reason {
        Some(reason) => Failure::new(Exit::Failed, &reason.code, view.sentence()),
        None => Failure::new(Exit::Refused, Code::SnapshotNotReady.as_str(), view.sentence()),
    }
}

/// Waits until what a snapshot left is removed.
async fn gone(session: &Session, deleted: &SnapshotView, timeout: Duration) -> Result<()> {
    let until = Instant::now() + timeout;
    loop {
        match session.client.snapshot(&deleted.vm, &deleted.id).await {
            Err(failure) if failure.code == Code::SnapshotNotFound.as_str() => return Ok(()),
            Err(failure) => return Err(failure),
            Ok(_) if Instant::now() >= until => {
                let SnapshotView { name, vm, pool, .. } = deleted;
                let seconds = timeout.as_secs_f32();
                let message = format!(
                    "{name} of {vm} is deleting after {seconds} s: its files go when a host that has pool {pool} is up"
                );
                return Err(Failure::timed_out(message));
            }
            Ok(_) => tokio::time::sleep(POLL).await,
        }
    }
}

/// Waits until a restored VM runs.
async fn restored(session: &Session, name: &str, timeout: Option<Duration>) -> Result<VmView> {
    let until = timeout.map(|timeout| Instant::now() + timeout);
    let mut bar = Bar::new(session.out, name);
    let poll = async {
        loop {
            let vm = session.client.vm(name).await?;
            if let Some(outcome) = outcome(name, &vm) {
                return outcome.map(|()| vm);
            }
            let progress = vm.restore.as_ref().and_then(|restore| restore.progress);
            let word = crate::view::vm_state_word(vm.state());
            bar.show(&format!("{name} {word}"), progress.map(BytesView::from));
            if until.is_some_and(|until| Instant::now() >= until) {
                let message = format!("{name} is {word} and does not run yet; it goes on without us");
                return Err(Failure::timed_out(message));
            }
            tokio::time::sleep(POLL).await;
        }
    };
    let ended = tokio::select! {
        ended = poll => ended,
        _ = tokio::signal::ctrl_c() => {
            let message = format!("stopped waiting for {name}, which goes on; `ctl vm stop {name}` has it as it was");
            Err(Failure::interrupted(message))
        }
    };
    bar.finish();
    ended.map(VmView::from)
}

/// What became of the restore, once something has.
fn outcome(name: &str, vm: &v1::Vm) -> Option<Result<()>> {
    let begun = vm.restore.is_none();
    match vm.state() {
        v1::VmState::Running if begun => Some(Ok(())),
        v1::VmState::Failed => {
            let reason = vm.reason.clone().unwrap_or_default();
            let so_far = if begun {
                ""
            } else {
                "; its volumes are as they were"
            };
            let message = format!("{name} failed: {}{so_far}", reason.message);
            Some(Err(Failure::new(Exit::Failed, &reason.code, message)))
        }
        _ if !vm.wanted_running => {
            let message = format!("{name} was stopped meanwhile");
            Some(Err(Failure::new(
                Exit::Refused,
                Code::VmStopped.as_str(),
                message,
            )))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_vm_is_waited_for_until_it_runs_as_the_snapshot_or_will_not() {
        let vm = |state: v1::VmState, pending: bool, wanted_running: bool| v1::Vm {
            state: state.into(),
            wanted_running,
            restore: pending.then(v1::Restore::default),
            ..v1::Vm::default()
        };
        use v1::VmState::{Failed, Pending, Running, Starting, Stopped};
        for (vm, ends) in [
            (vm(Pending, true, true), None),
            (vm(Starting, true, true), None),
            (vm(Starting, false, true), None),
            (vm(Running, false, true), Some(Exit::Ok)),
            (vm(Failed, true, true), Some(Exit::Failed)),
            (vm(Stopped, false, false), Some(Exit::Refused)),
        ] {
            let exit =
                outcome("vm1", &vm).map(|outcome| outcome.map_or_else(|failure| failure.exit, |()| Exit::Ok));
            assert_eq!(exit, ends, "{vm:?}");
        }
    }
}
