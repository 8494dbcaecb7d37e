//! `ctl migrate` and `ctl migration …`.
//!
//! The migration belongs to the cluster: this process only watches it. Ctrl-C asks for its cancellation and goes on
//! watching, since the hand-over may already be in the log; a second Ctrl-C stops watching.

use std::time::{Duration, Instant};

use drover_proto::{Code, v1};
use tokio::signal::unix::{SignalKind, signal};

use super::follow::{self, Sight, lost_sight};
use super::progress::Progress;
use super::{POLL, Session};
use crate::args::{MigrateArgs, MigrationCommand, MigrationState};
use crate::failure::{Exit, Failure, Result};
use crate::view::{MigrationView, ReasonView};

/// `ctl migrate`
pub async fn migrate(session: &Session, args: &MigrateArgs) -> Result<()> {
    let options = options(args)?;
    if args.dry_run {
        return super::dry_run::run(session, args, options).await;
    }
    let planned = session
        .client
        .migrate(&args.vm, args.host.as_deref().unwrap_or_default(), options)
        .await?;
    let planned = MigrationView::from(planned);
    if args.detach {
        let sentence = format!(
            "{}; follow it with `ctl migration show {} --follow`",
            planned.sentence(),
            planned.id
        );
        return session.out.done(&planned, &sentence);
    }
    let (ended, cancelled) = watch(session, planned).await?;
    receipt(session, &ended)?;
    match &ended.reason {
        Some(reason) if ended.phase == "done" => Err(lost(&ended, reason)),
        None if ended.phase == "done" => Ok(()),
        _ => Err(aborted(&ended, cancelled)),
    }
}

/// It was committed, and the run at the target ended before it had all pages.
fn lost(ended: &MigrationView, reason: &ReasonView) -> Failure {
    let MigrationView { id, vm, to, .. } = ended;
    let message = format!(
        "{id} was committed, but {vm} ended on {to} before it had all its pages: {}",
        reason.message
    );
    Failure::new(Exit::Aborted, &reason.code, message)
}

/// An option's length in milliseconds; 0 where it was not given.
pub fn length_ms<T: TryFrom<u128> + Default>(option: &str, length: Option<Duration>) -> Result<T> {
    length.map_or(Ok(T::default()), |length| {
        T::try_from(length.as_millis()).map_err(|_| Failure::usage(format!("--{option} is too long")))
    })
}

fn options(args: &MigrateArgs) -> Result<v1::MigrationOptions> {
    Ok(v1::MigrationOptions {
        max_downtime_ms: length_ms("max-downtime", args.max_downtime)?,
        deadline_ms: length_ms("deadline", args.deadline)?,
        bandwidth_mib_s: args.bandwidth.unwrap_or(0),
        streams: args.streams.unwrap_or(0),
        plaintext: args.plaintext,
        compression: v1::Compression::from(args.compression).into(),
        max_throttle_percent: args.throttle.unwrap_or(0),
        allow_postcopy: args.allow_postcopy,
        ..Default::default()
    })
}

/// Follows a migration to its end; also tells whether Ctrl-C asked for its cancellation.
pub async fn watch(session: &Session, planned: MigrationView) -> Result<(MigrationView, bool)> {
    // One listener for all the time, so that no Ctrl-C falls between two waits.
    let mut interrupts =
        signal(SignalKind::interrupt()).map_err(|error| Failure::io("cannot listen for Ctrl-C", &error))?;
    let mut progress = Progress::new(session.out);
    let mut sight = Sight::of(&planned.id);
    let mut seen = planned;
    let mut cancelled = false;
    let outcome = loop {
        if seen.ended() {
            break Ok(());
        }
        progress.show(&seen);
        let step = async {
            if cancelled {
                ask_cancel(session, &seen.id).await?;
            }
            let next = sight.next(session).await;
            next.map_err(|failure| lost_sight(&seen.id, failure))
        };
        tokio::select! {
            looked = step => match looked {
                Ok(looked) => seen = looked,
                Err(failure) => break Err(failure),
            },
            _ = interrupts.recv() => {
                if cancelled {
                    break Err(Failure::interrupted(format!("stopped watching; {} is {}", seen.id, seen.phase)));
                }
                cancelled = true;
                progress.remark(&format!("cancelling {} (Ctrl-C again: stop watching)", seen.id));
            }
        }
    };
    progress.finish();
    outcome.map(|()| (seen, cancelled))
}

/// Asks for the cancellation; asking again changes nothing.
async fn ask_cancel(session: &Session, id: &str) -> Result<()> {
    match session.client.cancel_migration(id).await {
        Ok(_) => Ok(()),
        // It was over before: the outcome is about to be read.
        Err(failure) if failure.code == Code::MigrationEnded.as_str() => Ok(()),
        Err(failure) => Err(failure),
    }
}

