//! A migration as it goes on: each change by a long poll, which any controller answers, the next one when the leader has changed.

use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

use super::migrate::aborted;
use super::progress::Progress;
use super::{Session, not_too_soon};
use crate::failure::{Exit, Failure, Result};
use crate::view::MigrationView;

/// One long poll; also how long a controller that hangs can go unnoticed, beside the time that any call may take.
const WAIT: Duration = Duration::from_secs(5);

/// Where a migration was last seen.
pub struct Sight {
    id: String,
    seen: u64,
    asked: Option<Instant>,
}

impl Sight {
    /// Nothing of migration `id` was seen yet: the first look is answered at once.
    pub fn of(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            seen: 0,
            asked: None,
        }
    }

    /// Waits until something is new, and gives it; now and then what is known already. Cancel-safe: what is dropped is
    /// seen by the next call.
    pub async fn next(&mut self, session: &Session) -> Result<MigrationView> {
        // Figures may change with every report, and an older controller answers every time at once.
        if let Some(asked) = self.asked {
            not_too_soon(asked).await;
        }
        self.asked = Some(Instant::now());
        let answer = session.client.watch_migration(&self.id, self.seen, WAIT).await?;
        self.seen = answer.seen;
        Ok(MigrationView::from(answer.migration.unwrap_or_default()))
    }
}

/// What is said when a migration that goes on can be seen no more.
pub fn lost_sight(id: &str, mut failure: Failure) -> Failure {
    failure.message = format!(
        "lost sight of {id}, which goes on without us: {}",
        failure.message
    );
    failure
}

/// `ctl migration show ID --follow`: to the migration's end, whose exit code is ours. Ctrl-C only stops following.
pub async fn follow(session: &Session, id: &str) -> Result<()> {
    let mut interrupts =
        signal(SignalKind::interrupt()).map_err(|error| Failure::io("cannot listen for Ctrl-C", &error))?;
    let mut progress = Progress::new(session.out);
    let mut sight = Sight::of(id);
    let mut last: Option<MigrationView> = None;
    let ended = loop {
        let next = tokio::select! {
            next = sight.next(session) => next,
            _ = interrupts.recv() => Err(stopped(id, last.as_ref())),
        };
        match next {
            Ok(view) if last.as_ref() != Some(&view) => {
                if session.out.json() {
                    session.out.stream(&view, "")?;
                }
                progress.show(&view);
                let ended = view.ended();
                last = Some(view.clone());
                if ended {
                    break Ok(view);
                }
            }
            Ok(_) => {}
            Err(failure) if last.is_some() && failure.exit != Exit::Interrupted => {
                break Err(lost_sight(id, failure));
            }
            Err(failure) => break Err(failure),
        }
    };
    progress.finish();
    let ended = ended?;
    if session.out.talkative() {
        session.out.show(&ended)?;
    }
    if ended.phase == "done" {
        return Ok(());
    }
    Err(aborted(&ended, false))
}

fn stopped(id: &str, last: Option<&MigrationView>) -> Failure {
    let phase = last.map_or("unseen", |view| view.phase);
    Failure::interrupted(format!("stopped following {id}, which goes on; it is {phase}"))
}