async fn look(session: &Session, id: &str) -> Result<MigrationView> {
    session
        .client
        .migration(id)
        .await
        .map(MigrationView::from)
        .map_err(|failure| lost_sight(id, failure))
}

fn receipt(session: &Session, ended: &MigrationView) -> Result<()> {
    if session.out.quiet && !session.out.json() {
        return Ok(());
    }
    session.out.show(ended)
}

/// The failure of a migration that ended aborted. `cancelled`: this process had asked for it.
pub fn aborted(ended: &MigrationView, cancelled: bool) -> Failure {
    let code = ended
        .reason
        .as_ref()
        .map_or("aborted", |reason| reason.code.as_str());
    let exit = if cancelled && code == Code::Cancelled.as_str() {
        Exit::Interrupted
    } else {
        Exit::Aborted
    };
    let why = ended
        .reason
        .as_ref()
        .map(|reason| format!(": {}", reason.message))
        .unwrap_or_default();
    let during = ended
        .ended_in
        .map(|phase| format!(" during {phase}"))
        .unwrap_or_default();
    Failure::new(
        exit,
        code,
        format!(
            "{} was aborted{during}, {} stays on {}{why}",
            ended.id, ended.vm, ended.from
        ),
    )
}

/// `ctl migration …`
pub async fn run(session: &Session, command: &MigrationCommand) -> Result<()> {
    match command {
        MigrationCommand::List { vm, host, state } => {
            let migrations = session
                .client
                .migrations(vm.as_deref().unwrap_or_default())
                .await?;
            let touches = |view: &MigrationView| {
                host.as_ref()
                    .is_none_or(|host| [&view.from, &view.to].contains(&host))
            };
            let wanted = |view: &MigrationView| state.is_none_or(|state| state.holds(view));
            let views = migrations.into_iter().map(MigrationView::from);
            let views: Vec<_> = views.filter(|view| touches(view) && wanted(view)).collect();
            session.out.list(&views)
        }
        MigrationCommand::Show { id, follow: true } => follow::follow(session, id).await,
        MigrationCommand::Show { id, .. } => session
            .out
            .show(&MigrationView::from(session.client.migration(id).await?)),
        MigrationCommand::Postcopy { id } => {
            let seen = MigrationView::from(session.client.postcopy_migration(id).await?);
            let sentence =
                format!("{id} goes on by post-copy; follow it with `ctl migration show {id} --follow`");
            session.out.done(&seen, &sentence)
        }
        MigrationCommand::Cancel { id, no_wait, timeout } => cancel(session, id, *no_wait, *timeout).await,
    }
}

impl MigrationState {
    fn holds(self, view: &MigrationView) -> bool {
        match self {
            Self::Active => !view.ended(),
            Self::Ended => view.ended(),
            Self::Done => view.phase == "done",
            Self::Aborted => view.phase == "aborted",
        }
    }
}

async fn cancel(session: &Session, id: &str, no_wait: bool, timeout: Duration) -> Result<()> {
    let mut seen = MigrationView::from(session.client.cancel_migration(id).await?);
    let until = Instant::now() + timeout;
    while !no_wait && !seen.ended() {
        if Instant::now() >= until {
            let message = format!(
                "{id} is {} after {} s, not ended",
                seen.phase,
                timeout.as_secs_f32()
            );
            return Err(Failure::timed_out(message));
        }
        tokio::time::sleep(POLL).await;
        seen = look(session, id).await?;
    }
    session.out.done(&seen, &seen.sentence())?;
    if seen.phase == "done" {
        let message = format!(
            "{id} was committed before it could be cancelled: {} runs on {}",
            seen.vm, seen.to
        );
        return Err(Failure::new(
            Exit::Refused,
            Code::MigrationEnded.as_str(),
            message,
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::ReasonView;

    fn ended(code: &str) -> MigrationView {
        let mut view = MigrationView::from(v1::Migration {
            id: "m1".to_owned(),
            vm: "vm1".to_owned(),
            from: "host1".to_owned(),
            phase: v1::MigrationPhase::Aborted.into(),
            ended_in: v1::MigrationPhase::PreCopy.into(),
            ..Default::default()
        });
        view.reason = Some(ReasonView {
            code: code.to_owned(),
            message: "because".to_owned(),
        });
        view
    }

    #[test]
    fn an_abort_has_its_exit_code_and_an_own_cancel_another() {
        assert_eq!(aborted(&ended("link_lost"), false).exit, Exit::Aborted);
        assert_eq!(aborted(&ended("cancelled"), false).exit, Exit::Aborted);
        assert_eq!(aborted(&ended("cancelled"), true).exit, Exit::Interrupted);
        assert_eq!(aborted(&ended("link_lost"), true).exit, Exit::Aborted);
        let failure = aborted(&ended("link_lost"), false);
        assert_eq!(failure.code, "link_lost");
        assert_eq!(
            failure.message,
            "m1 was aborted during pre-copy, vm1 stays on host1: because"
        );
    }
}
